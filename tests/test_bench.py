"""experiments/bench.py: that every section runs, that its FLOPs are those that torch counts, row by
row and token by token, and that TRL reads and rewards as train_toy.py does."""

import pytest
import torch
from conftest import tiny

import train_toy as toy
from experiments import bench
from model import Generation


def test_flops_of_an_update_and_of_sampling_row_by_row():
    model, prompts, ends = tiny(), [3, 3, 5, 5], [7, 4, 8, 12]
    tokens = torch.zeros(4, 12, dtype=torch.long)
    sampled = Generation(tokens, torch.tensor(prompts), torch.tensor(ends))
    a_pair = 4 * model.cfg.n_layer * model.cfg.n_head * model.cfg.head_dim

    def forward(T, logits):  # one row; torch counts T^2 pairs, of which T (T - 1) / 2 are masked
        counted = bench.counted(lambda: model.residual(tokens[:1, :T], 3))
        return counted - a_pair * T * (T - 1) // 2 + 2 * logits * model.cfg.d_model * 11

    update = sum(3 * forward(end - 1, end - P) for P, end in zip(prompts, ends))
    assert bench.update_flops(model.cfg, sampled) == update
    # two questions, two rows each: a prompt once, then what the tokens of each row but its last add
    sampling = forward(3, 1) + forward(5, 1)
    for P, end in zip(prompts, ends):
        sampling += forward(end - 1, end - 1 - P) - forward(P, 0)
    assert bench.sampling_flops(model.cfg, sampled, group=2) == sampling


def test_quick_runs_every_section_but_writes_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench, "trl_peer", lambda: None)  # as if it were not installed
    assert bench.main(["--quick", "--out", str(tmp_path / "bench.json")]) == 0
    printed = capsys.readouterr().out
    for name in ("limit", "phase1", "scaling", "entropy"):
        assert f"\n## {name}\n\n| " in printed
    assert not list(tmp_path.iterdir())


def test_trl_reads_and_rewards_as_train_toy():
    pytest.importorskip("trl", reason="the extra `bench` is not installed")
    from experiments import trl_peer

    assert trl_peer.tokenizer()("7+5*3-2=")["input_ids"] == toy.encode("7+5*3-2=")
    answers = [toy.encode(text) for text in ("4<eos>", "4", "9=4<eos>", "94<eos>")]
    assert trl_peer.reward(["7+5*3-2="] * 4, None, answers) == [1, 0, 1, 0]
