"""The app: routes, errors and limits around an engine and, where there is one, a job service."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from service import errors, reference
from service.access import Access
from service.engine.base import Engine
from service.guard import GuardedEngine
from service.jobs.base import Jobs
from service.keys import KeyRing
from service.limits import BodyLimit
from service.metrics import Metrics
from service.origins import Hosts, Origins, name_of
from service.pictures import PictureStore
from service.rates import Limits, Rates
from service.routes import health, images, metrics, models, traces
from service.running import Running
from service.safety import load_checker
from service.settings import Settings
from service.spans import Spans
from service.tracking import HEADER, Tracking
from weights.version import code_version

EXPOSED = (
    HEADER,
    "Retry-After",
    *(f"x-ratelimit-{a}-{b}" for a in ("limit", "remaining", "reset") for b in ("requests", "images")),
)
"""Headers of answers that a web page of another origin may read."""


def _limits(settings: Settings, ring: KeyRing | None, client: str) -> Limits:
    """A client's limits: its key's own, and the settings' where the key has none."""
    key = ring.get(client) if ring is not None else None
    requests, pictures = (key.requests_per_minute, key.pictures_per_minute) if key is not None else (None, None)
    return Limits(
        requests_per_minute=requests or settings.requests_per_minute,
        pictures_per_minute=pictures or settings.pictures_per_minute,
    )


def _own_names(settings: Settings) -> list[str]:
    """Host names that are this server's."""
    public = [] if settings.public_url is None else [name_of(settings.public_url)]
    return [*settings.allowed_hosts, settings.host, *public]


def create_app(
    settings: Settings, engine: Engine, jobs: Jobs | None = None, *, counts: Metrics | None = None
) -> FastAPI:
    """The app. It starts the engine and the jobs with itself, and stops them in the opposite order.

    Args:
        settings: see `service.settings`.
        engine: draws.
        jobs: distils; without it there is nothing at /v1/distillation.
        counts: what /metrics shows; give the engine the same as its observer.

    Raises:
        BadSettings: the safety checker or OpenTelemetry is not to be had.
        KeyFileError: the keys file is not there, or cannot be used.
    """
    ring = KeyRing(settings.keys_file) if settings.keys_file is not None else None
    rates = Rates(lambda client: _limits(settings, ring, client))
    checker = load_checker(settings.safety_checker) if settings.safety_checker is not None else None
    engine = GuardedEngine(engine, rates, checker, settings.safety_flagged, settings.request_timeout)
    counts = counts or Metrics()
    counts.watch(engine)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(engine.stop)
            await engine.start()
            if jobs is not None:
                stack.push_async_callback(jobs.stop)
                await jobs.start()
            yield

    app = FastAPI(
        title="Fewstep",
        version=code_version(),
        description="Text to image in one to four steps: students of diffusion models, and the models themselves.",
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.settings = settings
    app.state.engine = engine
    app.state.jobs = jobs
    app.state.metrics = counts
    app.state.pictures = PictureStore(settings.picture_bytes, settings.picture_seconds)
    app.state.running = Running()
    app.state.draining = asyncio.Event()
    # The last one added is asked first: an answer of any of them has a request id, and a refusal can be read by web pages.
    app.add_middleware(BodyLimit, largest=settings.max_body_bytes, seconds=settings.read_seconds)
    app.add_middleware(Access, ring=ring, rates=rates)
    app.add_middleware(Origins, listed=settings.cors_origins, public_url=settings.public_url)
    if ring is None:
        app.add_middleware(Hosts, names=_own_names(settings))
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],  # harmless: what counts is the key, and no browser sends that by itself
            expose_headers=EXPOSED,
        )
    app.add_middleware(Tracking, metrics=counts, spans=Spans() if settings.otel else None)
    errors.install(app)
    for module in (images, traces, models, health, metrics):  # in the order in which paths are tried
        app.include_router(module.router)
    if jobs is not None:
        from service.routes import jobs as job_routes  # its dependencies are for servers that have jobs

        app.include_router(job_routes.router)
    reference.install(app, keyed=ring is not None)
    return app
