"""The exercises of the course: stubs fail, solutions pass, each wrong answer gets its feedback."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

COURSE = Path(__file__).parent.parent / "course"
sys.path.insert(0, str(COURSE))

import check  # noqa: E402
from checks.common import Answer, Wrong  # noqa: E402

NUMBERS = range(1, len(check.NAMES) + 1)


def load(path: Path):
    """A Python file as a module."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wrong_answers():
    """(number of the exercise, name of the function or value, wrong one, name of its feedback)."""
    for number, name in enumerate(check.NAMES, 1):
        for entry in load(COURSE / "wrong" / f"{name}.py").WRONG:
            label = getattr(entry[1], "__name__", "value")
            yield pytest.param(number, *entry, id=f"{number}-{entry[2]}-{label}")


@pytest.mark.parametrize("number, name, wrong, expected", list(wrong_answers()))
def test_each_wrong_answer_gets_its_own_feedback(number, name, wrong, expected):
    """The solution, with one function replaced by a wrong one."""
    exercise = check.load(number)
    answer = Answer(COURSE / "solutions" / f"{check.NAMES[number - 1]}.py", exercise.REFUSED)
    setattr(answer.module, name, wrong)
    answer.path = Path(wrong.__code__.co_filename) if callable(wrong) else answer.path
    with pytest.raises(Wrong) as found:
        exercise.check(answer, quick=True)
    print(f"\n{found.value}")
    assert found.value.name == expected


@pytest.mark.parametrize("number", NUMBERS)
def test_every_confusion_has_a_wrong_answer_and_a_sentence_of_its_own(number):
    exercise, name = check.load(number), check.NAMES[number - 1]
    known = [
        confusion
        for constant, value in vars(exercise).items()
        if constant.endswith("CONFUSIONS")
        for confusion in value
    ]
    tested = {entry[2] for entry in load(COURSE / "wrong" / f"{name}.py").WRONG}
    assert {confusion.name for confusion in known} <= tested
    assert len(tested) >= 3
    for part in ("name", "says"):
        assert len({getattr(confusion, part) for confusion in known}) == len(known)


@pytest.mark.parametrize("number", NUMBERS)
def test_the_stub_fails_and_the_solution_passes(number):
    assert check.feedback(number, COURSE / "exercises", quick=True).name == "not written"
    assert check.feedback(number, COURSE / "solutions", quick=True) is None


@pytest.mark.parametrize("number", NUMBERS)
def test_a_task_fits_fifteen_lines(number):
    text = (COURSE / "exercises" / f"{check.NAMES[number - 1]}.py").read_text(encoding="utf-8")
    task = re.match(r'"""(.*?)"""', text, re.DOTALL)[1]
    assert len(task.strip().splitlines()) <= 15
