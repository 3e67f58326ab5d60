"""``/v1/distillation/jobs`` over HTTP, with the fake distiller as a real process."""

import json
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi.testclient import TestClient
from safetensors.torch import save_file

from service.app import create_app
from service.deletion import job_needing
from service.jobs.base import JobEvent, JobSettings
from service.jobs.service import TableJobs
from service.jobs.table import JobTable
from service.routes.jobs import event_object
from service.settings import Settings
from tests.service.answers import UNREADABLE
from tests.service.fake_server import PaintingEngine, make_app
from tests.service.jobs_help import PATIENCE
from weights.contracts import BaseReference, DistillJob, StepSchedule, StudentManifest
from weights.events import Progress
from weights.store import Store

JOBS = "/v1/distillation/jobs"


def config_of(value: bytes) -> bytes:
    """A spec whose ``config.rate`` is this; two levels deep without it."""
    return b'{"student": "s", "method": "fake", "config": {"rate": %s}}' % value


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(store=tmp_path / "store", jobs_dir=tmp_path / "jobs")


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    with TestClient(make_app(settings), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def idle(settings: Settings) -> Iterator[TestClient]:
    """A server that only queues."""
    with TestClient(make_app(settings.model_copy(update={"job_work": False}))) as client:
        yield client


def spec(student: str = "student", **config: Any) -> dict[str, Any]:
    return {"student": student, "method": "fake", "config": config}


def refused(answer: httpx.Response, status: int, param: str | None, code: str) -> str:
    """The message of a refusal in the one error shape."""
    assert answer.status_code == status, answer.text
    (error,) = answer.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, code), error
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    return str(error["message"])


def until(client: TestClient, job_id: str, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    deadline = time.monotonic() + PATIENCE
    while True:
        job: dict[str, Any] = client.get(f"{JOBS}/{job_id}").json()
        if wanted(job):
            return job
        assert time.monotonic() < deadline, job
        time.sleep(0.02)


def ended(job: dict[str, Any]) -> bool:
    return job["status"] in {"succeeded", "failed", "cancelled"}


def test_a_job_from_its_spec_to_a_drawn_picture(client: TestClient) -> None:
    answer = client.post(JOBS, json=spec(steps=3) | {"train": {"batch_size": 8}})
    assert answer.status_code == 200, answer.text
    job = answer.json()
    assert (job["object"], job["status"], job["student"], job["method"]) == (
        "distillation.job", "queued", "student", "fake",
    )  # fmt: skip
    assert job["id"].startswith("distill-")
    assert job["spec"]["train"]["batch_size"] == 8
    assert job["spec"]["base"] == "emoji-base"
    assert {job[name] for name in ("started_at", "finished_at", "error", "result", "progress")} == {None}
    done = until(client, job["id"], ended)
    assert done["status"] == "succeeded"
    assert done["result"]["student"] == "student"
    assert done["progress"]["step"] == 3
    assert done["created_at"] <= done["started_at"] <= done["finished_at"]
    assert "student" in {model["id"] for model in client.get("/v1/models").json()["data"]}
    drawn = client.post("/v1/images/generations", json={"prompt": "red apple", "model": "student", "steps": 1})
    assert drawn.json()["model"] == "student"


@pytest.mark.parametrize(
    ("change", "param", "code", "words"),
    [
        ({"student": None}, "student", "invalid_value", "None"),
        ({"student": "../up"}, "student", "invalid_value", "'../up' is not a valid name"),
        ({"method": 3}, "method", "invalid_value", "got 3"),
        ({"stuff": 1}, "stuff", "unknown_parameter", "stuff"),
        ({"train": {"batch_size": 0}}, "train.batch_size", "invalid_value", "got 0"),
        ({"train": {"batchsize": 1}}, "train.batchsize", "unknown_parameter", "did you mean batch_size? Use one of"),
        ({"lora": {"rank": "big"}}, "lora.rank", "invalid_value", "'big'"),
        ({"method": "nothing"}, "method", "invalid_value", "no method 'nothing'"),
        ({"config": {"steps": 0}}, "config.steps", "invalid_value", "at least 1"),
        ({"student": "emoji-base"}, "student", "name_taken", "'emoji-base' is taken"),
        ({"start": "nobody"}, "start", "invalid_value", "no student 'nobody' is published"),
    ],
)
def test_a_wrong_spec_names_its_field(
    idle: TestClient, change: dict[str, Any], param: str, code: str, words: str
) -> None:
    assert words in refused(idle.post(JOBS, json=spec() | change), 400, param, code)
    assert idle.get(JOBS).json()["data"] == []


def publish(settings: Settings, folder: Path, name: str, job: DistillJob | None = None) -> None:
    folder.mkdir(exist_ok=True)
    save_file({"weight": torch.zeros(1)}, folder / "unet.safetensors")
    manifest = StudentManifest(
        name=name,
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        method="fake",
        family="stable_diffusion",
        base=BaseReference(id="emoji-base", sha256="0" * 64),
        schedules={1: StepSchedule(timesteps=[1.0])},
        job=job,
        code_version="0",
    )
    Store(settings.store).publish(manifest, folder, replace=True)


def test_a_job_may_start_from_a_published_student(idle: TestClient, settings: Settings, tmp_path: Path) -> None:
    publish(settings, tmp_path / "work", "first")
    assert idle.post(JOBS, json=spec("second") | {"start": "first"}).json()["spec"]["start"] == "first"


def test_what_an_open_job_reads_is_not_deleted(idle: TestClient, settings: Settings, tmp_path: Path) -> None:
    """Each start of the job loads it, also after an interruption: the job could not go on from its checkpoint."""
    for name in ("first", "guide"):
        publish(settings, tmp_path / "work", name)
    job = idle.post(JOBS, json=spec("second") | {"start": "first", "guide": {"student": "guide"}}).json()
    for name in ("first", "guide"):
        assert job["id"] in refused(idle.delete(f"/v1/models/{name}"), 409, "model", "model_needed")
    idle.post(f"{JOBS}/{job['id']}/cancel")
    for name in ("first", "guide"):
        assert idle.delete(f"/v1/models/{name}").json()["deleted"]
    assert "publish it again" in refused(idle.post(f"{JOBS}/{job['id']}/resume"), 409, None, "job_conflict")


def test_the_terminal_asks_the_job_table_too(settings: Settings, tmp_path: Path) -> None:
    assert job_needing("first", settings) is None and not settings.jobs_dir.exists()
    table = JobTable(settings.job_settings().url)
    table.create_tables()
    (job,) = table.add([DistillJob(student="second", method="fake", start="first")])
    assert (job_needing("first", settings), job_needing("second", settings)) == (job.id, None)
    table.close()


def test_a_guide_has_to_be_published(idle: TestClient) -> None:
    job = spec("second") | {"guide": {"student": "gone", "scale": 1.4}}
    assert "no student 'gone' is published" in refused(idle.post(JOBS, json=job), 400, "guide.student", "invalid_value")


def test_a_job_resumes_unless_another_took_its_name(idle: TestClient, settings: Settings, tmp_path: Path) -> None:
    job = idle.post(JOBS, json=spec()).json()
    resume = f"{JOBS}/{job['id']}/resume"
    idle.post(f"{JOBS}/{job['id']}/cancel")
    publish(settings, tmp_path / "work", "student")
    assert "the store now has another student" in refused(idle.post(resume), 409, None, "job_conflict")
    publish(settings, tmp_path / "work", "student", DistillJob.model_validate(job["spec"]))
    assert idle.post(resume).json()["status"] == "queued", "it published before it was killed"


def test_a_job_of_several_students_resumes_unless_another_took_a_name(
    idle: TestClient, settings: Settings, tmp_path: Path
) -> None:
    job = idle.post(JOBS, json=spec() | {"partition": {"students": 2}}).json()
    resume = f"{JOBS}/{job['id']}/resume"
    idle.post(f"{JOBS}/{job['id']}/cancel")
    publish(settings, tmp_path / "work", "student-1")
    assert "another student named 'student-1'" in refused(idle.post(resume), 409, None, "job_conflict")
    publish(settings, tmp_path / "work", "student-1", DistillJob.model_validate(job["spec"]).parts[1])
    assert idle.post(resume).json()["status"] == "queued", "its own part's"


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"preparation/encoding captions": 0.25}, "encoding captions: 25%"),
        ({"part-1/preparation/encoding pictures": 1.0}, "part-1: encoding pictures: 100%"),
        ({"student/loss": 0.25}, "Step 3 of 9"),
        ({"student/loss": 0.25, "student/lr": 1.0}, "Step 3 of 9"),
    ],
)
def test_progress_is_told_in_words(metrics: dict[str, float], message: str) -> None:
    event = Progress(at=datetime(2026, 1, 1, tzinfo=UTC), step=3, iterations=9, metrics=metrics)
    assert event_object(JobEvent(number=1, event=event.model_dump(mode="json"))).message == message


def test_a_missing_field_and_all_others_are_named(idle: TestClient) -> None:
    message = refused(idle.post(JOBS, json={"train": {"seed": -1}}), 400, "student", "missing_required_parameter")
    assert all(name in message for name in ("student", "method", "train.seed"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        *UNREADABLE,
        (config_of(b"NaN"), "NaN or an infinite number; send finite numbers"),
        (config_of(b"1e999"), "NaN or an infinite number; send finite numbers"),
        (config_of(b'"\\ud800"'), r"'\ud800' is half of a surrogate pair; send whole characters"),
        (config_of(b"[" * 63 + b"]" * 63), "nested too deeply; use at most 64 levels"),
        (config_of(b"[" * 947 + b"]" * 947), "nested too deeply; use at most 64 levels"),  # the parser itself just can
    ],
)
def test_a_body_that_cannot_be_read(idle: TestClient, content: bytes, says: str) -> None:
    answer = idle.post(JOBS, content=content, headers={"Content-Type": "application/json"})
    assert says in refused(answer, 400, None, "invalid_json")


@pytest.mark.parametrize("body", [b'"x"', b"[]", b"null", b"3"])
def test_a_body_that_is_no_spec(idle: TestClient, body: bytes) -> None:
    answer = idle.post(JOBS, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert "not valid JSON" not in answer.json()["error"]["message"]


def test_a_spec_as_deep_as_is_allowed(idle: TestClient) -> None:
    content = config_of(b"[" * 62 + b"]" * 62)
    assert idle.post(JOBS, content=content, headers={"Content-Type": "application/json"}).status_code == 200


def test_no_body_at_all(idle: TestClient) -> None:
    assert "send JSON" in refused(idle.post(JOBS), 400, None, "missing_required_parameter")


def test_a_check_that_breaks_is_our_fault(idle: TestClient) -> None:
    message = refused(idle.post(JOBS, json=spec() | {"method": "crash"}), 500, None, "check_failed")
    assert "the check crashed" in message


def test_the_real_distillers_check_the_methods_config(settings: Settings) -> None:
    jobs = TableJobs(JobSettings(url=f"sqlite:///{settings.jobs_dir}/j.db", folder=settings.jobs_dir,
                                 store=settings.store, work=False))  # fmt: skip
    with TestClient(create_app(settings, PaintingEngine(settings), jobs)) as client:
        batch = [spec() | {"method": "dmd2", "config": {}}, spec("other") | {"method": "nothing", "config": {}}]
        message = refused(client.post(JOBS, json={"jobs": batch}), 400, "jobs.1.method", "invalid_value")
        assert "'nothing'" in message
        wrong = spec() | {"method": "dmd2", "config": {"no_such_switch": True}}
        refused(client.post(JOBS, json=wrong), 400, "config.no_such_switch", "invalid_value")
        queued = client.post(JOBS, json=batch[0]).json()
        assert len(queued["spec"]["config"]) > 3  # completed with the method's defaults


def test_a_batch_is_accepted_whole(idle: TestClient) -> None:
    answer = idle.post(JOBS, json={"jobs": [spec(f"s{n}") for n in range(4)]}).json()
    assert (answer["object"], [job["student"] for job in answer["data"]]) == ("list", ["s0", "s1", "s2", "s3"])
    assert (answer["first_id"], answer["last_id"]) == (answer["data"][0]["id"], answer["data"][3]["id"])


@pytest.mark.parametrize(
    ("jobs", "param", "code"),
    [
        ([spec("a"), spec("b", steps=0)], "jobs.1.config.steps", "invalid_value"),
        ([spec("a"), spec("b") | {"train": {"seed": "x"}}], "jobs.1.train.seed", "invalid_value"),
        ([spec("a"), spec("b"), spec("a")], "jobs.2.student", "name_taken"),
        ([spec("a"), 7], "jobs.1", "invalid_value"),
        ([], "jobs", "invalid_value"),
        ({}, "jobs", "invalid_value"),
        ([spec()] * 101, "jobs", "invalid_value"),
    ],
)
def test_a_batch_is_refused_whole(idle: TestClient, jobs: Any, param: str, code: str) -> None:
    refused(idle.post(JOBS, json={"jobs": jobs}), 400, param, code)
    assert idle.get(JOBS).json()["data"] == []


def test_fields_beside_a_batch_are_refused(idle: TestClient) -> None:
    refused(idle.post(JOBS, json={"jobs": [spec()], "method": "fake"}), 400, "method", "unknown_parameter")
    assert idle.get(JOBS).json()["data"] == []


def test_two_open_jobs_cannot_make_one_student(idle: TestClient) -> None:
    first = idle.post(JOBS, json=spec()).json()
    refused(idle.post(JOBS, json=spec()), 409, None, "job_conflict")
    assert idle.post(f"{JOBS}/{first['id']}/cancel").json()["status"] == "cancelled"
    assert idle.post(JOBS, json=spec()).status_code == 200
    refused(idle.post(f"{JOBS}/{first['id']}/resume"), 409, None, "job_conflict")


def test_the_list_in_pages(idle: TestClient) -> None:
    assert idle.get(JOBS).json() == {
        "object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False,
    }  # fmt: skip
    ids = [job["id"] for job in idle.post(JOBS, json={"jobs": [spec(f"s{n}") for n in range(5)]}).json()["data"]]
    first = idle.get(JOBS, params={"limit": 3}).json()
    assert ([job["id"] for job in first["data"]], first["has_more"]) == (ids[:1:-1], True)
    rest = idle.get(JOBS, params={"limit": 3, "after": first["last_id"]}).json()
    assert ([job["id"] for job in rest["data"]], rest["has_more"]) == (ids[1::-1], False)


@pytest.mark.parametrize(
    ("query", "param", "code"),
    [
        ({"limit": 0}, "limit", "invalid_value"),
        ({"limit": 101}, "limit", "invalid_value"),
        ({"limit": "x"}, "limit", "invalid_value"),
        ({"after": "distill-nobody"}, "after", "job_not_found"),
        ({"limt": 5}, "limt", "unknown_parameter"),
    ],
)
def test_a_wrong_page(idle: TestClient, query: dict[str, Any], param: str, code: str) -> None:
    refused(idle.get(JOBS, params=query), 400, param, code)


@pytest.mark.parametrize("job_id", ["distill-0123456789abcdef01234567", "nobody", "%00"])
@pytest.mark.parametrize(
    ("method", "path"), [("GET", ""), ("GET", "/events"), ("POST", "/cancel"), ("POST", "/resume")]
)
def test_an_unknown_job(idle: TestClient, job_id: str, method: str, path: str) -> None:
    refused(idle.request(method, f"{JOBS}/{job_id}{path}"), 404, None, "job_not_found")


def test_cancel_resume_and_events(client: TestClient) -> None:
    job_id = client.post(JOBS, json=spec(steps=40, delay=0.05)).json()["id"]
    until(client, job_id, lambda job: (job["progress"] or {"step": 0})["step"] >= 2)
    refused(client.post(f"{JOBS}/{job_id}/resume"), 409, None, "job_conflict")
    asked = client.post(f"{JOBS}/{job_id}/cancel").json()
    assert (asked["status"], asked["cancel_requested"]) == ("running", True)
    cancelled = until(client, job_id, ended)
    assert (cancelled["status"], cancelled["error"]) == ("cancelled", None)
    refused(client.post(f"{JOBS}/{job_id}/cancel"), 409, None, "job_conflict")
    assert client.post(f"{JOBS}/{job_id}/resume").json()["status"] == "queued"
    done = until(client, job_id, ended)
    assert (done["status"], done["attempt"]) == ("succeeded", 2)
    page = client.get(f"{JOBS}/{job_id}/events", params={"limit": 2}).json()
    assert (page["object"], page["has_more"], [event["type"] for event in page["data"]]) == (
        "list", True, ["started", "progress"],
    )  # fmt: skip
    assert page["data"][0]["message"] == "Started: 40 iterations"
    assert page["data"][1]["data"]["metrics"] == {"loss": 1.0}
    rest = client.get(f"{JOBS}/{job_id}/events", params={"limit": 1000, "after": page["data"][-1]["id"]}).json()
    assert not rest["has_more"]
    messages = [event["message"] for event in rest["data"]]
    assert any(message.startswith("Resumed from step ") for message in messages)
    assert messages[-1].startswith("Finished: student 'student'")
    assert [event["data"]["step"] for event in page["data"][1:] + rest["data"] if event["type"] == "progress"] == [
        *range(1, 41)
    ]


def test_a_failed_job_gives_its_last_words(client: TestClient) -> None:
    job_id = client.post(JOBS, json=spec(steps=4, fail_at=2)).json()["id"]
    failed = until(client, job_id, ended)
    assert failed["status"] == "failed"
    assert failed["error"]["code"] == "job_failed"
    assert "the loss is not finite" in failed["error"]["stderr"]


def test_events_as_a_stream(client: TestClient) -> None:
    job_id = client.post(JOBS, json=spec(steps=3, delay=0.05)).json()["id"]
    answer = client.get(f"{JOBS}/{job_id}/events", params={"stream": "true"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    blocks = [dict(line.split(": ", 1) for line in block.splitlines()) for block in answer.text.strip().split("\n\n")]
    assert [block.get("event") for block in blocks] == ["started", *["progress"] * 3, "finished", "job", None]
    assert [block.get("id") for block in blocks[:5]] == [f"evt-{n}" for n in range(1, 6)]
    assert json.loads(blocks[-2]["data"])["status"] == "succeeded"
    assert blocks[-1]["data"] == "[DONE]"
    again = client.get(
        f"{JOBS}/{job_id}/events", params={"stream": "true", "after": "evt-1"}, headers={"Last-Event-ID": "evt-4"}
    )
    assert [line for line in again.text.splitlines() if line.startswith("event")] == ["event: finished", "event: job"]


@pytest.mark.parametrize("after", ["12", "evt-", "evt-x", "evt--1", "evt-²", "evt-" + "9" * 40])
def test_a_wrong_event_id(idle: TestClient, after: str) -> None:
    job_id = idle.post(JOBS, json=spec()).json()["id"]
    refused(idle.get(f"{JOBS}/{job_id}/events", params={"after": after}), 400, "after", "invalid_value")


def test_a_job_that_waits_has_no_events(idle: TestClient) -> None:
    job_id = idle.post(JOBS, json=spec()).json()["id"]
    assert idle.get(f"{JOBS}/{job_id}/events").json() == {"object": "list", "data": [], "has_more": False}


def test_an_alias_is_no_students_name(settings: Settings) -> None:
    """Nor the name of a part: the server would not start again with a student that an alias hides."""
    named = settings.model_copy(update={"aliases": {"gpt-image-1": "emoji-average"}, "job_work": False})
    with TestClient(make_app(named)) as client:
        message = refused(client.post(JOBS, json=spec("gpt-image-1")), 400, "student", "name_taken")
        assert "'gpt-image-1' is taken" in message
        parts = spec("gpt-image") | {"partition": {"students": 2}}
        assert "'gpt-image-1' is taken" in refused(client.post(JOBS, json=parts), 400, "student", "name_taken")
        assert client.get(JOBS).json()["data"] == []


def test_a_job_is_not_resumed_under_what_became_an_alias(settings: Settings) -> None:
    idle = settings.model_copy(update={"job_work": False})
    with TestClient(make_app(idle)) as client:
        job_id = client.post(JOBS, json=spec("other")).json()["id"]
        client.post(f"{JOBS}/{job_id}/cancel")
    with TestClient(make_app(idle.model_copy(update={"aliases": {"other": "emoji-average"}}))) as client:
        message = refused(client.post(f"{JOBS}/{job_id}/resume"), 409, None, "job_conflict")
        assert "the name or alias of another model" in message


def test_a_body_that_is_called_something_else(idle: TestClient) -> None:
    """A browser sends text/plain for any page, without asking."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "application/jsonp"):
        answer = idle.post(JOBS, content=json.dumps(spec()), headers={"Content-Type": kind})
        assert "Content-Type: application/json" in refused(answer, 400, None, "invalid_value"), kind
    assert idle.get(JOBS).json()["data"] == []
    for number, kind in enumerate(("application/json; charset=utf-8", "Application/JSON", "application/any+json")):
        answer = idle.post(JOBS, content=json.dumps(spec(f"s{number}")), headers={"Content-Type": kind})
        assert answer.status_code == 200, kind


def test_a_failed_job_tells_its_own_reason(client: TestClient) -> None:
    why = "base '/nonexistent' is not bundled, is not a folder"
    job_id = client.post(JOBS, json=spec(refuse=why)).json()["id"]
    failed = until(client, job_id, ended)
    assert (failed["status"], failed["error"]["message"]) == ("failed", why)
    assert failed["error"]["code"] == "job_failed"


def test_a_reason_of_an_earlier_attempt_is_not_told_again(client: TestClient, settings: Settings) -> None:
    job_id = client.post(JOBS, json=spec(refuse="the first reason")).json()["id"]
    until(client, job_id, ended)
    (settings.jobs_dir / job_id / "state.json").write_text(
        "not JSON"
    )  # the next attempt ends before it can tell anything
    client.post(f"{JOBS}/{job_id}/resume")
    failed = until(client, job_id, ended)
    assert failed["attempt"] == 2
    assert "JSONDecodeError" in failed["error"]["message"]


def test_a_finished_job_is_at_its_last_step(client: TestClient) -> None:
    """However seldom it reports its progress."""
    job_id = client.post(JOBS, json=spec(steps=3, log_every=10)).json()["id"]
    done = until(client, job_id, ended)
    assert (done["progress"]["step"], done["progress"]["iterations"]) == (3, 3)


def test_a_queue_survives_a_restart(settings: Settings) -> None:
    with TestClient(make_app(settings.model_copy(update={"job_work": False}))) as first:
        job_id = first.post(JOBS, json=spec(steps=2)).json()["id"]
    with TestClient(make_app(settings)) as second:
        assert until(second, job_id, ended)["status"] == "succeeded"
