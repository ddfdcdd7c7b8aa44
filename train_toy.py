"""The toy task and the training run: a base model, a look at its internal policies, then BuPO.

The task: work out a chain of operations on digits from left to right, every result mod 10.

    7+5*3-2=   ->   2*3-2=6-2=4<eos>         (7+5=12 -> 2;  2*3=6;  6-2=4)

The prompt ends in `=`. A response rewrites what is left after each operation, and what follows its
last `=` is the answer. The reward is 1 if the response ended and its answer is right, else 0.

The base model learns from *sloppy* solutions: each line before the answer is left out with
probability 1/2. So it has seen careful work and jumps, and jumps mostly go wrong. RL on the final
answer alone then discovers careful work: responses grow longer as they get right more often.

    python train_toy.py                                     # base model, then BuPO, in out/bupo-seed0
    python train_toy.py --algo grpo --base out/bupo-seed0/base.pt
    python train_toy.py --resume --out_dir out/bupo-seed0   # go on after Ctrl-C or a crash

All that is random in a step depends on (seed, purpose, step) alone. So a run that was stopped goes
on as if it had not been (on a CPU to the last bit), and two runs of one seed meet the same problems.
"""

import argparse
import hashlib
import json
import operator
import os
import random
import signal
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path

import tiktoken
import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import minibupo
from minibupo import FULL, Policy, Rollouts, response_mask
from model import GPT, GPTConfig

# ---- the task, as strings ----------------------------------------------------------------------

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def careful(expression: str) -> list[str]:
    """All lines of careful work: careful("7+5*3-2") is ["7+5*3-2", "2*3-2", "6-2", "4"]."""
    lines = [expression]
    while len(lines[-1]) > 1:
        a, op, b, *rest = lines[-1]
        lines.append(str(OPERATORS[op](int(a), int(b)) % 10) + "".join(rest))
    return lines


def sloppy(expression: str, rng, skip: float) -> list[str]:
    """The same, but each line between problem and answer is left out with probability `skip`."""
    problem, *between, answer = careful(expression)
    return [problem, *(line for line in between if rng.random() >= skip), answer]


def is_right(expression: str, response: str) -> bool:
    """The verifier: the response ended, and what follows its last `=` is the answer.

    How the answer was reached is not looked at; has_right_steps does that."""
    return response.split("=")[-1] == careful(expression)[-1] + "<eos>"


def held_out(expression: str) -> bool:
    """Whether a problem is kept for evaluation: by its hash, one in eight of 3 digits or more."""
    return len(expression) >= 5 and hashlib.sha256(expression.encode()).digest()[0] < 32


def random_expression(rng, n: int) -> str:
    """n digits joined by n - 1 operators, uniform."""
    first, *digits = rng.choices("0123456789", k=n)
    return first + "".join(rng.choice(list(OPERATORS)) + digit for digit in digits)


def training_problem(rng, n: int) -> str:
    """A problem of n digits of which no line, and so no part of a solution, is held out."""
    while True:
        expression = random_expression(rng, n)
        if not any(held_out(line) for line in careful(expression)):
            return expression


def stream(seed: int, purpose: str, step: int = 0) -> random.Random:
    """The random numbers of one purpose at one step. No two keys share theirs."""
    return random.Random(f"{purpose}, seed {seed}, step {step}")


def torch_stream(device, seed: int, purpose: str, step: int = 0) -> torch.Generator:
    """The same for torch, on a device."""
    return torch.Generator(device).manual_seed(stream(seed, purpose, step).getrandbits(63))


# ---- tokens: one a character -------------------------------------------------------------------

CHARACTERS = "0123456789" + "".join(OPERATORS) + "="
EOS, PAD = len(CHARACTERS), len(CHARACTERS) + 1
VOCAB_SIZE = len(CHARACTERS) + 2
ENCODING = tiktoken.Encoding(
    name="toy",
    pat_str=r"[\s\S]",
    mergeable_ranks={c.encode(): i for i, c in enumerate(CHARACTERS)},
    special_tokens={"<eos>": EOS, "<pad>": PAD},
)


def encode(text: str) -> list[int]:
    """Token ids of a text; "<eos>" and "<pad>" are one token each. Raises ValueError for a character
    that the toy does not know, on which tiktoken would panic."""
    for c in text.replace("<eos>", "").replace("<pad>", ""):
        if c not in CHARACTERS:
            raise ValueError(f"character {c!r} is not one of {CHARACTERS}")
    return ENCODING.encode(text, allowed_special="all")


def padded(rows: list[list], device, value=PAD):
    """Rows of unequal length as a tensor (N, T), padded on the right, and their lengths (N,)."""
    T = max(map(len, rows))
    tensor = torch.tensor([row + [value] * (T - len(row)) for row in rows], device=device)
    return tensor, torch.tensor([len(row) for row in rows], device=device)


def responses(sampled) -> list[str]:
    """The texts of the responses in rows of tokens, prompt_len and end."""
    rows = zip(sampled.tokens.tolist(), sampled.prompt_len.tolist(), sampled.end.tolist())
    return [ENCODING.decode(tokens[start:end]) for tokens, start, end in rows]


# ---- settings ----------------------------------------------------------------------------------


def option(default, help, low=None, high=None, choices=None):
    """A field of Settings, which is a command-line option, too; values from low to high."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))


@dataclass
class Settings:
    """Every option of a run. Raises ValueError for values that cannot be."""

    algo: str = option("bupo", "what to train with", choices=("bupo", "grpo"))
    layer: int | None = option(None, "layer of phase 1, 1..L-1 (default: the paper's rule)", 1)
    site: str = option("resid_post", "whose policy: layer, attention, FFN", choices=minibupo.SITES)
    s_inter: int = option(5, "steps of phase 1", 0)
    steps: int = option(60, "steps of RL in all", 0)
    seed: int = option(0, "seed of everything random", 0, 2**32 - 1)
    base: str | None = option(None, "start RL from this base model, base.pt of another run")
    out_dir: str | None = option(None, "directory of the run (default: a new one under out/)")
    preset: str = option("default", "a set of defaults", choices=("default", "smoke"))
    device: str = option("auto", "auto is cuda or else cpu", choices=("auto", "cpu", "cuda", "mps"))
    threads: int = option(2, "CPU threads; a small model gains nothing from many", 1, 1024)

    n: int = option(5, "digits of the longest problems of training", 3, 12)
    n_layer: int = option(6, "layers", 2)
    d_model: int = option(64, "width of the residual stream", 4)
    skip: float = option(0.5, "share of lines left out of what the base learns from", 0, 1)
    internal_loss: float = option(0.0, "weight of the base's loss on its internal policies", 0, 1e6)

    train_problems: int = option(0, "train on this many problems (0: on new ones each step)", 0)
    questions: int = option(64, "questions a step of RL", 1)
    group: int = option(8, "responses to each question", 2)
    minibatches: int = option(4, "optimizer steps a step of RL", 1)
    lr: float = option(5e-4, "learning rate for 30 steps; then it falls as 1 / step", 1e-12, 1e6)
    advantage: str = option("grpo", "how rewards become advantages", choices=minibupo.ADVANTAGES)
    eval_problems: int = option(256, "held-out problems a length, before and after", 1, 1000)

    def __post_init__(self):
        check_settings(self)

    @property
    def response_limit(self) -> int:
        """Tokens that a response may take: careful work on n + 1 digits, EOS included."""
        return (self.n + 1) * self.n

    @property
    def tiers(self) -> list[int]:
        """Digits of the problems of evaluation, up to n + 1: longer than anything trained."""
        return [n for n in range(self.n - 2, self.n + 2) if n >= 3]

    def model_config(self) -> GPTConfig:
        """The model. Positions are rotary, so a longer context costs nothing but a table."""
        return GPTConfig(VOCAB_SIZE, 256, self.n_layer, self.d_model, n_head=2)


SMOKE = dict(n=3, n_layer=4, d_model=32, questions=32, steps=20, s_inter=3, eval_problems=64)


# ---- the base model ----------------------------------------------------------------------------


KNOWN = 0.95  # the share of single operations that a base is to get right


def pretrain(s: Settings, model, records: list, max_steps=1000, lr=4e-3):
    """Teach the base model until it knows single operations. Appends a record every 50 steps.

    Not a fixed number of steps: seeds differ in when operations are learned, and RL can improve only
    a model that gets some answers right. Nor much longer: a base that jumps well leaves RL little to
    discover."""
    optimizer = adamw(model, lr, weight_decay=0.1, betas=(0.9, 0.98))
    started, bar = time.perf_counter(), progress("pretraining", max_steps)
    for step in range(1, max_steps + 1):
        loss = pretraining_loss(model, *pretraining_batch(s, step, model.device), s.internal_loss)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        set_learning_rate(optimizer, lr * min(1.0, step / 50))  # warm-up
        optimizer.step()
        bar.update()
        if step % 50 == 0:
            known = single_operations(model, s)
            add_record(records, "pretrain", step=step, loss=loss.item(), single_operations=known)
            report(bar, step, f"loss {loss.item():.2f}  single operations right {known:.2f}", 100)
            if known >= KNOWN and step >= 400:
                break
    bar.close()
    seconds = time.perf_counter() - started
    print(f"base model: {step} steps in {seconds:.0f} s, single operations right {known:.2f}")


def pretraining_batch(s: Settings, step: int, device, rows=48, sloppy_from=400):
    """Rows of text: tokens (B, T), and which of them belong to a response (B, T).

    A row holds a solution of each length 2..n, in random order. A model that met each problem at the
    start of a row would learn where its first operands stand, and be lost on the second line.
    Solutions are careful at first, and as sloppy as they get from step `sloppy_from` on. While any
    line may follow, the result of an operation is but one of several right tokens, and operations
    are learned much more slowly."""
    rng, tokens, marks = stream(s.seed, "pretraining", step), [], []
    skip = s.skip * min(1.0, max(0.0, 2 * step / sloppy_from - 1))
    for _ in range(rows):
        row, mark = [], []
        for n in rng.sample(range(2, s.n + 1), s.n - 1):
            problem, *lines = sloppy(training_problem(rng, n), rng, skip)
            prompt, response = encode(problem + "="), encode("=".join(lines) + "<eos>")
            row += prompt + response
            mark += [False] * len(prompt) + [True] * len(response)
        T = 2 * (s.n + 1) + s.response_limit
        tokens.append(row[:T])
        marks.append(mark[:T])
    return padded(tokens, device)[0], padded(marks, device, value=False)[0]


def pretraining_loss(model, tokens, response, internal_loss: float):
    """Cross-entropy of pi_theta on the response tokens, plus internal_loss times the mean of that of
    the internal layer policies."""
    at, wanted = response[:, 1:], tokens[:, 1:][response[:, 1:]]
    if internal_loss == 0:
        return cross_entropy(model(tokens[:, :-1])[at], wanted)
    layers = [trace.resid_post[at] for trace in model.trace(tokens[:, :-1])]  # H^1, .., H^L
    internal = [cross_entropy(model.unembed(h), wanted) for h in layers]
    loss = cross_entropy(model.unembed(model.final_norm(layers[-1])), wanted)
    return loss + internal_loss * torch.stack(internal).mean()


# ---- RL: Algorithm 1 ---------------------------------------------------------------------------


@dataclass
class Job:
    """What the steps of RL work on."""

    out: Path  # the directory of the run
    model: GPT
    optimizer: torch.optim.Optimizer
    target: Policy  # of phase 1
    text: tuple  # own_solutions of the base, on which internal policies are measured
    records: list  # of metrics.jsonl
    step: int  # the last one done


def train(s: Settings, job: Job):
    """The steps of Algorithm 1 that are left, with log, evaluations, looks inside, checkpoints."""
    model, optimizer, records = job.model, job.optimizer, job.records
    seen, bar, started = {}, progress(s.algo, s.steps, job.step), time.perf_counter()

    def rate(step):  # smaller steps late, when a handful of mixed groups decides on the gradient
        return s.lr * min(1.0, 30 / step)

    def sample(step):
        set_learning_rate(optimizer, rate(step))
        batch = rollouts(s, model, step)
        seen.update(describe(model, batch, job.target))  # before the step changes the model
        return batch

    options = dict(start=job.step + 1, minibatches=s.minibatches, advantage=s.advantage)
    steps = minibupo.bupo(model, optimizer, sample, job.target, s.s_inter, s.steps, **options)
    for job.step, policy, _, log in steps:
        step, phase = job.step, "policy" if policy == FULL else "internal"
        log |= {"seconds": time.perf_counter() - started, "phase": phase, **seen}
        add_record(records, "step", step=step, **log)
        bar.update()
        report(bar, step, LOG_LINE.format(**log), 5)
        if step % 5 == 0 or step in (s.s_inter, s.steps):
            add_record(records, "internal", step=step, **means_inside(model, *job.text))
        if step % 30 == 0 or step == s.steps:
            add_evaluation(records, s, model, step)
        if step == s.s_inter:
            save_checkpoint(job.out / "phase1.pt", model)
        if step % 10 == 0 or step == s.steps or STOP.is_set():
            save_job(job)
        write_metrics(job)
        if STOP.is_set() and step < s.steps:
            raise KeyboardInterrupt
        started = time.perf_counter()
    bar.close()


LOG_LINE = (
    "{phase:8}  reward {reward:.3f}  entropy {policy_entropy:.3f}  length {length:.1f}  "
    "clipped {clip_fraction:.4f}  gradient {grad_norm:.2f}"
)


def rollouts(s: Settings, model, step: int) -> Rollouts:
    """The questions of a step, a group of responses to each from pi_theta, and their rewards."""
    problems = training_problems(s, step)
    prompts, prompt_len = padded([encode(p + "=") for p in problems], model.device)
    generator = torch_stream(model.device, s.seed, "responses", step)
    options = dict(num_samples=s.group, eos_id=EOS, pad_id=PAD, generator=generator)
    sampled = model.generate(prompts, s.response_limit, prompt_len=prompt_len, **options)
    right = [is_right(problems[i // s.group], text) for i, text in enumerate(responses(sampled))]
    return Rollouts(*sampled, torch.tensor(right).float().view(s.questions, s.group))


def training_problems(s: Settings, step: int) -> list[str]:
    """The questions of step 1, 2, ..: new ones, or those of a finite set, each of them once before
    any comes again."""
    if not s.train_problems:
        return draw_questions(stream(s.seed, "questions", step), s.questions, s.n)
    problems = draw_questions(stream(s.seed, "finite set"), s.train_problems, s.n)
    places = range((step - 1) * s.questions, step * s.questions)
    epochs = {place // len(problems) for place in places}
    shuffled = {e: stream(s.seed, "epoch", e).sample(problems, len(problems)) for e in epochs}
    return [shuffled[place // len(problems)][place % len(problems)] for place in places]


def draw_questions(rng, count: int, n: int) -> list[str]:
    """Training problems of 3, 4, .., n digits in shares of 1 : 2 : .. : n - 2, since longer ones take
    more learning; in random order."""
    sizes = [k for k in range(3, n + 1) for _ in range(k - 2)]
    problems = [training_problem(rng, sizes[i * len(sizes) // count]) for i in range(count)]
    return rng.sample(problems, count)


@torch.no_grad()
def describe(model, batch: Rollouts, target: Policy) -> dict:
    """What a step's log says of its rollouts. Entropies (nats, temperature 1) and the mean of
    log(pi_target / pi_theta), how far phase 1 is off-policy, are taken on one response a group."""
    length, right = (batch.end - batch.prompt_len).float(), batch.rewards.mean(1)
    ended = batch.tokens.gather(1, batch.end[:, None] - 1)[:, 0] == EOS
    log = {
        "reward": float(right.mean()),
        "groups_right": float((right == 1).float().mean()),
        "groups_wrong": float((right == 0).float().mean()),
        "length": float(length.mean()),
        "cut_off": float((~ended).float().mean()),
    }
    G = batch.rewards.shape[1]
    tokens = batch.tokens[::G]
    mask = response_mask(batch.prompt_len[::G], batch.end[::G], tokens.shape[1])
    at, logp = mask.flatten().nonzero()[:, 0], {}
    for name, policy in (("policy", FULL), ("layer", target)):
        logits = minibupo.policy_logits(model, tokens[:, :-1], policy, at)
        log[f"{name}_entropy"] = float(minibupo.entropy(logits).mean())
        logp[name] = logits.log_softmax(-1).gather(-1, tokens[:, 1:].flatten()[at][:, None])
    return log | {"layer_log_ratio": float((logp["layer"] - logp["policy"]).mean())}


# ---- evaluation --------------------------------------------------------------------------------

SAMPLES = 8  # responses to each problem of an evaluation


def evaluation_problems(rng, n: int, count: int) -> list[str]:
    """`count` different held-out problems of n digits. Raises ValueError for more than there are."""
    if n < 3 or count > 1000:
        raise ValueError(f"there are 1000 problems of each length from 3 on, not {count} of {n}")
    found = {}  # a set that keeps the order
    while len(found) < count:
        expression = random_expression(rng, n)
        if held_out(expression):
            found[expression] = True
    return list(found)


@torch.no_grad()
def attempts(model, s: Settings, problems: list[str], samples: int, generator) -> list[list[str]]:
    """`samples` responses to each problem at temperature 1, as texts, about 1,024 rows at a time."""
    texts, size = [], max(1, 1024 // samples)
    for i in range(0, len(problems), size):
        prompts, prompt_len = padded(
            [encode(p + "=") for p in problems[i : i + size]], model.device
        )
        options = dict(num_samples=samples, eos_id=EOS, pad_id=PAD, generator=generator)
        texts += responses(
            model.generate(prompts, s.response_limit, prompt_len=prompt_len, **options)
        )
    return [texts[i : i + samples] for i in range(0, len(texts), samples)]


def evaluate(model, s: Settings, tiers, count: int, samples=SAMPLES) -> tuple[dict, list]:
    """Accuracy on `count` held-out problems of each length in `tiers`, the same ones for one seed.

    Returns, by length as a string, "avg@K", its standard error over problems "avg@K_se" (None for a
    single problem), unbiased "pass@1", "pass@2", .., "pass@K", the shares "right_steps" of responses
    with no wrong step, "mixed" of problems with mixed outcomes and "cut_off" of responses, and the mean
    "length" in tokens; and of the last length but one three pairs [problem, response]."""
    results, examples = {}, []
    for n in tiers:
        problems = evaluation_problems(stream(s.seed, f"evaluation, n {n}"), n, count)
        generator = torch_stream(model.device, s.seed, f"evaluation responses, n {n}")
        texts = attempts(model, s, problems, samples, generator)
        pairs = [(problem, text) for problem, group in zip(problems, texts) for text in group]
        right = torch.tensor([is_right(*pair) for pair in pairs]).view(count, samples).double()
        counts = right.sum(1).long().numpy()
        powers = [2**i for i in range(samples.bit_length())]
        results[str(n)] = {
            f"avg@{samples}": float(right.mean()),
            f"avg@{samples}_se": float(right.mean(1).std() / count**0.5) if count > 1 else None,
            **{f"pass@{k}": float(minibupo.pass_at_k(samples, counts, k).mean()) for k in powers},
            "right_steps": sum(has_right_steps(*pair) for pair in pairs) / len(pairs),
            "mixed": float(((counts > 0) & (counts < samples)).mean()),
            "cut_off": sum(not text.endswith("<eos>") for _, text in pairs) / len(pairs),
            "length": sum(len(encode(text)) for _, text in pairs) / len(pairs),
        }
        if n == s.n:
            examples = [[problem, group[0]] for problem, group in zip(problems, texts)][:3]
    return results, examples


def has_right_steps(expression: str, response: str) -> bool:
    """Whether every line of a response follows from the one before by one or more operations."""
    lines = [expression, *response.removesuffix("<eos>").split("=")]
    ended = response.endswith("<eos>") and len(lines[-1]) == 1
    return ended and all(after in careful(before)[1:] for before, after in pairwise(lines))


@torch.no_grad()
def single_operations(model, s: Settings, problems=128) -> float:
    """How well single operations are known: on careful solutions of held-out problems, the share of
    lines whose first token, the result of an operation, is the likeliest one. Jumps, which the base
    has seen as well, spread over many tokens and do not hide it."""
    drawn = evaluation_problems(stream(0, "single operations"), s.n, problems)
    tokens, _ = padded([encode("=".join(careful(p)) + "<eos>") for p in drawn], model.device)
    starts = tokens[:, :-1] == encode("=")[0]
    return float((model(tokens[:, :-1]).argmax(-1) == tokens[:, 1:])[starts].float().mean())


@torch.no_grad()
def own_solutions(model, s: Settings, count=64):
    """Held-out problems with a model's own solutions: tokens (P, T) and response mask (P, T-1).

    Those of the base are the fixed text on which internal policies are measured during training."""
    problems = evaluation_problems(stream(s.seed, "text"), s.n, count)
    prompts, _ = padded([encode(p + "=") for p in problems], model.device)
    generator = torch_stream(model.device, s.seed, "text responses")
    sampled = model.generate(prompts, s.response_limit, eos_id=EOS, pad_id=PAD, generator=generator)
    return sampled.tokens, response_mask(sampled.prompt_len, sampled.end, sampled.tokens.shape[1])


@torch.no_grad()
def means_inside(model, tokens, mask) -> dict:
    """The means over positions of all that minibupo.look_inside measures, each a list by layer, and
    the perplexity of the tokens under pi_theta."""
    found = minibupo.look_inside(model, tokens, mask)
    means = {name: values.mean(1).tolist() for name, values in found.items()}
    logp = minibupo.token_logprobs(model, tokens, mask)[mask]
    return means | {"perplexity": float(logp.mean().neg().exp())}


def add_evaluation(records: list, s: Settings, model, step: int):
    """Evaluate and add the record; on the way to the last step on a quarter of the problems."""
    count = s.eval_problems if step in (0, s.steps) else -(-s.eval_problems // 4)
    results, examples = evaluate(model, s, s.tiers, count)
    add_record(records, "eval", step=step, problems=count, tiers=results, examples=examples)
    if 0 < step < s.steps:
        accuracy = "  ".join(f"n = {n}: {of[f'avg@{SAMPLES}']:.3f}" for n, of in results.items())
        tqdm.write(f"evaluation at step {step}, Avg@{SAMPLES}  {accuracy}")


# ---- housekeeping: skip on first reading -------------------------------------------------------
# Options, the main job, going on with a run, printing, files, and main.


def check_settings(s: Settings):
    """Raise ValueError for settings that cannot be."""
    for f in fields(s):
        value, limits = getattr(s, f.name), f.metadata
        kind = int | float if f.type is float else f.type
        if not isinstance(value, kind) or isinstance(value, bool):
            name = getattr(f.type, "__name__", f.type)
            raise ValueError(f"{f.name} must be of type {name}, not {value!r}")
        if limits["choices"] and value not in limits["choices"]:
            raise ValueError(
                f"{f.name} must be one of {', '.join(limits['choices'])}, not {value!r}"
            )
        if limits["low"] is not None and value is not None and not value >= limits["low"]:
            raise ValueError(f"{f.name} must be at least {limits['low']}, not {value}")
        if limits["high"] is not None and not value <= limits["high"]:
            raise ValueError(f"{f.name} must be at most {limits['high']}, not {value}")
    if s.minibatches > s.questions:
        raise ValueError(f"minibatches = {s.minibatches} are more than questions = {s.questions}")
    if s.s_inter > s.steps:
        raise ValueError(f"s_inter = {s.s_inter} is more than steps = {s.steps}")
    if s.layer is None and s.site == "attn_out":
        raise ValueError("site attn_out needs a layer: the paper's rule looks at FFNs alone")
    if s.layer is not None and s.layer >= s.n_layer:
        raise ValueError(
            f"layer must be in 1..{s.n_layer - 1}, below the top of {s.n_layer} layers, not {s.layer} "
            "(layers count from 1; the official scripts' k is this number less 1)"
        )
    s.model_config()


def parse_options(argv) -> tuple[Settings, dict, bool]:
    """The settings (option over preset over default), those given by hand, and --resume."""
    parser = argparse.ArgumentParser(
        prog="train_toy.py",
        usage="python train_toy.py [--option value ...]",
        description="Train a small GPT on sloppy arithmetic, then improve it by GRPO or BuPO.",
        allow_abbrev=False,
    )
    types = {int | None: layer_number, str | None: str}
    for f in fields(Settings):
        default = "" if f.default is None else f" (default: {f.default})"
        parser.add_argument(
            f"--{f.name}",
            type=types.get(f.type, f.type),
            choices=f.metadata["choices"],
            default=argparse.SUPPRESS,
            help=f.metadata["help"] + default,
        )
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out_dir")
    given = vars(parser.parse_args(argv))
    resume = given.pop("resume")
    values = (SMOKE if given.get("preset") == "smoke" else {}) | given
    if values.get("algo") == "grpo":
        values["s_inter"] = given.get("s_inter", 0)
    s = Settings(**values)
    for name in ("layer", "site", "s_inter"):
        if given.get(name) and (s.algo == "grpo" or s.s_inter == 0):
            raise ValueError(
                f"--{name} {given[name]} is for phase 1, which --algo grpo and --s_inter 0 do not have"
            )
    return s, given, resume


def layer_number(text: str) -> int | None:
    """A layer of the command line; "auto" is the paper's rule."""
    return None if text == "auto" else int(text)


def run(s: Settings, given: dict, resume: bool):
    """The main job, from nothing (or a base, or a checkpoint) to the final table."""
    device = pick_device(s.device)
    s.device = device.type  # not "auto", or a resume elsewhere could change it unnoticed
    torch.set_num_threads(s.threads)
    out = Path(s.out_dir) if resume else None
    base = out / "base.pt" if resume and (out / "base.pt").exists() else s.base
    model = load_model(base, device) if base else None
    if model is not None:
        take_sizes(s, given, model, base)
    job = resumed_job(s, out, model) if resume else None
    # What can be refused has been refused. From here on files are written.
    out = out or new_directory(s)
    s.out_dir = str(out)
    write_text(out / "config.json", json.dumps(asdict(s), indent=2))
    stop_on_ctrl_c()
    print(f"{'resuming' if resume else 'run'} {out} on {device}, {s.threads} threads", flush=True)
    job = job or new_job(s, out, model, device)
    first = {record["kind"]: record for record in reversed(job.records)}  # of each kind
    print_inside(first["internal"], job.target, s)
    preflight(first["eval"]["tiers"][str(s.n)], s)
    train(s, job)
    print_table([record for record in job.records if record["kind"] == "eval"], s)
    other = "bupo" if s.algo == "grpo" else "grpo"
    print(f"\nall of it is in {out}; next, see the internal policies as figures:")
    print(f"  python analyze.py {out}\nand train from the same base with the other algorithm:")
    print(
        f"  python train_toy.py --algo {other} --seed {s.seed} --n {s.n} --base {out / 'base.pt'}"
    )


def new_job(s: Settings, out: Path, model, device) -> Job:
    """A base model (pretrained here unless given), measured, ready for the first step of RL."""
    records = []
    if model is None:
        torch.manual_seed(s.seed)
        model = GPT(s.model_config()).to(device)
        pretrain(s, model, records)
    if not (out / "base.pt").exists():
        save_checkpoint(out / "base.pt", model)
    known = single_operations(model, s)
    if known < KNOWN:
        print(
            f"this base gets only {known:.0%} of single operations right (wanted: {KNOWN:.0%}), so RL "
            "will end lower than it could: try another --seed"
        )
    text = own_solutions(model, s)
    add_record(records, "internal", step=0, **means_inside(model, *text))
    add_evaluation(records, s, model, step=0)
    job = Job(out, model, adamw(model, s.lr), Policy(s.layer, s.site), text, records, 0)
    write_metrics(job)
    if s.layer is None:
        try:
            job.target = Policy(minibupo.target_layer(records[-2]["d_mlp"]), s.site)
        except ValueError as error:
            if s.s_inter:
                base = f"--base {out / 'base.pt'} --layer N"
                raise ValueError(f"{error}. Choose one: python train_toy.py {base}") from None
            job.target = FULL  # of GRPO, which has no phase 1; what is logged of it is pi_theta's
    save_job(job)
    return job


def resumed_settings(given: dict) -> Settings:
    """The settings of the run in --out_dir. Raises ValueError if there is none, or if an option given
    by hand differs (--steps may, to go on for longer)."""
    if "out_dir" not in given:
        raise ValueError("--resume needs --out_dir, the directory of the run to go on with")
    s = read_settings(Path(given["out_dir"]))
    for name, value in given.items():
        stored = getattr(s, name)
        if name not in ("out_dir", "steps") and value != stored:
            raise ValueError(
                f"--{name} {value} does not match the run in {given['out_dir']}: {stored}"
            )
    s.out_dir, s.steps = given["out_dir"], given.get("steps", s.steps)
    check_settings(s)
    return s


def resumed_job(s: Settings, out: Path, base) -> Job | None:
    """The job in a run's checkpoint, or None for a run that was stopped before its first one.

    Writes nothing. Raises ValueError for a checkpoint that does not fit the run."""
    path = out / "ckpt.pt"
    if not path.exists():
        if (out / "metrics.jsonl").exists() and read_metrics(out, "step"):
            raise ValueError(
                f"{out} has steps of RL in metrics.jsonl, but no ckpt.pt to go on from"
            )
        return None
    if not (out / "base.pt").exists():
        raise ValueError(f"{out} has no base.pt")
    text, content, optimizer = own_solutions(base, s), load_checkpoint(path), adamw(base, s.lr)
    with reading(path):
        base.load_state_dict(content["model"])
        load_moments(optimizer, content["optimizer"])
        for record in content["records"]:
            check_record(record)
        job = Job(out, base, optimizer, Policy(*content["target"]), text, content["records"], 0)
        job.step = content["step"]
        if not isinstance(job.step, int) or not {"internal", "eval"} <= {
            r["kind"] for r in job.records
        }:
            raise ValueError("it has no step of RL")
        minibupo.policy_logits(base, text[0], job.target)  # raises for a target that is not there
    if job.step > s.steps:
        raise ValueError(f"the run in {out} has done {job.step} steps, more than --steps {s.steps}")
    return job


def take_sizes(s: Settings, given: dict, model: GPT, path):
    """Set the sizes in s to a base model's. Raises ValueError if one given by hand is another."""
    for name in ("n_layer", "d_model"):
        size = getattr(model.cfg, name)
        if given.get(name, size) != size:
            raise ValueError(f"--{name} {given[name]} does not match {path}, which has {size}")
        setattr(s, name, size)
    check_settings(s)


def preflight(tier: dict, s: Settings):
    """Print whether RL has something to work on. Raises ValueError, with the remedy, if not."""
    mixed, right = tier["mixed"], tier["pass@1"]
    print(
        f"preflight at n = {s.n}: Pass@1 {right:.3f}, Pass@{SAMPLES} {tier[f'pass@{SAMPLES}']:.3f}, "
        f"groups with mixed outcomes {mixed:.2f}"
    )
    if mixed < 0.05:
        remedy = "shorter problems (--n)" if right < 0.5 else "longer ones (--n) or a larger --skip"
        raise ValueError(
            f"only {mixed:.1%} of the groups have mixed outcomes, so there is next to nothing to learn "
            f"from: try another base (--seed), {remedy}"
        )


def print_inside(inside: dict, target: Policy, s: Settings):
    """Print the base's internal entropies by layer, and what is optimised when."""
    log_v = torch.tensor(float(VOCAB_SIZE)).log()
    print(f"\ninternal entropies of the base, in nats (uniform: log V = {log_v:.2f})")
    print("layer    H(H^l)  normed    dH_ATTN   dH_FFN  dH_Layer")
    for l, (raw, normed) in enumerate(zip(inside["layer"], inside["layer_normed"])):
        changes = [inside[name][l - 1] for name in ("d_attn", "d_mlp", "d_layer")] if l else []
        mark = "  <- target" if l and l == target.layer and s.s_inter else ""
        print(f"{l:5d} {raw:9.2f}{normed:8.2f}   " + "".join(f"{d:9.2f}" for d in changes) + mark)
    phase1 = (
        f"steps 1..{s.s_inter} optimise {target.site} of layer {target.layer}, the others pi_theta"
    )
    print(
        f"\nBuPO: {phase1}\n" if s.s_inter else f"\nGRPO: all {s.steps} steps optimise pi_theta\n"
    )


def print_table(records: list[dict], s: Settings):
    """Print the evaluations before and after RL, by length of problem, with examples."""
    before, after = records[0], records[-1]
    print(
        f"\nheld-out problems, {after['problems']} of each length, {SAMPLES} samples of each, in %"
    )
    print("(+- standard error; right steps: no line is wrong; length in tokens)\n")
    heads = "before RL", f"after {after['step']} steps"
    print(" " * 14 + "".join(f"|{head:^47}" for head in heads))
    columns = f"{f'Avg@{SAMPLES}':>15}{'right steps':>13}{f'Pass@{SAMPLES}':>9}{'length':>8}  "
    print(f"{'digits':14}" + f"|{columns}" * 2)
    for n in s.tiers:
        cells = []
        for tier in (before["tiers"][str(n)], after["tiers"][str(n)]):
            avg, error = 100 * tier[f"avg@{SAMPLES}"], 100 * (tier[f"avg@{SAMPLES}_se"] or 0)
            steps, passed = 100 * tier["right_steps"], 100 * tier[f"pass@{SAMPLES}"]
            cells.append(
                f"|{avg:8.1f} +-{error:4.1f}{steps:13.1f}{passed:9.1f}{tier['length']:8.1f}  "
            )
        print(f"n = {n}{' (unseen)' if n > s.n else '':9}" + "".join(cells))
    for when, record in (("before", before), ("after", after)):
        print(f"\n{when}:\n" + "\n".join(verdict(*example) for example in record["examples"]))


def verdict(problem: str, response: str) -> str:
    """A problem, a response to it, and whether the answer is right, in one line."""
    right = "right" if is_right(problem, response) else f"wrong, it is {careful(problem)[-1]}"
    return f"  {problem}= {response}   ({right})"


def progress(name: str, steps: int, done: int = 0):
    """A progress bar on a terminal; elsewhere report prints lines."""
    return tqdm(total=steps, initial=done, desc=name, disable=not sys.stderr.isatty())


def report(bar, step: int, text: str, every: int):
    """Show the state of a loop: beside its bar, or as a line in each `every`-th step."""
    bar.set_postfix_str(text)
    if bar.disable and step % every == 0:
        print(f"step {step:4d}  {text}", flush=True)


# ---- files of a run: config.json, metrics.jsonl, base.pt, phase1.pt, ckpt.pt ----

FORMAT = 2  # of checkpoints


@contextmanager
def reading(path):
    """Around all reading of files: what is wrong with their content becomes one sentence."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # torch.load and load_state_dict have one for each kind of damage
        says = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{path} is damaged or none of ours ({type(error).__name__}: {says})"
        ) from error


def load_checkpoint(path) -> dict:
    """What save_checkpoint wrote. Raises ValueError, or OSError, saying what is wrong with the file."""
    with reading(path):
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']}, not {FORMAT}")
    return content


def load_model(path, device="cpu") -> GPT:
    """The model in a checkpoint. Raises ValueError, or OSError, saying what is wrong with the file."""
    content = load_checkpoint(path)
    with reading(path):
        model = GPT(GPTConfig(**content["model_config"]))
        model.load_state_dict(content["model"])
        if model.vocab_size != VOCAB_SIZE:
            raise ValueError(f"its vocabulary has {model.vocab_size} tokens, the toy {VOCAB_SIZE}")
    return model.to(device)


def load_moments(optimizer, state: dict):
    """Restore AdamW's moments; its settings stay. Raises ValueError for moments that do not fit, on
    which the fused step would crash the interpreter."""
    parameters = optimizer.param_groups[0]["params"]
    for i, moments in state.items():
        shape = tuple(parameters[i].shape)
        found = {name: tuple(moment.shape) for name, moment in moments.items()}
        if found != {"step": (), "exp_avg": shape, "exp_avg_sq": shape}:
            raise ValueError(f"moments of parameter {i} are {found}, the parameter is {shape}")
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def save_checkpoint(path: Path, model: GPT, **more):
    """Write a model and whatever `more` holds, plain types and tensors only. Raises
    FloatingPointError, and leaves the file as it was, if a weight is not finite."""
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise FloatingPointError("the weights are no longer finite")
    config = asdict(model.cfg)
    content = {"format": FORMAT, "model_config": config, "model": model.state_dict(), **more}
    write_atomically(path, lambda temporary: torch.save(content, temporary))


def save_job(job: Job):
    """ckpt.pt: all that the steps to come depend on."""
    moments = job.optimizer.state_dict()["state"]
    more = dict(step=job.step, target=list(job.target), optimizer=moments, records=job.records)
    save_checkpoint(job.out / "ckpt.pt", job.model, **more)


def write_metrics(job: Job):
    """metrics.jsonl: all records, one JSON object a line."""
    write_text(job.out / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in job.records))


def write_text(path: Path, text: str):
    """Write a text file, whole or not at all."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_atomically(path: Path, write):
    """Call write(temporary path), then rename: at no moment is `path` half-written."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


def read_settings(run: Path) -> Settings:
    """The settings in a run's config.json. Raises ValueError for a directory that is no run."""
    if not (run / "config.json").is_file():
        raise ValueError(f"{run} holds no run: it has no config.json")
    with reading(run / "config.json"):
        return Settings(**json.loads((run / "config.json").read_text(encoding="utf-8")))


def read_metrics(run: Path, kind: str) -> list[dict]:
    """All records of one kind in a run's metrics.jsonl. Raises ValueError for a line that is none."""
    path = run / "metrics.jsonl"
    with reading(path):
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for record in records:
            check_record(record)
    return [record for record in records if record["kind"] == kind]


BY_LAYER = ("layer", "layer_normed", "layer_matched", "d_attn", "d_mlp", "d_layer", "cos_layer")
FIELDS = {  # what is read of a record, by its kind; add_record's callers write more
    "pretrain": ("step", "loss", "single_operations"),
    "step": ("step", "reward", "policy_entropy", "length", "grad_norm"),
    "internal": ("step", "perplexity", *BY_LAYER),
    "eval": ("step", "problems", "tiers", "examples"),
}


def add_record(records: list, kind: str, **values):
    """Append {"kind": kind, **values}. Raises FloatingPointError for NaN, which JSON does not have."""
    try:
        json.dumps(values, allow_nan=False)
    except ValueError:
        raise FloatingPointError(f"a measurement of step {values['step']} is not finite") from None
    records.append({"kind": kind, **values})


def check_record(record: dict):
    """Raise ValueError, or TypeError or KeyError, for what add_record cannot have written."""
    for name in FIELDS[record["kind"]]:
        value = record[name]
        if name == "tiers":
            numbers = [x for tier in value.values() for x in tier.values() if x is not None]
        elif name == "examples":
            numbers = [len(verdict(*example)) for example in value]
        else:
            numbers = value if name in BY_LAYER else [value]
        if not all(isinstance(x, int | float) for x in numbers) or isinstance(numbers, str):
            raise ValueError(f"{name} of a record cannot be {value!r}")


def new_directory(s: Settings) -> Path:
    """The run's directory, made: out_dir, or the first free one of out/ALGO-seedSEED, ..-2, ..-3.

    Raises ValueError for one that holds something."""
    if s.out_dir is not None:
        out = Path(s.out_dir)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(
                f"{out} is not empty: choose another --out_dir, or --resume the run in it"
            )
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


# ---- devices, Ctrl-C, main ----


def pick_device(name: str) -> torch.device:
    """The device of an option value; auto is cuda, or else cpu. Raises ValueError for one that is not
    there."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = "cuda" if there["cuda"] else "cpu"
    if not there[name]:
        available = ", ".join(device for device in there if there[device])
        raise ValueError(f"device {name} is not available here, only {available}")
    return torch.device(name)


def adamw(model, lr: float, weight_decay=0.01, betas=(0.9, 0.999)):
    """AdamW; one fused call a step where the device has it."""
    options = dict(
        weight_decay=weight_decay, betas=betas, fused=model.device.type in ("cpu", "cuda")
    )
    return torch.optim.AdamW(model.parameters(), lr=lr, **options)


def set_learning_rate(optimizer, lr: float):
    """Set the rate of the optimizer steps to come."""
    for group in optimizer.param_groups:
        group["lr"] = lr


STOP = threading.Event()  # set by the first Ctrl-C


def stop_on_ctrl_c():
    """The first Ctrl-C lets the step of RL under way end and be saved; a second one interrupts."""

    def handler(*_):
        STOP.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    STOP.clear()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, handler)


def main(argv=None) -> int:
    """Run the command line; returns the exit code: 0, 2 for what the user can mend, 1 for NaN, 130
    for Ctrl-C."""
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
        command = f"python train_toy.py --resume --out_dir {s.out_dir}"
        print(f"\nstopped; go on with: {command}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
