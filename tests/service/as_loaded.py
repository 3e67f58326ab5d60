"""The backend that changes nothing."""

from collections.abc import Sequence

import torch

from weights.families import TextToImage


class AsLoaded:
    """Models run as their family loaded them.

    Args:
        max_batch: the largest batch; every smaller one is as good, so that nothing is ever padded.
        threads: of the CPU; torch's choice when None.
    """

    name = "as_loaded"

    def __init__(self, max_batch: int, threads: int | None = None) -> None:
        self.batches: Sequence[int] = range(1, max_batch + 1)
        if threads is not None:
            torch.set_num_threads(threads)

    def prepare(self, model: TextToImage, base: TextToImage | None = None) -> TextToImage:
        """See `Backend.prepare`."""
        return model
