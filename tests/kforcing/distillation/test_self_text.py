"""Documents that a model writes itself."""

import pytest

from kforcing.distillation.self_text import ChatFrame, TextSettings, TextWriter, repetition
from kforcing.engine import Engine, EngineConfig, Request, SamplingParams
from kforcing.keys import derive_key
from kforcing.loading import load_tokenizer
from tests.endpoint import EOS, ids_of, save_model
from tests.models import make_backbone

TEMPLATE = "{% for m in messages %}q {{ m.content }} {% endfor %}{% if add_generation_prompt %}a {% endif %}"


@pytest.fixture
def tokenizer(tmp_path):
    tokenizer = load_tokenizer(save_model(tmp_path / "model", chat=True))
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def writer(tokenizer, slots=4, **settings):
    engine = Engine(make_backbone(scale=2.0), EngineConfig(slots, 60, coupling="gumbel"))
    settings = {"user_tokens": 30, "answer_tokens": 12, "repetition": 1.0, **settings}
    return TextWriter(engine, tokenizer, frozenset([EOS]), TextSettings(**settings))


def test_the_frame_of_a_chat_template_is_cut_at_the_users_words(tokenizer):
    assert ChatFrame.of(tokenizer) == ChatFrame(ids_of("q "), ids_of(" a "))
    tokenizer.chat_template = None
    assert ChatFrame.of(tokenizer) is None
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    with pytest.raises(ValueError, match="does not hold the user's words once"):
        ChatFrame.of(tokenizer)


def test_a_document_is_both_turns_of_a_conversation_as_the_model_draws_them(tokenizer):
    documents = [d for d in writer(tokenizer, seed=5).write(range(12)) if not d.dropped]
    assert len(documents) >= 3
    model = make_backbone(scale=2.0)
    for document in documents[:3]:
        n = document.number
        engine = Engine(model, EngineConfig(1, 60, coupling="gumbel"))
        (user,) = engine.generate([Request(ids_of("q "), 30, derive_key(5, "user", n), frozenset([EOS]))])
        prompt = ids_of("q ") + user.tokens + ids_of(" a ")
        sampling = SamplingParams(document.temperature)
        answer = Request(prompt, 12, derive_key(5, "answer", n), frozenset([EOS]), sampling=sampling)
        assert document.tokens == prompt + engine.generate([answer])[0].tokens


def test_documents_do_not_depend_on_the_number_of_slots(tokenizer):
    runs = [{d.number: d for d in writer(tokenizer, slots).write(range(10))} for slots in (1, 4)]
    assert runs[0] == runs[1]
    assert list(runs[0]) != []
    assert sorted(runs[0]) == list(range(10))


def test_what_is_dropped_says_why(tokenizer):
    endless = list(writer(tokenizer, user_tokens=1).write(range(12)))
    assert {d.dropped for d in endless} <= {"endless turn", "empty turn"}
    assert all(d.tokens == [] for d in endless)
    repeated = list(writer(tokenizer, repetition=-1.0).write(range(12)))
    assert "repetition" in {d.dropped for d in repeated}


def test_without_a_chat_template_a_text_begins_with_eos_or_a_prompt(tokenizer):
    tokenizer.chat_template = None
    documents = {d.number: d for d in writer(tokenizer).write(range(6), prompts={2: ids_of("abc")})}
    assert documents[2].tokens[:3] == ids_of("abc")
    assert all(d.tokens[0] == EOS for n, d in documents.items() if n != 2 and not d.dropped)


def test_repetition_is_the_share_of_phrases_that_occurred_before():
    assert repetition(list(range(40))) == 0.0
    assert repetition([1, 2] * 8) == pytest.approx(1 - 2 / 9)
    assert repetition([1, 2, 3]) == 0.0
