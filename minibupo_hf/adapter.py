"""Any decoder-only language model of transformers, with access to its residual stream.

    truncated(lm, layer)   inside this `with`, lm is its own internal policy softmax(H^layer E_u^T)
    HFModel(lm)            the interface that minibupo.py states, for a model of transformers
    load(source)           an HFModel and its tokenizer from a hub name, a directory or a GGUF file

Nothing is rewritten: the blocks that run are transformers' own. HFModel compares the parts with the
whole model by numbers when it is made. So an untried model comes out exact, or it is refused.
"""

import copy
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn

from model import LanguageModel, LayerTrace

# ---- the internal policy of a layer, made by taking away what is above it ------------------------


def find_parts(lm):
    """(decoder, blocks, norm) of a causal LM, also inside PEFT: the module that goes from token ids
    to the normed H^L, and the names of its two children that are the blocks and the final norm.

    Raises ValueError if they cannot be identified.
    """
    name = type(lm).__name__
    if not hasattr(lm, "get_decoder") or getattr(lm.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is no decoder-only language model of transformers")
    decoder = lm.get_decoder()
    L = decoder.config.num_hidden_layers
    children = dict(decoder.named_children())
    blocks = [n for n, m in children.items() if isinstance(m, nn.ModuleList) and len(m) == L]
    # The last norm by name is taken. HFModel checks that it is the final norm.
    norms = [n for n in children if "norm" in n or n.startswith("ln_")]
    if len(blocks) != 1 or not norms:
        raise ValueError(f"{name} has no list of {L} blocks with a final norm, or is cut already")
    return decoder, blocks[0], norms[-1]


@contextmanager
def truncated(lm, layer: int):
    """Inside the `with`, lm *is* the internal policy of `layer` (0: embedding), with its weights.

    Only the first `layer` blocks remain, and no final norm. So logits, samples and losses are the
    internal policy's, no matter which library computes them, and nothing above the layer can get a
    gradient. Afterwards the model is whole again, also after an error. Raises ValueError for an
    invalid layer.
    """
    decoder, blocks_name, norm_name = find_parts(lm)
    with _first_blocks(decoder, blocks_name, norm_name, layer):
        yield


@contextmanager
def _first_blocks(decoder, blocks_name: str, norm_name: str, layer: int):
    """Inside the `with`, the decoder has only its first `layer` blocks, and no final norm."""
    blocks = getattr(decoder, blocks_name)
    norm = getattr(decoder, norm_name)
    if not 0 <= layer <= len(blocks):
        raise ValueError(f"layer must be in 0..{len(blocks)}, not {layer} (0: embedding)")
    setattr(decoder, blocks_name, blocks[:layer])
    setattr(decoder, norm_name, nn.Identity())
    try:
        yield
    finally:
        setattr(decoder, blocks_name, blocks)
        setattr(decoder, norm_name, norm)


# ---- what the modules of a block read and write --------------------------------------------------

# the names that transformers gives to the two modules of a block
ATTENTION = {"self_attn", "attn", "attention", "self_attention"}
FFN = {"mlp", "feed_forward", "block_sparse_moe", "ffn", "moe"}


@contextmanager
def watching(blocks, found):
    """Inside the `with`, each of the blocks calls found(LayerTrace) when it has run."""
    calls = {}  # name of a module in the block that runs: what it read and what it wrote

    def module_ran(name, module, args, kwargs, out):
        # transformers calls attention with keywords
        read = args[0] if args else kwargs.get("hidden_states")
        wrote = out[0] if isinstance(out, tuple) else out
        calls[name] = (read, wrote)

    def block_ran(block, args, out):
        found(layer_trace(type(block).__name__, args[0], calls, out))
        calls.clear()

    with ExitStack() as hooks:
        for block in blocks:
            for name, module in block.named_children():
                ran = partial(module_ran, name)
                hooks.callback(module.register_forward_hook(ran, with_kwargs=True).remove)
            hooks.callback(block.register_forward_hook(block_ran).remove)
        yield


def layer_trace(name: str, resid_pre, calls, resid_post) -> LayerTrace:
    """The LayerTrace of one block, from the calls of its modules: {name: (read, wrote)}.

    Which module read what another one wrote is told by the identity of tensors. If a norm wrote
    mlp_in, then that norm read resid_mid. If a norm read what attention or the FFN wrote, as in
    Gemma 2 and OLMo 2, then what the norm wrote is what is added to the stream. Raises ValueError
    for a block whose modules have other names, or which returns more than one result.
    """
    attention = calls.keys() & ATTENTION
    ffn = calls.keys() & FFN
    if not attention or not ffn or isinstance(resid_post, tuple):
        raise ValueError(f"{name} has no attention and FFN by name, or returns more than a stream")
    attn_in, attn_out = calls[attention.pop()]
    mlp_in, mlp_out = calls[ffn.pop()]
    resid_mid = mlp_in
    for read, wrote in calls.values():
        if wrote is mlp_in:
            resid_mid = read
        if read is attn_out:
            attn_out = wrote
        if read is mlp_out:
            mlp_out = wrote
    return LayerTrace(resid_pre, attn_in, attn_out, resid_mid, mlp_in, mlp_out, resid_post)


@contextmanager
def _replaced_forward(modules, forward):
    """Inside the `with`, the forward of each module is this function."""
    before = [vars(module).pop("forward", None) for module in modules]  # None: that of its class
    for module in modules:
        module.forward = forward
    try:
        yield
    finally:
        for module, own in zip(modules, before):
            del module.forward
            if own is not None:
                module.forward = own


# ---- the interface -------------------------------------------------------------------------------


class HFModel(LanguageModel):
    """A causal LM of transformers as minibupo.py wants a model, with its weights (no copy).

    It is in evaluation mode, because a policy has no dropout. Raises ValueError for a model whose
    stream cannot be exposed exactly, as far as its number type resolves: one with parallel blocks,
    with logits that are scaled or capped, and others.
    """

    def __init__(self, lm):
        super().__init__()
        self.lm = lm.eval()
        self.decoder, self._blocks_name, self._norm_name = find_parts(lm)
        self.embed = lm.get_input_embeddings()
        self.blocks = getattr(self.decoder, self._blocks_name)
        self.final_norm = getattr(self.decoder, self._norm_name)
        self.lm_head = lm.get_output_embeddings()

        self.n_layer = len(self.blocks)
        self.vocab_size = len(self.lm_head.weight)
        limit = getattr(self.decoder.config, "max_position_embeddings", None)
        self.context_length = limit or 2**31  # some models have no limit
        self._check_model()

    def residual(self, tokens, layer: int):
        self._check_tokens(tokens)
        return self._decode(tokens, self._check_layer(layer), use_cache=False).last_hidden_state

    def trace(self, tokens):
        """Yield the LayerTrace of layers 1..L, lazily: a layer not asked for is not computed.

        Masks and rotary positions differ from layer to layer in some models. So the decoder first
        runs with blocks that only note what they are called with.
        """
        self._check_tokens(tokens)
        calls = []
        found = []

        def note(h, *args, **kwargs):
            calls.append((h, args, kwargs))
            return h

        with _replaced_forward(self.blocks, note):
            self._decode(tokens, self.n_layer, use_cache=False)
        h = calls[0][0]
        for block, (_, args, kwargs) in zip(self.blocks, calls):
            with watching([block], found.append):
                h = block(h, *args, **kwargs)
            yield found.pop()

    def truncated(self, layer: int) -> "HFModel":
        """An HFModel with these weights (no copy) whose own policy is softmax(H^layer E_u^T).

        It has only the parameters that this policy uses, so its `lm` is None.
        """
        layer = self._check_layer(layer, lowest=1)
        if "forward" in vars(self.decoder):  # it would run the uncut decoder
            raise ValueError("a model with a device_map cannot be truncated: load it without one")
        short = _shallow_copy(self)
        short.lm = None
        short.n_layer = layer
        short.blocks = self.blocks[:layer]
        short.final_norm = nn.Identity()
        short.decoder = _shallow_copy(self.decoder)
        setattr(short.decoder, self._blocks_name, short.blocks)
        setattr(short.decoder, self._norm_name, short.final_norm)
        return short

    def _decode(self, tokens, layer: int, **options):
        """The decoder's output after `layer` blocks, without the final norm."""
        with _first_blocks(self.decoder, self._blocks_name, self._norm_name, layer):
            return self.decoder(input_ids=tokens, **options)

    def _empty_cache(self, B: int, T: int):
        return KVCache()

    def _next_logits(self, tokens, cache, start: int):
        out = self._decode(tokens, self.n_layer, use_cache=True, **cache)
        name = "cache" if "cache" in out else "past_key_values"  # as it was until transformers 5
        cache[name] = out[name]
        return self.unembed(self.final_norm(out.last_hidden_state[:, -1]))

    @torch.no_grad()
    def _check_model(self):
        """Raise ValueError unless the exposed parts make up the model."""
        tokens = torch.arange(8, device=self.device)[None] % self.vocab_size
        with watching(self.blocks, lambda trace: None):  # refuses unknown kinds of blocks by name
            theirs = self.lm(input_ids=tokens, use_cache=False).logits
        h = self.residual(tokens, 0)
        for l, trace in enumerate(self.trace(tokens), 1):
            self._require(h, trace.resid_pre, f"layer {l} does not read H^{l - 1}")
            mid = trace.resid_pre + trace.attn_out
            self._require(mid, trace.resid_mid, f"attention of layer {l} adds something else")
            post = trace.resid_mid + trace.mlp_out
            self._require(post, trace.resid_post, f"the FFN of layer {l} adds something else")
            h = self.residual(tokens, l)
            self._require(h, trace.resid_post, f"layer {l} on its own gives another H^{l}")
        self._require(theirs, self(tokens), "H^L gives other logits")

        # An unembedding that caps or scales its logits shows when they are large. Any vectors will
        # do, at a size that spreads their logits by 100.
        probe = torch.arange(float(h.numel())).cos().view(h.shape).to(h)
        probe *= 100 / self.unembed(probe).std()
        with _replaced_forward([self.final_norm], lambda h: probe):
            theirs = self.lm(input_ids=tokens, use_cache=False).logits
        self._require(self.unembed(probe), theirs, "its logits are scaled or capped")

    def _require(self, a, b, what: str):
        """Raise ValueError unless a and b are equal to half of the digits of their type.

        Half, because rounding adds up over layers. The tolerance is relative to each number and to
        the median, because a few dimensions of a stream can be 1000 times as large as the others.
        """
        close = torch.finfo(a.dtype).eps ** 0.5
        if a.shape != b.shape or not torch.allclose(a, b, close, close * float(a.abs().median())):
            raise ValueError(f"{type(self.lm).__name__} cannot be opened: {what}")


def _shallow_copy(module):
    """A copy with the same children, of which it can be given others."""
    copied = copy.copy(module)
    copied._modules = module._modules.copy()  # nn.Module's own dict of children, else shared
    return copied


class KVCache(dict):
    """transformers' cache under the name that a model gives it, as `generate` handles a cache."""

    def index_select(self, dim, keep):
        for cache in self.values():
            cache.batch_select_indices(keep)
        return self


# ---- reading a model, and encoding text for it ---------------------------------------------------


def load(source, dtype: str = "float32", device="cpu"):
    """(HFModel, tokenizer) from a hub name, a directory, or a .gguf file, read by transformers.

    Raises ImportError without the extra `hf`, and ValueError for what cannot be read.
    """
    lm, tokenizer = load_lm(source, dtype)
    return HFModel(lm.to(device)), tokenizer


def load_lm(source, dtype: str = "float32", revision="main", **options):
    """(transformers' model, tokenizer), not yet checked; `options` are AutoModelForCausalLM's."""
    path = Path(source)
    try:
        import transformers

        if path.suffix == ".gguf":
            import gguf  # noqa: F401 - transformers reads such a file with it
    except ImportError as error:
        raise ImportError(f'{error}: pip install -e ".[hf]"') from None
    file = {"revision": revision}
    try:
        if path.suffix == ".gguf":
            _check_gguf(path)
            source = str(path.parent)
            file["gguf_file"] = path.name
        elif path.is_file():
            raise ValueError("of single files only a .gguf one can be read")
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **file)
        options |= dict(dtype=dtype, output_loading_info=True)
        lm, report = transformers.AutoModelForCausalLM.from_pretrained(source, **file, **options)
    except Exception as error:  # transformers has a class of its own for each kind of damage
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"transformers cannot read {path}: {reason}") from error
    if report["missing_keys"]:
        name = sorted(report["missing_keys"])[0]
        raise ValueError(f"{path} has no weights for {name}, which would be random")
    if "gguf_file" in file:
        # Its weights are already dequantised, but Trainer would still treat them as quantised.
        lm.is_quantized = False
        lm.hf_quantizer = None
        for config in (lm.config, lm.generation_config):
            vars(config).pop("quantization_config", None)
    return lm, tokenizer


def _check_gguf(path: Path):
    """Raise ValueError for a GGUF file that transformers would read as another model."""
    import gguf

    if any(tensor.name == "rope_freqs.weight" for tensor in gguf.GGUFReader(path).tensors):
        raise ValueError("it has rope_freqs (Llama 3), which transformers ignores")


def encode_text(tokenizer, text: str) -> list[int]:
    """Token ids of a text, with the BOS that the tokenizer may put first, without a last EOS."""
    ids = tokenizer(text).input_ids
    if ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    return ids


def encode_chat(tokenizer, prompt: str, response: str):
    """(ids, prompt_len): token ids of prompt and response, and how many are the prompt's.

    The prompt goes through the chat template if there is one. The response is encoded on its own,
    so that the border is exact, and gets no EOS.
    """
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        before = tokenizer(text, add_special_tokens=False).input_ids
    else:
        before = encode_text(tokenizer, prompt)
    after = tokenizer(response, add_special_tokens=False).input_ids
    return before + after, len(before)
