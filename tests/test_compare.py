"""experiments/compare.py: tables and curves of several runs side by side."""

import json
from itertools import combinations

import numpy as np
import pytest
from conftest import NO_PHASE_1

import analyze
import train_toy as toy
from experiments import compare

pytest.importorskip("scipy", reason="the extra `bench` is not installed")


def subject(path):
    return analyze.Run(path, device="cpu")


def test_compare_runs(finished, copied, tmp_path):
    grpo, out, base = tmp_path / "grpo", tmp_path / "out", str(finished / "base.pt")
    options = [*NO_PHASE_1, "--algo", "grpo", "--base", base, "--out_dir", str(grpo)]
    assert toy.main(options) == 0
    more = ["--problems", "4", "--samples", "8", "--out", str(out), "--device", "cpu"]
    assert compare.main([str(finished), str(copied), str(grpo), *more]) == 0
    names = {path.name for path in out.iterdir()}
    assert names == {"table.md", "dynamics.png", "refinement.png", "passk.json", "passk.png"}
    rows = [line.split(" | ") for line in (out / "table.md").read_text().splitlines()]
    tier = toy.read_metrics(finished, "eval")[-1]["tiers"]["3"]
    assert [row[1] for row in rows if len(row) > 1] == ["runs", "---", "1", "2", "1"]
    shares = [f"{100 * tier[name]:.1f} ± 0.0" for name in ("avg@8", "correct_lines")]
    assert rows[3][3:5] == shares
    assert set(json.loads((out / "passk.json").read_text())["curves"]) == {"base", "BuPO", "GRPO"}
    assert compare.main([str(tmp_path)]) == 2
    dH_mlp = toy.read_metrics(grpo, "internal")[0]["dH_mlp"]  # GRPO is shown at the rule's layer
    expected = max([l for l in (1, 2) if dH_mlp[l - 1] > 0], default=2)
    assert subject(grpo).target_policy().layer == expected


def test_mean_and_standard_deviation_over_seeds():
    x, mean, std = compare.over_seeds([{0: 1.0, 2: 3.0}, {0: 3.0, 2: 4.0, 5: 9.0}])
    assert x == [0, 2, 5] and mean.tolist() == [2.0, 3.5, 9.0]
    np.testing.assert_allclose(std, [2**0.5, 0.5**0.5, 0])


def test_pass_curve_is_enumeration(finished, monkeypatch):
    counts = np.array([0, 2, 5])
    monkeypatch.setattr(compare, "sample_counts", lambda *of: counts)
    curve = compare.pass_curves({"BuPO": [subject(finished)]}, 3, 5)["curves"]["BuPO"][3]
    for i, k in enumerate((1, 2, 4)):
        draws = list(combinations(range(5), k))
        values = [np.mean([any(j < c for j in draw) for draw in draws]) for c in counts]
        assert curve["pass"][i] == pytest.approx(np.mean(values))
        assert curve["se"][i] == pytest.approx(np.std(values, ddof=1) / 3**0.5)
