"""A small GPT whose residual stream can be read, cut short and unembedded at any layer.

It has the architecture of the models that the paper studies (Qwen3, Qwen2.5, Llama): pre-norm
RMSNorm, rotary positions, grouped-query attention with optional QK-norm and qkv bias, and SwiGLU.
It has no dropout. This file knows nothing of reinforcement learning.

    1  sizes            GPTConfig
    2  one layer        Attention, MLP, Block, and what a layer reads and writes: LayerTrace
    3  any model        LanguageModel: the interface that the method needs, and sampling
    4  this model       GPT: the layers one after another

Layers are numbered 1..L as in the paper, and H^0 is the embedding.
Shapes: B batch, T time, d = d_model, V = vocab_size, L = n_layer, D = head_dim.
"""

import copy
import operator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn

# ---- 1. Sizes ----------------------------------------------------------------------------------


@dataclass
class GPTConfig:
    """Sizes and switches of a GPT. Raises ValueError for sizes that do not fit together."""

    vocab_size: int
    context_length: int
    n_layer: int = 6
    d_model: int = 64
    n_head: int = 4
    n_kv_head: int | None = None  # heads of keys and values, shared by query heads; None: n_head
    head_dim: int | None = None  # None: d_model / n_head
    d_mlp: int | None = None  # hidden width of SwiGLU; None: 3 d_model
    qk_norm: bool = True  # RMSNorm on each head's queries and keys, as in Qwen3
    qkv_bias: bool = False  # True in Qwen2.5
    tied: bool = True  # the unembedding matrix E_u is the token embedding
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6

    def __post_init__(self):
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        if self.d_mlp is None:
            self.d_mlp = 3 * self.d_model
        sizes = "vocab_size context_length n_layer d_model n_head n_kv_head d_mlp rope_theta"
        for name in sizes.split():
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

        if self.head_dim is None:
            if self.d_model % self.n_head:
                raise ValueError(f"n_head = {self.n_head} does not divide d_model = {self.d_model}")
            self.head_dim = self.d_model // self.n_head
        if self.head_dim < 2 or self.head_dim % 2:
            default = f"d_model / n_head, here {self.d_model} / {self.n_head}"
            raise ValueError(
                f"head_dim (by default {default}) must be even for rotary positions, "
                f"not {self.head_dim}"
            )
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_kv_head = {self.n_kv_head} does not divide n_head = {self.n_head}")


# ---- 2. One layer ------------------------------------------------------------------------------


class LayerTrace(NamedTuple):
    """Everything that layer l reads and writes, each (B, T, d); Eq. 1 says how they are related.

    attn_in and mlp_in are what the modules really read, the *normed* stream. (TransformerLens uses
    these two names for the stream before the norm.)
    """

    resid_pre: torch.Tensor  # the stream that enters the layer, H^{l-1}
    attn_in: torch.Tensor  # attn_norm(resid_pre), what attention reads
    attn_out: torch.Tensor  # A^l, what attention writes
    resid_mid: torch.Tensor  # resid_pre + attn_out
    mlp_in: torch.Tensor  # mlp_norm(resid_mid), what the FFN reads
    mlp_out: torch.Tensor  # F^l, what the FFN writes
    resid_post: torch.Tensor  # resid_mid + mlp_out, the layer's output H^l


def rope_table(cfg: GPTConfig):
    """cos and sin (context_length, 1, D) of position * theta^(-2i/D), i = 0..D/2-1, twice over."""
    precise = {"dtype": torch.float64, "device": "cpu"}  # some devices have no float64
    i = torch.arange(0, cfg.head_dim, 2, **precise)
    position = torch.arange(cfg.context_length, **precise)
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
        """Attend from x (B, T, d), at positions start..start+T-1, to them and what stands before.

        `cache` (2, B, n_kv_head, T_max, D) holds the keys and values of earlier positions; those of
        x are stored in it. With start > 0, T must be 1.
        """
        B, T, _ = x.shape
        q, k, v = self.qkv(x).view(B, T, -1, self.head_dim).split(self.heads, dim=2)
        q = rotate(self.q_norm(q), *rope).transpose(1, 2)  # (B, heads, T, D), as are k and v
        k = rotate(self.k_norm(k), *rope).transpose(1, 2)
        v = v.transpose(1, 2)

        if cache is not None:
            cache[0, :, :, start : start + T] = k
            cache[1, :, :, start : start + T] = v
            k, v = cache[:, :, :, : start + T]

        grouped = self.heads[0] != self.heads[1]
        y = nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=start == 0, enable_gqa=grouped
        )
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
        # nn.RMSNorm: x / sqrt(mean(x^2) + eps) * weight, computed in at least float32
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


# ---- 3. Any model: the interface, and sampling -------------------------------------------------


class Generation(NamedTuple):
    """Sampled sequences. The num_samples rows of one prompt are neighbours; there are N rows."""

    tokens: torch.Tensor  # (N, T) prompt, response, then pad_id
    prompt_len: torch.Tensor  # (N,) tokens of the prompt
    end: torch.Tensor  # (N,) one past the response's last token; EOS is part of the response


class LanguageModel(nn.Module):
    """A model whose residual stream is exposed: the base class of GPT and minibupo_hf's HFModel.

    A subclass sets the attributes n_layer, vocab_size, context_length, embed, final_norm and
    lm_head (whose weight (V, d) is E_u). It defines five methods:

        residual(tokens, layer)    H^layer (B, T, d), from the first `layer` blocks; layer 0 is the
                                   embedding. Raises ValueError for an invalid layer or tokens
        trace(tokens)              yields the LayerTrace of layers 1..L, lazily: a layer that is not
                                   asked for is not computed
        truncated(layer)           the internal policy of a layer as a model of its own
        _empty_cache(B, T)         room for the keys and values of B rows of T tokens. It is one
                                   object; its index_select(2, rows) keeps only these rows
        _next_logits(tokens, cache, start)    logits (B, V) after the last of tokens (B, T), which
                                   stand at positions start..start+T-1
    """

    @property
    def device(self):
        """The device of the weights."""
        return self.embed.weight.device

    def forward(self, tokens):
        """Logits (B, T, V) of pi_theta for tokens (B, T): unembed(final_norm(H^L))."""
        return self.unembed(self.final_norm(self.residual(tokens, self.n_layer)))

    def unembed(self, h):
        """Logits h E_u^T (..., V) of vectors h (..., d) of the stream, *without* the final norm."""
        return self.lm_head(h)

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
        """Sample num_samples responses to each prompt, which end in eos_id or at max_new_tokens.

        prompt (Q, P) holds token ids, padded on the right if prompt_len (Q,) says that a row is
        shorter. Temperature 0 is greedy. eos_id is one id, or several, any of which ends a
        response. A model with dropout should be in eval(). Raises ValueError for invalid options,
        and for a sequence that would be longer than the context.

        All rows advance together, one position at a time. While a row is still inside its prompt,
        its own prompt tokens are fed. So every row has its true positions, and nothing is masked.
        """
        eos_ids = torch.as_tensor([] if eos_id is None else eos_id, device="cpu").flatten().tolist()
        self._check_sampling(max_new_tokens, num_samples, temperature, [pad_id, *eos_ids])
        prompt, prompt_len = self._trim_prompt(prompt, prompt_len, max_new_tokens, pad_id)
        device = prompt.device
        start = int(prompt_len.min())
        total = prompt.shape[1] + max_new_tokens
        prompt_len = prompt_len.repeat_interleave(num_samples)  # (N,)
        end = prompt_len + max_new_tokens  # (N,) until a row meets its EOS
        N = len(prompt_len)
        eos_ids = torch.tensor(eos_ids, dtype=torch.long, device=device)
        tokens = torch.full((N, total), pad_id, dtype=torch.long, device=device)
        tokens[:, : prompt.shape[1]] = prompt.repeat_interleave(num_samples, dim=0)

        # Prefill: each prompt is read once, up to where the shortest ends, for all its samples.
        cache = self._empty_cache(len(prompt), total)
        logits = self._next_logits(prompt[:, :start], cache, 0)
        logits = logits.repeat_interleave(num_samples, dim=0)
        rows = torch.arange(N, device=device)
        cache = cache.index_select(2, rows // num_samples)

        # Decode. `rows` are the rows still running; `token`, `logits` and `cache` hold only them.
        for t in range(start, total):  # choose the token at position t
            token = sample(logits, temperature, generator)
            # the other rows are still inside their prompt, or have ended
            responds = (t >= prompt_len[rows]) & (t < end[rows])
            token = torch.where(responds, token, tokens[rows, t])
            tokens[rows, t] = token
            ended = responds & torch.isin(token, eos_ids)
            end[rows] = torch.where(ended, t + 1, end[rows])
            if t + 1 == total:
                break

            if t % 4 == 0:  # only now and then, because it makes the CPU wait for a GPU
                keep = (end[rows] > t + 1).nonzero()[:, 0]
                if len(keep) == 0:
                    break
                if len(keep) <= 0.75 * len(rows):  # drop the rows that have ended
                    rows = rows[keep]
                    token = token[keep]
                    cache = cache.index_select(2, keep)  # twice as fast as cache[:, :, keep]
            logits = self._next_logits(token[:, None], cache, t)
        return Generation(tokens[:, : int(end.max())], prompt_len, end)

    # ---- checks of what a user passes ----

    def _check_layer(self, layer: int, lowest=0) -> int:
        """Return the layer as an int. Raises ValueError unless it is an integer in lowest..L."""
        number = operator.index(layer) if hasattr(layer, "__index__") else -1
        if not lowest <= number <= self.n_layer:
            allowed = f"{lowest}..{self.n_layer}" + (" (0: embedding)" if lowest == 0 else "")
            raise ValueError(f"layer must be in {allowed}, not {layer}")
        return number

    def _check_tokens(self, tokens):
        """Raise ValueError unless tokens is (B, T) with 1 <= T <= context_length, ids in 0..V-1."""
        if tokens.dim() != 2 or tokens.numel() == 0:
            raise ValueError(f"tokens must be (batch, time), not empty, not {tuple(tokens.shape)}")
        if tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"tokens must be of type torch.int64, not {tokens.dtype}")
        T = tokens.shape[1]
        if T > self.context_length:
            raise ValueError(f"{T} tokens are longer than context_length = {self.context_length}")
        low, high = torch.stack(tokens.aminmax()).tolist()
        if low < 0 or high >= self.vocab_size:
            invalid = low if low < 0 else high
            allowed = f"0..{self.vocab_size - 1}"
            raise ValueError(f"token id {invalid} is outside the vocabulary, {allowed}")

    def _check_sampling(self, max_new_tokens: int, num_samples: int, temperature: float, ids):
        """Raise ValueError for invalid options of `generate`."""
        for name, value in (("max_new_tokens", max_new_tokens), ("num_samples", num_samples)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if not temperature >= 0:
            raise ValueError(f"temperature must be 0 (greedy) or more, not {temperature}")
        for token in ids:
            if token not in range(self.vocab_size):
                allowed = f"0..{self.vocab_size - 1}"
                raise ValueError(f"pad_id or eos_id {token} is outside the vocabulary, {allowed}")

    def _trim_prompt(self, prompt, prompt_len, max_new_tokens: int, pad_id: int):
        """Return the prompts as wide as the longest, padded with pad_id, and all lengths (Q,).

        Raises ValueError for invalid tokens or lengths, and if there is no room for a response."""
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
        if P + max_new_tokens > self.context_length:
            size = f"context_length = {self.context_length}"
            raise ValueError(f"a prompt of {P} and {max_new_tokens} new tokens outgrow {size}")
        if prompt_len is None:  # no padding
            prompt_len = torch.full((Q,), P, device=prompt.device)
        return prompt, prompt_len.long()


def sample(logits, temperature: float, generator=None):
    """One token (N,) for each row of logits (N, V): the likeliest at temperature 0, else a draw.

    The draw is the Gumbel-max trick: argmax of logits / temperature - log(Exponential(1)) is
    distributed as their softmax, and needs no synchronisation with a GPU.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = at_least_float32(logits)
    noise = torch.empty_like(logits).exponential_(generator=generator)
    # a device may round to 0, whose log would let a token of probability 0 win
    noise = noise.clamp(min=torch.finfo(noise.dtype).tiny)
    return (logits / temperature - noise.log()).argmax(-1)


def at_least_float32(x):
    """x itself, or in float32 if its type is narrower: bfloat16 is too coarse for a softmax."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- 4. This model -----------------------------------------------------------------------------


class GPT(LanguageModel):
    """A decoder-only transformer that exposes its residual stream.

    Its weights are drawn from torch's global generator.
    """

    def __init__(self, cfg: GPTConfig):
        super().__init__()
        self.cfg = cfg
        self.n_layer = cfg.n_layer
        self.vocab_size = cfg.vocab_size
        self.context_length = cfg.context_length

        self.embed = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.final_norm = nn.RMSNorm(cfg.d_model, cfg.norm_eps)
        self.lm_head = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)
        self._draw_weights()
        if cfg.tied:
            self.lm_head.weight = self.embed.weight
        cos, sin = rope_table(cfg)
        # in the type and on the device of the weights, which the user's defaults decide
        self.register_buffer("cos", cos.to(self.embed.weight), persistent=False)
        self.register_buffer("sin", sin.to(self.embed.weight), persistent=False)

    def residual(self, tokens, layer: int):
        """H^layer (B, T, d) for tokens (B, T), from the first `layer` blocks; layer 0: embedding.

        Raises ValueError for an invalid layer or tokens, as trace and truncated do.
        """
        self._check_tokens(tokens)
        h = self.embed(tokens)
        for trace in self._run(h, self._check_layer(layer)):
            h = trace.resid_post
        return h

    def trace(self, tokens):
        """Yield the LayerTrace of layers 1..L, lazily: a layer not asked for is not computed."""
        self._check_tokens(tokens)
        return self._run(self.embed(tokens), self.n_layer)

    def truncated(self, layer: int) -> "GPT":
        """A GPT with these weights (no copy) whose own policy is softmax(H^layer E_u^T).

        It lacks the blocks above and the final norm, so that an internal policy can be sampled like
        any other model.
        """
        layer = self._check_layer(layer, lowest=1)
        short = copy.copy(self)
        # nn.Module keeps its parts in this dict, which copy.copy shares between the two
        short._modules = self._modules.copy()
        short.cfg = replace(self.cfg, n_layer=layer)
        short.n_layer = layer
        short.blocks = self.blocks[:layer]
        short.final_norm = nn.Identity()
        return short

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
        """Logits (B, V) after the last of tokens (B, T), which stand at start..start+T-1."""
        h = self.embed(tokens)
        for trace in self._run(h, self.n_layer, cache, start):
            h = trace.resid_post
        return self.unembed(self.final_norm(h[:, -1]))

    def _draw_weights(self):
        """Matrices get std d^-1/2, those that write to the stream less; biases get 0."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                # 2 L modules write to the stream: without this scale depth would inflate it
                writes = name.endswith(("out.weight", "down.weight"))
                scale = (2 * self.n_layer) ** -0.5 if writes else 1.0
                nn.init.normal_(parameter, std=scale * self.cfg.d_model**-0.5)
