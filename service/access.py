"""Authorization: each part of the API needs a key with a certain scope, which is checked before the body is read."""

from dataclasses import dataclass
from http import HTTPStatus

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import keys
from service.errors import ApiError, from_engine, respond
from service.keys import SCOPES, KeyRing
from service.rates import RateLimited, Rates

OPEN = ("/health", "/v1/images/files", "/docs", "/redoc", "/openapi.json")
"""Paths open to everyone: an image URL cannot be guessed and expires, and the documentation holds no secrets."""
NEEDED: dict[str, keys.Scope] = {"/v1/images": "generate", "/v1/models": "generate", "/v1/distillation": "jobs"}
"""Scope by path prefix. Any path not listed, such as /metrics or a new route, needs ``admin``."""
DELETED = "/v1/models"
"""Prefix below which DELETE needs ``admin``, since models are shared by all clients."""


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Who sent a request."""

    id: str
    """The id of the key."""
    scopes: tuple[keys.Scope, ...]


ANONYMOUS = Caller(id="anonymous", scopes=SCOPES)
"""The caller of every request if the server has no keys."""


def needed_scope(path: str, method: str = "GET") -> keys.Scope | None:
    """The scope that a request for a path needs; None if the path is open."""
    if any(_is_below(path, prefix) for prefix in OPEN):
        return None
    if method == "DELETE" and _is_below(path, DELETED):
        return "admin"
    return next((scope for prefix, scope in NEEDED.items() if _is_below(path, prefix)), "admin")


def _is_below(path: str, prefix: str) -> bool:
    return path == prefix or path.startswith(prefix + "/")


class Access:
    """ASGI middleware that authenticates callers, and checks their scope and request rate.

    It stores the caller's id in ``state.client``.

    Args:
        app: handles the requests that pass.
        ring: the API keys; None allows everything to everyone.
        rates: counts each caller's requests.
    """

    def __init__(self, app: ASGIApp, ring: KeyRing | None, rates: Rates) -> None:
        self.app = app
        self.ring = ring
        self.rates = rates

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["client"] = ANONYMOUS.id
        needed = needed_scope(scope["path"].removeprefix(scope.get("root_path", "")), scope["method"])
        if needed is None:
            await self.app(scope, receive, send)
            return
        try:
            caller = self._authenticate(scope)
            state["client"] = caller.id
            _check_scope(caller, needed)
        except ApiError as error:
            await _refuse(error)(scope, receive, send)
            return

        async def with_rates(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self.rates.headers(caller.id):
                    headers[name] = value
            await send(message)

        try:
            self.rates.take_request(caller.id)
        except RateLimited as error:
            await _refuse(from_engine(error))(scope, receive, with_rates)
            return
        await self.app(scope, receive, with_rates)

    def _authenticate(self, scope: Scope) -> Caller:
        if self.ring is None:
            return ANONYMOUS
        given = [value.decode("latin-1") for name, value in scope["headers"] if name == b"authorization"]
        if not given:
            raise _unknown("no API key: send the header 'Authorization: Bearer fs_...'", 'Bearer realm="fewstep"')
        scheme, _, credentials = given[0].strip().partition(" ")
        found = None
        if len(given) == 1 and scheme.lower() == "bearer":
            found = self.ring.authenticate(credentials.strip())
        if found is None:
            message = "the API key is wrong, expired or revoked, or not sent as 'Authorization: Bearer fs_...'"
            raise _unknown(message, 'Bearer realm="fewstep", error="invalid_token"')
        return Caller(id=found.id, scopes=found.scopes)


def _unknown(message: str, challenge: str) -> ApiError:
    status = HTTPStatus.UNAUTHORIZED
    return ApiError(status, message, code="invalid_api_key", headers={"WWW-Authenticate": challenge})


def _check_scope(caller: Caller, needed: keys.Scope) -> None:
    if needed in caller.scopes:
        return
    message = f"this needs a key with the scope {needed!r}; yours has {', '.join(caller.scopes)}"
    challenge = f'Bearer realm="fewstep", error="insufficient_scope", scope="{needed}"'
    raise ApiError(HTTPStatus.FORBIDDEN, message, code="insufficient_scope", headers={"WWW-Authenticate": challenge})


def _refuse(error: ApiError) -> ASGIApp:
    return respond(error.status_code, error.detail, param=error.param, code=error.code, headers=error.headers)
