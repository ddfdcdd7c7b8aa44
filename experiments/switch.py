"""What to do with AdamW's moments when BuPO goes over from phase 1 to phase 2.

    python experiments/switch.py BASE.pt [BASE.pt ...]     # about two minutes a base on two cores

The layers above the target take their first step at the switch, and AdamW's first step is of size
lr for every weight, whatever the gradient. E_u and the layers below carry the moments of another
objective. So, from each base and each of three seeds: five steps at the layer of the rule, then ten
on pi_theta with the optimizer kept, reset, or reset with its learning rate warmed up over five
steps. Results are in out/switch.jsonl; those of commit 07e9ae1 are in experiments/results.
"""

import copy
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import train_toy as toy  # noqa: E402
from experiments.seeds import run_missing  # noqa: E402
from minibupo import FULL, Policy, bupo, target_layer  # noqa: E402

S_INTER, STEPS, SEEDS, LR = 5, 15, range(100, 103), 4e-4
CHOICES = ("keep", "reset", "warm")


def adamw(model):
    """The optimizer of both phases."""
    return torch.optim.AdamW(model.parameters(), lr=LR, fused=True)


def steps_of(s: toy.Settings, model, optimizer, start: int, stop: int, target: Policy, warm=False):
    """The logs of steps start..stop, which are all of one phase."""

    def sample(step):
        warmth = min(1.0, (step - S_INTER) / 5) if warm else 1.0
        optimizer.param_groups[0]["lr"] = LR * warmth
        return toy.rollouts(s, model, step)

    # one phase a call, so bupo itself does not reset the optimizer
    steps = bupo(model, optimizer, sample, target, 0 if target == FULL else stop, stop, start=start)
    return [log | {"reward": float(batch.rewards.mean())} for _, _, batch, log in steps]


def compare(base: str, seed: int) -> dict:
    """The three choices from one base and one seed: the logs of phase 2 by choice."""
    torch.set_num_threads(1)
    started, s, first = time.perf_counter(), toy.Settings(seed=seed), toy.load_model(base)
    inside = toy.means_inside(first, *toy.own_solutions(first, s))
    optimizer = adamw(first)
    steps_of(s, first, optimizer, 1, S_INTER, Policy(target_layer(inside["d_mlp"])))
    found = {}
    for choice in CHOICES:
        model = copy.deepcopy(first)
        own = adamw(model)
        if choice == "keep":
            own.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        found[choice] = steps_of(s, model, own, S_INTER + 1, STEPS, FULL, choice == "warm")
    return found | {"seconds": time.perf_counter() - started}


def table(lines: list[dict]) -> str:
    """By step and choice: mean reward with its standard deviation over pairs, and gradient norm."""
    rows = [f"{len(lines)} pairs of base and seed: reward (standard deviation), gradient norm"]
    for i in range(STEPS - S_INTER):
        cells = []
        for choice in CHOICES:
            reward, norm = (
                np.array([line[choice][i][name] for line in lines])
                for name in ("reward", "grad_norm")
            )
            spread = reward.std(ddof=1) if len(lines) > 1 else 0.0
            cells.append(f"{choice}: {reward.mean():.3f} ({spread:.3f}) {norm.mean():.2f}")
        rows.append(f"step {S_INTER + 1 + i:2d}   " + "   ".join(cells))
    return "\n".join(rows)


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit("usage: python experiments/switch.py BASE.pt [BASE.pt ...]")
    (ROOT / "out").mkdir(exist_ok=True)
    jobs = [({"base": b, "seed": seed}, compare, b, seed) for b in sys.argv[1:] for seed in SEEDS]
    print(table(run_missing(ROOT / "out" / "switch.jsonl", jobs)))
