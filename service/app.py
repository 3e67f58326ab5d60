"""The application: routes, error handling and limits around an engine and, optionally, a job service."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from service import errors, reference
from service.access import Access
from service.engine.aside import Aside
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
"""Response headers that web pages of other origins may read."""
DELETIONS = 2
"""Most models that are deleted at the same time."""


def _limits(settings: Settings, ring: KeyRing | None, client: str) -> Limits:
    """A client's limits: those of its key, or else those of the settings."""
    key = ring.get(client) if ring is not None else None
    requests, pictures = (key.requests_per_minute, key.pictures_per_minute) if key is not None else (None, None)
    return Limits(
        requests_per_minute=requests or settings.requests_per_minute,
        pictures_per_minute=pictures or settings.pictures_per_minute,
    )


def _own_names(settings: Settings) -> list[str]:
    """Host names that belong to this server."""
    public = [] if settings.public_url is None else [name_of(settings.public_url)]
    return [*settings.allowed_hosts, settings.host, *public]


def create_app(
    settings: Settings, engine: Engine, jobs: Jobs | None = None, *, counts: Metrics | None = None
) -> FastAPI:
    """Create the app. It starts the engine, then the job service, and stops them in reverse order.

    Args:
        settings: see `service.settings`.
        engine: generates images.
        jobs: runs distillation jobs; without it, /v1/distillation does not exist.
        counts: what /metrics reports; pass the object that the engine has as its observer.

    Raises:
        BadSettings: the safety checker or OpenTelemetry is not available.
        KeyFileError: the keys file does not exist or cannot be used.
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
        description="Text-to-image generation with diffusion models, and with students of them that need few steps.",
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.settings = settings
    app.state.engine = engine
    app.state.jobs = jobs
    app.state.metrics = counts
    app.state.pictures = PictureStore(settings.picture_bytes, settings.picture_seconds)
    app.state.running = Running()
    app.state.deletions = Aside(DELETIONS)
    app.state.draining = asyncio.Event()
    # The middleware added last is the outermost: so every response has a request id, and web pages can read refusals.
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
            allow_headers=["*"],  # harmless: access depends on the key, which no browser sends by itself
            expose_headers=EXPOSED,
        )
    app.add_middleware(Tracking, metrics=counts, spans=Spans() if settings.otel else None)
    errors.install(app)
    for module in (images, traces, models, health, metrics):  # in the order in which paths are matched
        app.include_router(module.router)
    if jobs is not None:
        from service.routes import jobs as job_routes  # its dependencies are needed only by servers that have jobs

        app.include_router(job_routes.router)
    reference.install(app, keyed=ring is not None)
    return app
