"""Load on `fmg serve` from a second process: throughput and latency against the bare backend, overload, memory.

    python benchmarks/serve.py [--target meanflow-shapes] [--clients 32] [--seconds 20] [--batch 16] [--out FILE]

Four things are measured, in rounds that take turns, because other work on a machine changes from minute to minute:

- `direct`: batches of the full size, generated in a loop by a process of its own.
- `one`: closed-loop clients of a server with `--batch-size 1`.
- `batched`: the same clients of a server with `--batch-size N`.
- `overload`: clients that send five times what the server answers, without waiting for answers.

Models compute on one CPU thread. Every image is compared with the one that its seed gives alone. CPU seconds per image
depend less on other work than images per second do, so both are reported.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray
from PIL import Image

from fmg.core.machine import machine

PROMPTS = [
    f"a {color} {shape} {place}"
    for color in ("red", "blue")
    for shape in ("circle", "star")
    for place in ("left", "top")
]
SEEDS = 64
# the server closes a connection that has been idle for five seconds
KEPT_S = 3.0
# connections of the clients that do not wait; what they cannot send is counted
MOST_OPEN = 1000
RESULTS = Path(__file__).parent / "results" / "serve.json"

DIRECT = """
import json, sys, time
from fmg import load
target, batch, seconds, prompts, seeds = json.loads(sys.argv[1])
with load(target, device="cpu", batch_size=batch, threads=1) as generator:
    work = [(prompt, seed) for prompt in prompts for seed in range(seeds)]
    def batches():
        while True:
            for start in range(0, len(work) - batch + 1, batch):
                yield work[start : start + batch]
    some = batches()
    for _ in range(2):
        generator.generate(*map(list, zip(*next(some))), progress=False)
    began, cpu, made = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - began < seconds:
        made += len(generator.generate(*map(list, zip(*next(some))), progress=False))
    spent = time.perf_counter() - began
    print(json.dumps({"images_per_s": made / spent, "cpu_s_per_image": (time.process_time() - cpu) / made}))
"""


@dataclass
class Tally:
    """What clients saw."""

    latencies: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: int = 0
    lost: int = 0
    unsent: int = 0
    batches: list[int] = field(default_factory=list)

    def to_json(self) -> dict[str, object]:
        times = sorted(self.latencies)
        return {
            "statuses": dict(sorted(self.statuses.items())),
            "wrong_images": self.wrong,
            "lost": self.lost,
            "unsent": self.unsent,
            "p50_ms": round(1e3 * times[len(times) // 2], 1) if times else None,
            "p99_ms": round(1e3 * times[int(len(times) * 0.99)], 1) if times else None,
            "mean_batch": round(statistics.mean(self.batches), 2) if self.batches else None,
        }


class Client:
    """One connection that is kept open."""

    def __init__(self, port: int, expected: dict[tuple[str, int], NDArray[np.uint8]], tally: Tally) -> None:
        self._port, self._expected, self._tally = port, expected, tally
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._used = 0.0

    async def ask(self, number: int) -> None:
        prompt, seed = PROMPTS[number % len(PROMPTS)], number // len(PROMPTS) % SEEDS
        began = time.perf_counter()
        try:
            status, answer = await self._post({"prompt": prompt, "seed": seed})
        except (OSError, asyncio.IncompleteReadError):
            self._tally.lost += 1
            self.close()
            return
        self._tally.statuses[status] += 1
        if status == 200:
            self._tally.latencies.append(time.perf_counter() - began)
            self._tally.batches.append(answer["batch"])
            (entry,) = answer["data"]
            image = np.asarray(Image.open(BytesIO(base64.b64decode(entry["b64_json"])))).astype(int)
            self._tally.wrong += int(abs(image - self._expected[prompt, seed]).max() > 1 or entry["seed"] != seed)

    async def _post(self, request: object) -> tuple[int, Any]:
        if time.monotonic() - self._used > KEPT_S:
            self.close()
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        body = json.dumps(request).encode()
        head = f"POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
        writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        await writer.drain()
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
        content = await reader.readexactly(int(headers["content-length"]))
        self._used = time.monotonic()
        if headers.get("connection") == "close":
            self.close()
        return int(lines[0].split()[1]), json.loads(content)

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


@dataclass
class Served:
    """A running server."""

    process: psutil.Process
    port: int

    def cpu(self) -> float:
        times = self.process.cpu_times()
        return float(times.user + times.system)

    def megabytes(self) -> float:
        return float(self.process.memory_info().rss) / 1e6


@contextmanager
def serving(target: str, *options: str) -> Iterator[Served]:
    command = [
        sys.executable,
        "-m",
        "fmg",
        "serve",
        target,
        "--device",
        "cpu",
        "--threads",
        "1",
        "--port",
        "0",
        "--offline",
        *options,
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    line = next(line for line in process.stderr if line.startswith("Serving on "))
    try:
        yield Served(psutil.Process(process.pid), int(line.rpartition(":")[2]))
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        process.stderr.close()


async def closed_loop(server: Served, expected: Any, clients: int, seconds: float) -> Tally:
    """Clients that ask again when they are answered."""
    tally, end, numbers = Tally(), time.monotonic() + seconds, iter(range(10**9))

    async def one() -> None:
        client = Client(server.port, expected, tally)
        while time.monotonic() < end:
            await client.ask(next(numbers))
        client.close()

    await asyncio.gather(*(one() for _ in range(clients)))
    return tally


async def open_loop(server: Served, expected: Any, rate: float, seconds: float) -> Tally:
    """Sends requests at a fixed rate, whatever becomes of earlier ones."""
    tally, idle, tasks = Tally(), list[Client](), set[asyncio.Task[None]]()

    async def one(number: int) -> None:
        client = idle.pop() if idle else Client(server.port, expected, tally)
        await client.ask(number)
        idle.append(client)

    began = time.monotonic()
    for number in range(int(rate * seconds)):
        await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
        if len(tasks) >= MOST_OPEN:
            tally.unsent += 1
            continue
        task = asyncio.create_task(one(number))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    for client in idle:
        client.close()
    return tally


def measured(server: Served, expected: Any, clients: int, seconds: float) -> dict[str, object]:
    asyncio.run(closed_loop(server, expected, clients, 1.0))
    cpu, began, memory = server.cpu(), time.perf_counter(), server.megabytes()
    tally = asyncio.run(closed_loop(server, expected, clients, seconds))
    images = tally.statuses[200]
    return {
        "images_per_s": images / (time.perf_counter() - began),
        "cpu_s_per_image": (server.cpu() - cpu) / images,
        "memory_mb": [round(memory, 1), round(server.megabytes(), 1)],
        **tally.to_json(),
    }


def alone(target: str) -> dict[tuple[str, int], NDArray[np.uint8]]:
    """The image of each prompt and seed."""
    from fmg import load

    work = [(prompt, seed) for prompt in PROMPTS for seed in range(SEEDS)]
    with load(target, device="cpu") as generator:
        images = generator.generate([p for p, _ in work], [s for _, s in work], progress=False).to_pil()
    return {key: np.asarray(image) for key, image in zip(work, images, strict=True)}


def median(rounds: Sequence[dict[str, Any]], key: str) -> float:
    return statistics.median(one[key] for one in rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="meanflow-shapes")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    expected = alone(options.target)
    asked = json.dumps([options.target, options.batch, options.seconds, PROMPTS, SEEDS])
    rounds: dict[str, list[dict[str, Any]]] = {"direct": [], "one": [], "batched": []}
    with (
        serving(options.target, "--batch-size", "1") as one,
        serving(options.target, "--batch-size", str(options.batch)) as many,
    ):
        for _ in range(options.rounds):
            done = subprocess.run([sys.executable, "-c", DIRECT, asked], capture_output=True, text=True, check=True)
            rounds["direct"].append(json.loads(done.stdout))
            rounds["one"].append(measured(one, expected, options.clients, options.seconds))
            rounds["batched"].append(measured(many, expected, options.clients, options.seconds))
            print(*(f"{name}: {json.dumps(found[-1])}" for name, found in rounds.items()), sep="\n", flush=True)
        before = many.megabytes()
        rate = 5 * median(rounds["batched"], "images_per_s")
        overload = asyncio.run(open_loop(many, expected, rate, options.seconds))
        after = many.megabytes()
    summary = {
        "overhead_cpu": median(rounds["batched"], "cpu_s_per_image") / median(rounds["direct"], "cpu_s_per_image"),
        "overhead_time": median(rounds["direct"], "images_per_s") / median(rounds["batched"], "images_per_s"),
        "batching_cpu": median(rounds["one"], "cpu_s_per_image") / median(rounds["batched"], "cpu_s_per_image"),
        "batching_time": median(rounds["batched"], "images_per_s") / median(rounds["one"], "images_per_s"),
        "overload": {"requests_per_s": rate, **overload.to_json()},
        "memory_mb": {"before": before, "after": after},
    }
    # with the load of the machine
    given = {key: str(value) for key, value in vars(options).items() if key != "out"}
    result = {"machine": machine(), **given, "rounds": rounds, **summary}
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
