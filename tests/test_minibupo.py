"""minibupo.py against closed forms, brute-force float64 loops, finite differences and exhaustive enumeration.

entropy(uniform) = log V, entropy(one-hot) = 0        lr = 0: ratio 1, nothing clipped, for every policy
phase 1 at layer l: d loss / d theta_k = None for k > l and LN_f       rows without advantage: same gradient
any chunking, any order of rows, any padding: same gradient            s_inter = 0: GRPO, bit for bit
"""

import itertools
import math
import statistics

import numpy as np
import pytest
import torch
from conftest import tiny

import minibupo as bupo
from minibupo import FULL, Policy, Rollouts

POLICIES = [FULL, Policy(1), Policy(2), Policy(3), Policy(2, "attn_out"), Policy(2, "mlp_out")]
EOS, PAD = 4, 9


def rollouts(model, policy=FULL, Q=6, G=4, temperature=1.0, seed=0, rewards=None):
    """Ragged prompts, responses of unequal length, random rewards with one all-right and one all-wrong group."""
    g = torch.Generator().manual_seed(seed)
    prompt = torch.randint(0, 11, (Q, 6), generator=g)
    out = model.generate(prompt, 9, prompt_len=torch.randint(2, 7, (Q,), generator=g), num_samples=G, eos_id=EOS,
                         pad_id=PAD, temperature=temperature, layer=policy.layer, site=policy.site, generator=g)  # fmt: skip
    logp = out.logprobs if policy.layer is None else out.layer_logprobs
    if rewards is None:
        rewards = torch.randint(0, 2, (Q, G), generator=g).to(logp.dtype)
        rewards[0], rewards[1], rewards[-1, :2] = 1, 0, torch.tensor([0.0, 1.0])
    return Rollouts(out.tokens, out.prompt_len, out.end, logp, rewards)


def gradients(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(a, b, atol=1e-6):
    for name in a:
        assert (a[name] is None) == (b[name] is None), name
        if a[name] is not None:
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=atol, msg=name)


def still(model):
    """An optimizer that leaves the weights (and so the gradients of update's mini-batch) as they are."""
    return torch.optim.SGD(model.parameters(), lr=0.0)


# ---- positions ----


def test_response_mask_by_hand():
    """Ends early, ends at the last slot, never ends: EOS is in once, nothing after it, the prompt is out."""
    mask = bupo.response_mask(torch.tensor([2, 3, 1]), torch.tensor([4, 6, 6]), 6)
    assert mask.int().tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize("policy", POLICIES)
def test_token_logprobs_one_token_at_a_time(policy):
    model = tiny(dtype=torch.float64)
    batch = rollouts(model, Q=2, G=3)
    mask = bupo.response_mask(batch.prompt_len, batch.end, batch.tokens.shape[1])
    logp = bupo.token_logprobs(model, batch.tokens, mask, policy, temperature=0.7)
    for i, row in enumerate(batch.tokens):
        for t in range(len(row) - 1):
            inside = batch.prompt_len[i] <= t + 1 < batch.end[i]
            z = bupo.policy_logits(model, row[None, : t + 1], policy)[0, -1] / 0.7
            expected = z[row[t + 1]] - torch.logsumexp(z, 0) if inside else torch.tensor(0.0, dtype=torch.float64)
            assert abs(float((logp[i, t] - expected).detach())) < 1e-10


# ---- policies ----


def test_internal_policies_are_raw_unembeddings():
    model, tokens = tiny(), torch.randint(0, 11, (2, 7))
    E_u = model.lm_head.weight
    for l, trace in enumerate(model.trace(tokens), 1):
        for policy, h in ((Policy(l), trace.resid_post), (Policy(l, "attn_out"), trace.attn_out), (Policy(l, "mlp_out"), trace.mlp_out)):
            logits = bupo.policy_logits(model, tokens, policy)
            torch.testing.assert_close(logits, h @ E_u.T)
            assert not torch.allclose(logits, model.final_norm(h) @ E_u.T)  # the logit lens is something else
    assert torch.equal(bupo.policy_logits(model, tokens), model(tokens))


def test_every_policy_is_another_one():
    model, tokens = tiny(), torch.randint(0, 11, (2, 7))
    logits = [bupo.policy_logits(model, tokens, p) for p in POLICIES]
    for a, b in itertools.combinations(logits, 2):
        assert (a - b).abs().max() > 0.1


def test_any_model_with_the_four_calls():
    """Nothing but the four calls is used, and trace may be a list as well as a generator."""
    inner = tiny()

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, tokens):
            return inner(tokens)

        def residual(self, tokens, layer):
            return inner.residual(tokens, layer)

        def trace(self, tokens):
            return list(inner.trace(tokens))

        def unembed(self, h):
            return inner.unembed(h)

    model = Wrapped()
    for policy in POLICIES:
        batch = rollouts(inner, policy)
        mask = bupo.response_mask(batch.prompt_len, batch.end, batch.tokens.shape[1])
        assert bupo.update(model, still(model), batch, policy, minibatches=1)["grad_norm"] > 0
    for measure in (bupo.internal_entropies, bupo.residual_cosines, bupo.residual_rms):
        measure(model, batch.tokens, mask)


@pytest.mark.parametrize("bad", [Policy(4), Policy(-1), Policy(0, "attn_out"), Policy(4, "mlp_out"), Policy(1, "resid_pre")])
def test_policies_that_do_not_exist(bad):
    with pytest.raises(ValueError, match="layer|site"):
        bupo.policy_logits(tiny(), torch.zeros(1, 3, dtype=torch.long), bad)


# ---- entropy ----


def test_entropy_closed_forms():
    V = 11
    one_hot = torch.full((V,), -math.inf)
    one_hot[3] = 0.0
    two = torch.full((V,), -math.inf)
    two[:2] = torch.tensor([math.log(0.25), math.log(0.75)])
    outlier = torch.zeros(V)
    outlier[5] = 1e4
    values = bupo.entropy(torch.stack([torch.zeros(V), torch.full((V,), -37.0), one_hot, two, outlier]))
    expected = [math.log(V), math.log(V), 0.0, -0.25 * math.log(0.25) - 0.75 * math.log(0.75), 0.0]
    torch.testing.assert_close(values, torch.tensor(expected), rtol=0, atol=1e-6)


def test_entropy_of_logits_as_large_as_real_models_have():
    z = torch.randn(20, 500) * 80  # most of e^z is 0 or denormal in float32
    log_pi = z.double().log_softmax(-1)
    torch.testing.assert_close(bupo.entropy(z).double(), -(log_pi.exp() * log_pi).sum(-1), rtol=1e-4, atol=1e-5)


def test_entropy_against_torch_categorical_and_bfloat16_is_widened():
    z = torch.randn(50, 11, dtype=torch.float64) * 4
    torch.testing.assert_close(bupo.entropy(z), torch.distributions.Categorical(logits=z).entropy())
    assert bupo.entropy(z.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("chunk", [1, 7, 4096])
def test_internal_entropies_against_a_float64_loop(chunk):
    model = tiny(dtype=torch.float64)
    batch = rollouts(model, Q=2, G=3)
    mask = bupo.response_mask(batch.prompt_len, batch.end, batch.tokens.shape[1])
    found = bupo.internal_entropies(model, batch.tokens, mask, final_norm=model.final_norm, chunk=chunk)
    changes = bupo.entropy_changes(found)
    W = model.lm_head.weight.detach()

    def H(h):
        p = (W @ h.detach()).softmax(0)
        return -sum(float(x) * math.log(float(x)) for x in p)

    traces = list(model.trace(batch.tokens))
    where = [(i, t) for i in range(6) for t in range(mask.shape[1]) if batch.prompt_len[i] - 1 <= t < batch.end[i] - 1]
    assert len(where) == mask.sum()
    for m, (i, t) in enumerate(where):
        for l, trace in enumerate(traces, 1):
            pre, post, attn, mlp = (x[i, t] for x in (trace.resid_pre, trace.resid_post, trace.attn_out, trace.mlp_out))
            block = model.blocks[l - 1]
            attn_in, mlp_in = block.attn_norm(pre), block.mlp_norm(trace.resid_mid[i, t])
            expected = [
                (found["layer"][l - 1], H(pre)), (found["layer"][l], H(post)),
                (found["layer_normed"][l], H(model.final_norm(post))), (found["attn"][l - 1], H(attn)), (found["mlp"][l - 1], H(mlp)),
                (changes["d_attn"][l - 1], H(attn) - H(attn_in)),  # Eq. 13: the normed input, not the raw stream
                (changes["d_mlp"][l - 1], H(mlp) - H(mlp_in)),  # Eq. 14
                (changes["d_layer"][l - 1], H(post) - H(pre)),
            ]  # fmt: skip
            for value, reference in expected:
                assert abs(float(value[m]) - reference) < 1e-9
    policy_entropy = bupo.entropy(bupo.policy_logits(model, batch.tokens[:, :-1], FULL, mask))
    torch.testing.assert_close(found["layer_normed"][-1], policy_entropy)


def test_entropy_of_no_position_is_refused():
    with pytest.raises(ValueError, match="no response positions"):
        bupo.internal_entropies(tiny(), torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 3, dtype=torch.bool))


def test_target_layer():
    assert bupo.target_layer([0.5, 0.2, 0.1, -0.1]) == 3
    assert bupo.target_layer([0.5, -0.2, 0.1, -0.3, -0.1]) == 3  # the last one, behind a gap too
    assert bupo.target_layer([0.5, 0.2, 0.1]) == 2  # never the top layer
    assert bupo.target_layer([-0.1, -0.2, 0.3]) == 1  # nothing explores below it
    assert bupo.target_layer([0.0, 0.0]) == 1
    with pytest.raises(ValueError, match="at least 2 layers"):
        bupo.target_layer([0.1])


# ---- advantages and surrogate ----


def test_advantages():
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 0]])
    A = bupo.group_advantages(rewards)
    assert torch.allclose(A[0], torch.tensor([1.5, -0.5, -0.5, -0.5]), atol=1e-4)
    assert A[1:3].eq(0).all()
    for i, row in enumerate(rewards.tolist()):
        mean = sum(row) / 4
        std = math.sqrt(sum((r - mean) ** 2 for r in row) / 3)
        assert A[i].tolist() == pytest.approx([0.0 if std == 0 else (r - mean) / (std + 1e-6) for r in row], abs=1e-6)
    assert bupo.group_advantages(torch.full((2, 3), 0.1)).eq(0).all()  # rounding gives this group a std above 0
    order = [2, 0, 3, 1]
    assert torch.equal(bupo.group_advantages(rewards[order]), A[order])


def test_other_advantages_against_loops():
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 0]])
    assert bupo.group_advantages(rewards, "rloo")[0].tolist() == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3])
    for row, A in zip(rewards.tolist(), bupo.group_advantages(rewards, "rloo").tolist()):
        assert pytest.approx([r - (sum(row) - r) / 3 for r in row], abs=1e-6) == A
    assert bupo.group_advantages(rewards, "rloo")[1:3].eq(0).all()
    flat = rewards.flatten().tolist()
    mean, std = statistics.mean(flat), statistics.stdev(flat)
    whole = bupo.group_advantages(rewards, "reinforce++")
    assert whole.flatten().tolist() == pytest.approx([(r - mean) / (std + 1e-6) for r in flat], abs=1e-5)
    assert (whole[1] > 0).all() and (whole[2] < 0).all()  # groups all right or all wrong do count here
    assert bupo.group_advantages(torch.full((2, 3), 0.1), "reinforce++").eq(0).all()
    with pytest.raises(ValueError, match=r"one of grpo, rloo, reinforce\+\+, not 'ppo'"):
        bupo.group_advantages(rewards, "ppo")


@pytest.mark.parametrize("shape", [(4, 1), (4,), (2, 2, 2)])
def test_advantages_need_groups(shape):
    with pytest.raises(ValueError, match="group of at least 2"):
        bupo.group_advantages(torch.zeros(shape))


@pytest.mark.parametrize("A,ratio,objective,slope", [
    (1, 1.1, 1.1, 1.1), (1, 0.9, 0.9, 0.9), (1, 1.5, 1.2, 0.0), (1, 0.5, 0.5, 0.5),
    (-1, 1.1, -1.1, -1.1), (-1, 0.9, -0.9, -0.9), (-1, 1.5, -1.5, -1.5), (-1, 0.5, -0.8, 0.0),
])  # fmt: skip
def test_clip_corners(A, ratio, objective, slope):
    """Value and d objective / d logp in all four corners: the clip takes the gradient away on one side only."""
    logp = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    zero, mask = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
    loss, cut_off = bupo.surrogate(logp, zero, torch.tensor([float(A)], dtype=torch.float64), mask)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(-objective, abs=1e-12)
    assert float(logp.grad) == pytest.approx(-slope, abs=1e-12)
    assert int(cut_off) == (slope == 0)


def test_the_two_averages_by_hand():
    """Rows of 1 and 3 tokens, ratio 1, A = 2 and -1: (2 - 3) / 4 over tokens, (2 - 1) / 2 over sequences."""
    mask = torch.tensor([[True, False, False], [True, True, True]])
    zero, A = torch.zeros(2, 3), torch.tensor([2.0, -1.0])
    assert float(bupo.surrogate(zero, zero, A, mask, average="token")[0]) == pytest.approx(1 / 4)
    assert float(bupo.surrogate(zero, zero, A, mask, average="sequence")[0]) == pytest.approx(-1 / 2)
    with pytest.raises(ValueError, match="'token' or 'sequence', not 'mean'"):
        bupo.surrogate(zero, zero, A, mask, average="mean")


@pytest.mark.parametrize("average", ["token", "sequence"])
def test_surrogate_and_gradient_against_a_loop(average):
    g = torch.Generator().manual_seed(0)
    N, T = 7, 6
    logp = torch.randn(N, T, dtype=torch.float64, generator=g) * 0.4
    old = torch.randn(N, T, dtype=torch.float64, generator=g) * 0.4
    A = torch.randn(N, dtype=torch.float64, generator=g)
    lengths = [1, 6, 3, 2, 5, 4, 6]
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    logp.requires_grad_()
    loss, cut_off = bupo.surrogate(logp, old, A, mask, average=average)
    loss.backward()
    total, grad, n = 0.0, np.zeros((N, T)), 0
    for i in range(N):
        weight = 1 / sum(lengths) if average == "token" else 1 / (N * lengths[i])
        for t in range(lengths[i]):
            r, a = math.exp(float(logp[i, t] - old[i, t])), float(A[i])
            clipped = min(max(r, 0.8), 1.2)
            total -= weight * min(r * a, clipped * a)
            if r * a <= clipped * a:
                grad[i, t] = -weight * r * a
            else:
                n += 1
    assert float(loss) == pytest.approx(total, abs=1e-12)
    assert np.abs(logp.grad.numpy() - grad).max() < 1e-12
    assert int(cut_off) == n > 3


# ---- gradient flow, and one update ----


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("policy", POLICIES[1:])
def test_gradient_flow_of_phase_1(policy, tied):
    """Eq. 15, 16: nothing above l (nor, for pi_ATTN^l, in the FFN of l), something at and below l and in E_u."""
    model = tiny(tied=tied)
    batch = rollouts(model, policy)
    batch.tokens[batch.tokens == 8] = 7  # so that token 8 is never met
    bupo.update(model, still(model), batch, policy, minibatches=1)
    met = torch.zeros(11, dtype=torch.bool).index_fill(0, batch.tokens.flatten(), True)
    for name, grad in gradients(model).items():
        block = int(name.split(".")[1]) + 1 if name.startswith("blocks") else None
        frozen = name.startswith("final_norm") or (block or 0) > policy.layer
        frozen |= policy.site == "attn_out" and block == policy.layer and "mlp" in name
        assert (grad is None) if frozen else (grad.abs().max() > 0), name
        if name == "embed.weight":  # tied, it is E_u as well, and every token's row learns that it was not chosen
            assert not met[8] and (grad[8].abs().max() > 0) == tied


@pytest.mark.parametrize("policy", [FULL, Policy(1), Policy(2, "attn_out"), Policy(2, "mlp_out")])
def test_gradient_by_finite_differences(policy):
    model = tiny(dtype=torch.float64)
    batch = rollouts(model, policy)
    mask = bupo.response_mask(batch.prompt_len, batch.end, batch.tokens.shape[1])
    A = bupo.group_advantages(batch.rewards).flatten()
    old = batch.logprobs + 0.1 * torch.randn(mask.shape, generator=torch.Generator().manual_seed(1))  # some ratios clipped

    def loss():
        return bupo.policy_loss(model, batch.tokens, old, A, mask, policy)[0]

    loss().backward()
    parameters = dict(model.named_parameters())
    for name in ("embed.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.down.weight", "blocks.1.attn.out.weight",
                 "blocks.2.mlp.gate_up.weight", "final_norm.weight"):  # fmt: skip
        p = parameters[name]
        for index in (0, p.numel() // 2):
            flat = p.data.view(-1)
            keep, h = float(flat[index]), 1e-6
            with torch.no_grad():
                flat[index] = keep + h
                up = float(loss())
                flat[index] = keep - h
                down = float(loss())
                flat[index] = keep
            analytic = 0.0 if p.grad is None else float(p.grad.view(-1)[index])
            assert (up - down) / (2 * h) == pytest.approx(analytic, rel=1e-4, abs=1e-8), name


def test_frozen_part_is_bit_identical_in_phase_1_and_moves_in_phase_2():
    """Weight decay and momentum (from a phase 2 before) included."""
    model = tiny(tied=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.5)
    bupo.update(model, optimizer, rollouts(model, seed=9))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for seed in range(4):
        bupo.update(model, optimizer, rollouts(model, Policy(2), seed=seed), Policy(2), minibatches=2)
    after = {k: v.clone() for k, v in model.state_dict().items()}
    for name in before:
        frozen = name.startswith(("final_norm", "blocks.2"))
        assert torch.equal(before[name], after[name]) == frozen, name
    bupo.update(model, optimizer, rollouts(model, seed=5))
    assert not any(torch.equal(after[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("policy", POLICIES)
def test_lr_zero(policy, temperature):
    """Rescoring the samples with unchanged weights: log-probabilities within 1e-4, nothing clipped, yet a gradient."""
    model = tiny()
    batch = rollouts(model, policy, temperature=temperature)
    assert len(set((batch.end - batch.prompt_len).tolist())) > 3
    mask = bupo.response_mask(batch.prompt_len, batch.end, batch.tokens.shape[1])
    rescored = bupo.token_logprobs(model, batch.tokens, mask, policy, temperature)
    assert (rescored - batch.logprobs).abs().max() < 1e-4
    result = bupo.update(model, still(model), batch, policy, minibatches=3, temperature=temperature)
    assert result["clip_fraction"] == 0 and result["grad_norm"] > 0


def test_wrong_temperature_would_show():
    model = tiny()
    batch = rollouts(model, temperature=0.6)
    mask = bupo.response_mask(batch.prompt_len, batch.end, batch.tokens.shape[1])
    assert (bupo.token_logprobs(model, batch.tokens, mask) - batch.logprobs).abs().max() > 0.1


def test_later_minibatches_are_off_policy():
    """The first mini-batch has ratio 1 and nothing to clip; after a large step the next ones have."""
    model = tiny()
    batch = rollouts(model, Q=12)
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    assert bupo.update(model, still(model), batch, minibatches=4)["clip_fraction"] == 0
    assert bupo.update(model, optimizer, batch, minibatches=4)["clip_fraction"] > 0


@pytest.mark.parametrize("average", ["token", "sequence"])
@pytest.mark.parametrize("policy", [FULL, Policy(2)])
def test_update_gradient_is_the_plain_loss_gradient(policy, average):
    """All rows at once, none left out, no chunks: what update computes must be the same, chunked in any way."""
    model = tiny()
    batch = rollouts(model, policy)
    mask = bupo.response_mask(batch.prompt_len, batch.end, batch.tokens.shape[1])
    A = bupo.group_advantages(batch.rewards).flatten()
    assert (A == 0).sum() >= 8
    bupo.policy_loss(model, batch.tokens, batch.logprobs, A, mask, policy, average=average)[0].backward()
    plain = gradients(model)
    for chunk in (None, 1, 3, 5, 100):
        bupo.update(model, still(model), batch, policy, minibatches=1, average=average, max_grad_norm=1e9, chunk=chunk)
        assert_same_gradients(plain, gradients(model))


def test_order_of_questions_and_padding_change_no_gradient():
    model = tiny()
    batch = rollouts(model)
    Q, G = batch.rewards.shape

    def gradient(b):
        generator = torch.Generator().manual_seed(0)  # rows in the same order: equal to the last bit
        bupo.update(model, still(model), b, minibatches=1, max_grad_norm=1e9, generator=generator)
        return gradients(model)

    plain = gradient(batch)
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    rows = (order[:, None] * G + torch.arange(G)).flatten()
    assert_same_gradients(plain, gradient(Rollouts(*(x[rows] for x in batch[:4]), batch.rewards[order])))
    padding = torch.arange(batch.tokens.shape[1]) >= batch.end[:, None]
    assert padding.any()
    scrambled = torch.where(padding, torch.randint(0, 11, batch.tokens.shape), batch.tokens)
    assert_same_gradients(plain, gradient(batch._replace(tokens=scrambled)), atol=0)


def test_a_batch_without_advantage_changes_nothing():
    """No gradient is no evidence: momentum and weight decay must not move the weights either."""
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    bupo.update(model, optimizer, rollouts(model))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = bupo.update(model, optimizer, rollouts(model, rewards=torch.ones(6, 4)))
    assert result == {"clip_fraction": 0.0, "grad_norm": 0.0, "optimizer_steps": 0}
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_update_learns():
    """Rewarding one token makes it more likely under the policy that is trained, whichever that is."""
    for policy in (FULL, Policy(1), Policy(2, "mlp_out"), Policy(2, "attn_out")):
        model = tiny()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        share = []
        for step in range(12):
            batch = rollouts(model, policy, Q=8, G=8, seed=step)
            mask = bupo.response_mask(batch.prompt_len, batch.end, batch.tokens.shape[1])
            probability = bupo.policy_logits(model, batch.tokens[:, :-1], policy, mask).softmax(-1)[:, 7].mean()
            share.append(float(probability))
            first = batch.tokens.gather(1, batch.prompt_len[:, None])[:, 0].view(8, 8)
            bupo.update(model, optimizer, batch._replace(rewards=(first == 7).float()), policy)
        assert share[-1] > 2 * share[0], (policy, share)


def test_s_inter_zero_is_grpo():
    def train(s_inter, layer):
        model = tiny()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(1, 5):
            policy = bupo.policy_at(step, s_inter, Policy(layer))
            bupo.update(model, optimizer, rollouts(model, policy, seed=step), policy,
                        generator=torch.Generator().manual_seed(step))  # fmt: skip
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    grpo = train(0, 1)
    assert torch.equal(grpo, train(0, 2))  # without a phase 1 the layer is nothing
    assert not torch.equal(grpo, train(2, 1)) and not torch.equal(train(2, 1), train(2, 2))


def test_policy_at():
    target = Policy(2, "mlp_out")
    assert [bupo.policy_at(s, 2, target) for s in (1, 2, 3, 4)] == [target, target, FULL, FULL]
    assert bupo.policy_at(1, 0, target) == FULL
    for step, s_inter in ((0, 1), (1, -1)):
        with pytest.raises(ValueError, match="count from"):
            bupo.policy_at(step, s_inter, target)


def test_update_refuses_what_cannot_be():
    model = tiny()
    for minibatches in (0, 7):
        with pytest.raises(ValueError, match=r"minibatches must be in 1\.\.6"):
            bupo.update(model, still(model), rollouts(model), minibatches=minibatches)


def test_nan_stops_before_the_weights_change():
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = rollouts(model)
    batch.logprobs[:, -4:] = float("nan")
    batch.logprobs[:, :-4] = float("nan")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(FloatingPointError, match="not finite"):
        bupo.update(model, optimizer, batch)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


# ---- measures ----


def test_pass_at_k_against_enumeration():
    for n in range(1, 9):
        for c in range(n + 1):
            samples = [1] * c + [0] * (n - c)
            for k in range(1, n + 1):
                subsets = list(itertools.combinations(samples, k))
                expected = sum(any(s) for s in subsets) / len(subsets)
                assert float(bupo.pass_at_k(n, c, k)) == pytest.approx(expected, abs=1e-12)
    exact = 1 - math.comb(250, 256 - 50) / math.comb(300, 256 - 50)
    assert bupo.pass_at_k(300, np.array([50, 0, 300]), 206).tolist() == pytest.approx([exact, 0, 1], abs=1e-12)


def test_pass_at_k_refuses_what_cannot_be():
    for n, c, k in ((4, 2, 5), (4, 2, 0), (4, 5, 2), (4, [1, -1], 2)):
        with pytest.raises(ValueError, match="must be in"):
            bupo.pass_at_k(n, c, k)


def test_avg_at_k():
    assert bupo.avg_at_k([[1, 0, 0, 0], [1, 1, 1, 0]]) == 0.5


def test_cosines_and_sizes_against_numpy():
    model = tiny(dtype=torch.float64)
    batch = rollouts(model, Q=2, G=3)
    mask = bupo.response_mask(batch.prompt_len, batch.end, batch.tokens.shape[1])
    cosines, rms = (f(model, batch.tokens, mask) for f in (bupo.residual_cosines, bupo.residual_rms))

    def cos(a, b):
        return a @ b / np.sqrt((a @ a) * (b @ b))

    with torch.no_grad():
        traces = [type(t)(*(x[:, :-1][mask].numpy() for x in t)) for t in model.trace(batch.tokens)]
    for l, trace in enumerate(traces):
        for m in range(int(mask.sum())):
            final = traces[-1].resid_post[m]
            assert float(cosines["final"][l, m]) == pytest.approx(cos(trace.resid_pre[m], final))
            assert float(cosines["attn"][l, m]) == pytest.approx(cos(trace.attn_out[m], trace.resid_pre[m]))
            assert float(cosines["mlp"][l, m]) == pytest.approx(cos(trace.mlp_out[m], trace.resid_mid[m]))
            assert float(rms["layer"][l, m]) == pytest.approx(np.sqrt((trace.resid_pre[m] ** 2).mean()))
            assert float(rms["attn"][l, m]) == pytest.approx(np.sqrt((trace.attn_out[m] ** 2).mean()))
            assert float(rms["mlp"][l, m]) == pytest.approx(np.sqrt((trace.mlp_out[m] ** 2).mean()))
    torch.testing.assert_close(cosines["final"][-1], torch.ones_like(cosines["final"][-1]))
    assert len(rms["layer"]) == len(cosines["final"]) == 4 and len(cosines["mlp"]) == 3
