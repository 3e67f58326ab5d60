"""The bundled models through torch's backend: on the CPU, and in every way of a GPU's where there is one."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor

from service.engine.base import DiversityWish, Drawn, DrawRequest
from service.engine.startup import set_up
from service.engine.step_engine import StepEngine
from service.settings import Settings
from tests.service.engine_help import pixels
from weights.bundled import STUDENTS
from weights.drawing import draw, draw_base
from weights.families import load
from weights.store import Store
from weights.students import load_student

T = TypeVar("T")

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
xformers = pytest.mark.skipif(find_spec("xformers") is None, reason="needs xformers")
MODES = [
    pytest.param({"device": "cpu", "dtype": "float32"}, id="cpu"),
    pytest.param({"device": "cuda", "dtype": "float32", "attention": "sdpa"}, id="cuda-float32", marks=gpu),
    pytest.param({"device": "cuda", "attention": "sdpa"}, id="cuda-float16", marks=gpu),
    pytest.param({"device": "cuda", "dtype": "bfloat16", "attention": "sdpa"}, id="cuda-bfloat16", marks=gpu),
    pytest.param({"device": "cuda", "compile": True, "attention": "sdpa"}, id="cuda-graphs", marks=gpu),
    pytest.param({"device": "cuda", "attention": "xformers"}, id="cuda-xformers", marks=[gpu, xformers]),
]
ASKED = [
    DrawRequest(prompt="fox face, fluent 3d emoji", model="emoji-average", seeds=(1, 2), steps=4),
    DrawRequest(prompt="red apple, noto emoji", model="emoji-average", seeds=(3,), steps=1),
    DrawRequest(prompt="red apple, noto emoji", model="emoji-average", seeds=(4,), steps=2, guidance_scale=2.0),
    DrawRequest(prompt="animals", model="emoji-average", seeds=(5,), steps=4, diversity=DiversityWish()),
    DrawRequest(prompt="tulip, twemoji", model="emoji-base", seeds=(6,), steps=3, guidance_scale=2.0),
]


def run(mode: dict[str, Any], folder: Path, scenario: Callable[[StepEngine], Awaitable[T]]) -> T:
    settings = Settings(backend="torch", store=folder / "store", jobs_dir=folder / "jobs", max_batch=4, **mode)

    async def whole() -> T:
        engine = StepEngine.from_settings(settings)
        await engine.start()
        try:
            async with asyncio.timeout(600):  # a GPU's graphs are compiled meanwhile
                while not engine.ready:
                    assert engine.failure is None, engine.failure
                    await asyncio.sleep(0.02)
                return await scenario(engine)
        finally:
            await engine.stop()

    return asyncio.run(whole())


@pytest.fixture(scope="module")
def expected() -> list[np.ndarray]:
    """Each request's pictures, ``(n, H, W, 3)`` in 0..255, as the library draws them in float32 on the CPU."""
    base, folder = load("stable_diffusion", "emoji-base"), Store(STUDENTS).open("emoji-average")
    student, manifest = load_student(folder, base), folder.manifest

    def latents(asked: DrawRequest) -> Tensor:
        assert asked.steps is not None
        cond, uncond = base.encode_prompts([asked.prompt] * len(asked.seeds)), base.encode_prompts([""])
        scale = 1.0 if asked.guidance_scale is None else asked.guidance_scale
        if asked.model == "emoji-base":
            return draw_base(base, cond, uncond, asked.seeds, asked.steps, scale).latents
        diversity = None if asked.diversity is None else manifest.diversity
        schedule = manifest.schedules[asked.steps]
        return draw(
            student, cond, uncond, asked.seeds, schedule, guidance_scale=scale, base=base, diversity=diversity
        ).latents

    with torch.inference_mode():
        drawn = [base.decode(latents(asked)) for asked in ASKED]
    return [((pictures / 2 + 0.5).clamp(0, 1) * 255).permute(0, 2, 3, 1).numpy() for pictures in drawn]


@pytest.mark.parametrize("mode", MODES)
def test_pictures_are_those_of_the_library(mode: dict[str, Any], tmp_path: Path, expected: list[np.ndarray]) -> None:
    async def scenario(engine: StepEngine) -> list[list[Drawn]]:
        return await asyncio.gather(*map(engine.generate, ASKED))

    for asked, drawn, theirs in zip(ASKED, run(mode, tmp_path, scenario), expected, strict=True):
        apart = np.abs(np.stack([np.asarray(each.image, np.float32) for each in drawn]) - theirs)
        if mode.get("dtype") == "float32":
            assert apart.max() <= 2, asked
        else:
            assert apart.mean() < 3, asked


@pytest.mark.parametrize("mode", MODES)
def test_a_picture_can_have_the_same_bits_in_any_company(mode: dict[str, Any], tmp_path: Path) -> None:
    own = DrawRequest(prompt="tulip", model="emoji-average", seeds=(7,), steps=2, deterministic=True)

    async def scenario(engine: StepEngine) -> tuple[list[Drawn], list[Drawn]]:
        alone = await engine.generate(own)
        among, *_ = await asyncio.gather(*map(engine.generate, [own, *ASKED]))
        return alone, among

    alone, among = run(mode, tmp_path, scenario)
    assert pixels(alone) == pixels(among)


@pytest.fixture
def rounding() -> Iterator[Any]:
    """How cuDNN's convolutions compute in float32, put back afterwards."""
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    yield conv
    conv.fp32_precision = before


def test_a_gpu_computes_float32_in_full(rounding: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    rounding.fp32_precision = "tf32"
    set_up(torch.device("cpu"))
    assert rounding.fp32_precision == "tf32"
    set_up(torch.device("cuda"))
    assert rounding.fp32_precision == "ieee"
