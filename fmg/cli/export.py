"""`fmg export`: a run for other software."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fmg.cli.console import print_json, stderr, stdout
from fmg.cli.observers import reporter_for
from fmg.cli.options import AsJson, Offline
from fmg.core.errors import UsageError, suggestion

_DTYPES = ("stored", "fp32", "bf16", "fp16")


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.")],
    diffusers: Annotated[
        bool, typer.Option("--diffusers", help="A complete diffusers folder, the adapter merged into its weights.")
    ] = False,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="T", help="Merged weights: stored, fp32, bf16 or fp16. fp32 loses nothing of a small adapter."
        ),
    ] = "stored",
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Write a tuned model in a form that other software reads."""
    if not diffusers:
        raise UsageError("The form of the export is missing", "Say --diffusers for a diffusers folder.")
    if dtype not in _DTYPES:
        raise UsageError(f"--dtype: '{dtype}' is not a dtype", suggestion(dtype, _DTYPES))
    if out.exists():
        raise UsageError(f"{out} exists already", "Export to another folder, or move that one away.")

    from fmg.export.diffusers import export_diffusers

    with reporter_for(stderr()) as reporter:
        merged = export_diffusers(run, out, dtype=dtype, observer=reporter)
    if as_json:
        print_json({"folder": str(merged.folder), "changed": merged.changed, "tensors": merged.tensors})
    else:
        stdout().print(f"{merged.folder}: {merged.changed} of {merged.tensors} weights merged", soft_wrap=True)
