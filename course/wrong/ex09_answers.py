"""Incorrect answers to exercise 9 and the feedback that each must get."""

import torch

import minibupo
import train_toy
from minibupo import FULL, Policy, policy_logits

S = train_toy.Settings()


def judged(policy, problems, samples):
    """Return a table (problems, samples): 1 for a correct answer, otherwise 0."""
    sampled = train_toy.sample_responses(
        policy, S, problems, samples, torch.Generator().manual_seed(5)
    )
    texts = train_toy.response_texts(sampled)
    correct = [train_toy.is_correct(problems[i // samples], text) for i, text in enumerate(texts)]
    return torch.tensor(correct).view(-1, samples).float()


def share(policy, problems, samples):
    return judged(policy, problems, samples).mean().item()


def layers(model):
    return [model.truncated(l) for l in range(1, model.n_layer + 1)]


def logit_lens(model, problems, samples):
    found = []
    for policy in layers(model):
        policy.final_norm = model.final_norm
        found.append(share(policy, problems, samples))
    return [*found, share(model, problems, samples)]


def always_the_model(model, problems, samples):
    return [share(model, problems, samples) for _ in range(model.n_layer + 1)]


def greedy(model, problems, samples):
    prompts, length = train_toy.padded([train_toy.encode(p + "=") for p in problems], "cpu")
    found = []
    for policy in [*layers(model), model]:
        options = dict(prompt_len=length, temperature=0, eos_id=train_toy.EOS)
        texts = train_toy.response_texts(policy.generate(prompts, S.response_limit, **options))
        found.append(sum(map(train_toy.is_correct, problems, texts)) / len(problems))
    return found


def model_first(model, problems, samples):
    return [share(policy, problems, samples) for policy in [model, *layers(model)]]


def layers_only(model, problems, samples):
    return [share(policy, problems, samples) for policy in layers(model)]


def percent(model, problems, samples):
    return [100 * share(policy, problems, samples) for policy in [*layers(model), model]]


def other_problems(model, problems, samples):
    found = []
    for policy in [*layers(model), model]:
        sampled = train_toy.sample_responses(
            policy, S, problems, samples, torch.Generator().manual_seed(5)
        )
        pairs = zip(problems * samples, train_toy.response_texts(sampled))
        found.append(sum(train_toy.is_correct(*pair) for pair in pairs) / len(problems) / samples)
    return found


def one_right(model, problems, samples):
    tables = [judged(policy, problems, samples) for policy in [*layers(model), model]]
    return [float(table.amax(1).mean()) for table in tables]


def by_name(model, problems, samples):
    return {"pi_theta": share(model, problems, samples)}


def find(own, wanted, high=100.0):
    low = 0.01
    while high / low > 1.0001:
        T = (low + high) / 2 if low > 1 else (low * high) ** 0.5
        if minibupo.entropy(own / T).mean() > wanted:
            high = T
        else:
            low = T
    return low


def two(model, tokens):
    return (policy_logits(model, tokens[:, :-1], p) for p in (FULL, Policy(model.n_layer)))


def inverse(model, tokens, mask):
    own, top = two(model, tokens)
    return 1 / find(own[mask], minibupo.entropy(top[mask]).mean())


def other_policy(model, tokens, mask):
    own, top = two(model, tokens)
    return find(top[mask], minibupo.entropy(own[mask]).mean())


def no_mask(model, tokens, mask):
    own, top = two(model, tokens)
    return find(own, minibupo.entropy(top).mean())


def layer_below(model, tokens, mask):
    own, _ = two(model, tokens)
    top = policy_logits(model, tokens[:, :-1], Policy(model.n_layer - 1))
    return find(own[mask], minibupo.entropy(top[mask]).mean())


def norm_twice(model, tokens, mask):
    own, _ = two(model, tokens)
    return find(own[mask], minibupo.entropy(own[mask]).mean())


WRONG = [
    ("accuracies", logit_lens, "logit lens"),
    ("accuracies", always_the_model, "always the model"),
    ("accuracies", greedy, "temperature 0"),
    ("accuracies", model_first, "order"),
    ("accuracies", layers_only, "no model"),
    ("accuracies", percent, "percent"),
    ("accuracies", other_problems, "other problems"),
    ("accuracies", one_right, "pass@k"),
    ("accuracies", by_name, "type"),
    ("matching_temperature", inverse, "inverse"),
    ("matching_temperature", other_policy, "other policy"),
    ("matching_temperature", no_mask, "no mask"),
    ("matching_temperature", layer_below, "layer below"),
    ("matching_temperature", norm_twice, "norm twice"),
    ("WHY", "A", "WHY A"),
    ("WHY", "B", "WHY B"),
    ("WHY", "D", "WHY D"),
    ("WHY", "E", "WHY E"),
    ("WHY", "because", "form"),
    ("WHY", None, "not written"),
]
