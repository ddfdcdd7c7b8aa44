"""Solution 4. The policies differ only in the vector; the matrix E_u is the same for all."""


def layer_logits(model, tokens, l):
    h = model.embed(tokens)  # H^0
    for number, trace in enumerate(model.trace(tokens), 1):
        if number <= l:
            h = trace.resid_post  # H^number; resid_pre would be H^(number - 1)
    return model.unembed(h)


def module_logits(model, tokens, l, module):
    trace = list(model.trace(tokens))[l - 1]  # layers are 1..L, lists start at 0
    written = {"attention": trace.attn_out, "ffn": trace.mlp_out}
    return model.unembed(written[module])
