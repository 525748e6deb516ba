"""An HTTP proxy before a server, which can answer some requests with an error of its own."""

import http.server
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager


class Proxy(http.server.BaseHTTPRequestHandler):
    """Passes requests on, unless `refuse` gives a status for them."""

    target = ""
    refuse = staticmethod(lambda method, path, length: None)

    def log_message(self, *_):
        """Print nothing."""

    def forward(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else self.chunks()
        if status := self.refuse(self.command, self.path, len(body)):
            return self.answer(status, {"Content-Type": "text/html"}, b"<html>the gateway says no</html>")
        passed = {k: v for k, v in self.headers.items() if k.lower() in ("content-type", "accept", "user-agent")}
        request = urllib.request.Request(self.target + self.path, body or None, passed, method=self.command)
        try:
            with urllib.request.urlopen(request, timeout=60) as got:
                self.answer(got.status, dict(got.headers), got.read())
        except urllib.error.HTTPError as error:
            self.answer(error.code, dict(error.headers), error.read())

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = forward

    def chunks(self):
        """A body without a length, as uploads have it."""
        body = b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return body

    def answer(self, status, headers, body):
        self.send_response(status)
        self.send_header("Content-Type", headers.get("Content-Type", "application/octet-stream"))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def proxy_before(target):
    """The proxy's address, and its handler class, whose `refuse` may be set."""
    handler = type("Handler", (Proxy,), {"target": target})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", handler
    finally:
        server.shutdown()
