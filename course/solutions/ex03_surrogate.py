"""Solution 3. With advantage 1, ratio 1.5 gives min(1.5, 1.2) = 1.2, which is constant, so the
gradient is 0: this token has become likely enough. Ratio 0.5 gives min(0.5, 0.8) = 0.5, which has a
gradient: a token that became too unlikely is brought back. With advantage -1, ratio 1.5 gives -1.5,
with a gradient, and ratio 0.5 gives -0.8, without one."""

import torch


def clipped_loss(logp, old_logp, advantages, mask, clip=0.2):
    ratio = (logp - old_logp).exp()  # pi / pi_old
    advantages = advantages[:, None]  # the same for all tokens of a response
    objective = torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -objective[mask].mean()  # indexing with the mask leaves the garbage out
