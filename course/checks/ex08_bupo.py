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
REFUSED = [(minibupo, name) for name in ("bupo", "update", "make_minibatches", "add_gradient")]
QUICK_PASS = "pass, but for the training run: python course/check.py 8"
HINTS = (
    "Write improve for one mini-batch first (all rows at once): mask, advantages.flatten(), "
    "old_logp under torch.no_grad(), policy_loss(...)[0], backward, step.",
    "Rows of a quarter of the questions: torch.arange(N).view(Q, G).split(Q // 4), and flatten "
    "each part. Index tokens, old_logp, advantages and mask with it.",
    "Both old_logp and the loss get the same `policy`; old_logp is computed once a batch.",
    "bupo is three lines: for step in range(1, steps + 1); policy = target if step <= s_inter "
    "else FULL; improve(model, optimizer, sample(step), policy).",
)
STEPS, S_INTER, TARGET = 4, 2, Policy(1)


def small_model():
    """A GPT of two layers in float64, with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return GPT(GPTConfig(9, 12, n_layer=2, d_model=8, n_head=2, tied=False)).double()


def batch(step: int) -> Rollouts:
    """Rollouts of 8 questions with 3 responses each, of unequal lengths; some end at T."""
    generator = torch.Generator().manual_seed(step)

    def draw(low, high, shape):
        return torch.randint(low, high, shape, generator=generator)

    prompt_len = draw(2, 5, (8,)).repeat_interleave(3)
    end = prompt_len + draw(1, 7, (24,))
    rewards = draw(0, 2, (8, 3)).float()
    rewards[0] = 1.0  # a question that all got right
    return Rollouts(draw(0, 9, (24, 10)), prompt_len, end, rewards)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def by_steps(function):
    """All weights before each step and at the end, (steps + 1, weights), as `function` trains."""
    model, seen, asked = small_model(), [], []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)

    def sample(step):
        asked.append(step)
        seen.append(weights(model))
        return batch(step)

    call(function, model, optimizer, sample, TARGET, S_INTER, STEPS)
    return torch.stack([*seen, weights(model)]), asked


def log_probabilities(model, tokens, policy):
    """log pi of each token under a policy, (N, T-1), from the model's blocks."""
    top = stream(model, tokens[:, :-1])[(policy.layer or model.n_layer) - 1]["post"]
    h = model.final_norm(top) if policy == FULL else top
    return logits(model, h).log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]


def reference(mistake=None):
    """Weights by step as they should be, or with one mistake in it."""

    def train(model, optimizer, sample, target, s_inter, steps):
        last = {"one step short": s_inter - 1, "one step long": s_inter + 1, "no phase 1": 0}
        last |= {"no phase 2": steps}
        for step in range(1, steps + 1):
            first_phase = step <= last.get(mistake, s_inter)
            policy = target if first_phase != (mistake == "phases swapped") else FULL
            reference_step(model, optimizer, sample(step), policy, mistake)

    return cache(lambda: by_steps(train)[0])


def reference_step(model, optimizer, rollouts, policy, mistake):
    """One batch, written without minibupo."""
    tokens, prompt_len, end, rewards = rollouts
    advantages = advantages_of(rewards)
    advantages = rewards if mistake == "rewards" else advantages
    advantages = (advantages.T if mistake == "wrong row" else advantages).flatten()
    t = torch.arange(1, tokens.shape[1])  # the token that each column is about
    mask = (t >= prompt_len[:, None]) & (t < end[:, None])
    mask = torch.ones_like(mask) if mistake == "no mask" else mask
    mask &= (t < end[:, None] - 1) if mistake == "no eos" else True
    of_old = FULL if mistake == "pi_theta below" else policy
    old = log_probabilities(model, tokens, of_old).detach()
    if mistake != "never zeroed":
        optimizer.zero_grad()
    for part in range(1 if mistake == "one mini-batch" else 4):
        rows = slice(None) if mistake == "one mini-batch" else slice(6 * part, 6 * part + 6)
        logp = log_probabilities(
            model, tokens[rows], FULL if mistake == "pi_theta above" else policy
        )
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
    "phases swapped": "The phases are swapped: pi_theta comes first, the internal policy second.",
    "one step short": "Phase 1 is one step too short: step s_inter is its last one.",
    "one step long": "Phase 1 is one step too long: step s_inter + 1 is pi_theta's.",
    "pi_theta below": "In phase 1 your old log-probabilities are pi_theta's. Above and below in "
    "the ratio must be the same policy. (The samples are pi_theta's: phase 1 is off-policy, and "
    "the ratio does not correct for that.)",
    "ratio 1": "You take old log-probabilities anew for each mini-batch, so the ratio is always 1 "
    "and nothing is ever clipped. Take them once, before the first step of the batch.",
    "wrong row": "The advantages are those of other rows. Responses to a question are neighbours, "
    "so it is rewards' rows one after the other: .flatten(), without transposing.",
    "rewards": "Your advantages are the rewards themselves: wrong responses teach nothing then. "
    "group_advantages compares within a group.",
    "never zeroed": "Gradients pile up from step to step: zero them before each backward.",
    "zeroed once": "You zero the gradient once a batch, so it piles up over the mini-batches.",
    "summed up": "You sum the gradients of the four mini-batches and make one step. Each makes its "
    "own.",
    "no eos": "The last token of each response is not trained. <eos> is part of the response.",
    "pi_theta above": "Your loss is that of pi_theta in phase 1, too: policy_loss needs `policy`.",
    "one mini-batch": "You make one optimizer step a batch; four were asked for.",
    "no mask": "Prompts and padding are trained as well. Use response_mask.",
    "not clipped": "The gradient's norm is not clipped to 1.",
    "uphill": "The weights go the wrong way: policy_loss is a loss already, do not turn its sign.",
}
CONFUSIONS = tuple(Confusion(name, reference(name), says) for name, says in SAYS.items())


def train_small(function):
    """The learner's weights by step. Raises Wrong if sampling was not once a step, from 1."""
    if inspect.isgeneratorfunction(function):
        says = "your bupo has a yield, so calling it runs nothing: it waits for a loop over it"
        raise Wrong("generator", says)
    try:
        seen, asked = by_steps(function)
    except RuntimeError as error:
        if "second time" not in str(error):
            raise
        says = "A second backward runs into the graph of the first: old_logp belongs under "
        raise Wrong("old has a graph", says + "torch.no_grad(), it is a constant.") from None
    if asked == list(range(STEPS)):
        raise Wrong("from 0", "your steps count from 0; sample(step) wants 1, 2, .., steps")
    if asked != list(range(1, STEPS + 1)):
        says = f"for {STEPS} steps you called sample with {asked}. Each step needs new responses, "
        raise Wrong("samples", says + "from the model as it is then: sample(step), once a step")
    return seen


def compare(seen, wanted) -> str:
    """From which step on the weights are others, and which, in words."""
    step = next(i for i in range(STEPS + 1) if not same(seen[i], wanted[i]))
    names, sizes = zip(*((name, p.numel()) for name, p in small_model().named_parameters()))
    mine, right, before = (x.split(sizes) for x in (seen[step], wanted[step], wanted[step - 1]))
    others = [i for i in range(len(names)) if not same(mine[i], right[i])]
    moved = [names[i] for i in others if same(right[i], before[i])]
    phase = f"phase {1 if step <= S_INTER else 2}"
    says = (
        f"from step {step} of {STEPS} on ({phase}) {len(others)} of {len(names)} weights are wrong"
    )
    return says + (f"; {moved[-1]} should not have moved" if moved else "")


def run(answer, steps=20, questions=32, problems=64) -> tuple[float, float]:
    """Train course/base.pt at n = 3 with the learner's bupo: accuracy before and after."""
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
            raise Wrong(
                "run", f"All weights were right on the small model, but the run goes {reached}"
            )
        return reached
