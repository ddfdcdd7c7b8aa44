"""Figures and tables from runs: what the internal policies of a model look like, and what training does to them.

    python analyze.py RUN                               # all that the run holds data for, into RUN/figures
    python analyze.py entropy RUN                       # entropy flow through the layers, entropy change (Fig. 2, 3)
    python analyze.py dynamics RUN [RUN ...]            # reward, accuracy, entropy, length over steps (Fig. 4, 7)
    python analyze.py refinement RUN [RUN ...]          # cos(H^l, H^L) as training goes on (Fig. 5)
    python analyze.py passk RUN [RUN ...]               # Pass@K for K = 1..256 (Fig. 6)
    python analyze.py writes RUN                        # what modules write against the stream (Appendix B.2)
    python analyze.py lens RUN "7+5*3-2="               # what each internal policy would say, as picture and web page
    python analyze.py sample RUN --layer 4 "7+5*3-2="   # responses of an internal policy itself, and its accuracy
    python analyze.py table RUN [RUN ...]               # results as Markdown, mean and 95 % interval over seeds
    python analyze.py entropy MODEL --text "..."        # a Qwen3, Qwen2.5 or Llama checkpoint; so do writes, lens, sample

Figure numbers are the paper's. Entropies are in nats at temperature 1. Layers are 1..L and H^0 is the embedding.
A command with several runs puts seeds of one setting together. What a run has no data for is named and left out.
MODEL is a directory with config.json and safetensors, a .gguf file, or a name on the Hugging Face hub.
"""

import argparse
import json
import sys
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch

import minibupo
import train_toy as toy
from minibupo import response_mask
from model import GPT, SITES, encode_chat, encode_text, load_tokenizer

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# ---- one style for all figures -----------------------------------------------------------------------------------

BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#777777"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION)  # Okabe and Ito's: told apart with any colour vision
REGIONS = {"exploration, dH > 0": "#FBE7C6", "integration, dH about 0": "#EEEEEE", "convergence, dH < 0": "#D3E6F5"}
STYLE = {
    "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 7, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "figure.facecolor": "white", "savefig.facecolor": "white", "figure.dpi": 100, "savefig.dpi": 200, "figure.constrained_layout.use": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6, "lines.linewidth": 1.3, "lines.markersize": 4,
    "legend.frameon": False, "axes.prop_cycle": matplotlib.cycler(color=COLOURS), "pdf.fonttype": 42,
}  # fmt: skip
WIDTH = 7.0  # inches, both columns of a two-column page


class Output(NamedTuple):
    """Where a command's files go, and whether figures are written as PDF as well. Names what it writes."""

    folder: Path
    pdf: bool = False

    def text(self, name: str, text: str):
        """Write a text file, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        toy.write_atomically(self.folder / name, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        print(f"wrote {self.folder / name}")

    def figure(self, name: str, figure):
        """Write a figure as name.png (and name.pdf) and close it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for kind in ("png", "pdf") if self.pdf else ("png",):
            toy.write_atomically(self.folder / f"{name}.{kind}", lambda temporary, kind=kind: figure.savefig(temporary, format=kind))
            print(f"wrote {self.folder / name}.{kind}")
        plt.close(figure)


def layer_axis(ax, L: int, lowest: int):
    """Ticks lowest..L, thinned out where there are many; H^0 is marked as the embedding."""
    every = 1 + L // 16
    ticks = [l for l in range(lowest, L + 1) if l == lowest or (l % every == 0 and l > lowest + every // 2)]
    ax.set_xticks(ticks, ["emb." if l == 0 else str(l) for l in ticks])
    ax.set_xlabel("layer")


def label_ends(ax, ends):
    """Write labels at the right ends of curves, ends [(x, y, text, colour)], pushed apart where they would overlap."""
    low, high = ax.get_ylim()
    gap, free = 0.075 * (high - low), -np.inf
    for x, y, text, colour in sorted(ends, key=lambda end: end[1]):
        free = max(y, free + gap)
        ax.annotate(text, (x, free), xytext=(4, 0), textcoords="offset points", color=colour, fontsize=7, va="center",
                    annotation_clip=False)  # fmt: skip


# ---- runs ----------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """A run directory, read: settings and the records of metrics.jsonl by kind."""

    path: Path
    settings: toy.Settings
    records: dict

    @property
    def target(self) -> int:
        """The layer that phase 1 optimises (or would, by the rule). Raises ValueError where nothing was measured yet."""
        if self.settings.layer != "auto":
            return self.settings.layer
        if not self.records["internal"]:
            raise ValueError(f"{self.path} has no internal entropies yet, so no target layer")
        return minibupo.target_layer(self.records["internal"][0]["d_mlp"])


NEEDED = {  # what is read of each kind of record
    "step": {"step", "reward", "policy_entropy", "length"},
    "eval": {"step", "tiers", "examples"},
    "internal": {"step", "d_mlp", "d_layer", "cos_final", "perplexity"},
}


def read_run(path) -> Run:
    """Read a run directory. Raises ValueError for one that is none, or a broken line in its metrics."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory with a run in it")
    settings = toy.read_settings(path)
    there = (path / "metrics.jsonl").exists()
    records = {kind: toy.read_metrics(path, kind) if there else [] for kind in NEEDED}
    for kind, needed in NEEDED.items():
        for record in records[kind]:
            if not needed <= record.keys():
                lacks = ", ".join(sorted(needed - record.keys()))
                raise ValueError(f"{path / 'metrics.jsonl'} has a record of kind {kind!r} without {lacks}")
    return Run(path, settings, records)


CHECKPOINTS = {"base": "base.pt", "phase1": "phase1.pt", "final": "ckpt.pt"}


def load(run: Run, checkpoint: str):
    """The model of a run's checkpoint: base, phase1, final (the last one written), or a file. Raises ValueError for
    one that is not there."""
    path = run.path / CHECKPOINTS[checkpoint] if checkpoint in CHECKPOINTS else Path(checkpoint)
    if not path.is_file():
        raise ValueError(f"{run.path} has no checkpoint {checkpoint!r}, only {', '.join(checkpoints(run)) or 'none at all'}, and there is "
                         "no file of that name")  # fmt: skip
    model = toy.load_model(path, toy.pick_device("auto"), run.settings.model_config().context_length)
    torch.set_num_threads(run.settings.threads)
    return model


def checkpoints(run: Run) -> list[str]:
    """Names of the checkpoints that a run has, in the order of training."""
    return [name for name, file in CHECKPOINTS.items() if (run.path / file).is_file()]


class Pretrained(NamedTuple):
    """A pretrained language model, to be looked at in place of a run."""

    path: Path  # its directory under out/, where figures go
    model: GPT
    tokenizer: object  # of transformers


def is_run(path) -> bool:
    """Whether a path is to be read as a run and not as a pretrained model: any directory without a checkpoint of
    transformers; and what is not there, unless it can be a name on the hub, OWNER/MODEL."""
    path = Path(path)
    if path.is_dir():
        config = path / "config.json"
        return not any(path.glob("*.safetensors")) and not (config.is_file() and "model_type" in config.read_text(encoding="utf-8"))
    return not path.is_file() and (len(path.parts) != 2 or path.parent.exists())


def read_pretrained(source, dtype="float32") -> Pretrained:
    """Load a pretrained model and its tokenizer onto the device that is there. Raises ValueError, or ImportError without
    the extra `hf`, saying what is wrong."""
    model = GPT.from_pretrained(source, dtype=getattr(torch, dtype), device=toy.pick_device("auto"))
    return Pretrained(Path("out") / Path(source).resolve().name.removesuffix(".gguf"), model, load_tokenizer(source))


def room(run: Run, model, prompt) -> int:
    """Tokens that a response to prompt (1, P) may take. Raises ValueError for a prompt that leaves none."""
    left = min(run.settings.response_limit, model.cfg.context_length - prompt.shape[1])
    if left < 1:
        raise ValueError(f"a prompt of {prompt.shape[1]} tokens leaves no room for a response in {model.cfg.context_length}")
    return left


NOT_A_SETTING = {"seed", "out_dir", "base", "device", "threads", "eval_every", "probe_every", "save_every", "preset"}


def settings_of(run: Run) -> dict:
    """The options that make a run's setting: seed, base, directory and machine are not among them, nor those of phase 1
    where there is none."""
    left_out = NOT_A_SETTING | ({"layer", "site", "s_inter"} if run.settings.algo == "grpo" else set())
    return {f.name: getattr(run.settings, f.name) for f in fields(run.settings) if f.name not in left_out}


def group_runs(runs: list[Run]) -> dict[str, list[Run]]:
    """Put the seeds of one setting together: {label: runs}. The label is the algorithm with whatever options set the
    groups apart."""
    groups, ofs = {}, [settings_of(run) for run in runs]
    names = dict.fromkeys(name for of in ofs for name in of)
    differ = [name for name in names if len({str(of[name]) for of in ofs if name in of}) > 1 and name != "algo"]
    for run, of in zip(runs, ofs):
        label = ", ".join([{"bupo": "BuPO", "grpo": "GRPO"}[of["algo"]], *(f"{name} {of[name]}" for name in differ if name in of)])
        groups.setdefault(label, []).append(run)
    return groups


def missing(run: Run, what: str):
    """Say that a run has no data for something."""
    print(f"{run.path} has no {what}: left out")


# ---- statistics ----------------------------------------------------------------------------------------------------


@cache
def t_quantile(df: int, level: float = 0.95) -> float:
    """The t with P(|T| <= t) = level for Student's distribution: 12.706 for df = 1, 1.96 for very many. With
    t = sqrt(df) tan(a) its density is proportional to cos(a)^(df-1), which is summed up here."""
    a = np.linspace(0, np.pi / 2, 200_001)[:-1] + np.pi / 800_002  # midpoints
    mass = np.cumsum(np.cos(a) ** (df - 1))
    return float(np.sqrt(df) * np.tan(np.interp(level * mass[-1], mass, a + np.pi / 800_002)))


def mean_interval(values) -> tuple[float, float | None]:
    """Mean, and half the width of its 95 % t-interval (None for a single value)."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return float(values.mean()), None
    return float(values.mean()), t_quantile(len(values) - 1) * float(values.std(ddof=1)) / len(values) ** 0.5


def over_seeds(curves) -> tuple:
    """Curves [{x: y}, ...] of several seeds -> sorted x, mean and standard deviation (0 for one) of the curves that
    reach each x."""
    xs = sorted({x for curve in curves for x in curve})
    columns = [[curve[x] for curve in curves if x in curve] for x in xs]
    return xs, np.array([np.mean(c) for c in columns]), np.array([np.std(c, ddof=1) if len(c) > 1 else 0.0 for c in columns])


def colour_groups(figure, groups: dict) -> dict:
    """A colour for each group of runs, {label: colour}, with a legend where there are several."""
    colours = dict(zip(groups, COLOURS * len(groups)))
    if len(groups) > 1:
        lines = [plt.Line2D([], [], color=colour) for colour in colours.values()]
        figure.legend(lines, colours, ncols=1 if max(map(len, colours)) > 50 else 3, loc="outside upper center")
    return colours


def draw_groups(ax, groups: dict, colours: dict, curve, marker=None):
    """For each group of runs the mean curve over seeds with a band of one standard deviation, curve(run) -> {x: y}, and a
    dotted line at its change from phase 1 to phase 2."""
    for label, runs in groups.items():
        curves = [c for c in map(curve, runs) if c]
        if curves:
            xs, mean, std = over_seeds(curves)
            ax.plot(xs, mean, color=colours[label], marker=marker)
            ax.fill_between(xs, mean - std, mean + std, color=colours[label], alpha=0.2, linewidth=0)
        if runs[0].settings.s_inter:
            ax.axvline(runs[0].settings.s_inter + 0.5, color=colours[label] if len(groups) > 1 else GREY, linewidth=0.8, linestyle=":")
    first = min((runs[0].settings.s_inter for runs in groups.values() if runs[0].settings.s_inter), default=None)
    if first:
        ax.annotate("switch", (first + 0.5, 1), xycoords=("data", "axes fraction"), xytext=(2, 0), textcoords="offset points",
                    color=GREY, fontsize=6, va="bottom")  # fmt: skip


# ---- what a model is looked at on ----------------------------------------------------------------------------------


def probe_text(run: Run, model, prompts=64, text=None, prompt=None):
    """Tokens (N, T) and mask (N, T-1) of response positions: of `prompts` held-out problems with the model's own
    responses, or of a text. A text alone is all response behind its first token; with a prompt, only the text is.
    A response position is one whose *next* token is a response token. Raises ValueError for a text of no response."""
    device = next(model.parameters()).device
    if text is None:
        if prompt is not None:
            raise ValueError("--prompt needs --text, the response to it")
        if not 1 <= prompts <= 1000:
            raise ValueError(f"--prompts must be in 1..1000, not {prompts}")
        return toy.make_probe(model, run.settings, device, prompts)
    before = toy.encode(prompt or "")
    tokens = torch.tensor([before + toy.encode(text)], device=device)
    first = max(1, len(before))
    if tokens.shape[1] <= first:
        raise ValueError(f"--text {text!r} has no response position: it takes a token behind the {'prompt' if prompt else 'first one'}")
    lengths = torch.tensor([[first], [tokens.shape[1]]], device=device)
    return tokens, response_mask(*lengths, tokens.shape[1])


def pretrained_text(of: Pretrained, text=None, prompt=None):
    """The same for a pretrained model: text as its tokenizer has it, all response behind the first token; with a prompt,
    which goes through the chat template if there is one, only the text is."""
    if text is None:
        raise ValueError("a pretrained model needs --text, something to look at")
    ids, first = (encode_text(of.tokenizer, text), 1) if prompt is None else encode_chat(of.tokenizer, prompt, text)
    if len(ids) <= first:
        raise ValueError(f"--text {text!r} has no response position: it takes a token behind the {'prompt' if prompt else 'first one'}")
    tokens = torch.tensor([ids], device=of.model.cos.device)
    return tokens, response_mask(torch.tensor([first]), torch.tensor([len(ids)]), len(ids)).to(tokens.device)


def looked_at(run, checkpoint, prompts, text, prompt):
    """Model, tokens and response mask that entropy and writes look at, of a run or of a pretrained model."""
    if isinstance(run, Pretrained):
        return run.model, *pretrained_text(run, text, prompt)
    model = load(run, checkpoint)
    return model, *probe_text(run, model, prompts, text, prompt)


# ---- entropy -------------------------------------------------------------------------------------------------------


def measure_entropies(model, tokens, mask, *, chunk=None, matched=False) -> dict[str, np.ndarray]:
    """Every entropy and entropy change of Eq. 8, 9, 13, 14 at each of the M response positions, in nats, and the size
    of the stream: "layer", "layer_normed", "rms" (L+1, M), H^0 first; "attn", "mlp", "d_layer", "d_attn", "d_mlp"
    (L, M). With `matched` also "layer_matched" (L+1, M), raw policies with each H^l scaled to the size of H^L: what is
    left of the fall of raw entropy when the stream does not grow. `chunk` positions are unembedded at a time (None: as
    many as make 2^24 logits, 64 MB)."""
    chunk = chunk or max(1, 2**24 // model.cfg.vocab_size)
    entropies = minibupo.internal_entropies(model, tokens, mask, final_norm=model.final_norm, chunk=chunk)
    entropies |= minibupo.entropy_changes(entropies)
    entropies["rms"] = minibupo.residual_rms(model, tokens, mask)["layer"]
    if matched:
        entropies["layer_matched"] = matched_entropies(model, tokens, mask, entropies["rms"][-1], chunk)
    return {name: values.cpu().double().numpy() for name, values in entropies.items()}


@torch.no_grad()
def matched_entropies(model, tokens, mask, size, chunk):
    """Entropies (L+1, M) of the raw layer policies with every H^l scaled to root mean square `size` (M,), `chunk` at a time."""
    rows = []
    for trace in model.trace(tokens[:, :-1]):
        for h in (trace.resid_post,) if rows else (trace.resid_pre, trace.resid_post):
            h = minibupo.at_least_float32(h[mask])  # (M, d)
            scale = size / h.square().mean(-1).sqrt()
            rows.append(minibupo.unembedded_entropy(model, (h * scale[:, None]).to(trace.resid_post.dtype), chunk))
    return torch.stack(rows)


def summarize(measured: dict) -> dict:
    """What entropy.json holds: means over positions, standard errors under NAME_sem (null for a single position), medians
    under NAME_median (a few positions of a language model can own a mean); "positions",
    "target_layer" of the paper's rule (null for a model of one layer)."""
    summary, M = {}, measured["layer"].shape[1]
    for name in ("layer", "layer_normed", "layer_matched", "attn", "mlp", "d_layer", "d_attn", "d_mlp", "rms"):
        if name in measured:
            summary[name] = measured[name].mean(1).tolist()
            summary[name + "_median"] = np.median(measured[name], axis=1).tolist()
            summary[name + "_sem"] = (measured[name].std(1, ddof=1) / M**0.5).tolist() if M > 1 else [None] * len(measured[name])
    d_mlp = summary["d_mlp"]
    return summary | {"positions": M, "target_layer": minibupo.target_layer(d_mlp) if len(d_mlp) > 1 else None}


def draw_flow(measured: dict, log_vocab: float):
    """The continuous entropy flow (Fig. 2): layer input, attention, FFN and layer output in order, all layers on one
    axis, with the middle half of the positions as a band; under it the size of the stream."""
    L = len(measured["attn"])
    figure, (ax, below) = plt.subplots(2, 1, figsize=(WIDTH, 4.2), sharex=True, height_ratios=(3, 1))
    x = np.arange(3 * L + 1) / 3  # H^0, A^1, F^1, H^1, A^2, ..
    flow = np.empty((3 * L + 1, measured["attn"].shape[1]))
    flow[0::3], flow[1::3], flow[2::3] = measured["layer"], measured["attn"], measured["mlp"]
    low, high = np.quantile(flow, (0.25, 0.75), axis=1)
    ax.fill_between(x, low, high, color=GREY, alpha=0.18, linewidth=0)
    ax.plot(x, flow.mean(1), color=GREY, linewidth=0.8)
    kinds = ((BLUE, "o", "layer, $H^l$"), (ORANGE, "^", "attention, $A^l$"), (GREEN, "s", "FFN, $F^l$"))
    for start, (colour, marker, name) in enumerate(kinds):
        ax.plot(x[start::3], flow[start::3].mean(1), marker, color=colour, label=name)
    ends = []
    for name, text, colour in (("layer_normed", "normed", PURPLE), ("layer_matched", "norm-matched", VERMILION)):
        if name in measured:
            mean = measured[name].mean(1)
            ax.plot(range(L + 1), mean, "--", color=colour)
            ends.append((L, mean[-1], text, colour))
    ax.axhline(log_vocab, color=GREY, linewidth=0.6, linestyle=":")
    ax.annotate("uniform, log V", (L, log_vocab), ha="right", va="bottom", fontsize=7, color=GREY)
    ax.set_ylabel("entropy (nats)")
    ax.set_ylim(0, 1.08 * log_vocab)
    label_ends(ax, [*ends, (L, flow[-1].mean(), "raw", BLUE)])
    ax.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    gap = np.abs(measured["layer"].mean(1) - measured["layer_normed"].mean(1))
    ax.set_title(f"raw and normed $H^l$ differ by up to {gap.max():.1f} nats", loc="right", color=PURPLE, fontsize=7)
    below.plot(range(L + 1), measured["rms"].mean(1), "o-", color=BLUE)
    below.fill_between(range(L + 1), *np.quantile(measured["rms"], (0.25, 0.75), axis=1), color=BLUE, alpha=0.18, linewidth=0)
    below.set_yscale("log", subs=(2, 5))
    below.yaxis.set_major_formatter("{x:g}")
    below.yaxis.set_minor_formatter("{x:g}")
    below.set_ylabel("RMS($H^l$)")
    layer_axis(below, L, 0)
    return figure


def region(d: float, log_vocab: float) -> str:
    """Exploration, integration or convergence (a key of REGIONS): "about 0" is within 2 % of log V."""
    return list(REGIONS)[1 if abs(d) <= 0.02 * log_vocab else 0 if d > 0 else 2]


def draw_change(measured: dict, target: int | None, log_vocab: float):
    """Entropy change by layer (Fig. 3) of attention, FFN and layer: mean with its 95 % interval, the middle half of the
    positions as a band, each layer shaded by the region it is in, the target layer of the rule marked."""
    L = len(measured["attn"])
    figure, axes = plt.subplots(1, 3, figsize=(WIDTH, 2.5), sharey=True)
    for ax, name, colour, title in zip(axes, ("d_attn", "d_mlp", "d_layer"), (ORANGE, GREEN, BLUE),
                                       ("attention, $dH_{ATTN}$", "FFN, $dH_{FFN}$", "layer, $dH_{Layer}$")):  # fmt: skip
        values, layers = measured[name], np.arange(1, L + 1)
        mean, M = values.mean(1), values.shape[1]
        for l in layers:
            ax.axvspan(l - 0.5, l + 0.5, color=REGIONS[region(mean[l - 1], log_vocab)], linewidth=0)
        ax.axhline(0, color="black", linewidth=0.6)
        ax.fill_between(layers, *np.quantile(values, (0.25, 0.75), axis=1), color=colour, alpha=0.25, linewidth=0)
        error = 1.96 * values.std(1, ddof=1) / M**0.5 if M > 1 else None
        ax.errorbar(layers, mean, error, color=colour, marker="o", capsize=2, elinewidth=0.8)
        ax.set_title(title, color=colour)
        ax.set_xlim(0.5, L + 0.5)
        layer_axis(ax, L, 1)
    if target is not None:
        axes[1].annotate("target", (target, measured["d_mlp"][target - 1].mean()), xytext=(target, 0.97),
                         textcoords=("data", "axes fraction"), ha="center", va="top", fontsize=7,
                         arrowprops=dict(arrowstyle="-|>", lw=0.7, shrinkB=3))  # fmt: skip
    axes[0].set_ylabel("entropy change (nats)")
    patches = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in REGIONS.values()]
    figure.legend(patches, REGIONS, ncols=3, loc="outside upper center")
    return figure


def analyze_entropy(run: Run | Pretrained, out: Output, checkpoint="base", prompts=64, text=None, prompt=None, matched=False):
    """entropy.json, entropy_flow and entropy_change of one checkpoint, or of a pretrained model."""
    model, tokens, mask = looked_at(run, checkpoint, prompts, text, prompt)
    measured = measure_entropies(model, tokens, mask, matched=matched)
    log_vocab = float(np.log(model.cfg.vocab_size))
    summary = summarize(measured) | {"log_vocab": log_vocab}
    out.text("entropy.json", json.dumps(summary, indent=1))
    out.figure("entropy_flow", draw_flow(measured, log_vocab))
    out.figure("entropy_change", draw_change(measured, summary["target_layer"], log_vocab))
    gap = np.abs(np.subtract(summary["layer"], summary["layer_normed"]))
    name = run.path.name if isinstance(run, Pretrained) else checkpoint
    target = f"{summary['target_layer']}" + ("" if any(d > 0 for d in summary["d_mlp"][:-1]) else " (no FFN below the top widens)")
    print(f"{name}, {summary['positions']} response positions: target layer {target}; raw and normed entropy of a "
          f"layer differ by up to {gap.max():.2f} nats (H^{gap.argmax()}); RMS(H^l) goes from {summary['rms'][0]:.2g} to "
          f"{summary['rms'][-1]:.2g}")  # fmt: skip


# ---- training: dynamics, refinement ----------------------------------------------------------------------------------


def accuracy(record: dict, n: int, start="avg@"):
    """The Avg@K (or what else starts so, but for standard errors) of tier n in an eval record."""
    return next(v for k, v in record["tiers"][str(n)].items() if k.startswith(start) and not k.endswith("_se"))


def draw_dynamics(groups: dict):
    """Reward, held-out accuracy, policy entropy and response length over steps, the phase switch marked (Fig. 4, 7)."""
    def steps(key):
        return lambda run: {r["step"]: r[key] for r in run.records["step"]}

    def held_out(run):
        return {r["step"]: 100 * accuracy(r, run.settings.n) for r in run.records["eval"]}

    figure, axes = plt.subplots(1, 4, figsize=(WIDTH, 2.2))
    colours = colour_groups(figure, groups)
    panels = ((steps("reward"), "training reward"), (held_out, "held-out accuracy (%)"), (steps("policy_entropy"), "policy entropy (nats)"),
              (steps("length"), "response length (tokens)"))  # fmt: skip
    for i, (ax, (curve, title)) in enumerate(zip(axes, panels)):
        draw_groups(ax, groups, colours, curve, marker="o" if i == 1 else None)
        ax.set_title(title, pad=9)
        ax.set_xlabel("step")
    return figure


def analyze_dynamics(runs: list[Run], out: Output):
    """The figure "dynamics" of runs, those of one setting together."""
    for run in runs:
        for kind, what in (("step", "steps of RL"), ("eval", "evaluations")):
            if not run.records[kind]:
                missing(run, what)
    runs = [run for run in runs if run.records["step"]]
    if runs:
        out.figure("dynamics", draw_dynamics(group_runs(runs)))


def draw_refinement(groups: dict):
    """Feature refinement (Fig. 5): cos(H^l, H^L) of the target layer, its entropy change and the perplexity of the base
    model's own solutions under pi_theta over steps, then for each setting the cosines of all layers."""
    figure = plt.figure(figsize=(WIDTH, 4.5))
    upper, lower = figure.subfigures(2, 1)
    colours = colour_groups(upper, groups)
    panels = ((lambda run: {r["step"]: r["cos_final"][run.target] for r in run.records["internal"]}, "cos($H^l$, $H^L$), target layer"),
              (lambda run: {r["step"]: r["d_layer"][run.target - 1] for r in run.records["internal"]}, "$dH_{Layer}$, target layer (nats)"),
              (lambda run: {r["step"]: r["perplexity"] for r in run.records["internal"]}, "perplexity of base solutions"))  # fmt: skip
    for ax, (curve, title) in zip(upper.subplots(1, 3), panels):
        draw_groups(ax, groups, colours, curve)
        ax.set_title(title, pad=9)
    for i, (ax, (label, runs)) in enumerate(zip(lower.subplots(1, len(groups), sharey=True, squeeze=False)[0], groups.items())):
        ends, L = [], runs[0].settings.n_layer
        for l in range(L):
            xs, mean, _ = over_seeds([{r["step"]: r["cos_final"][l] for r in run.records["internal"]} for run in runs])
            colour = plt.cm.cividis(0.8 * l / L)
            ax.plot(xs, mean, color=colour)
            ends.append((xs[-1], mean[-1], "emb." if l == 0 else f"{l}", colour))
        label_ends(ax, ends)
        if runs[0].settings.s_inter:
            ax.axvline(runs[0].settings.s_inter + 0.5, color=GREY, linewidth=0.8, linestyle=":")
        ax.set_title(f"{label}, all layers" if len(label) < 90 // len(groups) else label)
        ax.set_xlabel("step")
        if i == 0:
            ax.set_ylabel("cos($H^l$, $H^L$)")
    return figure


def analyze_refinement(runs: list[Run], out: Output):
    """The figure "refinement" of runs, those of one setting together."""
    for run in runs:
        if not run.records["internal"]:
            missing(run, "looks at the internal policies")
    runs = [run for run in runs if run.records["internal"]]
    if runs:
        out.figure("refinement", draw_refinement(group_runs(runs)))


# ---- Pass@K --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample_counts(model, s: toy.Settings, n: int, problems: int, samples: int) -> np.ndarray:
    """How many of `samples` responses at temperature 1 are right, for each of `problems` held-out problems of n digits."""
    device = next(model.parameters()).device
    expr = toy.draw_problems(toy.numpy_rng(s.seed, toy.EVALUATE, n), problems, n, "eval")
    generator, counts = toy.torch_rng(device, s.seed, toy.EVALUATE, n), []
    for chunk in np.array_split(expr, -(-problems * samples // 2048)):
        sampled = model.generate(torch.tensor(toy.prompts(chunk), device=device), s.response_limit, num_samples=samples,
                                 eos_id=toy.EOS, pad_id=toy.PAD, generator=generator)  # fmt: skip
        answers = torch.tensor(toy.worked_lines(chunk)[-1][:, 0], device=device).repeat_interleave(samples)
        counts.append(toy.reward(sampled.tokens, sampled.end, answers).view(-1, samples).sum(1).long().cpu().numpy())
    return np.concatenate(counts)


def pass_curve(counts, samples: int, ks) -> tuple[np.ndarray, np.ndarray]:
    """Unbiased Pass@K at each of ks, mean over problems, and its standard error over problems."""
    values = np.array([minibupo.pass_at_k(samples, counts, k) for k in ks])  # (len(ks), problems)
    return values.mean(1), values.std(1, ddof=1) / values.shape[1] ** 0.5 if values.shape[1] > 1 else 0 * values[:, 0]


def analyze_passk(runs: list[Run], out: Output, problems=16, samples=256):
    """The figure "passk" (Fig. 6) and passk.json: Pass@K by tier before and after RL, from `samples` responses to each
    of `problems` held-out problems, pooled over the runs of a setting; the band is one standard error over problems."""
    if samples < 1 or not 1 <= problems <= 1000:
        raise ValueError(f"--samples must be at least 1 and --problems in 1..1000, not {samples} and {problems}")
    there = [run for run in runs if "base" in checkpoints(run)]
    for run in runs:
        if run not in there:
            missing(run, "base model")
    counts = {}  # label -> tier -> counts of all its runs
    for label, group in group_runs(there).items():
        for run in group:
            for name, key in (("base", "base"), ("final", label)):
                if name in checkpoints(run):
                    model = load(run, name)
                    for n in run.settings.tiers:
                        counts.setdefault(key, {}).setdefault(n, []).append(sample_counts(model, run.settings, n, problems, samples))
                else:
                    missing(run, "steps of RL")
    if not counts:
        return
    ks = [2**i for i in range(samples.bit_length()) if 2**i <= 256]
    curves = {label: {n: pass_curve(np.concatenate(c), samples, ks) for n, c in tiers.items()} for label, tiers in counts.items()}
    lists = {label: {n: {"pass": mean.tolist(), "se": se.tolist()} for n, (mean, se) in of.items()} for label, of in curves.items()}
    out.text("passk.json", json.dumps({"k": ks, "samples": samples, "problems": problems, "curves": lists}, indent=1))
    out.figure("passk", draw_passk(curves, ks))


def draw_passk(curves: dict, ks):
    """Pass@K against K, a panel a tier; the base dashed."""
    tiers = sorted({n for of_label in curves.values() for n in of_label})
    figure, axes = plt.subplots(1, len(tiers), figsize=(WIDTH, 2.1), sharey=True, squeeze=False)
    for ax, n in zip(axes[0], tiers):
        for colour, (label, of_label) in zip((GREY, *COLOURS * len(curves)), curves.items()):
            if n in of_label:
                mean, se = (100 * y for y in of_label[n])
                ax.plot(ks, mean, "--" if label == "base" else "-", color=colour, label=label)
                ax.fill_between(ks, mean - se, mean + se, color=colour, alpha=0.2, linewidth=0)
        ax.set_xscale("log", base=2)
        ax.set_xticks(ks[::2], [str(k) for k in ks[::2]])
        ax.set_title(f"n = {n} digits")
        ax.set_xlabel("K")
    axes[0][0].set_ylabel("Pass@K (%)")
    axes[0][-1].legend(loc="lower right")
    return figure


# ---- writes --------------------------------------------------------------------------------------------------------


def analyze_writes(run: Run | Pretrained, out: Output, checkpoint="base", prompts=64, text=None, prompt=None):
    """The figure "writes" and writes.json: cosine of each module's write with the stream that it is added to, by layer
    (Appendix B.2), mean and the middle half of the positions."""
    cosines = minibupo.residual_cosines(*looked_at(run, checkpoint, prompts, text, prompt))
    cosines = {name: cosines[name].cpu().double().numpy() for name in ("attn", "mlp")}
    summary = {name: values.mean(1).tolist() for name, values in cosines.items()}
    out.text("writes.json", json.dumps(summary | {"positions": cosines["attn"].shape[1]}, indent=1))
    L = len(cosines["attn"])
    figure, ax = plt.subplots(figsize=(WIDTH / 2, 2.4))
    ax.axhline(0, color="black", linewidth=0.6)
    ends = []
    for name, text, colour in (("attn", "attention", ORANGE), ("mlp", "FFN", GREEN)):
        mean = cosines[name].mean(1)
        ax.plot(range(1, L + 1), mean, "o-", color=colour)
        ax.fill_between(range(1, L + 1), *np.quantile(cosines[name], (0.25, 0.75), axis=1), color=colour, alpha=0.2, linewidth=0)
        ends.append((L, mean[-1], text, colour))
    label_ends(ax, ends)
    ax.set_ylabel("cos(write, stream)")
    for y, says, va in ((1, "amplifies", "top"), (0, "suppresses", "bottom")):
        ax.annotate(says, (0.02, y), xycoords="axes fraction", fontsize=6, color=GREY, va=va)
    layer_axis(ax, L, 1)
    out.figure("writes", figure)


# ---- lens ----------------------------------------------------------------------------------------------------------

VIEWS = ("raw", "normed")  # softmax(h E_u^T), and with the final norm, the logit lens: softmax(LN_f(h) E_u^T)


@torch.no_grad()
def lens_cells(model, tokens, mask, k=5) -> dict:
    """What each internal policy would say at the M response positions of one row: {site: {view: (entropy, ids, p)}},
    sites resid_post, attn_out, mlp_out, views raw and normed; entropy (layers, M) in nats, the k likeliest tokens and
    their probabilities (layers, M, k). resid_post has L+1 layers, H^0 first, the others L."""
    cells = {site: {view: [] for view in VIEWS} for site in SITES}
    for l, trace in enumerate(model.trace(tokens[:, :-1]), 1):
        states = [("resid_post", trace.resid_pre)] if l == 1 else []
        for site, h in states + [(site, getattr(trace, site)) for site in SITES]:
            for view, state in (("raw", h[mask]), ("normed", model.final_norm(h[mask]))):
                logits = model.unembed(state).float()  # (M, V)
                p, ids = logits.softmax(-1).topk(min(k, logits.shape[-1]), dim=-1)
                cells[site][view].append((minibupo.entropy(logits), ids, p))
    return {site: {view: tuple(torch.stack(part).cpu().numpy() for part in zip(*rows)) for view, rows in views.items()}
            for site, views in cells.items()}  # fmt: skip


PANELS = {"resid_post": "layer policy, $H^l$", "attn_out": "attention policy, $A^l$", "mlp_out": "FFN policy, $F^l$"}


def draw_lens(cells: dict, view: str, said: list[str], words, log_vocab: float):
    """A grid of response positions by layers for layer, attention and FFN policy: each cell has the token that the
    policy would choose, coloured by the policy's entropy; in bold where it is the token that follows."""
    L, M = cells["attn_out"]["raw"][0].shape
    deep = L > 12
    if deep:  # panels below each other, cells for words of a few letters
        figure, axes = plt.subplots(3, 1, figsize=(0.55 * (L + 1) + 2, 3 * (0.5 + 0.19 * M)), squeeze=False)
        axes = axes[:, 0]
    else:
        figure, axes = plt.subplots(1, 3, figsize=(max(WIDTH, 0.36 * (3 * L + 4)), 0.9 + 0.19 * M), sharey=True, width_ratios=(L + 1, L, L))
    for ax, (site, title) in zip(axes, PANELS.items()):
        entropy, ids, _ = cells[site][view]
        image = ax.imshow(entropy.T, cmap="cividis", vmin=0, vmax=log_vocab, aspect="auto")
        for l, m in np.ndindex(entropy.shape):
            token = words(ids[l, m, 0])
            short = token if len(token) < 8 else token[:6] + "\u2026"
            ax.text(l, m, short, parse_math=False, ha="center", va="center", fontsize=7, weight="bold" if token == said[m] else "normal",
                    color="white" if entropy[l, m] < 0.55 * log_vocab else "black")  # fmt: skip
        layers = range(0 if site == "resid_post" else 1, L + 1)
        ax.set_xticks(range(len(layers)), ["emb." if l == 0 else str(l) for l in layers])
        ax.tick_params(length=0)
        ax.set_title(title)
        ax.set_xlabel("layer")
    for ax in axes if deep else axes[:1]:
        ax.set_yticks(range(M), said, parse_math=False)
        ax.set_ylabel("response token, to be predicted")
    figure.colorbar(image, ax=axes, label="entropy (nats)", fraction=0.03, pad=0.01)
    return figure


def lens_page(title: str, read: list[str], said: list[str], log_vocab: float, by_checkpoint: dict, words) -> str:
    """The lens as one HTML page that needs nothing from anywhere: cells of every checkpoint as JSON, and the script that
    shows them (LENS_PAGE)."""
    vocabulary = {}

    def table(entropy, ids, p):  # per layer and position: entropy, then token and probability five times
        tops = [[[vocabulary.setdefault(words(i), len(vocabulary)), round(float(q), 4)] for i, q in zip(*cell)] for cell in
                zip(ids.reshape(-1, ids.shape[-1]), p.reshape(-1, p.shape[-1]))]  # fmt: skip
        flat = [[round(float(h), 2), *sum(top, [])] for h, top in zip(entropy.ravel(), tops)]
        return [flat[i : i + entropy.shape[1]] for i in range(0, len(flat), entropy.shape[1])]

    data = {"title": title, "read": read, "said": said, "logV": log_vocab, "checkpoints": [
        {"name": name, **{site: {view: table(*part) for view, part in views.items()} for site, views in cells.items()}}
        for name, cells in by_checkpoint.items()]}  # fmt: skip
    data["words"] = list(vocabulary)
    return LENS_PAGE.replace("DATA", json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"))


def toy_lens(run: Run, prompt: str, checkpoint: str, text):
    """What the lens shows of a run: the checkpoint of the picture, all models by name, tokens, mask, a word for each id."""
    model = load(run, checkpoint)
    before = torch.tensor([toy.encode(prompt)])
    if text is None:
        if before.numel() == 0:
            raise ValueError("the lens needs a prompt, such as 7+5*3-2=")
        answer = model.generate(before.to(model.cos.device), room(run, model, before), temperature=0, eos_id=toy.EOS, pad_id=toy.PAD)
        text = toy.decode(answer.tokens[0, before.shape[1] : answer.end[0]])
    words = {toy.EOS: "eos", toy.PAD: "pad"} | {i: c for i, c in enumerate(toy.CHARACTERS)}
    names = checkpoints(run) if checkpoint in CHECKPOINTS else [checkpoint]
    return checkpoint, {name: load(run, name) for name in names}, *probe_text(run, model, text=text, prompt=prompt), words.get


ANSWER = 48  # tokens that a pretrained model is given for an answer


def pretrained_lens(of: Pretrained, prompt: str, text):
    """The same for a pretrained model."""
    if text is None:
        ids, first = encode_chat(of.tokenizer, prompt, "")
        if not ids:
            raise ValueError("the lens needs a prompt")
        answer = of.model.generate(torch.tensor([ids], device=of.model.cos.device), ANSWER, temperature=0, eos_id=of.tokenizer.eos_token_id)
        tokens = answer.tokens[:, : answer.end[0]]
        mask = response_mask(answer.prompt_len, answer.end, tokens.shape[1])
    else:
        tokens, mask = pretrained_text(of, text, prompt)
    name = of.path.name
    return name, {name: of.model}, tokens, mask, lambda i: visible(of.tokenizer.decode([i]))


def visible(token: str) -> str:
    """A token's text with a dot for each space and an escape, such as \\n, for what cannot be seen."""
    return "".join("\u00b7" if c == " " else c if c.isprintable() else repr(c)[1:-1] for c in token)


def analyze_lens(run: Run | Pretrained, out: Output, prompt: str, checkpoint="final", text=None, view="raw"):
    """lens.png of one checkpoint and lens.html of all that the run has (or of a pretrained model), for a prompt and a
    response: `text`, or what the model answers greedily."""
    shown = pretrained_lens(run, prompt, text) if isinstance(run, Pretrained) else toy_lens(run, prompt, checkpoint, text)
    name, models, tokens, mask, word = shown
    read, said = ([word(i) for i in row[mask[0]].tolist()] for row in (tokens[0, :-1], tokens[0, 1:]))
    title = "".join(word(i) for i in tokens[0].tolist())
    log_vocab = float(np.log(models[name].cfg.vocab_size))
    cells = {name: lens_cells(model, tokens, mask) for name, model in models.items()}
    out.figure("lens", draw_lens(cells[name], view, said, lambda i: word(int(i)), log_vocab))
    out.text("lens.html", lens_page(title, read, said, log_vocab, cells, lambda i: word(int(i))))


# ---- sample --------------------------------------------------------------------------------------------------------


def sample_pretrained(of: Pretrained, prompt: str, layer=None, count=4):
    """Print `count` responses of a layer's internal policy to a prompt, and one of pi_theta."""
    L, device = of.model.cfg.n_layer, of.model.cos.device
    if layer is None:
        raise ValueError(f"a pretrained model needs --layer, 1..{L}")
    ids, _ = encode_chat(of.tokenizer, prompt, "")
    if not ids:
        raise ValueError("sample needs a prompt")
    for name, model, n in ((f"layer {layer}'s policy", of.model.truncated(layer), count), ("pi_theta", of.model, 1)):
        sampled = model.generate(torch.tensor([ids], device=device), ANSWER, num_samples=n, eos_id=of.tokenizer.eos_token_id,
                                 generator=toy.torch_rng(device, 0, toy.SAMPLE, 0))  # fmt: skip
        print(f"responses of {name} (at most {ANSWER} tokens):")
        for row, end in zip(sampled.tokens, sampled.end):
            print(f"  {of.tokenizer.decode(row[len(ids):end], skip_special_tokens=True)!r}")


def analyze_sample(run: Run | Pretrained, prompt: str, layer=None, checkpoint="final", count=4, problems=256):
    """Print responses of the internal policy of a layer (default: the target layer) to a prompt, and its accuracy on
    held-out problems beside that of pi_theta. A pretrained model answers only."""
    if count < 1:
        raise ValueError(f"--count must be at least 1, not {count}")
    if isinstance(run, Pretrained):
        return sample_pretrained(run, prompt, layer, count)
    model, s = load(run, checkpoint), run.settings
    layer = run.target if layer is None else layer
    internal = model.truncated(layer)
    device = model.cos.device
    expr, tokens = prompt.removesuffix("="), torch.tensor([toy.encode(prompt)], device=device)
    if not prompt.endswith("=") or len(expr) % 2 == 0 or not expr[::2].isdigit() or not set(expr[1::2]) <= set("+-*"):
        raise ValueError(f"prompt {prompt!r} is no problem: digits joined by + - *, then =, such as 7+5*3-2=")
    sampled = internal.generate(tokens, room(run, model, tokens), num_samples=count, eos_id=toy.EOS, pad_id=toy.PAD,
                                generator=toy.torch_rng(device, s.seed, toy.SAMPLE, 0))  # fmt: skip
    print(f"responses of layer {layer}'s policy ({checkpoint}):")
    print(toy.show_examples([toy.decode(row[:end]) for row, end in zip(sampled.tokens, sampled.end)]))
    results = [toy.evaluate(m, s, s.tiers, problems, device)[0] for m in (internal, model)]
    print(f"Avg@{s.eval_samples} on {problems} held-out problems a tier, in %:")
    for n in s.tiers:
        own, full = (100 * accuracy({"tiers": r}, n) for r in results)
        print(f"  n = {n}   policy of layer {layer} {own:5.1f}   pi_theta {full:5.1f}")


# ---- table ---------------------------------------------------------------------------------------------------------


def result_table(runs: list[Run]) -> str:
    """Avg@K and Pass@K in % per tier as a Markdown table: a row for the bases and one for each setting, the mean over
    its runs with half the width of the 95 % t-interval (none for a single run). A run counts with its last evaluation."""
    runs = [run for run in runs if run.records["eval"]]
    bases = {json.dumps(run.records["eval"][0]["tiers"]): run.records["eval"][0] for run in runs}  # arms may share a base
    rows = {"before RL": list(bases.values())}
    rows |= {label: [run.records["eval"][-1] for run in group if len(run.records["eval"]) > 1] for label, group in group_runs(runs).items()}
    tiers = sorted({int(n) for records in rows.values() for record in records for n in record["tiers"]})
    first = next(iter(rows["before RL"][0]["tiers"].values()))
    keys = [next(k for k in first if k.startswith("avg@")), [k for k in first if k.startswith("pass@")][-1]]
    lines = ["| setting | runs | steps | " + " | ".join(f"n = {n} {key.capitalize()}" for n in tiers for key in keys) + " |"]
    lines.append("|" + "---|" * (3 + len(tiers) * len(keys)))
    for label, records in rows.items():
        if not records:
            continue
        steps = sorted({record["step"] for record in records})
        cells = []
        for n in tiers:
            for key in keys:
                values = [100 * record["tiers"][str(n)][key] for record in records if key in record["tiers"].get(str(n), {})]
                mean, half = mean_interval(values) if values else (None, None)
                cells.append("" if mean is None else f"{mean:.1f}" if half is None else f"{mean:.1f} ± {half:.1f}")
        span = f"{steps[0]}" if len(steps) == 1 else f"{steps[0]}..{steps[-1]}"
        lines.append(f"| {label} | {len(records)} | {span} | {' | '.join(cells)} |")
    return "\n".join(lines)


def analyze_table(runs: list[Run], out: Output):
    """Print the result table, and write it as table.md."""
    for run in runs:
        last = run.records["eval"][-1]["step"] if run.records["eval"] else None
        if last is None:
            missing(run, "evaluations")
        elif last < run.settings.steps:
            print(f"{run.path} was evaluated last at step {last} of {run.settings.steps}")
    if any(run.records["eval"] for run in runs):
        table = result_table(runs)
        print(table)
        out.text("table.md", table + "\n")


# ---- everything of one run -------------------------------------------------------------------------------------------


def analyze_all(run: Run, out: Output):
    """Every figure and table that one run has data for: of the base in out, of the trained model in out/final."""
    for name, folder in (("base", out), ("final", out._replace(folder=out.folder / "final"))):
        if name not in checkpoints(run):
            missing(run, {"base": "base model", "final": "trained model"}[name])
            continue
        analyze_entropy(run, folder, name)
        analyze_writes(run, folder, name)
    if run.records["eval"]:
        analyze_lens(run, out, run.records["eval"][0]["examples"][0].split("=")[0] + "=", checkpoints(run)[-1])
    analyze_dynamics([run], out)
    analyze_refinement([run], out)
    analyze_table([run], out)
    analyze_passk([run], out)


# ---- command line ------------------------------------------------------------------------------------------------------


LOOKS_INSIDE = ("entropy", "writes", "lens", "sample")  # the commands that take a pretrained model as well


def parse_arguments(argv) -> argparse.Namespace:
    """Read the command line; an option that is not given is not in the result. A first argument that is no command is a
    run, of which everything is wanted."""
    parser = argparse.ArgumentParser(prog="analyze.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)

    def command(name, help, several=False):
        sub = commands.add_parser(name, help=help, allow_abbrev=False, argument_default=argparse.SUPPRESS)
        what = "directory of a run" + (", or a pretrained model: directory, .gguf file or name on the hub" if name in LOOKS_INSIDE else "")
        sub.add_argument("run", metavar="RUN", nargs="+" if several else None, help=what)
        if name != "sample":
            sub.add_argument("--out", metavar="DIR", help="where to write (default: RUN/figures, of the first run; out/MODEL/figures)")
            sub.add_argument("--pdf", action="store_true", help="write figures as PDF as well")
        if name in LOOKS_INSIDE:
            default = "base" if name in ("entropy", "writes") else "final"
            sub.add_argument("--checkpoint", metavar="base|phase1|final|FILE", help=f"which model of a run (default: {default})")
            sub.add_argument("--dtype", choices=("float32", "bfloat16"), help="type of a pretrained model's weights (default: float32)")
        return sub

    command("all", "everything that a run holds data for")
    for name, help in (("entropy", "entropy flow and entropy change by layer"), ("writes", "cosines of writes with the stream, by layer")):
        sub = command(name, help)
        sub.add_argument("--prompts", type=int, help="look at the responses to this many held-out problems of a run (default: 64)")
        sub.add_argument("--text", help="look at this text instead; all behind its first token is response")
        sub.add_argument("--prompt", help="prompt of --text, which alone is the response then")
    commands.choices["entropy"].add_argument("--matched", action="store_true", help="add the norm-matched curve")
    command("dynamics", "reward, accuracy, entropy and length over steps", several=True)
    command("refinement", "cosines to the final layer over steps", several=True)
    passk = command("passk", "Pass@K for K = 1..256", several=True)
    passk.add_argument("--problems", type=int, help="held-out problems a tier (default: 16)")
    passk.add_argument("--samples", type=int, help="responses to each of them (default: 256)")
    lens = command("lens", "what every internal policy would say, position by position")
    lens.add_argument("prompt", metavar="PROMPT", help="such as 7+5*3-2=")
    lens.add_argument("--text", help="the response to look at (default: what the model answers greedily)")
    lens.add_argument("--view", choices=VIEWS, help="policies of the picture: raw, or with the final norm (default: raw)")
    sample = command("sample", "responses of an internal policy, and its accuracy")
    sample.add_argument("prompt", metavar="PROMPT", help="such as 7+5*3-2=")
    sample.add_argument("--layer", type=int, help="layer, 1..L (default: the target layer of the run)")
    sample.add_argument("--count", type=int, help="responses to print (default: 4)")
    sample.add_argument("--problems", type=int, help="held-out problems a tier (default: 256)")
    command("table", "results as Markdown, mean and 95 %% interval over seeds", several=True)
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] not in commands.choices and not argv[0].startswith("-"):
        if not Path(argv[0]).exists():
            raise ValueError(f"{argv[0]!r} is neither a run nor a command; the commands are {', '.join(commands.choices)}")
        argv.insert(0, "all")
    return parser.parse_args(argv)


def read_subject(path, command: str, options: dict):
    """The run or pretrained model that a command is about. Raises ValueError for options that are for the other one."""
    if is_run(path):
        wrong, kind = options.keys() & {"dtype"}, "run"
    elif command in LOOKS_INSIDE:
        wrong, kind = options.keys() & {"checkpoint", "prompts", "problems"}, "pretrained model"
    else:
        raise ValueError(f"{path} is no run; of a pretrained model there are {', '.join(LOOKS_INSIDE)}")
    if wrong:
        raise ValueError(f"--{min(wrong)} is not for a {kind}, which {path} is")
    return read_run(path) if kind == "run" else read_pretrained(path, options.pop("dtype", "float32"))


def main(argv=None) -> int:
    """Run the command line; returns the exit code: 0, or 2 for what the user can mend."""
    try:
        options = vars(parse_arguments(argv))
        command, paths = options.pop("command"), options.pop("run")
        runs = [read_subject(path, command, options) for path in ([paths] if isinstance(paths, str) else paths)]
        if command != "sample":
            folder, pdf = options.pop("out", None), options.pop("pdf", False)
            options["out"] = Output(Path(folder or runs[0].path / "figures"), pdf)
        with plt.rc_context(STYLE):
            globals()[f"analyze_{command}"](runs if isinstance(paths, list) else runs[0], **options)
        return 0
    except (ValueError, OSError, ImportError) as error:
        print(f"analyze.py: {error}", file=sys.stderr)
        return 2


# The web page of `lens`. DATA is replaced by the cells; the policy in its head forbids it to load anything.
LENS_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>minibupo lens</title>
<style>
  :root { color-scheme: light dark; }
  body { font: 14px/1.4 system-ui, sans-serif; margin: 1.5em; }
  code, td, th { font-family: ui-monospace, monospace; }
  .panels, #detail { display: flex; flex-wrap: wrap; gap: 1.5em; align-items: flex-start; margin-top: 1em; }
  table { border-collapse: collapse; }
  caption { text-align: left; font-family: system-ui, sans-serif; font-weight: 600; padding-bottom: .3em; }
  th { font-weight: 400; opacity: .7; padding: 0 .4em; text-align: right; }
  .grid td { width: var(--cell); max-width: var(--cell); height: 1.5em; padding: 0; border: 1px solid Canvas;
             overflow: hidden; white-space: pre; text-align: center; cursor: crosshair; }
  .grid td.said { font-weight: 700; text-decoration: underline; }
  .grid td.at { outline: 2px solid #D55E00; outline-offset: -1px; }
  #detail caption { white-space: nowrap; }
  #detail td { padding: 0 .4em; text-align: right; }
  .controls { display: flex; flex-wrap: wrap; gap: 1.5em; align-items: center; }
  .scale { display: inline-block; width: 8em; height: .8em; vertical-align: middle; }
</style>
</head>
<body>
<h1 style="font-size: 1.2em">What each internal policy would say: <code id="title"></code></h1>
<div class="controls">
  <label>checkpoint <input id="checkpoint" type="range" min="0" step="1" value="0"> <output id="name"></output></label>
  <label><input id="normed" type="checkbox"> with the final norm (logit lens)</label>
  <span>entropy 0 <span class="scale" id="scale"></span> <span id="logV"></span> nats</span>
</div>
<div class="panels" id="panels"></div>
<div id="where" style="margin-top: 1em">Point at a cell, or move with the arrow keys; [ and ] change the checkpoint, n the norm.
A cell has the likeliest token, underlined where it is the one that follows.</div>
<div id="detail"></div>
<script type="application/json" id="data">DATA</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const sites = {resid_post: "layer policy, H", attn_out: "attention policy, A", mlp_out: "FFN policy, F"};
const L = data.checkpoints[0].attn_out.raw.length, M = data.said.length;
const $ = id => document.getElementById(id);
let at = null;  // the cell pointed at: {layer, position}

function make(tag, text, parent) {
  const node = document.createElement(tag);
  if (text !== null) node.textContent = text;
  parent.append(node);
  return node;
}
const low = [0, 34, 78], high = [253, 231, 120];  // from sure to undecided
const colour = f => `rgb(${low.map((a, i) => Math.round(a + (high[i] - a) * f)).join(",")})`;
function cell(site, view, layer, position) {  // [entropy, token, p, token, p, ...], or undefined: H^0 has no modules
  return data.checkpoints[$("checkpoint").value][site][view][layer - (site === "resid_post" ? 0 : 1)]?.[position];
}

for (const site in sites) {
  const table = make("table", null, $("panels"));
  table.className = "grid";
  make("caption", sites[site] + " by layer", table);
  const head = make("tr", null, table);
  make("th", "", head);
  for (let l = site === "resid_post" ? 0 : 1; l <= L; l++) make("th", l || "emb.", head);
  for (let m = 0; m < M; m++) {
    const row = make("tr", null, table);
    make("th", data.said[m], row);
    for (let l = site === "resid_post" ? 0 : 1; l <= L; l++) {
      const td = make("td", null, row);
      Object.assign(td.dataset, {site, layer: l, position: m});
    }
  }
}
function paint() {
  const view = $("normed").checked ? "normed" : "raw";
  for (const td of document.querySelectorAll(".grid td")) {
    const {site, layer, position} = td.dataset, [entropy, token] = cell(site, view, +layer, +position);
    const f = Math.min(1, entropy / data.logV);
    td.textContent = data.words[token];
    td.style.background = colour(f);
    td.style.color = f < 0.5 ? "white" : "black";
    td.className = (data.words[token] === data.said[position] ? "said" : "")
      + (at && at.layer === +layer && at.position === +position ? " at" : "");
  }
  $("name").textContent = data.checkpoints[$("checkpoint").value].name;
  if (at) tell();
}
function tell() {
  $("where").textContent = `layer ${at.layer || "0 (embedding)"}, position ${at.position + 1} of ${M}: `
    + `reads "${data.read[at.position]}", to be followed by "${data.said[at.position]}"`;
  $("detail").replaceChildren();
  for (const site in sites) for (const view of ["raw", "normed"]) {
    const found = cell(site, view, at.layer, at.position);
    if (!found) continue;
    const table = make("table", null, $("detail"));
    table.id = `${site}-${view}`;
    make("caption", `${sites[site]}, ${view}: ${found[0].toFixed(2)} nats`, table);
    for (let i = 1; i < found.length; i += 2) {
      const row = make("tr", null, table);
      make("td", data.words[found[i]], row);
      make("td", found[i + 1].toFixed(4), row);
    }
  }
}
function point(layer, position) {
  at = {layer: Math.min(L, Math.max(0, layer)), position: Math.min(M - 1, Math.max(0, position))};
  paint();
}
// moves only: a browser also says "over" when the cell under a resting pointer is repainted
for (const kind of ["pointermove", "click"]) $("panels").addEventListener(kind, event => {
  const {layer, position} = event.target.dataset;
  if (position !== undefined && !(at && at.layer === +layer && at.position === +position)) point(+layer, +position);
});
function walk(by) {
  $("checkpoint").value = +$("checkpoint").value + by;
  paint();
}
document.addEventListener("keydown", event => {
  const step = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
  if (event.target === $("checkpoint")) return;
  if (step) { point((at?.layer ?? 0) + step[0], (at?.position ?? 0) + step[1]); event.preventDefault(); }
  if (event.key === "[" || event.key === "]") walk(event.key === "]" ? 1 : -1);
  if (event.key === "n") { $("normed").checked = !$("normed").checked; paint(); }
});
$("checkpoint").max = data.checkpoints.length - 1;
$("checkpoint").addEventListener("input", paint);
$("normed").addEventListener("change", paint);
$("title").textContent = data.title;
$("logV").textContent = data.logV.toFixed(2);
$("scale").style.background = `linear-gradient(90deg, ${colour(0)}, ${colour(1)})`;
// cells of one width, or the grid would shift under the pointer as its tokens change
const longest = Math.max(...data.said.concat(data.words).map(word => word.length));
document.body.style.setProperty("--cell", `${Math.min(9, Math.max(3, longest)) + 0.5}ch`);
paint();
</script>
</body>
</html>
"""

if __name__ == "__main__":
    sys.exit(main())
