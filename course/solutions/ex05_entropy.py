"""Solution 5. Eight equal logits: log 8 = 2.08 nats. One far above the others: 0.

The FFN sees the normed stream and nothing else, so that is what it changes. The raw stream is long,
and a long vector has a peaked softmax. Against it, dH would mostly measure length."""

import torch


def entropy(logits):
    log_pi = logits.log_softmax(-1)  # subtracts the largest logit first, so 1000 is no trouble
    pi_log_pi = log_pi.exp() * log_pi
    return -torch.where(log_pi == -torch.inf, 0.0, pi_log_pi).sum(-1)


def ffn_entropy_change(model, tokens):
    changes = []
    for trace in model.trace(tokens):
        written, read = model.unembed(trace.mlp_out), model.unembed(trace.mlp_in)
        changes.append(entropy(written) - entropy(read))
    return torch.stack(changes)
