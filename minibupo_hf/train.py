"""Train a language model by BuPO, with TRL's own command line.

    python -m minibupo_hf.train --model_name_or_path Qwen/Qwen3-0.6B --bupo_layer 20 \
        --bupo_steps 4 --output_dir out/qwen --max_steps 20 --num_generations 8 \
        --max_completion_length 4

`accelerate launch -m minibupo_hf.train` and `torchrun -m minibupo_hf.train` work, too. All options
of GRPOConfig and ModelConfig are options here, except 4 and 8 bits. Without --dataset_name the task
is arithmetic, which needs no download: its answers can be verified, and every fifth problem is held
out for evaluation.
"""

import os
import sys
import tempfile
import traceback
import types
import typing
from dataclasses import dataclass, field, fields

import torch

from minibupo_hf.adapter import one_line

# What belongs to the extra `hf` is imported in the functions, so that without it `main` can say so.


@dataclass
class TaskArguments:
    """What is trained on: a data set of TRL's kind, or the built-in arithmetic."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "hub name or directory of a data set; without it arithmetic"},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of the set"})
    dataset_train_split: str = field(default="train", metadata={"help": "split to train on"})
    dataset_test_split: str = field(default="test", metadata={"help": "split to evaluate on"})
    digits: int = field(default=1, metadata={"help": "arithmetic: digits of both numbers"})
    operations: str = field(default="+*", metadata={"help": "arithmetic: some of + - *"})
    eval_problems: int = field(default=64, metadata={"help": "arithmetic: problems to evaluate on"})


# ---- the built-in task ---------------------------------------------------------------------------

# worked examples of one digit, and of more
WORKED = {"+": ("3+4=7", "23+45=68"), "-": ("7-4=3", "68-45=23"), "*": ("2*4=8", "12*13=156")}
CALCULATE = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


def arithmetic(digits: int, operations: str):
    """(training set, held-out set) with columns prompt and answer; no problem is in both.

    A prompt is worked examples and a question, "3+4=7\\n2*4=8\\n6+5=". Without examples, a base
    model cannot tell what is being asked. Raises ValueError for other operations, or digits not in
    1..3.
    """
    from datasets import Dataset

    known = operations and set(operations) <= set(WORKED)
    # an operation given twice would put held-out problems into the training set
    each_once = len(set(operations)) == len(operations)
    if not known or not each_once or digits not in (1, 2, 3):
        raise ValueError(
            f"operations must be some of {' '.join(WORKED)} and digits 1, 2 or 3, not "
            f"{operations!r} and {digits}"
        )
    examples = "".join(WORKED[op][0 if digits == 1 else 1] + "\n" for op in operations)
    low = 0 if digits == 1 else 10 ** (digits - 1)
    numbers = torch.arange(low, 10**digits)
    every = torch.cartesian_prod(torch.arange(len(operations)), numbers, numbers)
    mixed = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))][:20_000]
    rows = []
    for op, a, b in mixed.tolist():
        question = f"{a}{operations[op]}{b}="
        answer = str(CALCULATE[operations[op]](a, b))
        if question + answer not in examples.split():
            rows.append({"prompt": examples + question, "answer": answer})
    held_out = len(rows) // 5
    return Dataset.from_list(rows[held_out:]), Dataset.from_list(rows[:held_out])


def right_answer(completions, answer, **_) -> list[float]:
    """1 if the first line of a completion is the answer, else 0."""
    return [float(text.split("\n")[0].strip() == a) for text, a in zip(completions, answer)]


def right_mathematics(completions, **columns) -> list[float | None]:
    """TRL's reward by math-verify, for a data set. It reads chats, so plain text becomes one."""
    from trl.rewards import accuracy_reward

    chats = [[{"content": c}] if isinstance(c, str) else c for c in completions]
    return accuracy_reward(chats, **columns)


# ---- the command line ----------------------------------------------------------------------------


def read_data(task: TaskArguments, evaluate: bool):
    """(training set, evaluation set or None, reward). Raises ValueError for an invalid task, or for
    a data set that cannot be read, or lacks a split, a column or solutions."""
    if task.dataset_name is None:
        if task.eval_problems < 1:
            raise ValueError(f"eval_problems must be at least 1, not {task.eval_problems}")
        train, held_out = arithmetic(task.digits, task.operations)
        held_out = held_out.select(range(min(task.eval_problems, len(held_out))))
        return train, held_out if evaluate else None, right_answer

    if os.path.isfile(task.dataset_name):
        raise ValueError(f"dataset_name {task.dataset_name} is a file: give its directory")

    from datasets import load_dataset

    try:
        data = load_dataset(task.dataset_name, task.dataset_config)
    except Exception as error:  # a reader of files has a class of its own for each kind of damage
        raise ValueError(
            f"cannot read data set {task.dataset_name}: {one_line(error.__cause__ or error)}"
        ) from error
    splits = [task.dataset_train_split] + [task.dataset_test_split] * evaluate
    for split in splits:
        if split not in data:
            raise ValueError(f"{task.dataset_name} has no split {split}, only {', '.join(data)}")
        for column in ("prompt", "solution"):
            if column not in data[split].column_names:
                there = ", ".join(data[split].column_names)
                raise ValueError(f"{task.dataset_name} has no column {column!r}, only {there}")
        check_solutions(data[split]["solution"][:100])
    return data[splits[0]], data[splits[1]] if evaluate else None, right_mathematics


def check_solutions(solutions):
    """Raise ValueError unless math-verify reads some of the solutions, else nothing is rewarded."""
    numbers = [solution for solution in solutions if not isinstance(solution, str)]
    if numbers:
        raise ValueError(f"a solution must be text like '$72$', not {numbers[0]!r}")
    rewards = right_mathematics([r"\boxed{0}"] * len(solutions), solution=solutions)
    if all(reward is None for reward in rewards):
        raise ValueError(f"math-verify reads none of the first solutions, like {solutions[:1]}")


def check_tokenizer(tokenizer, vocab_size: int):
    """Raise ValueError unless the tokenizer has an EOS, and the model all tokens of it."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token, with which a response could end")
    if len(tokenizer) > vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model only {vocab_size}")


def check_ends(ids):
    """Raise ValueError unless eos_token_id of a generation_config is a token id, or a list."""
    ends = ids if isinstance(ids, list) else [ids]
    if ids is not None and not all(isinstance(end, int) for end in ends):
        raise ValueError(f"eos_token_id in generation_config.json must be token ids, not {ids!r}")


def check_prompts(tokenizer, prompts, context: int, new_tokens: int, template=None):
    """Raise ValueError unless each prompt is a text or a chat, and leaves room for new tokens.

    `template` are the options of the chat template.
    """
    for row, prompt in enumerate(prompts):
        try:
            length = len(encode_prompt(tokenizer, prompt, **(template or {})))
        except ValueError as error:
            raise ValueError(f"prompt {row} of the data set: {error}") from error
        if length + new_tokens > context:
            raise ValueError(
                f"prompt {row} of the data set has {length} tokens: with max_completion_length = "
                f"{new_tokens} they outgrow the model's context of {context}"
            )


def encode_prompt(tokenizer, prompt, **template) -> list[int]:
    """Token ids of a prompt of a data set. Raises ValueError if they are not what it says."""
    from minibupo_hf.adapter import apply_template, encode_text

    if isinstance(prompt, str) and prompt:
        ids = encode_text(tokenizer, prompt)
        if tokenizer(prompt).input_ids != ids:
            raise ValueError("the tokenizer puts an EOS after it, and TRL would keep it")
        return ids
    if not isinstance(prompt, list) or not prompt or not isinstance(prompt[-1], dict):
        raise ValueError(f"it must be a text or a chat, not {prompt!r}")
    if not tokenizer.chat_template:
        raise ValueError("a chat needs a tokenizer with a chat template")
    return encode_text(tokenizer, apply_template(tokenizer, prompt, **template), special=False)


def check_output(directory):
    """Raise ValueError unless files can be written into the directory, which is made."""
    try:
        os.makedirs(directory, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise ValueError(f"cannot write into output_dir {directory}: {error}") from error


def make_trainer(argv):
    """(BuPOTrainer, BuPOConfig): everything up to training.

    Raises ValueError, ImportError or OSError with one sentence.
    """
    try:
        from transformers.integrations import get_available_reporting_integrations
        from trl import get_peft_config

        from minibupo_hf.adapter import context_length, load_lm
        from minibupo_hf.bupo_trainer import BuPOTrainer
    except ImportError as error:
        raise ImportError(f'it needs pip install -e ".[hf]": {error}') from error

    task, config, model = parse(argv)
    for package in config.report_to:
        if package not in get_available_reporting_integrations():
            raise ImportError(f"report_to {package}: it is not installed")
    if config.should_save:
        check_output(config.output_dir)
    train, held_out, reward = read_data(task, config.eval_strategy != "no")
    lm, tokenizer = load_lm(
        model.model_name_or_path,
        model.dtype or "float32",
        model.model_revision,
        config.trust_remote_code,
        attn_implementation=model.attn_implementation,
    )
    check_tokenizer(tokenizer, len(lm.get_input_embeddings().weight))
    check_ends(lm.generation_config.eos_token_id)
    sizes = (context_length(lm.config.get_text_config()), config.max_completion_length or 0)
    for data in (train, held_out):
        if data is not None and task.dataset_name:
            check_prompts(tokenizer, data["prompt"], *sizes, config.chat_template_kwargs)
        elif data is not None:  # not every small tokenizer has the line breaks before a question
            check_prompts(tokenizer, [p.split("\n")[-1] for p in data["prompt"]], *sizes)
    if config.beta and model.model_revision != "main":
        config.model_init_kwargs = {"revision": model.model_revision}  # of the reference model
    trainer = BuPOTrainer(
        model=lm,
        args=config,
        processing_class=tokenizer,
        reward_funcs=reward,
        train_dataset=train,
        eval_dataset=held_out,
        # an adapter that has been trained before is trained further as it is
        peft_config=None if hasattr(lm, "merge_and_unload") else get_peft_config(model),
    )
    return trainer, config


def check_types(options, values):
    """Raise ValueError unless each value of a config file is of the type that its option has."""
    hints = typing.get_type_hints(options)
    for option in fields(options):
        value = values.get(option.name)
        if value is None and (option.name not in values or option.default is None):
            continue
        if not has_type(value, hints[option.name]):
            wanted = str(option.type).removeprefix("<class '").removesuffix("'>")
            raise ValueError(f"{option.name} in the file of --config is {value!r}, not {wanted}")


def has_type(value, hint) -> bool:
    """Whether a value is of an annotated type. A text is: it is read as on a command line."""
    kind = typing.get_origin(hint) or hint
    inner = typing.get_args(hint)
    if isinstance(value, str) or kind is typing.Any:
        return True
    if kind in (typing.Union, types.UnionType):
        return any(has_type(value, one) for one in inner)
    if kind is typing.Literal:
        return value in inner
    if kind is list and isinstance(value, list) and inner:
        return all(has_type(item, inner[0]) for item in value)
    if isinstance(value, bool):  # Python takes it for an int
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


def parse(argv):
    """(TaskArguments, BuPOConfig, ModelConfig) of a command line.

    Raises ValueError for options that do not go together, or are not for this program.
    """
    import yaml
    from trl import ModelConfig, TrlParser

    from minibupo_hf.bupo_trainer import BuPOConfig

    class Parser(TrlParser):
        def set_defaults_with_config(self, **values):
            for options in self.dataclass_types:
                check_types(options, values)
            return super().set_defaults_with_config(**values)

    parser = Parser((TaskArguments, BuPOConfig, ModelConfig))
    parser.set_defaults(lora_dropout=0.0)
    if not torch.accelerator.is_available():
        # bfloat16 is slow on a CPU, and there is no GPU memory to save or to pin. Without use_cpu
        # the processes of torchrun would each train a model of their own.
        parser.set_defaults(bf16=False, gradient_checkpointing=False, dataloader_pin_memory=False)
        parser.set_defaults(use_cpu=True)
    try:
        task, config, model = parser.parse_args_and_config(argv)
    except yaml.YAMLError as error:
        raise ValueError(f"the file of --config is not YAML: {one_line(error)}") from error
    if not model.model_name_or_path:
        raise ValueError("--model_name_or_path is missing: a hub name, a directory or a .gguf file")
    for name, value in [
        ("load_in_4bit", model.load_in_4bit),
        ("load_in_8bit", model.load_in_8bit),
        ("remove_unused_columns", config.remove_unused_columns),  # rewards read them
        ("model_init_kwargs", config.model_init_kwargs),
        ("lora_dropout", model.lora_dropout),  # BuPOTrainer removes all dropout
    ]:
        if value:
            raise ValueError(f"{name} is not for minibupo_hf.train")
    if config.optim_args and any(a.count("=") != 1 for a in config.optim_args.split(",")):
        raise ValueError(f"optim_args must be like name=1,name=2, not {config.optim_args}")
    if config.max_steps == 0 or config.num_train_epochs <= 0:
        raise ValueError("max_steps or num_train_epochs leave no step to train")
    if config.beta and not model.use_peft and model.model_name_or_path.endswith(".gguf"):
        raise ValueError("beta needs a reference model, which TRL cannot read from a .gguf file")
    return task, config, model


def main(argv=None) -> int:
    """Train, evaluate and save; return 2 after a user error."""
    try:
        trainer, config = make_trainer(argv)
    except (ValueError, ImportError, OSError) as error:
        return refused(error)
    try:
        trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
        trainer.save_model()
        trainer.save_state()  # trainer_state.json, with the reward curve
    except (ValueError, ImportError, OSError) as error:
        if not is_about_input(error):
            raise
        return refused(error)
    except KeyError as error:
        if "metric_for_best_model" not in str(error):
            raise
        return refused(ValueError(*error.args))
    if trainer.is_world_process_zero():
        print(f"wrote {os.path.join(config.output_dir, 'trainer_state.json')}")
    return 0


def refused(error: Exception) -> int:
    """Print what an error says as one line; return 2."""
    print(f"minibupo_hf.train: {one_line(error)}", file=sys.stderr)
    return 2


LIBRARIES = {"accelerate", "datasets", "peft", "torch", "transformers", "trl"}


def is_about_input(error: Exception) -> bool:
    """Whether an error in training is about what the user gave, and not a bug.

    Some options are read only in the first step: then a library says what is wrong with them.
    """
    from minibupo_hf.bupo_trainer import NoLayerError, ResumeError

    *_, (frame, _) = traceback.walk_tb(error.__traceback__)  # where it was raised
    library = frame.f_globals.get("__name__", "").split(".")[0]
    return isinstance(error, NoLayerError | ResumeError | OSError) or library in LIBRARIES


if __name__ == "__main__":
    sys.exit(main())
