"""minibupo.py is compared with closed forms, brute-force loops and enumeration. Finite differences
of the loss, and log-probabilities outside the mask, are in test_golden.py.

What is said to stay unchanged is compared bit for bit.
"""

import copy
import itertools
import math
import statistics

import numpy as np
import pytest
import torch
from conftest import tiny

import minibupo
from minibupo import FULL, Policy, Rollouts
from model import GPT, GPTConfig, LayerTrace

POLICIES = [FULL, Policy(1), Policy(2), Policy(3), Policy(2, "attn_out"), Policy(2, "mlp_out")]


def rollouts(model, Q=6, G=4, seed=0, temperature=1.0):
    """Prompts and responses of unequal length; group 0 is all correct, group 1 all incorrect."""
    g = torch.Generator().manual_seed(seed)
    prompt = torch.randint(0, 11, (Q, 6), generator=g)
    lengths = torch.randint(2, 7, (Q,), generator=g)
    options = dict(num_samples=G, eos_id=4, pad_id=9, temperature=temperature, generator=g)
    sampled = model.generate(prompt, 9, prompt_len=lengths, **options)
    rewards = torch.randint(0, 2, (Q, G), generator=g).float()
    rewards[0], rewards[1], rewards[-1, :2] = 1, 0, torch.tensor([0.0, 1.0])
    return Rollouts(*sampled, rewards)


def mask_of(batch):
    return minibupo.response_mask(batch.prompt_len, batch.end, batch.tokens.shape[1])


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_bits(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def sgd(model, lr=0.0):
    """SGD. With a rate of 0 an update leaves its gradient behind and moves no weight."""
    return torch.optim.SGD(model.parameters(), lr=lr)


def adamw(model, warm=True):
    """AdamW. If warm, it has moments from an earlier update."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    if warm:
        minibupo.update(model, optimizer, rollouts(model, seed=99))
    return optimizer


# ---- positions and policies ----


def test_response_mask_by_hand():
    """One row ends early, one at the last position, one never. EOS counts, padding does not."""
    mask = minibupo.response_mask(torch.tensor([2, 3, 1]), torch.tensor([4, 6, 6]), 6)
    assert mask.int().tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
    docstring = minibupo.response_mask(torch.tensor([4]), torch.tensor([6]), 8)
    assert docstring.tolist() == [[False, False, False, True, True, False, False]]


def test_internal_policies_are_raw_unembeddings_and_all_differ():
    model, tokens = tiny(), torch.randint(0, 11, (2, 7))
    found = [minibupo.policy_logits(model, tokens)]
    assert torch.equal(found[0], model(tokens))
    for l, trace in enumerate(model.trace(tokens), 1):
        for site in minibupo.SITES:
            h = getattr(trace, site)
            logits = minibupo.policy_logits(model, tokens, Policy(l, site))
            torch.testing.assert_close(logits, h @ model.lm_head.weight.T)
            assert not torch.allclose(logits, model.unembed(model.final_norm(h)))  # no logit lens
            found.append(logits)
    assert all((a - b).abs().max() > 0.1 for a, b in itertools.combinations(found, 2))


CONTRACT = ["residual", "trace", "unembed", "final_norm", "n_layer", "vocab_size", "device"]
CONTRACT += ["parameters", "eval", "generate", "truncated"]


def test_any_model_that_keeps_the_contract():
    """The model here is a function with only the attributes that minibupo.py's docstring lists."""
    gpt = tiny()

    def model(tokens):
        return gpt(tokens)

    for name in CONTRACT:
        setattr(model, name, getattr(gpt, name))
    batch = rollouts(model)
    for policy in POLICIES:
        assert minibupo.update(model, sgd(model), batch, policy)["grad_norm"] > 0
    minibupo.look_inside(model, batch.tokens, mask_of(batch))
    assert model.truncated(2).generate(batch.tokens[:, :2], 3).tokens.shape[1] == 5


def test_a_bfloat16_model_is_measured_in_float32():
    model = tiny(dtype=torch.bfloat16)
    batch = rollouts(model)
    logp = minibupo.token_logprobs(model, batch.tokens, mask_of(batch))
    found = minibupo.look_inside(model, batch.tokens, mask_of(batch))
    assert {x.dtype for x in (logp, *found.values())} == {torch.float32}


# ---- entropy and the target layer ----


def test_entropy_closed_forms():
    inf, log_3 = math.inf, math.log(3)
    rows = [
        ([0.0, 0, 0, 0], math.log(4)),
        ([-37.0, -37, -37, -37], math.log(4)),
        ([-inf, 0, -inf, -inf], 0.0),
        ([0, 1e4, 0, 0], 0.0),
        ([0, log_3, -inf, -inf], math.log(4) - 0.75 * log_3),  # 1/4, 3/4
    ]
    logits, expected = (torch.tensor(column) for column in zip(*rows))
    torch.testing.assert_close(minibupo.entropy(logits), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("V,scale", [(500, 80), (151_936, 1), (151_936, 30)])
def test_entropy_against_float64(V, scale):
    """This holds up to a real vocabulary, and if most of e^z is 0 in float32."""
    z = torch.randn(8, V, generator=torch.Generator().manual_seed(0)) * scale
    expected = torch.distributions.Categorical(logits=z.double()).entropy()
    torch.testing.assert_close(minibupo.entropy(z).double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(minibupo.entropy(z.double()), expected, rtol=1e-9, atol=1e-9)
    narrow = minibupo.entropy(z.bfloat16())
    torch.testing.assert_close(narrow, minibupo.entropy(z.bfloat16().float()))


@pytest.mark.parametrize("as_list", [list, np.array, torch.tensor])
def test_target_layer(as_list):
    assert minibupo.target_layer(as_list([0.5, 0.2, 0.1, -0.1])) == 3
    assert minibupo.target_layer(as_list([0.5, -0.2, 0.1, -0.3, -0.1])) == 3  # after a gap, too
    assert minibupo.target_layer(as_list([0.5, 0.2, 0.1])) == 2  # never the top layer


# ---- advantages and surrogate ----


def test_advantages_against_loops():
    rewards = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 0]])
    groups, flat = rewards.tolist(), rewards.flatten().tolist()

    def normed(values):
        std = statistics.stdev(values)
        return [(r - statistics.mean(values)) / (std + 1e-6) if std else 0.0 for r in values]

    by_hand = {
        "grpo": sum((normed(group) for group in groups), []),
        "rloo": [r - (sum(group) - r) / 3 for group in groups for r in group],
        "reinforce++": normed(flat),
    }
    assert by_hand["grpo"][:4] == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)
    for kind in minibupo.ADVANTAGES:
        found = minibupo.group_advantages(rewards.double(), kind)
        assert found.flatten().tolist() == pytest.approx(by_hand[kind], abs=1e-12)
        counts = minibupo.group_advantages(rewards, kind)  # whole numbers are rewards, too
        torch.testing.assert_close(counts, found.float())
        torch.testing.assert_close(minibupo.group_advantages(rewards.bfloat16(), kind), counts)
        for reward in torch.rand(20, generator=torch.Generator().manual_seed(0)):
            equal = minibupo.group_advantages(reward.expand(3, 7), kind)
            assert equal.eq(0).all()  # although the mean of 7 equal numbers may round to another


HUGE = math.exp(20)


@pytest.mark.parametrize(
    "advantage,log_ratio,objective,slope,cut",
    [
        (1, math.log(1.1), 1.1, 1.1, False),
        (1, math.log(1.5), 1.2, 0.0, True),
        (1, math.log(0.5), 0.5, 0.5, False),
        (-1, math.log(1.1), -1.1, -1.1, False),
        (-1, math.log(1.5), -1.5, -1.5, False),
        (-1, math.log(0.5), -0.8, 0.0, True),
        (0, math.log(0.5), 0.0, 0.0, False),
        # the log-ratio is clamped to +-20
        (1, 100, 1.2, 0.0, True),
        (1, -100, 1 / HUGE, 0.0, False),
        (-1, 19, -math.exp(19), -math.exp(19), False),
        (-1, 21, -HUGE, 0.0, True),
        (-1, -100, -0.8, 0.0, True),
    ],
)
def test_surrogate_of_one_token(advantage, log_ratio, objective, slope, cut):
    """Its value, its derivative by logp, and whether it counts as clipped."""
    logp = torch.tensor([[-1.0 + log_ratio]], dtype=torch.float64, requires_grad=True)
    old, A = torch.tensor([[-1.0]]).double(), torch.tensor([advantage]).double()
    loss, clipped = minibupo.surrogate(logp, old, A, torch.tensor([[True]]))
    loss.backward()
    assert loss.item() == pytest.approx(-objective, rel=1e-9)
    assert logp.grad.item() == pytest.approx(-slope, rel=1e-9)
    assert clipped.item() == cut


def test_nothing_outside_the_mask_matters():
    logp = torch.tensor([[0.1, math.nan, math.inf, 0.5]], requires_grad=True)
    old, mask = torch.tensor([[0, 0, -math.inf, 0]]), torch.tensor([[True, False, False, False]])
    loss, clipped = minibupo.surrogate(logp, old, torch.tensor([1.0]), mask)
    loss.backward()
    assert loss.item() == pytest.approx(-math.exp(0.1)) and clipped.item() == 0
    assert logp.grad[0, 1:].eq(0).all()


def test_the_two_averages_by_hand():
    """The rows have 1, 3 and 0 tokens, ratio 1, and advantages 2, -1 and 5."""
    mask = torch.tensor([[True, False, False], [True, True, True], [False, False, False]])
    zero, A = torch.zeros(3, 3), torch.tensor([2.0, -1.0, 5.0])
    for options, loss in (({}, -(2 - 3) / 4), ({"average": "sequence"}, -(2 - 1 + 0) / 3)):
        found = minibupo.surrogate(zero, zero, A, mask, **options)[0]
        assert found.item() == pytest.approx(loss)


# ---- one update ----


def plain_logprobs(model, batch, policy, temperature):
    """log pi of the tokens of each response, computed row by row without mask or padding."""
    found = []
    for tokens, prompt_len, end in zip(batch.tokens, batch.prompt_len, batch.end):
        z = minibupo.policy_logits(model, tokens[None, : end - 1], policy)[0, prompt_len - 1 :]
        log_pi = (z / temperature).log_softmax(-1)
        found.append(log_pi.gather(-1, tokens[prompt_len:end, None])[:, 0])
    return found


DEFAULTS = dict(minibatches=4, advantage="grpo", average="token", clip=0.2, max_grad_norm=1.0)


def plain_update(model, batch, policy, temperature=1.0, **options):
    """update as gradient descent with rate 1, token by token as in Eq. 4, with all rows."""
    o = DEFAULTS | options
    A = minibupo.group_advantages(batch.rewards, o["advantage"]).flatten().tolist()
    old = [logp.detach() for logp in plain_logprobs(model, batch, policy, temperature)]
    cut, norms, weights = 0, [], list(model.parameters())
    for questions in np.array_split(np.arange(24).reshape(6, 4), o["minibatches"]):
        rows = questions.flatten().tolist()
        tokens = sum(len(old[i]) for i in rows)
        logp = plain_logprobs(model, batch, policy, temperature)
        objective = 0.0
        for i in rows:
            share = 1 / tokens if o["average"] == "token" else 1 / (len(rows) * len(old[i]))
            for ratio in (logp[i] - old[i]).exp():
                plain = ratio * A[i]
                clipped = ratio.clamp(1 - o["clip"], 1 + o["clip"]) * A[i]
                objective = objective + share * min(plain, clipped)
                cut += int(clipped < plain)
        gradient = torch.autograd.grad(objective, weights, allow_unused=True)
        norm = math.sqrt(sum(g.square().sum().item() for g in gradient if g is not None))
        for w, g in zip(weights, gradient):
            if g is not None:
                w.data += g * o["max_grad_norm"] / max(norm, o["max_grad_norm"])
        norms += [norm] if any(A[i] for i in rows) else []
    share = cut / sum(len(logp) for logp in old)
    return {"clip_fraction": share, "grad_norm": np.mean(norms), "optimizer_steps": len(norms)}


SEQUENCE = dict(average="sequence", minibatches=2, temperature=0.7, max_grad_norm=0.5)
BATCH = dict(advantage="reinforce++", minibatches=3, clip=0.05, max_grad_norm=1e9)


@pytest.mark.parametrize(
    "options,chunk", [({}, {}), (SEQUENCE, dict(chunk=1)), (BATCH, dict(chunk=3))]
)
@pytest.mark.parametrize("policy", POLICIES)
def test_update_against_a_plain_loop(policy, options, chunk):
    """Both give the same weights and the same log, for all policies and options."""
    ours, plain = (tiny(dtype=torch.float64, tied=False) for _ in range(2))
    batch = rollouts(ours, temperature=options.get("temperature", 1.0))
    log = minibupo.update(ours, sgd(ours, lr=1.0), batch, policy, **options, **chunk)
    expected = plain_update(plain, batch, policy, **options)
    assert log == pytest.approx(expected, rel=1e-5) and log["clip_fraction"] > 0
    for (name, a), b in zip(ours.named_parameters(), plain.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("policy", POLICIES[1:])
def test_gradient_flow_of_phase_1(policy, tied):
    """Eq. 15, 16: no gradient above l (for pi_ATTN^l none in the FFN of l either), but below."""
    model = tiny(tied=tied)
    batch = rollouts(model)
    batch.tokens[batch.tokens == 8] = 7  # so that token 8 is never met
    for block in model.blocks[policy.layer :]:
        block.register_forward_hook(lambda *_: pytest.fail("a block above l is computed"))
    minibupo.update(model, sgd(model), batch, policy, minibatches=1)
    for name, p in model.named_parameters():
        block = int(name.split(".")[1]) + 1 if name.startswith("blocks") else 0
        absent = name.startswith("final_norm") or block > policy.layer
        absent |= policy.site == "attn_out" and block == policy.layer and "mlp" in name
        assert (p.grad is None) if absent else (p.grad.abs().max() > 0), name
        if name == "embed.weight":  # tied it is E_u, and every row learns that it was not chosen
            assert (p.grad[8].abs().max() > 0) == tied


def test_frozen_part_stays_bit_for_bit_in_phase_1_and_moves_in_phase_2():
    """Neither weight decay nor momentum from an earlier phase 2 moves them."""
    model = tiny(tied=False)
    optimizer = adamw(model)
    before = weights(model)
    for seed in range(4):
        minibupo.update(model, optimizer, rollouts(model, seed=seed), Policy(2), minibatches=2)
    after = weights(model)
    for name in before:
        frozen = name.startswith(("final_norm", "blocks.2"))
        assert torch.equal(before[name], after[name]) == frozen, name
    minibupo.update(model, optimizer, rollouts(model, seed=5))
    assert not any(torch.equal(after[name], value) for name, value in weights(model).items())


def test_no_step_without_advantages_and_none_that_is_not_finite():
    """Without a gradient, momentum and weight decay must not move the weights either."""
    model = tiny()
    optimizer, batch, before = adamw(model), rollouts(model), weights(model)
    log = minibupo.update(model, optimizer, batch._replace(rewards=torch.ones(6, 4)))
    assert log == {"clip_fraction": 0.0, "grad_norm": 0.0, "optimizer_steps": 0}
    model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(FloatingPointError, match="not finite"):
        minibupo.update(model, optimizer, batch)
    assert same_bits(before, weights(model))


def test_only_what_the_optimizer_holds_is_trained():
    """An optimizer of layer 1: its gradient, and the norm of it, are those of a plain gradient;
    other parameters keep weight and .grad; the same batch at unmoved weights has the same norm."""
    model, batch = tiny(tied=False), rollouts(tiny(tied=False))
    part = list(model.blocks[0].parameters())
    ids = {id(p) for p in part}
    rest = [p for p in model.parameters() if id(p) not in ids]
    for p in rest:
        p.grad = torch.full_like(p, 7.0)
    rest[0].requires_grad_(False)

    whole = tiny(tied=False)
    minibupo.update(whole, sgd(whole), batch, minibatches=1, max_grad_norm=1e-3)
    minibupo.update(whole, sgd(whole), batch, minibatches=1, max_grad_norm=math.inf)
    expected = [p.grad for p in whole.blocks[0].parameters()]
    norm = math.sqrt(sum(g.square().sum().item() for g in expected))

    before = weights(model)
    optimizer = torch.optim.SGD(part, lr=0.0)
    for _ in range(3):
        log = minibupo.update(model, optimizer, batch, minibatches=1, max_grad_norm=math.inf)
        assert log["grad_norm"] == pytest.approx(norm, rel=1e-4)
    for p, g in zip(part, expected):
        torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-7)
    assert all(p.grad.eq(7).all() for p in rest)
    minibupo.update(model, torch.optim.SGD(part, lr=1.0), batch, minibatches=1)
    moved = {name for name, w in weights(model).items() if not torch.equal(w, before[name])}
    assert moved == {name for name in before if name.startswith("blocks.0.")}


def test_an_update_under_autocast_reaches_every_weight():
    """The pass without gradient must not leave weights in autocast's cache that have none."""
    model = tiny(tied=False)
    with torch.autocast("cpu", torch.bfloat16):
        minibupo.update(model, sgd(model), rollouts(model), minibatches=1)
    assert all(p.grad.abs().max() > 0 for p in model.parameters())


def test_under_autocast_each_optimizer_step_reaches_the_next_mini_batch():
    """Autocast keeps cast weights until its `with` ends: the same as without this cache."""
    after = []
    for cache_enabled in (True, False):
        model = tiny()
        batch = rollouts(model)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache_enabled):
            log = minibupo.update(model, sgd(model, lr=0.5), batch, minibatches=6)
        after.append((log, weights(model)))
    assert after[0][0] == after[1][0] and log["clip_fraction"] > 0
    assert same_bits(after[0][1], after[1][1])


def test_an_update_has_no_dropout():
    """In the first mini-batch every ratio is 1, and a look inside can be repeated, in any mode."""
    model = tiny()
    model.blocks[0].mlp.down = torch.nn.Sequential(model.blocks[0].mlp.down, torch.nn.Dropout(0.5))
    batch = rollouts(model.eval())
    model.train()
    log = minibupo.update(model, sgd(model), batch, minibatches=1)
    assert log["clip_fraction"] == 0 and not model.training
    model.train()
    first, second = (minibupo.look_inside(model, batch.tokens, mask_of(batch)) for _ in range(2))
    assert same_bits(first, second)


@pytest.mark.parametrize("carrier", ["old_logp", "rewards"])
def test_no_gradient_flows_through_the_reference_of_the_ratio_or_the_rewards(carrier):
    """Both are numbers, even if the caller has left the graph of the policy on them."""
    model = tiny()
    batch = rollouts(model)
    mask, tokens = mask_of(batch), batch.tokens
    A = minibupo.group_advantages(batch.rewards).flatten()
    old = minibupo.token_logprobs(model, tokens, mask)
    minibupo.policy_loss(model, tokens, old.detach(), A, mask)[0].backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    if carrier == "old_logp":
        minibupo.policy_loss(model, tokens, old, A, mask)[0].backward()
    else:
        zero = model(tokens).mean() * 0
        graph = batch._replace(rewards=batch.rewards + zero)
        minibupo.update(model, sgd(model), graph, minibatches=1, chunk=7, max_grad_norm=math.inf)
    for p, g in zip(model.parameters(), expected):
        torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("part", ["final_norm", "blocks.2"])
def test_an_update_that_reaches_nothing_is_refused(part):
    """What phase 1 at layer 2 does not train, and an update with gradients disabled."""
    model, batch = tiny(), rollouts(tiny())
    optimizer = torch.optim.AdamW(model.get_submodule(part).parameters())
    with pytest.raises(ValueError, match="no gradient reaches"):
        minibupo.update(model, optimizer, batch, Policy(2))
    with torch.no_grad(), pytest.raises(ValueError, match="no gradient reaches"):
        minibupo.update(model, optimizer, batch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_default_types(dtype):
    """A model made and updated under another default type has that type, and learns."""
    torch.set_default_dtype(dtype)
    try:
        model = tiny(dtype=dtype)
        assert {x.dtype for x in model.state_dict().values()} == {dtype}
        assert {model.cos.dtype, model.sin.dtype} == {dtype}
        assert minibupo.update(model, sgd(model), rollouts(model))["grad_norm"] > 0
    finally:
        torch.set_default_dtype(torch.float32)


def test_another_default_device():
    """Every tensor is made where the model or the batch is, not on the default device."""
    with torch.device("meta"):
        assert GPT(GPTConfig(11, 24)).cos.is_meta
    model = tiny()
    batch = rollouts(model)
    with torch.device("meta"):
        minibupo.update(model, sgd(model), batch, Policy(2))
        minibupo.look_inside(model, batch.tokens, mask_of(batch))
        generator = torch.Generator("cpu").manual_seed(0)
        assert (
            model.generate(batch.tokens[:, :2], 3, generator=generator).tokens.device.type == "cpu"
        )


# ---- Algorithm 1 ----


@pytest.mark.parametrize("s_inter,stop", [(0, 5), (2, 5), (5, 5), (2, 1), (2, 2), (2, 3)])
def test_algorithm_1_bit_for_bit(s_inter, stop):
    """AdamW is reset only at the switch. A run stopped after a step resumes with the next."""
    plain, model = tiny(), tiny()
    optimizer, expected = adamw(plain), []
    for step in range(1, 6):
        policy = Policy(2) if step <= s_inter else FULL
        if 0 < s_inter == step - 1:
            optimizer = adamw(plain, warm=False)
        log = minibupo.update(plain, optimizer, rollouts(plain, seed=step), policy, minibatches=2)
        expected.append((step, policy, log))

    optimizer, found = adamw(model), []
    first = itertools.islice(minibupo.phases(optimizer, Policy(2), s_inter, 5), stop)
    rest = minibupo.phases(optimizer, Policy(2), s_inter, 5, start=stop + 1)
    for step, policy in itertools.chain(first, rest):
        log = minibupo.update(model, optimizer, rollouts(model, seed=step), policy, minibatches=2)
        found.append((step, policy, log))
    assert found == expected
    assert same_bits(weights(plain), weights(model))


@pytest.mark.parametrize("start,reset", [(1, [3]), (3, [3]), (4, [])])
def test_moments_are_reset_immediately_before_phase_2(start, reset):
    """Neither earlier nor later: a run that resumes in phase 2 keeps its moments."""
    optimizer, found = adamw(tiny()), []
    for step, policy in minibupo.phases(optimizer, Policy(2), 2, 6, start=start):
        if not optimizer.state:
            found.append(step)
            optimizer.state["moments"] = "of this step"
        assert policy == (Policy(2) if step <= 2 else FULL)
    assert found == reset
    kept = adamw(tiny())
    assert [*minibupo.phases(kept, Policy(2), 2, 4, reset_moments=False)][-1] == (4, FULL)
    assert kept.state


# ---- measures ----


def inside_by_hand(model, traces, i, t):
    """Everything that look_inside measures at position t of row i, as lists over layers."""

    def H(h):
        return -sum(p * math.log(p) for p in (model.lm_head.weight @ h).softmax(0).tolist())

    def cos(a, b):
        return (a @ b / (a @ a).sqrt() / (b @ b).sqrt()).item()

    def rms(h):
        return h.square().mean().sqrt().item()

    layers = [LayerTrace(*(h[i, t] for h in trace)) for trace in traces]
    stream = [layers[0].resid_pre, *(x.resid_post for x in layers)]
    top = stream[-1]
    return {
        "layer": [H(h) for h in stream],
        "layer_normed": [H(model.final_norm(h)) for h in stream],
        "layer_matched": [H(h * rms(top) / rms(h)) for h in stream],
        "cos_layer": [cos(h, top) for h in stream],
        "rms_layer": [rms(h) for h in stream],
        "attn_in": [H(x.attn_in) for x in layers],
        "mlp_in": [H(x.mlp_in) for x in layers],
        "attn": [H(x.attn_out) for x in layers],
        "mlp": [H(x.mlp_out) for x in layers],
        "dH_attn": [H(x.attn_out) - H(x.attn_in) for x in layers],
        "dH_mlp": [H(x.mlp_out) - H(x.mlp_in) for x in layers],
        "dH_layer": [H(x.resid_post) - H(x.resid_pre) for x in layers],
        "cos_attn": [cos(x.attn_out, x.resid_pre) for x in layers],
        "cos_mlp": [cos(x.mlp_out, x.resid_mid) for x in layers],
        "rms_attn": [rms(x.attn_out) for x in layers],
        "rms_mlp": [rms(x.mlp_out) for x in layers],
    }


def test_look_inside_against_a_float64_loop():
    model = tiny(dtype=torch.float64)
    batch = rollouts(model, Q=2, G=3)
    found = minibupo.look_inside(model, batch.tokens, mask_of(batch))
    traces = list(model.trace(batch.tokens[:, :-1]))
    positions = [(i, t - 1) for i in range(6) for t in range(batch.prompt_len[i], batch.end[i])]
    for m, (i, t) in enumerate(positions):
        expected = inside_by_hand(model, traces, i, t)
        for name, values in expected.items():
            assert found[name][:, m].tolist() == pytest.approx(values, abs=1e-9), name
    assert found.keys() == expected.keys()
    assert {x.shape[1] for x in found.values()} == {len(positions)}


def test_chunks_bound_the_memory_and_change_nothing():
    """At most a chunk of rows or logits is computed at a time, and no row of advantage 0."""
    model, rows, logits = tiny(), [], []
    batch = rollouts(model)
    whole = minibupo.look_inside(model, batch.tokens, mask_of(batch))
    model.embed.register_forward_hook(lambda _, args, out: rows.append(len(out)))
    model.lm_head.register_forward_hook(lambda _, args, out: logits.append(len(out)))
    parts = minibupo.look_inside(model, batch.tokens, mask_of(batch), chunk=10)
    assert max(logits) == 10
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-4)
    rows.clear()
    minibupo.update(model, sgd(model), batch, chunk=5)
    useful = (minibupo.group_advantages(batch.rewards) != 0).sum().item()
    assert max(rows) == 5 and sum(rows) == 2 * useful  # once for old_logp, once for the gradient


def test_pass_at_k_against_enumeration():
    for n in range(1, 9):
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(range(n), k))
            right = [sum(min(subset) < c for subset in subsets) for c in range(n + 1)]
            expected = [x / len(subsets) for x in right]
            assert minibupo.pass_at_k(n, range(n + 1), k).tolist() == pytest.approx(expected)
    exact = 1 - math.comb(250, 206) / math.comb(300, 206)
    assert float(minibupo.pass_at_k(300, 50, 206)) == pytest.approx(exact, abs=1e-12)
    assert minibupo.pass_at_k(4, [], 2).shape == (0,)
    assert minibupo.pass_at_k(4, np.array([1.0, 4.0]), 2).tolist() == [0.5, 1.0]


def test_pass_at_k_counts_are_integers():
    for c in (0.53, [1, 2.5], math.nan):
        with pytest.raises(ValueError, match="c in 0..n"):
            minibupo.pass_at_k(8, c, 1)


# ---- bad input ----


@pytest.mark.parametrize(
    "name,change",
    [
        ("advantages", lambda x: x[:, None]),
        ("advantages", lambda x: x[:1]),
        ("old_logp", lambda x: x[:, :1]),
        ("old_logp", lambda x: x[None]),
        ("logp", lambda x: x[0]),
        ("mask", lambda x: x[:1]),
        ("mask", lambda x: x[:, :-1]),
        ("mask", lambda x: x.long()),
    ],
)
def test_shapes_that_would_broadcast(name, change):
    """surrogate refuses them and names both shapes."""
    mask = torch.ones(4, 5).bool()
    arrays = dict(logp=torch.zeros(4, 5), old_logp=torch.zeros(4, 5), advantages=torch.ones(4))
    arrays["mask"] = mask
    minibupo.surrogate(**arrays)
    arrays[name] = change(arrays[name])
    with pytest.raises(ValueError, match="(logp|advantages|mask) must .*, not "):
        minibupo.surrogate(**arrays)
    flat = [torch.zeros(9), torch.zeros(9), torch.ones(9), torch.ones(9).bool()]
    with pytest.raises(ValueError, match="logp must have the shape"):
        minibupo.surrogate(*flat)


@pytest.mark.parametrize("wrong", [lambda m: m[:, :-1], lambda m: m.int(), lambda m: m[:1]])
def test_masks_of_another_shape_are_refused_where_they_come_in(wrong):
    """So is a mask (N, T), as Hugging Face's labels have it."""
    model = tiny()
    batch = rollouts(model)
    tokens, mask = batch.tokens, mask_of(batch)
    wide = torch.cat((mask, mask[:, :1]), dim=1)
    for invalid in (wrong(mask), wide):
        for call in (minibupo.token_logprobs, minibupo.look_inside):
            with pytest.raises(ValueError, match="mask must"):
                call(model, tokens, invalid)
    with pytest.raises(ValueError, match="mask must"):
        minibupo.policy_logits(model, tokens, FULL, mask)


BAD_ROLLOUTS = [
    dict(rewards=torch.ones(4, 2)),
    dict(rewards=torch.ones(24)),
    dict(rewards=torch.ones(24, 1)),
    dict(rewards=torch.tensor([[1.0, 0, math.nan, 0]] * 6)),
    dict(rewards=torch.tensor([[1.0, 0, math.inf, 0]] * 6)),
    dict(prompt_len=torch.zeros(24).long()),
    dict(prompt_len=torch.ones(24, 1).long()),
    dict(end=torch.ones(23).long()),
    dict(end=torch.full((24,), 99)),
    dict(end=torch.ones(24).long(), prompt_len=torch.ones(24).long()),
    dict(rewards=torch.tensor([[3e38, 3e38, -3e38, 0]] * 6)),
    dict(tokens=torch.ones(24).long()),
]
BAD_OPTIONS = [dict(temperature=t) for t in (0, -1, math.nan)] + [dict(average="mean")]
BAD_OPTIONS += [dict(clip=-0.5), dict(clip=math.nan), dict(max_grad_norm=-1), dict(chunk=0)]
BAD_OPTIONS += [dict(advantage="ppo"), dict(minibatches=0), dict(minibatches=7)]


@pytest.mark.parametrize("change", BAD_ROLLOUTS + BAD_OPTIONS, ids=str)
def test_what_update_refuses_changes_nothing(change):
    """Weights, gradients and moments are as before."""
    model = tiny()
    optimizer, batch = adamw(model), rollouts(model)
    before, moments = weights(model), copy.deepcopy(optimizer.state_dict())
    gradients = [p.grad.clone() for p in model.parameters()]
    options = {k: v for k, v in change.items() if k not in Rollouts._fields}
    fields = {k: v for k, v in change.items() if k in Rollouts._fields}
    with pytest.raises(ValueError, match="must"):
        minibupo.update(model, optimizer, batch._replace(**fields), **options)
    assert same_bits(before, weights(model))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients))
    for i, state in moments["state"].items():
        assert same_bits(state, optimizer.state_dict()["state"][i])


def test_an_optimizer_of_another_model_is_refused():
    model, other = tiny(), tiny()
    with pytest.raises(ValueError, match="no parameter of this model"):
        minibupo.update(model, adamw(other, warm=False), rollouts(model))


BAD_POLICIES = [Policy(4), Policy(-1), Policy(1, "resid_pre"), Policy(None, "attn_out")]
BAD_POLICIES += [Policy(0, "attn_out"), Policy(4, "mlp_out")]
INVALID = [
    *[lambda m, p=p: minibupo.policy_logits(m, torch.ones(1, 3).long(), p) for p in BAD_POLICIES],
    *[lambda _, d=d: minibupo.target_layer(d) for d in ([-0.1, -0.2, 0.3], [0.0, 0.0], [0.1])],
    *[lambda _, d=d: minibupo.target_layer(d) for d in ([0.1, math.nan, 0.3], [0.1, 0, math.nan])],
    *[lambda _, s=s: minibupo.group_advantages(torch.ones(s)) for s in ((4, 1), (4,), (2, 2, 2))],
    lambda _: minibupo.group_advantages(torch.ones(4, 2), "ppo"),
    lambda _: minibupo.surrogate(A := torch.ones(1, 1), A, A[0], A.bool(), average="mean"),
    *[lambda m, n=n: minibupo.update(m, sgd(m), rollouts(m), minibatches=n) for n in (0, 7)],
    lambda m: next(minibupo.phases(sgd(m), Policy(1), -1, 3)),
    lambda m: next(minibupo.phases(sgd(m), Policy(1), 1, 3, start=0)),
    *[lambda m, s=s: next(minibupo.phases(sgd(m), Policy(1), s, 3)) for s in (1.5, math.nan)],
    *[lambda _, e=e: minibupo.group_advantages(torch.rand(2, 2), eps=e) for e in (-1, math.nan)],
    lambda m: minibupo.token_logprobs(m, torch.ones(3).long(), torch.ones(2).bool()),
    lambda m: minibupo.look_inside(m, torch.ones(1, 3).long(), torch.zeros(1, 2).bool()),
    *[lambda _, k=k: minibupo.pass_at_k(4, 2, k) for k in (0, 5)],
    *[lambda _, c=c: minibupo.pass_at_k(4, c, 2) for c in (5, [1, -1])],
]


@pytest.mark.parametrize("call", INVALID)
def test_invalid_input_is_refused_in_a_sentence(call):
    named = "layer|dH|site|advantage|rewards|average|minibatches|s_inter|positions|k <= n|eps|mask"
    with pytest.raises(ValueError, match=named):
        call(tiny())
