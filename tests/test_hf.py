"""hf/: HFModel against transformers, BuPOTrainer against minibupo.policy_loss, the command line.

All models are tiny and random. Nothing is downloaded.
"""

# ruff: noqa: E402 - imports come after the check that the extra is there

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for package in ("transformers", "trl", "datasets", "peft", "gguf"):
    pytest.importorskip(package, reason=f'{package} is not installed: pip install -e ".[hf]"')

import gguf
import transformers
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import T5Config, T5ForConditionalGeneration
from trl import GRPOConfig, GRPOTrainer

import analyze
import hf.train
import minibupo as m
from experiments import language_models, trl_peer
from hf.adapter import HFModel, encode_chat, encode_text, load, truncated
from hf.bupo_trainer import BuPOConfig, BuPOTrainer
from model import GPT, GPTConfig

ROOT = Path(__file__).parent.parent
SIZES = dict(vocab_size=37, hidden_size=32, intermediate_size=40, num_hidden_layers=3)
SIZES |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
SIZES |= dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
LLAMA3 = dict(rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0)
LLAMA3 |= dict(high_freq_factor=4.0, original_max_position_embeddings=16)
TIED = dict(head_dim=8, tie_word_embeddings=True)
OPEN = dict.fromkeys(("Llama", "SmolLM3", "Phi3", "Olmo2"), {}) | {
    "Qwen3": TIED,
    "Qwen2": dict(tie_word_embeddings=True, attention_dropout=0.5),
    "Llama 3": dict(rope_parameters=LLAMA3),
    "Mistral": dict(sliding_window=4),
    "Gemma": dict(head_dim=8),
    "Qwen3Moe": dict(head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2),
    "GPT2": dict(n_layer=3, n_head=4, n_embd=32),
}
TOKENS = torch.randint(0, 37, (4, 12), generator=torch.Generator().manual_seed(1))
TOKENIZER = trl_peer.tokenizer()  # of the toy's characters


def build(family="Qwen3", seed=0, **changes):
    """A tiny random model of transformers; norms and biases are random, too."""
    torch.manual_seed(seed)
    config = getattr(transformers, family.split()[0] + "Config")(**(SIZES | changes))
    lm = transformers.AutoModelForCausalLM.from_config(config)
    for p in lm.parameters():
        torch.nn.init.normal_(p, *((1.0, 0.3) if p.dim() == 1 else (0.0, 32**-0.5)))
    return lm


def save(path, lm):
    """As transformers saves a model and its tokenizer."""
    lm.save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"), build(**TIED))


# ---- adapter -------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", OPEN)
def test_contract(family):
    lm = build(family, **OPEN[family]).eval()
    theirs = lm(TOKENS, output_hidden_states=True)
    model = HFModel(lm.train())  # has no dropout all the same
    assert torch.equal(model(TOKENS), theirs.logits)
    assert (model.n_layer, model.vocab_size) == (3, 37)
    for l, t in enumerate(model.trace(TOKENS), 1):
        assert torch.equal(t.resid_pre, theirs.hidden_states[l - 1])
        assert torch.equal(t.resid_post, model.residual(TOKENS, l))
        torch.testing.assert_close(t.resid_pre + t.attn_out + t.mlp_out, t.resid_post)
        with pytest.raises(ZeroDivisionError), truncated(lm, l):
            assert torch.equal(lm(TOKENS).logits, model.unembed(t.resid_post))
            raise ZeroDivisionError
    assert torch.equal(model.final_norm(t.resid_post), theirs.hidden_states[-1])
    assert torch.equal(lm(TOKENS).logits, theirs.logits)  # whole again after the errors

    # Ragged prompts give what each gives alone.
    lengths = [5, 3, 4]
    many = model.generate(TOKENS[:3, :5], 6, temperature=0, prompt_len=lengths, num_samples=2)
    for i, n in enumerate(lengths):
        prompt = TOKENS[i : i + 1, :n]
        given = dict(attention_mask=torch.ones_like(prompt), pad_token_id=0)
        alone = lm.generate(prompt, max_new_tokens=6, do_sample=False, **given)
        assert torch.equal(many.tokens[2 * i + 1, : n + 6], alone[0])

    # A truncated model has the same weights, and says what its policy says.
    short, h = model.truncated(2), model.residual(TOKENS, 2)
    assert {id(p) for p in short.parameters()} <= {id(p) for p in model.parameters()}
    assert torch.equal(short(TOKENS), model.unembed(h)) and torch.equal(short.final_norm(h), h)
    assert len(list(short.trace(TOKENS))) == short.n_layer == 2
    said = short.generate(TOKENS[:, :5], 6, temperature=0).tokens
    assert torch.equal(said[:, 5:], m.policy_logits(model, said, m.Policy(2))[:, 4:-1].argmax(-1))


def test_what_cannot_be_is_refused_in_a_sentence():
    model, doubled, outside = HFModel(build(**TIED)), build("Llama"), torch.tensor([[3, 37]])
    doubled.model.layers[1].register_forward_hook(lambda *args: 2 * args[-1])
    with truncated(model.lm, 1), pytest.raises(ValueError, match="no list of 3 blocks"):
        HFModel(model.lm)
    for call, says in [
        (lambda: build("Gemma2", head_dim=8, final_logit_softcapping=3e2), "scaled or capped"),
        (lambda: build("Granite", logits_scaling=3.0), "other logits"),
        (lambda: build("GPTNeoX"), "attention of layer 1"),  # its blocks are parallel
        (lambda: doubled, "FFN of layer 2"),
        (lambda: build("OPT", ffn_dim=40, word_embed_proj_dim=32), "no attention and FFN by name"),
        (lambda: T5ForConditionalGeneration(T5Config(**SIZES)), "no decoder-only language model"),
        (lambda: truncated(model.lm, -1).__enter__(), r"0\.\.3, not -1"),
        (lambda: truncated(model.lm, 4).__enter__(), r"0\.\.3, not 4"),
        (lambda: model.truncated(0), r"1\.\.3, not 0"),
        (lambda: model(outside), "token id 37"),
        (lambda: model.residual(outside, 1), "token id 37"),
    ]:
        with pytest.raises(ValueError, match=says):
            HFModel(call())


@torch.no_grad()
def test_our_block_is_qwen3():
    """GPT and HFModel on the same weights: stream, writes and logits are equal to 1e-5."""
    lm = build(tie_word_embeddings=True, head_dim=12, rms_norm_eps=1e-3)
    sizes = dict(n_layer=3, d_model=32, n_kv_head=2, head_dim=12, d_mlp=40, norm_eps=1e-3)
    gpt = GPT(GPTConfig(37, 64, rope_theta=lm.config.rope_parameters["rope_theta"], **sizes))
    trl_peer.from_qwen3(gpt, lm)
    model, close = HFModel(lm), dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gpt(TOKENS), model(TOKENS), **close)
    for ours, theirs in zip(gpt.trace(TOKENS), model.trace(TOKENS)):
        torch.testing.assert_close(tuple(ours), tuple(theirs), **close)


# ---- reading -------------------------------------------------------------------------------------


def test_load_a_directory_and_encode(directory):
    model, tokenizer = load(directory)
    assert torch.equal(model(TOKENS), HFModel(build(**TIED))(TOKENS))
    assert {p.dtype for p in load(directory, dtype="bfloat16")[0].parameters()} == {torch.bfloat16}
    both = TemplateProcessing("<eos> $A <eos>", special_tokens=[("<eos>", 14)])
    tokenizer.backend_tokenizer.post_processor = both
    assert encode_chat(tokenizer, "1+1=", "2") == ([14, 1, 10, 1, 13, 2], 5)
    assert encode_text(tokenizer, "12") == [14, 1, 2]
    turns = "{% for m in messages %}={{ m.content }}{% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}-{% endif %}"
    assert encode_chat(tokenizer, "1", "-2") == ([13, 1, 11, 11, 2], 3)  # the border stays


def test_gguf(tmp_path, monkeypatch):
    """A Llama with the names that llama.cpp's converter gives, but not its order of rows."""
    lm = build("Llama", rms_norm_eps=1e-5)
    values = dict(block_count=3, context_length=64, embedding_length=32, feed_forward_length=40)
    values |= dict(head_count=4, head_count_kv=2, layer_norm_rms_eps=1e-5, tokenizer_model="gpt2")
    values |= dict(token_list=[*map(chr, range(97, 133)), "ab"], token_merges=["a b"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    tensors = {names.get_name(n, [".weight"]): p for n, p in lm.named_parameters()}
    for file, more in ("qwen", {}), ("llama3", {"rope_freqs.weight": torch.ones(4)}):
        w = gguf.GGUFWriter(tmp_path / f"{file}.gguf", "llama")
        for name, value in values.items():
            getattr(w, f"add_{name}")(value)
        for name, tensor in (tensors | more).items():
            w.add_tensor(name, tensor.detach().numpy())
        for part in ("header", "kv_data", "tensors"):
            getattr(w, f"write_{part}_to_file")()
        w.close()
    found = load(tmp_path / "qwen.gguf")[0].lm
    ours, theirs = (model.model.layers[1].mlp.up_proj.weight for model in (found, lm))
    assert torch.equal(ours, theirs)
    found.save_pretrained(tmp_path / "saved")  # refused of what transformers thinks is quantised
    with pytest.raises(ValueError, match="rope_freqs"):
        load(tmp_path / "llama3.gguf")
    monkeypatch.setattr(language_models, "CACHE", tmp_path)
    with pytest.raises(ValueError, match="has SHA-256 .*: delete it and fetch it"):
        language_models.fetch("qwen")


def test_analyze_looks_into_a_language_model(directory, tmp_path, capsys):
    for line in (
        "entropy --text 23",
        "writes --text 23",
        "lens --text 23",
        "sample --layer 2",
        "step --layer 2 --responses 23 31 --rewards 1 0",
    ):
        command, *options = line.split()
        options += ["--prompt", "1+1=", "--out", str(tmp_path), "--device", "cpu"]
        assert analyze.main([command, str(directory), *options]) == 0
    assert '"said":["2","3"]' in (tmp_path / "lens.html").read_text()
    tokens, mask = torch.tensor([[1, 10, 1, 13, 2, 3]]), torch.tensor([[0, 0, 0, 1, 1]]).bool()
    measured = m.look_inside(HFModel(build(**TIED)), tokens, mask)["layer"].mean(1).tolist()
    assert json.loads((tmp_path / "entropy.json").read_text())["layer"] == pytest.approx(measured)
    said = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("  '") for line in said) == 8
    (norms,) = (line.split() for line in said if "lm.model.norm" in line)
    assert norms[-2] == "none" and float(norms[-1]) > 0
    assert analyze.main(["entropy", str(directory), "1+1=", "--checkpoint", "base"]) == 2


# ---- the trainer ---------------------------------------------------------------------------------

OPTIONS = dict(use_cpu=True, bf16=False, gradient_checkpointing=False, seed=3, logging_steps=1)
OPTIONS |= dict(disable_tqdm=True, save_strategy="no", lr_scheduler_type="constant")
OPTIONS |= dict(per_device_train_batch_size=8, num_generations=4, max_completion_length=12)
OPTIONS |= dict(steps_per_generation=2, loss_type="bnpo", learning_rate=1e-2, weight_decay=0.1)


def even(completion_ids, **_):
    """The reward: how many of its tokens are even."""
    return [sum(i % 2 == 0 for i in ids) / 12 for ids in completion_ids]


def trained(out, trainer=BuPOTrainer, lm=None, **options):
    """The trainer after training."""
    config = GRPOConfig if trainer is GRPOTrainer else BuPOConfig
    args = config(output_dir=str(out), **(OPTIONS | options))
    data = Dataset.from_dict({"prompt": [f"{i}+{i % 7}=" for i in range(48)]})
    given = dict(processing_class=TOKENIZER, train_dataset=data)
    trainer = trainer(lm or build(**TIED), even, args, **given)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    return trainer


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def differ(a, b):
    return {name for name in a if not torch.equal(a[name], b[name])}


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def rows_of(*batches):
    """The rows of mini-batches of TRL's as minibupo has them: tokens from the left, and mask."""
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    columns = (torch.cat([batch[name] for batch in batches]) for name in names)
    rows = [(p[a == 1], c[b == 1]) for p, a, c, b in zip(*columns)]
    tokens = torch.nn.utils.rnn.pad_sequence([torch.cat(row) for row in rows], batch_first=True)
    prompt_len, end = torch.tensor([[len(p), len(p) + len(c)] for p, c in rows]).T
    return tokens, m.response_mask(prompt_len, end, tokens.shape[1])


class Compared(BuPOTrainer):
    """Compares loss and gradients of every mini-batch with policy_loss's on a copy of the model.
    Keeps its rows and what holds for it."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if not model.training:
            return loss
        copied = type(self.model)(self.model.config)
        copied.load_state_dict(self.model.state_dict())
        copied.get_input_embeddings().padding_idx = None  # as when the first was made
        now = HFModel(copied)
        if self.state.global_step % 4 == 0:  # a batch of rollouts serves four steps
            self.then, self.seen = now, getattr(self, "seen", [])
        policy = m.Policy(self.layer) if self.phase == 1 else m.FULL
        (tokens, mask), last = rows_of(inputs), (policy, self.temperature)
        old = m.token_logprobs(self.then, tokens, mask, *last).detach()
        average = {"bnpo": "token", "grpo": "sequence"}[self.loss_type]
        rows = (tokens, old, inputs["advantages"], mask, *last)
        ours, _ = m.policy_loss(now, *rows, average=average)
        torch.testing.assert_close(loss, ours, rtol=1e-4, atol=1e-5)
        options = dict(retain_graph=True, allow_unused=True)
        grads = torch.autograd.grad(ours, list(now.lm.parameters()), **options)
        theirs = torch.autograd.grad(loss, list(self.model.parameters()), **options)
        atol = 1e-4 * max(float(g.abs().max()) for g in grads if g is not None)
        torch.testing.assert_close(theirs, grads, rtol=1e-3, atol=atol)  # None where it is None
        moments = {int(state["step"]) for state in self.optimizer.state.values()}
        vllm = self.vllm_importance_sampling_correction
        self.seen.append((inputs, self.phase, moments, vllm, weights(self)))
        return loss


CASES = [  # family, tied, options
    ("Qwen3", True, dict(temperature=0.7, steps_per_generation=4, gradient_checkpointing=True)),
    ("Llama", False, dict(temperature=1.3, num_iterations=2, loss_type="grpo")),
]


@pytest.mark.parametrize("family,tied,options", CASES)
def test_trainer_is_minibupo(tmp_path, family, tied, options):
    """A batch of phase 1, with the layer by the rule, and two of phase 2."""
    lm, copied = (build(family, head_dim=8, tie_word_embeddings=tied) for _ in range(2))
    trainer = trained(tmp_path, Compared, lm, bupo_steps=1, max_steps=12, **options)
    inputs, phases, moments, vllm, states = zip(*trainer.seen)
    assert phases == (1,) * 4 + (2,) * 8
    assert moments == (set(), {1}, {2}, {3}, set(), {1}, {2}, {3}, {4}, {5}, {6}, {7})
    assert vllm == (False,) * 4 + (True,) * 8
    ratio = "clip_ratio/region_mean"
    assert max(logged(trainer, ratio)[1:4]) > 0  # other weights than at the rollouts

    batch = rows_of(*inputs[: trainer.args.steps_per_generation])
    d_mlp = m.look_inside(HFModel(copied), *batch)["d_mlp"].mean(1)
    assert logged(trainer, "bupo/d_mlp") == [pytest.approx(d_mlp.tolist(), rel=1e-4, abs=1e-4)]
    assert [trainer.layer] == [m.target_layer(d_mlp)] == logged(trainer, "bupo/layer")

    # What is above the layer stays in phase 1, under weight decay.
    below = tuple(f"model.layers.{i}" for i in range(trainer.layer)) + ("model.embed", "lm_head")
    names = states[0].keys()
    assert differ(states[0], states[4]) == {name for name in names if name.startswith(below)}
    assert differ(states[4], states[11]) == names
    for trainer.phase in (1, 2):  # evaluation is pi_theta's in both
        torch.manual_seed(0)
        trainer.evaluate(trainer.train_dataset.select(range(2)))
    one, two = logged(trainer, "eval_entropy")
    assert one == pytest.approx(two)


def test_no_steps_is_grpo(tmp_path):
    # each seeds torch's generator when it is made
    grpo, bupo = (trained(tmp_path, t, max_steps=4) for t in (GRPOTrainer, BuPOTrainer))
    assert not differ(weights(grpo), weights(bupo))
    for name in ("loss", "entropy", "reward"):
        assert logged(grpo, name) == logged(bupo, name)


def test_resume_goes_on_as_if_never_stopped(tmp_path):
    """With the layer by the rule, stopped in phase 1 and exactly at the switch."""
    options = dict(bupo_steps=2, max_steps=6, save_strategy="steps", save_steps=2)
    options |= dict(gradient_accumulation_steps=2, steps_per_generation=4)
    whole = trained(tmp_path, **options)

    def resumed(step):
        options["resume_from_checkpoint"] = tmp_path / f"checkpoint-{step}"
        return trained(tmp_path / "again", lm=build(seed=9, **TIED), **options)

    for step, layer in (2, whole.layer), (4, None):
        again = resumed(step)
        assert not differ(weights(whole), weights(again)) and again.layer == layer
    # what the log says counts, not what the rule would say now
    file = tmp_path / "checkpoint-2" / "trainer_state.json"
    file.write_text(file.read_text().replace(f'"bupo/layer": {whole.layer}', '"bupo/layer": 3'))
    assert resumed(2).layer == 3


# ---- the command line, and two processes ---------------------------------------------------------


def arguments(directory, out, **options):
    """The words of a command line; an option that is None is left out."""
    options = dict(bupo_layer=2, bupo_steps=1, max_steps=4, steps_per_generation=1) | options
    options = OPTIONS | dict(model_name_or_path=directory, output_dir=out) | options
    given = {f"--{name}": str(value) for name, value in options.items() if value is not None}
    return [word for option in given.items() for word in option]


def test_command_line(directory, tmp_path):
    options = dict(eval_strategy="steps", eval_steps=2, eval_problems=8, beta=0.1)
    assert hf.train.main(arguments(directory, tmp_path, **options)) == 0
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [entry["bupo/phase"] for entry in log if "bupo/phase" in entry] == [1, 2, 2, 2]
    assert [entry["step"] for entry in log if "eval_reward" in entry] == [2, 4]
    kl = [entry["kl"] for entry in log if "kl" in entry]
    assert kl[0] == 0 and kl[1] > 0  # between internal policies, then between whole ones
    assert load(tmp_path)[0].n_layer == 3


def test_command_line_with_a_data_set_and_adapters(directory, tmp_path):
    """LoRA moves only adapters up to the layer."""
    (tmp_path / "train.json").write_text('{"prompt": "1+1=", "solution": "$2$"}\n' * 8)
    options = dict(dataset_name=tmp_path, dtype="bfloat16", use_peft=True, bupo_steps=4)
    trainer, _ = hf.train.make_trainer(arguments(directory, tmp_path, **options))
    assert trainer.reward_func_names == ["accuracy_reward"]
    assert trainer.model.get_input_embeddings().weight.dtype == torch.bfloat16
    trainer.reward_funcs = [even]  # a random model earns nothing else
    before = weights(trainer)
    trainer.train()
    moved = differ(before, weights(trainer))
    assert moved and all("lora" in name for name in moved)
    assert {name.split("layers.")[1][0] for name in moved} == {"0", "1"}


class OnDeepSpeed(BuPOTrainer):
    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.is_deepspeed_enabled = True


def test_errors_are_one_sentence(directory, tmp_path, capsys, monkeypatch):
    """It says what is wrong, and the remedy where that is not the same."""
    (tmp_path / "train.json").write_text('[{"prompt": "1+1="}]')
    (tmp_path / "base.pt").write_bytes(b"PK")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF")
    narrow, part = build(**TIED), build(**TIED)
    for layer in narrow.model.layers:
        layer.mlp.down_proj.weight.data *= 100  # loud writes: every FFN narrows
    del part.model.layers[1].mlp.up_proj
    for name, lm in dict(narrow=narrow, part=part, parallel=build("GPTNeoX")).items():
        save(tmp_path / name, lm)

    def said(**options):
        capsys.readouterr()
        assert hf.train.main(arguments(directory, tmp_path, **options)) == 2
        return capsys.readouterr().err.splitlines()[-1].removeprefix("hf.train: ")

    for options, says in [
        (dict(bupo_steps=-1), "bupo_steps must be 0 or more, not -1"),
        (dict(bupo_layer=4), "bupo_layer must be in 1..3, not 4"),
        (dict(bupo_layer=0), "bupo_layer must be in 1..3, not 0"),
        (dict(use_vllm=True, off_policy_mask_threshold=0.1), "off_policy_mask_threshold"),
        (dict(gradient_checkpointing_kwargs='{"use_reentrant": true}'), "use_reentrant=False"),
        (dict(model_name_or_path=None), "--model_name_or_path is missing"),
        (dict(model_name_or_path=tmp_path / "nothing"), "transformers cannot read"),
        (dict(model_name_or_path=tmp_path / "base.pt"), "only a .gguf"),
        (dict(model_name_or_path=tmp_path / "cut.gguf"), "transformers cannot read"),
        (dict(model_name_or_path=tmp_path / "part"), "no weights for model.layers.1.mlp.up_proj"),
        (dict(model_name_or_path=tmp_path / "parallel"), "GPTNeoXForCausalLM cannot be laid open"),
        (dict(model_name_or_path=tmp_path / "narrow", bupo_layer=None), "choose one with bupo_l"),
        (dict(operations="/"), "operations must be some of + - *"),
        (dict(dataset_name=tmp_path / "no-data"), "there is no data set"),
        (dict(dataset_name=tmp_path, dataset_train_split="x"), "has no split x, only train"),
        (dict(dataset_name=tmp_path), "has no column 'solution', only prompt"),
    ]:
        assert says in said(**options)
    monkeypatch.setattr(hf.train, "BuPOTrainer", OnDeepSpeed)
    assert "set weight_decay 0" in said()
    hf.train.make_trainer(arguments(directory, tmp_path, weight_decay=0.0))  # is not refused
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert 'pip install -e ".[hf]"' in said()
    code = "import trl; trl.__version__ = '1.15.3'; import hf.train"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.stderr.startswith('hf.train needs pip install -e ".[hf]"') and "1.15.3" in run.stderr


def test_arithmetic_holds_problems_out():
    train, held_out = hf.train.arithmetic(1, "+*")
    assert len(train) + len(held_out) == 198 and len(held_out) == 39  # less two worked examples
    assert not set(train["prompt"]) & set(held_out["prompt"])
    for row in [*train, *held_out]:
        question = row["prompt"].split("\n")[-1]
        assert row["prompt"] == f"3+4=7\n2*4=8\n{question}"
        assert row["answer"] == str(eval(question[:-1]))
    assert hf.train.right_answer(["7\n3", " 7", "77", ""], ["7"] * 4) == [1, 1, 0, 0]
    assert all(len(p) == 15 for p in hf.train.arithmetic(2, "-")[1]["prompt"][:99])


def one_of_two(argv):
    """What each process of the next test does: DDP by hf.train, then FSDP2 beside one process."""
    torch.set_num_threads(1)
    trainer, _ = hf.train.make_trainer(argv)
    trainer.reward_funcs = [even]
    before = weights(trainer)
    trainer.train()
    both = [None, None]
    ours = (trainer.layer, logged(trainer, "bupo/d_mlp"), weights(trainer))
    torch.distributed.all_gather_object(both, ours)
    (layer, d_mlp, after), other = both
    assert trainer.accelerator.num_processes == 2
    assert 1 <= layer < 3 and other[:2] == (layer, d_mlp)
    assert not differ(after, other[2]) and differ(before, after) == before.keys()

    alone, sharded = build(**TIED), build(**TIED)
    mesh = init_device_mesh("cpu", (2,))  # by itself it may choose a GPU that is not to be seen
    for module in (*sharded.model.layers, sharded):
        fully_shard(module, mesh=mesh)
    for lm, rows in (alone, TOKENS), (sharded, TOKENS.chunk(2)[torch.distributed.get_rank()]):
        optimizer = torch.optim.SGD(lm.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        for layer in (2, 3, 2):  # phase 1, phase 2, phase 1
            with truncated(lm, layer) if layer < 3 else torch.enable_grad():
                loss = lm(input_ids=rows, labels=rows).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for (name, p), whole in zip(sharded.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), whole, rtol=1e-5, atol=1e-6, msg=name)
    torch.distributed.barrier()  # neither leaves while the other may still need it
    torch.distributed.destroy_process_group()


def test_two_processes(directory, tmp_path):
    """DDP over gloo: layer by the rule, accumulation, weight decay, checkpointing, both phases.
    FSDP2 on two processes does what one process does, also where layers have no gradient."""
    options = dict(steps_per_generation=2, gradient_accumulation_steps=2, max_steps=3)
    # with this seed the two do not sample equally many tokens
    options |= dict(gradient_checkpointing=True, bupo_layer=None, use_cpu=None, seed=5)
    words = "-m torch.distributed.run --nproc_per_node 2 --rdzv_backend c10d".split()
    words += "--rdzv_endpoint 127.0.0.1:0 --local_addr 127.0.0.1 -m tests.test_hf".split()
    words += arguments(directory, tmp_path, **options)
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    given = dict(env=env, cwd=ROOT, capture_output=True, text=True)
    run = subprocess.run([sys.executable, *words], **given)
    assert run.returncode == 0, run.stderr[-3000:]


if __name__ == "__main__":
    one_of_two(sys.argv[1:])
