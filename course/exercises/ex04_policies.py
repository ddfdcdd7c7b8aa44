"""Exercise 4 (30 minutes): every layer is a policy, and so is every module (Eq. 6, 7).

    pi_Layer^l = softmax(H^l E_u^T)     pi_ATTN^l = softmax(A^l E_u^T)     pi_FFN^l, with F^l

H^l is the stream after layer l (H^0: the embedding), A^l and F^l are what attention and FFN of
layer l *write* into it. Internal policies have no final norm. Return logits (B, T, V).

You have, from model.py:  model.trace(tokens), which yields for layers 1, 2, .., L what each reads
and writes (print one: what are resid_pre, attn_in, attn_out, resid_mid, mlp_in, mlp_out and
resid_post?), model.embed(tokens) and model.unembed(h).
tokens (B, T); l is 0..L in layer_logits, 1..L in module_logits; module is "attention" or "ffn".
"""

import torch  # noqa: F401


def layer_logits(model, tokens, l):
    raise NotImplementedError


def module_logits(model, tokens, l, module):
    raise NotImplementedError
