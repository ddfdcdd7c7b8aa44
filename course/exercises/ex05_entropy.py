"""Exercise 5 (30 minutes): entropy, and what an FFN does to it (Eq. 8, 14).

The entropy of a policy pi = softmax(logits) is -sum pi log pi, in nats. On paper first: what is it
for 8 equal logits, and for one logit that is far above the others?
1. entropy(logits): (..., V) -> (...). It must work for logits of 1000, and for a logit of -inf, a
   token with probability 0: 0 log 0 counts as 0.
2. ffn_entropy_change(model, tokens): dH_FFN^l = (entropy of what the FFN of layer l writes, F^l) -
   (entropy of what it *reads*), for layers 1..L and all positions: (L, B, T). Both are unembedded,
   softmax(h E_u^T), as in exercise 4. The FFN reads the *normed* stream. Why not take the raw one?
   Before you decide, compare their norms, with model and tokens as in exercise 4:

    for trace in model.trace(torch.tensor([train_toy.encode("7+5*3-2=")])):
        print(f"raw {trace.resid_mid.norm():.1f}, normed {trace.mlp_in.norm():.1f}")
"""

import torch


def entropy(logits):
    raise NotImplementedError


def ffn_entropy_change(model, tokens):
    raise NotImplementedError
