"""Runs a command in a process of its own and tells how it ended, how long it took and how much memory it held.

    python -m distillers.evaluation.watch REPORT.json COMMAND ...

The kernel's figure for a process, ``ru_maxrss``, starts at what its parent held when it was started (seen with Linux 6), so
that a command started from here would never seem smaller than we are. This module therefore stands between the two: it
imports the standard library alone, and waits for the command.
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
"""Bytes that ``ru_maxrss`` counts in."""


@dataclass(frozen=True)
class Watched:
    """What became of a command."""

    status: int
    """Exit status; minus the signal's number where one ended it."""
    seconds: float
    processor_seconds: float
    """Of all its threads."""
    peak_bytes: int
    """Largest resident memory of the process."""


def watched(
    command: list[str], report: Path, log: Path, *, environment: dict[str, str], keep: int | None = None
) -> Watched:
    """Runs a command to its end. Where this call is interrupted, the command is told to end (SIGTERM) and waited for.

    Args:
        command: program and arguments.
        report: file for the figures; written anew.
        log: file that the command's output is added to.
        environment: of the command.
        keep: a file descriptor that it inherits, such as a lock's.
    """
    report.unlink(missing_ok=True)
    watcher = [sys.executable, "-m", "distillers.evaluation.watch", str(report.absolute()), *command]
    descriptors = () if keep is None else (keep,)
    with (
        log.open("ab") as output,
        # A session of its own: Ctrl-C reaches us alone, and we ask the command to end in its own time.
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
        raise ChildProcessError(f"what watched {command[:4]} was killed (status {process.returncode}); see {log}")
    return Watched(**json.loads(report.read_text()))


def main(arguments: list[str]) -> int:
    """Runs the command and writes the report; returns the command's exit status, as a shell would tell it."""
    report, *command = arguments
    signal.signal(signal.SIGTERM, lambda *_: None)  # it is the command's, which gets the group's signals too
    begun = monotonic()
    process = subprocess.Popen(command, close_fds=False)  # hands on what we were told to keep
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
