"""The toy task and the training run: a base model, a look at its internal policies, then BuPO.

The task: work out a chain of operations on digits from left to right, every result mod 10.

    7+5*3-2=   ->   2*3-2=6-2=4<eos>         (7+5=12 -> 2;  2*3=6;  6-2=4)

The prompt ends in `=`. A response rewrites what is left after each operation; what follows its last
`=` is the answer. The reward is 1 if the response ended and its answer is right, else 0.

The base model learns from *sloppy* solutions: each line before the answer is left out with
probability 1/2. So it has seen careful work and jumps, and jumps mostly go wrong. RL on the final
answer alone then discovers careful work: responses grow longer as more of them are right.

    python train_toy.py                                     # a base model, then BuPO
    python train_toy.py --algo grpo --base out/bupo-seed0/base.pt
    python train_toy.py --resume --out_dir out/bupo-seed0   # go on after Ctrl-C or a crash

All that is random in a step depends on (seed, purpose, step) alone. So a run that was stopped goes
on as if it had not been, on a CPU to the last bit, and runs of one seed meet the same problems.
"""

import argparse
import hashlib
import json
import math
import operator
import os
import random
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
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
    """Token ids of a text; "<eos>" and "<pad>" are one token each. Raises ValueError for another
    character, on which tiktoken would panic."""
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
    """A field of Settings, which is a command-line option as well, with what it may be."""
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
    device: str = option("auto", "cpu, cuda, mps or auto, which is cuda where it is, else cpu")
    threads: int = option(2, "CPU threads; a small model gains nothing from many", 1, 1024)

    n: int = option(5, "digits of the longest problems of training", 3, 12)
    n_layer: int = option(6, "layers", 2)
    d_model: int = option(64, "width of the residual stream", 4)
    skip: float = option(0.5, "share of lines left out of what the base learns from", 0, 1)
    internal_loss: float = option(0.0, "weight of the base's loss on its internal policies", 0, 1e6)

    questions: int = option(64, "questions a step of RL", 4)
    group: int = option(8, "responses to each question", 2)
    lr: float = option(5e-4, "learning rate for 30 steps; then it falls as 1 / step", 1e-12, 1e6)
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


def pretrain(s: Settings, model, records: list, max_steps=1500, lr=4e-3):
    """Teach the base model until it knows single operations. Appends a record every 50 steps.

    Solutions are careful until most operations are known, and get sloppy over the next 200 steps.
    While any line may follow, the result of an operation is but one of several right tokens, and
    operations are learned more slowly, or never. The number of steps is not fixed: seeds differ in
    when operations are learned, and RL can improve only a model that gets some answers right."""
    options = dict(weight_decay=0.1, betas=(0.9, 0.98), fused=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, **options)
    started, learned = time.perf_counter(), None  # the step at which most operations were known
    for step in tqdm(range(1, max_steps + 1), "pretraining", disable=None):
        sloppiness = min(1.0, (step - learned) / 200) if learned else 0.0
        batch = pretraining_batch(s, step, model.device, s.skip * sloppiness)
        loss = pretraining_loss(model, *batch, s.internal_loss)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = lr * min(1.0, step / 50)  # warm-up
        optimizer.step()
        if step % 50 == 0:
            known = single_operations(model, s)
            add_record(records, "pretrain", step=step, loss=loss.item(), single_operations=known)
            tqdm.write(f"step {step:4d}  loss {loss:.2f}  single operations right {known:.2f}")
            if learned is None and known >= 0.8:
                learned = step
            if sloppiness == 1 and known >= KNOWN:
                break
    print(f"base model: {step} steps in {time.perf_counter() - started:.0f} s")


def pretraining_batch(s: Settings, step: int, device, skip: float, rows=48):
    """Rows of text: tokens (B, T), and which of them belong to a response (B, T).

    A row holds a solution of each length 2..n, in random order, each line left out with probability
    `skip`. A model that met each problem at the start of a row would learn where its first operands
    stand, and be lost on the second line."""
    rng, tokens, marks = stream(s.seed, "pretraining", step), [], []
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
    """Cross-entropy of pi_theta on the response tokens, plus internal_loss times the mean of that
    of the internal layer policies."""
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
    seen, started = {}, time.perf_counter()

    def sample(step):
        # smaller steps late, when a handful of mixed groups decides on the gradient
        optimizer.param_groups[0]["lr"] = s.lr * min(1.0, 30 / step)
        batch = rollouts(s, model, step)
        seen.update(describe(model, batch, job.target))  # before the step changes the model
        return batch

    start = job.step + 1
    steps = minibupo.bupo(model, optimizer, sample, job.target, s.s_inter, s.steps, start=start)
    for step, policy, _, log in tqdm(steps, s.algo, s.steps, initial=job.step, disable=None):
        job.step, phase = step, "policy" if policy == FULL else "internal"
        log |= {"seconds": time.perf_counter() - started, "phase": phase, **seen}
        add_record(records, "step", step=step, **log)
        if step % 5 == 0:
            tqdm.write(LOG_LINE.format(step=step, **log))
        if step % 5 == 0 or step in (s.s_inter, s.steps):
            add_record(records, "internal", step=step, **means_inside(model, *job.text))
        if step % 30 == 0 or step == s.steps:
            add_evaluation(records, s, model, step)
        if step == s.s_inter:
            save_checkpoint(job.out / "phase1.pt", model)
        save_job(job)
        started = time.perf_counter()


LOG_LINE = (
    "step {step:4d}  {phase:8}  reward {reward:.3f}  entropy {policy_entropy:.3f}  "
    "length {length:.1f}  clipped {clip_fraction:.4f}  gradient {grad_norm:.2f}"
)


def rollouts(s: Settings, model, step: int, problems: list[str] | None = None) -> Rollouts:
    """A step's questions (new ones, or `problems`), responses of pi_theta to each, and rewards."""
    problems = problems or draw_questions(stream(s.seed, "questions", step), s.questions, s.n)
    generator = torch_stream(model.device, s.seed, "responses", step)
    sampled = respond(model, s, problems, s.group, generator)
    right = [is_right(problems[i // s.group], text) for i, text in enumerate(responses(sampled))]
    return Rollouts(*sampled, torch.tensor(right).float().view(s.questions, s.group))


def draw_questions(rng, count: int, n: int) -> list[str]:
    """Training problems of 3, 4, .., n digits in shares of 1 : 2 : .. : n - 2, since longer ones
    take more learning; in random order."""
    sizes = [k for k in range(3, n + 1) for _ in range(k - 2)]
    problems = [training_problem(rng, sizes[i * len(sizes) // count]) for i in range(count)]
    return rng.sample(problems, count)


def respond(model, s: Settings, problems: list[str], samples: int, generator):
    """`samples` responses of a model to each problem, at temperature 1: a Generation."""
    prompts, prompt_len = padded([encode(problem + "=") for problem in problems], model.device)
    options = dict(num_samples=samples, eos_id=EOS, pad_id=PAD, generator=generator)
    return model.generate(prompts, s.response_limit, prompt_len=prompt_len, **options)


@torch.no_grad()
def describe(model, batch: Rollouts, target: Policy) -> dict:
    """What a step's log says of its rollouts. Entropies (nats, temperature 1) and the mean of
    log(pi_target / pi_theta), how far phase 1 is off-policy, are taken on one response a group."""
    right = batch.rewards.mean(1)
    log = {
        "reward": float(right.mean()),
        "groups_right": float((right == 1).float().mean()),
        "groups_wrong": float((right == 0).float().mean()),
        "length": float((batch.end - batch.prompt_len).float().mean()),
        "cut_off": float((batch.tokens.gather(1, batch.end[:, None] - 1) != EOS).float().mean()),
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
    """`count` different held-out problems of n digits. Raises ValueError for more than it has."""
    if n < 3 or count > 1000:
        raise ValueError(f"there are 1000 problems of 3 digits or more, not {count} of {n}")
    found = {}  # a set that keeps the order
    while len(found) < count:
        expression = random_expression(rng, n)
        if held_out(expression):
            found[expression] = True
    return list(found)


def attempts(model, s: Settings, problems: list[str], samples: int, generator) -> list[list[str]]:
    """The texts of `samples` responses to each problem, from about 1,024 rows at a time."""
    texts, size = [], max(1, 1024 // samples)
    for i in range(0, len(problems), size):
        texts += responses(respond(model, s, problems[i : i + size], samples, generator))
    return [texts[i : i + samples] for i in range(0, len(texts), samples)]


def evaluate(model, s: Settings, tiers, count: int, samples=SAMPLES) -> tuple[dict, list]:
    """Accuracy on `count` held-out problems of each length in `tiers`, the same ones for one seed.

    Returns, by length as a string: "avg@K", its standard error over problems "avg@K_se" (None for
    one problem), unbiased "pass@1", "pass@2", .., "pass@K"; the shares of responses without a wrong
    step "right_steps" and of those cut off by the limit "cut_off", of problems with mixed outcomes
    "mixed"; the mean "length" in tokens. And three pairs [problem, response] of length s.n."""
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


def own_solutions(model, s: Settings, count=64):
    """Held-out problems with a model's own solutions: tokens (P, T) and response mask (P, T-1).

    Those of the base are the fixed text on which internal policies are measured during training."""
    problems = evaluation_problems(stream(s.seed, "text"), s.n, count)
    generator = torch_stream(model.device, s.seed, "text responses")
    sampled = respond(model, s, problems, 1, generator)
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
        value, may_be = getattr(s, f.name), f.metadata
        kind = int | float if f.type is float else f.type
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{f.name} must be of type {f.type}, not {value!r}")
        if may_be["choices"] and value not in may_be["choices"]:
            raise ValueError(f"{f.name} must be one of {', '.join(may_be['choices'])}, not {value}")
        low, high = may_be["low"], may_be["high"]
        if low is not None and value is not None and not value >= low:
            raise ValueError(f"{f.name} must be at least {low}, not {value}")
        if high is not None and not value <= high:
            raise ValueError(f"{f.name} must be at most {high}, not {value}")
    if s.s_inter > s.steps:
        raise ValueError(f"s_inter = {s.s_inter} is more than steps = {s.steps}")
    if s.layer is None and s.site == "attn_out":
        raise ValueError("site attn_out needs a layer: the paper's rule looks at FFNs alone")
    if s.layer is not None and s.layer >= s.n_layer:
        raise ValueError(f"layer must be in 1..{s.n_layer - 1}, below the top, not {s.layer}")
    for name in ("layer", "site") if s.s_inter == 0 else ():
        if getattr(s, name) != getattr(Settings, name):
            raise ValueError(f"{name} is for phase 1, which algo grpo and s_inter 0 do not have")
    if s.algo == "grpo" and s.s_inter:
        raise ValueError(f"s_inter = {s.s_inter} is for phase 1, which algo grpo does not have")
    s.model_config()


def parse_options(argv) -> tuple[Settings, dict, bool]:
    """The settings (option over preset over default), those given by hand, and --resume."""
    what = "Train a small GPT on sloppy arithmetic, then improve it by BuPO or GRPO."
    parser = argparse.ArgumentParser("train_toy.py", description=what, allow_abbrev=False)
    for f in fields(Settings):
        default = "" if f.default is None else f" (default: {f.default})"
        options = dict(choices=f.metadata["choices"], help=f.metadata["help"] + default)
        kind = {int | None: layer_number, str | None: str}.get(f.type, f.type)
        parser.add_argument(f"--{f.name}", type=kind, default=argparse.SUPPRESS, **options)
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out_dir")
    given = vars(parser.parse_args(argv))
    resume = given.pop("resume")
    values = (SMOKE if given.get("preset") == "smoke" else {}) | given
    if values.get("algo") == "grpo":
        values["s_inter"] = given.get("s_inter", 0)
    return Settings(**values), given, resume


def layer_number(text: str) -> int | None:
    """A layer of the command line; "auto" is the paper's rule."""
    return None if text == "auto" else int(text)


def run(s: Settings, given: dict, resume: bool):
    """The main job, from nothing (or a base, or a checkpoint) to the final table."""
    device = pick_device(s.device)
    s.device = device.type  # not "auto", or a resume elsewhere could change it unnoticed
    torch.set_num_threads(s.threads)
    out = Path(s.out_dir) if resume else None
    begun = resume and any((out / name).exists() for name in ("base.pt", "ckpt.pt"))
    base = out / "base.pt" if begun else s.base
    model = load_model(base, device) if base else None
    if model is not None:
        take_sizes(s, given, model, base)
    job = resumed_job(s, out, model) if resume else None
    # What can be refused has been refused. From here on files are written.
    out = out or new_directory(s)
    s.out_dir = str(out)
    write_text(out / "config.json", json.dumps(asdict(s), indent=2))
    print(f"{'resuming' if resume else 'run'} {out} on {device}, {s.threads} threads", flush=True)
    job = job or new_job(s, out, model, device)
    print(inside_table(job.records, job.target, s))
    preflight(job.records, s)
    train(s, job)
    print(final_table(job.records, s))
    other = "bupo" if s.algo == "grpo" else "grpo"
    print(f"\nall of it is in {out}; next, see the internal policies as figures:")
    print(f"  python analyze.py {out}\nand train from the same base with the other algorithm:")
    print(
        f"  python train_toy.py --algo {other} --base {out / 'base.pt'} --seed {s.seed} --n {s.n}"
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
        print(f"this base gets only {known:.0%} of single operations right: try another --seed")
    text = own_solutions(model, s)
    add_record(records, "internal", step=0, **means_inside(model, *text))
    add_evaluation(records, s, model, step=0)
    target = pick_target(s, records[-2]["d_mlp"], out / "base.pt")
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.lr, fused=True)
    job = Job(out, model, optimizer, target, text, records, step=0)
    save_job(job)
    return job


def pick_target(s: Settings, d_mlp: list, base: Path) -> Policy:
    """The policy of phase 1. Raises ValueError, with a remedy, where the rule picks nothing."""
    if s.s_inter == 0:
        return Policy(s.n_layer - 1)  # of which GRPO's log tells the entropy, and nothing else
    if s.layer is not None:
        return Policy(s.layer, s.site)
    try:
        return Policy(minibupo.target_layer(d_mlp), s.site)
    except ValueError as error:
        remedy = f"python train_toy.py --base {base} --layer N"
        raise ValueError(f"{error}. Choose one yourself: {remedy}") from None


def resumed_settings(given: dict) -> Settings:
    """The settings of the run in --out_dir. Raises ValueError if there is none, or if an option
    given by hand differs (--steps may, to go on for longer)."""
    if "out_dir" not in given:
        raise ValueError("--resume needs --out_dir, the directory of the run to go on with")
    out = given["out_dir"]
    s = read_settings(Path(out))
    for name, value in given.items():
        if name not in ("out_dir", "steps") and value != getattr(s, name):
            raise ValueError(f"--{name} {value} does not match {out}, which has {getattr(s, name)}")
    return replace(s, out_dir=out, steps=given.get("steps", s.steps))


def resumed_job(s: Settings, out: Path, base) -> Job | None:
    """The job in a run's checkpoint, or None for a run that was stopped before its first one.

    Writes nothing. Raises ValueError for a checkpoint that does not fit the run."""
    path = out / "ckpt.pt"
    if not path.exists() and not (out / "metrics.jsonl").exists():
        return None
    model, content = load_checkpoint(path, base.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.lr, fused=True)
    with reading(path):
        if model.cfg != base.cfg or content["step"] < 0:
            raise ValueError("it is of another run")
        load_moments(optimizer, content["optimizer"])
        target, text = Policy(*content["target"]), own_solutions(base, s)
        minibupo.policy_logits(model, text[0], target)  # raises for a target that is not there
        job = Job(out, model, optimizer, target, text, content["records"], int(content["step"]))
        inside_table(job.records, target, s), final_table(job.records, s)  # so do records
    if job.step > s.steps:
        raise ValueError(f"the run in {out} has done {job.step} steps, more than --steps {s.steps}")
    return job


def take_sizes(s: Settings, given: dict, model: GPT, path):
    """Set the sizes in s to a base's. Raises ValueError if one given by hand is another."""
    for name in ("n_layer", "d_model"):
        size = getattr(model.cfg, name)
        if given.get(name, size) != size:
            raise ValueError(f"--{name} {given[name]} does not match {path}, which has {size}")
        setattr(s, name, size)
    check_settings(s)


def records_of(records: list, kind: str) -> list:
    """The records of one kind."""
    return [record for record in records if record["kind"] == kind]


def preflight(records: list, s: Settings):
    """Print whether RL has something to work on. Raises ValueError, with the remedy, if not."""
    tier = records_of(records, "eval")[0]["tiers"][str(s.n)]
    mixed, right = tier["mixed"], tier["pass@1"]
    print(f"preflight at n = {s.n}: Pass@1 {right:.3f}, groups with mixed outcomes {mixed:.2f}")
    if mixed < 0.05:
        remedy = "shorter problems (--n)" if right < 0.5 else "longer ones (--n), a larger --skip"
        rare = f"only {mixed:.1%} of the groups have mixed outcomes, next to nothing to learn from"
        raise ValueError(f"{rare}: try another base (--seed), {remedy}")


def inside_table(records: list, target: Policy, s: Settings) -> str:
    """The base's internal entropies by layer, and what is optimised when."""
    inside = records_of(records, "internal")[0]
    lines = [
        f"\ninternal entropies of the base, in nats (uniform: log V = {math.log(VOCAB_SIZE):.2f})"
    ]
    lines.append("layer    H(H^l)  normed    dH_ATTN   dH_FFN  dH_Layer")
    for l, (raw, normed) in enumerate(zip(inside["layer"], inside["layer_normed"])):
        changes = [inside[name][l - 1] for name in ("d_attn", "d_mlp", "d_layer")] if l else []
        mark = "  <- target" if l and l == target.layer and s.s_inter else ""
        columns = "".join(f"{d:9.2f}" for d in changes)
        lines.append(f"{l:5d} {raw:9.2f}{normed:8.2f}   {columns}{mark}")
    phase1 = f"steps 1..{s.s_inter} optimise {target.site} of layer {target.layer}, then pi_theta"
    lines.append(f"\nBuPO: {phase1}\n" if s.s_inter else "\nGRPO: all steps optimise pi_theta\n")
    return "\n".join(lines)


def final_table(records: list, s: Settings) -> str:
    """The evaluations before and after RL, by length of problem, with examples."""
    evaluations, K = records_of(records, "eval"), SAMPLES
    before, after = evaluations[0], evaluations[-1]
    columns = f"{f'Avg@{K}':>15}{'right steps':>13}{f'Pass@{K}':>8}{'length':>8} "
    lines = [
        f"\n{after['problems']} held-out problems of each length, {K} samples of each, in %",
        "(+- standard error; right steps: no line is wrong; length in tokens)\n",
        f"{'':14}|{'before RL':^45}|{'after ' + str(after['step']) + ' steps':^45}",
        f"{'digits':14}|{columns}|{columns}",
    ]
    for n in s.tiers:
        lines.append(f"n = {n}{' (unseen)' if n > s.n else '':9}")
        for tier in (before["tiers"][str(n)], after["tiers"][str(n)]):
            names = (f"avg@{K}", f"avg@{K}_se", "right_steps", f"pass@{K}")
            avg, error, steps, passed = (100 * (tier[name] or 0) for name in names)
            lines[-1] += (
                f"|{avg:8.1f} +-{error:4.1f}{steps:13.1f}{passed:8.1f}{tier['length']:8.1f} "
            )
    for when, record in (("before", before), ("after", after)):
        lines += [f"\n{when}:", *(verdict(*example) for example in record["examples"])]
    return "\n".join(lines)


def verdict(problem: str, response: str) -> str:
    """A problem, a response to it, and whether the answer is right, in one line."""
    right = "right" if is_right(problem, response) else f"wrong, it is {careful(problem)[-1]}"
    return f"  {problem}= {response}   ({right})"


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
        what = f"{path} is damaged or none of ours"
        raise ValueError(f"{what} ({type(error).__name__}: {says})") from error


def load_checkpoint(path, device="cpu") -> tuple[GPT, dict]:
    """The model in a checkpoint, and all that the file holds. Raises ValueError or OSError, saying
    what is wrong with it."""
    with reading(path):
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']}, not {FORMAT}")
        model = GPT(GPTConfig(**content["model_config"]))
        model.load_state_dict(content["model"])
        if model.vocab_size != VOCAB_SIZE:
            raise ValueError(f"its vocabulary has {model.vocab_size} tokens, the toy {VOCAB_SIZE}")
    return model.to(device), content


def load_model(path, device="cpu") -> GPT:
    """The model in a checkpoint alone."""
    return load_checkpoint(path, device)[0]


def load_moments(optimizer, state: dict):
    """Restore AdamW's moments; its settings stay. Raises ValueError for moments of another shape,
    on which the fused step would crash the interpreter."""
    parameters = optimizer.param_groups[0]["params"]
    for i, moments in state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            if moments[name].shape != parameters[i].shape or moments["step"].shape != ():
                raise ValueError(f"moments of parameter {i} have another shape")
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def save_checkpoint(path: Path, model: GPT, **more):
    """Write a model and whatever `more` holds, plain types and tensors only. Raises
    FloatingPointError, and leaves the file as it was, if a weight is not finite."""
    if not torch.stack([weight.isfinite().all() for weight in model.parameters()]).all():
        raise FloatingPointError("the weights are no longer finite")
    config = asdict(model.cfg)
    content = {"format": FORMAT, "model_config": config, "model": model.state_dict(), **more}
    write_atomically(path, lambda temporary: torch.save(content, temporary))


def save_job(job: Job):
    """ckpt.pt, all that the steps to come depend on, and metrics.jsonl, a record a line."""
    moments = job.optimizer.state_dict()["state"]
    more = dict(step=job.step, target=list(job.target), optimizer=moments, records=job.records)
    save_checkpoint(job.out / "ckpt.pt", job.model, **more)
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
        content = json.loads((run / "config.json").read_text(encoding="utf-8"))
        return Settings(**{f.name: content.pop(f.name) for f in fields(Settings)} | content)


def read_metrics(run: Path, kind: str) -> list[dict]:
    """The records of one kind in a run's metrics.jsonl. Raises ValueError for lines that are none.

    Whoever takes numbers out of them does so in a `with reading(...)`, too."""
    path = run / "metrics.jsonl"
    with reading(path):
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return records_of(records, kind)


def add_record(records: list, kind: str, **values):
    """Append {"kind": kind, **values}. Raises FloatingPointError for NaN, which is not JSON."""
    try:
        json.dumps(values, allow_nan=False)
    except ValueError:
        raise FloatingPointError(f"a measurement of step {values['step']} is not finite") from None
    records.append({"kind": kind, **values})


def new_directory(s: Settings) -> Path:
    """The run's directory, made: out_dir, or the first free of out/ALGO-seedSEED, ..-2, ..-3, ..

    Raises ValueError for an out_dir that holds something."""
    default = f"out/{s.algo}-seed{s.seed}"
    names = [s.out_dir] if s.out_dir else [default, *(f"{default}-{i}" for i in range(2, 1000))]
    for out in map(Path, names):
        if not out.exists() or (s.out_dir and out.is_dir() and not any(out.iterdir())):
            out.mkdir(parents=True, exist_ok=True)
            return out
    raise ValueError(f"{out} is not empty: choose another --out_dir, or --resume the run in it")


# ---- devices, main ----


def pick_device(name: str) -> torch.device:
    """The device of an option; auto is cuda, else cpu. Raises ValueError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.mps.is_available()}
    if not there.get(name):
        raise ValueError(f"device {name} is not available here")
    return torch.device(name)


def main(argv=None) -> int:
    """Run the command line. Returns 0, 1 for NaN, 2 for bad input, 130 for Ctrl-C."""
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
        print(f"\nstopped; python train_toy.py --resume --out_dir {s.out_dir}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
