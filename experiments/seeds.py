"""README's first command with five seeds: where its table of results comes from.

    python experiments/seeds.py          # about 10 minutes on two cores; finished seeds are not run again

Two seeds at a time, each on one thread. Appends a line a seed to experiments/results/seeds.jsonl and prints all of
them as a Markdown table. The runs are in out/seeds; metrics and output of seed 0 are kept beside the results as a
reference.
"""

import json
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import train_toy as toy  # noqa: E402

RESULTS = ROOT / "experiments" / "results" / "seeds.jsonl"
SEEDS = range(5)


def run(seed: int) -> dict:
    """One whole main job; the result line."""
    out = ROOT / "out" / "seeds" / f"seed{seed}"
    shutil.rmtree(out, ignore_errors=True)
    started = time.perf_counter()
    command = [sys.executable, "train_toy.py", "--seed", str(seed), "--threads", "1", "--out_dir", str(out.relative_to(ROOT))]
    printed = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds = time.perf_counter() - started
    evaluations = toy.read_metrics(out, "eval")
    if seed == 0:
        shutil.copy(out / "metrics.jsonl", RESULTS.parent / "seed0-metrics.jsonl")
        (RESULTS.parent / "seed0-output.txt").write_text(printed, encoding="utf-8")
    return {
        "seed": seed,
        "seconds": round(seconds, 1),
        "pretrain_steps": toy.read_metrics(out, "pretrain")[-1]["step"],
        "target_layer": torch.load(out / "ckpt.pt", weights_only=True)["target"][0],
        "before": evaluations[0]["tiers"],
        "after": evaluations[-1]["tiers"],
        "machine": f"{platform.machine()}, torch {torch.__version__}, Python {platform.python_version()}",
    }


def table(lines: list[dict]) -> str:
    """Avg@8 (%) before and after by tier, one row a seed, with mean and standard deviation."""
    tiers = list(lines[0]["before"])
    rows = ["| seed | target layer | " + " | ".join(f"n = {n}" for n in tiers) + " | seconds |", "|" + "---|" * (len(tiers) + 3)]
    before, after = (100 * np.array([[line[when][n]["avg@8"] for n in tiers] for line in lines]) for when in ("before", "after"))
    for line, b, a in zip(lines, before, after):
        cells = " | ".join(f"{x:.1f} -> {y:.1f}" for x, y in zip(b, a))
        rows.append(f"| {line['seed']} | {line['target_layer']} | {cells} | {line['seconds']:.0f} |")
    mean = " | ".join(f"{x:.1f} -> {y:.1f}" for x, y in zip(before.mean(0), after.mean(0)))
    spread = " | ".join(f"{x:.1f} -> {y:.1f}" for x, y in zip(before.std(0, ddof=1), after.std(0, ddof=1)))
    seconds = np.median([line["seconds"] for line in lines])
    return "\n".join([*rows, f"| mean | | {mean} | median {seconds:.0f} |", f"| std | | {spread} | |"])


if __name__ == "__main__":
    RESULTS.parent.mkdir(exist_ok=True)
    lines = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()] if RESULTS.exists() else []
    missing = [seed for seed in SEEDS if seed not in [line["seed"] for line in lines]]
    with ThreadPoolExecutor(2) as pool:
        for result in as_completed([pool.submit(run, seed) for seed in missing]):
            lines.append(result.result())
            with open(RESULTS, "a", encoding="utf-8") as file:
                file.write(json.dumps(lines[-1]) + "\n")
            print(f"seed {lines[-1]['seed']}: {lines[-1]['seconds']:.0f} s", flush=True)
    print(table(sorted(lines, key=lambda line: line["seed"])))
