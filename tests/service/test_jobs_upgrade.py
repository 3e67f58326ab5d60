"""A job table that another version of Fewstep wrote: what cannot be read says so, and everything else goes on."""

import json
import sqlite3
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from service.jobs.base import JobsUnavailable
from service.settings import Settings
from tests.service.fake_server import make_app
from tests.service.jobs_help import ended, job_settings, open_table, run, spec, supervised, until
from tests.service.test_jobs_api import JOBS, refused


def spoil(database: Path, student: str) -> None:
    """The job's row gets what only another version writes."""
    with sqlite3.connect(database) as connection:
        (raw,) = connection.execute("SELECT spec FROM jobs WHERE student = ?", [student]).fetchone()
        changed = json.loads(raw)
        changed["train"]["patience"] = 3
        progress = {"step": 1, "iterations": 5, "metrics": {}, "seconds_left": None, "mood": "good"}
        values = [json.dumps(changed), json.dumps(progress), student]
        connection.execute("UPDATE jobs SET spec = ?, progress = ? WHERE student = ?", values)
    connection.close()


def test_a_spec_of_another_version_fails_its_job_and_the_queue_goes_on(tmp_path: Path) -> None:
    settings = job_settings(tmp_path)
    table = open_table(settings)
    first, second = table.add([spec("first"), spec("second", steps=1)])
    spoil(tmp_path / "jobs.db", "first")

    async def scenario() -> None:
        async with supervised(settings, table):
            failed = await until(table, first, ended)
            assert failed.status == "failed" and failed.error is not None
            assert failed.error.code == "spec_unreadable"
            assert "train.patience" in failed.error.message and "submit it again" in failed.error.message
            assert (await until(table, second, ended)).status == "succeeded"

    run(scenario())


def test_clients_see_and_cancel_a_job_whose_spec_cannot_be_read(tmp_path: Path) -> None:
    settings = Settings(store=tmp_path / "store", jobs_dir=tmp_path / "jobs", job_work=False)
    with TestClient(make_app(settings)) as client:
        queued = client.post(JOBS, json={"student": "student", "method": "fake", "config": {}}).json()
        spoil(tmp_path / "jobs" / "jobs.db", "student")
        (listed,) = client.get(JOBS).json()["data"]
        assert (listed["id"], listed["student"], listed["method"]) == (queued["id"], "student", "fake")
        assert listed["spec"] is None and listed["progress"]["step"] == 1
        assert client.post(f"{JOBS}/{queued['id']}/cancel").json()["status"] == "cancelled"
        message = refused(client.post(f"{JOBS}/{queued['id']}/resume"), 409, None, "job_conflict")
        assert "train.patience" in message and "submit it again" in message


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("ALTER TABLE jobs DROP COLUMN cancel_requested", "lacks the columns cancel_requested"),
        ("ALTER TABLE jobs ADD COLUMN priority INTEGER NOT NULL DEFAULT 0", None),
        (
            "DROP TABLE jobs; CREATE TABLE jobs ({}, priority INTEGER NOT NULL)",
            "needs the columns priority",
        ),
    ],
)
def test_a_table_with_other_columns_stops_the_start(tmp_path: Path, change: str, says: str | None) -> None:
    settings = job_settings(tmp_path)
    open_table(settings).close()
    with sqlite3.connect(tmp_path / "jobs.db") as connection:
        columns = ", ".join(row[1] for row in connection.execute("PRAGMA table_info(jobs)"))
        connection.executescript(change.format(columns))
    connection.close()
    if says is None:
        open_table(settings).close()
        return
    with pytest.raises(JobsUnavailable) as caught:
        open_table(settings)
    assert says in str(caught.value) and "FEWSTEP_JOBS_DIR" in str(caught.value)


@pytest.mark.parametrize("content", [b"no database" * 1000, b"SQLite format 3\0" + b"\xff" * 8000])
def test_a_damaged_table_says_what_is_kept(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "jobs.db").write_bytes(content)
    with pytest.raises(JobsUnavailable, match=r"restore it from a backup, or move it .* keeps their folders"):
        open_table(job_settings(tmp_path))
