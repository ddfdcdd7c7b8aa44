"""Solution 2. For 1, 0, 0, 0: mean 1/4; squared deviations 9/16 + 3/16 = 3/4, divided by n - 1 = 3
that is 1/4, so std is 1/2. The advantages are 1.5, -0.5, -0.5, -0.5."""

import torch


def group_advantages(rewards):
    centred = rewards - rewards.mean(1, keepdim=True)
    advantages = centred / (rewards.std(1, keepdim=True) + 1e-6)  # std divides by n - 1
    # 1e-6 keeps 0/0 away. But the mean of seven times 0.1 need not be 0.1 to the last bit, and that
    # error divided by 1e-6 is no longer small. So equal rewards are found by comparing them.
    equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    return torch.where(equal, 0.0, advantages)
