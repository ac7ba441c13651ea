"""Pictures are read the same whatever stays in memory; views and crops are what they are said to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.adapt.test_decoder import create, pictures
from wordsight.adapt.parts import draw_views, read_picture
from wordsight.adapt.picture_reader import PictureReader, batches_ahead
from wordsight.data.transform import Preprocess


@pytest.fixture(scope="module")
def model() -> Any:
    return create()


def test_views_depend_on_seed_and_content_alone(model: Any, tmp_path: Path) -> None:
    given = pictures()
    for i, picture in enumerate(given):
        picture.save(tmp_path / f"{i:02}.png")
    paths = sorted(tmp_path.glob("*.png"))
    kept, unkept = (PictureReader(model.preprocessor, paths, seed=3, keep_mb=mb) for mb in (100, 0))
    rows, views = np.array([4, 0, 4]), np.array([7, 7, 8])
    first = kept(rows, views)
    assert torch.equal(first, kept(rows, views))  # from memory
    assert torch.equal(first, unkept(rows, views))
    assert not torch.equal(first[0], first[2])
    own = [
        draw_views(model.preprocessor, read_picture(0, paths[row]), [view], 3)[0] for row, view in zip(rows, views, strict=True)
    ]
    assert torch.equal(first, torch.stack(own))  # as those of features and tokens
    assert not torch.equal(first, PictureReader(model.preprocessor, paths, seed=4)(rows, views))
    fixed = torch.stack([model.preprocessor.to_uint8(given[row]) for row in rows])
    for reader in (kept, unkept):  # of decoded pictures too
        assert torch.equal(reader(rows, None), fixed)


def test_memory_is_bounded(model: Any) -> None:
    reader = PictureReader(model.preprocessor, pictures(), keep_mb=3 * 40 * 36 * 3 / 1e6)
    reader(np.arange(12), np.zeros(12, np.int64))
    assert len(reader._kept) == 3
    side = model.preprocessor.image_size_px
    fixed = PictureReader(model.preprocessor, pictures(), keep_mb=5 * 3 * side**2 / 1e6)
    fixed(np.arange(12), None)
    assert len(fixed._kept) == 5


def test_crops_are_the_middle_and_the_corners_of_a_larger_picture() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8))
    reader = PictureReader(Preprocess(image_size_px=32), [picture])
    (crops,) = reader.crops(np.array([0]), 10, 8)
    wide = torch.from_numpy(np.array(picture.resize((60, 40), Image.Resampling.BICUBIC)).transpose(2, 0, 1).copy())
    assert torch.equal(crops[1], wide[:, :32, :32])
    assert torch.equal(crops[4], wide[:, -32:, -32:])
    assert torch.equal(crops[0], wide[:, 4:36, 14:46])
    assert torch.equal(crops[5:], crops[:5].flip(3))
    assert torch.equal(reader.crops(np.array([0]), 5, 8)[0], crops[:5])
    for squash in (Preprocess(image_size_px=32, resize="squash"), Preprocess(image_size_px=32, resize="squash", resize_px=40)):
        (crops,) = PictureReader(squash, [picture]).crops(np.array([0]), 5, 8)
        side = (squash.resize_px or 32) + 8
        small = torch.from_numpy(np.array(picture.resize((side, side), Image.Resampling.BICUBIC)).transpose(2, 0, 1).copy())
        assert torch.equal(crops[3], small[:, -32:, :32])
    strip = Image.new("RGB", (2, 40_000))
    assert PictureReader(Preprocess(image_size_px=32), [strip]).crops(np.array([0]), 5, 8).shape == (1, 5, 3, 32, 32)


def test_batches_are_read_in_order(model: Any) -> None:
    reader = PictureReader(model.preprocessor, pictures())
    found = torch.cat(list(batches_ahead(reader, 5)))
    assert torch.equal(found[:, 0], reader(np.arange(12), None))
