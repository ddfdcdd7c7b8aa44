"""experiments/bench.py runs every section, and TRL reads and rewards as train_toy.py does."""

import pytest

import train_toy as toy
from experiments import bench


def test_quick_runs_every_section_but_writes_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench, "trl_peer", lambda: None)  # as if it were not installed
    assert bench.main(["--quick", "--out", str(tmp_path / "bench.json")]) == 0
    printed = capsys.readouterr().out
    for name in ("phase1", "entropy"):
        assert f"\n## {name}\n\n| " in printed
    assert not list(tmp_path.iterdir())


def test_results_are_added_to_those_in_the_file(monkeypatch, tmp_path):
    rows = {"phase1": [{"layer": 1, "ms": 2.0}], "entropy": [{"ours s": 3.0}]}
    for name in rows:
        monkeypatch.setitem(bench.SECTIONS, name, lambda o, name=name: rows[name])
        assert bench.main([name, "--out", str(tmp_path / "bench.json")]) == 0
    text = (tmp_path / "bench.md").read_text()
    assert "| layer | ms |\n| --- | --- |\n| 1 | 2 |" in text and "| ours s |" in text


def test_trl_reads_and_rewards_as_train_toy():
    pytest.importorskip("trl", reason="the extra `bench` is not installed")
    from experiments import trl_peer

    assert trl_peer.tokenizer()("7+5*3-2=")["input_ids"] == toy.encode("7+5*3-2=")
    answers = [toy.encode(text) for text in ("4<eos>", "4", "9=4<eos>", "94<eos>")]
    assert trl_peer.reward(["7+5*3-2="] * 4, None, answers) == [1, 0, 1, 0]
