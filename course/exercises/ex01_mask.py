"""Exercise 1 (10 minutes): which positions predict a token of the response?

A row of T tokens holds a prompt, a response that ends in <eos>, and padding:

    t         0  1  2  3  4    5      6      7
    token     1  +  2  =  3  <eos>  <pad>  <pad>      prompt_len 4, end 6, T 8

RL changes the probability of the response's tokens, <eos> among them. The logits at position t are
about token t + 1, so the last position predicts nothing that we have: there are T - 1 columns.
Return the mask of one row, (T-1,) of bool: True at t if the logits at t are about a token of the
response. prompt_len: tokens of the prompt; end: one past the last token of the response.

Work out the row above on paper first. A response that was cut off has no <eos>, and end = T.
"""

import torch  # noqa: F401


def response_mask(prompt_len: int, end: int, T: int):
    raise NotImplementedError
