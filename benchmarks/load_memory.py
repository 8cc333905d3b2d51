"""Peak host memory while a FLUX-class transformer is loaded, against the size of its weights. Prints one JSON object.

A separate process first writes a random sharded folder; a second one loads it, and the growth of its peak resident set
is reported. With --torch-file the weights come as a published student (`.pt`), and the
conversion to safetensors is measured as well.

    python benchmarks/load_memory.py --parameters 1.0e9 --dtype bf16
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fmg.core.machine import peak_rss

DTYPES = ("fp32", "bf16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=1.0e9, help="approximate number of parameters")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="stored and loaded dtype")
    parser.add_argument("--torch-file", action="store_true", help="a .pt file instead of a sharded folder")
    parser.add_argument("--folder", type=Path, help="where to write the weights; a temporary folder by default")
    parser.add_argument("--stage", choices=("write", "load"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage is not None:
        stage = write if arguments.stage == "write" else load
        print(json.dumps(stage(arguments)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        options = [*sys.argv[1:], "--folder", folder]
        figures = [_run([*options, "--stage", name], Path(folder)) for name in ("write", "load")]
    size, peak = figures[0]["bytes"], figures[1]["peak_bytes"]
    result = {
        "benchmark": "load_memory",
        "form": "torch file" if arguments.torch_file else "sharded folder",
        "dtype": arguments.dtype,
        "parameters": figures[0]["parameters"],
        "size_gb": size / 1e9,
        "peak_gb": peak / 1e9,
        "ratio": peak / size,
        "seconds": figures[1]["seconds"],
        "python": platform.python_version(),
        "torch": figures[1]["torch"],
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    print(json.dumps(result, indent=2))


def _run(options: list[str], cache: Path) -> dict[str, float]:
    environment = {**os.environ, "FMG_CACHE": str(cache / "cache")}
    done = subprocess.run([sys.executable, __file__, *options], capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(done.stderr)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def config(parameters: float) -> dict[str, object]:
    """A transformer like FLUX.1-lite at a third of its width, with as many single blocks as needed."""
    from fmg.models.flux.size import FLUX_LITE, transformer_parameters

    base = {**FLUX_LITE, "num_attention_heads": 8, "num_layers": 2, "num_single_layers": 0}
    empty = transformer_parameters(base, second_time=True)
    block = transformer_parameters({**base, "num_single_layers": 1}, second_time=True) - empty
    return {**base, "num_single_layers": max(0, round((parameters - empty) / block)), "axes_dims_rope": (16, 56, 56)}


def write(arguments: argparse.Namespace) -> dict[str, float]:
    import torch

    from fmg.models.flux.transformer import FlowMapFluxTransformer2DModel

    torch.set_default_dtype(torch.bfloat16 if arguments.dtype == "bf16" else torch.float32)
    transformer = FlowMapFluxTransformer2DModel(**config(arguments.parameters), time_scale=1.0, second_time="duration")
    tensors = transformer.state_dict()
    if arguments.torch_file:
        torch.save({"module": tensors}, arguments.folder / "student.pt")
    else:
        transformer.save_pretrained(str(arguments.folder / "transformer"), max_shard_size="500MB")
    return {
        "bytes": sum(x.nbytes for x in tensors.values()),
        "parameters": sum(x.numel() for x in tensors.values()),
    }


def load(arguments: argparse.Namespace) -> dict[str, object]:
    import torch

    from fmg.models.common import weights as w
    from fmg.models.flux.loading import student_weights
    from fmg.models.flux.transformer import FlowMapFluxTransformer2DModel as Transformer

    stated = {**config(arguments.parameters), "time_scale": 1.0, "second_time": "duration"}
    shapes = w.transformer_shapes(w.empty_transformer(Transformer, stated, arguments.folder))
    before, started = peak_rss(), time.perf_counter()
    name = "student.pt" if arguments.torch_file else "transformer"
    files = student_weights(arguments.folder / name, shapes)
    dtype = torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
    transformer = w.load_transformer(Transformer, stated, files, torch.device("cpu"), dtype)
    assert not any(parameter.is_meta for parameter in transformer.parameters())
    return {"peak_bytes": peak_rss() - before, "seconds": time.perf_counter() - started, "torch": torch.__version__}


if __name__ == "__main__":
    main()
