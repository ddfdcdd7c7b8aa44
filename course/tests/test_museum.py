"""course/bugs: every patch applies, and a test kills every bug.

Each copy with a bug runs the one test that its patch names, so everything takes about a minute.
"""

import importlib.util
import json
from pathlib import Path

import pytest

BUGS = Path(__file__).parent.parent / "bugs"
spec = importlib.util.spec_from_file_location("museum", BUGS / "run.py")
museum = importlib.util.module_from_spec(spec)
spec.loader.exec_module(museum)


def test_there_are_20_to_25_bugs_of_one_line_in_more_than_one_file():
    assert 20 <= len(museum.BUGS) <= 25
    assert {bug.file for bug in museum.BUGS} == {"minibupo.py", "model.py", "train_toy.py"}
    for i, bug in enumerate(museum.BUGS, 1):
        assert bug.name.startswith(f"{i:02}-") and bug.why.endswith(".")
        old = bug.old.splitlines()
        new = bug.new.splitlines()
        assert sum(a != b for a, b in zip(old, new)) == 1 and len(old) == len(new), bug.name


def test_three_are_departures():
    departures = [bug.name for bug in museum.BUGS if bug.departure]
    assert departures == ["01-biased-std", "05-final-norm-left-in", "10-moments-kept"]


def test_only_the_folder_of_the_key_tells_which_bug_is_which():
    assert {path.name for path in BUGS.iterdir()} - {"__pycache__"} == {
        "README.md",
        "bugs.png",
        "key",
        "run.py",
    }
    readme = (BUGS / "README.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:3] for line in readme.splitlines() if line.startswith("| ")][1:]
    names = [name.strip() for name, _ in rows]
    assert names == sorted(names, key=str.lower)
    assert all(gloss.strip() for _, gloss in rows)
    stars = {bug.name[3:].replace("-", " ") + " *" * bug.departure for bug in museum.BUGS}
    assert {name.lower().replace("pi_theta", "pi theta") for name in names} == stars


@pytest.mark.parametrize("bug", museum.BUGS, ids=lambda bug: bug.name)
def test_each_patch_applies_and_is_still_python(bug, tmp_path):
    text = (museum.broken_copy(bug, tmp_path) / bug.file).read_text(encoding="utf-8")
    compile(text, bug.file, "exec")


def test_a_patch_that_does_not_apply_is_named(tmp_path):
    bug = museum.BUGS[0]._replace(old="a line that is missing\n")
    with pytest.raises(
        ValueError, match="01-biased-std.patch: its old text is 0 times in minibupo"
    ):
        museum.broken_copy(bug, tmp_path)


def test_a_copy_has_no_environments(tmp_path, monkeypatch):
    for folder in ("env", "course/.my-env", "tests/data"):
        (tmp_path / "clone" / folder).mkdir(parents=True)
        (tmp_path / "clone" / folder / "pyvenv.cfg").touch()
    (tmp_path / "clone" / "tests" / "data" / "pyvenv.cfg").rename(tmp_path / "clone" / "model.py")
    monkeypatch.setattr(museum, "ROOT", tmp_path / "clone")
    copy = museum.broken_copy(None, tmp_path)
    found = {str(path.relative_to(copy)) for path in copy.rglob("*")}
    assert found == {"course", "model.py", "tests", str(Path("tests/data"))}


@pytest.fixture(scope="module")
def killed_by():
    return museum.killers()


@pytest.mark.parametrize("bug", museum.BUGS, ids=lambda bug: bug.name)
def test_a_test_kills_it(bug, killed_by):
    """It is the test that the patch names: another name in the header would mislead a student."""
    assert killed_by[bug.name] == bug.killed_by


def test_a_bug_that_nothing_kills_is_noticed():
    bug = museum.BUGS[0]._replace(new=museum.BUGS[0].old, killed_by="tests/test_rollouts.py")
    assert museum.killer(bug) is None


def test_the_key_is_that_of_the_results():
    """No run is there twice, and the numbers and the verdict are those of results.jsonl."""
    lines = [json.loads(line) for line in museum.RESULTS.read_text(encoding="utf-8").splitlines()]
    runs = [(line["bug"], line["seed"]) for line in lines]
    names = [museum.UNBROKEN, *(bug.name for bug in museum.BUGS)]
    assert len(runs) == len(set(runs))
    assert set(runs) <= {(name, seed) for name in names for seed in museum.SEEDS}
    key = museum.TABLE.read_text(encoding="utf-8")
    assert museum.table(lines, {bug.name: bug.killed_by for bug in museum.BUGS}) == key
