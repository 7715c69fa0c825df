"""What Prometheus reads of a server; every server has a registry of its own."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters and histograms; names begin with scaleweaver_."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "scaleweaver_requests", "Answered requests.", ["path", "status"], registry=registry
        )  # exported as scaleweaver_requests_total
        self.seconds = Histogram(
            "scaleweaver_request_seconds", "From a request to its whole answer.", buckets=SECONDS, registry=registry
        )
        self.images = Counter("scaleweaver_images", "Pictures drawn.", registry=registry)
        self.redrawn = Counter(
            "scaleweaver_images_redrawn",
            "Pictures drawn again alone, for bits that hung on rounding.",
            registry=registry,
        )
        self.cancelled = Counter(
            "scaleweaver_images_cancelled", "Pictures that nobody waited for any more.", registry=registry
        )
        self.batch = Histogram(
            "scaleweaver_batch_images",
            "Pictures in one pipeline call.",
            buckets=(1, 2, 4, 8, 16, 32),
            registry=registry,
        )
        self.drawing = Histogram(
            "scaleweaver_draw_seconds", "Time of one pipeline call.", buckets=SECONDS, registry=registry
        )
        self.waiting = Gauge("scaleweaver_queue_images", "Pictures that wait to be drawn.", registry=registry)
        self.held = Gauge("scaleweaver_held_images", "Pictures that were accepted and not yet sent.", registry=registry)
        self.active = Gauge("scaleweaver_active_requests", "Requests that are being worked on.", registry=registry)

    def follow(self, waiting: Callable[[], int], held: Callable[[], int], active: Callable[[], int]) -> None:
        """Where the gauges look when they are read."""
        self.waiting.set_function(waiting)
        self.held.set_function(held)
        self.active.set_function(active)

    def text(self) -> bytes:
        return generate_latest(self.registry)
