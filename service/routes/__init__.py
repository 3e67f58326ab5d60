"""The routes: thin, and all that they share."""

import asyncio
from collections.abc import Sequence
from typing import Any, cast

from fastapi import Request
from PIL.Image import Image

from service.engine.base import Drawn, Engine
from service.pictures import PictureStore, encode, facts_of
from service.running import Running
from service.schemas import DiversityUsed, DrawingInfo, ErrorBody, ImageRequest, LoraOption
from service.settings import Settings

ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "the request is wrong; `param` names the field"},
    "default": {"model": ErrorBody, "description": "any other error"},
}

QUICK = 2**14
"""Pixels that are a PNG or JPEG in less time than another thread is told of them: four pictures of 64x64."""


def engine_of(request: Request) -> Engine:
    """The engine of the request's app."""
    return cast(Engine, request.app.state.engine)


def client_of(request: Request) -> str:
    """Whose request it is: its key's id."""
    return cast(str, request.state.client)


def settings_of(request: Request) -> Settings:
    """The settings of the request's app."""
    return cast(Settings, request.app.state.settings)


def pictures_of(request: Request) -> PictureStore:
    """The pictures that the request's app hands out as urls."""
    return cast(PictureStore, request.app.state.pictures)


def running_of(request: Request) -> Running:
    """What the request's app is answering."""
    return cast(Running, request.app.state.running)


def draining_of(request: Request) -> asyncio.Event:
    """Set once the request's app is to stop."""
    return cast(asyncio.Event, request.app.state.draining)


def request_id_of(request: Request) -> str:
    """The request's id, as in the header X-Request-ID of its answer."""
    return cast(str, request.state.request_id)


def file_of(body: ImageRequest, image: Image, facts: dict[str, Any] | None = None) -> bytes:
    """The picture as a file of the kind that was asked for; it takes milliseconds and more: see `files_of`."""
    quality = 100 if body.output_compression is None else body.output_compression
    return encode(image, body.output_format, quality, facts)


async def files_of(body: ImageRequest, pictures: Sequence[tuple[Image, dict[str, Any] | None]]) -> list[bytes]:
    """Pictures as files, each with the facts that it tells; made at the same time, and small ones on the event loop."""
    if body.output_format != "webp" and sum(image.width * image.height for image, _ in pictures) <= QUICK:
        return [file_of(body, *picture) for picture in pictures]
    return await asyncio.gather(*(asyncio.to_thread(file_of, body, *picture) for picture in pictures))


def told_facts(body: ImageRequest, drawn: Drawn, metadata: bool) -> dict[str, Any] | None:
    """What the picture's file tells of how it was drawn; None where it may tell nothing."""
    return facts_of(drawn, body.prompt, body.negative_prompt) if metadata else None


def drawing_info(drawn: Drawn) -> DrawingInfo:
    """How the picture was drawn, as clients see it."""
    return DrawingInfo(
        steps=drawn.steps,
        guidance_scale=drawn.guidance_scale,
        diversity=DiversityUsed(**drawn.diversity.model_dump()) if drawn.diversity else None,
        network_evaluations=drawn.evaluations,
        seconds=round(drawn.seconds, 4),
        student=drawn.student,
        loras=[LoraOption(name=name, scale=scale) for name, scale in drawn.loras] or None,
    )


def size_of(image: Image) -> str:
    """WIDTHxHEIGHT, as OpenAI writes it."""
    return f"{image.width}x{image.height}"
