"""Bottom-up Policy Optimization (BuPO, arXiv 2512.19673) in one file, in the order of the paper's equations.

A language model adds up its residual stream H^0, H^1, ..., H^L layer by layer, and any of its vectors can be
unembedded: softmax(H^l E_u^T) is a policy, the internal policy of layer l. BuPO runs GRPO on such an internal policy
for the first s_inter steps (phase 1, "InterGRPO"), then on the whole model (phase 2).

    1  GRPO's two pieces                        Eq. 4       group_advantages, surrogate
    2  internal layer and modular policies      Eq. 5-7     Policy, FULL, policy_logits
    3  entropy and its change                   Eq. 8, 9    entropy, internal_entropies
    4  InterGRPO and BuPO                       Eq. 10, 11  token_logprobs, policy_loss, policy_at
    5  entropy change of modules, target layer  Eq. 13, 14  entropy_changes, target_layer
    6  one step of training, who learns in it   Eq. 15, 16  update
    7  measures                                             avg_at_k, pass_at_k, residual_cosines, residual_rms

It works with any model that has the four calls which model.py's docstring names, and knows nothing of any task.
Left out on purpose: a KL term, an entropy bonus, and the official scripts' dual clip (a cap on the loss at
r > 10 for A < 0); the paper's objective has none of them.

Shapes: Q questions, G responses to each, N = Q G rows (the G responses of a question next to each other), T tokens of
prompt and response, V vocabulary, L layers, M response positions of a whole batch. Row i holds its prompt in
tokens[i, :prompt_len[i]] and its response, EOS included, in tokens[i, prompt_len[i]:end[i]]; what follows is padding
of any value. Logits at position t are about token t + 1, so all that is *per token* has T - 1 columns.
"""

from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F


def response_mask(prompt_len, end, T: int):
    """The response positions (N, T-1), bool: column t is one if tokens[:, t+1] is a token of the response, so the
    first is the prompt's last token and the last is the one that EOS is predicted from. Told by the lengths
    prompt_len, end (N,) alone, never by a token's value. Log-probabilities, losses, entropies and cosines all use it."""
    t = torch.arange(T - 1, device=end.device)
    return (t >= prompt_len[:, None] - 1) & (t < end[:, None] - 1)


# ---- 1. GRPO's two pieces (Eq. 4) ------------------------------------------------------------------------------


ADVANTAGES = ("grpo", "rloo", "reinforce++")


def group_advantages(rewards, kind: str = "grpo", eps: float = 1e-6):
    """The advantage A_i of each response, from rewards (Q, G), of the same shape:

        "grpo"          (R_i - mean(R)) / (std(R) + eps)    within each group; as in the official code std is the unbiased
                                                            one and eps 1e-6: [1, 0, 0, 0] gives [1.5, -0.5, -0.5, -0.5]
        "rloo"          R_i - mean of the group's others    leave one out (Ahmadian et al. 2024): [1, -1/3, -1/3, -1/3]
        "reinforce++"   (R_i - mean(R)) / (std(R) + eps)    over the whole batch, groups ignored (Hu 2025)

    Where all rewards that are compared are equal the advantage is exactly 0. Raises ValueError for another kind, and
    unless rewards is a (Q, G) matrix with G >= 2.
    """
    if kind not in ADVANTAGES:
        raise ValueError(f"kind of advantage must be one of {', '.join(ADVANTAGES)}, not {kind!r}")
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be (questions, group) with a group of at least 2, not {tuple(rewards.shape)}")
    over, G = (0, 1) if kind == "reinforce++" else 1, rewards.shape[1]
    mean, std = rewards.mean(over, keepdim=True), rewards.std(over, keepdim=True)
    scale = (G - 1) / G if kind == "rloo" else std + eps
    equal = rewards.amax(over, keepdim=True) == rewards.amin(over, keepdim=True)  # not std == 0, which rounding can miss
    return torch.where(equal, torch.zeros_like(rewards), (rewards - mean) / scale)


def surrogate(logp, old_logp, advantages, mask, *, clip=0.2, average="token", normalizer=None):
    """The clipped surrogate of Eq. 4 as a loss to minimise, and the number of tokens that the clip cut off.

    logp, old_logp, mask (N, T-1); advantages (N,). With r = exp(logp - old_logp) a token's objective is
    min(r A, clip(r, 1 - clip, 1 + clip) A), and the loss is minus its average,

        average="token"     (1 / sum_i |o_i|) sum_i sum_t,     all tokens alike: the official scripts, our default
        average="sequence"  (1 / N) sum_i (1 / |o_i|) sum_t,   all responses alike: Eq. 4 as printed

    `normalizer` stands in for sum_i |o_i| (or N) where the rows are a part of a larger mini-batch. A token is cut off
    where the clip takes its gradient away: A > 0 and r > 1 + clip, or A < 0 and r < 1 - clip.
    """
    A = advantages[:, None]
    ratio = torch.exp(torch.where(mask, logp - old_logp, 0.0))
    objective = torch.min(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A)
    if average == "token":
        total = (objective * mask).sum() / (mask.sum() if normalizer is None else normalizer)
    elif average == "sequence":
        per_row = (objective * mask).sum(1) / mask.sum(1).clamp(min=1)
        total = per_row.sum() / (len(mask) if normalizer is None else normalizer)
    else:
        raise ValueError(f"average must be 'token' or 'sequence', not {average!r}")
    cut_off = mask & torch.where(A > 0, ratio > 1 + clip, (A < 0) & (ratio < 1 - clip))
    return -total, cut_off.sum()


# ---- 2. Internal policies (Eq. 5, 6, 7) ------------------------------------------------------------------------
# Eq. 5: the stream is a sum, H^l = H^0 + sum_{i<=l} A^i + sum_{j<=l} F^j, and each of its terms lives in the space
# that E_u reads. So each partial sum and each term gives a distribution over the vocabulary.


class Policy(NamedTuple):
    """Which policy: pi_theta itself (layer None), or an internal one.

    Policy(), named FULL      pi_theta    = softmax(LN_f(H^L) E_u^T)
    Policy(l)                 pi_Layer^l  = softmax(H^l E_u^T)   Eq. 6
    Policy(l, "attn_out")     pi_ATTN^l   = softmax(A^l E_u^T)   Eq. 7
    Policy(l, "mlp_out")      pi_FFN^l    = softmax(F^l E_u^T)   Eq. 7
    """

    layer: int | None = None
    site: str = "resid_post"


FULL = Policy()  # pi_theta


def policy_logits(model, tokens, policy=FULL, mask=None):
    """Logits (B, T, V) of a policy at each position of tokens (B, T), or (M, V) at the positions of mask (B, T).

    Internal policies are unembedded *without* the final norm: this is what sets Eq. 6 apart from the logit lens,
    softmax(LN_f(H^l) E_u^T). Layers above policy.layer are not computed, so they cannot get a gradient either.
    Raises ValueError for a layer or site that the model does not have.
    """
    if policy.layer is None:
        logits = model(tokens)
        return logits if mask is None else logits[mask]
    if policy.site == "resid_post":
        h = model.residual(tokens, policy.layer)
    elif policy.site in ("attn_out", "mlp_out"):
        trace = next(islice(model.trace(tokens), policy.layer - 1, None), None) if policy.layer >= 1 else None
        if trace is None:
            raise ValueError(f"layer {policy.layer} has no {policy.site}: the model's layers count from 1")
        h = getattr(trace, policy.site)
    else:
        raise ValueError(f"site must be resid_post, attn_out or mlp_out, not {policy.site!r}")
    return model.unembed(h if mask is None else h[mask])


# ---- 3. Entropy and its change (Eq. 8, 9) ----------------------------------------------------------------------


def at_least_float32(x):
    """x itself, or in float32 if its type is narrower: a softmax over bfloat16 logits is too coarse."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def entropy(logits):
    """Eq. 8: H(pi) = -sum_j pi_j log pi_j of pi = softmax(logits), in nats: (..., V) -> (...). 0 log 0 is 0."""
    wide = at_least_float32(logits)
    return entropy_below_max(wide - wide.amax(-1, keepdim=True))


def entropy_below_max(z):
    """The same for z = logits - max, which is overwritten: log(sum_j e^z_j) - sum_j pi_j z_j takes one exponential a logit
    and no logarithm, and over a large vocabulary is a hundred times more exact than the sum of pi log pi. Below -87, of no
    weight anyway, e^z would be denormal in float32, which is several times slower, and 0 (-inf) would be NaN."""
    e = z.clamp_(min=-87).exp()
    total = e.sum(-1)
    return total.log() - z.mul_(e).sum(-1) / total


@torch.no_grad()
def unembedded_entropy(model, h, chunk: int):
    """Entropy (M,) of softmax(h E_u^T) for vectors h (M, d) of the stream, `chunk` of them unembedded at a time. Their
    logits are overwritten, so that no more than two tensors (chunk, V) of float32 are held."""
    rows = []
    for part in h.split(chunk):
        logits = at_least_float32(model.unembed(part))
        rows.append(entropy_below_max(logits.sub_(logits.amax(-1, keepdim=True))))
    return torch.cat(rows)


@torch.no_grad()
def internal_entropies(model, tokens, mask, *, final_norm=None, chunk=4096):
    """Entropy of every internal policy at every response position, in nats at temperature 1.

    tokens (N, T), mask (N, T-1) from response_mask. Returns a dict of float32 tensors over the M positions of mask:
    "layer" (L+1, M) of H^0..H^L, "attn" and "mlp" (L, M) of A^l and F^l, "attn_in" and "mlp_in" (L, M) of the normed
    stream that these modules read. With `final_norm` (the model's LN_f) also "layer_normed" (L+1, M), the logit lens
    softmax(LN_f(H^l) E_u^T), whose last row is pi_theta's own entropy. Positions are unembedded `chunk` at a time and
    layers come one by one, so that the numbers held at once, 2 x chunk x V, grow with neither. Raises ValueError
    for a mask without positions.
    """
    if not mask.any():
        raise ValueError("there are no response positions to take the entropy of")

    def of(h):  # (N, T-1, d) -> (M,)
        return unembedded_entropy(model, h[mask], chunk)

    rows = {name: [] for name in ("layer", "layer_normed", "attn_in", "attn", "mlp_in", "mlp")}
    for l, trace in enumerate(model.trace(tokens[:, :-1]), 1):
        for h in (trace.resid_pre, trace.resid_post) if l == 1 else (trace.resid_post,):
            rows["layer"].append(of(h))
            if final_norm is not None:
                rows["layer_normed"].append(of(final_norm(h)))
        rows["attn_in"].append(of(trace.attn_in))
        rows["attn"].append(of(trace.attn_out))
        rows["mlp_in"].append(of(trace.mlp_in))
        rows["mlp"].append(of(trace.mlp_out))
    return {name: torch.stack(values) for name, values in rows.items() if values}


# ---- 4. InterGRPO and BuPO (Eq. 10, 11) ------------------------------------------------------------------------


def token_logprobs(model, tokens, mask, policy=FULL, temperature=1.0):
    """log pi(tokens[:, t+1] | tokens[:, :t+1]) under a policy: (N, T-1), 0 outside mask (N, T-1).

    Logits are divided by the temperature that the tokens were sampled at, for internal policies as for pi_theta.
    """
    logits = at_least_float32(policy_logits(model, tokens[:, :-1], policy, mask)) / temperature  # (M, V)
    logp = F.log_softmax(logits, dim=-1).gather(-1, tokens[:, 1:][mask][:, None])[:, 0]
    return logp.new_zeros(mask.shape).masked_scatter(mask, logp)


def policy_loss(model, tokens, old_logp, advantages, mask, policy=FULL, *, temperature=1.0, **options):
    """GRPO (Eq. 4) for the FULL policy, InterGRPO (Eq. 10) for an internal policy: one loss, only the policy differs.

    In Eq. 10 numerator *and* denominator of the ratio are the internal policy's, so old_logp (N, T-1) are its
    log-probabilities of the sampled tokens at sampling time. The samples come from pi_theta all the same: phase 1 is
    off-policy for pi_Layer^l, and the ratio corrects only for the internal policy's own drift since then.
    Returns loss and number of tokens cut off; `options` are surrogate's.
    """
    return surrogate(token_logprobs(model, tokens, mask, policy, temperature), old_logp, advantages, mask, **options)


def policy_at(step: int, s_inter: int, target: Policy) -> Policy:
    """Eq. 11: the policy that step 1, 2, ... optimises: `target` up to and including step s_inter, then pi_theta.
    A function of the step alone; s_inter = 0 is GRPO. Raises ValueError for a step below 1 or a negative s_inter."""
    if step < 1 or s_inter < 0:
        raise ValueError(f"steps count from 1 and s_inter from 0, not {step} and {s_inter}")
    return target if step <= s_inter else FULL


# ---- 5. Entropy change of the modules, and the target layer (Eq. 9, 13, 14) ------------------------------------


def entropy_changes(entropies):
    """Eq. 9, dH = H(output) - H(input), from what internal_entropies returned; each (L, M):

    "d_attn"   H(A^l) - H(LN(H^(2l-2)))  Eq. 13, a module's input being the *normed* stream that it reads
    "d_mlp"    H(F^l) - H(LN(H^(2l-1)))  Eq. 14
    "d_layer"  H(H^l) - H(H^{l-1})       raw on both sides

    dH > 0 is read as exploration, about 0 as integration, dH < 0 as convergence.
    """
    return {
        "d_attn": entropies["attn"] - entropies["attn_in"],
        "d_mlp": entropies["mlp"] - entropies["mlp_in"],
        "d_layer": entropies["layer"][1:] - entropies["layer"][:-1],
    }


def target_layer(d_mlp) -> int:
    """The layer to optimise in phase 1: the last l in 1..L-1 with dH_FFN^l > 0, the end of the exploration region.

    d_mlp holds the means of dH_FFN^1..dH_FFN^L. The top layer is never chosen. Where no layer below it explores the
    paper gives no rule; layer 1 is returned, which is where an empty region would end. Raises ValueError for L < 2.
    """
    d_mlp = [float(d) for d in d_mlp]
    if len(d_mlp) < 2:
        raise ValueError(f"an internal policy below the top layer needs at least 2 layers, not {len(d_mlp)}")
    return max((l for l, d in enumerate(d_mlp[:-1], 1) if d > 0), default=1)


# ---- 6. One step of training (Algorithm 1), and who learns in it (Eq. 15, 16) ----------------------------------


class Rollouts(NamedTuple):
    """One batch of Q questions with G responses each, sampled from pi_theta; N = Q G rows."""

    tokens: torch.Tensor  # (N, T) prompt, response, padding
    prompt_len: torch.Tensor  # (N,)
    end: torch.Tensor  # (N,) one past the response's last token
    logprobs: torch.Tensor  # (N, T-1) of the sampled tokens, under the policy that is to be optimised
    rewards: torch.Tensor  # (Q, G)


def update(model, optimizer, rollouts: Rollouts, policy=FULL, *, minibatches=4, advantage="grpo", clip=0.2,
           average="token", temperature=1.0, max_grad_norm=1.0, chunk=64, generator=None):  # fmt: skip
    """Improve `policy` on one batch of rollouts, one optimizer step for each of `minibatches` sets of questions.

    Gradient flow (Eq. 15, 16): the gradient of pi_Layer^l reaches E_u and layers k <= l; for k > l and LN_f it does
    not exist. Their .grad stays None, so that neither weight decay nor momentum moves them in phase 1. (With tied
    embeddings E_u is the input embedding as well.) Tokens' log-probabilities at sampling are taken from
    rollouts.logprobs, so the first mini-batch has ratio 1 everywhere. `advantage` is a kind of group_advantages.

    Rows with advantage 0 have no gradient and are not computed; they still count in the average. A mini-batch of such
    rows alone is no evidence for any change and makes no optimizer step. The others go through the model `chunk` at a
    time (None: all of a mini-batch), sorted by length, with the same gradient but less padding and memory. Questions
    are shuffled with `generator`.

    Returns {"clip_fraction": of all response tokens, "grad_norm": before clipping to max_grad_norm, averaged over
    the optimizer steps (0 if there were none), "optimizer_steps"}. Raises ValueError for more mini-batches than
    questions, and FloatingPointError, before the weights change, if a loss or gradient is not finite.
    """
    tokens, prompt_len, end, old_logp, rewards = rollouts
    Q, G = rewards.shape
    if not 1 <= minibatches <= Q:
        raise ValueError(f"minibatches must be in 1..{Q}, the number of questions, not {minibatches}")
    advantages = group_advantages(rewards, advantage).flatten()  # (N,)
    mask = response_mask(prompt_len, end, tokens.shape[1])
    cut_off, norms = 0, []
    for questions in torch.randperm(Q, generator=generator).tensor_split(minibatches):
        rows = (questions[:, None] * G + torch.arange(G)).flatten().to(tokens.device)
        normalizer = mask[rows].sum() if average == "token" else len(rows)
        rows = rows[advantages[rows] != 0]
        if len(rows) == 0:
            continue
        rows = rows[end[rows].argsort()]  # like lengths together, so that little of a chunk is padding
        optimizer.zero_grad(set_to_none=True)
        loss_sum = 0.0
        for part in rows.split(chunk or len(rows)):
            T = int(end[part].max())  # no padding beyond the longest row
            loss, n = policy_loss(model, tokens[part, :T], old_logp[part, : T - 1], advantages[part], mask[part, : T - 1],
                                  policy, temperature=temperature, clip=clip, average=average, normalizer=normalizer)  # fmt: skip
            loss.backward()
            loss_sum, cut_off = loss_sum + loss.detach(), cut_off + n
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        if not torch.isfinite(norm + loss_sum):
            raise FloatingPointError(f"loss {float(loss_sum)} or gradient norm {float(norm)} is not finite")
        optimizer.step()
        norms.append(float(norm))
    return {
        "clip_fraction": float(cut_off / mask.sum()),
        "grad_norm": float(np.mean(norms)) if norms else 0.0,
        "optimizer_steps": len(norms),
    }


# ---- 7. Measures -----------------------------------------------------------------------------------------------


def avg_at_k(correct) -> float:
    """Avg@K: the mean accuracy over all of K samples a problem, correct (P, K) of 0 and 1."""
    return float(torch.as_tensor(correct).cpu().double().mean())


def pass_at_k(n: int, c, k: int):
    """Unbiased Pass@K, 1 - C(n-c, k) / C(n, k): the chance that k of n samples, drawn without replacement, hold a
    right one where c of the n are right. c: a count or an array of counts, one a problem; float64 of the same shape.
    Raises ValueError unless 1 <= k <= n and 0 <= c <= n."""
    c = np.asarray(c)
    if not 1 <= k <= n:
        raise ValueError(f"k must be in 1..{n}, the number of samples, not {k}")
    if c.size and (c.min() < 0 or c.max() > n):
        raise ValueError(f"counts of right samples must be in 0..{n}, not {c.min()}..{c.max()}")
    i = np.arange(n)  # C(n-c-1, k) / C(n-c, k) = (n-c-k) / (n-c)
    all_wrong = np.concatenate(([1.0], np.cumprod(np.maximum(n - k - i, 0) / (n - i))))
    return 1.0 - all_wrong[c]


@torch.no_grad()
def residual_cosines(model, tokens, mask):
    """Cosines in the residual stream at the M response positions of mask (N, T-1), a dict of tensors:

    "final" (L+1, M)  cos(H^l, H^L), l = 0..L: how much of the final state is there already (feature refinement)
    "attn"  (L, M)    cos(A^l, H^(2l-2)) and
    "mlp"   (L, M)    cos(F^l, H^(2l-1)): what a module writes against the stream it is added to (Appendix B.2);
                      about 0 writes new features, < 0 suppresses, > 0 amplifies
    """
    stream, attn, mlp = [], [], []
    for trace in model.trace(tokens[:, :-1]):
        if not stream:
            stream.append(trace.resid_pre[mask])
        stream.append(trace.resid_post[mask])  # (M, d)
        attn.append(F.cosine_similarity(trace.attn_out[mask], trace.resid_pre[mask], dim=-1))
        mlp.append(F.cosine_similarity(trace.mlp_out[mask], trace.resid_mid[mask], dim=-1))
    final = [F.cosine_similarity(h, stream[-1], dim=-1) for h in stream]
    return {"final": torch.stack(final), "attn": torch.stack(attn), "mlp": torch.stack(mlp)}


@torch.no_grad()
def residual_rms(model, tokens, mask):
    """Sizes in the residual stream at the M response positions of mask (N, T-1): root mean square over d of the
    stream "layer" (L+1, M), H^0..H^L, and of the writes "attn" and "mlp" (L, M). Raw policies have no norm, so the
    stream's size acts on their entropy as an inverse temperature: read the two side by side."""
    rms = {"layer": [], "attn": [], "mlp": []}
    for trace in model.trace(tokens[:, :-1]):
        stream = [trace.resid_post] if rms["layer"] else [trace.resid_pre, trace.resid_post]
        for name, tensors in (("layer", stream), ("attn", [trace.attn_out]), ("mlp", [trace.mlp_out])):
            rms[name] += [at_least_float32(h[mask]).square().mean(-1).sqrt() for h in tensors]
    return {name: torch.stack(values) for name, values in rms.items()}
