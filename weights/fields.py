"""What may be written instead of a name that is not known: for errors about fields and parameters."""

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel


def no_such_field(model: type[BaseModel], place: Sequence[int | str]) -> str:
    """The error for a field that is not one of its model's: the nearest name, and all that are allowed.

    Args:
        model: what was read.
        place: pydantic's location of the field in it, which ends with the field's own name.
    """
    return f"there is no such field: {instead_of_field(model, place)}"


def instead_of_field(model: type[BaseModel], place: Sequence[int | str]) -> str:
    """What to use instead of a field that is not one of its model's; see `no_such_field`."""
    return instead_of(str(place[-1]), list(_model_at(model, place[:-1]).model_fields))


def instead_of(name: str, known: Sequence[str]) -> str:
    """The nearest of the known names, if one is near, and all of them, of which there is at least one."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    return f"{f'did you mean {near[0]}? Use' if near else 'use'} one of {', '.join(known)}"


def _model_at(model: type[BaseModel], place: Sequence[int | str]) -> type[BaseModel]:
    """The model there; keys of dictionaries, indices and the tags of unions lead to no other."""
    for part in place:
        field = model.model_fields.get(str(part))
        if field is not None:
            model = next(_models(field.annotation), model)
    return model


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models in a field's type, such as ``Adversary | None`` or ``dict[int, Schedule]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)
