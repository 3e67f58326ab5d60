"""The limit on request bodies, before anything reads them."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import ApiError, respond


class BodyLimit:
    """ASGI middleware: a body over ``largest`` bytes is answered 413, whether it gives its length first or not."""

    def __init__(self, app: ASGIApp, largest: int) -> None:
        self.app = app
        self.largest = largest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self.largest:
            answer = self._error()
            await respond(413, answer.detail, code=answer.code, headers=answer.headers)(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.largest:
                raise self._error()
            return message

        await self.app(scope, counted, send)

    def _error(self) -> ApiError:
        message = f"the body is larger than {self.largest} bytes"
        return ApiError(413, message, code="body_too_large", headers={"Connection": "close"})
