"""The JSON shape of every error response: ``{"error": {"message", "type", "param", "code"}}``."""

import json
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from service.engine.base import (
    BadRequest,
    EngineError,
    Flagged,
    ModelBroken,
    NotReady,
    Overloaded,
    TimedOut,
    UnknownModel,
)
from service.rates import RateLimited
from weights.fields import instead_of_field

log = logging.getLogger(__name__)
SHOWN = 80
"""Most characters of a client's value that a message repeats."""

CLIENT_CLOSED_REQUEST = 499
"""nginx's status for this: nobody receives the response, but the access log records it."""

DEEPEST = 64
"""Levels of arrays and objects that every body may have; the JSON parser gives up somewhere beyond, where its stack ends."""

TAGS = {"switch", "options"}
"""Names of the union branches in schemas.py, which pydantic includes in an error's location."""


class ApiError(HTTPException):
    """An error response; raise it anywhere in a route."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.param = param
        self.code = code


def error_type(status: int) -> str:
    """OpenAI's ``type`` for a status."""
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return "rate_limit_error"
    return "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of an error response."""
    return {"error": {"message": message, "type": error_type(status), "param": param, "code": code}}


def respond(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """An error response."""
    return JSONResponse(error_body(status, message, param, code), status_code=status, headers=dict(headers or {}))


def shorten(value: object) -> str:
    """The repr of a client's value, shortened for a message."""
    text = repr(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def from_engine(error: EngineError) -> ApiError:
    """The response for an error of the engine."""
    message = str(error)
    match error:
        case Flagged():
            return ApiError(400, message, param=error.param, code="content_policy_violation")
        case BadRequest():
            return ApiError(400, message, param=error.param, code="invalid_value")
        case UnknownModel():
            return ApiError(404, message, param="model", code="model_not_found")
        case Overloaded():
            return ApiError(429, message, code="queue_full", headers={"Retry-After": str(error.retry_after)})
        case RateLimited():
            headers = {"Retry-After": str(error.retry_after)}
            return ApiError(429, message, code="rate_limit_exceeded", headers=headers)
        case NotReady():
            return ApiError(503, message, code="not_ready", headers={"Retry-After": "5"})
        case TimedOut():
            return ApiError(504, message, code="timeout")
        case ModelBroken():
            return ApiError(503, message, param="model", code="model_broken")
        case _:
            return ApiError(500, message, code="engine_error")


def from_validation(errors: Sequence[Any], model: type[BaseModel] | None = None) -> ApiError:
    """A 400 that describes every invalid field; ``param`` is the first of them.

    Args:
        errors: pydantic's.
        model: what the body was read as, whose names are offered for the first unknown field.
    """
    unknown = [error for error in errors if error["type"] == "extra_forbidden"]
    if unknown:
        names = [shorten(_param(error)) for error in unknown]
        message = f"unknown parameter(s): {', '.join(names)}"
        if model is not None:  # for one alone: a body may have thousands, and a search for the nearest name takes time
            which = f"; for {names[0]}" if len(names) > 1 else ""
            message += f"{which}: {instead_of_field(model, unknown[0]['loc'][1:])}"
        return ApiError(400, message, param=_param(unknown[0]), code="unknown_parameter")
    first = errors[0]
    message = "; ".join(dict.fromkeys(_describe(error) for error in errors))
    codes = {"missing": "missing_required_parameter", "json_invalid": "invalid_json"}
    return ApiError(400, message, param=_param(first) or _named(first), code=codes.get(first["type"], "invalid_value"))


def unreadable(error: ValueError | RecursionError) -> ApiError:
    """A 400 for a body that the JSON parser gave up with this error: what is wrong with it, and how to fix it."""
    match error:
        case json.JSONDecodeError():
            wrong = f"{error.msg} at character {error.pos}"
        case UnicodeDecodeError():
            byte, encoding = error.object[error.start], error.encoding.upper()
            wrong = f"byte 0x{byte:02x} at position {error.start} is not {encoding}; send the body as UTF-8"
        case RecursionError():
            wrong = f"its arrays and objects are nested too deeply; use at most {DEEPEST} levels"
        case _:  # the only other thing that Python's parser refuses
            digits = sys.get_int_max_str_digits()
            wrong = f"an integer in it has more than {digits} digits, the most that can be read; send a smaller number"
    return ApiError(400, f"the body is not valid JSON: {wrong}", code="invalid_json")


def _param(error: Any) -> str | None:
    parts = [str(part) for part in error["loc"][1:] if part not in TAGS]
    if error["type"] == "json_invalid" or not parts:
        return None
    return ".".join(parts)[:SHOWN]


def _named(error: Any) -> str | None:
    """The field that a check of several fields names at the start of its message."""
    field = re.match(r"Value error, ([a-z_]+): ", error["msg"])
    return field[1] if field is not None else None


def _describe(error: Any) -> str:
    param = _param(error)
    match error["type"]:
        case "json_invalid":
            return unreadable(json.JSONDecodeError(error["ctx"]["error"], "", error["loc"][-1])).detail
        case "missing" if param is None:
            return "the request has no body: send JSON"
        case "missing":
            return f"{param} is required"
        case "model_attributes_type" | "model_type" | "dict_type" if param is None:
            return "the body must be a JSON object, sent with Content-Type: application/json"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":  # our own validators include the value themselves
        return f"{param}: {message}" if param else message
    return f"{param or 'the body'}: {message[:1].lower()}{message[1:]}, got {shorten(error['input'])}"


async def _on_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    headers = error.headers or {}
    if isinstance(error, ApiError):
        return respond(error.status_code, error.detail, param=error.param, code=error.code, headers=headers)
    if error.status_code == HTTPStatus.BAD_REQUEST and isinstance(error.__cause__, (ValueError, RecursionError)):
        # FastAPI's, for all that its parser fails on but malformed JSON; its own message does not say what that was.
        answer = unreadable(error.__cause__)
        return respond(answer.status_code, answer.detail, code=answer.code)
    path = shorten(request.url.path)
    match error.status_code:
        case 404:
            return respond(404, f"there is nothing at {path}", code="not_found", headers=headers)
        case 405:
            allowed = headers.get("Allow", "another method")
            message = f"{request.method} is not allowed at {path}; use {allowed}"
            return respond(405, message, code="method_not_allowed", headers=headers)
    return respond(error.status_code, str(error.detail), headers=headers)


def _body_model(request: Request) -> type[BaseModel] | None:
    """What the request's route reads its body as."""
    route = request.scope.get("route")
    field = route.body_field if isinstance(route, APIRoute) else None
    kind = None if field is None else field.field_info.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


async def _on_validation(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    answer = from_validation(error.errors(), _body_model(request))
    return respond(answer.status_code, answer.detail, param=answer.param, code=answer.code)


def logged(error: EngineError) -> ApiError:
    """The response for an error of the engine, which is also logged if the fault is the server's."""
    answer = from_engine(error)
    if answer.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR and not isinstance(error, NotReady):
        log.error("%s", answer.detail, exc_info=error.__cause__)
    return answer


async def _on_engine(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, EngineError)
    answer = logged(error)
    return respond(answer.status_code, answer.detail, param=answer.param, code=answer.code, headers=answer.headers)


def bug(request_id: str) -> JSONResponse:
    """The response to a bug. The traceback goes to the log, which uvicorn writes, and never to the client."""
    message = f"the server failed on this request; its log says why, under the id {request_id}"
    return respond(500, message, code="internal_error")


def install(app: FastAPI) -> None:
    """Install handlers for all errors except bugs, which `service.tracking` handles outside of everything else."""
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(EngineError, _on_engine)
