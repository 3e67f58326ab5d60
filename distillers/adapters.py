"""Low-rank adapters (peft) on a family's network: added, found again, and saved as diffusers' LoRA file.

Networks that train adapters alone can stand on one set of frozen weights (`copy_sharing_frozen`): each has modules of its
own, with its own adapters, hooks and mode, but its frozen parameters are the teacher's very parameters. So there is no
active adapter to switch, a call costs what it costs without sharing, nobody who uses such a network has to know, and the
teacher is the network without adapters. Frozen parameters stay one where a module is moved or converted, because torch
does both in place.
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
    """Puts trainable adapters on the model's network and freezes everything else of it.

    Args:
        model: whose network.
        lora: rank, scale and dropout.
        targets: names of layers, or how they end; the family's when left out.

    Raises:
        ValueError: the family names no layers for adapters.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if not model.lora_targets:
        raise ValueError(f"family {model.family!r} takes no LoRA adapters: leave 'lora' out to train every weight")
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
    """A copy of a network that holds the very same frozen parameters, and its own of everything else.

    Of a network that trains every weight this is a full copy, of a frozen one only the modules and buffers are new.
    Shared parameters must not be changed in place, through either network.
    """
    kept: dict[int, Any] = {id(weight): weight for weight in network.parameters() if not weight.requires_grad}
    return copy.deepcopy(network, kept)


def save_adapters(model: TextToImage, folder: Path) -> None:
    """Writes ``pytorch_lora_weights.safetensors`` in half precision, as diffusers' ``load_lora_weights`` reads it."""
    from peft.utils import get_peft_model_state_dict

    network: Any = model.network
    state: dict[str, Any] = get_peft_model_state_dict(network, adapter_name=ADAPTER)
    state = {name: tensor.detach().cpu().half().contiguous() for name, tensor in state.items()}
    config: dict[str, Any] = network.peft_config[ADAPTER].to_dict()
    # peft keeps names in sets, whose order differs from run to run: sorted, the same student gives the same file.
    config = {key: sorted(value) if isinstance(value, set | list) else value for key, value in config.items()}
    model.save_adapters(folder, state, config)
