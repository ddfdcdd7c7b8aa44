"""README's figures.

    python experiments/figures.py seeds     # after seeds.py: entropy flow, lens, dynamics
    python experiments/figures.py study     # after study.py, mechanism.py, lm_study.py: effects

Entropy flow and lens are of seed 0, the dynamics of all five seeds. Needs the extra `bench`. They
are written to experiments/figures.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

import compare  # noqa: E402

import analyze  # noqa: E402
from experiments import mechanism, study  # noqa: E402
from experiments.seeds import less_control, read_lines  # noqa: E402

FIGURES = ROOT / "experiments" / "figures"
PAIRS = ROOT / "experiments" / "results" / "lm_pairs.jsonl"
LANGUAGE_MODELS = {"smollm2": "SmolLM2", "qwen": "Qwen"}
EVALUATED = {"smollm2": range(0, 21, 5), "qwen": (0, 4, 8, 12, 16, 18)}  # optimizer steps
RUNS = [str(ROOT / "out" / "seeds" / f"seed{seed}") for seed in range(5)]
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
    """Each effect on accuracy over the run as a row, with its 95 % interval over bases; for the
    language models on the reward over the run, with the interval over seeds."""
    figure, ax = plt.subplots(figsize=(7.5, 5.2), layout="constrained")
    names = []

    def rows(group, effects):  # {name of a row: differences}
        at = range(-len(names), -len(names) - len(effects), -1)
        mean, half = zip(*(study.interval(d) for d in effects.values()))
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
        of_it = [line for line in pairs if line["model"] == model]
        of_it = less_control(of_it, "GRPO", lambda line: 100 * np.mean(line["reward"]))
        effects |= {f"{name}: {arm}": d for arm, d in of_it.items()}
    rows("language models", effects)
    ax.axvline(0, color="0.45", linewidth=0.8)
    ax.set_yticks(range(0, -len(names), -1), names)
    ax.set_xlabel("arm - GRPO over the run, in points  (bases or seeds)")
    ax.legend(loc="center left")
    save(figure, "study_effects.png")


def scatter(points: list[tuple]):
    """Does the cosine at the base predict what phase 1 costs? A point is a base, W and layer."""
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
    """Language models in training by minibupo_hf/train.py: held-out reward, mean over seeds with their
    spread; phase 1, eight optimizer steps, ends at the dotted line."""
    figure, panels = plt.subplots(1, 2, figsize=(8.5, 3), layout="constrained", sharey=True)
    for ax, (model, name) in zip(panels, LANGUAGE_MODELS.items()):
        of_it = [line for line in pairs if line["model"] == model]
        for arm in dict.fromkeys(line["arm"] for line in of_it):
            held = np.array([line["held_out"] for line in of_it if line["arm"] == arm])
            steps = EVALUATED[model]
            mean, std = held.mean(0), held.std(0, ddof=1)
            ax.plot(steps, mean, "o-", markersize=3, label=f"{arm} ({len(held)} seeds)")
            ax.fill_between(steps, mean - std, mean + std, alpha=0.15, linewidth=0)
        ax.axvline(8.5, color="0.45", linewidth=0.8, linestyle=":", label="phase 1 ends")
        ax.set(title=name, xlabel="optimizer step", xticks=steps, ylim=(0, 1))
        ax.legend(fontsize=7, loc="lower right")
    panels[0].set_ylabel("held-out reward")
    save(figure, "language_model_training.png")


def save(figure, name: str):
    """Write a figure and say so."""
    figure.savefig(FIGURES / name, dpi=160)
    print(f"wrote {FIGURES / name}")


def of_seeds():
    """The figures of analyze.py and compare.py, of the runs of seeds.py."""
    with tempfile.TemporaryDirectory() as scratch:
        out = ["--out", scratch]
        failed = (
            analyze.main(["entropy", RUNS[0], *out])
            or analyze.main(["lens", RUNS[0], "4+4+4+2*8=", *out])
            or compare.main([*RUNS, "--make", "training", *out])
        )
        if failed:
            sys.exit("run experiments/seeds.py first")
        for name in ("entropy_flow.png", "lens.png", "dynamics.png"):
            shutil.move(Path(scratch) / name, FIGURES / name)


if __name__ == "__main__":
    if sys.argv[1:] == ["seeds"]:
        of_seeds()
    elif sys.argv[1:] == ["study"]:
        runs = read_lines(study.RESULTS)
        pairs = read_lines(PAIRS)
        forest(runs, pairs)
        training(pairs)
        scatter(mechanism.prediction(read_lines(mechanism.RESULTS), runs))
    else:
        sys.exit(__doc__)
