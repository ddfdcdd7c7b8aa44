"""model.py against its own definitions, written down a second time.

H^l = H^0 + sum A^i + sum F^j        logits = unembed(final_norm(H^L))        residual(l) = trace's H^l
cached = uncached                    sampled rows = rows scored one by one    truncated(l) = softmax(H^l E_u^T)
"""

import copy

import numpy as np
import pytest
import torch
from conftest import tiny
from torch.utils._python_dispatch import TorchDispatchMode

from model import GPTConfig, sample

VARIANTS = {
    "qwen3": {},
    "qwen2": dict(qk_norm=False, qkv_bias=True, tied=False),
    "llama": dict(qk_norm=False, tied=False, n_kv_head=4),
    "wide-heads": dict(head_dim=10, n_kv_head=1),
}


@pytest.fixture(params=VARIANTS, ids=VARIANTS)
def model(request):
    return tiny(**VARIANTS[request.param])


def random_tokens(B=3, T=9, seed=1):
    return torch.randint(0, 11, (B, T), generator=torch.Generator().manual_seed(seed))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- the stream ----


def test_stream_is_the_sum_of_what_was_written(model):
    tokens = random_tokens()
    total = model.embed(tokens)
    for trace in model.trace(tokens):
        assert torch.equal(trace.resid_pre, total)
        total = total + trace.attn_out
        assert torch.equal(trace.resid_mid, total)
        total = total + trace.mlp_out
        assert torch.equal(trace.resid_post, total)  # Eq. 5, added in the same order: exact


def test_modules_read_the_normed_stream(model):
    for block, trace in zip(model.blocks, model.trace(random_tokens())):
        assert torch.equal(trace.attn_in, block.attn_norm(trace.resid_pre))
        assert torch.equal(trace.mlp_in, block.mlp_norm(trace.resid_mid))
        assert not torch.allclose(trace.attn_in, trace.resid_pre)


def test_residual_and_policy_are_those_of_the_trace(model):
    tokens = random_tokens()
    stream = [model.embed(tokens)] + [trace.resid_post for trace in model.trace(tokens)]
    for layer, h in enumerate(stream):
        torch.testing.assert_close(model.residual(tokens, layer), h)
        assert torch.equal(model.residual(tokens, np.int64(layer)), model.residual(tokens, layer))
    torch.testing.assert_close(model(tokens), model.unembed(model.final_norm(stream[-1])))
    assert not torch.allclose(model(tokens), model.unembed(stream[-1]))  # another policy
    for layer in (1, 2, 3):
        torch.testing.assert_close(
            model.truncated(layer)(tokens), stream[layer] @ model.lm_head.weight.T
        )


def test_no_more_blocks_are_computed_than_asked_for(model):
    ran = []
    for i, block in enumerate(model.blocks, 1):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    model.residual(random_tokens(), 2)
    next(iter(model.trace(random_tokens())))
    model.truncated(2)(random_tokens())
    assert ran == [1, 2, 1, 1, 2]


def test_forward_against_a_loop_over_heads_and_positions():
    """One layer of float64 attention, norms and SwiGLU by hand, position by position."""
    model = tiny(n_layer=1, dtype=torch.float64)
    cfg, block, tokens = model.cfg, model.blocks[0], random_tokens(1, 6)
    D, rms = cfg.head_dim, lambda x, w: w * x / (x.square().mean() + cfg.norm_eps).sqrt()

    def rope(x, t):  # as complex numbers x_i + 1j x_{i+D/2}, turned by t theta^(-2i/D)
        z = torch.complex(x[: D // 2], x[D // 2 :])
        angle = t * cfg.rope_theta ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
        z = z * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((z.real, z.imag))

    h = model.embed.weight[tokens[0]]
    q, k, v = [], [], []
    for t in range(6):
        heads = (block.attn.qkv.weight @ rms(h[t], block.attn_norm.weight)).view(-1, D)
        q.append([rope(rms(x, block.attn.q_norm.weight), t) for x in heads[:4]])
        k.append([rope(rms(x, block.attn.k_norm.weight), t) for x in heads[4:6]])
        v.append(heads[6:])
    for t in range(6):
        mixed = []
        for head in range(4):
            kv = head // 2
            p = torch.stack([q[t][head] @ k[u][kv] / D**0.5 for u in range(t + 1)]).softmax(0)
            mixed.append(sum(p[u] * v[u][kv] for u in range(t + 1)))
        x = h[t] + block.attn.out.weight @ torch.cat(mixed)
        gate, up = (block.mlp.gate_up.weight @ rms(x, block.mlp_norm.weight)).chunk(2)
        x = x + block.mlp.down.weight @ (gate / (1 + torch.exp(-gate)) * up)
        logits = model.embed.weight @ rms(x, model.final_norm.weight)
        # the model's rope table is float32, hence not 1e-12
        torch.testing.assert_close(model(tokens)[0, t], logits, rtol=1e-5, atol=1e-6)


def test_the_future_changes_nothing(model):
    tokens = random_tokens(3, 9)
    other = tokens.clone()
    other[:, 6:] = (other[:, 6:] + 1) % 11
    torch.testing.assert_close(model(tokens)[:, :6], model(other)[:, :6])


def test_tied_and_untied(model):
    tied = model.cfg.tied
    assert (model.lm_head.weight is model.embed.weight) == tied
    model.residual(torch.zeros(1, 4, dtype=torch.long), 1).sum().backward()
    assert (model.lm_head.weight.grad is not None) == tied


def test_a_copy_is_independent(model):
    twin, tokens = copy.deepcopy(model), random_tokens()
    before = model(tokens)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1.0)
    assert torch.equal(model(tokens), before) and not torch.equal(twin(tokens), before)


# ---- sampling ----


def assert_greedy(model, out, limit):
    """Each token of each response is the likeliest one, within rounding, by scoring whole rows."""
    logits = model(out.tokens).detach()
    for i, row in enumerate(out.tokens):
        for t in range(int(out.prompt_len[i]), int(out.end[i])):
            assert logits[i, t - 1, row[t]] > logits[i, t - 1].max() - 1e-4
        assert int(out.end[i] - out.prompt_len[i]) <= limit


def test_greedy_takes_the_likeliest_token_and_ragged_rows_stand_at_their_places(model):
    prompt, lengths = random_tokens(5, 7), [7, 3, 5, 4, 6]
    out = model.generate(prompt, 9, prompt_len=lengths, temperature=0, eos_id=1)
    assert_greedy(model, out, 9)
    for i, n in enumerate(lengths):
        assert out.tokens[i, :n].tolist() == prompt[i, :n].tolist()
        alone = model.generate(prompt[i : i + 1, :n], 9, temperature=0, eos_id=1)
        assert_greedy(model, alone, 9)


def test_cached_logits_equal_uncached(model):
    tokens, cache = random_tokens(2, 9), model._empty_cache(2, 9).fill_(float("nan"))
    logits = [model._next_logits(tokens[:, :4], cache, 0)]  # what is not written is not read
    logits += [model._next_logits(tokens[:, t : t + 1], cache, t) for t in range(4, 9)]
    torch.testing.assert_close(torch.stack(logits, 1), model(tokens)[:, 3:], rtol=0, atol=1e-5)


def test_rows_end_at_their_first_eos_or_at_the_limit(model):
    prompt, lengths = random_tokens(6, 6), torch.tensor([6, 2, 3, 6, 5, 4])
    options = dict(prompt_len=lengths, num_samples=4, eos_id=2, pad_id=10, generator=seeded())
    out = model.generate(prompt, 10, **options)
    ended = 0
    for i, row in enumerate(out.tokens):
        p, end = int(lengths[i // 4]), int(out.end[i])
        response = row[p:end].tolist()
        assert row[:p].tolist() == prompt[i // 4, :p].tolist() and int(out.prompt_len[i]) == p
        assert 2 not in response[:-1] and (response[-1] == 2 or len(response) == 10)
        assert row[end:].eq(10).all()
        ended += response[-1] == 2
    assert 0 < ended < 24 and out.tokens.shape[1] == out.end.max()


@pytest.mark.parametrize("layer", [None, 2])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_policy(layer, temperature):
    """20,000 first tokens of pi_theta, or of a layer's policy: each frequency within 5 standard errors
    (it fails by chance for less than 1 of 10,000 seeds)."""
    model, prompt = tiny(), random_tokens(1, 5)
    logits = model(prompt) if layer is None else model.unembed(model.residual(prompt, layer))
    p = (logits[0, -1] / temperature).softmax(-1).detach()
    sampled = model if layer is None else model.truncated(layer)
    out = sampled.generate(
        prompt, 1, num_samples=20_000, temperature=temperature, generator=seeded()
    )
    frequency = torch.bincount(out.tokens[:, 5], minlength=11) / 20_000
    assert ((frequency - p).abs() <= 5 * (p * (1 - p) / 20_000).sqrt() + 1e-4).all()


@pytest.mark.parametrize("noise", [0.0, -0.0])
def test_no_token_of_probability_zero_is_sampled(noise, monkeypatch):
    """Not even where a device's Exponential(1) rounds to 0, whose logarithm is -inf."""
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self, generator: self.fill_(noise))
    logits = torch.tensor([[0.0, -float("inf"), 1.0]]).expand(5, 3)
    assert sample(logits, 1.0).tolist() == [2] * 5


def test_same_generator_same_samples_and_no_global_state(model):
    before = torch.get_rng_state()
    a, b, c = (model.generate(random_tokens(), 8, generator=seeded(s)).tokens for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(before, torch.get_rng_state())


def test_what_a_prompt_is_padded_with_does_not_matter():
    model = tiny()
    wide = torch.full((1, 20), 99)  # no token at all, and too wide for the context with 8 more
    wide[0, :2] = torch.tensor([3, 5])
    out = model.generate(wide, 8, prompt_len=[2], generator=seeded())
    plain = model.generate(wide[:, :2], 8, generator=seeded())
    assert torch.equal(out.tokens, plain.tokens) and out.tokens.shape == (1, 10)
    assert model.generate(torch.zeros(1, 10, dtype=torch.long), 3, prompt_len=[2]).tokens.shape == (
        1,
        5,
    )


# ---- bad input ----


@pytest.mark.parametrize(
    "bad,says",
    [
        (dict(d_model=15), "n_head = 4 does not divide d_model = 15"),
        (dict(n_kv_head=3), "n_kv_head = 3 does not divide n_head = 4"),
        (dict(head_dim=5), "head_dim must be even"),
        (dict(n_layer=0), "n_layer must be at least 1, not 0"),
        (dict(d_mlp=0), "d_mlp must be at least 1, not 0"),
    ],
)
def test_impossible_configurations(bad, says):
    with pytest.raises(ValueError, match=says):
        GPTConfig(**(dict(vocab_size=11, context_length=8, d_model=16, n_head=4) | bad))


def test_bad_input_is_named():
    model, tokens = tiny(), random_tokens()
    cases = [
        (lambda: model(torch.zeros(1, 25, dtype=torch.long)), "longer than context_length = 24"),
        (lambda: model(tokens + 5), "token id 15 is outside the vocabulary, 0..10"),
        (lambda: model(tokens - 11), "outside the vocabulary"),
        (lambda: model.trace(tokens + 5), "outside the vocabulary"),
        (lambda: model(tokens[0]), "batch, time"),
        (lambda: model(tokens[:, :0]), "not empty"),
        *[
            (lambda x=x: model.residual(tokens, x), "layer must be in 0..3")
            for x in (4, -1, 1.5, "1")
        ],
        (lambda: model.truncated(0), r"layer must be in 1\.\.3"),
        (lambda: model.generate(tokens, 16), "outgrow context_length = 24"),
        (lambda: model.generate(tokens, 0), "max_new_tokens must be at least 1"),
        (lambda: model.generate(tokens, 1, num_samples=0), "num_samples must be at least 1"),
        (lambda: model.generate(tokens, 1, temperature=-1), "temperature must be"),
        (lambda: model.generate(tokens, 1, temperature=float("nan")), "temperature must be"),
        (lambda: model.generate(tokens, 1, pad_id=11), "pad_id 11 is outside the vocabulary"),
        (lambda: model.generate(tokens, 1, prompt_len=[1, 2, 10]), "prompt_len must be"),
        (lambda: model.generate(tokens, 1, prompt_len=[1, 2]), "prompt_len must be"),
    ]
    for call, says in cases:
        with pytest.raises(ValueError, match=says):
            call()


class Synchronisations(TorchDispatchMode):
    """Counts what a GPU would have to be waited for: reading a number, picking rows by a mask."""

    count = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        picks = f is torch.ops.aten.index.Tensor
        masked = picks and any(i is not None and i.dtype == torch.bool for i in args[1])
        waits = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        self.count += masked or f in waits
        return f(*args, **(kwargs or {}))


def test_sampling_waits_for_the_device_only_now_and_then():
    model, counts = tiny(context_length=128), []
    for new in (20, 40, 80):
        with Synchronisations() as seen:
            model.generate(torch.ones(4, 3, dtype=torch.long), new, generator=seeded())
        counts.append(seen.count)
    assert counts[0] > 0  # the counter counts
    assert [b - a for a, b in zip(counts, counts[1:])] == [
        20 / 4,
        40 / 4,
    ]  # one check in four steps
