"""course/lecture.ipynb, run from the first to the last cell in a fresh kernel.

Needs the extra `course`. Cells have tags. `within-A-R`: a new run must repeat the printed numbers
within A, or within a share R of them. If the numbers come from samples, this leaves room for other
samples, because random numbers differ between processors. `trained`: the result of training, where
one different token changes everything after it. `plot`: a cell that only draws. `answer`: a cell
that lecture-empty lacks. If something changes that the notebook reads, execute it again:
jupyter nbconvert --to notebook --execute --inplace course/lecture.ipynb"""

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason='needs pip install -e ".[course]"')
nbclient = pytest.importorskip("nbclient", reason='needs pip install -e ".[course]"')
nbconvert = pytest.importorskip("nbconvert", reason='needs pip install -e ".[course]"')
pytest.importorskip("ipykernel", reason='needs pip install -e ".[course]"')
pytest.importorskip("scipy", reason='needs pip install -e ".[course]"')

from experiments import common, passk

LECTURE = Path(__file__).parent.parent / "lecture.ipynb"


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def printed(cell) -> str:
    """Return everything that a cell has printed."""
    return "".join(o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stdout")


def numbers(text: str) -> list[float]:
    return [float(x) for x in re.findall(r"-?\d+\.?\d*", text)]


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(LECTURE, as_version=4)


@pytest.fixture(scope="module")
def fresh(committed):
    """Run the notebook. Raises CellExecutionError if a cell fails."""
    notebook = copy.deepcopy(committed)
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    where = {"metadata": {"path": str(LECTURE.parent)}}
    nbclient.NotebookClient(notebook, timeout=None, resources=where).execute()
    return notebook


def test_the_notebook_is_as_a_fresh_kernel_left_it(committed):
    nbformat.validate(committed)
    assert LECTURE.stat().st_size < 2.5e6
    counts = [cell.execution_count for cell in code_cells(committed)]
    assert counts == list(range(1, len(counts) + 1))
    outputs = [output for cell in code_cells(committed) for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]


def test_cells_written_by_hand_are_short(committed):
    for cell in code_cells(committed):
        if "plot" not in tags(cell):
            lines = [line for line in cell.source.splitlines() if line.strip()]
            assert len(lines) <= 15, cell.source


def test_each_cell_has_a_place_in_the_slides(committed):
    kinds = {"slide", "subslide", "fragment", "-", "skip", "notes"}
    assert {cell.metadata["slideshow"]["slide_type"] for cell in committed.cells} <= kinds
    page, _ = nbconvert.SlidesExporter().from_notebook_node(committed)
    assert page.count("<section") > 60


def test_students_predict_in_each_section(committed):
    """Each numbered section, except the verdict, asks for a prediction before it shows results."""
    number = None
    asked = set()
    shown = set()
    for cell in committed.cells:
        heading = re.match(r"## (\d+)\.", cell.source)
        number = int(heading[1]) if heading else number
        if cell.cell_type == "markdown" and "Predict" in cell.source:
            asked.add(number)
        if any(tag.startswith(("within", "trained")) for tag in tags(cell)):
            assert number in asked or number == 10, cell.source
            shown.add(number)
    assert asked == set(range(1, 10)) and shown == set(range(1, 11))


def test_without_its_answers_no_question_is_answered(committed):
    """What remains of lecture-empty has the questions, but no cell that begins with an answer."""
    kept = [cell for cell in committed.cells if "answer" not in tags(cell)]
    starts = ("**Answer", "**Why?", "**What to see", "### One control", "**On our toy")
    assert not [cell.source for cell in kept if cell.source.startswith(starts)]
    assert sum("Predict" in cell.source for cell in kept) == sum(
        "Predict" in cell.source for cell in committed.cells
    )


def test_code_that_only_reads_or_draws_the_study_is_not_in_the_slides(committed):
    """The slides show what is worked out by hand, and the figures."""
    sources = [cell.source for cell in committed.cells]
    first = next(i for i, source in enumerate(sources) if source.startswith("folder = "))
    last = sources.index("plot_worth(ROWS)")
    cells = code_cells(nbformat.from_dict({"cells": committed.cells[first : last + 1]}))
    shown = [c for c in cells if c.metadata["slideshow"]["slide_type"] != "skip"]
    starts = ("interval_by_hand", "idle_by_hand", "plot_idle", "worth_by_hand", "plot_worth")
    assert len(shown) == len(starts) < len(cells)
    for cell, start in zip(shown, starts):
        assert cell.source.removeprefix("def ").startswith(start)


def first_cell(committed, address, folder):
    """Run the first code cell in another folder, with an address; return the finished process."""
    source = code_cells(committed)[0].source
    assert source.count('REPOSITORY = ""') == 1
    source = source.replace('REPOSITORY = ""', f"REPOSITORY = {str(address)!r}")
    command = [sys.executable, "-c", source + "\nprint(ROOT)"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_outside_a_clone_the_first_cell_clones_or_says_why_not(committed, tmp_path):
    origin = tmp_path / "origin"
    origin.mkdir()
    (origin / "minibupo.py").touch()
    name = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    for command in (["init", "--quiet"], ["add", "."], [*name, "commit", "--quiet", "-m", "x"]):
        subprocess.run(["git", *command], cwd=origin, check=True)

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for address in ("", tmp_path / "no repository"):
        refused = first_cell(committed, address, elsewhere)
        assert refused.returncode == 1 and not refused.stdout
        assert "set REPOSITORY to an address" in refused.stderr
        assert "Traceback" not in refused.stderr

    for _ in range(2):  # the second time the clone is there
        done = first_cell(committed, origin.as_uri(), elsewhere)
        assert Path(done.stdout.strip()).samefile(elsewhere / "minibupo"), done.stderr
    inside = first_cell(committed, "", LECTURE.parent)
    assert Path(inside.stdout.strip()).samefile(LECTURE.parent.parent)


def test_it_runs_in_a_fresh_kernel_with_the_same_outputs(committed, fresh):
    """Each cell has the same kinds of output: nothing failed, and nothing is missing."""

    def shape(cell):
        kinds = [(o.output_type, o.get("name"), *sorted(o.get("data", ()))) for o in cell.outputs]
        # a stream may arrive in several parts, and machines differ in their warnings
        return [kind for kind in dict.fromkeys(kinds) if kind[1] != "stderr"]

    for old, new in zip(code_cells(committed), code_cells(fresh)):
        assert shape(old) == shape(new), old.source


def test_printed_numbers_are_repeated(committed, fresh):
    compared = 0
    for old, new in zip(code_cells(committed), code_cells(fresh)):
        for tag in tags(old):
            if tag.startswith("within-"):
                _, absolute, relative = tag.split("-")
                before, after = numbers(printed(old)), numbers(printed(new))
                compared += len(before)
                within = pytest.approx(before, abs=float(absolute), rel=float(relative))
                assert after == within, old.source
    assert compared > 100


def test_training_shows_what_the_text_says(committed, fresh):
    """GRPO and BuPO learn careful work, and phase 1 forever does not."""
    for notebook in (committed, fresh):
        [table] = [printed(c) for c in code_cells(notebook) if "cos(H^target" in printed(c)]
        correct = {line[:18].strip(): numbers(line[18:])[0] for line in table.splitlines()[1:]}
        assert correct["GRPO"] > 75 and correct["BuPO, 5 steps"] > 75
        assert correct["phase 1 forever"] < min(correct["GRPO"], correct["BuPO, 5 steps"]) - 10


def test_the_text_says_what_was_computed(committed):
    """The numbers in the verdict, and in the question about worth, are those of the cells."""

    def one(cells, start):
        [cell] = [cell for cell in cells if cell.source.startswith(start)]
        return cell

    lines = printed(one(code_cells(committed), 'print("worth of a step")')).splitlines()
    rows = {line[:44].strip(): line[44:].split("),")[0].strip() + ")" for line in lines[1:-1]}
    verdict = one(committed.cells, "**On our toy").source
    for name in (
        "BuPO at the rule's layer, 5 steps",
        "GRPO, frozen above the rule's layer",
        "BuPO at layer 5, base models with W = 1",
        "Qwen2.5-Coder-0.5B at layer 23",
    ):
        assert rows[name] in verdict, name
    mean, half = numbers(lines[-1])
    assert f"{mean} ± {half} points" in verdict

    costs = printed(one(code_cells(committed), "def idle_by_hand")).replace("+-", " ")
    idle, _, bupo, _ = numbers(costs)
    question = one(committed.cells, "### The worth of a step").source
    assert f"BuPO - GRPO is {bupo} points and idle - GRPO is {idle}." in question


def test_the_verdict_counts_the_base_models_of_both_experiments(committed):
    """Its first line is what experiments/passk.py reports of them together."""
    [cell] = [c for c in code_cells(committed) if c.source.startswith('print("worth of a step")')]
    value, bases = printed(cell).splitlines()[1][44:].strip().split("), ")
    together = passk.together(common.read_lines(passk.RESULTS))
    assert together.endswith(f"{value}), {bases}.")
