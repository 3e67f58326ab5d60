"""``fewstep``: what each command does, refuses, and passes on; the server's commands against a real server."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

import distillers.__main__ as distillers
from service import cli_jobs, server
from service.cli import app
from service.client import Client, ServerError
from service.demo import serving, wait_until_ready
from service.jobs.base import JobSettings
from service.settings import Settings
from tests.service import live
from tests.service.conftest import TinyBase
from tests.service.fake_server import make_app
from tests.service.jobs_help import ROOT, ended, open_table, until
from weights.commands import TYPED
from weights.contracts import DistillJob
from weights.store import Store


def fewstep(*arguments: object, status: int = 0, **variables: object) -> Result:
    """Run a command in this process."""
    environment = {f"FEWSTEP_{name.upper()}": str(value) for name, value in variables.items()}
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env=environment)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real server with a fake engine and distiller."""
    folder = tmp_path_factory.mktemp("server")
    api = make_app(Settings(store=folder / "store", jobs_dir=folder / "jobs"))
    with live.serving(api) as url:
        yield url


def write_spec(folder: Path, student: str, **config: Any) -> Path:
    path = folder / f"{student}.toml"
    lines = "".join(f"{name} = {json.dumps(value)}\n" for name, value in config.items())
    path.write_text(f'student = "{student}"\nmethod = "fake"\n[config]\n{lines}')
    return path


def test_the_help_loads_nothing_heavy() -> None:
    code = "import sys, service.cli; print({'torch', 'fastapi', 'sqlalchemy', 'httpx', 'PIL'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    shown = fewstep("--help").output
    for command in (
        "serve",
        "worker",
        "evaluate",
        "calibrate",
        "average",
        "extract",
        "distill",
        "jobs",
        "keys",
        "models",
        "draw",
        "export",
        "delete",
        "demo",
    ):
        assert re.search(rf"\b{command}\b", shown), command


def test_every_option_is_described() -> None:
    import typer

    for command in typer.main.get_command(app).commands.values():  # type: ignore[attr-defined]
        for each in [command, *getattr(command, "commands", {}).values()]:
            assert each.help, each.name
            for option in each.params:
                assert getattr(option, "help", None), f"{each.name} {option.name}"


@pytest.mark.parametrize("command", ["serve", "worker", "models"])
def test_bad_settings_stop_every_command(command: str) -> None:
    result = fewstep(command, status=2, port="many")
    assert "FEWSTEP_PORT" in result.output
    assert "'many'" in result.output


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"job_devices": '["tpu"]'}, "'tpu'"),
        ({"database_url": "sqlite://"}, "in-memory"),
        ({"bases": '["none"]'}, "none"),
        ({"host": "0.0.0.0"}, "FEWSTEP_ALLOW_OPEN=true"),
        ({"host": "some.example"}, "FEWSTEP_ALLOW_OPEN=true"),
        ({"keys_file": "/none/keys.json"}, "`fewstep keys create` creates it"),
        ({"safety_checker": "nobody"}, "no installed package offers 'nobody' as fewstep.safety"),
    ],
)
def test_a_server_that_could_not_work_does_not_start(
    settings: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "run", lambda *_, **__: pytest.fail("it started"))
    assert words in fewstep("serve", status=2, **settings).output


@pytest.mark.parametrize(
    ("given", "module", "passed"),
    [
        (["distill", "job.toml", "--resume"], "distillers", ["job.toml", "--resume", "--store", "STORE"]),
        (["distill", "job.toml", "--store", "x"], "distillers", ["job.toml", "--store", "x"]),
        (["distill", "check", "job.toml"], "distillers", ["check", "job.toml"]),
        (["distill", "--help"], "distillers", ["--help", "--store", "STORE"]),
        (
            ["evaluate", "a", "b", "--quick"],
            "distillers.evaluation",
            ["a", "b", "--quick", "--store", "STORE", "--out", "runs/evaluation"],
        ),
        (["calibrate", "a", "--write"], "distillers.evaluation.calibrate", ["a", "--write", "--store", "STORE"]),
        (["average", "c", "a", "b:2"], "distillers.averaging", ["c", "a", "b:2", "--store", "STORE"]),
        (["extract", "c", "a", "--rank", "8"], "distillers.extraction", ["c", "a", "--rank", "8", "--store", "STORE"]),
        (["evaluate", "--store=x", "--out=y"], "distillers.evaluation", ["--store=x", "--out=y"]),
    ],
)
def test_programs_get_their_arguments(
    given: list[str], module: str, passed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(os, "execve", lambda path, arguments, named: calls.append((path, arguments, named[TYPED])))
    fewstep(*given, store=tmp_path)
    wanted = [str(tmp_path) if item == "STORE" else item for item in passed]
    assert calls == [(sys.executable, [sys.executable, "-m", module, *wanted], f"fewstep {given[0]}")]


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        (["distill", "taken.toml", "--resume"], True),
        (["distill", "--store", "elsewhere", "taken.toml"], True),
        (["distill", "taken.toml", "--set", "student=free"], False),
        (["distill", "free.toml", "--set", "student=taken"], True),
        (["distill", "free.toml", '--set=student="taken"'], True),
        (["distill", "free.toml", "--set", "method=taken"], False),
        (["distill", "parts.toml"], True),
        (["distill", "free.toml", "--folder", "taken"], False),
        (["distill", "check", "taken.toml"], False),
        (["distill", "nowhere.toml"], False),
        (["average", "taken", "a", "b:2"], True),
        (["average", "--replace", "c", "a", "b"], False),
        (["extract", "--rank", "8", "taken", "a"], True),
    ],
)
def test_no_student_is_made_under_an_alias(
    given: list[str], refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("taken", "free", "parts"):
        write_spec(tmp_path, name)
    (tmp_path / "parts.toml").write_text('student = "parts"\nmethod = "fake"\n[partition]\nstudents = 2\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "execve", lambda *_: sys.exit(0))
    aliases = json.dumps({"taken": "emoji-average", "parts-1": "emoji-average"})
    output = fewstep(*given, status=int(refused), aliases=aliases).output
    assert ("is an alias of 'emoji-average'" in output and "FEWSTEP_ALIASES" in output) == refused


def test_distill_is_the_distillers(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "service.cli", "distill", str(write_spec(tmp_path, "student"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "'fake'" in done.stderr


@pytest.mark.parametrize("given", ["distill", "distill check", "distill methods"])
def test_the_help_of_a_program_is_that_of_the_command(
    given: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def become(path: str, arguments: list[str], environment: dict[str, str]) -> None:
        monkeypatch.setenv(TYPED, environment[TYPED])
        distillers.main(arguments[3:])

    monkeypatch.setattr(os, "execve", become)
    assert f"usage: fewstep {given} [-h]" in fewstep(*given.split(), "--help").output + capsys.readouterr().out


def test_a_jobs_life_from_the_terminal(address: str, tmp_path: Path) -> None:
    at = ("--server", address)
    submitted = fewstep("jobs", "submit", write_spec(tmp_path, "one", steps=3), "--follow", *at).output.splitlines()
    assert submitted[0].startswith("distill-")
    assert submitted[-1] == f"{submitted[0]} succeeded"
    assert "Step 3 of 3" in submitted[-3]
    shown = json.loads(fewstep("jobs", "show", submitted[0], *at).output)
    assert (shown["student"], shown["status"]) == ("one", "succeeded")
    long = write_spec(tmp_path, "two", steps=200, delay=0.05)
    (job_id,) = fewstep("jobs", "submit", long, "--student", "renamed", *at).output.split()
    assert fewstep("jobs", "cancel", job_id, *at).output.split()[1] in {"running,", "cancelled"}
    followed = fewstep("jobs", "follow", job_id, *at, status=1).output
    assert followed.splitlines()[-1] == f"{job_id} cancelled"
    assert fewstep("jobs", "resume", job_id, *at).output == f"{job_id} queued\n"
    fewstep("jobs", "cancel", job_id, *at)
    table = fewstep("jobs", "list", *at).output.splitlines()
    assert table[0].split() == ["id", "status", "student", "method", "progress"]
    assert table[2].split() == [submitted[0], "succeeded", "one", "fake", "3/3"]
    assert table[1].split()[2] == "renamed"
    assert "one" in fewstep("models", *at).output


def test_a_batch_and_a_failure_from_the_terminal(address: str, tmp_path: Path) -> None:
    specs = [
        {"student": f"batch-{index}", "method": "fake", "config": config}
        for index, config in enumerate([{"steps": 2}, {"steps": 2, "fail_at": 1}])
    ]
    path = tmp_path / "batch.json"
    path.write_text(json.dumps({"jobs": specs}))
    lines = fewstep("jobs", "submit", path, "--follow", "--server", address, status=1).output.splitlines()
    good, bad = lines[:2]
    assert f"{good} succeeded" in lines
    assert lines[-1].startswith(f"{bad} failed The job's process ended with status 1: ")


def test_refusals_are_shown(address: str, tmp_path: Path) -> None:
    at = ("--server", address)
    wrong = fewstep("jobs", "submit", write_spec(tmp_path, "student", steps=0), *at, status=1).output
    assert "error: 400: config.steps: must be at least 1 (config.steps)" in wrong
    assert "error: 404" in fewstep("jobs", "show", "distill-nobody", *at, status=1).output
    missing = fewstep("jobs", "submit", tmp_path / "none.toml", *at, status=2).output
    assert "is neither a file nor a recipe" in missing
    broken = tmp_path / "broken.toml"
    for content in (b"student = ", b"\xff"):
        broken.write_bytes(content)
        assert f"{broken} cannot be read" in fewstep("jobs", "submit", broken, *at, status=2).output


def test_no_server(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        assert f"no answer from {url}" in fewstep("jobs", "list", "--server", url, status=1).output
        with Client(url) as client:
            assert not client.is_ready()
            with pytest.raises(ServerError, match="was lost"):
                list(client.follow("distill-x"))
    assert "no answer" in fewstep("models", "--server", "not a url", status=1).output


def test_recipes_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = tmp_path / "distillers" / "recipes"
    recipes.mkdir(parents=True)
    write_spec(recipes, "short").rename(recipes / "short.toml")

    class Found:
        submodule_search_locations = (str(tmp_path / "distillers"),)

    monkeypatch.setattr(cli_jobs, "find_spec", lambda name: Found if name == "distillers" else None)
    assert cli_jobs.read_spec("short")["student"] == "short"
    with pytest.raises(ValueError, match="'long' is neither a file nor a recipe; available: short"):
        cli_jobs.read_spec("long")


def test_drawing_on_a_server(address: str, tmp_path: Path) -> None:
    out = tmp_path / "new" / "apple.png"
    drawn = fewstep(
        "draw", "red apple", "-o", out, "--seed", 7, "-n", 2, "--steps", 3, "--diversity", "--server", address
    )
    paths = [tmp_path / "new" / f"apple-{number}.png" for number in (1, 2)]
    assert drawn.stdout.split() == [str(path) for path in paths]
    for path, seed in zip(paths, (7, 8), strict=True):
        with Image.open(path) as picture:
            assert picture.getpixel((0, 0)) == (seed, 180, 255)
    refused = fewstep("draw", "red apple", "-o", out, "--model", "nobody", "--server", address, status=1)
    assert "error: 404: no model is named 'nobody'" in refused.output
    assert "give the name of a .png" in fewstep("draw", "red apple", "-o", tmp_path / "apple.gif", status=2).output
    (tmp_path / "file").touch()
    nowhere = tmp_path / "file" / "apple.png"
    refused = fewstep("draw", "red apple", "-o", nowhere, "--server", address, status=1).output
    assert f"error: {nowhere} cannot be written" in refused.replace("\n", "")
    (tmp_path / "list.json").write_text("[]")
    refused = fewstep("jobs", "submit", tmp_path / "list.json", "--student", "x", "--server", address, status=2).output
    assert "list.json is not a job: give an object" in refused.replace("\n", "")


def test_drawing_and_exporting_here(tmp_path: Path, tiny_base: TinyBase) -> None:
    settings = {"store": tmp_path / "store", "bases": json.dumps([tiny_base.id]), "device": "cpu", "threads": 1}
    tiny_base.publish(Store(tmp_path / "store"), tmp_path / "work", name="mine")
    listed = fewstep("models", **settings).output
    assert re.search(r"mine +student +\S+ +test +1, 2, 4", listed)
    out = tmp_path / "a.webp"
    assert fewstep("draw", "red apple", "-o", out, "--model", "mine", "--steps", 2, **settings).stdout == f"{out}\n"
    with Image.open(out) as picture:
        assert (picture.format, picture.size) == ("WEBP", (32, 32))
    wrong = fewstep("draw", "red apple", "-o", out, "--model", "nobody", **settings, status=1)
    assert "nobody" in wrong.output
    gone = {"id": str(tmp_path / "gone"), "sha256": "0" * 64}
    tiny_base.publish(Store(tmp_path / "store"), tmp_path / "orphan", name="orphan", base=gone)
    orphan = fewstep("draw", "red apple", "-o", out, "--model", "orphan", **settings, status=1).output
    assert str(tmp_path / "gone") in orphan.replace("\n", "") and "the server's log" not in orphan
    folder = tmp_path / "exported"
    assert fewstep("export", "mine", folder, "--steps", 2, **settings).stdout == f"{folder}\n"
    assert (folder / "model_index.json").is_file()
    assert "exists" in fewstep("export", "mine", folder, "--steps", 2, **settings, status=1).output
    assert "nobody" in fewstep("export", "nobody", tmp_path / "x", **settings, status=1).output


def test_serve_is_the_real_server(tmp_path: Path, tiny_base: TinyBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_THREADS", "1")
    command = (sys.executable, "-m", "service.cli", "serve")
    with serving(tmp_path, command, tiny_base.id) as (url, process), Client(url) as client:
        wait_until_ready(client, process)
        assert client.draw("red apple", steps=2).pictures[0].size == (32, 32)
        with pytest.raises(ServerError, match=r"400: .*method"):
            client.request("POST", "/v1/distillation/jobs", {"student": "x", "method": "nothing"})
    assert process.returncode == 0
    assert "Application shutdown complete" in (tmp_path / "server.log").read_text()


def test_a_worker_runs_what_a_server_queued(tmp_path: Path) -> None:
    """With the real distillers, which refuse this job: it was put into the table past the check."""
    settings = JobSettings(url=f"sqlite:///{tmp_path / 'jobs.db'}", folder=tmp_path / "jobs", store=tmp_path / "store")
    table = open_table(settings)
    (job,) = table.add([DistillJob(student="student", method="nothing")])
    variables = {"FEWSTEP_DATABASE_URL": settings.url, "FEWSTEP_JOBS_DIR": str(settings.folder)}
    worker = subprocess.Popen([sys.executable, "-m", "service.cli", "worker"], cwd=ROOT, env=os.environ | variables)
    try:
        failed = asyncio.run(until(table, job, ended))
    finally:
        worker.send_signal(signal.SIGTERM)
        status = worker.wait(60)
    assert (failed.status, status) == ("failed", 0)
    assert failed.error is not None
    assert "'nothing'" in failed.error.stderr


def test_the_demo_fails_with_a_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from service import demo

    def broken(folder: Path | None, spec: dict[str, Any]) -> Path:
        raise demo.DemoFailed(f"{spec['student']} failed in {folder}")

    monkeypatch.setattr(demo, "run_demo", broken)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process keeps its own
    recipe = write_spec(tmp_path, "short")
    shown = fewstep("demo", "--folder", tmp_path, "--recipe", recipe, status=1).output
    assert f"error: short failed in {tmp_path}" in shown
    monkeypatch.setattr(demo, "run_demo", lambda folder, _: folder / "contact-sheet.png")
    assert fewstep("demo", "--folder", tmp_path, "--recipe", recipe).stdout == f"{tmp_path / 'contact-sheet.png'}\n"
