"""The course's exercises: stubs fail, solutions pass, each incorrect answer gets its feedback."""

import functools
import importlib.util
import math
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import minibupo
import model
import train_toy

COURSE = Path(__file__).parent.parent
sys.path.insert(0, str(COURSE))

import check
from checks import common
from checks.common import Answer, Wrong

torch.set_num_threads(1)  # models this small gain nothing from a second thread
LIBRARY = {"minibupo": minibupo, "model": model, "train_toy": train_toy}

NUMBERS = range(1, len(check.NAMES) + 1)


def load(path: Path):
    """Return a Python file as a module."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wrong_answers():
    """Yield (exercise number, name of the function or value, incorrect one, feedback name)."""
    for number, name in enumerate(check.NAMES, 1):
        for entry in load(COURSE / "wrong" / f"{name}.py").WRONG:
            label = getattr(entry[1], "__name__", "value")
            yield pytest.param(number, *entry, id=f"{number}-{entry[2]}-{label}")


def confusions(number) -> list:
    """Return all typical incorrect answers that the check of an exercise knows."""
    constants = vars(check.load(number)).items()
    return [c for name, value in constants if name.endswith("CONFUSIONS") for c in value]


@pytest.mark.parametrize("number, name, wrong, expected", list(wrong_answers()))
def test_each_wrong_answer_gets_its_own_feedback(number, name, wrong, expected):
    """The answer is the solution with one function replaced by an incorrect one."""
    exercise = check.load(number)
    answer = Answer(COURSE / "solutions" / f"{check.NAMES[number - 1]}.py", exercise.REFUSED)
    setattr(answer.module, name, wrong)
    answer.path = Path(wrong.__code__.co_filename) if callable(wrong) else answer.path
    with pytest.raises(Wrong) as found:
        exercise.check(answer, quick=True)
    assert found.value.name == expected
    for confusion in confusions(number):
        assert (confusion.says in str(found.value)) == (confusion.name == expected)


@pytest.mark.parametrize("number", NUMBERS)
def test_every_confusion_has_a_wrong_answer_and_a_sentence_of_its_own(number):
    known = confusions(number)
    tested = {entry[2] for entry in load(COURSE / "wrong" / f"{check.NAMES[number - 1]}.py").WRONG}
    assert {confusion.name for confusion in known} <= tested
    assert len(tested) >= 3
    for part in ("name", "says"):
        assert len({getattr(confusion, part) for confusion in known}) == len(known)


@pytest.mark.parametrize("number", NUMBERS)
def test_the_stub_fails_and_the_solution_passes(number):
    assert check.feedback(number, COURSE / "exercises", quick=True).name == "not written"
    assert not isinstance(check.feedback(number, COURSE / "solutions", quick=True), Wrong)


def with_std_compared_to_0(rewards):
    std = rewards.std(1, keepdim=True)
    centred = rewards - rewards.mean(1, keepdim=True)
    equal = (rewards == rewards[:, :1]).all(1, keepdim=True)
    return torch.where(equal | (std == 0), 0.0, centred / (std + 1e-6))


def by_numpy(dH_mlp):
    layers = np.nonzero(np.array(dH_mlp[:-1]) > 0)[0]
    if len(layers) == 0:
        raise UnicodeError("a subclass of ValueError")
    return layers[-1] + 1


CORRECT = [
    (1, "response_mask", lambda p, end, T: [p <= t + 1 < end for t in range(T - 1)]),
    (1, "response_mask", lambda p, end, T: tuple(p <= t + 1 < end for t in range(T - 1))),
    (1, "response_mask", lambda p, end, T: (np.arange(1, T) >= p) & (np.arange(1, T) < end)),
    (2, "group_advantages", with_std_compared_to_0),
    (6, "target_layer", by_numpy),
    (6, "target_layer", lambda dH_mlp: torch.tensor(int(by_numpy(dH_mlp)))),
    (9, "matching_temperature", lambda *args: np.float32(check.load(9).matching()(*args))),
]


@pytest.mark.parametrize("number, name, function", CORRECT)
def test_other_types_and_ways_are_correct_too(number, name, function):
    exercise = check.load(number)
    answer = Answer(COURSE / "solutions" / f"{check.NAMES[number - 1]}.py", exercise.REFUSED)
    setattr(answer.module, name, function)
    answer.path = Path(__file__)
    exercise.check(answer, quick=True)


def test_of_large_tensors_only_the_entries_that_differ_are_shown():
    wanted = torch.zeros(5, 10)
    outcome = wanted.clone()
    outcome[3, 7] = 0.5
    shown = common.difference(outcome, wanted)
    assert "in 1 of 50 entries" in shown and "at [3, 7]: 0.5, not 0" in shown


def test_a_gradient_is_not_shown_as_the_value_of_the_loss():
    answer = Answer(COURSE / "solutions" / "ex03_surrogate.py")
    answer.module.clipped_loss = load(COURSE / "wrong" / "ex03_surrogate.py").both_move
    with pytest.raises(Wrong, match="^the gradient by logp of clipped_loss"):
        check.load(3).check(answer)


@pytest.mark.parametrize("name", ["ex04_policies", "ex05_entropy"])
def test_the_lines_that_print_a_trace_run(name, capsys, monkeypatch):
    monkeypatch.chdir(COURSE.parent)
    names = {"torch": torch, "train_toy": train_toy}
    names["model"] = train_toy.load_model("course/base.pt")
    text = (COURSE / "exercises" / f"{name}.py").read_text(encoding="utf-8")
    lines = re.search(r"^    (model = .*\n    )?for trace.*\n.*print.*$", text, re.MULTILINE)[0]
    exec(textwrap.dedent(lines), names)
    assert len(capsys.readouterr().out.splitlines()) == 6


@pytest.mark.parametrize("text, expected", load(COURSE / "wrong" / "ex10_pairs.py").WRONG_REPORTS)
def test_the_feedback_on_an_incomplete_report_says_what_is_missing(text, expected):
    with pytest.raises(Wrong) as found:
        check.load(10).check_report(text)
    assert found.value.name == expected


def test_students_t_of_exercise_10():
    """95% of Student's density with n - 1 degrees of freedom is within +-T95[n], by quadrature."""
    for n, bound in load(COURSE / "exercises" / "ex10_pairs.py").T95.items():
        strips = 200_001
        t = np.linspace(-bound, bound, strips)
        c = math.gamma(n / 2) / math.gamma((n - 1) / 2) / math.sqrt((n - 1) * math.pi)
        density = c * (1 + t**2 / (n - 1)) ** (-n / 2)
        assert abs(np.trapezoid(density, t) - 0.95) < 1e-4


def test_exercise_8_trains():
    """A short form of its run changes the accuracy of course/base.pt in four small steps."""
    answer = Answer(COURSE / "solutions" / "ex08_bupo.py")
    before, after = check.load(8).run(answer, steps=4, questions=8, problems=16)
    assert 0.3 < before < 0.8
    assert 0 < after <= 1 and after != before


# ---- answers that do not run -------------------------------------------------------------------

STUB = "def target_layer(d_mlp):\n"
BROKEN = {
    "syntax": (STUB + "    return (", "line 2"),
    "exception": (
        STUB + "    layers = []\n    return layers[0] + 1",
        "line 3: return layers[0] + 1",
    ),
    "no function": ("def target(d_mlp):\n    return 1", "no function target_layer"),
    "arguments": ("def target_layer():\n    return 1", "too many positional arguments"),
    "no function ": ("target_layer = max", "no function target_layer"),
    "time": (STUB + "    while True:\n        pass", "still running after"),
    "not written": (STUB + "    pass", "returns None"),
    "type": (STUB + "    return [4]", "list, but a number is wanted"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_answer_that_does_not_run_gets_a_sentence(name, tmp_path, monkeypatch):
    text, part = BROKEN[name]
    (tmp_path / "ex06_target.py").write_text(text, encoding="utf-8")
    limit = functools.partial(common.check_function, seconds=1)
    if name == "time":  # the others keep their limit, because the machine may be busy
        monkeypatch.setattr(check.load(6), "check_function", limit)
    wrong = check.feedback(6, tmp_path)
    assert wrong.name == name.strip()
    assert part in str(wrong)


def test_the_time_limit_holds_where_ctrl_c_is_ignored():
    """A shell starts its background jobs like that."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(common.TooLong), common.time_limit(0.2):
            time.sleep(10)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("error", ["SystemExit(1)", "RecursionError", "KeyError('layer')"])
def test_an_exception_in_an_answer_is_reported_with_its_line(error, tmp_path):
    (tmp_path / "ex06_target.py").write_text(f"{STUB}    raise {error}\n", encoding="utf-8")
    assert f"line 2: raise {error}" in str(check.feedback(6, tmp_path))


def test_an_answer_that_fails_at_import_and_one_that_is_missing(tmp_path):
    assert "there is no" in str(check.feedback(6, tmp_path))
    (tmp_path / "ex06_target.py").write_text("import no_such_package", encoding="utf-8")
    assert "line 1: import no_such_package" in str(check.feedback(6, tmp_path))


def test_ctrl_c_is_not_reported_as_an_incorrect_answer(tmp_path):
    (tmp_path / "ex06_target.py").write_text(STUB + "    raise KeyboardInterrupt", encoding="utf-8")
    with pytest.raises(KeyboardInterrupt):
        check.feedback(6, tmp_path)


def test_a_bug_of_the_check_keeps_its_traceback():
    answer = Answer(COURSE / "solutions" / "ex06_target.py")
    with pytest.raises(ZeroDivisionError):
        answer.guarded("a bug", 1, lambda: 1 / 0)


def test_the_library_is_whole_after_a_check():
    before = {name: dict(vars(module)) for name, module in LIBRARY.items()}
    for number in (1, 2, 4, 8):
        check.feedback(number, COURSE / "exercises", quick=True)
    assert before == {name: dict(vars(module)) for name, module in LIBRARY.items()}


# ---- the command line --------------------------------------------------------------------------


@pytest.mark.parametrize("folder, script", [("..", "course/check.py"), (".", "check.py")])
def test_the_command_works_from_the_root_and_from_course(folder, script):
    run = subprocess.run(
        [sys.executable, script, "6"], cwd=COURSE / folder, capture_output=True, text=True
    )
    assert run.returncode == 1
    assert "exercise 6, the target layer: not yet\n\nnot written yet" in run.stdout
    assert not run.stderr


def test_exit_codes_and_words(capsys):
    assert check.main(["6", "--in", str(COURSE / "solutions")]) == 0
    assert capsys.readouterr().out == "exercise 6, the target layer: pass\n"
    for bad in (["11"], ["--hint"], ["4", "--hint", "0"]):
        with pytest.raises(SystemExit) as left:
            check.main(bad)
        assert left.value.code == 2


@pytest.mark.parametrize("number", NUMBERS)
def test_hints_come_one_by_one(number, capsys):
    hints = check.load(number).HINTS
    check.main([str(number), "--hint"])
    out = capsys.readouterr().out
    assert hints[0] in out and hints[1] not in out
    assert f"python course/check.py {number} --hint 2" in out
    check.main([str(number), "--hint", str(len(hints))])
    out = capsys.readouterr().out
    assert all(hint in out for hint in hints) and "next hint" not in out


def test_the_list_says_which_pass(tmp_path, capsys):
    for name in check.NAMES:
        source = "solutions" if name == "ex06_target" else "exercises"
        shutil.copy(COURSE / source / f"{name}.py", tmp_path)
    (tmp_path / "ex02_advantages.py").write_text("def group_advantages(r):\n    return r")
    check.main(["--in", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("min")[-1].strip() for line in lines[:10]] == (
        ["-", "not yet", "-", "-", "-", "pass", "-", "-", "-", "-"]
    )


@pytest.mark.parametrize("number", NUMBERS)
def test_a_task_fits_fifteen_lines(number):
    text = (COURSE / "exercises" / f"{check.NAMES[number - 1]}.py").read_text(encoding="utf-8")
    task = re.match(r'"""(.*?)"""', text, re.DOTALL)[1]
    assert len(task.strip().splitlines()) <= 15


def test_the_plan_of_the_course_fits_its_sessions():
    """The minutes of a session are those of its parts, and exercises have the minutes they need."""
    readme = (COURSE / "README.md").read_text(encoding="utf-8")
    plan = readme.split("## Plan")[1].split("##")[0]
    total = planned = 0
    exercises = []
    for line in plan.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) < 4 or not cells[2].isdigit():
            continue
        if cells[1]:
            assert planned == total
            total = int(re.search(r"\((\d+)\)", cells[1])[1])
            planned = 0
        planned += int(cells[2])
        if cells[3].startswith("exercise"):
            numbers = [int(number) for number in re.findall(r"\d+", cells[3])]
            assert sum(check.load(number).MINUTES for number in numbers) == int(cells[2])
            exercises += numbers
    assert planned == total
    assert sorted(exercises) == list(NUMBERS)
