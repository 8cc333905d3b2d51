"""ONNX Runtime and compiled torch against eager torch, end to end on an embedded model: one process, in turn, with the
same threads.

The model is exported first; torch runs the model that the artifact was made from. The measurement is that of
`fmg bench --compare torch,torch-compile,onnxruntime,onnxruntime:int8`, from prompt to image, text encoders included.

    python benchmarks/backends.py [--model meanflow-shapes] [--threads 1] --out benchmarks/results/backends.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fmg.core.machine import machine
from fmg.export.artifact import export_artifact
from fmg.export.options import ExportOptions
from fmg.inference.artifact.layout import Artifact, open_artifact
from fmg.inference.benchmark import BenchBackend, BenchCase, BenchOptions, Workload, measure, open_cases, ratios
from fmg.inference.loading import made_from

PROMPTS = ("a red circle left", "a blue square right", "a green triangle top", "a yellow star bottom")
TARGET_RATIO = 1.8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="meanflow-shapes")
    parser.add_argument("--artifact", type=Path, help="exported with --int8; by default the model is exported first")
    parser.add_argument("--batches", default="1,4,16", help="batch sizes")
    parser.add_argument("--threads", type=int, default=1, help="of both runtimes")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--no-compile", action="store_true", help="skip torch-compile, which takes minutes on a CPU")
    parser.add_argument("--out", type=Path, help="file for the result, besides stdout")
    arguments = parser.parse_args()
    where = machine()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.artifact is not None:
            artifact = open_artifact(arguments.artifact)
        else:
            artifact = export_artifact(arguments.model, Path(folder) / "artifact", ExportOptions(int8=True))
        sizes = [int(batch) for batch in arguments.batches.split(",")]
        measured = [compared(arguments, artifact, batch) for batch in sizes]
    result = {
        "benchmark": "backends",
        "model": artifact.manifest.model.name,
        "adapter": artifact.manifest.adapter is not None,
        "threads": arguments.threads,
        "target_ratio": TARGET_RATIO,
        "machine": where,
        "batches": measured,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n", encoding="utf-8")


def compared(arguments: argparse.Namespace, artifact: Artifact, batch: int) -> dict[str, Any]:
    """Timings and ratios at one batch size."""
    cases = [BenchCase("torch", made_from(artifact), BenchBackend("torch"))]
    if not arguments.no_compile:
        cases.append(BenchCase("torch-compile", made_from(artifact), BenchBackend("torch-compile")))
    cases += [
        BenchCase(backend.label, artifact, backend)
        for backend in (BenchBackend("onnxruntime"), BenchBackend("onnxruntime", True))
    ]
    with ExitStack() as stack:
        generators = open_cases(cases, BenchOptions(batch, "cpu", threads=arguments.threads), stack)
        timings = measure(generators, Workload.of(PROMPTS, batch), repeats=arguments.repeats, warmup=3)
    return {
        "batch": batch,
        "timings": [timing.to_json() for timing in timings.values()],
        "ratios": [asdict(ratio) for ratio in ratios(timings)],
    }


if __name__ == "__main__":
    main()
