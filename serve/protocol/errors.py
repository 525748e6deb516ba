"""Errors in OpenAI's shape: `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from serve.engine_thread import EngineFailed


class AsciiJSON(Response):
    """A JSON response in ASCII, so that it can repeat any text of a client, lone surrogates included."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The body's bytes."""
        return json.dumps(content).encode("ascii")


class ApiError(Exception):
    """An error that the client receives with this HTTP status.

    Args:
        param: the field of the request that caused it, if one did.
        code: a word for programs.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def response(self) -> Response:
        """The HTTP response. Statuses 429 and 503 tell the client to try again after one second."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        headers = {"Retry-After": "1"} if self.status in (429, 503) else None
        return AsciiJSON({"error": error}, self.status, headers)


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The body of every response that is not a success."""

    error: ErrorBody


ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    code: {"model": ErrorResponse} for code in (400, 401, 404, 413, 429, 500, 503)
}
"""The statuses that the OpenAPI document lists."""


def engine_failed(error: EngineFailed) -> ApiError:
    """The error that clients of a dead engine receive."""
    return ApiError(503, str(error), code="engine_failed")


def install_error_handlers(app: FastAPI) -> None:
    """Answer every exception of `app` with an error in OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(EngineFailed)
    async def failed(request: Request, error: EngineFailed) -> Response:
        return engine_failed(error).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        # `loc` is ("body", field, …); after the field pydantic may add names of the types that it tried.
        field = next((str(part) for part in first["loc"] if part != "body"), None)
        message = str(first["msg"]).removeprefix("Value error, ")
        return ApiError(400, f"{field or 'body'}: {message}", field).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        return ApiError(error.status_code, str(error.detail)).response()

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return ApiError(500, f"internal error: {type(error).__name__}").response()
