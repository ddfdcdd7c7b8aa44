"""Exercise 4 (30 minutes): every layer is a policy, and so is every module (Eq. 6, 7).

    pi_Layer^l = softmax(H^l E_u^T)     pi_ATTN^l = softmax(A^l E_u^T)     pi_FFN^l, with F^l

H^l is the stream after layer l (H^0: the embedding). A^l and F^l are what attention and FFN of
layer l *write* into it. Internal policies have no final norm. Return logits (B, T, V). You have
model.embed(tokens), model.unembed(h), and model.trace(tokens), which yields what layers 1, 2, .., L
read and write. Which field is which? These lines print the norms of all of them:

    model = train_toy.load_model("course/base.pt")
    for trace in model.trace(torch.tensor([train_toy.encode("7+5*3-2=")])):
        print({name: f"{h.norm():.1f}" for name, h in trace._asdict().items()})

tokens (B, T); l is 0..L in layer_logits, 1..L in module_logits; module is "attention" or "ffn".
"""

import torch


def layer_logits(model, tokens, l):
    raise NotImplementedError


def module_logits(model, tokens, l, module):
    raise NotImplementedError
