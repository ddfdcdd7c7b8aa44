"""Exercise 3 (30 minutes): the clipped surrogate of Eq. 4, as a loss to minimise.

logp, old_logp (N, T): the log-probability of each token under the policy, now and before the
batch's first update. advantages (N,): one per response. mask (N, T) bool: True for tokens of the
response; the values elsewhere are garbage. With ratio = pi / pi_old, the objective of a token is

    min(ratio * advantage, clip(ratio, 1 - clip, 1 + clip) * advantage)

Return minus its mean over *all* tokens of all responses: a scalar with a gradient. (The official
scripts do the same. Eq. 4 as printed averages over the tokens of each response first.)

On paper first: which of the two products is smaller for advantage 1 and ratio 1.5, or 0.5? And for
advantage -1? In which of these four cases is the gradient 0?
"""

import torch


def clipped_loss(logp, old_logp, advantages, mask, clip=0.2):
    raise NotImplementedError
