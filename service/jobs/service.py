"""The job service that the app uses: the job table and, in a server that also runs jobs, the supervisor."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from service.jobs.base import (
    RESUMABLE,
    InvalidSpec,
    Job,
    JobConflict,
    JobEvent,
    JobSettings,
    students_read,
)
from service.jobs.events import EventReader, read_events
from service.jobs.executor import LocalExecutor
from service.jobs.folders import check_folder
from service.jobs.supervisor import Supervisor
from service.jobs.table import JobTable
from service.jobs.validation import check_specs
from weights.bundled import STUDENTS, bundled_bases
from weights.contracts import DistillJob
from weights.store import Store

CHECKS_AT_ONCE = 2
"""Most processes that check specs, over all requests; a request has one."""
QUIET_SECONDS = 15.0
"""Seconds without an event after which a follower is notified that the job still exists."""


def make_supervisor(settings: JobSettings, table: JobTable) -> Supervisor:
    """Create the supervisor that runs jobs as processes on this machine."""
    return Supervisor(table, LocalExecutor(settings.command, settings.store), settings)


def prepare(settings: JobSettings, table: JobTable, works: bool) -> None:
    """Create the table if it does not exist and, for a process that runs jobs, their folder.

    Raises:
        JobsUnavailable: the table or the folder cannot be used.
    """
    if works:
        check_folder(settings.folder)  # even if it is full: images do not need it, and jobs wait
    table.create_tables()


class TableJobs:
    """`service.jobs.base.Jobs` with a SQL table.

    Args:
        settings: the job service's settings.
    """

    def __init__(self, settings: JobSettings) -> None:
        self._settings = settings
        self._gate = asyncio.Semaphore(CHECKS_AT_ONCE)
        self._table = JobTable(settings.url)
        self._supervisor = make_supervisor(settings, self._table) if settings.work else None

    def open(self) -> None:
        """Create the table and the folder if they do not exist.

        `start` does so too, but calling this first lets a command report a problem without a traceback.

        Raises:
            JobsUnavailable: see `prepare`.
        """
        prepare(self._settings, self._table, works=self._supervisor is not None)

    async def start(self) -> None:
        """Create the table if it does not exist, and start the supervisor."""
        await asyncio.to_thread(self.open)
        if self._supervisor:
            self._supervisor.start()

    async def stop(self) -> None:
        """Stop the supervisor and close the table."""
        if self._supervisor:
            await self._supervisor.stop()
        self._table.close()

    async def create(self, specs: Sequence[Any], *, batch: bool = False) -> list[Job]:
        """See `Jobs.create`."""
        command, patience = self._settings.command, self._settings.check_seconds
        checked = await check_specs(command, specs, self._gate, batch=batch, patience=patience)
        await asyncio.to_thread(self._check_names, checked, batch)
        added = await asyncio.to_thread(self._table.add, checked)
        self._wake()
        return added

    def _check_names(self, specs: Sequence[DistillJob], batch: bool) -> None:
        """Refuse a student name that is taken, or a start that does not exist, before the job's turn comes."""
        students = Store(self._settings.store, STUDENTS).names()
        seen = taken_names(self._settings, students)
        for index, spec in enumerate(specs):
            prefix = f"jobs.{index}." if batch else ""
            taken = [name for name in spec.publishes if name in seen]
            if taken:
                param = f"{prefix}student"
                raise InvalidSpec(f"{param}: the name {taken[0]!r} is taken; choose another", param, "name_taken")
            guide = None if spec.guide is None else spec.guide.student
            for field, name in (("start", spec.start), ("guide.student", guide)):
                if name is not None and name not in students:
                    known, param = ", ".join(students) or "none yet", prefix + field
                    raise InvalidSpec(f"{param}: no student {name!r} is published; available: {known}", param)
            seen.update(spec.publishes)

    async def list(self, limit: int, after: str | None = None) -> tuple[list[Job], bool]:
        """See `Jobs.list`."""
        return await asyncio.to_thread(self._table.page, limit, after)

    async def get(self, job_id: str) -> Job:
        """See `Jobs.get`."""
        return await asyncio.to_thread(self._table.get, job_id)

    async def events(self, job_id: str, after: int, limit: int) -> tuple[Sequence[JobEvent], bool]:
        """See `Jobs.events`."""
        job = await self.get(job_id)
        return await asyncio.to_thread(read_events, self._settings.folder / job.id, after, limit)

    async def follow(self, job_id: str, after: int) -> AsyncIterator[JobEvent | Job | None]:
        """See `Jobs.follow`."""
        job = await self.get(job_id)
        reader = EventReader(self._settings.folder / job.id, after)
        quiet = 0.0
        while True:
            # Read the job before its events, since an ended job writes no more.
            job = await self.get(job_id)
            events = await asyncio.to_thread(lambda: list(reader.new()))
            for item in events:
                yield item
            if job.ended:
                yield job
                return
            quiet = 0.0 if events else quiet + self._settings.poll_seconds
            if quiet >= QUIET_SECONDS:
                quiet = 0.0
                yield None
            await asyncio.sleep(self._settings.poll_seconds)

    async def needing(self, student: str) -> Job | None:
        """See `Jobs.needing`."""
        return await asyncio.to_thread(self._table.needing, student)

    async def cancel(self, job_id: str) -> Job:
        """See `Jobs.cancel`."""
        job = await asyncio.to_thread(self._table.cancel, job_id)
        self._wake()
        return job

    async def resume(self, job_id: str) -> Job:
        """See `Jobs.resume`."""
        await asyncio.to_thread(self._check_resume, job_id)
        job = await asyncio.to_thread(self._table.resume, job_id)
        self._wake()
        return job

    def _check_resume(self, job_id: str) -> None:
        """Refuse if the student's name has been taken meanwhile.

        The job itself may have taken it: it was killed after publishing, before it could report success.
        """
        job = self._table.get(job_id)
        if job.unreadable is not None and job.status in RESUMABLE:
            raise JobConflict(
                f"the spec of job {job_id!r} was written by another version of Fewstep, and this one cannot read it "
                f"({job.unreadable}): resume the job under that version, or submit it again"
            )
        spec = job.spec
        store = Store(self._settings.store, STUDENTS)
        students = store.names()
        gone = [name for name in students_read(spec) if name not in students]
        if gone and job.status in RESUMABLE:
            raise JobConflict(
                f"student {gone[0]!r}, which job {job_id!r} reads, is no longer in the store: publish it again to resume "
                "the job"
            )
        taken = taken_names(self._settings, students)
        for each in (spec, *spec.parts):
            name = each.student
            if name not in taken or store.made_by(each) is not None:
                continue
            if name not in students:
                raise JobConflict(
                    f"{name!r} is now the name or alias of another model; submit the job under another name"
                )
            raise JobConflict(
                f"the store now has another student named {name!r}; delete it to resume job {job_id!r}: "
                f"`fewstep delete {name}`, or DELETE /v1/models/{name}"
            )

    def _wake(self) -> None:
        if self._supervisor:
            self._supervisor.wake()


def taken_names(settings: JobSettings, students: Sequence[str]) -> set[str]:
    """Every name that a new student must not take: bases, aliases, and ``students``, those of the store and bundled."""
    return {*settings.reserved, *bundled_bases(), *students}
