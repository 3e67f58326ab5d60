"""Every schedule: monotone, invertible, exact at its ends; the conversion between any two keeps the posterior."""

import copy

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.weights.known import SCHEDULES, line
from weights.diffusion.schedules import (
    EDM,
    DiscreteVP,
    RectifiedFlow,
    Schedule,
    TrigFlow,
    add_more_noise,
    add_noise,
    convert,
    expand,
    trailing_times,
)

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
times = st.lists(st.just(0.0) | st.floats(1e-300, 1), min_size=2, max_size=20, unique=True)
few = settings(max_examples=25)


def double(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@every_schedule
@few
@given(ts=times)
def test_log_snr_falls_and_agrees_with_alpha_and_sigma(schedule: Schedule, ts: list[float]) -> None:
    ts = [t for t, before in zip(sorted(ts), [-1.0, *sorted(ts)], strict=False) if t - before > 1e-6]
    t = double(ts)
    alpha, sigma, log_snr = schedule.alpha(t), schedule.sigma(t), schedule.log_snr(t)
    assert ((alpha >= 0) & (alpha <= 1) & (sigma >= 0)).all()
    assert (log_snr.diff() < 0).all()
    torch.testing.assert_close(log_snr, (alpha / sigma).log())


@every_schedule
@few
@given(ts=times)
def test_time_of_log_snr_is_the_inverse(schedule: Schedule, ts: list[float]) -> None:
    t = double(ts)
    torch.testing.assert_close(schedule.time_of_log_snr(schedule.log_snr(t)), t, atol=1e-7, rtol=0)


@every_schedule
def test_times_beyond_the_ends_and_unreachable_ratios_give_the_nearest_end(schedule: Schedule) -> None:
    torch.testing.assert_close(schedule.alpha(double([-1, 2])), schedule.alpha(double([0, 1])), rtol=0, atol=0)
    assert schedule.time_of_log_snr(double([1e4, -1e4])).tolist() == pytest.approx([0, 1], abs=1e-12)
    assert schedule.time_of_log_snr(double([float("inf"), -float("inf")])).tolist() == pytest.approx([0, 1], abs=1e-12)


@every_schedule
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_shape_and_dtype(schedule: Schedule, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    t = torch.full(shape, 0.5, dtype=dtype)
    for value in (schedule.alpha(t), schedule.sigma(t), schedule.log_snr(t), schedule.time_of_log_snr(t)):
        assert value.shape == shape
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("name", ["sd", "ddpm", "cosine", "zero-terminal-snr"])
def test_a_discrete_schedule_is_clean_at_zero_and_exact_on_its_grid(name: str) -> None:
    schedule = SCHEDULES[name]
    assert isinstance(schedule, DiscreteVP)
    index = torch.arange(1000)
    t = schedule.time_of_index(index)
    assert t.dtype == torch.float32
    assert schedule.native_index(t).tolist() == index.tolist()
    in_float32 = torch.stack([schedule.alpha(t), schedule.sigma(t)])
    in_float64 = torch.stack([f((index.double() + 1) / 1000) for f in (schedule.alpha, schedule.sigma)])
    torch.testing.assert_close(in_float32, in_float64.float(), rtol=0, atol=0)
    clean = torch.zeros(1)
    assert (schedule.alpha(clean), schedule.sigma(clean), schedule.native_index(clean)) == (1, 0, 0)


@pytest.mark.parametrize(
    ("config", "schedule"),
    [
        ({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}, SCHEDULES["sd"]),
        ({"beta_schedule": "linear"}, SCHEDULES["ddpm"]),
        ({"beta_schedule": "squaredcos_cap_v2"}, SCHEDULES["cosine"]),
        ({"beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": True}, SCHEDULES["zero-terminal-snr"]),
    ],
)
def test_the_tables_are_those_of_diffusers(config: dict[str, object], schedule: DiscreteVP) -> None:
    theirs = DDPMScheduler(**config).alphas_cumprod
    ours = DiscreteVP(theirs)
    t = ours.time_of_index(torch.arange(1000).double())
    torch.testing.assert_close(ours.alpha(t) ** 2, theirs.double(), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(schedule.alpha(t), ours.alpha(t), rtol=1e-4, atol=1e-6)


def test_zero_terminal_snr_ends_in_pure_noise() -> None:
    schedule, end = SCHEDULES["zero-terminal-snr"], torch.ones(1)
    assert (schedule.alpha(end), schedule.sigma(end), schedule.log_snr(end)) == (0, 1, -float("inf"))


def test_a_discrete_schedule_can_be_copied() -> None:
    schedule = copy.deepcopy(SCHEDULES["sd"])
    t = torch.rand(5)
    assert torch.equal(schedule.alpha(t), SCHEDULES["sd"].alpha(t))


def test_edm_gives_karras_sigmas() -> None:
    ramp = np.linspace(0, 1, 10)  # Karras et al., equation 5
    karras = (80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(EDM().sigma(torch.from_numpy(1 - ramp)), torch.from_numpy(karras))


def test_shift_moves_time_towards_noise() -> None:
    t = torch.tensor([0.25, 0.5])
    assert RectifiedFlow(3.0).sigma(t).tolist() == pytest.approx([0.5, 0.75])
    assert RectifiedFlow().sigma(t).tolist() == pytest.approx([0.25, 0.5])


shifts = st.floats(0.05, 20)


@few
@given(shift=shifts, ts=times, num_train=st.sampled_from([1, 1000]))
def test_a_flow_tells_its_network_sigma_at_any_shift(shift: float, ts: list[float], num_train: int) -> None:
    schedule, t = RectifiedFlow(shift, num_train), double(ts)
    torch.testing.assert_close(schedule.alpha(t) + schedule.sigma(t), torch.ones_like(t))
    told = schedule.native_index(t)
    torch.testing.assert_close(told, num_train * schedule.sigma(t))
    torch.testing.assert_close(schedule.time_of_index(told), t, atol=1e-12, rtol=1e-9)
    ends = torch.tensor([0.0, 1.0])
    assert torch.equal(schedule.native_index(ends), ends * num_train)
    assert torch.equal(schedule.time_of_index(ends * num_train), ends)
    torch.testing.assert_close(schedule.time_of_log_snr(schedule.log_snr(t)), t, atol=1e-12, rtol=1e-9)


@few
@given(shift=shifts, other=shifts, ts=times)
def test_a_shift_is_another_speed_along_the_same_line(shift: float, other: float, ts: list[float]) -> None:
    source, target, t = RectifiedFlow(shift), RectifiedFlow(other), double(ts)
    x_t = torch.randn(len(ts), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, time = convert(x_t, t, source, target)
    torch.testing.assert_close(x, x_t)
    torch.testing.assert_close(target.sigma(time), source.sigma(t))
    torch.testing.assert_close(target.alpha(time), source.alpha(t), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_is_that_of_diffusers(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule = RectifiedFlow(shift)
    t = double([1 - step / 1000 for step in range(1000)])
    torch.testing.assert_close(schedule.sigma(t), scheduler.sigmas.double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(schedule.native_index(t), scheduler.timesteps.double(), atol=1e-3, rtol=0)


def test_trigflow_keeps_the_papers_angle_and_noise_scale() -> None:
    schedule, t = TrigFlow(sigma_data=0.5), torch.tensor([1 / 3])
    assert schedule.angle(t).item() == pytest.approx(np.pi / 6)
    assert schedule.alpha(t).item() == pytest.approx(np.cos(np.pi / 6))
    assert schedule.sigma(t).item() == pytest.approx(0.5 * np.sin(np.pi / 6))


@pytest.mark.parametrize("source", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("target", SCHEDULES.values(), ids=SCHEDULES.keys())
@settings(max_examples=5)
@given(log_snr=st.lists(st.floats(-2.5, 4), min_size=1, max_size=5), seed=st.integers(0, 999))
def test_conversion_at_equal_snr_keeps_the_analytic_x0(
    source: Schedule, target: Schedule, log_snr: list[float], seed: int
) -> None:
    mixture, t = line(), source.time_of_log_snr(double(log_snr))  # every schedule here reaches these ratios
    points = torch.randn(len(log_snr), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x_t = add_noise(source, points[:, :1], points[:, 1:], t)
    x, time = convert(x_t, t, source, target)
    torch.testing.assert_close(target.log_snr(time), source.log_snr(t))
    before = mixture.x0(x_t, source.alpha(t), source.sigma(t))
    torch.testing.assert_close(mixture.x0(x, target.alpha(time), target.sigma(time)), before)
    back, again = convert(x, time, target, source)
    torch.testing.assert_close((back, again), (x_t, t))


def test_conversion_is_finite_where_a_schedule_ends() -> None:
    noise = torch.randn(2, 4, 8, 8)
    x, t = convert(noise, torch.ones(2), SCHEDULES["zero-terminal-snr"], SCHEDULES["flow"])
    torch.testing.assert_close((x, t), (noise, torch.ones(2)))
    x, t = convert(noise, torch.ones(2), SCHEDULES["flow"], SCHEDULES["sd"])  # which keeps a trace of signal
    torch.testing.assert_close((x, t), (noise, torch.ones(2)))
    x, t = convert(noise * 80, torch.ones(2), SCHEDULES["edm"], SCHEDULES["sd"])
    assert x.std().item() == pytest.approx(1, abs=0.1)
    assert x.dtype == t.dtype == torch.float32


def test_add_noise_computes_in_float32() -> None:
    x0 = torch.ones(2, 1, 1, 1, dtype=torch.bfloat16)
    noised = add_noise(SCHEDULES["flow"], x0, torch.zeros_like(x0), torch.tensor([0.001, 0.25]))
    assert noised.dtype == torch.float32
    assert noised.flatten().tolist() == pytest.approx([0.999, 0.75])


@every_schedule
@few
@given(ts=times)
def test_noise_added_twice_is_noise_added_at_once(schedule: Schedule, ts: list[float]) -> None:
    t = double(sorted(ts))
    t = t[schedule.alpha(t) > 1e-6]
    s, t = t[:-1], t[1:]
    kept = add_more_noise(schedule, torch.ones_like(s), torch.zeros_like(s), s, t)
    added = add_more_noise(schedule, torch.zeros_like(s), torch.ones_like(s), s, t)
    torch.testing.assert_close(kept * schedule.alpha(s), schedule.alpha(t))
    torch.testing.assert_close(torch.hypot(kept * schedule.sigma(s), added), schedule.sigma(t))


def test_expand() -> None:
    x = torch.zeros(3, 4, 5, 6)
    assert expand(torch.tensor(2.0), x).shape == (1, 1, 1, 1)
    assert expand(torch.zeros(3), x).shape == (3, 1, 1, 1)
    assert expand(torch.zeros(3, 1, 1, 1), x).shape == (3, 1, 1, 1)
    for wrong in (torch.zeros(2), torch.zeros(3, 4)):
        with pytest.raises(ValueError, match=r"does not fit a tensor of shape \(3, 4, 5, 6\)"):
            expand(wrong, x)


def test_trailing_times_are_those_of_diffusers() -> None:
    scheduler = DDPMScheduler(timestep_spacing="trailing")
    for steps in (1, 2, 3, 4, 7, 25, 50, 999, 1000):
        scheduler.set_timesteps(steps)
        ours = trailing_times(steps)
        assert ours[-1] == 0
        assert [round(t * 1000) - 1 for t in ours[:-1]] == scheduler.timesteps.tolist()


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_trailing_times_refuses_other_counts(steps: int) -> None:
    with pytest.raises(ValueError, match=rf"steps={steps} must lie in 1\.\.1000"):
        trailing_times(steps)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DiscreteVP(torch.tensor([0.5])), "N at least 2"),
        (lambda: DiscreteVP(torch.tensor([0.5, 0.6])), "fall strictly"),
        (lambda: DiscreteVP(torch.tensor([1.0, 0.6])), "fall strictly"),
        (lambda: DiscreteVP(torch.tensor([0.5, -0.1])), "fall strictly"),
        (lambda: DiscreteVP.from_betas("sigmoid"), "'sigmoid' is not a beta schedule"),  # type: ignore[arg-type]
        (lambda: EDM(sigma_min=0), "sigma_min=0"),
        (lambda: EDM(sigma_min=2, sigma_max=1), "sigma_max=1"),
        (lambda: RectifiedFlow(shift=0), "shift=0"),
        (lambda: RectifiedFlow(num_train=0), "num_train=0"),
        (lambda: TrigFlow(sigma_data=-1), "sigma_data=-1"),
    ],
)
def test_impossible_schedules_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
