"""Why phase 1 costs: does the gradient of an internal policy point where GRPO's does?

    python -m experiments.mechanism            # what is missing, two at a time: half an hour

Run experiments.study first: its base models and results are read here. For each base model, weight
W and batch of 32 x 8 rollouts the cosine of InterGRPO's gradient at layer l with GRPO's is taken
over the layers 1..l. Two controls show how to read a cosine: that of two halves of a batch, and
that with shuffled advantages.
"""

import time

import numpy as np
import torch

import train_toy as toy
from experiments import common, study
from experiments.common import cosine, gradient
from minibupo import FULL, Policy, group_advantages, phases, update

RESULTS = common.RESULTS / "mechanism.jsonl"
SEED, BATCHES, STEPS = 600, 3, (0, 5, 20, 60)


def measure(model, rollouts, generator) -> dict:
    """Return all cosines of one batch, each as a list over the layers 1..L."""
    A = group_advantages(rollouts.rewards).flatten()  # (N,)
    lengths = (rollouts.end - rollouts.prompt_len).float().view(rollouts.rewards.shape)
    length_advantages = group_advantages(lengths).flatten()  # as if long responses were rewarded
    question = torch.arange(len(A)) // rollouts.rewards.shape[1]
    first_half = (question % 2 == 0).float()
    shuffled = A[torch.randperm(len(A), generator=generator)]

    full = gradient(model, rollouts)
    half = gradient(model, rollouts, weights=A * first_half)
    other_half = gradient(model, rollouts, weights=A * (1 - first_half))
    found = {"GRPO's halves": [], "raw": [], "normed": [], "shuffled": [], "length": []}
    for l in range(1, model.n_layer + 1):
        policy = Policy(l)
        internal = gradient(model, rollouts, policy)
        up_to_l = {layer: half[layer] for layer in range(1, l + 1)}
        found["GRPO's halves"].append(cosine(up_to_l, other_half))
        found["raw"].append(cosine(internal, full))
        found["normed"].append(cosine(gradient(study.Normed(model), rollouts, policy), full))
        found["shuffled"].append(cosine(gradient(model, rollouts, policy, shuffled), full))
        # how much of the internal gradient is about the length of a response
        about_length = gradient(model, rollouts, policy, length_advantages)
        found["length"].append(cosine(about_length, internal))
    return found


def run(base: int, W: float) -> dict:
    """Return the cosines on a base model, and for W = 0 also during GRPO: {step: {name: list}}."""
    torch.set_num_threads(1)
    started = time.process_time()
    s = toy.Settings(seed=study.SEEDS[0], **study.SIZES)
    fresh = toy.Settings(seed=SEED, **study.SIZES)  # for rollouts that nothing is trained on
    model = toy.load_model(common.ROOT / "out" / "study" / f"base{base}-W{W}.pt")
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.lr, fused=True)
    generator = torch.Generator().manual_seed(base)
    steps = {}

    def look(step):
        batches = [
            measure(model, toy.rollouts(fresh, model, BATCHES * step + i), generator)
            for i in range(BATCHES)
        ]
        steps[str(step)] = {
            name: np.mean([batch[name] for batch in batches], 0).tolist() for name in batches[0]
        }

    look(0)
    last = max(STEPS) if W == 0 else 0
    for step, policy in phases(optimizer, FULL, s_inter=0, steps=last):
        update(model, optimizer, toy.rollouts(s, model, step), policy)
        if step in STEPS:
            look(step)
    return {"cosines": steps, "seconds": time.process_time() - started}


# ---- the report ----------------------------------------------------------------------------------


def table(lines: list[dict], W: float, step: int) -> str:
    """Return means over base models by layer, with half of the 95% interval."""
    found = [line["cosines"][str(step)] for line in lines if line["W"] == W]
    rows = []
    for name in found[0]:
        by_layer = zip(*(one[name] for one in found))
        rows.append([name, *(common.with_interval(values, "{:.2f}") for values in by_layer)])
    head = ["layer", *range(1, len(found[0]["raw"]) + 1)]
    title = f"W = {W}, step {step}, {len(found)} bases"
    return f"{title}\n\n{common.markdown_table(head, rows)}"


def prediction(lines: list[dict], runs: list[dict]) -> list[tuple]:
    """Return (base, W, layer, cosine at the base, BuPO - GRPO over the run in points).

    There is one for each base model, W and layer that the study has a pair for.
    """
    cosines = {(line["base"], line["W"]): line["cosines"]["0"]["raw"] for line in lines}
    run_of = {(line["arm"], line["base"], line["seed"]): line for line in runs}
    plain = study.Arm(s_inter=5)
    effects = {}
    for (name, base, seed), line in run_of.items():
        arm = study.ARMS[name]
        only_layer_or_W = arm == plain._replace(control=arm.control, layer=arm.layer, W=arm.W)
        control = run_of.get((arm.control, base, seed))
        if only_layer_or_W and control and (base, arm.W) in cosines:
            effect = 100 * (study.area(line) - study.area(control))
            effects.setdefault((base, arm.W, line["layer"]), []).append(effect)
    return [
        (base, W, layer, cosines[base, W][layer - 1], float(np.mean(values)))
        for (base, W, layer), values in sorted(effects.items())
    ]


def correlation(points: list[tuple]) -> tuple[float, float, float]:
    """Return Spearman's correlation of cosine and effect, and its 95% interval.

    The interval is the bootstrap's over base models.
    """
    from scipy.stats import spearmanr  # the extra `bench`

    bases = sorted({base for base, *_ in points})
    by_base = {b: [point[3:] for point in points if point[0] == b] for b in bases}
    rng = np.random.default_rng(0)
    found = []
    for _ in range(2000):
        drawn = [pair for b in rng.choice(bases, len(bases)) for pair in by_base[b]]
        found.append(spearmanr(*zip(*drawn)).statistic)
    rho = spearmanr(*zip(*(point[3:] for point in points))).statistic
    low, high = np.quantile(found, (0.025, 0.975))
    return float(rho), float(low), float(high)


def report(lines: list[dict], runs: list[dict]) -> str:
    """Return all tables, and how well the cosine at the base predicts the effect of phase 1."""
    texts = [
        f"`python -m experiments.mechanism`: cosines over the layers 1..l, {BATCHES} batches of "
        "32 x 8 each; mean ± half of the 95% interval over base models."
    ]
    for W, step in [(0, step) for step in STEPS] + [(W, 0) for W in study.WEIGHTS]:
        if sum(line["W"] == W for line in lines) > 1:
            texts.append(table(lines, W, step))
    points = prediction(lines, runs)
    bases = len({base for base, *_ in points})
    rho, low, high = correlation(points)
    texts.append(
        f"Cosine and effect: {len(points)} points of {bases} bases, Spearman's correlation "
        f"{rho:.2f} ({low:.2f} to {high:.2f})"
    )
    return "\n\n".join(texts)


def main():
    """Measure what is missing; write the tables and the correlation."""
    pairs = [(base, W) for W in (0, *study.WEIGHTS) for base in study.BASES]
    jobs = [({"base": base, "W": W}, run, base, W) for base, W in pairs]
    lines = common.run_missing(RESULTS, jobs)
    common.save_report(RESULTS, report(lines, common.read_lines(study.RESULTS)))


if __name__ == "__main__":
    main()
