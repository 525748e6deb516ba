"""The command that completes a file of prompts."""

import json
import sys

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kforcing import PushForwardLM, complete
from kforcing.reference import decode
from tests.models import VOCAB, make_backbone, make_sequential


@pytest.fixture
def folder(tmp_path):
    """A student with a tokenizer of single letters."""
    student = make_sequential(make_backbone())
    student.generation_config.eos_token_id = None
    student.save_pretrained(tmp_path / "student")
    letters = {chr(ord("a") + i): i for i in range(VOCAB - 1)} | {"?": VOCAB - 1}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(tmp_path / "student")
    return tmp_path


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["complete", *map(str, words)])
    complete.main()


def test_lines_come_back_in_order_with_the_reference_tokens(folder, monkeypatch):
    prompts = ["abc", "fghijklm", "a", "bbbb", "cad"]
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n\n")
    run(
        monkeypatch,
        folder / "student",
        folder / "prompts.txt",
        "-o",
        folder / "out.jsonl",
        "--max-new-tokens",
        9,
        "--slots",
        2,
    )
    answers = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert [a["prompt"] for a in answers] == prompts
    student = make_sequential(make_backbone())
    for answer in answers:
        ids = [ord(c) - ord("a") for c in answer["prompt"]]
        assert answer["tokens"] == decode(student, ids, 9, k=4)
        assert answer["finish_reason"] == "length"
        assert answer["text"]
        assert answer["steps"] == 3


def test_exact_acceptance_gives_the_tokens_of_the_ar_model(folder, monkeypatch):
    (folder / "prompts.txt").write_text("abc\nfgh")
    words = ["-o", folder / "out.jsonl", "--max-new-tokens", 9, "--acceptance", "exact"]
    run(monkeypatch, folder / "student", folder / "prompts.txt", *words)
    student = make_sequential(make_backbone())
    for line in (folder / "out.jsonl").read_text().splitlines():
        answer = json.loads(line)
        ids = [ord(c) - ord("a") for c in answer["prompt"]]
        assert answer["tokens"] == decode(student.backbone, ids, 9, coupling=student.readout.pick)


def test_a_student_without_its_ar_model_refuses_exact_acceptance(folder, monkeypatch):
    PushForwardLM.from_backbone(make_backbone(), 4).save_pretrained(folder / "student")
    (folder / "p.txt").write_text("abc")
    with pytest.raises(SystemExit, match="acceptance=exact needs the AR model inside the student"):
        run(monkeypatch, folder / "student", folder / "p.txt", "--acceptance", "exact", "--max-new-tokens", 4)


def test_a_line_of_json_may_have_its_own_seed(folder, monkeypatch):
    lines = [{"prompt": "abc"}, {"prompt": "abc", "seed": 7}, {"prompt": "abc", "seed": 0}]
    (folder / "p.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    run(monkeypatch, folder / "student", folder / "p.jsonl", "-o", folder / "out.jsonl", "--max-new-tokens", 12)
    first, second, third = [json.loads(line)["tokens"] for line in (folder / "out.jsonl").read_text().splitlines()]
    assert first == third != second


def test_every_eos_id_of_the_generation_config_ends_a_text(folder, monkeypatch):
    student = make_sequential(make_backbone())
    eos = decode(student, [0, 1, 2], 9, k=4)[3::3]
    student.generation_config.eos_token_id = eos
    student.generation_config.save_pretrained(folder / "student")
    (folder / "p.txt").write_text("abc")
    run(monkeypatch, folder / "student", folder / "p.txt", "-o", folder / "out.jsonl", "--max-new-tokens", 9)
    answer = json.loads((folder / "out.jsonl").read_text())
    assert answer["tokens"] == decode(student, [0, 1, 2], 9, k=4, stop_ids=frozenset(eos))
    assert answer["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("name", "text", "words", "message"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}', [], "line 2 has no .prompt."),
        ("p.jsonl", "nonsense", [], "line 1 is not JSON"),
        ("p.txt", "abc\n" + "a" * 70, [], "prompt 2: 70 prompt tokens"),
        ("p.txt", "abc", ["--k", "5"], "k=5"),
        ("p.txt", "abc", ["--temperature", "-1"], "prompt 1: temperature=-1"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(folder, monkeypatch, name, text, words, message):
    (folder / name).write_text(text)
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, folder / "student", folder / name, "-o", folder / "out.jsonl", "--max-new-tokens", 4, *words)
    assert not (folder / "out.jsonl").exists()


def test_a_folder_without_a_model_is_named(folder, monkeypatch, tmp_path):
    (folder / "p.txt").write_text("abc")
    with pytest.raises(SystemExit, match="no tokenizer in"):
        run(monkeypatch, tmp_path / "nothing", folder / "p.txt")
