"""A model's folder says how its texts begin and end, and a tokenizer that does so otherwise is refused."""

import json
import shutil
import sys

import pytest
from tokenizers import processors
from transformers import GenerationConfig

from kforcing import LLM, complete
from kforcing.conventions import conventions_of
from kforcing.engine import Request
from kforcing.loading import load_tokenizer, save_tokenizer
from kforcing.pyfunc import TextGenerator
from serve.app import build
from tests.endpoint import CHAT, EOS, LETTERS, save_model
from tests.kforcing.test_complete import run as complete_file

BOS, SECOND_EOS = 3, 7


@pytest.fixture
def student(tmp_path):
    """A student's folder: `d` before each prompt, `|` behind each text, two EOS ids, a chat template."""
    folder = save_model(tmp_path / "student", chat=True)
    GenerationConfig(eos_token_id=[EOS, SECOND_EOS]).save_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    with_specials(tokenizer, "d $0 |")
    save_tokenizer(tokenizer, folder)
    return folder


def with_specials(tokenizer, template):
    tokens = [("d", BOS), ("|", EOS)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=tokens)


def test_the_record_says_what_stands_around_a_text(student):
    assert json.loads((student / "conventions.json").read_text()) == {
        "prompt_prefix": {"d": BOS},
        "text_suffix": {"|": EOS},
        "document_end": {"|": EOS},
        "eos": {LETTERS[SECOND_EOS]: SECOND_EOS, "|": EOS},
        "chat_template": True,
    }
    assert load_tokenizer(student).chat_template == CHAT


def without_prefix(folder):
    tokenizer = load_tokenizer(folder)
    with_specials(tokenizer, "$0 |")
    tokenizer.save_pretrained(folder)


def with_other_eos(folder):
    tokenizer = load_tokenizer(folder)
    tokenizer.eos_token = "a"
    tokenizer.save_pretrained(folder)


CHANGES = {
    "prompt_prefix of the tokenizer in .* is {}, and was {'d': 3} when": without_prefix,
    "document_end of the tokenizer in .* is {'a': 0}, and was {'|': 22} when": with_other_eos,
    "eos of the tokenizer in .* is {'|': 22}, and was {'h': 7, '|': 22} when": (
        lambda folder: (folder / "generation_config.json").unlink()
    ),
    "chat_template of the tokenizer in .* is False, and was True when": (
        lambda folder: (folder / "chat_template.jinja").unlink()
    ),
    "conventions.json is empty or cut .*; put it back": lambda folder: (folder / "conventions.json").write_text(""),
}


@pytest.mark.parametrize("message", CHANGES)
def test_what_no_longer_fits_the_record_is_named_wherever_the_folder_is_loaded(student, message, tmp_path, monkeypatch):
    CHANGES[message](student)
    (tmp_path / "prompts.txt").write_text("abc\n")
    monkeypatch.setattr(sys, "argv", ["complete", str(student), str(tmp_path / "prompts.txt")])
    message = message.replace("|", r"\|")
    for load in (LLM, lambda folder: TextGenerator(str(folder)), lambda folder: build({"model": str(folder)})):
        with pytest.raises(ValueError, match=message) as error:
            load(student)
        assert "\n" not in str(error.value)
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        complete.main()


def test_a_student_of_an_earlier_release_has_no_record_and_stops_at_the_eos_of_its_tokenizer(
    student, tmp_path, monkeypatch
):
    for name in ("conventions.json", "generation_config.json"):
        (student / name).unlink()
    llm, generator = LLM(student), TextGenerator(str(student))
    assert llm.eos_ids == generator.stop_ids == {EOS}
    build({"model": str(student), "max_model_len": 40})
    seed, answer = next(
        (seed, answer)
        for seed in range(100)
        if (answer := llm.engine.generate([_request(llm, seed)])[0]).finish_reason == "stop"
    )
    (tmp_path / "p.txt").write_text("abc\n")
    words = ["-o", tmp_path / "out.jsonl", "--max-new-tokens", 20, "--seed", seed]
    complete_file(monkeypatch, student, tmp_path / "p.txt", *words)
    record = json.loads((tmp_path / "out.jsonl").read_text())
    assert (record["finish_reason"], record["tokens"]) == ("stop", answer.tokens)


def _request(llm, seed):
    return Request(llm.tokenizer("abc").input_ids[:-1], 20, seed, llm.eos_ids)


def test_a_tokenizer_without_eos_or_template_has_a_record_too(tmp_path):
    folder = save_model(tmp_path / "plain", eos=False)
    found = conventions_of(load_tokenizer(folder), None)
    assert found == {"prompt_prefix": {}, "text_suffix": {}, "document_end": {}, "eos": {}, "chat_template": False}
    save_tokenizer(load_tokenizer(folder), folder)
    shutil.copytree(folder, tmp_path / "copy")
    load_tokenizer(tmp_path / "copy")
