"""Unseen drawing as a natural shift, on the embedded data: the same concepts as Noto and Fluent draw them, and as Twemoji does.

Models of the house are trained on Noto's and Fluent's drawings, never on Twemoji's. So there are two comparisons:

- *Trained concepts*: the seen side are the very pictures that such a model was trained on. The drop is what it learned of these
  pictures and can't carry over to another drawing, memory included.
- *Held-out concepts*: neither side was trained on, only the manner of drawing was seen. The drop is that of the drawing alone, at
  an accuracy that is far lower.

For a model that was trained elsewhere both are just two sets of pictures.

Shape legend: N concepts.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wordsight.evaluate.embedding import Embedded, embed_source, require_embedder
from wordsight.evaluate.intervals import paired_bootstrap, share_interval
from wordsight.evaluate.prompts import class_embeddings, fill, own_prompts, prompt_templates
from wordsight.evaluate.results import Finding, Outcomes, fingerprint
from wordsight.evaluate.scoring import pair_scores
from wordsight.types import Metric

# what a comparison is called -> its seen drawings, and the unseen one
COMPARISONS: dict[str, tuple[tuple[str, ...], str]] = {
    "trained": (("sample:train-noto", "sample:train-fluent"), "sample:test-twemoji-seen"),
    "heldout": (("sample:unseen-noto", "sample:unseen-fluent"), "sample:test-twemoji-unseen"),
}


@dataclass(frozen=True, kw_only=True)
class VendorShift:
    """Zero-shot accuracy in seen and in unseen drawings of the same concepts, paired by concept.

    Attributes:
        prompts: see `prompts.prompt_templates`; None: those that the model was trained for.
        batch_size: pictures encoded at once.
        num_workers: processes that decode.
        progress: show bars.
    """

    prompts: str | Path | None = None
    batch_size: int = 64
    num_workers: int = 0
    progress: bool = False

    def run(self, model: Any) -> dict[str, Metric]:
        """The figures alone; see `judge`."""
        return self.judge(model).metrics

    def judge(self, model: Any, *, cache: str | os.PathLike[str] | None = None) -> Finding:
        """For trained and for held-out concepts: `_seen_drawing_top1`, `_unseen_drawing_top1`, `_drop` and each vendor's top1.

        A concept that two vendors draw counts once, with the mean of both. Intervals are over groups of concepts that are drawn
        from one base (skin tones, clock faces).

        Args:
            model: an Embedder.
            cache: a folder that keeps features, see `embed_source`.
        """
        require_embedder(model)
        prompts = self.prompts if self.prompts is not None else own_prompts(model)
        templates = prompt_templates(prompts)
        metrics: dict[str, Metric] = {}
        outcomes: list[Outcomes] = []
        table: list[dict[str, Any]] = []
        listings, probes = [], []
        for name, (seen, unseen) in COMPARISONS.items():
            sets = [self._embed(model, spec, cache) for spec in (*seen, unseen)]
            classes = sorted({str(label) for label in sets[-1].labels})
            classes_CD = class_embeddings(model, classes, templates)
            rights = [_right(model, one, classes, classes_CD) for one in sets]
            found = _compare(name, [spec.rpartition("-")[2] for spec in seen], rights, _groups(sets[-1]), len(classes))
            metrics |= found.metrics
            outcomes += found.outcomes
            table += found.table
            listings += [one.listing for one in sets]
            probes += [fill(template, label) for label in classes for template in templates[:1]]
        protocol = (
            f"zero-shot of drawings, prompts {prompts} ({len(templates)}), classes of the unseen drawing, "
            "seen: noto and fluent (trained on by models of the house), unseen: twemoji"
        )
        return Finding(
            task="vendor_shift",
            metrics=metrics,
            protocol=protocol,
            fingerprint=fingerprint(model, probes, " ".join(listings), (protocol, templates)),
            outcomes=tuple(outcomes),
            table=table,
            notes=(
                "trained concepts in seen drawings are what models of the house were trained on: this side is no test",
                "Fluent's country flags are Noto's own drawings",
            ),
        )

    def _embed(self, model: Any, spec: str, cache: str | os.PathLike[str] | None) -> Embedded:
        return embed_source(
            model, spec, batch_size=self.batch_size, num_workers=self.num_workers, progress=self.progress, cache=cache
        )


def _groups(embedded: Embedded) -> dict[str, str]:
    """Concept -> its group."""
    samples = (embedded.source[position] for position in embedded.positions)
    return {str(sample.label): str(sample.meta["group"]) for sample in samples}


def _right(model: Any, embedded: Embedded, classes: list[str], classes_CD: torch.Tensor) -> dict[str, bool]:
    """Concept -> whether its picture is right, of those that are among the classes."""
    place = {name: i for i, name in enumerate(classes)}
    rows = [row for row, label in enumerate(embedded.labels) if label in place]
    predicted = pair_scores(model)(embedded.images_ND[rows], classes_CD).argmax(1).tolist()
    return {
        str(embedded.labels[row]): guess == place[str(embedded.labels[row])] for row, guess in zip(rows, predicted, strict=True)
    }


@dataclass(frozen=True, slots=True)
class _Compared:
    metrics: dict[str, Metric]
    outcomes: list[Outcomes]
    table: list[dict[str, Any]]


def _compare(
    name: str, vendors: list[str], rights: list[dict[str, bool]], group_of: dict[str, str], num_classes: int
) -> _Compared:
    """The figures of one comparison; the last of `rights` is the unseen drawing."""
    concepts = sorted(concept for concept in rights[-1] if any(concept in one for one in rights[:-1]))
    groups = tuple(group_of[concept] for concept in concepts)
    seen_N = np.array([np.mean([one[concept] for one in rights[:-1] if concept in one]) for concept in concepts])
    unseen_N = np.array([float(rights[-1][concept]) for concept in concepts])
    chance = 1 / num_classes

    def share(values_N: np.ndarray, groups_N: tuple[str, ...]) -> Metric:
        return Metric(float(values_N.mean()), len(values_N), share_interval(values_N, groups_N), "fraction", chance)

    metrics = {f"{name}_seen_drawing_top1": share(seen_N, groups), f"{name}_unseen_drawing_top1": share(unseen_N, groups)}
    paired = paired_bootstrap(seen_N, unseen_N, groups)
    metrics[f"{name}_drop"] = Metric(paired.difference, paired.count, paired.ci95, "fraction", 0.0)
    for vendor, one in zip(vendors, rights[:-1], strict=True):
        own = [concept for concept in concepts if concept in one]
        values = np.array([float(one[concept]) for concept in own])
        metrics[f"{name}_{vendor}_top1"] = share(values, tuple(group_of[concept] for concept in own))
    keys = tuple(f"{name}/{concept}" for concept in concepts)
    outcomes = [
        Outcomes(metric=f"{name}_seen_drawing_top1", keys=keys, values=seen_N, groups=groups),
        Outcomes(metric=f"{name}_unseen_drawing_top1", keys=keys, values=unseen_N, groups=groups),
    ]
    row = {
        "concepts": name,
        "count": len(concepts),
        "groups": len(set(groups)),
        "seen drawing": float(seen_N.mean()),
        "unseen drawing": float(unseen_N.mean()),
        "drop": paired.difference,
        "drop ci95": list(paired.ci95),
        "p value": paired.p_value,
    }
    return _Compared(metrics, outcomes, [row])
