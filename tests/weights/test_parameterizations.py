"""Every prediction, in every schedule: there and back, also where alpha or sigma is small."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.weights.known import SCHEDULES
from weights.diffusion.parameterizations import (
    PREDICTIONS,
    Prediction,
    eps_from_x0,
    from_x0,
    to_x0,
    training_target,
)
from weights.diffusion.schedules import Schedule

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)


def pair(seed: int, rows: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x0, eps = torch.randn(2, rows, 4, 3, 3, generator=generator, dtype=torch.float64).to(dtype)
    return x0, eps


def state(
    schedule: Schedule, t: torch.Tensor, x0: torch.Tensor, eps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    alpha, sigma = schedule.alpha(t.double()), schedule.sigma(t.double())
    x_t = alpha.view(-1, 1, 1, 1) * x0.double() + sigma.view(-1, 1, 1, 1) * eps.double()
    return x_t.to(x0.dtype), alpha, sigma


@every_schedule
@every_prediction
@settings(max_examples=15)
@given(ts=st.lists(st.floats(1e-5, 1 - 1e-5), min_size=1, max_size=4), seed=st.integers(0, 999))
def test_round_trip(schedule: Schedule, prediction: Prediction, ts: list[float], seed: int) -> None:
    x0, eps = pair(seed, len(ts))
    x_t, alpha, sigma = state(schedule, torch.tensor(ts, dtype=torch.float64), x0, eps)
    output = from_x0(x0, x_t, alpha, sigma, prediction)
    torch.testing.assert_close(to_x0(output, x_t, alpha, sigma, prediction), x0, rtol=1e-9, atol=1e-9)
    # ... and what a network is trained on is that output.
    torch.testing.assert_close(training_target(x0, eps, alpha, sigma, prediction), output, rtol=1e-5, atol=1e-5)


@every_schedule
@every_prediction
@pytest.mark.parametrize("t", [0.0, 1e-9, 1.0])
def test_the_ends_have_finite_targets_and_an_exact_x0(schedule: Schedule, prediction: Prediction, t: float) -> None:
    x0, eps = pair(0, 2)
    x_t, alpha, sigma = state(schedule, torch.full((2,), t), x0, eps)
    target = training_target(x0, eps, alpha, sigma, prediction)
    assert target.isfinite().all()
    if prediction == "eps" and alpha[0] == 0:
        assert not to_x0(target, x_t, alpha, sigma, prediction).isfinite().any()  # as the docstring says
    else:
        torch.testing.assert_close(to_x0(target, x_t, alpha, sigma, prediction), x0, rtol=1e-9, atol=1e-9)


@every_prediction
def test_float32_inputs_are_converted_in_float64(prediction: Prediction) -> None:
    schedule = SCHEDULES["cosine"]  # sqrt(alphas_cumprod) ends at 5e-5, so float32 would lose four digits
    x0, eps = pair(0, 2, torch.float32)
    x_t, alpha, sigma = state(schedule, torch.tensor([0.001, 1.0]), x0, eps)
    exact = to_x0(eps.double(), x_t.double(), alpha, sigma, prediction)
    ours = to_x0(eps, x_t, alpha, sigma, prediction)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, exact.float(), rtol=1e-6, atol=0)
    assert to_x0(eps.bfloat16(), x_t.bfloat16(), alpha, sigma, prediction).dtype == torch.float32


def test_definitions() -> None:
    """The conventions pinned for the project, written out by hand."""
    x0, eps = pair(0, 1)
    alpha, sigma = torch.tensor([0.8], dtype=torch.float64), torch.tensor([0.6], dtype=torch.float64)
    x_t = 0.8 * x0 + 0.6 * eps
    torch.testing.assert_close(from_x0(x0, x_t, alpha, sigma, "v"), 0.8 * eps - 0.6 * x0)
    torch.testing.assert_close(from_x0(x0, x_t, alpha, sigma, "flow"), eps - x0)
    torch.testing.assert_close(from_x0(x0, x_t, alpha, sigma, "eps"), eps)
    torch.testing.assert_close(eps_from_x0(x0, x_t, alpha, sigma), eps)
    noise, sd = 0.6 / 0.8, 0.5  # EDM's own input is x_t / alpha = x0 + noise * eps
    x = x_t / 0.8
    c_skip, c_out = sd**2 / (noise**2 + sd**2), noise * sd / (noise**2 + sd**2) ** 0.5
    torch.testing.assert_close(from_x0(x0, x_t, alpha, sigma, "edm", sd), (x0 - c_skip * x) / c_out)


@every_prediction
def test_gradients_flow_through_the_output(prediction: Prediction) -> None:
    x0, eps = pair(0, 2, torch.float32)
    output = eps.clone().requires_grad_(True)
    to_x0(output, x0, torch.tensor(0.8), torch.tensor(0.6), prediction).sum().backward()
    assert output.grad is not None
    assert output.grad.isfinite().all()
    assert output.grad.abs().min() > 0


@pytest.mark.parametrize("convert", [to_x0, from_x0, training_target])
def test_an_unknown_prediction_is_refused(convert: object) -> None:
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="'noise' is not a prediction type: use one of eps, v, x0, flow, edm"):
        convert(x, x, torch.ones(1), torch.ones(1), "noise")  # type: ignore[operator]
