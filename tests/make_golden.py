"""Write tests/golden.npz, the numbers that docs/golden.md explains: python tests/make_golden.py

inputs() draws a tiny model and a batch. expected(inputs) is what minibupo.py computes from them in
float64. test_golden.py compares both our code and a rewrite in NumPy with the file.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import minibupo  # noqa: E402
from minibupo import FULL, Policy, Rollouts  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

PATH = Path(__file__).parent / "golden.npz"
SIZES = dict(vocab_size=16, context_length=16, n_layer=3, d_model=16)
SIZES |= dict(n_head=4, n_kv_head=2, head_dim=6, d_mlp=16)
Q = 3  # questions
G = 4  # responses to each
CLIP = 0.2
TEMPERATURE = 0.8
TARGET = 2

# two steps of BuPO; eps is large so that rounding in float32 is not magnified
ADAMW = dict(lr=0.01, betas=(0.9, 0.999), eps=1e-4, weight_decay=0.1)
MAX_GRAD_NORM = 1.0
MINIBATCHES = 2

TARGET_CASES = [  # dH_FFN of five layers
    [0.4, 0.3, -0.2, 0.1, -0.5],
    [0.9, 0.3, -0.1, -0.2, -0.3],
    [0.4, 0.2, -0.3, -0.1, 0.6],
    [0.1, -0.2, 0.4, -0.3, 0.9],
    [0.1, 0.2, 0.3, 0.4, 0.5],
    [0.3, 0.2, 0.0, 0.0, -0.1],
    [0.3, -0.4, -0.3, -0.2, -0.1],
    [-0.1, -0.2, -0.3, -0.4, 0.5],
    [0.0, 0.0, 0.0, 0.0, 0.0],
]


def inputs(seed: int) -> dict:
    """Return what is given: weights, tokens, lengths, rewards, old log-probabilities, settings."""
    rng = np.random.default_rng(seed)
    found = {**SIZES, "rope_theta": 10_000.0, "norm_eps": 1e-6, "clip": CLIP}
    found |= {"temperature": TEMPERATURE, "minibatches": MINIBATCHES}
    found |= {"max_grad_norm": MAX_GRAD_NORM, **{f"adamw.{k}": v for k, v in ADAMW.items()}}
    found["target_layer.cases"] = np.array(TARGET_CASES)
    for name, weight in GPT(GPTConfig(**SIZES)).named_parameters():
        mean, std = (1.0, 0.3) if weight.dim() == 1 else (0.0, 0.35)
        if name.endswith("down.weight"):
            std = 0.15  # with a larger one no FFN would raise entropy
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

    model = model_of(found)
    tokens = torch.tensor(found["tokens"])
    mask = mask_of(found)
    for phase, policy in ((1, Policy(TARGET)), (2, FULL)):
        logp = minibupo.token_logprobs(model, tokens, mask, policy, TEMPERATURE).detach().numpy()
        # log(ratio) of each token; none is close to where the clip begins
        size = rng.choice([0.05, 0.1, 0.35, 0.5], logp.shape) * rng.choice([-1.0, 1.0], logp.shape)
        found[f"old_logprob.phase{phase}"] = np.round((logp - size) * 1024) / 1024 * mask.numpy()
    return found


def model_of(given: dict, dtype=torch.float64) -> GPT:
    """Return the model with these weights, and with a RoPE table that is as exact as this type."""
    model = GPT(GPTConfig(**SIZES)).to(dtype)
    for name, weight in model.named_parameters():
        weight.data = torch.tensor(given[f"weight.{name}"], dtype=dtype)
    i = torch.arange(0, 6, 2, dtype=torch.float64)
    t = torch.arange(16, dtype=torch.float64)
    angle = (t[:, None] * 10_000.0 ** (-i / 6)).repeat(1, 2)[:, None]
    model.cos = angle.cos().to(dtype)
    model.sin = angle.sin().to(dtype)
    return model


def mask_of(given: dict):
    """Return the response mask (N, T-1)."""
    lengths = (torch.tensor(given[name]) for name in ("prompt_len", "end"))
    return minibupo.response_mask(*lengths, given["tokens"].shape[1])


def expected(given: dict, dtype=torch.float64) -> dict:
    """Return what minibupo.py computes from the inputs, by the names of docs/golden.md."""
    model = model_of(given, dtype)
    tokens = torch.tensor(given["tokens"])
    mask = mask_of(given)
    found = {"mask": mask, **first_row(model, tokens[:1])}
    look = minibupo.look_inside(model, tokens, mask)
    for name in ("layer", "layer_normed", "attn", "mlp", "attn_in", "mlp_in"):
        found[f"entropy.{name}"] = look[name]
    for name in ("dH_layer", "dH_attn", "dH_mlp"):
        found[name] = look[name].mean(1)
    found["target_layer"] = minibupo.target_layer(found["dH_mlp"])
    found["target_layer.of_cases"] = np.array([layer_or_0(dH) for dH in TARGET_CASES])

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
    found |= two_steps(given, dtype)
    return {name: np.asarray(value) for name, value in found.items()}


def layer_or_0(dH_mlp) -> int:
    """Return the target layer, or 0 if the rule picks none."""
    try:
        return minibupo.target_layer(dH_mlp)
    except ValueError:
        return 0


@torch.no_grad()
def first_row(model, tokens) -> dict:
    """Return what layers read and write in row 0, and its logits, to find faults of a rewrite."""
    traces = list(model.trace(tokens))
    stream = [traces[0].resid_pre, *(trace.resid_post for trace in traces)]
    found = {"row0.layer": torch.cat(stream), "row0.logits": model(tokens)[0]}
    for name in ("attn_in", "attn_out", "mlp_in", "mlp_out"):
        found[f"row0.{name}"] = torch.cat([getattr(trace, name) for trace in traces])
    return found


def loss_and_gradient(model, args) -> dict:
    """Return both averages of the loss, the clipped tokens, the gradient of the token average."""
    found = {}
    for average in ("sequence", "token"):
        model.zero_grad(set_to_none=True)
        loss, clipped = minibupo.policy_loss(model, *args, clip=CLIP, average=average)
        loss.backward()
        found[f"loss_{average}"] = loss.detach()
    found["clipped"] = clipped
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    # in float32, because the file would otherwise be half as large again
    found |= {f"grad.{n}": grad.float() for n, grad in gradients.items() if grad is not None}
    found["no_grad"] = np.array([name for name, grad in gradients.items() if grad is None], str)
    return found


def two_steps(given: dict, dtype) -> dict:
    """Return the weights after step 1, in phase 1, and after step 2, in phase 2; and their logs."""
    model = model_of(given, dtype)
    rewards = torch.tensor(given["rewards"], dtype=dtype)
    batch = Rollouts(*(torch.tensor(given[n]) for n in ("tokens", "prompt_len", "end")), rewards)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    options = dict(minibatches=MINIBATCHES, max_grad_norm=MAX_GRAD_NORM)
    options |= dict(temperature=TEMPERATURE, clip=CLIP)
    found = {}
    for step, policy in minibupo.phases(optimizer, Policy(TARGET), s_inter=1, steps=2):
        log = minibupo.update(model, optimizer, batch, policy, **options)
        for name in ("grad_norm", "clip_fraction"):
            found[f"step{step}.{name}"] = log[name]
        for name, weight in model.named_parameters():  # in float32, as gradients are
            found[f"step{step}.weight.{name}"] = weight.detach().float().clone()
    return found


if __name__ == "__main__":
    given = inputs(seed=0)
    np.savez_compressed(PATH, **given, **expected(given))
    print(f"{PATH.name}: {PATH.stat().st_size / 1024:.0f} KB")
