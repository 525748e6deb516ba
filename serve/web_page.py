"""The page for browsers at `/`: a chat and a race. Its files lie in `page/`; they use the endpoint's own API."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, Response

FOLDER = Path(__file__).parent / "page"
PAGE = {
    "/": ("index.html", "text/html"),
    "/page/page.css": ("page.css", "text/css"),
    "/page/page.js": ("page.js", "text/javascript"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
}
"""Path → file and media type."""
HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def page_routes() -> APIRouter:
    """The page and its files."""
    router = APIRouter()

    async def file(http: Request) -> Response:
        name, media_type = PAGE[http.scope["route"].path]
        return FileResponse(FOLDER / name, headers=HEADERS, media_type=media_type)

    for path in PAGE:
        router.add_api_route(path, file, include_in_schema=False)
    return router
