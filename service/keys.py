"""API keys: the file of their hashes, what each key may do, and which key a request has.

A key is 32 random bytes after a public id, so one round of SHA-256 is enough at rest: there is nothing guessable that a
slow hash would protect, and every request pays for the hash. The file never contains a key itself.
"""

import contextlib
import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Self, get_args

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

log = logging.getLogger(__name__)

Scope = Literal["generate", "jobs", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
FORM = re.compile(r"fs_([0-9a-f]{12})_[0-9a-f]{64}")
_NOBODY = hashlib.sha256(secrets.token_bytes(32)).hexdigest()
"""Digest to compare a key of an unknown id with, so that this takes as long as for a known id."""


class KeyFileError(ValueError):
    """The keys file cannot be used as requested; the message says why, and never contains a key."""


class ApiKey(BaseModel):
    """What the file records about a key."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(
        pattern=r"^[0-9a-f]{12}$", description="public: it is part of the key, and appears in logs and metrics"
    )
    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._@-]+$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="digest of the whole key")
    last4: str = Field(pattern=r"^[0-9a-f]{4}$", description="the key's last characters, to tell keys apart by eye")
    scopes: tuple[Scope, ...] = Field(min_length=1)
    created_at: AwareDatetime
    expires_at: AwareDatetime | None = None
    requests_per_minute: int | None = Field(None, ge=1, le=1_000_000, description="the server's setting if left out")
    pictures_per_minute: int | None = Field(None, ge=1, le=1_000_000, description="the server's setting if left out")

    def is_expired(self, now: datetime) -> bool:
        """Whether this key has expired."""
        return self.expires_at is not None and now >= self.expires_at


class _Content(BaseModel):
    """The content of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    keys: tuple[ApiKey, ...] = ()

    @model_validator(mode="after")
    def _are_distinct(self) -> Self:
        for values in ([key.id for key in self.keys], [key.name for key in self.keys]):
            twice = sorted({value for value in values if values.count(value) > 1})
            if twice:
                raise ValueError(f"{twice[0]!r} appears twice")
        return self


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """The keys in a file.

    Raises:
        KeyFileError: it cannot be read, is not a keys file, or is writable by others, who could add keys of their own.
    """
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & 0o022:
                raise KeyFileError(f"{path} can be written by other users, who could add keys: chmod 600 {path}")
            return _Content.model_validate_json(file.read()).keys
    except OSError as error:
        hint = "; `fewstep keys create` creates it" if isinstance(error, FileNotFoundError) else ""
        raise KeyFileError(f"{path} cannot be read: {error.strerror}{hint}") from error
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise KeyFileError(f"{path} is not a valid keys file: {where}: {first['msg']}") from None


def create_key(
    path: Path,
    name: str,
    scopes: Sequence[Scope],
    *,
    expires_at: datetime | None = None,
    requests_per_minute: int | None = None,
    pictures_per_minute: int | None = None,
) -> tuple[str, ApiKey]:
    """Add a key to the file, which is created (mode 0600) if it does not exist.

    Returns:
        The key, which cannot be shown again, and its record in the file.

    Raises:
        KeyFileError: the file cannot be read or written, the name is taken, or a value is not allowed.
    """
    key_id = secrets.token_hex(6)
    key = f"fs_{key_id}_{secrets.token_hex(32)}"
    try:
        record = ApiKey(
            id=key_id,
            name=name,
            sha256=_digest(key),
            last4=key[-4:],
            scopes=tuple(dict.fromkeys(scopes)),
            created_at=datetime.now(UTC),
            expires_at=expires_at,
            requests_per_minute=requests_per_minute,
            pictures_per_minute=pictures_per_minute,
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise KeyFileError(f"{first['loc'][0]}: {first['msg']}, got {first['input']!r}") from None
    with _changing(path) as keys:
        if any(name == other.name for other in keys):
            raise KeyFileError(f"{path} already has a key named {name!r}: choose another name, or revoke that key")
        keys.append(record)
    return key, record


def revoke_key(path: Path, which: str) -> ApiKey:
    """Remove a key, given by its id or name, from the file; a running server refuses it from the next request on.

    Raises:
        KeyFileError: the file cannot be read or written, or has no such key.
    """
    with _changing(path) as keys:
        found = [key for key in keys if which in (key.id, key.name)]
        if not found:
            known = ", ".join(key.name for key in keys) or "none"
            raise KeyFileError(f"no key in {path} has the id or name {which!r}; available: {known}")
        keys.remove(found[0])
    return found[0]


@contextlib.contextmanager
def _changing(path: Path) -> Iterator[list[ApiKey]]:
    """The file's keys, to change in place; written if the block succeeds. One process at a time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
    except OSError as error:
        raise KeyFileError(f"{path} cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        keys = list(read_keys(path)) if path.exists() else []
        yield keys
        try:
            _write(path, _Content(keys=tuple(keys)))
            os.fsync(folder)
        except OSError as error:
            raise KeyFileError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        os.close(folder)


def _write(path: Path, content: _Content) -> None:
    """Replace the file atomically. It keeps its owner, who may be the server's user even if root creates the keys."""
    number, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with os.fdopen(number, "w", encoding="utf-8") as file:
            json.dump(content.model_dump(mode="json", exclude_none=True), file, indent=2)
            file.write("\n")
            file.flush()
            with contextlib.suppress(FileNotFoundError, PermissionError):
                before = path.stat()
                os.fchown(file.fileno(), before.st_uid, before.st_gid)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("ascii")).hexdigest()


def _now() -> datetime:
    return datetime.now(UTC)


class KeyRing:
    """The keys of a file, reloaded whenever the file has changed.

    A deleted file has no keys. If the file becomes unreadable, for example by a mistake in an edit, the previous keys
    stay in use and an error is logged: a mistake must not lock everybody out.

    Args:
        path: the file, which must exist and be valid now.
        clock: returns the current time.

    Raises:
        KeyFileError: see `read_keys`.
    """

    def __init__(self, path: Path, clock: Callable[[], datetime] = _now) -> None:
        self._path = path
        self._clock = clock
        self._stamp = self._look()
        self._keys = {key.id: key for key in read_keys(path)}

    def __len__(self) -> int:
        return len(self._keys)

    def get(self, key_id: str) -> ApiKey | None:
        """The key with this id, if it is still in the file."""
        self._refresh()
        return self._keys.get(key_id)

    def authenticate(self, key: str) -> ApiKey | None:
        """The record of this key; None if the key is wrong, revoked or expired."""
        form = FORM.fullmatch(key)
        if form is None:
            return None
        record = self.get(form[1])
        right = hmac.compare_digest(record.sha256 if record is not None else _NOBODY, _digest(key))
        return record if right and record is not None and not record.is_expired(self._clock()) else None

    def _look(self) -> tuple[int, ...] | None:
        """A stamp that changes whenever the file or its permissions change; None if the file does not exist."""
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return None
        except OSError as error:
            log.error("%s cannot be checked (%s); the previous keys stay in use", self._path, error)
            return self._stamp
        return found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size

    def _refresh(self) -> None:
        stamp = self._look()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = {key.id: key for key in read_keys(self._path)} if stamp is not None else {}
            log.info("%d API keys in %s", len(self._keys), self._path)
        except KeyFileError as error:
            log.error("%s; the previous keys stay in use", error)
