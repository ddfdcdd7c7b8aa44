"""Bottom-up Policy Optimization (BuPO, arXiv 2512.19673): the whole method in one file.

A language model adds up its residual stream layer by layer: H^0, H^1, ..., H^L. Any of them can be
unembedded, softmax(H^l E_u^T), with E_u the unembedding matrix. That is a policy, the internal
policy of layer l. BuPO trains it with GRPO for s_inter steps (phase 1, "InterGRPO"), then the whole
model (phase 2, GRPO).

    1  internal policies             Eq. 5-7         Policy, policy_logits, token_logprobs
    2  entropy, and where to start   Eq. 8, 14       entropy, target_layer
    3  GRPO's two pieces             Eq. 4           group_advantages, surrogate
    4  InterGRPO                     Eq. 10          policy_loss
    5  BuPO                          Eq. 11, 15, 16  Algorithm 1: bupo; one step of it: update
    6  measures                      Eq. 8, 9, 13    look_inside, pass_at_k

What this file and analyze.py need of a model, as model.GPT and minibupo_hf/adapter.py have it:

    model(tokens)                  logits (B, T, V) of pi_theta: unembed(final_norm(H^L))
    model.residual(tokens, layer)  H^layer (B, T, d) from `layer` blocks; H^0 is the embedding
    model.trace(tokens)            lazily, for layers 1..L, what each reads and writes (B, T, d):
                                   resid_pre attn_in attn_out resid_mid mlp_in mlp_out resid_post
    model.unembed(h)               h E_u^T, without the final norm; model.final_norm(h), that norm
    model.n_layer, model.vocab_size, model.device, model.parameters()
    model.generate(prompt, max_new_tokens, ...)    samples: tokens, prompt_len, end as in Rollouts
    model.truncated(layer)         the internal policy of a layer as a model of its own

Shapes: Q questions, G responses to each, N = Q G rows (responses to one question are neighbours),
B rows of any kind, T tokens, V vocabulary, d width, L layers, M response positions of all rows.
"""

from collections import defaultdict
from itertools import islice
from math import comb
from typing import NamedTuple

import numpy as np
import torch


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
# (F) of each layer write. All its terms live in the space that E_u reads. So each partial sum and
# each term gives a distribution over the vocabulary.


class Policy(NamedTuple):
    """Which policy: pi_theta itself (layer None), or an internal one. LN_f is the final norm.

    Policy(), named FULL      pi_theta    = softmax(LN_f(H^L) E_u^T)
    Policy(l)                 pi_Layer^l  = softmax(H^l E_u^T)   Eq. 6
    Policy(l, "attn_out")     pi_ATTN^l   = softmax(A^l E_u^T)   Eq. 7
    Policy(l, "mlp_out")      pi_FFN^l    = softmax(F^l E_u^T)   Eq. 7

    Internal policies have no final norm: Policy(L) is not FULL, nor Policy(l) the "logit lens".
    """

    layer: int | None = None
    site: str = "resid_post"


FULL = Policy()  # pi_theta
SITES = ("resid_post", "attn_out", "mlp_out")


def policy_logits(model, tokens, policy=FULL, positions=None):
    """Logits (B, T, V) of a policy for tokens (B, T), or (M, V) at positions of tokens.flatten().

    Layers above policy.layer are not computed, so they get no gradient. Raises ValueError for a
    layer or site that the model does not have.
    """
    layer, site = policy
    if site not in SITES:
        raise ValueError(f"site must be one of {', '.join(SITES)}, not {site!r}")
    if layer is None and site == "resid_post":
        logits = model(tokens)
        return logits if positions is None else logits.flatten(0, 1)[positions]
    if site == "resid_post":
        h = model.residual(tokens, layer)  # H^l
    elif layer is None or not 1 <= layer <= model.n_layer:
        raise ValueError(f"layer must be in 1..{model.n_layer} for {site}, not {layer}")
    else:
        h = getattr(next(islice(model.trace(tokens), layer - 1, None)), site)  # A^l or F^l
    return model.unembed(h if positions is None else h.flatten(0, 1)[positions])


def token_logprobs(model, tokens, mask, policy=FULL, temperature=1.0):
    """log pi(tokens[:, t+1] | tokens[:, :t+1]) of a policy: (N, T-1), 0 outside mask (N, T-1).

    Logits, also those of internal policies, are divided by the temperature of the sampling.
    """
    positions = mask.flatten().nonzero()[:, 0]  # (M,)
    logits = policy_logits(model, tokens[:, :-1], policy, positions)  # (M, V)
    chosen = tokens[:, 1:].flatten()[positions]  # (M,)
    log_pi = (at_least_float32(logits) / temperature).log_softmax(-1)
    logp = log_pi.gather(-1, chosen[:, None])[:, 0]  # (M,)
    return logp.new_zeros(mask.numel()).index_copy(0, positions, logp).view(mask.shape)


def at_least_float32(x):
    """x itself, or in float32 if its type is narrower: bfloat16 is too coarse for a softmax."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- 2. Entropy, and the layer to start from (Eq. 8, 14) ---------------------------------------


def entropy(logits):
    """Eq. 8: -sum_j pi_j log pi_j of pi = softmax(logits), in nats: (..., V) -> (...)."""
    z = at_least_float32(logits)
    # e^-87 weighs nothing. Below, e^z is subnormal and slow, and 0 log 0 (of a logit -inf) is NaN.
    z = (z - z.amax(-1, keepdim=True)).clamp(min=-87)
    total = z.exp().sum(-1, keepdim=True)
    pi, log_pi = z.exp() / total, z - total.log()  # over a large vocabulary finer than log_softmax
    return -(pi * log_pi).sum(-1)


def target_layer(d_mlp) -> int:
    """The layer of phase 1: the last l below the top whose FFN raises entropy, dH_FFN^l > 0.

    H is entropy here, not the stream. d_mlp (L,): look_inside(...)["d_mlp"].mean(1). Raises
    ValueError where no FFN below the top raises entropy, for which the paper has no rule.
    """
    raising = [l for l, d in enumerate(d_mlp[:-1], 1) if d > 0]
    if not raising:
        values = " ".join(f"{float(d):.2f}" for d in d_mlp)
        raise ValueError(f"the rule names no layer, for no FFN below the top has dH > 0: {values}")
    return raising[-1]


# ---- 3. GRPO's two pieces (Eq. 4) --------------------------------------------------------------

ADVANTAGES = ("grpo", "rloo", "reinforce++")


def group_advantages(rewards, kind: str = "grpo", eps: float = 1e-6):
    """How much better each response is than others, from rewards (Q, G); the same shape.

    "grpo"         (R - mean) / (std + eps) of its group. As in the official code std is unbiased
                   and eps 1e-6: [1, 0, 0, 0] gives [1.5, -0.5, -0.5, -0.5]
    "rloo"         R - mean of the others in its group (Ahmadian et al. 2024): [1, -1/3, -1/3, -1/3]
    "reinforce++"  (R - mean) / (std + eps) of the whole batch, whatever the group (Hu 2025)

    Exactly 0 where all these rewards are equal. Raises ValueError for another kind, or G < 2.
    """
    if kind not in ADVANTAGES:
        raise ValueError(f"kind of advantage must be one of {', '.join(ADVANTAGES)}, not {kind!r}")
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be (questions, 2 or more), not {tuple(rewards.shape)}")
    rewards = at_least_float32(rewards)
    G = rewards.shape[1]
    over = (0, 1) if kind == "reinforce++" else 1  # the whole batch, or a group
    centred = rewards - rewards.mean(over, keepdim=True)
    scale = (G - 1) / G if kind == "rloo" else rewards.std(over, keepdim=True) + eps
    # not "std == 0", which rounding can miss
    equal = rewards.amax(over, keepdim=True) == rewards.amin(over, keepdim=True)
    return torch.where(equal, 0.0, centred / scale)


def surrogate(logp, old_logp, advantages, mask, *, clip=0.2, average="token", normalizer=None):
    """The clipped surrogate of Eq. 4 as a loss to minimise, and how many tokens it cuts off.

    logp, old_logp, mask (N, T-1); advantages (N,). With ratio = exp(logp - old_logp), a token's
    objective is min(ratio * advantage, clip(ratio, 1 - clip, 1 + clip) * advantage). The loss is
    minus its average:

        average="token"     over all tokens of all responses: the official scripts, our default
        average="sequence"  over the tokens of a response, then over responses: Eq. 4 as printed

    `normalizer` replaces the number of tokens (or responses) where rows are a part of a mini-batch.
    A token is cut off where the clip takes its gradient away: advantage > 0 and ratio > 1 + clip,
    or advantage < 0 and ratio < 1 - clip. The log-ratio is kept within +-20, as in the official
    code, lest exp overflow: advantage < 0 and log-ratio > 20 is cut off, too.
    """
    advantages = advantages[:, None]
    log_ratio = torch.where(mask, logp - old_logp, 0.0)
    ratio = log_ratio.clamp(-20, 20).exp()
    objective = torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages) * mask
    if average == "token":
        total = objective.sum() / (mask.sum() if normalizer is None else normalizer)
    elif average == "sequence":
        per_row = objective.sum(1) / mask.sum(1).clamp(min=1)
        total = per_row.sum() / (len(mask) if normalizer is None else normalizer)
    else:
        raise ValueError(f"average must be 'token' or 'sequence', not {average!r}")
    too_high, too_low = ratio > 1 + clip, (ratio < 1 - clip) | (log_ratio > 20)
    cut_off = torch.where(advantages > 0, too_high, too_low & (advantages < 0)) & mask
    return -total, cut_off.sum()


# ---- 4. InterGRPO (Eq. 10) ---------------------------------------------------------------------


def policy_loss(model, tokens, old_logp, advantages, mask, policy=FULL, temperature=1.0, **options):
    """GRPO (Eq. 4) for FULL, InterGRPO (Eq. 10) for an internal policy: only the policy differs.

    Numerator *and* denominator of the ratio are the same policy's: old_logp (N, T-1) is what
    `policy` gave the tokens before the batch's first update. `options` and result are surrogate's.
    """
    logp = token_logprobs(model, tokens, mask, policy, temperature)
    return surrogate(logp, old_logp, advantages, mask, **options)


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


def bupo(model, optimizer, sample, target: Policy, s_inter: int, steps: int, *, start=1, **options):
    """Algorithm 1 as a generator: yields (step, policy, rollouts, log) after steps start..steps.

        for step, policy, rollouts, log in bupo(model, optimizer, sample, Policy(3), 5, 60):
            print(step, rollouts.rewards.mean(), log["grad_norm"])

    sample(step) returns Rollouts of pi_theta as it is now, in both phases; phase 1 is off-policy.
    The ratio corrects for what the internal policy has changed since, not for its distance from
    pi_theta. What you want to do at a step (log it, save the model) you do in your own `for`.
    s_inter = 0 is GRPO. `options` are update's. Raises ValueError for s_inter < 0 or start < 1.
    """
    if s_inter < 0 or start < 1:
        raise ValueError(f"s_inter must be at least 0, start at least 1, not {s_inter}, {start}")
    for step in range(start, steps + 1):
        policy = target if step <= s_inter else FULL  # Eq. 11: phase 1, then phase 2
        if s_inter > 0 and step == s_inter + 1:
            # Ours, the official code keeps them: AdamW's moments start afresh. Those of phase 1,
            # whose gradient is several times larger, would make the first steps too small.
            optimizer.state.clear()
        rollouts = sample(step)  # questions, G responses to each, rewards
        log = update(model, optimizer, rollouts, policy, **options)
        yield step, policy, rollouts, log


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

    Who learns (Eq. 15, 16): the gradient of pi_Layer^l reaches E_u, layers 1..l and the embedding.
    For the layers above and LN_f it does not exist. Their .grad stays None, so neither weight decay
    nor momentum moves them in phase 1. A mini-batch whose advantages are all 0 makes no optimizer
    step, for AdamW would move the weights by momentum alone.

    Mini-batches take questions in order, so sample them in random order. `temperature` is that of
    the sampling, `advantage` group_advantages' kind, average and clip are surrogate's. `chunk` rows
    go through the model at a time; the gradient does not depend on it. Returns {"clip_fraction": of
    all response tokens, "grad_norm": before clipping, mean over steps, "optimizer_steps"}. Raises
    ValueError for more mini-batches than questions, FloatingPointError before a step with NaN.
    """
    options = {"average": average, "temperature": temperature}
    batches = make_minibatches(model, rollouts, policy, minibatches, advantage, chunk, **options)
    cut_off, norms = 0, []
    for chunks, normalizer in batches:
        if not chunks:  # all advantages are 0
            continue
        optimizer.zero_grad(set_to_none=True)
        loss, n = add_gradient(model, chunks, policy, clip=clip, normalizer=normalizer, **options)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        if not torch.isfinite(loss + norm):
            raise FloatingPointError(f"loss {loss} or gradient norm {norm} is not finite")
        optimizer.step()
        cut_off += n
        norms.append(norm)
    return {
        "clip_fraction": float(cut_off / (rollouts.end - rollouts.prompt_len).sum()),
        "grad_norm": float(torch.stack(norms).mean()) if norms else 0.0,
        "optimizer_steps": len(norms),
    }


@torch.no_grad()
def make_minibatches(model, rollouts, policy, minibatches, advantage, chunk, average, temperature):
    """A batch as [(chunks, normalizer), ...], one a mini-batch: chunks [(tokens, old_logp,
    advantages, mask), ...] for policy_loss, and the number that the loss is divided by.

    Rows with advantage 0 have no gradient: they count in the normalizer, but are not computed. Old
    log-probabilities come from the very chunks of the gradient: the first ratios are exactly 1.
    """
    tokens, device = rollouts.tokens, rollouts.tokens.device
    # which rows go where is settled on the CPU, so that a GPU is waited for once and not for each
    prompt_len, end = rollouts.prompt_len.cpu(), rollouts.end.cpu()
    advantages = group_advantages(rollouts.rewards.cpu(), advantage).flatten()  # (N,)
    scores = advantages.to(device)
    Q, G = rollouts.rewards.shape
    if not 1 <= minibatches <= Q:
        raise ValueError(f"minibatches must be in 1..{Q}, the questions, not {minibatches}")
    batches = []
    for rows in torch.arange(Q * G).view(Q, G).tensor_split(minibatches):
        rows = rows.flatten()
        normalizer = int((end - prompt_len)[rows].sum()) if average == "token" else len(rows)
        rows = rows[advantages[rows] != 0]
        rows = rows[end[rows].argsort()]  # like lengths together, so that little is padding
        chunks = []
        for part in rows.split(chunk) if len(rows) else ():  # split makes one part of no rows
            T, part = int(end[part].max()), part.to(device)
            mask = response_mask(rollouts.prompt_len[part], rollouts.end[part], T)
            cut = tokens[part, :T]
            old_logp = token_logprobs(model, cut, mask, policy, temperature)
            chunks.append((cut, old_logp, scores[part], mask))
        batches.append((chunks, normalizer))
    return batches


def add_gradient(model, chunks, policy, **options):
    """Add the gradient of policy_loss over all chunks to .grad; returns loss and tokens cut off."""
    loss, cut_off = 0.0, 0
    for tokens, old_logp, advantages, mask in chunks:
        part, n = policy_loss(model, tokens, old_logp, advantages, mask, policy, **options)
        part.backward()
        loss, cut_off = loss + part.detach(), cut_off + n
    return loss, cut_off


# ---- 6. Measures -------------------------------------------------------------------------------


@torch.no_grad()
def look_inside(model, tokens, mask, chunk: int | None = None) -> dict:
    """All that is measured by layer, at the M response positions of mask (N, T-1).

    A dict of tensors (L, M); those with a + are (L+1, M), H^0 first. Entropies are in nats.

        layer+ attn mlp    entropy of the internal policies of H^l, A^l, F^l (Eq. 6-8)
        attn_in mlp_in     entropy of what attention and FFN read, which is the *normed* stream
        d_attn d_mlp       dH of Eq. 13, 14: attn - attn_in and mlp - mlp_in. Above 0 is read as
                           exploration, about 0 as integration, below 0 as convergence
        d_layer            dH of Eq. 9 for layers: entropy of H^l less that of H^{l-1}, both raw
        layer_normed+      of the logit lens, softmax(LN_f(H^l) E_u^T); the last one is pi_theta's
        layer_matched+     of H^l scaled to the length of H^L, as if the stream did not grow
        cos_layer+         cos(H^l, H^L), feature refinement (Fig. 5)
        cos_attn cos_mlp   a write against the stream that it is added to (Appendix B.2): about 0
                           writes new features, below 0 suppresses, above 0 amplifies
        rms_layer+ rms_attn rms_mlp    size: the root mean square over d

    `chunk` positions are unembedded at a time (None: as many as make 2^24 logits), so memory for
    logits grows with neither layers nor positions. Raises ValueError for an empty mask.
    """
    if not mask.any():
        raise ValueError("there are no response positions to look at")
    chunk = chunk or max(1, 2**24 // model.vocab_size)
    positions, tokens = mask.flatten().nonzero()[:, 0], tokens[:, :-1]

    def here(h):  # (N, T-1, d) -> (M, d)
        return h.flatten(0, 1)[positions]

    top = here(model.residual(tokens, model.n_layer))  # H^L
    top_length = torch.linalg.vector_norm(top, dim=-1, keepdim=True)
    found = defaultdict(list)

    def add(name, h, beside=None):
        found[name].append(torch.cat([entropy(model.unembed(part)) for part in h.split(chunk)]))
        if beside is not None:
            h, beside = at_least_float32(h), at_least_float32(beside)
            found[f"cos_{name}"].append(torch.cosine_similarity(h, beside, dim=-1))
            found[f"rms_{name}"].append(h.square().mean(-1).sqrt())

    def add_layer(h):
        add("layer", h, top)
        add("layer_normed", model.final_norm(h))
        add("layer_matched", torch.nn.functional.normalize(h, dim=-1) * top_length)

    for l, trace in enumerate(model.trace(tokens), 1):
        if l == 1:
            add_layer(here(trace.resid_pre))  # H^0
        add("attn_in", here(trace.attn_in))
        add("attn", here(trace.attn_out), here(trace.resid_pre))
        add("mlp_in", here(trace.mlp_in))
        add("mlp", here(trace.mlp_out), here(trace.resid_mid))
        add_layer(here(trace.resid_post))
    found = {name: torch.stack(rows) for name, rows in found.items()}
    found["d_attn"] = found["attn"] - found["attn_in"]
    found["d_mlp"] = found["mlp"] - found["mlp_in"]
    found["d_layer"] = found["layer"][1:] - found["layer"][:-1]
    return found


def pass_at_k(n: int, c, k: int):
    """Unbiased Pass@K, 1 - C(n-c, k) / C(n, k): the chance that one of k samples is right.

    c: how many of a problem's n samples are right, or an array of such counts; returns float64 of
    the same shape. Raises ValueError unless 1 <= k <= n and 0 <= c <= n.
    """
    c = np.asarray(c, dtype=int)
    if not 1 <= k <= n or np.any((c < 0) | (c > n)):
        raise ValueError(f"1 <= k <= n and 0 <= c <= n must hold, not k = {k}, n = {n}, c = {c}")
    return np.array([1 - comb(n - right, k) / comb(n, k) for right in range(n + 1)])[c]
