"""The comparison of weights of 8 bits with a model's own."""

import torch

from kforcing.backbone import random_llama
from kforcing.engine import linear
from pipelines.benchmarks.quantization import compare
from tests.models import needs_kernels

pytestmark = needs_kernels
SMALL = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL |= {"num_key_value_heads": 2, "intermediate_size": 128}
DOCUMENTS = [list(range(3, 40)), list(range(100, 120))]


def test_weights_that_8_bits_hold_exactly_change_nothing():
    model = random_llama(**SMALL)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                values, scale = linear.quantise(weight)
                weight.copy_(values * scale[:, None])
    sums = compare(model, DOCUMENTS)
    assert sums[:, 0].tolist() == [36, 19]
    torch.testing.assert_close(sums[:, 1], sums[:, 2], rtol=0, atol=1.0)
    assert sums[:, 5].tolist() == [36, 19]


def test_other_weights_change_the_distributions_a_little():
    sums = compare(random_llama(**SMALL), DOCUMENTS).sum(dim=0)
    kl, tv = (sums[3:5] / sums[0]).tolist()
    assert 0 < kl < 1e-3
    assert 0 < tv < 0.05
