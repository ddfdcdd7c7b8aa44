"""Incorrect answers to exercise 3 and the feedback that each must get."""

import torch

import minibupo


def pieces(logp, old_logp, advantages, clip=0.2):
    ratio = (logp - old_logp).exp()
    return ratio * advantages[:, None], ratio.clamp(1 - clip, 1 + clip) * advantages[:, None]


def clip_without_min(logp, old_logp, advantages, mask, clip=0.2):
    ratio = (logp - old_logp).exp().clamp(1 - clip, 1 + clip)
    return -(ratio * advantages[:, None])[mask].mean()


def no_clip(logp, old_logp, advantages, mask, clip=0.2):
    return -pieces(logp, old_logp, advantages)[0][mask].mean()


def larger(logp, old_logp, advantages, mask, clip=0.2):
    return -torch.maximum(*pieces(logp, old_logp, advantages))[mask].mean()


def objective(logp, old_logp, advantages, mask, clip=0.2):
    return torch.minimum(*pieces(logp, old_logp, advantages))[mask].mean()


def upside_down(logp, old_logp, advantages, mask, clip=0.2):
    return -torch.minimum(*pieces(old_logp, logp, advantages))[mask].mean()


def no_exp(logp, old_logp, advantages, mask, clip=0.2):
    ratio, A = logp - old_logp, advantages.unsqueeze(1)
    return -torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A)[mask].mean()


def min_of_ratios(logp, old_logp, advantages, mask, clip=0.2):
    ratio = (logp - old_logp).exp()
    smaller = torch.minimum(ratio, ratio.clamp(1 - clip, 1 + clip))
    return -(smaller * advantages[:, None])[mask].mean()


def around_0(logp, old_logp, advantages, mask, clip=0.2):
    ratio, A = (logp - old_logp).exp(), advantages[:, None]
    return -torch.minimum(ratio * A, ratio.clamp(-clip, clip) * A)[mask].mean()


def no_ratio(logp, old_logp, advantages, mask, clip=0.2):
    return -(logp * advantages[:, None])[mask].mean()


def mean_of_means(logp, old_logp, advantages, mask, clip=0.2):
    objective = torch.minimum(*pieces(logp, old_logp, advantages)) * mask
    return -(objective.sum(1) / mask.sum(1)).mean()


def mean_over_padding(logp, old_logp, advantages, mask, clip=0.2):
    return -(torch.minimum(*pieces(logp, old_logp, advantages)) * mask).mean()


def no_mask(logp, old_logp, advantages, mask, clip=0.2):
    return -torch.minimum(*pieces(logp, old_logp, advantages)).mean()


def total(logp, old_logp, advantages, mask, clip=0.2):
    return -torch.minimum(*pieces(logp, old_logp, advantages))[mask].sum()


def by_responses(logp, old_logp, advantages, mask, clip=0.2):
    return -(torch.minimum(*pieces(logp, old_logp, advantages)) * mask).sum() / len(mask)


def one_ratio(logp, old_logp, advantages, mask, clip=0.2):
    ratio = ((logp - old_logp) * mask).sum(1).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()


def gspo(logp, old_logp, advantages, mask, clip=0.2):
    length = mask.sum(1)
    ratio = (((logp - old_logp) * mask).sum(1) / length).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()


def one_sided(**bounds):
    def clipped_loss(logp, old_logp, advantages, mask, clip=0.2):
        ratio = (logp - old_logp).exp()
        A = advantages[:, None]
        return -torch.minimum(ratio * A, ratio.clamp(**bounds) * A)[mask].mean()

    return clipped_loss


def log_ratio_clipped(logp, old_logp, advantages, mask, clip=0.2):
    log_ratio = logp - old_logp
    A = advantages[:, None]
    return -torch.minimum(log_ratio.exp() * A, log_ratio.clamp(-clip, clip).exp() * A)[mask].mean()


def no_gradient(logp, old_logp, advantages, mask, clip=0.2):
    return -torch.minimum(*pieces(logp.detach(), old_logp, advantages))[mask].mean()


def a_number(logp, old_logp, advantages, mask, clip=0.2):
    return -float(torch.minimum(*pieces(logp, old_logp, advantages))[mask].mean())


def both_move(logp, old_logp, advantages, mask, clip=0.2):
    old_logp = old_logp + logp - logp.detach()
    return -torch.minimum(*pieces(logp, old_logp, advantages))[mask].mean()


def library(logp, old_logp, advantages, mask, clip=0.2):
    return minibupo.surrogate(logp, old_logp, advantages, mask, clip=clip)[0]


def logs_divided(logp, old_logp, advantages, mask, clip=0.2):
    ratio = logp / old_logp
    both = ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None]
    return -torch.minimum(*both)[mask].mean()


def ratio_always_1(logp, old_logp, advantages, mask, clip=0.2):
    return -torch.minimum(*pieces(logp, logp.detach(), advantages))[mask].mean()


def clip_ignored(logp, old_logp, advantages, mask, clip=0.2):
    ratio = (logp - old_logp).exp()
    both = ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None]
    return -torch.minimum(*both)[mask].mean()


def in_place(logp, old_logp, advantages, mask, clip=0.2):
    old_logp.copy_(torch.where(mask, old_logp, 0.0))
    return -torch.minimum(*pieces(logp, old_logp, advantages))[mask].mean()


WRONG = [
    ("clipped_loss", clip_without_min, "clip without min"),
    ("clipped_loss", no_clip, "no clip"),
    ("clipped_loss", larger, "max"),
    ("clipped_loss", objective, "sign"),
    ("clipped_loss", upside_down, "ratio upside down"),
    ("clipped_loss", no_exp, "no exp"),
    ("clipped_loss", logs_divided, "logs divided"),
    ("clipped_loss", ratio_always_1, "ratio always 1"),
    ("clipped_loss", clip_ignored, "clip ignored"),
    ("clipped_loss", min_of_ratios, "min of ratios"),
    ("clipped_loss", around_0, "around 0"),
    ("clipped_loss", no_ratio, "no ratio"),
    ("clipped_loss", mean_of_means, "sequence"),
    ("clipped_loss", mean_over_padding, "padded tokens"),
    ("clipped_loss", no_mask, "garbage"),
    ("clipped_loss", total, "sum"),
    ("clipped_loss", by_responses, "responses"),
    ("clipped_loss", one_ratio, "sequence ratio"),
    ("clipped_loss", gspo, "gspo"),
    ("clipped_loss", one_sided(max=1.2), "upper clip only"),
    ("clipped_loss", one_sided(min=0.8), "lower clip only"),
    ("clipped_loss", log_ratio_clipped, "clip of the log-ratio"),
    ("clipped_loss", no_gradient, "no gradient"),
    ("clipped_loss", a_number, "type"),
    ("clipped_loss", both_move, "no gradient flows"),
    ("clipped_loss", library, "library"),
    ("clipped_loss", in_place, "changes input"),
]
