"""Solution 8. All of BuPO is the line that chooses `policy`; the rest is GRPO."""

import torch

from minibupo import FULL, group_advantages, policy_loss, response_mask, token_logprobs


def improve(model, optimizer, rollouts, policy):
    tokens = rollouts.tokens
    Q, G = rollouts.rewards.shape
    mask = response_mask(rollouts.prompt_len, rollouts.end, tokens.shape[1])
    advantages = group_advantages(rollouts.rewards).flatten()  # in the order of the rows
    with torch.no_grad():  # before the first optimizer step, of the policy that is trained
        old_logp = token_logprobs(model, tokens, mask, policy)
    for questions in torch.arange(Q * G).view(Q, G).split(Q // 4):
        rows = questions.flatten()  # all responses to a quarter of the questions
        loss, _ = policy_loss(
            model, tokens[rows], old_logp[rows], advantages[rows], mask[rows], policy
        )
        optimizer.zero_grad()  # sets .grad to None: weights without a gradient do not move
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def bupo(model, optimizer, sample, target, s_inter, steps):
    for step in range(1, steps + 1):
        policy = target if step <= s_inter else FULL
        rollouts = sample(step)
        improve(model, optimizer, rollouts, policy)
