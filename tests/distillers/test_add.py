"""ADD: what its two losses are, and that it finds the data's distribution in every convention."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

import distillers.adversary as module
from distillers.methods.add import ADD, ADDConfig
from distillers.methods.base import Setup, Turn
from distillers.rollout import draw_noise, draw_times
from tests.distillers.conventions import in_every_convention
from tests.distillers.mixtures import HINGE_SWAPPED, VP, distances, mixture_setup, step_of
from weights.contracts import StepSchedule
from weights.diffusion.guidance import Guided
from weights.diffusion.parameterizations import Prediction
from weights.diffusion.schedules import Schedule, add_noise, expand

B = 6
STUDENT = Turn(name="student", trains=("student",))
CRITIC = Turn(name="critic", trains=("heads",))
ONE = {1: StepSchedule(timesteps=[1.0])}
FOUR = {4: StepSchedule(timesteps=[1.0, 0.75, 0.5, 0.25])}


def build(setup: Setup | None = None, **config: Any) -> ADD:
    torch.manual_seed(0)
    return ADD(ADDConfig(**{"features": "random", **config}), setup or mixture_setup())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("features", "vgg"),
        ("adversarial_weight", 0.0),
        ("distillation_weight", -1.0),
        ("distillation_times", (0.9, 0.1)),
        ("distillation_times", (0.0, 1.0)),
        ("step_weights", {3: 1.0}),
        ("student_lr", float("inf")),
    ],
)
def test_a_bad_setting_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as error:
        ADDConfig.model_validate({field: value})
    assert field in str(error.value)


def test_student_and_heads_step_in_turn() -> None:
    method = build(student_lr=1e-4, head_lr=2e-4, warmup=3)
    assert method.turns(0) == [STUDENT, CRITIC]
    assert build(student_every=3).turns(1) == [CRITIC]
    assert build(student_every=3).turns(2) == [STUDENT, CRITIC]
    trained = method.trained()
    assert (trained["student"].optimizer.lr, trained["heads"].optimizer.lr) == (1e-4, 2e-4)
    assert {each.optimizer.warmup for each in trained.values()} == {3}


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_distillation_loss_is_its_formula_and_the_teachers_estimate_is_a_constant(guidance: float) -> None:
    setup = mixture_setup("ring")
    method = build(setup, guidance_scale=guidance, distillation_times=(0.2, 0.8))
    step, again = step_of(setup, B), step_of(setup, B)
    x, cond = torch.randn(B, 2, 1, 1, requires_grad=True), {"label": torch.arange(B)}
    loss = method._distillation(x, cond, step)
    t = draw_times(B, (0.2, 0.8), again.local, setup.device)
    x_t = add_noise(VP, x.detach(), draw_noise((B, 2, 1, 1), again.local, setup.device), t)
    target = Guided(setup.teacher, setup.uncond, guidance)(x_t, t, cond)
    expected = (expand(VP.alpha(t), x) * (x - target).square()).mean()
    torch.testing.assert_close(loss, expected.to(loss.dtype), atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(
        gradient, (expand(VP.alpha(t), x) * (x - target) / B).detach().float(), atol=1e-5, rtol=1e-5
    )


def test_the_losses_add_up_as_they_are_weighed() -> None:
    losses = {}
    for name, weights in {"judged": (1.0, 0.0), "both": (2.0, 3.0)}.items():
        method = build(adversarial_weight=weights[0], distillation_weight=weights[1])
        found = method.loss(STUDENT, step_of(method.setup, B, name="student"))
        losses[name] = (float(found.loss.detach()), {key: float(value) for key, value in found.metrics.items()})
    assert losses["judged"][0] == losses["judged"][1]["student/adversarial"]
    assert "student/distillation" not in losses["judged"][1]
    total, parts = losses["both"]
    assert total == pytest.approx(2 * parts["student/adversarial"] + 3 * parts["student/distillation"], rel=1e-5)


def test_the_anchor_is_what_the_student_was_and_stays_so() -> None:
    method = build(anchor_weight=2.0, distillation_weight=0.0)
    unmoved = method.loss(STUDENT, step_of(method.setup, B, name="student"))
    assert float(unmoved.metrics["student/moved"]) == 0
    with torch.no_grad():
        for weight in method.student.network.parameters():
            weight.mul_(1.1)
    found = method.loss(STUDENT, step_of(method.setup, B, name="student"))
    moved = float(found.metrics["student/moved"])
    assert moved > 0
    assert float(found.loss.detach()) == pytest.approx(
        float(found.metrics["student/adversarial"]) + 2 * moved, rel=1e-5
    )
    assert method.anchor is not None
    assert not any(weight.requires_grad for weight in method.anchor.parameters())
    assert "anchor" not in method.trained() and not method.state(), "it is made again from the job's start"


def test_the_heads_judge_the_samples_of_the_students_turn_beside_the_data() -> None:
    method, scratch, seen = build(), {}, []  # type: ignore[var-annotated]
    method.student.network.register_forward_hook(lambda *_: seen.append(1))
    method.loss(STUDENT, step_of(method.setup, B, name="student", scratch=scratch))
    assert len(seen) == 1 and not scratch["samples"][0].requires_grad
    method.loss(CRITIC, step_of(method.setup, B, name="critic", scratch=scratch))
    assert len(seen) == 1
    method.loss(CRITIC, step_of(method.setup, B, name="critic"))
    assert len(seen) == 2, "where the student did not step, it is asked again"


def test_a_later_step_starts_from_noised_pictures_or_from_where_the_student_gets_to() -> None:
    calls: dict[bool, int] = {}
    for simulated in (False, True):
        method = build(schedules=FOUR, backward_simulation=simulated, distillation_weight=0.0)
        seen: list[int] = []
        method.student.network.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        for iteration in range(12):
            method.loss(STUDENT, step_of(method.setup, B, iteration=iteration, name="student"))
        calls[simulated] = len(seen)
    assert calls[False] == 12 < calls[True]
    assert "real images" in str(ADD.needs_pictures(ADDConfig()))


def test_iterations_that_draw_the_same_step_are_the_same_graph() -> None:
    method = build(backward_simulation=True)

    def way(iteration: int) -> Any:
        return method.branch(
            iteration, lambda turn: step_of(method.setup, 1, iteration=iteration, name=turn.name).shared
        )

    ways = {way(iteration) for iteration in range(60)}
    assert len(ways) == 5, "0 of any count, 1 of 2, and 1 to 3 of 4"


# Convergence

QUICK = {
    "student_lr": 1e-3, "head_lr": 2e-3, "student_betas": (0.0, 0.99), "head_betas": (0.0, 0.99), "warmup": 10,
    "schedules": ONE, "distillation_weight": 0.1,
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
    before, after = distances_after(
        250, tmp_path, mixture_setup("ring"), schedules=FOUR, student_lr=3e-4, backward_simulation=True
    )
    assert after < 0.5 * before, (before, after)


@pytest.mark.parametrize("loss", HINGE_SWAPPED)
def test_with_one_sides_loss_turned_round_it_does_not(
    loss: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, loss, HINGE_SWAPPED[loss](getattr(module, loss)))
    before, after = distances_after(100, tmp_path, mixture_setup())
    assert after > 0.9 * before, (before, after)
