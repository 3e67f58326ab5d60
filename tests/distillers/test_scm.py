"""sCM: a true consistency function has no tangent, and students find the teacher's distribution in every convention."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

import distillers.methods.few_step as few_step
import distillers.methods.scm as module
from distillers.losses.continuous_consistency import (
    consistency_tangent,
    normalize_tangent,
    tangent_loss,
    trig_velocity,
)
from distillers.methods.base import Setup, Turn
from distillers.methods.scm import MARGIN, SCM, LogVariance, SCMConfig
from tests.distillers.conventions import in_every_convention
from tests.distillers.mixtures import VP, MixtureFeed, distances, mixture_setup, step_of, trainer_of
from weights.contracts import GuidanceConvention
from weights.denoiser import GUIDANCE, Cond, Denoiser
from weights.diffusion.mixture import Mixture
from weights.diffusion.parameterizations import Prediction
from weights.diffusion.samplers import ddim_step
from weights.diffusion.schedules import EDM, DiscreteVP, RectifiedFlow, Schedule, TrigFlow, add_noise, expand
from weights.families.gaussian_mixture import AnalyticDenoiser

B = 6
TURN = Turn(name="student", trains=("student", "log_variance"))
SD = DiscreteVP.from_betas("scaled_linear")
MEAN, STD = 0.4, 0.3


class OneGaussian(Denoiser):
    """Where ODE trajectories of N(m, s^2) end: ``m + s (x_t - alpha m) / sqrt(alpha^2 s^2 + sigma^2)``."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule = schedule

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        alpha, sigma = (expand(c, x_t) for c in (self.schedule.alpha(t.double()), self.schedule.sigma(t.double())))
        end = MEAN + STD * (x_t.double() - alpha * MEAN) / torch.hypot(alpha * STD, sigma)
        return end if x_t.dtype == torch.float64 else end.float()


def build(setup: Setup | None = None, **config: Any) -> SCM:
    return SCM(SCMConfig(**{"guidance_scale": 1.0, **config}), setup or mixture_setup())


def one_gaussian(schedule: Schedule, **config: Any) -> SCM:
    """A method whose teacher and student are exact for one Gaussian."""
    method = build(mixture_setup("line", schedule), **config)
    single = Mixture(torch.ones(1), torch.tensor([[MEAN]]), torch.tensor([STD]))
    method.teacher, method.student.denoiser = AnalyticDenoiser(single, schedule), OneGaussian(schedule)
    return method


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sigma_data", 0.0),
        ("time_std", 0.0),
        ("tangent", "backward"),
        ("finite_difference_step", 1.0),
        ("tangent_offset", 0.0),
        ("tangent_scale", 0.0),
        ("target_decay", 1.0),
        ("boundary", -0.1),
        ("betas", (0.9, 1.0)),
    ],
)
def test_a_bad_setting_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as error:
        SCMConfig.model_validate({field: value})
    assert field in str(error.value)


def test_it_needs_pictures_and_says_what_it_baked_in_and_trains() -> None:
    method = build(guidance_scale=4.0, lr=2e-4, warmup=3)
    assert "images" in str(SCM.needs_pictures(method.config))
    assert (method.guidance().trained_scale, method.guidance().default_scale) == (4.0, 1.0)
    assert method.turns(5) == [TURN]
    optimizer = method.trained()["student"].optimizer
    assert (optimizer.kind, optimizer.lr, optimizer.warmup) == ("radam", 2e-4, 3)
    plain = build(adaptive_weighting=False)
    assert plain.turns(0)[0].trains == ("student",)
    assert plain.trained().keys() == {"student"}


# The formulas


def test_the_velocity_is_the_derivative_of_the_state() -> None:
    x0, z, t = torch.randn(3, B, 1, 1, 1, dtype=torch.float64)
    t = t.abs().clamp(0.01, 1.5)
    velocity = trig_velocity(x0, t.cos() * x0 + t.sin() * z, t.flatten())
    torch.testing.assert_close(velocity, t.cos() * z - t.sin() * x0)


def test_the_tangent_is_the_derivative_of_the_answer() -> None:
    """``cos(t) df/dt`` for an F that is linear in x_t and t, along a straight line; without r, the teacher's velocity."""
    t = torch.linspace(0.1, 1.5, B, dtype=torch.float64, requires_grad=True)
    x, dx, slope = torch.full((B, 1), 0.7, dtype=torch.float64), torch.full((B, 1), -1.3, dtype=torch.float64), 2.0

    def answer(later: Tensor) -> tuple[Tensor, Tensor]:
        x_t = x + (later - t.detach()).unsqueeze(1) * dx
        velocity = 0.5 * x_t + slope * later.unsqueeze(1)
        return later.cos().unsqueeze(1) * x_t - later.sin().unsqueeze(1) * velocity, velocity

    f, velocity = answer(t)
    derivative = torch.autograd.grad(f.sum(), t)[0]
    now = t.detach()
    tangent = consistency_tangent(velocity, dx, 0.5 * dx + slope, x, now, torch.ones(B))
    torch.testing.assert_close(tangent.squeeze(1), now.cos() * derivative)
    early = consistency_tangent(velocity, dx, 0.5 * dx + slope, x, now, torch.zeros(B))
    torch.testing.assert_close(early.squeeze(1), -(now.cos() ** 2) * (velocity - dx).detach().squeeze(1))


def test_a_normalized_tangent_is_the_same_for_pictures_of_every_size() -> None:
    for shape in ((1, 3), (1, 3, 8, 8)):
        assert torch.allclose(normalize_tangent(torch.full(shape, -0.4), 0.1), torch.full(shape, -0.8))
    assert torch.equal(normalize_tangent(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_the_loss_moves_the_velocity_to_the_target_and_learns_its_size() -> None:
    velocity = torch.randn(2, 4, requires_grad=True)
    tangent, weight = torch.randn(2, 4), torch.tensor([2.0, 0.5])
    target = velocity.detach() + tangent
    log_variance = torch.tensor([0.3, -0.7], requires_grad=True)
    loss = tangent_loss(velocity, target, weight, log_variance)
    size = tangent.square().mean(dim=1)
    scale = weight * torch.exp(-log_variance.detach())
    torch.testing.assert_close(loss, (scale * size + log_variance).mean())
    by_velocity, by_variance = torch.autograd.grad(loss, [velocity, log_variance])
    torch.testing.assert_close(by_velocity, -2 * scale.unsqueeze(1) * tangent / 8)
    torch.testing.assert_close(by_variance, (1 - scale * size) / 2)
    torch.testing.assert_close(tangent_loss(velocity, target, weight), (weight * size).mean())


def test_the_log_variance_starts_at_zero_and_can_tell_times_apart() -> None:
    torch.manual_seed(0)
    network = LogVariance()
    angle = torch.linspace(0.02, 1.55, 64, dtype=torch.float64)
    assert torch.equal(network(angle), torch.zeros(64))
    terms = torch.autograd.functional.jacobian(
        lambda weight: torch.func.functional_call(network, {"series.weight": weight}, (angle,)),
        network.series.weight.detach(),
    ).squeeze(1)
    wanted = -angle.tan().log().float()
    found = terms @ torch.linalg.lstsq(terms, wanted.unsqueeze(1)).solution
    assert (found.squeeze(1) - wanted).abs().max() < 0.1


def test_the_log_variance_is_not_rounded_in_bfloat16() -> None:
    network, angle = LogVariance(), torch.linspace(0.02, 1.55, 64, dtype=torch.float64)
    torch.nn.init.normal_(network.series.weight, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        found = network(angle)
    assert torch.equal(found, network(angle))


# The method


@pytest.mark.parametrize("tangent", ["jvp", "finite_difference"])
@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
@pytest.mark.parametrize("schedule", [VP, SD, EDM(), RectifiedFlow(), TrigFlow()], ids=lambda s: type(s).__name__)
def test_a_true_consistency_function_has_no_tangent(schedule: Schedule, sigma_data: float, tangent: str) -> None:
    method = one_gaussian(
        schedule, tangent_warmup=0, sigma_data=sigma_data, tangent=tangent, finite_difference_step=1e-3, time_std=1.0
    )
    step = step_of(method.setup, 64)
    assert method.consistency_loss(step).metrics["student/tangent"] < 2e-3
    method.student.denoiser = method.teacher  # a denoiser's own estimate is none
    assert method.consistency_loss(step).metrics["student/tangent"] > 0.05


def test_the_tangents_share_rises_and_near_the_picture_stays_zero() -> None:
    method = build(tangent_warmup=10, boundary=0.5, sigma_data=2.0)
    angle = torch.tensor([0.24, 0.26]).atan()
    assert [method._ramp(angle, iteration).tolist() for iteration in (0, 5, 20)] == [[0, 0], [0, 0.5], [0, 1]]
    assert build(tangent_warmup=0)._ramp(angle, 0).tolist() == [1, 1]


def test_only_a_network_that_predicts_x0_is_tied_to_the_teacher_near_the_picture() -> None:
    """Its f(x, t) at t = 0 is whatever it says, so that every constant would be a consistency function."""
    assert build(mixture_setup("line", VP, "x0")).boundary == 0.1
    assert build(mixture_setup("line", VP, "x0"), boundary=0.0).boundary == 0.0
    assert build(mixture_setup("line", VP, "v")).boundary == 0.0


def test_times_are_log_normal_and_inside_what_the_teacher_reaches() -> None:
    method = build(mixture_setup("line", SD), time_mean=0.5, time_std=0.6, sigma_data=2.0)
    angle = method._angles(4096, step_of(method.setup, B))
    level = (2.0 * angle.tan()).log()
    assert abs(level.mean().item() - 0.5) < 0.05
    assert abs(level.std().item() - 0.6) < 0.05
    noisy = build(mixture_setup("line", SD), time_mean=9.0)
    angle = noisy._angles(8, step_of(method.setup, B))
    end = torch.full((8,), 1 - MARGIN, dtype=torch.float64)
    torch.testing.assert_close(angle.tan().log(), -SD.log_snr(end))


def test_weights_are_the_prior_and_both_can_be_turned_off() -> None:
    step = step_of(mixture_setup(), B)
    plain = {"adaptive_weighting": False, "tangent_warmup": 0}
    method = build(prior_weighting=False, **plain)
    assert 0 < method.loss(TURN, step).loss.detach() < 1, "a normalized tangent's mean square"
    weighed, angle = build(**plain), method._angles(B, step_of(method.setup, B))
    sizes = []
    for part in (method, weighed):
        part._angles = lambda *_: torch.full_like(angle, 0.1)  # type: ignore[method-assign]
        sizes.append(float(part.loss(TURN, step_of(method.setup, B)).loss.detach()))
    assert sizes[1] == pytest.approx(sizes[0] / math.tan(0.1), rel=1e-4)


def test_guidance_reaches_the_velocity() -> None:
    tangents = []
    for scale in (1.0, 3.0):
        method = build(mixture_setup("ring"), guidance_scale=scale)
        step = step_of(method.setup, B)
        cond = {"label": torch.zeros(B, dtype=torch.int64)}
        step = replace(step, batch=replace(step.batch, cond=cond, real_cond=cond))
        tangents.append(float(method.loss(TURN, step).metrics["student/tangent"]))
    assert abs(tangents[0] - tangents[1]) > 1e-3


@pytest.mark.parametrize("tangent", ["jvp", "finite_difference"])
def test_a_student_that_is_told_its_guidance_follows_a_teacher_guided_as_far(
    tangent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = build(mixture_setup("ring"), tangent=tangent, guidance_range=(1.0, 4.0), guidance_scale=2.0)
    assert method.guidance() == GuidanceConvention(trained_scale=2.0, default_scale=2.0, embedded=(1.0, 4.0))
    assert "adapters" in str(SCM.needs_whole_network(method.config))
    told: list[Tensor] = []
    right, guided = method.student.denoiser.forward, few_step.guided_x0

    def student(x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        told.append(cond[GUIDANCE])
        return right(x_t, t, cond)

    def teacher(denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, uncond: Cond, scale: Tensor) -> Tensor:
        assert cond.keys() == {"label"}
        told.append(scale)
        return guided(denoiser, x_t, t, cond, uncond, scale)

    monkeypatch.setattr(method.student.denoiser, "forward", student)
    monkeypatch.setattr(few_step, "guided_x0", teacher)
    method.loss(TURN, step_of(method.setup, 64)).loss.backward()
    first = told[0]
    assert len(told) == 3 and first.min() >= 1 and first.max() <= 4 and first.std() > 0.5
    assert all(torch.equal(each.reshape(-1, 64), first.expand(len(each) // 64, 64)) for each in told)
    embedding = [weight for name, weight in method.student.network.named_parameters() if "guidance" in name]
    assert embedding and any(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in embedding)


def test_dropout_does_not_disturb_a_difference() -> None:
    method = build(tangent="finite_difference")
    network = method.student.network
    network.leave.insert(0, nn.Dropout(0.5))  # type: ignore[operator, union-attr]
    network.train()
    derivatives = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        derivatives.append(float(method.loss(TURN, step_of(method.setup, B)).metrics["student/derivative"]))
    assert derivatives[0] == derivatives[1]
    assert network.training


def test_the_student_learns_from_its_average_and_at_zero_decay_from_itself() -> None:
    """With a small k the target is F^- itself; where student and average agree, k is all that lies between them."""
    method = build(target_decay=0.9, tangent_scale=1e-6, adaptive_weighting=False, prior_weighting=False)
    assert method.average is not None
    with torch.no_grad():
        for weight in method.student.network.parameters():
            weight.add_(0.1)
    found = method.loss(TURN, step_of(method.setup, B))
    assert found.metrics["student/lag"] > 0.05
    found.loss.backward()
    assert all(weight.grad is None for weight in method.average.network.parameters())
    loss = float(found.loss.detach())
    assert loss == pytest.approx((float(found.metrics["student/lag"]) / 1e-6) ** 2, rel=1e-3)
    lone = build(tangent_warmup=0, tangent_scale=0.3, adaptive_weighting=False, prior_weighting=False)
    lag = [float(lone.loss(TURN, step_of(lone.setup, B)).metrics["student/lag"]) for _ in range(2)]
    assert lone.average is None and max(lag) < 1e-5
    assert 0 < float(lone.loss(TURN, step_of(lone.setup, B)).loss.detach()) < 1


def test_the_loss_is_as_large_whatever_k() -> None:
    """So that the adaptive weighting starts about where it settles, and another loss beside it weighs the same."""
    losses = []
    for scale in (0.05, 1.0):
        torch.manual_seed(0)
        method = build(tangent_scale=scale, prior_weighting=False)
        losses.append(float(method.loss(TURN, step_of(method.setup, B)).loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and 0.01 < losses[1] < 1


def test_a_difference_reaches_back_as_far_in_the_level_of_noise_at_all_times(monkeypatch: pytest.MonkeyPatch) -> None:
    method = build(tangent="finite_difference", finite_difference_step=0.2, time_std=2.0)
    seen: list[torch.Tensor] = []
    right = module.difference_along

    def watched(function: Any, x: torch.Tensor, t: torch.Tensor, earlier: torch.Tensor, s: torch.Tensor) -> Any:
        seen.append(t.tan().log() - s.tan().log())
        return right(function, x, t, earlier, s)

    monkeypatch.setattr(module, "difference_along", watched)
    method.loss(TURN, step_of(method.setup, B))
    torch.testing.assert_close(seen[0], torch.full_like(seen[0], 0.2))


def test_the_average_follows_the_student() -> None:
    method = build(target_decay=0.9)
    before = {name: value.clone() for name, value in method.state().items()}
    with torch.no_grad():
        for weight in method.student.network.parameters():
            weight.add_(1.0)
    method.after_step(TURN, 0)
    assert before and all(
        torch.allclose(value, before[name] + 0.1, atol=1e-6) for name, value in method.state().items()
    )


# Convergence

QUICK = {"lr": 1.5e-3, "tangent_warmup": 10, "prior_weighting": False, "finite_difference_step": 0.01}


def distance_after(iterations: int, folder: Path, setup: Setup, **config: Any) -> tuple[float, float]:
    """The one-step student's distance to the data before and after training."""
    torch.manual_seed(0)
    method = build(setup, **{**QUICK, **config})
    return distances(method, setup, folder, iterations, batch_size=64)


@in_every_convention
def test_the_student_finds_the_teachers_distribution(
    schedule: Schedule, prediction: Prediction, tmp_path: Path
) -> None:
    # The exact derivative of an MLP this small costs more in calls than in arithmetic: once is enough of it.
    tangent = "jvp" if prediction == "flow" else "finite_difference"
    before, after = distance_after(80, tmp_path, mixture_setup("line", schedule, prediction), tangent=tangent)
    assert after < 0.6 * before, (before, after)


def backwards(right: Any) -> Any:
    return lambda *given: -right(*given)


def frozen(right: Any) -> Any:
    """A student whose velocity is taken to stand still along the trajectory."""
    return lambda velocity, teacher, derivative, *rest: right(velocity, teacher, 0 * derivative, *rest)


@pytest.mark.parametrize("mutation", [backwards, frozen])
def test_with_a_wrong_tangent_it_does_not(mutation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "consistency_tangent", mutation(module.consistency_tangent))
    before, after = distance_after(80, tmp_path, mixture_setup("line", TrigFlow()), tangent="finite_difference")
    assert after > 0.8 * before, (before, after)


def test_without_its_boundary_a_network_that_predicts_x0_drifts_away(tmp_path: Path) -> None:
    setup = mixture_setup("line", VP, "x0")
    before, after = distance_after(60, tmp_path, setup, tangent="finite_difference", boundary=0.0)
    assert after > 0.7 * before, (before, after)


LEVELS = (0.3, 1.0, 3.0)


def error_at(method: SCM, level: float) -> float:
    """How far the student's answer is from where the teacher's trajectory ends, from states at sigma / alpha = level."""
    schedule, batch = method.teacher.schedule, MixtureFeed(method.setup, 512).batch(99)
    real, cond = batch.pictures
    t = schedule.time_of_log_snr(torch.full((len(real),), -math.log(level)))
    x = x_t = add_noise(schedule, real, torch.randn(real.shape, generator=torch.Generator().manual_seed(1)), t)
    with torch.no_grad():
        for at, to in pairwise([1 - part / 20 for part in range(21)]):
            x = ddim_step(x, method.teacher(x, at * t, cond), at * t, to * t, schedule)
        return float((method.student.denoiser(x_t, t, cond) - x).square().mean().sqrt())


def test_its_average_holds_a_student_to_the_teacher_that_would_run_away_from_it(tmp_path: Path) -> None:
    """With a small batch, a student that is its own target is soon worse than it began where there is little noise."""
    errors = {}
    for decay, scale in ((0.0, 1.0), (0.95, 0.2)):
        torch.manual_seed(0)
        given = {**QUICK, "finite_difference_step": 0.1, "target_decay": decay, "tangent_scale": scale}
        method = build(mixture_setup("ring"), tangent="finite_difference", **given)
        before = [error_at(method, level) for level in LEVELS]
        trainer = trainer_of(method, method.setup, tmp_path / str(decay), batch_size=8, iterations=80)
        trainer.run()
        with trainer.averaged():
            errors[decay] = [error_at(method, level) / start for level, start in zip(LEVELS, before, strict=True)]
    assert max(errors[0.95]) < 0.9, errors
    assert max(errors[0.0]) > 1.1, errors
