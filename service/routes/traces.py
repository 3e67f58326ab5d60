"""``POST /v1/images/trace``: what the model predicts at each step of an image."""

import asyncio
import time
from itertools import islice
from typing import Any

from fastapi import APIRouter, Request
from PIL.Image import Image

from service.pictures import encode
from service.routes import ERRORS, NO_OTHER_QUERY, drawing_info, engine_of, files_of, settings_of, size_of, told_facts
from service.routes.images import draw_request, finished, handed_out
from service.trace_schemas import Strip, Trace, TracedStep, TraceRequest, TraceResponse
from service.tracing import Way, draw_strip, title_of, trace

router = APIRouter(prefix="/v1/images", tags=["images"], responses=ERRORS, dependencies=NO_OTHER_QUERY)


@router.post("/trace", response_model_exclude_none=True)
async def trace_pictures(body: TraceRequest, request: Request) -> TraceResponse:
    """Generate `n` images, and return what the model predicts at each of their steps: its x_0, decoded.

    With `diversity`, the base's steps come first. In addition to generation, each step costs a call of the decoder.
    """
    created = int(time.time())
    ways = await finished(trace(engine_of(request), draw_request(body, request)), request)
    metadata = settings_of(request).picture_metadata
    files = iter(await files_of(body, [each for way in ways for each in _shown(body, way, metadata)]))
    strip = None
    if body.strip:
        png = await asyncio.to_thread(lambda: encode(draw_strip(title_of(body.prompt, ways), ways), "png"))
        strip = Strip(**handed_out(body, request, png, "png"))
    first = ways[0].drawn
    return TraceResponse(
        created=created,
        data=[_trace(body, request, way, list(islice(files, len(way.images)))) for way in ways],
        strip=strip,
        model=first.model,
        size=size_of(first.image),
        output_format=body.output_format,
        drawing=drawing_info(first),
    )


def _shown(body: TraceRequest, way: Way, metadata: bool) -> list[tuple[Image, dict[str, Any] | None]]:
    """Every prediction. The last one is the image itself, whose file records how it was generated, as usual."""
    return [*((image, None) for image in way.images[:-1]), (way.drawn.image, told_facts(body, way.drawn, metadata))]


def _trace(body: TraceRequest, request: Request, way: Way, files: list[bytes]) -> Trace:
    steps = [
        TracedStep(
            step=number,
            leg=step.leg,
            t=step.t,
            guidance_scale=step.guidance_scale,
            **handed_out(body, request, file),
        )
        for number, (step, file) in enumerate(zip(way.drawn.path, files, strict=True), 1)
    ]
    return Trace(seed=way.drawn.seed, flagged=way.drawn.flagged or None, steps=steps)
