"""The figures: equal to open_clip's and CLIP_benchmark's metric code ties included, right intervals and chance, any block."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import hypergeom
from sklearn.metrics import balanced_accuracy_score

from wordsight.evaluate import metrics
from wordsight.evaluate.retrieval import ranking_metrics

KS = (1, 5, 10)


def clip_benchmark_recall(scores: torch.Tensor, positives: torch.Tensor, k: int) -> torch.Tensor:
    """What CLIP_benchmark 1.6.2 calls recall_at_k: right answers among torch.topk's k, over all right answers."""
    found = torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, torch.topk(scores, k, dim=1)[1], True)
    return (found & positives).sum(1) / positives.sum(1)


def open_clip_accuracy(output: torch.Tensor, target: torch.Tensor, topk: tuple[int, ...]) -> list[float]:
    """What open_clip 3.3.0 and CLIP_benchmark call accuracy; it fails there since NumPy 2.4 (float of an array)."""
    best = output.topk(max(topk), 1, True, True)[1].t()
    correct = best.eq(target.view(1, -1).expand_as(best))
    return [correct[:k].reshape(-1).float().sum().item() for k in topk]


def as_embeddings(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and candidates whose inner products are exactly `scores`."""
    return scores, torch.eye(scores.shape[1])


def random_scores(rows: int, columns: int, levels: int, seed: int) -> torch.Tensor:
    """Random scores; with `levels` > 0 whole numbers below it, so that ties are many."""
    generator = torch.Generator().manual_seed(seed)
    if levels:
        return torch.randint(0, levels, (rows, columns), generator=generator).float()
    return torch.rand(rows, columns, generator=generator)


@pytest.mark.parametrize("levels", [0, 1, 2, 4, 50])
@pytest.mark.parametrize(("rows", "columns"), [(30, 5), (100, 16), (100, 17), (50, 64), (50, 321), (20, 1000)])
def test_top_k_is_open_clips_ties_included(rows: int, columns: int, levels: int) -> None:
    for seed in range(5):
        scores = random_scores(rows, columns, levels, seed)
        targets = torch.randint(0, columns, (rows,))
        correct = metrics.topk_correct(scores, targets, (1, 5))
        assert correct.sum(0).tolist() == open_clip_accuracy(scores, targets, (1, 5))
        predicted = scores.argmax(1)  # as CLIP_benchmark's mean_per_class_recall
        found = metrics.mean_per_class(targets.numpy(), (predicted == targets).numpy(), columns)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns where a class without samples was predicted
            assert found == pytest.approx(balanced_accuracy_score(targets, predicted), abs=1e-12)


@pytest.mark.parametrize("levels", [0, 1, 2, 4, 50])
@pytest.mark.parametrize("size", [1, 9, 16, 17, 40, 300])
def test_paired_retrieval_is_open_clips_ties_included(size: int, levels: int) -> None:
    from open_clip_train.train import get_clip_metrics

    for seed in range(2):
        scores = random_scores(size, size, levels, seed)
        images, texts = as_embeddings(scores)
        theirs = get_clip_metrics(images, texts, torch.tensor(1.0))
        pairs = torch.arange(size)
        for prefix, queries, candidates in (("image_to_text", images, texts), ("text_to_image", texts, images)):
            ranking = metrics.rank_queries(
                queries, candidates, pairs, pairs, ks=KS, ties="argsort", query_block=50, candidate_block=33
            )
            ours = ranking_metrics(ranking, prefix)
            assert ranking.ranks.mean() == pytest.approx(theirs[f"{prefix}_mean_rank"], abs=1e-12)
            assert ours[f"{prefix}_median_rank"].value == theirs[f"{prefix}_median_rank"]
            for k in KS:
                assert ours[f"{prefix}_R@{k}"].value == theirs[f"{prefix}_R@{k}"]


@pytest.mark.parametrize("levels", [0, 1, 2, 4, 50])
@pytest.mark.parametrize(("images", "captions"), [(10, 1), (12, 3), (60, 5), (150, 2)])
def test_retrieval_with_several_captions_is_clip_benchmarks_ties_included(images: int, captions: int, levels: int) -> None:
    for seed in range(2):
        owners = torch.randint(0, images, (images * captions,), generator=torch.Generator().manual_seed(seed))
        owners[:images] = torch.arange(images)
        scores = random_scores(len(owners), images, levels, seed)  # texts x images, as there
        positives = owners[:, None] == torch.arange(images)
        texts, pictures = as_embeddings(scores)
        to_image = metrics.rank_queries(texts, pictures, owners, torch.arange(images), ks=KS, query_block=70, candidate_block=41)
        to_text = metrics.rank_queries(pictures, texts, torch.arange(images), owners, ks=KS, query_block=11, candidate_block=64)
        for k in KS:
            assert torch.equal(torch.from_numpy(to_image.hits[k]), clip_benchmark_recall(scores, positives, k) > 0)
            assert torch.equal(torch.from_numpy(to_text.hits[k]), clip_benchmark_recall(scores.T, positives.T, k) > 0)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 24),
    st.integers(1, 24),
    st.integers(1, 4),
    st.integers(1, 30),
    st.integers(1, 30),
    st.integers(0, 10**6),
    st.sampled_from(["topk", "argsort"]),
)
def test_block_sizes_change_nothing(
    images: int, texts: int, levels: int, query_block: int, candidate_block: int, seed: int, ties: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = (
        torch.randint(-levels, levels + 1, (texts, 4), generator=generator) / 7
    )  # inner products round: order of summation would show
    c = torch.randint(-levels, levels + 1, (images, 4), generator=generator) / 7
    owners, pictures = torch.randint(0, images, (texts,), generator=generator), torch.arange(images)
    whole = metrics.rank_queries(q, c, owners, pictures, ks=KS, ties=ties)
    parts = metrics.rank_queries(
        q, c, owners, pictures, ks=KS, ties=ties, query_block=query_block, candidate_block=candidate_block
    )
    back = metrics.rank_queries(
        c, q, pictures, owners, ks=KS, ties=ties, query_block=query_block, candidate_block=candidate_block
    )
    assert np.array_equal(whole.ranks, parts.ranks)
    assert all(np.array_equal(whole.hits[k], parts.hits[k]) for k in KS)
    assert np.array_equal(back.rows, np.unique(owners))  # pictures without a caption ask nothing
    assert np.array_equal(back.positives, np.bincount(owners, minlength=images)[back.rows])
    # without ties a rank is 1 + the number of wrong candidates that score more
    scores = metrics.score_block(q, c)
    for row in range(texts):
        best = scores[row, owners[row]]
        if (scores[row] == best).sum() == 1:
            assert whole.ranks[row] == 1 + (scores[row] > best).sum()


def test_a_query_without_an_answer_is_left_out_and_its_candidates_distract() -> None:
    q, c = torch.eye(3), torch.eye(3)
    ranking = metrics.rank_queries(q, c, torch.tensor([7, 1, 2]), torch.tensor([0, 2, 1]), ks=(1,))
    assert ranking.rows.tolist() == [1, 2]
    assert ranking.hits[1].tolist() == [False, False]


def test_golden_matrix_of_four_images_and_eight_texts() -> None:
    """big_vision's published example: 4 images, 2 captions each."""
    owners = torch.arange(8) % 4
    scores = torch.full((4, 8), 0.0)
    scores[0, 0] = scores[1, 1] = 9.0  # two images find a caption first
    scores[2, 0:4] = torch.tensor([8.0, 7.0, 6.0, 5.0])  # the third finds it at place 3
    scores[3] = torch.tensor([9.0, 8.5, 8.0, -1.0, 7.0, 6.5, 6.0, -2.0])  # the fourth at place 7
    ranking = metrics.rank_queries(*as_embeddings(scores), torch.arange(4), owners, ks=(1, 5, 10))
    assert ranking.ranks.tolist() == [1, 1, 3, 7]
    assert {k: hit.mean() for k, hit in ranking.hits.items()} == {1: 0.5, 5: 0.75, 10: 1.0}


def test_unknown_tie_rule_and_undefined_scores_are_errors() -> None:
    one = torch.ones(2, 2)
    with pytest.raises(ValueError, match="argsort"):
        metrics.rank_queries(one, one, torch.arange(2), torch.arange(2), ties="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="undefined"):
        metrics.rank_queries(one * math.nan, one, torch.arange(2), torch.arange(2))


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (1, 1, 0.2065, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_interval_is_the_published_one(successes: int, count: int, low: float, high: float) -> None:
    """The last row is the example of Newcombe (1998), method 3."""
    assert metrics.wilson_interval(successes, count) == pytest.approx((low, high), abs=1e-4)


@given(st.integers(1, 10**6), st.data())
def test_a_share_lies_in_its_interval(count: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, count))
    low, high = metrics.wilson_interval(successes, count)
    assert 0 <= low <= successes / count <= high <= 1
    assert high - low > 0


def test_median_rank_interval_covers_the_truth_and_repeats() -> None:
    """Of 100 measurements about 95 intervals hold the truth."""
    generator = np.random.default_rng(1)
    inside = 0
    for _ in range(100):
        ranks = generator.geometric(0.1, size=101)  # median 7
        low, high = metrics.median_rank_interval(ranks)
        inside += low <= 7 <= high
    assert inside >= 88
    assert metrics.median_rank_interval(ranks) == (low, high)


def test_median_rank_interval_draws_groups_as_numpy_takes_their_median() -> None:
    generator = np.random.default_rng(4)
    ranks, groups = generator.geometric(0.05, size=70), generator.integers(100, 120, 70)
    draw = np.random.default_rng(metrics.BOOTSTRAP_SEED)
    alone = np.median(ranks[draw.integers(0, 70, (metrics.RESAMPLES, 70))], axis=1)
    assert metrics.median_rank_interval(ranks) == tuple(np.percentile(np.floor(alone), [2.5, 97.5]))
    parts = [ranks[groups == group] for group in np.unique(groups)]
    draw = np.random.default_rng(metrics.BOOTSTRAP_SEED)
    drawn = draw.integers(0, len(parts), (metrics.RESAMPLES, len(parts)))
    medians = [np.floor(np.median(np.concatenate([parts[i] for i in row]))) for row in drawn]
    assert metrics.median_rank_interval(ranks, groups) == tuple(np.percentile(medians, [2.5, 97.5]))


@pytest.mark.parametrize("sizes", [(20, 40, 60, 200), (1,) * 100, (1, 2, 300, 3), (8,) * 40])
def test_mean_per_class_interval_covers_the_truth(sizes: tuple[int, ...]) -> None:
    generator = np.random.default_rng(2)
    targets = np.repeat(np.arange(len(sizes)), sizes)
    inside = 0
    for _ in range(200):
        share = np.clip(generator.normal(0.6, 0.1, len(sizes)), 0, 1)  # classes differ
        correct = generator.random(len(targets)) < share[targets]
        low, high = metrics.mean_per_class_interval(targets, correct, len(sizes) + 1)
        inside += low <= share.mean() <= high
    assert inside >= 180
    assert metrics.mean_per_class_interval(np.arange(9), np.arange(9) < 4, 9) == metrics.wilson_interval(4, 9)
    assert metrics.mean_per_class_interval(np.arange(9), np.ones(9, bool), 9)[0] < 0.8, "nine right answers prove no perfection"


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 50))
def test_chance_is_hypergeometric(num_candidates: int, positives: list[int], k: int) -> None:
    p = np.minimum(np.array(positives), num_candidates)
    expected = np.mean([1 - hypergeom.pmf(0, num_candidates, one, min(k, num_candidates)) for one in p])
    assert metrics.recall_chance(num_candidates, p, k) == pytest.approx(expected, abs=1e-12)
    median = metrics.median_rank_chance(num_candidates, p)
    cdf = [np.mean([1 - hypergeom.pmf(0, num_candidates, one, r) for one in p]) for r in range(1, num_candidates + 1)]
    assert median == 1 + next(i for i, share in enumerate(cdf) if share >= 0.5 - 1e-9)


def test_a_model_that_gives_one_vector_for_all_scores_at_chance() -> None:
    """Ties are decided without a look at the answers: a collapsed model is at chance, neither at 0 nor at 1."""
    images, captions = 50, 5
    owners = torch.arange(images * captions) % images
    ranking = metrics.rank_queries(torch.ones(len(owners), 3), torch.ones(images, 3), owners, torch.arange(images), ks=(1, 10))
    found = ranking_metrics(ranking, "text_to_image", owners.numpy())
    for name in ("text_to_image_R@1", "text_to_image_R@10"):
        assert found[name].value == pytest.approx(found[name].chance)
