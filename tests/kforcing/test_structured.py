"""Structured output: every text has its form, and exact mode gives the text that AR decoding under the same masks gives."""

import functools
import json
import random
import re
from copy import deepcopy

import pytest
import torch
from jsonschema import validate
from transformers import AutoModelForCausalLM

from kforcing import LLM, PushForwardLM, SamplingParams, StructuredOutputs
from kforcing.coupling import gumbel_max
from kforcing.engine import Engine, EngineConfig, Request
from kforcing.engine import SamplingParams as Drawing
from kforcing.keys import derive_key
from kforcing.noise import uniform
from kforcing.structured import KEPT, Grammars
from tests.kforcing.schemas import schema
from tests.kforcing.test_detokenizer import TOKENIZERS
from tests.models import CONFIGS, make_sequential

TOKENIZER = TOKENIZERS["byte level"]
EOS = TOKENIZER.eos_token_id
ROWS = len(TOKENIZER) + 10
"""The LM head has more rows than there are tokens."""


@functools.cache
def backbone():
    torch.manual_seed(0)
    config = deepcopy(CONFIGS["llama"])
    config.vocab_size, config.max_position_embeddings = ROWS, 4096
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model


@functools.cache
def student(**parts):
    return make_sequential(backbone(), **parts).eval()


@pytest.fixture(scope="module")
def grammars():
    return Grammars(TOKENIZER, ROWS, [EOS])


def request(grammar, seed=0, prompt=(1, 2, 3), new=120, **options):
    acceptance, k = options.pop("acceptance", None), options.pop("k", None)
    return Request(list(prompt), new, seed, frozenset([EOS]), k, Drawing(**options), acceptance, grammar)


def ar_by_hand(grammar, asked):
    """AR decoding that reads everything anew at each position, and masks with a new matcher."""
    ids, key, zero = list(asked.prompt), derive_key(asked.seed, "decode"), torch.zeros(1, dtype=torch.int64)
    made = []
    while len(made) < asked.max_new_tokens:
        logits = backbone()(torch.tensor([ids])).logits[0, -1].float()
        logits = logits.masked_fill(~grammar.matcher().allowed(made), -torch.inf)
        noise = uniform(key, zero, 0, torch.tensor([len(ids)]))[0]
        greedy = asked.sampling.temperature == 0
        token = int(logits.argmax() if greedy else gumbel_max(logits, noise, asked.sampling.temperature))
        if token == EOS:
            break
        ids.append(token)
        made.append(token)
    return made


FORMS = [
    StructuredOutputs(json=schema(random.Random(1))),
    StructuredOutputs(json={"type": "array", "items": {"type": "integer"}, "maxItems": 4}),
    StructuredOutputs(regex=r"(ab|ba){1,9}c?"),
    StructuredOutputs(choice=["yes", "yes please", "nö"]),
    StructuredOutputs(grammar='start: term ("+" term)~1..3\nterm: /[0-9]{1,2}/'),
]


@pytest.mark.parametrize("form", FORMS, ids=["schema", "list", "regex", "choice", "lark"])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_exact_mode_gives_the_text_of_ar_decoding_under_the_same_masks(grammars, form, temperature):
    grammar = grammars.compile(form)
    asked = [request(grammar, seed, temperature=temperature, acceptance="exact") for seed in range(3)]
    expected = [ar_by_hand(grammar, each) for each in asked]
    for k, options in ((1, {}), (2, {}), (4, {}), (4, {"batch_invariant": True}), (4, {"adapt_width": False})):
        engine = Engine(student(), EngineConfig(max_num_seqs=2, max_model_len=200, k=k, **options))
        assert [answer.tokens for answer in engine.generate(asked)] == expected
    plain = Engine(backbone(), EngineConfig(max_num_seqs=3, max_model_len=200, coupling="gumbel"))
    assert [
        answer.tokens for answer in plain.generate([request(grammar, s, temperature=temperature) for s in range(3)])
    ] == (expected)
    context = EngineConfig(max_num_seqs=3, max_model_len=200, coupling="gumbel", k=4, acceptance="exact")
    assert [answer.tokens for answer in Engine(backbone(), context).generate(asked)] == expected


def test_other_requests_of_the_batch_are_not_changed(grammars):
    grammar = grammars.compile(FORMS[0])
    plain = [request(None, seed, new=30, prompt=range(5 + seed)) for seed in range(4)]
    alone = [Engine(student(), EngineConfig(max_num_seqs=4, max_model_len=200)).generate([each])[0] for each in plain]
    engine = Engine(student(), EngineConfig(max_num_seqs=4, max_model_len=200))
    both = engine.generate(
        [each for pair in zip(plain, [request(grammar, s) for s in range(4)], strict=True) for each in pair]
    )
    assert [answer.tokens for answer in both[::2]] == [answer.tokens for answer in alone]
    again = engine.generate(plain)  # in slots that had a grammar before
    assert [answer.tokens for answer in again] == [answer.tokens for answer in alone]


@pytest.mark.parametrize(("acceptance", "shortlist"), [("exact", 0), ("fixed", 0), ("fixed", 4)])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_every_text_is_a_document_of_its_schema(grammars, k, acceptance, shortlist):
    engine = Engine(student(shortlist=shortlist), EngineConfig(max_num_seqs=8, max_model_len=400, k=k))
    schemas = [schema(random.Random(seed)) for seed in range(24)]
    asked = [
        request(
            grammars.compile(StructuredOutputs(json=each)), i, new=300, temperature=i % 3 / 2, acceptance=acceptance
        )
        for i, each in enumerate(schemas)
    ]
    for each, answer in zip(schemas, engine.generate(asked), strict=True):
        assert answer.finish_reason == "stop"
        validate(json.loads(TOKENIZER.decode(answer.tokens)), each)


def test_an_argmax_student_keeps_to_the_form(grammars):
    engine = Engine(PushForwardLM.from_backbone(backbone(), 4), EngineConfig(max_num_seqs=2, max_model_len=300))
    for answer in engine.generate([request(grammars.compile(FORMS[2]), seed) for seed in range(4)]):
        assert re.fullmatch(r"(ab|ba){1,9}c?", TOKENIZER.decode(answer.tokens))


def test_a_mask_depends_on_the_tokens_alone_whatever_was_asked_before(grammars):
    rng = random.Random(0)
    grammar = grammars.compile(FORMS[0])
    walked = grammar.matcher()
    text: list[int] = []
    for _ in range(300):
        del text[rng.randint(max(0, len(text) - 4), len(text)) :]
        allowed = grammar.matcher().allowed(text)
        assert torch.equal(walked.allowed(text), allowed)
        ids = allowed.nonzero().flatten().tolist()
        text.append(rng.choice(ids) if rng.random() < 0.8 else rng.randrange(ROWS))


def test_only_eos_may_follow_a_complete_text_and_behind_eos_everything_is_allowed(grammars):
    matcher = grammars.compile(StructuredOutputs(choice=["a"])).matcher()
    (letter,) = TOKENIZER.encode("a", add_special_tokens=False)
    assert matcher.allowed([]).nonzero().flatten().tolist() == [letter]
    assert matcher.allowed([letter]).nonzero().flatten().tolist() == [EOS]
    assert matcher.allowed([letter, EOS]).all()
    assert matcher.allowed([letter + 1]).all()
    assert matcher.allowed([letter]).nonzero().flatten().tolist() == [EOS]


def test_a_draft_that_takes_too_much_work_leaves_no_trace_and_a_text_that_does_is_ended(grammars, caplog):
    grammar = grammars.compile(StructuredOutputs(grammar='start: a\na: a a | "x" | a "x" a'))
    (x,) = TOKENIZER.encode("x", add_special_tokens=False)
    long, matcher = [x] * 400, grammar.matcher()
    before = matcher.allowed(long[:5])
    assert before.sum() > 1
    assert matcher.allowed(long).nonzero().flatten().tolist() == [EOS]
    assert torch.equal(matcher.allowed(long[:5]), before)
    matcher.allowed(long)
    assert caplog.text.count("takes too much work") == 1


def test_every_eos_id_must_end_a_structured_text(grammars):
    engine = Engine(student(), EngineConfig(max_num_seqs=1, max_model_len=100))
    two = Grammars(TOKENIZER, ROWS, [EOS, 0]).compile(FORMS[3])
    with pytest.raises(ValueError, match="ends with EOS"):
        engine.submit(Request([1], 9, stop_ids=frozenset([EOS]), grammar=two))


def test_other_options_of_sampling_hold_within_the_form(grammars):
    engine = Engine(student(), EngineConfig(max_num_seqs=2, max_model_len=200, acceptance="exact"))
    grammar = grammars.compile(StructuredOutputs(regex="[bc]{1,20}"))
    b, c = TOKENIZER.convert_tokens_to_ids(["b", "c"])
    biased, early, cut = engine.generate(
        [
            request(grammar, logit_bias={b: -100.0}),
            request(grammar, 5, min_tokens=30),
            request(grammar, top_k=1, top_p=0.5, frequency_penalty=0.5),
        ]
    )
    assert set(biased.tokens) <= {c}
    assert TOKENIZER.decode(early.tokens).strip("bc") == ""
    assert early.finish_reason == "stop"  # the form ends before min_tokens
    assert TOKENIZER.decode(cut.tokens).strip("bc") == ""


def test_llm_takes_a_form():
    llm = LLM(student(), TOKENIZER, max_model_len=200)
    chosen = SamplingParams(max_tokens=50, n=3, seed=1, structured_outputs=FORMS[3])
    texts = [output.text for output in llm.generate("ab", chosen)[0].outputs]
    assert set(texts) <= {"yes", "yes please", "nö"}
    with pytest.raises(ValueError, match="prompt 1: ignore_eos=True: a structured output ends with EOS"):
        llm.generate("ab", SamplingParams(ignore_eos=True, structured_outputs=FORMS[3]))


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (StructuredOutputs(), r"need one of json, json_object, regex, choice and grammar, not \[\]"),
        (StructuredOutputs(regex="a", choice=["b"]), r"not \['regex', 'choice'\]"),
        (StructuredOutputs(regex="(a"), "unclosed group"),
        (StructuredOutputs(choice=[]), "none of them empty"),
        (StructuredOutputs(grammar="start: nothing"), 'unknown name: "nothing"'),
        (StructuredOutputs(json={"type": "strin"}), "Invalid type: strin"),
        (StructuredOutputs(json="{"), "the schema is not JSON: Expecting"),
        (StructuredOutputs(json="[1]"), "must be an object"),
        (StructuredOutputs(json="[" * 50_000), "the schema is not JSON"),
    ],
)
def test_what_is_no_form_is_refused_in_one_line(grammars, form, message):
    with pytest.raises(ValueError, match=message) as refused:
        grammars.compile(form)
    assert "\n" not in str(refused.value)


def test_the_latest_grammars_stay_compiled(grammars):
    first = grammars.compile(FORMS[2])
    assert grammars.compile(FORMS[2]) is first
    for i in range(KEPT):
        grammars.compile(StructuredOutputs(choice=[f"a{i}"]))
    assert grammars.compile(FORMS[2]) is not first


def test_a_tokenizer_that_llguidance_does_not_know_is_refused():
    with pytest.raises(ValueError, match="do not work with this tokenizer: can't determine decoder type"):
        Grammars(TOKENIZERS["Unigram"], ROWS, [EOS]).compile(FORMS[2])


def test_a_model_without_eos_has_no_structured_outputs():
    with pytest.raises(ValueError, match="no EOS token"):
        Grammars(TOKENIZER, ROWS, []).compile(FORMS[2])
