"""Exercise 6: the rule for the layer of phase 1."""

from checks.common import Case, Confusion, check_function

import minibupo

TITLE, MINUTES = "the target layer", 10
REFUSED = [(minibupo, "target_layer")]
HINTS = (
    "Write the layer's number, from 1, above each value, and strike out the top one.",
    "enumerate(d_mlp[:-1], 1) gives the layers 1..L-1 with their values.",
    "Collect the layers with d > 0. The answer is the last of them; if there is none, raise "
    "ValueError.",
)

VALUES = [
    [1.22, 0.14, 0.48, 0.01, -0.36, -0.55],
    [1.22, 0.14, -0.2, 0.01, -0.36, 0.55],
    [0.3, -0.1, 0.2],
    [0.5, 0.2, 0.0, -0.1],
    [0.1, 0.9, 0.4, -0.2, 0.3],
    [0.9, 0.1, 0.4, 0.6, 0.2],
    [-0.2, -0.1, 0.3],
    [0.0, -0.4],
]


def pick(choose, top=0, least=lambda d: d > 0, otherwise=ValueError):
    """The rule with a few things changed: which of the layers found, and where to look."""

    def outcome(d_mlp):
        found = [l for l in range(1, len(d_mlp) + top) if least(d_mlp[l - 1])]
        return choose(found, d_mlp) if found else otherwise

    return outcome


def last(found, d_mlp):
    return found[-1]


def gives(value):
    """The rule, with another outcome than ValueError where there is no such layer."""

    def outcome(d_mlp):
        return pick(last, otherwise=len(d_mlp) - 1 if value == "L - 1" else value)(d_mlp)

    return outcome


def largest(found, d_mlp):
    return max(found, key=lambda l: d_mlp[l - 1])


def before_first_dip(found, d_mlp):
    run = [l for l in found if all(d > 0 for d in d_mlp[:l])]
    return run[-1] if run else ValueError


CONFUSIONS = (
    Confusion(
        "with the top",
        pick(last, top=1),
        "The top layer counts for you. The rule wants a layer *below* it: above layer L nothing is "
        "left to build on it.",
    ),
    Confusion(
        "from 0",
        pick(lambda found, d: found[-1] - 1),
        "Your layers start at 0; here they are 1..L. One layer too low would be trained.",
    ),
    Confusion(
        "one above",
        pick(lambda found, d: found[-1] + 1),
        "One layer too high: this one narrows down already (or you count from 2).",
    ),
    Confusion(
        "first",
        pick(lambda found, d: found[0]),
        "This is the first layer that explores, not the last.",
    ),
    Confusion(
        "largest",
        pick(largest),
        "This is the layer that raises entropy most. The rule asks for the last one, however "
        "little it raises.",
    ),
    Confusion(
        "first dip",
        pick(before_first_dip),
        "You stop at the first layer that does not raise entropy. A later one may raise it again.",
    ),
    Confusion(
        "zero", pick(last, least=lambda d: d >= 0), "0 is not above 0: that FFN explores nothing."
    ),
    Confusion(
        "smallest",
        pick(lambda found, d: min(found, key=lambda l: d[l - 1])),
        "This is the layer whose rise is closest to 0. The rule goes by position, not by size.",
    ),
    Confusion(
        "narrows",
        pick(last, least=lambda d: d < 0),
        "This is the last layer that *lowers* entropy.",
    ),
    *(
        Confusion(
            f"gives {getattr(value, '__name__', value)}",
            gives(value),
            f"Where no layer below the top raises entropy, you {does}. Raise ValueError with a "
            "sentence: whoever trains must choose.",
        )
        for value, does in (
            (None, "return nothing, and a run would train something else without a word"),
            (0, "give layer 0, the embedding"),
            ("L - 1", "take layer L - 1 all the same"),
            (-1, "give -1, which Python takes for the last layer"),
            (IndexError, "stop with IndexError, which tells nobody what is wrong"),
        )
    ),
)


def check(answer, quick=False):
    cases = [Case(f"dH_FFN {values}", (values,)) for values in VALUES]
    check_function(answer, "target_layer", cases, pick(last), CONFUSIONS)
