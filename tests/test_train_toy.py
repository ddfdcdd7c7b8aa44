"""train_toy.py: the task against Python's own arithmetic, and the command line as a user meets it.

stopped and resumed = never stopped, bit for bit      same seed = same run
bad input = one sentence, exit code 2, and nothing on disk has changed
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY

import minibupo
import train_toy as toy

ROOT = Path(__file__).parent.parent


def arithmetic(expression):
    """The answer to "7+5*3-2", by a loop over characters."""
    value = int(expression[0])
    for op, digit in zip(expression[1::2], expression[2::2]):
        value = eval(f"{value} {op} {digit}") % 10
    return str(value)


def run(*argv):
    return toy.main([str(a) for a in argv])


def records(run_dir, kind=None):
    """A run's metrics without the seconds."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    lines = [r for r in lines if kind in (None, r["kind"])]
    return [{k: v for k, v in r.items() if k != "seconds"} for r in lines]


def assert_same_run(a, b):
    assert records(a) == records(b)
    a, b = (torch.load(d / "ckpt.pt", weights_only=True) for d in (a, b))
    assert all(torch.equal(v, b["model"][k]) for k, v in a["model"].items())
    assert a["optimizer"].keys() == b["optimizer"].keys()
    for i, state in a["optimizer"].items():
        assert all(torch.equal(v, b["optimizer"][i][k]) for k, v in state.items())


def files(directory):
    return {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def one_sentence(capsys):
    """What was printed on stderr, which is one line."""
    error = capsys.readouterr().err
    assert error.startswith("train_toy.py: ") and error.count("\n") == 1, error
    return error


# ---- tokens and task ----


def test_tokenizer_round_trip():
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices([*toy.CHARACTERS, "<eos>", "<pad>"], k=rng.randrange(20)))
        assert toy.ENCODING.decode(toy.encode(text)) == text
    assert toy.encode("7+5*3-2=4<eos>") == [7, 10, 5, 12, 3, 11, 2, 13, 4, 14]


@pytest.mark.parametrize("text", ["7 + 5=", "7/5=", "x", "7+5=\n", "\u0667+5=", "<eos", "\ud800"])
def test_characters_outside_the_vocabulary_are_named(text):
    with pytest.raises(ValueError, match="character .* is not one of"):
        toy.encode(text)


@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_solutions_against_arithmetic(n):
    """Careful work does one operation a line, sloppy work leaves lines out, and all of it is right."""
    rng = random.Random(n)
    for _ in range(200):
        expression = toy.training_problem(rng, n)
        assert re.fullmatch(r"\d([-+*]\d)*", expression) and len(expression) == 2 * n - 1
        lines = toy.careful(expression)
        assert [len(line) for line in lines] == list(range(2 * n - 1, 0, -2))
        assert {arithmetic(line) for line in lines} == {lines[-1]}
        assert len(toy.encode("=".join(lines[1:]) + "<eos>")) == n * (n - 1)
        assert toy.sloppy(expression, rng, 0.0) == lines
        assert toy.sloppy(expression, rng, 1.0) == [expression, lines[-1]]
        some = toy.sloppy(expression, rng, 0.5)
        assert some == [line for line in lines if line in some]
        assert toy.has_right_steps(expression, "=".join(some[1:]) + "<eos>")


def test_the_example_of_the_docstring():
    assert toy.careful("7+5*3-2") == ["7+5*3-2", "2*3-2", "6-2", "4"]


RIGHT = ["2*3-2=6-2=4<eos>", "6-2=4<eos>", "4<eos>"]
BY_WRONG_STEPS = ["9*9=4<eos>", "2*3-2=5-2=4<eos>", "7+5*3-2=4<eos>", "=4<eos>"]
WRONG = [
    "",
    "4",
    "<eos>",
    "=<eos>",
    "44<eos>",
    "04<eos>",
    "4+<eos>",
    "4=<eos>",
    "5<eos>",
    "4=5<eos>",
]
WRONG += ["4<pad><eos>", "<pad>4<eos>", "4<pad>", "-4<eos>", "2*3-2=6-2=5<eos>", "6-2<eos>"]


def test_verifier_and_steps():
    """A right answer counts however it was reached; has_right_steps tells the two apart."""
    for response in RIGHT + BY_WRONG_STEPS + WRONG:
        assert toy.is_right("7+5*3-2", response) == (response not in WRONG), response
        assert toy.has_right_steps("7+5*3-2", response) == (response in RIGHT), response


@pytest.mark.parametrize("n", [3, 4, 5, 6])
def test_splits_are_disjoint(n):
    """No evaluation problem is trained on: not as a problem, nor as a line of a longer one."""
    evaluation = set(toy.evaluation_problems(random.Random(0), n, 1000))
    assert len(evaluation) == 1000 and all(map(toy.held_out, evaluation))
    rng = random.Random(n)
    met = {line for k in range(n, 8) for _ in range(500) for line in training_lines(rng, k)}
    assert len({line for line in met if len(line) == 2 * n - 1}) > 500 and not met & evaluation


def training_lines(rng, n):
    return toy.careful(toy.training_problem(rng, n))


def test_one_in_eight_is_held_out():
    every = [
        f"{a}{p}{b}{q}{c}"
        for a in "0123456789"
        for b in "0123456789"
        for c in "0123456789"
        for p in "+-*"
        for q in "+-*"
    ]
    assert sum(map(toy.held_out, every)) / len(every) == pytest.approx(1 / 8, abs=0.02)
    assert not any(toy.held_out(f"{a}+{b}") for a in "0123456789" for b in "0123456789")
    for n, count in ((2, 5), (3, 1001)):
        with pytest.raises(ValueError, match="1000 problems"):
            toy.evaluation_problems(random.Random(0), n, count)


def test_questions_are_of_all_sizes_in_random_order():
    sizes = [len(p) // 2 + 1 for p in toy.draw_questions(random.Random(0), 60, 5)]
    assert [sizes.count(k) for k in (3, 4, 5)] == [10, 20, 30] and sizes != sorted(sizes)


def test_streams_differ_in_every_part_of_their_key():
    keys = [
        (seed, purpose, step)
        for seed in (0, 1, 11, 2**32 - 1)
        for purpose in ("a", "b")
        for step in (0, 1, 11)
    ]
    assert len({toy.stream(*key).random() for key in keys}) == len(keys)
    assert len({toy.torch_stream("cpu", *key).initial_seed() for key in keys}) == len(keys)
    assert toy.stream(3, "a", 1).random() == toy.stream(3, "a", 1).random()


@pytest.mark.parametrize("skip", [0.0, 0.5])
def test_pretraining_rows(skip):
    """Rows are whole solutions one after another, the last cut off; their responses are marked."""
    s = toy.Settings()
    tokens, response = toy.pretraining_batch(s, 1, "cpu", skip)
    careful = []
    for row, marked in zip(tokens.tolist(), response.tolist()):
        start = 0
        for end in [i + 1 for i, token in enumerate(row) if token == toy.EOS]:
            problem, _, answer = toy.ENCODING.decode(row[start:end]).partition("=")
            assert toy.has_right_steps(problem, answer)
            prompt = len(problem) + 1
            assert marked[start:end] == [False] * prompt + [True] * (end - start - prompt)
            careful.append(answer.count("=") == len(problem) // 2 - 1)
            start = end
    assert len(careful) > 100
    assert all(careful) if skip == 0 else 0.3 < sum(careful) / len(careful) < 0.8
    assert torch.equal(tokens, toy.pretraining_batch(s, 1, "cpu", skip)[0])
    assert not torch.equal(tokens, toy.pretraining_batch(s, 2, "cpu", skip)[0])


def test_internal_loss_is_the_mean_cross_entropy_of_internal_policies(base):
    model, s = toy.load_model(base), toy.Settings(n=3)
    tokens, response = toy.pretraining_batch(s, 1, "cpu", 0.5)
    plain, both = (toy.pretraining_loss(model, tokens, response, w) for w in (0.0, 0.3))
    losses = []
    for layer in (1, 2, 3):
        logp = minibupo.token_logprobs(model, tokens, response[:, 1:], minibupo.Policy(layer))
        losses.append(-logp.sum() / response.sum())
    torch.testing.assert_close(both - plain, 0.3 * sum(losses) / 3)


def test_evaluation_against_counting_by_hand(base):
    model, s = toy.load_model(base), toy.Settings(n=3)
    found, examples = toy.evaluate(model, s, [3], 20)
    problems = toy.evaluation_problems(toy.stream(0, "evaluation, n 3"), 3, 20)
    generator = toy.torch_stream("cpu", 0, "evaluation responses, n 3")
    texts = toy.attempts(model, s, problems, 8, generator)
    right = [[toy.is_right(p, text) for text in group] for p, group in zip(problems, texts)]
    assert found["3"]["avg@8"] == pytest.approx(sum(map(sum, right)) / 160)
    assert found["3"]["pass@8"] == pytest.approx(sum(map(any, right)) / 20)
    assert found["3"]["mixed"] == pytest.approx(sum(0 < sum(r) < 8 for r in right) / 20)
    assert found["3"]["right_steps"] <= found["3"]["avg@8"]
    assert examples == [[problems[i], texts[i][0]] for i in range(3)]


# ---- runs ----


def test_the_files_of_a_run(finished):
    names = {"config.json", "metrics.jsonl", "base.pt", "phase1.pt", "ckpt.pt"}
    assert names == {p.name for p in finished.iterdir()}
    steps = records(finished, "step")
    assert [r["step"] for r in steps] == list(range(1, 13))
    assert [r["phase"] for r in steps] == ["internal"] * 3 + ["policy"] * 9
    assert [r["step"] for r in records(finished, "internal")] == [0, 3, 5, 10, 12]
    assert [r["step"] for r in records(finished, "eval")] == [0, 12]
    stored = json.loads((finished / "config.json").read_text())
    assert stored["device"] == "cpu" and stored["n_layer"] == 3  # not "auto", and the base's size


def test_phase_1_trains_the_layers_below_alone(finished):
    base, phase1, final = (
        torch.load(finished / f, weights_only=True)["model"]
        for f in ("base.pt", "phase1.pt", "ckpt.pt")
    )
    for name in base:
        frozen = name.startswith(("blocks.2", "final_norm"))
        assert torch.equal(base[name], phase1[name]) == frozen
        assert not torch.equal(phase1[name], final[name])


def test_moments_start_afresh_at_the_switch(finished):
    steps = [r["optimizer_steps"] for r in records(finished, "step") if r["phase"] == "policy"]
    state = torch.load(finished / "ckpt.pt", weights_only=True)["optimizer"]
    assert {int(moments["step"]) for moments in state.values()} == {sum(steps)}


def test_same_seed_same_run_and_another_seed_another(finished, base, tmp_path):
    assert run(*TINY, "--base", base, "--out_dir", tmp_path / "again") == 0
    assert_same_run(finished, tmp_path / "again")
    other = ["--seed", 1, "--steps", 3, "--out_dir", tmp_path / "other"]
    assert run(*TINY, "--base", base, *other) == 0
    assert records(tmp_path / "other", "step")[0] != records(finished, "step")[0]


def test_learning_rate_is_constant_and_then_falls_as_1_over_step(base, tmp_path, monkeypatch):
    rates, update = [], minibupo.update

    def spy(model, optimizer, *args, **options):
        rates.append(optimizer.param_groups[0]["lr"])
        return update(model, optimizer, *args, **options)

    monkeypatch.setattr(minibupo, "update", spy)
    assert run(*TINY, "--base", base, "--steps", 40, "--out_dir", tmp_path / "rates") == 0
    assert rates == pytest.approx([5e-4] * 30 + [5e-4 * 30 / step for step in range(31, 41)])


def test_grpo_is_bupo_without_phase_1_and_meets_the_same_problems(finished, base, tmp_path):
    options = [a for a in TINY if a not in ("--layer", "2", "--s_inter")]
    options.remove("3") if options.count("3") > 1 else None
    plain = "--n 3 --questions 8 --steps 12 --eval_problems 16 --threads 1 --device cpu".split()
    assert run(*plain, "--base", base, "--algo", "grpo", "--out_dir", tmp_path / "grpo") == 0
    assert run(*plain, "--base", base, "--s_inter", 0, "--out_dir", tmp_path / "bupo0") == 0
    assert_same_run(tmp_path / "grpo", tmp_path / "bupo0")
    assert records(tmp_path / "grpo", "eval")[0] == records(finished, "eval")[0]
    assert records(tmp_path / "grpo", "step")[0]["reward"] == records(finished, "step")[0]["reward"]


class Killed(BaseException):
    """Stands in for kill -9: nothing in the program may catch it."""


@pytest.mark.parametrize("write", [1, 2, 3, 4, 9, 11, 12, 27])
def test_killed_at_any_write_and_resumed_is_never_stopped(
    finished, base, tmp_path, monkeypatch, write
):
    """The k-th file of a run is written, but not renamed, when the run dies: config.json, base.pt,
    then ckpt.pt and metrics.jsonl of each step, and phase1.pt before those of step 3."""
    replace, calls = os.replace, []

    def dies(*names):
        calls.append(names)
        if len(calls) == write:
            raise Killed
        replace(*names)

    out = tmp_path / "killed"
    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(Killed):
        run(*TINY, "--base", base, "--out_dir", out)
    monkeypatch.setattr(os, "replace", replace)
    if write == 1:  # there is no run yet
        assert run("--resume", "--out_dir", out) == 2
    else:
        assert run("--resume", "--out_dir", out) == 0
        assert_same_run(finished, out)


def test_really_killed_in_pretraining(tmp_path):
    """SIGKILL in a process of its own; resumed, it begins pretraining again and ends as if never stopped."""
    options = [*TINY, "--n_layer", "3", "--d_model", "32", "--steps", "0", "--s_inter", "0"]
    options = [a for a in options if a not in ("--layer", "2")]
    code = (
        "import os, signal, sys, torch, train_toy as toy\n"
        "pretrain, loss, calls = toy.pretrain, toy.pretraining_loss, []\n"
        "toy.pretrain = lambda s, model, records: pretrain(s, model, records, max_steps=100)\n"
        "def spy(*args):\n"
        "    calls.append(1)\n"
        "    if len(calls) == int(sys.argv[1]): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return loss(*args)\n"
        "toy.pretraining_loss = spy\n"
        "sys.exit(toy.main(sys.argv[2:]))\n"
    )

    def start(kill_at, *argv):
        command = [sys.executable, "-c", code, str(kill_at), *map(str, argv)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert start(70, *options, "--out_dir", tmp_path / "a").returncode == -signal.SIGKILL
    for result in (
        start(-1, "--resume", "--out_dir", tmp_path / "a"),
        start(-1, *options, "--out_dir", tmp_path / "b"),
    ):
        assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_ctrl_c_says_how_to_go_on(finished, base, tmp_path, monkeypatch, capsys):
    out, rollouts = tmp_path / "interrupted", toy.rollouts

    def interrupted(s, model, step):
        if step == 7:
            raise KeyboardInterrupt
        return rollouts(s, model, step)

    monkeypatch.setattr(toy, "rollouts", interrupted)
    assert run(*TINY, "--base", base, "--out_dir", out) == 130
    assert f"--resume --out_dir {out}" in capsys.readouterr().err
    monkeypatch.setattr(toy, "rollouts", rollouts)
    assert run("--resume", "--out_dir", out) == 0
    assert_same_run(finished, out)


def test_resume_at_the_phase_switch_and_for_longer(finished, base, tmp_path):
    out = tmp_path / "short"
    assert run(*TINY, "--base", base, "--steps", 3, "--out_dir", out) == 0
    assert run("--resume", "--steps", 12, "--out_dir", out) == 0
    assert records(out, "step") == records(finished, "step")
    a, b = (torch.load(d / "ckpt.pt", weights_only=True)["model"] for d in (out, finished))
    assert all(torch.equal(a[k], b[k]) for k in a)
    before = (out / "ckpt.pt").read_bytes()
    assert run("--resume", "--out_dir", out) == 0  # nothing left to do: it says the result again
    assert (out / "ckpt.pt").read_bytes() == before


def test_nan_stops_with_exit_code_1_and_keeps_the_checkpoint(base, tmp_path, capsys):
    out = tmp_path / "nan"
    assert run(*TINY, "--base", base, "--lr", "1e6", "--out_dir", out) in (0, 1)
    kept = torch.load(out / "ckpt.pt", weights_only=True)
    assert all(torch.isfinite(v).all() for v in kept["model"].values())
    model = toy.load_model(base)
    with torch.no_grad():
        model.embed.weight[3] = float("nan")
    before = files(out)
    with pytest.raises(FloatingPointError, match="no longer finite"):
        toy.save_checkpoint(out / "ckpt.pt", model)
    with pytest.raises(FloatingPointError, match="step 3 is not finite"):
        toy.add_record([], "step", step=3, reward=float("nan"))
    assert before == files(out)


def test_default_directories_never_collide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [("bupo", 0), ("bupo", 0), ("grpo", 0), ("bupo", 7), ("bupo", 0)]
    settings = [
        toy.Settings(algo=a, seed=seed, s_inter=5 if a == "bupo" else 0) for a, seed in runs
    ]
    names = [toy.new_directory(s).name for s in settings]
    assert names == ["bupo-seed0", "bupo-seed0-2", "grpo-seed0", "bupo-seed7", "bupo-seed0-3"]


# ---- bad input ----


@pytest.mark.parametrize(
    "argv,says",
    [
        (["--steps", "3", "--s_inter", "4"], "s_inter = 4 is more than steps = 3"),
        (["--layer", "0"], "layer must be at least 1"),
        (["--layer", "6"], "layer must be in 1..5"),
        (["--site", "attn_out"], "site attn_out needs a layer"),
        (["--layer", "auto", "--site", "attn_out"], "site attn_out needs a layer"),
        (["--algo", "grpo", "--layer", "2"], "layer is for phase 1"),
        (["--s_inter", "0", "--site", "mlp_out"], "site is for phase 1"),
        (["--algo", "grpo", "--s_inter", "3"], "s_inter = 3 is for phase 1"),
        (["--group", "1"], "group must be at least 2, not 1"),
        (["--lr", "0"], "lr must be at least"),
        (["--lr", "nan"], "lr must be at least"),
        (["--skip", "1.5"], "skip must be at most 1"),
        (["--n", "2"], "n must be at least 3"),
        (["--seed", "4294967296"], "seed must be at most"),
        (["--seed", "-1"], "seed must be at least 0"),
        (["--d_model", "63"], "does not divide d_model"),
        (["--d_model", "66"], "head_dim must be even"),
        (["--resume"], "--resume needs --out_dir"),
        (["--resume", "--out_dir", "nowhere"], "holds no run"),
        (["--base", "nowhere.pt"], "nowhere.pt"),
        (["--base", "."], "directory"),
    ],
)
def test_impossible_options(argv, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*argv) == 2
    assert says in one_sentence(capsys) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "argv",
    [["--algo", "ppo"], ["--layer", "low"], ["--stepz", "3"], ["--step", "3"]],
)
def test_unknown_options(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and argv[-1] in error + "--step 3" and "Traceback" not in error


def test_help_has_every_option(capsys):
    with pytest.raises(SystemExit):
        run("--help")
    text = capsys.readouterr().out
    assert all(f"--{f.name}" in text for f in toy.fields(toy.Settings))


def test_a_device_that_is_not_there(tmp_path, capsys):
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    for name in there:
        if not there[name]:
            assert run("--device", name, "--out_dir", tmp_path / "out") == 2
            assert f"device {name} is not available here" in one_sentence(capsys)
    assert toy.pick_device("auto").type == (
        "cuda" if there["cuda"] else "cpu"
    )  # mps only on request
    assert not (tmp_path / "out").exists()


def test_what_is_refused_changes_nothing(finished, base, tmp_path, capsys):
    before = files(finished)
    cases = [
        ([*TINY, "--base", base, "--out_dir", finished], "not empty"),
        (["--resume", "--out_dir", finished, "--seed", 3], "--seed 3 does not match"),
        (["--resume", "--out_dir", finished, "--steps", 5], "has done 12 steps"),
        (
            [*TINY, "--d_model", 48, "--base", base, "--out_dir", tmp_path / "x"],
            "--d_model 48 does not",
        ),
    ]
    for argv, says in cases:
        assert run(*argv) == 2
        assert says in one_sentence(capsys)
    assert before == files(finished) and not (tmp_path / "x").exists()


SPOILED = [1, -1.5, "text", None, [], {}, [1, "x"], {"a": None}]


def spoil_json(path, rng):
    """One value of config.json or of one line of metrics.jsonl becomes another; says which."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    i = rng.randrange(len(lines))
    content = json.loads(lines[i])
    key = rng.choice(list(content))
    content[key] = rng.choice(SPOILED)
    lines[i] = json.dumps(content)
    path.write_text("\n".join(lines) + "\n")
    return f"{path.name} {key} {content[key]!r}"


def spoil_checkpoint(path, rng):
    """The same for a checkpoint, down to its moments."""
    content = torch.load(path, weights_only=True)
    inside, key = content, rng.choice(list(content))
    while isinstance(inside[key], dict) and inside[key] and rng.random() < 0.7:
        inside, key = inside[key], rng.choice(list(inside[key]))
    inside[key] = rng.choice([*SPOILED, torch.zeros(3), torch.zeros(2, 2)])
    torch.save(content, path)
    return f"{path.name} {key} {inside[key]!r}"


@pytest.mark.parametrize("seed", range(40))
def test_spoiled_files_are_a_sentence_or_harmless(finished, tmp_path, capsys, seed):
    """Whatever is changed in a file of a run: no traceback, and what is refused changes nothing."""
    out, rng = tmp_path / "run", random.Random(seed)
    shutil.copytree(finished, out)
    name = ["config.json", "metrics.jsonl", "ckpt.pt", "base.pt"][seed % 4]
    what = (spoil_checkpoint if name.endswith(".pt") else spoil_json)(out / name, rng)
    before = files(out)
    code = run("--resume", "--out_dir", out)
    assert code in (0, 2), what
    if code == 2:
        assert str(out) in one_sentence(capsys) or name == "config.json", what
        assert before == files(out), what


@pytest.mark.parametrize("name", ["ckpt.pt", "base.pt", "config.json"])
@pytest.mark.parametrize("content", [b"", b"rubbish", b"{}", None])
def test_damaged_and_missing_files(finished, tmp_path, capsys, name, content):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / name).unlink() if content is None else (out / name).write_bytes(content)
    before = files(out)
    assert run("--resume", "--out_dir", out) == 2
    assert str(out) in one_sentence(capsys) and before == files(out)


def test_moments_of_another_shape_are_refused(finished, tmp_path, capsys):
    """The fused step would end the interpreter on them."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    content = torch.load(out / "ckpt.pt", weights_only=True)
    content["optimizer"][0]["exp_avg"] = torch.zeros(3)
    torch.save(content, out / "ckpt.pt")
    assert run("--resume", "--out_dir", out) == 2
    assert "another shape" in one_sentence(capsys)


def test_a_bug_keeps_its_traceback(base, tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "rollouts", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(*TINY, "--base", base, "--out_dir", tmp_path / "out")


def test_a_base_that_cannot_be_improved_is_refused_with_the_remedy(tmp_path, monkeypatch, capsys):
    model = toy.GPT(toy.Settings(n=3, n_layer=3, d_model=32).model_config())  # knows nothing
    toy.save_checkpoint(tmp_path / "base.pt", model)
    monkeypatch.setattr(toy, "is_right", lambda *_: False)
    assert run(*TINY, "--base", tmp_path / "base.pt", "--out_dir", tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert "of single operations right" in captured.out and "preflight" in captured.out
    assert "mixed outcomes" in captured.err and "--seed" in captured.err


def test_where_the_rule_names_no_layer_the_command_that_goes_on_is_said(
    base, tmp_path, monkeypatch, capsys
):
    inside = toy.means_inside
    monkeypatch.setattr(toy, "means_inside", lambda *a: inside(*a) | {"d_mlp": [-0.1, -0.2, 0.3]})
    options = [a for a in TINY if a not in ("--layer", "2")]
    assert run(*options, "--base", base, "--out_dir", tmp_path / "out") == 2
    says = one_sentence(capsys)
    assert f"python train_toy.py --base {tmp_path / 'out' / 'base.pt'} --layer N" in says
    argv = says.split("train_toy.py --base")[1].replace("N", "2").split()
    assert run(*options, "--base", *argv, "--out_dir", tmp_path / "next") == 0


def test_everything_without_a_network_or_a_gpu(base, tmp_path):
    """Sockets and CUDA calls forbidden, default encodings an error, on a cp1252 console."""
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise OSError('network')\n"
        "socket.socket.connect = refuse\n"
        "import torch\n"
        "torch.cuda.current_device = torch.cuda.synchronize = torch.cuda.init = refuse\n"
        "import train_toy\n"
        f"sys.exit(train_toy.main({[*TINY, '--base', str(base), '--out_dir', str(tmp_path / 'out')]!r}))"
    )
    flags = ["-X", "warn_default_encoding", "-W", "error::EncodingWarning:train_toy"]
    env = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    command = [sys.executable, *flags, "-c", code]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.isascii() and "held-out problems" in result.stdout


def test_smoke_run_learns(tmp_path):
    """From nothing to the table: right answers rise by 10 points or more at the trained length."""
    assert run("--preset", "smoke", "--threads", 1, "--out_dir", tmp_path / "smoke") == 0
    before, *_, after = records(tmp_path / "smoke", "eval")
    assert after["tiers"]["3"]["avg@8"] > before["tiers"]["3"]["avg@8"] + 0.1
