"""A job table that cannot be used: one line says which and what to do about it, to clients, in the log and at the start."""

import asyncio
import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient

from service import server
from service.jobs.base import JobsUnavailable
from service.jobs.service import TableJobs, make_supervisor, prepare
from service.jobs.table import JobTable
from service.settings import Settings
from tests.service.fake_server import make_app
from tests.service.jobs_help import job_settings, open_table, run, spec, supervised
from tests.service.test_cli import fewstep

JOBS = "/v1/distillation/jobs"
LARGE = "x" * 20_000
READ_ONLY, FULL = "PRAGMA query_only=ON", "PRAGMA max_page_count=1"
KINDS = [
    (READ_ONLY, "attempt to write a readonly database", "FEWSTEP_JOBS_DIR"),
    (FULL, "database or disk is full", "free some space on its disk"),
]


@contextmanager
def limited(table: JobTable, pragma: str) -> Iterator[None]:
    """The database says what it would of such a disk."""

    def limit(connection: Any, _record: Any) -> None:
        connection.execute(pragma)

    table._engine.dispose()
    sa.event.listen(table._engine, "connect", limit)
    try:
        yield
    finally:
        sa.event.remove(table._engine, "connect", limit)
        table._engine.dispose()


def plain(message: str) -> bool:
    """One line, without a word of how the table is written."""
    return not any(word in message for word in ("\n", "INSERT", "UPDATE", "SELECT", "sqlalche", "OperationalError"))


@pytest.mark.parametrize(("pragma", "why", "fix"), KINDS)
def test_a_table_that_takes_nothing_says_so(tmp_path: Path, pragma: str, why: str, fix: str) -> None:
    settings = job_settings(tmp_path)
    table = open_table(settings)
    table.add([spec("first")])
    (job,) = table.add([spec("second")])
    calls: list[Callable[[], object]] = [lambda: table.add([spec("third", text=LARGE)])]
    if pragma == READ_ONLY:
        calls += [lambda: table.claim("me", "cpu", 1), lambda: table.cancel(job.id)]
    with limited(table, pragma):
        for call in calls:
            with pytest.raises(JobsUnavailable) as caught:
                call()
            message = str(caught.value)
            assert message.startswith(f"the job table {tmp_path / 'jobs.db'} cannot be used ({why}): ")
            assert fix in message and plain(message)
        assert table.get(job.id) == job, "it can be read"
    table.add([spec("third", text=LARGE)])


@pytest.mark.parametrize(("pragma", "why", "fix"), KINDS)
def test_a_client_is_told_to_come_again(
    tmp_path: Path, pragma: str, why: str, fix: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(store=tmp_path / "store", jobs_dir=tmp_path / "jobs", job_work=False)
    app = make_app(settings)
    body = {"student": "student", "method": "fake", "config": {"text": LARGE}}
    with TestClient(app, raise_server_exceptions=False) as client:
        with limited(app.state.jobs._table, pragma):
            answer = client.post(JOBS, json=body)
            error = answer.json()["error"]
            assert (answer.status_code, error["type"], error["code"]) == (503, "server_error", "job_table_unavailable")
            assert int(answer.headers["retry-after"]) > 0
            assert str(tmp_path / "jobs") in error["message"] and why in error["message"] and fix in error["message"]
            assert plain(error["message"])
            assert client.get(JOBS).json()["data"] == []
        assert client.post(JOBS, json=body).status_code == 200
    assert why in caplog.text
    assert "Traceback" not in caplog.text


def test_a_stream_of_events_ends_without_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app(Settings(store=tmp_path / "store", jobs_dir=tmp_path / "jobs", job_work=False))
    with TestClient(app) as client:
        job = client.post(JOBS, json={"student": "student", "method": "fake"}).json()
        table = app.state.jobs._table
        get, asked = table.get, []

        def twice(job_id: str) -> Any:
            asked.append(job_id)
            if len(asked) > 2:
                raise JobsUnavailable("the job table is away")
            return get(job_id)

        monkeypatch.setattr(table, "get", twice)
        streamed = client.get(f"{JOBS}/{job['id']}/events", params={"stream": True})
        assert (streamed.status_code, "[DONE]" in streamed.text) == (200, False)
    assert "a stream of job events ended early: the job table is away" in caplog.text


def test_the_log_says_once_what_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = job_settings(tmp_path, poll_seconds=0.001)
    asked = []

    def away(*_: Any) -> None:
        asked.append("waiting")
        raise JobsUnavailable("the job table is away")

    async def scenario() -> None:
        table = open_table(settings)
        monkeypatch.setattr(table, "waiting", away)
        async with supervised(settings, table):
            async with asyncio.timeout(30):
                while len(asked) < 5:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)

    run(scenario())
    assert caplog.text.count("the job table is away") == 1
    assert "Traceback" not in caplog.text


def no_folder(folder: Path) -> str:
    """Where nothing can be made: a file stands in the way, whoever asks."""
    (folder / "file").touch()
    return "Not a directory"


def no_database(folder: Path) -> str:
    """A folder that is there, with something else in the database's place."""
    (folder / "file/jobs/jobs.sqlite3").mkdir(parents=True)
    return "unable to open database file"


@pytest.mark.parametrize("spoil", [no_folder, no_database])
@pytest.mark.parametrize("command", ["serve", "worker"])
def test_the_start_fails_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, spoil: Callable[[Path], str]
) -> None:
    monkeypatch.setattr(server, "run", lambda *_, **__: pytest.fail("it started"))
    why, folder = spoil(tmp_path), tmp_path / "file/jobs"
    variables = {"jobs_dir": folder, "store": tmp_path / "store", "backend": "torch", "device": "cpu"}
    output = fewstep(command, status=2, **variables).output
    assert output.strip().splitlines()[-1].startswith(f"error: the job table {folder / 'jobs.sqlite3'} cannot be used")
    assert why in output and "FEWSTEP_JOBS_DIR" in output
    assert "Traceback" not in output


def test_a_folder_that_takes_no_jobs_stops_who_works_on_them(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    settings = job_settings(tmp_path, folder=tmp_path / "file/jobs")
    with pytest.raises(JobsUnavailable, match=rf"FEWSTEP_JOBS_DIR: {settings.folder} cannot be written"):
        TableJobs(settings).open()
    TableJobs(job_settings(tmp_path, folder=tmp_path / "file/jobs", work=False)).open()


def test_jobs_wait_while_their_folder_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would fail one after another. The server still starts, since images need no such folder."""
    settings = job_settings(tmp_path)
    table = open_table(settings)
    supervisor = make_supervisor(settings, table)
    prepare(settings, table, works=True)
    with monkeypatch.context() as patch:
        patch.setattr("service.jobs.folders.tempfile.TemporaryFile", FullFile)
        assert supervisor._claim("here/cpu") is None, "no job, no complaint"
        (job,) = table.add([spec()])
        message = rf"FEWSTEP_JOBS_DIR: {settings.folder} cannot be written \(No space .*\): free some space on its disk"
        with pytest.raises(JobsUnavailable, match=message):
            supervisor._claim("here/cpu")
        assert (table.get(job.id).status, table.get(job.id).attempt) == ("queued", 0)
        prepare(settings, table, works=True)
    claimed = supervisor._claim("here/cpu")
    assert claimed is not None and claimed.id == job.id


class FullFile(io.BytesIO):
    """A file on a full disk, which still takes empty ones."""

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def write(self, content: Any) -> int:
        if content:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return 0
