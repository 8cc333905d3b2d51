"""Options of rewards on the command line: `--set NAME.OPTION=VALUE`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fmg.core.errors import UsageError


def reward_options(sets: Sequence[str]) -> dict[str, dict[str, object]]:
    """Options by reward from texts such as `ocr.threads=4`; values are YAML 1.2.

    Raises:
        UsageError: for another form.
    """
    from fmg.registry.layers import merge_all, set_layers

    if not sets:
        return {}
    chosen = merge_all(set_layers(sets)).plain()
    options: dict[str, dict[str, object]] = {}
    for name, values in chosen.items() if isinstance(chosen, Mapping) else ():
        if not isinstance(values, Mapping):
            raise UsageError(
                f"'--set {name}={values}' names no option", "Write NAME.OPTION=VALUE, such as --set ocr.threads=4."
            )
        options[name] = dict(values)
    return options
