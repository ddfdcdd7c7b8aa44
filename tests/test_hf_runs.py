"""minibupo_hf/: what a run may be resumed from, and settings that are refused.

Models, data and trainers are those of test_hf.py.
"""

# ruff: noqa: E402 - imports come after the check that the extra is there

import gc
import json
import shutil
import warnings
from dataclasses import MISSING, fields

import pytest

pytest.importorskip("trl", reason='trl is not installed: pip install -e ".[hf]"')

import peft
import transformers
import yaml
from trl import GRPOConfig, ModelConfig

import minibupo_hf.train
from minibupo_hf.bupo_trainer import BuPOConfig, BuPOTrainer
from tests.test_hf import OPTIONS, TIED, TOKENIZER, build, even, prompts, save, trained
from tests.test_hf_train import arguments


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"), build(**TIED))


@pytest.fixture
def main(base, tmp_path, capsys, monkeypatch):
    """A function that runs the command line with options, and returns what it says on error."""
    monkeypatch.setattr(gc, "collect", lambda: 0)  # half of the time, otherwise

    def run(**options):
        capsys.readouterr()
        words = arguments(options.pop("model", base), tmp_path / "out", **options)
        status = minibupo_hf.train.main(words)
        error = capsys.readouterr().err.strip()
        if status == 0:
            return None
        last = error.splitlines()[-1]
        assert status == 2 and last.startswith("minibupo_hf.train: ")
        return last.removeprefix("minibupo_hf.train: ")

    return run


SAVED = dict(save_strategy="steps", save_steps=2)
SAVED_ONCE = dict(save_strategy="steps", save_steps=1)


# ---- resuming ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        dict(steps_per_generation=2),
        dict(num_iterations=2),
        dict(gradient_accumulation_steps=2),
        dict(bupo_steps=1),
        dict(bupo_steps=0),
    ],
)
def test_a_run_is_resumed_with_its_own_count_of_phase_1(main, tmp_path, changed):
    checkpoint = tmp_path / "out" / "checkpoint-2"
    options = SAVED | dict(bupo_steps=2)
    assert main(max_steps=2, **options) is None
    options |= dict(max_steps=3, resume_from_checkpoint=checkpoint)
    said = main(**(options | changed))
    [(name, value)] = changed.items()
    assert said.startswith(f"the checkpoint is of a run with {name} = ")
    assert f"cannot be resumed with {value}, because phase 1" in said
    assert main(**options) is None


def test_a_run_of_grpo_is_not_resumed_as_bupo(main, tmp_path):
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert main(max_steps=2, bupo_steps=0, **SAVED) is None
    said = main(max_steps=3, bupo_steps=4, resume_from_checkpoint=checkpoint)
    assert "run with bupo_steps = 0, which cannot be resumed with 4" in said
    assert main(max_steps=3, bupo_steps=0, resume_from_checkpoint=checkpoint) is None


@pytest.mark.parametrize("bupo_steps", [0, 1])
def test_a_finished_run_is_not_resumed(main, tmp_path, bupo_steps):
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert main(max_steps=2, bupo_steps=bupo_steps, **SAVED) is None
    for max_steps in 1, 2:
        options = dict(max_steps=max_steps, bupo_steps=bupo_steps)
        said = main(resume_from_checkpoint=checkpoint, **options)
        assert said == (
            f"the checkpoint has 2 steps, and the run ends after {max_steps}: no step remains"
        )


LORA = dict(use_peft=True, lora_target_modules="all-linear")


@pytest.mark.parametrize(
    "before,after,says",
    [
        (dict(model="three"), dict(model="four"), "has no weights for model.layers.3"),
        (dict(model="four"), dict(model="three"), "has weights model.layers.3"),
        (dict(model="three"), dict(model="llama"), "has weights model.layers.0.self_attn.k_norm"),
        (dict(model="three"), dict(model="wide"), "size mismatch"),
        (dict(model="three"), dict(model="three", **LORA), "has no weights for base_model"),
        (dict(model="three", **LORA), dict(model="three"), "cannot resume"),
        (LORA, LORA | dict(lora_target_modules=".*q_proj"), "has weights base_model"),
        (LORA | dict(lora_target_modules=".*q_proj"), LORA, "has no weights for base_model"),
        (LORA, LORA | dict(lora_r=4), "size mismatch"),
        (LORA, LORA | dict(model="four"), "has no weights for base_model"),
        ({}, dict(optim="sgd"), "its optimizer is of another kind"),
        (dict(optim="sgd"), dict(optim="adamw_torch"), "its optimizer is of another kind"),
    ],
)
def test_a_run_is_resumed_with_its_own_model(main, tmp_path, before, after, says):
    models = dict(three=build(**TIED), four=build(num_hidden_layers=4, **TIED))
    models |= dict(llama=build("Llama", **TIED), wide=build(intermediate_size=48, **TIED))

    def run(model="three", **options):
        directory = tmp_path / model
        if not directory.exists():
            save(directory, models[model])
        return main(model=directory, bupo_layer=1, **(SAVED | options))

    assert run(max_steps=2, **before) is None
    checkpoint = tmp_path / "out" / "checkpoint-2"
    more = dict(max_steps=3, resume_from_checkpoint=checkpoint)
    said = run(**after, **more)
    assert said.startswith(f"cannot resume from {checkpoint}: ") and says in said
    assert run(**before, **more) is None


def test_a_damaged_checkpoint_is_refused(main, tmp_path):
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert main(max_steps=2, **SAVED) is None
    files = ["trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt"]
    for name in [*files, "rng_state.pth"]:
        whole = (checkpoint / name).read_bytes()
        for damaged in b"", whole[: len(whole) // 2], b"[]":
            (checkpoint / name).write_bytes(damaged)
            said = main(max_steps=3, resume_from_checkpoint=checkpoint)
            assert said.startswith(f"cannot resume from {checkpoint}: ")
        (checkpoint / name).write_bytes(whole)
    assert main(max_steps=3, resume_from_checkpoint=checkpoint) is None


# ---- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bupo_steps", [0, 1])
def test_noise_on_the_embedding_is_refused(main, bupo_steps):
    assert "neftune_noise_alpha" in main(neftune_noise_alpha=5, bupo_steps=bupo_steps)


def test_a_directory_that_cannot_be_written_is_refused_before_training(main, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    assert main().startswith("cannot write into output_dir ")


def test_a_run_without_phase_2_is_noted(tmp_path):
    options = dict(bupo_layer=2, bupo_steps=1, save_strategy="no")
    with pytest.warns(UserWarning, match="phase 1 takes all 2 optimizer steps.*bupo_steps = 1"):
        trained(tmp_path / "short", max_steps=2, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="phase 1 takes all")
        trained(tmp_path / "long", max_steps=3, **options)


def test_only_a_run_with_phase_1_has_the_tag(tmp_path):
    for bupo_steps, tags in (0, ["trl", "grpo"]), (1, ["trl", "grpo", "bupo"]):
        lm = build(**TIED)
        out = tmp_path / str(bupo_steps)
        trained(out, lm=lm, bupo_layer=2, bupo_steps=bupo_steps, max_steps=1, **SAVED_ONCE)
        assert lm.model_tags == tags
        assert ("- bupo" in (out / "README.md").read_text()) == (bupo_steps == 1)


@pytest.mark.parametrize("value", [True, 2.5, 2.0, [2], "2"])
@pytest.mark.parametrize("name", ["bupo_layer", "bupo_steps"])
def test_layer_and_steps_are_whole_numbers(tmp_path, name, value):
    given = dict(bupo_steps=1, bupo_layer=2) | {name: value}
    with pytest.raises(ValueError, match=f"{name} must be a whole number, not "):
        BuPOConfig(output_dir=str(tmp_path), **given, **OPTIONS)


def test_a_layer_without_steps_is_noted(tmp_path):
    with pytest.warns(UserWarning, match="bupo_steps is 0: this run is GRPO, without bupo_layer"):
        BuPOConfig(output_dir=str(tmp_path), bupo_layer=2, **OPTIONS)


def test_the_config_is_bupos(tmp_path):
    with pytest.raises(ValueError, match="args must be a BuPOConfig, not GRPOConfig"):
        BuPOTrainer(
            model=build(**TIED),
            args=GRPOConfig(output_dir=str(tmp_path), **OPTIONS),
            reward_funcs=even,
            train_dataset=prompts(8),
            processing_class=TOKENIZER,
        )


@pytest.mark.parametrize("before,after", [(2, 1), (2, None), (None, 1)])
def test_another_layer_is_not_resumed(main, tmp_path, before, after):
    """The phase 1 of one run trains one layer."""
    assert main(max_steps=2, bupo_steps=2, bupo_layer=before, **SAVED) is None
    checkpoint = tmp_path / "out" / "checkpoint-2"
    options = dict(max_steps=6, bupo_steps=2, resume_from_checkpoint=checkpoint)
    said = main(bupo_layer=after, **options)
    assert f"run with bupo_layer = {before}, which cannot be resumed with {after}" in said


def adapted(base, path, **options):
    """The directory of a LoRA adapter, as it is before training."""
    lm = transformers.AutoModelForCausalLM.from_pretrained(base)
    peft.get_peft_model(lm, peft.LoraConfig(task_type="CAUSAL_LM", **options)).save_pretrained(path)
    return path


def test_phase_1_needs_something_to_train(main, base, tmp_path, monkeypatch):
    above = dict(target_modules=["q_proj"], layers_to_transform=[2])
    model = adapted(base, tmp_path / "adapter", **above)
    assert "phase 1 of layer 2 has nothing to train" in main(model=model, bupo_layer=2)
    assert main(model=model, bupo_layer=3, max_steps=1) is None
    monkeypatch.setattr("minibupo_hf.bupo_trainer.target_layer", lambda dH_mlp: 2)
    said = main(model=model, bupo_layer=None, max_steps=1)
    assert "phase 1 of layer 2 has nothing to train" in said


def test_an_adapter_of_the_embedding_is_trained(main, base, tmp_path):
    model = adapted(base, tmp_path / "adapter", target_modules=["embed_tokens"])
    assert main(model=model, max_steps=1) is None


def test_the_reference_model_has_the_revision_of_the_model(base, tmp_path, monkeypatch):
    asked = []

    def create(path, **options):
        asked.append(options["revision"])
        return transformers.AutoModelForCausalLM.from_pretrained(path)

    monkeypatch.setattr("trl.trainer.grpo_trainer.create_model_from_path", create)
    words = arguments(base, tmp_path, beta=0.1, model_revision="v2")
    minibupo_hf.train.make_trainer(words)
    assert asked == ["v2"]


@pytest.mark.parametrize(
    "options,says",
    [
        (dict(generation_batch_size=0, steps_per_generation=None), "batch_size must be at least 1"),
        (dict(remove_unused_columns=True), "remove_unused_columns is not for"),
        (dict(gradient_checkpointing_kwargs="[1]"), "checkpointing_kwargs must be a dict like"),
        (dict(generation_kwargs="[1]"), "generation_kwargs must be a dict"),
        (dict(optim_args="foo"), "optim_args must be like name=1,name=2, not foo"),
        (dict(dataset_name=__file__), "is a file: give its directory"),
        (
            dict(metric_for_best_model="foo", save_strategy="best", max_steps=1)
            | dict(eval_strategy="steps", eval_steps=1, eval_problems=8),
            "The `metric_for_best_model` training argument is set to 'eval_foo'",
        ),
    ],
)
def test_a_setting_is_refused_in_a_sentence(main, options, says):
    assert says in main(**options)


def with_generation(base, directory, **options):
    """A copy of a model with these options in its generation_config."""
    shutil.copytree(base, directory)
    file = directory / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))
    return directory


@pytest.mark.parametrize("ends", ["3", [[3]], [3, "4"], {"a": 1}])
def test_an_end_that_is_no_token_is_refused(main, base, tmp_path, ends):
    model = with_generation(base, tmp_path / "model", eos_token_id=ends)
    assert "eos_token_id" in main(model=model)


@pytest.mark.parametrize(
    "name,value",
    [
        ("suppress_tokens", [3]),
        ("forced_eos_token_id", 0),
        ("no_repeat_ngram_size", 2),
        ("num_beams", 2),
        ("max_time", 1.0),
        ("epsilon_cutoff", 0.1),
        ("bad_words_ids", [[3]]),
        ("typical_p", 0.5),
        ("guidance_scale", 2.0),
    ],
)
def test_what_would_change_the_samples_is_refused(main, base, tmp_path, name, value):
    options = {name: value, "do_sample": True}
    model = with_generation(base, tmp_path / "model", **options)
    assert f"generation_config has {name} = {value!r}" in main(model=model)


def test_what_would_change_nothing_is_allowed(main, base, tmp_path):
    neutral = dict(
        num_beams=1, typical_p=1.0, suppress_tokens=[], min_length=0, guidance_scale=None
    )
    neutral |= dict(do_sample=True, temperature=0.6, top_p=0.9, max_length=20, epsilon_cutoff=0.0)
    model = with_generation(base, tmp_path / "model", **neutral)
    assert main(model=model, max_steps=1) is None


# ---- a file of settings --------------------------------------------------------------------------

WRONG = dict(bupo_steps=[None, True, 1.5], bupo_layer=[2.5, [2], True], max_steps=[1.5])
WRONG |= dict(temperature=[None, True, [1.0]], per_device_train_batch_size=[8.0], digits=[1.0])
WRONG |= dict(operations=[5], eval_problems=[None], seed=[None], beta=[None, {}], use_peft=[1])
WRONG |= dict(model_name_or_path=[5], output_dir=[5], lora_target_modules=[[1], {"a": 1}])
WRONG |= dict(importance_sampling_level=[5])


@pytest.mark.parametrize("name,value", [(n, v) for n in WRONG for v in WRONG[n]])
def test_a_value_of_another_type_is_refused(main, tmp_path, name, value):
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps({name: value}))
    said = main(**{name: None, "config": file})
    assert said.startswith(f"{name} in the file of --config is {value!r}, not ")


def test_values_of_the_right_type_are_read(base, tmp_path):
    file = tmp_path / "config.yaml"
    values = dict(learning_rate="1e-3", beta=0, temperature=2, bupo_layer=None, use_peft=True)
    values |= dict(lora_target_modules=["q_proj"], lr_scheduler_kwargs={}, report_to="none")
    values |= dict(max_steps="3", dataset_name=None, epsilon_high=0.3, run_name=None)
    file.write_text(yaml.safe_dump(values))
    words = ["--model_name_or_path", str(base), "--output_dir", str(tmp_path), "--config"]
    _, config, model = minibupo_hf.train.parse([*words, str(file), "--num_generations", "4"])
    assert (config.learning_rate, config.temperature, config.max_steps) == (1e-3, 2, 3)
    assert (config.bupo_layer, config.epsilon_high, config.lr_scheduler_kwargs) == (None, 0.3, {})
    assert (model.use_peft, model.lora_target_modules) == (True, "q_proj")


def test_every_default_has_its_type():
    for options in minibupo_hf.train.TaskArguments, BuPOConfig, ModelConfig:
        defaults = {f.name: f.default for f in fields(options) if f.default is not MISSING}
        minibupo_hf.train.check_types(options, defaults)
