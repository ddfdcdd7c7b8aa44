"""GPT.from_pretrained against transformers, on tiny random models that transformers itself saved to disk.

logits, H^0..H^L, A^l, F^l to 1e-5         greedy tokens equal         bfloat16 within bfloat16
every parameter filled once                what GPT would compute wrongly is refused by name
"""

import json
import os
import shutil

import numpy as np
import pytest
import torch

for package in ("transformers", "safetensors", "gguf"):
    pytest.importorskip(package, reason=f'{package} is not installed: pip install -e ".[hf]"')

import gguf  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import analyze  # noqa: E402
import minibupo as bupo  # noqa: E402
import model as model_module  # noqa: E402
from minibupo import FULL, Policy, Rollouts  # noqa: E402
from model import GPT, checkpoint_config, encode_chat, load_tokenizer  # noqa: E402

SIZES = dict(vocab_size=37, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64)  # fmt: skip
LLAMA3 = dict(rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)  # fmt: skip
CASES = {  # family, changes to SIZES
    "qwen3": ("Qwen3", dict(head_dim=8, tie_word_embeddings=True)),
    "qwen3-untied-wide-heads": ("Qwen3", dict(head_dim=12, num_key_value_heads=1)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=1e6))),
    "qwen2-untied": ("Qwen2", dict(rms_norm_eps=1e-3, num_key_value_heads=4)),
    "llama": ("Llama", dict(rms_norm_eps=1e-5)),
    "llama-tied-rope-scaling": ("Llama", dict(tie_word_embeddings=True, rope_parameters=LLAMA3)),
    "llama-wide-heads": ("Llama", dict(head_dim=14, rope_parameters=LLAMA3)),
    "llama-sharded": ("Llama", {}),
}


def build(family, **changes):
    """A tiny random model of transformers, every weight random and of a size that matters: norms and biases too."""
    torch.manual_seed(0)
    config = getattr(transformers, family + "Config")(**(SIZES | changes), eos_token_id=None, bos_token_id=None)
    hf = getattr(transformers, family + "ForCausalLM")(config).eval()
    for p in hf.parameters():
        torch.nn.init.normal_(p, *((1.0, 0.3) if p.dim() == 1 else (0.0, 32**-0.5)))
    return hf


@pytest.fixture(scope="module", params=CASES, ids=CASES)
def pair(request, tmp_path_factory):
    """(transformers' model, the directory that it was saved to)."""
    family, changes = CASES[request.param]
    hf, directory = build(family, **changes), tmp_path_factory.mktemp("checkpoint")
    hf.save_pretrained(directory, max_shard_size="20KB" if request.param.endswith("sharded") else "1GB")
    assert request.param.endswith("sharded") == (len(list(directory.glob("*.safetensors"))) > 1)
    return hf, directory


@pytest.fixture
def saved(tmp_path):
    """A directory with a tiny Qwen3, to be spoiled."""
    build("Qwen3", head_dim=8, tie_word_embeddings=True).save_pretrained(tmp_path)
    return tmp_path


def random_tokens(B=3, T=24, seed=1):
    return torch.randint(0, 37, (B, T), generator=torch.Generator().manual_seed(seed))


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=atol)


@torch.no_grad()
def test_logits_and_stream_equal_transformers(pair):
    hf, directory = pair
    ours, tokens = GPT.from_pretrained(directory), random_tokens()
    wrote = {"self_attn": [], "mlp": []}
    hooks = [getattr(layer, name).register_forward_hook(
                 lambda _, __, out, name=name: wrote[name].append(out[0] if isinstance(out, tuple) else out))
             for layer in hf.model.layers for name in wrote]  # fmt: skip
    theirs = hf(tokens, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    trace = list(ours.trace(tokens))
    close(ours(tokens), theirs.logits)
    for l, h in enumerate(theirs.hidden_states[:-1]):
        close(ours.residual(tokens, l), h)
    # transformers gives its last hidden state behind the final norm
    close(ours.final_norm(trace[-1].resid_post), theirs.hidden_states[-1])
    assert (trace[-1].resid_post - theirs.hidden_states[-1]).abs().max() > 0.1
    for l, layer in enumerate(trace):
        close(layer.attn_out, wrote["self_attn"][l])
        close(layer.mlp_out, wrote["mlp"][l])


def test_greedy_equals_transformers(pair):
    hf, directory = pair
    prompt = random_tokens(4, 6)
    theirs = hf.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert torch.equal(GPT.from_pretrained(directory).generate(prompt, 20, temperature=0).tokens, theirs)


@torch.no_grad()
def test_bfloat16_is_as_near_as_transformers(pair):
    """Both run in bfloat16; the yardstick is what bfloat16 costs transformers itself against its own float32."""
    hf, directory = pair
    ours, tokens = GPT.from_pretrained(directory, dtype=torch.bfloat16), random_tokens()
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    exact, rough, logits = hf(tokens).logits, theirs(tokens).logits.float(), ours(tokens).float()
    cost = (rough - exact).square().mean().sqrt()
    assert (logits - exact).square().mean().sqrt() < 1.25 * cost
    assert (logits - rough).square().mean().sqrt() < 1.25 * cost


def test_every_parameter_is_filled_and_the_tie_kept(pair):
    hf, directory = pair
    state = torch.get_rng_state()
    ours = GPT.from_pretrained(directory)
    assert torch.equal(state, torch.get_rng_state())  # nothing was drawn
    assert not any(p.is_meta for p in ours.parameters()) and not any(b.is_meta for b in ours.buffers())
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in hf.parameters())
    assert sum(p.numel() for p in model_module.places(ours).values()) == sum(p.numel() for p in hf.parameters())
    assert (ours.lm_head.weight is ours.embed.weight) == ours.cfg.tied == hf.config.tie_word_embeddings
    assert all(p.requires_grad for p in ours.parameters())


def test_both_layouts_of_rope_in_config_json(tmp_path):
    hf, tokens = build("Llama", rope_parameters=LLAMA3), random_tokens(1, 40)
    hf.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"], config["rope_scaling"] = rope.pop("rope_theta"), rope
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        close(GPT.from_pretrained(tmp_path)(tokens), hf(tokens).logits)


def test_context_length(saved):
    assert GPT.from_pretrained(saved).cfg.context_length == 64
    assert GPT.from_pretrained(saved, context_length=10).cos.shape[0] == 10
    settings = json.loads((saved / "config.json").read_text()) | {"max_position_embeddings": 131_072}
    assert checkpoint_config(settings).context_length == 4096
    assert checkpoint_config(settings, 131_072).context_length == 131_072
    with pytest.raises(ValueError, match=r"context_length must be in 1\.\.64.*not 65"):
        GPT.from_pretrained(saved, context_length=65)


def test_tied_weights_may_be_stored_twice_if_they_agree(saved):
    weights = load_file(saved / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, saved / "model.safetensors")
    assert GPT.from_pretrained(saved).cfg.tied
    weights["lm_head.weight"][3, 4] += 1
    save_file(weights, saved / "model.safetensors")
    with pytest.raises(ValueError, match="not tied as its configuration says"):
        GPT.from_pretrained(saved)


@pytest.mark.parametrize("policy", [Policy(2), FULL], ids=["phase 1", "phase 2"])
def test_update_trains_a_loaded_model(saved, policy):
    model = GPT.from_pretrained(saved)
    prompt = random_tokens(4, 5)
    out = model.generate(prompt, 8, num_samples=4, layer=policy.layer, generator=torch.Generator().manual_seed(0))
    rewards = torch.rand(4, 4, generator=torch.Generator().manual_seed(1))
    logprobs = out.logprobs if policy.layer is None else out.layer_logprobs
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.5)
    stats = bupo.update(model, optimizer, Rollouts(out.tokens, out.prompt_len, out.end, logprobs, rewards), policy, minibatches=2)
    assert stats["optimizer_steps"] == 2 and stats["grad_norm"] > 0
    for name, p in model.named_parameters():
        frozen = policy.layer is not None and name.startswith(("blocks.2", "final_norm"))
        assert torch.equal(p, before[name]) == frozen, name


@pytest.mark.parametrize("changes,says", [
    (dict(model_type="mixtral"), "model_type must be llama, qwen2 or qwen3, not 'mixtral'"),
    (dict(model_type=None), "not None"),
    (dict(use_sliding_window=True, layer_types=None), "layer_types must all be full_attention"),
    (dict(layer_types=["full_attention", "sliding_attention"]), "not full_attention, sliding_attention"),
    (dict(hidden_act="gelu"), "hidden_act must be silu, not 'gelu'"),
    (dict(attention_bias=True), "attention_bias must be False"),
    (dict(mlp_bias=True), "mlp_bias must be False"),
    (dict(attention_dropout=0.1), "attention_dropout must be 0, not 0.1"),
    (dict(num_experts=8), "num_experts must be 0"),
    (dict(quantization_config={"bits": 4}), "quantization_config must be None"),
    (dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=4.0)), "rope_type must be default or llama3, not 'yarn'"),
    (dict(rope_parameters=None, rope_theta=1e4, rope_scaling=dict(type="linear", factor=2.0)), "not 'linear'"),
    (dict(rope_scaling=dict(rope_type="yarn", factor=4.0)), "not 'yarn'"),  # beside rope_parameters: it is what counts
    (dict(rope_parameters=dict(full_attention=dict(rope_type="yarn"))), "must be single sets of settings"),
    (dict(rope_scaling="linear"), "must be single sets of settings, not 'linear'"),
    (dict(rope_parameters=dict(rope_type="llama3", rope_theta=1e4, factor=8.0)), "low_freq_factor must be a number above 0, not None"),
    (dict(rope_parameters=LLAMA3 | dict(low_freq_factor=4.0)), "must be below high_freq_factor, not 4.0 and 4.0"),
    (dict(rope_parameters=dict(rope_theta=None)), "rope_theta must be a number above 0, not None"),
    (dict(rope_parameters=dict(rope_theta="1e6")), "not '1e6'"),
    (dict(rms_norm_eps=None), "rms_norm_eps must be a number above 0"),
    (dict(tie_word_embeddings="false"), "tie_word_embeddings must be of type bool or absent, not 'false'"),
    (dict(layer_types=3), "layer_types must all be full_attention, not 3"),
    (dict(rope_parameters=dict(rope_theta=1e4, partial_rotary_factor=0.5)), "partial_rotary_factor must be 1, not 0.5"),
    (dict(hidden_size=None), "hidden_size must be an integer, not None"),
])  # fmt: skip
def test_what_gpt_cannot_represent_is_refused_by_name(saved, changes, says):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=says):
        GPT.from_pretrained(saved)


def test_bad_weights_are_named(saved):
    file = saved / "model.safetensors"
    weights = load_file(file)
    norm, gate = "model.norm.weight", "model.layers.1.mlp.gate_proj.weight"
    for spoiled, says in [
        ({k: v for k, v in weights.items() if k != norm}, "the checkpoint has no model.norm.weight"),
        ({k: v for k, v in weights.items() if ".1." not in k}, "nor 10 more"),
        (weights | {"model.layers.3.mlp.up_proj.weight": torch.ones(2)}, "has a tensor model.layers.3.mlp.up_proj.weight"),
        (weights | {gate: torch.ones(41, 32)}, rf"{gate} is \(41, 32\).* asks for \(40, 32\)"),
        (weights | {norm: torch.ones(32, dtype=torch.int8)}, "int8"),
    ]:
        save_file(spoiled, file)
        with pytest.raises(ValueError, match=says):
            GPT.from_pretrained(saved)
    save_file(weights, file)
    for length in (0, 5, file.stat().st_size - 1):
        save_file(weights, file)
        with open(file, "r+b") as f:
            f.truncate(length)
        with pytest.raises(ValueError, match="truncated or not a safetensors file"):
            GPT.from_pretrained(saved)


def test_bad_directories_are_named(saved, tmp_path_factory):
    with pytest.raises(ValueError, match="has no config.json"):
        GPT.from_pretrained(tmp_path_factory.mktemp("empty"))
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has neither model.safetensors nor"):
        GPT.from_pretrained(saved)
    (saved / "config.json").write_text('{"model_type"')
    with pytest.raises(ValueError, match="not a readable JSON file"):
        GPT.from_pretrained(saved)


def test_another_file_is_refused(tmp_path):
    (tmp_path / "base.pt").write_bytes(b"PK")
    with pytest.raises(ValueError, match="base.pt is a file, but not a .gguf one"):
        GPT.from_pretrained(tmp_path / "base.pt")


def test_a_missing_shard_is_named(tmp_path):
    build("Llama").save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shutil.move(shard, tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"has no {shard.name}, which model.safetensors.index.json lists"):
        GPT.from_pretrained(tmp_path)


def test_a_name_that_the_hub_does_not_give(monkeypatch):
    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ValueError, match=r"'no/such-model' is no local file or directory, .* \(OSError\)"):
        GPT.from_pretrained("no/such-model")


def test_without_the_extra_it_says_what_to_install(saved, monkeypatch):
    def absent(package):
        raise ImportError(package)

    monkeypatch.setattr(model_module.importlib, "import_module", absent)
    with pytest.raises(ImportError, match=r'safetensors is needed .*: pip install -e "\.\[hf\]"'):
        GPT.from_pretrained(saved)


def own_memory():
    """Bytes of this process that are no mapped file (a safetensors file is mapped, its pages are the system's to drop)."""
    line = next(line for line in open("/proc/self/status", encoding="utf-8") if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's /proc")
def test_no_second_copy_of_the_weights_is_held(tmp_path, monkeypatch):
    sizes = dict(vocab_size=2048, hidden_size=512, intermediate_size=2048, num_hidden_layers=4)
    build("Llama", **sizes).save_pretrained(tmp_path)
    opened, seen = model_module.open_checkpoint, []

    def watched(source):
        settings, tensors = opened(source)
        return settings, ((name, seen.append(own_memory()) or tensor) for name, tensor in tensors)

    monkeypatch.setattr(model_module, "open_checkpoint", watched)
    before = own_memory()
    model = GPT.from_pretrained(tmp_path)
    weights = sum(4 * p.numel() for p in model.parameters())
    assert weights > 60e6 and max(seen) - before < 1.15 * weights


def test_dtype_must_be_floating(saved):
    with pytest.raises(ValueError, match="dtype must be a floating-point type"):
        GPT.from_pretrained(saved, dtype=torch.int64)


# ---- GGUF ----

PARTS = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
         "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "input_layernorm": "attn_norm",
         "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}  # fmt: skip


def write_gguf(path, hf, kind, *, q8=False, more=()):
    """Write a model of transformers as llama.cpp's converter does; with q8 its matrices of 32 columns as Q8_0."""
    c, writer = hf.config, gguf.GGUFWriter(path, kind)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    if head_dim * c.num_attention_heads != c.hidden_size:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    for name, value in more:
        getattr(writer, name)(value)
    if c.rope_parameters["rope_type"] == "llama3":  # what transformers divides each frequency by
        plain = c.rope_parameters["rope_theta"] ** -(np.arange(0, head_dim, 2) / head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / hf.model.rotary_emb.inv_freq.numpy()).astype(np.float32))
    for name, p in hf.named_parameters():
        if name.startswith("model.layers"):
            _, _, i, part, *_ = name.split(".")
            part, tail = name.removeprefix(f"model.layers.{i}.").rsplit(".", 1)
            stored = f"blk.{i}.{PARTS[part]}.{tail}"
        else:
            stored = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
                      "lm_head.weight": "output.weight"}[name]  # fmt: skip
        x = p.detach().numpy()
        if kind == "llama" and ("attn_q." in stored or "attn_k." in stored):
            x = x.reshape(-1, 2, head_dim // 2, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)
        if q8 and x.ndim == 2 and x.shape[1] == 32:
            writer.add_tensor(stored, gguf.quantize(x, gguf.GGMLQuantizationType.Q8_0), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(stored, np.ascontiguousarray(x))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@torch.no_grad()
@pytest.mark.parametrize("case", [case for case in CASES if not case.endswith("sharded")])
def test_gguf_equals_transformers(tmp_path, case):
    family, changes = CASES[case]
    hf, tokens = build(family, **changes), random_tokens()
    ours = GPT.from_pretrained(write_gguf(tmp_path / "tiny.gguf", hf, family.lower()))
    close(ours(tokens), hf(tokens).logits)
    assert ours.cfg.tied == hf.config.tie_word_embeddings
    stored = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors}["blk.0.attn_q.weight"]
    same = torch.equal(hf.model.layers[0].self_attn.q_proj.weight, torch.from_numpy(stored.copy()))
    assert same == (family != "Llama")  # the files of Llama are those with rows in another order


@torch.no_grad()
def test_quantised_gguf_is_dequantised(tmp_path):
    hf = build("Llama")
    ours = GPT.from_pretrained(write_gguf(tmp_path / "tiny.gguf", hf, "llama", q8=True))
    q, exact = ours.blocks[1].attn.qkv.weight[:32], hf.model.layers[1].self_attn.q_proj.weight
    # 127 steps to a row's largest entry, stored as float16: off by half a step, and a little more
    assert 0 < (q - exact).abs().max() <= exact.abs().max() / 127 * 0.55
    assert torch.equal(ours.blocks[1].mlp.down.weight, hf.model.layers[1].mlp.down_proj.weight)


@pytest.mark.parametrize("more,says", [
    (("add_expert_count", 4), "num_experts must be 0, not 4"),
    (("add_sliding_window", 8), "layer_types must all be full_attention"),
    (("add_rope_scaling_type", gguf.RopeScalingType.YARN), "rope_type must be default or llama3, not 'yarn'"),
    (("add_rope_dimension_count", 4), "partial_rotary_factor must be 1, not 0.5"),
    (("add_rope_scaling_factor", 4.0), "rope_type must be default or llama3, not 'linear'"),
    (("add_head_count", [4, 4, 2]), "one head_count for all layers, not 32 and"),
])  # fmt: skip
def test_gguf_that_gpt_cannot_represent_is_refused_by_name(tmp_path, more, says):
    with pytest.raises(ValueError, match=says):
        GPT.from_pretrained(write_gguf(tmp_path / "tiny.gguf", build("Llama"), "llama", more=[more]))


def test_bad_gguf_is_named(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", build("Llama"), "gemma")
    with pytest.raises(ValueError, match="not 'gemma'"):
        GPT.from_pretrained(path)
    content = write_gguf(path, build("Llama"), "llama").read_bytes()
    for spoiled in (b"", b"GGUF", b"no GGUF" * 99, content[:200], content[: len(content) // 2], content[:-64]):
        path.write_bytes(spoiled)
        with pytest.raises(ValueError, match="tiny.gguf is truncated or not a GGUF file"):
            GPT.from_pretrained(path)


# ---- tokenizer ----


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """The directory of a tokenizer that splits at spaces and opens every text with <s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: i for i, word in enumerate("<unk> <s> </s> user : two plus assistant four".split())}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    directory = tmp_path_factory.mktemp("tokenizer")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>",
                                         unk_token="<unk>").save_pretrained(directory)  # fmt: skip
    return directory


def test_encode_chat_tells_the_prompt_exactly(words):
    tokenizer = load_tokenizer(words)
    assert encode_chat(tokenizer, "two plus two", "four two") == ([1, 5, 6, 5, 8, 5], 4)
    tokenizer.chat_template = ("{% for m in messages %}<s> {{ m.role }} : {{ m.content }} </s>{% endfor %}"
                               "{% if add_generation_prompt %} assistant :{% endif %}")  # fmt: skip
    # the template's own <s> alone; a response that repeats the template's words moves no border
    assert encode_chat(tokenizer, "two plus two", "assistant : four") == ([1, 3, 4, 5, 6, 5, 2, 7, 4, 7, 4, 8], 9)
    assert encode_chat(tokenizer, "two", "") == ([1, 3, 4, 5, 2, 7, 4], 7)


def test_no_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match="transformers found no tokenizer in"):
        load_tokenizer(tmp_path)


# ---- analyze.py on a pretrained model ----


@pytest.fixture(scope="module")
def chat_model(words, tmp_path_factory):
    """The directory of a tiny Qwen3 with the tokenizer of `words` and a chat template."""
    directory = tmp_path_factory.mktemp("models") / "tiny-1.5"
    build("Qwen3", head_dim=8, vocab_size=12).save_pretrained(directory)
    tokenizer = load_tokenizer(words)
    tokenizer.chat_template = "{% for m in messages %}<s> user : {{ m.content }}{% endfor %} assistant :"
    tokenizer.save_pretrained(directory)
    return directory


def test_analyze_commands(chat_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for argv, written in [
        (["entropy", chat_model, "--text", "two plus two four", "--matched"], ["entropy.json", "entropy_flow.png", "entropy_change.png"]),
        (["writes", chat_model, "--text", "two plus two", "--dtype", "bfloat16"], ["writes.json", "writes.png"]),
        (["lens", chat_model, "two plus two"], ["lens.png", "lens.html"]),
    ]:
        assert analyze.main([str(a) for a in argv]) == 0, capsys.readouterr().err
        assert all((tmp_path / "out" / "tiny-1.5" / "figures" / name).stat().st_size > 0 for name in written)
    assert analyze.main(["sample", str(chat_model), "two plus two", "--layer", "2", "--count", "3"]) == 0
    printed = capsys.readouterr().out
    assert "layer 2's policy" in printed and printed.split("policy")[1].count("  '") == 3 + 1 and "pi_theta" in printed


@torch.no_grad()
def test_analyze_looks_at_the_response_alone(chat_model, tmp_path):
    """entropy.json against the plain product, at the positions from which the response's tokens are predicted."""
    argv = ["entropy", str(chat_model), "--prompt", "two plus two", "--text", "four two", "--out", str(tmp_path)]
    assert analyze.main(argv) == 0
    found = json.loads((tmp_path / "entropy.json").read_text())
    tokens = torch.tensor([[1, 3, 4, 5, 6, 5, 7, 4, 8, 5]])  # <s> user : two plus two assistant : | four two
    model = GPT.from_pretrained(chat_model)
    assert found["positions"] == 2 and found["log_vocab"] == pytest.approx(np.log(12))
    for l in range(4):
        log_pi = (model.residual(tokens, l)[0, 7:9].double() @ model.lm_head.weight.double().T).log_softmax(-1)
        assert found["layer"][l] == pytest.approx(float(-(log_pi.exp() * log_pi).sum(-1).mean()), abs=1e-5)


def test_analyze_says_what_is_wrong(chat_model, tmp_path, capsys, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    for argv, says in [
        (["entropy", chat_model], "needs --text"),
        (["entropy", chat_model, "--prompt", "two", "--text", ""], "--text '' has no response position"),
        (["entropy", chat_model, "--text", "two two", "--checkpoint", "final"], "--checkpoint is not for a pretrained model"),
        (["entropy", chat_model, "--text", "two " * 99], "longer than context_length = 64"),
        (["sample", chat_model, "two"], "needs --layer, 1..3"),
        (["sample", chat_model, "two", "--layer", "4"], "layer must be in 1..3, not 4"),
        (["table", chat_model], "is no run; of a pretrained model there are entropy, writes, lens, sample"),
        ([chat_model], "is no run"),
        (["entropy", "no-such/model", "--text", "a"], "'no-such/model' is no local file or directory"),
    ]:
        code = analyze.main([str(a) for a in argv])
        err = capsys.readouterr().err
        assert code == 2 and says in err and err.count("\n") == 1, (argv, err)


def test_update_at_real_width(tmp_path):
    """Phase 1 on a Qwen3 with the head size, grouping and vocabulary of the real ones."""
    hf_config = transformers.Qwen3Config(vocab_size=151_936, hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=16,
                                         num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, max_position_embeddings=64)  # fmt: skip
    torch.manual_seed(0)
    transformers.Qwen3ForCausalLM(hf_config).save_pretrained(tmp_path)
    model = GPT.from_pretrained(tmp_path)
    out = model.generate(torch.tensor([[9, 151_935, 7], [1, 2, 3]]), 4, num_samples=4, layer=2, generator=torch.Generator().manual_seed(0))
    before = {name: p.clone() for name, p in model.named_parameters()}
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0]])
    stats = bupo.update(model, torch.optim.AdamW(model.parameters(), lr=1e-3), Rollouts(out.tokens, out.prompt_len, out.end, out.layer_logprobs, rewards),
                        Policy(2), minibatches=1)  # fmt: skip
    assert stats["grad_norm"] > 0 and stats["clip_fraction"] == 0
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if not name.startswith(("blocks.2", "final_norm"))}
