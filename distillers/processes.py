"""Coordination of a distributed job's processes; with a single process, everything here is a no-op."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, distributed

Made = TypeVar("Made")
Tick = Callable[[str, int, int], None]
"""Called with the name, done and total count of what is being prepared; raises `Interrupted` if the job is to stop."""


class Interrupted(Exception):
    """The job was asked to stop, and has saved its state."""


def place() -> tuple[int, int]:
    """This process's rank, and the number of processes."""
    return (distributed.get_rank(), distributed.get_world_size()) if _several() else (0, 1)


def summed(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place."""
    if _several():
        distributed.all_reduce(tensor)
    return tensor


def agreed(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process; all of them must call this."""
    return bool(summed(torch.tensor(float(flag), device=device)).item() > 0) if _several() else flag


def wait() -> None:
    """Waits until all processes have called this."""
    if _several():
        distributed.barrier()


def together(tick: Tick, device: torch.device) -> Tick:
    """A tick that all processes call equally often. If one is to stop, all do; the others would wait for it forever."""

    def told(what: str, done: int, total: int) -> None:
        _tell(tick, (what, done, total), device)

    return told


def main_first(work: Callable[[Tick], Made], tick: Tick, device: torch.device) -> Made:
    """Runs work in the main process first, which leaves its result on disk, then in the others, which find it there.

    The others take part in every tick of the main process. So a stop request to any of them stops all, and no wait is
    long enough to time out.

    Args:
        work: given a tick; must use results that are on disk (on other machines they may not be).
        tick: this process's own.
        device: used for communication between processes.

    Raises:
        Interrupted: a process was asked to stop, or the main process has failed and reports the reason itself.
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
    except Interrupted:  # all processes know already
        raise
    except BaseException:
        _heard(True, True, device)
        raise
    if _heard(False, True, device)[0]:
        raise Interrupted("another process was asked to stop")
    return made


def _tell(tick: Tick, told: tuple[str, int, int], device: torch.device) -> bool:
    """One tick in all processes; returns whether the main process has finished the work that the others wait for.

    Raises:
        Interrupted: any process is to stop.
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
    """Whether each of the two flags is set in any process; all of them must call this."""
    if not _several():
        return stop, ended
    told = summed(torch.tensor([float(stop), float(ended)], device=device))
    return bool(told[0] > 0), bool(told[1] > 0)


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized()
