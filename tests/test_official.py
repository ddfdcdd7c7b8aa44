"""experiments/official.py without a clone of the official code: it refuses other code in one
sentence, takes functions out of files that cannot be imported, and shows the largest difference."""

import math
import shutil
import subprocess
import sys

import pytest
import torch

from experiments import official

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A repository of one commit, which is said to be the official one, with two files."""
    (tmp_path / "one.py").write_text(
        "import ray\n\ndef masked(x):\n    return x if x > 0 else -x\n"
    )
    text = "import vllm\n\n@vllm.register('f')\ndef f(x: vllm.Number) -> vllm.Number:\n"
    text += "    return 2 * verl_F.masked(x)\n\n@vllm.model\nclass Kept:\n    @vllm.method\n"
    text += "    def g(self, x):\n        return f(x) + 1\n\nclass Left(vllm.Model):\n    pass\n"
    (tmp_path / "two.py").write_text(text)
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "one"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=tmp_path, text=True).strip()
    monkeypatch.setattr(official, "COMMIT", head)
    monkeypatch.setattr(official, "FILES", ("one.py", "two.py"))
    monkeypatch.setattr(official, "CLASSES", ("Kept",))
    return tmp_path


def test_functions_come_out_of_files_that_cannot_be_imported(clone):
    they = official.official(clone)
    assert they.f(-3) == 6 and they.Kept().g(-3) == 7
    assert not hasattr(they, "Left")


def refusal(capsys, *argv):
    assert official.main(list(map(str, argv))) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("official: ") and err.count("\n") == 1
    return err


def test_what_is_not_the_official_code_is_refused_in_one_sentence(clone, monkeypatch, capsys):
    with pytest.raises(SystemExit) as usage:  # without a path
        official.main([])
    assert usage.value.code == 2
    capsys.readouterr()
    assert "is not a git clone" in refusal(capsys, clone / "nowhere")
    (clone / "two.py").unlink()
    assert "two.py" in refusal(capsys, clone)
    monkeypatch.setattr(official, "COMMIT", "0" * 40)
    assert f"checkout {'0' * 40}" in refusal(capsys, clone)


def test_without_transformers_the_sentence_names_it(clone, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "transformers" in refusal(capsys, clone)


def test_the_table_shows_the_largest_difference_of_each_name():
    rows = [("a", "f", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]))]
    rows += [("a", "f", torch.tensor(3.0), torch.tensor(3.0)), ("b", "g", 1.0, 1.0 + 1e-9)]
    rows += [("no gradient in both", "h", torch.tensor(math.nan), torch.tensor(math.nan))]
    rows += [("in one", "h", torch.tensor(math.nan), torch.tensor(0.5))]
    assert official.table(rows).splitlines()[2:] == [
        "| a | `f` | 2 | 2.5 | **0.5** |",
        "| b | `g` | 1 | 1 | 1.0e-09 |",
        "| no gradient in both | `h` | nan | nan | 0.0e+00 |",
        "| in one | `h` | nan | 0.5 | **inf** |",
    ]
