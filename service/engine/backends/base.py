"""The backend interface: a backend turns a loaded model into a faster `TextToImage`, with other parts inside."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

from torch import nn

from weights.families import TextToImage


class Backend(Protocol):
    """Created once from the settings. Prepares one model at a time, on any thread, while other models are in use."""

    name: str
    batches: Sequence[int]
    """Batch sizes that it is built for, ascending from 1. The caller pads any other batch to the next size."""

    def prepare(self, model: TextToImage, base: TextToImage | None = None) -> TextToImage:
        """Return the model, ready to generate in any of the batch sizes.

        Args:
            model: as its family loaded it.
            base: the prepared base of a student, whose text encoder and decoder the student shares.
        """


class Growing(nn.Module, ABC):
    """A part that is compiled for a single row at first, and for larger batches while it is in use."""

    @property
    @abstractmethod
    def made(self) -> Sequence[int]:
        """Batch sizes it is compiled for, ascending. A call with any other size blocks until that size is compiled."""

    @abstractmethod
    def want(self, batch: int) -> None:
        """Have this batch size compiled on another thread. Calling it again has no effect."""


def doubling(most: int) -> tuple[int, ...]:
    """Batch sizes 1, 2, 4 and so on, ending with ``most``: few enough to compile each, and with little padding."""
    sizes = [1]
    while sizes[-1] * 2 < most:
        sizes.append(sizes[-1] * 2)
    return tuple(sizes) if most == 1 else (*sizes, most)
