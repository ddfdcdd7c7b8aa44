"""The gradient that the study of language models compares is that of minibupo.policy_loss, its
frozen control trains what BuPO trains, and its tables are of pairs."""

import pytest
import torch

import minibupo
from experiments import common, lm_study
from minibupo_hf.adapter import HFModel

transformers = pytest.importorskip("transformers", reason="needs the extra hf")


def random_model():
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
    return HFModel(transformers.Qwen2ForCausalLM(config))


@pytest.mark.parametrize("layer", [None, 2])
def test_gradient(layer):
    model = random_model()
    tokens, prompt_len = torch.randint(40, (24, 9)), torch.randint(2, 5, (24,))
    end = prompt_len + torch.randint(1, 5, (24,))
    rollouts = minibupo.Rollouts(tokens, prompt_len, end, torch.rand(3, 8))
    policy = minibupo.Policy(layer)
    found = common.gradient(model, rollouts, policy, chunk=lm_study.ROWS)
    mask = minibupo.response_mask(prompt_len, end, 9)
    old = minibupo.token_logprobs(model, tokens, mask, policy).detach()
    advantages = minibupo.group_advantages(rollouts.rewards).flatten()
    minibupo.policy_loss(model, tokens, old, advantages, mask, policy)[0].backward()
    blocks = model.lm.get_decoder().layers
    assert len(found) == (layer or 3)
    for number, vector in found.items():
        wanted = torch.cat([p.grad.flatten() for p in blocks[number - 1].parameters()])
        torch.testing.assert_close(vector, wanted, rtol=1e-3, atol=1e-6)
    assert common.cosine(found, found) == pytest.approx(1, abs=1e-5)
    other = {layer: torch.randn_like(vector) for layer, vector in found.items()}
    both = [torch.cat([g[layer] for layer in sorted(found)]) for g in (found, other)]
    wanted = float(torch.cosine_similarity(*both, dim=0))
    assert common.cosine(found, other | {99: torch.ones(3)}) == pytest.approx(wanted, abs=1e-5)


def test_the_frozen_control_trains_what_bupo_trains():
    lm = random_model().lm
    callback = lm_study.freeze_above(2, until=4)

    def learns(step):
        state = type("State", (), {"global_step": step})
        callback.on_step_begin(None, state, None, model=lm)
        return {name for name, parameter in lm.named_parameters() if parameter.requires_grad}

    everything = {name for name, _ in lm.named_parameters()}
    stays = {name for name in everything if ".layers.2." in name} | {"model.norm.weight"}
    assert len(stays) > 5 and learns(0) == learns(3) == everything - stays
    assert learns(4) == everything


def test_differences_are_of_equal_seeds():
    pytest.importorskip("scipy", reason="needs the extra bench")
    rewards = {
        ("GRPO", 1): 0.5,
        ("GRPO", 2): 0.7,
        ("BuPO", 1): 0.4,
        ("BuPO", 2): 0.3,
        ("BuPO", 3): 1,
    }
    lines = [
        {"arm": arm, "seed": seed, "reward": [reward, reward], "held_out": [0, reward]}
        for (arm, seed), reward in rewards.items()
    ]
    gained = lm_study.gained(lines, "BuPO", lm_study.over_the_run)
    assert gained == pytest.approx([-10, -40])
    row = lm_study.table_of_pairs(lines).splitlines()[-1]
    # Student's t for one degree of freedom is 12.706; the standard error is 15
    assert row.count("-25.0 ± 190.6") == 2
