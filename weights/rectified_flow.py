"""Diffusers' flow-matching schedulers: reads one as a noise schedule, and builds one for a student's steps.

Their sigma is this project's, ``shift u / (1 + (shift - 1) u)`` for uniform u, and their timestep is N sigma (Esser et
al. 2024, https://arxiv.org/abs/2403.03206, equation 23; `weights.diffusion.schedules.RectifiedFlow`).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
)

from weights.diffusion.schedules import RectifiedFlow

KNOWN = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler)
ELSEWHERE = ("invert_sigmas", "shift_terminal", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
"""Settings that make sigma another function of time."""
TOLERANCE = 1e-6
"""Tolerance for sigmas that went through float32."""


def read_schedule(scheduler: Any, tokens: int) -> RectifiedFlow:
    """The noise schedule that a pipeline's scheduler represents.

    With ``use_dynamic_shifting`` the scheduler has a shift for every size, ``exp(mu)``, with mu linear in the number of
    tokens. A student knows one schedule, so the shift at the model's usual size is used at every size; diffusers itself
    draws other sizes with another.

    Args:
        scheduler: the pipeline's scheduler.
        tokens: image tokens at the usual size, which a shift by the size depends on.

    Raises:
        ValueError: its noise is not that of a rectified flow, or another than shift alone says.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if isinstance(scheduler, DPMSolverMultistepScheduler):
        return _read_multistep(config)
    if not isinstance(scheduler, KNOWN):
        known = ", ".join(each.__name__ for each in (*KNOWN, DPMSolverMultistepScheduler))
        raise ValueError(f"the scheduler is a {name}, which tells no rectified flow's shift; want one of {known}")
    _refuse(config, ELSEWHERE)
    shift = _shift_at(config, tokens) if config.get("use_dynamic_shifting") else float(config["shift"])
    return RectifiedFlow(shift, int(config["num_train_timesteps"]))


def _read_multistep(config: Any) -> RectifiedFlow:
    """The schedule of a DPM-Solver that is configured for flow prediction, as SANA's is; its shift is ``flow_shift``.

    Raises:
        ValueError: it is configured for other noise.
    """
    wanted = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    given = {key: config.get(key) for key in wanted}
    if given != wanted:
        raise ValueError(
            f"the DPMSolverMultistepScheduler has {given}, which is not a rectified flow: set {wanted} in "
            "scheduler/scheduler_config.json"
        )
    _refuse(config, (*ELSEWHERE, "use_lu_lambdas", "use_dynamic_shifting"))
    return RectifiedFlow(float(config["flow_shift"]), int(config["num_train_timesteps"]))


def _refuse(config: Any, settings: Sequence[str]) -> None:
    """Raise a ValueError if any of these settings is on."""
    odd = {key: config[key] for key in settings if config.get(key)}
    if odd:
        raise ValueError(
            f"the scheduler's {odd} make its noise another than shift alone says: leave them out of "
            "scheduler/scheduler_config.json"
        )


def student_scheduler(
    schedule: RectifiedFlow, times: Sequence[float], *, spaced_by_pipeline: bool = False
) -> FlowMatchEulerDiscreteScheduler:
    """A scheduler that, asked for ``len(times)`` steps, samples at these times as the consistency sampler does.

    With ``stochastic_sampling``, a step goes to ``(1 - sigma') x_0 + sigma' eps`` with fresh noise, as in consistency
    sampling. (So does diffusers' FlowMatchLCMScheduler, but the pipelines name this class.) Asked for n steps, the
    scheduler takes n evenly spaced numbers from 1 to the sigma of its last training step (already shifted), shifts
    them, and stretches the result so that it ends in ``shift_terminal``. All these maps have the form
    ``x -> (a x + b) / (c x + d)``, like the shift of evenly spaced times, so `_shift_before_stretching` can compose
    that shift from them.

    Args:
        schedule: the noise schedule.
        times: falling, in (0, 1].
        spaced_by_pipeline: whether the pipeline hands over n evenly spaced numbers from 1 to 1 / n itself, as FLUX's does.
            The schedule's own shift then makes them its times.

    Raises:
        ValueError: the scheduler cannot sample at these times.
    """
    sigmas = schedule.sigma(torch.tensor(list(times), dtype=torch.float64))
    settings: dict[str, Any] = {
        "num_train_timesteps": schedule.num_train,
        "shift": schedule.shift if spaced_by_pipeline else _shift_before_stretching(schedule, len(times)),
        "stochastic_sampling": True,
    }
    if len(times) > 1:
        settings["shift_terminal"] = float(sigmas[-1])
    scheduler = FlowMatchEulerDiscreteScheduler(**settings)
    spaced = [1 - step / len(times) for step in range(len(times))]
    scheduler.set_timesteps(len(times), sigmas=spaced if spaced_by_pipeline else None)
    theirs = scheduler.sigmas[:-1].double()
    if not torch.allclose(theirs, sigmas, rtol=0, atol=TOLERANCE):
        shown = ", ".join(f"{schedule.time_of_index(sigma * schedule.num_train):.4g}" for sigma in theirs)
        raise ValueError(
            f"diffusers' FlowMatchEulerDiscreteScheduler runs {len(times)} steps at {shown}, but this student at "
            f"{list(times)}: export a step count whose times are evenly spaced from 1 down"
        )
    return scheduler


def _shift_before_stretching(schedule: RectifiedFlow, steps: int) -> float:
    r"""The shift r that, once stretched, equals the shift s of the times ``t_i = 1 - i / n``.

    With m = r / (N + r - 1) the sigma of the last training step, d = (1 - m) / (n - 1), and k the stretch factor, the
    sigmas agree if, for every i,

        1 - sigma_i = i / (s n - (s - 1) i) = k i d / (r - (r - 1) i d)

    Hence k = (r - 1) / (s - 1), and with c = (s - 1) (n - 1) / (s n), r solves
    ``c r^2 - (N - 1) (1 - c) r + N - 1 = 0``. The root returned is the one that is 1 at s = 1. A single step needs no
    stretching, since 1 is shifted to 1.
    """
    shift, last = schedule.shift, schedule.num_train - 1
    bend = (shift - 1) * (steps - 1) / (shift * steps)
    half = last * (1 - bend)
    return 2 * last / (half + math.sqrt(max(0.0, half * half - 4 * bend * last)))


def _shift_at(config: Any, tokens: int) -> float:
    """The shift that use_dynamic_shifting gives for this many tokens: diffusers' line through two sizes."""
    sizes = config["base_image_seq_len"], config["max_image_seq_len"]
    shifts = config["base_shift"], config["max_shift"]
    mu = shifts[0] + (tokens - sizes[0]) * (shifts[1] - shifts[0]) / (sizes[1] - sizes[0])
    return math.exp(mu) if config["time_shift_type"] == "exponential" else float(mu)
