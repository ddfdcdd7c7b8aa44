"""analyze.py and experiments/compare.py: numbers against direct computations in float64, every
command on whole, stopped and damaged runs, and the web page of the lens in a real browser."""

import html
import json
import re
import shutil
import subprocess
import sys
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import NO_PHASE_1, tiny

import analyze
import minibupo
import train_toy as toy
from minibupo import FULL, Policy

PROMPT, TEXT = "7+5*3=", "2*3=6<eos>"


def run(*argv):
    return analyze.main([*map(str, argv), "--device", "cpu"])


def subject(path, chosen="base"):
    return analyze.read_run(path, chosen, device="cpu")


# ---- entropy, writes ----


def entropy64(h, E):
    """Entropy of softmax(h E^T) for each vector of h, by a loop in float64."""
    values = []
    for vector in h:
        p = np.exp(E @ vector - max(E @ vector))
        p /= p.sum()
        values.append(-sum(q * np.log(q) for q in p if q > 0))
    return np.array(values)


def test_entropy_json_is_the_direct_computation(finished, tmp_path):
    options = ["--prompt", PROMPT, "--text", TEXT, "--out", tmp_path]
    assert run("entropy", finished, *options) == 0
    found = json.loads((tmp_path / "entropy.json").read_text())
    model = toy.load_model(finished / "base.pt").double()
    E, M = model.lm_head.weight.detach().numpy(), 6
    traces = list(model.trace(torch.tensor([toy.encode(PROMPT + TEXT)[:-1]])))

    def h(tensor):
        return tensor[0].detach().numpy()[5:11]  # what predicts the M tokens of TEXT

    layers = [traces[0].resid_pre, *(trace.resid_post for trace in traces)]
    stream, normed = [h(x) for x in layers], [h(model.final_norm(x)) for x in layers]
    size = [np.sqrt((x**2).mean(1)) for x in stream]
    matched = [x * (size[-1] / of)[:, None] for x, of in zip(stream, size)]
    expected = {"rms_layer": size}
    for name, streams in (("layer", stream), ("layer_normed", normed), ("layer_matched", matched)):
        expected[name] = [entropy64(x, E) for x in streams]
    for name, part in (("attn", "attn_out"), ("attn_in",) * 2, ("mlp", "mlp_out"), ("mlp_in",) * 2):
        expected[name] = [entropy64(h(getattr(trace, part)), E) for trace in traces]
    expected["d_mlp"] = np.subtract(expected["mlp"], expected["mlp_in"])
    expected["d_layer"] = np.diff(expected["layer"], axis=0)
    assert found["positions"] == M and found["log_vocab"] == pytest.approx(np.log(16))
    for name, values in expected.items():
        values = np.array(values)
        np.testing.assert_allclose(found[name], values.mean(1), atol=1e-4)
        np.testing.assert_allclose(found[f"{name}_sem"], values.std(1, ddof=1) / M**0.5, atol=1e-4)
        np.testing.assert_allclose(found[f"{name}_median"], np.median(values, 1), atol=1e-4)
    raising = [l for l in (1, 2) if expected["d_mlp"][l - 1].mean() > 0]
    assert found["target_layer"] == (raising[-1] if raising else None)


def test_no_standard_error_of_one_position_and_no_target_layer_where_no_ffn_widens(copied, capsys):
    model = toy.load_model(copied / "base.pt")
    for block in model.blocks:  # an FFN that writes one vector with a huge logit is sure
        torch.nn.init.constant_(block.mlp.down.weight, 0.0)
        block.mlp.down.weight.data[0] = 1e3
    toy.save_checkpoint(copied / "base.pt", model)
    assert run("writes", copied, "--prompt", "7+", "--text", "5") == 0
    assert "no target layer" in capsys.readouterr().out
    found = json.loads((copied / "figures" / "entropy.json").read_text())
    assert (found["positions"], found["layer_sem"], found["target_layer"]) == (1, None, None)


def test_a_language_model_is_looked_into_as_a_run_is(finished, tmp_path, capsys):
    """The model of a run, saved as a Qwen3 of transformers, gives what the run gives."""
    pytest.importorskip("trl", reason="the extra `hf` is not installed")
    from experiments import trl_peer

    qwen3 = tmp_path / "qwen3"
    trl_peer.to_qwen3(toy.load_model(finished / "base.pt")).save_pretrained(qwen3)
    trl_peer.tokenizer().save_pretrained(qwen3)
    for command, *options in (
        ("writes", "--text", "2*3=6"),
        ("lens", "--text", "2*3=6"),
        ("step", "--layer", "2", "--responses", "2", "31", "--rewards", "1", "0"),
        ("sample", "--layer", "2"),
    ):
        for of, out in (finished, "run"), (qwen3, "lm"):
            assert run(command, of, PROMPT, *options, "--out", tmp_path / out) == 0

    def wrote(name):  # by the run, by the language model
        return [(tmp_path / out / name).read_text() for out in ("run", "lm")]

    ours, theirs = map(json.loads, wrote("entropy.json"))
    for name, values in ours.items():
        assert theirs[name] == pytest.approx(values, abs=1e-4), name
    words = '"read":["=","2","*","3","="],"said":["2","*","3","=","6"]'
    assert all(words in page for page in wrote("lens.html"))
    ours, theirs = (text.splitlines() for text in wrote("step.txt"))
    assert ours[:5] == theirs[:5]  # question, rewards, advantages
    (norms,) = (line.split() for line in theirs if "lm.model.norm" in line)
    assert norms[-2] == "none" and float(norms[-1]) > 0  # in phase 1, in phase 2
    assert sum(line.startswith("  '") for line in capsys.readouterr().out.splitlines()) == 16
    assert run("entropy", qwen3, PROMPT, "--checkpoint", "base") == 2
    assert run("entropy", qwen3) == run("sample", qwen3, PROMPT) == 2  # no prompt, no layer

    args = analyze.parse_arguments(["entropy", str(qwen3), PROMPT, "--dtype", "bfloat16"])
    read = analyze.read_subject(args)
    assert read.load(read.chosen).lm.dtype == torch.bfloat16 and read.eos_id == toy.EOS


def test_what_a_language_model_is(finished, tmp_path, monkeypatch):
    """A name on the hub, safetensors or a file; but not a run, nor a path that is mistyped."""
    (tmp_path / "model.safetensors").touch()
    found = SimpleNamespace(folder=tmp_path / "of a language model")
    monkeypatch.setattr(analyze, "read_language_model", lambda *_: found)

    def read(name):
        args = analyze.parse_arguments(["entropy", str(name), PROMPT])
        return analyze.read_subject(args).folder

    for name in "Qwen/Qwen3-0.6B", tmp_path, tmp_path / "model.safetensors":
        assert read(name) == found.folder
    assert read(finished) == finished / "figures"
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(ValueError, match="neither a run nor a language model"):
        read(f"{tmp_path.name}/none")


# ---- step ----


@pytest.mark.parametrize("policy", [Policy(2), FULL])
def test_step_is_a_step(finished, policy):
    """The table's numbers against log-probabilities, gradients and an AdamW step by hand."""
    of, args = subject(finished), analyze.parse_arguments(["step", str(finished)])
    model, lr = of.load("base"), 1e-3
    rollouts = analyze.one_question(of, model, args)
    numbers, columns = analyze.one_step(of.load("base"), rollouts, policy, lr)
    rewards = rollouts.rewards[0]
    assert rollouts.rewards.shape == (1, 8) and 0 < rewards.mean() < 1
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)

    def logprobs():
        for row, start, end in zip(*rollouts[:3]):
            logits = minibupo.policy_logits(model, row[None, : end - 1], policy)[0, start - 1 :]
            yield logits.log_softmax(-1).gather(-1, row[start:end, None])[:, 0]

    old = list(logprobs())
    tokens = sum(map(len, old))
    loss = -sum(A * (p - p.detach()).exp().sum() for A, p in zip(advantages, old)) / tokens
    loss.backward()
    assert float(numbers["loss before the step"]) == pytest.approx(loss.item(), abs=1e-4)
    assert numbers["ratios before the step"] == "1 .. 1"
    low, high = map(float, numbers["ratios after the step"].split(" .. "))
    assert low < high
    square = sum(float(p.grad.square().sum()) for p in model.blocks[0].parameters())
    assert float(numbers["  layer 1"]) == pytest.approx(square**0.5, rel=1e-3)
    none = numbers["  layer 3"] == numbers["  final_norm.weight"] == "none"
    assert none == (model.final_norm.weight.grad is None) == (policy != FULL)

    torch.optim.AdamW(model.parameters(), lr=lr).step()
    new, cut_off = list(logprobs()), 0
    for i, A in enumerate(advantages):
        for t, p, q in zip(range(5, 99), old[i].tolist(), new[i].tolist()):
            *shown, cut = columns.pop((i, t)).split()
            assert [float(x) for x in shown[:2]] == pytest.approx([p, q], abs=0.01)
            r = float(shown[2])
            assert r == pytest.approx(np.exp(q - p), rel=0.05)
            on_the_edge = min(abs(r - 0.8), abs(r - 1.2)) < 0.01
            assert (cut == "yes") == (r > 1.2 if A > 0 else r < 0.8) or on_the_edge
            cut_off += cut == "yes"
    assert not columns and numbers["tokens cut off after the step"] == f"{cut_off} of {tokens}"


def test_step_of_given_responses(copied, capsys):
    """The table in two phases, of a best response and a worst one; the run stays as it was."""
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    options = ["--responses", "2<eos>", "13<eos>", "4<eos>", "--rewards", "1", "0", "1"]
    assert run("step", copied, "7+5=", *options) == 0
    printed = capsys.readouterr().out
    assert (copied / "figures" / "step.txt").read_text() in printed
    assert "+0.577   2<eos>" in printed and "-1.155   13<eos>" in printed
    tokens = [line.split() for line in printed.splitlines() if re.match(r"\S+ +[+-]\d\.", line)]
    assert " ".join(row[0] for row in tokens) == "2 <eos> 1 3 <eos>"
    assert all(len(row) == 10 for row in tokens)
    of, args = subject(copied), ["step", str(copied), "7+5=", *options]
    rollouts = analyze.one_question(of, of.load("base"), analyze.parse_arguments(args))
    for row, at in (tokens[0], (0, 3)), (tokens[-1], (1, 5)):  # each phase from the base's weights
        for policy, shown in (Policy(2), row[2:6]), (FULL, row[6:]):
            columns = analyze.one_step(of.load("base"), rollouts, policy, of.settings.lr)[1]
            assert columns[at].split() == shown
    assert before == {path.name: path.read_bytes() for path in copied.iterdir() if path.is_file()}


# ---- lens ----


def test_lens_cells_are_the_policies():
    model, tokens = tiny(), torch.tensor([[1, 5, 2, 9, 3, 3, 7]])
    mask = torch.tensor([[False, True, True, False, True, True]])
    cells = analyze.lens_cells(model, tokens, mask, str)
    for site, rows in cells["raw"].items():
        for l, row in enumerate(rows, 4 - len(rows)):
            logits = minibupo.policy_logits(model, tokens[:, :-1], Policy(l, site))[mask].double()
            for (entropy, *top), p in zip(row, logits.softmax(-1).detach().numpy()):
                assert entropy == pytest.approx(-(p * np.log(p)).sum(), abs=0.006)
                assert [int(token) for token, _ in top] == p.argsort()[::-1][:5].tolist()
                np.testing.assert_allclose([q for _, q in top], np.sort(p)[::-1][:5], atol=1e-4)
    own = model(tokens[:, :-1])[mask].softmax(-1).detach()  # with the final norm H^L gives pi_theta
    for (_, *top), p in zip(cells["normed"]["resid_post"][-1], own):
        assert all(q == pytest.approx(float(p[int(token)]), abs=1e-4) for token, q in top)


def test_lens_takes_any_token(copied, tmp_path):
    """Dollar signs are text and no formulas, and nothing of the data can end the page's script."""
    of, args = subject(copied), analyze.parse_arguments(["lens", str(copied), PROMPT])
    of.folder, model = tmp_path, of.load("base")
    tokens, mask = analyze.looked_at(of, model, args)  # the greedy answer, up to EOS
    assert torch.equal(model(tokens[:, :-1]).argmax(-1)[mask], tokens[:, 1:][mask])
    assert toy.EOS not in tokens[0, :-1]
    of.decode = lambda ids: ["$a_{$", "</script>", "$$", "\n", " x", "extraordinarily"][ids[0] % 6]
    analyze.lens(of, args)
    page = (tmp_path / "lens.html").read_text()
    assert page.count("</script>") == 2 and "http" not in page.replace("http-equiv", "")


# What a reader does to the page: points at a cell, moves the slider, presses keys. After each note
# the checkpoint's name, the tables of details, and one site's grid.
READER = """
const found = [], all = s => [...document.querySelectorAll(s)];
window.onerror = message => found.push(message);
function note(site) {
  const details = all("#detail table").map(t => [t.id, t.caption.textContent.split(": ")[1],
    [...t.rows].map(r => [...r.cells].map(c => c.textContent))]);
  const grid = all(`td[data-site=${site}]`).map(td => td.textContent);
  found.push([$("name").textContent, details, grid]);
}
const key = k => document.dispatchEvent(new KeyboardEvent("keydown", {key: k, bubbles: true}));
document.querySelector("td[data-site=attn_out][data-layer='2'][data-position='3']")
  .dispatchEvent(new PointerEvent("pointermove", {bubbles: true}));
note("attn_out");
$("checkpoint").value = 2;
$("checkpoint").dispatchEvent(new Event("input"));
note("mlp_out");
key("n"); key("ArrowRight"); key("[");
note("resid_post");
make("pre", JSON.stringify(found), document.body).id = "found";
</script>
</body>"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_lens_page_in_a_browser(finished, tmp_path):
    assert run("lens", finished, PROMPT, "--text", TEXT, "--out", tmp_path) == 0
    page = tmp_path / "lens.html"
    page.write_text(page.read_text().replace("</script>\n</body>", READER))
    options = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --dump-dom".split()
    browser = ["chromium", *options, f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
    dom = subprocess.run(browser, capture_output=True, text=True, check=True).stdout
    found = json.loads(html.unescape(re.search('<pre id="found">(.*)</pre>', dom, re.S)[1]))

    of, args = subject(finished), analyze.parse_arguments(["lens", "RUN", PROMPT, "--text", TEXT])
    looked_at = analyze.looked_at(of, of.load("base"), args)
    expected = []
    for name, layer, site, view in (
        ("base", 2, "attn_out", "raw"),
        ("final", 2, "mlp_out", "raw"),
        ("phase1", 3, "resid_post", "normed"),
    ):
        cells, details = analyze.lens_cells(of.load(name), *looked_at, of.word), []
        for s, v in product(minibupo.SITES, cells):
            entropy, *top = cells[v][s][layer - (s != "resid_post")][3]
            rows = [[token, f"{p:.4f}"] for token, p in top]
            details.append([f"{s}-{v}", f"{entropy:.2f} nats", rows])
        grid = [cell[1][0] for row in zip(*cells[view][site]) for cell in row]  # by position
        expected.append([name, details, grid])
    assert found == expected


# ---- commands on whole, stopped and damaged runs ----


def test_everything_of_a_run(copied):
    assert run("all", copied) == 0
    made = {str(p.relative_to(copied / "figures")) for p in (copied / "figures").rglob("*.*")}
    figures = {"entropy_flow", "entropy_change", "writes"}
    expected = {"lens", "dynamics", "refinement", *figures, *(f"final/{f}" for f in figures)}
    texts = {"entropy.json", "final/entropy.json", "lens.html", "step.txt"}
    assert made == {f"{name}.png" for name in expected} | texts
    for name, *argv in (  # the lens is of the trained model, the step of the base
        ("final/entropy.json", "entropy", "--checkpoint", "final"),
        ("lens.html", "lens"),
        ("step.txt", "step"),
    ):
        path = copied / "figures" / name
        by_all = path.read_text()
        path.unlink()
        assert run(argv[0], copied, *argv[1:]) == 0 and path.read_text() == by_all


def test_training_curves_are_those_logged(finished):
    found = analyze.read_training(subject(finished))
    inside = toy.read_metrics(finished, "internal")
    curve = found["refinement"]["cos($H^l$, $H^L$), target $l$"]
    assert curve == {record["step"]: record["cos_layer"][2] for record in inside}
    curve = found["refinement"]["$dH_{Layer}$, target $l$"]
    assert curve == {record["step"]: record["d_layer"][1] for record in inside}
    steps = toy.read_metrics(finished, "step")
    names = {"training reward": "reward", "entropy (nats)": "policy_entropy"}
    for title, name in {**names, "length (tokens)": "length"}.items():
        assert list(found["dynamics"][title].values()) == [r[name] for r in steps]


def test_sample_is_of_the_internal_policy(finished, capsys):
    assert run("sample", finished, PROMPT, "--layer", 1) == 0
    printed = capsys.readouterr().out
    model, s = toy.load_model(finished / "ckpt.pt"), toy.read_settings(finished)
    expected = toy.evaluate(model.truncated(1), s, [3], 128)[0]["3"]["avg@8"]
    of_layer, of_pi_theta = printed.split("responses of")[1:]
    assert of_layer.startswith(" layer 1") and f"n = 3: {100 * expected:.1f}" in of_layer
    assert of_pi_theta.startswith(" pi_theta") and f"'{PROMPT}" not in printed


def test_a_run_that_was_stopped_early(copied, capsys):
    (copied / "ckpt.pt").unlink()
    assert run("all", copied) == 2 and "ckpt.pt" in capsys.readouterr().err
    assert (copied / "figures" / "entropy_flow.png").exists()


BAD_INPUT = """all nowhere: neither a run nor
step RUN 7+5= --responses 1 2 --rewards 1 0 --layer 4: layer
entropy RUN/..: config.json
lens RUN 7+5= --text=: no response
entropy RUN 7+x: character 'x'
writes RUN LONG: context
sample RUN 7+5= --layer 4: layer must be in 1..3, not 4
step RUN 7+5=: --responses
step RUN 7+5= --responses 1 2 --rewards 1: --rewards
step RUN 7+5= --responses 1 2 --rewards 1 1: all rewards are equal"""


@pytest.mark.parametrize("line", BAD_INPUT.splitlines())
def test_bad_input_is_one_sentence(copied, capsys, line):
    argv, says = line.replace("LONG", "7+5" * 90).split(": ")
    assert run(*argv.replace("RUN", str(copied)).split()) == 2
    error = capsys.readouterr().err
    assert says in error and error.startswith("analyze.py: ") and error.count("\n") == 1
    assert not (copied / "figures").exists()


@pytest.mark.parametrize("option", ["--checkpoint best", "--layer 2", "--prom 7+5="])
def test_options_that_a_command_does_not_have(finished, option):
    with pytest.raises(SystemExit, match="2"):
        run("entropy", finished, *option.split())


@pytest.mark.parametrize("line", ['{"kind": "step", "ste', "[]", '{"kind": "step", "step": "x"}'])
def test_damaged_metrics_are_one_sentence(copied, capsys, line):
    with open(copied / "metrics.jsonl", "a") as file:
        file.write(line + "\n")
    assert run("dynamics", copied) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (copied / "figures").exists()


# ---- compare.py ----


@pytest.fixture(scope="module")
def compare():
    pytest.importorskip("scipy")
    sys.path.insert(0, str(Path(analyze.__file__).parent / "experiments"))
    import compare

    return compare


def test_compare_runs(compare, finished, copied, tmp_path):
    grpo, out, base = tmp_path / "grpo", tmp_path / "out", str(finished / "base.pt")
    options = [*NO_PHASE_1, "--algo", "grpo", "--base", base, "--out_dir", str(grpo)]
    assert toy.main(options) == 0
    more = ["--problems", "4", "--samples", "8", "--out", str(out), "--device", "cpu"]
    assert compare.main([str(finished), str(copied), str(grpo), *more]) == 0
    names = {path.name for path in out.iterdir()}
    assert names == {"table.md", "dynamics.png", "refinement.png", "passk.json", "passk.png"}
    rows = [line.split(" | ") for line in (out / "table.md").read_text().splitlines()]
    tier = toy.read_metrics(finished, "eval")[-1]["tiers"]["3"]
    assert [row[1] for row in rows if len(row) > 1] == ["runs", "1", "2", "1"]
    shares = [f"{100 * tier[name]:.1f} ± 0.0" for name in ("avg@8", "right_steps")]
    assert rows[3][3:5] == shares
    assert set(json.loads((out / "passk.json").read_text())["curves"]) == {"base", "BuPO", "GRPO"}
    assert compare.main([str(tmp_path)]) == 2
    d_mlp = toy.read_metrics(grpo, "internal")[0]["d_mlp"]  # GRPO is shown at the rule's layer
    expected = max([l for l in (1, 2) if d_mlp[l - 1] > 0], default=2)
    assert analyze.target_policy(subject(grpo)).layer == expected


def test_intervals(compare):
    assert compare.mean_interval([3.0]) == (3.0, None)
    mean, half = compare.mean_interval([1.0, 2.0, 4.0, 5.0])
    assert mean == 3.0 and half == pytest.approx(3.1824463 * np.sqrt(10 / 3) / 2)  # of a table
    x, mean, std = compare.over_seeds([{0: 1.0, 2: 3.0}, {0: 3.0, 2: 4.0, 5: 9.0}])
    assert x == [0, 2, 5] and mean.tolist() == [2.0, 3.5, 9.0]
    np.testing.assert_allclose(std, [2**0.5, 0.5**0.5, 0])


def test_pass_curve_is_enumeration(compare, finished, monkeypatch):
    counts = np.array([0, 2, 5])
    monkeypatch.setattr(compare, "sample_counts", lambda *of: counts)
    curve = compare.pass_curves({"BuPO": [subject(finished)]}, 3, 5)["curves"]["BuPO"][3]
    for i, k in enumerate((1, 2, 4)):
        draws = list(combinations(range(5), k))
        values = [np.mean([any(j < c for j in draw) for draw in draws]) for c in counts]
        assert curve["pass"][i] == pytest.approx(np.mean(values))
        assert curve["se"][i] == pytest.approx(np.std(values, ddof=1) / 3**0.5)
