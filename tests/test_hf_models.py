"""minibupo_hf/adapter.py: other people's models, files and texts. Each is read right, or refused.

All models are tiny and random. Nothing is downloaded.
"""

# ruff: noqa: E402 - imports come after the check that the extra is there

import copy

import pytest
import torch

pytest.importorskip("trl", reason='trl is not installed: pip install -e ".[hf]"')

import gguf
import huggingface_hub
import peft
import transformers
from tokenizers.processors import TemplateProcessing

import analyze
from minibupo_hf.adapter import (
    HFModel,
    apply_template,
    check_for_trl,
    encode_text,
    load,
    remove_dropout,
)
from tests.test_hf import OPEN, TIED, TOKENIZER, TOKENS, build, save, write_gguf

# ---- models that TRL can train -------------------------------------------------------------------

DEEP = {family: OPEN[family] for family in ("Llama", "Phi3", "Olmo2", "Qwen3", "Gemma", "Qwen3Moe")}


@pytest.mark.parametrize("family", DEEP)
def test_rounding_is_not_taken_for_missing_positions(family):
    """24 layers in bfloat16, in which rounding adds up."""
    check_for_trl(build(family, **(DEEP[family] | dict(num_hidden_layers=24))).bfloat16())


def test_missing_positions_are_found_in_bfloat16():
    lm = build("GPT2", n_layer=24, n_head=4, n_embd=32).bfloat16()
    remove_dropout(lm)
    with pytest.raises(ValueError, match="padding on the left changes its logits"):
        check_for_trl(lm)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value):
    """Whether they show in the logits of the check, as one of the norm does, or not."""
    for name in "model.norm", "model.embed_tokens":
        lm = build("Llama")
        lm.get_submodule(name).weight.data[-1] = value
        for check in HFModel, check_for_trl:
            with pytest.raises(ValueError, match=f"{name}.weight of .* not finite"):
                check(lm)


def test_numbers_that_overflow():
    lm = build("Llama").half()
    lm.model.embed_tokens.weight.data[:] = 60000
    lm.lm_head.weight.data[:] = 60000
    for check in HFModel, check_for_trl:
        with pytest.raises(ValueError, match="computes numbers that are not finite"):
            check(lm)


# ---- adapters ------------------------------------------------------------------------------------


def save_adapter(path, base, modules):
    """The PeftModel of a saved base model, with an adapter that has learned something (random)."""
    config = peft.LoraConfig(target_modules=modules, task_type="CAUSAL_LM", r=2)
    torch.manual_seed(5)
    lm = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
    for name, p in lm.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(p, std=0.3)
    lm.save_pretrained(path)
    return lm.eval()


@pytest.mark.parametrize("modules", [["embed_tokens", "q_proj"], ["lm_head"]])
def test_an_adapter_of_tied_embeddings_is_refused(tmp_path, modules):
    """Merging would change both the embedding and the unembedding. An untied model is right."""
    base = save(tmp_path / "base", build(**TIED))
    save_adapter(tmp_path / "adapter", base, modules)
    with pytest.raises(ValueError, match="the adapter cannot be merged into its model"):
        load(tmp_path / "adapter")
    save(base, build("Llama"))
    wanted = save_adapter(tmp_path / "adapter", base, modules)(TOKENS).logits
    merged = load(tmp_path / "adapter")[0](TOKENS)
    torch.testing.assert_close(merged, wanted, rtol=1e-4, atol=1e-4)


def test_a_directory_with_a_model_and_an_adapter_is_refused(tmp_path):
    """It is unknown which of two runs with the same output_dir is meant."""
    base = save(tmp_path, build(**TIED))
    save_adapter(tmp_path, base, ["q_proj"])
    with pytest.raises(ValueError, match="it has a whole model and an adapter: delete one of them"):
        load(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    assert torch.equal(load(tmp_path)[0](TOKENS), build(**TIED).eval()(TOKENS).logits)


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_an_adapter_from_the_hub(tmp_path, monkeypatch, with_tokenizer):
    """It is in the cache, as after a download. Its own tokenizer and chat template are used."""
    base = save(tmp_path / "base", build(**TIED))
    snapshot = tmp_path / "models--me--adapter" / "snapshots" / "abc"
    wanted = save_adapter(snapshot, base, ["q_proj"])(TOKENS).logits
    if with_tokenizer:
        tokenizer = copy.deepcopy(TOKENIZER)
        tokenizer.chat_template = ALL
        tokenizer.save_pretrained(snapshot)
    for name, text in ("refs/main", "abc"), (".no_exist/abc/config.json", ""):
        file = tmp_path / "models--me--adapter" / name
        file.parent.mkdir(parents=True)
        file.write_text(text)
    for name in "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE":
        monkeypatch.setattr(huggingface_hub.constants, name, str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model, tokenizer = load("me/adapter")
    torch.testing.assert_close(model(TOKENS), wanted, rtol=1e-4, atol=1e-4)
    assert tokenizer.chat_template == (ALL if with_tokenizer else None)


def test_a_tokenizer_without_eos_leaves_the_ends_of_generation_config(tmp_path):
    lm = build(**TIED)
    prompt = TOKENS[:1, :4]
    said = HFModel(lm).generate(prompt, 6, temperature=0).tokens[0, 4:].tolist()
    lm.generation_config.eos_token_id = said[2]
    save(tmp_path, lm)
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    subject = analyze.PretrainedModel(tmp_path, device="cpu")
    found = subject.model.generate(prompt, 6, temperature=0, eos_id=subject.eos_id)
    assert found.end.item() == 4 + said.index(said[2]) + 1 < 10


# ---- GGUF files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["qwen2", "llama-bpe", "gpt-2", "smollm", "default", "new"])
def test_a_gguf_tokenizer(tmp_path, monkeypatch, split):
    """One that transformers cannot split as the file says is refused. A turn's end is an end."""

    class Writer(gguf.GGUFWriter):
        def write_header_to_file(self):
            self.add_tokenizer_pre(split)
            self.add_eos_token_id(7)
            self.add_eot_token_id(5)
            super().write_header_to_file()

    monkeypatch.setattr(gguf, "GGUFWriter", Writer)
    path = write_gguf(tmp_path / "a.gguf", build("Llama", rms_norm_eps=1e-5))
    if split in ("default", "new"):
        with pytest.raises(ValueError, match=f"tokenizer.ggml.pre = {split}, which transformers"):
            load(path)
    else:
        assert load(path)[0].eos_ids == [5, 7]


# ---- texts ---------------------------------------------------------------------------------------


def test_a_tokenizer_that_puts_a_token_after_a_text_is_refused():
    """Other than EOS, which is taken away."""
    tokenizer = copy.deepcopy(TOKENIZER)
    for last, wanted in ("<eos>", [1, 10]), ("=", None):
        special = [(last, tokenizer.convert_tokens_to_ids(last))]
        after = TemplateProcessing(f"$A {last}", special_tokens=special)
        tokenizer.backend_tokenizer.post_processor = after
        if wanted:
            assert encode_text(tokenizer, "1+") == wanted
        else:
            with pytest.raises(ValueError, match=r"the tokenizer reads '1\+' as '1\+='"):
                encode_text(tokenizer, "1+")


def chat(*contents):
    """Messages with these contents, of a system, a user, an assistant and a user."""
    roles = ["system", "user", "assistant", "user"][-len(contents) :]
    return [{"role": role, "content": content} for role, content in zip(roles, contents)]


ALL = "{% for m in messages %}{{ m.content }}={% endfor %}"
NO_SYSTEM = ALL.replace("{{", "{% if m.role != 'system' %}{{").replace("}}", "}}{% endif %}")
LAST = "{{ messages[-1].content }}="
BOILERPLATE = "1+2={% if not messages %}{{ messages[0].content }}{% endif %}"


@pytest.mark.parametrize(
    "template,contents,missing",
    [
        (NO_SYSTEM, ["7", "1", "2", "3"], "7"),
        (LAST, ["1", "2", "3"], "1"),
        (LAST, ["3", "2", "3"], "3"),  # the last one hides it
        (BOILERPLATE, ["2"], "2"),
    ],
)
def test_a_chat_template_keeps_every_message(template, contents, missing):
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = ALL
    whole = "=".join([*contents, ""])
    assert apply_template(tokenizer, chat(*contents)) == whole
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=f"the chat template makes '.*' of '{missing}'"):
        apply_template(tokenizer, chat(*contents))


def test_a_chat_template_gets_its_options():
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = ALL + "{% if thinking %}-{% endif %}"
    assert apply_template(tokenizer, chat("1")) == "1="
    assert apply_template(tokenizer, chat("1"), thinking=True) == "1=-"


@pytest.mark.parametrize("content", [None, 5, [{"type": "text", "text": "1+1="}]])
def test_a_message_whose_content_is_no_text(content):
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = ALL
    for messages in chat("1", content), chat(content, "1", "2"), [{"role": "user"}], [None]:
        with pytest.raises(ValueError, match="the chat template needs messages with a text"):
            apply_template(tokenizer, messages)
