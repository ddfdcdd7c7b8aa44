"""train_toy.py: the task against Python's own arithmetic, and the command line as a user meets it.

A run that was stopped and resumed equals one that never stopped, bit for bit; another seed is
another run; invalid input gives one sentence and exit code 2, and nothing on disk has changed.
"""

import errno
import json
import math
import operator
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NO_PHASE_1, TINY

import minibupo
import train_toy as toy

COURSE_BASE = Path(toy.__file__).parent / "course" / "base.pt"


def arithmetic(expression):
    """The answer to "7+5*3-2", computed by a loop over characters."""
    value = int(expression[0])
    for op, digit in zip(expression[1::2], expression[2::2]):
        value = eval(f"{value} {op} {digit}") % 10
    return str(value)


def run(*argv):
    return toy.main([str(a) for a in argv])


def weights(out, name="ckpt.pt"):
    return torch.load(out / name, weights_only=True)["model"]


def assert_same_run(a, b):
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    a, b = (torch.load(d / "ckpt.pt", weights_only=True) for d in (a, b))
    for part in ("model", "optimizer"):
        torch.testing.assert_close(a[part], b[part], rtol=0, atol=0)


def files(directory):
    return {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def one_sentence(capsys):
    """Return what was printed on stderr, which must be one line."""
    error = capsys.readouterr().err
    assert error.startswith("train_toy.py: ") and error.count("\n") == 1, error
    return error


def use_operators(monkeypatch, operators):
    """Replace OPERATORS as a teacher does in the file, with what follows from them."""
    characters = "0123456789" + "".join(operators) + "="
    monkeypatch.setattr(toy, "OPERATORS", operators)
    monkeypatch.setattr(toy, "CHARACTERS", characters)
    monkeypatch.setattr(toy, "VOCAB_SIZE", len(characters) + 2)


# ---- tokens and task ----


def test_tokenizer_round_trip():
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices([*toy.CHARACTERS, "<eos>", "<pad>"], k=rng.randrange(20)))
        assert toy.ENCODING.decode(toy.encode(text)) == text
    assert toy.encode("7+5*3-2=4<eos>") == [7, 10, 5, 12, 3, 11, 2, 13, 4, 14]


@pytest.mark.parametrize("text", ["7 + 5=", "7/5=", "x", "7+5=\n", "\u0667+5=", "<eos", "\ud800"])
def test_characters_outside_the_vocabulary_are_refused(text):
    with pytest.raises(ValueError, match="character"):
        toy.encode(text)


@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_solutions_against_arithmetic(n):
    """Careful work does one operation per line, sloppy work leaves lines out, all are correct."""
    assert toy.careful("7+5*3-2") == ["7+5*3-2", "2*3-2", "6-2", "4"]
    rng = random.Random(n)
    for _ in range(200):
        expression = toy.training_problem(rng, n)
        assert re.fullmatch(r"\d([-+*]\d)*", expression) and len(expression) == 2 * n - 1
        lines = toy.careful(expression)
        assert [len(line) for line in lines] == list(range(2 * n - 1, 0, -2))
        assert {arithmetic(line) for line in lines} == {lines[-1]}
        assert len(toy.encode("=".join(lines[1:]) + "<eos>")) == toy.longest_response(n)
        assert toy.sloppy(expression, rng, 0.0) == lines
        assert toy.sloppy(expression, rng, 1.0) == [expression, lines[-1]]
        some = toy.sloppy(expression, rng, 0.5)
        assert some == [line for line in lines if line in some]
        assert toy.has_correct_lines(expression, "=".join(some[1:]) + "<eos>")


CORRECT = "2*3-2=6-2=4<eos> 6-2=4<eos> 4<eos>".split()
BY_INCORRECT_LINES = "9*9=4<eos> 2*3-2=5-2=4<eos> 7+5*3-2=4<eos> =4<eos>".split()
INCORRECT = "4 <eos> =<eos> 44<eos> 04<eos> 4+<eos> 4=<eos> 5<eos> 4=5<eos> 4<pad><eos>".split()
INCORRECT += ["", *"<pad>4<eos> 4<pad> -4<eos> 2*3-2=6-2=5<eos> 6-2<eos>".split()]


def test_verifier_and_steps():
    """A correct answer counts however it was reached; has_correct_lines tells the two apart."""
    for response in CORRECT + BY_INCORRECT_LINES + INCORRECT:
        assert toy.is_correct("7+5*3-2", response) == (response not in INCORRECT), response
        assert toy.has_correct_lines("7+5*3-2", response) == (response in CORRECT), response


@pytest.mark.parametrize("n", [3, 4, 5, 6])
def test_splits_are_disjoint(n):
    """No evaluation problem is trained on: neither as a problem nor as a line of a longer one."""
    evaluation = set(toy.evaluation_problems(random.Random(0), n, 1000))
    assert len(evaluation) == 1000 and all(map(toy.held_out, evaluation))
    rng = random.Random(n)
    met = set()
    for k in list(range(n, 8)) * 500:
        lines = toy.careful(toy.training_problem(rng, k))
        met |= {line for line in lines if len(line) == 2 * n - 1}
    assert len(met) > 500 and not met & evaluation


def test_one_in_eight_is_held_out():
    digits = "0123456789"
    every = ["".join(parts) for parts in product(digits, "+-*", digits, "+-*", digits)]
    # 1063 of 9,000, for ever: the base models that exist were trained on the others
    assert sum(map(toy.held_out, every)) == 1063
    assert not any(toy.held_out(f"{a}+{b}") for a in digits for b in digits)
    for n, count in ((2, 5), (3, 1001)):
        with pytest.raises(ValueError):
            toy.evaluation_problems(random.Random(0), n, count)


def test_questions_are_of_all_sizes_in_random_order():
    sizes = [len(p) // 2 + 1 for p in toy.draw_questions(random.Random(0), 60, 5)]
    assert [sizes.count(k) for k in (3, 4, 5)] == [10, 20, 30] and sizes != sorted(sizes)


def test_random_numbers_differ_in_every_part_of_their_key():
    keys = list(product((0, 1, 11, 2**32 - 1), ("a", "b"), (0, 1, 11)))
    assert len({toy.rng_for(*key).random() for key in keys}) == len(keys)
    assert len({toy.torch_rng_for("cpu", *key).initial_seed() for key in keys}) == len(keys)
    assert toy.rng_for(3, "a", 1).random() == toy.rng_for(3, "a", 1).random()


UNUSABLE = {
    "no operator": ({}, "at least one operator"),
    "a sign of two characters": ({"//": operator.floordiv}, "'//'"),
    "an empty sign": ({"": operator.add}, "''"),
    "a digit": ({"+": operator.add, "7": operator.add}, "'7'"),
    "the equals sign": ({"=": operator.eq}, "'='"),
    "division by zero": ({"/": operator.floordiv}, "0/0"),
    "fractions": ({"/": lambda a, b: a / (b or 1)}, "0.0 for 0/0"),
    "whole numbers as floats": ({"+": lambda a, b: float(a + b)}, "0.0 for 0+0"),
    "one pair without a result": ({"+": lambda a, b: {0: 1}[a // 9 * b // 9]}, "9+9"),
    "nothing": ({"+": lambda a, b: None}, "0+0"),
    "too few problems for the base": ({"+": operator.add}, "103 held-out problems of n = 3"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_operators_that_the_task_cannot_use_are_refused(case, tmp_path, monkeypatch, capsys):
    operators, says = UNUSABLE[case]
    use_operators(monkeypatch, operators)
    assert run("--preset", "smoke", "--out_dir", tmp_path / "out") == 2
    sentence = one_sentence(capsys)
    assert says in sentence and "OPERATORS" in sentence and not list(tmp_path.iterdir())
    with pytest.raises(ValueError):
        toy.Settings(n=3)


def test_an_operator_that_is_no_text_is_refused_in_a_sentence(monkeypatch):
    module = types.ModuleType("toy_with_a_number")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    source = Path(toy.__file__).read_text(encoding="utf-8")
    exec(source.replace("OPERATORS = {", "OPERATORS = {1: operator.add, "), module.__dict__)
    with pytest.raises(ValueError, match="OPERATORS must be single characters .*, not 1$"):
        module.Settings()


def test_evaluation_has_every_held_out_problem_but_no_more(monkeypatch):
    """With two operators there are fewer than 600 of 3 digits; the last of them is found, too."""
    use_operators(monkeypatch, {"+": operator.add, "&": operator.and_})
    digits = "0123456789"
    every = map("".join, product(digits, "+&", digits, "+&", digits))
    wanted = set(filter(toy.held_out, every))
    assert set(toy.evaluation_problems(random.Random(0), 3, len(wanted))) == wanted
    for count in (len(wanted) + 1, 600):
        with pytest.raises(ValueError, match=f"only {len(wanted)} held-out"):
            toy.evaluation_problems(random.Random(0), 3, count)


def test_negative_results_and_any_sign_are_fine(monkeypatch):
    use_operators(
        monkeypatch,
        {"÷": lambda a, b: a // (b or 1), "<": lambda a, b: a < b, "-": lambda a, b: a - 100 * b},
    )
    assert toy.careful("7÷2<5-3") == ["7÷2<5-3", "3<5-3", "1-3", "1"]
    assert len(toy.single_results()) == 300 and "0-9=0" in toy.single_results()
    toy.Settings()


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
            assert toy.has_correct_lines(problem, answer)
            prompt = len(problem) + 1
            assert marked[start:end] == [False] * prompt + [True] * (end - start - prompt)
            careful.append(answer.count("=") == len(problem) // 2 - 1)
            start = end
    assert len(careful) > 100 and tokens.shape[1] <= 2 * (s.n + 1) + s.response_limit
    assert len({row.index(toy.CHARACTERS.index("=")) for row in tokens.tolist()}) == s.n - 1
    assert all(careful) if skip == 0 else 0.3 < sum(careful) / len(careful) < 0.8
    assert torch.equal(tokens, toy.pretraining_batch(s, 1, "cpu", skip)[0])
    assert not torch.equal(tokens, toy.pretraining_batch(s, 2, "cpu", skip)[0])


def test_internal_loss_is_the_mean_cross_entropy_of_internal_policies(base):
    model = toy.load_model(base)
    tokens, response = toy.pretraining_batch(toy.Settings(n=3), 1, "cpu", 0.5)
    plain, both = (toy.pretraining_loss(model, tokens, response, w) for w in (0.0, 0.3))
    losses = []
    for layer in (1, 2, 3):
        logp = minibupo.token_logprobs(model, tokens, response[:, 1:], minibupo.Policy(layer))
        losses.append(-logp.sum() / response.sum())
    torch.testing.assert_close(both - plain, 0.3 * sum(losses) / 3)


def test_evaluation_against_counting_by_hand(base):
    """With 8 responses to each of 140 problems, which is more than are sampled at a time."""
    model = toy.load_model(base)
    s = toy.Settings(n=3)
    found, examples = toy.evaluate(model, s, [3], 140)
    problems = toy.evaluation_problems(toy.rng_for(0, "evaluation, n 3"), 3, 140)
    generator = toy.torch_rng_for("cpu", 0, "evaluation responses, n 3")
    texts = toy.sample_texts(model, s, problems, 8, generator)
    correct = [[toy.is_correct(p, text) for text in group] for p, group in zip(problems, texts)]
    shares = [sum(group) / 8 for group in correct]
    every = sum(texts, [])
    for name in ("avg@8", "pass@1"):
        assert found["3"][name] == pytest.approx(np.mean(shares))
    assert found["3"]["avg@8_se"] == pytest.approx(np.std(shares, ddof=1) / 140**0.5)
    assert found["3"]["pass@8"] == pytest.approx(sum(map(any, correct)) / 140)
    assert found["3"]["mixed"] == pytest.approx(sum(0 < share < 1 for share in shares) / 140)
    assert found["3"]["unfinished"] == sum("<eos>" not in text for text in every) / 1120
    assert found["3"]["length"] == sum(len(toy.encode(text)) for text in every) / 1120
    assert found["3"]["correct_lines"] <= found["3"]["avg@8"]
    assert examples == [[problems[i], texts[i][0]] for i in range(3)]


@torch.no_grad()
def test_log_of_a_step_against_counting_by_hand(base):
    model = toy.load_model(base)
    target = minibupo.Policy(1)
    batch = toy.rollouts(toy.Settings(n=3, questions=16), model, step=1)
    log = toy.describe(model, batch, target)
    correct = batch.rewards.tolist()
    assert log["reward"] == pytest.approx(sum(map(sum, correct)) / 128)
    assert log["groups_all_correct"] == sum(map(all, correct)) / 16
    assert log["groups_all_incorrect"] == sum(not any(group) for group in correct) / 16
    texts = toy.response_texts(batch)
    assert log["length"] == pytest.approx(sum(len(toy.encode(text)) for text in texts) / 128)
    assert log["unfinished"] == sum(not text.endswith("<eos>") for text in texts) / 128
    first = toy.Rollouts(*(x[::8] for x in batch[:3]), batch.rewards)
    mask = minibupo.response_mask(first.prompt_len, first.end, first.tokens.shape[1])
    inner = minibupo.token_logprobs(model, first.tokens, mask, target)
    full = minibupo.token_logprobs(model, first.tokens, mask)
    inside = toy.means_inside(model, first.tokens, mask)
    assert log["layer_log_ratio"] == pytest.approx(float((inner - full)[mask].mean()), rel=1e-4)
    assert log["policy_entropy"] == pytest.approx(inside["layer_normed"][-1], rel=1e-4)
    assert log["layer_entropy"] == pytest.approx(inside["layer"][1], rel=1e-4)
    assert inside["perplexity"] == pytest.approx(math.exp(-full[mask].mean()), rel=1e-4)


# ---- runs ----


def test_the_files_of_a_run(finished):
    names = {"config.json", "metrics.jsonl", "base.pt", "phase1.pt", "ckpt.pt"}
    assert names == {p.name for p in finished.iterdir()}
    steps = toy.read_metrics(finished, "step")
    assert [r["step"] for r in steps] == list(range(1, 13))
    assert [r["phase"] for r in steps] == [1] * 3 + [2] * 9
    assert all(r["layer_log_ratio"] != 0 for r in steps)  # of layer 2, in both phases
    assert [r["step"] for r in toy.read_metrics(finished, "internal")] == [0, 3, 5, 10, 12]
    assert [r["step"] for r in toy.read_metrics(finished, "eval")] == [0, 12]
    stored = json.loads((finished / "config.json").read_text())
    assert stored["device"] == "cpu" and stored["n_layer"] == 3  # not "auto", and the base's size
    base, phase1, final = (weights(finished, f) for f in ("base.pt", "phase1.pt", "ckpt.pt"))
    for name in base:  # of phase 1 at layer 2, which moves nothing above
        frozen = name.startswith(("blocks.2", "final_norm"))
        assert torch.equal(base[name], phase1[name]) == frozen
        assert not torch.equal(phase1[name], final[name])


def test_another_seed_is_another_run(finished, base, copied, tmp_path, capsys):
    """A run is not resumed from files of another, although the sizes are the same."""
    out = tmp_path / "a run's"  # a shell needs quotes for this name
    options = ["--seed", 1, "--steps", 3, "--device", "auto"]
    assert run(*TINY, "--base", base, *options, "--out_dir", out) == 0
    assert toy.read_settings(out).device in ("cpu", "cuda")  # what auto was
    assert toy.read_metrics(out, "step")[0] != toy.read_metrics(finished, "step")[0]
    printed = capsys.readouterr().out
    assert shlex.split(printed.split("policies: ")[1]) == ["python", "analyze.py", "all", str(out)]
    # the table of internal entropies, without H^0
    inside = toy.read_metrics(out, "internal")[0]
    table = re.findall(r"^ +\d((?: +-?\d+\.\d\d){2})(.*)$", printed, re.M)
    assert [mark for _, mark in table] == ["", "  <- target", ""]
    for l, (row, _) in enumerate(table, 1):
        values = [inside["layer"][l], inside["dH_mlp"][l - 1]]
        assert [float(x) for x in row.split()] == pytest.approx(values, abs=0.006)
    for name in ("base.pt", "ckpt.pt"):
        shutil.copy(out / name, copied)
        before = files(copied)
        assert run("--resume", "--out_dir", copied) == 2
        sentence = one_sentence(capsys)
        assert name in sentence and "its run has seed 1, but config.json has 0" in sentence
        assert files(copied) == before
        shutil.copy(finished / name, copied)


def test_learning_rate_is_constant_and_then_falls_as_1_over_step(base, tmp_path, monkeypatch):
    rates = []

    def update(model, optimizer, *_, **__):
        rates.append(optimizer.param_groups[0]["lr"])
        return {}

    monkeypatch.setattr(minibupo, "update", update)
    assert run(*TINY, "--base", base, "--steps", 40, "--out_dir", tmp_path / "rates") == 0
    assert rates == pytest.approx([5e-4] * 30 + [5e-4 * 30 / step for step in range(31, 41)])
    evals = toy.read_metrics(tmp_path / "rates", "eval")
    assert [(r["step"], r["problems"]) for r in evals] == [(0, 16), (30, 4), (40, 16)]


def test_grpo_is_bupo_without_phase_1_and_meets_the_same_problems(finished, base, tmp_path):
    assert run(*NO_PHASE_1, "--base", base, "--algo", "grpo", "--out_dir", tmp_path / "grpo") == 0
    assert run(*NO_PHASE_1, "--base", base, "--s_inter", 0, "--out_dir", tmp_path / "bupo0") == 0
    assert_same_run(tmp_path / "grpo", tmp_path / "bupo0")
    assert toy.read_metrics(tmp_path / "grpo", "eval")[0] == toy.read_metrics(finished, "eval")[0]
    first, wanted = (toy.read_metrics(path, "step")[0] for path in (tmp_path / "grpo", finished))
    assert first["reward"] == wanted["reward"]


class Killed(BaseException):
    """Stands in for kill -9: nothing in the program may catch it."""


@pytest.mark.parametrize("write", [1, 2, 3, 4, 9, 10, 12, 18, 28, 29])
def test_stopped_at_any_write_and_resumed_is_never_stopped(
    finished, base, tmp_path, monkeypatch, capsys, write
):
    """The k-th file of a run is written, but not renamed, when the run dies (the 18th time by
    Ctrl-C): config.json, base.pt, then ckpt.pt and metrics.jsonl of each step, and phase1.pt."""
    replace = os.replace
    calls = []
    out = tmp_path / "it's stopped"

    def dies(*names):
        calls.append(names)
        if len(calls) == write:
            raise KeyboardInterrupt if write == 18 else Killed
        replace(*names)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        try:
            assert run(*TINY, "--base", base, "--out_dir", out) == 130
            printed = capsys.readouterr().err.split("to continue: ")[1]
            words = ["python", "train_toy.py", "--resume", "--out_dir", str(out)]
            assert shlex.split(printed) == words
        except Killed:
            assert write != 18
    assert len(calls) == write
    if write == 1:  # there is no run yet
        assert run("--resume", "--out_dir", out) == 2
    else:
        assert run("--resume", "--out_dir", out) == 0
        assert_same_run(finished, out)


def test_killed_after_pretraining_a_run_begins_again(tmp_path, monkeypatch):
    pretrain = toy.pretrain
    monkeypatch.setattr(toy, "pretrain", lambda *args: pretrain(*args, max_steps=50))
    options = [*NO_PHASE_1, *"--n_layer 2 --d_model 32 --steps 0 --s_inter 0".split()]
    assert run(*options, "--out_dir", tmp_path / "whole") == 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(toy, "own_solutions", lambda *_: (_ for _ in ()).throw(Killed))
        run(*options, "--out_dir", tmp_path / "killed")
    assert run("--resume", "--out_dir", tmp_path / "killed") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_resume_at_the_phase_switch_and_for_longer(finished, base, tmp_path):
    out = tmp_path / "short"
    assert run(*TINY, "--base", base, "--steps", 3, "--out_dir", out) == 0
    assert run("--resume", "--steps", 12, "--out_dir", out) == 0
    assert run("--resume", "--out_dir", out) == 0  # nothing is left to do
    assert toy.read_metrics(out, "step") == toy.read_metrics(finished, "step")
    assert all(torch.equal(v, weights(finished)[k]) for k, v in weights(out).items())


def test_a_run_is_resumed_on_another_device(finished, copied, capsys):
    """What a run on a GPU leaves behind, on a machine without this GPU."""
    stored = json.loads((copied / "config.json").read_text())
    missing = "mps" if torch.cuda.is_available() else "cuda"
    (copied / "config.json").write_text(json.dumps(stored | {"device": missing}))
    assert run("--resume", "--out_dir", copied) == 2
    assert f"{missing} is not available here; --device cpu is" in one_sentence(capsys)
    assert run("--resume", "--out_dir", copied, "--device", "cpu") == 0
    assert_same_run(finished, copied)
    assert toy.read_settings(copied).device == "cpu"


@pytest.mark.parametrize("value", [math.nan, [-math.inf], {"a": np.inf}])
def test_nan_stops_with_exit_code_1_and_is_never_written(
    base, tmp_path, monkeypatch, capsys, value
):
    monkeypatch.setattr(toy, "describe", lambda *_: {"reward": value})
    assert run(*TINY, "--base", base, "--out_dir", tmp_path / "out") == 1
    assert "step 1" in one_sentence(capsys)
    assert not toy.read_metrics(tmp_path / "out", "step")
    model = toy.load_model(base)
    before = files(tmp_path)
    torch.nn.init.constant_(model.embed.weight[3], math.nan)
    with pytest.raises(FloatingPointError):
        toy.save_checkpoint(tmp_path / "out" / "ckpt.pt", model)
    assert before == files(tmp_path)


def test_a_text_that_looks_like_nan_is_no_nan():
    records = []
    toy.add_record(records, "eval", step=1, examples=["NaN", "Infinity"])
    assert records == [{"kind": "eval", "step": 1, "examples": ["NaN", "Infinity"]}]


def test_default_directories_never_collide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [("bupo", 0), ("bupo", 0), ("grpo", 0), ("bupo", 7), ("bupo", 0)]
    settings = [toy.Settings(algo=algo, seed=seed, s_inter=0) for algo, seed in runs]
    names = [toy.new_directory(s).name for s in settings]
    assert names == ["bupo-seed0", "bupo-seed0-2", "grpo-seed0", "bupo-seed7", "bupo-seed0-3"]


def test_runs_that_start_at_the_same_time_get_directories_of_their_own(tmp_path, monkeypatch):
    """All 8 see that the first name is free before any of them makes it."""
    monkeypatch.chdir(tmp_path)
    mkdir = Path.mkdir
    everybody = threading.Barrier(8)

    def mkdir_at_the_same_time(path, *args, **options):
        if path.name == "bupo-seed0":
            everybody.wait(60)
        mkdir(path, *args, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir_at_the_same_time)
    with ThreadPoolExecutor(8) as pool:
        names = {path.name for path in pool.map(toy.new_directory, [toy.Settings()] * 8)}
    assert names == {"bupo-seed0", *(f"bupo-seed0-{i}" for i in range(2, 9))}


def test_two_processes_write_one_file(tmp_path, monkeypatch):
    """The second writes while the first has not finished: the file is whole at every moment."""
    path = tmp_path / "a"

    def first(temporary):
        temporary.write_text("of the")
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: -1)
            toy.write_text(path, "of the second")
        assert path.read_text() == "of the second"
        temporary.write_text(temporary.read_text() + " first")

    toy.write_atomically(path, first)
    assert path.read_text() == "of the first" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_one_sentence_and_the_run_can_be_resumed(finished, base, tmp_path, capsys):
    """A limit on the size of files stands in for it. It lets through config.json, but no model."""
    resource = pytest.importorskip("resource", reason="Windows has no such limit")
    out = tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        assert run(*TINY, "--base", base, "--out_dir", out) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    sentence = one_sentence(capsys)
    assert sentence.endswith(f"base.pt could not be written: {os.strerror(errno.EFBIG)}\n")
    assert [p.name for p in out.iterdir()] == ["config.json"]
    assert run("--resume", "--out_dir", out) == 0
    assert_same_run(finished, out)


class Closed:
    """A stream that was closed."""

    closed = True

    def isatty(self):
        raise ValueError("I/O operation on closed file")


@pytest.mark.parametrize("stream", [None, Closed()])
def test_a_run_needs_neither_stdout_nor_stderr(base, tmp_path, monkeypatch, stream):
    """As after `>&- 2>&-` or in a program without a console."""
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    out = tmp_path / "out"
    assert run(*TINY, "--base", base, "--steps", 5, "--out_dir", out) == 0
    assert run("--resume", "--out_dir", out, "--seed", 1) == 2
    assert len(toy.read_metrics(out, "step")) == 5


# ---- checkpoints ----


def test_a_compiled_model_is_saved_as_any_other(base, tmp_path):
    model = toy.load_model(base)
    expected = weights(base.parent, base.name)
    toy.save_checkpoint(tmp_path / "whole.pt", torch.compile(model))
    model.blocks[1] = torch.compile(model.blocks[1])
    toy.save_checkpoint(tmp_path / "block.pt", model)
    for name in ("whole.pt", "block.pt"):
        found = toy.load_model(tmp_path / name).state_dict()
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def change_operator(monkeypatch):
    monkeypatch.setitem(toy.OPERATORS, "*", operator.pow)
    return "0*0=0", "0*0=1"


def reorder_operators(monkeypatch):
    use_operators(monkeypatch, dict(reversed(toy.OPERATORS.items())))
    return "0123456789+-*=", "0123456789*-+="


def replace_operator(monkeypatch):
    use_operators(monkeypatch, toy.OPERATORS | {"*": operator.mul, "^": operator.xor})
    return "0123456789+-*=", "0123456789+-*^="


@pytest.mark.parametrize("change", [change_operator, reorder_operators, replace_operator])
def test_a_checkpoint_of_another_task_is_refused(
    finished, base, tmp_path, capsys, monkeypatch, change
):
    """Also if the number of characters is the same; the sentence names both tasks."""
    assert toy.load_model(COURSE_BASE).vocab_size == 16  # from before files named their characters
    before = files(finished)
    then, now = change(monkeypatch)
    for argv in (
        ["--resume", "--out_dir", finished],
        [*TINY, "--base", base, "--out_dir", tmp_path / "x"],
    ):
        assert run(*argv) == 2
        sentence = one_sentence(capsys)
        assert then in sentence and now in sentence
    if change != change_operator:
        with pytest.raises(ValueError, match="characters"):
            toy.load_model(COURSE_BASE)
    assert files(finished) == before and not list(tmp_path.iterdir())


# ---- invalid input ----

INVALID = """--steps 3 --s_inter 4, --layer 0, --layer 6, --site attn_out, --group 1, --lr 0
--lr nan, --lr inf, --internal_loss inf
--layer auto --site attn_out, --algo grpo --layer 2, --s_inter 0 --site mlp_out, --skip 1.5, --n 2
--algo grpo --s_inter 3, --seed 4294967296, --seed -1, --base nowhere.pt, --base .
--d_model 63, --d_model 62, --d_model 2
--questions 3, --n 13, --n_layer 1, --internal_loss -1, --eval_problems 1
--eval_problems 1001, --threads 0, --threads 100000, --resume --out_dir nowhere, --device cud, --resume --steps 3"""


@pytest.mark.parametrize("argv", re.split(", |\n", INVALID))
def test_invalid_options(argv, tmp_path, monkeypatch, capsys):
    """One sentence, which names the option or its value, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    assert run(*argv.split()) == 2
    *_, option, value = argv.replace("--", "").split()
    sentence = one_sentence(capsys)
    assert option in sentence or value in sentence or "--resume" in sentence
    assert not list(tmp_path.iterdir())


def test_options_that_have_no_upper_bound():
    s = toy.Settings(lr=1e9, internal_loss=1e9)
    assert (s.lr, s.internal_loss) == (1e9, 1e9)


def test_a_task_that_outgrows_the_context_is_refused(tmp_path, monkeypatch, capsys):
    """Before the directory is made, not in the middle of pretraining."""
    monkeypatch.setattr(toy, "longest_response", lambda n: 62 * n)
    toy.Settings(n=3)  # 8 + 248 tokens fit
    assert run("--n", 4, "--out_dir", tmp_path / "out") == 2
    assert "n + 1 = 5 take 320 tokens, more than CONTEXT = 256" in one_sentence(capsys)
    assert not list(tmp_path.iterdir())


def test_help_names_all_options_and_none_can_be_abbreviated(capsys):
    wrong = "argument --layer: must be a number or auto, not 'low'"
    for argv, code, says in (
        ("--help", "0", "--layer"),
        ("--step 3", "2", "--step 3"),
        ("--layer low", "2", wrong),
        ("--resume --out_dir=", "2", "argument --out_dir: must not be empty"),
    ):
        with pytest.raises(SystemExit, match=code):
            run(*argv.split())
        printed = capsys.readouterr()
        assert says in printed.out + printed.err
        if code == "0":
            assert all(f"--{f.name}" in printed.out for f in toy.fields(toy.Settings))
            words = " ".join(printed.out.split())
            assert "a base model" in words and "(in 3..12; default: 5)" in words
    s, _ = toy.parse_options("--preset smoke --algo grpo".split())
    assert (s.s_inter, s.n_layer) == (0, 4)


def test_settings_survive_annotations_that_are_strings(monkeypatch):
    """With `from __future__ import annotations` the type of each option is a string."""
    module = types.ModuleType("toy_of_the_future")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    source = Path(toy.__file__).read_text(encoding="utf-8")
    exec("from __future__ import annotations\n" + source, module.__dict__)
    s, _ = module.parse_options("--n 4 --lr 1 --layer auto --base".split() + [str(COURSE_BASE)])
    assert (s.n, s.lr, s.layer, s.base, s.n_layer) == (4, 1.0, None, str(COURSE_BASE), 6)
    for invalid in ({"n": "4"}, {"n": 4.0}, {"lr": "1"}, {"layer": "auto"}, {"seed": True}):
        with pytest.raises(ValueError, match="must be of type"):
            module.Settings(**invalid)


def test_devices(tmp_path, capsys):
    """One that is missing is refused; auto is cuda, else cpu; mps only on request."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    for name in (name for name in available if not available[name]):
        assert run("--device", name, "--out_dir", tmp_path / "out") == 2
        assert name in one_sentence(capsys) and not (tmp_path / "out").exists()
    assert toy.pick_device("auto").type == ("cuda" if available["cuda"] else "cpu")


def test_what_is_refused_changes_nothing(finished, base, tmp_path, capsys):
    before = files(finished)
    other_size = [*TINY, "--d_model", 48, "--base", base, "--out_dir", tmp_path / "x"]
    toy.save_checkpoint(tmp_path / "17.pt", toy.GPT(toy.GPTConfig(17, 256, 3, 32, n_head=2)))
    for argv, says in (
        ([*TINY, "--base", tmp_path / "17.pt", "--out_dir", tmp_path / "x"], "OPERATORS"),
        ([*TINY, "--base", base, "--out_dir", finished], "not empty"),
        ([*TINY, "--base", base, "--out_dir", base], "is a file"),
        (["--resume", "--out_dir", finished, "--seed", 3], "config.json, which has 0"),
        (["--resume", "--out_dir", finished, "--steps", 5], "step 12"),
        (other_size, "--d_model 48"),
    ):
        assert run(*argv) == 2
        assert says in one_sentence(capsys)
    assert before == files(finished) and not (tmp_path / "x").exists()


def each_spoiled(content):
    """Yield copies of nested dictionaries; in each, one value at some depth has a useless type.

    Of more than 20 values that are alike (weights, moments) only the first and the last."""
    keys = list(content)
    for key in keys if len(keys) <= 20 else (keys[0], keys[-1]):
        yield content | {key: {"a": None}}
        if isinstance(content[key], dict):
            yield from (content | {key: inside} for inside in each_spoiled(content[key]))


@pytest.mark.parametrize("name", ["ckpt.pt", "base.pt", "config.json"])
def test_spoiled_files_are_refused_in_a_sentence(copied, capsys, name):
    """Any change in a file of a run gives no traceback, and what is refused changes nothing."""
    path = copied / name
    is_json = name == "config.json"
    content = json.loads(path.read_text()) if is_json else torch.load(path, weights_only=True)
    spoiled = [*each_spoiled(content), b"", b"rubbish", b"{}", None]
    if is_json:  # a missing setting is not replaced by its default
        spoiled += [{key: content[key] for key in content if key != name} for name in content]
    else:
        spoiled.append(content | {"more": Path("a")})  # what only an unsafe load would read
        spoiled.append(content | {"single_results": content["single_results"][:-1]})
    if name == "ckpt.pt":
        moments = content["optimizer"][0] | {"exp_avg": torch.zeros(3)}  # would end the interpreter
        misfits = dict(step=-1, target=[4, "resid_post"], records=7, format=1)
        misfits["optimizer"] = {0: moments}
        spoiled += [content | {key: value} for key, value in misfits.items()]
    for bad in spoiled:
        if bad is None:
            path.unlink()
        elif isinstance(bad, bytes):
            path.write_bytes(bad)
        else:
            path.write_text(json.dumps(bad)) if is_json else torch.save(bad, path)
        before = files(copied)
        assert run("--resume", "--out_dir", copied) == 2
        assert str(copied) in one_sentence(capsys) and before == files(copied)


def test_a_bug_keeps_its_traceback(base, tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "rollouts", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(*TINY, "--base", base, "--out_dir", tmp_path / "out")


def test_a_base_that_knows_little_says_so_and_one_that_cannot_improve_is_refused(
    base, tmp_path, monkeypatch, capsys
):
    s = toy.Settings(n=3, n_layer=3, d_model=32)
    toy.pretrain(s, toy.GPT(s.model_config()), [], max_steps=1)
    assert "single operations" in capsys.readouterr().out
    monkeypatch.setattr(toy, "is_correct", lambda *_: False)
    assert run(*TINY, "--base", base, "--out_dir", tmp_path / "out") == 2
    assert "mixed outcomes" in one_sentence(capsys)


def test_if_the_rule_names_no_layer_the_command_that_is_printed_works(
    base, tmp_path, monkeypatch, capsys
):
    """It keeps the options of the run, and can be pasted if a path has a space and a quote."""
    monkeypatch.chdir(tmp_path)
    inside = toy.means_inside
    monkeypatch.setattr(toy, "means_inside", lambda *a: inside(*a) | {"dH_mlp": [-0.1, -0.2, 0.3]})
    options = [*NO_PHASE_1, "--s_inter", 3, "--seed", 4, "--preset", "smoke", "--base", base]
    assert run(*options, "--out_dir", "it's one") == 2
    python, script, *argv = shlex.split(one_sentence(capsys).split("example: ")[1])
    assert (python, script) == ("python", toy.__file__)  # this is not the directory of the project
    assert run(*argv, "--out_dir", "next") == 0
    first, then = (vars(toy.read_settings(Path(name))) for name in ("it's one", "next"))
    changed = {"base": str(Path("it's one/base.pt")), "layer": 1, "out_dir": "next"}
    assert then == first | changed
    for layer, expected in (1, 1), (None, 2):  # as asked, or by the rule: either has the site
        s = toy.Settings(layer=layer, site="mlp_out")
        target = toy.pick_target(s, [0.1, 0.2, -0.1], str(base))
        assert target == minibupo.Policy(expected, "mlp_out")


def test_printed_commands(tmp_path, monkeypatch):
    """A path that looks like an option is absolute in them; cmd.exe knows only double quotes."""
    monkeypatch.chdir(tmp_path)
    assert toy.parse_options(["--out_dir=-a"])[0].out_dir == str(tmp_path / "-a")
    monkeypatch.chdir(Path(toy.__file__).parent)
    assert toy.command_line("train_toy.py", "my run") == "python train_toy.py 'my run'"
    monkeypatch.setattr(sys, "platform", "win32")
    assert toy.command_line("train_toy.py", "my run") == 'python train_toy.py "my run"'


def test_everything_without_a_network(base, tmp_path):
    """Sockets forbidden, default encodings an error, on a cp1252 console."""
    argv = [*TINY, "--base", str(base), "--steps", "3", "--out_dir", str(tmp_path / "out")]
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise OSError('network')\n"
        "socket.socket.connect = refuse\n"
        "import train_toy\n"
        f"sys.exit(train_toy.main({argv!r}))"
    )
    flags = ["-X", "warn_default_encoding", "-W", "error::EncodingWarning:train_toy"]
    options = dict(cwd=Path(toy.__file__).parent, env={**os.environ, "PYTHONIOENCODING": "cp1252"})
    command = [sys.executable, *flags, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stderr
    assert result.stdout.isascii() and "held-out problems" in result.stdout


def test_smoke_run_learns(tmp_path):
    """From nothing to the table: accuracy rises by 10 points or more at the trained length."""
    assert run("--preset", "smoke", "--threads", 1, "--out_dir", tmp_path / "smoke") == 0
    before, *_, after = toy.read_metrics(tmp_path / "smoke", "eval")
    assert after["tiers"]["3"]["avg@8"] > before["tiers"]["3"]["avg@8"] + 0.1


def test_the_first_checkpoints_are_known_by_their_operations(monkeypatch):
    """course/base.pt does not say what it was trained with: it was + - *, and not another *."""
    path = Path(__file__).parent.parent / "course" / "base.pt"
    assert "single_results" not in torch.load(path, weights_only=True)
    toy.load_model(path)
    monkeypatch.setitem(toy.OPERATORS, "*", max)
    with pytest.raises(ValueError, match=r"trained with 0\*1=0, but now OPERATORS give 0\*1=1"):
        toy.load_model(path)
