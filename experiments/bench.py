"""How fast is it? Against TRL, against the machine, against itself at other sizes.

    python experiments/bench.py                      # all sections but `run`; writes experiments/results/bench.json and .md
    python experiments/bench.py limit phase1         # these alone; what the file has of the others stays
    python experiments/bench.py run --base FILE      # a whole training run beside TRL's, from a base.pt
    python experiments/bench.py --quick              # tiny sizes, in seconds: that it runs, not how fast; writes nothing

    rl_step   one step of RL in which every row has an advantage, against TRL's GRPOTrainer (set up in trl_peer.py)
    run       the same until a given accuracy
    limit     FLOPs of the matrix products over the machine's own GEMM rate, as a share of the time taken
    phase1    update of an internal policy over an update of the whole: time and memory by layer
    scaling   sampling and update against batch, response length, layers and width
    entropy   internal_entropies against forward hooks that keep everything
    profile   where the time goes, by operation

What is compared runs in turns in one process, on --threads threads; times are medians of --rounds, after one round that
does not count. Weights are random, and the learning rate is 1e-9, so that each round does the same work.
"""

import argparse
import copy
import json
import os
import platform
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import minibupo  # noqa: E402
import train_toy as toy  # noqa: E402
from minibupo import FULL, Policy, Rollouts  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

RESULTS = ROOT / "experiments" / "results" / "bench.json"
CPU = torch.device("cpu")
STILL = 1e-9  # a learning rate at which nothing moves


# ---- measuring -------------------------------------------------------------------------------------------------


def seconds(f) -> float:
    """Wall-clock time of one call."""
    started = time.perf_counter()
    f()
    return time.perf_counter() - started


def in_turns(rounds: int, calls: dict) -> dict:
    """Seconds of each call, `rounds` of them, one after the other in each round; the first round is not counted."""
    times = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            times[name].append(seconds(call))
    return {name: np.array(t[1:]) for name, t in times.items()}


def ratio_of(slow, fast) -> dict:
    """How many times as long `slow` takes as `fast` (seconds by round): the ratio of the medians, and the lowest and
    highest ratio of a single round."""
    each = np.array(slow) / np.array(fast)
    return {"ratio": float(np.median(slow) / np.median(fast)), "lowest": float(each.min()), "highest": float(each.max())}


def peak_memory(f) -> int:
    """Bytes by which a call's tensors exceed, at their peak, what was there before it: the running sum of all that torch's
    allocator gave and took, as its profiler records it. Unlike the process' resident memory it does not depend on what
    ran before, on the allocator's caches or on when the system takes pages back; libraries' own buffers are not in it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        f()
    events = [e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return int(np.cumsum(sizes).max(initial=0))


def gemm_rate(m: int, k: int, n: int, tries: int = 5) -> float:
    """FLOP/s of the best of several float32 products (m, k) x (k, n), each repeated for at least 50 ms."""
    a, b, out = torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)
    repeats = 1 + int(0.05 / min(seconds(lambda: torch.mm(a, b, out=out)) for _ in range(3)))
    best = min(seconds(lambda: [torch.mm(a, b, out=out) for _ in range(repeats)]) for _ in range(tries))
    return 2 * m * k * n * repeats / best


def exponents(x, y) -> tuple[float, float]:
    """The a of y ~ x^a: by least squares on logarithms over all points, and between the last two."""
    x, y = np.log(x), np.log(y)
    return float(np.polyfit(x, y, 1)[0]), float((y[-1] - y[-2]) / (x[-1] - x[-2]))


def machine() -> dict:
    """What the numbers were measured on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": names[0] if names else platform.processor(), "cores": cores, "threads": torch.get_num_threads(),
            "torch": torch.__version__, "python": platform.python_version()}  # fmt: skip


def show(value) -> str:
    """A cell of a table: numbers to three significant digits."""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def table(rows: list[dict]) -> str:
    """A Markdown table of dicts with the same keys."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([show(v) for v in row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def section(result: dict) -> str:
    """A section's table, and what it was measured on."""
    return table(result["rows"]) + "\n\n" + ", ".join(f"{k} {v}" for k, v in result["machine"].items())


# ---- the models and what they are made to do -------------------------------------------------------------------


def toys(o) -> dict[str, toy.Settings]:
    """The default toy model and one with eight times the parameters, 256 rollouts a step in 4 mini-batches of 64 rows, of
    which an update takes 32 at a time."""
    if o.quick:
        return {"tiny": toy.Settings(n=3, n_layer=2, d_model=32, questions=4, group=4, minibatches=2)}
    shape = dict(questions=32, chunk=32)
    return {"default": toy.Settings(**shape), "8 x": toy.Settings(n_layer=12, d_model=128, n_head=4, **shape)}


def random_model(config: GPTConfig) -> GPT:
    """A model with random weights, the same ones each time."""
    torch.manual_seed(0)
    return GPT(config)


def sample(s: toy.Settings, model: GPT, step: int = 1):
    """The rollouts of a step, as rl_step samples them."""
    questions, prompt_len, _ = (torch.tensor(a) for a in toy.training_problems(s, step))
    return model.generate(questions, s.response_limit, prompt_len=prompt_len, num_samples=s.group, eos_id=toy.EOS, pad_id=toy.PAD,
                          generator=torch.Generator().manual_seed(step))  # fmt: skip


def unequal(sampled, group: int) -> Rollouts:
    """Rollouts with rewards 0, 1, .. in each group of an even size, so that every row has an advantage."""
    rewards = torch.arange(float(group)).repeat(len(sampled.end) // group, 1)
    return Rollouts(sampled.tokens, sampled.prompt_len, sampled.end, sampled.logprobs, rewards)


def under(model, rollouts: Rollouts, policy: Policy) -> Rollouts:
    """The same rollouts with the log-probabilities of an internal policy."""
    mask = minibupo.response_mask(rollouts.prompt_len, rollouts.end, rollouts.tokens.shape[1])
    with torch.no_grad():
        return rollouts._replace(logprobs=minibupo.token_logprobs(model, rollouts.tokens, mask, policy))


def updater(model, rollouts: Rollouts, policy: Policy = FULL, minibatches: int = 4, chunk: int = 64):
    """A call that makes one minibupo.update of a copy of the model, and leaves no gradients behind."""
    model = copy.deepcopy(model)
    optimizer = toy.adamw(model, STILL, 0.01)

    def call():
        minibupo.update(model, optimizer, rollouts, policy, minibatches=minibatches, chunk=chunk)
        optimizer.zero_grad()

    return call


def pretrainer(s: toy.Settings, model):
    """A call that makes one step of pretraining, data and all, as train_toy.pretrain does."""
    model = copy.deepcopy(model)
    optimizer = toy.adamw(model, STILL, 0.1)

    def step():
        tokens, response = (torch.tensor(a) for a in toy.pretraining_batch(s, s.sloppy_from, model.cfg.context_length))
        loss = F.cross_entropy(model(tokens[:, :-1])[response[:, 1:]], tokens[:, 1:][response[:, 1:]])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def pieces(s: toy.Settings):
    """Sampling, update and pretraining step of a toy model, as calls; and the rollouts that it samples."""
    model = random_model(s.model_config())
    sampled = sample(s, model)
    return {"sampling": lambda: sample(s, model), "update": updater(model, unequal(sampled, s.group), FULL, s.minibatches, s.chunk),
            "pretraining": pretrainer(s, model)}, sampled  # fmt: skip


# ---- FLOPs -----------------------------------------------------------------------------------------------------


def forward_flops(cfg: GPTConfig, positions: int, pairs: int, unembedded: int) -> int:
    """FLOPs of all matrix products in a forward pass, 2 m n k for (m, k) x (k, n):

        positions  L (2 d (H + 2 K) D + 2 H D d + 6 d d_mlp)     qkv; attention's output; gate, up and down
      + pairs      L 4 H D                                       queries by keys, weights by values
      + unembedded 2 d V

    for so many positions, (query, key) pairs over all rows, and positions whose logits are wanted. Causal attention has
    T (T + 1) / 2 pairs in a row of T, a kernel that computes and masks the other half has T^2. A backward pass makes two
    products of the same size for each of these (for the gradient of either factor): forward and backward are three times this.
    """
    heads, kv = cfg.n_head * cfg.head_dim, cfg.n_kv_head * cfg.head_dim
    projections = 2 * cfg.d_model * (heads + 2 * kv) + 2 * heads * cfg.d_model + 6 * cfg.d_model * cfg.d_mlp
    return cfg.n_layer * (positions * projections + pairs * 4 * heads) + unembedded * 2 * cfg.d_model * cfg.vocab_size


def counted(f) -> int:
    """FLOPs of a call by torch's own counter; its attention as plain products, since it does not know the CPU's fused kernel."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        f()
    return counter.get_total_flops()


def update_flops(cfg: GPTConfig, sampled) -> int:
    """What an update has to compute: rows without padding or their last token, causal pairs, logits of responses."""
    T = sampled.end - 1
    return 3 * forward_flops(cfg, int(T.sum()), int((T * (T + 1) // 2).sum()), int((sampled.end - sampled.prompt_len).sum()))


def sampling_flops(cfg: GPTConfig, sampled, group: int) -> int:
    """What sampling has to compute: each prompt once per question; then, of each row, one position for each token but the
    last one, with as many pairs as there are tokens up to it. Ended rows cost nothing."""
    P, T = sampled.prompt_len, sampled.end - 1
    prefill = forward_flops(cfg, int(P[::group].sum()), int((P * (P + 1) // 2)[::group].sum()), len(P) // group)
    decoded = int((T - P).sum())
    return prefill + forward_flops(cfg, decoded, int((T * (T + 1) // 2 - P * (P + 1) // 2).sum()), decoded)


def pretraining_flops(cfg: GPTConfig, s: toy.Settings) -> int:
    """What a step of pretraining has to compute, with logits of the responses alone."""
    tokens, response = toy.pretraining_batch(s, s.sloppy_from, cfg.context_length)
    B, T = tokens.shape[0], tokens.shape[1] - 1
    return 3 * forward_flops(cfg, B * T, B * T * (T + 1) // 2, int(response[:, 1:].sum()))


# ---- sections --------------------------------------------------------------------------------------------------


def trl_peer():
    """The module that runs TRL; None, with a line that says so, where TRL is not installed."""
    try:
        import experiments.trl_peer as peer
    except ImportError as error:
        print(f"skipped, since TRL is not installed (pip install -e .[bench]): {error}")
        return None
    return peer


def tilt(rewards, group: int):
    """Rewards (N,) of 0 and 1, plus 0.01 i for the i-th row of each group: with 8 rows none is at its group's mean."""
    return rewards + 0.01 * (torch.arange(len(rewards)) % group)


def every_row_learns(s: toy.Settings):
    """A context in which rl_step's rewards are tilted."""
    plain = toy.reward
    return mock.patch.object(toy, "reward", lambda tokens, end, answer: tilt(plain(tokens, end, answer), s.group))


def step_against(peer, s: toy.Settings, rounds: int) -> dict:
    """Steps of RL, questions to log: TRL's, and ours from a callback between two of them."""
    model = random_model(s.model_config())
    optimizer, ours, theirs, lengths, logs = toy.adamw(model, STILL, s.weight_decay), [], [], [], []

    def reward(completion_ids, answer, **_):
        lengths.append(np.mean([len(ids) for ids in completion_ids]))
        return tilt(torch.tensor(peer.reward(completion_ids, answer)), s.group).tolist()

    def our_turn(step):
        nonlocal since
        theirs.append(time.perf_counter() - since)
        ours.append(seconds(lambda: logs.append(toy.rl_step(s, model, optimizer, FULL, Policy(s.n_layer // 2), step, CPU))))
        since = time.perf_counter()

    with every_row_learns(s):
        since = time.perf_counter()
        peer.train(s, peer.to_qwen3(model), rounds + 1, STILL, reward, our_turn)
    return {**ratio_of(theirs[1:], ours[1:]), "TRL s": float(np.median(theirs[1:])), "ours s": float(np.median(ours[1:])),
            "rollouts": s.questions * s.group, "TRL length": float(np.mean(lengths[1:])),
            "our length": float(np.mean([log["length"] for log in logs[1:]])), "at most": s.response_limit}  # fmt: skip


def rl_step(o) -> list[dict]:
    """A whole step of RL by TRL over ours; lengths are means of the responses."""
    peer = trl_peer()
    return [{"model": name, **step_against(peer, s, o.rounds)} for name, s in toys(o).items()] if peer else []


def run(o) -> list[dict]:
    """GRPO from one base with TRL and with ours, a step each in turns, until Avg@8 on 128 held-out problems of n digits is
    --until. Questions, rewards and hyper-parameters are the main job's; the evaluations, every --every steps and by
    train_toy.evaluate for both, are not in the times."""
    peer = trl_peer()
    if not peer:
        return []
    model = toy.load_model(o.base)
    sizes = {name: getattr(model.cfg, name) for name in ("n_layer", "d_model", "n_head", "qk_norm", "tied")}
    s = toy.Settings(algo="grpo", s_inter=0, **sizes)
    mirror, qwen3, optimizer = copy.deepcopy(model), peer.to_qwen3(model), toy.adamw(model, s.lr, s.weight_decay)
    spent, reached = {"TRL": 0.0, "ours": 0.0}, {}

    def check(name, policy, step):
        if step % o.every == 0 and name not in reached:
            accuracy = toy.evaluate(policy, s, [s.n], 128, CPU)[0][str(s.n)][f"avg@{s.eval_samples}"]
            print(f"step {step:3d}  {name:4} {spent[name]:6.1f} s  Avg@{s.eval_samples} {accuracy:.3f}", flush=True)
            if accuracy >= o.until:
                reached[name] = {"steps": step, "s": spent[name], "accuracy": accuracy}

    def our_turn(step):
        nonlocal since
        spent["TRL"] += time.perf_counter() - since
        peer.from_qwen3(mirror, qwen3)
        check("TRL", mirror, step)
        if "ours" not in reached:
            spent["ours"] += seconds(lambda: toy.rl_step(s, model, optimizer, FULL, Policy(s.n_layer // 2), step, CPU))
            check("ours", model, step)
        since = time.perf_counter()
        return len(reached) < 2

    since = time.perf_counter()
    peer.train(s, qwen3, s.steps, s.lr, peer.reward, our_turn)
    if len(reached) < 2:
        print(f"{' and '.join(spent.keys() - reached.keys())} did not reach {o.until} in {s.steps} steps")
        return []
    return [{"ratio": reached["TRL"]["s"] / reached["ours"]["s"], "until": o.until,
             **{f"{name} {key}": value for name in spent for key, value in reached[name].items()}}]  # fmt: skip


GEMMS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_dot_product_flash_attention_for_cpu",
         "aten::_scaled_dot_product_flash_attention_for_cpu_backward")  # fmt: skip


def limit(o) -> list[dict]:
    """Share of the limit: FLOPs that a piece has to compute (neither padding nor masked pairs nor unused logits) over its
    median time and the rate of a large square product of float32. It is the product of three shares, which say where the
    rest goes: "useful", FLOPs that it has to compute of those that torch counts; "in GEMMs", time inside products and
    attention of a profiled call; and "their rate", what is computed in that time of the large product's rate (small or
    flat matrices, attention's softmax). "operations": how many of torch's operations a call makes."""
    rows, size = [], 256 if o.quick else 2048
    rate = gemm_rate(size, size, size)
    for name, s in toys(o).items():
        calls, sampled = pieces(s)
        cfg = s.model_config()
        flops = {"sampling": sampling_flops(cfg, sampled, s.group), "update": update_flops(cfg, sampled),
                 "pretraining": pretraining_flops(cfg, s)}  # fmt: skip
        times = in_turns(o.rounds, calls)
        for piece, call in calls.items():
            with profile(activities=[ProfilerActivity.CPU]) as p:
                call()
            averages = [e for e in p.key_averages() if e.key.startswith("aten::")]
            inside = sum(e.self_cpu_time_total for e in averages if e.key in GEMMS) / p.profiler.self_cpu_time_total
            spent, computed = float(np.median(times[piece])), counted(call)
            rows.append({"model": name, "piece": piece, "share of limit": flops[piece] / spent / rate, "useful": flops[piece] / computed,
                         "in GEMMs": inside, "their rate": computed / (inside * spent) / rate, "s": spent, "GFLOP": flops[piece] / 1e9,
                         "GEMM GFLOP/s": rate / 1e9, "operations": sum(e.count for e in averages)})  # fmt: skip
    return rows


def phase1(o) -> list[dict]:
    """An update of pi_Layer^l over one of pi_theta on the same rollouts, l = 1..L. The goal is 1.15 l/L + a constant; the
    constant is the largest number in a column "less 1.15 l/L". A straight line fitted to the ratios is printed as well."""
    rows = []
    for name, s in toys(o).items():
        model, L = random_model(s.model_config()), s.n_layer
        rollouts, part = unequal(sample(s, model), s.group), np.arange(1, L + 1) / L
        calls = {l: updater(model, under(model, rollouts, Policy(l)), Policy(l), s.minibatches, s.chunk) for l in range(1, L + 1)}
        calls["full"] = updater(model, rollouts, FULL, s.minibatches, s.chunk)
        spent = np.array([np.median(times) for times in in_turns(o.rounds, calls).values()])  # the last one is the full update's
        memory = np.array([peak_memory(call) for call in calls.values()])
        for what, ratio in (("time", spent[:-1] / spent[-1]), ("memory", memory[:-1] / memory[-1])):
            slope, intercept = np.polyfit(part, ratio, 1)
            print(f"{name}, {what}: at most 1.15 l/L + {max(ratio - 1.15 * part):.3f}; fitted {slope:.2f} l/L + {intercept:.2f}")
        for i, l in enumerate(calls):
            time_ratio, memory_ratio, share = float(spent[i] / spent[-1]), float(memory[i] / memory[-1]), 1.15 * (i + 1) / L
            rows.append({"model": name, "layer": l, "time ratio": time_ratio, "less 1.15 l/L": "" if l == "full" else time_ratio - share,
                         "memory ratio": memory_ratio, "its less 1.15 l/L": "" if l == "full" else memory_ratio - share,
                         "ms": float(1e3 * spent[i]), "MB": float(memory[i] / 1e6)})  # fmt: skip
    return rows


def scaling(o) -> list[dict]:
    """Time of sampling and of an update (4 mini-batches) as one size grows and the others stay. No row ends early. An
    exponent near 1 is linear; below 1 a fixed cost is being spread; response length has attention's own quadratic part."""
    centre = dict(rows=64, response=32, layers=4, width=64)
    axes = {"rows": (32, 64, 128, 256, 512), "response": (16, 32, 64, 128, 256), "layers": (2, 4, 8, 16), "width": (32, 64, 128, 256, 512)}
    if o.quick:
        centre = dict(rows=32, response=4, layers=1, width=32)
        axes = {name: (value, 2 * value) for name, value in centre.items()}
    out, group, prompt_len = [], 8, 8
    for axis, values in axes.items():
        calls = {}
        for value in values:
            c = centre | {axis: value}
            model = random_model(GPTConfig(toy.VOCAB_SIZE, prompt_len + c["response"], c["layers"], c["width"], c["width"] // 32))
            prompt = torch.randint(toy.VOCAB_SIZE, (c["rows"] // group, prompt_len))
            calls["sampling", value] = lambda m=model, p=prompt, n=c["response"]: m.generate(p, n, num_samples=group)
            calls["update", value] = updater(model, unequal(calls["sampling", value](), group))
        times = {k: float(np.median(t)) for k, t in in_turns(o.rounds, calls).items()}
        for piece in ("sampling", "update"):
            ms = [1e3 * times[piece, v] for v in values]
            fitted, last = exponents(values, ms)
            out.append({"against": axis, "piece": piece, "exponent": fitted, "of the last doubling": last,
                        "sizes": " ".join(map(str, values)), "ms": " ".join(map(show, ms))})  # fmt: skip
    return out


@contextmanager
def hooks_that_keep(model, kept: dict):
    """Forward hooks on the embedding and on every norm, attention and MLP of the blocks, which keep what comes out."""

    def keep(name):
        return model.get_submodule(name).register_forward_hook(lambda module, args, output: kept.update({name: output}))

    inner = [f"blocks.{i}.{part}" for i in range(model.cfg.n_layer) for part in ("attn_norm", "attn", "mlp_norm", "mlp")]
    handles = [keep(name) for name in ("embed", *inner)]
    yield
    for handle in handles:
        handle.remove()


@torch.no_grad()
def entropies_by_hooks(model, tokens, mask) -> dict:
    """What internal_entropies returns, the usual way: one forward pass whose activations are all kept, then each whole
    tensor is unembedded, and the response positions are picked out of its entropies."""
    kept, out = {}, {name: [] for name in ("layer", "attn_in", "attn", "mlp_in", "mlp")}
    with hooks_that_keep(model, kept):
        model(tokens[:, :-1])

    def entropy(h):  # (N, T-1, d) -> (M,)
        log_pi = F.log_softmax(model.unembed(h), dim=-1)
        return -(log_pi.exp() * log_pi).sum(-1)[mask]

    stream = kept["embed"]
    out["layer"].append(entropy(stream))
    for i in range(model.cfg.n_layer):
        for name, part in (("attn_in", "attn_norm"), ("attn", "attn"), ("mlp_in", "mlp_norm"), ("mlp", "mlp")):
            out[name].append(entropy(kept[f"blocks.{i}.{part}"]))
        stream = stream + kept[f"blocks.{i}.attn"] + kept[f"blocks.{i}.mlp"]
        out["layer"].append(entropy(stream))
    return {name: torch.stack(values) for name, values in out.items()}


def entropy(o) -> list[dict]:
    """internal_entropies, 16 positions at a time, against entropies_by_hooks: 36 layers and V = 151,936 as in Qwen3-4B (d of
    128, not 2560), half of the positions prompt. Raises AssertionError if the two do not agree."""
    V, L, N, T, chunk = (500, 2, 4, 17, 8) if o.quick else (151_936, 36, 1, 65, 16)
    model = random_model(GPTConfig(V, T, L, 128, 4))
    tokens = torch.randint(V, (N, T), generator=torch.Generator().manual_seed(0))
    mask = minibupo.response_mask(torch.full((N,), T // 2 + 1), torch.full((N,), T), T)
    calls = {"by hooks": lambda: entropies_by_hooks(model, tokens, mask),
             "ours": lambda: minibupo.internal_entropies(model, tokens, mask, chunk=chunk)}  # fmt: skip
    torch.testing.assert_close(calls["ours"](), calls["by hooks"](), rtol=1e-3, atol=1e-4)
    times, memory = in_turns(min(o.rounds, 3), calls), {name: peak_memory(call) for name, call in calls.items()}
    return [{"time ratio": ratio_of(times["by hooks"], times["ours"])["ratio"], "memory ratio": memory["by hooks"] / memory["ours"],
             "positions": N * (T - 1), "of responses": int(mask.sum()), "V": V, "layers": L,
             **{f"{name} s": float(np.median(t)) for name, t in times.items()},
             **{f"{name} MB": m / 1e6 for name, m in memory.items()}}]  # fmt: skip


def where_time_goes(o) -> list[dict]:
    """torch.profiler's table for each piece of the toy models; the ten operations that take longest."""
    rows = []
    for name, s in toys(o).items():
        for piece, call in pieces(s)[0].items():
            call()
            with profile(activities=[ProfilerActivity.CPU]) as p:
                call()
            events, total = p.key_averages(), p.profiler.self_cpu_time_total
            for e in sorted(events, key=lambda e: -e.self_cpu_time_total)[:10]:
                rows.append({"model": name, "piece": piece, "operation": e.key, "share": e.self_cpu_time_total / total,
                             "ms": e.self_cpu_time_total / 1e3, "calls": e.count})  # fmt: skip
    return rows


SECTIONS = {"rl_step": rl_step, "run": run, "limit": limit, "phase1": phase1, "scaling": scaling, "entropy": entropy,
            "profile": where_time_goes}  # fmt: skip


def main(argv=None) -> int:
    """Run the sections asked for; print their tables and add them to the file of results."""
    parser = argparse.ArgumentParser(description="Benchmarks of minibupo.")
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)} (default: all but run)")
    parser.add_argument("--threads", type=int, default=1, help="for all sides alike (default: 1)")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each time, of which the median is taken (default: 7)")
    parser.add_argument("--quick", action="store_true", help="toy sizes and 2 rounds; no file is written unless --out is given")
    parser.add_argument("--out", type=Path, help=f"file of results (default: {RESULTS.relative_to(ROOT)})")
    parser.add_argument("--base", help="of run: a base.pt, made by train_toy.py")
    parser.add_argument("--until", type=float, default=0.9, help="of run: the accuracy to reach (default: 0.9)")
    parser.add_argument("--every", type=int, default=5, help="of run: steps between evaluations (default: 5)")
    o = parser.parse_args(argv)
    if unknown := set(o.sections) - SECTIONS.keys():
        parser.error(f"there is no section {', '.join(sorted(unknown))}")
    if "run" in o.sections and not o.base:
        parser.error("run needs --base, a base.pt that train_toy.py has left in its --out_dir")
    o.rounds = 2 if o.quick else o.rounds
    torch.set_num_threads(o.threads)
    path = o.out or (None if o.quick else RESULTS)
    results = json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else {}
    for name in o.sections or [name for name in SECTIONS if name != "run"]:
        print(f"\n## {name}\n", flush=True)
        started = time.perf_counter()
        rows = SECTIONS[name](o)
        if not rows:
            continue
        results[name] = {"machine": machine(), "rows": rows}
        print(section(results[name]) + f"\n\n{time.perf_counter() - started:.0f} s", flush=True)
        if path:
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            tables = "\n\n".join(f"## {name}\n\n{section(results[name])}" for name in SECTIONS if name in results)
            path.with_suffix(".md").write_text(f"# Tables of bench.py\n\n{tables}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
