"""Exercise 4: the policies of layers and modules, on small models with random weights."""

import torch
from checks.common import Case, Confusion, Wrong, check_function

import minibupo
from model import GPT, GPTConfig

TITLE, MINUTES = "internal policies", 30
REFUSED = [(minibupo, "policy_logits"), (minibupo, "token_logprobs"), (GPT, "truncated")]
HINTS = (
    "In `for number, trace in enumerate(model.trace(tokens), 1)`, number is the layer, and "
    "trace.resid_post is H^number.",
    "A module reads a normed copy of the stream (attn_in, mlp_in) and writes attn_out or mlp_out.",
    "In module_logits, list(model.trace(tokens))[l - 1] is layer l. Unembed one of its fields.",
)
L = 3


def small(seed, tied):
    """Return a GPT with random weights, and tokens (2, 6).

    The norms are random as well, because the final norm would otherwise change too little."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT(GPTConfig(11, 16, n_layer=L, d_model=16, n_head=2, tied=tied))
        for parameter in model.parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, mean=1.0, std=0.4)
        tokens = torch.randint(0, 11, (2, 6))
    return model.requires_grad_(False), tokens


def stream(model, tokens):
    """Return what layers 1..L read and write, block by block: a dict for each layer."""
    h = model.embed.weight[tokens]
    rope = model.cos[: tokens.shape[1]], model.sin[: tokens.shape[1]]
    layers = []
    for block in model.blocks:
        layer = {"pre": h}
        layer["attn_in"] = block.attn_norm(h)
        layer["attention"] = block.attn(layer["attn_in"], rope)
        layer["mid"] = h + layer["attention"]
        layer["ffn_in"] = block.mlp_norm(layer["mid"])
        layer["ffn"] = block.mlp(layer["ffn_in"])
        layer["post"] = h = layer["mid"] + layer["ffn"]
        layers.append(layer)
    return layers


def H(model, tokens, l):
    """Return H^l, with l limited to 0..L."""
    l = min(max(l, 0), L)
    return stream(model, tokens)[l - 1]["post"] if l else model.embed.weight[tokens]


def logits(model, h):
    return h @ model.lm_head.weight.T


def right_layer(model, tokens, l):
    return logits(model, H(model, tokens, l))


def right_module(model, tokens, l, module):
    return logits(model, stream(model, tokens)[l - 1][module])


def module_as(field):
    """Return an outcome that unembeds other vectors of the layer; `field` names one per module."""
    return lambda model, tokens, l, module: logits(
        model, stream(model, tokens)[l - 1][field[module]]
    )


def whole_write(model, tokens, l, module):
    return logits(model, H(model, tokens, l) - H(model, tokens, l - 1))


def other_layer(by):
    def outcome(model, tokens, l, module):
        return right_module(model, tokens, min(max(l + by, 1), L), module)

    return outcome


OFF = "Layers are numbered 1..L and H^0 is the embedding, but a list starts at index 0."
NORM = (
    "You applied the final norm to H^l before unembedding. That is the logit lens; the internal "
    "policy unembeds the stream without the norm."
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
        "Your layer L is the model's own policy, with the final norm. pi_Layer^L has no norm.",
    ),
    Confusion(
        "layer below",
        lambda model, tokens, l: right_layer(model, tokens, l - 1),
        f"This is layer l - 1. {OFF}",
    ),
    Confusion(
        "last layer for 0",
        lambda model, tokens, l: right_layer(model, tokens, l or L),
        "l = 0 must give the embedding, H^0. A list index of l - 1 is then -1, which Python reads "
        "as the last layer.",
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
        "This is the stream inside layer l (resid_mid), before the FFN writes.",
    ),
    Confusion(
        "write",
        lambda model, tokens, l: logits(
            model, H(model, tokens, l) - H(model, tokens, l - 1) if l else H(model, tokens, 0)
        ),
        "This is what layer l adds. H^l is the sum of everything added up to layer l.",
    ),
    Confusion(
        "pi_theta",
        lambda model, tokens, l: logits(model, model.final_norm(H(model, tokens, L))),
        "This is pi_theta for every l: all layers and the final norm.",
    ),
    Confusion(
        "sum of sums",
        lambda model, tokens, l: sum(right_layer(model, tokens, k) for k in range(l + 1)),
        "You add up resid_post of all layers. Each resid_post is such a sum already: H^l.",
    ),
    Confusion(
        "probabilities",
        lambda *args: right_layer(*args).softmax(-1),
        "These are probabilities; logits are wanted, before the softmax.",
    ),
    Confusion(
        "log-probabilities",
        lambda *args: right_layer(*args).log_softmax(-1),
        "These are log-probabilities. They describe the same policy, but logits are wanted.",
    ),
    Confusion(
        "embedding for unembedding",
        lambda model, tokens, l: H(model, tokens, l) @ model.embed.weight.T,
        "You multiplied by the input embedding. In this model E_u is a separate matrix.",
    ),
)

MODULE_CONFUSIONS = (
    Confusion(
        "reads",
        module_as({"attention": "attn_in", "ffn": "ffn_in"}),
        "This is what the module reads (the normed stream). Unembed what it writes.",
    ),
    Confusion(
        "reads, raw",
        module_as({"attention": "pre", "ffn": "mid"}),
        "This is the stream before the module writes. A^l and F^l are only what the module adds.",
    ),
    Confusion(
        "stream for attention",
        module_as({"attention": "mid", "ffn": "ffn"}),
        "The FFN is correct. For attention you took resid_mid, the stream after attention wrote; "
        "A^l is only what attention adds, attn_out.",
    ),
    Confusion(
        "stream for the ffn",
        module_as({"attention": "attention", "ffn": "post"}),
        "Attention is correct. For the FFN you took resid_post, the stream after the FFN wrote; "
        "F^l is only what the FFN adds, mlp_out.",
    ),
    Confusion(
        "after the write",
        module_as({"attention": "mid", "ffn": "post"}),
        "This is the stream after the module wrote, so it includes all layers below. A^l and F^l "
        "are only what the module adds.",
    ),
    Confusion(
        "modules swapped",
        module_as({"attention": "ffn", "ffn": "attention"}),
        "Attention and FFN are swapped.",
    ),
    Confusion(
        "always the ffn",
        module_as({"attention": "ffn", "ffn": "ffn"}),
        'You return the FFN\'s logits for both modules. module is "attention" or "ffn".',
    ),
    Confusion(
        "always attention",
        module_as({"attention": "attention", "ffn": "attention"}),
        "You return attention's logits for both modules. The FFN's name is \"ffn\": does your code "
        'compare with another one, such as "mlp"?',
    ),
    Confusion("whole layer", whole_write, "H^l - H^(l-1) is what both modules write, A^l + F^l."),
    Confusion("module below", other_layer(-1), f"This is the module of layer l - 1. {OFF}"),
    Confusion("module above", other_layer(1), f"This is the module of layer l + 1. {OFF}"),
    Confusion(
        "module normed",
        lambda model, tokens, l, module: logits(
            model, model.final_norm(stream(model, tokens)[l - 1][module])
        ),
        "You applied the final norm to what the module writes. Internal policies have no norm.",
    ),
)


def check(answer, quick=False):
    models = {"separate E_u": small(0, tied=False), "tied embeddings": small(1, tied=True)}
    layers = []
    modules = []
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
        raise Wrong(wrong.name, f"layer_logits is correct. module_logits:\n\n{wrong}") from None
