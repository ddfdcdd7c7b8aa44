"""Runs of train_toy.py side by side. Seeds of one setting are put together.

    python -m experiments.compare RUN RUN ...              everything below, into out/compare
    python -m experiments.compare --make table RUN RUN ... only one of: table training passk

    table       results as Markdown, the mean over seeds and its 95% t-interval: table.md
    training    dynamics.png (Fig. 4, 7) and refinement.png (Fig. 5): the mean over seeds, with a
                band of one standard deviation
    passk       Pass@K for K = 1..256 from samples (Fig. 6): passk.json, passk.png. The band is one
                standard error over problems

Needs scipy, for the quantiles of Student's t: pip install -e ".[bench]".
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

import analyze
import minibupo
import train_toy as toy
from analyze import Run
from experiments.common import markdown_table, with_interval

# ---- seeds of one setting ----------------------------------------------------------------------

NO_SETTING = {"seed", "out_dir", "base", "preset", "device", "threads", "eval_problems"}


def group_runs(runs: list[Run]) -> dict[str, list[Run]]:
    """Return {label: runs of one setting}.

    The label is the algorithm and the options in which settings differ. Seed, base model and
    machine are not part of a setting.
    """

    def options(run):
        phase1 = set() if run.settings.s_inter else {"layer", "site", "s_inter"}
        return {k: v for k, v in asdict(run.settings).items() if k not in NO_SETTING | phase1}

    names = {name for run in runs for name in options(run)} - {"algo"}
    values = {name: {str(options(run).get(name, "none")) for run in runs} for name in sorted(names)}
    groups = {}
    for run in runs:
        own = options(run)
        differ = [name for name in own if name in names and len(values[name] - {"none"}) > 1]
        label = ", ".join([own["algo"], *(f"{name} {own[name]}" for name in differ)])
        groups.setdefault(label.replace("bupo", "BuPO").replace("grpo", "GRPO"), []).append(run)
    return groups


def over_seeds(curves: list[dict]):
    """Return sorted x, and the mean and standard deviation of the curves {x: y} that reach each x.

    The standard deviation of a single curve is 0.
    """
    xs = sorted(set().union(*curves))
    columns = [[curve[x] for curve in curves if x in curve] for x in xs]
    std = [np.std(column, ddof=1) if len(column) > 1 else 0.0 for column in columns]
    return xs, np.array([np.mean(column) for column in columns]), np.array(std)


# ---- table -------------------------------------------------------------------------------------

COLUMNS = {
    "Avg": f"avg@{toy.SAMPLES}",
    "correct lines": "correct_lines",
    "Pass": f"pass@{toy.SAMPLES}",
}


def result_table(groups: dict) -> str:
    """Return the last evaluation of each run as a Markdown table, in %.

    There is one row for the base models and one for each setting. A base model that several runs
    share counts once.
    """
    evals = {label: [evaluations(run) for run in runs] for label, runs in groups.items()}
    bases = {json.dumps(records[0]): records[0] for runs in evals.values() for records in runs}
    records_of = {"before RL": list(bases.values())}
    records_of |= {label: [records[-1] for records in runs] for label, runs in evals.items()}
    tiers = sorted({int(n) for found in records_of.values() for r in found for n in r["tiers"]})
    rows = []
    for label, records in records_of.items():
        steps = sorted({record["step"] for record in records})
        first_to_last = f"{steps[0]}..{steps[-1]}" if len(steps) > 1 else f"{steps[0]}"
        row = [label, len(records), first_to_last]
        for n in map(str, tiers):
            for key in COLUMNS.values():
                shares = [100 * r["tiers"][n][key] for r in records if n in r["tiers"]]
                row.append(with_interval(shares, "{:.1f}"))
        rows.append(row)
    heads = [f"n = {n} {name}" for n in tiers for name in COLUMNS]
    return markdown_table(["setting", "runs", "steps", *heads], rows) + "\n"


def evaluations(run: Run) -> list[dict]:
    """Return the eval records of a run. Raises ValueError for a damaged record."""
    records = toy.read_metrics(run.path, "eval")
    with toy.reading(run.path / "metrics.jsonl"):
        return [
            {
                "step": int(record["step"]),
                "tiers": {
                    str(int(n)): {key: float(tier[key]) for key in COLUMNS.values()}
                    for n, tier in record["tiers"].items()
                },
            }
            for record in records
        ]


# ---- training (Fig. 4, 5, 7) -------------------------------------------------------------------


@analyze.styled
def draw_training(groups: dict) -> dict:
    """Return {name: figure} of dynamics and refinement.

    Each setting has its mean over seeds with a band. A dotted line shows where its phase 1 ends.
    """
    read = {label: [analyze.read_training(run) for run in runs] for label, runs in groups.items()}
    figures = {}
    for name, panels in next(iter(read.values()))[0].items():
        figure = Figure(figsize=(analyze.WIDTH, 2.3))
        axes = figure.subplots(1, len(panels))
        for ax, title in zip(axes, panels):
            for i, (label, trainings) in enumerate(read.items()):
                x, mean, std = over_seeds([training[name][title] for training in trainings])
                style = dict(color=f"C{i}", label=label)
                if len(x) <= 5:  # a line between so few points would show what was not measured
                    ax.errorbar(x, mean, std, fmt="o", ms=4, capsize=3, **style)
                else:
                    ax.plot(x, mean, marker="o" if len(x) <= 20 else "", ms=3, **style)
                    ax.fill_between(x, mean - std, mean + std, color=f"C{i}", alpha=0.2, lw=0)
                s_inter = groups[label][0].settings.s_inter
                if s_inter:
                    ax.axvline(s_inter + 0.5, color=f"C{i}", linewidth=0.8, linestyle=":")
            ax.set(title=title, xlabel="step")
        if len(read) > 1:
            handles = axes[0].get_legend_handles_labels()
            figure.legend(*handles, ncols=3, loc="outside upper center")
        figures[name] = figure
    return figures


# ---- Pass@K (Fig. 6) ---------------------------------------------------------------------------


def sample_counts(model, s: toy.Settings, n: int, problems: int, samples: int) -> np.ndarray:
    """Return how many of `samples` responses are correct, for each of the held-out problems."""
    drawn = toy.evaluation_problems(toy.rng_for(s.seed, f"evaluation, n {n}"), n, problems)
    generator = toy.torch_rng_for(model.device, s.seed, f"passk responses, n {n}")
    texts = toy.sample_texts(model, s, drawn, samples, generator)
    return np.array(
        [sum(toy.is_correct(p, text) for text in group) for p, group in zip(drawn, texts)]
    )


def pass_curves(groups: dict, problems: int, samples: int) -> dict:
    """Return {"k": [1, 2, .., 256], "curves": {label: {n: {"pass": .., "se": ..}}}}.

    Problems are pooled over the runs of a setting; "base" pools the base models of all runs.
    """
    counts = {}
    seen = set()
    for label, runs in groups.items():
        for run in runs:
            checkpoints = {label: "final"}
            base = json.dumps(evaluations(run)[0])  # runs of several settings may share one
            if base not in seen:
                checkpoints["base"] = "base"
                seen.add(base)
            for key, name in checkpoints.items():
                model = run.load(name)
                for n in run.settings.tiers:
                    found = sample_counts(model, run.settings, n, problems, samples)
                    counts.setdefault(key, {}).setdefault(n, []).extend(found)
    ks = [2**i for i in range(9) if 2**i <= samples]
    curves = {}
    for label, tiers in sorted(counts.items(), key=lambda item: item[0] != "base"):
        curves[label] = {}
        for n, correct in tiers.items():
            # (ks, problems)
            values = np.array([minibupo.pass_at_k(samples, correct, k) for k in ks])
            many = len(correct) > 1
            se = values.std(1, ddof=1) / len(correct) ** 0.5 if many else 0 * values[:, 0]
            curves[label][n] = {"pass": values.mean(1).tolist(), "se": se.tolist()}
    return {"k": ks, "problems": problems, "samples": samples, "curves": curves}


@analyze.styled
def draw_passk(found: dict) -> Figure:
    """Return a figure of Pass@K against K: a panel for each length of problem, the base dashed."""
    curves = found["curves"]
    ks = found["k"]
    tiers = sorted({n for by_tier in curves.values() for n in by_tier})
    figure = Figure(figsize=(analyze.WIDTH, 2.3))
    axes = figure.subplots(1, len(tiers), sharey=True, squeeze=False)
    for ax, n in zip(axes[0], tiers):
        for i, (label, by_tier) in enumerate(curves.items()):
            if n in by_tier:
                mean, se = (100 * np.array(by_tier[n][key]) for key in ("pass", "se"))
                style = dict(color=f"C{i - 1}")
                if label == "base":
                    style = dict(color=analyze.GREY, ls="--")
                ax.plot(ks, mean, **style, label=label)
                ax.fill_between(ks, mean - se, mean + se, color=style["color"], alpha=0.2, lw=0)
        ax.set_xscale("log", base=2)
        ax.set_xticks(ks[::2], ks[::2])
        ax.set(title=f"n = {n} digits", xlabel="K")
    axes[0][0].set_ylabel("Pass@K (%)")
    figure.legend(*axes[0][0].get_legend_handles_labels(), ncols=4, loc="outside upper center")
    return figure


# ---- command line ------------------------------------------------------------------------------


def compare(args):
    """Make what the command line asks for. Raises ValueError for a run that is not finished."""
    runs = [Run(path, device=args.device) for path in args.runs]
    for run in runs:
        if len(toy.read_metrics(run.path, "eval")) < 2:
            raise ValueError(f"{run.path} has no evaluation after RL: it cannot be compared")
    groups = group_runs(runs)
    if "table" in args.make:
        table = result_table(groups)
        print(table)
        analyze.save(args.out / "table.md", table)
    if "training" in args.make:
        for name, figure in draw_training(groups).items():
            analyze.save(args.out / f"{name}.png", figure)
    if "passk" in args.make:
        found = pass_curves(groups, args.problems, args.samples)
        analyze.save(args.out / "passk.json", json.dumps(found, indent=1))
        analyze.save(args.out / "passk.png", draw_passk(found))


def main(argv=None) -> int:
    """Run the command line. Return 0, or 2 for bad input."""
    style = dict(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = argparse.ArgumentParser("compare", **style, allow_abbrev=False)
    things = ("table", "training", "passk")
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path)
    parser.add_argument("--make", action="append", choices=things, help="default: all three")
    parser.add_argument("--problems", type=int, default=16, help="held-out problems of each length")
    parser.add_argument("--samples", type=int, default=256, help="responses to each of them")
    parser.add_argument("--out", type=Path, default=Path("out/compare"), metavar="DIR")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    args.make = args.make or things
    try:
        if args.samples < 1 or args.problems < 1:
            raise ValueError("--samples and --problems must be at least 1")
        with torch.no_grad():
            compare(args)
        return 0
    except (ValueError, OSError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
