"""A student is a model of transformers: it is loaded, saved and recognised like any other."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from kforcing import Design, PushForwardConfig, PushForwardLM, SequentialConfig
from kforcing.loading import load_model
from tests.models import VOCAB, make_backbone, make_sequential

FINISHED_RUN = Path(__file__).parents[1] / "data" / "finished_run.tar.gz"
DESIGNS = {
    "argmax": Design(),
    "copy": Design("sequential", "gumbel"),
    "adapter": Design("sequential", "gumbel", sequential=SequentialConfig(hints="adapter", hint_layers=1)),
    "bigram": Design("sequential", "gumbel", sequential=SequentialConfig(draft="bigram")),
    "none": Design("sequential", "gumbel", sequential=SequentialConfig(hints="none", draft="none")),
    "trained_trunk": Design("sequential", "gumbel", sequential=SequentialConfig(freeze_trunk=False)),
}


def make_student(name="llama", design="copy", k=3):
    student = PushForwardLM.from_backbone(make_backbone(name), k, DESIGNS[design]).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # a new read-out's last maps are zero, which would hide a weight that is not loaded
        for parameter in student.readout.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return student


def logits(student):
    context = torch.arange(14).view(2, 7) % VOCAB
    noise = torch.linspace(0.1, 0.9, 2 * student.k, dtype=torch.float64).view(2, student.k)
    with torch.no_grad():
        return student(context, noise)


def test_a_student_is_a_pretrained_model():
    student = make_student()
    assert isinstance(student, PreTrainedModel)
    assert student.can_generate()
    assert callable(student.push_to_hub)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("design", DESIGNS)
def test_a_loaded_student_equals_the_saved_one(tmp_path, name, design):
    student = make_student(name, design)
    student.save_pretrained(tmp_path)
    again = PushForwardLM.from_pretrained(tmp_path)
    assert again.k == 3
    assert again.design == student.design
    assert not again.training
    mine, theirs = student.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert torch.equal(logits(student), logits(again))
    trainable = {key for key, parameter in student.named_parameters() if parameter.requires_grad}
    assert {key for key, parameter in again.named_parameters() if parameter.requires_grad} == trainable
    assert any(key.startswith("backbone.") for key in trainable) == (not student.design.exact_trunk)


def test_adapters_of_a_loaded_student_point_into_its_own_trunk(tmp_path):
    make_student(design="adapter").save_pretrained(tmp_path)
    again = PushForwardLM.from_pretrained(tmp_path)
    adapter = again.readout.layers.layers[0].mlp.up_proj
    assert adapter._base[0] is again.backbone.model.layers[1].mlp.up_proj


@pytest.mark.parametrize("name", ["k1", "k2"])
def test_a_student_of_the_old_format_loads_bit_for_bit(tmp_path, name):
    with tarfile.open(FINISHED_RUN) as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "runs" / "tiny" / name
    saved = load_file(folder / "model.safetensors")
    student = PushForwardLM.from_pretrained(folder)
    assert student.k == int(name[1])
    assert student.state_dict().keys() == saved.keys()
    assert all(torch.equal(student.state_dict()[key], saved[key]) for key in saved)
    student.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[key], saved[key]) for key in saved)


@pytest.mark.parametrize("kept", ["backbone.lm_head.weight", "backbone.model.embed_tokens.weight"])
def test_either_name_of_a_tied_weight_is_enough(tmp_path, kept):
    student = make_student("qwen2")
    student.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    tied = weights.pop("backbone.model.embed_tokens.weight")
    assert "backbone.lm_head.weight" not in weights
    save_file(weights | {kept: tied}, tmp_path / "model.safetensors")
    again = PushForwardLM.from_pretrained(tmp_path)
    assert again.backbone.lm_head.weight is again.backbone.model.embed_tokens.weight
    assert torch.equal(logits(student), logits(again))


def test_sharded_weights_load(tmp_path):
    student = make_student()
    student.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert not (tmp_path / "model.safetensors").exists()
    assert torch.equal(logits(PushForwardLM.from_pretrained(tmp_path)), logits(student))


def test_dtype_is_honoured(tmp_path):
    student = make_student()
    student.save_pretrained(tmp_path)
    half = PushForwardLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    expected = student.to(torch.bfloat16).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in half.state_dict().items())
    half.save_pretrained(tmp_path / "half")
    assert PushForwardLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_device_map_is_honoured(tmp_path):
    pytest.importorskip("accelerate")
    student = make_student()
    student.save_pretrained(tmp_path)
    again = PushForwardLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert again.device == torch.device("cpu")
    assert torch.equal(logits(again), logits(student))


def test_auto_classes_find_a_student(tmp_path):
    student = make_student()
    student.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, PushForwardConfig)
    assert (config.model_type, config.k, config.design) == ("kforcing", 3, student.design)
    for auto in (AutoModel, AutoModelForCausalLM):
        again = auto.from_pretrained(tmp_path)
        assert type(again) is PushForwardLM
        assert torch.equal(logits(again), logits(student))


def test_a_saved_student_is_json_and_safetensors(tmp_path):
    make_student().save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["model_type"] == "kforcing"
    assert record["format_version"] == 2
    assert record["k"] == 3
    assert record["design"]["sequential"]["hints"] == "copy"
    assert record["architectures"] == ["PushForwardLM"]
    assert {f.suffix for f in tmp_path.iterdir()} == {".json", ".safetensors"}


def test_an_unknown_format_version_is_refused(tmp_path):
    make_student().save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(record | {"format_version": 3}))
    with pytest.raises(ValueError, match="format version 3; this release reads version 2"):
        PushForwardLM.from_pretrained(tmp_path)


def test_a_larger_k_keeps_the_weights():
    student = make_student()
    before = logits(student)[:, :2]
    student.set_k(5)
    assert student.k == 5
    assert student.config.design == DESIGNS["copy"]
    context = torch.arange(14).view(2, 7) % VOCAB
    noise = torch.linspace(0.1, 0.9, 6, dtype=torch.float64).view(2, 3)
    assert torch.equal(student(context, noise)[:, :2], before)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        student.set_k(0)


def test_the_teachers_eos_ids_stay_with_the_student(tmp_path):
    backbone = make_backbone()
    backbone.generation_config.eos_token_id = [4, 7]
    PushForwardLM.from_backbone(backbone, 2).save_pretrained(tmp_path)
    again = PushForwardLM.from_pretrained(tmp_path)
    assert again.generation_config.eos_token_id == [4, 7]
    assert again.backbone.generation_config.eos_token_id == [4, 7]


def test_the_loader_of_models_loads_students_and_ar_models(tmp_path):
    student = make_sequential(make_backbone())
    student.save_pretrained(tmp_path / "student")
    student.backbone.save_pretrained(tmp_path / "ar")
    loaded = load_model(tmp_path / "student", device="cpu")
    assert type(loaded) is PushForwardLM
    assert torch.equal(logits(loaded), logits(student))
    ids = torch.arange(5)[None]
    assert torch.equal(load_model(tmp_path / "ar", device="cpu")(ids).logits, student.backbone(ids).logits)
    assert load_model(tmp_path / "student", device="cpu", dtype="bf16").dtype == torch.bfloat16


@pytest.mark.cluster
def test_after_import_kforcing_the_auto_classes_know_students_and_do_not_warn(tmp_path):
    with tarfile.open(FINISHED_RUN) as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "runs" / "tiny" / "k2"
    code = (
        "import sys, warnings, kforcing; assert 'torch' not in sys.modules; warnings.simplefilter('always'); "
        "import transformers.modeling_layers; "  # it imports the Auto classes before it is whole, and students need it
        "from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer; "
        f"print(AutoTokenizer.from_pretrained({str(folder)!r}).eos_token); "
        f"print(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained({str(folder)!r})).k)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "<|endoftext|>\n2\n"
    assert done.stderr == ""
    assert AutoTokenizer.from_pretrained(folder)("the").input_ids
