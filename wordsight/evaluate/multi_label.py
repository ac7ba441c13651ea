"""Zero-shot on pictures that show several classes: mean average precision, over classes and over the order of all pictures.

Shape legend: N pictures, C classes, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wordsight.data import Source
from wordsight.evaluate.embedding import Embedded, embed_source, require_embedder
from wordsight.evaluate.metrics import proportion, recall_chance
from wordsight.evaluate.prompt_sets import PromptSet, own_classes, places_of, read_classes
from wordsight.evaluate.prompts import class_embeddings, fill, prompt_templates
from wordsight.evaluate.results import Finding, Outcomes, fingerprint
from wordsight.evaluate.scoring import pair_scores
from wordsight.evaluate.sharing import ALONE, Processes, from_main
from wordsight.evaluate.task_metrics import mean_average_precision
from wordsight.types import Metric


def shows_several(source: Any) -> bool:
    """Whether the samples of a source have several labels, as `meta["labels"]`."""
    return getattr(source, "kind", None) == "multilabel"


@dataclass(frozen=True, kw_only=True)
class MultiLabel:
    """How well the pictures of each class are found among all, by the score of its name.

    Attributes:
        classes: see `prompt_sets.read_classes`; None: those that the data say they have.
        prompts: see `prompt_templates`.
        batch_size: pictures encoded at once.
        num_workers: processes that decode.
        progress: show bars.
    """

    classes: str | Path | Sequence[str] | PromptSet | None = None
    prompts: str | Path | Sequence[str] = "simple"
    batch_size: int = 64
    num_workers: int = 0
    progress: bool = False

    def run(self, model: Any, data: Source | Embedded | str | Path) -> dict[str, Metric]:
        """`map`, `map_11_point` and `top1_any`: the figures alone."""
        return self.judge(model, data).metrics

    def judge(self, model: Any, data: Source | Embedded | str | Path, *, world: Processes = ALONE) -> Finding:
        """Mean average precision, full and VOC2007's; and the share of pictures whose best class is one of theirs.

        Args:
            model: an Embedder.
            data: whose samples have several labels (`shows_several`), e.g. CLIP_benchmark's multilabel folders.
            world: the processes that share the pictures.

        Raises:
            ValueError: data of one label a picture, labels that are no classes, or a class without pictures.
        """
        require_embedder(model)
        embedded = self._embedded(model, data, world)
        embedded.require_projected()
        source: Any = embedded.source
        if not shows_several(source):
            raise ValueError("the data have one label a picture or none: measure them by ZeroShot")
        templates = prompt_templates(self.prompts)
        given = [source[position].meta["labels"] for position in embedded.positions]
        classes = own_classes(source) if self.classes is None else self.classes
        if classes is None:
            raise ValueError("the data say no classes: give them (classes)")
        chosen = read_classes(classes)
        place, how = places_of({label for labels in given for label in labels}, chosen)
        shown = [{chosen.classes[place[label]] for label in labels} for labels in given]
        vectors_CD = class_embeddings(
            model, chosen.classes, templates, names=chosen.names, progress=self.progress and world.rank == 0, world=world
        )
        scores_NC = pair_scores(model)(embedded.images_ND, vectors_CD).numpy()
        best = zip(scores_NC.argmax(1).tolist(), shown, strict=True)
        hits_N = np.array([chosen.classes[guess] in labels for guess, labels in best])
        named = self.prompts if isinstance(self.prompts, str | Path) else "given"
        protocol = (
            f"zero-shot, several labels a picture, {len(chosen.classes)} classes, prompts {named} ({len(templates)})"
            + (f", names of {len(chosen.names)} classes given" if chosen.names else "")
            + (f", labels by {how}" if how != "label" else "")
            + embedded.how
        )
        probes = [fill(template, name) for template in templates for name in chosen.classes]
        told = (protocol, chosen.classes, templates, sorted(chosen.names.items()), given)  # the listing has one label a picture
        return Finding(
            task="zero_shot",
            metrics={
                "map": mean_average_precision(scores_NC, shown, chosen.classes),
                "map_11_point": mean_average_precision(scores_NC, shown, chosen.classes, eleven_point=True),
                "top1_any": proportion(hits_N, recall_chance(len(chosen.classes), np.array([len(one) for one in shown]), 1)),
            },
            protocol=protocol,
            fingerprint=from_main(world, lambda: fingerprint(model, probes, embedded.listing, told)),
            outcomes=(Outcomes(metric="top1_any", keys=embedded.keys, values=hits_N.astype(np.float64)),),
        )

    def _embedded(self, model: Any, data: Source | Embedded | str | Path, world: Processes) -> Embedded:
        if isinstance(data, Embedded):
            return data
        return embed_source(
            model, data, batch_size=self.batch_size, num_workers=self.num_workers, progress=self.progress, world=world
        )
