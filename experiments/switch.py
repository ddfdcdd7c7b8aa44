"""What to do with AdamW's moments when BuPO goes over from phase 1 to phase 2.

    python experiments/switch.py BASE.pt [BASE.pt ...]      # about a minute and a half a base on two cores

The layers above the target take their first step at the switch, and AdamW's first step is of size lr for every weight
whatever the gradient says; E_u and the layers below carry the moments of another objective. So, from each base and
each of three seeds: five steps at the layer of the rule, then ten on pi_theta with the optimizer kept, made anew, or
made anew with its learning rate warmed up over five steps. Writes experiments/results/switch.jsonl and prints, by
step, the mean reward (with its standard deviation over the pairs of base and seed), clip fraction and gradient norm.
"""

import copy
import json
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import minibupo  # noqa: E402
import train_toy as toy  # noqa: E402

RESULTS = ROOT / "experiments" / "results" / "switch.jsonl"
S_INTER, STEPS, SEEDS, CPU = 5, 15, range(100, 103), torch.device("cpu")


def after_phase_1(base: str, s: toy.Settings):
    """Model, optimizer and target layer behind S_INTER steps of phase 1."""
    model = toy.load_model(base)
    target = minibupo.Policy(minibupo.target_layer(toy.look_inside(model, *toy.make_probe(model, s, CPU))["d_mlp"]))
    optimizer = toy.adamw(model, s.lr, s.weight_decay)
    for step in range(1, S_INTER + 1):
        toy.rl_step(s, model, optimizer, target, target, step, CPU)
    return model, optimizer, target


def phase_2(choice: str, model, optimizer, target, s: toy.Settings) -> list[dict]:
    """The logs of steps S_INTER+1..STEPS on pi_theta, on copies of model and optimizer."""
    model, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    optimizer = toy.adamw(model, s.lr, s.weight_decay)
    if choice == "keep":
        optimizer.load_state_dict(state)
    logs = []
    for step in range(S_INTER + 1, STEPS + 1):
        for group in optimizer.param_groups:
            group["lr"] = s.lr * (min(1.0, (step - S_INTER) / 5) if choice == "warm" else 1.0)
        logs.append(toy.rl_step(s, model, optimizer, minibupo.FULL, target, step, CPU))
    return logs


def main(bases: list[str]):
    torch.set_num_threads(2)
    logs = {"keep": [], "new": [], "warm": []}  # each (pairs, steps)
    with open(RESULTS, "w", encoding="utf-8") as file:
        for base in bases:
            for seed in SEEDS:
                s = toy.Settings(seed=seed, n_layer=toy.load_model(base).cfg.n_layer)
                start = after_phase_1(base, s)
                for choice in logs:
                    logs[choice].append(phase_2(choice, *start, s))
                    line = {"base": Path(base).parent.name, "seed": seed, "choice": choice, "steps": logs[choice][-1]}
                    file.write(json.dumps(line) + "\n")
    print(f"{len(logs['keep'])} pairs of base and seed; reward (std), clip fraction, gradient norm")
    for i in range(STEPS - S_INTER):
        cells = []
        for runs in logs.values():
            reward, clip, norm = (np.array([run[i][k] for run in runs]) for k in ("reward", "clip_fraction", "grad_norm"))
            cells.append(f"{reward.mean():.3f} ({reward.std(ddof=1):.3f}) {clip.mean():.4f} {norm.mean():.2f}")
        print(f"step {S_INTER + 1 + i:2d}   " + "   ".join(f"{name}: {cell}" for name, cell in zip(logs, cells)))


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit("usage: python experiments/switch.py BASE.pt [BASE.pt ...]")
    main(sys.argv[1:])
