"""`fewstep serve` as a process of its own, with a tiny base and a student of it, and what a test asks of it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from service.demo import free_port
from tests.service.conftest import TinyBase
from tests.service.jobs_help import ROOT
from tests.service.live import wait_until_ready
from weights.store import Store

MEBIBYTE = 2**20


@dataclass(frozen=True)
class Served:
    """The server."""

    url: str
    process: subprocess.Popen[bytes]
    folder: Path

    @property
    def memory(self) -> float:
        """Resident, in MiB."""
        return float(psutil.Process(self.process.pid).memory_info().rss / MEBIBYTE)

    @property
    def connections(self) -> int:
        """Open ones that clients have to it."""
        found = psutil.Process(self.process.pid).net_connections("tcp")
        return sum(each.status == psutil.CONN_ESTABLISHED for each in found)

    @property
    def log(self) -> str:
        """What it wrote."""
        return (self.folder / "server.log").read_text()


@contextmanager
def served(base: TinyBase, folder: Path, **settings: object) -> Iterator[Served]:
    """The server, ready, with the student ``tiny`` for a default; it must live until it is told to stop, and then obey."""
    base.publish(Store(folder / "store"), folder / "work")
    values = {
        "port": free_port(),
        "store": folder / "store",
        "jobs": "false",
        "bases": json.dumps([base.id]),
        "default_model": "tiny",
        "device": "cpu",
        "threads": 1,
        "backend": "torch",  # it starts at once; OpenVINO compiles first
        "log_level": "warning",
        **settings,
    }
    named = {f"FEWSTEP_{name.upper()}": str(value) for name, value in values.items()}
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "service.cli", "serve"], cwd=ROOT, env=os.environ | named, stdout=log, stderr=log
        )
    server = Served(f"http://127.0.0.1:{values['port']}", process, folder)
    try:
        wait_until_ready(server.url, 300)
        yield server
        assert process.poll() is None, f"the server has ended:\n{server.log}"
        process.terminate()
        assert process.wait(60) == 0, server.log
        assert "Traceback" not in server.log, server.log
    finally:
        process.kill()
        process.wait()
