"""The routes, and the helpers that they share."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, cast

from fastapi import Depends, Request
from PIL.Image import Image

from service.engine.base import Drawn, Engine
from service.errors import SHOWN, ApiError, shorten
from service.jobs.base import JobsUnavailable
from service.pictures import PictureStore, encode, facts_of
from service.running import Running
from service.schemas import DiversityUsed, DrawingInfo, ErrorBody, ImageRequest, LoraOption
from service.settings import Settings
from weights.fields import instead_of

log = logging.getLogger(__name__)
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "The request is invalid; `param` names the field."},
    "default": {"model": ErrorBody, "description": "Any other error."},
}

RETRY_SECONDS = 10
"""Retry-After for an unusable table: disk space may be freed, and databases restart."""
QUICK = 2**14
"""Up to this many pixels, encoding a PNG or JPEG is faster than handing it to another thread: four 64x64 images."""


async def _refuse_unknown_query(request: Request) -> None:  # async, or FastAPI would call it in another thread
    route = request.scope["route"]
    known = [field.alias for field in route.dependant.query_params]
    name = next((each for each in request.query_params if each not in known), None)
    if name is None:
        return
    fix = instead_of(name, known) if known else "this path takes none"
    if route.body_field is not None:
        fix += "; send the request's fields as JSON in its body"
    message = f"there is no query parameter {shorten(name)}: {fix}"
    raise ApiError(400, message, param=name[:SHOWN], code="unknown_parameter")


NO_OTHER_QUERY = [Depends(_refuse_unknown_query)]
"""Dependencies of routes that refuse query parameters which they do not have.

Health checks, metrics and image URLs are without: probes, scrapers and browsers add parameters of their own there.
"""


def engine_of(request: Request) -> Engine:
    """The engine of the request's app."""
    return cast(Engine, request.app.state.engine)


def client_of(request: Request) -> str:
    """The id of the client, which is that of its key."""
    return cast(str, request.state.client)


def settings_of(request: Request) -> Settings:
    """The settings of the request's app."""
    return cast(Settings, request.app.state.settings)


def pictures_of(request: Request) -> PictureStore:
    """The store of images that the request's app serves by URL."""
    return cast(PictureStore, request.app.state.pictures)


def running_of(request: Request) -> Running:
    """The requests that the request's app is answering."""
    return cast(Running, request.app.state.running)


def draining_of(request: Request) -> asyncio.Event:
    """An event that is set once the request's app is about to stop."""
    return cast(asyncio.Event, request.app.state.draining)


def request_id_of(request: Request) -> str:
    """The request's id, as in the X-Request-ID header of its response."""
    return cast(str, request.state.request_id)


def file_of(body: ImageRequest, image: Image, facts: dict[str, Any] | None = None) -> bytes:
    """Encode the image in the requested format, which takes milliseconds or more: see `files_of`."""
    quality = 100 if body.output_compression is None else body.output_compression
    return encode(image, body.output_format, quality, facts)


async def files_of(body: ImageRequest, pictures: Sequence[tuple[Image, dict[str, Any] | None]]) -> list[bytes]:
    """Encode images, each with the facts to embed: concurrently in threads, or on the event loop if they are small."""
    if body.output_format != "webp" and sum(image.width * image.height for image, _ in pictures) <= QUICK:
        return [file_of(body, *picture) for picture in pictures]
    return await asyncio.gather(*(asyncio.to_thread(file_of, body, *picture) for picture in pictures))


def told_facts(body: ImageRequest, drawn: Drawn, metadata: bool) -> dict[str, Any] | None:
    """The facts to embed in an image's file; None if embedding is switched off."""
    return facts_of(drawn, body.prompt, body.negative_prompt) if metadata else None


def drawing_info(drawn: Drawn) -> DrawingInfo:
    """How the image was generated, as clients see it."""
    return DrawingInfo(
        steps=drawn.steps,
        guidance_scale=drawn.guidance_scale,
        diversity=DiversityUsed(**drawn.diversity.model_dump()) if drawn.diversity else None,
        network_evaluations=drawn.evaluations,
        seconds=round(drawn.seconds, 4),
        student=drawn.student,
        loras=[LoraOption(name=name, scale=scale) for name, scale in drawn.loras] or None,
    )


def unavailable(error: JobsUnavailable) -> ApiError:
    """The response for a job table that cannot be used, which is also logged."""
    log.error("%s", error)
    headers = {"Retry-After": str(RETRY_SECONDS)}
    return ApiError(503, str(error), code="job_table_unavailable", headers=headers)


def size_of(image: Image) -> str:
    """WIDTHxHEIGHT, as OpenAI writes it."""
    return f"{image.width}x{image.height}"
