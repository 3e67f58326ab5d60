"""Identifies processes on this machine without records that could be lost: by owner names, and by their environment."""

import contextlib
import os
import secrets
import signal
import socket
from pathlib import Path

import psutil  # type: ignore[import-untyped]

CLOCK_STEP = 120.0
"""Tolerance in seconds when comparing creation times of a process, which shift when the system clock is set.

If a process id is reused within this time, the job's lease still expires.
"""


BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""Holds a random number that Linux draws when it boots, so it differs between machines of one name."""


def machine_name() -> str:
    """This machine's name, with its boot's number where there is one, as machines that share a table may share a name.

    All processes of a machine, or of a container, have the same name for it, until it boots again.
    """
    try:
        return f"{socket.gethostname()}-{BOOT_ID.read_text().strip()}"
    except OSError:
        return socket.gethostname()


def host_name() -> str:
    """This machine's name and, if it has any, its process namespace, so that process ids are comparable."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        return machine_name()
    return f"{machine_name()}/{namespace}"


def new_owner() -> str:
    """A name for this supervisor by which others on this machine can tell whether its process is still alive."""
    process = psutil.Process()
    return f"{host_name()}|{process.pid}|{process.create_time()!r}|{secrets.token_hex(4)}"


def is_dead(owner: str) -> bool:
    """Whether the owner's process is known to have ended. False where this is unknown: on another machine or boot."""
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
        except (psutil.Error, OSError):  # it has ended, is a zombie, or belongs to another user
            continue
    return found


def end_marked(variable: str, value: str, grace: float) -> None:
    """End every process whose environment has this variable and value: SIGTERM, then SIGKILL after ``grace`` seconds.

    Children inherit the variable, so those that have left the process group are found too.
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
