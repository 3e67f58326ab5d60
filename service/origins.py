"""Which web pages may change anything here, and which names the server answers to: what browsers tell of a request.

A browser lets every page send certain requests to every address that it reaches, without asking first, and only keeps the
answer from the page. A server on loopback that is open to its user would be so to each page that the user looks at. But
browsers tell the page's origin, and a page cannot keep them from it: it has to be this server's own, or one that the
settings list.

Whoever owns a name can have it lead to 127.0.0.1, though (DNS rebinding): pages under it are then this server's own to
browsers, and may even read its answers. But browsers tell the name as well.
"""

import ipaddress
from collections.abc import Collection, Sequence
from http import HTTPStatus

from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import respond, shorten

HARMLESS = {"GET", "HEAD", "OPTIONS"}
"""Methods that change nothing; what a page may read of their answers is CORS'."""
DEFAULT_PORTS = (":80", ":443")


class Origins:
    """ASGI middleware: a request that changes something and tells a foreign origin is answered 403.

    Args:
        app: is asked when all is well.
        listed: origins whose pages may use the API; ``*`` is every one.
        public_url: address that clients reach the server at, where it is another than the one in their requests' Host.
    """

    def __init__(self, app: ASGIApp, listed: Collection[str], public_url: str | None = None) -> None:
        self.app = app
        self.listed = listed
        self.public = None if public_url is None else _place(public_url)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in HARMLESS:
            hosts = _values(scope, b"host")
            for origin in _values(scope, b"origin"):
                if not self._may(origin, hosts):
                    message = (
                        f"a web page of {shorten(origin)} may not change anything here: use the API from elsewhere than a "
                        "page, list the origin in FEWSTEP_CORS_ORIGINS, or set FEWSTEP_PUBLIC_URL if it is this server's own"
                    )
                    await respond(HTTPStatus.FORBIDDEN, message, code="origin_not_allowed")(scope, receive, send)
                    return
        await self.app(scope, receive, send)

    def _may(self, origin: str, hosts: Sequence[str]) -> bool:
        if "*" in self.listed or origin in self.listed:
            return True
        place = _place(origin)
        # A proxy may speak https for us, so that schemes tell nothing.
        return place is not None and place in (self.public, *map(_bare, hosts))


class Hosts:
    """ASGI middleware: a request for a name that this server is not meant to have is answered 421.

    An address leads nowhere but to itself, and nobody can give away localhost or what is below it: these are always allowed.
    So is a request without a name, as some health checks send it, since browsers always tell one.

    Args:
        app: is asked when all is well.
        names: host names that are this server's; ``*`` is every one.
    """

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        self.app = app
        self.names = {name.lower() for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            for host in _values(scope, b"host"):
                if not self._may(name_of(host)):
                    message = (
                        f"this server has no keys, and is not meant to be reached as {shorten(host)}, a name that somebody "
                        "could have made to lead here: use an address such as 127.0.0.1, localhost, or a name in "
                        "FEWSTEP_ALLOWED_HOSTS, FEWSTEP_PUBLIC_URL or FEWSTEP_HOST; list this one in FEWSTEP_ALLOWED_HOSTS "
                        "if it is the server's own, or give it keys (FEWSTEP_KEYS_FILE)"
                    )
                    answer = respond(HTTPStatus.MISDIRECTED_REQUEST, message, code="host_not_allowed")
                    await answer(scope, receive, send)
                    return
        await self.app(scope, receive, send)

    def _may(self, name: str) -> bool:
        if "*" in self.names or name in self.names or name == "localhost" or name.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def name_of(host: str) -> str:
    """Name or address of a Host header or of a URL, without its port."""
    host = (_place(host) or host).lower()
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return name.removesuffix(".")


def _values(scope: Scope, wanted: bytes) -> list[str]:
    return [value.decode("latin-1") for name, value in scope["headers"] if name == wanted]


def _place(address: str) -> str | None:
    """Host and port of an origin or address; None where it has none, as ``null``."""
    _, separator, rest = address.partition("://")
    return _bare(rest.partition("/")[0]) if separator else None


def _bare(host: str) -> str:
    """Host and port, without the port that browsers leave out, of either scheme."""
    host = host.lower()
    return next((host.removesuffix(port) for port in DEFAULT_PORTS if host.endswith(port)), host)
