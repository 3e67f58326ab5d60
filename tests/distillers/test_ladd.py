"""LADD: what its student starts from and is compared with, and that it finds the data's distribution in every convention."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

import distillers.adversary as module
from distillers.methods.base import Setup, Turn, Workspace
from distillers.methods.ladd import LADD, LADDConfig, starting_states
from distillers.seeds import generator_of, seed_of
from tests.distillers.conventions import in_every_convention
from tests.distillers.mixtures import HINGE_SWAPPED, VP, distances, mixture_setup, step_of
from weights.contracts import StepSchedule
from weights.diffusion.parameterizations import Prediction
from weights.diffusion.schedules import EDM, RectifiedFlow, Schedule

B = 6
STUDENT = Turn(name="student", trains=("student",))
CRITIC = Turn(name="critic", trains=("heads",))
ONE = {1: StepSchedule(timesteps=[1.0])}
FOUR = {4: StepSchedule(timesteps=[1.0, 0.75, 0.5, 0.25])}


def build(setup: Setup | None = None, **config: Any) -> LADD:
    torch.manual_seed(0)
    return LADD(LADDConfig(**config), setup or mixture_setup())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("noise_share", 1.5),
        ("student_every", 0),
        ("pictures", "student"),
        ("teacher_steps", 0),
        ("student_lr", 0.0),
        ("student_betas", (0.0, 1.0)),
        ("mismatched_share", -0.1),
    ],
)
def test_a_bad_setting_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as error:
        LADDConfig.model_validate({field: value})
    assert field in str(error.value)


def test_student_and_heads_step_in_turn_each_with_its_optimizer() -> None:
    method = build(student_lr=1e-4, head_lr=2e-4, head_betas=(0.5, 0.9), weight_decay=0.1, warmup=3)
    assert method.turns(0) == method.turns(1) == [STUDENT, CRITIC]
    assert build(student_every=3).turns(1) == [CRITIC]
    assert build(student_every=3).turns(2) == [STUDENT, CRITIC]
    trained = method.trained()
    assert (trained["student"].optimizer.lr, trained["student"].optimizer.betas) == (1e-4, (0.0, 0.999))
    assert (trained["heads"].optimizer.lr, trained["heads"].optimizer.betas) == (2e-4, (0.5, 0.9))
    assert {(each.optimizer.weight_decay, each.optimizer.warmup) for each in trained.values()} == {(0.1, 3)}


# What the student starts from


@pytest.mark.parametrize("schedule", [VP, EDM(), RectifiedFlow()], ids=lambda each: type(each).__name__)
def test_it_starts_from_noise_alone_or_from_a_picture_at_a_later_step(schedule: Schedule) -> None:
    steps = [*FOUR.values(), StepSchedule(timesteps=[0.9, 0.6], conditioning=[0.4, 0.3])]
    real, noise = torch.full((6000, 1, 1, 1), 3.0), torch.randn(6000, 1, 1, 1)
    x_t, told = starting_states(real, noise, schedule, steps, 0.25, generator_of("states"))
    time_of = {0.4: 0.9, 0.3: 0.6}
    t = torch.tensor([time_of.get(round(float(value), 4), float(value)) for value in told], dtype=torch.float64)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    noisy = (t > 0.8).reshape(-1, 1, 1, 1)
    alone = torch.hypot(alpha, sigma).reshape(-1, 1, 1, 1) * noise
    mixed = alpha.reshape(-1, 1, 1, 1) * real + sigma.reshape(-1, 1, 1, 1) * noise
    torch.testing.assert_close(x_t, torch.where(noisy, alone, mixed).float())
    shares = {value: float((t == t.new_tensor(value).float()).double().mean()) for value in (1.0, 0.75, 0.5, 0.25)}
    assert shares[1.0] == pytest.approx(0.125, abs=0.02)
    assert [shares[value] for value in (0.75, 0.5, 0.25)] == pytest.approx([0.75 / 4] * 3, abs=0.02)


def test_one_step_alone_always_starts_from_noise() -> None:
    noise = torch.randn(50, 1, 1, 1)
    x_t, told = starting_states(torch.ones_like(noise), noise, VP, list(ONE.values()), 0.0, generator_of("states"))
    assert torch.equal(x_t, noise) and torch.equal(told, torch.ones(50))


def test_the_heads_judge_the_samples_of_the_students_turn() -> None:
    method, scratch, seen = build(), {}, []  # type: ignore[var-annotated]
    method.student.network.register_forward_hook(lambda *_: seen.append(1))
    method.loss(STUDENT, step_of(method.setup, B, name="student", scratch=scratch))
    assert len(seen) == 1
    assert not scratch["samples"][0].requires_grad
    method.loss(CRITIC, step_of(method.setup, B, name="critic", scratch=scratch))
    assert len(seen) == 1
    method.loss(CRITIC, step_of(method.setup, B, name="critic"))
    assert len(seen) == 2, "where the student did not step, it is asked again"


def test_real_pictures_keep_their_own_conditions() -> None:
    method = build(mixture_setup("ring"))
    step = step_of(method.setup, B)
    own = {"label": torch.arange(B)}
    step = replace(step, batch=replace(step.batch, real_cond=own))
    method.loss(STUDENT, step)
    _, real, cond = step.scratch["samples"]
    assert real is step.batch.real and cond is own


# The teacher's pictures in the data's place


def test_pictures_of_the_data_are_needed_unless_the_teacher_makes_them() -> None:
    assert "pictures" in str(LADD.needs_pictures(LADDConfig()))
    assert LADD.needs_pictures(LADDConfig(pictures="teacher")) is None
    assert build().guidance().trained_scale == 1.0
    assert build(pictures="teacher", guidance_scale=3.0).guidance().trained_scale == 3.0


def test_the_teachers_pictures_are_made_once_and_take_the_datas_place(tmp_path: Path) -> None:
    method = build(pictures="teacher", teacher_pictures=70, teacher_steps=8, guidance_scale=1.0)
    made: list[int] = []
    workspace = Workspace(
        folder=tmp_path,
        prompts=2,
        conditions=lambda rows: {"label": rows},
        seed=lambda *parts: seed_of(0, *parts),
        tick=lambda _what, done, _total: made.append(done),
    )
    method.prepare(workspace)
    assert made == [0, 64, 70]
    step = step_of(method.setup, 64)
    step = replace(step, batch=replace(step.batch, real=None, real_cond=None))
    assert torch.isfinite(method.loss(STUDENT, step).loss)
    x, real, cond = step.scratch["samples"]
    means = torch.where(cond["label"] == 0, -0.5, 1.0)
    assert x.shape == real.shape
    assert (real.flatten() - means).abs().max() < 1.0, "each picture lies beside the condition it was drawn with"


# Convergence

QUICK = {
    "student_lr": 1e-3, "head_lr": 2e-3, "student_betas": (0.0, 0.99), "head_betas": (0.0, 0.99), "warmup": 10,
    "schedules": ONE,
}  # fmt: skip


def distances_after(iterations: int, folder: Path, setup: Setup, **config: Any) -> tuple[float, float]:
    """The student's distance to the data before and after training, at the step count where it is largest."""
    method = build(setup, **{**QUICK, **config})
    return distances(method, setup, folder, iterations, list(method.schedules().values()), batch_size=128)


@in_every_convention
def test_the_student_finds_the_datas_distribution(schedule: Schedule, prediction: Prediction, tmp_path: Path) -> None:
    # An error of eps is one of x0 times sigma / alpha, 14 at the first time: so much smaller must its steps be.
    rate = 1e-4 if prediction == "eps" else 1e-3
    before, after = distances_after(120, tmp_path, mixture_setup("line", schedule, prediction), student_lr=rate)
    assert after < (0.6 if prediction == "eps" else 0.5) * before, (before, after)


def test_a_student_of_four_steps_finds_every_mode_of_a_ring(tmp_path: Path) -> None:
    finer = {"critic_noise_mean": -1.0}  # modes are as narrow as the discriminator's usual noise
    before, after = distances_after(250, tmp_path, mixture_setup("ring"), schedules=FOUR, student_lr=3e-4, **finer)
    assert after < 0.5 * before, (before, after)


@pytest.mark.parametrize("loss", HINGE_SWAPPED)
def test_with_one_sides_loss_turned_round_it_does_not(
    loss: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, loss, HINGE_SWAPPED[loss](getattr(module, loss)))
    before, after = distances_after(100, tmp_path, mixture_setup())
    assert after > 0.9 * before, (before, after)
