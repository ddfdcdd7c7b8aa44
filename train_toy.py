"""The toy task and the training run: a base model, its internal policies, then GRPO or BuPO, as one command.

The task: chains of operations on digits, worked out from left to right, every result taken mod 10.

    7+5*3-2=   ->   2*3-2=6-2=4<eos>         (7+5=12 -> 2;  2*3=6;  6-2=4)

The prompt ends in `=`; a response rewrites what is left after each operation; the answer is what follows the last
`=`. The reward is 1 if the response ended and its answer is right, else 0: nothing is said about the way.

The base model learns from *sloppy* solutions: each line before the answer is left out with probability 1/2. So it
has seen careful work and jumps, and jumping over several operations mostly goes wrong. RL on the final answer alone
then discovers careful work: responses grow longer as they get right more often.

    python train_toy.py                                     # base model, then BuPO, into out/bupo-seed0
    python train_toy.py --algo grpo --base out/bupo-seed0/base.pt
    python train_toy.py --resume --out_dir out/bupo-seed0   # go on after Ctrl-C or a crash

All randomness of a step is drawn from (seed, purpose, step), so a run that was stopped goes on bit for bit, and two
runs with the same seed meet the same problems in the same order, whatever they optimise.
"""

import argparse
import json
import os
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from tqdm import tqdm

import minibupo
from minibupo import FULL, Policy, Rollouts, response_mask
from model import GPT, GPTConfig

# ---- tokens: one a character; a digit's id is its value ---------------------------------------------------------

CHARACTERS = "0123456789+-*="
PLUS, MINUS, TIMES, EQUALS, EOS, PAD = range(10, 16)
VOCAB_SIZE = 16
_encoding = tiktoken.Encoding(
    name="toy",
    pat_str=r"[\s\S]",
    mergeable_ranks={c.encode(): i for i, c in enumerate(CHARACTERS)},
    special_tokens={"<eos>": EOS, "<pad>": PAD},
)


def encode(text: str) -> list[int]:
    """Token ids of a text; "<eos>" and "<pad>" are one token each. Raises ValueError naming a character that the toy
    does not know (tiktoken itself would panic)."""
    unknown = [c for c in text.replace("<eos>", "").replace("<pad>", "") if c not in CHARACTERS]
    if unknown:
        raise ValueError(f"character {unknown[0]!r} is not one of {CHARACTERS}")
    return _encoding.encode(text, allowed_special="all")


def decode(ids) -> str:
    """The text of token ids; the inverse of encode."""
    return _encoding.decode([int(i) for i in ids])


# ---- the task: expressions as arrays of token ids (P problems, 2n - 1 tokens) for n digits -----------------------


def work_out(expr):
    """Do the first operation of each expression: (P, 2n-1) -> (P, 2n-3)."""
    a, op, b = expr[:, 0], expr[:, 1], expr[:, 2]
    result = np.select([op == PLUS, op == MINUS], [a + b, a - b], a * b) % 10
    return np.concatenate([result[:, None], expr[:, 3:]], axis=1)


def worked_lines(expr):
    """The expression and all that careful work makes of it, down to the answer (P, 1): n arrays."""
    lines = [expr]
    while lines[-1].shape[1] > 1:
        lines.append(work_out(lines[-1]))
    return lines


def held_out(expr):
    """Whether an expression (P, 2n-1) is kept for evaluation: one in eight of those with n >= 3, by its hash (FNV-1a,
    and one round of MurmurHash3's finalizer, without which short expressions are not spread evenly)."""
    if expr.shape[1] < 5:
        return np.zeros(len(expr), dtype=bool)
    h = np.full(len(expr), 0xCBF29CE484222325, dtype=np.uint64)
    for column in expr.T.astype(np.uint64):
        h = (h ^ column) * np.uint64(0x100000001B3)
    h = (h ^ (h >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    return h >> np.uint64(61) == 0


def draw_problems(rng, count: int, n: int, split: str = "train"):
    """`count` expressions of n >= 2 digits, uniform over a split: (count, 2n-1) token ids.

    "eval": held_out ones, no two alike. "train": neither the problem nor any line of its careful solution is held
    out, so a held-out problem is not met inside a longer one either. Raises ValueError for an n or a count that
    cannot be had.
    """
    if n < 2 or (split == "eval" and (n < 3 or count > 1000)):
        raise ValueError(f"cannot draw {count} problems of {n} digits: training needs n >= 2; evaluation n >= 3, at most 1000")
    kept = np.empty((0, 2 * n - 1), dtype=np.int64)
    while len(kept) < count:
        expr = np.empty((8 * count if split == "eval" else 2 * count, 2 * n - 1), dtype=np.int64)
        expr[:, 0::2] = rng.integers(0, 10, size=(len(expr), n))
        expr[:, 1::2] = rng.integers(PLUS, TIMES + 1, size=(len(expr), n - 1))
        if split == "eval":
            expr = expr[held_out(expr)]
        else:
            expr = expr[~np.any([held_out(line) for line in worked_lines(expr)], axis=0)]
        kept = np.concatenate([kept, expr])
        if split == "eval":  # the first of each, in the order drawn
            kept = kept[np.sort(np.unique(kept, axis=0, return_index=True)[1])]
    return kept[:count]


def prompts(expr):
    """Prompts (P, 2n), expression and `=`."""
    return np.concatenate([expr, np.full((len(expr), 1), EQUALS)], axis=1)


def careful_length(n: int) -> int:
    """Tokens of the longest careful response to a problem of n digits: its lines, the `=` between them, EOS."""
    return sum(2 * k for k in range(1, n))


def worked_solutions(expr, rng=None, skip: float = 0.0):
    """Prompt and response (P, T), padded, and the end (P,) of each: all lines, but each one between the problem and the
    answer left out with probability `skip`, drawn from rng."""
    lines, parts, kept = worked_lines(expr), [], []
    for i, line in enumerate(lines):
        last = i == len(lines) - 1
        parts.append(np.concatenate([line, np.full((len(expr), 1), EOS if last else EQUALS)], axis=1))
        keep = np.ones(len(expr), dtype=bool) if i == 0 or last or skip == 0 else rng.random(len(expr)) >= skip
        kept.append(np.repeat(keep[:, None], parts[-1].shape[1], axis=1))
    tokens, kept = np.concatenate(parts, axis=1), np.concatenate(kept, axis=1)
    order = np.argsort(~kept, axis=1, kind="stable")  # what stays moves to the front, in order
    end = kept.sum(axis=1)
    tokens = np.take_along_axis(tokens, order, axis=1)[:, : end.max()]
    tokens[np.arange(tokens.shape[1]) >= end[:, None]] = PAD
    return tokens, end


def reward(tokens, end, answer):
    """The verifier: 1.0 where the response (ending before `end`) ended by EOS and has nothing but the right digit
    behind its last `=`, else 0.0. tokens (N, T), end and answer (N,) tensors -> (N,). How the answer was reached is
    not looked at: right by wrong steps counts (correct_steps measures that)."""
    third, second, last = (tokens.gather(1, (end - k)[:, None])[:, 0] for k in (3, 2, 1))
    return ((third == EQUALS) & (second == answer) & (last == EOS)).float()


def correct_steps(text: str) -> bool:
    """Whether every line of "problem=line=...=answer<eos>" follows from the line before by one or more operations."""
    lines = text.removesuffix("<eos>").split("=")
    if not text.endswith("<eos>") or len(lines[-1]) != 1:
        return False
    for before, after in zip(lines, lines[1:]):
        if not after or any(c not in CHARACTERS for c in after):
            return False
        follow = [decode(line[0]) for line in worked_lines(np.array([encode(before)]))[1:]]
        if after not in follow:
            return False
    return True


# ---- options -----------------------------------------------------------------------------------------------------


def option(default, help, **extra):
    """A dataclass field that is a command-line option as well."""
    return field(default=default, metadata={"help": help, **extra})


def layer_number(text: str):
    """"auto" or a layer's number, for the command line."""
    return text if text == "auto" else int(text)


@dataclass
class Settings:
    """Every option of a run, each with its help. Raises ValueError for values that cannot be."""

    algo: str = option("bupo", "what to train with", choices=("bupo", "grpo"))
    layer: str | int = option("auto", "layer whose policy phase 1 optimises: 1..L-1, or auto, the paper's rule",
                              type=layer_number, metavar="auto|1..L-1")  # fmt: skip
    site: str = option("resid_post", "policy of phase 1: of the layer, its attention or its FFN",
                       choices=("resid_post", "attn_out", "mlp_out"))  # fmt: skip
    s_inter: int = option(5, "steps of phase 1")
    steps: int = option(60, "steps of RL in all")
    seed: int = option(0, "seed of everything random")
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    threads: int = option(2, "CPU threads; small models gain nothing from many")
    out_dir: str | None = option(None, "directory of the run (default: a new one under out/)", type=str)
    base: str | None = option(None, "start RL from this base model, a base.pt of another run", type=str)
    preset: str = option("default", "a set of defaults", choices=("smoke", "default", "gpu"))

    n: int = option(5, "digits in the problems of RL; pretraining has 2..n, evaluation up to n + 1")
    n_layer: int = option(6, "layers")
    d_model: int = option(64, "width of the residual stream")
    n_head: int = option(2, "attention heads")
    qk_norm: bool = option(True, "RMSNorm on queries and keys, as Qwen3 has it")
    tied: bool = option(True, "unembed with the embedding matrix")

    skip: float = option(0.5, "probability that a line is left out of a solution that the base model learns from")
    sloppy_from: int = option(400, "step of pretraining from which solutions are that sloppy; careful until half of it")
    pretrain_until: float = option(0.95, "end pretraining once this share of single operations is right")
    pretrain_max_steps: int = option(1000, "end pretraining here at the latest")
    pretrain_batch: int = option(48, "rows a step of pretraining, each with a solution of every size")
    pretrain_lr: float = option(4e-3, "learning rate of pretraining")

    train_problems: int = option(0, "train on this many problems again and again (0: on new ones each step)")
    questions: int = option(64, "questions a step of RL")
    group: int = option(8, "responses to each question")
    minibatches: int = option(4, "optimizer steps a step of RL")
    lr: float = option(5e-4, "learning rate of RL")
    lr_steps: int = option(30, "steps of RL at this rate; from there on it falls as 1 / step")
    weight_decay: float = option(0.01, "weight decay of RL")
    clip: float = option(0.2, "the surrogate's epsilon")
    advantage: str = option("grpo", "how rewards become advantages", choices=minibupo.ADVANTAGES)
    average: str = option("token", "average the loss over tokens or sequences", choices=("token", "sequence"))
    chunk: int = option(64, "rows that an update takes through the model at a time (0: all of a mini-batch)")
    precision: str = option("float32", "of matrix products", choices=("float32", "tf32", "bfloat16"))
    temperature: float = option(1.0, "of rollouts and their log-probabilities; evaluation is at 1")
    max_new_tokens: int | None = option(None, "limit of a response (default: a careful one at n + 1 digits)", type=int)

    eval_problems: int = option(256, "held-out problems a tier, before and after; a quarter on the way")
    eval_samples: int = option(8, "responses to each of them")
    eval_every: int = option(30, "steps between evaluations on the way")
    probe_every: int = option(5, "steps between looks at the internal policies")
    save_every: int = option(10, "steps between checkpoints")

    def __post_init__(self):
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata.get("choices")
            if choices and value not in choices:
                raise ValueError(f"{f.name} must be one of {', '.join(choices)}, not {value!r}")
        lowest = dict(s_inter=0, steps=0, seed=0, threads=1, train_problems=0, n=3, n_layer=2, questions=1, group=2, minibatches=1,
                      lr_steps=1, sloppy_from=1, pretrain_max_steps=0, pretrain_batch=1, eval_problems=1, eval_samples=1, eval_every=1,
                      probe_every=1, save_every=1, chunk=0)  # fmt: skip
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, not {getattr(self, name)}")
        for name in ("pretrain_lr", "lr", "clip", "temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("skip", "pretrain_until"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in 0..1, not {getattr(self, name)}")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay must be 0 or more, not {self.weight_decay}")
        if self.minibatches > self.questions:
            raise ValueError(f"minibatches = {self.minibatches} are more than questions = {self.questions}")
        if self.eval_problems > 1000:
            raise ValueError(f"eval_problems must be at most 1000, not {self.eval_problems}")
        if self.s_inter > self.steps:
            raise ValueError(f"s_inter = {self.s_inter} is more than steps = {self.steps}")
        if self.max_new_tokens is not None and self.max_new_tokens < careful_length(self.n):
            raise ValueError(f"max_new_tokens = {self.max_new_tokens} cannot hold the longest careful solution of a trained "
                             f"problem (n = {self.n}), which takes {careful_length(self.n)}")  # fmt: skip
        self.model_config()

    @property
    def response_limit(self) -> int:
        """Tokens that a response may take, in training and evaluation."""
        return self.max_new_tokens or careful_length(self.n + 1)

    def model_config(self) -> GPTConfig:
        """The model, with room for the longest problem that is evaluated and a response of full length."""
        return GPTConfig(VOCAB_SIZE, 2 * (self.n + 1) + self.response_limit, self.n_layer, self.d_model, self.n_head,
                         qk_norm=self.qk_norm, tied=self.tied)  # fmt: skip

    @property
    def tiers(self) -> list[int]:
        """Difficulties that are evaluated, by digits: up to n, and n + 1, which is longer than anything trained."""
        return [t for t in range(self.n - 2, self.n + 2) if t >= 3]


PRESETS = {
    "default": {},
    "smoke": dict(n=3, n_layer=4, d_model=32, pretrain_until=0.6, sloppy_from=250, pretrain_max_steps=400,
                  questions=32, steps=20, s_inter=3, eval_problems=64),
    "gpu": dict(n=8, n_layer=12, d_model=256, n_head=8, questions=128, pretrain_batch=128, pretrain_lr=1e-3, lr=1e-4,
                steps=200, s_inter=15, lr_steps=100, pretrain_max_steps=5000),
}  # fmt: skip


def parse_options(argv) -> tuple[Settings, dict, bool]:
    """Read the command line: the settings (option over preset over default), those given by hand, and --resume."""
    parser = argparse.ArgumentParser(
        prog="train_toy.py", usage="python train_toy.py [--option value ...]", allow_abbrev=False,
        description="Train a small GPT on sloppy arithmetic, then improve it by GRPO or BuPO.",
    )  # fmt: skip
    for f in fields(Settings):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {
            "type": f.metadata.get("type", f.type), "choices": f.metadata.get("choices"), "metavar": f.metadata.get("metavar")}  # fmt: skip
        default = "" if f.default is None else f" (default: {f.default})"
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=f.metadata["help"] + default, **kind)
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out_dir")
    given = vars(parser.parse_args(argv))
    resume = given.pop("resume")
    values = PRESETS[given.get("preset", "default")] | given
    if values.get("algo") == "grpo" and not given.get("s_inter"):
        values["s_inter"] = 0
    settings = Settings(**values)
    for name in ("layer", "site", "s_inter"):
        if given.get(name) and (settings.algo == "grpo" or settings.s_inter == 0):
            raise ValueError(f"--{name} {given[name]} is for phase 1, which --algo grpo and --s_inter 0 do not have")
    return settings, given, resume


# ---- files of a run ----------------------------------------------------------------------------------------------

FORMAT = 1  # of checkpoints


def write_atomically(path: Path, write):
    """Call write(temporary path), then rename: at no moment is `path` half-written."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


def save_checkpoint(path: Path, model: GPT, **more):
    """Write a model (configuration and weights) and whatever `more` holds, plain types and tensors only. Raises
    FloatingPointError, and leaves the file as it was, if a weight is not finite."""
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise FloatingPointError("the weights are no longer finite")
    content = {"format": FORMAT, "model_config": asdict(model.cfg), "model": model.state_dict(), **more}
    write_atomically(path, lambda temporary: torch.save(content, temporary))


def load_checkpoint(path) -> dict:
    """Read what save_checkpoint wrote. Raises ValueError, or OSError, saying what is wrong with the file."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch.load has a different exception for every way in which a file can be broken
        raise ValueError(f"{path} is damaged or not a minibupo checkpoint") from error
    if not isinstance(content, dict) or not {"format", "model_config", "model"} <= content.keys():
        raise ValueError(f"{path} is not a minibupo checkpoint")
    if content["format"] != FORMAT:
        raise ValueError(f"{path} has checkpoint format {content['format']}; this version reads {FORMAT}")
    return content


def restore(path, content: dict, model, optimizer):
    """Put a checkpoint's weights and optimizer state into these. Raises ValueError if they do not fit."""
    try:
        model.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} does not fit the model that config.json and base.pt describe") from error


def load_model(path, device="cpu", context_length: int | None = None) -> GPT:
    """The model in a checkpoint (base.pt, phase1.pt, ckpt.pt). Its context can be made longer: positions are rotary, so
    no weight depends on it. Raises ValueError, or OSError, saying what is wrong with the file."""
    content = load_checkpoint(path)
    try:
        config = GPTConfig(**content["model_config"])
        config.context_length = max(config.context_length, context_length or 0)
        model = GPT(config)
        model.load_state_dict(content["model"])
    except Exception as error:
        raise ValueError(f"{path} holds weights that do not fit its configuration") from error
    if config.vocab_size != VOCAB_SIZE:
        raise ValueError(f"{path} has a vocabulary of {config.vocab_size} tokens; the toy task has {VOCAB_SIZE}")
    return model.to(device)


class Metrics:
    """metrics.jsonl: one JSON object a line, each written at once."""

    def __init__(self, path: Path, keep_bytes: int):
        """Open for appending behind the first keep_bytes bytes; what a stopped run wrote behind its last checkpoint goes."""
        size = path.stat().st_size if path.exists() else 0
        if size < keep_bytes:
            raise ValueError(f"{path} has {size} bytes, less than the {keep_bytes} that the checkpoint beside it knows of")
        self.file = open(path, "r+b" if path.exists() else "w+b")
        self.file.truncate(keep_bytes)
        self.file.seek(keep_bytes)

    def write(self, kind: str, **values):
        """Append {"kind": kind, **values}. Raises FloatingPointError for NaN or infinity, which JSON does not have."""
        try:
            line = json.dumps({"kind": kind, **values}, allow_nan=False)
        except ValueError as error:
            raise FloatingPointError(f"a measurement of step {values['step']} is not finite") from error
        self.file.write(line.encode() + b"\n")
        self.file.flush()

    def size(self) -> int:
        """Bytes written so far."""
        return self.file.tell()


def read_settings(run: Path) -> Settings:
    """The settings in a run's config.json. Raises ValueError for a directory that is no run."""
    path = run / "config.json"
    if not path.exists():
        raise ValueError(f"{run} holds no run: it has no config.json")
    try:
        return Settings(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def read_metrics(run: Path, kind: str) -> list[dict]:
    """All records of one kind in a run's metrics.jsonl. Raises ValueError naming the line that is none."""
    records = []
    for number, line in enumerate((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            if record["kind"] == kind:
                records.append(record)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{run / 'metrics.jsonl'}, line {number} is not a record of a run: {line[:60]!r}") from error
    return records


# ---- the base model ----------------------------------------------------------------------------------------------

PRETRAIN, PROBLEMS, SAMPLE, SHUFFLE, EVALUATE, PROBE = range(6)  # what random numbers are for


def numpy_rng(*key: int):
    """A numpy generator that depends on the key (seed, purpose, step, ...) alone."""
    return np.random.default_rng(key)


def torch_rng(device, *key: int):
    """The same for torch, on a device."""
    return torch.Generator(device).manual_seed(int(numpy_rng(*key).integers(2**62)))


def pretraining_batch(s: Settings, step: int, length: int):
    """Rows of `length` tokens, each a solution of 2, 3, .. n digits in random order, cut off at the end: tokens
    (B, length) and whether each is a token of a response (B, length), as arrays.

    Rows are packed not only to pad nothing. A model that meets each problem at the start of its row learns where the
    first line's operands stand and is lost on the second line; packed, it has to look behind the last `=`. And the
    solutions are careful at first and grow sloppy later, up to step s.sloppy_from: while any line may follow, the
    result of an operation is one of several right tokens, and operations are learned much more slowly.
    """
    rng, tokens, order, response = numpy_rng(s.seed, PRETRAIN, step), [], [], []
    skip = s.skip * min(1.0, max(0.0, 2 * step / s.sloppy_from - 1))
    for n in range(2, s.n + 1):
        solved, end = worked_solutions(draw_problems(rng, s.pretrain_batch, n), rng, skip)
        t = np.arange(solved.shape[1])
        inside = t < end[:, None]
        tokens.append(solved)
        order.append(np.where(inside, rng.random((s.pretrain_batch, 1)), 2.0))  # one number a solution, padding last
        response.append(inside & (t >= 2 * n))
    order = np.argsort(np.concatenate(order, axis=1), axis=1, kind="stable")[:, :length]
    return tuple(np.take_along_axis(np.concatenate(parts, axis=1), order, axis=1) for parts in (tokens, response))


@torch.no_grad()
def single_operation_accuracy(model, s: Settings, device) -> float:
    """How well single operations are known: along careful solutions of held-out problems with n digits, the share of
    lines whose first token (the result of one operation) is the most likely one. Jumps, which the model has seen as
    well, spread over many tokens and do not hide it."""
    tokens, end = worked_solutions(draw_problems(numpy_rng(0, PRETRAIN), 128, s.n, "eval"))
    tokens = torch.tensor(tokens, device=device)
    starts = tokens[:, :-1] == EQUALS
    return float((model(tokens[:, :-1]).argmax(-1) == tokens[:, 1:])[starts].float().mean())


def pretrain(s: Settings, out: Path, model, device, state, metrics: Metrics, stop):
    """Teach the base model sloppy solutions until single operations are known. `state` is a checkpoint's, or None.

    Not a fixed number of steps: seeds differ in when the operations click, and RL can improve only a model that gets
    some answers right. Nor much longer: a base that has learned to jump leaves RL little to discover.
    """
    optimizer = adamw(model, s.pretrain_lr, weight_decay=0.1, beta2=0.98)
    step, known = 0, 0.0
    if state:
        restore(out / "ckpt.pt", state, model, optimizer)
        step, known = state["step"], state["known"]

    def save():
        save_checkpoint(out / "ckpt.pt", model, stage="pretrain", step=step, known=known,
                        optimizer=optimizer.state_dict(), metrics_bytes=metrics.size())  # fmt: skip

    bar = progress(range(step, s.pretrain_max_steps), "pretraining", step)
    started = time.perf_counter()
    while step < s.pretrain_max_steps and (known < s.pretrain_until or step < s.sloppy_from):
        step += 1
        batch = pretraining_batch(s, step, model.cfg.context_length)
        tokens, response = (torch.tensor(a, device=device) for a in batch)
        loss = F.cross_entropy(model(tokens[:, :-1])[response[:, 1:]], tokens[:, 1:][response[:, 1:]])
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = s.pretrain_lr * min(1.0, step / 50)  # warm-up
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.update()
        if step % 50 == 0:
            if not torch.isfinite(loss):
                raise FloatingPointError(f"loss {loss.item()} in step {step} of pretraining")
            known = single_operation_accuracy(model, s, device)
            report(bar, step, f"loss {loss.item():.2f}  single operations right {known:.2f}", every=100)
            metrics.write("pretrain", step=step, loss=loss.item(), single_operations=known)
            save()
        if stop.is_set():
            save()
            raise KeyboardInterrupt
    bar.close()
    print(f"base model: {step} steps in {time.perf_counter() - started:.0f} s, single operations right {known:.2f}")
    save_checkpoint(out / "base.pt", model, seed=s.seed, step=step, n=s.n)


def adamw(model, lr, weight_decay, beta2=0.999):
    """AdamW; one fused call a step where the device has it."""
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, betas=(0.9, beta2), fused=fused)


# ---- evaluation and probes -----------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, s: Settings, tiers, problems: int, device) -> tuple[dict, list[str]]:
    """Sample at temperature 1 on held-out problems, the same ones whenever it is called with one seed.

    Returns per tier "avg@K", its standard error over problems "avg@K_se", "pass@1".."pass@K" (unbiased, K doubling),
    share of problems with mixed outcomes "mixed", mean "length", share "cut_off" by the limit, share "correct_steps"
    of responses with correct steps throughout; and three problems of tier n with a response each."""
    K, results, examples = s.eval_samples, {}, []
    for n in tiers:
        expr = draw_problems(numpy_rng(s.seed, EVALUATE, n), problems, n, "eval")
        answer = worked_lines(expr)[-1][:, 0]
        right, length, cut_off, steps = [], [], [], []
        generator = torch_rng(device, s.seed, EVALUATE, n)
        for chunk in np.array_split(np.arange(problems), -(-problems // 128)):
            sampled = model.generate(torch.tensor(prompts(expr[chunk]), device=device), s.response_limit, num_samples=K,
                                     eos_id=EOS, pad_id=PAD, generator=generator)  # fmt: skip
            answers = torch.tensor(answer[chunk], device=device).repeat_interleave(K)
            right.append(reward(sampled.tokens, sampled.end, answers).view(-1, K).cpu())
            length.append((sampled.end - sampled.prompt_len).float().cpu())
            cut_off.append(ended_by_limit(sampled).cpu())
            texts = [decode(row[:end]) for row, end in zip(sampled.tokens[::K].tolist(), sampled.end[::K].tolist())]
            steps += map(correct_steps, texts)
            if n == s.n and len(examples) < 3:
                examples += texts[:3]
        right = torch.cat(right).double()  # (problems, K)
        counts = right.sum(1).long().numpy()
        results[str(n)] = {
            f"avg@{K}": minibupo.avg_at_k(right),
            f"avg@{K}_se": float(right.mean(1).std() / problems**0.5) if problems > 1 else None,
            **{f"pass@{k}": float(minibupo.pass_at_k(K, counts, k).mean()) for k in (2**i for i in range(K.bit_length()))},
            "mixed": float(((counts > 0) & (counts < K)).mean()),
            "length": float(torch.cat(length).mean()),
            "cut_off": float(torch.cat(cut_off).float().mean()),
            "correct_steps": float(np.mean(steps)),
        }
    return results, examples


def ended_by_limit(sampled):
    """Which responses (N,) of a Generation have no EOS at their end."""
    return sampled.tokens.gather(1, sampled.end[:, None] - 1)[:, 0] != EOS


@torch.no_grad()
def make_probe(model, s: Settings, device, problems=64):
    """Held-out problems with a model's own solutions, tokens (P, T) and response mask (P, T-1). Those of the base are
    the fixed text on which the internal policies are looked at as training goes on."""
    expr = draw_problems(numpy_rng(s.seed, PROBE), problems, s.n, "eval")
    sampled = model.generate(torch.tensor(prompts(expr), device=device), s.response_limit, eos_id=EOS, pad_id=PAD,
                            generator=torch_rng(device, s.seed, PROBE))  # fmt: skip
    return sampled.tokens, response_mask(sampled.prompt_len, sampled.end, sampled.tokens.shape[1])


@torch.no_grad()
def look_inside(model, tokens, mask) -> dict:
    """Means over response positions of all internal entropies (nats), entropy changes, cosines and sizes of the stream,
    each a list by layer, and the perplexity of these tokens under pi_theta."""
    entropies = minibupo.internal_entropies(model, tokens, mask, final_norm=model.final_norm)
    entropies |= minibupo.entropy_changes(entropies)
    cosines = minibupo.residual_cosines(model, tokens, mask)
    sizes = minibupo.residual_rms(model, tokens, mask)
    named = entropies | {f"cos_{k}": v for k, v in cosines.items()} | {f"rms_{k}": v for k, v in sizes.items()}
    logp = minibupo.token_logprobs(model, tokens, mask)[mask]
    return {name: value.mean(1).tolist() for name, value in named.items()} | {"perplexity": float((-logp.cpu().double().mean()).exp())}


# ---- GRPO and BuPO (Algorithm 1) ----------------------------------------------------------------------------------


def draw_questions(rng, count: int, n: int):
    """`count` training problems of 3, 4, .. n digits in shares of 1 : 2 : .. : n - 2, since longer ones take more learning:
    prompts (count, 2n) padded on the right, their lengths (count,) and answers (count,), as arrays."""
    tokens, prompt_len, answers = np.full((count, 2 * n), PAD), np.empty(count, int), np.empty(count, int)
    shares = np.cumsum(np.arange(1, n - 1))
    cuts = np.round(count * shares[:-1] / shares[-1]).astype(int)
    for k, rows in enumerate(np.split(np.arange(count), cuts), 3):
        expr = draw_problems(rng, len(rows), k)
        tokens[rows, : 2 * k], prompt_len[rows], answers[rows] = prompts(expr), 2 * k, worked_lines(expr)[-1][:, 0]
    return tokens, prompt_len, answers


def training_problems(s: Settings, step: int):
    """The questions of step 1, 2, .. of RL, as draw_questions gives them: new ones, or with s.train_problems the same ones
    again and again, each once before any comes again, in an order that changes."""
    if not s.train_problems:
        return draw_questions(numpy_rng(s.seed, PROBLEMS, step), s.questions, s.n)
    P, places = s.train_problems, np.arange((step - 1) * s.questions, step * s.questions)
    orders = {epoch: numpy_rng(s.seed, PROBLEMS, 0, epoch).permutation(P) for epoch in set(places // P)}
    rows = [orders[place // P][place % P] for place in places]
    return tuple(array[rows] for array in draw_questions(numpy_rng(s.seed, PROBLEMS, 0), P, s.n))


def rl_step(s: Settings, model, optimizer, policy: Policy, target: Policy, step: int, device) -> dict:
    """One step of Algorithm 1: questions, rollouts from pi_theta, rewards, an update of `policy`. Returns the log."""
    started = time.perf_counter()
    questions, prompt_len, answers = (torch.tensor(a, device=device) for a in training_problems(s, step))
    sampled = model.generate(questions, s.response_limit, prompt_len=prompt_len, num_samples=s.group, temperature=s.temperature,
                             eos_id=EOS, pad_id=PAD, layer=policy.layer, site=policy.site,
                             generator=torch_rng(device, s.seed, SAMPLE, step))  # fmt: skip
    rewards = reward(sampled.tokens, sampled.end, answers.repeat_interleave(s.group)).view(s.questions, s.group)
    record = describe(model, sampled, rewards, policy, target)
    old_logp = sampled.logprobs if policy == FULL else sampled.layer_logprobs
    record |= minibupo.update(
        model, optimizer, Rollouts(sampled.tokens, sampled.prompt_len, sampled.end, old_logp, rewards), policy,
        minibatches=s.minibatches, advantage=s.advantage, clip=s.clip, average=s.average, temperature=s.temperature, chunk=s.chunk,
        generator=torch_rng("cpu", s.seed, SHUFFLE, step),
    )  # fmt: skip
    return record | {"seconds": time.perf_counter() - started}


def train(s: Settings, out: Path, model, target: Policy, optimizer, done: int, probe, device, metrics: Metrics, stop):
    """Steps done+1..s.steps of Algorithm 1, with evaluations, probes and checkpoints."""
    bar = progress(range(done, s.steps), s.algo, done)
    for step in range(done + 1, s.steps + 1):
        policy = minibupo.policy_at(step, s.s_inter, target)  # Eq. 11
        if step == s.s_inter + 1:
            optimizer.state.clear()  # phase 1's moments are of another, larger gradient and would hold phase 2 back
        for group in optimizer.param_groups:  # smaller steps late, when a handful of mixed groups decides on the gradient
            group["lr"] = s.lr * min(1.0, s.lr_steps / step)
        record = rl_step(s, model, optimizer, policy, target, step, device)
        metrics.write("step", step=step, **record)
        bar.update()
        line = "{phase:8}  reward {reward:.3f}  entropy {policy_entropy:.3f}  length {length:.1f}  clipped {clip_fraction:.4f}"
        report(bar, step, (line + "  gradient {grad_norm:.2f}").format(**record), every=5)
        if step % s.probe_every == 0 or step in (s.s_inter, s.steps):
            metrics.write("internal", step=step, **look_inside(model, *probe))
        if step % s.eval_every == 0 or step == s.steps:
            problems = s.eval_problems if step == s.steps else -(-s.eval_problems // 4)
            results, examples = evaluate(model, s, s.tiers, problems, device)
            metrics.write("eval", step=step, problems=problems, tiers=results, examples=examples)
            if step < s.steps:  # the last one is in the final table
                accuracy = "  ".join(f"n = {n}: {tier[f'avg@{s.eval_samples}']:.3f}" for n, tier in results.items())
                tqdm.write(f"evaluation at step {step}, Avg@{s.eval_samples}  {accuracy}\n{show_examples(examples)}")
        if step == s.s_inter:
            save_checkpoint(out / "phase1.pt", model, step=step)
        if step % s.save_every == 0 or step == s.steps or stop.is_set():
            save_run(out, model, optimizer, step, target, metrics)
        if stop.is_set() and step < s.steps:
            raise KeyboardInterrupt
    bar.close()


def save_run(out, model, optimizer, step, target, metrics):
    """ckpt.pt: all that the steps after `step` depend on."""
    save_checkpoint(out / "ckpt.pt", model, stage="rl", step=step, target=list(target),
                    optimizer=optimizer.state_dict(), metrics_bytes=metrics.size())  # fmt: skip


@torch.no_grad()
def describe(model, sampled, rewards, policy, target) -> dict:
    """What a step's log says of its rollouts, before the update. Entropies (nats, temperature 1) are taken on one
    response of each group."""
    length, cut_off = (sampled.end - sampled.prompt_len).float(), ended_by_limit(sampled)
    G = rewards.shape[1]
    tokens = sampled.tokens[::G]
    mask = response_mask(sampled.prompt_len[::G], sampled.end[::G], tokens.shape[1])
    right = rewards.mean(1)
    record = {
        "phase": "policy" if policy == FULL else "internal",
        "reward": float(rewards.mean()),
        "groups_right": float((right == 1).float().mean()),
        "groups_wrong": float((right == 0).float().mean()),
        "groups_mixed": float(((right > 0) & (right < 1)).float().mean()),
        "length": float(length.mean()),
        "length_ended": None if cut_off.all() else float(length[~cut_off].mean()),
        "cut_off": float(cut_off.float().mean()),
        "policy_entropy": float(minibupo.entropy(minibupo.policy_logits(model, tokens[:, :-1], FULL, mask)).mean()),
        "layer_entropy": float(minibupo.entropy(minibupo.policy_logits(model, tokens[:, :-1], target, mask)).mean()),
    }
    if policy != FULL:  # how far the samples are from the policy that they train
        everywhere = response_mask(sampled.prompt_len, sampled.end, sampled.tokens.shape[1])
        record["layer_log_ratio"] = float((sampled.layer_logprobs - sampled.logprobs)[everywhere].mean())
    return record


# ---- the main job ------------------------------------------------------------------------------------------------


def progress(steps, name, done):
    """A progress bar on a terminal; `report` prints lines elsewhere."""
    return tqdm(total=done + len(steps), initial=done, desc=name, disable=not sys.stderr.isatty())


def report(bar, step, text, every):
    """Show the state of a running loop: beside its bar, or as a plain line in each `every`-th step."""
    bar.set_postfix_str(text)
    if bar.disable and step % every == 0:
        print(f"step {step:4d}  {text}", flush=True)


def pick_device(name: str) -> torch.device:
    """The device of an option value. Raises ValueError for one that is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(d for d in there if there[d])
    if not there[name]:
        raise ValueError(f"device {name} is not available here, only {', '.join(d for d in there if there[d])}")
    return torch.device(name)


def computing_in(precision: str, device):
    """A context in which matrix products are computed in that precision; weights, norms, softmax and optimizer stay in
    float32. Casts are not cached: a cached one would outlive the optimizer step that changes its weight."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False)


def new_directory(s: Settings) -> Path:
    """The run's directory, made: out_dir, or out/ALGO-seedSEED with the first free number behind it. Raises ValueError
    for one that holds something."""
    if s.out_dir is not None:
        out = Path(s.out_dir)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"{out} is not empty: choose another --out_dir, or add --resume to go on with the run in it")
        out.mkdir(parents=True, exist_ok=True)
        return out
    number = 1
    while True:
        out = Path("out") / (f"{s.algo}-seed{s.seed}" + (f"-{number}" if number > 1 else ""))
        try:
            out.mkdir(parents=True)
            return out
        except FileExistsError:
            number += 1


def resumed_settings(given: dict) -> Settings:
    """The settings of the run in --out_dir. Raises ValueError if there is none, or if an option given by hand differs
    (--steps may, to go on for longer)."""
    if "out_dir" not in given:
        raise ValueError("--resume needs --out_dir, the directory of the run to go on with")
    stored = read_settings(Path(given["out_dir"]))
    for name, value in given.items():
        if name not in ("out_dir", "steps") and value != getattr(stored, name):
            raise ValueError(f"--{name} {value} does not match the run in {given['out_dir']}, which has {getattr(stored, name)}")
    stored.out_dir, stored.steps = given["out_dir"], given.get("steps", stored.steps)
    stored.__post_init__()
    return stored


def with_base(s: Settings, given: dict, base: GPT) -> Settings:
    """Settings with the sizes of a base model. Raises ValueError if a size given by hand is another."""
    sizes = {name: getattr(base.cfg, name) for name in ("n_layer", "d_model", "n_head", "qk_norm", "tied")}
    for name, value in sizes.items():
        if given.get(name, value) != value:
            raise ValueError(f"--{name} {given[name]} does not match {s.base}, which has {value}")
        setattr(s, name, value)
    return s


def check_layer(s: Settings):
    """Raise ValueError unless the layer of phase 1 is below the top layer of the model."""
    if s.layer != "auto" and not 1 <= s.layer < s.n_layer:
        raise ValueError(f"layer must be auto or in 1..{s.n_layer - 1}, since the model has {s.n_layer} layers, not {s.layer} "
                         "(layers count from 1; the official scripts' k is this number less 1)")  # fmt: skip


def preflight(tier: dict, s: Settings):
    """Print whether RL has something to work on. Raises ValueError, with the remedy, if it has not."""
    K = s.eval_samples
    print(f"preflight at n = {s.n}: Pass@1 {tier['pass@1']:.3f}, Pass@{K} {tier[f'pass@{2 ** (K.bit_length() - 1)}']:.3f}, "
          f"groups with mixed outcomes {tier['mixed']:.2f}")  # fmt: skip
    if tier["mixed"] < 0.05:
        remedy = ("pretrain further (--pretrain_until, --pretrain_max_steps) or take shorter problems (--n)" if tier["pass@1"] < 0.5
                  else "take longer problems (--n) or a sloppier base (--skip)")  # fmt: skip
        raise ValueError(f"only {tier['mixed']:.1%} of the groups have mixed outcomes, so there is next to nothing to learn from: {remedy}")


def print_table(records: list[dict], s: Settings):
    """Print the evaluations before and after RL, by tier, with examples."""
    before, after, K = records[0], records[-1], s.eval_samples
    k = 2 ** (K.bit_length() - 1)
    print(f"\nheld-out problems, {after['problems']} a tier, {K} samples each at temperature 1 (+- standard error)\n")
    print(f"{'':14}|{'before RL':^36}|{'after ' + str(after['step']) + ' steps':^36}")
    print(f"{'digits':14}|" + f"{f'Avg@{K}':>16}{f'Pass@{k}':>9}{'length':>8}   |" * 2)
    for n in s.tiers:
        cells = []
        for tier in (before["tiers"][str(n)], after["tiers"][str(n)]):
            error = tier[f"avg@{K}_se"] or 0
            cells.append(f"{100 * tier[f'avg@{K}']:8.1f} +-{100 * error:4.1f} %{100 * tier[f'pass@{k}']:7.1f} %{tier['length']:8.1f}   ")
        print(f"n = {n}{' (unseen)' if n > s.n else '':9}|" + "|".join(cells) + "|")
    print(f"\nbefore:\n{show_examples(before['examples'])}\nafter:\n{show_examples(after['examples'])}")


def show_examples(texts: list[str]) -> str:
    """Problems with their sampled responses, a line each, and whether the answer is right."""
    lines = []
    for text in texts:
        problem, _, response = text.partition("=")
        answer = decode(worked_lines(np.array([encode(problem)]))[-1][0])
        verdict = "right" if response.split("=")[-1] == answer + "<eos>" else f"wrong, it is {answer}"
        lines.append(f"  {problem}= {response}   ({verdict})")
    return "\n".join(lines)


def read_state(s: Settings, out: Path) -> dict | None:
    """The checkpoint that a run is to go on from; None if it was stopped before its first one. Raises ValueError for
    a file that is none, or one with more steps behind it than s.steps."""
    path = out / "ckpt.pt"
    if not path.exists():
        return None
    state = load_checkpoint(path)
    needed = {"stage", "step", "optimizer", "metrics_bytes", "target" if state.get("stage") == "rl" else "known"}
    if not needed <= state.keys():
        raise ValueError(f"{path} holds a model but no state of a run to go on with")
    if state["stage"] == "rl" and state["step"] > s.steps:
        raise ValueError(f"the run in {out} has done {state['step']} steps already, more than --steps {s.steps}")
    return state


def measure_base(s: Settings, model, probe, device, metrics: Metrics) -> Policy:
    """Write down the base model's internal policies and accuracy; returns the policy that phase 1 is to optimise."""
    inside = look_inside(model, *probe)
    results, examples = evaluate(model, s, s.tiers, s.eval_problems, device)
    metrics.write("internal", step=0, **inside)
    metrics.write("eval", step=0, problems=s.eval_problems, tiers=results, examples=examples)
    return Policy(minibupo.target_layer(inside["d_mlp"]) if s.layer == "auto" else s.layer, s.site)


def learn(s: Settings, out: Path, base, state, device, metrics: Metrics, stop):
    """Pretraining (or a base that is there), a look at the base, RL; or what of it a checkpoint's `state` leaves to do."""
    context = s.model_config().context_length
    in_rl = state is not None and state["stage"] == "rl"
    if not in_rl and s.base:
        save_checkpoint(out / "base.pt", base or load_model(s.base, device, context))
    elif not in_rl:
        torch.manual_seed(s.seed)
        pretrain(s, out, GPT(s.model_config()).to(device), device, state, metrics, stop)
    model = load_model(out / "base.pt", device, context)
    probe = make_probe(model, s, device)
    optimizer = adamw(model, s.lr, s.weight_decay)
    if in_rl:
        restore(out / "ckpt.pt", state, model, optimizer)
        target, done = Policy(*state["target"]), state["step"]
    else:
        target, done = measure_base(s, model, probe, device, metrics), 0
        save_run(out, model, optimizer, 0, target, metrics)

    print_entropies(read_metrics(out, "internal")[0], target, s)
    preflight(read_metrics(out, "eval")[0]["tiers"][str(s.n)], s)
    train(s, out, model, target, optimizer, done, probe, device, metrics, stop)


def run(s: Settings, given: dict, resume: bool):
    """The main job, from nothing (or a base, or a checkpoint) to the final table."""
    device = pick_device(s.device)
    torch.set_num_threads(s.threads)
    base, context = None, s.model_config().context_length
    if s.base and not resume:
        base = load_model(s.base, device, context)
        s = with_base(s, given, base)
    check_layer(s)
    out = Path(s.out_dir) if resume else new_directory(s)
    state = read_state(s, out) if resume else None
    s.out_dir = str(out)
    config = json.dumps(asdict(s), indent=2)
    write_atomically(out / "config.json", lambda temporary: temporary.write_text(config, encoding="utf-8"))
    stop = stop_on_ctrl_c()
    metrics = Metrics(out / "metrics.jsonl", state["metrics_bytes"] if state else 0)
    print(f"{'resuming' if resume else 'run'} {out} on {device}, {s.threads} threads", flush=True)

    with computing_in(s.precision, device):
        learn(s, out, base, state, device, metrics, stop)
    print_table(read_metrics(out, "eval"), s)
    print(f"\nall of it is in {out}; next, see the internal policies as figures:\n  python analyze.py {out}\n"
          f"and train with the other algorithm, from the same base and on the same problems:\n  {other_command(s)}")  # fmt: skip


def other_command(s: Settings) -> str:
    """The command line that runs the other algorithm with otherwise the same options, from the same base."""
    defaults = Settings(**PRESETS[s.preset])
    of_the_base = ("n_layer", "d_model", "n_head", "qk_norm", "tied", "skip", "sloppy_from", "seed")
    words = ["python train_toy.py --algo", "grpo" if s.algo == "bupo" else "bupo", f"--seed {s.seed}"]
    words += [f"--preset {s.preset}"] if s.preset != "default" else []
    for f in fields(s):
        own = f.name in (*of_the_base, "algo", "layer", "site", "s_inter", "out_dir", "base", "preset") or f.name.startswith("pretrain")
        if not own and getattr(s, f.name) != getattr(defaults, f.name):
            words.append(f"--{f.name} {getattr(s, f.name)}")
    return " ".join([*words, f"--base {Path(s.out_dir) / 'base.pt'}"])


def print_entropies(inside: dict, target: Policy, s: Settings):
    """Print the base model's internal entropies by layer, and what is optimised when."""
    print(f"\ninternal entropies of the base, in nats (uniform: log V = {np.log(VOCAB_SIZE):.2f})")
    print("layer    H(H^l)  normed    dH_ATTN   dH_FFN  dH_Layer")
    print(f"{0:5d} {inside['layer'][0]:9.2f}{inside['layer_normed'][0]:8.2f}")
    for l in range(1, s.n_layer + 1):
        mark = "  <- target" if l == target.layer and s.algo == "bupo" else ""
        print(f"{l:5d} {inside['layer'][l]:9.2f}{inside['layer_normed'][l]:8.2f}   "
              + "".join(f"{inside[name][l - 1]:9.2f}" for name in ("d_attn", "d_mlp", "d_layer")) + mark)  # fmt: skip
    if s.s_inter:
        print(f"\nBuPO: steps 1..{s.s_inter} optimise {target.site} of layer {target.layer}, the others pi_theta\n")
    else:
        print(f"\nGRPO: all {s.steps} steps optimise pi_theta\n")


def stop_on_ctrl_c():
    """An event that the first Ctrl-C sets, so that the step under way is finished and saved; a second one interrupts."""
    stop = threading.Event()

    def handler(*_):
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, handler)
    return stop


def main(argv=None) -> int:
    """Run the command line; returns the exit code: 0, 2 for what the user can mend, 1 for NaN, 130 for Ctrl-C."""
    s = None
    try:
        s, given, resume = parse_options(argv)
        if resume:
            s = resumed_settings(given)
        run(s, given, resume)
        return 0
    except (ValueError, OSError) as error:
        print(f"train_toy.py: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"train_toy.py: {error}; stopped, the last checkpoint is as it was", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        saved = s and s.out_dir
        print(f"\nstopped{f' and saved; go on with: python train_toy.py --resume --out_dir {s.out_dir}' if saved else ''}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
