"""experiments/first_order.py: gradient, rise and worth against finite differences of an expected
reward that is enumerated, and the jackknife by hand."""

import itertools

import numpy as np
import pytest
import torch

from experiments import common, first_order, mechanism, study
from minibupo import FULL, Policy, Rollouts
from model import GPT, GPTConfig

V, PROMPTS = 4, torch.tensor([[0, 1], [2, 2]])  # a response is two tokens of four
RESPONSES = torch.tensor(list(itertools.product(range(V), repeat=2)))  # all sixteen
REWARDS = torch.rand(2, V * V, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def tiny_model():
    torch.manual_seed(3)
    model = GPT(GPTConfig(V, 8, n_layer=2, d_model=8, n_head=2)).double()
    torch.nn.init.normal_(model.final_norm.weight, mean=1.0, std=0.3)
    return model


@torch.no_grad()
def expected_reward(model) -> float:
    """Exactly: the sum over all responses of probability times reward, mean over both prompts."""
    total = 0.0
    for prompt, rewards in zip(PROMPTS, REWARDS):
        tokens = torch.cat([prompt.expand(len(RESPONSES), 2), RESPONSES], 1)
        log_pi = model(tokens[:, :-1]).log_softmax(-1)
        logp = sum(log_pi[range(V * V), t - 1, tokens[:, t]] for t in (2, 3))
        total += float((logp.exp() * rewards).sum()) / 2
    return total


def rollouts(model, seed, group):
    sampled = model.generate(
        PROMPTS, 2, num_samples=group, generator=torch.Generator().manual_seed(seed)
    )
    said = sampled.tokens[:, 2] * V + sampled.tokens[:, 3]
    rewards = REWARDS.gather(1, said.view(2, group))
    return Rollouts(*sampled, rewards)


def slope(model, direction, size=1e-4) -> float:
    """The slope of the expected reward along a direction, by central differences."""
    values = []
    with torch.no_grad():
        for sign in (1, -1):
            for parameter, d in zip(model.parameters(), direction):
                parameter.add_(sign * size * d)
            values.append(expected_reward(model))
            for parameter, d in zip(model.parameters(), direction):
                parameter.sub_(sign * size * d)
    return (values[0] - values[1]) / (2 * size)


def test_the_reward_gradient_is_the_slope_of_the_expected_reward():
    model = tiny_model()
    found = first_order.reward_gradient(model, rollouts(model, 1, 5_000), chunk=10_000)
    # the exact gradient by autograd through the enumeration
    total = 0.0
    for prompt, rewards in zip(PROMPTS, REWARDS):
        tokens = torch.cat([prompt.expand(len(RESPONSES), 2), RESPONSES], 1)
        log_pi = model(tokens[:, :-1]).log_softmax(-1)
        logp = sum(log_pi[range(V * V), t - 1, tokens[:, t]] for t in (2, 3))
        total = total + (logp.exp() * rewards).sum() / 2
    exact = torch.autograd.grad(total, list(model.parameters()))
    flat = torch.cat([g.flatten() for g in exact])
    sampled = torch.cat([g.flatten() for g in found])
    assert torch.cosine_similarity(flat, sampled, dim=0) > 0.98
    assert float(sampled.norm() / flat.norm()) == pytest.approx(1, abs=0.1)
    # and the enumeration is right: its gradient is the slope by differences
    direction = [torch.randn_like(p) for p in model.parameters()]
    along = sum(float((g * d).sum()) for g, d in zip(exact, direction))
    assert slope(model, direction) == pytest.approx(along, rel=1e-5)


@pytest.mark.parametrize("policy", [FULL, Policy(1), Policy(2)])
def test_rises_are_slopes_along_the_change_of_the_weights(policy):
    model = tiny_model()
    before = [p.detach().clone() for p in model.parameters()]
    batches = [rollouts(model, seed, 5_000) for seed in (1, 2)]
    step = first_order.policy_step(policy, lr=1e-3, minibatches=1, chunk=10_000)
    change = first_order.weight_change(model, lambda model: step(model, batches[0]))
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before))
    assert any(bool(d.any()) for d in change)
    if policy != FULL:  # phase 1 does not move what is above
        moved = {name for (name, _), d in zip(model.named_parameters(), change) if d.any()}
        assert "final_norm.weight" not in moved and "embed.weight" in moved
        assert any("blocks.1" in name for name in moved) == (policy.layer == 2)
    found = first_order.rises(model, batches, {"step": step}, chunk=10_000)["step"]
    expected = slope(model, change, size=0.1)
    size = sum(float(d.square().sum()) for d in change) ** 0.5
    gradient = first_order.reward_gradient(model, batches[1], chunk=10_000)
    scale = size * sum(float(g.square().sum()) for g in gradient) ** 0.5
    # relative to the product of both norms, because a slope may be near 0
    assert found[0, 1] / scale == pytest.approx(expected / scale, abs=0.02)


def test_the_frozen_step_moves_what_phase_1_moves():
    def above_1(model):
        return common.above(model, 1)

    model = tiny_model()
    batch = rollouts(model, 1, 64)
    changes = {}
    for name, step in (
        ("phase 1", first_order.policy_step(Policy(1), 1e-3, minibatches=1)),
        ("frozen", first_order.policy_step(FULL, 1e-3, frozen=above_1, minibatches=1)),
        ("GRPO", first_order.policy_step(FULL, 1e-3, minibatches=1)),
    ):
        change = first_order.weight_change(model, lambda model, step=step: step(model, batch))
        changes[name] = [bool(d.any()) for d in change]
    assert changes["phase 1"] == changes["frozen"] and all(changes["GRPO"])
    assert not all(changes["frozen"]) and all(p.requires_grad for p in model.parameters())


def test_the_worth_of_grpo_is_1_and_the_interval_is_the_jackknife():
    stats = pytest.importorskip("scipy.stats", reason="the extra `bench` is not installed")
    rng = np.random.default_rng(0)
    grpo = rng.normal(1, 0.1, (4, 4))
    assert first_order.first_order_worth(grpo, grpo) == pytest.approx((1, 0))
    assert first_order.first_order_worth(grpo / 2, grpo) == pytest.approx((0.5, 0))
    rise = rng.normal(0.3, 0.1, (4, 4))
    value, half = first_order.first_order_worth(rise, grpo)

    def by_hand(batches):
        pairs = [(i, j) for i in batches for j in batches if i != j]
        return sum(rise[p] for p in pairs) / sum(grpo[p] for p in pairs)

    assert value == pytest.approx(by_hand(range(4)))
    pseudo = [4 * value - 3 * by_hand([i for i in range(4) if i != k]) for k in range(4)]
    assert half == pytest.approx(stats.t.ppf(0.975, 3) * stats.sem(pseudo))
    np.fill_diagonal(rise, 100)  # a batch's own gradient does not count
    assert first_order.first_order_worth(rise, grpo) == pytest.approx((value, half))
    with pytest.raises(ValueError, match="at least 3 batches"):
        first_order.first_order_worth(rise[:2, :2], grpo[:2, :2])


def test_equal_rewards_are_refused():
    model = tiny_model()
    batch = rollouts(model, 1, 8)._replace(rewards=torch.ones(2, 8))
    with pytest.raises(ValueError, match="same reward"):
        first_order.rises(model, [batch] * 3, {"GRPO": first_order.policy_step(FULL, 1e-3)})


def test_predictions_are_compared_only_on_the_same_base_model():
    pytest.importorskip("scipy", reason="the extra `bench` is not installed")
    grpo = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    arms = {"GRPO": grpo, "BuPO, layer 3": [0.1] * 5 + grpo[:3], "GRPO, above 3 frozen": grpo}
    runs = [
        dict(arm=arm, base=70, seed=study.SEEDS[0], reward=reward, layer=3)
        for arm, reward in arms.items()
    ]
    ones = np.ones((3, 3))
    line = {"base": 70, "W": 0, "reward": 0.1, "rises": {"GRPO": ones.tolist()}}
    line["rises"] |= {
        "layer 3": (0.2 * ones).tolist(),
        "layers above 3 frozen": (0.7 * ones).tolist(),
    }
    found = mechanism.worth_points([line], runs)
    assert found == [
        ("layer 3", 70, 0, pytest.approx(0.2), pytest.approx(0)),
        ("layers above 3 frozen", 70, 0, pytest.approx(0.7), pytest.approx(1)),
    ]
    assert mechanism.worth_points([line | {"reward": 0.11}], runs) == []
    assert mechanism.worth_points([line | {"W": 1}], runs) == []
    assert "| 70, W = 0 | 0.20 ± 0.00 | 0.70 ± 0.00 |" in mechanism.table_of_worth([line])


def test_the_table_of_what_the_first_order_leaves_out():
    pytest.importorskip("scipy", reason="the extra `bench` is not installed")
    grpo = np.arange(0, 0.8, 0.05)
    idle = np.concatenate([np.zeros(5), grpo[:-5]])
    runs = []
    lines = []
    for base in (400, 401):
        runs.append(dict(arm="GRPO", base=base, seed=600, reward=grpo.tolist(), layer=4))
        rises = {"GRPO": [[9, 1, 1], [1, 9, 1], [1, 1, 9]]}  # the diagonal does not count
        after = {"GRPO": [0.02, 0.1]}
        for arm in mechanism.AFTER_ARMS:
            layer = study.ARMS[arm].layer
            reward = (0.75 * idle + 0.25 * grpo).tolist()  # worth 1/4
            runs.append(dict(arm=arm, base=base, seed=600, reward=reward, layer=layer))
            rises[mechanism.step_of(runs[-1])] = [[0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]
            after[arm] = [0.01, 0.02]
        lines.append({"base": base, "W": 0, "rises": rises, "after": after})
    table = mechanism.table_of_steps(lines, runs, W=0)
    values = [cell.split(" (")[0] for cell in table.splitlines()[2].split(" | ")]
    assert values == ["| layer 1", "0.50", "0.50", "0.20", "0.25"]
