"""How fast is it? Against TRL, by layer, and against forward hooks.

    python -m experiments.bench                    # all sections
    python -m experiments.bench rl_step phase1     # only these; the file keeps the others
    python -m experiments.bench --quick            # tiny sizes, to see that it runs; writes nothing

    rl_step   one step of RL in which every row learns, against TRL's GRPOTrainer (trl_peer.py)
    phase1    update of an internal policy over an update of the whole: time and memory by layer
    entropy   look_inside against forward hooks that keep everything

What is compared runs in turns in one process, on --threads threads. Times are medians of --rounds,
after one round that does not count. Weights are random and the learning rate is 1e-9, so each round
does the same work. Tables go to experiments/results/bench.json and bench.md.
"""

import argparse
import copy
import json
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cosine_similarity
from torch.profiler import ProfilerActivity, profile

import minibupo
import train_toy as toy
from experiments import common
from minibupo import FULL, Policy, Rollouts
from model import GPT, GPTConfig

RESULTS = common.RESULTS / "bench.json"
STILL = 1e-9  # a learning rate at which nothing moves

# ---- measuring ---------------------------------------------------------------------------------


def in_turns(rounds: int, calls: dict) -> dict:
    """Return the median seconds of each call, which run in turns; the first round is left out."""
    times = [[common.seconds(call) for call in calls.values()] for _ in range(rounds + 1)]
    return dict(zip(calls, np.median(times[1:], axis=0).tolist()))


def peak_memory(f) -> int:
    """Return the bytes by which a call's tensors exceed, at their peak, those from before the call.

    This is the running sum of what torch's allocator gave and took, as its profiler records it.
    Unlike the process's resident memory it does not depend on what ran before.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        f()
    events = [e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return int(np.cumsum(sizes).max(initial=0))


def show(value) -> str:
    """Return a cell of a table: numbers to three significant digits."""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def table(result: dict) -> str:
    """Return a section as a Markdown table, and what it was measured on."""
    rows = [[show(value) for value in row.values()] for row in result["rows"]]
    measured_on = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    return f"{common.markdown_table(list(result['rows'][0]), rows)}\n\n{measured_on}"


# ---- models, and what they are made to do ------------------------------------------------------


def toys(quick: bool) -> dict[str, toy.Settings]:
    """Return the settings of the default toy model and of one with eight times the parameters."""
    if quick:
        return {"tiny": toy.Settings(n=3, n_layer=2, d_model=32, questions=4, group=4)}
    large = toy.Settings(n_layer=12, d_model=128, questions=32)
    return {"default": toy.Settings(questions=32), "8 x": large}


def random_model(config: GPTConfig) -> GPT:
    """Return a model with random weights, the same ones each time."""
    torch.manual_seed(0)
    return GPT(config)


def adamw(model, lr=STILL):
    """Return an optimizer such as train_toy's."""
    return torch.optim.AdamW(model.parameters(), lr=lr, fused=True)


def unequal(sampled, group: int) -> Rollouts:
    """Return rollouts in which every row has an advantage: rewards 0, 1, .. in each even group."""
    rewards = torch.arange(float(group)).repeat(len(sampled.end) // group, 1)
    return Rollouts(sampled.tokens, sampled.prompt_len, sampled.end, rewards)


def updater(model, rollouts: Rollouts, policy: Policy = FULL):
    """Return a call that makes one minibupo.update of a copy of the model, and frees gradients."""
    model = copy.deepcopy(model)
    optimizer = adamw(model)

    def call():
        minibupo.update(model, optimizer, rollouts, policy)
        optimizer.zero_grad()

    return call


def tilt(rewards):
    """Return rewards (Q, G) of 0 and 1 plus 0.01 for each place in the group.

    With G = 8 no row is then at the mean of its group.
    """
    return rewards + 0.01 * torch.arange(rewards.shape[1])


def our_step(s, model, optimizer, step: int, chunk=64) -> Rollouts:
    """Make one step of GRPO with tilted rewards, and return its rollouts."""
    rollouts = toy.rollouts(s, model, step)
    rollouts = rollouts._replace(rewards=tilt(rollouts.rewards))
    minibupo.update(model, optimizer, rollouts, chunk=chunk)
    return rollouts


# ---- sections: from the options to the rows of a table -------------------------------------------


def trl_peer():
    """Return the module that runs TRL; None, and print why, if TRL is not installed."""
    try:
        from experiments import trl_peer as peer
    except ImportError as error:
        print(f"skipped, because TRL is not installed (pip install -e .[bench]): {error}")
        return None
    return peer


def rl_step(o) -> list[dict]:
    """Return the time of a whole step of RL by TRL over ours, from questions to weights."""
    peer = trl_peer()
    if peer is None:
        return []
    return [step_against(peer, name, s, o.rounds) for name, s in toys(o.quick).items()]


def step_against(peer, name: str, s: toy.Settings, rounds: int) -> dict:
    """Make steps of TRL, and after each one of ours from a callback; lengths are means."""
    model = random_model(s.model_config())
    optimizer = adamw(model)
    ours = []  # seconds of each step
    theirs = []
    our_lengths = []
    their_lengths = []

    def reward(prompts, completions, completion_ids, **_):
        their_lengths.append(np.mean([len(ids) for ids in completion_ids]))
        correct = torch.tensor(peer.reward(prompts, completions, completion_ids))
        return tilt(correct.view(-1, s.group)).flatten().tolist()

    def our_turn(step):
        nonlocal since
        theirs.append(time.perf_counter() - since)
        started = time.perf_counter()
        batch = our_step(s, model, optimizer, step)
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


def phase1(o) -> list[dict]:
    """Return the cost of an update of pi_Layer^l over that of pi_theta, for l = 1..L.

    Both are updates on the same rollouts. The goal is 1.15 l / L and a small constant, the largest
    number in a column "less 1.15 l/L".
    """
    rows = []
    for name, s in toys(o.quick).items():
        model = random_model(s.model_config())
        rollouts = unequal(toy.rollouts(s, model, step=1), s.group)
        policies = {"full": FULL} | {l: Policy(l) for l in range(1, s.n_layer + 1)}
        calls = {l: updater(model, rollouts, policy) for l, policy in policies.items()}
        spent = in_turns(o.rounds, calls)
        memory = {l: peak_memory(call) for l, call in calls.items()}
        for l in calls:
            share = 1.0 if l == "full" else l / s.n_layer
            row = {"model": name, "layer": l}
            for what, cost in (("time", spent), ("memory", memory)):
                ratio = cost[l] / cost["full"]
                row |= {f"{what} ratio": ratio, f"{what} less 1.15 l/L": ratio - 1.15 * share}
            rows.append(row | {"ms": 1e3 * spent[l], "MB": memory[l] / 1e6})
    return rows


@contextmanager
def hooks_that_keep(model, kept: dict):
    """Keep what the embedding and each block's norms, attention and MLP return, by hooks."""
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
    """Return what look_inside returns, in the usual way.

    One forward pass keeps all activations. Then whole tensors are unembedded, and the response
    positions are picked from the results.
    """
    L = model.n_layer
    kept = {}
    with hooks_that_keep(model, kept):
        model(tokens[:, :-1])

    def outputs_of(part):
        return [kept[f"blocks.{i}.{part}"] for i in range(L)]

    stream = [kept["embed"]]  # H^0..H^L
    mid = []  # between attention and FFN
    for attn, mlp in zip(outputs_of("attn"), outputs_of("mlp")):
        mid.append(stream[-1] + attn)
        stream.append(mid[-1] + mlp)
    top = stream[-1]

    def entropy_at(h):
        log_pi = model.unembed(h).log_softmax(-1)
        return -(log_pi.exp() * log_pi).sum(-1)[mask]

    def entropies(hs):
        return torch.stack([entropy_at(h) for h in hs])

    found = {}
    writes = {
        "layer": (stream, [top] * (L + 1)),
        "attn": (outputs_of("attn"), stream),
        "mlp": (outputs_of("mlp"), mid),
    }
    for name, (hs, others) in writes.items():
        cos = [cosine_similarity(h, other, dim=-1)[mask] for h, other in zip(hs, others)]
        found[name] = entropies(hs)
        found[f"cos_{name}"] = torch.stack(cos)
        found[f"rms_{name}"] = torch.stack([h.square().mean(-1).sqrt()[mask] for h in hs])
    size = top.norm(dim=-1, keepdim=True)
    found["attn_in"] = entropies(outputs_of("attn_norm"))
    found["mlp_in"] = entropies(outputs_of("mlp_norm"))
    found["layer_normed"] = entropies(model.final_norm(h) for h in stream)
    found["layer_matched"] = entropies(h / h.norm(dim=-1, keepdim=True) * size for h in stream)
    found["dH_attn"] = found["attn"] - found["attn_in"]
    found["dH_mlp"] = found["mlp"] - found["mlp_in"]
    found["dH_layer"] = found["layer"].diff(dim=0)
    return found


def entropy(o) -> list[dict]:
    """Return the cost of look_inside, 16 positions at a time, against that of inside_by_hooks.

    Layers and vocabulary are those of Qwen3-4B (but d = 128); half of the positions are prompt.
    Raises AssertionError if the results differ.
    """
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


SECTIONS = {"rl_step": rl_step, "phase1": phase1, "entropy": entropy}


def main(argv=None) -> int:
    """Run the sections asked for; print their tables and add them to the results."""
    parser = argparse.ArgumentParser("bench", description="Benchmarks of minibupo.")
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--threads", type=int, default=1, help="for all sides alike (default: 1)")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of a time (default: 7)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, 2 rounds, no results")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of results, .json")
    o = parser.parse_args(argv)
    if unknown := set(o.sections) - SECTIONS.keys():
        parser.error(f"there is no section {', '.join(sorted(unknown))}")
    o.rounds = 2 if o.quick else o.rounds
    torch.set_num_threads(o.threads)
    results = json.loads(o.out.read_text(encoding="utf-8")) if o.out.is_file() else {}
    for name in o.sections or SECTIONS:
        print(f"\n## {name}\n", flush=True)
        rows = SECTIONS[name](o)
        if not rows:
            continue
        results[name] = {"machine": common.machine(), "rows": rows}
        print(table(results[name]), flush=True)
        if not o.quick:
            save(o.out, results)
    return 0


def save(path: Path, results: dict):
    """Write the results, and their tables beside them."""
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    tables = [f"## {name}\n\n{table(results[name])}\n" for name in SECTIONS if name in results]
    text = "\n".join(["# Tables of experiments/bench.py\n", *tables])
    path.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
