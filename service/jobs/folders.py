"""The folder of the jobs' folders, on the disk."""

import tempfile
from pathlib import Path

from service.jobs.base import JobsUnavailable
from weights.store import FULL

ROOM = 2**20
"""Bytes that must be free for an attempt to start: with fewer, it could not even report how it fails."""
OTHERS_MAY = (
    "let this process's user write there, name another folder, or leave the work to other workers "
    "(FEWSTEP_JOB_WORK=false)"
)


def check_folder(folder: Path, room: int = 0) -> None:
    """Create the folder if it is missing, and check that it takes a file of ``room`` bytes.

    Raises:
        JobsUnavailable: it does not.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(room))
    except OSError as error:
        fix = "free some space on its disk" if error.errno in FULL else OTHERS_MAY
        raise JobsUnavailable(f"FEWSTEP_JOBS_DIR: {folder} cannot be written ({error.strerror}): {fix}") from error
