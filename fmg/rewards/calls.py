"""Calls to rewards on other machines: every attempt has a deadline, retries are counted, failures have a policy."""

from __future__ import annotations

import http.client
import math
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TypeVar
from urllib.parse import urlsplit

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from fmg.core.errors import RewardError, one_line
from fmg.core.json_io import parse
from fmg.core.types import PartialRewardOutput, RewardOutput
from fmg.rewards.configs import CallConfig, OnFailure

T = TypeVar("T")

_MAX_ANSWER = 64 << 20
_CHUNK = 1 << 16
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
# Spreads the retries of many clients that failed together, without touching the random generators of a run.
_jitter = random.Random()


class Reply(BaseModel):
    """What is read of a server's answer; other keys are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class CallError(Exception):
    """One attempt failed.

    Args:
        reason: what happened, one clause.
        passing: whether the failure is temporary, so that another attempt may succeed.
        retry_after: seconds that the server asks the client to wait.
    """

    def __init__(self, reason: str, *, passing: bool, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.passing = passing
        self.retry_after = retry_after


@dataclass(frozen=True)
class RetryPolicy:
    """How often to try, and how long to wait between attempts.

    Attributes:
        retries: attempts after the first.
        backoff: seconds before the second attempt; doubles every time, minus up to half at random.
        max_backoff: longest wait, even if the server asks for more.
    """

    retries: int
    backoff: float
    max_backoff: float

    def run(self, attempt: Callable[[], T], sleep: Callable[[float], None] = time.sleep) -> T:
        """The result of the first attempt that does not raise a temporary `CallError`.

        Raises:
            CallError: the last one, when no attempt is left or the failure is not temporary.
        """
        for number in range(self.retries + 1):
            try:
                return attempt()
            except CallError as error:
                if not error.passing or number == self.retries:
                    raise
                sleep(self._wait(number, error.retry_after))
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _wait(self, number: int, retry_after: float | None) -> float:
        wait = self.backoff * 2.0**number * _jitter.uniform(0.5, 1.0)
        return min(max(wait, retry_after or 0.0), self.max_backoff)


@dataclass(frozen=True)
class Server:
    """An HTTP server and how to talk to it. Proxy settings of the environment are not used.

    Attributes:
        url: address, with a path prefix if it has one.
        timeout: seconds that one call may take, from connecting to the last byte.
        token: sent as a bearer token; never part of a message.
    """

    url: str
    timeout: float
    token: str | None = field(default=None, repr=False)

    def get_json(self, path: str) -> object:
        """The JSON answer to a GET.

        Raises:
            CallError: as `post`.
        """
        return _json(self._call("GET", path, None, {}))

    def post_json(self, path: str, body: bytes, content_type: str = "application/json") -> object:
        """The JSON answer to a POST.

        Raises:
            CallError: no connection, no answer in time, a status other than 200, or an answer that is not JSON.
        """
        return _json(self._call("POST", path, body, {"Content-Type": content_type}))

    def _call(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> bytes:
        parts = urlsplit(self.url)
        deadline = time.monotonic() + self.timeout
        connection = self._connection(parts.scheme, parts.hostname or "", parts.port)
        authorised = {**headers, **({"Authorization": f"Bearer {self.token}"} if self.token else {})}
        try:
            connection.connect()
            with _hanging_up(connection.sock, deadline):
                connection.request(method, parts.path + path, body=body, headers=authorised)
                answer = connection.getresponse()
                content = _read(answer)
            if answer.status != http.client.OK:
                raise self._status_error(answer.status, answer.getheader("Retry-After"), content)
            return content
        except (OSError, http.client.HTTPException) as error:
            late = time.monotonic() >= deadline or isinstance(error, TimeoutError)
            reason = f"no answer within {self.timeout:g} s" if late else _describe(error)
            raise CallError(reason, passing=not isinstance(error, ssl.SSLCertVerificationError)) from error
        finally:
            connection.close()

    def _status_error(self, status: int, retry_after: str | None, content: bytes) -> CallError:
        wait = float(retry_after) if retry_after and retry_after.isascii() and retry_after.isdigit() else None
        detail = _detail(content)
        # some endpoints repeat the key they refuse
        shown = detail.replace(self.token, "***") if self.token else detail
        reason = f"status {status}" + (f": {shown}" if shown else "")
        return CallError(reason, passing=status in _PASSING, retry_after=wait)

    def _connection(self, scheme: str, host: str, port: int | None) -> http.client.HTTPConnection:
        if scheme == "https":
            return http.client.HTTPSConnection(host, port, timeout=self.timeout, context=ssl.create_default_context())
        return http.client.HTTPConnection(host, port, timeout=self.timeout)


@contextmanager
def _hanging_up(sock: socket.socket, deadline: float) -> Iterator[None]:
    """Cuts the connection at `deadline`: a socket timeout bounds a single read, not an answer that trickles in."""

    def cut() -> None:
        with suppress(OSError):
            # the plain method: that of a TLS socket drops its state during a read
            socket.socket.shutdown(sock, socket.SHUT_RDWR)

    watch = threading.Timer(max(0.0, deadline - time.monotonic()), cut)
    watch.daemon = True
    watch.start()
    try:
        yield
    finally:
        watch.cancel()


def _read(answer: http.client.HTTPResponse) -> bytes:
    content = bytearray()
    while chunk := answer.read(_CHUNK):
        content += chunk
        if len(content) > _MAX_ANSWER:
            raise CallError(f"an answer of more than {_MAX_ANSWER >> 20} MiB", passing=False)
    if answer.length:
        raise http.client.IncompleteRead(bytes(content), answer.length)
    return bytes(content)


def _detail(content: bytes) -> str:
    """The server's error message, in the format of fmg or of OpenAI-compatible endpoints."""
    try:
        answer = parse(content)
    except ValueError:
        return ""
    error = answer.get("error") if isinstance(answer, dict) else None
    if isinstance(error, dict):
        texts = [error.get(key) for key in ("what", "fix", "message")]
        return " ".join(" ".join(text.split()) for text in texts if isinstance(text, str))[:300]
    return " ".join(error.split())[:300] if isinstance(error, str) else ""


def _json(content: bytes) -> object:
    try:
        return parse(content)
    except ValueError:
        raise CallError("an answer that is not JSON", passing=True) from None


def _describe(error: BaseException) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "the connection was refused"
    if isinstance(error, ConnectionError | http.client.RemoteDisconnected | http.client.IncompleteRead):
        return "the connection was lost"
    return one_line(error)


Chunk = tuple[slice, Callable[[], RewardOutput]]
"""Rows of a batch, and the call that scores them."""


class FailurePolicy:
    """How a batch is treated if some images have no score.

    Args:
        name: name of the reward, for messages.
        on_failure: stop the run, or leave these images out.
        patience: consecutive batches without any score after which the run stops anyway.
        advice: one sentence on what to do.
    """

    def __init__(self, name: str, on_failure: OnFailure, patience: int, advice: str) -> None:
        self._name = name
        self._on_failure = on_failure
        self._patience = patience
        self._advice = advice
        self._fruitless = 0

    def join(self, results: Sequence[tuple[slice, RewardOutput | CallError]], prompts: Sequence[str]) -> RewardOutput:
        """The scores of a batch, from those of its parts, which cover its rows.

        Raises:
            RewardError: names a prompt. With `stop`: a part has no score. With `drop-group`: a part failed in a way
                that another attempt cannot fix, or `patience` consecutive batches got no score.
        """
        failed = [(rows, result) for rows, result in results if isinstance(result, CallError)]
        outputs = [(rows, result) for rows, result in results if isinstance(result, RewardOutput)]
        self._fruitless = 0 if outputs or not results else self._fruitless + 1
        for rows, error in failed:
            hopeless = self._fruitless >= self._patience
            if self._on_failure == "stop" or not error.passing or hopeless:
                prompt = prompts[rows.start]
                raise RewardError(
                    f"The reward '{self._name}' has no score for the prompt '{prompt}': {error.reason}", self._advice
                )
        return _joined(outputs, len(prompts))


class Caller:
    """Makes the calls of a reward and applies its failure policy.

    Args:
        name: name of the reward, for messages.
        config: bounds and policy.
        advice: one sentence on what to do when calls fail.
    """

    def __init__(self, name: str, config: CallConfig, advice: str) -> None:
        self._name = name
        self._config = config
        self._policy = FailurePolicy(name, config.on_failure, config.patience, advice)
        self._retry = RetryPolicy(config.retries, config.backoff, config.max_backoff)

    def once(self, call: Callable[[], T]) -> T:
        """The result of one call, retried, whatever the policy.

        Raises:
            CallError: when every attempt failed.
        """
        return self._retry.run(call)

    def gather(self, chunks: Sequence[Chunk], prompts: Sequence[str]) -> RewardOutput:
        """The scores of all chunks, which cover the rows of a batch; each chunk is scored by one call.

        Raises:
            RewardError: as `FailurePolicy.join`.
        """
        results = self._run([call for _, call in chunks])
        return self._policy.join(list(zip([rows for rows, _ in chunks], results, strict=True)), prompts)

    def _run(self, calls: Sequence[Callable[[], RewardOutput]]) -> list[RewardOutput | CallError]:
        cancelled = threading.Event()

        def nap(seconds: float) -> None:
            if cancelled.wait(seconds):
                raise CallError("cancelled", passing=False)

        def attempt(call: Callable[[], RewardOutput]) -> RewardOutput | CallError:
            try:
                return self._retry.run(call, nap)
            except CallError as error:
                return error

        pool = ThreadPoolExecutor(self._config.concurrency, thread_name_prefix=f"fmg-{self._name}")
        try:
            return list(pool.map(attempt, calls))
        finally:
            # after Ctrl-C nothing waits for an unfinished call
            cancelled.set()
            pool.shutdown(wait=False, cancel_futures=True)


def _joined(outputs: Sequence[tuple[slice, RewardOutput]], count: int) -> RewardOutput:
    total = torch.full((count,), math.nan)
    scored = torch.zeros(count, dtype=torch.bool)
    parts: dict[str, Tensor] = {}
    for rows, output in outputs:
        total[rows], scored[rows] = output.total, True
        for part, values in output.parts.items():
            parts.setdefault(part, torch.full((count,), math.nan))[rows] = values
    return RewardOutput(total, parts) if bool(scored.all()) else PartialRewardOutput(total, parts, scored)
