"""Exercise 9 (1 hour): let every layer answer, and explain what you see.

1. accuracies(model, problems, samples): the share of correct answers of pi_Layer^1, .., pi_Layer^L,
   and last of pi_theta, all at temperature 1: a list of L + 1 numbers in 0..1.
   model.truncated(l) is pi_Layer^l as a model of its own. train_toy.sample_responses samples (it
   needs `settings`), response_texts returns texts, and is_correct judges one. Predict the order of
   the layers first.
2. pi_Layer^L scores far above pi_theta, though both read the same H^L. To find out why, write
   matching_temperature(model, tokens, mask): the temperature at which pi_theta has the same mean
   entropy as pi_Layer^L at temperature 1, at the positions of mask (tokens (N, T), mask (N, T-1)).
3. WHY: the letter of the explanation below that your numbers support.
"""

import torch

import train_toy

settings = train_toy.Settings()  # sample_responses needs it
generator = torch.Generator().manual_seed(0)


def accuracies(model, problems, samples):
    raise NotImplementedError


def matching_temperature(model, tokens, mask):
    raise NotImplementedError


# A  The final norm loses something that H^L still contains.
# B  pi_Layer^L explores more, and so finds more correct answers.
# C  H^L has a larger norm than its normed copy, so its softmax is sharper: a low temperature.
# D  The weights of the final norm fit this task badly.
# E  Phase 1 of BuPO has trained internal policies to answer.
WHY = None
