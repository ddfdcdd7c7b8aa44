"""What several experiments share: files of results, statistics, tables, gradients by layer."""

import json
import os
import platform
import re
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch

import train_toy as toy
from minibupo import FULL, group_advantages, response_mask, token_logprobs
from model import GPT

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"
FIGURES = ROOT / "experiments" / "figures"

# ---- files of results ----------------------------------------------------------------------------


def read_lines(results: Path) -> list[dict]:
    """Return the records of a .jsonl file, one per line; an empty list if there is no such file."""
    text = results.read_text(encoding="utf-8") if results.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def missing_jobs(results: Path, jobs: list[tuple]) -> list[tuple]:
    """Return the jobs (key, function, argument, ...) whose key has no record in a .jsonl file."""
    lines = read_lines(results)
    return [job for job in jobs if not any(job[0].items() <= line.items() for line in lines)]


def run_missing(results: Path, jobs: list[tuple], at_once=2) -> list[dict]:
    """Run the jobs that have no record in a .jsonl file yet, and return all of its records.

    A job is (key, function, argument, ...). Its record is the key, a dict, together with the dict
    that the function returns. Each record is appended as soon as its job has finished, so stopping
    loses only the jobs that are running.
    """
    lines = read_lines(results)
    with ProcessPoolExecutor(at_once) as pool:
        running = {pool.submit(*job): key for key, *job in missing_jobs(results, jobs)}
        try:
            for job in as_completed(running):
                lines.append(running[job] | job.result())
                with open(results, "a", encoding="utf-8") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
                print(*running[job].values(), f"{lines[-1]['seconds']:.0f} s", flush=True)
        finally:  # after Ctrl-C or a failed job, do not start the jobs that are still waiting
            pool.shutdown(cancel_futures=True)
    return lines


def save_report(results: Path, text: str):
    """Print a report, and write it beside the file of results that it is about."""
    results.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)


def markdown_table(head: list, rows: list[list]) -> str:
    """Return a Markdown table, with one list of cells per row."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines)


# ---- what was measured on, and for how long ------------------------------------------------------


def machine() -> dict:
    """Return the processor, the number of threads and the versions that a result was made with."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    found = {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def seconds(call, wait=lambda: None) -> float:
    """Return the wall-clock time of one call. `wait` waits until the device has finished."""
    wait()
    started = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - started


# ---- statistics ----------------------------------------------------------------------------------


def mean_interval(values) -> tuple[float, float | None]:
    """Return the mean and half the width of its 95% t-interval, which is None for a single value.

    Values are independent. Needs scipy, which comes with the extras `bench` and `course`.
    """
    from scipy.stats import t  # other users of this file do without it

    n = len(values)
    mean = float(np.mean(values))
    if n < 2:
        return mean, None
    return mean, float(t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5)


def with_interval(values, form="{:+.1f}") -> str:
    """Return the mean of values and half of its 95% interval as text; "" without values."""
    if not len(values):
        return ""
    mean, half = mean_interval(values)
    if half is None:
        return form.format(mean)
    return f"{form.format(mean)} ± {form.replace('+', '').format(half)}"


def differences(lines: list[dict], arm: str, control: str, difference, unit: str) -> list[float]:
    """Return difference(line, control's line) over all pairs of runs of an arm and its control.

    A pair shares its base, if it has one, and its seed. `unit` is what is independent, "base" or
    "seed": there is one number for each base, or for each seed, the mean over its pairs.
    """
    partners = {(x.get("base"), x["seed"]): x for x in lines if x["arm"] == control}
    by_unit = {}
    for line in lines:
        partner = partners.get((line.get("base"), line["seed"]))
        if line["arm"] == arm and partner:
            by_unit.setdefault(line[unit], []).append(float(difference(line, partner)))
    return [float(np.mean(by_unit[name])) for name in sorted(by_unit)]


# ---- models --------------------------------------------------------------------------------------


def base_model(s: toy.Settings) -> tuple[GPT, list]:
    """Pretrain a base model on one thread, without output. Return it and its records."""
    torch.set_num_threads(1)
    records = []
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        model = toy.base_model(s, torch.device("cpu"), records)
    return model, records


def layer_of(parameter_name: str) -> int | None:
    """Return the layer, 1..L, of a parameter's name; None for a parameter outside the layers."""
    number = re.search(r"\.(\d+)\.", parameter_name)
    return int(number[1]) + 1 if number else None


def gradient(model, rollouts, policy=FULL, weights=None, chunk=64) -> dict[int, torch.Tensor]:
    """Return the gradient of GRPO's loss on a batch by layer: {layer: one vector}.

    Before the first update of a batch every ratio is 1. The gradient of the loss is then that of
    -sum(weight * log pi(token)) / tokens, over all response tokens. `weights` (N,) are the GRPO
    advantages unless they are given; rows of weight 0 are not computed. A layer without gradient is
    left out. `chunk` rows go through the model at a time.
    """
    if weights is None:
        weights = group_advantages(rollouts.rewards).flatten()
    weights = weights.to(model.device)
    tokens_in_all = (rollouts.end - rollouts.prompt_len).sum()
    model.zero_grad(set_to_none=True)
    learning = weights.nonzero()[:, 0]
    for start in range(0, len(learning), chunk):
        rows = learning[start : start + chunk]
        T = int(rollouts.end[rows].max())
        mask = response_mask(rollouts.prompt_len[rows], rollouts.end[rows], T)
        logp = token_logprobs(model, rollouts.tokens[rows, :T], mask, policy)
        loss = -(weights[rows, None] * logp).sum() / tokens_in_all
        loss.backward()
    parts = {}
    for name, parameter in model.named_parameters():
        layer = layer_of(name)
        if layer is not None and parameter.grad is not None:
            parts.setdefault(layer, []).append(parameter.grad.flatten())
    model.zero_grad(set_to_none=True)
    return {layer: torch.cat(vectors) for layer, vectors in parts.items()}


def cosine(one: dict, other: dict) -> float:
    """Return the cosine of two gradients over the layers that both have; 0 if either is zero."""
    shared = one.keys() & other.keys()
    # layer by layer, because a language model's whole gradient is large
    dot = sum(float(one[layer].dot(other[layer])) for layer in shared)
    squares = [sum(float(g[layer].square().sum()) for layer in shared) for g in (one, other)]
    return dot / max(float(np.sqrt(squares[0] * squares[1])), 1e-30)
