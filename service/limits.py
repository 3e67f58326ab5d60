"""Limits on the size and the time of request bodies, enforced before anything reads them."""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import ApiError, respond


class BodyLimit:
    """ASGI middleware that limits request bodies.

    A body of more than ``largest`` bytes is answered 413, with or without a Content-Length header; one that is not
    complete after ``seconds`` is answered 408.
    """

    def __init__(self, app: ASGIApp, largest: int, seconds: float) -> None:
        self.app = app
        self.largest = largest
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self.largest:
            answer = self._too_large()
            await respond(413, answer.detail, code=answer.code, headers=answer.headers)(scope, receive, send)
            return
        seen = 0
        complete = False
        deadline = asyncio.get_running_loop().time() + self.seconds

        async def limited() -> Message:
            nonlocal seen, complete
            if complete:  # only a disconnect can follow, however long that takes
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise self._too_slow() from None
            seen += len(message.get("body", b""))
            if seen > self.largest:
                raise self._too_large()
            complete = not message.get("more_body", False)
            return message

        await self.app(scope, limited, send)

    def _too_slow(self) -> ApiError:
        message = f"the request's body did not arrive within {self.seconds:g} s"
        return ApiError(408, message, code="request_timeout", headers={"Connection": "close"})

    def _too_large(self) -> ApiError:
        message = f"the request's body is larger than {self.largest} bytes"
        return ApiError(413, message, code="body_too_large", headers={"Connection": "close"})
