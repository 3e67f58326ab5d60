"""API keys: what the file holds, who gets in and where, and that a change of the file needs no restart."""

import json
import logging
import os
import re
import stat
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import openai
import pytest
from fastapi.testclient import TestClient
from httpx2 import Response
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from service.access import needed_scope
from service.app import create_app
from service.cli import app as cli
from service.keys import FORM, SCOPES, KeyFileError, KeyRing, Scope, create_key, read_keys, revoke_key
from service.settings import Settings
from tests.service.conftest import FakeEngine
from tests.service.live import serving
from tests.service.test_health import FakeJobs

DRAW = "/v1/images/generations"
JOBS = "/v1/distillation/jobs"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "new" / "keys.json"


class ListingJobs(FakeJobs):
    async def list(self, limit: int, after: str | None) -> tuple[list[Any], bool]:
        return [], False


@pytest.fixture
def keyed(settings: Settings, engine: FakeEngine, file: Path) -> Callable[..., TestClient]:
    """A client whose key has these scopes."""

    def make(*scopes: Scope, **fields: Any) -> TestClient:
        key, _ = create_key(file, f"name-{'-'.join(scopes)}", scopes, **fields)
        app = create_app(settings.model_copy(update={"keys_file": file}), engine, ListingJobs([]))  # type: ignore[arg-type]
        return TestClient(app, headers={"Authorization": f"Bearer {key}"})

    return make


def code_of(response: Response, status: int) -> str:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return str(error["code"])


def test_the_file_holds_no_key(file: Path) -> None:
    key, record = create_key(file, "ann", ["generate", "generate"])
    assert FORM.fullmatch(key)
    assert key.split("_")[2] not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert read_keys(file) == (record,)
    assert (record.scopes, record.last4) == (("generate",), key[-4:])
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_key_is_known_and_others_are_not(file: Path) -> None:
    (one, first), (two, second) = create_key(file, "ann", ["generate"]), create_key(file, "bob", ["jobs"])
    ring = KeyRing(file)
    assert (ring.authenticate(one), ring.authenticate(two), len(ring)) == (first, second, 2)
    mixed = f"fs_{first.id}_{two.split('_')[2]}"
    unknown = f"fs_{'0' * 12}_{one.split('_')[2]}"
    for wrong in (mixed, unknown, one[:-1], one + "0", one.upper(), f" {one}", f"{one}\n", "", "fs_", first.sha256):
        assert ring.authenticate(wrong) is None, wrong


@given(st.text(max_size=100) | st.from_regex(FORM, fullmatch=True))
def test_no_text_is_a_key(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    file = tmp_path_factory.getbasetemp() / "any-text.json"
    if not file.exists():
        create_key(file, "ann", ["admin"])
    assert KeyRing(file).authenticate(text) is None


def test_a_key_expires(file: Path) -> None:
    now = datetime.now(UTC)
    key, _ = create_key(file, "ann", ["generate"], expires_at=now + timedelta(hours=1))
    clock = [now]
    ring = KeyRing(file, clock=lambda: clock[0])
    assert ring.authenticate(key) is not None
    clock[0] += timedelta(hours=1)
    assert ring.authenticate(key) is None


def test_changes_are_taken_up(file: Path) -> None:
    one, _ = create_key(file, "ann", ["generate"])
    ring = KeyRing(file)
    two, record = create_key(file, "bob", ["jobs"])
    assert ring.authenticate(two) == record
    revoke_key(file, record.id)
    assert ring.authenticate(two) is None
    assert ring.authenticate(one) is not None
    revoke_key(file, "ann")
    assert ring.authenticate(one) is None


def test_a_broken_file_keeps_the_keys_and_a_lost_one_has_none(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    key, record = create_key(file, "ann", ["generate"])
    ring = KeyRing(file)
    whole = file.read_text()
    file.write_text(whole[:-5])
    with caplog.at_level(logging.ERROR):
        assert ring.authenticate(key) == record
    assert "is not a valid keys file" in caplog.text
    assert record.sha256 not in caplog.text
    file.write_text(whole)
    assert ring.authenticate(key) == record
    file.unlink()
    assert ring.authenticate(key) is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda content: content["keys"][0].update(scopes=["everything"]), "keys.0.scopes.0"),
        (lambda content: content["keys"][0].update(scopes=[]), "keys.0.scopes"),
        (lambda content: content["keys"][0].update(sha256="abc"), "keys.0.sha256"),
        (lambda content: content["keys"][0].update(secret="x"), "keys.0.secret"),
        (lambda content: content.update(version=2), "version"),
        (lambda content: content["keys"].append(content["keys"][0]), "appears twice"),
    ],
)
def test_a_file_that_is_wrong_is_refused(file: Path, change: Callable[[Any], None], says: str) -> None:
    create_key(file, "ann", ["generate"])
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(KeyFileError, match=re.escape(says)):
        KeyRing(file)


def test_a_file_that_others_can_write_is_refused(file: Path) -> None:
    create_key(file, "ann", ["generate"])
    file.chmod(0o660)
    with pytest.raises(KeyFileError, match="chmod 600"):
        KeyRing(file)
    file.chmod(0o644)  # a hash of 32 random bytes may be read
    assert len(KeyRing(file)) == 1


def test_a_file_that_was_mended_is_read_again(file: Path) -> None:
    key, _ = create_key(file, "ann", ["generate"])
    ring = KeyRing(file)
    content = json.loads(file.read_text())
    content["keys"] = []
    file.write_text(json.dumps(content))
    file.chmod(0o664)
    assert ring.authenticate(key) is not None, "a file that others can write is not believed"
    file.chmod(0o600)
    assert ring.authenticate(key) is None, "what the log asked for was done"


def test_a_disk_that_fails_takes_nobodys_key_away(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, _ = create_key(file, "ann", ["generate"])
    ring = KeyRing(file)

    def failing(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", failing)
        assert ring.authenticate(key) is not None
    file.unlink()
    assert ring.authenticate(key) is None


def test_what_cannot_be_written(file: Path, tmp_path: Path) -> None:
    create_key(file, "ann", ["generate"])
    before = file.read_bytes()
    with pytest.raises(KeyFileError, match="already has a key named 'ann'"):
        create_key(file, "ann", ["jobs"])
    with pytest.raises(KeyFileError, match=r"name: String should match pattern.*'a b'"):
        create_key(file, "a b", ["jobs"])
    with pytest.raises(KeyFileError, match="scopes"):
        create_key(file, "bob", [])
    with pytest.raises(KeyFileError, match=r"no key in .* has the id or name 'bob'; available: ann"):
        revoke_key(file, "bob")
    assert file.read_bytes() == before
    (tmp_path / "a-file").touch()
    with pytest.raises(KeyFileError, match="cannot be written"):
        create_key(tmp_path / "a-file" / "keys.json", "ann", ["jobs"])


def test_a_failed_write_leaves_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_key(file, "ann", ["generate"])
    before = file.read_bytes()

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(KeyFileError, match="No space left"):
        create_key(file, "bob", ["generate"])
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, who gives a file to another user")
def test_the_file_keeps_its_owner(file: Path) -> None:
    """Root makes keys for a server that runs as another user."""
    create_key(file, "ann", ["generate"])
    os.chown(file, 10001, 10002)
    create_key(file, "bob", ["generate"])
    assert (file.stat().st_uid, file.stat().st_gid, stat.S_IMODE(file.stat().st_mode)) == (10001, 10002, 0o600)


def test_keys_made_at_once_are_all_there(file: Path) -> None:
    with ThreadPool(8) as pool:
        pool.map(lambda number: create_key(file, f"key-{number}", ["generate"]), range(24))
    assert {key.name for key in read_keys(file)} == {f"key-{number}" for number in range(24)}


REQUESTS: dict[Scope, list[tuple[str, str]]] = {
    "generate": [("POST", DRAW), ("GET", "/v1/models"), ("GET", "/v1/models/org/base")],
    "jobs": [("GET", JOBS)],
    "admin": [("GET", "/metrics")],
}


@pytest.mark.parametrize("scope", SCOPES)
def test_a_scope_opens_its_routes_alone(keyed: Callable[..., TestClient], scope: Scope) -> None:
    with keyed(scope) as client:
        for needed, requests in REQUESTS.items():
            for method, path in requests:
                response = client.request(method, path, json={"prompt": "x"} if method == "POST" else None)
                if needed == scope:
                    assert response.status_code == 200, (method, path, response.text)
                else:
                    assert code_of(response, 403) == "insufficient_scope"
                    assert f'scope="{needed}"' in response.headers["www-authenticate"]


def test_without_a_key_only_what_is_open(keyed: Callable[..., TestClient], engine: FakeEngine) -> None:
    with keyed("generate") as client:
        url = client.post(DRAW, json={"prompt": "x", "response_format": "url"}).json()["data"][0]["url"]
        del client.headers["Authorization"]
        for path in (url, "/health", "/health/live", "/health/ready", "/docs", "/openapi.json"):
            assert client.get(path).status_code == 200, path
        for requests in REQUESTS.values():
            for method, path in requests:
                response = client.request(method, path)
                assert code_of(response, 401) == "invalid_api_key"
                assert response.headers["www-authenticate"].startswith("Bearer")
                assert "x-request-id" in response.headers
        assert code_of(client.get("/nothing/here"), 401) == "invalid_api_key"
    assert len(engine.asked) == 1


def test_every_route_is_behind_a_scope(settings: Settings, engine: FakeEngine) -> None:
    """The whole list: a new route needs `admin` until somebody writes its scope down."""
    app = create_app(settings, engine, FakeJobs([]))  # type: ignore[arg-type]
    scopes = {path: needed_scope(path) for path in app.openapi()["paths"]}
    open_paths = {path for path, scope in scopes.items() if scope is None}
    assert open_paths == {"/health", "/health/live", "/health/ready", "/v1/images/files/{picture_id}"}
    assert {path for path, scope in scopes.items() if scope == "admin"} == {"/metrics"}
    assert all(path.startswith(JOBS) for path, scope in scopes.items() if scope == "jobs")
    tricky = ("/v1/images/filesystem", "/healthy", "//health", "/HEALTH", "/v1/health", "", "/")
    assert all(needed_scope(path) is not None for path in tricky)


def test_no_open_path_leads_elsewhere(keyed: Callable[..., TestClient], engine: FakeEngine) -> None:
    with keyed("generate") as client:
        del client.headers["Authorization"]
        for path in ("/v1/images/files/..%2fgenerations", "/health/..%2fmetrics", "/docs/..%2f..%2fmetrics"):
            assert client.post(path, json={"prompt": "x"}).status_code in (404, 405)
            assert client.get(path).status_code == 404
    assert engine.asked == []


@pytest.mark.parametrize("form", ["{}", "Basic {}", "Bearer", "Bearer {}x", "Bearer  ", "Bearer {} {}"])
def test_a_header_that_is_no_key(keyed: Callable[..., TestClient], form: str) -> None:
    with keyed("generate") as client:
        key = client.headers["authorization"].removeprefix("Bearer ")
        response = client.post(DRAW, json={"prompt": "x"}, headers={"Authorization": form.format(key, key)})
        assert code_of(response, 401) == "invalid_api_key"
        assert key not in response.text
        assert 'error="invalid_token"' in response.headers["www-authenticate"]
        assert client.get("/v1/models", headers={"Authorization": f"bearer  {key}"}).status_code == 200


def test_a_refusal_reads_no_body(keyed: Callable[..., TestClient]) -> None:
    with keyed("jobs") as client:
        assert code_of(client.post(DRAW, content=b"x" * 100_000), 403) == "insufficient_scope"


def test_the_engine_is_told_whose_request_it_is(
    keyed: Callable[..., TestClient], client: TestClient, engine: FakeEngine, file: Path
) -> None:
    client.post(DRAW, json={"prompt": "x"})
    with keyed("generate") as known:
        known.post(DRAW, json={"prompt": "x"})
    assert [asked.client for asked in engine.asked] == ["anonymous", read_keys(file)[0].id]


def test_a_revoked_key_is_refused_by_a_running_server(keyed: Callable[..., TestClient], file: Path) -> None:
    with keyed("generate") as client:
        assert client.get("/v1/models").status_code == 200
        revoke_key(file, "name-generate")
        assert code_of(client.get("/v1/models"), 401) == "invalid_api_key"


def test_the_official_client(settings: Settings, engine: FakeEngine, file: Path) -> None:
    good, _ = create_key(file, "ann", ["generate"], requests_per_minute=2)
    other, _ = create_key(file, "bob", ["jobs"])
    with serving(create_app(settings.model_copy(update={"keys_file": file}), engine)) as url:

        def ask(key: str) -> Any:
            with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
                return client.images.with_raw_response.generate(prompt="red apple")

        with pytest.raises(openai.AuthenticationError) as caught:
            ask("sk-wrong")
        assert caught.value.code == "invalid_api_key"
        with pytest.raises(openai.PermissionDeniedError):
            ask(other)
        assert [ask(good).headers["x-ratelimit-remaining-requests"] for _ in range(2)] == ["1", "0"]
        with pytest.raises(openai.RateLimitError) as limited:
            ask(good)
        assert limited.value.code == "rate_limit_exceeded"
        assert 1 <= int(limited.value.response.headers["retry-after"]) <= 30
        assert limited.value.request_id == limited.value.response.headers["x-request-id"]


def run(*arguments: str, status: int = 0, file: Path | None = None) -> str:
    result = CliRunner().invoke(cli, ["keys", *arguments], env={"FEWSTEP_KEYS_FILE": file and str(file)})
    assert result.exit_code == status, result.output
    return result.stdout if status == 0 else result.output


def test_keys_from_the_terminal(file: Path) -> None:
    made = run("create", "ann", "--scope", "jobs", "--scope", "generate", "--days", "2", file=file)
    key = made.strip()
    assert FORM.fullmatch(key)
    run("create", "bob", "--scope", "admin", "--requests-per-minute", "60", "--days", "0", file=file)
    first, second = read_keys(file)
    assert KeyRing(file).authenticate(key) == first
    assert first.scopes == ("generate", "jobs")
    assert first.expires_at is not None
    assert timedelta(days=1.9) < first.expires_at - datetime.now(UTC) < timedelta(days=2)
    listed = run("list", file=file)
    assert re.search(rf"{first.id} +ann +\.\.\.{key[-4:]} +generate, jobs ", listed)
    assert re.search(rf"{second.id} +bob .*, expired +60", listed)
    assert key not in listed
    assert first.sha256 not in listed
    assert run("revoke", "ann", file=file) == f"{first.id} (ann) is revoked\n"
    assert read_keys(file) == (second,)
    assert "has the id or name 'ann'" in run("revoke", "ann", status=1, file=file)
    assert "--scope all: use one of generate, jobs, admin" in run("create", "x", "--scope", "all", status=2, file=file)
    assert "FEWSTEP_KEYS_FILE is not set" in run("list", status=2)
    assert "`fewstep keys create` creates it" in run("list", status=1, file=file.with_name("none.json"))


def test_commands_send_the_key(settings: Settings, engine: FakeEngine, file: Path) -> None:
    key, _ = create_key(file, "ann", ["generate"])
    with serving(create_app(settings.model_copy(update={"keys_file": file}), engine)) as url:
        right = CliRunner().invoke(cli, ["models", "--server", url], env={"FEWSTEP_API_KEY": key})
        wrong = CliRunner().invoke(cli, ["models", "--server", url], env={"FEWSTEP_API_KEY": "fs_wrong"})
    assert right.exit_code == 0
    assert "org/base" in right.output
    assert "error: 401" in wrong.output
