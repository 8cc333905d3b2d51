"""Rewards and feature extractors by name, with options that the command line or a caller gives by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from fmg.core.errors import UsageError, suggestion
from fmg.core.protocols import FeatureExtractor
from fmg.registry import feature_extractors
from fmg.registry import rewards as reward_registry
from fmg.registry.references import RewardRef
from fmg.rewards.service.describe import references

Options = Mapping[str, Mapping[str, object]]


def chosen_extractors(names: Sequence[str], options: Options) -> dict[str, FeatureExtractor]:
    """Extractors by name.

    Raises:
        UsageError: for an unknown name or option, or one given twice.
    """
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"The feature extractor '{twice}' is given twice", "Give each one once.")
    return {name: feature_extractors.build(name, options.get(name)) for name in names}


def chosen_rewards(
    names: Sequence[str | Mapping[str, object]] | None,
    own: Sequence[RewardRef],
    options: Options,
    *,
    taken: Collection[str],
) -> list[RewardRef]:
    """The rewards called `names`, or `own`, with `options` instead of what they had.

    Args:
        names: given by the user, by name or as entries of a recipe; None takes `own`.
        own: of a recipe.
        options: by name.
        taken: other names that options may belong to.

    Raises:
        UsageError: for an unknown name or option, or options of what is not measured.
    """
    found = references(names, options) if names else [_with(ref, options.get(ref.label, {})) for ref in own]
    known = [*(ref.label for ref in found), *(ref.name for ref in found), *taken]
    for name in options:
        if name not in known:
            raise UsageError(f"--set names '{name}', which is not measured", suggestion(name, known))
    return found


def _with(reference: RewardRef, options: Mapping[str, object]) -> RewardRef:
    if not options:
        return reference
    merged = {**reference.config.model_dump(), **options}
    return RewardRef(name=reference.name, config=reward_registry.config(reference.name, merged))
