"""The servers that are compared, each a process of its own, all started before anything is measured."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import httpx
import torch

from service.demo import free_port, stop
from service.settings import Settings, read_settings
from weights.bundled import STUDENTS
from weights.export import export
from weights.store import Store

START_SECONDS = 600.0
"""A first start may compile its models."""
STOP_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What every server is started with."""

    base: str
    student: str
    store: Path
    """Folder of the students; the bundled ones are known besides."""
    device: str
    """auto, cpu, cuda or cuda:N."""
    threads: int | None
    window: float
    """Seconds that the baseline which batches waits."""
    most: int
    """Pictures of one of its calls."""
    steps: tuple[int, ...]
    settings: tuple[str, ...]
    """NAME=VALUE, of this server."""

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU to draw on, in its own precision."""
        return self.torch_device.startswith("cuda")

    @property
    def torch_device(self) -> str:
        """The device by torch's name."""
        if self.device != "auto":
            return self.device
        return "cuda" if torch.cuda.is_available() else "cpu"


def write_exports(setup: Setup, folder: Path) -> Path:
    """The student as plain pipelines, one a step count."""
    store = Store(setup.store, STUDENTS)
    for steps in setup.steps:
        export(store, setup.student, folder / str(steps), steps)
    return folder


@contextmanager
def start_all(setup: Setup, folder: Path) -> Iterator[dict[str, str]]:
    """The servers' addresses by name: lock, window, ours. They are stopped at the end."""
    exports = write_exports(setup, folder / "exports")
    threads = [] if setup.threads is None else ["--threads", str(setup.threads)]
    on = ["--device", setup.torch_device, "--dtype", "float16" if setup.on_gpu else "float32"]
    common = ["--exports", str(exports), *threads, *on, "--window", str(setup.window), "--most", str(setup.most)]
    python = [sys.executable, "-m"]
    commands = {
        **{kind: [*python, "tests.benchmarks.bench_serve.baselines", kind, *common] for kind in ("lock", "window")},
        "ours": [*python, "service.cli", "serve"],
    }
    variables = our_variables(setup, folder)
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(_started(name, command, folder, variables if name == "ours" else {}))
            for name, command in commands.items()
        }


def our_variables(setup: Setup, folder: Path) -> dict[str, str]:
    """This server's settings; those that are given by hand come last."""
    values = {
        "STORE": str(setup.store),
        "JOBS": "false",
        "JOBS_DIR": str(folder / "jobs"),
        "BASES": json.dumps([setup.base]),
        "DEFAULT_MODEL": setup.student,
        "DEVICE": setup.device,
        "LOG_LEVEL": "warning",
        **({} if setup.threads is None else {"THREADS": str(setup.threads)}),
        **dict(each.split("=", 1) for each in setup.settings),
    }
    return {f"FEWSTEP_{name}": value for name, value in values.items()}


def our_settings(setup: Setup, folder: Path) -> Settings:
    """The same, as this server reads them."""
    with patch.dict(os.environ, our_variables(setup, folder)):
        return read_settings()


@contextmanager
def _started(name: str, command: list[str], folder: Path, variables: Mapping[str, str]) -> Iterator[str]:
    port = free_port()
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port)], env=os.environ | variables, stdout=output, stderr=output
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(url, process, log)
        yield url
    finally:
        stop(process, STOP_SECONDS)


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"a server has ended at its start: {log.read_text()[-2000:]}")
        try:
            if httpx.get(f"{url}/health/ready", trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"a server was not ready after {START_SECONDS:g} s: {log.read_text()[-2000:]}")
