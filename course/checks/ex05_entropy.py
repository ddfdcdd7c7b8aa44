"""Exercise 5: entropy in float64 with plain logarithms, and dH on small models."""

import math

import torch
from checks.common import Case, Confusion, Wrong, check_function
from checks.ex04_policies import H, L, logits, small, stream

import minibupo

TITLE, MINUTES = "entropy, and what an FFN does to it", 30
REFUSED = [(minibupo, "entropy"), (minibupo, "look_inside")]
HINTS = (
    "log_softmax gives log pi without overflow; exp of it is pi.",
    "If log pi is -inf, the product 0 * -inf is NaN: replace it by 0 with torch.where.",
    "trace.mlp_out is F^l; trace.mlp_in is what the FFN reads. Unembed both, compute both "
    "entropies, and subtract. torch.stack turns a list into (L, B, T).",
)

INF = float("inf")
LOGITS = {
    "8 equal logits": [0.0] * 8,
    "logits 0, 1, 2": [0.0, 1.0, 2.0],
    "two questions at once": [[2.0, -1.0, 0.5, 0.0], [0.1, 0.2, 0.3, 3.0]],
    "logits 1000, 999, 0": [1000.0, 999.0, 0.0],
    "one logit far above the others": [0.0, 1000.0, 0.0, 0.0],
    "one of three tokens with logit -inf": [0.0, -INF, 1.0],
}


def by_policies(one_policy):
    """Return an outcome (...) that computes each entry from the probabilities of one policy."""

    def outcome(logits):
        rows = logits.double().softmax(-1).reshape(-1, logits.shape[-1]).tolist()
        found = torch.tensor([one_policy(row) for row in rows], dtype=torch.float32)
        return found.view(logits.shape[:-1])

    return outcome


def nats(pi):
    return -sum(p * math.log(p) for p in pi if p > 0)


def softmax(values):
    weights = [math.exp(value) for value in values]
    return [weight / sum(weights) for weight in weights]


right = by_policies(nats)


def overflow(logits):
    """Return the entropies, with NaN if exp of a logit overflows."""
    found = right(logits)
    return torch.where(logits.float().exp().isinf().any(-1), float("nan"), found)


def zero_log_zero(logits):
    """Return the entropies, with NaN from 0 * -inf if a probability is 0."""
    return torch.where((logits.softmax(-1) == 0).any(-1), float("nan"), right(logits))


def minus_infinity(logits):
    """Return the entropies, with NaN from 0 * -inf if a logit is -inf."""
    return torch.where((logits == -INF).any(-1), float("nan"), right(logits))


def over_dim_0(logits, summed=-1):
    """Return the entropies with the softmax over dimension 0, summed over dimension `summed`."""
    pi = logits.double().softmax(0)
    return -torch.where(pi > 0, pi * pi.log(), 0.0).sum(summed).float()


CONFUSIONS = (
    Confusion(
        "bits",
        by_policies(lambda pi: nats(pi) / math.log(2)),
        "These are bits. Nats take the natural logarithm.",
    ),
    Confusion(
        "softmax twice",
        by_policies(lambda pi: nats(softmax(pi))),
        "You took the softmax twice. The softmax of probabilities is always nearly uniform.",
    ),
    Confusion(
        "sign",
        by_policies(lambda pi: -nats(pi)),
        "The sign is inverted: log pi is negative, but entropy is not.",
    ),
    Confusion(
        "mean over tokens",
        by_policies(lambda pi: nats(pi) / len(pi)),
        "This is the mean over the vocabulary. The sum is wanted, because pi already weights it.",
    ),
    Confusion(
        "share of log V",
        by_policies(lambda pi: nats(pi) / math.log(len(pi))),
        "You divided by log V, the largest possible entropy. The entropy in nats is wanted.",
    ),
    Confusion(
        "no pi",
        by_policies(lambda pi: -sum(math.log(p) if p else -INF for p in pi)),
        "You summed -log pi without the weight pi.",
    ),
    Confusion(
        "all at once",
        lambda logits: right(logits).sum(),
        "You summed over everything. Sum only over the last dimension, the vocabulary.",
    ),
    Confusion(
        "softmax over dim 0",
        over_dim_0,
        "Your softmax is over dimension 0, so it compares logits of different questions. The "
        "vocabulary is the last dimension: softmax(-1).",
    ),
    Confusion(
        "everything over dim 0",
        lambda logits: over_dim_0(logits, summed=0),
        "Your softmax and your sum are over dimension 0. The vocabulary is the last one: -1.",
    ),
    Confusion(
        "overflow",
        overflow,
        "exp(1000) is infinite. Subtract the largest logit first: log_softmax.",
    ),
    Confusion(
        "zero log zero",
        zero_log_zero,
        "A computer makes 0 log 0 into 0 * -inf = NaN. Use log_softmax, or replace these terms.",
    ),
    Confusion(
        "minus infinity",
        minus_infinity,
        "A logit of -inf gives 0 * -inf = NaN. Count such a term as 0.",
    ),
)


def change(written="ffn", read="ffn_in", sign=1):
    """Return an outcome: the entropy of the vectors `written` minus that of the vectors `read`."""

    def outcome(model, tokens):
        layers = stream(model, tokens)
        both = [[right(logits(model, layer[name])) for layer in layers] for name in (written, read)]
        return sign * (torch.stack(both[0]) - torch.stack(both[1]))

    return outcome


def final_norm(written, read):
    """Return an outcome: dH with the final norm applied to some vectors; names as in change."""

    def entropy_of(model, layer, name):
        h = layer[name.removesuffix(", normed")]
        return right(logits(model, model.final_norm(h) if name.endswith(", normed") else h))

    def outcome(model, tokens):
        layers = stream(model, tokens)
        changes = [entropy_of(model, x, written) - entropy_of(model, x, read) for x in layers]
        return torch.stack(changes)

    return outcome


def scaled(model, tokens):
    """Return dH with F^l scaled to the norm of what the FFN reads."""
    changes = []
    for layer in stream(model, tokens):
        factor = layer["ffn_in"].norm(dim=-1, keepdim=True) / layer["ffn"].norm(
            dim=-1, keepdim=True
        )
        written = right(logits(model, layer["ffn"] * factor))
        changes.append(written - right(logits(model, layer["ffn_in"])))
    return torch.stack(changes)


def change_of_layers(model, tokens):
    """Return the entropy of H^l minus that of H^(l-1)."""
    states = [right(logits(model, H(model, tokens, l))) for l in range(L + 1)]
    return torch.stack([after - before for before, after in zip(states, states[1:])])


def no_unembedding(model, tokens):
    layers = stream(model, tokens)
    return torch.stack([right(layer["ffn"]) - right(layer["ffn_in"]) for layer in layers])


CHANGE_CONFUSIONS = (
    Confusion(
        "raw input",
        change(read="mid"),
        "You compare with the raw stream (resid_mid). The FFN reads the normed one (mlp_in). The "
        "raw stream has a larger norm, hence a sharper softmax, and dH would measure the norm.",
    ),
    Confusion(
        "enters the layer",
        change(read="pre"),
        "You compare with the raw stream that enters the layer, before attention writes.",
    ),
    Confusion(
        "attention's input",
        change(read="attn_in"),
        "You compare with what attention reads. The FFN reads mlp_in, after attention wrote.",
    ),
    Confusion(
        "final norm",
        final_norm("ffn", "mid, normed"),
        "You applied the model's final norm to the stream. Each FFN has its own norm, and what the "
        "FFN reads is trace.mlp_in.",
    ),
    Confusion(
        "written, normed",
        final_norm("ffn, normed", "ffn_in"),
        "You applied the final norm to what the FFN writes. F^l is unembedded without a norm.",
    ),
    Confusion(
        "final norm on both",
        final_norm("ffn, normed", "ffn_in, normed"),
        "You applied the final norm to what the FFN writes and to what it reads. Unembed F^l and "
        "mlp_in without it.",
    ),
    Confusion(
        "logit lens on both",
        final_norm("ffn, normed", "mid, normed"),
        "You took the logit lens of F^l and of resid_mid, with the final norm. Unembed F^l and "
        "mlp_in without it.",
    ),
    Confusion(
        "logit lens of the stream",
        final_norm("post, normed", "mid, normed"),
        "You compared the stream after and before the FFN, both with the final norm. Unembed F^l "
        "and mlp_in without it.",
    ),
    Confusion(
        "scaled",
        scaled,
        "You scaled F^l to the norm of what the FFN reads. F^l is unembedded at the norm it has.",
    ),
    Confusion(
        "before minus after", change(sign=-1), "The sign is inverted: dH is after minus before."
    ),
    Confusion(
        "no difference",
        lambda model, tokens: torch.stack(
            [right(logits(model, layer["ffn"])) for layer in stream(model, tokens)]
        ),
        "This is the entropy of what the FFN writes. Subtract the entropy of what it reads.",
    ),
    Confusion(
        "after the ffn",
        change(written="post"),
        "You took the stream after the FFN wrote (resid_post). F^l is only what it adds, mlp_out.",
    ),
    Confusion(
        "stream after and before",
        change("post", "mid"),
        "You compared the raw stream after and before the FFN, resid_post and resid_mid. dH "
        "compares what the FFN writes, mlp_out, with what it reads, mlp_in.",
    ),
    Confusion(
        "dH of layers",
        change_of_layers,
        "This is dH_Layer, which compares H^l with H^(l-1), both raw. dH_FFN is asked for.",
    ),
    Confusion(
        "dH of attention",
        change("attention", "attn_in"),
        "This is dH_ATTN. dH_FFN compares mlp_out with mlp_in.",
    ),
    Confusion(
        "no unembedding",
        no_unembedding,
        "You took the softmax of the vectors themselves. Unembed first: model.unembed(h).",
    ),
)


def check(answer, quick=False):
    cases = [Case(words, (torch.tensor(values),)) for words, values in LOGITS.items()]
    check_function(answer, "entropy", cases, right, CONFUSIONS)
    models = {"tied embeddings": small(1, tied=True), "separate E_u": small(0, tied=False)}
    cases = [Case(f"a model of {L} layers ({words})", args) for words, args in models.items()]
    try:
        check_function(answer, "ffn_entropy_change", cases, change(), CHANGE_CONFUSIONS)
    except Wrong as wrong:
        raise Wrong(wrong.name, f"entropy is correct. ffn_entropy_change:\n\n{wrong}") from None
