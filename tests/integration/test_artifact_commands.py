"""An exported artifact in use: generation and checks without torch, verification and refusals on the command line."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
from base64 import b64decode
from io import BytesIO
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from fmg.inference import load
from fmg.inference.artifact import Artifact
from tests.support.artifact import copied, planted
from tests.support.bare_environment import ARTIFACT, COMMAND_LINE, BareEnvironment
from tests.support.cli import fmg
from tests.support.runtime import InstalledRuntime, install_runtime
from tests.support.schemas import check

pytestmark = [pytest.mark.slow, pytest.mark.compile]

_PLACES = ("left", "right", "top", "bottom")
_SUBJECTS = ("red circle", "blue square", "green triangle", "yellow star", "purple circle")
PROMPTS = [f"a {subject} {place}" for subject in _SUBJECTS for place in _PLACES]

DRAW = """
import json, sys
import numpy as np
from fmg.inference.onnxruntime import load
prompts, seeds = json.loads(sys.argv[2])
with load(sys.argv[1]) as generator:
    np.save("drawn.npy", generator.generate(prompts, seeds).image_array)
foreign = {"torch", "diffusers", "transformers", "pydantic", "rich", "typer"} & set(sys.modules)
assert not foreign, foreign
"""


@pytest.fixture(scope="module")
def torch_images(shapes_run: Path) -> NDArray[np.float32]:
    """The images that torch generates, with the position of each prompt in the list as its seed."""
    with load(shapes_run, device="cpu") as generator:
        return generator.generate(PROMPTS, range(len(PROMPTS))).image_array


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> BareEnvironment:
    return BareEnvironment.make(tmp_path_factory.mktemp("bare") / "venv", [*ARTIFACT, *COMMAND_LINE])


def test_a_program_generates_the_images_of_torch_with_four_packages(
    shapes_artifact: Artifact, torch_images: NDArray[np.float32], tmp_path: Path
) -> None:
    environment = BareEnvironment.make(tmp_path / "venv", ARTIFACT)
    for absent in ("torch", "pydantic", "rich"):
        assert environment.run("-c", f"import {absent}", cwd=tmp_path).returncode == 1
    asked = json.dumps([PROMPTS, list(range(len(PROMPTS)))])
    done = environment.run("-c", DRAW, str(shapes_artifact.folder), asked, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    drawn = np.load(tmp_path / "drawn.npy")
    largest = np.sort(np.abs(drawn - torch_images).reshape(20, -1).max(1))
    # one image in hundreds amplifies rounding (fmg.export.verify)
    assert largest[17] <= 1e-4
    assert largest[-1] <= 1 / 255


def test_the_commands_work_without_torch(
    shapes_artifact: Artifact, torch_images: NDArray[np.float32], bare: BareEnvironment, tmp_path: Path
) -> None:
    artifact = str(shapes_artifact.folder)
    for seed, prompt in enumerate(PROMPTS[:2]):
        done = bare.run(
            "-m", "fmg", "generate", prompt, "--from", artifact, "--seed", str(seed), "--json", cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        (entry,) = json.loads(done.stdout)["images"]
        levels = np.asarray(Image.open(tmp_path / entry["path"]), np.float32).transpose(2, 0, 1)
        assert float(np.abs(levels / 255 - torch_images[seed]).max()) <= 1 / 255
    done = bare.run("-m", "fmg", "verify", artifact, "--alone", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    check(report, "verify")
    assert [entry["name"] for entry in report["checks"]] == ["files", "drawing"]
    done = bare.run("-m", "fmg", "bench", artifact, "--repeats", "1", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    check(json.loads(done.stdout), "bench")


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["verify"], "needs the package 'torch'"),
        (["generate", "a red circle", "--backend", "torch", "--from"], "does not run exported artifacts"),
        (["bench", "--compare", "torch,onnxruntime"], "needs torch"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_commands_that_need_torch_report_it_in_one_line(
    command: list[str], says: str, shapes_artifact: Artifact, bare: BareEnvironment, tmp_path: Path
) -> None:
    done = bare.run("-m", "fmg", *command, str(shapes_artifact.folder), cwd=tmp_path)
    assert done.returncode in (1, 2)
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert says in line


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> InstalledRuntime:
    return install_runtime(tmp_path_factory.mktemp("runtime"))


def cpu_seconds() -> float:
    """Of all processes that this one started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_pip_installs_the_runtime_without_torch_and_pydantic(
    runtime: InstalledRuntime, shapes_artifact: Artifact, torch_images: NDArray[np.float32], tmp_path: Path
) -> None:
    assert not {"torch", "pydantic", "diffusers", "transformers", "scipy"} & runtime.names
    assert runtime.megabytes < 260, f"{runtime.megabytes:.0f} MB, installed in {runtime.seconds:.0f} s"
    artifact = shapes_artifact.folder
    asked = json.dumps([PROMPTS, list(range(len(PROMPTS)))])
    done = runtime.run(runtime.python, "-c", DRAW, artifact, asked, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert float(np.abs(np.load(tmp_path / "drawn.npy") - torch_images).max()) <= 1 / 255

    started = cpu_seconds()
    done = runtime.run(runtime.script, "generate", PROMPTS[0], "--from", artifact, "--json", cwd=tmp_path)
    # the time to the first image of a process that has a core for itself
    assert cpu_seconds() - started <= 1.5
    assert done.returncode == 0, done.stderr
    (entry,) = json.loads(done.stdout)["images"]
    levels = np.asarray(Image.open(tmp_path / entry["path"]), np.float32).transpose(2, 0, 1)
    assert float(np.abs(levels / 255 - torch_images[0]).max()) <= 1 / 255

    for command in (["verify", artifact, "--alone"], ["bench", artifact, "--repeats", "1"], ["doctor"]):
        done = runtime.run(runtime.script, *command, "--json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert [check["name"] for check in json.loads(done.stdout) if check["topic"] in ("extra", "self-test")] == [
        "server",
        "a graph in ONNX Runtime",
    ]


def test_the_runtime_says_in_one_line_what_to_install(
    runtime: InstalledRuntime, shapes_artifact: Artifact, tmp_path: Path
) -> None:
    full = "pip uninstall -y flow-map-grpo-runtime && pip install flow-map-grpo"
    artifact = str(shapes_artifact.folder)
    for command, advice in (
        (["train"], full),
        (["eval", "scm-shapes"], full),
        (["export", "scm-shapes"], full),
        (["list"], full),
        (["generate", "a red circle", "--from", "scm-shapes"], full),
        (["verify", artifact], full),
        (["serve", artifact], "pip install 'flow-map-grpo-runtime[server]'"),
    ):
        done = runtime.run(runtime.script, *command, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert advice in line


def test_the_runtime_serves(
    runtime: InstalledRuntime, shapes_artifact: Artifact, torch_images: NDArray[np.float32], tmp_path: Path
) -> None:
    runtime.add(f"{runtime.wheel}[server]")
    command = [str(runtime.script), "serve", str(shapes_artifact.folder), "--port", "0"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=runtime.environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as server:
        try:
            assert server.stderr is not None
            address = next(line.split()[-1] for line in server.stderr if "http://" in line)
            body = json.dumps({"prompt": PROMPTS[0], "seed": 0}).encode()
            request = Request(f"{address}/v1/images/generations", body, {"Content-Type": "application/json"})
            with urlopen(request, timeout=60) as answer:
                (entry,) = json.load(answer)["data"]
            levels = np.asarray(Image.open(BytesIO(b64decode(entry["b64_json"]))), np.float32).transpose(2, 0, 1)
            assert float(np.abs(levels / 255 - torch_images[0]).max()) <= 1 / 255
            server.send_signal(signal.SIGTERM)
            assert server.wait(30) == 0
        finally:
            server.kill()


def test_a_passing_verification_is_stored(shapes_artifact: Artifact, tmp_path: Path) -> None:
    folder = copied(shapes_artifact, tmp_path / "a")
    done = fmg("verify", str(folder), "--num", "4", "--device", "cpu", "--json")
    assert done.code == 0, done.stderr
    report = json.loads(done.stdout)
    check(report, "verify")
    assert report["passed"] is True
    kept = json.loads((folder / "manifest.json").read_text())["checks"]
    assert {entry["name"] for entry in kept} == {entry["name"] for entry in report["checks"]}


def test_verify_exits_with_code_1_and_names_the_layer(
    shapes_artifact: Artifact, shapes_run: Path, tmp_path: Path
) -> None:
    tensor = "single_transformer_blocks.1.attn.to_k.weight"
    bad = planted(shapes_artifact, tmp_path / "bad", tensor, 2.0)
    done = fmg("verify", str(bad.folder), "--against", str(shapes_run), "--num", "4", "--device", "cpu")
    assert done.code == 1
    assert "FAILED" in done.stdout
    assert "transformer first differs in single_transformer_blocks.1.attn.to_k " in done.stdout


def test_verify_exits_with_code_1_when_the_rewards_are_inconclusive(shapes_artifact: Artifact, tmp_path: Path) -> None:
    folder = copied(shapes_artifact, tmp_path / "a")
    done = fmg("verify", str(folder), "--full", "--num", "1", "--device", "cpu", "--json")
    assert done.code == 1, done.stderr
    failed = [entry for entry in json.loads(done.stdout)["checks"] if not entry["passed"]]
    assert {entry["name"] for entry in failed} == {"reward/shapes", "reward/shapes/int8"}
    assert all("too few images to decide: 1 of 500" in entry["note"] for entry in failed)
