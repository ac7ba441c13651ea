"""Both directions from one pass: to the last rank what all in float64 gives, and what open_clip and CLIP_benchmark compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.distributed.processes import in_processes
from tests.distributed.test_evaluation import in_world
from tests.evaluate.test_metrics import KS, clip_benchmark_recall, random_scores
from wordsight.evaluate import metrics, ranking
from wordsight.evaluate.ranking import rank_both
from wordsight.train.distributed import World


def same(found: metrics.Ranking, expected: metrics.Ranking) -> bool:
    return (
        np.array_equal(found.rows, expected.rows)
        and np.array_equal(found.ranks, expected.ranks)
        and np.array_equal(found.positives, expected.positives)
        and found.num_candidates == expected.num_candidates
        and list(found.hits) == list(expected.hits)
        and all(np.array_equal(found.hits[k], expected.hits[k]) for k in expected.hits)
    )


def check(images: Tensor, texts: Tensor, owners: Tensor, pictures: Tensor | None = None, **more: Any) -> None:
    """`rank_both` against `rank_queries`, which computes every score in float64."""
    pictures = torch.arange(len(images)) if pictures is None else pictures
    ties = {"ties": more["ties"]} if "ties" in more else {}
    to_text, to_image = rank_both(images, texts, pictures, owners, ks=KS, **more)
    assert same(to_text, metrics.rank_queries(images, texts, pictures, owners, ks=KS, **ties))
    assert same(to_image, metrics.rank_queries(texts, images, owners, pictures, ks=KS, **ties))


def vectors(count: int, width: int, seed: int, spread: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    middle = torch.randn(width, generator=generator)
    return torch.nn.functional.normalize(middle * (1 - spread) + spread * torch.randn(count, width, generator=generator), dim=1)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 4),
    st.integers(1, 30),
    st.integers(1, 30),
    st.integers(0, 10**6),
    st.sampled_from(["topk", "argsort"]),
)
def test_ties_groups_and_block_sizes(
    images: int, texts: int, levels: int, image_block: int, text_block: int, seed: int, ties: Any
) -> None:
    """Many exact ties, sums that round, pictures and texts without an answer, several pictures of a group."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-levels, levels + 1, (images, 4), generator=generator) / 7
    y = torch.randint(-levels, levels + 1, (texts, 4), generator=generator) / 7
    groups = torch.randint(0, images + 2, (images,), generator=generator)
    owners = torch.randint(0, images + 2, (texts,), generator=generator)
    check(x, y, owners, groups, ties=ties, image_block=image_block, text_block=text_block)


@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-4, 1e-6, 0.0])
@pytest.mark.parametrize("width", [8, 512])
def test_scores_that_lie_close_together(width: int, spread: float) -> None:
    """From spread to collapsed: float32 products order fewer and fewer of them rightly."""
    images, texts = vectors(150, width, 1, spread), vectors(450, width, 2, spread)
    images[100:110] = images[:10]
    texts[300:330] = texts[:30]
    owners = torch.randint(0, 150, (450,), generator=torch.Generator().manual_seed(0))
    check(images, texts, owners, image_block=64, text_block=200)
    check(images * 1e3, texts * 1e-6, owners)


def test_neighbours_of_the_right_score_are_decided_in_float64() -> None:
    """Candidates that differ from the right one by an ulp of one coordinate: float32 products get their order wrong."""
    generator = torch.Generator().manual_seed(0)
    images = torch.nn.functional.normalize(torch.randn(40, 512, generator=generator), dim=1)
    texts = images.repeat_interleave(8, 0)
    for i in range(8):
        texts[i::8, i] = torch.nextafter(texts[i::8, i], torch.tensor(1.0 if i % 2 else -1.0))
    owners = torch.arange(40).repeat_interleave(8)
    owners[1::3] = 41  # of no picture: distractors
    exact = metrics.score_block(images, texts)
    assert ((images @ texts.T > exact.amax(1, keepdim=True)) != (exact > exact.amax(1, keepdim=True))).any(), "the case is hard"
    check(images, texts, owners)


@pytest.mark.parametrize("crowded", [1, 10**9])
def test_stripes_and_pairs_give_the_same(crowded: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is open is computed pair by pair, or with its whole stripe."""
    monkeypatch.setattr(ranking, "CROWDED", crowded)
    images, texts = vectors(130, 16, 1, 1e-3), vectors(300, 16, 2, 1e-3)
    check(
        images, texts, torch.randint(0, 130, (300,), generator=torch.Generator().manual_seed(0)), image_block=100, text_block=90
    )


@pytest.mark.parametrize("levels", [0, 1, 4])
@pytest.mark.parametrize(("images", "captions"), [(12, 3), (60, 5), (300, 2)])
def test_recall_is_clip_benchmarks_ties_included(images: int, captions: int, levels: int) -> None:
    owners = torch.randint(0, images, (images * captions,), generator=torch.Generator().manual_seed(1))
    owners[:images] = torch.arange(images)
    scores = random_scores(images, len(owners), levels, 1)
    positives = torch.arange(images)[:, None] == owners
    to_text, to_image = rank_both(scores, torch.eye(len(owners)), torch.arange(images), owners, ks=KS, image_block=50)
    for k in KS:
        assert torch.equal(torch.from_numpy(to_text.hits[k]), clip_benchmark_recall(scores, positives, k) > 0)
        assert torch.equal(torch.from_numpy(to_image.hits[k]), clip_benchmark_recall(scores.T, positives.T, k) > 0)


@pytest.mark.parametrize("levels", [0, 2, 50])
@pytest.mark.parametrize("size", [9, 40, 300])
def test_ranks_are_open_clips_ties_included(size: int, levels: int) -> None:
    """As its `get_clip_metrics`: the place of the diagonal in torch.argsort(scores, descending=True)."""
    scores, pairs = random_scores(size, size, levels, 3), torch.arange(size)
    found = rank_both(scores, torch.eye(size), pairs, pairs, ks=KS, ties="argsort")
    for one, matrix in zip(found, (scores, scores.T), strict=True):
        places = torch.where(torch.argsort(matrix, descending=True) == pairs[:, None])[1]
        assert np.array_equal(one.ranks, places.numpy() + 1)
        assert all(np.array_equal(one.hits[k], (places < k).numpy()) for k in KS)


@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_the_blocks(size: int, tmp_path: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(-2, 3, (33, 4), generator=generator) / 7  # many ties
    texts = torch.randint(-2, 3, (101, 4), generator=generator) / 7
    owners = torch.randint(0, 33, (101,), generator=generator)

    def rank(world: World) -> tuple[metrics.Ranking, metrics.Ranking]:
        return rank_both(images, texts, torch.arange(33), owners, image_block=7, text_block=10, world=world)

    alone = rank(World())
    for found in in_processes(size, in_world(rank), tmp_path):
        assert all(same(one, other) for one, other in zip(found, alone, strict=True))


def test_low_precision_that_the_user_allows_elsewhere_changes_nothing() -> None:
    images, texts = vectors(200, 512, 1), vectors(400, 512, 2)
    owners = torch.arange(400) % 200
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        check(images, texts, owners)
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.mkldnn.enabled
        with ranking._exact_float32():
            products = images @ texts.T
    finally:
        torch.set_float32_matmul_precision(before)
    assert (products.double() - images.double() @ texts.double().T).abs().max() < 1e-6, "bfloat16 errs by 1e-3"


def test_numbers_beyond_float32s_products_and_other_types() -> None:
    images, texts = vectors(20, 8, 1), vectors(30, 8, 2)
    owners = torch.arange(30) % 20
    check(images * 1e18, texts * 1e19, owners)
    check(images * 1e-22, texts * 1e-22, owners)
    check(images.double(), texts.double(), owners)
    for broken in (torch.nan, torch.inf):
        bad = texts.clone()
        bad[17, 3] = broken
        with pytest.raises(ValueError, match="infinite or undefined"):
            rank_both(images, bad, torch.arange(20), owners)
    with pytest.raises(ValueError, match=r"ties is 'topk' .* got 'best'"):
        rank_both(images, texts, torch.arange(20), owners, ties="best")  # type: ignore[arg-type]


def test_no_matrix_of_all_pairs_is_ever_held() -> None:
    """4,000 pictures and 20,000 texts: 320 MB of scores, and far less memory."""
    import tracemalloc

    images, texts = vectors(4_000, 16, 1), vectors(20_000, 16, 2)
    owners = torch.arange(20_000) % 4_000
    largest = 0
    before = torch.mm

    def watched(*args: Any, **more: Any) -> Tensor:
        nonlocal largest
        largest = max(largest, more["out"].numel())
        return before(*args, **more)

    tracemalloc.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "mm", watched)
        to_text, to_image = rank_both(images, texts, torch.arange(4_000), owners)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (len(to_text.ranks), len(to_image.ranks)) == (4_000, 20_000)
    assert largest == 1024 * 8192
    assert peak < 50e6, "NumPy's"
