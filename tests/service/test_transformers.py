"""Transformers behind the server: what OpenVINO draws with them, also at other sizes, and a base that is not there."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from service.engine.backends.cache import Cache
from service.engine.backends.openvino_backend import OpenVinoBackend
from service.engine.startup import families_of_bases
from service.settings import BadSettings, Settings
from tests.helpers import tiny_sana_pipeline, tiny_sd3_pipeline
from weights.contracts import Diversity, StepSchedule
from weights.drawing import draw
from weights.families import TextToImage, load

LEVEL = 2 / 255
"""One level of 8 bits, in pictures of [-1, 1]."""
PIPELINES = {"stable_diffusion_3": tiny_sd3_pipeline, "sana": tiny_sana_pipeline}


@pytest.fixture(scope="module", params=PIPELINES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextToImage:
    return load(request.param, PIPELINES[request.param](tmp_path_factory.mktemp("base"), num_layers=1))


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> OpenVinoBackend:
    cache = Cache(tmp_path_factory.mktemp("cache"))
    return OpenVinoBackend(batches=(1, 2), cache=cache, precision="f32", threads=1)


@pytest.fixture(scope="module")
def prepared(base: TextToImage, backend: OpenVinoBackend) -> TextToImage:
    made = backend.prepare(base)
    assert set(made.programs) == {"network", "decoder"}, "both were converted"
    return made


@pytest.mark.parametrize("base", ["stable_diffusion_3"], indirect=True)
@torch.inference_mode()
def test_a_student_draws_the_same_pixels_after_its_bases_first_step(
    base: TextToImage, backend: OpenVinoBackend, prepared: TextToImage
) -> None:
    student = base.copy()
    for weight in student.network.parameters():
        weight.mul_(1.05)
    schedule, diversity = StepSchedule(timesteps=[1.0, 0.5]), Diversity(base_steps=1, base_guidance=3.0, skip=1)

    def pictures(student: TextToImage, base: TextToImage) -> Tensor:
        cond, uncond = base.encode_prompts(["red apple", "blue dog"]), base.encode_prompts([""])
        drawn = draw(student, cond, uncond, [1, 2], schedule, base=base, diversity=diversity)
        return base.decode(drawn.latents)

    ours, theirs = pictures(backend.prepare(student, prepared), prepared), pictures(student, base)
    assert (ours - theirs).abs().max() / LEVEL <= 2


@torch.inference_mode()
def test_positions_are_those_of_the_size_that_is_drawn(base: TextToImage, prepared: TextToImage) -> None:
    """The network was converted at one size; SD3's cuts its table of positions to each."""
    cond = base.encode_prompts(["red apple"])
    for height, width in ((48, 16), (16, 32)):
        x_t = torch.randn(1, *base.latent_shape(height, width), generator=torch.Generator().manual_seed(0))
        ours, theirs = (each.denoiser(x_t, torch.tensor([0.7]), cond) for each in (prepared, base))
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
        assert (prepared.decode(x_t) - base.decode(x_t)).abs().max() / LEVEL <= 2


@pytest.mark.parametrize("family", ["auto", "stable_diffusion_xl", *PIPELINES])
def test_a_base_that_is_not_there_stops_the_start(tmp_path: Path, family: str) -> None:
    settings = Settings(family=family, bases=[str(tmp_path / "gone")], store=tmp_path / "store")
    with pytest.raises(BadSettings, match=r"FEWSTEP_BASES: .*gone"):
        families_of_bases(settings)
