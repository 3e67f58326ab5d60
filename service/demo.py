"""The whole pipeline in some minutes: serve, distil the bundled teacher over REST, generate and compare.

The demo starts a server as a separate process and uses only its HTTP API, as a user would.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from service.client import JOBS, Client, ServerError
from service.demo_sheet import Row, draw_sheet
from service.jobs.executor import tail
from service.settings import PREFIX
from weights.bundled import STUDENTS
from weights.contracts import DistillJob

DEFAULT_BASE = str(DistillJob.model_fields["base"].default)
START_SECONDS = 180.0
STOP_SECONDS = 90.0
STUDENT_STEPS = (1, 2, 4)
COARSE = "animals & nature, fluent 3d emoji"
COLUMNS: tuple[tuple[str, int], ...] = (
    ("red apple, noto emoji", 0),
    ("fox face, fluent 3d emoji", 1),
    ("sailboat, twemoji", 2),
    ("face with tears of joy, noto emoji", 3),
    *((COARSE, seed) for seed in (10, 11, 12, 13)),
)
"""Prompt and seed of each column: single objects, and one coarse prompt several times, where diversity shows."""


class DemoFailed(RuntimeError):
    """The demo could not be finished; the message says where it failed, with the last lines of the server's log."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way of generating; None leaves a value to the model."""

    label: str
    model: str
    steps: int | None = None
    diversity: bool = False


def free_port() -> int:
    """A port of the loopback interface that nothing is listening on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def serving(folder: Path, command: Sequence[str], base: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run a server on a free port, with its store, jobs and log in ``folder``, and stop it at the end.

    It has no other settings than those made here.

    Args:
        folder: an existing folder.
        command: the program that serves; ``--port N`` is appended.
        base: the base model to serve.

    Yields:
        The server's address and its process.
    """
    port = free_port()
    settings = {
        "FEWSTEP_STORE": str(folder / "students"),
        "FEWSTEP_JOBS_DIR": str(folder / "jobs"),
        "FEWSTEP_BASES": json.dumps([base]),
        "FEWSTEP_HOST": "127.0.0.1",
        "FEWSTEP_JOBS": "true",
        "FEWSTEP_JOB_WORK": "true",
    }
    # The caller's settings are for another server: names of students that this empty store lacks would stop the start.
    inherited = {name: value for name, value in os.environ.items() if not name.upper().startswith(PREFIX)}
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=inherited | settings,
            start_new_session=True,  # Ctrl-C stops the demo, which then stops the server
        )
    try:
        yield f"http://127.0.0.1:{port}", process
    finally:
        stop(process, STOP_SECONDS)


def stop(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Terminate the process, and kill it if it has not ended after ``seconds``."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_until_ready(client: Client, process: subprocess.Popen[bytes], seconds: float = START_SECONDS) -> None:
    """Return once the server can generate images. Raises DemoFailed."""
    deadline = time.monotonic() + seconds
    while not client.is_ready():
        if process.poll() is not None:
            raise DemoFailed(f"the server exited with status {process.returncode} before it was ready")
        if time.monotonic() > deadline:
            raise DemoFailed(f"the server was not ready after {seconds:.0f} s")
        time.sleep(0.2)


def free_name(wanted: str, taken: set[str]) -> str:
    """The name or, if an earlier demo took it, the name with the first free number appended."""
    number = 2
    name = wanted
    while name in taken:
        name = f"{wanted}-{number}"
        number += 1
    return name


def distil(client: Client, spec: dict[str, Any], console: Console) -> tuple[str, float]:
    """Submit the job and show its progress until the student is published.

    Returns:
        The student's name, and the seconds that the job took.

    Raises:
        DemoFailed: the job did not succeed.
    """
    taken = {model["id"] for model in client.models()}
    job = client.request("POST", JOBS, spec | {"student": free_name(spec["student"], taken)})
    began = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress:
        task = progress.add_task("distilling", total=None, note="loading the teacher")
        for kind, event in client.follow(job["id"]):
            if kind == "progress":
                done, note = fraction_done(event["data"], time.monotonic() - began), _note(event["data"])
                progress.update(task, total=1.0, completed=done, note=note)
            elif kind == "job":
                job = event
        if job["status"] == "succeeded":
            progress.update(task, total=1.0, completed=1.0)
    if job["status"] != "succeeded":
        error = job["error"] or {"message": f"its status is {job['status']!r}", "stderr": ""}
        raise DemoFailed(f"the job did not succeed: {error['message']}\n{error['stderr']}".rstrip())
    return job["student"], time.monotonic() - began


def fraction_done(progress: dict[str, Any], elapsed: float) -> float:
    """The fraction of the job that is done: by its own estimate of the time left, or else by iterations."""
    left = progress["seconds_left"]
    if left is None:
        return float(progress["step"] / progress["iterations"])
    return elapsed / (elapsed + left) if elapsed + left > 0 else 0.0


def _note(data: dict[str, Any]) -> str:
    metrics = "  ".join(f"{name.rpartition('/')[2]} {value:.3g}" for name, value in data["metrics"].items())
    return f"iteration {data['step']}  {metrics}"[:70]


def variants(models: Sequence[dict[str, Any]], fresh: str, minutes: float) -> list[Variant]:
    """What to compare: the new student, its base, and a bundled student of the same base."""
    by_name = {model["id"]: model for model in models}
    base = by_name[fresh]["base"]
    if base not in by_name:
        raise DemoFailed(f"the new student's base {base!r} is not served; available: {', '.join(by_name)}")
    found = [Variant(label=f"{base} (teacher)", model=base)]
    students = {fresh: f"new student, {minutes:.1f} minutes"}
    bundled = [name for name in _bundled_names() if name in by_name and by_name[name]["base"] == base]
    students.update({name: f"bundled student {name}" for name in bundled[:1]})
    for name, label in students.items():
        replaced = (by_name[name]["diversity"] or {"skip": 1})["skip"]
        for steps in sorted(set(STUDENT_STEPS) & set(by_name[name]["steps"])):
            found.append(Variant(label=label, model=name, steps=steps))
            if steps > replaced:
                found.append(Variant(label=f"{label} + diversity", model=name, steps=steps, diversity=True))
    return found


def _bundled_names() -> list[str]:
    return sorted(path.parent.name for path in STUDENTS.glob("*/student.json"))


def draw_row(client: Client, variant: Variant, columns: Sequence[tuple[str, int]]) -> Row:
    """Generate each column's image in a request of its own.

    Unless the variant is a base with default settings, an unmeasured request comes first, to load and warm up the
    model.
    """
    options: dict[str, Any] = {"model": variant.model, "diversity": variant.diversity}
    if variant.steps is not None:
        options["steps"] = variant.steps
    if variant.steps is not None or variant.diversity:
        client.draw(columns[0][0], seed=columns[0][1], **options)
    drawn = [client.draw(prompt, seed=seed, **options) for prompt, seed in columns]
    return Row(
        label=variant.label,
        steps=drawn[0].steps,
        evaluations=drawn[0].evaluations,
        milliseconds=1000 * sum(item.seconds for item in drawn) / len(drawn),
        pictures=[item.pictures[0] for item in drawn],
    )


def compare(client: Client, fresh: str, minutes: float, console: Console) -> list[Row]:
    """One row per variant."""
    chosen = variants(client.models(), fresh, minutes)
    rows = []
    for variant in chosen:
        row = draw_row(client, variant, COLUMNS)
        console.print(f"  {row.label}: {row.cost}", markup=False, highlight=False)
        rows.append(row)
    return rows


def run_demo(
    folder: Path | None, spec: dict[str, Any], console: Console | None = None, command: Sequence[str] | None = None
) -> Path:
    """Run the whole demo.

    Args:
        folder: for students, jobs, the server's log and the sheet; created if missing. None: a new one under ``runs/``.
        spec: the job to submit.
        console: where to report what happens.
        command: the program that serves; None for ``fewstep serve``.

    Returns:
        The path of the contact sheet.

    Raises:
        DemoFailed: a step failed.
    """
    console = console or Console(stderr=True)
    folder = (folder or Path("runs", f"demo-{datetime.now():%Y%m%d-%H%M%S}")).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoFailed(
            f"the folder {folder} cannot be made ({error.strerror}): give another with --folder"
        ) from error
    command = command or (sys.executable, "-m", "service.cli", "serve")
    log = folder / "server.log"
    base = str(spec.get("base", DEFAULT_BASE))
    try:
        with serving(folder, command, base) as (address, process), Client(address) as client:
            console.print(f"starting a server at {address} (log: {log})", markup=False, highlight=False)
            wait_until_ready(client, process)
            student, seconds = distil(client, spec, console)
            console.print(
                f"{student} is published; generating images for the contact sheet", markup=False, highlight=False
            )
            rows = compare(client, student, seconds / 60, console)
    except (DemoFailed, ServerError) as error:
        words = _plain(tail(log))
        raise DemoFailed(f"{error}\n\nthe end of the server's log, {log}:\n{words or '(empty)'}") from error
    path = folder / "contact-sheet.png"
    footer = (
        f"{spec['method']} on {base}, {datetime.now():%Y-%m-%d %H:%M}. Each column has one "
        "seed. Milliseconds are the server's generation time for single images, including the base's first step."
    )
    columns = [f"{prompt} (seed {seed})" for prompt, seed in COLUMNS]
    draw_sheet("Fewstep: one teacher and its students, in one to four steps", columns, rows, footer).save(path)
    return path


def _plain(text: str) -> str:
    """The text without terminal colour codes."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)
