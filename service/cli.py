"""The ``fewstep`` command: the server, its workers, jobs, image generation, exports and the demo.

Each command imports the heavy libraries that it needs, so that the help appears at once.
"""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn
from urllib.parse import quote

import typer

from service.cli_jobs import client_of, fail, jobs_app, read_spec, show_table, step_counts, writing
from service.cli_jobs import settings as _settings
from service.cli_keys import keys_app
from service.cli_names import names_of_job, refuse_aliases
from service.cli_trace import trace
from weights.commands import TYPED

if TYPE_CHECKING:
    from PIL import Image

    from service.settings import Settings

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}

app = typer.Typer(
    name="fewstep",
    help="Distil text-to-image diffusion models into students that need one to four steps, and serve them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(jobs_app, name="jobs")
app.add_typer(keys_app, name="keys")
app.command()(trace)


def _become(context: typer.Context, module: str, arguments: list[str]) -> NoReturn:
    """Replace this process with another program of this project, so that exit status and signals need no forwarding."""
    sys.stdout.flush()
    typed = os.environ | {TYPED: context.command_path}
    os.execve(sys.executable, [sys.executable, "-m", module, *arguments], typed)  # noqa: S606


def _with_store(arguments: list[str]) -> list[str]:
    """The arguments, with the store of the settings added if they name none."""
    given = any(argument == "--store" or argument.startswith("--store=") for argument in arguments)
    return arguments if given else [*arguments, "--store", str(_settings().store)]


def _publish(context: typer.Context, module: str, names: Iterable[str]) -> NoReturn:
    """Replace this process with a program that publishes students under some of these names."""
    refuse_aliases(names, _settings().aliases)
    _become(context, module, _with_store(context.args))


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    log_level: Annotated[str | None, typer.Option(help="Lowest level to log: debug, info, warning or error.")] = None,
) -> None:
    """Serve the API. All other settings are FEWSTEP_... environment variables: see docs/settings.md."""
    settings = _settings(host=host, port=port, log_level=log_level)
    from service import server
    from service.app import create_app
    from service.here import make_engine
    from service.jobs.base import JobsUnavailable
    from service.jobs.service import TableJobs
    from service.metrics import Metrics
    from service.spans import observer_of

    _log_as(settings)
    try:
        server.check_address(settings)
        jobs = TableJobs(settings.job_settings()) if settings.jobs else None
        counts = Metrics()
        engine = make_engine(settings, observer_of(settings, counts))
        api = create_app(settings, engine, jobs, counts=counts)
        if jobs is not None:
            jobs.open()  # here, since inside the app a failure would appear as a traceback
    except (ValueError, JobsUnavailable) as error:
        fail(error, 2)
    server.run(api, settings)


def _log_as(settings: "Settings") -> None:
    from service import logs

    logs.configure(settings.log_level, settings.log_format)


@app.command()
def worker() -> None:
    """Run queued jobs for servers that only queue them (FEWSTEP_JOB_WORK=false), with the same table and folders."""
    settings = _settings()
    from service.jobs.base import JobsUnavailable
    from service.jobs.service import make_supervisor, prepare
    from service.jobs.supervisor import work_forever
    from service.jobs.table import JobTable

    _log_as(settings)
    try:
        job_settings = settings.job_settings()
        table = JobTable(job_settings.url)
        supervisor = make_supervisor(job_settings, table)
        prepare(job_settings, table, works=True)
    except (ValueError, JobsUnavailable) as error:
        fail(error, 2)

    async def work() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await work_forever(supervisor, stop)

    asyncio.run(work())
    table.close()


@app.command(context_settings=PASS_ON, add_help_option=False)
def evaluate(context: typer.Context) -> None:
    """Measure students against their base: JSON, contact sheets, curves and an HTML report (see evaluate --help)."""
    arguments = _with_store(context.args)
    if not any(argument == "--out" or argument.startswith("--out=") for argument in arguments):
        arguments += ["--out", "runs/evaluation"]
    _become(context, "distillers.evaluation", arguments)


@app.command(context_settings=PASS_ON, add_help_option=False)
def calibrate(context: typer.Context) -> None:
    """Find which of the base's first steps makes a student's images most diverse (see calibrate --help)."""
    _become(context, "distillers.evaluation.calibrate", _with_store(context.args))


@app.command(context_settings=PASS_ON, add_help_option=False)
def average(context: typer.Context) -> None:
    """Publish the weighted mean of several students' weights: average NAME STUDENT[:COUNT]... (see average --help)."""
    _publish(context, "distillers.averaging", context.args)  # the other arguments are students, not aliases


@app.command(context_settings=PASS_ON, add_help_option=False)
def extract(context: typer.Context) -> None:
    """Publish the difference of a student from its base as a small LoRA: extract NAME STUDENT (see extract --help)."""
    _publish(context, "distillers.extraction", context.args)  # as above


@app.command(context_settings=PASS_ON, add_help_option=False)
def distill(context: typer.Context) -> None:
    """Run one job in this terminal: distill JOB.toml [--folder DIR] [--resume] (see distill --help)."""
    if context.args[:1] in (["check"], ["methods"]):
        _become(context, "distillers", context.args)
    else:
        _publish(context, "distillers", names_of_job(context.args))


@app.command()
def models(
    server: Annotated[str | None, typer.Option(help="List this server's models instead of the store's.")] = None,
) -> None:
    """List the models that can generate images."""
    columns = ["model", "kind", "base", "method", "steps"]
    if server is not None:
        with client_of(server) as client:
            found = client.models()
        show_table(columns, [[m["id"], m["kind"], m["base"], m["method"], step_counts(m["steps"])] for m in found])
        return
    settings = _settings()
    from weights.bundled import STUDENTS
    from weights.store import Store

    rows: list[list[Any]] = [[base, "base", None, None, "any"] for base in settings.bases]
    rows += [
        [student.name, "student", student.base.id, student.method, step_counts(sorted(student.schedules))]
        for student in Store(settings.store, STUDENTS).list()
    ]
    show_table(columns, rows)


@app.command()
def draw(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="File to write: PNG, JPEG or WebP; numbered if there are several.")
    ],
    model: Annotated[str | None, typer.Option(help="A name from `fewstep models`.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, max=100, help="Number of steps: 1 to 4 for students.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first image; the others count up from it.")] = 0,
    n: Annotated[int, typer.Option("-n", min=1, max=10, help="Number of images.")] = 1,
    diversity: Annotated[bool, typer.Option(help="Let the base do the first step.")] = False,
    server: Annotated[str | None, typer.Option(help="Use this server instead of this process.")] = None,
) -> None:
    """Generate images from a prompt."""
    if out.suffix.lower() not in {".png", ".jpg", ".jpeg", ".webp"}:
        fail(f"--out {out}: give the name of a .png, .jpg or .webp file", 2)
    began = time.perf_counter()
    if server is not None:
        with client_of(server) as client:
            options = {"model": model, "steps": steps, "seed": seed, "n": n, "diversity": diversity}
            pictures = client.draw(prompt, **options).pictures
    else:
        pictures = _draw_here(prompt, tuple(range(seed, seed + n)), model, steps, diversity)
    for index, picture in enumerate(pictures):
        path = out if n == 1 else out.with_stem(f"{out.stem}-{index + 1}")
        with writing(path):
            picture.save(path)
        typer.echo(path)
    typer.echo(f"{time.perf_counter() - began:.1f} s", err=True)


def _draw_here(
    prompt: str, seeds: tuple[int, ...], model: str | None, steps: int | None, diversity: bool
) -> "list[Image.Image]":
    """Generate with an engine in this process."""
    settings = _settings()
    from service.engine.base import DiversityWish, DrawRequest, EngineError
    from service.here import draw_here, reason

    wish = DiversityWish() if diversity else None
    request = DrawRequest(prompt=prompt, seeds=seeds, model=model, steps=steps, diversity=wish)
    try:
        return [drawn.image for drawn in draw_here(settings, lambda engine: engine.generate(request))]
    except (EngineError, ValueError) as error:
        fail(reason(error))


@app.command()
def export(
    name: Annotated[str, typer.Argument(help="A student of the store.")],
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
    steps: Annotated[int, typer.Option(min=1, help="Step count of the pipeline.")] = 4,
    base: Annotated[
        str | None, typer.Option(help="Where its base is now: a name, folder or hub id; as in training if left out.")
    ] = None,
) -> None:
    """Write a student as a plain diffusers pipeline, which runs without Fewstep."""
    settings = _settings()
    from weights.bundled import STUDENTS
    from weights.export import export as export_student
    from weights.store import Store, StoreError

    try:
        typer.echo(export_student(Store(settings.store, STUDENTS), name, folder, steps, base))
    except (StoreError, OSError, ValueError) as error:
        fail(error)


@app.command()
def delete(
    name: Annotated[str, typer.Argument(help="A student of the store; a router before its members.")],
    store: Annotated[Path | None, typer.Option(help="The store, if not that of the settings.")] = None,
    server: Annotated[str | None, typer.Option(help="Delete it on this server, from the server's store.")] = None,
) -> None:
    """Delete a student permanently. A running server finishes the images that it is generating with it."""
    if server is not None:
        if store is not None:
            fail("--store and --server cannot be combined, since a server has its own store", 2)
        with client_of(server) as client:
            client.request("DELETE", f"/v1/models/{quote(name, safe='')}")
    else:
        _delete_here(name, store)
    typer.echo(f"{name} is deleted")


def _delete_here(name: str, store: Path | None) -> None:
    settings = _settings(store=store)
    from service.deletion import NoSuchModel, StillNeeded, delete_student, job_needing
    from service.jobs.base import JobsUnavailable
    from weights.bundled import STUDENTS
    from weights.store import Store, StoreError

    try:
        delete_student(name, Store(settings.store, STUDENTS), settings, job_needing(name, settings))
    except (NoSuchModel, StillNeeded, StoreError, JobsUnavailable) as error:
        fail(error)


@app.command()
def demo(
    folder: Annotated[
        Path | None,
        typer.Option(help="Folder for student, logs and contact sheet; a new one under runs/ if left out."),
    ] = None,
    recipe: Annotated[str, typer.Option(help="The job: a TOML or JSON file, or a recipe's name.")] = "demo",
) -> None:
    """Distil the bundled teacher for some minutes, serve the student, and draw one labelled contact sheet."""
    from service.demo import DemoFailed, run_demo

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unlike the signal itself, an exit stops the demo's server
    try:
        typer.echo(run_demo(folder, read_spec(recipe)))
    except (DemoFailed, ValueError) as error:
        fail(error)


if __name__ == "__main__":
    app()
