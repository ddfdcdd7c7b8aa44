"""Solution 1. Token t + 1 is in the response if prompt_len <= t + 1 < end: that is all."""

import torch


def response_mask(prompt_len: int, end: int, T: int):
    predicted = torch.arange(T - 1) + 1  # the token that each column is about
    return (predicted >= prompt_len) & (predicted < end)
