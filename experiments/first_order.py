"""What a step of phase 1 is worth, predicted without training: the first-order worth.

    worth_1 = <g, delta_l> / <g, delta>

delta_l is how minibupo.update changes the weights from one batch in phase 1 at layer l, and delta
is how it changes them in GRPO, both with fresh moments of AdamW. g is the gradient of the expected
reward, estimated from another batch. So worth_1 is how much the expected reward rises with a step
of phase 1, in steps of GRPO, to first order. Products are over all weights.

    batches = [...]                               # minibupo.Rollouts of the model, three or more
    steps = {"GRPO": policy_step(FULL, lr), "layer 3": policy_step(Policy(3), lr)}
    found = rises(model, batches, steps)
    value, half = first_order_worth(found["layer 3"], found["GRPO"])

It looks at one step from the model as it is. It does not know what later steps of phase 1 do, how
the policies change meanwhile, or what another task would give.
"""

from functools import partial

import numpy as np
import torch

from experiments import common
from minibupo import FULL, Policy, update


def policy_step(policy: Policy, lr: float, frozen=lambda model: [], **options):
    """Return a function that makes one update on a batch: step(model, rollouts).

    frozen(model) returns the parameters that stay as they are.
    """

    def step(model, rollouts):
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
        for parameter in frozen(model):
            parameter.requires_grad_(False)
        update(model, optimizer, rollouts, policy, **options)
        for parameter in frozen(model):
            parameter.requires_grad_(True)

    return step


def reward_gradient(model, rollouts, chunk=64) -> list[torch.Tensor]:
    """Return the gradient of the expected reward by parameter, estimated from a batch.

    It is the mean over responses of (reward - mean of the group) * gradient of log pi(response).
    """
    rewards = rollouts.rewards
    weights = (rewards - rewards.mean(1, keepdim=True)).flatten().to(model.device)
    common.backward(model, rollouts, FULL, weights / len(weights), chunk)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return gradients


@torch.no_grad()
def weight_change(model, step) -> list[torch.Tensor]:
    """Return how step(model) changes each parameter. Afterwards the model is as it was before."""
    before = [p.clone() for p in model.parameters()]
    with torch.enable_grad():
        step(model)
    change = [p - old for p, old in zip(model.parameters(), before)]
    for parameter, old in zip(model.parameters(), before):
        parameter.copy_(old)
    model.zero_grad(set_to_none=True)
    return change


def rises(model, batches: list, steps: dict, chunk=64) -> dict[str, np.ndarray]:
    """Return {name: (B, B)}: element i, j is <g of batch j, weight change by a step on batch i>.

    Raises ValueError if all responses to each question have the same reward.
    """
    if all((batch.rewards == batch.rewards[:, :1]).all() for batch in batches):
        raise ValueError("all responses to a question have the same reward: there is no gradient")
    gradients = [reward_gradient(model, batch, chunk) for batch in batches]
    found = {name: np.zeros((len(batches), len(batches))) for name in steps}
    for name, step in steps.items():
        for i, batch in enumerate(batches):
            change = weight_change(model, partial(step, rollouts=batch))
            for j, gradient in enumerate(gradients):
                found[name][i, j] = sum(float((g * d).sum()) for g, d in zip(gradient, change))
            del change  # it takes as much memory as the model
    return found


def first_order_worth(rise: np.ndarray, rise_of_grpo: np.ndarray) -> tuple[float, float]:
    """Return worth_1 and half of its 95% interval, by the jackknife over batches.

    Only products of different batches count: a batch's own gradient would flatter its update.
    """
    from scipy.stats import t

    B = len(rise)
    if B < 3:
        raise ValueError(f"an interval needs at least 3 batches, not {B}")

    def ratio(batches):
        others = np.ix_(batches, batches)
        different = ~np.eye(len(batches), dtype=bool)
        return rise[others][different].sum() / rise_of_grpo[others][different].sum()

    value = ratio(range(B))
    without = [ratio([i for i in range(B) if i != left_out]) for left_out in range(B)]
    pseudo_values = B * value - (B - 1) * np.array(without)
    half = t.ppf(0.975, B - 1) * pseudo_values.std(ddof=1) / B**0.5
    return float(value), float(half)
