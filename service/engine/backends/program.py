"""A part of a model as OpenVINO runs it: one program per batch size, compiled while the part is in use."""

import logging
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from service.engine.backends.base import Growing
from service.engine.backends.compiler import Compiler, Shapes, infer
from weights.families.base import Part

log = logging.getLogger(__name__)


class Program(Growing):
    """A part that OpenVINO runs: for any number of rows, in batches of fixed sizes.

    Calling a missing batch size compiles it first, while the caller waits; a caller that cannot wait consults `made`.

    Args:
        compiler: compiles the programs.
        part: the part to replace.
        batches: batch sizes to compile for, ascending from 1. More rows than the largest take several calls. Fewer rows
            than a batch are padded by repeating the last one, which is safe since rows do not affect each other.

    Raises:
        WrongConversion, RuntimeError: see `Compiler.converted`.
    """

    def __init__(self, compiler: Compiler, part: Part, batches: Sequence[int]) -> None:
        super().__init__()
        self._compiler, self._batches = compiler, batches
        self._part = compiler.converted(part)
        self._row: Shapes = tuple(tuple(each.shape[1:]) for each in part.example(1))
        """Shapes of the inputs that generation uses, without the batch dimension."""
        self._usual = {batch: self._needed(batch) for batch in batches}
        self._requests: dict[tuple[Shapes, int], list[Any]] = {}
        self._made: tuple[int, list[int]] = (0, [])
        """What `made` returned when there were this many programs: it is read before every call."""
        self._coming = False
        """Whether a batch size is queued for compilation. Others are ignored meanwhile; callers ask again if needed."""
        self._failed: set[int] = set()

    @property
    def most_bytes(self) -> int:
        """Approximate memory once every batch size has been compiled."""
        return self._compiler.bytes_of(self._part, tuple((1, *shape) for shape in self._row), self._batches)

    @property
    def made(self) -> list[int]:
        """See `Growing.made`. For the usual inputs."""
        programs = len(self._requests)
        if programs != self._made[0]:
            self._made = programs, [batch for batch, needed in self._usual.items() if needed in self._requests]
        return self._made[1]

    def want(self, batch: int) -> None:
        """See `Growing.want`. A size that cannot be compiled is not tried again; the next smaller one is used."""
        batch = max((each for each in self._batches if each <= batch and each not in self._failed), default=1)
        if not self._coming and batch not in self.made:
            self._coming = True
            self._compiler.later(partial(_compile, weakref.ref(self), batch))

    def forward(self, *inputs: Tensor) -> Tensor:
        """One float32 output per row."""
        answers = [
            self._batch(chunk) for chunk in zip(*(each.split(self._batches[-1]) for each in inputs), strict=True)
        ]
        return answers[0] if len(answers) == 1 else torch.cat(answers)

    def compile_batch(self, batch: int) -> None:
        """Compile this batch size for the usual inputs; a failure is logged."""
        try:
            self._requests_of(*self._usual[batch])
        except Exception:
            self._failed.add(batch)
            log.exception("OpenVINO cannot compile a batch of %d; using smaller batches", batch)
        self._coming = False

    def _batch(self, inputs: tuple[Tensor, ...]) -> Tensor:
        rows = len(inputs[0])
        missing = next(size for size in self._batches if size >= rows) - rows
        if missing:
            inputs = tuple(torch.cat([each, each[-1:].expand(missing, *each.shape[1:])]) for each in inputs)
        streams = self._compiler.streams(rows + missing)
        chunks = list(zip(*(each.chunk(streams) for each in inputs), strict=True))
        return infer(self._requests_of(tuple(tuple(each.shape) for each in chunks[0]), streams), chunks)[:rows]

    def _needed(self, batch: int) -> tuple[Shapes, int]:
        """What to compile for a batch of the usual inputs: the shapes of one stream's share, and how many streams."""
        streams = self._compiler.streams(batch)
        return tuple((batch // streams, *shape) for shape in self._row), streams

    def _requests_of(self, shapes: Shapes, streams: int) -> list[Any]:
        """The requests of one program, one per stream."""
        if (shapes, streams) not in self._requests:
            program = self._compiler.compile(self._part, shapes, streams)
            made = [program.create_infer_request() for _ in range(streams)]
            self._requests.setdefault((shapes, streams), made)  # another thread may have compiled it too
        return self._requests[shapes, streams]


def _compile(program: "weakref.ref[Program]", batch: int) -> None:
    """Compile a batch size, unless the model has left memory since that was requested."""
    wanted = program()
    if wanted is not None:
        wanted.compile_batch(batch)
