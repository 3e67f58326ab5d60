"""What the processes of one job do together; for a job of one process all of it is nothing."""

from torch import Tensor, distributed


def place() -> tuple[int, int]:
    """This process's number, and how many there are."""
    return (distributed.get_rank(), distributed.get_world_size()) if _several() else (0, 1)


def summed(tensor: Tensor) -> Tensor:
    """The tensor's sum over all processes; changed in place."""
    if _several():
        distributed.all_reduce(tensor)
    return tensor


def wait() -> None:
    """Until all processes have come here."""
    if _several():
        distributed.barrier()


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized()
