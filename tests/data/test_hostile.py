"""Shards from strangers: whatever is in them, the rest is read, damage is named, nothing outside is touched, nothing hangs."""

from __future__ import annotations

import itertools
import os
import tarfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.make import Letters, encoded, members, picture, write_tar
from tests.data.test_decode import jpeg_of, png_header
from wordsight.data import BadSampleError, Loader, Source, iterate, open_source
from wordsight.data.transform import Preprocess, TrainTransform


def special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def readable(source: Source) -> list[str]:
    """The captions of every sample that can be read to its bytes."""
    found = []
    for i in range(len(source)):
        try:
            found.append("".join(source[i].captions))
        except BadSampleError:
            continue
    return found


def test_names_and_links_that_point_outside_read_nothing(tmp_path: Path) -> None:
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(encoded(picture(99)))
    folder = tmp_path / "data"
    folder.mkdir()
    image = encoded(picture(50))
    refused = [
        ("../secret.jpg", image),
        ("a/../../secret.jpg", image),
        (str(secret), image),
        ("..\\secret.jpg", image),
        ("C:\\secret.jpg", image),
        (special("link.jpg", tarfile.SYMTYPE, str(secret)), b""),
        (special("near.jpg", tarfile.SYMTYPE, "00000.jpg"), b""),
        (special("hard.jpg", tarfile.LNKTYPE, "../secret.jpg"), b""),
        (special("device.jpg", tarfile.CHRTYPE), b""),
        (special("block.jpg", tarfile.BLKTYPE), b""),
        (special("pipe.jpg", tarfile.FIFOTYPE), b""),
    ]
    path = write_tar(folder / "a.tar", [*members(1), *refused, (special("folder.d", tarfile.DIRTYPE), b""), *members(1, first=1)])
    source = open_source(path)
    assert [source[i].key for i in range(len(source))] == ["a.tar/00000.jpg", "a.tar/00001.jpg"]
    assert len(source.bad) == len(refused)
    assert {bad.reason.split(";")[-1].strip() for bad in source.bad} == {"nothing was read"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "secret.jpg"]
    assert [path.name for path in folder.iterdir()] == ["a.tar"]


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 1))
def test_a_shard_that_ends_early_is_read_up_to_there(tmp_path_factory: pytest.TempPathFactory, share: float) -> None:
    folder = tmp_path_factory.mktemp("cut")
    whole = write_tar(folder / "whole.tar", members(6)).read_bytes()
    with tarfile.open(folder / "whole.tar") as tar:
        ends = [member.offset_data + member.size for member in tar.getmembers()]
    at = int(share * ends[-1])
    (folder / "cut.tar").write_bytes(whole[:at])
    complete = sum(end <= at for end in ends) // 3
    try:
        source = open_source(folder / "cut.tar")
    except ValueError as error:
        assert complete == 0, error  # noqa: PT017
        assert "cut.tar" in str(error)  # noqa: PT017
        return
    assert readable(source)[:complete] == [f"caption {i}" for i in range(complete)]
    assert len(source) <= complete + 1
    assert source.bad, "the break was not reported"
    assert all(bad.key.startswith("cut.tar") for bad in source.bad)


def test_a_damaged_header_in_the_middle_is_reported(tmp_path: Path) -> None:
    data = bytearray(write_tar(tmp_path / "a.tar", members(4)).read_bytes())
    with tarfile.open(tmp_path / "a.tar") as tar:
        third = tar.getmembers()[6]
    data[third.offset : third.offset + 512] = os.urandom(512)
    (tmp_path / "a.tar").write_bytes(data)
    source = open_source(tmp_path / "a.tar")
    assert readable(source) == ["caption 0", "caption 1"]
    assert "damaged header" in source.bad[0].reason


def before_the_end_mark(path: Path) -> bytes:
    """A tar's bytes up to the end of its last member."""
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1].offset_data + 512
    return path.read_bytes()[:end]


@pytest.mark.timeout(20)
def test_a_negative_size_does_not_loop(tmp_path: Path) -> None:
    """A header whose size is -1024 sends a naive reader back, and round for ever."""
    info = tarfile.TarInfo("00009.jpg")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (2**96 - 1024).to_bytes(12, "big")
    header[148:156] = b"        "
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    path = write_tar(tmp_path / "a.tar", members(2))
    path.write_bytes(before_the_end_mark(path) + bytes(header) + bytes(1024))
    source = open_source(path)
    assert readable(source) == ["caption 0", "caption 1"]
    assert "damaged header" in source.bad[0].reason


@pytest.mark.timeout(60)
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_damage_never_hangs_or_raises_anything_else(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("damage")
    content = bytearray(write_tar(folder / "a.tar", members(3)).read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, 9000))] = data.draw(st.integers(0, 255))
    (folder / "a.tar").write_bytes(content)
    try:
        source = open_source(folder / "a.tar")
    except ValueError:
        return
    assert len(source) <= 4
    for read in iterate(source, Preprocess(8), max_bad_share=1.0):
        assert len(read.samples) == len(read.pixels)


def test_claims_of_huge_members_are_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("huge.txt")
    info.size = 1 << 40
    path = write_tar(tmp_path / "a.tar", members(2))
    path.write_bytes(before_the_end_mark(path) + info.tobuf() + bytes(1024))
    source = open_source(path)
    assert readable(source) == ["caption 0", "caption 1"]
    assert any("huge.txt" in bad.key for bad in source.bad)


def test_texts_that_are_no_texts(tmp_path: Path) -> None:
    image = encoded(picture())
    path = write_tar(
        tmp_path / "a.tar",
        [
            *members(1),
            ("b.jpg", image),
            ("b.txt", "grün".encode("latin-1")),
            ("c.jpg", image),
            ("c.json", b"{"),
            ("d.jpg", image),
            ("d.json", b"[1, 2]"),
            ("e.jpg", image),
            ("e.json", b"[" * 100_000),
            ("f.txt", b"no picture"),
            ("g.jpg", image),
            ("g.json", b'{"caption": null, "captions": {"x": 1}, "label": null}'),
        ],
    )
    source = open_source(path)
    assert [(bad.key, bad.reason) for bad in source.bad] == [("a.tar/f", "has no picture among its members (txt)")]
    reasons = {}
    for i in range(len(source)):
        try:
            reasons[source[i].key] = source[i].captions
        except BadSampleError as error:
            reasons[error.key] = error.reason
    assert reasons["a.tar/00000.jpg"] == ("caption 0",)
    assert "not UTF-8" in reasons["a.tar/b.jpg"]
    assert "can't be parsed" in reasons["a.tar/c.jpg"]
    assert "no object but a list" in reasons["a.tar/d.jpg"]
    assert "can't be parsed" in reasons["a.tar/e.jpg"]
    assert reasons["a.tar/g.jpg"] == ()


HOSTILE = {
    "empty": b"",
    "text": b"this is not a picture",
    "truncated": encoded(picture(1, (300, 200)))[:2000],
    "bomb": png_header(10_000, 10_000),
    "bigger-bomb": jpeg_of(60_000, 60_000),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("workers", [0, 1])
def test_training_goes_on_past_all_of_them_and_names_them(tmp_path: Path, workers: int) -> None:
    good = [(name, content) for name, content in members(20) if not name.endswith(".json")]
    bad = [part for name, content in HOSTILE.items() for part in ((f"{name}.jpg", content), (f"{name}.txt", b"a caption"))]
    named_wrongly = [
        ("png-called.jpg", encoded(picture(2), "PNG")),
        ("png-called.txt", b"a PNG"),
        ("webp-called.png", encoded(picture(3), "WEBP")),
    ]
    named_wrongly.append(("webp-called.txt", b"a WebP"))
    write_tar(tmp_path / "a.tar", good[:20] + bad + good[20:] + named_wrongly)
    (tmp_path / "b.tar").write_bytes(b"")
    (tmp_path / "c.tar").write_bytes(os.urandom(5000))
    loader = Loader(
        tmp_path, batch_size=9, transform=TrainTransform(16), tokenizer=Letters(), num_workers=workers, max_bad_share=5 / 27
    )
    assert loader.samples_per_epoch == 27
    start = time.perf_counter()
    seen = [key for batch in itertools.islice(loader.batches(), 6) for key in batch.keys]
    assert time.perf_counter() - start < 20
    assert sorted(seen) == sorted(
        2 * ([f"a.tar/{i:05d}.jpg" for i in range(20)] + ["a.tar/png-called.jpg", "a.tar/webp-called.png"])
    )
    report = str(loader.bad)
    assert "54 samples drawn, 10 of them bad (5 different ones)" in report
    for name in [*(f"a.tar/{name}.jpg" for name in HOSTILE), "b.tar: is empty", "c.tar: is no tar file"]:
        assert name in report
    assert sum(len(read.samples) for read in iterate(loader.source, Preprocess(16), max_bad_share=5 / 27)) == 22


def test_a_shard_that_vanishes_or_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", members(3))
    source = open_source(path)
    assert source[0].captions == ("caption 0",)
    os.truncate(path, 600)
    with pytest.raises(BadSampleError, match="cut off"):
        source[2]
    other = open_source(write_tar(tmp_path / "b.tar", members(3)))
    (tmp_path / "b.tar").unlink()
    with pytest.raises(BadSampleError, match="can't be read: No such file"):
        other[0]


def test_a_table_points_at_no_files(tmp_path: Path) -> None:
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "a.csv").write_text(
        "path,caption\nfolder.jpg,x\npipe.jpg,x\nmissing.jpg,x\n/dev/zero,x\n" + "n" * 5000 + ".jpg,x\n"
    )
    source = open_source(tmp_path / "a.csv")
    assert len(source) == 5
    for i in range(5):
        with pytest.raises(BadSampleError, match=r"is no file|does not exist|can't be read"):
            source[i]
