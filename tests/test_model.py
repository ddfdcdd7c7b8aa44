"""model.py against its own definitions, written down a second time.

H^l = H^0 + sum A^i + sum F^j        logits = unembed(final_norm(H^L))        residual(l) = trace's H^l
cached = uncached                    greedy = step-by-step argmax              recorded = rescored log-probabilities
"""

import copy

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


def test_policy_is_the_normed_top_of_the_stream(model):
    tokens = random_tokens()
    top = list(model.trace(tokens))[-1].resid_post
    torch.testing.assert_close(model(tokens), model.unembed(model.final_norm(top)), rtol=0, atol=0)
    assert not torch.allclose(model(tokens), model.unembed(top))  # without the norm it is another policy


def test_truncated_equals_full(model):
    tokens = random_tokens()
    full = [model.embed(tokens)] + [trace.resid_post for trace in model.trace(tokens)]
    for layer, h in enumerate(full):
        torch.testing.assert_close(model.residual(tokens, layer), h, rtol=0, atol=0)


def test_truncated_computes_no_more_blocks(model):
    ran = []
    for i, block in enumerate(model.blocks, 1):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    model.residual(random_tokens(), 2)
    next(iter(model.trace(random_tokens())))
    assert ran == [1, 2, 1]


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
        flat = block.attn.qkv.weight @ rms(h[t], block.attn_norm.weight)
        heads = flat.view(-1, D)
        q.append([rope(rms(x, block.attn.q_norm.weight), t) for x in heads[: cfg.n_head]])
        k.append([rope(rms(x, block.attn.k_norm.weight), t) for x in heads[cfg.n_head : cfg.n_head + cfg.n_kv_head]])
        v.append(heads[cfg.n_head + cfg.n_kv_head :])
    for t in range(6):
        mixed = []
        for head in range(cfg.n_head):
            kv = head // (cfg.n_head // cfg.n_kv_head)
            p = torch.stack([q[t][head] @ k[u][kv] / D**0.5 for u in range(t + 1)]).softmax(0)
            mixed.append(sum(p[u] * v[u][kv] for u in range(t + 1)))
        x = h[t] + block.attn.out.weight @ torch.cat(mixed)
        gate, up = (block.mlp.gate_up.weight @ rms(x, block.mlp_norm.weight)).chunk(2)
        x = x + block.mlp.down.weight @ (gate / (1 + torch.exp(-gate)) * up)
        logits = model.embed.weight @ rms(x, model.final_norm.weight)
        # the model's rope table is float32, hence not 1e-12
        torch.testing.assert_close(model(tokens)[0, t], logits, rtol=1e-5, atol=1e-6)


def test_greedy_equals_step_by_step_argmax(model):
    prompt = random_tokens(4, 5)
    out = model.generate(prompt, 12, temperature=0)
    tokens = prompt
    for _ in range(12):
        tokens = torch.cat([tokens, model(tokens)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(out.tokens, tokens)


def test_cached_logits_equal_uncached(model):
    tokens = random_tokens(2, 9)
    c = model.cfg
    cache = torch.full((c.n_layer, 2, 2, c.n_kv_head, 9, c.head_dim), float("nan"))  # what is not written is not read
    logits = [model.unembed(model._states(tokens[:, :4], cache, 0, None, None)[0])]
    logits += [model.unembed(model._states(tokens[:, t : t + 1], cache, t, None, None)[0]) for t in range(4, 9)]
    torch.testing.assert_close(torch.stack(logits, 1), model(tokens)[:, 3:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("layer,site", [(0, "resid_post"), (1, "resid_post"), (2, "resid_post"), (3, "resid_post"),
                                        (2, "attn_out"), (2, "mlp_out")])  # fmt: skip
def test_recorded_logprobs_equal_rescored(model, layer, site, temperature):
    """Ragged prompts, rows that end early, several samples a prompt: what was recorded is what teacher forcing gives."""
    prompt, lengths = random_tokens(5, 7), torch.tensor([7, 3, 5, 4, 6])
    out = model.generate(prompt, 14, prompt_len=lengths, num_samples=6, temperature=temperature, eos_id=4, pad_id=9,
                         layer=layer, site=site, generator=torch.Generator().manual_seed(3))  # fmt: skip
    states = [model.embed(out.tokens)] if layer == 0 else []
    states += [getattr(trace, site) for trace in model.trace(out.tokens)]
    chosen = states[layer if site == "resid_post" and layer == 0 else (0 if layer == 0 else layer - 1)]
    for recorded, logits in ((out.logprobs, model(out.tokens)), (out.layer_logprobs, model.unembed(chosen))):
        rescored = (logits / temperature).log_softmax(-1)[:, :-1].gather(-1, out.tokens[:, 1:, None])[..., 0]
        for row in range(30):
            a, b = int(out.prompt_len[row]) - 1, int(out.end[row]) - 1
            assert a == lengths[row // 6] - 1
            torch.testing.assert_close(recorded[row, a:b], rescored[row, a:b], rtol=0, atol=2e-5)
            assert not recorded[row, :a].any() and not recorded[row, b:].any()
    assert len(set(out.end.tolist())) > 5


def test_rows_end_at_their_first_eos_or_at_the_limit(model):
    prompt, lengths = random_tokens(6, 6), torch.tensor([6, 2, 3, 6, 5, 4])
    out = model.generate(prompt, 10, prompt_len=lengths, num_samples=4, eos_id=2, pad_id=10,
                         generator=torch.Generator().manual_seed(0))  # fmt: skip
    ended = 0
    for i, row in enumerate(out.tokens):
        p, end = int(lengths[i // 4]), int(out.end[i])
        assert row[:p].tolist() == prompt[i // 4, :p].tolist()
        response = row[p:end].tolist()
        assert 2 not in response[:-1]
        assert response[-1] == 2 or len(response) == 10
        assert row[end:].eq(10).all()
        ended += response[-1] == 2
    assert 0 < ended < 24
    assert out.tokens.shape[1] == out.end.max()


def test_ragged_greedy_equals_one_by_one(model):
    prompt, lengths = random_tokens(5, 7), [7, 3, 5, 4, 6]
    out = model.generate(prompt, 9, prompt_len=lengths, temperature=0, eos_id=1)
    for i, n in enumerate(lengths):
        alone = model.generate(prompt[i : i + 1, :n], 9, temperature=0, eos_id=1)
        assert out.tokens[i, : out.end[i]].tolist() == alone.tokens[0, : alone.end[0]].tolist()


def test_same_generator_same_samples_and_no_global_state(model):
    def draw(seed):
        return model.generate(random_tokens(), 8, generator=torch.Generator().manual_seed(seed)).tokens

    before = torch.get_rng_state()
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert torch.equal(before, torch.get_rng_state())


def test_sampling_follows_the_distribution():
    """20,000 draws: each frequency within 5 standard errors (it fails by chance in less than 1 of 100,000 seeds)."""
    p = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    draws = sample(p.log().expand(20_000, 5), 1.0, torch.Generator().manual_seed(0))
    frequency = torch.bincount(draws, minlength=5) / 20_000
    assert ((frequency - p).abs() <= 5 * (p * (1 - p) / 20_000).sqrt()).all()


def test_scrambled_future_and_padding_change_nothing(model):
    tokens = random_tokens(3, 9)
    other = tokens.clone()
    other[:, 6:] = (other[:, 6:] + 1) % 11
    assert torch.equal(model(tokens)[:, :6], model(other)[:, :6])


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


@pytest.mark.parametrize("bad,says", [
    (dict(d_model=15), "n_head = 4 does not divide d_model = 15"),
    (dict(n_kv_head=3), "n_kv_head = 3 does not divide n_head = 4"),
    (dict(head_dim=5), "head_dim must be even"),
    (dict(n_layer=0), "n_layer must be at least 1, not 0"),
    (dict(d_mlp=0), "d_mlp must be at least 1, not 0"),
])  # fmt: skip
def test_impossible_configurations(bad, says):
    with pytest.raises(ValueError, match=says):
        GPTConfig(**(dict(vocab_size=11, context_length=8, d_model=16, n_head=4) | bad))


def test_bad_input_is_named():
    model, tokens = tiny(), random_tokens()
    cases = [
        (lambda: model(torch.zeros(1, 25, dtype=torch.long)), "25 tokens are longer than context_length = 24"),
        (lambda: model(tokens + 5), "token id 15 is outside the vocabulary, 0..10"),
        (lambda: model(tokens - 11), "outside the vocabulary"),
        (lambda: model.trace(tokens + 5), "outside the vocabulary"),
        (lambda: model(tokens[0]), "must have shape"),
        (lambda: model(tokens[:, :0]), "not be empty"),
        (lambda: model.residual(tokens, 4), r"layer must be in 0\.\.3, not 4"),
        (lambda: model.residual(tokens, -1), "not -1"),
        (lambda: model.generate(tokens, 16), "come to 25 tokens"),
        (lambda: model.generate(tokens, 0), "at least 1"),
        (lambda: model.generate(tokens, 1, temperature=-1), "temperature must be"),
        (lambda: model.generate(tokens, 1, temperature=float("nan")), "temperature must be"),
        (lambda: model.generate(tokens, 1, layer=4), "layer must be"),
        (lambda: model.generate(tokens, 1, layer=0, site="attn_out"), r"layer must be in 1\.\.3, not 0"),
        (lambda: model.generate(tokens, 1, layer=1, site="nowhere"), "site must be one of"),
        (lambda: model.generate(tokens, 1, prompt_len=[1, 2, 10]), "prompt_len must be"),
    ]
    for call, says in cases:
        with pytest.raises(ValueError, match=says):
            call()


class Synchronisations(TorchDispatchMode):
    """Counts what a GPU would have to be waited for: reading a number, and picking rows by a mask."""

    count = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        masked = f is torch.ops.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        self.count += masked or f in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return f(*args, **(kwargs or {}))


def test_sampling_waits_for_the_device_only_now_and_then():
    model, counts = tiny(context_length=128), []
    for new in (20, 40, 80):
        with Synchronisations() as seen:
            model.generate(torch.ones(4, 3, dtype=torch.long), new, layer=2, eos_id=None, generator=torch.Generator().manual_seed(0))
        counts.append(seen.count)
    assert counts[0] > 0  # the counter counts
    assert [b - a for a, b in zip(counts, counts[1:])] == [20 / 4, 40 / 4]  # one check in four steps
