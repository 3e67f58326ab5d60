"""``fewstep jobs ...``: managing jobs on a running server, and helpers that the other commands share."""

import json
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from service.client import Client
    from service.settings import Settings

SERVER = "http://127.0.0.1:8000"
JOBS = "/v1/distillation/jobs"
CHECK_SECONDS = 20.0
"""Seconds that checking one job of a batch may take on a busy server."""

jobs_app = typer.Typer(help="Manage the distillation jobs of a running server.", no_args_is_help=True)
Server = Annotated[str, typer.Option("--server", help="Address of a running server.")]
JobId = Annotated[str, typer.Argument(metavar="ID", help="The job's id: distill-...")]


def fail(message: object, status: int = 1) -> NoReturn:
    """Print a message to standard error and exit."""
    typer.secho(f"error: {message}", fg=typer.colors.RED, err=True)
    raise typer.Exit(status)


def settings(**overrides: Any) -> "Settings":
    """The settings from the environment; exits the command if they are invalid."""
    from service.settings import BadSettings, read_settings

    try:
        return read_settings(**overrides)
    except BadSettings as error:
        fail(error, 2)


@contextmanager
def client_of(server: str) -> Iterator["Client"]:
    """A client for the block, with the key in FEWSTEP_API_KEY if set; a refusal by the server exits the command."""
    from service.client import Client, ServerError

    key = settings().api_key
    try:
        with Client(server, key=key.get_secret_value() if key is not None else None) as client:
            yield client
    except ServerError as error:
        fail(error)


def show_table(columns: list[str], rows: list[list[Any]]) -> None:
    """Print a plain table; its lines are wide enough for scripts if the output is not a terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def read_spec(source: str) -> dict[str, Any]:
    """Read a job spec, or a batch, from a TOML or JSON file or from the recipe of that name.

    Raises:
        ValueError: there is no such file, or it cannot be parsed.
    """
    package = find_spec("distillers")  # located, not imported
    folders = list(package.submodule_search_locations or []) if package else []
    recipes = {path.stem: path for folder in folders for path in sorted(Path(folder, "recipes").glob("*.toml"))}
    path = Path(source) if Path(source).is_file() else recipes.get(source)
    if path is None:
        raise ValueError(f"{source!r} is neither a file nor a recipe; available: {', '.join(recipes)}")
    try:
        text = path.read_text(encoding="utf-8")
        spec: object = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(spec, dict):
        raise ValueError(f'{path} is not a job: give an object with its fields, or a batch {{"jobs": [...]}}')
    return spec


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Exit the command if the block cannot write the file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        fail(f"{path} cannot be written: {error}")


@jobs_app.command("list")
def list_jobs(
    server: Server = SERVER,
    limit: Annotated[int, typer.Option(min=1, max=100, help="Number of jobs, newest first.")] = 20,
) -> None:
    """List the newest jobs."""
    with client_of(server) as client:
        jobs = client.request("GET", JOBS, limit=limit)["data"]
    rows = [[job["id"], job["status"], job["student"], job["method"], _done(job["progress"])] for job in jobs]
    show_table(["id", "status", "student", "method", "progress"], rows)


def _done(progress: dict[str, Any] | None) -> str | None:
    return None if progress is None else f"{progress['step']}/{progress['iterations']}"


def _print(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


@jobs_app.command()
def show(job_id: JobId, server: Server = SERVER) -> None:
    """Show one job as JSON."""
    with client_of(server) as client:
        _print(client.request("GET", f"{JOBS}/{job_id}"))


@jobs_app.command()
def submit(
    spec: Annotated[str, typer.Argument(help="A TOML or JSON file, or a recipe's name.")],
    student: Annotated[str | None, typer.Option(help="Name to publish under, instead of the job's own.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Print the job's events until it ends.")] = False,
    server: Server = SERVER,
) -> None:
    """Queue a job (or a batch of jobs) and print its id."""
    try:
        body = read_spec(spec)
    except ValueError as error:
        fail(error, 2)
    if student is not None:
        body["student"] = student
    with client_of(server) as client:
        batch = body.get("jobs")  # the server checks its jobs one after another, each in a process
        answer = client.request(
            "POST", JOBS, body, patience=CHECK_SECONDS * len(batch) if isinstance(batch, list) else 0
        )
        added = answer["data"] if answer["object"] == "list" else [answer]
        for job in added:
            typer.echo(job["id"])
        ended_well = [_follow(client, job["id"]) for job in added if follow]
    if not all(ended_well):
        raise typer.Exit(1)


def _follow(client: "Client", job_id: str) -> bool:
    """Print a job's events until it ends; return whether it succeeded."""
    for kind, event in client.follow(job_id):
        if kind == "job":
            error = event["error"] or {}
            typer.echo(f"{job_id} {event['status']} {error.get('message', '')}".rstrip())
            return bool(event["status"] == "succeeded")
        typer.echo(f"{event['created_at']} {event['message']}")
    return False


@jobs_app.command()
def follow(job_id: JobId, server: Server = SERVER) -> None:
    """Show a job's events until it ends; the exit status is 0 if it succeeded."""
    with client_of(server) as client:
        if not _follow(client, job_id):
            raise typer.Exit(1)


@jobs_app.command()
def cancel(job_id: JobId, server: Server = SERVER) -> None:
    """Cancel a job; a running job saves a checkpoint first."""
    _change(server, job_id, "cancel")


@jobs_app.command()
def resume(job_id: JobId, server: Server = SERVER) -> None:
    """Queue a failed or cancelled job again; it continues from its last checkpoint."""
    _change(server, job_id, "resume")


def _change(server: str, job_id: str, verb: str) -> None:
    with client_of(server) as client:
        job = client.request("POST", f"{JOBS}/{job_id}/{verb}")
    state = "running, stop requested" if job["status"] == "running" else job["status"]
    typer.echo(f"{job['id']} {state}")


def step_counts(steps: list[int]) -> str:
    """Step counts for a table; a model with an empty list supports any number."""
    return ", ".join(map(str, steps)) or "any"
