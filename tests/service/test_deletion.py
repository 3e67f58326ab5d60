"""Students that are deleted, over HTTP and from the terminal; what is still needed stays, and drawings are finished."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from fastapi.testclient import TestClient

from service.app import create_app
from service.engine.recent import FRESH_SECONDS
from service.keys import create_key
from service.settings import Settings
from tests.service.conftest import FakeEngine, TinyBase
from tests.service.engine_help import Harness
from tests.service.live import serving
from tests.service.test_cli import fewstep
from tests.service.test_jobs_api import publish
from weights.contracts import Router
from weights.store import Store

MODELS = "/v1/models"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        store=tmp_path / "store",
        jobs_dir=tmp_path / "jobs",
        aliases={"gpt-image-1": "aliased"},
        pinned=["pinned"],
        default_model="default",
    )


@pytest.fixture
def store(settings: Settings, tmp_path: Path) -> Store:
    """Students ``mine``, ``member-0`` and ``member-1`` with the router ``routed``, and those that the settings name."""
    for name in ("mine", "member-0", "member-1", "aliased", "pinned", "default"):
        publish(settings, tmp_path / "work", name)
    store = Store(settings.store)
    router = Router(centroids=[[0.0, 1.0], [1.0, 0.0]], students=["member-0", "member-1"])
    (tmp_path / "none").mkdir()
    store.publish(store.manifest("mine").model_copy(update={"name": "routed", "router": router}), tmp_path / "none")
    return store


@pytest.fixture
def client(settings: Settings, engine: FakeEngine, store: Store) -> Iterator[TestClient]:
    with TestClient(create_app(settings, engine), raise_server_exceptions=False) as client:
        yield client


def test_the_official_client_deletes_a_student(settings: Settings, engine: FakeEngine, store: Store) -> None:
    with (
        serving(create_app(settings, engine)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client,
    ):
        deleted = client.models.delete("mine")
        assert (deleted.id, deleted.object, deleted.deleted) == ("mine", "model", True)
        assert "mine" not in store.names()
        with pytest.raises(openai.NotFoundError):
            client.models.delete("mine")


@pytest.mark.parametrize("name", ["nobody", "a%20b", "..%2f..%2fetc", "Upper", "org/base", "x" * 600])
def test_what_is_not_there(client: TestClient, store: Store, name: str) -> None:
    before = store.names()
    answer = client.delete(f"{MODELS}/{name}")
    assert answer.status_code == 404
    assert (answer.json()["error"]["param"], answer.json()["error"]["code"]) == ("model", "model_not_found")
    assert store.names() == before


NEEDED = [
    ("emoji-average", "bundled with the code"),
    ("emoji-base", "FEWSTEP_BASES"),
    ("gpt-image-1", "an alias of 'aliased'"),
    ("aliased", "FEWSTEP_ALIASES names 'aliased'"),
    ("pinned", "FEWSTEP_PINNED names 'pinned'"),
    ("default", "FEWSTEP_DEFAULT_MODEL names 'default'"),
    ("member-1", "is a member of the router routed"),
]


@pytest.mark.parametrize(("name", "words"), NEEDED)
def test_what_is_needed_stays(client: TestClient, store: Store, name: str, words: str) -> None:
    before = store.names()
    answer = client.delete(f"{MODELS}/{name}")
    assert answer.status_code == 409
    error = answer.json()["error"]
    assert (error["param"], error["code"], words in error["message"]) == ("model", "model_needed", True), error
    assert store.names() == before


def test_a_router_goes_before_its_members(client: TestClient, store: Store) -> None:
    for name in ("routed", "member-0", "member-1"):
        assert client.delete(f"{MODELS}/{name}").json() == {"id": name, "object": "model", "deleted": True}
    assert not {"routed", "member-0", "member-1"} & set(store.names())


def test_a_store_that_fails_is_our_fault(
    client: TestClient, store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Path, "unlink", lambda *_: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
    error = client.delete(f"{MODELS}/mine").json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "store_failed")
    assert "Read-only" in caplog.text and "Read-only" not in error["message"]


def test_a_store_that_hangs_keeps_nobody_else_waiting(
    settings: Settings, engine: FakeEngine, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither for an image, which other threads encode, nor for the end of the process."""
    hangs, threads = threading.Event(), []

    def hang(*_: object) -> None:
        threads.append(threading.current_thread())
        assert hangs.wait(60)

    monkeypatch.setattr(Store, "delete", hang)
    try:
        with TestClient(create_app(settings.model_copy(update={"request_timeout": 0.2}), engine)) as client:
            answer = client.delete(f"{MODELS}/mine")
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        assert [thread.daemon for thread in threads] == [True]
    finally:
        hangs.set()


def test_only_admins_delete(settings: Settings, engine: FakeEngine, store: Store, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    drawing, _ = create_key(keys, "ann", ["generate", "jobs"])
    admin, _ = create_key(keys, "bob", ["admin"])
    with TestClient(create_app(settings.model_copy(update={"keys_file": keys}), engine)) as client:
        refused = client.delete(f"{MODELS}/mine", headers={"Authorization": f"Bearer {drawing}"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_scope")
        assert "mine" in store.names()
        assert client.delete(f"{MODELS}/mine", headers={"Authorization": f"Bearer {admin}"}).status_code == 200


@pytest.mark.usefixtures("loaded_once")
def test_pictures_on_their_way_are_finished(tiny_base: TinyBase, tmp_path: Path) -> None:
    """Those that wait for their first call too; who asks later is told that there is no such model."""
    harness = Harness(tiny_base, tmp_path, max_batch=2)
    harness.publish()
    body = {"prompt": "red apple", "model": "tiny", "n": 4}
    with serving(create_app(harness.settings, harness.engine)) as url, ThreadPoolExecutor() as pool:

        def draw() -> httpx.Response:
            return httpx.post(f"{url}/v1/images/generations", json=body, timeout=120)

        assert draw().status_code == 200
        harness.watch.shut()
        drawing = pool.submit(draw)
        deadline = time.monotonic() + 60
        while not harness.watch.calls:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert httpx.delete(f"{url}{MODELS}/tiny").status_code == 200
        time.sleep(FRESH_SECONDS)
        assert not drawing.done()
        harness.watch.open()
        assert (drawing.result(120).status_code, len(drawing.result().json()["data"])) == (200, 4)
        late = draw()
        assert (late.status_code, late.json()["error"]["code"]) == (404, "model_not_found")


def test_from_the_terminal(settings: Settings, engine: FakeEngine, store: Store, tmp_path: Path) -> None:
    here = {"store": settings.store}
    assert fewstep("delete", "routed", **here).output == "routed is deleted\n"
    assert "FEWSTEP_PINNED names 'mine'" in fewstep("delete", "mine", status=1, pinned='["mine"]', **here).output
    assert "bundled with the code" in fewstep("delete", "emoji-average", status=1, **here).output
    assert fewstep("delete", "mine", "--store", settings.store).output == "mine is deleted\n"
    assert "no student is named 'mine'" in fewstep("delete", "mine", status=1, **here).output
    with serving(create_app(settings, engine)) as url:
        assert fewstep("delete", "member-0", "--server", url).output == "member-0 is deleted\n"
        assert "error: 404" in fewstep("delete", "../member-1", "--server", url, status=1).output
        both = fewstep("delete", "member-1", "--server", url, "--store", tmp_path, status=2).output
        assert "cannot be combined" in both
    assert {"routed", "mine", "member-0"}.isdisjoint(store.names())
    assert "member-1" in store.names()
