"""experiments/bench.py: that every section runs; and what its numbers rest on:

    forward_flops = what torch's own counter counts, exactly, forward and (times three) with backward
    update_flops, sampling_flops, pretraining_flops = the same counter, row by row and token by token
    the tilted reward leaves no row without an advantage; the model that TRL trains is ours
"""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import tiny

import minibupo
import train_toy as toy
from experiments import bench
from model import GPT, Generation, GPTConfig


@pytest.mark.parametrize("changes", [{}, dict(n_kv_head=4, head_dim=6, d_mlp=20, tied=False)])
def test_flops_are_those_that_torch_counts(changes):
    model, tokens = tiny(**changes), torch.randint(11, (3, 7))
    forward = bench.forward_flops(model.cfg, positions=3 * 7, pairs=3 * 7 * 7, unembedded=3 * 7)
    assert bench.counted(lambda: model(tokens).detach()) == forward
    assert bench.counted(lambda: model(tokens).sum().backward()) == 3 * forward


def test_flops_of_an_update_and_of_sampling_row_by_row():
    model, causal = tiny(), lambda T: T * (T + 1) // 2
    P, end = torch.tensor([3, 3, 5, 5]), torch.tensor([7, 4, 8, 12])
    sampled = Generation(torch.zeros(4, 12, dtype=torch.long), P, end, None, None)

    def forward(T, logits):  # one row of T, its pairs counted as T^2 by torch; the causal ones are fewer
        row, square = torch.zeros(1, T, dtype=torch.long), 4 * model.cfg.n_layer * model.cfg.n_head * model.cfg.head_dim
        return bench.counted(lambda: model.residual(row, 3)) - square * (T * T - causal(T)) + 2 * logits * model.cfg.d_model * 11

    update = sum(3 * forward(e - 1, e - p) for p, e in zip(P.tolist(), end.tolist()))
    assert bench.update_flops(model.cfg, sampled) == update
    # two questions, two rows each: a prompt once, then what the row's own tokens but the last add to it
    sampling = sum(forward(p, 1) for p in (3, 5)) + sum(forward(e - 1, e - 1 - p) - forward(p, 0) for p, e in zip(P.tolist(), end.tolist()))
    assert bench.sampling_flops(model.cfg, sampled, group=2) == sampling


def test_flops_of_pretraining():
    s = toy.Settings(n=3, n_layer=2, d_model=8, n_head=1, pretrain_batch=4)
    cfg = s.model_config()
    tokens, response = toy.pretraining_batch(s, s.sloppy_from, cfg.context_length)
    T = tokens.shape[1] - 1
    everything = bench.forward_flops(cfg, 4 * T, 4 * T * T, 4 * T)
    masked = 4 * cfg.n_layer * cfg.d_model * 4 * (T * (T - 1) // 2) + 2 * cfg.d_model * 16 * (4 * T - int(response[:, 1:].sum()))
    assert bench.pretraining_flops(cfg, s) == 3 * (everything - masked)


def test_every_row_learns():
    s = toy.Settings(n=3, n_layer=2, d_model=32, questions=4, group=8)
    model = GPT(s.model_config())
    seen, plain = [], minibupo.group_advantages
    with pytest.MonkeyPatch.context() as patch, bench.every_row_learns(s):
        patch.setattr(minibupo, "group_advantages", lambda rewards, *kind: seen.append(plain(rewards, *kind)) or seen[-1])
        toy.rl_step(s, model, toy.adamw(model, 1e-9, 0.0), minibupo.FULL, minibupo.Policy(1), 1, bench.CPU)
    assert seen[0].shape == (4, 8) and (seen[0] != 0).all()


def test_exponents_and_peak_memory():
    x = np.array([1, 2, 4, 8])
    assert bench.exponents(x, 3.0 * x**2) == pytest.approx((2, 2))

    def call():
        a = torch.ones(1000)  # 4000 bytes
        b = a + 1
        del a
        return b.double()  # 4000 + 8000

    assert bench.peak_memory(call) == 12_000


def test_internal_entropies_hold_two_tensors_of_chunk_by_vocabulary():
    model, mask = tiny(vocab_size=5000), torch.ones(2, 23, dtype=torch.bool)
    tokens = torch.randint(5000, (2, 24))

    def peak(chunk):
        return bench.peak_memory(lambda: minibupo.internal_entropies(model, tokens, mask, chunk=chunk))

    assert peak(23) - peak(5) == pytest.approx(2 * (23 - 5) * 5000 * 4, rel=0.05)


def test_entropies_by_hooks_keep_everything():
    model, kept = tiny(), {}
    with bench.hooks_that_keep(model, kept):
        model(torch.randint(11, (2, 5)))
    assert len(kept) == 1 + 4 * model.cfg.n_layer and not model.blocks[0].attn._forward_hooks


def test_quick_runs_every_section(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "experiments.trl_peer", raising=False)
    assert bench.main(["--quick", "--out", str(tmp_path / "bench.json")]) == 0
    printed, results = capsys.readouterr().out, json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert "skipped, since TRL is not installed" in printed
    assert list(results) == ["limit", "phase1", "scaling", "entropy", "profile"]
    for section in results.values():
        assert section["machine"]["threads"] == 1 and section["rows"]
    assert [row["layer"] for row in results["phase1"]["rows"]] == [1, 2, "full"]


@pytest.mark.parametrize("wrong", [["speed"], ["run"]])
def test_wrong_sections(wrong, capsys):
    with pytest.raises(SystemExit):
        bench.main(wrong)
    assert ("no section speed" if wrong == ["speed"] else "needs --base") in capsys.readouterr().err


def test_the_model_that_trl_trains_is_ours():
    pytest.importorskip("trl", reason="the extra `bench` is not installed")
    from experiments import trl_peer

    torch.manual_seed(0)
    model = GPT(GPTConfig(toy.VOCAB_SIZE, 24, n_layer=2, d_model=32, n_head=4, n_kv_head=2))
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.1, 0.3)
    qwen3, tokens = trl_peer.to_qwen3(model), torch.randint(16, (3, 24))
    torch.testing.assert_close(qwen3(tokens).logits, model(tokens), rtol=1e-4, atol=1e-5)
    other = tiny(vocab_size=16, n_layer=2, d_model=32)
    trl_peer.from_qwen3(other, qwen3)
    torch.testing.assert_close(other(tokens), model(tokens))
    assert trl_peer.tokenizer()("7+5*3-2=")["input_ids"] == toy.encode("7+5*3-2=")
    assert trl_peer.reward([[4, toy.EOS], [4], [3, toy.EQUALS, 4, toy.EOS], [3, 4, toy.EOS]], [4, 4, 4, 4]) == [1, 0, 1, 0]
