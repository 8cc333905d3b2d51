"""Runs and artifacts for many tests: made once per session, never changed in place.

Tracing a graph takes most of an export's time, so an export within the session reuses earlier graphs.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch

from fmg.core.files import write_sums
from fmg.data.checkpoints import FOLDER, CheckpointIndex, SavedCheckpoint, write_index
from fmg.data.run_folder import RunFolder
from fmg.export import artifact as exporter
from fmg.export.artifact import export_artifact, export_source
from fmg.export.graphs import GraphPlan
from fmg.export.onnx import TracedGraph, trace
from fmg.export.options import ExportOptions
from fmg.export.source import find_source
from fmg.inference.artifact import Artifact, open_artifact
from fmg.inference.artifact.manifest import MANIFEST
from fmg.inference.target import Target, load_model
from fmg.recipe import Recipe
from tests.support.tiny_artifact import reseal
from tests.tiny_flux import student_options

_WEIGHTS = "transformer.safetensors"
_TRACED: dict[object, TracedGraph] = {}


def make_run(folder: Path, recipe: Recipe, seed: int, trained: Literal["lora", "duration", "full"] = "lora") -> Path:
    """A finished run with random trained weights, without the training."""
    run = RunFolder.create(folder, recipe.model.name)
    run.recipe.write_text(recipe.to_yaml(), encoding="utf-8")
    model: Any = load_model(Target("base", recipe, None), device="cpu")
    lora = recipe.lora
    if trained != "full":
        model.attach_adapter(lora.rank, lora.alpha, lora.target_names(), 0.0, seed)
    if trained != "lora":
        model.unfreeze(trained)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in model.trainable():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    model.save_adapter(run.path / FOLDER / "checkpoint-1")
    saved = SavedCheckpoint("checkpoint-1", 1, "eval/score", 0.5, digest=write_sums(run.path / FOLDER / "checkpoint-1"))
    write_index(run.path, CheckpointIndex((saved,), saved.name, saved.name))
    run.set_state("finished")
    return run.path


def shapes_recipe(**overrides: object) -> Recipe:
    """A recipe of the embedded two-time model with a small adapter."""
    return Recipe.default("meanflow-shapes", **{"lora.rank": 4, "lora.alpha": 8.0, **overrides})


def student_recipe(folder: Path) -> Recipe:
    """A recipe of a tiny single-time student with embedded guidance, in the form that T2I-Distill published."""
    return Recipe.default(
        "scm-flux",
        **{
            **student_options(folder, "none"),
            "model.text_cache": False,
            "rewards": ["jpeg-incompressibility"],
            "train.dtype": "fp32",
            "lora.rank": 4,
            "lora.alpha": 8,
        },
    )


def exported(target: str | Path | Target, out: Path, options: ExportOptions | None = None) -> Artifact:
    """`export_artifact`, with graphs that are traced once per session."""
    with traced_once():
        if isinstance(target, Target):
            return export_source(find_source(target), out, options or ExportOptions())
        return export_artifact(target, out, options)


def copied(artifact: Artifact, folder: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(artifact.folder, folder))


def planted(artifact: Artifact, folder: Path, tensor: str, add: float) -> Artifact:
    """A copy in which one number of one weight differs, with a manifest that matches it."""
    copied(artifact, folder)
    raw = bytearray((folder / _WEIGHTS).read_bytes())
    size = int.from_bytes(raw[:8], "little")
    start = 8 + size + json.loads(raw[8 : 8 + size])[tensor]["data_offsets"][0]
    value = np.frombuffer(raw, np.float32, 1, start)[0]
    raw[start : start + 4] = np.float32(value + add).tobytes()
    (folder / _WEIGHTS).write_bytes(raw)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][_WEIGHTS]["sha256"] = hashlib.sha256(raw).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest))
    reseal(folder)
    return open_artifact(folder)


@contextmanager
def traced_once() -> Iterator[None]:
    """Exports within the block trace equal graphs once per session."""
    with patch.object(exporter, "trace", trace_once):
        yield


def trace_once(plan: GraphPlan) -> TracedGraph:
    """`trace`, once per session for plans with equal inputs, outputs, configs, and weight names and shapes."""
    with torch.device("meta"):
        inner = plan.build().inner
    shapes = tuple((name, tuple(x.shape)) for name, x in inner.state_dict().items())
    # its numbers are constants of the graph, such as the scaling of latents; private keys name folders and versions
    parts = inner.values() if isinstance(inner, torch.nn.ModuleDict) else [inner]
    configs = [x.config if isinstance(x.config, dict) else x.config.to_dict() for x in parts]
    public = [{name: value for name, value in config.items() if name[0] != "_"} for config in configs]
    key = (plan.name, plan.dtype, plan.inputs, plan.outputs, shapes, json.dumps(public, sort_keys=True, default=str))
    if key not in _TRACED:
        _TRACED[key] = trace(plan)
    return _TRACED[key]
