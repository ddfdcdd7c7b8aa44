"""Exercise 10 (an afternoon): a question of your own, answered by pairs of runs. Examples:
a KL term to the base model; a phase 1 over two layers; distilling pi_theta into a lower layer
(On-Policy Internal Self-Distillation, arXiv 2605.29089); another reward or task.

1. Copy course/report_template.md to report.md in this folder. Write question and prediction now.
2. variant(model, optimizer, rollouts, step): one step of your algorithm, as `control` below is one
   step of GRPO. rollouts are new Rollouts of pi_theta; steps count from 1.
3. interval(differences): the mean of a few paired differences, and half the width of its 95%
   interval, T95[number of pairs] standard errors of the mean: (mean, half).
4. Run the pairs with python course/exercises/ex10_pairs.py, and finish the report. If your variant
   takes the place of some steps of GRPO, also make an idle run, which makes no update in these
   steps. What is a step of your variant worth (lecture 8)?
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the folder of minibupo.py

import torch

import minibupo
import train_toy

# Student's t by number of pairs: 95% lie within this many standard errors
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
SEEDS = range(5)  # more pairs make the interval smaller, but do not change the prediction
STEPS = 20


def interval(differences):
    raise NotImplementedError


def variant(model, optimizer, rollouts, step):
    raise NotImplementedError


# ---- the rest runs as it is; change it if your question needs that ----


def control(model, optimizer, rollouts, step):
    """Make one step of GRPO."""
    minibupo.update(model, optimizer, rollouts)


def accuracy_over_run(algorithm, seed) -> float:
    """Train course/base.pt at n = 3. Return the held-out accuracy in %, averaged over the run."""
    s = train_toy.Settings(n=3, questions=32, seed=seed)
    model = train_toy.load_model(Path(__file__).resolve().parents[1] / "base.pt")
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    found = []
    for step in range(1, STEPS + 1):
        rollouts = train_toy.rollouts(s, model, step)
        algorithm(model, optimizer, rollouts, step)
        if step % 5 == 0:
            scores, _ = train_toy.evaluate(model, s, [3], 64)
            found.append(100 * scores["3"]["avg@8"])
    return sum(found) / len(found)


def main():
    """Run the pairs. Both arms of a pair share the base model, the problems and the seed."""
    interval([1.0, 2.0])  # if it is not written, this fails now and not after the runs
    torch.set_num_threads(1)
    differences = []
    for seed in SEEDS:
        with_variant = accuracy_over_run(variant, seed)
        without = accuracy_over_run(control, seed)
        differences.append(with_variant - without)
        print(f"seed {seed}: variant {with_variant:.1f}%, control {without:.1f}%", flush=True)
    mean, half = interval(differences)
    print(f"variant - control: {mean:+.1f} +- {half:.1f} points, {len(differences)} pairs")


if __name__ == "__main__":
    main()
