"""What a server says of its rewards: names, versions, where the weights come from and their digests, a probe prompt."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence

import torch

from fmg.core.cache import content_hash
from fmg.core.errors import FmgError, UsageError
from fmg.core.hub import locate
from fmg.core.machine import installed_versions
from fmg.registry import rewards as rewards_registry
from fmg.registry.references import PYTHON_REWARD, RewardRef
from fmg.rewards.base import Checked
from fmg.rewards.service.wire import probe_image
from fmg.version import __version__

_PACKAGES = ("torch", "transformers", "onnxruntime", "rapidocr", "pillow")

# One of them suits every built-in reward: free text, GenEval's templates, quoted text, the scenes of the shapes world.
PROBE_PROMPTS = ("a photo of a red apple", 'a sign that says "HELLO"', "a red circle")


def probe_prompt(reward: Checked) -> str:
    """The first of `PROBE_PROMPTS` that the reward accepts.

    Raises:
        UsageError: when it accepts none.
    """
    refusal: FmgError | None = None
    for prompt in PROBE_PROMPTS:
        try:
            reward.check_prompts([prompt])
        except UsageError as error:
            refusal = error
        else:
            return prompt
    assert refusal is not None
    raise UsageError(f"The reward '{reward.name}' accepts none of the probe prompts: {refusal.what}", refusal.fix)


def references(
    names: Sequence[str | Mapping[str, object]], options: Mapping[str, Mapping[str, object]]
) -> list[RewardRef]:
    """References to rewards by name, by `python:module:function`, or as entries of a recipe, with options by name.

    Raises:
        UsageError: for an unknown name or option.
    """
    found = []
    for entry in names:
        own = dict(entry) if isinstance(entry, Mapping) else {"name": entry}
        name = str(own.pop("name"))
        component, _, target = name.partition(":") if name.startswith(f"{PYTHON_REWARD}:") else (name, "", "")
        given = {**options.get(name, {}), **own, **({"target": target} if target else {})}
        found.append(RewardRef(name=component, config=rewards_registry.config(component, given)))
    return found


def describe(
    rewards: Mapping[str, Checked], references: Sequence[RewardRef], device: torch.device
) -> dict[str, object]:
    """What `/info` returns beside the limits, as plain JSON values.

    Every reward scores the probe image on `device`, which loads its weights and shows that it works. The weights of
    networks are listed with the sha256 of their first file.

    Raises:
        FmgError: when a reward cannot score it.
    """
    entries: dict[str, object] = {}
    for reference in references:
        reward = rewards[reference.label]
        prompt = probe_prompt(reward)
        reward(probe_image().to(device), [prompt])
        entries[reference.label] = {
            "component": reference.name,
            "options": reference.config.model_dump(mode="json"),
            "probe_prompt": prompt,
            "weights": _weights(reference),
        }
    return {
        "fmg": __version__,
        "python": platform.python_version(),
        "packages": installed_versions(_PACKAGES),
        "rewards": entries,
    }


def _weights(reference: RewardRef) -> list[dict[str, str]]:
    located = [locate(asset, "reward", reference.label) for asset in reference.config.assets()]
    return [{"what": one.asset.what, "source": one.asset.source, "sha256": content_hash(one.path)} for one in located]
