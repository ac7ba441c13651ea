"""Models that score a pair themselves: tiles, ties, memory, and the same figures as inner products where the two agree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.evaluate.conftest import COLOURS, ColourModel
from tests.evaluate.test_evaluators import captioned
from wordsight.evaluate import Retrieval, ZeroShot, embed_source, metrics, scoring, write_examples
from wordsight.system import PairScorer

Folder = Callable[..., Path]


class Asking(ColourModel):
    """Keeps K vectors of a picture; a text is answered by the one that suits it best."""

    def __init__(self, copies: int = 3) -> None:
        super().__init__()
        self.copies = copies
        self.largest = 0

    def encode_image(self, pixels: Tensor, *, normalize: bool = True) -> Tensor:
        colour_BD = super().encode_image(pixels)
        return torch.stack([colour_BD * -(5.0**k) for k in range(1, self.copies)] + [colour_BD], dim=1)

    def similarities(self, images: Tensor, texts: Tensor) -> Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        assert images.shape[1] == self.copies
        self.largest = max(self.largest, images.numel() * len(texts))
        cosines_NKC = normalize(images, dim=-1) @ normalize(texts, dim=-1).T
        return cosines_NKC[:, -1]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    names = list(COLOURS)
    return captioned(tmp_path, [(names[i % 5], [names[i % 5], names[(i * 3) % 5]]) for i in range(13)])


def test_a_model_without_the_method_is_scored_by_inner_products() -> None:
    assert not isinstance(ColourModel(), PairScorer)
    assert isinstance(Asking(), PairScorer)
    assert scoring.pair_scores(ColourModel()) is metrics.score_block
    assert scoring.from_texts(metrics.score_block) is metrics.score_block


def test_its_figures_are_those_of_inner_products_where_the_two_agree(
    data: Path, colour_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the whole set in one tile, and with tiles of a few pairs."""
    asking, plain = Asking().train(), ColourModel()
    folder = colour_folder({"red": 4, "green": 3, "blue": 2}, wrong=2)
    for numbers in (1 << 25, 100):
        monkeypatch.setattr(scoring, "TILE_NUMBERS", numbers)
        asking.largest = 0
        for evaluator, where in ((Retrieval(), data), (ZeroShot(prompts="imagenet80"), folder)):
            theirs, ours = evaluator.judge(plain, where), evaluator.judge(asking, where)
            assert ours.embedded.images_ND.shape[1:] == (3, 3)
            assert ours.metrics == theirs.metrics
            assert np.array_equal(ours.hits, theirs.hits)
        assert asking.training
        assert 0 < asking.largest <= numbers
        path = write_examples(tmp_path / f"run-{numbers}", ours, "colours", "all")
        assert '"score"' in path.read_text()


def test_what_it_keeps_of_pictures_is_not_normalised(data: Path) -> None:
    kept = embed_source(Asking(copies=2), data).images_ND
    assert not torch.allclose(kept.norm(dim=-1), torch.ones(13, 2))
    assert torch.allclose(kept[:, 0], -5 * kept[:, 1])


def test_ranks_of_scores_of_ones_own_are_those_of_the_whole_matrix() -> None:
    """Whatever the blocks, also where the right candidates of a query lie far apart."""
    generator = torch.Generator().manual_seed(3)
    images, texts = torch.randn(23, 2, 4, generator=generator), torch.randn(40, 4, generator=generator)
    owners, pictures = torch.randint(0, 23, (40,), generator=generator), torch.arange(23)

    def best_of_two(images: Tensor, texts: Tensor) -> Tensor:
        return torch.einsum("nkd,cd->nck", images.double(), texts.double()).amax(2).float()

    whole = best_of_two(images, texts)
    for blocks in ({}, {"query_block": 7, "candidate_block": 5}, {"query_block": 1, "candidate_block": 1}):
        found = metrics.rank_queries(texts, images, owners, pictures, scores=scoring.from_texts(best_of_two), **blocks)
        right = whole[owners, torch.arange(40)]
        assert np.array_equal(found.ranks, 1 + (whole > right).sum(0).numpy())
        back = metrics.rank_queries(images, texts, pictures, owners, scores=best_of_two, **blocks)
        for row, rank in zip(back.rows, back.ranks, strict=True):
            assert rank == 1 + int((whole[row] > whole[row, owners == row].max()).sum())


def test_wrong_scores_are_an_error_that_names_the_method(data: Path) -> None:
    class Wrong(Asking):
        def similarities(self, images: Tensor, texts: Tensor) -> Tensor:
            return super().similarities(images, texts).T[:1]

    class Undefined(Asking):
        def similarities(self, images: Tensor, texts: Tensor) -> Tensor:
            return super().similarities(images, texts) * torch.nan

    for model, words in ((Wrong(), r"Wrong\.similarities gave \(1, 13\) for 13 pictures"), (Undefined(), "undefined scores")):
        with pytest.raises(ValueError, match=words):
            Retrieval().judge(model, data)


def test_no_matrix_of_all_pictures_and_texts_is_ever_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """2,500 texts among 9,000 pictures: every tile is at most one block, also where ties ask for whole rows."""
    sizes = []

    def scores(queries: Tensor, candidates: Tensor) -> Tensor:
        sizes.append((len(queries), len(candidates)))
        return metrics.score_block(queries, candidates)

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(9_000, 2, generator=generator)
    images[1::10] = images[::10]  # a tie for one query in five
    texts = torch.randn(2_500, 2, generator=generator)
    monkeypatch.setattr(metrics, "WHOLE_ROWS_BYTES", 1 << 22)
    found = metrics.rank_queries(texts, images, torch.arange(2_500), torch.arange(9_000), scores=scores)
    assert len(found.ranks) == 2_500
    assert max(q for q, _ in sizes) == 1024
    assert max(c for _, c in sizes) == 8192
    assert any(q <= (1 << 22) // (8 * 9_000) for q, _ in sizes), "ties are ranked by whole rows, a few at once"
