"""model.py against its own definitions, written down a second time.

H^l = H^0 + sum A^i + sum F^j    logits = unembed(final_norm(H^L))    residual(l) = trace's H^l
cached = uncached                truncated(l) = softmax(H^l E_u^T)    rows as if sampled alone
"""

import math

import numpy as np
import pytest
import torch
from conftest import tiny

from model import GPT, GPTConfig, sample

VARIANTS = {
    "qwen3": {},
    "qwen2": dict(qk_norm=False, qkv_bias=True, tied=False),
    "llama": dict(qk_norm=False, tied=False, n_kv_head=4, rope_theta=500.0),
    "wide-heads": dict(head_dim=10, n_kv_head=1, norm_eps=1e-2),
}


@pytest.fixture(params=VARIANTS, ids=VARIANTS)
def changes(request):
    return VARIANTS[request.param]


@pytest.fixture
def model(changes):
    return tiny(**changes)


def random_tokens(B=3, T=9, seed=1):
    return torch.randint(0, 11, (B, T), generator=torch.Generator().manual_seed(seed))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- the stream ----


def test_stream_is_the_sum_of_what_was_written_by_modules_that_read_it_normed(model):
    tokens = random_tokens()
    total = model.embed(tokens)
    for block, trace in zip(model.blocks, model.trace(tokens)):
        assert torch.equal(trace.resid_pre, total)
        assert torch.equal(trace.attn_in, block.attn_norm(total))
        total = total + trace.attn_out
        assert torch.equal(trace.resid_mid, total)
        assert torch.equal(trace.mlp_in, block.mlp_norm(total))
        total = total + trace.mlp_out
        assert torch.equal(trace.resid_post, total)  # Eq. 5, added in the same order: exact


def test_residual_and_policy_are_those_of_the_trace(model):
    tokens = random_tokens()
    stream = [model.embed(tokens)] + [trace.resid_post for trace in model.trace(tokens)]
    for layer, h in enumerate(stream):
        torch.testing.assert_close(model.residual(tokens, layer), h)
        torch.testing.assert_close(model.residual(tokens, np.int64(layer)), h)
        if layer > 0:
            pi = model.truncated(layer)
            torch.testing.assert_close(pi(tokens), h @ model.lm_head.weight.T)
            assert len(pi.blocks) == pi.n_layer == layer and pi.embed.weight is model.embed.weight
    torch.testing.assert_close(model(tokens), model.unembed(model.final_norm(stream[-1])))
    assert not torch.allclose(model(tokens), model.unembed(stream[-1]))  # another policy


@torch.no_grad()
def test_our_block_is_qwen3():
    """GPT with the weights of a random Qwen3 of transformers: stream, writes, logits to 1e-5."""
    pytest.importorskip("trl", reason="the extra `hf` is not installed")
    from experiments import trl_peer
    from minibupo_hf.adapter import HFModel

    sizes = dict(vocab_size=16, head_dim=12, norm_eps=1e-3, rope_theta=500.0)
    qwen3, ours = trl_peer.to_qwen3(tiny(**sizes)), tiny(seed=1, **sizes)
    trl_peer.from_qwen3(ours, qwen3)
    tokens, close = random_tokens(), dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(tokens), qwen3(tokens).logits, **close)
    torch.testing.assert_close(tiny(**sizes)(tokens), ours(tokens), **close)
    for trace, theirs in zip(ours.trace(tokens), HFModel(qwen3).trace(tokens), strict=True):
        torch.testing.assert_close(tuple(trace), tuple(theirs), **close)


def test_forward_against_a_loop_over_heads_and_positions(changes):
    """One layer is computed by hand in float64, position by position."""
    model = tiny(n_layer=1, dtype=torch.float64, **changes)
    cfg, block, tokens = model.cfg, model.blocks[0], random_tokens(1, 6)
    attn, mlp, D, heads = block.attn, block.mlp, cfg.head_dim, cfg.n_head
    kv_heads = heads + cfg.n_kv_head  # where the heads of keys end and those of values begin

    def rms(x, norm):
        return norm.weight * x / (x.square().mean() + cfg.norm_eps).sqrt()

    def turned(x, t, norm):  # as complex numbers x_i + 1j x_{i+D/2}, turned by t theta^(-2i/D)
        x = rms(x, norm) if cfg.qk_norm else x
        angle = t * cfg.rope_theta ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
        z = torch.complex(x[: D // 2], x[D // 2 :])
        z = z * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((z.real, z.imag))

    h, q, k, v = model.embed.weight[tokens[0]], [], [], []
    for t in range(6):
        qkv = attn.qkv.weight @ rms(h[t], block.attn_norm)
        qkv = (qkv + attn.qkv.bias if cfg.qkv_bias else qkv).view(-1, D)
        q.append([turned(x, t, attn.q_norm) for x in qkv[:heads]])
        k.append([turned(x, t, attn.k_norm) for x in qkv[heads:kv_heads]])
        v.append(qkv[kv_heads:])
    for t in range(6):
        mixed = []
        for head in range(heads):
            kv = head * cfg.n_kv_head // heads  # neighbours share a head of keys and values
            p = torch.stack([q[t][head] @ k[u][kv] / D**0.5 for u in range(t + 1)]).softmax(0)
            mixed.append(sum(p[u] * v[u][kv] for u in range(t + 1)))
        x = h[t] + attn.out.weight @ torch.cat(mixed)
        gate, up = (mlp.gate_up.weight @ rms(x, block.mlp_norm)).chunk(2)
        x = x + mlp.down.weight @ (gate / (1 + torch.exp(-gate)) * up)
        logits = model.lm_head.weight @ rms(x, model.final_norm)
        # the model's rope table is float32, hence not 1e-12
        torch.testing.assert_close(model(tokens)[0, t], logits, rtol=1e-5, atol=1e-6)


def test_narrow_types_are_normed_and_sampled_in_float32():
    model, x = tiny(dtype=torch.bfloat16), torch.randn(999, 16, generator=seeded()).bfloat16()
    model.final_norm.weight.data.fill_(1)
    assert torch.equal(model.final_norm(x), model.final_norm.float()(x.float()).bfloat16())
    assert torch.equal(sample(x, 1.0, seeded()), sample(x.float(), 1.0, seeded()))


def test_fresh_weights_neither_favour_a_token_nor_let_depth_inflate_the_stream():
    """Logits have about unit variance; what 2L modules write adds up to the same for any L."""
    tokens, size = torch.randint(0, 500, (4, 20), generator=seeded()), {}
    for n_layer in (2, 32):
        torch.manual_seed(0)
        model = GPT(GPTConfig(500, 20, n_layer, d_model=64, tied=False))
        assert model(tokens).std().item() == pytest.approx(1, abs=0.2)
        start, end = (model.residual(tokens, layer).square().mean() for layer in (0, n_layer))
        size[n_layer] = (end - start).item()
    assert size[32] < 2 * size[2]


# ---- sampling ----


def test_greedy_rows_take_the_likeliest_tokens_until_eos_or_the_limit(model):
    """Checked by scoring whole rows, also after rows that have ended are dropped."""
    prompt, lengths = random_tokens(5, 7), [7, 3, 5, 4, 6]
    options = dict(prompt_len=lengths, num_samples=2, pad_id=10, temperature=0)
    free = model.generate(prompt, 9, **options)
    assert (free.end - free.prompt_len).eq(9).all()
    for eos in (None, *free.tokens[torch.arange(10), free.prompt_len + 1].unique().tolist()):
        if eos is not None:
            prompt[0, 4] = eos  # in a prompt it ends nothing
        out = model.generate(prompt, 9, eos_id=eos, **options)
        logits = model(out.tokens).detach()
        for i, (row, start, end) in enumerate(zip(*out)):
            assert start == lengths[i // 2] and torch.equal(row[:start], prompt[i // 2, :start])
            assert end == start + 9 or row[end - 1] == eos
            assert eos not in row[start : end - 1].tolist() and row[end:].eq(10).all()
            for t in range(start, end):
                assert logits[i, t - 1, row[t]] > logits[i, t - 1].max() - 1e-4
        assert out.tokens.shape[1] == out.end.max()


def test_cached_logits_equal_uncached(model):
    tokens, cache = random_tokens(2, 9), model._empty_cache(2, 9).fill_(math.nan)
    logits = [model._next_logits(tokens[:, :4], cache, 0)]  # what is not written is not read
    logits += [model._next_logits(tokens[:, t : t + 1], cache, t) for t in range(4, 9)]
    torch.testing.assert_close(torch.stack(logits, 1), model(tokens)[:, 3:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("layer,temperature", [(None, 1.0), (None, 0.5), (2, 0.5)])
def test_samples_follow_the_policy(layer, temperature):
    """20,000 first tokens of pi_theta, or of a layer's policy: each frequency within 5 standard
    errors (it fails by chance for less than 1 of 10,000 seeds)."""
    model, prompt = tiny(), random_tokens(1, 5)
    logits = model(prompt) if layer is None else model.unembed(model.residual(prompt, layer))
    p = (logits[0, -1] / temperature).softmax(-1).detach()
    sampled = model if layer is None else model.truncated(layer)
    options = dict(num_samples=20_000, temperature=temperature, generator=seeded())
    frequency = sampled.generate(prompt, 1, **options).tokens[:, 5].bincount(minlength=11) / 20_000
    assert ((frequency - p).abs() <= 5 * (p * (1 - p) / 20_000).sqrt() + 1e-4).all()


@pytest.mark.parametrize("noise", [0.0, -0.0])
def test_no_token_of_probability_zero_is_sampled(noise, monkeypatch):
    """Not even if Exponential(1) rounds to 0 on a device; its logarithm is -inf."""
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self, generator: self.fill_(noise))
    logits = torch.tensor([[0.0, -math.inf, 1.0]]).expand(5, 3)
    assert sample(logits, 1.0).tolist() == [2] * 5


def test_same_generator_same_samples_and_no_global_state(model):
    before = torch.get_rng_state()
    # 9 tokens and 15 just fit
    a, b, c = (model.generate(random_tokens(), 15, generator=seeded(s)).tokens for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(before, torch.get_rng_state())


def test_what_a_prompt_is_padded_with_does_not_matter():
    model, wide = tiny(), torch.full((1, 20), 99)  # no token, and too wide for 8 more
    wide[0, :2] = torch.tensor([3, 5])
    out = model.generate(wide, 8, prompt_len=[2], generator=seeded())
    plain = model.generate(wide[:, :2], 8, generator=seeded())
    assert torch.equal(out.tokens, plain.tokens) and out.tokens.shape == (1, 10)


def test_lengths_of_a_narrow_type_do_not_overflow():
    prompt, narrow = torch.ones(1, 200).long(), torch.tensor([200], dtype=torch.uint8)
    out = tiny(context_length=300).generate(prompt, 100, prompt_len=narrow)
    assert out.end.tolist() == [300] and out.tokens.shape == (1, 300)


# ---- bad input ----

TOKENS = random_tokens()
BAD_SIZES = [dict(d_model=18), dict(n_kv_head=3), dict(head_dim=5)]
COUNTS = ("vocab_size", "context_length", "n_layer", "n_head", "n_kv_head", "head_dim", "d_mlp")
BAD_SIZES += [{count: 0} for count in COUNTS] + [dict(rope_theta=t) for t in (0, math.nan)]
BAD_TOKENS = [
    TOKENS.float(),
    TOKENS + 1,
    TOKENS - 11,
    TOKENS[0],
    TOKENS[:, :0],
    torch.zeros(1, 25).long(),
]
BAD_PROMPTS = [dict(num_samples=0), dict(temperature=-1), dict(temperature=math.nan)]
BAD_PROMPTS += [dict(pad_id=11), dict(pad_id=-1), dict(eos_id=11), dict(eos_id=[4, -1])]
BAD_PROMPTS += [dict(eos_id=4.5)]
BAD_PROMPTS += [dict(prompt_len=lengths) for lengths in ([1, 2, 10], [1, 0, 2], [1, 2])]
INVALID = [
    *[lambda _, c=c: tiny(**c) for c in BAD_SIZES],
    *[lambda m, x=x: m(x) for x in BAD_TOKENS],
    *[lambda m, x=x: m.trace(x) for x in BAD_TOKENS],
    *[lambda m, l=l: m.residual(TOKENS, l) for l in (4, -1, 1.5, "1")],
    lambda m: m.truncated(0),
    *[lambda m, n=n: m.generate(TOKENS, n) for n in (0, 16)],
    *[lambda m, o=o: m.generate(TOKENS, 1, **o) for o in BAD_PROMPTS],
]


@pytest.mark.parametrize("call", INVALID)
def test_invalid_input_is_refused_in_a_sentence(call):
    with pytest.raises(ValueError, match="must be|does not divide|outside|longer than|outgrow"):
        call(tiny())
