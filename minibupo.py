"""Bottom-up Policy Optimization (BuPO, arXiv 2512.19673): the whole method in one file.

Each layer of a language model adds to a running sum, the residual stream: H^0, H^1, ..., H^L. Any
of them can be unembedded, softmax(H^l E_u^T), with the unembedding matrix E_u. That is a policy,
the internal policy of layer l. BuPO first trains the policy of one lower layer (chosen by 2) with
GRPO for s_inter steps (phase 1, "InterGRPO"), then the whole model (phase 2, plain GRPO).

    1  internal policies             Eq. 5-7         Policy, policy_logits, token_logprobs
    2  entropy, and where to start   Eq. 8, 14       entropy, target_layer
    3  GRPO's two pieces             Eq. 4           group_advantages, surrogate
    4  InterGRPO                     Eq. 10          policy_loss
    5  BuPO                          Eq. 11, 15, 16  Algorithm 1: phases; one step of it: update
    6  measures                      Eq. 8, 9, 13    look_inside, pass_at_k
    7  checks of what is passed in                   skip on first reading

This file and analyze.py need the following of a model. model.GPT provides it, and so does
minibupo_hf/adapter.py for the models of transformers.

    model(tokens)                  logits (B, T, V) of pi_theta: unembed(final_norm(H^L))
    model.residual(tokens, layer)  H^layer (B, T, d) from `layer` blocks; H^0 is the embedding
    model.trace(tokens)            lazily, the LayerTrace of layers 1..L: what each reads and writes
                                   (B, T, d), resid_pre attn_in attn_out resid_mid mlp_in mlp_out
                                   resid_post
    model.unembed(h)               h E_u^T, without the final norm
    model.final_norm(h)            the final norm
    model.n_layer, model.vocab_size, model.device, model.parameters(), model.eval()
    model.generate(prompt, max_new_tokens, ...)    samples: tokens, prompt_len, end as in Rollouts
    model.truncated(layer)         the internal policy of a layer as a model of its own

Shapes: Q questions, G responses to each, N = Q G rows (responses to one question are neighbours),
B rows of any kind, T tokens, V vocabulary, d width, L layers, M response positions of all rows.
"""

from itertools import islice
from math import comb, isfinite
from typing import NamedTuple

import numpy as np
import torch

from model import at_least_float32


def response_mask(prompt_len, end, T: int):
    """Which positions predict a token of the response: (N, T-1) bool, from prompt_len, end (N,).

    Logits at position t are about token t + 1, so column t is about token t + 1. The row
    "1+2=3<eos>", padded to T = 8, has prompt_len 4 and end 6:

        t             0      1      2      3      4      5      6      7
        token         1      +      2      =      3    <eos>  <pad>  <pad>
        predicts      +      2      =      3    <eos>  <pad>  <pad>
        mask        False  False  False  True   True   False  False
    """
    t = torch.arange(T - 1, device=end.device)
    return (t >= prompt_len[:, None] - 1) & (t < end[:, None] - 1)


# ---- 1. Internal policies (Eq. 5, 6, 7) --------------------------------------------------------
# Eq. 5: the stream is a sum, H^l = H^0 + A^1 + F^1 + ... + A^l + F^l, of what attention (A) and FFN
# (F) of each layer write. All its terms are vectors of the space that E_u reads. So each partial
# sum and each term gives a distribution over the vocabulary.


class Policy(NamedTuple):
    """Which policy: pi_theta itself (layer None), or an internal one.

    Policy(), named FULL      pi_theta    = softmax(final_norm(H^L) E_u^T)
    Policy(l)                 pi_Layer^l  = softmax(H^l E_u^T)   Eq. 6
    Policy(l, "attn_out")     pi_ATTN^l   = softmax(A^l E_u^T)   Eq. 7
    Policy(l, "mlp_out")      pi_FFN^l    = softmax(F^l E_u^T)   Eq. 7

    Internal policies have no final norm. So Policy(L) is not FULL, and Policy(l) is not the "logit
    lens", softmax(final_norm(H^l) E_u^T).
    """

    layer: int | None = None
    site: str = "resid_post"


FULL = Policy()  # pi_theta
SITES = ("resid_post", "attn_out", "mlp_out")


def policy_logits(model, tokens, policy=FULL, mask=None):
    """Logits (B, T, V) of a policy for tokens (B, T), or (M, V) at the positions of mask (B, T).

    Layers above policy.layer are not computed, so they get no gradient. Raises ValueError for a
    layer or site that the model does not have.
    """
    require_choice("site", policy.site, SITES)
    if mask is not None:
        require_mask(mask, tokens.shape)
    layer, site = policy

    if policy == FULL:
        h = model.final_norm(model.residual(tokens, model.n_layer))
    elif site == "resid_post":
        h = model.residual(tokens, layer)  # H^l
    elif layer not in range(1, model.n_layer + 1):
        raise ValueError(f"layer must be in 1..{model.n_layer} for {site}, not {layer}")
    else:
        trace = next(islice(model.trace(tokens), layer - 1, None))
        h = getattr(trace, site)  # A^l or F^l
    return model.unembed(h if mask is None else h[mask])


def token_logprobs(model, tokens, mask, policy=FULL, temperature=1.0):
    """log pi(tokens[:, t+1] | tokens[:, :t+1]) of a policy: (N, T-1), 0 outside mask (N, T-1).

    All logits, also those of internal policies, are divided by the temperature of the sampling.
    Raises ValueError unless mask has this shape and temperature is above 0.
    """
    require_mask(mask, (len(tokens), tokens.shape[-1] - 1))
    require_positive(temperature=temperature)
    logits = policy_logits(model, tokens[:, :-1], policy, mask)  # (M, V)
    log_pi = (at_least_float32(logits) / temperature).log_softmax(-1)
    chosen = tokens[:, 1:][mask]  # (M,)
    logp = log_pi.gather(-1, chosen[:, None]).squeeze(-1)  # (M,)
    return logp.new_zeros(mask.shape).masked_scatter(mask, logp)


# ---- 2. Entropy, and the layer to start from (Eq. 8, 14) ---------------------------------------


def entropy(logits):
    """Entropy in nats, -sum_j pi_j log pi_j with pi = softmax(logits): (..., V) -> (...). Eq. 8."""
    z = at_least_float32(logits)
    # exp(-87) is negligible. Smaller values are subnormal, hence slow, and a logit of -inf would
    # give 0 * -inf = NaN.
    z = (z - z.amax(-1, keepdim=True)).clamp(min=-87)
    total = z.exp().sum(-1, keepdim=True)
    pi = z.exp() / total
    log_pi = z - total.log()  # more accurate than log_softmax for a large vocabulary
    return -(pi * log_pi).sum(-1)


def target_layer(dH_mlp) -> int:
    """The layer of phase 1: the last l below the top whose FFN raises entropy, dH_FFN^l > 0.

    dH_mlp (L,) is the mean over positions, look_inside(...)["dH_mlp"].mean(1). Raises ValueError if
    no FFN below the top raises entropy (for this case the paper has no rule), and for NaN.
    """
    changes = [float(change) for change in dH_mlp]
    values = " ".join(f"{change:.2f}" for change in changes)
    if not all(map(isfinite, changes)):
        raise ValueError(f"dH of the FFNs must be finite, not {values}")
    raising = [l for l, change in enumerate(changes[:-1], 1) if change > 0]
    if not raising:
        raise ValueError(f"the rule picks no layer, as no FFN below the top has dH > 0: {values}")
    return raising[-1]


# ---- 3. GRPO's two pieces (Eq. 4) --------------------------------------------------------------

ADVANTAGES = ("grpo", "rloo", "reinforce++")
AVERAGES = ("token", "sequence")


def group_advantages(rewards, kind: str = "grpo", eps: float = 1e-6):
    """Advantages (Q, G): how much better each response is than the others, from rewards (Q, G).

    "grpo"         (R - mean) / (std + eps) of its group. As in the official code, std is unbiased
                   and eps is 1e-6: [1, 0, 0, 0] gives [1.5, -0.5, -0.5, -0.5]
    "rloo"         R - mean of the others in its group (Ahmadian et al. 2024): [1, -1/3, -1/3, -1/3]
    "reinforce++"  (R - mean) / (std + eps) of the whole batch, without groups (Hu 2025)

    They are exactly 0 if all rewards of the group (or batch) are equal. Raises ValueError for
    another kind, for G < 2, and for a reward that is NaN or infinite.
    """
    require_choice("kind of advantage", kind, ADVANTAGES)
    require_positive(eps=eps)
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be (questions, 2 or more), not {tuple(rewards.shape)}")
    rewards = at_least_float32(rewards)

    over = (0, 1) if kind == "reinforce++" else 1  # the whole batch, or a group
    centred = rewards - rewards.mean(over, keepdim=True)
    if kind == "rloo":
        G = rewards.shape[1]
        scale = (G - 1) / G  # R - mean of all = (G - 1) / G * (R - mean of the others)
    else:
        scale = rewards.std(over, keepdim=True) + eps
    # not "std == 0", which rounding can miss
    equal = rewards.amax(over, keepdim=True) == rewards.amin(over, keepdim=True)
    advantages = torch.where(equal, 0.0, centred / scale)
    finite = rewards.isfinite() & advantages.isfinite()
    if not finite.all():
        raise ValueError(f"rewards must be finite, and not huge: {rewards[~finite][0]}")
    return advantages


def surrogate(logp, old_logp, advantages, mask, *, clip=0.2, average="token", normalizer=None):
    """(loss, clipped): the clipped surrogate of Eq. 4, negated, and how many tokens it clips.

    logp, old_logp, mask (N, T-1); advantages (N,). With ratio = exp(logp - old_logp), the objective
    of a token is min(ratio * advantage, clip(ratio, 1 - clip, 1 + clip) * advantage). The loss is
    minus its average:

        average="token"     over all tokens of all responses: the official scripts, our default
        average="sequence"  over the tokens of a response, then over responses: Eq. 4 as printed

    `normalizer` is the number of tokens (or responses) of the whole mini-batch, if these rows are
    only a part of it.

    A token is clipped if the clip takes its gradient away: advantage > 0 and ratio > 1 + clip, or
    advantage < 0 and ratio < 1 - clip. The log-ratio is kept within +-20, as in the official code,
    to avoid overflow in exp. So a token with advantage < 0 and log-ratio > 20 is clipped, too.
    Raises ValueError for other shapes, another average, or clip <= 0.
    """
    require_choice("average", average, AVERAGES)
    require_positive(clip=clip)
    require_shape("logp", logp, (len(advantages), mask.shape[-1]))
    require_shape("old_logp", old_logp, logp.shape)
    require_shape("advantages", advantages, logp.shape[:1])
    require_mask(mask, logp.shape)

    advantages = advantages.detach()[:, None]
    log_ratio = torch.where(mask, logp - old_logp.detach(), 0.0)
    ratio = log_ratio.clamp(-20, 20).exp()
    objective = torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages) * mask

    if average == "token":
        total = objective.sum() / (mask.sum() if normalizer is None else normalizer)
    else:
        per_row = objective.sum(1) / mask.sum(1).clamp(min=1)
        total = per_row.sum() / (len(mask) if normalizer is None else normalizer)

    too_high = (advantages > 0) & (ratio > 1 + clip)
    too_low = (advantages < 0) & ((ratio < 1 - clip) | (log_ratio > 20))
    clipped = (too_high | too_low) & mask
    return -total, clipped.sum()


# ---- 4. InterGRPO (Eq. 10) ---------------------------------------------------------------------


def policy_loss(
    model,
    tokens,
    old_logp,
    advantages,
    mask,
    policy=FULL,
    temperature=1.0,
    *,
    clip=0.2,
    average="token",
    normalizer=None,
):
    """(loss, clipped) of GRPO (Eq. 4) for FULL, of InterGRPO (Eq. 10) for an internal policy.

    Only the policy differs. Numerator *and* denominator of the ratio belong to the same policy:
    old_logp (N, T-1) is what `policy` gave the tokens before the first optimizer step on this
    batch. Returns what surrogate does, which explains the options.
    """
    logp = token_logprobs(model, tokens, mask, policy, temperature)
    return surrogate(
        logp, old_logp, advantages, mask, clip=clip, average=average, normalizer=normalizer
    )


# ---- 5. BuPO (Eq. 11): Algorithm 1 -------------------------------------------------------------


class Rollouts(NamedTuple):
    """One batch: Q questions with G responses each, sampled from pi_theta; N = Q G rows.

    Row i holds its prompt in tokens[i, :prompt_len[i]], its response with EOS in
    tokens[i, prompt_len[i]:end[i]], then padding: any token ids, since attention is causal.
    """

    tokens: torch.Tensor  # (N, T)
    prompt_len: torch.Tensor  # (N,)
    end: torch.Tensor  # (N,)
    rewards: torch.Tensor  # (Q, G)


def phases(optimizer, target: Policy, s_inter: int, steps: int, *, start=1, reset_moments=True):
    """Yield (step, policy) for the steps start..steps of Algorithm 1: which policy each trains.

        for step, policy in phases(optimizer, Policy(3), s_inter=5, steps=60):
            rollouts = sample(model)     # questions, G responses to each, rewards
            log = update(model, optimizer, rollouts, policy)

    Steps up to s_inter are phase 1 and train `target`; the others train pi_theta (Eq. 11). With
    s_inter = 0 this is GRPO. In both phases the responses are sampled from pi_theta as it is now.
    Phase 1 therefore trains the internal policy on samples of another policy. The ratio does not
    correct for that, because both its parts are the internal policy, after and before the optimizer
    steps of this batch.

    Immediately before step s_inter + 1 the state of AdamW is reset. The official code does not
    reset it (reset_moments=False). `start` resumes a run. Raises ValueError, at its first step, for
    s_inter that is no integer >= 0, or start < 1.
    """
    if s_inter % 1 or s_inter < 0 or start < 1:
        raise ValueError(f"s_inter must be in 0, 1, .., start in 1, 2, .., not {s_inter}, {start}")
    for step in range(start, steps + 1):
        if step == s_inter + 1 and s_inter > 0 and reset_moments:
            # The gradient of phase 1 is several times larger. Moments that remember it would make
            # the first steps of phase 2 too small.
            optimizer.state.clear()
        yield step, target if step <= s_inter else FULL


def update(
    model,
    optimizer,
    rollouts: Rollouts,
    policy=FULL,
    *,
    minibatches=4,
    advantage="grpo",
    average="token",
    clip=0.2,
    temperature=1.0,
    max_grad_norm=1.0,
    chunk=64,
):
    """Improve a policy on one batch: one pass over it, an optimizer step for each mini-batch.

    What learns (Eq. 15, 16): FULL trains every weight. pi_Layer^l and pi_FFN^l train the embedding,
    layers 1..l and E_u; pi_ATTN^l the same without the FFN of layer l. The layers above and the
    final norm get no gradient. Their .grad stays None, so neither weight decay nor momentum moves
    them in phase 1. Parameters that the optimizer does not hold are left alone, .grad included.
    The model is put into eval(), because dropout would make the ratios random.

    `temperature` is that of the sampling, `advantage` is group_advantages' kind, `average` and
    `clip` are surrogate's. `chunk` rows go through the model at a time; the gradient does not
    depend on it. Mini-batches take the questions in order, so these should be in random order.

    Returns {"clip_fraction": clipped tokens / all response tokens, "grad_norm": before clipping,
    mean over optimizer steps, "optimizer_steps"}. Raises ValueError for rollouts or options that do
    not fit, before any weight changes, and FloatingPointError before an optimizer step whose loss
    or gradient is not finite.
    """
    require_rollouts(rollouts)
    require_choice("average", average, AVERAGES)
    require_positive(temperature=temperature, clip=clip, max_grad_norm=max_grad_norm, chunk=chunk)
    Q, G = rollouts.rewards.shape
    if minibatches not in range(1, Q + 1):
        raise ValueError(f"minibatches must be in 1..{Q}, the questions, not {minibatches}")
    parameters = parameters_to_train(model, optimizer)
    device = rollouts.tokens.device
    advantages = group_advantages(rollouts.rewards, advantage).flatten().to(device)  # (N,)
    lengths = rollouts.end - rollouts.prompt_len  # (N,) tokens of each response
    model.eval()

    # 1. Cut the batch into mini-batches of questions, and these into chunks of rows. A row with
    #    advantage 0 has no gradient: it counts in the normalizer but is not computed.
    batches = []
    for questions in torch.arange(Q * G, device=device).view(Q, G).tensor_split(minibatches):
        rows = questions.flatten()
        normalizer = lengths[rows].sum() if average == "token" else len(rows)
        rows = rows[advantages[rows] != 0]
        batches.append((list(chunks_of(rollouts, rows, chunk)), normalizer))

    # 2. The old log-probabilities, before any weight moves. They are computed on the same chunks as
    #    the gradient, so that all ratios of the first mini-batch are exactly 1.
    old_logp = []
    with torch.no_grad():
        for chunks, _ in batches:
            old_logp.append(
                [token_logprobs(model, c.tokens, c.mask, policy, temperature) for c in chunks]
            )

    # 3. An optimizer step for each mini-batch.
    clipped = 0
    norms = []
    for (chunks, normalizer), old in zip(batches, old_logp):
        if not chunks:  # all advantages are 0: AdamW would move the weights by momentum alone
            continue
        optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        for (rows, tokens, mask), old_of_chunk in zip(chunks, old):
            part, n = policy_loss(
                model,
                tokens,
                old_of_chunk,
                advantages[rows],
                mask,
                policy,
                temperature,
                clip=clip,
                average=average,
                normalizer=normalizer,
            )
            if part.requires_grad:
                part.backward(inputs=parameters)
            loss += part.detach()
            clipped += n
        if all(p.grad is None for p in parameters):
            raise ValueError(
                "no gradient reaches the parameters of the optimizer: they are not part of this "
                "policy, or gradients are disabled"
            )
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        if not torch.isfinite(loss + norm):
            raise FloatingPointError(f"loss {loss} or gradient norm {norm} is not finite")
        optimizer.step()
        torch.clear_autocast_cache()  # under autocast it still holds the weights from before
        norms.append(norm)

    return {
        "clip_fraction": int(clipped) / int(lengths.sum()),
        "grad_norm": float(torch.stack(norms).mean()) if norms else 0.0,
        "optimizer_steps": len(norms),
    }


class Chunk(NamedTuple):
    """Rows of a mini-batch that go through the model together, as wide as the longest of them."""

    rows: torch.Tensor  # (B,) which rows of the batch
    tokens: torch.Tensor  # (B, T)
    mask: torch.Tensor  # (B, T-1) response_mask


def chunks_of(rollouts: Rollouts, rows, size: int):
    """Yield the rows as Chunks of at most `size`, sorted by length so that little is padding."""
    rows = rows[rollouts.end[rows].argsort()]
    for i in range(0, len(rows), size):
        part = rows[i : i + size]
        end = rollouts.end[part]
        T = int(end.max())
        yield Chunk(
            part, rollouts.tokens[part, :T], response_mask(rollouts.prompt_len[part], end, T)
        )


def parameters_to_train(model, optimizer) -> list:
    """The parameters that the optimizer holds and that are not frozen.

    Raises ValueError if none of them is the model's: the optimizer belongs to another model, or to
    a copy."""
    held = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if {id(p) for p in held}.isdisjoint(id(p) for p in model.parameters()):
        raise ValueError("the optimizer holds no parameter of this model, or only frozen ones")
    return held


# ---- 6. Measures -------------------------------------------------------------------------------


@torch.no_grad()
def look_inside(model, tokens, mask, chunk: int | None = None) -> dict:
    """Everything that is measured by layer, at the M response positions of mask (N, T-1).

    Returns a dict of tensors (L, M). Those with a + are (L+1, M), H^0 first. Entropies in nats.

        layer+ attn mlp    entropy of the internal policies of H^l, A^l, F^l (Eq. 6-8)
        attn_in mlp_in     entropy of what attention and FFN read, which is the *normed* stream
        dH_attn dH_mlp     entropy change of Eq. 13, 14: attn - attn_in and mlp - mlp_in. The paper
                           reads > 0 as exploration, about 0 as integration, < 0 as convergence
        dH_layer           entropy change of Eq. 9: of H^l minus that of H^{l-1}, both raw
        layer_normed+      entropy of the logit lens, softmax(final_norm(H^l) E_u^T); the last row
                           is that of pi_theta
        layer_matched+     entropy of the policy of H^l scaled to the norm of H^L, as if the stream
                           did not grow
        cos_layer+         cos(H^l, H^L), feature refinement (Fig. 5)
        cos_attn cos_mlp   cosine of a write with the stream that it is added to (Appendix B.2):
                           about 0 writes new features, < 0 suppresses, > 0 amplifies
        rms_layer+ rms_attn rms_mlp    root mean square of H^l, A^l, F^l over d

    `chunk` positions are unembedded at a time (None: as many as make 2^24 logits), so the memory
    for logits does not grow with layers or positions. The model is put into eval(). Raises
    ValueError for a mask that is empty or has another shape.
    """
    require_mask(mask, (len(tokens), tokens.shape[-1] - 1))
    if not mask.any():
        raise ValueError("there are no response positions to look at")
    chunk = chunk or max(1, 2**24 // model.vocab_size)
    tokens = tokens[:, :-1]
    model.eval()
    top = model.residual(tokens, model.n_layer)[mask]  # H^L (M, d)

    measured = []  # one dict for H^0, then one for each layer
    for trace in model.trace(tokens):
        at = trace._make(h[mask] for h in trace)  # the LayerTrace at the positions, each (M, d)
        if not measured:
            measured.append(measure_stream(model, at.resid_pre, top, chunk))
        attn = measure_module(model, "attn", at.attn_in, at.attn_out, at.resid_pre, chunk)
        mlp = measure_module(model, "mlp", at.mlp_in, at.mlp_out, at.resid_mid, chunk)
        measured.append(attn | mlp | measure_stream(model, at.resid_post, top, chunk))

    found = {}
    for name in measured[-1]:
        found[name] = torch.stack([layer[name] for layer in measured if name in layer])
    found["dH_attn"] = found["attn"] - found["attn_in"]
    found["dH_mlp"] = found["mlp"] - found["mlp_in"]
    found["dH_layer"] = found["layer"][1:] - found["layer"][:-1]
    return found


def measure_stream(model, h, top, chunk: int) -> dict:
    """What look_inside measures of the stream h = H^l (M, d), given H^L as `top` (M, d)."""
    top_norm = torch.linalg.vector_norm(top, dim=-1, keepdim=True)
    matched = torch.nn.functional.normalize(h, dim=-1) * top_norm
    return {
        "layer": entropy_of(model, h, chunk),
        "layer_normed": entropy_of(model, model.final_norm(h), chunk),
        "layer_matched": entropy_of(model, matched, chunk),
        "cos_layer": cosine(h, top),
        "rms_layer": rms(h),
    }


def measure_module(model, name: str, read, written, stream, chunk: int) -> dict:
    """What look_inside measures of a module that reads `read`, and adds `written` to `stream`."""
    return {
        f"{name}_in": entropy_of(model, read, chunk),
        name: entropy_of(model, written, chunk),
        f"cos_{name}": cosine(written, stream),
        f"rms_{name}": rms(written),
    }


def entropy_of(model, h, chunk: int):
    """Entropy (M,) of softmax(h E_u^T) for vectors h (M, d), unembedding `chunk` at a time."""
    return torch.cat([entropy(model.unembed(part)) for part in h.split(chunk)])


def cosine(a, b):
    """Cosine similarity (M,) of vectors a and b (M, d)."""
    return torch.cosine_similarity(at_least_float32(a), at_least_float32(b), dim=-1)


def rms(h):
    """Root mean square (M,) of vectors h (M, d)."""
    return at_least_float32(h).square().mean(-1).sqrt()


def pass_at_k(n: int, c, k: int):
    """Unbiased Pass@K, 1 - C(n-c, k) / C(n, k): the chance that one of k samples is correct.

    c is how many of a problem's n samples are correct, or an array of such counts. Returns float64
    of the same shape. Raises ValueError unless 1 <= k <= n, 0 <= c <= n, and all are integers.
    """
    counts = np.asarray(c, dtype=float)
    if not 1 <= k <= n or not np.isin(counts, range(n + 1)).all():
        raise ValueError(f"1 <= k <= n and c in 0..n must hold, not k = {k}, n = {n}, c = {c}")
    table = [1 - comb(n - correct, k) / comb(n, k) for correct in range(n + 1)]
    return np.array(table)[counts.astype(int)]


# ---- 7. Checks of what is passed in: skip on first reading ---------------------------------------


def require_shape(name: str, tensor, shape):
    """Raise ValueError unless the tensor has this shape: others would broadcast in silence."""
    if tensor.shape != tuple(shape):
        raise ValueError(f"{name} must have the shape {tuple(shape)}, not {tuple(tensor.shape)}")


def require_mask(mask, shape):
    """Raise ValueError unless the mask has this shape and is boolean: integers would be indices."""
    require_shape("mask", mask, shape)
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be of type torch.bool, not {mask.dtype}")


def require_rollouts(rollouts: Rollouts):
    """Raise ValueError unless all shapes fit, and each row has a prompt, then its response."""
    tokens, prompt_len, end, rewards = rollouts
    if tokens.dim() != 2:
        raise ValueError(f"tokens must have the shape (N, T), not {tuple(tokens.shape)}")
    N, T = tokens.shape
    require_shape("prompt_len", prompt_len, (N,))
    require_shape("end", end, (N,))
    if rewards.dim() != 2 or rewards.numel() != N:
        raise ValueError(f"rewards must be (Q, G) with Q G = {N} rows, not {tuple(rewards.shape)}")
    if not ((1 <= prompt_len) & (prompt_len < end) & (end <= T)).all():
        raise ValueError(f"1 <= prompt_len < end <= {T} must hold in every row")


def require_choice(name: str, value, choices):
    """Raise ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def require_positive(**values):
    """Raise ValueError unless all values are above 0."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be above 0, not {value}")
