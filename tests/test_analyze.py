"""analyze.py: numbers against direct computations in float64, every command on complete, stopped
and damaged runs, and the web page of the lens in a real browser."""

import errno
import html
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import tiny

import analyze
import minibupo
import train_toy as toy
from minibupo import FULL, Policy

PROMPT, TEXT = "7+5*3=", "2*3=6<eos>"


def run(*argv):
    return analyze.main([argv[0], "--device", "cpu", *map(str, argv[1:])])


def subject(path, checkpoint="base"):
    return analyze.Run(path, checkpoint, device="cpu")


def opened(*argv):
    """What the command line says to look at."""
    found = {}

    def look(subject, **options):
        """Do nothing."""
        found["subject"] = subject

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(analyze.COMMANDS, argv[0], look)
        assert run(*argv) == 0
    return found["subject"]


@pytest.fixture
def unrendered(monkeypatch):
    """Figures are drawn but not rendered, which takes most of the time. Their files are empty."""
    monkeypatch.setattr(analyze.Figure, "savefig", lambda *_, **options: None)


# ---- entropy, writes ----


def entropy64(h, E):
    """Entropy of softmax(h E^T) for each vector of h, by a loop in float64."""
    values = []
    for vector in h:
        p = np.exp(E @ vector - max(E @ vector))
        p /= p.sum()
        values.append(-sum(q * np.log(q) for q in p if q > 0))
    return np.array(values)


def test_entropy_json_is_the_direct_computation(finished, tmp_path, unrendered):
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
    expected["dH_mlp"] = np.subtract(expected["mlp"], expected["mlp_in"])
    expected["dH_layer"] = np.diff(expected["layer"], axis=0)
    assert found["positions"] == M and found["log_vocab"] == pytest.approx(np.log(16))
    for name, values in expected.items():
        values = np.array(values)
        np.testing.assert_allclose(found[name], values.mean(1), atol=1e-4)
        np.testing.assert_allclose(found[f"{name}_sem"], values.std(1, ddof=1) / M**0.5, atol=1e-4)
        np.testing.assert_allclose(found[f"{name}_median"], np.median(values, 1), atol=1e-4)
    raising = [l for l in (1, 2) if expected["dH_mlp"][l - 1].mean() > 0]
    assert found["target_layer"] == (raising[-1] if raising else None)


def test_one_position_has_no_standard_error_and_narrowing_ffns_no_target_layer(
    copied, capsys, unrendered
):
    model = toy.load_model(copied / "base.pt")
    for block in model.blocks:  # an FFN that writes one vector with a huge logit is confident
        torch.nn.init.constant_(block.mlp.down.weight, 0.0)
        block.mlp.down.weight.data[0] = 1e3
    toy.save_checkpoint(copied / "base.pt", model)
    assert run("writes", copied, "--prompt", "7+", "--text", "5") == 0
    assert "no target layer" in capsys.readouterr().out
    found = json.loads((copied / "figures" / "entropy.json").read_text())
    assert (found["positions"], found["layer_sem"], found["target_layer"]) == (1, None, None)


def test_a_language_model_is_looked_into_as_a_run_is(finished, tmp_path, capsys, unrendered):
    """The model of a run, saved as a Qwen3 of transformers, gives what the run gives."""
    pytest.importorskip("trl", reason="the extra `hf` is not installed")
    from experiments import trl_peer

    qwen3 = tmp_path / "qwen3"
    trl_peer.to_qwen3(toy.load_model(finished / "base.pt")).save_pretrained(qwen3)
    trl_peer.tokenizer().save_pretrained(qwen3)
    commands = (
        ("writes", "--text", "2*3=6"),
        ("lens", "--text", "2*3=6"),
        ("step", "--layer", "2", "--responses", "2", "31", "--rewards", "1", "0"),
    )
    for source, out in (finished, "run"), (qwen3, "lm"):
        for command, *options in commands:
            assert run(command, source, PROMPT, *options, "--out", tmp_path / out) == 0
        assert run("sample", source, PROMPT, "--layer", "2") == 0

    def wrote(name):  # by the run, by the language model
        return [(tmp_path / out / name).read_text() for out in ("run", "lm")]

    ours, theirs = map(json.loads, wrote("entropy.json"))
    for name, values in ours.items():
        assert theirs[name] == pytest.approx(values, abs=1e-4), name
    words = '"tokens":["=","2","*","3","="],"next_tokens":["2","*","3","=","6"]'
    assert all(words in page for page in wrote("lens.html"))
    ours, theirs = (text.splitlines() for text in wrote("step.txt"))
    assert ours[:5] == theirs[:5]  # question, rewards, advantages
    (norms,) = (line.split() for line in theirs if "lm.model.norm" in line)
    assert norms[-2] == "none" and float(norms[-1]) > 0  # in phase 1, in phase 2
    assert sum(line.startswith("  '") for line in capsys.readouterr().out.splitlines()) == 16
    assert run("entropy", qwen3, PROMPT, "--checkpoint", "base") == 2
    assert run("entropy", qwen3) == run("sample", qwen3, PROMPT) == 2  # no prompt, no layer

    read = opened("entropy", qwen3, PROMPT, "--dtype", "bfloat16")
    assert read.load().lm.dtype == torch.bfloat16 and read.eos_id == toy.EOS
    assert run("entropy", finished, "--dtype", "bfloat16") == 2  # a run has its own


def test_what_a_language_model_is(finished, tmp_path, monkeypatch):
    """A name on the hub, a directory with weights or a .gguf file; but not a run."""
    for file in "model.safetensors", "tiny.gguf", "older/pytorch_model.bin":
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    monkeypatch.setattr(analyze, "PretrainedModel", lambda source, *_: f"read from {source}")
    for name in "Qwen/Qwen3-0.6B", tmp_path, tmp_path / "older", tmp_path / "tiny.gguf":
        assert opened("entropy", name, PROMPT) == f"read from {name}"
    assert opened("entropy", finished, PROMPT).folder == finished / "figures"


NO_HUB = """entropy out/bupo-seed0 7+5=
lens out/bupo-seed0/ 7+5=
all out/bupo-seed0
step results/bupo-seed0
entropy ./results/bupo 7+5=
entropy models/qwen.gguf 7+5=
lens somewhere/else/bupo 7+5="""


@pytest.mark.parametrize("line", NO_HUB.splitlines())
def test_the_right_command_in_the_wrong_directory(tmp_path, monkeypatch, capsys, line):
    """It is refused without asking the hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(analyze, "PretrainedModel", None)
    assert run(*line.split()) == 2
    directory = line.split()[1]
    assert capsys.readouterr().err.startswith(f"analyze.py: there is no directory {directory} here")


@pytest.mark.parametrize(
    "error",
    [ImportError("the extra is missing"), ValueError("no such model"), OSError("no network")],
)
def test_a_name_that_the_hub_does_not_have(monkeypatch, capsys, error):
    def fail(source, *_):
        raise error

    monkeypatch.setattr(analyze, "PretrainedModel", fail)
    assert run("lens", "runs/bupo-seed0", PROMPT) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("analyze.py: there is no directory runs/bupo-seed0 here")
    assert printed.endswith(f"{error}\n") and printed.count("\n") == 1
    for argv in ["all"], ["step"], ["entropy", "--checkpoint", "base"]:  # these look like a run's
        assert run(argv[0], "runs/bupo-seed0", *argv[1:]) == 2
        assert capsys.readouterr().err.startswith("analyze.py: there is no directory")


# ---- step ----


@pytest.mark.parametrize("policy", [Policy(2), FULL])
def test_step_is_a_step(finished, policy):
    """A StepResult against log-probabilities, gradients and an AdamW step by hand."""
    run_dir = subject(finished)
    model = run_dir.load()
    lr = 1e-3
    rollouts = run_dir.first_mixed_question(model)
    result = analyze.one_step(run_dir.load(), rollouts, policy, lr)
    rewards = rollouts.rewards[0]
    assert rollouts.rewards.shape == (1, 8) and 0 < rewards.mean() < 1
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)

    def logprobs():
        for row, start, end in zip(rollouts.tokens, rollouts.prompt_len, rollouts.end):
            logits = minibupo.policy_logits(model, row[None, : end - 1], policy)[0, start - 1 :]
            yield logits.log_softmax(-1).gather(-1, row[start:end, None])[:, 0]

    old = list(logprobs())
    tokens = sum(map(len, old))
    loss = -sum(A * (p - p.detach()).exp().sum() for A, p in zip(advantages, old)) / tokens
    loss.backward()
    assert result.policy == policy and result.loss_before == pytest.approx(loss.item(), abs=1e-6)
    square = sum(float(p.grad.square().sum()) for p in model.blocks[0].parameters())
    assert result.gradient_norms["layer 1"] == pytest.approx(square**0.5, rel=1e-4)
    above = [result.gradient_norms[part] is None for part in ("layer 3", "final_norm.weight")]
    assert above == [policy != FULL] * 2
    assert (model.final_norm.weight.grad is None) == (policy != FULL)

    torch.optim.AdamW(model.parameters(), lr=lr).step()
    new = list(logprobs())
    total = 0.0
    rows = zip(advantages, old, new, rollouts.prompt_len, rollouts.end)
    for i, (A, p, q, start, end) in enumerate(rows):
        at = slice(start - 1, end - 1)
        p = p.detach()
        q = q.detach()
        assert result.mask[i, at].all() and result.mask[i].sum() == end - start
        # AdamW divides by the gradient's size, so that rounding of tiny gradients shows
        torch.testing.assert_close(result.old_logp[i, at], p, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(result.new_logp[i, at], q, atol=0.01, rtol=0.01)
        torch.testing.assert_close(result.ratio[i, at], (q - p).exp(), atol=0.02, rtol=0.05)
        r = result.ratio[i, at]
        assert torch.equal(result.clipped[i, at], r > 1.2 if A > 0 else r < 0.8)
        total += float(torch.minimum(r * A, r.clamp(0.8, 1.2) * A).sum())
    assert not result.clipped[~result.mask].any()
    assert result.loss_after == pytest.approx(-total / tokens, abs=1e-5)


def test_step_of_given_responses(copied, capsys):
    """The table shows both phases, of a best response and a worst one; the run stays as it was."""
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    options = ["--responses", "2<eos>", "13<eos>", "4<eos>", "--rewards", "1", "0", "1"]
    assert run("step", copied, "7+5=", *options) == 0
    assert before == {path.name: path.read_bytes() for path in copied.iterdir() if path.is_file()}
    printed = capsys.readouterr().out
    assert (copied / "figures" / "step.txt").read_text() in printed
    assert "+0.577   2<eos>" in printed and "-1.155   13<eos>" in printed

    results = analyze.step(subject(copied), "7+5=", ["2<eos>", "13<eos>", "4<eos>"], [1.0, 0, 1.0])
    assert [result.policy for result in results] == [Policy(2), FULL]
    assert capsys.readouterr().out == printed
    lines = [line.split() for line in printed.splitlines()]
    for label, *numbers in (
        ("loss after the step", *(f"{result.loss_after:.5f}" for result in results)),
        ("tokens clipped after the step", *(f"{result.clipped.sum()} of 7" for result in results)),
        ("  layer 3", "none", f"{results[1].gradient_norms['layer 3']:.4f}"),
    ):
        assert " ".join([label, *numbers]).split() in lines
    rows = [row for row in lines if len(row) == 10 and row[1] in ("+0.577", "-1.155")]
    assert [row[0] for row in rows] == ["2", "<eos>", "1", "3", "<eos>"]
    for row, at in zip(rows, [(0, 3), (0, 4), (1, 3), (1, 4), (1, 5)]):
        for result, shown in zip(results, (row[2:6], row[6:])):
            values = [f"{x[at]:.4f}" for x in (result.old_logp, result.new_logp)]
            assert shown == [
                *values,
                f"{result.ratio[at]:.3g}",
                "no yes".split()[result.clipped[at]],
            ]


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
    run_dir = subject(copied)
    run_dir.folder = tmp_path
    model = run_dir.load()
    tokens, mask = analyze.tokens_to_look_at(run_dir, model, PROMPT)  # the greedy answer, up to EOS
    assert torch.equal(model(tokens[:, :-1]).argmax(-1)[mask], tokens[:, 1:][mask])
    assert toy.EOS not in tokens[0, :-1]
    words = ["$a_{$", "</script>", "$$", "\n", " x", "extraordinarily"]
    run_dir.decode = lambda ids: words[ids[0] % 6]
    analyze.lens(run_dir, PROMPT)
    page = (tmp_path / "lens.html").read_text()
    assert page.count("</script>") == 3 and "http" not in page.replace("http-equiv", "")
    assert '"note":""' in page  # no policy says <pad>


def test_lens_explains_a_padding_token(copied, monkeypatch, unrendered):
    """If a policy says <pad>, the page and the picture explain it."""
    lines = []
    monkeypatch.setattr(analyze.Figure, "supxlabel", lambda _, text, **style: lines.append(text))
    run_dir = subject(copied)
    # every digit is shown as padding, and a policy finds some digit likeliest
    run_dir.decode = lambda ids: re.sub(r"\d", "<pad>", toy.ENCODING.decode(ids))
    analyze.lens(run_dir, PROMPT, TEXT)
    page = (copied / "figures" / "lens.html").read_text()
    assert json.dumps(analyze.PAD_NOTE).replace("<", "\\u003c") in page
    assert lines == [analyze.PAD_NOTE]


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
def test_lens_page_in_a_browser(finished, tmp_path, unrendered):
    assert run("lens", finished, PROMPT, "--text", TEXT, "--out", tmp_path) == 0
    page = tmp_path / "lens.html"
    page.write_text(page.read_text().replace("</script>\n</body>", READER))
    options = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --dump-dom".split()
    browser = ["chromium", *options, f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
    dom = subprocess.run(browser, capture_output=True, text=True, check=True).stdout
    found = json.loads(html.unescape(re.search('<pre id="found">(.*)</pre>', dom, re.S)[1]))

    run_dir = subject(finished)
    tokens, mask = analyze.tokens_to_look_at(run_dir, run_dir.load(), PROMPT, TEXT)
    word = partial(analyze.visible, run_dir)
    expected = []
    for name, layer, site, view in (
        ("base", 2, "attn_out", "raw"),
        ("final", 2, "mlp_out", "raw"),
        ("phase1", 3, "resid_post", "normed"),
    ):
        cells = analyze.lens_cells(run_dir.load(name), tokens, mask, word)
        details = []
        for s, v in product(minibupo.SITES, cells):
            entropy, *top = cells[v][s][layer - (s != "resid_post")][3]
            rows = [[token, f"{p:.4f}"] for token, p in top]
            details.append([f"{s}-{v}", f"{entropy:.2f} nats", rows])
        grid = [cell[1][0] for row in zip(*cells[view][site]) for cell in row]  # by position
        expected.append([name, details, grid])
    assert found == expected


# ---- commands on whole, stopped and damaged runs ----


@pytest.fixture
def figure_of_others():
    """An open figure, on another backend than that of files."""
    before = plt.get_backend()
    plt.switch_backend("svg")
    figure = plt.figure()
    yield figure
    plt.close(figure)
    plt.switch_backend(before)


def test_everything_of_a_run(copied, figure_of_others, request):
    """All files are written. Neither importing analyze.py nor drawing changes the backend, the
    style or the open figures of a notebook."""
    style = dict(plt.rcParams)
    runpy.run_path(analyze.__file__)
    assert run("all", copied) == 0
    assert plt.get_backend() == "svg" and plt.get_fignums() == [figure_of_others.number]
    assert dict(plt.rcParams) == style

    made = {str(p.relative_to(copied / "figures")) for p in (copied / "figures").rglob("*.*")}
    figures = {"entropy_flow", "entropy_change", "writes"}
    expected = {"lens", "dynamics", "refinement", *figures, *(f"final/{f}" for f in figures)}
    texts = {"entropy.json", "final/entropy.json", "lens.html", "step.txt"}
    assert made == {f"{name}.png" for name in expected} | texts
    request.getfixturevalue("unrendered")  # from here on only the texts are looked at
    for name, *argv in (  # the lens shows the trained model, the step trains the base
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
    curve = found["refinement"]["cosine of $H^l$ and $H^L$, target layer"]
    assert curve == {record["step"]: record["cos_layer"][2] for record in inside}
    curve = found["refinement"]["$dH_{Layer}$ (nats), target layer"]
    assert curve == {record["step"]: record["dH_layer"][1] for record in inside}
    steps = toy.read_metrics(finished, "step")
    names = {"training reward": "reward", r"entropy of $\pi_\theta$ (nats)": "policy_entropy"}
    for title, name in {**names, "response length (tokens)": "length"}.items():
        assert list(found["dynamics"][title].values()) == [r[name] for r in steps]


def test_sample_is_of_the_internal_policy(finished, capsys):
    assert run("sample", finished, PROMPT, "--layer", 1) == 0
    printed = capsys.readouterr().out
    model, s = toy.load_model(finished / "ckpt.pt"), toy.read_settings(finished)
    expected = toy.evaluate(model.truncated(1), s, [3], 16)[0]["3"]["avg@8"]  # s has no more
    of_layer, of_pi_theta = printed.split("responses of")[1:]
    assert of_layer.startswith(" layer 1") and f"n = 3: {100 * expected:.1f}%" in of_layer
    assert of_pi_theta.startswith(" pi_theta") and f"'{PROMPT}" not in printed
    assert "does not end with" not in printed


def test_a_prompt_that_does_not_end_is_noted(finished, tmp_path, capsys):
    assert run("lens", finished, PROMPT.removesuffix("="), "--out", tmp_path) == 0
    note = 'does not end with "=", so the model may add to it'
    assert note in capsys.readouterr().out
    words = ("--responses", "=2*3=6", "=1", "--rewards", 1, 0, "--out", tmp_path)
    assert run("step", finished, PROMPT.removesuffix("="), *words) == 0
    assert capsys.readouterr().out.count(note) == 1  # not for each response


def test_a_task_with_other_operators(finished, tmp_path, monkeypatch, capsys):
    """The default prompt is a problem of this task; no more problems are asked for than it has."""
    two = {sign: toy.OPERATORS[sign] for sign in "+-"}
    monkeypatch.setattr(toy, "OPERATORS", two)
    monkeypatch.setattr(toy, "check_same_task", lambda content: None)
    assert run("sample", finished) == 0
    [problem] = toy.evaluation_problems(toy.rng_for(0, "text"), 3, 1)
    assert f"responses of layer 2 (final) to {problem}=\n" in capsys.readouterr().out
    assert run("live", finished, "--out", tmp_path) == 0
    every = toy.supply(3)
    assert every < 512 and f'"more":{{"problems":{every},' in (tmp_path / "live.html").read_text()
    run_dir = subject(finished)
    monkeypatch.delattr(toy, "OPERATORS")
    with pytest.raises(ValueError, match="for a task with OPERATORS"):
        analyze.live(run_dir)


def test_a_run_that_was_stopped_early(copied, capsys, unrendered):
    (copied / "ckpt.pt").unlink()
    assert run("all", copied) == 2 and "ckpt.pt" in capsys.readouterr().err
    assert (copied / "figures" / "entropy_flow.png").exists()


BAD_INPUT = """all nowhere: there is no directory nowhere here
step RUN 7+5= --responses 1 2 --rewards 1 0 --layer 4: layer must be in
sample RUN 7+5= --layer 4: layer must be in 1..3, not 4
entropy RUN/..: config.json
entropy RUN/base.pt: is a file; a run or a language model is named by its directory, RUN
lens RUN/config.json 7+5=: is a file; a run or a language model is named by its directory, RUN
entropy RUN --out RUN/config.json: --out RUN/config.json is not a directory
entropy RUN --device abacus: device must be auto, cpu, cuda or mps, not abacus
writes RUN --checkpoint phase1: RUN/phase1.pt is missing; the checkpoints of this run are: base, final
entropy RUN 7+x: character 'x'
writes RUN LONG: context
all EMPTY: the name of the run is empty
lens RUN EMPTY: the prompt is empty
entropy RUN --prompt EMPTY --text 2: the prompt is empty
sample RUN EMPTY: the prompt is empty
lens RUN 7+5= --text EMPTY: the response is empty
step RUN EMPTY --responses 1 2 --rewards 1 0: the prompt is empty
step RUN 7+5= --responses 1 EMPTY --rewards 1 0: the response is empty
entropy RUN --text 7: there is no response
step RUN 7+5=: this is a prompt, 0 responses and 0 rewards
step RUN --responses 1 2 --rewards 1 0: this is no prompt, 2 responses and 2 rewards
step RUN 7+5= --responses 1 2 --rewards 1: this is a prompt, 2 responses and 1 rewards
step RUN 7+5= --responses 1 --rewards 1: this is a prompt, 1 responses and 1 rewards
step RUN 7+5= --responses 1 2 --rewards 1 1: all rewards are equal"""


@pytest.mark.parametrize("line", BAD_INPUT.splitlines())
def test_bad_input_is_one_sentence(copied, capsys, line):
    (copied / "phase1.pt").unlink()
    command, says = line.replace("RUN", str(copied)).split(": ", 1)
    words = {"EMPTY": "", "LONG": "7+5" * 90}
    assert run(*(words.get(word, word) for word in command.split())) == 2
    error = capsys.readouterr().err
    assert says in error and error.startswith("analyze.py: ") and error.count("\n") == 1
    assert not (copied / "figures").exists()


BAD_NUMBERS = """sample --layer four: a layer is a whole number from 1 to L, not 'four'
step --layer 0: a layer is a whole number from 1 to L, not '0'
sample --layer -1: a layer is a whole number from 1 to L, not '-1'
step --layer 2.0: a layer is a whole number from 1 to L, not '2.0'
step 7+5= --responses 1 2 --rewards 1 good: a reward is a finite number, not 'good'
step 7+5= --responses 1 2 --rewards 1 -inf: a reward is a finite number, not '-inf'
lens 7+5= --prompt 7+5=: PROMPT is given twice
lens 7+5= 3+4=: unrecognized arguments: 3+4=
lens 7+5= --text --letters: --text="--value"
step 7+5= --responses 1 --letters: --text="--value\""""


@pytest.mark.parametrize("line", BAD_NUMBERS.splitlines())
def test_values_that_an_option_does_not_take(finished, capsys, line):
    command, says = line.split(": ", 1)
    name, *options = command.split()
    with pytest.raises(SystemExit, match="2"):
        run(name, finished, *options)
    assert capsys.readouterr().err.splitlines()[-1].endswith(says)


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["--rewards", "1", "-1e-3"], {"rewards": [1.0, -1e-3]}),
        (["--rewards", "-.5", "-2", "+3"], {"rewards": [-0.5, -2.0, 3.0]}),
        (["--responses", "-7<eos>", "-"], {"responses": ["-7<eos>", "-"]}),
        (["--responses", "-help is here", "--7"], {"responses": ["-help is here", "--7"]}),
        (["--responses=-1", "--responses", "-2"], {"responses": ["-1", "-2"]}),
        (["--responses=--letters", "--responses=b"], {"responses": ["--letters", "b"]}),
        (["-7+5=", "--layer", "3"], {"prompt": "-7+5=", "layer": 3}),
        (["--layer", "3", "7+5="], {"prompt": "7+5=", "layer": 3}),
        (["--prompt", "-7+5="], {"prompt": "-7+5="}),
    ],
)
def test_texts_and_numbers_that_begin_with_a_minus_sign(argv, expected):
    options = analyze.parse_arguments(["step", "RUN", *argv])
    assert options["source"] == "RUN"
    assert {name: options[name] for name in expected} == expected


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


# ---- surroundings: signals, full disks, closed streams ----


def test_ctrl_c_is_one_line(copied, monkeypatch, capsys):
    """A real SIGINT in the middle of writing the second file."""
    write_bytes = Path.write_bytes

    def interrupted(path, data):
        write_bytes(path, data[:10])
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    # in the background of a shell, SIGINT would be ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert run("entropy", copied) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "\nanalyze.py: stopped\n"
    assert os.listdir(copied / "figures") == ["entropy.json"]


@pytest.mark.parametrize("method", ["write_bytes", "write_text"])  # a figure, a text
def test_a_full_disk_is_one_sentence(copied, monkeypatch, capsys, method):
    write = getattr(Path, method)

    def full(path, data, **options):
        write(path, data[:10], **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, method, full)
    assert run("entropy", copied) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error and error.count("\n") == 1
    written = os.listdir(copied / "figures")
    assert written == (["entropy.json"] if method == "write_bytes" else [])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_output_that_is_full(copied, monkeypatch, capsys):
    """The error comes when the buffer is flushed. Closing the stream does not raise it again."""
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert run("step", copied) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error and error.count("\n") == 1


def test_without_stdout_and_stderr(copied, monkeypatch):
    for name in "stdout", "stderr":
        monkeypatch.setattr(sys, name, None)
    assert run("step", copied) == 0
    assert (copied / "figures" / "step.txt").exists()
    assert run("entropy", copied, "7+x") == 2
