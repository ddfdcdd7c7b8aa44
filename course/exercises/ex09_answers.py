"""Exercise 9 (1 hour): let every layer answer, and explain what you see.

1. accuracies(model, problems, samples): the shares of right answers of pi_Layer^1, .., pi_Layer^L,
   and last of pi_theta, all at temperature 1: a list of L + 1 numbers in 0..1.
   model.truncated(l) is pi_Layer^l as a model of its own; train_toy.respond samples (with
   `settings`), responses gives texts, is_right judges. Predict the order before you look.
2. pi_Layer^L comes out far above pi_theta, though both read the same H^L. Why? Look for it:
   matching_temperature(model, tokens, mask): the temperature of pi_theta with the same mean
   entropy as pi_Layer^L at temperature 1, at the positions of mask (tokens (N, T), mask (N, T-1)).
3. WHY: the letter of the explanation below that your numbers bear out.
"""

import torch  # noqa: F401

import train_toy

settings = train_toy.Settings()  # what respond wants to know
generator = torch.Generator().manual_seed(0)


def accuracies(model, problems, samples):
    raise NotImplementedError


def matching_temperature(model, tokens, mask):
    raise NotImplementedError


# A  The final norm throws away something that H^L still knows.
# B  pi_Layer^L explores more, and so finds more right answers.
# C  H^L is longer than its normed copy, so its softmax is sharper, as at a low temperature.
# D  The weights of the final norm fit this task badly.
# E  Phase 1 of BuPO has trained internal policies to answer.
WHY = None
