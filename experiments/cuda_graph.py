"""Sampling by one CUDA graph for each token, beside model.generate: a trial, measured by gpu.py.

A small model samples by launching small kernels. Each takes a few microseconds of work, and as long
to launch. A graph launches all kernels of a token at once. It needs fixed shapes. So the cache has
its full length from the start, position t is a tensor, prompts are fed token by token, and rows
that have ended are computed further without effect.
"""

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

import train_toy as toy
from model import Generation, rotate, sample


def sampling_arguments(s: toy.Settings, problems: list[str], samples: int, device) -> dict:
    """Return the arguments of model.generate for problems; without an EOS, to the limit."""
    prompts, prompt_len = toy.padded([toy.encode(p + "=") for p in problems], device)
    return {
        "prompt": prompts,
        "max_new_tokens": s.response_limit,
        "prompt_len": prompt_len,
        "num_samples": samples,
        "pad_id": toy.PAD,
    }


class Decoder:
    """What model.generate does, with its arguments. `tokens` and `end` hold the responses."""

    def __init__(self, model, prompt, max_new_tokens, prompt_len, num_samples, pad_id, temperature):
        self.model = model
        self.limit = max_new_tokens
        self.temperature = temperature
        self.num_samples = num_samples
        self.pad_id = pad_id
        self.lengths, self.start = self.rows(prompt, prompt_len)
        self.tokens = self.start.clone()
        self.end = self.lengths.clone()
        self.t = torch.zeros(1, dtype=torch.long, device=prompt.device)
        c = model.cfg
        N, T = self.start.shape
        cache = torch.zeros(c.n_layer, 2, N, c.n_kv_head, T, c.head_dim, device=prompt.device)
        self.cache = cache.to(model.embed.weight.dtype)

    def rows(self, prompt, prompt_len):
        """Return lengths (N,) and tokens (N, T) of the rows before anything is sampled."""
        start = pad(prompt, (0, self.limit), value=self.pad_id)
        return (x.repeat_interleave(self.num_samples, dim=0) for x in (prompt_len, start))

    def ask(self, prompt, prompt_len):
        """Take other prompts, as many and as wide as those before: the graph keeps its tensors."""
        lengths, start = self.rows(prompt, prompt_len)
        self.lengths.copy_(lengths)
        self.start.copy_(start)

    def step(self):
        """Choose token t + 1 of every row, from token t and the cache."""
        model = self.model
        t = self.t
        after = t + 1
        h = model.embed(self.tokens.index_select(1, t))  # (N, 1, d)
        rope = model.cos.index_select(0, t), model.sin.index_select(0, t)
        seen = (torch.arange(self.tokens.shape[1], device=t.device) <= t)[None]
        for block, (keys, values) in zip(model.blocks, self.cache):
            attn = block.attn
            qkv = attn.qkv(block.attn_norm(h)).unflatten(-1, (-1, attn.head_dim))
            q, k, v = qkv.split(attn.heads, dim=2)
            q = rotate(attn.q_norm(q), *rope).transpose(1, 2)
            k = rotate(attn.k_norm(k), *rope).transpose(1, 2)
            keys.index_copy_(2, t, k)
            values.index_copy_(2, t, v.transpose(1, 2))
            grouped = attn.heads[0] != attn.heads[1]
            y = scaled_dot_product_attention(q, keys, values, attn_mask=seen, enable_gqa=grouped)
            h = h + attn.out(y.transpose(1, 2).flatten(2))
            h = h + block.mlp(block.mlp_norm(h))
        token = sample(model.unembed(model.final_norm(h[:, -1])), self.temperature)
        responds = (after >= self.lengths) & (after < self.end)
        token = torch.where(responds, token, self.tokens.index_select(1, after)[:, 0])
        self.tokens.index_copy_(1, after, token[:, None])
        self.end.copy_(torch.where(responds & (token == toy.EOS), after + 1, self.end))
        t.add_(1)

    def generate(self, step):
        """Sample all responses by calls of `step`. The device is waited for at every 8th token."""
        self.tokens.copy_(self.start)
        self.end.copy_(self.lengths + self.limit)
        self.t.zero_()
        for t in range(self.tokens.shape[1] - 1):
            step()  # chooses token t + 1
            if t % 8 == 7 and not bool((self.end > t + 2).any()):
                break


KEPT = {}  # decoders and their steps, by model and shape


@torch.no_grad()
def sample_responses(model, s, problems, samples, generator) -> Generation:
    """Return what train_toy.sample_responses returns, with other random numbers.

    They are those of the default generator, which a graph can continue with. The same step has the
    same ones.
    """
    arguments = sampling_arguments(s, problems, samples, model.device)
    key = id(model), samples, arguments["prompt"].shape
    if key not in KEPT:
        decoder = Decoder(model, **arguments, temperature=1)
        KEPT[key] = decoder, captured(decoder)
    decoder, step = KEPT[key]
    decoder.ask(arguments["prompt"], arguments["prompt_len"])
    torch.manual_seed(generator.initial_seed())
    decoder.generate(step)
    tokens = decoder.tokens[:, : int(decoder.end.max())].clone()
    return Generation(tokens, decoder.lengths.clone(), decoder.end.clone())


def captured(decoder):
    """Return a call that does what decoder.step() does, by a CUDA graph; off CUDA, decoder.step."""
    step = decoder.step
    if not decoder.tokens.is_cuda:
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # before the capture, kernels are chosen and memory is allocated
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
