import httpx
import pytest

from tests.endpoint import endpoint, save_model
from tests.models import make_backbone, make_sequential


@pytest.fixture(scope="module")
def student():
    return make_sequential(make_backbone())


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(base URL, service) of the student under the name `tiny`."""
    folder = save_model(tmp_path_factory.mktemp("served") / "model", chat=True)
    with endpoint(folder, max_num_seqs=4, max_model_len=56, max_waiting=40) as (url, service):
        yield url, service


@pytest.fixture(scope="module")
def http(served):
    with httpx.Client(base_url=served[0], timeout=30) as client:
        yield client
