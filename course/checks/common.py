"""What all checks share: run a learner's function safely, and find out what was confused with what.

A check of an exercise is a list of cases, an independent computation of the right outcome, and a
list of confusions: typical wrong answers as code, each with the sentence that a learner is told.
An answer that differs from the right one is compared with each of them.
"""

import _thread
import copy
import importlib.util
import inspect
import linecache
import signal
import threading
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

import minibupo
import model
import train_toy


class Wrong(Exception):
    """What is wrong with an answer, in the learner's terms. `name` tells kinds of it apart."""

    def __init__(self, name: str, says: str):
        super().__init__(says)
        self.name = name


class Case(NamedTuple):
    """One input: what the learner is told of it, and the arguments."""

    words: str
    args: tuple


class Confusion(NamedTuple):
    """A typical wrong answer: `outcome` computes what it gives for the arguments of a case."""

    name: str
    outcome: Callable
    says: str


def call(function, *args):
    """function(*args). Raises Wrong for a function that does not take so many arguments."""
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
    compare=None,
    **tolerance,
):
    """Compare function `name` of an answer with right(*args) on all cases, or raise Wrong.

    An outcome is a tensor, a number, or the class of an error that is expected. observe(function,
    *args) turns a call into an outcome where the result itself is not the point; compare(outcome,
    wanted) words a difference that numbers do not show. `tolerance`: rtol, atol."""
    function = answer.function(name)
    expected = [right(*case.args) for case in cases]
    outcomes = []
    for case, wanted in zip(cases, expected):
        try:
            outcomes.append(one_outcome(answer, function, observe, case, wanted, seconds))
        except Wrong:
            if all(same(*both, **tolerance) for both in zip(outcomes, expected)):
                raise
            outcomes.append(None)  # an earlier case fails, so that one is talked about
    failing = [i for i in range(len(cases)) if not same(outcomes[i], expected[i], **tolerance)]
    if not failing:
        return
    found = diagnose(cases, outcomes, failing, confusions, **tolerance)
    case, outcome, wanted = (x[failing[0]] for x in (cases, outcomes, expected))
    differ = (
        compare(outcome, wanted) if compare else f"gives  {show(outcome)}\n  not    {show(wanted)}"
    )
    shown = f"{name} for {case.words}\n  {differ}"
    if found:
        raise Wrong(found.name, f"{shown}\n{found.says}")
    check_form(f"{name} for {case.words}", outcome, wanted)
    raise Wrong("value", shown)


def one_outcome(answer, function, observe, case, wanted, seconds):
    """What the learner's function does with one case; inputs are copied, and must not change."""
    args = copy.deepcopy(case.args)
    expects_error = isinstance(wanted, type)
    outcome = answer.guarded(case.words, seconds, observe, function, *args, error=expects_error)
    if outcome is None and not expects_error:
        raise Wrong("not written", "not written yet: it returns None")
    for before, after in zip(case.args, args):
        if isinstance(before, torch.Tensor) and not same(before, after):
            raise Wrong("changes input", "your function changes the tensor that it is given")
    return outcome.detach() if isinstance(outcome, torch.Tensor) else outcome


def diagnose(cases, outcomes, failing, confusions, **tolerance) -> Confusion | None:
    """The confusion that gives what the answer gives, if there is one.

    On all cases that pass and on the first that fails it has to. Of the others that fail half may
    be different, for an answer may have a second mistake. Of several it is the one that agrees with
    the answer on most cases."""

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
    """Whether two outcomes agree, form and value; NaN agrees with NaN."""
    if isinstance(a, type) or isinstance(b, type) or a is None or b is None:
        return a is b
    if isinstance(b, torch.Tensor) and not isinstance(a, torch.Tensor):
        return False
    if kind(a) != kind(b):
        return False
    a, b = (torch.as_tensor(x).detach().to(torch.float64) for x in (a, b))
    return a.shape == b.shape and torch.allclose(a, b, rtol, atol, equal_nan=True)


def kind(x) -> str:
    """What an outcome consists of: bools, integers, floats, or the name of its type."""
    if isinstance(x, torch.Tensor):
        whole = "bools" if x.dtype == torch.bool else "integers"
        return "floats" if x.is_floating_point() else whole
    names = {bool: "bools", int: "integers", float: "floats"}
    return names.get(type(x), type(x).__name__)


def check_form(name, outcome, wanted):
    """Raise Wrong for another type, shape or dtype than the right outcome has."""
    if isinstance(wanted, type):
        does = (
            f"raises {outcome.__name__}" if isinstance(outcome, type) else f"gives {show(outcome)}"
        )
        raise Wrong("no error", f"{name} {does} where it should raise {wanted.__name__}")
    is_tensor = isinstance(outcome, torch.Tensor)
    if isinstance(wanted, torch.Tensor):
        if not is_tensor:
            shape = f"a tensor of shape {tuple(wanted.shape)}"
            raise Wrong("type", f"{name} returns {type(outcome).__name__} where {shape} is wanted")
        if outcome.shape != wanted.shape:
            shapes = f"shape {tuple(outcome.shape)}, where {tuple(wanted.shape)} is wanted"
            raise Wrong("shape", f"{name} returns {shapes}")
    elif not is_tensor and not isinstance(outcome, (bool, int, float)):
        raise Wrong("type", f"{name} returns {type(outcome).__name__} where a number is wanted")
    if kind(outcome) != kind(wanted):
        what = f"dtype {outcome.dtype}" if is_tensor else f"{type(outcome).__name__}"
        raise Wrong("dtype", f"{name} returns {what}, where {kind(wanted)} are wanted")


def show(x) -> str:
    """An outcome for a learner to read: few digits, not too long."""
    if isinstance(x, type):
        return f"an error, {x.__name__}"
    if isinstance(x, torch.Tensor):
        if x.dtype == torch.bool and x.dim() == 1:
            return " ".join("yes" if value else "no" for value in x.tolist())
        if x.numel() > 24:
            first = ", ".join(f"{value:.4g}" for value in x.flatten()[:6].tolist())
            return f"{first}, ... (shape {tuple(x.shape)})"
        return str(rounded(x.tolist()))
    return f"{x:.5g}" if isinstance(x, float) else repr(x)[:200]


def rounded(x):
    """Nested lists of numbers, to four digits."""
    if isinstance(x, list):
        return [rounded(part) for part in x]
    return float(f"{x:.4g}") if isinstance(x, float) else x


# ---- a learner's file --------------------------------------------------------------------------


class Answer:
    """The file with a learner's answer. Raises Wrong if it cannot be run.

    `refused`: (owner, name) of the library's own functions that this exercise is about. They raise
    Wrong while the answer runs."""

    def __init__(self, path: Path, refused=()):
        self.path, self.refused = Path(path).resolve(), refused
        if not self.path.exists():
            raise Wrong("no file", f"there is no {self.path}")
        spec = importlib.util.spec_from_file_location(f"answer_{self.path.stem}", self.path)
        linecache.checkcache(str(self.path))  # the file may have changed
        self.module = importlib.util.module_from_spec(spec)
        self.guarded("being loaded", 60, spec.loader.exec_module, self.module)

    def function(self, name: str):
        """A function of the file. Raises Wrong if there is none, or one that is not Python's."""
        function = getattr(self.module, name, None)
        try:
            inspect.signature(function)
        except (TypeError, ValueError):
            raise Wrong("no function", f"{self.path.name} has no function {name}") from None
        return function

    def guarded(self, doing: str, seconds: float, do, *args, error=False) -> Any:
        """do(*args), which runs the learner's code. What goes wrong in it becomes Wrong, with the
        learner's line. With error=True an exception of theirs is the outcome: its class."""
        try:
            with refusing(self.refused), time_limit(seconds):
                outcome = do(*args)
        except Wrong:
            raise
        except SyntaxError as e:
            raise Wrong("syntax", f"line {e.lineno} is no Python: {e.msg}") from None
        except NotImplementedError:
            raise Wrong("not written", "not written yet") from None
        except TooLong as e:
            at = self.line_of(e)
            raise Wrong("time", f"still running after {seconds} s ({doing}){at}") from None
        except (Exception, SystemExit) as e:
            at = self.line_of(e)
            if not at:
                raise  # it is not the learner's
            if error:
                return type(e)
            says = f"{type(e).__name__}: {e}" if str(e) else type(e).__name__
            raise Wrong("exception", f"it stops ({doing}) with {says}{at}") from None
        return outcome

    def line_of(self, error) -> str:
        """The last line of the learner's that a traceback goes through."""
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame for frame in frames if Path(frame.filename) == self.path]
        return f"\n  line {lines[-1].lineno}: {lines[-1].line}" if lines else ""


class TooLong(Exception):
    """A learner's function that does not end in time."""


@contextmanager
def time_limit(seconds: float):
    """Raise TooLong in the main thread after so many seconds, at the line that runs then.

    A thread asks for the interrupt that Ctrl-C would cause: that works on every system. But what
    a shell starts in the background ignores it, so Python's own handler is set for the time."""
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
    """While this runs, the library's own functions (owner, name) raise Wrong."""
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
