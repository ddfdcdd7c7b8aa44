"""What to do with AdamW's moments when BuPO goes over from phase 1 to phase 2.

    python experiments/switch.py BASE.pt [BASE.pt ...]      # about two minutes a base on two cores

The layers above the target take their first step at the switch, and AdamW's first step is of size lr for every weight
whatever the gradient says; E_u and the layers below carry the moments of another objective. So, from each base and
each of three seeds: five steps at the layer of the rule, then ten on pi_theta with the optimizer kept, made anew, or
made anew with its learning rate warmed up over five steps. Writes experiments/results/switch.jsonl and prints, by
step, the mean reward (with its standard deviation over the pairs of base and seed), clip fraction and gradient norm.
"""

import copy
import json
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import minibupo  # noqa: E402
import train_toy as toy  # noqa: E402

RESULTS = ROOT / "experiments" / "results" / "switch.jsonl"
S_INTER, STEPS, SEEDS, CPU = 5, 15, range(100, 103), torch.device("cpu")
CHOICES = ("keep", "new", "warm")


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


def compare(base: str, seed: int) -> list[dict]:
    """The three choices from one base and one seed: a result line each."""
    torch.set_num_threads(1)
    s = toy.Settings(seed=seed, lr=4e-4, n_layer=toy.load_model(base).cfg.n_layer)
    start = after_phase_1(base, s)
    name = Path(base).parent.name
    return [{"base": name, "seed": seed, "choice": choice, "steps": phase_2(choice, *start, s)} for choice in CHOICES]


def table(lines: list[dict]) -> str:
    """By step: the mean reward with its standard deviation over pairs, clip fraction and gradient norm of each choice."""
    rows = [f"{len(lines) // len(CHOICES)} pairs of base and seed: reward (std), clip fraction, gradient norm"]
    for i in range(STEPS - S_INTER):
        cells = []
        for choice in CHOICES:
            logs = [line["steps"][i] for line in lines if line["choice"] == choice]
            reward, clip, norm = (np.array([log[k] for log in logs]) for k in ("reward", "clip_fraction", "grad_norm"))
            cells.append(f"{choice}: {reward.mean():.3f} ({reward.std(ddof=1):.3f}) {clip.mean():.4f} {norm.mean():.2f}")
        rows.append(f"step {S_INTER + 1 + i:2d}   " + "   ".join(cells))
    return "\n".join(rows)


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit("usage: python experiments/switch.py BASE.pt [BASE.pt ...]")
    lines = []
    with ProcessPoolExecutor(2) as pool, open(RESULTS, "w", encoding="utf-8") as file:
        for job in as_completed([pool.submit(compare, base, seed) for base in sys.argv[1:] for seed in SEEDS]):
            lines += job.result()
            file.writelines(json.dumps(line) + "\n" for line in job.result())
            file.flush()
    print(table(lines))
