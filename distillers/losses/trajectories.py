"""Trajectories of the probability-flow ODE cut into segments, and jumps within a segment.

On a grid of N times, t_n = n / N, the clean ends of K segments lie at ``floor(i N / K)``, i = 0..K-1. A jump is one
DDIM step (https://arxiv.org/abs/2010.02502, equation 12). With a network's x_0 estimate at t, it is a consistency
function whose endpoint need not be the clean image (https://arxiv.org/abs/2405.18407, section 3).
"""

import torch
from torch import Tensor

from weights.diffusion.samplers import ddim_step
from weights.diffusion.schedules import Schedule, expand


def segment_edges(solver_steps: int, segments: int) -> list[int]:
    """The boundaries of the segments: K + 1 rising indices of the grid, from 0 (clean image) to N (noise)."""
    return [index * solver_steps // segments for index in range(segments)] + [solver_steps]


def segment_of(index: Tensor, edges: list[int]) -> tuple[Tensor, Tensor]:
    """The lower and upper edge of each index's segment, which includes its upper edge and not its lower one.

    Args:
        index: ``(B,)`` int64 in 1..N.
        edges: from `segment_edges`.
    """
    table = torch.tensor(edges, device=index.device)
    upper = torch.bucketize(index, table)
    return table[upper - 1], table[upper]


def jump(x_t: Tensor, x0: Tensor, t: Tensor, s: Tensor, schedule: Schedule) -> Tensor:
    """The DDIM step from t to s; at s = 0 the image ``x0`` itself, even if the schedule keeps a trace of noise there.

    Args:
        x_t: ``(B, ...)``.
        x0: estimate at ``x_t``, ``(B, ...)``.
        t: ``(B,)``, above 0.
        s: ``(B,)``, at most t.

    Returns:
        ``(B, ...)``, float64 if ``x_t`` is, else float32.
    """
    return torch.where(expand(s, x_t) > 0, ddim_step(x_t, x0, t, s, schedule), x0.to(x_t.dtype))


def unit_state(x_t: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """``x_t / sqrt(alpha_t^2 + sigma_t^2)``: the state in the variance-preserving schedule with the same SNR.

    It has unit variance for data of unit variance; on a variance-preserving schedule it is ``x_t`` itself.
    """
    norm = torch.hypot(schedule.alpha(t.double()), schedule.sigma(t.double()))
    return x_t / expand(norm, x_t).to(x_t.dtype)
