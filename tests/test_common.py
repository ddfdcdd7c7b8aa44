"""experiments/common.py: files of results that can be continued, intervals, pairs, layers of names."""

import json
import time

import numpy as np
import pytest

from experiments import common


def square(x):
    if x < 0:
        raise ValueError(f"{x} is negative")
    return {"square": x * x, "seconds": 0.0}


def test_only_missing_jobs_run_and_each_record_is_kept(tmp_path):
    results = tmp_path / "results.jsonl"
    assert common.read_lines(results) == []
    results.write_text(json.dumps({"x": 2, "square": "from before", "seconds": 1.0}) + "\n")
    jobs = [({"x": x}, square, x) for x in (2, 3, 4)]
    assert [key for key, *_ in common.missing_jobs(results, jobs)] == [{"x": 3}, {"x": 4}]
    lines = common.run_missing(results, jobs)
    assert lines == common.read_lines(results)
    assert {line["x"]: line["square"] for line in lines} == {2: "from before", 3: 9, 4: 16}
    # a job that fails loses only itself
    with pytest.raises(ValueError, match="-1 is negative"):
        common.run_missing(results, [*jobs, ({"x": 5}, square, 5), ({"x": -1}, square, -1)], 1)
    assert [line["x"] for line in common.read_lines(results)][-1] == 5


def test_intervals():
    pytest.importorskip("scipy", reason="the extra `bench` is not installed")
    assert common.mean_interval([3.0]) == (3.0, None)
    mean, half = common.mean_interval([1.0, 2.0, 4.0, 5.0])
    assert mean == 3.0 and half == pytest.approx(3.1824463 * np.sqrt(10 / 3) / 2)  # of a table
    assert common.with_interval([1.0, 2.0, 4.0, 5.0]) == "+3.0 ± 2.9"
    assert common.with_interval([0.123], "{:.2f}") == "0.12" and common.with_interval([]) == ""


def test_differences_are_of_pairs_and_means_over_the_unit():
    values = {("A", 1, 10): 5, ("A", 1, 11): 7, ("A", 2, 10): 9, ("B", 1, 10): 1, ("B", 1, 11): 2}
    values |= {("B", 2, 10): 3, ("C", 1, 10): 100, ("A", 3, 10): 50}  # base 3 has no partner
    lines = [dict(arm=a, base=b, seed=s, value=v) for (a, b, s), v in values.items()]

    def minus(line, control):
        return line["value"] - control["value"]

    assert common.differences(lines, "A", "B", minus, "base") == [4.5, 6.0]
    assert common.differences(lines, "A", "B", minus, "seed") == [5.0, 5.0]
    assert common.differences(lines, "A", "D", minus, "base") == []


def test_layers_of_names():
    names = {
        "blocks.0.attn.qkv.weight": 1,
        "lm.model.layers.11.mlp.down_proj.weight": 12,
        "embed.weight": None,
        "model.norm.weight": None,
    }
    assert {name: common.layer_of(name) for name in names} == names


def test_a_table_and_the_seconds_of_a_call():
    table = common.markdown_table(["a", "b"], [[1, "x"], [2.5, ""]])
    assert table == "| a | b |\n| --- | --- |\n| 1 | x |\n| 2.5 |  |"
    waited = []
    assert common.seconds(lambda: time.sleep(0.02), lambda: waited.append(1)) >= 0.02
    assert len(waited) == 2
