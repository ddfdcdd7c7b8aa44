"""Incorrect answers to exercise 2 and the feedback that each must get."""

import numpy as np
import torch

import minibupo


def biased_std(rewards):
    rewards = rewards.numpy()
    std = np.std(rewards, axis=1, keepdims=True)
    return torch.from_numpy((rewards - rewards.mean(1, keepdims=True)) / (std + 1e-6))


def std_of_the_batch(rewards):
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std() + 1e-6)


def whole_batch(rewards):
    return (rewards - rewards.mean()) / (rewards.std() + 1e-6)


def columns(rewards):
    return (rewards - rewards.mean(0)) / (rewards.std(0) + 1e-6)


def not_divided(rewards):
    return rewards - rewards.mean(1, keepdim=True)


def variance(rewards):
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.var(1, keepdim=True) + 1e-6)


def mean_of_the_others(rewards):
    G = rewards.shape[1]
    return rewards - (rewards.sum(1, keepdim=True) - rewards) / (G - 1)


def not_centred(rewards):
    return rewards / (rewards.std(1, keepdim=True) + 1e-6)


def no_eps(rewards):
    return (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)


def equal_is_one(rewards):
    advantages = torch.zeros_like(rewards)
    for i, row in enumerate(rewards):
        same = (row == row[0]).all()
        advantages[i] = 1.0 if same else (row - row.mean()) / (row.std() + 1e-6)
    return advantages


def formula_alone(rewards):
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)


def library(rewards):
    return minibupo.group_advantages(rewards)


def flat(rewards):
    return torch.tensor([0.0])


WRONG = [
    ("group_advantages", biased_std, "biased std"),
    ("group_advantages", std_of_the_batch, "std of the batch"),
    ("group_advantages", whole_batch, "whole batch"),
    ("group_advantages", columns, "wrong axis"),
    ("group_advantages", not_divided, "not divided"),
    ("group_advantages", variance, "variance"),
    ("group_advantages", mean_of_the_others, "rloo"),
    ("group_advantages", not_centred, "not centred"),
    ("group_advantages", no_eps, "nan"),
    ("group_advantages", equal_is_one, "equal is one"),
    ("group_advantages", formula_alone, "rounding"),
    ("group_advantages", library, "library"),
    ("group_advantages", flat, "shape"),
]
