"""Every number and fact of an artifact is compared with its source, even if it affects no verified image."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fmg.export.source import find_source
from fmg.export.verify_source import check_source
from fmg.export.weights import stored_places
from fmg.inference.artifact import Artifact, open_artifact
from fmg.inference.artifact.manifest import MANIFEST
from fmg.inference.target import resolve_target
from tests.support.artifact import copied
from tests.support.tiny_artifact import reseal

pytestmark = [pytest.mark.slow, pytest.mark.compile]


def failed(folder: Path, run: Path) -> dict[str, str]:
    """Notes of the checks that fail, by name."""
    checks = check_source(open_artifact(folder), find_source(resolve_target(run)))
    return {check.name: check.note for check in checks if not check.passed}


def accept(folder: Path, name: str) -> None:
    """Updates the manifest to match a changed file."""
    manifest = json.loads((folder / MANIFEST).read_text())
    data = (folder / name).read_bytes()
    manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    reseal(folder)


def in_manifest(*keys: str, value: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        entry = manifest
        for key in keys[:-1]:
            entry = entry[key]
        assert entry[keys[-1]] != value
        entry[keys[-1]] = value
        (folder / MANIFEST).write_text(json.dumps(manifest))
        reseal(folder)

    return edit


def in_tensor(file: str, tensor: str, change: Callable[[Any], Any], dtype: type = np.float32) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        raw = bytearray((folder / file).read_bytes())
        start, length = stored_places(folder / file)[tensor]
        values = np.frombuffer(raw, dtype, length // np.dtype(dtype).itemsize, start).copy()
        raw[start : start + length] = change(values).astype(dtype).tobytes()
        (folder / file).write_bytes(raw)
        accept(folder, file)

    return edit


def last(add: float) -> Callable[[Any], Any]:
    """Changes the last number only."""
    return lambda values: np.concatenate([values[:-1], values[-1:] + add])


def in_tokenizer(folder: Path) -> None:
    file = folder / "tokenizer_2" / "tokenizer.json"
    text = file.read_text(encoding="utf-8")
    assert "▁two" in text
    file.write_text(text.replace("▁two", "▁swap").replace("▁purple", "▁two").replace("▁swap", "▁purple"), "utf-8")
    accept(folder, "tokenizer_2/tokenizer.json")


def test_what_was_exported_is_what_it_was_made_from(shapes_artifact: Artifact, shapes_run: Path) -> None:
    assert failed(shapes_artifact.folder, shapes_run) == {}


@pytest.mark.parametrize(
    ("edit", "check", "note"),
    [
        (in_manifest("sampling", "steps", value=1), "facts", r"sampling\.steps is 1 .* but 4 in"),
        (in_manifest("sampling", "grid", value="scm-angle"), "facts", r"sampling\.grid"),
        (in_manifest("sampling", "time_scale", value=1.0), "facts", r"sampling\.time_scale is 1\.0"),
        (in_manifest("sampling", "second_time", value="target"), "facts", r"sampling\.second_time"),
        (in_manifest("adapter", "scale", value=77.0), "facts", "adapter is"),
        (in_manifest("adapter", "digest", value="0" * 64), "facts", "adapter is"),
        (in_manifest("base", "digest", value="f" * 64), "facts", r"base\.digest"),
        (in_manifest("model", "name", value="nonsense"), "facts", r'model\.name is "nonsense"'),
        (in_manifest("model", "transformer", "num_layers", value=7), "facts", r"model\.transformer"),
        (in_manifest("rewards", value=[]), "facts", "rewards is"),
        (in_tokenizer, "tokenizer/text_encoder_2", r"tokenizer_2/tokenizer\.json differs from the one"),
        (in_manifest("tokenizers", "text_encoder", "pad_id", value=3), "tokenizer/text_encoder", "pad_id=3"),
        (
            in_tensor("text_encoder_2.safetensors", "encoder.embed_tokens.weight", last(1e-3)),
            "weights/text_encoder_2",
            r"'encoder\.embed_tokens\.weight' differs",
        ),
        (
            in_tensor("transformer.safetensors", "transformer_blocks.0.attn.to_q.weight", last(1e-4)),
            "weights/transformer",
            r"'transformer_blocks\.0\.attn\.to_q\.weight' differs",
        ),
        (
            in_tensor("vae_decoder.safetensors", "decoder.layers.0.bias", last(1e-6)),
            "weights/vae_decoder",
            r"'decoder\.layers\.0\.bias' differs",
        ),
        (
            in_tensor(
                "transformer_int8.safetensors",
                "transformer_blocks.0.attn.to_q.weight.transposed_quantized",
                last(1),
                np.int8,
            ),
            "weights/transformer_int8",
            r"to_q\.weight\.transposed_quantized' does not match the weight",
        ),
    ],
)
def test_what_differs_is_named(
    edit: Callable[[Path], None], check: str, note: str, shapes_artifact: Artifact, shapes_run: Path, tmp_path: Path
) -> None:
    folder = copied(shapes_artifact, tmp_path / "a")
    edit(folder)
    found = failed(folder, shapes_run)
    # the 8-bit weights are compared with those of the fp32 graph
    assert check in found
    assert found.keys() <= {check, "weights/transformer_int8"}
    assert re.search(note, found[check]), found[check]


def test_weights_are_read_from_their_own_place(shapes_artifact: Artifact, shapes_run: Path, tmp_path: Path) -> None:
    import onnx

    folder = copied(shapes_artifact, tmp_path / "a")
    file = folder / "text_encoder.onnx"
    model = onnx.load(str(file), load_external_data=False)
    weight = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    entry = next(item for item in weight.external_data if item.key == "offset")
    entry.value = str(int(entry.value) + 4)
    onnx.save(model, str(file))
    accept(folder, "text_encoder.onnx")
    found = failed(folder, shapes_run)
    assert found.keys() == {"weights/text_encoder"}
    assert f"reads '{weight.name}' from text_encoder.safetensors" in found["weights/text_encoder"]
