"""Wrong answers to exercise 6 and the feedback that each must get."""

import numpy as np

import minibupo


def raising(d_mlp):
    return [l for l, d in enumerate(d_mlp[:-1], 1) if d > 0]


def found_or_error(d_mlp, choose):
    if not raising(d_mlp):
        raise ValueError("no layer")
    return choose(raising(d_mlp))


def with_the_top(d_mlp):
    layers = [l for l, d in enumerate(d_mlp, 1) if d > 0]
    if not layers:
        raise ValueError("no layer")
    return layers[-1]


def from_0(d_mlp):
    return found_or_error(d_mlp, max) - 1


def one_above(d_mlp):
    return found_or_error(d_mlp, max) + 1


def first(d_mlp):
    return found_or_error(d_mlp, min)


def largest(d_mlp):
    return found_or_error(d_mlp, lambda layers: int(np.argmax(d_mlp[:-1])) + 1)


def first_dip(d_mlp):
    l = 0
    while l < len(d_mlp) - 1 and d_mlp[l] > 0:
        l += 1
    if l == 0:
        raise ValueError("no layer")
    return l


def zero(d_mlp):
    layers = [l for l, d in enumerate(d_mlp[:-1], 1) if d >= 0]
    if not layers:
        raise ValueError("no layer")
    return layers[-1]


def smallest(d_mlp):
    return found_or_error(d_mlp, lambda layers: min(layers, key=lambda l: d_mlp[l - 1]))


def narrows(d_mlp):
    layers = [l for l, d in enumerate(d_mlp[:-1], 1) if d < 0]
    if not layers:
        raise ValueError("no layer")
    return layers[-1]


def nothing(d_mlp):
    for l in reversed(raising(d_mlp)):
        return l


def embedding(d_mlp):
    return max(raising(d_mlp), default=0)


def minus_one(d_mlp):
    return max(raising(d_mlp), default=-1)


def one_below_the_top(d_mlp):
    return max(raising(d_mlp), default=len(d_mlp) - 1)


def index_error(d_mlp):
    return raising(d_mlp)[-1]


def library(d_mlp):
    return minibupo.target_layer(d_mlp)


def a_fraction(d_mlp):
    return float(found_or_error(d_mlp, max))


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
