"""A small GPT whose residual stream can be read, cut short and unembedded at any layer.

It has the architecture of the models that the paper studies (Qwen3, Qwen2.5, Llama): pre-norm
RMSNorm, rotary positions, grouped-query attention with optional QK-norm and qkv bias, SwiGLU, no
dropout. This file knows nothing of reinforcement learning. What a method built on internal policies
needs of a model stands in minibupo.py's docstring; here it is `GPT`.

Layers are numbered 1..L as in the paper; H^0 is the embedding.
Shapes: B batch, T time, d = d_model, V = vocab_size, L = n_layer, D = head_dim.
"""

import copy
import operator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn


@dataclass
class GPTConfig:
    """Sizes and switches of a GPT. Raises ValueError for sizes that do not fit together."""

    vocab_size: int
    context_length: int
    n_layer: int = 6
    d_model: int = 64
    n_head: int = 4
    n_kv_head: int | None = None  # of keys and values, each shared by query heads; None: n_head
    head_dim: int | None = None  # None: d_model / n_head
    d_mlp: int | None = None  # hidden width of SwiGLU; None: 3 d_model
    qk_norm: bool = True  # RMSNorm on each head's queries and keys, as in Qwen3
    qkv_bias: bool = False  # as in Qwen2.5
    tied: bool = True  # E_u is the token embedding
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6

    def __post_init__(self):
        self.n_kv_head = self.n_head if self.n_kv_head is None else self.n_kv_head
        self.d_mlp = 3 * self.d_model if self.d_mlp is None else self.d_mlp
        for name in "vocab_size context_length n_layer d_model n_head n_kv_head d_mlp".split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.head_dim is None:
            if self.d_model % self.n_head:
                raise ValueError(f"n_head = {self.n_head} does not divide d_model = {self.d_model}")
            self.head_dim = self.d_model // self.n_head
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_kv_head = {self.n_kv_head} does not divide n_head = {self.n_head}")
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, not {self.head_dim}")


class LayerTrace(NamedTuple):
    """All that layer l reads and writes, each (B, T, d); Eq. 1 is how they hang together."""

    resid_pre: torch.Tensor  # the stream that enters the layer, H^{l-1}
    attn_in: torch.Tensor  # LN(resid_pre), what attention reads
    attn_out: torch.Tensor  # A^l, what attention writes
    resid_mid: torch.Tensor  # resid_pre + attn_out
    mlp_in: torch.Tensor  # LN(resid_mid), what the FFN reads
    mlp_out: torch.Tensor  # F^l, what the FFN writes
    resid_post: torch.Tensor  # resid_mid + mlp_out, the layer's output H^l


class Generation(NamedTuple):
    """Sampled sequences; the num_samples rows of a prompt are neighbours, N rows in all."""

    tokens: torch.Tensor  # (N, T) prompt, response, then pad_id
    prompt_len: torch.Tensor  # (N,) tokens of the prompt
    end: torch.Tensor  # (N,) one past the response's last token; EOS is part of the response


def rope_table(cfg: GPTConfig):
    """cos and sin (context_length, 1, D) of position * theta^(-2i/D), i = 0..D/2-1, twice over."""
    i = torch.arange(0, cfg.head_dim, 2, dtype=torch.float64)
    position = torch.arange(cfg.context_length, dtype=torch.float64)
    angle = position[:, None] * cfg.rope_theta ** (-i / cfg.head_dim)  # (context_length, D/2)
    angle = torch.cat((angle, angle), dim=-1)[:, None]
    return angle.cos().float(), angle.sin().float()


def rotate(x, cos, sin):
    """Turn each pair (x_i, x_{i+D/2}) of a head by its position's angle: x (B, T, heads, D)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Causal self-attention with grouped key and value heads."""

    def __init__(self, cfg: GPTConfig):
        super().__init__()
        self.heads = (cfg.n_head, cfg.n_kv_head, cfg.n_kv_head)  # of q, k, v
        self.head_dim = cfg.head_dim
        self.qkv = nn.Linear(cfg.d_model, sum(self.heads) * cfg.head_dim, bias=cfg.qkv_bias)
        self.q_norm = nn.RMSNorm(cfg.head_dim, cfg.norm_eps) if cfg.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(cfg.head_dim, cfg.norm_eps) if cfg.qk_norm else nn.Identity()
        self.out = nn.Linear(cfg.n_head * cfg.head_dim, cfg.d_model, bias=False)

    def forward(self, x, rope, cache=None, start=0):
        """x (B, T, d) at positions start..start+T-1. `cache` (2, B, n_kv_head, T_max, D) holds the
        keys and values of the positions before and takes theirs; with start > 0, T must be 1."""
        B, T, _ = x.shape
        q, k, v = self.qkv(x).view(B, T, -1, self.head_dim).split(self.heads, dim=2)
        q, k = rotate(self.q_norm(q), *rope), rotate(self.k_norm(k), *rope)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, D)
        if cache is not None:
            cache[0, :, :, start : start + T] = k
            cache[1, :, :, start : start + T] = v
            k, v = cache[:, :, :, : start + T]
        options = {"is_causal": start == 0, "enable_gqa": self.heads[0] != self.heads[1]}
        y = nn.functional.scaled_dot_product_attention(q, k, v, **options)  # (B, n_head, T, D)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), with gate and up in one matrix."""

    def __init__(self, cfg: GPTConfig):
        super().__init__()
        self.gate_up = nn.Linear(cfg.d_model, 2 * cfg.d_mlp, bias=False)
        self.down = nn.Linear(cfg.d_mlp, cfg.d_model, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(nn.functional.silu(gate) * up)


class Block(nn.Module):
    """One layer. Attention and FFN each read a normed copy of the stream and add to the stream."""

    def __init__(self, cfg: GPTConfig):
        super().__init__()
        # nn.RMSNorm: x / sqrt(mean(x^2) + eps) * weight, in float32 or wider inside
        self.attn_norm = nn.RMSNorm(cfg.d_model, cfg.norm_eps)
        self.attn = Attention(cfg)
        self.mlp_norm = nn.RMSNorm(cfg.d_model, cfg.norm_eps)
        self.mlp = MLP(cfg)

    def forward(self, resid_pre, rope, cache=None, start=0) -> LayerTrace:
        attn_in = self.attn_norm(resid_pre)
        attn_out = self.attn(attn_in, rope, cache, start)
        resid_mid = resid_pre + attn_out  # Eq. 1
        mlp_in = self.mlp_norm(resid_mid)
        mlp_out = self.mlp(mlp_in)
        resid_post = resid_mid + mlp_out
        return LayerTrace(resid_pre, attn_in, attn_out, resid_mid, mlp_in, mlp_out, resid_post)


class GPT(nn.Module):
    """A decoder-only transformer that exposes its residual stream.

    Weights are drawn from torch's global generator.
    """

    def __init__(self, cfg: GPTConfig):
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.final_norm = nn.RMSNorm(cfg.d_model, cfg.norm_eps)
        # its weight is E_u (V, d)
        self.lm_head = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                # the two matrices that write to the stream start smaller, or depth would inflate it
                writes = name.endswith(("out.weight", "down.weight"))
                scale = (2 * cfg.n_layer) ** -0.5 if writes else 1.0
                nn.init.normal_(parameter, std=scale * cfg.d_model**-0.5)
        if cfg.tied:
            self.lm_head.weight = self.embed.weight
        cos, sin = rope_table(cfg)
        self.register_buffer("cos", cos, persistent=False)  # (context_length, 1, D)
        self.register_buffer("sin", sin, persistent=False)

    # ---- what minibupo.py and analyze.py use ----

    n_layer = property(lambda self: self.cfg.n_layer, doc="L, the number of layers.")
    vocab_size = property(lambda self: self.cfg.vocab_size, doc="V, the size of the vocabulary.")
    device = property(lambda self: self.embed.weight.device, doc="Where the weights are.")

    def forward(self, tokens):
        """Logits (B, T, V) of pi_theta for tokens (B, T): unembed(final_norm(H^L))."""
        return self.unembed(self.final_norm(self.residual(tokens, self.n_layer)))

    def residual(self, tokens, layer: int):
        """H^layer (B, T, d) for tokens (B, T), from the first `layer` blocks; layer 0: embedding.

        Raises ValueError for a layer or tokens that cannot be; so do trace and truncated."""
        self._check_tokens(tokens)
        h = self.embed(tokens)
        for trace in self._run(h, self._check_layer(layer)):
            h = trace.resid_post
        return h

    def trace(self, tokens):
        """Yield the LayerTrace of layers 1..L, lazily: what is not asked for is not computed."""
        self._check_tokens(tokens)
        return self._run(self.embed(tokens), self.n_layer)

    def unembed(self, h):
        """Logits h E_u^T (..., V) of vectors h (..., d) of the stream, *without* the final norm."""
        return self.lm_head(h)

    def truncated(self, layer: int) -> "GPT":
        """A GPT with these weights (no copy) whose own policy is softmax(H^layer E_u^T).

        The blocks above and the final norm are gone. So an internal policy can be sampled like any
        other model."""
        layer = self._check_layer(layer, lowest=1)
        short = copy.copy(self)
        short.cfg = copy.copy(self.cfg)
        short.cfg.n_layer = layer
        parts = {"blocks": self.blocks[:layer], "final_norm": nn.Identity()}
        short._modules = {**self._modules, **parts}
        return short

    @torch.no_grad()
    def generate(
        self,
        prompt,
        max_new_tokens: int,
        *,
        prompt_len=None,
        num_samples=1,
        temperature=1.0,
        eos_id=None,
        pad_id=0,
        generator=None,
    ) -> Generation:
        """Continue each prompt `num_samples` times, with a KV cache, to `eos_id` or max_new_tokens.

        prompt (Q, P) token ids, padded on the right where prompt_len (Q,) says that a row is
        shorter. temperature 0 is greedy. Rows run in step, and a row whose prompt is longer is fed
        its own tokens until that ends. So every row has its true positions and nothing needs to be
        masked. Raises ValueError for a sequence that outgrows the context, or other bad input.
        """
        self._check_sampling(max_new_tokens, num_samples, temperature, pad_id)
        prompt, prompt_len = self._check_prompt(prompt, prompt_len, max_new_tokens, pad_id)
        device, start = prompt.device, int(prompt_len.min())
        total = prompt.shape[1] + max_new_tokens
        prompt_len = prompt_len.repeat_interleave(num_samples)  # (N,)
        N, end = len(prompt_len), prompt_len + max_new_tokens
        tokens = torch.full((N, total), pad_id, dtype=torch.long, device=device)
        tokens[:, : prompt.shape[1]] = prompt.repeat_interleave(num_samples, dim=0)

        # Prefill each prompt once, up to where the shortest ends. Its cache serves all its samples.
        cache = self._empty_cache(len(prompt), total)
        logits = self._next_logits(prompt[:, :start], cache, 0)
        logits = logits.repeat_interleave(num_samples, dim=0)
        rows = torch.arange(N, device=device)  # the rows that still run
        cache = cache.index_select(2, rows // num_samples)

        for t in range(start, total):  # choose token t
            token = sample(logits, temperature, generator)
            # other rows are still in their prompt, or have ended
            responds = (t >= prompt_len[rows]) & (t < end[rows])
            token = torch.where(responds, token, tokens[rows, t])
            tokens[rows, t] = token
            if eos_id is not None:
                end[rows] = torch.where(responds & (token == eos_id), t + 1, end[rows])
            if t + 1 == total:
                break
            if t % 4 == 0:  # now and then, since the host waits for a GPU: drop rows that ended
                keep = (end[rows] > t + 1).nonzero()[:, 0]
                if len(keep) == 0:
                    break
                if len(keep) <= 0.75 * len(rows):
                    rows, token = rows[keep], token[keep]
                    cache = cache.index_select(2, keep)  # twice as fast as cache[:, :, keep]
            logits = self._next_logits(token[:, None], cache, t)
        return Generation(tokens[:, : int(end.max())], prompt_len, end)

    # ---- inside ----

    def _run(self, h, n_layer: int, cache=None, start=0):
        """Yield the LayerTrace of blocks 1..n_layer over h (B, T, d), from position `start` on."""
        rope = self.cos[start : start + h.shape[1]], self.sin[start : start + h.shape[1]]
        for i, block in enumerate(self.blocks[:n_layer]):
            trace = block(h, rope, None if cache is None else cache[i], start)
            yield trace
            h = trace.resid_post

    def _empty_cache(self, B: int, T: int):
        """Room for the keys and values of all layers, (L, 2, B, n_kv_head, T, D)."""
        shape = (self.n_layer, 2, B, self.cfg.n_kv_head, T, self.cfg.head_dim)
        return torch.empty(shape, device=self.device, dtype=self.embed.weight.dtype)

    def _next_logits(self, tokens, cache, start: int):
        """Logits (B, V) after the last of tokens (B, T), which are at positions from start on."""
        h = self.embed(tokens)
        for trace in self._run(h, self.n_layer, cache, start):
            h = trace.resid_post
        return self.unembed(self.final_norm(h[:, -1]))

    def _check_layer(self, layer: int, lowest=0) -> int:
        """The layer as an int. Raises ValueError unless it is a whole number in lowest..L."""
        number = operator.index(layer) if hasattr(layer, "__index__") else -1
        if not lowest <= number <= self.n_layer:
            allowed = f"{lowest}..{self.n_layer}"
            raise ValueError(f"layer must be in {allowed}, not {layer} (0: embedding)")
        return number

    def _check_tokens(self, tokens):
        """Raise ValueError unless tokens is (B, T) with 1 <= T <= context_length, ids in 0..V-1."""
        if tokens.dim() != 2 or tokens.numel() == 0:
            raise ValueError(f"tokens must be (batch, time), not empty, not {tuple(tokens.shape)}")
        T, longest = tokens.shape[1], self.cfg.context_length
        if T > longest:
            raise ValueError(f"{T} tokens are longer than context_length = {longest}")
        low, high = torch.stack(tokens.aminmax()).tolist()
        if low < 0 or high >= self.vocab_size:
            bad = low if low < 0 else high
            raise ValueError(f"token id {bad} is outside the vocabulary, 0..{self.vocab_size - 1}")

    def _check_sampling(self, max_new_tokens: int, num_samples: int, temperature: float, pad_id):
        """Raise ValueError for options of `generate` that cannot be."""
        for name, value in (("max_new_tokens", max_new_tokens), ("num_samples", num_samples)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if not temperature >= 0:
            raise ValueError(f"temperature must be 0 (greedy) or more, not {temperature}")
        if not 0 <= pad_id < self.vocab_size:
            raise ValueError(f"pad_id {pad_id} is outside the vocabulary, 0..{self.vocab_size - 1}")

    def _check_prompt(self, prompt, prompt_len, max_new_tokens: int, pad_id: int):
        """The prompt, as wide as its longest row and padded with pad_id, and all lengths (Q,)."""
        if prompt.dim() == 2 and prompt_len is not None:
            Q, P = prompt.shape
            prompt_len = torch.as_tensor(prompt_len, device=prompt.device)
            lengths = prompt_len.tolist()
            if prompt_len.shape != (Q,) or min(lengths) < 1 or max(lengths) > P:
                raise ValueError(f"prompt_len must be {Q} lengths in 1..{P}, not {lengths}")
            prompt = prompt[:, : max(lengths)]
            padding = torch.arange(max(lengths), device=prompt.device) >= prompt_len[:, None]
            prompt = prompt.masked_fill(padding, pad_id)
        self._check_tokens(prompt)
        Q, P = prompt.shape
        if P + max_new_tokens > self.cfg.context_length:
            size = f"context_length = {self.cfg.context_length}"
            raise ValueError(f"a prompt of {P} and {max_new_tokens} new tokens outgrow {size}")
        everywhere = torch.full((Q,), P, device=prompt.device)  # no padding
        return prompt, everywhere if prompt_len is None else prompt_len


def sample(logits, temperature: float, generator=None):
    """One token (N,) for each row of logits (N, V): the likeliest at temperature 0, else a draw.

    The draw is the Gumbel-max trick: argmax of logits / temperature - log(Exponential(1)) is
    distributed as their softmax, and a GPU need not be waited for."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    noise = torch.empty_like(logits).exponential_(generator=generator)
    # a device may round to 0, whose log would let a token of probability 0 win
    noise = noise.clamp(min=torch.finfo(noise.dtype).tiny)
    return (logits / temperature - noise.log()).argmax(-1)
