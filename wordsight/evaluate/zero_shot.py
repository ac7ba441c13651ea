"""Zero-shot classification (CLIP, arXiv 2103.00020, section 3.1): the class whose prompt lies nearest to the picture.

Shape legend: N pictures, C classes, D embedding width, B rows of a block, K number of cut-offs.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wordsight.data import Source
from wordsight.evaluate import metrics
from wordsight.evaluate.embedding import Embedded, embed_source, require_embedder
from wordsight.evaluate.prompts import class_embeddings, fill, prompt_templates
from wordsight.evaluate.results import Judgement, Outcomes, fingerprint
from wordsight.evaluate.scoring import pair_scores
from wordsight.evaluate.sharing import ALONE, Processes, from_main, own_pieces, together
from wordsight.types import Metric

SCORES_IN_BLOCK = 1 << 23  # pictures x classes scored at once


@dataclass(frozen=True, kw_only=True)
class ZeroShot:
    """Classify pictures by the prompts of their class names: top-k accuracy, the mean per class, the worst-confused classes.

    Equal scores are ordered as in open_clip and CLIP_benchmark (`torch.topk`; argmax for the mean per class).

    Attributes:
        classes: what to choose from; default: the labels of the data, sorted. Classes that no sample has are allowed.
        prompts: "simple", "name", "imagenet80", a file with one template a line, or templates; see `prompt_templates`.
        ks: the cut-offs of top-k accuracy.
        batch_size: pictures encoded at once.
        num_workers: processes that decode.
        reduced_decode: decode large JPEGs at a reduced scale, faster and a little different; the protocol says so. Published
            figures are measured without.
        progress: show progress bars.
    """

    classes: Sequence[str] | None = None
    prompts: str | Path | Sequence[str] = "simple"
    ks: tuple[int, ...] = (1, 5)
    batch_size: int = 64
    num_workers: int = 0
    reduced_decode: bool = False
    progress: bool = False

    def run(self, model: Any, data: Source | Embedded | str | Path) -> dict[str, Metric]:
        """`top1`, `top5`, `mean_per_class`: the figures alone."""
        return self.judge(model, data).metrics

    def judge(self, model: Any, data: Source | Embedded | str | Path, *, world: Processes = ALONE) -> Judgement:
        """The figures with their protocol, fingerprint, confusions and what each picture was taken for."""
        require_embedder(model)
        templates = prompt_templates(self.prompts)
        embedded = (
            data
            if isinstance(data, Embedded)
            else embed_source(
                model,
                data,
                batch_size=self.batch_size,
                num_workers=self.num_workers,
                reduced_decode=self.reduced_decode,
                progress=self.progress,
                world=world,
            )
        )
        embedded.require_projected()
        classes = _classes(self.classes, embedded)
        rows, targets = _targets(classes, embedded)
        classes_CD = class_embeddings(model, classes, templates, progress=self.progress and world.rank == 0, world=world)

        scores = pair_scores(model)
        starts = range(0, len(rows), max(1, SCORES_IN_BLOCK // len(classes)))

        def work() -> dict[int, tuple[np.ndarray, np.ndarray]]:
            found = {}
            for k in own_pieces(world, len(starts)):
                block = slice(starts[k], starts[k] + starts.step)
                scores_BC = scores(embedded.images_ND[rows[block]], classes_CD)
                correct_BK = metrics.topk_correct(scores_BC, targets[block], self.ks)
                found[k] = correct_BK.numpy(), scores_BC.argmax(1).numpy()
            return found

        blocks = {k: block for part in together(world, work) for k, block in part.items()}
        correct_NK = np.concatenate([blocks[k][0] for k in sorted(blocks)])
        predicted_N = np.concatenate([blocks[k][1] for k in sorted(blocks)])
        prompts = self.prompts if isinstance(self.prompts, str | Path) else "given"
        protocol = f"zero-shot, {len(classes)} classes, prompts {prompts} ({len(templates)}), ties by topk{embedded.how}"
        probes = [fill(templates[0], name) for name in classes] + [fill(template, classes[0]) for template in templates]
        unlabelled = len(embedded) - len(rows)
        return Judgement(
            task="zero_shot",
            metrics=metrics.classification_metrics(targets.numpy(), correct_NK, predicted_N, len(classes), self.ks),
            protocol=protocol,
            fingerprint=from_main(
                world, lambda: fingerprint(model, probes, embedded.listing, (protocol, self.ks, classes, templates))
            ),
            embedded=embedded,
            rows=rows.numpy(),
            row_groups=targets.numpy(),
            hits=correct_NK[:, 0],
            texts=tuple(classes),
            texts_MD=classes_CD,
            scores=scores,
            text_groups=np.arange(len(classes)),
            confusions=worst_confused(targets.numpy(), predicted_N, classes),
            notes=(f"{unlabelled} pictures have no label and are left out",) if unlabelled else (),
            outcomes=(
                Outcomes(
                    metric=f"top{self.ks[0]}",
                    keys=tuple(embedded.keys[row] for row in rows.tolist()),
                    values=correct_NK[:, 0].astype(np.float64),
                ),
            ),
        )


def _classes(given: Sequence[str] | None, embedded: Embedded) -> list[str]:
    labels = {label for label in embedded.labels if label is not None}
    if not labels:
        raise ValueError(
            "no sample of the data has a label, so there is nothing to classify: use class folders or a table with a label column"
            ", or measure retrieval instead"
        )
    if given is None:
        return sorted(labels)
    classes = list(given)
    twice = [name for name, count in Counter(classes).items() if count > 1]
    if twice:
        raise ValueError(f"class names must be unique; these come twice or more: {', '.join(map(repr, twice[:10]))}")
    unknown = sorted(labels - set(classes))
    if unknown:
        raise ValueError(
            f"{len(unknown)} labels of the data are not among the {len(classes)} given classes, e.g. "
            f"{', '.join(map(repr, unknown[:10]))}: add them, or the accuracy would silently be of another set"
        )
    return classes


def _targets(classes: list[str], embedded: Embedded) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that have a label, and the index of their class."""
    index = {name: i for i, name in enumerate(classes)}
    rows = [row for row, label in enumerate(embedded.labels) if label is not None]
    return torch.tensor(rows), torch.tensor([index[embedded.labels[row] or ""] for row in rows])


def worst_confused(targets: np.ndarray, predicted: np.ndarray, classes: Sequence[str], limit: int = 20) -> list[dict[str, Any]]:
    """The classes with the lowest accuracy and what they are taken for, without a C x C matrix.

    Order: lowest accuracy first, then most samples, then class order. Classes without a mistake are not listed.

    Returns:
        at most `limit` of {label, count, right, taken_for: [[name, count], ...]} with up to 3 names.
    """
    taken: defaultdict[int, Counter[int]] = defaultdict(Counter)
    for target, guess in zip(targets.tolist(), predicted.tolist(), strict=True):
        taken[target][guess] += 1
    rows = [
        (guesses[target] / guesses.total(), -guesses.total(), target)
        for target, guesses in taken.items()
        if guesses[target] < guesses.total()
    ]
    worst = []
    for _, _, target in sorted(rows)[:limit]:
        guesses = taken[target]
        wrong = sorted(((-count, guess) for guess, count in guesses.items() if guess != target))[:3]
        worst.append(
            {
                "label": classes[target],
                "count": guesses.total(),
                "right": guesses[target],
                "taken_for": [[classes[guess], -count] for count, guess in wrong],
            }
        )
    return worst
