import random

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pipelines.data import encoding
from pipelines.data.encoding import bounded_words, special_spellings, token_ids

TEXT = "The trees, 12 of them, don't grow; they  stand.\n\tAnd so: the tree-house\n\nstays é 日本 there. "
LLAMA_3 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WITHOUT_SPACE = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
SPLITS = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "gpt2 with a blank in front": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "llama3": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA_3), "isolated"), WITHOUT_SPACE]),
    "metaspace": pre_tokenizers.Metaspace(),
    "bert": pre_tokenizers.BertPreTokenizer(),
}


def make_tokenizer(split):
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = SPLITS[split]
    backend.decoder = decoders.ByteLevel()
    letters = [*pre_tokenizers.ByteLevel.alphabet(), "▁"]
    special = ["<unk>", "<|endoftext|>", "<|im_start|>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=letters, show_progress=False)
    backend.train_from_iterator([TEXT] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", unk_token="<unk>")


@pytest.fixture
def short_pieces(monkeypatch):
    monkeypatch.setattr(encoding, "PIECE", 400)
    monkeypatch.setattr(encoding, "_BATCH", 1000)


@pytest.mark.parametrize("split", SPLITS)
def test_a_document_in_pieces_has_the_tokens_of_the_whole(short_pieces, split):
    tokenizer, rng = make_tokenizer(split), random.Random(0)
    words = TEXT.split(" ")
    texts = [" ".join(rng.choices(words, k=n)) for n in (3, 3000, 0, 700)]
    found = token_ids(tokenizer, texts, special_tokens=False)
    whole = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert [ids.tolist() for ids in found] == whole
    assert all(ids.dtype == np.int32 for ids in found)


def test_a_document_without_blanks_is_cut(short_pieces):
    tokenizer = make_tokenizer("gpt2")
    text = "".join(random.Random(0).choices("abcdehorst", k=5000))
    pieces = list(encoding._pieces(text, lambda texts: tokenizer(texts)["input_ids"]))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) == 400
    (ids,) = token_ids(tokenizer, [text], special_tokens=False)
    assert tokenizer.decode(ids) == text


def test_long_words_alone_are_cut_for_training():
    text = "a" * 999 + " " + "b" * 2500 + " c"
    assert list(bounded_words(text)) == ["a" * 999 + " " + "b" * 1000, "b" * 1000, "b" * 500 + " c"]
    assert list(bounded_words(TEXT)) == [TEXT]


def test_a_special_token_that_a_document_spells_out_is_text_by_default():
    tokenizer, text = make_tokenizer("gpt2"), "the <|endoftext|> stays <|im_start|>"
    eos = tokenizer.eos_token_id
    (as_text,), (as_token,) = (token_ids(tokenizer, [text], special_tokens=s) for s in (False, True))
    assert eos not in as_text
    assert tokenizer.decode(as_text) == text
    assert (as_token == eos).sum() == 1
    assert special_spellings(tokenizer).findall(text) == ["<|endoftext|>", "<|im_start|>"]
