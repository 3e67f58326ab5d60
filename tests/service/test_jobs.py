"""The job table, the supervisor and the local executor, with real processes and real signals."""

import asyncio
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from service.jobs import validation
from service.jobs.base import JobConflict, JobError, JobNotFound, JobsUnavailable, device_environment, find_devices
from service.jobs.events import Account, EventReader, read_events
from service.jobs.executor import LocalExecutor, tail
from service.jobs.processes import is_dead, machine_name, new_owner
from service.jobs.service import CHECKS_AT_ONCE, TableJobs, make_supervisor
from service.jobs.supervisor import Supervisor, _error
from service.jobs.table import JobTable
from tests.service.jobs_help import (
    FAKE,
    PATIENCE,
    ROOT,
    at_step,
    ended,
    job_settings,
    open_table,
    resumed_from,
    run,
    spec,
    supervised,
    until,
)  # fmt: skip
from weights.contracts import DistillJob
from weights.events import EVENTS


@pytest.fixture
def table(tmp_path: Path) -> JobTable:
    return open_table(job_settings(tmp_path))


# The table


def test_a_batch_is_queued_whole_or_not_at_all(table: JobTable) -> None:
    table.add([spec("taken")])
    with pytest.raises(JobConflict, match="'taken'"):
        table.add([spec("new"), spec("taken")])
    assert [job.spec.student for job in table.page(10)[0]] == ["taken"]


def test_jobs_survive_a_new_connection(tmp_path: Path, table: JobTable) -> None:
    (job,) = table.add([spec(rate=1e-5)])
    table.close()
    assert open_table(job_settings(tmp_path)).get(job.id) == job


def test_claims_are_in_order_and_one_a_device(table: JobTable) -> None:
    first, second = table.add([spec("one"), spec("two")])
    claimed = table.claim("me", "host/cpu", 10)
    assert claimed is not None
    assert (claimed.id, claimed.status, claimed.attempt, claimed.owner) == (first.id, "running", 1, "me")
    assert table.claim("other", "host/cpu", 10) is None
    other = table.claim("other", "host/cuda:0", 10)
    assert other is not None
    assert other.id == second.id
    assert table.claim("me", "host/cuda:1", 10) is None


def test_no_job_is_claimed_twice(tmp_path: Path, table: JobTable) -> None:
    wanted = {job.id for job in table.add([spec(f"s{n}") for n in range(24)])}
    claimed: list[str] = []

    def claim(worker: int) -> None:
        own = open_table(job_settings(tmp_path))
        for number in range(3):
            job = own.claim(f"worker {worker}", f"host/{worker}.{number}", 10)
            assert job is not None
            claimed.append(job.id)
        own.close()

    threads = [threading.Thread(target=claim, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(claimed) == 24
    assert set(claimed) == wanted


def test_an_old_attempt_can_write_nothing(table: JobTable) -> None:
    table.add([spec()])
    old = table.claim("old", "host/cpu", 10)
    assert old is not None
    new = table.take_over(old, "new", 10)
    assert new is not None
    assert (new.attempt, new.losses, new.owner) == (1, 1, "new")
    assert table.heartbeat(old, 10, None) is None
    assert table.finish(old, "succeeded", result={"student": "student"}) is None
    assert table.requeue(old) is None
    assert table.get(old.id).status == "running"
    requeued = table.requeue(new)
    assert requeued is not None
    assert (requeued.status, requeued.owner, requeued.device, requeued.lease_until) == ("queued", None, None, None)
    again = table.claim("next", "host/cpu", 10)
    assert again is not None
    assert again.attempt == 2, "an attempt is a start: taking a job over is none"
    for earlier in (old, new):
        assert table.heartbeat(earlier, 10, None) is None


def test_a_resumed_job_is_fenced_off_from_its_lost_attempt(table: JobTable) -> None:
    """Resuming clears the losses, so they cannot be the fence on their own."""
    table.add([spec()])
    lost = table.claim("lost", "host/cpu", 10)
    assert lost is not None
    taken = table.take_over(lost, "rescuer", 10)
    assert taken is not None
    assert table.finish(taken, "failed", error=JobError(message="lost", code="job_lost")) is not None
    table.resume(lost.id)
    assert table.heartbeat(lost, 10, None) is None
    resumed = table.claim("next", "host/cpu", 10)
    assert resumed is not None
    assert (resumed.attempt, resumed.losses) == (2, lost.losses)
    assert table.heartbeat(lost, 10, None) is None


def test_a_lease_renewed_meanwhile_is_not_taken_over(table: JobTable) -> None:
    table.add([spec()])
    seen = table.claim("owner", "host/cpu", 10)
    assert seen is not None
    assert table.heartbeat(seen, 20, None) is not None
    assert table.take_over(seen, "other", 10) is None


def test_cancel_and_resume_follow_the_state(table: JobTable) -> None:
    (job,) = table.add([spec()])
    assert table.cancel(job.id).status == "cancelled"
    with pytest.raises(JobConflict, match="has ended"):
        table.cancel(job.id)
    resumed = table.resume(job.id)
    assert (resumed.status, resumed.cancel_requested, resumed.finished_at) == ("queued", False, None)
    with pytest.raises(JobConflict, match="is queued"):
        table.resume(job.id)
    running = table.claim("me", "host/cpu", 10)
    assert running is not None
    marked = table.cancel(job.id)
    assert (marked.status, marked.cancel_requested) == ("running", True)


def test_resume_does_not_take_another_jobs_name(table: JobTable) -> None:
    (job,) = table.add([spec("name")])
    table.cancel(job.id)
    table.add([spec("name")])
    with pytest.raises(JobConflict, match="'name'"):
        table.resume(job.id)


@pytest.mark.parametrize("job_id", ["distill-0123456789abcdef01234567", "x", "", "distill-\0", "a" * 10_000])
def test_unknown_ids(table: JobTable, job_id: str) -> None:
    for ask in (table.get, table.cancel, table.resume):
        with pytest.raises(JobNotFound):
            ask(job_id)


def test_pages_are_newest_first_without_gaps(table: JobTable) -> None:
    ids = [job.id for job in table.add([spec(f"s{n}") for n in range(7)])]
    seen: list[str] = []
    after = None
    more = True
    while more:
        page, more = table.page(3, after)
        seen += [job.id for job in page]
        after = seen[-1]
    assert seen == ids[::-1]


def test_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="in-memory"):
        JobTable("sqlite://")
    with pytest.raises(ValueError, match="cannot be used"):
        JobTable("no url")
    with pytest.raises(ValueError, match="pip install psycopg"):
        JobTable("postgresql://host/jobs")
    with pytest.raises(ValueError, match="lease_seconds=1"):
        job_settings(tmp_path, lease_seconds=1.0, poll_seconds=0.5)
    with pytest.raises(ValueError, match="'tpu'"):
        find_devices(["cpu", "tpu"])
    assert find_devices(["cuda:1", "cpu", "cuda:1"]) == ("cuda:1", "cpu")


def test_jobs_get_the_gpus_that_the_server_may_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert device_environment("cuda:2") == {"CUDA_VISIBLE_DEVICES": "2"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-8932f937")
    assert find_devices(["auto"]) == ("cuda:0", "cuda:1")
    assert device_environment("cuda:0") == {"CUDA_VISIBLE_DEVICES": "3"}
    assert device_environment("cuda:1") == {"CUDA_VISIBLE_DEVICES": "GPU-8932f937"}
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES lists 2, numbered from 0"):
        find_devices(["cuda:2"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_devices(["auto"]) == ("cpu",)


# Files


LINES = [
    {"kind": "started", "at": "2026-01-01T00:00:00Z", "step": 0, "iterations": 9, "resumed_from": 0},
    {"kind": "progress", "at": "2026-01-01T00:00:01Z", "step": 3, "iterations": 9, "metrics": {"loss": 0.5}},
    {"kind": "checkpoint", "at": "2026-01-01T00:00:02Z", "step": 3, "path": "checkpoints/3"},
    {"kind": "finished", "at": "2026-01-01T00:00:03Z", "step": 9, "student": "s", "seconds": 3.0},
]


@given(cuts=st.lists(st.integers(0, 600), max_size=8), torn=st.booleans())
@hypothesis_settings(max_examples=40)
def test_events_are_read_once_however_they_were_written(
    cuts: list[int], torn: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("events")
    lines = [json.dumps(line) for line in LINES]
    if torn:  # what a killed job and its resumed attempt leave
        lines[1] = lines[1][:20]
    content = "".join(f"{line}\n" for line in lines).encode()
    edges = sorted({0, len(content), *(cut for cut in cuts if cut < len(content))})
    reader = EventReader(folder)
    seen = list(reader.new())
    for start, end in itertools.pairwise(edges):
        with (folder / "events.jsonl").open("ab") as file:
            file.write(content[start:end])
        seen += reader.new()
    assert [item.number for item in seen] == ([1, 3, 4] if torn else [1, 2, 3, 4])
    assert seen[-1].event["kind"] == "finished"
    assert read_events(folder, 0, 10) == (seen, False)
    assert read_events(folder, 1, 1) == (seen[1:2], True)


def test_a_page_parses_only_its_own_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pages of a long log, and a client that polls with its last event, would otherwise parse all of it each time."""
    line = '{"kind": "progress", "at": "2026-01-01T00:00:00Z", "step": 1, "iterations": 9, "metrics": {}}\n'
    (tmp_path / "events.jsonl").write_text(line * 50)
    parsed = []

    class Counting:
        def validate_json(self, line: bytes) -> Any:
            parsed.append(line)
            return EVENTS.validate_json(line)

    monkeypatch.setattr("service.jobs.events.EVENTS", Counting())
    page, more = read_events(tmp_path, 40, 5)
    assert ([event.number for event in page], more) == ([41, 42, 43, 44, 45], True)
    assert len(parsed) == 6, "the page's and the next, which tells that there are more"


def test_tail_gives_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "stderr"
    assert tail(path) == ""
    path.write_bytes(b"first line\nsecond \xff line\nthird\n")
    assert tail(path) == "first line\nsecond \N{REPLACEMENT CHARACTER} line\nthird"
    assert tail(path, size=12) == "third"
    assert tail(path, size=4) == "ird"
    assert os.listdir(tmp_path) == ["stderr"]


# The supervisor


def test_a_job_runs_to_its_end(tmp_path: Path) -> None:
    settings = job_settings(tmp_path)

    async def scenario() -> None:
        async with supervised(settings) as (table, supervisor):
            (job,) = table.add([spec(steps=4, report=str(tmp_path / "report"))])
            supervisor.wake()
            done = await until(table, job, ended)
        assert done.status == "succeeded"
        assert done.result is not None
        assert done.result["student"] == "student"
        assert done.result["metrics"] == {"kid": 0.1}
        assert done.progress is not None
        assert (done.progress.step, done.progress.iterations) == (4, 4)
        assert done.error is None
        assert done.started_at is not None
        assert done.finished_at is not None
        assert done.created_at <= done.started_at <= done.finished_at
        assert (done.owner, done.device, done.lease_until, done.attempt) == (None, None, None, 1)
        assert json.loads((settings.folder / job.id / "job.json").read_text())["student"] == "student"
        assert json.loads((tmp_path / "report").read_text())["cuda"] == ""

    run(scenario())


def test_a_failed_job_says_why_and_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    settings = job_settings(tmp_path)

    async def scenario() -> None:
        async with supervised(settings) as (table, supervisor):
            (job,) = table.add([spec(steps=6, fail_at=4)])
            failed = await until(table, job, ended)
            assert failed.status == "failed"
            assert failed.error is not None
            assert failed.error.code == "job_failed"
            assert "the loss is not finite" in failed.error.message
            assert failed.error.stderr == "Traceback: the loss is not finite"
            table.resume(job.id)
            supervisor.wake()
            done = await until(table, job, ended)
        assert (done.status, done.attempt, done.error) == ("succeeded", 2, None)
        assert resumed_from(settings, job) == [0, 3]

    run(scenario())


def test_a_cancelled_job_saves_itself_and_can_be_resumed(tmp_path: Path) -> None:
    settings = job_settings(tmp_path)

    async def scenario() -> None:
        async with supervised(settings) as (table, supervisor):
            (job,) = table.add([spec(steps=40, delay=0.05)])
            await until(table, job, at_step(2))
            table.cancel(job.id)
            supervisor.wake()
            assert (await until(table, job, ended)).status == "cancelled"
            table.resume(job.id)
            done = await until(table, job, ended)
        assert done.status == "succeeded"
        first, second = resumed_from(settings, job)
        assert first == 0
        assert second >= 2

    run(scenario())


def test_a_job_that_does_not_obey_is_killed_with_its_children(tmp_path: Path) -> None:
    settings = job_settings(tmp_path, grace_seconds=0.3)
    report = tmp_path / "report"

    async def scenario() -> None:
        async with supervised(settings) as (table, supervisor):
            (job,) = table.add([spec(steps=10_000, delay=0.05, deaf=True, report=str(report))])
            await until(table, job, at_step(1))
            table.cancel(job.id)
            supervisor.wake()
            assert (await until(table, job, ended)).status == "cancelled"
        assert not any(map(psutil.pid_exists, json.loads(report.read_text())["pids"]))

    run(scenario())


def test_one_job_at_a_time_on_a_device(tmp_path: Path) -> None:
    settings = job_settings(tmp_path, devices=("cuda:0", "cuda:1"))

    async def scenario() -> None:
        most = 0
        async with supervised(settings) as (table, _):
            added = table.add([spec(f"s{n}", steps=3, delay=0.05, report=str(tmp_path / "report")) for n in range(5)])
            while not all(table.get(job.id).ended for job in added):
                running = table.running()
                most = max(most, len(running))
                assert len({job.device for job in running}) == len(running)
                await asyncio.sleep(0.02)
            assert {table.get(job.id).status for job in added} == {"succeeded"}
        assert most == 2
        devices = [json.loads(line)["cuda"] for line in (tmp_path / "report").read_text().splitlines()]
        assert set(devices) == {"0", "1"}

    run(scenario())


def test_a_killed_process_fails_its_job_and_resume_goes_on(tmp_path: Path) -> None:
    settings = job_settings(tmp_path)
    report = tmp_path / "report"

    async def scenario() -> None:
        async with supervised(settings) as (table, supervisor):
            (job,) = table.add([spec(steps=40, delay=0.05, report=str(report))])
            await until(table, job, at_step(3))
            os.kill(json.loads(report.read_text())["pids"][0], signal.SIGKILL)
            failed = await until(table, job, ended)
            assert failed.status == "failed"
            assert failed.error is not None
            assert (failed.error.code, "signal 9" in failed.error.message) == ("job_killed", True)
            table.resume(job.id)
            supervisor.wake()
            assert (await until(table, job, ended)).status == "succeeded"
        assert resumed_from(settings, job)[1] >= 3

    run(scenario())


def test_a_supervisor_that_stops_gives_its_job_back(tmp_path: Path) -> None:
    settings = job_settings(tmp_path)

    async def scenario() -> None:
        async with supervised(settings) as (table, _):
            (job,) = table.add([spec(steps=40, delay=0.05)])
            await until(table, job, at_step(2))
        left = table.get(job.id)
        assert (left.status, left.owner, left.losses) == ("queued", None, 0)
        async with supervised(settings, table):
            assert (await until(table, job, ended)).status == "succeeded"
        assert resumed_from(settings, job)[1] >= 2

    run(scenario())


WORKER = """
import asyncio, sys
from pathlib import Path
from tests.service.jobs_help import job_settings, open_table
from service.jobs.service import make_supervisor
from service.jobs.supervisor import work_forever

async def main():
    settings = job_settings(Path(sys.argv[1]))
    await work_forever(make_supervisor(settings, open_table(settings)), asyncio.Event())

asyncio.run(main())
"""


def test_a_killed_worker_loses_no_job(tmp_path: Path) -> None:
    """kill -9 the worker: its job's processes are found and ended, and the next worker goes on from the checkpoint."""
    settings = job_settings(tmp_path)
    report = tmp_path / "report"

    async def scenario() -> None:
        table = open_table(settings)
        (job,) = table.add([spec(steps=60, delay=0.1, child=True, report=str(report))])
        worker = await asyncio.create_subprocess_exec(sys.executable, "-c", WORKER, str(tmp_path), cwd=ROOT)
        try:
            held = await until(table, job, at_step(3))
        finally:
            worker.kill()
            await worker.wait()
        orphans = json.loads(report.read_text())["pids"]
        assert all(map(psutil.pid_exists, orphans))
        assert held.owner is not None
        assert is_dead(held.owner)
        async with supervised(settings, table):
            again = await until(table, job, lambda j: j.losses == 1 and j.attempt == 2 and at_step(5)(j))
            assert not any(map(_alive, orphans))
            assert again.owner != held.owner
            table.cancel(job.id)
            await until(table, job, ended)
        first, second = resumed_from(settings, job)
        assert (first, second >= 3) == (0, True)

    run(scenario())


def _alive(pid: int) -> bool:
    """Whether the process runs: one that ended and that nobody has waited for does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_an_expired_lease_is_taken_over_from_another_machine(tmp_path: Path) -> None:
    settings = job_settings(tmp_path)

    async def scenario() -> None:
        table = open_table(settings)
        kept, cancelled, lost = table.add([spec("kept"), spec("cancelled"), spec("lost")])
        for number in range(3):
            assert table.claim(f"elsewhere|1|1.0|{number}", f"elsewhere/{number}", -1.0) is not None
        table.cancel(cancelled.id)
        for _ in range(settings.max_losses):
            current = table.take_over(table.get(lost.id), "elsewhere|1|1.0|x", -1.0)
            assert current is not None
        async with supervised(settings, table):
            assert (await until(table, kept, ended)).status == "succeeded"
            assert (await until(table, cancelled, ended)).status == "cancelled"
            gone = await until(table, lost, ended)
        assert gone.status == "failed"
        assert gone.error is not None
        assert gone.error.code == "job_lost"
        assert not (settings.folder / lost.id).exists()

    run(scenario())


def test_only_losses_without_a_new_checkpoint_count(tmp_path: Path) -> None:
    settings = job_settings(tmp_path, max_losses=2)
    table = open_table(settings)
    supervisor = Supervisor(table, LocalExecutor(FAKE, settings.store), settings)
    (job,) = table.add([spec()])

    async def lost_after(*lines: dict[str, Any]) -> tuple[str, int]:
        held = table.claim("elsewhere|1|1.0|x", "elsewhere/cpu", -1.0)
        assert held is not None
        account = Account(attempt=held.attempt, progress=held.progress)
        for line in lines:
            account.add(EVENTS.validate_python(line).model_dump(mode="json"))
        assert table.heartbeat(held, -1.0, account.progress) is not None
        await supervisor.reclaim()
        assert table.heartbeat(held, 10, None) is None, "the lost attempt is fenced off"
        found = table.get(job.id)
        return found.status, found.losses

    async def scenario() -> None:
        started, progress, checkpoint, _ = LINES
        for _ in range(settings.max_losses + 2):
            assert await lost_after(started, progress, checkpoint, progress) == ("queued", 1)
        assert await lost_after(started, progress) == ("queued", 2)
        assert await lost_after() == ("failed", 3), "what an earlier attempt saved is no progress"
        error = table.get(job.id).error
        assert error is not None and error.code == "job_lost"
        assert "3 times without a new checkpoint in between" in error.message

    run(scenario())


def test_a_job_that_outlived_its_supervisor_has_succeeded(tmp_path: Path) -> None:
    settings = job_settings(tmp_path)

    async def scenario() -> None:
        table = open_table(settings)
        (job,) = table.add([spec()])
        assert table.claim("elsewhere|1|1.0|x", "elsewhere/cpu", -1.0) is not None
        folder = settings.folder / job.id
        folder.mkdir(parents=True)
        (folder / "events.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in LINES))
        async with supervised(settings, table):
            done = await until(table, job, ended)
        assert (done.status, done.result and done.result["seconds"]) == ("succeeded", 3.0)
        assert done.progress is not None
        assert (done.progress.step, done.progress.metrics) == (9, {"loss": 0.5})
        assert not (folder / "job.json").exists()

    run(scenario())


def test_a_live_lease_of_another_machine_is_left_alone(tmp_path: Path) -> None:
    settings = job_settings(tmp_path)

    async def scenario() -> None:
        table = open_table(settings)
        (job,) = table.add([spec()])
        held = table.claim("elsewhere|1|1.0|x", "elsewhere/cpu", 60)
        await Supervisor(table, LocalExecutor(FAKE, settings.store), settings).reclaim()
        assert table.get(job.id) == held

    run(scenario())


def test_no_supervisor_takes_a_job_from_itself(tmp_path: Path) -> None:
    """However late the lease is renewed: the server may have had much else to do."""
    settings = job_settings(tmp_path)

    async def scenario() -> None:
        table = open_table(settings)
        (job,) = table.add([spec()])
        supervisor = Supervisor(table, LocalExecutor(FAKE, settings.store), settings)
        held = table.claim(supervisor._owner, "here/cpu", -1.0)
        supervisor._followed.add(job.id)
        await supervisor.reclaim()
        assert table.get(job.id) == held
        supervisor._followed.clear()
        await supervisor.reclaim()  # now nobody follows it
        assert table.get(job.id).status == "queued"

    run(scenario())


def test_a_supervisor_that_was_fenced_off_ends_its_attempt(tmp_path: Path) -> None:
    settings = job_settings(tmp_path)
    report = tmp_path / "report"

    async def scenario() -> None:
        async with supervised(settings) as (table, _):
            (job,) = table.add([spec(steps=10_000, delay=0.05, report=str(report))])
            await until(table, job, at_step(1))
            taken = None
            while taken is None:  # a heartbeat may come between
                taken = table.take_over(table.get(job.id), "elsewhere|1|1.0|x", 60)
            (pid,) = json.loads(report.read_text())["pids"]
            deadline = time.monotonic() + PATIENCE
            while psutil.pid_exists(pid):
                assert time.monotonic() < deadline
                await asyncio.sleep(0.02)
            assert table.get(job.id).owner == taken.owner

    run(scenario())


def test_a_supervisor_without_its_database_ends_its_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = job_settings(tmp_path, lease_seconds=0.6)
    report = tmp_path / "report"

    def broken(*_: Any) -> None:
        raise JobsUnavailable("the job table is away")

    async def scenario() -> None:
        async with supervised(settings) as (table, _):
            (job,) = table.add([spec(steps=10_000, delay=0.05, report=str(report))])
            await until(table, job, at_step(1))
            (pid,) = json.loads(report.read_text())["pids"]
            with monkeypatch.context() as patch:
                patch.setattr(table, "heartbeat", broken)
                deadline = time.monotonic() + PATIENCE
                while psutil.pid_exists(pid):
                    assert time.monotonic() < deadline
                    await asyncio.sleep(0.02)

    run(scenario())


@pytest.mark.parametrize(
    ("status", "says", "code"),
    [
        (1, "status 1: it wrote nothing, as on a full disk", "job_failed"),
        (143, "stopped from outside, by SIGTERM; resume it", "job_killed"),
        (-9, "killed by signal 9; resume it", "job_killed"),
    ],
)
def test_how_a_silent_job_ended(status: int, says: str, code: str) -> None:
    error = _error(status, None, "")
    assert says in error.message and error.code == code


def test_an_attempt_that_loses_the_database_may_save_while_its_lease_lasts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = job_settings(tmp_path, lease_seconds=30.0)
    table = open_table(settings)
    table.add([spec()])
    job = table.claim("me", "host/cpu", 30)
    assert job is not None
    times = iter([0.0, 19.0, 21.0])
    monkeypatch.setattr("service.jobs.supervisor.time", SimpleNamespace(monotonic=lambda: next(times)))
    monkeypatch.setattr(table, "heartbeat", away)
    graces = []

    class Attempt:
        async def wait(self) -> int:
            await asyncio.sleep(PATIENCE)
            return 0

        async def stop(self, grace: float) -> int:
            graces.append(grace)
            return 143

        def stderr_tail(self) -> str:
            return ""

    async def scenario() -> None:
        supervisor = make_supervisor(settings, table)
        followed = await supervisor._follow(job, Attempt(), EventReader(tmp_path), Account())
        assert followed == (job, None)

    run(scenario())
    assert graces == [pytest.approx(5.4)], "most of what is left of the lease, and no more"


def away(*_: Any, **__: Any) -> Any:
    raise JobsUnavailable("the job table is away")


@pytest.mark.parametrize("lost", ["heartbeat", "finish", "take_over"])
def test_when_its_database_is_back_the_job_and_the_queue_go_on(
    lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job is not left running under the name of a supervisor that has stopped following it."""
    settings = job_settings(tmp_path, lease_seconds=0.6)

    async def scenario() -> None:
        async with supervised(settings) as (table, supervisor):
            first, second = table.add([spec("first", steps=100, delay=0.02), spec("second", steps=1)])
            await until(table, first, at_step(1))
            with monkeypatch.context() as patch:
                patch.setattr(table, "heartbeat" if lost == "take_over" else lost, away)
                if lost == "take_over":  # as if rescuing it had gone wrong half way
                    patch.setattr(supervisor._executor, "end_orphans", away)
                deadline = time.monotonic() + PATIENCE
                while (table.get(first.id).lease_until or 0) > time.time() or table.get(first.id).ended:
                    assert time.monotonic() < deadline
                    await asyncio.sleep(0.02)
            assert (await until(table, first, ended)).status == "succeeded"
            assert (await until(table, second, ended)).status == "succeeded"

    run(scenario())


def test_whatever_goes_wrong_with_one_job_the_devices_queue_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = job_settings(tmp_path, lease_seconds=0.6)
    launched = LocalExecutor.launch

    async def launch(self: LocalExecutor, job: Any, folder: Path, device: str) -> Any:
        if job.spec.student == "first" and job.attempt == 1:
            raise RuntimeError("what nobody thought of")
        return await launched(self, job, folder, device)

    monkeypatch.setattr(LocalExecutor, "launch", launch)

    async def scenario() -> None:
        async with supervised(settings) as (table, _):
            jobs = table.add([spec("first", steps=1), spec("second", steps=1)])
            for job in jobs:
                assert (await until(table, job, ended)).status == "succeeded"
            assert table.get(jobs[0].id).losses == 1

    run(scenario())
    assert "what nobody thought of" in caplog.text


def test_a_cancelled_job_saves_also_while_the_database_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    settings = job_settings(tmp_path)

    async def scenario() -> None:
        async with supervised(settings) as (table, _):
            (job,) = table.add([spec(steps=10_000, delay=0.05)])
            await until(table, job, at_step(1))
            right = table.heartbeat

            def heartbeat(held: Any, lease: float, progress: Any) -> Any:
                return away() if lease > settings.lease_seconds else right(held, lease, progress)

            monkeypatch.setattr(table, "heartbeat", heartbeat)
            table.cancel(job.id)
            assert (await until(table, job, ended)).status == "cancelled"

    run(scenario())
    assert "ended with status 143" in caplog.text, "it was asked to end, not killed"


def test_a_command_that_does_not_start_fails_the_job(tmp_path: Path) -> None:
    settings = job_settings(tmp_path, command=(str(tmp_path / "missing"),))

    async def scenario() -> None:
        async with supervised(settings) as (table, _):
            (job,) = table.add([spec()])
            failed = await until(table, job, ended)
        assert failed.error is not None
        assert (failed.status, failed.error.code) == ("failed", "launch_failed")

    run(scenario())


def test_owners_tell_the_living_from_the_dead() -> None:
    owner = new_owner()
    host, pid, _, token = owner.split("|")
    assert not is_dead(owner)
    assert is_dead(f"{host}|{pid}|1.0|{token}")  # the number was given to another process
    stepped = psutil.Process().create_time() + 3.0  # as it is told once the clock was set
    assert not is_dead(f"{host}|{pid}|{stepped!r}|{token}")
    assert not is_dead(f"elsewhere|{pid}|1.0|{token}")


def test_machines_of_one_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their process ids have nothing to do with each other, and each has a device of its own."""
    monkeypatch.setattr("service.jobs.processes.BOOT_ID", tmp_path / "boot_id")
    without = machine_name()  # as where there is no such file
    (tmp_path / "boot_id").write_text("first\n")
    host, pid, _, token = new_owner().split("|")
    here = machine_name()
    assert is_dead(f"{host}|{pid}|1.0|{token}")
    (tmp_path / "boot_id").write_text("second\n")
    assert not is_dead(f"{host}|{pid}|1.0|{token}")
    assert len({without, here, machine_name()}) == 3
    assert here.startswith(without)


def test_a_batch_leaves_room_for_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch is one check, however many specs it has, and whoever asks next is next."""
    order: list[str] = []
    at_once = most = 0

    async def check(_command: Any, jobs: Sequence[DistillJob], *_: Any) -> list[DistillJob]:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0.01)
        at_once -= 1
        order.append(jobs[0].student)
        return list(jobs)

    monkeypatch.setattr(validation, "ask", check)

    async def scenario() -> None:
        jobs = TableJobs(job_settings(tmp_path, work=False))
        await jobs.start()

        async def create(*names: str) -> None:
            await jobs.create([spec(name).model_dump(mode="json") for name in names], batch=len(names) > 1)

        async with asyncio.TaskGroup() as tasks:
            for client in "abc":
                tasks.create_task(create(*(f"{client}{number}" for number in range(20))))
            await asyncio.sleep(0)
            tasks.create_task(create("single"))
        await jobs.stop()
        assert order == ["a0", "b0", "c0", "single"]
        assert most == CHECKS_AT_ONCE

    run(scenario())


def test_a_server_without_a_worker_only_queues(tmp_path: Path) -> None:
    settings = job_settings(tmp_path, work=False)

    async def scenario() -> None:
        jobs = TableJobs(settings)
        await jobs.start()
        (job,) = await jobs.create([spec().model_dump(mode="json")])
        await asyncio.sleep(5 * settings.poll_seconds)
        assert (await jobs.get(job.id)).status == "queued"
        async with supervised(replace(settings, work=True)) as (table, _):
            assert (await until(table, job, ended)).status == "succeeded"
        assert (await jobs.get(job.id)).status == "succeeded"
        await jobs.stop()

    run(scenario())
