"""The HTTP application around a `Service`: routes, errors in OpenAI's shape, and checks of the key and the size."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from starlette.types import ASGIApp

from serve.middleware import AuthAndSizeMiddleware
from serve.protocol.errors import install_error_handlers
from serve.routes import generation_routes, model_routes, operations_routes, tokenizer_routes
from serve.service import Service
from serve.web_page import page_routes


def create_app(
    service: Service,
    api_keys: Sequence[str],
    max_body: int,
    scrape: Callable[[], Awaitable[str]],
    origins: Sequence[str] = ("*",),
) -> ASGIApp:
    """The whole endpoint as an ASGI application.

    Args:
        api_keys: keys of which clients must send one; empty for an open endpoint.
        max_body: the largest body of a request, in bytes.
        scrape: returns the text of /metrics.
        origins: web pages of these origins may use the endpoint; `*` stands for all of them.
    """
    app = FastAPI(title="kforcing", version="1")
    for router in (
        generation_routes(service),
        model_routes(service),
        tokenizer_routes(service),
        operations_routes(service, scrape),
        page_routes(),
    ):
        app.include_router(router)
    install_error_handlers(app)
    _remove_422_from_document(app)
    checked = AuthAndSizeMiddleware(app, api_keys, max_body)
    # Outside of the check, because a browser asks whether it may send the key before it sends it.
    return CORSMiddleware(
        checked, origins, allow_methods=("GET", "POST"), allow_headers=("*",), expose_headers=("Retry-After",)
    )


def _remove_422_from_document(app: FastAPI) -> None:
    """FastAPI documents status 422 for every body; this endpoint answers 400 instead and never 422."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            for path in app.openapi_schema["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
