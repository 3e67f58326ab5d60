"""Defaults that a paper or its public code states, with the source of each: changing one is a decision, not an accident."""

import math
from typing import Any

import pytest

from distillers.methods import method
from distillers.methods.tscd import default_stages
from weights.contracts import TrainSpec

LEVELS = (math.log(2) - 1.2, 1.2)  # EDM's ln sigma ~ N(-1.2, 1.2^2) at a standard deviation of 0.5
BEFORE_DMD2 = {
    "guidance_scale": 1.0, "student_every": 1, "gan_weight": 0.0, "student_betas": (0.0, 0.999),
    "critic_betas": (0.0, 0.999), "student_lr": 1e-5, "fake_score_lr": 1e-5, "warmup": 0, "score_weighting": "edm",
}  # fmt: skip
LADDS = {
    "noise_share": 0.5, "head_betas": (0.0, 0.999), "head_lr": 2e-6, "mismatched_share": 0.5, "blocks": None,
    "critic_noise_mean": math.log(2) - 0.6, "critic_noise_std": 1.0,
}  # fmt: skip
DEFAULTS: list[tuple[str, str, dict[str, Any]]] = [
    (
        "dmd2",
        "DMD2's public code for SD1.5 (https://arxiv.org/abs/2405.14867): t in 20..980 of 1000, one-based here",
        {
            "guidance_scale": 1.75, "dm_times": (0.021, 0.981), "score_times": (0.001, 1.0), "gan_times": (0.001, 1.0),
            "score_weighting": "eps", "gan_weight": 1e-3, "discriminator_weight": 1e-2, "gan_features": "fake_score",
            "student_every": 5, "backward_simulation": True, "student_lr": 1e-5, "fake_score_lr": 1e-5,
            "student_betas": (0.9, 0.999), "critic_betas": (0.9, 0.999), "weight_decay": 0.01, "warmup": 500,
            "regression_lr": 1e-5, "dm_levels": None, "score_levels": None,
        },
    ),
    (
        "f_distill",
        "f-distill's public code (https://arxiv.org/abs/2502.15681)",
        {"ratio_range": (0.1, 20.0), "ratio_bins": 10, "normalize_weights": True, "share_times": True},
    ),
    ("diff_instruct", "its public code (https://arxiv.org/abs/2305.18455)", {**BEFORE_DMD2, "dm_levels": LEVELS}),
    (
        "sid",
        "the paper and its public code (https://arxiv.org/abs/2404.04057)",
        {**BEFORE_DMD2, "alpha": 1.2, "normalize": True},
    ),
    ("sim", "like SiD, except for the distance (https://arxiv.org/abs/2410.16794)", {**BEFORE_DMD2, "normalize": False}),
    (
        "uni_instruct",
        "like SiD, with a discriminator (https://arxiv.org/abs/2505.20755)",
        {**BEFORE_DMD2, "gan_weight": 1e-3, "divergence": "forward_kl", "ratio_gradient": True, "normalize": True},
    ),
    (
        "consistency",
        "LCM's public code (https://arxiv.org/abs/2310.04378): skip 20 of 1000 timesteps",
        {"solver_steps": 50, "skip": 1, "huber": 1e-3, "target_decay": 0.95, "lr": 1e-6, "guidance_range": None},
    ),
    (
        "tscd",
        "PCM's public code for SD1.5 (https://arxiv.org/abs/2405.18407)",
        {
            "guidance_scale": 5.5, "lr": 5e-6, "gan_weight": 0.1, "head_lr": 1e-5, "head_betas": (0.0, 0.999),
            "target_decay": 0.0, "solver_steps": 50,
        },
    ),
    (
        "scm",
        "FastGen's code, and the paper for the times (https://arxiv.org/abs/2410.11081): mean -1 at a deviation of 0.5",
        {
            "lr": 1e-4, "betas": (0.9, 0.99), "tangent_warmup": 10_000, "time_mean": math.log(2) - 1, "time_std": 1.4,
            "tangent_offset": 0.1, "target_decay": 0.0, "tangent": "jvp", "sigma_data": 1.0, "guidance_scale": 4.5,
        },
    ),
    (
        "hybrid",
        "SANA-Sprint's public code (https://arxiv.org/abs/2503.09641): mean 0.2 at a deviation of 0.5",
        {
            **LADDS, "lr": 2e-6, "tangent_warmup": 4000, "time_mean": math.log(2) + 0.2, "time_std": 1.6,
            "adversarial_weight": 0.5, "guidance_scale": 4.5,
        },
    ),
    (
        "ladd",
        "SANA-Sprint's public code (https://arxiv.org/abs/2503.09641)",
        {**LADDS, "student_lr": 2e-6, "student_every": 1},
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "source", "stated"), DEFAULTS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_defaults_are_their_sources(name: str, source: str, stated: dict[str, Any]) -> None:
    config = method(name).Config()
    found = {field: getattr(config, field) for field in stated}
    for field, value in stated.items():
        same = found[field] == pytest.approx(value, abs=0.01) if field in ROUNDED else found[field] == value
        assert same, f"{field} is {found[field]}, but {source} has {value}"


ROUNDED = {"dm_levels", "time_mean", "critic_noise_mean"}
"""Converted to latents of unit variance, and written with a few digits."""


def test_schedules_and_stages_are_their_sources() -> None:
    """DMD2: native timesteps 999, 749, 499, 249. Hyper-SD (https://arxiv.org/abs/2404.13686): 8, 4, 2, 1 segments."""
    times = {steps: each.timesteps for steps, each in method("dmd2").Config().schedules.items()}
    assert times == {1: [1.0], 2: [1.0, 0.5], 4: [1.0, 0.75, 0.5, 0.25]}
    assert [stage.segments for stage in default_stages()] == [8, 4, 2, 1]


def test_gradients_are_clipped_as_in_dmd2() -> None:
    assert TrainSpec().gradient_clip == 10.0
