"""Calls of tools are found in texts that come in pieces, whatever the pieces are."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kforcing.structured import Grammars, StructuredOutputs
from serve.protocol.tools import Function
from serve.tool_calls import HERMES, LLAMA, ToolStream, tool_format, tools_grammar
from tests.kforcing.test_structured import EOS, ROWS, TOKENIZER

NAMES = {"weather", "add"}


def read(form, pieces, most=None):
    """(text, [(name, arguments)]) of an answer."""
    stream, text, calls = ToolStream(form, NAMES, most), "", []
    for i, piece in enumerate(pieces):
        for delta in stream.push(piece, last=i == len(pieces) - 1):
            if isinstance(delta, str):
                text += delta
                continue
            if delta.name is not None:
                assert delta.number == len(calls)
                assert delta.id.startswith("call_")
                calls.append([delta.name, ""])
            calls[delta.number][1] += delta.arguments
    return text, [(name, arguments) for name, arguments in calls]


CASES = [
    (HERMES, "Just <b>text</b>.\n", ("Just <b>text</b>.\n", [])),
    (HERMES, " a < b and <tool", (" a < b and <tool", [])),
    (
        HERMES,
        'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "a}\\"{"}}\n</tool_call>\n',
        ("Let me see.", [("weather", '{"city": "a}\\"{"}')]),
    ),
    (
        HERMES,
        '<tool_call>\n{"name": "add", "arguments": {"x": [1, {"y": 2}]}}\n</tool_call>\n<tool_call>\n'
        '{"arguments": {"x": "é"}, "name": "add"}\n</tool_call>',
        ("", [("add", '{"x": [1, {"y": 2}]}'), ("add", '{"x": "é"}')]),
    ),
    (
        HERMES,
        '<tool_call>{"name":"add","arguments":{}}</tool_call> and so on',
        (" and so on", [("add", "{}")]),
    ),
    (
        HERMES,
        'a <tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call> b',
        ('a <tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call> b', []),
    ),
    (HERMES, 'a <tool_call>\n{"name": "wea', ('a <tool_call>\n{"name": "wea', [])),
    (HERMES, '<tool_call>\n{"name": "add", "arguments": {"x": 1', ("", [("add", '{"x": 1')])),
    (HERMES, "<tool_call> nothing", ("<tool_call> nothing", [])),
    (LLAMA, '{"name": "add", "parameters": {"x": 1}}', ("", [("add", '{"x": 1}')])),
    (
        LLAMA,
        '\n{"name": "add", "parameters": {}}; {"name": "weather", "parameters": {"a": "b"}}',
        ("", [("add", "{}"), ("weather", '{"a": "b"}')]),
    ),
    (LLAMA, 'It is {"name": "add", "parameters": {}}', ('It is {"name": "add", "parameters": {}}', [])),
    (LLAMA, '{"x": 1} is JSON', ('{"x": 1} is JSON', [])),
    (LLAMA, '\t\r\n{"name": "add", "parameters": {}}', ("", [("add", "{}")])),
    (
        HERMES,
        '<tool_call>{"name": "add", "arguments": {"x":1}</tool_call>\n<tool_call>\n{"name": "weather", "arguments": {}}'
        "</tool_call> bye",
        (" bye", [("add", '{"x":1}'), ("weather", "{}")]),
    ),
]


@pytest.mark.parametrize(("form", "text", "expected"), CASES)
def test_an_answer_is_text_and_calls(form, text, expected):
    assert read(form, [text]) == expected


@given(st.sampled_from(CASES), st.randoms(use_true_random=False))
def test_pieces_give_what_the_whole_text_gives(case, rng):
    form, text, expected = case
    cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(form, pieces) == expected


def test_what_follows_the_last_call_that_may_come_is_text():
    call = '<tool_call>{"name": "add", "arguments": {}}</tool_call>'
    text, calls = read(HERMES, [call + call], most=1)
    assert calls == [("add", "{}")]
    assert text.startswith("<tool_call>")


def test_arguments_too_deep_to_read_are_text():
    deep = '<tool_call>{"arguments": {"x": ' + "[" * 50_000 + "]" * 50_000 + '}, "name": "add"}</tool_call>'
    assert read(HERMES, [deep]) == (deep, [])


def test_arguments_are_passed_on_before_they_are_complete():
    stream = ToolStream(HERMES, NAMES)
    (begun,) = stream.push('<tool_call>\n{"name": "add", "arguments": ')[:1] or stream.push("{")[:1]
    assert begun.name == "add"
    (more,) = stream.push('"x": ')
    assert more == (0, None, None, '"x": ')


@pytest.mark.parametrize(
    ("template", "form"),
    [("… <tool_call> …", HERMES), ('… {"name": …, "parameters": …} …', LLAMA), ("{{ messages }}", HERMES)],
)
def test_the_template_says_how_calls_look(template, form):
    assert tool_format(template) == form


FUNCTIONS = [
    Function(
        name="weather",
        parameters={
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/city"}},
            "required": ["city"],
            "additionalProperties": False,
            "$defs": {"city": {"enum": ["a", "b"]}},
        },
    ),
    Function(name="add"),
]


def walk(grammar, seed, most=400):
    """A random text of a grammar."""
    rng, matcher, ids = random.Random(seed), grammar.matcher(), []
    while len(ids) < most:
        allowed = matcher.allowed(ids).nonzero().flatten().tolist()
        ids.append(EOS if EOS in allowed and rng.random() < 0.5 else rng.choice(allowed))
        if ids[-1] == EOS:
            return TOKENIZER.decode(ids[:-1])
    raise AssertionError("the text does not end")


@pytest.mark.parametrize("form", [HERMES, LLAMA])
@pytest.mark.parametrize("parallel", [True, False])
def test_the_grammar_of_required_calls_makes_valid_calls_alone(form, parallel):
    source = tools_grammar(FUNCTIONS, form, must_call=True, parallel=parallel)
    grammar = Grammars(TOKENIZER, ROWS, [EOS]).compile(StructuredOutputs(grammar=source))
    numbers = set()
    for seed in range(12):
        text, calls = read(form, [walk(grammar, seed)])
        assert text == ""
        for name, arguments in calls:
            assert json.loads(arguments) in ({"city": "a"}, {"city": "b"}) if name == "weather" else arguments == "{}"
        numbers.add(len(calls))
    assert numbers == {1} if not parallel else max(numbers) > 1


def test_the_grammar_of_possible_calls_allows_text_and_valid_calls():
    source = tools_grammar(FUNCTIONS, HERMES, must_call=False, parallel=True)
    matcher = Grammars(TOKENIZER, ROWS, [EOS]).compile(StructuredOutputs(grammar=source)).matcher()
    ids = TOKENIZER.encode('I see. <tool_call>\n{"name": "weather", "arguments": {"city": "', add_special_tokens=False)
    for i in range(len(ids)):
        assert matcher.allowed(ids[:i])[ids[i]]
    a, c = TOKENIZER.convert_tokens_to_ids(["a", "c"])
    assert matcher.allowed(ids)[a]
    assert not matcher.allowed(ids)[c]
    assert matcher.allowed(ids[:6])[EOS]


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (LLAMA, ' \n{"name": "weather", "parameters": {"city": "c'),
        (HERMES, '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call> <tool_call>\n{"name": "weather"'),
    ],
)
def test_a_strict_call_has_no_way_around_its_schema(form, text):
    source = tools_grammar(FUNCTIONS, form, must_call=False, parallel=False)
    matcher = Grammars(TOKENIZER, ROWS, [EOS]).compile(StructuredOutputs(grammar=source)).matcher()
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    assert not all(matcher.allowed(ids[:i])[ids[i]] for i in range(len(ids)))
