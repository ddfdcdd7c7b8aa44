"""Exercise 1: the mask of one row."""

import torch
from checks.common import Case, Confusion, check_function

import minibupo

TITLE, MINUTES = "which positions predict the response?", 10
REFUSED = [(minibupo, "response_mask")]
HINTS = (
    "The row has 8 tokens and the mask 7 columns. Write under each column the token that it is "
    "about.",
    "The first token of the response is token prompt_len. Which column is about it?",
    "torch.arange(T - 1) gives the columns t. Column t is True if prompt_len <= t + 1 < end.",
)

ROWS = {
    "the row of the task": (4, 6, 8),
    "a response that was cut off, without <eos>": (4, 8, 8),
    "a response of <eos> alone": (3, 4, 8),
    "a prompt of one token": (1, 5, 7),
    "a long prompt": (7, 9, 12),
}


def right(prompt_len, end, T):
    return torch.tensor([prompt_len <= t + 1 < end for t in range(T - 1)])


def span(first, stop, width):
    """A mask that is True from column `first` up to before `stop`."""
    return torch.tensor([first <= t < stop for t in range(width)])


CONFUSIONS = (
    Confusion(
        "tokens themselves",
        lambda p, end, T: span(p, end, T - 1),
        "You marked the response's tokens themselves. The logits at t are about token t + 1, so "
        "everything stands one column too far right.",
    ),
    Confusion(
        "tokens themselves, T columns",
        lambda p, end, T: span(p, end, T),
        "You marked the response's tokens themselves, in T columns. A mask over predictions has "
        "T - 1: column t is about token t + 1, and nothing follows the last token.",
    ),
    Confusion(
        "T columns",
        lambda p, end, T: span(p - 1, end - 1, T),
        "All but the width is right. The last position predicts nothing, so there are T - 1.",
    ),
    Confusion(
        "no eos",
        lambda p, end, T: span(p - 1, end - 2, T - 1),
        "You left out the last token of the response. <eos> is a decision of the policy: without "
        "it no one learns when to stop.",
    ),
    Confusion(
        "first token missing",
        lambda p, end, T: span(p, end - 1, T - 1),
        "The first token of the response is missing. It is predicted at the last position of the "
        "prompt, at `=`.",
    ),
    Confusion(
        "padding",
        lambda p, end, T: span(p - 1, T, T - 1),
        "You let the padding in. What follows <eos> was never chosen by the policy.",
    ),
    Confusion(
        "one too many",
        lambda p, end, T: span(p - 1, end, T - 1),
        "One column too many at the end: the logits at <eos> are about padding.",
    ),
    Confusion(
        "prompt",
        lambda p, end, T: span(0, end - 1, T - 1),
        "You let the prompt in. The policy did not choose it, so there is nothing to reward.",
    ),
    Confusion(
        "turned round",
        lambda p, end, T: ~right(p, end, T),
        "It is the other way round: True is for the response.",
    ),
)


def check(answer, quick=False):
    cases = [
        Case(f"prompt_len {row[0]}, end {row[1]}, T {row[2]} ({words})", row)
        for words, row in ROWS.items()
    ]
    check_function(answer, "response_mask", cases, right, CONFUSIONS)
