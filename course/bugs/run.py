"""The museum of bugs: which of them does a test notice, and which does a learning curve?

    python course/bugs/run.py            # the tests, then what is missing of the training runs
    python course/bugs/run.py --tests    # the tests alone, about a minute: this is what CI runs

Each NN-name.patch is one changed line of the code, as a bug that somebody could write. It is
applied to a copy of the repository. There the test that the patch names has to fail, and
train_toy.py trains two seeds from course/base.pt. Two numbers are taken of each run:

    reported    the reward at each step, as the code with the bug counts it
    true        the accuracy of the weights in the hands of somebody whose code has no bug:
                Avg@8 on 64 held-out problems of 4 digits, at each tenth step

A line a run goes to results.jsonl as soon as it is there, so stopping costs only what is under way.
To repeat a run, delete its line. README.md here shows the figure, key.md the table.
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

import train_toy as toy  # noqa: E402
from experiments.seeds import run_missing  # noqa: E402

HERE = ROOT / "course" / "bugs"
RESULTS, TABLE, FIGURE = HERE / "results.jsonl", HERE / "key.md", HERE / "bugs.png"
SEEDS, UNBROKEN = (0, 1), "unbroken"
N, STEPS = 4, 40
TRAIN = f"--n {N} --questions 32 --group 8 --steps {STEPS} --lr 4e-4 --s_inter 5 --layer 4".split()
TRAIN += "--eval_problems 16 --threads 1 --device cpu --base course/base.pt".split()
PASS = 0.9  # the true accuracy that a reader would take for a working method


class Bug(NamedTuple):
    """One patch. Line numbers in it are ignored: the old text has to be in the file once."""

    name: str  # "01-biased-std"
    why: str  # what it is, and how one comes to write it
    killed_by: str  # the test that is to notice it, as pytest names it
    file: str
    old: str
    new: str


def read_bug(path: Path) -> Bug:
    """A bug from its patch: a header, then a unified diff with one hunk."""
    header, diff = path.read_text(encoding="utf-8").split("\n--- a/")
    why, killed_by = header.split("\nKilled by: ")
    names, hunk = re.split(r"\n@@ .*\n", diff)
    lines = hunk.splitlines(keepends=True)
    old, new = ("".join(x[1:] for x in lines if x[0] in kinds) for kinds in (" -", " +"))
    file, why = names.splitlines()[0], why.replace("\n", " ")
    return Bug(path.stem, why, killed_by.strip(), file, old, new)


BUGS = [read_bug(path) for path in sorted(HERE.glob("*.patch"))]


def broken_copy(bug: Bug | None, parent: str) -> Path:
    """A copy of the repository with this bug, or without any. Raises ValueError if the patch does
    not apply."""
    copy = Path(parent) / "copy"
    unwanted = (
        ".git",
        ".venv",
        "out",
        "minibupo_hf",
        "results",
        "figures",
        "__pycache__",
        "*.ipynb",
    )
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*unwanted))
    if bug:
        text = (copy / bug.file).read_text(encoding="utf-8")
        found = text.count(bug.old)
        if found != 1:
            raise ValueError(f"{bug.name}.patch: its old text is {found} times in {bug.file}")
        (copy / bug.file).write_text(text.replace(bug.old, bug.new), encoding="utf-8")
    return copy


# ---- the tests ---------------------------------------------------------------------------------


def first_failure(bug: Bug | None, *tests: str) -> str | None:
    """The first of these tests that fails in a copy with this bug, or None."""
    with tempfile.TemporaryDirectory() as parent:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-rf", "--tb=no", *tests]
        options = dict(cwd=broken_copy(bug, parent), capture_output=True, text=True)
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **options)
    if done.returncode == 4:  # a test that has another name by now
        return None
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    failed = re.search(r"^FAILED ([^\s\[]+)", done.stdout, re.MULTILINE)
    return failed and failed[1]


def killer(bug: Bug) -> str | None:
    """The test that kills a bug: the one that its patch names, or else another of that file."""
    file = bug.killed_by.split("::")[0]
    return first_failure(bug, bug.killed_by) or first_failure(bug, file)


def killers() -> dict[str, str | None]:
    """For every bug the test that kills it, two at a time. Raises RuntimeError if one of these
    fails without a bug as well."""
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip([bug.name for bug in BUGS], pool.map(killer, BUGS)))
    failing = first_failure(None, *sorted({test for test in found.values() if test}))
    if failing:
        raise RuntimeError(f"{failing} fails without a bug as well")
    return found


# ---- the training ------------------------------------------------------------------------------


def train(bug: Bug | None, seed: int) -> dict:
    """One run with a bug, or with none; its line of results."""
    started = time.perf_counter()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as parent:
        copy = broken_copy(bug, parent)
        command = [sys.executable, "course/bugs/watch.py", *TRAIN, "--out_dir", "run"]
        command += ["--seed", str(seed)]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
        line = {"reported": [], "true": {}, "stopped": None}
        if done.returncode:
            line["stopped"] = done.stderr.strip().splitlines()[-1]
        if (copy / "run" / "metrics.jsonl").exists():
            line["reported"] = [r["reward"] for r in toy.read_metrics(copy / "run", "step")]
        if (copy / "steps.pt").exists():
            steps = torch.load(copy / "steps.pt", weights_only=True)
            line["true"] = {str(step): accuracy(state, seed) for step, state in steps.items()}
    return line | {"seconds": round(time.perf_counter() - started, 1)}


def accuracy(state: dict, seed: int) -> float:
    """Avg@8 of weights in the model and with the verifier of the code without a bug."""
    model, s = toy.load_model(ROOT / "course" / "base.pt"), toy.Settings(seed=seed, n=N)
    model.load_state_dict(state)
    return toy.evaluate(model, s, [s.n], 64)[0][str(s.n)]["avg@8"]


# ---- table and figure --------------------------------------------------------------------------


def final(lines: list[dict], name: str) -> tuple[list, list]:
    """Of one bug, by seed: the mean reward of the last ten steps, and the true accuracy at the end.
    Both are 0 for a run that stopped."""
    mine = [line for line in lines if line["bug"] == name]
    mine = sorted(mine, key=lambda line: line["seed"])
    reported = [0.0 if line["stopped"] else np.mean(line["reported"][-10:]) for line in mine]
    return reported, [0.0 if line["stopped"] else line["true"][str(STEPS)] for line in mine]


def passes(true: list) -> bool:
    """Whether a reader would take it for a method that works."""
    return bool(np.mean(true) >= PASS)


def verdict(lines: list[dict]) -> str:
    """k of N, in one sentence."""
    true = [final(lines, bug.name)[1] for bug in BUGS]
    passed = sum(passes(values) for values in true if values)
    missing = len(BUGS) * len(SEEDS) - sum(map(len, true))
    rest = f" (so far: {missing} runs are missing)" if missing else ""
    return f"{passed} of {len(BUGS)} bugs still pass {PASS:.0%}{rest}"


HEAD = """# Key to the museum

**{verdict}**: they do if the true accuracy after 40 steps is as high, as the mean of two seeds.

Written by run.py. The two numbers are those of the two seeds, in %.

Reported: the reward of the last ten steps, as the code with the bug counts it. True: Avg@8 of the
last weights in code without a bug, on 64 held-out problems of 4 digits.

| no. | bug | what it is, and how one comes to write it | reported | true | passes | killed by |
|---|---|---|---|---|---|---|"""


def table(lines: list[dict], killed_by: dict) -> str:
    """The key in Markdown: every bug, what it did, which test kills it."""
    rows = [HEAD.format(verdict=verdict(lines))]
    for bug in (None, *BUGS):
        reported, true = final(lines, bug.name if bug else UNBROKEN)
        number, name = bug.name.split("-", 1) if bug else ("", UNBROKEN)
        test = (killed_by[bug.name] or "**none**") if bug else ""
        link = f"[{name}]({bug.name}.patch)" if bug else name
        cells = [number, link, bug.why if bug else ""]
        cells += [", ".join(f"{100 * x:.0f}" for x in values) for values in (reported, true)]
        cells.append(("yes" if passes(true) else "no") if true else "")
        cells.append(test.replace("tests/", "").replace("::", " "))
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def draw(lines: list[dict]):
    """Small multiples, numbered and without names, so that a class can guess."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = 5
    size = dict(nrows=-(-len(BUGS) // columns), ncols=columns, figsize=(13, 12))
    figure, axes = plt.subplots(**size, sharex=True, sharey=True)
    sound = np.mean([line["reported"] for line in lines if line["bug"] == UNBROKEN], axis=0)
    for ax, bug in zip(axes.flat, BUGS):
        label = "reported, code without a bug"
        ax.plot(range(1, STEPS + 1), sound, color="0.75", lw=3, label=label)
        for line in (line for line in lines if line["bug"] == bug.name):
            reported, true = line["reported"], line["true"]
            label = "reported by the code with the bug, two seeds"
            ax.plot(range(1, len(reported) + 1), reported, "C0", lw=1, label=label)
            label = "true accuracy of its weights at 4 digits"
            ax.plot([int(step) for step in true], true.values(), "C3o", ms=4, label=label)
        ax.axhline(PASS, color="0.5", lw=0.8, ls=":")
        ax.set_title(str(int(bug.name.split("-")[0])), loc="left", fontsize=13, weight="bold")
        ax.set(
            xlim=(0, STEPS + 1), ylim=(0, 1.02), xticks=range(0, STEPS + 1, 10), yticks=(0, 0.5, 1)
        )
    for ax in axes[-1]:
        ax.set_xlabel("step")
    for ax in axes[:, 0]:
        ax.set_ylabel("right answers")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    key = dict(zip(labels, handles))  # each label once
    figure.legend(key.values(), key.keys(), ncols=3, loc="upper center")
    figure.tight_layout(rect=(0, 0, 1, 0.965))
    figure.savefig(FIGURE, dpi=70)


def main() -> int:
    """Name the tests that kill; train what has no line yet; draw table and figure."""
    parser = argparse.ArgumentParser("run.py", description="The museum of bugs.")
    parser.add_argument("--tests", action="store_true", help="the tests alone, no training")
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
