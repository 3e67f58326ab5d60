"""Loads diffusers networks from a folder without process-wide side effects, so other threads can compute meanwhile.

While it loads, diffusers' ``from_pretrained`` changes torch's default dtype, `nn.Module.register_parameter` and
``torch.nn.init`` for the whole process. Here the network is built on the meta device, a setting that is local to the
thread, and each weight is then assigned from the file.
"""

import json
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import torch
from diffusers import ModelMixin
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor

M = TypeVar("M", bound=ModelMixin)

SHOWN = 300
"""Characters shown of torch's list of mismatches."""


class BadNetwork(ValueError):
    """A folder does not hold the expected network."""


def read_network(kind: type[M], folder: Path, device: torch.device | str, dtype: torch.dtype) -> M:
    """Load a network written by diffusers' ``save_pretrained`` for inference: frozen and in evaluation mode.

    Args:
        kind: the network's class.
        folder: holds ``config.json``, and the weights in one safetensors file or in shards with an index.
        device: where the weights are loaded.
        dtype: dtype of floating-point weights; others keep theirs.

    Raises:
        BadNetwork: a file is missing or truncated, or the weights do not exactly match the configuration.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        with torch.device("meta"):
            network: Any = kind.from_config(config)
        weights: dict[str, Tensor] = {}
        for file in _files(folder):
            _read_into(weights, file, device, dtype)
    except (OSError, SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise BadNetwork(f"{folder} holds no complete {kind.__name__}: {error}; save it again") from error
    try:
        network.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:  # lists missing and unexpected weights, and wrong shapes
        listed = " ".join(str(error).split())
        listed = listed if len(listed) <= SHOWN else listed[:SHOWN] + "..."
        raise BadNetwork(f"the weights in {folder} are not those of its config.json: {listed}") from error
    made = [name for name, tensor in network.named_buffers() if tensor.is_meta]
    if made:  # computed by the constructor, and so in no file
        raise BadNetwork(f"{folder}: the {kind.__name__} cannot be loaded, since no file contains {', '.join(made)}")
    return network.eval().requires_grad_(False)  # type: ignore[no-any-return]


def _files(folder: Path) -> list[Path]:
    """The files with the weights; like diffusers, prefers the index."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        return [folder / SAFETENSORS_WEIGHTS_NAME]
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    for name in names:
        if PurePosixPath(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{SAFE_WEIGHTS_INDEX_NAME} names {name!r}, which is not a safetensors file beside it")
    return [folder / name for name in names]


def _read_into(weights: dict[str, Tensor], file: Path, device: torch.device | str, dtype: torch.dtype) -> None:
    """Copy a file's tensors into memory: safetensors maps the file, which may change or disappear."""
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 (not a mapping)
            if name in weights:
                raise ValueError(f"{name} is in two of the files")
            tensor = opened.get_tensor(name)
            weights[name] = tensor.to(device, dtype if tensor.is_floating_point() else None, copy=True)
