"""What a server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The numbers of one server."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("mp2_requests", "Requests answered.", ["route", "status"], registry=registry)
        self.request_s = Histogram(
            "mp2_request_seconds",
            "From a request's head to its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.lines = Counter("mp2_lines", "Lines answered.", ["task"], registry=registry)
        self.waiting = Gauge("mp2_waiting_rows", "Sequences that wait for a forward.", registry=registry)
        self.batch_rows = Histogram(
            "mp2_batch_rows", "Sequences of a forward.", buckets=_ROWS, registry=registry
        )
        self.forward_s = Histogram(
            "mp2_forward_seconds", "Time of a forward.", buckets=_SECONDS, registry=registry
        )

    def text(self) -> bytes:
        """Return them in Prometheus' text format."""
        return generate_latest(self._registry)
