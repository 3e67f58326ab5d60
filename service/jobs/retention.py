"""Deletes what jobs that ended long ago left in their folders, but not what tells of them."""

import logging
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from service.jobs.events import EVENTS_FILE
from service.jobs.executor import SPEC_FILE
from service.jobs.table import JobTable

log = logging.getLogger(__name__)
KEPT = (SPEC_FILE, EVENTS_FILE, "attempt-*.stderr")
"""Files that stay: they are small, and what the API tells of a job is read from them."""
ASIDE = ".removed-"
"""How the names of what is being deleted begin."""
DAY = 86_400.0


def clear_ended(table: JobTable, folder: Path, days: float, stopped: Callable[[], bool] = lambda: False) -> None:
    """Delete the checkpoints, caches and samples of every job that ended that long ago; several workers may do so at once.

    A job is first made sure to have ended, and all that goes is renamed, while nobody can resume it. Only then is it
    deleted, which may take long; what is left if that is interrupted goes the next time. Problems with a folder are
    logged.

    Args:
        table: the job table.
        folder: holds the jobs' folders; those of jobs that are not in the table are left alone.
        days: that a job's folder is kept whole after its end.
        stopped: whether to return before the next job.

    Raises:
        JobsUnavailable: the table cannot be used.
    """
    for job_id in table.ended_for(days * DAY):
        if stopped():
            return
        own = folder / job_id
        try:
            if not _removable(own):
                continue
            with table.holding_ended(job_id, days * DAY) as ended:
                going = _set_aside(own) if ended else []
            for each in going:
                _delete(each)
            if going:
                log.info(
                    "Job %s ended over %g days ago: only its spec, events and error output are kept.", job_id, days
                )
        except FileNotFoundError:  # another worker was faster
            continue
        except OSError as error:
            log.warning("What job %s left cannot be deleted: %s", job_id, error)


def _removable(folder: Path) -> list[Path]:
    """All in a job's folder but what stays; nothing if there is no such folder."""
    if not folder.is_dir():
        return []
    return [each for each in folder.iterdir() if not any(each.match(name) for name in KEPT)]


def _set_aside(folder: Path) -> list[Path]:
    """Give all that goes names for which no attempt looks, and return it. A full disk may have no room for a new folder."""
    prefix = f"{ASIDE}{secrets.token_hex(4)}-"
    going = _removable(folder)
    return [each if each.name.startswith(ASIDE) else each.rename(folder / f"{prefix}{each.name}") for each in going]


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
