"""What stands before the app: who may ask, and how much."""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvtool.server.errors import ApiError, error_response


class Gate:
    """Asks for the key on every route but `/health`, and refuses bodies that are too large."""

    def __init__(self, app: ASGIApp, api_key: str | None, max_body: int) -> None:
        self.app, self.max_body = app, max_body
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"authorization", b"")
        asks = self._expected is not None and scope["path"] != "/health"
        if asks and not hmac.compare_digest(given, self._expected or b""):
            message = "the API key is missing or wrong: send 'Authorization: Bearer KEY'"
            error = ApiError(401, message, headers={"WWW-Authenticate": "Bearer"})
            await error_response(error)(scope, receive, send)
            return
        too_large = ApiError(413, f"the body is larger than {self.max_body:,} bytes")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.max_body:
            await error_response(too_large)(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_body:  # it came in chunks, without a length
                raise too_large
            return message

        await self.app(scope, counted, send)
