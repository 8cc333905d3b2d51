"""Memory and time of an export at full size, and whether a large graph still computes what torch computes.

Two models with random or zero weights; every stage runs in its own process, whose peak resident set is reported:

- `1b`: a transformer of 10^9 parameters in a complete pipeline folder goes through `fmg export` in fp32; one forward by
  ONNX Runtime against torch at a shape that was not traced.
- `8b`: a transformer of FLUX.1-lite's shape in bf16. Its stored weights are a sparse file of zeros, so they take no
  disk; a LoRA of rank 32 on attention is merged into them, and the merged file is written in full where the disk has
  room (16.3 GB), else only the graph is made, and the result says so.

    python benchmarks/export_size.py --out benchmarks/results/export_size.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fmg.core.machine import peak_rss

STAGES = ("write", "export", "torch", "onnxruntime", "graph", "merge")
PARAMETERS = 1.0e9
RANK = 32
# batch, latent side, text tokens of the comparison
SHAPE = (1, 12, 9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("1b", "8b"), help="one of the two models")
    parser.add_argument("--parameters", type=float, default=PARAMETERS, help="approximate size of the smaller model")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    parser.add_argument("--out", type=Path, help="file for the result, besides stdout")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage is not None:
        figures = globals()[f"stage_{arguments.stage}"](arguments)
        print(json.dumps({**figures, "peak_gb": peak_rss() / 1e9}))
        return
    result: dict[str, Any] = {"benchmark": "export_size"}
    if arguments.only != "8b":
        result["1b"] = measured(arguments, STAGES[:4])
    if arguments.only != "1b":
        result["8b"] = measured(arguments, STAGES[4:])
    result["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n", encoding="utf-8")


def measured(arguments: argparse.Namespace, stages: tuple[str, ...]) -> dict[str, Any]:
    """The figures of each stage, by its name."""
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for stage in stages:
            command = [sys.executable, __file__, "--stage", stage, "--folder", folder]
            began = time.perf_counter()
            done = subprocess.run(
                [*command, "--parameters", str(arguments.parameters)],
                capture_output=True,
                text=True,
                env={**os.environ, "FMG_CACHE": str(Path(folder) / "cache")},
            )
            if done.returncode:
                sys.exit(done.stderr)
            figures[stage] = {
                **json.loads(done.stdout.splitlines()[-1]),
                "process_seconds": round(time.perf_counter() - began, 1),
            }
            print(f"{stage}: {figures[stage]}", file=sys.stderr)
    return figures


def stage_write(arguments: argparse.Namespace) -> dict[str, object]:
    """A pipeline folder: the embedded model's, with a large transformer in bf16."""
    import torch

    from fmg.models.embedded import MeanFlowShapesConfig
    from fmg.models.flux.size import transformer_parameters
    from fmg.models.flux.transformer import FlowMapFluxTransformer2DModel

    folder = Path(shutil.copytree(MeanFlowShapesConfig().directory(), arguments.folder / "model"))
    config = json.loads((folder / "transformer" / "config.json").read_text())
    config |= {"num_attention_heads": 8, "attention_head_dim": 128, "axes_dims_rope": [16, 56, 56]}
    config |= {"num_layers": 8, "num_single_layers": 0}
    empty = transformer_parameters(config, second_time=True)
    block = transformer_parameters({**config, "num_single_layers": 1}, second_time=True) - empty
    config["num_single_layers"] = max(0, round((arguments.parameters - empty) / block))
    shutil.rmtree(folder / "transformer")
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    transformer = FlowMapFluxTransformer2DModel.from_config(config)
    transformer.save_pretrained(str(folder / "transformer"), max_shard_size="500MB")
    return {"parameters": sum(x.numel() for x in transformer.parameters())}


def stage_export(arguments: argparse.Namespace) -> dict[str, object]:
    """`fmg export` in fp32."""
    from fmg.export.artifact import export_source
    from fmg.export.options import ExportOptions
    from fmg.export.source import find_source
    from fmg.inference.target import Target
    from fmg.recipe import Recipe

    recipe = Recipe.default("meanflow-shapes", **{"model.folder": str(arguments.folder / "model")})
    began = time.perf_counter()
    artifact = export_source(find_source(Target("model", recipe, None)), arguments.folder / "artifact", ExportOptions())
    size = sum(entry.size for entry in artifact.manifest.files.values())
    return {"seconds": round(time.perf_counter() - began, 1), "artifact_gb": size / 1e9}


def stage_torch(arguments: argparse.Namespace) -> dict[str, object]:
    """One forward of the model itself."""
    import numpy as np
    import torch

    from fmg.models.flux.loading import load_folder

    transformer = load_folder(arguments.folder / "model", torch.device("cpu"), torch.float32).transformer
    given = feed(transformer.config)
    with torch.no_grad():
        output = transformer(**{name: torch.from_numpy(x) for name, x in given.items()})[0]
    np.save(arguments.folder / "torch.npy", output.numpy())
    return {}


def stage_onnxruntime(arguments: argparse.Namespace) -> dict[str, object]:
    """The same forward by the artifact."""
    import numpy as np
    import onnxruntime

    from fmg.inference.artifact import open_artifact

    artifact = open_artifact(arguments.folder / "artifact", hashes=False)
    began = time.perf_counter()
    session = onnxruntime.InferenceSession(str(artifact.onnx("transformer")), providers=["CPUExecutionProvider"])
    loaded = time.perf_counter() - began
    given = session.run(None, feed(artifact.manifest.model.transformer))[0]
    wanted = np.load(arguments.folder / "torch.npy")
    return {
        "load_seconds": round(loaded, 1),
        "relative_l2": float(np.linalg.norm(given - wanted) / np.linalg.norm(wanted)),
        "max_abs": float(np.abs(given - wanted).max()),
    }


def stage_graph(arguments: argparse.Namespace) -> dict[str, object]:
    """The graph of FLUX.1-lite in bf16, checked against a sparse weight file."""
    import torch

    from fmg.export.graphs import transformer_plan
    from fmg.export.onnx import save_graph, trace
    from fmg.export.weights import lay_out

    began = time.perf_counter()
    traced = trace(transformer_plan(lite_config(), torch.bfloat16))
    seconds = time.perf_counter() - began
    layout = lay_out({name: (torch.bfloat16, shape) for name, shape in traced.parameters.items()})
    sparse(arguments.folder / "stored.safetensors", layout.header, layout.size)
    save_graph(traced, arguments.folder / "transformer.onnx", "stored.safetensors", layout.places)
    return {
        "trace_seconds": round(seconds, 1),
        "parameters": sum(place.length // 2 for place in layout.places.values()),
        "tensors": len(layout.places),
        "nodes": traced.model.graph.num_nodes(),
        "graph_mb": (arguments.folder / "transformer.onnx").stat().st_size / 1e6,
    }


def stage_merge(arguments: argparse.Namespace) -> dict[str, object]:
    """A LoRA merged into the weights of FLUX.1-lite, written as an export writes them."""
    import torch

    from fmg.export.source import Delta, merged
    from fmg.export.weights import lay_out, write_weights
    from fmg.inference.artifact.manifest import Adapter
    from fmg.models.common.weights import TensorReader

    stored = arguments.folder / "stored.safetensors"
    if shutil.disk_usage(arguments.folder).free < 1.25 * stored.stat().st_size:
        return {"skipped": "the disk has no room for the merged weights"}
    reader = TensorReader.of(stored)
    types = {name: reader.describe(name) for name in reader.names}
    torch.manual_seed(0)
    lora = {
        name: (torch.randn(RANK, shape[1]), torch.randn(shape[0], RANK))
        for name, (_, shape) in types.items()
        if len(shape) == 2 and ".attn." in name
    }
    delta = Delta(lora, {}, Adapter("", RANK, RANK, 0.01, (), ""), "", "")
    began = time.perf_counter()
    entry = write_weights(
        arguments.folder / "merged.safetensors", lay_out(types), merged(reader, delta, torch.bfloat16)
    )
    return {
        "seconds": round(time.perf_counter() - began, 1),
        "written_gb": entry.size / 1e9,
        "merged_matrices": len(lora),
        "lora_gb": sum(a.nbytes + b.nbytes for a, b in lora.values()) / 1e9,
    }


def lite_config() -> dict[str, object]:
    from fmg.models.flux.size import FLUX_LITE

    return {**FLUX_LITE, "axes_dims_rope": (16, 56, 56), "time_scale": 1.0, "second_time": "duration"}


def sparse(file: Path, header: bytes, size: int) -> None:
    with file.open("wb") as out:
        out.write(header)
        out.truncate(size)


def feed(config: Any) -> dict[str, Any]:
    """Inputs of one forward at a shape that was not traced."""
    import numpy as np

    batch, side, text = SHAPE
    random = np.random.default_rng(0)
    tokens = side // 2 * (side // 2)
    rows, columns = np.divmod(np.arange(tokens), side // 2)

    def normal(*shape: int) -> Any:
        return random.standard_normal(shape, dtype=np.float32)

    return {
        "hidden_states": normal(batch, tokens, config["in_channels"]),
        "encoder_hidden_states": normal(batch, text, config["joint_attention_dim"]),
        "pooled_projections": normal(batch, config["pooled_projection_dim"]),
        "timestep": np.full(batch, 0.75, np.float32),
        "second": np.full(batch, 0.25, np.float32),
        "img_ids": np.stack([0 * rows, rows, columns], axis=1).astype(np.float32),
        "txt_ids": np.zeros((text, 3), np.float32),
    }


if __name__ == "__main__":
    main()
