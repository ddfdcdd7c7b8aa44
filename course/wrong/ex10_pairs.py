"""Wrong answers to exercise 10 and the feedback that each must get."""

from pathlib import Path

import numpy as np
import torch

import minibupo
from minibupo import Policy

T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 8: 2.365}


def no_root_of_n(differences):
    return np.mean(differences), T95[len(differences)] * np.std(differences, ddof=1)


def normal(differences):
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


def not_a_generator(model, optimizer, sample, steps):
    for step in range(1, steps + 1):
        minibupo.update(model, optimizer, sample(step))


def stopped(model, optimizer, sample, steps):
    yield from minibupo.bupo(model, optimizer, sample, Policy(model.n_layer + 1), 3, steps)


def grpo_again(model, optimizer, sample, steps):
    for step in range(1, steps + 1):
        yield minibupo.update(model, optimizer, sample(step))


def phases_from_1(model, optimizer, sample, steps):
    yield from minibupo.bupo(model, optimizer, sample, Policy(3), 3, 3)
    yield from minibupo.bupo(model, optimizer, sample, Policy(4), 3, steps)


def no_training(model, optimizer, sample, steps):
    for step in range(1, steps + 1):
        yield sample(step)


def to_infinity(model, optimizer, sample, steps):
    for step in range(1, steps + 1):
        yield sample(step)
    with torch.no_grad():
        model.final_norm.weight.mul_(float("inf"))


WRONG = [
    ("interval", no_root_of_n, "no root of n"),
    ("interval", normal, "1.96"),
    ("interval", one_error, "no t"),
    ("interval", biased, "biased"),
    ("interval", divided_by_n, "divided by n"),
    ("interval", half, "type"),
    ("interval", whole, "whole width"),
    ("interval", bounds, "bounds"),
    ("variant", not_a_generator, "no generator"),
    ("variant", stopped, "exception"),
    ("variant", grpo_again, "no variant"),
    ("variant", phases_from_1, "steps"),
    ("variant", no_training, "no training"),
    ("variant", to_infinity, "not finite"),
]

GOOD = (Path(__file__).parent.parent / "solutions" / "report.md").read_text(encoding="utf-8")
EMPTY = (Path(__file__).parent.parent / "report_template.md").read_text(encoding="utf-8")
SECTIONS = GOOD.split("\n## ")
VAGUE, NO_INTERVAL = list(SECTIONS), list(SECTIONS)
VAGUE[2] = "Prediction\n\nIt will help.\n"
NO_INTERVAL[4] = "Result\n\nThe variant is 2.0 points better.\n"

WRONG_REPORTS = [
    (EMPTY, "empty section"),
    ("\n## ".join(SECTIONS[:5]), "empty section"),
    ("\n## ".join([SECTIONS[i] for i in (0, 1, 3, 4, 2, 5)]), "order"),
    ("\n## ".join(VAGUE), "vague prediction"),
    ("\n## ".join(NO_INTERVAL), "no interval"),
]
