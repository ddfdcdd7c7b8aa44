"""Solution 5. Eight equal logits have entropy log 8 = 2.08 nats, and one far above the others 0.

The FFN reads only the normed stream, so dH compares what the FFN writes with that. The raw stream
has a larger norm, and a larger norm makes a sharper softmax. Compared with the raw stream, dH would
mostly measure the norm."""

import torch


def entropy(logits):
    log_pi = logits.log_softmax(-1)  # subtracts the largest logit first, so 1000 does no harm
    pi_log_pi = log_pi.exp() * log_pi
    return -torch.where(log_pi == -torch.inf, 0.0, pi_log_pi).sum(-1)


def ffn_entropy_change(model, tokens):
    changes = []
    for trace in model.trace(tokens):
        written = entropy(model.unembed(trace.mlp_out))
        read = entropy(model.unembed(trace.mlp_in))
        changes.append(written - read)
    return torch.stack(changes)
