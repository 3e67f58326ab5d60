"""The analytic teacher against brute force, and its family as any other text-to-image model."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.weights.known import SCHEDULES, line
from weights.contracts import StepSchedule
from weights.diffusion.mixture import Mixture, log_ratio
from weights.diffusion.parameterizations import PREDICTIONS, Prediction
from weights.diffusion.samplers import initial_state, sample_ode, trailing_times
from weights.diffusion.schedules import Schedule, add_noise
from weights.families import families, load
from weights.families.gaussian_mixture import (
    MLP,
    PRESETS,
    AnalyticDenoiser,
    GaussianMixture,
    MLPDenoiser,
    fit,
)

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
GRID = torch.linspace(-6, 6, 24_001, dtype=torch.float64)
levels = settings(max_examples=15)


def normal(x: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    return torch.distributions.Normal(mean, std).log_prob(x).exp()


def scalars(*values: float) -> list[torch.Tensor]:
    return [torch.tensor(value, dtype=torch.float64) for value in values]


@levels
@given(x=st.floats(-3, 3), alpha=st.floats(0.05, 1), sigma=st.floats(0.05, 3), label=st.sampled_from([-1, 0, 1]))
def test_density_x0_and_score_agree_with_integrals(x: float, alpha: float, sigma: float, label: int) -> None:
    prior = [0.3 * normal(GRID, -0.5, 0.1), 0.7 * normal(GRID, 1.0, 0.2)]
    clean = sum(prior) if label < 0 else prior[label] / (0.3, 0.7)[label]
    joint = clean * normal(torch.tensor(x, dtype=torch.float64) - alpha * GRID, 0.0, sigma)
    density = torch.trapezoid(joint, GRID)
    point = torch.full((1, 1, 1, 1), x, dtype=torch.float64)
    a, s = scalars(alpha, sigma)
    ours, labels = line(), torch.tensor([label])
    if density > 1e-280:
        torch.testing.assert_close(
            ours.log_density(point, a, s, labels), density.log().reshape(1), rtol=1e-6, atol=1e-6
        )
        mean = torch.trapezoid(joint * GRID, GRID) / density
        torch.testing.assert_close(ours.x0(point, a, s, labels).flatten(), mean.reshape(1), rtol=1e-6, atol=1e-6)
    point.requires_grad_(True)
    (gradient,) = torch.autograd.grad(ours.log_density(point, a, s, labels).sum(), point)
    score = ours.score(point, a, s, labels)
    torch.testing.assert_close(score, gradient)
    tweedie = (a * ours.x0(point, a, s, labels) - point) / s**2
    torch.testing.assert_close(score, tweedie, rtol=1e-7, atol=1e-7)


def test_the_unconditional_density_is_the_labels_average() -> None:
    mixture = PRESETS["ring"]()
    x = torch.randn(50, 2, 1, 1, dtype=torch.float64)
    a, s = scalars(0.8, 0.5)
    by_label = torch.stack([mixture.log_density(x, a, s, torch.full((50,), label)) for label in range(8)])
    torch.testing.assert_close(mixture.log_density(x, a, s), (by_label.exp() / 8).sum(0).log())
    torch.testing.assert_close(mixture.x0(x, a, s), mixture.x0(x, a, s, torch.full((50,), -1)))


def test_ends_are_finite_and_exact() -> None:
    mixture, x = line(), torch.tensor([-0.4, 0.9, 2.0], dtype=torch.float64).reshape(3, 1, 1, 1)
    one, zero = scalars(1.0, 0.0)
    torch.testing.assert_close(mixture.x0(x, one, zero), x)
    torch.testing.assert_close(mixture.x0(x, zero, one), torch.full_like(x, 0.3 * -0.5 + 0.7 * 1.0))
    points = Mixture(torch.ones(2), torch.tensor([[-1.0], [1.0]]), torch.zeros(2))
    torch.testing.assert_close(points.x0(x, one, zero).flatten(), torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64))


@levels
@given(x=st.floats(-2, 2), alpha=st.floats(0.1, 1), sigma=st.floats(0.2, 2))
def test_log_ratio_is_the_ideal_discriminators_logit(x: float, alpha: float, sigma: float) -> None:
    p, q = line(), Mixture(torch.tensor([1.0]), torch.tensor([[0.2]]), torch.tensor([0.9]))
    point, (a, s) = torch.full((2, 1, 1, 1), x, dtype=torch.float64), scalars(alpha, sigma)
    ratio = log_ratio(p, q, point, a, s)
    assert ratio.shape == (2,)
    dp, dq = p.log_density(point, a, s).exp(), q.log_density(point, a, s).exp()
    torch.testing.assert_close(ratio.sigmoid(), dp / (dp + dq))
    torch.testing.assert_close(log_ratio(q, p, point, a, s), -ratio)


def test_samples_follow_the_mixture_and_their_label() -> None:
    mixture, generator = line(), torch.Generator().manual_seed(0)
    everything = mixture.sample(torch.full((20_000,), -1), generator)
    assert everything.shape == (20_000, 1, 1, 1)
    assert everything.mean().item() == pytest.approx(0.55, abs=0.02)
    assert (everything < 0.25).float().mean().item() == pytest.approx(0.3, abs=0.02)
    first, second = mixture.sample(torch.tensor([0, 1]).repeat(5000), generator).reshape(-1, 2).T
    assert (first.mean().item(), first.std().item()) == pytest.approx((-0.5, 0.1), abs=0.01)
    assert (second.mean().item(), second.std().item()) == pytest.approx((1.0, 0.2), abs=0.01)


@pytest.mark.parametrize(
    ("weights", "means", "stds", "labels", "message"),
    [
        ([1.0], [[0.0], [1.0]], [1.0], None, r"want \(K,\), \(K, D\)"),
        ([1.0, -1.0], [[0.0], [1.0]], [1.0, 1.0], None, "must be positive"),
        ([1.0, 1.0], [[0.0], [1.0]], [1.0, -1.0], None, "at least 0"),
        ([1.0, 1.0], [[0.0], [1.0]], [1.0, 1.0], [0, 2], "every label used"),
    ],
)
def test_impossible_mixtures_are_refused(
    weights: list[float], means: list[list[float]], stds: list[float], labels: list[int] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Mixture(
            torch.tensor(weights),
            torch.tensor(means),
            torch.tensor(stds),
            None if labels is None else torch.tensor(labels),
        )


@every_schedule
def test_the_denoiser_is_the_posterior_mean_by_monte_carlo(schedule: Schedule) -> None:
    """Least squares: no other function of x_t is nearer to x_0, so the residual is uncorrelated with all of them."""
    mixture, generator = line(), torch.Generator().manual_seed(1)
    label = torch.arange(2).repeat(10_000)
    x0 = mixture.sample(label, generator)
    t = torch.full((20_000,), 0.4)
    x_t = add_noise(schedule, x0, torch.randn(x0.shape, generator=generator), t)
    estimate = AnalyticDenoiser(mixture, schedule)(x_t, t, {"label": label})
    assert estimate.dtype == torch.float32
    residual = (x0 - estimate).flatten()
    for function in (torch.ones_like(residual), x_t.flatten(), x_t.flatten().sin(), estimate.flatten()):
        products = residual * function
        assert products.mean().abs() < 5 * products.std() / len(products) ** 0.5


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", ["sd", "edm", "flow-shifted", "trig-half"])
def test_the_mlp_is_a_denoiser_in_every_schedule_and_prediction(name: str, prediction: Prediction) -> None:
    denoiser = MLPDenoiser(MLP(2, 8, width=16), SCHEDULES[name], prediction)
    x_t, t, cond = torch.randn(4, 2, 1, 1), torch.tensor([0.05, 0.3, 0.6, 0.95]), {"label": torch.tensor([0, 7, -1, 3])}
    x0, features = denoiser.with_features(x_t, t, cond)
    assert torch.equal(x0, denoiser(x_t, t, cond))
    assert (x0.shape, x0.dtype) == (x_t.shape, torch.float32)
    assert [tuple(feature.shape) for feature in features] == [(4, 16, 1, 1)]
    assert denoiser.feature_channels == [16]
    (x0.square().sum() + features[0].sum()).backward()
    gradients = [parameter.grad for parameter in denoiser.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    other = denoiser(x_t, t, {"label": torch.tensor([1, 7, -1, 3])})
    assert not torch.equal(other[0], x0[0])
    assert torch.equal(other[1:], x0[1:])


def test_every_block_of_the_mlp_can_be_read_and_the_exact_teacher_has_none() -> None:
    denoiser = MLPDenoiser(MLP(2, 8, width=16, depth=3), SCHEDULES["sd"])
    x_t, t, cond = torch.randn(4, 2, 1, 1), torch.tensor([0.05, 0.3, 0.6, 0.95]), {"label": torch.tensor([0, 7, -1, 3])}
    assert denoiser.feature_blocks == ["blocks.0", "blocks.1", "blocks.2"]
    first, middle, last = denoiser.block_features(x_t, t, cond, denoiser.feature_blocks)
    assert first.shape == middle.shape == last.shape == (4, 16, 1, 1)
    assert torch.equal(middle, denoiser.features(x_t, t, cond)[0])
    assert torch.equal(denoiser.block_features(x_t, t, cond, ["blocks.2"])[0], last)
    exact = AnalyticDenoiser(line(), SCHEDULES["sd"])
    assert exact.feature_blocks == []
    with pytest.raises(TypeError, match="AnalyticDenoiser has no inner features"):
        exact.block_features(x_t[:, :1], t, cond, ["blocks.0"])


def test_fit_makes_a_student_that_starts_at_its_teacher() -> None:
    model = load("gaussian_mixture", "line").copy()
    assert isinstance(model, GaussianMixture)
    before = [parameter.clone() for parameter in model.network.parameters()]
    teacher = AnalyticDenoiser(model.mixture, model.schedule)
    error = fit(model.denoiser, teacher, iterations=250, batch=256)
    assert error < 0.004  # the data's variance is 0.5
    assert all(not torch.equal(a, b) for a, b in zip(before, model.network.parameters(), strict=True))
    noise = torch.randn(500, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        drawn = sample_ode(
            model.denoiser,
            initial_state(noise, model.schedule),
            trailing_times(20),
            {"label": torch.tensor([0, 1]).repeat(250)},
        ).reshape(-1, 2)
    assert drawn.mean(0).tolist() == pytest.approx([-0.5, 1.0], abs=0.08)


@pytest.fixture
def ring() -> GaussianMixture:
    model = load("gaussian_mixture", "ring")
    assert isinstance(model, GaussianMixture)
    return model


def test_the_family_is_found_and_its_model_is_exact(ring: GaussianMixture) -> None:
    assert families()["gaussian_mixture"] is GaussianMixture
    assert isinstance(ring.denoiser, AnalyticDenoiser)
    assert ring.latent_shape() == ring.latent_shape(1, 1) == (2, 1, 1)
    assert (ring.device, ring.dtype, ring.size) == (torch.device("cpu"), torch.float32, 1)
    assert ring.components() == {"unet": ring.network}
    assert not any(parameter.requires_grad for parameter in ring.network.parameters())
    points = ring.mixture.sample(ring.encode_prompts(["class 3"] * 500)["label"], torch.Generator().manual_seed(0))
    assert torch.equal(ring.decode(ring.encode(points)), points)
    assert points.mean(0).flatten().tolist() == pytest.approx([-0.99, 0.99], abs=0.05)  # the ring at 135 degrees


def test_prompts(ring: GaussianMixture) -> None:
    assert ring.encode_prompts(["class 3", "", "class 0"])["label"].tolist() == [3, -1, 0]
    embedded = ring.embed_prompts(["class 3", "", "class 0"])
    assert embedded.shape == (3, 9)
    assert embedded.argmax(1).tolist() == [3, 8, 0]
    assert embedded.norm(dim=1).tolist() == [1, 1, 1]
    for prompt in ("class 8", "class -1", "a cat", "class 1 "):
        with pytest.raises(ValueError, match=r"give '' or 'class K' with K in 0\.\.7"):
            ring.encode_prompts([prompt])


def test_a_copy_denoises_with_its_own_network(ring: GaussianMixture) -> None:
    student = ring.copy()
    assert isinstance(student.denoiser, MLPDenoiser)
    assert student.denoiser.network is student.network
    assert student.network is not ring.network
    assert student.mixture is ring.mixture
    assert student.denoiser.schedule is ring.denoiser.schedule
    assert ring.with_network(ring.network).network is ring.network
    with pytest.raises(TypeError, match="is an MLP, got Linear"):
        ring.with_network(torch.nn.Linear(1, 1))


def test_a_loaded_model_is_always_the_same_and_moves_no_random_state() -> None:
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    first, second = load("gaussian_mixture", "line"), load("gaussian_mixture", "line")
    assert torch.equal(torch.rand(1), expected)
    for a, b in zip(first.network.parameters(), second.network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_a_mixture_cannot_do_is_said(ring: GaussianMixture, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no mixture is named 'moons'; available: line, ring"):
        load("gaussian_mixture", "moons")
    with pytest.raises(ValueError, match="size 2x1"):
        ring.latent_shape(1, 2)
    with pytest.raises(ValueError, match="cannot be exported"):
        ring.export(tmp_path, StepSchedule(timesteps=[1.0]))
