"""Trajectory-segmented consistency: its segments, its jumps, its adversarial term, and that it finds the teacher."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

import distillers.methods.consistency as solver
import distillers.methods.tscd as module
from distillers.losses.trajectories import jump, segment_edges, segment_of, unit_state
from distillers.methods.base import Setup, Step, Turn
from distillers.methods.consistency import Consistency, ConsistencyConfig
from distillers.methods.tscd import TSCD, Landing, TSCDConfig
from tests.distillers.conventions import CONVENTIONS, in_every_convention
from tests.distillers.mixtures import VP, distances, mixture_setup, step_of
from tests.distillers.test_consistency import Known
from weights.contracts import StepSchedule
from weights.denoiser import Cond
from weights.diffusion.parameterizations import Prediction
from weights.diffusion.schedules import EDM, RectifiedFlow, Schedule, TrigFlow, add_noise, convert

B = 6
STUDENT = Turn(name="student", trains=("student",))
DISCRIMINATOR = Turn(name="discriminator", trains=("heads",))
SCHEDULES = [schedule for schedule, _ in CONVENTIONS]


def stages(*segments: int, iterations: int = 100) -> list[dict[str, int]]:
    return [*({"segments": each, "iterations": iterations} for each in segments[:-1]), {"segments": segments[-1]}]


def drawn_in(segments: int, solver_steps: int) -> dict[int, StepSchedule]:
    """The schedule of a student that starts where its segments do."""
    times = [edge / solver_steps for edge in segment_edges(solver_steps, segments)[:0:-1]]
    return {segments: StepSchedule(timesteps=times, sampler="ddim")}


def build(segments: int = 1, setup: Setup | None = None, **config: Any) -> TSCD:
    config = {"solver_steps": 12, "guidance_scale": 1.0, "gan_weight": 0.0, "stages": stages(segments), **config}
    config.setdefault("schedules", drawn_in(segments, config["solver_steps"]))
    return TSCD(TSCDConfig(**config), setup or mixture_setup())


def point_masses(method: TSCD, teacher: float, student: float, target: float) -> tuple[Known, Known, Known]:
    """The method with three networks that always give the same picture."""
    parts = tuple(Known(torch.tensor(value)) for value in (teacher, student, target))
    for part in parts:
        part.schedule = method.teacher.schedule
    assert method.average is not None, "give it a target of its own"
    method.teacher, method.student.denoiser, method.average.denoiser = parts
    return parts  # type: ignore[return-value]


def step_at(method: TSCD, picture: float, size: int = 256) -> Step:
    """A batch of one picture many times over."""
    step = step_of(method.setup, size)
    return replace(step, batch=replace(step.batch, real=torch.full((size, 1, 1, 1), picture)))


# Segments and jumps


@given(steps=st.integers(1, 200), share=st.floats(0, 1))
def test_edges_are_those_of_the_public_code(steps: int, share: float) -> None:
    segments = 1 + int(share * (steps - 1))
    starts = np.floor(np.linspace(0, steps, segments, endpoint=False) + 1e-9).astype(int)
    edges = segment_edges(steps, segments)
    assert edges == [*starts.tolist(), steps]
    index = torch.arange(1, steps + 1)
    lower, upper = segment_of(index, edges)
    assert bool(((lower < index) & (index <= upper)).all())
    assert all(edges.index(int(high)) == edges.index(int(low)) + 1 for low, high in zip(lower, upper, strict=True))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda each: type(each).__name__)
def test_a_jump_keeps_the_noise_and_ends_in_the_picture(schedule: Schedule) -> None:
    x0, eps = torch.full((5, 1), 0.3, dtype=torch.float64), torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    t, s = torch.tensor([0.2, 0.5, 0.8, 0.9, 1.0]).double(), torch.tensor([0.1, 0.5, 0.3, 0.0, 0.9]).double()
    landed = jump(add_noise(schedule, x0, eps, t), x0, t, s, schedule)
    expected = torch.where(s[:, None] > 0, add_noise(schedule, x0, eps, s), x0)
    torch.testing.assert_close(landed, expected)


@pytest.mark.parametrize("schedule", [EDM(), RectifiedFlow(), TrigFlow()], ids=lambda each: type(each).__name__)
def test_a_states_unit_form_is_the_variance_preserving_one(schedule: Schedule) -> None:
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    x_t = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).double()
    converted, time = convert(x_t, t, VP, schedule)
    torch.testing.assert_close(unit_state(x_t, t, VP), x_t)
    torch.testing.assert_close(unit_state(converted, time, schedule), x_t)


# Settings


@pytest.mark.parametrize(
    ("field", "config"),
    [
        ("stages", {"stages": []}),
        ("stages", {"stages": stages(1, 2)}),
        ("stages", {"stages": stages(4, 4, 1)}),
        ("stages", {"stages": stages(51, 1)}),
        ("stages", {"stages": [{"segments": 2}, {"segments": 1}]}),
        ("stages", {"stages": [{"segments": 1, "iterations": 5}]}),
        ("segments", {"stages": stages(0)}),
        ("schedules", {"stages": stages(4)}),
        ("schedules", {"stages": stages(2), "schedules": {2: StepSchedule(timesteps=[1.0, 0.5])}}),
        ("gan_weight", {"gan_weight": -0.1}),
        ("head_betas", {"head_betas": (0.0, 1.0)}),
        ("skip", {"skip": 51}),
    ],
)
def test_a_bad_setting_is_refused_by_name(field: str, config: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as error:
        TSCDConfig.model_validate(config)
    assert field in str(error.value)


def test_a_student_of_segments_must_stop_at_their_ends_and_is_told_where() -> None:
    """A network asked at 0.75 of 50 times has learned to jump to 0.74: drawing on to 0.5 would lose the way."""
    usual = StepSchedule(timesteps=[1.0, 0.75, 0.5, 0.25], sampler="ddim")
    with pytest.raises(ValidationError, match=r"0\.74, 0\.5, 0\.24"):
        TSCDConfig(stages=stages(4), schedules={4: usual})  # type: ignore[arg-type]
    for fits in (
        {"schedules": {4: StepSchedule(timesteps=[1.0, 0.74, 0.5, 0.24], sampler="ddim")}},
        {"schedules": {5: StepSchedule(timesteps=[1.0, 0.9, 0.74, 0.5, 0.24], sampler="ddim", eta=0.3)}},
        {"schedules": {4: usual}, "solver_steps": 40},
    ):
        config = TSCDConfig.model_validate({"stages": stages(4), **fits})
        assert TSCDConfig.model_validate_json(config.model_dump_json()) == config


def test_segments_fall_by_iterations_and_the_last_stage_stays() -> None:
    method = build(stages=stages(8, 4, 1, iterations=10), schedules=drawn_in(1, 12))
    assert [method.segments(iteration) for iteration in (0, 9, 10, 19, 20, 10_000)] == [8, 8, 4, 4, 1, 1]
    seen = [float(method.loss(STUDENT, step_of(method.setup, B, at)).metrics["student/segments"]) for at in (9, 10, 20)]
    assert seen == [8, 4, 1]


def test_turns_alternate_and_without_a_gan_there_is_no_second_one() -> None:
    method = build(gan_weight=0.1, lr=1e-4, head_lr=3e-4, head_betas=(0.5, 0.9), warmup=3)
    assert method.turns(0) == method.turns(7) == [STUDENT, DISCRIMINATOR]
    trained = method.trained()
    assert {name: (each.optimizer.lr, each.optimizer.warmup) for name, each in trained.items()} == {
        "student": (1e-4, 3), "heads": (3e-4, 3),
    }  # fmt: skip
    assert trained["heads"].optimizer.betas == (0.5, 0.9)
    alone = build(gan_weight=0.0)
    assert (alone.turns(0), alone.heads, list(alone.trained())) == ([STUDENT], None, ["student"])


# The student's loss


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_with_one_segment_it_is_consistency_distillation(decay: float) -> None:
    shared: dict[str, Any] = {"solver_steps": 8, "guidance_scale": 2.0, "target_decay": decay}
    ours, theirs = build(**shared), Consistency(ConsistencyConfig(**shared), mixture_setup())
    for iteration in range(3):
        steps = [step_of(method.setup, 16, iteration) for method in (ours, theirs)]
        assert torch.equal(ours.loss(STUDENT, steps[0]).loss, theirs.loss(STUDENT, steps[1]).loss)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize(("segments", "skip"), [(1, 1), (3, 1), (5, 3), (12, 2)])
def test_where_the_data_are_one_point_every_jump_is_exact(schedule: Schedule, segments: int, skip: int) -> None:
    method = build(segments, mixture_setup("line", schedule, "v"), skip=skip, target_decay=0.5, huber=0.0)
    _, student, target = point_masses(method, 0.5, 0.5, 0.5)
    assert float(method.loss(STUDENT, step_at(method, 0.5)).loss) < 1e-9
    (x_t, t), (x_s, s) = student.asked[0], target.asked[0]
    index = (t * 12).round().long()
    lower, _ = segment_of(index, segment_edges(12, segments))
    later = torch.maximum(index - skip, lower)
    assert index.min() == 1 and index.max() == 12
    torch.testing.assert_close(s, later.clamp_min(1) / 12)
    before = later > 0  # at 0 the target is not asked for its answer
    noises = [(x.flatten() - 0.5 * schedule.alpha(u)) / schedule.sigma(u) for x, u in ((x_t, t), (x_s, s))]
    torch.testing.assert_close(noises[0][before], noises[1][before], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda each: type(each).__name__)
def test_at_a_segments_end_the_target_is_the_solvers_state(schedule: Schedule) -> None:
    """One step a segment: the target is never asked, and an x_0 that is 0.75 off lands that much times its weight off."""
    method = build(12, mixture_setup("line", schedule, "v"), target_decay=0.5, huber=0.0)
    _, student, _ = point_masses(method, teacher=0.25, student=1.0, target=99.0)
    loss = float(method.loss(STUDENT, step_of(method.setup, 64)).loss)
    t = student.asked[0][1].double()
    edge = t - 1 / 12
    edge[edge < 0.01] = 0
    sigma = torch.where(edge > 0, schedule.sigma(edge), 0.0)
    weight = schedule.alpha(edge) - schedule.alpha(t) * sigma / schedule.sigma(t)
    off = 0.75 * weight / torch.hypot(schedule.alpha(edge), sigma)
    assert loss == pytest.approx(float(off.square().mean()), rel=1e-3)


def test_before_it_the_target_jumps_from_the_solvers_state() -> None:
    """Rows with a step to go compare the student's jump with the target's, from one step later; the others as above."""
    method = build(3, solver_steps=6, target_decay=0.5, huber=0.0)
    _, student, target = point_masses(method, teacher=0.25, student=1.0, target=3.0)
    loss = float(method.loss(STUDENT, step_of(method.setup, 64)).loss)
    (x_t, t), (x_s, s) = student.asked[0], target.asked[0]
    index = (t * 6).round().long()
    edge = (index - 1) // 2 * 2 / 6
    ours = jump(x_t, torch.ones_like(x_t), t, edge, VP)
    away = jump(x_s, torch.full_like(x_s, 3.0), s, edge, VP)
    there = jump(x_t, torch.full_like(x_t, 0.25), t, edge, VP)
    expected = torch.where((index % 2 == 0)[:, None, None, None], away, there)
    assert loss == pytest.approx(float((ours - expected).square().mean()), rel=1e-4)


def test_the_average_follows_the_students_turn_alone() -> None:
    method = build(target_decay=0.9, gan_weight=0.1)
    before = {name: value.clone() for name, value in method.state().items()}
    with torch.no_grad():
        for weight in method.student.network.parameters():
            weight.add_(1.0)
    method.after_step(DISCRIMINATOR, 0)
    assert all(torch.equal(value, before[name]) for name, value in method.state().items())
    method.after_step(STUDENT, 0)
    assert all(torch.allclose(value, before[name] + 0.1, atol=1e-6) for name, value in method.state().items())


# The adversarial term


class Looking(Known):
    """A critic whose features are what it is shown."""

    def features(self, x_t: Tensor, t: Tensor, cond: Cond) -> list[Tensor]:
        self.asked.append((x_t.detach(), t))
        return [x_t]


class Sum(nn.Module):
    def forward(self, features: list[Tensor]) -> Tensor:
        return features[0].flatten(1)


def seen_by(method: TSCD) -> Looking:
    method.critic, method.heads = Looking(torch.tensor(0.0)), Sum()  # type: ignore[assignment]
    return method.critic


def test_the_heads_read_the_teachers_own_network() -> None:
    method = build(gan_weight=0.1)
    assert method.critic.network is method.setup.base.network


def test_real_is_the_target_and_fake_the_students_jump_noised_inside_the_segment() -> None:
    method = build(gan_weight=0.1)
    critic, count = seen_by(method), 4000
    edge, top = torch.full((count,), 0.25), torch.full((count,), 0.75)
    landing = Landing(
        ours=torch.full((count, 1, 1, 1), -0.7), target=torch.full((count, 1, 1, 1), 0.8), edge=edge, top=top,
        cond={"label": torch.full((count,), -1)},
    )  # fmt: skip
    found = method.loss(DISCRIMINATOR, replace(step_of(method.setup, count), scratch={"landing": landing}))
    (shown, told) = critic.asked[0]
    (real, fake), (u, same) = shown.flatten(1).chunk(2), told.chunk(2)
    assert torch.equal(u, same) and 0.25 < u.min() < 0.26 and 0.74 < u.max() <= 0.75
    a = VP.alpha(u) / VP.alpha(edge)
    b = (VP.sigma(u) ** 2 - (a * VP.sigma(edge)) ** 2).sqrt()
    noises = [(x.flatten() - a * state) / b for x, state in ((real, 0.8), (fake, -0.7))]
    for noise in noises:
        assert abs(float(noise.mean())) < 0.06 and abs(float(noise.std()) - 1) < 0.05
    assert abs(float((noises[0] * noises[1]).mean())) < 0.06, "each has its own noise"
    expected = (1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()
    torch.testing.assert_close(found.loss, expected)


def test_the_student_is_told_what_the_heads_make_of_its_jump() -> None:
    losses, metrics = [], {}
    for weight in (0.0, 0.5):
        method = build(3, gan_weight=weight)
        critic = seen_by(method) if weight else None
        found = method.loss(STUDENT, step_of(method.setup, B))
        losses.append(float(found.loss.detach()))
        metrics = found.metrics
    assert critic is not None
    shown = critic.asked[0][0]
    assert losses[1] - losses[0] == pytest.approx(-0.5 * float(shown.mean()), rel=1e-4)
    assert float(metrics["student/consistency"]) == pytest.approx(losses[0])


def test_the_discriminators_turn_uses_the_students_pair() -> None:
    method = build(3, gan_weight=0.1, target_decay=0.5)
    _, student, _ = point_masses(method, 0.1, 0.2, 0.3)
    step = step_of(method.setup, B)
    method.loss(STUDENT, step)
    method.loss(DISCRIMINATOR, step)
    assert len(student.asked) == 1
    method.loss(DISCRIMINATOR, step_of(method.setup, B))
    assert len(student.asked) == 2, "alone it makes its own"


def test_the_discriminators_loss_never_reaches_the_student_even_unguarded() -> None:
    method = build(3, gan_weight=0.1)
    method.loss(DISCRIMINATOR, step_of(method.setup, B)).loss.backward()
    assert all(weight.grad is None for weight in method.student.network.parameters())
    assert method.heads is not None
    assert all(weight.grad is not None for weight in method.heads.parameters())


# Convergence

QUICK: dict[str, Any] = {"solver_steps": 16, "lr": 2e-3, "huber": 0.03, "target_decay": 0.9, "head_lr": 2e-3}


def trained(method: TSCD, iterations: int, folder: Path) -> tuple[float, float]:
    """The student's distance to the data before and after training."""
    return distances(method, method.setup, folder, iterations, list(method.schedules().values()), batch_size=128)


def four_after(iterations: int, folder: Path, setup: Setup | None = None, **config: Any) -> float:
    """How far a student of four segments, drawing in four steps, still is from the data, in parts of what it was."""
    torch.manual_seed(0)
    before, after = trained(build(4, setup, **{**QUICK, **config}), iterations, folder)
    return after / before


@in_every_convention
def test_four_segments_find_the_teachers_distribution(
    schedule: Schedule, prediction: Prediction, tmp_path: Path
) -> None:
    """The x_0-predicting student starts nearer to it than the others end."""
    setup = mixture_setup("line", schedule, prediction)
    assert four_after(100, tmp_path, setup) < (0.75 if prediction == "x0" else 0.6)


def test_with_the_adversarial_term_it_still_does(tmp_path: Path) -> None:
    assert four_after(100, tmp_path, gan_weight=0.1) < 0.4


def test_stages_end_in_a_student_of_one_step(tmp_path: Path) -> None:
    torch.manual_seed(0)
    fall = stages(4, 2, 1, iterations=40)
    before, after = trained(build(**{**QUICK, "stages": fall, "schedules": drawn_in(1, 16)}), 160, tmp_path)
    assert after < 0.4 * before


def test_segments_that_end_elsewhere_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a consistency model would be: every jump ends in the picture, and drawing it in steps noises it wrongly."""
    right = module.segment_of
    monkeypatch.setattr(module, "segment_of", lambda index, edges: (0 * index, right(index, edges)[1]))
    assert four_after(100, tmp_path) > 0.6


def test_a_solver_that_goes_the_wrong_way_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = solver.ddim_step
    monkeypatch.setattr(solver, "ddim_step", lambda x_t, x0, t, s, schedule: right(x_t, x0, t, 2 * t - s, schedule))
    assert four_after(60, tmp_path) > 1


@pytest.mark.parametrize("sign", [1, -1], ids=["right sign", "wrong sign"])
def test_the_adversarial_term_alone_brings_a_displaced_student_back(
    sign: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its targets are the solver's states, one step away, so that all the displacement is the student's."""
    adversarial, consistency = module.hinge_generator_loss, module.regression_loss
    monkeypatch.setattr(module, "hinge_generator_loss", lambda logits: sign * adversarial(logits))
    monkeypatch.setattr(module, "regression_loss", lambda *given: 0 * consistency(*given))
    torch.manual_seed(0)
    quick = {"lr": 5e-4, "head_lr": 1e-2, "betas": (0.0, 0.99), "head_betas": (0.0, 0.99)}
    method = build(4, solver_steps=4, gan_weight=1.0, **quick)
    with torch.no_grad():
        method.student.network.leave[1].bias.add_(0.5)  # type: ignore[index, union-attr]
    before, after = trained(method, 50, tmp_path)
    assert after < 0.75 * before if sign > 0 else after > before
