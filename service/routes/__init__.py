"""The routes: thin, and all that they share."""

from typing import Any, cast

from fastapi import Request

from service.engine.base import Engine
from service.pictures import PictureStore
from service.schemas import ErrorBody
from service.settings import Settings

ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "the request is wrong; `param` names the field"},
    "default": {"model": ErrorBody, "description": "any other error"},
}


def engine_of(request: Request) -> Engine:
    """The engine of the request's app."""
    return cast(Engine, request.app.state.engine)


def client_of(request: Request) -> str:
    """Whose request it is: its key's id."""
    return cast(str, request.state.client)


def settings_of(request: Request) -> Settings:
    """The settings of the request's app."""
    return cast(Settings, request.app.state.settings)


def pictures_of(request: Request) -> PictureStore:
    """The pictures that the request's app hands out as urls."""
    return cast(PictureStore, request.app.state.pictures)
