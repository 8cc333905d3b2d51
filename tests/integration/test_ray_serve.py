"""`fmg serve --engine ray` with two replicas on this machine: killed under load, adapters, loopback, SIGTERM."""

from __future__ import annotations

import ipaddress
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

pytest.importorskip("ray.serve", reason="needs the packages of flow-map-grpo[ray]")
pytest.importorskip("prometheus_client", reason="needs the packages of flow-map-grpo[server]")

from fmg.inference import load
from tests.integration.test_image_server import Server
from tests.support.image_service import pixels, post
from tests.support.reward_service import call
from tests.support.tiny_artifact import PROMPTS, build_tiny_artifact

pytestmark = pytest.mark.slow

TOKEN = {"Authorization": "Bearer secret"}
BASE, PROMPT, SEEDS, CLIENTS = "meanflow-shapes", "a red circle left", 12, 6
START_S = 300


class Replicas:
    """A server with two replicas, and the processes of Ray under it."""

    def __init__(self, artifact: Path, **environment: str) -> None:
        options = ("--engine", "ray", "--replicas", "2", "--device", "cpu", "--threads", "1", "--batch-size", "4")
        self.server = Server(BASE, str(artifact), *options, FMG_SERVE_TOKEN="secret", **environment)
        self.artifact = artifact
        self.url = self.server.url
        self.all = self._below()

    def _below(self) -> list[psutil.Process]:
        return psutil.Process(self.server.process.pid).children(recursive=True)

    def replicas(self) -> list[int]:
        """Processes of replicas, whether they are ready or not."""
        found = [child for child in self._below() if _title(child).startswith("ray::ServeReplica")]
        self.all += [child for child in found if child not in self.all]
        return [child.pid for child in found]

    def ask(self, model: str, seed: int) -> tuple[int, Any]:
        request = {"prompt": PROMPT, "model": model, "seed": seed, "steps": 2}
        status, _, answer = post(self.url, request, TOKEN)
        return status, answer


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replicas]:
    # sockets of Ray have long names, which have a limit
    found = Replicas(build_tiny_artifact(tmp_path_factory.mktemp("served") / "tiny").folder, RAY_TMPDIR="/tmp")
    yield found
    if found.server.process.poll() is None:
        below = {*found.all, *found._below()}
        found.server.process.kill()
        for process in below:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def test_replicas_are_killed_under_load_and_no_image_is_wrong(
    running: Replicas, shapes_run: Path, other_shapes_run: Path
) -> None:
    expected = {}
    for model, target in {BASE: BASE, f"{BASE}:one": str(shapes_run), f"{BASE}:two": str(other_shapes_run)}.items():
        with load(target, device="cpu") as generator:
            made = generator.generate(PROMPT, 0, num=SEEDS, steps=2, progress=False)
            expected[model] = [np.asarray(image).astype(int) for image in made.to_pil()]
    assert _listening_elsewhere(running.all) == []
    first = _until(lambda: found if len(found := running.replicas()) == 2 else None)

    def checked(number: int) -> int:
        """The status of a request whose image is that of its seed and adapter."""
        model = list(expected)[number % 3]
        status, answer = running.ask(model, number % SEEDS)
        if status == 200:
            assert ("adapter_sha256" in answer) == (model != BASE)
            difference = pixels(answer["data"][0]).astype(int) - expected[model][number % SEEDS]
            assert abs(difference).max() <= 1
        return status

    digests = {}
    for name, run in {"one": shapes_run, "two": other_shapes_run}.items():
        status, _, answer = post(running.url, {"name": name, "run": str(run)}, TOKEN, "/v1/adapters")
        assert (status, answer["id"], answer["base"]) == (200, f"{BASE}:{name}", BASE)
        digests[answer["id"]] = answer["adapter_sha256"]
    assert [model["id"] for model in _models(running)] == [BASE, "tiny", f"{BASE}:one", f"{BASE}:two"]
    with ThreadPoolExecutor(CLIENTS) as pool:
        before = [pool.submit(checked, number) for number in range(60)]
        _until(lambda: sum(one.done() for one in before) > 10 or None)
        os.kill(first[0], signal.SIGKILL)
        # what that replica had was generated once more by the other
        assert [one.result() for one in before] == [200] * 60
        new = _until(lambda: [pid for pid in running.replicas() if pid not in first] or None)
        # the new one answers as soon as it is the only one, with adapters that were added before it began
        _until(lambda: len(_ready(running)) == 2 or None)
        os.kill(first[1], signal.SIGKILL)
        after = [one.result() for one in [pool.submit(checked, number) for number in range(60)]]
        assert after == [200] * 60
    assert psutil.pid_exists(new[0])
    for model, digest in digests.items():
        assert running.ask(model, 0)[1]["adapter_sha256"] == digest
    assert _listening_elsewhere(running.all) == []


def test_a_replica_that_starts_later_does_not_serve_other_weights(running: Replicas) -> None:
    request = {"prompt": PROMPTS[0], "model": "tiny", "seed": 3}
    before = post(running.url, request, TOKEN)[2]["data"][0]["b64_json"]
    _until(lambda: len(_ready(running)) == 2 or None)
    assert _status(running) == "ok"
    kept = running.artifact.with_name("kept")
    running.artifact.rename(kept)
    build_tiny_artifact(running.artifact, seed=1)
    os.kill(running.replicas()[0], signal.SIGKILL)
    _until(lambda: _status(running) == "degraded" or None)
    info = json.loads(call(running.url, "GET", "/info", None, TOKEN)[2])
    assert "The files of 'tiny' have changed" in info["problems"][0]
    # its sibling gets all requests
    answers = [post(running.url, request, TOKEN)[2]["data"][0]["b64_json"] for _ in range(20)]
    assert answers == [before] * 20
    shutil.rmtree(running.artifact)
    kept.rename(running.artifact)
    _until(lambda: _status(running) == "ok" or None)
    _until(lambda: len(_ready(running)) == 2 or None)
    assert post(running.url, request, TOKEN)[2]["data"][0]["b64_json"] == before


def test_errors_are_those_of_the_built_in_engine(running: Replicas, tmp_path: Path) -> None:
    for change, status, key in (
        ({"size": "64x64"}, 400, "size"),
        ({"steps": 1000}, 400, "steps"),
        ({"model": "other"}, 404, "model"),
        ({"prompt": " "}, 400, "prompt"),
    ):
        found, _, answer = post(running.url, {"prompt": PROMPT, **change}, TOKEN)
        assert (found, answer["error"]["param"]) == (status, key)
    assert post(running.url, {"name": "x", "run": str(tmp_path / "none")}, TOKEN, "/v1/adapters")[0] == 400
    assert post(running.url, {"prompt": PROMPT}, {"Authorization": "Bearer other"})[0] == 401
    assert json.loads(call(running.url, "GET", "/health")[2]) == {"status": "ok", "queued": 0}


def test_sigterm_finishes_what_was_accepted_and_leaves_no_process(running: Replicas) -> None:
    with ThreadPoolExecutor(CLIENTS) as pool:
        accepted = [pool.submit(running.ask, BASE, seed) for seed in range(CLIENTS)]
        _until(lambda: json.loads(call(running.url, "GET", "/health")[2])["queued"] or all(a.done() for a in accepted))
        everything = [*running.all, *running._below()]
        assert running.server.end() == 0
        assert [one.result()[0] for one in accepted] == [200] * CLIENTS
    _, left = psutil.wait_procs([process for process in everything if process.is_running()], timeout=30)
    assert [_title(process) for process in left] == []
    # replicas were killed; nothing else of Ray is in what the server says
    said = [line for line in running.server.said if line != "Starting Ray\n" and "ray" in line.lower()]
    assert {line.partition(";")[0] for line in said} == {"ERROR:    A replica died"}


def _status(running: Replicas) -> str:
    return str(json.loads(call(running.url, "GET", "/health")[2])["status"])


def _models(running: Replicas) -> Any:
    return json.loads(call(running.url, "GET", "/v1/models", None, TOKEN)[2])["data"]


def _ready(running: Replicas) -> list[int]:
    """Replicas that have loaded their models: they have a connection to listen on for calls of others."""
    return [pid for pid in running.replicas() if len(_listening(psutil.Process(pid))) > 1]


def _listening(process: psutil.Process) -> list[str]:
    try:
        return [one.laddr.ip for one in process.net_connections() if one.status == psutil.CONN_LISTEN]
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


def _listening_elsewhere(processes: list[psutil.Process]) -> list[str]:
    """Addresses other than loopback."""
    addresses = [ipaddress.ip_address(ip) for process in processes for ip in _listening(process)]
    assert addresses
    plain = [getattr(address, "ipv4_mapped", None) or address for address in addresses]
    return [str(address) for address in plain if not address.is_loopback]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def _until(ready: Callable[[], Any]) -> Any:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if found := ready():
            return found
        time.sleep(0.2)
    raise AssertionError("nothing happened")
