"""Weights are read whole and copied right, or not at all."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, LlamaConfig

from kforcing.backbone import load_ar
from kforcing.families import tiny_copy
from kforcing.loading import model_without_weights, save_checked
from tests.models import CONFIGS, make_backbone, make_sequential

IDS = torch.arange(8)[None]


def change(folder, edit):
    """Edit the weights of a saved model."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    edit(weights)
    save_file(weights, file, metadata={"format": "pt"})


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_a_model_that_lacks_weights_is_refused_instead_of_getting_random_ones(tmp_path):
    make_backbone().save_pretrained(tmp_path)
    change(tmp_path, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"lacks 1 weights of LlamaForCausalLM, .*: model.layers.1.mlp.up_proj.weight"):
        load_ar(str(tmp_path))


def test_a_saved_model_that_computes_something_else_is_refused(tmp_path):
    model = make_backbone()
    model.config.hidden_act = "relu"  # not what it computes with
    with pytest.raises(ValueError, match=r"computes something else than the one in memory: logits that differ by \d"):
        save_checked(model, tmp_path)


def test_a_model_with_a_broken_weight_is_refused(tmp_path):
    model = make_backbone()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="logits of LlamaForCausalLM are not finite"):
        save_checked(model, tmp_path)


def test_a_student_whose_shortlist_leaves_tokens_out_is_saved(tmp_path):
    for i, rank in enumerate((0, 8)):
        student = make_sequential(make_backbone(), 3, hint_layers=1, shortlist=4, draft_rank=rank)
        save_checked(student, tmp_path / str(i))
        assert (tmp_path / str(i) / "model.safetensors").is_file()


def with_quantisation(folder, **record):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": record}))


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "mxfp4"])
def test_quantised_weights_are_refused_by_the_name_of_the_method(tmp_path, method):
    make_backbone().save_pretrained(tmp_path)
    with_quantisation(tmp_path, quant_method=method, bits=4, load_in_4bit=True)
    with pytest.raises(ValueError, match=rf"its weights are quantised \({method}\), which cannot be undone here"):
        load_ar(str(tmp_path))
    with pytest.raises(ValueError, match=rf"its weights are quantised \({method}\), which cannot be undone here"):
        model_without_weights(tmp_path)


def test_fp8_weights_are_read_and_copied_as_what_they_stand_for(tmp_path):
    pytest.importorskip("accelerate")
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**CONFIGS["llama"].to_dict(), **sizes})).eval()
    model.save_pretrained(tmp_path / "fp8")

    def quantise(weights):
        for name, weight in list(weights.items()):
            if name.startswith("model.layers") and weight.ndim == 2:
                scale = weight.abs().max() / 448
                weights[name] = (weight / scale).to(torch.float8_e4m3fn)
                weights[name.replace("weight", "weight_scale_inv")] = scale.view(1, 1)
                model.get_parameter(name).data = weights[name].float() * scale

    change(tmp_path / "fp8", quantise)
    with_quantisation(tmp_path / "fp8", quant_method="fp8", weight_block_size=[128, 128], activation_scheme="dynamic")
    read = load_ar(str(tmp_path / "fp8"))
    torch.testing.assert_close(logits(read), logits(model), rtol=1e-4, atol=1e-4)
    save_checked(read, tmp_path / "copy")
    assert "quantization_config" not in json.loads((tmp_path / "copy" / "config.json").read_text())
    assert {weight.dtype for weight in load_file(tmp_path / "copy" / "model.safetensors").values()} == {torch.float32}
    torch.testing.assert_close(logits(load_ar(str(tmp_path / "copy"))), logits(model), rtol=1e-4, atol=1e-4)


def test_of_a_model_of_text_and_images_the_text_is_read(tmp_path):
    config = AutoConfig.for_model("gemma3")
    config.text_config = tiny_copy(config.text_config)
    vision = {
        "num_hidden_layers": 1,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "image_size": 28,
        "intermediate_size": 8,
    }
    for name, value in vision.items():
        setattr(config.vision_config, name, value)
    whole = AutoModelForImageTextToText.from_config(config).eval()
    whole.save_pretrained(tmp_path / "whole")
    text = load_ar(str(tmp_path / "whole"))
    assert type(text).__name__ == type(model_without_weights(tmp_path / "whole")).__name__ == "Gemma3ForCausalLM"
    torch.testing.assert_close(logits(text), logits(whole))
    save_checked(text, tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["model_type"] == "gemma3_text"
