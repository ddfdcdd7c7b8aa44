"""The figures of README and docs.

    python -m experiments.figures seeds     # of the runs of experiments.seeds: README's pictures
    python -m experiments.figures study     # from the committed results: all other pictures

Entropy flow and lens are of seed 0, the dynamics of all five seeds. The figures are written to
experiments/figures, all in the style of analyze.py. Needs the extra `bench`.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np

import analyze
import minibupo
from experiments import common, compare, language_models, lm_study, mechanism, study

RUNS = [str(common.ROOT / "out" / "seeds" / f"seed{seed}") for seed in range(5)]
CURVES = {  # arms of the curves, with their labels
    "GRPO": "GRPO",
    "GRPO, idle 5": "nothing for 5 steps, then GRPO",
    "BuPO, rule": "BuPO: phase 1 for 5 steps",
}
KINDS = (("phase 1", False, "o", None), ("layers above frozen", True, "s", "white"))
LANGUAGE_MODELS = {"smollm2": "SmolLM2", "qwen": "Qwen"}
MODEL_COLOURS = {"smollm2": "C3", "qwen": "C5"}
EVALUATED = {"smollm2": range(0, 21, 5), "qwen": (0, 4, 8, 12, 16, 18)}  # optimizer steps
# Rows of the figure of worth, from top to bottom: the arms of the study with their labels, then the
# language models with the arms that are shown.
ROWS = {
    "BuPO, rule": "BuPO at the rule's layer",
    "BuPO, layer 3": "BuPO at layer 3",
    "BuPO, rule, s_inter 20": "BuPO at the rule's layer, 20 steps of phase 1",
    "GRPO, above rule frozen": "GRPO, in phase 1 frozen above the rule's layer",
    "PPO, BuPO": "PPO with a phase 1",
    "BuPO, layer 5, W = 1": "BuPO at layer 5, internal policies pretrained",
}
LM_ROWS = (
    ("smollm2", "BuPO, layer 15"),
    ("smollm2", "BuPO, layer 28"),
    ("qwen", "BuPO, layer 12"),
    ("qwen", "BuPO, layer 23"),
)


@analyze.styled
def effects(lines: list[dict], pairs: list[dict]):
    """Draw what a step of phase 1 is worth, one row per arm, with its 95% interval by Fieller."""
    rows = []  # (label, colour, what common.costs returns)
    for arm, label in ROWS.items():
        control = study.without_phase_1(arm)
        found = common.costs(lines, arm, control, study.ARMS[arm].s_inter, "base")
        n = len(found["arm - control"])
        rows.append((f"{label}\nagainst {control}, {n} base models", "C0", found))
    for model, arm in LM_ROWS:
        of_model = [line for line in pairs if line["model"] == model]
        found = common.costs(of_model, arm, "GRPO", lm_study.TRAINING[model]["phase1"], "seed")
        n = len(found["arm - control"])
        label = f"{LANGUAGE_MODELS[model]}: {arm}\nagainst GRPO, {n} seeds"
        rows.append((label, MODEL_COLOURS[model], found))

    figure, ax = plt.subplots(figsize=(analyze.WIDTH, 5))
    for row, (_, colour, found) in enumerate(rows):
        value, low, high = common.worth(found["arm - control"], found["idle - control"])
        error = [[value - low], [high - value]]
        ax.errorbar(value, -row, xerr=error, fmt="o", capsize=3, color=colour)
        ax.annotate(
            f"{value:.2f}", (value, -row), (0, 5), textcoords="offset points", ha="center", size=8
        )
    ax.set_yticks(range(0, -len(rows), -1), [label for label, *_ in rows])
    for at, name in ((0, "no step"), (1, "a step of\nthe control")):
        ax.axvline(at, color=analyze.GREY, linewidth=0.8)
        where = dict(xycoords=("data", "axes fraction"), textcoords="offset points", ha="center")
        ax.annotate(name, (at, 1), (0, 3), size=8, **where)
    ax.set_xlim(-0.75, 1.2)
    ax.set_xlabel("what a step of phase 1 is worth, in steps of the control")
    save(figure, "study_effects.png")


@analyze.styled
def idle(runs: list[dict]):
    """Draw training with phase 1, with nothing in its place, and with GRPO in its place."""
    figure, ax = plt.subplots(figsize=(5, 2.8))
    for (arm, label), style in zip(CURVES.items(), ("-", "--", "-")):
        rewards = np.array([run["reward"] for run in runs if run["arm"] == arm])
        steps = range(1, rewards.shape[1] + 1)
        ax.plot(steps, rewards.mean(0), style, label=label)
    ax.axvspan(1, 5.5, color="0.92", linewidth=0)
    ax.annotate("phase 1", (1.2, 0.95), size=7)
    ax.set(xlabel="step", ylabel=f"training reward,\nmean of {len(rewards)} base models")
    ax.set(xlim=(1, 60), ylim=(0, 1))
    ax.legend(loc="lower right")
    save(figure, "study_idle.png")


@analyze.styled
def predicted_and_measured(points: list[tuple], lm_points: list[tuple]):
    """Draw measured against predicted worth: one point per base model, W and arm, with y = x."""
    figure, ax = plt.subplots(figsize=(5, 3.6))
    for W, colour in zip((0, *study.WEIGHTS), ("C0", "C4", "C1", "C2")):
        of_W = [(step, x, y) for step, _, w, x, y in points if w == W]
        for name, is_frozen, marker, fill in KINDS:
            chosen = [(x, y) for step, x, y in of_W if ("above" in step) == is_frozen]
            if chosen:
                style = dict(color=colour, mfc=fill or colour, markersize=3.5)
                ax.plot(*zip(*chosen), marker, label=f"{name}, W = {W}", **style)
    for model, colour in MODEL_COLOURS.items():
        for name, is_frozen, _, fill in KINDS:
            of_kind = [
                (predicted, measured, half, measured - low, high - measured)
                for line, arm, predicted, half, (measured, low, high) in lm_points
                if line["model"] == model and ("frozen" in arm) == is_frozen
            ]
            if of_kind:
                x, y, half, below, above = zip(*of_kind)
                style = dict(color=colour, mfc=fill or colour, fmt="D", linewidth=0.8)
                label = f"{name}, {LANGUAGE_MODELS[model]}"
                ax.errorbar(x, y, xerr=half, yerr=[below, above], label=label, **style)
    ax.axline((0, 0), slope=1, color=analyze.GREY, linewidth=0.8)
    ax.set(xlabel="worth of a step, predicted without training", ylabel="worth as measured")
    ax.legend(fontsize=6)
    save(figure, "study_worth.png")


@analyze.styled
def training(pairs: list[dict]):
    """Draw the held-out reward of language models in training by minibupo_hf/train.py.

    Lines are means over seeds, bands their standard deviation. Phase 1, eight optimizer steps, ends
    at the dotted line.
    """
    figure, panels = plt.subplots(1, 2, figsize=(analyze.WIDTH, 3.6), sharey=True)
    for ax, (model, name) in zip(panels, LANGUAGE_MODELS.items()):
        of_model = [line for line in pairs if line["model"] == model]
        arms = dict.fromkeys(line["arm"] for line in of_model)
        for arm, colour in zip(arms, ("C0", "C2", "C5", "C1")):
            held = np.array([line["held_out"] for line in of_model if line["arm"] == arm])
            steps = EVALUATED[model]
            mean = held.mean(0)
            std = held.std(0, ddof=1)
            label = f"{arm} ({len(held)} seeds)"
            ax.plot(steps, mean, "o-", markersize=3, color=colour, label=label)
            ax.fill_between(steps, mean - std, mean + std, color=colour, alpha=0.15, linewidth=0)
        ax.axvline(8.5, color=analyze.GREY, linewidth=0.8, linestyle=":", label="phase 1 ends")
        ax.set(title=name, xlabel="optimizer step", xticks=steps, ylim=(0, 1))
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18))
    panels[0].set_ylabel("held-out reward")
    save(figure, "language_model_training.png")


@analyze.styled
def large():
    """Draw the training of the larger model of docs/gpu.md, and its entropy changes before RL."""
    base = common.read_lines(common.RESULTS / "large-metrics.jsonl")[0]
    target = minibupo.target_layer(base["dH_mlp"])
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copy(common.RESULTS / "large-metrics.jsonl", Path(scratch) / "metrics.jsonl")
        # what read_training needs of a run; this one left its metrics only
        run = SimpleNamespace(
            path=Path(scratch),
            settings=SimpleNamespace(n=8),
            target_policy=lambda: minibupo.Policy(target),
        )
        panels = analyze.read_training(run)["dynamics"]
    save(analyze.draw_training(panels, s_inter=5), "large_dynamics.png")
    # the record has means over positions: of one position, as it were
    means = {name: np.array(base[name])[:, None] for name in ("dH_attn", "dH_mlp", "dH_layer")}
    save(analyze.draw_change(means, target), "large_entropy_change.png")


def save(figure, name: str):
    """Write a figure and say so."""
    figure.savefig(common.FIGURES / name, dpi=160)
    print(f"wrote {common.FIGURES / name}")


def of_seeds() -> int:
    """Draw the figures of analyze.py and compare.py for the runs of seeds.py. Return 0, or 2."""
    with tempfile.TemporaryDirectory() as scratch:
        out = ["--out", scratch]
        failed = analyze.main(["entropy", RUNS[0], *out]) or compare.main(
            [*RUNS, "--make", "training", *out]
        )
        if failed:
            print("figures: run python -m experiments.seeds first", file=sys.stderr)
            return 2
        for name in ("entropy_flow.png", "dynamics.png"):
            shutil.move(Path(scratch) / name, common.FIGURES / name)
    page = analyze.lens_data(analyze.Run(RUNS[0], "final"), "7+5*3-2=")
    save(analyze.draw_lens(page, "final", sites=["resid_post"]), "lens.png")
    return 0


def of_study() -> int:
    """Draw the figures of the committed results. Return 0."""
    runs = common.read_lines(study.RESULTS)
    pairs = common.read_lines(common.RESULTS / "lm_pairs.jsonl")
    effects(runs, pairs)
    training(pairs)
    for name in LANGUAGE_MODELS:
        found = (common.RESULTS / f"language_model_{name}.json").read_text(encoding="utf-8")
        language_models.draw(json.loads(found), name)
    large()
    runs = mechanism.worth_runs()
    points = mechanism.worth_points(common.read_lines(mechanism.WORTH_RESULTS), runs)
    predicted = common.read_lines(common.RESULTS / "lm_worth.jsonl")
    idle(runs)
    predicted_and_measured(points, lm_study.worth_points(predicted, pairs))
    return 0


def main(argv=None) -> int:
    """Run the command line. Return 0, or 2 if a run is missing."""
    parser = argparse.ArgumentParser("figures", description="The figures of README and docs.")
    parser.add_argument("of", choices=("seeds", "study"), help="the results to draw")
    return of_seeds() if parser.parse_args(argv).of == "seeds" else of_study()


if __name__ == "__main__":
    sys.exit(main())
