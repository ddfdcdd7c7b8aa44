"""Exercise 10: the interval, whether the variant is one, and whether the report is complete."""

import re
import statistics
from functools import cache
from pathlib import Path

import torch
from checks.common import Case, Confusion, Wrong, call, check_function

import minibupo
import train_toy as toy
from minibupo import Policy

TITLE, MINUTES = "a question of your own", 240
REFUSED = ()
HINTS = (
    "The interval is that of the differences, one a pair. Their unbiased standard deviation over "
    "the root of the number of pairs is the standard error of the mean.",
    "A schedule is a chain of loops: yield from minibupo.bupo(model, optimizer, sample, Policy(3), "
    "3, 3), then the same for steps 4..6 with start=4, and so on.",
    "For a KL term or a distillation write the step yourself, from your exercise 8, and yield "
    "after it.",
    "A prediction has a sign and a size. README's table of differences is a place to start from.",
)
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 8: 2.365}
DIFFERENCES = ([1.0, 3.0, 2.0, -1.0, 0.5], [-4.0, -2.5, -3.0], [2.0] * 4, [0.5, -0.5], [*range(8)])


def around(half):
    """An interval as an outcome: the mean, and half(differences, n, std)."""

    def outcome(differences):
        mean, n = statistics.fmean(differences), len(differences)
        return torch.tensor([mean, half(differences, n, statistics.stdev(differences))])

    return outcome


right = around(lambda d, n, std: T95[n] * std / n**0.5)


def as_tensor(function, differences):
    """The learner's pair (mean, half) as a tensor."""
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
        "This is about where one more pair would fall. The mean of n pairs varies less: divide by "
        "the root of n.",
    ),
    Confusion(
        "1.96",
        around(lambda d, n, std: 1.96 * std / n**0.5),
        "1.96 is for many pairs. With a few the std itself is uncertain: T95.",
    ),
    Confusion(
        "no t",
        around(lambda d, n, std: std / n**0.5),
        "This is one standard error, an interval of 68 % at best.",
    ),
    Confusion(
        "biased",
        around(lambda d, n, std: T95[n] * statistics.pstdev(d) / n**0.5),
        "Your std divides by n. With five pairs that makes the interval a tenth too small: n - 1.",
    ),
    Confusion(
        "divided by n",
        around(lambda d, n, std: T95[n] * std / n),
        "You divide the std by n. The error of a mean falls with the root of n.",
    ),
    Confusion(
        "whole width",
        around(lambda d, n, std: 2 * T95[n] * std / n**0.5),
        "This is the whole width. Half of it is what stands after +-.",
    ),
    Confusion(
        "bounds",
        lambda d: torch.stack([right(d)[0] - right(d)[1], right(d)[0] + right(d)[1]]),
        "These are the bounds, mean - half and mean + half. (mean, half) is wanted.",
    ),
)


def trained(algorithm, answer=None):
    """All weights of course/base.pt after 20 small steps of an algorithm, and for which steps it
    sampled."""
    s = toy.Settings(n=3, questions=4, group=4)
    model, asked = toy.load_model(Path(__file__).parent.parent / "base.pt"), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)

    def sample(step):
        asked.append(step)
        return toy.rollouts(s, model, step)

    def run():
        steps = algorithm(model, optimizer, sample, 20)
        if not hasattr(steps, "__next__"):
            raise Wrong("no generator", "variant has no yield: it must yield after each step")
        return sum(1 for _ in steps)

    yields = answer.guarded("20 small steps", 300, run) if answer else run()
    return torch.cat([p.detach().flatten() for p in model.parameters()]), asked, yields


def control(model, optimizer, sample, steps):
    return minibupo.bupo(model, optimizer, sample, Policy(4), 0, steps)


@cache
def control_weights():
    return trained(control)[0]


def check_variant(answer):
    """Raise Wrong for a variant that is none: it does not train, or as the control does."""
    function = answer.function("variant")
    weights, asked, yields = trained(function, answer)
    if asked != list(range(1, 21)) or yields != 20:
        says = f"for 20 steps variant sampled for steps {asked} and yielded {yields} times"
        raise Wrong("steps", f"{says}; each of steps 1..20 is to do either once")
    if not weights.isfinite().all():
        raise Wrong("not finite", "after 20 steps some weights are no numbers any more")
    if torch.allclose(weights, control_weights(), rtol=0, atol=1e-4):
        says = "variant trains to the very weights of the control: it is GRPO under another name"
        raise Wrong("no variant", says)
    if torch.equal(weights, start()):
        raise Wrong("no training", "variant leaves all weights as they were")


@cache
def start():
    return trained(lambda *args: iter(()))[0]


SECTIONS = ("Question", "Prediction", "What was run", "Result", "What it means")


def check_report(text: str):
    """Raise Wrong for a report that is not complete, or has no prediction before its result."""
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    parts = re.split(r"^## (.*)$", text, flags=re.MULTILINE)[1:]
    names, texts = [name.strip() for name in parts[::2]], parts[1::2]
    found = dict(zip(names, texts))
    for name in SECTIONS:
        if not found.get(name, "").strip():
            raise Wrong("empty section", f"your report has nothing under ## {name}")
    if [name for name in names if name in SECTIONS] != list(SECTIONS):
        raise Wrong("order", "a prediction stands before the result: keep the template's order")
    if not re.search(r"\d", found["Prediction"]):
        says = "Your prediction has no number. 'It helps' cannot be wrong: by how many points?"
        raise Wrong("vague prediction", says)
    if not re.search(r"(\+-|±)\s*\d", found["Result"]):
        says = "Your result has no interval, mean +- half. Without it nobody can tell it from luck."
        raise Wrong("no interval", says)


def check(answer, quick=False):
    cases = [Case(f"differences {values}", (list(values),)) for values in DIFFERENCES]
    check_function(answer, "interval", cases, right, CONFUSIONS, as_tensor)
    check_variant(answer)
    report = answer.path.parent / "report.md"
    if not report.exists():
        says = f"Interval and variant are fine. Now copy course/report_template.md to {report.name}"
        raise Wrong("no report", f"{says} beside {answer.path.name}, and fill it in.")
    check_report(report.read_text(encoding="utf-8"))
    return "Interval, variant and report are complete. Whether they convince, a reader must say."
