"""train_toy.py: the task against Python's own arithmetic, and the command line as a user meets it.

stopped + resumed = never stopped, bit for bit       same seed = same run       bad input = one sentence, exit code 2
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY

import train_toy as toy

ROOT = Path(__file__).parent.parent



def arithmetic(text):
    """The right answer to "7+5*3-2=", by a loop over characters."""
    value = int(text[0])
    for op, digit in zip(text[1:-1:2], text[2:-1:2]):
        value = {"+": value + int(digit), "-": value - int(digit), "*": value * int(digit)}[op] % 10
    return value


def judge(prompt, response):
    """The reward of a response, both as text."""
    tokens = torch.tensor([toy.encode(prompt + response) + [toy.PAD] * 2])
    end = torch.tensor([len(toy.encode(prompt + response))])
    return float(toy.reward(tokens, end, torch.tensor([arithmetic(prompt)])))


def run(*argv):
    return toy.main([str(a) for a in argv])


def records(run_dir, kind=None):
    """A run's metrics without the seconds."""
    lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k != "seconds"} for r in lines if kind in (None, r["kind"])]


def assert_same_run(a, b):
    assert records(a) == records(b)
    a, b = (torch.load(Path(d) / "ckpt.pt", weights_only=True) for d in (a, b))
    assert all(torch.equal(v, b["model"][k]) for k, v in a["model"].items())
    for key, state in a["optimizer"]["state"].items():
        assert all(torch.equal(v, b["optimizer"]["state"][key][k]) for k, v in state.items())


# ---- tokens ----


def test_tokenizer_round_trip():
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice([*toy.CHARACTERS, "<eos>", "<pad>"]) for _ in range(rng.randrange(20)))
        assert toy.decode(toy.encode(text)) == text
    assert toy.encode("7+5*3-2=4<eos>") == [7, 10, 5, 12, 3, 11, 2, 13, 4, 14]


@pytest.mark.parametrize("text", ["7 + 5=", "7/5=", "x", "7+5=\n", "\u0667+5=", "<eos", "<|endoftext|>", "\ud800"])
def test_characters_outside_the_vocabulary_are_named(text):
    with pytest.raises(ValueError, match="character .* is not one of"):
        toy.encode(text)


# ---- task ----


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 8])
def test_solutions_against_arithmetic(n):
    """Hundreds of problems a size: careful solutions do one operation a line, sloppy ones leave lines out; all are right."""
    rng = np.random.default_rng(n)
    expr = toy.draw_problems(rng, 300, n)
    for skip in (0.0, 0.5, 1.0):
        tokens, ends = toy.worked_solutions(expr, rng, skip)
        lengths = []
        for row, end, problem in zip(tokens, ends, expr):
            text = toy.decode(row[:end])
            prompt = toy.decode(problem) + "="
            assert (row[end:] == toy.PAD).all() and text.startswith(prompt)
            assert text.endswith(f"{arithmetic(prompt)}<eos>") and toy.correct_steps(text)
            assert judge(prompt, text[len(prompt) :]) == 1
            for line in text.removesuffix("<eos>").split("=")[:-1]:
                assert arithmetic(line + "=") == arithmetic(prompt)
            lengths.append(end - 2 * n)
        if skip == 0:
            assert set(lengths) == {toy.careful_length(n)}
        if skip == 1:
            assert set(lengths) == {2}


def test_the_example_of_the_docstring():
    assert toy.decode(toy.worked_solutions(np.array([toy.encode("7+5*3-2")]))[0][0]) == "7+5*3-2=2*3-2=6-2=4<eos>"


@pytest.mark.parametrize("response,score", [
    ("2*3-2=6-2=4<eos>", 1), ("4<eos>", 1), ("6-2=4<eos>", 1),
    ("9*9=4<eos>", 1),  # right by wrong steps: rewarded by design, told apart by correct_steps
    ("<eos>", 0), ("=<eos>", 0), ("2*3-2=<eos>", 0), ("2*3-2=6-2=<eos>", 0), ("4", 0), ("2*3-2=6-2=4", 0),
    ("44<eos>", 0), ("04<eos>", 0), ("=44<eos>", 0), ("-4<eos>", 0), ("4+<eos>", 0), ("4=<eos>", 0), ("4=5<eos>", 0), ("5<eos>", 0),
    ("4<eos>4<eos>", 0), ("4<pad>", 0), ("<pad>4<eos>", 0), ("4<pad><eos>", 0), ("2*3-2=6-2=5<eos>", 0), ("2+2<eos>", 0),
])  # fmt: skip
def test_verifier_table(response, score):
    assert judge("7+5*3-2=", response) == score


def test_verifier_on_random_responses():
    """Against the rule in words: ended by <eos>, and the text behind the last `=` is the answer's one digit."""
    rng, right = random.Random(1), 0
    for _ in range(4000):
        n = rng.randrange(2, 7)
        prompt = "".join(rng.choice("0123456789") + rng.choice("+-*") for _ in range(n))[:-1] + "="
        response = "".join(rng.choice(toy.CHARACTERS) for _ in range(rng.randrange(4))) + rng.choice(["", "=", str(arithmetic(prompt)), f"={arithmetic(prompt)}"])
        response += rng.choice(["<eos>", "<eos>", ""])
        expected = response.endswith("<eos>") and (prompt + response).removesuffix("<eos>").split("=")[-1] == str(arithmetic(prompt))
        if response:
            assert judge(prompt, response) == expected, (prompt, response)
            right += expected
    assert right > 400


@pytest.mark.parametrize("text,valid", [
    ("7+5*3-2=2*3-2=6-2=4<eos>", True), ("7+5*3-2=6-2=4<eos>", True), ("7+5*3-2=4<eos>", True), ("7+5*3-2=2*3-2=5-2=3<eos>", False),
    ("7+5*3-2=9*9=4<eos>", False), ("7+5*3-2=2*3-2=6-2=4", False), ("7+5*3-2=7+5*3-2=4<eos>", False), ("7+5*3-2=2*3-2=<eos>", False),
    ("7+5*3-2=<pad>=4<eos>", False), ("7+5*3-2=2*3-2<eos>", False),
])  # fmt: skip
def test_correct_steps(text, valid):
    assert toy.correct_steps(text) == valid


@pytest.mark.parametrize("n", [3, 4, 5, 6])
def test_splits_are_disjoint(n):
    """No evaluation problem is trained on: not as a problem, and not as a line of a longer one's solution."""
    evaluation = {toy.decode(e) for e in toy.draw_problems(np.random.default_rng(0), 1000, n, "eval")}
    assert len(evaluation) == 1000
    met = set()
    for longer in range(n, 8):
        for line in toy.worked_lines(toy.draw_problems(np.random.default_rng(longer), 4000, longer))[:-1]:
            met |= {toy.decode(e) for e in line} if line.shape[1] == 2 * n - 1 else set()
    assert len(met) > 1000 and not met & evaluation
    every = np.stack([np.array(toy.encode(f"{a}+{b}*{c}")) for a in range(10) for b in range(10) for c in range(10)])
    assert 0.08 < toy.held_out(every).mean() < 0.17


def test_finite_training_set():
    """Every problem once before any comes again, in another order then; one set a seed, of training problems."""
    s = toy.Settings(n=4, train_problems=10, questions=4, seed=3)
    drawn = [toy.training_problems(s, step) for step in range(1, 6)]  # 20 questions: two epochs
    rows = [tuple(row) for tokens, _, _ in drawn for row in tokens.tolist()]
    assert len(set(rows[:10])) == 10 and sorted(rows[:10]) == sorted(rows[10:]) and rows[:10] != rows[10:]
    tokens, lengths, answers = (np.concatenate(parts) for parts in zip(*drawn))
    for row, length, answer in zip(tokens, lengths, answers):
        assert row[length - 1] == toy.EQUALS and (row[length:] == toy.PAD).all()
        lines = toy.worked_lines(row[None, : length - 1])
        assert answer == lines[-1][0, 0] and not any(toy.held_out(line)[0] for line in lines)
    assert sorted(lengths[:10]) == [6] * 3 + [8] * 7  # n = 3 and 4 in shares of 1 : 2
    other = toy.training_problems(toy.Settings(n=4, train_problems=10, questions=4, seed=4), 1)[0]
    assert not {tuple(row) for row in other.tolist()} <= set(rows)


def test_problems_cover_their_split():
    expr = toy.draw_problems(np.random.default_rng(0), 5000, 4)
    for column in range(7):
        values, counts = np.unique(expr[:, column], return_counts=True)
        assert len(values) == (3 if column % 2 else 10)
        assert counts.min() > 0.7 * 5000 / len(values)
    for n, count in ((1, 5), (2, 5), (3, 1001)):
        with pytest.raises(ValueError, match="cannot draw"):
            toy.draw_problems(np.random.default_rng(0), count, n, "eval")


@pytest.mark.parametrize("step", [1, 500])
def test_pretraining_rows(step):
    """Each row is whole solutions one after another (the last cut off), careful at first and sloppy later, and the marked
    tokens are their responses."""
    s = toy.Settings()
    tokens, response = toy.pretraining_batch(s, step, 42)
    assert tokens.shape == response.shape == (s.pretrain_batch, 42)
    careful = []
    for row, marked in zip(tokens, response):
        start = 0
        for end in np.flatnonzero(row == toy.EOS) + 1:
            text, n = toy.decode(row[start:end]), int(np.argmax(row[start:] == toy.EQUALS)) // 2 + 1
            assert toy.correct_steps(text)
            assert marked[start:end].tolist() == [False] * (2 * n) + [True] * (end - start - 2 * n)
            careful.append(end - start == 2 * n + toy.careful_length(n))
            start = end
    assert len(careful) > 100
    assert all(careful) if step == 1 else 0.3 < np.mean(careful) < 0.8
    assert not np.array_equal(tokens, toy.pretraining_batch(s, step + 1, 42)[0])
    assert np.array_equal(tokens, toy.pretraining_batch(s, step, 42)[0])


# ---- runs ----


def test_the_files_of_a_run(finished):
    assert {"config.json", "metrics.jsonl", "base.pt", "phase1.pt", "ckpt.pt"} == {p.name for p in finished.iterdir()}
    steps = records(finished, "step")
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6]
    assert [r["phase"] for r in steps] == ["internal"] * 3 + ["policy"] * 3
    for r in steps:
        assert {"reward", "policy_entropy", "layer_entropy", "length", "length_ended", "cut_off", "clip_fraction", "grad_norm",
                "groups_right", "groups_wrong", "groups_mixed"} <= r.keys()  # fmt: skip
        assert r["groups_right"] + r["groups_wrong"] + r["groups_mixed"] == pytest.approx(1)
        assert ("layer_log_ratio" in r) == (r["phase"] == "internal")
    assert all(json.loads(line)["seconds"] > 0 for line in (finished / "metrics.jsonl").read_text().splitlines() if '"step"' in line[:20])
    assert [r["step"] for r in records(finished, "eval")] == [0, 4, 6]
    inside = records(finished, "internal")
    assert [r["step"] for r in inside] == [0, 2, 3, 4, 6]
    assert len(inside[0]["layer"]) == len(inside[0]["cos_final"]) == 4 and len(inside[0]["d_mlp"]) == 3
    assert all(r["perplexity"] > 1 for r in inside)


def test_phase_1_trains_the_layers_below_alone(finished):
    base, phase1, final = (torch.load(finished / f, weights_only=True)["model"] for f in ("base.pt", "phase1.pt", "ckpt.pt"))
    for name in base:
        frozen = name.startswith(("blocks.2", "final_norm"))
        assert torch.equal(base[name], phase1[name]) == frozen
        assert not torch.equal(phase1[name], final[name])


def test_moments_are_new_at_the_switch(finished):
    steps = [r["optimizer_steps"] for r in records(finished, "step") if r["phase"] == "policy"]
    state = torch.load(finished / "ckpt.pt", weights_only=True)["optimizer"]["state"]
    assert {int(of["step"]) for of in state.values()} == {sum(steps)} and 0 < sum(steps) <= 6


def test_same_seed_same_run_and_another_seed_another(finished, tmp_path):
    assert run(*TINY, "--out_dir", tmp_path / "again") == 0
    assert_same_run(finished, tmp_path / "again")
    assert run(*TINY, "--out_dir", tmp_path / "other", "--seed", 1, "--steps", 3) == 0
    assert records(finished, "step")[0] != records(tmp_path / "other", "step")[0]


def test_learning_rate_is_constant_and_then_falls_as_1_over_step(finished, tmp_path, monkeypatch):
    rates, step = [], toy.rl_step
    monkeypatch.setattr(toy, "rl_step", lambda s, model, optimizer, *a: rates.append(optimizer.param_groups[0]["lr"]) or step(s, model, optimizer, *a))
    assert run(*TINY, "--base", finished / "base.pt", "--out_dir", tmp_path / "rates") == 0
    assert rates == pytest.approx([5e-4, 5e-4, 5e-4, 5e-4, 5e-4 * 4 / 5, 5e-4 * 4 / 6])


def test_grpo_is_bupo_without_phase_1_and_shares_its_base_and_problems(finished, tmp_path):
    options = [*TINY[: TINY.index("--layer")], "--base", finished / "base.pt"]
    grpo = [a for a in options if a not in ("--s_inter", "3")]
    grpo[grpo.index("--n") + 1 : grpo.index("--n") + 1] = ["3"]
    grpo[grpo.index("--n_layer") + 1 : grpo.index("--n_layer") + 1] = ["3"]
    assert run(*grpo, "--algo", "grpo", "--out_dir", tmp_path / "grpo") == 0
    assert run(*options, "--s_inter", 0, "--out_dir", tmp_path / "bupo0") == 0
    assert_same_run(tmp_path / "grpo", tmp_path / "bupo0")
    assert records(tmp_path / "grpo", "eval")[0] == records(finished, "eval")[0]
    assert records(tmp_path / "grpo", "step")[0]["reward"] == records(finished, "step")[0]["reward"]


def start(*argv):
    return subprocess.Popen([sys.executable, ROOT / "train_toy.py", *map(str, argv)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, process, seconds=60):
    deadline = time.time() + seconds
    while not condition():
        assert process.poll() is None and time.time() < deadline, process.stderr.read()
        time.sleep(0.002)


@pytest.mark.parametrize("moment", ["pretraining", "phase 1", "phase 2"])
def test_killed_and_resumed_is_never_stopped(finished, tmp_path, moment):
    out = tmp_path / "killed"
    metrics = out / "metrics.jsonl"
    mark = {"pretraining": '"kind": "pretrain"', "phase 1": '"kind": "step", "step": 2', "phase 2": '"kind": "step", "step": 5'}[moment]
    process = start(*TINY, "--out_dir", out)
    wait_for(lambda: metrics.exists() and mark in metrics.read_text(), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with open(metrics, "a") as f:
        f.write('{"kind": "step", "st')  # what a kill in the middle of a write leaves
    assert run("--resume", "--out_dir", out) == 0
    assert_same_run(finished, out)


def test_ctrl_c_saves_and_says_how_to_go_on(finished, tmp_path):
    out = tmp_path / "interrupted"
    process = start(*TINY, "--save_every", 100, "--out_dir", out)
    wait_for(lambda: (out / "metrics.jsonl").exists() and '"step": 2' in (out / "metrics.jsonl").read_text(), process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and f"--resume --out_dir {out}" in error and "Traceback" not in error
    assert torch.load(out / "ckpt.pt", weights_only=True)["step"] >= 2
    assert run("--resume", "--out_dir", out) == 0
    assert_same_run(finished, out)


def test_resume_exactly_at_the_phase_switch_and_longer(finished, tmp_path):
    out = tmp_path / "short"
    assert run(*TINY, "--steps", 3, "--out_dir", out) == 0
    assert run("--resume", "--steps", 6, "--out_dir", out) == 0
    assert records(out, "step") == records(finished, "step")
    a, b = (torch.load(d / "ckpt.pt", weights_only=True)["model"] for d in (out, finished))
    assert all(torch.equal(a[k], b[k]) for k in a)
    before = (out / "ckpt.pt").read_bytes()
    assert run("--resume", "--out_dir", out) == 0  # nothing left to do: says the result again
    assert (out / "ckpt.pt").read_bytes() == before


@pytest.mark.parametrize("minibatches", [1, 2])
def test_nan_stops_with_exit_code_1_and_keeps_the_checkpoint(finished, tmp_path, capsys, minibatches):
    """With two mini-batches the second one sees it; with one, the weights of a whole step are broken before anyone looks."""
    out = tmp_path / "nan"
    options = ["--save_every", 1, "--minibatches", minibatches]
    assert run(*TINY, *options, "--base", finished / "base.pt", "--lr", 1e38, "--out_dir", out) == 1
    error = capsys.readouterr().err
    assert "finite" in error and "Traceback" not in error and error.count("\n") == 1
    kept = torch.load(out / "ckpt.pt", weights_only=True)
    assert kept["step"] == 0 and all(torch.isfinite(v).all() for v in kept["model"].values())


def test_bfloat16_run(finished, tmp_path):
    """Products in bfloat16, weights and optimizer in float32. Sampling and update round differently then: their
    log-probabilities of one token differ by far less than the clip allows."""
    assert run(*TINY, "--steps", 3, "--precision", "bfloat16", "--base", finished / "base.pt", "--out_dir", tmp_path / "out") == 0
    state = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    assert {w.dtype for w in state["model"].values()} == {torch.float32}
    model = toy.load_model(finished / "base.pt")
    prompt = torch.tensor(toy.prompts(toy.draw_problems(np.random.default_rng(0), 32, 3)))
    with toy.computing_in("bfloat16", torch.device("cpu")), torch.no_grad():
        assert model.blocks[0].mlp(torch.ones(1, 1, 32)).dtype == torch.bfloat16
        out = model.generate(prompt, 6, eos_id=toy.EOS, layer=2)
        mask = toy.response_mask(out.prompt_len, out.end, out.tokens.shape[1])
        for policy, sampled in ((toy.FULL, out.logprobs), (toy.Policy(2), out.layer_logprobs)):
            gap = (toy.minibupo.token_logprobs(model, out.tokens, mask, policy) - sampled).abs().max()
            assert 0 < gap < 0.1
    assert model.blocks[0].mlp(torch.ones(1, 1, 32)).dtype == torch.float32


def test_default_directories_never_collide(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = [toy.new_directory(toy.Settings(algo=a, seed=s)) for a, s in (("bupo", 0), ("bupo", 0), ("grpo", 0), ("bupo", 7), ("bupo", 0))]
    assert [str(m) for m in made] == [os.path.join("out", d) for d in ("bupo-seed0", "bupo-seed0-2", "grpo-seed0", "bupo-seed7", "bupo-seed0-3")]


def damaged(finished, tmp_path, how):
    path = tmp_path / "damaged.pt"
    content = (finished / "base.pt").read_bytes()
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("hello")
    elif how == "foreign":
        torch.save({"weights": torch.zeros(3)}, path)
    elif how == "list":
        torch.save([1, 2], path)
    else:
        loaded = torch.load(finished / "base.pt", weights_only=True)
        if how == "format":
            loaded["format"] = 99
        if how == "shape":
            loaded["model_config"]["d_model"] = 64
        if how == "vocabulary":
            loaded = {**loaded, "model_config": {**loaded["model_config"], "vocab_size": 17}}
            loaded["model"] = {k: torch.cat([v, v[:1]]) if v.shape[0] == 16 and v.dim() == 2 and v.shape[1] == 32 and "b" not in k.split(".")[0][:1] else v
                               for k, v in loaded["model"].items()}  # fmt: skip
        torch.save(loaded, path)
    return path


@pytest.mark.parametrize("how,says", [
    ("cut", "damaged"), ("empty", "damaged"), ("text", "damaged"), ("foreign", "not a minibupo checkpoint"), ("list", "not a minibupo checkpoint"),
    ("format", "format 99"), ("shape", "do not fit its configuration"), ("vocabulary", "vocabulary of 17 tokens"),
])  # fmt: skip
def test_broken_bases(finished, tmp_path, capsys, how, says):
    assert run(*TINY, "--base", damaged(finished, tmp_path, how), "--out_dir", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("argv,says", [
    (["--steps", "3", "--s_inter", "4"], "s_inter = 4 is more than steps = 3"),
    (["--layer", "0"], r"layer must be auto or in 1..5"), (["--layer", "6"], "not 6"), (["--layer", "-1"], "k is this number less 1"),
    (["--algo", "grpo", "--layer", "2"], "--layer 2 is for phase 1"), (["--s_inter", "0", "--layer", "2"], "--layer 2 is for phase 1"),
    (["--algo", "grpo", "--s_inter", "3"], "--s_inter 3 is for phase 1"),
    (["--max_new_tokens", "19"], "max_new_tokens = 19 cannot hold the longest careful solution of a trained problem (n = 5), which takes 20"),
    (["--group", "1"], "group must be at least 2, not 1"), (["--minibatches", "65"], "minibatches = 65 are more than questions = 64"),
    (["--lr", "0"], "lr must be above 0"), (["--lr", "nan"], "lr must be above 0"), (["--skip", "1.5"], "skip must be in 0..1"),
    (["--n", "2"], "n must be at least 3"), (["--eval_problems", "1001"], "at most 1000"), (["--d_model", "63"], "does not divide d_model"),
    (["--resume"], "--resume needs --out_dir"), (["--resume", "--out_dir", "nowhere"], "holds no run: it has no config.json"),
    (["--base", "nowhere.pt"], "nowhere.pt"),
])  # fmt: skip
def test_impossible_options(argv, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*argv) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("argv,says", [
    (["--algo", "ppo"], "invalid choice: 'ppo'"), (["--device", "tpu"], "invalid choice"), (["--layer", "low"], "invalid layer_number value: 'low'"),
    (["--stepz", "3"], "unrecognized arguments: --stepz"), (["--step", "3"], "unrecognized arguments: --step"), (["--steps", "3.5"], "invalid int value"),
])  # fmt: skip
def test_unknown_options(argv, says, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and says in error and "Traceback" not in error


def test_option_values():
    settings = toy.parse_options(["--lr", "3e-4", "--no-qk_norm", "--max_new_tokens", "25", "--preset", "smoke", "--steps", "30"])[0]
    assert (settings.lr, settings.qk_norm, settings.max_new_tokens, settings.steps) == (3e-4, False, 25, 30)
    assert settings.n_layer == toy.PRESETS["smoke"]["n_layer"] and toy.parse_options(["--qk_norm"])[0].qk_norm
    assert toy.parse_options(["--algo", "grpo", "--steps", "2"])[0].s_inter == 0
    for preset in toy.PRESETS:
        toy.parse_options(["--preset", preset])


def test_the_command_that_is_named_next_is_accepted(finished, capsys):
    assert run("--resume", "--out_dir", finished) == 0
    line = capsys.readouterr().out.strip().splitlines()[-1]
    settings, given, _ = toy.parse_options(line.split()[2:])
    stored = json.loads((finished / "config.json").read_text())
    for name in ("n", "questions", "group", "minibatches", "steps", "seed", "eval_problems", "lr", "threads"):
        assert getattr(settings, name) == stored[name]
    assert settings.algo == "grpo" and given["base"] == str(finished / "base.pt")


def test_help_has_every_option_and_its_default(capsys):
    with pytest.raises(SystemExit):
        run("--help")
    text = " ".join(capsys.readouterr().out.split())
    for f in toy.fields(toy.Settings):
        assert f"--{f.name}" in text and (f.default is None or f"(default: {f.default})" in text)


def test_missing_device(tmp_path, capsys):
    for name, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())):
        if not there:
            assert run("--device", name, "--out_dir", tmp_path / "out") == 2
            assert f"device {name} is not available here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_directories_that_hold_something_else(finished, tmp_path, capsys):
    before = {p: p.read_bytes() for p in finished.iterdir()}
    assert run(*TINY, "--out_dir", finished) == 2
    assert "not empty" in capsys.readouterr().err
    assert run("--resume", "--out_dir", finished, "--seed", 3) == 2
    assert "--seed 3 does not match the run" in capsys.readouterr().err
    assert run("--resume", "--out_dir", finished, "--steps", 5) == 2
    assert "has done 6 steps already" in capsys.readouterr().err
    assert run(*TINY, "--d_model", 48, "--base", finished / "base.pt", "--out_dir", tmp_path / "x") == 2
    assert "--d_model 48 does not match" in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in finished.iterdir()}


@pytest.mark.parametrize("file,content,says", [
    ("ckpt.pt", b"rubbish", "damaged"), ("config.json", b"{", "damaged"), ("config.json", b'{"stepz": 3}', "damaged"), ("metrics.jsonl", b"", "0 bytes"),
])  # fmt: skip
def test_resuming_a_damaged_run(finished, tmp_path, capsys, file, content, says):
    for p in finished.iterdir():
        (tmp_path / p.name).write_bytes(p.read_bytes())
    (tmp_path / file).write_bytes(content)
    assert run("--resume", "--out_dir", tmp_path) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert (tmp_path / file).read_bytes() == content


def test_resuming_a_checkpoint_of_another_run(finished, tmp_path, capsys):
    for p in finished.iterdir():
        (tmp_path / p.name).write_bytes(p.read_bytes())
    other = toy.GPT(toy.GPTConfig(16, 40, n_layer=2))
    toy.save_checkpoint(tmp_path / "ckpt.pt", other, stage="rl", step=2, target=[1, "resid_post"], metrics_bytes=0,
                        optimizer=toy.adamw(other, 1e-3, 0).state_dict())  # fmt: skip
    assert run("--resume", "--out_dir", tmp_path) == 2
    assert "does not fit the model" in capsys.readouterr().err


def test_a_base_that_cannot_be_improved_is_refused_with_the_remedy(tmp_path, capsys):
    options = [a if a != "100" else "0" for a in TINY]
    assert run(*options, "--out_dir", tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert "preflight at n = 3: Pass@1" in captured.out
    assert "--pretrain_until" in captured.err and captured.err.count("\n") == 1


def test_everything_without_a_network_or_a_gpu(tmp_path):
    """The main job with sockets and CUDA calls forbidden, warnings about default encodings as errors, on a cp1252 console."""
    code = ("import socket, sys\ndef refuse(*a, **k): raise OSError('network')\nsocket.socket.connect = refuse\nimport torch\n"
            "torch.cuda.current_device = torch.cuda.synchronize = torch.cuda.init = refuse\nimport train_toy\n"
            f"sys.exit(train_toy.main({[*TINY, '--steps', '3', '--out_dir', str(tmp_path / 'out')]!r}))")  # fmt: skip
    result = subprocess.run([sys.executable, "-X", "warn_default_encoding", "-W", "error::EncodingWarning:train_toy", "-c", code], cwd=ROOT,
                            env={**os.environ, "PYTHONIOENCODING": "cp1252"}, capture_output=True, text=True)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.isascii() and "held-out problems" in result.stdout


def test_smoke_run_learns(tmp_path):
    """The smoke preset's whole path: the share of right answers rises by 10 points at least on every trained tier."""
    assert run("--preset", "smoke", "--threads", 1, "--out_dir", tmp_path / "smoke") == 0
    before, *_, after = records(tmp_path / "smoke", "eval")
    for tier in before["tiers"]:
        if int(tier) <= toy.PRESETS["smoke"]["n"]:
            assert after["tiers"][tier]["avg@8"] > before["tiers"][tier]["avg@8"] + 0.1
