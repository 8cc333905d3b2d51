"""YAML 1.2 documents as trees in which every value knows its source."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Literal, NoReturn, TypeGuard

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode

from fmg.core.errors import UsageError, reason

Scalar = str | int | float | bool | None
Plain = Scalar | list["Plain"] | dict[str, "Plain"]

_TAG = "tag:yaml.org,2002:"
_MAX_BYTES = 200_000
_NO_TEXT = re.compile("[\x00\ud800-\udfff]")
_HALF = "a string contains a NUL or an unpaired surrogate"
_KINDS = {f"{_TAG}bool": "true or false", f"{_TAG}int": "a whole number", f"{_TAG}float": "a number"}
_NO_TAGS = "Use plain numbers, strings, lists and mappings."


@dataclass(frozen=True)
class Source:
    """The source of a value.

    Attributes:
        kind: `built-in` (default of the code), `model` (the model's own default recipe), `file` (the requested recipe),
            `flag`, `set` (`--set`) or `argument` (Python).
        text: readable form: `recipe.yaml:12`, `--lr`, `--set optimizer.lr=1e-3`.
    """

    kind: Literal["built-in", "model", "file", "flag", "set", "argument"]
    text: str


@dataclass(frozen=True)
class Node:
    """A value and its source; children of mappings and sequences are Nodes."""

    value: Scalar | Mapping[str, Node] | tuple[Node, ...]
    source: Source

    @property
    def mapping(self) -> Mapping[str, Node] | None:
        """The children, if this is a mapping."""
        return self.value if isinstance(self.value, Mapping) else None

    def plain(self) -> Plain:
        """The value without sources."""
        if isinstance(self.value, Mapping):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, tuple):
            return [child.plain() for child in self.value]
        return self.value

    def exact(self, path: Iterable[str]) -> Node | None:
        """The node at `path`; positions in sequences are decimal strings. None when there is none."""
        node: Node | None = self
        for part in path:
            node = None if node is None else node._children().get(part)
        return node

    def find(self, path: Iterable[str | int]) -> Node:
        """The node at `path`, or the innermost existing one on the way to it."""
        node = self
        for part in path:
            child = node._children().get(str(part))
            if child is None:
                return node
            node = child
        return node

    def _children(self) -> Mapping[str, Node]:
        if isinstance(self.value, tuple):
            return {str(index): child for index, child in enumerate(self.value)}
        return self.mapping or {}


def node_of(value: object, source: Source) -> Node:
    """A tree whose every value comes from `source`.

    Raises:
        UsageError: for a value that a recipe cannot contain.
    """
    if isinstance(value, Node):
        return value
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, str) and _NO_TEXT.search(value):
        raise UsageError(f"{source.text}: {_HALF}", "Remove it.")
    if value is None or isinstance(value, (str, int, float, bool)):
        return Node(value, source)
    if isinstance(value, Mapping):
        return Node({str(key): node_of(child, source) for key, child in value.items()}, source)
    if isinstance(value, Iterable):
        return Node(tuple(node_of(child, source) for child in value), source)
    raise UsageError(
        f"{source.text}: a recipe cannot contain a value of type {type(value).__name__}",
        "Give a number, a string, a list or a mapping.",
    )


def read_document(path: Path, kind: Literal["model", "file"], label: str) -> Node:
    """The mapping in a YAML file, with `label:line` as the source of every value.

    Raises:
        UsageError: missing, unreadable, not UTF-8, not YAML, duplicate keys, or not a mapping.
    """
    if path.is_dir():
        raise UsageError(f"{label} is a folder", _folder_advice(path))
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise UsageError(f"There is no file {label}", "Check the path of the recipe.") from None
    except OSError as error:
        raise UsageError(f"{label} cannot be read: {error.strerror}", "Check the file and its permissions.") from None
    if len(data) > _MAX_BYTES:
        raise UsageError(f"{label} has more than {_MAX_BYTES:,} bytes, too many for a recipe", "Check that it is one.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UsageError(f"{label}:{line}: the file is not UTF-8 text", "Save it as UTF-8.") from None
    return _Reader(label, kind).document(text)


def parse_value(text: str, source: Source) -> Node:
    """A YAML 1.2 value typed on the command line: `1e-3`, `null`, `[a, b]`, `{name: x}`.

    Raises:
        UsageError: when it is not YAML.
    """
    root = _Reader(source.text, source.kind).compose(text)
    return node_of(_Reader(source.text, source.kind).convert(root).plain() if root is not None else None, source)


class _Reader:
    """Composes one document. `label` prefixes the messages and the sources of its values."""

    def __init__(self, label: str, kind: Literal["built-in", "model", "file", "flag", "set", "argument"]) -> None:
        self._label = label
        self._kind = kind
        self._in_file = kind in ("model", "file")
        self._yaml = YAML(typ="safe", pure=True)
        self._seen: set[int] = set()

    def document(self, text: str) -> Node:
        root = self.compose(text)
        if root is None:
            raise UsageError(f"{self._label} is empty", "Start with a section, for example `train:`.")
        if not isinstance(root, MappingNode):
            self._fail(root, "a recipe must be a mapping of sections", "Start with a section, for example `train:`.")
        return self.convert(root)

    def compose(self, text: str) -> ScalarNode | SequenceNode | MappingNode | None:
        try:
            root: ScalarNode | SequenceNode | MappingNode | None = self._yaml.compose(StringIO(text))
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = f":{mark.line + 1}" if mark is not None and self._in_file else ""
            problem = " ".join(str(error.problem or error.context).split())
            raise UsageError(f"{self._label}{line}: this is not YAML: {problem}", "Correct the syntax.") from None
        except RecursionError:
            raise UsageError(f"{self._label}: values are nested too deeply", "Use at most five levels.") from None
        except (YAMLError, ValueError) as error:
            raise UsageError(f"{self._label}: this is not YAML: {reason(error)}", "Correct the syntax.") from None
        return root

    def convert(self, node: ScalarNode | SequenceNode | MappingNode, key: ScalarNode | None = None) -> Node:
        source = self._source(key or node)
        if id(node) in self._seen:
            self._fail(key or node, f"the alias '*{node.anchor}' is not allowed", "Write the value out.")
        self._seen.add(id(node))
        if isinstance(node, MappingNode) and node.tag == f"{_TAG}map":
            return Node(self._children(node), source)
        if isinstance(node, SequenceNode) and node.tag == f"{_TAG}seq":
            return Node(tuple(self.convert(child) for child in node.value), source)
        if isinstance(node, ScalarNode):
            return Node(self._scalar(node), source)
        return self._fail(node, f"the tag '{node.tag}' is not allowed", _NO_TAGS)

    def _children(self, node: MappingNode) -> dict[str, Node]:
        children: dict[str, Node] = {}
        lines: dict[str, int] = {}
        for key, child in node.value:
            if not isinstance(key, ScalarNode) or key.tag == f"{_TAG}merge":
                self._fail(key, "a key must be a plain word", "Write the keys out.")
            name = self._text(key, str(key.value))
            if name in children:
                first = f" (first on line {lines[name]})" if self._in_file else ""
                self._fail(key, f"the key '{name}' is given twice{first}", "Keep one of the two.")
            children[name] = self.convert(child, key)
            lines[name] = key.start_mark.line + 1
        return children

    def _scalar(self, node: ScalarNode) -> Scalar:
        tag, text = str(node.tag), str(node.value)
        if tag == f"{_TAG}null":
            return None
        if tag in (f"{_TAG}str", f"{_TAG}timestamp"):
            return self._text(node, text)
        if tag in _KINDS:
            try:
                value: bool | int | float = self._yaml.constructor.construct_object(node)
            except Exception:  # ruamel raises errors of many kinds when a text does not fit its tag
                self._fail(node, f"'{text}' is not {_KINDS[tag]}", "Correct the value.")
            return value
        return self._fail(node, f"the tag '{tag}' is not allowed", _NO_TAGS)

    def _text(self, node: ScalarNode, text: str) -> str:
        """A text that can occur in a file name, a prompt and JSON."""
        if _NO_TEXT.search(text):
            self._fail(node, _HALF, "Remove it.")
        return text

    def _source(self, node: ScalarNode | SequenceNode | MappingNode) -> Source:
        return Source(self._kind, f"{self._label}:{node.start_mark.line + 1}" if self._in_file else self._label)

    def _fail(self, node: ScalarNode | SequenceNode | MappingNode, what: str, fix: str) -> NoReturn:
        raise UsageError(f"{self._source(node).text}: {what}", fix)


def _folder_advice(folder: Path) -> str:
    inside = folder / "recipe.yaml"
    return f"Name the file inside it: {inside}" if inside.is_file() else "Give the path of a YAML file."


def render(value: Plain, comments: Mapping[str, str]) -> str:
    """Block-style YAML 1.2 that reads back to exactly `value`.

    Args:
        value: a mapping of plain values.
        comments: text to put at the end of the line of a dotted path (`optimizer.lr`, `rewards.0.weight`).
    """
    notes = {path: " ".join(text.split()) for path, text in comments.items()}
    lines = list(_render(value, (), 0))
    width = max((len(line) for line, path in lines if path in notes), default=0)
    return "".join(f"{line:<{width}}  # {notes[p]}\n" if p in notes else f"{line}\n" for line, p in lines)


def is_block(value: Plain) -> TypeGuard[list[dict[str, Plain]]]:
    """Whether a value is a list of mappings, whose entries have paths of their own (`rewards.0.weight`)."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) and item for item in value)


def leaves(value: Plain, path: tuple[str, ...] = (), *, into_lists: bool = False) -> Iterator[tuple[str, Plain]]:
    """The values of a plain recipe, each after its dotted path; the values in plain lists only if `into_lists`."""
    children: Iterable[tuple[object, Plain]]
    if isinstance(value, dict) and value:
        children = value.items()
    elif is_block(value) or (into_lists and isinstance(value, list) and value):
        children = enumerate(value)
    else:
        yield ".".join(path), value
        return
    for key, child in children:
        yield from leaves(child, (*path, str(key)), into_lists=into_lists)


def _render(value: Plain, path: tuple[str, ...], depth: int) -> Iterator[tuple[str, str]]:
    pad = "  " * depth
    items = value.items() if isinstance(value, dict) else ()
    for key, child in items:
        here = (*path, key)
        name = _text(key)
        if isinstance(child, dict) and child:
            yield f"{pad}{name}:", ".".join(here)
            yield from _render(child, here, depth + 1)
        elif is_block(child):
            yield f"{pad}{name}:", ".".join(here)
            for index, item in enumerate(child):
                block = list(_render(item, (*here, str(index)), depth + 2))
                first, first_path = block[0]
                yield f"{pad}  - {first.lstrip()}", first_path
                yield from block[1:]
        else:
            yield f"{pad}{name}: {_flow(child)}", ".".join(here)


def _flow(value: Plain) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_flow(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_text(key)}: {_flow(item)}' for key, item in value.items())}}}"
    return _text(value) if isinstance(value, str) else _number(value)


def _number(value: bool | int | float | None) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else (".inf" if value > 0 else "-.inf")
    text = repr(value)
    # YAML 1.1 readers take 1e-05 for a text unless the mantissa has a point
    return text.replace("e", ".0e") if "e" in text and "." not in text else text


_PLAIN_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*\Z")
_RESERVED = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}


def _text(value: str) -> str:
    plain = _PLAIN_WORD.match(value) and value.lower() not in _RESERVED
    if plain:
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08X}" for c in escaped) + '"'
