"""PPO with a critic in place of GRPO's groups, for experiments/study.py: is the cost of phase 1 due
to how advantages are made?

The critic is a second model, a copy of the base with a value head, as in the frameworks that train
language models. With gamma = lambda = 1, GAE (Schulman et al. 2016) of a token is the reward of its
response less the value of the state before it. Advantages are then whitened over the batch's
tokens. Phase 1 changes the policy alone, the critic learns in both phases.
"""

import copy

import torch

from minibupo import FULL, response_mask, surrogate, token_logprobs

CRITIC_LR, MINIBATCHES, MAX_GRAD_NORM = 1e-3, 4, 1.0


class Critic(torch.nn.Module):
    """The value of each prefix: the reward to expect, (N, T) from tokens (N, T)."""

    def __init__(self, base):
        super().__init__()
        self.trunk, self.head = copy.deepcopy(base), torch.nn.Linear(base.cfg.d_model, 1)
        torch.nn.init.zeros_(self.head.weight)

    def forward(self, tokens):
        h = self.trunk.residual(tokens, self.trunk.n_layer)
        return self.head(self.trunk.final_norm(h))[..., 0]


def whitened_advantages(rewards, values, mask):
    """GAE for gamma = lambda = 1, whitened: rewards (N,), values and mask (N, T-1) -> (N, T-1)."""
    advantages = rewards[:, None] - values
    of_responses = advantages[mask]
    return (advantages - of_responses.mean()) / (of_responses.std() + 1e-6) * mask


def token_surrogate(logp, old_logp, advantages, mask):
    """minibupo.surrogate with an advantage for each token: a token is a row. All are (N, T-1)."""
    rows = (x[mask][:, None] for x in (logp, old_logp))
    return surrogate(*rows, advantages[mask], mask[mask][:, None])[0]


def take_step(optimizer, loss):
    """One optimizer step down the gradient of a loss, clipped as in minibupo.update."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    for group in optimizer.param_groups:
        torch.nn.utils.clip_grad_norm_(group["params"], MAX_GRAD_NORM)
    optimizer.step()


def bupo(model, optimizer, sample, target, s_inter: int, steps: int):
    """minibupo.bupo with PPO's advantages: yields (step, policy, rollouts, log)."""
    critic = Critic(model)
    critic_optimizer = torch.optim.AdamW(critic.parameters(), lr=CRITIC_LR, fused=True)
    for step in range(1, steps + 1):
        policy = target if step <= s_inter else FULL
        if s_inter > 0 and step == s_inter + 1:
            optimizer.state.clear()
        rollouts = sample(step)
        tokens, rewards = rollouts.tokens, rollouts.rewards.flatten()
        mask = response_mask(rollouts.prompt_len, rollouts.end, tokens.shape[1])
        with torch.no_grad():
            old_logp = token_logprobs(model, tokens, mask, policy)
            advantages = whitened_advantages(rewards, critic(tokens[:, :-1]), mask)
        errors = []
        for rows in torch.arange(len(tokens)).chunk(MINIBATCHES):
            logp = token_logprobs(model, tokens[rows], mask[rows], policy)
            loss = token_surrogate(logp, old_logp[rows], advantages[rows], mask[rows])
            take_step(optimizer, loss)
            values = critic(tokens[rows, :-1])[mask[rows]]
            aims = rewards[rows, None].expand(mask[rows].shape)[mask[rows]]
            error = (values - aims).square().mean()
            take_step(critic_optimizer, error)
            errors.append(float(error.detach()))
        yield step, policy, rollouts, {"critic_error": sum(errors) / len(errors)}
