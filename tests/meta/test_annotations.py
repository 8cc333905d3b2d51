"""The shapes in the signatures of fmg.flow and fmg.stochasticizers, checked at run time while every identity runs."""

from __future__ import annotations

import importlib

from jaxtyping import TypeCheckError, install_import_hook

from tests.support.mutation import imported_with


def test_identities_run_with_checked_signatures() -> None:
    with imported_with(None), install_import_hook(("fmg.flow", "fmg.stochasticizers"), "beartype.beartype"):
        for room in ("flow", "stochasticizer"):
            module = importlib.import_module(f"tests.support.{room}_identities")
            for name, check in vars(module).items():
                if name.startswith("check_"):
                    check()
        assert _refuses_a_scalar_time()


def _refuses_a_scalar_time() -> bool:
    import torch

    path = importlib.import_module("fmg.flow").LinearPath()
    try:
        path.alpha(torch.tensor(0.5))
    except TypeCheckError:
        return True
    return False
