"""Consistency distillation: its pairs, its target, and that it finds the teacher's distribution in every convention."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

import distillers.methods.consistency as module
from distillers.critics import guided_x0
from distillers.methods import method
from distillers.methods.base import Setup, Turn
from distillers.methods.consistency import Consistency, ConsistencyConfig
from tests.distillers.conventions import in_every_convention
from tests.distillers.mixtures import VP, distances, mixture_setup, step_of, trainer_of
from weights.contracts import GuidanceConvention
from weights.denoiser import GUIDANCE, Cond, Denoiser
from weights.diffusion.parameterizations import Prediction
from weights.diffusion.schedules import Schedule
from weights.drawing import draw

B = 6
TURN = Turn(name="student", trains=("student",))


class Known(Denoiser):
    """Answers what it is told to, and remembers what it was asked."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.schedule, self.answer = VP, answer
        self.asked: list[tuple[Tensor, Tensor]] = []

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.asked.append((x_t, t))
        return self.answer.expand_as(x_t) + 0 * x_t


def build(setup: Setup | None = None, **config: Any) -> Consistency:
    return Consistency(ConsistencyConfig(**{"guidance_scale": 1.0, **config}), setup or mixture_setup())


def known(method: Consistency, teacher: float, student: float, target: float) -> tuple[Known, Known, Known]:
    """The method with three networks that always give the same picture."""
    parts = tuple(Known(torch.tensor(value)) for value in (teacher, student, target))
    method.teacher, method.student.denoiser = parts[0], parts[1]
    assert method.average is not None
    method.average.denoiser = parts[2]
    return parts  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("field", "value"),
    [("skip", 51), ("skip", 0), ("solver_steps", 0), ("target_decay", 1.0), ("betas", (0.9, 1.0)), ("huber", -1.0)],
)
def test_a_bad_setting_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as error:
        ConsistencyConfig.model_validate({field: value})
    assert field in str(error.value)


@pytest.mark.parametrize("name", ["consistency", "tscd", "scm", "hybrid", "score_matching"])
def test_a_student_that_is_only_told_its_states_times_is_served_so(name: str) -> None:
    with pytest.raises(
        ValidationError, match=r"schedules: 1 has conditioning \[0.4\].* \[1.0\]: leave conditioning out"
    ):
        method(name).Config(schedules={1: {"timesteps": [1.0], "conditioning": [0.4]}})


def test_it_needs_pictures_and_says_what_it_baked_in() -> None:
    method = build(guidance_scale=4.0, lr=2e-4, warmup=3)
    assert "images" in str(Consistency.needs_pictures(method.config))
    assert (method.guidance().trained_scale, method.guidance().default_scale) == (4.0, 1.0)
    assert method.turns(5) == [TURN]
    optimizer = method.trained()["student"].optimizer
    assert (optimizer.lr, optimizer.warmup) == (2e-4, 3)


@pytest.mark.parametrize("skip", [1, 3])
def test_the_states_lie_on_the_teachers_trajectory(skip: int) -> None:
    """Where the teacher sees one point, DDIM is exact: the lower state has the same noise, at a time ``skip`` lower."""
    method = build(solver_steps=10, skip=skip)
    _, student, target = known(method, teacher=0.5, student=0.5, target=0.5)
    step = step_of(method.setup, B)
    step = replace(step, batch=replace(step.batch, real=torch.full((B, 1, 1, 1), 0.5)))
    assert float(method.loss(TURN, step).loss) == 0
    (x_t, t), (x_s, s) = student.asked[0], target.asked[0]
    grid = t * 10
    assert torch.allclose(grid, grid.round(), atol=1e-5)
    assert grid.min() >= skip
    apart = t - s
    later = t > skip / 10 + 1e-6  # elsewhere s is 0, where the target is not asked for its answer
    assert torch.allclose(apart[later], torch.full_like(apart[later], skip / 10), atol=1e-6)
    noises = [(x.flatten() - 0.5 * VP.alpha(u)) / VP.sigma(u) for x, u in ((x_t, t), (x_s, s))]
    assert torch.allclose(noises[0][later], noises[1][later], atol=1e-4)


def test_at_the_trajectorys_end_the_target_is_the_picture_itself() -> None:
    method = build(solver_steps=1, huber=0.0)
    known(method, teacher=0.25, student=1.0, target=99.0)
    assert float(method.loss(TURN, step_of(method.setup, B)).loss) == pytest.approx(0.75**2)


def test_before_it_the_target_is_the_average() -> None:
    method = build(solver_steps=2, huber=0.0)
    _, student, _ = known(method, teacher=0.25, student=1.0, target=3.0)
    loss = float(method.loss(TURN, step_of(method.setup, B, iteration=1)).loss)
    last = int((student.asked[0][1] < 0.75).sum())  # rows whose lower state is the picture
    assert 0 < last < B
    assert loss == pytest.approx(((B - last) * 2.0**2 + last * 0.75**2) / B)


def test_the_average_follows_and_at_zero_decay_is_the_student() -> None:
    method = build(target_decay=0.9)
    assert method.average is not None
    before = {name: value.clone() for name, value in method.state().items()}
    with torch.no_grad():
        for weight in method.student.network.parameters():
            weight.add_(1.0)
    method.after_step(TURN, 0)
    for name, value in method.state().items():
        assert torch.allclose(value, before[name] + 0.1, atol=1e-6)
    lone = build(target_decay=0.0)
    assert lone.target is lone.student.denoiser
    assert lone.state() == {}
    lone.after_step(TURN, 0)


def test_guidance_reaches_the_solver() -> None:
    losses = []
    for scale in (1.0, 3.0):
        method = build(mixture_setup("ring"), guidance_scale=scale)
        step = step_of(method.setup, B)
        cond = {"label": torch.zeros(B, dtype=torch.int64)}
        step = replace(step, batch=replace(step.batch, cond=cond, real_cond=cond))
        losses.append(float(method.loss(TURN, step).loss.detach()))
    assert abs(losses[0] - losses[1]) > 1e-6


# Guidance that the student is told


def told(setup: Setup, **config: Any) -> Consistency:
    return build(setup, **{"guidance_range": (1.0, 4.0), "guidance_scale": 2.0, **config})


@pytest.mark.parametrize(("field", "value"), [("guidance_range", (4.0, 1.0)), ("guidance_scale", 5.0)])
def test_a_bad_range_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as error:
        ConsistencyConfig.model_validate({"guidance_range": (1.0, 4.0), "guidance_scale": 2.0, field: value})
    assert field in str(error.value)


def test_a_student_that_is_told_its_guidance_says_so() -> None:
    method = told(mixture_setup())
    assert method.guidance() == GuidanceConvention(trained_scale=2.0, default_scale=2.0, embedded=(1.0, 4.0))
    assert method.student.denoiser.embeds_guidance and method.target.embeds_guidance
    assert "adapters" in str(Consistency.needs_whole_network(method.config))
    assert Consistency.needs_whole_network(build().config) is None


def test_every_picture_has_a_scale_of_its_own_and_the_teacher_follows_it() -> None:
    method = told(mixture_setup("ring"))
    step = step_of(method.setup, 64)
    cond = method._told({"label": torch.zeros(64, dtype=torch.int64)}, step)
    scales = cond[GUIDANCE]
    assert scales.min() >= 1 and scales.max() <= 4 and scales.std() > 0.5
    real, t = step.batch.real, torch.full((64,), 0.9)
    assert real is not None
    x_t, guided, _ = method._solve(real, cond, t, t - 0.1, step)
    for row in (0, 1):
        label, scale = {"label": torch.zeros(1, dtype=torch.int64)}, float(scales[row])
        alone = guided_x0(method.teacher, x_t[row:][:1], t[:1], label, method.setup.uncond, scale)
        assert torch.allclose(guided[row], alone[0], atol=1e-5)


def test_one_student_learns_every_scale(tmp_path: Path) -> None:
    """Guided further, a class's pictures lie closer together: the exact teacher's do, and the student's, as it is told."""
    setup = mixture_setup("ring")
    torch.manual_seed(0)
    method = told(setup, solver_steps=16, lr=2e-3, huber=0.03, target_decay=0.9)
    trainer = trainer_of(method, setup, tmp_path, iterations=250, checkpoint_every=10_000, sample_every=10_000)
    trainer.run()
    cond, count = {"label": torch.arange(8).repeat_interleave(64)}, 8 * 64
    with trainer.averaged(), torch.no_grad():
        drawn = [
            draw(method.student, cond, None, range(count), method.schedules()[1], guidance_scale=scale).latents
            for scale in (1.0, 2.0, 4.0)
        ]
    radii = [latents.flatten(1).norm(dim=1).mean().item() for latents in drawn]
    assert radii[0] < radii[1] < radii[2], "away from the other classes is outwards on the ring"


# Convergence


def distance_after(iterations: int, folder: Path, setup: Setup, **config: Any) -> tuple[float, float]:
    """The one-step student's distance to the data before and after training."""
    torch.manual_seed(0)
    method = build(setup, **{"solver_steps": 16, "lr": 2e-3, "huber": 0.03, "target_decay": 0.9, **config})
    return distances(method, setup, folder, iterations)


@in_every_convention
def test_the_student_finds_the_teachers_distribution(
    schedule: Schedule, prediction: Prediction, tmp_path: Path
) -> None:
    before, after = distance_after(250, tmp_path, mixture_setup("line", schedule, prediction))
    # An error of eps is one of x0 times sigma / alpha, 14 at the first time: it goes there more slowly.
    assert after < (0.7 if prediction == "eps" else 0.35) * before, (before, after)


def test_a_solver_that_goes_the_wrong_way_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = module.ddim_step

    def wrong(x_t: Tensor, x0: Tensor, t: Tensor, s: Tensor, schedule: Schedule) -> Tensor:
        return right(x_t, x0, t, 2 * t - s, schedule)

    monkeypatch.setattr(module, "ddim_step", wrong)
    before, after = distance_after(250, tmp_path, mixture_setup())
    assert after > 0.5 * before
