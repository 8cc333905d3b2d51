"""Training runs whose reward server is a process that is killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from fmg import Recipe, train
from fmg.core.errors import RewardError
from fmg.core.events import Event, IterationDone
from fmg.data.run_folder import RunFolder
from fmg.registry import rewards
from fmg.rewards.service.wire import SAFETENSORS, ScoreRequest, decode_request, encode_request
from tests.support.reward_service import call
from tests.support.web import Call, Handler, fake_server

pytest.importorskip("fastapi", reason="needs the packages of flow-map-grpo[server]")
pytestmark = pytest.mark.slow

SMALL = {
    "train.iterations": 3,
    "rollout.groups": 2,
    "rollout.group_size": 3,
    "eval.num": 4,
    "eval.every": 3,
    "eval.rewards": [],
}


class Server:
    """`fmg reward-server` as a process that can be killed and started again on its port."""

    def __init__(self, *rewards: str, options: Sequence[str] = (), path: Path | None = None) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._rewards = [word for name in rewards for word in ("--reward", name)] + [*options]
        self._path = {} if path is None else {"PYTHONPATH": str(path)}
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "fmg", "reward-server", *self._rewards, "--port", str(self.port)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **self._path}
        self._process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def wait(self) -> None:
        """Until it answers."""
        for _ in range(600):
            assert self._process is not None
            if self._process.poll() is not None and self._process.stderr is not None:
                raise AssertionError(self._process.stderr.read().decode())
            try:
                if call(self.url, "GET", "/health")[0] == 200:
                    return
            except OSError:
                time.sleep(0.2)
        raise AssertionError("the server does not start")

    def end(self, how: signal.Signals) -> int:
        assert self._process is not None
        self._process.send_signal(how)
        code = self._process.wait(60)
        if self._process.stderr is not None:
            self._process.stderr.close()
        return code


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = Server("shapes", "jpeg-compressibility")
    running.wait()
    yield running
    assert running.end(signal.SIGINT) in (0, 130, -signal.SIGINT)


def run(folder: Path, reward: dict[str, Any], observer: Callable[[Event], None] = lambda event: None) -> list[float]:
    """The mean rewards of the iterations."""
    recipe = Recipe.default(model="meanflow-shapes", **{**SMALL, "rewards": [reward]})
    train(recipe, folder, observer)
    lines = [json.loads(line) for line in RunFolder(folder).metrics.read_text().splitlines()]
    return [line["reward/mean"] for line in lines if "reward/mean" in line]


def remote(server: Server, **options: object) -> dict[str, Any]:
    return {"name": "remote", "url": server.url, "weights": {"shapes": 1.0}, "batch_size": 4, **options}


def test_the_service_says_what_it_runs(server: Server) -> None:
    info = json.loads(call(server.url, "GET", "/info")[2])
    assert info["rewards"]["shapes"]["component"] == "shapes"
    assert info["packages"]["torch"] == torch.__version__


def test_scores_through_the_service_are_those_in_this_process(server: Server) -> None:
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    prompts = ["a red circle"] * 8
    weights = {"shapes": 0.7, "jpeg-compressibility": 0.3}
    output = rewards.build("remote", {"url": server.url, "weights": weights, "batch_size": 3})(images, prompts)
    for name in weights:
        assert torch.equal(output.parts[name], rewards.build(name)(images, prompts).total.float())
    total = sum(weight * output.parts[name] for name, weight in weights.items())
    torch.testing.assert_close(output.total, total)


def test_a_server_killed_and_restarted_in_the_middle_leaves_no_trace(server: Server, tmp_path: Path) -> None:
    expected = run(tmp_path / "local", {"name": "shapes"})

    def kill_and_restart(event: Event) -> None:
        if isinstance(event, IterationDone) and event.iteration == 1:
            server.end(signal.SIGKILL)
            server.start()

    options = {"retries": 100, "backoff": 0.2, "max_backoff": 0.5, "timeout": 30.0}
    assert run(tmp_path / "remote", remote(server, **options), kill_and_restart) == expected
    assert RunFolder(tmp_path / "remote").state().state == "finished"


def test_a_server_that_stays_away_stops_the_run_with_what_was_saved(server: Server, tmp_path: Path) -> None:
    server.wait()

    def kill(event: Event) -> None:
        if isinstance(event, IterationDone) and event.iteration == 1:
            server.end(signal.SIGKILL)

    try:
        with pytest.raises(RewardError, match=r"'remote' has no score for the prompt '.*connection"):
            run(tmp_path / "run", remote(server, retries=1, backoff=0.01), kill)
    finally:
        server.start()
        server.wait()
    folder = RunFolder(tmp_path / "run")
    assert folder.state().state == "failed"
    assert list((folder.checkpoints / "checkpoint-1").rglob("*.safetensors"))
    assert len(folder.metrics.read_text().splitlines()) == 2


def test_prompt_groups_without_a_score_are_left_out_of_the_update(tmp_path: Path) -> None:
    """The second call of the first iteration fails, and all of the second iteration."""
    scored = 0

    def respond(handler: Handler, call: Call) -> None:
        nonlocal scored
        if call.path == "/info":
            handler.answer({"rewards": {"brightness": {"probe_prompt": "p"}}, "limits": {"max_images": 3}})
            return
        images = decode_request(call.body, max_images=9, max_pixels=32 * 32).images
        if len(images) == 3:
            scored += 1
            if scored in (2, 3, 4):
                handler.answer({}, 500)
                return
        handler.answer({"scores": {"brightness": {"total": images.mean((1, 2, 3)).tolist()}}})

    with fake_server(respond) as server:
        reward = {"name": "remote", "url": server.url, "retries": 0, "concurrency": 1, "on_failure": "drop-group"}
        recipe = Recipe.default(model="meanflow-shapes", **{**SMALL, "eval.num": 2, "rewards": [reward]})
        # a branched run also scores other completions, which would be among the calls that are counted
        train(recipe.with_({"rollout.kind": "chain"}), tmp_path / "run")
    lines = [json.loads(line) for line in RunFolder(tmp_path / "run").metrics.read_text().splitlines()]
    first, second, third = (line for line in lines if "time/iteration_s" in line)
    assert first["reward/dropped"] == 0.5
    assert first["grad_norm"] > 0
    assert second["reward/dropped"] == 1
    assert second["skipped_updates"] > 0
    assert "reward/mean" not in second
    assert "reward/dropped" not in third
    assert all(value is not None and value == value for line in lines for value in line.values())


def test_scoring_that_outlasts_the_drain_is_answered_and_the_server_still_ends_with_0(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import time\n"
        "def score(images, prompts):\n"
        "    time.sleep(60 * (prompts[0] == 'slow'))\n"
        "    return images.mean((1, 2, 3))\n"
    )
    running = Server("python:slow:score", options=("--drain", "0.5"), path=tmp_path)
    running.wait()
    body = encode_request(ScoreRequest(torch.zeros(1, 3, 8, 8), ("slow",), ()))
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(call, running.url, "POST", "/score", body, {"Content-Type": SAFETENSORS})
        while not json.loads(call(running.url, "GET", "/health")[2])["queued"]:
            time.sleep(0.05)
        began = time.monotonic()
        assert running.end(signal.SIGTERM) == 0
        assert time.monotonic() - began < 30
        status, _, said = asked.result()
    assert (status, json.loads(said)["error"]["what"]) == (503, "The server is stopping")
