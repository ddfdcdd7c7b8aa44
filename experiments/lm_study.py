"""Phase 1 on real language models: does its gradient agree with GRPO's, and what does it cost?

    python -m experiments.lm_study cosines smollm2      # or qwen: every layer, four batches
    python -m experiments.lm_study pairs smollm2        # or qwen: training in pairs
    python -m experiments.lm_study worth smollm2        # or qwen: worth, predicted without training
    python -m experiments.lm_study report               # only the tables, of committed results

Training is by minibupo_hf/train.py. What has a record is not run again. On two cores SmolLM2's
cosines take a quarter of an hour and its pairs two and a half hours; Qwen's would take an hour and
half a day. Qwen's records, and those of "smollm2, H200", were made on a GPU, where a run takes a
quarter of a minute. Needs the extras `hf` and `bench`; the models are those that
experiments/language_models.py fetches.
"""

import argparse
import shutil
import sys
import time
from functools import partial

import numpy as np
import torch

from experiments import common
from experiments.common import cosine, gradient, markdown_table, with_interval
from experiments.first_order import first_order_worth, policy_step, rises
from experiments.language_models import GROUP, ROWS, arithmetic_rollouts, fetch
from minibupo import FULL, Policy, group_advantages
from minibupo_hf.adapter import load
from train_toy import pick_device

TASKS = {  # the arithmetic of minibupo_hf/train.py, longest response, questions in a batch
    "smollm2": dict(digits=1, operations="+*", longest=4, questions=16),
    "qwen": dict(digits=2, operations="+", longest=5, questions=12),
}
BATCHES = 4

# ---- cosines -------------------------------------------------------------------------------------


def cosines(name: str, batch: int) -> dict:
    """Return the cosines with GRPO's gradient on one batch, by layer, and of GRPO's own halves."""
    torch.set_num_threads(1)
    started = time.process_time()
    model, tokenizer = load(fetch(name), device=pick_device("auto"))
    rollouts = arithmetic_rollouts(model, tokenizer, **TASKS[name], seed=700 + batch)
    full = gradient(model, rollouts, chunk=ROWS)

    advantages = group_advantages(rollouts.rewards).flatten()
    is_first = torch.arange(len(advantages)) < len(advantages) // 2
    first = gradient(model, rollouts, weights=advantages * is_first, chunk=ROWS)
    second = gradient(model, rollouts, weights=advantages * ~is_first, chunk=ROWS)
    halves = cosine(first, second)
    del first, second  # a gigabyte and a half each for Qwen

    raw = []
    for layer in range(1, model.n_layer + 1):
        internal = gradient(model, rollouts, Policy(layer), chunk=ROWS)
        raw.append(cosine(internal, full))
    return {
        "reward": float(rollouts.rewards.mean()),
        "halves": halves,
        "raw": raw,
        "seconds": time.process_time() - started,
        "machine": common.machine(),
    }


# ---- training in pairs ---------------------------------------------------------------------------

# Questions in a batch, with 8 responses each; two optimizer steps for each batch. SmolLM2 has half
# of the 16 questions of its trial: a run takes four minutes on one core, and more seeds say more
# than larger batches do.
TRAINING = {
    "smollm2": dict(seeds=range(800, 808), questions=8, batches=10, lr=1e-5, phase1=4),
    "qwen": dict(seeds=range(800, 808), questions=12, batches=9, lr=1e-6, phase1=4),
}
# The middle one, and the one below the top whose gradient agrees best with GRPO's (`cosines`).
LAYERS = {"smollm2": (15, 28), "qwen": (12, 23)}


def arms(name: str) -> dict:
    """Return {name of the arm: (layer or None for GRPO, whether it is the frozen control)}."""
    middle, best = LAYERS[name]
    return {
        "GRPO": (None, False),
        f"BuPO, layer {middle}": (middle, False),
        f"BuPO, layer {best}": (best, False),
        f"GRPO, above {middle} frozen": (middle, True),
    }


def train(name: str, arm: str, seed: int) -> dict:
    """Make one run of minibupo_hf/train.py, and return its record.

    It has the reward of each batch, held-out rewards, and the seconds of each optimizer step.
    """
    from minibupo_hf.train import make_trainer  # needs trl

    torch.set_num_threads(2 if name == "qwen" else 1)
    started = time.perf_counter()
    layer, frozen = arms(name)[arm]
    out = common.ROOT / "out" / "lm_study" / f"{name}-{arm}-{seed}"
    options = training_options(name, seed) | {"output_dir": out}
    if layer and not frozen:
        options |= {"bupo_layer": layer, "bupo_steps": TRAINING[name]["phase1"]}
    argv = [str(part) for key, value in options.items() for part in (f"--{key}", value)]
    trainer, _ = make_trainer(argv)
    if frozen:
        trainer.add_callback(freeze_above(layer, until=2 * TRAINING[name]["phase1"]))
    trainer.train()
    log = trainer.state.log_history
    shutil.rmtree(out, ignore_errors=True)
    found = {
        "reward": [entry["reward"] for entry in log if "reward" in entry and "loss" in entry],
        "held_out": [entry["eval_reward"] for entry in log if "eval_reward" in entry],
        "step_time": [entry["step_time"] for entry in log if "step_time" in entry],
        "seconds": time.perf_counter() - started,
        "machine": common.machine(),
    }
    if torch.cuda.is_available():
        found["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return found


def worth(name: str) -> dict:
    """Return first_order.rises for the phase 1 of each arm, on the model before any training.

    An arm is named as in `arms`.
    """
    torch.set_num_threads(1)
    started = time.process_time()
    model, tokenizer = load(fetch(name), device=pick_device("auto"))
    count = 3 if name == "qwen" else BATCHES  # Qwen's gradient takes 2 GB for each batch
    batches = [
        arithmetic_rollouts(model, tokenizer, **TASKS[name], seed=700 + b) for b in range(count)
    ]
    steps = {}
    for arm, (layer, is_frozen) in arms(name).items():
        policy = FULL if layer is None or is_frozen else Policy(layer)
        above = partial(common.above, layer=layer) if is_frozen else lambda model: []
        steps[arm] = policy_step(policy, TRAINING[name]["lr"], above, chunk=ROWS)
    found = rises(model, batches, steps, chunk=ROWS)
    return {
        "reward": float(np.mean([batch.rewards.mean().item() for batch in batches])),
        "rises": {arm: matrix.tolist() for arm, matrix in found.items()},
        "seconds": time.process_time() - started,
        "machine": common.machine(),
    }


def training_options(name: str, seed: int) -> dict:
    """Return the options of minibupo_hf/train.py that all arms share."""
    task = TASKS[name]
    how = TRAINING[name]
    return {
        "model_name_or_path": fetch(name),
        "digits": task["digits"],
        "operations": task["operations"],
        "max_completion_length": task["longest"],
        "num_generations": GROUP,
        "per_device_train_batch_size": how["questions"] * GROUP // 2,
        "steps_per_generation": 2,
        "max_steps": 2 * how["batches"],
        "learning_rate": how["lr"],
        "lr_scheduler_type": "constant",
        "loss_type": "bnpo",
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "eval_strategy": "steps",
        "eval_steps": how["batches"] // 2,
        "eval_on_start": "true",
        "num_generations_eval": 2,
        "per_device_eval_batch_size": 64,
        "seed": seed,
        "bf16": "false",  # on a GPU as on a CPU
        "gradient_checkpointing": "false",
    }


def freeze_above(layer: int, until: int):
    """Return a callback of Trainer that trains only the layers 1..layer, E_u and the embedding.

    It does so in the first `until` optimizer steps.
    """
    from transformers import TrainerCallback

    class Freeze(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **_):
            for name, parameter in model.named_parameters():
                number = common.layer_of(name)
                above = number > layer if number else name.endswith("model.norm.weight")
                if above:
                    parameter.requires_grad_(state.global_step >= until)

    return Freeze()


# ---- the reports ---------------------------------------------------------------------------------


def table_of_cosines(lines: list[dict]) -> str:
    """Return the cosines by layer: mean ± half of the 95% interval over batches."""
    rows = [
        [layer, with_interval(values, "{:.2f}")]
        for layer, values in enumerate(zip(*(line["raw"] for line in lines)), 1)
    ]
    halves = np.mean([line["halves"] for line in lines])
    reward = np.mean([line["reward"] for line in lines])
    table = markdown_table(["layer", "cosine with GRPO's gradient"], rows)
    return f"{table}\n\n{len(lines)} batches, reward {reward:.2f}; GRPO's halves {halves:.2f}"


def over_the_run(line: dict) -> float:
    """Return the reward in points, mean over the run."""
    return 100 * np.mean(line["reward"])


def at_the_end(line: dict) -> float:
    """Return the held-out reward at the end in points."""
    return 100 * line["held_out"][-1]


def table_of_pairs(lines: list[dict]) -> str:
    """Return both measures of each arm, and their difference to GRPO with intervals over seeds."""
    measures = {"over the run": over_the_run, "held out, at the end": at_the_end}
    rows = []
    for arm in dict.fromkeys(line["arm"] for line in lines):
        runs = [line for line in lines if line["arm"] == arm]
        row = [arm, len(runs)]
        for measure in measures.values():
            row.append(f"{np.mean([measure(line) for line in runs]):.1f}")
        for measure in measures.values():
            row.append("" if arm == "GRPO" else with_interval(gained(lines, arm, measure)))
        rows.append(row)
    minus = [f"{name}, - GRPO" for name in measures]
    return markdown_table(["arm", "runs", *measures, *minus], rows)


def gained(lines: list[dict], arm: str, measure) -> list[float]:
    """Return measure(arm) - measure(GRPO), one number for each seed."""
    return common.differences(lines, arm, "GRPO", lambda a, b: measure(a) - measure(b), unit="seed")


def worth_of(lines: list[dict]) -> str:
    """Return what a step of phase 1 is worth in each arm of a model; a step is a batch here."""
    name = lines[0]["model"].split(",")[0]  # of "smollm2, H200"
    s_inter = TRAINING[name]["phase1"]
    arms = {line["arm"]: ("GRPO", s_inter) for line in lines if line["arm"] != "GRPO"}
    return common.worth_table(lines, arms, unit="seed")


def report_of_worth(lines: list[dict]) -> str:
    """Return the predicted worth of each arm beside the measured one, both with 95% intervals."""
    pairs = common.read_lines(common.RESULTS / "lm_pairs.jsonl")
    rows = []
    for line, arm, predicted, half, measured in worth_points(lines, pairs):
        cells = [f"{predicted:.2f} ± {half:.2f}", common.with_limits(*measured)]
        rows.append([line["model"], arm, *cells])
    note = (
        "`python -m experiments.lm_study worth`: first-order worth (first_order.py), four batches "
        "(Qwen: three); ± is half of the 95% interval by the jackknife over batches. Measured: "
        "that of `pairs`, 95% interval over seeds by Fieller."
    )
    return f"{note}\n\n{markdown_table(['model', 'arm', 'predicted', 'measured'], rows)}"


def worth_points(lines: list[dict], pairs: list[dict]) -> list[tuple]:
    """Return (record, arm, predicted worth, half of its interval, (measured, low, high))."""
    points = []
    for line in lines:
        s_inter = TRAINING[line["model"]]["phase1"]
        of_model = [pair for pair in pairs if pair["model"] == line["model"]]
        for arm in line["rises"]:
            if arm != "GRPO":
                rise, rise_of_grpo = (np.array(line["rises"][name]) for name in (arm, "GRPO"))
                found = common.costs(of_model, arm, "GRPO", s_inter, "seed")
                measured = common.worth(found["arm - control"], found["idle - control"])
                points.append((line, arm, *first_order_worth(rise, rise_of_grpo), measured))
    return points


def report_of_cosines(lines: list[dict]) -> str:
    """Return the report of all models."""
    texts = [
        "`python -m experiments.lm_study cosines`; ± is half of the 95% interval over batches.",
    ]
    for model, of_model in by_model(lines).items():
        texts.append(f"## {model}\n\n{table_of_cosines(of_model)}")
    return "\n\n".join(texts)


def report_of_pairs(lines: list[dict]) -> str:
    """Return the report of all models."""
    texts = [
        "`python -m experiments.lm_study pairs`; in points, ± is half of the 95% interval over "
        f"seeds.\n\n{common.WORTH_NOTE}",
    ]
    for model, of_model in by_model(lines).items():
        texts.append(f"## {model}\n\n{table_of_pairs(of_model)}\n\n{worth_of(of_model)}")
    return "\n\n".join(texts)


def by_model(lines: list[dict]) -> dict[str, list[dict]]:
    """Return the records of each model."""
    models = dict.fromkeys(line["model"] for line in lines)
    return {model: [line for line in lines if line["model"] == model] for model in models}


REPORTS = {"cosines": report_of_cosines, "pairs": report_of_pairs, "worth": report_of_worth}


def report(what: str):
    """Print the report of all models, and write it beside the results."""
    results = common.RESULTS / f"lm_{what}.jsonl"
    common.save_report(results, REPORTS[what](common.read_lines(results)))


def jobs_of(what: str, name: str) -> list[tuple]:
    """Return the jobs of a model for common.run_missing."""
    if what == "worth":
        return [({"model": name}, worth, name)]
    if what == "cosines":
        return [({"model": name, "batch": b}, cosines, name, b) for b in range(BATCHES)]
    return [
        ({"model": name, "arm": arm, "seed": seed}, train, name, arm, seed)
        for seed in TRAINING[name]["seeds"]
        for arm in arms(name)
    ]


def main(argv=None) -> int:
    """Run the command line. Return 0, or 2 without the extra `hf`."""
    style = dict(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = argparse.ArgumentParser("lm_study", **style)
    parser.add_argument("what", choices=(*REPORTS, "report"))
    parser.add_argument("model", choices=TASKS, nargs="?")
    args = parser.parse_args(argv)
    if (args.what == "report") == (args.model is not None):
        parser.error("report takes no model, everything else takes one")
    if args.what == "report":
        for what in REPORTS:
            report(what)
        return 0
    at_once = 1 if args.model == "qwen" else 2  # Qwen takes 11 GB in training
    results = common.RESULTS / f"lm_{args.what}.jsonl"
    try:
        common.run_missing(results, jobs_of(args.what, args.model), at_once)
    except (ValueError, ImportError) as error:
        print(f"lm_study: {error}", file=sys.stderr)
        return 2
    report(args.what)
    return 0


if __name__ == "__main__":
    sys.exit(main())
