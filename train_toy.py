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

All that is random in a step depends on (seed, purpose, step) alone. So a resumed run goes on as if
it had never stopped (on a CPU to the last bit), and runs of one seed meet the same problems.
"""

import argparse
import hashlib
import json
import math
import operator
import random
import sys
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import tiktoken
import torch
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
    """The verifier: the response ended, and what follows its last `=` is the answer."""
    return response.split("=")[-1] == careful(expression)[-1] + "<eos>"


def has_right_steps(expression: str, response: str) -> bool:
    """Whether each line of a response follows from the one before. This is not rewarded."""
    lines = [expression, *response.removesuffix("<eos>").split("=")]
    ended = response.endswith("<eos>") and len(lines[-1]) == 1
    # `all` stops at the first wrong line, so `careful` gets nothing but right ones
    return ended and all(after in careful(before)[1:] for before, after in zip(lines, lines[1:]))


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
    """The random numbers of one purpose at one step. No two (seed, purpose, step) share theirs."""
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
    """Token ids of a text. Raises ValueError for characters outside the vocabulary."""
    for c in text.replace("<eos>", "").replace("<pad>", ""):  # tiktoken would panic
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


def option(default, help, low=None, high=math.inf, choices=None):
    """A field of Settings, which is a command-line option as well, with what it may be."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))


@dataclass
class Settings:
    """Every option of a run. Raises ValueError for values that cannot be."""

    algo: str = option("bupo", "what to train with", choices=("bupo", "grpo"))
    layer: int | None = option(None, "layer of phase 1, 1..L-1, or auto: the paper's rule", 1)
    site: str = option("resid_post", "whose policy: layer, attention, FFN", choices=minibupo.SITES)
    s_inter: int = option(5, "steps of phase 1", 0)
    steps: int = option(60, "steps of RL in all", 0)
    seed: int = option(0, "seed of everything random", 0, 2**32 - 1)
    base: str | None = option(None, "start RL from this base model, base.pt of another run")
    out_dir: str | None = option(None, "directory of the run (default: a new one under out/)")
    preset: str = option("default", "smoke: all of it in seconds", choices=("default", "smoke"))
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
        return list(range(max(3, self.n - 2), self.n + 2))

    def model_config(self) -> GPTConfig:
        """The model. Positions are rotary, so a longer context costs nothing but a table."""
        return GPTConfig(VOCAB_SIZE, 256, self.n_layer, self.d_model, n_head=2)


SMOKE = dict(n=3, n_layer=4, d_model=32, questions=32, steps=20, s_inter=3, eval_problems=64)
KNOWN = 0.95  # the share of single operations that a base is to get right
SAMPLES = 8  # responses to each problem of an evaluation


# ---- the base model ----------------------------------------------------------------------------


def pretrain(s: Settings, model, records: list, max_steps=1500, lr=4e-3):
    """Teach the base model until it knows single operations. Appends a record every 50 steps.

    Solutions are careful until most operations are known, then get sloppy over 200 steps. In sloppy
    text the next line may be any later one. So several tokens are right at once, and operations are
    learned slowly or never. Seeds differ in when they know enough, so steps are not fixed."""
    options = dict(weight_decay=0.1, betas=(0.9, 0.98), fused=True)
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    known, learned = 0.0, None  # learned: the step at which most operations were known
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
    if known < KNOWN:
        print(f"this base gets only {known:.0%} of single operations right: try another --seed")


def pretraining_batch(s: Settings, step: int, device, skip: float, rows=48):
    """Rows of text: tokens (B, T), and which of them belong to a response (B, T).

    A row holds a solution of each length 2..n, in random order. A model that met every problem at
    the start of a row would learn where its operands stand, and be lost on the second line."""
    rng, tokens, marks = stream(s.seed, "pretraining", step), [], []
    for _ in range(rows):
        row, mark = [], []
        for n in rng.sample(range(2, s.n + 1), s.n - 1):
            problem, *lines = sloppy(training_problem(rng, n), rng, skip)
            prompt, response = encode(problem + "="), encode("=".join(lines) + "<eos>")
            row += prompt + response
            mark += [False] * len(prompt) + [True] * len(response)
        # longest prompt and response of an evaluation: no later position is ever used
        T = 2 * (s.n + 1) + s.response_limit
        tokens.append(row[:T])
        marks.append(mark[:T])
    return padded(tokens, device)[0], padded(marks, device, value=False)[0]


def pretraining_loss(model, tokens, response, internal_loss: float):
    """Cross-entropy of pi_theta on responses + internal_loss times the internal policies' mean."""
    at, wanted = response[:, 1:], tokens[:, 1:][response[:, 1:]]
    if internal_loss == 0:
        return torch.nn.functional.cross_entropy(model(tokens[:, :-1])[at], wanted)
    layers = [trace.resid_post[at] for trace in model.trace(tokens[:, :-1])]  # H^1, .., H^L
    internal = [torch.nn.functional.cross_entropy(model.unembed(h), wanted) for h in layers]
    loss = torch.nn.functional.cross_entropy(model.unembed(model.final_norm(layers[-1])), wanted)
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
    seen = {}  # of this step's rollouts: sample fills it, the loop logs it

    def sample(step):
        # smaller steps late, when a handful of mixed groups decides on the gradient
        optimizer.param_groups[0]["lr"] = s.lr * min(1.0, 30 / step)
        batch = rollouts(s, model, step)
        seen.update(describe(model, batch, job.target))  # before the step changes the model
        return batch

    save_job(job)  # a resumed one, too, for it may have been killed between its two files
    # 64 rows stay in a CPU's cache; a GPU, which waits for launches, wants many
    options = dict(start=job.step + 1, chunk=64 if model.device.type == "cpu" else 256)
    steps = minibupo.bupo(model, optimizer, sample, job.target, s.s_inter, s.steps, **options)
    for step, policy, _, log in tqdm(steps, s.algo, s.steps, initial=job.step, disable=None):
        job.step, phase = step, "policy" if policy == FULL else "internal"
        add_record(records, "step", step=step, **log, phase=phase, **seen)
        if step % 5 == 0:
            shown = (f"{name} {seen[name]:.3f}" for name in ("reward", "policy_entropy", "length"))
            tqdm.write(f"step {step:4d}  {phase:8}  " + "  ".join(shown))
        if step % 5 == 0 or step in (s.s_inter, s.steps):
            add_record(records, "internal", step=step, **means_inside(model, *job.text))
        if step % 30 == 0 or step == s.steps:
            add_evaluation(records, s, model, step)
        if step == s.s_inter:
            save_checkpoint(job.out / "phase1.pt", model)
        save_job(job)


def rollouts(s: Settings, model, step: int, problems: list[str] | None = None) -> Rollouts:
    """A step's questions (new ones, or `problems`), responses of pi_theta to each, and rewards."""
    problems = problems or draw_questions(stream(s.seed, "questions", step), s.questions, s.n)
    generator = torch_stream(model.device, s.seed, "responses", step)
    sampled = respond(model, s, problems, s.group, generator)
    right = [is_right(problems[i // s.group], text) for i, text in enumerate(responses(sampled))]
    return Rollouts(*sampled, torch.tensor(right).float().view(s.questions, s.group))


def draw_questions(rng, count: int, n: int) -> list[str]:
    """Training problems of 3, 4, .., n digits in shares of 1 : 2 : .. : n - 2, in random order."""
    sizes = [k for k in range(3, n + 1) for _ in range(k - 2)]  # longer ones take more learning
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
    log(pi_target / pi_theta), how far phase 1 is off-policy, are of each group's first response."""
    right, G = batch.rewards.mean(1), batch.rewards.shape[1]
    log = {
        "reward": float(right.mean()),
        "groups_right": float((right == 1).float().mean()),
        "groups_wrong": float((right == 0).float().mean()),
        "length": float((batch.end - batch.prompt_len).float().mean()),
        "cut_off": float((batch.tokens.gather(1, batch.end[:, None] - 1) != EOS).float().mean()),
    }
    tokens = batch.tokens[::G]
    mask = response_mask(batch.prompt_len[::G], batch.end[::G], tokens.shape[1])
    positions, logp = mask.flatten().nonzero()[:, 0], {}
    for name, policy in (("policy", FULL), ("layer", target)):
        logits = minibupo.policy_logits(model, tokens[:, :-1], policy, positions)
        log[f"{name}_entropy"] = float(minibupo.entropy(logits).mean())
        logp[name] = logits.log_softmax(-1).gather(-1, tokens[:, 1:].flatten()[positions, None])
    return log | {"layer_log_ratio": float((logp["layer"] - logp["policy"]).mean())}


# ---- evaluation --------------------------------------------------------------------------------


def evaluation_problems(rng, n: int, count: int) -> list[str]:
    """`count` different held-out problems of n digits. Raises ValueError for more than it has."""
    if n < 3 or count > 1000:
        raise ValueError(f"problems must be at most 1000, of 3 digits or more, not {count} of {n}")
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
    """Measures on `count` held-out problems of each length in `tiers`: by length as a string, what
    docs/reference.md explains; and three pairs [problem, response] of length s.n."""
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
            examples = [list(pair) for pair in pairs[: 3 * samples : samples]]
    return results, examples


@torch.no_grad()
def single_operations(model, s: Settings, problems=128) -> float:
    """The share of lines of careful, held-out solutions whose first token, the result of a single
    operation, is the likeliest. A base may jump as well, but jumps spread over many tokens."""
    drawn = evaluation_problems(stream(0, "single operations"), s.n, problems)
    tokens, _ = padded([encode("=".join(careful(p)) + "<eos>") for p in drawn], model.device)
    starts = tokens[:, :-1] == encode("=")[0]
    return float((model(tokens[:, :-1]).argmax(-1) == tokens[:, 1:])[starts].float().mean())


def own_solutions(model, s: Settings, count=64):
    """Held-out problems with a model's own solutions: tokens (P, T), response mask (P, T-1)."""
    problems = evaluation_problems(stream(s.seed, "text"), s.n, count)
    sampled = respond(model, s, problems, 1, torch_stream(model.device, s.seed, "text responses"))
    return sampled.tokens, response_mask(sampled.prompt_len, sampled.end, sampled.tokens.shape[1])


@torch.no_grad()
def means_inside(model, tokens, mask) -> dict:
    """Means over positions, by layer, of what minibupo.look_inside measures; the perplexity."""
    found = minibupo.look_inside(model, tokens, mask)
    means = {name: values.mean(1).tolist() for name, values in found.items()}
    logp = minibupo.token_logprobs(model, tokens, mask)[mask]
    return means | {"perplexity": float(logp.mean().neg().exp())}


def add_evaluation(records: list, s: Settings, model, step: int):
    """Evaluate, print, add the record; between the first and the last step on fewer problems."""
    count = s.eval_problems if step in (0, s.steps) else math.ceil(s.eval_problems / 4)
    results, examples = evaluate(model, s, s.tiers, count)
    add_record(records, "eval", step=step, problems=count, tiers=results, examples=examples)
    names = (f"avg@{SAMPLES}", f"avg@{SAMPLES}_se", "right_steps", f"pass@{SAMPLES}", "length")
    tqdm.write(f"\nat step {step}, on {count} held-out problems of each length:")
    tqdm.write("digits" + "".join(f"{name:>12}" for name in names))
    for n, tier in results.items():
        # a single problem has no standard error
        cells = ("-" if x is None else f"{x:.3f}" for x in map(tier.get, names))
        tqdm.write(f"{n:>6}" + "".join(f"{cell:>12}" for cell in cells))
    for problem, response in examples:
        verdict = "right" if is_right(problem, response) else "wrong"
        tqdm.write(f"{problem}= {response}   ({verdict})")


# ---- housekeeping: skip on first reading -------------------------------------------------------


def run(s: Settings, resume: bool):
    """The main job, from nothing (or a base, or a checkpoint) to the final table."""
    device = pick_device(s.device)
    s.device = device.type  # not "auto", or a resume elsewhere could change it unnoticed
    torch.set_num_threads(s.threads)
    s.out_dir = s.out_dir if resume else str(new_directory(s))
    out = Path(s.out_dir)
    # a run that was stopped before its first checkpoint begins again
    begun = resume and any((out / name).exists() for name in ("ckpt.pt", "metrics.jsonl"))
    job = resumed_job(s, out, device) if begun else None
    # Bad options and files have been refused. From here on files are written.
    write_text(out / "config.json", json.dumps(asdict(s), indent=2))
    print(f"run {out} on {device}, {s.threads} threads", flush=True)
    train(s, job or new_job(s, out, device))
    print(f"all of it is in {out}; next, see the internal policies: python analyze.py all {out}")


def new_job(s: Settings, out: Path, device) -> Job:
    """A base model, looked at and evaluated, ready for RL. Raises ValueError for a hopeless one."""
    records = []
    if s.base:
        model = load_model(s.base, device)
    else:
        torch.manual_seed(s.seed)
        model = GPT(s.model_config()).to(device)
        pretrain(s, model, records)
    save_checkpoint(out / "base.pt", model)
    text = own_solutions(model, s)
    inside = means_inside(model, *text)
    add_record(records, "internal", step=0, **inside)
    target = pick_target(s, inside["d_mlp"], out / "base.pt")
    print(f"\ninternal entropies of the base, in nats (uniform: {math.log(VOCAB_SIZE):.2f})")
    print("layer   H(H^l)   normed  dH_ATTN   dH_FFN dH_Layer")
    names = ("layer", "layer_normed", "d_attn", "d_mlp", "d_layer")
    columns = [inside[name][-s.n_layer :] for name in names]  # without the H^0 that two have
    for l, row in enumerate(zip(*columns), 1):
        mark = "  <- target" if l == target.layer and s.s_inter else ""
        print(f"{l:5}" + "".join(f"{value:9.2f}" for value in row) + mark)
    add_evaluation(records, s, model, step=0)
    mixed = records[-1]["tiers"][str(s.n)]["mixed"]
    print(f"of the problems of {s.n} digits {mixed:.1%} have right and wrong responses\n")
    if mixed < 0.05:
        raise ValueError("RL learns from mixed outcomes alone: try another --seed, --n or --skip")
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.lr, fused=True)
    return Job(out, model, optimizer, target, text, records, step=0)


def resumed_job(s: Settings, out: Path, device) -> Job:
    """The job in a run's checkpoint. Raises ValueError for one that is damaged or does not fit."""
    base, path = load_model(out / "base.pt", device), out / "ckpt.pt"
    model, content = load_checkpoint(path, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.lr, fused=True)
    with reading(path):
        if not model.cfg == base.cfg == s.model_config():
            raise ValueError("base.pt and config.json are of a model with other sizes")
        if content["step"] not in range(s.steps + 1):
            raise ValueError(f"step {content['step']} is not in 0..{s.steps}, the steps of the run")
        optimizer.load_state_dict(optimizer.state_dict() | {"state": content["optimizer"]})
        for weight, moments in optimizer.state.items():
            shapes = {name: value.shape for name, value in moments.items()}
            # on others the fused step of AdamW would crash the interpreter
            if shapes != {"step": (), "exp_avg": weight.shape, "exp_avg_sq": weight.shape}:
                raise ValueError("moments of the optimizer have another shape than the weights")
        target, text = Policy(*content["target"]), own_solutions(base, s)
        minibupo.policy_logits(model, text[0], target)  # raises for a target that is not there
        records = [dict(record) for record in content["records"]]
    return Job(out, model, optimizer, target, text, records, content["step"])


def pick_target(s: Settings, d_mlp: list, base: Path) -> Policy:
    """The policy of phase 1. GRPO has none: for it, the policy that log and figures follow.
    Raises ValueError, with a remedy, where phase 1 needs the rule and it picks nothing."""
    if s.layer is not None:
        return Policy(s.layer, s.site)
    try:
        return Policy(minibupo.target_layer(d_mlp), s.site)
    except ValueError as error:
        if s.s_inter == 0:
            return Policy(s.n_layer - 1)
        remedy = f"python train_toy.py --base {base} --layer N"
        raise ValueError(f"{error}; choose one: {remedy}") from None


def check_settings(s: Settings):
    """Raise ValueError for settings that cannot be."""
    for f in fields(s):
        value, kind = getattr(s, f.name), (int | float) if f.type is float else f.type
        low, high, choices = (f.metadata[name] for name in ("low", "high", "choices"))
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{f.name} must be of type {f.type}, not {value!r}")
        if choices and value not in choices:
            raise ValueError(f"{f.name} must be one of {', '.join(choices)}, not {value}")
        if low is not None and value is not None and not low <= value <= high:
            raise ValueError(f"{f.name} must be in {low}..{high}, not {value}")
    if s.s_inter > s.steps:
        raise ValueError(f"s_inter = {s.s_inter} is more than steps = {s.steps}")
    if s.algo == "grpo" and s.s_inter > 0:
        raise ValueError(f"s_inter = {s.s_inter} is for phase 1, which algo grpo does not have")
    if s.s_inter == 0 and (s.layer is not None or s.site != "resid_post"):
        raise ValueError("layer and site are for phase 1, which algo grpo and s_inter 0 lack")
    if s.layer is None and s.site == "attn_out":
        raise ValueError("site attn_out needs a layer: the paper's rule looks at FFNs alone")
    if s.layer is not None and s.layer >= s.n_layer:
        raise ValueError(f"layer must be in 1..{s.n_layer - 1}, below the top, not {s.layer}")
    s.model_config()  # raises for sizes that do not fit together


def parse_options(argv) -> tuple[Settings, bool]:
    """The settings (option over preset over default; files fix some), and whether to resume."""
    parser = argparse.ArgumentParser("train_toy.py", allow_abbrev=False)
    for f in fields(Settings):
        default = "" if f.default is None else f" (default: {f.default})"
        options = dict(choices=f.metadata["choices"], help=f.metadata["help"] + default)
        kind = {int | None: layer_number, str | None: str}.get(f.type, f.type)
        parser.add_argument(f"--{f.name}", type=kind, default=argparse.SUPPRESS, **options)
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out_dir")
    given = vars(parser.parse_args(argv))
    resume = given.pop("resume")
    preset = SMOKE if given.get("preset") == "smoke" else {}
    phases = {"s_inter": 0} if given.get("algo") == "grpo" else {}
    stored = {}  # what a file has settled already: the sizes of a base, or all of a run
    if resume:
        if "out_dir" not in given:
            raise ValueError("--resume needs --out_dir, the directory of the run to go on with")
        stored = asdict(read_settings(Path(given["out_dir"])))
        stored |= {name: given[name] for name in ("out_dir", "steps") if name in given}
    elif "base" in given:
        cfg = load_model(given["base"]).cfg
        stored = {"n_layer": cfg.n_layer, "d_model": cfg.d_model}
    for name, value in stored.items():
        if given.get(name, value) != value:
            raise ValueError(f"--{name} {given[name]} does not match what is there, {value}")
    return Settings(**(preset | phases | given | stored)), resume


def layer_number(text: str) -> int | None:
    """A layer of the command line; "auto" is the paper's rule."""
    return None if text == "auto" else int(text)


def pick_device(name: str) -> torch.device:
    """The device of an option; auto is cuda, else cpu. Raises ValueError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda", "mps") or not getattr(torch, name).is_available():
        raise ValueError(f"device {name} is not available here")
    return torch.device(name)


# ---- files of a run: config.json, metrics.jsonl, base.pt, phase1.pt, ckpt.pt ----


@contextmanager
def reading(path):
    """Around all reading of files: whatever is wrong with them becomes one sentence."""
    try:
        yield
    except Exception as error:  # torch.load and load_state_dict have one for each kind of damage
        raise ValueError(f"{path} is missing, damaged or does not fit: {error!r}"[:300]) from error


def load_checkpoint(path, device="cpu") -> tuple[GPT, dict]:
    """The model in a checkpoint, and all that the file holds. Raises ValueError for damage."""
    with reading(path):
        content = torch.load(path, map_location="cpu", weights_only=True)
        model = GPT(GPTConfig(**content["model_config"]))
        model.load_state_dict(content["model"])
        if content["format"] != 2 or model.vocab_size != VOCAB_SIZE:
            raise ValueError("it is of another version of this file, or has other OPERATORS")
    return model.to(device), content


def load_model(path, device="cpu") -> GPT:
    """The model in a checkpoint alone."""
    return load_checkpoint(path, device)[0]


def save_checkpoint(path: Path, model: GPT, **more):
    """Write a model and `more`. Raises FloatingPointError, writing nothing, for NaN or infinity."""
    if not torch.stack([weight.isfinite().all() for weight in model.parameters()]).all():
        raise FloatingPointError("the weights are no longer finite")
    content = {"format": 2, "model_config": asdict(model.cfg), "model": model.state_dict()}
    write_atomically(path, lambda temporary: torch.save(content | more, temporary))


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
    temporary.replace(path)


def new_directory(s: Settings) -> Path:
    """Make the run's directory: out_dir, if it is empty, or the first free out/ALGO-seedSEED-N."""
    name = f"out/{s.algo}-seed{s.seed}"
    names = [name, *(f"{name}-{i}" for i in range(2, 1000))]
    out = Path(s.out_dir or next(name for name in names if not Path(name).exists()))
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise ValueError(f"{out} is not empty: choose another --out_dir, or --resume the run in it")
    return out


def read_settings(run: Path) -> Settings:
    """The settings in a run's config.json. Raises ValueError if there are none."""
    path = run / "config.json"
    with reading(path):
        return Settings(**json.loads(path.read_text(encoding="utf-8")))


def read_metrics(run: Path, kind: str) -> list[dict]:
    """The records of one kind. Use them in a `with reading(...)`, too: one may lack a key."""
    path = run / "metrics.jsonl"
    with reading(path):
        lines = path.read_text(encoding="utf-8").splitlines()
        return [r for r in map(json.loads, lines) if r["kind"] == kind]


def add_record(records: list, kind: str, **values):
    """Append {"kind": kind, **values}. Raises FloatingPointError for NaN, which is not JSON."""
    text = json.dumps(values)
    if "NaN" in text or "Infinity" in text:
        raise FloatingPointError(f"a measurement of step {values['step']} is not finite")
    records.append({"kind": kind, **values})


def main(argv=None) -> int:
    """Run the command line. Returns 0, 1 for NaN, 2 for bad input, 130 for Ctrl-C."""
    s = None
    try:
        s, resume = parse_options(argv)
        run(s, resume)
        return 0
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"train_toy.py: {error}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    except KeyboardInterrupt:
        go_on = f"; python train_toy.py --resume --out_dir {s.out_dir}" if s and s.out_dir else ""
        print(f"\nstopped{go_on}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
