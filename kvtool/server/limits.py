"""What stands before the app: who may ask, and how much."""

from __future__ import annotations

import base64
import binascii
import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvtool.server.errors import ApiError, error_response


class Gate:
    """Asks for the key on every route but `/health`, and refuses bodies that are too large.

    Clients send the key as a bearer token; a browser, which asks its user, as a password.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, max_body: int) -> None:
        self.app, self.max_body = app, max_body
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = _key_in(headers.get(b"authorization", b""))
        asks = self._key is not None and scope["path"] != "/health"
        if asks and not hmac.compare_digest(given, self._key or b""):
            message = "the API key is missing or wrong: send 'Authorization: Bearer KEY'"
            scheme = 'Basic realm="kvtool"' if scope["path"] == "/" else "Bearer"
            error = ApiError(401, message, headers={"WWW-Authenticate": scheme})
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


def _key_in(authorization: bytes) -> bytes:
    """What a header offers as the key: a bearer token, or the password of any user."""
    scheme, _, credentials = authorization.partition(b" ")
    if scheme.lower() == b"bearer":
        return credentials.strip()
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(credentials, validate=True).partition(b":")[2]
        except binascii.Error:
            return b""
    return b""
