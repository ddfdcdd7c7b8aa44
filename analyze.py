"""Look inside one model or one run: what its internal policies are, and what training changes.

    python analyze.py all RUN                   everything about a run, written to RUN/figures
    python analyze.py entropy RUN               entropy by layer and how it changes (Fig. 2, 3)
    python analyze.py writes RUN                the same and each write's cosine with its stream
    python analyze.py dynamics RUN              training (Fig. 4, 7) and feature refinement (Fig. 5)
    python analyze.py lens RUN "7+5*3-2="       what each internal policy would say next
    python analyze.py live RUN [OTHER_RUN]      a page in which the policies answer what you type
    python analyze.py sample RUN "7+5*3-2=" --layer 4    answers sampled from an internal policy
    python analyze.py step RUN                  an update of each phase, token by token

Every command except `all`, `dynamics` and `live` also accepts a language model in place of RUN: a
name on the Hugging Face hub (OWNER/NAME), a directory with safetensors, or a .gguf file. This needs
the extra `hf`. In Python, each command is a function of the same name, and `all` is `everything`:

    run = analyze.Run("out/bupo-seed0", checkpoint="final")
    analyze.lens(run, "7+5*3-2=")

The numbers of figures are the paper's. Entropies are in nats, at temperature 1. H^0 is the output
of the embedding, before the first layer.
"""

import argparse
import base64
import copy
import io
import json
import math
import os
import re
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import minibupo
import train_toy as toy
from minibupo import FULL, SITES, Policy, Rollouts, response_mask
from model import at_least_float32

# One colour for each thing, in every figure.
LAYER = "C0"
FFN = "C1"
ATTENTION = "C2"
NORMED = "C3"
MATCHED = "C5"
GREY = "0.45"
WIDTH = 7.0  # inches: both columns of a two-column page
STYLE = [
    "seaborn-v0_8-paper",
    "seaborn-v0_8-colorblind",
    {
        "figure.constrained_layout.use": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 8,
        "legend.frameon": False,
        "lines.markeredgewidth": 1,
        "savefig.dpi": 200,
        "text.usetex": False,
    },
]
styled = style.context(STYLE)  # a decorator: figures made inside the function have this style

CHECKPOINTS = {"base": "base.pt", "phase1": "phase1.pt", "final": "ckpt.pt"}
ALGORITHMS = {"bupo": "BuPO", "grpo": "GRPO"}
AVERAGE = f"avg@{toy.SAMPLES}"
ACCURACY_FROM = 128  # the most problems of each size that `sample` measures accuracy on
ANSWER_TOKENS = 48  # the most tokens that a language model may answer with
PAPER_LR = 1e-6  # the learning rate of `step` for a language model

# ---- what to look at: a run or a language model ------------------------------------------------


class Run:
    """A run of train_toy.py, read from its directory. Raise ValueError if there is none.

    `checkpoint` names the model to look at ("base", "phase1" or "final"); figures go to `folder`.
    """

    def __init__(self, path, checkpoint="base", device="auto", folder=None):
        self.path = Path(path)
        self.settings = toy.read_settings(self.path)
        self.device = toy.pick_device(device)
        self.checkpoint = checkpoint
        # the checkpoints that this run has, in the order of training
        files = {name: self.path / file for name, file in CHECKPOINTS.items()}
        self.checkpoints = [name for name, file in files.items() if file.is_file()]
        self.folder = Path(folder or self.path / "figures")
        self.eos_id = toy.EOS
        self.response_limit = self.settings.response_limit
        self.decode = toy.ENCODING.decode
        torch.set_num_threads(self.settings.threads)

    def file_of(self, name: str) -> Path:
        """Return the file of a checkpoint. Raise ValueError if the run does not have it."""
        if name not in self.checkpoints:
            found = ", ".join(self.checkpoints) or "none"
            missing = self.path / CHECKPOINTS.get(name, name)
            raise ValueError(f"{missing} is missing; the checkpoints of this run are: {found}")
        return self.path / CHECKPOINTS[name]

    def load(self, name=None):
        """Return the model of a checkpoint, by default the chosen one."""
        return toy.load_model(self.file_of(name or self.checkpoint), self.device)

    def encode(self, prompt: str, response: str):
        """Return the token ids of prompt and response, and how many belong to the prompt."""
        return toy.encode(prompt + response), len(toy.encode(prompt))

    def own_text(self, model):
        """Return tokens and mask of the model's own solutions of held-out problems."""
        return toy.own_solutions(model, self.settings)

    def own_prompt(self) -> str:
        """Return the first of these problems as a prompt."""
        s = self.settings
        return toy.evaluation_problems(toy.rng_for(s.seed, "text"), s.n, 1)[0] + "="

    def target_policy(self) -> Policy:
        """Return the policy of phase 1; for a GRPO run, the one that its log follows."""
        path = self.file_of("final")
        _, content = toy.load_checkpoint(path)
        with toy.reading(path):
            return Policy(*content["target"])

    def first_mixed_question(self, model) -> Rollouts:
        """Return the first question of step 1 that has correct and incorrect responses."""
        batch = toy.rollouts(self.settings, model, step=1)
        G = self.settings.group
        # if no question is mixed, this is the first one, and one_step raises an error
        q = int((batch.rewards.std(1) > 0).float().argmax())
        rows = slice(q * G, (q + 1) * G)
        return Rollouts(
            batch.tokens[rows], batch.prompt_len[rows], batch.end[rows], batch.rewards[q : q + 1]
        )


class PretrainedModel:
    """A language model, read by minibupo_hf/adapter.py. It has no checkpoints but itself.

    Raise ValueError or ImportError if it is not readable.
    """

    def __init__(self, source: str, dtype="float32", device="auto", folder=None):
        from minibupo_hf.adapter import encode_chat, load

        self.model, tokenizer = load(source, dtype, toy.pick_device(device))
        self.checkpoint = Path(source).name.removesuffix(".gguf")
        self.checkpoints = [self.checkpoint]
        self.folder = Path(folder or Path("out") / self.checkpoint / "figures")
        # Without an EOS of the tokenizer, a response ends with those of generation_config only.
        self.eos_id = [] if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        self.response_limit = ANSWER_TOKENS
        self.encode = partial(encode_chat, tokenizer)
        self.decode = tokenizer.decode

    def load(self, name=None):
        """Return the model."""
        return self.model

    def own_text(self, model=None):
        """Raise ValueError: there are no held-out problems to solve."""
        raise ValueError("a language model needs a prompt")

    def target_policy(self):
        """Raise ValueError: no phase 1 has chosen a layer."""
        raise ValueError("a language model needs a layer to sample from or to train")

    own_prompt = own_text
    first_mixed_question = own_text


Subject = Run | PretrainedModel


def visible(subject: Subject, token: int) -> str:
    """Return the text of one token, with a dot for a space and escapes for invisible characters."""
    return repr(subject.decode([token]))[1:-1].replace(" ", "·")


def tokens_to_look_at(subject: Subject, model, prompt=None, text=None):
    """Return tokens (N, T) and the mask (N, T-1) of the responses to look at.

    The response is `text` or, without it, the model's greedy answer to the prompt. With neither
    prompt nor text, these are a run's own solutions of held-out problems. Raise ValueError for an
    empty response.
    """
    if prompt is None and text is None:
        return subject.own_text(model)

    check_prompt(subject, prompt)
    refuse_empty(text, "response")
    ids, prompt_len = subject.encode(prompt or "", text or "")
    tokens = torch.tensor([ids], device=model.device)
    if text is None:
        answer = model.generate(
            tokens, subject.response_limit, temperature=0, eos_id=subject.eos_id
        )
        tokens = answer.tokens

    T = max(1, tokens.shape[1])  # a text without tokens has no positions
    mask = response_mask(torch.tensor([prompt_len]), torch.tensor([T]), T).to(model.device)
    if not mask.any():
        raise ValueError("there is no response to look at: without a prompt, it needs two tokens")
    return tokens, mask


def check_prompt(subject: Subject, prompt: str | None):
    """Raise ValueError for an empty prompt. Print a note if a problem of a run does not end."""
    refuse_empty(prompt, "prompt")
    if isinstance(subject, Run) and prompt is not None and "=" not in prompt:
        print(f'the problem {prompt} does not end with "=", so the model may add to it')


def refuse_empty(text: str | None, name: str):
    """Raise ValueError for a text that is given but empty."""
    if text == "":
        raise ValueError(f"the {name} is empty")


# ---- entropy (Fig. 2, 3) and writes (Appendix B.2) ---------------------------------------------


def entropy(subject: Subject, prompt=None, text=None) -> dict:
    """Write the entropy of each policy: entropy.json, entropy_flow.png, entropy_change.png.

    Return what look_inside measures. For each measure the file has the mean over positions, its
    standard error (_sem) and the median (_median), because a few positions can dominate a mean.
    """
    model = subject.load()
    tokens, mask = tokens_to_look_at(subject, model, prompt, text)
    found = minibupo.look_inside(model, tokens, mask)
    found = {name: values.cpu().double().numpy() for name, values in found.items()}

    M = found["layer"].shape[1]  # response positions
    log_vocab = math.log(model.vocab_size)
    summary = {"positions": M, "log_vocab": log_vocab, "target_layer": None}
    for name, values in found.items():
        summary[name] = values.mean(1).tolist()
        summary[f"{name}_sem"] = (values.std(1, ddof=1) / M**0.5).tolist() if M > 1 else None
        summary[f"{name}_median"] = np.median(values, axis=1).tolist()
    try:
        summary["target_layer"] = minibupo.target_layer(summary["dH_mlp"])
    except ValueError as error:
        print(f"no target layer: {error}")
    target = summary["target_layer"]
    print(f"{subject.checkpoint}: {M} response positions, target layer {target}")

    save(subject.folder / "entropy.json", json.dumps(summary, indent=1))
    save(subject.folder / "entropy_flow.png", draw_flow(found, log_vocab))
    save(subject.folder / "entropy_change.png", draw_change(found, target))
    return found


def writes(subject: Subject, prompt=None, text=None) -> dict:
    """Do what `entropy` does, and write writes.png: the cosine of each write with its stream."""
    found = entropy(subject, prompt, text)
    titles = {"cos_attn": "what attention writes", "cos_mlp": "what the FFN writes"}
    ylabel = "cosine with the stream\nbelow 0: suppresses\nabove 0: amplifies"
    save(subject.folder / "writes.png", draw_signed(found, titles, ylabel))
    return found


@styled
def draw_flow(found: dict, log_vocab: float) -> Figure:
    """Return the entropy flow (Fig. 2): the entropy of each internal policy by layer.

    Each vertical line is one module. It goes from the entropy of its input, the normed stream, to
    that of its output; the difference is dH. The lower panel shows the norm of the stream.
    """
    figure = Figure(figsize=(WIDTH, 4.6))
    ax, below = figure.subplots(2, sharex=True, height_ratios=(4, 1))
    plot_by_layer(ax, 0, found["layer"], LAYER, "$H^l$")
    normed = found["layer_normed"].mean(1)
    ax.plot(normed, "--", color=NORMED, label="$H^l$ with the final norm")
    matched = found["layer_matched"].mean(1)
    ax.plot(matched, "--", color=MATCHED, label="$H^l$ scaled to the norm of $H^L$")

    # layer l is between l - 1 and l on the axis: first attention, then the FFN
    plot_modules(ax, found["attn_in"], found["attn"], 1 / 3, "^", ATTENTION, "attention")
    plot_modules(ax, found["mlp_in"], found["mlp"], 2 / 3, "s", FFN, "FFN")
    ax.axhline(log_vocab, color=GREY, linewidth=0.8, linestyle=":", label="uniform distribution")
    ax.set(ylabel="entropy (nats)", ylim=(0, 1.08 * log_vocab), xlabel="")
    figure.legend(ncols=3, loc="outside upper center")

    plot_by_layer(below, 0, found["rms_layer"], LAYER)
    norms = found["rms_layer"].mean(1)
    below.set_yscale("log")
    shown = [norms.min(), norms[1], norms.max()]
    below.set_yticks(shown, [f"{norm:.2g}" for norm in shown])
    below.minorticks_off()
    below.set_ylabel("RMS of $H^l$\n(log scale)")
    return figure


def plot_modules(ax, read, written, offset: float, marker: str, colour: str, name: str):
    """Draw a vertical line for each layer's module, from its input's entropy to its output's."""
    x = np.arange(len(read)) + offset
    read = read.mean(1)
    written = written.mean(1)
    ax.vlines(x, read, written, color=colour)
    ax.plot(x, read, marker, color=colour, mfc="white", ms=8, label=f"{name}: input")
    ax.plot(x, written, marker, color=colour, label=f"{name}: output")


def draw_change(found: dict, target: int | None) -> Figure:
    """Return how attention, FFN and layer change entropy, by layer (Fig. 3)."""
    titles = {
        "dH_attn": "attention: $dH_{ATTN}$",
        "dH_mlp": f"FFN: $dH_{{FFN}}$ (target layer: {target or 'none'})",
        "dH_layer": "layer: $dH_{Layer}$",
    }
    ylabel = "entropy change (nats)\nbelow 0: converges\nabove 0: explores"
    return draw_signed(found, titles, ylabel)


@styled
def draw_signed(found: dict, titles: dict, ylabel: str) -> Figure:
    """Return a panel by layer for each measure in {name: title}."""
    figure = Figure(figsize=(WIDTH, 2.4))
    axes = figure.subplots(1, len(titles), sharey=True)
    for ax, (name, title), colour in zip(axes, titles.items(), (ATTENTION, FFN, LAYER)):
        ax.axhline(0, color="black", linewidth=0.6)
        plot_by_layer(ax, 1, found[name], colour)
        ax.set_title(title)
    axes[0].set_ylabel(ylabel)
    return figure


def plot_by_layer(ax, first: int, values, colour, label=None):
    """Draw the mean of values (layers, M) over positions, and the middle half as a band."""
    layers = range(first, first + len(values))
    low, high = np.quantile(values, (0.25, 0.75), axis=1)
    ax.fill_between(layers, low, high, color=colour, alpha=0.18, lw=0)
    ax.plot(layers, values.mean(1), "o-", color=colour, label=label)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("layer" if first else "layer (0: embedding)")


# ---- dynamics (Fig. 4, 5, 7) -------------------------------------------------------------------


def dynamics(run: Run):
    """Write dynamics.png and refinement.png; a dotted line marks the start of phase 2."""
    for name, panels in read_training(run).items():
        save(run.folder / f"{name}.png", draw_training(panels, run.settings.s_inter))


def read_training(run: Run) -> dict:
    """Return the curves of a run: {figure: {title: {step: value}}}.

    Raise ValueError for damaged metrics.
    """
    steps = toy.read_metrics(run.path, "step")
    evaluations = toy.read_metrics(run.path, "eval")
    measurements = toy.read_metrics(run.path, "internal")
    n = run.settings.n
    target = run.target_policy().layer

    def curve(records, value):
        return {int(record["step"]): np.float64(value(record)) for record in records}

    with toy.reading(run.path / "metrics.jsonl"):
        return {
            "dynamics": {
                "training reward": curve(steps, lambda r: r["reward"]),
                f"held-out accuracy, {n} digits": curve(
                    evaluations, lambda r: r["tiers"][str(n)][AVERAGE]
                ),
                r"entropy of $\pi_\theta$ (nats)": curve(steps, lambda r: r["policy_entropy"]),
                "response length (tokens)": curve(steps, lambda r: r["length"]),
            },
            "refinement": {
                "cosine of $H^l$ and $H^L$, target layer": curve(
                    measurements, lambda r: r["cos_layer"][target]
                ),
                "$dH_{Layer}$ (nats), target layer": curve(
                    measurements, lambda r: r["dH_layer"][target - 1]
                ),
                "perplexity of the base's solutions": curve(
                    measurements, lambda r: r["perplexity"]
                ),
            },
        }


@styled
def draw_training(panels: dict, s_inter: int) -> Figure:
    """Return a panel for each curve of {title: {step: value}}."""
    figure = Figure(figsize=(WIDTH, 2.2))
    for ax, (title, curve) in zip(figure.subplots(1, len(panels)), panels.items()):
        # show where a curve was measured; do not guess what a few points have in between
        marker = "o" if len(curve) <= 20 else ""
        line = "-" if len(curve) > 5 else ""
        ax.plot(list(curve), list(curve.values()), marker=marker, ms=3, linestyle=line)
        if s_inter:
            ax.axvline(s_inter + 0.5, color=GREY, lw=0.8, ls=":")
        ax.set(title=title, xlabel="step")
    return figure


# ---- lens --------------------------------------------------------------------------------------

PAD_NOTE = (
    "<pad> fills up the short rows of a batch. No policy is trained to say it, but it has a row in "
    "E_u like every other token, so an internal policy can prefer it."
)


def lens(subject: Subject, prompt=None, text=None):
    """Write what each internal policy would say next: lens.png of the chosen checkpoint, and
    lens.html of all checkpoints."""
    page = lens_data(subject, prompt, text)
    save(subject.folder / "lens.html", web_page("lens.html", page))
    save(subject.folder / "lens.png", draw_lens(page, subject.checkpoint))


def lens_data(subject: Subject, prompt=None, text=None) -> dict:
    """Return everything that the lens shows, of all checkpoints."""
    model = subject.load()
    tokens, mask = tokens_to_look_at(subject, model, prompt, text)
    tokens = tokens[:1]
    mask = mask[:1]
    word = partial(visible, subject)
    positions = mask[0].nonzero()[:, 0].tolist()
    words = [word(token) for token in tokens[0, : positions[-1] + 2].tolist()]
    cells = {
        name: lens_cells(subject.load(name), tokens, mask, word) for name in subject.checkpoints
    }

    return {
        "prompt": "".join(words[: positions[0] + 1]),
        "tokens": [words[t] for t in positions],
        "next_tokens": [words[t + 1] for t in positions],
        "checkpoints": cells,
        "log_vocab": math.log(model.vocab_size),
        "note": PAD_NOTE if '"<pad>"' in json.dumps(cells) else "",
    }


@torch.no_grad()
def lens_cells(model, tokens, mask, word) -> dict:
    """Return what the page shows of one model: {"raw" or "normed": {site: rows}}.

    "normed" is the logit lens. A row is a layer, H^0 first. It has a cell for each response
    position: [entropy, [word, probability], ...] with the five likeliest tokens.
    """

    def row(h):  # of vectors (M, d)
        logits = at_least_float32(model.unembed(h))
        entropies = minibupo.entropy(logits).tolist()
        top_p, top_ids = logits.softmax(-1).topk(5)
        cells = []
        for nats, ids, probabilities in zip(entropies, top_ids.tolist(), top_p.tolist()):
            likeliest = [[word(i), round(p, 4)] for i, p in zip(ids, probabilities)]
            cells.append([round(nats, 2), *likeliest])
        return cells

    traces = list(model.trace(tokens[:, :-1]))
    layers = {site: [getattr(trace, site)[mask] for trace in traces] for site in SITES}
    layers["resid_post"].insert(0, traces[0].resid_pre[mask])  # H^0
    return {
        "raw": {site: [row(h) for h in layers[site]] for site in SITES},
        "normed": {site: [row(model.final_norm(h)) for h in layers[site]] for site in SITES},
    }


def web_page(name: str, data: dict) -> str:
    """Return a page of minibupo_pages in one piece, with its scripts, its style and its data."""
    folder = Path(__file__).parent / "minibupo_pages"

    def read(file: str) -> str:
        return (folder / file).read_text(encoding="utf-8")

    def script(match) -> str:
        return f"<script>\n{read(match[1])}</script>"

    def style_sheet(match) -> str:
        return f"<style>\n{read(match[1])}</style>"

    page = re.sub(r'<script src="(.+?)"></script>', script, read(name))
    page = re.sub(r'<link rel="stylesheet" href="(.+?)">', style_sheet, page)
    # "<" becomes an escape, so that no token can end the script element that holds the data
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return page.replace("DATA", text)


@styled
def draw_lens(page: dict, checkpoint: str, sites=SITES) -> Figure:
    """Return a picture of one checkpoint: the likeliest token by layer and position.

    It has a panel for the policies of each of `sites`.
    """
    cells = {site: page["checkpoints"][checkpoint]["raw"][site] for site in sites}
    L = len(page["checkpoints"][checkpoint]["raw"]["mlp_out"])
    M = len(page["next_tokens"])
    # in inches; the words of a language model are wider
    column = 0.4 if page["log_vocab"] < 4 else 0.55
    heights = [len(rows) for rows in cells.values()]
    figure = Figure(figsize=(max(WIDTH, column * M + 1), 0.2 * sum(heights) + 2))
    axes = figure.subplots(len(sites), sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    prompt = shortened(page["prompt"], 60)
    when = {"base": "before training", "phase1": "after phase 1", "final": "after training"}
    title = (
        f"What each internal policy would say after {prompt} ({when.get(checkpoint, checkpoint)})"
    )
    figure.suptitle(title, size=9, parse_math=False)
    titles = {
        "resid_post": "policy of the stream, $H^l$",
        "attn_out": "policy of attention, $A^l$",
        "mlp_out": "policy of the FFN, $F^l$",
    }
    for ax, (site, rows) in zip(axes, cells.items()):
        image = draw_cells(ax, rows, page["next_tokens"], page["log_vocab"])
        first = L + 1 - len(rows)  # 0 for the stream, which has H^0
        ax.set_yticks(range(L + 1 - first), [l or "emb." for l in range(first, L + 1)])
        ax.set(ylabel="layer", title=titles[site])
        ax.tick_params(length=0)
    axes[-1].set_xticks(range(M), page["next_tokens"], parse_math=False)
    axes[-1].set_xlabel("token of the response (bold: the policy finds it likeliest)")
    figure.colorbar(image, ax=axes, label="entropy (nats)", fraction=0.03, pad=0.01)
    likeliest = [cell[1][0] for rows in cells.values() for row in rows for cell in row]
    if "<pad>" in likeliest:
        figure.supxlabel(page["note"], size=6, color=GREY)
    return figure


def draw_cells(ax, rows: list, next_tokens: list[str], log_vocab: float):
    """Draw a cell for each layer and position, coloured by entropy, with its likeliest token."""
    nats = np.array([[cell[0] for cell in row] for row in rows])
    image = ax.imshow(nats, cmap="cividis", vmin=0, vmax=log_vocab, aspect="auto", origin="lower")
    for i, row in enumerate(rows):
        for m, (entropy, likeliest, *_) in enumerate(row):
            ax.text(
                m,
                i,
                shortened(likeliest[0], 7),
                ha="center",
                va="center",
                size=7,
                parse_math=False,
                weight="bold" if likeliest[0] == next_tokens[m] else "normal",
                color="white" if entropy < 0.55 * log_vocab else "black",
            )
    return image


def shortened(text: str, length: int) -> str:
    """Return the text, cut and ended by a mark if it is longer than this."""
    return text if len(text) <= length else text[: length - 1] + "…"


# ---- live --------------------------------------------------------------------------------------


def live(run: Run, other=None):
    """Write live.html, a page in which the policies of a run answer what the reader types.

    The page holds the checkpoints of the run, and the final model of another run if its directory
    `other` is given. Weights are rounded to float16. Raise ValueError if the models have different
    sizes.
    """
    if not hasattr(toy, "OPERATORS"):
        raise ValueError("the page of live is for a task with OPERATORS on digits")
    target = run.target_policy().layer
    other = None if other is None else Run(other, "final", "cpu")
    models = live_models(run, other)
    labels = live_labels(run, other)
    rounded = {key: rounded_to_float16(model) for key, model in models.items()}
    note = rounding_note(run, models, rounded)
    base = rounded["base"]
    page = {
        "words": [run.decode([token]) for token in range(base.vocab_size)],
        "eos": run.eos_id,
        "limit": run.response_limit,
        "results": operation_table(),
        "target": target if run.settings.s_inter > 0 else None,
        "chosen": run.settings.layer is not None,  # by hand, not by the rule
        "rule": rule_data(run, models["base"]),
        "rounded": note,
        "config": asdict(base.cfg),
        "sizes": [[name, weight.numel()] for name, weight in base.named_parameters()],
        "checkpoints": [
            {"key": key, "label": labels[key], "weights": float16_text(model)}
            for key, model in rounded.items()
        ],
    }
    text = web_page("live.html", page)
    print(f"{note}\n{len(text) / 1e6:.1f} MB")
    save(run.folder / "live.html", text)


def live_models(run: Run, other: Run | None) -> dict:
    """Return {key: model} of all models of the page, in the order of its slider."""
    names = [name for name in CHECKPOINTS if name in run.checkpoints or name == "base"]
    models = {name: run.load(name).cpu() for name in names}
    if other is not None:
        models["other"] = other.load()
        if models["other"].cfg != models["base"].cfg:
            raise ValueError(f"the models of {other.path} and {run.path} have different sizes")
    return models


def live_labels(run: Run, other: Run | None) -> dict:
    """Return {key: what the page calls this model}."""
    algorithm = ALGORITHMS[run.settings.algo]
    labels = {
        "base": "base",
        "phase1": f"{algorithm}, after phase 1",
        "final": f"{algorithm}, final",
    }
    if other is not None:
        labels["other"] = f"{ALGORITHMS[other.settings.algo]}, final"
        if labels["other"] == labels["final"]:
            labels["other"] += f" ({other.path.name})"
    return labels


def operation_table() -> dict:
    """Return {operator: text} whose character 10 a + b is the result for the digits a and b."""
    pairs = [(a, b) for a in range(10) for b in range(10)]
    return {
        operator: "".join(toy.careful(f"{a}{operator}{b}")[-1] for a, b in pairs)
        for operator in toy.OPERATORS
    }


def rule_data(run: Run, base) -> dict:
    """Return what the rule of phase 1 sees: dH_FFN of the base by layer, with standard errors.

    It is measured on the problems that the run used and, as "more", on up to 512 problems, which
    shows whether the rule would name the same layer again.
    """

    def measured(tokens, mask) -> dict:
        dH_mlp = minibupo.look_inside(base, tokens, mask)["dH_mlp"].double()
        M = dH_mlp.shape[1]  # response positions
        return {
            "problems": len(tokens),
            "positions": M,
            "dH_mlp": dH_mlp.mean(1).tolist(),
            "sem": (dH_mlp.std(1) / M**0.5).tolist(),  # as in entropy.json
        }

    more = toy.own_solutions(base, run.settings, count=min(512, toy.supply(run.settings.n)))
    return measured(*run.own_text(base)) | {"more": measured(*more)}


def rounded_to_float16(model):
    """Return a copy whose weights are rounded to float16. Raise ValueError if one is too large."""
    rounded = copy.deepcopy(model)
    for name, weight in rounded.named_parameters():
        weight.data = weight.data.half().float()
        if not weight.isfinite().all():
            raise ValueError(f"{name} has a value that float16 does not have")
    return rounded


def float16_text(model) -> str:
    """Return all weights one after another as float16, little-endian, in base64."""
    weights = torch.cat([weight.detach().flatten() for weight in model.parameters()])
    return base64.b64encode(weights.numpy().astype("<f2").tobytes()).decode()


@torch.no_grad()
def rounding_note(run: Run, models: dict, rounded: dict) -> str:
    """Return a text that says how often rounding changes the likeliest token of a policy."""
    L = models["base"].n_layer
    internal = [Policy(layer, site) for site in SITES for layer in range(1, L + 1)]
    changed = {"pi_theta": [], "internal": []}
    for key, model in models.items():
        tokens, mask = run.own_text(model)
        for policy in (FULL, *internal):
            before = minibupo.policy_logits(model, tokens[:, :-1], policy, mask).argmax(-1)
            after = minibupo.policy_logits(rounded[key], tokens[:, :-1], policy, mask).argmax(-1)
            changed["pi_theta" if policy == FULL else "internal"].append(before != after)

    shares = {}
    for name, parts in changed.items():
        differs = torch.cat(parts)
        shares[name] = f"{differs.sum():,} of {len(differs):,} times ({differs.float().mean():.2%})"
    return (
        "The weights are rounded to float16. On the models' own solutions of held-out problems, "
        f"this changes the likeliest token of pi_theta {shares['pi_theta']}, and that of an "
        f"internal policy {shares['internal']}."
    )


# ---- sample ------------------------------------------------------------------------------------


def sample(subject: Subject, prompt=None, layer=None):
    """Print responses of an internal policy and of pi_theta; for a run, their accuracy as well."""
    prompt = subject.own_prompt() if prompt is None else prompt
    check_prompt(subject, prompt)
    model = subject.load()
    layer = subject.target_policy().layer if layer is None else layer
    ids, _ = subject.encode(prompt, "")
    generator = toy.torch_rng_for(model.device, 0, "sample")
    for name, policy in ((f"layer {layer}", model.truncated(layer)), ("pi_theta", model)):
        print(f"responses of {name} ({subject.checkpoint}) to {prompt}")
        sampled = policy.generate(
            torch.tensor([ids], device=model.device),
            subject.response_limit,
            num_samples=4,
            eos_id=subject.eos_id,
            generator=generator,
        )
        for row, end in zip(sampled.tokens.tolist(), sampled.end.tolist()):
            print(f"  {subject.decode(row[len(ids) : end])!r}")
        if isinstance(subject, Run):
            print_accuracy(subject, policy)


def print_accuracy(run: Run, policy):
    """Print a policy's accuracy on held-out problems of each number of digits."""
    count = min(ACCURACY_FROM, run.settings.eval_problems)  # a task may not have more
    results, _ = toy.evaluate(policy, run.settings, run.settings.tiers, count)
    shares = [f"n = {n}: {100 * result[AVERAGE]:.1f}%" for n, result in results.items()]
    of = f"{AVERAGE} on {count} held-out problems of each number of digits"
    print(f"  {of}:   " + "   ".join(shares))


# ---- step --------------------------------------------------------------------------------------

WHY = """
Before the step every ratio is 1, so the loss is minus the mean advantage of the tokens: about 0,
however good the responses are. Its gradient is not 0. For one token it is -advantage / tokens times
the gradient of its log-probability. "none" means that no gradient reaches these weights, so they do
not change. E_u is lm_head.weight, or embed.weight if the two are tied."""


class StepResult(NamedTuple):
    """What one update of one policy did to the G responses of a question."""

    policy: Policy
    mask: torch.Tensor  # (G, T-1) the response positions; the three below are about them
    old_logp: torch.Tensor  # (G, T-1) before the step
    new_logp: torch.Tensor  # (G, T-1) after it
    clipped: torch.Tensor  # (G, T-1) whether the clip removes the token's gradient after the step
    loss_before: float
    loss_after: float
    gradient_norms: dict[str, float | None]  # as gradient_norms returns them

    @property
    def ratio(self):
        """exp(new_logp - old_logp), (G, T-1). Before the step it is 1."""
        return (self.new_logp - self.old_logp).exp()


def step(subject: Subject, prompt=None, responses=None, rewards=None, layer=None):
    """Print one update of phase 1 and one of phase 2, token by token, and write it to step.txt.

    Return both StepResults. Both are one update on one question, from the same weights. The
    question is `prompt` with `responses` and their `rewards`, or a run's own first question of
    mixed outcomes.
    """
    model = subject.load()
    target = subject.target_policy() if layer is None else Policy(layer)
    rollouts = question_for_step(subject, model, prompt, responses, rewards)
    lr = subject.settings.lr if isinstance(subject, Run) else PAPER_LR
    phase1 = one_step(copy.deepcopy(model), rollouts, target, lr)
    phase2 = one_step(copy.deepcopy(model), rollouts, FULL, lr)
    text = step_text(subject, rollouts, phase1, phase2)
    print(text)
    save(subject.folder / "step.txt", text)
    return phase1, phase2


def question_for_step(subject: Subject, model, prompt, responses, rewards) -> Rollouts:
    """Return the given question with its responses, or the run's first mixed one."""
    if prompt is None and not responses and not rewards:
        return subject.first_mixed_question(model)
    responses = responses or []
    rewards = rewards or []
    if prompt is None or len(responses) < 2 or len(responses) != len(rewards):
        given = f"{len(responses)} responses and {len(rewards)} rewards"
        raise ValueError(
            "step takes a prompt with two or more --responses and as many --rewards, or none of "
            f"the three; this is {'a' if prompt else 'no'} prompt, {given}"
        )
    check_prompt(subject, prompt)
    for response in responses:
        refuse_empty(response, "response")
    rows, prompt_len = zip(*(subject.encode(prompt, response) for response in responses))
    tokens, end = toy.padded(list(rows), model.device, value=0)
    prompt_len = torch.tensor(prompt_len, device=model.device)
    rewards = torch.tensor([rewards], dtype=torch.float32, device=model.device)
    return Rollouts(tokens, prompt_len, end, rewards)


def one_step(model, rollouts: Rollouts, policy: Policy, lr: float) -> StepResult:
    """Make one optimizer step of minibupo.update on one question and return its result.

    Raise ValueError if all rewards are equal.
    """
    tokens = rollouts.tokens
    mask = response_mask(rollouts.prompt_len, rollouts.end, tokens.shape[1])
    advantages = minibupo.group_advantages(rollouts.rewards)[0].to(tokens.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)

    old_logp = minibupo.token_logprobs(model, tokens, mask, policy).detach()
    loss_before, _ = minibupo.surrogate(old_logp, old_logp, advantages, mask)
    # The gradient is not clipped, so that its true norm is shown. AdamW's first step hardly depends
    # on that norm.
    log = minibupo.update(model, optimizer, rollouts, policy, minibatches=1, max_grad_norm=math.inf)
    if log["optimizer_steps"] == 0:
        raise ValueError("all rewards are equal: no response has an advantage, nothing is learned")

    new_logp = minibupo.token_logprobs(model, tokens, mask, policy).detach().requires_grad_()
    loss_after, _ = minibupo.surrogate(new_logp, old_logp, advantages, mask)
    # a token whose gradient is 0 although its response has an advantage is clipped
    [gradient] = torch.autograd.grad(loss_after, new_logp)
    clipped = mask & (gradient == 0) & (advantages != 0)[:, None]
    return StepResult(
        policy,
        mask,
        old_logp,
        new_logp.detach(),
        clipped,
        loss_before.item(),
        loss_after.item(),
        gradient_norms(model),
    )


def gradient_norms(model) -> dict[str, float | None]:
    """Return the gradient's norm by layer, and by parameter outside layers; None if it has none."""
    norms = {}
    for name, parameter in model.named_parameters():
        number = re.search(r"\.(\d+)\.", name)  # of the layer, from 0
        part = f"layer {int(number[1]) + 1}" if number else name
        norms.setdefault(part, None)
        if parameter.grad is not None:
            norms[part] = math.hypot(norms[part] or 0.0, parameter.grad.norm())
    return norms


def step_text(subject: Subject, rollouts: Rollouts, phase1: StepResult, phase2: StepResult) -> str:
    """Return the table of `step`: both phases side by side, for two responses token by token."""
    words = [[visible(subject, i) for i in row] for row in rollouts.tokens.tolist()]
    prompt_len = int(rollouts.prompt_len[0])
    ends = rollouts.end.tolist()
    advantages = minibupo.group_advantages(rollouts.rewards)[0].tolist()

    lines = [f"question {''.join(words[0][:prompt_len])}", "", "reward  advantage   response"]
    for reward, advantage, row, end in zip(rollouts.rewards[0], advantages, words, ends):
        lines.append(f"{reward:6g}{advantage:+11.3f}   {''.join(row[prompt_len:end])}")

    lines.append("")
    summary2 = step_summary(phase2)
    for label, text in step_summary(phase1).items():
        lines.append(f"{label:35}{text:>26}{summary2[label]:>26}".rstrip())

    best = advantages.index(max(advantages))
    worst = advantages.index(min(advantages))
    for i in (best, worst):
        lines += ["", "token     advantage" + "    old log p  new log p     ratio  clipped" * 2]
        for t in range(prompt_len - 1, ends[i] - 1):
            columns = token_columns(phase1, i, t) + token_columns(phase2, i, t)
            lines.append(f"{words[i][t + 1]:10}{advantages[i]:+9.3f}{columns}")
    return "\n".join([*lines, WHY])


def step_summary(result: StepResult) -> dict[str, str]:
    """Return the rows about the whole step, {label: text}."""
    layer, site = result.policy
    phase = "phase 2: pi_theta" if result.policy == FULL else f"phase 1: {site}, layer {layer}"
    ratio = result.ratio[result.mask]
    rows = {
        "": phase,
        "loss before the step": f"{result.loss_before:.5f}",
        "loss after the step": f"{result.loss_after:.5f}",
        "ratios before the step": "1 .. 1",
        "ratios after the step": f"{ratio.min():.3g} .. {ratio.max():.3g}",
        "tokens clipped after the step": f"{result.clipped.sum()} of {result.mask.sum()}",
        "gradient norm of": "",
    }
    for part, norm in result.gradient_norms.items():
        rows[f"  {part}"] = "none" if norm is None else f"{norm:.4f}"
    return rows


def token_columns(result: StepResult, i: int, t: int) -> str:
    """Return the columns about tokens[i, t + 1] in one phase."""
    old = result.old_logp[i, t]
    new = result.new_logp[i, t]
    clipped = "yes" if result.clipped[i, t] else "no"
    return f"{old:13.4f}{new:11.4f}{result.ratio[i, t]:10.3g}{clipped:>9}"


# ---- everything about a run --------------------------------------------------------------------


def everything(run: Run):
    """Make all figures of a run; the folder `final` in their folder is for the trained model.

    The lens shows the trained model; all other figures show the base or the whole run.
    """
    device = run.device.type
    writes(run)
    writes(Run(run.path, "final", device, run.folder / "final"))
    lens(Run(run.path, "final", device, run.folder))
    dynamics(run)
    step(run)


# ---- housekeeping: files and the command line --------------------------------------------------


@styled
def save(path: Path, content: str | Figure):
    """Write a text or a figure, completely or not at all, and print its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        toy.write_text(path, content)
    else:
        buffer = io.BytesIO()  # with a path, savefig would not say that the disk is full
        content.savefig(buffer, format="png")
        toy.write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))
    print(f"wrote {path}")


COMMANDS = {
    "all": everything,
    "entropy": entropy,
    "writes": writes,
    "dynamics": dynamics,
    "lens": lens,
    "live": live,
    "sample": sample,
    "step": step,
}
OF_A_RUN = ("all", "dynamics", "live")  # commands that a language model does not have
OF_THE_FINAL_MODEL = ("lens", "sample")  # the others look at the base by default


class Parser(argparse.ArgumentParser):
    """A parser for which "-7<eos>" and "-1e-3" are values; only -h and --name are options."""

    def _parse_optional(self, arg_string):
        return super()._parse_optional(arg_string) if re.match("-h$|--[a-z]", arg_string) else None

    def error(self, message):
        if "unrecognized arguments: -" in message or "expected" in message:
            message += '; a value that begins like an option is written --text="--value"'
        super().error(message)


def make_parser() -> tuple[Parser, dict]:
    """Return the parser of the command line, and the parser of each command's own options."""
    parser = Parser("analyze.py", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    more = "python analyze.py COMMAND -h shows its options"
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, help=more)
    for name, function in COMMANDS.items():
        summary = (function.__doc__ or "").split("\n\n")[0]  # python -OO drops docstrings
        add = commands.add_parser(name, description=summary, allow_abbrev=False).add_argument
        if name in OF_A_RUN:
            add("source", metavar="RUN", help="directory of a run")
            if name == "live":
                add(
                    "other", nargs="?", metavar="OTHER_RUN", help="adds the final model of this run"
                )
        else:
            add("source", metavar="RUN", help="directory of a run, or a language model")
            add(
                "prompt",
                nargs="?",
                metavar="PROMPT",
                help="such as 7+5*3-2= (default: problems of the run)",
            )
            add("--prompt", dest="prompt_option", metavar="PROMPT", help="the same as an option")
            default = "final" if name in OF_THE_FINAL_MODEL else "base"
            add("--checkpoint", choices=CHECKPOINTS, help=f"model of a run (default: {default})")
            types = ("float32", "bfloat16", "float16")
            add("--dtype", choices=types, help="type of a language model (default: float32)")
        if name in ("entropy", "writes", "lens"):
            add("--text", help="response to look at (default: the model's own)")
        if name in ("sample", "step"):
            add("--layer", type=layer_number, help="1..L (default: the layer of phase 1)")
        if name == "step":
            several = dict(nargs="+", action="extend")
            add("--responses", **several, metavar="TEXT", help="two or more responses to PROMPT")
            add("--rewards", **several, metavar="NUMBER", type=reward, help="one for each response")
        if name != "sample":
            add("--out", type=Path, metavar="DIR", help="where to write (default: RUN/figures)")
        add("--device", default="auto", help="auto, cpu, cuda or mps")
    return parser, commands.choices


def layer_number(text: str) -> int:
    """Return the layer of the command line. Raise an error of argparse for an invalid one."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"a layer is a whole number from 1 to L, not {text!r}")
    return int(text)


def reward(text: str) -> float:
    """Return a reward of the command line. Raise an error of argparse for an invalid one."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"a reward is a finite number, not {text!r}")
    return number


def parse_arguments(argv) -> dict:
    """Return the options of the command line; exit with an error for an invalid one."""
    argv = sys.argv[1:] if argv is None else argv
    parser, commands = make_parser()
    if not argv or argv[0] not in commands:
        return vars(parser.parse_args(argv))  # prints the help or an error, and exits
    # "intermixed" allows an option between RUN and PROMPT
    options = vars(commands[argv[0]].parse_intermixed_args(argv[1:]))
    alternative = options.pop("prompt_option", None)
    if alternative is not None:
        if options["prompt"] is not None:
            commands[argv[0]].error("PROMPT is given twice")
        options["prompt"] = alternative
    return {"command": argv[0], **options}


def open_subject(
    command: str, source: str, options: dict, *, checkpoint=None, dtype=None, device, out=None
) -> Subject:
    """Return the Run or PretrainedModel that a command is about. Raise ValueError for neither.

    `options` are those of the command. They are checked here, before a large model is read.
    """
    if out is not None and out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is not a directory")

    if not is_language_model(source):
        if dtype:
            raise ValueError("--dtype is for a language model, not for a run")
        folder = out or Path(source) / "figures" / (checkpoint or "")
        default = "final" if command in OF_THE_FINAL_MODEL else "base"
        return Run(source, checkpoint or default, device, folder)

    try:
        if command in OF_A_RUN or checkpoint:
            raise ValueError(
                "all, dynamics, live and --checkpoint are for a run, not for a language model"
            )
        if options["prompt"] is None or options.get("layer", 1) is None:
            raise ValueError("a language model needs a prompt, and --layer to sample or step")
        return PretrainedModel(source, dtype or "float32", device, out)
    except (ValueError, OSError, ImportError) as error:
        if Path(source).exists():
            raise
        # most likely the right command in the wrong directory
        message = f"there is no directory {source} here, and as a language model"
        raise ValueError(f"{message} it could not be read: {error}") from error


def is_language_model(source: str) -> bool:
    """Return whether this is a language model (True) or a run (False), by its files or its name.

    Raise ValueError for neither. A name on the hub is one whose first part is no local folder.
    """
    refuse_empty(source, "name of the run")
    path = Path(source)
    if path.is_dir():
        if list(path.glob("*.safetensors")) or list(path.glob("*.bin")):
            return True
        if not (path / "config.json").is_file():
            raise ValueError(f"{source} is neither a run nor a language model: no config.json")
        return False
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(
                f"{source} is a file; a run or a language model is named by its directory, "
                f"{path.parent}"
            )
        return True
    on_the_hub = re.fullmatch(r"\w[\w.-]*/[\w.-]+", source) and path.suffix not in (".gguf", ".pt")
    if not on_the_hub or path.parts[0] == "out" or Path(path.parts[0]).exists():
        raise ValueError(f"there is no directory {source} here, neither a run nor a language model")
    return True


def main(argv=None) -> int:
    """Run the command line. Return 0, 2 after a user error, 130 after Ctrl-C."""
    toy.open_missing_streams()
    options = parse_arguments(argv)
    command = options.pop("command")
    source = options.pop("source")
    names = ("checkpoint", "dtype", "device", "out")
    where = {name: options.pop(name) for name in names if name in options}
    try:
        try:
            subject = open_subject(command, source, options, **where)
            COMMANDS[command](subject, **options)
        finally:
            flush_output()
        return 0
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"analyze.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nanalyze.py: stopped", file=sys.stderr)
        return 130


def flush_output():
    """Flush standard output. If this fails, discard the rest: Python would try again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


if __name__ == "__main__":
    sys.exit(main())
