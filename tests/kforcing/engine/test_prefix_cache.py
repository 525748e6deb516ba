import pytest
import torch

from kforcing.engine import Engine, EngineConfig, Request, SamplingParams
from kforcing.engine.cache import SlotCache
from kforcing.engine.prefix_cache import PrefixCache
from tests.models import VOCAB, make_backbone, make_sequential

LAYERS, HEADS, WIDTH = 2, 1, 4


def filled_slots(columns=16):
    slots = SlotCache(LAYERS, 2, columns, HEADS, WIDTH, torch.float32, torch.device("cpu"))
    for layer in slots.layers:
        layer.copy_(torch.randn(layer.shape, generator=torch.Generator().manual_seed(0)))
    return slots


def test_a_prompt_is_matched_as_far_as_whole_blocks_agree():
    cache = PrefixCache(filled_slots(), 2**20, block=4)
    prompt = list(range(11))
    assert cache.match(prompt, 10) == 0
    cache.keep(0, prompt, 10)
    assert cache.match(prompt, 10) == 8
    assert cache.match(prompt, 7) == 4
    assert cache.match([*prompt[:6], 99, *prompt[7:]], 10) == 4
    assert cache.match([99, *prompt[1:]], 10) == 0


def test_a_restored_prompt_has_the_keys_and_values_of_the_one_that_was_kept():
    slots = filled_slots()
    cache = PrefixCache(slots, 2**20, block=4)
    cache.keep(0, list(range(9)), 9)
    before = [layer[1, :, 8:].clone() for layer in slots.layers]
    cache.restore(1, list(range(9)), 8)
    for layer, rest in zip(slots.layers, before, strict=True):
        assert torch.equal(layer[1, :, :8], layer[0, :, :8])
        assert torch.equal(layer[1, :, 8:], rest)


def test_the_blocks_used_least_recently_are_dropped_and_the_ends_of_prompts_first():
    slots = filled_slots()
    one = slots.take(0, 0, 4).nbytes
    cache = PrefixCache(slots, 3 * one, block=4)
    old, new = list(range(8)), list(range(10, 18))
    cache.keep(0, old, 8)
    cache.keep(1, new, 8)
    assert cache.bytes == 3 * one
    assert (cache.match(old, 8), cache.match(new, 8)) == (4, 8)
    cache.restore(0, old, 4)
    cache.keep(1, list(range(20, 24)), 4)
    assert (cache.match(old, 8), cache.match(new, 8)) == (4, 4)


PREFIX = [i * 7 % VOCAB for i in range(80)]
REQUESTS = [Request([*PREFIX[:n], *range(m)], 12, seed=n + m) for n, m in ((80, 3), (80, 9), (40, 5), (80, 3), (2, 2))]


@pytest.mark.parametrize(
    "settings", [{}, {"max_num_batched_tokens": 5}, {"batch_invariant": True, "max_num_batched_tokens": 32}]
)
@pytest.mark.parametrize("kind", ["ar", "exact", "fixed"])
def test_texts_do_not_depend_on_what_was_read_before(kind, settings):
    backbone = make_backbone()
    backbone.config.max_position_embeddings = 256
    model = backbone if kind == "ar" else make_sequential(backbone, k=3, hint_layers=1)
    common = {
        "max_num_seqs": 2,
        "max_model_len": 110,
        "acceptance": "exact" if kind == "exact" else "fixed",
        **settings,
    }
    plain, caching = (Engine(model, EngineConfig(**common, prefix_cache_mb=mb)) for mb in (0, 1))
    expected = [c.tokens for c in plain.generate(REQUESTS)]
    for _ in range(2):
        done = caching.generate(REQUESTS)
        assert [c.tokens for c in done] == expected
    assert [c.cached for c in done] == [64, 64, 32, 64, 0]
    assert caching.stats.cached_tokens >= sum(c.cached for c in done)
    assert plain.stats.cached_tokens == 0


def test_a_prompt_whose_log_probabilities_are_asked_for_is_read_whole():
    engine = Engine(make_backbone(), EngineConfig(1, 60, prefix_cache_mb=1))
    request = Request(PREFIX[:45], 2, sampling=SamplingParams(prompt_logprobs=0))
    first, again = (engine.generate([request])[0] for _ in range(2))
    assert again.cached == 0
    assert len(again.prompt_logprobs) == 44
    assert again.prompt_logprobs == first.prompt_logprobs


def test_a_negative_size_is_refused():
    with pytest.raises(ValueError, match="prefix_cache_mb=-1 must be at least 0"):
        Engine(make_backbone(), EngineConfig(prefix_cache_mb=-1))
