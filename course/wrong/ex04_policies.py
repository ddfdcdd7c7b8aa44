"""Incorrect answers to exercise 4 and the feedback that each must get."""

import minibupo
from minibupo import Policy


def normed(model, tokens, l):
    return model.unembed(model.final_norm(model.residual(tokens, l)))


def normed_at_the_top(model, tokens, l):
    h = model.residual(tokens, l)
    return model(tokens) if l == model.n_layer else model.unembed(h)


def one_below(model, tokens, l):
    states = [model.embed(tokens), *(trace.resid_pre for trace in model.trace(tokens))]
    return model.unembed(states[l])


def stream_before_the_layer(model, tokens, l):
    return model.unembed(list(model.trace(tokens))[l - 1].resid_pre)


def from_the_list(model, tokens, l):
    return model.unembed(list(model.trace(tokens))[l - 1].resid_post)


def nothing_for_0(model, tokens, l):
    for number, trace in enumerate(model.trace(tokens), 1):
        if number == l:
            return model.unembed(trace.resid_post)


def one_above(model, tokens, l):
    states = [trace.resid_post for trace in model.trace(tokens)]
    return model.unembed(states[min(l, len(states) - 1)])


def in_the_middle(model, tokens, l):
    states = [model.embed(tokens), *(trace.resid_mid for trace in model.trace(tokens))]
    return model.unembed(states[l])


def what_it_adds(model, tokens, l):
    if l == 0:
        return model.unembed(model.embed(tokens))
    trace = list(model.trace(tokens))[l - 1]
    return model.unembed(trace.attn_out + trace.mlp_out)


def pi_theta(model, tokens, l):
    return model(tokens)


def sum_of_sums(model, tokens, l):
    h = model.embed(tokens)
    for trace in list(model.trace(tokens))[:l]:
        h = h + trace.resid_post
    return model.unembed(h)


def probabilities(model, tokens, l):
    return model.unembed(model.residual(tokens, l)).softmax(-1)


def log_probabilities(model, tokens, l):
    return model.unembed(model.residual(tokens, l)).log_softmax(-1)


def input_embedding(model, tokens, l):
    return model.residual(tokens, l) @ model.embed.weight.T


def library(model, tokens, l):
    return minibupo.policy_logits(model, tokens, Policy(l))


def cut_short(model, tokens, l):
    return model.truncated(l)(tokens)


def module_from(attention, ffn):
    def module_logits(model, tokens, l, module):
        trace = list(model.trace(tokens))[l - 1]
        return model.unembed(getattr(trace, attention if module == "attention" else ffn))

    return module_logits


def called_mlp(model, tokens, l, module):
    trace = list(model.trace(tokens))[l - 1]
    written = trace.attn_out
    if module == "mlp":
        written = trace.mlp_out
    return model.unembed(written)


def no_case_for_ffn(model, tokens, l, module):
    trace = list(model.trace(tokens))[l - 1]
    if module == "attention":
        return model.unembed(trace.attn_out)
    if module == "mlp":
        return model.unembed(trace.mlp_out)


def both_modules(model, tokens, l, module):
    trace = list(model.trace(tokens))[l - 1]
    return model.unembed(trace.resid_post - trace.resid_pre)


def module_at(by):
    def module_logits(model, tokens, l, module):
        traces = list(model.trace(tokens))
        trace = traces[min(max(l - 1 + by, 0), len(traces) - 1)]
        return model.unembed(trace.attn_out if module == "attention" else trace.mlp_out)

    return module_logits


def module_normed(model, tokens, l, module):
    trace = list(model.trace(tokens))[l - 1]
    return model.unembed(
        model.final_norm(trace.attn_out if module == "attention" else trace.mlp_out)
    )


WRONG = [
    ("layer_logits", normed, "final norm"),
    ("layer_logits", normed_at_the_top, "norm at the top"),
    ("layer_logits", one_below, "layer below"),
    ("layer_logits", stream_before_the_layer, "layer below"),
    ("layer_logits", from_the_list, "last layer for 0"),
    ("layer_logits", nothing_for_0, "returns None"),
    ("layer_logits", one_above, "layer above"),
    ("layer_logits", in_the_middle, "before the ffn"),
    ("layer_logits", what_it_adds, "write"),
    ("layer_logits", pi_theta, "pi_theta"),
    ("layer_logits", sum_of_sums, "sum of sums"),
    ("layer_logits", probabilities, "probabilities"),
    ("layer_logits", log_probabilities, "log-probabilities"),
    ("layer_logits", input_embedding, "embedding for unembedding"),
    ("layer_logits", library, "library"),
    ("layer_logits", cut_short, "library"),
    ("module_logits", module_from("attn_in", "mlp_in"), "reads"),
    ("module_logits", module_from("resid_pre", "resid_mid"), "reads, raw"),
    ("module_logits", module_from("resid_mid", "resid_post"), "after the write"),
    ("module_logits", module_from("mlp_out", "attn_out"), "modules swapped"),
    ("module_logits", module_from("mlp_out", "mlp_out"), "always the ffn"),
    ("module_logits", module_from("resid_mid", "mlp_out"), "stream for attention"),
    ("module_logits", module_from("attn_out", "resid_post"), "stream for the ffn"),
    ("module_logits", called_mlp, "always attention"),
    ("module_logits", no_case_for_ffn, "returns None"),
    ("module_logits", both_modules, "whole layer"),
    ("module_logits", module_at(-1), "module below"),
    ("module_logits", module_at(1), "module above"),
    ("module_logits", module_normed, "module normed"),
]
