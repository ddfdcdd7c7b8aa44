"""Solution 9: C. pi_theta at T = 0.14 is as accurate as pi_Layer^L at 1, and at temperature 0 they
hardly differ. The final norm gives every vector about the same norm. Here H^L has seven times that
norm, so its logits are seven times as large, and softmax(7 z) is softmax(z) at temperature 1/7.

The base model has seen careful work and work that skips lines. At most positions the careful token
is the likeliest one, and a sharp policy almost always takes it. So raw policies become more
confident with depth partly because the norm of the stream grows. That is not more knowledge:
compare policies at equal entropy, or at temperature 0."""

import torch

import train_toy

settings = train_toy.Settings()
generator = torch.Generator().manual_seed(0)


def accuracies(model, problems, samples):
    layers = [model.truncated(l) for l in range(1, model.n_layer + 1)]
    found = []
    for policy in [*layers, model]:
        sampled = train_toy.sample_responses(policy, settings, problems, samples, generator)
        texts = train_toy.response_texts(sampled)  # the samples of a problem are neighbours
        correct = [
            train_toy.is_correct(problems[i // samples], text) for i, text in enumerate(texts)
        ]
        found.append(sum(correct) / len(correct))
    return found


def entropy(logits):
    log_pi = logits.log_softmax(-1)
    return -(log_pi.exp() * log_pi).sum(-1)


@torch.no_grad()
def matching_temperature(model, tokens, mask):
    tokens = tokens[:, :-1]  # mask has a column for each position that predicts something
    own = model(tokens)[mask]
    wanted = entropy(model.unembed(model.residual(tokens, model.n_layer))[mask]).mean()
    low = 1e-3
    high = 1e3
    for _ in range(60):  # entropy rises with the temperature, so bisect
        T = (low * high) ** 0.5
        if entropy(own / T).mean() < wanted:
            low = T
        else:
            high = T
    return T


WHY = "C"
