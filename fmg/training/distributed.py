"""What the processes of a run do together: connect, share rows, exchange values and errors, and detect a lost process.

A single process sends nothing and copies nothing: every collective returns its argument. Several processes make the
same calls in the same order with the same shapes.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn import Parameter

from fmg.core import errors
from fmg.core import metric_keys as keys
from fmg.core.errors import FmgError, GateError, ProcessError, out_of_memory
from fmg.core.events import Notice, Observer
from fmg.core.signals import Interruption, Signals
from fmg.training.launch import Launch

T = TypeVar("T")

JOIN_TIMEOUT = timedelta(minutes=5)
"""How long a process waits for the others to connect."""
BEAT = 1.0
"""Seconds between two heartbeats."""
PATIENCE = 30.0
"""Seconds without a heartbeat after which a process counts as lost."""

# Bytes of gradients that travel together: large enough for the bandwidth, small beside a model.
_BUCKET = 2**26
# A collective may take this long; a lost process is noticed much sooner.
_STEP_TIMEOUT = timedelta(minutes=30)
# Numbers the runs of this interpreter: a launcher's store outlives them, and no run may read what another wrote.
_MEETINGS = itertools.count()
# Seconds in which the main thread may notice a lost process by itself, before the watching thread ends this one.
_GRACE = 5.0
_VERDICT = "verdict"
_FIX = "Read what that process printed last (a killed one may have run out of memory), and start the run again."


class _Rows(Protocol):
    """Anything with rows: a batch, or conditioning."""

    def __len__(self) -> int: ...

    def select(self, rows: Int[Tensor, " k"], /) -> Any:
        """The given rows."""


Rows = TypeVar("Rows", bound=_Rows)


@dataclass(frozen=True)
class Shard:
    """The rows of `total` that one of `world_size` processes works on: consecutive, in whole calls of `unit` rows.

    A single process makes calls of `unit` rows and a shorter last one. Each of several makes some of the same calls
    with the same rows, so that their joint result is rounded alike. All make the same number of calls: a process that
    has none left repeats the last row.
    """

    total: int
    rank: int = 0
    world_size: int = 1
    unit: int = 1

    @property
    def calls(self) -> int:
        """Forward passes of each process."""
        return -(-self.total // (self.unit * self.world_size))

    @property
    def size(self) -> int:
        """The maximum number of rows in the calls of a process."""
        return self.calls * self.unit

    @property
    def length(self) -> int:
        """Rows of this process, without padding."""
        return max(0, min(self.size, self.total - self.rank * self.size))

    @property
    def rows(self) -> Int[Tensor, " k"]:
        """Row indices: `length` rows of this process, then padding up to the number of calls."""
        start = self.rank * self.size
        complete = -(-self.length // self.unit) == self.calls
        wanted = self.length if complete else (self.calls - 1) * self.unit + 1
        return torch.arange(start, start + wanted).clamp_(max=self.total - 1)


@dataclass
class DistContext:
    """This process and its place among those of a run.

    Attributes:
        rank: 0 for the main process, which writes and reports.
        world_size: number of processes.
        device: where the tensors of collectives live.
        signals: signals that ask the run to end.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    signals: Signals = field(default_factory=Signals)

    @property
    def is_distributed(self) -> bool:
        return self.world_size > 1

    @property
    def is_main_process(self) -> bool:
        return self.rank == 0

    def shard_of(self, total: int, unit: int = 1) -> Shard:
        """This process's share of `total` rows that pass through the network `unit` at a time."""
        return Shard(total, self.rank, self.world_size, unit)

    def shard(self, whole: Rows, unit: int = 1) -> Rows:
        """This process's share of the rows of `whole`; `whole` itself for a single process."""
        if not self.is_distributed:
            return whole
        picked: Rows = whole.select(self.shard_of(len(whole), unit).rows)
        return picked

    def gather(self, local: Tensor, total: int, unit: int = 1) -> Tensor:
        """All `total` rows in order, on the device of `local`.

        Args:
            local: the `Shard.rows` of this process: (k, ...).
            total: rows of all processes.
            unit: as in `shard_of`.
        """
        if not self.is_distributed:
            return local
        # every process sends equally many
        padding = self.shard_of(total, unit).size - len(local)
        padded = torch.cat([local, local[-1:].expand(padding, *local.shape[1:])])
        # some backends cannot send booleans
        sent = padded.contiguous().to(torch.uint8 if local.dtype == torch.bool else local.dtype)
        everyone = sent.new_empty((self.world_size * len(sent), *sent.shape[1:]))
        dist.all_gather(list(everyone.chunk(self.world_size)), sent)
        return everyone[:total].to(local.dtype)

    def sum_gradients(self, parameters: Sequence[Parameter]) -> None:
        """Replaces every gradient by its sum over the processes, which then have the same bits."""
        if not self.is_distributed:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            dist.all_reduce(flat)
            for gradient, summed in zip(bucket, torch.split(flat, [x.numel() for x in bucket]), strict=True):
                gradient.copy_(summed.view_as(gradient))

    def reduce(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums over the processes, and maxima for keys that end in `_max`. All processes pass the same keys."""
        if not self.is_distributed:
            return dict(values)
        local = torch.tensor(list(values.values()), dtype=torch.float64)
        columns = self.gather(local[None], self.world_size).T
        return {
            key: float(column.max()) if key.endswith(keys.MAX) else float(column.sum())
            for key, column in zip(values, columns, strict=True)
        }

    def max(self, value: float) -> float:
        """The largest value of any process; NaN if any is NaN."""
        return self.reduce({keys.MAX: value})[keys.MAX]

    def run_on_all(self, work: Callable[[], T]) -> T:
        """Runs `work` in every process. When it fails in some, all raise the error of the lowest rank among them."""
        if not self.is_distributed:
            return work()
        result: list[T] = []
        failure = ""
        try:
            result.append(work())
        except FmgError as error:
            failure = _packed(error)
        self._raise_agreed(next(filter(None, self.gather_texts(failure)), ""))
        return result[0]

    def run_on_main(self, work: Callable[[], str | None]) -> str:
        """Runs `work` in the main process only. All get its text (empty for None), or raise its error."""
        if not self.is_distributed:
            return work() or ""
        text, failure = "", ""
        if self.is_main_process:
            try:
                text = work() or ""
            except (FmgError, OSError) as error:
                failure = _packed(error)
        self._raise_agreed(self.gather_texts(failure)[0])
        return self.gather_texts(text)[0]

    def main_process_first(self, work: Callable[[], T]) -> T:
        """Runs `work` in the main process, then in the others, so that they find its cached result."""
        if not self.is_distributed:
            return work()
        done = self.run_on_all(lambda: [work()] if self.is_main_process else [])
        return self.run_on_all(lambda: done[0] if done else work())

    def gather_texts(self, text: str) -> list[str]:
        """The text of every process, by rank. Sent as bytes: nothing that arrives is ever unpickled."""
        if not self.is_distributed:
            return [text]
        data = torch.tensor(list(text.encode()), dtype=torch.uint8)
        lengths = self.gather(torch.tensor([len(data)]), self.world_size).tolist()
        padded = torch.cat([data, data.new_zeros(max(1, *lengths) - len(data))])
        everyone = self.gather(padded[None], self.world_size)
        return [bytes(row[:length].tolist()).decode() for row, length in zip(everyone, lengths, strict=True)]

    def check_stop(self) -> None:
        """Raises `Interruption` in every process once a signal has asked any of them to stop."""
        if self.is_distributed and (asked := int(self.max(float(self.signals.asked)))):
            raise Interruption(asked)

    def _raise_agreed(self, packed: str) -> None:
        if packed:
            error = _unpacked(packed)
            if isinstance(error, FmgError):
                error.reported = not self.is_main_process
            raise error


def _packed(error: FmgError | OSError) -> str:
    if isinstance(error, FmgError):
        return json.dumps([type(error).__name__, error.what, error.fix])
    return json.dumps(["", error.errno, error.strerror])


def _unpacked(text: str) -> FmgError | OSError:
    name, what, fix = json.loads(text)
    if not name:
        return OSError(what, fix)
    kind = getattr(errors, name, FmgError)
    return kind(what, fix)


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive tensors of one dtype that together fill a bucket."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        full = sum(x.nbytes for x in bucket) >= _BUCKET
        if bucket and (full or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


@contextmanager
def dist_context(
    launch: Launch, device: torch.device, observer: Observer, on_abort: Callable[[], None], signals: Signals
) -> Iterator[DistContext]:
    """Connects the processes of a run for the length of the body, which all of them leave together.

    When another process dies meanwhile, this one ends too: with a `ProcessError` if an operation fails; if it hangs in
    one that cannot be interrupted, it tells the observer and exits the interpreter with code 1.

    Args:
        launch: this process; a single one connects to nothing.
        device: where it computes.
        observer: receives a notice of level `error` before a hard exit.
        on_abort: called before a hard exit.
        signals: signals that ask the run to end; several processes stop where they agree on it.

    Raises:
        ProcessError: the others do not connect, or one of them died.
    """
    if not launch.is_distributed:
        yield DistContext(signals=signals)
        return
    store = _connect(launch, device)
    context = DistContext(launch.rank, launch.world_size, device, signals)
    over = threading.Event()

    def end(verdict: str) -> None:
        if not over.wait(_GRACE):
            observer(Notice("error", str(ProcessError(verdict, _FIX))))
            on_abort()
            os._exit(ProcessError.exit_code)

    heartbeat = Heartbeat(store, launch.rank, launch.world_size, end)
    heartbeat.start()
    signals.at_once = False
    try:
        with warnings.catch_warnings():
            # nothing here writes in place into what a network returns
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
            yield context
    except BaseException as error:
        over.set()
        heartbeat.stop()
        lost = heartbeat.diagnose() if _is_broken_link(error) else None
        heartbeat.leave(f"{_process(launch.rank, launch.world_size)} stopped: {_first_line(error)}")
        if isinstance(error, GateError):
            # gates decide from numbers that all processes share
            error.reported = not context.is_main_process
        if lost is not None:
            raise ProcessError(lost, _FIX) from error
        if isinstance(error, FmgError):
            # the next run of this interpreter connects anew
            dist.destroy_process_group()
        raise
    heartbeat.stop()
    over.set()
    heartbeat.leave()
    # the store goes away with the process that keeps it
    dist.barrier()
    dist.destroy_process_group()


def _connect(launch: Launch, device: torch.device) -> Store:
    try:
        store, _, _ = next(rendezvous("env://", launch.rank, launch.world_size, timeout=JOIN_TIMEOUT))
        store.set_timeout(JOIN_TIMEOUT)
        prefix = f"fmg-{next(_MEETINGS)}"
        backend = "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
            # scores and texts are exchanged on the CPU
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(
            backend,
            store=PrefixStore(f"{prefix}-group", store),
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=_STEP_TIMEOUT,
        )
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ProcessError(
            f"The {launch.world_size} processes of the run cannot connect at {address}: {_first_line(error)}",
            "Start as many processes as WORLD_SIZE says, with different RANKs and a free MASTER_PORT.",
        ) from error
    # a client of its own: the watching thread must not wait behind an operation of this one
    return PrefixStore(f"{prefix}-heartbeat", store.clone())


def _is_broken_link(error: BaseException) -> bool:
    """Whether an error may come from an operation that another process aborted."""
    return isinstance(error, RuntimeError) and out_of_memory(error) is None


def _first_line(error: BaseException) -> str:
    if isinstance(error, FmgError):
        return error.what
    text = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _process(rank: int, world_size: int) -> str:
    return f"Process {rank} of {world_size} (counted from 0)"


class Store(Protocol):
    """The part of `torch.distributed.Store` that heartbeats need."""

    def add(self, key: str, value: int, /) -> int: ...

    def set(self, key: str, value: str, /) -> None: ...

    def get(self, key: str, /) -> bytes: ...

    def check(self, keys: list[str], /) -> bool: ...


class Heartbeat:
    """A thread that shows the others that this process is alive, and notices when one of them dies.

    A killed process cannot report its end, and a plain launcher leaves the survivors running
    (docs/adr/0021-lost-processes.md). Each process increments a counter in the store that they connected through. The
    main process watches all others, they watch the main one, and the first to notice a loss leaves the verdict there.

    Args:
        store: shared by all processes; used by the thread alone once it has started.
        rank: rank of this process.
        world_size: number of processes.
        on_lost: called in the thread, once, with a sentence that says which process died and how.
        beat: seconds between two heartbeats.
        patience: seconds without a heartbeat after which a process counts as lost.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        on_lost: Callable[[str], None],
        *,
        beat: float = BEAT,
        patience: float = PATIENCE,
    ) -> None:
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._on_lost = on_lost
        self._beat = beat
        self._patience = patience
        self._stopped = threading.Event()
        self._seen: dict[int, tuple[int, int]] = {}
        self._thread = threading.Thread(target=self._watch, name="fmg-heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread, which leaves the store to the caller."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def leave(self, last_words: str | None = None) -> None:
        """Tells the others, after `stop`, that this process is done, or with `last_words` why it failed."""
        try:
            if last_words is None:
                self._store.add(f"done/{self._rank}", 1)
            elif not self._store.check([_VERDICT]):
                self._store.set(_VERDICT, last_words)
                # they check once per heartbeat, and the store goes away with the process that keeps it
                time.sleep(2 * self._beat)
        except Exception:
            # the store is gone: the others have ended, or know already
            return

    def diagnose(self) -> str | None:
        """Which process died, after a connection broke: the verdict, or the process that was silent for a few beats.

        Only after `stop`.
        """
        peers = [rank for rank in range(self._world_size) if rank != self._rank]
        try:
            before = {rank: self._store.add(f"beat/{rank}", 0) for rank in peers}
            for _ in range(4):
                time.sleep(self._beat)
                if self._store.check([_VERDICT]):
                    return self._store.get(_VERDICT).decode()
            silent = [rank for rank in peers if self._store.add(f"beat/{rank}", 0) == before[rank]]
        except Exception:
            return self._died(0)
        return self._died(silent[0]) if silent else None

    def _watch(self) -> None:
        watched = range(1, self._world_size) if self._rank == 0 else (0,)
        while not self._stopped.wait(self._beat):
            try:
                verdict = self._look(watched)
            except Exception:
                # the main process keeps the store
                verdict = self._died(0)
            if verdict is not None and not self._stopped.is_set():
                self._on_lost(verdict)
                return

    def _look(self, watched: Sequence[int]) -> str | None:
        self._store.add(f"beat/{self._rank}", 1)
        if self._store.check([_VERDICT]):
            return self._store.get(_VERDICT).decode()
        for rank in watched:
            if self._is_silent(rank) and not self._store.add(f"done/{rank}", 0):
                verdict = self._died(rank)
                self._store.set(_VERDICT, verdict)
                return verdict
        return None

    def _is_silent(self, rank: int) -> bool:
        # counted in checks, not in seconds: a machine that was suspended has lost no process
        beats = self._store.add(f"beat/{rank}", 0)
        before, looks = self._seen.get(rank, (-1, 0))
        self._seen[rank] = (beats, looks + 1 if beats == before else 0)
        return self._seen[rank][1] * self._beat > self._patience

    def _died(self, rank: int) -> str:
        return f"{_process(rank, self._world_size)} died without reporting an error"
