"""The layers of a recipe: shorthand, merging and the command line's flags. Values are Nodes, which keep their source.

Order: the model's own default recipe < the recipe that the file extends < file < flags < `--set`. Within flags, within
`--set` and within the arguments of a Python call the more specific path wins whatever the order (`optimizer.lr` over
`optimizer`), then the last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fmg.core.errors import UsageError, suggestion
from fmg.core.prompt import PROMPT_FILE_SUFFIXES
from fmg.recipe.document import Node, Source, node_of, parse_value
from fmg.recipe.sections import PYTHON_REWARD
from fmg.registry.catalog import prompt_sets, registry_for, rewards

FLAGS: Mapping[str, str] = {
    "model": "model",
    "stochasticizer": "stochasticizer",
    "reward": "rewards",
    "objective": "objective",
    "optimizer": "optimizer",
    "lr": "optimizer.lr",
    "lr-schedule": "train.lr_schedule",
    "prompts": "prompts",
    "steps": "rollout.steps",
    "iterations": "train.iterations",
    "seed": "train.seed",
    "device": "train.device",
    "dtype": "train.dtype",
    "stop-on-hacking": "eval.stop_on_hacking",
    "tracker": "trackers",
}
"""Flags of `fmg train` that set a value of the recipe, and the dotted path they set."""

ARGUMENTS: Mapping[str, str] = {name.replace("-", "_"): path for name, path in FLAGS.items()} | {
    "rewards": "rewards",
    "trackers": "trackers",
}
"""Short names of values in Python calls (`iterations=2`), and the dotted path they set."""

AUTO = "auto"
"""The name of the stochasticizer that the model declares."""

EXTENDS = "extends"
"""The key of a recipe file that names the recipe below it."""

Keys = tuple[str, ...]

_SECTIONS = ("rollout", "train", "lora", "eval")
COMPONENTS = {name: name for name in ("model", "stochasticizer", "objective", "optimizer")} | {"prompts": "prompt-set"}
"""The sections that hold one component, with its kind."""


def flag_layers(flags: Mapping[str, object]) -> list[Node]:
    """One layer for every flag that was given (is not None).

    Raises:
        UsageError: for an unknown flag or a malformed `--reward`.
    """
    for name in flags:
        if name not in FLAGS:
            raise UsageError(f"There is no flag '--{name}' that sets a recipe value", suggestion(name, FLAGS))
    layers = []
    for name in FLAGS:
        value = flags.get(name)
        if value is None or value in ((), []):
            continue
        source = Source("flag", f"--{name}")
        if name == "reward":
            texts = [value] if isinstance(value, str) else value
            value = [_weighted(str(text), source) for text in texts]  # type: ignore[attr-defined]
        layers.append(_at(FLAGS[name].split("."), node_of(value, source), source))
    return layers


def set_layers(sets: Sequence[str]) -> list[Node]:
    """One layer for every `--set path=value`; the value is YAML 1.2.

    Raises:
        UsageError: when the path or the value is malformed.
    """
    layers: list[tuple[Keys, Node]] = []
    for text in sets:
        path, equals, value = text.partition("=")
        source = Source("set", f"--set {text}")
        if not equals or not all(path.strip().split(".")):
            raise UsageError(
                f"'--set {text}' is not of the form PATH=VALUE", "Write, for example, --set optimizer.lr=1e-3."
            )
        parts = tuple(path.strip().split("."))
        layers.append((parts, _at(parts, parse_value(value, source), source)))
    return _general_first(layers)


def argument_layers(values: Mapping[str, object]) -> list[Node]:
    """One layer for every dotted path, or short name of `ARGUMENTS`, of a Python call.

    Raises:
        UsageError: for a name that is neither.
    """
    layers: list[tuple[Keys, Node]] = []
    for path, value in values.items():
        if "." not in path and path not in ARGUMENTS and path not in _SECTIONS:
            raise UsageError(f"The recipe has no key '{path}'", suggestion(path, {*ARGUMENTS, *_SECTIONS}))
        parts, source = tuple(ARGUMENTS.get(path, path).split(".")), Source("argument", path)
        layers.append((parts, _at(parts, node_of(value, source), source)))
    return _general_first(layers)


def _general_first(layers: Iterable[tuple[Keys, Node]]) -> list[Node]:
    # another name replaces the whole component with its options, so it comes first
    return [layer for _, layer in sorted(layers, key=lambda item: len(item[0]) - (item[0][-1] == "name"))]


def expand(root: Node) -> Node:
    """Expands shorthand: a bare name, one reward instead of a list, a prompt file, `python:module:function`."""
    sections = dict(root.mapping or {})
    for name in COMPONENTS:
        if name in sections:
            sections[name] = _component(sections[name], prompts=name == "prompts")
    if "rewards" in sections:
        sections["rewards"] = _listed(sections["rewards"], _reward)
    if "trackers" in sections:
        sections["trackers"] = _listed(sections["trackers"], _component)
    evaluation = sections.get("eval")
    if evaluation is not None and evaluation.mapping is not None:
        entries = dict(evaluation.mapping)
        if "prompts" in entries:
            entries["prompts"] = _component(entries["prompts"], prompts=True)
        if "rewards" in entries:
            entries["rewards"] = _listed(entries["rewards"], _reward)
        sections["eval"] = Node(entries, evaluation.source)
    return Node(sections, root.source)


def anchored(root: Node, folder: Path) -> Node:
    """The values of a recipe file, with its prompt files relative to the folder of the recipe."""
    root = expand(root)
    sections = dict(root.mapping or {})
    if "prompts" in sections:
        sections["prompts"] = _in_folder(sections["prompts"], folder)
    evaluation = sections.get("eval")
    if evaluation is not None and evaluation.mapping is not None and "prompts" in evaluation.mapping:
        held_out = _in_folder(evaluation.mapping["prompts"], folder)
        sections["eval"] = Node({**evaluation.mapping, "prompts": held_out}, evaluation.source)
    return Node(sections, root.source)


def _in_folder(prompts: Node, folder: Path) -> Node:
    path = prompts.exact(("path",))
    if prompts.mapping is None or path is None or not isinstance(path.value, str) or not path.value:
        return prompts
    return Node({**prompts.mapping, "path": Node(str(folder / path.value), path.source)}, prompts.source)


def merge(lower: Node, upper: Node, section: str = "") -> Node:
    """`upper` over `lower`. Mappings merge key by key, unless `upper` names another component, which drops the options.

    Sequences and scalars are replaced; `rewards.0.weight` reaches into a sequence.

    Args:
        lower, upper: values at the same place in a recipe.
        section: the name of the section they form; empty elsewhere.

    Raises:
        UsageError: for a list position that does not exist.
    """
    below, above = lower.mapping, upper.mapping
    if above is None:
        return upper
    if isinstance(lower.value, tuple) and above and all(key.isdecimal() for key in above):
        items = list(lower.value)
        for key, child in above.items():
            if int(key) >= len(items):
                raise UsageError(
                    f"{child.source.text}: there is no entry {key} in a list of {len(items)}",
                    "Entries count from 0; give the whole list to add one.",
                )
            items[int(key)] = merge(items[int(key)], child)
        return Node(tuple(items), lower.source)
    if below is None or _names_another(below, above):
        return upper
    if section in COMPONENTS:
        below = _without_rivals(below, above, _exclusive(section, {**below, **above}))
    merged = {key: merge(below[key], child, key) if key in below else child for key, child in above.items()}
    merged = {**below, **merged}
    return Node(merged, upper.source)


def merge_all(layers: Iterable[Node]) -> Node:
    """All layers, later ones over earlier ones, shorthand written out."""
    root = Node({}, Source("built-in", "default"))
    for layer in layers:
        root = merge(root, expand(layer))
    return root


def refuse_code(root: Node, *, allowed: bool) -> None:
    """Refuses reward options of a recipe file that need the user's consent, unless `allowed`.

    The config of a reward declares them (`ComponentConfig.needs_consent`): code to run, servers to send images to,
    environment variables to send there.

    Raises:
        UsageError: naming the option and the flag that allows it.
    """
    for path in () if allowed else (("rewards",), ("eval", "rewards")):
        found = root.exact(path)
        for entry in found.value if found is not None and isinstance(found.value, tuple) else ():
            name = entry.exact(("name",))
            if name is None or name.value not in rewards.names():
                continue
            for option, effect in rewards.config_class(str(name.value)).needs_consent.items():
                given = entry.exact((option,))
                if given is not None and given.value is not None and given.source.kind in ("model", "file"):
                    raise UsageError(
                        f"{given.source.text}: the recipe {effect}: '{option}' of the reward '{name.value}' "
                        f"is '{given.plain()}'",
                        "If you trust it, give --allow-code; or state the reward and its options yourself.",
                    )


def _at(path: Sequence[str], node: Node, source: Source) -> Node:
    for part in reversed(path):
        node = Node({part: node}, source)
    return node


def _exclusive(section: str, component: Mapping[str, Node]) -> frozenset[str]:
    """Groups of options of a component of which at most one may be given."""
    registry, name = registry_for(COMPONENTS[section]), component.get("name")
    if name is None:
        return frozenset()
    # `auto` depends on the model, which may not be known yet
    names = registry.names() if name.value == AUTO else [str(name.value)]
    return frozenset().union(*(registry.config_class(one).exclusive for one in names if one in registry.names()))


def _without_rivals(
    below: Mapping[str, Node], above: Mapping[str, Node], exclusive: frozenset[str]
) -> Mapping[str, Node]:
    """The options of a lower layer without those that the upper layer replaces; two in `--set` are an error."""
    given = [above[option] for option in exclusive & above.keys() if above[option].value is not None]
    if not given:
        return below
    both = "set" if any(node.source.kind == "set" for node in given) else None
    return {key: node for key, node in below.items() if key not in exclusive or node.source.kind == both}


def _names_another(below: Mapping[str, Node], above: Mapping[str, Node]) -> bool:
    return "name" in below and "name" in above and below["name"].value != above["name"].value


def _component(node: Node, *, prompts: bool = False) -> Node:
    if not isinstance(node.value, str):
        return node
    name = Node(node.value, node.source)
    if prompts and node.value not in prompt_sets.names() and _is_file_name(node.value):
        return Node({"name": Node("file", node.source), "path": name}, node.source)
    return Node({"name": name}, node.source)


def _is_file_name(text: str) -> bool:
    return text.endswith(PROMPT_FILE_SUFFIXES) or "/" in text or "\\" in text


def _listed(node: Node, expanded: Callable[[Node], Node]) -> Node:
    """A list of components, of which one may stand without a list, and `0.weight` reaches into one of a lower layer."""
    if isinstance(node.value, str) or (node.mapping is not None and "name" in node.mapping):
        node = Node((node,), node.source)
    if isinstance(node.value, tuple):
        return Node(tuple(expanded(entry) for entry in node.value), node.source)
    if node.mapping is not None:
        return Node({key: expanded(entry) for key, entry in node.mapping.items()}, node.source)
    return node


def _reward(node: Node) -> Node:
    entry = _component(node)
    name = entry.exact(("name",))
    prefix = f"{PYTHON_REWARD}:"
    if entry.mapping is None or name is None or not isinstance(name.value, str) or not name.value.startswith(prefix):
        return entry
    own = {"name": Node(PYTHON_REWARD, name.source), "target": Node(name.value.removeprefix(prefix), name.source)}
    return Node({**entry.mapping, **own}, entry.source)


def _weighted(text: str, source: Source) -> dict[str, Any]:
    name, equals, weight = text.partition("=")
    if not equals:
        return {"name": name}
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(
            f"{source.text} {text}: the weight '{weight}' is not a number", f"Write, for example, --reward {name}=0.5."
        )
    return {"name": name, "weight": value}
