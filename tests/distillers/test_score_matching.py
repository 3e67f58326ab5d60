"""Teacher score matching: whose answers are learned, where, and that a network of another size learns them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

import distillers.methods.score_matching as module
from distillers.methods.base import Setup, Turn
from distillers.methods.score_matching import ScoreMatching, ScoreMatchingConfig
from tests.distillers.conventions import in_every_convention
from tests.distillers.mixtures import VP, MixtureFeed, mixture_setup, step_of, trainer_of
from weights.diffusion.parameterizations import Prediction
from weights.diffusion.schedules import EDM, Schedule, add_noise

TURN = Turn(name="student", trains=("student",))


def smaller(setup: Setup) -> Setup:
    """Students on a narrower network with random weights."""
    torch.manual_seed(0)
    model = setup.new_network(True)

    def new_student() -> Any:
        student = model.with_random_network({"width": 24, "depth": 2})
        student.network.train()
        return student

    return replace(setup, new_student=new_student)


@pytest.mark.parametrize(("field", "value"), [("times", (0.0, 1.0)), ("times", (0.5, 0.2)), ("lr", 0.0)])
def test_a_bad_setting_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as error:
        ScoreMatchingConfig.model_validate({field: value})
    assert field in str(error.value)


def test_the_teachers_guided_answers_are_learned_at_the_times_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = mixture_setup("ring")
    method = ScoreMatching(ScoreMatchingConfig(guidance_scale=3.0, times=(0.4, 0.5), weighting="x0"), setup)
    asked = []
    right = module.guided_x0

    def spy(teacher: Any, x_t: Any, t: Any, cond: Any, uncond: Any, scale: float) -> torch.Tensor:
        asked.append((t, scale))
        return right(teacher, x_t, t, cond, uncond, scale)

    monkeypatch.setattr(module, "guided_x0", spy)
    step = step_of(setup, 16)
    cond = {"label": torch.zeros(16, dtype=torch.int64)}
    loss = method.loss(TURN, replace(step, batch=replace(step.batch, cond=cond, real_cond=cond)))
    t, scale = asked[0]
    assert scale == 3.0 and t.min() >= 0.4 - 1e-6 and t.max() <= 0.5 + 1e-6
    assert float(loss.loss.detach()) == pytest.approx(float(loss.metrics["student/gap"]) ** 2, rel=1e-4)


def gap(method: ScoreMatching, setup: Setup) -> float:
    """Root mean square between the student's and the teacher's answers on fresh states."""
    batch = MixtureFeed(setup, 2048).batch(10**6)
    assert batch.real is not None
    generator = torch.Generator().manual_seed(1)
    t = 0.1 + 0.8 * torch.rand(2048, generator=generator)
    x_t = add_noise(setup.teacher.schedule, batch.real, torch.randn(batch.real.shape, generator=generator), t)
    with torch.no_grad():
        difference = method.student.denoiser(x_t, t, batch.cond) - setup.teacher(x_t, t, batch.cond)
    return float(difference.square().mean().sqrt())


def gaps(schedule: Schedule, prediction: Prediction, folder: Path) -> tuple[float, float]:
    """`gap` before and after training."""
    setup = smaller(mixture_setup("line", schedule, prediction))
    weighting: Any = "edm" if isinstance(schedule, EDM) else "eps" if prediction == "eps" else "v"
    method = ScoreMatching(ScoreMatchingConfig(lr=5e-3, warmup=10, weighting=weighting), setup)
    assert sum(weight.numel() for weight in method.student.network.parameters()) < 10_000
    before = gap(method, setup)
    trainer = trainer_of(method, setup, folder, iterations=150, checkpoint_every=10_000, sample_every=10_000)
    trainer.run()
    with trainer.averaged():
        return before, gap(method, setup)


@in_every_convention
def test_a_smaller_network_learns_the_teacher(schedule: Schedule, prediction: Prediction, tmp_path: Path) -> None:
    before, after = gaps(schedule, prediction, tmp_path)
    assert after < 0.4 * before, (before, after)


def test_from_a_teacher_of_the_wrong_sign_it_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = module.guided_x0
    monkeypatch.setattr(module, "guided_x0", lambda *given: -right(*given))
    before, after = gaps(VP, "v", tmp_path)
    assert after > before
