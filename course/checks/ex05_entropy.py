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
    "Where log pi is -inf, the product 0 * -inf is NaN: replace it by 0 with torch.where.",
    "trace.mlp_out is F^l; trace.mlp_in is what the FFN reads. Unembed both, take entropies, "
    "subtract. torch.stack makes (L, B, T) of a list.",
)

INF = float("inf")
LOGITS = {
    "8 equal logits": [0.0] * 8,
    "logits 0, 1, 2": [0.0, 1.0, 2.0],
    "two questions at once": [[2.0, -1.0, 0.5, 0.0], [0.1, 0.2, 0.3, 3.0]],
    "logits 1000, 999, 0": [1000.0, 999.0, 0.0],
    "one that is far above the others": [0.0, 1000.0, 0.0, 0.0],
    "one of three tokens impossible (-inf)": [0.0, -INF, 1.0],
}


def by_policies(one_policy):
    """An outcome (...) from a computation on the probabilities of one policy."""

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
    """exp without subtracting the largest logit first."""
    found = right(logits)
    return torch.where(logits.float().exp().isinf().any(-1), float("nan"), found)


def zero_log_zero(logits):
    """0 * -inf where a probability is 0."""
    return torch.where((logits.softmax(-1) == 0).any(-1), float("nan"), right(logits))


def minus_infinity(logits):
    """0 * -inf where a logit is -inf; log_softmax is finite elsewhere."""
    return torch.where((logits == -INF).any(-1), float("nan"), right(logits))


CONFUSIONS = (
    Confusion(
        "bits",
        by_policies(lambda pi: nats(pi) / math.log(2)),
        "These are bits. Nats take the natural logarithm.",
    ),
    Confusion(
        "softmax twice",
        by_policies(lambda pi: nats(softmax(pi))),
        "You took the softmax of probabilities: softmax twice. That is always nearly uniform.",
    ),
    Confusion(
        "sign", by_policies(lambda pi: -nats(pi)), "The sign: log pi is negative, entropy is not."
    ),
    Confusion(
        "mean over tokens",
        by_policies(lambda pi: nats(pi) / len(pi)),
        "This is the mean over the vocabulary. The sum is wanted: pi is the weight already.",
    ),
    Confusion(
        "share of log V",
        by_policies(lambda pi: nats(pi) / math.log(len(pi))),
        "You divided by log V, the largest entropy. Nats are wanted, not a share.",
    ),
    Confusion(
        "no pi",
        by_policies(lambda pi: -sum(math.log(p) if p else -INF for p in pi)),
        "You summed -log pi without the weight pi.",
    ),
    Confusion(
        "all at once",
        lambda logits: right(logits).sum(),
        "You summed over everything. Only the last dimension, the vocabulary, is to go.",
    ),
    Confusion(
        "overflow",
        overflow,
        "exp(1000) is infinite. Subtract the largest logit first: log_softmax.",
    ),
    Confusion(
        "zero log zero",
        zero_log_zero,
        "0 log 0 is 0 * -inf = NaN for a computer. Use log_softmax, or replace these terms.",
    ),
    Confusion(
        "minus infinity",
        minus_infinity,
        "A logit of -inf gives 0 * -inf = NaN. Count such a term as 0.",
    ),
)


def change(written="ffn", read="ffn_in", sign=1):
    """dH of one vector of the stream against another, as an outcome."""

    def outcome(model, tokens):
        layers = stream(model, tokens)
        both = [[right(logits(model, layer[name])) for layer in layers] for name in (written, read)]
        return sign * (torch.stack(both[0]) - torch.stack(both[1]))

    return outcome


def final_norm(of):
    """dH where what is read (or written) is put through the final norm first."""

    def outcome(model, tokens):
        layers = stream(model, tokens)
        for layer in layers:
            name, vector = ("ffn_in", layer["mid"]) if of == "read" else ("ffn", layer["ffn"])
            layer[name] = model.final_norm(vector)
        both = (
            [right(logits(model, layer[name])) for layer in layers] for name in ("ffn", "ffn_in")
        )
        written, read = map(torch.stack, both)
        return written - read

    return outcome


def one_layer_less(model, tokens):
    """The FFN against what enters its layer."""
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
        "raw stream is longer, so its softmax is more peaked, and dH would measure length.",
    ),
    Confusion(
        "enters the layer",
        change(read="pre"),
        "You compare with the raw stream that enters the layer, before attention has written.",
    ),
    Confusion(
        "attention's input",
        change(read="attn_in"),
        "You compare with what attention reads. The FFN reads mlp_in, after attention's write.",
    ),
    Confusion(
        "final norm",
        final_norm("read"),
        "You normed the stream with the model's final norm. Each FFN has a norm of its own, and "
        "what comes out of it is trace.mlp_in.",
    ),
    Confusion(
        "written, normed",
        final_norm("write"),
        "You normed what the FFN writes. F^l is unembedded as it is.",
    ),
    Confusion("before minus after", change(sign=-1), "The sign: dH is after minus before."),
    Confusion(
        "no difference",
        lambda model, tokens: torch.stack(
            [right(logits(model, layer["ffn"])) for layer in stream(model, tokens)]
        ),
        "This is the entropy of what the FFN writes; what it reads is not subtracted.",
    ),
    Confusion(
        "after the ffn",
        change(written="post"),
        "You took the stream after the FFN wrote (resid_post). F^l alone is its write, mlp_out.",
    ),
    Confusion(
        "dH of layers",
        one_layer_less,
        "This is dH of layers, H^l against H^(l-1), both raw. The FFN alone is asked for.",
    ),
    Confusion(
        "dH of attention",
        change("attention", "attn_in"),
        "This is dH of attention. For the FFN: mlp_out against mlp_in.",
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
    models = {"tied embeddings": small(1, tied=True), "E_u of its own": small(0, tied=False)}
    cases = [Case(f"a model of {L} layers ({words})", args) for words, args in models.items()]
    try:
        check_function(answer, "ffn_entropy_change", cases, change(), CHANGE_CONFUSIONS)
    except Wrong as wrong:
        raise Wrong(wrong.name, f"entropy is right; now ffn_entropy_change.\n\n{wrong}") from None
