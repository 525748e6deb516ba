import pytest

from pipelines.runs.costs import balance, balance_line, cost_of
from pipelines.runs.report import bars, cost_table, print_table, ratio


def test_the_balance_of_known_rates():
    """4 actors of 0.5 s a row make 8 rows/s; a step of 16 rows in 0.8 s uses 20: 10 actors make as many."""
    b = balance(rollout_s=0.5, actors=4, step_s=0.8, rows=16)
    assert b == {
        "rollout_rows_per_s": 8.0,
        "train_rows_per_s": pytest.approx(20.0),
        "bottleneck": "rollouts",
        "actors": 4,
        "balanced_actors": 10,
    }
    assert balance(0.5, 10, 0.8, 16)["bottleneck"] == "training"
    assert balance(0.5, 40, 0.8, 16)["balanced_actors"] == 10
    assert balance(0.01, 1, 1.0, 8)["balanced_actors"] == 1


def test_the_balance_of_a_finished_stage_is_that_of_the_actors_it_had():
    """Its records say how many; cached rollouts, which no actor makes meanwhile, have no balance."""
    record = {"step": 4, "seconds": 2.0, "tokens_per_s": 9.0, "data_wait": 0.5, "train_rss_mb": 1.0}
    rolled = {**record, "rollout_s": 0.5, "rollout_rss_mb": 7.0}
    assert cost_of([{**rolled, "actors": 3}, {**rolled, "step": 8, "actors": 4}])["actors"] == 4
    assert "actors" not in cost_of([rolled])


def test_the_balance_is_told_in_words_and_in_the_table():
    cost = {
        "name": "k2",
        "steps": 100,
        "seconds": 160.0,
        "tokens_per_s": 1234.0,
        "data_wait": 0.5,
        "train_rss_mb": 1.0,
        "rollout_s": 0.5,
        "rollout_rss_mb": 700.0,
        "rollout_gpu_mb": 9000.0,
    }
    with_balance = {**cost, "balance": balance(0.5, 4, 0.8, 16)}
    assert balance_line(with_balance) == (
        "4 rollout actors make 8.0 rows/s, training could use 20.0 and waited 50% of its time: the bottleneck is rollouts, "
        "rollout.actors=10 would balance them, given devices of their own"
    )
    head, _, row, cached = cost_table([with_balance, cost]).splitlines()
    assert row == "| k2 | 100 | 160 | 1,234 | 50% | 2.0 | 1 | 700 + GPU 9000 | rollouts | 4, 10 |"
    assert cached.endswith("| – | – |")
    assert head.count("|") == row.count("|") == cached.count("|")


def test_one_document_has_figures_and_no_interval(capsys):
    alone = {"value": 0.5, "lo": None, "hi": None}
    stage = {"name": "k1", "match": [alone], "block_match": alone, "student_nll": [alone], "teacher_nll": [alone]}
    print_table({"stages": [stage], "mlflow": "off"})
    assert "k1       0.500                       0.500                     0.50/0.50" in capsys.readouterr().out
    assert ratio(alone) == "0.500"
    assert bars([alone]) == ([0.5], [[0.0], [0.0]])
