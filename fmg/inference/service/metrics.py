"""The counters behind `/metrics`, in Prometheus format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from fmg.inference.service.engine import Painted
from fmg.serving.app import RefusedError

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters of one server, separate from those of others in the process.

    Args:
        queued: returns the number of images that wait or are being generated.
    """

    def __init__(self, queued: Callable[[], float]) -> None:
        own = self._registry = CollectorRegistry()
        Gauge("fmg_queued_images", "Images that wait or are being generated", registry=own).set_function(queued)
        self._requests = Counter("fmg_requests", "Image requests by HTTP status", ["status"], registry=own)
        self._latency = Histogram(
            "fmg_request_seconds", "Seconds from request to answer", buckets=_SECONDS, registry=own
        )
        self._images = Counter("fmg_images", "Images generated", ["model"], registry=own)
        self._queueing = Histogram("fmg_queue_seconds", "Seconds in the queue", buckets=_SECONDS, registry=own)
        self._batch = Histogram("fmg_batch_images", "Batch size, by request", buckets=_BATCHES, registry=own)

    @contextmanager
    def request(self) -> Iterator[None]:
        """Counts and times the answer to a request."""
        with self._latency.time():
            try:
                yield
            except RefusedError as error:
                self._requests.labels(error.status).inc()
                raise
            except Exception:
                self._requests.labels(500).inc()
                raise
        self._requests.labels(200).inc()

    def generated(self, model: str, painted: Painted) -> None:
        """Counts the images of a request."""
        self._images.labels(model).inc(len(painted.images))
        self._queueing.observe(painted.seconds["queued"])
        self._batch.observe(painted.batch)

    def text(self) -> bytes:
        """All counters in Prometheus format."""
        return generate_latest(self._registry)
