"""Kept features are the model's, found by all that they depend on; what was killed, damaged, stale or cut short never passes."""

from __future__ import annotations

import errno
import io
import json
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import wordsight
from tests.distributed.processes import in_processes
from tests.distributed.test_evaluation import in_world
from tests.evaluate.conftest import ColourModel
from wordsight.adapt import image_features
from wordsight.data.reader import picture_digest
from wordsight.evaluate import Retrieval, ZeroShot, embed_source, feature_cache, part_files, write_results
from wordsight.evaluate.part_files import Shelf, Subject
from wordsight.train.distributed import World

COUNT = 10


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "PART", 4)


@pytest.fixture
def silent() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (37, 50, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def table(folder: Path, numbers: list[int], name: str = "toys.jsonl") -> Path:
    """Pictures by number, each with a caption and a label; number -1 is damaged."""
    rows = []
    for number in numbers:
        (folder / f"{number}.png").write_bytes(b"damaged" if number < 0 else png(number))
        rows.append(json.dumps({"path": f"{number}.png", "caption": f"number {number}", "label": f"kind {number % 3}"}))
    (folder / name).write_text("\n".join(rows), encoding="utf-8")
    return folder / name


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return table(tmp_path, list(range(COUNT)))


def create() -> Any:
    return wordsight.create("clip-tiny", seed=0)


def counted(model: Any) -> list[int]:
    """A list that gets the number of pictures of each pass through the tower."""
    seen: list[int] = []
    before = model.image_tower.features

    def features(pixels: torch.Tensor) -> Any:
        seen.append(len(pixels))
        return before(pixels)

    model.image_tower.features = features
    return seen


def embed(model: Any, data: Path, cache: Path | None, **more: Any) -> torch.Tensor:
    return embed_source(model, data, cache=cache, batch_size=2, **more).images_ND


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.features"))


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_second_evaluation_asks_no_tower_and_gives_the_same_bytes(data: Path, tmp_path: Path, num_workers: int) -> None:
    model = create()
    runs: dict[str, tuple[bytes, int]] = {}
    seen = counted(model)
    for run, cache in (("plain", None), ("first", tmp_path / "kept"), ("second", tmp_path / "kept")):
        before = len(seen)
        embedded = embed_source(model, data, cache=cache, batch_size=2, num_workers=num_workers)
        for evaluator in (ZeroShot(), Retrieval()):
            write_results(tmp_path / run, evaluator.judge(model, embedded).records("toys", "all"))
        runs[run] = (tmp_path / run / "results.json").read_bytes(), len(seen) - before
    assert len({content for content, _ in runs.values()}) == 1
    assert runs["plain"][1] == runs["first"][1] > 0
    assert runs["second"][1] == 0
    assert len(files(tmp_path / "kept")) == 3, "parts of 4, 4 and 2"


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("layer", ["projected", "penultimate"])
def test_adaptation_and_evaluation_share_what_is_kept(layer: Any, data: Path, tmp_path: Path) -> None:
    model = create()
    paths = [data.with_name(f"{i}.png") for i in range(COUNT)]
    adapted = image_features(model, paths, layer=layer, num_views=1, cache=tmp_path / "kept")
    seen = counted(model)
    backwards = table(tmp_path, list(range(COUNT))[::-1], "backwards.jsonl")
    some = table(tmp_path, [7, 2, 102, 5], "some.jsonl")
    (tmp_path / "102.png").write_bytes(png(2))  # a picture that comes twice
    for where, rows in ((data, list(range(COUNT))), (backwards, list(range(COUNT))[::-1]), (some, [7, 2, 2, 5])):
        found = embed(model, where, tmp_path / "kept", layer=layer)
        expected = adapted.plain[rows]
        assert torch.equal(found, torch.nn.functional.normalize(expected, dim=-1) if layer == "projected" else expected)
    assert seen == []
    # and the other way round
    embed(create(), data, tmp_path / "other", layer=layer)
    again = image_features(model, paths[3:] + paths[:3], layer=layer, cache=tmp_path / "other")
    assert seen == []
    torch.testing.assert_close(again.plain, adapted.plain[[*range(3, COUNT), 0, 1, 2]], rtol=1e-5, atol=1e-5)


def _one_weight(model: Any, data: Path) -> dict[str, Any]:
    with torch.no_grad():
        model.image_tower.position_embedding[1, 2] += 1e-3
    return {}


def _transform(model: Any, data: Path) -> dict[str, Any]:
    model.preprocessor = replace(model.preprocessor, interpolation="bilinear")
    return {}


def _activation(model: Any, data: Path) -> dict[str, Any]:
    model.config = replace(model.config, activation="gelu")
    return {}


def _precision(model: Any, data: Path) -> dict[str, Any]:
    model.bfloat16()
    return {}


def _layer(model: Any, data: Path) -> dict[str, Any]:
    return {"layer": "penultimate"}


def _reduced(model: Any, data: Path) -> dict[str, Any]:
    return {"reduced_decode": True}


@pytest.mark.parametrize("change", [_one_weight, _transform, _activation, _precision, _layer, _reduced])
def test_what_features_depend_on_never_hits_when_it_changed(
    change: Callable[[Any, Path], dict[str, Any]], data: Path, tmp_path: Path
) -> None:
    model = create()
    kept = embed(model, data, tmp_path / "kept")
    more = change(model, data)
    seen = counted(model)
    found = embed(model, data, tmp_path / "kept", **more)
    assert sum(seen) == COUNT
    assert torch.equal(found, embed(model, data, None, **more))
    if change not in (_activation, _reduced):  # the tower has its activation from before; PNGs are not reduced
        assert found.shape != kept.shape or not torch.equal(found, kept)
    assert torch.equal(embed(create(), data, tmp_path / "kept"), kept), "and the old ones are still there"


def test_a_changed_picture_is_made_anew_alone(data: Path, tmp_path: Path) -> None:
    model = create()
    before = embed(model, data, tmp_path / "kept")
    data.with_name("3.png").write_bytes(png(99))
    seen = counted(model)
    after = embed(model, data, tmp_path / "kept")
    assert seen == [1]
    assert not torch.allclose(after[3], before[3])
    others = [i for i in range(COUNT) if i != 3]
    assert torch.equal(after[others], before[others])


def _palette(image: Image.Image) -> Image.Image:
    other = image.copy()
    other.putpalette(image.getpalette()[::-1])  # type: ignore[index]
    return other


def _turned(image: Image.Image) -> Image.Image:
    other = image.copy()
    other.getexif()[0x0112] = 6
    return other


def _transparent(image: Image.Image) -> Image.Image:
    other = image.copy()
    other.info["transparency"] = 0
    return other


@pytest.mark.parametrize("change", [_palette, _turned, _transparent, lambda image: image.transpose(Image.Transpose.ROTATE_90)])
def test_all_that_a_picture_looks_like_is_in_its_digest(change: Callable[[Image.Image], Image.Image]) -> None:
    image = Image.fromarray((np.arange(64).reshape(8, 8) * 3).astype(np.uint8)).convert("P")
    assert picture_digest(image) == picture_digest(image.copy())
    assert picture_digest(change(image)) != picture_digest(image)


FLIPS = {"a row": 500, "a digest": 20, "the header": -9, "the checksum": -600}  # from where the digests begin


@pytest.mark.parametrize("damage", [*FLIPS, "cut", "cut to its header", "empty", "another part"])
def test_a_damaged_part_is_said_and_made_anew(damage: str, data: Path, tmp_path: Path) -> None:
    model = create()
    before = embed(model, data, tmp_path / "kept")
    path = files(tmp_path / "kept")[0]
    content = bytearray(path.read_bytes())
    if damage in FLIPS:
        content[part_files.read_header(path)["start"] + FLIPS[damage]] ^= 1
    lengths = {"cut": len(content) - 5, "cut to its header": 60, "empty": 0}
    content = content[: lengths.get(damage, len(content))]
    if damage == "another part":
        embed(model, data, tmp_path / "other", layer="penultimate")
        content = bytearray(files(tmp_path / "other")[0].read_bytes())
    path.write_bytes(content)
    seen = counted(model)
    with pytest.warns(UserWarning, match=rf"{path.name} is damaged .*it is removed, and its pictures are looked at again"):
        after = embed(model, data, tmp_path / "kept")
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    assert 0 < sum(seen) <= 4, "the pictures of that part alone"
    del seen[:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(embed(model, data, tmp_path / "kept"), after)
    assert seen == []


def _fill(data: Path, folder: Path, delay_s: float) -> None:
    model = create()
    before = model.encode_image

    def encode_image(pixels: torch.Tensor, **more: Any) -> Any:
        time.sleep(delay_s)
        return before(pixels, **more)

    model.encode_image = encode_image
    embed(model, data, folder)


def test_goes_on_after_sigkill(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    process = multiprocessing.get_context("fork").Process(target=_fill, args=(data, folder, 0.15))
    process.start()
    deadline = time.monotonic() + 60
    while not files(folder) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
    process.join()
    left = files(folder)
    assert 1 <= len(left) < 3
    before = {path: path.stat().st_mtime_ns for path in left}
    half = folder / f".{left[0].name}.1.tmp"  # what a kill in the middle of writing leaves
    half.write_bytes(b"half")
    os.utime(half, (0, 0))
    model = create()
    seen = counted(model)
    after = embed(model, data, folder)
    assert {path: path.stat().st_mtime_ns for path in left} == before
    assert sum(seen) == COUNT - 4 * len(left)
    assert not half.exists()
    assert torch.equal(after, embed(create(), data, None))


def test_two_processes_at_once(data: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    backwards = table(tmp_path, list(range(COUNT))[::-1], "backwards.jsonl")
    processes = [context.Process(target=_fill, args=(where, tmp_path / "kept", 0.02)) for where in (data, data, backwards)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert not list((tmp_path / "kept").glob(".*"))
    assert all(part_files.is_whole(path) for path in files(tmp_path / "kept"))
    model = create()
    seen = counted(model)
    torch.testing.assert_close(embed(model, data, tmp_path / "kept"), embed(create(), data, None), rtol=1e-5, atol=1e-6)
    assert seen == []


@pytest.mark.parametrize("size", [2, 3])
def test_processes_of_one_evaluation_share_it(size: int, data: Path, tmp_path: Path) -> None:
    alone = embed(create(), data, None)

    def twice(world: World) -> tuple[torch.Tensor, int, torch.Tensor, int]:
        model = create()
        seen = counted(model)
        first, num_first = embed(model, data, tmp_path / "kept", world=world), sum(seen)
        return first, num_first, embed(model, data, tmp_path / "kept", world=world), sum(seen) - num_first

    found = in_processes(size, in_world(twice), tmp_path)
    for first, _, second, num_second in found:
        assert torch.equal(first, alone)
        assert torch.equal(second, alone)
        assert num_second == 0
    assert sum(num for _, num, _, _ in found) == COUNT


def test_a_full_disk_keeps_what_is_whole(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []

    def fsync(number: int) -> None:
        written.append(number)
        if len(written) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(part_files.os, "fsync", fsync)
        with pytest.raises(OSError, match=r"no room in .*kept for .* the 1 parts there are whole and stay; make room") as caught:
            embed(create(), data, tmp_path / "kept")
    assert caught.value.errno == errno.ENOSPC
    assert len(list((tmp_path / "kept").iterdir())) == 1
    model = create()
    seen = counted(model)
    assert torch.equal(embed(model, data, tmp_path / "kept"), embed(create(), data, None))
    assert sum(seen) == COUNT - 4


def test_what_was_made_before_an_error_is_kept(tmp_path: Path) -> None:
    """Three pictures, less than a part, and then too many damaged ones."""
    data = table(tmp_path, [0, 1, 2, -1, -2, -3])
    for _ in range(2):
        model = create()
        seen = counted(model)
        with pytest.raises(ValueError, match="bad"):
            embed_source(model, data, cache=tmp_path / "kept", batch_size=3)
    assert seen == []
    # a damaged picture is looked at each time, and is named each time
    for _ in range(2):
        found = embed_source(model, data, cache=tmp_path / "kept", batch_size=3, max_bad_share=0.9)
        assert (len(found), [Path(one.key).name for one in found.bad]) == (3, ["-1.png", "-2.png", "-3.png"])


@pytest.mark.usefixtures("silent")
def test_a_folder_of_someone_elses_may_be_read(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = embed(create(), data, tmp_path / "kept")

    def refuse(*args: Any, **more: Any) -> None:
        raise PermissionError(errno.EPERM, "not yours")

    monkeypatch.setattr(part_files.os, "utime", refuse)
    assert torch.equal(embed(create(), data, tmp_path / "kept"), before)


def test_penultimate_features_are_what_the_projection_reads(data: Path, tmp_path: Path) -> None:
    model = create()
    found = embed_source(model, data, layer="penultimate", cache=tmp_path / "kept")
    projected = embed_source(model, data)
    assert (found.layer, projected.layer) == ("penultimate", "projected")
    assert not torch.allclose(found.images_ND.norm(dim=1), torch.ones(COUNT), atol=0.1)
    with torch.no_grad():
        through = torch.nn.functional.normalize(found.images_ND @ model.image_tower.projection, dim=-1)
    torch.testing.assert_close(through, projected.images_ND, rtol=1e-5, atol=1e-5)
    for evaluator in (ZeroShot(), Retrieval()):
        with pytest.raises(ValueError, match=r"penultimate features, which do not lie in the space of texts"):
            evaluator.judge(model, found)
    with pytest.raises(ValueError, match="layer must be one of projected, penultimate, got 'last'"):
        embed_source(model, data, layer="last")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ColourModel's image tower has no penultimate features"):
        embed_source(ColourModel(), data, layer="penultimate")


def test_pair_scorers_keep_what_their_encoder_gives(data: Path, tmp_path: Path) -> None:
    model = wordsight.create("llip-tiny", seed=0)
    plain = embed(model, data, None)
    assert plain.ndim == 3
    for _ in range(2):
        assert torch.equal(embed(model, data, tmp_path / "kept"), plain)


def test_a_model_that_does_not_say_what_it_depends_on_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"features of ColourModel can't be kept: .*nn\.Module with a `preprocessor`"):
        embed_source(ColourModel(), data, cache=tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_a_shelf_finds_every_row_of_many_parts(tmp_path: Path) -> None:
    subject = Subject(identity="a" * 32, layer="projected", model="toy")
    digests = [os.urandom(16) for _ in range(50)]
    rows = torch.randn(50, 3)
    shelf = Shelf(tmp_path, subject)
    for start in range(0, 50, 7):
        shelf.add(digests[start : start + 7], [rows[start : start + 7]])
    for kept in (shelf, Shelf(tmp_path, subject)):
        assert kept.known == frozenset(digests)
        for i in np.random.default_rng(0).permutation(50):
            found = kept.find(digests[i])
            assert found is not None
            assert torch.equal(found[0].arrays[0][found[1]], rows[i])
        assert kept.find(os.urandom(16)) is None
    for other in (replace(subject, layer="penultimate"), replace(subject, identity="b" * 32), replace(subject, view="another")):
        assert not Shelf(tmp_path, other).known
    assert Shelf(tmp_path, replace(subject, model="another name of it")).known
