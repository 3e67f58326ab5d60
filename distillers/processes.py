"""What the processes of one job do together; for a job of one process all of it is nothing."""

import torch
from torch import Tensor, distributed


class Interrupted(Exception):
    """The job was told to stop; what there was to save is saved."""


def place() -> tuple[int, int]:
    """This process's number, and how many there are."""
    return (distributed.get_rank(), distributed.get_world_size()) if _several() else (0, 1)


def summed(tensor: Tensor) -> Tensor:
    """The tensor's sum over all processes; changed in place."""
    if _several():
        distributed.all_reduce(tensor)
    return tensor


def agreed(flag: bool, device: torch.device) -> bool:
    """Whether any process says so; all have to come here."""
    return bool(summed(torch.tensor(float(flag), device=device)).item() > 0) if _several() else flag


def wait() -> None:
    """Until all processes have come here."""
    if _several():
        distributed.barrier()


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized()
