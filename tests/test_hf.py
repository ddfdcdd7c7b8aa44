"""hf/: HFModel against transformers, BuPOTrainer against minibupo.policy_loss, the command line.

All models are tiny and random. Nothing is downloaded.
"""

# ruff: noqa: E402 - imports come after the check that the extra is there

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

for package in ("transformers", "trl", "datasets", "peft", "gguf"):
    pytest.importorskip(package, reason=f'{package} is not installed: pip install -e ".[hf]"')

import gguf
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from trl import GRPOConfig, GRPOTrainer

import analyze
import hf.bupo_trainer
import hf.train
import minibupo as m
from experiments import language_models
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
REFUSED = {  # model, changes, what is said
    "softcap": ("Gemma2", dict(head_dim=8), "H\\^L gives other logits"),
    "mild softcap": ("Gemma2", dict(head_dim=8, final_logit_softcapping=3e2), "scaled or capped"),
    "logit scale": ("Granite", dict(logits_scaling=3.0), "H\\^L gives other logits"),
    "scaled writes": ("Granite", dict(residual_multiplier=0.3), "attention of layer 1 adds"),
    "scaled block": ("Llama", dict(), "the FFN of layer 2 adds"),
    "parallel blocks": ("GPTNeoX", dict(), "attention of layer 1 adds"),
    "no FFN": ("OPT", dict(ffn_dim=40, word_embed_proj_dim=32), "no attention and FFN by name"),
    "encoder": ("T5", dict(), "no decoder-only language model"),
}


def build(family="Qwen3", seed=0, **changes):
    """A tiny random model of transformers; norms and biases are random, too."""
    torch.manual_seed(seed)
    family = family.split()[0]
    config = getattr(transformers, family + "Config")(**(SIZES | changes))
    heads = [family + kind for kind in ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")]
    lm = next(getattr(transformers, name) for name in heads if hasattr(transformers, name))(config)
    for p in lm.parameters():
        torch.nn.init.normal_(p, *((1.0, 0.3) if p.dim() == 1 else (0.0, 32**-0.5)))
    return lm


TOKENS = torch.randint(0, 37, (4, 12), generator=torch.Generator().manual_seed(1))


# ---- adapter -------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", OPEN)
def test_contract(family):
    lm = build(family, **OPEN[family])
    theirs = lm.eval()(TOKENS, output_hidden_states=True)
    model = HFModel(lm.train())  # has no dropout all the same
    assert torch.equal(model(TOKENS), theirs.logits)
    assert (model.n_layer, model.vocab_size) == (3, 37)
    trace = list(model.trace(TOKENS))
    for l, t in enumerate(trace, 1):
        assert torch.equal(t.resid_pre, theirs.hidden_states[l - 1])
        assert torch.equal(t.resid_post, model.residual(TOKENS, l))
        torch.testing.assert_close(t.resid_pre + t.attn_out + t.mlp_out, t.resid_post)
        with truncated(lm, l):
            assert torch.equal(lm(TOKENS).logits, model.unembed(t.resid_post))
    assert torch.equal(model.final_norm(t.resid_post), theirs.hidden_states[-1])
    assert torch.equal(lm(TOKENS).logits, theirs.logits)  # whole again


@torch.no_grad()
@pytest.mark.parametrize("family", OPEN)
def test_samples(family):
    """Ragged prompts give what each gives alone; a truncated model says what its policy says."""
    lm = build(family, **OPEN[family]).eval()
    model, lengths = HFModel(lm), [5, 3, 4]
    many = model.generate(TOKENS[:3, :5], 6, temperature=0, prompt_len=lengths, num_samples=2)
    for i, n in enumerate(lengths):
        prompt = TOKENS[i : i + 1, :n]
        given = dict(attention_mask=torch.ones_like(prompt), pad_token_id=0)
        alone = lm.generate(prompt, max_new_tokens=6, do_sample=False, **given)
        assert torch.equal(many.tokens[2 * i + 1, : n + 6], alone[0])
    short, h = model.truncated(2), model.residual(TOKENS, 2)
    assert {id(p) for p in short.parameters()} <= {id(p) for p in model.parameters()}
    assert torch.equal(short(TOKENS), model.unembed(h)) and torch.equal(short.final_norm(h), h)
    assert len(list(short.trace(TOKENS))) == short.n_layer == 2
    said = short.generate(TOKENS[:, :5], 6, temperature=0).tokens
    assert torch.equal(said[:, 5:], m.policy_logits(model, said, m.Policy(2))[:, 4:-1].argmax(-1))


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_would_come_out_wrong_are_refused(case):
    family, changes, says = REFUSED[case]
    lm = build(family, **changes)
    if case == "scaled block":
        forward = lm.model.layers[1].forward
        lm.model.layers[1].forward = lambda *args, **kwargs: 2 * forward(*args, **kwargs)
    with pytest.raises(ValueError, match=says):
        HFModel(lm)


def test_truncated_restores_after_an_error_and_checks_its_layer():
    model = HFModel(build(head_dim=8))
    whole = model(TOKENS)
    with pytest.raises(ZeroDivisionError), truncated(model.lm, 1):
        with pytest.raises(ValueError, match="no list of 3 blocks"):
            HFModel(model.lm)
        raise ZeroDivisionError
    assert torch.equal(model(TOKENS), whole)
    for layer in (-1, 4):
        with pytest.raises(ValueError, match=rf"layer must be in 0\.\.3, not {layer}"):
            truncated(model.lm, layer).__enter__()
    with pytest.raises(ValueError, match=r"layer must be in 1\.\.3, not 0"):
        model.truncated(0)
    for compute in (model, lambda tokens: model.residual(tokens, 1)):
        with pytest.raises(ValueError, match="token id 37 is outside"):
            compute(torch.tensor([[3, 37]]))


@torch.no_grad()
@pytest.mark.parametrize("changes", [TIED, dict(head_dim=12, rms_norm_eps=1e-3)])
def test_our_block_is_qwen3(changes):
    """GPT and HFModel on the same weights: stream, writes and logits are equal to 1e-5."""
    lm = build(**changes)
    sizes = dict(n_layer=3, d_model=32, n_head=4, n_kv_head=2, d_mlp=40, tied=False)
    sizes |= dict(head_dim=changes["head_dim"], norm_eps=lm.config.rms_norm_eps)
    gpt = GPT(GPTConfig(37, 64, rope_theta=lm.config.rope_parameters["rope_theta"], **sizes))
    same = [(gpt.embed, lm.model.embed_tokens), (gpt.final_norm, lm.model.norm)]
    same += [(gpt.lm_head, lm.lm_head)]
    for ours, theirs in zip(gpt.blocks, lm.model.layers):
        attn, mlp = theirs.self_attn, theirs.mlp
        same += [(ours.attn_norm, theirs.input_layernorm), (ours.attn.out, attn.o_proj)]
        same += [(ours.attn.q_norm, attn.q_norm), (ours.attn.k_norm, attn.k_norm)]
        same += [(ours.attn.qkv, attn.q_proj, attn.k_proj, attn.v_proj)]
        same += [(ours.mlp_norm, theirs.post_attention_layernorm), (ours.mlp.down, mlp.down_proj)]
        same += [(ours.mlp.gate_up, mlp.gate_proj, mlp.up_proj)]
    for ours, *theirs in same:
        ours.weight.copy_(torch.cat([module.weight for module in theirs]))
    model, close = HFModel(lm), dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gpt(TOKENS), model(TOKENS), **close)
    for ours, theirs in zip(gpt.trace(TOKENS), model.trace(TOKENS)):
        torch.testing.assert_close(tuple(ours), tuple(theirs), **close)


# ---- reading -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    """Digits and signs are tokens; "<eos>" ends, "<pad>" pads."""
    ids = {c: i for i, c in enumerate(["<pad>", "<eos>", *"0123456789+-*=\n"])}
    characters = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    options = dict(eos_token="<eos>", pad_token="<pad>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=characters, **options)


@pytest.fixture(scope="module")
def directory(tokenizer, tmp_path_factory):
    """A tiny Qwen3 with that tokenizer, as transformers saves one."""
    path = tmp_path_factory.mktemp("model")
    build(**TIED).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_load_a_directory_and_encode(directory):
    model, tokenizer = load(directory)
    assert torch.equal(model(TOKENS), HFModel(build(**TIED))(TOKENS))
    assert {p.dtype for p in load(directory, dtype="bfloat16")[0].parameters()} == {torch.bfloat16}
    both = processors.TemplateProcessing("<eos> $A <eos>", special_tokens=[("<eos>", 1)])
    tokenizer.backend_tokenizer.post_processor = both
    assert encode_chat(tokenizer, "1+1=", "2") == ([1, 3, 12, 3, 15, 4], 5)
    assert encode_text(tokenizer, "12") == [1, 3, 4]
    turns = "{% for m in messages %}={{ m.content }}{% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}-{% endif %}"
    assert encode_chat(tokenizer, "1", "-2") == ([15, 3, 13, 13, 4], 3)  # the border stays


def write_gguf(path, lm, *extra):
    """A Llama with the names that llama.cpp's converter gives, but not its order of rows."""
    w = gguf.GGUFWriter(path, "llama")
    values = dict(block_count=3, context_length=64, embedding_length=32, feed_forward_length=40)
    values |= dict(head_count=4, head_count_kv=2, layer_norm_rms_eps=1e-5, vocab_size=37)
    values |= dict(tokenizer_model="gpt2", tokenizer_pre="smollm", token_merges=["a b"])
    values |= dict(token_list=[*(chr(97 + i) for i in range(36)), "ab"], eos_token_id=1)
    for name, value in values.items():
        getattr(w, f"add_{name}")(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    for name, p in lm.named_parameters():
        w.add_tensor(names.get_name(name, [".weight"]), p.detach().numpy())
    for name in extra:
        w.add_tensor(name, np.ones(4, dtype=np.float32))
    w.write_header_to_file(), w.write_kv_data_to_file(), w.write_tensors_to_file(), w.close()
    return path


def test_gguf(tmp_path, monkeypatch):
    lm = build("Llama", rms_norm_eps=1e-5)
    path = write_gguf(tmp_path / "qwen.gguf", lm)
    found = load(path)[0].lm
    ours, theirs = (model.model.layers[1].mlp.up_proj.weight for model in (found, lm))
    assert torch.equal(ours, theirs)
    found.save_pretrained(tmp_path / "saved")  # refused of what transformers thinks is quantised
    monkeypatch.setattr(language_models, "CACHE", tmp_path)
    with pytest.raises(ValueError, match="has SHA-256 .*, not 1d96.*: delete it and fetch it"):
        language_models.fetch("qwen")
    with pytest.raises(ValueError, match="rope_freqs"):
        load(write_gguf(tmp_path / "llama3.gguf", lm, "rope_freqs.weight"))


def test_what_cannot_be_read_is_named(directory, tokenizer, tmp_path, monkeypatch):
    (tmp_path / "base.pt").write_bytes(b"PK")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF")
    lm = build(head_dim=8)
    weights = {name: p for name, p in lm.state_dict().items() if "layers.1.mlp.up" not in name}
    lm.save_pretrained(tmp_path / "part", state_dict=weights)
    tokenizer.save_pretrained(tmp_path / "part")
    for name, says in [
        ("base.pt", "base.pt: of single files only a .gguf one"),
        ("cut.gguf", "transformers cannot read .*cut.gguf"),
        ("none.gguf", "transformers cannot read .*none.gguf"),
        ("", "transformers cannot read"),
        ("part", "no weights for model.layers.1.mlp.up_proj.weight"),
    ]:
        with pytest.raises(ValueError, match=says):
            load(tmp_path / name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[hf\]"'):
        load(directory)
    monkeypatch.setattr(trl, "__version__", "1.15.3")
    with pytest.raises(ImportError, match=r"needs trl>=1.16,<2, not 1.15.3: pip install"):
        importlib.reload(hf.bupo_trainer)


def test_analyze_looks_into_a_language_model(directory, tmp_path, capsys):
    """entropy, writes, lens, sample and step of a prompt and its response."""

    def run(command, *options):
        words = [command, str(directory), "--prompt", "1+1=", "--out", str(tmp_path), *options]
        assert analyze.main([*words, "--device", "cpu"]) == 0
        return capsys.readouterr().out

    for command in ("entropy", "writes", "lens"):
        run(command, "--text", "23")
    assert {"entropy_flow.png", "writes.png", "lens.png"} <= {p.name for p in tmp_path.iterdir()}
    assert '"said":["2","3"]' in (tmp_path / "lens.html").read_text()
    tokens, mask = torch.tensor([[3, 12, 3, 15, 4, 5]]), torch.tensor([[0, 0, 0, 1, 1]]).bool()
    measured = m.look_inside(HFModel(build(**TIED)), tokens, mask)["layer"].mean(1).tolist()
    assert json.loads((tmp_path / "entropy.json").read_text())["layer"] == pytest.approx(measured)
    assert run("sample", "--layer", "2").count("\n  '") == 8
    step = run("step", "--layer", "2", "--responses", "23", "31", "--rewards", "1", "0")
    (norms,) = (line.split() for line in step.splitlines() if "lm.model.norm" in line)
    assert norms[-2] == "none" and float(norms[-1]) > 0


# ---- the trainer ---------------------------------------------------------------------------------

OPTIONS = dict(use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", seed=3)
OPTIONS |= dict(save_strategy="no", logging_steps=1, disable_tqdm=True, dataloader_pin_memory=False)
OPTIONS |= dict(per_device_train_batch_size=8, num_generations=4, max_completion_length=5)
OPTIONS |= dict(steps_per_generation=2, gradient_accumulation_steps=1, loss_type="bnpo")
OPTIONS |= dict(learning_rate=1e-2, lr_scheduler_type="constant", weight_decay=0.1)


def even(completion_ids, **_):
    """The reward: how many of its tokens are even."""
    return [sum(i % 2 == 0 for i in ids) / 5 for ids in completion_ids]


def make(tokenizer, out, trainer=BuPOTrainer, lm=None, peft_config=None, train=True, **options):
    config = BuPOConfig if issubclass(trainer, BuPOTrainer) else GRPOConfig
    args = config(output_dir=str(out), **(OPTIONS | options))
    data = Dataset.from_dict({"prompt": [f"{i}+{i % 7}=" for i in range(48)]})
    given = dict(processing_class=tokenizer, train_dataset=data, peft_config=peft_config)
    trainer = trainer(lm or build(**TIED), even, args, **given)
    if train:
        trainer.train()
    return trainer


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def differ(a, b):
    return {name for name in a if not torch.equal(a[name], b[name])}


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class Recorder(BuPOTrainer):
    """Keeps of every mini-batch its rows, phase, loss, gradients, and what they were taken with."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        seen = dict(inputs, phase=self.phase, weights=weights(self))
        seen["moments"] = {int(state["step"]) for state in self.optimizer.state.values()}
        seen["vllm"] = self.vllm_importance_sampling_correction
        self.seen = [*getattr(self, "seen", []), seen]
        return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        named = self.model.named_parameters()
        self.seen[-1]["grads"] = {n: p.grad.clone() for n, p in named if p.grad is not None}
        self.seen[-1]["loss"] = loss
        return loss


def rows_of(seen):
    """The rows of a mini-batch of TRL's as minibupo has them: tokens from the left, and mask."""
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    rows = [(p[a == 1], c[b == 1]) for p, a, c, b in zip(*(seen[name] for name in names))]
    tokens = torch.nn.utils.rnn.pad_sequence([torch.cat(row) for row in rows], batch_first=True)
    prompt_len, end = torch.tensor([[len(p), len(p) + len(c)] for p, c in rows]).T
    return tokens, m.response_mask(prompt_len, end, tokens.shape[1])


CASES = [  # family, tied, options
    ("Qwen3", True, dict(temperature=0.7)),
    ("Qwen3", False, dict(loss_type="grpo", num_iterations=2)),
    ("Llama", True, dict(gradient_checkpointing=True, steps_per_generation=4)),
    ("Llama", False, dict(temperature=1.3, num_iterations=2, steps_per_generation=1)),
]


@pytest.mark.parametrize("family,tied,options", CASES)
def test_loss_and_gradients_are_minibupos(tokenizer, tmp_path, family, tied, options):
    """One batch of phase 1 and one of phase 2, all mini-batches, against policy_loss on a copy."""
    lm, copy = (build(family, head_dim=8, tie_word_embeddings=tied) for _ in range(2))
    per_batch = options.get("steps_per_generation", 2) * options.get("num_iterations", 1)
    options |= dict(bupo_layer=2, bupo_steps=1, max_steps=2 * per_batch, max_grad_norm=0.0)
    trainer = make(tokenizer, tmp_path, Recorder, lm, **options)
    assert [seen["phase"] for seen in trainer.seen] == [1] * per_batch + [2] * per_batch
    average = {"bnpo": "token", "grpo": "sequence"}[trainer.loss_type]
    model, temperature, largest = HFModel(copy), trainer.temperature, 0.0
    for step, seen in enumerate(trainer.seen):
        policy = m.Policy(2) if seen["phase"] == 1 else m.FULL
        tokens, mask = rows_of(seen)
        logps = []
        for now in (trainer.seen[step - step % per_batch], seen):  # at the rollouts, at the step
            copy.load_state_dict(now["weights"], strict=False)
            logps.append(m.token_logprobs(model, tokens, mask, policy, temperature).detach())
        largest = max(largest, float((logps[1] - logps[0]).abs().max()))
        copy.zero_grad(set_to_none=True)
        rows = (tokens, logps[0], seen["advantages"], mask, policy, temperature)
        loss, _ = m.policy_loss(model, *rows, average=average)
        loss.backward()
        torch.testing.assert_close(seen["loss"], loss.detach(), rtol=1e-4, atol=1e-5)
        ours = {name: p.grad for name, p in copy.named_parameters() if p.grad is not None}
        assert ours.keys() == seen["grads"].keys()
        assert (seen["phase"] == 2) == any("layers.2" in name for name in ours)
        close = dict(rtol=1e-3, atol=1e-4 * float(max(g.abs().max() for g in ours.values())))
        for name, gradient in ours.items():
            torch.testing.assert_close(seen["grads"][name], gradient, msg=name, **close)
    assert largest > 0.01  # of log-ratios: later mini-batches see other weights than the rollouts


def test_phase_1_and_the_switch(tokenizer, tmp_path):
    """What is above the layer stays under weight decay; moments start afresh; vLLM's correction."""
    options = dict(bupo_steps=2, max_steps=8, steps_per_generation=1, num_iterations=2)
    trainer = make(tokenizer, tmp_path, Recorder, bupo_layer=2, **options)
    first, switch, last = (trainer.seen[i]["weights"] for i in (0, 4, 7))
    above = {name for name in first if name.startswith(("model.layers.2", "model.norm"))}
    assert differ(first, switch) == first.keys() - above and differ(switch, last) == first.keys()
    assert [seen["moments"] for seen in trainer.seen[1:]] == [{1}, {2}, {3}, set(), {1}, {2}, {3}]
    assert [seen["vllm"] for seen in trainer.seen] == [False] * 4 + [True] * 4
    for trainer.phase in (1, 2):  # evaluation is pi_theta's in both
        torch.manual_seed(0)
        trainer.evaluate(trainer.train_dataset.select(range(2)))
    one, two = logged(trainer, "eval_entropy")
    assert one == pytest.approx(two)


def test_deepspeed_with_weight_decay_is_refused(tokenizer, tmp_path):
    class OnDeepSpeed(BuPOTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.is_deepspeed_enabled = True

    options = dict(trainer=OnDeepSpeed, train=False, bupo_layer=2)
    with pytest.raises(ValueError, match="DeepSpeed .* weight_decay 0"):
        make(tokenizer, tmp_path, bupo_steps=1, **options)
    make(tokenizer, tmp_path, bupo_steps=1, weight_decay=0.0, **options)


def test_no_steps_is_grpo(tokenizer, tmp_path):
    # each seeds torch's generator when it is made
    grpo, bupo = (make(tokenizer, tmp_path, t, max_steps=4) for t in (GRPOTrainer, BuPOTrainer))
    assert not differ(weights(grpo), weights(bupo))
    for theirs, ours in zip(grpo.state.log_history, bupo.state.log_history, strict=True):
        differs = {name for name in theirs if theirs[name] != ours[name]}
        assert all("time" in name or "per_second" in name for name in differs), differs


def test_resume_goes_on_as_if_never_stopped(tokenizer, tmp_path):
    """With the layer by the rule, stopped in phase 1 and exactly at the switch."""
    options = dict(bupo_steps=2, max_steps=6, save_strategy="steps", save_steps=2)
    options |= dict(gradient_accumulation_steps=2, steps_per_generation=4)
    whole = make(tokenizer, tmp_path, **options)

    def resume(step):
        again = make(
            tokenizer, tmp_path / "again", lm=build(seed=9, **TIED), train=False, **options
        )
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        return again

    for step, layer in (2, whole.layer), (4, None):
        again = resume(step)
        assert not differ(weights(whole), weights(again)) and again.layer == layer
    # what the log says counts, not what the rule would say now
    file = tmp_path / "checkpoint-2" / "trainer_state.json"
    file.write_text(file.read_text().replace(f'"bupo/layer": {whole.layer}', '"bupo/layer": 3'))
    assert resume(2).layer == 3


def test_layer_by_the_rule(tokenizer, tmp_path):
    options = dict(bupo_steps=1, max_steps=1, steps_per_generation=1)
    trainer = make(tokenizer, tmp_path, Recorder, **options)
    d_mlp = m.look_inside(HFModel(build(**TIED)), *rows_of(trainer.seen[0]))["d_mlp"].mean(1)
    assert logged(trainer, "bupo/d_mlp") == [pytest.approx(d_mlp.tolist(), rel=1e-4, abs=1e-4)]
    assert trainer.layer == m.target_layer(d_mlp) == logged(trainer, "bupo/layer")[0]


def test_kl_is_zero_at_the_start(directory, tokenizer, tmp_path):
    lm = load(directory)[0].lm  # the reference is read from there once more
    options = dict(bupo_layer=1, bupo_steps=1, max_steps=2, beta=0.1)
    kl = logged(make(tokenizer, tmp_path, lm=lm, **options), "kl")
    assert kl[0] == 0 and kl[1] > 0


def test_lora_moves_only_adapters_up_to_the_layer(tokenizer, tmp_path):
    peft = LoraConfig(target_modules=["q_proj", "up_proj"])
    options = dict(peft_config=peft, bupo_layer=2, bupo_steps=2, max_steps=4)
    trainer = make(tokenizer, tmp_path, train=False, **options)
    before = weights(trainer)
    trainer.train()
    moved = differ(before, weights(trainer))
    assert moved and all("lora" in name for name in moved)
    assert {name.split("layers.")[1][0] for name in moved} == {"0", "1"}


# ---- the command line, and two processes ---------------------------------------------------------


def arguments(directory, out, **options):
    """The words of a command line; an option that is None is left out."""
    options = dict(bupo_layer=2, bupo_steps=1, max_steps=4, steps_per_generation=1) | options
    options = OPTIONS | dict(model_name_or_path=directory, output_dir=out) | options
    given = {f"--{name}": str(value) for name, value in options.items() if value is not None}
    return [word for option in given.items() for word in option]


def test_command_line(directory, tmp_path):
    evaluate = dict(eval_strategy="steps", eval_steps=2, eval_problems=8)
    assert hf.train.main(arguments(directory, tmp_path, **evaluate)) == 0
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [entry["bupo/phase"] for entry in log if "bupo/phase" in entry] == [1, 2, 2, 2]
    assert [entry["step"] for entry in log if "eval_reward" in entry] == [2, 4]
    assert load(tmp_path)[0].n_layer == 3


def test_command_line_takes_a_data_set_and_adapters(directory, tmp_path):
    (tmp_path / "train.json").write_text('[{"prompt": "1+1=", "solution": "$2$"}]')
    words = arguments(directory, tmp_path, dataset_name=tmp_path, use_peft=True, dtype="bfloat16")
    trainer, _ = hf.train.make_trainer(words)
    assert trainer.reward_func_names == ["accuracy_reward"] and trainer.model.peft_config
    assert trainer.model.get_input_embeddings().weight.dtype == torch.bfloat16


def test_command_line_names_errors(directory, tokenizer, tmp_path, capsys):
    (tmp_path / "train.json").write_text('[{"prompt": "1+1="}]')
    narrow = build(**TIED)
    for layer in narrow.model.layers:
        layer.mlp.down_proj.weight.data *= 100  # loud writes: every FFN narrows
    for name, lm in ("narrow", narrow), ("parallel", build("GPTNeoX")):
        lm.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    for options, says in [
        (dict(bupo_steps=-1), "bupo_steps must be 0 or more, not -1"),
        (dict(bupo_layer=4), "bupo_layer must be in 1..3, not 4"),
        (dict(bupo_layer=0), "bupo_layer must be in 1..3, not 0"),
        (dict(use_vllm=True, off_policy_mask_threshold=0.1), "off_policy_mask_threshold"),
        (dict(gradient_checkpointing_kwargs='{"use_reentrant": true}'), "use_reentrant=False"),
        (dict(model_name_or_path=None), "--model_name_or_path is missing"),
        (dict(model_name_or_path=tmp_path / "nothing"), "transformers cannot read"),
        (dict(model_name_or_path=tmp_path / "parallel"), "GPTNeoXForCausalLM cannot be laid open"),
        (dict(model_name_or_path=tmp_path / "narrow", bupo_layer=None), "choose one with bupo_l"),
        (dict(operations="/"), "operations must be some of + - *"),
        (dict(dataset_name=tmp_path / "no-data"), "there is no data set"),
        (dict(dataset_name=tmp_path, dataset_train_split="x"), "has no split x, only train"),
        (dict(dataset_name=tmp_path), "has no column 'solution', only prompt"),
    ]:
        capsys.readouterr()
        assert hf.train.main(arguments(directory, tmp_path, **options)) == 2
        err = capsys.readouterr().err
        assert says in err and "Traceback" not in err
    code = "import sys; sys.modules['trl'] = None; import hf.train"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode and run.stderr.startswith('hf.train needs pip install -e ".[hf]"')


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


def three_steps(lm, rows):
    """Phase 1, phase 2, phase 1 on the loss -log p, with momentum and weight decay."""
    optimizer = torch.optim.SGD(lm.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for layer in (2, None, 2):
        with truncated(lm, layer) if layer else torch.enable_grad():
            loss = lm(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def one_of_two(argv):
    """What each process of the next test does: DDP by hf.train, then FSDP2 beside one process."""
    torch.set_num_threads(1)
    trainer, config = hf.train.make_trainer(argv)
    trainer.train()
    rank = trainer.accelerator.process_index
    rule = (trainer.layer, logged(trainer, "bupo/d_mlp"))
    ddp = (rule, trainer.accelerator.num_processes, weights(trainer))
    alone, sharded = build(**TIED), build(**TIED)
    mesh = init_device_mesh("cpu", (2,))
    for module in (*sharded.model.layers, sharded):
        fully_shard(module, mesh=mesh)
    three_steps(alone, TOKENS)
    three_steps(sharded, TOKENS[2 * rank : 2 * rank + 2])
    fsdp = {name: p.full_tensor() for name, p in sharded.named_parameters()}
    torch.save((ddp, fsdp, dict(alone.named_parameters())), f"{config.output_dir}/rank{rank}")


def test_two_processes(directory, tmp_path):
    """DDP over gloo: layer by the rule, accumulation, weight decay, checkpointing, both phases.
    FSDP2 on two processes does what one process does, also where layers have no gradient."""
    options = dict(steps_per_generation=2, gradient_accumulation_steps=2, max_steps=3)
    options |= dict(gradient_checkpointing=True, bupo_layer=None, use_cpu=None)
    words = "-m torch.distributed.run --nproc_per_node 2 --rdzv_backend c10d".split()
    words += ["--rdzv_endpoint", "127.0.0.1:0", "--local_addr", "127.0.0.1", __file__]
    words += arguments(directory, tmp_path, **options)
    path = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    zero, one = (torch.load(tmp_path / f"rank{r}") for r in (0, 1))
    (rule, n, ddp), fsdp, alone = zero
    assert n == 2 and rule == one[0][0] and 1 <= rule[0] < 3
    start = dict(load(directory)[0].lm.named_parameters())
    assert not differ(ddp, one[0][2]) and len(differ(start, ddp)) == len(start)
    for name, weight in alone.items():
        torch.testing.assert_close(fsdp[name], weight, rtol=1e-5, atol=1e-6, msg=name)


if __name__ == "__main__":
    one_of_two(sys.argv[1:])
