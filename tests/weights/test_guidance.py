"""Guidance as a denoiser that wraps a denoiser."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weights.denoiser import Cond, Denoiser
from weights.diffusion.guidance import AutoGuided, Guided
from weights.diffusion.schedules import RectifiedFlow


class Recorder(Denoiser):
    """A denoiser whose answer depends on all that it is given, and which notes the size of every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.schedule = RectifiedFlow()
        self.batches: list[int] = []

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.batches.append(len(x_t))
        row = (-1, *[1] * (x_t.ndim - 1))
        return torch.tanh(x_t) * (1 + t.view(row)) + cond["c"].mean(1).view(row)


X_T = torch.linspace(-2, 2, 24).reshape(3, 2, 2, 2)
T = torch.tensor([0.2, 0.5, 0.9])
COND = {"c": torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 7.0]])}
UNCOND = {"c": torch.tensor([[-1.0, 0.5]])}


def each(uncond: Cond) -> Cond:
    return {"c": uncond["c"].repeat(3, 1)}


def test_scale_one_is_the_plain_denoiser_in_a_single_call() -> None:
    plain = Recorder()
    assert torch.equal(Guided(plain, UNCOND, 1.0)(X_T, T, COND), Recorder()(X_T, T, COND))
    assert plain.batches == [3]


def test_scale_zero_is_the_unconditional_one_in_a_single_call() -> None:
    plain = Recorder()
    assert torch.equal(Guided(plain, UNCOND, 0.0)(X_T, T, COND), Recorder()(X_T, T, each(UNCOND)))
    assert plain.batches == [3]


@settings(max_examples=25)
@given(w=st.floats(0, 20, width=32, allow_subnormal=False))
def test_the_estimate_is_linear_in_the_scale_and_costs_one_doubled_call(w: float) -> None:
    plain = Recorder()
    guided = Guided(plain, UNCOND, w)(X_T, T, COND)
    without, given_cond = Recorder()(X_T, T, each(UNCOND)), Recorder()(X_T, T, COND)
    torch.testing.assert_close(guided, without + w * (given_cond - without))
    assert plain.batches == ([3] if w in (0.0, 1.0) else [6])


def test_a_scale_and_an_uncond_for_each_picture() -> None:
    plain, uncond = Recorder(), {"c": torch.arange(6.0).reshape(3, 2)}
    guided = Guided(plain, uncond, torch.tensor([1.0, 2.0, 0.0]))(X_T, T, COND)
    without, given_cond = Recorder()(X_T, T, uncond), Recorder()(X_T, T, COND)
    expected = torch.stack([given_cond[0], 2 * given_cond[1] - without[1], without[2]])
    torch.testing.assert_close(guided, expected)
    assert plain.batches == [6]


def test_an_interval_guides_only_inside() -> None:
    plain = Recorder()
    guided = Guided(plain, UNCOND, 3.0, interval=(0.4, 0.6))
    x0 = guided(X_T, T, COND)
    unguided, everywhere = Recorder()(X_T, T, COND), Guided(Recorder(), UNCOND, 3.0)(X_T, T, COND)
    torch.testing.assert_close(x0[[0, 2]], unguided[[0, 2]])
    torch.testing.assert_close(x0[1], everywhere[1])
    assert plain.batches == [6]
    guided(X_T, torch.full((3,), 0.1), COND)
    assert plain.batches == [6, 3]


def test_it_can_be_guided_again_and_keeps_the_schedule() -> None:
    plain = Recorder()
    nested = Guided(Guided(plain, UNCOND, 1.0), UNCOND, 1.0)
    assert nested.schedule is plain.schedule
    assert torch.equal(nested(X_T, T, COND), Recorder()(X_T, T, COND))
    assert nested.feature_channels == []
    with pytest.raises(TypeError, match="Guided has no inner features"):
        nested.with_features(X_T, T, COND)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="guidance scale -1 is negative"):
        Guided(Recorder(), UNCOND, -1)
    with pytest.raises(ValueError, match=r"interval \(0.5, 0.2\)"):
        Guided(Recorder(), UNCOND, 2.0, interval=(0.5, 0.2))
    with pytest.raises(ValueError, match=r"uncond has \[2\] rows for a batch of 3"):
        Guided(Recorder(), {"c": torch.zeros(2, 2)}, 2.0)(X_T, T, COND)


# Autoguidance


class Normal(Denoiser):
    """The exact denoiser of data ``N(0, deviation^2)`` under rectified flow."""

    def __init__(self, deviation: float) -> None:
        super().__init__()
        self.schedule, self.deviation = RectifiedFlow(), deviation

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        alpha, sigma = (f(t).view(-1, 1, 1, 1) for f in (self.schedule.alpha, self.schedule.sigma))
        variance = self.deviation**2
        return alpha * variance / (alpha**2 * variance + sigma**2) * x_t

    def with_features(self, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, list[Tensor]]:
        return self(x_t, t, cond), [x_t + 1]

    @property
    def feature_channels(self) -> list[int]:
        return [2]


def test_autoguidance_at_scale_one_is_the_plain_denoiser() -> None:
    torch.testing.assert_close(
        AutoGuided(Normal(1.0), Normal(2.0), 1.0, UNCOND)(X_T, T, COND), Normal(1.0)(X_T, T, COND)
    )


@settings(max_examples=25)
@given(w=st.floats(1, 10), worse=st.floats(1.05, 4))
def test_autoguidance_leads_away_from_what_is_spread_too_far(w: float, worse: float) -> None:
    """The worse model believes in wider data, and so pulls less to the middle: the guided one pulls more, in proportion."""
    own, guide = Normal(1.0)(X_T, T, COND), Normal(worse)(X_T, T, COND)
    guided = AutoGuided(Normal(1.0), Normal(worse), w, UNCOND)(X_T, T, COND)
    torch.testing.assert_close(guided - own, (w - 1) * (own - guide))
    inside = (guided * X_T.sign() <= own * X_T.sign() + 1e-6).all()
    assert inside, "never farther from the middle than the plain estimate"


@settings(max_examples=25)
@given(w=st.floats(1, 5), scale=st.floats(1, 10))
def test_autoguidance_and_guidance_by_the_prompt_add_up(w: float, scale: float) -> None:
    """The unconditional estimate is left alone: that of a mixed batch's rows, too."""
    inner = AutoGuided(Recorder(), Normal(1.0), w, UNCOND)
    own, without, worse = Recorder()(X_T, T, COND), Recorder()(X_T, T, each(UNCOND)), Normal(1.0)(X_T, T, COND)
    expected = own + scale * (w - 1) * (own - worse) + (scale - 1) * (own - without)
    torch.testing.assert_close(Guided(inner, UNCOND, scale)(X_T, T, COND), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(inner(X_T, T, each(UNCOND)), without)


def test_the_features_under_autoguidance_are_the_models_own() -> None:
    guided = AutoGuided(Normal(1.0), Normal(2.0), 3.0, UNCOND)
    x0, features = guided.with_features(X_T, T, COND)
    torch.testing.assert_close(x0, guided(X_T, T, COND))
    assert torch.equal(features[0], X_T + 1) and torch.equal(guided.features(X_T, T, COND)[0], X_T + 1)
    assert guided.feature_channels == [2] and guided.feature_blocks == []


def test_a_scale_that_leads_towards_the_worse_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"autoguidance scale 0\.5 is below 1\.0"):
        AutoGuided(Normal(1.0), Normal(2.0), 0.5, UNCOND)
