"""Image files: how they are encoded, and the bounded in-memory store that serves them by URL."""

import io
import json
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

from service.engine.base import Drawn
from service.png import encode_png

Format = Literal["png", "jpeg", "webp"]


def encode(image: Image.Image, output_format: Format, quality: int = 100, facts: dict[str, Any] | None = None) -> bytes:
    """Encode the image as a file.

    Args:
        image: RGB.
        output_format: png is lossless.
        quality: 0 to 100, for jpeg and webp.
        facts: written to a png as JSON, in a text chunk named ``fewstep``.
    """
    if output_format == "png":
        return encode_png(image, "fewstep", json.dumps(facts, ensure_ascii=False)) if facts else encode_png(image)
    buffer = io.BytesIO()
    if output_format == "jpeg":
        image.save(buffer, "JPEG", quality=max(quality, 1), subsampling=0 if quality >= 90 else 2)
    else:
        image.save(buffer, "WEBP", quality=quality)
    return buffer.getvalue()


def facts_of(drawn: Drawn, prompt: str, negative_prompt: str) -> dict[str, Any]:
    """What is needed to generate the image again."""
    return {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "model": drawn.model,
        "student": drawn.student or (drawn.model if drawn.base else None),
        "base": drawn.base,
        "job": drawn.job,
        "seed": drawn.seed,
        "steps": drawn.steps,
        "guidance_scale": drawn.guidance_scale,
        "loras": [{"name": name, "scale": scale} for name, scale in drawn.loras],
        "diversity": drawn.diversity.model_dump() if drawn.diversity else None,
    }


@dataclass(frozen=True)
class StoredPicture:
    """A file that is served by URL."""

    content: bytes
    media_type: str
    expires: float


class PictureStore:
    """Image files by random id, in memory, limited in total size and age; the oldest are dropped first.

    Args:
        capacity: total size in bytes.
        seconds: longest time for which an image is kept.
        clock: monotonic time in seconds.
    """

    def __init__(self, capacity: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._capacity = capacity
        self._seconds = seconds
        self._clock = clock
        self._pictures: OrderedDict[str, StoredPicture] = OrderedDict()
        self._used = 0
        self._lock = threading.Lock()

    def put(self, content: bytes, output_format: Format) -> str:
        """Store an image file, and return its id, which cannot be guessed."""
        picture_id = secrets.token_urlsafe(24)
        with self._lock:
            self._pictures[picture_id] = StoredPicture(content, f"image/{output_format}", self._clock() + self._seconds)
            self._used += len(content)
            self._drop_expired()
            while self._used > self._capacity:
                self._drop_oldest()
        return picture_id

    def get(self, picture_id: str) -> StoredPicture | None:
        """The image file; None if there is none with this id, or it has been dropped."""
        with self._lock:
            self._drop_expired()
            return self._pictures.get(picture_id)

    def _drop_expired(self) -> None:
        now = self._clock()
        while self._pictures and next(iter(self._pictures.values())).expires <= now:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        _, picture = self._pictures.popitem(last=False)
        self._used -= len(picture.content)
