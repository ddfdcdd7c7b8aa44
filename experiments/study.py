"""BuPO against GRPO on the toy task: what phase 1 costs, why, and when it costs less.

    python experiments/study.py                # what is missing, two runs at a time: three hours
    python experiments/study.py --quick DIR    # its smallest form, in half a minute, into DIR

An arm differs from its control in one thing. Both start from the same bases and meet the same
problems in the same order. A base is a seed of pretraining; bases differ more than seeds do, so
every interval is taken over bases. The primary measure is the area under the curve: held-out Avg@8
at n = 5, mean over the run. The primary contrasts are BuPO - GRPO, at the rule's layer and at 3.

Bases 70..77 and seeds 500, 501 were not looked at before; settings are those of an earlier trial on
bases 50..53. The first study (commit 07e9ae1, results/study-07e9ae1.*) had more: bases without
QK-norm, a phase 1 that ends by itself, several internal layers in turn, what a linear probe reads,
Pass@64. They are left out here.
"""

import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import minibupo  # noqa: E402
import train_toy as toy  # noqa: E402
from experiments import ppo  # noqa: E402
from experiments.seeds import base_model, run_missing, save_report  # noqa: E402
from minibupo import FULL, Policy, bupo  # noqa: E402

RESULTS = ROOT / "experiments" / "results" / "study.jsonl"
RULE = "rule"  # the layer of the paper's rule on that base


class Arm(NamedTuple):
    """What is compared. s_inter = 0 is GRPO, or what `advantage` names."""

    control: str | None = "GRPO"
    s_inter: int = 0
    layer: int | str = RULE
    site: str = "resid_post"
    advantage: str = "grpo"  # or "ppo": a critic in place of groups
    change: str = ""  # what else is done, see `run`
    W: float = 0  # weight of the internal layer policies in the base's pretraining


FROZEN = {l: Arm(s_inter=5, layer=l, change="frozen") for l in (1, 2, 3, 4, 5, RULE)}
WEIGHTS = (0.3, 1, 3)
ARMS = {
    "GRPO": Arm(None),
    "BuPO, rule": Arm(s_inter=5),
    **{f"BuPO, layer {l}": Arm(s_inter=5, layer=l) for l in (3, 5, 1, 2, 4)},
    **{f"GRPO, above {l} frozen": arm for l, arm in FROZEN.items()},
    **{f"BuPO, rule, s_inter {n}": Arm(s_inter=n) for n in (2, 10, 20, 60)},
    "BuPO, rule, attention": Arm(s_inter=5, site="attn_out"),
    "BuPO, rule, FFN": Arm(s_inter=5, site="mlp_out"),
    "GRPO, moments reset at 5": Arm(s_inter=5, change="only the reset"),
    "BuPO, rule, moments kept": Arm("BuPO, rule", 5, change="moments kept"),
    "BuPO, layer 3, on-policy": Arm("BuPO, layer 3", 5, 3, change="on-policy"),
    "BuPO, layer 3, normed": Arm("BuPO, layer 3", 5, 3, change="normed"),
    "BuPO, rule, normed": Arm("BuPO, rule", 5, change="normed"),
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
    "96 problems, GRPO": Arm(None, change="finite set"),
    "96 problems, BuPO": Arm("96 problems, GRPO", 5, change="finite set"),
}
MAIN = ("GRPO", "BuPO, rule", "BuPO, layer 3", "96 problems, GRPO", "96 problems, BuPO")
BASES, SEEDS, FINITE = range(70, 78), (500, 501), 96
SIZES = dict(questions=32, steps=60, lr=4e-4, threads=1, eval_problems=128)
QUICK = toy.SMOKE | dict(questions=8, steps=6, eval_problems=16, threads=1)


def plan() -> list[tuple]:
    """All runs (arm, base, seed): eight bases and two seeds for the main question, eight and one
    for the dose W, six and one for the rest. What matters most comes first."""
    dose = [name for name, arm in ARMS.items() if arm.W or name == "BuPO, layer 5"]
    rest = [name for name in ARMS if name not in (*MAIN, *dose)]
    runs = [(name, base, SEEDS[0]) for base in BASES for name in MAIN[:3]]
    runs += [(name, base, SEEDS[0]) for base in BASES for name in dose]
    runs += [(name, base, SEEDS[0]) for name in rest for base in BASES[:6]]
    runs += [(name, base, SEEDS[1]) for base in BASES for name in MAIN[:3]]
    return runs + [(name, base, seed) for seed in SEEDS for base in BASES for name in MAIN[3:]]


def make_base(path: Path, s: toy.Settings):
    """Pretrain a base model, unless it is there."""
    if not path.exists():
        toy.save_checkpoint(path, base_model(s)[0])


def rollouts(s: toy.Settings, model, step: int, finite: bool) -> minibupo.Rollouts:
    """The rollouts of a step, as in train_toy; of questions from the same 96 where wanted."""
    problems = None
    if finite:
        problems = toy.draw_questions(toy.stream(s.seed, "finite set"), FINITE, s.n)
        problems = toy.stream(s.seed, "questions", step).sample(problems, s.questions)
    return toy.rollouts(s, model, step, problems)


def run(name: str, seed: int, base: Path, sizes: dict) -> dict:
    """Train one arm from one base with one seed; its line of results.

    `held`: [step, processor seconds of training so far, Avg@8 at n on 64 held-out problems];
    `final`: train_toy.evaluate at n and n + 1. Of PPO `reward` is sampled as that of the others."""
    torch.set_num_threads(1)
    s, arm, started = toy.Settings(seed=seed, **sizes), ARMS[name], time.process_time()
    model = toy.load_model(base)
    layer, s_inter = arm.layer, min(arm.s_inter, s.steps)
    if layer == RULE:
        inside = toy.means_inside(model, *toy.own_solutions(model, s))
        layer = minibupo.target_layer(inside["d_mlp"])
    layer = min(layer, s.n_layer - 1)  # of the smallest form, which has fewer
    pi_theta = arm.change in ("frozen", "only the reset")  # learns in phase 1 as well
    target = FULL if pi_theta else Policy(layer, arm.site)
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.lr, fused=True)
    above = [*model.blocks[layer:].parameters(), *model.final_norm.parameters()]
    moments, reward, held, seconds = {}, [], [], 0.0

    def sample(step):
        phase1 = step <= s_inter
        if step == s_inter + 1:
            optimizer.state.update(moments)  # after bupo's reset
        if arm.change == "frozen":
            for parameter in above:
                parameter.requires_grad_(not phase1)
        vars(model).pop("unembed", None)  # responses come from the model as it is
        sampled_by = model.truncated(layer) if phase1 and arm.change == "on-policy" else model
        batch = rollouts(s, sampled_by, step, arm.change == "finite set")
        if phase1 and arm.change == "normed":  # the update reads H^l by way of the final norm
            model.unembed = lambda h: type(model).unembed(model, model.final_norm(h))
        return batch

    train = ppo.bupo if arm.advantage == "ppo" else partial(bupo, advantage=arm.advantage)
    since = time.process_time()
    for step, _, batch, _ in train(model, optimizer, sample, target, s_inter, s.steps):
        seconds += time.process_time() - since
        vars(model).pop("unembed", None)
        if arm.change == "moments kept":
            moments = dict(optimizer.state)
        reward.append(float(batch.rewards.mean()))
        if step % 5 == 0 or step == s.steps:
            avg = toy.evaluate(model, s, [s.n], 64)[0][str(s.n)]["avg@8"]
            held.append([step, seconds, avg])
        since = time.process_time()
    final = toy.evaluate(model, s, [s.n, s.n + 1], s.eval_problems)[0]
    found = {"n": s.n, "layer": layer, "reward": reward, "held": held, "final": final}
    return found | {"seconds": time.process_time() - started}


def area(line: dict) -> float:
    """Held-out accuracy, mean over the run."""
    return np.mean([avg for *_, avg in line["held"]])


MEASURES = {  # of a line of results, the larger the better
    "over the run": area,
    "at the end": lambda line: line["final"][str(line["n"])]["avg@8"],
    "at the end, n + 1": lambda line: line["final"][str(line["n"] + 1)]["avg@8"],
    "Pass@8": lambda line: line["final"][str(line["n"])]["pass@8"],
}


def at_equal_time(line: dict, control: dict) -> float:
    """Arm - control over the run, the control taken when it had used as many processor seconds."""
    _, seconds, avg = np.array(line["held"]).T
    _, other_seconds, other_avg = np.array(control["held"]).T
    return np.mean(avg - np.interp(seconds, other_seconds, other_avg))


def differences(lines: list[dict], name: str, difference) -> list[float]:
    """Arm - control in points (hundredths), of each base the mean over its seeds."""
    of = {(line["arm"], line["base"], line["seed"]): line for line in lines}
    by_base = {}
    for (arm, *pair), line in of.items():
        control = of.get((ARMS[name].control, *pair))
        if arm == name and control:
            by_base.setdefault(pair[0], []).append(100 * float(difference(line, control)))
    return [np.mean(by_base[base]) for base in sorted(by_base)]


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of the 95 % t-interval of independent values, two or more."""
    from experiments.compare import mean_interval  # here, since it needs the extra `bench`

    return mean_interval(values)


def report(lines: list[dict]) -> str:
    """All contrasts as a Markdown table: mean ± half of the 95 % interval over bases, in points."""
    contrasts = {
        key: lambda line, control, read=read: read(line) - read(control)
        for key, read in MEASURES.items()
    } | {"at equal time": at_equal_time}
    head = (
        "runs of `python experiments/study.py`; ± half of the 95 % interval over bases, in points"
    )
    rows = [f"{len(lines)} of {len(plan())} {head}\n"]
    rows.append("| arm - control | bases | " + " | ".join(contrasts) + " |")
    rows.append("|" + "---|" * (2 + len(contrasts)))
    for name, arm in ARMS.items():
        found = [differences(lines, name, contrast) for contrast in contrasts.values()]
        if found[0]:
            cells = [f"{d[0]:+.1f}" for d in found]
            if len(found[0]) > 1:
                cells = ["{:+.1f} ± {:.1f}".format(*interval(d)) for d in found]
            rows.append(f"| {name} - {arm.control} | {len(found[0])} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main():
    """Pretrain and run what is missing; print the table."""
    parser = argparse.ArgumentParser(description="The study of BuPO against GRPO on the toy task.")
    parser.add_argument("--quick", type=Path, metavar="DIR", help="small and short, into DIR")
    quick = parser.parse_args().quick
    out, results, sizes, runs = ROOT / "out" / "study", RESULTS, SIZES, plan()
    if quick:
        arms = ("GRPO", "BuPO, rule", "GRPO, above 3 frozen", "BuPO, rule, normed", "PPO, BuPO")
        out, results, sizes = quick, quick / "study.jsonl", QUICK
        runs = [(name, 0, 300) for name in arms]
    out.mkdir(parents=True, exist_ok=True)
    bases, jobs = {}, []
    for name, base, seed in runs:
        W = ARMS[name].W
        path, key = out / f"base{base}-W{W}.pt", {"arm": name, "base": base, "seed": seed}
        bases[path] = toy.Settings(seed=base, internal_loss=W, **sizes)
        jobs.append((key, run, name, seed, path, sizes))
    with ProcessPoolExecutor(2) as pool:
        list(pool.map(make_base, bases, bases.values()))
    save_report(results, report(run_missing(results, jobs)))


if __name__ == "__main__":
    main()
