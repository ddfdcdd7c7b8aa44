"""Solution 9: C. pi_theta at T = 0.14 answers as well as pi_Layer^L at 1, and at temperature 0 they
hardly differ. norm(H^L) has length sqrt(d) whatever H^L had; here H^L is about seven times as long,
so its logits are seven times as large: softmax(7 z) is softmax(z) at temperature 1/7.

The base has seen careful work and jumps. Careful work is the likeliest at most steps, and a sharp
policy keeps to the likeliest. So raw policies seem surer with depth partly for being longer. It is
no gain in knowledge: compare policies at equal entropy, or at temperature 0."""

import torch

import train_toy

settings = train_toy.Settings()
generator = torch.Generator().manual_seed(0)


def accuracies(model, problems, samples):
    found = []
    for policy in [*(model.truncated(l) for l in range(1, model.n_layer + 1)), model]:
        sampled = train_toy.respond(policy, settings, problems, samples, generator)
        texts = train_toy.responses(sampled)  # the samples of a problem are neighbours
        right = [train_toy.is_right(problems[i // samples], text) for i, text in enumerate(texts)]
        found.append(sum(right) / len(right))
    return found


def entropy(logits):
    log_pi = logits.log_softmax(-1)
    return -(log_pi.exp() * log_pi).sum(-1)


@torch.no_grad()
def matching_temperature(model, tokens, mask):
    tokens = tokens[:, :-1]  # mask has a column for each position that predicts something
    own = model(tokens)[mask]
    wanted = entropy(model.unembed(model.residual(tokens, model.n_layer))[mask]).mean()
    low, high = 1e-3, 1e3
    for _ in range(60):  # entropy rises with the temperature, so bisect
        T = (low * high) ** 0.5
        low, high = (T, high) if entropy(own / T).mean() < wanted else (low, T)
    return T


WHY = "C"
