"""The model calls: each combines images or prompts into batches, and returns one finite result for each of them.

A batch is padded if there are fewer rows than its size. Several batches are used if a single image does not fit into
one, such as a guided image, which has two rows, at a batch size of 1.
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
    """A model returned infinities or NaNs."""


def encode(prompts: Sequence[Prompt], batch: int) -> list[Cond]:
    """Encode the prompts; return a condition of one row for each.

    Raises:
        NotFinite: a condition is not finite.
    """
    conds = encode_prompts(prompts, batch)
    for cond in conds:
        for tensor in cond.values():
            _check(tensor)
    return conds


def denoise(pictures: Sequence[Picture], batch: int) -> Tensor:
    """Predict x_0, with guidance applied, for images of one group: ``(B, C, h, w)`` float32.

    Raises:
        NotFinite: a prediction is not finite.
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
    """Decode images of one group to pixels: ``(B, H, W, 3)``.

    Raises:
        NotFinite: a decoded image is not finite.
    """
    latents = torch.stack([picture.latents for picture in pictures])
    base = pictures[0].request.resident.base
    return to_pixels(_check(_in_batches(lambda index: base.decode(latents[index]), latents, batch)))


def to_pixels(pictures: Tensor) -> NDArray[uint8]:
    """Images ``(B, 3, H, W)`` in [-1, 1] as ``(B, H, W, 3)``, rounded as diffusers' image processor does."""
    pixels = ((pictures.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return cast(NDArray[uint8], pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy())


@contextlib.contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Use torch's deterministic algorithms if ``wanted``; torch warns where it has none.

    The switch applies to all threads. A model loaded meanwhile comes out the same: torch just fills its memory first.
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
    """Make the call for all rows, ``batch`` at a time, padding the last batch by repeating the last row."""
    if len(rows) == batch:
        return call(slice(None))
    answers = []
    for start in range(0, len(rows), batch):
        index = torch.arange(start, start + batch, device=rows.device).clamp(max=len(rows) - 1)
        answers.append(call(index)[: len(rows) - start])
    return torch.cat(answers)


def _check(tensor: Tensor) -> Tensor:
    """The tensor, once the device has computed it."""
    # The sum is finite only if every element is: one pass, and one number read from the device.
    if not math.isfinite(float(tensor.sum(dtype=torch.float32))):
        raise NotFinite("the model returned infinities or NaNs")
    return tensor
