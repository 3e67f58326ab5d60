"""How a job's failure is reported: by its message, if that describes it, or as a bug."""

import torch

from distillers.trainer import Diverged
from weights.store import StoreError

EXPECTED = (ValueError, Diverged, StoreError, OSError)
"""Failures that are fully described by their message; anything else is a bug, and is shown with its traceback."""
SMALLER = (
    "lower train.batch_size and raise train.gradient_accumulation by as much, set train.gradient_checkpointing, or train "
    "a LoRA with lora.shared_base"
)
"""What needs less memory."""


def described(error: Exception, batch_size: int) -> tuple[str, bool]:
    """The message for the user, and whether it is the whole story: if not, the error is a bug.

    Args:
        error: what ended the job.
        batch_size: the job's.
    """
    if _out_of_memory(error):
        return f"out of memory with batch_size {batch_size}: {SMALLER} ({error})", True
    if isinstance(error, EXPECTED):
        return str(error), True
    return f"{type(error).__name__}: {error}", False


def _out_of_memory(error: Exception) -> bool:
    """Whether it is a GPU's allocator that failed, or the CPU's, whose errors have no class of their own."""
    failed = ("can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in failed)
    )
