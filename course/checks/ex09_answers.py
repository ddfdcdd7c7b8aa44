"""Exercise 9: accuracies by layer and a temperature, measured here on course/base.pt as well."""

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
    "The policies are [*(model.truncated(l) for l in range(1, model.n_layer + 1)), model]. For "
    "each one call train_toy.sample_responses(policy, settings, problems, samples, generator).",
    "The samples of a problem are neighbours: text i answers problems[i // samples].",
    "mask (N, T-1) belongs to tokens[:, :-1]. model(...)[mask] are pi_theta's logits there, and "
    "model.unembed(model.residual(..., L))[mask] are those of pi_Layer^L.",
    "Entropy rises with T. Start with the interval 0.001 to 1000 and halve it on a log scale.",
    "To choose an explanation, find out how accurate both policies are at temperature 0, which of "
    "them has the larger entropy, and how accurate pi_theta is at your T.",
)
SAMPLES = 8
S = toy.Settings()


@cache
def base():
    return toy.load_model(Path(__file__).parent.parent / "base.pt").requires_grad_(False)


@cache
def problems():
    return toy.evaluation_problems(toy.rng_for(0, "exercise 9"), 3, 48)


@cache
def share_correct(policy, temperature=1.0, any_of=1, shuffled=False) -> float:
    """Return the share of a model's answers that are correct.

    any_of: the share of problems with at least one correct answer among so many. shuffled: each
    answer is judged by another problem."""
    prompts, length = toy.padded([toy.encode(p + "=") for p in problems()], "cpu")
    sampled = policy.generate(
        prompts,
        S.response_limit,
        prompt_len=length,
        num_samples=SAMPLES,
        temperature=temperature,
        eos_id=toy.EOS,
        pad_id=toy.PAD,
        generator=toy.torch_rng_for("cpu", 0, "exercise 9"),
    )
    texts = toy.response_texts(sampled)
    problem_of = [i % len(problems()) if shuffled else i // SAMPLES for i in range(len(texts))]
    correct = [toy.is_correct(problems()[i], text) for i, text in zip(problem_of, texts)]
    return float(torch.tensor(correct).view(-1, any_of).any(1).float().mean())


@cache
def policies(normed=False):
    """Return the internal policies of base.pt as models, and the model; normed: as logit lens."""
    model = base()
    layers = [model.truncated(l) for l in range(1, model.n_layer + 1)]
    if normed:
        for policy in layers:
            policy.final_norm = model.final_norm
    return [*layers, model]


def shares(normed=False, **options):
    """Return the accuracies as an outcome, which ignores the arguments of the case."""
    return lambda *args: torch.tensor([share_correct(p, **options) for p in policies(normed)])


def asked(function, model, problems, samples):
    """Return the learner's accuracies as a tensor. Raise Wrong unless they are shares in 0..1."""
    found = call(function, model, problems, samples)
    if found is None:
        return None
    try:
        found = torch.tensor([float(share) for share in found])
    except (TypeError, ValueError):
        raise Wrong("type", "accuracies must return a list of numbers") from None
    if (found > 1).any():
        raise Wrong("percent", "accuracies returns a number above 1; shares in 0..1 are wanted")
    return found


def rolled(*args):
    return shares()().roll(1)


ACCURACY_CONFUSIONS = (
    Confusion(
        "logit lens",
        shares(normed=True),
        "These are the accuracies of the logit lens, with the final norm. pi_Layer^l has no norm.",
    ),
    Confusion(
        "always the model",
        lambda *args: torch.full((base().n_layer + 1,), share_correct(base())),
        "It is always pi_theta that answers. Sample from model.truncated(l).",
    ),
    Confusion(
        "temperature 0",
        shares(temperature=0.0),
        "You always took the likeliest token, which is temperature 0. Sample at temperature 1.",
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
        "You count problems with at least one correct answer (Pass@K). Count answers instead.",
    ),
)


def both(model, tokens, mask, below=0):
    """Return logits of pi_theta and of pi_Layer^(L - below) at the positions of mask."""
    layers = stream(model, tokens[:, :-1])
    own = logits(model, model.final_norm(layers[-1]["post"]))
    return own[mask], logits(model, layers[-1 - below]["post"])[mask]


def temperature(own, wanted, steps=60):
    """Return the T at which softmax(own / T) has the mean entropy `wanted`, by bisection."""
    low = 1e-3
    high = 1e3
    for _ in range(steps):
        T = (low * high) ** 0.5
        if entropy(own / T).mean() < wanted:
            low = T
        else:
            high = T
    return T


def matching(everywhere=False, inverse=False, swapped=False, below=0):
    """Return an outcome: the correct temperature, or one that a mistake gives."""

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
        "This is 1 / T, by which you would multiply the logits. A temperature divides them.",
    ),
    Confusion(
        "other policy",
        matching(swapped=True),
        "You exchanged the policies: at this temperature pi_Layer^L has the entropy of pi_theta.",
    ),
    Confusion(
        "no mask",
        matching(everywhere=True),
        "You averaged over all positions; take only those of mask. (The prompt's digits are "
        "random, so entropy is high there.)",
    ),
    Confusion(
        "layer below",
        matching(below=1),
        "You took layer L - 1. H^L is model.residual(tokens, model.n_layer).",
    ),
    Confusion(
        "norm twice",
        lambda *args: 1.0,
        "T = 1, so both of your policies are pi_theta. pi_Layer^L has no final norm.",
    ),
)


def explain(answer) -> str:
    """Return the numbers that support the correct letter. Raise Wrong for another letter, with
    numbers that contradict it. All of them are measured now."""
    why = getattr(answer.module, "WHY", None)
    model = base()
    if why is None:
        raise Wrong("not written", "Both functions are correct. Now set WHY to a letter, A to E.")
    top = policies()[-2]
    likeliest = [share_correct(policy, temperature=0.0) for policy in (top, model)]
    text, mask = toy.own_solutions(model, S, 48)
    own, raw = (entropy(z).mean() for z in both(model, text, mask))
    plain = copy.deepcopy(model)
    plain.final_norm.weight.fill_(1.0)
    rms = stream(model, text[:, :-1])[-1]["post"][mask].square().mean(-1).sqrt().mean()
    says = {
        "A": "if the norm lost something, pi_theta would also be less accurate at temperature 0. "
        f"There pi_Layer^L has {likeliest[0]:.0%} and pi_theta {likeliest[1]:.0%}.",
        "B": f"pi_Layer^L explores less. Its entropy is {raw:.2f} nats, pi_theta's is {own:.2f}.",
        "D": "the weights of the final norm matter little. If all of them are 1, the accuracy of "
        f"pi_theta is {share_correct(plain):.0%} instead of {share_correct(model):.0%}.",
        "E": "course/base.pt is a base model, which was not trained by reinforcement learning.",
    }
    if why in says:
        raise Wrong(f"WHY {why}", f"WHY = {why}, but {says[why]}")
    if why != "C":
        raise Wrong("form", f"WHY must be a letter from A to E, not {why!r}")
    T = matching()(model, text, mask)
    shown = " ".join(f"{share:.0%}" for share in shares()())
    return (
        f"accuracy of pi_Layer^1, .., pi_Layer^{model.n_layer}, pi_theta: {shown}\n"
        f"RMS of H^L: {rms:.1f}, of its normed copy about 1\n"
        f"entropy of pi_Layer^{model.n_layer}: {raw:.2f} nats, of pi_theta: {own:.2f}\n"
        f"accuracy of pi_theta at T = {T:.3f}, where both entropies are equal: "
        f"{share_correct(model, T):.0%}\n"
        f"accuracy at temperature 0: pi_theta {likeliest[1]:.0%}, pi_Layer^L {likeliest[0]:.0%}"
    )


def check(answer, quick=False):
    model = base()
    case = Case(f"base.pt, {len(problems())} problems", (model, problems(), SAMPLES))
    options = dict(observe=asked, seconds=300, atol=0.15)
    check_function(answer, "accuracies", [case], shares(), ACCURACY_CONFUSIONS, **options)
    probe = toy.own_solutions(model, S, 48)
    random_model, tokens = small(5, tied=False)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 1:4] = True
    mask[1, 2:] = True
    cases = [
        Case("base.pt and its own solutions", (model, *probe)),
        Case("a small random model", (random_model, tokens, mask)),
    ]
    options = dict(seconds=60, rtol=0.005)
    check_function(
        answer, "matching_temperature", cases, matching(), TEMPERATURE_CONFUSIONS, **options
    )
    return explain(answer)
