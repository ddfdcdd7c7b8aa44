"""README.md does what it says: its snippet runs, its output is that of seed 0, its links exist."""

import re
from pathlib import Path

import pytest
import torch
from conftest import tiny

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", "docs/*.md", "minibupo_hf/README.md", "experiments/README.md", "course/*.md"]


def blocks(language: str) -> list[str]:
    """The fenced code blocks of a language; "" is output."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.M | re.S)
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
        for link in re.findall(r"\]\((?!https?:|mailto:)([^)#]*)", text):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
        for anchor in re.findall(r"\]\(#([^)]+)\)", text):
            heads = re.findall(r"^#+ (.*)$", text, flags=re.M)
            names = {re.sub(r"[^\w\- ]", "", head).lower().replace(" ", "-") for head in heads}
            assert anchor in names, f"{page.name}: #{anchor}"
