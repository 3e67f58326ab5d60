r"""Noise schedules: ``x_t = alpha_t x_0 + sigma_t eps`` with t in [0, 1], where t = 1 is noise.

A schedule is a pair of functions alpha(t) and sigma(t). Up to a scaling of the state, only their ratio matters to a
denoiser, so every schedule also provides ``lambda_t = log(alpha_t / sigma_t)``, which falls strictly with t, and its
inverse. Any two schedules are the same process at different speeds and scales (Karras et al. 2022,
https://arxiv.org/abs/2206.00364, section 2; Kingma et al. 2021, https://arxiv.org/abs/2107.00630, section 5.1), which
is what `convert` relies on.

Every method takes times of any shape and returns that shape. It computes in float64, and returns float64 for float64
times, else float32. Times outside [0, 1] are clamped.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, Self

import torch
from torch import Tensor


def expand(coefficient: Tensor, x: Tensor) -> Tensor:
    """Reshape a coefficient, ``(B,)`` or a scalar, so that it broadcasts over ``x`` of shape ``(B, ...)``.

    A scalar is expanded to x's rank as well: a 0-d tensor would not promote a bfloat16 ``x`` to float32.

    Raises:
        ValueError: the coefficient is neither a scalar, nor of 1 or B values, nor already of x's rank.
    """
    if coefficient.ndim == x.ndim and coefficient.ndim > 1:
        return coefficient
    if coefficient.ndim > 1 or (coefficient.ndim == 1 and coefficient.shape[0] not in (1, x.shape[0])):
        raise ValueError(
            f"a coefficient of shape {tuple(coefficient.shape)} does not fit a tensor of shape {tuple(x.shape)}: "
            f"give a scalar, (1,) or ({x.shape[0]},)"
        )
    return coefficient.reshape(-1, *([1] * (x.ndim - 1)))


class Schedule(ABC):
    """The functions alpha(t) and sigma(t), and their log signal-to-noise ratio."""

    def alpha(self, t: Tensor) -> Tensor:
        """The coefficient of x_0 at t, in [0, 1]."""
        return _like(self._alpha(_clean(t)), t)

    def sigma(self, t: Tensor) -> Tensor:
        """The coefficient of eps at t, at least 0."""
        return _like(self._sigma(_clean(t)), t)

    def log_snr(self, t: Tensor) -> Tensor:
        """``log(alpha_t / sigma_t)``: falls with t; +inf where sigma is 0, -inf where alpha is 0."""
        return _like(self._log_snr(_clean(t)), t)

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """The t with this log-SNR, or the nearest end if the schedule never reaches it."""
        return _like(self._time_of_log_snr(log_snr.double()).clamp(0.0, 1.0), log_snr)

    @abstractmethod
    def _alpha(self, t: Tensor) -> Tensor:
        """alpha at float64 times inside [0, 1]."""

    @abstractmethod
    def _sigma(self, t: Tensor) -> Tensor:
        """sigma at float64 times inside [0, 1]."""

    @abstractmethod
    def _time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """The inverse of `_log_snr` in float64; the caller clamps it to [0, 1]."""

    def _log_snr(self, t: Tensor) -> Tensor:
        return self._alpha(t).log() - self._sigma(t).log()


class DiscreteVP(Schedule):
    r"""A variance-preserving schedule given at N steps (DDPM, Stable Diffusion): ``alpha^2 + sigma^2 = 1``.

    Native index n in 0..N-1 is ``t = (n + 1) / N``, so t = 1 is n = N - 1, and t = 0 is exactly clean. On that grid the
    values are those of the table. Between grid points the angle ``theta = atan2(sigma, alpha)`` is linear in t. Unlike
    the log-SNR, it is finite at both ends, so zero terminal SNR (Lin et al. 2023, https://arxiv.org/abs/2305.08891)
    needs no special case.

    Args:
        alphas_cumprod: ``(N,)``, falling strictly, in [0, 1): diffusers' ``scheduler.alphas_cumprod``. The last may be
            0.

    Raises:
        ValueError: the table is not of this form.
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        table = alphas_cumprod.detach().double().cpu()
        if table.ndim != 1 or len(table) < 2:
            raise ValueError(f"alphas_cumprod has shape {tuple(table.shape)}, want (N,) with N at least 2")
        if not bool((table >= 0).all() and table[0] < 1 and (table.diff() < 0).all()):
            raise ValueError(
                f"alphas_cumprod must fall strictly inside [0, 1), got {table[0]:.6g} ... {table[-1]:.6g}: "
                "pass the cumulated product of 1 - beta, not the betas"
            )
        angles = torch.atan2((1 - table).sqrt(), table.sqrt())
        self.num_train = len(table)
        self._angles = {torch.device("cpu"): torch.cat([angles.new_zeros(1), angles])}

    @classmethod
    def from_betas(
        cls,
        kind: Literal["linear", "scaled_linear", "cosine"] = "scaled_linear",
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        num_train: int = 1000,
        zero_terminal_snr: bool = False,
    ) -> Self:
        """The usual schedules by name: DDPM's linear betas, Stable Diffusion's, and the cosine schedule.

        ``zero_terminal_snr`` shifts and rescales ``sqrt(alphas_cumprod)`` so that its last value becomes 0 and its
        first does not change (Lin et al. 2023, algorithm 1). The cosine schedule (Nichol & Dhariwal 2021,
        https://arxiv.org/abs/2102.09672, equation 17, betas capped at 0.999) ignores ``beta_start`` and ``beta_end``.

        Raises:
            ValueError: ``kind`` is unknown.
        """
        if kind == "linear":
            betas = torch.linspace(beta_start, beta_end, num_train, dtype=torch.float64)
        elif kind == "scaled_linear":
            betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_train, dtype=torch.float64) ** 2
        elif kind == "cosine":
            grid = torch.arange(num_train + 1, dtype=torch.float64) / num_train
            bar = torch.cos((grid + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
        else:
            raise ValueError(f"{kind!r} is not a beta schedule: use 'linear', 'scaled_linear' or 'cosine'")
        roots = torch.cumprod(1 - betas, 0).sqrt()
        if zero_terminal_snr:
            roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
        return cls(roots**2)

    def native_index(self, t: Tensor) -> Tensor:
        """The network's timestep at time t: ``t N - 1`` as a float, at least 0; whole numbers on the grid."""
        return _like((self._position(_clean(t)) - 1).clamp(min=0), t)

    def time_of_index(self, index: Tensor) -> Tensor:
        """The time of native index n, ``(n + 1) / N``; float64 for a float64 index, else float32."""
        return _like((index.double() + 1) / self.num_train, index)

    def _position(self, t: Tensor) -> Tensor:
        """The position of t in the table of N + 1 angles; an (n + 1) / N rounded to float32 is exactly n + 1."""
        position = t * self.num_train
        nearest = position.round()
        from_float32 = (t.float().double() == t) & ((position - nearest).abs() <= nearest * 2**-23)
        # Written as a shift, so that the derivative with respect to t is N at these points too (that of round is 0).
        return torch.where(from_float32, position + (nearest - position).detach(), position)

    def _table(self, device: torch.device) -> Tensor:
        if device not in self._angles:
            self._angles[device] = self._angles[torch.device("cpu")].to(device)
        return self._angles[device]

    def _angle(self, t: Tensor) -> Tensor:
        position, table = self._position(t), self._table(t.device)
        low = position.floor().long().clamp(max=self.num_train - 1)
        return torch.lerp(table[low], table[low + 1], position - low)

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 - self._angle(t))  # unlike cos, exactly 0 at pi / 2

    def _sigma(self, t: Tensor) -> Tensor:
        return torch.sin(self._angle(t))

    def _time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        table = self._table(log_snr.device)
        angle = torch.atan(torch.exp(-log_snr)).clamp(max=table[-1])
        low = (torch.searchsorted(table, angle.contiguous(), right=True) - 1).clamp(0, self.num_train - 1)
        return (low + (angle - table[low]) / (table[low + 1] - table[low])) / self.num_train


class EDM(Schedule):
    r"""The variance-exploding schedule of EDM: alpha = 1 and sigma rising from sigma_min to sigma_max.

    ``sigma(t) = (sigma_min^(1/rho) + t (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho`` (Karras et al. 2022,
    https://arxiv.org/abs/2206.00364, equation 5, with t counted from the clean end). At t = 0 some noise, sigma_min, is
    left; samplers that end at t = 0 return the denoised estimate there.

    Raises:
        ValueError: not 0 < sigma_min < sigma_max, or rho is not positive.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> None:
        if not 0 < sigma_min < sigma_max or rho <= 0:
            raise ValueError(
                f"sigma_min={sigma_min}, sigma_max={sigma_max}, rho={rho}: want 0 < sigma_min < sigma_max and rho > 0"
            )
        self.sigma_min, self.sigma_max, self.rho = sigma_min, sigma_max, rho

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _sigma(self, t: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        sigma: Tensor = (low + t * (high - low)) ** self.rho
        return sigma

    def _time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        time: Tensor = (torch.exp(-log_snr / self.rho) - low) / (high - low)
        return time


class RectifiedFlow(Schedule):
    r"""Straight paths: alpha = 1 - t', sigma = t' (Liu et al. 2022, https://arxiv.org/abs/2209.03003, equation 1).

    ``t' = shift t / (1 + (shift - 1) t)`` shifts times towards noise for larger images (Esser et al. 2024,
    https://arxiv.org/abs/2403.03206, equation 23); a shift of 1.0 is off. Sampler steps are uniform in t; networks see
    only t'.

    Args:
        shift: the time shift.
        num_train: N; a network's native timestep is ``N t'``.

    Raises:
        ValueError: shift or num_train is not positive.
    """

    def __init__(self, shift: float = 1.0, num_train: int = 1000) -> None:
        if shift <= 0:
            raise ValueError(f"shift={shift} must be positive; 1.0 turns the shift off")
        if num_train <= 0:
            raise ValueError(f"num_train={num_train} must be positive: it is a network's timestep at pure noise")
        self.shift, self.num_train = shift, num_train

    def native_index(self, t: Tensor) -> Tensor:
        """The network's timestep at time t: ``N sigma(t)``, in [0, N]."""
        return _like(self.num_train * self._sigma(_clean(t)), t)

    def time_of_index(self, index: Tensor) -> Tensor:
        """The time of a native timestep in [0, N]; float64 for a float64 index, else float32."""
        sigma = _clean(index.double() / self.num_train)
        return _like(sigma / (self.shift - (self.shift - 1) * sigma), index)

    def _alpha(self, t: Tensor) -> Tensor:
        return (1 - t) / (1 + (self.shift - 1) * t)

    def _sigma(self, t: Tensor) -> Tensor:
        return self.shift * t / (1 + (self.shift - 1) * t)

    def _time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        odds = torch.sigmoid(-log_snr)
        return odds / (self.shift * torch.sigmoid(log_snr) + odds)


class TrigFlow(Schedule):
    r"""A rotation: alpha = cos(angle), sigma = sigma_data sin(angle), angle = t pi / 2.

    See Lu & Song 2024, https://arxiv.org/abs/2410.11081, equation 3, where time is the angle itself and the noise z has
    standard deviation sigma_data.

    Raises:
        ValueError: sigma_data is not positive.
    """

    def __init__(self, sigma_data: float = 1.0) -> None:
        if sigma_data <= 0:
            raise ValueError(f"sigma_data={sigma_data} must be positive: it is the data's standard deviation")
        self.sigma_data = sigma_data

    def angle(self, t: Tensor) -> Tensor:
        """The paper's time, in [0, pi / 2]."""
        return _like(_clean(t) * (math.pi / 2), t)

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.sin((1 - t) * (math.pi / 2))  # cos, but exactly 0 at t = 1

    def _sigma(self, t: Tensor) -> Tensor:
        return self.sigma_data * torch.sin(t * (math.pi / 2))

    def _time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.atan(torch.exp(-log_snr) / self.sigma_data) / (math.pi / 2)


def add_noise(schedule: Schedule, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """``alpha_t x_0 + sigma_t eps`` for tensors ``(B, ...)`` and t ``(B,)``; at least float32."""
    return expand(schedule.alpha(t), x0) * x0 + expand(schedule.sigma(t), eps) * eps


def add_more_noise(schedule: Schedule, x_s: Tensor, eps: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """Step from s to the noisier t by the forward process: ``a x_s + b eps``, distributed like x_0 noised to t at once.

    ``a = alpha_t / alpha_s``, ``b^2 = sigma_t^2 - a^2 sigma_s^2`` (Kingma et al. 2021,
    https://arxiv.org/abs/2107.00630, appendix A.1).

    Args:
        schedule: any.
        x_s: ``(B, ...)``, a state at s.
        eps: ``(B, ...)``, unit normal.
        s: ``(B,)``, where alpha is above 0.
        t: ``(B,)``, at least s.

    Returns:
        ``(B, ...)``, float64 if ``x_s`` is, else float32.
    """
    ratio = schedule.alpha(t.double()) / schedule.alpha(s.double())
    added = (schedule.sigma(t.double()).square() - (ratio * schedule.sigma(s.double())).square()).clamp(min=0).sqrt()
    return _like(expand(ratio, x_s) * x_s.double() + expand(added, x_s) * eps.double(), x_s)


def convert(x_t: Tensor, t: Tensor, source: Schedule, target: Schedule) -> tuple[Tensor, Tensor]:
    """Convert a noisy state to another schedule: the time of equal SNR, and ``x_t`` rescaled to that schedule.

    At equal SNR, (alpha, sigma) differ by one common factor, so the posterior of x_0 is unchanged, and a denoiser
    trained in one schedule works in the other without training. SNRs that the target never reaches map to its nearest
    end, and the state is rescaled to the variance that data of unit variance have there.

    Args:
        x_t: ``(B, ...)`` in the source schedule.
        t: ``(B,)`` in [0, 1], the source's time.

    Returns:
        x ``(B, ...)`` and times ``(B,)``: float64 if ``x_t`` or ``t`` is, respectively, else float32.
    """
    exact = t.double()
    time = target.time_of_log_snr(source.log_snr(exact))
    # The ratio of norms is the common factor; unlike sigma'/sigma and alpha'/alpha, it is finite at both ends.
    before = torch.hypot(source.alpha(exact), source.sigma(exact))
    after = torch.hypot(target.alpha(time), target.sigma(time))
    converted = x_t.double() * expand(after / before, x_t)
    return _like(converted, x_t), _like(time, t)


def trailing_times(steps: int, num_train: int = 1000) -> list[float]:
    """Times of a sampler with ``steps`` steps in diffusers' "trailing" spacing, from 1 down, with a final 0.

    ``n_i = round(N - i N / steps) - 1`` and ``t = (n + 1) / N`` (Lin et al. 2023, https://arxiv.org/abs/2305.08891,
    table 2), so the first step always sees pure noise.

    Returns:
        ``steps + 1`` falling times.

    Raises:
        ValueError: steps is not in 1..num_train.
    """
    if not 1 <= steps <= num_train:
        raise ValueError(f"steps={steps} must lie in 1..{num_train}")
    return [round(num_train - i * num_train / steps) / num_train for i in range(steps)] + [0.0]


def check_times(times: Sequence[float]) -> None:
    """Check that the times are valid for a sampler.

    Raises:
        ValueError: the times do not fall strictly from at most 1 to 0, or there are fewer than two.
    """
    falls = all(later < t for t, later in pairwise(times))
    if len(times) < 2 or not falls or times[0] > 1 or times[-1] != 0:
        raise ValueError(f"times must fall from at most 1 and end at 0, got {list(times)}")


def _clean(t: Tensor) -> Tensor:
    return t.double().clamp(0.0, 1.0)


def _like(value: Tensor, given: Tensor) -> Tensor:
    return value if given.dtype == torch.float64 else value.float()
