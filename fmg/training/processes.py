"""What the processes of a run do together. For one process alone everything here does nothing, and copies nothing.

Every method that communicates is called by all processes in the same order with the same shapes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor
from torch.nn import Parameter

from fmg.core import errors
from fmg.core.errors import FmgError
from fmg.core.signals import Interruption, Signals

T = TypeVar("T")

# Bytes of gradients that travel together: large enough for the bandwidth, small beside a model.
_BUCKET = 2**26


class _Rows(Protocol):
    """Anything with rows: a batch, or conditioning."""

    def __len__(self) -> int: ...

    def select(self, rows: Int[Tensor, " k"], /) -> Any:
        """The given rows."""


Rows = TypeVar("Rows", bound=_Rows)


@dataclass(frozen=True)
class Share:
    """The rows of `total` that one of `count` processes works on: consecutive, in whole calls of `unit` rows.

    One process alone makes calls of `unit` rows and a shorter last one. Each of several makes some of the same calls,
    with the same rows, so that what they compute together has the same rounding. All make as many: one that has no
    call left makes it with the last row of all.
    """

    total: int
    rank: int = 0
    count: int = 1
    unit: int = 1

    @property
    def calls(self) -> int:
        """Network calls of each process."""
        return -(-self.total // (self.unit * self.count))

    @property
    def size(self) -> int:
        """Rows that the calls of a process hold at most."""
        return self.calls * self.unit

    @property
    def own(self) -> int:
        """Rows of this process without those that fill up."""
        return max(0, min(self.size, self.total - self.rank * self.size))

    @property
    def rows(self) -> Int[Tensor, " k"]:
        """Indices of the rows; the first `own` are this process's, the others make up the number of calls."""
        start = self.rank * self.size
        complete = -(-self.own // self.unit) == self.calls
        wanted = self.own if complete else (self.calls - 1) * self.unit + 1
        return torch.arange(start, start + wanted).clamp_(max=self.total - 1)


@dataclass
class Processes:
    """This process among those of a run.

    Attributes:
        rank: 0 for the process that writes and reports.
        count: number of processes.
        device: where tensors of collective operations live.
        signals: those that ask the run to end.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    signals: Signals = field(default_factory=Signals)

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.count == 1

    @property
    def first(self) -> bool:
        """Whether this one writes and reports."""
        return self.rank == 0

    def share(self, total: int, unit: int = 1) -> Share:
        """This process's share of `total` rows that go through the network `unit` at a time."""
        return Share(total, self.rank, self.count, unit)

    def own(self, whole: Rows, unit: int = 1) -> Rows:
        """This process's share of the rows of `whole`; `whole` itself for one process."""
        if self.alone:
            return whole
        picked: Rows = whole.select(self.share(len(whole), unit).rows)
        return picked

    def gather(self, own: Tensor, total: int, unit: int = 1) -> Tensor:
        """The `total` rows of which every process holds its share, in order, where `own` is.

        Args:
            own: this process's `Share.rows` of them: (k, ...).
            total: rows of all.
            unit: as in `share`.
        """
        if self.alone:
            return own
        # every process sends as many
        filled = torch.cat([own, own[-1:].expand(self.share(total, unit).size - len(own), *own.shape[1:])])
        # not every backend knows truth values
        sent = filled.contiguous().to(torch.uint8 if own.dtype == torch.bool else own.dtype)
        everyone = sent.new_empty((self.count * len(sent), *sent.shape[1:]))
        dist.all_gather(list(everyone.chunk(self.count)), sent)
        return everyone[:total].to(own.dtype)

    def sum_gradients(self, parameters: Sequence[Parameter]) -> None:
        """Replaces every gradient by its sum over the processes, which then hold the same bits."""
        if self.alone:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            dist.all_reduce(flat)
            for gradient, summed in zip(bucket, torch.split(flat, [x.numel() for x in bucket]), strict=True):
                gradient.copy_(summed.view_as(gradient))

    def combine(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums over the processes, and maxima for keys that end in `_max`; the keys are the same everywhere."""
        if self.alone:
            return dict(values)
        own = torch.tensor(list(values.values()), dtype=torch.float64)
        columns = self.gather(own[None], self.count).T
        return {
            key: float(column.max()) if key.endswith("_max") else float(column.sum())
            for key, column in zip(values, columns, strict=True)
        }

    def largest(self, value: float) -> float:
        """The largest value of any process; NaN when one is."""
        return self.combine({"_max": value})["_max"]

    def together(self, work: Callable[[], T]) -> T:
        """Runs `work` in every process; when it fails in one, all raise the error of the lowest rank that has one."""
        if self.alone:
            return work()
        result: list[T] = []
        failure = ""
        try:
            result.append(work())
        except FmgError as error:
            failure = _packed(error)
        self._raise_agreed(next(filter(None, self.texts(failure)), ""))
        return result[0]

    def on_first(self, work: Callable[[], str | None]) -> str:
        """Runs `work` in the first process alone; all get its text (empty for None), or raise its error."""
        if self.alone:
            return work() or ""
        text, failure = "", ""
        if self.first:
            try:
                text = work() or ""
            except (FmgError, OSError) as error:
                failure = _packed(error)
        self._raise_agreed(self.texts(failure)[0])
        return self.texts(text)[0]

    def first_goes_ahead(self, work: Callable[[], T]) -> T:
        """Runs `work` in the first process, then in the others, so that what it caches is made once."""
        if self.alone:
            return work()
        ahead = self.together(lambda: [work()] if self.first else [])
        return self.together(lambda: ahead[0] if ahead else work())

    def texts(self, text: str) -> list[str]:
        """The text of every process, by rank. Sent as bytes: nothing that is received is ever unpickled."""
        if self.alone:
            return [text]
        data = torch.tensor(list(text.encode()), dtype=torch.uint8)
        lengths = self.gather(torch.tensor([len(data)]), self.count).tolist()
        padded = torch.cat([data, data.new_zeros(max(1, *lengths) - len(data))])
        everyone = self.gather(padded[None], self.count)
        return [bytes(row[:length].tolist()).decode() for row, length in zip(everyone, lengths, strict=True)]

    def check_stop(self) -> None:
        """Raises `Interruption` in every process when a signal has asked one to stop since."""
        if not self.alone and (asked := int(self.largest(float(self.signals.asked)))):
            raise Interruption(asked)

    def _raise_agreed(self, packed: str) -> None:
        if packed:
            error = _unpacked(packed)
            if isinstance(error, FmgError):
                error.reported = not self.first
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
    """Neighbours of one dtype that together fill a bucket."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        full = sum(x.nbytes for x in bucket) >= _BUCKET
        if bucket and (full or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket
