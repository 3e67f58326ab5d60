"""Deleting a student from the store, unless it is still needed."""

from service.settings import Settings
from weights.contracts import check_name
from weights.store import Forbidden, NotFound, Store


class NoSuchModel(LookupError):
    """No model has this name."""


class StillNeeded(RuntimeError):
    """The model stays; the message says what needs it, or why it cannot be deleted from the store."""


def delete_student(name: str, store: Store, settings: Settings) -> None:
    """Delete a student; requests that already use it are not disturbed.

    Args:
        name: name of the student.
        store: the store that holds it.
        settings: settings of the server of this store, which must be able to start again.

    Raises:
        NoSuchModel: no model has this name.
        StillNeeded: it is a base, an alias, bundled, named by the settings, or a member of a router that still exists.
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
    try:
        check_name(name)
        store.delete(name)
    except (ValueError, NotFound) as error:
        known = ", ".join(store.names()) or "none"
        raise NoSuchModel(f"no student is named {name[:80]!r}; available: {known}") from error
    except Forbidden as error:
        raise StillNeeded(str(error)) from error
