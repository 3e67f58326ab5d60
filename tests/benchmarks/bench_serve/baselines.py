"""Two servers as they are commonly written around a diffusers pipeline, to compare this one with.

    python -m tests.benchmarks.bench_serve.baselines lock|window --exports DIR --port N

``lock``: FastAPI, and one call of the pipeline at a time behind a lock. ``window``: requests wait for a fixed time for
others that can share their call (the same steps and guidance), and are drawn together; when more are waiting than a call
takes, nobody waits for the window. Both draw the student as `fewstep export` writes it, from FOLDER/STEPS.
"""

import argparse
import asyncio
import base64
import io
import time
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import uvicorn
from diffusers import LCMScheduler, StableDiffusionPipeline
from fastapi import FastAPI
from PIL import Image
from pydantic import BaseModel

Key = tuple[int, float]
"""Steps and guidance: what a pipeline's call has one of."""


class Body(BaseModel):
    """The fields that the baselines know; they pass over the others."""

    prompt: str
    seed: int
    steps: int
    n: int
    guidance_scale: float = 1.0

    @property
    def key(self) -> Key:
        """What it can share a call with."""
        return self.steps, self.guidance_scale


class Draws(Protocol):
    """One call: pictures of these prompts and seeds."""

    def __call__(self, key: Key, prompts: list[str], seeds: list[int]) -> list[Image.Image]: ...


class Pipelines:
    """The student at each of its step counts: pipelines that share everything but their schedulers."""

    def __init__(self, exports: Path, device: str, dtype: torch.dtype) -> None:
        steps = sorted(int(path.name) for path in exports.iterdir())
        first = StableDiffusionPipeline.from_pretrained(exports / str(steps[0]), dtype=dtype, safety_checker=None)
        first.to(device)
        self._pipelines = {
            count: StableDiffusionPipeline(
                **{
                    **first.components,
                    "scheduler": LCMScheduler.from_pretrained(exports / str(count), subfolder="scheduler"),
                },
                requires_safety_checker=False,
            )
            for count in steps
        }
        for pipeline in self._pipelines.values():
            pipeline.set_progress_bar_config(disable=True)

    def __call__(self, key: Key, prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        steps, guidance_scale = key
        images: list[Image.Image] = self._pipelines[steps](
            prompts,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        ).images
        return images

    def warm_up(self) -> None:
        """One call of each pipeline."""
        for steps in self._pipelines:
            self((steps, 1.0), ["red apple"], [0])


def png(image: Image.Image) -> str:
    """In base64."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


class Locked:
    """One request after another, each drawn whole."""

    def __init__(self, draws: Draws) -> None:
        self._draws = draws
        self._lock = asyncio.Lock()

    async def draw(self, body: Body) -> list[Image.Image]:
        """The request's pictures."""
        seeds = [body.seed + index for index in range(body.n)]
        async with self._lock:
            return await asyncio.to_thread(self._draws, body.key, [body.prompt] * body.n, seeds)


@dataclass(eq=False)
class _Waiting:
    body: Body
    arrived: float
    result: "asyncio.Future[list[Image.Image]]" = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Windowed:
    """Requests that agree in steps and guidance are drawn together.

    Args:
        draws: one call.
        window: seconds that the oldest request waits for others.
        most: pictures of one call.
    """

    def __init__(self, draws: Draws, window: float, most: int) -> None:
        self._draws = draws
        self._window = window
        self._most = most
        self._waiting: deque[_Waiting] = deque()
        self._changed = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "pipeline")

    async def draw(self, body: Body) -> list[Image.Image]:
        """The request's pictures."""
        waiting = _Waiting(body, time.perf_counter())
        self._waiting.append(waiting)
        self._changed.set()
        return await waiting.result

    async def work(self) -> None:
        """Draw for ever."""
        while True:
            batch = await self._batch()
            prompts = [waiting.body.prompt for waiting in batch for _ in range(waiting.body.n)]
            seeds = [waiting.body.seed + index for waiting in batch for index in range(waiting.body.n)]
            loop = asyncio.get_running_loop()
            try:
                images = await loop.run_in_executor(self._thread, self._draws, batch[0].body.key, prompts, seeds)
            except Exception as error:  # noqa: BLE001 - is the answer to all of them
                for waiting in batch:
                    if not waiting.result.done():
                        waiting.result.set_exception(error)
                continue
            for waiting in batch:
                if not waiting.result.done():  # its client may have gone
                    waiting.result.set_result(images[: waiting.body.n])
                del images[: waiting.body.n]

    async def _batch(self) -> list[_Waiting]:
        """The oldest request, and those that can be drawn with it, once its window is over or the batch is full."""
        while True:
            self._changed.clear()
            if not self._waiting:
                await self._changed.wait()
                continue
            oldest = self._waiting[0]
            batch, full = self._together(oldest.body.key)
            left = oldest.arrived + self._window - time.perf_counter()
            if full or left <= 0:
                for waiting in batch:
                    self._waiting.remove(waiting)
                return batch
            try:
                await asyncio.wait_for(self._changed.wait(), left)
            except TimeoutError:
                pass

    def _together(self, key: Key) -> tuple[list[_Waiting], bool]:
        """Those of this key that fit into one call, oldest first, and whether there is no room for another."""
        batch: list[_Waiting] = []
        room = self._most
        for waiting in self._waiting:
            if waiting.body.key != key:
                continue
            if waiting.body.n > room and batch:
                return batch, True
            batch.append(waiting)
            room -= waiting.body.n
        return batch, room <= 0


def make_app(draw: Callable[[Body], Awaitable[list[Image.Image]]], work: Callable[[], Any] | None = None) -> FastAPI:
    """The server around one way to draw; ``work`` runs beside it."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> Any:
        task = asyncio.create_task(work()) if work is not None else None
        yield
        if task is not None:
            task.cancel()

    app = FastAPI(lifespan=lifespan)

    @app.get("/health/ready")
    async def ready() -> dict[str, str]:
        return {"status": "ready"}

    @app.post("/v1/images/generations")
    async def generate(body: Body) -> dict[str, Any]:
        images = await draw(body)
        files = await asyncio.to_thread(lambda: [png(image) for image in images])
        return {"created": int(time.time()), "data": [{"b64_json": file} for file in files]}

    return app


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["lock", "window"])
    parser.add_argument("--exports", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--window", type=float, default=0.05, help="seconds (%(default)s)")
    parser.add_argument("--most", type=int, default=8, help="pictures of one call (%(default)s)")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    pipelines = Pipelines(options.exports, options.device, getattr(torch, options.dtype))
    pipelines.warm_up()
    if options.kind == "lock":
        app = make_app(Locked(pipelines).draw)
    else:
        windowed = Windowed(pipelines, options.window, options.most)
        app = make_app(windowed.draw, windowed.work)
    uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
