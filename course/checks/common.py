"""What all checks share: run a learner's function safely, and find out what it confuses with what.

The check of an exercise has a list of cases, an independent computation of the correct outcome, and
a list of confusions. A confusion is a typical incorrect answer as code, with the sentence that a
learner is told. An answer that differs from the correct one is compared with each confusion.
"""

import _thread
import copy
import importlib.util
import inspect
import linecache
import numbers
import signal
import threading
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import minibupo
import model
import train_toy


class Wrong(Exception):
    """What is wrong with an answer, in the learner's terms. `name` identifies the kind of fault."""

    def __init__(self, name: str, says: str):
        super().__init__(says)
        self.name = name


class Case(NamedTuple):
    """One input: its description for the learner, and the arguments."""

    words: str
    args: tuple


class Confusion(NamedTuple):
    """A typical incorrect answer: `outcome` computes what it gives for the arguments of a case."""

    name: str
    outcome: Callable
    says: str


def call(function, *args):
    """Return function(*args). Raise Wrong if the function does not take these arguments."""
    try:
        inspect.signature(function).bind(*args)
    except TypeError as e:
        raise Wrong("arguments", f"the arguments are not those of the stub: {e}") from None
    return function(*args)


def check_function(
    answer,
    name,
    cases,
    right,
    confusions=(),
    observe=call,
    *,
    seconds=20,
    what="",
    compare=None,
    **tolerance,
):
    """Raise Wrong if function `name` of an answer differs from right(*args) on one of the cases.

    An outcome is a tensor, a number, or the class of an expected error. observe(function, *args)
    turns a call into an outcome if the result itself is not what is compared; then `what` says in
    words what is ("the gradient of "). compare(outcome, wanted) describes a difference that numbers
    do not show. `tolerance`: rtol and atol.
    """
    function = answer.function(name)
    expected = [right(*case.args) for case in cases]
    outcomes = []
    for case, wanted in zip(cases, expected):
        try:
            outcomes.append(one_outcome(answer, function, observe, case, wanted, seconds))
        except Wrong as wrong:
            if all(same(*both, **tolerance) for both in zip(outcomes, expected)):
                if outcomes and wrong.name == "not written":
                    says = f"{name} returns None for {case.words}"
                    raise Wrong("returns None", says) from None
                raise
            outcomes.append(None)  # an earlier case fails, and the learner is told about that one
    failing = [i for i in range(len(cases)) if not same(outcomes[i], expected[i], **tolerance)]
    if not failing:
        return
    found = diagnose(cases, outcomes, failing, confusions, **tolerance)
    case, outcome, wanted = (x[failing[0]] for x in (cases, outcomes, expected))
    differ = compare(outcome, wanted) if compare else difference(outcome, wanted, **tolerance)
    shown = f"{what}{name} for {case.words}\n  {differ}"
    if found:
        raise Wrong(found.name, f"{shown}\n{found.says}")
    check_form(f"{what}{name} for {case.words}", outcome, wanted)
    raise Wrong("value", shown)


def one_outcome(answer, function, observe, case, wanted, seconds):
    """Return the outcome of the learner's function for one case.

    Raise Wrong if it returns None or changes a tensor that it is given."""
    args = copy.deepcopy(case.args)
    expects_error = isinstance(wanted, type)
    outcome = answer.guarded(case.words, seconds, observe, function, *args, error=expects_error)
    if outcome is None and not expects_error:
        raise Wrong("not written", "not written yet: it returns None")
    for before, after in zip(case.args, args):
        if isinstance(before, torch.Tensor) and not same(before, after):
            raise Wrong("changes input", "your function changes the tensor that it is given")
    return outcome.detach() if isinstance(outcome, torch.Tensor) else plain_number(outcome)


def plain_number(x):
    """Return a number of NumPy as Python's own number, and everything else as it is."""
    return x.item() if isinstance(x, (np.generic, np.ndarray)) and x.ndim == 0 else x


def diagnose(cases, outcomes, failing, confusions, **tolerance) -> Confusion | None:
    """Return the confusion that gives what the answer gives, or None.

    They have to agree on all cases that pass and on the first case that fails. On up to half of the
    failing cases they may differ, because an answer may have a second mistake. If several
    confusions fit, the one that agrees on most cases is returned."""

    def agreement(confusion):
        wrong = [confusion.outcome(*case.args) for case in cases]
        hits = [same(*both, **tolerance) for both in zip(outcomes, wrong)]
        passing = all(hit for i, hit in enumerate(hits) if i not in failing)
        explained = sum(hits[i] for i in failing)
        fits = passing and hits[failing[0]] and 2 * explained >= len(failing)
        return sum(hits) if fits else 0

    best = max(confusions, key=agreement, default=None)
    return best if best and agreement(best) else None


def same(a, b, rtol=1e-4, atol=1e-5) -> bool:
    """Whether outcome a agrees with outcome b in form and value; NaN agrees with NaN.

    An error agrees with the class that b names, or with a subclass of it."""
    if isinstance(a, type) and isinstance(b, type):
        return issubclass(a, b)
    if isinstance(a, type) or isinstance(b, type) or a is None or b is None:
        return a is b
    if isinstance(b, torch.Tensor) and not isinstance(a, torch.Tensor):
        return False
    if kind(a) != kind(b):
        return False
    a, b = (torch.as_tensor(x).detach().to(torch.float64) for x in (a, b))
    return a.shape == b.shape and torch.allclose(a, b, rtol, atol, equal_nan=True)


def kind(x) -> str:
    """Return what an outcome consists of: bools, integers, floats, or the name of its type."""
    if isinstance(x, torch.Tensor):
        whole = "bools" if x.dtype == torch.bool else "integers"
        return "floats" if x.is_floating_point() else whole
    if isinstance(x, bool):
        return "bools"
    if isinstance(x, numbers.Integral):
        return "integers"
    return "floats" if isinstance(x, numbers.Real) else type(x).__name__


def check_form(name, outcome, wanted):
    """Raise Wrong if an outcome has another type, shape or dtype than the correct one."""
    if isinstance(wanted, type):
        does = f"gives {show(outcome)}"
        if isinstance(outcome, type):
            does = f"raises {outcome.__name__}"
        raise Wrong("no error", f"{name} {does}, but it should raise {wanted.__name__}")
    is_tensor = isinstance(outcome, torch.Tensor)
    if isinstance(wanted, torch.Tensor):
        if not is_tensor:
            shape = f"a tensor of shape {tuple(wanted.shape)}"
            raise Wrong("type", f"{name} returns {type(outcome).__name__}, but {shape} is wanted")
        if outcome.shape != wanted.shape:
            shapes = f"shape {tuple(outcome.shape)}, but {tuple(wanted.shape)} is wanted"
            raise Wrong("shape", f"{name} returns {shapes}")
    elif not is_tensor and not isinstance(outcome, numbers.Real):
        raise Wrong("type", f"{name} returns {type(outcome).__name__}, but a number is wanted")
    if kind(outcome) != kind(wanted):
        what = f"dtype {outcome.dtype}" if is_tensor else f"{type(outcome).__name__}"
        raise Wrong("dtype", f"{name} returns {what}, but {kind(wanted)} are wanted")


def difference(outcome, wanted, rtol=1e-4, atol=1e-5) -> str:
    """Return in words how an outcome differs; of large tensors, only the entries that differ."""
    tensors = isinstance(outcome, torch.Tensor) and isinstance(wanted, torch.Tensor)
    if not tensors or outcome.shape != wanted.shape or wanted.numel() <= 24:
        return f"gives  {show(outcome)}\n  not    {show(wanted)}"
    close = torch.isclose(outcome.double(), wanted.double(), rtol, atol, equal_nan=True)
    places = (~close).nonzero().tolist()
    lines = [f"differs in {len(places)} of {wanted.numel()} entries, among them"]
    for place in places[:5]:
        mine = outcome[tuple(place)].item()
        correct = wanted[tuple(place)].item()
        lines.append(f"  at {place}: {show(mine)}, not {show(correct)}")
    return "\n  ".join(lines)


def show(x) -> str:
    """Return an outcome as text for a learner: few digits, not too long."""
    if isinstance(x, type):
        return f"an error, {x.__name__}"
    if isinstance(x, torch.Tensor):
        if x.dtype == torch.bool and x.dim() == 1:
            return " ".join("yes" if value else "no" for value in x.tolist())
        if x.numel() > 24:
            first = ", ".join(f"{value:.5g}" for value in x.flatten()[:6].tolist())
            return f"{first}, ... (shape {tuple(x.shape)})"
        return str(rounded(x.tolist()))
    return f"{x:.5g}" if isinstance(x, float) else repr(x)[:200]


def rounded(x):
    """Return nested lists of numbers, rounded to five digits."""
    if isinstance(x, list):
        return [rounded(part) for part in x]
    return float(f"{x:.5g}") if isinstance(x, float) else x


# ---- a learner's file --------------------------------------------------------------------------


class Answer:
    """The file with a learner's answer. Raises Wrong if the file cannot be run.

    `refused`: pairs (owner, name) of the library's own functions that this exercise is about. They
    raise Wrong while the answer runs."""

    def __init__(self, path: Path, refused=()):
        self.path = Path(path).resolve()
        self.refused = refused
        if not self.path.exists():
            raise Wrong("no file", f"there is no {self.path}")
        spec = importlib.util.spec_from_file_location(f"answer_{self.path.stem}", self.path)
        linecache.checkcache(str(self.path))  # the file may have changed
        self.module = importlib.util.module_from_spec(spec)
        self.guarded("being loaded", 60, spec.loader.exec_module, self.module)

    def function(self, name: str):
        """Return a function of the file. Raise Wrong if it has none that Python can inspect."""
        function = getattr(self.module, name, None)
        try:
            inspect.signature(function)
        except (TypeError, ValueError):
            raise Wrong("no function", f"{self.path.name} has no function {name}") from None
        return function

    def guarded(self, doing: str, seconds: float, do, *args, error=False) -> Any:
        """Return do(*args), which runs the learner's code, with a time limit.

        An exception in the learner's code becomes a Wrong that quotes the learner's line; with
        error=True the class of the exception is returned instead."""
        try:
            with refusing(self.refused), time_limit(seconds):
                outcome = do(*args)
        except Wrong:
            raise
        except SyntaxError as e:
            raise Wrong("syntax", f"line {e.lineno} is not valid Python: {e.msg}") from None
        except NotImplementedError:
            raise Wrong("not written", "not written yet") from None
        except TooLong as e:
            at = self.line_of(e)
            raise Wrong("time", f"still running after {seconds} s ({doing}){at}") from None
        except (Exception, SystemExit) as e:
            at = self.line_of(e)
            if not at:
                raise  # a bug of the check, not of the learner
            if error:
                return type(e)
            says = f"{type(e).__name__}: {e}" if str(e) else type(e).__name__
            raise Wrong("exception", f"it stops ({doing}) with {says}{at}") from None
        return outcome

    def line_of(self, error) -> str:
        """Return the last of the learner's lines in a traceback, or "" if it has none."""
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame for frame in frames if Path(frame.filename) == self.path]
        return f"\n  line {lines[-1].lineno}: {lines[-1].line}" if lines else ""


class TooLong(Exception):
    """A learner's function that does not end in time."""


@contextmanager
def time_limit(seconds: float):
    """Raise TooLong in the main thread after so many seconds, at the line that runs then.

    A thread asks for the interrupt that Ctrl-C would cause, because that works on every system. A
    shell's background jobs ignore that interrupt, so Python's own handler is set meanwhile."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    expired = threading.Event()

    def interrupt():
        expired.set()
        _thread.interrupt_main()

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    except KeyboardInterrupt as e:
        if not expired.is_set():
            raise
        raise TooLong().with_traceback(e.__traceback__) from None
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, before)


@contextmanager
def refusing(functions):
    """Make the library's own functions, pairs (owner, name), raise Wrong while this runs."""
    saved = []
    for owner, name in functions:
        original = getattr(owner, name)
        where = f"{owner.__name__}.{name}"

        def refuse(*args, where=where, **options):
            says = f"{where} is what you are asked to write: do it yourself, then compare with it"
            raise Wrong("library", says)

        for place in (owner, minibupo, train_toy, model):
            if vars(place).get(name) is original:
                saved.append((place, name, original))
                setattr(place, name, refuse)
    try:
        yield
    finally:
        for place, name, original in saved:
            setattr(place, name, original)
