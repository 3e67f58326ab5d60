"""The API reference at /openapi.json: what FastAPI derives from the routes, completed by what it cannot know."""

from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from service.access import needed_scope
from service.schemas import CompletedImage, PartialImage

SCHEMAS = "#/components/schemas/"
EVENTS = (PartialImage, CompletedImage)
"""Data of server-sent events, which FastAPI does not find since no route returns them directly."""
KEY = "key"
"""Name of the security scheme."""


def install(app: FastAPI, *, keyed: bool) -> None:
    """Complete the app's reference, which is generated at its first request.

    Args:
        app: the app, with all its routes.
        keyed: whether the server requires keys: /docs then asks for one, and sends it.
    """
    made = app.openapi

    def complete() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = made()
            _add_events(schema)
            if keyed:
                _add_key(schema)
        assert app.openapi_schema is not None, "made() keeps what it answers"
        return app.openapi_schema

    app.openapi = complete  # type: ignore[method-assign]


def _add_events(schema: dict[str, Any]) -> None:
    models = [(model, "serialization") for model in EVENTS]
    _, found = models_json_schema(models, ref_template=SCHEMAS + "{model}")  # type: ignore[arg-type]
    known = schema["components"]["schemas"]
    for name, each in found["$defs"].items():
        known.setdefault(name, each)


def _add_key(schema: dict[str, Any]) -> None:
    schema["components"]["securitySchemes"] = {
        KEY: {"type": "http", "scheme": "bearer", "description": "A key from `fewstep keys create`: fs_..."}
    }
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            scope = needed_scope(path, method.upper())
            operation["security"] = [] if scope is None else [{KEY: [scope]}]
