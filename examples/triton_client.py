"""Asks a Triton server for one image and saves it.

    fmg export RUN --triton models                       # the repository
    tritonserver --model-repository models               # on the server
    pip install 'tritonclient[http]' pillow              # here
    python examples/triton_client.py 'a red circle' --model meanflow-shapes --seed 7 --out circle.png

The same prompt and seed give the image of `fmg generate`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import tritonclient.http as triton
from PIL import Image
from tritonclient.utils import InferenceServerException

TYPES = {"BYTES": np.object_, "INT64": np.int64, "INT32": np.int32}


def column(name: str, values: list[str] | list[int], kind: str) -> triton.InferInput:
    """One input of a request: a value for each image."""
    array = np.array([[value] for value in values], TYPES[kind])
    tensor = triton.InferInput(name, list(array.shape), kind)
    tensor.set_data_from_numpy(array)
    return tensor


def main() -> int:
    parser = argparse.ArgumentParser(description="Asks a Triton server for one image and saves it.")
    parser.add_argument("prompt")
    parser.add_argument("--model", required=True, help="name of the model, which fmg export --triton printed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="sampling steps (NFE); default: those of the model")
    parser.add_argument("--out", type=Path, default=Path("image.png"))
    parser.add_argument("--url", default="localhost:8000", help="host and port, without http://")
    given = parser.parse_args()

    if given.out.exists():
        print(f"error: {given.out} exists already. Name another file with --out.", file=sys.stderr)
        return 2
    inputs = [column("prompt", [given.prompt], "BYTES"), column("seed", [given.seed], "INT64")]
    if given.steps is not None:
        inputs.append(column("steps", [given.steps], "INT32"))
    try:
        with triton.InferenceServerClient(given.url) as client:
            images = client.infer(given.model, inputs).as_numpy("image")
    except (InferenceServerException, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    Image.fromarray(images[0]).save(given.out)
    print(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
