import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from scipy import stats

from kforcing.keys import derive_key
from kforcing.noise import philox4x32, repetitions, sample_anchors, uniform, window_noise


def words(*values):
    return tuple(torch.tensor(v) for v in values)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_known_answers(counter, key, expected):
    assert tuple(int(w) for w in philox4x32(words(*counter), words(*key))) == expected


def test_derived_keys_are_pinned_and_differ_by_stream():
    assert derive_key(0, "k1", "noise", 0) == 3867351813546751480
    keys = {derive_key(s, name, e) for s in range(3) for name in ("k1", "k2") for e in range(5)}
    assert len(keys) == 30
    assert all(0 <= key < 2**63 for key in keys)


def test_noise_is_uniform_and_never_zero_or_one():
    z = uniform(derive_key(1), torch.arange(200)[:, None], 3, torch.arange(200))
    assert z.dtype == torch.float64
    assert 0 < z.min() < z.max() < 1
    assert stats.kstest(z.flatten().numpy(), "uniform").pvalue > 1e-3


def test_streams_sequences_windows_and_offsets_are_uncorrelated():
    base = window_noise(derive_key(1), torch.arange(500), torch.arange(8).expand(500, 8), 4)
    other = window_noise(derive_key(2), torch.arange(500), torch.arange(8).expand(500, 8), 4)
    pairs = [(base, other), (base[1:], base[:-1]), (base[:, 1:], base[:, :-1]), (base[..., 1:], base[..., :-1])]
    for a, b in pairs:
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.03


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2**62), min_size=2, max_size=6, unique=True), st.randoms())
def test_noise_does_not_depend_on_batch_or_order(sequences, random):
    key = derive_key(7, "k2")
    ids = torch.tensor(sequences)
    anchors = sample_anchors(key, ids, 20, 5)
    whole = window_noise(key, ids, anchors, 3)
    order = random.sample(range(len(ids)), len(ids))
    for i in order:
        one = ids[i : i + 1]
        assert torch.equal(sample_anchors(key, one, 20, 5), anchors[i : i + 1])
        assert torch.equal(window_noise(key, one, anchors[i : i + 1], 3)[0], whole[i])


def test_keys_may_differ_by_row():
    ids, keys = torch.tensor([5, 5]), torch.tensor([derive_key(1), derive_key(2)])
    anchors = torch.tensor([[3], [3]])
    z = window_noise(keys, ids, anchors, 2)
    assert torch.equal(z[1:], window_noise(derive_key(2), ids[1:], anchors[1:], 2))
    assert not torch.equal(z[0], z[1])


def test_anchors_are_different_positions_and_cover_all():
    anchors = sample_anchors(derive_key(3), torch.arange(2000), 16, 4)
    assert all(len(set(row)) == 4 for row in anchors.tolist())
    counts = torch.bincount(anchors.flatten(), minlength=16)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    assert torch.equal(sample_anchors(1, torch.tensor([9]), 6, 6), torch.arange(6)[None])


def test_too_many_windows_are_refused():
    with pytest.raises(ValueError, match="17 windows asked of a sequence with 16 positions"):
        sample_anchors(0, torch.tensor([1]), 16, 17)


def test_windows_of_one_anchor_are_independent_draws():
    key, ids = derive_key(4), torch.arange(300)
    once = sample_anchors(key, ids, 20, 8)
    z = window_noise(key, ids, once.repeat_interleave(3, dim=1), 4).unflatten(1, (8, 3))
    assert torch.equal(z[:, :, 0], window_noise(key, ids, once, 4))  # the first draw is that of a single one
    for one, other in ((0, 1), (1, 2)):
        assert abs(torch.corrcoef(torch.stack([z[:, :, one].flatten(), z[:, :, other].flatten()]))[0, 1]) < 0.03
    assert z.unique().numel() == z.numel()
    assert stats.kstest(z.flatten().numpy(), "uniform").pvalue > 1e-3


def test_a_draw_depends_on_its_number_and_anchor_alone():
    anchors = torch.tensor([[7, 2, 7, 2, 7]])
    assert repetitions(anchors).tolist() == [[0, 0, 1, 1, 2]]
    z = window_noise(1, torch.tensor([5]), anchors, 2)
    assert torch.equal(z[:, [0, 2]], window_noise(1, torch.tensor([5]), torch.tensor([[7, 7]]), 2))
    assert torch.equal(z[:, 3], window_noise(1, torch.tensor([5]), torch.tensor([[2, 2]]), 2)[:, 1])
