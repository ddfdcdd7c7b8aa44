"""course/lecture.ipynb from first to last cell in a fresh kernel, against what is committed.

Needs the extra `course`. Cells carry tags. `within-A-R`: a new run must repeat the printed numbers
within A, or a share R. Where they come from samples this leaves room for other samples, since
random numbers differ between processors. `trained`: what comes out of training, where one other
token changes all that follows. `plot`: a cell that only draws. After a change of what the notebook
reads: jupyter nbconvert --to notebook --execute --inplace course/lecture.ipynb"""

import copy
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason='needs pip install -e ".[course]"')
nbclient = pytest.importorskip("nbclient", reason='needs pip install -e ".[course]"')
nbconvert = pytest.importorskip("nbconvert", reason='needs pip install -e ".[course]"')
pytest.importorskip("ipykernel", reason='needs pip install -e ".[course]"')
pytest.importorskip("scipy", reason='needs pip install -e ".[course]"')

LECTURE = Path(__file__).parent.parent / "lecture.ipynb"


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def printed(cell) -> str:
    """All that a cell has printed."""
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
    """The notebook run anew. Raises CellExecutionError if a cell fails."""
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
    """Each numbered section, but for the verdict, asks for a prediction before it shows results."""
    number, asked, shown = None, set(), set()
    for cell in committed.cells:
        heading = re.match(r"## (\d+)\.", cell.source)
        number = int(heading[1]) if heading else number
        if cell.cell_type == "markdown" and "Predict" in cell.source:
            asked.add(number)
        if any(tag.startswith(("within", "trained")) for tag in tags(cell)):
            assert number in asked or number == 10, cell.source
            shown.add(number)
    assert asked == set(range(1, 10)) and shown == set(range(1, 11))


def test_it_runs_in_a_fresh_kernel_with_the_same_outputs(committed, fresh):
    """The same kinds of output in each cell: nothing failed, nothing is missing."""

    def shape(cell):
        kinds = [(o.output_type, o.get("name"), *sorted(o.get("data", ()))) for o in cell.outputs]
        # a stream may arrive in several parts, and machines differ in what they warn of
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
    """GRPO and BuPO learn careful work, and phase 1 for ever does not."""
    for notebook in (committed, fresh):
        [table] = [printed(c) for c in code_cells(notebook) if "cos(H^target" in printed(c)]
        right = {line[:18].strip(): numbers(line[18:])[0] for line in table.splitlines()[1:]}
        assert right["GRPO"] > 75 and right["BuPO, 5 steps"] > 75
        assert right["phase 1 for ever"] < min(right["GRPO"], right["BuPO, 5 steps"]) - 10


def test_numbers_are_those_of_the_readme(committed):
    """Where README and notebook speak of the base of seed 0, they say the same."""
    readme = (LECTURE.parent.parent / "README.md").read_text(encoding="utf-8")
    text = "\n".join(map(printed, code_cells(committed)))
    row = re.search(r"^ +5 +(0\.\d{3} .*)$", readme, re.M)[1]  # the first table, before RL
    right, _, right_steps, passed, _ = numbers(row)
    for name, value in {"answer": right, "no step wrong": right_steps, "one of 8": passed}.items():
        [line] = [line for line in text.splitlines() if line.startswith(f"{name} ")]
        assert numbers(line.removeprefix(name))[0] == pytest.approx(100 * value, abs=0.06)
    layers = re.findall(r"^    [1-6] +(-?\d\.\d\d) +(-?\d\.\d\d)(.*)", readme, re.M)
    [raw] = [line for line in text.splitlines() if re.match(r"raw +\d\.\d\d( +\d\.\d\d){6}$", line)]
    assert numbers(raw)[1:] == [float(entropy) for entropy, _, _ in layers]
    [d_ffn] = [line for line in text.splitlines() if line.startswith("against what the FFN reads")]
    assert numbers(d_ffn)[:6] == [numbers(rest)[1] for _, _, rest in layers]
