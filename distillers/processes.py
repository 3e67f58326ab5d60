"""What the processes of one job do together; for a job of one process all of it is nothing."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, distributed

Made = TypeVar("Made")
Tick = Callable[[str, int, int], None]
"""Called with what is being prepared, how much is done, and of how much; raises `Interrupted` when the job is to stop."""


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


def together(tick: Tick, device: torch.device) -> Tick:
    """A tick that all processes call equally often: where one is to stop, all do, or the others would wait for it."""

    def told(what: str, done: int, total: int) -> None:
        _tell(tick, (what, done, total), device)

    return told


def main_first(work: Callable[[Tick], Made], tick: Tick, device: torch.device) -> Made:
    """What the main process makes and leaves on the disk, where the others then find it; they wait until it is there.

    They hear of every tick of it, so that one that is asked to stop stops all, and no wait is long enough to be given up.

    Args:
        work: told a tick; what it would make it takes from the disk where it is there (on another machine's it may not be).
        tick: this process's own.
        device: where processes can talk.

    Raises:
        Interrupted: a process was asked to stop, or the main one has failed, whose reason it tells itself.
    """
    rank, processes = place()
    if processes == 1:
        return work(tick)
    if rank == 0:
        return _make_and_tell(work, tick, device)
    while not _tell(tick, ("waiting for the main process", 0, 1), device):
        pass
    return work(tick)


def _make_and_tell(work: Callable[[Tick], Made], tick: Tick, device: torch.device) -> Made:
    try:
        made = work(together(tick, device))
    except Interrupted:  # of which everybody has heard
        raise
    except BaseException:
        _heard(True, True, device)
        raise
    if _heard(False, True, device)[0]:
        raise Interrupted("another process was asked to stop")
    return made


def _tell(tick: Tick, told: tuple[str, int, int], device: torch.device) -> bool:
    """One tick of all processes; whether the main one has ended what the others wait for.

    Raises:
        Interrupted: any of them is to stop.
    """
    stopped = None
    try:
        tick(*told)
    except Interrupted as error:
        stopped = error
    stop, ended = _heard(stopped is not None, False, device)
    if stop:
        raise stopped or Interrupted(f"stopped while {told[0]}")
    return ended


def _heard(stop: bool, ended: bool, device: torch.device) -> tuple[bool, bool]:
    """Whether any process says so, of either; all have to come here."""
    if not _several():
        return stop, ended
    told = summed(torch.tensor([float(stop), float(ended)], device=device))
    return bool(told[0] > 0), bool(told[1] > 0)


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized()
