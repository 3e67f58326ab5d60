"""Heads and row-wise guidance."""

import pytest
import torch
from torch import Tensor, nn

from distillers.critics import Heads, guided_x0, head
from distillers.rollout import draw_lognormal_times, draw_step, draw_times, simulate
from distillers.seeds import generator_of
from tests.distillers.mixtures import VP, fitted
from tests.helpers import tiny_unet
from weights.contracts import StepSchedule
from weights.diffusion.guidance import Guided
from weights.diffusion.samplers import few_step, initial_state
from weights.diffusion.schedules import EDM, RectifiedFlow, Schedule, TrigFlow
from weights.families.gaussian_mixture import PRESETS, AnalyticDenoiser
from weights.unet import UNetDenoiser


@pytest.mark.parametrize(("size", "halvings"), [(1, 0), (2, 0), (4, 0), (8, 1), (16, 2), (32, 3)])
def test_a_head_comes_down_to_one_logit(size: int, halvings: int) -> None:
    layers = head(48, size)
    assert layers(torch.randn(2, 48, size, size)).shape == (2, 1, 1, 1)
    strides = [layer.stride for layer in layers if isinstance(layer, nn.Conv2d)]
    assert strides.count((2, 2)) == halvings


@pytest.mark.parametrize("channels", [6, 8, 16, 32, 48, 64, 192])
def test_a_heads_logit_depends_on_what_it_reads(channels: int) -> None:
    """Also where so few channels are normalised over one position each."""
    torch.manual_seed(0)
    layers = head(channels, 4)
    with torch.no_grad():
        assert layers(torch.randn(64, channels, 4, 4)).std() > 0.05
        assert layers(torch.randn(1, channels, 4, 4)).isfinite().all()


def test_heads_fit_a_unets_features() -> None:
    torch.manual_seed(0)
    denoiser = UNetDenoiser(tiny_unet(), VP, "v")
    cond = {"encoder_hidden_states": torch.randn(3, 5, 16)}
    heads = Heads(
        denoiser, (4, 8, 8), {"encoder_hidden_states": cond["encoder_hidden_states"][:1]}, torch.device("cpu")
    )
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([1.0, 0.5, 0.1])
    logits = heads(denoiser.features(x, t, cond))
    assert logits.shape == (3, 1) and logits.dtype == torch.float32
    _, features = denoiser.with_features(x, t, cond)
    torch.testing.assert_close(heads(features), logits)


def labels() -> Tensor:
    return torch.tensor([0, 1, 0, 1, 1, 0])


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("interval", [None, (0.3, 0.7), (0.0, 0.0)])
def test_guidance_by_rows_equals_the_samplers(scale: float, interval: tuple[float, float] | None) -> None:
    teacher = AnalyticDenoiser(PRESETS["line"](), VP)
    t = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9, 0.6])
    x, cond, uncond = torch.randn(6, 1, 1, 1), {"label": labels()}, {"label": torch.tensor([-1])}
    ours = guided_x0(teacher, x, t, cond, uncond, scale, interval)
    theirs = Guided(teacher, uncond, scale, interval)(x, t, cond)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("sampler", ["consistency", "ddim"])
def test_simulation_meets_the_states_of_drawing(sampler: str) -> None:
    """The state before step k, denoised by it and the steps after, is what drawing from that noise gives."""
    denoiser = fitted("line", VP, "v").denoiser
    schedule = StepSchedule.model_validate({"timesteps": [1.0, 0.75, 0.5, 0.25], "sampler": sampler, "eta": 0.5})
    noise, cond = torch.randn(5, 1, 1, 1), {"label": torch.zeros(5, dtype=torch.int64)}

    def drawn(generator: torch.Generator) -> list[Tensor]:
        states: list[Tensor] = []
        few_step(
            denoiser, initial_state(noise, VP, 1.0), schedule, cond,
            lambda: torch.randn(noise.shape, generator=generator), on_step=lambda _, x0: states.append(x0),
        )  # fmt: skip
        return states

    with torch.no_grad():
        expected = drawn(generator_of("noise"))
        for step in range(4):
            x_t = simulate(denoiser, noise, schedule, step, cond, generator_of("noise"))
            time = torch.full((5,), schedule.timesteps[step])
            torch.testing.assert_close(denoiser(x_t, time, cond), expected[step])


def test_steps_are_drawn_in_proportion_and_uniformly() -> None:
    schedules = {steps: StepSchedule(timesteps=[1 - k / steps for k in range(steps)]) for steps in (1, 2, 4)}
    generator = generator_of("steps")
    drawn = [draw_step(schedules, {1: 1.0, 4: 3.0}, generator) for _ in range(2000)]
    counts = [len(schedule.timesteps) for schedule, _ in drawn]
    assert 2 not in counts and abs(counts.count(4) / 2000 - 0.75) < 0.04
    steps = [step for schedule, step in drawn if len(schedule.timesteps) == 4]
    assert all(abs(steps.count(step) / len(steps) - 0.25) < 0.05 for step in range(4))
    equal = [len(draw_step(schedules, None, generator)[0].timesteps) for _ in range(3000)]
    assert all(abs(equal.count(steps) / 3000 - 1 / 3) < 0.04 for steps in schedules)


def test_times_lie_on_the_grid_and_reach_both_ends() -> None:
    times = draw_times(5000, (0.981, 0.99), generator_of("times"), torch.device("cpu"))
    assert sorted({round(float(time) * 1000) for time in times}) == list(range(981, 991))
    torch.testing.assert_close(times * 1000, (times * 1000).round(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("schedule", [VP, EDM(), RectifiedFlow(), TrigFlow()], ids=lambda each: type(each).__name__)
def test_lognormal_times_are_normal_in_the_log_of_the_noise(schedule: Schedule) -> None:
    times = draw_lognormal_times(4000, -0.5, 0.8, schedule, generator_of("levels"), torch.device("cpu"))
    levels = -schedule.log_snr(times.double())
    assert times.dtype == torch.float32 and times.min() >= 0 and times.max() <= 1
    assert levels.mean().item() == pytest.approx(-0.5, abs=0.05)
    assert levels.std().item() == pytest.approx(0.8, abs=0.05)
