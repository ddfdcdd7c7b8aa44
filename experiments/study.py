"""BuPO against GRPO on the toy task: what phase 1 costs, why, and when it costs less.

    python -m experiments.study                # what is missing, two runs at a time: three hours
    python -m experiments.study --report       # only the report, of the committed results
    python -m experiments.study --quick DIR    # the smallest form, in half a minute, into DIR

An arm differs from its control in one thing. Both start from the same base models and are asked the
same problems in the same order. A base model is a seed of pretraining. Base models differ more than
seeds do, so every interval is taken over base models. The primary measure is the area under the
curve: held-out Avg@8 at n = 5, mean over the run. The primary contrasts are BuPO - GRPO, at the
rule's layer and at layer 3.

Base models 70..77 and seeds 500, 501 had not been used before. The settings are those of an earlier
trial on base models 50..53. A first study, at commit 07e9ae1, had more arms: base models without
QK-norm, a phase 1 that ends by itself, several internal layers in turn, what a linear probe reads,
and Pass@64.
"""

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import minibupo
import train_toy as toy
from experiments import common, ppo
from minibupo import FULL, Policy, phases, update
from model import GPT

OUT = common.ROOT / "out" / "study"
RESULTS = common.RESULTS / "study.jsonl"
RULE = "rule"  # the layer that the paper's rule picks on a base model
FINITE = 96  # problems of the finite training set

# ---- the arms ------------------------------------------------------------------------------------


@dataclass
class Training:
    """What the loop of an arm works on."""

    s: toy.Settings
    model: GPT
    optimizer: torch.optim.Optimizer
    layer: int
    target: Policy  # of phase 1
    s_inter: int
    questions: Callable  # (settings, step) -> problems
    update: Callable  # (model, rollouts, policy): minibupo's update, or PPO's

    def phases(self, target: Policy, **options):
        """Return minibupo.phases of this run."""
        return phases(self.optimizer, target, self.s_inter, self.s.steps, **options)

    def sample(self, step: int, model=None) -> minibupo.Rollouts:
        """Return the rollouts of a step, sampled from the model unless another one is given."""
        return toy.rollouts(self.s, model or self.model, step, self.questions(self.s, step))


# Algorithm 1 and its variations. Each yields (step, rollouts) after the step's update.


def bupo(run: Training):
    """Yield the steps of BuPO; of GRPO if s_inter is 0."""
    for step, policy in run.phases(run.target):
        rollouts = run.sample(step)
        run.update(run.model, rollouts, policy)
        yield step, rollouts


def moments_kept(run: Training):
    """BuPO without the reset of AdamW's moments between the phases, as in the official code."""
    for step, policy in run.phases(run.target, reset_moments=False):
        rollouts = run.sample(step)
        run.update(run.model, rollouts, policy)
        yield step, rollouts


def only_reset(run: Training):
    """GRPO in both phases: of BuPO only the reset of AdamW's moments remains."""
    for step, _ in run.phases(FULL):
        rollouts = run.sample(step)
        run.update(run.model, rollouts, FULL)
        yield step, rollouts


def idle(run: Training):
    """GRPO whose first s_inter updates are skipped; everything else is done as in GRPO."""
    for step, _ in run.phases(FULL):
        rollouts = run.sample(step)
        if step > run.s_inter:
            run.update(run.model, rollouts, FULL)
        yield step, rollouts


def frozen_above(run: Training):
    """GRPO in both phases; in phase 1 only the weights that BuPO would train are trained."""
    for step, _ in run.phases(FULL):
        for parameter in common.above(run.model, run.layer):
            parameter.requires_grad_(step > run.s_inter)
        rollouts = run.sample(step)
        run.update(run.model, rollouts, FULL)
        yield step, rollouts


def embedding_frozen(run: Training):
    """BuPO whose phase 1 leaves the embedding, which is also E_u, as it is."""
    for step, policy in run.phases(run.target):
        run.model.embed.weight.requires_grad_(policy == FULL)
        rollouts = run.sample(step)
        run.update(run.model, rollouts, policy)
        yield step, rollouts


def on_policy(run: Training):
    """BuPO whose responses are sampled from the policy that learns, in phase 1 as well."""
    for step, policy in run.phases(run.target):
        sampled_from = run.model if policy == FULL else run.model.truncated(run.layer)
        rollouts = run.sample(step, sampled_from)
        run.update(run.model, rollouts, policy)
        yield step, rollouts


def normed(run: Training):
    """BuPO whose internal policy is read through the final norm, as pi_theta is."""
    for step, policy in run.phases(run.target):
        rollouts = run.sample(step)
        run.update(run.model if policy == FULL else Normed(run.model), rollouts, policy)
        yield step, rollouts


class Normed(torch.nn.Module):
    """A model whose internal policies are softmax(LN_f(H^l) E_u^T): the logit lens."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.residual = model.residual
        self.n_layer = model.n_layer
        self.device = model.device

    def unembed(self, h):
        return self.model.unembed(self.model.final_norm(h))


def fresh(s: toy.Settings, step: int) -> None:
    """Return None: toy.rollouts then draws new problems for each step."""


def finite_set(s: toy.Settings, step: int) -> list[str]:
    """Return the problems of a step, drawn from the same few problems at every step."""
    problems = toy.draw_questions(toy.rng_for(s.seed, "finite set"), FINITE, s.n)
    return toy.rng_for(s.seed, "questions", step).sample(problems, s.questions)


class Arm(NamedTuple):
    """What is compared. With s_inter = 0 it is GRPO, or what `advantage` names."""

    control: str | None = "GRPO"
    s_inter: int = 0
    layer: int | str = RULE
    site: str = "resid_post"
    loop: Callable = bupo
    advantage: str = "grpo"  # a kind of minibupo's, or "ppo": a critic in place of groups
    questions: Callable = fresh
    W: float = 0  # weight of the internal layer policies in the base model's pretraining


WEIGHTS = (0.3, 1, 3)
ARMS = {
    "GRPO": Arm(None),
    "BuPO, rule": Arm(s_inter=5),
    **{f"BuPO, layer {l}": Arm(s_inter=5, layer=l) for l in (3, 5, 1, 2, 4)},
    **{
        f"GRPO, above {l} frozen": Arm(s_inter=5, layer=l, loop=frozen_above)
        for l in (1, 2, 3, 4, 5, RULE)
    },
    **{f"BuPO, rule, s_inter {n}": Arm(s_inter=n) for n in (2, 10, 20, 60)},
    "BuPO, rule, attention": Arm(s_inter=5, site="attn_out"),
    "BuPO, rule, FFN": Arm(s_inter=5, site="mlp_out"),
    **{f"GRPO, idle {n}": Arm(s_inter=n, loop=idle) for n in (5, 20)},
    "GRPO, moments reset at 5": Arm(s_inter=5, loop=only_reset),
    "BuPO, rule, moments kept": Arm("BuPO, rule", 5, loop=moments_kept),
    "BuPO, layer 3, on-policy": Arm("BuPO, layer 3", 5, 3, loop=on_policy),
    "BuPO, layer 3, embedding frozen": Arm(s_inter=5, layer=3, loop=embedding_frozen),
    "BuPO, layer 3, normed": Arm("BuPO, layer 3", 5, 3, loop=normed),
    "BuPO, rule, normed": Arm("BuPO, rule", 5, loop=normed),
    **{f"GRPO, W = {W}": Arm(None, W=W) for W in WEIGHTS},
    **{
        f"BuPO, layer {l}, W = {W}": Arm(f"GRPO, W = {W}", 5, l, W=W)
        for W in WEIGHTS
        for l in (3, 5)
    },
    "RLOO": Arm(None, advantage="rloo"),
    "RLOO, BuPO": Arm("RLOO", 5, advantage="rloo"),
    "Reinforce++": Arm(None, advantage="reinforce++"),
    "Reinforce++, BuPO": Arm("Reinforce++", 5, advantage="reinforce++"),
    "PPO": Arm(None, advantage="ppo"),
    "PPO, BuPO": Arm("PPO", 5, advantage="ppo"),
    "96 problems, GRPO": Arm(None, questions=finite_set),
    "96 problems, BuPO": Arm("96 problems, GRPO", 5, questions=finite_set),
}
MAIN = ("GRPO", "BuPO, rule", "BuPO, layer 3", "96 problems, GRPO", "96 problems, BuPO")
BASES = range(70, 78)
SEEDS = (500, 501)
SIZES = dict(questions=32, steps=60, lr=4e-4, threads=1, eval_problems=128)
QUICK = toy.SMOKE | dict(questions=8, steps=6, eval_problems=16, threads=1)
QUICK_ARMS = (
    "GRPO",
    "BuPO, rule",
    "GRPO, above 3 frozen",
    "GRPO, idle 5",
    "BuPO, rule, normed",
    "PPO, BuPO",
)


def plan() -> list[tuple]:
    """Return all runs as (arm, base, seed), the most important ones first.

    The main question has eight base models and two seeds, the dose W eight and one, the rest six
    and one.
    """
    dose = [name for name, arm in ARMS.items() if arm.W or name == "BuPO, layer 5"]
    rest = [name for name in ARMS if name not in (*MAIN, *dose)]
    runs = [(name, base, SEEDS[0]) for base in BASES for name in MAIN[:3]]
    runs += [(name, base, SEEDS[0]) for base in BASES for name in dose]
    runs += [(name, base, SEEDS[0]) for name in rest for base in BASES[:6]]
    runs += [(name, base, SEEDS[1]) for base in BASES for name in MAIN[:3]]
    runs += [(name, base, seed) for seed in SEEDS for base in BASES for name in MAIN[3:]]
    return runs


# ---- one run -------------------------------------------------------------------------------------


def base_file(out: Path, base: int, W: float) -> Path:
    """Return the file of a base model."""
    return out / f"base{base}-W{W}.pt"


def make_base(path: Path, s: toy.Settings):
    """Pretrain a base model, unless its file exists."""
    if not path.exists():
        toy.save_checkpoint(path, common.base_model(s)[0])


def training(arm: Arm, seed: int, base: Path, sizes: dict) -> Training:
    """Return what the loop of an arm needs to train from a base model."""
    torch.manual_seed(seed)  # for the critic's head; the rest has generators of its own
    s = toy.Settings(seed=seed, **sizes)
    model = toy.load_model(base)
    layer = arm.layer
    if layer == RULE:
        inside = toy.means_inside(model, *toy.own_solutions(model, s))
        layer = minibupo.target_layer(inside["dH_mlp"])
    layer = min(layer, s.n_layer - 1)  # the models of the smallest form have fewer layers
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.lr, fused=True)
    if arm.advantage == "ppo":
        step = ppo.Critic(model).update
    else:
        step = partial(update, advantage=arm.advantage)
    return Training(
        s=s,
        model=model,
        optimizer=optimizer,
        layer=layer,
        target=Policy(layer, arm.site),
        s_inter=min(arm.s_inter, s.steps),
        questions=arm.questions,
        update=lambda model, rollouts, policy: step(model, optimizer, rollouts, policy),
    )


def run(name: str, seed: int, base: Path, sizes: dict) -> dict:
    """Train one arm from one base model with one seed, and return its record.

    `reward` has the mean reward of each step's rollouts. `held` has [step, processor seconds of
    training so far, Avg@8 at n on 64 held-out problems]. `final` is train_toy.evaluate at n and
    n + 1.
    """
    torch.set_num_threads(1)
    started = time.process_time()
    job = training(ARMS[name], seed, base, sizes)
    s = job.s
    model = job.model
    reward = []
    held = []
    seconds = 0.0
    since = time.process_time()
    for step, rollouts in ARMS[name].loop(job):
        seconds += time.process_time() - since
        reward.append(float(rollouts.rewards.mean()))
        if step % 5 == 0 or step == s.steps:
            tier = toy.evaluate(model, s, [s.n], 64)[0][str(s.n)]
            held.append([step, seconds, tier["avg@8"]])
        since = time.process_time()
    final = toy.evaluate(model, s, [s.n, s.n + 1], s.eval_problems)[0]
    return {
        "n": s.n,
        "layer": job.layer,
        "reward": reward,
        "held": held,
        "final": final,
        "seconds": time.process_time() - started,
    }


# ---- the report ----------------------------------------------------------------------------------


def area(line: dict) -> float:
    """Return held-out accuracy, mean over the run."""
    return np.mean([avg for *_, avg in line["held"]])


MEASURES = {  # of a record; larger is better
    "over the run": area,
    "at the end": lambda line: line["final"][str(line["n"])]["avg@8"],
    "at the end, n + 1": lambda line: line["final"][str(line["n"] + 1)]["avg@8"],
    "Pass@8": lambda line: line["final"][str(line["n"])]["pass@8"],
}


def at_equal_time(line: dict, control: dict) -> float:
    """Return arm - control over the run, the control after as many processor seconds as the arm."""
    _, seconds, avg = np.array(line["held"]).T
    _, other_seconds, other_avg = np.array(control["held"]).T
    return np.mean(avg - np.interp(seconds, other_seconds, other_avg))


def differences(lines: list[dict], name: str, difference) -> list[float]:
    """Return arm - control in points (hundredths), for each base model the mean over its seeds."""
    found = common.differences(lines, name, ARMS[name].control, difference, unit="base")
    return [100 * value for value in found]


def without_phase_1(name: str) -> str:
    """Return the control of an arm that has no phase 1: that of its control, if need be."""
    while ARMS[name].s_inter:
        name = ARMS[name].control
    return name


def report(lines: list[dict]) -> str:
    """Return all contrasts and what a step of phase 1 is worth, with intervals over base models."""
    contrasts = {
        name: lambda line, control, read=read: read(line) - read(control)
        for name, read in MEASURES.items()
    }
    contrasts["at equal time"] = at_equal_time
    rows = []
    for name, arm in ARMS.items():
        found = [differences(lines, name, contrast) for contrast in contrasts.values()]
        if found[0]:
            cells = [common.with_interval(values) for values in found]
            rows.append([f"{name} - {arm.control}", len(found[0]), *cells])
    accuracy = common.markdown_table(["arm - control", "bases", *contrasts], rows)
    arms = {name: (without_phase_1(name), arm.s_inter) for name, arm in ARMS.items() if arm.s_inter}
    worth = common.worth_table(lines, arms, unit="base")
    return (
        f"{len(lines)} runs of `python -m experiments.study`, whose plan has {len(plan())}. "
        "± is half of a 95% t-interval over base models.\n\n"
        "## Held-out accuracy, in points\n\n"
        f"{accuracy}\n\n"
        "## What a step of phase 1 is worth\n\n"
        f"{common.WORTH_NOTE}\n\n{worth}"
    )


def main(argv=None):
    """Pretrain and run what is missing; write and print the report."""
    parser = argparse.ArgumentParser("study", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", type=Path, metavar="DIR", help="small and short, into DIR")
    parser.add_argument("--report", action="store_true", help="run nothing; only write the report")
    args = parser.parse_args(argv)
    if args.quick:
        out = args.quick
        results = out / "study.jsonl"
        sizes = QUICK
        runs = [(name, 0, 300) for name in QUICK_ARMS]
    else:
        out = OUT
        results = RESULTS
        sizes = SIZES
        runs = plan()
    if not args.report:
        run_missing(out, results, sizes, runs)
    common.save_report(results, report(common.read_lines(results)))


def run_missing(out: Path, results: Path, sizes: dict, runs: list[tuple], run=run):
    """Make the runs that have no record yet, and before them the base models that they need."""
    jobs = []
    for name, base, seed in runs:
        path = base_file(out, base, ARMS[name].W)
        jobs.append(({"arm": name, "base": base, "seed": seed}, run, name, seed, path, sizes))
    bases = {}
    for key, _, name, _, path, _ in common.missing_jobs(results, jobs):
        bases[path] = toy.Settings(seed=key["base"], internal_loss=ARMS[name].W, **sizes)
    out.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(2) as pool:
        list(pool.map(make_base, bases, bases.values()))
    common.run_missing(results, jobs)


if __name__ == "__main__":
    main()
