"""minibupo.py against closed forms, brute-force float64 loops, finite differences, enumeration.

entropy(uniform) = log V, entropy(one-hot) = 0       first mini-batch: ratio 1, nothing cut off
phase 1 at layer l: d loss / d theta_k = None, k > l  rows without advantage: the same gradient
any chunk, any padding: the same gradient             s_inter = 0: GRPO, bit for bit
"""

import itertools
import math
import statistics

import numpy as np
import pytest
import torch
from conftest import tiny

import minibupo
from minibupo import FULL, Policy, Rollouts

POLICIES = [FULL, Policy(1), Policy(2), Policy(3), Policy(2, "attn_out"), Policy(2, "mlp_out")]
EOS, PAD = 4, 9


def rollouts(model, Q=6, G=4, temperature=1.0, seed=0, rewards=None):
    """Ragged prompts, responses of unequal length, one all-right and one all-wrong group."""
    g = torch.Generator().manual_seed(seed)
    prompt = torch.randint(0, 11, (Q, 6), generator=g)
    lengths = torch.randint(2, 7, (Q,), generator=g)
    options = dict(num_samples=G, eos_id=EOS, pad_id=PAD, temperature=temperature, generator=g)
    out = model.generate(prompt, 9, prompt_len=lengths, **options)
    if rewards is None:
        rewards = torch.randint(0, 2, (Q, G), generator=g).float()
        rewards[0], rewards[1], rewards[-1, :2] = 1, 0, torch.tensor([0.0, 1.0])
    return Rollouts(*out, rewards)


def mask_of(batch):
    return minibupo.response_mask(batch.prompt_len, batch.end, batch.tokens.shape[1])


def gradients(model):
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(a, b, atol=1e-6):
    for name in a:
        assert (a[name] is None) == (b[name] is None), name
        if a[name] is not None:
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=atol, msg=name)


def still(model):
    """An optimizer that leaves the weights, and so update's gradient, as they are."""
    return torch.optim.SGD(model.parameters(), lr=0.0)


# ---- positions and policies ----


def test_response_mask_by_hand():
    """Ends early, ends at the last place, never ends: EOS is in, nothing after it, no prompt."""
    mask = minibupo.response_mask(torch.tensor([2, 3, 1]), torch.tensor([4, 6, 6]), 6)
    assert mask.int().tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
    docstring = minibupo.response_mask(torch.tensor([4]), torch.tensor([6]), 8)
    assert docstring.tolist() == [[False, False, False, True, True, False, False]]


@pytest.mark.parametrize("policy", POLICIES)
def test_token_logprobs_one_token_at_a_time(policy):
    model = tiny(dtype=torch.float64)
    batch = rollouts(model, Q=2, G=3)
    logp = minibupo.token_logprobs(model, batch.tokens, mask_of(batch), policy, temperature=0.7)
    for i, row in enumerate(batch.tokens):
        for t in range(len(row) - 1):
            z = minibupo.policy_logits(model, row[None, : t + 1], policy)[0, -1] / 0.7
            inside = batch.prompt_len[i] <= t + 1 < batch.end[i]
            expected = z[row[t + 1]] - torch.logsumexp(z, 0) if inside else 0.0
            assert abs(float((logp[i, t] - expected).detach())) < 1e-10


def test_internal_policies_are_raw_unembeddings_and_all_differ():
    model, tokens = tiny(), torch.randint(0, 11, (2, 7))
    E_u, found = model.lm_head.weight, [model(tokens)]
    assert torch.equal(minibupo.policy_logits(model, tokens), model(tokens))
    for l, trace in enumerate(model.trace(tokens), 1):
        for site in minibupo.SITES:
            h = getattr(trace, site)
            logits = minibupo.policy_logits(model, tokens, Policy(l, site))
            torch.testing.assert_close(logits, h @ E_u.T)
            assert not torch.allclose(logits, model.final_norm(h) @ E_u.T)  # no logit lens
            found.append(logits)
    assert all((a - b).abs().max() > 0.1 for a, b in itertools.combinations(found, 2))


BAD = [Policy(4), Policy(-1), Policy(0, "attn_out"), Policy(4, "mlp_out"), Policy(1, "resid_pre")]


@pytest.mark.parametrize("bad", [*BAD, Policy(None, "attn_out"), Policy(1.5)])
def test_policies_that_do_not_exist(bad):
    with pytest.raises(ValueError, match="layer|site"):
        minibupo.policy_logits(tiny(), torch.zeros(1, 3, dtype=torch.long), bad)


class Contract(torch.nn.Module):
    """A GPT of which nothing can be used but what minibupo.py's docstring lists."""

    ALLOWED = (
        "residual trace unembed final_norm n_layer vocab_size device generate truncated".split()
    )

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, tokens):
        return self.inner(tokens)

    def __getattr__(self, name):
        if name in Contract.ALLOWED:
            return getattr(self.inner, name)
        return super().__getattr__(name)  # of torch.nn.Module; raises for GPT's own


def test_any_model_that_keeps_the_contract():
    model = Contract(tiny())
    batch = rollouts(model)
    for policy in POLICIES:
        assert minibupo.update(model, still(model), batch, policy)["grad_norm"] > 0
    steps = list(minibupo.bupo(model, still(model), lambda step: batch, Policy(2), 1, 2))
    assert [policy for _, policy, _, _ in steps] == [Policy(2), FULL]
    minibupo.look_inside(model, batch.tokens, mask_of(batch))
    assert model.truncated(2).generate(batch.tokens[:, :2], 3).tokens.shape[1] == 5
    with pytest.raises(AttributeError):
        _ = model.cfg


# ---- entropy and the target layer ----


def test_entropy_closed_forms():
    one_hot, two, outlier = (
        torch.full((11,), -math.inf),
        torch.full((11,), -math.inf),
        torch.zeros(11),
    )
    one_hot[3], outlier[5] = 0.0, 1e4
    two[:2] = torch.tensor([math.log(0.25), math.log(0.75)])
    z = torch.stack([torch.zeros(11), torch.full((11,), -37.0), one_hot, two, outlier])
    expected = [
        math.log(11),
        math.log(11),
        0.0,
        -0.25 * math.log(0.25) - 0.75 * math.log(0.75),
        0.0,
    ]
    torch.testing.assert_close(minibupo.entropy(z), torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("V,scale", [(11, 4), (500, 80), (151_936, 1), (151_936, 30)])
def test_entropy_against_float64(V, scale):
    """Up to a real vocabulary, and logits so large that most of e^z is 0 in float32."""
    z = torch.randn(8, V, generator=torch.Generator().manual_seed(0)) * scale
    expected = torch.distributions.Categorical(logits=z.double()).entropy()
    torch.testing.assert_close(minibupo.entropy(z).double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(minibupo.entropy(z.double()), expected, rtol=1e-9, atol=1e-9)
    narrow = minibupo.entropy(z.bfloat16())
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow, minibupo.entropy(z.bfloat16().float()))


def test_target_layer():
    for as_list in (list, np.array, torch.tensor):
        assert minibupo.target_layer(as_list([0.5, 0.2, 0.1, -0.1])) == 3
        assert minibupo.target_layer(as_list([0.5, -0.2, 0.1, -0.3, -0.1])) == 3  # after a gap, too
        assert minibupo.target_layer(as_list([0.5, 0.2, 0.1])) == 2  # never the top layer
        for nothing in ([-0.1, -0.2, 0.3], [0.0, 0.0], [0.1]):
            with pytest.raises(ValueError, match="no FFN below the top has dH > 0"):
                minibupo.target_layer(as_list(nothing))


# ---- advantages and surrogate ----

REWARDS = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 0]])


def test_advantages_against_loops():
    A = minibupo.group_advantages(REWARDS)
    assert torch.allclose(A[0], torch.tensor([1.5, -0.5, -0.5, -0.5]), atol=1e-4)
    for row, advantages in zip(REWARDS.tolist(), A.tolist()):
        std = statistics.stdev(row)
        expected = [(r - sum(row) / 4) / (std + 1e-6) if std else 0.0 for r in row]
        assert advantages == pytest.approx(expected, abs=1e-6)
    for row, advantages in zip(
        REWARDS.tolist(), minibupo.group_advantages(REWARDS, "rloo").tolist()
    ):
        assert advantages == pytest.approx([r - (sum(row) - r) / 3 for r in row], abs=1e-6)
    flat = REWARDS.flatten().tolist()
    mean, std = statistics.mean(flat), statistics.stdev(flat)
    whole = minibupo.group_advantages(REWARDS, "reinforce++")
    expected = [(r - mean) / (std + 1e-6) for r in flat]
    assert whole.flatten().tolist() == pytest.approx(expected, abs=1e-5)
    assert torch.equal(minibupo.group_advantages(REWARDS.long()), A)  # counts are rewards, too
    for kind in minibupo.ADVANTAGES:  # rounding gives these equal rewards a std above 0
        assert minibupo.group_advantages(torch.full((2, 3), 0.1), kind).eq(0).all()


@pytest.mark.parametrize("shape", [(4, 1), (4,), (2, 2, 2)])
def test_advantages_that_cannot_be(shape):
    with pytest.raises(ValueError, match="2 or more"):
        minibupo.group_advantages(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"one of grpo, rloo, reinforce\+\+, not 'ppo'"):
        minibupo.group_advantages(REWARDS, "ppo")


@pytest.mark.parametrize(
    "A,ratio,objective,slope",
    [
        *[(1, 1.1, 1.1, 1.1), (1, 0.9, 0.9, 0.9), (1, 1.5, 1.2, 0.0), (1, 0.5, 0.5, 0.5)],
        *[(-1, 1.1, -1.1, -1.1), (-1, 0.9, -0.9, -0.9), (-1, 1.5, -1.5, -1.5), (-1, 0.5, -0.8, 0)],
    ],
)
def test_clip_corners(A, ratio, objective, slope):
    """Value and d objective / d logp: the clip takes the gradient away on one side only."""
    logp = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    zero, mask = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
    advantages = torch.tensor([A], dtype=torch.float64)
    loss, cut_off = minibupo.surrogate(logp, zero, advantages, mask)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(-objective, abs=1e-12)
    assert float(logp.grad) == pytest.approx(-slope, abs=1e-12)
    assert int(cut_off) == (slope == 0)


@pytest.mark.parametrize(
    "A,gap,cut", [(1, 100, 1), (-1, 100, 1), (1, -100, 0), (-1, -100, 1), (-1, 19, 0)]
)
def test_extreme_ratios(A, gap, cut):
    """Finite, and without gradient beyond +-20, with advantage < 0 counted as cut off."""
    logp = torch.tensor([[-1.0 + gap]], requires_grad=True)
    args = torch.tensor([[-1.0]]), torch.tensor([float(A)]), torch.tensor([[True]])
    loss, cut_off = minibupo.surrogate(logp, *args)
    loss.backward()
    assert loss.isfinite() and logp.grad.isfinite().all() and int(cut_off) == cut
    assert (logp.grad == 0).all() == (abs(gap) > 20)


def test_nothing_outside_the_mask_matters():
    logp = torch.tensor([[0.1, float("nan"), float("inf")]], requires_grad=True)
    old, mask = torch.tensor([[0.0, 0.0, -float("inf")]]), torch.tensor([[True, False, False]])
    loss, cut_off = minibupo.surrogate(logp, old, torch.tensor([-1.0]), mask)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(math.exp(0.1)) and int(cut_off) == 0
    assert logp.grad[0, 1:].eq(0).all()


@pytest.mark.parametrize("average", ["token", "sequence"])
def test_surrogate_and_gradient_against_a_loop(average):
    g, N, T, lengths = torch.Generator().manual_seed(0), 7, 6, [1, 6, 3, 2, 5, 4, 6]
    logp, old = (torch.randn(N, T, dtype=torch.float64, generator=g) * 0.4 for _ in range(2))
    A = torch.randn(N, dtype=torch.float64, generator=g)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    logp.requires_grad_()
    loss, cut_off = minibupo.surrogate(logp, old, A, mask, average=average)
    loss.backward()
    total, grad, n = 0.0, np.zeros((N, T)), 0
    for i in range(N):
        weight = 1 / sum(lengths) if average == "token" else 1 / (N * lengths[i])
        for t in range(lengths[i]):
            r, a = math.exp(float(logp[i, t] - old[i, t])), float(A[i])
            plain, clipped = r * a, min(max(r, 0.8), 1.2) * a
            total -= weight * min(plain, clipped)
            grad[i, t] = -weight * plain if plain <= clipped else 0.0
            n += plain > clipped
    assert float(loss.detach()) == pytest.approx(total, abs=1e-12)
    assert np.abs(logp.grad.numpy() - grad).max() < 1e-12
    assert int(cut_off) == n > 3


def test_the_two_averages_by_hand():
    """Rows of 1 and 3 tokens, ratio 1, A = 2 and -1: (2 - 3) / 4 over tokens, (2 - 1) / 2 over rows."""
    mask = torch.tensor([[True, False, False], [True, True, True]])
    zero, A = torch.zeros(2, 3), torch.tensor([2.0, -1.0])
    assert float(minibupo.surrogate(zero, zero, A, mask)[0]) == pytest.approx(1 / 4)
    assert float(minibupo.surrogate(zero, zero, A, mask, average="sequence")[0]) == pytest.approx(
        -1 / 2
    )
    with pytest.raises(ValueError, match="'token' or 'sequence', not 'mean'"):
        minibupo.surrogate(zero, zero, A, mask, average="mean")


# ---- one update ----


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("policy", POLICIES[1:])
def test_gradient_flow_of_phase_1(policy, tied):
    """Eq. 15, 16: nothing above l (for pi_ATTN^l, nor in the FFN of l), something below and in E_u."""
    model = tiny(tied=tied)
    batch = rollouts(model)
    batch.tokens[batch.tokens == 8] = 7  # so that token 8 is never met
    minibupo.update(model, still(model), batch, policy, minibatches=1)
    for name, grad in gradients(model).items():
        block = int(name.split(".")[1]) + 1 if name.startswith("blocks") else 0
        frozen = name.startswith("final_norm") or block > policy.layer
        frozen |= policy.site == "attn_out" and block == policy.layer and "mlp" in name
        assert (grad is None) if frozen else (grad.abs().max() > 0), name
        if name == "embed.weight":  # tied it is E_u, and every row learns that it was not chosen
            assert (grad[8].abs().max() > 0) == tied


@pytest.mark.parametrize("policy", [FULL, Policy(1), Policy(2, "attn_out"), Policy(2, "mlp_out")])
def test_gradient_by_finite_differences(policy):
    model = tiny(dtype=torch.float64)
    batch = rollouts(model)
    mask, A = mask_of(batch), minibupo.group_advantages(batch.rewards.double()).flatten()
    old = minibupo.token_logprobs(model, batch.tokens, mask, policy).detach()
    old = old + 0.1 * torch.randn(
        mask.shape, generator=torch.Generator().manual_seed(1)
    )  # some clipped

    def loss():
        return minibupo.policy_loss(model, batch.tokens, old, A, mask, policy)[0]

    loss().backward()
    for name, p in model.named_parameters():
        flat, index, h = p.data.view(-1), p.numel() // 2, 1e-6
        keep, sides = float(flat[index]), []
        for x in (keep + h, keep - h):
            flat[index] = x
            sides.append(float(loss().detach()))
        flat[index] = keep
        analytic = 0.0 if p.grad is None else float(p.grad.view(-1)[index])
        assert (sides[0] - sides[1]) / (2 * h) == pytest.approx(analytic, rel=1e-4, abs=1e-8), name


def test_frozen_part_is_bit_identical_in_phase_1_and_moves_in_phase_2():
    """Weight decay and momentum (from a phase 2 before) included."""
    model = tiny(tied=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.5)
    minibupo.update(model, optimizer, rollouts(model, seed=9))
    before = weights(model)
    for seed in range(4):
        minibupo.update(model, optimizer, rollouts(model, seed=seed), Policy(2), minibatches=2)
    after = weights(model)
    for name in before:
        frozen = name.startswith(("final_norm", "blocks.2"))
        assert torch.equal(before[name], after[name]) == frozen, name
    minibupo.update(model, optimizer, rollouts(model, seed=5))
    assert not any(torch.equal(after[name], value) for name, value in weights(model).items())


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("policy", POLICIES)
def test_old_logprobs_are_those_of_the_policy_before_the_first_step(policy, temperature):
    """In each mini-batch, against scoring whole rows of the batch; so nothing is cut off at lr 0."""
    model = tiny()
    batch = rollouts(model, temperature=temperature)
    options = (3, "grpo", 5, "token", temperature)
    minibatches = minibupo.make_minibatches(model, batch, policy, *options)
    scored = minibupo.token_logprobs(model, batch.tokens, mask_of(batch), policy, temperature)
    wanted = sorted(
        scored[i, : batch.end[i] - 1].sum().item()
        for i in range(24)
        if minibupo.group_advantages(batch.rewards).flatten()[i] != 0
    )
    found = sorted(
        x for chunks, _ in minibatches for _, old, _, _ in chunks for x in old.sum(1).tolist()
    )
    assert found == pytest.approx(wanted, abs=1e-3) and len(found) > 8
    result = minibupo.update(
        model, still(model), batch, policy, minibatches=3, temperature=temperature
    )
    assert result["clip_fraction"] == 0 and result["grad_norm"] > 0


def test_later_minibatches_are_off_policy():
    """Their old log-probabilities are from before the first step: after a large one some are cut."""
    model = tiny()
    batch = rollouts(model, Q=12)
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    assert minibupo.update(model, optimizer, batch, minibatches=1)["clip_fraction"] == 0
    assert minibupo.update(model, optimizer, batch, minibatches=4)["clip_fraction"] > 0


@pytest.mark.parametrize("average", ["token", "sequence"])
@pytest.mark.parametrize("policy", [FULL, Policy(2)])
def test_update_gradient_is_the_plain_loss_gradient(policy, average):
    """All rows at once, none left out: the same gradient, in chunks of any size, and at ratio 1 it
    is that of -mean(advantage * logp)."""
    model = tiny()
    batch = rollouts(model)
    mask, A = mask_of(batch), minibupo.group_advantages(batch.rewards).flatten()
    assert (A == 0).sum() >= 8
    logp = minibupo.token_logprobs(model, batch.tokens, mask, policy)
    weight = 1 / mask.sum() if average == "token" else 1 / (24 * mask.sum(1, keepdim=True))
    (-(A[:, None] * logp * weight * mask).sum()).backward()
    plain = gradients(model)
    options = dict(minibatches=1, average=average, max_grad_norm=1e9)
    for chunk in (1, 3, 5, 100):
        minibupo.update(model, still(model), batch, policy, chunk=chunk, **options)
        assert_same(plain, gradients(model))


def test_minibatches_are_sets_of_questions_in_order():
    """Each optimizer step follows the gradient of its own questions, averaged over all their tokens."""
    model, seen = tiny(), []
    batch = rollouts(model)
    optimizer = still(model)
    optimizer.register_step_pre_hook(lambda *_: seen.append(gradients(model)))
    minibupo.update(model, optimizer, batch, minibatches=3, max_grad_norm=1e9)
    parts = [
        Rollouts(*(x[8 * i : 8 * i + 8] for x in batch[:3]), batch.rewards[2 * i : 2 * i + 2])
        for i in range(3)
    ]
    useful = [part for part in parts if (part.rewards.std(1) > 0).any()]
    assert len(seen) == len(useful) < 3
    for part, gradient in zip(useful, seen):
        minibupo.update(model, still(model), part, minibatches=1, max_grad_norm=1e9)
        assert_same(gradients(model), gradient)


def test_the_gradient_is_clipped_to_its_norm():
    """By plain gradient descent at rate 1 the weights move by the gradient, as clipped."""
    for max_norm in (0.1, 1e9):
        model = tiny(dtype=torch.float64)
        before, optimizer = (
            dict(model.named_parameters()),
            torch.optim.SGD(model.parameters(), lr=1.0),
        )
        before = torch.cat([p.detach().flatten() for p in before.values()])
        options = dict(minibatches=1, max_grad_norm=max_norm)
        norm = minibupo.update(model, optimizer, rollouts(model), **options)["grad_norm"]
        after = torch.cat([p.detach().flatten() for p in model.parameters()])
        assert norm > 0.1
        assert float((after - before).norm()) == pytest.approx(min(norm, max_norm), rel=1e-4)


def test_padding_changes_nothing():
    model = tiny()
    batch = rollouts(model)
    minibupo.update(model, still(model), batch, minibatches=1)
    plain, padding = gradients(model), torch.arange(batch.tokens.shape[1]) >= batch.end[:, None]
    assert padding.any()
    other = torch.where(padding, torch.randint(0, 11, batch.tokens.shape), batch.tokens)
    minibupo.update(model, still(model), batch._replace(tokens=other), minibatches=1)
    assert_same(plain, gradients(model))


def test_a_batch_without_advantage_changes_nothing():
    """No gradient is no evidence: momentum and weight decay must not move the weights either."""
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    minibupo.update(model, optimizer, rollouts(model))
    before = weights(model)
    result = minibupo.update(model, optimizer, rollouts(model, rewards=torch.ones(6, 4)))
    assert result == {"clip_fraction": 0.0, "grad_norm": 0.0, "optimizer_steps": 0}
    assert all(torch.equal(before[k], v) for k, v in weights(model).items())
    rewards = torch.ones(6, 4)
    rewards[3:] = 0
    result = minibupo.update(
        model, optimizer, rollouts(model, rewards=rewards), advantage="reinforce++"
    )
    assert result["optimizer_steps"] == 4  # over the whole batch these groups do say something


def test_update_refuses_what_cannot_be_and_stops_at_nan():
    model = tiny()
    for minibatches in (0, 7):
        with pytest.raises(ValueError, match=r"minibatches must be in 1\.\.6"):
            minibupo.update(model, still(model), rollouts(model), minibatches=minibatches)
    batch, optimizer = rollouts(model), torch.optim.AdamW(model.parameters())
    with torch.no_grad():
        model.blocks[1].mlp.down.weight[0, 0] = float("nan")
    before = weights(model)
    with pytest.raises(FloatingPointError, match="not finite"):
        minibupo.update(model, optimizer, batch)
    same = {
        k: torch.equal(before[k], v) or before[k].isnan().any() for k, v in weights(model).items()
    }
    assert all(same.values())


# ---- Algorithm 1 ----


def trained(s_inter, layer=2, steps=5, start=1, model=None, optimizer=None, stop=None):
    """Weights and optimizer after steps of bupo; rollouts of step s depend on s and the weights."""
    model = model or tiny()
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
    sample = lambda step: rollouts(model, seed=step)  # noqa: E731
    loop = minibupo.bupo(model, optimizer, sample, Policy(layer), s_inter, steps, start=start)
    seen = [(step, policy) for step, policy, _, _ in itertools.islice(loop, stop)]
    return weights(model), model, optimizer, seen


def flat(state):
    return torch.cat([value.flatten() for value in state.values()])


def test_phases_by_step():
    *_, seen = trained(2)
    assert seen == [(1, Policy(2)), (2, Policy(2)), (3, FULL), (4, FULL), (5, FULL)]
    for s_inter, start in ((-1, 1), (1, 0)):
        with pytest.raises(ValueError, match="s_inter must be"):
            next(minibupo.bupo(tiny(), None, None, Policy(1), s_inter, 3, start=start))


def test_s_inter_zero_is_grpo_written_by_hand():
    """Also with an optimizer that has moments from before: they are kept."""
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(1, 6):
        minibupo.update(model, optimizer, rollouts(model, seed=step))
    assert torch.equal(flat(weights(model)), flat(trained(0, layer=1)[0]))
    counted = int(optimizer.state[model.embed.weight]["step"])
    trained(0, steps=1, model=model, optimizer=optimizer)
    assert int(optimizer.state[model.embed.weight]["step"]) > counted
    assert not torch.equal(flat(trained(0)[0]), flat(trained(2)[0]))
    assert not torch.equal(flat(trained(2, layer=1)[0]), flat(trained(2, layer=2)[0]))


@pytest.mark.parametrize("s_inter,steps", [(0, 5), (2, 2), (2, 5), (5, 5)])
def test_moments_start_afresh_at_the_switch_alone(s_inter, steps):
    """AdamW has counted the optimizer steps of the last phase, and no others."""
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sample = lambda step: rollouts(model, seed=step)  # noqa: E731
    loop = minibupo.bupo(model, optimizer, sample, Policy(2), s_inter, steps)
    counts = [log["optimizer_steps"] for _, _, _, log in loop]
    last_phase = counts if steps <= s_inter else counts[s_inter:]
    assert {int(of["step"]) for of in optimizer.state.values()} == {sum(last_phase)}


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_started_again_in_the_middle_is_never_stopped(stop):
    """In phase 1, exactly at the switch, and in phase 2."""
    whole = trained(2)[0]
    _, model, optimizer, _ = trained(2, stop=stop)
    resumed, *_ = trained(2, start=stop + 1, model=model, optimizer=optimizer)
    assert torch.equal(flat(whole), flat(resumed))


def test_bupo_learns():
    """Rewarding one token makes it likelier under the policy that is trained, whichever that is."""
    for policy in (FULL, Policy(1), Policy(2, "mlp_out"), Policy(2, "attn_out")):
        model, share = tiny(), []

        def sample(step, model=model):
            batch = rollouts(model, Q=8, G=8, seed=step)
            first = batch.tokens.gather(1, batch.prompt_len[:, None])[:, 0].view(8, 8)
            return batch._replace(rewards=(first == 7).float())

        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _, _, batch, _ in minibupo.bupo(model, optimizer, sample, policy, 12, 12):
            at = mask_of(batch).flatten().nonzero()[:, 0]
            pi = minibupo.policy_logits(model, batch.tokens[:, :-1], policy, at).softmax(-1)
            share.append(float(pi[:, 7].mean()))
        assert share[-1] > 2 * share[0], (policy, share)


# ---- measures ----


@pytest.mark.parametrize("chunk", [1, 7, None])
def test_look_inside_against_a_float64_loop(chunk):
    model = tiny(dtype=torch.float64)
    batch = rollouts(model, Q=2, G=3)
    found = minibupo.look_inside(model, batch.tokens, mask_of(batch), chunk)
    W, traces = model.lm_head.weight.detach(), list(model.trace(batch.tokens[:, :-1]))

    def H(h):
        p = (W @ h).softmax(0)
        return -sum(float(x) * math.log(float(x)) for x in p)

    def cos(a, b):
        return float(a @ b / (a @ a).sqrt() / (b @ b).sqrt())

    def size(h):
        return float(h.square().mean().sqrt())

    positions = [
        (i, t)
        for i in range(6)
        for t in range(batch.tokens.shape[1] - 1)
        if batch.prompt_len[i] - 1 <= t < batch.end[i] - 1
    ]
    assert found["layer"].shape == (4, len(positions)) and found["attn"].shape == (
        3,
        len(positions),
    )
    with torch.no_grad():
        for m, (i, t) in enumerate(positions):
            top = traces[-1].resid_post[i, t]
            for l in range(4):
                h = traces[0].resid_pre[i, t] if l == 0 else traces[l - 1].resid_post[i, t]
                expected = {
                    "layer": H(h),
                    "layer_normed": H(model.final_norm(h)),
                    "cos_layer": cos(h, top),
                }
                expected |= {"layer_matched": H(h * size(top) / size(h)), "rms_layer": size(h)}
                for name, value in expected.items():
                    assert abs(float(found[name][l, m]) - value) < 1e-9, (name, l)
            for l, trace in enumerate(traces):
                pre, mid, post = (
                    x[i, t] for x in (trace.resid_pre, trace.resid_mid, trace.resid_post)
                )
                a, f, block = trace.attn_out[i, t], trace.mlp_out[i, t], model.blocks[l]
                reads = block.attn_norm(pre), block.mlp_norm(mid)  # normed: not the raw stream
                expected = {
                    "attn": H(a),
                    "mlp": H(f),
                    "attn_in": H(reads[0]),
                    "mlp_in": H(reads[1]),
                }
                expected |= {"d_attn": H(a) - H(reads[0]), "d_mlp": H(f) - H(reads[1])}
                expected |= {"d_layer": H(post) - H(pre), "rms_attn": size(a), "rms_mlp": size(f)}
                expected |= {"cos_attn": cos(a, pre), "cos_mlp": cos(f, mid)}
                for name, value in expected.items():
                    assert abs(float(found[name][l, m]) - value) < 1e-9, (name, l)
    full = minibupo.policy_logits(model, batch.tokens[:, :-1])[mask_of(batch)]
    torch.testing.assert_close(found["layer_normed"][-1], minibupo.entropy(full).detach())


def test_look_inside_holds_no_more_logits_for_more_layers(monkeypatch):
    """No tensor with the vocabulary's width has more rows than a chunk."""
    largest, entropy = [], minibupo.entropy
    monkeypatch.setattr(minibupo, "entropy", lambda z: largest.append(len(z)) or entropy(z))
    model = tiny(n_layer=6, vocab_size=300)
    tokens = torch.randint(0, 300, (4, 20))
    mask = torch.ones(4, 19, dtype=torch.bool)
    minibupo.look_inside(model, tokens, mask, chunk=10)
    assert set(largest) <= {10, 6} and len(largest) == 8 * (3 * 7 + 4 * 6)
    with pytest.raises(ValueError, match="no response positions"):
        minibupo.look_inside(model, tokens, torch.zeros_like(mask))


def test_pass_at_k_against_enumeration():
    for n in range(1, 9):
        for c in range(n + 1):
            samples = [1] * c + [0] * (n - c)
            for k in range(1, n + 1):
                subsets = list(itertools.combinations(samples, k))
                expected = sum(any(s) for s in subsets) / len(subsets)
                assert float(minibupo.pass_at_k(n, c, k)) == pytest.approx(expected, abs=1e-12)
    exact = 1 - math.comb(250, 206) / math.comb(300, 206)
    counts = np.array([50, 0, 300])
    assert minibupo.pass_at_k(300, counts, 206).tolist() == pytest.approx([exact, 0, 1], abs=1e-12)
    for n, c, k in ((4, 2, 5), (4, 2, 0), (4, 5, 2), (4, [1, -1], 2)):
        with pytest.raises(ValueError, match="must"):
            minibupo.pass_at_k(n, c, k)
