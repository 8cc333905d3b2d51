"""The files that mark a folder as one of `FlowMapPipeline` and keep the stock pipeline from loading it.

The class in `model_index.json` is named as code of the folder, `pipeline.py`. Diffusers refuses such a folder for any
requested class unless it is told to `trust_remote_code`; then the class is fmg's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers

from fmg.core.errors import CheckpointError, UsageError
from fmg.core.json_io import JsonError, read_object
from fmg.core.model_folder import read_config
from fmg.models.common.pipeline_parts import check_guidance
from fmg.models.conventions import CONVENTIONS_FILE, FlowMapConventions
from fmg.models.flux.transformer import FlowMapFluxTransformer2DModel
from fmg.version import DISTRIBUTION

INDEX_FILE = "model_index.json"
CODE_FILE = "pipeline.py"
STALE = "scheduler"
"""Folder of the stock pipeline, which a flow map does not use: its times are in the conventions."""

_CLASS = [CODE_FILE.removesuffix(".py"), "FlowMapPipeline"]
_TRANSFORMER = FlowMapFluxTransformer2DModel
_FIXED: Mapping[str, tuple[str, str]] = {
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "T5EncoderModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "tokenizer_2": ("transformers", "T5Tokenizer"),
    "transformer": (_TRANSFORMER.__module__, _TRANSFORMER.__name__),
}
# no import statement: without fmg, diffusers would suggest installing the package called fmg on package indexes
_CODE = f'''"""The pipeline class of this folder, a few-step flow map, imported from fmg. No other code is run."""

import importlib

try:
    FlowMapPipeline = importlib.import_module("fmg").FlowMapPipeline
except (ImportError, AttributeError) as error:
    raise ImportError(
        "This folder is a few-step flow map. Its pipeline is in the Python package {DISTRIBUTION} (imported as fmg),"
        " which is not installed; the package called fmg on package indexes is a different one."
    ) from error
'''


def write_pipeline_files(folder: Path, conventions: FlowMapConventions) -> None:
    """Writes `model_index.json`, `pipeline.py`, `fmg_flow_map.json` and the class of the transformer.

    Args:
        folder: a pipeline folder with all its components.
        conventions: how the transformer is sampled.

    Raises:
        CheckpointError: a component states no class.
    """
    stated = conventions.plain()
    transformer = {
        **read_config(folder / "transformer"),
        "_class_name": _TRANSFORMER.__name__,
        "time_scale": conventions.time_scale,
        "second_time": conventions.second_time.plain(),
    }
    components = {**_FIXED, "vae": ("diffusers", str(read_config(folder / "vae").get("_class_name")))}
    index = {"_class_name": _CLASS, "_diffusers_version": diffusers.__version__, "conventions": stated, **components}
    _write(folder / "transformer" / "config.json", transformer)
    _write(folder / CONVENTIONS_FILE, stated)
    _write(folder / INDEX_FILE, index)
    (folder / CODE_FILE).write_text(_CODE, encoding="utf-8")


def check_transformer(transformer: Any, conventions: FlowMapConventions) -> None:
    """Checks that a transformer is a flow map with these conventions.

    Raises:
        UsageError: it has the stock class.
        CheckpointError: its config states different ones.
    """
    inner = getattr(transformer, "_orig_mod", transformer)
    if not isinstance(inner, FlowMapFluxTransformer2DModel):
        raise UsageError(
            f"The transformer is a {type(inner).__name__}, which does not take the times of a flow map",
            "Load it with FlowMapFluxTransformer2DModel, or the folder with FlowMapPipeline.from_pretrained.",
        )
    for key in ("time_scale", "second_time"):
        stated = conventions.plain()[key]
        if inner.config[key] != stated:
            raise CheckpointError(
                f"The transformer has {key} {inner.config[key]!r}, but the conventions say {stated!r}",
                "Correct the wrong one, or the model generates noise.",
            )
    check_guidance(
        Path(str(inner.config.get("_name_or_path") or ".")), conventions, embeds=inner.config.guidance_embeds
    )


def check_index(folder: Path, conventions: FlowMapConventions) -> None:
    """Checks that `model_index.json`, which diffusers' loader reads, agrees with `fmg_flow_map.json`.

    Raises:
        CheckpointError: it does not.
    """
    try:
        index = read_object(folder / INDEX_FILE)
    except (OSError, JsonError):
        index = {}
    stated = index.get("conventions")
    if stated is not None and stated != conventions.plain():
        raise CheckpointError(
            f"{folder / INDEX_FILE} and {CONVENTIONS_FILE} differ on how the map is sampled",
            f"Correct the one that is wrong; `conventions` of {INDEX_FILE} is a copy of {CONVENTIONS_FILE}.",
        )


def _write(file: Path, value: Mapping[str, object]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
