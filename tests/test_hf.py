"""minibupo_hf/: HFModel against transformers, BuPOTrainer against minibupo.policy_loss.

All models are tiny and random. Nothing is downloaded.
"""

# ruff: noqa: E402 - imports come after the check that the extra is there

import pytest
import torch

for package in ("transformers", "trl", "datasets", "peft", "gguf"):
    pytest.importorskip(package, reason=f'{package} is not installed: pip install -e ".[hf]"')

import gguf
import peft
import transformers
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import T5Config, T5ForConditionalGeneration
from trl import GRPOConfig, GRPOTrainer

import minibupo as m
from experiments import language_models, trl_peer
from minibupo_hf.adapter import HFModel, encode_chat, encode_text, load, truncated
from minibupo_hf.bupo_trainer import BuPOConfig, BuPOTrainer

SIZES = dict(vocab_size=37, hidden_size=32, intermediate_size=40, num_hidden_layers=3)
SIZES |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
SIZES |= dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
LLAMA3 = dict(rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0)
LLAMA3 |= dict(high_freq_factor=4.0, original_max_position_embeddings=16)
TIED = dict(head_dim=8, tie_word_embeddings=True)
OPT = dict(ffn_dim=40, word_embed_proj_dim=32)
OPEN = dict.fromkeys(("Llama", "SmolLM3", "Phi3", "Olmo2"), {}) | {
    "Qwen3": TIED,
    "Qwen2": dict(tie_word_embeddings=True, attention_dropout=0.5),
    "Qwen2 with two masks": dict(use_sliding_window=True, sliding_window=4, max_window_layers=1),
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


# ---- adapter -------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", OPEN)
def test_contract(family):
    lm = build(family, **OPEN[family]).eval()
    theirs = lm(TOKENS, output_hidden_states=True)
    hooks = sum(len(module._forward_hooks) for module in lm.modules())  # transformers' own
    model = HFModel(lm.train())  # is in evaluation mode all the same
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

    # A truncated model has the same weights, of which it uses all, and says what its policy says.
    short = model.truncated(2)
    h = model.residual(TOKENS, 2)
    with torch.enable_grad():
        short(TOKENS).square().sum().backward()
    used = {id(p) for p in model.parameters() if p.grad is not None}
    assert {id(p) for p in short.parameters()} == used < {id(p) for p in model.parameters()}
    assert torch.equal(short(TOKENS), model.unembed(h)) and torch.equal(short.final_norm(h), h)
    assert len(list(short.trace(TOKENS))) == short.n_layer == 2
    below = short.truncated(1)
    assert torch.equal(below(TOKENS), model.unembed(model.residual(TOKENS, 1)))
    assert len(list(below.blocks)) == 1 and len(short.blocks) == 2 and len(model.blocks) == 3
    said = short.generate(TOKENS[:, :5], 6, temperature=0).tokens
    assert torch.equal(said[:, 5:], m.policy_logits(model, said, m.Policy(2))[:, 4:-1].argmax(-1))
    assert sum(len(module._forward_hooks) for module in lm.modules()) == hooks


def test_models_that_are_refused_in_a_sentence():
    model = HFModel(build(**TIED))
    outside = torch.tensor([[3, 37]])
    doubled = build("Llama")
    doubled.model.layers[1].register_forward_hook(lambda *args: 2 * args[-1])
    coarse = build("GPTNeoX").bfloat16()
    coarse.gpt_neox.embed_in.weight.data[:, 0] = 3000.0  # hides no wrong sum in the others
    placed = HFModel(build())
    placed.decoder.forward = placed.decoder.forward  # as accelerate replaces it
    with truncated(model.lm, 1), pytest.raises(ValueError, match="no list of 3 blocks"):
        HFModel(model.lm)
    for call, says in [
        (lambda: build("Gemma2", head_dim=8, final_logit_softcapping=3e2), "scaled or capped"),
        (lambda: build("Granite", logits_scaling=3.0), "other logits"),
        (lambda: build("GPTNeoX"), "attention of layer 1"),  # its blocks are parallel
        (lambda: coarse, "attention of layer 1"),
        (lambda: doubled, "FFN of layer 2"),
        (lambda: build("OPT", **OPT), "no attention and FFN by name"),
        (lambda: build("OPT", do_layer_norm_before=False, **OPT), "with a final norm"),
        (lambda: build("Bloom"), "BloomBlock has .* returns more than a stream"),
        (lambda: T5ForConditionalGeneration(T5Config(**SIZES)), "no decoder-only language model"),
        (lambda: truncated(model.lm, -1).__enter__(), r"0\.\.3, not -1"),
        (lambda: truncated(model.lm, 4).__enter__(), r"0\.\.3, not 4"),
        (lambda: model.truncated(0), r"1\.\.3, not 0"),
        (lambda: model(outside), "token id 37"),
        (lambda: model.residual(outside, 1), "token id 37"),
        (lambda: model.residual(TOKENS, 1.5), "not 1.5"),
        (lambda: next(model.trace(outside)), "token id 37"),
        (lambda: model(TOKENS.repeat(1, 6)), "context_length = 64"),
        (lambda: placed.truncated(1), "a model with a device_map cannot be truncated"),
    ]:
        with pytest.raises(ValueError, match=says):
            HFModel(call())


# ---- reading -------------------------------------------------------------------------------------


def test_load_a_directory_and_encode(tmp_path):
    lm = build(**TIED)
    directory = save(tmp_path, lm)
    model, tokenizer = load(directory)
    assert torch.equal(model(TOKENS), lm.eval()(TOKENS).logits)
    assert {p.dtype for p in load(directory, dtype="bfloat16")[0].parameters()} == {torch.bfloat16}
    assert encode_text(tokenizer, "") == []
    both = TemplateProcessing("<eos> $A <eos>", special_tokens=[("<eos>", 14)])
    tokenizer.backend_tokenizer.post_processor = both
    assert encode_chat(tokenizer, "1+1=", "2") == ([14, 1, 10, 1, 13, 2], 5)
    assert encode_text(tokenizer, "12") == [14, 1, 2]
    turns = "{% for m in messages %}={{ m.content }}{% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}-{% endif %}"
    assert encode_chat(tokenizer, "1", "-2") == ([13, 1, 11, 11, 2], 3)  # the border stays


def write_gguf(path, lm, extra_tensors=(), **metadata):
    """A Llama with the names that llama.cpp's converter gives. It also permutes rows, which this
    file leaves as they are."""
    values = dict(block_count=3, context_length=64, embedding_length=32, feed_forward_length=40)
    values |= dict(head_count=4, head_count_kv=2, layer_norm_rms_eps=1e-5, tokenizer_model="gpt2")
    values |= dict(token_list=[*map(chr, range(97, 133)), "ab"], token_merges=["a b"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    tensors = {names.get_name(n, [".weight"]): p for n, p in lm.named_parameters()}
    tensors |= {name: torch.ones(32) for name in extra_tensors}
    w = gguf.GGUFWriter(path, "llama")
    for name, value in values.items():
        getattr(w, f"add_{name}")(value)
    for name, value in metadata.items():
        add = {str: w.add_string, bool: w.add_bool, int: w.add_uint32, float: w.add_float32}
        add[type(value)](f"llama.{name.replace('__', '.')}", value)
    for name, tensor in tensors.items():
        w.add_tensor(name, tensor.detach().numpy())
    for part in ("header", "kv_data", "tensors"):
        getattr(w, f"write_{part}_to_file")()
    w.close()
    return path


def test_gguf(tmp_path, monkeypatch):
    lm = build("Llama", rms_norm_eps=1e-5)
    agreed = dict(attention__key_length=8, rope__freq_base=1e4, rope__scaling__type="none")
    found = load(write_gguf(tmp_path / "qwen.gguf", lm, **agreed))[0].lm
    ours, theirs = (model.model.layers[1].mlp.up_proj.weight for model in (found, lm))
    assert torch.equal(ours, theirs)
    found.save_pretrained(tmp_path / "saved")  # transformers refuses to save a quantised model
    assert "quantization_config" not in (tmp_path / "saved" / "config.json").read_text()
    lora = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(found, lora).save_pretrained(tmp_path / "adapter")
    assert torch.equal(
        load(tmp_path / "adapter")[0](TOKENS), load(tmp_path / "qwen.gguf")[0](TOKENS)
    )
    monkeypatch.setattr(language_models, "CACHE", tmp_path)
    with pytest.raises(ValueError, match="has SHA-256 .*: delete it and fetch it"):
        language_models.fetch("qwen")


@pytest.mark.parametrize(
    "says,tensors,metadata",
    [
        ("rope_freqs.weight", ["rope_freqs.weight"], {}),
        (r"have (\d+) weights, the model has (\d+)", ["blk.0.attn_q.bias"], {}),
        ("rope.scaling.factor = 4.0", [], dict(rope__scaling__factor=4.0)),
        ("rope.scaling.type = linear", [], dict(rope__scaling__type="linear")),
        ("rope.scaling.type = yarn", [], dict(rope__scaling__type="yarn")),
        ("rope.scale_linear = 2.0", [], dict(rope__scale_linear=2.0)),
        ("attention.sliding_window = 4", [], dict(attention__sliding_window=4)),
        ("attention.causal = False", [], dict(attention__causal=False)),
        ("attention.scale = 0.5", [], dict(attention__scale=0.5)),
        ("logit_scale = 3.0", [], dict(logit_scale=3.0)),
        ("key_length = 16", [], dict(attention__key_length=16)),
    ],
)
def test_gguf_with_more_than_transformers_reads(tmp_path, says, tensors, metadata):
    lm = build("Llama", rms_norm_eps=1e-5)
    with pytest.raises(ValueError, match=says):
        load(write_gguf(tmp_path / "a.gguf", lm, tensors, **metadata))


def test_weights_without_a_place(tmp_path):
    """A bias that the config does not have is refused. A second unembedding is used if it differs
    from the embedding, although the config says that they are tied."""
    more = {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}
    file = save(tmp_path, build("Llama")) / "model.safetensors"
    save_file(load_file(file) | more, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="it has weights model.layers.0.*bias, for which"):
        load(tmp_path)
    lm = build(**TIED)
    save(tmp_path, lm)
    save_file(load_file(file) | {"lm_head.weight": torch.eye(37, 32)}, file, {"format": "pt"})
    model = load(tmp_path)[0]
    normed = model.final_norm(model.residual(TOKENS, 3))
    torch.testing.assert_close(model(TOKENS)[..., :32], normed)
    assert torch.equal(model.embed.weight, lm.get_input_embeddings().weight)


# ---- the trainer ---------------------------------------------------------------------------------

OPTIONS = dict(use_cpu=True, bf16=False, gradient_checkpointing=False, seed=3, logging_steps=1)
OPTIONS |= dict(disable_tqdm=True, save_strategy="no", lr_scheduler_type="constant")
OPTIONS |= dict(per_device_train_batch_size=8, num_generations=4, max_completion_length=12)
OPTIONS |= dict(steps_per_generation=2, loss_type="bnpo", learning_rate=1e-2, weight_decay=0.1)


def even(completion_ids, **_):
    """The reward: how many of its tokens are even."""
    return [sum(i % 2 == 0 for i in ids) / 12 for ids in completion_ids]


def prompts(n):
    """A data set of n prompts."""
    return Dataset.from_dict({"prompt": [f"{i}+{i % 7}=" for i in range(n)]})


def trained(out, trainer=BuPOTrainer, lm=None, **options):
    """The trainer after training."""
    config = GRPOConfig if trainer is GRPOTrainer else BuPOConfig
    args = config(output_dir=str(out), **(OPTIONS | options))
    given = dict(processing_class=TOKENIZER, train_dataset=prompts(48))
    trainer = trainer(lm or build(**TIED), even, args, **given)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    return trainer


def weights(trainer):
    """A copy of all weights {name: tensor}, also of a sharded model."""
    named = trainer.model.named_parameters()
    return {
        n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for n, p in named
    }


def differ(a, b):
    """The names of weights that are not equal."""
    return {name for name in a if not torch.equal(a[name], b[name])}


def logged(trainer, name):
    """The values of one name in the log."""
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
    """Compares loss and gradients of every mini-batch with policy_loss's on a copy of the model,
    and keeps the mini-batch with the state of the trainer."""

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
        torch.testing.assert_close(theirs, grads, rtol=1e-3, atol=atol)  # None for None
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
    dH_mlp = m.look_inside(HFModel(copied), *batch)["dH_mlp"].mean(1)
    assert logged(trainer, "bupo/dH_mlp") == [pytest.approx(dH_mlp.tolist(), rel=1e-4, abs=1e-4)]
    assert [trainer.layer] == [m.target_layer(dH_mlp)] == logged(trainer, "bupo/layer")
    assert all("step" in entry for entry in trainer.state.log_history)

    # What is above the layer stays in phase 1, under weight decay.
    below = tuple(f"model.layers.{i}" for i in range(trainer.layer)) + ("model.embed", "lm_head")
    names = states[0].keys()
    assert differ(states[0], states[4]) == {name for name in names if name.startswith(below)}
    assert differ(states[4], states[11]) == names
    now = HFModel(trainer.model)  # whose forward TRL has replaced
    below = now.truncated(1)(TOKENS % 10)
    torch.testing.assert_close(below, m.policy_logits(now, TOKENS % 10, m.Policy(1)))
    for trainer.phase in (1, 2):  # evaluation is pi_theta's in both
        torch.manual_seed(0)
        trainer.evaluate(trainer.train_dataset.select(range(2)))
    one, two = logged(trainer, "eval_entropy")
    assert one == pytest.approx(two)


def test_no_steps_is_grpo(tmp_path):
    # each trainer seeds torch's generator when it is made
    grpo, bupo = (trained(tmp_path, t, max_steps=4) for t in (GRPOTrainer, BuPOTrainer))
    assert not differ(weights(grpo), weights(bupo))
    for name in ("loss", "entropy", "reward"):
        assert logged(grpo, name) == logged(bupo, name)
    assert not bupo.args.ddp_find_unused_parameters
    trained(tmp_path, lm=build("GPTNeoX"), max_steps=1)  # which phase 1 could not train


def test_corners_of_the_options(tmp_path):
    """The top layer; a correction that is off; several batches of rollouts per optimizer step."""
    options = dict(bupo_steps=2, bupo_layer=3, max_steps=2, gradient_accumulation_steps=2)
    options |= dict(steps_per_generation=1, vllm_importance_sampling_correction=False)
    trainer = trained(tmp_path, **options, off_policy_mask_threshold=0.1)
    assert logged(trainer, "bupo/phase") == [1, 2]
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {1}  # were reset
    assert not trainer.vllm_importance_sampling_correction


def test_a_resumed_run_matches_an_uninterrupted_one(tmp_path):
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
