"""Exercise 10: the interval, a variant that differs from the control, and a complete report."""

import inspect
import re
import statistics
from functools import cache, partial
from pathlib import Path

import torch
from checks.common import Case, Confusion, Wrong, call, check_function

import train_toy as toy
from minibupo import update

TITLE, MINUTES = "a question of your own", 240
REFUSED = ()
HINTS = (
    "The interval is that of the differences, one per pair. Their unbiased standard deviation "
    "divided by the root of the number of pairs is the standard error of the mean.",
    "A schedule chooses the policy by the step: minibupo.update(model, optimizer, rollouts, "
    "Policy(3)) in the first steps, another policy later.",
    "For a KL term or a distillation, write the step yourself, starting from `improve` of your "
    "exercise 8.",
    "A prediction has a sign and a size. docs/findings.md has costs of phase 1 in points.",
)
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 8: 2.365}
DIFFERENCES = ([1.0, 3.0, 2.0, -1.0, 0.5], [-4.0, -2.5, -3.0], [2.0] * 4, [0.5, -0.5], [*range(8)])


def around(half):
    """Return an outcome: the mean, and half(differences, n, std)."""

    def outcome(differences):
        mean, n = statistics.fmean(differences), len(differences)
        return torch.tensor([mean, half(differences, n, statistics.stdev(differences))])

    return outcome


right = around(lambda d, n, std: T95[n] * std / n**0.5)


def as_tensor(function, differences):
    """Return the learner's pair (mean, half) as a tensor."""
    found = call(function, differences)
    if found is None:
        return None
    try:
        mean, half = found
        return torch.tensor([float(mean), float(half)])
    except (TypeError, ValueError):
        raise Wrong("type", "interval must return two numbers, (mean, half)") from None


CONFUSIONS = (
    Confusion(
        "no root of n",
        around(lambda d, n, std: T95[n] * std),
        "This is the interval for one more pair. The mean of n pairs varies less: divide by the "
        "root of n.",
    ),
    Confusion(
        "1.96",
        around(lambda d, n, std: 1.96 * std / n**0.5),
        "1.96 is correct for many pairs. With a few, the std itself is uncertain: use T95.",
    ),
    Confusion(
        "no t",
        around(lambda d, n, std: std / n**0.5),
        "This is one standard error, an interval of at most 68%.",
    ),
    Confusion(
        "biased",
        around(lambda d, n, std: T95[n] * statistics.pstdev(d) / n**0.5),
        "Your std divides by n, which makes the interval a tenth too small for five pairs. Divide "
        "by n - 1.",
    ),
    Confusion(
        "divided by n",
        around(lambda d, n, std: T95[n] * std / n),
        "You divide the std by n. The standard error of a mean is the std over the root of n.",
    ),
    Confusion(
        "whole width",
        around(lambda d, n, std: 2 * T95[n] * std / n**0.5),
        "This is the whole width of the interval. The number after +- is half of it.",
    ),
    Confusion(
        "bounds",
        lambda d: torch.stack([right(d)[0] - right(d)[1], right(d)[0] + right(d)[1]]),
        "These are the bounds, mean - half and mean + half. (mean, half) is wanted.",
    ),
)


def trained(algorithm):
    """Return all weights of course/base.pt after 20 small steps of an algorithm."""
    s = toy.Settings(n=3, questions=4, group=4)
    model = toy.load_model(Path(__file__).parent.parent / "base.pt")
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    for step in range(1, 21):
        rollouts = toy.rollouts(s, model, step)
        algorithm(model, optimizer, rollouts, step)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@cache
def control_weights():
    return trained(lambda model, optimizer, rollouts, step: update(model, optimizer, rollouts))


@cache
def base_weights():
    return trained(lambda *args: None)


def check_variant(answer):
    """Raise Wrong for a variant that does not train, or that trains exactly as the control does."""
    function = answer.function("variant")
    if inspect.isgeneratorfunction(function):
        says = "your variant has a yield, so a call of it runs nothing; write one plain step"
        raise Wrong("generator", says)
    weights = answer.guarded("20 small steps", 300, trained, partial(call, function))
    if not weights.isfinite().all():
        raise Wrong("not finite", "after 20 steps some weights are NaN or infinite")
    if torch.equal(weights, base_weights()):
        raise Wrong("no training", "variant leaves all weights unchanged")
    if torch.allclose(weights, control_weights(), rtol=0, atol=1e-4):
        says = "variant trains to the same weights as the control: it is GRPO under another name"
        raise Wrong("no variant", says)


SECTIONS = ("Question", "Prediction", "What was run", "Result", "What it means")


def check_report(text: str):
    """Raise Wrong for a report that is incomplete, or has no prediction before its result."""
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    parts = re.split(r"^## (.*)$", text, flags=re.MULTILINE)[1:]
    names, texts = [name.strip() for name in parts[::2]], parts[1::2]
    found = dict(zip(names, texts))
    for name in SECTIONS:
        if not found.get(name, "").strip():
            raise Wrong("empty section", f"your report has nothing under ## {name}")
    if [name for name in names if name in SECTIONS] != list(SECTIONS):
        raise Wrong("order", "the prediction comes before the result: keep the template's order")
    if not re.search(r"\d", found["Prediction"]):
        says = "Your prediction has no number. By how many points? 'It helps' rules out too little."
        raise Wrong("vague prediction", says)
    if not re.search(r"(\+-|±)\s*\d", found["Result"]):
        says = "Your result has no interval, mean +- half. Without it, it may be luck."
        raise Wrong("no interval", says)


def check(answer, quick=False):
    cases = [Case(f"differences {values}", (list(values),)) for values in DIFFERENCES]
    check_function(answer, "interval", cases, right, CONFUSIONS, as_tensor)
    check_variant(answer)
    report = answer.path.parent / "report.md"
    if not report.exists():
        says = f"Interval and variant are correct. Copy course/report_template.md to {report.name}"
        raise Wrong("no report", f"{says} in the folder of {answer.path.name}, and fill it in.")
    check_report(report.read_text(encoding="utf-8"))
    return "Interval, variant and report are complete. A reader has to judge if they convince."
