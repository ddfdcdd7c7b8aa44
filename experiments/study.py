"""Does bottom-up optimisation help on the toy task, and why? Six questions, paired runs, one result line a run.

    1  GRPO against BuPO                4  feature refinement: is it more than a cosine?
    2  how long a phase 1               5  RLOO's and Reinforce++'s advantages
    3  at which layer or module         6  a rule that ends phase 1; a schedule through several layers

    python experiments/study.py                # runs what is missing, two at a time: about two hours on two cores
    python experiments/study.py --report       # tables and figures from what is there
    python experiments/study.py --quick DIR    # the smallest form of it, in half a minute, into DIR

All arms of a pair start from one base model and meet the same problems in the same order; a pair is (base, seed).
Bases and seeds are used by nothing else in this repository, and what the arms are was settled on others (bases 0, 2,
4, 20 and 21; seeds 200 to 229). Stopping it at any time loses the two runs under way and nothing else.

The primary measure is the area under the curve of held-out accuracy, the primary contrast BuPO - GRPO of question 1;
the rest is there to explain it. Intervals are 95 % t-intervals over pairs, so they hold for these three bases with
seeds as replicates (question 1 has the interval over the bases' means beside it), and are not corrected for how many
there are: of twenty arms that do nothing one is expected off zero.

Results are in experiments/results/study.jsonl, runs under a setting, an arm, a base and a seed:

    log     by step: reward, policy_entropy, length, KL of the base from pi_theta on the base's own solutions (nats a
            token), cpu seconds, whether in phase 1
    inside  at the start and every fifth step: cos(H^l, H^L) of all l, dH_Layer, entropy of the target layer, perplexity
            of the base's own solutions
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

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import analyze  # noqa: E402
import minibupo  # noqa: E402
import train_toy as toy  # noqa: E402
from analyze import plt  # noqa: E402
from minibupo import FULL, Policy  # noqa: E402

CPU = torch.device("cpu")
RULE = "rule"  # in place of a layer: the one that the paper's rule picks on the base; None is pi_theta


class Arm(NamedTuple):
    """What is compared: phases before pi_theta is optimised, each (layer, site, steps); a KL at which a phase ends early."""

    phases: tuple = ()
    advantage: str = "grpo"
    until_kl: float | None = None


def bupo(layer, steps, site="resid_post", **more):
    """The arm of one internal phase."""
    return Arm(((layer, site, steps),), **more)


SETTINGS = {  # what differs from train_toy's defaults
    "fresh": dict(questions=32, steps=60, lr=4e-4),
    "finite": dict(questions=32, steps=60, lr=4e-4, train_problems=96),
}
QK, NO_QK = (30, 31, 32), (33, 34, 35)  # seeds of the base models, with QK-norm (as in Qwen3) and without (as in Llama)
ARMS = {
    "GRPO": Arm(),
    "BuPO": bupo(RULE, 5),
    "GRPO, new moments": bupo(None, 5),  # a control: the optimizer made anew after step 5, and nothing else
    "BuPO, layer below": bupo("below", 5),
    **{f"s_inter {n}": bupo(RULE, n) for n in (2, 10, 20, 60)},
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

    finite = [("finite", arm, base, seed) for _, arm, base, seed in first if arm != "BuPO, layer below"]
    layers = [f"layer {l}" for l in (1, 2, 3, 4, 5)]
    no_qk = with_arms(["GRPO", *layers], [(base, seed) for seed in (300, 301) for base in NO_QK])
    rest = [arm for arm in ARMS if arm not in ("GRPO", "BuPO", "BuPO, layer below")]
    by_question = [with_arms([arm for arm in rest if arm.startswith("s_inter")]), with_arms([*layers, "attention", "FFN"]),
                   with_arms([arm for arm in rest if arm.startswith(("R", "GRPO, new"))]),
                   with_arms([arm for arm in rest if arm.startswith(("until", "layers"))]), finite, no_qk]  # fmt: skip
    return first + [run for runs in by_question for run in runs]


# ---- one run -------------------------------------------------------------------------------------------------------


def base_path(out: Path, base: int) -> Path:
    """Where the base model of a seed is."""
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


def kept(found: dict, target: Policy) -> dict:
    """What is kept of a look at the internal policies, as toy.look_inside gives it."""
    return {"cos": found["cos_final"], "d_layer": found["d_layer"][target.layer - 1], "perplexity": found["perplexity"],
            "entropy": found["layer"][target.layer]}  # fmt: skip


@torch.no_grad()
def full_policy(model, tokens, mask):
    """log pi_theta over the vocabulary (M, V) at the response positions of a text."""
    return minibupo.policy_logits(model, tokens[:, :-1], FULL, mask).log_softmax(-1)


def run(setting: str, arm_name: str, base: int, seed: int, out: Path, quick: bool = False) -> dict:
    """Train one arm from one base with one seed; the result line."""
    torch.set_num_threads(1)
    arm, started = ARMS[arm_name], time.process_time()
    sizes = toy.read_settings(out / f"base{base}")
    s = toy.Settings(n=sizes.n, n_layer=sizes.n_layer, d_model=sizes.d_model, qk_norm=sizes.qk_norm, seed=seed,
                     advantage=arm.advantage, **SETTINGS[setting] | (dict(questions=8, steps=6) if quick else {}))  # fmt: skip
    model = toy.load_model(base_path(out, base), CPU, s.model_config().context_length)
    text = toy.make_probe(model, s, CPU)
    base_logp, at_base = full_policy(model, *text), toy.look_inside(model, *text)
    ruled = minibupo.target_layer(at_base["d_mlp"])
    layers = {RULE: ruled, "below": max(1, ruled - 1)}
    phases = [(Policy(min(layers.get(layer, layer), s.n_layer), site) if layer else FULL, steps) for layer, site, steps in arm.phases]
    target = phases[-1][0] if phases and phases[-1][0] != FULL else Policy(ruled)
    optimizer = toy.adamw(model, s.lr, s.weight_decay)
    log, inside, held, probe = [], {0: kept(at_base, target)}, {}, {0: probe_accuracy(model, s.n)}
    done = 0  # steps of the phase under way
    for step in range(1, s.steps + 1):
        policy = phases[0][0] if phases else FULL
        cpu = time.process_time()
        record = toy.rl_step(s, model, optimizer, policy, target, step, CPU)
        cpu = time.process_time() - cpu
        kl = float((base_logp.exp() * (base_logp - full_policy(model, *text))).sum(-1).mean())
        log.append([record["reward"], record["policy_entropy"], record["length"], kl, cpu, policy != FULL])
        done += 1
        if phases and (done == phases[0][1] or (arm.until_kl is not None and kl > arm.until_kl)):
            phases, done = phases[1:], 0
            optimizer.state.clear()
        if step % 5 == 0:
            inside[step] = kept(toy.look_inside(model, *text), target)
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
        try:
            for job in [pool.submit(make_base, out, base, quick) for base in sorted({base for *_, base, _ in missing})]:
                job.result()
            for job in as_completed([pool.submit(run, *one, out, quick) for one in missing]):
                line = job.result()
                with open(results, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                accuracy = "  ".join(f"n = {n}: {tier['avg@8']:.3f}" for n, tier in line["final"].items())
                who = f"{line['setting']:7} {line['arm']:24} base {line['base']} seed {line['seed']}"
                print(f"{who}  {line['cpu_seconds']:4.0f} s  {accuracy}", flush=True)
        except BaseException:  # Ctrl-C, or a run that failed: the others under way end, those that wait do not begin
            pool.shutdown(cancel_futures=True)
            raise


def read(results: Path) -> list[dict]:
    """The lines of a file of results; none if it is not there."""
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()] if results.exists() else []


# ---- report --------------------------------------------------------------------------------------------------------


def area(line) -> float:
    """The area under the curve of held-out accuracy: its mean over the evaluations on the way."""
    return float(np.mean(list(line["held"].values()))) if line["held"] else float("nan")


def reward_by_cpu(line, seconds: float) -> float:
    """Mean training reward over the first `seconds` of a run's RL: what arms that cost the same are compared by."""
    reward, cpu = (np.array([step[i] for step in line["log"]]) for i in (0, 4))
    return float((reward * np.diff(np.minimum(np.cumsum(cpu), seconds), prepend=0)).sum() / min(seconds, cpu.sum()))


def tier(n: int, key: str):
    """Reads a measure of tier n (relative to the longest trained one: 0, or 1 for the unseen one) in the final evaluation."""
    return lambda line: line["final"].get(str(line["n"] + n), {}).get(key, float("nan"))


MEASURES = {  # in points (hundredths), the larger the better
    "Avg@8": tier(0, "avg@8"), "Pass@8": tier(0, "pass@8"), "Avg@8, unseen": tier(1, "avg@8"), "Pass@8, unseen": tier(1, "pass@8"),
    "area": area,
}  # fmt: skip


def pairs_of(lines, setting, arm, control, bases):
    """(run of the arm, run of the control) for each base and seed that has both."""
    by = {(r["setting"], r["arm"], r["base"], r["seed"]): r for r in lines}
    return [(r, by[key]) for (of, name, base, seed), r in sorted(by.items(), key=str)
            if of == setting and name == arm and base in bases and (key := (setting, control, base, seed)) in by]  # fmt: skip


def shown(values) -> str:
    """Mean and half the width of the 95 % t-interval, in points; in bold where the interval is off zero."""
    mean, half = analyze.mean_interval(100 * np.asarray(values))
    text = f"{mean:+.1f}" + ("" if half is None else f" ± {half:.1f}")
    return f"**{text}**" if half is not None and abs(mean) > half else text


def comparison(lines, setting, arms, bases=QK, control="GRPO") -> str:
    """A Markdown table of arms: mean of Avg@8 (and of the control's on the same pairs), and paired differences from it."""
    columns = [f"{setting}: arm", "pairs", "phase 1", "Avg@8 (control)", *(f"Δ {name}" for name in MEASURES), "Δ reward, equal CPU"]
    rows = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for arm in (control, *arms):
        pairs = pairs_of(lines, setting, arm, control, bases)
        if not pairs:
            continue
        inner = [sum(step[5] for step in r["log"]) for r, _ in pairs]
        cells = [shown([read(r) - read(c) for r, c in pairs]) for read in MEASURES.values()]
        budget = [min(sum(step[4] for step in r["log"]) for r in pair) for pair in pairs]
        cells.append(shown([reward_by_cpu(r, b) - reward_by_cpu(c, b) for (r, c), b in zip(pairs, budget)]))
        steps = f"{min(inner)}" if min(inner) == max(inner) else f"{min(inner)}..{max(inner)}"
        level, its = (100 * np.mean([MEASURES["Avg@8"](pair[side]) for pair in pairs]) for side in (0, 1))
        differences = " | ".join(cells) if arm != control else "| " * len(MEASURES)
        rows.append(f"| {arm} | {len(pairs)} | {steps} | {level:.1f} ({its:.1f}) | {differences} |")
    return "\n".join(rows)


def on_the_way(lines, setting) -> str:
    """GRPO against BuPO at several step counts, in policy entropy, and in Pass@K with 64 samples."""
    pairs = pairs_of(lines, setting, "BuPO", "GRPO", QK)
    if not pairs or not pairs[0][0]["held"]:
        return "no pairs yet"
    at = [f"step {step}: {shown([r['held'][step] - c['held'][step] for r, c in pairs])}" for step in pairs[0][0]["held"]]
    entropy = [np.mean([r["log"][step - 1][1] - c["log"][step - 1][1] for r, c in pairs]) for step in (5, 10, 20)]
    kl = [np.mean([pair[side]["log"][4][3] for pair in pairs]) for side in (0, 1)]
    rows = [f"BuPO - GRPO, held-out Avg@8 at n = 5 (64 problems), {len(pairs)} pairs. " + ", ".join(at) + ".",
            "Policy entropy (nats) after 5, 10, 20 steps: " + ", ".join(f"{e:+.3f}" for e in entropy) + ".",
            f"KL from the base after 5 steps: {kl[0]:.3f}, GRPO {kl[1]:.3f} nats a token.", ""]  # fmt: skip
    rows += [f"| {setting}: Pass@K | " + " | ".join(f"K = {k}" for k in (8, 16, 32, 64)) + " |", "|" + "---|" * 5]
    for n in pairs[0][0]["pass64"]:
        of, base = (np.array([pair[side]["pass64"][n] for pair in pairs]) for side in (0, 1))  # (pairs, 4)
        cells = [f"{100 * base[:, i].mean():.1f}, {shown(of[:, i] - base[:, i])}" for i in range(4)]
        rows.append(f"| n = {n}: GRPO, BuPO - GRPO | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def every_pair(lines, setting) -> str:
    """The differences of each pair in Avg@8 at the longest trained tier and in area, a row a base; and over the bases."""
    rows, areas = [f"| {setting}: BuPO - GRPO | target | Avg@8 by seed, in points | area by seed |", "|---|---|---|---|"], []
    for base in QK:
        pairs = pairs_of(lines, setting, "BuPO", "GRPO", [base])
        if pairs:
            found = [[100 * (read(r) - read(c)) for r, c in pairs] for read in (MEASURES["Avg@8"], area)]
            cells = " | ".join(" ".join(f"{d:+.1f}" for d in of) for of in found)
            rows.append(f"| base {base} | layer {pairs[0][0]['target'][0]} | {cells} |")
            areas.append(np.mean(found[1]) / 100)
    return "\n".join([*rows, "", f"Area, mean and interval over the {len(areas)} bases' means: {shown(areas)}." if areas else ""])


def when_phase_1_ends(lines) -> str:
    """By s_inter: KL from the base, perplexity of the base's solutions, entropies and reward in the last step of phase 1; and
    the paired difference in area if phase 1 cost nothing, the arm's step s_inter + t against GRPO's step t."""
    names = ("s_inter", "KL (nats)", "perplexity, base -> end of phase 1", "target layer's entropy", "reward", "dH_Layer",
             "Δ area, phase 1 for free")  # fmt: skip
    rows = ["| " + " | ".join(names) + " |", "|" + "---|" * 7]
    for arm in ("BuPO", "s_inter 10", "s_inter 20", "s_inter 60"):
        pairs = pairs_of(lines, "fresh", arm, "GRPO", QK)
        runs = [r for r, _ in pairs]
        s = sum(step[5] for step in runs[0]["log"]) if runs else 0
        if s % 5 or not s or str(s) not in runs[0]["inside"]:
            continue

        def change(key, runs=runs, s=s):
            return " -> ".join(f"{np.mean([r['inside'][str(step)][key] for r in runs]):.2f}" for step in (0, s))

        kl, reward = (np.mean([r["log"][s - 1][i] for r in runs]) for i in (3, 0))
        ahead = [[r["held"][str(t + s)] - c["held"][str(t)] for t in range(10, 61 - s, 10)] for r, c in pairs] if s in (10, 20) else []
        free = shown(np.mean(ahead, axis=1)) if ahead else ""
        rows.append(f"| {s} | {kl:.3f} | {change('perplexity')} | {change('entropy')} | {reward:.2f} | {change('d_layer')} | {free} |")
    return "\n".join(rows)


def layer_choice(lines, bases) -> str:
    """For each base: the layer of the rule, and the differences of each layer from GRPO in area, seed by seed."""
    rows = ["| base | rule | Δ area (s_inter 10), in points: " + " | ".join(f"layer {l}" for l in (1, 2, 3, 4, 5)) + " |", "|" + "---|" * 7]
    for base in bases:
        by_layer = [pairs_of(lines, "fresh", f"layer {l}", "GRPO", [base]) for l in (1, 2, 3, 4, 5)]
        if all(by_layer):
            rule = pairs_of(lines, "fresh", "GRPO", "GRPO", [base])[0][0]["target"][0]
            cells = [" ".join(f"{100 * (area(r) - area(c)):+.1f}" for r, c in pairs) for pairs in by_layer]
            rows.append(f"| {base} | {rule} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def refinement(lines) -> str:
    """Cosine of the target layer to the top, and what a linear probe reads, under InterGRPO alone against GRPO."""
    pairs = pairs_of(lines, "fresh", "s_inter 60", "GRPO", QK)
    if not pairs or "20" not in pairs[0][0]["probe"]:
        return "no pairs yet"
    rows = [f"InterGRPO alone (s_inter 60) and GRPO, {len(pairs)} pairs, means.", "",
            "| step | cos(H^t, H^L): InterGRPO | GRPO | difference, in hundredths |", "|---|---|---|---|"]  # fmt: skip
    for step in ("0", "5", "10", "20", "40", "60"):
        inner, full = ([r["inside"][step]["cos"][r["target"][0]] for r in side] for side in zip(*pairs))
        rows.append(f"| {step} | {np.mean(inner):.3f} | {np.mean(full):.3f} | {shown(np.subtract(inner, full))} |")
    rows += ["", "| probe (%) | " + " | ".join("emb." if l == 0 else f"H^{l}" for l in range(7)) + " |", "|" + "---|" * 8]
    for name, side, step in (("base", 0, "0"), ("InterGRPO, 20 steps", 0, "20"), ("InterGRPO, 60 steps", 0, "60"),
                             ("GRPO, 20 steps", 1, "20"), ("GRPO, 60 steps", 1, "60")):  # fmt: skip
        mean = np.mean([pair[side]["probe"][step] for pair in pairs], axis=0)
        rows.append(f"| {name} | " + " | ".join(f"{100 * x:.1f}" for x in mean) + " |")
    for name, side in (("InterGRPO, 20 steps - base", 0), ("GRPO, 20 steps - base", 1)):
        gains = np.array([np.subtract(pair[side]["probe"]["20"], pair[side]["probe"]["0"]) for pair in pairs])
        rows.append(f"| {name} | " + " | ".join(shown(column) for column in gains.T) + " |")
    return "\n".join(rows)


def report(lines) -> str:
    """All tables, by question."""
    names = list(ARMS)
    first, layers = ["BuPO", "BuPO, layer below", "GRPO, new moments"], [f"layer {l}" for l in (1, 2, 3, 4, 5)]

    def starting(*words):
        return [name for name in names if name.startswith(words)]

    parts = ["## 1. GRPO against BuPO"]
    for setting in SETTINGS:
        parts += [comparison(lines, setting, first), on_the_way(lines, setting), every_pair(lines, setting)]
    parts += ["## 2. How long", comparison(lines, "fresh", ["s_inter 2", "BuPO", *starting("s_inter")[1:]]), when_phase_1_ends(lines),
              "## 3. Which layer", comparison(lines, "fresh", [*layers, "s_inter 10", "attention", "FFN"]), layer_choice(lines, QK),
              "Without QK-norm:", comparison(lines, "fresh", layers, NO_QK), layer_choice(lines, NO_QK),
              "## 4. Feature refinement", refinement(lines),
              "## 5. Other advantages", comparison(lines, "fresh", starting("R")),
              comparison(lines, "fresh", ["RLOO, BuPO"], control="RLOO"),
              comparison(lines, "fresh", ["Reinforce++, BuPO"], control="Reinforce++"),
              "## 6. Beyond the paper", comparison(lines, "fresh", ["BuPO", *starting("until", "layers")])]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def draw_effects(lines):
    """Left: held-out accuracy as training goes on, by s_inter, mean and one standard deviation over the pairs that all of
    them have. Right: paired differences from GRPO, arm by arm."""
    figure, (ax, right) = plt.subplots(1, 2, figsize=(analyze.WIDTH, 4.4), width_ratios=(1, 1.1))
    for colour, arm in zip(analyze.COLOURS, ("GRPO", "BuPO", "s_inter 10", "s_inter 20", "s_inter 60")):
        name = {"BuPO": "BuPO, s_inter 5", "s_inter 60": "s_inter 60: InterGRPO alone"}.get(arm, arm)
        runs = [r for r, _ in pairs_of(lines, "fresh", arm, "GRPO", QK) if r["seed"] in (300, 301)]
        if runs and runs[0]["held"]:
            steps = [int(step) for step in runs[0]["held"]]
            curves = 100 * np.array([list(r["held"].values()) for r in runs])  # (runs, evaluations)
            ax.plot(steps, curves.mean(0), "o-", color=colour, label=name)
            error = curves.std(0, ddof=1) if len(runs) > 1 else 0 * curves[0]
            ax.fill_between(steps, curves.mean(0) - error, curves.mean(0) + error, color=colour, alpha=0.15, linewidth=0)
    ax.set_xlabel("step")
    ax.set_title("held-out Avg@8 at n = 5 (%), mean and std of 6 runs")
    ax.legend(loc="lower right")
    arms = [arm for arm in ARMS if arm != "GRPO" and len(pairs_of(lines, "fresh", arm, "GRPO", QK)) > 1]
    for y, arm in enumerate(reversed(arms)):
        pairs = pairs_of(lines, "fresh", arm, "GRPO", QK)
        for offset, colour, read in ((0.15, analyze.BLUE, area), (-0.15, analyze.ORANGE, MEASURES["Avg@8"])):
            mean, half = analyze.mean_interval([100 * (read(r) - read(c)) for r, c in pairs])
            right.errorbar(mean, y + offset, xerr=half, fmt="o", color=colour, capsize=2, elinewidth=0.8)
    right.axvline(0, color="black", linewidth=0.6)
    right.set_yticks(range(len(arms)), list(reversed(arms)))
    right.set_xscale("symlog", linthresh=5)
    ticks = (-80, -40, -20, -10, -5, -2, 0, 2, 5)
    right.set_xticks(ticks, [str(tick) for tick in ticks])
    right.set_xlabel("arm - GRPO, paired: points, 95 % interval")
    lines_ = [plt.Line2D([], [], marker="o", linestyle="", color=c) for c in (analyze.BLUE, analyze.ORANGE)]
    right.legend(lines_, ["area under the curve", "Avg@8 at the end"], ncols=2, loc="lower center", bbox_to_anchor=(0.4, 1))
    return figure


def draw_refinement(lines):
    """InterGRPO alone against GRPO: cosine of the target layer to the top and perplexity of the base's solutions (mean, least
    and largest run), and what a linear probe reads of the next intermediate result, layer by layer (95 % interval)."""
    figure, axes = plt.subplots(1, 3, figsize=(analyze.WIDTH, 2.5))
    pairs = pairs_of(lines, "fresh", "s_inter 60", "GRPO", QK)
    for side, name, colour in ((0, "InterGRPO alone", analyze.BLUE), (1, "GRPO", analyze.ORANGE)):
        steps = list(pairs[0][side]["inside"])
        runs = [pair[side] for pair in pairs]
        cosine = np.array([[r["inside"][step]["cos"][r["target"][0]] for step in steps] for r in runs])
        perplexity = np.array([[r["inside"][step]["perplexity"] for step in steps] for r in runs])
        for ax, values in zip(axes, (cosine, perplexity)):
            ax.plot([int(step) for step in steps], values.mean(0), color=colour, label=name)
            ax.fill_between([int(step) for step in steps], values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
        gain = 100 * np.array([np.subtract(r["probe"]["20"], r["probe"]["0"]) for r in runs])  # (pairs, L+1)
        half = [analyze.mean_interval(column)[1] or 0 for column in gain.T]
        axes[2].errorbar(np.arange(gain.shape[1]) + (side - 0.5) / 5, gain.mean(0), half, fmt="o", color=colour, capsize=2, elinewidth=0.8)
    titles = ("cos($H^l$, $H^L$), target layer", "perplexity of base solutions", "probe: 20 steps - base (points)")
    for ax, title in zip(axes, titles):
        ax.set_title(title)
        ax.set_xlabel("step")
    axes[2].axhline(0, color="black", linewidth=0.6)
    analyze.layer_axis(axes[2], len(pairs[0][0]["probe"]["0"]) - 1, 0)
    axes[0].legend(loc="best")
    return figure


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="The study of BuPO against GRPO on the toy task.")
    parser.add_argument("--quick", type=Path, metavar="DIR", help="a small model, few steps, five arms, into DIR")
    parser.add_argument("--report", action="store_true", help="only make the report from the results that are there")
    o = parser.parse_args()
    folder = o.quick or ROOT / "experiments" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    if not o.report:
        quick = [(setting, arm, QK[0], 300) for setting in SETTINGS for arm in ("GRPO", "BuPO", "until KL 0.02", "layers 2, 4", "FFN")]
        runs = quick if o.quick else plan()
        run_missing(o.quick or ROOT / "out" / "study", folder / "study.jsonl", runs, quick=bool(o.quick))
    lines = read(folder / "study.jsonl")
    (folder / "study.md").write_text(report(lines), encoding="utf-8")
    print(report(lines))
    with plt.rc_context(analyze.STYLE):
        out = analyze.Output(o.quick or ROOT / "experiments" / "figures")
        out.figure("study_effects", draw_effects(lines))
        if pairs_of(lines, "fresh", "s_inter 60", "GRPO", QK):
            out.figure("study_refinement", draw_refinement(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
