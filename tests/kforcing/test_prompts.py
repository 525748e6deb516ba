"""Which special tokens stand around a prompt, and which id ends a text."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from kforcing.loading import eos_token_ids
from kforcing.prompts import prompt_ids


def tokenizer(template, **names):
    """Words a and b are ids 0 and 1; `template` says what stands around a text."""
    made = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[CLS]": 2, "[SEP]": 3}, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(["[CLS]", "[SEP]"])
    made.post_processor = processors.TemplateProcessing(template, special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


@pytest.mark.parametrize(
    ("template", "ids"),
    [
        ("$0", [0, 1]),
        ("[CLS] $0", [2, 0, 1]),  # like Llama's and Gemma's
        ("[CLS] $0 [SEP]", [2, 0, 1]),  # like BERT's
        ("$0 [SEP] [SEP]", [0, 1]),  # like T5's
    ],
)
def test_a_prompt_has_what_the_tokenizer_puts_before_a_text_and_not_what_ends_it(template, ids):
    assert prompt_ids(tokenizer(template), "a b") == ids


def test_a_special_token_that_the_text_itself_ends_with_stays():
    assert prompt_ids(tokenizer("[CLS] $0 [SEP]"), "a [SEP]") == [2, 0, 3]


def test_a_separator_ends_the_texts_of_a_tokenizer_without_eos():
    assert eos_token_ids(None, tokenizer("$0", sep_token="[SEP]"), 4) == {3}
    assert eos_token_ids(None, tokenizer("$0", sep_token="[SEP]", eos_token="b"), 4) == {1}
    assert eos_token_ids(None, tokenizer("$0"), 4) == set()
