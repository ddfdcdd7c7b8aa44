"""Check your answers to the exercises in course/exercises.

python course/check.py              which exercises pass (without the training run of exercise 8)
python course/check.py 4            check exercise 4: it passes, or this says what is wrong
python course/check.py 4 --hint     its first hint; --hint 2 shows the first two, and so on
python course/check.py 4 --in DIR   check the answer in another folder, such as course/solutions
"""

import argparse
import importlib
import sys
from pathlib import Path

COURSE = Path(__file__).resolve().parent
for folder in (COURSE, COURSE.parent):  # of the package checks, and of minibupo.py
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import torch
from checks.common import Answer, Wrong

# A check is a module with TITLE, MINUTES, HINTS, REFUSED and check(answer, quick)
NAMES = [path.stem for path in sorted((COURSE / "checks").glob("ex*.py"))]


def feedback(number: int, folder: Path, quick=False) -> Wrong | str:
    """Return what is wrong with an answer; or, if it passes, what it found (which may be "").

    quick: without a training run."""
    exercise = load(number)
    try:
        answer = Answer(folder / f"{NAMES[number - 1]}.py", exercise.REFUSED)
        return exercise.check(answer, quick) or ""
    except Wrong as wrong:
        return wrong


def load(number: int):
    """Return the module with the checks of an exercise."""
    return importlib.import_module(f"checks.{NAMES[number - 1]}")


def hints(number: int, count: int) -> str:
    """Return the first `count` hints of an exercise, and how to get the next one."""
    all_hints = load(number).HINTS
    lines = [f"hint {i} of {len(all_hints)}: {h}" for i, h in enumerate(all_hints[:count], 1)]
    if count < len(all_hints):
        lines.append(f"(next hint: python course/check.py {number} --hint {count + 1})")
    return "\n".join(lines)


def list_all(folder: Path):
    """Print one line per exercise."""
    for number in range(1, len(NAMES) + 1):
        exercise = load(number)
        print(f"{number:2d}  {exercise.TITLE:48}{exercise.MINUTES:4d} min  ", end="", flush=True)
        found = feedback(number, folder, quick=True)
        if isinstance(found, Wrong):
            print("-" if found.name == "not written" else "not yet")
        else:
            print(getattr(exercise, "QUICK_PASS", "pass"))
    print("\npython course/check.py N says what is wrong with exercise N; --hint shows a hint")


def main(argv=None) -> int:
    """Run the command line. Return 0 for a pass, 1 for an incorrect answer, 2 for invalid input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("number", type=int, nargs="?", choices=range(1, len(NAMES) + 1))
    parser.add_argument("--hint", type=int, nargs="?", const=1, metavar="N", help="hints 1..N")
    parser.add_argument("--in", dest="folder", type=Path, default=COURSE / "exercises")
    options = parser.parse_args(argv)
    if options.hint is not None and (options.number is None or options.hint < 1):
        parser.error("--hint needs an exercise, and counts from 1: 4 --hint 2")
    torch.set_num_threads(1)  # models this small gain nothing from a second thread
    if options.number is None:
        list_all(options.folder)
        return 0
    if options.hint is not None:
        print(hints(options.number, options.hint))
        return 0
    found = feedback(options.number, options.folder)
    verdict = "not yet" if isinstance(found, Wrong) else "pass"
    print(f"exercise {options.number}, {load(options.number).TITLE}: {verdict}\n\n{found}".strip())
    return int(isinstance(found, Wrong))


if __name__ == "__main__":
    sys.exit(main())
