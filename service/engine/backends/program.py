"""A part of a model as OpenVINO runs it: a program for each batch size, which are compiled beside the drawing."""

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

    A batch size that is missing is compiled when it is called, while the caller waits; who cannot wait asks what is `made`.

    Args:
        compiler: compiles the programs.
        part: what it takes the place of.
        batches: sizes to compile for, rising from 1. More rows than the last one take several calls; fewer than one of them
            are filled up by repeating the last row, and rows do not see each other.

    Raises:
        WrongConversion, RuntimeError: see `Compiler.converted`.
    """

    def __init__(self, compiler: Compiler, part: Part, batches: Sequence[int]) -> None:
        super().__init__()
        self._compiler, self._batches = compiler, batches
        self._part = compiler.converted(part)
        self._row: Shapes = tuple(tuple(each.shape[1:]) for each in part.example(1))
        """Of the inputs, as drawing gives them."""
        self._usual = {batch: self._needed(batch) for batch in batches}
        self._requests: dict[tuple[Shapes, int], list[Any]] = {}
        self._made: tuple[int, list[int]] = (0, [])
        """See `made`, when there were so many programs: it is asked for at every call."""
        self._coming = False
        """Whether a batch size is to be compiled; others are asked for again if they are still wanted then."""
        self._failed: set[int] = set()

    @property
    def most_bytes(self) -> int:
        """About what it takes in memory once every batch size was drawn in."""
        return self._compiler.bytes_of(self._part, tuple((1, *shape) for shape in self._row), self._batches)

    @property
    def made(self) -> list[int]:
        """See `Growing.made`: for the usual inputs."""
        programs = len(self._requests)
        if programs != self._made[0]:
            self._made = programs, [batch for batch, needed in self._usual.items() if needed in self._requests]
        return self._made[1]

    def want(self, batch: int) -> None:
        """See `Growing.want`. One that cannot be compiled is not tried again, but a smaller one."""
        batch = max((each for each in self._batches if each <= batch and each not in self._failed), default=1)
        if not self._coming and batch not in self.made:
            self._coming = True
            self._compiler.later(partial(_compile, weakref.ref(self), batch))

    def forward(self, *inputs: Tensor) -> Tensor:
        """Answers in float32, as many as rows."""
        answers = [
            self._batch(chunk) for chunk in zip(*(each.split(self._batches[-1]) for each in inputs), strict=True)
        ]
        return answers[0] if len(answers) == 1 else torch.cat(answers)

    def compile_batch(self, batch: int) -> None:
        """Make it for this batch size of the usual inputs; where that fails it is logged."""
        try:
            self._requests_of(*self._usual[batch])
        except Exception:
            self._failed.add(batch)
            log.exception("OpenVINO cannot compile a batch of %d; smaller ones are drawn in", batch)
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
        """What is compiled for a batch of the usual inputs: the shapes of a stream's part of it, and the streams."""
        streams = self._compiler.streams(batch)
        return tuple((batch // streams, *shape) for shape in self._row), streams

    def _requests_of(self, shapes: Shapes, streams: int) -> list[Any]:
        """As many requests of one program as there are streams."""
        if (shapes, streams) not in self._requests:
            program = self._compiler.compile(self._part, shapes, streams)
            made = [program.create_infer_request() for _ in range(streams)]
            self._requests.setdefault((shapes, streams), made)  # another thread may have compiled it as well
        return self._requests[shapes, streams]


def _compile(program: "weakref.ref[Program]", batch: int) -> None:
    """For a batch size, unless the model has left memory since that was asked for."""
    wanted = program()
    if wanted is not None:
        wanted.compile_batch(batch)
