"""What could run other people's code, or read other people's files, is refused."""

import ast
import json

import pytest

from kforcing.loading import load_tokenizer
from kforcing.model_uri import check_path, parse_model_uri, refuse_links
from pipelines.config.overrides import apply
from pipelines.config.recipes import recipe
from pipelines.config.section import ConfigError
from pipelines.config.validation import validate
from pipelines.data.token_store import is_complete
from pipelines.evaluation.config import evaluation_config
from pipelines.failures import Failure
from serve.protocol.requests import MAX_CHOICES, MAX_LOGPROBS, MAX_STOPS, StopText, Text
from serve.protocol.tools import MAX_TOOLS
from serve.settings import Settings
from tests.infra.manifests import ROOT

FILES = [file for package in ("kforcing", "pipelines", "serve") for file in sorted((ROOT / package).rglob("*.py"))]


def calls():
    """Each call of the code: its place, the name that is called, and its keywords that are constants."""
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                keywords = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
                yield f"{file.relative_to(ROOT)}:{node.lineno}", ast.unparse(node.func), keywords


def test_pickles_are_loaded_as_tensors_alone_and_no_other_loader_of_code_is_used():
    dangerous = {"eval", "exec", "pickle.load", "pickle.loads", "cloudpickle.load", "cloudpickle.loads", "yaml.load"}
    for place, name, keywords in calls():
        assert name not in dangerous, place
        if name == "torch.load":
            assert keywords.get("weights_only") is True, place
        if name in ("np.load", "numpy.load"):
            assert keywords.get("allow_pickle") is False, place


def test_code_of_model_repositories_is_never_run():
    sites = 0
    for place, name, keywords in calls():
        assert keywords.get("trust_remote_code", False) is False, place
        if name.startswith("Auto") and name.endswith(".from_pretrained"):
            assert keywords.get("trust_remote_code") is False, place
            sites += 1
    assert sites >= 10


def with_code(folder, marker):
    """A model folder whose config and tokenizer name classes of a file that lies beside them."""
    folder.mkdir()
    names = {
        "AutoConfig": "code.Config",
        "AutoModelForCausalLM": "code.Model",
        "AutoTokenizer": ["code.Tokenizer", None],
    }
    (folder / "config.json").write_text(json.dumps({"model_type": "unheard-of", "auto_map": names}))
    record = {"tokenizer_class": "Unheard", "auto_map": names}
    (folder / "tokenizer_config.json").write_text(json.dumps(record))
    (folder / "code.py").write_text(f"open({str(marker)!r}, 'w').close()\nConfig = Model = Tokenizer = object\n")
    return folder


def test_a_teacher_that_brings_code_is_refused_in_one_line_and_its_code_does_not_run(tmp_path):
    folder = with_code(tmp_path / "teacher", tmp_path / "marker")
    config = apply(recipe("smoke"), {}, [f"teacher.path={folder}", f"output_dir={tmp_path}/run"])
    with pytest.raises(ConfigError, match=r"contains custom code|trust_remote_code") as error:
        validate(config)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="contains custom code"):
        load_tokenizer(folder)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("uri", ["models:/..@k4", "models:/../3", "models:/a/../b@k4"])
def test_the_name_of_a_registered_model_leads_nowhere_else(uri):
    with pytest.raises(ValueError, match="names no registered model"):
        parse_model_uri(uri)


@pytest.mark.parametrize("path", ["../../etc", "a/%2e%2e/b", "a/%252e%252e/b", "a\\..\\b"])
def test_a_path_below_a_run_does_not_leave_it(path):
    with pytest.raises(ValueError, match="leads out of its folder"):
        check_path(f"runs:/0a1b/{path}")
    check_path("runs:/0a1b/model..v2/k4")


def test_a_downloaded_model_with_a_symbolic_link_is_refused(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match=r"config.json is a symbolic link"):
        refuse_links(tmp_path)


@pytest.mark.parametrize("name", ["../precious.parquet", "/precious.parquet"])
def test_a_manifest_that_names_files_elsewhere_is_refused_before_one_is_removed(tmp_path, name):
    (tmp_path / "store").mkdir()
    (tmp_path / "precious.parquet").write_text("not to be removed")
    entry = {"file": name, "rows": 1, "crc32": 1}
    (tmp_path / "store" / "manifest.json").write_text(json.dumps({"rows": 1, "shards": [entry]}))
    with pytest.raises(Failure, match="a path outside of this folder"):
        is_complete(tmp_path / "store")
    assert (tmp_path / "precious.parquet").is_file()


def test_the_endpoints_limits_are_those_of_the_code():
    page = (ROOT / "serve" / "README.md").read_text()
    table = page[page.index("| limit | value |") :].partition("\n\n")[0]
    settings, (longest_stop,) = Settings(model="x"), StopText.__metadata__
    for row in (
        f"| body | `max_body_mb` ({settings.max_body_mb:g} MiB) |",
        f"| characters of a prompt | {Text.__metadata__[0].max_length:,} |",
        f"| choices (prompts × `n`) | {MAX_CHOICES} |",
        f"| stop strings, stop token ids | {MAX_STOPS} each; {longest_stop.max_length} characters a string |",
        f"| `logprobs`, `top_logprobs` | {MAX_LOGPROBS} |",
        f"| tools | {MAX_TOOLS} |",
        f"`max_num_seqs` ({settings.max_num_seqs}), `max_waiting` ({settings.max_waiting}) for each model of a replica",
        f"`drain_s` ({settings.drain_s:g})",
    ):
        assert row in table


def test_keys_are_compared_in_constant_time():
    source = (ROOT / "serve" / "middleware.py").read_text()
    assert "hmac.compare_digest(given.strip(), key) for key in self.api_keys" in source
    assert "any(known)" in source


SECRET = "hunter" + "2" * 6


@pytest.mark.parametrize("field", ["tracking.uri", "data.source"])
def test_a_password_in_a_config_is_refused_and_not_repeated(tmp_path, field):
    config = apply(recipe("smoke"), {}, [f"{field}=s3://me:{SECRET}@host/x", f"output_dir={tmp_path}/run"])
    with pytest.raises(ConfigError, match=rf"{field}=s3://\*\*\*@host/x holds a password or another secret") as error:
        validate(config)
    assert SECRET not in str(error.value)
    with pytest.raises(ConfigError, match="holds a password or another secret"):
        evaluation_config([f"tracking.uri=http://me:{SECRET}@host"])
