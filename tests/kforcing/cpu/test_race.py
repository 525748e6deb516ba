"""The kernel that finds the tokens that may win a Gumbel-max draw."""

import pytest
import torch

from kforcing import coupling
from kforcing.coupling import gumbel_candidates, gumbel_max
from kforcing.cpu.race import can_race, may_win
from kforcing.noise import race_words
from tests.models import needs_kernels

pytestmark = needs_kernels


def rows(vocabulary: int, spread: float, n: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(n, vocabulary, generator=generator) * spread
    return logits, torch.rand(n, dtype=torch.float64, generator=generator)


@pytest.fixture
def without_kernel(monkeypatch):
    """Draws with torch alone."""

    def call(draw, *args):
        with monkeypatch.context() as patch:
            patch.setattr(coupling, "can_race", lambda *_: False)
            return draw(*args)

    return call


@pytest.mark.parametrize("temperature", [1e-3, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("vocabulary", [1024, 1100, 4096])
def test_the_draw_is_that_of_torch(vocabulary, spread, temperature, without_kernel):
    logits, z = rows(vocabulary, spread)
    assert can_race(logits)
    drawn = without_kernel(gumbel_max, logits, z, temperature)
    assert torch.equal(gumbel_max(logits, z, temperature), drawn)
    one_by_one = [gumbel_max(*row, temperature) for row in zip(logits[:, None], z[:, None], strict=True)]
    assert torch.equal(torch.cat(one_by_one), drawn)  # of one row often a single token is left


@pytest.mark.parametrize("m", [2, 16, 64])
@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
def test_the_candidates_are_those_of_torch(spread, m, without_kernel):
    logits, z = rows(1100, spread)
    mine, plain = gumbel_candidates(logits, z, 0.7, m), without_kernel(gumbel_candidates, logits, z, 0.7, m)
    assert torch.equal(mine.ids, plain.ids)
    assert torch.equal(mine.race, plain.race)


def test_few_tokens_are_left_for_the_winner_and_some_hundreds_for_the_best_64():
    logits, z = rows(32_000, 3.0)
    for best, most in ((1, 5), (64, 1000)):
        left = may_win(logits, z, torch.ones(len(z), dtype=torch.float64), best)
        assert 1 <= left.logits.isfinite().sum(dim=-1).float().mean().item() < most
        assert torch.equal(left.words, race_words(z, left.ids).where(left.logits.isfinite(), 0))


def test_tokens_of_probability_zero_are_never_drawn_and_rows_keep_their_own_temperature(without_kernel):
    logits, z = rows(2048, 3.0)
    logits[:, 100:] = -torch.inf
    temperature = torch.linspace(0.1, 2, len(z), dtype=torch.float64)
    drawn = gumbel_max(logits, z, temperature)
    assert drawn.max() < 100
    assert torch.equal(drawn, without_kernel(gumbel_max, logits, z, temperature))


def test_logits_that_are_not_numbers_still_give_a_token(without_kernel):
    logits, z = rows(1024, 3.0)
    logits[3] = torch.nan
    drawn = gumbel_max(logits, z, 1.0)
    assert torch.equal(drawn, without_kernel(gumbel_max, logits, z, 1.0))


def test_windows_of_a_batch_are_drawn_as_their_rows(without_kernel):
    logits, z = rows(1024, 3.0)
    batch, z_batch = logits.view(4, 6, -1), z.view(4, 6)
    temperature = torch.full((4, 1), 0.7, dtype=torch.float64)
    assert torch.equal(gumbel_max(batch, z_batch, temperature).flatten(), gumbel_max(logits, z, 0.7))
    half = batch.bfloat16()
    assert torch.equal(gumbel_max(half, z_batch, temperature), without_kernel(gumbel_max, half, z_batch, temperature))
