"""Sampling by one CUDA graph a token, beside model.generate: a try, measured by gpu.py.

A small model's sampling is launches of small kernels: a few microseconds of work each, and as many
to launch it. A graph launches all kernels of a token at once. It needs fixed shapes. So the cache
has its full length from the start, position t is a tensor, prompts are fed token by token, and rows
that ended run on unseen.
"""

import sys
from pathlib import Path

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).parent.parent))

import train_toy as toy  # noqa: E402
from model import Generation, rotate, sample  # noqa: E402


class Decoder:
    """What model.generate does, with its arguments. `tokens` and `end` hold the responses."""

    def __init__(self, model, prompt, max_new_tokens, prompt_len, num_samples, pad_id, temperature):
        self.model, self.limit, self.temperature = model, max_new_tokens, temperature
        self.num_samples, self.pad_id = num_samples, pad_id
        self.lengths, self.start = self.rows(prompt, prompt_len)
        (N, T), c = self.start.shape, model.cfg
        self.tokens, self.end = self.start.clone(), self.lengths.clone()
        self.t = torch.zeros(1, dtype=torch.long, device=prompt.device)
        cache = torch.zeros(c.n_layer, 2, N, c.n_kv_head, T, c.head_dim, device=prompt.device)
        self.cache = cache.to(model.embed.weight.dtype)

    def rows(self, prompt, prompt_len):
        """Lengths (N,) and tokens (N, T) of the rows before anything is sampled."""
        start = pad(prompt, (0, self.limit), value=self.pad_id)
        return (x.repeat_interleave(self.num_samples, dim=0) for x in (prompt_len, start))

    def ask(self, prompt, prompt_len):
        """Other prompts, as many and as wide as those before: the graph keeps its tensors."""
        for mine, new in zip((self.lengths, self.start), self.rows(prompt, prompt_len)):
            mine.copy_(new)

    def step(self):
        """Choose token t + 1 of every row, from token t and the cache."""
        model, t, after = self.model, self.t, self.t + 1
        h = model.embed(self.tokens.index_select(1, t))  # (N, 1, d)
        rope = model.cos.index_select(0, t), model.sin.index_select(0, t)
        seen = (torch.arange(self.tokens.shape[1], device=t.device) <= t)[None]
        for block, (keys, values) in zip(model.blocks, self.cache):
            attn = block.attn
            qkv = attn.qkv(block.attn_norm(h)).unflatten(-1, (-1, attn.head_dim))
            q, k, v = qkv.split(attn.heads, dim=2)
            q, k = rotate(attn.q_norm(q), *rope), rotate(attn.k_norm(k), *rope)
            keys.index_copy_(2, t, k.transpose(1, 2))
            values.index_copy_(2, t, v.transpose(1, 2))
            q, grouped = q.transpose(1, 2), attn.heads[0] != attn.heads[1]
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
        """All responses, by calls of `step`. The device is waited for at every eighth token."""
        self.tokens.copy_(self.start)
        self.end.copy_(self.lengths + self.limit)
        self.t.zero_()
        for t in range(self.tokens.shape[1] - 1):
            step()  # chooses token t + 1
            if t % 8 == 7 and not bool((self.end > t + 2).any()):
                break


KEPT = {}  # decoders and their steps, by model and shape


@torch.no_grad()
def respond(model, s, problems, samples, generator) -> Generation:
    """In place of train_toy.respond. Random numbers are the default generator's, which a graph can
    go on with: others than without it, and the same for the same step."""
    prompts, prompt_len = toy.padded([toy.encode(p + "=") for p in problems], model.device)
    key = id(model), samples, prompts.shape
    if key not in KEPT:
        decoder = Decoder(model, prompts, s.response_limit, prompt_len, samples, toy.PAD, 1)
        KEPT[key] = decoder, captured(decoder)
    decoder, step = KEPT[key]
    decoder.ask(prompts, prompt_len)
    torch.manual_seed(generator.initial_seed())
    decoder.generate(step)
    tokens, end = decoder.tokens[:, : int(decoder.end.max())].clone(), decoder.end.clone()
    return Generation(tokens, decoder.lengths.clone(), end)


def captured(decoder):
    """A call that does what decoder.step() does, by a CUDA graph; not on CUDA, decoder.step."""
    step = decoder.step
    if not decoder.tokens.is_cuda:
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # before the capture kernels are chosen, and memory is taken
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
