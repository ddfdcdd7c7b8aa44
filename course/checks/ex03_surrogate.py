"""Exercise 3: the clipped surrogate, its value and its gradient."""

from math import exp

import torch
from checks.common import Case, Confusion, Wrong, call, check_function

import minibupo

TITLE, MINUTES = "the clipped surrogate", 30
REFUSED = [(minibupo, "surrogate"), (minibupo, "policy_loss")]
HINTS = (
    "pi / pi_old is exp(logp - old_logp). The advantages need another dimension: advantages[:, "
    "None].",
    "Compute both products and take torch.min of them, element by element.",
    "The mean is over objective[mask]: a long response counts for more than a short one.",
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
    """Of one token, and its derivative by logp."""
    ratio = exp(logp - old_logp)
    free, clipped = ratio * advantage, min(max(ratio, low), high) * advantage
    value = choose(free, clipped)
    moves = value == free if choose in (min, max) else low < ratio < high
    return value, ratio * advantage if moves else 0.0


def loss(token=objective, average="token", sign=-1):
    """The loss as a plain loop over tokens, with what may be wrong in it as options."""

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
    """The gradient by logp, in closed form."""
    grad = torch.zeros(logp.shape)
    for i, t in mask.nonzero().tolist():
        grad[i, t] = objective(float(logp[i, t]), float(old_logp[i, t]), float(advantages[i]))[1]
    return -grad / mask.sum()


def through(function, logp, *args):
    """The gradient by logp that a learner's loss has."""
    logp = logp.requires_grad_()
    result = call(function, logp, *args)
    if not result.requires_grad:
        says = "The value is right, but it has no gradient: no .item(), detach or no_grad on the "
        raise Wrong("no gradient", says + "way. Nothing would be learned.")
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


def one_ratio(logp, old_logp, advantages, mask):
    """The ratio of whole sequences instead of tokens."""
    log_ratios = ((logp - old_logp) * mask).sum(1)
    ratio, clipped = log_ratios.exp(), log_ratios.exp().clamp(0.8, 1.2)
    return -torch.min(ratio * advantages, clipped * advantages).mean()


CONFUSIONS = (
    Confusion(
        "clip without min",
        loss(clipped_only),
        "You clip, but without min. A token that the update pushed the wrong way (ratio 0.5, "
        "advantage 1) is clipped then, too, and nothing brings it back.",
    ),
    Confusion(
        "no clip", loss(unclipped), "Nothing is clipped: this is the bare ratio * advantage."
    ),
    Confusion(
        "max",
        loss(larger),
        "You take the larger of the two. The objective takes the smaller one; if you turn the sign "
        "first, min becomes max.",
    ),
    Confusion(
        "sign",
        loss(sign=1),
        "The sign: this is the objective. Minimising it would make bad responses likelier.",
    ),
    Confusion(
        "ratio upside down", loss(upside_down), "Your ratio is pi_old / pi: exp(logp - old_logp)."
    ),
    Confusion(
        "logs divided",
        loss(divided_logs),
        "You divide log-probabilities. The ratio of probabilities is exp of their difference.",
    ),
    Confusion(
        "ratio always 1",
        loss(always_1),
        "Your ratio is 1 everywhere. logp - logp.detach() is right only before the first step; "
        "below the line stands old_logp.",
    ),
    Confusion("no exp", loss(log_ratio), "This is the log of the ratio. Take exp of it."),
    Confusion(
        "min of ratios",
        loss(min_of_ratios),
        "You take the minimum of the ratios and multiply afterwards. With a negative advantage the "
        "smaller ratio has the larger product: multiply first.",
    ),
    Confusion("around 0", loss(around_0), "A ratio is clipped around 1: to 1 - clip .. 1 + clip."),
    Confusion(
        "no ratio",
        loss(no_ratio),
        "This is log pi * advantage, the plain policy gradient. Here it is the ratio.",
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
        "You divide by all positions, padding among them. Divide by the tokens of the responses.",
    ),
    Confusion("garbage", loss(average="garbage"), "You forgot the mask: garbage is in your mean."),
    Confusion("sum", loss(average="sum"), "This is the sum over tokens; the mean is wanted."),
    Confusion(
        "responses",
        loss(average="rows"),
        "You divide the sum over tokens by the number of responses instead of tokens.",
    ),
    Confusion(
        "sequence ratio",
        one_ratio,
        "You have one ratio for a whole response. GRPO has one for each token. (GSPO is about "
        "whole responses.)",
    ),
)

CLIP_CONFUSIONS = (
    Confusion("clip ignored", clip_of_0_2, "You clip at 0.2, whatever the argument `clip` says."),
)

GRADIENT_CONFUSIONS = (
    Confusion(
        "no gradient flows",
        lambda logp, *rest: torch.zeros_like(logp),
        "The value is right, but the gradient is 0. Does old_logp move along with logp?",
    ),
)


def check(answer, quick=False):
    inputs = list(cases())
    check_function(answer, "clipped_loss", inputs, loss(), CONFUSIONS)
    check_function(answer, "clipped_loss", inputs, gradient, GRADIENT_CONFUSIONS, through)
    args = (*inputs[0].args, 0.1)  # of ratio 1.5 and advantage 1
    narrow = [Case("one token, ratio 1.5, advantage 1, clip 0.1", args)]
    check_function(answer, "clipped_loss", narrow, lambda *_: torch.tensor(-1.1), CLIP_CONFUSIONS)
