"""``/health``: whether the process is alive, and whether it can generate images."""

from fastapi import APIRouter, Request

from service.errors import ApiError
from service.routes import ERRORS, engine_of
from service.schemas import Health

router = APIRouter(prefix="/health", tags=["health"], responses=ERRORS)
# HEAD is handled like GET, and the server omits the body.


@router.head("/live", include_in_schema=False)
@router.get("/live")
async def live(request: Request) -> Health:
    """Liveness: 200 while the process works or is starting; 503 once the engine has failed permanently."""
    failure = engine_of(request).failure
    if failure is not None:
        raise ApiError(503, f"the engine has failed: {failure}", code="engine_failed")
    return Health(status="live")


@router.head("/ready", include_in_schema=False)
@router.get("/ready")
async def ready(request: Request) -> Health:
    """Readiness: 200 once the models are loaded and warmed up; 503 before, after a failure, and while stopping."""
    engine = engine_of(request)
    if engine.failure is not None:
        raise ApiError(503, f"the engine has failed: {engine.failure}", code="engine_failed")
    if not engine.ready:
        raise ApiError(
            503,
            "the models are being loaded, or the server is stopping",
            code="not_ready",
            headers={"Retry-After": "5"},
        )
    return Health(status="ready")


@router.head("", include_in_schema=False)
@router.get("")
async def health(request: Request) -> Health:
    """The same as `/health/ready`."""
    await ready(request)
    return Health(status="ok")
