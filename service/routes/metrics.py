"""``GET /metrics``: what the server counts, for Prometheus."""

from fastapi import APIRouter, Request, Response

from service.metrics import Metrics
from service.routes import ERRORS

router = APIRouter(tags=["operations"], responses=ERRORS)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """All metrics, in Prometheus' text format or OpenMetrics. Needs a key with the scope `admin`."""
    counted: Metrics = request.app.state.metrics
    content, media_type = counted.exposition(request.headers.get("accept", ""))
    return Response(content, headers={"Content-Type": media_type})
