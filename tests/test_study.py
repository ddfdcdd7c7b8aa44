"""The study's plan, its arms and its paired differences, PPO's pieces, the mechanism's cosines. The
smallest form of the whole study runs in CI."""

import numpy as np
import pytest
import torch

import minibupo
import train_toy as toy
from experiments import common, mechanism, ppo, study
from minibupo import FULL, Policy, update
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
    assert common.mean_interval(found) == pytest.approx((40, half))


def test_equal_time_compares_with_the_control_of_that_second():
    slow, fast = line("GRPO", 70, 500, 0, 2.0), line("BuPO, rule", 70, 500, 0.5, 1.0)
    slow["held"] = [[5, 2.0, 0.2], [10, 4.0, 0.6]]  # 0.2 at 1 s (its first value), 0.2 at 2 s
    assert study.at_equal_time(fast, slow) == pytest.approx(0.3)
    slow["held"] = [[5, 1.0, 0.2], [10, 3.0, 0.6]]  # 0.2 at 1 s, 0.4 at 2 s
    assert study.at_equal_time(fast, slow) == pytest.approx((0.3 + 0.1) / 2)


def test_the_finite_set_stays_the_same():
    s = toy.Settings(n=3, n_layer=2, d_model=32, questions=32, group=2)
    drawn = [study.finite_set(s, step) for step in range(1, 13)]
    assert all(len(problems) == len(set(problems)) == s.questions for problems in drawn)
    fixed = toy.draw_questions(toy.rng_for(s.seed, "finite set"), study.FINITE, s.n)
    assert s.questions < len(set().union(*drawn)) <= study.FINITE
    assert set().union(*drawn) <= set(fixed)


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory):
    """A base model of four layers with random weights, and the sizes of a short run from it."""
    sizes = toy.SMOKE | dict(questions=8, steps=6, eval_problems=16, threads=1)
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("study") / "base.pt"
    toy.save_checkpoint(path, GPT(toy.Settings(**sizes).model_config()))
    return path, sizes


def weights_by_step(base, arm):
    """The weights of an arm before and after each of its six steps, and its Training."""
    path, sizes = base
    job = study.training(arm, 7, path, sizes)
    # a random model is never correct: rewards at random instead, the same ones at the same step
    sample = job.sample
    job.sample = lambda step, model=None: sample(step, model)._replace(
        rewards=torch.rand(8, 8, generator=torch.Generator().manual_seed(step))
    )
    weights = [{name: p.detach().clone() for name, p in job.model.named_parameters()}]
    for _ in arm.loop(job):
        weights.append({name: p.detach().clone() for name, p in job.model.named_parameters()})
    return weights, job


def moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def above(names, layer):
    return {name for name in names if "final_norm" in name or (common.layer_of(name) or 0) > layer}


@pytest.mark.parametrize("loop", [study.bupo, study.frozen_above, study.on_policy])
def test_in_phase_1_nothing_above_the_layer_moves(tiny_base, loop):
    weights, job = weights_by_step(tiny_base, study.Arm(s_inter=3, layer=2, loop=loop))
    names = set(weights[0])
    for before, after in zip(weights[:3], weights[1:4]):
        assert moved(before, after) == names - above(names, 2)
    for before, after in zip(weights[3:], weights[4:]):
        assert moved(before, after) == names


def test_the_frozen_arm_trains_pi_theta_and_bupo_the_layer(tiny_base):
    frozen, _ = weights_by_step(tiny_base, study.Arm(s_inter=3, layer=2, loop=study.frozen_above))
    grpo, _ = weights_by_step(tiny_base, study.Arm())
    bupo, _ = weights_by_step(tiny_base, study.Arm(s_inter=3, layer=2))
    change = {}
    for name, weights in (("frozen", frozen), ("grpo", grpo), ("bupo", bupo)):
        below = [n for n in weights[0] if n.startswith("blocks.0.")]
        change[name] = torch.cat([(weights[1][n] - weights[0][n]).flatten() for n in below])

    def cosine(a, b):
        return float(torch.cosine_similarity(change[a], change[b], dim=0))

    assert cosine("frozen", "grpo") > cosine("frozen", "bupo") + 0.1


def test_the_idle_arm_skips_the_first_updates_and_nothing_else(tiny_base):
    weights, job = weights_by_step(tiny_base, study.Arm(s_inter=3, layer=2, loop=study.idle))
    for before, after in zip(weights[:3], weights[1:4]):
        assert moved(before, after) == set()
    # what follows is GRPO on the problems, and on the rewards, of steps 4 to 6
    path, sizes = tiny_base
    torch.manual_seed(0)
    model = toy.load_model(path)
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.s.lr, fused=True)
    for step in (4, 5, 6):
        update(model, optimizer, job.sample(step, model), FULL)
        for name, weight in model.named_parameters():
            assert torch.equal(weight, weights[step][name])


@pytest.mark.parametrize("loop", [study.bupo, study.only_reset, study.moments_kept])
def test_when_the_moments_are_reset(tiny_base, loop):
    """AdamW counts the optimizer steps since the reset: four for each step of RL."""
    weights, job = weights_by_step(tiny_base, study.Arm(s_inter=3, layer=2, loop=loop))
    counts = {int(state["step"]) for state in job.optimizer.state.values()}
    # without a reset, the layers above only count their own steps of phase 2
    assert counts == ({12, 24} if loop is study.moments_kept else {12})


def test_normed_reads_the_internal_policy_through_the_final_norm(tiny_base):
    path, sizes = tiny_base
    model = toy.load_model(path)
    torch.nn.init.normal_(model.final_norm.weight, mean=1.0, std=0.3)
    tokens = torch.randint(toy.PAD, (3, 7))
    found = minibupo.policy_logits(study.Normed(model), tokens, Policy(2))
    h = model.residual(tokens, 2)
    h = h / (h.square().mean(-1, keepdim=True) + model.cfg.norm_eps).sqrt()
    wanted = (h * model.final_norm.weight) @ model.embed.weight.T
    torch.testing.assert_close(found, wanted)
    # the loop hands this view to update in phase 1, so the final norm learns there as well
    weights, _ = weights_by_step(tiny_base, study.Arm(s_inter=3, layer=2, loop=study.normed))
    assert "final_norm.weight" in moved(weights[0], weights[1])
    assert not any(name.startswith("blocks.2") for name in moved(weights[0], weights[1]))


def test_on_policy_samples_from_the_layer_only_in_phase_1(tiny_base, monkeypatch):
    arm = study.Arm(s_inter=2, layer=3, loop=study.on_policy)
    path, sizes = tiny_base
    job = study.training(arm, 7, path, sizes)
    layers = []
    rollouts = toy.rollouts
    monkeypatch.setattr(
        toy,
        "rollouts",
        lambda s, model, *more: layers.append(model.n_layer) or rollouts(s, model, *more),
    )
    assert [step for step, _ in arm.loop(job)] == [1, 2, 3, 4, 5, 6]
    assert layers == [3, 3, 4, 4, 4, 4]


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
    """A model with random weights, and rollouts of it with random rewards."""
    torch.manual_seed(0)
    s = toy.Settings(n=3, n_layer=3, d_model=32, questions=8, group=4)
    model = GPT(s.model_config())
    return model, toy.rollouts(s, model, 1)._replace(rewards=torch.rand(8, 4))


@pytest.mark.parametrize("policy", [FULL, Policy(2)])
def test_the_gradient_by_layer_is_that_of_an_update(policy):
    """The weights move by plain gradient descent, so the update shows its gradient."""
    model, rollouts = model_and_rollouts()
    found = common.gradient(model, rollouts, policy, chunk=5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    update(model, optimizer, rollouts, policy, minibatches=1, max_grad_norm=float("inf"))
    assert sorted(found) == list(range(1, (policy.layer or 3) + 1))
    for layer, vector in found.items():
        names = [name for name in before if name.startswith(f"blocks.{layer - 1}.")]
        after = dict(model.named_parameters())
        wanted = torch.cat([(before[n] - after[n].detach()).flatten() for n in names])
        torch.testing.assert_close(vector, wanted, rtol=1e-3, atol=1e-6)


def test_the_gradient_with_weights_is_linear_in_them():
    model, rollouts = model_and_rollouts()
    one, other = torch.randn(32), torch.randn(32)
    one[:20] = 0  # rows that are not computed
    both = common.gradient(model, rollouts, Policy(3), weights=one + other)
    parts = [common.gradient(model, rollouts, Policy(3), weights=w) for w in (one, other)]
    for layer, vector in both.items():
        torch.testing.assert_close(vector, parts[0][layer] + parts[1][layer], rtol=1e-3, atol=1e-5)
    assert common.gradient(model, rollouts, weights=torch.zeros(32)) == {}


def test_all_cosines_of_a_batch():
    model, rollouts = model_and_rollouts()
    found = mechanism.measure(model, rollouts, torch.Generator().manual_seed(0))
    assert all(len(values) == 3 and np.abs(values).max() <= 1.001 for values in found.values())
    # with the final norm, the internal policy of the top layer is pi_theta itself
    assert found["normed"][-1] == pytest.approx(1, abs=1e-4)
    assert found["raw"][-1] < 0.999
