"""Any decoder-only language model of transformers, with its residual stream laid open.

    truncated(lm, layer)   inside this `with`, lm is its own internal policy softmax(H^layer E_u^T)
    HFModel(lm)            the whole contract that minibupo.py states, for a model of transformers
    load(source)           an HFModel and its tokenizer from a hub name, a directory or a GGUF file

Nothing is rewritten: the blocks that run are transformers' own. What could be wrong for a model
that nobody has tried is checked by numbers when an HFModel is made. So it comes out exact or is
refused.
"""

from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import nn

from model import GPT, LayerTrace

# ---- the internal policy of a layer, made by taking away what is above it ------------------------


def find_parts(lm):
    """(decoder, blocks, norm) of a causal LM, also inside PEFT: the module that goes from token ids
    to the normed H^L, and the names of its children that are the blocks and the final norm.

    Raises ValueError where they cannot be told."""
    name = type(lm).__name__
    if not hasattr(lm, "get_decoder") or getattr(lm.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is no decoder-only language model of transformers")
    decoder = lm.get_decoder()
    L, children = decoder.config.num_hidden_layers, dict(decoder.named_children())
    blocks = [n for n, m in children.items() if isinstance(m, nn.ModuleList) and len(m) == L]
    # the last one, if several: that it is the final norm HFModel checks
    norms = [n for n in children if "norm" in n or n.startswith("ln_")]
    if len(blocks) != 1 or not norms:
        raise ValueError(f"{name} has no list of {L} blocks with a final norm, or is cut already")
    return decoder, blocks[0], norms[-1]


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
        yield
    finally:
        decoder._modules.update(whole)


# ---- what the modules of a block read and write --------------------------------------------------

ATTENTION = {"self_attn", "attn", "attention", "self_attention"}  # names of a block's two modules
FFN = {"mlp", "feed_forward", "block_sparse_moe", "ffn", "moe"}


@contextmanager
def watching(blocks, found):
    """Inside the `with`, each of the blocks calls found(LayerTrace) when it has run."""
    calls = {}  # of the modules in the block that runs: what each read and wrote, in order

    def module_ran(name, module, args, kwargs, out):
        # transformers calls attention by keyword
        read = args[0] if args else kwargs.get("hidden_states")
        calls[name] = read, out[0] if isinstance(out, tuple) else out

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
    """Tell from the calls of a block's modules what attention and FFN read, and what they add.

    Raises ValueError for a block whose modules have other names, or with more than one result."""
    attention, ffn = calls.keys() & ATTENTION, calls.keys() & FFN
    if not attention or not ffn or isinstance(resid_post, tuple):
        raise ValueError(f"{name} has no attention and FFN by name, or returns more than a stream")
    (attn_in, attn_out), (mlp_in, mlp_out) = calls[attention.pop()], calls[ffn.pop()]
    # If a norm made mlp_in, it read resid_mid. Gemma 2 and OLMo 2 also norm a write before they
    # add it: then what is added is what the norm wrote.
    resid_mid = mlp_in
    for read, wrote in calls.values():
        resid_mid = read if wrote is mlp_in else resid_mid
        attn_out = wrote if read is attn_out else attn_out
        mlp_out = wrote if read is mlp_out else mlp_out
    return LayerTrace(resid_pre, attn_in, attn_out, resid_mid, mlp_in, mlp_out, resid_post)


# ---- the contract --------------------------------------------------------------------------------


class HFModel(GPT):
    """A causal LM of transformers as minibupo.py wants a model, with its weights (no copy).

    Its parts go by GPT's names, and GPT's is all that is not here: how it unembeds, samples and
    checks its input. It is in evaluation mode: a policy has no dropout. Raises ValueError for a
    model whose stream cannot be laid open exactly, as far as its type resolves: parallel blocks,
    logits that are scaled or capped, and others.
    """

    def __init__(self, lm):
        nn.Module.__init__(self)
        decoder, blocks, norm = find_parts(lm)
        self.lm, self.blocks = lm.eval(), decoder._modules[blocks]
        self.final_norm, self.lm_head = decoder._modules[norm], lm.get_output_embeddings()
        self.embed = lm.get_input_embeddings()
        self.cfg = SimpleNamespace(
            n_layer=len(self.blocks),
            vocab_size=len(self.lm_head.weight),
            # without a limit: 2^31
            context_length=getattr(decoder.config, "max_position_embeddings", None) or 2**31,
        )
        self._check_model()

    def residual(self, tokens, layer: int):
        self._check_tokens(tokens)
        return self._decode(tokens, self._check_layer(layer), use_cache=False).last_hidden_state

    def trace(self, tokens):
        """Yield the LayerTrace of layers 1..L, lazily.

        Masks and rotary positions differ from layer to layer in some models. So first the decoder
        runs with blocks that do nothing but note what they are called with."""
        self._check_tokens(tokens)
        calls, found = [], []

        def note(h, *args, **kwargs):
            calls.append((h, args, kwargs))
            return h

        with ExitStack() as patches:
            for block in self.blocks:
                patches.enter_context(patch.object(block, "forward", note))
            self._decode(tokens, self.n_layer, use_cache=False)
        h = calls[0][0]
        for block, (_, args, kwargs) in zip(self.blocks, calls):
            with watching([block], found.append):
                h = block(h, *args, **kwargs)
            yield found.pop()

    def _decode(self, tokens, layer: int, **options):
        with truncated(self.lm, layer):
            return self.lm.get_decoder()(input_ids=tokens, **options)

    def _empty_cache(self, B: int, T: int):
        return KVCache()

    def _next_logits(self, tokens, cache, start: int):
        out = self._decode(tokens, self.n_layer, use_cache=True, **cache)
        name = "cache" if "cache" in out else "past_key_values"  # as it was until transformers 5
        cache[name] = out[name]
        return self.unembed(self.final_norm(out.last_hidden_state[:, -1]))

    @torch.no_grad()
    def _check_model(self):
        """Raise ValueError unless the parts that are laid open make up the model."""
        tokens = torch.arange(8, device=self.device)[None] % self.vocab_size
        with watching(self.blocks, lambda trace: None):  # a block of another kind is told by name
            theirs = self.lm(input_ids=tokens, use_cache=False).logits
        h = self.residual(tokens, 0)
        for l, trace in enumerate(self.trace(tokens), 1):
            self._require(h, trace.resid_pre, f"layer {l} does not read H^{l - 1}")
            mid, post = trace.resid_pre + trace.attn_out, trace.resid_mid + trace.mlp_out
            self._require(mid, trace.resid_mid, f"attention of layer {l} adds something else")
            self._require(post, trace.resid_post, f"the FFN of layer {l} adds something else")
            h = self.residual(tokens, l)
            self._require(h, trace.resid_post, f"layer {l} on its own gives another H^{l}")
        self._require(theirs, self(tokens), "H^L gives other logits")
        # An unembedding that caps or scales its logits shows when they are large. Any vectors will
        # do, at a size that spreads their logits by 100.
        probe = torch.arange(float(h.numel())).cos().view(h.shape).to(h)
        probe *= 100 / self.unembed(probe).std()
        with patch.object(self.final_norm, "forward", lambda h: probe):
            theirs = self.lm(input_ids=tokens, use_cache=False).logits
            self._require(self.unembed(probe), theirs, "its logits are scaled or capped")

    def _require(self, a, b, what: str):
        # Half of the digits, since rounding adds up over layers. Of each number and of the median,
        # for a few dimensions of a stream can be a thousand times as large as the others.
        close = torch.finfo(a.dtype).eps ** 0.5
        if a.shape != b.shape or not torch.allclose(a, b, close, close * float(a.abs().median())):
            raise ValueError(f"{type(self.lm).__name__} cannot be laid open: {what}")


class KVCache(dict):
    """transformers' cache under the name that a model gives it, as GPT.generate handles one."""

    def index_select(self, dim, keep):
        for cache in self.values():
            cache.batch_select_indices(keep)
        return self


# ---- reading a model, and encoding text for it ---------------------------------------------------


def load(source, dtype: str = "float32", device="cpu"):
    """(HFModel, tokenizer) of a hub name, a directory, or a .gguf file, read by transformers.

    Raises ImportError without the extra `hf`, and ValueError for what cannot be read."""
    lm, tokenizer = load_lm(source, dtype)
    return HFModel(lm.to(device)), tokenizer


def load_lm(source, dtype: str = "float32", revision="main", **options):
    """(transformers' model, tokenizer), unchecked; `options` are AutoModelForCausalLM's."""
    try:
        import gguf
        import transformers
    except ImportError as error:
        raise ImportError(f'{error}: pip install -e ".[hf]"') from None
    path, file = Path(source), {"revision": revision}
    try:
        if path.suffix == ".gguf":
            if any(tensor.name == "rope_freqs.weight" for tensor in gguf.GGUFReader(path).tensors):
                raise ValueError("it has rope_freqs (Llama 3), which transformers ignores")
            source, file["gguf_file"] = str(path.parent), path.name
        elif path.is_file():
            raise ValueError("of single files only a .gguf one can be read")
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **file)
        options |= dict(dtype=dtype, output_loading_info=True)
        lm, report = transformers.AutoModelForCausalLM.from_pretrained(source, **file, **options)
    except Exception as error:  # transformers and its readers have one for each kind of damage
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"transformers cannot read {path}: {reason}") from error
    if report["missing_keys"]:
        name = sorted(report["missing_keys"])[0]
        raise ValueError(f"{path} has no weights for {name}, which would be random")
    if "gguf_file" in file:  # its weights are quantised no more, but Trainer would think so
        lm.is_quantized, lm.hf_quantizer = False, None
        for config in (lm.config, lm.generation_config):
            vars(config).pop("quantization_config", None)
    return lm, tokenizer


def encode_text(tokenizer, text: str) -> list[int]:
    """Token ids of a text, with the BOS that the tokenizer may put first, without a last EOS."""
    ids = tokenizer(text).input_ids
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def encode_chat(tokenizer, prompt: str, response: str):
    """(ids, prompt_len): token ids of prompt and response, and how many are the prompt's.

    The prompt goes through the chat template if there is one. The response is encoded on its own,
    so that the border is exact, and gets no EOS."""
    before = encode_text(tokenizer, prompt)
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        before = tokenizer(text, add_special_tokens=False).input_ids
    return before + tokenizer(response, add_special_tokens=False).input_ids, len(before)
