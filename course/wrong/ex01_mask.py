"""Incorrect answers to exercise 1 and the feedback that each must get."""

import torch


def tokens_themselves(prompt_len, end, T):
    mask = torch.zeros(T - 1, dtype=torch.bool)
    mask[prompt_len:end] = True
    return mask


def tokens_in_T_columns(prompt_len, end, T):
    t = torch.arange(T)
    return (t >= prompt_len) & (t < end)


def T_columns(prompt_len, end, T):
    t = torch.arange(T)
    return (t >= prompt_len - 1) & (t < end - 1)


def without_eos(prompt_len, end, T):
    mask = torch.zeros(T - 1, dtype=torch.bool)
    mask[prompt_len - 1 : end - 2] = True
    return mask


def from_the_second_token(prompt_len, end, T):
    t = torch.arange(T - 1)
    return (t >= prompt_len) & (t < end - 1)


def with_padding(prompt_len, end, T):
    return torch.arange(T - 1) >= prompt_len - 1


def with_the_first_padding(prompt_len, end, T):
    t = torch.arange(1, T)
    return (t >= prompt_len) & (t <= end)


def with_the_prompt(prompt_len, end, T):
    return torch.arange(T - 1) < end - 1


def turned_round(prompt_len, end, T):
    t = torch.arange(T - 1)
    return (t < prompt_len - 1) | (t >= end - 1)


def as_numbers(prompt_len, end, T):
    t = torch.arange(T - 1)
    return ((t >= prompt_len - 1) & (t < end - 1)).long()


def as_a_set(prompt_len, end, T):
    return {t for t in range(T - 1) if prompt_len <= t + 1 < end}


def as_a_list_of_tokens(prompt_len, end, T):
    return [prompt_len <= t < end for t in range(T - 1)]


WRONG = [
    ("response_mask", tokens_themselves, "tokens themselves"),
    ("response_mask", tokens_in_T_columns, "tokens themselves, T columns"),
    ("response_mask", T_columns, "T columns"),
    ("response_mask", without_eos, "no eos"),
    ("response_mask", from_the_second_token, "first token missing"),
    ("response_mask", with_padding, "padding"),
    ("response_mask", with_the_first_padding, "one too many"),
    ("response_mask", with_the_prompt, "prompt"),
    ("response_mask", turned_round, "turned round"),
    ("response_mask", as_numbers, "dtype"),
    ("response_mask", as_a_set, "type"),
    ("response_mask", as_a_list_of_tokens, "tokens themselves"),
]
