"""``POST /v1/images/generations``, as in the OpenAI Images API, and the images that are served by URL."""

import asyncio
import base64
import secrets
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response

from service.engine.base import DiversityWish, DrawRequest
from service.errors import ApiError, shorten
from service.pictures import Format
from service.routes import (
    ERRORS,
    NO_OTHER_QUERY,
    client_of,
    drawing_info,
    engine_of,
    files_of,
    pictures_of,
    request_id_of,
    running_of,
    settings_of,
    size_of,
    told_facts,
)
from service.routes.streaming import stream_pictures
from service.running import wait_for
from service.schemas import MAX_SEED, ImageRequest, ImageResponse, Picture
from service.settings import Settings

router = APIRouter(prefix="/v1/images", tags=["images"], responses=ERRORS)

T = TypeVar("T")


@router.post(
    "/generations",
    response_model=ImageResponse,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
    dependencies=NO_OTHER_QUERY,
)
async def generate(body: ImageRequest, request: Request) -> Response:
    """Generate `n` images of a prompt.

    With `stream`, the response is a stream of server-sent events: `image_generation.partial_image` (see
    `PartialImage`), one `image_generation.completed` per image (see `CompletedImage`), and `error` if the request fails
    midway.
    """
    wanted = draw_request(body, request)
    if body.stream:
        return await stream_pictures(body, wanted, request)
    created = int(time.time())
    drawn = await finished(engine_of(request).generate(wanted), request)
    metadata = settings_of(request).picture_metadata
    files = await files_of(body, [(item.image, told_facts(body, item, metadata)) for item in drawn])
    data = [
        Picture(**handed_out(body, request, file), seed=item.seed, flagged=item.flagged or None)
        for item, file in zip(drawn, files, strict=True)
    ]
    first = drawn[0]
    answer = ImageResponse(
        created=created,
        data=data,
        model=first.model,
        size=size_of(first.image),
        output_format=body.output_format,
        drawing=drawing_info(first),
    )
    # Serialized here, since FastAPI would validate the whole response again, which takes as long as a PNG.
    return Response(answer.model_dump_json(exclude_none=True), media_type="application/json")


@router.delete("/generations/{request_id}", status_code=204, dependencies=NO_OTHER_QUERY)
async def cancel(request_id: str, request: Request) -> None:
    """Cancel one of your own requests in progress, by its X-Request-ID.

    The cancelled request is answered with status 499.
    """
    if not running_of(request).cancel(client_of(request), request_id):
        message = f"you have no request {shorten(request_id)} in progress: it has ended, or never existed"
        raise ApiError(404, message, code="not_found")


@router.head("/files/{picture_id}", include_in_schema=False)  # handled like GET; the server omits the body
@router.get("/files/{picture_id}", response_class=Response, responses={200: {"content": {"image/*": {}}}})
async def get_picture(picture_id: str, request: Request) -> Response:
    """An image that was requested with `response_format` `url`, until it expires."""
    picture = pictures_of(request).get(picture_id)
    if picture is None:
        raise ApiError(404, "there is no such image, or no longer: URLs work for a limited time", code="not_found")
    headers = {"Cache-Control": "private, max-age=3600", "X-Content-Type-Options": "nosniff"}
    return Response(picture.content, media_type=picture.media_type, headers=headers)


def _check_length(name: str, text: str, settings: Settings) -> None:
    if len(text) > settings.max_prompt_chars:
        message = f"{name}: {len(text)} characters are too many; at most {settings.max_prompt_chars} are allowed"
        raise ApiError(400, message, param=name, code="string_above_max_length")


def draw_request(body: ImageRequest, request: Request) -> DrawRequest:
    """Convert a request body to the engine's request.

    Raises:
        ApiError: a text is longer than the server allows.
    """
    settings = settings_of(request)
    for name, text in (("prompt", body.prompt), ("negative_prompt", body.negative_prompt)):
        _check_length(name, text, settings)
    wish: DiversityWish | None = None
    if not isinstance(body.diversity, bool):
        wish = DiversityWish(**body.diversity.model_dump())
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
        deterministic=body.deterministic or settings.deterministic,
        client=client_of(request),
        loras=tuple((lora.name, lora.scale) for lora in body.loras),
        previews=body.partial_images,
    )


def _seeds(body: ImageRequest) -> tuple[int, ...]:
    """One seed per image: as given, counted up from the one given (wrapping at the largest), or random."""
    if isinstance(body.seed, list):
        return tuple(body.seed)
    if body.seed is None:
        return tuple(secrets.randbelow(2**32) for _ in range(body.n))
    return tuple((body.seed + index) % (MAX_SEED + 1) for index in range(body.n))


def handed_out(
    body: ImageRequest, request: Request, file: bytes, output_format: Format | None = None
) -> dict[str, str]:
    """The file as a field of the response: its content or a URL, as requested."""
    if body.response_format == "b64_json":
        return {"b64_json": base64.b64encode(file).decode("ascii")}
    picture_id = pictures_of(request).put(file, output_format or body.output_format)
    path = request.app.url_path_for("get_picture", picture_id=picture_id)
    start = settings_of(request).public_url or str(request.base_url)
    return {"url": start.rstrip("/") + path}


async def finished(work: Coroutine[Any, Any, T], request: Request) -> T:
    """The result of ``work``, which is cancelled if the client cancels the request or disconnects."""
    with running_of(request).enter(client_of(request), request_id_of(request)) as cancelled:
        task = asyncio.create_task(work)
        try:
            await wait_for(task, request, cancelled)
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
