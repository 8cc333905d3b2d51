"""`fmg serve` as a process: the stock client of OpenAI, the same images as `fmg generate`, and SIGTERM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fmg.inference import load
from tests.support.cli import fmg
from tests.support.image_service import pixels, post

pytest.importorskip("fastapi", reason="needs the packages of flow-map-grpo[server]")
pytest.importorskip("prometheus_client", reason="needs the packages of flow-map-grpo[server]")
pytestmark = pytest.mark.slow


class Server:
    """`fmg serve` as a process."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        command = [sys.executable, "-m", "fmg", "serve", *arguments, "--port", "0", "--offline"]
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        self.process = subprocess.Popen(
            command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self.process.stderr is not None
        self.said = []
        for line in self.process.stderr:
            self.said.append(line)
            if line.startswith("Serving on "):
                break
        assert self.process.poll() is None, "".join(self.said)
        self.url = self.said[-1].removeprefix("Serving on ").strip()

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        code = self.process.wait(60)
        if self.process.stderr is not None:
            self.said += self.process.stderr.readlines()
            self.process.stderr.close()
        return code


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = Server("meanflow-shapes", "single=scm-shapes")
    yield running
    assert running.end() == 0
    # a drained server has nothing to report
    assert running.said[-1].startswith("Serving on ")


def test_the_stock_client_of_openai_works(server: Server) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["meanflow-shapes", "single"]
        assert client.models.retrieve("single").id == "single"
        answer = client.images.generate(
            model="single",
            prompt="a red circle left",
            n=2,
            size="32x32",
            response_format="b64_json",
            extra_body={"seed": 5, "steps": 2},
        )
        with load("scm-shapes", device="cpu") as generator:
            made = generator.generate("a red circle left", 5, num=2, steps=2).to_pil()
        for entry, image in zip(answer.data, made, strict=True):
            difference = pixels(entry.model_dump()).astype(int) - np.asarray(image)
            assert abs(difference).max() <= 1
        with pytest.raises(openai.BadRequestError, match="does not generate images of 1024x1024"):
            client.images.generate(prompt="a red circle", size="1024x1024")
        with pytest.raises(openai.NotFoundError, match="There is no model 'dall-e-3'"):
            client.images.generate(model="dall-e-3", prompt="a red circle")


def test_an_image_is_the_same_alone_and_in_a_batch(server: Server) -> None:
    requests = [{"prompt": f"a {color} {shape}", "seed": seed} for seed, (color, shape) in enumerate(_WORDS)]
    alone = [post(server.url, request)[2] for request in requests]
    with ThreadPoolExecutor(len(requests)) as pool:
        together = list(pool.map(lambda request: post(server.url, request)[2], requests))
    assert max(answer["batch"] for answer in together) > 1
    for one, other in zip(alone, together, strict=True):
        difference = pixels(one["data"][0]).astype(int) - pixels(other["data"][0])
        assert abs(difference).max() <= 1


_WORDS = [(color, shape) for color in ("red", "blue", "green") for shape in ("circle", "square", "star")]


def test_sigterm_finishes_what_was_accepted_and_ends_with_0() -> None:
    running = Server("meanflow-shapes", "--max-steps", "1000", "--batch-size", "1", FMG_SERVE_TOKEN="secret")
    headers = {"Authorization": "Bearer secret"}
    request = {"prompt": "a red circle", "steps": 20}
    with ThreadPoolExecutor(3) as pool:
        # the others wait behind the first
        answers = [pool.submit(post, running.url, {**request, "steps": 200}, headers)]
        time.sleep(0.2)
        answers += [pool.submit(post, running.url, request, headers) for _ in range(2)]
        time.sleep(0.3)
        assert not any(answer.done() for answer in answers)
        assert running.end() == 0
        assert [answer.result()[0] for answer in answers] == [200] * 3
    with pytest.raises(OSError, match="refused"):
        post(running.url, request, headers)


def test_work_that_outlasts_the_drain_is_answered_and_the_server_still_ends_with_0(shapes_artifact: object) -> None:
    pytest.importorskip("onnxruntime")
    folder = str(shapes_artifact.folder)  # type: ignore[attr-defined]
    running = Server(folder, "--max-steps", "1000", "--drain", "0.5")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(post, running.url, {"prompt": "a red circle", "steps": 1000, "n": 10})
        time.sleep(0.5)
        assert running.end() == 0
        status, _, said = answer.result()
    assert (status, said["error"]["message"]) == (503, "The server is stopping. Try again later.")


def test_an_artifact_is_served_without_torch(shapes_artifact: object, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    folder = str(shapes_artifact.folder)  # type: ignore[attr-defined]
    hidden = tmp_path / "torch"
    hidden.mkdir()
    (hidden / "__init__.py").write_text("raise ImportError('torch is hidden')\n")
    running = Server(folder, "--batch-size", "4", PYTHONPATH=str(tmp_path))
    try:
        status, _, answer = post(running.url, {"prompt": "a red circle left", "seed": 3})
        assert status == 200
    finally:
        assert running.end() == 0
    with load(folder) as generator:
        made = generator.generate("a red circle left", 3).to_pil()[0]
    assert abs(pixels(answer["data"][0]).astype(int) - np.asarray(made)).max() <= 1


def test_mistakes_are_one_line() -> None:
    for arguments, said in {
        ("meanflow-shape",): "neither a model nor a run folder",
        ("meanflow-shapes", "--host", "0.0.0.0"): "no token is set",
        ("a=meanflow-shapes", "a=scm-shapes"): "2 targets are called 'a'",
        ("",): "TARGET is empty",
    }.items():
        done = fmg("serve", *arguments, "--token-env", "NOT_SET")
        assert (done.code, said in done.stderr) == (2, True), done.stderr
        assert len(done.stderr.strip().splitlines()) <= 2
