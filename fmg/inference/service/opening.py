"""From what is typed after `fmg serve` to models that are loaded and have generated an image."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from fmg.core.errors import UsageError
from fmg.inference.generator import Generator
from fmg.inference.service.jobs import Served

# a colon separates a model from its adapter
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/@-]{0,199}")
_NAMED = re.compile(r"(?P<name>[^=/]+)=(?P<target>.+)", re.DOTALL)
_WARM_UP = "a red circle"


@dataclass(frozen=True)
class Named:
    """A target and the name that clients use for it."""

    name: str
    target: str


def named_targets(texts: Sequence[str]) -> list[Named]:
    """Targets with their names from texts such as `runs/a` and `tuned=runs/a`.

    A folder is called like itself, without the folders above it.

    Raises:
        UsageError: a name is unfit for a request, or two targets have the same.
    """
    found = []
    for text in texts:
        match = None if Path(text).exists() else _NAMED.fullmatch(text)
        target = text if match is None else match["target"]
        name = _own_name(target) if match is None else match["name"]
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"'{name}' cannot be the name of a model",
                "Choose one of letters, digits, '.', '_' and '-': NAME=TARGET.",
            )
        found.append(Named(name, target))
    name, times = Counter(named.name for named in found).most_common(1)[0]
    if times > 1:
        raise UsageError(f"{times} targets are called '{name}'", "Name them: NAME=TARGET.")
    return found


def _own_name(target: str) -> str:
    return Path(target).resolve().name if Path(target).is_dir() else target


def open_models(
    targets: Sequence[Named], load: Callable[[str], Generator], stack: ExitStack, told: Callable[[Named], object]
) -> list[Served]:
    """Every target, loaded. Each generates an image, so problems appear before the server listens.

    Args:
        targets: what to serve.
        load: the sampler of a target.
        stack: frees the models when it is closed.
        told: called before each is loaded.
    """
    served = []
    for named in targets:
        told(named)
        generator = stack.enter_context(load(named.target))
        # the answers say which prompts are truncated
        quiet = Generator(generator.backend, generator.grid, generator.steps, generator.batch_size, tells=False)
        image = quiet.generate(_WARM_UP, progress=False).check_finite().image_array
        served.append(Served(named.name, named.target, quiet, (image.shape[3], image.shape[2])))
    return served
