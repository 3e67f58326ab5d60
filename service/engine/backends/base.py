"""A backend turns a loaded model into one that runs faster: the same `TextToImage`, with other parts inside."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

from torch import nn

from weights.families import TextToImage


class Backend(Protocol):
    """Built once, from the settings; prepares one model at a time, on any thread, while others are drawn with."""

    name: str
    batches: Sequence[int]
    """Batch sizes that it is made for, rising from 1; a batch of another size is padded to the next by the caller."""

    def prepare(self, model: TextToImage, base: TextToImage | None = None) -> TextToImage:
        """The model, ready to draw in any of the batches.

        Args:
            model: as its family loaded it.
            base: the prepared base of a student, whose text encoder and decoder it shares.
        """


class Growing(nn.Module, ABC):
    """A program that is made for a single row at first, and for larger batches while it is drawn with."""

    @property
    @abstractmethod
    def made(self) -> Sequence[int]:
        """Batch sizes that it is made for, rising; calls of another one wait until it is."""

    @abstractmethod
    def want(self, batch: int) -> None:
        """Have it made for this batch size as well, on another thread than the caller's. Again: nothing."""


def doubling(most: int) -> tuple[int, ...]:
    """Batch sizes 1, 2, 4 and so on, and ``most`` last: few enough to make something for each, and little is padded."""
    sizes = [1]
    while sizes[-1] * 2 < most:
        sizes.append(sizes[-1] * 2)
    return tuple(sizes) if most == 1 else (*sizes, most)
