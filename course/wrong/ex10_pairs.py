"""Incorrect answers to exercise 10 and the feedback that each must get."""

from pathlib import Path

import numpy as np
import torch

import minibupo
from minibupo import Policy

T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 8: 2.365}


def no_root_of_n(differences):
    return np.mean(differences), T95[len(differences)] * np.std(differences, ddof=1)


def of_a_normal_distribution(differences):
    n = len(differences)
    return np.mean(differences), 1.96 * np.std(differences, ddof=1) / np.sqrt(n)


def one_error(differences):
    n = len(differences)
    return np.mean(differences), np.std(differences, ddof=1) / np.sqrt(n)


def biased(differences):
    n = len(differences)
    return np.mean(differences), T95[n] * np.std(differences) / np.sqrt(n)


def divided_by_n(differences):
    n = len(differences)
    return np.mean(differences), T95[n] * np.std(differences, ddof=1) / n


def half(differences):
    n = len(differences)
    return T95[n] * np.std(differences, ddof=1) / np.sqrt(n)


def whole(differences):
    return np.mean(differences), 2 * half(differences)


def bounds(differences):
    mean = np.mean(differences)
    return mean - half(differences), mean + half(differences)


def yields(model, optimizer, rollouts, step):
    yield minibupo.update(model, optimizer, rollouts, Policy(3))


def of_three_arguments(model, optimizer, sample):
    minibupo.update(model, optimizer, sample(1), Policy(3))


def above_the_top(model, optimizer, rollouts, step):
    minibupo.update(model, optimizer, rollouts, Policy(model.n_layer + 1))


def grpo_again(model, optimizer, rollouts, step):
    minibupo.update(model, optimizer, rollouts, minibupo.FULL)


def no_training(model, optimizer, rollouts, step):
    return rollouts.rewards.mean()


def to_infinity(model, optimizer, rollouts, step):
    if step == 20:
        with torch.no_grad():
            model.final_norm.weight.mul_(float("inf"))


WRONG = [
    ("interval", no_root_of_n, "no root of n"),
    ("interval", of_a_normal_distribution, "1.96"),
    ("interval", one_error, "no t"),
    ("interval", biased, "biased"),
    ("interval", divided_by_n, "divided by n"),
    ("interval", half, "type"),
    ("interval", whole, "whole width"),
    ("interval", bounds, "bounds"),
    ("variant", yields, "generator"),
    ("variant", of_three_arguments, "arguments"),
    ("variant", above_the_top, "exception"),
    ("variant", grpo_again, "no variant"),
    ("variant", no_training, "no training"),
    ("variant", to_infinity, "not finite"),
]

GOOD = (Path(__file__).parent.parent / "solutions" / "report.md").read_text(encoding="utf-8")
EMPTY = (Path(__file__).parent.parent / "report_template.md").read_text(encoding="utf-8")
SECTIONS = GOOD.split("\n## ")
VAGUE = list(SECTIONS)
NO_INTERVAL = list(SECTIONS)
VAGUE[2] = "Prediction\n\nIt will help.\n"
NO_INTERVAL[4] = "Result\n\nThe variant is 2.0 points better.\n"

WRONG_REPORTS = [
    (EMPTY, "empty section"),
    ("\n## ".join(SECTIONS[:5]), "empty section"),
    ("\n## ".join([SECTIONS[i] for i in (0, 1, 3, 4, 2, 5)]), "order"),
    ("\n## ".join(VAGUE), "vague prediction"),
    ("\n## ".join(NO_INTERVAL), "no interval"),
]
