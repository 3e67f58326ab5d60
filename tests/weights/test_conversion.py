"""A denoiser in another schedule: exact where the truth is known, and differentiable forwards as consistency needs it."""

import pytest
import torch
from torch.autograd import forward_ad

from tests.weights.known import SCHEDULES, line
from weights.diffusion.conversion import Converted
from weights.diffusion.schedules import DiscreteVP, Schedule, TrigFlow
from weights.families.gaussian_mixture import AnalyticDenoiser

# torch loads some derivatives when it first makes a dual tensor, by a way it deprecates itself.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
X = torch.linspace(-2, 2, 6, dtype=torch.float64).reshape(6, 1, 1, 1)
T = torch.tensor([0.05, 0.2, 0.4, 0.6, 0.8, 0.95], dtype=torch.float64)  # every schedule reaches TrigFlow's
COND = {"label": torch.tensor([-1, 0, 1, -1, 0, 1])}


@every_schedule
@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
def test_the_analytic_denoiser_is_itself_in_every_schedule(schedule: Schedule, sigma_data: float) -> None:
    trig = TrigFlow(sigma_data)
    view = Converted(AnalyticDenoiser(line(), schedule), trig)
    torch.testing.assert_close(view(X, T, COND), AnalyticDenoiser(line(), trig)(X, T, COND), atol=1e-9, rtol=1e-9)


def test_float32_stays_float32() -> None:
    assert Converted(AnalyticDenoiser(line(), SCHEDULES["flow"]), TrigFlow())(X.float(), T, COND).dtype == torch.float32


@every_schedule
def test_its_forward_derivative_is_the_quotient_of_differences(schedule: Schedule) -> None:
    view = Converted(AnalyticDenoiser(line(), schedule), TrigFlow())
    dx, dt, h = torch.cos(X), torch.sin(9 * T), 1e-6
    with forward_ad.dual_level():
        value = view(forward_ad.make_dual(X, dx), forward_ad.make_dual(T, dt), COND)
        tangent = forward_ad.unpack_dual(value).tangent
    difference = (view(X + h * dx, T + h * dt, COND) - view(X - h * dx, T - h * dt, COND)) / (2 * h)
    # A discrete schedule has a kink at each of its points, beside which the two agree.
    torch.testing.assert_close(tangent, difference, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_discrete_schedules_index_moves_with_time_on_its_grid_and_off_it(dtype: torch.dtype) -> None:
    schedule = SCHEDULES["zero-terminal-snr"]
    assert isinstance(schedule, DiscreteVP)
    t = torch.tensor([0.3, 0.3004, 0.5, 1.0], dtype=dtype)
    with forward_ad.dual_level():
        index = schedule.native_index(forward_ad.make_dual(t, torch.ones_like(t)))
        assert forward_ad.unpack_dual(index).tangent.tolist() == [1000.0] * 4
    t.requires_grad_(True)
    assert torch.autograd.grad(schedule.native_index(t).sum(), t)[0].tolist() == [1000.0] * 4
