"""Kept tokens are the tower's, and what was killed, damaged, stale or cut short never passes for them."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import wordsight
from wordsight.adapt import token_cache
from wordsight.adapt.token_cache import TokenCache, cache_tokens, token_identity, tower_tokens
from wordsight.evaluate import part_files

TOWERS = ["clip-tiny", "clip-tiny-resnet", "align-tiny", "lit-tiny", "siglip-tiny", "clip-quickstart"]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "PART", 4)


@pytest.fixture
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (40, 36, 3), dtype=np.uint8)) for _ in range(10)]


def create(name: str = "clip-tiny", seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return wordsight.create(name)


@pytest.fixture
def silent() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def every(tokens: token_cache.Tokens) -> torch.Tensor:
    """[V + 1, N, T, W]."""
    rows = np.arange(len(tokens))
    return torch.stack([tokens.batch(rows), *[tokens.batch(rows, np.full(len(rows), v)) for v in range(tokens.num_views)]])


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.features"))


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("name", TOWERS)
def test_kept_tokens_are_the_towers(name: str, pictures: list[Image.Image], tmp_path: Path) -> None:
    model = create(name).train()
    kept = cache_tokens(model, pictures, tmp_path, num_views=2, kind="float32", batch_size=3)
    through = tower_tokens(model, pictures, num_views=2, batch_size=7)
    assert kept.max_error == kept.rms_error == 0.0
    assert (kept.num_tokens, kept.width, kept.class_token) == (through.num_tokens, through.width, through.class_token)
    assert kept.identity == through.identity
    torch.testing.assert_close(every(kept), every(through), rtol=1e-6, atol=1e-6)
    pixels = torch.stack([model.preprocessor(picture) for picture in pictures])
    with torch.no_grad():
        torch.testing.assert_close(kept.batch(range(10)), model.eval().image_tower.forward_tokens(pixels), rtol=1e-6, atol=1e-6)


def test_tokens_of_a_map_are_its_places(pictures: list[Image.Image]) -> None:
    tower = create("clip-tiny-resnet").eval().image_tower
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        tokens, map_ = tower.forward_tokens(pixels), tower.forward_map(pixels)
    assert tokens.shape == (2, 4, 256)
    for place in range(4):
        torch.testing.assert_close(tokens[:, place], map_[:, :, place // 2, place % 2])


def test_class_token_is_known() -> None:
    has = {name: token_cache.has_class_token(create(name)) for name in TOWERS}
    assert has == {**dict.fromkeys(TOWERS, False), "clip-tiny": True}


@pytest.mark.usefixtures("silent")
def test_rows_views_and_parts(pictures: list[Image.Image], tmp_path: Path) -> None:
    kept = cache_tokens(create(), pictures, tmp_path, num_views=3, kind="float32")
    whole = every(kept)
    assert len(files(tmp_path)) == 4 * 3
    assert not torch.equal(whole[1], whole[2])
    rows, views = [9, 0, 4, 4], [2, 0, 1, 2]
    assert torch.equal(kept.batch(rows, views), torch.stack([whole[v + 1, r] for r, v in zip(rows, views, strict=True)]))
    some = kept.take([7, 3]).take([1])
    assert len(some) == 1
    assert torch.equal(some.batch([0]), whole[0, [3]])
    # a picture's view does not hang on what it stands beside
    alone = cache_tokens(create(), [pictures[3]], tmp_path / "alone", num_views=3, kind="float32")
    torch.testing.assert_close(every(alone)[:, 0], whole[:, 3], rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"views must be 0 to 2, got 1 to 3"):
        kept.batch([0, 1], [1, 3])


@pytest.mark.parametrize(("kind", "bound"), [("float16", 2**-11), ("int8", 0.02)])
def test_stated_error_is_the_error(kind: token_cache.Kind, bound: float, pictures: list[Image.Image], tmp_path: Path) -> None:
    model = create()
    exact = every(cache_tokens(model, pictures[:4], tmp_path / "exact", kind="float32"))
    kept = cache_tokens(model, pictures[:4], tmp_path, kind=kind)
    difference = every(kept) - exact
    assert 0 < kept.rms_error < bound
    assert kept.max_error == pytest.approx(float(difference.abs().max()), rel=1e-5)
    assert kept.rms_error == pytest.approx(float(difference.square().mean().sqrt() / exact.square().mean().sqrt()), rel=1e-4)
    if kind == "int8":  # half a step of 127 a token
        assert (difference.abs() <= exact.abs().amax(3, keepdim=True) / 254 * 1.0001).all()
    (path,) = files(tmp_path)
    header = part_files.read_header(path)
    assert header["about"]["max_error"] == kept.max_error
    size = exact.numel() * (2 if kind == "float16" else 1) + (exact[..., 0].numel() * 4 if kind == "int8" else 0)
    assert 0 <= path.stat().st_size - (header["start"] + 4 * 16 + size) < 2 * 64, "numbers begin at multiples of 64"


def test_numbers_beyond_float16_are_an_error(pictures: list[Image.Image], tmp_path: Path) -> None:
    model = create()
    with torch.no_grad():
        model.image_tower.blocks[-1].mlp.fc2.bias.fill_(1e6)
    with pytest.raises(ValueError, match=r"a token has a 1e\+06, and float16 ends at 6.55e\+04: use kind='float32' or 'int8'"):
        cache_tokens(model, pictures, tmp_path)
    assert not list(tmp_path.iterdir())
    assert cache_tokens(model, pictures, tmp_path, kind="int8").rms_error < 0.01


def count_calls(model: torch.nn.Module) -> list[int]:
    """A list that gets the number of pictures of each pass through the tower."""
    seen: list[int] = []
    tower, forward = model.image_tower, model.image_tower.forward_tokens
    tower.forward_tokens = lambda pixels: (seen.append(len(pixels)), forward(pixels))[1]
    return seen


@pytest.mark.parametrize("damage", ["a bit", "cut", "empty", "another part"])
def test_damaged_part_is_said_and_made_anew(damage: str, pictures: list[Image.Image], tmp_path: Path) -> None:
    model = create()
    before = every(cache_tokens(model, pictures, tmp_path))
    path = files(tmp_path)[0]
    content = path.read_bytes()
    if damage == "a bit":
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    elif damage == "another part":  # whole in itself, but of another kind and length
        cache_tokens(model, pictures[:1], tmp_path / "other", kind="int8")
        path.write_bytes(files(tmp_path / "other")[0].read_bytes())
    else:
        path.write_bytes(content[:-100] if damage == "cut" else b"")
    seen = count_calls(model)
    with pytest.warns(UserWarning, match=rf"{path.name} is damaged"):
        after = every(cache_tokens(model, pictures, tmp_path))
    assert torch.equal(after, before)
    assert sum(seen) in (2, 4)  # the pictures of that part alone


def test_cache_of_another_model_is_not_used_and_said(pictures: list[Image.Image], tmp_path: Path) -> None:
    kept = cache_tokens(create(), pictures, tmp_path, kind="float32")
    model = create()
    with torch.no_grad():
        model.image_tower.position_embedding[3, 5] += 0.25
    assert token_identity(model) != kept.identity
    with pytest.warns(UserWarning, match=r"holds 3 parts of another model or of other preprocessing: they were not used"):
        again = cache_tokens(model, pictures, tmp_path, kind="float32")
    torch.testing.assert_close(every(again), every(tower_tokens(model, pictures)), rtol=1e-6, atol=1e-6)
    assert not torch.equal(every(again), every(kept))


@pytest.mark.parametrize("change", ["activation", "preprocessing", "precision"])
def test_identity_knows_what_weights_do_not_say(change: str) -> None:
    from dataclasses import replace

    model, other = create(), create()
    assert token_identity(model) == token_identity(other)
    if change == "activation":
        other.config = replace(other.config, activation="gelu")
    elif change == "preprocessing":
        other.preprocessor = replace(other.preprocessor, interpolation="bilinear")
    else:
        other = other.half()
    assert token_identity(model) != token_identity(other)


def test_text_tower_does_not_matter() -> None:
    model, other = create(), create()
    with torch.no_grad():
        next(other.text_tower.parameters()).add_(1.0)
    assert token_identity(model) == token_identity(other)


def _fill(folder: Path, pictures: list[Image.Image], delay_s: float) -> None:
    model = create()
    forward = model.image_tower.forward_tokens
    model.image_tower.forward_tokens = lambda pixels: (time.sleep(delay_s), forward(pixels))[1]
    cache_tokens(model, pictures, folder, num_views=1)


def test_goes_on_after_sigkill(pictures: list[Image.Image], tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_fill, args=(tmp_path, pictures, 0.15))
    process.start()
    deadline = time.monotonic() + 60
    while len(files(tmp_path)) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    left = files(tmp_path)
    assert 3 <= len(left) < 6
    before = {path: path.stat().st_mtime_ns for path in left}
    half = tmp_path / f".{left[0].name}.1.tmp"  # what a kill in the middle of writing leaves
    half.write_bytes(b"half")
    os.utime(half, (0, 0))

    model = create()
    seen = count_calls(model)
    after = cache_tokens(model, pictures, tmp_path, num_views=1)
    assert {path: path.stat().st_mtime_ns for path in left} == before
    assert 0 < sum(seen) < 20
    assert not half.exists()
    assert torch.equal(every(after), every(cache_tokens(create(), pictures, tmp_path / "whole", num_views=1)))


def test_two_processes_at_once(pictures: list[Image.Image], tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_fill, args=(tmp_path, pictures, 0.02)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(files(tmp_path)) == 6
    assert not list(tmp_path.glob(".*"))
    model = create()
    seen = count_calls(model)
    cache_tokens(model, pictures, tmp_path, num_views=1)
    assert seen == []


def test_full_disk_keeps_what_is_whole(pictures: list[Image.Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []

    def fsync(number: int) -> None:
        written.append(number)
        if len(written) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(part_files.os, "fsync", fsync)
        with pytest.raises(OSError, match=r"no room in .* the 2 parts there are whole and stay; make room") as caught:
            cache_tokens(create(), pictures, tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert len(list(tmp_path.iterdir())) == 2
    model = create()
    seen = count_calls(model)
    assert isinstance(cache_tokens(model, pictures, tmp_path), TokenCache)
    assert sum(seen) == 2


def test_more_parts_than_open_files(pictures: list[Image.Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "PART", 1)
    before = len(os.listdir("/proc/self/fd"))
    kept = cache_tokens(create(), pictures, tmp_path)
    assert len(files(tmp_path)) == 10
    assert len(os.listdir("/proc/self/fd")) <= before
    assert kept.batch([9]).shape == (1, 17, 32)


def test_bad_input(pictures: list[Image.Image], tmp_path: Path) -> None:
    model = create()
    with pytest.raises(ValueError, match=r"kind must be one of float16, int8, float32, got 'bfloat16'"):
        cache_tokens(model, pictures, tmp_path, kind="bfloat16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no pictures"):
        cache_tokens(model, [], tmp_path)
    with pytest.raises(ValueError, match="num_views must be at least 0, got -1"):
        cache_tokens(model, pictures, tmp_path, num_views=-1)
    (tmp_path / "no.png").write_bytes(b"no picture")
    with pytest.raises(OSError, match=r"no\.png"):
        cache_tokens(model, [tmp_path / "no.png"], tmp_path / "folder")
    with pytest.raises(ValueError, match="Llip's image tower does not give its tokens"):
        cache_tokens(create("llip-tiny"), pictures, tmp_path)
