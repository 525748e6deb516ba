import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from scipy import stats

from kforcing import coupling
from kforcing.coupling import BLOCK, COUPLINGS, first_largest, gumbel_max, inverse_cdf
from kforcing.keys import derive_key
from kforcing.noise import race_words, uniform


def logits(*probabilities):
    return torch.tensor([math.log(p) if p else -math.inf for p in probabilities])


def draw(p, z):
    return inverse_cdf(logits(*p).expand(len(z), -1), torch.tensor(z, dtype=torch.float64)).tolist()


def test_tokens_fill_their_bins_in_vocabulary_order():
    assert draw([0.5, 0.25, 0.25], [0.1, 0.49, 0.51, 0.74, 0.76, 0.99]) == [0, 0, 1, 1, 2, 2]


def test_a_tie_takes_the_lower_token():
    even = torch.zeros(2, 4)  # steps at exactly 1/4, 1/2, 3/4
    assert inverse_cdf(even, torch.tensor([0.5, 0.75])).tolist() == [1, 2]
    above = torch.tensor([math.nextafter(0.5, 1), math.nextafter(0.75, 1)], dtype=torch.float64)
    assert inverse_cdf(even, above).tolist() == [2, 3]


def test_zero_noise_takes_the_first_possible_token():
    assert draw([0.0, 0.0, 1.0, 0.0], [0.0]) == [2]
    assert draw([0.3, 0.7], [0.0]) == [0]


def test_noise_near_one_takes_the_last_possible_token():
    nearly = math.nextafter(1.0, 0)
    assert draw([0.3, 0.7, 0.0, 0.0], [nearly]) == [1]
    many = torch.randn(64, 50_000, generator=torch.Generator().manual_seed(0))
    assert inverse_cdf(many, torch.full((64,), nearly, dtype=torch.float64)).max() < 50_000


def test_impossible_tokens_are_never_drawn():
    z = (torch.arange(1000, dtype=torch.float64) / 1000).tolist()
    assert set(draw([0.0, 0.4, 0.0, 0.6, 0.0], z)) == {1, 3}


def test_temperature_sharpens():
    z = torch.tensor([0.4, 0.4])
    two = logits(0.3, 0.7).expand(2, 2)
    assert inverse_cdf(two, z, torch.tensor([1.0, 0.5])).tolist() == [1, 1]
    assert inverse_cdf(two, torch.tensor([0.2, 0.2]), torch.tensor([1.0, 0.5])).tolist() == [0, 1]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=12), st.integers(0, 1000))
def test_result_is_the_formula(weights, seed):
    p = torch.tensor(weights, dtype=torch.float64)
    z = uniform(derive_key(seed), torch.arange(50), 0, torch.zeros(50, dtype=torch.int64))
    cdf = p.log().softmax(0).cumsum(0)
    expected = [int((cdf >= min(float(x), float(cdf[-1]))).nonzero()[0]) for x in z]
    assert inverse_cdf(p.log().expand(50, -1), z).tolist() == expected


def test_draws_follow_the_distribution():
    p = torch.tensor([0.05, 0.2, 0.02, 0.4, 0.13, 0.2])
    z = uniform(derive_key(5), torch.arange(20_000), 0, torch.zeros(20_000, dtype=torch.int64))
    counts = torch.bincount(inverse_cdf(p.log().expand(20_000, -1), z), minlength=6)
    assert stats.chisquare(counts.numpy(), (p / p.sum() * 20_000).numpy()).pvalue > 1e-3


def noise(n, key=0):
    return uniform(derive_key(key), torch.arange(n), 0, torch.zeros(1, dtype=torch.int64))


def test_gumbel_max_samples_the_distribution():
    p = torch.tensor([0.5, 0.3, 0.15, 0.0, 0.05])
    n = 40_000
    counts = torch.bincount(gumbel_max(p.log().expand(n, 5), noise(n)), minlength=5).numpy()
    assert counts[3] == 0
    keep = p.numpy() > 0
    expected = p.double().numpy()[keep]
    assert stats.chisquare(counts[keep], expected / expected.sum() * n).pvalue > 1e-3


def test_gumbel_max_keeps_close_distributions_together():
    """Agreement under the same noise is at least (1 − TV) / (1 + TV); inverse CDF promises no such thing."""
    g = torch.Generator().manual_seed(0)
    one = torch.randn(64, generator=g)
    for spread in (0.05, 0.5, 2.0):
        other = one + spread * torch.randn(64, generator=g)
        tv = (one.softmax(-1) - other.softmax(-1)).abs().sum().item() / 2
        z = noise(20_000)
        agree = (gumbel_max(one.expand(len(z), -1), z) == gumbel_max(other.expand(len(z), -1), z)).float().mean().item()
        assert agree > (1 - tv) / (1 + tv) - 0.015


def test_gumbel_max_honours_temperature_and_ignores_a_shift():
    p = torch.tensor([0.6, 0.4]).log().expand(20_000, 2)
    z = noise(20_000, key=1)
    cold = gumbel_max(p, z, torch.tensor(0.5)).float().mean().item()
    assert abs(cold - 0.16 / (0.16 + 0.36)) < 0.015
    assert torch.equal(gumbel_max(p + 7, z), gumbel_max(p, z))


def test_gumbel_max_samples_a_large_vocabulary():
    V, n = 5_003, 20_000
    p = torch.randn(V, generator=torch.Generator().manual_seed(0)).double().mul(2).exp()
    drawn = torch.cat([gumbel_max(p.log().expand(500, V), part) for part in noise(n, key=3).split(500)])
    order = p.argsort(descending=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(V))
    groups = (p[order].cumsum(0) / p.sum() * 200).long().clamp_(max=199)  # tokens of about equal probability together
    expected = torch.zeros(200, dtype=torch.float64).scatter_add_(0, groups, p[order] / p.sum() * n)
    counts = torch.bincount(groups[rank[drawn]], minlength=200)
    keep = expected > 5
    assert keep.sum() > 120
    assert stats.chisquare(counts[keep], expected[keep] * counts[keep].sum() / expected[keep].sum()).pvalue > 1e-3


@pytest.mark.parametrize("shape", ["neighbouring positions", "neighbouring seeds", "positions of two windows"])
def test_tokens_of_related_noise_are_independent(shape):
    n, zero, numbers = 20_000, torch.zeros(1, dtype=torch.int64), torch.arange(20_001)
    if shape == "neighbouring positions":
        z = uniform(derive_key(0), zero, 0, numbers)
        one, other = z[:-1], z[1:]
    elif shape == "neighbouring seeds":
        one, other = uniform(5, zero, 0, numbers[:n]), uniform(6, zero, 0, numbers[:n])
    else:
        one, other = uniform(5, zero, 7, numbers[:n]), uniform(5, zero, 8, numbers[:n])
    p = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(n, 4)
    table = torch.bincount(gumbel_max(p, one) * 4 + gumbel_max(p, other), minlength=16).view(4, 4)
    assert stats.chi2_contingency(table.numpy()).pvalue > 1e-3


def test_race_words_are_uniform_over_noise_and_over_tokens():
    words = race_words(noise(20_000), torch.arange(6))
    assert words.shape == (20_000, 6)
    u = (words.double() + 0.5) * 2.0**-31
    assert u.min() > 0
    assert u.max() < 1
    assert all(stats.kstest(u[:, i].numpy(), "uniform").pvalue > 1e-3 for i in range(6))
    assert (torch.corrcoef(torch.cat([u, noise(20_000)[:, None]], 1).T) - torch.eye(7)).abs().max() < 0.03
    of_tokens = (race_words(noise(4, key=1), torch.arange(50_000)).double() + 0.5) * 2.0**-31
    assert all(stats.kstest(row.numpy(), "uniform").pvalue > 1e-3 for row in of_tokens)
    pairs = torch.cat([of_tokens, of_tokens.roll(1, 1), of_tokens.roll(2, 1), of_tokens.roll(256, 1)])
    assert (torch.corrcoef(pairs) - torch.eye(16)).abs().max() < 0.02


@pytest.mark.parametrize("change", [2.0**-52, 2.0**-32, 2.0**-21, 2.0**-20, 2.0**-1])
def test_one_bit_of_the_noise_changes_half_of_the_bits_of_all_words(change):
    z = noise(64) % 0.5
    changed = race_words(z, torch.arange(500)) ^ race_words(
        z + change * (1 if change < 0.5 else 0.999), torch.arange(500)
    )
    shares = torch.stack([(changed >> bit & 1).float().mean() for bit in range(31)])
    assert (shares - 0.5).abs().max() < 0.02


def test_race_words_equal_the_mixer_in_python_integers():
    def mixed(low, high, index):
        x = index * 0x9E3779B9 + low & 0xFFFFFFFF
        x = (x ^ x >> 17) * 0xED5AD4BB + high & 0xFFFFFFFF
        x = (x ^ x >> 11) * 0xAC4C1B51 & 0xFFFFFFFF
        x = (x ^ x >> 15) * 0x31848BAB & 0xFFFFFFFF
        return (x ^ x >> 14) & 0x7FFFFFFF

    z = noise(5)
    bits = [int(x * 2**52) for x in z.tolist()]
    assert race_words(z, torch.arange(40)).tolist() == [
        [mixed(b & 0xFFFFFFFF, b >> 32, v) for v in range(40)] for b in bits
    ]
    assert torch.equal(race_words(z, torch.arange(3)), race_words(z, torch.arange(6))[:, :3])


@pytest.mark.parametrize("name", list(COUPLINGS))
def test_some_tokens_are_drawn_as_if_all_others_were_impossible(name):
    g = torch.Generator().manual_seed(0)
    logits, z, ids = (
        torch.randn(3000, generator=g) * 3,
        noise(200),
        torch.randperm(3000, generator=g)[:40].sort().values,
    )
    masked = torch.full((3000,), -math.inf).scatter(0, ids, logits[ids])
    few = COUPLINGS[name](logits[ids].expand(200, 40), z, 0.7, ids)
    assert torch.equal(few, COUPLINGS[name](masked.expand(200, 3000), z, 0.7))
    assert len(set(few.tolist())) > 10


def test_a_certain_token_wins_every_race():
    """Whatever its own word is: the words end below one."""
    certain = torch.full((2000, 5), -math.inf)
    certain[:, 3] = -30.0
    assert (gumbel_max(certain, noise(2000)) == 3).all()


@pytest.mark.parametrize("V", [7, BLOCK, 3 * BLOCK, 5 * BLOCK + 3])
def test_the_first_largest_score_is_found_in_blocks(V):
    scores = torch.randint(0, 9, (50, 2, V), generator=torch.Generator().manual_seed(V)).float()
    first = (scores == scores.amax(-1, keepdim=True)).int().cumsum(-1).eq(0).sum(-1)
    assert torch.equal(first_largest(scores), first)


@pytest.mark.parametrize("name", list(COUPLINGS))
@pytest.mark.parametrize("temperature", [1.0, 0.7, "each"])
def test_a_few_rows_at_a_time_are_drawn_the_same(monkeypatch, name, temperature):
    logits = torch.randn(3, 37, 501, generator=torch.Generator().manual_seed(0)) * 4
    z = noise(111).view(3, 37)
    tau = torch.linspace(0.5, 1.5, 111).view(3, 37) if temperature == "each" else temperature
    whole = COUPLINGS[name](logits, z, tau)
    monkeypatch.setitem(coupling.ENTRIES, "cpu", 7 * 501)
    assert torch.equal(COUPLINGS[name](logits, z, tau), whole)
    if temperature == "each":
        assert torch.equal(COUPLINGS[name](logits, z, tau[:, :1]), COUPLINGS[name](logits, z, tau[:, :1].expand(3, 37)))
