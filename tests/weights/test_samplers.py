"""Samplers: exact on a point, of their order on a mixture, and the same pixels as diffusers' schedulers."""

from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.weights.known import SCHEDULES, line
from weights.contracts import StepSchedule
from weights.denoiser import Cond, Denoiser
from weights.diffusion.mixture import Mixture
from weights.diffusion.parameterizations import Prediction, to_x0
from weights.diffusion.samplers import (
    ImageNoise,
    ddim_step,
    few_step,
    few_step_update,
    initial_state,
    needs_noise,
    sample_ode,
    trailing_times,
)
from weights.diffusion.schedules import DiscreteVP, Schedule
from weights.families.gaussian_mixture import AnalyticDenoiser

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
POINT = torch.tensor([[0.7, -1.3]])
SHAPE = (2, 4, 4)


class Network(Denoiser):
    """A fixed non-linear network with a discrete schedule, as its own output and as a denoiser."""

    def __init__(self, schedule: DiscreteVP, prediction: Prediction = "v") -> None:
        super().__init__()
        self.schedule: DiscreteVP = schedule
        self.prediction: Prediction = prediction
        self.times: list[float] = []

    def output(self, x_t: Tensor, timestep: Tensor) -> Tensor:
        return torch.tanh(x_t + timestep.reshape(-1, 1, 1, 1) / 1000) * 0.8

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.times.append(t[0].item())
        output = self.output(x_t, self.schedule.native_index(t))
        return to_x0(output, x_t, self.schedule.alpha(t), self.schedule.sigma(t), self.prediction)


def point(schedule: Schedule) -> AnalyticDenoiser:
    return AnalyticDenoiser(Mixture(torch.ones(1), POINT, torch.zeros(1)), schedule)


@every_schedule
@pytest.mark.parametrize("solver", ["ddim", "heun"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_point_is_reached_exactly(schedule: Schedule, solver: str, steps: int) -> None:
    noise = torch.randn(3, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    seen: list[int] = []
    x = sample_ode(
        point(schedule),
        initial_state(noise, schedule),
        trailing_times(steps),
        {},
        solver=solver,  # type: ignore[arg-type]
        on_step=lambda step, x0: seen.append(step),
    )
    torch.testing.assert_close(x.flatten(1), POINT.expand(3, 2))
    assert seen == list(range(steps))


@every_schedule
@settings(max_examples=15)
@given(t=st.floats(0.3, 1), s=st.floats(0.01, 0.25), eta=st.sampled_from([0.0, 0.5, 1.0]))
def test_a_ddim_step_on_a_point_lands_on_its_marginal(schedule: Schedule, t: float, s: float, eta: float) -> None:
    """x_s - alpha_s x_0 has the standard deviation sigma_s, whatever part of it is fresh noise."""
    now, then = torch.tensor([t], dtype=torch.float64), torch.tensor([s], dtype=torch.float64)
    eps, noise = torch.randn(2, 20_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x0 = torch.full_like(eps, 0.7)
    x_t = schedule.alpha(now) * x0 + schedule.sigma(now) * eps
    x_s = ddim_step(x_t, x0, now, then, schedule, eta, noise)
    left = (x_s - schedule.alpha(then) * x0) / schedule.sigma(then)
    assert left.std().item() == pytest.approx(1, abs=0.03)
    if eta == 0:
        torch.testing.assert_close(left, eps, rtol=1e-6, atol=1e-6)


def test_ddim_with_eta_needs_noise() -> None:
    x, t = torch.zeros(1, 1, 1, 1), torch.tensor(0.9)
    with pytest.raises(ValueError, match=r"eta=0\.5 needs noise"):
        ddim_step(x, x, t, t / 2, SCHEDULES["flow"], eta=0.5)


@pytest.mark.parametrize("name", ["flow", "trig", "edm"])
def test_the_solvers_have_their_order(name: str) -> None:
    """Halving the steps' size divides the error by 2 (DDIM, an Euler rule) or by 4 (Heun)."""
    schedule = SCHEDULES[name]
    # One Gaussian has a closed form: x_0 - m = std (x_t - alpha_t m) / sqrt(alpha_t^2 std^2 + sigma_t^2).
    mean, std = 0.4, 0.25
    teacher = AnalyticDenoiser(Mixture(torch.ones(1), torch.tensor([[mean]]), torch.tensor([std])), schedule)
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(-1, 1, 1, 1)
    x_t, end = initial_state(noise, schedule), torch.ones(1, dtype=torch.float64)
    alpha, sigma = schedule.alpha(end), schedule.sigma(end)
    exact = mean + std * (x_t - alpha * mean) / (alpha**2 * std**2 + sigma**2).sqrt()

    def error(solver: str, steps: int) -> float:
        x = sample_ode(teacher, x_t, trailing_times(steps), {}, solver=solver)  # type: ignore[arg-type]
        return (x - exact).abs().max().item()

    euler, heun = (error(solver, 50) / error(solver, 100) for solver in ("ddim", "heun"))
    assert 1.8 < euler < 2.2
    assert 3.6 < heun < 4.6
    assert error("heun", 50) < error("ddim", 100)


@pytest.mark.parametrize("name", ["zero-terminal-snr", "flow", "edm"])
def test_the_ode_draws_the_mixture(name: str) -> None:
    """Quantiles of many samples against those of the mixture itself."""
    schedule, mixture = SCHEDULES[name], line()
    unit = torch.distributions.Normal(0.0, 1.0)
    noise = unit.icdf((torch.arange(2000) + 0.5) / 2000).reshape(-1, 1, 1, 1)
    x = sample_ode(AnalyticDenoiser(mixture, schedule), initial_state(noise, schedule), trailing_times(60), {}, "heun")
    drawn = x.flatten().sort().values
    cdf = sum(w * torch.distributions.Normal(m, s).cdf(drawn) for w, m, s in ((0.3, -0.5, 0.1), (0.7, 1.0, 0.2)))
    assert (cdf - (torch.arange(2000) + 0.5) / 2000).abs().max() < 0.02


def test_what_is_no_list_of_times_is_refused() -> None:
    teacher, x = point(SCHEDULES["flow"]), torch.zeros(1, 2, 1, 1)
    for times in ([1.0], [1.0, 0.5], [0.5, 0.7, 0.0], [1.5, 0.0], [0.5, 0.5, 0.0]):
        with pytest.raises(ValueError, match="times must fall"):
            sample_ode(teacher, x, times, {})
    with pytest.raises(ValueError, match="'rk4' is not a solver"):
        sample_ode(teacher, x, [1.0, 0.0], {}, solver="rk4")  # type: ignore[arg-type]


CONFIGS = {
    "eps": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "epsilon"},
    "v": {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "prediction_type": "v_prediction",
    },
    "v, zero terminal snr": {
        "beta_schedule": "squaredcos_cap_v2",
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
    },
    "x0, zero terminal snr": {
        "beta_schedule": "squaredcos_cap_v2",
        "rescale_betas_zero_snr": True,
        "prediction_type": "sample",
    },
}
OURS: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def network(scheduler: DDIMScheduler | LCMScheduler) -> Network:
    return Network(DiscreteVP(scheduler.alphas_cumprod), OURS[scheduler.config.prediction_type])


@every_config
@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("seed", [0, 7])
def test_the_consistency_sampler_draws_what_lcm_scheduler_draws(
    config: dict[str, object], steps: int, seed: int
) -> None:
    scheduler = LCMScheduler(**config, original_inference_steps=4)
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249][:: 4 // steps]
    student = network(scheduler)

    generator = torch.Generator("cpu").manual_seed(seed)
    theirs = torch.randn(1, *SHAPE, generator=generator)
    for timestep in scheduler.timesteps:
        output = student.output(theirs, timestep)
        theirs = scheduler.step(output, timestep, theirs, generator=generator).prev_sample

    noise = ImageNoise([seed], SHAPE)
    times = StepSchedule(timesteps=[(n + 1) / 1000 for n in scheduler.timesteps.tolist()])
    ours = few_step(student, initial_state(noise(), student.schedule), times, {}, noise)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


@every_config
@pytest.mark.parametrize("steps", [1, 4, 50])
def test_ddim_draws_what_ddim_scheduler_draws(config: dict[str, object], steps: int) -> None:
    scheduler = DDIMScheduler(**config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(steps)
    teacher, x = network(scheduler), torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(3))
    theirs = x
    for timestep in scheduler.timesteps:
        theirs = scheduler.step(teacher.output(theirs, timestep), timestep, theirs).prev_sample
    ours = sample_ode(teacher, x, trailing_times(steps), {})
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert [round(t * 1000) - 1 for t in teacher.times] == scheduler.timesteps.tolist()


def test_ddim_with_eta_draws_what_ddim_scheduler_draws() -> None:
    scheduler = DDIMScheduler(**CONFIGS["v"], timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(4)
    student, generator = network(scheduler), torch.Generator("cpu").manual_seed(5)
    theirs = torch.randn(1, *SHAPE, generator=generator)
    for timestep in scheduler.timesteps:
        output = student.output(theirs, timestep)
        theirs = scheduler.step(output, timestep, theirs, eta=0.7, generator=generator).prev_sample
    noise = ImageNoise([5], SHAPE)
    schedule = StepSchedule(timesteps=[1.0, 0.75, 0.5, 0.25], sampler="ddim", eta=0.7)
    ours = few_step(student, noise(), schedule, {}, noise)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_seed_gives_the_same_noise_in_every_batch() -> None:
    together, alone = ImageNoise([3, 2**63, 5], SHAPE), ImageNoise([5], SHAPE)
    first, second = together(), together()
    assert first.shape == (3, *SHAPE)
    assert torch.equal(first[2:], alone())
    assert torch.equal(second[2:], alone())
    assert not torch.equal(first[0], first[1])
    generator = torch.Generator("cpu").manual_seed(5)
    assert torch.equal(first[2:], torch.randn(1, *SHAPE, generator=generator))


def test_initial_state_is_unit_noise_but_in_edm() -> None:
    noise = torch.randn(2, *SHAPE)
    for name in ("sd", "zero-terminal-snr", "flow", "trig"):
        torch.testing.assert_close(initial_state(noise, SCHEDULES[name]), noise)
    torch.testing.assert_close(initial_state(noise, SCHEDULES["edm"]), noise * (80**2 + 1) ** 0.5)


def refuses() -> Tensor:
    raise AssertionError("no noise was needed here")


def counted(calls: list[int]) -> Callable[[], Tensor]:
    def draw() -> Tensor:
        calls.append(1)
        return torch.ones(1, *SHAPE)

    return draw


def test_a_student_can_start_later_and_draws_only_the_noise_it_needs() -> None:
    student, calls, seen = Network(SCHEDULES["sd"]), [], []  # type: ignore[arg-type, var-annotated]
    schedule = StepSchedule(timesteps=[1.0, 0.75, 0.5, 0.25])
    assert [needs_noise(schedule, step) for step in range(4)] == [True, True, True, False]
    x = torch.zeros(1, *SHAPE)
    few_step(student, x, schedule, {}, counted(calls), start=1, on_step=lambda step, x0: seen.append((step, x0.shape)))
    assert len(calls) == 2
    assert seen == [(step, (1, *SHAPE)) for step in (1, 2, 3)]
    assert student.times == [0.75, 0.5, 0.25]
    deterministic = StepSchedule(timesteps=[1.0, 0.5], sampler="ddim")
    assert not needs_noise(deterministic, 0)
    assert few_step(student, x, deterministic, {}, refuses).shape == x.shape
    for start in (-1, 4):
        with pytest.raises(IndexError, match=rf"start={start} must lie in 0\.\.3"):
            few_step(student, x, schedule, {}, refuses, start=start)


def test_conditioning_times_are_what_the_network_is_told() -> None:
    student, noise = Network(SCHEDULES["sd"]), torch.randn(1, *SHAPE)  # type: ignore[arg-type]
    one_step = StepSchedule(timesteps=[1.0], conditioning=[0.4])
    x0 = few_step(student, noise, one_step, {}, refuses)
    assert student.times == [pytest.approx(0.4)]
    assert torch.equal(x0, student(noise, torch.tensor([0.4]), {}))


def test_an_update_is_one_step_and_passes_gradients() -> None:
    schedule, diffusion = StepSchedule(timesteps=[1.0, 0.5]), SCHEDULES["flow"]
    x, noise = torch.randn(2, 2, *SHAPE)
    x0 = torch.ones(2, *SHAPE, requires_grad=True)
    following = few_step_update(x, x0, 0, schedule, diffusion, noise)
    torch.testing.assert_close(following, 0.5 * x0 + 0.5 * noise)
    assert few_step_update(x, x0, 1, schedule, diffusion) is x0
    following.sum().backward()
    assert x0.grad is not None
    torch.testing.assert_close(x0.grad, torch.full_like(x0, 0.5))
    with pytest.raises(IndexError, match="step 2 of a schedule with 2 steps"):
        few_step_update(x, x0, 2, schedule, diffusion)
    with pytest.raises(ValueError, match=r"after step 0 \(consistency, eta=0.0\) needs noise"):
        few_step_update(x, x0, 0, schedule, diffusion)
