"""Pass@K at the end of BuPO, of GRPO, and of GRPO that starts as much later: the paper's Fig. 6.

    python -m experiments.passk              # what is missing, two runs at a time: an hour
    python -m experiments.passk --report     # only the report, of the committed results
    python -m experiments.passk --quick DIR  # the smallest form, into DIR

The paper finds that BuPO is best at nearly all K. A run with fewer steps of GRPO keeps more
entropy, and so it may solve more problems at large K for this reason alone. Hence the control is an
idle run: GRPO whose first s_inter updates are skipped, everything else equal.

This was fixed before the first run. The primary contrast is BuPO at the rule's layer with 5 steps
of phase 1, minus the idle run of 5 steps: Pass@8 on problems that are two digits longer than those
trained on. All others are secondary. Base models 400..415 had not been used before; their RL has
seed 600. Each run is evaluated with 64 samples of 128 problems.
"""

import argparse
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

import train_toy as toy
from experiments import common, study

OUT = common.ROOT / "out" / "passk"
RESULTS = common.RESULTS / "passk.jsonl"
BASES, SEED = range(400, 416), 600
SAMPLES, PROBLEMS = 64, 128
SHOWN = (1, 8, 64)  # values of K in the report
CONTRASTS = {  # arm - control; the first is the primary one
    "BuPO, rule": "GRPO, idle 5",
    "BuPO, layer 3": "GRPO, idle 5",
    "GRPO, idle 5": "GRPO",
    "BuPO, rule, s_inter 20": "GRPO, idle 20",
    "GRPO, idle 20": "GRPO",
}
ARMS = ("BuPO, rule", "GRPO, idle 5", "GRPO", "BuPO, layer 3")
LONG_ARMS = ("BuPO, rule, s_inter 20", "GRPO, idle 20")


def plan() -> list[tuple]:
    """Return all runs as (arm, base, seed), the primary contrast first."""
    return [(name, base, SEED) for arms in (ARMS, LONG_ARMS) for base in BASES for name in arms]


def run(name: str, seed: int, base: Path, sizes: dict, problems=PROBLEMS) -> dict:
    """Train one arm of the study from one base model, and return its record.

    `longer` has Pass@K and more, by number of digits, at n + 1 and n + 2. `entropy` is that of
    pi_theta at the end, on its own solutions of n digits.
    """
    torch.set_num_threads(1)
    started = time.process_time()
    job = study.training(study.ARMS[name], seed, base, sizes)
    reward = [float(rollouts.rewards.mean()) for _, rollouts in study.ARMS[name].loop(job)]
    s, model = job.s, job.model
    longer = replace(s, n=s.n + 1)  # its responses may be as long as n + 2 digits need
    results, _ = toy.evaluate(model, longer, [s.n + 1, s.n + 2], problems, samples=SAMPLES)
    inside = toy.means_inside(model, *toy.own_solutions(model, s))
    return {
        "n": s.n,
        "layer": job.layer,
        "reward": reward,
        "longer": results,
        "entropy": inside["layer_normed"][-1],
        "seconds": time.process_time() - started,
    }


def report(lines: list[dict]) -> str:
    """Return the differences in Pass@K, in points, with 95% intervals over base models."""

    def difference(read):
        return lambda line, control: read(line) - read(control)

    columns = {}
    for extra in (1, 2):
        for k in SHOWN:
            columns[f"n + {extra}, K = {k}"] = difference(
                lambda line, k=k, extra=extra: (
                    100 * line["longer"][str(line["n"] + extra)][f"pass@{k}"]
                )
            )
    rows = []
    for arm, control in CONTRASTS.items():
        found = [common.differences(lines, arm, control, d, "base") for d in columns.values()]
        if not found[0]:
            continue
        nats = common.differences(lines, arm, control, difference(lambda x: x["entropy"]), "base")
        cells = [common.with_interval(values) for values in found]
        entropy = common.with_interval(nats, "{:+.3f}")
        rows.append([f"{arm} - {control}", len(nats), *cells, entropy])
    note = (
        f"{len(lines)} of {len(plan())} runs of `python -m experiments.passk`. Differences in "
        "points, ± half of the 95% t-interval over base models. The primary contrast, fixed before "
        "the first run, is the first row at n + 2, K = 8. Entropy is that of pi_theta at the end, "
        "in nats."
    )
    head = ["arm - control", "bases", *columns, "entropy"]
    arms = {arm: ("GRPO", study.ARMS[arm].s_inter) for arm in CONTRASTS}
    return (
        f"{note}\n\n{common.markdown_table(head, rows)}\n\n"
        "## What a step of phase 1 is worth\n\n"
        f"{common.WORTH_NOTE} Here idle runs were trained, too: their worth is 0 if the delayed "
        f"curve is right.\n\n{common.worth_table(lines, arms, 'base')}\n\n{together(lines)}"
    )


def together(lines: list[dict]) -> str:
    """Return the worth at the rule's layer over the base models of this experiment and the study.

    The two have the same settings of RL; the recipe of pretraining has changed in between.
    """
    both = [
        common.costs(runs, "BuPO, rule", "GRPO", 5, "base")
        for runs in (common.read_lines(study.RESULTS), lines)
    ]
    costs, idle = ([x for one in both for x in one[f"{a} - control"]] for a in ("arm", "idle"))
    value = common.with_limits(*common.worth(costs, idle))
    return (
        f"BuPO at the rule's layer, together with experiments.study: {value}, {len(costs)} bases."
    )


def main(argv=None):
    """Pretrain and run what is missing; write and print the report."""
    parser = argparse.ArgumentParser("passk", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", type=Path, metavar="DIR", help="small and short, into DIR")
    parser.add_argument("--report", action="store_true", help="run nothing; only write the report")
    args = parser.parse_args(argv)
    results = RESULTS
    if args.quick:
        results = args.quick / RESULTS.name
        runs = [(name, 0, SEED) for name in (*ARMS, *LONG_ARMS)]
        study.run_missing(args.quick, results, study.QUICK, runs, partial(run, problems=8))
    elif not args.report:
        study.run_missing(OUT, RESULTS, study.SIZES, plan(), run)
    common.save_report(results, report(common.read_lines(results)))


if __name__ == "__main__":
    main()
