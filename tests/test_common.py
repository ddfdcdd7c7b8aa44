"""experiments/common.py: files of results that can be resumed, intervals, pairs, worth, tables."""

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


def test_the_limits_of_a_ratio_are_where_a_t_test_begins_to_reject_it():
    stats = pytest.importorskip("scipy.stats", reason="the extra `bench` is not installed")
    rng = np.random.default_rng(0)
    for n in (3, 8, 20):
        below = rng.normal(-6, 1, n)
        above = 0.7 * below + rng.normal(0, 1, n)
        low, high = common.ratio_interval(above, below)
        assert low < above.mean() / below.mean() < high
        for ratio in (low, high):
            assert stats.ttest_1samp(above - ratio * below, 0).pvalue == pytest.approx(0.05)
    # a denominator that may be 0 bounds nothing
    assert common.ratio_interval([1.0, 2.0, 3.0], [-1.0, 0.5, 1.0]) == (-np.inf, np.inf)
    assert common.ratio_interval([1.0], [2.0]) == (-np.inf, np.inf)


def test_worth_of_idling_is_0_and_of_the_control_itself_1():
    pytest.importorskip("scipy", reason="the extra `bench` is not installed")
    grpo = {base: [0.1 * base, 0.3, 0.5, 0.6, 0.7, 0.8] for base in (1, 2, 3)}
    assert common.delayed(grpo[2], 2).tolist() == [0.2, 0.2, 0.2, 0.3, 0.5, 0.6]
    assert common.delayed(grpo[2], 0).tolist() == grpo[2]
    lines = [dict(arm="GRPO", base=base, seed=0, reward=reward) for base, reward in grpo.items()]
    lines += [
        dict(arm=arm, base=base, seed=0, reward=reward)
        for base in grpo
        for arm, reward in {
            "idle": [grpo[base][0]] * 2 + grpo[base][:4],
            "the same": grpo[base],
            # loses half of what idling loses, in its phase 1
            "half": [(x + y) / 2 for x, y in zip([grpo[base][0]] * 2 + grpo[base][:4], grpo[base])],
        }.items()
    ]
    for arm, expected in {"idle": 0, "the same": 1, "half": 0.5}.items():
        found = common.costs(lines, arm, "GRPO", 2, "base")
        value, low, high = common.worth(found["arm - control"], found["idle - control"])
        assert (value, low, high) == pytest.approx((expected,) * 3, abs=1e-6)
        assert found["arm - idle"] == pytest.approx(
            np.subtract(found["arm - control"], found["idle - control"])
        )
    assert common.costs(lines, "idle", "GRPO", 2, "base")["after the switch"] == pytest.approx(
        [0] * 3
    )
    later = common.costs(lines, "the same", "GRPO", 2, "base")["after the switch"]
    gains = [0.5 - 0.1 * base + 0.6 - 0.3 + 0.7 - 0.5 + 0.8 - 0.6 for base in (1, 2, 3)]
    assert later == pytest.approx([100 * gain / 4 for gain in gains])
    assert common.costs(lines, "idle", "GRPO", 6, "base")["after the switch"] == []


def test_the_worth_of_the_committed_results_by_a_plain_loop():
    """The row of the primary contrast, from the file of results, without common.py's functions."""
    pytest.importorskip("scipy", reason="the extra `bench` is not installed")
    from experiments import study

    lines = [json.loads(line) for line in study.RESULTS.read_text().splitlines()]
    rewards = {(x["arm"], x["base"], x["seed"]): x["reward"] for x in lines}
    cost, idle = {}, {}
    for (arm, base, seed), reward in rewards.items():
        if arm == "BuPO, rule":
            grpo = rewards["GRPO", base, seed]
            late = [grpo[max(0, t - 5)] for t in range(len(grpo))]
            cost.setdefault(base, []).append(sum(reward) - sum(grpo))
            idle.setdefault(base, []).append(sum(late) - sum(grpo))
    totals = [sum(sum(x) / len(x) for x in by_base.values()) for by_base in (cost, idle)]
    table = study.report(lines).split("worth |\n")[1]
    row = next(row for row in table.splitlines() if row.startswith("| BuPO, rule |"))
    assert f"| {1 - totals[0] / totals[1]:.2f} (" in row


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
