"""The server process: it drains when it gets a signal, and lets no slow client occupy a connection."""

import asyncio
import contextlib
import ipaddress
import logging
import signal
import sys
import threading
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from service.engine.base import Engine
from service.engine.leaving import leave
from service.settings import BadSettings, Settings

log = logging.getLogger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGINT)
ANSWER_SECONDS = 10
"""Time for responses that are still being sent when all images are finished: clients may read slowly, or not at all."""


class ImpatientProtocol(H11Protocol):
    """Closes a connection whose client takes too long to send a request's headers, which uvicorn does not do.

    Bodies are limited by the app: see `service.limits`.
    """

    seconds = 30.0
    """Overridden by `protocol_for`."""
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Expect the first request."""
        super().connection_made(transport)
        self._expect()

    def data_received(self, data: bytes) -> None:
        """Stop the timer if the headers are complete and a response is in progress, or else keep it running."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._relax()
        else:
            self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        self._relax()
        super().connection_lost(exc)

    def _expect(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.seconds, self._give_up)

    def _relax(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._timer = None
        self.transport.close()


def protocol_for(seconds: float) -> type[ImpatientProtocol]:
    """A protocol class with this timeout."""
    return type("Protocol", (ImpatientProtocol,), {"seconds": seconds})


class DrainingServer(uvicorn.Server):
    """Keeps listening while the engine drains, so that load balancers see ``/health/ready`` fail and send no more.

    At the first SIGTERM or SIGINT, new requests for images are refused, and streams that may never end are ended (by
    ``draining``). Admitted images are finished, then the responses, and the process exits with status 0. The second
    signal ends the process at once, as if it were not handled.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine, settings: Settings, draining: asyncio.Event) -> None:
        super().__init__(config)
        self._engine = engine
        self._draining = draining
        self._settings = settings
        self._drain: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals while the block runs; uvicorn's own handler would close the listeners at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._begin_to_drain, number)
        try:
            yield
        finally:
            _leave_to_the_system()

    def _begin_to_drain(self, number: int) -> None:
        _leave_to_the_system()
        name = signal.Signals(number).name
        log.info(
            "%s: draining for at most %g s; a second signal ends the server at once", name, self._settings.drain_seconds
        )
        self._draining.set()
        self._drain = asyncio.create_task(self._drained())

    async def _drained(self) -> None:
        seconds, notice = self._settings.drain_seconds, self._settings.drain_notice_seconds
        try:
            await asyncio.gather(self._engine.drain(seconds), asyncio.sleep(notice))
            left = self._engine.load().pictures
            log.info("drained; abandoning %d unfinished images", left)
            await self._engine.stop()  # ends the requests that are left, which would otherwise keep the process alive
        except Exception:
            log.exception("the engine could not be drained")
        finally:
            self.should_exit = True


def _leave_to_the_system() -> None:
    """Remove the signal handlers, so that the next signal ends the process."""
    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_DFL)


def check_address(settings: Settings) -> None:
    """Check that the server may listen on its address.

    Raises:
        BadSettings: others can reach it, and it has no keys.
    """
    if settings.keys_file is not None or settings.allow_open or _is_loopback(settings.host):
        return
    raise BadSettings(
        f"FEWSTEP_HOST: {settings.host} can be reached from other machines, and without keys anybody there could generate "
        "images and run jobs: set FEWSTEP_KEYS_FILE (`fewstep keys create` makes a key), or FEWSTEP_ALLOW_OPEN=true if "
        "something else keeps others out, or listen on 127.0.0.1"
    )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name, which may resolve to anything


def run(app: FastAPI, settings: Settings) -> None:
    """Serve the app until a signal ends it. The process then exits at once if any other threads are still at work.

    Raises:
        SystemExit: the server could not start, for example because the port is taken.
    """
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=protocol_for(settings.read_seconds),
        ws="none",
        lifespan="on",
        log_config=None,  # service.logs has configured it
        access_log=False,  # service.tracking writes it
        server_header=False,
        timeout_graceful_shutdown=ANSWER_SECONDS,
    )
    server = DrainingServer(config, app.state.engine, settings, app.state.draining)
    server.run()
    if not server.started:
        sys.exit(3)
    leave()
