"""Errors as OpenAI's clients expect them: `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from kvtool.errors import KvtoolError

_TYPE_NAME = re.compile(r"(str|int|list\[.*|constrained-.*|function-.*)$")
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "overloaded_error"}


class ApiError(HTTPException):
    """An answer that is an error.

    Args:
        param: The field that is wrong.
        code: What OpenAI's clients know the error by, where they do; the status if not given.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.param, self.code = param, code


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The JSON of an error."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    if status == 503:
        kind = "overloaded_error"
    return {
        "error": {
            "message": _sayable(message),
            "type": _TYPES.get(status, kind),
            "param": None if param is None else _sayable(param),
            "code": status if code is None else code,
        }
    }


def _sayable(text: str) -> str:
    """The text with halves of characters, which a request may hold and no answer, as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def error_response(error: ApiError) -> JSONResponse:
    """The answer that an error is."""
    body = error_body(error.status_code, error.detail, error.param, error.code)
    return JSONResponse(body, error.status_code, error.headers)


def as_api_error(error: KvtoolError, param: str | None = None) -> ApiError:
    """What the runtime refuses is the request's fault."""
    hint = f" ({error.hint})" if error.hint else ""
    return ApiError(400, f"{error}{hint}", param)


def install(app: FastAPI) -> None:
    """Makes every error of the app take that shape."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        message, param = _what_is_wrong(error.errors())
        return JSONResponse(error_body(400, message, param), 400)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        if isinstance(error, ApiError):
            return error_response(error)
        message = f"{error.detail}: {request.method} {request.url.path}"  # the framework's words
        return JSONResponse(
            error_body(error.status_code, message), error.status_code, error.headers
        )

    @app.exception_handler(KvtoolError)
    async def wrong(request: Request, error: KvtoolError) -> JSONResponse:
        return error_response(as_api_error(error))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(error_body(500, f"{type(error).__name__}: {error}"), 500)


def _what_is_wrong(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """One sentence about a body that was refused, and the field it is about.

    A field of several types is refused once for each. What is said of the type that was meant is
    about more than the type, or about something inside.
    """
    chosen = max(errors, key=lambda one: (not one["type"].endswith("_type"), len(one["loc"])))
    if chosen["type"] == "json_invalid":
        reason = chosen["ctx"]["error"]
        return f"the body is no JSON: {reason} (character {chosen['loc'][-1]})", None
    where = [str(part) for part in chosen["loc"][1:] if not _TYPE_NAME.match(str(part))]
    param = ".".join(where) or None
    message = str(chosen["msg"]).removeprefix("Value error, ")
    if chosen["type"] == "model_attributes_type" and param is None:
        message = "the body is no JSON object, sent as application/json"
    elif chosen["type"] == "missing" and param is None:
        message = "the body is empty"
    return (f"{param}: {message}" if param else message), param
