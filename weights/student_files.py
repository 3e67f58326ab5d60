"""A student's files: which are allowed, how they are hashed, and whether they are as published."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from weights.contracts import FORMAT_VERSION, FileRecord, StudentManifest

MANIFEST = "student.json"
WEIGHTS = ".safetensors"
HARMLESS = frozenset({".md", ".png", ".txt"})
ALLOWED = HARMLESS | {".json", WEIGHTS}
NOT_LOADED = (
    "safety_checker/*", "*.fp16.safetensors", "*.non_ema.safetensors", "*.fp16-*.safetensors", "*.non_ema-*.safetensors",
)  # fmt: skip
"""Files of a pipeline that are not loaded: the safety checker, and fp16 or non-EMA weights, whole or in shards."""
_CHUNK = 1 << 20


class StoreError(Exception):
    """Base class of the store's errors; the message says what failed and how to proceed."""


class NotFound(StoreError):
    """No student has that name."""


class AlreadyExists(StoreError):
    """The name is taken, and replacement was not requested."""


class Corrupt(StoreError):
    """The files are not as published."""


class Unreadable(Corrupt):
    """The disk does not give the files, which may be as published."""


class Forbidden(StoreError):
    """The request could leave the folder, run code, or change what is read-only."""


class DiskFull(StoreError):
    """No space is left; nothing was changed."""


def digest_folder(path: Path) -> str:
    """One sha256 for all weights in a folder: the hash of the lines ``sha256  relative/path``, sorted by path.

    It covers every safetensors file at any depth and follows symlinks (the hub's cache consists of them), so it
    identifies weights wherever they are stored.

    Raises:
        NotFound: the folder holds no safetensors file.
    """
    root = Path(path)
    walked = (Path(parent) / name for parent, _, names in os.walk(root, followlinks=True) for name in names)
    return _digest(root, walked)


def digest_base(path: Path) -> str:
    """Like `digest_folder`, but only over what a diffusers pipeline loads: its components' weights, each in a folder.

    Single-file checkpoints, other precisions and a safety checker may be added or removed without changing the digest.

    Raises:
        NotFound: the folder holds no such file.
    """
    root = Path(path)
    parts = root.glob(f"*/*{WEIGHTS}")
    return _digest(root, (file for file in parts if not any(file.match(pattern) for pattern in NOT_LOADED)))


def readable(path: Path) -> None:
    """Give a file, or all files below a folder, default permissions: safetensors' are for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            file.chmod(0o666 & ~mask)


def _digest(root: Path, files: Iterable[Path]) -> str:
    weights = [file for file in files if file.suffix == WEIGHTS and file.is_file()]
    if not weights:
        raise NotFound(
            f"{root} holds no {WEIGHTS} file that would be loaded: save the pipeline again with safe_serialization=True and "
            "without a variant (pickles, and files such as *.fp16.safetensors, are not read)"
        )
    records = sorted((path.relative_to(root).as_posix(), file_sha256(path)) for path in weights)
    lines = [f"{sha256}  {path}\n" for path, sha256 in records]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """A file's sha256 in hexadecimal; computed again only if its size, mtime or inode changes."""
    return _sha256(_Content.of(path))


class _Content(NamedTuple):
    """Identifies a file's content, as a cache key: it changes when size, mtime or inode do."""

    path: Path
    mtime_ns: int
    size: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> "_Content":
        stat = path.stat()
        return cls(path.absolute(), stat.st_mtime_ns, stat.st_size, stat.st_ino)


@lru_cache(maxsize=4096)
def _sha256(content: _Content) -> str:
    with open(content.path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path, name: str) -> StudentManifest:
    """The manifest in a student's folder; read again only if its size, mtime or inode changes.

    Raises:
        Corrupt: it is not JSON, has another format version, is incomplete, or belongs to another student.
        Forbidden: it lists a file outside the folder or of a kind that is not allowed.
    """
    file = folder / MANIFEST
    try:
        return _manifest(_Content.of(file), name)
    except OSError as error:
        raise Unreadable(f"{file} cannot be read ({error}): publish the student again") from error


@lru_cache(maxsize=1024)
def _manifest(written: _Content, name: str) -> StudentManifest:
    file = written.path
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:  # the latter where it is nested too deeply
        raise Corrupt(f"{file} cannot be read as JSON ({error}): publish the student again") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise Corrupt(f"{file} has format version {version!r}, but this code reads {FORMAT_VERSION}: update fewstep")
    try:
        manifest = StudentManifest.model_validate(content)
    except ValidationError as error:
        raise Corrupt(f"{file} is not a valid manifest: {error}") from error
    if manifest.name != name:
        raise Corrupt(f"{file} names the student {manifest.name!r}, but its folder is {name!r}: rename one of them")
    for path in manifest.files:
        _check_path(path)
    if manifest.router is None and not any(path.endswith(WEIGHTS) for path in manifest.files):
        raise Corrupt(f"{file} lists no {WEIGHTS} file: publish the student through the store")
    return manifest


def _check_path(path: str) -> None:
    """Reject a relative path that leaves the folder, is hidden, or has a type that could run code."""
    pure = PurePosixPath(path)
    unsafe = pure.is_absolute() or "\\" in path or "\0" in path or str(pure) != path
    if unsafe or any(part.startswith(".") for part in pure.parts):
        raise Forbidden(f"file {path!r}: give a plain relative path, without '..', hidden parts or backslashes")
    if pure.suffix not in ALLOWED:
        raise Forbidden(
            f"file {path!r} is of a kind that a student may not hold: use {', '.join(sorted(ALLOWED))} "
            "(weights as safetensors, since a pickle can run any code when it is loaded)"
        )


def _files(folder: Path) -> Iterator[str]:
    """Relative paths of everything in a folder except folders; includes symlinks."""
    for parent, folders, names in os.walk(folder, followlinks=False):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        yield from ((Path(parent) / name).relative_to(folder).as_posix() for name in (*names, *links))


def publishable(folder: Path, weights: bool = True) -> list[str]:
    """The files of a folder that a student can be published from, relative and sorted, without its student.json.

    Args:
        folder: the folder to publish from.
        weights: whether weights are required; a routed student has none of its own.

    Raises:
        NotFound: there is no such folder.
        Forbidden: a file of a kind that is not allowed, a symlink, or a hidden file.
        Corrupt: a safetensors file does not parse, or a required one is missing.
    """
    if not folder.is_dir():
        raise NotFound(f"{folder} is not a folder, so there is nothing to publish")
    paths = sorted(set(_files(folder)) - {MANIFEST})
    for path in paths:
        _check_path(path)
        if (folder / path).is_symlink() or not (folder / path).is_file():
            raise Forbidden(f"{folder / path} is a symlink or not a regular file: copy the file itself into the folder")
        _check_weights(folder / path)
    if weights and not any(path.endswith(WEIGHTS) for path in paths):
        raise Corrupt(f"{folder} holds no {WEIGHTS} file: a student without weights cannot be published")
    return paths


def _check_weights(path: Path) -> None:
    """Reject a safetensors file whose header does not parse or does not match the file's length."""
    if path.suffix != WEIGHTS:
        return
    try:
        _parse_header(_Content.of(path))
    except (SafetensorError, OSError) as error:
        raise Corrupt(f"{path} is not a complete safetensors file ({error}): write it again") from error


@lru_cache(maxsize=4096)
def _parse_header(content: _Content) -> None:
    with safe_open(content.path, framework="numpy") as file:
        file.keys()


def verify(folder: Path, manifest: StudentManifest) -> None:
    """Check every file of a student against its manifest.

    Raises:
        Corrupt: a file is missing, differs in size or sha256, or does not parse.
        Forbidden: a file is a symlink, or a file that could be loaded is not in the manifest.
    """
    advice = f"publish student {manifest.name!r} again, or delete it"
    for path, record in manifest.files.items():
        file = folder / path
        if file.resolve() != file:
            raise Forbidden(f"{file} is, or is below, a symlink: {advice}")
        if not file.is_file():
            raise Corrupt(f"{file} is missing: {advice}")
        size = file.stat().st_size
        if size != record.size:
            raise Corrupt(f"{file} has {size} bytes, but {record.size} were published: {advice}")
        found = file_sha256(file)
        if found != record.sha256:
            raise Corrupt(f"{file} has sha256 {found}, but {record.sha256} was published: {advice}")
        _check_weights(file)
    for path in _files(folder):
        if path not in manifest.files and path != MANIFEST and PurePosixPath(path).suffix not in HARMLESS:
            raise Forbidden(f"{folder / path} is not in the manifest, but could be loaded: remove it, or {advice}")


def copy_file(source: Path, target: Path) -> FileRecord:
    """Copy a file durably, and return the record of what was written."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with open(source, "rb") as reader, open(target, "xb") as writer:
        while chunk := reader.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
            writer.write(chunk)
        writer.flush()
        os.fsync(writer.fileno())
    return FileRecord(sha256=digest.hexdigest(), size=size)
