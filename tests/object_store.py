"""An S3 server (moto) on loopback, which can answer some requests with an error."""

import threading
from contextlib import contextmanager

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1"}


class Faults:
    """Stands before the application of the server, and notes requests.

    `status_of(number, environ)` gives the status of an error for the request of that number, or None.
    """

    def __init__(self, application):
        self.application, self.number, self.failed = application, 0, 0
        self.status_of = lambda number, environ: None
        self.seen = []
        self.lock = threading.Lock()

    def __call__(self, environ, start_response):
        with self.lock:
            self.number += 1
            self.seen.append((environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("HTTP_RANGE")))
            status = self.status_of(self.number, environ)
            self.failed += status is not None
        if status is None:
            return self.application(environ, start_response)
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start_response(f"{status} No", [("Content-Length", "0")])
        return [b""]

    def fail_every(self, n):
        """Answer every n-th request with 503."""
        self.status_of = lambda number, environ: 503 if number % n == 0 else None


@contextmanager
def object_store():
    """A server with an empty bucket named `bucket`: (its environment for clients, its `Faults`)."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from pyarrow import fs
    from werkzeug.serving import WSGIRequestHandler, make_server

    handler = type("Quiet", (WSGIRequestHandler,), {"log": lambda *_: None, "protocol_version": "HTTP/1.1"})
    faults = Faults(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, faults, threaded=True, request_handler=handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        keys = {"access_key": "a", "secret_key": "b", "region": "us-east-1", "allow_bucket_creation": True}
        fs.S3FileSystem(endpoint_override=url, **keys).create_dir("bucket")
        yield {**CREDENTIALS, "AWS_ENDPOINT_URL": url, "AWS_EC2_METADATA_DISABLED": "true"}, faults
    finally:
        server.shutdown()
