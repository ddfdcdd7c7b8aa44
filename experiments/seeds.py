"""The main job with five seeds, and twenty base models alone: README's table of results.

    python experiments/seeds.py      # what is missing, two at a time on one thread each

Does a whole run work for every seed, and does pretraining? No other experiment uses the seeds of
the twenty bases. A line of results is appended to experiments/results/seeds.jsonl as soon as it is
there, so stopping costs only what is under way. The runs are in out/seeds. Metrics and output of
seed 0 are kept beside the results as a reference.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import train_toy as toy  # noqa: E402
from model import GPT  # noqa: E402

RESULTS = ROOT / "experiments" / "results" / "seeds.jsonl"
RUNS, BASES = range(5), range(200, 220)  # seeds
COMMAND = [sys.executable, "train_toy.py", "--threads", "1"]


def main_job(seed: int) -> dict:
    """One whole run of README's command; its line of results."""
    out = ROOT / "out" / "seeds" / f"seed{seed}"
    shutil.rmtree(out, ignore_errors=True)
    started = time.perf_counter()
    command = [*COMMAND, "--seed", str(seed), "--out_dir", str(out.relative_to(ROOT))]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - started
    if seed == 0:
        shutil.copy(out / "metrics.jsonl", RESULTS.parent / "seed0-metrics.jsonl")
        (RESULTS.parent / "seed0-output.txt").write_text(done.stdout, encoding="utf-8")
    evaluations = toy.read_metrics(out, "eval")
    return {
        "seconds": seconds,
        "pretrain_steps": toy.read_metrics(out, "pretrain")[-1]["step"],
        "target_layer": toy.load_checkpoint(out / "ckpt.pt")[1]["target"][0],
        "before": evaluations[0]["tiers"],
        "after": evaluations[-1]["tiers"],
        "machine": machine(),
    }


def base_model(s: toy.Settings):
    """A base model, pretrained on one thread without a word, and the records of its pretraining."""
    torch.set_num_threads(1)
    torch.manual_seed(s.seed)
    model, records = GPT(s.model_config()), []
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        toy.pretrain(s, model, records)
    return model, records


def base_alone(seed: int) -> dict:
    """How the pretraining of one base went; its line of results."""
    started = time.perf_counter()
    last = base_model(toy.Settings(seed=seed))[1][-1]
    seconds = time.perf_counter() - started
    found = {"steps": last["step"], "known": last["single_operations"]}
    return found | {"seconds": seconds, "machine": machine()}


def machine() -> str:
    """What seconds were measured on."""
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{gpu}{platform.machine()}, {versions}"


def table_of_runs(lines: list[dict]) -> str:
    """Before -> after in % by length of problem, a row a seed, with mean and standard deviation."""
    tiers = list(lines[0]["before"])
    longest = tiers[-1]
    heads = [*(f"Avg@8, n = {n}" for n in tiers), f"right steps, n = {longest}"]
    rows = [
        "| seed | target layer | " + " | ".join(heads) + " | seconds |",
        "|" + "---|" * (len(heads) + 3),
    ]

    def measured(line, when):
        avg = [line[when][n]["avg@8"] for n in tiers]
        return [100 * x for x in (*avg, line[when][longest]["right_steps"])]

    values = np.array([[measured(line, when) for when in ("before", "after")] for line in lines])
    seconds = np.array([line["seconds"] for line in lines])

    def row(name, layer, pair, last):
        cells = " | ".join(f"{b:.1f} -> {a:.1f}" for b, a in zip(*pair))
        rows.append(f"| {name} | {layer} | {cells} | {last:.0f} |")

    for line, pair in zip(lines, values):
        row(line["seed"], line["target_layer"], pair, line["seconds"])
    row("mean", "", values.mean(0), seconds.mean())
    if len(lines) > 1:
        row("std", "", values.std(0, ddof=1), seconds.std(ddof=1))
    return "\n".join(rows)


def table_of_bases(lines: list[dict]) -> str:
    """How many bases learned their operations, in how many steps and how many seconds."""
    steps, seconds = ([line[name] for line in lines] for name in ("steps", "seconds"))
    known = sum(line["known"] >= toy.KNOWN for line in lines)
    cells = (f"{known} of {len(lines)}", f"{np.median(steps):.0f}", f"{max(steps)}")
    return "\n".join(
        [
            f"| bases with {toy.KNOWN} of operations | steps: median | maximum | seconds: median |",
            "|" + "---|" * 4,
            "| " + " | ".join((*cells, f"{np.median(seconds):.0f}")) + " |",
        ]
    )


def read_lines(results: Path) -> list[dict]:
    """The lines of a file of results, none if it is not there."""
    text = results.read_text(encoding="utf-8") if results.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def run_missing(results: Path, jobs: list[tuple], at_once=2) -> list[dict]:
    """All lines of a file of results. What of `jobs`, (key, function, argument, ..), has no line
    with its key yet is run, two at a time; a line is appended as soon as it is there."""
    lines = read_lines(results)
    there = [{name: line.get(name) for name in jobs[0][0]} for line in lines]
    with ProcessPoolExecutor(at_once) as pool:
        missing = {pool.submit(*job): key for key, *job in jobs if key not in there}
        try:
            for job in as_completed(missing):
                lines.append(missing[job] | job.result())
                with open(results, "a", encoding="utf-8") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
                print(*missing[job].values(), f"{lines[-1]['seconds']:.0f} s", flush=True)
        finally:  # after Ctrl-C, or a job that failed, those that wait do not begin
            pool.shutdown(cancel_futures=True)
    return lines


def less_control(lines: list[dict], control: str, measure) -> dict[str, list]:
    """{arm: measure(line) less that of the control's line of the same seed, for all such pairs}."""
    of_control = {line["seed"]: measure(line) for line in lines if line["arm"] == control}
    found = {}
    for line in lines:
        if line["arm"] != control and line["seed"] in of_control:
            d = measure(line) - of_control[line["seed"]]
            found.setdefault(line["arm"], []).append(d)
    return found


def save_report(results: Path, text: str):
    """Print a text, and write it beside the results that it is about."""
    results.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)


def main():
    """Run what has no line in the results yet; print both tables."""
    jobs = [({"kind": "run", "seed": seed}, main_job, seed) for seed in RUNS]
    jobs += [({"kind": "base", "seed": seed}, base_alone, seed) for seed in BASES]
    lines = sorted(run_missing(RESULTS, jobs), key=lambda line: line["seed"])
    print(table_of_runs([line for line in lines if line["kind"] == "run"]))
    print()
    print(table_of_bases([line for line in lines if line["kind"] == "base"]))


if __name__ == "__main__":
    main()
