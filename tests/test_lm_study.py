"""The gradient that the study of language models compares is that of minibupo.policy_loss."""

import pytest
import torch

import minibupo

pytest.importorskip("transformers", reason="needs the extra hf")
pytest.importorskip("trl", reason="needs the extra hf")
pytest.importorskip("scipy", reason="needs the extra bench")
import transformers  # noqa: E402

from experiments import lm_study  # noqa: E402
from minibupo_hf.adapter import HFModel  # noqa: E402


@pytest.mark.parametrize("layer", [None, 2])
def test_gradient(layer):
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    model = HFModel(transformers.Qwen2ForCausalLM(config))
    tokens, prompt_len = torch.randint(40, (24, 9)), torch.randint(2, 5, (24,))
    end = prompt_len + torch.randint(1, 5, (24,))
    rollouts = minibupo.Rollouts(tokens, prompt_len, end, torch.rand(3, 8))
    found, logp = lm_study.gradient(model, rollouts, layer)
    mask = minibupo.response_mask(prompt_len, end, 9)
    policy = minibupo.Policy(layer)
    old = minibupo.token_logprobs(model, tokens, mask, policy).detach()
    assert logp == pytest.approx(float(old[mask].mean()), rel=1e-4)
    advantages = minibupo.group_advantages(rollouts.rewards).flatten()
    model.zero_grad(set_to_none=True)
    minibupo.policy_loss(model, tokens, old, advantages, mask, policy)[0].backward()
    blocks = model.lm.get_decoder().layers
    assert len(found) == (layer or 3)
    for number, vector in found.items():
        wanted = torch.cat([p.grad.flatten() for p in blocks[number].parameters()])
        torch.testing.assert_close(vector, wanted, rtol=1e-3, atol=1e-6)
    assert lm_study.cosine(found, found) == pytest.approx(1, abs=1e-5)
