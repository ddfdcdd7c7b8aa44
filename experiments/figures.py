"""The figures of README and docs.

    python -m experiments.figures seeds     # of the runs of experiments.seeds: README's pictures
    python -m experiments.figures study     # from the committed results: effects, training

Entropy flow and lens are of seed 0, the dynamics of all five seeds. The figures are written to
experiments/figures. Needs the extra `bench`.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import analyze
from experiments import common, compare, mechanism, study

RUNS = [str(common.ROOT / "out" / "seeds" / f"seed{seed}") for seed in range(5)]
LANGUAGE_MODELS = {"smollm2": "SmolLM2", "qwen": "Qwen"}
EVALUATED = {"smollm2": range(0, 21, 5), "qwen": (0, 4, 8, 12, 16, 18)}  # optimizer steps
ROWS = {  # of the forest plot, from top to bottom: {what a colour means: {arm: its row}}
    "phase 1": {
        "BuPO, rule": "BuPO at the rule's layer",
        "BuPO, layer 3": "BuPO at layer 3",
        "BuPO, layer 5": "BuPO at layer 5",
        "BuPO, rule, s_inter 10": "phase 1 of 10 steps, not 5",
        "BuPO, rule, s_inter 20": "phase 1 of 20 steps",
    },
    "one change of phase 1 alone": {
        "GRPO, above rule frozen": "only freezing above the rule's layer",
        "GRPO, above 3 frozen": "only freezing above layer 3",
        "GRPO, above 5 frozen": "only freezing above layer 5",
        "GRPO, moments reset at 5": "only the optimizer's reset",
    },
    "internal policies pretrained (W)": {
        f"BuPO, layer {l}, W = {W}": f"BuPO at layer {l}, W = {W}"
        for l in (3, 5)
        for W in study.WEIGHTS
    },
    "other settings": {
        "96 problems, BuPO": "BuPO on the same 96 problems",
        "PPO, BuPO": "phase 1 in PPO",
        "RLOO, BuPO": "phase 1 in RLOO",
        "Reinforce++, BuPO": "phase 1 in Reinforce++",
    },
}


def forest(lines: list[dict], pairs: list[dict]):
    """Draw each effect on accuracy over the run as a row, with its 95% interval over base models.

    For the language models it is the effect on the reward over the run, and the interval is over
    seeds.
    """
    figure, ax = plt.subplots(figsize=(7.5, 5.2), layout="constrained")
    names = []

    def rows(group, effects):  # {name of a row: differences}
        at = range(-len(names), -len(names) - len(effects), -1)
        mean, half = zip(*(common.mean_interval(d) for d in effects.values()))
        ax.errorbar(mean, at, xerr=half, fmt="o", capsize=2, label=group)
        names.extend(f"{name}  ({len(d)})" for name, d in effects.items())

    for group, arms in ROWS.items():
        effects = {
            name: study.differences(lines, arm, lambda a, b: study.area(a) - study.area(b))
            for arm, name in arms.items()
        }
        rows(group, {name: d for name, d in effects.items() if len(d) > 1})
    effects = {}
    for model, name in LANGUAGE_MODELS.items():
        of_model = [line for line in pairs if line["model"] == model]
        for arm in dict.fromkeys(line["arm"] for line in of_model):
            if arm != "GRPO":
                effects[f"{name}: {arm}"] = common.differences(
                    of_model, arm, "GRPO", reward_gained, unit="seed"
                )
    rows("language models", effects)
    ax.axvline(0, color="0.45", linewidth=0.8)
    ax.set_yticks(range(0, -len(names), -1), names)
    ax.set_xlabel("arm - GRPO over the run, in points  (bases or seeds)")
    ax.legend(loc="center left")
    save(figure, "study_effects.png")


def reward_gained(line: dict, control: dict) -> float:
    """Return arm - control in points of training reward, mean over the run."""
    return 100 * (np.mean(line["reward"]) - np.mean(control["reward"]))


def scatter(points: list[tuple]):
    """Draw what phase 1 costs against the cosine at the base: one point per base, W and layer."""
    figure, ax = plt.subplots(figsize=(4.5, 3.2), layout="constrained")
    for i, W in enumerate((0, *study.WEIGHTS)):
        of_W = [(cosine, effect) for _, w, _, cosine, effect in points if w == W]
        if of_W:
            ax.plot(*zip(*of_W), "o", markersize=3.5, color=f"C{i}", label=f"W = {W}")
    rho, low, high = mechanism.correlation(points)
    ax.axhline(0, color="0.45", linewidth=0.8)
    ax.set(xlabel="cosine with GRPO's gradient, on the base", ylabel="BuPO - GRPO, points")
    ax.set_title(f"Spearman's correlation {rho:.2f} ({low:.2f} to {high:.2f})", size=9)
    ax.legend()
    save(figure, "study_prediction.png")


def training(pairs: list[dict]):
    """Draw the held-out reward of language models in training by minibupo_hf/train.py.

    Lines are means over seeds, bands their standard deviation. Phase 1, eight optimizer steps, ends
    at the dotted line.
    """
    figure, panels = plt.subplots(1, 2, figsize=(8.5, 3), layout="constrained", sharey=True)
    for ax, (model, name) in zip(panels, LANGUAGE_MODELS.items()):
        of_model = [line for line in pairs if line["model"] == model]
        for arm in dict.fromkeys(line["arm"] for line in of_model):
            held = np.array([line["held_out"] for line in of_model if line["arm"] == arm])
            steps = EVALUATED[model]
            mean = held.mean(0)
            std = held.std(0, ddof=1)
            ax.plot(steps, mean, "o-", markersize=3, label=f"{arm} ({len(held)} seeds)")
            ax.fill_between(steps, mean - std, mean + std, alpha=0.15, linewidth=0)
        ax.axvline(8.5, color="0.45", linewidth=0.8, linestyle=":", label="phase 1 ends")
        ax.set(title=name, xlabel="optimizer step", xticks=steps, ylim=(0, 1))
        ax.legend(fontsize=7, loc="lower right")
    panels[0].set_ylabel("held-out reward")
    save(figure, "language_model_training.png")


def save(figure, name: str):
    """Write a figure and say so."""
    figure.savefig(common.FIGURES / name, dpi=160)
    print(f"wrote {common.FIGURES / name}")


def of_seeds() -> int:
    """Draw the figures of analyze.py and compare.py for the runs of seeds.py. Return 0, or 2."""
    with tempfile.TemporaryDirectory() as scratch:
        out = ["--out", scratch]
        failed = (
            analyze.main(["entropy", RUNS[0], *out])
            or analyze.main(["lens", RUNS[0], "4+4+4+2*8=", *out])
            or compare.main([*RUNS, "--make", "training", *out])
        )
        if failed:
            print("figures: run python -m experiments.seeds first", file=sys.stderr)
            return 2
        for name in ("entropy_flow.png", "lens.png", "dynamics.png"):
            shutil.move(Path(scratch) / name, common.FIGURES / name)
    return 0


def of_study() -> int:
    """Draw the figures of the committed results of study, mechanism and lm_study. Return 0."""
    runs = common.read_lines(study.RESULTS)
    pairs = common.read_lines(common.RESULTS / "lm_pairs.jsonl")
    forest(runs, pairs)
    training(pairs)
    scatter(mechanism.prediction(common.read_lines(mechanism.RESULTS), runs))
    return 0


def main(argv=None) -> int:
    """Run the command line. Return 0, or 2 if a run is missing."""
    parser = argparse.ArgumentParser("figures", description="The figures of README and docs.")
    parser.add_argument("of", choices=("seeds", "study"), help="the results to draw")
    return of_seeds() if parser.parse_args(argv).of == "seeds" else of_study()


if __name__ == "__main__":
    sys.exit(main())
