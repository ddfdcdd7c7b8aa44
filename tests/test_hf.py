"""hf/: HFModel against transformers, BuPOTrainer against minibupo.policy_loss, the command line.

All models are tiny and random. Nothing is downloaded.
"""

# ruff: noqa: E402 - imports come after the check that the extra is there

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
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import GRPOConfig, GRPOTrainer

import hf.train
from hf.adapter import HFModel, encode_chat, encode_text, load, load_lm, truncated
from hf.bupo_trainer import BuPOConfig, BuPOTrainer, NoLayerError
from minibupo import (
    FULL,
    Policy,
    look_inside,
    policy_loss,
    response_mask,
    target_layer,
    token_logprobs,
)
from model import GPT, GPTConfig

SIZES = dict(
    vocab_size=37,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
OPEN = {
    "Qwen3": dict(head_dim=8, tie_word_embeddings=True),
    "Qwen2": dict(tie_word_embeddings=True),
    "Llama": dict(),
    "Llama 3": dict(rope_parameters=LLAMA3),
    "Mistral": dict(sliding_window=4),
    "SmolLM3": dict(),
    "Phi3": dict(),
    "Gemma": dict(head_dim=8),
    "Qwen3Moe": dict(head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2),
    "Olmo2": dict(),
    "GPT2": dict(n_layer=3, n_head=4, n_embd=32),
}
REFUSED = {  # model, changes, what is said
    "softcap": ("Gemma2", dict(head_dim=8), "H\\^L gives others|scaled or capped"),
    "logit scale": ("Granite", dict(logits_scaling=3.0), "H\\^L gives others"),
    "scaled writes": ("Granite", dict(residual_multiplier=0.3), "writes of layer 1 do not add up"),
    "parallel blocks": ("GPTNeoX", dict(), "writes of layer 1 do not add up"),
    "FFN without a module": ("OPT", dict(ffn_dim=40, word_embed_proj_dim=32), "has no mlp"),
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
    return lm.eval()


def random_tokens(B=3, T=12, V=37):
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(1))


# ---- adapter -------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", OPEN)
def test_contract(family):
    lm, tokens = build(family, **OPEN[family]), random_tokens()
    theirs = lm(tokens, output_hidden_states=True)
    model = HFModel(lm)
    assert torch.equal(model(tokens), theirs.logits)
    assert (model.n_layer, model.vocab_size) == (3, 37)
    trace = list(model.trace(tokens))
    for l, t in enumerate(trace, 1):
        assert torch.equal(t.resid_pre, theirs.hidden_states[l - 1])
        assert torch.equal(t.resid_post, model.residual(tokens, l))
        torch.testing.assert_close(t.resid_pre + t.attn_out + t.mlp_out, t.resid_post)
        with truncated(lm, l):
            assert torch.equal(lm(tokens).logits, model.unembed(t.resid_post))
    assert torch.equal(model.final_norm(t.resid_post), theirs.hidden_states[-1])
    assert torch.equal(lm(tokens).logits, theirs.logits)  # whole again
    # sampling: ragged prompts are what each prompt gives alone, and transformers' own greedy tokens
    many = model.generate(tokens[:, :5], 6, temperature=0, prompt_len=[5, 3, 4], num_samples=2)
    for i, n in enumerate([5, 3, 4]):
        prompt = tokens[i : i + 1, :n]
        ones = torch.ones_like(prompt)
        own = lm.generate(
            prompt, attention_mask=ones, max_new_tokens=6, do_sample=False, pad_token_id=0
        )
        assert torch.equal(many.tokens[2 * i + 1, : n + 6], own[0])
    short = model.truncated(2)
    said = short.generate(tokens[:, :5], 6, temperature=0).tokens
    assert torch.equal(said[:, 5:], model.unembed(trace_of(model, said, 2))[:, 4:-1].argmax(-1))


def trace_of(model, tokens, layer):
    return list(model.trace(tokens))[layer - 1].resid_post


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_would_come_out_wrong_are_refused(case):
    family, changes, says = REFUSED[case]
    with pytest.raises(ValueError, match=says):
        HFModel(build(family, **changes))


def test_truncated_restores_after_an_error_and_checks_its_layer():
    lm, tokens = build(head_dim=8), random_tokens()
    whole = lm(tokens).logits
    with pytest.raises(ZeroDivisionError), truncated(lm, 1):
        assert len(lm.model.layers) == 1
        raise ZeroDivisionError
    assert torch.equal(lm(tokens).logits, whole)
    for layer in (-1, 4):
        with (
            pytest.raises(ValueError, match=rf"layer must be in 0\.\.3, not {layer}"),
            truncated(lm, layer),
        ):
            pass
    model = HFModel(lm)
    with pytest.raises(ValueError, match=r"layer must be in 1\.\.3, not 0"):
        model.truncated(0)
    with pytest.raises(ValueError, match="token id 37 is outside"):
        model(torch.tensor([[3, 37]]))


def into_gpt(lm, **switches):
    """The weights of a Qwen3, Qwen2 or Llama in our GPT."""
    c = lm.config
    sizes = dict(
        vocab_size=37,
        context_length=64,
        n_layer=3,
        d_model=32,
        n_head=4,
        n_kv_head=2,
        d_mlp=40,
        norm_eps=c.rms_norm_eps,
        rope_theta=c.rope_parameters["rope_theta"],
        tied=c.tie_word_embeddings,
        head_dim=lm.model.layers[0].self_attn.head_dim,
    )
    gpt = GPT(GPTConfig(**sizes, **switches))
    state = {
        "embed.weight": lm.model.embed_tokens.weight,
        "final_norm.weight": lm.model.norm.weight,
        "lm_head.weight": lm.lm_head.weight,
    }
    for i, layer in enumerate(lm.model.layers):
        a, m = layer.self_attn, layer.mlp
        qkv = (a.q_proj, a.k_proj, a.v_proj)
        block = {
            "attn_norm.weight": layer.input_layernorm.weight,
            "mlp_norm.weight": layer.post_attention_layernorm.weight,
            "attn.qkv.weight": torch.cat([p.weight for p in qkv]),
            "attn.out.weight": a.o_proj.weight,
            "mlp.gate_up.weight": torch.cat([m.gate_proj.weight, m.up_proj.weight]),
            "mlp.down.weight": m.down_proj.weight,
        }
        if switches["qkv_bias"]:
            block["attn.qkv.bias"] = torch.cat([p.bias for p in qkv])
        if switches["qk_norm"]:
            block |= {"attn.q_norm.weight": a.q_norm.weight, "attn.k_norm.weight": a.k_norm.weight}
        state |= {f"blocks.{i}.{name}": weight for name, weight in block.items()}
    gpt.load_state_dict(state)
    return gpt


@torch.no_grad()
@pytest.mark.parametrize(
    "family,changes,switches",
    [
        ("Qwen3", dict(head_dim=8, tie_word_embeddings=True), dict(qk_norm=True, qkv_bias=False)),
        ("Qwen3", dict(head_dim=12, rms_norm_eps=1e-3), dict(qk_norm=True, qkv_bias=False)),
        (
            "Qwen2",
            dict(
                tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=1e6)
            ),
            dict(qk_norm=False, qkv_bias=True),
        ),
        ("Llama", dict(rms_norm_eps=1e-5), dict(qk_norm=False, qkv_bias=False)),
    ],
)
def test_our_block_is_qwen3(family, changes, switches):
    """GPT, HFModel on the same weights: stream, writes, logits to 1e-5, samples of one generator."""
    lm, tokens = build(family, **changes), random_tokens()
    gpt, model = into_gpt(lm, **switches), HFModel(lm)
    torch.testing.assert_close(gpt(tokens), lm(tokens).logits, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gpt.trace(tokens), model.trace(tokens)):
        torch.testing.assert_close(tuple(ours), tuple(theirs), rtol=1e-5, atol=1e-5)
    exact = gpt.double()(tokens)
    assert (lm.double()(tokens).logits - exact).abs().max() < 1e-5
    g = [torch.Generator().manual_seed(0) for _ in range(2)]
    ours, theirs = (
        m.generate(tokens[:, :4], 8, num_samples=3, eos_id=5, generator=g)
        for m, g in zip((gpt, model), g)
    )
    assert torch.equal(ours.tokens, theirs.tokens) and torch.equal(ours.end, theirs.end)


# ---- reading -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    """Digits and signs are tokens; "<eos>" ends, "<pad>" pads."""
    ids = {c: i for i, c in enumerate(["<pad>", "<eos>", *"0123456789+-*=\n"])}
    characters = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=characters, eos_token="<eos>", pad_token="<pad>", padding_side="left"
    )


@pytest.fixture(scope="module")
def directory(tokenizer, tmp_path_factory):
    """A tiny Qwen3 with that tokenizer, as transformers saves one."""
    path = tmp_path_factory.mktemp("model")
    build(head_dim=8, tie_word_embeddings=True).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_load_a_directory_and_encode(directory):
    model, tokenizer = load(directory)
    assert torch.equal(
        model(random_tokens()), build(head_dim=8, tie_word_embeddings=True)(random_tokens()).logits
    )
    assert {p.dtype for p in load(directory, dtype="bfloat16")[0].parameters()} == {torch.bfloat16}
    assert encode_chat(tokenizer, "1+1=", "2") == ([3, 12, 3, 15, 4], 4)
    assert encode_text(tokenizer, "12") == [3, 4]
    tokenizer.chat_template = "{% for m in messages %}={{ m.content }}{% endfor %}{% if add_generation_prompt %}-{% endif %}"
    assert encode_chat(tokenizer, "1", "-2") == ([15, 3, 13, 13, 4], 3)  # the border stays


def write_gguf(path, lm, *extra):
    """A Llama as llama.cpp's converter writes it, with permuted rows of q and k."""
    c, w = lm.config, gguf.GGUFWriter(path, "llama")
    (
        w.add_block_count(3),
        w.add_context_length(64),
        w.add_embedding_length(32),
        w.add_feed_forward_length(40),
    )
    (
        w.add_head_count(4),
        w.add_head_count_kv(2),
        w.add_layer_norm_rms_eps(c.rms_norm_eps),
        w.add_vocab_size(37),
    )
    (
        w.add_rope_freq_base(c.rope_parameters["rope_theta"]),
        w.add_tokenizer_model("gpt2"),
        w.add_tokenizer_pre("smollm"),
    )
    (
        w.add_token_list([*(chr(97 + i) for i in range(36)), "ab"]),
        w.add_token_merges(["a b"]),
        w.add_eos_token_id(1),
    )
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for name, p in lm.named_parameters():
        x, (*_, kind, _) = p.detach().numpy(), name.split(".")
        name = name.removeprefix("model.").removesuffix(".weight")
        if kind in ("q_proj", "k_proj"):
            heads = 4 if kind == "q_proj" else 2
            x = x.reshape(heads, 2, -1, 32).swapaxes(1, 2).reshape(x.shape)
        if name.startswith("layers."):
            _, i, part = name.split(".", 2)
            name = f"blk.{i}.{parts[part]}"
        name = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}.get(
            name, name
        )
        w.add_tensor(name + ".weight", np.ascontiguousarray(x))
    for name in extra:
        w.add_tensor(name, np.ones(4, dtype=np.float32))
    w.write_header_to_file(), w.write_kv_data_to_file(), w.write_tensors_to_file(), w.close()
    return path


def test_gguf(tmp_path):
    lm = build("Llama", rms_norm_eps=1e-5)
    path = write_gguf(tmp_path / "tiny.gguf", lm)
    found, _ = load_lm(path)
    torch.testing.assert_close(found(random_tokens()).logits, lm(random_tokens()).logits)
    found.save_pretrained(
        tmp_path / "saved"
    )  # transformers refuses this of a model that it thinks is quantised
    with pytest.raises(ValueError, match="rope_freqs"):
        load_lm(write_gguf(tmp_path / "llama3.gguf", lm, "rope_freqs.weight"))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="tiny.gguf is not there, cut short, or no GGUF file"):
        load_lm(path)


def test_what_cannot_be_read_is_named(directory, tmp_path, monkeypatch):
    (tmp_path / "base.pt").write_bytes(b"PK")
    with pytest.raises(ValueError, match="base.pt is a file, but not a .gguf one"):
        load(tmp_path / "base.pt")
    with pytest.raises(ValueError, match="transformers cannot read"):
        load(tmp_path)
    lm = build(head_dim=8)
    weights = {name: p for name, p in lm.state_dict().items() if "layers.1.mlp.up" not in name}
    lm.save_pretrained(tmp_path, state_dict=weights)
    load_lm(directory)[1].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no weights for model.layers.1.mlp.up_proj.weight"):
        load(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[hf\]"'):
        load(directory)


# ---- the trainer ---------------------------------------------------------------------------------

OPTIONS = dict(
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    report_to="none",
    save_strategy="no",
    logging_steps=1,
    disable_tqdm=True,
    per_device_train_batch_size=8,
    num_generations=4,
    max_completion_length=5,
    steps_per_generation=2,
    gradient_accumulation_steps=1,
    loss_type="bnpo",
    learning_rate=1e-2,
    lr_scheduler_type="constant",
    weight_decay=0.1,
    dataloader_pin_memory=False,
    seed=3,
)


def reward(completion_ids, **_):
    """How many of its tokens are even."""
    return [sum(i % 2 == 0 for i in ids) / 5 for ids in completion_ids]


def make(tokenizer, out, trainer=BuPOTrainer, lm=None, peft=None, **options):
    config = BuPOConfig if issubclass(trainer, BuPOTrainer) else GRPOConfig
    prompts = [f"{a}+{b}=" for a in range(12) for b in range(4)]
    return trainer(
        model=build(head_dim=8, tie_word_embeddings=True) if lm is None else lm,
        processing_class=tokenizer,
        reward_funcs=reward,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        peft_config=peft,
        args=config(output_dir=str(out), **(OPTIONS | options)),
    )


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def differ(a, b):
    return {name for name in a if not torch.equal(a[name], b[name])}


class Recorder(BuPOTrainer):
    """Keeps of every mini-batch its rows, phase, loss, gradients, and the weights that had them."""

    def __init__(self, *args, **kwargs):
        self.seen = []
        super().__init__(*args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.seen.append(dict(inputs, phase=self.phase, loss=loss.detach(), weights=weights(self)))
        return loss

    def training_step(self, *args, **kwargs):
        out = super().training_step(*args, **kwargs)
        grads = {
            name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None
        }
        self.seen[-1]["grads"] = grads
        return out


def rows_of(seen):
    """The rows of a mini-batch of TRL's as minibupo has them: tokens from the left, and their mask."""
    rows = [
        (p[m.bool()], c[k.bool()])
        for p, m, c, k in zip(
            *(seen[n] for n in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"))
        )
    ]
    tokens = torch.nn.utils.rnn.pad_sequence([torch.cat(row) for row in rows], batch_first=True)
    prompt_len, end = torch.tensor([[len(p), len(p) + len(c)] for p, c in rows]).T
    return tokens, response_mask(prompt_len, end, tokens.shape[1])


@pytest.mark.parametrize(
    "family,tied,options",
    [
        ("Qwen3", True, dict(temperature=0.7)),
        ("Qwen3", False, dict(loss_type="grpo", num_iterations=2)),
        (
            "Llama",
            True,
            dict(
                gradient_checkpointing=True, steps_per_generation=4, per_device_train_batch_size=4
            ),
        ),
        ("Llama", False, dict(temperature=1.3, num_iterations=2, steps_per_generation=1)),
    ],
)
def test_loss_and_gradients_are_minibupos(tokenizer, tmp_path, family, tied, options):
    """One batch of phase 1 and one of phase 2, all mini-batches, against policy_loss on a copy."""
    shape = dict(head_dim=8, tie_word_embeddings=tied)
    per_batch = options.get("steps_per_generation", 2) * options.get("num_iterations", 1)
    trainer = make(
        tokenizer,
        tmp_path,
        Recorder,
        build(family, **shape),
        bupo_layer=2,
        bupo_steps=1,
        max_steps=2 * per_batch,
        max_grad_norm=0.0,
        **options,
    )
    trainer.train()
    assert [s["phase"] for s in trainer.seen] == [1] * per_batch + [2] * per_batch
    copy = HFModel(build(family, **shape))
    ratios = []
    for step, seen in enumerate(trainer.seen):
        policy, T = Policy(2) if seen["phase"] == 1 else FULL, trainer.temperature
        tokens, mask = rows_of(seen)
        copy.lm.load_state_dict(trainer.seen[step - step % per_batch]["weights"], strict=False)
        with torch.no_grad():
            old = token_logprobs(copy, tokens, mask, policy, T)
        copy.lm.load_state_dict(seen["weights"], strict=False)
        copy.zero_grad(set_to_none=True)
        average = {"bnpo": "token", "grpo": "sequence"}[trainer.loss_type]
        loss, _ = policy_loss(
            copy, tokens, old, seen["advantages"], mask, policy, T, average=average
        )
        loss.backward()
        with torch.no_grad():
            ratios.append(float((token_logprobs(copy, tokens, mask, policy, T) - old).abs().max()))
        torch.testing.assert_close(seen["loss"], loss.detach(), rtol=1e-4, atol=1e-5)
        ours = {name: p.grad for name, p in copy.lm.named_parameters() if p.grad is not None}
        assert ours.keys() == seen["grads"].keys()
        assert (seen["phase"] == 2) == any("layers.2" in name for name in ours)
        size = max(g.abs().max() for g in ours.values())
        for name, gradient in ours.items():
            torch.testing.assert_close(
                seen["grads"][name], gradient, rtol=1e-3, atol=1e-4 * float(size), msg=name
            )
    assert max(ratios) > 0.01  # later mini-batches do see other weights than the rollouts


def test_what_is_above_the_layer_does_not_move(tokenizer, tmp_path):
    trainer = make(tokenizer, tmp_path, bupo_layer=2, bupo_steps=2, max_steps=4)
    before = weights(trainer)
    trainer.train()
    above = {name for name in before if name.startswith(("model.layers.2", "model.norm"))}
    assert differ(before, weights(trainer)) == before.keys() - above


def test_no_steps_is_grpo(tokenizer, tmp_path):
    runs = []
    for trainer in (GRPOTrainer, BuPOTrainer):  # each seeds torch's generator when it is made
        runs.append(make(tokenizer, tmp_path, trainer, max_steps=4))
        runs[-1].train()
    assert not differ(*map(weights, runs))
    grpo, bupo = (
        [
            {k: v for k, v in log.items() if "time" not in k and "per_second" not in k}
            for log in run.state.log_history
        ]
        for run in runs
    )
    assert grpo == bupo


def test_resume_goes_on_as_if_never_stopped(tokenizer, tmp_path):
    """With the layer by the rule, stopped in phase 1 and exactly at the switch."""
    options = dict(bupo_steps=2, max_steps=6, save_strategy="steps", save_steps=2)
    whole = make(tokenizer, tmp_path / "whole", **options)
    whole.train()
    for stop in (2, 4):
        again = make(
            tokenizer,
            tmp_path / "again",
            lm=build(seed=9, head_dim=8, tie_word_embeddings=True),
            **options,
        )
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
        assert not differ(weights(whole), weights(again)) and again.layer in (None, whole.layer)
    state = json.loads((tmp_path / "whole" / "checkpoint-2" / "trainer_state.json").read_text())
    assert whole.layer in [log.get("bupo/layer") for log in state["log_history"]]


def test_layer_by_the_rule(tokenizer, tmp_path):
    trainer = make(tokenizer, tmp_path, Recorder, bupo_steps=1, max_steps=1, steps_per_generation=1)
    trainer.train()
    copy = HFModel(build(head_dim=8, tie_word_embeddings=True))
    d_mlp = look_inside(copy, *rows_of(trainer.seen[0]))["d_mlp"].mean(1)
    logged = next(log for log in trainer.state.log_history if "bupo/d_mlp" in log)
    torch.testing.assert_close(torch.tensor(logged["bupo/d_mlp"]), d_mlp, rtol=1e-4, atol=1e-4)
    assert trainer.layer == target_layer(d_mlp)
    narrow = build(head_dim=8, tie_word_embeddings=True)
    for layer in narrow.model.layers:
        layer.mlp.down_proj.weight.data *= 100  # loud writes: every FFN narrows
    with pytest.raises(NoLayerError, match="choose one with bupo_layer"):
        make(tokenizer, tmp_path, lm=narrow, bupo_steps=1, max_steps=1).train()


def test_moments_start_afresh_at_the_switch(tokenizer, tmp_path):
    trainer, steps = make(tokenizer, tmp_path, bupo_layer=2, bupo_steps=1, max_steps=4), []

    class Look(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, optimizer, **_):
            steps.append({int(s["step"]) for s in optimizer.state.values()})

    trainer.add_callback(Look())
    trainer.train()
    assert steps == [{1}, {2}, {1}, {2}]


def test_kl_is_zero_at_the_start(directory, tokenizer, tmp_path):
    lm = load_lm(directory)[0]  # the reference is read from there once more
    trainer = make(tokenizer, tmp_path, lm=lm, bupo_layer=1, bupo_steps=1, max_steps=2, beta=0.1)
    trainer.train()
    kl = [log["kl"] for log in trainer.state.log_history if "kl" in log]
    assert kl[0] == 0 and kl[1] > 0


def test_lora_moves_only_adapters_up_to_the_layer(tokenizer, tmp_path):
    trainer = make(
        tokenizer,
        tmp_path,
        peft=LoraConfig(target_modules=["q_proj", "up_proj"]),
        bupo_layer=2,
        bupo_steps=2,
        max_steps=4,
    )
    before = weights(trainer)
    trainer.train()
    moved = differ(before, weights(trainer))
    assert moved and all("lora" in name and "layers.2" not in name for name in moved)
    assert {name.split("layers.")[1][0] for name in moved} == {"0", "1"}


def test_vllm_correction_is_off_in_phase_1(tokenizer, tmp_path):
    trainer = make(tokenizer, tmp_path, bupo_layer=1, bupo_steps=1, max_steps=4)
    values = []
    score = trainer._calculate_rewards
    trainer._calculate_rewards = lambda *a: (
        values.append(trainer.vllm_importance_sampling_correction) or score(*a)
    )
    trainer.train()
    assert values == [False, True]


@pytest.mark.parametrize(
    "options,says",
    [
        (dict(bupo_steps=-1), "bupo_steps must be 0 or more, not -1"),
        (dict(bupo_steps=1, bupo_layer=4), r"bupo_layer must be in 1\.\.3, not 4"),
        (
            dict(bupo_steps=1, use_vllm=True, off_policy_mask_threshold=0.1),
            "off_policy_mask_threshold",
        ),
        (
            dict(bupo_steps=1, gradient_checkpointing_kwargs={"use_reentrant": True}),
            "use_reentrant=False",
        ),
    ],
)
def test_settings_that_cannot_work(tokenizer, tmp_path, options, says):
    with pytest.raises(ValueError, match=says):
        make(tokenizer, tmp_path, **options)


# ---- the command line, and two processes ---------------------------------------------------------


def arguments(directory, out, **options):
    short = dict(
        model_name_or_path=directory,
        output_dir=out,
        use_cpu=True,
        max_steps=4,
        bupo_steps=1,
        bupo_layer=2,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=3,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    return [word for name, value in (short | options).items() for word in (f"--{name}", str(value))]


def test_command_line(directory, tmp_path, capsys):
    assert (
        hf.train.main(
            arguments(directory, tmp_path, eval_strategy="steps", eval_steps=4, eval_problems=8)
        )
        == 0
    )
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [entry["bupo/phase"] for entry in log if "bupo/phase" in entry] == [1, 2, 2, 2]
    assert any("eval_reward" in entry for entry in log)
    model, _ = load(tmp_path)
    assert model.n_layer == 3
    for options, says in [
        (dict(bupo_layer=7), "bupo_layer must be in 1..3, not 7"),
        (dict(model_name_or_path=tmp_path / "nothing"), "transformers cannot read"),
        (dict(operations="/"), "operations must be some of + - *"),
        (dict(dataset_name=tmp_path / "no-data"), "there is no data set"),
    ]:
        capsys.readouterr()
        assert hf.train.main(arguments(directory, tmp_path, **options)) == 2
        err = capsys.readouterr().err
        assert says in err and "Traceback" not in err


def test_arithmetic_holds_problems_out():
    train, held_out = hf.train.arithmetic(1, "+*")
    assert len(train) + len(held_out) == 198 and len(held_out) == 39  # less the two worked examples
    assert not set(train["prompt"]) & set(held_out["prompt"])
    for row in [*train, *held_out]:
        question = row["prompt"].split("\n")[-1]
        assert row["prompt"] == f"3+4=7\n2*4=8\n{question}" and row["answer"] == str(
            eval(question[:-1])
        )
    assert hf.train.right_answer(["7\n3", " 7", "77", ""], ["7"] * 4) == [1, 1, 0, 0]


def test_two_processes_have_the_same_weights(directory, tmp_path):
    """DDP over gloo: layer by the rule, accumulation, weight decay, checkpointing, both phases."""
    script = tmp_path / "ranks.py"
    script.write_text(
        "import os, sys, torch\n"
        f"sys.path.insert(0, {str(Path(__file__).parent.parent)!r})\n"
        "import hf.train\n"
        "torch.set_num_threads(1)\n"
        "trainer, _ = hf.train.make_trainer(sys.argv[1:])\n"
        "trainer.train()\n"
        "state = {n: p.detach() for n, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters()}\n"
        f"torch.save((trainer.layer, trainer.accelerator.num_processes, state), {str(tmp_path)!r} + '/rank' + os.environ['RANK'])\n"
    )
    options = dict(
        steps_per_generation=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        weight_decay=0.1,
        learning_rate=1e-2,
    )
    words = arguments(directory, tmp_path, max_steps=3, bf16=False, **options)
    at = words.index("--bupo_layer")
    del words[at : at + 2]
    here = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0", "--local_addr", "127.0.0.1"]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        *here,
        script,
    ]
    run = subprocess.run(
        [*torchrun, *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    (layer, n, zero), (other_layer, _, one) = (torch.load(tmp_path / f"rank{r}") for r in (0, 1))
    start = dict(load_lm(directory)[0].named_parameters())
    assert n == 2 and layer == other_layer and 1 <= layer < 3
    assert not differ(zero, one) and len(differ(start, zero)) == len(start)
