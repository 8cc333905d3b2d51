"""The server's side of replicas, without starting any: a replica that dies, errors as values, adapters in requests."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray", reason="needs the packages of flow-map-grpo[ray]")

from ray.exceptions import ActorDiedError

from fmg.core.errors import UsageError
from fmg.inference.service import ray_engine
from fmg.inference.service.engine import Asked
from fmg.inference.service.limits import Limits
from fmg.inference.service.opening import named_targets, weights_digest
from fmg.inference.service.ray_engine import Agreement, RayEngine, Replica, ReplicaSpec, Watch, _Added
from fmg.serving.app import RefusedError
from fmg.serving.batching import BusyError
from tests.support.artifact import make_run, shapes_recipe
from tests.support.cli import fmg

ASKED = Asked("a:x", "a red circle", (1, 2), None, None)
NONE = {"adapter_sha256": None}


class Handle:
    """A deployment whose calls have the given outcomes."""

    def __init__(self, *outcomes: object) -> None:
        self.outcomes = list(outcomes)
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        def remote(*arguments: object) -> Any:
            self.calls.append((name, *arguments))
            outcome = self.outcomes.pop(0)

            async def answer() -> object:
                if isinstance(outcome, ActorDiedError):
                    raise outcome
                return outcome

            return answer()

        return type("Method", (), {"remote": staticmethod(remote)})


def run(handle: Handle, work: Callable[[RayEngine], Any], most: int = 4) -> Any:
    async def inside() -> Any:
        facts = {"a": NONE, "a:x": NONE, "run": {"adapter_sha256": "0"}}
        return await work(RayEngine(handle, facts, most, Watch(Agreement("test"))))

    return asyncio.run(inside())


def test_a_request_is_sent_once_more_when_its_replica_dies_and_not_twice() -> None:
    async def asked(engine: RayEngine) -> Any:
        result = await asyncio.gather(engine.submit(ASKED), return_exceptions=True)
        assert engine.queued == 0
        return result[0]

    assert run(Handle(ActorDiedError(), "images"), asked) == "images"
    twice = run(Handle(ActorDiedError(), ActorDiedError(), "images"), asked)
    assert isinstance(twice, RefusedError)
    assert (twice.status, twice.headers) == (503, {"Retry-After": "1"})
    for said in (UsageError("It is wrong", "Mend it."), BusyError(3), RefusedError(400, "No", "Yes.", key="size")):
        assert run(Handle(said), asked) is said


def test_the_queue_of_all_replicas_has_an_end() -> None:
    async def asked(engine: RayEngine) -> None:
        first = engine.submit(ASKED), engine.submit(ASKED)
        with pytest.raises(BusyError):
            engine.submit(ASKED)
        await asyncio.gather(*first)
        await engine.submit(ASKED)

    run(Handle(1, 2, 3), asked)


def test_requests_carry_the_newest_adapter_of_their_model() -> None:
    handle = Handle(("a:x", {"adapter_sha256": "1"}), "images", ("a:x", {"adapter_sha256": "2"}), "images", "images")

    async def asked(engine: RayEngine) -> None:
        for run in ("runs/1", "runs/2"):
            assert await engine.add_adapter("x", run, None) == "a:x"
            await engine.submit(ASKED)
        assert engine.facts("a:x") == {"adapter_sha256": "2"}
        await engine.submit(Asked("run", "a red circle", (1,), None, None))

    run(handle, asked)
    carried = [call[2] for call in handle.calls if call[0] == "generate"]
    assert [(one.run, one.version, one.digest) for one in carried[:2]] == [("runs/1", 1, "1"), ("runs/2", 2, "2")]
    # a model that was there from the start comes with the digest that it had then
    assert handle.calls[-1][2:] == (None, "0")


class Loaded:
    """The engine of a replica: what was added to it."""

    digest = "1"

    def __init__(self) -> None:
        self.added: list[str] = []

    async def add_adapter(self, name: str, run: str, model: str | None) -> str:
        await asyncio.sleep(0)
        self.added.append(run)
        return f"a:{name}"

    def facts(self, name: str) -> dict[str, object]:
        return {"adapter_sha256": self.digest}

    def submit(self, asked: Asked) -> Future[str]:
        made: Future[str] = Future()
        made.set_result(self.added[-1])
        return made


def test_a_replica_reads_a_newer_adapter_once_and_only_the_one_that_was_checked() -> None:
    replica: Any = object.__new__(Replica)
    replica._engine, replica._versions, replica._adding = Loaded(), {}, asyncio.Lock()
    first = _Added("a:x", "x", "runs/1", None, 1, "1")

    async def asked() -> None:
        assert await asyncio.gather(*(replica.generate(ASKED, first, None) for _ in range(5))) == ["runs/1"] * 5
        second = replace(first, run="runs/2", version=2)
        assert await replica.generate(ASKED, second, None) == "runs/2"
        # one that was sent earlier gets the newer adapter, as in the queue of one process
        assert await replica.generate(ASKED, first, None) == "runs/2"
        assert replica._engine.added == ["runs/1", "runs/2"]
        third = replace(first, run="runs/3", version=3, digest="other")
        for _ in range(2):
            assert "has changed since it was added" in str(await replica.generate(ASKED, third, None))

    asyncio.run(asked())


def test_a_replica_that_read_another_adapter_at_its_start_generates_nothing() -> None:
    replica: Any = object.__new__(Replica)
    replica._engine, replica._versions, replica._loaded = Loaded(), {}, {"a": None, "run": "1"}
    replica._engine.added.append("images")

    async def asked(model: str, digest: object) -> object:
        return await replica.generate(Asked(model, "a red circle", (1,), None, None), None, digest)

    assert asyncio.run(asked("run", "1")) == asyncio.run(asked("a", None)) == "images"
    assert "has changed since the server started" in str(asyncio.run(asked("run", "0")))


class Store:
    """Ray's key-value store, in this process."""

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}

    def _internal_kv_put(self, key: str, value: str, overwrite: bool = True, *, namespace: str) -> None:
        if overwrite or key.encode() not in self.values:
            self.values[key.encode()] = value.encode()

    def _internal_kv_get(self, key: str | bytes, *, namespace: str) -> bytes | None:
        return self.values.get(key if isinstance(key, bytes) else key.encode())

    def _internal_kv_exists(self, key: str, *, namespace: str) -> bool:
        return key.encode() in self.values

    def _internal_kv_list(self, prefix: str, *, namespace: str) -> list[bytes]:
        return [key for key in self.values if key.startswith(prefix.encode())]


def test_a_replica_that_would_open_other_files_waits_and_the_server_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("onnxruntime")
    from tests.support.tiny_artifact import build_tiny_artifact

    folder, kept = tmp_path / "tiny", tmp_path / "kept"
    build_tiny_artifact(folder)
    store, agreement = Store(), Agreement("test")
    monkeypatch.setattr(ray_engine, "_store", lambda: store)
    monkeypatch.chdir(tmp_path)
    targets = tuple(named_targets(["tiny"]))
    spec = ReplicaSpec(targets, {}, {"device": "cpu"}, Limits(), 1, tmp_path, loopback=False)
    assert set(asyncio.run(Replica(spec, agreement).models())) == {"tiny"}  # type: ignore[arg-type]
    agreement.serves()
    folder.rename(kept)
    build_tiny_artifact(folder, seed=1)
    said = []

    def looked(seconds: float) -> None:
        with Watch(agreement, every=0.01) as watch:
            while not watch.problems:
                threading.Event().wait(0.01)
        said.extend(watch.problems)
        shutil.rmtree(folder, ignore_errors=True)
        if len(said) == 2:
            kept.rename(folder)

    clock = SimpleNamespace(sleep=looked, monotonic=time.monotonic, time_ns=time.time_ns)
    monkeypatch.setattr(ray_engine, "time", clock)
    assert set(asyncio.run(Replica(spec, agreement).models())) == {"tiny"}  # type: ignore[arg-type]
    assert len(said) == 2
    assert "The files of 'tiny' have changed since the server started" in said[0]
    # gone, they are no reason to start a replica that can generate nothing
    assert "It cannot load the models" in said[1]
    assert [text in caplog.text for text in said] == [True, True]
    assert str(tmp_path) not in "".join(said)
    assert agreement.reports() == {}


def test_a_report_that_is_not_repeated_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_engine, "_EXPIRES_S", 0.2)
    store, agreement = Store(), Agreement("test")
    monkeypatch.setattr(ray_engine, "_store", lambda: store)
    with Watch(agreement, every=0.01) as watch:
        for _ in range(30):
            agreement.report("1", "It waits.")
            time.sleep(0.01)
        assert watch.problems == ["It waits."]
        # the replica was removed
        time.sleep(0.5)
        assert watch.problems == []


def test_what_was_trained_is_in_the_digest_of_a_run(shapes_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(shapes_run, run)
    digest = weights_digest(str(run))
    assert digest == weights_digest(str(shapes_run)) != weights_digest("meanflow-shapes")
    full = tmp_path / "full"
    recipe = shapes_recipe(**{"train.trainable": "full"})
    first, second = (weights_digest(str(make_run(full / str(seed), recipe, seed, "full"))) for seed in (1, 2))
    assert first != second


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--engine", "rai"), "Did you mean 'ray'"),
        (("--replicas", "2"), "--replicas is an option of --engine ray"),
        (("--engine", "ray", "--replicas", "2", "--max-replicas", "3"), "--replicas cannot be used with"),
        (("--engine", "ray", "--min-replicas", "3", "--max-replicas", "2"), "--min-replicas needs --max-replicas"),
        # Ray would wait for minutes
        (("--engine", "ray", "--ray-address", "127.0.0.1:1"), "No Ray cluster can be reached at 127.0.0.1:1"),
        # Ray would start a cluster without a token
        (("--engine", "ray", "--ray-address", "local"), "--ray-address local is not an address"),
    ],
)
def test_options_that_do_not_go_together_are_refused_at_once(options: tuple[str, ...], said: str) -> None:
    result = fmg("serve", "meanflow-shapes", "--port", "0", *options)
    assert (result.code, said in result.stderr) == (2, True)
