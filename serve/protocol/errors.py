"""Errors in OpenAI's shape: `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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

    def response(self, headers: Mapping[str, str] | None = None) -> Response:
        """The HTTP response. Statuses 429 and 503 tell the client to try again after one second."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        own = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "1"}}
        return AsciiJSON({"error": error}, self.status, {**own.get(self.status, {}), **(headers or {})})


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


def overloaded(why: str) -> ApiError:
    """The error of requests for which the waiting queue has no room."""
    return ApiError(429, f"{why}; try again later", code="overloaded")


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
        return _invalid(error, request.headers.get("content-type", "")).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        message = str(error.detail)
        if error.status_code == 404:
            message = f"there is no {request.method} {request.url.path} here"
        return ApiError(error.status_code, message).response(error.headers)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return ApiError(500, f"internal error: {type(error).__name__}").response()


EXPLAINING = {"extra_forbidden": 0, "missing": 2}
"""Kinds of errors and their rank; the lowest is reported. A wrong object has unknown fields and lacks others: its unknown
fields say more."""


def _invalid(error: RequestValidationError, content_type: str) -> ApiError:
    """The error of a body that is not a valid request. Of several, the one comes first that explains the others."""
    first = min(error.errors(), key=lambda each: EXPLAINING.get(each["type"], 1))
    if first["type"] == "json_invalid":
        reason, position = first["ctx"]["error"], first["loc"][-1]
        return ApiError(400, f"the body is not JSON: {reason} at character {position}")
    path = _path(first["loc"])
    if not path and "json" not in content_type:
        got = f"it has {content_type!r}" if content_type else "it has none"
        return ApiError(400, f"the body needs the header Content-Type: application/json; {got}")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{path}={_short(first['input'])} is not supported here; leave it out", path)
    if first["type"] == "model_attributes_type":
        return ApiError(400, f"{path or 'the body'} must be a JSON object", path or None)
    message = str(first["msg"]).removeprefix("Value error, ")
    return ApiError(400, f"{path or 'body'}: {message}", path or None)


def _path(loc: Sequence[str | int]) -> str:
    """`messages[1].content[0].text` for ("body", "messages", 1, "content", "<list>", 0, "text")."""
    named = [part for part in loc[1:] if str(part)[:1] not in ("<", "[")]  # without pydantic's own marks
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in named]
    return "".join(parts).removeprefix(".")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
