"""The app: routes, errors and limits around an engine and, where there is one, a job service."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.metadata import PackageNotFoundError, version

from fastapi import FastAPI

from service import errors
from service.engine.base import Engine
from service.jobs.base import Jobs
from service.limits import BodyLimit
from service.pictures import PictureStore
from service.routes import health, images, models
from service.settings import Settings


def code_version() -> str:
    """The installed version, or 'source' where the tree is run without being installed."""
    try:
        return version("fewstep")
    except PackageNotFoundError:
        return "source"


def create_app(settings: Settings, engine: Engine, jobs: Jobs | None = None) -> FastAPI:
    """The app. It starts the engine and the jobs with itself, and stops them in the opposite order.

    Args:
        settings: see `service.settings`.
        engine: draws.
        jobs: distils; without it there is nothing at /v1/distillation.
    """

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
    app.state.pictures = PictureStore(settings.picture_bytes, settings.picture_seconds)
    app.add_middleware(BodyLimit, largest=settings.max_body_bytes)
    errors.install(app)
    for module in (health, models, images):
        app.include_router(module.router)
    if jobs is not None:
        from service.routes import jobs as job_routes  # its dependencies are for servers that have jobs

        app.include_router(job_routes.router)
    return app
