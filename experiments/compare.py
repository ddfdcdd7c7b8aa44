"""Runs of train_toy.py side by side: seeds of one setting are put together.

    python experiments/compare.py RUN RUN ...              all of the below, into out/compare
    python experiments/compare.py --make table RUN RUN ... only that: table training passk

    table       results as Markdown, the mean over seeds and its 95 % t-interval: table.md
    training    dynamics.png (Fig. 4, 7) and refinement.png (Fig. 5): mean, band of one standard
                deviation over seeds
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
import scipy.stats
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import analyze  # noqa: E402
import minibupo  # noqa: E402
import train_toy as toy  # noqa: E402
from analyze import Subject, plt  # noqa: E402

# ---- seeds of one setting ----------------------------------------------------------------------

NO_SETTING = {"seed", "out_dir", "base", "preset", "device", "threads", "eval_problems"}


def group_runs(runs: list[Subject]) -> dict[str, list[Subject]]:
    """{label: runs of one setting}. The label is the algorithm and the options in which settings
    differ; seed, base and machine are no part of a setting."""

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


def mean_interval(values) -> tuple[float, float | None]:
    """Mean, and half the width of its 95 % t-interval (None for a single value)."""
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return mean, None
    return mean, float(scipy.stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5)


def over_seeds(curves: list[dict]):
    """Curves {x: y} of several seeds -> sorted x, mean and standard deviation (0 for one seed) of
    those that reach each x."""
    xs = sorted(set().union(*curves))
    columns = [[curve[x] for curve in curves if x in curve] for x in xs]
    std = [np.std(column, ddof=1) if len(column) > 1 else 0.0 for column in columns]
    return xs, np.array([np.mean(column) for column in columns]), np.array(std)


# ---- table -------------------------------------------------------------------------------------

COLUMNS = {"Avg": f"avg@{toy.SAMPLES}", "right steps": "right_steps", "Pass": f"pass@{toy.SAMPLES}"}


def result_table(groups: dict) -> str:
    """The last evaluation of each run as a Markdown table, in %: a row for the bases and one for
    each setting. A base that several runs share counts once."""
    evals = {label: [evaluations(run) for run in runs] for label, runs in groups.items()}
    bases = {json.dumps(of[0]): of[0] for runs in evals.values() for of in runs}
    rows = {"before RL": list(bases.values())}
    rows |= {label: [of[-1] for of in runs] for label, runs in evals.items()}
    tiers = sorted({int(n) for of in rows.values() for record in of for n in record["tiers"]})
    heads = [f"n = {n} {name}" for n in tiers for name in COLUMNS]
    lines = [f"| setting | runs | steps | {' | '.join(heads)} |", "|---" * (3 + len(heads)) + "|"]
    for label, of in rows.items():
        steps = sorted({record["step"] for record in of})
        cells = [label, str(len(of)), f"{steps[0]}..{steps[-1]}" if steps[1:] else f"{steps[0]}"]
        for n in map(str, tiers):
            for key in COLUMNS.values():
                cells.append(cell([100 * r["tiers"][n][key] for r in of if n in r["tiers"]]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cell(values: list[float]) -> str:
    """Mean and interval as text."""
    if not values:
        return ""
    mean, half = mean_interval(values)
    return f"{mean:.1f}" if half is None else f"{mean:.1f} ± {half:.1f}"


def evaluations(run: Subject) -> list[dict]:
    """The eval records of a run, numbers checked. Raises ValueError if it has none."""
    records = toy.read_metrics(run.run, "eval")
    with toy.reading(run.run / "metrics.jsonl"):
        return [
            {
                "step": int(record["step"]),
                "tiers": {
                    str(int(n)): {key: float(of[key]) for key in COLUMNS.values()}
                    for n, of in record["tiers"].items()
                },
            }
            for record in records
        ]


# ---- training (Fig. 4, 5, 7) -------------------------------------------------------------------


def draw_training(groups: dict) -> dict:
    """{name: figure} of dynamics and refinement: each setting's mean over seeds with a band, and
    its change from phase 1 to phase 2 as a dotted line."""
    read = {label: [analyze.read_training(run) for run in runs] for label, runs in groups.items()}
    figures = {}
    for name, panels in next(iter(read.values()))[0].items():
        figure, axes = plt.subplots(1, len(panels), figsize=(analyze.WIDTH, 2.3))
        for ax, title in zip(axes, panels):
            for i, (label, trainings) in enumerate(read.items()):
                x, mean, std = over_seeds([training[name][title] for training in trainings])
                ax.plot(x, mean, color=f"C{i}", label=label)
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
    """How many of `samples` responses are right, for each of `problems` held-out problems of n
    digits."""
    drawn = toy.evaluation_problems(toy.stream(s.seed, f"evaluation, n {n}"), n, problems)
    generator = toy.torch_stream(model.device, s.seed, f"passk responses, n {n}")
    texts = toy.attempts(model, s, drawn, samples, generator)
    return np.array([sum(toy.is_right(p, text) for text in of) for p, of in zip(drawn, texts)])


def pass_curves(groups: dict, problems: int, samples: int) -> dict:
    """{"k": [1, 2, .., 256], "curves": {label: {n: {"pass": .., "se": ..}}}}, pooled over the runs
    of a setting; "base" pools the bases of all runs."""
    counts, seen = {}, set()
    for label, runs in groups.items():
        for run in runs:
            base = json.dumps(evaluations(run)[0])  # runs of several settings may share one
            shared = base in seen
            seen.add(base)
            for key, name in ((label, "final"), *(() if shared else (("base", "base"),))):
                model = run.load(name)
                for n in run.settings.tiers:
                    of = sample_counts(model, run.settings, n, problems, samples)
                    counts.setdefault(key, {}).setdefault(n, []).extend(of)
    ks = [2**i for i in range(9) if 2**i <= samples]
    curves = {}
    for label, tiers in sorted(counts.items(), key=lambda item: item[0] != "base"):
        curves[label] = {}
        for n, of in tiers.items():
            values = np.array([minibupo.pass_at_k(samples, of, k) for k in ks])  # (ks, problems)
            se = values.std(1, ddof=1) / len(of) ** 0.5 if len(of) > 1 else 0 * values[:, 0]
            curves[label][n] = {"pass": values.mean(1).tolist(), "se": se.tolist()}
    return {"k": ks, "problems": problems, "samples": samples, "curves": curves}


def draw_passk(found: dict):
    """Pass@K against K, a panel for each length of problem; the base dashed."""
    curves, ks = found["curves"], found["k"]
    tiers = sorted({n for of in curves.values() for n in of})
    size = (analyze.WIDTH, 2.3)
    figure, axes = plt.subplots(1, len(tiers), figsize=size, sharey=True, squeeze=False)
    for ax, n in zip(axes[0], tiers):
        for i, (label, of) in enumerate(curves.items()):
            if n in of:
                mean, se = (100 * np.array(of[n][key]) for key in ("pass", "se"))
                style = (
                    dict(color=analyze.GREY, ls="--")
                    if label == "base"
                    else dict(color=f"C{i - 1}")
                )
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
    """Make what the command line asks for."""
    runs = [analyze.read_run(path, device=args.device) for path in args.runs]
    for run in runs:
        if len(toy.read_metrics(run.run, "eval")) < 2:
            raise ValueError(f"{run.run} has no evaluation after RL: it cannot be compared")
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
    """Run the command line. Returns 0, or 2 for bad input."""
    style = dict(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = argparse.ArgumentParser("compare.py", **style, allow_abbrev=False)
    things = ("table", "training", "passk")
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path)
    parser.add_argument("--make", action="append", choices=things, help="default: all three")
    parser.add_argument("--problems", type=int, default=16, help="held-out problems a length")
    parser.add_argument("--samples", type=int, default=256, help="responses to each of them")
    parser.add_argument("--out", type=Path, default=Path("out/compare"), metavar="DIR")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    args.make = args.make or things
    try:
        if args.samples < 1 or args.problems < 1:
            raise ValueError("--samples and --problems must be at least 1")
        with plt.style.context(analyze.STYLE), torch.no_grad():
            compare(args)
        return 0
    except (ValueError, OSError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
