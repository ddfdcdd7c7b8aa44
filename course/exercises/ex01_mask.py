"""Exercise 1 (10 minutes): which positions predict a token of the response?

A row of T tokens contains a prompt, a response that ends in <eos>, and padding:

    t         0  1  2  3  4    5      6      7
    token     1  +  2  =  3  <eos>  <pad>  <pad>      prompt_len 4, end 6, T 8

RL changes the probability of the response's tokens, including <eos>. The logits at position t
predict token t + 1. The last position predicts nothing that we have, so the mask has T - 1 columns.
Return the mask of one row, T - 1 bools (a tensor, an array or a list): True at t if the logits at t
predict a token of the response. prompt_len is the number of tokens in the prompt; end is one past
the response's last token. A response that the limit stopped has no <eos>, and end = T.

Work out the row above on paper before you write any code.
"""

import torch


def response_mask(prompt_len: int, end: int, T: int):
    raise NotImplementedError
