"""experiments/gpu.py and cuda_graph.py on a CPU: every part runs in its smallest form, one that
fails does not stop the rest, FLOPs are those that torch counts, and sampling with fixed shapes
chooses what model.generate chooses."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train_toy as toy
from experiments import cuda_graph, gpu, language_models
from experiments.cuda_graph import Decoder
from model import Generation


def measure(tmp_path, *argv):
    path = tmp_path / "gpu.json"
    code = gpu.main(["--device", "cpu", "--quick", "--json", str(path), *argv])
    return code, json.loads(path.read_text())["parts"]


def test_every_part_runs_in_its_smallest_form(tmp_path, capsys):
    # if TRL is installed, its part takes a minute; language models have a test of their own
    parts = [name for name in gpu.PARTS if name not in ("trl", "language")]
    code, found = measure(tmp_path, *(word for name in parts for word in ("--part", name)))
    assert code == 0 and list(found) == parts
    assert not any("error" in part or "skipped" in part for part in found.values())
    assert found["agreement"]["logits"] == 0  # both models are on the CPU
    assert found["large"]["share of peak, update"] > 0
    rows = capsys.readouterr().out.split("| --- | --- | --- |")[1].strip().splitlines()
    assert sum(row.startswith("| step |") for row in rows) == len(found["step"])


def test_flops_of_an_update_and_of_sampling_row_by_row():
    model, prompts, ends = tiny(), [3, 3, 5, 5], [7, 4, 8, 12]
    tokens = torch.zeros(4, 12, dtype=torch.long)
    sampled = Generation(tokens, torch.tensor(prompts), torch.tensor(ends))
    a_pair = 4 * model.cfg.n_layer * model.cfg.n_head * model.cfg.head_dim

    def counted(T):
        # torch does not count the CPU's fused attention, so it is computed by plain products
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model.residual(tokens[:1, :T], 3)
        return counter.get_total_flops()

    def forward(T, logits):  # one row; torch counts T^2 pairs, of which T (T - 1) / 2 are masked
        return counted(T) - a_pair * T * (T - 1) // 2 + 2 * logits * model.cfg.d_model * 11

    update = sum(3 * forward(end - 1, end - P) for P, end in zip(prompts, ends))
    assert gpu.update_flops(model.cfg, sampled) == update
    # two questions with two rows each: each prompt once, then what the response's tokens add
    sampling = forward(3, 1) + forward(5, 1)
    for P, end in zip(prompts, ends):
        sampling += forward(end - 1, end - 1 - P) - forward(P, 0)
    assert gpu.sampling_flops(model.cfg, sampled, group=2) == sampling


def test_language_models_where_they_are_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(language_models, "CACHE", tmp_path)
    assert "skipped" in gpu.language(SimpleNamespace(quick=False))
    pytest.importorskip("trl", reason="the extra `hf` is not installed")
    from experiments import lm_study

    times = [9.0, 9.0, *[1.0, 2.0] * 3, *[3.0, 4.0] * 6]  # the first batch of phase 1 warms up
    line = {"step_time": times, "reward": [0.5, 1.0], "seconds": 7.0}
    monkeypatch.setattr(
        lm_study, "train", lambda name, arm, seed: lm_study.arms(name)[arm] and line
    )
    (tmp_path / "qwen.gguf").touch()
    found = gpu.language(SimpleNamespace(quick=False))
    assert found["qwen, seconds a batch, phase 1"] == 3 and len(found) == 4
    assert found["qwen, seconds a batch, phase 2"] == 7


def test_a_part_that_fails_costs_the_others_nothing(tmp_path, monkeypatch):
    def fails(o):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(gpu, "PARTS", {"fails": fails, "works": lambda o: {"answer": 42}})
    code, found = measure(tmp_path)
    assert code == 1 and found["fails"]["error"] == "RuntimeError: out of memory"
    assert found["works"]["answer"] == 42
    code, found = measure(tmp_path, "--minutes", "0")
    assert code == 0 and all("skipped" in part for part in found.values())


@pytest.mark.parametrize("changes", [{}, dict(n_kv_head=4, qk_norm=False, tied=False)])
def test_fixed_shapes_choose_what_generate_chooses(changes):
    """In float64, greedily, for prompts of different lengths whose rows end at different tokens."""
    model = tiny(dtype=torch.float64, vocab_size=16, **changes)
    asked = dict(prompt=torch.randint(14, (5, 6)), prompt_len=torch.tensor([2, 6, 4, 3, 6]))
    asked |= dict(max_new_tokens=15, num_samples=2, pad_id=15, temperature=0)
    with torch.no_grad():
        model.unembed.__self__.lm_head.weight[gpu.toy.EOS] *= 1.5  # so that some rows end
        decoder = Decoder(model, **asked)
        for _ in range(2):  # a second time from the start
            decoder.generate(decoder.step)
            theirs = model.generate(**asked, eos_id=gpu.toy.EOS)
            assert torch.equal(decoder.end, theirs.end)
            T = theirs.tokens.shape[1]
            written = torch.arange(T) < theirs.end[:, None]
            assert torch.equal(decoder.tokens[:, :T][written], theirs.tokens[written])
    assert len(set(theirs.end.tolist())) > 1


def test_a_kept_decoder_answers_as_generate_does():
    """Logits are made so large that every sample is the likeliest token; the second questions meet
    the decoder of the first."""
    model, s = toy.load_model(gpu.BASE).double(), toy.Settings()
    with torch.no_grad():
        model.final_norm.weight *= 1e5
    for step in (1, 2):
        problems = toy.draw_questions(toy.rng_for(0, "questions", step), 12, s.n)
        generators = (toy.torch_rng_for("cpu", 0, "responses", step) for _ in range(2))
        theirs, ours = (
            respond(model, s, problems, 2, next(generators))
            for respond in (toy.sample_responses, cuda_graph.sample_responses)
        )
        assert all(map(torch.equal, theirs, ours))
    assert len(cuda_graph.KEPT) == 1
    cuda_graph.KEPT.clear()
