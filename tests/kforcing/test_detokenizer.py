"""The detokenizer returns the text of tokens that come k at a time."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kforcing.detokenizer import TextStream


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes as tokens, so that characters span several of them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_ = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytes_)


def blocks(ids, sizes):
    """The ids cut into pieces of the given sizes, over and over."""
    at = 0
    for size in sizes * len(ids):
        if at >= len(ids):
            return
        yield ids[at : at + size]
        at += size


def run(tokenizer, text, sizes, stops=()):
    ids = tokenizer(text).input_ids
    stream = TextStream(tokenizer, stops)
    out, count = "", 0
    for block in blocks(ids, sizes):
        piece = stream.push(block)
        out, count = out + piece.text, count + piece.tokens
        if piece.stopped:
            return out, count, stream.stop
    return out + stream.flush(), count, None


texts = st.text(alphabet="ab é😀\n", max_size=30)
sizes = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@settings(deadline=None)
@given(text=texts, sizes=sizes)
def test_pieces_of_any_size_add_up_to_the_whole_text(tokenizer, text, sizes):
    assert run(tokenizer, text, sizes)[0] == text


@settings(deadline=None)
@given(
    text=texts, sizes=sizes, stops=st.lists(st.text(alphabet="ab é😀", min_size=1, max_size=4), min_size=1, max_size=3)
)
def test_text_ends_before_the_first_stop_string_and_tokens_count_up_to_its_end(tokenizer, text, sizes, stops):
    got, count, stop = run(tokenizer, text, sizes, stops)
    ends = {text.find(s) + len(s): s for s in stops if s in text}
    if not ends:
        assert (got, stop) == (text, None)
        return
    first = min(ends)  # the stop string that is complete first
    complete = [s for s in stops if s in text[:first]]
    assert stop in complete
    assert got == text[: min(text.find(s) for s in complete)]
    assert count == len(tokenizer(text[:first]).input_ids)


@settings(deadline=None)
@given(
    text=texts, sizes=sizes, stops=st.lists(st.text(alphabet="ab é😀", min_size=1, max_size=4), min_size=1, max_size=3)
)
def test_no_piece_contains_text_that_a_later_stop_string_removes(tokenizer, text, sizes, stops):
    ids = tokenizer(text).input_ids
    stream, out = TextStream(tokenizer, stops), ""
    for block in blocks(ids, sizes):
        piece = stream.push(block)
        out += piece.text
        assert not any(stop in out for stop in stops)
        if piece.stopped:
            return
    assert text.startswith(out)


def test_a_character_of_several_tokens_is_returned_with_its_last_token(tokenizer):
    stream = TextStream(tokenizer)
    ids = tokenizer("😀").input_ids
    assert [stream.push([i]).text for i in ids] == ["", "", "", "😀"]


def test_an_incomplete_character_is_returned_at_the_end(tokenizer):
    stream = TextStream(tokenizer)
    assert stream.push(tokenizer("a").input_ids).text == "a"
    assert stream.push(tokenizer("😀").input_ids[:-1]).text == ""
    assert set(stream.flush()) == {"\ufffd"}
