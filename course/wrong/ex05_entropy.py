"""Incorrect answers to exercise 5 and the feedback that each must get."""

import math

import torch
from torch.nn.functional import log_softmax, softmax

import minibupo


def good(logits):
    log_pi = log_softmax(logits, -1)
    return -torch.nan_to_num(log_pi.exp() * log_pi).sum(-1)


def bits(logits):
    return good(logits) / math.log(2)


def softmax_twice(logits):
    return good(softmax(logits, -1))


def sign(logits):
    return -good(logits)


def mean(logits):
    log_pi = log_softmax(logits, -1)
    return -torch.nan_to_num(log_pi.exp() * log_pi).mean(-1)


def share(logits):
    return good(logits) / math.log(logits.shape[-1])


def no_pi(logits):
    return -log_softmax(logits, -1).sum(-1)


def all_at_once(logits):
    log_pi = log_softmax(logits, -1)
    return -torch.nan_to_num(log_pi.exp() * log_pi).sum()


def softmax_over_dim_0(logits):
    log_pi = log_softmax(logits, 0)
    return -torch.nan_to_num(log_pi.exp() * log_pi).sum(-1)


def everything_over_dim_0(logits):
    log_pi = log_softmax(logits, 0)
    return -torch.nan_to_num(log_pi.exp() * log_pi).sum(0)


def overflow(logits):
    weights = logits.exp()
    pi = weights / weights.sum(-1, keepdim=True)
    return -torch.where(pi == 0, 0.0, pi * pi.log()).sum(-1)


def zero_log_zero(logits):
    pi = softmax(logits, -1)
    return -(pi * pi.log()).sum(-1)


def minus_infinity(logits):
    log_pi = log_softmax(logits, -1)
    return -(log_pi.exp() * log_pi).sum(-1)


def library(logits):
    return minibupo.entropy(logits)


def change(written, read, sign=1):
    def ffn_entropy_change(model, tokens):
        def of(trace, name):
            return good(model.unembed(getattr(trace, name)))

        rows = [of(trace, written) - of(trace, read) for trace in model.trace(tokens)]
        return sign * torch.stack(rows)

    return ffn_entropy_change


def nothing_subtracted(model, tokens):
    return torch.stack([good(model.unembed(trace.mlp_out)) for trace in model.trace(tokens)])


def final_norm(model, tokens):
    rows = []
    for trace in model.trace(tokens):
        read = good(model.unembed(model.final_norm(trace.resid_mid)))
        rows.append(good(model.unembed(trace.mlp_out)) - read)
    return torch.stack(rows)


def written_normed(model, tokens):
    rows = []
    for trace in model.trace(tokens):
        written = good(model.unembed(model.final_norm(trace.mlp_out)))
        rows.append(written - good(model.unembed(trace.mlp_in)))
    return torch.stack(rows)


def normed(written, read):
    def ffn_entropy_change(model, tokens):
        def of(trace, name):
            return good(model.unembed(model.final_norm(getattr(trace, name))))

        return torch.stack([of(t, written) - of(t, read) for t in model.trace(tokens)])

    return ffn_entropy_change


def scaled(model, tokens):
    rows = []
    for trace in model.trace(tokens):
        unit = torch.nn.functional.normalize(trace.mlp_out, dim=-1)
        written = unit * trace.mlp_in.norm(dim=-1, keepdim=True)
        rows.append(good(model.unembed(written)) - good(model.unembed(trace.mlp_in)))
    return torch.stack(rows)


def no_unembedding(model, tokens):
    return torch.stack([good(t.mlp_out) - good(t.mlp_in) for t in model.trace(tokens)])


def mean_over_positions(model, tokens):
    return change("mlp_out", "mlp_in")(model, tokens).mean((1, 2))


def as_a_list(model, tokens):
    return list(change("mlp_out", "mlp_in")(model, tokens))


WRONG = [
    ("entropy", bits, "bits"),
    ("entropy", softmax_twice, "softmax twice"),
    ("entropy", sign, "sign"),
    ("entropy", mean, "mean over tokens"),
    ("entropy", share, "share of log V"),
    ("entropy", no_pi, "no pi"),
    ("entropy", all_at_once, "all at once"),
    ("entropy", softmax_over_dim_0, "softmax over dim 0"),
    ("entropy", everything_over_dim_0, "everything over dim 0"),
    ("entropy", overflow, "overflow"),
    ("entropy", zero_log_zero, "zero log zero"),
    ("entropy", minus_infinity, "minus infinity"),
    ("entropy", library, "library"),
    ("ffn_entropy_change", change("mlp_out", "resid_mid"), "raw input"),
    ("ffn_entropy_change", change("mlp_out", "resid_pre"), "enters the layer"),
    ("ffn_entropy_change", change("mlp_out", "attn_in"), "attention's input"),
    ("ffn_entropy_change", change("mlp_out", "mlp_in", -1), "before minus after"),
    ("ffn_entropy_change", final_norm, "final norm"),
    ("ffn_entropy_change", written_normed, "written, normed"),
    ("ffn_entropy_change", normed("mlp_out", "mlp_in"), "final norm on both"),
    ("ffn_entropy_change", normed("mlp_out", "resid_mid"), "logit lens on both"),
    ("ffn_entropy_change", normed("resid_post", "resid_mid"), "logit lens of the stream"),
    ("ffn_entropy_change", scaled, "scaled"),
    ("ffn_entropy_change", change("resid_post", "resid_mid"), "stream after and before"),
    ("ffn_entropy_change", nothing_subtracted, "no difference"),
    ("ffn_entropy_change", change("resid_post", "mlp_in"), "after the ffn"),
    ("ffn_entropy_change", change("resid_post", "resid_pre"), "dH of layers"),
    ("ffn_entropy_change", change("attn_out", "attn_in"), "dH of attention"),
    ("ffn_entropy_change", no_unembedding, "no unembedding"),
    ("ffn_entropy_change", mean_over_positions, "shape"),
    ("ffn_entropy_change", as_a_list, "type"),
]
