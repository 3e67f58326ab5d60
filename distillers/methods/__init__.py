"""The distillation methods, one per module. Any module here that defines a `Method` with a ``name`` is discovered."""

import importlib
import inspect
import pkgutil
from functools import cache

from distillers.methods.base import Method


class UnknownMethod(ValueError):
    """No method has this name; the message lists the available ones."""


@cache
def methods() -> dict[str, type[Method]]:
    """Returns every method, keyed by name.

    Raises:
        RuntimeError: two modules define the same name.
    """
    found: dict[str, type[Method]] = {}
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for _, member in inspect.getmembers(module, inspect.isclass):
            if not issubclass(member, Method) or inspect.isabstract(member) or member.__module__ != module.__name__:
                continue
            if member.name in found:
                raise RuntimeError(
                    f"{member.__module__} and {found[member.name].__module__} both define {member.name!r}"
                )
            found[member.name] = member
    return found


def method(name: str) -> type[Method]:
    """Returns the method with that name.

    Raises:
        UnknownMethod: there is none.
    """
    try:
        return methods()[name]
    except KeyError:
        raise UnknownMethod(f"unknown method {name!r}: use one of {', '.join(sorted(methods()))}") from None
