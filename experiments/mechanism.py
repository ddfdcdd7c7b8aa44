"""Why phase 1 costs: does the gradient of an internal policy point where GRPO's does?

    python -m experiments.mechanism worth      # first-order worth, what is missing: half an hour
    python -m experiments.mechanism cosines    # cosines of gradients, what is missing: half an hour
    python -m experiments.mechanism report     # only the report, of the committed results

Run experiments.study first: its base models and results are read here. `worth` predicts, from
batches of 32 x 8 rollouts of each base model, what a step of phase 1 is worth (first_order.py), and
the report compares it with what the study measured on the same base model. `cosines` takes the
cosine of InterGRPO's gradient at layer l with GRPO's over the layers 1..l. Two controls show how to
read it: the cosine of two halves of a batch, and that with shuffled advantages.
"""

import argparse
import time

import numpy as np
import torch

import train_toy as toy
from experiments import common, study
from experiments.common import cosine, gradient
from experiments.first_order import first_order_worth, frozen_step, policy_step, rises
from minibupo import FULL, Policy, group_advantages, phases, update

RESULTS = common.RESULTS / "mechanism.jsonl"
WORTH_RESULTS = common.RESULTS / "first_order.jsonl"
SEED = 600
BATCHES = 3
STEPS = (0, 5, 20, 60)
WORTH_BATCHES = 6
STEP_OF = {  # kinds of arms, and the step that predicts them
    study.Arm(s_inter=5): "layer {}",
    study.Arm(s_inter=5, loop=study.frozen_above): "above {} frozen",
}

# ---- what is measured ----------------------------------------------------------------------------


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


def base_path(base: int, W: float):
    """Return the file of a base model of the study."""
    return common.ROOT / "out" / "study" / f"base{base}-W{W}.pt"


def cosines(base: int, W: float) -> dict:
    """Return the cosines on a base model, and for W = 0 also during GRPO: {step: {name: list}}."""
    torch.set_num_threads(1)
    started = time.process_time()
    s = toy.Settings(seed=study.SEEDS[0], **study.SIZES)
    fresh = toy.Settings(seed=SEED, **study.SIZES)  # for rollouts that nothing is trained on
    model = toy.load_model(base_path(base, W))
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


def worth(base: int, W: float) -> dict:
    """Return first_order.rises on a base model, for phase 1 at each layer and the frozen control.

    `reward` is that of the study's first rollouts: it tells whether this is the same base model.
    """
    torch.set_num_threads(1)
    started = time.process_time()
    s = toy.Settings(seed=study.SEEDS[0], **study.SIZES)
    fresh = toy.Settings(seed=SEED, **study.SIZES)
    model = toy.load_model(base_path(base, W))
    batches = [toy.rollouts(fresh, model, i) for i in range(WORTH_BATCHES)]
    steps = {"GRPO": policy_step(FULL, s.lr)}
    for l in range(1, s.n_layer + 1):
        steps[f"layer {l}"] = policy_step(Policy(l), s.lr)
    for l in range(1, s.n_layer):
        steps[f"above {l} frozen"] = frozen_step(l, s.lr)
    found = rises(model, batches, steps)
    return {
        "reward": float(toy.rollouts(s, model, 1).rewards.mean()),
        "rises": {name: matrix.tolist() for name, matrix in found.items()},
        "seconds": time.process_time() - started,
    }


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


def report_of_cosines(lines: list[dict], runs: list[dict]) -> str:
    """Return all tables, and how well the cosine at the base predicts the effect of phase 1."""
    texts = [
        f"Cosines over the layers 1..l, {BATCHES} batches of 32 x 8 each; mean ± half of the 95% "
        "interval over base models."
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


def predicted_worth(line: dict, name: str) -> tuple[float, float]:
    """Return worth_1 of a step on a base model, and half of its 95% interval over batches."""
    return first_order_worth(np.array(line["rises"][name]), np.array(line["rises"]["GRPO"]))


def table_of_worth(lines: list[dict]) -> str:
    """Return worth_1 by base model and step, with half of the 95% interval over batches."""
    names = [name for name in lines[0]["rises"] if name != "GRPO"]
    rows = []
    for line in sorted(lines, key=lambda line: (line["W"], line["base"])):
        found = [predicted_worth(line, name) for name in names]
        cells = [f"{value:.2f} ± {half:.2f}" for value, half in found]
        rows.append([f"{line['base']}, W = {line['W']}", *cells])
    return common.markdown_table(["base", *names], rows)


def worth_points(lines: list[dict], runs: list[dict]) -> list[tuple]:
    """Return (name of the step, base, W, predicted, measured worth) of every arm of five steps.

    The measured worth is that of one base model, over its seeds. A base model that does not repeat
    the first reward of the study's run is another one, and is left out.
    """
    points = {}
    for line in lines:
        base = line["base"]
        W = line["W"]
        of_base = [run for run in runs if run["base"] == base]
        run_of = {(run["arm"], run["seed"]): run for run in of_base}
        for name, arm in study.ARMS.items():
            trained = run_of.get((name, study.SEEDS[0]))
            control = run_of.get((arm.control, study.SEEDS[0]))
            kind = arm._replace(control="GRPO", layer=study.RULE, W=0)
            if kind not in STEP_OF or arm.W != W or not trained or not control:
                continue
            if control["reward"][0] != line["reward"]:
                continue
            step = STEP_OF[kind].format(trained["layer"])
            found = common.costs(of_base, name, arm.control, arm.s_inter, "base")
            measured, _, _ = common.worth(found["arm - control"], found["idle - control"])
            # the rule's layer comes first, with two seeds
            points.setdefault((step, base, W), (predicted_worth(line, step)[0], float(measured)))
    return [(*key, *values) for key, values in points.items()]


def report_of_worth(lines: list[dict], runs: list[dict]) -> str:
    """Return the predicted worth of all steps, and how it compares with the measured one."""
    points = worth_points(lines, runs)
    text = (
        f"First-order worth of one step (first_order.py), {WORTH_BATCHES} batches of 32 x 8; ± is "
        "half of the 95% interval by the jackknife over batches.\n\n" + table_of_worth(lines)
    )
    if points:
        predicted, measured = np.array([point[3:] for point in points]).T
        distance = np.sqrt(np.mean((predicted - measured) ** 2))
        text += (
            f"\n\nPredicted and measured worth: {len(points)} points of "
            f"{len({base for _, base, *_ in points})} bases, means {predicted.mean():.2f} and "
            f"{measured.mean():.2f}, correlation {np.corrcoef(predicted, measured)[0, 1]:.2f}, "
            f"distance from y = x {distance:.2f} (root mean square)."
        )
    return text


def report() -> str:
    """Return the report of the results in the files."""
    runs = common.read_lines(study.RESULTS)
    texts = ["Results of `python -m experiments.mechanism`."]
    if lines := common.read_lines(WORTH_RESULTS):
        texts.append(f"## Worth, predicted\n\n{report_of_worth(lines, runs)}")
    texts.append(f"## Cosines\n\n{report_of_cosines(common.read_lines(RESULTS), runs)}")
    return "\n\n".join(texts)


def main(argv=None):
    """Measure what is missing; write the report."""
    parser = argparse.ArgumentParser("mechanism", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("worth", "cosines", "report"))
    what = parser.parse_args(argv).what
    if what != "report":
        measured, results = {"worth": (worth, WORTH_RESULTS), "cosines": (cosines, RESULTS)}[what]
        pairs = [(base, W) for W in (0, *study.WEIGHTS) for base in study.BASES]
        common.run_missing(results, [({"base": b, "W": W}, measured, b, W) for b, W in pairs])
    common.save_report(RESULTS, report())


if __name__ == "__main__":
    main()
