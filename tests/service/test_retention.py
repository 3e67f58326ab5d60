"""Folders of jobs that ended long ago keep what tells of the job; all others stay as they are."""

import asyncio
import os
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from service.jobs.base import Job
from service.jobs.retention import DAY, clear_ended
from service.jobs.table import JobTable
from service.settings import Settings
from tests.service.jobs_help import PATIENCE, job_settings, open_table, run, spec, supervised

TOLD = {"job.json", "events.jsonl", "attempt-1.stderr"}
LEFT = {"checkpoints/iteration-00000010.safetensors", "cache/images.npy", "part-0/events.jsonl", "partition.json"}


class Jobs:
    """A table whose clock the test sets, and folders as jobs leave them."""

    def __init__(self, path: Path) -> None:
        self.settings = job_settings(path)
        open_table(self.settings).close()
        self.now = time.time()
        self.table = JobTable(self.settings.url, clock=lambda: self.now)

    def add(self, name: str) -> Job:
        (job,) = self.table.add([spec(name)])
        for each in TOLD | LEFT:
            file = self.folder(job) / each
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        return job

    def end(self, name: str, status: str) -> Job:
        job = self.add(name)
        if status == "cancelled":
            return self.table.cancel(job.id)
        held = self.table.claim("me", f"here/{name}", 10)
        assert held is not None and held.id == job.id
        ended = self.table.finish(held, "succeeded" if status == "succeeded" else "failed")
        assert ended is not None
        return ended

    def folder(self, job: Job) -> Path:
        return self.settings.folder / job.id

    def files(self, job: Job) -> set[str]:
        folder = self.folder(job)
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


@pytest.fixture
def jobs(tmp_path: Path) -> Jobs:
    return Jobs(tmp_path)


def test_only_what_ended_long_ago_goes(jobs: Jobs) -> None:
    old = [jobs.end(status, status) for status in ("succeeded", "failed", "cancelled")]
    resumed = jobs.end("resumed", "failed")
    jobs.table.resume(resumed.id)
    running = jobs.table.claim("me", "here/cpu", 10)
    assert running is not None and running.id == resumed.id
    queued = jobs.add("queued")
    jobs.now += 7.5 * DAY
    recent = jobs.table.cancel(jobs.add("recent").id)
    clear_ended(jobs.table, jobs.settings.folder, 8)
    assert all(jobs.files(job) == TOLD | LEFT for job in old), "not yet"
    clear_ended(jobs.table, jobs.settings.folder, 7)
    assert [jobs.files(job) for job in old] == [TOLD] * 3
    assert not any((jobs.folder(job) / "checkpoints").exists() for job in old)
    for job in (running, queued, recent):
        assert jobs.files(job) == TOLD | LEFT


def test_a_job_resumed_meanwhile_keeps_its_checkpoints(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was old when the table was asked, and is not when its turn comes."""
    job = jobs.end("student", "failed")
    jobs.now += 2 * DAY
    found = jobs.table.ended_for(DAY)
    jobs.table.resume(job.id)
    monkeypatch.setattr(jobs.table, "ended_for", lambda _: found)
    clear_ended(jobs.table, jobs.settings.folder, 1)
    assert found == [job.id]
    assert jobs.files(job) == TOLD | LEFT


def test_nobody_resumes_a_job_while_its_folder_is_cleared(jobs: Jobs) -> None:
    job = jobs.end("student", "failed")
    jobs.now += 2 * DAY
    resume = "UPDATE jobs SET status = 'queued'"
    with closing(sqlite3.connect(jobs.settings.url.removeprefix("sqlite:///"), timeout=0)) as other:
        with jobs.table.holding_ended(job.id, DAY) as ended:
            assert ended
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                other.execute(resume)
        assert other.execute(resume).rowcount == 1
        other.rollback()


def test_what_an_interrupted_deletion_left_goes_the_next_time(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    job = jobs.end("student", "succeeded")
    jobs.now += 2 * DAY

    def refuse(_: Path) -> None:
        raise PermissionError("not yours")

    with monkeypatch.context() as patch:
        patch.setattr("service.jobs.retention.shutil.rmtree", refuse)
        clear_ended(jobs.table, jobs.settings.folder, 1)
    assert not (jobs.folder(job) / "checkpoints").exists(), "no attempt would take it for whole"
    assert jobs.files(job) > TOLD
    clear_ended(jobs.table, jobs.settings.folder, 1)
    assert jobs.files(job) == TOLD
    assert jobs.table.get(job.id) == job, "the row stays as it was"


def test_folders_that_the_table_does_not_know_stay(jobs: Jobs) -> None:
    other = jobs.settings.folder / "distill-0123456789abcdef01234567" / "checkpoints"
    other.mkdir(parents=True)
    jobs.end("student", "succeeded")
    jobs.now += 2 * DAY
    clear_ended(jobs.table, jobs.settings.folder, 1)
    assert other.exists()


@pytest.mark.parametrize("days", [None, 0.0])
def test_a_worker_clears_as_its_settings_say(jobs: Jobs, tmp_path: Path, days: float | None) -> None:
    job = jobs.end("student", "succeeded")
    settings = job_settings(tmp_path, keep_days=Settings(job_keep_days=days).job_settings().keep_days)

    async def scenario() -> None:
        async with supervised(settings) as (_, supervisor):
            assert ("old jobs" in [task.get_name() for task in supervisor._tasks]) == (days is not None)
            deadline = time.monotonic() + PATIENCE
            while days is not None and set(os.listdir(jobs.folder(job))) != TOLD:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.01)

    run(scenario())
    assert jobs.files(job) == (TOLD | LEFT if days is None else TOLD)
