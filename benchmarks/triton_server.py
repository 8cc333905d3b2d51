"""A repository of `fmg export --triton` on a real Triton server, without a GPU or a container.

    pip download --no-deps nvidia-pytriton            # its wheel contains the server and the Python backend
    unzip -d SERVER nvidia_pytriton-*.whl
    pip install --no-deps --target NUMPY 'numpy<2'    # which that Python backend was compiled for
    python benchmarks/triton_server.py ARTIFACT --server SERVER --packages NUMPY --packages SITE_PACKAGES

The wheel has no ONNX Runtime backend. Each graph is therefore put behind a Python model that runs it with onnxruntime;
in its configuration, only the name of the backend changes. Configurations, batches, warm-up, the Python model
that takes prompts and its calls of other models are those of the server.

Requests with different steps and seeds, and some that are wrong, are sent at once; every image is compared with the one
that fmg generates. `--packages` name folders with numpy, onnxruntime and tokenizers: the Python of the backend ignores
its environment.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from fmg.export.triton import CONFIG, export_triton
from fmg.inference.onnxruntime import load

RESULTS = Path(__file__).parent / "results" / "triton_server.json"
PROMPTS = [f"a {color} {shape}" for color in ("red", "blue", "green", "yellow") for shape in ("circle", "star")]
STARTS_S, STOPS_S = 180, 30

GRAPH_MODEL = '''
import json, os
import numpy as np, onnxruntime
import triton_python_backend_utils as utils

class TritonPythonModel:
    """A graph, in place of the ONNX Runtime backend."""

    def initialize(self, args):
        file = os.path.join(args["model_repository"], args["model_version"], "model.onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self.session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        names = [value.name for value in self.session.get_inputs()]
        given = [{n: utils.get_input_tensor_by_name(r, n).as_numpy() for n in names} for r in requests]
        ends = np.cumsum([len(inputs[names[0]]) for inputs in given])
        made = self.session.run(None, {n: np.concatenate([inputs[n] for inputs in given]) for n in names})
        parts = [np.split(array, ends[:-1]) for array in made]
        outputs = [value.name for value in self.session.get_outputs()]
        return [
            utils.InferenceResponse([utils.Tensor(n, np.ascontiguousarray(p[i])) for n, p in zip(outputs, parts)])
            for i in range(len(requests))
        ]
'''


def without_onnx_backend(repository: Path, packages: list[str]) -> None:
    """Puts every graph behind a Python model."""
    for config in repository.glob(f"*/{CONFIG}"):
        config.write_text(config.read_text().replace('backend: "onnxruntime"', 'backend: "python"'))
        file = config.parent / "1" / "model.py"
        code = file.read_text() if file.exists() else GRAPH_MODEL
        file.write_text(f"import sys\nsys.path += {packages!r}\n{code}")


@contextmanager
def serving(server: Path, repository: Path, log: Path) -> Iterator[str]:
    """A server; gives host and port."""
    home = server / "pytriton" / "tritonserver"
    stub = home / "python_backend_stubs" / "{}.{}".format(*sys.version_info) / "triton_python_backend_stub"
    shutil.copy(stub, home / "backends" / "python")
    for program in (home / "bin" / "tritonserver", home / "backends" / "python" / stub.name):
        program.chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"127.0.0.1:{free.getsockname()[1]}"
    command = [home / "bin" / "tritonserver", "--model-repository", repository, "--backend-directory"]
    command += [home / "backends", "--http-address", "127.0.0.1", "--http-port", url.partition(":")[2]]
    command += ["--allow-grpc=false", "--allow-metrics=false", "--backend-config=python,stub-timeout-seconds=120"]
    with log.open("w") as lines:
        process = subprocess.Popen(
            [str(word) for word in command], stdout=lines, stderr=lines, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        try:
            with triton.InferenceServerClient(url) as client:
                wait_until_ready(client, process, log)
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(STOPS_S)


def wait_until_ready(client: Any, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + STARTS_S
    while time.monotonic() < end and process.poll() is None:
        try:
            if client.is_server_ready():
                return
        except OSError:
            pass
        time.sleep(0.5)
    raise SystemExit(f"The server did not start:\n{log.read_text()[-4000:]}")


def inputs(prompt: str, seed: int, steps: int) -> list[Any]:
    tensors = []
    for name, value, kind, dtype in (
        ("prompt", prompt, "BYTES", np.object_),
        ("seed", seed, "INT64", np.int64),
        ("steps", steps, "INT32", np.int32),
    ):
        tensors.append(triton.InferInput(name, [1, 1], kind))
        tensors[-1].set_data_from_numpy(np.array([[value]], dtype))
    return tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--server", type=Path, required=True, help="the unpacked wheel")
    parser.add_argument("--packages", action="append", default=[], help="folder on the path of the Python models")
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"

    expected: dict[int, Any] = {}
    with load(options.artifact, threads=1) as generator:
        most = generator.steps
        # a fifth has one step less, a twentieth is wrong; all name their steps, or the server would not batch them
        asked = [
            (PROMPTS[n % len(PROMPTS)], n, 0 if n % 20 == 7 else most - 1 if n % 5 == 0 else most)
            for n in range(options.requests)
        ]
        for steps in (most - 1, most):
            rows = [(prompt, seed) for prompt, seed, count in asked if count == steps]
            made = generator.generate([p for p, _ in rows], [s for _, s in rows], steps=steps, progress=False)
            expected |= {seed: image for (_, seed), image in zip(rows, made.image_array, strict=True)}

    with tempfile.TemporaryDirectory() as scratch:
        repository = export_triton(options.artifact, Path(scratch) / "models")
        without_onnx_backend(repository.folder, [str(Path(folder).resolve()) for folder in options.packages])
        with (
            serving(options.server, repository.folder, Path(scratch) / "log") as url,
            triton.InferenceServerClient(url, concurrency=options.at_once, network_timeout=600) as client,
        ):
            begin = time.monotonic()
            waiting = [(row, client.async_infer(repository.model, inputs(*row))) for row in asked]
            refused, largest = 0, 0.0
            for (_, seed, steps), answer in waiting:
                try:
                    pixels = answer.get_result().as_numpy("image")[0].transpose(2, 0, 1)
                except InferenceServerException:
                    if steps != 0:
                        raise
                    refused += 1
                    continue
                largest = max(largest, float(np.abs(pixels / 255 - expected[seed]).max()))
            seconds = time.monotonic() - begin
            found = client.get_inference_statistics()["model_stats"]
            server = client.get_server_metadata()["version"]
    result = {
        "server": server,
        "model": repository.model,
        "requests": options.requests,
        "at_once": options.at_once,
        "images": len(expected),
        "refused": refused,
        "wrong_requests": sum(steps == 0 for _, _, steps in asked),
        "largest_difference_times_255": largest * 255,
        "seconds": seconds,
        "models": {
            one["name"]: {
                "rows": one["inference_count"],
                "calls": one["execution_count"],
                "largest_batch": max(batch["batch_size"] for batch in one["batch_stats"]),
                "queue_ms": one["inference_stats"]["queue"]["ns"] / 1e6 / one["inference_stats"]["queue"]["count"],
            }
            for one in found
        },
    }
    assert largest <= 1 / 255, largest
    assert refused == result["wrong_requests"]
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
