"""Exercise 8: the weights of a small model after each step, in float64; then a real run."""

import inspect
from functools import cache
from pathlib import Path

import torch
from checks.common import Case, Confusion, Wrong, call, check_function, same
from checks.ex02_advantages import right as advantages_of
from checks.ex04_policies import logits, stream

import minibupo
import train_toy as toy
from minibupo import FULL, Policy, Rollouts
from model import GPT, GPTConfig

TITLE, MINUTES = "BuPO", 60
REFUSED = [(minibupo, "update"), (minibupo, "phases")]
QUICK_PASS = "pass, without the training run: python course/check.py 8"
HINTS = (
    "Write improve for one mini-batch first (all rows at once): mask, advantages.flatten(), "
    "old_logp under torch.no_grad(), policy_loss(...)[0], backward, step.",
    "For the rows of a quarter of the questions, flatten each part of "
    "torch.arange(N).view(Q, G).split(Q // 4). Index tokens, old_logp, advantages and mask with "
    "these rows.",
    "Both old_logp and the loss get the same `policy`. Compute old_logp once per batch.",
    "The loop has three lines: policy = target if step <= s_inter else FULL; rollouts = "
    "sample(step); improve(model, optimizer, rollouts, policy).",
)
STEPS, S_INTER, TARGET = 4, 2, Policy(1)


def small_model():
    """Return a GPT of two layers in float64, with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return GPT(GPTConfig(9, 12, n_layer=2, d_model=8, n_head=2, tied=False)).double()


def batch(step: int) -> Rollouts:
    """Return Rollouts of 8 questions with 3 responses each, of unequal lengths; some end at T."""
    generator = torch.Generator().manual_seed(step)

    def draw(low, high, shape):
        return torch.randint(low, high, shape, generator=generator)

    prompt_len = draw(2, 5, (8,)).repeat_interleave(3)
    end = prompt_len + draw(1, 7, (24,))
    rewards = draw(0, 2, (8, 3)).float()
    rewards[0] = 1.0  # a question whose responses are all correct
    return Rollouts(draw(0, 9, (24, 10)), prompt_len, end, rewards)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def by_steps(function):
    """Train with `function`. Return all weights before each step and at the end, (steps + 1, W),
    and for which steps it sampled."""
    model = small_model()
    seen = []
    asked = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)

    def sample(step):
        asked.append(step)
        seen.append(weights(model))
        return batch(step)

    call(function, model, optimizer, sample, TARGET, S_INTER, STEPS)
    return torch.stack([*seen, weights(model)]), asked


def log_probabilities(model, tokens, policy):
    """Return log pi of each token under a policy, (N, T-1), computed from the model's blocks."""
    top = stream(model, tokens[:, :-1])[(policy.layer or model.n_layer) - 1]["post"]
    h = model.final_norm(top) if policy == FULL else top
    return logits(model, h).log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]


def reference(mistake=None):
    """Return an outcome: the correct weights by step, or those that one mistake gives."""

    def train(model, optimizer, sample, target, s_inter, steps):
        last = {"one step short": s_inter - 1, "one step long": s_inter + 1}
        last |= {"no phase 1": 0, "no phase 2": steps}
        for step in range(1, steps + 1):
            first_phase = step <= last.get(mistake, s_inter)
            policy = target if first_phase != (mistake == "phases swapped") else FULL
            reference_step(model, optimizer, sample(step), policy, mistake)

    return cache(lambda: by_steps(train)[0])


def reference_step(model, optimizer, rollouts, policy, mistake):
    """Train on one batch, without minibupo's functions, with one mistake or none."""
    tokens, prompt_len, end, rewards = rollouts
    advantages = advantages_of(rewards)
    advantages = rewards if mistake == "rewards" else advantages
    advantages = (advantages.T if mistake == "wrong row" else advantages).flatten()
    t = torch.arange(1, tokens.shape[1])  # the token that each column predicts
    mask = (t >= prompt_len[:, None]) & (t < end[:, None])
    mask = torch.ones_like(mask) if mistake == "no mask" else mask
    mask &= (t < end[:, None] - 1) if mistake == "no eos" else True
    old_policy = FULL if mistake == "pi_theta below" else policy
    old = log_probabilities(model, tokens, old_policy).detach()
    new_policy = FULL if mistake == "pi_theta above" else policy
    if mistake != "never zeroed":
        optimizer.zero_grad()
    for part in range(1 if mistake == "one mini-batch" else 4):
        rows = slice(None) if mistake == "one mini-batch" else slice(6 * part, 6 * part + 6)
        logp = log_probabilities(model, tokens[rows], new_policy)
        ratio = (logp - (logp.detach() if mistake == "ratio 1" else old[rows])).exp()
        A = advantages[rows, None]
        objective = torch.min(ratio * A, ratio.clamp(0.8, 1.2) * A)[mask[rows]].mean()
        if mistake not in ("never zeroed", "zeroed once", "summed up"):
            optimizer.zero_grad()
        (objective if mistake == "uphill" else -objective).backward()
        if mistake == "summed up" and part < 3:
            continue
        if mistake != "not clipped":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


SAYS = {
    "no phase 1": "Phase 1 is missing: pi_theta is trained from the first step on. This is GRPO.",
    "no phase 2": "Phase 2 is missing: the internal policy is trained to the end.",
    "phases swapped": "The phases are swapped: you train pi_theta first, then the internal policy.",
    "one step short": "Phase 1 is one step too short: step s_inter still belongs to it.",
    "one step long": "Phase 1 is one step too long: step s_inter + 1 trains pi_theta.",
    "pi_theta below": "In phase 1 your old log-probabilities are pi_theta's. Numerator and "
    "denominator of the ratio must be the same policy. (The samples are pi_theta's: phase 1 is "
    "off-policy, and the ratio does not correct for that.)",
    "ratio 1": "You compute the old log-probabilities again for each mini-batch, so the ratio is "
    "always 1 and nothing is clipped. Compute them once, before the batch's first optimizer step.",
    "wrong row": "The advantages belong to other rows. Responses to a question are neighbours, so "
    "flatten the advantages row by row: .flatten(), without transposing.",
    "rewards": "Your advantages are the rewards themselves, so incorrect responses teach nothing. "
    "group_advantages compares responses within a group.",
    "never zeroed": "Gradients add up from step to step: zero them before each backward.",
    "zeroed once": "You zero the gradient once per batch, so it adds up over the mini-batches.",
    "summed up": "You sum the gradients of the four mini-batches and make one optimizer step. Make "
    "one for each mini-batch.",
    "no eos": "The last token of each response is not trained. <eos> is part of the response.",
    "pi_theta above": "In phase 1 your loss is that of pi_theta: policy_loss needs `policy`.",
    "one mini-batch": "You make one optimizer step per batch; four were asked for.",
    "no mask": "Prompts and padding are trained as well. Use response_mask.",
    "not clipped": "The gradient's norm is not clipped to 1.",
    "uphill": "The weights move in the wrong direction: policy_loss is already a loss, so do not "
    "change its sign.",
}
CONFUSIONS = tuple(Confusion(name, reference(name), says) for name, says in SAYS.items())


def train_small(function):
    """Return the learner's weights by step. Raise Wrong unless each of steps 1.. samples once."""
    if inspect.isgeneratorfunction(function):
        says = "your bupo has a yield, so a call of it runs nothing; write a plain loop"
        raise Wrong("generator", says)
    seen, asked = by_steps(function)
    if asked == list(range(STEPS)):
        raise Wrong("from 0", "your steps count from 0; sample(step) expects 1, 2, .., steps")
    if asked != list(range(1, STEPS + 1)):
        says = f"for {STEPS} steps you called sample with {asked}. Each step needs new responses "
        raise Wrong("samples", says + "of the current model: call sample(step) once per step")
    return seen


def compare(seen, wanted) -> str:
    """Return in words from which step on weights differ, and how many."""
    step = next(i for i in range(STEPS + 1) if not same(seen[i], wanted[i]))
    names, sizes = zip(*((name, p.numel()) for name, p in small_model().named_parameters()))
    mine, correct, before = (x.split(sizes) for x in (seen[step], wanted[step], wanted[step - 1]))
    differ = [i for i in range(len(names)) if not same(mine[i], correct[i])]
    moved = [names[i] for i in differ if same(correct[i], before[i])]
    phase = 1 if step <= S_INTER else 2
    says = f"from step {step} of {STEPS} on (phase {phase}) {len(differ)} of {len(names)} weights "
    says += "are incorrect"
    return says + (f"; {moved[-1]} should not have moved" if moved else "")


def run(answer, steps=20, questions=32, problems=64) -> tuple[float, float]:
    """Train course/base.pt at n = 3 with the learner's bupo; return accuracies before and after."""
    s = toy.Settings(n=3, questions=questions, seed=1)
    model = toy.load_model(Path(__file__).parent.parent / "base.pt")
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)

    def accuracy():
        return toy.evaluate(model, s, [3], problems)[0]["3"]["avg@8"]

    def sample(step):
        rollouts = toy.rollouts(s, model, step)
        print(f"step {step:2d} of {steps}  reward {rollouts.rewards.mean():.2f}", flush=True)
        return rollouts

    before = accuracy()
    arguments = (model, optimizer, sample, Policy(4), 3, steps)
    answer.guarded("training course/base.pt", 1200, answer.function("bupo"), *arguments)
    return before, accuracy()


def check(answer, quick=False):
    words = f"{STEPS} steps on a small model, {S_INTER} of them at layer 1: all weights by step"
    answer.function("improve")
    check_function(
        answer,
        "bupo",
        [Case(words, ())],
        reference(),
        CONFUSIONS,
        train_small,
        compare=compare,
        seconds=120,
    )
    if not quick:
        before, after = run(answer)
        reached = f"from {before:.0%} to {after:.0%} at n = 3 in 20 steps"
        if after < 0.9:
            says = f"all weights were correct on the small model, but accuracy goes {reached}"
            raise Wrong("run", says)
        return reached
