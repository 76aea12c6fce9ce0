"""Errors as OpenAI's clients expect them: `{"error": {message, type, param, code}}`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from kvtool.errors import KvtoolError

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "overloaded_error"}


class ApiError(HTTPException):
    """An answer that is an error.

    Args:
        param: The field that is wrong.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.param = param


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """The JSON of an error."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    if status == 503:
        kind = "overloaded_error"
    return {
        "error": {
            "message": message,
            "type": _TYPES.get(status, kind),
            "param": param,
            "code": status,
        }
    }


def error_response(error: ApiError) -> JSONResponse:
    """The answer that an error is."""
    body = error_body(error.status_code, error.detail, error.param)
    return JSONResponse(body, error.status_code, error.headers)


def as_api_error(error: KvtoolError, param: str | None = None) -> ApiError:
    """What the runtime refuses is the request's fault."""
    hint = f" ({error.hint})" if error.hint else ""
    return ApiError(400, f"{error}{hint}", param)


def install(app: FastAPI) -> None:
    """Makes every error of the app take that shape."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = [str(part) for part in first["loc"][1:] if not str(part).startswith("function-")]
        param = ".".join(where) or None
        message = f"{param}: {first['msg']}" if param else str(first["msg"])
        return JSONResponse(error_body(400, message, param), 400)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        param = getattr(error, "param", None)
        body = error_body(error.status_code, str(error.detail), param)
        return JSONResponse(body, error.status_code, error.headers)

    @app.exception_handler(KvtoolError)
    async def wrong(request: Request, error: KvtoolError) -> JSONResponse:
        return error_response(as_api_error(error))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(error_body(500, f"{type(error).__name__}: {error}"), 500)
