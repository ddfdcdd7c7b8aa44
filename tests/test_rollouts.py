"""What train_toy.rollouts passes to minibupo.update: samples, questions, rewards, enough tokens."""

import inspect
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import minibupo
import train_toy as toy

BASE = Path(__file__).parent.parent / "course" / "base.pt"
S = toy.Settings(questions=8, group=4)


@pytest.fixture(scope="module")
def model():
    return toy.load_model(BASE)


def test_what_is_sampled_is_what_is_scored(model):
    """First tokens of 8,000 responses follow the policy at the temperature that update scores at:
    each frequency within 5 standard errors (it fails by chance for less than 1 of 10,000 seeds)."""
    s = replace(S, n=3)  # short responses: only the first token matters
    temperature = inspect.signature(minibupo.update).parameters["temperature"].default
    found = toy.sample_responses(model, s, ["7+5*3-2"], 8000, toy.torch_rng_for("cpu", 0, "a test"))
    logits = model(torch.tensor([toy.encode("7+5*3-2=")]))[0, -1]
    p = (logits / temperature).softmax(-1).detach()
    frequency = torch.bincount(found.tokens[:, 8], minlength=toy.VOCAB_SIZE) / 8000
    assert p.max() < 0.9  # otherwise every temperature would pass
    assert ((frequency - p).abs() <= 5 * (p * (1 - p) / 8000).sqrt() + 1e-4).all()


def test_each_step_meets_other_questions_and_other_chance(model):
    def prompts(step, seed=0):
        found = toy.rollouts(replace(S, seed=seed), model, step)
        rows = zip(found.tokens.tolist(), found.prompt_len.tolist())
        return {toy.ENCODING.decode(tokens[:length]) for tokens, length in rows}

    assert prompts(1) == prompts(1) and len(prompts(1)) == S.questions
    assert not prompts(1) & (prompts(2) | prompts(1, seed=1))
    probes = [toy.own_solutions(model, replace(S, seed=seed))[0][:, :5] for seed in (0, 1)]
    assert not torch.equal(*probes)
    problems = ["7+5*3-2"] * S.questions
    first, again, second = (toy.rollouts(S, model, step, problems).tokens for step in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_rewards_belong_to_their_rows(model):
    found = toy.rollouts(S, model, 1)
    seen = set()
    rows = zip(found.tokens.tolist(), found.prompt_len.tolist(), found.end.tolist())
    for i, (tokens, start, end) in enumerate(rows):
        problem = toy.ENCODING.decode(tokens[:start]).removesuffix("=")
        response = toy.ENCODING.decode(tokens[start:end])
        reward = float(found.rewards[i // S.group, i % S.group])
        assert reward == toy.is_correct(problem, response)
        seen.add(reward)
    assert seen == {0.0, 1.0}


@pytest.mark.parametrize("n", [3, 5, 8])
def test_careful_work_fits_the_limit(n):
    """Also on problems that are one digit longer, as in an evaluation; but nothing longer fits."""
    lines = toy.careful("+".join("7" * (n + 1)))
    response = "=".join(lines[1:]) + "<eos>"
    assert len(toy.encode(response)) == toy.Settings(n=n).response_limit
    assert toy.Settings(n=n).tiers == [k for k in range(n - 2, n + 2) if k >= 3]
