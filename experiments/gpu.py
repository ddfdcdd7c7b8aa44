"""One command for a GPU: does everything run there, what does it cost, what would make it faster?

    python -m experiments.gpu                          # all parts, in under ten minutes
    python -m experiments.gpu --part step              # only this part
    python -m experiments.gpu --device cpu --quick     # tiny sizes, to see that it runs

    main       the main job of train_toy.py, from nothing to its final table
    agreement  the same numbers as on the CPU: logits, entropies, greedy samples, gradients
    resume     a run twice, and stopped and resumed: how far are the weights apart?
    step       seconds of a step by part, tokens a second, share of the device's peak
    graph      sampling by one CUDA graph for each token (cuda_graph.py), and the main job with it
    large      a step of a larger setting, its memory on paper and as measured
    analyze    every command of analyze.py, on the run of `main`
    trl        a step beside one of TRL's GRPOTrainer (needs the extra `bench`)
    bfloat16   a step of the larger setting under autocast, rescoring included
    language   minibupo_hf/train.py on SmolLM2 and Qwen, if language_models.py has fetched them
    train      the larger setting from nothing to its final table, with figures beside --json

Parts are in order of importance. None starts once --minutes have passed; one that fails does not
stop the rest. After each part, everything known so far is written to --json, at the end a table
beside it. Nothing is fetched from a network.
"""

import argparse
import contextlib
import io
import json
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path
from unittest import mock

import torch

import analyze
import minibupo
import train_toy as toy
from experiments import bench, common, cuda_graph
from experiments.cuda_graph import Decoder, captured
from minibupo import FULL, Policy, response_mask
from model import GPTConfig

BASE = common.ROOT / "course" / "base.pt"
LARGE = dict(n=9, n_layer=12, d_model=384)  # 23 million parameters
TRAINED = LARGE | dict(n=8)  # what `train` trains, with these rates of pretraining and of RL
RATES = 1e-3, 1.5e-4  # lower than the default: the model is wider
TINY = dict(n=3, n_layer=2, d_model=32, questions=4, group=4)
SHORT = f"--base {BASE} --questions 8 --eval_problems 16 --threads 1".split()


def seconds(o, f) -> float:
    """Return the median seconds of three calls, after one that does not count."""
    times = [common.seconds(f, o.wait) for _ in range(2 if o.quick else 4)]
    return statistics.median(times[1:])


def apart(a, b) -> float:
    """Return the largest difference of two tensors, relative to the largest number of b."""
    a = a.detach().double().cpu()
    b = b.detach().double().cpu()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))


def run_toy(o, name: str, *options: str) -> Path:
    """Run train_toy.py into a directory of this name, and return it."""
    argv = [*options, "--device", o.device.type, "--out_dir", str(o.work / name)]
    if code := toy.main(argv):
        raise RuntimeError(f"train_toy.py {' '.join(argv)} ended with {code}")
    return o.work / name


def main_job(o, name="main") -> dict:
    """Return the seconds and the accuracy of the main job."""
    started = time.time()
    quick = [*SHORT, *"--steps 2 --s_inter 1 --layer 2".split()]
    out = run_toy(o, name, *(quick if o.quick else []))
    written = [(out / name).stat().st_mtime for name in ("base.pt", "ckpt.pt")]
    found = {"seconds, base model": written[0] - started, "seconds, all": time.time() - started}
    found["seconds, RL with evaluations and looks inside"] = written[1] - written[0]
    return found | learned(out)


def learned(run: Path) -> dict:
    """Return accuracy before and after RL, by length of problem."""
    first, *_, last = (r["tiers"] for r in toy.read_metrics(run, "eval"))
    return {f"Avg@8, n = {n}": f"{first[n]['avg@8']:.3f} -> {last[n]['avg@8']:.3f}" for n in first}


def agreement(o) -> dict:
    """Return how far the device is from the CPU on course/base.pt, relative to the largest."""
    models = toy.load_model(BASE, o.device), toy.load_model(BASE)
    tokens, mask = toy.own_solutions(models[1], toy.Settings(), 8)

    def both(f):
        return [f(m, tokens.to(m.device), mask.to(m.device)) for m in models]

    def gradients(policy, m, tokens, mask):
        old = minibupo.token_logprobs(m, tokens, mask, policy).detach()
        advantages = torch.linspace(-1, 1, len(tokens), device=m.device)
        loss, _ = minibupo.policy_loss(m, tokens, old, advantages, mask, policy)
        return torch.autograd.grad(loss, list(m.parameters()), materialize_grads=True)

    found = {"logits": apart(*both(lambda m, tokens, _: m(tokens)))}
    there, here = both(minibupo.look_inside)
    found["look_inside"] = max(apart(there[name], here[name]) for name in here)
    there, here = both(lambda m, tokens, _: m.generate(tokens[:, :6], 20, temperature=0).tokens)
    found["greedy samples, share of equal tokens"] = float((there.cpu() == here).float().mean())
    for policy in (FULL, Policy(3), Policy(3, "attn_out"), Policy(3, "mlp_out")):
        there, here = both(partial(gradients, policy))
        found[f"gradients, {tuple(policy)}"] = max(map(apart, there, here))
    return found


def resume(o) -> dict:
    """Return the relative difference of the weights after 6 steps, 3 of them phase 1."""
    options = [*SHORT, "--s_inter", "3", "--layer", "3"]
    for name in ("whole", "again"):
        run_toy(o, name, *options, "--steps", "6")
    run_toy(o, "stopped", *options, "--steps", "3")
    run_toy(o, "stopped", "--resume", "--steps", "6")
    files = (o.work / name / "ckpt.pt" for name in ("whole", "again", "stopped"))
    whole, *others = (toy.load_model(file).state_dict() for file in files)
    twice, stopped = (max(apart(w[key], whole[key]) for key in whole) for w in others)
    return {"the same run twice": twice, "stopped and resumed": stopped}


def analyze_commands(o) -> dict:
    """Return the seconds of each command on the run of `main`, which must exist."""
    run = o.work / "main"
    found = {}
    for command in ("sample", "step") if o.quick else analyze.COMMANDS:
        prompt = ["7+5*3-2="] if command in ("lens", "sample") else []
        argv = [command, str(run), *prompt, "--device", o.device.type]
        started = time.perf_counter()
        if code := analyze.main(argv):
            raise RuntimeError(f"analyze.py {' '.join(argv)} ended with {code}")
        found[f"seconds, {command}"] = time.perf_counter() - started
    return found


def setting(o, **sizes):
    """Return settings, a model with random weights, and model.generate's arguments for a step."""
    s = toy.Settings(**(TINY if o.quick else sizes))
    model = bench.random_model(s.model_config()).to(o.device)
    problems = toy.draw_questions(toy.rng_for(0, "questions", 1), s.questions, s.n)
    return s, model, cuda_graph.sampling_arguments(s, problems, s.group, o.device)


def gemm_rate(o) -> float:
    """Return the FLOP/s of a product of square matrices."""
    size = 256 if o.quick else 8192
    a, b = torch.randn(2, size, size, device=o.device)
    return 2 * size**3 / seconds(o, lambda: a @ b)


def forward_flops(cfg: GPTConfig, positions: int, pairs: int, unembedded: int) -> int:
    """Return the FLOPs of all matrix products in a forward pass, 2 m n k for (m, k) x (k, n).

        positions    L (2 d (H + 2 K) D + 2 H D d + 6 d d_mlp)    qkv; out; gate, up and down
        pairs        L 4 H D                                      queries by keys, weights by values
        unembedded   2 d V

    Each line is multiplied by so many positions, (query, key) pairs over all rows, and positions
    whose logits are wanted. Causal attention has T (T + 1) / 2 pairs in a row of T. A kernel that
    computes the other half and masks it has T^2. A backward pass costs twice as much, so both
    passes cost three times this.
    """
    heads = cfg.n_head * cfg.head_dim
    kv = cfg.n_kv_head * cfg.head_dim
    per_position = 2 * cfg.d_model * (heads + 2 * kv) + 2 * heads * cfg.d_model
    per_position += 6 * cfg.d_model * cfg.d_mlp
    blocks = cfg.n_layer * (positions * per_position + pairs * 4 * heads)
    return blocks + unembedded * 2 * cfg.d_model * cfg.vocab_size


def pairs_to(T) -> int:
    """Return the causal (query, key) pairs of all rows of lengths T."""
    return int((T * (T + 1) // 2).sum())


def update_flops(cfg: GPTConfig, sampled) -> int:
    """Return the FLOPs that an update has to compute.

    These are the rows without padding or their last token, causal pairs, and the logits of
    responses. Old log-probabilities do not count, because sampling could have kept them.
    """
    T = sampled.end - 1
    logits = sampled.end - sampled.prompt_len
    return 3 * forward_flops(cfg, int(T.sum()), pairs_to(T), int(logits.sum()))


def sampling_flops(cfg: GPTConfig, sampled, group: int) -> int:
    """Return the FLOPs that sampling has to compute.

    Each prompt is read once for all responses to it. Each row then has one position for every token
    but the last, with as many pairs as there are tokens up to it.
    """
    P = sampled.prompt_len
    T = sampled.end - 1
    prefill = forward_flops(cfg, int(P[::group].sum()), pairs_to(P[::group]), len(P) // group)
    decoded = int((T - P).sum())
    return prefill + forward_flops(cfg, decoded, pairs_to(T) - pairs_to(P), decoded)


def step(o, chunks=(64, 512), **sizes) -> dict:
    """Return the seconds of the longest possible step, by part.

    Every response runs to the limit and every row has an advantage. Shares of peak are relative to
    the rate of a large product.
    """
    s, model, asked = setting(o, **sizes)
    sampled = model.generate(**asked)
    batch = bench.unequal(sampled, s.group)
    optimizer = bench.adamw(model)
    N = len(sampled.end)
    mask = response_mask(sampled.prompt_len, sampled.end, sampled.tokens.shape[1])

    @torch.no_grad()
    def rescore():
        for rows in torch.arange(N, device=o.device).split(64):
            minibupo.token_logprobs(model, sampled.tokens[rows], mask[rows])

    found = {"rows": N, "tokens a response": s.response_limit}
    found["seconds, sampling"] = seconds(o, lambda: model.generate(**asked))
    found["seconds, rescoring"] = seconds(o, rescore)
    for name, policy in (("phase 1, middle layer", Policy(s.n_layer // 2)), ("phase 2", FULL)):
        for chunk in chunks:
            update = partial(minibupo.update, model, optimizer, batch, policy, chunk=chunk)
            what = f"seconds, rescoring and update, {name}, {chunk} rows at a time"
            found[what] = seconds(o, update)
    found["tokens a second"] = N * s.response_limit / found["seconds, sampling"]
    rate = gemm_rate(o)
    best = min(found[name] for name in found if "phase 2" in name)
    flops = sampling_flops(model.cfg, sampled, s.group)
    found["share of peak, sampling"] = flops / found["seconds, sampling"] / rate
    found["share of peak, update"] = update_flops(model.cfg, sampled) / best / rate
    return found | {"peak, TFLOP/s": rate / 1e12}


def bfloat16(o) -> dict:
    """Return the seconds of a step under autocast, rescoring included; the peak is bfloat16's."""
    with torch.autocast(o.device.type, torch.bfloat16):
        return step(o, chunks=[64], **LARGE)


def large(o) -> dict:
    """Return the memory in float32 as worked out by hand, and the seconds of a step."""
    s, model, _ = setting(o, **LARGE)
    c = model.cfg
    rows = s.questions * s.group
    T = 2 * s.n + s.response_limit
    parameters = sum(p.numel() for p in model.parameters())
    state = 16 * parameters  # weights, gradients, AdamW's two moments
    # keys and values, and the copy that is made when rows that ended are dropped
    caches = 2 * 4 * 2 * c.n_layer * rows * T * c.n_kv_head * c.head_dim
    # kept for the backward pass of 64 rows: 29 d numbers per position and layer, counted on a CPU
    kept = 4 * 29 * c.d_model * c.n_layer * 64 * T
    sizes = {"weights and moments": state, "sampling": caches, "64 rows of an update": kept}
    found = {f"on paper: {name}, GB": size / 1e9 for name, size in sizes.items()}
    save = partial(toy.save_checkpoint, o.work / "large.pt", model)
    found |= {"parameters, million": parameters / 1e6, "seconds, saving them": seconds(o, save)}
    return found | step(o, chunks=[64], **LARGE)


def graph(o) -> dict:
    """Return the seconds of sampling by a graph, from course/base.pt, whose responses end."""
    _, _, asked = setting(o)
    model = toy.load_model(BASE, o.device)
    found = {}
    with torch.no_grad():
        for temperature in (0, 1):
            decoder = Decoder(model, **asked, temperature=temperature)
            step = captured(decoder)
            decoder.generate(step)
            if temperature == 0:
                theirs = model.generate(**asked, temperature=0, eos_id=toy.EOS)
                equal = decoder.tokens[:, : theirs.tokens.shape[1]] == theirs.tokens
                found["greedy: share of equal tokens"] = float(equal.float().mean())
        found["seconds, by graph"] = seconds(o, lambda: decoder.generate(step))
    by_generate = seconds(o, lambda: model.generate(**asked, eos_id=toy.EOS))
    with mock.patch.object(toy, "sample_responses", cuda_graph.sample_responses):
        job = main_job(o, "main-by-graph")
    found |= {f"the main job: {what}": value for what, value in job.items()}
    return found | {"seconds, by model.generate": by_generate}


def trl(o) -> dict:
    """Return the seconds of a whole step, ours and TRL's, in which every row has an advantage."""
    peer = bench.trl_peer()
    if peer is None:
        return {"skipped": "TRL is not installed"}
    s, model, _ = setting(o)
    optimizer = bench.adamw(model)
    times = []
    config = peer.GRPOConfig
    here = {"use_cpu": o.device.type == "cpu"}  # trl_peer.py keeps TRL on the CPU
    peer.GRPOConfig = lambda **options: config(**(options | here))

    def reward(prompts, completions, completion_ids, **_):
        correct = torch.tensor(peer.reward(prompts, completions, completion_ids))
        return bench.tilt(correct.view(-1, s.group)).flatten().tolist()

    def after(_):
        o.wait()
        times.append(time.perf_counter())

    qwen3 = peer.to_qwen3(model).to(o.device)
    peer.train(s, qwen3, 3 if o.quick else 8, bench.STILL, reward, after)
    theirs = statistics.median(b - a for a, b in zip(times, times[1:]))
    step = partial(bench.our_step, s, model, optimizer, 1, chunk=256)
    ours = seconds(o, step)
    with mock.patch.object(toy, "sample_responses", cuda_graph.sample_responses):
        by_graph = seconds(o, step)
    found = {"seconds, TRL": theirs, "seconds, ours": ours, "ratio": theirs / ours}
    return found | {"seconds, ours by graph": by_graph, "ratio, by graph": theirs / by_graph}


def language(o) -> dict:
    """Return the seconds of a batch of BuPO at the middle layer of real models, one run each."""
    from experiments import language_models

    files = {name: language_models.CACHE / f"{name}.gguf" for name in language_models.FETCHED}
    fetched = [name for name, file in files.items() if file.exists() and not o.quick]
    if not fetched:
        return {"skipped": "no language model is in the cache"}
    from experiments import lm_study

    found = {}
    for name in fetched:
        middle, _ = lm_study.LAYERS[name]
        line = lm_study.train(name, f"BuPO, layer {middle}", seed=800)
        phase1 = 2 * lm_study.TRAINING[name]["phase1"]  # two optimizer steps a batch
        for phase, times in enumerate((line["step_time"][2:phase1], line["step_time"][phase1:]), 1):
            found[f"{name}, seconds a batch, phase {phase}"] = 2 * statistics.mean(times)
        found[f"{name}, reward by batch"] = " ".join(f"{x:.2f}" for x in line["reward"])
        found |= {
            f"{name}, {key}": line[key] for key in ("seconds", "peak_memory_gb") if key in line
        }
    return found


def train_large(o) -> dict:
    """Train a base model of the larger setting, then BuPO at the layer that the rule picks."""
    pretrain_lr, lr = RATES
    sizes, steps = (TINY, 2) if o.quick else (TRAINED, 80)
    s = toy.Settings(**sizes, lr=lr)
    records = []
    started = time.perf_counter()
    torch.manual_seed(s.seed)
    model = toy.GPT(s.model_config()).to(o.device)
    base = o.work / "large-base.pt"
    toy.pretrain(s, model, records, max_steps=50 if o.quick else 3000, lr=pretrain_lr)
    toy.save_checkpoint(base, model)
    found = {"seconds, base model": time.perf_counter() - started}
    found |= {f"pretraining, {name}": records[-1][name] for name in ("step", "single_operations")}
    options = ["--base", str(base), "--n", str(s.n), "--lr", str(lr), "--steps", str(steps)]
    quick = [*SHORT, *"--n 3 --s_inter 1 --layer 2".split()]
    started = time.perf_counter()
    run = run_toy(o, "large", *options, *(quick if o.quick else []))
    found["seconds, RL"] = time.perf_counter() - started
    found["target layer"] = toy.load_checkpoint(run / "ckpt.pt")[1]["target"][0]
    if not o.quick:
        analyze.main(["all", str(run), "--device", o.device.type])
    shutil.copytree(run, o.json.with_suffix(".large"), dirs_exist_ok=True)
    return found | learned(run)


PARTS = dict(main=main_job, agreement=agreement, resume=resume, step=step, graph=graph, trl=trl)
PARTS |= dict(large=large, analyze=analyze_commands, bfloat16=bfloat16, language=language)
PARTS |= dict(train=train_large)


def run_part(o, part) -> dict:
    """Return what a part found, or its error: no error stops the other parts."""
    started = time.perf_counter()
    cuda = o.device.type == "cuda"
    cuda_graph.KEPT.clear()  # those of the part before
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the output of runs and figures
            found = part(o)
    except (Exception, SystemExit) as error:  # SystemExit if an extra is missing
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}"}
    peak = {"peak memory, GB": torch.cuda.max_memory_allocated() / 1e9} if cuda else {}
    return found | peak | {"seconds of this part": time.perf_counter() - started}


def table(parts: dict) -> str:
    """Return everything that was found, as Markdown."""
    rows = [[name, what, bench.show(x)] for name in parts for what, x in parts[name].items()]
    return common.markdown_table(["part", "what", "value"], rows)


def main(argv=None) -> int:
    """Run the command line. Return 0, or 1 if a part failed."""
    parser = argparse.ArgumentParser("gpu", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--part", action="append", choices=PARTS, help="only this part; may be repeated")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--quick", action="store_true", help="tiny sizes")
    add("--minutes", type=float, default=8.0, help="no part starts after these minutes")
    add("--json", type=Path, default=common.ROOT / "out" / "gpu.json")
    o = parser.parse_args(argv)
    started = time.perf_counter()
    found = {}
    machine = common.machine()
    try:
        o.device = toy.pick_device(o.device)
    except ValueError as error:
        parser.error(str(error))
    o.wait = torch.cuda.synchronize if o.device.type == "cuda" else lambda: None
    o.json.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        o.work = Path(work)
        for name in o.part or PARTS:
            over = time.perf_counter() - started > 60 * o.minutes
            found[name] = {"skipped": "time is over"} if over else run_part(o, PARTS[name])
            print(f"{name}: {found[name]}", flush=True)
            o.json.write_text(json.dumps({"machine": machine, "parts": found}, indent=1) + "\n")
    text = f"{table(found)}\n\n{', '.join(f'{key} {value}' for key, value in machine.items())}\n"
    o.json.with_suffix(".md").write_text(text, encoding="utf-8")
    print(f"\n{text}")
    return int(any("error" in result for result in found.values()))


if __name__ == "__main__":
    sys.exit(main())
