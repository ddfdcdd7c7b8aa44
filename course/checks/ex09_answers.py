"""Exercise 9: accuracies by layer and a temperature, measured again on course/base.pt."""

import copy
from functools import cache
from pathlib import Path

import torch
from checks.common import Case, Confusion, Wrong, call, check_function
from checks.ex04_policies import logits, small, stream
from checks.ex05_entropy import right as entropy

import train_toy as toy

TITLE, MINUTES = "why layer L answers better than the model", 60
REFUSED = ()
HINTS = (
    "policies = [*(model.truncated(l) for l in range(1, model.n_layer + 1)), model]. Then for each "
    "one train_toy.respond(policy, settings, problems, samples, generator).",
    "The samples of a problem are neighbours: text i answers problems[i // samples].",
    "mask (N, T-1) goes with tokens[:, :-1]. model(...)[mask] are pi_theta's logits there, and "
    "model.unembed(model.residual(..., L))[mask] those of pi_Layer^L.",
    "Entropy rises with T. Start from 0.001 and 1000 and halve the distance (of the logarithms).",
    "To tell the explanations apart: what do both answer at temperature 0? Which has the larger "
    "entropy? What does pi_theta answer at your T?",
)
SAMPLES = 8
S = toy.Settings()


@cache
def base():
    return toy.load_model(Path(__file__).parent.parent / "base.pt").requires_grad_(False)


@cache
def problems():
    return toy.evaluation_problems(toy.stream(0, "exercise 9"), 3, 48)


@cache
def share_right(policy, temperature=1.0, any_of=1, shuffled=False) -> float:
    """The share of right answers of a model, or of problems with one right answer of `any_of`;
    shuffled: each answer judged by another problem."""
    prompts, length = toy.padded([toy.encode(p + "=") for p in problems()], "cpu")
    sampled = policy.generate(
        prompts,
        S.response_limit,
        prompt_len=length,
        num_samples=SAMPLES,
        temperature=temperature,
        eos_id=toy.EOS,
        pad_id=toy.PAD,
        generator=toy.torch_stream("cpu", 0, "exercise 9"),
    )
    texts = toy.responses(sampled)
    of = [i % len(problems()) if shuffled else i // SAMPLES for i in range(len(texts))]
    right = [toy.is_right(problems()[i], text) for i, text in zip(of, texts)]
    return float(torch.tensor(right).view(-1, any_of).any(1).float().mean())


@cache
def policies(normed=False):
    """The internal policies of base.pt as models, and the model; normed: as logit lens."""
    model = base()
    found = [model.truncated(l) for l in range(1, model.n_layer + 1)]
    for policy in found if normed else ():
        policy._modules = policy._modules | {"final_norm": model.final_norm}
    return [*found, model]


def shares(normed=False, **options):
    """Accuracies as an outcome; the arguments of the case are not looked at."""
    return lambda *args: torch.tensor([share_right(p, **options) for p in policies(normed)])


def asked(function, model, problems, samples):
    """The learner's list of accuracies as a tensor."""
    found = call(function, model, problems, samples)
    numbers = isinstance(found, (list, tuple)) and all(isinstance(x, (int, float)) for x in found)
    if not numbers and found is not None:
        raise Wrong("type", "accuracies must return a list of numbers")
    if found and max(found) > 1:
        raise Wrong("percent", "accuracies returns more than 1; shares in 0..1 are wanted")
    return None if found is None else torch.tensor(found, dtype=torch.float32)


def rolled(*args):
    return shares()().roll(1)


ACCURACY_CONFUSIONS = (
    Confusion(
        "logit lens",
        shares(normed=True),
        "These are the accuracies of the logit lens, with the final norm. pi_Layer^l is raw.",
    ),
    Confusion(
        "always the model",
        lambda *args: torch.full((base().n_layer + 1,), share_right(base())),
        "Every time it is pi_theta that answers. Sample from model.truncated(l).",
    ),
    Confusion(
        "temperature 0",
        shares(temperature=0.0),
        "You took the likeliest token each time, temperature 0. Temperature 1 is asked for.",
    ),
    Confusion("order", rolled, "pi_theta comes last, after pi_Layer^1, .., pi_Layer^L."),
    Confusion(
        "no model",
        lambda *args: shares()()[:-1],
        "pi_theta is missing: it comes last, after pi_Layer^1, .., pi_Layer^L.",
    ),
    Confusion(
        "other problems",
        shares(shuffled=True),
        "You judge answers by other problems. The samples of a problem are neighbours: answer i "
        "belongs to problems[i // samples].",
    ),
    Confusion(
        "pass@k",
        shares(any_of=SAMPLES),
        "You count problems with at least one right answer (Pass@K). Count answers.",
    ),
)


def both(model, tokens, mask, below=0):
    """Logits of pi_theta and of pi_Layer^(L - below) at the positions of mask."""
    layers = stream(model, tokens[:, :-1])
    own = logits(model, model.final_norm(layers[-1]["post"]))
    return own[mask], logits(model, layers[-1 - below]["post"])[mask]


def temperature(own, wanted, steps=60):
    """The T at which softmax(own / T) has the mean entropy `wanted`, by bisection."""
    low, high = 1e-3, 1e3
    for _ in range(steps):
        T = (low * high) ** 0.5
        low, high = (T, high) if entropy(own / T).mean() < wanted else (low, T)
    return T


def matching(everywhere=False, inverse=False, swapped=False, below=0):
    """The temperature asked for, or one that a mistake gives."""

    def outcome(model, tokens, mask):
        own, top = both(model, tokens, torch.ones_like(mask) if everywhere else mask, below)
        own, top = (top, own) if swapped else (own, top)
        T = temperature(own, entropy(top).mean())
        return 1 / T if inverse else T

    return outcome


TEMPERATURE_CONFUSIONS = (
    Confusion(
        "inverse",
        matching(inverse=True),
        "This is 1 / T: you multiply the logits by it. A temperature divides.",
    ),
    Confusion(
        "other policy",
        matching(swapped=True),
        "This is the temperature at which pi_Layer^L has the entropy of pi_theta: the other way "
        "round.",
    ),
    Confusion(
        "no mask",
        matching(everywhere=True),
        "You averaged over all positions; only those of mask are meant. (The prompt's digits "
        "cannot be foreseen, so entropy is high there.)",
    ),
    Confusion(
        "layer below",
        matching(below=1),
        "You took layer L - 1. H^L is model.residual(tokens, model.n_layer).",
    ),
    Confusion(
        "norm twice",
        lambda *args: 1.0,
        "T = 1: both your policies are pi_theta. pi_Layer^L has no final norm.",
    ),
)


def explain(answer) -> str:
    """What to tell of a wrong letter, with numbers measured now. Raises Wrong for it."""
    why, model = getattr(answer.module, "WHY", None), base()
    if why is None:
        raise Wrong("not written", "Both functions are right. Now set WHY to a letter, A to E.")
    top, likeliest = policies()[-2], [share_right(p, temperature=0.0) for p in policies()[-2:]]
    text, mask = toy.own_solutions(model, S, 48)
    own, raw = (entropy(z).mean() for z in both(model, text, mask))
    plain = copy.deepcopy(model)
    plain.final_norm.weight.fill_(1.0)
    length = stream(model, text[:, :-1])[-1]["post"][mask].square().mean(-1).sqrt().mean()
    says = {
        "A": "If the norm threw something away, pi_theta would answer worse at temperature 0, too. "
        f"There pi_Layer^L has {likeliest[0]:.0%} and pi_theta {likeliest[1]:.0%}.",
        "B": f"pi_Layer^L explores less: entropy {raw:.2f} nats, that of pi_theta is {own:.2f}.",
        "D": "With all weights of the final norm set to 1 pi_theta answers "
        f"{share_right(plain):.0%} instead of {share_right(model):.0%}: the weights are not it.",
        "E": "course/base.pt is a base model: no reinforcement learning has touched it.",
    }
    if why in says:
        raise Wrong(f"WHY {why}", f"WHY = {why}, but look: {says[why]}")
    if why != "C":
        raise Wrong("form", f"WHY must be a letter from A to E, not {why!r}")
    T = matching()(model, text, mask)
    shown = " ".join(f"{100 * share:.0f}" for share in shares()())
    return (
        f"right answers of pi_Layer^1, .., pi_Layer^{model.n_layer}, pi_theta: {shown} %\n"
        f"RMS of H^L: {length:.1f}, of its normed copy about 1\n"
        f"entropy: {raw:.2f} nats of pi_Layer^{model.n_layer}, {own:.2f} of pi_theta\n"
        f"pi_theta at T = {T:.3f}, where entropies are equal: {share_right(model, T):.0%}; at "
        f"temperature 0: {likeliest[1]:.0%}, and pi_Layer^L {share_right(top, 0.0):.0%}"
    )


def check(answer, quick=False):
    model = base()
    case = Case(f"base.pt, {len(problems())} problems", (model, problems(), SAMPLES))
    options = dict(observe=asked, seconds=300, atol=0.15)
    check_function(answer, "accuracies", [case], shares(), ACCURACY_CONFUSIONS, **options)
    text = toy.own_solutions(model, S, 48)
    random_model, tokens = small(5, tied=False)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 1:4], mask[1, 2:] = True, True
    cases = [
        Case("base.pt and its own solutions", (model, *text)),
        Case("a small random model", (random_model, tokens, mask)),
    ]
    check_function(
        answer,
        "matching_temperature",
        cases,
        matching(),
        TEMPERATURE_CONFUSIONS,
        seconds=60,
        rtol=0.005,
    )
    return explain(answer)
