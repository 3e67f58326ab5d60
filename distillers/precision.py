"""Which number format to train in: bfloat16 where the processor computes in it, float32 elsewhere."""

from typing import Literal

import torch

Precision = Literal["auto", "float32", "bfloat16"]


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 natively; where it does not, it is emulated and slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def resolve_precision(asked: Precision, device: torch.device) -> Literal["float32", "bfloat16"]:
    """What "auto" means on this device; anything else is taken as it is."""
    if asked != "auto":
        return asked
    return "bfloat16" if computes_in_bfloat16(device) else "float32"
