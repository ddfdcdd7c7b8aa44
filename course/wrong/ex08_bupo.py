"""Incorrect answers to exercise 8 and the feedback that each must get."""

import torch

import minibupo
from minibupo import FULL, group_advantages, policy_loss, response_mask, token_logprobs


def improve(model, optimizer, rollouts, policy, mistake=None):
    """Improve a policy on one batch, with one mistake or none."""
    tokens = rollouts.tokens
    Q, G = rollouts.rewards.shape
    mask = response_mask(rollouts.prompt_len, rollouts.end, tokens.shape[1])
    if mistake == "no eos":
        mask = response_mask(rollouts.prompt_len, rollouts.end - 1, tokens.shape[1])
    if mistake == "no mask":
        mask = torch.ones_like(mask)
    advantages = group_advantages(rollouts.rewards).flatten()
    if mistake == "wrong row":
        advantages = group_advantages(rollouts.rewards).transpose(0, 1).reshape(-1)
    if mistake == "rewards":
        advantages = rollouts.rewards.flatten()
    with torch.no_grad():
        old_policy = FULL if mistake == "pi_theta below" else policy
        old_logp = token_logprobs(model, tokens, mask, old_policy)
    parts = 1 if mistake == "one mini-batch" else 4
    if mistake != "never zeroed":
        optimizer.zero_grad()
    for rows in torch.arange(Q * G).chunk(parts):
        old = old_logp[rows]
        if mistake == "ratio 1":
            with torch.no_grad():
                old = token_logprobs(model, tokens[rows], mask[rows], policy)
        new_policy = FULL if mistake == "pi_theta above" else policy
        loss, _ = policy_loss(model, tokens[rows], old, advantages[rows], mask[rows], new_policy)
        if mistake not in ("never zeroed", "zeroed once", "summed up"):
            optimizer.zero_grad()
        (-loss if mistake == "uphill" else loss).backward()
        if mistake == "summed up" and rows[-1] < Q * G - 1:
            continue
        if mistake != "not clipped":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1)
        optimizer.step()


def with_mistake(mistake):
    def bupo(model, optimizer, sample, target, s_inter, steps):
        for step in range(1, steps + 1):
            policy = target if step <= s_inter else FULL
            improve(model, optimizer, sample(step), policy, mistake)

    return bupo


def with_phase(choose):
    """Return bupo with choose(step, s_inter), which says whether a step is in phase 1."""

    def bupo(model, optimizer, sample, target, s_inter, steps):
        for step in range(1, steps + 1):
            policy = target if choose(step, s_inter) else FULL
            improve(model, optimizer, sample(step), policy)

    return bupo


def from_0(model, optimizer, sample, target, s_inter, steps):
    for step in range(steps):
        improve(model, optimizer, sample(step), target if step < s_inter else FULL)


def sampled_once(model, optimizer, sample, target, s_inter, steps):
    rollouts = sample(1)
    for step in range(1, steps + 1):
        improve(model, optimizer, rollouts, target if step <= s_inter else FULL)


def library(model, optimizer, sample, target, s_inter, steps):
    for step, policy in minibupo.phases(optimizer, target, s_inter, steps):
        improve(model, optimizer, sample(step), policy)


def half_library(model, optimizer, sample, target, s_inter, steps):
    for step in range(1, steps + 1):
        minibupo.update(model, optimizer, sample(step), target if step <= s_inter else FULL)


def yields(model, optimizer, sample, target, s_inter, steps):
    for step in range(1, steps + 1):
        improve(model, optimizer, sample(step), target if step <= s_inter else FULL)
        yield step


PIECES = (
    "summed up",
    "no eos",
    "pi_theta above",
    "pi_theta below",
    "ratio 1",
    "wrong row",
    "rewards",
    "never zeroed",
    "zeroed once",
    "one mini-batch",
    "no mask",
    "not clipped",
    "uphill",
)
WRONG = [
    *(("bupo", with_mistake(mistake), mistake) for mistake in PIECES),
    ("bupo", with_phase(lambda step, s_inter: False), "no phase 1"),
    ("bupo", with_phase(lambda step, s_inter: True), "no phase 2"),
    ("bupo", with_phase(lambda step, s_inter: step > s_inter), "phases swapped"),
    ("bupo", with_phase(lambda step, s_inter: step < s_inter), "one step short"),
    ("bupo", with_phase(lambda step, s_inter: step <= s_inter + 1), "one step long"),
    ("bupo", from_0, "from 0"),
    ("bupo", sampled_once, "samples"),
    ("bupo", yields, "generator"),
    ("bupo", library, "library"),
    ("bupo", half_library, "library"),
]
