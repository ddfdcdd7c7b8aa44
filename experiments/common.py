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


# ---- what a step of phase 1 is worth -------------------------------------------------------------


def delayed(reward: list[float], steps: int) -> np.ndarray:
    """Return the reward curve of an idle run: a run that learns nothing in its first `steps` steps.

    The first reward is held for these steps. Then the curve starts, as late as that.
    """
    reward = np.array(reward)
    steps = min(steps, len(reward))
    return np.concatenate([np.full(steps, reward[0]), reward[: len(reward) - steps]])


def costs(lines: list[dict], arm: str, control: str, s_inter: int, unit: str) -> dict[str, list]:
    """Return differences of training reward between an arm, its control and an idle run, in points.

    The idle run is the control, delayed by the s_inter steps of phase 1. "after the switch" is the
    arm after phase 1 minus the control from its first step on, over equally many steps.
    """

    def of_pairs(difference):
        def in_points(line, partner):
            reward = np.array(line["reward"])
            idle = delayed(partner["reward"], s_inter)
            return 100 * np.mean(difference(reward, np.array(partner["reward"]), idle))

        return differences(lines, arm, control, in_points, unit)

    has_phase_2 = all(len(line["reward"]) > s_inter for line in lines)
    return {
        "arm - control": of_pairs(lambda reward, control, idle: reward - control),
        "idle - control": of_pairs(lambda reward, control, idle: idle - control),
        "arm - idle": of_pairs(lambda reward, control, idle: reward - idle),
        "after the switch": of_pairs(lambda reward, control, idle: (reward - idle)[s_inter:])
        if has_phase_2
        else [],
    }


def worth(costs, idle_costs) -> tuple[float, float, float]:
    """Return what a step of phase 1 is worth in steps of the control, and its 95% interval.

    It is 1 - cost / cost of idling for as many steps. A step that is worth 1 is as good as a step
    of the control, and one that is worth 0 is as good as no step. Worth can be negative. The
    interval of a single pair is unbounded.
    """
    low, high = ratio_interval(costs, idle_costs)
    return 1 - np.mean(costs) / np.mean(idle_costs), 1 - high, 1 - low


def ratio_text(above, below) -> str:
    """Return mean(above) / mean(below) and its 95% interval as text."""
    return with_limits(np.mean(above) / np.mean(below), *ratio_interval(above, below))


def with_limits(value: float, low: float, high: float) -> str:
    """Return a value and its interval as text."""
    limits = f"{low:.2f} to {high:.2f}" if np.isfinite(low) else "unbounded"
    return f"{value:.2f} ({limits})"


def ratio_interval(above, below) -> tuple[float, float]:
    """Return the 95% interval of mean(above) / mean(below), for pairs of values, by Fieller.

    It holds every ratio r for which a t-test does not reject that above - r * below has mean 0. If
    a t-test does not reject that `below` has mean 0, the interval is unbounded: (-inf, inf).
    """
    from scipy.stats import t

    n = len(above)
    if n < 2:
        return -np.inf, np.inf
    x = np.mean(above)
    y = np.mean(below)
    (xx, xy), (_, yy) = t.ppf(0.975, n - 1) ** 2 / n * np.cov(above, below)
    # The limits solve (x - r y)^2 = xx - 2 r xy + r^2 yy, which is a r^2 - 2 b r + c = 0.
    a = y**2 - yy
    b = x * y - xy
    c = x**2 - xx
    if a <= 0:
        return -np.inf, np.inf
    root = np.sqrt(max(b**2 - a * c, 0))  # rounding can make a zero negative
    return float((b - root) / a), float((b + root) / a)


WORTH_NOTE = (
    "Training reward, mean over the run, in points. An idle run is the control, delayed by the "
    "steps of phase 1. After the switch: the arm after phase 1 minus the control from its first "
    "step on. Worth of a step of phase 1, in steps of the control: 1 - (arm - control) / "
    "(idle - control), with its 95% interval by Fieller's theorem."
)


def worth_table(lines: list[dict], arms: dict[str, tuple[str, int]], unit: str) -> str:
    """Return a table of what a step of phase 1 is worth in each of {arm: (control, s_inter)}."""
    rows = []
    columns = ["arm - control", "idle - control", "arm - idle", "after the switch"]
    for arm, (control, s_inter) in arms.items():
        found = costs(lines, arm, control, s_inter, unit)
        n = len(found["arm - control"])
        if n:
            cells = [with_interval(found[name]) for name in columns]
            value = with_limits(*worth(found["arm - control"], found["idle - control"]))
            rows.append([arm, control, n, *cells, value])
    return markdown_table(["arm", "control", f"{unit}s", *columns, "worth"], rows)


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


def above(model, layer: int) -> list:
    """Return the parameters that phase 1 at a layer does not train: blocks above it, final norm."""
    return [*model.blocks[layer:].parameters(), *model.final_norm.parameters()]


def gradient(model, rollouts, policy=FULL, weights=None, chunk=64) -> dict[int, torch.Tensor]:
    """Return the gradient of GRPO's loss on a batch by layer: {layer: one vector}.

    Before the first update of a batch every ratio is 1. The gradient of the loss is then that of
    -sum(weight * log pi(token)) / tokens, over all response tokens. `weights` (N,) are the GRPO
    advantages unless they are given. A layer without gradient is left out. `chunk` rows go through
    the model at a time.
    """
    if weights is None:
        weights = group_advantages(rollouts.rewards).flatten()
    tokens_in_all = (rollouts.end - rollouts.prompt_len).sum()
    backward(model, rollouts, policy, -weights.to(model.device) / tokens_in_all, chunk)
    parts = {}
    for name, parameter in model.named_parameters():
        layer = layer_of(name)
        if layer is not None and parameter.grad is not None:
            parts.setdefault(layer, []).append(parameter.grad.flatten())
    model.zero_grad(set_to_none=True)
    return {layer: torch.cat(vectors) for layer, vectors in parts.items()}


def backward(model, rollouts, policy, weights, chunk: int):
    """Set .grad to the gradient of sum(weight * log pi(response)) over the rows of a batch.

    Rows whose weight is 0 are not computed.
    """
    model.zero_grad(set_to_none=True)
    learning = weights.nonzero()[:, 0]
    for start in range(0, len(learning), chunk):
        rows = learning[start : start + chunk]
        T = int(rollouts.end[rows].max())
        mask = response_mask(rollouts.prompt_len[rows], rollouts.end[rows], T)
        logp = token_logprobs(model, rollouts.tokens[rows, :T], mask, policy)
        (weights[rows] * logp.sum(1)).sum().backward()


def cosine(one: dict, other: dict) -> float:
    """Return the cosine of two gradients over the layers that both have; 0 if either is zero."""
    shared = one.keys() & other.keys()
    # layer by layer, because a language model's whole gradient is large
    dot = sum(float(one[layer].dot(other[layer])) for layer in shared)
    squares = [sum(float(g[layer].square().sum()) for layer in shared) for g in (one, other)]
    return dot / max(float(np.sqrt(squares[0] * squares[1])), 1e-30)
