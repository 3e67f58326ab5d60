"""Low-rank adapters (peft) on a family's network: adding them, sharing frozen weights, and saving them for diffusers.

Networks that train only adapters can share one set of frozen weights (`copy_sharing_frozen`). Each has its own modules,
with its own adapters, hooks and training mode, but its frozen parameters are the very parameters of the teacher. So
there is no active adapter to switch, calls cost no more than without sharing, callers need not know about it, and the
teacher is the network without adapters. Frozen parameters stay shared when a module is moved or converted, because
torch does both in place.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from weights.contracts import LoraSpec
from weights.families.base import TextToImage

ADAPTER = "default"


def add_adapters(model: TextToImage, lora: LoraSpec, targets: Sequence[str] | None = None) -> None:
    """Adds trainable adapters to the model's network and freezes all its other parameters.

    Args:
        model: whose network is changed.
        lora: rank, scale and dropout.
        targets: layer names or name suffixes; the family's when left out.

    Raises:
        ValueError: the family defines no layers for adapters.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if not model.lora_targets:
        raise ValueError(
            f"family {model.family!r} does not support LoRA adapters: leave 'lora' out to train every weight"
        )
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha or lora.rank,
        lora_dropout=lora.dropout,
        target_modules=list(targets or model.lora_targets),
        init_lora_weights=True,
    )
    inject_adapter_in_model(config, model.network, adapter_name=ADAPTER)
    for name, weight in model.network.named_parameters():
        weight.requires_grad_("lora_" in name)


def copy_sharing_frozen(network: nn.Module) -> nn.Module:
    """Copies a network, sharing its frozen parameters and duplicating everything else.

    For a network that trains every weight, this is a full copy; for a frozen one, only modules and buffers are new.
    Shared parameters must not be modified in place through either network.
    """
    kept: dict[int, Any] = {id(weight): weight for weight in network.parameters() if not weight.requires_grad}
    return copy.deepcopy(network, kept)


def save_adapters(model: TextToImage, folder: Path) -> None:
    """Writes ``pytorch_lora_weights.safetensors`` in half precision, for diffusers' ``load_lora_weights``."""
    from peft.utils import get_peft_model_state_dict

    network: Any = model.network
    state: dict[str, Any] = get_peft_model_state_dict(network, adapter_name=ADAPTER)
    state = {name: tensor.detach().cpu().half().contiguous() for name, tensor in state.items()}
    config: dict[str, Any] = network.peft_config[ADAPTER].to_dict()
    # peft keeps names in sets, whose order varies between runs; sorting makes equal students equal files.
    config = {key: sorted(value) if isinstance(value, set | list) else value for key, value in config.items()}
    model.save_adapters(folder, state, config)
