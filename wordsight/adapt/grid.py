"""`wordsight long-tail`: methods x seeds on classes of unequal size, each cell a folder, whole or not at all.

```
settings.json        what the figures depend on; another question in the same folder is refused
environment.json     machine and versions of each start
features/, tokens/   what the frozen tower gives, by content: computed once for all cells
features.json        what that cost
cells/METHOD/SEED/   classifier/ (without its model), predictions-val.csv, predictions-test.csv, per_class-test.csv, result.json
classifier/          the kept one, with its model: wordsight.load_classifier(DIR), wordsight predict --run DIR
summary.json         means over seeds, which method is kept and by how much, costs, what failed or was left out
results.json, table.csv, accuracy_cost.svg, class_counts.svg, report.html
```

Methods and seeds are not among the settings: a grid that is done can be asked for more of them.

Shape legend: N pictures, C classes.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wordsight.adapt.costs import Cost, Meter, total
from wordsight.adapt.estimator import CONFIG, MODEL, TENSORS, load_classifier, model_fingerprint
from wordsight.adapt.folder import AdaptFolder
from wordsight.adapt.grid_figures import summarise, write_figures
from wordsight.adapt.grid_methods import STAGES, WISE_FT, GridRequest, read_method
from wordsight.adapt.judge import _write_csv
from wordsight.adapt.learn import make, weight_arguments
from wordsight.adapt.second_stage import second_stage
from wordsight.adapt.tail_data import Inputs, Part, TailData, answers, prepare
from wordsight.adapt.wise_ft import on_validation
from wordsight.data.few_shot import Splits
from wordsight.evaluate import long_tail
from wordsight.evaluate.metrics import mean_per_class, mean_per_class_interval
from wordsight.types import Metric

FORMAT_VERSION = 1
Say = Callable[[str], None]


class GridFolder(AdaptFolder):
    """The folder of a grid: cells in the place of seeds."""

    command = "`wordsight long-tail`"

    def cell_dir(self, cell: tuple[str, int]) -> Path:
        """A cell's folder, which is there whole or not at all."""
        return self.path / "cells" / cell[0] / str(cell[1])

    def cell(self, cell: tuple[str, int]) -> dict[str, Any] | None:
        """What a cell that is done has found; None where it is not."""
        path = self.cell_dir(cell) / "result.json"
        found: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        return found

    def keeps(self, classifier: Path) -> bool:
        """Whether a cell's classifier is the one that is kept already, so that its model need not be written again."""
        pairs = [(classifier / name, self.path / "classifier" / name) for name in (CONFIG, TENSORS)]
        whole = (self.path / "classifier" / MODEL).is_dir() and all(b.is_file() for _, b in pairs)
        return whole and all(filecmp.cmp(a, b, shallow=False) for a, b in pairs)

    def begin_cell(self) -> Path:
        """An empty folder to write a cell into."""
        new = self.path / "cells" / ".new"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        return new

    def finish_cell(self, cell: tuple[str, int], result: Mapping[str, Any]) -> None:
        """All of a cell is written: put it in its place."""
        self.write("cells/.new/result.json", result)
        final = self.cell_dir(cell)
        final.parent.mkdir(exist_ok=True)
        os.rename(self.path / "cells" / ".new", final)


def run_grid(
    model: Any,
    splits: Splits,
    run_dir: str | os.PathLike[str],
    request: GridRequest,
    *,
    budget_s: float | None = None,
    progress: bool = False,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Do the cells of a grid that are not done, compare the methods, write the report.

    Args:
        model: a frozen Embedder.
        splits: the data set; what it lacks is held out of train.
        run_dir: the folder of the run.
        request: methods, seeds, settings.
        budget_s: no cell begins after so many seconds of this call; what is left out is named, and done by the next call.
        progress: whether to show bars.
        say: told in a line what happens.

    Returns:
        summary.json's content.

    Raises:
        ValueError: data that can't be used, another question in the same folder, another process in it, features that are not
            finite, a budget in which no cell was done. A cell that can't be learned fails alone: summary["failed"] says why.
        OSError: a picture can't be read, or the folder can't be written. Cells and features that are done stay.
    """
    if budget_s is not None and not 0 < budget_s < float("inf"):
        raise ValueError(f"the budget must be seconds above 0, got {budget_s}")
    start = time.monotonic()
    data = prepare(splits)
    for name in request.methods:
        weight_arguments(read_method(name).estimator, data.train)  # before anything is computed
    folder = GridFolder(Path(run_dir))
    settings = _settings(request, model, data)
    with folder.locked(settings):
        shutil.rmtree(folder.path / "cells" / ".new", ignore_errors=True)
        folder.describe(next(model.parameters()).device, request.seeds[0])
        run = _Grid(model, request, data, folder, progress, say)
        failed = run.do(None if budget_s is None else start + budget_s)
        results = {cell: found for cell in request.cells if (found := folder.cell(cell)) is not None}
        if not results:
            raise ValueError(_nothing(failed, budget_s))
        summary = summarise(folder, settings, data, request.cells, results, failed)
        kept = summary["kept"]
        cell = folder.cell_dir((kept["method"], kept["seed"])) / "classifier"
        if not folder.keeps(cell):
            folder.keep(load_classifier(cell, model))
        write_figures(folder, settings, data, results, summary)
        folder.write("summary.json", summary)
        from wordsight.adapt.grid_report import write_report

        write_report(folder.path)
    return summary


@dataclass(frozen=True)
class _Grid:
    """What is done in a folder that is held."""

    model: Any
    request: GridRequest
    data: TailData
    folder: GridFolder
    progress: bool
    say: Say
    fitted: dict[str, Any] = field(default_factory=dict)  # first stages of the seed at hand

    def do(self, until: float | None) -> dict[tuple[str, int], str]:
        """Do the cells that are left; those that failed, with the reason."""
        cells = self.request.cells
        left = [cell for cell in cells if self.folder.cell(cell) is None]
        if len(left) < len(cells):
            self.say(f"{len(cells) - len(left)} of {len(cells)} cells are done already")
        failed: dict[tuple[str, int], str] = {}
        if not left:
            return failed
        _warm_up(next(self.model.parameters()).device)
        inputs = self._inputs(left)
        from tqdm import tqdm

        with tqdm(total=len(cells), initial=len(cells) - len(left), desc="cells", unit="cell", disable=not self.progress) as bar:
            for place, cell in enumerate(left):
                if until is not None and time.monotonic() > until:
                    self.say(f"the budget is spent: {len(left) - place} cells are left for the next call")
                    break
                name, seed = cell
                bar.set_postfix_str(f"{name}, seed {seed}")
                if place and left[place - 1][1] != seed:
                    self.fitted.clear()
                try:
                    told = self._cell(cell, inputs, failed)
                except ValueError as error:
                    failed[cell] = str(error)
                    told = f"failed: {error}"
                self.say(f"cell {len(cells) - len(left) + place + 1} of {len(cells)}, {name}, seed {seed}: {told}")
                bar.update()
        return failed

    def _inputs(self, left: Sequence[tuple[str, int]]) -> Inputs:
        """Features and tokens of all pictures, and their cost when they were first computed."""
        own = self.request.parameters.get("decoder", {})
        inputs = Inputs(
            self.model,
            self.data,
            self.folder.path,
            token_kind=own.get("token_kind", "float16"),
            progress=self.progress,
        )
        with Meter(next(self.model.parameters()).device) as meter:
            for name, seed in left:
                for part in ("train", "val", "test"):
                    inputs.of(part, self._make(name, seed))
        self.say(f"features and tokens of {len(inputs):,} pictures: {meter.cost.seconds:.1f} s")
        if self.folder.shared_cost() is None:
            self.folder.write("features.json", {"count": len(inputs), **meter.cost.to_json()})
        return inputs

    def _make(self, name: str, seed: int) -> Any:
        """A cell's estimator, not fitted; of a second stage its first one."""
        what = read_method(name)
        own = dict(self.request.parameters.get(what.estimator, {})) | what.settings
        classes = self.data.classes if what.estimator == "zero_shot" else self.data.learned
        return make(self.model, what.estimator, own, classes, seed)

    def _cell(self, cell: tuple[str, int], inputs: Inputs, failed: Mapping[tuple[str, int], str]) -> str:
        """Learn, judge, write a cell; a line about it."""
        name, seed = cell
        what = read_method(name)
        cost = None
        if what.first is None:
            classifier = self._make(name, seed)
            train, held_out = inputs.of("train", classifier), inputs.held_out(classifier)
            with Meter(next(self.model.parameters()).device) as meter, warnings.catch_warnings():
                # a few pictures of many classes look like numbers to scikit-learn; they are names
                warnings.filterwarnings("ignore", message="The number of unique classes is greater than 50%")
                weights = weight_arguments(what.estimator, self.data.train)
                classifier.fit(train, list(self.data.train.labels), validation=held_out, **weights)
        else:
            if (what.first, seed) in failed:
                raise ValueError(f"its first stage, {what.first}, failed")
            first, cost = self._first(what.first, seed)
            train, held_out = inputs.of("train", first), inputs.held_out(first)
            with Meter(next(self.model.parameters()).device) as meter:
                if what.stage2 == WISE_FT:
                    classifier = on_validation(first, held_out)
                else:
                    kind = STAGES[what.stage2 or ""]
                    labels, weights = list(self.data.train.labels), weight_arguments(what.estimator, self.data.train)
                    classifier = second_stage(first, kind, train, labels, validation=held_out, **weights)
        if any(read_method(method).first == name for method in self.request.methods):
            self.fitted[name] = classifier
        return self._write(cell, classifier, inputs, meter.cost, cost)

    def _first(self, name: str, seed: int) -> tuple[Any, Cost]:
        """A first stage and what it took."""
        if name not in self.fitted:
            self.fitted[name] = load_classifier(self.folder.cell_dir((name, seed)) / "classifier", self.model)
        found = self.folder.cell((name, seed))
        assert found is not None
        return self.fitted[name], Cost(**found["cost"])

    def _write(self, cell: tuple[str, int], classifier: Any, inputs: Inputs, own: Cost, first: Cost | None) -> str:
        """A cell's files; the line about it."""
        path = self.folder.begin_cell()
        classifier.save(path / "classifier", with_model=False)
        given = {part: answers(classifier, inputs.of(part, classifier), self.data.classes) for part in PARTS}
        for part, (predicted, confidence) in given.items():
            self._write_answers(path / f"predictions-{part}.csv", part, predicted, confidence)
        predicted, confidence = given["test"]
        found = long_tail.judge(
            self.data.targets("test"),
            predicted,
            self.data.counts,
            confidences=confidence,
            classes=self.data.classes,
            many_above=self.request.many_above,
            few_below=self.request.few_below,
        )
        _write_per_class(path / "per_class-test.csv", found)
        validation = _validation(self.data, given["val"][0])
        cost = own if first is None else total([first, own])
        result = {
            "method": cell[0],
            "seed": cell[1],
            "validation": validation,
            "metrics": {name: _plain(one) for name, one in found.metrics.items()},
            "intervals": found.intervals,
            "over_classes": {name: list(bounds) for name, bounds in found.over_classes.items()},
            "confusion": [{"right": a, "predicted": b, **_plain(one)} for (a, b), one in found.confusion.items()],
            "groups": {name: len(names) for name, names in found.groups.items()},
            "notes": list(found.notes),
            "chosen": _chosen(classifier),
            "own_cost": own.to_json(),
            "cost": cost.to_json(),
        }
        self.folder.finish_cell(cell, result)
        few = found.metrics.get("top1_few")
        parts = [f"validation {validation['mean_per_class']:.1%}", f"test {found.metrics['top1'].value:.1%}"]
        parts += [] if few is None else [f"few {few.value:.1%}"]
        return f"{', '.join(parts)}, {own.seconds:.1f} s"

    def _write_answers(self, path: Path, part: Part, predicted: np.ndarray, confidence: np.ndarray) -> None:
        pictures, classes = self.data.part(part), self.data.classes
        rows = zip(pictures.keys, pictures.labels, predicted.tolist(), confidence.tolist(), strict=True)
        _write_csv(
            path,
            ("picture", "label", "predicted", "probability"),
            ((key, label, classes[guess], f"{sure:.6f}") for key, label, guess, sure in rows),
        )


PARTS: tuple[Part, ...] = ("val", "test")


def _warm_up(device: torch.device) -> None:
    """PyTorch loads seconds' worth of modules at an optimizer's first step, which the first cell should not be charged with."""
    weight = torch.nn.Parameter(torch.zeros(1, device=device))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    weight.sum().backward()
    optimizer.step()


def _validation(data: TailData, predicted: np.ndarray) -> dict[str, Any]:
    """Mean per class on the validation pictures, by which methods are compared: a skewed split must not favour the head."""
    targets = data.targets("val")
    right = predicted == targets
    return {
        "mean_per_class": mean_per_class(targets, right, len(data.classes)),
        "ci95": list(mean_per_class_interval(targets, right, len(data.classes))),
        "top1": float(right.mean()),
        "count": len(targets),
        "num_classes": len(set(targets.tolist())),
    }


def _chosen(classifier: Any) -> dict[str, float]:
    """What a method has chosen on validation."""
    names = {"C_": "C", "second_stage_tau_": "tau", "wise_ft_": "alpha"}
    found = {name: getattr(classifier, attribute, None) for attribute, name in names.items()}
    return {name: float(value) for name, value in found.items() if value is not None}


def _plain(metric: Metric) -> dict[str, Any]:
    return {"value": metric.value, "count": metric.count, "ci95": list(metric.ci95), "chance": metric.chance}


def _write_per_class(path: Path, found: long_tail.LongTail) -> None:
    def share(one: Metric | None) -> tuple[str, ...]:
        return ("", "", "") if one is None else tuple(f"{value:.4f}" for value in (one.value, *one.ci95))

    _write_csv(
        path,
        ("class", "group", "train_count", "count", "predicted", "right", "recall", "low95", "high95", "precision", "f1"),
        (
            (
                row.name,
                row.group,
                f"{row.train_count:g}",
                row.count,
                row.predicted,
                row.right,
                *share(row.recall),
                share(row.precision)[0],
                "" if row.f1 is None else f"{row.f1:.4f}",
            )
            for row in found.per_class
        ),
    )


def _nothing(failed: Mapping[tuple[str, int], str], budget_s: float | None) -> str:
    if failed:
        (name, seed), why = next(iter(failed.items()))
        return f"all {len(failed)} cells failed, the first, {name} of seed {seed}, as {why}"
    return f"no cell was done in {budget_s:g} s: features and tokens are kept, so ask again, or give more"


def _settings(request: GridRequest, model: Any, data: TailData) -> dict[str, Any]:
    """settings.json's content: what the cells' figures depend on."""
    pictures = hashlib.sha256()
    for part in ("train", "val", "test"):
        given = data.part(part)
        for key, label in zip(given.keys, given.labels, strict=True):
            pictures.update(f"{part}\0{key}\0{label}\n".encode(errors="surrogateescape"))
        pictures.update(repr(given.weights).encode() if given.weights is not None else b"")
    asked = {name: value for name, value in asdict(request).items() if name not in ("methods", "seeds", "words")}
    return {
        "format": FORMAT_VERSION,
        "protocol": "long_tail",
        **json.loads(json.dumps(asked)),
        "data": data.name,
        "classes": list(data.classes),
        "words": dict(request.words),
        **({} if data.train.weights is None else {"weights": {"pictures": len(data.train), "sum": math.fsum(data.counts)}}),
        "identity": {"model": model_fingerprint(model), "pictures": pictures.hexdigest()[:32]},
    }
