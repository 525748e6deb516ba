from pipelines.benchmarks.windows import measure, ways
from tests.models import make_backbone, make_sequential


def test_windows_of_a_text_cost_fewer_flops_than_rolled_out_ones():
    student = make_sequential(make_backbone(), 4, hint_layers=1)
    rows = measure(ways(student, rows=2, tokens=20), windows=32, rounds=1)
    assert [r["way"] for r in rows] == ["rolled out, 32 labels", "text, whole vocabulary", "text, 2,048 sampled tokens"]
    assert rows[0]["ratio"] == 1.0
    assert rows[1]["gflop_a_window"] < 0.8 * rows[0]["gflop_a_window"]
    assert all(r["low"] <= r["windows_per_s"] <= r["high"] for r in rows)
