"""Solution 2. For 1, 0, 0, 0 the mean is 1/4. The squared deviations sum to 3/4, and 3/4 divided by
n - 1 = 3 is 1/4, so std is 1/2. The advantages are 1.5, -0.5, -0.5, -0.5."""

import torch


def group_advantages(rewards):
    centred = rewards - rewards.mean(1, keepdim=True)
    advantages = centred / (rewards.std(1, keepdim=True) + 1e-6)  # std divides by n - 1
    # 1e-6 avoids 0/0. But in float32 the mean of seven times 0.7 is not exactly 0.7, and that error
    # divided by 1e-6 is no longer small. Equal rewards are therefore found by comparing them.
    equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    return torch.where(equal, 0.0, advantages)
