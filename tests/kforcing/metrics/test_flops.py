import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, LlamaConfig

from kforcing import PushForwardLM
from kforcing.engine import Engine, EngineConfig, Request
from kforcing.metrics.flops import WeightReads, flop_counter, measured_step, predicted_step
from tests.models import make_sequential


def wide_llama():
    """A backbone whose matrices outweigh its vectors."""
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def test_products_and_attention_are_counted_forward_and_backward():
    x, w = torch.randn(5, 7), torch.randn(7, 11, requires_grad=True)
    with flop_counter() as counter:
        (x @ w).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 5 * 7 * 11  # the product and the weight's gradient
    q = torch.randn(1, 2, 6, 8)
    with flop_counter() as counter, torch.no_grad():
        scaled_dot_product_attention(q, q, q)
    assert counter.get_total_flops() == 2 * 2 * (2 * 6 * 6 * 8)


def test_weights_are_counted_as_often_as_they_are_read():
    layer, table = torch.nn.Linear(4, 6, bias=False), torch.nn.Embedding(100, 4)
    both = torch.nn.ModuleList([layer, table])
    with WeightReads(both) as reads, torch.no_grad():
        layer(torch.zeros(3, 4))
        layer(table(torch.tensor([1, 2])))
    assert reads.bytes == 4 * (2 * 24 + 2 * 4)  # the matrix twice, two rows of the table


@pytest.mark.parametrize(
    "parts",
    [
        None,
        {},
        {"hint_layers": 1},
        {"hints": "adapter"},
        {"hints": "none", "draft": "none"},
        {"shortlist": 5},
        {"draft": "bigram"},
    ],
    ids=str,
)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_counted_flops_of_a_step_are_those_that_its_shapes_predict(parts, k):
    backbone = wide_llama()
    student = PushForwardLM.from_backbone(backbone, 4) if parts is None else make_sequential(backbone, **parts)
    predicted, measured = predicted_step(student, k), measured_step(student, k, context=4)
    assert measured.flops == pytest.approx(predicted.flops, rel=0.1)  # attention is left out of the prediction
    assert measured.bytes == pytest.approx(predicted.bytes, rel=0.05)  # vectors and embedding rows are


@pytest.mark.parametrize("parts", [{"hint_layers": 1}, {"shortlist": 5}, {"shortlist": 5, "draft": "none"}], ids=str)
@pytest.mark.parametrize("k", [2, 4])
def test_a_step_in_exact_mode_costs_what_its_shapes_predict(parts, k):
    backbone = wide_llama()
    student = make_sequential(backbone, **parts)
    options = EngineConfig(1, 64, k=k, acceptance="exact", adapt_width=False, row_kernel=False)
    engine = Engine(student, options)
    engine.submit(Request([1, 2, 3]))
    for _ in range(2):
        engine.step()
    with flop_counter() as flops:
        engine.step()
    with WeightReads(student) as reads:
        engine.step()
    predicted = predicted_step(student, k, exact=True)
    assert flops.get_total_flops() == pytest.approx(predicted.flops, rel=0.1)
    assert reads.bytes == pytest.approx(predicted.bytes, rel=0.05)
