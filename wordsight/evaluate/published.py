"""Zero-shot on published data sets, in whatever layout they lie on disk, by the figure that is published for each.

Class names and templates are the data's own where they bring them (CLIP_benchmark's folders), else the CLIP paper's
(`prompt_sets`). Which was taken is part of the protocol, so that figures of one are never tested against the other's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wordsight.data.layouts import LAYOUTS, open_splits, published_name
from wordsight.data.sources import Source, open_source
from wordsight.evaluate.embedding import embed_source
from wordsight.evaluate.metrics import BOOTSTRAP_SEED
from wordsight.evaluate.multi_label import MultiLabel, shows_several
from wordsight.evaluate.prompt_sets import PromptSet, own_classes, prompt_set
from wordsight.evaluate.results import Finding, Judgement
from wordsight.evaluate.retrieval import Retrieval
from wordsight.evaluate.task_metrics import task_metric
from wordsight.evaluate.zero_shot import ZeroShot
from wordsight.types import Metric

RESAMPLES = 400  # of the bootstrap of macro F1


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published data set on disk, and how it is judged.

    Attributes:
        title: what it is called.
        metric: the published figure: one of ZeroShot's or of `task_metrics.METRICS`, "macro_f1" or "mean_recall@1".
        prompts: its prompt set, see `prompt_sets`; None: it must bring its own classes and templates.
        places: folders it may lie in, the first that is there is taken.
        layout: CoOp's name of it (`LAYOUTS`), where that is a layout too.
        root: the folder of all data sets, for `layout`.
    """

    title: str
    metric: str
    prompts: str | None
    places: tuple[Path, ...]
    layout: str | None = None
    root: Path | None = None

    @property
    def place(self) -> Path | None:
        """Where it lies; None: nowhere."""
        return next((path for path in self.places if path.exists()), None)

    @property
    def needs(self) -> tuple[tuple[Path, str], ...]:
        """(path, what to put there) of all that must lie on this machine."""
        if self.place is not None:
            return ((self.place, self.title),)
        if self._coop is not None:
            return tuple((self._coop / need, f"{self.title} as CoOp lays it out") for need in LAYOUTS[self.layout or ""].needs)
        what = f"{self.title}: shards of CLIP_benchmark (test/*.tar beside its lists), or pictures in class folders of test/"
        return ((self.places[0], what + (f"; or {LAYOUTS[self.layout].folder}/ as CoOp lays it out" if self.layout else "")),)

    @property
    def _coop(self) -> Path | None:
        """CoOp's folder of it, where that is there."""
        folder = self.root / LAYOUTS[self.layout].folder if self.layout and self.root else None
        return folder if folder is not None and folder.is_dir() else None

    def judge(
        self, model: Any, *, batch_size: int = 64, progress: bool = False, cache: str | Path | None = None
    ) -> Judgement | Finding:
        """The published figure, first ZeroShot's or Retrieval's.

        Raises:
            FileNotFoundError: it lies nowhere.
            ValueError: its labels are no classes of its prompt set, or it has neither classes nor a prompt set.
        """
        source, classes = self._open()
        embedded = embed_source(model, source, batch_size=batch_size, progress=progress, cache=cache)
        if classes is None:
            return _with_mean_recall(Retrieval(progress=progress).judge(model, embedded))
        how = f"names and templates: {classes.source}"
        if shows_several(source):
            several = MultiLabel(classes=classes, prompts=classes.templates, progress=progress).judge(model, embedded)
            return replace(several, protocol=f"{several.protocol}, {how}")
        found = ZeroShot(classes=classes, prompts=classes.templates, progress=progress).judge(model, embedded)
        return replace(found, protocol=f"{found.protocol}, {how}", metrics=found.metrics | self._further(found))

    def _open(self) -> tuple[Source, PromptSet | None]:
        """The pictures, and what to choose from; None where captions are retrieved."""
        if self.place is None:
            if self._coop is None:
                raise FileNotFoundError(f"{self.title} is not there: {self.needs[0][0]} should be {self.needs[0][1]}")
            test = open_splits(self.layout or "", self.root).test
            assert test is not None
            return test.source, self._of_layout(test.classes)
        source = _open_test(self.place)
        if self.metric == "mean_recall@1":
            return source, None
        own = own_classes(source)
        if own is not None and own.templates:
            return source, own
        if self.prompts is None:
            raise ValueError(f"{self.place} brings no class names and templates, and none are known for {self.title}")
        known = prompt_set(self.prompts)
        return source, replace(own, templates=known.templates, source=f"{known.title}'s templates") if own is not None else known

    def _of_layout(self, classes: Sequence[str]) -> PromptSet:
        known = prompt_set(self.prompts or "imagenet")
        if self.layout is not None and not self.layout.startswith("imagenet"):
            return known
        names = {label: (published_name(label),) for label in classes if published_name(label) != label}
        return PromptSet(classes=tuple(classes), templates=known.templates, source="CoOp's names", names=names)

    def _further(self, found: Judgement) -> dict[str, Metric]:
        """The published figure, where ZeroShot does not give it."""
        if self.metric in found.metrics:
            return {}
        scores_NC = found.scores(found.embedded.images_ND[torch.from_numpy(found.rows)], found.texts_MD)
        if self.metric == "macro_f1":
            return {"macro_f1": macro_f1(found.row_groups, scores_NC.argmax(1).numpy(), len(found.texts))}
        labels = [found.texts[place] for place in found.row_groups.tolist()]
        return {self.metric: task_metric(self.metric, scores_NC.numpy(), labels, found.texts)}


def _open_test(place: Path) -> Source:
    """The test split of a folder of any layout."""
    if (place / "test").is_dir():
        return open_source(place / "test")
    return open_source(place)


def _with_mean_recall(found: Judgement) -> Judgement:
    """With the mean of both directions' R@1; its interval is the mean of theirs, as if they rose and fell together."""
    one, other = found.metrics["image_to_text_R@1"], found.metrics["text_to_image_R@1"]
    low, high = ((a + b) / 2 for a, b in zip(one.ci95, other.ci95, strict=True))
    chance = (one.chance + other.chance) / 2 if one.chance is not None and other.chance is not None else None
    mean = Metric((one.value + other.value) / 2, one.count, (low, high), one.unit, chance)
    return replace(found, metrics={"mean_recall@1": mean} | found.metrics)


def macro_f1(targets: np.ndarray, predicted: np.ndarray, num_classes: int) -> Metric:
    """The mean over the classes that have pictures of F1 = 2 TP / (2 TP + FP + FN).

    Its interval is a bootstrap over pictures; its chance is that of uniform guesses: a class of share s has precision s and
    recall 1 / C.
    """
    draw = np.random.default_rng(BOOTSTRAP_SEED)
    count = len(targets)

    def value(rows: np.ndarray) -> float:
        right = np.bincount(targets[rows][targets[rows] == predicted[rows]], minlength=num_classes)
        there = np.bincount(targets[rows], minlength=num_classes)
        said = np.bincount(predicted[rows], minlength=num_classes)
        has = there > 0
        return float((2 * right[has] / (there[has] + said[has])).mean())

    found = value(np.arange(count))
    low, high = np.percentile([value(draw.integers(0, count, count)) for _ in range(RESAMPLES)], [2.5, 97.5])
    shares = np.bincount(targets, minlength=num_classes) / count
    shares = shares[shares > 0]
    chance = float((2 * shares / num_classes / (shares + 1 / num_classes)).mean())
    return Metric(found, count, (min(float(low), found), max(float(high), found)), "fraction", chance)
