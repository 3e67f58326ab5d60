"""Prompts through CLIP's text encoders, as diffusers' pipelines of several encoders take them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PROMPTS_AT_ONCE = 64
"""Every layer's states are kept until the last is there: 13 MB a prompt of SDXL's second encoder's in float32."""


def clip_states(tokenizer: Any, encoder: Any, prompts: list[str], length: int) -> tuple[Tensor, Tensor | None]:
    """The states of the last layer but one, and the prompt as one vector where the encoder has a projection.

    Args:
        tokenizer: of the encoder.
        encoder: a `CLIPTextModel`, or one with a projection.
        prompts: N of them.
        length: of every row, in tokens.

    Returns:
        ``(N, length, D)``, and ``(N, E)`` or none.
    """
    tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    device = next(encoder.parameters()).device
    output = encoder(tokens.input_ids.to(device), output_hidden_states=True)
    return output.hidden_states[-2], getattr(output, "text_embeds", None)


def in_parts(encode: Callable[[list[str]], tuple[Tensor, ...]], prompts: list[str]) -> tuple[Tensor, ...]:
    """What ``encode`` gives for all prompts, asked for `PROMPTS_AT_ONCE` at a time."""
    starts = range(0, len(prompts), PROMPTS_AT_ONCE)
    parts = [encode(prompts[start : start + PROMPTS_AT_ONCE]) for start in starts]
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))
