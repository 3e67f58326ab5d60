"""What the server counts, for Prometheus at ``/metrics``. Metric names are documented on the attributes of `Metrics`.

Every app has its own registry, so that two apps in one process do not mix their counts.
"""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from service.engine.base import Engine
from service.engine.observer import Call, Outcome

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CALL_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
REQUEST_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
NO_ROUTE = "none"
"""Route label of requests answered before a route was found: an unknown path, a wrong key, a rate limit."""


class Metrics:
    """All metrics of one app. An `Observer` of its engine."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.http_seconds = Histogram(
            "fewstep_http_request_seconds",
            "Seconds from a request's headers to the end of its response, including streams.",
            ("method", "route"),
            buckets=REQUEST_SECONDS,
            registry=self.registry,
        )
        """By method and route template, such as /v1/images/generations; never by the path that a client sent."""
        self.http_requests = Counter(
            "fewstep_http_requests",
            "Requests answered; the status is 499 if the client disconnected first.",
            ("method", "route", "status"),
            registry=self.registry,
        )
        """``fewstep_http_requests_total``."""
        self.call_seconds = Histogram(
            "fewstep_engine_call_seconds",
            "Seconds of one model call: text encoder, network or decoder.",
            ("call", "model"),
            buckets=CALL_SECONDS,
            registry=self.registry,
        )
        """Its ``_count`` is the number of calls."""
        self.batch_size = Histogram(
            "fewstep_engine_batch_size",
            "Rows of one call, including padding.",
            ("call",),
            buckets=BATCHES,
            registry=self.registry,
        )
        """Shows how well requests share calls."""
        self.rows = Counter(
            "fewstep_engine_rows",
            "Rows of calls that a request waited for.",
            ("call", "model"),
            registry=self.registry,
        )
        """``fewstep_engine_rows_total``; divided by the slots, this is how well calls are filled."""
        self.slots = Counter(
            "fewstep_engine_slots",
            "Rows of calls, including padding.",
            ("call", "model"),
            registry=self.registry,
        )
        """``fewstep_engine_slots_total``."""
        self.requests = Counter(
            "fewstep_requests",
            "Image requests that ended, by outcome: done, cancelled, timed_out, refused or failed.",
            ("outcome",),
            registry=self.registry,
        )
        """``fewstep_requests_total``."""
        self.pictures = Counter(
            "fewstep_pictures",
            "Images of requests that ended, by the request's outcome.",
            ("outcome",),
            registry=self.registry,
        )
        """``fewstep_pictures_total``."""
        self.waited = Histogram(
            "fewstep_request_wait_seconds",
            "Seconds that an image request waited for its first call.",
            buckets=REQUEST_SECONDS,
            registry=self.registry,
        )
        """Of requests of every outcome."""
        self.request_seconds = Histogram(
            "fewstep_request_seconds",
            "Seconds that an image request took in the engine, including its wait.",
            ("outcome",),
            buckets=REQUEST_SECONDS,
            registry=self.registry,
        )
        """By outcome."""
        self._of_call: dict[tuple[Call, str], tuple[Histogram, Histogram, Counter, Counter]] = {}

    def watch(self, engine: Engine) -> None:
        """Collect this engine's load at every scrape."""
        self.registry.register(_LoadCollector(engine))

    def called(self, call: Call, model: str, rows: int, batch: int, seconds: float) -> None:
        """See `Observer.called`."""
        counts = self._of_call.get((call, model))
        if counts is None:  # looking them up takes longer than counting
            of_model = (call, model)
            counts = self._of_call[call, model] = (
                self.call_seconds.labels(*of_model),
                self.batch_size.labels(call),
                self.rows.labels(*of_model),
                self.slots.labels(*of_model),
            )
        timed, sizes, used, made = counts
        timed.observe(seconds)
        sizes.observe(batch)
        used.inc(rows)
        made.inc(batch)

    def ended(self, outcome: Outcome, pictures: int, waited: float, seconds: float) -> None:
        """See `Observer.ended`."""
        self.requests.labels(outcome).inc()
        self.pictures.labels(outcome).inc(pictures)
        self.waited.observe(waited)
        self.request_seconds.labels(outcome).observe(seconds)

    def answered(self, method: str, route: str | None, status: int, seconds: float) -> None:
        """Record the end of an HTTP request; ``route`` is its template."""
        method, route = method if method in METHODS else "other", route or NO_ROUTE
        self.http_seconds.labels(method, route).observe(seconds)
        self.http_requests.labels(method, route, str(status)).inc()

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """All metrics in the format that an Accept header asks for, and its media type."""
        encode, media_type = choose_encoder(accept)
        return encode(self.registry), media_type


class _LoadCollector(Collector):
    """Gauges from ``engine.load()``, read at each scrape.

    These are ``fewstep_queue_seconds``, ``fewstep_queue_pictures``, ``fewstep_resident_bytes`` by model, and
    ``fewstep_engine_ready``.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def describe(self) -> list[Metric]:
        """Return nothing, since describing the gauges would query an engine that has not started."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The current gauges."""
        load = self._engine.load()
        yield GaugeMetricFamily(
            "fewstep_engine_ready", "1 while the engine serves requests.", value=float(self._engine.ready)
        )
        yield GaugeMetricFamily(
            "fewstep_queue_seconds", "Predicted seconds until all admitted requests are finished.", value=load.seconds
        )
        yield GaugeMetricFamily("fewstep_queue_pictures", "Images admitted but not finished.", value=load.pictures)
        resident = GaugeMetricFamily(
            "fewstep_resident_bytes", "Memory of each model; shared parts count only for the base.", labels=["model"]
        )
        for model, size in load.resident.items():
            resident.add_metric([model], size)
        yield resident
