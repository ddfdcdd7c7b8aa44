"""BuPO against GRPO on the toy task, and their variants: paired runs, one line of results a run.

    python experiments/study.py                # what is missing, two at a time: hours on two cores
    python experiments/study.py --quick DIR    # its smallest form, in half a minute, into DIR

All arms of a pair start from one base and meet the same problems in the same order; a pair is
(base, seed). The primary measure is the area under the curve of held-out accuracy, the primary
contrast BuPO - GRPO. Results and bases are in out/study.

The first and larger study is at commit 07e9ae1: bases without QK-norm, a phase 1 that ends by
itself, several internal layers in turn, what a linear probe reads, Pass@64, rewards at equal cost,
figures. What it found is in experiments/results/study.jsonl and study.md.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import minibupo  # noqa: E402
import train_toy as toy  # noqa: E402
from experiments.seeds import base_model, run_missing  # noqa: E402
from minibupo import FULL, Policy, Rollouts  # noqa: E402

RULE = "the layer of the paper's rule"


class Arm(NamedTuple):
    """What is compared. In phase 1 layer None is pi_theta: then only the optimizer is reset."""

    s_inter: int = 0
    layer: int | str | None = RULE
    site: str = "resid_post"
    advantage: str = "grpo"


ARMS = {
    "GRPO": Arm(),
    "BuPO": Arm(5),
    "GRPO, new moments": Arm(5, None),
    **{f"s_inter {n}": Arm(n) for n in (2, 10, 20, 60)},
    **{f"layer {l}": Arm(10, l) for l in (1, 2, 3, 4, 5)},
    "attention": Arm(10, site="attn_out"),
    "FFN": Arm(10, site="mlp_out"),
    "RLOO": Arm(advantage="rloo"),
    "RLOO, BuPO": Arm(5, advantage="rloo"),
    "Reinforce++": Arm(advantage="reinforce++"),
    "Reinforce++, BuPO": Arm(5, advantage="reinforce++"),
}
CONTROL = {"RLOO, BuPO": "RLOO", "Reinforce++, BuPO": "Reinforce++"}  # of the others: GRPO
# "fresh": new problems at each step; "finite": drawn from the same 96 again and again
SETTINGS, FINITE = ("fresh", "finite"), 96
SIZES = dict(questions=32, steps=60, lr=4e-4, threads=1)
QUICK = toy.SMOKE | dict(questions=8, steps=6, eval_problems=16, threads=1)


def plan(quick: bool) -> list[tuple]:
    """All runs (setting, arm, base, seed), in the order in which they are wanted."""
    if quick:
        arms = ("GRPO", "BuPO", "FFN", "Reinforce++, BuPO", "Reinforce++")
        return [(setting, arm, 0, 300) for setting in SETTINGS for arm in arms]
    pairs = [(base, seed) for seed in range(300, 305) for base in (30, 31, 32)]
    first = [(of, arm, *pair) for of in SETTINGS for pair in pairs for arm in ("GRPO", "BuPO")]
    rest = [arm for arm in ARMS if arm not in ("GRPO", "BuPO")]
    return first + [("fresh", arm, *pair) for pair in pairs[:6] for arm in rest]


def save_base(path: Path, s: toy.Settings):
    """Pretrain a base model, unless it is there."""
    if not path.exists():
        toy.save_checkpoint(path, base_model(s)[0])


def rollouts(s: toy.Settings, model, step: int, setting: str) -> Rollouts:
    """The rollouts of a step, as in train_toy; with questions of the finite set where wanted."""
    if setting == "fresh":
        return toy.rollouts(s, model, step)
    problems = toy.draw_questions(toy.stream(s.seed, "finite set"), FINITE, s.n)
    problems = toy.stream(s.seed, "questions", step).sample(problems, s.questions)
    return toy.rollouts(s, model, step, problems)


def run(setting: str, arm_name: str, seed: int, base: Path, sizes: dict) -> dict:
    """Train one arm from one base with one seed; its line of results.

    `reward` by step; `held`: Avg@8 at n on 64 held-out problems by evaluation on the way; `final`:
    train_toy.evaluate of all lengths."""
    torch.set_num_threads(1)
    s, arm, started = toy.Settings(seed=seed, **sizes), ARMS[arm_name], time.process_time()
    model = toy.load_model(base)
    layer, s_inter = arm.layer, min(arm.s_inter, s.steps)
    if layer == RULE:
        inside = toy.means_inside(model, *toy.own_solutions(model, s))
        layer = minibupo.target_layer(inside["d_mlp"])
    target = FULL if layer is None else Policy(layer, arm.site)
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.lr, fused=True)
    reward, held = [], []

    def sample(step):
        return rollouts(s, model, step, setting)

    steps = minibupo.bupo(
        model, optimizer, sample, target, s_inter, s.steps, advantage=arm.advantage
    )
    for step, _, batch, _ in steps:
        reward.append(float(batch.rewards.mean()))
        if step % 10 == 0 or step == s.steps:
            held.append(toy.evaluate(model, s, [s.n], 64)[0][str(s.n)]["avg@8"])
    final = toy.evaluate(model, s, s.tiers, s.eval_problems)[0]
    found = {"n": s.n, "layer": layer, "reward": reward, "held": held, "final": final}
    return found | {"seconds": time.process_time() - started}


MEASURES = {  # of a line of results, the larger the better
    "area": lambda line: np.mean(line["held"]),
    "Avg@8": lambda line: line["final"][str(line["n"])]["avg@8"],
    "Pass@8": lambda line: line["final"][str(line["n"])]["pass@8"],
    "Avg@8, unseen": lambda line: line["final"][str(line["n"] + 1)]["avg@8"],
}


def differences(lines, setting, arm, measure) -> list[float]:
    """Arm - control in one measure, in points (hundredths), of each pair that has both."""
    of, control = (
        {(r["base"], r["seed"]): measure(r) for r in lines if (r["setting"], r["arm"]) == which}
        for which in ((setting, arm), (setting, CONTROL.get(arm, "GRPO")))
    )
    return [100 * float(of[pair] - control[pair]) for pair in sorted(of.keys() & control.keys())]


def report(lines) -> str:
    """Paired differences as a Markdown table: mean +- standard error over pairs, in points."""
    rows = ["| setting | arm - control | pairs | " + " | ".join(MEASURES) + " |"]
    rows.append("|" + "---|" * (3 + len(MEASURES)))
    for setting in SETTINGS:
        for arm in ARMS:
            found = [differences(lines, setting, arm, read) for read in MEASURES.values()]
            pairs = len(found[0])
            if pairs and arm != "GRPO":
                cells = [f"{np.mean(d):+.1f}" for d in found]
                if pairs > 1:
                    errors = [np.std(d, ddof=1) / pairs**0.5 for d in found]
                    cells = [f"{mean} +- {error:.1f}" for mean, error in zip(cells, errors)]
                name = f"{arm} - {CONTROL.get(arm, 'GRPO')}"
                rows.append(f"| {setting} | {name} | {pairs} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main():
    """Run what is missing; print the table."""
    parser = argparse.ArgumentParser(description="The study of BuPO against GRPO on the toy task.")
    parser.add_argument("--quick", type=Path, metavar="DIR", help="small and short, into DIR")
    quick = parser.parse_args().quick
    out, sizes = quick or ROOT / "out" / "study", QUICK if quick else SIZES
    out.mkdir(parents=True, exist_ok=True)
    runs, jobs = plan(bool(quick)), []
    for base in sorted({base for *_, base, _ in runs}):
        save_base(out / f"base{base}.pt", toy.Settings(seed=base, **sizes))
    for setting, arm, base, seed in runs:
        key = {"setting": setting, "arm": arm, "base": base, "seed": seed}
        jobs.append((key, run, setting, arm, seed, out / f"base{base}.pt", sizes))
    print(report(run_missing(out / "study.jsonl", jobs)))


if __name__ == "__main__":
    main()
