"""The command line must not import torch at start-up, which takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "diffusers", "transformers", "peft", "matplotlib", "scipy", "rich")


def imported(code: str) -> set[str]:
    """The heavy packages that `code` imports in a fresh interpreter."""
    program = f"import json, sys\n{code}\nprint(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "code",
    [
        "import fmg; fmg.__version__; dir(fmg)",
        "from fmg import FmgError, Recipe, UsageError, resolve",
        "import fmg.core.errors, fmg.core.events, fmg.core.specs",
        "from fmg.registry import models, stochasticizers, rewards, objectives, optimizers, prompt_sets",
        # every config class of the catalog, described
        "from fmg.registry.catalog import REGISTRIES\n"
        "for registry in REGISTRIES:\n    [registry.describe(name) for name in registry.names()]",
        # the whole validation of a recipe, and what the dry run prints
        "from fmg.recipe import resolve\n"
        "resolve(None, {'lr': 1e-3, 'reward': ['shapes=2', 'python:a.b:c']}, ['rollout.grid=paper']).table()",
    ],
)
def test_no_heavy_import(code: str) -> None:
    assert imported(code) == set()


def test_the_package_offers_exactly_its_public_names() -> None:
    import fmg

    for name in fmg.__all__:
        assert getattr(fmg, name) is not None
    assert callable(fmg.train)
    assert callable(fmg.evaluate)
    assert callable(fmg.load)
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        fmg.no_such_name  # noqa: B018
