"""tests/golden.npz, compared with a rewrite in NumPy from docs/golden.md, and with our code.

GPT's own RoPE table is float32, so our unchanged code is compared as float32 code is.
"""

import make_golden
import numpy as np
import pytest
import torch

import minibupo

GOLDEN = dict(np.load(make_golden.PATH))
WEIGHTS = {k.removeprefix("weight."): v for k, v in GOLDEN.items() if k.startswith("weight.")}
MASK = GOLDEN["mask"]
N, L, D = 12, 3, 6
TARGET = int(GOLDEN["target_layer"])


# ---- BuPO in NumPy, only from the page ---------------------------------------------------------


def rms_norm(x, weight):
    return weight * x / np.sqrt((x**2).mean(-1, keepdims=True) + GOLDEN["norm_eps"])


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rotate(x):
    """x (N, T, heads, D)."""
    i, t = np.arange(D // 2), np.arange(x.shape[1])
    angle = (t[:, None] * GOLDEN["rope_theta"] ** (-2 * i / D))[:, None]  # (T, 1, D/2)
    a, b = x[..., : D // 2], x[..., D // 2 :]
    first = a * np.cos(angle) - b * np.sin(angle)
    second = a * np.sin(angle) + b * np.cos(angle)
    return np.concatenate((first, second), -1)


def attention(x, w):
    """Return the attention of x (N, T, d); w are the weights of a block by name."""
    rows, T, _ = x.shape
    heads = (x @ w["attn.qkv.weight"].T).reshape(rows, T, 8, D)
    q = rotate(rms_norm(heads[:, :, :4], w["attn.q_norm.weight"]))
    k = rotate(rms_norm(heads[:, :, 4:6], w["attn.k_norm.weight"]))
    v = heads[:, :, 6:]
    mixed = []
    for h in range(4):
        scores = q[:, :, h] @ k[:, :, h // 2].transpose(0, 2, 1) / np.sqrt(D)
        scores = np.where(np.tril(np.ones((T, T), bool)), scores, -np.inf)
        mixed.append(softmax(scores) @ v[:, :, h // 2])
    return np.concatenate(mixed, -1) @ w["attn.out.weight"].T


def swiglu(x, w):
    gate, up = np.split(x @ w["mlp.gate_up.weight"].T, 2, axis=-1)
    return (gate / (1 + np.exp(-gate)) * up) @ w["mlp.down.weight"].T


def forward(weights, tokens):
    """Return what all layers read and write, (L, N, T, d); "layer" is (L+1, N, T, d)."""
    h = weights["embed.weight"][tokens]
    found = {"layer": [h], "attn_in": [], "attn": [], "mlp_in": [], "mlp": []}
    for l in range(L):
        w = {k.split(".", 2)[2]: v for k, v in weights.items() if k.startswith(f"blocks.{l}.")}
        attn_in = rms_norm(h, w["attn_norm.weight"])
        attn = attention(attn_in, w)
        mlp_in = rms_norm(h + attn, w["mlp_norm.weight"])
        mlp = swiglu(mlp_in, w)
        h = h + attn + mlp
        for name, x in zip(found, (h, attn_in, attn, mlp_in, mlp)):
            found[name].append(x)
    found = {name: np.stack(x) for name, x in found.items()}
    return found | {"layer_normed": rms_norm(found["layer"], weights["final_norm.weight"])}


def logprob(h, weights):
    """Return log-probabilities of the tokens that follow, from h (N, T, d); 0 outside the mask."""
    z = h[:, :-1] @ weights["embed.weight"].T / GOLDEN["temperature"]
    z = z - z.max(-1, keepdims=True)
    log_pi = z - np.log(np.exp(z).sum(-1, keepdims=True))
    chosen = np.take_along_axis(log_pi, GOLDEN["tokens"][:, 1:, None], -1)[..., 0]
    return np.where(MASK, chosen, 0)


def entropy(h, weights):
    """Return entropies at the response positions: h (.., N, T, d) -> (.., M)."""
    pi = softmax(h[..., :-1, :][..., MASK, :] @ weights["embed.weight"].T)
    return -(pi * np.log(pi)).sum(-1)


def advantages(kind):
    R = GOLDEN["rewards"]
    G = 4
    if kind == "rloo":
        return R - (R.sum(1, keepdims=True) - R) / (G - 1)
    over = (0, 1) if kind == "reinforce++" else 1
    return (R - R.mean(over, keepdims=True)) / (R.std(over, ddof=1, keepdims=True) + 1e-6)


def losses(weights, phase):
    """Return the loss averaged over tokens and over sequences, and the number of clipped tokens."""
    ratio = np.exp(phase_logprob(weights, phase) - GOLDEN[f"old_logprob.phase{phase}"])
    A = advantages("grpo").reshape(-1, 1)
    J = np.minimum(ratio * A, np.clip(ratio, 0.8, 1.2) * A) * MASK
    clipped = (((A > 0) & (ratio > 1.2)) | ((A < 0) & (ratio < 0.8))) & MASK
    return -J.sum() / MASK.sum(), -(J.sum(1) / MASK.sum(1)).mean(), clipped.sum()


def phase_logprob(weights, phase):
    """Return the log-probabilities of the policy that a phase trains."""
    stream = forward(weights, GOLDEN["tokens"])
    return logprob(stream["layer"][TARGET] if phase == 1 else stream["layer_normed"][L], weights)


def rule(dH_mlp):
    """Return the target layer, or 0 if the rule picks none."""
    raising = [l for l in range(1, len(dH_mlp)) if dH_mlp[l - 1] > 0]
    return raising[-1] if raising else 0


def step_of_bupo(weights, phase):
    """Return the weights after a step, the mean gradient norm, the share of clipped tokens.

    Moments start at 0. The gradient is autograd's, of the loss that is checked below."""
    b1, b2 = GOLDEN["adamw.betas"]
    lr, eps, decay = (GOLDEN[f"adamw.{name}"] for name in ("lr", "eps", "weight_decay"))
    old = phase_logprob(weights, phase)
    m = {name: np.zeros_like(weight) for name, weight in weights.items()}
    v = {name: np.zeros_like(weight) for name, weight in weights.items()}
    norms = []
    clipped = 0
    for k, rows in enumerate((range(8), range(8, 12)), 1):  # questions 1 and 2, then 3
        gradient, n = gradient_of(weights, phase, old, rows)
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        norms.append(norm)
        clipped += n
        weights = dict(weights)
        for name, g in gradient.items():
            g = g * min(1.0, GOLDEN["max_grad_norm"] / norm)
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g**2
            change = (m[name] / (1 - b1**k)) / (np.sqrt(v[name] / (1 - b2**k)) + eps)
            weights[name] = weights[name] * (1 - lr * decay) - lr * change
    return weights, np.mean(norms), clipped / MASK.sum()


def gradient_of(weights, phase, old, rows):
    """Return {name: gradient} of the loss of these rows, and the number of clipped tokens."""
    rows = list(rows)
    model = make_golden.model_of({f"weight.{name}": weight for name, weight in weights.items()})
    tokens, mask, old, A = (
        torch.tensor(x[rows]) for x in (GOLDEN["tokens"], MASK, old, advantages("grpo").ravel())
    )
    policy = minibupo.Policy(TARGET) if phase == 1 else minibupo.FULL
    loss, clipped = minibupo.policy_loss(model, tokens, old, A, mask, policy, temperature=0.8)
    loss.backward()
    named = model.named_parameters()
    return {name: p.grad.numpy() for name, p in named if p.grad is not None}, int(clipped)


def close(name, value, atol=1e-9):
    np.testing.assert_allclose(value, GOLDEN[name], rtol=0, atol=atol, err_msg=name)


def test_the_page_gives_the_stream_and_the_mask():
    found = forward(WEIGHTS, GOLDEN["tokens"][:1])
    for ours, theirs in (("attn", "attn_out"), ("mlp", "mlp_out"), ("layer", "layer")):
        close(f"row0.{theirs}", found[ours][:, 0])
    close("row0.attn_in", found["attn_in"][:, 0])
    close("row0.mlp_in", found["mlp_in"][:, 0])
    close("row0.logits", found["layer_normed"][L, 0] @ WEIGHTS["embed.weight"].T)
    for i in range(N):
        for t in range(MASK.shape[1]):
            response = GOLDEN["prompt_len"][i] - 1 <= t < GOLDEN["end"][i] - 1
            assert MASK[i, t] == response


def test_the_page_gives_entropies_and_target_layer():
    found = forward(WEIGHTS, GOLDEN["tokens"])
    S = {name: entropy(h, WEIGHTS) for name, h in found.items()}
    for name, value in S.items():
        close(f"entropy.{name}", value)
    close("dH_attn", (S["attn"] - S["attn_in"]).mean(1))
    close("dH_mlp", (S["mlp"] - S["mlp_in"]).mean(1))
    close("dH_layer", (S["layer"][1:] - S["layer"][:-1]).mean(1))
    assert rule(GOLDEN["dH_mlp"]) == TARGET and np.abs(GOLDEN["dH_mlp"]).min() > 0.05


def test_the_cases_of_the_rule_tell_it_from_other_rules():
    cases = GOLDEN["target_layer.cases"]
    layers = GOLDEN["target_layer.of_cases"].tolist()
    assert [rule(dH) for dH in cases] == layers
    assert {1, 2, 3, 4, 0} == set(layers)
    others = {
        "the largest": cases[:, :-1].argmax(1) + 1,
        "below the top": np.full(len(cases), 4),
        "the top counts": np.array([rule([*dH, 0]) for dH in cases]),
        "0 raises": np.array([rule(dH + 1e-9) for dH in cases]),
        "the first": np.array([(dH > 0).argmax() + 1 for dH in cases]),
        "before the first dip": np.array([(dH <= 0).argmax() for dH in cases]),
    }
    for name, other in others.items():
        assert (other != layers).any(), name


def test_the_page_gives_log_probabilities_and_advantages():
    found = forward(WEIGHTS, GOLDEN["tokens"])
    close("logprob.full", logprob(found["layer_normed"][L], WEIGHTS))
    close("logprob.layer", [logprob(h, WEIGHTS) for h in found["layer"][1:]])
    for name in ("attn", "mlp"):
        close(f"logprob.{name}", [logprob(h, WEIGHTS) for h in found[name]])
    for kind in ("grpo", "rloo", "reinforce++"):
        close(f"advantages.{kind}", advantages(kind))


@pytest.mark.parametrize("phase", [1, 2])
def test_the_page_gives_losses_and_gradients(phase):
    """Gradients are central differences, at the largest entry and two others of each weight."""
    token, sequence, clipped = losses(WEIGHTS, phase)
    close(f"loss_token.phase{phase}", token)
    close(f"loss_sequence.phase{phase}", sequence)
    assert clipped == GOLDEN[f"clipped.phase{phase}"] > 3
    without = set(GOLDEN[f"no_grad.phase{phase}"].tolist())
    above = {name for name in WEIGHTS if name.startswith(("final_norm", f"blocks.{TARGET}."))}
    assert without == (above if phase == 1 else set())
    for name, weight in WEIGHTS.items():
        gradient = GOLDEN.get(f"grad.{name}.phase{phase}", np.zeros(weight.shape)).ravel()
        assert (gradient == 0).all() == (name in without), name
        for index in (np.abs(gradient).argmax(), 0, weight.size // 2):
            sides = []
            for h in (1e-5, -1e-5):
                other = weight.copy()
                other.flat[index] += h
                sides.append(losses(WEIGHTS | {name: other}, phase)[0])
            difference = (sides[0] - sides[1]) / 2e-5
            assert difference == pytest.approx(gradient[index], abs=1e-6), name


def test_the_page_gives_the_weights_after_two_steps():
    weights = WEIGHTS
    for step in (1, 2):
        before = weights
        weights, norm, clip_fraction = step_of_bupo(before, phase=step)
        close(f"step{step}.grad_norm", norm, 1e-6)
        assert clip_fraction == pytest.approx(GOLDEN[f"step{step}.clip_fraction"]) != 0
        for name, weight in weights.items():
            close(f"step{step}.weight.{name}", weight, 1e-6)
            still = (weight == before[name]).all()
            assert still == (name in GOLDEN["no_grad.phase1"] and step == 1), name
            # the step is large enough for the comparison to mean something
            assert still or np.abs(weight - before[name]).max() > 1e-3


# ---- our code ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype,atol", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_our_code_gives_the_file(dtype, atol):
    """The file stays up to date, because its content is computed again."""
    found = make_golden.expected(GOLDEN, dtype)
    given = {name for name in make_golden.inputs(0)}
    assert given | found.keys() == GOLDEN.keys()
    for name, value in found.items():
        if value.dtype.kind == "U":
            assert value.tolist() == GOLDEN[name].tolist()
        elif name.endswith(".grad_norm"):  # a single number, not small
            assert value == pytest.approx(GOLDEN[name], rel=max(atol, 1e-6))
        else:
            in_float32 = name.startswith(("grad", "step"))
            close(name, value, max(atol, 1e-6) if in_float32 else atol)


def test_our_model_as_it_is_gives_the_log_probabilities():
    """The model has its own RoPE table here, not the exact one of the file."""
    model = make_golden.GPT(make_golden.GPTConfig(**make_golden.SIZES))
    state = {name: torch.tensor(weight) for name, weight in WEIGHTS.items()}
    model.load_state_dict(state | {"lm_head.weight": state["embed.weight"]})
    logp = minibupo.token_logprobs(
        model, torch.tensor(GOLDEN["tokens"]), torch.tensor(MASK), temperature=0.8
    )
    close("logprob.full", logp.detach(), 1e-4)


def test_the_file_is_small():
    assert make_golden.PATH.stat().st_size <= 200 * 1024
