"""Apps on real ports."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import uvicorn
from fastapi import FastAPI


@contextmanager
def serving(app: FastAPI, seconds: float = 120) -> Iterator[str]:
    """The app behind uvicorn in a thread, once it is ready to draw; its address."""
    # asyncio turns Nagle's algorithm off only where it is told the protocol: with it an answer takes 40 ms.
    with socket.socket(proto=socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            wait_until_ready(url, seconds)
            yield url
        finally:
            server.should_exit = True
            thread.join(60)


def wait_until_ready(url: str, seconds: float) -> None:
    """Returns once /health/ready says 200."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/health/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.02)
    raise AssertionError(f"the server at {url} did not get ready")
