"""Does bottom-up optimisation help on the toy task, and why? Six questions, paired runs, one result line a run.

    python experiments/study.py                # runs what is missing, two at a time: about two hours on two cores
    python experiments/study.py --report       # tables and figures from what is there
    python experiments/study.py --quick DIR    # the smallest form of it all, in a minute, into DIR

All arms of a pair start from one base model and meet the same problems in the same order; a pair is (base, seed).
Bases and seeds are used by nothing else in this repository, and what the arms are was settled on others (bases 0, 2,
4, 20 and 21; seeds 200 to 229). Stopping it at any time loses the two runs under way and nothing else.

Results are in experiments/results/study.jsonl, runs under a setting, an arm, a base and a seed:

    log     by step: reward, policy_entropy, length, KL of the base from pi_theta on the base's own solutions (nats a
            token), cpu seconds, whether in phase 1
    inside  at the start and every fifth step: cos(H^l, H^L) of all l, dH_Layer, entropy of the target layer, perplexity of the base's
            own solutions
    held    every tenth step: Avg@8 at n = 5 on 64 held-out problems
    probe   at steps 0, 20 and the last: share of next intermediate results that a linear probe reads from H^0..H^L
    final   train_toy.evaluate on 256 problems a tier;  pass64: Pass@8..64 on 32 problems a tier with 64 samples each
"""

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import analyze  # noqa: E402
import minibupo  # noqa: E402
import train_toy as toy  # noqa: E402
from minibupo import FULL, Policy  # noqa: E402

CPU = torch.device("cpu")
RULE = "rule"  # in place of a layer: the one that the paper's rule picks on the base


class Arm(NamedTuple):
    """What is compared: phases before pi_theta is optimised, each (layer, site, steps); a KL at which a phase ends early."""

    phases: tuple = ()
    advantage: str = "grpo"
    until_kl: float | None = None


def bupo(layer, steps, site="resid_post", **more):
    """The arm of one internal phase."""
    return Arm(((layer, site, steps),), **more)


SETTINGS = {  # what differs from train_toy's defaults
    "fresh": dict(questions=32, steps=60),
    "finite": dict(questions=32, steps=80, train_problems=96),
}
QK, NO_QK = (30, 31, 32), (33, 34, 35)  # seeds of the base models, with QK-norm (as in Qwen3) and without (as in Llama)
ARMS = {
    "GRPO": Arm(),
    "BuPO": bupo(RULE, 5),
    "BuPO, layer below": bupo("below", 5),
    **{f"s_inter {n}": bupo(RULE, n) for n in (2, 10, 20, 40, 60)},
    **{f"layer {l}": bupo(l, 10) for l in (1, 2, 3, 4, 5)},
    "attention": bupo(RULE, 10, "attn_out"),
    "FFN": bupo(RULE, 10, "mlp_out"),
    "RLOO": Arm(advantage="rloo"),
    "RLOO, BuPO": bupo(RULE, 5, advantage="rloo"),
    "Reinforce++": Arm(advantage="reinforce++"),
    "Reinforce++, BuPO": bupo(RULE, 5, advantage="reinforce++"),
    "until KL 0.02": bupo(RULE, 60, until_kl=0.02),
    "until KL 0.02, layer 3": bupo(3, 60, until_kl=0.02),
    "layers 2, 4": Arm(((2, "resid_post", 3), (4, "resid_post", 3))),
}


def plan() -> list[tuple]:
    """All runs (setting, arm, base, seed), in the order in which they are wanted."""
    first = [("fresh", arm, base, seed) for seed in range(300, 305) for base in QK for arm in ("GRPO", "BuPO", "BuPO, layer below")]
    pairs = [(base, seed) for seed in (300, 301) for base in QK]

    def with_arms(arms, pairs=pairs):
        return [("fresh", arm, *pair) for pair in pairs for arm in arms]

    finite = [("finite", *run[1:]) for run in first]
    layers = [f"layer {l}" for l in (1, 2, 3, 4, 5)]
    no_qk = with_arms(["GRPO", *layers], [(base, seed) for seed in (300, 301) for base in NO_QK])
    rest = [arm for arm in ARMS if arm not in ("GRPO", "BuPO", "BuPO, layer below")]
    by_question = [with_arms([arm for arm in rest if arm.startswith("s_inter")]), with_arms([*layers, "attention", "FFN"]),
                   with_arms([arm for arm in rest if arm.startswith("R")]),
                   with_arms([arm for arm in rest if arm.startswith(("until", "layers"))]), finite, no_qk]  # fmt: skip
    return first + [run for runs in by_question for run in runs]


# ---- one run -------------------------------------------------------------------------------------------------------


def base_path(out: Path, base: int) -> Path:
    return out / f"base{base}" / "base.pt"


def make_base(out: Path, base: int, quick: bool):
    """Pretrain a base model with train_toy.py, unless it is there."""
    if not base_path(out, base).exists():
        command = [sys.executable, ROOT / "train_toy.py", "--algo", "grpo", "--steps", "0", "--threads", "1", "--seed", str(base),
                   "--eval_problems", "256", "--qk_norm" if base in QK else "--no-qk_norm", "--out_dir", out / f"base{base}",
                   *(["--preset", "smoke", "--eval_problems", "32"] if quick else [])]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


@torch.no_grad()
def probe_accuracy(model, n: int) -> list[float]:
    """How much of the next intermediate result stands linearly in H^0..H^L: at each `=` of careful solutions, the share
    of results (of the operation to be done next) that a linear map from H^l and a bias, fitted by least squares to
    one-hot digits on 512 training problems, gives the highest score on 512 held-out ones."""
    features, digits = [], []
    for split in ("train", "eval"):
        tokens, _ = toy.worked_solutions(toy.draw_problems(toy.numpy_rng(0, toy.PROBE), 512, n, split))
        tokens = torch.tensor(tokens)
        at = tokens[:, :-1] == toy.EQUALS  # all behind which a line begins: a careful solution's last token is EOS
        stream = [trace.resid_post[at] for trace in model.trace(tokens[:, :-1])]
        stream = [model.embed(tokens[:, :-1])[at], *stream]
        features.append([F.pad(h, (0, 1), value=1.0).double() for h in stream])  # (M, d + 1)
        digits.append(tokens[:, 1:][at])
    right = []
    for train, held in zip(*features):
        map_ = torch.linalg.lstsq(train, F.one_hot(digits[0], 10).double(), driver="gelsd").solution
        right.append(float(((held @ map_).argmax(-1) == digits[1]).double().mean()))
    return right


def look(model, text, target: Policy) -> dict:
    """What is kept of a look at the internal policies."""
    found = toy.look_inside(model, *text)
    return {"cos": found["cos_final"], "d_layer": found["d_layer"][target.layer - 1], "perplexity": found["perplexity"],
            "entropy": found["layer"][target.layer]}  # fmt: skip


def run(setting: str, arm_name: str, base: int, seed: int, out: Path, quick: bool = False) -> dict:
    """Train one arm from one base with one seed; the result line."""
    torch.set_num_threads(1)
    arm, started = ARMS[arm_name], time.process_time()
    sizes = toy.read_settings(out / f"base{base}")
    s = toy.Settings(n=sizes.n, n_layer=sizes.n_layer, d_model=sizes.d_model, qk_norm=sizes.qk_norm, seed=seed,
                     advantage=arm.advantage, **SETTINGS[setting] | (dict(questions=8, steps=6) if quick else {}))  # fmt: skip
    model = toy.load_model(base_path(out, base), CPU, s.model_config().context_length)
    text = toy.make_probe(model, s, CPU)
    with torch.no_grad():
        base_logp = minibupo.policy_logits(model, text[0][:, :-1], FULL, text[1]).log_softmax(-1)
    ruled = minibupo.target_layer(toy.look_inside(model, *text)["d_mlp"])
    layers = {RULE: ruled, "below": max(1, ruled - 1)}
    phases = [(Policy(min(layers.get(layer, layer), s.n_layer), site), steps) for layer, site, steps in arm.phases]
    target = phases[-1][0] if phases else Policy(ruled)
    optimizer = toy.adamw(model, s.lr, s.weight_decay)
    log, inside, held, probe = [], {0: look(model, text, target)}, {}, {0: probe_accuracy(model, s.n)}
    done = 0  # steps of the phase under way
    for step in range(1, s.steps + 1):
        policy = phases[0][0] if phases else FULL
        cpu = time.process_time()
        record = toy.rl_step(s, model, optimizer, policy, target, step, CPU)
        cpu = time.process_time() - cpu
        with torch.no_grad():
            logp = minibupo.policy_logits(model, text[0][:, :-1], FULL, text[1]).log_softmax(-1)
            kl = float((base_logp.exp() * (base_logp - logp)).sum(-1).mean())
        log.append([record["reward"], record["policy_entropy"], record["length"], kl, cpu, policy != FULL])
        done += 1
        if phases and (done == phases[0][1] or (arm.until_kl is not None and kl > arm.until_kl)):
            phases, done = phases[1:], 0
            optimizer.state.clear()
        if step % 5 == 0:
            inside[step] = look(model, text, target)
        if step % 10 == 0:
            held[step] = toy.evaluate(model, s, [s.n], 64, CPU)[0][str(s.n)]["avg@8"]
        if step in (20, s.steps):
            probe[step] = probe_accuracy(model, s.n)
    final = toy.evaluate(model, s, s.tiers, 16 if quick else 256, CPU)[0]
    pass64 = {}
    if arm_name in ("GRPO", "BuPO"):
        for n in s.tiers:
            counts = analyze.sample_counts(model, s, n, 4 if quick else 32, 64)
            pass64[n] = [float(minibupo.pass_at_k(64, counts, k).mean()) for k in (8, 16, 32, 64)]
    return {"setting": setting, "arm": arm_name, "base": base, "seed": seed, "target": list(target), "steps": s.steps, "n": s.n,
            "log": rounded(log), "inside": rounded(inside), "held": rounded(held), "probe": rounded(probe), "final": rounded(final),
            "pass64": rounded(pass64), "cpu_seconds": round(time.process_time() - started, 1)}  # fmt: skip


def rounded(x):
    """Numbers in lists and dicts, to four digits behind the point, so that the results stay small."""
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    return [rounded(v) for v in x] if isinstance(x, list) else round(x, 4) if isinstance(x, float) else x


def run_missing(out: Path, results: Path, runs: list[tuple], quick: bool = False):
    """Make the bases, then every run that has no line in `results` yet; a line is appended as soon as its run is done."""
    there = {(r["setting"], r["arm"], r["base"], r["seed"]) for r in read(results)}
    missing = [one for one in runs if one not in there]
    with ProcessPoolExecutor(2) as pool:
        for job in [pool.submit(make_base, out, base, quick) for base in sorted({base for *_, base, _ in missing})]:
            job.result()
        for job in as_completed([pool.submit(run, *one, out, quick) for one in missing]):
            line = job.result()
            with open(results, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            accuracy = "  ".join(f"n = {n}: {tier['avg@8']:.3f}" for n, tier in line["final"].items())
            print(f"{line['setting']:7} {line['arm']:24} base {line['base']} seed {line['seed']}  {line['cpu_seconds']:4.0f} s  {accuracy}",
                  flush=True)  # fmt: skip


def read(results: Path) -> list[dict]:
    """The lines of a file of results; none if it is not there."""
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()] if results.exists() else []


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="The study of BuPO against GRPO on the toy task.")
    parser.add_argument("--quick", type=Path, metavar="DIR", help="a small model, few steps, one pair, into DIR")
    o = parser.parse_args()
    if o.quick:
        o.quick.mkdir(parents=True, exist_ok=True)
        results = o.quick / "study.jsonl"
        run_missing(o.quick, results, [one for one in plan() if one[2:] == (QK[0], 300)], quick=True)
    else:
        results = ROOT / "experiments" / "results" / "study.jsonl"
        run_missing(ROOT / "out" / "study", results, plan())
    return 0


if __name__ == "__main__":
    sys.exit(main())
