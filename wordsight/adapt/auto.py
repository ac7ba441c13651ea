"""`--method auto`: try the methods on validation pictures within a time budget, keep the best, and say why and at what cost.

Zero-shot and the linear probe are always tried, so that what is kept is at least as good as both on the validation pictures. The
others come from the quick to the slow. One that has begun when the time is over is stopped. Test pictures are not looked at.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from types import FrameType
from typing import Any

from wordsight.adapt.costs import Cost, Meter
from wordsight.adapt.learn import Learned, Validation, learn
from wordsight.adapt.pictures import Features
from wordsight.adapt.protocol import Trial

# decoder, projection, fine_tune and lift are not among them: they are for many labels, and take their time
ALWAYS = ("zero_shot", "linear_probe")
ORDER = (
    *ALWAYS,
    "tip_adapter",
    "tip_adapter_f",
    "clip_adapter",
    "clap",
    "lp_plus_plus",
    "cross_modal_probe",
    "coop",
    "cocoop",
)
DEFAULT_BUDGET_S = 600.0


class OutOfTimeError(Exception):
    """The time budget is over."""


@dataclass(frozen=True, kw_only=True)
class Tried:
    """What became of a method.

    Attributes:
        method: its name.
        outcome: "kept", "tried", "stopped" (the time was over), "not begun" (it was over before) or "impossible".
        validation: of a method that was fitted to its end.
        cost: of it, or until it was stopped; None where it was not begun.
        why: in words.
    """

    method: str
    outcome: str
    validation: Validation | None = None
    cost: Cost | None = None
    why: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def choose(
    model: Any,
    trial: Trial,
    features: Features,
    budget_s: float,
    parameters: Mapping[str, dict[str, Any]],
    *,
    suits: Callable[[str], bool] = lambda method: True,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Learned, list[Tried]]:
    """Try the methods on a trial's validation pictures.

    Args:
        model: the frozen model.
        trial: with training and validation pictures.
        features: of its pictures.
        budget_s: seconds for all methods together, their features of random views counted.
        parameters: of the methods that shall not have their defaults.
        suits: whether a method can be asked what the protocol asks (names of new classes).
        say: told of each method.

    Returns:
        The one that is kept, and what became of each, in the order of ORDER.

    Raises:
        ValueError: no validation pictures to choose by; or zero-shot or the linear probe fails, and why.
    """
    if trial.train is None or trial.val is None:
        raise ValueError("auto chooses by validation pictures, so it needs 1 shot or more: with 0 shots ask zero_shot")
    began = time.monotonic()
    over = f"the {budget_s:.0f} s that were left for this seed were over"
    best: Learned | None = None
    tried: list[Tried] = []
    for method in ORDER:
        left = budget_s - (time.monotonic() - began)
        if not suits(method):
            one = Tried(method=method, outcome="impossible", why="it can't name new classes, which this protocol asks for")
        elif left <= 0 and method not in ALWAYS:
            one = Tried(method=method, outcome="not begun", why=over)
        else:
            limit = None if method in ALWAYS else left
            learned, one = _try(model, method, parameters.get(method, {}), trial, features, limit, over)
            if learned is not None and (best is None or _better(learned, best)):
                best = learned
        tried.append(one)
        say(_told(one))
    assert best is not None
    return best, [_judged(one, best) for one in tried]


def _try(
    model: Any, method: str, parameters: dict[str, Any], trial: Trial, features: Features, limit_s: float | None, over: str
) -> tuple[Learned | None, Tried]:
    learned, outcome, why = None, "tried", ""
    with Meter(next(model.parameters()).device) as meter:
        try:
            with _at_most(limit_s):
                learned = learn(model, method, parameters, trial, features)
        except OutOfTimeError:
            outcome, why = "stopped", over
        except ValueError as error:
            if method in ALWAYS:
                raise
            outcome, why = "impossible", str(error)
    validation = None if learned is None else learned.validation
    return learned, Tried(method=method, outcome=outcome, validation=validation, cost=meter.cost, why=why)


def _better(one: Learned, other: Learned) -> bool:
    assert one.validation is not None
    assert other.validation is not None
    return one.validation.better_than(other.validation)


def _judged(one: Tried, best: Learned) -> Tried:
    """The same with the reason why it was kept or not."""
    if one.validation is None:
        return one
    assert best.validation is not None
    missed = round((best.validation.accuracy - one.validation.accuracy) * one.validation.count)
    if one.method == best.method:
        return replace(one, outcome="kept", why="best on the validation pictures")
    if missed:
        return replace(one, why=f"{missed} fewer of {one.validation.count} validation pictures right than {best.method}")
    return replace(one, why=f"as many validation pictures right as {best.method}, with a loss that is not lower")


def _told(one: Tried) -> str:
    if one.validation is None or one.cost is None:
        return f"  {one.method}: {one.outcome}, {one.why}"
    right = round(one.validation.accuracy * one.validation.count)
    return f"  {one.method}: {right} of {one.validation.count} validation pictures right, {one.cost.seconds:.1f} s"


@contextmanager
def _at_most(seconds: float | None) -> Iterator[None]:
    """Raise OutOfTimeError in what runs inside once the time is over.

    That takes a timer signal, which only the main thread of a POSIX system gets; elsewhere what has begun runs to its end.
    """
    if seconds is None or not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
