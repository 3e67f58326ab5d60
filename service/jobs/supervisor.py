"""The supervisor: an asyncio task that claims jobs from the table and follows each attempt to its end.

It holds a lease on every job that it runs, and renews it with each heartbeat. A supervisor that finds a lease expired,
or its owner dead on the same machine, takes the job over, ends what is left of its processes and queues it again; the
job then continues from its checkpoint. A supervisor that cannot renew its lease ends its own attempt first, so that two
attempts at one job never write at the same time. If it could not record how an attempt ended, that job's lease expires
like any other.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from service.jobs.base import Job, JobError, JobSettings, JobsUnavailable, find_devices
from service.jobs.events import Account, EventReader
from service.jobs.executor import Attempt, Executor, tail
from service.jobs.folders import ROOM, check_folder
from service.jobs.processes import is_dead, machine_name, new_owner
from service.jobs.retention import clear_ended
from service.jobs.table import JobTable

log = logging.getLogger(__name__)
CLEAR_SECONDS = 3_600.0
"""Seconds from one search for jobs that ended long ago to the next."""
STOPPED = 143
"""Exit status of a job that has saved and ended after SIGTERM."""


class Supervisor:
    """Runs one job at a time on each of its devices.

    Args:
        table: the job table.
        executor: launches attempts.
        settings: devices, lease, heartbeat and grace period.
    """

    def __init__(self, table: JobTable, executor: Executor, settings: JobSettings) -> None:
        self._table = table
        self._executor = executor
        self._settings = settings
        self._owner = new_owner()
        self._devices = find_devices(settings.devices)
        self._tasks: list[asyncio.Task[None]] = []
        self._followed: set[str] = set()
        """Jobs whose attempts run here: a lease that is merely renewed late is no reason to end them."""
        self._stopping = asyncio.Event()
        self._news = asyncio.Event()
        self._complaint = ""
        """The last problem of the table that was logged, since it is polled every second."""

    def start(self) -> None:
        """Start working, in the running event loop."""
        self._stopping.clear()
        self._tasks = [asyncio.create_task(self._work(device), name=f"jobs on {device}") for device in self._devices]
        self._regularly(self.reclaim, self._settings.poll_seconds, "lost jobs")
        if self._settings.keep_days is not None:
            self._regularly(self._clear, CLEAR_SECONDS, "old jobs")

    async def stop(self) -> None:
        """Ask running attempts to save and exit, queue their jobs again, and return when that is done."""
        self._stopping.set()
        self._news.set()
        ended = await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        for error in ended:  # only after the attempts on all devices have ended
            if isinstance(error, BaseException):
                raise error

    def wake(self) -> None:
        """Look at the table now, since a job was queued or cancelled."""
        self._news.set()

    async def _pause(self) -> None:
        """Wait for news, for at most one polling interval."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), self._settings.poll_seconds)
        if not self._stopping.is_set():
            self._news.clear()

    def _complain(self, error: JobsUnavailable) -> None:
        if str(error) != self._complaint:
            self._complaint = str(error)
            log.error("%s. Trying again until it can be used.", error)

    async def _work(self, device: str) -> None:
        """Claim and run jobs on one device until told to stop; an unusable database or folder is waited out."""
        place = f"{machine_name()}/{device}"
        while not self._stopping.is_set():
            try:
                job = await asyncio.to_thread(self._claim, place)
                self._complaint = ""
                if job is not None:
                    await self._run(job, device)
                    continue
            except JobsUnavailable as error:
                self._complain(error)
            except Exception:  # whatever it is, this device must go on; the job's lease expires
                log.exception("The job table cannot be used, or a job cannot be followed; trying again.")
            await self._pause()

    def _claim(self, place: str) -> Job | None:
        """The next job for a device, if there is one.

        Raises:
            JobsUnavailable: the table, or the folder of the jobs, cannot be used. On a full disk each job of the queue
                would start and fail in its turn, for a fault that is the machine's and not its own.
        """
        if not self._table.waiting():
            return None
        check_folder(self._settings.folder, ROOM)
        return self._table.claim(self._owner, place, self._settings.lease_seconds)

    def _regularly(self, look: Callable[[], Awaitable[None]], seconds: float, what: str) -> None:
        """Look for such jobs now and then every so many seconds, until told to stop."""

        async def repeat() -> None:
            while not self._stopping.is_set():
                try:
                    await look()
                except JobsUnavailable as error:
                    self._complain(error)
                except Exception:  # as above
                    log.exception("Looking for %s failed; trying again.", what)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), seconds)

        self._tasks.append(asyncio.create_task(repeat(), name=what))

    async def _clear(self) -> None:
        days = self._settings.keep_days
        assert days is not None, "asked for only then"
        await asyncio.to_thread(clear_ended, self._table, self._settings.folder, days, self._stopping.is_set)

    async def reclaim(self) -> None:
        """Take over running jobs whose lease has expired or whose owner is dead: requeue them, or record their end."""
        for job in await asyncio.to_thread(self._table.running):
            if job.owner is None or job.lease_until is None or job.id in self._followed:
                continue
            if job.lease_until < time.time() or (job.owner != self._owner and is_dead(job.owner)):
                await self._rescue(job)

    async def _rescue(self, lost: Job) -> None:
        grace = self._settings.grace_seconds
        lease = self._settings.lease_seconds + grace
        job = await asyncio.to_thread(self._table.take_over, lost, self._owner, lease)
        if job is None:  # another supervisor was faster, or the owner is alive after all
            return
        log.warning("Job %s is orphaned: its supervisor %s stopped renewing its lease.", job.id, lost.owner)
        await self._executor.end_orphans(job.id, grace)
        account = await asyncio.to_thread(self._ended_well, job)
        if account is not None:  # the job outlived its supervisor
            result, progress = _result_of(job, account), account.progress
            await asyncio.to_thread(lambda: self._table.finish(job, "succeeded", result=result, progress=progress))
        elif job.cancel_requested:
            await asyncio.to_thread(self._table.finish, job, "cancelled")
        elif job.progress is not None and job.progress.checkpoint_attempt == job.attempt:
            # It got further since the last loss: a long job may be lost any number of times, as where machines come and go.
            await asyncio.to_thread(self._table.requeue, job, 1)
        elif job.losses > self._settings.max_losses:
            message = (
                f"The job's supervisor died {job.losses} times without a new checkpoint in between: if the machines are "
                "well, lower train.checkpoint_every; resume the job to try again."
            )
            stderr = await asyncio.to_thread(self._last_words, lost)
            error = JobError(message=message, code="job_lost", stderr=stderr)
            await asyncio.to_thread(lambda: self._table.finish(job, "failed", error=error))
        else:
            await asyncio.to_thread(self._table.requeue, job)
        self.wake()

    def _ended_well(self, job: Job) -> Account | None:
        """What the job has reported about itself, if its last event is that it has finished."""
        events = [item.event for item in EventReader(self.folder(job)).new()]
        if not events or events[-1]["kind"] != "finished":
            return None
        account = Account()
        for event in events:
            account.add(event)
        return account

    def _last_words(self, job: Job) -> str:
        return tail(self.folder(job) / f"attempt-{job.attempt}.stderr")

    def folder(self, job: Job) -> Path:
        """The job's folder, with its spec, events, checkpoints and samples."""
        return self._settings.folder / job.id

    async def _run(self, job: Job, device: str) -> None:
        """Run one attempt, from its launch to recording how it ended."""
        if job.unreadable is not None:
            message = (
                f"The job's spec was written by another version of Fewstep, and this one cannot read it ({job.unreadable}): "
                "resume the job under that version, or submit it again."
            )
            unreadable = JobError(message=message, code="spec_unreadable")
            await asyncio.to_thread(lambda: self._table.finish(job, "failed", error=unreadable))
            return
        log.info("Job %s (student %s) starts attempt %d on %s.", job.id, job.spec.student, job.attempt, device)
        reader = EventReader(self.folder(job))
        await asyncio.to_thread(lambda: list(reader.new()))  # skip what earlier attempts wrote
        try:
            attempt = await self._executor.launch(job, self.folder(job), device)
        except (OSError, ValueError) as error:
            problem = JobError(message=f"The job could not be started: {error}", code="launch_failed")
            await asyncio.to_thread(lambda: self._table.finish(job, "failed", error=problem))
            return
        account = Account(attempt=job.attempt, progress=job.progress)
        self._followed.add(job.id)
        try:
            job, status = await self._follow(job, attempt, reader, account)
        except BaseException:
            await attempt.stop(0)
            raise
        finally:
            self._followed.discard(job.id)
        await self._settle(job, attempt, status, account)

    async def _follow(
        self, job: Job, attempt: Attempt, reader: EventReader, account: Account
    ) -> tuple[Job, int | None]:
        """Renew the lease until the attempt ends or has to end, and record its events in the account.

        Returns:
            The job, and the attempt's exit status; None if the job is no longer ours.
        """
        waiter = asyncio.create_task(attempt.wait())
        renewed = time.monotonic()
        try:
            while True:
                ended = waiter.done()
                await asyncio.to_thread(_read, reader, account)
                try:
                    current = await asyncio.to_thread(
                        self._table.heartbeat, job, self._settings.lease_seconds, account.progress
                    )
                    renewed = time.monotonic()
                except JobsUnavailable as error:
                    log.error("The lease on job %s could not be renewed: %s", job.id, error)
                    lasts = self._settings.lease_seconds - (time.monotonic() - renewed)
                    if lasts <= self._settings.lease_seconds / 3:
                        log.warning("Job %s is ended before others may take it over: its lease runs out.", job.id)
                        await attempt.stop(max(0.0, 0.6 * lasts))  # enough for a checkpoint that is quick to write
                        return job, None
                    current = job
                if current is None:
                    log.warning(
                        "Attempt %d of job %s no longer belongs to this worker: ending it.", job.attempt, job.id
                    )
                    await attempt.stop(0)
                    return job, None
                job = current
                if ended:
                    return job, waiter.result()
                if job.cancel_requested or self._stopping.is_set():
                    return await self._end(job, attempt, reader, account)
                await self._await_news(waiter)
        finally:
            waiter.cancel()

    async def _await_news(self, waiter: "asyncio.Task[int]") -> None:
        pause = asyncio.create_task(self._pause())
        await asyncio.wait({waiter, pause}, return_when=asyncio.FIRST_COMPLETED)
        pause.cancel()

    async def _end(self, job: Job, attempt: Attempt, reader: EventReader, account: Account) -> tuple[Job, int | None]:
        """Stop the attempt with a grace period, under a lease that lasts as long."""
        lease = self._settings.lease_seconds + self._settings.grace_seconds
        try:
            current = await asyncio.to_thread(self._table.heartbeat, job, lease, None)
        # The current lease lasts for a while, so a checkpoint is worth trying.
        except JobsUnavailable as error:
            log.error("The lease on job %s could not be renewed: %s", job.id, error)
            current = job
        status = await attempt.stop(self._settings.grace_seconds if current else 0)
        await asyncio.to_thread(_read, reader, account)
        return job, status if current else None

    async def _settle(self, job: Job, attempt: Attempt, status: int | None, account: Account) -> None:
        """Record how the attempt ended."""
        if status is None:
            return
        if status == 0:
            result, progress = _result_of(job, account), account.progress
            await asyncio.to_thread(lambda: self._table.finish(job, "succeeded", result=result, progress=progress))
        elif job.cancel_requested:
            await asyncio.to_thread(self._table.finish, job, "cancelled")
        elif self._stopping.is_set():
            await asyncio.to_thread(self._table.requeue, job)
        else:
            error = _error(status, account.failed, await asyncio.to_thread(attempt.stderr_tail))
            await asyncio.to_thread(lambda: self._table.finish(job, "failed", error=error))
        log.info("Attempt %d of job %s ended with status %d.", job.attempt, job.id, status)


def _read(reader: EventReader, account: Account) -> None:
    for item in reader.new():
        account.add(item.event)


def _result_of(job: Job, account: Account) -> dict[str, object]:
    finished = account.finished or {"student": job.spec.student}
    return {key: value for key, value in finished.items() if key != "kind"}


def _error(status: int, told: str | None, stderr: str) -> JobError:
    """Why an attempt failed: the reason in its events, or else how its process ended."""
    if told is not None:
        return JobError(message=told, code="job_failed", stderr=stderr)
    if status < 0:
        message = f"The job's process was killed by signal {-status}; resume it to continue from its last checkpoint."
        return JobError(message=message, code="job_killed", stderr=stderr)
    if status == STOPPED:
        message = (
            "The job's process was stopped from outside, by SIGTERM; resume it to continue from its last checkpoint."
        )
        return JobError(message=message, code="job_killed", stderr=stderr)
    last = stderr.splitlines()[-1] if stderr else "it wrote nothing, as on a full disk; check the space, and resume it"
    return JobError(message=f"The job's process ended with status {status}: {last}", code="job_failed", stderr=stderr)


async def work_forever(supervisor: Supervisor, stop: asyncio.Event) -> None:
    """Run the supervisor until ``stop`` is set: everything that a worker process does."""
    log.info("Worker %d is waiting for jobs.", os.getpid())
    supervisor.start()
    await stop.wait()
    await supervisor.stop()
