"""Phase 1 on real language models: does its gradient agree with GRPO's, and what does it cost?

    python experiments/lm_study.py cosines smollm2      # or qwen: every layer, four batches
    python experiments/lm_study.py pairs smollm2        # or qwen: training by minibupo_hf/train.py, in pairs

What has a line of results is not run again. On two cores SmolLM2's cosines take a quarter of an
hour and its pairs two and a half; Qwen's would take an hour and half a day. Qwen's lines, and those
of "smollm2, H200", were made on a GPU, where a run takes a quarter of a minute. Needs the extras
`hf` and `bench`; the models are those that experiments/language_models.py fetches.
"""

import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from experiments.language_models import fetch  # noqa: E402
from experiments.seeds import less_control, machine, run_missing, save_report  # noqa: E402
from experiments.study import interval  # noqa: E402
from minibupo_hf.adapter import encode_text, load  # noqa: E402
from minibupo_hf.train import arithmetic, make_trainer, right_answer  # noqa: E402
from minibupo import Policy, Rollouts, group_advantages, response_mask, token_logprobs  # noqa: E402
from train_toy import pick_device  # noqa: E402

RESULTS = ROOT / "experiments" / "results"
TASKS = {  # digits and operations of minibupo_hf.train's arithmetic, longest response, questions a batch
    "smollm2": dict(digits=1, operations="+*", longest=4, questions=16),
    "qwen": dict(digits=2, operations="+", longest=5, questions=12),
}
BATCHES, GROUP, ROWS = 4, 8, 16  # ROWS go through a model at a time

# ---- cosines -----------------------------------------------------------------------------------


def sample(model, tokenizer, task: dict, seed: int) -> Rollouts:
    """One batch of rollouts at temperature 1; a response ends with its line."""
    problems, _ = arithmetic(task["digits"], task["operations"])
    problems = problems.shuffle(seed).select(range(task["questions"]))
    prompts = [encode_text(tokenizer, text) for text in problems["prompt"]]
    longest = max(map(len, prompts))
    padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids in prompts])
    sampled = model.generate(
        padded.to(model.device),
        task["longest"],
        prompt_len=[len(ids) for ids in prompts],
        num_samples=GROUP,
        eos_id=encode_text(tokenizer, "\n")[-1],
        generator=torch.Generator(model.device).manual_seed(seed),
    )
    rows = zip(sampled.tokens.tolist(), sampled.prompt_len.tolist(), sampled.end.tolist())
    texts = [tokenizer.decode(row[start:end]) for row, start, end in rows]
    rewards = right_answer(texts, [answer for answer in problems["answer"] for _ in range(GROUP)])
    return Rollouts(*sampled, torch.tensor(rewards).view(-1, GROUP))


def gradient(model, rollouts, layer: int | None, of=slice(None)) -> tuple[dict, float]:
    """The gradient of GRPO's loss at ratio 1, by block {number: vector}, and the mean
    log-probability of the responses; of pi_theta (layer None) or of pi_Layer^layer."""
    model.zero_grad(set_to_none=True)
    advantages = group_advantages(rollouts.rewards).flatten().to(model.device)
    rows = torch.arange(len(advantages), device=model.device)[of]
    count = (rollouts.end - rollouts.prompt_len)[rows].sum()
    total = 0.0
    for part in rows.split(ROWS):
        T = int(rollouts.end[part].max())
        mask = response_mask(rollouts.prompt_len[part], rollouts.end[part], T)
        logp = token_logprobs(model, rollouts.tokens[part, :T], mask, Policy(layer))
        (-(advantages[part, None] * logp).sum() / count).backward()
        total += float(logp.detach().sum())
    blocks = {}
    for name, parameter in model.named_parameters():
        number = re.search(r"\.(\d+)\.", name)
        if number and parameter.grad is not None:
            blocks.setdefault(int(number[1]), []).append(parameter.grad.flatten())
    return {number: torch.cat(parts) for number, parts in blocks.items()}, total / int(count)


def cosine(one: dict, other: dict) -> float:
    """Over the blocks that both have, a block at a time: the vectors are large."""
    both = one.keys() & other.keys()
    dot = sum(float(one[b].dot(other[b])) for b in both)
    sizes = (sum(float(g[b].square().sum()) for b in both) ** 0.5 for g in (one, other))
    return dot / max(np.prod(list(sizes)), 1e-30)


def cosines(name: str, batch: int) -> dict:
    """One batch: by layer the cosine with GRPO's gradient, of GRPO's own halves, and the mean
    log-probability of the samples under each internal policy."""
    torch.set_num_threads(1)
    started = time.process_time()
    model, tokenizer = load(fetch(name), device=pick_device("auto"))
    rollouts = sample(model, tokenizer, TASKS[name], seed=700 + batch)
    full, logp = gradient(model, rollouts, None)
    found = {"reward": float(rollouts.rewards.mean()), "logp_policy": logp}
    half = len(rollouts.tokens) // 2
    first, _ = gradient(model, rollouts, None, slice(0, half))
    second, _ = gradient(model, rollouts, None, slice(half, None))
    found["halves"] = cosine(first, second)
    del first, second  # a gigabyte and a half each for Qwen
    found["raw"], found["logp"] = [], []
    for layer in range(1, model.n_layer + 1):
        internal, logp = gradient(model, rollouts, layer)
        found["raw"].append(cosine(internal, full))
        found["logp"].append(logp)
    return found | {"seconds": time.process_time() - started, "machine": machine()}


# ---- training in pairs -------------------------------------------------------------------------

# Questions a batch, of 8 responses each; two optimizer steps a batch. Half of the trial's 16
# questions for SmolLM2: a run takes four minutes on one core, and seeds tell more than rows do.
TRAINING = {
    "smollm2": dict(seeds=range(800, 808), questions=8, batches=10, lr=1e-5, phase1=4),
    "qwen": dict(seeds=range(800, 808), questions=12, batches=9, lr=1e-6, phase1=4),
}
# The middle one, and the one below the top whose gradient agrees best with GRPO's (`cosines`).
LAYERS = {"smollm2": (15, 28), "qwen": (12, 23)}


def arms(name: str) -> dict:
    """{name of the arm: (layer or None for GRPO, whether it is the frozen control)}."""
    middle, best = LAYERS[name]
    return {
        "GRPO": (None, False),
        f"BuPO, layer {middle}": (middle, False),
        f"BuPO, layer {best}": (best, False),
        f"GRPO, above {middle} frozen": (middle, True),
    }


def train(name: str, arm: str, seed: int) -> dict:
    """One run of minibupo_hf/train.py; its line of results: the reward of each optimizer step, held-out
    rewards, seconds a step."""
    from transformers import TrainerCallback

    torch.set_num_threads(2 if name == "qwen" else 1)
    started, task, how = time.perf_counter(), TASKS[name], TRAINING[name]
    layer, frozen = arms(name)[arm]
    out, rows = ROOT / "out" / "lm_study" / f"{name}-{arm}-{seed}", how["questions"] * GROUP
    phase1 = ["--bupo_layer", layer, "--bupo_steps", how["phase1"]]
    options = {
        **{"model_name_or_path": fetch(name), "digits": task["digits"]},
        **{"operations": task["operations"], "max_completion_length": task["longest"]},
        **{"num_generations": GROUP, "per_device_train_batch_size": rows // 2},
        **{"steps_per_generation": 2, "max_steps": 2 * how["batches"]},
        **{"learning_rate": how["lr"], "lr_scheduler_type": "constant", "loss_type": "bnpo"},
        **{"logging_steps": 1, "report_to": "none", "save_strategy": "no", "output_dir": out},
        **{"eval_strategy": "steps", "eval_steps": how["batches"] // 2, "eval_on_start": "true"},
        **{"num_generations_eval": 2, "per_device_eval_batch_size": 64, "seed": seed},
        **{"bf16": "false", "gradient_checkpointing": "false"},  # on a GPU as on a CPU
    }
    argv = [str(part) for key, value in options.items() for part in (f"--{key}", value)]
    trainer, _ = make_trainer(argv + [str(p) for p in phase1 if layer and not frozen])

    class Freeze(TrainerCallback):
        """The control: GRPO, but in phase 1 the blocks above the layer and the norm stay."""

        def on_step_begin(self, args, state, control, model, **_):
            phase1 = state.global_step < 2 * how["phase1"]
            for key, parameter in model.named_parameters():
                number = re.search(r"\.(\d+)\.", key)
                above = int(number[1]) >= layer if number else key.endswith("model.norm.weight")
                if above:
                    parameter.requires_grad_(not phase1)

    if frozen:
        trainer.add_callback(Freeze())
    trainer.train()
    log = trainer.state.log_history
    shutil.rmtree(out, ignore_errors=True)
    return {
        "reward": [entry["reward"] for entry in log if "reward" in entry and "loss" in entry],
        "held_out": [entry["eval_reward"] for entry in log if "eval_reward" in entry],
        "step_time": [entry["step_time"] for entry in log if "step_time" in entry],
        "seconds": time.perf_counter() - started,
        "machine": machine(),
        **gpu_memory(),
    }


def gpu_memory() -> dict:
    """The most memory that tensors took on a GPU, in GB; nothing without one."""
    there = torch.cuda.is_available()
    return {"peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9} if there else {}


# ---- tables ------------------------------------------------------------------------------------


def table_of_cosines(lines: list[dict]) -> str:
    """By layer: mean ± half of the 95 % interval over batches; and the mean log-probability."""
    rows = ["| layer | cosine with GRPO's gradient | log p of the samples |", "|---|---|---|"]
    for l, values in enumerate(zip(*(line["raw"] for line in lines)), 1):
        mean, half = interval(values)
        logp = np.mean([line["logp"][l - 1] for line in lines])
        rows.append(f"| {l} | {mean:.2f} ± {half:.2f} | {logp:.1f} |")
    halves, reward = (np.mean([line[key] for line in lines]) for key in ("halves", "reward"))
    rows.append(f"\n{len(lines)} batches, reward {reward:.2f}; GRPO's halves {halves:.2f}")
    return "\n".join(rows)


def table_of_pairs(lines: list[dict]) -> str:
    """Of each arm: reward over the run and held out at the end; and its difference to GRPO, with
    half of the 95 % interval over seeds, in points."""
    measures = {
        "over the run": lambda line: 100 * np.mean(line["reward"]),
        "held out, at the end": lambda line: 100 * line["held_out"][-1],
    }
    columns = ["arm", "runs", *measures, *(f"{name}, - GRPO" for name in measures)]
    rows = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    differences = [less_control(lines, "GRPO", read) for read in measures.values()]
    for arm in dict.fromkeys(line["arm"] for line in lines):
        runs = [line for line in lines if line["arm"] == arm]
        cells = [f"{np.mean([read(line) for line in runs]):.1f}" for read in measures.values()]
        for d in (of.get(arm, []) for of in differences):
            cells.append("{:+.1f} ± {:.1f}".format(*interval(d)) if len(d) > 1 else "")
        rows.append(f"| {arm} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def report(what: str, lines: list[dict]):
    """Print the tables of all models, and write them beside the results."""
    over = "batches" if what == "cosines" else "seeds, in points"
    texts = [f"`python experiments/lm_study.py {what}`; ± half of the 95 % interval over {over}"]
    for model in dict.fromkeys(line["model"] for line in lines):
        of_it = [line for line in lines if line["model"] == model]
        table = table_of_cosines(of_it) if what == "cosines" else table_of_pairs(of_it)
        texts.append(f"## {model}\n\n{table}")
    save_report(RESULTS / f"lm_{what}.jsonl", "\n\n".join(texts))


def main(what: str, name: str):
    """Run what is missing of a model."""
    if what == "cosines":
        jobs = [({"model": name, "batch": b}, cosines, name, b) for b in range(BATCHES)]
    else:
        jobs = [
            ({"model": name, "arm": arm, "seed": seed}, train, name, arm, seed)
            for seed in TRAINING[name]["seeds"]
            for arm in arms(name)
        ]
    at_once = 1 if name == "qwen" else 2  # in training Qwen takes 11 GB
    report(what, run_missing(RESULTS / f"lm_{what}.jsonl", jobs, at_once))


if __name__ == "__main__":
    what, model = sys.argv[1:] if len(sys.argv) == 3 else ("", "")
    if what not in ("cosines", "pairs") or model not in TASKS:
        sys.exit(__doc__)
    main(what, model)
