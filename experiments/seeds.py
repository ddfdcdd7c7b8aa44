"""The main job with five seeds, and twenty base models without RL: README's table of results.

    python -m experiments.seeds      # what is missing, two at a time on one thread each

Does a whole run work for every seed, and does pretraining? No other experiment uses the seeds of
the twenty base models. A record is appended to experiments/results/seeds.jsonl as soon as its run
has finished, so stopping loses only the runs that are under way. The runs are in out/seeds. The
output of seed 0 is kept beside the results.
"""

import shutil
import subprocess
import sys
import time

import numpy as np

import train_toy as toy
from experiments import common

RESULTS = common.RESULTS / "seeds.jsonl"
RUNS = range(5)  # seeds of the main job
BASES = range(200, 220)  # seeds of the base models alone
COMMAND = [sys.executable, "train_toy.py", "--threads", "1"]


def main_job(seed: int) -> dict:
    """Make one whole run of README's command, and return its record."""
    out = common.ROOT / "out" / "seeds" / f"seed{seed}"
    shutil.rmtree(out, ignore_errors=True)
    started = time.perf_counter()
    command = [*COMMAND, "--seed", str(seed), "--out_dir", str(out.relative_to(common.ROOT))]
    done = subprocess.run(command, cwd=common.ROOT, check=True, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - started
    if seed == 0:
        (common.RESULTS / "seed0-output.txt").write_text(done.stdout, encoding="utf-8")
    evaluations = toy.read_metrics(out, "eval")
    return {
        "seconds": seconds,
        "pretrain_steps": toy.read_metrics(out, "pretrain")[-1]["step"],
        "target_layer": toy.load_checkpoint(out / "ckpt.pt")[1]["target"][0],
        "before": evaluations[0]["tiers"],
        "after": evaluations[-1]["tiers"],
        "machine": common.machine(),
    }


def base_alone(seed: int) -> dict:
    """Pretrain one base model, and return a record of how it went."""
    started = time.perf_counter()
    _, records = common.base_model(toy.Settings(seed=seed))
    return {
        "steps": records[-1]["step"],
        "known": records[-1]["single_operations"],
        "seconds": time.perf_counter() - started,
        "machine": common.machine(),
    }


def table_of_runs(lines: list[dict]) -> str:
    """Return before -> after in % by length of problem: a row for each seed, mean and std."""
    tiers = list(lines[0]["before"])
    longest = tiers[-1]

    def measured(tier_of):
        shares = [tier_of[n]["avg@8"] for n in tiers]
        return [100 * share for share in (*shares, tier_of[longest]["correct_lines"])]

    values = np.array([[measured(line[when]) for when in ("before", "after")] for line in lines])
    seconds = np.array([line["seconds"] for line in lines])

    def row(name, layer, before_and_after, seconds):
        cells = [f"{before:.1f} -> {after:.1f}" for before, after in zip(*before_and_after)]
        return [name, layer, *cells, f"{seconds:.0f}"]

    rows = [
        row(line["seed"], line["target_layer"], pair, line["seconds"])
        for line, pair in zip(lines, values)
    ]
    rows.append(row("mean", "", values.mean(0), seconds.mean()))
    if len(lines) > 1:
        rows.append(row("std", "", values.std(0, ddof=1), seconds.std(ddof=1)))
    heads = [*(f"Avg@8, n = {n}" for n in tiers), f"correct lines, n = {longest}"]
    return common.markdown_table(["seed", "target layer", *heads, "seconds"], rows)


def table_of_bases(lines: list[dict]) -> str:
    """Return how many base models learned their operations, in how many steps and seconds."""
    steps = [line["steps"] for line in lines]
    known = sum(line["known"] >= toy.KNOWN for line in lines)
    head = [
        f"bases with {toy.KNOWN} of operations",
        "steps: median",
        "maximum",
        "seconds: median",
    ]
    seconds = np.median([line["seconds"] for line in lines])
    row = [f"{known} of {len(lines)}", f"{np.median(steps):.0f}", max(steps), f"{seconds:.0f}"]
    return common.markdown_table(head, [row])


def main():
    """Run what has no record yet; print both tables."""
    jobs = [({"kind": "run", "seed": seed}, main_job, seed) for seed in RUNS]
    jobs += [({"kind": "base", "seed": seed}, base_alone, seed) for seed in BASES]
    lines = sorted(common.run_missing(RESULTS, jobs), key=lambda line: line["seed"])
    print(table_of_runs([line for line in lines if line["kind"] == "run"]))
    print()
    print(table_of_bases([line for line in lines if line["kind"] == "base"]))


if __name__ == "__main__":
    main()
