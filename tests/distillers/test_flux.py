"""Jobs on FLUX.1's classes: whose teacher embeds guidance is asked at its scale in one evaluation, and so is the student."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distillers.adversary import prompt_vectors
from distillers.critics import guided_x0
from distillers.job import JobRun
from distillers.methods import method
from tests.helpers import picture_folder, tiny_flux_pipeline, tiny_schnell_pipeline
from weights.contracts import GuidanceConvention, StepSchedule
from weights.denoiser import GUIDANCE
from weights.diffusion.conversion import Converted
from weights.diffusion.guidance import EmbeddedGuidance
from weights.drawing import draw
from weights.events import EVENTS
from weights.families import TextToImage, load
from weights.pipelines import LORA_FILE
from weights.store import Store
from weights.students import load_student

TWO_STEPS = StepSchedule(timesteps=[1.0, 0.5])
FAST = {"student_lr": 1e-2, "warmup": 0}
DMD2 = {**FAST, "student_every": 1, "gan_weight": 0.1, "guidance_scale": 3.5}
SCM = {"lr": 1e-2, "tangent": "jvp", "guidance_scale": 3.5}
PAIRS = {"regression_iterations": 1, "regression_pairs": 2, "regression_steps": 2}
BLOCKS = ["transformer_blocks.0", "single_transformer_blocks.1"]
JOBS: dict[str, dict[str, Any]] = {
    "dmd2": {
        "method": "dmd2",
        "config": {**DMD2, "guidance_interval": [0.2, 0.8], **PAIRS},
    },
    "dmd2 with adapters": {
        "method": "dmd2",
        "lora": {"rank": 2, "shared_base": True},
        "config": {**DMD2, "fake_score_lora": True},
    },
    "consistency at a range": {
        "method": "consistency",
        "config": {"lr": 1e-2, "guidance_scale": 3.5, "guidance_range": [1, 5]},
    },
    "scm": {"method": "scm", "config": SCM},
    "ladd": {"method": "ladd", "config": {"blocks": BLOCKS, "guidance_scale": 3.5, "mismatched_share": 0.5}},
    "sid": {"method": "sid", "config": {**FAST, "student_every": 1, "guidance_scale": 3.5}},
}
SCHNELL = {"method": "score_matching", "config": {"guidance_scale": 1.5}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("jobs")
    tiny_flux_pipeline(made / "dev")
    tiny_schnell_pipeline(made / "schnell")
    picture_folder(made / "data")
    return made


@pytest.fixture(scope="module")
def base(folder: Path) -> TextToImage:
    return load("flux", folder / "dev")


def job(folder: Path, name: str, wanted: dict[str, Any], base: str = "dev") -> JobRun:
    student = f"{base}-{name.replace(' ', '-')}"
    raw = {
        "student": student,
        "base": str(folder / base),
        "data": {"source": str(folder / "data")},
        "train": {"iterations": 2, "batch_size": 2, "threads": 1, "precision": "float32", "log_every": 1},
        **wanted,
    }
    return JobRun(raw, folder / student, Store(folder / "store"), cache=folder / f"cache-{base}")


@pytest.mark.parametrize("name", JOBS)
def test_a_job_ends_in_a_student_that_draws_as_it_was_trained(folder: Path, base: TextToImage, name: str) -> None:
    run = job(folder, name, JOBS[name])
    assert run.run(resume=False) == 0, (run.folder / "events.jsonl").read_text()[-2000:]
    lines = (run.folder / "events.jsonl").read_text().splitlines()
    told = [event for line in lines if (event := EVENTS.validate_json(line)).kind == "progress" and event.step > 0]
    assert [event.step for event in told] == [1, 2]
    assert all(torch.tensor(list(event.metrics.values())).isfinite().all() for event in told)
    assert run.trainer is not None
    trained, stored = run.trainer.method.student, run.store.open(run.job.student)
    assert stored.manifest.guidance == GuidanceConvention(
        trained_scale=3.5, default_scale=3.5, embedded=(1, 5) if name.endswith("range") else (3.5, 3.5)
    )
    cond = base.encode_prompts(["red apple"])
    with run.trainer.averaged(), torch.no_grad():
        trained.network.eval()
        ours = draw(trained, cond, None, [5], TWO_STEPS, guidance_scale=3.5).latents
    drawn = draw(load_student(stored, base), cond, None, [5], TWO_STEPS, guidance_scale=3.5)
    assert drawn.evaluations == 2
    torch.testing.assert_close(drawn.latents, ours, atol=2e-2, rtol=0)  # stored in half precision
    plain = draw(base, cond, None, [5], TWO_STEPS, guidance_scale=3.5).latents
    assert (drawn.latents - plain).abs().max() > 1e-5


def test_adapters_are_named_as_diffusers_names_them(folder: Path) -> None:
    run = job(folder, "dmd2 with adapters", JOBS["dmd2 with adapters"])
    if not (folder / "store" / run.job.student).exists():
        assert run.run(resume=False) == 0
    layers = load_file(run.store.open(run.job.student).path / LORA_FILE)
    assert all(name.startswith("transformer.") for name in layers)
    assert any(".single_transformer_blocks.1." in name for name in layers)
    assert any(value.any() for name, value in layers.items() if "lora_B" in name)


def test_a_student_of_schnell_is_told_no_scale(folder: Path) -> None:
    run = job(folder, "plain", SCHNELL, base="schnell")
    assert run.run(resume=False) == 0
    assert run.store.open(run.job.student).manifest.guidance == GuidanceConvention(trained_scale=1.5, default_scale=1.0)


@pytest.mark.parametrize(
    ("base", "wanted", "says"),
    [
        ("schnell", {"method": "consistency", "config": {"guidance_range": [1, 9]}}, "conditioned on a guidance scale"),
        (
            "dev",
            {"method": "dmd2", "config": DMD2, "guide": {"student": "x", "scale": 2}},
            "are told their guidance scale",
        ),
    ],
)
def test_what_cannot_be_ends_the_job_with_its_reason(
    folder: Path, base: str, wanted: dict[str, Any], says: str
) -> None:
    run = job(folder, "refused", wanted, base=base)
    assert run.run(resume=False) == 1
    last = EVENTS.validate_json((run.folder / "events.jsonl").read_text().splitlines()[-1])
    assert last.kind == "failed" and says in last.message


def test_a_teacher_that_embeds_guidance_is_asked_once_at_its_scale(base: TextToImage) -> None:
    rows: list[int] = []
    x_t = torch.randn(3, *base.latent_shape(), generator=torch.Generator().manual_seed(0))
    t, cond = torch.tensor([0.1, 0.5, 0.9]), base.encode_prompts(["red apple", "blue dog", "a sun"])
    handle = base.network.register_forward_hook(lambda _, __, output: rows.append(len(output[0])))
    uncond = base.encode_prompts([""])
    asked = guided_x0(base.denoiser, x_t, t, cond, uncond, 3.5, (0.2, 0.8))
    fixed = guided_x0(Converted(base.denoiser, base.denoiser.schedule), x_t, t, cond, uncond, 3.5)
    handle.remove()
    assert rows == [3, 3]
    one, other = (EmbeddedGuidance(base.denoiser, scale)(x_t, t, cond) for scale in (1.0, 3.5))
    torch.testing.assert_close(asked, torch.stack([one[0], other[1], one[2]]))
    torch.testing.assert_close(fixed, other)


def test_a_scale_is_no_part_of_a_prompt(base: TextToImage) -> None:
    cond = base.encode_prompts(["red apple"])
    assert torch.equal(prompt_vectors({**cond, GUIDANCE: torch.ones(1)}), prompt_vectors(cond))


def test_disback_tells_the_scale_of_the_method_inside() -> None:
    config = method("disback").Config.model_validate({"settings": {"guidance_scale": 3.5}})
    assert config.teacher_scale == 3.5
