"""The backend of GPUs, and of machines without OpenVINO: torch runs a model's parts, as fast as it can."""

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from service.engine.backends.base import doubling
from weights.families import TextToImage
from weights.families.base import PartName

Attention = Literal["sdpa", "xformers"]

PROGRAMS = 256
"""Of one kind of part, at most: torch keeps those of all models together, so that a student runs its base's. Each batch size
needs its own, each size of picture and each architecture; beyond torch's usual 8 whatever came late would run uncompiled."""


class TorchBackend:
    """Models as they are, with what makes torch faster on the device switched on.

    Args:
        device: where the models lie.
        max_batch: the largest batch.
        attention: torch's own, or xformers' kernels, which are for GPUs.
        compiled: compile the parts, each for a few batch sizes: minutes when each is first drawn in, and faster calls.
        threads: of the CPU; torch's choice when None.
    """

    name = "torch"

    def __init__(
        self,
        *,
        device: torch.device,
        max_batch: int,
        attention: Attention = "sdpa",
        compiled: bool = False,
        threads: int | None = None,
    ) -> None:
        self._device, self._attention, self._compiled = device, attention, compiled
        # Uncompiled, every size is as good as another, and nothing need be padded.
        self.batches: Sequence[int] = doubling(max_batch) if compiled else range(1, max_batch + 1)
        if threads is not None:
            torch.set_num_threads(threads)

    def prepare(self, model: TextToImage, base: TextToImage | None = None) -> TextToImage:
        """See `Backend.prepare`."""
        parts = model.parts()
        if not parts:
            return model
        # Measured: the decoder gains a third on a CPU as well, the network there nothing.
        if base is None:
            _channels_last(parts["decoder"].module)
        if self._device.type == "cuda":
            _channels_last(model.network)
        if self._attention == "xformers":
            cast(Any, model.network).enable_xformers_memory_efficient_attention()
        if not self._compiled:
            return model
        own = model.part_names if base is None else ("network",)
        programs: dict[PartName, nn.Module] = {} if base is None else dict(base.programs)
        programs.update({name: Compiled(parts[name].module, self._device) for name in own})
        return model.with_programs(programs)


def _channels_last(module: nn.Module) -> None:
    cast(Any, module).to(memory_format=torch.channels_last)


class Compiled(nn.Module):
    """A part, compiled by torch for each number of rows that it is given; on a GPU it is replayed as a CUDA graph."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        super().__init__()
        self._replayed = device.type == "cuda"
        self._run = cast(Any, torch.compile)(  # its overloads do not know recompile_limit
            module,
            mode="reduce-overhead" if self._replayed else None,
            dynamic=False,
            recompile_limit=PROGRAMS,
        )

    def forward(self, *inputs: Tensor) -> Tensor:
        if not self._replayed:
            return cast(Tensor, self._run(*inputs))
        torch.compiler.cudagraph_mark_step_begin()
        # A copy: a graph's answer lies where its next answer will.
        return cast(Tensor, self._run(*inputs)).clone()
