"""Students on a model hub: one is pushed to a server that speaks the hub's protocol, and read back by its name."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.models import make_backbone, make_sequential

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[2]
NAME = "team/student"
COMMIT = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """What the client of the hub asks of a server for one repository whose files are small."""

    files: dict[str, bytes]

    def log_message(self, *_):
        pass

    def answer(self, body, status=200, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            return self.answer({"url": f"http://{self.headers['Host']}/{NAME}", "name": NAME, "id": NAME})
        if "/preupload/" in self.path:
            return self.answer(
                {"files": [{**f, "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(sent)["files"]]}
            )
        if "/commit/" in self.path:
            for line in map(json.loads, sent.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            host = self.headers["Host"]
            return self.answer({"commitUrl": f"http://{host}/{NAME}/commit/{COMMIT}", "commitOid": COMMIT})
        return self.answer({})

    def do_GET(self):
        found = re.search(r"/resolve/[^/]+/([^?]+)", self.path)
        if found and (name := found[1]) in self.files:
            body = self.files[name]
            return self.answer(body, ETag=f'"{hashlib.sha1(body).hexdigest()}"')
        if self.path.startswith(f"/api/models/{NAME}") and "/tree/" not in self.path:
            return self.answer({"id": NAME, "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.files]})
        if "/tree/" in self.path:
            return self.answer([{"type": "file", "path": n, "size": len(b), "oid": n} for n, b in self.files.items()])
        return self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET


@pytest.fixture
def hub():
    """(address, files) of an empty hub."""
    handler = type("OneHub", (Hub,), {"files": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler.files
    server.shutdown()


SCRIPT = """
import sys, torch
from kforcing import PushForwardLM
student = PushForwardLM.from_pretrained(sys.argv[1])
student.push_to_hub("team/student")
again = PushForwardLM.from_pretrained("team/student")
assert again.design == student.design and again.k == student.k
for name, weights in student.state_dict().items():
    assert torch.equal(weights, again.state_dict()[name]), name
print("equal weights")
"""


def test_a_student_is_pushed_to_a_hub_and_read_back_by_its_name(hub, tmp_path):
    url, files = hub
    make_sequential(make_backbone()).save_pretrained(tmp_path / "student")
    environment = os.environ | {
        "HF_ENDPOINT": url, "HF_TOKEN": "hf_test", "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    line = [sys.executable, "-c", SCRIPT, str(tmp_path / "student")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, env=environment)
    assert done.stdout.endswith("equal weights\n"), done.stderr[-3000:]
    assert {"config.json", "model.safetensors", "generation_config.json", "README.md"} <= set(files)
