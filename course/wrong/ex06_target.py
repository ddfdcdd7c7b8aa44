"""Incorrect answers to exercise 6 and the feedback that each must get."""

import numpy as np

import minibupo


def raising(dH_mlp):
    return [l for l, d in enumerate(dH_mlp[:-1], 1) if d > 0]


def found_or_error(dH_mlp, choose):
    if not raising(dH_mlp):
        raise ValueError("no layer")
    return choose(raising(dH_mlp))


def with_the_top(dH_mlp):
    layers = [l for l, d in enumerate(dH_mlp, 1) if d > 0]
    if not layers:
        raise ValueError("no layer")
    return layers[-1]


def from_0(dH_mlp):
    return found_or_error(dH_mlp, max) - 1


def one_above(dH_mlp):
    return found_or_error(dH_mlp, max) + 1


def first(dH_mlp):
    return found_or_error(dH_mlp, min)


def largest(dH_mlp):
    return found_or_error(dH_mlp, lambda layers: int(np.argmax(dH_mlp[:-1])) + 1)


def first_dip(dH_mlp):
    l = 0
    while l < len(dH_mlp) - 1 and dH_mlp[l] > 0:
        l += 1
    if l == 0:
        raise ValueError("no layer")
    return l


def zero(dH_mlp):
    layers = [l for l, d in enumerate(dH_mlp[:-1], 1) if d >= 0]
    if not layers:
        raise ValueError("no layer")
    return layers[-1]


def smallest(dH_mlp):
    return found_or_error(dH_mlp, lambda layers: min(layers, key=lambda l: dH_mlp[l - 1]))


def narrows(dH_mlp):
    layers = [l for l, d in enumerate(dH_mlp[:-1], 1) if d < 0]
    if not layers:
        raise ValueError("no layer")
    return layers[-1]


def nothing(dH_mlp):
    for l in reversed(raising(dH_mlp)):
        return l


def embedding(dH_mlp):
    return max(raising(dH_mlp), default=0)


def minus_one(dH_mlp):
    return max(raising(dH_mlp), default=-1)


def one_below_the_top(dH_mlp):
    return max(raising(dH_mlp), default=len(dH_mlp) - 1)


def index_error(dH_mlp):
    return raising(dH_mlp)[-1]


def library(dH_mlp):
    return minibupo.target_layer(dH_mlp)


def a_fraction(dH_mlp):
    return float(found_or_error(dH_mlp, max))


WRONG = [
    ("target_layer", with_the_top, "with the top"),
    ("target_layer", from_0, "from 0"),
    ("target_layer", one_above, "one above"),
    ("target_layer", first, "first"),
    ("target_layer", largest, "largest"),
    ("target_layer", first_dip, "first dip"),
    ("target_layer", zero, "zero"),
    ("target_layer", smallest, "smallest"),
    ("target_layer", narrows, "narrows"),
    ("target_layer", nothing, "gives None"),
    ("target_layer", embedding, "gives 0"),
    ("target_layer", minus_one, "gives -1"),
    ("target_layer", one_below_the_top, "gives L - 1"),
    ("target_layer", index_error, "gives IndexError"),
    ("target_layer", library, "library"),
    ("target_layer", a_fraction, "dtype"),
]
