"""An engine that paints without a model, the app around it, and a tiny real base with a student."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

from service.app import create_app
from service.engine.base import Drawn, DrawRequest, Kind, Load, ModelInfo, Preview, StepTaken
from service.settings import Settings
from weights.contracts import Diversity, StepSchedule, StudentManifest
from weights.families import TextToImage, load
from weights.store import Store
from weights.students import base_reference

STUDENT_INFO = ModelInfo(
    id="student",
    kind="student",
    family="stable_diffusion",
    created=1_700_000_000,
    steps=(1, 4),
    max_steps=4,
    default_steps=4,
    default_guidance=1.0,
    size=32,
    base="org/base",
    method="dmd2",
    diversity=Diversity(base_guidance=0.0),
    licence="Apache-2.0",
    metrics={"kernel_distance": 0.1},
)
BASE_INFO = ModelInfo(
    id="org/base",
    kind="base",
    family="stable_diffusion",
    created=0,
    steps=(),
    max_steps=100,
    default_steps=50,
    default_guidance=2.0,
    size=32,
)


@pytest.fixture(autouse=True, scope="session")
def called_testserver() -> Iterator[None]:
    """Servers here answer to the name that starlette's test client calls them by; test_hosts.py is about the others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_ALLOWED_HOSTS", '["testserver"]')
        yield


@dataclass
class FakeEngine:
    """Paints squares; records what it was asked for, and fails or waits on demand."""

    ready: bool = True
    failure: str | None = None
    error: Exception | None = None
    asked: list[DrawRequest] = field(default_factory=list)
    life: list[str] = field(default_factory=list)
    hold: Any = None
    """An async function to wait for before drawing."""
    late_error: Exception | None = None
    dropped: threading.Event = field(default_factory=threading.Event)
    drawing: int = 0
    """Pictures admitted and not done."""

    async def start(self) -> None:
        self.life.append("engine started")

    async def drain(self, seconds: float) -> None:
        self.life.append("engine drained")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.drawing:  # noqa: ASYNC110
                    await asyncio.sleep(0.005)

    def load(self) -> Load:
        return Load(pictures=self.drawing, seconds=0.5 * self.drawing, resident={"org/base": 1000, "student": 200})

    async def stop(self) -> None:
        self.life.append("engine stopped")

    async def models(self) -> list[ModelInfo]:
        return [BASE_INFO, STUDENT_INFO]

    async def generate(self, request: DrawRequest) -> list[Drawn]:
        self.asked.append(request)
        if self.error is not None:
            raise self.error
        await self._held(len(request.seeds))
        return [
            Drawn(
                image=Image.new("RGB", (32, 32), (seed % 256, 40, 200)),
                seed=seed,
                model=request.model or "student",
                steps=request.steps or 4,
                guidance_scale=1.0,
                diversity=Diversity(start=1.0) if request.diversity else None,
                evaluations=4,
                seconds=0.01,
                index=index,
                path=_path(request),
            )
            for index, seed in enumerate(request.seeds)
        ]

    async def _held(self, pictures: int) -> None:
        if self.hold is None:
            return
        self.drawing += pictures
        try:
            await self.hold()
        except BaseException:
            self.dropped.set()
            raise
        finally:
            self.drawing -= pictures

    async def stream(self, request: DrawRequest) -> AsyncIterator[Preview | Drawn]:
        """Every picture's previews, which get brighter, then the picture; the last picture comes first.

        ``hold`` is waited for before each picture, ``error`` raised before the first, and ``late_error`` behind it.
        """
        self.asked.append(request)
        if self.error is not None:
            raise self.error
        steps = len(_path(request))
        shown = min(request.previews, steps - 1)
        for index in reversed(range(len(request.seeds))):
            await self._held(1)
            (drawn,) = await FakeEngine().generate(replace(request, seeds=(request.seeds[index],)))
            for step in range(1, shown + 1):
                image = Image.new("RGB", drawn.image.size, (step, step, step))
                yield Preview(image=image, index=index, seed=drawn.seed, step=step, steps=steps)
            yield replace(drawn, index=index)
            if self.late_error is not None:
                raise self.late_error


def _path(request: DrawRequest) -> tuple[StepTaken, ...]:
    steps = request.steps or 4
    legs: list[Kind] = ["base" if request.diversity and step == 0 else "student" for step in range(steps)]
    return tuple(StepTaken(leg=leg, t=1 - step / steps, guidance_scale=1.0) for step, leg in enumerate(legs))


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        store=tmp_path / "store", jobs_dir=tmp_path / "jobs", max_prompt_chars=100, max_body_bytes=4096, threads=1
    )


@pytest.fixture
def client(settings: Settings, engine: FakeEngine) -> Iterator[TestClient]:
    with TestClient(create_app(settings, engine), raise_server_exceptions=False) as client:
        yield client


SCHEDULES = {
    1: StepSchedule(timesteps=[1.0]),
    2: StepSchedule(timesteps=[1.0, 0.5]),
    4: StepSchedule(timesteps=[1.0, 0.75, 0.5, 0.25]),
}


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str | None, list[tuple[int, ...]]]]:
    """What torch compiles from here on, the mode it was asked for and its inputs' shapes; it is run as it is."""
    real = torch.compile
    made: list[tuple[str | None, list[tuple[int, ...]]]] = []

    @cache  # torch's compilers of one mode are equal, or models would not share what is compiled
    def counted(mode: str | None) -> Any:
        def compiled(graph: Any, inputs: Any) -> Any:
            made.append((mode, [tuple(each.shape) for each in inputs if isinstance(each, torch.Tensor)]))
            return graph.forward

        return compiled

    def compiling(module: torch.nn.Module, *, mode: str | None, **options: Any) -> Any:
        return real(module, backend=counted(mode), **options)

    monkeypatch.setattr(torch, "compile", compiling)
    return made


@dataclass(frozen=True)
class TinyBase:
    """A real diffusers pipeline folder with random weights, and the same loaded."""

    folder: Path
    model: TextToImage

    @property
    def id(self) -> str:
        return str(self.folder)

    def publish(self, store: Store, work: Path, name: str = "tiny", change: float = 1.05, **fields: Any) -> None:
        """A student of it: the base's weights times ``change``."""
        student = self.model.copy()
        with torch.no_grad():
            for parameter in student.network.parameters():
                parameter.mul_(change)
        student.save_network(work, torch.float32)
        manifest = {
            "name": name,
            "created_at": datetime.now(UTC),
            "method": "test",
            "family": "stable_diffusion",
            "base": base_reference(self.id),
            "schedules": SCHEDULES,
            "code_version": "test",
            **fields,
        }
        store.publish(StudentManifest.model_validate(manifest), work, replace=True)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> TinyBase:
    from tests.helpers import tiny_pipeline  # diffusers takes seconds to import, and most of these tests need none

    folder = tiny_pipeline(tmp_path_factory.mktemp("tiny-base"))
    return TinyBase(folder, load("stable_diffusion", folder))


@pytest.fixture
def loaded_once(tiny_base: TinyBase, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny base is in memory already; engines here need not load it again. (test_server.py lets one load it.)"""
    from service.engine import making

    def load_base(family: str, source: str, device: torch.device, dtype: torch.dtype) -> TextToImage:
        return tiny_base.model if source == tiny_base.id else load(family, source, device, dtype)

    monkeypatch.setattr(making, "load", load_base)
