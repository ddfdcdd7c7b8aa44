"""Exercise 6: the rule for the layer of phase 1."""

from checks.common import Case, Confusion, check_function

import minibupo

TITLE, MINUTES = "the target layer", 10
REFUSED = [(minibupo, "target_layer")]
HINTS = (
    "Write the layer's number, from 1, above each value, and cross out the top one.",
    "enumerate(dH_mlp[:-1], 1) gives the layers 1..L-1 with their values.",
    "Collect the layers with a value above 0. The answer is the last of them; if there are none, "
    "raise ValueError.",
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


def pick(choose, top=0, condition=lambda d: d > 0, otherwise=ValueError):
    """Return the rule as an outcome, with mistakes as options: the choice among the layers found,
    whether the top layer counts (top=1), the condition, and the outcome if no layer is found."""

    def outcome(dH_mlp):
        found = [l for l in range(1, len(dH_mlp) + top) if condition(dH_mlp[l - 1])]
        return choose(found, dH_mlp) if found else otherwise

    return outcome


def last(found, dH_mlp):
    return found[-1]


def gives(value):
    """Return the rule as an outcome, with another outcome than ValueError if no layer is found."""

    def outcome(dH_mlp):
        return pick(last, otherwise=len(dH_mlp) - 1 if value == "L - 1" else value)(dH_mlp)

    return outcome


def largest(found, dH_mlp):
    return max(found, key=lambda l: dH_mlp[l - 1])


def before_first_dip(found, dH_mlp):
    run = [l for l in found if all(d > 0 for d in dH_mlp[:l])]
    return run[-1] if run else ValueError


CONFUSIONS = (
    Confusion(
        "with the top",
        pick(last, top=1),
        "You include the top layer. The rule takes a layer *below* it, because no layer above "
        "layer L could build on it.",
    ),
    Confusion(
        "from 0",
        pick(lambda found, d: found[-1] - 1),
        "You count layers from 0; here they are 1..L. The layer below would be trained.",
    ),
    Confusion(
        "one above",
        pick(lambda found, d: found[-1] + 1),
        "Your layer is one too high: its FFN already lowers entropy.",
    ),
    Confusion(
        "first",
        pick(lambda found, d: found[0]),
        "This is the first layer that explores, not the last.",
    ),
    Confusion(
        "largest",
        pick(largest),
        "This is the layer that raises entropy most. The rule takes the last one that raises it, "
        "even if only a little.",
    ),
    Confusion(
        "first dip",
        pick(before_first_dip),
        "You stop at the first layer that does not raise entropy. A later one may raise it again.",
    ),
    Confusion(
        "zero",
        pick(last, condition=lambda d: d >= 0),
        "You include a layer with dH = 0, whose FFN does not raise entropy.",
    ),
    Confusion(
        "smallest",
        pick(lambda found, d: min(found, key=lambda l: d[l - 1])),
        "This is the layer with the smallest rise. The rule goes by position, not by size.",
    ),
    Confusion(
        "narrows",
        pick(last, condition=lambda d: d < 0),
        "This is the last layer that *lowers* entropy.",
    ),
    *(
        Confusion(
            f"gives {getattr(value, '__name__', value)}",
            gives(value),
            f"If no layer below the top raises entropy, you {does}. Raise ValueError with a "
            "sentence: the user has to choose a layer.",
        )
        for value, does in (
            (None, "return None, and a run would silently train another policy"),
            (0, "return layer 0, the embedding"),
            ("L - 1", "return layer L - 1 anyway"),
            (-1, "return -1, which Python reads as the last layer"),
            (IndexError, "stop with IndexError, which does not say what is wrong"),
        )
    ),
)


def check(answer, quick=False):
    cases = [Case(f"dH_FFN {values}", (values,)) for values in VALUES]
    check_function(answer, "target_layer", cases, pick(last), CONFUSIONS)
