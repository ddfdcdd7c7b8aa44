"""Any decoder-only language model of transformers, with its residual stream laid open.

    truncated(lm, layer)   inside this `with`, lm is its own internal policy softmax(H^layer E_u^T)
    HFModel(lm)            the whole contract that minibupo.py states, for a model of transformers
    load(source)           an HFModel and its tokenizer from a hub name, a directory or a GGUF file

Nothing is copied or rewritten: the blocks that run are transformers' own. What could be wrong for a
model that nobody has tried is checked by numbers when an HFModel is made. So a model either comes
out exact or is refused.
"""

import copy
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import nn

from model import GPT, LayerTrace

ATTENTION = ("self_attn", "attn", "attention", "self_attention")  # names of a block's two modules
FFN = ("mlp", "feed_forward", "block_sparse_moe", "ffn", "moe")
HINT = 'pip install -e ".[hf]"'

# ---- the internal policy of a layer, made by taking away what is above it ------------------------


class Parts(NamedTuple):
    """Where a language model keeps what is taken away."""

    decoder: nn.Module  # from token ids to the normed H^L
    blocks: str  # name of its child, the list of blocks
    norm: str  # name of its child, the final norm


def find_parts(lm) -> Parts:
    """The parts of a causal LM, also inside PEFT. Raises ValueError where they cannot be told."""
    name = type(lm).__name__
    if not hasattr(lm, "get_decoder") or getattr(lm.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is no decoder-only language model of transformers")
    decoder = lm.get_decoder()
    L = decoder.config.num_hidden_layers
    children = dict(decoder.named_children())
    blocks = [n for n, m in children.items() if isinstance(m, nn.ModuleList) and len(m) == L]
    norms = [n for n in children if "norm" in n or n.startswith("ln_")]
    if len(blocks) != 1 or not norms:
        raise ValueError(f"{name} has no list of {L} blocks with a final norm, or is cut already")
    return Parts(decoder, blocks[0], norms[-1])


@contextmanager
def truncated(lm, layer: int):
    """Inside the `with`, lm *is* the internal policy of `layer` (0: embedding), with its weights.

    Only the first `layer` blocks are there, and no final norm. So logits, samples and losses are
    the internal policy's, whoever computes them, and nothing above can get a gradient. The model is
    whole again afterwards, also after an error. Raises ValueError for a layer that is not there.
    """
    decoder, blocks, norm = find_parts(lm)
    whole = {name: decoder._modules[name] for name in (blocks, norm)}
    if not 0 <= layer <= len(whole[blocks]):
        raise ValueError(f"layer must be in 0..{len(whole[blocks])}, not {layer} (0: embedding)")
    decoder._modules.update({blocks: whole[blocks][:layer], norm: nn.Identity()})
    try:
        yield lm
    finally:
        decoder._modules.update(whole)


# ---- what the modules of a block read and write --------------------------------------------------


@contextmanager
def watching(blocks, found):
    """Inside the `with`, every one of the blocks that has run calls found(LayerTrace)."""
    calls = []  # (module, what it read, what it wrote) of the modules in the block that runs

    def ran(module, args, kwargs, out):
        calls.append((module, args[0] if args else kwargs.get("hidden_states"), first(out)))

    def block_ran(block, args, kwargs, out):
        if isinstance(out, tuple):
            raise ValueError(f"{type(block).__name__} returns more than the residual stream")
        found(layer_trace(block, args[0] if args else kwargs["hidden_states"], calls, out))
        calls.clear()

    pairs = [(child, ran) for block in blocks for child in block.children()]
    pairs += [(block, block_ran) for block in blocks]
    hooks = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in pairs]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def layer_trace(block, resid_pre, calls, resid_post) -> LayerTrace:
    """Tell from the calls of a block's modules what attention and FFN read and what they add.

    Raises ValueError for a block without modules of these names.
    """

    def io(names):
        for name, child in block.named_children():
            for module, read, wrote in calls:
                if name in names and module is child:
                    return read, wrote
        raise ValueError(f"{type(block).__name__} has no {' or '.join(names[:2])} to look at")

    def added(wrote):  # Gemma and OLMo 2 norm a write before they add it
        for _, read, out in calls:
            wrote = out if read is wrote else wrote
        return wrote

    (attn_in, attn_out), (mlp_in, mlp_out) = io(ATTENTION), io(FFN)
    resid_mid = next((read for _, read, wrote in calls if wrote is mlp_in), mlp_in)
    return LayerTrace(
        resid_pre, attn_in, added(attn_out), resid_mid, mlp_in, added(mlp_out), resid_post
    )


def first(out):
    """The hidden state that a module returns, alone or first of several."""
    return out[0] if isinstance(out, tuple) else out


# ---- the contract --------------------------------------------------------------------------------


class KVCache:
    """transformers' cache of keys and values, with the tensor methods that generate uses."""

    def __init__(self):
        self.kwargs = {}  # its name changed from past_key_values to cache in 2026

    def update(self, out):
        name = "cache" if "cache" in out else "past_key_values"
        self.kwargs = {name: out[name]}

    def repeat_interleave(self, n, dim):
        next(iter(self.kwargs.values())).batch_repeat_interleave(n)
        return self

    def index_select(self, dim, keep):
        next(iter(self.kwargs.values())).batch_select_indices(keep)
        return self


class HFModel(GPT):
    """A causal LM of transformers as minibupo.py wants a model, with its weights (no copy).

    GPT's own blocks are not there. What stays of GPT is how it checks its input and samples. The
    model is in evaluation mode: a policy has no dropout. Raises ValueError for a model whose stream
    cannot be laid open exactly: parallel blocks, logits that are scaled or capped, and others.
    """

    def __init__(self, lm):
        nn.Module.__init__(self)
        self.lm, self.short = lm.eval(), False
        decoder, blocks, _ = find_parts(lm)
        self.cfg = SimpleNamespace(
            n_layer=len(decoder._modules[blocks]),
            vocab_size=lm.get_output_embeddings().weight.shape[0],
            context_length=getattr(decoder.config, "max_position_embeddings", None) or 2**31,
        )
        self._check_model()

    @property
    def device(self):
        return self.lm.get_input_embeddings().weight.device

    @property
    def final_norm(self):
        decoder, _, norm = find_parts(self.lm)
        return nn.Identity() if self.short else decoder._modules[norm]

    def forward(self, tokens):
        self._check_tokens(tokens)
        with self._as_policy():
            return self.lm(input_ids=tokens, use_cache=False).logits

    def residual(self, tokens, layer: int):
        self._check_tokens(tokens)
        with truncated(self.lm, self._check_layer(layer)):
            return self.lm.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state

    def trace(self, tokens):
        """Yield the LayerTrace of layers 1..L, lazily. Masks and rotary positions differ from layer
        to layer in some models. So the decoder first calls stubs, which note what they are given.
        """
        self._check_tokens(tokens)
        decoder, blocks, _ = find_parts(self.lm)
        given, trace = [], []
        with stubbed(decoder._modules[blocks], given):
            decoder(input_ids=tokens, use_cache=False)
        h = given[0][1]
        for block, _, args, kwargs in given[: self.n_layer]:
            with watching([block], trace.append):
                h = block(h, *args, **kwargs)
            yield trace.pop()

    def unembed(self, h):
        return self.lm.get_output_embeddings()(h)

    def truncated(self, layer: int) -> "HFModel":
        short = copy.copy(self)
        short.cfg = SimpleNamespace(**vars(self.cfg) | {"n_layer": self._check_layer(layer, 1)})
        short.short = True
        return short

    def _as_policy(self):
        return truncated(self.lm, self.n_layer) if self.short else nullcontext()

    def _empty_cache(self, B: int, T: int):
        return KVCache()

    def _next_logits(self, tokens, cache, start: int):
        with self._as_policy():
            out = self.lm(input_ids=tokens, use_cache=True, logits_to_keep=1, **cache.kwargs)
        cache.update(out)
        return out.logits[:, -1]

    @torch.no_grad()
    def _check_model(self):
        """Raise ValueError unless the parts that are laid open make up the model."""
        tokens = torch.arange(8, device=self.device)[None] % self.vocab_size
        decoder, blocks, _ = find_parts(self.lm)
        whole = []
        with watching(decoder._modules[blocks], whole.append):
            logits = self(tokens)
        self._require(self.residual(tokens, 0), whole[0].resid_pre, "H^0 is not its embedding")
        for l, (trace, alone) in enumerate(zip(whole, self.trace(tokens)), 1):
            what = f"the writes of layer {l} do not add up"
            self._require(trace.resid_pre + trace.attn_out, trace.resid_mid, what)
            self._require(trace.resid_mid + trace.mlp_out, trace.resid_post, what)
            self._require(trace.resid_post, alone.resid_post, f"layer {l} on its own differs")
            self._require(trace.resid_post, self.residual(tokens, l), f"H^{l} is not residual's")
        self._require(logits, self.unembed(self.final_norm(trace.resid_post)), "H^L gives others")
        # An unembedding that caps or scales its logits shows when they are large.
        probe = torch.arange(float(trace.resid_post[0].numel())).cos().view(trace.resid_post.shape)
        probe = probe.to(trace.resid_post)
        probe *= 100 / self.unembed(probe).std()
        hook = self.final_norm.register_forward_hook(lambda *_: probe)
        try:
            self._require(self.unembed(probe), self(tokens), "its logits are scaled or capped")
        finally:
            hook.remove()

    def _require(self, a, b, what: str):
        close = torch.finfo(a.dtype).eps ** 0.5 * float(a.abs().max())
        if a.shape != b.shape or not torch.allclose(a, b, rtol=0, atol=close):
            raise ValueError(f"{type(self.lm).__name__} cannot be laid open: {what}")


@contextmanager
def stubbed(blocks, given):
    """Inside the `with`, blocks do nothing but note in `given` (block, h, args, kwargs)."""

    def stub(block):
        def forward(h, *args, **kwargs):
            given.append((block, h, args, kwargs))
            return h

        return forward

    before = [block.__dict__.get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = stub(block)
        yield
    finally:
        for block, forward in zip(blocks, before):
            del block.forward
            if forward is not None:
                block.forward = forward


# ---- reading a model, and encoding text for it ---------------------------------------------------


def load(source, dtype: str = "float32", device="cpu"):
    """(HFModel, tokenizer) of a hub name, a directory, or a .gguf file, read by transformers.

    Raises ImportError without the extra `hf`, and ValueError for what cannot be read."""
    lm, tokenizer = load_lm(source, dtype)
    return HFModel(lm.to(device)), tokenizer


def load_lm(source, dtype: str = "float32"):
    """(transformers' model, tokenizer), as load has them. A GGUF model can be trained and saved."""
    try:
        import transformers
    except ImportError:
        raise ImportError(f"transformers is needed to read language models: {HINT}") from None
    path, options = Path(source), {}
    if path.suffix == ".gguf":
        check_gguf(path)
        source, options = str(path.parent), {"gguf_file": path.name}
    elif path.is_file():
        raise ValueError(f"{source} is a file, but not a .gguf one")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
        lm, report = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=getattr(torch, dtype), output_loading_info=True, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"transformers cannot read {source}: {reason}") from error
    if report["missing_keys"]:
        name = sorted(report["missing_keys"])[0]
        raise ValueError(f"{source} has no weights for {name}, which would be random")
    if options:  # else Trainer takes it for a quantised model, though its weights are not any more
        lm.is_quantized, lm.hf_quantizer = False, None
        for config in (lm.config, lm.generation_config):
            vars(config).pop("quantization_config", None)
    return lm, tokenizer


def check_gguf(path: Path):
    """Raise ValueError for a GGUF file that cannot be read, or that transformers reads wrongly."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ImportError(f"gguf is needed to read {path}: {HINT}") from None
    try:
        names = {tensor.name for tensor in GGUFReader(path).tensors}
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{path} is not there, cut short, or no GGUF file") from error
    if any(name.startswith("rope_freqs") for name in names):
        raise ValueError(f"{path} has rope_freqs (Llama 3), which transformers does not read")


def encode_text(tokenizer, text: str) -> list[int]:
    """Token ids of a text, with the BOS that the tokenizer may put first, without a last EOS."""
    ids = tokenizer(text).input_ids
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def encode_chat(tokenizer, prompt: str, response: str):
    """(ids, prompt_len): token ids of prompt and response, and how many are the prompt's.

    The prompt goes through the chat template if there is one. The response is encoded on its own,
    so that the border is exact, and gets no EOS."""
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        before = tokenizer(text, add_special_tokens=False).input_ids
    else:
        before = encode_text(tokenizer, prompt)
    return before + tokenizer(response, add_special_tokens=False).input_ids, len(before)
