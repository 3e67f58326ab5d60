"""Converted and compiled programs on disk, so that a server that starts again need not make them again.

Everything lies in a folder of the content's own key, is written beside its place and renamed into it, and carries its
sha256: what was cut off, altered or half written is made anew, never used. The whole folder may go at any time, and no disk
has to take anything: what cannot be kept is made again.
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
"""Begins the names of folders that are being written or deleted."""
ABANDONED = 3600.0
"""Seconds after which such a folder is what a process left that was killed."""


class Cache:
    """Folders of files, by key. Several processes may use one at a time.

    Args:
        folder: made where it does not exist. Where nothing can be written there, a folder takes its place that lasts as
            long as this process.
        limit: bytes for all of them; the one that was used longest ago goes. None: no limit.
    """

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        self.folder, self.limit = folder, limit
        self._told = False
        """Whether the log says already that nothing can be written."""
        try:
            self._make_folder()
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            self.folder = Path(tempfile.mkdtemp(prefix="fewstep-"))
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
            log.warning("FEWSTEP_CACHE: nothing will outlast this process: %s", error)
        for left in self.folder.glob(f"{ASIDE}*"):
            with contextlib.suppress(OSError):  # another process may delete it as well
                if left.stat().st_mtime < time.time() - ABANDONED:
                    shutil.rmtree(left)

    def get(self, key: str) -> Path | None:
        """The folder of that key, all of whose files are as they were written; None where there is none."""
        folder = self.folder / key
        try:
            digests = json.loads((folder / DIGESTS).read_text())
            for name, digest in digests.items():
                if _sha256(folder / name) != digest:
                    raise ValueError(f"{name} is not what was written")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, AttributeError) as error:
            log.warning("%s is broken and will be made again: %s", folder, error)
            return None
        with contextlib.suppress(OSError):  # a disk that cannot be written, or somebody has just removed it
            os.utime(folder)  # used now
        return folder

    def put(self, key: str, write: Callable[[Path], None]) -> Path:
        """The folder of that key, with what ``write`` writes into it; nothing stays of it where that fails.

        Raises:
            OSError: the disk does not take it. Besides, whatever ``write`` raises.
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
            except OSError:  # something is there already: another process's, as good as ours, or something broken
                if self.get(key) is None:
                    self._remove(target)
                    os.replace(staged, target)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        self._told = False
        self._make_room(target)
        return target

    def cannot_keep(self, what: object, error: Exception) -> None:
        """Log that it could not be written; the first time, until something can be again: each model would say the same."""
        log.log(logging.DEBUG if self._told else logging.WARNING, "%s is not kept in FEWSTEP_CACHE: %s", what, error)
        self._told = True

    def _make_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # what lies here is run

    def _make_room(self, kept: Path) -> None:
        """Delete what was used longest ago, but for ``kept``. Who has such files open goes on reading them."""
        if self.limit is None:
            return
        with contextlib.suppress(OSError):  # another process clears up as well
            folders = [path for path in self.folder.iterdir() if path.is_dir() and not path.name.startswith(ASIDE)]
            used = sorted(
                (path.stat().st_mtime, sum(file.stat().st_size for file in path.iterdir()), path) for path in folders
            )
            total = sum(size for _, size, _ in used)
            for _, size, path in used:
                if total > self.limit and path != kept:
                    log.info("%s goes: converted models take more than %d bytes", path, self.limit)
                    self._remove(path)
                    total -= size

    def get_file(self, path: Path) -> bytes | None:
        """What `put_file` wrote; None where there is nothing, or something else."""
        try:
            content = path.read_bytes()
        except OSError:
            return None
        digest, body = content[:32], content[32:]
        if hashlib.sha256(body).digest() != digest:
            log.warning("%s is broken and will be made again", path)
            return None
        return body

    def put_file(self, path: Path, body: bytes) -> None:
        """Write a file, in the place of an older one. A disk that takes no more is no error: the file is only missing."""
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
        """Out of the way at once, however long it takes to delete."""
        aside = Path(tempfile.mkdtemp(prefix=ASIDE, dir=self.folder))
        os.replace(path, aside / path.name)
        shutil.rmtree(aside, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
