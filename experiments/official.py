"""Our functions beside those of the official code, on the same inputs: how far are they apart?

    git clone https://github.com/Trae1ounG/BuPO        # at COMMIT, see below
    python -m experiments.official BuPO                # prints the table of results/official.md

If both compute the same, the largest difference is rounding; what differs is bold. None of their
code is in this repository. Needs the extra `bench`, because our weights are copied into
transformers' Qwen3.
"""

import __future__

import argparse
import ast
import itertools
import math
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import minibupo
import train_toy as toy
from experiments.common import ROOT, markdown_table
from minibupo import FULL, Policy, response_mask, surrogate
from model import GPT, GPTConfig

COMMIT = "d3a85c698912d612c1cdb3edaa9011f450d23344"
FILES = (
    "verl/utils/torch_functional.py",
    "verl/trainer/ppo/core_algos.py",
    "verl/trainer/ppo/metric_utils.py",
    "scripts/eval_code/utils/evaluation.py",
    "visualization/plot_internal_entropy.py",
    "verl/models/custom_model/modeling_qwen3.py",
)
# Qwen3ForCausalLM is that of transformers 4.56 with one method changed, `forward`. We call this
# method on the model of the transformers that is installed.
CLASSES = ("EntropyAnalyzer", "Qwen3ForCausalLM")


def official(clone: Path) -> SimpleNamespace:
    """Return their functions. Raises ValueError for another commit, OSError for a missing file.

    Importing them would need a whole framework (ray, vllm, flash-attn). So only the definitions of
    functions and of the two classes in FILES are run, without decorators, which register and warn.
    """
    git = ["git", "-C", str(clone), "rev-parse", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True)
    if head.returncode:
        raise ValueError(f"{clone} is not a git clone: {head.stderr.strip()}")
    if head.stdout.strip() != COMMIT:
        raise ValueError(f"{clone} is at {head.stdout.strip()}: git -C {clone} checkout {COMMIT}")
    they = dict(torch=torch, np=np, defaultdict=defaultdict, itertools=itertools, comb=math.comb)
    they |= dict(CausalLMOutputWithPastNew=SimpleNamespace, Qwen3PreTrainedModel=torch.nn.Module)
    they |= dict(
        GenerationMixin=object, AlgoConfig=type(None), HUMAN_EVAL=None
    )  # named only in annotations
    for name in FILES:
        body = ast.parse((clone / name).read_text(encoding="utf-8")).body
        nodes = [n for n in body if isinstance(n, ast.FunctionDef)]
        nodes += [n for n in body if isinstance(n, ast.ClassDef) and n.name in CLASSES]
        for node in itertools.chain(*map(ast.walk, nodes)):
            if hasattr(node, "decorator_list"):
                node.decorator_list = []
        flags = __future__.annotations.compiler_flag  # annotations stay text
        exec(compile(ast.Module(nodes, []), name, "exec", flags, dont_inherit=True), they)
        they["verl_F"] = SimpleNamespace(**they)  # core_algos.py's name for torch_functional.py
    return they["verl_F"]


# ---- comparisons: (what, name of theirs, our numbers, their numbers) ----------------------------


def advantages(they, rewards, mask, what):
    """Yield advantages (N, T) of each kind. Their rewards stand at the last token of a response."""
    last = mask.sum(1, keepdim=True) - 1
    index = np.arange(len(mask)) // rewards.shape[1]
    at_last = torch.zeros(mask.shape).double().scatter(1, last, rewards.reshape(-1, 1))
    for kind in minibupo.ADVANTAGES:
        name = f"compute_{kind.replace('++', '_plus_plus')}_outcome_advantage"
        more = {"index": index, "config": SimpleNamespace(gamma=1.0)}
        theirs, _ = getattr(they, name)(at_last, mask.long(), **more)
        ours = minibupo.group_advantages(rewards, kind).reshape(-1, 1) * mask
        yield f"advantages, {kind}, {what}", name, ours, theirs


def their_loss(they, logp, old_logp, advantages, mask, average="token-mean"):
    """Return their loss and the clipped share of tokens, with the options of their scripts."""
    config = SimpleNamespace(clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.2)
    config.get = {"clip_ratio_c": 10.0}.get  # the dual clip
    args = (advantages[:, None].expand_as(logp), mask.long(), average, config)
    return they.compute_policy_loss_vanilla(old_logp, logp, *args)[:2]


def losses(they, advantage, mask, spread, limit, name="compute_policy_loss_vanilla"):
    """Yield loss and gradient at log-ratios drawn from N(0, spread), within +-limit."""
    logp = (spread * torch.randn(mask.shape).double()).clamp(-limit, limit).requires_grad_()
    rows = (logp, torch.zeros_like(logp), advantage, mask)
    where = f"log-ratios within {limit}"
    for average, mode in (("token", "token-mean"), ("sequence", "seq-mean-token-mean")):
        ours, clipped = surrogate(*rows, average=average)
        theirs, their_share = their_loss(they, *rows, mode)
        yield f"loss, {mode}, {where}", name, ours, theirs
        gradients = [torch.autograd.grad(loss, logp)[0] for loss in (ours, theirs)]
        yield f"gradient, {mode}, {where}", name, *gradients
    yield f"clipped share of tokens, {where}", name, clipped / mask.sum(), their_share
    # dp_actor.py takes the mean over each micro-batch, and weights it by its share of the rows
    theirs = sum(their_loss(they, *part)[0] / 8 for part in zip(*(x.split(64) for x in rows)))
    yield f"loss, token-mean, 8 micro-batches, {where}", name, surrogate(*rows)[0], theirs


def formulas(they):
    """Yield what needs no model: 64 groups of 8 rewards, responses of 1 to 12 tokens."""
    torch.manual_seed(0)
    rewards = torch.randint(2, (64, 8)).double()
    mask = torch.arange(12) < torch.randint(1, 13, (512, 1))
    yield from advantages(they, rewards, mask[:, :1], "1 token in each response")
    yield from advantages(they, rewards, mask, "1 to 12 tokens in each response")
    advantage = minibupo.group_advantages(rewards).flatten()
    yield from losses(they, advantage, mask, spread=0.5, limit=2.3)  # ratios below 10
    yield from losses(they, advantage, mask, spread=3.0, limit=20)
    logits = 5 * torch.randn(500, 1000)
    for name in ("entropy_from_logits", "entropy_from_logits_with_chunking"):
        yield "entropy of 1000 logits", name, minibupo.entropy(logits), getattr(they, name)(logits)
    for correct in range(33):
        ours = torch.tensor(minibupo.pass_at_k(32, correct, 4))
        theirs = they.estimate_pass_at_k(32, [correct], 4)
        yield "Pass@4 of 32", "estimate_pass_at_k", ours, theirs
        theirs = they.unbiased_pass_at_k([True] * correct + [False] * (32 - correct), 4)
        what = "Pass@4 of 32, " + ("0 to 3 correct" if correct < 4 else "4 to 32 correct")
        yield what, "unbiased_pass_at_k", ours, theirs


def pairs():
    """Yield our model, the same as transformers' Qwen3, tokens, mask, pairs of equal weights."""
    from experiments.trl_peer import same_weights, to_qwen3

    torch.manual_seed(0)
    model = GPT(GPTConfig(toy.VOCAB_SIZE, 32, 4, 32, n_head=4, n_kv_head=2))
    tokens = torch.randint(toy.PAD, (16, 24))
    end = torch.randint(8, 25, (16,))
    yield model, to_qwen3(model), tokens, response_mask(end - 6, end, 24), same_weights
    model = toy.load_model(ROOT / "course" / "base.pt")
    yield model, to_qwen3(model), *toy.own_solutions(model, toy.Settings(), 32), same_weights


def policies(they, model, qwen3, tokens, mask, same_weights, T=0.7):
    """Yield log-probabilities of all layers at temperature T, and gradients of the clipped loss."""
    L = model.n_layer
    advantage = torch.randn(len(tokens))
    name = "Qwen3ForCausalLM.forward"

    def gradient(weight):
        return torch.full_like(weight, math.nan) if weight.grad is None else weight.grad

    for l in range(1, L + 1):
        policy, what = (Policy(l), "layers 1..L-1") if l < L else (FULL, "layer L, our pi_theta")
        ours = minibupo.token_logprobs(model, tokens, mask, policy, T)
        qwen3.config.internal_layer = l - 1  # their k
        out = they.Qwen3ForCausalLM.forward(qwen3, tokens, output_hidden_states=True)
        logits = out.mid_layer_logits[l - 1][:, :-1] / T
        theirs = they.logprobs_from_logits_v2(logits, tokens[:, 1:]) * mask
        yield f"log-probabilities, {what}", name, ours, theirs
        old = (ours + 0.2 * torch.randn(ours.shape)).detach()
        model.zero_grad()
        qwen3.zero_grad()
        surrogate(ours, old, advantage, mask)[0].backward()
        their_loss(they, theirs, old, advantage, mask)[0].backward()
        for weight, twin in same_weights(model, qwen3):
            if weight.is_leaf:  # all but q, k, v and gate, up, which are parts of matrices in ours
                yield f"gradient to weights, {what}", name, gradient(weight), gradient(twin)
    raw = minibupo.token_logprobs(model, tokens, mask, Policy(L), T)
    yield "log-probabilities, layer L, our Policy(L)", name, raw, theirs


def figure(they, model, qwen3, tokens, mask, _, name="EntropyAnalyzer"):
    """Yield the entropy changes of their figure, at positions P..T-1; ours are P-1..T-2."""
    means = defaultdict(list)
    for row, at in zip(tokens, mask):
        P = int(at.nonzero()[0]) + 1
        T = int(at.nonzero()[-1]) + 2
        analyzer = they.EntropyAnalyzer.__new__(they.EntropyAnalyzer)  # __init__ fetches a model
        analyzer.model = qwen3
        analyzer.device = "cpu"
        analyzer.hooks = []
        analyzer.module_activations = defaultdict(list)
        analyzer.internal_entropy_data = []
        analyzer._register_hooks()
        qwen3.model(row[None, :T])
        analyzer._remove_hooks()
        analyzer.analyze_internal_modules(P - 1)  # their prompt_length leaves out a newline
        found = defaultdict(list)
        for item in analyzer.internal_entropy_data:
            found[item["module_name"]].append(item["entropy_change"])
        later = (torch.arange(T) >= P)[None]  # of T + 1 tokens: the last one predicts nothing
        same = minibupo.look_inside(model, torch.cat((row[:T], row[:1]))[None], later)
        usual = minibupo.look_inside(model, row[None], at[None])
        for change, ending in (("dH_attn", "_attn"), ("dH_mlp", "_ffn"), ("dH_layer", "")):
            theirs = torch.tensor([found[f"layer_{l}{ending}"] for l in range(model.n_layer)])
            yield f"{change}, layers 1..L, positions P..T-1", name, same[change], theirs
            means[change] += [(usual[change], theirs)]
    for change, rows in means.items():
        ours, theirs = (torch.cat(x, 1).mean(1) for x in zip(*rows))
        yield f"mean {change}, layers 1..L, ours over P-1..T-2", name, ours, theirs


# ---- the table ---------------------------------------------------------------------------------


def table(rows) -> str:
    """Return comparisons as a Markdown table.

    Those of one name share a row, which shows the place where the difference is largest.
    """
    worst = {}
    for *key, ours, theirs in rows:
        a, b = (torch.as_tensor(x, dtype=torch.double).detach().flatten() for x in (ours, theirs))
        difference = (a - b).abs().masked_fill(a.isnan() & b.isnan(), 0).nan_to_num(math.inf)
        found = max(zip(difference.tolist(), a.tolist(), b.tolist()))
        worst[*key] = max(worst.get((*key,), found), found)
    cells = []
    for (what, name), (d, a, b) in worst.items():
        difference = f"{d:.1e}" if d < 1e-4 else f"**{d:.2g}**"
        cells.append([what, f"`{name}`", f"{a:.4g}", f"{b:.4g}", difference])
    head = ["what", "theirs", "ours there", "theirs there", "largest difference"]
    return markdown_table(head, cells)


def main(argv=None) -> int:
    """Print the table. Return 0, or 2 if there is nothing to compare."""
    parser = argparse.ArgumentParser("official", description=__doc__.split("\n")[0])
    parser.add_argument("path", metavar="PATH", type=Path, help="a clone of the official code")
    path = parser.parse_args(argv).path
    try:
        they = official(path)
        import transformers
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"official: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    models = (f(they, *pair) for pair in pairs() for f in (policies, figure))
    print(table(itertools.chain(formulas(they), *models)))
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(
        f"\nMade by `python -m experiments.official BuPO`; their commit {COMMIT[:7]}; {versions}."
    )
    print(
        "The numbers are those of the place where the difference is largest; bold is what differs."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
