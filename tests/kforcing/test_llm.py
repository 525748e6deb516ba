"""`LLM`: the engine's texts, stop strings, choices and errors behind vLLM's interface."""

import dataclasses

import pytest
from transformers import PreTrainedTokenizerFast

from kforcing import LLM, SamplingParams
from kforcing.engine import Engine, EngineConfig, Request
from kforcing.loading import load_model
from tests.endpoint import EOS, ids_of, save_model, text_of
from tests.models import make_backbone, make_sequential


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("llm") / "k4", chat=True)


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, max_num_seqs=4, max_model_len=56)


def completion(folder, text, n, seed, stop_ids):
    engine = Engine(load_model(folder), EngineConfig(max_num_seqs=1, max_model_len=56))
    return engine.generate([Request(ids_of(text), n, seed, stop_ids)])[0]


def test_texts_are_those_of_the_engine_in_the_order_of_the_prompts(folder, llm):
    prompts = ["abc", "d", "hello"]
    answers = llm.generate(prompts, SamplingParams(max_tokens=20, seed=3))
    assert [answer.prompt for answer in answers] == prompts
    for answer in answers:
        expected = completion(folder, answer.prompt, 20, 3, llm.eos_ids)
        assert answer.prompt_token_ids == ids_of(answer.prompt)
        assert answer.outputs[0].token_ids == expected.tokens
        assert answer.outputs[0].text == text_of(expected.tokens)
        assert answer.outputs[0].finish_reason == expected.finish_reason
        assert answer.outputs[0].steps == expected.steps


def test_eos_ids_are_those_of_the_generation_config_and_of_the_tokenizer(llm):
    assert llm.eos_ids == {EOS}
    student = make_sequential(make_backbone())
    student.generation_config.eos_token_id = [3, 4]
    assert LLM(student, llm.tokenizer, max_num_seqs=1, max_model_len=20).eos_ids == {3, 4, EOS}


def test_a_prompt_may_be_a_text_or_token_ids_alone_or_in_a_list(llm):
    params = SamplingParams(max_tokens=8, seed=1)
    one = llm.generate("abc", params)[0].outputs
    assert llm.generate(ids_of("abc"), params)[0].outputs == one
    assert [a.outputs for a in llm.generate([ids_of("abc"), ids_of("abc")], params)] == [one, one]


def test_exact_mode_gives_the_text_of_the_ar_model(folder, llm):
    exact = llm.generate("abc", SamplingParams(max_tokens=30, seed=5, acceptance="exact"))[0].outputs[0]
    assert exact.steps + sum(exact.drafts.accepted) >= len(exact.token_ids)
    assert exact.tokens_a_step == len(exact.token_ids) / exact.steps
    student = load_model(folder)
    ar = LLM(student.backbone, llm.tokenizer, max_num_seqs=1, max_model_len=56, coupling="gumbel")
    assert exact.token_ids == ar.generate("abc", SamplingParams(max_tokens=30, seed=5))[0].outputs[0].token_ids


def test_log_probabilities_are_aligned_with_the_tokens_before_a_stop_string(llm):
    params = SamplingParams(max_tokens=30, seed=3, ignore_eos=True, logprobs=2)
    whole = llm.generate("abc", params)[0].outputs[0]
    assert len(whole.logprobs) == len(whole.token_ids) == 30
    stop = whole.text[5:7]
    cut = llm.generate("abc", dataclasses.replace(params, stop=stop))[0].outputs[0]
    assert cut.logprobs == whole.logprobs[: len(cut.token_ids)]
    assert llm.generate("abc", SamplingParams(max_tokens=3))[0].outputs[0].logprobs is None


def test_choices_differ_and_the_first_is_that_of_the_seed(llm):
    choices = llm.generate("abc", SamplingParams(max_tokens=20, seed=3, n=3))[0].outputs
    assert [choice.index for choice in choices] == [0, 1, 2]
    assert len({tuple(choice.token_ids) for choice in choices}) == 3
    assert choices[0] == llm.generate("abc", SamplingParams(max_tokens=20, seed=3))[0].outputs[0]


def test_the_text_ends_before_a_stop_string_and_the_tokens_with_it(llm):
    params = SamplingParams(max_tokens=30, seed=3, ignore_eos=True)
    whole = llm.generate("abc", params)[0].outputs[0].text
    stop = whole[5:7]
    output = llm.generate("abc", SamplingParams(max_tokens=30, seed=3, ignore_eos=True, stop=stop))[0].outputs[0]
    assert output.text == whole[: whole.find(stop)]
    assert output.finish_reason == "stop"
    assert output.stop_reason == stop
    assert llm.engine.step() == []
    assert llm.engine.idle


def test_one_set_of_params_for_each_prompt(llm):
    short, long = SamplingParams(max_tokens=3, seed=1, ignore_eos=True), SamplingParams(max_tokens=9, ignore_eos=True)
    answers = llm.generate(["a", "b"], [short, long])
    assert [len(answer.outputs[0].token_ids) for answer in answers] == [3, 9]
    with pytest.raises(ValueError, match="1 sampling params for 2 prompts"):
        llm.generate(["a", "b"], [short])


def test_chat_answers_a_conversation_by_the_template(folder, llm):
    params = SamplingParams(max_tokens=12, seed=2)
    answer = llm.chat([{"role": "user", "content": "abc"}], params)[0]
    assert answer.outputs[0].token_ids == llm.generate("u abc ", params)[0].outputs[0].token_ids
    plain = PreTrainedTokenizerFast.from_pretrained(folder)
    plain.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        LLM(load_model(folder), plain, max_num_seqs=1, max_model_len=20).chat([{"role": "user", "content": "a"}])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"n": 0}, "n=0 must be at least 1"),
        ({"stop": ["a", ""]}, "stop contains an empty string"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"max_tokens": 100}, "exceed the context of 56 tokens"),
        ({"k": 5}, "k=5 tokens a step"),
        ({"acceptance": "lossy"}, "acceptance=lossy"),
    ],
)
def test_params_that_cannot_be_served_name_the_prompt_and_begin_nothing(llm, params, message):
    with pytest.raises(ValueError, match=f"prompt 2: .*{message}"):
        llm.generate(["a", "b"], [SamplingParams(), SamplingParams(**params)])
    assert llm.engine.idle


def test_unknown_options_are_refused_by_name(folder):
    with pytest.raises(ValueError, match="unknown option 'slots'"):
        LLM(folder, slots=4)
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)
    with pytest.raises(ValueError, match="needs tokenizer"):
        LLM(load_model(folder))
