"""Warm-up: calls every part of a model in every batch size before a request waits for it, and measures the time.

This gets the work of first calls done (compilation, allocation, choosing kernels), and makes costs known.
"""

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from service.engine.calls import determinism
from service.engine.costs import CostProfile, Costs, Part
from service.engine.parts import parts_of
from weights.denoiser import GUIDANCE, Cond, cond_repeat
from weights.families import TextToImage

Call = Callable[[int], Tensor | Mapping[str, Tensor]]
"""Makes one call of a given batch size."""
PROMPT = "red apple"
REPEATS = 3
TIME = 0.5


def measured_sizes(batches: Sequence[int]) -> list[int]:
    """The backend's batch sizes that are worth measuring: powers of two and the largest. The rest is interpolated."""
    return [batch for batch in batches if batch & (batch - 1) == 0 or batch == batches[-1]]


@torch.inference_mode()
def warm(base: TextToImage, students: Sequence[TextToImage], costs: Costs) -> None:
    """Call the base's parts and the students' networks in all measured sizes, and record what they cost.

    Args:
        base: a base in memory.
        students: students of this base in memory.
        costs: receives the measurements; students of the base's architecture share its entry, and the last one counts.
    """
    parts, cond = parts_of(base), base.encode_prompts([PROMPT])
    latents = torch.zeros(1, *base.latent_shape(), device=base.device)

    def rows(batch: int) -> Tensor:
        return latents.expand(batch, *latents.shape[1:]).contiguous()

    def encode(batch: int) -> Mapping[str, Tensor]:
        return base.encode_prompts([PROMPT] * batch)

    def denoise(model: TextToImage) -> Callable[[int], Tensor]:
        told: Cond = {GUIDANCE: torch.ones(1, device=base.device)} if model.denoiser.embeds_guidance else {}
        one = {**cond, **told}
        return lambda batch: model.denoiser(
            rows(batch), torch.full((batch,), TIME, device=base.device), cond_repeat(one, batch)
        )

    sizes = measured_sizes(costs.batches)
    calls: list[tuple[Part, Call]] = [(parts.text, encode), (parts.decoder, lambda batch: base.decode(rows(batch)))]
    calls += [(parts_of(model).network, denoise(model)) for model in (base, *students)]
    for part, call in calls:
        costs.put(part, CostProfile.measure(_finished(call), sizes, REPEATS, time.perf_counter).measured)
        # A compiled part has a separate program for deterministic images, which are computed alone.
        with determinism(True):
            _finished(call)(1)


def _finished(call: Call) -> Callable[[int], None]:
    """The call, followed by waiting until the device has finished it."""

    def whole(batch: int) -> None:
        answer = call(batch)
        for tensor in [answer] if isinstance(answer, Tensor) else answer.values():
            bool(tensor.isfinite().all())  # reads a result, as the engine does after each call

    return whole
