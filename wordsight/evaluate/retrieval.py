"""Retrieval both ways: the captions of a picture among all captions, the picture of a caption among all pictures.

As in CLIP (arXiv 2103.00020, table 13): a query counts as found at k when at least one right answer is among its k best.
Shape legend: N pictures, M captions, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from wordsight.data import Source
from wordsight.evaluate import metrics
from wordsight.evaluate.embedding import Embedded, embed_source, embed_texts, require_embedder
from wordsight.evaluate.intervals import grouped_share
from wordsight.evaluate.ranking import rank_both
from wordsight.evaluate.results import Judgement, Outcomes, fingerprint
from wordsight.evaluate.scoring import pair_scores
from wordsight.evaluate.sharing import ALONE, Processes, from_main
from wordsight.types import Metric


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """R@k and median rank from pictures to captions and from captions to pictures, streamed in blocks.

    Each caption belongs to its own picture: the same words under another picture count as a distractor, as in the reference code.
    Pictures without captions are distractors too, and ask nothing.

    Attributes:
        ks: the cut-offs of R@k.
        captions: "all" of a picture, or its "first" alone.
        ties: the order of equal scores: "topk" as CLIP_benchmark, "argsort" as open_clip; see `wordsight.evaluate.metrics`.
        batch_size: pictures encoded at once.
        num_workers: processes that decode.
        reduced_decode: decode large JPEGs at a reduced scale, faster and a little different; the protocol says so. Published
            figures are measured without.
        progress: show progress bars.
    """

    ks: tuple[int, ...] = (1, 5, 10)
    captions: Literal["all", "first"] = "all"
    ties: metrics.Ties = "topk"
    batch_size: int = 64
    num_workers: int = 0
    reduced_decode: bool = False
    progress: bool = False

    def run(self, model: Any, data: Source | Embedded | str | Path) -> dict[str, Metric]:
        """`image_to_text_R@1`, ..., `text_to_image_median_rank`: the figures alone."""
        return self.judge(model, data).metrics

    def judge(self, model: Any, data: Source | Embedded | str | Path, *, world: Processes = ALONE) -> Judgement:
        """The figures with their protocol, fingerprint and what was found first for each query."""
        require_embedder(model)
        if self.captions not in ("all", "first"):
            raise ValueError(f"captions is 'all' or 'first', got {self.captions!r}")
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
        last = None if self.captions == "all" else 1
        pairs = [(row, text) for row, texts in enumerate(embedded.captions) for text in texts[:last]]
        if not pairs:
            raise ValueError(
                "no sample of the data has a caption, so there is nothing to retrieve: measure zero_shot, or add captions"
            )
        texts = tuple(text for _, text in pairs)
        texts_MD = embed_texts(model, texts, description="captions" if self.progress else None, world=world)
        owners_M, pictures_N = torch.tensor([row for row, _ in pairs]), torch.arange(len(embedded))
        scores = pair_scores(model)
        to_text, to_image = rank_both(
            embedded.images_ND, texts_MD, pictures_N, owners_M, ks=self.ks, ties=self.ties, scores=scores, world=world
        )
        silent = len(embedded) - len(to_text.rows)
        how = f"({self.captions}), ties by {self.ties}{embedded.how}"
        protocol = f"retrieval, {len(embedded)} pictures, {len(texts)} captions {how}"
        return Judgement(
            task="retrieval",
            metrics=ranking_metrics(to_text, "image_to_text")
            | ranking_metrics(to_image, "text_to_image", owners_M[torch.from_numpy(to_image.rows)].numpy()),
            protocol=protocol,
            fingerprint=from_main(world, lambda: fingerprint(model, texts, embedded.listing, (protocol, self.ks))),
            embedded=embedded,
            rows=to_text.rows,
            row_groups=to_text.rows,
            hits=to_text.ranks == 1,
            texts=texts,
            texts_MD=texts_MD,
            scores=scores,
            text_groups=owners_M.numpy(),
            notes=(f"{silent} pictures have no caption: they are distractors and ask nothing",) if silent else (),
            outcomes=_outcomes(embedded, pairs, to_text, to_image, self.ks[0]),
        )


def ranking_metrics(ranking: metrics.Ranking, prefix: str, groups: np.ndarray | None = None) -> dict[str, Metric]:
    """R@k for each k and the median rank of one direction, names with `prefix`.

    Args:
        ranking: Q queries.
        prefix: "image_to_text" or "text_to_image".
        groups: [Q] int64, queries of one group (captions of a picture) are no independent questions, so that intervals are
            over groups; None, or groups of one query each: each query stands for itself.
    """
    if groups is not None and len(np.unique(groups)) == len(groups):
        groups = None
    found = {}
    for k, hits in ranking.hits.items():
        chance = metrics.recall_chance(ranking.num_candidates, ranking.positives, k)
        share = metrics.proportion(hits, chance) if groups is None else grouped_share(hits, groups.tolist(), chance)
        found[f"{prefix}_R@{k}"] = share
    found[f"{prefix}_median_rank"] = Metric(
        metrics.median_rank(ranking.ranks),
        len(ranking.ranks),
        metrics.median_rank_interval(ranking.ranks, groups),
        "rank",
        metrics.median_rank_chance(ranking.num_candidates, ranking.positives),
    )
    return found


def _outcomes(
    embedded: Embedded, pairs: Sequence[tuple[int, str]], to_text: metrics.Ranking, to_image: metrics.Ranking, k: int
) -> tuple[Outcomes, ...]:
    """Hits at k of each picture and of each caption; the captions of a picture are no independent questions."""
    pictures = tuple(embedded.keys[row] for row in to_text.rows.tolist())
    asked = [pairs[row] for row in to_image.rows.tolist()]
    return (
        Outcomes(metric=f"image_to_text_R@{k}", keys=pictures, values=to_text.hits[k].astype(np.float64)),
        Outcomes(
            metric=f"text_to_image_R@{k}",
            keys=tuple(f"{embedded.keys[row]} {text}" for row, text in asked),
            values=to_image.hits[k].astype(np.float64),
            groups=tuple(embedded.keys[row] for row, _ in asked),
        ),
    )
