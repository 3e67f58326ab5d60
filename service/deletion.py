"""Deleting a student from the store, unless it is still needed."""

from service.settings import Settings
from weights.contracts import check_name
from weights.store import Forbidden, NotFound, Store


class NoSuchModel(LookupError):
    """No model has this name."""


class StillNeeded(RuntimeError):
    """The model stays; the message says what needs it, or why it cannot be deleted from the store."""


def delete_student(name: str, store: Store, settings: Settings, job: str | None = None) -> None:
    """Delete a student; requests that already use it are not disturbed.

    Args:
        name: name of the student.
        store: the store that holds it.
        settings: settings of the server of this store, which must be able to start again.
        job: id of a job that has not ended and reads the student, if there is one.

    Raises:
        NoSuchModel: no model has this name.
        StillNeeded: it is a base, an alias, bundled, named by the settings, read by a job, or a member of a router that
            still exists.
        StoreError: the store cannot be read or written.
    """
    if name in settings.bases:
        raise StillNeeded(f"{name!r} is a base model, not a student: remove it from FEWSTEP_BASES instead")
    if name in settings.aliases:
        message = f"{name!r} is an alias of {settings.aliases[name]!r}: remove it from FEWSTEP_ALIASES instead"
        raise StillNeeded(message)
    variables = (
        ("DEFAULT_MODEL", [settings.default_model]),
        ("PINNED", settings.pinned),
        ("ALIASES", settings.aliases.values()),
    )
    for variable, names in variables:
        if name in names:
            raise StillNeeded(
                f"FEWSTEP_{variable} names {name!r}, so no server would start without it: change the setting first"
            )
    if job is not None:
        raise StillNeeded(
            f"job {job!r} has not ended and starts from {name!r}, or is guided by it, whenever it is started again: cancel "
            "the job or let it end first"
        )
    try:
        check_name(name)
        store.delete(name)
    except (ValueError, NotFound) as error:
        known = ", ".join(store.names()) or "none"
        raise NoSuchModel(f"no student is named {name[:80]!r}; available: {known}") from error
    except Forbidden as error:
        raise StillNeeded(str(error)) from error


def job_needing(name: str, settings: Settings) -> str | None:
    """The id of a job in these settings' table that has not ended and reads the student, for `delete_student`.

    Raises:
        JobsUnavailable: the table cannot be used.
    """
    if settings.database_url is None and not settings.jobs_file.exists():  # looking must not create it
        return None
    from service.jobs.table import JobTable

    table = JobTable(settings.job_settings().url)
    try:
        job = table.needing(name)
    finally:
        table.close()
    return None if job is None else job.id
