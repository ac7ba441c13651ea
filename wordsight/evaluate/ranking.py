"""Retrieval in both directions from one pass over the scores: tile by tile, exact, ties by the rules of `metrics`.

A rank is counted: how many wrong candidates score above the query's best right one. So nothing is sorted, and a tile of scores
serves its pictures' ranks among texts and its texts' ranks among pictures. Tiles are float32 products. What they may be wrong by
is bounded (for any order of summation, |computed - exact| <= n u / (1 - n u) |x| |y|, with u = 2^-24: Higham, Accuracy and
Stability of Numerical Algorithms, section 3.1), and the few scores that lie within this bound of the right one's are computed
again in float64. The result is that of `metrics.rank_queries`, which computes all in float64, to the last rank.

Shape legend: N pictures, M texts, D embedding width, Q queries of one side, R and C rows and columns of a tile, S rows of a
stripe, W columns of its flags, P pairs, K cut-offs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from wordsight.evaluate.metrics import Answers, Ranker, Ranking, Scores, Ties, rank_queries, score_block
from wordsight.evaluate.scoring import from_texts
from wordsight.evaluate.sharing import ALONE, Processes, own_pieces, together

STRIPE = 64  # rows of a tile that are counted at once: with 8,192 columns 2 MiB of scores, which stay in a processor's cache
WORDS = 128  # 8 flags are added at once, in bytes that hold up to 255
ROWS_AT_ONCE = 2048  # vectors looked at together
PAIRS_AT_ONCE = 512  # vectors held as float64 on either side: 2 MiB at D = 512, which stay in a processor's cache
CROWDED = 32  # where more than one in so many scores of a stripe is open, all of it is computed again: they lie close together
MOST = 1e37  # |x| |y| beyond which float32 products may overflow


def rank_both(
    images_ND: Tensor,
    texts_MD: Tensor,
    image_groups: Tensor,
    text_groups: Tensor,
    *,
    ks: Sequence[int] = (1, 5, 10),
    ties: Ties = "topk",
    scores: Scores = score_block,
    image_block: int = 1024,
    text_block: int = 8192,
    world: Processes = ALONE,
) -> tuple[Ranking, Ranking]:
    """The place of each picture's best right text among all texts, and of each text's best right picture among all pictures.

    What is right, who is left out and who distracts is as in `metrics.rank_queries`.

    Args:
        images_ND, texts_MD: float embeddings; with other `scores` any shape after the first axis.
        image_groups, text_groups: int64 [N] and [M]; a picture and a text belong together where they are equal.
        ks: cut-offs.
        ties: the order of equal scores in `hits`.
        scores: of a block of pictures and texts; with other than inner products each direction takes a pass of its own.
        image_block, text_block: rows and columns of a tile; they do not change the result.
        world: the processes that share the blocks of pictures; each gets everything.

    Returns:
        (pictures among texts, texts among pictures).

    Raises:
        ValueError: another rule of ties, or infinite or undefined embeddings.
    """
    plain = scores is score_block and ties in ("topk", "argsort") and images_ND.dtype == texts_MD.dtype == torch.float32
    if not plain or not _largest(images_ND) * _largest(texts_MD) < MOST:
        more = {"ks": ks, "ties": ties, "query_block": image_block, "candidate_block": text_block, "world": world}
        to_text = rank_queries(images_ND, texts_MD, image_groups, text_groups, scores=scores, **more)  # type: ignore[arg-type]
        turned = from_texts(scores)
        return to_text, rank_queries(texts_MD, images_ND, text_groups, image_groups, scores=turned, **more)  # type: ignore[arg-type]
    of_images = _Side.of(images_ND, texts_MD, image_groups, text_groups)
    of_texts = _Side.of(texts_MD, images_ND, text_groups, image_groups)
    starts = range(0, len(images_ND), image_block)

    def work() -> tuple[np.ndarray, np.ndarray]:
        tile = torch.empty(min(image_block, len(images_ND)) * min(text_block, len(texts_MD)))
        with _exact_float32(), ThreadPoolExecutor(torch.get_num_threads(), "wordsight-rank") as pool:
            for k in own_pieces(world, len(starts)):
                _count_block(of_images, of_texts, slice(starts[k], starts[k] + image_block), text_block, tile, pool)
        return of_images.counts_2Q, of_texts.counts_2Q

    found = together(world, work)
    of_images.counts_2Q, of_texts.counts_2Q = (np.sum([counts[side] for counts in found], axis=0) for side in (0, 1))
    return (
        _ranking(of_images, tuple(ks), ties, text_block, world),
        _ranking(of_texts, tuple(ks), ties, text_block, world),
    )


def _largest(vectors_QD: Tensor) -> float:
    """The length of the longest vector; infinite or undefined where one is."""
    if len(vectors_QD) == 0:
        return 0.0
    return float(torch.stack([part.norm(dim=1).max() for part in vectors_QD.split(ROWS_AT_ONCE)]).max())


@contextmanager
def _exact_float32() -> Iterator[None]:
    """Float32 products in float32, whatever the user allows elsewhere: on the CPU only oneDNN computes them in bfloat16."""
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.backends.mkldnn.enabled = before


@dataclass(slots=True)
class _Side:
    """The queries of one direction, with what is counted for each.

    Attributes:
        vectors_QD, candidates_CD: float32.
        answers: which candidates are right.
        best_Q: float32, the score of each query's best right candidate.
        low_Q, high_Q: float32; a computed score below `low` is surely lower than `best`, one above `high` surely higher. Infinite
            where a query has no right candidate.
        counts_2Q: int64, how many wrong candidates score higher, and how many the same.
    """

    vectors_QD: Tensor
    candidates_CD: Tensor
    answers: Answers
    best_Q: np.ndarray
    low_Q: np.ndarray
    high_Q: np.ndarray
    counts_2Q: np.ndarray

    @classmethod
    def of(cls, vectors_QD: Tensor, candidates_CD: Tensor, groups: Tensor, candidate_groups: Tensor) -> _Side:
        answers = Answers(groups, candidate_groups)
        best_Q, bound_Q = np.full(len(vectors_QD), -np.inf, np.float32), np.zeros(len(vectors_QD))
        terms, unit = vectors_QD.shape[1] + 4, 2.0**-24  # four more for rounding the two exact scores, and for the bound itself
        largest = _largest(candidates_CD) * terms * unit / (1 - terms * unit)
        for rows in torch.arange(len(vectors_QD)).split(ROWS_AT_ONCE):
            queries_P, candidates_P = (index.numpy() for index in answers.pairs(rows))
            queries_P = rows.numpy()[queries_P]
            scores_P = _exact_scores(vectors_QD.numpy(), candidates_CD.numpy(), queries_P, candidates_P)
            np.maximum.at(best_Q, queries_P, scores_P)
            # and what products lose that are too small for float32
            bound_Q[rows.numpy()] = vectors_QD[rows].double().norm(dim=1).numpy() * largest + terms * 2.0**-126
        best_Q[np.isneginf(best_Q)] = np.inf
        low_Q = np.nextafter((best_Q - bound_Q).astype(np.float32), np.float32(-np.inf))
        high_Q = np.nextafter((best_Q + bound_Q).astype(np.float32), np.float32(np.inf))
        low_Q[np.isinf(best_Q)] = np.inf
        return cls(vectors_QD, candidates_CD, answers, best_Q, low_Q, high_Q, np.zeros((2, len(vectors_QD)), np.int64))

    def settle(self, queries_P: np.ndarray, candidates_P: np.ndarray, counts_2Q: np.ndarray, first: int) -> None:
        """Count the pairs that a stripe has left open, in the counts of the queries from `first` on."""
        score_P = _exact_scores(self.vectors_QD.numpy(), self.candidates_CD.numpy(), queries_P, candidates_P)
        best_P = self.best_Q[queries_P]
        for counts_Q, counted_P in zip(counts_2Q, (score_P > best_P, score_P == best_P), strict=True):
            np.add.at(counts_Q, queries_P[counted_P] - first, 1)


def _exact_scores(left_QD: np.ndarray, right_CD: np.ndarray, left_P: np.ndarray, right_P: np.ndarray) -> np.ndarray:
    """Inner products [P] of pairs in float32, summed in float64 first, as `metrics.score_block` gives them."""
    score_P = np.empty(len(left_P), np.float32)
    for start in range(0, len(left_P), PAIRS_AT_ONCE):
        part = slice(start, start + PAIRS_AT_ONCE)
        left_PD, right_PD = left_QD[left_P[part]].astype(np.float64), right_CD[right_P[part]].astype(np.float64)
        score_P[part] = np.einsum("pd,pd->p", left_PD, right_PD)
    return score_P


def _count_block(of_images: _Side, of_texts: _Side, rows: slice, text_block: int, tile: Tensor, pool: Executor) -> None:
    """Count all pairs of a block of pictures, for both sides."""
    images_RD = of_images.vectors_QD[rows]
    right_rows, right_columns = of_images.answers.pairs(torch.arange(rows.start, rows.start + len(images_RD)))
    workers = torch.get_num_threads()
    for start in range(0, len(of_texts.vectors_QD), text_block):
        texts_CD = of_texts.vectors_QD[start : start + text_block]
        size = len(images_RD) * len(texts_CD)
        scores_RC = torch.mm(images_RD, texts_CD.T, out=tile[:size].view(len(images_RD), len(texts_CD)))
        here = (right_columns >= start) & (right_columns < start + len(texts_CD))
        scores_RC[right_rows[here], right_columns[here] - start] = -torch.inf  # only the others can be before it
        count = partial(_count_stripes, of_images, of_texts, scores_RC.numpy(), rows.start, start)
        stripes = range(0, len(images_RD), STRIPE)
        for counts_2C in pool.map(count, [stripes[i::workers] for i in range(workers)]):
            of_texts.counts_2Q[:, start : start + len(texts_CD)] += counts_2C


def _count_stripes(
    of_images: _Side, of_texts: _Side, scores_RC: np.ndarray, first_row: int, first_column: int, stripes: range
) -> np.ndarray:
    """Count some stripes of a tile, right pairs of which are -inf: the pictures' counts in place, for no other has these rows.

    Returns:
        The texts' counts [2, C].
    """
    num_columns = scores_RC.shape[1]
    width = -(-num_columns // (8 * WORDS)) * 8 * WORDS
    higher_SW, open_SW = np.zeros((2, STRIPE, width), bool)
    columns = slice(first_column, first_column + num_columns)
    counts_2C = np.zeros((2, num_columns), np.int64)
    for start in stripes:
        stripe_SC = scores_RC[start : start + STRIPE]
        size = len(stripe_SC)
        rows = slice(first_row + start, first_row + start + size)
        for side, asked, counts_2 in ((of_images, rows, of_images.counts_2Q[:, rows]), (of_texts, columns, counts_2C)):
            count, axis = (_count_rows, 1) if side is of_images else (_count_columns, 0)
            higher, unsure = higher_SW[:size, :num_columns], open_SW[:size, :num_columns]
            np.greater(stripe_SC, np.expand_dims(side.high_Q[asked], axis), out=higher)
            np.greater_equal(stripe_SC, np.expand_dims(side.low_Q[asked], axis), out=unsure)
            np.not_equal(unsure, higher, out=unsure)  # not surely lower and not surely higher
            at_P = np.flatnonzero(open_SW[:size])
            if len(at_P) * CROWDED > stripe_SC.size:
                exact_SC = score_block(of_images.vectors_QD[rows], of_texts.vectors_QD[columns]).numpy()
                exact_SC[np.isneginf(stripe_SC)] = -np.inf
                np.greater(exact_SC, np.expand_dims(side.best_Q[asked], axis), out=higher)
                np.equal(exact_SC, np.expand_dims(side.best_Q[asked], axis), out=unsure)
                counts_2[1] += count(open_SW[:size])[: counts_2.shape[1]]
            elif len(at_P):
                pair = at_P // width + rows.start, at_P % width + columns.start
                side.settle(*(pair if side is of_images else pair[::-1]), counts_2, asked.start)
            counts_2[0] += count(higher_SW[:size])[: counts_2.shape[1]]
    return counts_2C


def _count_rows(flags_SW: np.ndarray) -> np.ndarray:
    """How many flags of each row are set; W is a multiple of 8 x WORDS. Eight at once: many times as fast as NumPy's own."""
    sums = flags_SW.view(np.uint64).reshape(len(flags_SW), -1, WORDS).sum(axis=2)
    counts: np.ndarray = sums.view(np.uint8).reshape(len(flags_SW), -1).sum(axis=1, dtype=np.int64)
    return counts


def _count_columns(flags_SW: np.ndarray) -> np.ndarray:
    """How many flags of each column are set; S is at most 255."""
    counts: np.ndarray = np.add.reduce(flags_SW.view(np.uint8), axis=0, dtype=np.uint8)
    return counts


def _ranking(side: _Side, ks: tuple[int, ...], ties: Ties, block: int, world: Processes) -> Ranking:
    """Places and hits from the counts; where a tie touches the right answer, from whole rows, which the processes share."""
    rows = torch.nonzero(side.answers.count_Q > 0).squeeze(1)
    better_Q, tied_Q = torch.from_numpy(side.counts_2Q)[:, rows]
    ranks = better_Q + 1
    hits_KQ = torch.stack([ranks <= k for k in ks])
    ranker = Ranker(side.answers, side.vectors_QD, side.candidates_CD, ks, ties, score_block, block)
    contested = ranker.whole_rows(torch.nonzero(tied_Q).squeeze(1))

    def work() -> dict[int, tuple[np.ndarray, np.ndarray]]:
        own = own_pieces(world, len(contested))
        return {k: tuple(found.numpy() for found in ranker.rank_whole(rows[contested[k]])) for k in own}  # type: ignore[misc]

    for part in together(world, work):
        for k, (places, hits_KB) in part.items():
            ranks[contested[k]], hits_KQ[:, contested[k]] = torch.from_numpy(places), torch.from_numpy(hits_KB)
    return Ranking(
        rows=rows.numpy(),
        ranks=ranks.numpy(),
        hits=dict(zip(ks, hits_KQ.numpy(), strict=True)),
        positives=side.answers.count_Q[rows].numpy(),
        num_candidates=len(side.candidates_CD),
    )
