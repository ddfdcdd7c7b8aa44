"""How fast is it? Against TRL, against the machine, against itself at other sizes.

    python experiments/bench.py                    # all sections but `run`
    python experiments/bench.py limit phase1       # these alone; the file keeps the others
    python experiments/bench.py run --base FILE    # a training run beside TRL's, from a base.pt
    python experiments/bench.py --quick            # tiny sizes: that it runs; writes nothing

    rl_step   one step of RL in which every row learns, against TRL's GRPOTrainer (trl_peer.py)
    run       the same until a given accuracy
    limit     FLOPs of the matrix products over the machine's GEMM rate, as a share of the time
    phase1    update of an internal policy over an update of the whole: time and memory by layer
    scaling   sampling and update against batch, response length, layers and width
    entropy   look_inside against forward hooks that keep everything

What is compared runs in turns in one process, on --threads threads. Times are medians of --rounds,
after one round that does not count. Weights are random and the learning rate is 1e-9, so each round
does the same work. Tables go to experiments/results/bench.json and bench.md.
"""

import argparse
import copy
import json
import os
import platform
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cosine_similarity
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

# ---- measuring ---------------------------------------------------------------------------------


def seconds(f) -> float:
    """Wall-clock time of one call."""
    started = time.perf_counter()
    f()
    return time.perf_counter() - started


def in_turns(rounds: int, calls: dict) -> dict:
    """Median seconds of each call, one after the other in each round; the first does not count."""
    times = [[seconds(call) for call in calls.values()] for _ in range(rounds + 1)]
    return dict(zip(calls, np.median(times[1:], axis=0).tolist()))


def peak_memory(f) -> int:
    """Bytes by which a call's tensors exceed, at their peak, what was there before it.

    The running sum of all that torch's allocator gave and took, as its profiler records it. Unlike
    the process's resident memory it does not depend on what ran before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        f()
    events = [e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return int(np.cumsum(sizes).max(initial=0))


def gemm_rate(size: int) -> float:
    """FLOP/s of the best of several products of square float32 matrices, of 50 ms or more each."""
    a, b, out = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
    repeats = 1 + int(0.05 / min(seconds(lambda: torch.mm(a, b, out=out)) for _ in range(3)))
    best = min(seconds(lambda: [torch.mm(a, b, out=out) for _ in range(repeats)]) for _ in range(5))
    return 2 * size**3 * repeats / best


def exponents(x, y) -> tuple[float, float]:
    """The a of y ~ x^a: by least squares on logarithms, and between the last two points."""
    x, y = np.log(x), np.log(y)
    return float(np.polyfit(x, y, 1)[0]), float((y[-1] - y[-2]) / (x[-1] - x[-2]))


def machine() -> dict:
    """What the numbers were measured on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def show(value) -> str:
    """A cell of a table: numbers to three significant digits."""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def table(result: dict) -> str:
    """A section as a Markdown table, and what it was measured on."""
    rows = result["rows"]
    cells = [list(rows[0]), ["---"] * len(rows[0])]
    cells += [[show(value) for value in row.values()] for row in rows]
    measured_on = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    return "\n".join("| " + " | ".join(row) + " |" for row in cells) + f"\n\n{measured_on}"


# ---- models, and what they are made to do ------------------------------------------------------


def toys(quick: bool) -> dict[str, toy.Settings]:
    """The default toy model and one with eight times the parameters, at 256 rollouts a step."""
    if quick:
        return {"tiny": toy.Settings(n=3, n_layer=2, d_model=32, questions=4, group=4)}
    large = toy.Settings(n_layer=12, d_model=128, questions=32)
    return {"default": toy.Settings(questions=32), "8 x": large}


def random_model(config: GPTConfig) -> GPT:
    """A model with random weights, the same ones each time."""
    torch.manual_seed(0)
    return GPT(config)


def adamw(model, lr=STILL):
    """An optimizer such as train_toy's."""
    return torch.optim.AdamW(model.parameters(), lr=lr, fused=True)


def sampling(s: toy.Settings, model):
    """Sample the responses of step 1."""
    problems = toy.draw_questions(toy.stream(s.seed, "questions", 1), s.questions, s.n)
    generator = toy.torch_stream(CPU, s.seed, "responses", 1)
    return toy.respond(model, s, problems, s.group, generator)


def unequal(sampled, group: int) -> Rollouts:
    """Rollouts with rewards 0, 1, .. in each group of an even size: every row has an advantage."""
    rewards = torch.arange(float(group)).repeat(len(sampled.end) // group, 1)
    return Rollouts(*sampled, rewards)


def updater(model, rollouts: Rollouts, policy: Policy = FULL):
    """A call that makes one minibupo.update of a copy of the model, and leaves no gradients."""
    model = copy.deepcopy(model)
    optimizer = adamw(model)

    def call():
        minibupo.update(model, optimizer, rollouts, policy)
        optimizer.zero_grad()

    return call


def tilt(rewards):
    """Rewards (Q, G) of 0 and 1, plus 0.01 for each place in the group: with G = 8 no row is at the
    mean of its group."""
    return rewards + 0.01 * torch.arange(rewards.shape[1])


def our_step(s, model, optimizer, step: int, tilted=False, chunk=64) -> Rollouts:
    """One step of GRPO by this repository."""
    rollouts = toy.rollouts(s, model, step)
    if tilted:
        rollouts = rollouts._replace(rewards=tilt(rollouts.rewards))
    minibupo.update(model, optimizer, rollouts, chunk=chunk)
    return rollouts


# ---- FLOPs -------------------------------------------------------------------------------------


def forward_flops(cfg: GPTConfig, positions: int, pairs: int, unembedded: int) -> int:
    """FLOPs of all matrix products in a forward pass, 2 m n k for (m, k) x (k, n):

        positions    L (2 d (H + 2 K) D + 2 H D d + 6 d d_mlp)    qkv; out; gate, up and down
        pairs        L 4 H D                                      queries by keys, weights by values
        unembedded   2 d V

    times so many positions, (query, key) pairs over all rows, and positions whose logits are
    wanted. Causal attention has T (T + 1) / 2 pairs in a row of T. A kernel that computes the other
    half and masks it has T^2. A backward pass costs twice as much, so both cost three times this.
    """
    heads, kv = cfg.n_head * cfg.head_dim, cfg.n_kv_head * cfg.head_dim
    per_position = 2 * cfg.d_model * (heads + 2 * kv) + 2 * heads * cfg.d_model
    per_position += 6 * cfg.d_model * cfg.d_mlp
    blocks = cfg.n_layer * (positions * per_position + pairs * 4 * heads)
    return blocks + unembedded * 2 * cfg.d_model * cfg.vocab_size


def counted(f) -> int:
    """FLOPs of a call by torch's own counter; its attention as plain products, since it does not
    know the CPU's fused kernel."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        f()
    return counter.get_total_flops()


def pairs_to(T):
    """Causal (query, key) pairs of all rows of lengths T."""
    return int((T * (T + 1) // 2).sum())


def update_flops(cfg: GPTConfig, sampled) -> int:
    """What an update has to compute: rows without padding or their last token, causal pairs, logits
    of responses. Old log-probabilities are not in it, since sampling could have kept them."""
    T, logits = sampled.end - 1, sampled.end - sampled.prompt_len
    return 3 * forward_flops(cfg, int(T.sum()), pairs_to(T), int(logits.sum()))


def sampling_flops(cfg: GPTConfig, sampled, group: int) -> int:
    """What sampling has to compute: each prompt once a question; then, of each row, a position for
    each token but the last, with as many pairs as there are tokens up to it."""
    P, T = sampled.prompt_len, sampled.end - 1
    prefill = forward_flops(cfg, int(P[::group].sum()), pairs_to(P[::group]), len(P) // group)
    decoded = int((T - P).sum())
    return prefill + forward_flops(cfg, decoded, pairs_to(T) - pairs_to(P), decoded)


# ---- sections: from the options to the rows of a table -----------------------------------------


def trl_peer():
    """The module that runs TRL; None, with a line that says so, where TRL is not installed."""
    try:
        import experiments.trl_peer as peer
    except ImportError as error:
        print(f"skipped, since TRL is not installed (pip install -e .[bench]): {error}")
        return None
    return peer


def rl_step(o) -> list[dict]:
    """A whole step of RL by TRL over ours, from questions to weights; lengths are means."""
    peer = trl_peer()
    return [step_against(peer, name, s, o.rounds) for name, s in toys(o.quick).items() if peer]


def step_against(peer, name: str, s: toy.Settings, rounds: int) -> dict:
    """Steps of TRL, and ours from a callback between two of them."""
    model = random_model(s.model_config())
    optimizer, ours, theirs, our_lengths, their_lengths = adamw(model), [], [], [], []

    def reward(prompts, completions, completion_ids, **_):
        their_lengths.append(np.mean([len(ids) for ids in completion_ids]))
        right = torch.tensor(peer.reward(prompts, completions, completion_ids))
        return tilt(right.view(-1, s.group)).flatten().tolist()

    def our_turn(step):
        nonlocal since
        theirs.append(time.perf_counter() - since)
        started = time.perf_counter()
        batch = our_step(s, model, optimizer, step, tilted=True)
        ours.append(time.perf_counter() - started)
        our_lengths.append(float((batch.end - batch.prompt_len).float().mean()))
        since = time.perf_counter()

    since = time.perf_counter()
    peer.train(s, peer.to_qwen3(model), rounds + 1, STILL, reward, our_turn)
    each = np.array(theirs[1:]) / np.array(ours[1:])
    return {
        "model": name,
        "ratio": float(np.median(theirs[1:]) / np.median(ours[1:])),
        "lowest": float(each.min()),
        "highest": float(each.max()),
        "TRL s": float(np.median(theirs[1:])),
        "ours s": float(np.median(ours[1:])),
        "rollouts": s.questions * s.group,
        "TRL length": float(np.mean(their_lengths[1:])),
        "our length": float(np.mean(our_lengths[1:])),
    }


def run(o) -> list[dict]:
    """GRPO from one base with TRL and with ours, a step each in turns, until Avg@8 on 128 held-out
    problems is 0.9. Both are evaluated every 5 steps by train_toy, which is not in the times."""
    peer, until = trl_peer(), 0.9
    if not peer:
        return []
    model = toy.load_model(o.base)
    s = toy.Settings(algo="grpo", s_inter=0, n_layer=model.n_layer, d_model=model.cfg.d_model)
    models = {"TRL": copy.deepcopy(model), "ours": model}
    qwen3, optimizer = peer.to_qwen3(model), adamw(model, s.lr)
    spent, reached = {"TRL": 0.0, "ours": 0.0}, {}

    def check(name, step):
        if step % 5 == 0 and name not in reached:
            accuracy = toy.evaluate(models[name], s, [s.n], 128)[0][str(s.n)]["avg@8"]
            print(f"step {step:3d}  {name:4} {spent[name]:6.1f} s  {accuracy:.3f}", flush=True)
            if accuracy >= until:
                reached[name] = {"steps": step, "s": spent[name], "accuracy": accuracy}

    def our_turn(step):
        nonlocal since
        spent["TRL"] += time.perf_counter() - since
        peer.from_qwen3(models["TRL"], qwen3)
        check("TRL", step)
        if "ours" not in reached:
            spent["ours"] += seconds(lambda: our_step(s, model, optimizer, step))
            check("ours", step)
        since = time.perf_counter()
        return len(reached) < 2

    since = time.perf_counter()
    peer.train(s, qwen3, s.steps, s.lr, peer.reward, our_turn)
    if len(reached) < 2:
        print(f"{' and '.join(spent.keys() - reached.keys())} did not get there in {s.steps} steps")
        return []
    columns = {f"{who} {name}": reached[who][name] for who in spent for name in reached[who]}
    return [{"ratio": reached["TRL"]["s"] / reached["ours"]["s"], "until": until, **columns}]


ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
GEMMS = ("aten::mm", "aten::addmm", "aten::bmm", ATTENTION, ATTENTION + "_backward")


def share_in_gemms(f) -> float:
    """The share of a call's time that is spent inside matrix products and attention."""
    with profile(activities=[ProfilerActivity.CPU]) as p:
        f()
    inside = sum(e.self_cpu_time_total for e in p.key_averages() if e.key in GEMMS)
    return inside / p.profiler.self_cpu_time_total


def limit(o) -> list[dict]:
    """FLOPs that a piece has to compute (neither padding nor masked pairs nor unused logits) over
    its time and the rate of a large product: "share of limit", a product of three shares.

        useful        FLOPs that it has to compute, of those that torch counts
        in GEMMs      time inside products and attention, of a profiled call
        their rate    what is computed in that time, of the large product's rate
    """
    rows, rate = [], gemm_rate(256 if o.quick else 2048)
    for name, s in toys(o.quick).items():
        cfg = s.model_config()
        model = random_model(cfg)
        sampled = sampling(s, model)
        flops = {
            "sampling": sampling_flops(cfg, sampled, s.group),
            "update": update_flops(cfg, sampled),
        }
        calls = {
            "sampling": partial(sampling, s, model),
            "update": updater(model, unequal(sampled, s.group)),
        }
        times = in_turns(o.rounds, calls)
        for piece, call in calls.items():
            spent, computed, inside = times[piece], counted(call), share_in_gemms(call)
            rows.append(
                {
                    "model": name,
                    "piece": piece,
                    "share of limit": flops[piece] / spent / rate,
                    "useful": flops[piece] / computed,
                    "in GEMMs": inside,
                    "their rate": computed / (inside * spent) / rate,
                    "s": spent,
                    "GFLOP": flops[piece] / 1e9,
                    "GEMM GFLOP/s": rate / 1e9,
                }
            )
    return rows


def phase1(o) -> list[dict]:
    """An update of pi_Layer^l over one of pi_theta on the same rollouts, l = 1..L.

    The goal is 1.15 l / L and a small constant, the largest number in a column "less 1.15 l/L"."""
    rows = []
    for name, s in toys(o.quick).items():
        model, L = random_model(s.model_config()), s.n_layer
        rollouts = unequal(sampling(s, model), s.group)
        policies = {"full": FULL, **{l: Policy(l) for l in range(1, L + 1)}}
        calls = {l: updater(model, rollouts, policy) for l, policy in policies.items()}
        spent = in_turns(o.rounds, calls)
        memory = {l: peak_memory(call) for l, call in calls.items()}
        for l in calls:
            row, part = {"model": name, "layer": l}, 1.0 if l == "full" else l / L
            for what, cost in (("time", spent), ("memory", memory)):
                ratio = cost[l] / cost["full"]
                row |= {f"{what} ratio": ratio, f"{what} less 1.15 l/L": ratio - 1.15 * part}
            rows.append(row | {"ms": 1e3 * spent[l], "MB": memory[l] / 1e6})
    return rows


def scaling(o) -> list[dict]:
    """Time of sampling and of an update as one size grows and the others stay; no row ends early.

    An exponent near 1 is linear, and below 1 a fixed cost is being spread."""
    centre = dict(rows=64, response=32, layers=4, width=64)
    axes = dict(
        rows=(32, 64, 128, 256, 512),
        response=(16, 32, 64, 128, 256),
        layers=(2, 4, 8, 16),
        width=(32, 64, 128, 256, 512),
    )
    if o.quick:
        centre = dict(rows=32, response=4, layers=1, width=32)
        axes = {axis: (value, 2 * value) for axis, value in centre.items()}
    table, V, group, P = [], toy.VOCAB_SIZE, 8, 8
    for axis, values in axes.items():
        calls = {}
        for value in values:
            c = centre | {axis: value}
            cfg = GPTConfig(V, P + c["response"], c["layers"], c["width"], c["width"] // 32)
            model, prompt = random_model(cfg), torch.randint(V, (c["rows"] // group, P))
            sample = partial(model.generate, prompt, c["response"], num_samples=group)
            calls["sampling", value] = sample
            calls["update", value] = updater(model, unequal(sample(), group))
        times = in_turns(o.rounds, calls)
        for piece in ("sampling", "update"):
            ms = [1e3 * times[piece, value] for value in values]
            fitted, last = exponents(values, ms)
            row = {
                "against": axis,
                "piece": piece,
                "exponent": fitted,
                "of the last doubling": last,
            }
            table.append(row | {"sizes": " ".join(map(str, values)), "ms": " ".join(map(show, ms))})
    return table


@contextmanager
def hooks_that_keep(model, kept: dict):
    """Hooks that keep what the embedding and each block's norms, attention and MLP give."""
    parts = ("attn_norm", "attn", "mlp_norm", "mlp")
    names = ["embed", *(f"blocks.{i}.{part}" for i in range(model.n_layer) for part in parts)]
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: kept.update({name: output})
        )
        for name in names
    ]
    yield
    for handle in handles:
        handle.remove()


@torch.no_grad()
def inside_by_hooks(model, tokens, mask) -> dict:
    """What look_inside returns, the usual way: one forward pass whose activations are all kept.
    Then whole tensors are unembedded, and the response positions are picked from the results."""
    kept, L = {}, model.n_layer
    with hooks_that_keep(model, kept):
        model(tokens[:, :-1])
    stream, mid = [kept["embed"]], []  # H^0..H^L, and between attention and FFN
    for i in range(L):
        mid.append(stream[-1] + kept[f"blocks.{i}.attn"])
        stream.append(mid[-1] + kept[f"blocks.{i}.mlp"])
    top = stream[-1]

    def entropy_at(h):
        log_pi = model.unembed(h).log_softmax(-1)
        return -(log_pi.exp() * log_pi).sum(-1)[mask]

    def entropy(hs):
        return torch.stack([entropy_at(h) for h in hs])

    def of(part):
        return [kept[f"blocks.{i}.{part}"] for i in range(L)]

    out = {}
    writes = {
        "layer": (stream, [top] * (L + 1)),
        "attn": (of("attn"), stream),
        "mlp": (of("mlp"), mid),
    }
    for name, (hs, others) in writes.items():
        out[name] = entropy(hs)
        cos = [cosine_similarity(h, other, dim=-1)[mask] for h, other in zip(hs, others)]
        out[f"cos_{name}"] = torch.stack(cos)
        out[f"rms_{name}"] = torch.stack([h.square().mean(-1).sqrt()[mask] for h in hs])
    out |= {"attn_in": entropy(of("attn_norm")), "mlp_in": entropy(of("mlp_norm"))}
    out["layer_normed"] = entropy(model.final_norm(h) for h in stream)
    length = top.norm(dim=-1, keepdim=True)
    out["layer_matched"] = entropy(h / h.norm(dim=-1, keepdim=True) * length for h in stream)
    out |= {"d_attn": out["attn"] - out["attn_in"], "d_mlp": out["mlp"] - out["mlp_in"]}
    return out | {"d_layer": out["layer"].diff(dim=0)}


def entropy(o) -> list[dict]:
    """look_inside, 16 positions at a time, against inside_by_hooks: layers and vocabulary as in
    Qwen3-4B (but d = 128), half of the positions prompt. Raises AssertionError if they differ."""
    V, L, N, T, chunk = (500, 2, 4, 17, 8) if o.quick else (151_936, 36, 1, 65, 16)
    model = random_model(GPTConfig(V, T, L, 128, 4))
    tokens = torch.randint(V, (N, T), generator=torch.Generator().manual_seed(0))
    mask = minibupo.response_mask(torch.full((N,), T // 2 + 1), torch.full((N,), T), T)
    calls = {
        "by hooks": lambda: inside_by_hooks(model, tokens, mask),
        "ours": lambda: minibupo.look_inside(model, tokens, mask, chunk=chunk),
    }
    torch.testing.assert_close(dict(calls["ours"]()), calls["by hooks"](), rtol=1e-3, atol=1e-3)
    times = in_turns(min(o.rounds, 3), calls)
    memory = {name: peak_memory(call) for name, call in calls.items()}
    row = {
        "time ratio": times["by hooks"] / times["ours"],
        "memory ratio": memory["by hooks"] / memory["ours"],
        "positions": N * (T - 1),
        "of responses": int(mask.sum()),
    }
    for name in calls:
        row |= {f"{name} s": times[name], f"{name} MB": memory[name] / 1e6}
    return [row]


SECTIONS = {f.__name__: f for f in (rl_step, run, limit, phase1, scaling, entropy)}


def main(argv=None) -> int:
    """Run the sections asked for; print their tables and add them to the results."""
    parser = argparse.ArgumentParser(description="Benchmarks of minibupo.")
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--threads", type=int, default=1, help="for all sides alike (default: 1)")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of a time (default: 7)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, 2 rounds, no results")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of results, .json")
    parser.add_argument("--base", help="of run: a base.pt, made by train_toy.py")
    o = parser.parse_args(argv)
    if unknown := set(o.sections) - SECTIONS.keys():
        parser.error(f"there is no section {', '.join(sorted(unknown))}")
    if "run" in o.sections and not o.base:
        parser.error("run needs --base, a base.pt that train_toy.py has left in its --out_dir")
    o.rounds = 2 if o.quick else o.rounds
    torch.set_num_threads(o.threads)
    results = json.loads(o.out.read_text(encoding="utf-8")) if o.out.is_file() else {}
    for name in o.sections or [name for name in SECTIONS if name != "run"]:
        print(f"\n## {name}\n", flush=True)
        rows = SECTIONS[name](o)
        if not rows:
            continue
        results[name] = {"machine": machine(), "rows": rows}
        print(table(results[name]), flush=True)
        if not o.quick:
            text = json.dumps(results, indent=1) + "\n"
            o.out.write_text(text, encoding="utf-8")
            tables = [f"## {of}\n\n{table(results[of])}\n" for of in SECTIONS if of in results]
            text = "\n".join(["# Tables of bench.py\n", *tables])
            o.out.with_suffix(".md").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
