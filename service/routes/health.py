"""``/health``: whether the process lives, and whether it can draw."""

from fastapi import APIRouter, Request

from service.errors import ApiError
from service.routes import ERRORS, engine_of
from service.schemas import Health

router = APIRouter(prefix="/health", tags=["health"], responses=ERRORS)
# A HEAD is answered as a GET, and the server leaves the body out.


@router.head("/live", include_in_schema=False)
@router.get("/live")
async def live(request: Request) -> Health:
    """200 as long as a restart would help nobody; 503 once the engine has failed for good."""
    failure = engine_of(request).failure
    if failure is not None:
        raise ApiError(503, f"the engine has failed: {failure}", code="engine_failed")
    return Health(status="live")


@router.head("/ready", include_in_schema=False)
@router.get("/ready")
async def ready(request: Request) -> Health:
    """200 once the models are loaded and a first picture was drawn; 503 before, after a failure, and once it stops."""
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
    """As ``/health/ready``."""
    await ready(request)
    return Health(status="ok")
