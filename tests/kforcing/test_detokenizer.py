"""The detokenizer returns the text of tokens that come k at a time, whatever the kind of tokenizer."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kforcing.detokenizer import WAITING, Detokenizer, TextStream

WORDS = ("a", "b", "c", "ab", "abc", "do", "not", "n", "t", "'", ".", ",", "!", "é", "ing")


def byte_level():
    """Like GPT-2's: bytes as tokens, so that characters span several of them, and a few words."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("a", "b"), ("Ġ", "a"), ("Ġa", "b"), ("ab", "c")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    made = Tokenizer(models.BPE(vocabulary, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return made


def sentencepiece(prepend):
    """Like Llama 2's or Gemma's: a space is ▁, unknown characters are bytes, and Llama puts a space before a text."""
    pieces = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *WORDS, *(f"▁{word}" for word in WORDS)]
    merges = [("a", "b"), ("ab", "c"), ("▁", "a"), ("▁", "ab"), ("▁", "abc"), ("▁", "b")]
    made = Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    replace = normalizers.Replace(" ", "▁")
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prepend else replace
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence(parts + ([decoders.Strip(" ", 1, 0)] if prepend else []))
    return made


def unigram():
    """Like T5's."""
    pieces = ["<unk>", "▁", *WORDS, *(f"▁{word}" for word in WORDS)]
    made = Tokenizer(models.Unigram([(piece, -float(len(pieces) - i)) for i, piece in enumerate(pieces)], 0, False))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    return made


def wordpiece():
    """Like BERT's, with the clean-up of spaces that its config asks for."""
    pieces = ["[UNK]", *WORDS, *(f"##{word}" for word in WORDS)]
    made = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece("##", cleanup=True)
    return made


def fast(made):
    made.add_special_tokens([AddedToken("<bos>", special=True), AddedToken("<eos>", special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<bos>", eos_token="<eos>", clean_up_tokenization_spaces=True
    )


TOKENIZERS = {
    "byte level": fast(byte_level()),
    "Llama 2": fast(sentencepiece(prepend=True)),
    "Gemma": fast(sentencepiece(prepend=False)),
    "Unigram": fast(unigram()),
    "WordPiece": fast(wordpiece()),
}
every_kind = pytest.mark.parametrize("kind", TOKENIZERS)
TEXT = st.text(alphabet="abcé日😀 .!'n\n", max_size=30)
SIZES = st.lists(st.integers(1, 8), min_size=1, max_size=4)
STOPS = st.lists(st.text(alphabet="abé😀. n", min_size=1, max_size=4), min_size=1, max_size=3)


def blocks(ids, sizes):
    """The ids cut into pieces of the given sizes, over and over."""
    at = 0
    for size in sizes * len(ids):
        if at >= len(ids):
            return
        yield ids[at : at + size]
        at += size


def run(kind, prompt, ids, sizes, stops=()):
    """(text, tokens up to the stop, stop string) of a continuation in blocks; every piece must keep its promise."""
    stream = TextStream(Detokenizer(TOKENIZERS[kind]), stops, prompt)
    out, count = "", 0
    for block in [*blocks(ids, sizes), None]:
        piece = stream.flush() if block is None else stream.push(block)
        out, count = out + piece.text, count + piece.tokens
        assert not any(stop in out for stop in stops), "no piece has text that a later stop string removes"
        if piece.stopped:
            break
    return out, count, stream.stop


def whole(kind, prompt, ids):
    """What the ids add in one decode of prompt and continuation."""

    def decode(ids):
        return TOKENIZERS[kind].decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    both, before = decode(prompt + ids), decode(prompt)
    assert both.startswith(before)
    return both.removeprefix(before)


def split(kind, text, at, specials):
    """The ids of a text in two parts, between two characters, with some special tokens among the second ones."""
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer(text).input_ids
    at = min(at, len(ids))
    while at and tokenizer.decode(ids[:at]).endswith("\ufffd"):
        at -= 1
    answer = ids[at:]
    for place in specials:
        answer.insert(min(place, len(answer)), tokenizer.eos_token_id)
    return ids[:at], answer


@every_kind
@settings(deadline=None, max_examples=60)
@given(text=TEXT, at=st.integers(0, 30), specials=st.lists(st.integers(0, 30), max_size=2), sizes=SIZES)
def test_pieces_add_up_to_one_decode_of_prompt_and_answer_without_the_prompt(kind, text, at, specials, sizes):
    prompt, answer = split(kind, text, at, specials)
    assert run(kind, prompt, answer, sizes)[0] == whole(kind, prompt, answer)


@every_kind
@settings(deadline=None, max_examples=60)
@given(data=st.data(), sizes=SIZES)
def test_the_same_holds_for_tokens_that_no_tokenizer_would_put_in_this_order(kind, data, sizes):
    tokenizer = TOKENIZERS[kind]
    # Single bytes are left out: which of them are characters depends on those that follow.
    tokens = [i for token, i in tokenizer.get_vocab().items() if token.isascii() or "▁" in token]
    tokens = [i for i in tokens if not tokenizer.convert_ids_to_tokens(i).startswith("<0x")]
    ids = data.draw(st.lists(st.sampled_from(sorted(tokens)), max_size=30))
    at = data.draw(st.integers(0, len(ids)))
    assert run(kind, ids[:at], ids[at:], sizes)[0] == whole(kind, ids[:at], ids[at:])


@every_kind
@settings(deadline=None, max_examples=60)
@given(text=TEXT, at=st.integers(0, 30), sizes=SIZES, stops=STOPS)
def test_text_ends_before_the_first_stop_string_and_tokens_count_up_to_its_end(kind, text, at, sizes, stops):
    prompt, answer = split(kind, text, at, [])
    text = whole(kind, prompt, answer)
    got, count, stop = run(kind, prompt, answer, sizes, stops)
    ends = {text.find(s) + len(s): s for s in stops if s in text}
    if not ends:
        assert (got, stop) == (text, None)
        return
    # The first token that completes a stop string ends the text before the earliest of those that it completes.
    needed = next(
        n for n in range(1, len(answer) + 1) if any(s in whole_so_far(kind, prompt, answer, n) for s in stops)
    )
    so_far = whole_so_far(kind, prompt, answer, needed)
    assert stop in [s for s in stops if s in so_far]
    assert got == so_far[: min(so_far.find(s) for s in stops if s in so_far)]
    assert count == needed


def whole_so_far(kind, prompt, answer, n):
    """The text of the first n tokens, as far as the tokens behind them do not change it."""
    full = whole(kind, prompt, answer)
    ends = [m for m in range(n + 1) if not TOKENIZERS[kind].decode(prompt + answer[:m]).endswith("\ufffd")]
    return full if n == len(answer) else full[: len(whole(kind, prompt, answer[: max(ends)]))]


def test_a_character_of_several_tokens_is_returned_with_its_last_token():
    for kind in ("byte level", "Llama 2", "Gemma"):
        tokenizer = TOKENIZERS[kind]
        stream = TextStream(Detokenizer(tokenizer), prompt=tokenizer("a").input_ids)
        assert [stream.push([i]).text for i in tokenizer("a😀").input_ids[-4:]] == ["", "", "", "😀"]


def test_a_character_that_the_prompt_has_begun_is_returned_whole():
    ids = TOKENIZERS["byte level"]("a日b").input_ids
    assert run("byte level", ids[:2], ids[2:], [1])[0] == "日b"


@every_kind
def test_a_block_that_ends_inside_of_a_character_does_not_hold_back_those_before_it(kind):
    if "😀" in TOKENIZERS[kind].decode(ids := TOKENIZERS[kind]("a" + "😀" * 20).input_ids):
        stream, texts = TextStream(Detokenizer(TOKENIZERS[kind])), []
        for block in blocks(ids, [4]):
            texts.append(stream.push(block).text)
        assert all(texts)


def test_an_incomplete_character_is_returned_at_the_end():
    ids = TOKENIZERS["byte level"]("a😀").input_ids
    text = run("byte level", [], ids[:-1], [1])[0]
    assert text[0] == "a"
    assert set(text[1:]) == {"\ufffd"}


def test_what_is_released_at_the_end_is_searched_for_stop_strings():
    ids = TOKENIZERS["byte level"]("a😀").input_ids[:-1]
    assert run("byte level", [], ids, [1], stops=("a\ufffd",)) == ("", 4, "a\ufffd")


@every_kind
def test_the_work_for_a_token_does_not_grow_with_the_tokens_before_it(kind, monkeypatch):
    tokenizer = TOKENIZERS[kind]
    longest = Counter()
    decode = Detokenizer.decode

    def counting(self, ids, *options):
        longest[len(ids)] += 1
        return decode(self, ids, *options)

    monkeypatch.setattr(Detokenizer, "decode", counting)
    stream = TextStream(Detokenizer(tokenizer), ("stop",), tokenizer("ab").input_ids * 300)
    byte = tokenizer("😀").input_ids[-1]  # not the beginning of a character
    space = tokenizer.convert_tokens_to_ids("▁") if "▁" in tokenizer.get_vocab() else byte
    for id in [tokenizer.eos_token_id] * 300 + [byte] * 300 + [space] * 300 + tokenizer("ab").input_ids * 300:
        stream.push([id])
    assert max(longest) <= 2 * WAITING
    assert sum(longest.values()) <= WAITING * 1800


def test_a_stop_string_that_is_a_special_token_becomes_its_id_and_a_part_of_one_is_refused():
    detokenizer = Detokenizer(TOKENIZERS["WordPiece"])
    eos = detokenizer.tokenizer.eos_token_id
    assert detokenizer.split_stops(["ab", "<eos>"]) == (["ab"], {eos: "<eos>"})
    with pytest.raises(ValueError, match=r"stop='<eos>ab' contains the special token <eos>, which has no text"):
        detokenizer.split_stops(["<eos>ab"])


def test_the_text_of_a_token_is_that_inside_of_a_text_and_parts_of_characters_have_their_bytes():
    for kind, text, token in (
        ("byte level", "ab", ("ab", b"ab")),
        ("byte level", " a", (" a", b" a")),
        ("Llama 2", " ab", (" ab", b" ab")),
        ("Unigram", " ab", (" ab", b" ab")),
        ("WordPiece", "ab", (" ab", b" ab")),
        ("byte level", "\u00e9", ("bytes:\\xa9", b"\xa9")),
        ("Gemma", "\U0001f600", ("bytes:\\x80", b"\x80")),
    ):
        detokenizer = Detokenizer(TOKENIZERS[kind])
        assert detokenizer.token(TOKENIZERS[kind](text).input_ids[-1]) == token
    detokenizer = Detokenizer(TOKENIZERS["WordPiece"])
    assert detokenizer.token(detokenizer.tokenizer.convert_tokens_to_ids("##ing"))[0] == "ing"
    assert detokenizer.token(detokenizer.tokenizer.eos_token_id) == ("<eos>", b"<eos>")
    assert detokenizer.token(10_000) == ("", b""), "an id that the model has beyond the tokenizer's"
