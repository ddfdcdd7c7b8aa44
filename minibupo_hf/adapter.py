"""Any decoder-only language model of transformers, with access to its residual stream.

    truncated(lm, layer)   inside this `with`, lm is its own internal policy softmax(H^layer E_u^T)
    HFModel(lm)            the interface that minibupo.py states, for a model of transformers
    load(source)           an HFModel and its tokenizer from a hub name, a directory or a GGUF file
    encode_chat(...)       token ids of a prompt and a response, and where the response begins

Nothing is rewritten: the blocks that run are transformers' own. HFModel compares the parts with the
whole model by numbers when it is made. So an untried model comes out exact, or it is refused. The
same holds for files and texts: what would be read as something else is refused.
"""

import copy
import math
import textwrap
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

    The identity of tensors says which module read what another one wrote. If a norm wrote
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
        self.context_length = context_length(self.decoder.config)
        # a chat model ends its turn with one token, and a text with another
        self.eos_ids = as_list(lm.generation_config.eos_token_id)
        self._check_model()

    def generate(self, prompt, max_new_tokens, *, eos_id=None, **options):
        """LanguageModel's. Unless eos_id is None, eos_ids end a response as well."""
        if eos_id is not None:
            eos_id = as_list(eos_id) + self.eos_ids
        return super().generate(prompt, max_new_tokens, eos_id=eos_id, **options)

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
        _require_finite_weights(self.lm)
        tokens = _some_tokens(self.lm)
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
        changed = tokens.clone()
        changed[0, -1] = 0
        before = self(changed)[:, :-1]
        self._require(theirs[:, :-1], before, "what follows a token changes its logits")

        # An unembedding that caps or scales its logits shows when they are large. Any vectors will
        # do, at a size that spreads their logits by 100.
        probe = torch.arange(float(h.numel())).cos().view(h.shape).to(h)
        probe *= 100 / self.unembed(probe).std()
        with _replaced_forward([self.final_norm], lambda h: probe):
            theirs = self.lm(input_ids=tokens, use_cache=False).logits
        self._require(self.unembed(probe), theirs, "its logits are scaled or capped")

    def _require(self, a, b, what: str):
        require_close(a, b, f"{type(self.lm).__name__} cannot be opened: {what}")


def _some_tokens(lm):
    """Tokens (1, 8) on which a model is checked."""
    return torch.arange(8, device=lm.device)[None] % len(lm.get_output_embeddings().weight)


def require_close(a, b, otherwise: str):
    """Raise ValueError unless a and b are equal to half of the digits of their type.

    Half, because rounding adds up over layers. The tolerance is relative to each number and to the
    median, because a few dimensions of a stream can be 1000 times as large as the others.
    """
    close = torch.finfo(a.dtype).eps ** 0.5
    size = float(a.abs().median())
    if not math.isfinite(size):
        raise ValueError("the model computes numbers that are not finite")
    if a.shape != b.shape or not torch.allclose(a, b, close, close * size):
        raise ValueError(otherwise)


def _require_finite_weights(lm):
    """Raise ValueError if a weight is NaN or infinite."""
    for name, weight in lm.named_parameters():
        if not weight.isfinite().all():
            raise ValueError(f"{name} of {type(lm).__name__} has weights that are not finite")


def require_same_spread(a, b, otherwise: str):
    """Raise ValueError unless a - b is small beside the spread of a.

    This allows for rounding in many logits, of which require_close would judge by the worst.
    """
    if not (a - b).float().std() <= torch.finfo(a.dtype).eps ** 0.5 * a.float().std():
        raise ValueError(otherwise)


def _shallow_copy(module):
    """A copy with the same children, of which it can be given others."""
    copied = copy.copy(module)
    copied._modules = module._modules.copy()  # nn.Module's own dict of children, else shared
    return copied


@torch.no_grad()
def norm_scales(model):
    """The factor (d,) by which the final norm of an HFModel scales each dimension, as measured.

    Its weight would not tell: Gemma scales by 1 + weight, and OLMo's norm has none. The vector has
    a mean of 0 and a size of 1, so that nothing but the scale changes it; a bias falls out.
    """
    h = torch.ones_like(model.lm_head.weight[:1])
    h[:, 1::2] = -1
    return ((model.final_norm(h) - model.final_norm(-h)) / (2 * h))[0]


def as_list(ids) -> list[int]:
    """Token ids as transformers has them, None or one or several, as a list."""
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)


def context_length(config) -> int:
    """The longest sequence that a model reads with one set of positions; 2^31 without a limit."""
    limit = getattr(config, "max_position_embeddings", None) or 2**31
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *rope.values()):  # one set, or one for each kind of attention
        if isinstance(parameters, dict) and parameters.get("rope_type") == "longrope":
            # beyond it all positions are turned otherwise, those before it as well
            limit = min(limit, parameters["original_max_position_embeddings"])
    return limit


class KVCache(dict):
    """transformers' cache under the name that a model gives it, as `generate` handles a cache."""

    def index_select(self, dim, keep):
        for cache in self.values():
            cache.batch_select_indices(keep)
        return self


# ---- what TRL does with a model ------------------------------------------------------------------


def remove_dropout(lm):
    """Set all dropout to 0, because TRL scores responses in training mode.

    With dropout, the first ratios of a batch would not be 1.
    """
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


@torch.no_grad()
def check_for_trl(lm):
    """Raise ValueError for a model that TRL would score otherwise than it is.

    TRL pads prompts on the left and passes no positions. So a model with learned positions, like
    GPT-2, would count them from the padding.
    """
    name = f"{type(lm).__name__} cannot be trained by TRL"
    _require_finite_weights(lm)
    tokens = _some_tokens(lm)
    in_training = lm.train()(input_ids=tokens, use_cache=False).logits
    alone = lm.eval()(input_ids=tokens, use_cache=False).logits
    require_close(alone, in_training, f"{name}: it gives other logits in training mode")

    mask = torch.ones_like(tokens)
    mask[:, :3] = 0
    with truncated(lm, 1):  # in bfloat16, the rounding of many layers would hide the difference
        padded = lm(input_ids=tokens, attention_mask=mask, use_cache=False).logits[:, 3:]
        alone = lm(input_ids=tokens[:, 3:], use_cache=False).logits
    says = "it needs positions that TRL does not pass: padding on the left changes its logits"
    require_same_spread(alone, padded, f"{name}: {says}")


def prepare_to_save(generation_config):
    """Make a generation_config one that transformers will save after the last step.

    Llama 2 and Vicuna have a temperature without do_sample, which transformers refuses to save.
    Raises ValueError if something else is wrong with it.
    """
    try:
        generation_config.validate(strict=True)
    except ValueError:
        generation_config.do_sample = True
        generation_config.validate(strict=True)


# ---- reading a model -----------------------------------------------------------------------------


def load(source, dtype: str = "float32", device="cpu"):
    """(HFModel, tokenizer) from a hub name, a directory, or a .gguf file, read by transformers.

    A PEFT adapter is merged into its base model. Raises ImportError without the extra `hf`, and
    ValueError for what cannot be read.
    """
    lm, tokenizer = load_lm(source, dtype)
    if hasattr(lm, "merge_and_unload"):
        lm = _merged(lm.eval()).requires_grad_(True)
    return HFModel(lm.to(device)), tokenizer


@torch.no_grad()
def _merged(lm):
    """The model that a PeftModel is. Raises ValueError if merging its weights gives another one.

    It does if an adapter changes the embedding, and the unembedding is tied to it.
    """
    _require_finite_weights(lm)
    tokens = _some_tokens(lm)
    wanted = lm(input_ids=tokens, use_cache=False).logits
    lm = lm.merge_and_unload()
    merged = lm(input_ids=tokens, use_cache=False).logits
    require_same_spread(
        wanted, merged, "the adapter cannot be merged into its model: logits change"
    )
    return lm


def load_lm(source, dtype="float32", revision="main", trust_remote_code=False, **options):
    """(transformers' model, tokenizer), not yet opened; `options` are AutoModelForCausalLM's.

    If the source is a PEFT adapter, the model is a PeftModel that can be trained. Raises
    ImportError without the extra `hf`, and ValueError for what cannot be read, or would be read as
    another model.
    """
    path = Path(source)
    try:
        import transformers
        from transformers.utils import has_file

        if path.suffix == ".gguf":
            import gguf  # noqa: F401 - transformers reads such a file with it
    except ImportError as error:
        raise ImportError(f'{error}: pip install -e ".[hf]"') from None
    file = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        if path.suffix == ".gguf":
            file = {"gguf_file": path.name}
            source = str(path.parent)
        elif path.is_file():
            raise ValueError("of single files only a .gguf one can be read")
        elif has_file(str(source), "adapter_config.json", revision=revision):
            if any(path.glob("model*.safetensors")) or any(path.glob("pytorch_model*.bin")):
                raise ValueError("it has a whole model and an adapter: delete one of them")
            return _load_adapter(str(source), dtype, **file, **options)
        tokenizer = _load_tokenizer(source, **file)
        options |= dict(dtype=dtype, output_loading_info=True)
        lm, report = transformers.AutoModelForCausalLM.from_pretrained(source, **file, **options)
        _refuse_keys(report["missing_keys"], report["unexpected_keys"])
        if path.suffix == ".gguf":
            _finish_gguf(path, lm)
    except Exception as error:  # transformers has a class of its own for each kind of damage
        raise ValueError(f"transformers cannot read {path}: {one_line(error)}") from error
    return lm, tokenizer


def _load_adapter(source: str, dtype: str, revision: str, trust_remote_code: bool, **options):
    """(PeftModel that can be trained, tokenizer) of an adapter, on the base model that it names."""
    import peft
    from transformers.utils import has_file

    config = peft.PeftConfig.from_pretrained(source, revision=revision)
    base = config.base_model_name_or_path
    lm, tokenizer = load_lm(base, dtype, config.revision or "main", trust_remote_code, **options)
    given = {"is_trainable": True, "revision": revision}
    lm = peft.PeftModel.from_pretrained(lm, source, **given)
    report = lm.load_adapter(source, "default", **given)  # the same again, now with a report
    _refuse_keys(report.missing_keys, report.unexpected_keys)
    if has_file(source, "tokenizer_config.json", revision=revision):
        file = {"revision": revision, "trust_remote_code": trust_remote_code}
        tokenizer = _load_tokenizer(source, **file)
    return lm, tokenizer


def _load_tokenizer(source, **file):
    """The tokenizer of a model. Raises ValueError if there is none."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(source, **file)
    # without files for it, transformers makes one of special tokens only
    special = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    if special.issuperset(tokenizer.get_vocab()):
        raise ValueError("it has no tokenizer")
    return tokenizer


def _refuse_keys(missing, unexpected):
    """Raise ValueError for weights that the model lacks, or for which it has no place."""
    if missing:
        raise ValueError(f"it has no weights for {sorted(missing)[0]}, which would be random")
    if unexpected:
        raise ValueError(
            f"it has weights {sorted(unexpected)[0]}, for which the model has no place"
        )


# Metadata of a GGUF file that transformers reads for every architecture. If one is wrong, a weight
# has another shape or is missing.
GGUF_READ = {"context_length", "block_count", "embedding_length", "feed_forward_length"}
GGUF_READ |= {"vocab_size", "attention.head_count", "attention.head_count_kv", "expert_count"}
GGUF_READ |= {"expert_used_count", "expert_feed_forward_length"}


def _finish_gguf(path: Path, lm):
    """Make lm, read from a GGUF file, an ordinary model.

    Raises ValueError if the file says more than transformers has read into lm.
    """
    import gguf

    reader = gguf.GGUFReader(path)
    _check_gguf(reader, lm)
    _check_gguf_tokenizer(reader)
    if "tokenizer.ggml.eot_token_id" in reader.fields:  # it ends a turn of a chat
        ends = as_list(lm.generation_config.eos_token_id)
        ends.append(reader.fields["tokenizer.ggml.eot_token_id"].contents())
        lm.generation_config.eos_token_id = sorted(set(ends))
    lm.name_or_path = str(path)  # under which an adapter finds its base model
    # Its weights are already dequantised, but Trainer would still treat them as quantised.
    lm.is_quantized = False
    lm.hf_quantizer = None
    for config in (lm.config, lm.generation_config):
        vars(config).pop("quantization_config", None)


def _check_gguf_tokenizer(reader):
    """Raise ValueError if transformers does not know how a byte-level tokenizer splits a text.

    It would split it as GPT-2 does. "smollm" (SmolLM2) is accepted although it differs: it first
    splits each number into its digits. Older files do not say how they split.
    """
    from transformers.integrations.gguf import gguf_tokenizer_mapping as mapping

    fields = reader.fields
    if "tokenizer.ggml.pre" not in fields or fields["tokenizer.ggml.model"].contents() != "gpt2":
        return
    split = fields["tokenizer.ggml.pre"].contents()
    if split not in {"gpt-2", "smollm", *mapping.GGUF_PRE_TOKENIZER_SPLITS}:
        raise ValueError(f"it says tokenizer.ggml.pre = {split}, which transformers does not read")


def _check_gguf(reader, lm):
    """Raise ValueError if a GGUF file says more than transformers has read into lm."""
    prefix = reader.fields["general.architecture"].contents() + "."
    config = lm.config
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)  # Gemma 3 has one for each kind of attention
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    eps = next((value for name, value in config.to_dict().items() if "eps" in name), None)
    known = {
        "attention.causal": True,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_epsilon": eps,
        "attention.layer_norm_rms_epsilon": eps,
        "attention.sliding_window": getattr(config, "sliding_window", None),
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1)),
        "rope.freq_base": rope.get("rope_theta"),
        "rope.scaling.type": rope.get("rope_type", "default").replace("default", "none"),
        "use_parallel_residual": getattr(config, "use_parallel_residual", None),
    }
    for name, field in reader.fields.items():
        key = name.removeprefix(prefix)
        if not name.startswith(prefix) or key in GGUF_READ:
            continue
        value = field.contents()
        read = known.get(key)
        if isinstance(value, float) and read is not None:  # the file has numbers in float32
            same = math.isclose(value, read, rel_tol=1e-6)
        else:
            same = value == read
        if not same:
            raise ValueError(f"it says {name} = {value}, which transformers does not read")
    given = sum(tensor.n_elements for tensor in reader.tensors)
    places = sum(p.numel() for p in lm.parameters())
    if given != places:
        names = [tensor.name for tensor in reader.tensors if not tensor.name.startswith("blk.")]
        raise ValueError(
            f"its tensors have {given} weights, the model has {places}; outside of the blocks are "
            f"{', '.join(names)}"
        )


# ---- encoding text -------------------------------------------------------------------------------


def encode_text(tokenizer, text: str, special=True) -> list[int]:
    """Token ids of a text, without a last EOS. With `special` the tokenizer may put a BOS first.

    Raises ValueError if they do not decode to this text, or to something that ends with it.
    """
    ids = tokenizer(text, add_special_tokens=special).input_ids
    if special and ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    decoded = _text_of(tokenizer, ids)
    if not decoded.endswith(text):
        raise misread(text, decoded)
    return ids


def misread(text: str, decoded: str) -> ValueError:
    """The error for a text that a tokenizer does not give back, with where the two differ."""
    first = next((i for i, (a, b) in enumerate(zip(text, decoded)) if a != b), 0)
    there = slice(max(0, first - 20), first + 60)
    return ValueError(f"the tokenizer reads {text[there]!r} as {decoded[there]!r}")


def apply_template(tokenizer, messages, **options) -> str:
    """The text of a chat, up to where the response begins; `options` are the chat template's.

    Raises ValueError if the content of a message is not in it, or if the chat template fails.
    """
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"the chat template needs messages with a text, not {message!r}")
    text = _rendered(tokenizer, messages, options)
    # A short content may be in the text by chance. So the place of each is also marked.
    marks = [f"message-{i}-" for i in range(len(messages))]
    marked = [message | {"content": mark} for message, mark in zip(messages, marks)]
    marked = _rendered(tokenizer, marked, options)
    for message, mark in zip(messages, marks):
        if message["content"] not in text or mark not in marked:
            raise ValueError(f"the chat template makes {text!r} of {message['content']!r}")
    return text


def _rendered(tokenizer, messages, options) -> str:
    """What the chat template makes of messages. Raises ValueError if it fails."""
    options = options | dict(tokenize=False, add_generation_prompt=True)
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except Exception as error:  # a template raises what it likes
        raise ValueError(f"the chat template fails: {one_line(error)}") from error


def encode_chat(tokenizer, prompt: str, response: str):
    """(ids, prompt_len): token ids of prompt and response, and how many are the prompt's.

    The prompt goes through the chat template if there is one. The response is encoded on its own,
    so that the border is exact, and gets no EOS. Raises ValueError if the ids do not decode to
    prompt and response as they are given.
    """
    special = not tokenizer.chat_template
    if tokenizer.chat_template:
        prompt = apply_template(tokenizer, [{"role": "user", "content": prompt}])
    before = encode_text(tokenizer, prompt, special)
    wanted = _text_of(tokenizer, before) + response
    ids = before + tokenizer(response, add_special_tokens=False).input_ids
    if _text_of(tokenizer, ids) != wanted:
        # Some tokenizers put a blank before a text. If they encode both at once, it is not between.
        ids = encode_text(tokenizer, prompt + response, special)
    if _text_of(tokenizer, ids) != wanted or ids[: len(before)] != before:
        raise misread(wanted, _text_of(tokenizer, ids))
    return ids, len(before)


def _text_of(tokenizer, ids) -> str:
    """The text of token ids, as exactly as the tokenizer tells."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and backend.decoder is None:  # it would join tokens by blanks
        return "".join(tokenizer.convert_ids_to_tokens(ids))
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def one_line(error: Exception) -> str:
    """What an error says, as one line of at most 1000 characters."""
    said = str(error).strip()
    if isinstance(error, KeyError) or not said:  # a KeyError says only the key
        said = f"{type(error).__name__} {said}".strip()
    return textwrap.shorten(said, 1000, placeholder=" ...")
