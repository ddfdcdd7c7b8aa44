"""Exercise 2: group advantages."""

import statistics

import torch
from checks.common import Case, Confusion, check_function

import minibupo

TITLE, MINUTES = "group advantages", 15
REFUSED = [(minibupo, "group_advantages")]
HINTS = (
    "A row of rewards is a group. Mean and std are over dim 1, with keepdim=True so that they "
    "can be subtracted from the row.",
    "Tensor.std divides by n - 1 (correction=1) unless told otherwise. numpy.std divides by n.",
    "Rounding can leave a tiny std for equal rewards. Compare the largest with the smallest "
    "reward, and use torch.where.",
)

REWARDS = [
    [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]],
    [[0.0, 2.0, 5.0], [1.0, 1.0, 4.0], [-3.0, 0.5, 0.25]],
    [[1.0, 0.0], [0.0, 1.0]],
    [[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]],
    [[0.5, 0.5, 0.5], [0.0, 0.0, 0.0], [0.3, 0.1, 0.2]],
]


def by_rows(one_row):
    """An outcome (Q, G) from a computation on the list of one row's rewards."""

    def outcome(rewards):
        rows = rewards.double().tolist()
        return torch.tensor([one_row(row) for row in rows], dtype=torch.float32)

    return outcome


def normed(row, std=statistics.stdev, eps=1e-6, centre=statistics.fmean):
    if max(row) == min(row):
        return [0.0] * len(row)
    return [(r - centre(row)) / (std(row) + eps) for r in row]


right = by_rows(normed)


def equal_is(value):
    """The right advantages, except where all rewards of a row are equal."""
    return by_rows(lambda row: normed(row) if max(row) > min(row) else [value] * len(row))


def whole_batch(rewards, centre_too=True):
    centred = rewards - (rewards.mean() if centre_too else rewards.mean(1, keepdim=True))
    return centred / (rewards.std() + 1e-6)


def of_others(row):
    return [r - (sum(row) - r) / (len(row) - 1) for r in row]


CONFUSIONS = (
    Confusion(
        "biased std",
        by_rows(lambda row: normed(row, statistics.pstdev)),
        "Your std divides by n. GRPO's is unbiased: n - 1.",
    ),
    Confusion(
        "std of the batch",
        lambda rewards: whole_batch(rewards, centre_too=False),
        "You subtract the group's mean, but divide by the std of the whole batch. An easy question "
        "then has small advantages only because others are hard.",
    ),
    Confusion(
        "whole batch",
        whole_batch,
        "Mean and std are those of the whole batch. Then every response to a hard question looks "
        "bad. (Reinforce++ does this; GRPO compares within a group.)",
    ),
    Confusion(
        "wrong axis",
        lambda rewards: right(rewards.T).T,
        "You went down the columns, and compared responses to different questions. A group is a "
        "row.",
    ),
    Confusion(
        "not divided",
        by_rows(lambda row: [r - statistics.fmean(row) for r in row]),
        "You subtract the mean, but do not divide by the std. (Dr. GRPO does this.)",
    ),
    Confusion(
        "variance",
        by_rows(lambda row: normed(row, statistics.variance)),
        "You divide by the variance. Its square root is wanted.",
    ),
    Confusion(
        "rloo",
        by_rows(of_others),
        "You compare each response with the mean of the others. That is RLOO, not GRPO.",
    ),
    Confusion(
        "not centred",
        by_rows(lambda row: normed(row, centre=lambda _: 0.0)),
        "You forgot to subtract the mean: only better than average is worth more.",
    ),
    Confusion(
        "nan",
        equal_is(float("nan")),
        "Equal rewards give NaN, from 0 / 0. One such question spoils the whole gradient.",
    ),
    Confusion(
        "equal is one",
        equal_is(1.0),
        "Where all are right no response was better than another: 0, not the reward.",
    ),
)


def check(answer, quick=False):
    cases = [Case(f"rewards {rows}", (torch.tensor(rows),)) for rows in REWARDS]
    check_function(answer, "group_advantages", cases, right, CONFUSIONS)
