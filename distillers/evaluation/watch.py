"""Runs a command in a separate process, and reports its exit status, duration and peak memory.

    python -m distillers.evaluation.watch REPORT.json COMMAND ...

The kernel's ``ru_maxrss`` of a process starts at its parent's memory at the time of its start (seen on Linux 6), so a
command started directly would never seem smaller than the calling process. This module is therefore run in between: it
imports only the standard library, and waits for the command.
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic

_UNIT = 1 if sys.platform == "darwin" else 1024
"""Unit of ``ru_maxrss`` in bytes."""


@dataclass(frozen=True)
class Watched:
    """How a command ended, and what it used."""

    status: int
    """Exit status; the negative signal number if a signal ended it."""
    seconds: float
    processor_seconds: float
    """Processor time of all its threads."""
    peak_bytes: int
    """Peak resident memory of the process."""


def watched(
    command: list[str], report: Path, log: Path, *, environment: dict[str, str], keep: int | None = None
) -> Watched:
    """Runs a command to its end. If this call is interrupted, it sends the command SIGTERM and waits for it.

    Args:
        command: program and arguments.
        report: file for the figures; overwritten.
        log: file that the command's output is appended to.
        environment: of the command.
        keep: a file descriptor that it inherits, such as a lock's.
    """
    report.unlink(missing_ok=True)
    watcher = [sys.executable, "-m", "distillers.evaluation.watch", str(report.absolute()), *command]
    descriptors = () if keep is None else (keep,)
    with (
        log.open("ab") as output,
        # A session of its own, so that Ctrl-C reaches only us, and we ask the command to end properly.
        subprocess.Popen(
            watcher,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            pass_fds=descriptors,
        ) as process,
    ):
        try:
            process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            raise
    if not report.is_file():
        raise ChildProcessError(
            f"the process that watched {command[:4]} was killed (status {process.returncode}); see {log}"
        )
    return Watched(**json.loads(report.read_text()))


def main(arguments: list[str]) -> int:
    """Runs the command and writes the report; returns the command's exit status in the shell's convention."""
    report, *command = arguments
    signal.signal(signal.SIGTERM, lambda *_: None)  # meant for the command, which gets the group's signals as well
    begun = monotonic()
    process = subprocess.Popen(command, close_fds=False)  # passes on inherited descriptors
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    found = Watched(
        process.returncode,
        round(monotonic() - begun, 3),
        round(usage.ru_utime + usage.ru_stime, 3),
        usage.ru_maxrss * _UNIT,
    )
    path = Path(report)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(asdict(found)))
    temporary.replace(path)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
