"""What the tests of jobs share: settings around the fake distiller, and waiting for a job to get somewhere."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from service.jobs.base import Job, JobSettings
from service.jobs.events import read_events
from service.jobs.service import make_supervisor
from service.jobs.supervisor import Supervisor
from service.jobs.table import JobTable
from weights.contracts import DistillJob

FAKE = (sys.executable, str(Path(__file__).with_name("fake_distiller.py")))
ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 30.0


def spec(student: str = "student", **config: Any) -> DistillJob:
    return DistillJob(student=student, method="fake", config=config)


def job_settings(folder: Path, /, **changes: Any) -> JobSettings:
    values: dict[str, Any] = {
        "url": f"sqlite:///{folder / 'jobs.db'}",
        "folder": folder / "jobs",
        "store": folder / "store",
        "command": FAKE,
        "devices": ("cpu",),
        "lease_seconds": 10.0,
        "poll_seconds": 0.05,
        "grace_seconds": 10.0,
    }
    return JobSettings(**values | changes)


def open_table(settings: JobSettings) -> JobTable:
    table = JobTable(settings.url)
    table.create_tables()
    return table


@asynccontextmanager
async def supervised(
    settings: JobSettings, table: JobTable | None = None
) -> AsyncIterator[tuple[JobTable, Supervisor]]:
    table = table or open_table(settings)
    supervisor = make_supervisor(settings, table)
    supervisor.start()
    try:
        yield table, supervisor
    finally:
        await supervisor.stop()


async def until(table: JobTable, job: Job, wanted: Callable[[Job], bool]) -> Job:
    """The job as soon as it is as wanted."""
    deadline = time.monotonic() + PATIENCE
    while not wanted(current := table.get(job.id)):
        assert time.monotonic() < deadline, f"still {current}"
        await asyncio.sleep(0.02)
    return current


def ended(job: Job) -> bool:
    return job.ended


def at_step(step: int) -> Callable[[Job], bool]:
    return lambda job: job.progress is not None and job.progress.step >= step


def events(settings: JobSettings, job: Job) -> list[dict[str, Any]]:
    return [item.event for item in read_events(settings.folder / job.id, 0, 10_000)[0]]


def resumed_from(settings: JobSettings, job: Job) -> list[int]:
    return [event["resumed_from"] for event in events(settings, job) if event["kind"] == "started"]


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 2 * PATIENCE))
