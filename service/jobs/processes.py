"""Processes of this machine, told apart without records that could be lost: by owner names and by their environment."""

import contextlib
import os
import secrets
import signal
import socket

import psutil  # type: ignore[import-untyped]

CLOCK_STEP = 120.0
"""Seconds by which a process's time of birth may differ and it still be the same: it is told by the clock, which is set at
times. Where the process's number was given away within them, its lease still expires.
"""


def host_name() -> str:
    """This machine's name, with its process namespace where there are such, so that process ids can be compared."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        return socket.gethostname()
    return f"{socket.gethostname()}/{namespace}"


def new_owner() -> str:
    """A name for this supervisor that tells others on this machine whether its process is still alive."""
    process = psutil.Process()
    return f"{host_name()}|{process.pid}|{process.create_time()!r}|{secrets.token_hex(4)}"


def is_dead(owner: str) -> bool:
    """Whether the owner's process is known to have ended: False for one on another machine, where nobody can tell."""
    host, pid, created, _ = owner.split("|")
    if host != host_name():
        return False
    try:
        return abs(psutil.Process(int(pid)).create_time() - float(created)) > CLOCK_STEP
    except psutil.NoSuchProcess:
        return True


def _marked(variable: str, value: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(variable) == value:
                found.append(process)
        except (psutil.Error, OSError):  # gone, a zombie, or another user's
            continue
    return found


def end_marked(variable: str, value: str, grace: float) -> None:
    """End every process whose environment has this variable so: SIGTERM, and SIGKILL after ``grace`` seconds.

    Children inherit the variable, so that those which left the process group are found too.
    """
    processes = _marked(variable, value)
    number = signal.SIGTERM
    while processes:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        psutil.wait_procs(processes, timeout=grace if number is signal.SIGTERM else 5)
        number = signal.SIGKILL
        processes = _marked(variable, value)
