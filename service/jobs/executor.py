"""Where an attempt at a job runs. The local executor runs it as a process group on this machine."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from service.jobs.base import Job, device_environment
from service.jobs.processes import end_marked
from weights.files import write_atomically

SPEC_FILE = "job.json"
STDERR_TAIL_BYTES = 4096
JOB_VARIABLE = "DISTILLATION_JOB_ID"


class Attempt(Protocol):
    """An attempt that has been launched."""

    async def wait(self) -> int:
        """Its exit status; the negative signal number if a signal ended it."""

    async def stop(self, grace: float) -> int:
        """Ask it to save and exit, kill it after ``grace`` seconds, and return its exit status."""

    def stderr_tail(self) -> str:
        """The last lines it wrote to standard error."""


class Executor(Protocol):
    """Launches attempts, and ends those that a dead supervisor left running."""

    async def launch(self, job: Job, folder: Path, device: str) -> Attempt:
        """Start the job's attempt in ``folder``, continuing from a checkpoint there. Raises OSError."""

    async def end_orphans(self, job_id: str, grace: float) -> None:
        """Return when no process of this job that this executor can reach is running any more."""


def tail(path: Path, size: int = STDERR_TAIL_BYTES) -> str:
    """The last whole lines of a text file, at most ``size`` bytes; '' if the file does not exist."""
    try:
        with path.open("rb") as file:
            length = file.seek(0, os.SEEK_END)
            file.seek(max(0, length - size))
            content = file.read()
    except FileNotFoundError:
        return ""
    if length > size:
        content = content.partition(b"\n")[2] or content
    return content.decode(errors="replace").strip()


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(
        ProcessLookupError, PermissionError
    ):  # PermissionError: on macOS, if only zombies are left
        os.killpg(group, number)


@dataclass(frozen=True)
class LocalAttempt:
    """A process group on this machine whose leader is the job's process."""

    process: asyncio.subprocess.Process
    stderr: Path

    async def wait(self) -> int:
        """The leader's exit status; children that it leaves behind are killed then."""
        status = await self.process.wait()
        _signal_group(self.process.pid, signal.SIGKILL)
        return status

    async def stop(self, grace: float) -> int:
        """Send SIGTERM to the leader alone (it saves, and its children belong to it), then SIGKILL to the group."""
        if self.process.returncode is None:
            self.process.terminate()
            try:
                await asyncio.wait_for(asyncio.shield(self.process.wait()), grace)
            except TimeoutError:
                _signal_group(self.process.pid, signal.SIGKILL)
        return await self.wait()

    def stderr_tail(self) -> str:
        """The last lines of the attempt's standard error."""
        return tail(self.stderr)


class LocalExecutor:
    """Runs ``COMMAND job.json --folder FOLDER --store ROOT --resume`` as a process group.

    Args:
        command: the program that runs one job.
        store: root of the model store, where the job publishes its student.
    """

    def __init__(self, command: Sequence[str], store: Path) -> None:
        self._command = tuple(command)
        self._store = store

    async def launch(self, job: Job, folder: Path, device: str) -> LocalAttempt:
        """Start the attempt. Raises OSError."""
        environment = os.environ | device_environment(device) | {JOB_VARIABLE: job.id, "PYTHONUNBUFFERED": "1"}
        stderr = folder / f"attempt-{job.attempt}.stderr"
        spec = folder / SPEC_FILE

        def prepare() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(spec, job.spec.model_dump_json(indent=2))

        await asyncio.to_thread(prepare)
        with stderr.open("wb") as errors:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                *(str(spec), "--folder", str(folder), "--store", str(self._store), "--resume"),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,  # the same events as in the events file
                stderr=errors,
                env=environment,
                start_new_session=True,
            )
        return LocalAttempt(process, stderr)

    async def end_orphans(self, job_id: str, grace: float) -> None:
        """Find the job's processes by a variable in their environment, which outlives any record of process ids."""
        await asyncio.to_thread(end_marked, JOB_VARIABLE, job_id, grace)
