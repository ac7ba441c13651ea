"""Figures of classification and retrieval with 95% intervals and chance, streamed: no N x M matrix is ever held.

Ties. A figure is the one that open_clip 3.3 and CLIP_benchmark 1.6 compute from the whole matrix of scores, equal scores
included. Both leave the order of equal scores to PyTorch, label-blind but not by index: to `torch.topk` (top-k accuracy of
both, recall@k of CLIP_benchmark; here ``ties="topk"``) or to `torch.argsort` (ranks and recall@k of open_clip; here
``ties="argsort"``). On the CPU both depend on the row alone, so rows where a tie touches the right answer are computed whole
and given to the same call; all other rows need only counting.

Shape legend: Q queries, C candidates or classes, D embedding width, B rows of a block, K number of cut-offs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from wordsight.evaluate.sharing import ALONE, Processes, own_pieces, together
from wordsight.types import Metric

Ties = Literal["topk", "argsort"]
Scores = Callable[[Tensor, Tensor], Tensor]  # queries, candidates -> float32 [Q, C] on the CPU

Z95 = 1.959963984540054  # the 97.5% point of the normal distribution
RESAMPLES = 1000
BOOTSTRAP_SEED = 0
WHOLE_ROWS_BYTES = 1 << 28  # rows with ties are computed whole, this many bytes of places at once


def score_block(queries_QD: Tensor, candidates_CD: Tensor) -> Tensor:
    """Inner products [Q, C] in float32, summed in float64 first.

    Two equal candidates then get equal scores wherever they fall in a block, which float32 matrix products do not promise: ties
    stay ties, and results do not depend on the block size.
    """
    return (queries_QD.double() @ candidates_CD.double().T).float()


# Classification


def topk_correct(scores_BC: Tensor, targets_B: Tensor, ks: Sequence[int] = (1, 5)) -> Tensor:
    """Whether the right class is among the k best, as open_clip's and CLIP_benchmark's `accuracy` decide it, ties included.

    Args:
        scores_BC: float scores of every class, whole rows.
        targets_B: int64 index of the right class.
        ks: cut-offs; one larger than the number of classes counts as that number.

    Returns:
        bool [B, K].
    """
    num_classes = scores_BC.shape[1]
    best_BK = scores_BC.topk(min(max(ks), num_classes), dim=1, largest=True, sorted=True).indices
    correct_BK = best_BK == targets_B[:, None]
    return torch.stack([correct_BK[:, :k].any(1) for k in ks], dim=1)


def mean_per_class(targets: np.ndarray, correct: np.ndarray, num_classes: int) -> float:
    """The mean over the classes that have samples of the share of their samples that is right (sklearn's balanced accuracy)."""
    counts, rights = _per_class(targets, correct, num_classes)
    return float(np.mean(rights[counts > 0] / counts[counts > 0]))


def _per_class(targets: np.ndarray, correct: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    counts = np.bincount(targets, minlength=num_classes)
    rights = np.bincount(targets, weights=correct.astype(float), minlength=num_classes)
    return counts, rights


def mean_per_class_interval(targets: np.ndarray, correct: np.ndarray, num_classes: int) -> tuple[float, float]:
    """Wilson's 95% interval of the mean per class, with Kish's effective number of samples.

    The mean per class is a weighted share: a sample of a class with n_c samples weighs 1 / (C n_c). Weighted samples count as
    (sum w)^2 / sum w^2 = C^2 / sum_c (1 / n_c) equal ones (Kish 1965), which is their number where classes are of one size. A
    bootstrap would give no width at all where every answer is right, and too little where classes have one sample each.
    """
    counts, _ = _per_class(targets, correct, num_classes)
    present = counts[counts > 0]
    effective = len(present) ** 2 / float(np.sum(1 / present))
    return wilson_interval(mean_per_class(targets, correct, num_classes) * effective, effective)


# Retrieval


@dataclass(frozen=True, slots=True)
class Ranking:
    """What became of each query that has an answer.

    Attributes:
        rows: [Q'] int64, the index of the query in what was given.
        ranks: [Q'] int64, place of its best right candidate, from 1, ties as `torch.argsort` orders them.
        hits: k -> [Q'] bool, whether a right candidate is among the k best, ties by the chosen rule.
        positives: [Q'] int64, how many candidates are right.
        num_candidates: C.
    """

    rows: np.ndarray
    ranks: np.ndarray
    hits: dict[int, np.ndarray]
    positives: np.ndarray
    num_candidates: int


class Answers:
    """Which candidates are right for a query: those of the same group."""

    def __init__(self, query_groups_Q: Tensor, candidate_groups_C: Tensor) -> None:
        self.order_C = torch.argsort(candidate_groups_C, stable=True)
        in_order = candidate_groups_C[self.order_C]
        self.first_Q = torch.searchsorted(in_order, query_groups_Q)
        self.count_Q = torch.searchsorted(in_order, query_groups_Q, right=True) - self.first_Q

    def pairs(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Each right pair of the queries `rows` once: (index into `rows`, candidate)."""
        counts = self.count_Q[rows]
        within = torch.arange(int(counts.sum())) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        return torch.repeat_interleave(counts), self.order_C[torch.repeat_interleave(self.first_Q[rows], counts) + within]

    def best_scores(self, rows: Tensor, queries_QD: Tensor, candidates_CD: Tensor) -> Tensor:
        """The score of each query's best right candidate; every query in `rows` has one."""
        queries_BD = queries_QD[rows].double()
        best_B = torch.full((len(rows),), -torch.inf)
        for i in range(int(self.count_Q[rows].max())):
            has = self.count_Q[rows] > i
            right = self.order_C[self.first_Q[rows[has]] + i]
            found = (queries_BD[has] * candidates_CD[right].double()).sum(1).float()
            best_B[has] = torch.maximum(best_B[has], found)
        return best_B

    def best_in_blocks(
        self, rows: Tensor, queries_Q: Tensor, candidates_C: Tensor, scores: Scores, candidate_block: int
    ) -> Tensor:
        """The same from the very blocks that are compared with it, for scores whose rounding may depend on the block."""
        best_B = torch.full((len(rows),), -torch.inf)
        right_rows, right_columns = self.pairs(rows)
        for block in torch.unique(right_columns // candidate_block).tolist():
            start = block * candidate_block
            here = right_columns // candidate_block == block
            scores_BC = scores(queries_Q[rows], candidates_C[start : start + candidate_block])
            found = scores_BC[right_rows[here], right_columns[here] - start]
            best_B.scatter_reduce_(0, right_rows[here], found, "amax")
        return best_B


def rank_queries(
    queries_QD: Tensor,
    candidates_CD: Tensor,
    query_groups: Tensor,
    candidate_groups: Tensor,
    *,
    ks: Sequence[int] = (1, 5, 10),
    ties: Ties = "topk",
    scores: Scores = score_block,
    query_block: int = 1024,
    candidate_block: int = 8192,
    world: Processes = ALONE,
) -> Ranking:
    """The place of each query's best right candidate among all candidates, block by block.

    A candidate is right for a query of its own group (the picture that a caption belongs to). A query hits at k when at least one
    right candidate is among its k best, the convention of the CLIP papers. Queries without a right candidate are left out;
    candidates that are right for no query stay as distractors. Memory: query_block x candidate_block scores, and some times
    256 MiB of whole rows where there are ties. Both directions of retrieval at once, and faster: `wordsight.evaluate.ranking`.

    Args:
        queries_QD, candidates_CD: float embeddings; with other `scores` any shape after the first axis.
        query_groups, candidate_groups: int64 [Q] and [C].
        ks: cut-offs.
        ties: the order of equal scores in `hits`, see the module's docstring.
        scores: of a block; inner products, or `wordsight.evaluate.scoring.pair_scores`.
        query_block, candidate_block: rows and columns held at once; they do not change the result (with `scores` of one's own,
            by rounding).
        world: the processes that share the blocks of queries; each gets the whole ranking.
    """
    if ties not in ("topk", "argsort"):
        raise ValueError(f"ties is 'topk' (as CLIP_benchmark) or 'argsort' (as open_clip), got {ties!r}")
    if not (torch.isfinite(queries_QD).all() and torch.isfinite(candidates_CD).all()):
        raise ValueError("infinite or undefined embeddings can not be ranked: a NaN would lose or win every comparison")
    answers = Answers(query_groups, candidate_groups)
    rows = torch.nonzero(answers.count_Q > 0).squeeze(1)
    ranker = Ranker(answers, queries_QD, candidates_CD, tuple(ks), ties, scores, candidate_block)
    starts = range(0, len(rows), query_block)

    def work() -> dict[int, tuple[np.ndarray, np.ndarray]]:
        return {k: ranker.rank(rows[starts[k] : starts[k] + query_block]) for k in own_pieces(world, len(starts))}

    found = {k: block for part in together(world, work) for k, block in part.items()}
    ranks = np.concatenate([found[k][0] for k in sorted(found)] or [np.zeros(0, np.int64)])
    hits_KQ = np.concatenate([found[k][1] for k in sorted(found)] or [np.zeros((len(ks), 0), bool)], axis=1)
    return Ranking(
        rows=rows.numpy(),
        ranks=ranks,
        hits=dict(zip(ks, hits_KQ, strict=True)),
        positives=answers.count_Q[rows].numpy(),
        num_candidates=len(candidates_CD),
    )


@dataclass(frozen=True, slots=True)
class Ranker:
    """Ranks the queries of a block among all candidates."""

    answers: Answers
    queries_Q: Tensor
    candidates_C: Tensor
    ks: tuple[int, ...]
    ties: Ties
    scores: Scores
    candidate_block: int

    def rank(self, block: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Places [B] and hits [K, B] of the queries `block`, each of which has a right candidate."""
        answers, size = self.answers, self.candidate_block
        if self.scores is score_block:
            best_B1 = answers.best_scores(block, self.queries_Q, self.candidates_C)[:, None]
        else:
            best_B1 = answers.best_in_blocks(block, self.queries_Q, self.candidates_C, self.scores, size)[:, None]
        right_rows, right_columns = answers.pairs(block)
        better, tied = np.zeros(len(block), np.int64), np.zeros(len(block), np.int64)
        for start in range(0, len(self.candidates_C), size):
            scores_BC = self.scores(self.queries_Q[block], self.candidates_C[start : start + size])
            here = (right_columns >= start) & (right_columns < start + size)
            scores_BC[right_rows[here], right_columns[here] - start] = -torch.inf  # only the others can be before it
            # NumPy counts booleans several times as fast as PyTorch sums them
            better += np.count_nonzero((scores_BC > best_B1).numpy(), axis=1)
            tied += np.count_nonzero((scores_BC == best_B1).numpy(), axis=1)
        ranks = torch.from_numpy(better + 1)
        hits_KB = torch.stack([ranks <= k for k in self.ks])
        contested = torch.from_numpy(np.flatnonzero(tied))
        for at in self.whole_rows(contested):
            ranks[at], hits_KB[:, at] = self.rank_whole(block[at])
        return ranks.numpy(), hits_KB.numpy()

    def whole_rows(self, queries: Tensor) -> list[Tensor]:
        """The queries in groups that may be ranked by whole rows at once."""
        groups = queries.split(max(1, WHOLE_ROWS_BYTES // (8 * len(self.candidates_C))))
        return [group for group in groups if len(group)]

    def rank_whole(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """The same from whole rows of scores, whose order PyTorch decides where they are equal."""
        size = self.candidate_block
        starts = range(0, len(self.candidates_C), size)
        blocks = [self.scores(self.queries_Q[queries], self.candidates_C[start : start + size]) for start in starts]
        scores_BC = torch.cat(blocks, dim=1)
        right_BC = torch.zeros(scores_BC.shape, dtype=torch.bool)
        right_BC[self.answers.pairs(queries)] = True
        ranks = right_BC.gather(1, torch.argsort(scores_BC, descending=True)).int().argmax(1) + 1
        hits = []
        for k in self.ks:
            if self.ties == "argsort":
                hits.append(ranks <= k)
            else:
                best_BK = torch.topk(scores_BC, min(k, len(self.candidates_C)), dim=1).indices
                hits.append(right_BC.gather(1, best_BK).any(1))
        return ranks, torch.stack(hits)


def recall_chance(num_candidates: int, positives: np.ndarray, k: int) -> float:
    """R@k of a random order: the mean over queries of 1 - C(N - p, k) / C(N, k) with p right candidates of N (hypergeometric)."""
    sizes, counts = np.unique(positives, return_counts=True)
    misses = np.ones(len(sizes))
    for i in range(min(k, num_candidates)):
        misses *= np.maximum(num_candidates - sizes - i, 0) / (num_candidates - i)
    return float(np.sum((1 - misses) * counts) / counts.sum())


def median_rank_chance(num_candidates: int, positives: np.ndarray) -> float:
    """The median place of the best right candidate in a random order: the smallest r whose mean P(rank <= r) is 1/2 or more."""
    low, high = 1, num_candidates
    while low < high:  # P grows with r
        middle = (low + high) // 2
        if _rank_cdf(num_candidates, positives, middle) >= 0.5:
            high = middle
        else:
            low = middle + 1
    return float(low)


def _rank_cdf(num_candidates: int, positives: np.ndarray, rank: int) -> float:
    sizes, counts = np.unique(positives, return_counts=True)
    total = 0.0
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        if rank > num_candidates - size:
            total += count
            continue
        # C(N - p, r) / C(N, r) = C(N - r, p) / C(N, p): a product of p factors, and p is small
        miss = math.prod((num_candidates - rank - i) / (num_candidates - i) for i in range(size))
        total += count * (1 - miss)
    return total / float(counts.sum())


def median_rank(ranks: np.ndarray) -> float:
    """floor(median), as open_clip reports it: between two middle places, the better one where they are neighbours."""
    return float(math.floor(np.median(ranks)))


# Intervals


def wilson_interval(successes: float, count: float, quantile: float = Z95) -> tuple[float, float]:
    """Wilson's 95% score interval of a proportion (1927): right at 0 and 1 and for small counts, where p +- 1.96 s.e. is not."""
    if count <= 0:
        raise ValueError(f"an interval needs at least one item, got {count}")
    share = successes / count
    scale = 1 + quantile**2 / count
    centre = (share + quantile**2 / (2 * count)) / scale
    half = quantile / scale * math.sqrt(share * (1 - share) / count + quantile**2 / (4 * count**2))
    # at 0 and 1 the bound is exactly 0 or 1; rounding must not put the value outside of its interval
    return max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share))


def median_rank_interval(ranks: np.ndarray, groups: np.ndarray | None = None) -> tuple[float, float]:
    """Percentile bootstrap (1000 resamples, seed 0) of the floor of the median, so the same ranks give the same interval.

    Args:
        ranks: [Q].
        groups: [Q] int64, queries that are drawn together (captions of one picture); None: each is drawn alone.
    """
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    order_Q = np.argsort(ranks, kind="stable")
    group_Q = order_Q if groups is None else np.unique(groups, return_inverse=True)[1][order_Q]
    number, medians = int(group_Q.max()) + 1, []
    for size in _chunks(len(ranks)):
        drawn_RG = generator.integers(0, number, (size, number)) + number * np.arange(size)[:, None]
        times_RG = np.bincount(drawn_RG.ravel(), minlength=size * number).reshape(size, number)
        upto_RQ = np.cumsum(times_RG[:, group_Q], axis=1)  # queries drawn of this rank or better
        total_R = upto_RQ[:, -1:]
        middle_2R = [(upto_RQ > place_R).argmax(1) for place_R in ((total_R - 1) // 2, total_R // 2)]
        medians.append(ranks[order_Q[middle_2R]].mean(0))
    low, high = np.percentile(np.floor(np.concatenate(medians)), [2.5, 97.5])
    return float(low), float(high)


def _chunks(row_size: int) -> Iterator[int]:
    """How many resamples to draw at once, RESAMPLES in all, so that about a million numbers are held."""
    step = max(1, (1 << 20) // row_size)
    for start in range(0, RESAMPLES, step):
        yield min(step, RESAMPLES - start)


def proportion(hits: np.ndarray, chance: float | None) -> Metric:
    """The share of hits with Wilson's interval."""
    count = len(hits)
    successes = int(hits.sum())
    return Metric(successes / count, count, wilson_interval(successes, count), "fraction", chance)


def per_class_values(targets: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """float64 [N], what each picture adds to the mean per class: their mean is that figure."""
    _, places_N, counts_C = np.unique(targets, return_inverse=True, return_counts=True)
    return np.asarray(correct, np.float64) * (len(targets) / (len(counts_C) * counts_C[places_N]))


def classification_metrics(
    targets: np.ndarray, correct_NK: np.ndarray, predicted: np.ndarray, num_classes: int, ks: Sequence[int]
) -> dict[str, Metric]:
    """top-k accuracy for each k and the mean per class.

    Args:
        targets: [N] index of the right class.
        correct_NK: [N, K] bool from `topk_correct`.
        predicted: [N] index of the best class (argmax), for the mean per class.
        num_classes: classes to choose from, those without samples included.
        ks: the cut-offs of `correct_NK`.
    """
    metrics = {f"top{k}": proportion(correct_NK[:, i], min(k, num_classes) / num_classes) for i, k in enumerate(ks)}
    correct = predicted == targets
    value = mean_per_class(targets, correct, num_classes)
    metrics["mean_per_class"] = Metric(
        value, len(targets), mean_per_class_interval(targets, correct, num_classes), "fraction", 1 / num_classes
    )
    return metrics
