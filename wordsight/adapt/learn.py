"""One method, one seed: its settings from what a user typed, its fit on features, its worth on validation pictures."""

from __future__ import annotations

import difflib
import inspect
import typing
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from wordsight.adapt import METHODS, method_class
from wordsight.adapt.costs import Cost, Meter
from wordsight.adapt.pictures import Features
from wordsight.adapt.protocol import Trial
from wordsight.data.few_shot import LabelledSet
from wordsight.train.recipe import parse_value

NOT_SET = ("self", "model", "classes", "seed", "progress")  # what the run gives each method itself


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What a classifier is worth on pictures that it was not fitted to.

    Attributes:
        accuracy: the share that it names rightly.
        loss: mean cross-entropy in nats; decides between equal accuracies.
        count: pictures.
    """

    accuracy: float
    loss: float
    count: int

    def better_than(self, other: Validation) -> bool:
        """Whether it is more accurate, or as accurate and surer of what is right."""
        return (self.accuracy, -self.loss) > (other.accuracy, -other.loss)


@dataclass(frozen=True, kw_only=True)
class Learned:
    """A fitted classifier.

    Attributes:
        method: its name.
        classifier: the estimator.
        validation: None where there was nothing to validate on (zero-shot without pictures).
        cost: of its fit, without the features of the fixed view, which all methods share.
    """

    method: str
    classifier: Any
    validation: Validation | None
    cost: Cost


def read_settings(method: str, settings: Iterable[str]) -> dict[str, Any]:
    """The parameters of a method from `key=value` texts, each of its parameter's type.

    Raises:
        ValueError: no such method or parameter (with the nearest), one that the run sets itself, one twice, or a value that does
            not fit.
    """
    constructor = method_class(method).__init__
    known = [name for name in inspect.signature(constructor).parameters if name not in NOT_SET]
    hints = typing.get_type_hints(constructor)
    found: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        key = key.strip()
        if not equals:
            raise ValueError(f"--set {setting}: write KEY=VALUE")
        if key in ("seed", "classes", "model"):
            option = {"seed": "--seeds", "classes": "--classes", "model": "--model"}[key]
            raise ValueError(f"--set {setting}: the run sets {key} itself; give {option}")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=2, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(known)}"
            raise ValueError(f"{method} has no parameter {key!r}; {hint}")
        if key in found:
            raise ValueError(f"--set {key} is given twice")
        found[key] = parse_value(text, hints.get(key, str), key)
    return found


def split_settings(settings: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The parameters of several methods from `method.key=value` texts, as `--method auto` takes them."""
    by_method: dict[str, list[str]] = {}
    for setting in settings:
        method, dot, rest = setting.partition(".")
        if not dot or method not in METHODS:
            raise ValueError(f"--set {setting}: with --method auto write METHOD.KEY=VALUE, with one of {', '.join(METHODS)}")
        by_method.setdefault(method, []).append(rest)
    return {method: read_settings(method, own) for method, own in by_method.items()}


def make(
    model: Any, method: str, parameters: dict[str, Any], classes: Sequence[str], seed: int, *, progress: bool = False
) -> Any:
    """The estimator, not fitted."""
    cls = method_class(method)
    more = {"progress": True} if progress and "progress" in inspect.signature(cls.__init__).parameters else {}
    return cls(model, classes=list(classes), seed=seed, **parameters, **more)


def learn(
    model: Any, method: str, parameters: dict[str, Any], trial: Trial, features: Features, *, progress: bool = False
) -> Learned:
    """Fit a method to a trial's training pictures, and measure it on the validation pictures.

    Raises:
        ValueError: what the method's `fit` raises, or there is nothing to learn from for a method that has to.
    """
    classifier = make(model, method, parameters, trial.classes, trial.seed, progress=progress)
    device = next(model.parameters()).device
    shares_tokens = getattr(classifier, "cache", "") is None
    if shares_tokens:
        classifier.set_params(cache=features.token_folder)
    with Meter(device) as meter, warnings.catch_warnings():
        # few shots of many classes look like numbers to scikit-learn; they are names
        warnings.filterwarnings("ignore", message="The number of unique classes is greater than 50%")
        if trial.train is None:
            if method != "zero_shot":
                raise ValueError(f"{method} learns from pictures: with 0 shots only zero_shot can be asked")
            classifier.fit(None, None)
            validation = None
        else:
            layer, num_views = classifier.layer, getattr(classifier, "num_views", 0) or 0
            pictures = features.views(trial.train, layer, num_views, trial.seed)
            held_out = None
            if trial.val is not None:
                held_out = features.plain(trial.val, layer), list(trial.val.labels)
            weights = weight_arguments(method, trial.train)
            classifier.fit(pictures, list(trial.train.labels), validation=held_out, **weights)
            validation = None if held_out is None else validate(classifier, *held_out)
    if shares_tokens:
        classifier.set_params(cache=None)  # neither where tokens lay nor a bar is a setting of what was learned
    if getattr(classifier, "progress", False):
        classifier.set_params(progress=False)
    return Learned(method=method, classifier=classifier, validation=validation, cost=meter.cost)


def weighs(method: str) -> bool:
    """Whether a method can weigh the pictures that it learns from."""
    return "sample_weight" in inspect.signature(method_class(method).fit).parameters


def weight_arguments(method: str, pictures: LabelledSet) -> dict[str, Any]:
    """The weights of pictures as a method's `fit` takes them; {} where all count alike, or nothing is learned from them.

    Raises:
        ValueError: the method can't weigh pictures, with those that can.
    """
    if pictures.weights is None or method == "zero_shot":
        return {}
    if not weighs(method):
        able = ", ".join(name for name in METHODS if weighs(name))
        raise ValueError(
            f"{method} can't weigh pictures, and these have weights: choose one of {able}, or leave the weights away"
        )
    return {"sample_weight": list(pictures.weights)}


def validate(classifier: Any, features: Any, labels: Sequence[str]) -> Validation:
    """Accuracy and cross-entropy of a fitted classifier."""
    place = {name: i for i, name in enumerate(classifier.classes_.tolist())}
    targets = torch.tensor([place[label] for label in labels])
    logits_NC = classifier.logits(features).double()
    loss = float(torch.nn.functional.cross_entropy(logits_NC, targets))
    return Validation(accuracy=float((logits_NC.argmax(1) == targets).double().mean()), loss=loss, count=len(targets))
