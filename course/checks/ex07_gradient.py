"""Exercise 7: a table of predictions, compared with the gradients of a real backward pass."""

import torch
from checks.common import Wrong

from minibupo import FULL, Policy, policy_loss
from model import GPT, GPTConfig

TITLE, MINUTES = "which weights get a gradient", 20
REFUSED = ()
HINTS = (
    "Draw the forward pass from tokens to logits as a chain. The gradient runs back along it, from "
    "the logits, and reaches everything that was used on the way.",
    "All policies use E_u last. Only one of them uses the final norm: which one?",
    "The FFN of a layer reads the stream after attention has written to it. Which of the two "
    "modules can then depend on the other?",
    "absent: the softmax gives a probability to every token, also to one that is not in the batch. "
    "Which of the two matrices computes it? Which matrix is that, if embeddings are tied?",
)

COLUMNS = {  # name: policy, tied
    "pi_theta": (FULL, False),
    "Layer 2": (Policy(2), False),
    "ATTN 2": (Policy(2, "attn_out"), False),
    "FFN 3": (Policy(3, "mlp_out"), False),
    "Layer 2, tied": (Policy(2), True),
}
MODULES = [f"{module} {l}" for l in range(1, 5) for module in ("attn", "ffn")]
ROWS = ["embedding", "absent", *MODULES, "final norm", "E_u"]
ABSENT = 10  # a token that is not in the batch


def truth(policy, tied) -> dict[str, int]:
    """Return, for each row of the table, 1 if a real backward pass gives it a nonzero gradient."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT(GPTConfig(11, 16, n_layer=4, d_model=16, n_head=2, tied=tied))
        tokens = torch.randint(0, ABSENT, (4, 8))
    mask = torch.ones(4, 7, dtype=torch.bool)
    advantages = torch.tensor([1.5, -0.5, -0.5, -0.5])
    loss, _ = policy_loss(model, tokens, torch.full((4, 7), -2.4), advantages, mask, policy)
    loss.backward()
    embedding = model.embed.weight
    found = {"embedding": [embedding.grad], "E_u": [model.lm_head.weight.grad]}
    found["absent"] = [embedding.grad[ABSENT]]
    found["final norm"] = [model.final_norm.weight.grad]
    for l, block in enumerate(model.blocks, 1):
        for name, parts in (
            ("attn", (block.attn_norm, block.attn)),
            ("ffn", (block.mlp_norm, block.mlp)),
        ):
            found[f"{name} {l}"] = [p.grad for part in parts for p in part.parameters()]
    return {row: int(any(g is not None and bool(g.any()) for g in found[row])) for row in ROWS}


def read(table) -> dict[tuple[str, str], str]:
    """Return the cells of a learner's table, {(row, column): "0", "1" or something else}."""
    if not isinstance(table, str):
        raise Wrong("form", "PREDICTION must be the table, a text in triple quotes")
    cells = {}
    for line in table.strip().splitlines()[1:]:
        name = next((row for row in ROWS if line.startswith(row)), None)
        values = line[len(name or "") :].split()
        if name is None or len(values) != len(COLUMNS):
            raise Wrong("form", f"this is not a row of {len(COLUMNS)} cells: {line.strip()!r}")
        cells |= {(name, column): value for column, value in zip(COLUMNS, values)}
    missing = [row for row in ROWS if (row, "pi_theta") not in cells]
    if missing:
        raise Wrong("form", f"the row of {missing[0]} is missing")
    if set(cells.values()) == {"?"}:
        raise Wrong("not written", "not written yet: all cells are ?")
    for (row, column), value in cells.items():
        if value not in ("0", "1"):
            raise Wrong("form", f"{row}, {column}: each cell must be 0 or 1, not {value}")
    return cells


def misunderstanding(row: str, column: str, wanted: int) -> str:
    """Return the key of SAYS that explains an incorrect cell."""
    policy, tied = COLUMNS[column]
    if row == "absent":
        return "absent, tied" if tied else "absent"
    if row in ("E_u", "embedding"):
        return row
    if policy == FULL:
        return "pi_theta"
    if row == "final norm":
        return "final norm"
    if (row, column) == ("ffn 2", "ATTN 2"):
        return "ffn above attention"
    if (row, column) == ("attn 3", "FFN 3"):
        return "attention below ffn"
    return "below" if wanted else "above"


SAYS = {
    "above": "Layers above the policy's layer are not computed for it, so they have no gradient. "
    "The gradient runs down from the vector that is unembedded, not up.",
    "below": "The gradient runs down from the vector that is unembedded to everything it was "
    "computed from: what the module read, and so what all layers below wrote.",
    "final norm": "An internal policy has no final norm. With the norm it would be the logit lens.",
    "E_u": "E_u computes the logits of every policy. It therefore also learns in phase 1, and that "
    "changes pi_theta.",
    "embedding": "The chain ends at the embedding: H^0 is a term of the stream, and all layers "
    "read it.",
    "pi_theta": "pi_theta uses every layer and the final norm, so all of them learn.",
    "ffn above attention": "The FFN of layer 2 reads what attention of layer 2 wrote. It comes "
    "later, so A^2 does not depend on it.",
    "attention below ffn": "The FFN of layer 3 reads H^2 + A^3, so F^3 depends on the attention of "
    "its own layer.",
    "absent": "A token that is not in the batch is not looked up, so its row of the embedding has "
    "gradient 0. (Its row of E_u has one, because the softmax lowers all tokens not chosen.)",
    "absent, tied": "If embeddings are tied, the row of an absent token is also a row of E_u, and "
    "the softmax lowers all tokens not chosen. So the embedding of every token moves.",
}


def check(answer, quick=False):
    cells = read(getattr(answer.module, "PREDICTION", None))
    found = {}  # {kind of misunderstanding: its cells}
    for column, setting in COLUMNS.items():
        for row, wanted in truth(*setting).items():
            if int(cells[row, column]) != wanted:
                kind = misunderstanding(row, column, wanted)
                found.setdefault(kind, []).append(f"{row} for {column}")
    if found:
        kind = max(found, key=lambda kind: len(found[kind]))
        count = sum(map(len, found.values()))
        shown = "; ".join(found[kind][:4])
        more = ", ..." if len(found[kind]) > 4 else ""
        where = f"{count} of {len(cells)} cells are incorrect, for example {shown}{more}."
        raise Wrong(kind, f"{where}\n{SAYS[kind]}")
