"""The museum of bugs: which of them does a test notice, and which does a learning curve show?

    python course/bugs/run.py            # the tests, then the training runs that have no result yet
    python course/bugs/run.py --tests    # only the tests, about a minute; CI runs this

Each key/NN-name.patch changes one line of the code, as a bug that somebody could write. It is
applied to a copy of the repository. There the test that the patch names has to fail, and
train_toy.py trains two seeds from course/base.pt. Two numbers are taken from each run:

    reported    the reward at each step, as the code with the bug counts it
    true        the accuracy of the weights in code without a bug: Avg@8 on 64 held-out problems of
                4 digits, at every tenth step

key/results.jsonl gets one line per run as soon as the run has finished, so stopping loses only the
runs in progress. To repeat a run, delete its line. README.md has the figure, key/key.md the table.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

import train_toy as toy
from experiments.common import run_missing

HERE = ROOT / "course" / "bugs"
KEY = HERE / "key"  # everything that says which bug is which
RESULTS = KEY / "results.jsonl"
TABLE = KEY / "key.md"
FIGURE = HERE / "bugs.png"
SEEDS = (0, 1)
UNBROKEN = "unbroken"
N = 4  # digits
STEPS = 40
EVERY = 10  # steps between two true accuracies
TRAIN = f"--n {N} --questions 32 --group 8 --lr 4e-4 --s_inter 5 --layer 4 --out_dir run".split()
TRAIN += "--eval_problems 16 --threads 1 --device cpu --base course/base.pt".split()
PASS = 0.9  # the true accuracy that a reader would take for a working method


class Bug(NamedTuple):
    """One patch. Its line numbers are ignored: the old text must be in the file exactly once."""

    name: str  # "01-biased-std"
    why: str  # what it is, and how somebody comes to write it
    departure: bool  # other code does this on purpose
    killed_by: str  # the test that has to notice it, as pytest names it
    file: str
    old: str
    new: str


def read_bug(path: Path) -> Bug:
    """Return the bug in a patch: a header, then a unified diff with one hunk."""
    header, diff = path.read_text(encoding="utf-8").split("\n--- a/")
    why, killed_by = header.split("\nKilled by: ")
    departure = why.endswith("\nKind: departure")
    why = why.removesuffix("\nKind: departure").replace("\n", " ")
    names, hunk = re.split(r"\n@@ .*\n", diff)
    file = names.splitlines()[0]
    lines = hunk.splitlines(keepends=True)
    old = "".join(line[1:] for line in lines if line[0] in " -")
    new = "".join(line[1:] for line in lines if line[0] in " +")
    return Bug(path.stem, why, departure, killed_by.strip(), file, old, new)


BUGS = [read_bug(path) for path in sorted(KEY.glob("*.patch"))]


# ---- copies of the repository ------------------------------------------------------------------

UNWANTED = {".git", "build", "dist", "out", "minibupo_hf", "results", "figures", "__pycache__"}


def unwanted(folder: str, names: list[str]) -> set[str]:
    """Return which of these names in a folder a copy does without: also every environment."""
    paths = [Path(folder) / name for name in names]
    environments = {path.name for path in paths if (path / "pyvenv.cfg").exists()}
    notebooks = {path.name for path in paths if path.suffix == ".ipynb"}
    return UNWANTED.intersection(names) | environments | notebooks


def broken_copy(bug: Bug | None, parent: str) -> Path:
    """Make a copy of the repository with this bug, or without one, and return its path.

    Raise ValueError if the patch does not apply."""
    copy = Path(parent) / "copy"
    shutil.copytree(ROOT, copy, ignore=unwanted)
    if bug:
        text = (copy / bug.file).read_text(encoding="utf-8")
        found = text.count(bug.old)
        if found != 1:
            raise ValueError(f"{bug.name}.patch: its old text is {found} times in {bug.file}")
        (copy / bug.file).write_text(text.replace(bug.old, bug.new), encoding="utf-8")
    return copy


# ---- the tests ---------------------------------------------------------------------------------


def first_failure(bug: Bug | None, *tests: str) -> str | None:
    """Return the first of these tests that fails in a copy with this bug, or None."""
    with tempfile.TemporaryDirectory() as parent:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-rf", "--tb=no", *tests]
        options = dict(cwd=broken_copy(bug, parent), capture_output=True, text=True)
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **options)
    if done.returncode == 4:  # the test now has another name
        return None
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    failed = re.search(r"^FAILED ([^\s\[]+)", done.stdout, re.MULTILINE)
    return failed and failed[1]


def killer(bug: Bug) -> str | None:
    """Return the test that kills a bug: the one its patch names, or else another of that file."""
    file = bug.killed_by.split("::")[0]
    return first_failure(bug, bug.killed_by) or first_failure(bug, file)


def killers() -> dict[str, str | None]:
    """Return the test that kills each bug, running two bugs at a time.

    Raise RuntimeError if one of these tests also fails without a bug."""
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip([bug.name for bug in BUGS], pool.map(killer, BUGS)))
    failing = first_failure(None, *sorted({test for test in found.values() if test}))
    if failing:
        raise RuntimeError(f"{failing} also fails without a bug")
    return found


# ---- the training ------------------------------------------------------------------------------


def train(bug: Bug | None, seed: int) -> dict:
    """Return what one run reports and what is true, with a bug or without one.

    The run is stopped and resumed every ten steps, which changes nothing in it, to look at its
    weights. So every line of the training is that of the copy with the bug."""
    started = time.perf_counter()
    torch.set_num_threads(1)
    found = {"reported": [], "true": {}, "stopped": None}
    with tempfile.TemporaryDirectory() as parent:
        copy = broken_copy(bug, parent)
        run = copy / "run"
        for steps in range(EVERY, STEPS + 1, EVERY):
            options = ["--resume", "--out_dir", "run"] if run.exists() else [*TRAIN, "--seed", seed]
            command = [sys.executable, "train_toy.py", *map(str, options), "--steps", str(steps)]
            done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
            if done.returncode:
                found["stopped"] = done.stderr.strip().splitlines()[-1]
                break
            found["true"][str(steps)] = accuracy(run / "ckpt.pt", seed)
        if (run / "metrics.jsonl").exists():
            found["reported"] = [record["reward"] for record in toy.read_metrics(run, "step")]
    return found | {"seconds": round(time.perf_counter() - started, 1)}


def accuracy(checkpoint: Path, seed: int) -> float:
    """Return Avg@8 of these weights in the model, and with the verifier, of code without a bug."""
    model = toy.load_model(checkpoint)
    s = toy.Settings(seed=seed, n=N)
    return toy.evaluate(model, s, [s.n], 64)[0][str(s.n)]["avg@8"]


# ---- table and figure --------------------------------------------------------------------------


def final(lines: list[dict], name: str) -> tuple[list, list]:
    """Return the reported and the true accuracy of a bug after the last step, a list over seeds.

    The reported one is the mean reward of the last ten steps. Both are 0 for a run that stopped."""
    mine = [line for line in lines if line["bug"] == name]
    mine = sorted(mine, key=lambda line: line["seed"])
    reported = [0.0 if line["stopped"] else np.mean(line["reported"][-10:]) for line in mine]
    true = [0.0 if line["stopped"] else line["true"][str(STEPS)] for line in mine]
    return reported, true


def passes(true: list) -> bool:
    """Return whether a reader would take this for a method that works."""
    return bool(np.mean(true) >= PASS)


def verdict(lines: list[dict]) -> str:
    """Return how many bugs, and how many departures, still pass, as a part of a sentence."""
    counts = {False: [0, 0], True: [0, 0]}  # departure: [those that pass, all]
    missing = 0
    for bug in BUGS:
        true = final(lines, bug.name)[1]
        missing += len(SEEDS) - len(true)
        counts[bug.departure][0] += bool(true) and passes(true)
        counts[bug.departure][1] += 1
    rest = f" (so far: {missing} runs are missing)" if missing else ""
    bugs = "{} of {} bugs".format(*counts[False])
    departures = "{} of {} departures".format(*counts[True])
    return f"{bugs} and {departures} still pass {PASS:.0%}{rest}"


HEAD = """# Key to the museum

**{verdict}**: their true accuracy after 40 steps is at least as high, as the mean of two seeds.

A *departure* is not a mistake: other code does it on purpose, and here a test holds the code to the
choice that the [README](../../../README.md#where-we-differ) states.

Reported: the reward of the last ten steps, as the code with the bug counts it. True: Avg@8 of the
last weights in code without a bug, on 64 held-out problems of 4 digits. Both columns have a number
in % for each of the two seeds. run.py writes this file.

| no. | bug | what it is, and how people come to write it | reported | true | passes | killed by |
|---|---|---|---|---|---|---|"""


def table(lines: list[dict], killed_by: dict) -> str:
    """Return the key in Markdown: every bug, what it did, which test kills it."""
    rows = [HEAD.format(verdict=verdict(lines))]
    rows.append(row(lines, UNBROKEN, ["", UNBROKEN, ""], ""))
    for bug in BUGS:
        number, name = bug.name.split("-", 1)
        why = f"*Departure.* {bug.why}" if bug.departure else bug.why
        test = (killed_by[bug.name] or "**none**").replace("tests/", "").replace("::", " ")
        rows.append(row(lines, bug.name, [number, f"[{name}]({bug.name}.patch)", why], test))
    return "\n".join(rows) + "\n"


def row(lines: list[dict], name: str, cells: list[str], test: str) -> str:
    """Return one row of the key, which begins with these cells."""
    reported, true = final(lines, name)
    percent = [", ".join(f"{100 * x:.0f}" for x in values) for values in (reported, true)]
    passed = ("yes" if passes(true) else "no") if true else ""
    return "| " + " | ".join([*cells, *percent, passed, test]) + " |"


def draw(lines: list[dict]):
    """Draw one small panel per bug, numbered and without names, so that a class can guess."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(-(-len(BUGS) // 5), 5, figsize=(13, 12), sharex=True, sharey=True)
    unbroken = [line for line in lines if line["bug"] == UNBROKEN]
    for ax, bug in zip(axes.flat, BUGS):
        sound = np.mean([line["reported"] for line in unbroken], axis=0)
        label = "reported, code without a bug"
        ax.plot(range(1, STEPS + 1), sound, color="0.75", lw=3, label=label)
        for line in unbroken:
            label = "true, code without a bug"
            ax.plot(*dots(line), "o", mfc="none", mec="0.55", ms=6, label=label)
        for line in (line for line in lines if line["bug"] == bug.name):
            reported = line["reported"]
            label = "reported by the code with the bug"
            ax.plot(range(1, len(reported) + 1), reported, "C0", lw=1, label=label)
            ax.plot(*dots(line), "C3o", ms=4, label="true accuracy of its weights at 4 digits")
        ax.axhline(PASS, color="0.5", lw=0.8, ls=":")
        ax.set_title(str(int(bug.name.split("-")[0])), loc="left", fontsize=13, weight="bold")
        ax.set(xlim=(0, STEPS + 1), ylim=(0, 1.02))
        ax.set(xticks=range(0, STEPS + 1, 10), yticks=(0, 0.5, 1))
    for ax in axes[-1]:
        ax.set_xlabel("step")
    for ax in axes[:, 0]:
        ax.set_ylabel("correct answers")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    once = dict(zip(labels, handles))
    figure.legend(once.values(), once.keys(), ncols=4, loc="upper center")
    figure.tight_layout(rect=(0, 0, 1, 0.965))
    figure.savefig(FIGURE, dpi=70)


def dots(line: dict) -> tuple[list, list]:
    """Return the steps of a run at which its true accuracy is known, and these accuracies."""
    return [int(step) for step in line["true"]], list(line["true"].values())


def main() -> int:
    """Print which test kills which bug; train what has no result yet; write table and figure."""
    parser = argparse.ArgumentParser("run.py", description="The museum of bugs.")
    parser.add_argument("--tests", action="store_true", help="only the tests, no training")
    only_tests = parser.parse_args().tests
    try:
        killed_by = killers()
    except ValueError as error:  # a patch that does not apply
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    for name, test in killed_by.items():
        print(f"{name:32} {test or 'NO TEST KILLS IT'}")
    if not only_tests:
        if hasattr(os, "nice"):  # not on Windows
            os.nice(15)
        jobs = [
            ({"bug": bug.name if bug else UNBROKEN, "seed": seed}, train, bug, seed)
            for seed in SEEDS
            for bug in (None, *BUGS)
        ]
        lines = run_missing(RESULTS, jobs)
        TABLE.write_text(table(lines, killed_by), encoding="utf-8")
        draw(lines)
        print(verdict(lines))
    return 0 if all(killed_by.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
