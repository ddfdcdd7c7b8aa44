"""Exercise 2: group advantages."""

import statistics

import torch
from checks.common import Case, Confusion, call, check_function

import minibupo

TITLE, MINUTES = "group advantages", 15
REFUSED = [(minibupo, "group_advantages")]
HINTS = (
    "A row of rewards is a group. Take mean and std over dim 1, with keepdim=True so that they can "
    "be subtracted from the row.",
    "Tensor.std divides by n - 1 (correction=1) by default. numpy.std divides by n.",
    "The mean of equal rewards may be rounded, so it need not equal them. Compare the largest "
    "reward with the smallest, and use torch.where.",
)

REWARDS = [
    [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]],
    [[0.0, 2.0, 5.0], [1.0, 1.0, 4.0], [-3.0, 0.5, 0.25]],
    [[1.0, 0.0], [0.0, 1.0]],
    [[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]],
    [[0.5, 0.5, 0.5], [0.0, 0.0, 0.0], [0.3, 0.1, 0.2]],
]
EQUAL = [[value / 10] * 7 for value in range(1, 20)]  # most of their means are rounded


def by_rows(one_row):
    """Return an outcome (Q, G) that computes each row from the list of its rewards."""

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
    """Return an outcome that is correct except for rows of equal rewards, which give `value`."""
    return by_rows(lambda row: normed(row) if max(row) > min(row) else [value] * len(row))


def whole_batch(rewards, centre_too=True):
    centred = rewards - (rewards.mean() if centre_too else rewards.mean(1, keepdim=True))
    return centred / (rewards.std() + 1e-6)


def all_zero(function, rewards):
    """Whether a learner's advantages are exactly 0."""
    found = call(function, rewards)
    return not bool(found.any()) if isinstance(found, torch.Tensor) else found


def of_others(row):
    return [r - (sum(row) - r) / (len(row) - 1) for r in row]


CONFUSIONS = (
    Confusion(
        "biased std",
        by_rows(lambda row: normed(row, statistics.pstdev)),
        "Your std divides by n. GRPO uses the unbiased one, which divides by n - 1.",
    ),
    Confusion(
        "std of the batch",
        lambda rewards: whole_batch(rewards, centre_too=False),
        "You subtract the group's mean, but divide by the std of the whole batch. The advantages "
        "of one question then depend on how difficult the other questions are.",
    ),
    Confusion(
        "whole batch",
        whole_batch,
        "You take mean and std over the whole batch. Then every response to a difficult question "
        "looks bad. (Reinforce++ does this; GRPO compares within a group.)",
    ),
    Confusion(
        "wrong axis",
        lambda rewards: right(rewards.T).T,
        "You went down the columns, and so compared responses to different questions. A group is a "
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
        "You divide by the variance instead of its square root.",
    ),
    Confusion(
        "rloo",
        by_rows(of_others),
        "You compare each response with the mean of the others. That is RLOO, not GRPO.",
    ),
    Confusion(
        "not centred",
        by_rows(lambda row: normed(row, centre=lambda _: 0.0)),
        "You did not subtract the mean. An advantage is positive only for rewards above the mean.",
    ),
    Confusion(
        "nan",
        equal_is(float("nan")),
        "Equal rewards give NaN, from 0 / 0. One such question makes the whole gradient NaN.",
    ),
    Confusion(
        "equal is one",
        equal_is(1.0),
        "If all responses are correct, none was better than another: the advantage is 0, not the "
        "reward.",
    ),
)

EQUAL_CONFUSIONS = (
    Confusion(
        "rounding",
        lambda rewards: False,
        "The mean of equal numbers may be rounded, and a rounding error of 6e-8 divided by 1e-6 is "
        "no longer small. Compare the rewards themselves.",
    ),
)


def check(answer, quick=False):
    cases = [Case(f"rewards {rows}", (torch.tensor(rows),)) for rows in REWARDS]
    check_function(answer, "group_advantages", cases, right, CONFUSIONS)
    equal = [Case("seven equal rewards, such as 0.7 seven times", (torch.tensor(EQUAL),))]
    check_function(
        answer,
        "group_advantages",
        equal,
        lambda rewards: True,
        EQUAL_CONFUSIONS,
        all_zero,
        compare=lambda found, wanted: "is not exactly 0",
    )
