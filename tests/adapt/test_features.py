"""Features of a frozen tower: views by content, files that are whole or made anew, errors that name the picture."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import wordsight
from wordsight.adapt import ImageFeatures, image_features
from wordsight.adapt import parts as parts_module
from wordsight.adapt.features import encoder
from wordsight.types import Sample


@pytest.fixture(scope="module")
def model() -> Any:
    return wordsight.create("clip-tiny")


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (37, 50, 3), dtype=np.uint8))


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(5):
        (folder / f"{i}.png").write_bytes(png(i))
    return sorted(folder.iterdir())


@pytest.mark.parametrize("layer", ["projected", "penultimate"])
def test_plain_features_are_the_models_own(model: Any, paths: list[Path], layer: Any) -> None:
    with torch.no_grad():
        pixels = torch.stack([model.preprocess(Image.open(path)) for path in paths])
        tower = model.image_tower
        expected = tower(pixels) if layer == "projected" else tower.features(pixels)
    found = image_features(model, paths, layer=layer, batch_size=2)
    torch.testing.assert_close(found.plain, expected, atol=1e-5, rtol=1e-5)
    assert (found.views, found.layer, len(found)) == (None, layer, 5)


def test_paths_samples_and_their_bytes_are_the_same_picture(model: Any, paths: list[Path]) -> None:
    samples = [Sample(key=str(i), image=png(i)) for i in range(5)]
    by_path, by_sample = (image_features(model, given, num_views=2, seed=3) for given in (paths, samples))
    assert torch.equal(by_path.plain, by_sample.plain)
    assert torch.equal(by_path.views, by_sample.views)


def test_a_view_depends_on_seed_view_and_picture_alone(model: Any, paths: list[Path]) -> None:
    three = image_features(model, paths, num_views=3, seed=1)
    assert three.views is not None
    assert three.views.shape == (3, 5, 512)
    turned = image_features(model, paths[::-1], num_views=2, seed=1, batch_size=3)
    assert turned.views is not None
    torch.testing.assert_close(turned.views.flip(1), three.views[:2], atol=1e-5, rtol=1e-5)
    other = image_features(model, paths, num_views=1, seed=2)
    assert other.views is not None
    assert not torch.allclose(other.views[0], three.views[0])
    assert not torch.allclose(three.views[0], three.views[1])


def test_rows_can_be_taken() -> None:
    views = torch.arange(24.0).view(2, 4, 3)
    taken = ImageFeatures(views[0], views, "penultimate").take([2, 0])
    assert torch.equal(taken.plain, views[0, [2, 0]])
    assert torch.equal(taken.views, views[:, [2, 0]])
    assert taken.layer == "penultimate"


def test_what_is_kept_is_not_computed_again(
    model: Any, paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = image_features(model, paths, num_views=2, cache=tmp_path / "kept")
    files = sorted((tmp_path / "kept").iterdir())
    assert len(files) == 3

    def never(*args: Any, **more: Any) -> None:
        raise AssertionError("computed again")

    with monkeypatch.context() as patch:
        patch.setattr(parts_module, "_encode", never)
        again = image_features(model, paths, num_views=2, cache=tmp_path / "kept")
        fewer = image_features(model, paths, num_views=1, cache=tmp_path / "kept")
    assert torch.equal(first.plain, again.plain)
    assert torch.equal(first.views, again.views)
    assert torch.equal(first.views[:1], fewer.views)
    # another picture, layer, seed or model never hits
    paths[0].write_bytes(png(9))
    changed = image_features(model, paths, cache=tmp_path / "kept")
    assert not torch.allclose(changed.plain[0], first.plain[0])
    torch.testing.assert_close(changed.plain[1:], first.plain[1:], atol=1e-5, rtol=1e-5)
    image_features(model, paths, cache=tmp_path / "kept", layer="penultimate")
    image_features(wordsight.create("clip-tiny", seed=8), paths, cache=tmp_path / "kept")
    assert len(list((tmp_path / "kept").iterdir())) == 6


@pytest.mark.parametrize("damage", [lambda content: content[:-5], lambda content: content[:-1] + b"\x07", lambda content: b""])
def test_a_damaged_file_is_made_anew(model: Any, paths: list[Path], tmp_path: Path, damage: Any) -> None:
    first = image_features(model, paths, cache=tmp_path / "kept")
    (file,) = (tmp_path / "kept").iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    with pytest.warns(UserWarning, match=r"damaged|not whole|made anew|computed"):
        again = image_features(model, paths, cache=tmp_path / "kept")
    assert torch.equal(first.plain, again.plain)
    assert file.read_bytes() == whole


def test_bad_pictures_are_named(model: Any, paths: list[Path]) -> None:
    paths[3].write_bytes(b"no picture")
    with pytest.raises(OSError, match=r"3\.png"):
        image_features(model, paths)
    with pytest.raises(OSError, match=r"absent\.png"):
        image_features(model, [paths[0], paths[0].with_name("absent.png")])
    with pytest.raises(ValueError, match="position 1 is int"):
        image_features(model, [paths[0], 7])
    with pytest.raises(ValueError, match="no pictures"):
        image_features(model, [])
    with pytest.raises(ValueError, match="layer must be one of projected, penultimate, got 'last'"):
        image_features(model, paths, layer="last")  # type: ignore[arg-type]


def test_a_tower_without_penultimate_features_is_named() -> None:
    with pytest.raises(ValueError, match="has no penultimate features: use layer='projected'"):
        encoder(torch.nn.Linear(2, 2), "penultimate")
