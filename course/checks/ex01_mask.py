"""Exercise 1: the mask of one row."""

import numpy as np
import torch
from checks.common import Case, Confusion, call, check_function

import minibupo

TITLE, MINUTES = "which positions predict the response?", 10
REFUSED = [(minibupo, "response_mask")]
HINTS = (
    "The row has 8 tokens and the mask 7 columns. Under each column write the token that it "
    "predicts.",
    "The first token of the response is token prompt_len. Which column predicts it?",
    "torch.arange(T - 1) gives the columns t. Column t is True if prompt_len <= t + 1 < end.",
)

ROWS = {
    "the row of the task": (4, 6, 8),
    "a response without <eos>, stopped by the limit": (4, 8, 8),
    "a response that is only <eos>": (3, 4, 8),
    "a prompt of one token": (1, 5, 7),
    "a long prompt": (7, 9, 12),
}


def right(prompt_len, end, T):
    return torch.tensor([prompt_len <= t + 1 < end for t in range(T - 1)])


def as_tensor(function, *args):
    """Return the learner's mask as a tensor if it is a list, a tuple or an array."""
    mask = call(function, *args)
    if not isinstance(mask, (list, tuple, np.ndarray)):
        return mask
    try:
        return torch.as_tensor(np.array(mask))
    except (TypeError, ValueError):  # a list of something else
        return mask


def span(first, stop, width):
    """Return a mask that is True from column `first` up to, but not including, column `stop`."""
    return torch.tensor([first <= t < stop for t in range(width)])


CONFUSIONS = (
    Confusion(
        "tokens themselves",
        lambda p, end, T: span(p, end, T - 1),
        "You marked the response's tokens themselves. The logits at t predict token t + 1, so "
        "each mark must move one column to the left.",
    ),
    Confusion(
        "tokens themselves, T columns",
        lambda p, end, T: span(p, end, T),
        "You marked the response's tokens themselves, in T columns. A mask over predictions has "
        "T - 1: column t predicts token t + 1, and nothing follows the last token.",
    ),
    Confusion(
        "T columns",
        lambda p, end, T: span(p - 1, end - 1, T),
        "The marks are correct, but the width is not. The last position predicts nothing, so there "
        "are T - 1 columns.",
    ),
    Confusion(
        "no eos",
        lambda p, end, T: span(p - 1, end - 2, T - 1),
        "You left out the last token of the response. <eos> is a decision of the policy: if it is "
        "not trained, the model does not learn when to stop.",
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
        "You included the padding. The policy did not choose what follows <eos>.",
    ),
    Confusion(
        "one too many",
        lambda p, end, T: span(p - 1, end, T - 1),
        "There is one column too many at the end: the logits at <eos> predict padding.",
    ),
    Confusion(
        "prompt",
        lambda p, end, T: span(0, end - 1, T - 1),
        "You included the prompt. The policy did not choose it, so there is nothing to reward.",
    ),
    Confusion(
        "turned round",
        lambda p, end, T: ~right(p, end, T),
        "The mask is inverted: True must mark the response.",
    ),
)


def check(answer, quick=False):
    cases = [
        Case(f"prompt_len {row[0]}, end {row[1]}, T {row[2]} ({words})", row)
        for words, row in ROWS.items()
    ]
    check_function(answer, "response_mask", cases, right, CONFUSIONS, as_tensor)
