r"""Prediction types of networks, and their conversion to x_0, with ``x_t = alpha x_0 + sigma eps``.

| prediction | the network's output F | x_0 |
|---|---|---|
| ``eps`` | eps | (x_t - sigma F) / alpha |
| ``v`` | alpha eps - sigma x_0 (Salimans & Ho 2022, https://arxiv.org/abs/2202.00512) | (alpha x_t - sigma F) / (alpha^2 + sigma^2) |
| ``x0`` | x_0 | F |
| ``flow`` | eps - x_0 (Liu et al. 2022, https://arxiv.org/abs/2209.03003) | (x_t - sigma F) / (alpha + sigma) |
| ``edm`` | EDM's F (Karras et al. 2022, https://arxiv.org/abs/2206.00364, equation 7) | c_skip x_t + c_out F |

The formulas hold for any alpha and sigma, not only for the schedules that the predictions were proposed for. For v and
flow, the linear map from (x_0, eps) to (x_t, F) is never singular. EDM's coefficients are those of the rescaled input
``x_t / alpha`` at noise level ``sigma / alpha``, written so that they stay finite at alpha = 0. Only ``eps`` does not
determine x_0 at alpha = 0, and gives values that are not finite there: use t < 1, or another prediction with zero
terminal SNR.

Everything is computed in float64, since converting from ``eps`` divides by a small alpha near t = 1, and converting to
it by a small sigma near t = 0.
"""  # noqa: E501 (table rows)

from typing import Literal, get_args

import torch
from torch import Tensor

from weights.diffusion.schedules import expand

Prediction = Literal["eps", "v", "x0", "flow", "edm"]
PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)


def to_x0(
    output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, prediction: Prediction, sigma_data: float = 0.5
) -> Tensor:
    """Convert a network's output to x_0.

    Args:
        output: the network's output for ``x_t``, ``(B, ...)``, any floating dtype.
        x_t: ``(B, ...)``.
        alpha: ``(B,)`` or a scalar, from the schedule, at least 0.
        sigma: as alpha.
        prediction: which quantity the network predicts.
        sigma_data: the data's standard deviation; ``edm`` only.

    Returns:
        ``(B, ...)``, float64 if ``output`` or ``x_t`` is, else float32.

    Raises:
        ValueError: unknown prediction.
    """
    f, x, a, s = output.double(), x_t.double(), expand(alpha.double(), x_t), expand(sigma.double(), x_t)
    match prediction:
        case "eps":
            x0 = (x - s * f) / a
        case "v":
            x0 = (a * x - s * f) / (a * a + s * s)
        case "x0":
            x0 = f
        case "flow":
            x0 = (x - s * f) / (a + s)
        case "edm":
            c_skip, c_out = _edm_coefficients(a, s, sigma_data)
            x0 = c_skip * x + c_out * f
        case _:
            raise _unknown(prediction)
    return _returned(x0, output, x_t)


def from_x0(
    x0: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, prediction: Prediction, sigma_data: float = 0.5
) -> Tensor:
    """The output of a network with this prediction type that corresponds to ``x0``: the inverse of `to_x0`.

    Shapes, dtypes and errors as there. At sigma = 0, where x_t does not determine the noise, only ``x0`` is finite.
    """
    d, x, a, s = x0.double(), x_t.double(), expand(alpha.double(), x_t), expand(sigma.double(), x_t)
    match prediction:
        case "eps":
            output = (x - a * d) / s
        case "v":
            output = (a * x - (a * a + s * s) * d) / s
        case "x0":
            output = d
        case "flow":
            output = (x - (a + s) * d) / s
        case "edm":
            c_skip, c_out = _edm_coefficients(a, s, sigma_data)
            output = (d - c_skip * x) / c_out
        case _:
            raise _unknown(prediction)
    return _returned(output, x0, x_t)


def eps_from_x0(x0: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The noise in ``x_t`` if its clean image is ``x0``: ``(x_t - alpha x_0) / sigma``; see `from_x0`."""
    return from_x0(x0, x_t, alpha, sigma, "eps")


def training_target(
    x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor, prediction: Prediction, sigma_data: float = 0.5
) -> Tensor:
    """The regression target for a network's output, given the clean image and the noise.

    It never divides by alpha or by sigma alone, so it is finite at all t. Shapes, dtypes and errors as in `to_x0`.
    """
    d, e, a, s = x0.double(), eps.double(), expand(alpha.double(), x0), expand(sigma.double(), x0)
    match prediction:
        case "eps":
            target = e.expand_as(d)
        case "v":
            target = a * e - s * d
        case "x0":
            target = d
        case "flow":
            target = e - d
        case "edm":
            # (x_0 - c_skip x_t) / c_out with x_t = a x_0 + s e, with s cancelled.
            target = (s * d - sigma_data**2 * a * e) / (sigma_data * torch.sqrt(s * s + (a * sigma_data) ** 2))
        case _:
            raise _unknown(prediction)
    return _returned(target, x0, eps)


def _edm_coefficients(alpha: Tensor, sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """EDM's c_skip / alpha and c_out (table 1) at noise level sigma / alpha, without dividing by alpha."""
    variance = sigma * sigma + (alpha * sigma_data) ** 2
    return sigma_data**2 * alpha / variance, sigma * sigma_data / torch.sqrt(variance)


def _returned(value: Tensor, *given: Tensor) -> Tensor:
    return value if any(tensor.dtype == torch.float64 for tensor in given) else value.float()


def _unknown(prediction: str) -> ValueError:
    return ValueError(f"{prediction!r} is not a prediction type: use one of {', '.join(PREDICTIONS)}")
