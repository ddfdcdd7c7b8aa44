"""tests/golden.npz against a rewrite in NumPy, written from docs/golden.md, and against our code.

GPT's own rope table is float32, so our code without a change is compared as float32 code is.
"""

import make_golden
import numpy as np
import pytest
import torch

import minibupo

GOLDEN = dict(np.load(make_golden.PATH))
WEIGHTS = {k.removeprefix("weight."): v for k, v in GOLDEN.items() if k.startswith("weight.")}
MASK, N, L, D = GOLDEN["mask"], 12, 3, 6
TARGET = int(GOLDEN["target_layer"])


# ---- BuPO in NumPy, from the page alone --------------------------------------------------------


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
    turned = (a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle))
    return np.concatenate(turned, -1)


def attention(x, w):
    """x (N, T, d), w the weights of a block by name."""
    rows, T, _ = x.shape
    heads = (x @ w["attn.qkv.weight"].T).reshape(rows, T, 8, D)
    q = rotate(rms_norm(heads[:, :, :4], w["attn.q_norm.weight"]))
    k = rotate(rms_norm(heads[:, :, 4:6], w["attn.k_norm.weight"]))
    v, mixed = heads[:, :, 6:], []
    for h in range(4):
        scores = q[:, :, h] @ k[:, :, h // 2].transpose(0, 2, 1) / np.sqrt(D)
        scores = np.where(np.tril(np.ones((T, T), bool)), scores, -np.inf)
        mixed.append(softmax(scores) @ v[:, :, h // 2])
    return np.concatenate(mixed, -1) @ w["attn.out.weight"].T


def swiglu(x, w):
    gate, up = np.split(x @ w["mlp.gate_up.weight"].T, 2, axis=-1)
    return (gate / (1 + np.exp(-gate)) * up) @ w["mlp.down.weight"].T


def forward(weights, tokens):
    """All that layers read and write: (L, N, T, d); "layer" (L+1, N, T, d)."""
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
    """Of the tokens that follow, from h (N, T, d); 0 outside the mask."""
    z = h[:, :-1] @ weights["embed.weight"].T / GOLDEN["temperature"]
    z = z - z.max(-1, keepdims=True)
    log_pi = z - np.log(np.exp(z).sum(-1, keepdims=True))
    chosen = np.take_along_axis(log_pi, GOLDEN["tokens"][:, 1:, None], -1)[..., 0]
    return np.where(MASK, chosen, 0)


def entropy(h, weights):
    """At the response positions: h (.., N, T, d) -> (.., M)."""
    pi = softmax(h[..., :-1, :][..., MASK, :] @ weights["embed.weight"].T)
    return -(pi * np.log(pi)).sum(-1)


def advantages(kind):
    R, G = GOLDEN["rewards"], 4
    if kind == "rloo":
        return R - (R.sum(1, keepdims=True) - R) / (G - 1)
    over = (0, 1) if kind == "reinforce++" else 1
    return (R - R.mean(over, keepdims=True)) / (R.std(over, ddof=1, keepdims=True) + 1e-6)


def losses(weights, phase):
    """Averaged over tokens and over sequences, and the tokens cut off."""
    stream = forward(weights, GOLDEN["tokens"])
    h = stream["layer"][TARGET] if phase == 1 else stream["layer_normed"][L]
    ratio = np.exp(logprob(h, weights) - GOLDEN[f"old_logprob.phase{phase}"])
    A = advantages("grpo").reshape(-1, 1)
    J = np.minimum(ratio * A, np.clip(ratio, 0.8, 1.2) * A) * MASK
    cut_off = (((A > 0) & (ratio > 1.2)) | ((A < 0) & (ratio < 0.8))) & MASK
    return -J.sum() / MASK.sum(), -(J.sum(1) / MASK.sum(1)).mean(), cut_off.sum()


def close(name, value, atol=1e-9):
    np.testing.assert_allclose(value, GOLDEN[name], rtol=0, atol=atol, err_msg=name)


def test_the_page_gives_the_stream_and_the_mask():
    found = forward(WEIGHTS, GOLDEN["tokens"][:1])
    for ours, theirs in (("attn", "attn_out"), ("mlp", "mlp_out"), ("layer", "layer")):
        close(f"row0.{theirs}", found[ours][:, 0])
    close("row0.attn_in", found["attn_in"][:, 0]), close("row0.mlp_in", found["mlp_in"][:, 0])
    close("row0.logits", found["layer_normed"][L, 0] @ WEIGHTS["embed.weight"].T)
    for i in range(N):
        for t in range(MASK.shape[1]):
            response = GOLDEN["prompt_len"][i] - 1 <= t < GOLDEN["end"][i] - 1
            assert MASK[i, t] == response


def test_the_page_gives_entropies_and_target_layer():
    found = forward(WEIGHTS, GOLDEN["tokens"])
    H = {name: entropy(h, WEIGHTS) for name, h in found.items()}
    for name, value in H.items():
        close(f"entropy.{name}", value)
    close("dH.attn", (H["attn"] - H["attn_in"]).mean(1))
    close("dH.mlp", (H["mlp"] - H["mlp_in"]).mean(1))
    close("dH.layer", (H["layer"][1:] - H["layer"][:-1]).mean(1))
    raising = [l for l in range(1, L) if GOLDEN["dH.mlp"][l - 1] > 0]
    assert raising[-1] == TARGET and np.abs(GOLDEN["dH.mlp"]).min() > 0.05


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
    """Gradients by central differences, at the largest entry and at two others of each weight."""
    token, sequence, cut_off = losses(WEIGHTS, phase)
    close(f"loss_token.phase{phase}", token), close(f"loss_sequence.phase{phase}", sequence)
    assert cut_off == GOLDEN[f"cut_off.phase{phase}"] > 3
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


# ---- our code ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype,atol", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_our_code_gives_the_file(dtype, atol):
    """So the file cannot go stale: what it should hold is computed again."""
    found = make_golden.expected(GOLDEN, dtype)
    given = {name for name in make_golden.inputs(0)}
    assert given | found.keys() == GOLDEN.keys()
    for name, value in found.items():
        if value.dtype.kind == "U":
            assert value.tolist() == GOLDEN[name].tolist()
        else:
            close(name, value, max(atol, 1e-6) if name.startswith("grad") else atol)


def test_our_model_as_it_is_gives_the_log_probabilities():
    """Without the exact rope table that golden values are made with."""
    model = make_golden.GPT(make_golden.GPTConfig(**make_golden.SIZES))
    state = {name: torch.tensor(weight) for name, weight in WEIGHTS.items()}
    model.load_state_dict(state | {"lm_head.weight": state["embed.weight"]})
    logp = minibupo.token_logprobs(
        model, torch.tensor(GOLDEN["tokens"]), torch.tensor(MASK), temperature=0.8
    )
    close("logprob.full", logp.detach(), 1e-4)


def test_the_file_is_small():
    assert make_golden.PATH.stat().st_size <= 150 * 1024
