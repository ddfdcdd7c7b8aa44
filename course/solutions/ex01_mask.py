"""Solution 1. Token t + 1 belongs to the response if prompt_len <= t + 1 < end."""

import torch


def response_mask(prompt_len: int, end: int, T: int):
    predicted = torch.arange(T - 1) + 1  # the token that each column predicts
    return (predicted >= prompt_len) & (predicted < end)
