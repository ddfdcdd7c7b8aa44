"""The toy task and the training run: a base model, a look at its internal policies, then BuPO.

The task is to work out a chain of operations on digits from left to right, every result mod 10:

    7+5*3-2=   ->   2*3-2=6-2=4<eos>         (7+5=12 -> 2;  2*3=6;  6-2=4)

The prompt ends in `=`. A response rewrites what is left of the problem after each operation, and
what follows its last `=` is the answer. The reward is 1 if the response has ended and its answer is
correct, otherwise 0.

The base model is pretrained on full and then on *sloppy* solutions: each line between the problem
and the answer is left out with probability 1/2. It has therefore seen full and abbreviated
solutions, all with correct answers. When the model itself skips a line, its answer is usually
incorrect. RL rewards only the final answer and so discovers careful work: responses grow longer as
more are correct.

    python train_toy.py                                     # a base model, then BuPO
    python train_toy.py --algo grpo --base out/bupo-seed0/base.pt
    python train_toy.py --resume --out_dir out/bupo-seed0   # continue after Ctrl-C or a crash

In the order of reading: the task, tokens, settings, the base model, Algorithm 1 (`train`), the run
(`run`, where everything begins), evaluation, housekeeping.

The random numbers of a step depend only on (seed, purpose, step). A resumed run therefore continues
as if it had never stopped (bit for bit on a CPU), and runs with one seed meet the same problems.
"""

import argparse
import hashlib
import io
import itertools
import json
import math
import operator
import os
import random
import shlex
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple, get_type_hints

import tiktoken
import torch
from tqdm import tqdm

import minibupo
from minibupo import FULL, Policy, Rollouts, response_mask
from model import GPT, GPTConfig

# ---- the task, as strings ----------------------------------------------------------------------
# This section uses nothing from the rest of the file. To teach another task, replace it by one that
# offers the same names. A problem has a size n. A prompt is a problem followed by "=", which also
# separates the lines of a response; a response that has ended is passed on with its "<eos>". One
# function outside looks at solutions, too: `single_operations` decides by the first token of each
# line when pretraining may stop. Replace it by a measure that fits your task.
#
#     CHARACTERS                          every character of problems and responses
#     single_results()                    strings by which a checkpoint knows the task it is for
#     training_problem(rng, n)            a random problem of size n that may be trained on
#     draw_questions(rng, count, n)       the problems of one step of RL, in random order
#     evaluation_problems(rng, n, count)  different problems of size n that are never trained on
#     check_supply(n, count)              raises ValueError if there are fewer of these
#     careful(problem)                    its full solution, a list of lines from problem to answer
#     sloppy(problem, rng, skip)          an abbreviated solution, from which the base model learns
#     longest_prompt(n)                   the number of tokens that a prompt takes
#     longest_response(n)                 the number of tokens that a full solution takes
#     is_correct(problem, response)       the reward
#     has_correct_lines(problem, response)    logged, but not rewarded

DIGITS = "0123456789"
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
CHARACTERS = DIGITS + "".join(map(str, OPERATORS)) + "="


def operate(a: str, op: str, b: str) -> str:
    """Return the result of one operation, a digit. Raise ValueError if it is not an integer."""
    try:
        result = str(OPERATORS[op](int(a), int(b)) % 10)
    except Exception as error:  # OPERATORS may be anybody's functions
        raise ValueError(f"OPERATORS give no result for {a}{op}{b}: {error!r}") from error
    if len(result) != 1:
        raise ValueError(f"OPERATORS must give integers, not {result} for {a}{op}{b}")
    return result


def single_results() -> list[str]:
    """Return all single operations with their results: "0+0=0", "0+1=1", ...

    Raise ValueError for OPERATORS that the task cannot use."""
    for op in OPERATORS:
        if not isinstance(op, str) or len(op) != 1 or op in DIGITS + "=":
            allowed = "single characters other than digits and ="
            raise ValueError(f"OPERATORS must be {allowed}, not {op!r}")
    if not OPERATORS:
        raise ValueError("OPERATORS must have at least one operator")
    return [
        f"{a}{op}{b}={operate(a, op, b)}"
        for op, a, b in itertools.product(OPERATORS, DIGITS, DIGITS)
    ]


def careful(problem: str) -> list[str]:
    """Return all lines of careful work: for "7+5*3-2", ["7+5*3-2", "2*3-2", "6-2", "4"]."""
    lines = [problem]
    while len(lines[-1]) > 1:
        a, op, b, *rest = lines[-1]
        lines.append(operate(a, op, b) + "".join(rest))
    return lines


def sloppy(problem: str, rng, skip: float) -> list[str]:
    """Return the same lines, but leave out each line before the answer with probability `skip`."""
    problem, *between, answer = careful(problem)
    return [problem, *(line for line in between if rng.random() >= skip), answer]


def longest_prompt(n: int) -> int:
    """Return the tokens of a prompt of n digits: digits, operators and `=`."""
    return 2 * n


def longest_response(n: int) -> int:
    """Return the tokens of careful work on n digits, EOS included: 2(n - 1) + ... + 4 + 2."""
    return n * (n - 1)


def is_correct(problem: str, response: str) -> bool:
    """Verify a response: it has ended, and what follows its last `=` is the answer."""
    return response.split("=")[-1] == careful(problem)[-1] + "<eos>"


def has_correct_lines(problem: str, response: str) -> bool:
    """Return whether each line of a response follows from the one before. This is not rewarded."""
    lines = [problem, *response.removesuffix("<eos>").split("=")]
    ended = response.endswith("<eos>") and len(lines[-1]) == 1
    # `all` stops at the first incorrect line: `careful` would fail on a line that is no expression
    return ended and all(after in careful(before)[1:] for before, after in zip(lines, lines[1:]))


def held_out(problem: str) -> bool:
    """Return whether a problem is kept for evaluation.

    A problem of 3 or more digits is kept with probability 1/8, which its hash decides.
    """
    return len(problem) >= 5 and hashlib.sha256(problem.encode()).digest()[0] < 32


def random_problem(rng, n: int) -> str:
    """Return n digits joined by n - 1 operators, uniformly distributed."""
    first, *digits = rng.choices(DIGITS, k=n)
    return first + "".join(rng.choice(list(OPERATORS)) + digit for digit in digits)


def training_problem(rng, n: int) -> str:
    """Return a problem of n digits with no line held out, so that no solution shows one."""
    while True:
        problem = random_problem(rng, n)
        if not any(held_out(line) for line in careful(problem)):
            return problem


def draw_questions(rng, count: int, n: int) -> list[str]:
    """Return training problems of 3, 4, .., n digits, 1 : 2 : .. : n - 2, in random order."""
    # longer ones take more learning; for n = 5 the sizes are 3 4 4 5 5 5, stretched to `count`
    sizes = [k for k in range(3, n + 1) for _ in range(k - 2)]
    problems = [training_problem(rng, sizes[i * len(sizes) // count]) for i in range(count)]
    return rng.sample(problems, count)


def evaluation_problems(rng, n: int, count: int) -> list[str]:
    """Return `count` different held-out problems of n digits. Raise ValueError for too many."""
    check_supply(n, count)
    found = {}  # a set that keeps the order
    while len(found) < count:
        problem = random_problem(rng, n)
        if held_out(problem):
            found[problem] = True
    return list(found)


def check_supply(n: int, count: int):
    """Raise ValueError unless there are `count` held-out problems of n digits; 1000 are enough."""
    if n < 3 or count > 1000:
        raise ValueError(f"problems must be at most 1000, of 3 digits or more, not {count} of {n}")
    found = supply(n)
    if count > found:
        wanted = f"not {count}: choose a larger n"
        raise ValueError(f"OPERATORS give only {found} held-out problems of n = {n}, {wanted}")


def supply(n: int) -> int:
    """Return the number of held-out problems of n digits, or 1000 if there are more."""
    if 10**n * len(OPERATORS) ** (n - 1) > 16_000:  # 1 in 8 of these are more
        return 1000
    every = itertools.product(DIGITS, *[OPERATORS, DIGITS] * (n - 1))
    return min(1000, sum(held_out("".join(parts)) for parts in every))


# ---- tokens: one per character -----------------------------------------------------------------

EOS = len(CHARACTERS)
PAD = len(CHARACTERS) + 1
VOCAB_SIZE = len(CHARACTERS) + 2
ENCODING = tiktoken.Encoding(
    name="toy",
    pat_str=r"[\s\S]",
    mergeable_ranks={c.encode(): i for i, c in enumerate(CHARACTERS)},
    special_tokens={"<eos>": EOS, "<pad>": PAD},
)


def encode(text: str) -> list[int]:
    """Return the token ids of a text. Raise ValueError for characters outside the vocabulary."""
    for c in text.replace("<eos>", "").replace("<pad>", ""):  # tiktoken would panic
        if c not in CHARACTERS:
            raise ValueError(f"character {c!r} is not one of {CHARACTERS}")
    return ENCODING.encode(text, allowed_special="all")


def padded(rows: list[list], device, value=PAD):
    """Return rows of unequal length as a tensor (N, T), padded on the right, and lengths (N,)."""
    T = max(map(len, rows))
    tensor = torch.tensor([row + [value] * (T - len(row)) for row in rows], device=device)
    return tensor, torch.tensor([len(row) for row in rows], device=device)


def response_texts(sampled) -> list[str]:
    """Return the texts of the responses in `sampled`, which is a Generation or Rollouts."""
    rows = zip(sampled.tokens.tolist(), sampled.prompt_len.tolist(), sampled.end.tolist())
    return [ENCODING.decode(tokens[start:end]) for tokens, start, end in rows]


# ---- random numbers ----------------------------------------------------------------------------


def rng_for(seed: int, purpose: str, step: int = 0) -> random.Random:
    """Return the random numbers for one purpose at one step, independent of all others."""
    return random.Random(f"{purpose}, seed {seed}, step {step}")


def torch_rng_for(device, seed: int, purpose: str, step: int = 0) -> torch.Generator:
    """Return the same for torch, on a device."""
    return torch.Generator(device).manual_seed(rng_for(seed, purpose, step).getrandbits(63))


# ---- settings ----------------------------------------------------------------------------------


def option(default, help, low=None, high=math.inf, choices=None):
    """Return a field of Settings with its command-line option: default, help, range or choices."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))


@dataclass
class Settings:
    """Every option of a run. Raises ValueError for invalid values."""

    algo: str = option(
        "bupo", "what to train with; grpo is bupo without phase 1", choices=("bupo", "grpo")
    )
    layer: int | None = option(
        None, "layer of phase 1, below the top, or auto (default): the paper's rule", 1
    )
    site: str = option(
        "resid_post", "phase 1 trains the policy of this part of it", choices=minibupo.SITES
    )
    s_inter: int = option(5, "steps of phase 1", 0)
    steps: int = option(60, "steps of RL in both phases together", 0)
    seed: int = option(0, "seed of all random numbers", 0, 2**32 - 1)
    base: str | None = option(None, "start RL from this base model, base.pt of another run")
    out_dir: str | None = option(None, "directory of the run (default: a new one under out/)")
    preset: str = option("default", "smoke: a run of seconds", choices=("default", "smoke"))
    device: str = option("auto", "cpu, cuda, mps or auto: cuda if it is available, else cpu")
    threads: int = option(2, "CPU threads; a small model gains nothing from many", 1, 1024)

    n: int = option(5, "digits of the longest training problems", 3, 12)
    n_layer: int = option(6, "layers", 2)
    d_model: int = option(64, "width of the residual stream", 4)
    skip: float = option(0.5, "share of lines left out in pretraining", 0, 1)
    internal_loss: float = option(0.0, "weight of the internal policies' loss in pretraining", 0)
    questions: int = option(64, "questions in a step of RL", 4)
    group: int = option(8, "responses to each question", 2)
    lr: float = option(5e-4, "learning rate for 30 steps; then it falls as 1 / step", 1e-12)
    eval_problems: int = option(256, "evaluation problems of each number of digits", 16, 1000)

    def __post_init__(self):
        check_settings(self)

    @property
    def response_limit(self) -> int:
        """The tokens that a response may take: careful work on n + 1 digits, EOS included."""
        return longest_response(self.n + 1)

    @property
    def tiers(self) -> list[int]:
        """Digits of the evaluation problems, up to n + 1, which is longer than those trained on."""
        return list(range(max(3, self.n - 2), self.n + 2))

    def model_config(self) -> GPTConfig:
        """The sizes of the model. With rotary positions a longer context costs only a table."""
        return GPTConfig(VOCAB_SIZE, CONTEXT, self.n_layer, self.d_model, n_head=2)


SMOKE = dict(n=3, n_layer=4, d_model=32, questions=32, steps=20, s_inter=3, eval_problems=64)
CONTEXT = 256  # the most tokens that a model can read: a prompt and its response
KNOWN = 0.97  # pretraining stops at this accuracy on single operations
KNOWN_FROM = 128  # problems that this accuracy is measured on
SAMPLES = 8  # responses to each problem of an evaluation
FREE = ("out_dir", "steps", "device")  # settings that may change when a run is resumed


# ---- the base model ----------------------------------------------------------------------------


def pretrain(s: Settings, model, records: list, max_steps=1500, lr=4e-3):
    """Train the base model until it knows single operations. Append a record every 50 steps.

    Solutions are careful until most operations are known; over the next 100 steps they become
    sloppy. In sloppy text the next line may be any later one, so several tokens are correct at
    once, and a model that starts with it learns the operations slowly or never. The learning rate
    falls to a tenth as solutions become sloppy: at a constant rate, what is known swings up and
    down and may miss the stop. Seeds differ in how long all this takes, so the number of steps is
    not fixed.
    """
    options = dict(weight_decay=0.1, betas=(0.9, 0.98), fused=True)
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    known = 0.0
    learned = None  # the step at which most operations were known
    for step in tqdm(range(1, max_steps + 1), "pretraining", disable=None):
        sloppiness = min(1.0, (step - learned) / 100) if learned else 0.0
        tokens, response = pretraining_batch(s, step, model.device, s.skip * sloppiness)
        loss = pretraining_loss(model, tokens, response, s.internal_loss)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        warm_up = min(1.0, step / 50)
        optimizer.param_groups[0]["lr"] = lr * warm_up * (1 - 0.9 * sloppiness)
        optimizer.step()

        if step % 50 == 0:
            known = single_operations(model, s)
            add_record(records, "pretrain", step=step, loss=loss.item(), single_operations=known)
            tqdm.write(f"step {step:4d}  loss {loss:.2f}  single operations correct {known:.2f}")
            if learned is None and known >= 0.8:
                learned = step
            if sloppiness == 1 and known >= KNOWN:
                break
    if known < KNOWN:
        print(f"only {known:.0%} of single operations are correct: try another --seed")


def pretraining_batch(s: Settings, step: int, device, skip: float, rows=48):
    """Return rows of text as tokens (B, T), and which tokens belong to a response (B, T).

    A row holds a solution of each length 2..n, in random order. A model that met every problem at
    the start of a row would learn where its operands stand, and would fail on the second line.
    """
    rng = rng_for(s.seed, "pretraining", step)
    # the longest prompt and response of an evaluation: no later position is ever used
    T = longest_prompt(s.n + 1) + s.response_limit
    tokens = []
    in_response = []
    for _ in range(rows):
        row = []
        marks = []
        for n in rng.sample(range(2, s.n + 1), s.n - 1):
            problem, *lines = sloppy(training_problem(rng, n), rng, skip)
            prompt = encode(problem + "=")
            response = encode("=".join(lines) + "<eos>")
            row += prompt + response
            marks += [False] * len(prompt) + [True] * len(response)
        tokens.append(row[:T])
        in_response.append(marks[:T])
    return padded(tokens, device)[0], padded(in_response, device, value=False)[0]


def pretraining_loss(model, tokens, response, internal_loss: float):
    """Return the cross-entropy of pi_theta on responses + internal_loss * that of the layers.

    The second term is the mean cross-entropy of the internal policies of H^1, .., H^L."""
    mask = response[:, 1:]  # position t predicts token t + 1
    inputs = tokens[:, :-1]
    targets = tokens[:, 1:][mask]
    if internal_loss == 0:
        return torch.nn.functional.cross_entropy(model(inputs)[mask], targets)
    layers = [trace.resid_post[mask] for trace in model.trace(inputs)]  # H^1, .., H^L
    internal = [torch.nn.functional.cross_entropy(model.unembed(h), targets) for h in layers]
    logits = model.unembed(model.final_norm(layers[-1]))
    loss = torch.nn.functional.cross_entropy(logits, targets)
    return loss + internal_loss * torch.stack(internal).mean()


# ---- RL: Algorithm 1 ---------------------------------------------------------------------------


class Probe(NamedTuple):
    """The base model's own solutions, on which internal policies are measured during a run."""

    tokens: torch.Tensor  # (P, T)
    mask: torch.Tensor  # (P, T-1), the response positions


@dataclass
class Job:
    """A run of RL: its settings, and everything that its steps change or use."""

    settings: Settings
    out: Path  # the directory of the run
    model: GPT
    optimizer: torch.optim.Optimizer
    target: Policy  # what phase 1 trains; without a phase 1, what the log follows
    probe: Probe
    records: list  # of metrics.jsonl
    step: int  # the last one done


def train(job: Job):
    """Run the remaining steps of Algorithm 1; log and save each of them."""
    s = job.settings
    model = job.model
    optimizer = job.optimizer
    save_job(job)  # after a resume, too: it may have been killed between ckpt.pt and metrics.jsonl

    # 64 rows stay in a CPU's cache; a GPU is faster with more
    chunk = 64 if model.device.type == "cpu" else 256
    steps = minibupo.phases(optimizer, job.target, s.s_inter, s.steps, start=job.step + 1)
    for step, policy in tqdm(steps, s.algo, s.steps, initial=job.step, disable=None):
        batch = rollouts(s, model, step)
        description = describe(model, batch, job.target)  # before the update changes the model

        # the rate falls late, when only a few groups are mixed and determine the gradient
        optimizer.param_groups[0]["lr"] = s.lr * min(1.0, 30 / step)
        log = minibupo.update(model, optimizer, batch, policy, chunk=chunk)

        job.step = step
        phase = 2 if policy == FULL else 1
        add_record(job.records, "step", step=step, phase=phase, **log, **description)
        report(job)
        if step == s.s_inter:
            save_checkpoint(job.out / "phase1.pt", model)
        # 4 MB for the default model, so every step; a large model would be saved every few steps
        save_job(job)


def rollouts(s: Settings, model, step: int, problems: list[str] | None = None) -> Rollouts:
    """Return the rollouts of a step: responses of pi_theta to its questions, and their rewards.

    The questions are new ones, or `problems`, as many as s.questions.
    """
    problems = problems or draw_questions(rng_for(s.seed, "questions", step), s.questions, s.n)
    generator = torch_rng_for(model.device, s.seed, "responses", step)
    sampled = sample_responses(model, s, problems, s.group, generator)
    texts = response_texts(sampled)
    correct = [is_correct(problems[i // s.group], text) for i, text in enumerate(texts)]
    return Rollouts(*sampled, torch.tensor(correct).float().view(s.questions, s.group))


def sample_responses(model, s: Settings, problems: list[str], samples: int, generator):
    """Return a Generation: `samples` responses of a model to each problem, at temperature 1."""
    prompts, prompt_len = padded([encode(problem + "=") for problem in problems], model.device)
    options = dict(num_samples=samples, eos_id=EOS, pad_id=PAD, generator=generator)
    return model.generate(prompts, s.response_limit, prompt_len=prompt_len, **options)


@torch.no_grad()
def describe(model, batch: Rollouts, target: Policy) -> dict:
    """Return what a step's log says of its rollouts.

    Entropies (nats, temperature 1) and layer_log_ratio are of each group's first response. The
    latter is the mean of log(pi_target / pi_theta), which says how far phase 1 is off-policy.
    """
    accuracy = batch.rewards.mean(1)  # of each group
    last_tokens = batch.tokens.gather(1, batch.end[:, None] - 1)
    log = {
        "reward": float(accuracy.mean()),
        "groups_all_correct": float((accuracy == 1).float().mean()),
        "groups_all_incorrect": float((accuracy == 0).float().mean()),
        "length": float((batch.end - batch.prompt_len).float().mean()),
        "unfinished": float((last_tokens != EOS).float().mean()),
    }
    G = batch.rewards.shape[1]
    tokens = batch.tokens[::G]
    mask = response_mask(batch.prompt_len[::G], batch.end[::G], tokens.shape[1])
    chosen = tokens[:, 1:][mask]
    logp = {}
    for name, policy in (("policy", FULL), ("layer", target)):
        logits = minibupo.policy_logits(model, tokens[:, :-1], policy, mask)
        log[f"{name}_entropy"] = float(minibupo.entropy(logits).mean())
        logp[name] = logits.log_softmax(-1).gather(-1, chosen[:, None])
    log["layer_log_ratio"] = float((logp["layer"] - logp["policy"]).mean())
    return log


# ---- the run -----------------------------------------------------------------------------------


def run(s: Settings, resume: bool):
    """Do the main job, from nothing (or a base model, or a checkpoint) to the final table."""
    device = pick_device(s.device)
    s.device = device.type  # not "auto", so that a resumed run cannot change device unnoticed
    torch.set_num_threads(s.threads)
    if not resume:
        s.out_dir = str(new_directory(s))
    out = Path(s.out_dir)
    # a run that was stopped before it had a checkpoint or a log begins again
    begun = resume and any((out / name).exists() for name in ("ckpt.pt", "metrics.jsonl"))
    job = resumed_job(s, out, device) if begun else None
    # What can be checked before training has been checked by now. From here on files are written.
    write_text(out / "config.json", json.dumps(asdict(s), indent=2))
    print(f"run {out} on {device}, {s.threads} threads", flush=True)
    if job is None:
        job = new_job(s, out, device)  # a base model is trained and measured, a layer is chosen
    train(job)
    look = command_line("analyze.py", "all", str(out))
    print(f"everything is in {out}; to see the internal policies: {look}")


def new_job(s: Settings, out: Path, device) -> Job:
    """Return a job with a base model that was measured, evaluated and found fit for RL."""
    records = []
    model = base_model(s, device, records)
    save_checkpoint(out / "base.pt", model, settings=lasting_settings(s))

    probe = own_solutions(model, s)
    inside = means_inside(model, *probe)
    add_record(records, "internal", step=0, **inside)
    target = pick_target(s, inside["dH_mlp"], str(out / "base.pt"))
    print_internal_entropies(inside, target, s)

    add_evaluation(records, s, model, step=0)
    check_mixed_outcomes(records[-1]["tiers"][str(s.n)]["mixed"], s.n)
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.lr, fused=True)
    return Job(s, out, model, optimizer, target, probe, records, step=0)


def base_model(s: Settings, device, records: list) -> GPT:
    """Return the base model in the file s.base or, without one, a new model that is pretrained."""
    if s.base:
        return load_model(s.base, device)
    torch.manual_seed(s.seed)
    model = GPT(s.model_config()).to(device)
    pretrain(s, model, records)
    return model


def pick_target(s: Settings, dH_mlp: list, base: str) -> Policy:
    """Return the policy that phase 1 trains; without a phase 1, the one that the log follows.

    Raise ValueError, with a remedy, if phase 1 needs the paper's rule and it picks nothing.
    """
    if s.layer is not None:
        return Policy(s.layer, s.site)
    try:
        return Policy(minibupo.target_layer(dH_mlp), s.site)
    except ValueError as error:
        if s.s_inter == 0:
            return Policy(s.n_layer - 1)
        remedy = command(s, base=base, layer=s.n_layer // 2, out_dir=None)
        raise ValueError(f"{error}; choose a layer, for example: {remedy}") from None


def print_internal_entropies(inside: dict, target: Policy, s: Settings):
    """Print the entropies of the base model's internal policies, and mark the target layer."""
    print(f"\ninternal entropies of the base, in nats (uniform: {math.log(VOCAB_SIZE):.2f})")
    print("layer  entropy   dH_FFN")
    for l in range(1, s.n_layer + 1):
        mark = "  <- target" if l == target.layer and s.s_inter else ""
        print(f"{l:5}{inside['layer'][l]:9.2f}{inside['dH_mlp'][l - 1]:9.2f}{mark}")


def check_mixed_outcomes(mixed: float, n: int):
    """Raise ValueError if too few problems have both correct and incorrect responses."""
    print(f"of the problems of {n} digits {mixed:.1%} have correct and incorrect responses\n")
    if mixed < 0.05:
        raise ValueError("RL learns only from mixed outcomes: try another --seed, --n or --skip")


def report(job: Job):
    """Print and measure what is due after a step: progress, internal policies, an evaluation."""
    s = job.settings
    step = job.step
    if step % 5 == 0:
        latest = job.records[-1]
        names = ("reward", "policy_entropy", "length")
        shown = "  ".join(f"{name} {latest[name]:.3f}" for name in names)
        tqdm.write(f"step {step:4d}  phase {latest['phase']}  {shown}")
    if step % 5 == 0 or step in (s.s_inter, s.steps):
        inside = means_inside(job.model, *job.probe)
        add_record(job.records, "internal", step=step, **inside)
    if step % 30 == 0 or step == s.steps:
        add_evaluation(job.records, s, job.model, step)


# ---- evaluation --------------------------------------------------------------------------------


def sample_texts(model, s: Settings, problems: list[str], samples: int, generator):
    """Return the texts of `samples` responses to each problem, as a list for each problem."""
    texts = []
    size = max(1, 1024 // samples)  # problems at a time: about 1,024 rows
    for i in range(0, len(problems), size):
        sampled = sample_responses(model, s, problems[i : i + size], samples, generator)
        texts += response_texts(sampled)
    return [texts[i : i + samples] for i in range(0, len(texts), samples)]


def evaluate(model, s: Settings, tiers, count: int, samples=SAMPLES) -> tuple[dict, list]:
    """Return the scores on `count` evaluation problems of each size n in `tiers`, and examples.

    The keys of the scores are the sizes as strings. The three examples are [problem, response], of
    size s.n.
    """
    results = {}
    examples = []
    for n in tiers:
        problems = evaluation_problems(rng_for(s.seed, f"evaluation, n {n}"), n, count)
        generator = torch_rng_for(model.device, s.seed, f"evaluation responses, n {n}")
        texts = sample_texts(model, s, problems, samples, generator)
        results[str(n)] = scores(problems, texts)
        if n == s.n:
            examples = [[problem, group[0]] for problem, group in zip(problems[:3], texts)]
    return results, examples


def scores(problems: list[str], texts: list[list[str]]) -> dict:
    """Return the scores of a list of responses to each problem.

    avg@k is the accuracy over k samples, with its standard error over problems; pass@k the share of
    problems that at least one of k samples solves; mixed the share of problems with correct and
    incorrect responses; unfinished the share of responses that the limit stopped; length is in
    tokens.
    """
    count = len(problems)
    samples = len(texts[0])
    pairs = [(problem, text) for problem, group in zip(problems, texts) for text in group]
    correct = torch.tensor([is_correct(*pair) for pair in pairs], device="cpu")
    correct = correct.view(count, samples).double()
    counts = correct.sum(1).long().numpy()
    powers = [2**i for i in range(samples.bit_length())]
    return {
        f"avg@{samples}": float(correct.mean()),
        f"avg@{samples}_se": float(correct.mean(1).std() / count**0.5) if count > 1 else None,
        **{f"pass@{k}": float(minibupo.pass_at_k(samples, counts, k).mean()) for k in powers},
        "correct_lines": sum(has_correct_lines(*pair) for pair in pairs) / len(pairs),
        "mixed": float(((counts > 0) & (counts < samples)).mean()),
        "unfinished": sum(not text.endswith("<eos>") for _, text in pairs) / len(pairs),
        "length": sum(len(encode(text)) for _, text in pairs) / len(pairs),
    }


def add_evaluation(records: list, s: Settings, model, step: int):
    """Evaluate, print and add the record; during a run only a quarter of the problems is used."""
    count = s.eval_problems if step in (0, s.steps) else math.ceil(s.eval_problems / 4)
    results, examples = evaluate(model, s, s.tiers, count)
    add_record(records, "eval", step=step, problems=count, tiers=results, examples=examples)
    tqdm.write(f"\nat step {step}, on {count} held-out problems of each number of digits:")
    names = (f"avg@{SAMPLES}", f"pass@{SAMPLES}", "length")
    tqdm.write("digits" + "".join(f"{name:>14}" for name in names))
    for n, tier in results.items():
        tqdm.write(f"{n:>6}" + "".join(f"{tier[name]:14.3f}" for name in names))
    for problem, response in examples:
        verdict = "correct" if is_correct(problem, response) else "incorrect"
        tqdm.write(f"{problem}= {response}   ({verdict})")


@torch.no_grad()
def single_operations(model, s: Settings, problems=KNOWN_FROM) -> float:
    """Return the share of single operations whose result is the model's likeliest token.

    It is measured at the first token of each line of careful solutions of held-out problems. A
    model that would rather skip a line gets no credit for it there. But any of the later lines may
    follow a skip, so the next line usually stays the likeliest.
    """
    drawn = evaluation_problems(rng_for(0, "single operations"), s.n, problems)
    tokens, _ = padded([encode("=".join(careful(p)) + "<eos>") for p in drawn], model.device)
    starts = tokens[:, :-1] == encode("=")[0]
    return float((model(tokens[:, :-1]).argmax(-1) == tokens[:, 1:])[starts].float().mean())


def own_solutions(model, s: Settings, count=64) -> Probe:
    """Return held-out problems with a model's own solutions."""
    problems = evaluation_problems(rng_for(s.seed, "text"), s.n, count)
    generator = torch_rng_for(model.device, s.seed, "text responses")
    tokens, prompt_len, end = sample_responses(model, s, problems, 1, generator)
    return Probe(tokens, response_mask(prompt_len, end, tokens.shape[1]))


@torch.no_grad()
def means_inside(model, tokens, mask) -> dict:
    """Return the means by layer of everything in minibupo.look_inside, and the perplexity."""
    found = minibupo.look_inside(model, tokens, mask)
    means = {name: values.mean(1).tolist() for name, values in found.items()}
    logp = minibupo.token_logprobs(model, tokens, mask)[mask]
    return means | {"perplexity": float(logp.mean().neg().exp())}


# ---- housekeeping: options and files; skip it on a first reading -------------------------------


def check_settings(s: Settings):
    """Raise ValueError for invalid settings."""
    types = get_type_hints(Settings)
    for f in fields(s):
        value = getattr(s, f.name)
        allowed_types = int | float if types[f.name] is float else types[f.name]
        if not isinstance(value, allowed_types) or isinstance(value, bool):
            raise ValueError(f"{f.name} must be of type {allowed_types}, not {value!r}")
        choices = f.metadata["choices"]
        if choices and value not in choices:
            raise ValueError(f"{f.name} must be one of {', '.join(choices)}, not {value}")
        low = f.metadata["low"]
        high = f.metadata["high"]
        if low is None or value is None:
            continue
        if not low <= value <= high:
            raise ValueError(f"{f.name} must be {allowed_range(f)}, not {value}")
        if value == math.inf:
            raise ValueError(f"{f.name} must be finite, not {value}")
    if s.s_inter > s.steps:
        raise ValueError(f"s_inter = {s.s_inter} steps of phase 1 are more than steps = {s.steps}")
    if s.algo == "grpo" and s.s_inter > 0:
        raise ValueError(f"s_inter = {s.s_inter} is for phase 1, which algo grpo does not have")
    if s.s_inter == 0 and (s.layer is not None or s.site != "resid_post"):
        raise ValueError("layer and site are for phase 1, but algo grpo or s_inter 0 means none")
    if s.layer is None and s.site == "attn_out":
        raise ValueError("site attn_out needs a layer: the paper's rule looks only at FFNs")
    if s.layer is not None and s.layer >= s.n_layer:
        raise ValueError(f"layer must be in 1..{s.n_layer - 1}, below the top, not {s.layer}")
    if s.d_model % 4:
        raise ValueError(f"d_model must be a multiple of 4, so that 2 heads fit, not {s.d_model}")
    single_results()  # raises for OPERATORS that the task cannot use
    needed = longest_prompt(s.n + 1) + s.response_limit
    if needed > CONTEXT:
        what = f"a prompt and its response of size n + 1 = {s.n + 1}"
        raise ValueError(f"{what} take {needed} tokens, more than CONTEXT = {CONTEXT}")
    for n in s.tiers:
        check_supply(n, max(s.eval_problems, KNOWN_FROM) if n == s.n else s.eval_problems)


def allowed_range(f) -> str:
    """Return the range of a field of Settings in words."""
    low = f.metadata["low"]
    high = f.metadata["high"]
    return f"at least {low}" if high == math.inf else f"in {low}..{high}"


def parse_options(argv) -> tuple[Settings, bool]:
    """Return the settings of a command line, and whether to resume.

    What a file has settled comes first, then the options, then the preset, then the defaults."""
    summary = (__doc__ or "").split("\n\n")[0]  # python -OO drops docstrings
    parser = argparse.ArgumentParser("train_toy.py", description=summary, allow_abbrev=False)
    types = get_type_hints(Settings)
    for f in fields(Settings):
        more = [] if f.metadata["low"] is None else [allowed_range(f)]
        more += [] if f.default is None else [f"default: {f.default}"]
        text = f.metadata["help"] + (f" ({'; '.join(more)})" if more else "")
        options = dict(choices=f.metadata["choices"], help=text)
        convert = {int | None: layer_number, str | None: file_name}.get(
            types[f.name], types[f.name]
        )
        parser.add_argument(f"--{f.name}", type=convert, default=argparse.SUPPRESS, **options)
    parser.add_argument("--resume", action="store_true", help="continue the run in --out_dir")
    given = vars(parser.parse_args(argv))
    resume = given.pop("resume")

    preset = SMOKE if given.get("preset") == "smoke" else {}
    without_phase_1 = {"s_inter": 0} if given.get("algo") == "grpo" else {}
    settled = settled_by_files(given, resume)
    return Settings(**(preset | without_phase_1 | given | settled)), resume


def settled_by_files(given: dict, resume: bool) -> dict:
    """Return the settings that are in a file: all of a run to resume, or the sizes of a base model.

    Raise ValueError for an option that contradicts them."""
    settled = {}
    file = given.get("base")
    if resume:
        if "out_dir" not in given:
            raise ValueError("--resume needs --out_dir, the directory of the run to continue")
        file = Path(given["out_dir"], "config.json")
        settled = asdict(read_settings(file.parent))
        settled |= {name: given[name] for name in FREE if name in given}
    elif "base" in given:
        cfg = load_model(given["base"]).cfg
        settled = {"n_layer": cfg.n_layer, "d_model": cfg.d_model}
    for name, value in settled.items():
        if given.get(name, value) != value:
            raise ValueError(f"--{name} {given[name]} does not fit {file}, which has {value}")
    return settled


def layer_number(text: str) -> int | None:
    """Return a layer of the command line; "auto", the paper's rule, is None."""
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number or auto, not {text!r}") from None


def file_name(text: str) -> str:
    """Return a path of the command line, absolute if a printed command would make it an option."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return os.path.abspath(text) if text.startswith("-") else text


def command(s: Settings, **changes) -> str:
    """Return the command line of a run with these settings and changes, ready to be pasted."""
    settings = {f.name: f.default for f in fields(Settings)}
    defaults = settings | SMOKE if s.preset == "smoke" else settings
    words = []
    for name, value in (asdict(s) | changes).items():
        if value != defaults[name]:
            words += [f"--{name}", str(value)]
    return command_line("train_toy.py", *words)


def command_line(script: str, *words: str) -> str:
    """Return a command that runs a script of this folder, to be pasted in the current directory."""
    folder = Path(__file__).absolute().parent
    path = script if folder == Path.cwd() else str(folder / script)
    join = subprocess.list2cmdline if sys.platform == "win32" else shlex.join
    return join(["python", path, *words])


def pick_device(name: str) -> torch.device:
    """Return a device; auto is cuda, else cpu. Raise ValueError if it is not available."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device must be auto, cpu, cuda or mps, not {name}")
    if not getattr(torch, name).is_available():
        raise ValueError(f"device {name} is not available here; --device cpu is")
    return torch.device(name)


# ---- the files of a run: config.json, metrics.jsonl, base.pt, phase1.pt, ckpt.pt ----


@contextmanager
def reading(path):
    """Turn any error while reading a file into a one-line ValueError."""
    try:
        yield
    except Exception as error:  # torch.load and load_state_dict have one for each kind of damage
        message = f"{path} is missing, damaged or does not fit: {in_words(error)}"
        raise ValueError(message[:300]) from error


def in_words(error: Exception) -> str:
    """Return what an error says, without the file name that the operating system adds."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error) if isinstance(error, ValueError) else repr(error)


def load_checkpoint(path, device="cpu") -> tuple[GPT, dict]:
    """Return the model in a checkpoint, and everything in the file. Raise ValueError for damage."""
    with reading(path):
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["format"] != 2:
            raise ValueError(f"it has format {content['format']}, and this version reads format 2")
        check_same_task(content)
        model = GPT(GPTConfig(**content["model_config"]))
        model.load_state_dict(content["model"])
        if model.vocab_size != VOCAB_SIZE:
            raise ValueError(f"it has {model.vocab_size} tokens, and OPERATORS give {VOCAB_SIZE}")
    return model.to(device), content


def check_same_task(content: dict):
    """Raise ValueError unless a checkpoint is of a model that was trained with these OPERATORS."""
    # the first files of format 2 do not say what they were trained with
    characters = content.get("characters", "0123456789+-*=")
    if characters != CHARACTERS:
        raise ValueError(f"its characters are {characters}, those of OPERATORS are {CHARACTERS}")
    first = {"+": operator.add, "-": operator.sub, "*": operator.mul}
    digits = range(10)
    table = [f"{a}{o}{b}={first[o](a, b) % 10}" for o in first for a in digits for b in digits]
    for then, now in zip(content.get("single_results", table), single_results(), strict=True):
        if then != now:
            raise ValueError(f"it was trained with {then}, but now OPERATORS give {now}")


def load_model(path, device="cpu") -> GPT:
    """Return only the model in a checkpoint."""
    return load_checkpoint(path, device)[0]


def save_checkpoint(path: Path, model: GPT, **more):
    """Write a model and `more`. Raise FloatingPointError, writing nothing, for NaN or infinity."""
    if not torch.stack([weight.isfinite().all() for weight in model.parameters()]).all():
        raise FloatingPointError("the weights are no longer finite")
    weights = model.state_dict()
    content = {
        "format": 2,
        "characters": CHARACTERS,
        "single_results": single_results(),
        "model_config": asdict(model.cfg),
        # torch.compile wraps modules and adds this to their names
        "model": {name.replace("_orig_mod.", ""): weight for name, weight in weights.items()},
    }
    buffer = io.BytesIO()  # with a path torch.save would turn a full disk into a RuntimeError
    torch.save(content | more, buffer)
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))


def save_job(job: Job):
    """Write ckpt.pt, from which (with base.pt and config.json) a run resumes, and metrics.jsonl."""
    moments = job.optimizer.state_dict()["state"]
    more = dict(step=job.step, target=list(job.target), optimizer=moments, records=job.records)
    save_checkpoint(job.out / "ckpt.pt", job.model, settings=lasting_settings(job.settings), **more)
    lines = [json.dumps(record) + "\n" for record in job.records]
    write_text(job.out / "metrics.jsonl", "".join(lines))


def resumed_job(s: Settings, out: Path, device) -> Job:
    """Return the job in a run's checkpoint. Raise ValueError if it is damaged or does not fit."""
    base, content = load_checkpoint(out / "base.pt", device)
    with reading(out / "base.pt"):
        check_same_run(content, s)
    path = out / "ckpt.pt"
    model, content = load_checkpoint(path, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.lr, fused=True)
    with reading(path):
        check_same_run(content, s)
        if not model.cfg == base.cfg == s.model_config():
            raise ValueError("base.pt and config.json are of a model with other sizes")
        if content["step"] not in range(s.steps + 1):
            raise ValueError(f"step {content['step']} is not in 0..{s.steps}, the steps of the run")
        optimizer.load_state_dict(optimizer.state_dict() | {"state": content["optimizer"]})
        for weight, moments in optimizer.state.items():
            shapes = {name: value.shape for name, value in moments.items()}
            # AdamW's fused step would crash the interpreter on other shapes
            if shapes != {"step": (), "exp_avg": weight.shape, "exp_avg_sq": weight.shape}:
                raise ValueError("moments of the optimizer have another shape than the weights")
        target = Policy(*content["target"])
        probe = own_solutions(base, s)
        minibupo.policy_logits(model, probe.tokens, target)  # raises for an invalid target
        records = [dict(record) for record in content["records"]]
    return Job(s, out, model, optimizer, target, probe, records, content["step"])


def lasting_settings(s: Settings) -> dict:
    """Return the settings that a run keeps when it is resumed. They tell its files from others."""
    return {name: value for name, value in asdict(s).items() if name not in FREE}


def check_same_run(content: dict, s: Settings):
    """Raise ValueError if a checkpoint says that it is of a run with other settings."""
    expected = lasting_settings(s)
    stored = content.get("settings", expected)  # older files do not have them
    for name, value in expected.items():
        if stored.get(name) != value:
            raise ValueError(f"its run has {name} {stored.get(name)}, but config.json has {value}")


def write_text(path: Path, text: str):
    """Write a text file, whole or not at all."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_atomically(path: Path, write):
    """Call write(temporary path), then rename: at no moment is `path` half-written."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # a second process has its own
    try:
        write(temporary)
        temporary.replace(path)
    except OSError as error:
        raise OSError(f"{path} could not be written: {in_words(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)  # if all went well, it has been renamed


def new_directory(s: Settings) -> Path:
    """Make the run's directory: out_dir, if it is empty, or the first free out/ALGO-seedSEED-N."""
    if s.out_dir:
        out = Path(s.out_dir)
        if out.is_file():
            raise ValueError(f"{out} is a file: choose another --out_dir")
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise ValueError(f"{out} is not empty: choose another --out_dir, or --resume its run")
        try:
            (out / "config.json").touch(exist_ok=False)  # of two simultaneous runs one succeeds
        except FileExistsError:
            raise ValueError(f"another run has just started in {out}") from None
        return out
    Path("out").mkdir(exist_ok=True)
    for number in itertools.count(1):
        out = Path("out", f"{s.algo}-seed{s.seed}" + (f"-{number}" if number > 1 else ""))
        try:
            out.mkdir()  # of runs that start at the same time, only one succeeds
            return out
        except FileExistsError:
            continue


def read_settings(run: Path) -> Settings:
    """Return the settings in a run's config.json. Raise ValueError if there are none."""
    path = run / "config.json"
    with reading(path):
        stored = json.loads(path.read_text(encoding="utf-8"))
        missing = [f.name for f in fields(Settings) if f.name not in stored]
        if missing:
            raise ValueError(f"it lacks {', '.join(missing)}")
        return Settings(**stored)


def read_metrics(run: Path, kind: str) -> list[dict]:
    """Return a run's records of one kind. Use them `with reading(...)`: a key may be missing."""
    path = run / "metrics.jsonl"
    with reading(path):
        lines = path.read_text(encoding="utf-8").splitlines()
        return [record for record in map(json.loads, lines) if record["kind"] == kind]


def add_record(records: list, kind: str, **values):
    """Append {"kind": kind, **values}. Raise FloatingPointError for NaN, which is not JSON."""
    try:
        json.dumps(values, allow_nan=False)
    except ValueError:
        raise FloatingPointError(f"a measurement of step {values['step']} is not finite") from None
    records.append({"kind": kind, **values})


def main(argv=None) -> int:
    """Run the command line. Return 0, 1 for NaN, 2 for invalid input, 130 for Ctrl-C."""
    open_missing_streams()
    s = None
    try:
        s, resume = parse_options(argv)
        run(s, resume)
        return 0
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"train_toy.py: {error}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    except KeyboardInterrupt:
        message = "\nstopped"
        if s and s.out_dir and (Path(s.out_dir) / "config.json").exists():
            resume = command_line("train_toy.py", "--resume", "--out_dir", s.out_dir)
            message += f"; to continue: {resume}"
        print(message, file=sys.stderr)
        return 130


def open_missing_streams():
    """Make stdout and stderr usable: to nowhere if one is missing, escapes for what it lacks."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or getattr(stream, "closed", False):
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # its encoding may lack a character


if __name__ == "__main__":
    sys.exit(main())
