"""Checks that come before a request is parsed."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.protocol.errors import ApiError
from serve.web_page import PAGE

PUBLIC_PATHS = ("/health", "/live", "/metrics", *PAGE)
"""Paths that need no API key, because probes, scrapers and browsers call them; the page asks for the key itself."""


class AuthAndSizeMiddleware:
    """Answers 401 without the API key and 413 to a body that is too large; passes every other request on, HEAD as GET.

    Args:
        api_keys: keys of which all paths except `PUBLIC_PATHS` need one; empty if they need none.
        max_body: the largest body in bytes.
    """

    def __init__(self, app: ASGIApp, api_keys: Sequence[str], max_body: int):
        self.app, self.max_body = app, max_body
        self.api_keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer with an error."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            self._check_key(scope)
            first = await self._read_body(receive)
        except ApiError as error:
            return await error.response()(scope, receive, send)

        async def replay() -> Message:
            """The body that was read; after that the server's messages, such as that the client has disconnected."""
            nonlocal first
            if first is not None:
                message, first = first, None
                return message
            return await receive()

        # The server leaves the body out of its answer to a HEAD request.
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        await self.app({**scope, "method": method}, replay, send)

    def _check_key(self, scope: Scope) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if not self.api_keys or path in PUBLIC_PATHS:
            return
        scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").strip().partition(b" ")
        known = [hmac.compare_digest(given.strip(), key) for key in self.api_keys]
        if scheme.lower() != b"bearer" or not any(known):
            message = "this endpoint needs an API key; send the header Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key")

    async def _read_body(self, receive: Receive) -> Message | None:
        """The whole body as one message, or the server's message if the client disconnects before its end."""
        body = b""
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return message
            body += message.get("body", b"")
            if len(body) > self.max_body:
                raise ApiError(413, f"the request is larger than {self.max_body} bytes", code="request_too_large")
            if not message.get("more_body"):
                return {"type": "http.request", "body": body, "more_body": False}
