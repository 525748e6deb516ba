"""`generate` takes the arguments of transformers and returns prompt + continuation."""

import pytest
import torch
from transformers import GenerationConfig, TextStreamer, set_seed

from kforcing.reference import decode
from tests.models import VOCAB, make_backbone, make_sequential

PAD = VOCAB - 1


@pytest.fixture(scope="module")
def sequential():
    student = make_sequential(make_backbone())
    for model in (student, student.backbone):  # LlamaConfig names an EOS id, which is an ordinary token here
        model.generation_config.eos_token_id = None
    return student


def left_padded(rows):
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


ROWS = [[1, 2, 3, 4, 5], [7, 8], [9, 10, 11]]


def test_greedy_with_k_1_equals_transformers(sequential):
    batch = left_padded(ROWS)
    theirs = sequential.backbone.generate(**batch, max_new_tokens=12, do_sample=False, pad_token_id=PAD)
    assert torch.equal(sequential.generate(**batch, k=1, max_new_tokens=12, do_sample=False), theirs)
    eos = sorted({int(theirs[0, 8]), int(theirs[1, 11])})
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": eos, "pad_token_id": PAD}
    theirs = sequential.backbone.generate(**batch, **options)
    mine = sequential.generate(**batch, k=1, **options)
    assert mine.dtype == torch.int64
    assert torch.equal(mine, theirs)


def test_the_first_token_of_greedy_blocks_equals_transformers(sequential):
    batch = left_padded(ROWS)
    mine = sequential.generate(**batch, max_new_tokens=4)
    theirs = sequential.backbone.generate(**batch, max_new_tokens=1, do_sample=False, pad_token_id=PAD)
    assert torch.equal(mine[:, :6], theirs)


def test_sampling_is_a_function_of_seed_and_prompt_alone(sequential):
    out = sequential.generate(**left_padded(ROWS), max_new_tokens=9, do_sample=True, seed=3)
    assert out.shape == (3, 14)
    for i, row in enumerate(ROWS):
        assert out[i, 5:].tolist() == decode(sequential, row, 9, k=4, seed=3)
        assert out[i, 5 - len(row) : 5].tolist() == row
        alone = sequential.generate(torch.tensor([row]), max_new_tokens=9, do_sample=True, seed=3)
        assert torch.equal(alone[0, len(row) :], out[i, 5:])


def test_the_short_call_returns_the_same_continuation(sequential):
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    out = sequential.generate(ids, max_new_tokens=6, do_sample=True, seed=1)
    assert sequential.continue_prompts(ids, max_new_tokens=6, seed=1) == out[:, 3:].tolist()


def test_exact_acceptance_continues_as_the_ar_model_does(sequential):
    batch = left_padded(ROWS)
    theirs = sequential.backbone.generate(**batch, max_new_tokens=12, do_sample=False, pad_token_id=PAD)
    mine = sequential.generate(**batch, acceptance="exact", max_new_tokens=12, do_sample=False)
    assert torch.equal(mine, theirs)
    expected = [decode(sequential.backbone, row, 9, seed=3, coupling=sequential.readout.pick) for row in ROWS]
    mine = sequential.generate(**batch, acceptance="exact", max_new_tokens=9, do_sample=True, seed=3)
    assert mine[:, 5:].tolist() == expected
    short = sequential.continue_prompts(torch.tensor(ROWS[1]), acceptance="exact", max_new_tokens=9, seed=3)
    assert short == expected[1:2]


def test_without_a_seed_set_seed_repeats_a_call(sequential):
    ids = torch.tensor([[1, 2, 3], [1, 2, 3]])
    runs = []
    for seed in (0, 0, 1):
        set_seed(seed)
        runs.append(sequential.generate(ids, max_new_tokens=8, do_sample=True))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[0][0], runs[0][1])


def test_rows_end_with_their_eos_and_then_pad_tokens(sequential):
    batch = left_padded(ROWS)
    whole = sequential.generate(**batch, max_new_tokens=10, do_sample=True, seed=0)
    eos = [int(whole[0, 7]), int(whole[1, 12])]
    out = sequential.generate(**batch, max_new_tokens=10, do_sample=True, seed=0, eos_token_id=eos, pad_token_id=PAD)
    longest = 0
    for row, full in zip(out[:, 5:].tolist(), whole[:, 5:].tolist(), strict=True):
        end = next((i + 1 for i, token in enumerate(full) if token in eos), 10)
        assert row[:end] == full[:end]
        assert set(row[end:]) <= {PAD}
        longest = max(longest, end)
    assert out.shape[1] == 5 + longest


def test_a_generation_config_is_honoured_and_arguments_take_precedence(sequential):
    ids = torch.tensor([[1, 2, 3]])
    config = GenerationConfig(max_new_tokens=7, do_sample=True, temperature=0.7, top_p=0.9, top_k=5)
    out = sequential.generate(ids, generation_config=config, seed=2)
    assert out.shape == (1, 10)
    same = sequential.generate(ids, max_new_tokens=7, do_sample=True, temperature=0.7, top_p=0.9, top_k=5, seed=2)
    assert torch.equal(out, same)
    assert sequential.generate(ids, generation_config=config, max_new_tokens=2, seed=2).shape == (1, 5)
    assert sequential.generate(ids, max_length=8).shape == (1, 8)
    assert sequential.generate(ids).shape == (1, 23)


def test_several_continuations_of_a_prompt_differ_and_the_first_has_the_given_seed(sequential):
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    out = sequential.generate(ids, max_new_tokens=8, do_sample=True, seed=5, num_return_sequences=3)
    assert out.shape == (6, 11)
    assert torch.equal(out[::3], sequential.generate(ids, max_new_tokens=8, do_sample=True, seed=5))
    assert torch.equal(out[:, :3], ids.repeat_interleave(3, dim=0))
    assert len({tuple(row) for row in out[:3, 3:].tolist()}) == 3


def test_pad_tokens_without_a_mask_are_padding(sequential):
    batch = left_padded(ROWS)
    masked = sequential.generate(**batch, max_new_tokens=5, do_sample=True, seed=0, pad_token_id=PAD)
    inferred = sequential.generate(batch["input_ids"], max_new_tokens=5, do_sample=True, seed=0, pad_token_id=PAD)
    assert torch.equal(masked, inferred)


IDS = torch.tensor([[1, 2, 3]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 2}, "num_beams=2 is not supported"),
        ({"past_key_values": [1]}, r"past_key_values=\[1\] is not supported"),
        ({"logits_processor": [len]}, "logits_processor="),
        ({"streamer": TextStreamer(None)}, "streamer="),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2 is not supported.*pass repetition_penalty=1.0"),
        ({"min_new_tokens": 3}, "min_new_tokens=3"),
        ({"output_scores": True}, "output_scores=True"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate=True"),
        ({"temprature": 0.5}, "temprature=0.5"),
        ({"max_length": 3}, "max_length=3 leaves no room after prompts of 3 tokens"),
        ({"max_new_tokens": 70}, "the model reads 64 positions"),
        ({"k": 5}, "k=5 tokens a step"),
        ({"acceptance": "lossy"}, "acceptance=lossy: choose one of exact, fixed"),
        ({"num_return_sequences": 2}, "do not support `num_return_sequences`"),
        ({"attention_mask": torch.tensor([[1, 1, 0]])}, "row 0 is not padded on the left"),
        ({"attention_mask": torch.tensor([[0, 0, 0]])}, "row 0 is not padded on the left"),
        ({"attention_mask": torch.tensor([[1, 1]])}, r"attention_mask of shape \(1, 2\) does not fit"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, "hold no prompts"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(sequential, arguments, message):
    with pytest.raises(ValueError, match=message):
        sequential.generate(**{"input_ids": IDS, **arguments})


def test_an_argmax_student_samples_and_refuses_greedy_and_exact_decoding(student):
    with pytest.raises(ValueError, match="do_sample=False asks for the likeliest tokens"):
        student.generate(IDS, max_new_tokens=4)
    with pytest.raises(ValueError, match="top_k=50"):
        student.generate(IDS, max_new_tokens=4, do_sample=True, top_k=50)
    with pytest.raises(ValueError, match="acceptance=exact needs the AR model inside the student"):
        student.generate(IDS, max_new_tokens=4, do_sample=True, acceptance="exact")
    with pytest.raises(ValueError, match="acceptance=exact needs the AR model inside the student"):
        student.continue_prompts(IDS, max_new_tokens=4, acceptance="exact")
    out = student.generate(IDS, max_new_tokens=4, do_sample=True, seed=0)
    assert out[:, 3:].tolist() == student.continue_prompts(IDS, max_new_tokens=4, seed=0)
