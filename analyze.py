"""A look at one model or one run: what its internal policies are, and what training does to them.

    python analyze.py RUN                       all that the run has data for, into RUN/figures
    python analyze.py entropy RUN               entropy flow and entropy change by layer (Fig. 2, 3)
    python analyze.py dynamics RUN              reward, accuracy, entropy, length over steps
                                                (Fig. 4, 7) and feature refinement (Fig. 5)
    python analyze.py writes RUN                cosine of each write with the stream (Appendix B.2)
    python analyze.py lens RUN "7+5*3-2="       what each internal policy would say: picture, page
    python analyze.py sample RUN "7+5*3-2=" --layer 4    answers of an internal policy itself
    python analyze.py step RUN                  one update as a table, token by token

In place of RUN all but `dynamics` take a language model: a name on the Hugging Face hub
(OWNER/NAME), a directory with safetensors, or a .gguf file (needs the extra `hf`). Figure numbers
are the paper's. Entropies are in nats, at temperature 1. Layers are 1..L; H^0 is the embedding.
"""

import argparse
import copy
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch

import minibupo
import train_toy as toy
from minibupo import FULL, SITES, Policy, Rollouts, response_mask

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# ---- what is looked at -------------------------------------------------------------------------


@dataclass
class Subject:
    """A run or a language model, in one shape. Its models keep the contract in minibupo.py."""

    folder: Path  # where figures go
    chosen: str  # the checkpoint to look at
    checkpoints: list[str]  # all that there are, in the order of training
    load: Callable  # name of a checkpoint -> model
    encode: Callable  # prompt or None, text -> token ids, and how many of them are the prompt's
    decode: Callable  # token ids -> text
    eos_id: int
    limit: int  # tokens that a response may take
    run: Path | None = None  # None for a language model,
    settings: toy.Settings | None = None  # and so is this

    def word(self, token: int) -> str:
        """The text of one token: a dot for a space, an escape for what cannot be seen."""
        text = self.decode([token])
        return "".join("·" if c == " " else c if c.isprintable() else repr(c)[1:-1] for c in text)

    def need_run(self, what: str):
        """Raise ValueError if this is a language model."""
        if self.run is None:
            raise ValueError(f"{what} needs a run of train_toy.py; this is a language model")


CHECKPOINTS = {"base": "base.pt", "phase1": "phase1.pt", "final": "ckpt.pt"}


def read_run(path: Path, chosen="base", device="auto") -> Subject:
    """The run in a directory. Raises ValueError if there is none."""
    s, device = toy.read_settings(path), toy.pick_device(device)
    torch.set_num_threads(s.threads)
    files = {name: path / file for name, file in CHECKPOINTS.items() if (path / file).is_file()}

    def load(name):
        if name in CHECKPOINTS and name not in files:
            raise ValueError(f"{path} has no checkpoint {name}, only {', '.join(files) or 'none'}")
        return toy.load_model(files.get(name, name), device)

    def encode(prompt, text):
        return toy.encode((prompt or "") + text), len(toy.encode(prompt or ""))

    names = list(files) if chosen in CHECKPOINTS else [chosen]  # else it is a file
    how = (load, encode, toy.ENCODING.decode, toy.EOS, s.response_limit)
    return Subject(path / "figures", chosen, names, *how, path, s)


def read_language_model(source: str, dtype="float32", device="auto") -> Subject:
    """A language model by hf/adapter.py. Raises ValueError where that cannot be imported."""
    try:
        from hf.adapter import encode_chat, encode_text, load

        model, tokenizer = load(source, dtype, toy.pick_device(device))
    except ImportError as error:
        raise ValueError(f"{source} cannot be read as a language model: {error}") from None
    name = Path(source).name.removesuffix(".gguf")

    def encode(prompt, text):
        if prompt is None:
            return encode_text(tokenizer, text), 0
        return encode_chat(tokenizer, prompt, text)

    how = (lambda _: model, encode, tokenizer.decode, tokenizer.eos_token_id)
    return Subject(Path("out") / name / "figures", name, [name], *how, limit=48)


def looked_at(of: Subject, model, args):
    """Tokens (N, T) and mask (N, T-1) of the response positions that a command looks at.

    They are --text after the prompt, or all but the first token of a text alone, or what the model
    answers to a prompt alone (greedily). With neither they are its own solutions of the run's
    held-out problems. Raises ValueError for a text without response positions."""
    if args.text is None and args.prompt is None:
        of.need_run("a look without a prompt or --text")
        return toy.own_solutions(model, of.settings)
    ids, first = of.encode(args.prompt, args.text or "")
    if args.text is None and ids:
        asked = torch.tensor([ids], device=model.device)
        answer = model.generate(asked, of.limit, temperature=0, eos_id=of.eos_id)
        ids = answer.tokens[0, : answer.end[0]].tolist()
    first, T = max(1, first), len(ids)
    if T <= first:
        raise ValueError(f"no response to look at in prompt {args.prompt!r}, text {args.text!r}")
    mask = response_mask(torch.tensor([first]), torch.tensor([T]), T)
    return torch.tensor([ids], device=model.device), mask.to(model.device)


def look(of: Subject, args) -> tuple[dict, float]:
    """minibupo.look_inside of the chosen checkpoint, as float64 arrays (L, M) or (L+1, M), and the
    entropy log V of a uniform policy."""
    model = of.load(of.chosen)
    found = minibupo.look_inside(model, *looked_at(of, model, args))
    arrays = {name: values.cpu().double().numpy() for name, values in found.items()}
    return arrays, math.log(model.vocab_size)


# ---- entropy (Fig. 2, 3) -----------------------------------------------------------------------

LAYER, FFN, ATTENTION, NORMED, MATCHED = "C0", "C1", "C2", "C3", "C5"  # one colour each everywhere
GREY, WIDTH = "0.45", 7.0  # WIDTH in inches: both columns of a two-column page


def entropy(of: Subject, args):
    """entropy.json, entropy_flow.png and entropy_change.png of one checkpoint. The file has means
    over positions, their standard errors as NAME_sem (None for one position), and medians as
    NAME_median, since a few positions can own a mean."""
    found, log_vocab = look(of, args)
    M = found["layer"].shape[1]
    summary = {"positions": M, "log_vocab": log_vocab, "target_layer": None}
    for name, values in found.items():
        summary[name] = values.mean(1).tolist()
        summary[f"{name}_sem"] = (values.std(1, ddof=1) / M**0.5).tolist() if M > 1 else None
        summary[f"{name}_median"] = np.median(values, axis=1).tolist()
    try:
        summary["target_layer"] = minibupo.target_layer(summary["d_mlp"])
        says = f"target layer {summary['target_layer']}"
    except ValueError as error:
        says = f"no target layer: {error}"
    print(f"{of.chosen}, {M} response positions: {says}")
    save_text(of.folder / "entropy.json", json.dumps(summary, indent=1))
    save_figure(of.folder / "entropy_flow", draw_flow(found, log_vocab), args.pdf)
    figure = draw_change(found, summary["target_layer"], log_vocab)
    save_figure(of.folder / "entropy_change", figure, args.pdf)


def draw_flow(found: dict, log_vocab: float):
    """The entropy flow (Fig. 2): H^l by layer, and for each module a line from the entropy of what
    it reads, the normed stream, to that of what it writes, its dH. Below: the stream's size."""
    layers = np.arange(len(found["layer"]))
    figure, (ax, below) = plt.subplots(2, figsize=(WIDTH, 4.6), sharex=True, height_ratios=(4, 1))
    curve(ax, 0, found["layer"], LAYER, "$H^l$, raw")
    dashed = dict(layer_normed=(NORMED, "with LN$_f$"), layer_matched=(MATCHED, "size of $H^L$"))
    for name, (colour, label) in dashed.items():
        ax.plot(layers, found[name].mean(1), "--", color=colour, label=f"$H^l$, {label}")
    modules = {"attn": ("attention", "^", ATTENTION, 2 / 3), "mlp": ("FFN", "s", FFN, 1 / 3)}
    for name, (label, marker, colour, back) in modules.items():
        read, written = found[f"{name}_in"].mean(1), found[name].mean(1)
        ax.vlines(layers[1:] - back, read, written, color=colour)
        style = dict(marker=marker, color=colour, linestyle="")
        ax.plot(layers[1:] - back, read, **style, mfc="white", label=f"{label} reads")
        ax.plot(layers[1:] - back, written, **style, label=f"{label} writes")
    ax.axhline(log_vocab, color=GREY, linewidth=0.6, linestyle=":")
    ax.annotate("uniform", (layers[-1], log_vocab), ha="right", va="bottom", color=GREY, size=7)
    ax.set(ylabel="entropy (nats)", ylim=(0, 1.08 * log_vocab), xlabel="")
    figure.legend(ncols=4, loc="outside upper center")
    curve(below, 0, found["rms_layer"], LAYER)
    below.set_yscale("log", subs=(2, 5))
    below.yaxis.set_major_formatter("{x:g}")
    below.yaxis.set_minor_formatter("{x:g}")
    below.set_ylabel("RMS($H^l$)")
    return figure


REGIONS = {  # by the sign of dH
    1: ("exploration, dH > 0", "#FBE7C6"),
    0: ("integration, dH about 0", "#EEEEEE"),
    -1: ("convergence, dH < 0", "#D3E6F5"),
}


def draw_change(found: dict, target: int | None, log_vocab: float):
    """Entropy change by layer (Fig. 3), the target layer marked, each layer shaded by its region;
    "about 0" is within 2 % of log V."""
    panels = {"d_attn": (ATTENTION, "ATTN"), "d_mlp": (FFN, "FFN"), "d_layer": (LAYER, "Layer")}
    figure, axes = plt.subplots(1, 3, figsize=(WIDTH, 2.6), sharey=True)
    for ax, (name, (colour, title)) in zip(axes, panels.items()):
        for l, d in enumerate(found[name].mean(1), 1):
            shade = REGIONS[int(np.sign(d)) if abs(d) > 0.02 * log_vocab else 0][1]
            ax.axvspan(l - 0.5, l + 0.5, color=shade, linewidth=0)
        ax.axhline(0, color="black", linewidth=0.6)
        curve(ax, 1, found[name], colour)
        ax.set_title(f"$dH_{{{title}}}$")
    if target is not None:
        d = found["d_mlp"].mean(1)[target - 1]
        axes[1].plot(target, d, "k*", markersize=9, label=f"target layer, {target}")
        axes[1].legend(loc="upper right")
    axes[0].set_ylabel("entropy change (nats)")
    names, colours = zip(*REGIONS.values())
    patches = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours]
    figure.legend(patches, names, ncols=3, loc="outside upper center")
    return figure


# ---- dynamics (Fig. 4, 5, 7) -------------------------------------------------------------------


def dynamics(of: Subject, args):
    """dynamics.png and refinement.png of a run; a dotted line where phase 2 begins."""
    of.need_run("dynamics")
    for name, panels in read_training(of).items():
        figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 2.2))
        for ax, (title, points) in zip(axes, panels.items()):
            lines = ax.plot(list(points), list(points.values()))
            ax.set(title=title, xlabel="step")
            if of.settings.s_inter:
                ax.axvline(of.settings.s_inter + 0.5, color=GREY, linewidth=0.8, linestyle=":")
            for l, line in enumerate(lines if len(lines) > 1 else ()):  # of layers 0..L
                line.set_color(plt.cm.cividis(0.9 * l / len(lines)))
                x, y = line.get_data()
                ax.annotate(l or "emb.", (1.02 * x[-1], y[-1]), va="center", size=6)
        save_figure(of.folder / name, figure, args.pdf)


ALL_LAYERS = "cos($H^l$, $H^L$), all $l$"  # has a list for each step, the others one number


def read_training(of: Subject) -> dict:
    """What a run's metrics say of its training: {figure: {title: {step: value}}}. Raises ValueError
    for a run without steps, and for damaged metrics."""
    steps, evals, inside = (toy.read_metrics(of.run, kind) for kind in ("step", "eval", "internal"))
    layer, n = target_policy(of).layer, str(of.settings.n)
    if not steps:
        raise ValueError(f"{of.run} has no steps of RL yet")

    def points(records, value):
        return {int(record["step"]): np.float64(value(record)) for record in records}

    with toy.reading(of.run / "metrics.jsonl"):
        return {
            "dynamics": {
                "training reward": points(steps, lambda r: r["reward"]),
                f"held-out Avg@{toy.SAMPLES}, n = {n}": points(evals, lambda r: r["tiers"][n][AVG]),
                "entropy (nats)": points(steps, lambda r: r["policy_entropy"]),
                "length (tokens)": points(steps, lambda r: r["length"]),
            },
            "refinement": {
                "cos($H^l$, $H^L$), target $l$": points(inside, lambda r: r["cos_layer"][layer]),
                ALL_LAYERS: points(inside, lambda r: r["cos_layer"]),
                "$dH_{Layer}$, target $l$": points(inside, lambda r: r["d_layer"][layer - 1]),
                "perplexity": points(inside, lambda r: r["perplexity"]),
            },
        }


AVG = f"avg@{toy.SAMPLES}"


def target_policy(of: Subject) -> Policy:
    """The policy of a run's phase 1. For GRPO the one that the paper's rule would take, or layer
    L-1 where the rule names none."""
    of.need_run("a command without --layer")
    s = of.settings
    if s.layer is not None:
        return Policy(s.layer, s.site)
    with toy.reading(of.run / "metrics.jsonl"):
        d_mlp = [float(d) for d in toy.read_metrics(of.run, "internal")[0]["d_mlp"]]
    try:
        return Policy(minibupo.target_layer(d_mlp), s.site)
    except ValueError:
        return Policy(s.n_layer - 1)


# ---- writes (Appendix B.2) ---------------------------------------------------------------------


def writes(of: Subject, args):
    """writes.png: the cosine of each module's write with the stream that it is added to, by layer.
    Above 0 it amplifies what is there, below 0 it suppresses it. Numbers are in entropy.json."""
    found, _ = look(of, args)
    figure, ax = plt.subplots(figsize=(WIDTH / 2, 2.4))
    ax.axhline(0, color="black", linewidth=0.6)
    curve(ax, 1, found["cos_attn"], ATTENTION, "attention")
    curve(ax, 1, found["cos_mlp"], FFN, "FFN")
    ax.set_ylabel("cos(write, stream)")
    ax.legend()
    save_figure(of.folder / "writes", figure, args.pdf)


# ---- lens --------------------------------------------------------------------------------------

VIEWS = ("raw", "normed")  # softmax(h E_u^T), and the logit lens, softmax(LN_f(h) E_u^T)
PANELS = dict(zip(SITES, ("layer policy, $H^l$", "attention policy, $A^l$", "FFN policy, $F^l$")))


def lens(of: Subject, args):
    """lens.png of the chosen checkpoint, and lens.html of all, for a prompt and a response: --text,
    or what the chosen checkpoint answers greedily."""
    model = of.load(of.chosen)
    args.prompt = args.prompt or example(of)
    tokens, mask = looked_at(of, model, args)
    words = [of.word(i) for i in tokens[0].tolist()]
    positions = mask[0].nonzero()[:, 0].tolist()
    read, said = [words[t] for t in positions], [words[t + 1] for t in positions]
    cells = {name: lens_cells(of.load(name), tokens, mask, of.word) for name in of.checkpoints}
    data = {"title": "".join(words), "read": read, "said": said, "checkpoints": cells}
    data["logV"] = math.log(model.vocab_size)
    # "<" as an escape, so that no token can end the script that the data stands in
    data_text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    page = (Path(__file__).parent / "lens.html").read_text(encoding="utf-8")
    save_text(of.folder / "lens.html", page.replace("DATA", data_text))
    save_figure(
        of.folder / "lens", draw_lens(cells[of.chosen][args.view], said, data["logV"]), args.pdf
    )


def example(of: Subject) -> str:
    """A prompt to look at: the first held-out problem of a run."""
    of.need_run("a command without a prompt")
    rng = toy.stream(of.settings.seed, "lens")
    return toy.evaluation_problems(rng, of.settings.n, 1)[0] + "="


@torch.no_grad()
def lens_cells(model, tokens, mask, word) -> dict:
    """What each internal policy would say: {view: {site: rows}} with a row for each layer, H^0
    first in resid_post. A row has for each response position [entropy, [token, p], ..] of the five
    likeliest tokens."""
    cells = {view: {site: [] for site in SITES} for view in VIEWS}

    def add(site, h):
        for view, vectors in zip(VIEWS, (h, model.final_norm(h))):
            logits = minibupo.at_least_float32(model.unembed(vectors))  # (M, V)
            likeliest, row = logits.softmax(-1).topk(min(5, model.vocab_size)), []
            for H, p, ids in zip(minibupo.entropy(logits), *likeliest):
                top = zip(map(word, ids.tolist()), p.tolist())
                row.append([round(float(H), 2), *([token, round(q, 4)] for token, q in top)])
            cells[view][site].append(row)

    for l, trace in enumerate(model.trace(tokens[:, :-1]), 1):
        if l == 1:
            add("resid_post", trace.resid_pre[mask])  # H^0
        for site in SITES:
            add(site, getattr(trace, site)[mask])
    return cells


def draw_lens(cells: dict, said: list[str], log_vocab: float):
    """Layers by response positions: each cell has the token that a policy would choose, in bold if
    it is the one that follows, coloured by the policy's entropy."""
    L, M = len(cells["mlp_out"]), len(said)
    size = max(WIDTH, (0.4 if log_vocab < 4 else 0.55) * M + 1), 0.6 * L + 1.5
    figure, axes = plt.subplots(3, figsize=size, sharex=True, height_ratios=(L + 1, L, L))
    for ax, (site, title) in zip(axes, PANELS.items()):
        rows = cells[site]
        H = np.array([[cell[0] for cell in row] for row in rows])
        image = ax.imshow(H, cmap="cividis", vmin=0, vmax=log_vocab, aspect="auto", origin="lower")
        for i, m in np.ndindex(H.shape):
            token = rows[i][m][1][0]
            weight = "bold" if token == said[m] else "normal"
            colour = "white" if H[i, m] < 0.55 * log_vocab else "black"
            style = dict(ha="center", va="center", size=7, weight=weight, color=colour)
            ax.text(m, i, token if len(token) < 8 else token[:6] + "…", parse_math=False, **style)
        ax.set_yticks(range(len(rows)), [l or "emb." for l in range(L + 1 - len(rows), L + 1)])
        ax.set(ylabel="layer", title=title)
        ax.tick_params(length=0)
    axes[2].set_xticks(range(M), said, parse_math=False)
    axes[2].set_xlabel("response token, to be predicted")
    figure.colorbar(image, ax=axes, label="entropy (nats)", fraction=0.03, pad=0.01)
    return figure


# ---- sample ------------------------------------------------------------------------------------


def sample(of: Subject, args):
    """Print responses of an internal policy to a prompt, and its accuracy beside pi_theta's."""
    model, prompt = of.load(of.chosen), args.prompt or example(of)
    layer = args.layer or target_policy(of).layer
    asked = torch.tensor([of.encode(prompt, "")[0]], device=model.device)
    policies = {f"layer {layer}": model.truncated(layer), "pi_theta": model}
    options = dict(num_samples=args.count, eos_id=of.eos_id)
    options["generator"] = toy.torch_stream(model.device, 0, "sample")
    for name, policy in policies.items():
        print(f"responses of {name} ({of.chosen}) to {prompt}")
        sampled = policy.generate(asked, of.limit, **options)
        for row, end in zip(sampled.tokens.tolist(), sampled.end.tolist()):
            print(f"  {of.decode(row[asked.shape[1] : end])!r}")
    if of.run is None:
        print("their accuracy takes a run of train_toy.py; this is a language model")
        return
    print(f"{AVG} on 128 held-out problems of each length, in %:")
    for name, policy in policies.items():
        results, _ = toy.evaluate(policy, of.settings, of.settings.tiers, 128)
        print(
            f"  {name:10}",
            *(f"n = {n}: {100 * r[AVG]:5.1f}" for n, r in results.items()),
            sep="   ",
        )


# ---- step --------------------------------------------------------------------------------------


def step(of: Subject, args):
    """step.txt: one update on one question, from the same weights in both phases, side by side."""
    model, rows = of.load(of.chosen), []
    target = Policy(args.layer) if args.layer else target_policy(of)
    rollouts = one_question(of, model, args)
    start, tokens = int(rollouts.prompt_len[0]), rollouts.tokens.tolist()
    advantages = minibupo.group_advantages(rollouts.rewards)[0]
    lines = [f"question {of.decode(tokens[0][:start])!r}\n", "reward  advantage   response"]
    for row, end, R, A in zip(tokens, rollouts.end, rollouts.rewards[0], advantages):
        lines.append(f"{R:6g}{A:+11.3f}   {''.join(map(of.word, row[start:end]))}")
    rows = zip(*(one_step(of, model, rollouts, policy).items() for policy in (target, FULL)))
    lines += ["", *(f"{label:30}{one:>44}{two:>44}" for (label, one), (_, two) in rows), WHY]
    text = "\n".join(line.rstrip() for line in lines)
    save_text(of.folder / "step.txt", text)
    if args.command == "step":
        print(text)


WHY = """
Before the step every ratio is 1. So the loss is only minus the mean advantage of the tokens, 0 if
all responses are equally long, and says nothing of how good they are. Its gradient is not 0: for a
token it is -advantage / tokens times the gradient of its log-probability. "none": this gradient
does not exist, and nothing moves these weights. E_u is lm_head.weight, or the embedding if tied."""


def one_question(of: Subject, model, args) -> Rollouts:
    """The question of a prompt, --responses and --rewards; or the first one of the run's first step
    whose responses, sampled from the model, are not all right or all wrong."""
    if args.responses is None and args.rewards is None and args.prompt is None:
        of.need_run("step without a prompt, --responses and --rewards")
        batch = toy.rollouts(of.settings, model, step=1)
        G, q = of.settings.group, int((batch.rewards.std(1) > 0).float().argmax())
        return Rollouts(*(x[q * G : (q + 1) * G] for x in batch[:3]), batch.rewards[q : q + 1])
    responses, rewards = args.responses or [], args.rewards or []
    rows = [of.encode(args.prompt or "", response) for response in responses]
    if not rows or len(rows) != len(rewards) or not all(0 < n < len(row) for row, n in rows):
        raise ValueError("step takes a prompt, --responses, and as many --rewards, or none of them")
    tokens, end = toy.padded([row for row, _ in rows], model.device, value=0)
    prompt_len = torch.tensor([n for _, n in rows], device=model.device)
    return Rollouts(tokens, prompt_len, end, torch.tensor([rewards], device=model.device))


def one_step(of: Subject, model, rollouts: Rollouts, policy: Policy) -> dict[str, str]:
    """minibupo.update of a copy of the model by one mini-batch, and all that it goes by, as text
    {label: value}. Raises ValueError where all rewards are equal."""
    model, options = copy.deepcopy(model), dict(average="token", temperature=1.0)
    lr = of.settings.lr if of.settings else 1e-6  # the paper's, for a language model
    optimizer, N = torch.optim.AdamW(model.parameters(), lr=lr), len(rollouts.tokens)
    batch = minibupo.make_minibatches(model, rollouts, policy, 1, "grpo", chunk=N, **options)
    [(chunks, normalizer)] = batch
    if not chunks:
        raise ValueError("all rewards are equal: no response has an advantage, nothing is learned")
    [(tokens, old, advantages, mask)] = chunks
    before = minibupo.token_logprobs(model, tokens, mask, policy).detach()
    loss, _ = minibupo.add_gradient(model, chunks, policy, normalizer=normalizer, **options)
    norms = gradient_norms(model)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    new = minibupo.token_logprobs(model, tokens, mask, policy).detach()
    after, _ = minibupo.surrogate(new, old, advantages, mask, normalizer=normalizer)

    phase = (
        "phase 2: pi_theta" if policy == FULL else f"phase 1: {policy.site}, layer {policy.layer}"
    )
    text = {"": phase}
    for when, logp, value in (("before", before, loss), ("after", new, after)):
        ratio = (logp - old)[mask].exp()
        text[f"ratios {when} the step"] = f"{ratio.min():.6f} .. {ratio.max():.4g}"
        text[f"loss {when} the step"] = f"{value:.5f}"
    text["\ngradient norm of"] = ""
    text |= {f"  {part}": "none" if x is None else f"{x:.4f}" for part, x in norms.items()}
    text["\nrow     token      advantage"] = "old log p  new log p     ratio cut off"
    order = advantages.argsort().tolist()
    for i in dict.fromkeys(order[-2:] + order[:2]):  # two of the best responses, two of the worst
        for t in mask[i].nonzero()[:, 0].tolist():
            one = (slice(i, i + 1), slice(t, t + 1))  # this token as a batch of its own
            _, cut = minibupo.surrogate(new[one], old[one], advantages[i : i + 1], mask[one])
            label = f"{i:3}.{t:<5}{of.word(int(tokens[i, t + 1])):10}{advantages[i]:+8.3f}"
            p, q = new[i, t], old[i, t]
            text[label] = f"{q:9.4f}{p:11.4f}{(p - q).exp():10.3g}{'yes' if cut else '':>8}"
    return text


def gradient_norms(model) -> dict[str, float | None]:
    """The norm of the gradient by layer, and of each parameter outside the layers; None where there
    is no gradient."""
    squares = {}
    for name, parameter in model.named_parameters():
        number = re.search(r"\.(\d+)\.", name)  # of the layer, from 0
        of_part = squares.setdefault(f"layer {int(number[1]) + 1}" if number else name, [])
        of_part += [] if parameter.grad is None else [float(parameter.grad.norm()) ** 2]
    return {part: sum(found) ** 0.5 if found else None for part, found in squares.items()}


# ---- housekeeping: all of a run, files, the command line ---------------------------------------


def everything(of: Subject, args):
    """All that a run has data for: of its base in out, of the trained model in out/final."""
    of.need_run("everything at once")
    folder = of.folder
    if "final" in of.checkpoints and toy.read_metrics(of.run, "step"):
        dynamics(of, args)
        step(of, args)
    else:
        print(f"{of.run} has no steps of RL: what they change is left out")
    for of.chosen, of.folder in (("base", folder), ("final", folder / "final")):
        if of.chosen in of.checkpoints:
            entropy(of, args)
            writes(of, args)
    if of.checkpoints:
        of.chosen, of.folder = of.checkpoints[-1], folder
        lens(of, args)


STYLE = [  # matplotlib's own, then what we change
    "seaborn-v0_8-paper",
    "seaborn-v0_8-colorblind",
    {"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 8},
    {"figure.constrained_layout.use": True, "legend.frameon": False, "savefig.dpi": 200},
    {"lines.markeredgewidth": 1},
]


def curve(ax, first: int, values, colour, label=None):
    """The mean of values (layers, M) over positions, from layer `first` on, with the middle half of
    the positions as a band."""
    layers = range(first, first + len(values))
    ax.fill_between(layers, *np.quantile(values, (0.25, 0.75), 1), color=colour, alpha=0.18, lw=0)
    ax.plot(layers, values.mean(1), "o-", color=colour, label=label)
    ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    ax.set_xlabel("layer" if first else "layer (0: embedding)")


def save_text(path: Path, text: str):
    """Write a text file, whole or not at all, and say so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    toy.write_text(path, text)
    print(f"wrote {path}")


def save_figure(path: Path, figure, pdf=False):
    """Write a figure as path.png, and as path.pdf if wanted, say so, and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for kind in ("png", "pdf") if pdf else ("png",):
        write = partial(figure.savefig, format=kind)
        toy.write_atomically(path.with_name(f"{path.name}.{kind}"), write)
        print(f"wrote {path}.{kind}")
    plt.close(figure)


COMMANDS = dict(all=everything, entropy=entropy, dynamics=dynamics, writes=writes, lens=lens)
COMMANDS |= dict(sample=sample, step=step)
OPTIONS = {  # that not every command has
    **{"entropy": "prompt text", "writes": "prompt text", "lens": "prompt text view"},
    **{"sample": "prompt layer count", "step": "prompt layer responses rewards"},
}


def parse_arguments(argv) -> argparse.Namespace:
    """The command line. A first argument that is no command is a run, of which all is wanted."""
    style = dict(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = argparse.ArgumentParser("analyze.py", **style, allow_abbrev=False)
    add = parser.add_argument
    add("command", choices=COMMANDS)
    add("run", metavar="RUN", help="directory of a run, or a language model")
    add("prompt", metavar="PROMPT", nargs="?", default=argparse.SUPPRESS, help="such as 7+5*3-2=")
    add("--prompt", help="the same")
    add("--text", help="look at this response (default: the model's own)")
    add("--checkpoint", help="of a run: base, phase1, final, or a file (default: base or final)")
    add("--view", choices=VIEWS, default="raw", help="lens.png: without or with the final norm")
    add("--layer", type=int, help="of sample and step, 1..L (default: that of phase 1)")
    add("--count", type=int, default=4, help="responses that sample prints")
    add("--responses", nargs="+", help="of step: a group of responses to the prompt")
    add("--rewards", nargs="+", type=float, help="of step: their rewards")
    add("--out", type=Path, metavar="DIR", help="where to write (default: RUN/figures)")
    add("--pdf", action="store_true", help="write figures as PDF, too")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    types = ("float32", "bfloat16", "float16")
    add("--dtype", choices=types, default="float32", help="of a language model")
    argv = list(sys.argv[1:] if argv is None else argv)
    is_run = argv and argv[0] not in COMMANDS and not argv[0].startswith("-")
    args = parser.parse_intermixed_args(["all", *argv] if is_run else argv)
    for name in ("prompt", "text", "view", "layer", "count", "responses", "rewards"):
        given = getattr(args, name) not in (None, parser.get_default(name))
        if given and name not in OPTIONS.get(args.command, ""):
            parser.error(f"{args.command} has no {name}")
    return args


def read_subject(args) -> Subject:
    """The run or language model that a command is about. Raises ValueError for neither."""
    path = Path(args.run)
    of_the_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", args.run) and not path.parent.exists()
    if path.is_file() or of_the_hub or list(path.glob("*.safetensors")):
        of = read_language_model(args.run, args.dtype, args.device)
    elif path.is_dir():
        default = "final" if args.command in ("lens", "sample") else "base"
        of = read_run(path, args.checkpoint or default, args.device)
    else:
        raise ValueError(f"{args.run!r} is neither a run nor one of {', '.join(COMMANDS)}")
    # the figures of a --checkpoint go into a folder of its name
    of.folder = args.out or of.folder / Path(args.checkpoint or "").stem
    return of


def main(argv=None) -> int:
    """Run the command line. Returns 0, or 2 for bad input."""
    args = parse_arguments(argv)
    try:
        with plt.style.context(STYLE):
            COMMANDS[args.command](read_subject(args), args)
        return 0
    except (ValueError, OSError) as error:
        print(f"analyze.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
