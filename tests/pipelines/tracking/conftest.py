"""A prepared corpus and an MLflow server."""

import json

import pytest


@pytest.fixture
def prepared(tmp_path):
    from pipelines.data.tokenise import Prepared

    for split in ("train", "heldout"):
        folder = tmp_path / "data" / "abc" / split
        folder.mkdir(parents=True)
        facts = {"rows": 1, "tokens": 2, "documents": 3, "seconds": 4.0, "shards": []}
        (folder / "manifest.json").write_text(json.dumps(facts))
    return Prepared(tmp_path / "data" / "abc")


@pytest.fixture
def server(tmp_path):
    from tests.pipelines.tracking.runs import kill, start_server
    from tests.ranks import free_port

    port = free_port()
    process = start_server(tmp_path, port)
    yield f"http://127.0.0.1:{port}", process
    kill(process)
