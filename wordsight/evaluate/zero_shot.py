"""Zero-shot classification (CLIP, arXiv 2103.00020, section 3.1): the class whose prompt lies nearest to the picture.

Shape legend: N pictures, C classes, D embedding width, B rows of a block, K number of cut-offs, T templates, c some
classes, X what stands for a class: its vector, or its place.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from wordsight.data import Source
from wordsight.evaluate import metrics
from wordsight.evaluate.embedding import Embedded, embed_source, require_embedder
from wordsight.evaluate.metrics import Scores
from wordsight.evaluate.prompt_sets import PromptSet, places_of, read_classes, read_glosses, with_glosses
from wordsight.evaluate.prompts import class_embeddings, fill, prompt_embeddings, prompt_templates
from wordsight.evaluate.results import Judgement, Outcomes, fingerprint
from wordsight.evaluate.scoring import pair_scores
from wordsight.evaluate.sharing import ALONE, Processes, from_main, own_pieces, together
from wordsight.system import PairScorer
from wordsight.types import Metric

SCORES_IN_BLOCK = 1 << 23  # pictures x classes scored at once
ENSEMBLES = ("embeddings", "probabilities")
Classes = Sequence[str] | str | Path | PromptSet
Glosses = Mapping[str, str] | str | Path


@dataclass(frozen=True, kw_only=True)
class ZeroShot:
    """Classify pictures by the prompts of their class names: top-k accuracy, the mean per class, the worst-confused classes.

    Equal scores are ordered as in open_clip and CLIP_benchmark (`torch.topk`; argmax for the mean per class).

    Attributes:
        classes: what to choose from: names, a file with one a line, or a data set of the CLIP paper ("cifar10", see
            `prompt_sets`); default: the labels of the data, sorted. Classes that no sample has are allowed.
        prompts: "simple", "name", "imagenet80", another set, a file with one template a line, or templates; see
            `prompt_templates`.
        ensemble: "embeddings": a class is the mean of its prompts' unit vectors, as in the paper; "probabilities": each template
            makes a classifier of its own, and the mean of their softmax (at the model's scale) is ranked.
        glosses: label -> gloss, or a file of `name<TAB>gloss`: "crane" is asked for as "crane (bird)"; see
            `prompt_sets.with_glosses`.
        ks: the cut-offs of top-k accuracy.
        batch_size: pictures encoded at once.
        num_workers: processes that decode.
        reduced_decode: decode large JPEGs at a reduced scale, faster and a little different; the protocol says so. Published
            figures are measured without.
        progress: show progress bars.
    """

    classes: Classes | None = None
    prompts: str | Path | Sequence[str] = "simple"
    ensemble: Literal["embeddings", "probabilities"] = "embeddings"
    glosses: Glosses | None = None
    ks: tuple[int, ...] = (1, 5)
    batch_size: int = 64
    num_workers: int = 0
    reduced_decode: bool = False
    progress: bool = False

    def __post_init__(self) -> None:
        if self.ensemble not in ENSEMBLES:
            raise ValueError(f"ensemble must be one of {', '.join(ENSEMBLES)}, got {self.ensemble!r}")

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
        asked = ask(self.classes, self.glosses, embedded)
        texts_CX, scores = self._classifier(model, asked.classes, templates, world)
        correct_NK, predicted_N = answers(asked, embedded, texts_CX, scores, self.ks, world)
        prompts = self.prompts if isinstance(self.prompts, str | Path) else "given"
        protocol = asked.protocol(f"prompts {prompts} ({len(templates)})", templates, self.ensemble) + embedded.how
        classes, targets_N = asked.classes.classes, asked.targets.numpy()
        per_class_N = metrics.per_class_values(targets_N, predicted_N == targets_N)
        return Judgement(
            task="zero_shot",
            metrics=metrics.classification_metrics(targets_N, correct_NK, predicted_N, len(classes), self.ks),
            protocol=protocol,
            fingerprint=from_main(world, lambda: asked.fingerprint(model, embedded, (protocol, self.ks), templates)),
            embedded=embedded,
            rows=asked.rows.numpy(),
            row_groups=targets_N,
            hits=correct_NK[:, 0],
            texts=classes,
            texts_MD=texts_CX,
            scores=scores,
            text_groups=np.arange(len(classes)),
            confusions=worst_confused(targets_N, predicted_N, classes),
            notes=asked.notes(embedded) + (("scores are probabilities",) if self.ensemble == "probabilities" else ()),
            outcomes=(
                Outcomes(metric=f"top{self.ks[0]}", keys=asked.keys, values=correct_NK[:, 0].astype(np.float64)),
                Outcomes(metric="mean_per_class", keys=asked.keys, values=per_class_N),
            ),
        )

    def _classifier(self, model: Any, classes: PromptSet, templates: Sequence[str], world: Processes) -> tuple[Tensor, Scores]:
        """What stands for the classes, a row each, and what scores pictures with it."""
        make: Callable[..., Tensor] = class_embeddings if self.ensemble == "embeddings" else prompt_embeddings
        progress = self.progress and world.rank == 0
        vectors = make(model, classes.classes, templates, names=classes.names, progress=progress, world=world)
        if self.ensemble == "embeddings":
            return vectors, pair_scores(model)
        # a softmax needs all classes, so a class is but its place among them
        return torch.arange(len(vectors))[:, None], MeanProbabilities(model, vectors)


class MeanProbabilities:
    """Scores of pictures with some of the classes: the mean over templates of the softmax over all classes.

    Args:
        model: an Embedder; its `log_scale` is the softmax's.
        vectors_CTD: each class in each template.

    Raises:
        ValueError: a model without a scale.
    """

    def __init__(self, model: Any, vectors_CTD: Tensor) -> None:
        if getattr(model, "log_scale", None) is None:
            raise ValueError(f"{type(model).__name__} has no log_scale, so it gives no probabilities: ensemble embeddings")
        self._scores, self._scale = pair_scores(model), float(torch.as_tensor(model.log_scale).detach().float().exp())
        self._vectors_CTD = vectors_CTD if isinstance(model, PairScorer) else normalize(vectors_CTD, dim=-1)

    def __call__(self, images: Tensor, places_c1: Tensor) -> Tensor:
        """[N, D] or [N, K, D], and places of c classes: [N, c]."""
        by_template = self._vectors_CTD.unbind(1)
        total_NC = torch.zeros(len(images), len(self._vectors_CTD))
        for vectors_CD in by_template:
            total_NC += (self._scale * self._scores(images, vectors_CD)).softmax(dim=1)
        return total_NC[:, places_c1[:, 0]] / len(by_template)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What pictures are asked for.

    Attributes:
        classes: what to choose from.
        rows, targets: int64 [N], the rows of the pictures that have a label, and the places of their classes.
        keys: [N], their keys.
        how: by what labels of the data were known, see `prompt_sets.places_of`.
    """

    classes: PromptSet
    rows: Tensor
    targets: Tensor
    keys: tuple[str, ...]
    how: str

    def protocol(self, prompts: str, templates: Sequence[str], ensemble: str) -> str:
        """One line that says all of it."""
        several = len(templates) > 1 or any(len(names) > 1 for names in self.classes.names.values())
        parts = [f"zero-shot, {len(self.classes.classes)} classes", prompts]
        parts += [f"ensemble of {ensemble}"] if several else []
        parts += [f"names of {len(self.classes.names)} classes given"] if self.classes.names else []
        parts += [f"labels by {self.how}"] if self.how != "label" else []
        return ", ".join([*parts, "ties by topk"])

    def notes(self, embedded: Embedded) -> tuple[str, ...]:
        """What a reader should know of the data."""
        unlabelled = len(embedded) - len(self.rows)
        return (f"{unlabelled} pictures have no label and are left out",) if unlabelled else ()

    def fingerprint(self, model: Any, embedded: Embedded, protocol: tuple[Any, ...], templates: Sequence[str]) -> str:
        """See `results.fingerprint`."""
        classes = self.classes.classes
        names = [list(self.classes.names.get(label, (label,))) for label in classes]
        probes = [fill(templates[0], name) for several in names for name in several]
        probes += [fill(template, names[0][0]) for template in templates]
        told = (*protocol, classes, templates, *((names,) if self.classes.names else ()))
        return fingerprint(model, probes, embedded.listing, told)


def ask(classes: Classes | None, glosses: Glosses | None, embedded: Embedded) -> Asked:
    """Classes, and which of them each labelled picture is.

    Raises:
        ValueError: no picture has a label, or one that is no class, or there is one class alone; or see `prompt_sets`.
    """
    labels = {label for label in embedded.labels if label is not None}
    if not labels:
        raise ValueError(
            "no sample of the data has a label, so there is nothing to classify: use class folders or a table with a label column"
            ", or measure retrieval instead"
        )
    chosen = read_classes(sorted(labels) if classes is None else classes)
    place, how = places_of(labels, chosen)
    if len(chosen.classes) == 1:
        raise ValueError(
            f"one class alone, {chosen.classes[0]!r}: choosing among one is no question; give all that there are to choose from "
            "(classes)"
        )
    if glosses is not None:
        chosen = with_glosses(chosen, read_glosses(glosses))
    rows = [row for row, label in enumerate(embedded.labels) if label is not None]
    return Asked(
        classes=chosen,
        rows=torch.tensor(rows),
        targets=torch.tensor([place[embedded.labels[row] or ""] for row in rows]),
        keys=tuple(embedded.keys[row] for row in rows),
        how=how,
    )


def answers(
    asked: Asked, embedded: Embedded, texts_CX: Tensor, scores: Scores, ks: tuple[int, ...], world: Processes
) -> tuple[np.ndarray, np.ndarray]:
    """Whether each picture's class is among its k best, [N, K], and which class is best, [N]."""
    starts = range(0, len(asked.rows), max(1, SCORES_IN_BLOCK // len(texts_CX)))

    def work() -> dict[int, tuple[np.ndarray, np.ndarray]]:
        found = {}
        for k in own_pieces(world, len(starts)):
            block = slice(starts[k], starts[k] + starts.step)
            scores_BC = scores(embedded.images_ND[asked.rows[block]], texts_CX)
            correct_BK = metrics.topk_correct(scores_BC, asked.targets[block], ks)
            found[k] = correct_BK.numpy(), scores_BC.argmax(1).numpy()
        return found

    blocks = {k: block for part in together(world, work) for k, block in part.items()}
    correct_NK, predicted_N = (np.concatenate([blocks[k][i] for k in sorted(blocks)]) for i in range(2))
    return correct_NK, predicted_N


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
