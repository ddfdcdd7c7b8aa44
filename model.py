"""A small GPT whose residual stream can be read, cut short and unembedded at any layer.

The architecture is the one of the models the paper studies (Qwen3, Qwen2.5, Llama): pre-norm RMSNorm, rotary
positions, grouped-query attention with optional QK-norm and qkv bias, SwiGLU, no dropout. This file knows nothing of
reinforcement learning. What a method built on internal policies needs of a model are four calls:

    model(tokens)                   logits of the policy, unembed(final_norm(H^L))
    model.residual(tokens, layer)   H^layer, computing `layer` blocks and no more
    model.trace(tokens)             layer by layer, all that is read from and written to the stream (LayerTrace)
    model.unembed(h)                h E_u^T, *without* the final norm

GPT.from_pretrained reads the weights of a Qwen3, Qwen2.5 or Llama checkpoint into it.
Layers are numbered 1..L as in the paper and H^0 is the embedding.
Shapes: B batch, T time, d = d_model, V = vocab_size, L = n_layer, H heads, K key/value heads, D = head_dim.
"""

import copy
import importlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

SITES = ("resid_post", "attn_out", "mlp_out")  # what can be unembedded into a policy: H^l, A^l, F^l


@dataclass
class GPTConfig:
    """Sizes and switches of a GPT. Raises ValueError for sizes that do not fit together."""

    vocab_size: int
    context_length: int
    n_layer: int = 6
    d_model: int = 64
    n_head: int = 4
    n_kv_head: int | None = None  # key/value heads, each shared by n_head / n_kv_head query heads; None: n_head
    head_dim: int | None = None  # None: d_model / n_head
    d_mlp: int | None = None  # hidden width of SwiGLU; None: 3 d_model
    qk_norm: bool = True  # RMSNorm on each head's queries and keys (Qwen3 has it; Qwen2.5 and Llama do not)
    qkv_bias: bool = False  # Qwen2.5 has it
    tied: bool = True  # E_u is the token embedding
    rope_theta: float = 10_000.0
    rope_divisors: tuple | None = None  # what each of the D/2 rotary frequencies is divided by (Llama 3); None: by 1
    norm_eps: float = 1e-6

    def __post_init__(self):
        self.n_kv_head = self.n_head if self.n_kv_head is None else self.n_kv_head
        for name in ("vocab_size", "context_length", "n_layer", "d_model", "n_head", "n_kv_head"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.head_dim is None:
            if self.d_model % self.n_head:
                raise ValueError(f"n_head = {self.n_head} does not divide d_model = {self.d_model}; set head_dim")
            self.head_dim = self.d_model // self.n_head
        self.d_mlp = 3 * self.d_model if self.d_mlp is None else self.d_mlp
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_kv_head = {self.n_kv_head} does not divide n_head = {self.n_head}")
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, not {self.head_dim}")
        if self.d_mlp < 1:
            raise ValueError(f"d_mlp must be at least 1, not {self.d_mlp}")
        if self.rope_divisors is not None and len(self.rope_divisors) != self.head_dim // 2:
            raise ValueError(f"rope_divisors must be head_dim / 2 = {self.head_dim // 2} numbers, not {len(self.rope_divisors)}")


class LayerTrace(NamedTuple):
    """All that layer l reads and writes, each (B, T, d). Eq. 1: resid_mid = resid_pre + attn_out, resid_post = resid_mid + mlp_out."""

    resid_pre: torch.Tensor  # H^(2l-2), the stream entering the layer; H^0 (the embedding) at l = 1
    attn_in: torch.Tensor  # LN(H^(2l-2)), what attention reads
    attn_out: torch.Tensor  # A^l, what attention adds
    resid_mid: torch.Tensor  # H^(2l-1)
    mlp_in: torch.Tensor  # LN(H^(2l-1)), what the FFN reads
    mlp_out: torch.Tensor  # F^l, what the FFN adds
    resid_post: torch.Tensor  # H^(2l) = H^l, the layer's output


class Generation(NamedTuple):
    """Sampled sequences; N = prompts x num_samples rows, the samples of one prompt next to each other."""

    tokens: torch.Tensor  # (N, T) prompt, response, then pad_id
    prompt_len: torch.Tensor  # (N,) tokens of the prompt
    end: torch.Tensor  # (N,) one past the last token of the response; an EOS token is part of it
    logprobs: torch.Tensor  # (N, T-1) entry t: log pi_theta(tokens[t+1] | tokens[:t+1]); 0 outside the response
    layer_logprobs: torch.Tensor | None  # the same under the internal policy that was asked for


def at_least_float32(x):
    """x itself, or in float32 if its type is narrower."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32 or better."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        wide = at_least_float32(x)
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def rotate(x, cos, sin):
    """Rotary positions: turn each pair (x_i, x_{i+D/2}) of a head by its position's angle. x (B, T, heads, D)."""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads."""

    def __init__(self, cfg: GPTConfig):
        super().__init__()
        self.heads = (cfg.n_head, cfg.n_kv_head, cfg.n_kv_head)
        self.head_dim = cfg.head_dim
        self.qkv = nn.Linear(cfg.d_model, sum(self.heads) * cfg.head_dim, bias=cfg.qkv_bias)
        self.q_norm = RMSNorm(cfg.head_dim, cfg.norm_eps) if cfg.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(cfg.head_dim, cfg.norm_eps) if cfg.qk_norm else nn.Identity()
        self.out = nn.Linear(cfg.n_head * cfg.head_dim, cfg.d_model, bias=False)

    def forward(self, x, rope, cache=None, start=0):
        """x (B, T, d) at positions start..start+T-1. `cache` (2, B, K, T_max, D) holds the keys and values before
        them and takes theirs; a call that starts behind the cache's beginning is for one position."""
        B, T, _ = x.shape
        q, k, v = self.qkv(x).view(B, T, -1, self.head_dim).split(self.heads, dim=2)  # each (B, T, heads, D)
        q, k = rotate(self.q_norm(q), *rope), rotate(self.k_norm(k), *rope)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # each (B, heads, T, D)
        if cache is not None:
            cache[0, :, :, start : start + T] = k
            cache[1, :, :, start : start + T] = v
            k, v = cache[:, :, :, : start + T]
        gqa = self.heads[0] != self.heads[1]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=start == 0, enable_gqa=gqa)  # (B, H, T, D)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), gate and up in one matrix."""

    def __init__(self, cfg: GPTConfig):
        super().__init__()
        self.gate_up = nn.Linear(cfg.d_model, 2 * cfg.d_mlp, bias=False)
        self.down = nn.Linear(cfg.d_mlp, cfg.d_model, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """One layer. Both modules read a normed copy of the residual stream and add to the stream itself."""

    def __init__(self, cfg: GPTConfig):
        super().__init__()
        self.attn_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.attn = Attention(cfg)
        self.mlp_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
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
    """A decoder-only transformer that exposes its residual stream. Weights are drawn from torch's global generator."""

    def __init__(self, cfg: GPTConfig):
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.final_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.lm_head = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)  # its weight is E_u (V, d)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                # the two matrices of a layer that write to the stream start smaller, or depth would inflate it
                depth = (2 * cfg.n_layer) ** -0.5 if name.endswith(("out.weight", "down.weight")) else 1.0
                nn.init.normal_(parameter, std=cfg.d_model**-0.5 * depth)
        if cfg.tied:
            self.lm_head.weight = self.embed.weight
        cos, sin = rope_table(cfg)
        self.register_buffer("cos", cos, persistent=False)  # (context_length, 1, D)
        self.register_buffer("sin", sin, persistent=False)

    @classmethod
    @torch.no_grad()
    def from_pretrained(cls, source, *, dtype=torch.float32, device="cpu", context_length=None) -> "GPT":
        """A checkpoint of the Qwen3, Qwen2 (2.5) or Llama architecture (SmolLM2 has it too) as a GPT.

        source: a directory with config.json and safetensors, one file or shards with their index, a .gguf file (what
        is quantised becomes `dtype`), or a model's name on the Hugging Face hub. Needs the optional extra `hf`. Tensors
        are read one at a time straight into their place, in `dtype` on `device`, so that no second copy of the weights
        is held. context_length None is the checkpoint's longest, but no more than 4096: the rotary table is made for
        all of it. Raises ValueError for what cannot be read and for what this file would compute wrongly, and
        ImportError without the extra.
        """
        if not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point type such as torch.float32 or torch.bfloat16, not {dtype}")
        settings, tensors = open_checkpoint(source)
        cfg = checkpoint_config(settings, context_length)
        with torch.device("meta"):  # shapes without memory
            model = cls(cfg)
        if cfg.tied:
            model.lm_head.weight = None  # to_empty would make it a matrix of its own
        model = model.to(dtype).to_empty(device=device)
        if cfg.tied:
            model.lm_head.weight = model.embed.weight
        model.cos, model.sin = (table.to(device, dtype) for table in rope_table(cfg))
        fill(model, tensors)
        return model

    # ---- the four calls ----

    def forward(self, tokens):
        """Logits (B, T, V) of pi_theta for tokens (B, T): unembed(final_norm(H^L))."""
        return self.unembed(self.final_norm(self.residual(tokens, self.cfg.n_layer)))

    def residual(self, tokens, layer: int):
        """H^layer (B, T, d) for tokens (B, T), from the first `layer` blocks alone; layer 0 is the embedding."""
        self.check_layer(layer)
        self.check_tokens(tokens)
        h = self.embed(tokens)
        for trace in self._run(h, layer):
            h = trace.resid_post
        return h

    def trace(self, tokens):
        """Yield the LayerTrace of layers 1..L, lazily: a layer that is not asked for is not computed, and one that
        is not kept is freed, so that a long stream need not be held at once."""
        self.check_tokens(tokens)
        return self._run(self.embed(tokens), self.cfg.n_layer)

    def unembed(self, h):
        """Logits h E_u^T (..., V) of any vector h (..., d) of the stream, *without* the final norm (Eq. 6, 7)."""
        return self.lm_head(h)

    def _run(self, h, n_layer: int, cache=None, start=0):
        """Blocks 1..n_layer one after another, over h (B, T, d) at positions start..start+T-1."""
        rope = self.cos[start : start + h.shape[1]], self.sin[start : start + h.shape[1]]
        for i, block in enumerate(self.blocks[:n_layer]):
            trace = block(h, rope, None if cache is None else cache[i], start)
            yield trace
            h = trace.resid_post

    def truncated(self, layer: int) -> "GPT":
        """A GPT with the same weights (not a copy) whose own policy is the internal policy of `layer`, softmax(H^layer E_u^T):
        the blocks above and the final norm are gone. So an internal policy can be sampled like any other model."""
        self.check_layer(layer, lowest=1)
        short = copy.copy(self)
        short.cfg = replace(self.cfg, n_layer=layer)
        short._modules = dict(self._modules, blocks=self.blocks[:layer], final_norm=nn.Identity())
        return short

    # ---- sampling ----

    @torch.no_grad()
    def generate(self, prompt, max_new_tokens: int, *, prompt_len=None, num_samples=1, temperature=1.0, eos_id=None,
                 pad_id=0, layer=None, site="resid_post", generator=None) -> Generation:  # fmt: skip
        """Continue each prompt `num_samples` times, with a KV cache, until `eos_id` or `max_new_tokens`.

        prompt (Q, P) token ids, right-padded where prompt_len (Q,) says that a row is shorter. temperature 0 is greedy.
        The log-probability of each sampled token under pi_theta always comes back; with `layer` (0..L) also that under
        the internal policy of this layer, `site` telling which: resid_post softmax(H^l E_u^T), attn_out
        softmax(A^l E_u^T), mlp_out softmax(F^l E_u^T), the last two from layer 1 on. Both are taken at the sampling
        temperature (greedy: at 1), in float32 or better. Rows of unequal prompts run in step: a row whose prompt is
        longer is fed its own tokens until that ends, so that every row has its true positions and nothing needs to be
        masked. Raises ValueError for a sequence that outgrows the context, a layer or site that is not there, a token
        outside the vocabulary.
        """
        prompt_len, total = self._check_generate(prompt, prompt_len, max_new_tokens, num_samples, temperature)
        if layer is not None:
            if site not in SITES:
                raise ValueError(f"site must be one of {', '.join(SITES)}, not {site!r}")
            self.check_layer(layer, lowest=0 if site == "resid_post" else 1)
        device, start = prompt.device, int(prompt_len.min())
        prompt_len = prompt_len.repeat_interleave(num_samples)  # (N,)
        N, end = len(prompt_len), prompt_len + max_new_tokens
        tokens = torch.full((N, total), pad_id, dtype=torch.long, device=device)
        tokens[:, : prompt.shape[1]] = prompt.repeat_interleave(num_samples, dim=0)
        tokens[torch.arange(total, device=device) >= prompt_len[:, None]] = pad_id  # whatever the prompt was padded with
        wide = torch.promote_types(self.embed.weight.dtype, torch.float32)
        logprobs = torch.zeros(N, total - 1, device=device, dtype=wide)
        layer_logprobs = None if layer is None else torch.zeros_like(logprobs)

        # Prefill: each prompt once, up to the shortest prompt's end; then its cache serves all its samples.
        cfg = self.cfg
        cache = torch.empty(cfg.n_layer, 2, len(prompt), cfg.n_kv_head, total, cfg.head_dim,
                            device=device, dtype=self.embed.weight.dtype)  # fmt: skip
        states = self._states(prompt[:, :start], cache, 0, layer, site)
        states = [h.repeat_interleave(num_samples, dim=0) for h in states]
        cache = cache.repeat_interleave(num_samples, dim=2)
        rows = torch.arange(N, device=device)  # the rows still running

        for t in range(start, total):  # choose token t from the states at t - 1
            log_pi = [log_policy(self.unembed(h), temperature) for h in states]  # pi_theta, then the layer's
            token = sample(log_pi[0], temperature, generator)
            running = (t >= prompt_len[rows]) & (t < end[rows])  # else still in the prompt, or ended
            token = torch.where(running, token, tokens[rows, t])
            tokens[rows, t] = token
            for record, log_p in zip((logprobs, layer_logprobs), log_pi):
                record[rows, t - 1] = log_p.gather(-1, token[:, None])[:, 0] * running
            if eos_id is not None:
                end[rows] = torch.where(running & (token == eos_id), t + 1, end[rows])
            if t + 1 == total:
                break
            if t % 4 == 0:  # now and then, since asking is a host synchronisation: drop the rows that ended
                keep = (end[rows] > t + 1).nonzero()[:, 0]
                if len(keep) == 0:
                    break
                if len(keep) <= 0.75 * len(rows):  # index_select copies whole rows, cache[:, :, keep] single numbers
                    rows, token, cache = rows[keep], token[keep], cache.index_select(2, keep)
            states = self._states(token[:, None], cache, t, layer, site)

        longest = int(end.max())
        layer_logprobs = None if layer is None else layer_logprobs[:, : longest - 1]
        return Generation(tokens[:, :longest], prompt_len, end, logprobs[:, : longest - 1], layer_logprobs)

    def _states(self, tokens, cache, start, layer, site):
        """The vectors (B, d) to unembed at the last position: final_norm(H^L) and, if asked for, a layer's."""
        h = self.embed(tokens)
        states = [h[:, -1]] if layer == 0 else []
        for l, trace in enumerate(self._run(h, self.cfg.n_layer, cache, start), 1):
            if l == layer:
                states.append(getattr(trace, site)[:, -1])
        return [self.final_norm(trace.resid_post[:, -1])] + states

    # ---- checks ----

    def check_layer(self, layer: int, lowest: int = 0):
        """Raise ValueError unless layer is an integer in lowest..L."""
        if not isinstance(layer, int) or not lowest <= layer <= self.cfg.n_layer:
            raise ValueError(f"layer must be in {lowest}..{self.cfg.n_layer}, not {layer} (layer 0 is the embedding)")

    def check_tokens(self, tokens):
        """Raise ValueError unless tokens is (B, T) with 1 <= T <= context_length and ids in 0..V-1."""
        if tokens.dim() != 2 or tokens.numel() == 0:
            raise ValueError(f"tokens must have shape (batch, time) and not be empty, not {tuple(tokens.shape)}")
        if tokens.shape[1] > self.cfg.context_length:
            raise ValueError(f"{tokens.shape[1]} tokens are longer than context_length = {self.cfg.context_length}")
        low, high = (int(x) for x in tokens.aminmax())
        if low < 0 or high >= self.cfg.vocab_size:
            bad = low if low < 0 else high
            raise ValueError(f"token id {bad} is outside the vocabulary, 0..{self.cfg.vocab_size - 1}")

    def _check_generate(self, prompt, prompt_len, max_new_tokens, num_samples, temperature):
        """Check generate's arguments; returns prompt_len as a tensor and the length of the longest sequence."""
        self.check_tokens(prompt)
        Q, P = prompt.shape
        if prompt_len is None:
            prompt_len = torch.full((Q,), P)
        prompt_len = torch.as_tensor(prompt_len).to(prompt.device)
        if prompt_len.shape != (Q,) or int(prompt_len.min()) < 1 or int(prompt_len.max()) > P:
            raise ValueError(f"prompt_len must be {Q} lengths in 1..{P}, not {prompt_len.tolist()}")
        if max_new_tokens < 1 or num_samples < 1:
            raise ValueError(f"max_new_tokens and num_samples must be at least 1, not {max_new_tokens} and {num_samples}")
        if not temperature >= 0:
            raise ValueError(f"temperature must be 0 (greedy) or more, not {temperature}")
        total = int(prompt_len.max()) + max_new_tokens
        if total > self.cfg.context_length:
            raise ValueError(f"prompt and max_new_tokens = {max_new_tokens} come to {total} tokens, more than "
                             f"context_length = {self.cfg.context_length}")  # fmt: skip
        return prompt_len, total


def rope_table(cfg: GPTConfig):
    """cos and sin (context_length, 1, D) of position x theta^(-2i/D), for pairs that lie D/2 apart (as in Llama)."""
    frequency = cfg.rope_theta ** -(torch.arange(0, cfg.head_dim, 2, dtype=torch.float64) / cfg.head_dim)
    if cfg.rope_divisors is not None:
        frequency = frequency / torch.tensor(cfg.rope_divisors, dtype=torch.float64)
    angle = torch.arange(cfg.context_length, dtype=torch.float64)[:, None] * frequency
    angle = torch.cat((angle, angle), dim=-1)[:, None]
    return angle.cos().float(), angle.sin().float()


def log_policy(logits, temperature: float):
    """log softmax(logits / temperature) over the vocabulary, in float32 or better; temperature 0 (greedy) counts as 1."""
    logits = at_least_float32(logits)
    return F.log_softmax(logits / temperature if temperature not in (0, 1) else logits, dim=-1)


def sample(log_pi, temperature: float, generator=None):
    """One token per row of log_pi (N, V): the most likely one at temperature 0, else a draw by the Gumbel-max trick
    (argmax of log_pi - log(Exponential(1)) is distributed as pi), which needs no host synchronisation."""
    if temperature == 0:
        return log_pi.argmax(-1)
    noise = torch.empty_like(log_pi).exponential_(generator=generator)
    return (log_pi - noise.log()).argmax(-1)


# ---- pretrained checkpoints ------------------------------------------------------------------------------------


def need(package: str):
    """Import a package of the optional extra `hf`. Raises ImportError, saying what to install, if it is not there."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ImportError(f'{package} is needed to read pretrained models: pip install -e ".[hf]"') from None


def open_checkpoint(source):
    """A checkpoint's settings, under the names of config.json, and its (name, tensor) pairs, lazily, one at a time."""
    path = Path(source)
    if not path.exists():
        path = Path(download(str(source)))
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{path} is a file, but not a .gguf one")
        return open_gguf(path)
    settings = read_json(path / "config.json")
    return settings, safetensors_of(path)


def download(name: str) -> str:
    """The local directory of a model of the Hugging Face hub; what is there already is not fetched again."""
    hub = need("huggingface_hub")
    patterns = ["*.json", "*.safetensors", "tokenizer*", "*.jinja", "merges.txt"]
    try:
        return hub.snapshot_download(name, allow_patterns=patterns)
    except Exception as error:  # no network, no such name, not allowed: the hub has an exception for each
        raise ValueError(f"{name!r} is no local file or directory, and the Hugging Face hub did not give it "
                         f"({type(error).__name__})") from error  # fmt: skip


def read_json(path) -> dict:
    """A JSON object from a file. Raises ValueError where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent} has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable JSON file ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def safetensors_of(directory):
    """The (name, tensor) pairs, lazily, of model.safetensors or of the shards that model.safetensors.index.json lists.
    What is missing is found at once, before any memory is taken."""
    safetensors = need("safetensors")
    shards, index = ["model.safetensors"], directory / "model.safetensors.index.json"
    if not (directory / shards[0]).exists():
        if not index.exists():
            raise ValueError(f"{directory} has neither {shards[0]} nor {index.name}")
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} has no weight_map")
        shards = sorted(set(weight_map.values()))
    for shard in shards:
        if not (directory / shard).exists():
            raise ValueError(f"{directory} has no {shard}, which {index.name} lists")

    def tensors():
        for shard in shards:
            try:
                with safetensors.safe_open(directory / shard, framework="pt") as file:
                    for name in file.keys():
                        yield name, file.get_tensor(name)
            except safetensors.SafetensorError as error:
                raise ValueError(f"{directory / shard} is truncated or not a safetensors file ({error})") from None

    return tensors()


GGUF_NAMES = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
              "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
              "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
              "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "token_embd": "model.embed_tokens",
              "output_norm": "model.norm", "output": "lm_head"}  # fmt: skip


def open_gguf(path):
    """The settings of a GGUF file under config.json's names, and its (name, tensor) pairs, dequantised one at a time."""
    gguf = need("gguf")
    try:
        reader = gguf.GGUFReader(path)
        field = {name: f.contents() for name, f in reader.fields.items() if not name.startswith("tokenizer.")}
    except Exception as error:  # the reader trusts the file, so what it trips over can be anything
        raise ValueError(f"{path} is truncated or not a GGUF file ({error})") from None
    kind, stored = check_kind(field.get("general.architecture")), {t.name: t for t in reader.tensors}

    def get(name, default=None):
        return field.get(f"{kind}.{name}", default)

    width, heads = get("embedding_length"), get("attention.head_count")
    if not (isinstance(width, int) and isinstance(heads, int) and heads > 0):
        raise ValueError(f"{path} must have one embedding_length and one head_count for all layers, not {width!r} and {heads!r}")
    head_dim = get("attention.key_length") or width // heads
    rope = {"rope_theta": get("rope.freq_base", 10_000.0)}
    if "rope_freqs.weight" in stored:
        rope["divisors"] = tuple(numbers(gguf, stored.pop("rope_freqs.weight")).tolist())
    scaling, factor = get("rope.scaling.type", "linear"), get("rope.scaling.factor") or get("rope.scale_linear") or 1
    if scaling not in ("none", "linear") or (scaling == "linear" and factor != 1):  # llama.cpp takes linear for granted
        rope["rope_type"] = scaling
    settings = {
        "model_type": kind,
        "vocab_size": int(stored["token_embd.weight"].shape[-1]) if "token_embd.weight" in stored else None,
        "num_hidden_layers": get("block_count"),
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv"),
        "head_dim": head_dim,
        "intermediate_size": get("feed_forward_length"),
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon", 1e-6),
        "rope_parameters": rope,
        "tie_word_embeddings": "output.weight" not in stored,
        "num_experts": get("expert_count", 0),
        "use_sliding_window": bool(get("attention.sliding_window", 0)),
        "partial_rotary_factor": get("rope.dimension_count", head_dim) / max(head_dim, 1),
    }

    def tensors():
        for name, data in stored.items():
            tensor = numbers(gguf, data)
            *layer, part, tail = name.split(".")  # blk.3.attn_q.weight, output.weight
            if kind == "llama" and part in ("attn_q", "attn_k"):
                # llama.cpp turns pairs (2i, 2i+1) where we turn (i, i+D/2), and stores a Llama's rows accordingly
                tensor = tensor.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
            prefix = f"model.layers.{layer[1]}." if layer[:1] == ["blk"] else ""
            yield f"{prefix}{GGUF_NAMES.get(part, part)}.{tail}", tensor

    return settings, tensors()


def numbers(gguf, data):
    """A tensor of a GGUF file in float32, whatever its quantisation."""
    try:
        array = gguf.dequantize(data.data, data.tensor_type)
    except NotImplementedError:
        raise ValueError(f"{data.name} is quantised as {data.tensor_type.name}, which gguf cannot turn into numbers") from None
    return torch.from_numpy(array if array.flags.writeable else array.copy())  # float32 comes as a view of the file


def check_kind(kind):
    """The architecture's name itself. Raises ValueError for one that GPT does not have."""
    if kind not in ("llama", "qwen2", "qwen3"):
        raise ValueError(f"model_type must be llama, qwen2 or qwen3, not {kind!r}")
    return kind


def positive(settings: dict, name: str, default=None):
    """A setting that must be a number above 0. Raises ValueError for anything else."""
    value = settings.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{name} must be a number above 0, not {value!r}")
    return value


def checkpoint_config(c: dict, context_length=None) -> GPTConfig:
    """The GPTConfig of a checkpoint's settings c. Raises ValueError, by name, for what GPT cannot represent."""
    kind = check_kind(c.get("model_type"))
    layers = c.get("layer_types") or (["sliding_attention"] if c.get("use_sliding_window") else [])
    if not isinstance(layers, list) or set(map(str, layers)) - {"full_attention"}:
        names = ", ".join(sorted(set(map(str, layers)))) if isinstance(layers, list) else repr(layers)
        raise ValueError(f"layer_types must all be full_attention, not {names}")
    for name, only in [("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False), ("attention_dropout", 0),
                       ("partial_rotary_factor", 1), ("num_experts", 0), ("quantization_config", None)]:  # fmt: skip
        # attention_bias would be one on o_proj too; the qkv bias of Qwen2 is not a setting
        if c.get(name) not in (None, only):
            raise ValueError(f"{name} must be {only}, not {c[name]!r}")
    sizes = {}
    for ours, name in [("vocab_size", "vocab_size"), ("n_layer", "num_hidden_layers"), ("d_model", "hidden_size"),
                       ("n_head", "num_attention_heads"), ("d_mlp", "intermediate_size"),
                       ("context_length", "max_position_embeddings")]:  # fmt: skip
        if not isinstance(c.get(name), int):
            raise ValueError(f"{name} must be an integer, not {c.get(name)!r}")
        sizes[ours] = c[name]
    for name, type_ in [("num_key_value_heads", int), ("head_dim", int), ("tie_word_embeddings", bool)]:
        if not isinstance(c.get(name), type_ | None):
            raise ValueError(f"{name} must be of type {type_.__name__} or absent, not {c[name]!r}")
    longest = sizes["context_length"]
    if context_length is not None and not 1 <= context_length <= longest:
        raise ValueError(f"context_length must be in 1..{longest}, the checkpoint's longest, not {context_length}")
    sizes["context_length"] = context_length or min(longest, 4096)
    cfg = GPTConfig(**sizes, n_kv_head=c.get("num_key_value_heads"), head_dim=c.get("head_dim"), qk_norm=kind == "qwen3",
                    qkv_bias=kind == "qwen2", tied=bool(c.get("tie_word_embeddings", False)),
                    norm_eps=positive(c, "rms_norm_eps", 1e-6))  # fmt: skip
    parameters, scaling = c.get("rope_parameters") or {}, c.get("rope_scaling") or {}  # the newer layout, the older one
    for rope in (parameters, scaling):
        if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
            raise ValueError(f"rope_parameters and rope_scaling must be single sets of settings, not {rope!r}")
    rope = scaling or parameters  # as transformers has it where both are there
    theta = positive({"rope_theta": c.get("rope_theta", 10_000.0 if kind == "llama" else None)} | parameters | scaling, "rope_theta")
    return replace(cfg, rope_theta=theta, rope_divisors=rope_divisors(rope, theta, cfg.head_dim))


def rope_divisors(rope: dict, theta: float, head_dim: int):
    """Llama 3's rope scaling: a frequency f makes n = f x original_max_position_embeddings / 2 pi turns in the context
    of pretraining. Where n < low_freq_factor f is divided by `factor`, where n > high_freq_factor it stays, and
    between them 1 / divisor goes linearly in n. None without scaling; ValueError for one of another kind."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise ValueError(f"partial_rotary_factor must be 1, not {rope['partial_rotary_factor']!r}")
    if kind == "default":
        return rope.get("divisors")  # of a GGUF file, which stores them
    if kind != "llama3":
        raise ValueError(f"rope_type must be default or llama3, not {kind!r}")
    factor, low, high, context = (positive(rope, name) for name in ("factor", "low_freq_factor", "high_freq_factor",
                                                                     "original_max_position_embeddings"))  # fmt: skip
    if low >= high:
        raise ValueError(f"low_freq_factor must be below high_freq_factor, not {low} and {high}")
    frequency = [theta ** (-i / head_dim) for i in range(0, head_dim, 2)]
    kept = [min(max((f * context / (2 * math.pi) - low) / (high - low), 0.0), 1.0) for f in frequency]
    return tuple(1 / ((1 - w) / factor + w) for w in kept)


def places(model) -> dict:
    """Where a checkpoint's tensors go: name -> a parameter, or some rows of one. Together they are all parameters."""
    where = {"model.embed_tokens.weight": model.embed.weight, "model.norm.weight": model.final_norm.weight}
    if not model.cfg.tied:
        where["lm_head.weight"] = model.lm_head.weight
    for i, block in enumerate(model.blocks):
        parts = {
            "input_layernorm.weight": block.attn_norm.weight,
            "self_attn.o_proj.weight": block.attn.out.weight,
            "post_attention_layernorm.weight": block.mlp_norm.weight,
            "mlp.down_proj.weight": block.mlp.down.weight,
        }
        parts["mlp.gate_proj.weight"], parts["mlp.up_proj.weight"] = block.mlp.gate_up.weight.chunk(2)
        for kind, fused in block.attn.qkv.named_parameters():  # weight, and bias if there is one
            rows = fused.split([heads * model.cfg.head_dim for heads in block.attn.heads])
            parts.update({f"self_attn.{x}_proj.{kind}": part for x, part in zip("qkv", rows)})
        if model.cfg.qk_norm:
            parts["self_attn.q_norm.weight"] = block.attn.q_norm.weight
            parts["self_attn.k_norm.weight"] = block.attn.k_norm.weight
        where.update({f"model.layers.{i}.{name}": part for name, part in parts.items()})
    return where


@torch.no_grad()
def fill(model, tensors):
    """Copy (name, tensor) pairs into the model's parameters, each exactly once. Raises ValueError for a tensor that has
    no place, does not fit or comes twice, and for a place that none has filled."""
    where, filled = places(model), set()
    for name, tensor in tensors:
        if name.endswith("rotary_emb.inv_freq"):  # old Llama checkpoints store it; rope_table computes it
            continue
        if model.cfg.tied and name == "lm_head.weight":  # some tied checkpoints hold E_u under both names
            name = "model.embed_tokens.weight"
        place = where.get(name)
        if place is None:
            raise ValueError(f"the checkpoint has a tensor {name}, for which this architecture has no place")
        if tensor.shape != place.shape or not tensor.is_floating_point():
            raise ValueError(f"{name} is {tuple(tensor.shape)} of {tensor.dtype}, but its configuration asks for "
                             f"{tuple(place.shape)} of a floating-point type")  # fmt: skip
        if name not in filled:
            place.copy_(tensor)
        elif not model.cfg.tied or place is not model.embed.weight or not torch.equal(place, tensor.to(place)):
            raise ValueError(f"the checkpoint has {name} twice, or is not tied as its configuration says")
        filled.add(name)
    missing = [name for name in where if name not in filled]
    if missing:
        raise ValueError(f"the checkpoint has no {missing[0]}" + (f", nor {len(missing) - 1} more" if missing[1:] else ""))


def load_tokenizer(source):
    """The tokenizer of a checkpoint that GPT.from_pretrained reads, as transformers' AutoTokenizer makes it."""
    transformers, path = need("transformers"), Path(source)
    try:
        if path.is_file():
            return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        return transformers.AutoTokenizer.from_pretrained(source)
    except Exception as error:  # as with the hub
        raise ValueError(f"transformers found no tokenizer in {source} ({type(error).__name__})") from error


def encode_text(tokenizer, text: str) -> list[int]:
    """Token ids of a text, as the tokenizer opens one, but not closed by an EOS that some add."""
    ids = tokenizer(text).input_ids
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids


def encode_chat(tokenizer, prompt: str, response: str):
    """Token ids of prompt and response, and how many of them are the prompt's. The prompt goes through the tokenizer's
    chat template, up to where the answer begins, if it has one. Both are encoded apart and put together, so that the
    border is exact; the response ends as it was given, without an EOS of the tokenizer's."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids if tokenizer.chat_template else encode_text(tokenizer, prompt)
    return prompt_ids + tokenizer(response, add_special_tokens=False).input_ids, len(prompt_ids)
