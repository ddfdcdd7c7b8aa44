"""Why phase 1 costs: does the gradient of an internal policy point where GRPO's does?

    python experiments/mechanism.py            # what is missing, two at a time: half an hour

After experiments/study.py, whose bases and results it reads. For each base, weight W and batch of
32 x 8 rollouts it takes the cosine, over the blocks 1..l, of InterGRPO's gradient at layer l with
GRPO's, and what could explain it. Two controls say how to read a cosine: that of two halves of a
batch, and that of shuffled advantages.

At the first step of a batch every ratio is 1. So the gradient of GRPO's loss is that of
-mean(A log pi(token)) over the response tokens, for any policy pi.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import train_toy as toy  # noqa: E402
from experiments import study  # noqa: E402
from experiments.seeds import read_lines, run_missing, save_report  # noqa: E402
from minibupo import (  # noqa: E402
    FULL,
    Policy,
    bupo,
    group_advantages,
    policy_logits,
    response_mask,
)

RESULTS = ROOT / "experiments" / "results" / "mechanism.jsonl"
SEED, BATCHES, STEPS = 600, 3, (0, 5, 20, 60)


class Batch:
    """Rollouts as a list of response tokens: where they are, which, and with what advantage."""

    def __init__(self, rollouts):
        self.tokens, T = rollouts.tokens, rollouts.tokens.shape[1]
        mask = response_mask(rollouts.prompt_len, rollouts.end, T)
        self.positions = mask.flatten().nonzero()[:, 0]  # (M,)
        self.row = self.positions // (T - 1)  # (M,)
        self.chosen = self.tokens[:, 1:].flatten()[self.positions]  # (M,)
        self.of_rows = group_advantages(rollouts.rewards).flatten()  # (N,)
        lengths = (rollouts.end - rollouts.prompt_len).float().view(rollouts.rewards.shape)
        self.lengths = group_advantages(lengths).flatten()  # as if long responses were rewarded
        self.question = torch.arange(len(mask)) // rollouts.rewards.shape[1]  # (N,)


def gradient(model, policy, batch: Batch, weight, chosen=None) -> list:
    """The gradient of -mean(weight * log pi(chosen)), as one vector for each block with one.

    weight, chosen (M,); chosen is the batch's own tokens unless given."""
    chosen = batch.chosen if chosen is None else chosen
    model.zero_grad(set_to_none=True)
    logits = policy_logits(model, batch.tokens[:, :-1], policy, batch.positions)
    logp = logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0]
    (-(weight * logp).mean()).backward()
    blocks = model.blocks if policy == FULL else model.blocks[: policy.layer]
    return [torch.cat([p.grad.flatten() for p in block.parameters()]) for block in blocks]


def cosine(one: list, other: list) -> float:
    """Over the blocks that both have."""
    a, b = (torch.cat(blocks[: min(len(one), len(other))]) for blocks in (one, other))
    return float(torch.cosine_similarity(a, b, dim=0))


def readouts(model, batch: Batch) -> dict:
    """What is unembedded in place of h: h itself, h through the final norm, or h at the size of
    H^L."""
    with torch.no_grad():
        top = model.residual(batch.tokens[:, :-1], model.n_layer).flatten(0, 1)[batch.positions]
        size = top.square().mean(-1).sqrt().mean()
    return {
        "raw": lambda h: h,
        "normed": model.final_norm,
        "matched": lambda h: h / h.square().mean(-1, keepdim=True).sqrt() * size,
    }


def measure(model, rollouts, generator) -> dict:
    """All cosines of one batch, each a list over layers 1..L."""
    batch = Batch(rollouts)
    A = batch.of_rows[batch.row]
    first_half = (batch.question[batch.row] % 2 == 0).float()
    rows, tokens = (torch.randperm(n, generator=generator) for n in (len(batch.of_rows), len(A)))
    full = gradient(model, FULL, batch, A)
    halves = [gradient(model, FULL, batch, A * half) for half in (first_half, 1 - first_half)]
    found = {"GRPO's halves": [cosine(halves[0][:l], halves[1]) for l in range(1, len(full) + 1)]}
    views = readouts(model, batch)
    for l in range(1, model.n_layer + 1):
        for name, readout in views.items():
            model.unembed = lambda h, readout=readout: type(model).unembed(model, readout(h))
            internal = gradient(model, Policy(l), batch, A)
            del model.unembed
            found.setdefault(name, []).append(cosine(internal, full))
            if name == "raw":
                mine = internal

        def at_layer(weight, chosen=None, l=l):
            return gradient(model, Policy(l), batch, weight, chosen)

        others = {
            "shuffled": cosine(at_layer(batch.of_rows[rows][batch.row]), full),
            "its halves": cosine(at_layer(A * first_half), at_layer(A * (1 - first_half))),
            # what the internal gradient is made of: itself with only part of what A tells
            "length": cosine(at_layer(batch.lengths[batch.row]), mine),
            "EOS": cosine(at_layer(A * (batch.chosen == toy.EOS)), mine),
            # each position gets the token and advantage of another: only how often a token is
            # right is left, not where
            "marginal": cosine(at_layer(A[tokens], batch.chosen[tokens]), mine),
        }
        for name, value in others.items():
            found.setdefault(name, []).append(value)
    return found


def run(base: int, W: float) -> dict:
    """The cosines on a base, and for W = 0 during GRPO from it: a line {step: {name: list}}."""
    torch.set_num_threads(1)
    s, started = toy.Settings(seed=study.SEEDS[0], **study.SIZES), time.process_time()
    model = toy.load_model(ROOT / "out" / "study" / f"base{base}-W{W}.pt")
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.lr, fused=True)
    generator, steps = torch.Generator().manual_seed(base), {}
    ours = toy.Settings(**(vars(s) | {"seed": SEED}))

    def look(step):
        batches = [
            measure(model, toy.rollouts(ours, model, BATCHES * step + i), generator)
            for i in range(BATCHES)
        ]
        steps[str(step)] = {
            name: np.mean([b[name] for b in batches], 0).tolist() for name in batches[0]
        }
        model.zero_grad(set_to_none=True)

    look(0)
    last = max(STEPS) if W == 0 else 0
    sample = lambda step: toy.rollouts(s, model, step)  # noqa: E731
    for step, *_ in bupo(model, optimizer, sample, FULL, 0, last):
        if step in STEPS:
            look(step)
    return {"cosines": steps, "seconds": time.process_time() - started}


def table(lines: list[dict], W: float, step: int) -> str:
    """Means over bases by layer, with half of the 95 % interval."""
    found = [line["cosines"][str(step)] for line in lines if line["W"] == W]
    rows = [f"W = {W}, step {step}, {len(found)} bases\n"]
    rows.append("| layer | " + " | ".join(map(str, range(1, len(found[0]["raw"]) + 1))) + " |")
    rows.append("|" + "---|" * (1 + len(found[0]["raw"])))
    for name in found[0]:
        by_layer = zip(*(one[name] for one in found))
        cells = ["{:.2f} ± {:.2f}".format(*study.interval(values)) for values in by_layer]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def prediction(lines: list[dict], runs: list[dict]) -> list[tuple]:
    """(base, W, layer, cosine at the base, BuPO - GRPO over the run in points), of every base, W
    and layer that the study has a pair for."""
    cosines = {(line["base"], line["W"]): line["cosines"]["0"]["raw"] for line in lines}
    of = {(line["arm"], line["base"], line["seed"]): line for line in runs}
    points = {}
    for (arm, base, seed), one in of.items():
        a = study.ARMS[arm]
        plain = a.s_inter == 5 and a.site == "resid_post" and a.advantage == "grpo" and not a.change
        control = of.get((a.control, base, seed))
        if plain and control and (base, a.W) in cosines:
            effect = 100 * (study.area(one) - study.area(control))
            points.setdefault((base, a.W, one["layer"]), []).append(effect)
    return [
        (base, W, layer, cosines[base, W][layer - 1], float(np.mean(effects)))
        for (base, W, layer), effects in sorted(points.items())
    ]


def correlation(points: list[tuple]) -> tuple[float, float, float]:
    """Spearman's correlation of cosine and effect, with its 95 % interval from resampled bases."""
    from scipy.stats import spearmanr

    bases = sorted({base for base, *_ in points})
    by_base = {b: [p[3:] for p in points if p[0] == b] for b in bases}
    rng, found = np.random.default_rng(0), []
    for _ in range(2000):
        drawn = [pair for b in rng.choice(bases, len(bases)) for pair in by_base[b]]
        found.append(spearmanr(*zip(*drawn)).statistic)
    all_of_them = spearmanr(*zip(*(p[3:] for p in points))).statistic
    return float(all_of_them), *map(float, np.quantile(found, (0.025, 0.975)))


def report(lines: list[dict], runs: list[dict]) -> str:
    """All tables, and how well the cosine at the base predicts the effect of phase 1."""
    texts = [f"`python experiments/mechanism.py`: cosines over the blocks 1..l, {BATCHES} batches"]
    texts[0] += " of 32 x 8 each; mean ± half of the 95 % interval over bases."
    for W, step in [(0, step) for step in STEPS] + [(W, 0) for W in study.WEIGHTS]:
        if sum(line["W"] == W for line in lines) > 1:
            texts.append(table(lines, W, step))
    points = prediction(lines, runs)
    said = (
        "Cosine and effect: {} points of {} bases, Spearman's correlation {:.2f} ({:.2f} to {:.2f})"
    )
    bases = len({base for base, *_ in points})
    return "\n\n".join([*texts, said.format(len(points), bases, *correlation(points))])


def main():
    """Measure what is missing; write the tables and the correlation."""
    pairs = [(base, W) for W in (0, *study.WEIGHTS) for base in study.BASES]
    lines = run_missing(RESULTS, [({"base": b, "W": W}, run, b, W) for b, W in pairs])
    save_report(RESULTS, report(lines, read_lines(study.RESULTS)))


if __name__ == "__main__":
    main()
