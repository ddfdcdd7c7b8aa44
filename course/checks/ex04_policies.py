"""Exercise 4: the policies of layers and modules, on small models with random weights."""

import torch
from checks.common import Case, Confusion, Wrong, check_function

import minibupo
from model import GPT, GPTConfig

TITLE, MINUTES = "internal policies", 30
REFUSED = [(minibupo, "policy_logits"), (minibupo, "token_logprobs"), (GPT, "truncated")]
HINTS = (
    "for number, trace in enumerate(model.trace(tokens), 1): number is the layer, and "
    "trace.resid_post is H^number.",
    "What a module reads is a normed copy of the stream (attn_in, mlp_in). What it writes is "
    "attn_out, mlp_out.",
    "module_logits: list(model.trace(tokens))[l - 1] is layer l. Then model.unembed of one field.",
)
L = 3


def small(seed, tied):
    """A GPT with random weights, norms too, or the final norm would be too easy to overlook."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT(GPTConfig(11, 16, n_layer=L, d_model=16, n_head=2, tied=tied))
        for parameter in model.parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, mean=1.0, std=0.4)
        tokens = torch.randint(0, 11, (2, 6))
    return model.requires_grad_(False), tokens


def stream(model, tokens):
    """All that layers read and write, block by block: a dict for each of layers 1..L."""
    h, rope, layers = model.embed.weight[tokens], None, []
    rope = model.cos[: tokens.shape[1]], model.sin[: tokens.shape[1]]
    for block in model.blocks:
        pre, attn_in = h, block.attn_norm(h)
        attention = block.attn(attn_in, rope)
        mid = h + attention
        ffn_in = block.mlp_norm(mid)
        ffn = block.mlp(ffn_in)
        h = mid + ffn
        layers.append(dict(pre=pre, attn_in=attn_in, attention=attention, mid=mid))
        layers[-1] |= dict(ffn_in=ffn_in, ffn=ffn, post=h)
    return layers


def H(model, tokens, l):
    """H^l; the layer below 0 is taken as 0, that above L as L."""
    l = min(max(l, 0), L)
    return stream(model, tokens)[l - 1]["post"] if l else model.embed.weight[tokens]


def logits(model, h):
    return h @ model.lm_head.weight.T


def right_layer(model, tokens, l):
    return logits(model, H(model, tokens, l))


def right_module(model, tokens, l, module):
    return logits(model, stream(model, tokens)[l - 1][module])


def module_as(field):
    """Logits of another vector of the module's layer; `field` names it by module."""
    return lambda model, tokens, l, module: logits(
        model, stream(model, tokens)[l - 1][field[module]]
    )


def whole_write(model, tokens, l, module):
    return logits(model, H(model, tokens, l) - H(model, tokens, l - 1))


def other_layer(by):
    def outcome(model, tokens, l, module):
        return right_module(model, tokens, min(max(l + by, 1), L), module)

    return outcome


OFF = "Layers are numbered 1..L, H^0 is the embedding, but a list starts at 0."
NORM = (
    "You normed H^l before unembedding. That is the logit lens; the internal policy takes the "
    "stream as it is."
)
LAYER_CONFUSIONS = (
    Confusion(
        "final norm",
        lambda model, tokens, l: logits(model, model.final_norm(H(model, tokens, l))),
        NORM,
    ),
    Confusion(
        "norm at the top",
        lambda model, tokens, l: logits(
            model, model.final_norm(H(model, tokens, l)) if l == L else H(model, tokens, l)
        ),
        "Layer L of yours is the model's own policy, with the final norm. pi_Layer^L has none.",
    ),
    Confusion(
        "layer below",
        lambda model, tokens, l: right_layer(model, tokens, l - 1),
        f"This is layer l - 1. {OFF}",
    ),
    Confusion(
        "layer above",
        lambda model, tokens, l: right_layer(model, tokens, l + 1),
        f"This is layer l + 1. {OFF}",
    ),
    Confusion(
        "before the ffn",
        lambda model, tokens, l: logits(
            model, stream(model, tokens)[l - 1]["mid"] if l else H(model, tokens, 0)
        ),
        "This is the stream in the middle of layer l (resid_mid): the FFN has not written yet.",
    ),
    Confusion(
        "write",
        lambda model, tokens, l: logits(
            model, H(model, tokens, l) - H(model, tokens, l - 1) if l else H(model, tokens, 0)
        ),
        "This is what layer l adds. H^l is all that has been added up so far.",
    ),
    Confusion(
        "pi_theta",
        lambda model, tokens, l: logits(model, model.final_norm(H(model, tokens, L))),
        "This is pi_theta, whatever the layer: all layers and the final norm.",
    ),
    Confusion(
        "sum of sums",
        lambda model, tokens, l: sum(right_layer(model, tokens, k) for k in range(l + 1)),
        "You add up resid_post of all layers. Each of them is a sum already: H^l.",
    ),
    Confusion(
        "probabilities",
        lambda *args: right_layer(*args).softmax(-1),
        "These are probabilities; logits are wanted, before the softmax.",
    ),
    Confusion(
        "log-probabilities",
        lambda *args: right_layer(*args).log_softmax(-1),
        "These are log-probabilities. It is the same policy, but logits are wanted.",
    ),
    Confusion(
        "embedding for unembedding",
        lambda model, tokens, l: H(model, tokens, l) @ model.embed.weight.T,
        "You multiplied by the input embedding. In this model E_u is a matrix of its own.",
    ),
)

MODULE_CONFUSIONS = (
    Confusion(
        "reads",
        module_as({"attention": "attn_in", "ffn": "ffn_in"}),
        "This is what the module reads (a normed stream). Its policy is of what it writes.",
    ),
    Confusion(
        "reads, raw",
        module_as({"attention": "pre", "ffn": "mid"}),
        "This is the stream before the module writes. A^l and F^l are only what it adds.",
    ),
    Confusion(
        "after the write",
        module_as({"attention": "mid", "ffn": "post"}),
        "This is the stream after the module wrote: all the layers below are in it. A^l and F^l "
        "are only what it adds.",
    ),
    Confusion(
        "modules swapped",
        module_as({"attention": "ffn", "ffn": "attention"}),
        "Attention and FFN are swapped.",
    ),
    Confusion(
        "always the ffn",
        module_as({"attention": "ffn", "ffn": "ffn"}),
        'You give the FFN for either module. Its name is "attention" or "ffn".',
    ),
    Confusion("whole layer", whole_write, "H^l - H^(l-1) is the write of both modules, A^l + F^l."),
    Confusion("module below", other_layer(-1), f"This is the module of layer l - 1. {OFF}"),
    Confusion("module above", other_layer(1), f"This is the module of layer l + 1. {OFF}"),
    Confusion(
        "module normed",
        lambda model, tokens, l, module: logits(
            model, model.final_norm(stream(model, tokens)[l - 1][module])
        ),
        "You normed what the module writes. Internal policies have no final norm.",
    ),
)


def check(answer, quick=False):
    models = {"E_u of its own": small(0, tied=False), "tied embeddings": small(1, tied=True)}
    layers, modules = [], []
    for words, inputs in models.items():
        layers += [Case(f"l = {l} ({words})", (*inputs, l)) for l in (1, 2, L, 0)]
        for module in ("attention", "ffn"):
            modules += [
                Case(f"l = {l}, {module} ({words})", (*inputs, l, module)) for l in (2, 1, 3)
            ]
    check_function(answer, "layer_logits", layers, right_layer, LAYER_CONFUSIONS)
    try:
        check_function(answer, "module_logits", modules, right_module, MODULE_CONFUSIONS)
    except Wrong as wrong:
        raise Wrong(wrong.name, f"layer_logits is right; now module_logits.\n\n{wrong}") from None
