"""The server's side of replicas, without starting any: a replica that dies, errors as values, adapters in requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("ray", reason="needs the packages of flow-map-grpo[ray]")

from ray.exceptions import ActorDiedError

from fmg.core.errors import UsageError
from fmg.inference.service.engine import Asked
from fmg.inference.service.ray_engine import RayEngine, Replica, _Added
from fmg.serving.app import RefusedError
from fmg.serving.batching import BusyError
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
        return await work(RayEngine(handle, {"a": NONE, "a:x": NONE, "run": {"adapter_sha256": "0"}}, most))

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
