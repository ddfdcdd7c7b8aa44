"""Exercise 5 (30 minutes): entropy, and what an FFN does to it (Eq. 8, 14).

The entropy of a policy pi = softmax(logits) is -sum pi log pi, in nats. On paper first: what is it
for 8 equal logits, and for one logit that is far above the others?
1. entropy(logits): (..., V) -> (...). It must stand logits of 1000, and -inf for a token that
   cannot come: 0 log 0 counts as 0.
2. ffn_entropy_change(model, tokens): dH_FFN^l = (entropy of what the FFN of layer l writes, F^l) -
   (entropy of what it *reads*), for layers 1..L and all positions: (L, B, T). Both are unembedded,
   softmax(h E_u^T), as in exercise 4. The FFN reads the *normed* stream. Why not take the raw one?
   Compare the two in the print of model.trace(tokens) before you decide.
"""

import torch  # noqa: F401


def entropy(logits):
    raise NotImplementedError


def ffn_entropy_change(model, tokens):
    raise NotImplementedError
