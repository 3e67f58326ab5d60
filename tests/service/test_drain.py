"""A real server process and real signals: what is admitted is finished, what is new is refused, and then it ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.client import Client, ServerError
from service.demo import free_port
from service.server import check_address
from service.settings import BadSettings, Settings
from tests.service.jobs_help import ROOT
from tests.service.live import wait_until_ready

DRAW, JOBS = "/v1/images/generations", "/v1/distillation/jobs"
BODY = {"prompt": "red apple", "seed": 7}


@dataclass(frozen=True)
class Slow:
    """A server that holds its drawings."""

    url: str
    process: subprocess.Popen[bytes]
    folder: Path

    def draw(self) -> httpx.Response:
        return httpx.post(self.url + DRAW, json=BODY, timeout=60)

    def ready(self) -> httpx.Response:
        return httpx.get(f"{self.url}/health/ready")

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def release(self) -> None:
        (self.folder / "release").touch()

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "log").read_text().splitlines()]


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


@contextmanager
def slow_server(folder: Path, **settings: object) -> Iterator[Slow]:
    port = free_port()
    folders = {"store": folder / "store", "jobs_dir": folder / "jobs"}
    variables = {"port": port, "jobs": "false", "log_format": "json", **folders, **settings}
    named = {f"FEWSTEP_{name.upper()}": str(value) for name, value in variables.items()}
    command = [sys.executable, "-m", "tests.service.slow_server", str(folder)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | named, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, 60)
        yield Slow(url, process, folder)
    finally:
        process.kill()
        process.wait()


def test_admitted_is_finished_and_new_is_refused(tmp_path: Path) -> None:
    with slow_server(tmp_path) as server, ThreadPoolExecutor() as pool:
        admitted = pool.submit(server.draw)
        until((tmp_path / "admitted").exists, "the drawing did not begin")
        server.signal()
        until(lambda: server.ready().status_code == 503, "the server kept saying that it is ready")
        refused = server.draw()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_ready")
        assert "stopping" in refused.json()["error"]["message"]
        assert int(refused.headers["retry-after"]) >= 1
        assert httpx.get(f"{server.url}/health/live").status_code == 200
        assert not admitted.done()
        server.release()
        drawn = admitted.result(60)
        assert (drawn.status_code, drawn.json()["data"][0]["seed"]) == (200, 7)
        assert server.process.wait(60) == 0
    messages = [line["message"] for line in server.log()]
    assert "drained; abandoning 0 unfinished images" in messages
    assert "Application shutdown complete." in messages
    assert not [line for line in server.log() if line["level"] == "error"]


def test_it_does_not_wait_for_what_is_compiled_beside_it(tmp_path: Path) -> None:
    """Which cannot be interrupted, and may take minutes."""
    (tmp_path / "compiling").touch()
    with slow_server(tmp_path) as server:
        server.signal()
        assert server.process.wait(60) == 0
    assert "Application shutdown complete." in [line["message"] for line in server.log()]


def test_a_stream_is_finished(tmp_path: Path) -> None:
    with slow_server(tmp_path) as server:
        with httpx.stream("GET", f"{server.url}/v1/images/stream", timeout=60) as answer:
            lines = answer.iter_lines()
            assert next(lines) == "first"
            until((tmp_path / "admitted").exists, "the drawing did not begin")
            server.signal(signal.SIGINT)
            until(lambda: server.ready().status_code == 503, "the server kept saying that it is ready")
            server.release()
            assert list(lines) == ["7"]
        assert server.process.wait(60) == 0


def test_a_jobs_stream_ends_when_the_server_begins_to_drain(tmp_path: Path) -> None:
    """Whole, as its chunks say, and without waiting for the job; a drawing is finished meanwhile."""
    with slow_server(tmp_path, jobs="true") as server, ThreadPoolExecutor() as pool:
        spec = {"student": "student", "method": "fake", "config": {"steps": 10_000, "delay": 0.05}}
        events = f"{server.url}{JOBS}/{httpx.post(server.url + JOBS, json=spec).json()['id']}/events"
        drawing = pool.submit(server.draw)
        until((tmp_path / "admitted").exists, "the drawing did not begin")
        with httpx.stream("GET", events, params={"stream": "true"}, timeout=60) as answer:
            lines = answer.iter_lines()
            assert next(line for line in lines if line.startswith("event: ")) == "event: started"
            server.signal()
            rest = list(lines)  # which raises where the answer was cut off
        assert "data: [DONE]" not in rest, "the job has not ended"
        assert not drawing.done(), "the stream's end waits for no drawing"
        again = httpx.get(events, params={"stream": "true"})
        assert (again.status_code, again.json()["error"]["code"]) == (503, "not_ready")
        server.release()
        assert drawing.result(60).status_code == 200
        assert server.process.wait(60) == 0
    assert not [line for line in server.log() if line["level"] == "error"]


def test_whoever_follows_a_job_is_told_that_the_server_stops(tmp_path: Path) -> None:
    with slow_server(tmp_path, jobs="true") as server, Client(server.url) as client:
        spec = {"student": "student", "method": "fake", "config": {"steps": 10_000, "delay": 0.05}}
        followed = client.follow(client.request("POST", JOBS, spec)["id"])
        assert next(followed)[0] == "started"
        server.signal()
        with pytest.raises(ServerError, match="which it does when it stops"):
            list(followed)
        assert server.process.wait(60) == 0


def test_an_idle_server_ends(tmp_path: Path) -> None:
    with slow_server(tmp_path) as server, httpx.Client() as kept:
        kept.get(server.url + "/health")  # a connection that stays open
        server.signal()
        assert server.process.wait(60) == 0


def test_a_load_balancer_has_time_to_notice(tmp_path: Path) -> None:
    """An idle server would be gone before anybody saw it refuse."""
    with slow_server(tmp_path, drain_notice_seconds=600) as server:
        server.signal()
        until(lambda: server.ready().status_code == 503, "the server did not say that it stops")
        assert server.draw().status_code == 503
        assert server.process.poll() is None


def test_what_takes_too_long_is_given_up(tmp_path: Path) -> None:
    with slow_server(tmp_path, drain_seconds=0.2) as server, ThreadPoolExecutor() as pool:
        endless = pool.submit(server.draw)
        until((tmp_path / "admitted").exists, "the drawing did not begin")
        server.signal()
        assert server.process.wait(60) == 0
        given_up = endless.result(60)
        assert (given_up.status_code, given_up.json()["error"]["code"]) == (503, "not_ready")
    assert "drained; abandoning 1 unfinished images" in [line["message"] for line in server.log()]


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    with slow_server(tmp_path, drain_seconds=600) as server, ThreadPoolExecutor() as pool:
        lost = pool.submit(server.draw)
        until((tmp_path / "admitted").exists, "the drawing did not begin")
        server.signal()
        until(lambda: server.ready().status_code == 503, "the server did not begin to drain")
        server.signal()
        assert server.process.wait(60) == -signal.SIGTERM
        with pytest.raises(httpx.TransportError):
            lost.result(60)


def closed_by(server: Slow, *sent: bytes) -> bytes:
    """What comes back until the server closes the connection; a whole GET is answered before the next part is sent."""
    host, port = server.url.removeprefix("http://").split(":")
    answer = b""
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        for part in sent:
            connection.sendall(part)
            if part.startswith(b"GET") and part.endswith(b"\r\n\r\n"):
                answer += connection.recv(65536)
        while received := connection.recv(65536):
            answer += received
    return answer


def test_slow_clients_hold_no_connection(tmp_path: Path) -> None:
    """Neither one that sends nothing, nor a part of its headers, nor a part of its body; a slow drawing may take longer."""
    with slow_server(tmp_path, read_seconds=0.3) as server, ThreadPoolExecutor() as pool:
        patient = pool.submit(server.draw)
        head = f"POST {DRAW} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n"
        assert closed_by(server) == b""
        assert closed_by(server, b"GET /health HTTP/1.1\r\nHos") == b""
        assert closed_by(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET /heal").startswith(
            b"HTTP/1.1 200 OK"
        )
        answer = closed_by(server, f"{head}\r\n".encode(), b'{"prompt": ')
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"
        server.release()
        assert patient.result(60).status_code == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_may_be_open(host: str) -> None:
    check_address(Settings(host=host))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "localhost.example", "127.0.0.1.example"])
def test_other_addresses_need_keys_or_a_word(host: str, tmp_path: Path) -> None:
    with pytest.raises(BadSettings, match=r"FEWSTEP_HOST: .*FEWSTEP_KEYS_FILE.*FEWSTEP_ALLOW_OPEN=true"):
        check_address(Settings(host=host))
    check_address(Settings(host=host, allow_open=True))
    check_address(Settings(host=host, keys_file=tmp_path / "keys.json"))
