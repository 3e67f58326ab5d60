"""The score distillation family: every member finds the teacher's distribution, in every convention, and for its reason."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

import distillers.methods.diff_instruct as diff_instruct
import distillers.methods.sid as sid
import distillers.methods.sim as sim
import distillers.methods.uni_instruct as uni_instruct
from distillers.methods import method, methods
from distillers.methods.base import Turn
from distillers.methods.score_distillation import ScoreDistillation
from tests.distillers.conventions import in_every_convention
from tests.distillers.mixtures import VP, distances, mixture_setup, step_of
from weights.contracts import StepSchedule
from weights.diffusion.parameterizations import Prediction
from weights.diffusion.schedules import EDM, Schedule

FAMILY = sorted(name for name, each in methods().items() if issubclass(each, ScoreDistillation))
ONE = {1: StepSchedule(timesteps=[1.0])}
STUDENT = Turn(name="student", trains=("student",))
QUICK: dict[str, Any] = {
    "guidance_scale": 1.0, "student_every": 2, "student_lr": 1e-3, "fake_score_lr": 2e-3, "student_betas": (0.0, 0.99),
    "critic_betas": (0.0, 0.99), "warmup": 10, "score_weighting": "v", "schedules": ONE, "dm_times": (0.15, 0.98),
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "dmd2": {"gan_weight": 0.0},
    "sid": {"alpha": 1.0},
    "f_distill": {"head_lr": 2e-3, "discriminator_weight": 0.1},
    "uni_instruct": {"head_lr": 2e-3, "discriminator_weight": 0.1},
}


def config_of(name: str, schedule: Schedule = VP, prediction: Prediction = "v", **config: Any) -> Any:
    chosen = {**QUICK, **OWN.get(name, {})}
    if isinstance(schedule, EDM):
        chosen["score_weighting"] = "edm"
    if prediction == "eps":  # an error of eps is one of x0 times sigma / alpha, 14 at the first time
        chosen |= {"student_lr": 1e-4, "fake_score_lr": 5e-4, "score_weighting": "eps"}
    return method(name).Config.model_validate({**chosen, **config})


def distances_after(
    name: str, folder: Path, iterations: int, schedule: Schedule = VP, prediction: Prediction = "v"
) -> tuple[float, float]:
    """The one-step student's distance to the data, before and after."""
    setup = mixture_setup("line", schedule, prediction)
    torch.manual_seed(0)
    built = method(name)(config_of(name, schedule, prediction), setup)
    return distances(built, setup, folder, iterations)


@pytest.mark.parametrize("name", FAMILY)
@in_every_convention
def test_the_student_finds_the_teachers_distribution(
    name: str, schedule: Schedule, prediction: Prediction, tmp_path: Path
) -> None:
    before, after = distances_after(name, tmp_path, 200, schedule, prediction)
    assert after < 0.7 * before, (before, after)


@pytest.mark.parametrize(
    ("name", "module", "loss"),
    [
        ("diff_instruct", diff_instruct, "distribution_matching_gradient"),
        ("sid", sid, "score_identity_loss"),
        ("sim", sim, "score_implicit_loss"),
        ("uni_instruct", uni_instruct, "score_identity_loss"),
    ],
)
def test_with_the_wrong_sign_it_does_not(
    name: str, module: Any, loss: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(module, loss)
    monkeypatch.setattr(module, loss, lambda *given, **named: -right(*given, **named))
    before, after = distances_after(name, tmp_path, 100)
    assert after > 0.9 * before


@pytest.mark.parametrize("name", FAMILY)
def test_the_gradient_reaches_the_student_through_the_scores_only_where_the_method_says(name: str) -> None:
    setup = mixture_setup()
    built = method(name)(config_of(name), setup)
    assert isinstance(built, ScoreDistillation)
    built.fake_score_network.requires_grad_(False)
    noised = []
    right = built.teacher.forward

    def spy(x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        noised.append(torch.is_grad_enabled() and x_t.requires_grad)
        return right(x_t, t, cond)

    built.teacher.forward = spy  # type: ignore[method-assign]
    built.loss(STUDENT, step_of(setup, 4))
    assert noised == [built.differentiates_scores]


JUDGED: dict[str, Any] = {"adversary": {"head_lr": 1e-3, "mismatched_share": 0.0}, "adversary_weight": 0.5}


def test_with_a_second_discriminator_it_finds_the_teachers_distribution_too(tmp_path: Path) -> None:
    setup = mixture_setup("line")
    torch.manual_seed(0)
    before, after = distances(method("dmd2")(config_of("dmd2", **JUDGED), setup), setup, tmp_path, 200)
    assert after < before / 2


@pytest.mark.parametrize("shared", [True, False])
def test_the_second_discriminator_steps_with_the_student_and_only_on_its_own_loss(shared: bool) -> None:
    setup = mixture_setup()
    built = method("dmd2")(config_of("dmd2", share_samples=shared, **JUDGED), setup)
    assert isinstance(built, ScoreDistillation) and built.adversary is not None
    assert [turn.name for turn in built.turns(0)] == ["critic"]
    assert [turn.name for turn in built.turns(1)] == ["student", "critic", "adversary"]
    step = step_of(setup, 8)
    heads, student = built.adversary.heads, built.student.network
    heads.requires_grad_(False)  # as the trainer does in the student's turn
    built.loss(STUDENT, step).loss.backward()
    assert any(weight.grad is not None for weight in student.parameters())
    assert ("samples" in step.scratch) == shared
    student.zero_grad(set_to_none=True)
    heads.requires_grad_(True)
    built.loss(Turn(name="adversary", trains=("adversary",)), step).loss.backward()
    assert all(weight.grad is not None for weight in heads.parameters())
    assert not any(weight.grad is not None for weight in student.parameters())


def test_the_second_discriminator_pulls_as_hard_as_it_is_told_to() -> None:
    """At the pictures: the whole gradient less the matching's is ``adversary_weight`` times as long as the matching's."""
    setup = mixture_setup()
    pulls: dict[float | None, Tensor] = {}
    for weight in (None, 0.25, 3.0):
        torch.manual_seed(0)
        judged = {} if weight is None else {**JUDGED, "adversary_weight": weight}
        built = method("dmd2")(config_of("dmd2", **judged), setup)
        assert isinstance(built, ScoreDistillation)
        x = torch.randn(16, 1, 1, 1, generator=torch.Generator().manual_seed(1)).requires_grad_()
        built._sample = lambda step, x=x: (x, step.batch.cond)  # type: ignore[method-assign]
        built.loss(STUDENT, step_of(setup, 16)).loss.backward()
        assert x.grad is not None
        pulls[weight] = x.grad
    alone = pulls[None]
    for weight in (0.25, 3.0):
        torch.testing.assert_close((pulls[weight] - alone).norm(), weight * alone.norm(), rtol=1e-4, atol=0)


def test_a_second_discriminator_needs_pictures() -> None:
    config = config_of("dmd2", **JUDGED)
    assert "adversary" in (method("dmd2").needs_pictures(config) or "")
    assert method("dmd2").needs_pictures(config_of("dmd2")) is None


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("diff_instruct", "dm_levels", (0.0, 0.0)),
        ("dmd2", "adversary_weight", 0.0),
        ("dmd2", "adversary", {"head_kernel": 2}),
        ("sid", "alpha", 3.0),
        ("sim", "huber", 0.0),
        ("uni_instruct", "gan_weight", 0.0),
        ("uni_instruct", "share_times", False),
        ("uni_instruct", "divergence", "total_variation"),
    ],
)
def test_a_bad_setting_is_refused_by_name(name: str, field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as error:
        method(name).Config.model_validate({field: value})
    assert field in str(error.value)


def test_levels_decide_the_times_that_scores_are_matched_at() -> None:
    setup = mixture_setup()
    built = method("diff_instruct")(config_of("diff_instruct", dm_levels=(1.0, 0.01)), setup)
    assert isinstance(built, ScoreDistillation)
    seen = built._see(torch.zeros(64, 1, 1, 1), step_of(setup, 64).batch.cond, step_of(setup, 64))
    assert (-VP.log_snr(seen.t) - 1.0).abs().max() < 0.1


def test_the_ratios_gradient_can_be_left_out() -> None:
    gradients = []
    for kept in (True, False):
        torch.manual_seed(0)
        setup = mixture_setup()
        built = method("uni_instruct")(config_of("uni_instruct", ratio_gradient=kept, gan_weight=1e-9), setup)
        built.loss(STUDENT, step_of(setup, 16)).loss.backward()
        weights = [weight.grad for weight in built.student.network.parameters() if weight.grad is not None]
        gradients.append(torch.cat([gradient.flatten() for gradient in weights]))
    assert not torch.allclose(gradients[0], gradients[1], rtol=1e-3)
