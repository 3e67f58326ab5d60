"""Converted and compiled programs on disk, so that a restarted server need not build them again.

An entry is a folder whose name is a key of its content. It is written elsewhere, renamed into place, and carries sha256
digests: an entry that is truncated, altered or half written is built again and never used. The whole cache may be
deleted at any time, and no write has to succeed: what cannot be stored is built again.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

DIGESTS = "digests.json"
ASIDE = ".aside-"
"""Prefix of the names of folders that are being written or deleted."""
ABANDONED = 3600.0
"""Age in seconds at which such a folder counts as left behind by a killed process."""


class Cache:
    """A cache of folders of files, by key. Several processes may use one cache at the same time.

    Args:
        folder: created if missing. If it is not writable, a temporary folder replaces it for the life of this process.
        limit: total size in bytes, enforced by deleting the least recently used entries; None for no limit.
    """

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        self.folder, self.limit = folder, limit
        self._told = False
        """Whether a failure to write has been logged already."""
        try:
            self._make_folder()
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            self.folder = Path(tempfile.mkdtemp(prefix="fewstep-"))
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
            log.warning("FEWSTEP_CACHE: converted models cannot be kept for the next start: %s", error)
        for left in self.folder.glob(f"{ASIDE}*"):
            with contextlib.suppress(OSError):  # another process may be deleting it too
                if left.stat().st_mtime < time.time() - ABANDONED:
                    shutil.rmtree(left)

    def get(self, key: str) -> Path | None:
        """The folder of this key, whose files have all been verified; None if there is none."""
        folder = self.folder / key
        try:
            digests = json.loads((folder / DIGESTS).read_text())
            for name, digest in digests.items():
                if _sha256(folder / name) != digest:
                    raise ValueError(f"{name} has changed since it was written")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, AttributeError) as error:
            log.warning("%s is damaged and will be made again: %s", folder, error)
            return None
        with contextlib.suppress(OSError):  # a read-only disk, or the folder has just been removed
            os.utime(folder)  # mark as used now
        return folder

    def put(self, key: str, write: Callable[[Path], None]) -> Path:
        """Create the folder of this key with what ``write`` writes into it. If that fails, nothing is left behind.

        Raises:
            OSError: the disk does not accept it. Anything that ``write`` raises is passed on too.
        """
        target = self.folder / key
        self._make_folder()
        staged = Path(tempfile.mkdtemp(prefix=ASIDE, dir=self.folder))
        try:
            write(staged)
            digests = {path.name: _sha256(path) for path in sorted(staged.iterdir())}
            (staged / DIGESTS).write_text(json.dumps(digests))
            try:
                os.replace(staged, target)
            except OSError:  # something is there: another process's equally good entry, or a broken one
                if self.get(key) is None:
                    self._remove(target)
                    os.replace(staged, target)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        self._told = False
        self._make_room(target)
        return target

    def cannot_keep(self, what: object, error: Exception) -> None:
        """Log that something could not be stored.

        Only the first failure is a warning until a write succeeds again: every model would repeat it.
        """
        log.log(logging.DEBUG if self._told else logging.WARNING, "%s is not kept in FEWSTEP_CACHE: %s", what, error)
        self._told = True

    def _make_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # what is stored here gets executed

    def _make_room(self, kept: Path) -> None:
        """Delete the least recently used entries except ``kept``. Files that are open elsewhere stay readable."""
        if self.limit is None:
            return
        with contextlib.suppress(OSError):  # another process may be clearing up too
            folders = [path for path in self.folder.iterdir() if path.is_dir() and not path.name.startswith(ASIDE)]
            used = sorted(
                (path.stat().st_mtime, sum(file.stat().st_size for file in path.iterdir()), path) for path in folders
            )
            total = sum(size for _, size, _ in used)
            for _, size, path in used:
                if total > self.limit and path != kept:
                    log.info("deleting %s: converted models take more than %d bytes", path, self.limit)
                    self._remove(path)
                    total -= size

    def get_file(self, path: Path) -> bytes | None:
        """What `put_file` wrote; None if the file is missing or damaged."""
        try:
            content = path.read_bytes()
        except OSError:
            return None
        digest, body = content[:32], content[32:]
        if hashlib.sha256(body).digest() != digest:
            log.warning("%s is damaged and will be made again", path)
            return None
        return body

    def put_file(self, path: Path, body: bytes) -> None:
        """Write a file, replacing an older one. A disk that rejects it is not an error: the file is just missing."""
        staged = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            staged.write_bytes(hashlib.sha256(body).digest() + body)
            os.replace(staged, path)
        except OSError as error:
            self.cannot_keep(path, error)
            with contextlib.suppress(OSError):  # its folder may be gone
                staged.unlink(missing_ok=True)
        else:
            self._told = False

    def _remove(self, path: Path) -> None:
        """Move it out of the way at once, however long deleting it takes."""
        aside = Path(tempfile.mkdtemp(prefix=ASIDE, dir=self.folder))
        os.replace(path, aside / path.name)
        shutil.rmtree(aside, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
