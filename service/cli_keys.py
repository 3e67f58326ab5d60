"""``fewstep keys ...``: the API keys in FEWSTEP_KEYS_FILE. A running server picks up every change by itself."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

from service.cli_jobs import fail, settings, show_table

keys_app = typer.Typer(help="Manage the server's API keys (FEWSTEP_KEYS_FILE).", no_args_is_help=True)


def _file() -> Path:
    path = settings().keys_file
    if path is None:
        fail(
            "FEWSTEP_KEYS_FILE is not set: set it to the path of the keys file, for this command and for the server", 2
        )
    return path


@keys_app.command()
def create(
    name: Annotated[str, typer.Argument(help="Whose key it is: letters, digits and . _ @ -")],
    scope: Annotated[list[str], typer.Option(help="generate, jobs or admin; repeat it for more.")],
    days: Annotated[float | None, typer.Option(min=0, help="Days until it expires; never if left out.")] = None,
    requests_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Requests per minute, instead of the server's setting.")
    ] = None,
    pictures_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Images per minute, instead of the server's setting.")
    ] = None,
) -> None:
    """Create a key and print it. It is shown only this once: the file stores only its hash."""
    from service.keys import SCOPES, KeyFileError, create_key

    wrong = [item for item in scope if item not in SCOPES]
    if wrong:
        fail(f"--scope {wrong[0]}: use one of {', '.join(SCOPES)}", 2)
    path = _file()
    try:
        key, record = create_key(
            path,
            name,
            [item for item in SCOPES if item in scope],
            expires_at=None if days is None else datetime.now(UTC) + timedelta(days=days),
            requests_per_minute=requests_per_minute,
            pictures_per_minute=pictures_per_minute,
        )
    except (KeyFileError, OverflowError) as error:
        fail(error)
    typer.echo(key)
    typer.echo(f"key {record.id} of {name} is in {path}; it is shown only this once", err=True)


@keys_app.command("list")
def list_keys() -> None:
    """List all keys, without their secrets."""
    from service.keys import KeyFileError, read_keys

    try:
        keys = read_keys(_file())
    except KeyFileError as error:
        fail(error)
    now = datetime.now(UTC)
    rows = []
    for key in keys:
        expiry = None if key.expires_at is None else f"{key.expires_at:%Y-%m-%d %H:%M}"
        if key.is_expired(now):
            expiry = f"{expiry}, expired"
        limits = (key.requests_per_minute, key.pictures_per_minute)
        rows.append(
            [key.id, key.name, f"...{key.last4}", ", ".join(key.scopes), f"{key.created_at:%Y-%m-%d}", expiry, *limits]
        )
    show_table(["id", "name", "key", "scopes", "created", "expires (UTC)", "requests/min", "images/min"], rows)


@keys_app.command()
def revoke(key: Annotated[str, typer.Argument(help="The key's id or name.")]) -> None:
    """Remove a key from the file; it stops working with the next request."""
    from service.keys import KeyFileError, revoke_key

    try:
        record = revoke_key(_file(), key)
    except KeyFileError as error:
        fail(error)
    typer.echo(f"{record.id} ({record.name}) is revoked")
