"""The model store on disk: students are published whole or not at all, and verified before they are loaded.

Layout of ``ROOT``::

    NAME -> .versions/NAME.ID     a symlink: the student's current version
    .versions/NAME.ID/            student.json and the files that it lists
    .staging-ID/                  a publish in progress, or left over from a killed one

Publishing copies into a staging folder, flushes every file and folder to disk, renames the staging folder to a version,
and only then points the name at it. Creating a symlink fails if the name is taken, and renaming one over another is
atomic. So exactly one of two concurrent publishers creates a name, a valid student exists at every moment of a
replacement, no lock or database is needed, and a kill at any point leaves the old version current. (A plain folder
cannot be replaced atomically without Linux's RENAME_EXCHANGE, which not every filesystem supports.) A replaced version
stays for a day, for processes that still read it; older leftovers are removed by the next publish.

A student can also be a plain folder, as the bundled ones are; a folder copied into ROOT by hand is found too.
"""

import errno
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from weights.bundled import bundled_bases
from weights.contracts import DistillJob, StudentManifest, check_name
from weights.files import sync_folder, write_file
from weights.student_files import (
    MANIFEST,
    AlreadyExists,
    Corrupt,
    DiskFull,
    Forbidden,
    NotFound,
    StoreError,
    Unreadable,
    copy_file,
    digest_base,
    digest_folder,
    file_sha256,
    publishable,
    read_manifest,
    verify,
)

__all__ = [
    "AlreadyExists",
    "Corrupt",
    "DiskFull",
    "Forbidden",
    "NotFound",
    "Store",
    "StoreError",
    "StudentFolder",
    "Unreadable",
    "digest_base",
    "digest_folder",
    "file_sha256",
]

LEFTOVER_SECONDS = 24 * 3600
FULL = (errno.ENOSPC, errno.EDQUOT)
_VERSIONS = ".versions"
_STAGING = ".staging-"

_log = logging.getLogger(__name__)

_Names = list[str]  # Store.list would shadow the builtin in the class's annotations
_Manifests = list[StudentManifest]
_Paths = list[Path]


@dataclass(frozen=True)
class StudentFolder:
    """A student on disk: verified if it is from `Store.open`, unverified if it is from `Store.find`."""

    path: Path
    """The version's own folder, which stays the same when the name is pointed elsewhere."""
    manifest: StudentManifest


class Store:
    """Students by name in one folder, in addition to the read-only ones that ship with the code.

    Args:
        root: where students are published; created by the first publish.
        bundled: a folder of plain student folders; names in root take precedence.
    """

    def __init__(self, root: Path, bundled: Path | None = None) -> None:
        self.root = Path(root)
        self.bundled = bundled

    def names(self) -> _Names:
        """Every student's name, sorted."""
        found = set()
        for place in self._places():
            with os.scandir(place) as entries:
                found |= {e.name for e in entries if _valid(e.name) and os.path.isfile(Path(e.path, MANIFEST))}
        return sorted(found)

    def list(self) -> _Manifests:
        """Every student's manifest, by name. Unreadable ones are logged and left out."""
        manifests = []
        for name in self.names():
            try:
                manifests.append(self.manifest(name))
            except StoreError as error:
                _log.warning("student %r is left out of the list: %s", name, error)
        return manifests

    def manifest(self, name: str) -> StudentManifest:
        """The student's manifest; its files are not read.

        Raises:
            NotFound: no student has that name.
            Forbidden: the name is invalid or a symlink out of the store, or the manifest lists a file outside its
                folder or of a forbidden kind.
            Corrupt: the manifest cannot be read.
        """
        return self.find(name).manifest

    def find(self, name: str) -> StudentFolder:
        """The student's folder and manifest; its files are not read.

        Raises:
            NotFound, Forbidden, Corrupt: as in `manifest`.
        """
        folder = self._folder(name)
        return StudentFolder(folder, read_manifest(folder, name))

    def made_by(self, job: DistillJob) -> StudentManifest | None:
        """The manifest that exactly this job published in root, or None. Bundled students do not count."""
        try:
            manifest = Store(self.root).manifest(job.student)
        except StoreError:
            return None
        return manifest if manifest.job == job else None

    def open(self, name: str) -> StudentFolder:
        """The student's folder, with each file verified against its sha256.

        A file is hashed again only if its size, mtime or inode has changed.

        Raises:
            NotFound: no student has that name.
            Forbidden: as in `manifest`, or a file is a symlink, or an unlisted file could be loaded.
            Corrupt: as in `manifest`, or a file is missing, unreadable, truncated, or not what was published.
        """
        found = self.find(name)
        with _readable(name):
            verify(found.path, found.manifest)
        return found

    def check_writable(self) -> None:
        """Check that root can be written, before a long computation of what to publish.

        Raises:
            DiskFull: no space is left for even an empty file.
            StoreError: root cannot be created or written.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.root).close()
        except OSError as error:
            kind = DiskFull if error.errno in FULL else StoreError
            raise kind(
                f"nothing could be published to the store {self.root} ({error.strerror}): let this process's user write "
                "there and free some space, or name another store"
            ) from error

    def check_free(self, name: str, replace: bool = False) -> None:
        """Check that a student may be published under this name, before the work that makes it.

        Raises:
            AlreadyExists: the name is taken, and is not to be replaced, or was put there by hand.
            Forbidden: the name is a bundled base's.
        """
        if name in bundled_bases():
            raise Forbidden(f"{name!r} is the bundled base, which would hide the student: choose another name")
        link = self.root / name
        if not replace and link.exists():
            raise AlreadyExists(_taken(name))
        if link.is_dir() and not link.is_symlink():
            raise AlreadyExists(f"{link} was put there by hand and cannot be replaced atomically: delete it first")

    def publish(self, manifest: StudentManifest, folder: Path, replace: bool = False) -> StudentManifest:
        """Copy a student's files into the store, all or nothing.

        Args:
            manifest: the student's manifest; its ``files`` are filled in here.
            folder: holds the files, at least one of them safetensors (except for a routed student, which has no weights
                of its own); a student.json in it is ignored.
            replace: replace an existing student of that name; otherwise a taken name is an error.

        Returns:
            The manifest as published.

        Raises:
            AlreadyExists: the name is taken in root (bundled students may be hidden).
            NotFound: the folder, or a student that this one routes to, does not exist.
            Forbidden: a file of a kind that is not allowed, a symlink, or a hidden file; or the name is a bundled base's.
            Corrupt: a safetensors file does not parse, or the manifest could not be read back.
            DiskFull: no space is left; the staging folder is removed, and an old version stays.
            StoreError: the folder or root cannot be read or written.
        """
        name, folder = manifest.name, Path(folder)
        link = self.root / name
        with _clear_errors(name):
            self.check_free(name, replace)
            paths = publishable(folder, weights=manifest.router is None)
            for member in manifest.router.students if manifest.router is not None else []:
                self.manifest(member)
            self.root.mkdir(parents=True, exist_ok=True)
            self._clean_leftovers()
            with self._staging() as staging:
                files = {path: copy_file(folder / path, staging / path) for path in paths}
                published = manifest.model_copy(update={"files": files})
                write_file(staging / MANIFEST, published.model_dump_json(indent=2).encode() + b"\n")
                read_manifest(staging, name)  # refuse to publish what cannot be read back
                for parent, _, _ in os.walk(staging):
                    sync_folder(Path(parent))
                # A dangling link is no student, so it may be replaced.
                self._point(link, staging, replace or (link.is_symlink() and not link.exists()), _taken(name))
        return published

    def amend(self, manifest: StudentManifest) -> StudentManifest:
        """Publish a student again with the same files and another manifest, such as a new calibration.

        Raises:
            NotFound, Forbidden: see `check_amendable`.
            StoreError: its files are no longer those that the manifest lists; or as in `publish`.
        """
        self.check_amendable(manifest.name)
        folder = self.open(manifest.name)
        if folder.manifest.files != manifest.files:
            raise StoreError(f"student {manifest.name!r} was published again in the meantime: read its manifest again")
        return self.publish(manifest, folder.path, replace=True)

    def check_amendable(self, name: str) -> None:
        """Check that `amend` could write this student, before a long computation of what it would write.

        Raises:
            NotFound: no student has that name.
            Forbidden: the student is bundled, or was put into root by hand.
        """
        folder, link = self._folder(name), self.root / name
        if self.bundled is not None and folder.parent == self.bundled.resolve():
            raise Forbidden(f"student {name!r} is bundled with the code and read-only: publish one of your own instead")
        if not link.is_symlink():
            raise Forbidden(f"{link} was put there by hand and cannot be replaced atomically: publish it instead")

    def delete(self, name: str) -> None:
        """Remove a student; a bundled one of that name is visible again.

        Raises:
            NotFound: no student has that name.
            Forbidden: the name is invalid, the student is bundled, or another student routes prompts to it.
        """
        folder = self._folder(name)
        if not os.path.lexists(self.root / name):
            raise Forbidden(f"student {name!r} is bundled with the code and read-only: only published ones are deleted")
        routers = [each.name for each in self.list() if each.router is not None and name in each.router.students]
        if routers:
            raise Forbidden(f"student {name!r} is a member of the router {', '.join(routers)}: delete that first")
        link = self.root / name
        with _clear_errors(name):
            # One call that needs no disk space hides the student; only then are its weights deleted.
            if link.is_symlink():
                link.unlink()
            else:
                folder = link.rename(self.root / f"{_STAGING}{uuid.uuid4().hex}")
            sync_folder(self.root)
            shutil.rmtree(folder)

    def _point(self, link: Path, staging: Path, replace: bool, taken: str) -> None:
        """Make the staged folder a version and point the name at it, which is the moment of publication."""
        versions = self.root / _VERSIONS
        versions.mkdir(exist_ok=True)
        version = versions / f"{link.name}.{uuid.uuid4().hex}"
        os.utime(staging)  # not a leftover yet, however long the copy took
        staging.rename(version)
        sync_folder(versions)
        target, before = f"{_VERSIONS}/{version.name}", link.resolve()
        try:
            if replace:
                with self._staging() as holder:
                    (holder / link.name).symlink_to(target)
                    (holder / link.name).replace(link)
            else:
                link.symlink_to(target)
        except BaseException as error:
            if link.resolve() != version.resolve():  # unless interrupted just after the link was made
                shutil.rmtree(version, ignore_errors=True)
            if isinstance(error, FileExistsError):
                raise AlreadyExists(taken) from error
            raise
        try:
            sync_folder(self.root)
        except OSError as error:
            raise StoreError(f"student {link.name!r} is published, but a power cut may undo it: {error}") from error
        if replace and before.parent == versions.resolve() and before.is_dir():
            os.utime(before)  # its grace period begins

    @contextmanager
    def _staging(self) -> Iterator[Path]:
        staging = self.root / f"{_STAGING}{uuid.uuid4().hex}"
        staging.mkdir()
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _clean_leftovers(self) -> None:
        """Remove leftovers of killed publishes, and replaced versions, that are older than a day."""
        used = {entry.resolve() for entry in self.root.iterdir() if entry.is_symlink()}
        leftovers = [*self.root.glob(f"{_STAGING}*"), *(self.root / _VERSIONS).glob("*")]
        for leftover in leftovers:
            try:
                age = time.time() - leftover.lstat().st_mtime
            except FileNotFoundError:  # removed by another publisher
                continue
            if age > LEFTOVER_SECONDS and leftover.resolve() not in used:
                shutil.rmtree(leftover, ignore_errors=True)

    def _places(self) -> _Paths:
        return [place for place in (self.root, self.bundled) if place is not None and place.is_dir()]

    def _folder(self, name: str) -> Path:
        """The real folder of a student, resolved once so that everything that follows reads one version."""
        try:
            check_name(name)
        except ValueError as error:
            raise Forbidden(str(error)) from error
        for place in self._places():
            with _readable(name):
                there = (place / name / MANIFEST).is_file()
            if there:
                folder, home = (place / name).resolve(), place.resolve()
                if folder not in (home / name, home / _VERSIONS / folder.name):
                    raise Forbidden(
                        f"{place / name} is a symlink out of the store, to {folder}: copy the folder instead"
                    )
                return folder
        raise NotFound(f"no student is named {name!r}; available: {', '.join(self.names()) or 'none'}")


def _taken(name: str) -> str:
    return f"student {name!r} exists already: replace it (replace=True, --replace), or choose another name"


def _valid(name: str) -> bool:
    try:
        check_name(name)
    except ValueError:
        return False
    return True


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Make files that cannot be read a fault of the student, which others need not share."""
    try:
        yield
    except OSError as error:
        raise Unreadable(
            f"the files of student {name!r} cannot be read ({error}): check the disk, let this process's user read them, or "
            "publish the student again"
        ) from error


@contextmanager
def _clear_errors(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise DiskFull(
                f"no space left for student {name!r} ({error}): nothing was changed; free some space and publish again"
            ) from error
        raise StoreError(f"the store failed on student {name!r}: {error}") from error
