"""The report of Pass@K: differences of pairs in points, worth, and both experiments together."""

import pytest

from experiments import common, passk, study

pytest.importorskip("scipy", reason="the extra `bench` is not installed")

GRPO = [0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.6, 0.8, 0.8, 0.8]


def record(arm: str, base: int, solved: float, reward: list) -> dict:
    """The record of a run whose Pass@K is `solved` everywhere."""
    scores = {f"pass@{k}": solved for k in passk.SHOWN}
    where = {"arm": arm, "base": base, "seed": passk.SEED, "n": 5}
    return where | {"longer": {"6": scores, "7": scores}, "entropy": 0.1, "reward": reward}


def records() -> list[dict]:
    """Two base models on which BuPO does what an idle run does, and solves 0.1 and 0.3 more."""
    idle = common.delayed(GRPO, 5).tolist()
    lines = []
    for base, gain in ((400, 0.1), (401, 0.3)):
        lines.append(record("GRPO", base, 0.5, GRPO))
        lines.append(record("GRPO, idle 5", base, 0.5, idle))
        lines.append(record("BuPO, rule", base, 0.5 + gain, idle))
    return lines


def test_the_plan_has_every_contrast():
    arms = {name for name, *_ in passk.plan()}
    assert {arm for pair in passk.CONTRASTS.items() for arm in pair} <= arms <= set(study.ARMS)
    assert len(set(passk.plan())) == len(passk.plan()) == 96


def test_the_report_has_pairs_in_points_and_worth():
    text = passk.report(records())
    rows = [line.split(" | ") for line in text.splitlines()]
    [primary] = [row for row in rows if row[0] == "| BuPO, rule - GRPO, idle 5"]
    half = 12.7062 * 10 * 2**0.5 / 2**0.5  # t for one degree of freedom, times the standard error
    assert primary[1] == "2" and primary[6] == f"+20.0 ± {half:.1f}"
    [worth] = [row for row in rows if row[:2] == ["| BuPO, rule", "GRPO"]]
    assert worth[2] == "2" and worth[-1].startswith(("0.00", "-0.00"))


def test_both_experiments_together():
    ours = common.costs(records(), "BuPO, rule", "GRPO", 5, "base")
    theirs = common.costs(common.read_lines(study.RESULTS), "BuPO, rule", "GRPO", 5, "base")
    costs = ours["arm - control"] + theirs["arm - control"]
    idle = ours["idle - control"] + theirs["idle - control"]
    expected = f"{1 - sum(costs) / sum(idle):.2f}"
    assert f": {expected} (" in passk.together(records())


def test_an_idle_run_may_be_longer_than_the_run():
    assert common.delayed([0.1, 0.5], 5).tolist() == [0.1, 0.1]
