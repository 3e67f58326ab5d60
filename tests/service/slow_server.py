"""A real server process around an engine that holds every drawing until a file appears.

``python -m tests.service.slow_server FOLDER``, with FEWSTEP_ variables. A drawing makes FOLDER/admitted, and ends when
FOLDER/release is there. GET /v1/images/stream sends a line, draws as a stream, and sends another. Jobs, where they are not
turned off, are the fake distiller's. Where FOLDER/compiling is there at the start, something is done beside it for ever.
"""

import asyncio
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path

from fastapi import Request
from fastapi.responses import StreamingResponse

from service import logs, server
from service.app import create_app
from service.engine.base import Drawn, DrawRequest, Load, NotReady
from service.engine.leaving import Beside
from service.routes import engine_of
from service.settings import Settings, read_settings
from tests.service.fake_server import PaintingEngine, make_jobs


class HoldingEngine(PaintingEngine):
    """Paints when it is allowed to."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        super().__init__(settings)
        self._folder = folder
        self._drawing = 0
        self._stopped = asyncio.Event()

    async def drain(self, seconds: float) -> None:
        async def idle() -> None:
            while self._drawing:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

        try:
            await asyncio.wait_for(idle(), seconds)
        except TimeoutError:
            return

    def load(self) -> Load:
        return Load(pictures=self._drawing, seconds=0.0, resident={})

    async def stop(self) -> None:
        self._stopped.set()

    async def generate(self, request: DrawRequest) -> list[Drawn]:
        self._drawing += 1
        (self._folder / "admitted").touch()
        try:
            while not (self._folder / "release").exists():
                if self._stopped.is_set():
                    raise NotReady("stopped before it was drawn")
                await asyncio.sleep(0.01)
            return await super().generate(request)
        finally:
            self._drawing -= 1


async def stream(request: Request) -> StreamingResponse:
    """Two lines, and a drawing between them."""

    async def lines() -> AsyncIterator[str]:
        yield "first\n"
        async for drawn in engine_of(request).stream(DrawRequest(prompt="x", seeds=(7,))):
            yield f"{drawn.seed}\n"

    return StreamingResponse(lines())


if __name__ == "__main__":
    settings = read_settings()
    logs.configure(settings.log_level, settings.log_format)
    jobs = make_jobs(settings) if settings.jobs else None
    app = create_app(settings, HoldingEngine(settings, Path(sys.argv[1])), jobs)
    if Path(sys.argv[1], "compiling").exists():
        beside = Beside("compiling")
        beside.put(threading.Event().wait)
    app.add_api_route("/v1/images/stream", stream)
    server.run(app, settings)
