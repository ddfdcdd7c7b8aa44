"""A look at one model or one run: what its internal policies are, and what training does to them.

    python analyze.py all RUN                   all of a run, into RUN/figures
    python analyze.py entropy RUN               entropy flow and entropy change by layer (Fig. 2, 3)
    python analyze.py writes RUN                the same, and cosines of the writes (Appendix B.2)
    python analyze.py dynamics RUN              training (Fig. 4, 7), feature refinement (Fig. 5)
    python analyze.py lens RUN "7+5*3-2="       what each internal policy would say: picture, page
    python analyze.py sample RUN "7+5*3-2=" --layer 4    answers of an internal policy itself
    python analyze.py step RUN                  one update as a table, token by token

In place of RUN the others than `all` and `dynamics` take a language model: a name on the Hugging
Face hub (OWNER/NAME), a directory with safetensors, or a .gguf file (needs the extra `hf`). Figure
numbers are the paper's. Entropies are in nats, at temperature 1. H^0 is the embedding.
"""

import argparse
import copy
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

import minibupo
import train_toy as toy
from minibupo import FULL, SITES, Policy, Rollouts, response_mask

plt.switch_backend("Agg")  # pictures are written, not shown
LAYER, FFN, ATTENTION, NORMED, MATCHED = "C0", "C1", "C2", "C3", "C5"  # one colour each everywhere
GREY, WIDTH = "0.45", 7.0  # WIDTH in inches: both columns of a two-column page
STYLE = ["seaborn-v0_8-paper", "seaborn-v0_8-colorblind", {"figure.constrained_layout.use": True}]
STYLE += [{"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 8}]
STYLE += [{"legend.frameon": False, "lines.markeredgewidth": 1, "savefig.dpi": 200}]
CHECKPOINTS = {"base": "base.pt", "phase1": "phase1.pt", "final": "ckpt.pt"}
AVG = f"avg@{toy.SAMPLES}"

# ---- what is looked at -------------------------------------------------------------------------


@dataclass
class Subject:
    """A run or a language model, in one shape. Its models keep the contract in minibupo.py."""

    folder: Path  # where figures go
    chosen: str  # the checkpoint to look at
    checkpoints: list[str]  # all that there are, in the order of training
    load: Callable  # name of a checkpoint -> model
    encode: Callable  # prompt, response -> token ids of both, and how many are the prompt's
    decode: Callable  # token ids -> text
    eos_id: int
    limit: int  # tokens that a response may take
    run: Path | None = None  # None for a language model
    settings: toy.Settings | None = None  # of the run

    def word(self, token: int) -> str:
        """The text of one token: a dot for a space, an escape for what cannot be seen."""
        return repr(self.decode([token]))[1:-1].replace(" ", "·")


def read_run(path: Path, chosen="base", device="auto") -> Subject:
    """The run in a directory. Raises ValueError if there is none."""
    s, device = toy.read_settings(path), toy.pick_device(device)
    torch.set_num_threads(s.threads)

    def load(name):
        return toy.load_model(path / CHECKPOINTS[name], device)

    def encode(prompt, response):
        return toy.encode(prompt + response), len(toy.encode(prompt))

    names = [name for name, file in CHECKPOINTS.items() if (path / file).is_file()]
    codec = (encode, toy.ENCODING.decode, toy.EOS, s.response_limit)
    return Subject(path / "figures", chosen, names, load, *codec, path, s)


def read_language_model(source: str, dtype="float32", device="auto") -> Subject:
    """A language model by minibupo_hf/adapter.py. Raises ValueError or ImportError if it cannot be read."""
    from minibupo_hf.adapter import encode_chat, load

    model, tokenizer = load(source, dtype, toy.pick_device(device))
    name = Path(source).name.removesuffix(".gguf")
    codec = (partial(encode_chat, tokenizer), tokenizer.decode, tokenizer.eos_token_id, 48)
    return Subject(Path("out") / name / "figures", name, [name], lambda _: model, *codec)


def looked_at(subject: Subject, model, args):
    """Tokens (N, T), mask (N, T-1) of responses: --text, else a greedy answer to the prompt, else
    own solutions of a run's held-out problems. Raises ValueError for an empty response."""
    if args.prompt is None and args.text is None:
        return toy.own_solutions(model, subject.settings)
    ids, prompt_len = subject.encode(args.prompt or "", args.text or "")
    tokens = torch.tensor([ids], device=model.device)
    if args.text is None:
        tokens, _, _ = model.generate(tokens, subject.limit, temperature=0, eos_id=subject.eos_id)
    T = max(1, tokens.shape[1])  # a text of no tokens has no positions
    mask = response_mask(torch.tensor([prompt_len]), torch.tensor([T]), T).to(model.device)
    if not mask.any():
        raise ValueError("there is no response to look at")
    return tokens, mask


# ---- entropy (Fig. 2, 3), writes (Appendix B.2), dynamics (Fig. 4, 5, 7) -----------------------


def entropy(subject: Subject, args):
    """entropy.json, entropy_flow.png, entropy_change.png; returns what look_inside measures. The
    file has NAME, its mean over positions, NAME_sem, and NAME_median, as few can own a mean."""
    model = subject.load(subject.chosen)
    found = minibupo.look_inside(model, *looked_at(subject, model, args))
    found = {name: values.cpu().double().numpy() for name, values in found.items()}
    M, log_vocab = found["layer"].shape[1], math.log(model.vocab_size)
    summary = {"positions": M, "log_vocab": log_vocab, "target_layer": None}
    for name, values in found.items():
        summary[name] = values.mean(1).tolist()
        summary[f"{name}_sem"] = (values.std(1, ddof=1) / M**0.5).tolist() if M > 1 else None
        summary[f"{name}_median"] = np.median(values, axis=1).tolist()
    try:
        summary["target_layer"] = minibupo.target_layer(summary["d_mlp"])
    except ValueError as error:
        print(f"no target layer: {error}")
    print(f"{subject.chosen}, {M} response positions, target layer {summary['target_layer']}")
    save(subject.folder / "entropy.json", json.dumps(summary, indent=1))
    save(subject.folder / "entropy_flow.png", draw_flow(found, log_vocab))
    titles = {"d_attn": "$dH_{ATTN}$", "d_mlp": "$dH_{FFN}$", "d_layer": "$dH_{Layer}$"}
    titles["d_mlp"] += f", target layer: {summary['target_layer'] or 'none'}"
    ylabel = "entropy change (nats)\nconvergence < 0 < exploration"
    save(subject.folder / "entropy_change.png", draw_signed(found, titles, ylabel))
    return found


def draw_flow(found: dict, log_vocab: float):
    """The entropy flow (Fig. 2): H^l by layer, and for each module a line from the entropy of what
    it reads, the normed stream, to that of what it writes, its dH. Below: the stream's size."""
    figure, (ax, below) = plt.subplots(2, figsize=(WIDTH, 4.6), sharex=True, height_ratios=(4, 1))
    curve(ax, 0, found["layer"], LAYER, "$H^l$, raw")
    ax.plot(found["layer_normed"].mean(1), "--", color=NORMED, label="$H^l$, with LN$_f$")
    ax.plot(found["layer_matched"].mean(1), "--", color=MATCHED, label="$H^l$, size of $H^L$")
    modules = ("attn", "attention", "^", ATTENTION, 1 / 3), ("mlp", "FFN", "s", FFN, 2 / 3)
    for name, label, marker, colour, offset in modules:
        x = np.arange(len(found[name])) + offset  # layer l stands between l - 1 and l
        read, written = found[f"{name}_in"].mean(1), found[name].mean(1)
        ax.vlines(x, read, written, color=colour)
        ax.plot(x, read, marker, color=colour, mfc="white", ms=8, label=f"{label} reads")
        ax.plot(x, written, marker, color=colour, label=f"{label} writes")
    ax.axhline(log_vocab, color=GREY, linewidth=0.8, linestyle=":", label="uniform")
    ax.set(ylabel="entropy (nats)", ylim=(0, 1.08 * log_vocab), xlabel="")
    figure.legend(ncols=4, loc="outside upper center")
    curve(below, 0, found["rms_layer"], LAYER)
    below.set_yscale("log")
    below.yaxis.set(major_formatter=plt.LogFormatter(), minor_formatter=plt.LogFormatter())
    below.set_ylabel("RMS($H^l$)")
    return figure


def draw_signed(found: dict, titles: dict, ylabel: str):
    """Measures {name: title} of attention, FFN and layer, a panel each, by layer (Fig. 3)."""
    figure, axes = plt.subplots(1, len(titles), figsize=(WIDTH, 2.4), sharey=True)
    for ax, (name, title), colour in zip(axes, titles.items(), (ATTENTION, FFN, LAYER)):
        ax.axhline(0, color="black", linewidth=0.6)
        curve(ax, 1, found[name], colour)
        ax.set_title(title)
    axes[0].set_ylabel(ylabel)
    return figure


def writes(subject: Subject, args):
    """All of `entropy`, and writes.png: the cosine of each write with the stream it is added to."""
    found = entropy(subject, args)
    titles = {"cos_attn": "attention writes", "cos_mlp": "FFN writes"}
    ylabel = "cos(write, stream)\nsuppresses < 0 < amplifies"
    save(subject.folder / "writes.png", draw_signed(found, titles, ylabel))


def dynamics(subject: Subject, args):
    """dynamics.png and refinement.png of a run; a dotted line where phase 2 begins."""
    for name, panels in read_training(subject).items():
        figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 2.2))
        for ax, (title, points) in zip(axes, panels.items()):
            ax.plot(list(points), list(points.values()))
            if subject.settings.s_inter:
                ax.axvline(subject.settings.s_inter + 0.5, color=GREY, lw=0.8, ls=":")
            ax.set(title=title, xlabel="step")
        save(subject.folder / f"{name}.png", figure)


def read_training(subject: Subject) -> dict:
    """{figure: {title: {step: value}}} of a run. Raises ValueError for damaged metrics."""
    steps, tests, looks = (toy.read_metrics(subject.run, k) for k in ("step", "eval", "internal"))
    n, layer = str(subject.settings.n), target_policy(subject).layer

    def points(records, value):
        return {int(record["step"]): np.float64(value(record)) for record in records}

    with toy.reading(subject.run / "metrics.jsonl"):
        return {
            "dynamics": {
                "training reward": points(steps, lambda r: r["reward"]),
                f"held-out {AVG}, n = {n}": points(tests, lambda r: r["tiers"][n][AVG]),
                "entropy (nats)": points(steps, lambda r: r["policy_entropy"]),
                "length (tokens)": points(steps, lambda r: r["length"]),
            },
            "refinement": {
                "cos($H^l$, $H^L$), target $l$": points(looks, lambda r: r["cos_layer"][layer]),
                "$dH_{Layer}$, target $l$": points(looks, lambda r: r["d_layer"][layer - 1]),
                "perplexity": points(looks, lambda r: r["perplexity"]),
            },
        }


def target_policy(subject: Subject) -> Policy:
    """The policy of a run's phase 1; of a GRPO run, the one that train_toy.pick_target shows."""
    _, content = toy.load_checkpoint(subject.run / "ckpt.pt")
    with toy.reading(subject.run / "ckpt.pt"):
        return Policy(*content["target"])


# ---- lens, sample, step ------------------------------------------------------------------------


def lens(subject: Subject, args):
    """lens.png of one checkpoint, lens.html of all: what each internal policy would say."""
    model = subject.load(subject.chosen)
    tokens, mask = (x[:1] for x in looked_at(subject, model, args))  # of one text
    positions = mask[0].nonzero()[:, 0].tolist()
    words = [subject.word(i) for i in tokens[0, : positions[-1] + 2].tolist()]  # up to its last
    read, said = [words[t] for t in positions], [words[t + 1] for t in positions]
    look = partial(lens_cells, tokens=tokens, mask=mask, word=subject.word)
    cells = {name: look(subject.load(name)) for name in subject.checkpoints}
    data = {"title": "".join(words), "read": read, "said": said, "checkpoints": cells}
    data["logV"] = math.log(model.vocab_size)
    # "<" as an escape, so that no token can end the script that the data stands in
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    page = (Path(__file__).parent / "minibupo_pages" / "lens.html").read_text(encoding="utf-8")
    save(subject.folder / "lens.html", page.replace("DATA", text))
    save(subject.folder / "lens.png", draw_lens(cells[subject.chosen]["raw"], said, data["logV"]))


@torch.no_grad()
def lens_cells(model, tokens, mask, word) -> dict:
    """{"raw", or "normed" for the logit lens: {site: rows}}. A row is a layer, H^0 first, and has
    for each response position [entropy, [token, p], ..] with the five likeliest tokens."""

    def row(h):  # of vectors (M, d)
        logits = minibupo.at_least_float32(model.unembed(h))
        top_p, top_ids = logits.softmax(-1).topk(5)
        cells = zip(minibupo.entropy(logits).tolist(), top_ids.tolist(), top_p.tolist())
        return [[round(H, 2), *([word(i), round(p, 4)] for i, p in zip(*top))] for H, *top in cells]

    traces = list(model.trace(tokens[:, :-1]))
    layers = {site: [getattr(trace, site)[mask] for trace in traces] for site in SITES}
    layers["resid_post"].insert(0, traces[0].resid_pre[mask])  # H^0
    return {
        "raw": {site: [row(h) for h in layers[site]] for site in SITES},
        "normed": {site: [row(model.final_norm(h)) for h in layers[site]] for site in SITES},
    }


def draw_lens(cells: dict, said: list[str], log_vocab: float):
    """The likeliest token by layer and position, bold if it follows, coloured by the entropy."""
    L, M = len(cells["mlp_out"]), len(said)
    size = max(WIDTH, (0.4 if log_vocab < 4 else 0.55) * M + 1), 0.6 * L + 1.5  # words are wider
    figure, axes = plt.subplots(3, figsize=size, sharex=True, height_ratios=(L + 1, L, L))
    titles = "layer policy, $H^l$", "attention policy, $A^l$", "FFN policy, $F^l$"
    for ax, site, title in zip(axes, SITES, titles):
        rows = cells[site]
        H = np.array([[cell[0] for cell in row] for row in rows])
        image = ax.imshow(H, cmap="cividis", vmin=0, vmax=log_vocab, aspect="auto", origin="lower")
        for (i, m), undecided in np.ndenumerate(H):
            token, _ = rows[i][m][1]
            style = dict(ha="center", va="center", size=7, parse_math=False)
            style["weight"] = "bold" if token == said[m] else "normal"
            style["color"] = "white" if undecided < 0.55 * log_vocab else "black"
            ax.text(m, i, token if len(token) < 8 else token[:6] + "…", **style)
        ax.set_yticks(range(len(rows)), [l or "emb." for l in range(L + 1 - len(rows), L + 1)])
        ax.set(ylabel="layer", title=title)
        ax.tick_params(length=0)
    axes[2].set_xticks(range(M), said, parse_math=False)
    axes[2].set_xlabel("response token, to be predicted")
    figure.colorbar(image, ax=axes, label="entropy (nats)", fraction=0.03, pad=0.01)
    return figure


def sample(subject: Subject, args):
    """Print responses of an internal policy to a prompt, and its accuracy beside pi_theta's."""
    model, prompt = subject.load(subject.chosen), args.prompt or "7+5*3-2="
    layer = target_policy(subject).layer if args.layer is None else args.layer
    asked = torch.tensor([subject.encode(prompt, "")[0]], device=model.device)
    options = dict(num_samples=4, eos_id=subject.eos_id)
    options["generator"] = toy.torch_stream(model.device, 0, "sample")
    for name, policy in ((f"layer {layer}", model.truncated(layer)), ("pi_theta", model)):
        print(f"responses of {name} ({subject.chosen}) to {prompt}")
        sampled = policy.generate(asked, subject.limit, **options)
        for row, end in zip(sampled.tokens.tolist(), sampled.end.tolist()):
            print(f"  {subject.decode(row[asked.shape[1] : end])!r}")
        if subject.run:
            results, _ = toy.evaluate(policy, subject.settings, subject.settings.tiers, 128)
            shares = (f"n = {n}: {100 * result[AVG]:.1f}" for n, result in results.items())
            print(f"  {AVG} on 128 held-out problems of each length, in %:", *shares, sep="   ")


WHY = """
Before the step every ratio is 1. So the loss is minus the mean advantage of the tokens: about 0,
however good the responses are. Its gradient is not 0: for a token it is -advantage / tokens times
the gradient of its log-probability. "none": this gradient does not exist, and nothing moves these
weights. E_u is lm_head.weight, or the embedding if tied."""


def step(subject: Subject, args):
    """step.txt: one update on one question, in each phase from the same weights, side by side."""
    model = subject.load(subject.chosen)
    target = target_policy(subject) if args.layer is None else Policy(args.layer)
    rollouts = one_question(subject, model, args)
    lr = subject.settings.lr if subject.settings else 1e-6  # the paper's, for a language model
    numbers1, tokens1 = one_step(copy.deepcopy(model), rollouts, target, lr)
    numbers2, tokens2 = one_step(copy.deepcopy(model), rollouts, FULL, lr)
    words = [[subject.word(i) for i in row] for row in rollouts.tokens.tolist()]
    P, ends = int(rollouts.prompt_len[0]), rollouts.end.tolist()
    advantages = minibupo.group_advantages(rollouts.rewards)[0]
    lines = [f"question {''.join(words[0][:P])}", "", "reward  advantage   response"]
    for R, A, row, end in zip(rollouts.rewards[0], advantages, words, ends):
        lines.append(f"{R:6g}{A:+11.3f}   {''.join(row[P:end])}")
    rows = (f"{label:35}{numbers1[label]:>26}{numbers2[label]:>26}".rstrip() for label in numbers1)
    lines += ["", *rows]
    for i in (int(advantages.argmax()), int(advantages.argmin())):  # a best and a worst response
        lines += ["", "token     advantage" + "    old log p  new log p     ratio  cut off" * 2]
        for t in range(P - 1, ends[i] - 1):
            lines.append(f"{words[i][t + 1]:10}{advantages[i]:+9.3f}{tokens1[i, t]}{tokens2[i, t]}")
    text = "\n".join([*lines, WHY])
    print(text)
    save(subject.folder / "step.txt", text)


def one_question(subject: Subject, model, args) -> Rollouts:
    """The question of --prompt, --responses, --rewards; or a run's first one of mixed outcomes."""
    if not (args.prompt or args.responses or args.rewards):
        batch = toy.rollouts(subject.settings, model, step=1)
        # where none is mixed, one_step says so
        q, G = int((batch.rewards.std(1) > 0).float().argmax()), subject.settings.group
        return Rollouts(*(x[q * G : (q + 1) * G] for x in batch[:3]), batch.rewards[q : q + 1])
    if not (args.prompt and args.responses and len(args.responses) == len(args.rewards or [])):
        raise ValueError("step takes a prompt, --responses and as many --rewards, or none of them")
    rows, prompt_len = zip(*(subject.encode(args.prompt, text) for text in args.responses))
    tokens, end = toy.padded(list(rows), model.device, value=0)
    prompt_len = torch.tensor(prompt_len, device=model.device)
    return Rollouts(tokens, prompt_len, end, torch.tensor([args.rewards], device=model.device))


def one_step(model, rollouts: Rollouts, policy: Policy, lr: float) -> tuple[dict, dict]:
    """minibupo.update by one mini-batch, and all that it goes by, as text: {label: value} for the
    step, {(i, t): columns} for tokens[i, t + 1]. Raises ValueError where all rewards are equal."""
    tokens, prompt_len, end, rewards = rollouts
    mask = response_mask(prompt_len, end, tokens.shape[1])
    advantages = minibupo.group_advantages(rewards)[0].to(tokens.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    old = minibupo.token_logprobs(model, tokens, mask, policy).detach()
    # the norm is not clipped, to show the true one; AdamW's first step hardly depends on its size
    log = minibupo.update(model, optimizer, rollouts, policy, minibatches=1, max_grad_norm=math.inf)
    if log["optimizer_steps"] == 0:
        raise ValueError("all rewards are equal: no response has an advantage, nothing is learned")
    new = minibupo.token_logprobs(model, tokens, mask, policy).detach().requires_grad_()
    phase = "2: pi_theta" if policy == FULL else f"1: {policy.site}, layer {policy.layer}"
    numbers = {"": f"phase {phase}"}
    for when, logp in (("before", old), ("after", new)):
        loss, cut_off = minibupo.surrogate(logp, old, advantages, mask)
        ratio = (logp - old).exp()
        numbers[f"loss {when} the step"] = f"{loss:.5f}"
        numbers[f"ratios {when} the step"] = f"{ratio[mask].min():.3g} .. {ratio[mask].max():.3g}"
        numbers[f"tokens cut off {when} the step"] = f"{cut_off} of {mask.sum()}"
    numbers["gradient norm of"] = ""
    for part, norm in gradient_norms(model).items():
        numbers[f"  {part}"] = "none" if norm is None else f"{norm:.4f}"
    # `loss` is that after the step: a token that the clip has cut off has no gradient
    [gradient] = torch.autograd.grad(loss, new)
    columns = {}
    for i, t in mask.nonzero().tolist():
        cut = "yes" if gradient[i, t] == 0 else "no"
        columns[i, t] = f"{old[i, t]:13.4f}{new[i, t]:11.4f}{ratio[i, t]:10.3g}{cut:>9}"
    return numbers, columns


def gradient_norms(model) -> dict[str, float | None]:
    """The gradient's norm by layer, and by parameter outside the layers; None without gradient."""
    norms = {}
    for name, parameter in model.named_parameters():
        number = re.search(r"\.(\d+)\.", name)  # of the layer, from 0
        part = f"layer {int(number[1]) + 1}" if number else name
        norms.setdefault(part, None)
        if parameter.grad is not None:
            norms[part] = math.hypot(norms[part] or 0.0, parameter.grad.norm())
    return norms


# ---- housekeeping: all of a run, files, the command line ---------------------------------------


def everything(subject: Subject, args):
    """All of a run but samples: of its base in `folder`, of the trained model in folder/final."""
    trained = replace(subject, chosen="final")
    for each in (subject, replace(trained, folder=subject.folder / "final")):
        writes(each, args)
    lens(trained, args)
    dynamics(subject, args)
    step(subject, args)


def curve(ax, first: int, values, colour, label=None):
    """The mean of values (layers, M) over positions by layer, and their middle half as a band."""
    layers = range(first, first + len(values))
    ax.fill_between(layers, *np.quantile(values, (0.25, 0.75), 1), color=colour, alpha=0.18, lw=0)
    ax.plot(layers, values.mean(1), "o-", color=colour, label=label)
    ax.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
    ax.set_xlabel("layer" if first else "layer (0: embedding)")


def save(path: Path, content):
    """Write a text or a figure, whole or not at all, and say so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        toy.write_text(path, content)
    else:
        toy.write_atomically(path, partial(content.savefig, format="png"))
        plt.close(content)
    print(f"wrote {path}")


COMMANDS = {  # the function of each, and which of the options it has that not all have
    "all": (everything, ()),
    "entropy": (entropy, ("prompt", "text", "checkpoint")),
    "dynamics": (dynamics, ()),
    "writes": (writes, ("prompt", "text", "checkpoint")),
    "lens": (lens, ("prompt", "text", "checkpoint")),
    "sample": (sample, ("prompt", "layer", "checkpoint")),
    "step": (step, ("prompt", "layer", "responses", "rewards", "checkpoint")),
}


def parse_arguments(argv) -> argparse.Namespace:
    """The command line. Ends with a sentence for an option that the command does not have."""
    style = dict(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = argparse.ArgumentParser("analyze.py", **style, allow_abbrev=False)
    add = parser.add_argument
    add("command", choices=COMMANDS)
    add("run", metavar="RUN", help="directory of a run, or a language model")
    add("--prompt", help="such as 7+5*3-2=")
    add("prompt", metavar="PROMPT", nargs="?", default=argparse.SUPPRESS, help="the same")
    add("--text", help="look at this response (default: the model's own)")
    add("--layer", type=int, help="of sample and step, 1..L (default: that of phase 1)")
    add("--responses", nargs="+", help="of step: a group of responses to the prompt")
    add("--rewards", nargs="+", type=float, help="of step: their rewards")
    add("--checkpoint", choices=CHECKPOINTS, help="of a run (default: final of lens, sample)")
    add("--out", type=Path, metavar="DIR", help="where to write (default: RUN/figures)")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--dtype", default="float32", help="of a language model: float32, bfloat16, float16")
    args = parser.parse_intermixed_args(argv)
    for name in sorted({option for _, options in COMMANDS.values() for option in options}):
        if getattr(args, name) is not None and name not in COMMANDS[args.command][1]:
            parser.error(f"{args.command} has no {name}")
    return args


def read_subject(args) -> Subject:
    """The run or language model that a command is about. Raises ValueError for neither."""
    path = Path(args.run)
    on_the_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", args.run) and not path.parent.exists()
    if path.is_file() or on_the_hub or list(path.glob("*.safetensors")):
        if args.command in ("all", "dynamics") or args.checkpoint:
            raise ValueError("all, dynamics and --checkpoint are of a run, not of a language model")
        if args.prompt is None or (args.layer is None and args.command in ("sample", "step")):
            raise ValueError("a language model needs a prompt, and --layer to sample or step")
        subject = read_language_model(args.run, args.dtype, args.device)
    elif path.is_dir():
        default = "final" if args.command in ("lens", "sample") else "base"
        subject = read_run(path, args.checkpoint or default, args.device)
    else:
        raise ValueError(f"{args.run} is neither a run nor a language model")
    subject.folder = args.out or subject.folder / (args.checkpoint or "")
    return subject


def main(argv=None) -> int:
    """Run the command line. Returns 0, or 2 for bad input."""
    args = parse_arguments(argv)
    try:
        with plt.style.context(STYLE):
            COMMANDS[args.command][0](read_subject(args), args)
        return 0
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"analyze.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
