"""PPO with a critic in place of GRPO's groups, for experiments/study.py: does the cost of phase 1
come from the way in which advantages are made?

The critic is a second model, a copy of the base model with a value head, as in the frameworks that
train language models. With gamma = lambda = 1, GAE (Schulman et al. 2016) of a token is the reward
of its response minus the value of the state before it. Advantages are then whitened over the
batch's tokens. Phase 1 changes only the policy; the critic learns in both phases.
"""

import copy

import torch

from minibupo import FULL, response_mask, surrogate, token_logprobs

CRITIC_LR = 1e-3
MINIBATCHES = 4
MAX_GRAD_NORM = 1.0


class Critic(torch.nn.Module):
    """The value of each prefix, which is the reward to expect: (N, T) from tokens (N, T)."""

    def __init__(self, base):
        super().__init__()
        self.trunk = copy.deepcopy(base)
        self.head = torch.nn.Linear(base.cfg.d_model, 1)
        torch.nn.init.zeros_(self.head.weight)
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=CRITIC_LR, fused=True)

    def forward(self, tokens):
        h = self.trunk.residual(tokens, self.trunk.n_layer)
        return self.head(self.trunk.final_norm(h))[..., 0]

    def update(self, model, optimizer, rollouts, policy=FULL) -> dict:
        """Improve a policy and the critic on one batch, as minibupo.update does for GRPO.

        Returns {"critic_error": the mean squared error of the values, before each step}.
        """
        tokens = rollouts.tokens
        rewards = rollouts.rewards.flatten()
        mask = response_mask(rollouts.prompt_len, rollouts.end, tokens.shape[1])
        with torch.no_grad():
            old_logp = token_logprobs(model, tokens, mask, policy)
            advantages = whitened_advantages(rewards, self(tokens[:, :-1]), mask)
        errors = []
        for rows in torch.arange(len(tokens)).chunk(MINIBATCHES):
            logp = token_logprobs(model, tokens[rows], mask[rows], policy)
            loss = token_surrogate(logp, old_logp[rows], advantages[rows], mask[rows])
            take_step(optimizer, loss)
            values = self(tokens[rows, :-1])[mask[rows]]
            wanted = rewards[rows, None].expand(mask[rows].shape)[mask[rows]]
            error = (values - wanted).square().mean()
            take_step(self.optimizer, error)
            errors.append(float(error.detach()))
        return {"critic_error": sum(errors) / len(errors)}


def whitened_advantages(rewards, values, mask):
    """Return whitened GAE for gamma = lambda = 1: rewards (N,), values and mask (N, T-1)."""
    advantages = rewards[:, None] - values
    of_responses = advantages[mask]
    return (advantages - of_responses.mean()) / (of_responses.std() + 1e-6) * mask


def token_surrogate(logp, old_logp, advantages, mask):
    """Return minibupo.surrogate with an advantage for each token. All arguments are (N, T-1).

    Each token is passed to minibupo.surrogate as a row of its own.
    """
    logp, old_logp = (x[mask][:, None] for x in (logp, old_logp))
    loss, _ = surrogate(logp, old_logp, advantages[mask], mask[mask][:, None])
    return loss


def take_step(optimizer, loss):
    """Make one optimizer step down the gradient of a loss, clipped as in minibupo.update."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    for group in optimizer.param_groups:
        torch.nn.utils.clip_grad_norm_(group["params"], MAX_GRAD_NORM)
    optimizer.step()
