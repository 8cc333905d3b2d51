"""Replicas of the served models as a Ray Serve deployment: several processes, GPUs or machines behind one server.

The server stays the one process that clients reach, with the same application, limits and token as without Ray; a
replica is the engine of a server without HTTP, with its own queue and batches. If a replica dies, another one repeats
its requests: their seeds are fixed, so the images are the same.

Adapters that are added while the server runs travel with the requests. A replica that meets a request for one that it
does not have yet, or only in an earlier version, reads it first, so replicas that start later have it as well.

All replicas generate the same images. A replica that starts later, for example after another one has died, may find
different files than the first one did. It then waits until they are back, and the server says so.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from fmg.core.display import counted
from fmg.core.errors import FmgError, MissingDependencyError, UsageError, one_line, reason
from fmg.core.events import Notice, Observer, ignore
from fmg.core.json_io import parse_object
from fmg.core.signals import Signals
from fmg.inference.service.engine import Asked, LocalEngine, Painted
from fmg.inference.service.limits import Limits
from fmg.inference.service.models import ServedModels
from fmg.inference.service.opening import Named, open_served, weights_digest
from fmg.serving.app import RefusedError
from fmg.serving.batching import BusyError
from fmg.version import install_line

_LOOPBACK = "127.0.0.1"
# Images pass through the object store a few at a time; Ray's default size is a third of the machine's memory
_OBJECT_STORE_BYTES = 256 << 20
_ATTEMPTS = 2
_HEALTH_S = 2.0
_CONNECT_S = 10.0
# seconds between two checks and reports of a waiting replica, and how long a report counts
_AGREE_S = 10.0
_EXPIRES_S = 60.0
_DIGEST = "adapter_sha256"
_NAMESPACE = "fmg"

R = TypeVar("R")

log = logging.getLogger("uvicorn.error")


@dataclass(frozen=True)
class ReplicaSpec:
    """What every replica serves.

    Attributes:
        targets: what to load.
        adapters: runs by model and name, as `ServedModels.read_adapter` takes them.
        options: options of `fmg.inference.load`.
        limits: limits of a replica's queue and batches.
        max_adapters: adapters per model.
        folder: relative paths of runs and targets start here.
        loopback: whether all replicas are on this machine, and nothing outside it may reach them.
    """

    targets: tuple[Named, ...]
    adapters: Mapping[tuple[str | None, str], Sequence[str]]
    options: Mapping[str, Any]
    limits: Limits
    max_adapters: int
    folder: Path
    loopback: bool


@dataclass(frozen=True)
class Scale:
    """The number of replicas, and the resources of each.

    Attributes:
        minimum, maximum: number of replicas; Ray adds and removes them with the load in between.
        cpus: of each; Ray places as many on a machine as fit.
        gpu: whether each takes a GPU, where the cluster has any.
        address: of a running Ray cluster; None starts one on this machine for this server alone.
        drain: seconds for a replica that is removed to finish its requests.
    """

    minimum: int
    maximum: int
    cpus: int
    gpu: bool
    address: str | None
    drain: float


@dataclass(frozen=True)
class _Added:
    """An adapter that was added to a running server.

    Attributes:
        served: name of the model that it makes.
        name, run, model: as they were sent.
        version: rises with every adapter that is added.
        digest: sha256 of the adapter; None before the first replica has read it.
    """

    served: str | None
    name: str
    run: str
    model: str | None
    version: int
    digest: object = None


@dataclass(frozen=True)
class Agreement:
    """What every replica of a server has to open, in the key-value store of the cluster: the first replica decides.

    Attributes:
        app: the server's name in the cluster.
    """

    app: str

    def differing(self, digests: Mapping[str, str]) -> list[str]:
        """The models whose digest is not that of the first replica."""
        store, key = _store(), f"{self.app}/opened"
        store._internal_kv_put(key, json.dumps(dict(digests)), overwrite=False, namespace=_NAMESPACE)
        agreed = parse_object(store._internal_kv_get(key, namespace=_NAMESPACE))
        return [name for name, digest in digests.items() if digest != agreed.get(name)]

    def serves(self) -> None:
        """Notes that the server has started."""
        _store()._internal_kv_put(f"{self.app}/serves", "yes", namespace=_NAMESPACE)

    @property
    def serving(self) -> bool:
        """Whether the server has started."""
        return bool(_store()._internal_kv_exists(f"{self.app}/serves", namespace=_NAMESPACE))

    def report(self, replica: str, problem: str) -> None:
        """Tells the server what keeps a replica from starting. A report that is not repeated expires."""
        value = f"{time.time_ns()} {problem}" if problem else ""
        _store()._internal_kv_put(f"{self.app}/problem/{replica}", value, namespace=_NAMESPACE)

    def reports(self) -> dict[str, str]:
        """The reports by replica. Each begins with its time, so that repeated ones differ."""
        keys = _store()._internal_kv_list(f"{self.app}/problem/", namespace=_NAMESPACE)
        found = {key.decode(): _store()._internal_kv_get(key, namespace=_NAMESPACE) for key in keys}
        return {key: value.decode() for key, value in found.items() if value}

    def end(self) -> None:
        """Removes everything from the store."""
        _store()._internal_kv_del(f"{self.app}/", del_by_prefix=True, namespace=_NAMESPACE)


def _store() -> Any:
    # The only store that Ray offers without a process of its own. Ray Serve keeps its state in it.
    return import_module("ray.experimental.internal_kv")


class Replica:
    """The models of one process of the deployment."""

    def __init__(self, spec: ReplicaSpec, agreement: Agreement) -> None:
        if spec.loopback:
            _stay_on_loopback()
        if spec.folder.is_dir():
            os.chdir(spec.folder)
        self._problem: FmgError | None = None
        self._versions: dict[str, int] = {}
        self._adding = asyncio.Lock()
        try:
            self._engine = LocalEngine(_opened(spec, agreement), spec.limits)
            self._loaded = {name: self._engine.facts(name)[_DIGEST] for name in self._engine.names()}
        except FmgError as error:
            # if it were raised here, Ray would restart the replica over and over
            self._problem = error

    async def models(self) -> dict[str, Mapping[str, object]] | FmgError:
        """The facts of every model by its name; the error if they could not be loaded."""
        return self._problem or {name: self._engine.facts(name) for name in self._engine.names()}

    async def add(self, added: _Added) -> tuple[str, Mapping[str, object]] | Exception:
        """Adds an adapter to this replica: the name and the facts of its model, or why it does not fit."""
        return await _told(self._added(added))

    async def generate(self, asked: Asked, added: _Added | None, loaded: object) -> Painted | Exception:
        """The images of a request, or why there are none.

        Args:
            asked: the request.
            added: the adapter of its model, if that was added to the running server.
            loaded: otherwise, sha256 of the adapter that the server started with; None for a model without one.
        """
        return await _told(self._generated(asked, added, loaded))

    async def _added(self, added: _Added) -> tuple[str, Mapping[str, object]]:
        name = await self._engine.add_adapter(added.name, added.run, added.model)
        self._versions[name] = max(added.version, self._versions.get(name, 0))
        return name, self._engine.facts(name)

    async def _generated(self, asked: Asked, added: _Added | None, loaded: object) -> Painted:
        if added is None and self._loaded.get(asked.model) != loaded:
            # a replica that started later has read the run once more
            what = f"The adapter of '{asked.model}' has changed since the server started"
            raise FmgError(what, "Start the server again, or add the adapter: POST /v1/adapters.")
        if added is not None and self._versions.get(asked.model, 0) < added.version:
            # read once, however many requests come for it meanwhile
            async with self._adding:
                if self._versions.get(asked.model, 0) < added.version:
                    await self._catch_up(asked.model, added)
        return await asyncio.wrap_future(self._engine.submit(asked))

    async def _catch_up(self, model: str, added: _Added) -> None:
        """Adds an adapter that another replica has checked."""
        _, facts = await self._added(added)
        if facts[_DIGEST] != added.digest:
            del self._versions[model]
            what = f"The adapter of '{added.run}' has changed since it was added"
            raise FmgError(what, "Add it again: POST /v1/adapters.")


def _opened(spec: ReplicaSpec, agreement: Agreement) -> ServedModels:
    """The models of a replica, once they are those of its siblings.

    Until then it waits and says why: its siblings get all requests. If it failed, Ray would restart it over and over.

    Raises:
        FmgError: they cannot be loaded, and the server has not started yet.
    """
    replica = uuid4().hex
    while True:
        try:
            changed = agreement.differing({named.name: weights_digest(named.target) for named in spec.targets})
            if not changed:
                with ExitStack() as stack:
                    models = open_served(spec.targets, spec.adapters, spec.options, spec.max_adapters, stack, ignore)
                    stack.pop_all()
                agreement.report(replica, "")
                return models
            names = ", ".join(f"'{name}'" for name in changed)
            problem = (
                f"The files of {names} have changed since the server started. Restore them, or restart the server."
            )
        except FmgError as error:
            if not agreement.serving:
                raise
            # clients may see the problem, and the error may name folders
            log.error(str(error))
            problem = "It cannot load the models. See the log of the replica."
        agreement.report(replica, f"A replica waits: {problem}")
        time.sleep(_AGREE_S)


async def _told(work: Awaitable[R]) -> R | Exception:
    """The result of `work`, or the error as a value: a raised one would arrive wrapped in Ray's own."""
    try:
        return await work
    except (FmgError, RefusedError, BusyError) as error:
        return error
    except Exception as error:
        log.exception("Generating failed")
        return FmgError(f"Generating failed: {one_line(error)}", "See the log of the replica.")


class Watch:
    """Checks on its own thread what keeps replicas from starting, and logs it once. A context manager.

    Args:
        agreement: where replicas report it.
        every: seconds between two checks.

    Attributes:
        problems: what was found last.
    """

    def __init__(self, agreement: Agreement, every: float = _HEALTH_S) -> None:
        self.problems: Sequence[str] = ()
        self._seen: dict[tuple[str, str], float] = {}
        self._agreement = agreement
        self._every = every
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fmg-replica-watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._every):
            try:
                reports = self._agreement.reports()
            except Exception:
                # the cluster is stopping, or too busy to answer
                continue
            now = time.monotonic()
            # a report that is not repeated comes from a replica that has ended
            self._seen = {one: self._seen.get(one, now) for one in reports.items()}
            fresh = (text for (_, text), since in self._seen.items() if now - since < _EXPIRES_S)
            found = sorted({text.partition(" ")[2] for text in fresh})
            for problem in found:
                if problem not in self.problems:
                    log.error(problem)
            self.problems = found


class RayEngine:
    """The replicas of a deployment. Implements `Engine`.

    Args:
        handle: the deployment.
        facts: facts of every model by its name.
        most: images that may wait or be generated at once.
        watch: reports what keeps replicas from starting.
    """

    def __init__(self, handle: Any, facts: Mapping[str, Mapping[str, object]], most: int, watch: Watch) -> None:
        self._handle = handle
        self._facts = dict(facts)
        self._loaded = {name: one[_DIGEST] for name, one in facts.items()}
        self._most = most
        self._watch = watch
        self._images = 0
        self._added: dict[str, _Added] = {}
        self._version = 0
        self._adding = asyncio.Lock()
        self._ended: set[object] = set()

    @property
    def queued(self) -> int:
        return self._images

    def names(self) -> list[str]:
        return list(self._facts)

    def facts(self, name: str) -> Mapping[str, object]:
        return self._facts[name]

    def problems(self) -> Sequence[str]:
        return self._watch.problems

    def submit(self, asked: Asked) -> asyncio.Future[Painted]:
        if self._images and self._images + len(asked.seeds) > self._most:
            raise BusyError(1)
        self._images += len(asked.seeds)
        adapter = self._added.get(asked.model), self._loaded.get(asked.model)
        task = asyncio.ensure_future(self._call("generate", asked, *adapter))
        task.add_done_callback(lambda _: self._forget(asked))
        return task

    async def add_adapter(self, name: str, run: str, model: str | None) -> str:
        async with self._adding:
            self._version += 1
            added = _Added(None, name, run, model, self._version)
            served, facts = await self._call("add", added)
            self._facts[served] = facts
            # every later request for the model carries it
            self._added[served] = replace(added, served=served, digest=facts[_DIGEST])
            return str(served)

    def close(self, timeout: float) -> None:
        """Does nothing: the server has answered or given up every accepted request."""

    def _forget(self, asked: Asked) -> None:
        self._images -= len(asked.seeds)

    def _report(self, replica: object) -> None:
        """Logs once that a replica has died."""
        if replica not in self._ended:
            self._ended.add(replica)
            log.error("A replica died; another one generates its images, and Ray starts a new one")

    async def _call(self, method: str, *arguments: object) -> Any:
        """Calls a method of some replica, and of another one if that one dies.

        Raises:
            RefusedError: the second one died, too.
            FmgError, RefusedError, BusyError: the replica's own error.
        """
        from ray.exceptions import RayActorError

        for _ in range(_ATTEMPTS):
            response = getattr(self._handle, method).remote(*arguments)
            try:
                result = await response
            except asyncio.CancelledError:
                response.cancel()
                raise
            except RayActorError as error:
                self._report(error.actor_id)
                continue
            if isinstance(result, Exception):
                raise result
            return result
        raise RefusedError(503, "The replicas that were generating these images died", "Try again.", 1)


def _prepare(scale: Scale) -> None:
    """Sets the environment variables that Ray reads on import, and imports it.

    Raises:
        MissingDependencyError: Ray Serve is not installed.
    """
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_LOG_TO_STDERR": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    if scale.address is None:
        # whoever can reach one of Ray's ports can run code. So only this server and its replicas know the token, and
        # all ports are on loopback, Ray's default on the systems that the variable is named after
        os.environ |= {
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }
    try:
        import ray.serve  # noqa: F401
    except ImportError as error:
        what = f"--engine ray needs Ray Serve: {one_line(error)}"
        raise MissingDependencyError(what, f"Run: {install_line('ray')}") from None


def _stay_on_loopback() -> None:
    """Binds the port that a replica opens for calls between deployments (there are none here) to loopback as well.

    Ray Serve has no option for it. The port needs the token in any case.
    """
    replica: Any = import_module("ray.serve._private.replica")
    if (bind := getattr(replica, "add_port_to_grpc_server", None)) is not None:
        replica.add_port_to_grpc_server = lambda server, address: bind(server, address.replace("[::]", _LOOPBACK))


@contextmanager
def ray_engine(spec: ReplicaSpec, scale: Scale, observer: Observer) -> Iterator[RayEngine]:
    """Starts the replicas and yields their engine; ends them afterwards.

    Args:
        spec: what each serves.
        scale: how many there are.
        observer: receives a notice for each step.

    Raises:
        MissingDependencyError: Ray Serve is not installed.
        UsageError: there is no cluster at the address.
        FmgError: Ray does not start, or the models cannot be loaded.
    """
    if scale.address is not None:
        _check_address(scale.address)
    _prepare(scale)
    import ray
    from ray import serve

    name = f"fmg-{uuid4().hex[:8]}"
    try:
        observer(Notice("info", "Starting Ray" if scale.address is None else f"Connecting to Ray at {scale.address}"))
        _join(ray, scale)
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR", "enable_access_log": False})
        fewest = "" if scale.minimum == scale.maximum else f"{scale.minimum} to "
        observer(Notice("info", f"Loading the models in {fewest}{counted(scale.maximum, 'replica')}"))
        agreement = Agreement(name)
        with Watch(agreement) as watch:
            try:
                with Signals().caught():
                    deployment = _deployment(ray, serve, spec, scale, agreement)
                    handle = serve.run(deployment, name=name, route_prefix=None)
                    facts = handle.models.remote().result(timeout_s=spec.limits.timeout)
            except FmgError:
                raise
            except Exception as error:
                what = f"Ray Serve could not start the replicas: {one_line(error)}"
                raise FmgError(what, "See the logs of Ray, by default in /tmp/ray/session_latest/logs/serve.") from None
            if isinstance(facts, FmgError):
                raise facts
            agreement.serves()
            yield RayEngine(handle, facts, spec.limits.max_queued * scale.maximum, watch)
    finally:
        if ray.is_initialized():
            if scale.address is not None:
                serve.delete(name)
                Agreement(name).end()
            ray.shutdown()


def _check_address(address: str) -> None:
    """Checks that something listens at the address: Ray would retry silently for many minutes.

    Raises:
        UsageError: nothing listens at `HOST:PORT`.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isascii() or not port.isdigit():
        if address == "auto":
            return
        raise UsageError(f"--ray-address {address} is not an address", "Write auto, or HOST:PORT.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as error:
        what = f"No Ray cluster can be reached at {address}: {reason(error)}"
        raise UsageError(what, "Start one with `ray start --head`, or leave --ray-address out.") from None


def _join(ray: Any, scale: Scale) -> None:
    own: dict[str, object] = {
        "address": "local",
        "num_cpus": scale.cpus * scale.maximum,
        "object_store_memory": _OBJECT_STORE_BYTES,
        "include_dashboard": False,
    }
    given: dict[str, object] = {"address": scale.address}
    try:
        ray.init(
            **(own if scale.address is None else given),
            namespace=_NAMESPACE,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except Exception as error:
        where = "on this machine" if scale.address is None else f"at {scale.address}"
        raise FmgError(f"Ray {where} cannot be used: {one_line(error)}", "See the logs in /tmp/ray.") from None
    if threading.current_thread() is threading.main_thread():
        # Ray's own handler aborts the process with a C++ stack trace
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _deployment(ray: Any, serve: Any, spec: ReplicaSpec, scale: Scale, agreement: Agreement) -> Any:
    limits = spec.limits
    number: dict[str, object] = {"num_replicas": scale.minimum}
    if scale.minimum != scale.maximum:
        number = {
            "autoscaling_config": {
                "min_replicas": scale.minimum,
                "max_replicas": scale.maximum,
                # one batch in progress; if more requests wait, Ray adds a replica
                "target_ongoing_requests": limits.max_batch,
            }
        }
    deployment = serve.deployment(Replica).options(
        **number,
        # the replica's own queue refuses requests
        max_ongoing_requests=2 * limits.max_queued,
        health_check_period_s=_HEALTH_S,
        graceful_shutdown_timeout_s=scale.drain,
        ray_actor_options={
            "num_cpus": scale.cpus,
            "num_gpus": int(scale.gpu and ray.cluster_resources().get("GPU", 0) > 0),
        },
    )
    return deployment.bind(spec, agreement)
