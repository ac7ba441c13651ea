"""`wordsight adapt`'s run: seeds into a folder, each whole or not at all, the best one kept, figures with intervals; see
`folder` for the files."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from wordsight.adapt import METHODS, auto, method_class
from wordsight.adapt.costs import Cost, Meter, total
from wordsight.adapt.estimator import load_classifier, model_fingerprint
from wordsight.adapt.features import LAYERS
from wordsight.adapt.folder import AdaptFolder
from wordsight.adapt.gallery import write_gallery
from wordsight.adapt.judge import judge, write_insight, write_verdict
from wordsight.adapt.learn import learn, make, weight_arguments
from wordsight.adapt.pictures import Features
from wordsight.adapt.protocol import Shots, Trial, names_new_classes, trials
from wordsight.adapt.records import records, summarise
from wordsight.adapt.zero_shot import ZeroShot
from wordsight.data.few_shot import LabelledSet, Splits, _some
from wordsight.evaluate.results import write_results

FORMAT_VERSION = 1
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to learn, and how it is judged.

    Attributes:
        method: a name of METHODS, or "auto".
        shots: K pictures a class; "all"; 0 for zero-shot.
        seeds: of the draws of shots, and of the methods.
        parameters: of the method; with "auto" of methods by name.
        protocol: one of `protocol.PROTOCOLS`.
        allow_fewer: take what there is of classes with fewer pictures than shots ask for, instead of refusing; notes say so.
        budget_s: with "auto", seconds for all seeds together, without the features that all methods share.
        words: what the user typed for model and data, for settings.json and the report.
    """

    method: str
    shots: Shots = 16
    seeds: tuple[int, ...] = (1, 2, 3)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    protocol: str = "few_shot"
    allow_fewer: bool = False
    budget_s: float | None = None
    words: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method != "auto":
            method_class(self.method)  # names the methods that there are
        if self.shots != "all" and self.shots < 0:
            raise ValueError(f"shots must be 0 or more, or 'all', got {self.shots}")
        if self.shots == 0 and self.method != "zero_shot":
            raise ValueError(f"{self.method} learns from pictures: with 0 shots only zero_shot can be asked")
        if self.budget_s is not None and not 0 < self.budget_s < float("inf"):
            raise ValueError(f"the budget must be seconds above 0, got {self.budget_s}")
        if self.budget_s is not None and self.method != "auto":
            raise ValueError(f"a budget is for method auto, which tries methods within it; {self.method} takes what it takes")


def adapt(
    model: Any,
    splits: Splits,
    run_dir: str | os.PathLike[str],
    request: Request,
    *,
    others: Sequence[Splits] = (),
    progress: bool = False,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Learn a classifier from a few labels for each seed, judge it, keep the best one by validation, write the report.

    A run that was stopped goes on: seeds that are done are not done again, features are kept.

    Args:
        model: a frozen Embedder.
        splits: the data set to learn from.
        run_dir: the folder of the run.
        request: what to do.
        others: other data sets to be judged by, for the protocols cross_dataset and domain.
        progress: whether to show bars.
        say: told in a line what happens.

    Returns:
        summary.json's content.

    Raises:
        ValueError: data that can't be used, another question in the same folder, another process in it, features or losses that
            are not finite.
        OSError: a picture can't be read, or the folder can't be written.
    """
    todo = trials(request.protocol, splits, request.shots, request.seeds, others, allow_fewer=request.allow_fewer)
    if request.shots == 0:
        todo = todo[:1]  # nothing is drawn: all seeds say the same
    ZeroShot(model)._check_model()  # before anything is computed with it
    _check_method(request, todo)
    folder = AdaptFolder(Path(run_dir))
    settings = _settings(request, model, todo)
    with folder.locked(settings):
        summary = folder.summary()
        if summary is not None:
            say(f"{folder.path} is complete: nothing is left to do")
        else:
            folder.describe(next(model.parameters()).device, request.seeds[0])
            summary = _Run(model, request, settings, todo, folder, progress, say).finish()
        from wordsight.adapt.report import write_report

        write_report(folder.path)
    return summary


@dataclass(frozen=True)
class _Run:
    """What is done in a folder that is held."""

    model: Any
    request: Request
    settings: Mapping[str, Any]
    todo: Sequence[Trial]
    folder: AdaptFolder
    progress: bool
    say: Say

    def finish(self) -> dict[str, Any]:
        """Do what is left; summary.json's content, which is written last."""
        features = Features(self.model, _all_sets(self.todo), self.folder.path / "features", progress=self.progress)
        shared = self._compute(features)
        for trial in self.todo:
            if self.folder.result(trial.seed) is None:
                self._do(trial, features)
            else:
                self.say(f"seed {trial.seed} is done already")
        results = [self.folder.result(trial.seed) or {} for trial in self.todo]
        notes = dict.fromkeys(note for trial in self.todo for note in trial.notes)
        summary = summarise(self.settings, results, shared, list(notes))
        kept = summary["kept"]["seed"]
        self.folder.keep(load_classifier(self.folder.seed_dir(kept) / "classifier", self.model))
        write_results(self.folder.path, records(self.settings, results, summary))
        trial = next(one for one in self.todo if one.seed == kept)
        write_gallery(self.folder.path, self.folder.seed_dir(kept), trial.tests)
        self.folder.write("summary.json", summary)
        return summary

    def _compute(self, features: Features) -> dict[str, Any]:
        """The features of the fixed view, which all methods share, and their cost when they were first computed."""
        methods = auto.ORDER if self.request.method == "auto" else (self.request.method,)
        layers = {self._make(method).layer for method in methods}
        with Meter(next(self.model.parameters()).device) as meter:
            for layer in sorted(layers):
                for part in _all_sets(self.todo):
                    features.plain(part, layer)
        if self.folder.shared_cost() is None:
            if layers & set(LAYERS):  # what reads tokens or pictures looks at them when it learns
                self.say(f"features of {len(features):,} pictures: {meter.cost.seconds:.1f} s")
            self.folder.write("features.json", {"count": len(features), **meter.cost.to_json()})
        return self.folder.shared_cost() or {}

    def _make(self, method: str) -> Any:
        """A method's estimator with the parameters that were asked for, not fitted."""
        given = self.request.parameters
        own = given.get(method, {}) if self.request.method == "auto" else given
        return make(self.model, method, dict(own), self.todo[0].classes, self.todo[0].seed)

    def _do(self, trial: Trial, features: Features) -> None:
        """Learn, judge, write: all of a seed's folder."""
        tried: list[auto.Tried] = []
        if self.request.method == "auto":
            self.say(f"seed {trial.seed}:")
            learned, tried = auto.choose(
                self.model, trial, features, self._budget_left(), self.request.parameters, suits=_suits(trial), say=self.say
            )
        else:
            parameters = dict(self.request.parameters)
            learned = learn(self.model, self.request.method, parameters, trial, features, progress=self.progress)
        path = self.folder.begin(trial.seed)
        learned.classifier.save(path / "classifier", with_model=False)
        write_insight(path, learned.classifier)
        found = []
        for test in trial.tests:
            verdict = judge(learned.classifier, test, features.plain(test.pictures, learned.classifier.layer))
            write_verdict(path, verdict)
            found.append(verdict.to_json())
        result = {
            "seed": trial.seed,
            "method": learned.method,
            "validation": None if learned.validation is None else asdict(learned.validation),
            "tests": found,
            "tried": [one.to_json() for one in tried],
            "cost": (total([one.cost for one in tried if one.cost is not None]) if tried else learned.cost).to_json(),
            "notes": list(trial.notes),
        }
        self.folder.finish(trial.seed, result)
        parts = [f"{one['name']} {one['metrics']['top1']['value']:.1%}" for one in found]
        if learned.validation is not None:
            parts.insert(0, f"validation {learned.validation.accuracy:.1%}")
        self.say(f"seed {trial.seed}: {learned.method}, {', '.join(parts)}, {learned.cost.seconds:.1f} s")

    def _budget_left(self) -> float:
        """Seconds for the next seed: what the seeds that are done have left over, in equal parts."""
        results = [self.folder.result(trial.seed) for trial in self.todo]
        spent = sum(Cost(**one["cost"]).seconds for one in results if one is not None)
        budget_s = auto.DEFAULT_BUDGET_S if self.request.budget_s is None else self.request.budget_s
        return max(0.0, budget_s - spent) / results.count(None)


def _check_method(request: Request, todo: Sequence[Trial]) -> None:
    """An early word where the protocol or the data ask of a method what it can't do."""
    if request.method != "auto" and todo[0].train is not None:
        weight_arguments(request.method, todo[0].train)
    if todo[0].train is not None:
        _check_every_class(request.method, todo[0].train)
    if request.method == "auto" or not _asks_new(todo[0]):
        return
    if not names_new_classes(method_class(request.method)):
        able = ", ".join(name for name in METHODS if names_new_classes(method_class(name)))
        raise ValueError(
            f"the protocol {request.protocol} asks for new classes, and {request.method}'s weights belong to those that it "
            f"learned: choose one of {able}"
        )
    if request.parameters.get("class_specific"):
        raise ValueError(
            f"the protocol {request.protocol} asks for new classes, and a class-specific context belongs to those that it was "
            "learned for: set class_specific=false"
        )


def _check_every_class(method: str, train: LabelledSet) -> None:
    empty = [name for name, count in train.weighed_counts().items() if not count]
    if empty and (method == "auto" or method_class(method).needs_every_class):
        raise ValueError(
            f"{len(empty)} classes have no training picture: {_some(empty)}. {method} learns each class from pictures: give at "
            "least one of each, or leave them out; `wordsight long-tail` takes such data, and counts their pictures as wrong"
        )


def _asks_new(trial: Trial) -> bool:
    return any(test.choice == "new" for test in trial.tests)


def _suits(trial: Trial) -> Callable[[str], bool]:
    """Whether a method can be asked what the trial's tests ask."""
    asks_new = _asks_new(trial)
    return lambda method: not asks_new or names_new_classes(method_class(method))


def _all_sets(todo: Sequence[Trial]) -> Iterator[LabelledSet]:
    for trial in todo:
        for part in (trial.train, trial.val, *(test.pictures for test in trial.tests)):
            if part is not None:
                yield part


def _settings(request: Request, model: Any, todo: Sequence[Trial]) -> dict[str, Any]:
    """settings.json's content: what the run's figures depend on."""
    pictures = hashlib.sha256()
    for part in _all_sets(todo):
        for key, label in zip(part.keys, part.labels, strict=True):
            pictures.update(f"{key}\0{label}\n".encode(errors="surrogateescape"))
        pictures.update(repr(part.weights).encode() if part.weights is not None else b"")
    asked = {name: value for name, value in asdict(request).items() if name != "words"}
    weights = [math.fsum(one.train.weights) for one in todo if one.train is not None and one.train.weights is not None]
    return {
        "format": FORMAT_VERSION,
        **json.loads(json.dumps(asked)),
        "classes": list(todo[0].classes),
        "words": dict(request.words),
        **({"weights": {"sums": weights}} if weights else {}),
        "identity": {"model": model_fingerprint(model), "pictures": pictures.hexdigest()[:32]},
    }
