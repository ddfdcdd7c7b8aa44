"""The live page in a real browser: its model against PyTorch and the golden vectors, and everything
that a reader does to the page. Nothing may be written to the browser's console."""

import base64
import copy
import html
import json
import re
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NO_PHASE_1, tiny

import analyze
import minibupo
import train_toy as toy
from minibupo import FULL, SITES, Policy
from model import GPT, GPTConfig

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
FLAGS = """--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-quic
    --no-first-run --disable-background-networking --disable-component-update --disable-sync
    --enable-logging=stderr --dump-dom""".split()
ROOT = Path(analyze.__file__).parent
PAGES = ROOT / "minibupo_pages"
COURSE_PAGE = ROOT / "course" / "live.html"
VIEWS = ("raw", "normed", "scaled")

# A script in a page writes what it has found into the page. Its timers run in virtual time.
READER = """<script>
(async () => {
  const found = [], all = selector => [...document.querySelectorAll(selector)];
  const texts = selector => all(selector).map(node => node.textContent);
  const wait = ms => new Promise(resolve => setTimeout(resolve, ms));
  const press = (key, target = document) =>
    target.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
  const change = (id, value, kind = "input") => {
    document.getElementById(id).value = value;
    document.getElementById(id).dispatchEvent(new Event(kind, {bubbles: true}));
  };
  const go = async fragment => { location.hash = fragment; await wait(10); };
  const base64 = numbers => {
    const bytes = new Uint8Array(Float32Array.from(numbers).buffer), parts = [];
    for (let i = 0; i < bytes.length; i += 8192)
      parts.push(String.fromCharCode(...bytes.subarray(i, i + 8192)));
    return btoa(parts.join(""));
  };
  SCRIPT
  const node = document.createElement("pre");
  node.id = "found";
  node.textContent = JSON.stringify(found);
  document.body.append(node);
  parent.postMessage(node.textContent, "*");
})();
</script>
</body>"""


# A page as narrow as a phone, which headless Chromium's own window is not.
PHONE = """<!doctype html><body style="margin: 0"><script>
addEventListener("message", event => {
  const node = document.createElement("pre");
  node.id = "found";
  node.textContent = event.data;
  document.body.append(node);
});
</script><iframe src="page.htmlFRAGMENT" width="390" height="844" style="border: 0"></iframe></body>"""


def browse(folder: Path, page: str, script: str, fragment="", budget=60_000, phone=False):
    """Return what the script has put into its list `found`, after it ran at the end of a page.

    `budget` is the virtual time in milliseconds that its timers may take; None: it has no timers.
    """
    assert page.count("</body>") == 1
    file = folder / "page.html"
    file.write_text(page.replace("</body>", READER.replace("SCRIPT", script)), encoding="utf-8")
    if phone:
        (folder / "phone.html").write_text(PHONE.replace("FRAGMENT", fragment))
    address = (folder / "phone.html").as_uri() if phone else file.as_uri() + fragment
    timers = [f"--virtual-time-budget={budget}"] if budget else []
    profile = folder / "profile"
    command = [CHROMIUM, *FLAGS, *timers, f"--user-data-dir={profile}", address]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    shutil.rmtree(profile)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert console == []
    return json.loads(html.unescape(re.search('<pre id="found">(.*)</pre>', done.stdout, re.S)[1]))


def numbers(text: str):
    return np.frombuffer(base64.b64decode(text), "<f4").astype(np.float64)


# ---- the model, in pages that show nothing ----


def model_page(data: dict) -> str:
    """A page with model.js and policies.js, and with {"models": [...]} as models."""
    scripts = [(PAGES / name).read_text() for name in ("model.js", "policies.js")]
    scripts.append(f"""const data = {json.dumps(data)};
        const models = data.models.map(({{config, weights}}) => {{
          for (const name in weights) weights[name] = Float32Array.from(weights[name]);
          return new GPT(config, weights);
        }});""")
    body = "".join(f"<script>{script}</script>" for script in scripts)
    return f'<!doctype html><meta charset="utf-8"><body>{body}</body>'


def described(model) -> dict:
    weights = {name: weight.flatten().tolist() for name, weight in model.named_parameters()}
    return {"config": asdict(model.cfg), "weights": weights}


def test_golden_vectors(tmp_path):
    """docs/golden.md: what layers read and write, logits, entropies, dH and the rule."""
    golden = np.load(ROOT / "tests" / "golden.npz")
    sizes = "vocab_size n_layer d_model n_head n_kv_head head_dim d_mlp context_length"
    config = {name: int(golden[name]) for name in sizes.split()}
    config |= {name: float(golden[name]) for name in ("rope_theta", "norm_eps")}
    config |= {"qk_norm": True, "qkv_bias": False, "tied": True}
    weights = {
        name[7:]: golden[name].flatten().tolist() for name in golden if name[:7] == "weight."
    }
    data = {"models": [{"config": config, "weights": weights}]}
    data["tokens"] = golden["tokens"].tolist()
    data["mask"] = golden["mask"].tolist()
    script = """
      const model = models[0], d = model.cfg.d_model;
      const traces = model.trace(data.tokens[0]), sums = {raw: [], normed: [], dH_mlp: []};
      const stack = name => base64(traces.flatMap(trace => [...trace[name]]));
      const layers = [traces[0].resid_pre, ...traces.map(trace => trace.resid_post)];
      const logits = model.unembed(model.final_norm(layers.at(-1)));
      found.push(["attn_in", "attn_out", "mlp_in", "mlp_out"].map(stack));
      found.push([base64(layers.flatMap(h => [...h])), base64(logits)]);
      data.tokens.forEach((tokens, row) => {
        const positions = data.mask[row].map((on, t) => on ? t : -1).filter(t => t >= 0);
        const inside = look_inside(all_logits(model, model.trace(tokens.slice(0, -1))), positions);
        for (const name in sums) sums[name].push(inside[name].map(mean => mean * positions.length));
      });
      const total = name => sums[name][0].map((_, l) => sums[name].reduce((sum, row) => sum + row[l], 0));
      const M = data.mask.flat().filter(on => on).length;
      found.push(["raw", "normed", "dH_mlp"].map(name => base64(total(name).map(sum => sum / M))));
      found.push(target_layer(total("dH_mlp")));
      found.push([[1.2, 0.1, -0.2, 0.3, -0.4, 0.9], [-1.8, -1.7, -2.9, 0.5], [0, 0.1, 0]].map(target_layer));
    """
    sites, stream, means, rule, rules = browse(tmp_path, model_page(data), script)
    names = [
        f"row0.{name}" for name in ("attn_in", "attn_out", "mlp_in", "mlp_out", "layer", "logits")
    ]
    for name, text in zip(names, [*sites, *stream]):
        np.testing.assert_allclose(numbers(text), golden[name].flatten(), atol=1e-4, err_msg=name)
    dH_mlp = golden["dH_mlp"] if "dH_mlp" in golden else golden["dH.mlp"]
    expected = [golden["entropy.layer"].mean(1), golden["entropy.layer_normed"].mean(1), dH_mlp]
    for text, values in zip(means, expected):
        np.testing.assert_allclose(numbers(text), values, atol=1e-4)
    assert rule == int(golden["target_layer"]) and rules == [4, None, 2]


def test_any_configuration(tmp_path):
    """Every switch of GPTConfig, against PyTorch; 17 logits leave a rest when divided by four."""
    changes = [
        {},
        {"qk_norm": False, "qkv_bias": True, "tied": False, "norm_eps": 1e-2},
        {"n_kv_head": 4, "head_dim": 6, "d_mlp": 10, "rope_theta": 100.0},
        {"n_kv_head": 1, "vocab_size": 17, "n_layer": 1},
    ]
    models = [tiny(seed, dtype=torch.float64, **change) for seed, change in enumerate(changes)]
    tokens = torch.randint(0, 11, (1, 24), generator=torch.Generator().manual_seed(0))
    data = {"models": [described(model) for model in models], "tokens": tokens[0].tolist()}
    script = """
      for (const model of models) {  // all at once, and in two parts that share a cache
        const cache = model.empty_cache(), at_once = model.trace(data.tokens);
        model.trace(data.tokens.slice(0, 7), cache);
        const rest = model.trace(data.tokens.slice(7), cache, 7);
        found.push([at_once, rest].map(traces => base64(model.unembed(model.final_norm(traces.at(-1).resid_post)))));
      }
    """
    for model, texts in zip(models, browse(tmp_path, model_page(data), script)):
        expected = model(tokens)[0].detach().numpy()
        for text, part in zip(texts, (expected, expected[7:])):
            np.testing.assert_allclose(numbers(text), part.flatten(), atol=2e-5)


def test_sampling_is_from_the_policy(tmp_path):
    """First tokens of 4,000 responses of a layer and of pi_theta, at two temperatures."""
    model = tiny()
    prompt = torch.tensor([[1, 5, 2]])
    draws = 4000
    script = f"""
      for (const layer of [2, null]) for (const temperature of [0.5, 2]) {{
        const counts = Array(11).fill(0), random = random_numbers(3), prompt = read(models[0], [1, 5, 2], layer);
        let p;
        for (let i = 0; i < {draws}; i++) {{
          const [first] = [...generate(models[0], prompt, 1, temperature, 10, random)];
          counts[first.token] += 1;
          p = first;
        }}
        found.push([counts, p.token, p.p]);
      }}
    """
    found = iter(browse(tmp_path, model_page({"models": [described(model)]}), script))
    for policy in Policy(2), FULL:
        for temperature in 0.5, 2:
            counts, token, p = next(found)
            logits = minibupo.policy_logits(model, prompt, policy)[0, -1].detach()
            pi = (logits / temperature).softmax(-1).double().numpy()
            sigma = np.sqrt(pi * (1 - pi) / draws)
            assert (np.abs(np.array(counts) / draws - pi) < 5 * sigma + 1e-3).all()
            assert p == pytest.approx(pi[token], abs=1e-5)


# ---- the page of the course ----


def page_data(page: str) -> dict:
    return json.loads(re.search('id="data">(.*?)</script>', page, re.S)[1])


def page_models(data: dict) -> dict:
    """{key: model in float64} with the weights that a page has."""
    models = {}
    for checkpoint in data["checkpoints"]:
        flat = np.frombuffer(base64.b64decode(checkpoint["weights"]), "<f2").astype(np.float64)
        model = GPT(GPTConfig(**data["config"])).double()
        parts = torch.tensor(flat).split([size for _, size in data["sizes"]])
        for (_, weight), part in zip(model.named_parameters(), parts, strict=True):
            weight.data = part.view(weight.shape)
        models[checkpoint["key"]] = model
    return models


@torch.no_grad()
def all_logits(model, tokens: list[int]) -> dict:
    """{(view, site): logits (layers, T, V)} of every policy, in float64."""
    traces = list(model.trace(torch.tensor([tokens])))
    top = traces[-1].resid_post[0]
    found = {}
    for site in SITES:
        h = [getattr(trace, site)[0] for trace in traces]
        h = torch.stack([traces[0].resid_pre[0], *h] if site == "resid_post" else h)
        scale = top.norm(dim=-1, keepdim=True) / h.norm(dim=-1, keepdim=True)
        found["raw", site] = model.unembed(h)
        found["normed", site] = model.unembed(model.final_norm(h))
        found["scaled", site] = model.unembed(h * scale)
    return found


def test_the_course_page_is_current():
    """Made of these scripts, with the weights of course/base.pt, and small enough.

    If this fails: train_toy.py --base course/base.pt, with --algo bupo and grpo; then
    analyze.py live BUPO_RUN GRPO_RUN --out course.
    """
    page = COURSE_PAGE.read_text(encoding="utf-8")
    data = page_data(page)
    assert len(page) <= 4.5e6
    is_current = page == analyze.web_page("live.html", data)  # without a long diff
    assert is_current
    assert [each["key"] for each in data["checkpoints"]] == ["base", "phase1", "final", "other"]
    base = toy.load_model(ROOT / "course" / "base.pt")
    for ours, theirs in zip(page_models(data)["base"].parameters(), base.parameters()):
        assert torch.equal(ours.float(), theirs.half().float())
    assert "http" not in page.replace("http-equiv", "")
    assert "default-src 'none'" in page and "connect-src" not in page


def test_two_hundred_texts(tmp_path):
    """Every policy of the course's models within 1e-4 of PyTorch's largest logit of that policy.

    The time of a forward pass is printed, not tested (pytest -s).
    """
    page = COURSE_PAGE.read_text(encoding="utf-8")
    data = page_data(page)
    models = page_models(data)
    rng = np.random.default_rng(0)
    keys = [*models] * 50
    texts = [rng.integers(0, toy.VOCAB_SIZE, rng.integers(1, 30)).tolist() for _ in keys]
    script = f"""
      const keys = {json.dumps(keys)}, inputs = {json.dumps(texts)}, views = {json.dumps(VIEWS)};
      inputs.forEach((tokens, i) => {{
        const logits = all_logits(load(keys[i]), load(keys[i]).trace(tokens));
        for (const view of i < 20 ? views : ["raw"]) for (const site in SITES)
          found.push(base64(logits[view][site].flatMap(rows => rows.flatMap(row => [...row]))));
        if (i >= 20) found.push(base64(logits.normed.resid_post.at(-1).flatMap(row => [...row])));
      }});
      const times = [];
      for (let i = 0; i < 30; i++) {{
        const before = performance.now();
        load("base").trace(Array.from({{length: 40}}, (_, t) => t % 15));
        times.push(performance.now() - before);
      }}
      found.push(times.sort((a, b) => a - b));
    """
    found = iter(browse(tmp_path, page, script, budget=None))
    worst = 0.0
    for i, (key, tokens) in enumerate(zip(keys, texts)):
        expected = all_logits(models[key], tokens)
        pi_theta = expected["normed", "resid_post"][-1:]
        wanted = [
            expected[view, site] for view in (VIEWS if i < 20 else VIEWS[:1]) for site in SITES
        ]
        for logits in [*wanted, pi_theta] if i >= 20 else wanted:
            ours = torch.tensor(numbers(next(found))).view(logits.shape)
            largest = logits.abs().amax((1, 2), keepdim=True)
            worst = max(worst, float(((ours - logits).abs() / largest).max()))
    assert worst < 1e-4
    times = next(found)
    print(f"\nlargest difference {worst:.1e} of a policy's largest logit")
    print(f"forward pass of 40 tokens: {times[0]:.1f} ms at best, median {times[15]:.1f} ms")


# ---- what a reader does, on the page of a tiny run ----


@pytest.fixture(scope="module")
def page(base, finished, tmp_path_factory):
    """The text of live.html for a finished BuPO run and a GRPO run."""
    folder = tmp_path_factory.mktemp("live")
    options = [
        *NO_PHASE_1,
        "--algo",
        "grpo",
        "--base",
        str(base),
        "--out_dir",
        str(folder / "grpo"),
    ]
    assert toy.main(options) == 0
    argv = ["live", str(finished), str(folder / "grpo"), "--out", str(folder), "--device", "cpu"]
    assert analyze.main(argv) == 0
    return (folder / "live.html").read_text(encoding="utf-8")


def answer(model, problem: str, layer=None, limit=12) -> str:
    """What `generate` answers at temperature 0."""
    policy = model if layer is None else model.truncated(layer)
    prompt = torch.tensor([toy.encode(problem)])
    sampled = policy.generate(prompt, limit, temperature=0, eos_id=toy.EOS)
    return toy.response_texts(sampled)[0]


def test_an_address_lets_a_policy_answer(page, tmp_path):
    """Every policy of every checkpoint answers as `generate` does; without a layer, pi_theta."""
    models = page_models(page_data(page))
    problems = ("7+5*3-2=", "4*7+3=", "9-8=", "0*6*2=0*2=")
    states = [(p, k, l) for p in problems for k in models for l in (None, 1, 2, 3)]
    fragments = []
    for problem, key, layer in states:
        p = problem.replace("+", "%2B").replace("=", "%3D")
        fragments.append(f"#p={p}&t=0&model={key}" + ("" if layer is None else f"&layer={layer}"))
    script = f"""
      found.push([$("answer").textContent, $("name").textContent]);
      for (const fragment of {json.dumps(fragments)}) {{
        await go(fragment);
        found.push([$("answer").textContent, $("verdict").textContent, $("careful").textContent, state.text]);
      }}
    """
    first, *found = browse(tmp_path, page, script, fragment="#p=7%2B5*3-2%3D&layer=2&t=0")
    assert first == [answer(models["final"], problems[0], layer=2), "BuPO, final"]
    for (problem, key, layer), (said, verdict, careful, text) in zip(states, found, strict=True):
        assert text == problem and said == answer(models[key], problem, layer)
        expression, *begun = problem.split("=")
        is_correct = toy.is_correct(expression, "=".join(begun) + said)
        assert verdict == ("✓ correct" if is_correct else "✗ incorrect")
        assert careful == "=".join(toy.careful(expression)[1:]) + "<eos>"


def test_typing(page, tmp_path):
    """The grid shows every policy at every position, in every view; details and curves are true."""
    models = page_models(page_data(page))
    script = """
      for (const text of ["4", "4*7", "4*7+3=", "2-2*5=8*5="]) {
        change("problem", text);
        const shown = {};
        for (let i = 0; i < 3; i++) {
          shown[state.view] = all("#panels td").map(td => [td.dataset.site, +td.dataset.layer, +td.dataset.position, td.textContent]);
          press("n");
        }
        const rows = all("#panels table:first-child tbody tr").map(row => [row.cells[0].textContent, row.cells[1].textContent]);
        document.querySelector("td[data-site=mlp_out][data-layer='2'][data-position='0']")
          .dispatchEvent(new PointerEvent("pointermove", {bubbles: true}));
        const details = all("#detail table").map(t => [t.id, t.caption.textContent, [...t.rows].map(r => [...r.cells].map(c => c.textContent))]);
        found.push([text, rows, shown, details, $("curves").getAttribute("aria-label"), $("bars").getAttribute("aria-label"), $("answer").textContent]);
      }
    """
    model = models["final"]
    L = model.n_layer
    for text, rows, shown, details, curves, bars, asked in browse(tmp_path, page, script):
        assert asked == ""  # it has only been typed
        full = text + (answer(model, text) if "=" in text else "")
        tokens = toy.encode(full)
        words = [toy.ENCODING.decode([token]).strip("<>") for token in tokens]
        input_tokens = tokens[:-1] if "=" in text else tokens
        assert rows == [list(pair) for pair in zip(words, [*words[1:], ""])][: len(input_tokens)]
        logits = all_logits(model, input_tokens)
        pi_theta = logits["normed", "resid_post"][-1]
        for view in VIEWS:
            columns = {"resid_post": L + 2, "attn_out": L, "mlp_out": L}
            assert len(shown[view]) == len(input_tokens) * sum(columns.values())
            for site, layer, t, word in shown[view]:
                of_layer = logits[view, site][min(layer, L) - (site != "resid_post")]
                z = pi_theta[t] if layer > L else of_layer[t]
                shown_token = next(
                    i for i in range(len(z)) if toy.ENCODING.decode([i]).strip("<>") == word
                )
                assert z[shown_token] > z.max() - 1e-4 * z.abs().max()
        assert [each[0] for each in details[:3]] == [f"resid_post-{view}" for view in VIEWS]
        for name, caption, top in details:
            site, view = name.split("-")
            z = logits[view, site][2 - (site != "resid_post")][0]
            pi = z.softmax(-1)
            nats = float(minibupo.entropy(z))
            assert float(re.search(r": ([\d.]+) nats", caption)[1]) == pytest.approx(
                nats, abs=0.006
            )
            np.testing.assert_allclose([float(p) for _, p in top], pi.topk(5).values, atol=1e-4)
        first = tokens.index(toy.encode("=")[0]) if "=" in text else 0
        check_curves(model, input_tokens, first, curves, bars)


def check_curves(model, tokens, first: int, curves: str, bars: str):
    """The numbers that a screen reader is told, against look_inside."""
    row = torch.tensor([[*tokens, 0]])
    mask = torch.arange(len(tokens))[None] >= first
    inside = minibupo.look_inside(model, row, mask)
    means = {name: values.mean(1) for name, values in inside.items()}
    for view, name in zip(VIEWS, ("layer", "layer_normed", "layer_matched")):
        told = [float(x) for x in re.search(rf"{view}: ([\d., ]+\d)", curves)[1].split(", ")]
        np.testing.assert_allclose(told, means[name], atol=0.006)
    told = [float(x) for x in re.search(r": ([-\d., ]+\d)\.", bars)[1].split(", ")]
    np.testing.assert_allclose(told, means["dH_mlp"], atol=0.006)
    if means["dH_mlp"].abs().min() > 1e-4:
        try:
            rule = f"layer {minibupo.target_layer(means['dH_mlp'])}."
        except ValueError:
            rule = "no layer."
        assert bars.endswith(rule)


def test_answering_and_sliding_by_keys(page, tmp_path):
    """An answer comes token by token; a slide through training lets the same policy answer anew."""
    models = page_models(page_data(page))
    script = """
      change("problem", "4*7+3=");
      change("layer", "2", "change");
      press("Enter", $("problem"));
      await wait(150);
      found.push([$("answer").textContent.length, $("verdict").hidden]);
      await wait(5000);
      for (const key of ["", "[", "[", "[", "]", "]", "]", "c", "[", "c", "c"]) {
        press(key);
        found.push([$("name").textContent, $("answer").textContent, texts("#tokens small")]);
      }
      change("checkpoint", "1");
      press("a");
      await wait(150);
      change("problem", "9-8=");  // while an answer is being written
      await wait(5000);
      found.push([$("name").textContent, $("answer").textContent, $("verdict").textContent, location.hash]);
      press("/");
      found.push([document.activeElement.id, state.view]);
      press("n", $("problem"));  // typed into the field: no shortcut
      press("Escape", $("problem"));
      press("p");
      found.push([document.activeElement.id, state.asked]);
      press("a", $("layer"));  // in the menu, keys are shortcuts
      found.push([document.activeElement.id, state.asked]);
      press("Escape", $("layer"));
      found.push([document.activeElement.id]);
      press("g");
      press("ArrowDown", $("panels"));
      press("ArrowRight", $("panels"));
      press("ArrowLeft", $("panels"));
      found.push([document.activeElement.id, state.view, $("where").textContent.split(":")[0]]);
    """
    begun, *slides, interrupted, field, menu, asked, left, moved = browse(tmp_path, page, script)
    assert begun[0] < len(answer(models["final"], "4*7+3=", 2)) and begun[1]
    labels = {
        "base": "base",
        "phase1": "BuPO, after phase 1",
        "final": "BuPO, final",
        "other": "GRPO, final",
    }
    order = ["final", "phase1", "base", "base", "phase1", "final", "final"]
    order += ["other", "final", "other", "final"]
    for key, (label, said, shown) in zip(order, slides, strict=True):
        expected = answer(models[key], "4*7+3=", 2)
        assert (label, said) == (labels[key], expected)
        ids = toy.encode("4*7+3=" + expected)
        logits = minibupo.policy_logits(models[key], torch.tensor([ids[:-1]]), Policy(2))[0, 5:]
        p = logits.softmax(-1).gather(-1, torch.tensor(ids[6:])[:, None])[:, 0].detach()
        np.testing.assert_allclose([float(x) for x in shown], p, atol=0.006)
    assert interrupted[:3] == [labels["phase1"], "", ""]
    assert interrupted[3] == "#p=9-8%3D&layer=2&t=0&model=phase1&view=raw&asked=0"
    assert field == ["problem", "raw"]
    assert (menu, asked, left) == (["layer", False], ["layer", True], [""])
    assert moved[:2] == ["panels", "raw"]
    assert moved[2].startswith("layer 0 (embedding), position 2 of")


def test_sampling_fifty(page, tmp_path):
    """At temperature 0 all samples are the answer; at 1 their share is near that of `generate`."""
    models = page_models(page_data(page))
    script = """
      for (const [layer, t] of [["", 0], ["2", 0], ["", 1]]) {
        await go(`p=4*7%3D&t=${t}` + (layer && `&layer=${layer}`));
        press("s");
        await wait(3000);
        found.push([$("share").textContent, $("control-share").textContent, $("control").textContent]);
      }
      change("problem", "4*7");
      $("ask-sample").click();
      await wait(1000);
      found.push([$("share").textContent, $("verdict").textContent]);
    """
    *shares, unchecked = browse(tmp_path, page, script)
    for layer, (share, control, said) in zip((None, 2), shares):
        for text, of_layer in (share, layer), (control, None):
            right = 50 * toy.is_correct("4*7", answer(models["final"], "4*7=", of_layer))
            assert text == f"{right} of 50 samples are correct ({2 * right}%)"
        assert said == answer(models["final"], "4*7=")
    prompt = torch.tensor([toy.encode("4*7=")])
    generator = torch.Generator().manual_seed(0)
    options = dict(num_samples=2000, eos_id=toy.EOS, generator=generator)
    for text, temperature in (shares[2][0], 1), (shares[2][1], 1 / 7):
        sampled = models["final"].generate(prompt, 12, temperature=temperature, **options)
        p = np.mean([toy.is_correct("4*7", each) for each in toy.response_texts(sampled)])
        share = int(text.split(" of ")[0]) / 50
        assert abs(share - p) < 5 * np.sqrt(p * (1 - p) / 50) + 0.03
    assert unchecked == ["", "There is nothing to check: this is not a problem of the task."]


def test_what_is_typed_is_text(page, tmp_path):
    """Characters outside the vocabulary are named and ignored; nothing typed becomes HTML."""
    script = """
      const before = document.querySelectorAll("*").length;
      for (const text of ["4*x7é😀=", "<b>4</b>*7=", "<img src=x onerror=alert(1)>", "", "4*7", "4*7=8<eos>"]) {
        change("problem", text);
        found.push([decode(tokens), $("note").textContent, texts("#panels tbody tr").length]);
      }
      await go("p=4*7%3D&layer=9&t=3&model=best&view=%3Cb%3E");
      found.push([$("note").textContent, state.layer, state.temperature, state.view]);
      found.push(all("main b, img").length);
    """
    *typed, address, elements = browse(tmp_path, page, script)
    tokens = [each[0] for each in typed]
    assert tokens == ["4*7=", "4*7=", "==1", "", "4*7", "4*7=8<eos>"]
    for character in ('"x"', '"é"', '"😀"'):
        assert character in typed[0][1]
    assert '"<" "b" ">" "/"' in typed[1][1]
    assert typed[3][1:] == ["Type a problem, such as 7+5*3-2=", 0]
    assert typed[4][1] == "A problem ends in ="
    assert typed[5][2] == 3 * 6  # three tables; nothing follows <eos>
    for wrong in ("layer=9", "t=3", "model=best", "view=<b>"):
        assert f"Ignored: {wrong}." in address[0]
    assert address[1:] == [None, 0, "raw"] and elements == 0


def test_what_is_a_problem(page, tmp_path):
    """Digits and operators that alternate, one =, and nothing or the beginning of an answer."""
    problems = ("4*7=", "4*7+3=8", "4*7+3=8+3=", "4*7=8<eos>")
    others = ("9-9", "7=", "12+3=", "+4=", "4*7+=", "=", "4*7==", "4*7+3=8+3==1")
    script = f"""
      for (const text of {json.dumps(problems + others)}) {{
        change("problem", text);
        const warned = $("note").textContent !== "";
        press("Enter", $("problem"));
        found.push([warned, $("verdict").textContent.startsWith("There is nothing"), $("careful").textContent === "",
                    $("control-verdict").textContent === "", $("use-careful").hidden]);
      }}
      const lines = {json.dumps(LINES)};
      change("problem", "7+5*3-2=");
      found.push(lines.map(text => has_correct_lines(encode(text).tokens)));
    """
    *found, followed = browse(tmp_path, page, script)
    assert found == [[False] * 5] * len(problems) + [[True] * 5] * len(others)
    assert followed == [toy.has_correct_lines("7+5*3-2", text) for text in LINES]
    assert True in followed and False in followed


def test_a_task_with_other_operators(page, tmp_path):
    """The example has no operator that the task lacks, and no question is about one."""
    data = page_data(page)
    del data["results"]["*"]
    script = """found.push($("problem").value, $("note").textContent, questions.length);"""
    found = browse(tmp_path, analyze.web_page("live.html", data), script)
    assert found == ["7+5+3-2=", "", 4]
    assert browse(tmp_path, page, script) == ["7+5*3-2=", "", 6]


LINES = ["2*3-2=6-2=4<eos>", "4<eos>", "6-2=4<eos>", "2*3-2=6-2=4", "2*3-2=5-2=3<eos>"]
LINES += ["2*3-2=6-2=<eos>", "2-2=0<eos>", "2*3=6<eos>", "<eos>", "=4<eos>", "6-2=6-2=4<eos>"]


def test_the_address_describes_the_state(page, tmp_path):
    """What is set comes back from its address, and an invalid divisor is refused."""
    script = """
      await go("p=4*7%2B3%3D&layer=2&t=1&q=3");
      found.push([$("question").hidden, $("divisor-note").textContent]);
      for (const value of ["0", "-3", "0.5", "", "51", "1e1"]) {
        change("divisor", value, "change");
        found.push([state.divisor, $("divisor").value, $("divisor-note").textContent !== ""]);
      }
      change("divisor", "12", "change");
      press("a");
      press("c");
      press("n");
      await wait(400);
      const address = location.hash, set = JSON.stringify(state), said = $("answer").textContent;
      found.push([address, $("divisor-note").textContent]);
      await go("p=9-8%3D");
      found.push([state.divisor, state.seed, state.view, state.layer, question]);
      location.hash = address;
      await wait(10);
      found.push([JSON.stringify(state) === set, $("answer").textContent === said, questions.indexOf(question)]);
      await go("p=4&divisor=0&seed=-1&q=9&asked=2");
      found.push($("note").textContent);
    """
    opened, *refused, address, default, again, note = browse(tmp_path, page, script)
    assert opened == [False, ""]
    assert refused == [[7, "7", True]] * len(refused)
    expected = "#p=4*7%2B3%3D&layer=2&t=1&model=other&view=normed&seed=2&divisor=12&q=3"
    assert address == [expected, ""]
    assert default == [7, 1, "raw", None, None] and again == [True, True, 2]
    for wrong in ("divisor=0", "seed=-1", "q=9", "asked=2"):
        assert f"Ignored: {wrong}." in note


def test_an_empty_problem_clears_everything(page, tmp_path):
    """Charts and details go; and the careful answer can be put into the grid."""
    script = """
      press("a");
      $("use-careful").click();
      found.push([state.text, $("answer").textContent, texts("#panels table:first-child tbody tr th:nth-child(2)").join("")]);
      grid.point(2, 3);
      tell_cell();
      found.push([all("#curves *, #bars *").length > 0, $("inside").className, $("where").textContent !== ""]);
      change("problem", "");
      found.push([all("#curves *, #bars *, #detail *, #panels td").length, $("inside").className]);
      found.push(["averaged", "rule", "where", "continued"].map(id => $(id).textContent.trim()));
    """
    careful, shown, cleared, texts = browse(tmp_path, page, script)
    whole = "7+5*3-2=2*3-2=6-2=4<eos>"
    assert careful == [whole, "", whole[1:].replace("<eos>", "eos")]
    assert shown == [True, "on", True]
    assert cleared == [0, ""] and texts == ["", "", "", ""]


def test_a_text_as_long_as_the_context(page, tmp_path):
    text = ("4*7+3=1" * 40)[:256]
    script = f"""
      for (const text of {json.dumps([text[:250], text, text + "99"])}) {{
        change("problem", text);
        press("Enter", $("problem"));
        await wait(3000);
        found.push([texts("#panels table:first-child tbody tr").length, $("note").textContent, $("answer").textContent]);
      }}
    """
    model = page_models(page_data(page))["final"]
    room, full, longer = browse(tmp_path, page, script)
    assert room[2] == answer(model, text[:250], limit=6)
    assert room[0] == 250 + len(toy.encode(room[2])) - 1
    assert full == [256, "There is no room for an answer.", ""]
    assert longer[0] == 256 and "the last 2 characters" in longer[1] and longer[2] == ""


def test_a_guess_comes_first(page, tmp_path):
    """Six questions, by their links; each waits for a guess, and then sets the page's state."""
    script = """
      for (let i = 1; i <= 6; i++) {
        await go(`q=${i}`);
        found.push([$("asked").textContent, $("told").textContent, $("question").checkValidity(), document.activeElement.id]);
        change("guess", "<b>my guess</b>");
        $("question").requestSubmit();
        await wait(8000);
        found.push([$("guessed").textContent, $("told").textContent, $("why").textContent.length, location.hash]);
      }
      found.push(all("main b").length);
      change("guess", "mine");
      await go("q=2");
      const other = $("guess").value;
      await go("q=6");
      found.push([other, $("guess").value, $("told").textContent]);
      await go("p=4*7%3D");  // an address without a question closes it
      found.push([$("question").hidden, location.hash]);
    """
    *found, elements, kept, closed = browse(tmp_path, page, script, budget=200_000)
    assert elements == 0
    assert kept == ["<b>my guess</b>", "mine", ""]
    assert closed == [True, "#p=4*7%3D&t=0&model=final&view=raw"]
    options = [option in found[3][1] for option in ("(a)", "(b)", "(c)")]
    assert options.count(True) == 1
    for i, (before, after) in enumerate(zip(found[::2], found[1::2], strict=True), 1):
        assert before[0].startswith(f"{i}. ") and before[1:] == ["", False, "guess"]
        assert after[0] == "Your guess: <b>my guess</b>" and after[1] not in ("", "Computing…")
        assert after[2] > 50 and after[3].startswith("#p=") and after[3].endswith(f"&q={i}")
    models = page_models(page_data(page))
    for model, layer in ((models["final"], 2), (models["final"], None)):
        assert f'"{answer(model, "7+5*3-2=", layer)}"' in found[1][1]


def test_a_reader_with_a_phone_or_a_screen_reader(page, tmp_path):
    """Nothing is wider than 390 pixels, and each control has a name."""
    script = """
      grid.point(2, 3);
      tell_cell();
      found.push([innerWidth, document.documentElement.scrollWidth]);
      found.push(all("input, select, button, svg, [tabindex]").filter(node =>
        !node.labels?.length && !node.getAttribute("aria-label") && !node.textContent.trim()).map(node => node.id));
      found.push(all("#panels table").every(table => table.caption && table.querySelector("th[scope=col]")));
      scrollTo(0, 0);
      for (let i = 0; i < 5; i++) press("ArrowDown", $("panels"));
      const cell = document.querySelector("td.at").getBoundingClientRect(), panel = $("inside").getBoundingClientRect();
      found.push([grid.at.position, cell.top > 0 && cell.bottom < panel.top, panel.bottom <= innerHeight, panel.height]);
      scrollTo(0, 0);
      found.push($("inside").getBoundingClientRect().top > innerHeight);  // it stays with the grid
    """
    fragment = "#p=7%2B5*3-2%3D&layer=1&t=1"
    sizes, unnamed, headed, moved, away = browse(tmp_path, page, script, fragment, phone=True)
    inner, width = sizes
    assert width <= inner == 390 and unnamed == [] and headed
    assert moved[:3] == [8, True, True] and moved[3] < 844 / 5 and away


# ---- the command ----


def test_names_of_the_models(finished, copied):
    run = analyze.Run(finished, device="cpu")
    other = analyze.Run(copied, device="cpu")
    assert list(analyze.live_models(run, None)) == ["base", "phase1", "final"]
    assert analyze.live_labels(run, None)["final"] == "BuPO, final"
    assert analyze.live_labels(run, other)["other"] == f"BuPO, final ({copied.name})"
    other.settings.algo = "grpo"
    assert analyze.live_labels(run, other)["other"] == "GRPO, final"
    assert analyze.live_labels(other, run)["phase1"] == "GRPO, after phase 1"


def test_the_rule_and_its_margin(page, finished, tmp_path):
    """What the run logged before RL, with standard errors; and the page says it."""
    data = page_data(page)
    rule = data["rule"]
    logged = toy.read_metrics(finished, "internal")[0]
    assert logged["step"] == 0 and data["target"] == 2 and data["chosen"]
    np.testing.assert_allclose(rule["dH_mlp"], logged["dH_mlp"], atol=1e-5)
    base = toy.load_model(finished / "base.pt")
    for part, count in (rule, 64), (rule["more"], 512):
        tokens, mask = toy.own_solutions(base, toy.read_settings(finished), count)
        dH_mlp = minibupo.look_inside(base, tokens, mask)["dH_mlp"].numpy()
        assert part["problems"] == count and part["positions"] == mask.sum()
        np.testing.assert_allclose(part["dH_mlp"], dH_mlp.mean(1), atol=1e-5)
        error = dH_mlp.std(1, ddof=1) / dH_mlp.shape[1] ** 0.5
        np.testing.assert_allclose(part["sem"], error, atol=1e-5)
    script = """found.push($("trained").textContent, texts("#measured td"));"""
    said, cells = browse(tmp_path, page, script)
    assert said.startswith("Phase 1 of this run trained layer 2. This layer was chosen by hand")
    expected = []
    for part in rule, rule["more"]:
        expected += [f"{x:+.3f} ± {e:.3f}" for x, e in zip(part["dH_mlp"], part["sem"])]
    assert [cell.replace("\u2212", "-") for cell in cells] == expected


def test_what_rounding_changes(finished, monkeypatch):
    """The sentence on the page, with a rounding that is coarse enough to change something."""
    run = analyze.Run(finished, device="cpu")
    model = run.load("base")
    coarse = copy.deepcopy(model)
    for weight in coarse.parameters():
        weight.data = (weight.data * 16).round() / 16
    note = analyze.rounding_note(run, {"base": model}, {"base": coarse})
    tokens, mask = run.own_text(model)
    counts = [int(x.replace(",", "")) for x in re.findall(r"([\d,]+) of ([\d,]+)", note)[0]]
    counts += [int(x.replace(",", "")) for x in re.findall(r"([\d,]+) of ([\d,]+)", note)[1]]
    changed = 0
    for site in SITES:
        for layer in (1, 2, 3):
            a, b = (
                [
                    t.argmax(-1)
                    for t in minibupo.policy_logits(m, tokens[:, :-1], Policy(layer, site))
                ]
                for m in (model, coarse)
            )
            changed += sum(int((x != y)[row].sum()) for x, y, row in zip(a, b, mask))
    own = (model(tokens[:, :-1]).argmax(-1) != coarse(tokens[:, :-1]).argmax(-1))[mask]
    M = int(mask.sum())
    assert counts == [int(own.sum()), M, changed, 9 * M] and 0 < counts[0] < M


def test_bad_input_is_one_sentence(finished, copied, tmp_path, capsys):
    other = tmp_path / "other"
    s = toy.Settings(n=3, d_model=16, steps=0, s_inter=0, threads=1, device="cpu")
    other.mkdir()
    (other / "config.json").write_text(json.dumps(asdict(s)))
    toy.save_checkpoint(other / "ckpt.pt", GPT(s.model_config()))
    model, content = toy.load_checkpoint(copied / "ckpt.pt")
    with torch.no_grad():
        model.embed.weight[0, 0] = 1e6
    del content["model"], content["model_config"], content["format"]
    toy.save_checkpoint(copied / "ckpt.pt", model, **content)
    for argv, says in (
        ((finished, other), "different sizes"),
        ((finished, tmp_path / "none"), "config.json"),
        ((copied,), "float16"),
        (("Qwen/Qwen3-0.6B",), "live"),
    ):
        assert analyze.main(["live", *map(str, argv), "--device", "cpu"]) == 2
        error = capsys.readouterr().err
        assert says in error and error.startswith("analyze.py: ") and error.count("\n") == 1
    assert not (finished / "figures" / "live.html").exists()
