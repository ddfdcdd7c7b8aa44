"""minibupo_hf/: other people's files, runs and mistakes. Each kind is right, or it is refused.

Models, data and trainers are those of test_hf.py.
"""

# ruff: noqa: E402 - imports come after the check that the extra is there

import gc
import inspect
import itertools
import json
import shutil

import pytest
import torch

pytest.importorskip("trl", reason='trl is not installed: pip install -e ".[hf]"')

import peft
import transformers
import trl
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers
from tokenizers.processors import TemplateProcessing
from trl import GRPOTrainer

import minibupo_hf.train
from minibupo_hf.adapter import HFModel, encode_chat, encode_text, load, norm_scales
from minibupo_hf.bupo_trainer import BuPOConfig, BuPOTrainer, NoLayerError
from tests.test_hf import (
    OPEN,
    OPTIONS,
    TIED,
    TOKENIZER,
    TOKENS,
    build,
    differ,
    even,
    logged,
    prompts,
    save,
    trained,
    weights,
)
from tests.test_hf_train import arguments

# ---- counting ------------------------------------------------------------------------------------


def plain_loop(bupo_steps, uses, accumulation, batches_an_epoch):
    """The phases of the mini-batches of each optimizer step, for seven optimizer steps or more."""
    steps = []
    batches = 0
    while len(steps) < 7 or batches <= bupo_steps:
        epoch = []
        for _ in range(batches_an_epoch):
            epoch += [1 if batches < bupo_steps else 2] * uses
            batches += 1
        steps += [epoch[i : i + accumulation] for i in range(0, len(epoch), accumulation)]
    return steps


class Counting(BuPOTrainer):
    """Neither samples nor learns: notes the phase of every mini-batch, by optimizer step, and the
    optimizer steps before which the optimizer had no moments."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        step = self.state.global_step
        self.phases.setdefault(step, []).append(self.phase)
        if not self.optimizer.state:
            self.without_moments.add(step)
        return 0 * sum(p.sum() for p in model.parameters())

    def train(self, *args, **kwargs):
        self.phases = {}
        self.without_moments = set()
        return super().train(*args, **kwargs)


# steps_per_generation, gradient_accumulation_steps, num_iterations, batches in an epoch
GRID = [*itertools.product([1, 3], [1, 2], [1], [1, 12])]
GRID += [(2, 1, 1, 12), (1, 8, 1, 1), (2, 8, 1, 3), (2, 1, 2, 3), (1, 4, 2, 3), (2, 3, 2, 1)]


@pytest.mark.parametrize("bupo_steps", [1, 2, 4])
@pytest.mark.parametrize("per_generation,accumulation,iterations,epoch", GRID)
def test_phases_are_those_of_a_plain_loop(
    tmp_path, monkeypatch, bupo_steps, per_generation, accumulation, iterations, epoch
):
    """For any way of accumulating, and wherever a run is stopped and resumed."""
    uses = per_generation * iterations
    wanted = plain_loop(bupo_steps, uses, accumulation, epoch)
    options = dict(bupo_steps=bupo_steps, bupo_layer=2, steps_per_generation=per_generation)
    options |= dict(gradient_accumulation_steps=accumulation, num_iterations=iterations)
    options |= dict(max_steps=7, save_strategy="steps", save_steps=3)
    args = BuPOConfig(output_dir=str(tmp_path), **(OPTIONS | options))
    data = prompts(epoch * 2 * per_generation + 1)  # one is left over

    def made():
        return Counting(build(**TIED), even, args, data, processing_class=TOKENIZER)

    if any(len(set(step)) > 1 for step in wanted):
        with pytest.raises(ValueError, match="are not whole optimizer steps of grad"):
            made()
        return
    rows = {"rows": torch.zeros(8 * per_generation, 1)}
    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", lambda *_: dict(rows))
    monkeypatch.setattr(GRPOTrainer, "create_model_card", lambda *_, **__: None)
    monkeypatch.setattr(gc, "collect", lambda: 0)  # half of the time, otherwise
    trainer = made()
    switch = {i for i in range(1, 7) if wanted[i - 1][0] < wanted[i][0]}
    trainer.train()
    assert list(trainer.phases.values()) == wanted[:7]
    assert trainer.without_moments == {0} | switch
    for step in 3, 6:
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert list(trainer.phases.values()) == wanted[step:7]
        assert trainer.without_moments == switch & set(range(step, 7))


# ---- adapters ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The directory of a tiny model, with a tokenizer."""
    return save(tmp_path_factory.mktemp("base"), build(**TIED))


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """The directory of an adapter to it that has learned something (random), without tokenizer."""
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", r=2)
    torch.manual_seed(5)
    lm = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
    for name, p in lm.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(p, std=0.3)
    directory = tmp_path_factory.mktemp("adapter")
    lm.save_pretrained(directory)
    return directory


def test_an_adapter_is_its_model(base, adapter):
    """To look at it is merged, and all weights can be trained."""
    lm = transformers.AutoModelForCausalLM.from_pretrained(base)
    wanted = peft.PeftModel.from_pretrained(lm, adapter)(TOKENS).logits
    model, tokenizer = load(adapter)
    torch.testing.assert_close(model(TOKENS), wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(wanted, load(base)[0](TOKENS), atol=0.1)
    assert tokenizer("1+1=").input_ids == [1, 10, 1, 13]
    assert all(p.requires_grad for p in model.parameters())
    assert not any("lora" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("use_peft", [True, False])
def test_training_goes_on_with_an_adapter(adapter, tmp_path, use_peft):
    options = dict(use_peft=use_peft, max_steps=2, beta=0.1)
    trainer, _ = minibupo_hf.train.make_trainer(arguments(adapter, tmp_path, **options))
    trainer.reward_funcs = [even]
    learned = load_file(adapter / "adapter_model.safetensors")
    before = weights(trainer)
    for name, weight in learned.items():
        name = name.replace(".weight", ".default.weight")
        assert torch.equal(before[name], weight)
    trainer.train()
    moved = differ(before, weights(trainer))
    assert moved and all(".default." in name for name in moved)
    trainer.save_model()
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved.keys() == learned.keys() and differ(learned, saved)


def test_adapters_that_are_refused(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "adapter_model.safetensors"
    learned = load_file(file)
    name = sorted(learned)[0]
    save_file({key: learned[key] for key in learned if key != name}, file)
    with pytest.raises(ValueError, match="no weights for .*lora_A"):
        load(tmp_path)
    save_file(learned | {name.replace("layers.0", "layers.7"): learned[name].clone()}, file)
    with pytest.raises(ValueError, match="has weights .*layers.7.*no place"):
        load(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace("base_model_name_or_path", "base"))
    with pytest.raises(ValueError, match="cannot read"):
        load(tmp_path)


# ---- models that TRL would score otherwise than it samples ---------------------------------------


@pytest.mark.parametrize("bupo_steps", [0, 1])
def test_a_model_that_needs_positions_is_not_trained(tmp_path, bupo_steps):
    """Though it can be looked at. What TRL computes of it differs by more than a nat."""
    lm = build("GPT2", **OPEN["GPT2"])
    padded = torch.cat([torch.zeros_like(TOKENS), TOKENS], dim=1)
    mask = torch.cat([torch.zeros_like(TOKENS), torch.ones_like(TOKENS)], dim=1)
    trl = lm.eval()(padded, attention_mask=mask).logits[:, 12:].log_softmax(-1)
    assert (HFModel(lm)(TOKENS).log_softmax(-1) - trl).abs().max() > 1
    options = dict(bupo_steps=bupo_steps, bupo_layer=2, max_steps=1)
    with pytest.raises(ValueError, match="GPT2LMHeadModel cannot be trained by TRL: it needs pos"):
        trained(tmp_path, lm=lm, **options)


# ---- tokenizers and chat templates ---------------------------------------------------------------


@pytest.mark.parametrize("family", ["Gemma", "Qwen3", "GPT2", "Llama"])
def test_a_directory_without_a_tokenizer(tmp_path, family):
    build(family, **OPEN[family]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="it has no tokenizer|instantiate the backend tokenizer"):
        load(tmp_path)


def sentencepiece():
    """A tokenizer like Llama 2's: it puts a BOS and a blank before a text."""
    ids = {c: i for i, c in enumerate(["<s>", "</s>", "<unk>", "▁", *"0123456789+=-ab\n"])}
    backend = Tokenizer(models.BPE(ids, [], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bos = TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    backend.post_processor = bos
    tokens = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)


def test_no_blank_between_prompt_and_response():
    tokenizer = sentencepiece()
    ids, prompt_len = encode_chat(tokenizer, "1+1=", "2")
    assert tokenizer.decode(ids) == "<s> 1+1=2"
    assert tokenizer.convert_ids_to_tokens(ids[prompt_len:]) == ["2"]
    ids, prompt_len = encode_chat(tokenizer, "1+1=", " 2")
    assert tokenizer.decode(ids) == "<s> 1+1= 2" and prompt_len == 6
    tokenizer.chat_template = "{% for m in messages %}b{{ m.content }}{% endfor %}a"
    ids, prompt_len = encode_chat(tokenizer, "1", "2")
    assert tokenizer.decode(ids) == "b1a2" and tokenizer.decode(ids[prompt_len:]) == "2"


PARTS = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}="


def test_a_text_that_nobody_wrote_is_refused():
    """Characters that the tokenizer lacks or changes, and chat templates for another prompt."""
    lower = sentencepiece()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    for tokenizer, template, prompt, response, says in [
        (sentencepiece(), None, "1+x=", "2", r"reads '1\+x=' as '<s> 1\+<unk>='"),
        (sentencepiece(), None, "1+1=", "x", r"reads .*1\+1=x' as .*<unk>"),
        (lower, None, "A", "2", "reads 'A' as '<s>a'"),
        (sentencepiece(), PARTS, "1+1=", "2", r"chat template makes '=' of '1\+1='"),
        (sentencepiece(), "{{ raise_exception('no\nuser') }}", "1", "2", "template fails: no user"),
        (sentencepiece(), "{{ messages[1].content }}", "1", "2", "the chat template fails: "),
        (sentencepiece(), "{% if", "1", "2", "the chat template fails: "),
    ]:
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match=says):
            encode_chat(tokenizer, prompt, response)
    with pytest.raises(ValueError, match="reads 'x' as"):
        encode_text(sentencepiece(), "x")


# ---- ends, and what stands before a token --------------------------------------------------------


def test_any_end_of_the_model_ends_a_response():
    lm = build(**TIED)
    sampled = HFModel(lm).generate(TOKENS, 6, temperature=0, eos_id=None).tokens[:, 12:].tolist()
    other = sampled[0][2]
    for ends in other, [36, other]:
        lm.generation_config.eos_token_id = ends
        model = HFModel(lm)
        found = model.generate(TOKENS, 6, temperature=0, eos_id=36)
        for row, end in zip(sampled, found.end.tolist()):
            lengths = [i for i, token in enumerate(row, 1) if token in (36, other)]
            assert end == 12 + min(lengths, default=6)
        assert found.end[0] < 18
        both = model.generate(TOKENS, 6, temperature=0, eos_id=[36, 35])
        assert (both.end <= found.end).all() and model.truncated(2).eos_ids == model.eos_ids
    assert model.generate(TOKENS, 6, temperature=0).end.tolist() == [18] * 4


def test_a_model_that_looks_ahead_is_refused():
    HFModel(build("Gemma3Text", head_dim=8))
    with pytest.raises(ValueError, match="what follows a token changes its logits"):
        HFModel(build("Gemma3Text", head_dim=8, use_bidirectional_attention=True))


LONGROPE = dict(rope_type="longrope", rope_theta=100.0, short_factor=[1.0] * 4)
LONGROPE |= dict(long_factor=[4.0] * 4, original_max_position_embeddings=16)


@torch.no_grad()
def test_longrope_is_used_up_to_where_it_changes():
    """Up to there a token more changes nothing before it, and the cache gives the same."""
    lm = build("Phi3", rope_parameters=LONGROPE, original_max_position_embeddings=16).eval()
    tokens = TOKENS.repeat(1, 2)
    model = HFModel(lm)
    assert model.context_length == 16
    torch.testing.assert_close(model(tokens[:, :15]), model(tokens[:, :16])[:, :15])
    sampled = model.generate(tokens[:, :10], 6, temperature=0).tokens
    assert torch.equal(sampled[:, 10:], model(sampled[:, :-1])[:, 9:].argmax(-1))
    beyond = lm(tokens[:, :17]).logits[:, :16]  # transformers' own turns all positions otherwise
    assert not torch.allclose(beyond, model(tokens[:, :16]), atol=0.1)
    with pytest.raises(ValueError, match="17 tokens are longer than context_length = 16"):
        model(tokens[:, :17])
    with pytest.raises(ValueError, match="a prompt of 10 and 7 new tokens outgrow"):
        model.generate(tokens[:, :10], 7)


DROPS = {
    "Qwen2": dict(attention_dropout=0.5),  # a number, used in training mode
    "GPTNeoX": dict(attention_dropout=0.5, hidden_dropout=0.5),  # and modules
}


@pytest.mark.parametrize("family", DROPS)
def test_no_dropout_in_the_ratio(tmp_path, family):
    """With a learning rate of 0 all ratios are 1."""
    lm = build(family, **DROPS[family])
    with torch.no_grad():
        one, other = (lm.train()(TOKENS).logits for _ in range(2))
    assert not torch.allclose(one, other, atol=0.1)
    bupo_steps = 1 if family == "Qwen2" else 0  # phase 1 refuses the other's parallel blocks
    options = dict(bupo_steps=bupo_steps, bupo_layer=2, max_steps=4, learning_rate=0.0)
    trainer = trained(tmp_path, lm=lm, **options)
    assert logged(trainer, "clip_ratio/region_mean") == [0] * 4


class Jitter(torch.nn.Module):
    """Noise in training mode that no option removes."""

    def forward(self, h):
        return h + self.training


def test_a_model_that_differs_in_training_mode_is_refused(tmp_path):
    lm = build(**TIED)
    lm.model.norm = torch.nn.Sequential(lm.model.norm, Jitter())
    with pytest.raises(ValueError, match="it gives other logits in training mode"):
        trained(tmp_path, lm=lm, max_steps=1)


# ---- runs ----------------------------------------------------------------------------------------


def test_the_card_of_a_model_names_bupo(tmp_path):
    once = dict(bupo_layer=2, max_steps=1, save_strategy="steps", save_steps=1)
    trained(tmp_path / "bupo", bupo_steps=1, **once)
    card = (tmp_path / "bupo" / "README.md").read_text()
    assert "trained with BuPO, a method introduced in [Bottom-up Policy Optimization" in card
    assert "- bupo" in card and "2512.19673" in card and "@article{tan2025bupo," in card
    trained(tmp_path / "grpo", bupo_steps=0, **once)
    card = (tmp_path / "grpo" / "README.md").read_text()
    assert "trained with GRPO" in card and "DeepSeekMath" in card and "tan2025" not in card


@pytest.mark.parametrize("sampling", [dict(temperature=0.9, top_p=0.6), dict(top_k=3)])
def test_weights_are_saved_with_any_sampling_in_generation_config(base, tmp_path, sampling):
    """Llama 2's says how to sample, but not that one should: transformers refuses to save that."""
    model = tmp_path / "model"
    shutil.copytree(base, model)
    file = model / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | sampling))
    out = tmp_path / "out"
    assert minibupo_hf.train.main(arguments(model, out, max_steps=1)) == 0
    assert load(out)[0].n_layer == 3
    saved = json.loads((out / "generation_config.json").read_text())
    assert saved | sampling == saved and saved["do_sample"] is True


def test_the_rule_where_it_has_little_to_go_by(tmp_path):
    """Responses without a limit; a second run of the same trainer; no finished response."""
    rule = dict(bupo_steps=1, max_steps=2)
    trainer = trained(tmp_path, max_completion_length=None, **rule)
    assert logged(trainer, "bupo/layer") == [trainer.layer]
    trainer.train()
    assert logged(trainer, "bupo/layer") == [trainer.layer]
    assert logged(trainer, "bupo/phase") == [1] and trainer.phase == 1
    with pytest.raises(NoLayerError, match="no response has finished: set bupo_layer"):
        trained(tmp_path, mask_truncated_completions=True, max_completion_length=1, **rule)


CODE = """
from transformers import Qwen3Config, Qwen3ForCausalLM
class MyConfig(Qwen3Config):
    model_type = "my"
class MyModel(Qwen3ForCausalLM):
    config_class = MyConfig
"""


def test_remote_code_is_run_only_if_it_is_trusted(base, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(base, model)
    (model / "my.py").write_text(CODE)
    config = json.loads((model / "config.json").read_text()) | {"model_type": "my"}
    config["auto_map"] = {"AutoConfig": "my.MyConfig", "AutoModelForCausalLM": "my.MyModel"}
    (model / "config.json").write_text(json.dumps(config))
    words = arguments(model, tmp_path, trust_remote_code=True)
    trainer, _ = minibupo_hf.train.make_trainer(words)
    assert type(trainer.model).__name__ == "MyModel"
    assert minibupo_hf.train.main(arguments(model, tmp_path)) == 2
    assert "trust_remote_code" in capsys.readouterr().err


# ---- what the command line says ------------------------------------------------------------------


@pytest.fixture(scope="module")
def wrong(base, tmp_path_factory):
    """A directory of data sets and models, each with something wrong."""
    root = tmp_path_factory.mktemp("wrong")
    chat = [{"role": "user", "content": "1+1="}]
    rows = dict(
        chat=chat,
        null=None,
        empty="",
        other="héllo",
        many=["1+1="],
        nobody=[chat[0] | {"content": None}],
    )
    rows = {name: {"prompt": prompt, "solution": "$2$"} for name, prompt in rows.items()}
    rows |= {
        "number": {"prompt": "1+1=", "solution": 2},
        "words": {"prompt": "1", "solution": "two"},
    }
    for name, row in rows.items():
        (root / name).mkdir()
        lines = [
            {"prompt": "1+1=" if name == "null" else row["prompt"], "solution": row["solution"]},
            row,
        ]
        (root / name / "train.json").write_text("\n".join(map(json.dumps, lines * 8)))
    (root / "nothing").mkdir()
    (root / "nothing" / "train.json").write_text("")
    shutil.copytree(root / "words", root / "one")
    (root / "one" / "train.json").write_text('{"prompt": "1+1=", "solution": "$2$"}')
    changes = {
        "no ends": lambda t: setattr(t, "eos_token", None),
        "many tokens": lambda t: t.add_tokens([f"<{i}>" for i in range(40)]),
        "no chat": lambda t: setattr(t, "chat_template", "{{ raise_exception('not this') }}"),
    }
    for name, change in changes.items():
        shutil.copytree(base, root / name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(base)
        change(tokenizer)
        tokenizer.save_pretrained(root / name)
    (root / "bad.yaml").write_text("a: [")
    return root


ERRORS = [
    (dict(dataset_name="chat"), "prompt 0 of the data set: a chat needs a tokenizer with a chat"),
    (dict(dataset_name="chat", model_name_or_path="no chat"), "chat template fails: not this"),
    (dict(dataset_name="nobody", model_name_or_path="no chat"), "the chat template"),
    (dict(dataset_name="null"), "prompt 1 of the data set: it must be a text or a chat, not None"),
    (dict(dataset_name="empty"), "it must be a text or a chat, not ''"),
    (dict(dataset_name="many"), "it must be a text or a chat, not ['1+1=']"),
    (dict(dataset_name="other"), "the tokenizer reads 'héllo' as "),
    (dict(dataset_name="number"), "a solution must be text like '$72$', not 2"),
    (dict(dataset_name="words"), "math-verify reads none of the first solutions, like ['two']"),
    (dict(dataset_name="nothing"), "cannot read data set"),
    (dict(dataset_name="one"), "a batch of rollouts needs 2 prompts, there are 1"),
    (dict(model_name_or_path="no ends"), "the tokenizer has no EOS token"),
    (dict(model_name_or_path="many tokens"), "the tokenizer has 56 tokens, the model only 37"),
    (dict(max_completion_length=61), "has 4 tokens: with max_completion_length = 61 they outgrow"),
    (dict(max_completion_length=0), "max_completion_length must be at least 1, not 0"),
    (dict(temperature=0), "temperature must be above 0, not 0.0"),
    (dict(temperature="nan"), "temperature must be a number, not nan"),
    (dict(learning_rate="nan"), "learning_rate must be a number, not nan"),
    (dict(num_generations=0), "num_generations must be at least 1, not 0"),
    (dict(per_device_train_batch_size=0), "per_device_train_batch_size must be at least 1, not 0"),
    (dict(gradient_accumulation_steps=0), "gradient_accumulation_steps must be at least 1, not 0"),
    (dict(max_steps=0), "leave no step to train"),
    (dict(eval_problems=0), "eval_problems must be at least 1, not 0"),
    (dict(steps_per_generation=3, gradient_accumulation_steps=2), "are not whole optimizer steps"),
    (dict(ignore_data_skip=True), "with ignore_data_skip"),
    (dict(report_to="wandb"), "report_to wandb: it is not installed"),
    (dict(optim="adamw_bnb_8bit"), "bitsandbytes"),
    (dict(use_liger_kernel=True), "liger"),
    (dict(learning_rate=-1.0), "Invalid learning rate: -1.0"),
    (dict(top_k=-5), "top_k"),
    (dict(loss_type="foo"), "Unknown loss type: foo"),
    (dict(lora_dropout=0.1), "lora_dropout is not for minibupo_hf.train"),
    (dict(resume_from_checkpoint="nowhere"), "Can't find a valid checkpoint at nowhere"),
    (dict(config="bad.yaml"), "the file of --config is not YAML"),
    (dict(config="no.yaml"), "No such file or directory"),
    (dict(output_dir="bad.yaml"), "File exists"),
    (dict(dataset_streaming=True), "not used"),
]


@pytest.mark.parametrize("options,says", ERRORS)
def test_a_user_error_is_one_sentence(base, wrong, tmp_path, capsys, monkeypatch, options, says):
    monkeypatch.chdir(wrong)
    monkeypatch.setattr(gc, "collect", lambda: 0)
    assert minibupo_hf.train.main(arguments(base, tmp_path, **options)) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("minibupo_hf.train: ") and says in last


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyError("a bug"), RuntimeError("a bug")])
def test_a_bug_keeps_its_traceback(base, tmp_path, monkeypatch, error):
    def buggy(self):
        raise error

    monkeypatch.setattr(BuPOTrainer, "_begin_batch", buggy)
    with pytest.raises(type(error), match="a bug"):
        minibupo_hf.train.main(arguments(base, tmp_path, max_steps=1))


def test_a_ratio_does_not_overflow(tmp_path):
    """A confident internal policy moves far in one update: exp of the log-ratio would be inf."""
    lm = build(**TIED)
    with torch.no_grad():  # raw policies become confident, and pi_theta stays as it is
        lm.get_input_embeddings().weight.mul_(100)
        lm.model.norm.weight.div_(100)
    options = dict(bupo_layer=2, bupo_steps=2, max_steps=4, learning_rate=1e-2)
    trainer = trained(tmp_path, lm=lm, **options)
    moved = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert max(moved) > 1e6  # it did move far, to the limit of e^20
    assert all(bool(weight.isfinite().all()) for weight in lm.parameters())


def test_what_math_verify_accepts():
    """As README says: an answer in a box; the solution may be bare."""
    reward = minibupo_hf.train.right_mathematics
    answers = [
        r"\boxed{72}",
        r"It is \boxed{72.0}.",
        "72",
        "$72$",
        "The answer is 72.",
        r"\boxed{7}",
    ]
    for solution in "72", "$72$", r"\boxed{72}", "#### 72":
        assert reward(answers, solution=[solution] * 6) == [1, 1, 0, 0, 0, 0]
    assert reward(answers[:2], solution=["seventy-two", 72]) == [None, None]


# ---- the final norm ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family,wanted",
    [
        ("Llama", lambda norm: norm.weight),
        ("Gemma", lambda norm: 1 + norm.weight),
        ("Gemma3Text", lambda norm: 1 + norm.weight),
        ("Olmo", lambda norm: torch.ones(32)),  # has no weight
        ("GPT2", lambda norm: norm.weight),  # takes the mean away, and has a bias
    ],
)
def test_what_the_final_norm_does_is_measured(family, wanted):
    model = HFModel(build(family, **OPEN.get(family, dict(head_dim=8))))
    scales = wanted(model.final_norm)
    torch.testing.assert_close(norm_scales(model), scales, rtol=1e-3, atol=1e-3)


# ---- what bupo_trainer.py needs of TRL -----------------------------------------------------------

PRIVATE = {  # methods of GRPOTrainer that TRL may change without notice, and their first parameters
    "_generate_and_score_completions": ["self", "inputs"],
    "_get_per_token_logps_and_entropies": [
        *["self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"]
    ],
}
ATTRIBUTES = ["_step", "_buffered_inputs", "_metrics", "num_iterations", "num_generations"]
ATTRIBUTES += ["vllm_importance_sampling_correction", "max_completion_length"]
ATTRIBUTES += ["_name", "_paper", "_tag_names"]
RELIED_ON = "self._step % generate_every == 0 or self._buffered_inputs is None"


def test_trl_still_has_what_the_trainer_stands_on(tmp_path):
    at = f"TRL {trl.__version__}: bupo_trainer.py stands on GRPOTrainer"
    for name, wanted in PRIVATE.items():
        method = getattr(GRPOTrainer, name, None)
        assert method, f"{at}.{name}, which is gone"
        found = list(inspect.signature(method).parameters)
        assert found[: len(wanted)] == wanted, f"{at}.{name}{tuple(wanted)}, not {tuple(found)}"
    options = OPTIONS | dict(max_steps=1)
    args = trl.GRPOConfig(output_dir=str(tmp_path), **options)
    trainer = GRPOTrainer(build(**TIED), even, args, prompts(8), processing_class=TOKENIZER)
    for name in ATTRIBUTES:
        assert hasattr(trainer, name), f"{at}.{name}, which is gone"
    assert trainer._step == 0 and trainer._buffered_inputs is None, f"{at} that counts from 0"
    source = inspect.getsource(GRPOTrainer._prepare_inputs)
    assert RELIED_ON in source, f"{at}._prepare_inputs, which no longer samples where `{RELIED_ON}`"
