"""Exercise 3: the clipped surrogate, its value and its gradient."""

from functools import partial
from math import exp, inf

import torch
from checks.common import Case, Confusion, Wrong, call, check_function

import minibupo

TITLE, MINUTES = "the clipped surrogate", 30
REFUSED = [(minibupo, "surrogate"), (minibupo, "policy_loss")]
HINTS = (
    "pi / pi_old is exp(logp - old_logp). The advantages need a second dimension: advantages[:, "
    "None].",
    "Compute both products and take their elementwise torch.min.",
    "The mean is over objective[mask], so a long response counts more than a short one.",
)

T, F = True, False
INPUTS = {  # log-ratios, advantages, mask
    "one token, ratio 1.5, advantage 1": ([[0.405]], [1.0], [[T]]),
    "one token, ratio 0.5, advantage 1": ([[-0.693]], [1.0], [[T]]),
    "one token, ratio 1.5, advantage -1": ([[0.405]], [-1.0], [[T]]),
    "one token, ratio 0.5, advantage -1": ([[-0.693]], [-1.0], [[T]]),
    "ratio 1 everywhere, as in the first mini-batch": ([[0.0, 0.0]], [1.5], [[T, T]]),
    "a short and a long response, with padding": (
        [[0.1, 0.9, 3.0, -2.0], [-0.1, 0.3, -0.4, 0.05]],
        [1.5, -0.5],
        [[F, T, F, F], [T, T, T, T]],
    ),
    "three responses, one of them with advantage 0": (
        [[0.3, -0.3, 0.1], [0.2, -1.0, 0.5], [0.15, 0.25, 1.0]],
        [1.0, 0.0, -2.0],
        [[T, T, F], [T, T, T], [F, T, F]],
    ),
}


def cases():
    for words, (log_ratio, advantages, mask) in INPUTS.items():
        log_ratio = torch.tensor(log_ratio)
        old_logp = torch.linspace(-0.5, -2.5, log_ratio.numel()).view_as(log_ratio)
        args = (old_logp + log_ratio, old_logp, torch.tensor(advantages), torch.tensor(mask))
        yield Case(words, args)


def objective(logp, old_logp, advantage, low=0.8, high=1.2, choose=min):
    """Return the objective of one token, and its derivative with respect to logp."""
    ratio = exp(logp - old_logp)
    free, clipped = ratio * advantage, min(max(ratio, low), high) * advantage
    value = choose(free, clipped)
    moves = value == free if choose in (min, max) else low < ratio < high
    return value, ratio * advantage if moves else 0.0


def loss(token=objective, average="token", sign=-1):
    """Return the loss as a plain loop over tokens; each option is a mistake that it can make."""

    def outcome(logp, old_logp, advantages, mask, part=0):
        total, N, width = 0.0, *mask.shape
        for i in range(N):
            for t in range(width):
                if mask[i, t] or average == "garbage":
                    value = token(float(logp[i, t]), float(old_logp[i, t]), float(advantages[i]))
                    weight = {"sequence": N * int(mask[i].sum()), "sum": 1, "garbage": N * width}
                    weight |= {"padded": N * width, "token": int(mask.sum()), "rows": N}
                    total += value[part] / weight[average]
        return torch.tensor(sign * total)

    return outcome


def gradient(logp, old_logp, advantages, mask):
    """Return the gradient with respect to logp, in closed form."""
    grad = torch.zeros(logp.shape)
    for i, t in mask.nonzero().tolist():
        grad[i, t] = objective(float(logp[i, t]), float(old_logp[i, t]), float(advantages[i]))[1]
    return -grad / mask.sum()


def through(function, logp, *args):
    """Return the gradient of a learner's loss with respect to logp."""
    logp = logp.requires_grad_()
    result = call(function, logp, *args)
    if not result.requires_grad:
        says = (
            "The value is correct, but it has no gradient, so nothing would be learned. Do not use "
        )
        raise Wrong("no gradient", says + ".item(), detach or no_grad on logp.")
    return torch.autograd.grad(result, logp)[0]


def clipped_only(logp, old_logp, advantage):
    return objective(logp, old_logp, advantage, choose=lambda free, clipped: clipped)


def unclipped(logp, old_logp, advantage):
    return objective(logp, old_logp, advantage, choose=lambda free, clipped: free)


def larger(logp, old_logp, advantage):
    return objective(logp, old_logp, advantage, choose=max)


def upside_down(logp, old_logp, advantage):
    return objective(old_logp, logp, advantage)


def log_ratio(logp, old_logp, advantage):
    ratio = logp - old_logp
    return (min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage),)


def min_of_ratios(logp, old_logp, advantage):
    return (min(exp(logp - old_logp), min(max(exp(logp - old_logp), 0.8), 1.2)) * advantage,)


def divided_logs(logp, old_logp, advantage):
    ratio = logp / old_logp
    return (min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage),)


def always_1(logp, old_logp, advantage):
    return (advantage,)


def clip_of_0_2(logp, old_logp, advantages, mask, clip):
    return loss()(logp, old_logp, advantages, mask)


def around_0(logp, old_logp, advantage):
    return objective(logp, old_logp, advantage, low=-0.2, high=0.2)


def no_ratio(logp, old_logp, advantage):
    return (logp * advantage,)


def one_ratio(logp, old_logp, advantages, mask, by_length=False):
    """The loss with one ratio per response; by_length: the geometric mean over its tokens."""
    log_ratios = ((logp - old_logp) * mask).sum(1)
    if by_length:
        log_ratios = log_ratios / mask.sum(1)
    ratio = log_ratios.exp()
    return -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()


CONFUSIONS = (
    Confusion(
        "clip without min",
        loss(clipped_only),
        "You clip, but do not take the minimum. A token that an update moved in the wrong "
        "direction (ratio 0.5, advantage 1) is then clipped as well, and nothing brings it back.",
    ),
    Confusion(
        "no clip",
        loss(unclipped),
        "Nothing is clipped: this is ratio * advantage alone.",
    ),
    Confusion(
        "upper clip only",
        loss(partial(objective, low=-inf)),
        "You clip the ratio from above only. With a negative advantage a ratio below 1 - clip is "
        "clipped as well.",
    ),
    Confusion(
        "lower clip only",
        loss(partial(objective, high=inf)),
        "You clip the ratio from below only. With a positive advantage a ratio above 1 + clip is "
        "clipped as well.",
    ),
    Confusion(
        "clip of the log-ratio",
        loss(partial(objective, low=exp(-0.2), high=exp(0.2))),
        "You clip the log-ratio to -clip .. clip, which allows ratios from 0.819 to 1.221. Take "
        "exp first, and clip the ratio to 1 - clip .. 1 + clip.",
    ),
    Confusion(
        "max",
        loss(larger),
        "You take the larger of the two products; the objective takes the smaller one. (If you "
        "change the sign first, min becomes max.)",
    ),
    Confusion(
        "sign",
        loss(sign=1),
        "The sign is inverted: minimising this would make bad responses more likely.",
    ),
    Confusion(
        "ratio upside down",
        loss(upside_down),
        "Your ratio is pi_old / pi. It must be pi / pi_old, which is exp(logp - old_logp).",
    ),
    Confusion(
        "logs divided",
        loss(divided_logs),
        "You divide log-probabilities. The ratio of probabilities is exp of their difference.",
    ),
    Confusion(
        "ratio always 1",
        loss(always_1),
        "Your ratio is 1 everywhere. logp - logp.detach() is correct only before the first "
        "optimizer step; the denominator is old_logp.",
    ),
    Confusion("no exp", loss(log_ratio), "This is the log of the ratio. Take exp of it."),
    Confusion(
        "min of ratios",
        loss(min_of_ratios),
        "You take the minimum of the ratios and multiply afterwards. With a negative advantage the "
        "smaller ratio has the larger product, so multiply first.",
    ),
    Confusion("around 0", loss(around_0), "A ratio is clipped around 1: to 1 - clip .. 1 + clip."),
    Confusion(
        "no ratio",
        loss(no_ratio),
        "This is log pi * advantage, the plain policy gradient. Use the ratio instead of log pi.",
    ),
    Confusion(
        "sequence",
        loss(average="sequence"),
        "You average within each response first, so a token of a long response counts less. That "
        "is Eq. 4 as printed; here the mean is over all tokens.",
    ),
    Confusion(
        "padded tokens",
        loss(average="padded"),
        "You divide by all positions, including padding. Divide by the tokens of the responses.",
    ),
    Confusion(
        "garbage",
        loss(average="garbage"),
        "You did not use the mask: garbage is in your mean.",
    ),
    Confusion("sum", loss(average="sum"), "This is the sum over tokens; the mean is wanted."),
    Confusion(
        "responses",
        loss(average="rows"),
        "You divide the sum over tokens by the number of responses instead of tokens.",
    ),
    Confusion(
        "sequence ratio",
        one_ratio,
        "You have one ratio for a whole response, the product over its tokens. GRPO has one ratio "
        "for each token.",
    ),
    Confusion(
        "gspo",
        partial(one_ratio, by_length=True),
        "You have one ratio for a whole response, the geometric mean over its tokens. That is "
        "GSPO; GRPO has one ratio for each token.",
    ),
)

CLIP_CONFUSIONS = (
    Confusion(
        "clip ignored", clip_of_0_2, "You always clip at 0.2 and ignore the argument `clip`."
    ),
)

GRADIENT_CONFUSIONS = (
    Confusion(
        "no gradient flows",
        lambda logp, *rest: torch.zeros_like(logp),
        "The value of the loss is correct, but its gradient is 0. Does old_logp move with logp?",
    ),
)


def check(answer, quick=False):
    inputs = list(cases())
    check_function(answer, "clipped_loss", inputs, loss(), CONFUSIONS)
    check_function(
        answer,
        "clipped_loss",
        inputs,
        gradient,
        GRADIENT_CONFUSIONS,
        through,
        what="the gradient by logp of ",
    )
    args = (*inputs[0].args, 0.1)  # of ratio 1.5 and advantage 1
    narrow = [Case("one token, ratio 1.5, advantage 1, clip 0.1", args)]
    check_function(answer, "clipped_loss", narrow, lambda *_: torch.tensor(-1.1), CLIP_CONFUSIONS)
