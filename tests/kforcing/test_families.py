"""Architectures that work as a backbone, and those that are refused by the name of the feature that is in the way."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import kforcing
from kforcing import Design, PushForwardLM, SequentialConfig
from kforcing.backbone import FinishedHead, head, lm_head
from kforcing.families import FAMILIES, find_obstacle, main, tiny_copy

SEQUENTIAL = Design("sequential", "gumbel")


def config_of(family, **settings):
    return AutoConfig.for_model(family, **settings)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("mixtral", {}),
        ("gemma3", {}),  # text and images: the text alone
        ("granite", {"logits_scaling": 8.0, "embedding_multiplier": 12.0}),
        ("cohere", {}),
        ("nanochat", {}),
        ("hyperclovax", {"logits_scaling": 0.125}),
    ],
)
def test_these_families_work(family, settings):
    assert find_obstacle(config_of(family, **settings), SEQUENTIAL, 3) is None


@pytest.mark.parametrize(
    ("family", "feature"),
    [
        ("gemma2", "soft-capped (attn_logit_softcapping=50.0)"),
        ("deepseek_v3", "keys and values have different widths (multi-head latent attention)"),
        ("bloom", "sdpa through its AttentionInterface (ALiBi position biases)"),
        ("gpt_oss", "sdpa through its AttentionInterface (attention sinks)"),
        ("gptj", "sdpa through its AttentionInterface"),
        ("qwen3_next", "keep a state instead of keys and values (linear_attention)"),
        ("mamba", "keep a state instead of keys and values"),
        ("gemma3n", "layers share the keys and values of other layers"),
        ("bert", "it is an encoder"),
        ("t5", "an encoder and a decoder"),
        ("llama4", "no base model apart from its LM head"),
        ("modernbert-decoder", "its logits are not those of its LM head"),
    ],
)
def test_a_refused_family_is_told_its_feature(family, feature):
    obstacle = find_obstacle(config_of(family))
    assert feature in obstacle
    assert "\n" not in obstacle


def test_an_architecture_of_which_there_is_no_tiny_copy_is_not_refused():
    assert find_obstacle(config_of("hunyuan_v1_dense")) is None  # its defaults leave out the width of heads


def test_trying_leaves_the_random_numbers_of_the_process_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    find_obstacle(config_of("llama"))
    assert torch.equal(torch.rand(1), expected)


def finished(family, **settings):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_copy(config_of(family, **settings)), attn_implementation="sdpa")
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=2.0)
    return model.eval()


@pytest.mark.parametrize("family", ["granite", "cohere", "nanochat"])
def test_the_lm_head_scales_and_caps_as_the_model_does(family):
    model = finished(family, **({"logits_scaling": 8.0} if family == "granite" else {}))
    ids = torch.arange(2, 10)[None]
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        states = model.base_model(input_ids=ids).last_hidden_state
        assert isinstance(head(model), FinishedHead)
        torch.testing.assert_close(lm_head(model, states), whole)
        assert (whole - states @ model.get_output_embeddings().weight.T).abs().max() > 0.1
        student = PushForwardLM.from_backbone(model, 1, SEQUENTIAL).eval()
        # One row of states rounds otherwise than many.
        torch.testing.assert_close(student(ids, torch.tensor([[0.5]]))[:, 0], whole[:, -1], rtol=1e-4, atol=1e-4)


def test_rows_of_a_scaled_lm_head_are_not_taken_for_logits():
    design = Design("sequential", "gumbel", sequential=SequentialConfig(shortlist=8))
    with pytest.raises(ValueError, match="shortlist=8 takes logits from rows of the LM head, and Cohere"):
        PushForwardLM.from_backbone(finished("cohere"), 2, design)
    assert "shortlist=8 takes logits from rows" in find_obstacle(config_of("cohere"), design, 2)
    assert find_obstacle(config_of("llama"), design, 2) is None


@pytest.mark.long
def test_the_readme_has_the_table_that_the_command_prints(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["families"])
    main()
    printed = capsys.readouterr().out
    assert len(set(re.findall(r"`(\S+)`", printed))) == len(FAMILIES.split()) >= 30
    readme = (Path(kforcing.__file__).parent / "README.md").read_text()
    assert printed.strip() in readme
