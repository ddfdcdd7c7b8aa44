"""The study's arithmetic: what it pairs, averages and probes. Its smallest form as a whole runs in CI."""

import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))

import study  # noqa: E402

import train_toy as toy  # noqa: E402
from model import GPT  # noqa: E402


def line(arm="GRPO", base=30, seed=300, reward=(1.0, 0.0), cpu=(1.0, 3.0), accuracy=0.5):
    """A result line with what the tables read."""
    log = [[r, 0.1, 9.0, 0.01, c, False] for r, c in zip(reward, cpu)]
    tiers = {n: {"avg@8": accuracy, "pass@8": 1.0} for n in ("5", "6")}
    return {"setting": "fresh", "arm": arm, "base": base, "seed": seed, "target": [5, "resid_post"], "n": 5, "log": log,
            "held": {"10": accuracy}, "final": tiers}  # fmt: skip


def test_the_plan_pairs_what_it_compares():
    runs = study.plan()
    assert len(set(runs)) == len(runs) and {arm for _, arm, *_ in runs} == set(study.ARMS)
    assert {base for *_, base, _ in runs}.isdisjoint({0, 1, 2, 3, 4, 20, 21}) and min(seed for *_, seed in runs) >= 300
    for setting, _, base, seed in runs:
        assert (setting, "GRPO", base, seed) in runs
    pairs = Counter((setting, arm, base in study.QK) for setting, arm, base, _ in runs)
    assert pairs["fresh", "BuPO", True] == pairs["finite", "BuPO", True] == 15
    assert min(pairs.values()) == 6


def test_paired_differences_and_their_interval():
    lines = [line(base=b, seed=s, accuracy=0.5) for b in (30, 31) for s in (300, 301)]
    gains = (0.1, 0.2, 0.3, 0.4)
    lines += [line("BuPO", b, s, accuracy=0.5 + g) for (b, s), g in zip([(30, 300), (30, 301), (31, 300), (31, 301)], gains)]
    lines += [line("BuPO", 32, 300, accuracy=0.9)]  # has no partner
    pairs = study.pairs_of(lines, "fresh", "BuPO", "GRPO", study.QK)
    found = [r["final"]["5"]["avg@8"] - c["final"]["5"]["avg@8"] for r, c in pairs]
    assert sorted(found) == pytest.approx(gains)
    half = 3.182 * np.std(gains, ddof=1) / math.sqrt(4)  # Student's t, 3 degrees of freedom, 95 %
    assert study.shown(gains) == f"**+25.0 ± {100 * half:.1f}**" and study.shown([0.1, -0.1]).startswith("+0.0 ±")
    assert f"| BuPO | 4 | 0 | 75.0 (50.0) | **+25.0 ± {100 * half:.1f}** |" in study.comparison(lines, "fresh", ["BuPO"])


def test_reward_at_equal_cost():
    assert study.reward_by_cpu(line(), 4.0) == pytest.approx(1 / 4)
    assert study.reward_by_cpu(line(), 2.0) == pytest.approx(1 / 2)  # the second step's reward counts from second 1 on
    assert study.reward_by_cpu(line(reward=(0.0, 1.0)), 1.0) == 0.0


def test_probe_reads_nothing_from_the_embedding_of_an_equals_sign():
    """H^0 is the same at every `=`, so the probe can only guess the commonest result; above it there is something to read."""
    s = toy.Settings(n=3, n_layer=2, d_model=32)
    right = study.probe_accuracy(GPT(s.model_config()), 3)
    expr = {split: toy.draw_problems(toy.numpy_rng(0, toy.PROBE), 512, 3, split) for split in ("train", "eval")}
    results = {split: np.concatenate([l[:, 0] for l in toy.worked_lines(e)[1:]]) for split, e in expr.items()}
    commonest = Counter(results["train"].tolist()).most_common(1)[0][0]
    assert right[0] == pytest.approx(float((results["eval"] == commonest).mean()))
    assert len(right) == 3 and right[1] > right[0]
