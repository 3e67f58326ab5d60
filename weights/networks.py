"""Networks of diffusers from a folder, without a look left or right: safe beside threads that compute.

diffusers' own ``from_pretrained`` changes torch's default dtype, `nn.Module.register_parameter` and ``torch.nn.init`` for
the whole process while it loads, so that nothing else may be computed meanwhile. Here the network is made on the meta
device, which torch knows of each thread apart, and each weight is then taken from the file.
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
"""Characters of torch's list of what does not fit."""


class BadNetwork(ValueError):
    """A folder does not hold the network that it should."""


def read_network(kind: type[M], folder: Path, device: torch.device | str, dtype: torch.dtype) -> M:
    """The network that diffusers' ``save_pretrained`` wrote, for drawing: frozen, and in evaluation mode.

    Args:
        kind: its class.
        folder: holds ``config.json``, and the weights in one safetensors file or in shards with their index.
        device: where its weights lie from the start.
        dtype: of its weights; those that are no floating-point numbers stay as they are.

    Raises:
        BadNetwork: a file is missing or cut off, or the weights are not exactly those of such a network.
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
    except RuntimeError as error:  # all that is missing, surplus, or of another shape
        listed = " ".join(str(error).split())
        listed = listed if len(listed) <= SHOWN else listed[:SHOWN] + "..."
        raise BadNetwork(f"the weights in {folder} are not those of its config.json: {listed}") from error
    made = [name for name, tensor in network.named_buffers() if tensor.is_meta]
    if made:  # no file has them: the constructor computes them
        raise BadNetwork(f"{folder}: a {kind.__name__} with {', '.join(made)}, which no file holds, cannot be loaded")
    return network.eval().requires_grad_(False)  # type: ignore[no-any-return]


def _files(folder: Path) -> list[Path]:
    """Where the weights are: as in diffusers, the index comes first."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        return [folder / SAFETENSORS_WEIGHTS_NAME]
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    for name in names:
        if PurePosixPath(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{SAFE_WEIGHTS_INDEX_NAME} names {name!r}, which is no safetensors file beside it")
    return [folder / name for name in names]


def _read_into(weights: dict[str, Tensor], file: Path, device: torch.device | str, dtype: torch.dtype) -> None:
    """A file's tensors, in memory of their own: what safetensors gives is the mapped file, which may change or go."""
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 - no mapping
            if name in weights:
                raise ValueError(f"{name} is in two of the files")
            tensor = opened.get_tensor(name)
            weights[name] = tensor.to(device, dtype if tensor.is_floating_point() else None, copy=True)
