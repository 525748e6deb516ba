"""The decode benchmark on tiny models: what it counts, not how fast it is."""

import copy
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kforcing.engine import Engine, EngineConfig, Request, SamplingParams
from kforcing.metrics.flops import predicted_ar_step, predicted_step
from pipelines.benchmarks.decoding.command import prompts_of, read_arguments
from pipelines.benchmarks.decoding.hardware import Hardware, roofline_ms
from pipelines.benchmarks.decoding.report import checks
from pipelines.benchmarks.decoding.rounds import EngineRounds, Workload, transformers_rounds
from pipelines.benchmarks.decoding.simulation import make_counting, simulated_student
from pipelines.benchmarks.decoding.ways import DecodingWay, SequentialConfig, student_ways, untrained_ways
from tests.models import VOCAB, make_backbone, make_sequential

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
PROMPTS = [[1, 2, 3], [9, 5, 6]]


def counting():
    backbone = make_backbone()
    make_counting(backbone)
    return backbone


def first_rounds(way, work, n=2):
    return list(itertools.islice(EngineRounds(way, work, CPU), n))


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_untrained_model_counts_at_every_temperature(temperature, dtype):
    engine = Engine(counting().to(dtype), EngineConfig(row_kernel=False, coupling="gumbel"))
    (done,) = engine.generate([Request([7, 21], 30, sampling=SamplingParams(temperature))])
    assert done.tokens == [(22 + i) % VOCAB for i in range(30)]


@pytest.mark.parametrize("coupling", ["gumbel", "inverse_cdf"])
@pytest.mark.parametrize("parts", [{"hint_layers": 1}, {"hint_layers": 1, "shortlist": 8}])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_simulated_drafts_are_accepted_always_or_never(coupling, parts, temperature):
    backbone, work = counting(), Workload(PROMPTS, tokens=6, rounds=1, temperature=temperature)
    for acceptance, brought in ((1.0, 1.0), (0.0, 0.0)):
        student = simulated_student(backbone, 4, SequentialConfig(**parts), coupling, acceptance)
        for k in (2, 4):
            for done in first_rounds(DecodingWay("exact", student, k, exact=True), work):
                assert done.tokens_a_step == 1 + brought * (k - 1)
    fixed = first_rounds(DecodingWay("fixed", student, 4), work)
    assert all(done.tokens_a_step == 4 for done in fixed)


def test_simulated_acceptance_is_the_share_of_drafts_that_are_right():
    student = simulated_student(counting(), 4, SequentialConfig(hint_layers=1), "gumbel", 0.6)
    config = EngineConfig(32, acceptance="exact", adapt_width=False, context_ngram=0, row_kernel=False)
    engine = Engine(student, config)
    done = engine.generate([Request([i % VOCAB], 48, seed=i) for i in range(32)])
    assert [c.tokens[-1] for c in done] == [(i + 48) % VOCAB for i in range(32)]
    shares = [a / d for a, d in zip(engine.stats.accepted, engine.stats.drafted, strict=True)]
    assert shares == pytest.approx([0.6, 0.36, 0.216], abs=0.06)


def test_an_acceptance_that_is_no_probability_is_refused():
    with pytest.raises(ValueError, match=r"acceptance=1\.5 of a draft must be a probability"):
        simulated_student(make_backbone(), 4, SequentialConfig(), "gumbel", 1.5)


def test_a_round_counts_tokens_and_steps_of_all_prompts():
    work = Workload(PROMPTS, tokens=6, rounds=1)
    for done in first_rounds(DecodingWay("AR", make_backbone()), work, 3):
        assert (done.steps, done.tokens, done.batch) == (6, 12, 2)
        assert done.tokens_per_s == pytest.approx(2 / done.step_ms * 1e3)


def test_an_engine_that_chooses_widths_tries_all_of_them_before_the_first_round():
    student = simulated_student(counting(), 4, SequentialConfig(hint_layers=1), "gumbel", 1.0)
    rounds = EngineRounds(DecodingWay("auto", student, 4, exact=True, adapt_width=True), Workload(PROMPTS, 4, 1), CPU)
    done = next(iter(rounds))
    assert set(rounds.engine.stats.widths) == {1, 2, 3, 4}
    assert 1 <= done.tokens_a_step <= 4


def test_rounds_that_exceed_the_positions_are_refused():
    work = Workload([[1] * 30], tokens=20, rounds=3)
    with pytest.raises(ValueError, match="has reached the 64 positions of the model; ask for fewer rounds"):
        first_rounds(DecodingWay("AR", make_backbone()), work, 4)


def test_rounds_of_transformers_count_passes_of_the_ar_model():
    backbone = counting()
    (done,) = itertools.islice(transformers_rounds(backbone, Workload(PROMPTS, 6, 1), CPU), 1)
    assert (done.steps, done.tokens, done.batch) == (6, 12, 2)
    for temperature in (0.0, 1.0):
        seen = Workload([[*range(VOCAB), 0, 1]], 12, 1, temperature)  # the prompt holds what follows it
        (done,) = itertools.islice(transformers_rounds(backbone, seen, CPU, prompt_lookup_num_tokens=3), 1)
        assert done.batch == 1
        assert done.tokens_a_step > 2
        draft = copy.deepcopy(backbone)
        (done,) = itertools.islice(transformers_rounds(backbone, seen, CPU, assistant_model=draft), 1)
        assert done.tokens_a_step > 2


def test_students_without_their_ar_model_have_no_exact_rows():
    trained = make_sequential(make_backbone(), freeze_trunk=False)
    assert [way.name for way in student_ways(trained, [2, 4])] == ["engine, fixed k=4"]
    ways = untrained_ways(counting(), [2, 4], "gumbel", 0.8, more=True)
    assert [way.name for way in ways if not way.knows(0.7)] == ["engine, paper's read-out k=4"]
    assert [way.name for way in ways] == [
        "engine, AR",
        "engine, fixed k=4",
        "engine, exact k=2",
        "engine, exact k=4",
        "engine, exact k=auto",
        "engine, fixed k=4, no shortlist",
        "engine, exact k=4, no shortlist",
        "engine, AR, drafts from the context",
        "engine, AR, inverse CDF",
        "engine, paper's read-out k=4",
        "stock kernels, AR",
        "batch-invariant, AR",
    ]


def test_the_roofline_is_the_slower_of_bytes_and_arithmetic():
    backbone = make_backbone()
    step = predicted_ar_step(backbone)
    way = DecodingWay("AR", backbone)
    memory_bound = Hardware(1.0, 1e30)
    assert roofline_ms(way, backbone, 1, 0, memory_bound) == pytest.approx(step.bytes * 1e3)
    assert roofline_ms(way, backbone, 4, 0, memory_bound) == pytest.approx(step.bytes * 1e3)
    assert roofline_ms(way, backbone, 4, 0, Hardware(1e30, 1.0)) == pytest.approx(4 * step.flops * 1e3)


def test_one_token_of_a_sequential_student_costs_an_ar_step():
    student = make_sequential(make_backbone())
    assert predicted_step(student, 1) == predicted_step(student, 1, exact=True) == predicted_ar_step(student.backbone)


def test_checks_compare_the_chosen_width_with_ar_and_with_the_best_fixed_width():
    def row(ms, tokens):
        return {"step_ms": ms, "tokens_a_step": [tokens] * 3, "tokens_per_s": [tokens / x * 1e3 for x in ms]}

    rows = {
        "engine, AR": row([10.0, 20.0, 10.0], 1),
        "engine, exact k=2": row([10.0, 22.0, 11.0], 1.8),
        "engine, exact k=4": row([14.0, 28.0, 14.0], 2.8),
        "engine, exact k=4, no shortlist": row([30.0, 30.0, 30.0], 2.8),
        "engine, exact k=auto": row([14.0, 28.0, 14.0], 2.8),
    }
    assert checks(rows) == [
        "* engine, exact k=2: 1.10 [1.00, 1.10] × the AR step.",
        "* engine, exact k=4: 1.40 [1.40, 1.40] × the AR step.",
        "* engine, exact k=auto: 2.00 [2.00, 2.00] × AR, 1.00 [1.00, 1.00] × engine, exact k=4, the best fixed width.",
    ]


def test_prompts_are_stretches_of_a_text(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(i): i for i in range(20)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(map(str, range(10))))
    given = read_arguments(["--student", str(tmp_path), "--text", str(text)])
    assert prompts_of(given, 20, 3, 4) == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    with pytest.raises(ValueError, match="has 10 tokens; prompts of --context 11 need more text"):
        prompts_of(given, 20, 1, 11)
    with pytest.raises(SystemExit):
        read_arguments(["--text", str(text)])


@pytest.mark.cluster
def test_the_command_prints_tables_and_one_json_object(tmp_path):
    make_sequential(make_backbone()).save_pretrained(tmp_path / "student")
    words = ["--student", tmp_path / "student", "--batch", "1,2", "--context", "8", "--tokens", "4", "--rounds", "2"]
    words += ["--temperature", "1,0", "--tracking", f"sqlite:///{tmp_path}/mlflow.db", "--output", tmp_path / "bench"]
    done = subprocess.run(
        [sys.executable, ROOT / "pipelines" / "benchmark.py", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert [(table["batch"], table["temperature"]) for table in record["tables"]] == [(1, 1), (2, 1), (1, 0), (2, 0)]
    first = record["tables"][0]["rows"]
    assert list(first) == [
        "transformers",
        "transformers, prompt lookup",
        "engine, AR",
        "engine, fixed k=4",
        "engine, exact k=2",
        "engine, exact k=4",
        "engine, exact k=auto",
        "engine, AR, drafts from the context",
    ]
    assert all(len(row["tokens_per_s"]) == 2 and min(row["tokens_per_s"]) > 0 for row in first.values())
    assert first["engine, AR"]["tokens_a_step"] == [1, 1]
    assert first["engine, fixed k=4"]["tokens_a_step"] == [4, 4]
    assert {f.name for f in (tmp_path / "bench").iterdir()} == {"benchmark.json", "benchmark.md", "benchmark.png"}
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("kforcing-benchmark").experiment_id])
    logged = run.data.metrics["engine_AR/batch_2_context_8_T__1/tokens_per_s"]
    rates = sorted(record["tables"][1]["rows"]["engine, AR"]["tokens_per_s"])
    assert rates[0] <= logged <= rates[1]
