"""Writes tests/golden.npz, the numbers that docs/golden.md explains: python tests/make_golden.py

inputs() draws a tiny model and a batch, expected(inputs) is what minibupo.py makes of them in
float64. test_golden.py holds both our code and a rewrite in NumPy to the file.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import minibupo  # noqa: E402
from minibupo import FULL, Policy  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

PATH = Path(__file__).parent / "golden.npz"
SIZES = dict(vocab_size=16, context_length=16, n_layer=3, d_model=16)
SIZES |= dict(n_head=4, n_kv_head=2, head_dim=6, d_mlp=16)
Q, G, CLIP, TEMPERATURE, TARGET = 3, 4, 0.2, 0.8, 2


def inputs(seed: int) -> dict:
    """All that is given: weights, tokens, lengths, rewards, old log-probabilities less new ones."""
    rng = np.random.default_rng(seed)
    found = {**SIZES, "rope_theta": 10_000.0, "norm_eps": 1e-6, "clip": CLIP}
    found |= {"temperature": TEMPERATURE}
    for name, weight in GPT(GPTConfig(**SIZES)).named_parameters():
        mean, std = (1.0, 0.3) if weight.dim() == 1 else (0.0, 0.35)
        std = 0.15 if name.endswith("down.weight") else std  # small, or no FFN would raise entropy
        drawn = rng.normal(mean, std, weight.shape)
        found[f"weight.{name}"] = np.round(drawn * 256) / 256  # short in any binary format
    found["prompt_len"] = rng.integers(2, 6, Q).repeat(G)
    found["end"] = found["prompt_len"] + rng.integers(1, 9, Q * G)
    T = found["end"].max()
    found["tokens"] = rng.integers(0, 16, (Q * G, T))
    for q, group in enumerate(np.split(found["tokens"], Q)):
        prompt = slice(0, found["prompt_len"][q * G])
        group[:, prompt] = group[0, prompt]  # the G rows of a question have one prompt
    found["rewards"] = np.array([[1.0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 1, 0]])
    model, tokens, mask = model_of(found), torch.tensor(found["tokens"]), mask_of(found)
    for phase, policy in ((1, Policy(TARGET)), (2, FULL)):
        logp = minibupo.token_logprobs(model, tokens, mask, policy, TEMPERATURE).detach().numpy()
        # how much likelier a token has become since; nothing close to where the clip begins
        size = rng.choice([0.05, 0.1, 0.35, 0.5], logp.shape) * rng.choice([-1.0, 1.0], logp.shape)
        found[f"old_logprob.phase{phase}"] = np.round((logp - size) * 1024) / 1024 * mask.numpy()
    return found


def model_of(given: dict, dtype=torch.float64) -> GPT:
    """The model with these weights. Its rope table, float32 by default, is made in this type."""
    model = GPT(GPTConfig(**SIZES)).to(dtype)
    for name, weight in model.named_parameters():
        weight.data = torch.tensor(given[f"weight.{name}"], dtype=dtype)
    i, t = torch.arange(0, 6, 2, dtype=torch.float64), torch.arange(16, dtype=torch.float64)
    angle = (t[:, None] * 10_000.0 ** (-i / 6)).repeat(1, 2)[:, None]
    model.cos, model.sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return model


def mask_of(given: dict):
    """The response mask (N, T-1)."""
    lengths = (torch.tensor(given[name]) for name in ("prompt_len", "end"))
    return minibupo.response_mask(*lengths, given["tokens"].shape[1])


def expected(given: dict, dtype=torch.float64) -> dict:
    """What minibupo.py makes of the inputs: entropies, log-probabilities, losses, gradients."""
    model = model_of(given, dtype)
    tokens, mask = torch.tensor(given["tokens"]), mask_of(given)
    found = {"mask": mask, **first_row(model, tokens[:1])}
    look = minibupo.look_inside(model, tokens, mask)
    found |= {f"entropy.{name}": look[name] for name in ("layer", "layer_normed", "attn", "mlp")}
    found |= {f"entropy.{name}": look[name] for name in ("attn_in", "mlp_in")}
    found |= {f"dH.{name}": look[f"d_{name}"].mean(1) for name in ("layer", "attn", "mlp")}
    found["target_layer"] = minibupo.target_layer(found["dH.mlp"])

    def logprobs(*policy):
        policy = Policy(*policy)
        return minibupo.token_logprobs(model, tokens, mask, policy, TEMPERATURE).detach()

    found["logprob.full"] = logprobs()
    for name, site in zip(("layer", "attn", "mlp"), minibupo.SITES):
        found[f"logprob.{name}"] = torch.stack([logprobs(l, site) for l in (1, 2, 3)])
    rewards = torch.tensor(given["rewards"], dtype=dtype)
    for kind in minibupo.ADVANTAGES:
        found[f"advantages.{kind}"] = minibupo.group_advantages(rewards, kind)
    for phase, policy in ((1, Policy(found["target_layer"])), (2, FULL)):
        old = torch.tensor(given[f"old_logprob.phase{phase}"], dtype=dtype)
        args = tokens, old, found["advantages.grpo"].flatten(), mask, policy, TEMPERATURE
        of_phase = loss_and_gradient(model, args)
        found |= {f"{name}.phase{phase}": value for name, value in of_phase.items()}
    return {name: np.asarray(value) for name, value in found.items()}


@torch.no_grad()
def first_row(model, tokens) -> dict:
    """Of row 0 all that layers read and write, and the logits: shows where a rewrite goes wrong."""
    traces = list(model.trace(tokens))
    stream = [traces[0].resid_pre, *(trace.resid_post for trace in traces)]
    found = {"row0.layer": torch.cat(stream), "row0.logits": model(tokens)[0]}
    for name in ("attn_in", "attn_out", "mlp_in", "mlp_out"):
        found[f"row0.{name}"] = torch.cat([getattr(trace, name) for trace in traces])
    return found


def loss_and_gradient(model, args) -> dict:
    """Both averages of the loss, tokens cut off, and the gradient of the token average."""
    found = {}
    for average in ("sequence", "token"):
        model.zero_grad(set_to_none=True)
        loss, cut_off = minibupo.policy_loss(model, *args, clip=CLIP, average=average)
        loss.backward()
        found[f"loss_{average}"] = loss.detach()
    found["cut_off"] = cut_off
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    # in float32, or the file would be half as large again
    found |= {f"grad.{n}": grad.float() for n, grad in gradients.items() if grad is not None}
    found["no_grad"] = np.array([name for name, grad in gradients.items() if grad is None], str)
    return found


if __name__ == "__main__":
    given = inputs(seed=0)
    np.savez_compressed(PATH, **given, **expected(given))
    print(f"{PATH.name}: {PATH.stat().st_size / 1024:.0f} KB")
