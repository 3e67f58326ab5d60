"""Encoding of prompts by CLIP and T5, as in diffusers' pipelines with several text encoders."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PROMPTS_AT_ONCE = 64
"""Prompts encoded together.

The hidden states of all layers are kept until the end: for SDXL's second encoder, 13 MB per prompt in float32.
"""


def clip_states(tokenizer: Any, encoder: Any, prompts: list[str], length: int) -> tuple[Tensor, Tensor | None]:
    """The penultimate layer's hidden states, and the pooled embedding if the encoder has a projection.

    Args:
        tokenizer: the encoder's tokenizer.
        encoder: a `CLIPTextModel`, or a `CLIPTextModelWithProjection`.
        prompts: N prompts.
        length: tokens that every prompt is padded or truncated to.

    Returns:
        ``(N, length, D)``, and ``(N, E)`` or None.
    """
    tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    device = next(encoder.parameters()).device
    output = encoder(tokens.input_ids.to(device), output_hidden_states=True)
    return output.hidden_states[-2], getattr(output, "text_embeds", None)


def padded_states(tokenizer: Any, encoder: Any, prompts: list[str], length: int) -> Tensor:
    """The states of a T5 encoder's last layer, ``(N, length, D)``, padding included, in the encoder's dtype."""
    tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    states: Tensor = encoder(tokens.input_ids.to(next(encoder.parameters()).device))[0]
    return states.to(encoder.dtype)


def keep_wide_layers(encoder: Any) -> None:
    """Moves the layers of a T5 encoder whose activations overflow float16 back to float32, as transformers loads them."""
    for name, module in encoder.named_modules():
        if name.endswith(".wo"):
            module.to(torch.float32)


def in_parts(encode: Callable[[list[str]], tuple[Tensor, ...]], prompts: list[str]) -> tuple[Tensor, ...]:
    """Apply ``encode`` to `PROMPTS_AT_ONCE` prompts at a time and concatenate the results."""
    starts = range(0, len(prompts), PROMPTS_AT_ONCE)
    parts = [encode(prompts[start : start + PROMPTS_AT_ONCE]) for start in starts]
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))
