"""f-distill: where its ratios come from, what they do to the gradient, and that every divergence finds the teacher."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from distillers import ratios
from distillers.losses.divergences import DIVERGENCES, DivergenceName, density_ratio
from distillers.methods.base import Turn
from distillers.methods.dmd2 import DMD2, DMD2Config
from distillers.methods.f_distill import FDistill, FDistillConfig
from distillers.methods.score_distillation import Noised
from tests.distillers.mixtures import VP, distances, mixture_setup, step_of
from weights.contracts import StepSchedule
from weights.diffusion.mixture import Mixture, log_ratio
from weights.diffusion.schedules import add_noise
from weights.families.gaussian_mixture import GaussianMixture

STUDENT = Turn(name="student", trains=("student",))
ONE = {1: StepSchedule(timesteps=[1.0])}


def build(**config: Any) -> FDistill:
    setup = mixture_setup()
    torch.manual_seed(0)
    return FDistill(FDistillConfig(guidance_scale=1.0, **config), setup)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("gan_weight", 0.0),
        ("share_times", False),
        ("ratio_range", (0.0, 1.0)),
        ("ratio_range", (2.0, 1.0)),
        ("divergence", "total_variation"),
        ("ratio_bins", 0),
    ],
)
def test_a_bad_setting_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as error:
        FDistillConfig.model_validate({field: value})
    assert field in str(error.value)


def test_under_the_reverse_kl_it_is_dmd2() -> None:
    ours = build(divergence="reverse_kl")
    torch.manual_seed(0)
    theirs = DMD2(DMD2Config(guidance_scale=1.0, share_times=True), mixture_setup())
    losses = [method.loss(STUDENT, step_of(method.setup, 16)).loss for method in (ours, theirs)]
    assert torch.equal(losses[0], losses[1])


def weighed(method: FDistill, ratios: list[float], t: Tensor) -> Tensor:
    zeros = torch.zeros(len(t), 1, 1, 1)
    logits = torch.tensor(ratios).log().unsqueeze(1)
    return method.weight(Noised(x=zeros, x_t=zeros, t=t, fake_x0=zeros, teacher_x0=zeros, logits=logits))


def test_a_picture_is_weighed_by_its_ratio_over_its_times_average_so_far() -> None:
    method = build(
        divergence="forward_kl", normalize_weights=False, ratio_bins=2, ratio_decay=0.5, ratio_range=(0.5, 9)
    )
    t, means = torch.tensor([0.1, 0.4, 0.9]), method.ratios.means
    assert torch.allclose(weighed(method, [2.0, 4.0, 1.0], t), torch.tensor([2.0, 4.0, 1.0]))
    method.after_step(STUDENT, 0)
    assert torch.allclose(method.ratios.means, torch.tensor([0.5 + 0.5 * 3.0, 1.0]))
    assert torch.allclose(weighed(method, [2.0, 4.0, 1.0], t), torch.tensor([2 / 2.0, 4 / 2.0, 1.0]))
    held = weighed(method, [math.exp(-9), math.exp(9), 1.0], t)
    assert held.tolist() == [0.5, 9.0, 1.0]
    assert method.ratios.means is means, "a captured iteration writes where it was captured"


def test_in_bfloat16_the_ratios_are_as_exact() -> None:
    method, ratios, t = build(divergence="forward_kl", normalize_weights=False), [2.0, 3.0, 5.0], torch.full((3,), 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        found = weighed(method, ratios, t)
    assert torch.equal(found, weighed(build(divergence="forward_kl", normalize_weights=False), ratios, t))


@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
def test_normalized_weights_leave_the_steps_size(divergence: DivergenceName) -> None:
    """From the first step on where ratios are 1, and on average wherever they are."""
    method, t = build(divergence=divergence, ratio_decay=0.9, ratio_range=(1e-3, 1e3)), torch.full((64,), 0.5)
    assert torch.allclose(weighed(method, [1.0] * 64, t), torch.ones(64))
    generator, means = torch.Generator().manual_seed(0), []
    for iteration in range(200):
        drawn = (0.5 * torch.randn(64, generator=generator)).exp()
        means.append(weighed(method, drawn.tolist(), t).mean().item())
        method.after_step(STUDENT, iteration)
    assert sum(means[100:]) / 100 == pytest.approx(1.0, abs=0.06)


SHARED = {"divergence": "pearson_chi2", "ratio_bins": 3, "ratio_decay": 0.5}


def batch() -> tuple[list[float], Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(12, generator=generator).exp().tolist(), torch.rand(12, generator=generator)


def test_an_accumulated_batch_is_the_whole_batch() -> None:
    """In three micro-batches, one of them of one picture: the weights and what the averages become are the same."""
    whole, parts = build(**SHARED), build(**SHARED)
    ratios, t = batch()
    for iteration in range(3):
        expected = weighed(whole, ratios, t)
        found = [weighed(parts, ratios[a:b], t[a:b]) for a, b in ((0, 7), (7, 8), (8, 12))]
        torch.testing.assert_close(torch.cat(found), expected)
        for method in (whole, parts):
            method.after_step(STUDENT, iteration)
        for name, average in whole.state().items():
            torch.testing.assert_close(parts.state()[name], average)
    assert whole.ratios.weight_mean > 1 and not whole.ratios.noted.any()


def test_averages_are_over_the_pictures_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, mine, other = (build(**SHARED) for _ in range(3))
    ratio, t = batch()
    for method, rows in ((whole, slice(0, 12)), (mine, slice(0, 5)), (other, slice(5, 12))):
        weighed(method, ratio[rows], t[rows])
    whole.after_step(STUDENT, 0)
    monkeypatch.setattr(ratios, "summed", lambda noted: noted.add_(other.ratios.noted))
    mine.after_step(STUDENT, 0)
    for name, average in whole.state().items():
        torch.testing.assert_close(mine.state()[name], average)


def test_only_the_students_step_moves_the_averages() -> None:
    method = build()
    weighed(method, [2.0] * 4, torch.full((4,), 0.5))
    method.after_step(method.critic_turn(), 0)
    assert torch.equal(method.ratios.means, torch.ones(10)) and method.ratios.noted.any()


def test_averages_are_saved_and_come_back() -> None:
    method, other = build(), build()
    weighed(method, [2.0] * 4, torch.full((4,), 0.5))
    method.after_step(STUDENT, 0)
    other.load_state(method.state())
    assert torch.equal(other.ratios.means, method.ratios.means)
    assert torch.equal(other.ratios.weight_mean, method.ratios.weight_mean)
    assert not torch.equal(other.ratios.means, torch.ones(10))
    early = build()  # of version 0.1.0
    early.load_state({"ratio_means": method.ratios.means})
    assert torch.equal(early.ratios.means, method.ratios.means)


def test_the_discriminators_logits_are_the_log_ratio_of_the_densities() -> None:
    """The student is a Gaussian in place of its network, so that the ratio to the exact teacher is known at every time."""
    method = build(discriminator_weight=1.0, score_times=(0.3, 0.95))
    setup, generator = method.setup, torch.Generator().manual_seed(0)
    assert isinstance(setup.base, GaussianMixture) and method.heads is not None
    teacher = setup.base.mixture
    student = Mixture(torch.ones(1), torch.tensor([[-0.2]]), torch.tensor([0.5]))

    def drawn(mixture: Mixture, count: int) -> Tensor:
        return mixture.sample(torch.full((count,), -1), generator)

    method._sample = lambda step: (drawn(student, step.size), step.batch.cond)  # type: ignore[method-assign]
    weights = [*method.fake_score_network.parameters(), *method.heads.parameters()]
    optimizer = torch.optim.Adam(weights, lr=3e-3)
    for iteration in range(200):
        optimizer.zero_grad()
        method.loss(method.critic_turn(), step_of(setup, 128, iteration)).loss.backward()
        optimizer.step()
    x, t = torch.cat([drawn(teacher, 512), drawn(student, 512)]), 0.3 + 0.65 * torch.rand(1024, generator=generator)
    x_t = add_noise(VP, x, torch.randn(x.shape, generator=generator), t)
    logits = method.heads(method.critic.features(x_t, t, {"label": torch.full((1024,), -1)}))
    found = density_ratio(logits).log().detach().double()
    exact = log_ratio(teacher, student, x_t.flatten(1).double(), VP.alpha(t), VP.sigma(t))
    assert torch.corrcoef(torch.stack([found, exact]))[0, 1] > 0.95
    assert (found - exact).square().mean().sqrt() < 0.25 < exact.std() / 2


# Convergence

QUICK = {
    "guidance_scale": 1.0, "student_every": 4, "student_lr": 1e-3, "fake_score_lr": 2e-3, "head_lr": 2e-3,
    "student_betas": (0.0, 0.99), "critic_betas": (0.0, 0.99), "warmup": 10, "score_weighting": "v",
    "dm_times": (0.15, 0.98), "schedules": ONE, "gan_weight": 1e-3, "discriminator_weight": 0.1,
}  # fmt: skip


def distance_after(iterations: int, folder: Path, **config: Any) -> float:
    setup = mixture_setup("ring")
    torch.manual_seed(0)
    method = FDistill(FDistillConfig(**{**QUICK, **config}), setup)
    return distances(method, setup, folder, iterations)[1]


@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
def test_every_divergence_finds_the_teachers_distribution(divergence: DivergenceName, tmp_path: Path) -> None:
    """A fitted network's own samples are 0.81 away."""
    assert distance_after(250, tmp_path, divergence=divergence) < 0.4


def test_with_a_weight_of_the_wrong_sign_it_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = FDistill.weight
    monkeypatch.setattr(FDistill, "weight", lambda *given: -right(*given))
    assert distance_after(100, tmp_path, divergence="forward_kl", normalize_weights=False) > 0.6
