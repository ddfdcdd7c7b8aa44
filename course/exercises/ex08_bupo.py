"""Exercise 8 (1 hour): put BuPO together from its pieces, and train to 90%.

1. improve(model, optimizer, rollouts, policy): one pass over a batch. rollouts has tokens (N, T),
   prompt_len and end (N,), and rewards (Q, G). N = Q G; responses to a question are neighbours.
   Old log-probabilities are those of `policy` before the first optimizer step. Then take Q / 4
   questions at a time, in order: zero the gradient, policy_loss, backward, clip the gradient's norm
   to 1 (torch.nn.utils.clip_grad_norm_), step. Q is a multiple of 4.
2. bupo(model, optimizer, sample, target, s_inter, steps): Algorithm 1, a loop over steps 1..steps.
   Each step calls sample(step) and then improve, for `target` in the first s_inter steps and for
   FULL in the others.
The check compares your weights after each step with its own, on a small model, and then trains
course/base.pt (about a minute) to 90% at n = 3. Read the docstrings of the pieces first. Leave out
the reset of AdamW's moments between the phases, which only the library has.
"""

import torch


def improve(model, optimizer, rollouts, policy):
    raise NotImplementedError


def bupo(model, optimizer, sample, target, s_inter, steps):
    raise NotImplementedError
