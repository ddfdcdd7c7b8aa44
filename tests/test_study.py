"""The study's plan, its paired differences and its finite set of problems. Its smallest form as a
whole runs in CI."""

import numpy as np
import pytest

import train_toy as toy
from experiments import study
from model import GPT


def line(arm, base, seed, accuracy):
    tier = {"avg@8": accuracy, "pass@8": 1.0}
    final = {"5": tier, "6": tier}
    where = {"setting": "fresh", "arm": arm, "base": base, "seed": seed}
    return where | {"n": 5, "held": [accuracy], "final": final}


def test_the_plan_has_each_control_and_no_run_twice():
    runs = study.plan(quick=False)
    assert len(set(runs)) == len(runs) and {arm for _, arm, *_ in runs} == set(study.ARMS)
    for setting, arm, *pair in runs:
        assert (setting, study.CONTROL.get(arm, "GRPO"), *pair) in runs


def test_paired_differences_and_their_error():
    pairs, gains = [(30, 300), (30, 301), (31, 300), (31, 301)], (0.1, 0.2, 0.3, 0.4)
    lines = [line("GRPO", *pair, 0.5) for pair in reversed(pairs)]
    lines += [line("BuPO", *pair, 0.5 + gain) for pair, gain in zip(pairs, gains)]
    lines += [line("BuPO", 32, 300, 0.9)]  # has no partner
    found = study.differences(lines, "fresh", "BuPO", study.MEASURES["area"])
    assert found == pytest.approx([10, 20, 30, 40])
    error = 100 * np.std(gains, ddof=1) / 2
    assert f"| fresh | BuPO - GRPO | 4 | +25.0 +- {error:.1f} |" in study.report(lines)


def test_the_finite_set_stays_the_same():
    s = toy.Settings(n=3, n_layer=2, d_model=32, questions=32, group=2)
    model, seen = GPT(s.model_config()), set()
    for step in range(1, 13):
        batch = study.rollouts(s, model, step, "finite")
        seen |= {tuple(tokens[:6]) for tokens in batch.tokens.tolist()}
    fixed = toy.draw_questions(toy.stream(s.seed, "finite set"), study.FINITE, s.n)
    assert len(seen) > s.questions and seen <= {tuple(toy.encode(p + "=")) for p in fixed}
