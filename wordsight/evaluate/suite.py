"""A suite: a list of measurements in Python, run over models into a folder that survives a kill.

`RUN/MODEL/ITEM/` holds one measurement (see `kept`); it is whole or not there. What is there is measured again only where the
model's weights, what was asked or the data are others than they were.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import shutil
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from wordsight.data.features_in import VectorSource
from wordsight.evaluate.embedding import Embedded, embed_source
from wordsight.evaluate.feature_cache import Layer
from wordsight.evaluate.folders import hold
from wordsight.evaluate.kept import Kept, kept_of, read_kept, versions, write_kept
from wordsight.evaluate.prompts import own_prompts
from wordsight.evaluate.results import Finding, Judgement, fingerprint, name_data, write_atomically

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclass(frozen=True, kw_only=True)
class SuiteItem:
    """One measurement of a suite.

    Attributes:
        name: of its folder and its rows: letters, digits and `. _ + -`.
        evaluator: an object with `judge(model, data) -> Judgement | Finding`; without `data`, `judge(model)`, for one that makes
            its samples itself. Where `judge` takes `batch_size`, `progress` or `cache` it gets them.
        data: what it is measured on: all that `wordsight.data.open_source` takes. Pictures are embedded once for all
            consecutive items of the same data. Where `judge` wants several parts (a probe's train and test), their names with
            the data of each, which are embedded at the evaluator's `layer`.
        dataset, split: the names in the figures, where those of `data` (`name_data`) are not wanted; with neither, the item's
            name and "all".
        metric: the figure that stands for the item in tables and plots; None: the evaluator's `headline`, else the first.
        needs: (path, what to put there) of all that must lie on this machine; where something is missing, the item is left out
            and listed.
    """

    name: str
    evaluator: Any
    data: str | Path | Mapping[str, str | Path] | None = None
    dataset: str | None = None
    split: str | None = None
    metric: str | None = None
    needs: tuple[tuple[str | Path, str], ...] = ()

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ValueError(f"a suite's item is named by letters, digits and . _ + -, got {self.name!r}")
        if not callable(getattr(self.evaluator, "judge", None)):
            raise ValueError(f"the evaluator of {self.name} has no judge(): {type(self.evaluator).__name__} measures nothing")

    @property
    def missing(self) -> tuple[tuple[Path, str], ...]:
        """What is needed and not there."""
        return tuple((Path(path), what) for path, what in self.needs if not Path(path).exists())

    @property
    def place(self) -> tuple[str, str]:
        """(data, split) of the figures."""
        if self.data is None:
            return self.dataset or self.name, self.split or "all"
        judged = self.data
        if isinstance(judged, Mapping):
            judged = judged.get("test", list(judged.values())[-1])
        data, split = name_data(str(judged), self.split)
        return self.dataset or data, split


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A model to be measured.

    Attributes:
        name: of its folder and its rows.
        load: gives the model in evaluation mode on its device; called when its turn comes.
        source: what a user calls it: its path or name.
    """

    name: str
    load: Callable[[], Any]
    source: str = ""

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ValueError(f"a model is named by letters, digits and . _ + -, got {self.name!r}")


@dataclass(frozen=True, kw_only=True)
class SuiteOutcome:
    """How a suite went.

    Attributes:
        measured: (model, measurement) in order, those that were there already among them.
        again: how many of them were measured now.
        failed: (model, item, error) of those that could not be.
        missing: (item, what is missing) of those that were left out.
    """

    measured: tuple[tuple[str, Kept], ...] = ()
    again: int = 0
    failed: tuple[tuple[str, str, str], ...] = ()
    missing: tuple[tuple[str, tuple[tuple[Path, str], ...]], ...] = ()


def run_suite(
    items: Sequence[SuiteItem],
    models: Sequence[Candidate],
    run_dir: str | Path,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    max_bad_share: float = 0.05,
    cache: str | Path | None = None,
    progress: bool = False,
    say: Callable[[str], None] = lambda text: None,
    describe: Callable[[Path, Any], None] = lambda folder, model: None,
) -> SuiteOutcome:
    """Measure every item on every model, what is there already left as it is; an item that fails is written down, the rest runs.

    Args:
        items: the suite.
        models: what to measure; one after the other, each loaded once to be looked at before the first is measured.
        run_dir: gets `MODEL/ITEM/`, and for each model `results.json` and `report.html`.
        batch_size: pictures encoded at once.
        num_workers: processes that decode.
        max_bad_share: a larger share of unreadable pictures is an item's failure.
        cache: folder of the feature cache; None: no cache.
        progress: show bars within items.
        say: gets a line an item.
        describe: gets each model's folder and the model before it is measured, to write down more about the run.

    Raises:
        ValueError: no item or no model, two of one name, a model that can't be loaded, or another process writes there.
    """
    _check_names("model", [model.name for model in models])
    _check_names("item of the suite", [item.name for item in items])
    missing = tuple((item.name, item.missing) for item in items if item.missing)
    present = [item for item in items if not item.missing]
    if len(models) > 1:  # a wrong path is told now and not after hours
        for model in models:
            model.load()
    work = _Work(Path(run_dir), present, len(models), batch_size, num_workers, max_bad_share, cache, progress, say, describe)
    for order, model in enumerate(models):
        work.measure(model, order)
    return SuiteOutcome(measured=tuple(work.measured), again=work.again, failed=tuple(work.failed), missing=missing)


def _check_names(what: str, names: Sequence[str]) -> None:
    if not names:
        raise ValueError(f"no {what}: name at least one")
    lower = [name.lower() for name in names]  # some file systems know no difference
    if twice := [name for name, count in Counter(lower).items() if count > 1]:
        raise ValueError(f"every {what} needs a name of its own, but {twice[0]!r} is there {lower.count(twice[0])} times")


class _Work:
    """The state of a run over models and items."""

    def __init__(
        self,
        run_dir: Path,
        items: Sequence[SuiteItem],
        num_models: int,
        batch_size: int,
        num_workers: int,
        max_bad_share: float,
        cache: str | Path | None,
        progress: bool,
        say: Callable[[str], None],
        describe: Callable[[Path, Any], None],
    ) -> None:
        self.run_dir, self.items, self.total = run_dir, items, len(items) * num_models
        self.batch_size, self.num_workers, self.max_bad_share = batch_size, num_workers, max_bad_share
        self.cache, self.progress, self.say, self.describe = cache, progress, say, describe
        self.measured: list[tuple[str, Kept]] = []
        self.failed: list[tuple[str, str, str]] = []
        self.again = 0
        self._step = 0
        self._spent_s = 0.0
        self._embedded: tuple[Any, str | Path, Embedded] | None = None

    def measure(self, candidate: Candidate, order: int) -> None:
        """All items on one model."""
        folder = self.run_dir / candidate.name
        model = candidate.load()  # one that can't be loaded leaves no folder behind
        with hold(folder, "measuring into"):
            self.describe(folder, model)
            about = {"name": candidate.name, "source": candidate.source or candidate.name, "order": order} | describe_model(model)
            for place, item in enumerate(self.items):
                self._step += 1
                self._item(model, about, item, place, folder / item.name)
            self._embedded = None
            write_summary(folder)

    def _item(self, model: Any, about: Mapping[str, Any], item: SuiteItem, order: int, folder: Path) -> None:
        head = f"[{self._step} of {self.total}] {about['name']} · {item.name}"
        read = [*(item.data.values() if isinstance(item.data, Mapping) else [item.data]), *(path for path, _ in item.needs)]
        own = [own_prompts(model)] if getattr(item.evaluator, "prompts", "") is None else []  # the weights don't tell these
        asked = _digest([about["weights"], settings_of(item), list(map(_stamp, read)), *own])
        try:
            kept = read_kept(folder)
        except ValueError as error:
            self.say(f"{head}: {error}")  # nothing but what is damaged is made anew
            kept = None
        if kept is not None and kept.asked == asked:
            self.measured.append((about["name"], kept))
            self.say(f"{head}: {_shown(kept)}, measured before{_other_versions(kept)}")
            return
        began = time.monotonic()
        try:
            found = self._judge(model, item)
            data, split = item.place
            spent = time.monotonic() - began
            headline = item.metric or getattr(item.evaluator, "headline", None)
            more = {"item": item.name, "asked": asked, "headline": headline, "seconds": spent, "order": order}
            kept = kept_of(found, data=data, split=split, model=about, **more)
            write_kept(folder, kept)
        except Exception as error:  # one item's failure, whatever it is, must not cost the night's others
            self._fail(about["name"], item.name, folder, error, head)
            return
        self._show_pictures(folder.parent, found, kept)
        self.again += 1
        self._spent_s += kept.seconds
        self.measured.append((about["name"], kept))
        self.say(f"{head}: {_shown(kept)}, in {duration(kept.seconds)}{self._left()}")

    def _judge(self, model: Any, item: SuiteItem) -> Judgement | Finding:
        takes = inspect.signature(item.evaluator.judge).parameters
        known: dict[str, Any] = {"batch_size": self.batch_size, "progress": self.progress, "cache": self.cache}
        options = {name: value for name, value in known.items() if name in takes}
        given: list[Any] = []
        if isinstance(item.data, Mapping):
            layer: Layer = getattr(item.evaluator, "layer", "projected")
            options |= {part: self._embed_now(model, data, layer) for part, data in item.data.items()}
        elif item.data is not None:
            given.append(self._embed(model, item.data))
        found: Judgement | Finding = item.evaluator.judge(model, *given, **options)
        return found

    def _embed(self, model: Any, data: str | Path) -> Embedded:
        """The pictures as vectors; those of the last data are at hand still."""
        if self._embedded is None or self._embedded[0] is not model or self._embedded[1] != data:
            self._embedded = None  # frees it before the next one comes
            self._embedded = model, data, self._embed_now(model, data, "projected")
        return self._embedded[2]

    def _embed_now(self, model: Any, data: str | Path, layer: Layer) -> Embedded:
        return embed_source(
            model,
            data,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            max_bad_share=self.max_bad_share,
            progress=self.progress,
            cache=self.cache,
            layer=layer,
        )

    def _fail(self, model: str, item: str, folder: Path, error: Exception, head: str) -> None:
        """Write an item's error down in the place of its figures."""
        reason = str(error) if isinstance(error, ValueError | OSError) and str(error) else f"{type(error).__name__}: {error}"
        shutil.rmtree(folder, ignore_errors=True)
        told = {"item": item, "error": reason, "traceback": "".join(traceback.format_exception(error))}
        write_atomically(folder / "error.json", json.dumps(told, indent=1, ensure_ascii=False) + "\n")
        self.failed.append((model, item, reason))
        self.say(f"{head}: FAILED: {reason}")

    def _show_pictures(self, folder: Path, found: Judgement | Finding, kept: Kept) -> None:
        """Examples for the report of a model's folder, where the data have pictures."""
        from wordsight.data.errors import BadSampleError
        from wordsight.evaluate.examples import write_examples

        if isinstance(found, Judgement) and not isinstance(found.embedded.source, VectorSource):
            try:
                write_examples(folder, found, kept.data, kept.split)
            except (BadSampleError, OSError) as error:
                self.say(f"{kept.item}: no examples in the report, as {error}")

    def _left(self) -> str:
        """How long the rest may take, by the mean of the items measured now."""
        rest = self.total - self._step
        return f"; about {duration(self._spent_s / self.again * rest)} left" if rest else ""


def write_summary(folder: Path) -> None:
    """`results.json` and `report.html` of a model's folder, from all measurements in it."""
    from wordsight.evaluate.finding_tables import read_findings
    from wordsight.evaluate.report import write_report

    records = [record for _, kept in read_findings(folder) for record in kept.records()]
    write_atomically(folder / "results.json", json.dumps(records, indent=1, ensure_ascii=False) + "\n")
    write_report(folder)


def describe_model(model: Any) -> dict[str, Any]:
    """weights (hash of weights, tokenizer and preprocessing), num_parameters, gflops of the image tower."""
    parameters = list(model.parameters()) if callable(getattr(model, "parameters", None)) else []
    return {
        "weights": fingerprint(model, (), "", "weights"),
        "num_parameters": sum(parameter.numel() for parameter in parameters),
        "gflops": image_gflops(model),
    }


def image_gflops(model: Any) -> float | None:
    """Billions of floating-point operations that one picture takes through the image tower, a multiply-add counted as two.

    Matrix products, convolutions and attention are counted as they run (`torch.utils.flop_counter`); None where the model has no
    preprocessing that says the size of its pictures.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from wordsight.evaluate.modes import judging

    size = getattr(getattr(model, "preprocessor", None), "image_size_px", None)
    if size is None or not callable(getattr(model, "encode_image", None)):
        return None
    counter = FlopCounterMode(display=False)
    # the CPU's fused attention is none of the operations that the counter knows; written out it is two products
    with judging(model) as device, sdpa_kernel(SDPBackend.MATH), counter:
        model.encode_image(torch.zeros(1, 3, size, size, device=device))
    return counter.get_total_flops() / 1e9


def settings_of(value: Any) -> Any:
    """Plain values that say how an object was set up, to tell two of them apart.

    Dataclasses count by their fields, other objects by their attributes, functions by their names. What is not of this package
    counts by the text of its file too: a user who changes an evaluator wants another measurement.
    """
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): settings_of(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [settings_of(one) for one in (sorted(value, key=repr) if isinstance(value, set | frozenset) else value)]
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}{_own_code(value.__module__)}"
    kind += _own_code(type(value).__module__)
    if is_dataclass(value):
        return [kind, {one.name: settings_of(getattr(value, one.name)) for one in fields(value)}]
    if hasattr(value, "tobytes"):
        return [kind, hashlib.sha256(value.tobytes()).hexdigest()]
    return [kind, settings_of(vars(value)) if hasattr(value, "__dict__") else repr(value)]


def _own_code(module: str) -> str:
    """A digest of the file of a module that is not this package's; "" where it has none to be read."""
    path = getattr(sys.modules.get(module), "__file__", None)
    if path is None or module.split(".")[0] == __name__.split(".")[0] or not path.endswith(".py"):
        return ""
    try:
        return " " + hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    except OSError:
        return ""


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def _stamp(data: Any) -> Any:
    """Sizes and times of change of the files at a path, so that other data are measured again; embedded data and URLs by name."""
    if data is None or str(data).startswith("sample:") or "://" in str(data):
        return None if data is None else str(data)
    from wordsight.data.sources import expand

    try:
        places = [Path(place) for place in expand(str(data))]
    except (OSError, ValueError):
        return None  # the measurement itself will say what is wrong with it
    found = []
    for place in places:
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            about = path.stat() if path.exists() else None
            if about is not None and path.is_file():
                found.append((str(path.relative_to(place)), about.st_size, about.st_mtime_ns))
    return _digest(found)


def _other_versions(kept: Kept) -> str:
    """What a measurement was made with that is another now; it stays, as most versions change no figure, but it is said."""
    now = versions()
    other = [f"{name} {kept.versions[name]} (now {now[name]})" for name in now if kept.versions.get(name, now[name]) != now[name]]
    return f" with {', '.join(other)}; remove its folder to measure it with these" if other else ""


def _shown(kept: Kept) -> str:
    from wordsight.evaluate.report import figure, metric_name

    metric = kept.metrics[kept.headline]
    low, high = (figure(bound, metric.unit) for bound in metric.ci95)
    return f"{metric_name(kept.headline)} {figure(metric.value, metric.unit)} ({low} – {high})"


def duration(seconds: float) -> str:
    """Seconds in words: 3.2 s, 4 min, 2.5 h."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
