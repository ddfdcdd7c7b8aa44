"""The study's plan, its paired differences, PPO's pieces and the mechanism's gradients. Its
smallest form as a whole runs in CI."""

import numpy as np
import pytest
import torch

import train_toy as toy
from experiments import mechanism, ppo, study
from minibupo import FULL, Policy, add_gradient, make_minibatches
from model import GPT


def line(arm, base, seed, accuracy, seconds=1.0):
    tier = {"avg@8": accuracy, "pass@8": 1.0}
    held = [[5, seconds, accuracy], [10, 2 * seconds, accuracy]]
    where = {"arm": arm, "base": base, "seed": seed}
    return where | {"n": 5, "held": held, "final": {"5": tier, "6": tier}}


def test_the_plan_has_each_control_and_no_run_twice():
    runs = study.plan()
    assert len(set(runs)) == len(runs) and {arm for arm, *_ in runs} == set(study.ARMS)
    for arm, *pair in runs:
        assert study.ARMS[arm].control is None or (study.ARMS[arm].control, *pair) in runs


def test_differences_are_of_pairs_and_intervals_over_bases():
    gains = {(70, 500): 0.1, (70, 501): 0.3, (71, 500): 0.4, (72, 500): 0.6}
    lines = [line("GRPO", *pair, 0.2) for pair in gains]
    lines += [line("BuPO, rule", *pair, 0.2 + gain) for pair, gain in gains.items()]
    lines += [line("BuPO, rule", 73, 500, 0.9)]  # has no partner
    found = study.differences(lines, "BuPO, rule", lambda a, b: study.area(a) - study.area(b))
    assert found == pytest.approx([20, 40, 60])
    stats = pytest.importorskip("scipy.stats", reason="needs the extra bench")
    half = stats.t.interval(0.95, 2, scale=20 / 3**0.5)[1]
    assert study.interval(found) == pytest.approx((40, half))


def test_equal_time_compares_with_the_control_of_that_second():
    slow, fast = line("GRPO", 70, 500, 0, 2.0), line("BuPO, rule", 70, 500, 0.5, 1.0)
    slow["held"] = [[5, 2.0, 0.2], [10, 4.0, 0.6]]  # 0.2 at 1 s (its first value), 0.2 at 2 s
    assert study.at_equal_time(fast, slow) == pytest.approx(0.3)
    slow["held"] = [[5, 1.0, 0.2], [10, 3.0, 0.6]]  # 0.2 at 1 s, 0.4 at 2 s
    assert study.at_equal_time(fast, slow) == pytest.approx((0.3 + 0.1) / 2)


def test_the_finite_set_stays_the_same():
    s = toy.Settings(n=3, n_layer=2, d_model=32, questions=32, group=2)
    model, seen = GPT(s.model_config()), set()
    for step in range(1, 13):
        batch = study.rollouts(s, model, step, finite=True)
        seen |= {tuple(tokens[:6]) for tokens in batch.tokens.tolist()}
    fixed = toy.draw_questions(toy.stream(s.seed, "finite set"), study.FINITE, s.n)
    assert len(seen) > s.questions and seen <= {tuple(toy.encode(p + "=")) for p in fixed}


def test_advantages_of_the_critic_are_reward_less_value_whitened_over_response_tokens():
    mask = torch.tensor([[False, True, True], [True, False, False]])
    values = torch.tensor([[9.0, 0.5, 0.25], [0.5, 9.0, 9.0]])
    found = ppo.whitened_advantages(torch.tensor([1.0, 0.0]), values, mask)
    raw = torch.tensor([0.5, 0.75, -0.5])
    torch.testing.assert_close(found[mask], (raw - raw.mean()) / raw.std())
    assert (found[~mask] == 0).all()


def test_ppo_of_equal_advantages_in_a_row_is_the_surrogate():
    torch.manual_seed(0)
    old, advantages = torch.randn(4, 6), torch.randn(4)
    logp, mask = old + 0.3 * torch.randn(4, 6), torch.rand(4, 6) > 0.3
    found = ppo.token_surrogate(logp, old, advantages[:, None].expand(4, 6), mask)
    torch.testing.assert_close(found, ppo.surrogate(logp, old, advantages, mask)[0])


def model_and_rollouts():
    """Of a fresh model, with rewards at random."""
    torch.manual_seed(0)
    s = toy.Settings(n=3, n_layer=3, d_model=32, questions=8, group=4)
    model = GPT(s.model_config())
    return model, toy.rollouts(s, model, 1)._replace(rewards=torch.rand(8, 4))


@pytest.mark.parametrize("policy", [FULL, Policy(2)])
def test_the_gradient_of_the_mechanism_is_that_of_an_update(policy):
    model, rollouts = model_and_rollouts()
    batch = mechanism.Batch(rollouts)
    found = mechanism.gradient(model, policy, batch, batch.of_rows[batch.row])
    model.zero_grad(set_to_none=True)
    options = dict(average="token", temperature=1.0)
    [(chunks, n)] = make_minibatches(model, rollouts, policy, 1, "grpo", chunk=64, **options)
    add_gradient(model, chunks, policy, normalizer=n, **options)
    assert len(found) == (policy.layer or 3)
    for block, vector in zip(model.blocks, found):
        wanted = torch.cat([p.grad.flatten() for p in block.parameters()])
        torch.testing.assert_close(vector, wanted, rtol=1e-4, atol=1e-6)


def test_all_cosines_of_a_batch():
    model, rollouts = model_and_rollouts()
    found = mechanism.measure(model, rollouts, torch.Generator().manual_seed(0))
    assert all(len(values) == 3 and np.abs(values).max() <= 1.001 for values in found.values())
    # of the top layer with the final norm the internal policy is pi_theta itself
    assert found["normed"][-1] == pytest.approx(1, abs=1e-4)
    assert found["raw"][-1] < 0.999
