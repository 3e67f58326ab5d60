"""The calls themselves: from pictures and prompts that share one to its answer, one a picture, all of it finite.

A batch has more rows than somebody waits for where it is padded; and there are several batches where a single picture does
not fit into one, as a guided one does not where a batch is one row.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from numpy import uint8
from numpy.typing import NDArray
from torch import Tensor

from service.engine.pictures import Picture
from service.engine.text import Prompt
from service.engine.text import encode as encode_prompts
from weights.denoiser import Cond, cond_cat, cond_rows


class NotFinite(ArithmeticError):
    """A model answered with an infinity or with no number."""


def encode(prompts: Sequence[Prompt], batch: int) -> list[Cond]:
    """Conditions of these prompts, of one row each.

    Raises:
        NotFinite: they are not.
    """
    conds = encode_prompts(prompts, batch)
    for cond in conds:
        for tensor in cond.values():
            _check(tensor)
    return conds


def denoise(pictures: Sequence[Picture], batch: int) -> Tensor:
    """The estimates of x_0 for pictures of one group, guided: ``(B, C, h, w)`` float32.

    Raises:
        NotFinite: one of them is not.
    """
    conditions = [picture.conditions() for picture in pictures]
    counts = [len(own) for own in conditions]
    cond = cond_cat([row for own in conditions for row in own])
    owners = [picture for picture, count in zip(pictures, counts, strict=True) for _ in range(count)]
    x_t = torch.stack([picture.x for picture in owners])
    t = torch.tensor([picture.next_step.t for picture in owners], device=x_t.device)
    denoiser = pictures[0].denoiser
    rows = _in_batches(lambda index: denoiser(x_t[index], t[index], cond_rows(cond, index)), x_t, batch)
    if len(rows) > len(pictures):
        guided = [
            own[0] if len(own) == 1 else own[0] + picture.next_step.guidance_scale * (own[1] - own[0])
            for own, picture in zip(rows.split(counts), pictures, strict=True)
        ]
        rows = torch.stack(guided)
    return _check(rows)


def decode(pictures: Sequence[Picture], batch: int) -> NDArray[uint8]:
    """What pictures of one group look like: ``(B, H, W, 3)``.

    Raises:
        NotFinite: one of them has no colours.
    """
    latents = torch.stack([picture.latents for picture in pictures])
    base = pictures[0].request.resident.base
    return to_pixels(_check(_in_batches(lambda index: base.decode(latents[index]), latents, batch)))


def to_pixels(pictures: Tensor) -> NDArray[uint8]:
    """Pictures ``(B, 3, H, W)`` in [-1, 1] as ``(B, H, W, 3)``, rounded as diffusers' image processor does."""
    pixels = ((pictures.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return cast(NDArray[uint8], pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy())


@contextlib.contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """torch's deterministic algorithms, where there are such; it warns where there are none.

    In all threads: a model that is loaded meanwhile is the same, only that its fresh memory is filled before it is written.
    """
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _in_batches(call: Callable[[Tensor | slice], Tensor], rows: Tensor, batch: int) -> Tensor:
    """The call for all rows, ``batch`` at a time; where fewer are left, the last one is repeated."""
    if len(rows) == batch:
        return call(slice(None))
    answers = []
    for start in range(0, len(rows), batch):
        index = torch.arange(start, start + batch, device=rows.device).clamp(max=len(rows) - 1)
        answers.append(call(index)[: len(rows) - start])
    return torch.cat(answers)


def _check(tensor: Tensor) -> Tensor:
    """The tensor, once the device has computed it."""
    # A sum is finite where all that is added is: one pass, and one number from the device.
    if not math.isfinite(float(tensor.sum(dtype=torch.float32))):
        raise NotFinite("the model's answer is not finite")
    return tensor
