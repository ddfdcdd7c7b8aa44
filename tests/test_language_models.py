"""experiments/language_models.py on tiny random models: what is measured about the final norm, and
the command that says what a layer is worth."""

import json

import numpy as np
import pytest
import torch

from experiments import common, language_models
from minibupo import Rollouts
from minibupo_hf.adapter import HFModel

transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")
SIZES = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3)
SIZES |= dict(num_attention_heads=2, num_key_value_heads=2, head_dim=8, pad_token_id=0)


def build(name):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES)
    model = HFModel(getattr(transformers, f"{name}ForCausalLM")(config))
    if getattr(model.final_norm, "weight", None) is not None:
        torch.nn.init.normal_(model.final_norm.weight, std=2.0)
    return model


@pytest.mark.parametrize(
    "name, scales",
    [
        ("Llama", lambda norm: norm.weight),
        ("Gemma", lambda norm: 1 + norm.weight),
        ("Olmo", lambda norm: torch.ones(16)),  # its norm has no weight
        ("StableLm", lambda norm: norm.weight),  # a LayerNorm, which subtracts the mean
    ],
)
def test_the_scales_of_the_final_norm_are_what_it_does(name, scales):
    model = build(name)
    if getattr(model.final_norm, "bias", None) is not None:
        torch.nn.init.normal_(model.final_norm.bias)
    expected = scales(model.final_norm)
    torch.testing.assert_close(language_models.norm_scales(model), expected, rtol=1e-4, atol=1e-4)
    tokens = torch.randint(40, (1, 9))
    found = language_models.choices(model, tokens)
    if not (expected < 0).any():
        assert found["signed"] == found["raw"]
    logits = model.unembed(model.residual(tokens[:, :-1], 3)[0] * expected.sign())
    correct = (logits.argmax(-1) == tokens[0, 1:]).float().mean()
    assert found["signed"]["correct"][-1] == pytest.approx(float(correct))


def test_the_worth_of_layers(monkeypatch, tmp_path, capsys):
    pytest.importorskip("scipy", reason="the extra `bench` is not installed")
    model = build("Llama")
    torch.nn.init.normal_(model.final_norm.weight, mean=1.0, std=0.1)
    monkeypatch.setattr(language_models, "load", lambda source, device: (model, None))
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    asked = []

    def sampled(model, tokenizer, seed, questions, **task):
        asked.append(task)
        generator = torch.Generator().manual_seed(seed)
        prompts = torch.randint(1, 40, (questions, 3), generator=generator)
        tokens, prompt_len, end = model.generate(prompts, 2, num_samples=8, generator=generator)
        rewards = (tokens[:, 3] % 2 == 0).float().view(questions, 8)
        return Rollouts(tokens, prompt_len, end, rewards)

    monkeypatch.setattr(language_models, "arithmetic_rollouts", sampled)
    argv = "worth somewhere tiny --layers 3 1 --digits 2 --operations + --batches 3".split()
    assert language_models.main(argv) == 0
    assert asked == [dict(digits=2, operations="+", longest=6)] * 3
    found = json.loads((tmp_path / "language_model_tiny_worth.json").read_text())
    assert list(found["rises"]) == ["GRPO", "layer 3", "layer 1"]
    value = {}
    for name, matrix in found["rises"].items():
        rise = np.array(matrix)
        value[name] = rise.sum() - np.trace(rise)
    assert value["GRPO"] > 0
    printed = capsys.readouterr().out
    for name in ("layer 3", "layer 1"):
        share = value[name] / value["GRPO"]
        assert f"{name}: a step of phase 1 is worth {share:.2f} ± " in printed


@pytest.mark.parametrize(
    "options, message",
    [
        ("--layers 4", "layer must be in 1..3, not 4"),
        ("--batches 2", "at least 3"),
        ("--layers 0", "not 0"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(monkeypatch, capsys, options, message):
    monkeypatch.setattr(language_models, "load", lambda source, device: (build("Llama"), None))
    assert language_models.main(["worth", "somewhere", *options.split()]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
