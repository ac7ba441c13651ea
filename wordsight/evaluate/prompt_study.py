"""How much the wording of prompts moves a zero-shot figure (CLIP, arXiv 2103.00020, section 3.1.4): `--prompts study`.

Each template alone, ensembles of more and more of them in random orders, both ways of ensembling, and glosses for names of
several senses. Every class is encoded in every template once; all else is means of these vectors.

The best template of a study was chosen by looking at the test figures. It shows how far wording reaches; it is no figure of the
model.

Shape legend: N pictures, C classes, T templates, R orders, D embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wordsight.data import Source
from wordsight.evaluate.embedding import Embedded, embed_source, require_embedder
from wordsight.evaluate.intervals import bootstrap_interval, share_interval
from wordsight.evaluate.metrics import Z95
from wordsight.evaluate.prompt_sets import GLOSS_FORM, PromptSet, is_set, read_glosses, with_glosses
from wordsight.evaluate.prompts import ensembled, prompt_embeddings, prompt_templates
from wordsight.evaluate.results import Finding, Outcomes
from wordsight.evaluate.scoring import pair_scores
from wordsight.evaluate.sharing import ALONE, Processes, from_main
from wordsight.evaluate.zero_shot import Asked, Classes, Glosses, MeanProbabilities, answers, ask
from wordsight.types import Metric

COMMA_FORM = "{label}, {gloss}"


@dataclass(frozen=True, kw_only=True)
class PromptStudy:
    """Top-1 accuracy of each template alone, of ensembles, and with glosses.

    Attributes:
        classes, glosses: as of `ZeroShot`; with glosses the ensemble is measured with and without them, as "crane (bird)" and as
            "crane, bird".
        prompts: the templates, at least two, see `prompt_templates`; default: those of the data set that `classes` names, else
            the 80 of ImageNet, and in both cases "a photo of a {label}." and "{label}" beside them.
        orders: R random orders in which templates are added.
        seed: of the orders.
        batch_size: pictures encoded at once.
        progress: show progress bars.
    """

    classes: Classes | None = None
    prompts: str | Path | Sequence[str] | None = None
    glosses: Glosses | None = None
    orders: int = 20
    seed: int = 0
    batch_size: int = 64
    progress: bool = False

    def __post_init__(self) -> None:
        if self.orders < 2:
            raise ValueError(f"orders must be at least 2, so that they can differ, got {self.orders}")

    def templates(self) -> tuple[str, ...]:
        """The templates that are compared, each once.

        Raises:
            ValueError: fewer than two; or see `prompt_templates`.
        """
        if self.prompts is not None:
            found = prompt_templates(self.prompts)
        else:
            own = self.classes if isinstance(self.classes, str) and is_set(self.classes) else "imagenet80"
            found = (*prompt_templates(own), "a photo of a {label}.", "{label}")
        found = tuple(dict.fromkeys(found))
        if len(found) < 2:
            raise ValueError(f"a study compares templates, and there is only {found[0]!r}: give two or more, or leave them out")
        return found

    def run(self, model: Any, data: Source | Embedded | str | Path) -> dict[str, Metric]:
        """The figures alone."""
        return self.judge(model, data).metrics

    def judge(self, model: Any, data: Source | Embedded | str | Path, *, world: Processes = ALONE) -> Finding:
        """The figures; `table` has a row for each template, number of templates, ensemble and way of glossing."""
        require_embedder(model)
        templates = self.templates()
        embedded = (
            data
            if isinstance(data, Embedded)
            else embed_source(model, data, batch_size=self.batch_size, progress=self.progress, world=world)
        )
        embedded.require_projected()
        asked = ask(self.classes, None, embedded)
        if len(asked.rows) < 2:
            raise ValueError("one labelled picture alone says nothing of how wording moves a figure: give more")
        glosses = None if self.glosses is None else read_glosses(self.glosses)
        forms = {} if glosses is None else {form: with_glosses(asked.classes, glosses, form) for form in (GLOSS_FORM, COMMA_FORM)}
        study = _Study(model, asked, embedded, templates, self, world)
        rows = [*study.ensembles(), *(row for form, classes in forms.items() for row in study.glossed(form, classes))]
        rows += [*study.growing(), *study.singles()]
        named = "given" if self.prompts is not None and not isinstance(self.prompts, str | Path) else self.prompts or "default"
        protocol = asked.protocol(f"prompts {named} ({len(templates)})", templates, "embeddings")
        protocol = f"prompt study: {protocol}, {self.orders} random orders, seed {self.seed}" + (
            f", glosses for {len(glosses)} classes" if glosses else ""
        )
        told = (protocol + embedded.how, *((sorted(glosses.items()),) if glosses else ()))
        return Finding(
            task="prompt_study",
            metrics={name: metric for row in rows for name, metric in row.metrics()},
            protocol=protocol + embedded.how,
            fingerprint=from_main(world, lambda: asked.fingerprint(model, embedded, told, templates)),
            outcomes=tuple(Outcomes(metric=row.name, keys=asked.keys, values=row.shares_N) for row in rows if row.is_outcome),
            table=[row.cells() for row in rows],
            notes=(
                *asked.notes(embedded),
                "the best template is chosen by the figures it is shown with: it says how far wording reaches, not how good the "
                "model is",
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """A figure of the study.

    Attributes:
        name: of the metric.
        kind: "ensemble", "gain", "templates" (of so many), "template" (one).
        prompt: what is asked, for a reader.
        templates: of how many templates.
        metric: the accuracy, or the gain.
        shares_N: float64 [N], how often each picture is right over what the figure averages.
        step: the gain per template since the row before, of a growing ensemble.
    """

    name: str
    kind: str
    prompt: str
    templates: int
    metric: Metric
    shares_N: np.ndarray
    step: Metric | None = None

    @property
    def is_outcome(self) -> bool:
        """Whether two models can be compared picture by picture in it."""
        return self.kind in ("ensemble", "template")

    def metrics(self) -> list[tuple[str, Metric]]:
        """Its figures, named."""
        further = [] if self.step is None else [(f"gain_per_template_to_{self.templates}", self.step)]
        return [(self.name, self.metric), *further]

    def cells(self) -> dict[str, Any]:
        """A row of the table."""
        low, high = self.metric.ci95
        return {
            "kind": self.kind,
            "prompt": self.prompt,
            "templates": self.templates,
            "value": self.metric.value,
            "low": low,
            "high": high,
            "per_added_template": None if self.step is None else self.step.value,
            "per_added_low": None if self.step is None else self.step.ci95[0],
            "per_added_high": None if self.step is None else self.step.ci95[1],
        }


class _Study:
    """The vectors of all classes in all templates, and who is right with what is made of them."""

    def __init__(
        self, model: Any, asked: Asked, embedded: Embedded, templates: tuple[str, ...], settings: PromptStudy, world: Processes
    ) -> None:
        self._model, self._asked, self._embedded, self._world = model, asked, embedded, world
        self._templates, self._settings = templates, settings
        self._chance = 1 / len(asked.classes.classes)
        self._vectors_CTD = self._encode(asked.classes.classes, asked.classes)
        self._ensemble_N = self._right(ensembled(model, self._vectors_CTD))
        single_TN = np.stack([self._right(ensembled(model, self._vectors_CTD[:, [i]])) for i in range(len(templates))])
        self._single_TN = single_TN

    def ensembles(self) -> list[_Row]:
        """All templates, both ways, against the mean of one."""
        count = len(self._templates)
        places_C1 = torch.arange(len(self._vectors_CTD))[:, None]
        answered = answers(
            self._asked, self._embedded, places_C1, MeanProbabilities(self._model, self._vectors_CTD), (1,), self._world
        )
        probable_N = answered[0][:, 0].astype(np.float64)
        rows = [
            self._row("ensemble_of_embeddings", "ensemble", "all, mean of embeddings", count, self._ensemble_N),
            self._row("ensemble_of_probabilities", "ensemble", "all, mean of probabilities", count, probable_N),
            self._gain("gain_of_embeddings", "all over one, embeddings", self._ensemble_N, self._single_TN.mean(0)),
            self._gain("gain_of_probabilities", "all over one, probabilities", probable_N, self._single_TN.mean(0)),
        ]
        return rows

    def glossed(self, form: str, classes: PromptSet) -> list[_Row]:
        """The ensemble of embeddings with glosses, and what they gain."""
        changed = [i for i, label in enumerate(classes.classes) if label in (classes.names or {})]
        vectors_CTD = self._vectors_CTD.clone()
        vectors_CTD[changed] = self._encode([classes.classes[i] for i in changed], classes)
        right_N = self._right(ensembled(self._model, vectors_CTD))
        name = "in_parentheses" if form == GLOSS_FORM else "after_a_comma"
        shown = form.replace("{label}", "name").replace("{gloss}", "gloss")
        return [
            self._row(f"glosses_{name}", "ensemble", f"all, {shown}", len(self._templates), right_N),
            self._gain(f"gain_of_glosses_{name}", f"{shown} over name", right_N, self._ensemble_N),
        ]

    def growing(self) -> list[_Row]:
        """Ensembles of 1, 2, 3, 4, 6, 8, 12, ... templates: the mean over orders, and what each added template gained.

        One template is the mean over all of them, and all of them are one ensemble: these two need no orders.
        """
        count = len(self._templates)
        rows: list[_Row] = []
        last_RN = self._single_TN
        for number, right_RN in self._by_number():
            name = "one_template" if number == 1 else f"{number}_templates"
            row = self._row(name, "templates", f"{number} of {count}", number, right_RN.mean(0), self._error(right_RN))
            if rows:
                added = number - rows[-1].templates
                gain_N = (right_RN.mean(0) - last_RN.mean(0)) / added
                value = float(gain_N.mean())
                interval = _widened(value, bootstrap_interval(gain_N), self._error(right_RN, last_RN) / added)
                row = replace(row, step=Metric(value, len(gain_N), interval))
            rows.append(row)
            last_RN = right_RN
        return rows

    def _error(self, right_RN: np.ndarray, before_RN: np.ndarray | None = None) -> float:
        """Half the width of the interval that is due to the draw of the orders alone, of accuracies or of their difference.

        Only what was drawn has one: all single templates, and all templates together, are no sample.
        """
        means = [given.mean(1) for given in (right_RN, before_RN) if given is not None and self._is_drawn(given)]
        if not means:
            return 0.0
        drawn_R = means[0] - means[1] if len(means) == 2 else means[0]
        return Z95 * float(drawn_R.std(ddof=1)) / math.sqrt(len(drawn_R))

    def _is_drawn(self, right_RN: np.ndarray) -> bool:
        return right_RN is not self._single_TN and len(right_RN) > 1

    def singles(self) -> list[_Row]:
        """Each template alone, the best first."""
        value_T = self._single_TN.mean(1)
        order = np.lexsort((np.arange(len(value_T)), -value_T)).tolist()
        return [
            self._row(f'template "{self._templates[i]}"', "template", self._templates[i], 1, self._single_TN[i]) for i in order
        ]

    def _by_number(self) -> Iterator[tuple[int, np.ndarray]]:
        """(how many templates, [R, N] who is right with each order's first ones)."""
        count = len(self._templates)
        draw = np.random.default_rng(self._settings.seed)
        order_RT = np.stack([draw.permutation(count) for _ in range(self._settings.orders)])
        for number in steps(count):
            if number == 1:
                yield number, self._single_TN
            elif number == count:
                yield number, self._ensemble_N[None]
            else:
                means = (ensembled(self._model, self._vectors_CTD[:, order_T[:number].tolist()]) for order_T in order_RT)
                yield number, np.stack([self._right(mean_CD) for mean_CD in means])

    def _encode(self, labels: Sequence[str], classes: PromptSet) -> Tensor:
        progress = self._settings.progress and self._world.rank == 0
        return prompt_embeddings(self._model, labels, self._templates, names=classes.names, progress=progress, world=self._world)

    def _right(self, classes_CD: Tensor) -> np.ndarray:
        """float64 [N], 1 where the nearest class is the right one."""
        correct_N1, _ = answers(self._asked, self._embedded, classes_CD, pair_scores(self._model), (1,), self._world)
        return correct_N1[:, 0].astype(np.float64)

    def _row(self, name: str, kind: str, prompt: str, templates: int, shares_N: np.ndarray, error: float = 0.0) -> _Row:
        """An accuracy with its interval over pictures, widened by the error of what was drawn."""
        value = float(shares_N.mean())
        low, high = _widened(value, share_interval(shares_N), error)
        metric = Metric(value, len(shares_N), (max(0.0, low), min(1.0, high)), "fraction", self._chance)
        return _Row(name=name, kind=kind, prompt=prompt, templates=templates, metric=metric, shares_N=shares_N)

    def _gain(self, name: str, prompt: str, right_N: np.ndarray, before_N: np.ndarray) -> _Row:
        """A difference of accuracies on the same pictures."""
        gain_N = right_N - before_N
        metric = Metric(float(gain_N.mean()), len(gain_N), bootstrap_interval(gain_N))
        return _Row(name=name, kind="gain", prompt=prompt, templates=len(self._templates), metric=metric, shares_N=gain_N)


def steps(count: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ... up to a number of templates, and that number."""
    doubles = [2**i for i in range(count.bit_length() + 1)]
    between = [3 * 2**i for i in range(count.bit_length())]
    return sorted({number for number in (*doubles, *between) if number < count} | {count})


def _widened(value: float, interval: tuple[float, float], error: float) -> tuple[float, float]:
    """An interval with a further, independent error of that half-width."""
    low, high = interval
    return value - math.hypot(value - low, error), value + math.hypot(high - value, error)
