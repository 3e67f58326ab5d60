"""The backend for machines without a GPU: OpenVINO runs a model's parts, in bfloat16 if the processor supports it."""

import logging
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from service.engine.backends.cache import Cache
from service.engine.backends.compiler import Compiler, Precision
from service.engine.backends.program import Program
from weights.families import TextToImage
from weights.families.base import Part, PartName

log = logging.getLogger(__name__)


class OpenVinoBackend:
    """Runs parts as programs of fixed shapes, one for each batch size.

    The program for a single row is compiled when a model is prepared, the others when they are first called or wanted.
    torch does the little that is left, in one thread: several are no faster, and would take cores from OpenVINO.

    Args:
        batches: batch sizes, ascending from 1.
        cache: stores converted and compiled parts.
        precision: what programs compute in; ``auto`` is bf16 if the processor supports it.
        threads: number of threads of one call; None for one per core.
    """

    name = "openvino"

    def __init__(
        self, *, batches: Sequence[int], cache: Cache, precision: Precision | Literal["auto"], threads: int | None
    ) -> None:
        self.batches = batches
        self._compiler = Compiler(cache, precision, threads)
        self._threads = threads or torch.get_num_threads()
        torch.set_num_threads(1)

    def prepare(self, model: TextToImage, base: TextToImage | None = None) -> TextToImage:
        """See `Backend.prepare`. A part that OpenVINO cannot run is left to torch, which is logged."""
        wanted = model.part_names if base is None else ("network",)
        parts = {name: part for name, part in model.parts().items() if name in wanted}
        made = {name: program for name, part in parts.items() if (program := self._program(name, part)) is not None}
        if base is None and not made:
            return model
        programs: dict[PartName, nn.Module] = {} if base is None else dict(base.programs)
        programs.pop("network", None)
        programs.update(made)
        # A base keeps its network: students with adapters are made from it.
        prepared = model.with_programs(programs, keep_network=base is None or "network" not in made)
        prepared.extra_bytes = sum(program.most_bytes for program in made.values())
        return prepared

    def _program(self, name: PartName, part: Part) -> Program | None:
        try:
            program = Program(self._compiler, part, self.batches)
            program(*part.example(1))
        except Exception:
            torch.set_num_threads(self._threads)  # torch has work to do now
            log.exception("OpenVINO cannot run the model's %s; using torch", name)
            return None
        return program
