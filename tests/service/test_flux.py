"""FLUX.1's classes behind the server: the engine's pictures are the library's, and what OpenVINO draws with the network."""

from pathlib import Path

import pytest
import torch

from service.engine.backends.cache import Cache
from service.engine.backends.openvino_backend import OpenVinoBackend
from service.engine.base import DiversityWish, Drawn
from service.engine.calls import to_pixels
from service.engine.names import base_info
from service.engine.plan import plan_base
from service.engine.step_engine import StepEngine
from tests.helpers import tiny_flux_pipeline
from tests.service.conftest import TinyBase
from tests.service.engine_help import Harness, request
from weights.contracts import Diversity, GuidanceConvention, StepSchedule
from weights.denoiser import GUIDANCE
from weights.drawing import draw, draw_base
from weights.families import TextToImage, load

LEVEL = 2 / 255
"""One level of 8 bits, in pictures of [-1, 1]."""
FOUR = StepSchedule(timesteps=[1.0, 0.75, 0.5, 0.25])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux_pipeline(tmp_path_factory.mktemp("base"), num_layers=1, num_single_layers=1)


@pytest.fixture(scope="module")
def base(folder: Path) -> TextToImage:
    return load("flux", folder)


def test_the_engines_pictures_are_those_of_the_library(base: TextToImage, folder: Path, tmp_path: Path) -> None:
    """Also after a first step of the base's without the prompt, which a network that embeds guidance is told at scale 1."""
    harness = Harness(TinyBase(folder, base), tmp_path)
    guidance = GuidanceConvention(trained_scale=3.5, default_scale=3.5, embedded=(3.5, 3.5))
    harness.publish(family="flux", guidance=guidance, schedules={4: FOUR})
    wish = DiversityWish(base_steps=2, base_guidance=2.5, unprompted=0.2)

    async def scenario(engine: StepEngine) -> list[Drawn]:
        asked = (request(), request(diversity=wish), request(model=str(folder), steps=2))
        return [(await engine.generate(each))[0] for each in asked]

    drawn = harness.run(scenario)
    assert [each.evaluations for each in drawn] == [4, 5, 2]
    student = base.load_network(harness.store.open("tiny").path)
    diversity = Diversity(base_steps=2, base_guidance=2.5, unprompted=0.2)
    with torch.inference_mode():
        cond, empty = base.encode_prompts(["red apple"]), base.encode_prompts([""])
        plain = draw(student, cond, None, [1], FOUR, guidance_scale=3.5)
        varied = draw(student, cond, empty, [1], FOUR, guidance_scale=3.5, base=base, diversity=diversity)
        whole = draw_base(base, cond, None, [1], 2, 3.5)
        pictures = [to_pixels(base.decode(each.latents))[0] for each in (plain, varied, whole)]
    assert [each.image.tobytes() for each in drawn] == [picture.tobytes() for picture in pictures]


@torch.inference_mode()
def test_openvino_draws_the_same_at_every_size_and_scale(
    base: TextToImage, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cache = Cache(tmp_path_factory.mktemp("cache"))
    prepared = OpenVinoBackend(batches=(2,), cache=cache, precision="f32", threads=1).prepare(base)
    assert set(prepared.programs) == {"network", "decoder"}, "both were converted"
    cond = base.encode_prompts(["red apple", "blue dog"])
    for height, width, scale in ((32, 32, 3.5), (48, 16, 2.0)):
        told = {**cond, GUIDANCE: torch.tensor([scale, 1.0])}
        x_t = torch.randn(2, *base.latent_shape(height, width), generator=torch.Generator().manual_seed(0))
        ours, theirs = (each.denoiser(x_t, torch.tensor([0.7, 1.0]), told) for each in (prepared, base))
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
        assert (prepared.decode(x_t) - base.decode(x_t)).abs().max() / LEVEL <= 2


def test_a_base_that_embeds_guidance_is_planned_at_one_evaluation_a_step(base: TextToImage) -> None:
    plan = plan_base(request(model="flux", steps=5), base_info("flux", base))
    assert (plan.guidance_scale, plan.evaluations, plan.needs_uncond) == (3.5, 5, False)
