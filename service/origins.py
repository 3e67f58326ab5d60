"""Which web pages may change anything here, and which host names the server answers to.

A browser lets any page send certain requests to any address that it can reach, without asking first, and only hides the
response from the page. So any page that a user visits could use a server that is open on the loopback interface. But
browsers send the page's origin, which a page cannot prevent: it must be this server's own, or listed in the settings.

The owner of a domain name can also point it at 127.0.0.1 (DNS rebinding). To a browser, pages under that name then
belong to this server, and may even read its responses. But browsers send that name too, as the host.
"""

import ipaddress
from collections.abc import Collection, Sequence
from http import HTTPStatus

from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import respond, shorten

HARMLESS = {"GET", "HEAD", "OPTIONS"}
"""Methods that change nothing. Whether a page may read their responses is up to CORS."""
DEFAULT_PORTS = (":80", ":443")


class Origins:
    """ASGI middleware that answers 403 to a request that may change something and comes from a foreign origin.

    Args:
        app: handles the requests that pass.
        listed: origins whose pages may use the API; ``*`` allows all.
        public_url: address at which clients reach the server, if it differs from the Host header of their requests.
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
                        f"web pages of {shorten(origin)} may not change anything on this server: list the origin in "
                        "FEWSTEP_CORS_ORIGINS, or set FEWSTEP_PUBLIC_URL if it is the server's own"
                    )
                    await respond(HTTPStatus.FORBIDDEN, message, code="origin_not_allowed")(scope, receive, send)
                    return
        await self.app(scope, receive, send)

    def _may(self, origin: str, hosts: Sequence[str]) -> bool:
        if "*" in self.listed or origin in self.listed:
            return True
        place = _place(origin)
        # A proxy may terminate TLS for this server, so schemes tell nothing.
        return place is not None and place in (self.public, *map(_bare, hosts))


class Hosts:
    """ASGI middleware that answers 421 to a request for a host name that is not this server's.

    Addresses, localhost and names below it are always allowed, since nobody can point them elsewhere. So is a request
    without a host, as some health checks send it: browsers always send one.

    Args:
        app: handles the requests that pass.
        names: host names of this server; ``*`` allows all.
    """

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        self.app = app
        self.names = {name.lower() for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            for host in _values(scope, b"host"):
                if not self._may(name_of(host)):
                    message = (
                        f"this server has no keys, so it does not answer to {shorten(host)}, a name that anybody could have "
                        "made to resolve to it: use an address such as 127.0.0.1, localhost, or a name in "
                        "FEWSTEP_ALLOWED_HOSTS, FEWSTEP_PUBLIC_URL or FEWSTEP_HOST; list this one in FEWSTEP_ALLOWED_HOSTS "
                        "if it is the server's own, or give the server keys (FEWSTEP_KEYS_FILE)"
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
    """The name or address in a Host header or URL, without the port."""
    host = (_place(host) or host).lower()
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return name.removesuffix(".")


def _values(scope: Scope, wanted: bytes) -> list[str]:
    return [value.decode("latin-1") for name, value in scope["headers"] if name == wanted]


def _place(address: str) -> str | None:
    """Host and port of an origin or URL; None if it has none, like the origin ``null``."""
    _, separator, rest = address.partition("://")
    return _bare(rest.partition("/")[0]) if separator else None


def _bare(host: str) -> str:
    """Host and port, without a port that is the default of either scheme, since browsers leave that out."""
    host = host.lower()
    return next((host.removesuffix(port) for port in DEFAULT_PORTS if host.endswith(port)), host)
