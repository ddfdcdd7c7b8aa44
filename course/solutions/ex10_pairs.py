"""Solution 10, for one question: a phase 1 over two layers, with three steps at layer 3 and then
three at layer 4, compared with GRPO. The result is in report.md. The interval is that of the
differences: what both arms of a pair share, such as a lucky seed, cancels in the difference. In an
interval for each arm alone it would only add width."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the folder of minibupo.py

import torch

import minibupo
import train_toy
from minibupo import FULL, Policy

# Student's t by number of pairs: 95% lie within this many standard errors
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
SEEDS = range(5)  # more pairs make the interval smaller, but do not change the prediction
STEPS = 20


def interval(differences):
    n = len(differences)
    mean = sum(differences) / n
    variance = sum((d - mean) ** 2 for d in differences) / (n - 1)  # of one pair
    error = (variance / n) ** 0.5  # the mean of n pairs has a variance n times smaller
    return mean, T95[n] * error


def variant(model, optimizer, rollouts, step):
    if step <= 3:
        policy = Policy(3)
    elif step <= 6:
        policy = Policy(4)
    else:
        policy = FULL
    minibupo.update(model, optimizer, rollouts, policy)


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
