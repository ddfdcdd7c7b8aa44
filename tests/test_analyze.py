"""analyze.py: numbers against direct float64 computations, every command on whole, stopped and damaged runs, and the
web page of the lens in a real browser."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from dataclasses import asdict
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, tiny
from test_train_toy import arithmetic

import analyze
import minibupo
import train_toy as toy
from model import GPT

TEXT = "2*3-2=6-2=4<eos>"
PROMPT = "7+5*3-2="


def make_run(path, seed=0, records=(), **options):
    """A run directory with a random base model and the given records, without any training."""
    s = toy.Settings(**dict(seed=seed, n=5, n_layer=3, d_model=32, threads=1, device="cpu", out_dir=str(path)) | options)
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(asdict(s)))
    torch.manual_seed(seed)
    model = GPT(s.model_config())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    toy.save_checkpoint(path / "base.pt", model)
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def evaluation(step, value, samples=8, tiers=(3, 4)):
    """An eval record whose Avg@K of tier n is value + n / 100, and Pass@K 0.5 more."""
    tiers = {str(n): {f"avg@{samples}": value + n / 100, f"avg@{samples}_se": 0.01, "pass@1": 0.1, f"pass@{samples}": value + 0.5} for n in tiers}
    return {"kind": "eval", "step": step, "problems": 10, "tiers": tiers, "examples": [PROMPT + TEXT]}


@pytest.fixture(scope="module")
def grpo(finished, tmp_path_factory):
    """A GRPO run from the base of the finished BuPO run."""
    out = tmp_path_factory.mktemp("runs") / "grpo"
    options = [a for i, a in enumerate(TINY) if a not in ("--s_inter", "--layer") and TINY[i - 1] not in ("--s_inter", "--layer")]
    assert toy.main([*options, "--algo", "grpo", "--base", str(finished / "base.pt"), "--out_dir", str(out)]) == 0
    return out


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the BuPO run, to be written to and damaged."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def run(*argv):
    return analyze.main([str(a) for a in argv])


# ---- numbers ----


def entropy64(h, E):
    """Entropy of softmax(h E^T) for each vector of h, by a loop in float64."""
    values = []
    for vector in np.asarray(h, dtype=np.float64):
        z = E @ vector
        p = np.exp(z - z.max())
        p /= p.sum()
        values.append(-sum(q * np.log(q) for q in p if q > 0))
    return np.array(values)


@pytest.mark.parametrize("prompt, positions", [(None, slice(0, 13)), (PROMPT, slice(7, 21))])
def test_entropy_json_is_the_direct_computation(tmp_path, prompt, positions):
    path = make_run(tmp_path / "run")
    options = ["--text", TEXT if prompt else PROMPT + "2*3-2<eos>"] + (["--prompt", prompt] if prompt else [])
    assert run("entropy", path, *options, "--out", tmp_path / "there", "--matched") == 0
    found = json.loads((tmp_path / "there" / "entropy.json").read_text())
    model = toy.load_model(path / "base.pt").double()
    E, L = model.lm_head.weight.detach().numpy(), 3
    ids = toy.encode((prompt or "") + options[1])
    traces = list(model.trace(torch.tensor([ids[:-1]])))
    at = np.arange(len(ids) - 1)[positions]
    assert len(at) == len(ids) - (8 if prompt else 1) == found["positions"]

    def h(tensor):
        return tensor[0].detach().numpy()[at]

    stream = [h(traces[0].resid_pre)] + [h(t.resid_post) for t in traces]
    expected = {
        "layer": [entropy64(x, E) for x in stream],
        "layer_normed": [entropy64(h(model.final_norm(t)), E) for t in [traces[0].resid_pre] + [t.resid_post for t in traces]],
        "attn": [entropy64(h(t.attn_out), E) for t in traces],
        "mlp": [entropy64(h(t.mlp_out), E) for t in traces],
        "rms": [np.sqrt((x**2).mean(1)) for x in stream],
    }
    expected["d_layer"] = [expected["layer"][l + 1] - expected["layer"][l] for l in range(L)]
    expected["d_attn"] = [expected["attn"][l] - entropy64(h(traces[l].attn_in), E) for l in range(L)]
    expected["d_mlp"] = [expected["mlp"][l] - entropy64(h(traces[l].mlp_in), E) for l in range(L)]
    sizes = expected["rms"][-1]
    expected["layer_matched"] = [entropy64(x * (sizes / r)[:, None], E) for x, r in zip(stream, expected["rms"])]
    for name, values in expected.items():
        values = np.array(values)
        np.testing.assert_allclose(found[name], values.mean(1), atol=2e-5)
        np.testing.assert_allclose(found[name + "_sem"], values.std(1, ddof=1) / np.sqrt(len(at)), atol=2e-5)
    assert found["layer_matched"][-1] == pytest.approx(found["layer"][-1], abs=1e-5)
    own = minibupo.entropy(model(torch.tensor([ids[:-1]])))[0].detach().numpy()[at].mean()
    assert found["layer_normed"][-1] == pytest.approx(own, abs=2e-5)
    assert found["log_vocab"] == pytest.approx(np.log(16))
    above = [l for l in (1, 2) if np.mean(expected["d_mlp"][l - 1]) > 0]
    assert found["target_layer"] == (above[-1] if above else 1)


def test_entropy_of_a_single_position_has_no_standard_error(tmp_path):
    path = make_run(tmp_path / "run")
    assert run("entropy", path, "--text", "7+") == 0
    found = json.loads((path / "figures" / "entropy.json").read_text())
    assert found["positions"] == 1 and found["layer_sem"] == [None] * 4 and found["d_mlp_sem"] == [None] * 3
    assert {p.name for p in (path / "figures").iterdir()} == {"entropy.json", "entropy_flow.png", "entropy_change.png"}


@pytest.mark.parametrize("chunk", [1, 7, 12, 10_000])
def test_chunked_and_unchunked_agree(chunk):
    model, generator = tiny(), torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 11, (3, 9), generator=generator)
    mask = torch.rand(3, 8, generator=generator) < 0.6
    whole = analyze.measure_entropies(model, tokens, mask, chunk=int(mask.sum()), matched=True)
    parts = analyze.measure_entropies(model, tokens, mask, chunk=chunk, matched=True)
    assert whole.keys() == parts.keys()
    for name, values in whole.items():
        np.testing.assert_allclose(parts[name], values, atol=1e-6)


def test_prompts_are_the_models_own_responses(tmp_path):
    path = make_run(tmp_path / "run")
    r = analyze.read_run(path)
    model = analyze.load(r, "base")
    tokens, mask = analyze.probe_text(r, model, prompts=5)
    assert len(tokens) == 5 and torch.equal(tokens[:, 9], torch.full((5,), toy.EQUALS))
    assert not mask[:, :9].any() and mask[:, 9].all()


@pytest.mark.parametrize("df, expected", [(1, 12.7062047), (2, 4.3026527), (3, 3.1824463), (4, 2.7764451), (7, 2.3646243), (29, 2.0452296), (10**5, 1.9599877)])
def test_t_quantile_is_the_tables(df, expected):
    assert analyze.t_quantile(df) == pytest.approx(expected, rel=1e-5)


def test_mean_interval():
    assert analyze.mean_interval([3.0]) == (3.0, None)
    mean, half = analyze.mean_interval([1.0, 2.0, 4.0, 5.0])
    assert mean == 3.0 and half == pytest.approx(3.1824463 * np.sqrt(10 / 3) / 2)
    assert analyze.mean_interval([2.0, 2.0])[1] == 0.0


def test_mean_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = [abs(mean) <= half for mean, half in (analyze.mean_interval(rng.normal(size=5)) for _ in range(500))]
    assert 0.92 < np.mean(covered) < 0.98


def test_over_seeds_with_runs_of_different_length():
    xs, mean, std = analyze.over_seeds([{0: 1.0, 2: 3.0}, {0: 3.0, 2: 4.0, 5: 9.0}])
    assert xs == [0, 2, 5] and mean.tolist() == [2.0, 3.5, 9.0]
    np.testing.assert_allclose(std, [np.std([1, 3], ddof=1), np.std([3, 4], ddof=1), 0])


def test_regions():
    assert [analyze.region(d, 10.0).split(",")[0] for d in (0.3, 0.1, -0.1, -0.3)] == ["exploration", "integration", "integration", "convergence"]


# ---- grouping and the table ----


def test_table_groups_settings_and_gives_intervals(tmp_path):
    runs = []
    for seed, value in ((0, 0.5), (1, 0.6), (2, 0.8)):
        runs.append(make_run(tmp_path / f"bupo{seed}", seed, [evaluation(0, 0.1 * seed), evaluation(40, 0.3), evaluation(60, value)]))
    runs.append(make_run(tmp_path / "grpo", 0, [evaluation(0, 0.0), evaluation(60, 0.7)], algo="grpo", s_inter=0))
    runs.append(make_run(tmp_path / "stopped", 1, [evaluation(0, 0.1), evaluation(40, 0.2)], algo="grpo", s_inter=0))
    runs.append(make_run(tmp_path / "lr", 0, [evaluation(0, 0.0), evaluation(60, 0.4)], lr=1e-4))
    table = analyze.result_table([analyze.read_run(r) for r in runs]).splitlines()
    rows = {cells[1]: cells[2:-1] for cells in ([c.strip() for c in line.split("|")] for line in table)}
    assert list(rows) == ["setting", "---", "before RL", "BuPO, lr 0.0005", "GRPO, lr 0.0005", "BuPO, lr 0.0001"]
    assert rows["setting"] == ["runs", "steps", "n = 3 Avg@8", "n = 3 Pass@8", "n = 4 Avg@8", "n = 4 Pass@8"]
    assert rows["before RL"][:2] == ["3", "0"]  # arms that share a base count it once
    values = 100 * np.array([0.53, 0.63, 0.83])
    half = 4.3026527 * values.std(ddof=1) / np.sqrt(3)
    assert rows["BuPO, lr 0.0005"][:3] == ["3", "60", f"{values.mean():.1f} ± {half:.1f}"]
    assert rows["GRPO, lr 0.0005"][:2] == ["2", "40..60"]
    assert rows["BuPO, lr 0.0001"] == ["1", "60", "43.0", "90.0", "44.0", "90.0"]


def test_table_with_tiers_and_sample_numbers_that_differ(tmp_path):
    a = make_run(tmp_path / "a", 0, [evaluation(0, 0.1), evaluation(60, 0.5)])
    b = make_run(tmp_path / "b", 0, [evaluation(0, 0.1, 4, (3, 4, 5)), evaluation(60, 0.5, 4, (3, 4, 5))], eval_samples=4)
    assert "| BuPO, eval_samples 8 | 1 | 60 | 53.0 | 100.0 | 54.0 | 100.0 |  |  |" in analyze.result_table([analyze.read_run(r) for r in (a, b)])


def test_seed_base_and_machine_are_no_setting(tmp_path):
    a = make_run(tmp_path / "a", 0, threads=1)
    b = make_run(tmp_path / "b", 3, threads=4, base="x/base.pt", device="auto", save_every=3)
    c = make_run(tmp_path / "c", 3, layer=2)
    groups = analyze.group_runs([analyze.read_run(r) for r in (a, b, c)])
    assert {label: [r.path.name for r in runs] for label, runs in groups.items()} == {"BuPO, layer auto": ["a", "b"], "BuPO, layer 2": ["c"]}


# ---- Pass@K ----


def test_counts_are_those_of_a_loop_over_responses(finished):
    r = analyze.read_run(finished)
    model = analyze.load(r, "final")
    counts = analyze.sample_counts(model, r.settings, 3, 6, 20)
    expr = toy.draw_problems(toy.numpy_rng(0, toy.EVALUATE, 3), 6, 3, "eval")
    sampled = model.generate(torch.tensor(toy.prompts(expr)), r.settings.response_limit, num_samples=20, eos_id=toy.EOS, pad_id=toy.PAD,
                             generator=toy.torch_rng("cpu", 0, toy.EVALUATE, 3))  # fmt: skip
    expected = np.zeros(6, int)
    for i, (row, end) in enumerate(zip(sampled.tokens, sampled.end)):
        text = toy.decode(row[:end])
        expected[i // 20] += text.endswith(f"={arithmetic(text.split('=')[0] + '=')}<eos>")
    assert counts.tolist() == expected.tolist() and 0 < expected.sum() < 120


def test_pass_curve_is_enumeration():
    counts = np.array([0, 2, 5])
    mean, se = analyze.pass_curve(counts, 5, [1, 2, 4])
    for k, m, e in zip([1, 2, 4], mean, se):
        values = [np.mean([any(i < c for i in drawn) for drawn in combinations(range(5), k)]) for c in counts]
        assert m == pytest.approx(np.mean(values)) and e == pytest.approx(np.std(values, ddof=1) / 3**0.5)


# ---- the lens ----


def test_lens_cells_are_argmax_and_policies():
    model = tiny()
    tokens = torch.tensor([[1, 5, 2, 9, 3, 3, 7]])
    mask = torch.tensor([[False, True, True, False, True, True]])
    cells = analyze.lens_cells(model, tokens, mask)
    for site, start in (("resid_post", 0), ("attn_out", 1), ("mlp_out", 1)):
        entropy, ids, p = cells[site]["raw"]
        assert entropy.shape == (4 - start, 4) and ids.shape == p.shape == (4 - start, 4, 5)
        for l in range(start, 4):
            logits = minibupo.policy_logits(model, tokens[:, :-1], minibupo.Policy(l, site), mask).detach()
            assert ids[l - start, :, 0].tolist() == logits.argmax(-1).tolist()
            np.testing.assert_allclose(p[l - start], logits.softmax(-1).sort(-1, descending=True)[0][:, :5], atol=1e-6)
            np.testing.assert_allclose(entropy[l - start], minibupo.entropy(logits), atol=1e-6)
    final = model(tokens[:, :-1])[mask].detach()
    assert cells["resid_post"]["normed"][1][-1, :, 0].tolist() == final.argmax(-1).tolist()
    normed = model.unembed(model.final_norm(next(model.trace(tokens[:, :-1])).attn_out))[mask].detach()
    np.testing.assert_allclose(cells["attn_out"]["normed"][0][0], minibupo.entropy(normed), atol=1e-5)


class Browser:
    """A headless Chromium, spoken to in its DevTools protocol over a pair of pipes."""

    def __init__(self, profile):
        to_read, self.to = os.pipe()
        self.back, to_write = os.pipe()
        command = (f"exec chromium --headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --user-data-dir='{profile}' "
                   f"--remote-debugging-pipe 3<&{to_read} 4>&{to_write}")  # fmt: skip
        self.process = subprocess.Popen(["bash", "-c", command], pass_fds=(to_read, to_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_read)
        os.close(to_write)
        self.events, self.number, self.buffer, self.session = [], 0, b"", None

    def message(self, deadline):
        while b"\0" not in self.buffer:
            assert select.select([self.back], [], [], max(0, deadline - time.monotonic()))[0], "the browser does not answer"
            part = os.read(self.back, 1 << 16)
            assert part, "the browser has gone"
            self.buffer += part
        line, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(line)

    def __call__(self, method, **params):
        self.number += 1
        call = {"id": self.number, "method": method, "params": params} | ({"sessionId": self.session} if self.session else {})
        os.write(self.to, json.dumps(call).encode() + b"\0")
        deadline = time.monotonic() + 60
        while True:
            answer = self.message(deadline)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def open(self, path):
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self(f"{domain}.enable")
        self("Page.navigate", url=path.as_uri())
        while not self.js("document.readyState === 'complete' && document.querySelectorAll('.grid td').length > 0"):
            time.sleep(0.05)

    def js(self, expression):
        result = self("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def point_at(self, selector):
        x, y = self.js(f"(r => [r.x + r.width / 2, r.y + r.height / 2])(document.querySelector('{selector}').getBoundingClientRect())")
        self("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def key(self, key):
        for kind in ("keyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=key, text=key if len(key) == 1 else "", windowsVirtualKeyCode={"ArrowRight": 39}.get(key, 0))

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.to)
        os.close(self.back)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="Debian's chromium is not installed")
def test_lens_page_in_a_browser(finished, tmp_path):
    assert run("lens", finished, "7+5*3=", "--text", "2*3=6<eos>", "--out", tmp_path) == 0
    r = analyze.read_run(finished)
    tokens, mask = analyze.probe_text(r, analyze.load(r, "base"), text="2*3=6<eos>", prompt="7+5*3=")
    names = ["base", "phase1", "final"]
    cells = {name: analyze.lens_cells(analyze.load(r, name), tokens, mask) for name in names}

    def expected(name, site, view, layer, position):
        entropy, ids, p = (part[layer - (site != "resid_post"), position] for part in cells[name][site][view])
        words = ["eos" if i == toy.EOS else "pad" if i == toy.PAD else toy.decode([i]) for i in ids]
        return f"{entropy:.2f} nats", [[word, f"{q:.4f}"] for word, q in zip(words, p)]

    def check(name, layer, position):
        for site in cells[name]:
            for view in ("raw", "normed"):
                entropy, top = expected(name, site, view, layer, position)
                table = f"document.getElementById('{site}-{view}')"
                assert browser.js(f"{table}.caption.textContent").endswith(entropy)
                assert browser.js(f"[...{table}.rows].map(r => [...r.cells].map(c => c.textContent))") == top

    browser = Browser(tmp_path / "profile")
    try:
        browser.open(tmp_path / "lens.html")
        assert browser.js("document.getElementById('name').textContent") == "base"
        browser.point_at("td[data-site=attn_out][data-layer=\"2\"][data-position=\"3\"]")
        check("base", 2, 3)
        browser.js("document.getElementById('checkpoint').focus()")
        for name in names[1:]:  # the slider, by its own key
            browser.key("ArrowRight")
            assert browser.js("document.getElementById('name').textContent") == name
            check(name, 2, 3)
        shown = browser.js("[...document.querySelectorAll('td[data-site=mlp_out]')].map(td => td.textContent)")
        assert shown == [expected("final", "mlp_out", "raw", l, m)[1][0][0] for m in range(6) for l in (1, 2, 3)]
        browser.js("document.getElementById('checkpoint').blur()")
        browser.key("n")
        shown = browser.js("[...document.querySelectorAll('td[data-site=resid_post]')].map(td => td.textContent)")
        assert shown == [expected("final", "resid_post", "normed", l, m)[1][0][0] for m in range(6) for l in (0, 1, 2, 3)]
        browser.key("ArrowRight")
        check("final", 3, 3)
        browser.key("[")
        assert browser.js("document.getElementById('name').textContent") == "phase1"
        picture = base64.b64decode(browser("Page.captureScreenshot")["data"])
        assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    finally:
        browser.close()
    requests = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert requests == [(tmp_path / "lens.html").as_uri()]
    errors = [e for e in browser.events if e["method"] in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")]
    assert not errors


def test_lens_picture_takes_any_token(tmp_path):
    """Dollar signs are text, not formulas; long words are cut; deep models have their panels below each other."""
    for L in (2, 13):
        model = tiny(n_layer=L)
        tokens = torch.arange(6)[None]
        cells = analyze.lens_cells(model, tokens, torch.ones(1, 5, dtype=torch.bool))
        figure = analyze.draw_lens(cells, "raw", ["$$", "$a_{$"] * 2 + ["extraordinarily"], lambda i: "$\\frac$" if i % 2 else "wordswords", 2.4)
        analyze.Output(tmp_path).figure(f"lens{L}", figure)
        assert (tmp_path / f"lens{L}.png").stat().st_size > 0


def test_lens_page_stays_small_and_is_safe():
    model = tiny(vocab_size=5000, context_length=64, n_layer=12)
    tokens = torch.randint(0, 5000, (1, 41), generator=torch.Generator().manual_seed(0))
    cells = analyze.lens_cells(model, tokens, torch.ones(1, 40, dtype=torch.bool))
    page = analyze.lens_page("</script>", ["a"] * 40, ["b"] * 40, 8.5, dict.fromkeys(("base", "phase1", "final"), cells), lambda i: f"word{i}</script>")
    assert len(page.encode()) < 3_000_000
    assert page.count("</script>") == 2  # nothing of the data ends a script
    assert "http" not in page.replace('http-equiv="Content-Security-Policy"', "")


# ---- sampling an internal policy ----


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_a_truncated_model_is_the_internal_policy(layer):
    model = tiny()
    short = model.truncated(layer)
    prompt = torch.tensor([[1, 2, 3], [4, 5, 0]])
    sampled = short.generate(prompt, 6, num_samples=3, generator=torch.Generator().manual_seed(0))
    mask = minibupo.response_mask(sampled.prompt_len, sampled.end, sampled.tokens.shape[1])
    logp = minibupo.token_logprobs(model, sampled.tokens, mask, minibupo.Policy(layer))
    torch.testing.assert_close(sampled.logprobs, logp, atol=1e-5, rtol=0)
    assert model.cfg.n_layer == 3 and len(model.blocks) == 3 and model.final_norm.weight is not None
    assert short.embed.weight is model.embed.weight


def test_sample_prints_responses_and_accuracy(finished, capsys):
    assert run("sample", finished, "--layer", 2, "--count", 3, "--problems", 16, "7+5*3=") == 0
    printed = capsys.readouterr().out
    assert "responses of layer 2's policy (final):" in printed and printed.count("7+5*3= ") == 3
    r = analyze.read_run(finished)
    model = analyze.load(r, "final").truncated(2)
    tier = toy.evaluate(model, r.settings, [3], 16, "cpu")[0]["3"]
    assert f"n = 3   policy of layer 2 {100 * tier['avg@4']:5.1f}" in printed


# ---- every command, on whole, stopped and damaged runs ----


def test_everything_of_a_run(copied, capsys):
    assert run(copied) == 0
    made = {str(p.relative_to(copied / "figures")) for p in (copied / "figures").rglob("*") if p.is_file()}
    of_a_model = {"entropy.json", "entropy_flow.png", "entropy_change.png", "writes.json", "writes.png"}
    assert made == of_a_model | {f"final/{name}" for name in of_a_model} | {
        "lens.png", "lens.html", "dynamics.png", "refinement.png", "table.md", "passk.json", "passk.png"}  # fmt: skip
    printed = capsys.readouterr().out
    assert all(f"wrote {copied / 'figures' / name}" in printed for name in made)
    for name in made:
        if name.endswith(".png"):
            assert (copied / "figures" / name).read_bytes().startswith(b"\x89PNG")
    assert len(json.loads((copied / "figures" / "passk.json").read_text())["k"]) == 9


@pytest.mark.parametrize("command", ["dynamics", "refinement", "table", "passk"])
def test_several_runs_together(finished, grpo, tmp_path, command):
    more = ["--problems", 4, "--samples", 8] if command == "passk" else []
    assert run(command, finished, grpo, "--out", tmp_path, "--pdf", *more) == 0
    if command == "table":
        assert "| GRPO | 1 | 6 |" in (tmp_path / "table.md").read_text()
    else:
        assert (tmp_path / f"{command}.pdf").read_bytes().startswith(b"%PDF")
    if command == "passk":
        assert set(json.loads((tmp_path / "passk.json").read_text())["curves"]) == {"base", "BuPO", "GRPO"}


def test_perplexity_and_cosines_drawn_are_those_logged(finished):
    r = analyze.read_run(finished)
    figure = analyze.draw_refinement(analyze.group_runs([r]))
    axes = [ax for sub in figure.subfigs for ax in sub.axes]
    internal = r.records["internal"]
    assert r.target == 2
    for ax, expected in zip(axes, ([i["cos_final"][2] for i in internal], [i["d_layer"][1] for i in internal], [i["perplexity"] for i in internal])):
        assert ax.lines[0].get_xdata().tolist() == [i["step"] for i in internal]
        np.testing.assert_allclose(ax.lines[0].get_ydata(), expected)


def test_a_run_that_was_stopped_early(copied, capsys):
    lines = (copied / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copied / "metrics.jsonl").write_text("".join(line for line in lines if '"kind": "pretrain"' in line))
    (copied / "ckpt.pt").unlink()
    (copied / "phase1.pt").unlink()
    assert run(copied) == 0
    printed = capsys.readouterr().out
    for what in ("trained model", "steps of RL", "evaluations", "looks at the internal policies"):
        assert f"has no {what}: left out" in printed
    assert (copied / "figures" / "entropy_flow.png").exists() and not (copied / "figures" / "dynamics.png").exists()


def test_a_run_without_anything(copied, capsys):
    for name in ("metrics.jsonl", "ckpt.pt", "phase1.pt", "base.pt"):
        (copied / name).unlink()
    assert run(copied) == 0
    assert "has no base model: left out" in capsys.readouterr().out and not (copied / "figures").exists()


def spoil_metrics(path):
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "step", "ste')


@pytest.mark.parametrize(
    "argv, says",
    [
        (["nowhere"], "'nowhere' is neither a run nor a command"), (["table", "nowhere"], "nowhere is not a directory with a run"),
        (["entropy", ".."], "holds no run"), (["entropy", "RUN", "--checkpoint", "best"], "no checkpoint 'best', only base, phase1, final"),
        (["entropy", "RUN", "--checkpoint", "RUN/config.json"], "damaged or not a minibupo checkpoint"),
        (["entropy", "RUN", "--text", "7"], "has no response position"), (["entropy", "RUN", "--text", "", "--prompt", "7+5="], "has no response position"),
        (["entropy", "RUN", "--text", "7+x"], "character 'x'"), (["entropy", "RUN", "--prompt", "7+5="], "--prompt needs --text"),
        (["entropy", "RUN", "--text", "7+5" * 50], "longer than context_length"), (["writes", "RUN", "--prompts", "0"], "--prompts must be in 1..1000"),
        (["sample", "RUN", "--layer", "4", "7+5="], "layer must be in 1..3, not 4"), (["sample", "RUN", "--layer", "0", "7+5="], "layer must be in 1..3, not 0"),
        (["sample", "RUN", "7+5"], "is no problem"), (["sample", "RUN", "7++="], "is no problem"), (["lens", "RUN", ""], "needs a prompt"),
        (["lens", "RUN", "7+5" * 50 + "="], "leaves no room"), (["passk", "RUN", "--samples", "0"], "--samples must be at least 1"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(finished, capsys, argv, says):
    path = str(finished)
    assert run(*[a.replace("RUN", path) for a in argv]) == 2
    error = capsys.readouterr().err
    assert says in error and error.startswith("analyze.py: ") and error.count("\n") == 1 and "Traceback" not in error


@pytest.mark.parametrize("argv", [[], ["dynamics"], ["refinement"], ["passk"], ["table"], ["entropy"], ["writes"], ["lens", "7+5="], ["sample", "7+5="]])
def test_a_broken_metrics_line_is_one_sentence(copied, capsys, argv):
    spoil_metrics(copied)
    assert run(*argv[:1], copied, *argv[1:]) == 2
    error = capsys.readouterr().err
    assert "metrics.jsonl, line" in error and "is not a record of a run" in error and error.count("\n") == 1
    assert not (copied / "figures").exists()


@pytest.mark.parametrize("line", ["3", "[]", "{}", "", '{"kind": "eval", "step": 1}', '{"kind": "step", "step": 2}'])
def test_a_line_that_is_no_record(copied, capsys, line):
    with open(copied / "metrics.jsonl", "a") as file:
        file.write(line + "\n")
    assert run("dynamics", copied) == run("table", copied) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_commands_of_the_help_text_are_there():
    for line in analyze.__doc__.splitlines():
        words = line.split()
        if words[:2] == ["python", "analyze.py"] and not words[2].startswith("RUN"):
            assert callable(getattr(analyze, f"analyze_{words[2]}"))
