import torch

from kforcing.joint import bucket, independent, joint_tv, position_entropy, sample_blocks
from kforcing.noise import derive_key


def test_total_variation_of_known_samples():
    one = torch.tensor([[0, 1]] * 3 + [[2, 3]])
    other = torch.tensor([[0, 1]] + [[2, 3]] * 3)
    distinct = {tuple(bucket(row, 64).tolist()) for row in one}
    assert len(distinct) == 2
    assert joint_tv(one, other, 64) == 0.5
    assert joint_tv(one, one, 64) == 0


def test_shuffled_columns_keep_marginals_and_lose_dependence():
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 40, (20_000,), generator=g)
    pairs = torch.stack([x, x], dim=1)
    loose = independent(pairs, seed=0)
    assert torch.equal(loose[:, 0].bincount(), pairs[:, 0].bincount())
    assert position_entropy(loose) == position_entropy(pairs)
    assert joint_tv(loose, pairs, 8) > 0.7
    again = torch.stack([y := torch.randint(0, 40, (20_000,), generator=g), y], dim=1)
    assert joint_tv(again, pairs, 8) < 0.03


def test_buckets_are_even():
    counts = bucket(torch.arange(50_000), 6).bincount(minlength=6)
    assert counts.min() > 8_200


def test_entropy_of_uniform_tokens():
    tokens = torch.arange(8).repeat(10)
    assert abs(position_entropy(torch.stack([tokens, tokens * 0], 1)) - torch.tensor(8.0).log().item()) < 1e-6


def test_samples_do_not_depend_on_the_batch():
    def draw(windows):
        assert (windows.anchors_BW == 4).all()
        return (windows.noise_BWK * 10).long()

    context = torch.arange(5)
    key = derive_key(0)
    one = sample_blocks(draw, context, 3, 100, key, batch=7)
    assert torch.equal(one, sample_blocks(draw, context, 3, 100, key, batch=100))
    assert one.shape == (100, 3)
    assert len(one.unique(dim=0)) > 80
