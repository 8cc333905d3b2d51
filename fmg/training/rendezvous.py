"""Meeting the other processes of a run, and parting from them, in order or not."""

from __future__ import annotations

import itertools
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from fmg.core.errors import FmgError, GateError, ProcessError, out_of_memory
from fmg.core.events import Notice, Observer
from fmg.core.signals import Signals
from fmg.training.heartbeat import Heartbeat
from fmg.training.launch import Launch
from fmg.training.processes import Processes

JOIN_TIMEOUT = timedelta(minutes=5)
"""How long a process waits for the others to come."""
_STEP_TIMEOUT = timedelta(minutes=30)
"""How long a collective operation may take; a process that is gone is noticed much sooner."""
_MEETINGS = itertools.count()
"""Numbers the runs of this process: a launcher's store outlives them, and what one wrote must not reach the next."""
_GRACE = 5.0
"""Seconds in which the main thread may notice by itself that a process is gone, before this one is ended."""
_FIX = "Read what that process printed last (a killed one may have run out of memory), and start the run again."


@contextmanager
def joined(
    launch: Launch, device: torch.device, observer: Observer, on_abort: Callable[[], None], signals: Signals
) -> Iterator[Processes]:
    """The processes of a run for the length of the body, which all of them leave together.

    When another process ends inside, this one ends too: with a `ProcessError` where an operation breaks off, else, when
    it hangs in one that cannot be broken off, by telling the observer and leaving the interpreter with exit code 1.

    Args:
        launch: this process; one that is alone meets nobody.
        device: where it computes.
        observer: hears an error of level `error` before a hard end.
        on_abort: called before a hard end.
        signals: those that ask the run to end; of several processes all stop where they agree on it.

    Raises:
        ProcessError: the others do not come, or one of them ended.
    """
    if launch.alone:
        yield Processes(signals=signals)
        return
    store = _meet(launch, device)
    processes = Processes(launch.rank, launch.count, device, signals)
    over = threading.Event()

    def end(verdict: str) -> None:
        if not over.wait(_GRACE):
            observer(Notice("error", str(ProcessError(verdict, _FIX))))
            on_abort()
            os._exit(ProcessError.exit_code)

    heartbeat = Heartbeat(store, launch.rank, launch.count, end)
    heartbeat.start()
    signals.at_once = False
    try:
        with warnings.catch_warnings():
            # nothing here writes in place into what a network returns
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
            yield processes
    except BaseException as error:
        over.set()
        heartbeat.stop()
        lost = heartbeat.diagnose() if _is_broken_link(error) else None
        heartbeat.leave(f"Process {launch.rank} of {launch.count} (counted from 0) stopped: {_first_line(error)}")
        if isinstance(error, GateError):
            # gates decide from numbers that all processes share
            error.reported = not processes.first
        if lost is not None:
            raise ProcessError(lost, _FIX) from error
        if isinstance(error, FmgError):
            # the next run of this interpreter meets anew
            dist.destroy_process_group()
        raise
    heartbeat.stop()
    over.set()
    heartbeat.leave()
    # the store goes away with the process that keeps it
    dist.barrier()
    dist.destroy_process_group()


def _meet(launch: Launch, device: torch.device) -> Store:
    try:
        store, _, _ = next(rendezvous("env://", launch.rank, launch.count, timeout=JOIN_TIMEOUT))
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
            world_size=launch.count,
            timeout=_STEP_TIMEOUT,
        )
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ProcessError(
            f"The {launch.count} processes of the run do not come together at {address}: {_first_line(error)}",
            "Start as many as WORLD_SIZE says, with different RANKs and a MASTER_PORT that is free.",
        ) from error
    # a client of its own: the thread that watches may not wait behind an operation of this one
    return PrefixStore(f"{prefix}-heartbeat", store.clone())


def _is_broken_link(error: BaseException) -> bool:
    """Whether an error may come from an operation that another process broke off."""
    return isinstance(error, RuntimeError) and out_of_memory(error) is None


def _first_line(error: BaseException) -> str:
    if isinstance(error, FmgError):
        return error.what
    text = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
