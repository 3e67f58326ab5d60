"""The backend for GPUs, and for machines without OpenVINO: torch runs a model's parts as fast as it can."""

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from service.engine.backends.base import doubling
from weights.families import TextToImage
from weights.families.base import PartName

Attention = Literal["sdpa", "xformers"]

PROGRAMS = 256
"""Most compiled programs per kind of part.

torch keeps those of all models together, so that a student reuses its base's. Each batch size, image size and
architecture needs its own; beyond torch's default of 8, later ones would run uncompiled.
"""


class TorchBackend:
    """Models as they are, with torch's optimizations for the device switched on.

    Args:
        device: where the models are.
        max_batch: largest batch size.
        attention: torch's own, or xformers' kernels, which are for GPUs.
        compiled: compile the parts for a few batch sizes each: minutes at each part's first calls, then faster calls.
        threads: number of CPU threads; None for torch's choice.
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
        # Uncompiled, all sizes are equally good, and nothing needs padding.
        self.batches: Sequence[int] = doubling(max_batch) if compiled else range(1, max_batch + 1)
        if threads is not None:
            torch.set_num_threads(threads)

    def prepare(self, model: TextToImage, base: TextToImage | None = None) -> TextToImage:
        """See `Backend.prepare`."""
        parts = model.parts()
        if not parts:
            return model
        # Measured: on a CPU the decoder gains a third as well, the network nothing.
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
    """A part that torch compiles for each number of rows that it is given; on a GPU it is replayed as a CUDA graph."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        super().__init__()
        self._replayed = device.type == "cuda"
        self._run = cast(Any, torch.compile)(  # its overloads lack recompile_limit
            module,
            mode="reduce-overhead" if self._replayed else None,
            dynamic=False,
            recompile_limit=PROGRAMS,
        )

    def forward(self, *inputs: Tensor) -> Tensor:
        if not self._replayed:
            return cast(Tensor, self._run(*inputs))
        torch.compiler.cudagraph_mark_step_begin()
        # A copy, since the graph's next output overwrites this one.
        return cast(Tensor, self._run(*inputs)).clone()
