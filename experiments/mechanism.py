"""Why phase 1 costs: can one tell beforehand what a step of it is worth?

    python -m experiments.mechanism worth      # predicted and measured worth: an hour
    python -m experiments.mechanism cosines    # cosines of gradients: half an hour
    python -m experiments.mechanism report     # only the report, of the committed results
    python -m experiments.mechanism worth --quick DIR    # the smallest form, into DIR

`worth` runs what is missing of three things, each on the same base models. It trains the arms of
the study, together with those of experiments.passk, which has to run first: this is the measured
worth. It predicts worth from batches of 32 x 8 rollouts of a base model (first_order.py). And it
takes one and five steps of each kind, and samples from the model right after them: this shows what
the first order leaves out.

`cosines` takes the cosine of InterGRPO's gradient at layer l with GRPO's over the layers 1..l, on
the base models of experiments.study. Two controls show how to read it: the cosine of two halves of
a batch, and that with shuffled advantages.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

import train_toy as toy
from experiments import common, passk, study
from experiments.common import cosine, gradient
from experiments.first_order import first_order_worth, policy_step, rises
from minibupo import FULL, Policy, group_advantages, phases, update

RESULTS = common.RESULTS / "mechanism.jsonl"
WORTH_RESULTS = common.RESULTS / "first_order.jsonl"
WORTH_RUNS = common.RESULTS / "worth_runs.jsonl"
SEED = 600
BATCHES = 3
STEPS = (0, 5, 20, 60)
WORTH_BASES = {  # by W
    0: passk.BASES[:6],
    1: passk.BASES[:6],
    0.3: passk.BASES[:3],
    3: passk.BASES[:3],
}
WORTH_BATCHES = 6
AFTER = (1, 5)  # steps of one kind, after which accuracy is measured directly
PROBLEMS = 1000  # for that, with 8 samples each
STEP_OF = {  # kinds of arms, and the step that predicts them
    study.Arm(s_inter=5): "layer {}",
    study.Arm(s_inter=5, loop=study.frozen_above): "layers above {} frozen",
    study.Arm(s_inter=5, loop=study.embedding_frozen): "layer {}, embedding frozen",
}
AFTER_ARMS = (  # with their steps, beside GRPO
    "BuPO, layer 1",
    "BuPO, layer 3",
    "BuPO, layer 5",
    "BuPO, layer 3, embedding frozen",
    "GRPO, above 3 frozen",
)
RUNS = (  # arms besides those of experiments.passk
    *(f"BuPO, layer {l}" for l in (5, 1, 4, 2)),
    "BuPO, layer 3, embedding frozen",
    *(f"GRPO, above {l} frozen" for l in (3, 5, 1)),
    *(name for name, arm in study.ARMS.items() if arm.W),
)

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


def cosines(base: int, W: float) -> dict:
    """Return the cosines on a base model, and for W = 0 also during GRPO: {step: {name: list}}."""
    torch.set_num_threads(1)
    started = time.process_time()
    s = toy.Settings(seed=study.SEEDS[0], **study.SIZES)
    fresh = toy.Settings(seed=SEED, **study.SIZES)  # for rollouts that nothing is trained on
    model = toy.load_model(study.base_file(study.OUT, base, W))
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


def train(name: str, seed: int, base: Path, sizes: dict) -> dict:
    """Train one arm of the study from one base model, and return its record."""
    torch.set_num_threads(1)
    started = time.process_time()
    job = study.training(study.ARMS[name], seed, base, sizes)
    reward = [float(rollouts.rewards.mean()) for _, rollouts in study.ARMS[name].loop(job)]
    return {"layer": job.layer, "reward": reward, "seconds": time.process_time() - started}


def worth(base: Path, sizes: dict, batches: int, problems: int) -> dict:
    """Predict the worth of each kind of step on a base model, and measure what a few steps do.

    `rises` are those of first_order.py. `after` has, by arm, how much the accuracy on held-out
    problems has risen after each number of its steps in AFTER; nothing if there are no problems.
    `reward` is that of the first rollouts in training: it tells whether this is the same base
    model.
    """
    torch.set_num_threads(1)
    started = time.process_time()
    s = toy.Settings(seed=passk.SEED, **sizes)
    fresh = toy.Settings(seed=passk.SEED + 1, **sizes)  # for rollouts that no run is trained on
    model = toy.load_model(base)
    steps = {"GRPO": policy_step(FULL, s.lr)}
    for l in range(1, s.n_layer + 1):
        steps[f"layer {l}"] = policy_step(Policy(l), s.lr)
    for l in range(1, s.n_layer):
        steps[f"layers above {l} frozen"] = policy_step(FULL, s.lr, partial(common.above, layer=l))
        frozen = policy_step(Policy(l), s.lr, lambda model: [model.embed.weight])
        steps[f"layer {l}, embedding frozen"] = frozen
    found = rises(model, [toy.rollouts(fresh, model, i) for i in range(batches)], steps)
    after = ("GRPO", *AFTER_ARMS) if problems else ()
    return {
        "reward": float(toy.rollouts(s, model, 1).rewards.mean()),
        "rises": {name: matrix.tolist() for name, matrix in found.items()},
        "after": {arm: rise_after(arm, base, sizes, problems) for arm in after},
        "seconds": time.process_time() - started,
    }


def rise_after(arm: str, base: Path, sizes: dict, problems: int) -> list[float]:
    """Return by how much accuracy has risen after each number of an arm's first steps in AFTER.

    All arms answer the same held-out problems, and draw their samples with the same random numbers.
    """
    job = study.training(study.ARMS[arm], passk.SEED, base, sizes)

    def accuracy():
        return toy.evaluate(job.model, job.s, [job.s.n], problems)[0][str(job.s.n)]["avg@8"]

    before = accuracy()
    found = []
    for step, _ in study.ARMS[arm].loop(job):
        if step in AFTER:
            found.append(accuracy() - before)
        if step == max(AFTER):
            return found


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


def step_of(run: dict) -> str | None:
    """Return the name of the step that predicts a run of the study, or None if there is none."""
    arm = study.ARMS[run["arm"]]
    kind = STEP_OF.get(arm._replace(control="GRPO", layer=study.RULE, W=0))
    return kind and kind.format(run["layer"])


def worth_points(lines: list[dict], runs: list[dict]) -> list[tuple]:
    """Return (name of the step, base, W, predicted, measured worth) of every arm of five steps.

    The measured worth is that of one base model. A base model that does not repeat the first reward
    of the run is another one, and is left out.
    """
    points = {}
    for line in lines:
        of_base = [run for run in runs if run["base"] == line["base"]]
        control = "GRPO" if line["W"] == 0 else f"GRPO, W = {line['W']}"
        same = [run["reward"][0] == line["reward"] for run in of_base if run["arm"] == control]
        if not all(same) or not same:
            continue
        for run in of_base:
            arm = study.ARMS[run["arm"]]
            step = step_of(run)
            if step and arm.W == line["W"]:
                found = common.costs(of_base, run["arm"], control, arm.s_inter, "base")
                measured, _, _ = common.worth(found["arm - control"], found["idle - control"])
                predicted, _ = predicted_worth(line, step)
                # the rule's layer may be that of another arm: then both runs are the same
                points[step, line["base"], line["W"]] = (predicted, float(measured))
    return [(*key, *values) for key, values in points.items()]


def table_of_arms(lines: list[dict], runs: list[dict]) -> str:
    """Return predicted and measured worth of each arm of five steps, over base models.

    Both are ratios of means over base models, with their 95% intervals by Fieller.
    """
    rows = []
    for name in dict.fromkeys(run["arm"] for run in runs):
        arm = study.ARMS[name]
        of_arm = {run["base"]: run for run in runs if run["arm"] == name and step_of(run)}
        measured_on = [line for line in lines if line["W"] == arm.W and line["base"] in of_arm]
        if not measured_on:
            continue
        rise = [mean_rise(line, step_of(of_arm[line["base"]])) for line in measured_on]
        rise_of_grpo = [mean_rise(line, "GRPO") for line in measured_on]
        bases = {line["base"] for line in measured_on}
        of_bases = [run for run in runs if run["base"] in bases]
        control = study.without_phase_1(name)
        found = common.costs(of_bases, name, control, arm.s_inter, "base")
        measured = common.worth(found["arm - control"], found["idle - control"])
        cells = [common.ratio_text(rise, rise_of_grpo), common.with_limits(*measured)]
        rows.append([name, len(bases), *cells])
    return common.markdown_table(["arm", "bases", "predicted", "measured"], rows)


def noise_of_measured(runs: list[dict]) -> float:
    """Return the standard deviation over base models of the worth measured for an idle step.

    Its true worth is 0, so this is the noise of a measurement on one base model.
    """
    found = common.costs(runs, "GRPO, idle 5", "GRPO", 5, "base")
    costs, idle = (np.array(found[f"{name} - control"]) for name in ("arm", "idle"))
    return float(np.std(1 - costs / idle, ddof=1))


def table_of_steps(lines: list[dict], runs: list[dict], W: float) -> str:
    """Return what is left of the predicted worth after one step, five steps and a whole run.

    Each is a ratio of means over base models, with its 95% interval by Fieller.
    """
    of_W = [line for line in lines if line["W"] == W]
    rows = []
    for name in AFTER_ARMS:
        step = step_of(next(run for run in runs if run["arm"] == name))
        first_order = ([mean_rise(line, x) for line in of_W] for x in (step, "GRPO"))
        cells = [common.ratio_text(*first_order)]
        for i in range(len(AFTER)):
            rise, rise_of_grpo = (
                [line["after"][arm][i] for line in of_W] for arm in (name, "GRPO")
            )
            cells.append(common.ratio_text(rise, rise_of_grpo))
        bases = {line["base"] for line in of_W}
        found = common.costs([r for r in runs if r["base"] in bases], name, "GRPO", 5, "base")
        lost = np.array(found["idle - control"]) - found["arm - control"]
        cells.append(common.ratio_text(lost, found["idle - control"]) if len(lost) else "")
        rows.append([step, *cells])
    head = ["step", "first order", "after one step", "after five steps", "over the run"]
    return common.markdown_table(head, rows)


def mean_rise(line: dict, step: str) -> float:
    """Return the first-order rise of expected reward with a step on a base model."""
    matrix = np.array(line["rises"][step])
    return float(matrix[~np.eye(len(matrix), dtype=bool)].mean())


def report_of_worth(lines: list[dict], runs: list[dict]) -> str:
    """Return the predicted worth of all steps, and how it compares with the measured one."""
    texts = [
        "Predicted is the first-order worth of one step (first_order.py), from batches of 32 x 8 "
        "rollouts. Measured is that of training runs. Both are ratios of means over base models, "
        "which are those of experiments.passk, with 95% intervals by Fieller.\n\n"
        + table_of_arms(lines, runs)
    ]
    points = worth_points(lines, runs)
    for W in sorted({W for _, _, W, *_ in points}):
        texts.append(agreement([point for point in points if point[2] == W], f"W = {W}"))
    texts.append(agreement(points, "All"))
    if any(run["arm"] == "GRPO, idle 5" for run in runs):
        texts.append(
            "The measured worth of an idle step, which is 0, has a standard deviation over base "
            f"models of {noise_of_measured(runs):.2f}. This much of the distance is noise."
        )
    texts.append(
        "What the first order leaves out, W = 0: the rise of expected reward with a step over that "
        "with a step of GRPO, to first order; the rise of held-out accuracy after one and after "
        "five real steps over that after as many of GRPO; and the worth over the whole run.\n\n"
        + table_of_steps(lines, runs, 0)
    )
    texts.append(
        "Predicted worth by base model; ± is half of the 95% interval by the jackknife over "
        "batches.\n\n" + table_of_worth(lines)
    )
    return "\n\n".join(texts)


def agreement(points: list[tuple], name: str) -> str:
    """Return how well predicted and measured worth agree."""
    predicted, measured = np.array([point[3:] for point in points]).T
    distance = np.sqrt(np.mean((predicted - measured) ** 2))
    return (
        f"{name}: {len(points)} points of {len({base for _, base, *_ in points})} base models. "
        f"Predicted {predicted.mean():.2f}, measured {measured.mean():.2f} (means); correlation "
        f"{np.corrcoef(predicted, measured)[0, 1]:.2f}; distance from y = x {distance:.2f} (root "
        "mean square)."
    )


def report() -> str:
    """Return the report of the results in the files."""
    texts = ["Results of `python -m experiments.mechanism`."]
    if lines := common.read_lines(WORTH_RESULTS):
        texts.append(f"## Worth, predicted and measured\n\n{report_of_worth(lines, worth_runs())}")
    cosines = report_of_cosines(common.read_lines(RESULTS), common.read_lines(study.RESULTS))
    texts.append(f"## Cosines\n\n{cosines}")
    return "\n\n".join(texts)


def worth_runs() -> list[dict]:
    """Return the records of all runs from the base models of experiments.passk."""
    return common.read_lines(passk.RESULTS) + common.read_lines(WORTH_RUNS)


def measure_worth(out: Path, folder: Path, sizes: dict, plan: list, batches: int, problems: int):
    """Train the runs of a plan that are missing, and measure worth on each of its base models.

    Base models are in `out`, and results in two files of the folder. What a few steps do is
    measured on ordinary base models only.
    """
    study.run_missing(out, folder / WORTH_RUNS.name, sizes, plan, train)
    jobs = []
    for base, W in sorted({(base, study.ARMS[name].W) for name, base, _ in plan}):
        path = study.base_file(out, base, W)
        key = {"base": base, "W": W}
        jobs.append((key, worth, path, sizes, batches, 0 if W else problems))
    common.run_missing(folder / WORTH_RESULTS.name, jobs)


def main(argv=None):
    """Measure what is missing; write the report."""
    parser = argparse.ArgumentParser("mechanism", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("worth", "cosines", "report"))
    parser.add_argument("--quick", type=Path, metavar="DIR", help="small and short, into DIR")
    args = parser.parse_args(argv)
    if args.quick:
        if args.what != "worth":
            parser.error("--quick is for worth")
        quick(args.quick)
        return
    if args.what == "worth":
        for W, bases in WORTH_BASES.items():
            names = [name for name in RUNS if study.ARMS[name].W == W]
            plan = [(name, base, passk.SEED) for name in names for base in bases]
            measure_worth(passk.OUT, common.RESULTS, study.SIZES, plan, WORTH_BATCHES, PROBLEMS)
    if args.what == "cosines":
        pairs = [(base, W) for W in (0, *study.WEIGHTS) for base in study.BASES]
        jobs = [({"base": b, "W": W}, cosines, b, W) for b, W in pairs]
        common.run_missing(RESULTS, jobs)
    common.save_report(RESULTS, report())


def quick(out: Path):
    """Measure worth in its smallest form."""
    plan = [(name, 0, passk.SEED) for name in ("GRPO", *AFTER_ARMS)]
    measure_worth(out, out, study.QUICK, plan, batches=3, problems=16)
    runs = common.read_lines(out / WORTH_RUNS.name)
    lines = common.read_lines(out / WORTH_RESULTS.name)
    common.save_report(out / RESULTS.name, report_of_worth(lines, runs))


if __name__ == "__main__":
    main()
