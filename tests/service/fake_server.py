"""The real app with a real job service, around an engine that paints squares and a distiller that trains nothing.

``python -m tests.service.fake_server --port N`` serves it, with its folders as the server's settings say.
"""

import argparse
from collections.abc import AsyncIterator

import uvicorn
from fastapi import FastAPI
from PIL import Image

from service.app import create_app
from service.engine.base import Drawn, DrawRequest, Kind, Load, ModelInfo, Preview, StepTaken, UnknownModel
from service.jobs.service import TableJobs
from service.settings import Settings, read_settings
from tests.service.jobs_help import job_settings
from weights.contracts import Diversity


class PaintingEngine:
    """Draws with ``emoji-base`` and with every student that the fake distiller has published, at once."""

    ready = True
    failure = None

    def __init__(self, settings: Settings) -> None:
        self._store = settings.store

    async def start(self) -> None:
        """There is nothing to load."""

    async def drain(self, seconds: float) -> None:
        """Nothing is ever under way."""

    async def stop(self) -> None:
        """There is nothing to give back."""

    def load(self) -> Load:
        return Load(pictures=0, seconds=0.0, resident={"emoji-base": 1000})

    async def stream(self, request: DrawRequest) -> AsyncIterator[Preview | Drawn]:
        for drawn in await self.generate(request):
            for step in range(1, min(request.previews, drawn.steps - 1) + 1):
                yield Preview(image=drawn.image, index=drawn.index, seed=drawn.seed, step=step, steps=drawn.steps)
            yield drawn

    async def models(self) -> list[ModelInfo]:
        students = sorted(path.stem for path in self._store.glob("*.drawable"))
        return [_info("emoji-base", "base", ()), *(_info(name, "student", (1, 2, 4)) for name in students)]

    async def generate(self, request: DrawRequest) -> list[Drawn]:
        infos = {info.id: info for info in await self.models()}
        if request.model is not None and request.model not in infos:
            raise UnknownModel(f"no model is named {request.model!r}")
        info = infos[request.model or "emoji-base"]
        steps = request.steps or info.default_steps
        return [
            Drawn(
                image=Image.new("RGB", (64, 64), (seed % 256, 60 * steps % 256, 255 if request.diversity else 0)),
                seed=seed,
                model=info.id,
                steps=steps,
                guidance_scale=1.0,
                diversity=Diversity(start=1.0) if request.diversity else None,
                evaluations=steps,
                seconds=0.01 * steps * len(request.seeds),
                index=index,
                path=tuple(StepTaken(leg=info.kind, t=1 - step / steps, guidance_scale=1.0) for step in range(steps)),
            )
            for index, seed in enumerate(request.seeds)
        ]


def _info(name: str, kind: Kind, steps: tuple[int, ...]) -> ModelInfo:
    return ModelInfo(
        id=name,
        kind=kind,
        family="stable_diffusion",
        created=0,
        steps=steps,
        max_steps=max(steps, default=100),
        default_steps=max(steps, default=50),
        default_guidance=1.0,
        size=64,
        base=None if kind == "base" else "emoji-base",
        method=None if kind == "base" else "fake",
    )


def make_jobs(settings: Settings) -> TableJobs:
    """The job service over these settings' folders, with the fake distiller."""
    jobs = job_settings(
        settings.jobs_dir,
        folder=settings.jobs_dir,
        store=settings.store,
        work=settings.job_work,
        reserved=settings.job_settings().reserved,
    )
    return TableJobs(jobs)


def make_app(settings: Settings) -> FastAPI:
    """The app over these settings' folders."""
    return create_app(settings, PaintingEngine(settings), make_jobs(settings))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    uvicorn.run(make_app(read_settings()), port=parser.parse_args().port, timeout_graceful_shutdown=5)
