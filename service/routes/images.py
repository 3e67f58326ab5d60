"""``POST /v1/images/generations``, as in the OpenAI Images API, and the pictures that are handed out as urls."""

import asyncio
import base64
import secrets
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response

from service.engine.base import DiversityWish, Drawn, DrawRequest
from service.errors import CLIENT_CLOSED_REQUEST, ApiError
from service.pictures import encode, facts_of
from service.routes import ERRORS, client_of, engine_of, pictures_of, settings_of
from service.schemas import MAX_SEED, DiversityUsed, DrawingInfo, ImageRequest, ImageResponse, LoraOption, Picture
from service.settings import Settings

router = APIRouter(prefix="/v1/images", tags=["images"], responses=ERRORS)

T = TypeVar("T")


@router.post("/generations", response_model_exclude_none=True)
async def generate(body: ImageRequest, request: Request) -> ImageResponse:
    """Draw n pictures of a prompt."""
    settings = settings_of(request)
    for name, text in (("prompt", body.prompt), ("negative_prompt", body.negative_prompt)):
        _check_length(name, text, settings)
    created = int(time.time())
    drawn = await _unless_gone(request, engine_of(request).generate(_draw_request(body, client_of(request))))
    files = await asyncio.to_thread(_encode, body, drawn, settings.picture_metadata)
    data = [_picture(request, body, item, file) for item, file in zip(drawn, files, strict=True)]
    first = drawn[0]
    return ImageResponse(
        created=created,
        data=data,
        model=first.model,
        size=f"{first.image.width}x{first.image.height}",
        output_format=body.output_format,
        drawing=DrawingInfo(
            steps=first.steps,
            guidance_scale=first.guidance_scale,
            diversity=DiversityUsed(**first.diversity.model_dump()) if first.diversity else None,
            network_evaluations=first.evaluations,
            seconds=round(first.seconds, 4),
            student=first.student,
            loras=[LoraOption(name=name, scale=scale) for name, scale in first.loras] or None,
        ),
    )


@router.get("/files/{picture_id}", response_class=Response, responses={200: {"content": {"image/*": {}}}})
async def get_picture(picture_id: str, request: Request) -> Response:
    """A picture that was asked for as a url, until it expires."""
    picture = pictures_of(request).get(picture_id)
    if picture is None:
        raise ApiError(404, "there is no such picture, or no more: urls work for a limited time", code="not_found")
    headers = {"Cache-Control": "private, max-age=3600", "X-Content-Type-Options": "nosniff"}
    return Response(picture.content, media_type=picture.media_type, headers=headers)


def _check_length(name: str, text: str, settings: Settings) -> None:
    if len(text) > settings.max_prompt_chars:
        message = f"{name}: {len(text)} characters are too long; at most {settings.max_prompt_chars} are read"
        raise ApiError(400, message, param=name, code="string_above_max_length")


def _draw_request(body: ImageRequest, client: str) -> DrawRequest:
    wish: DiversityWish | None = None
    if not isinstance(body.diversity, bool):
        wish = DiversityWish(base_steps=body.diversity.base_steps, base_guidance=body.diversity.base_guidance)
    elif body.diversity:
        wish = DiversityWish()
    width, height = (None, None) if body.size == "auto" else map(int, body.size.split("x"))
    return DrawRequest(
        prompt=body.prompt,
        seeds=_seeds(body),
        model=body.model,
        negative_prompt=body.negative_prompt,
        steps=body.steps,
        guidance_scale=body.guidance_scale,
        diversity=wish,
        size=None if width is None or height is None else (width, height),
        deterministic=body.deterministic,
        client=client,
        loras=tuple((lora.name, lora.scale) for lora in body.loras),
    )


def _seeds(body: ImageRequest) -> tuple[int, ...]:
    """One seed a picture: as given, counted up from the one given (and around at the largest), or random."""
    if isinstance(body.seed, list):
        return tuple(body.seed)
    if body.seed is None:
        return tuple(secrets.randbelow(2**32) for _ in range(body.n))
    return tuple((body.seed + index) % (MAX_SEED + 1) for index in range(body.n))


def _encode(body: ImageRequest, drawn: list[Drawn], metadata: bool) -> list[bytes]:
    quality = 100 if body.output_compression is None else body.output_compression
    return [
        encode(
            item.image,
            body.output_format,
            quality,
            facts_of(item, body.prompt, body.negative_prompt) if metadata else None,
        )
        for item in drawn
    ]


def _picture(request: Request, body: ImageRequest, drawn: Drawn, file: bytes) -> Picture:
    flagged = True if drawn.flagged else None
    if body.response_format == "b64_json":
        return Picture(b64_json=base64.b64encode(file).decode("ascii"), seed=drawn.seed, flagged=flagged)
    picture_id = pictures_of(request).put(file, body.output_format)
    path = request.app.url_path_for("get_picture", picture_id=picture_id)
    start = settings_of(request).public_url or str(request.base_url)
    return Picture(url=start.rstrip("/") + path, seed=drawn.seed, flagged=flagged)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The work's result; the work is cancelled when the client goes away before."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(CLIENT_CLOSED_REQUEST, "the client has gone", code="client_closed_request")
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    """Returns when the client has closed the connection. The body was read before, so nothing else comes."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
