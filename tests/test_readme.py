"""README.md does what it says: its snippet runs, its output is that of seed 0, its links exist."""

import re
from pathlib import Path

import pytest
import torch
from conftest import tiny

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", "docs/*.md", "minibupo_hf/README.md", "experiments/README.md"]
PAGES += ["course/*.md", "course/solutions/*.md"]


def blocks(language: str, page: str = README) -> list[str]:
    """The fenced code blocks of a language; "" is output."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page, flags=re.M | re.S)
    return [text for name, text in fenced if name == language]


def test_the_snippet_is_algorithm_1(capsys):
    """Pasted as it is, it trains layer 3 for five steps, then the whole model."""
    [code] = blocks("python")
    model = tiny(n_layer=4)
    before = model.blocks[3].mlp.down.weight.clone()
    moved = []

    def reward(sampled):
        moved.append(not torch.equal(before, model.blocks[3].mlp.down.weight))
        return sampled.tokens[:, 4:].eq(5).float().mean(1).view(-1, 8)

    prompts = torch.randint(0, 11, (4, 4), generator=torch.Generator().manual_seed(0))
    exec(code, dict(model=model, prompts=prompts, reward=reward, eos_id=10))
    assert len(capsys.readouterr().out.splitlines()) == len(moved) == 60
    assert moved == [False] * 6 + [True] * 54  # seen before the update of each step


def test_the_snippets_of_language_models_run(tmp_path, monkeypatch, capsys):
    """Pasted with a tiny model: the worth of two layers, BuPO and GRPO, what phase 1 was worth."""
    for package in ("trl", "scipy"):
        pytest.importorskip(package, reason="the extras `hf` and `bench` are not installed")
    from tests import test_hf

    model = test_hf.save(tmp_path / "model", test_hf.build(**test_hf.TIED))
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "minibupo_hf/README.md").read_text(encoding="utf-8")
    changes = {'"Qwen/Qwen3-0.6B"': repr(str(model)), '"cuda"': '"cpu"', ", 64,": ", 4,"}
    changes |= {"14": "1", "27": "2", "max_steps=20": "max_steps=2"}

    def run(code, **names):
        for old, new in changes.items():
            code = code.replace(old, new)
        exec(code, names)

    worth, training, measured = blocks("python", page)
    questions = ["2+3=", "1+4*2=", "7-1=", "0*3="]
    run(
        worth,
        lists_of_questions=[questions] * 3,
        reward=lambda question, text: float(len(text) % 2),
    )
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("layer 1: a step is worth") and second.startswith("layer 2:")
    run(training)
    printed = capsys.readouterr().out
    assert "\nbupo [" in printed and "\ngrpo [" in printed
    exec(measured, names := {})
    grpo = [0.1, 0.4, 0.6, 0.7, 0.7]
    idle = [0.1, 0.1, 0.1, 0.4, 0.6]  # as if nothing had been done for two batches
    assert names["worth"](idle, grpo, 2) == 0
    assert names["worth"](grpo, grpo, 2) == 1


def test_the_output_is_that_of_seed_0():
    """Each line that is shown stands in the output of the main job, in this order."""
    printed = (ROOT / "experiments/results/seed0-output.txt").read_text(encoding="utf-8")
    assert len(blocks("")) >= 2
    for block in blocks(""):
        rest = iter(printed.splitlines())
        missing = [line for line in block.splitlines() if line and line not in rest]
        assert not missing


@pytest.mark.parametrize("pattern", PAGES)
def test_links_lead_somewhere(pattern):
    for page in ROOT.glob(pattern):
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\((?!https?:|mailto:)([^)]*)\)", text):
            file, _, anchor = link.partition("#")
            target = page.parent / file if file else page
            assert target.exists(), f"{page.name}: {link}"
            if anchor and target.suffix == ".md":
                heads = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), flags=re.M)
                names = {re.sub(r"[^\w\- ]", "", head).lower().replace(" ", "-") for head in heads}
                assert anchor in names, f"{page.name}: {link}"
