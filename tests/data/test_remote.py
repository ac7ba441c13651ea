"""Object stores: the same samples as from the disk, through failures that pass, from any process; what does not pass is named."""

from __future__ import annotations

import io
import itertools
import pickle
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.make import Letters, encoded, members, picture, write_shards, write_tar
from wordsight.data import BadSampleError, Loader, TooManyBadSamplesError, iterate, open_source
from wordsight.data.remote import (
    ReadReport,
    RemoteConfig,
    RemoteFile,
    RemoteFiles,
    RemoteReadError,
    _merged,
    expand_url,
    is_url,
)
from wordsight.data.transform import Preprocess

FAST = RemoteConfig(backoff_s=0.001, timeout_s=5.0)


class Flaky(MemoryFileSystem):
    """The memory file system with a fault before some reads: `faults` maps a read's number to an error, or to seconds to wait."""

    protocol = "flaky"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    faults: dict[int, Any] = {}  # noqa: RUF012
    always: dict[str, Exception] = {}  # noqa: RUF012
    reads: list[tuple[str, int, int]] = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("flaky://", "memory://"))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        number = len(Flaky.reads)
        Flaky.reads.append((path, start or 0, end or 0))
        fault = Flaky.faults.get(number)
        for name, error in Flaky.always.items():
            if name in path:
                raise error
        if isinstance(fault, Exception):
            raise fault
        if isinstance(fault, float):
            time.sleep(fault)
        data = super().cat_file(path, start=start, end=end, **options)
        return data[: len(data) // 2] if fault == "short" else data


@pytest.fixture(autouse=True)
def _stores() -> Iterator[None]:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    for system in (MemoryFileSystem, Flaky):
        system.store.clear()
        system.pseudo_dirs[:] = [""]
    Flaky.faults, Flaky.always, Flaky.reads = {}, {}, []
    yield
    MemoryFileSystem.store.clear()


def upload(folder: Path, protocol: str = "memory", place: str = "/shards") -> str:
    system = fsspec.filesystem(protocol)
    for path in sorted(folder.glob("*.tar")):
        system.pipe_file(f"{place}/{path.name}", path.read_bytes())
    return f"{protocol}:/{place}"


def everything(source: Any) -> list[tuple[Any, ...]]:
    found = []
    for i in range(len(source)):
        sample = source[i]
        found.append((sample.image, sample.captions, sample.label, sample.meta))
    return found


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_urls_give_what_the_files_give(tmp_path: Path, protocol: str) -> None:
    write_shards(tmp_path, [3, 2, 4])
    here = open_source(tmp_path)
    root = upload(tmp_path) if protocol == "memory" else f"file://{tmp_path}"
    for what in (f"{root}/{{000..002}}.tar", f"{root}/*.tar", f"{root}/", [f"{root}/00{i}.tar" for i in range(3)]):
        source = open_source(what)
        assert source.part_sizes == [3, 2, 4]
        assert everything(source) == everything(here)
        assert [source[i].key for i in range(9)] == [here[i].key for i in range(9)]
    assert everything(open_source([f"{root}/000.tar", str(tmp_path / "001.tar")])) == everything(here)[:5]
    assert everything(open_source(f"{root}/00[12].tar")) == everything(here)[3:]


def test_what_is_a_url() -> None:
    assert all(map(is_url, ("s3://a/b.tar", "memory://a", "simplecache::s3://a/b", "file:///a")))
    assert not any(map(is_url, ("sample:train", "/a/b.tar", "C:\\a.tar", "a:b/c.tar", Path("s3://a"))))


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    write_shards(tmp_path, [1])
    root = upload(tmp_path)
    for what, error, words in (
        (f"{root}/none.tar", FileNotFoundError, "memory://shards/none.tar"),
        (f"{root}/{{000..001}}.tar", FileNotFoundError, "001.tar"),
        (f"{root}/x*.tar", FileNotFoundError, r"x\*.tar"),
        ("memory://nowhere/", FileNotFoundError, r"memory://nowhere/\*.tar"),
        (f"{root}/table.csv", ValueError, "only shards are read"),
        (f"{root}/a.tar.gz", ValueError, "compressed"),
        ("nostore://a/b.tar", ValueError, "nostore://a/b.tar can't be reached: .*nostore"),
        (f"{root}/{{0..1.tar", (ValueError, FileNotFoundError), "memory://"),
    ):
        with pytest.raises(error, match=words):
            open_source(what)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_a_store_are_those_from_the_disk(tmp_path: Path, workers: int) -> None:
    write_shards(tmp_path, [9, 8, 7])
    options: dict[str, Any] = {"batch_size": 5, "transform": Preprocess(16), "tokenizer": Letters(), "seed": 3}
    here = itertools.islice(Loader(tmp_path, **options).batches(2), 6)
    loader = Loader(f"{upload(tmp_path)}/*.tar", num_workers=workers, **options)
    for one, other in zip(here, itertools.islice(loader.batches(2), 6), strict=True):
        assert one.keys == other.keys
        assert torch.equal(one.pixels, other.pixels)
        assert torch.equal(one.tokens, other.tokens)
    assert loader.reads.smooth
    assert loader.reads.reads > 0


def test_evaluation_reads_a_store_in_few_pieces(tmp_path: Path) -> None:
    write_shards(tmp_path, [20])
    source = open_source(f"{upload(tmp_path, 'flaky')}/000.tar")
    Flaky.reads.clear()
    reads = list(iterate(source, Preprocess(16), batch_size=10))
    assert [key for read in reads for key in (sample.key for sample in read.samples)] == [
        f"000.tar/{i:05d}.jpg" for i in range(20)
    ]
    assert len(Flaky.reads) <= 3, "neighbours are fetched together"


def test_a_batch_is_sent_for_before_it_is_read(tmp_path: Path) -> None:
    """Eight reads that take 50 ms each: with eight threads a batch of eight takes about as long as one."""
    for i in range(8):
        write_tar(tmp_path / f"{i:03d}.tar", members(1, first=i))
    source = open_source(f"{upload(tmp_path, 'flaky')}/*.tar", remote=FAST)
    Flaky.reads.clear()
    Flaky.faults = {number: 0.05 for number in range(8)}
    start = time.perf_counter()
    source.ahead(range(8))  # type: ignore[attr-defined]
    assert [source[i].captions[0] for i in range(8)] == [f"caption {i}" for i in range(8)]
    assert time.perf_counter() - start < 0.3
    assert len(Flaky.reads) == 8


def test_failures_that_pass_are_tried_again_and_named(tmp_path: Path) -> None:
    write_shards(tmp_path, [6, 6])
    here = everything(open_source(tmp_path))
    root = upload(tmp_path, "flaky")
    files = RemoteFiles(FAST)
    Flaky.faults = {0: ConnectionResetError("reset by peer"), 1: TimeoutError("slow down")}
    source = open_source(f"{root}/*.tar", remote=files)
    Flaky.reads.clear()
    Flaky.faults = {1: OSError("503"), 2: "short", 3: OSError("503"), 7: RuntimeError("a client's own kind of error")}
    assert everything(source) == here
    report = files.take_report()
    assert sum(report.retried.values()) == 6
    assert not report.failed
    text = str(report)
    for words in (
        "flaky:///shards/00",
        "ConnectionResetError: reset by peer",
        "OSError: 503",
        "bytes came of",
        "RuntimeError",
        "6 tries",
    ):
        assert words in text
    assert not files.take_report()


def test_a_training_run_tells_what_was_repeated(tmp_path: Path) -> None:
    write_shards(tmp_path, [6, 6])
    root = upload(tmp_path, "flaky")
    options: dict[str, Any] = {"batch_size": 4, "transform": Preprocess(16), "tokenizer": Letters(), "remote": FAST}
    whole = list(itertools.islice(Loader(f"{root}/*.tar", **options).batches(), 4))
    for workers in (0, 1):
        loader = Loader(f"{root}/*.tar", num_workers=workers, **options)
        Flaky.reads.clear()
        Flaky.faults = {2: OSError("a hiccup")}
        for one, other in zip(whole, itertools.islice(loader.batches(), 4), strict=True):
            assert one.keys == other.keys
            assert torch.equal(one.pixels, other.pixels)
        assert sum(loader.reads.retried.values()) == 1
        assert "repeated 1 x OSError: a hiccup" in str(loader.reads)


def test_what_fails_for_good_is_a_bad_sample_with_its_reason(tmp_path: Path) -> None:
    write_shards(tmp_path, [3, 3])
    files = RemoteFiles(RemoteConfig(retries=2, backoff_s=0.001))
    source = open_source(f"{upload(tmp_path, 'flaky')}/*.tar", remote=files)
    files.take_report()
    Flaky.always = {"001.tar": OSError("the disk is gone")}
    assert source[0].captions == ("caption 0",)
    with pytest.raises(BadSampleError, match=r"001\.tar.*can't be read: bytes .* in 3 tries: OSError: the disk is gone"):
        source[4]
    report = files.take_report()
    assert sum(report.retried.values()) == 2
    assert sum(report.failed.values()) == 1
    Flaky.always = {"001.tar": PermissionError("not yours")}
    with pytest.raises(BadSampleError, match="could not be read: PermissionError: not yours"):
        source[4]
    assert not files.take_report().retried, "another try does not help there"
    with pytest.raises(TooManyBadSamplesError, match="not yours"):
        list(iterate(source, Preprocess(16)))


def test_a_shard_that_can_not_be_indexed_is_named_and_the_rest_is_read(tmp_path: Path) -> None:
    write_shards(tmp_path, [3, 3])
    root = upload(tmp_path, "flaky")
    Flaky.always = {"001.tar": OSError("no route")}
    source = open_source(f"{root}/*.tar", remote=RemoteConfig(retries=1, backoff_s=0.001))
    assert source.part_sizes == [3, 0]
    assert [bad.key for bad in source.bad] == ["001.tar"]
    assert "in 2 tries: OSError: no route" in source.bad[0].reason
    with pytest.raises(ValueError, match=r"no sample in (?s:.*)no route"):
        open_source(f"{root}/001.tar", remote=RemoteConfig(retries=0, backoff_s=0.0))


@pytest.mark.timeout(30)
def test_a_read_without_an_answer_is_given_up(tmp_path: Path) -> None:
    write_shards(tmp_path, [2])
    config = RemoteConfig(retries=1, backoff_s=0.001, timeout_s=0.1, num_threads=1)
    files = RemoteFiles(config)
    source = open_source(f"{upload(tmp_path, 'flaky')}/000.tar", remote=files)
    Flaky.reads.clear()
    Flaky.faults = {0: 3.0}
    start = time.perf_counter()
    assert source[1].captions == ("caption 1",)  # by the second try, on another thread
    assert time.perf_counter() - start < 2
    assert "no answer within 0.1 s" in str(files.take_report())
    Flaky.reads.clear()
    Flaky.faults = {0: 3.0, 1: 3.0}
    with pytest.raises(BadSampleError, match=r"in 2 tries: no answer within 0\.1 s"):
        source[0]
    assert time.perf_counter() - start < 3
    assert source[0].captions == ("caption 0",)


def test_damaged_remote_shards_are_read_up_to_the_damage(tmp_path: Path) -> None:
    data = write_tar(tmp_path / "whole.tar", members(4)).read_bytes()
    system = fsspec.filesystem("memory")
    system.pipe_file("/d/cut.tar", data[: len(data) // 2])
    system.pipe_file("/d/empty.tar", b"")
    system.pipe_file("/d/gz.tar", b"\x1f\x8b" + bytes(600))
    system.pipe_file("/d/noise.tar", np.random.default_rng(0).bytes(5000))
    source = open_source("memory://d/*.tar")
    assert 0 < len(source) < 4
    reasons = {bad.key: bad.reason for bad in source.bad}
    assert "is empty" in reasons["empty.tar"]
    assert "compressed" in reasons["gz.tar"]
    assert "no tar file" in reasons["noise.tar"]
    assert any(key.startswith("cut.tar") for key in reasons)


def test_an_index_is_kept_until_the_shard_changes(tmp_path: Path) -> None:
    write_shards(tmp_path, [5, 4])
    root = upload(tmp_path, "flaky")
    config = RemoteConfig(index_dir=str(tmp_path / "index"), backoff_s=0.001)
    first = open_source(f"{root}/*.tar", remote=config)
    Flaky.reads.clear()
    second = open_source(f"{root}/*.tar", remote=config)
    assert Flaky.reads == []
    assert second.part_sizes == first.part_sizes
    assert everything(second) == everything(first)
    for file in (tmp_path / "index").glob("*.npz"):
        file.write_bytes(b"rubbish")
    assert everything(open_source(f"{root}/*.tar", remote=config)) == everything(first)
    write_tar(tmp_path / "000.tar", members(2, first=50))
    upload(tmp_path, "flaky")
    assert open_source(f"{root}/*.tar", remote=config).part_sizes == [2, 4]
    assert not list((tmp_path / "index").glob(".*"))


def test_members_far_apart_are_read_one_by_one(tmp_path: Path) -> None:
    content = members(2)
    big = encoded(picture(7, (400, 300)), "PNG")
    spread = [content[0], ("zz.png", big), ("zz.txt", bytes(300_000)), *content[3:], *content[1:3]]
    write_tar(tmp_path / "a.tar", spread)
    here, there = open_source(tmp_path / "a.tar"), open_source(f"{upload(tmp_path)}/a.tar")
    assert everything(there) == everything(here)
    there.ahead(range(len(there)))  # type: ignore[attr-defined]
    assert everything(there) == everything(here)


def test_remote_sources_can_be_pickled(tmp_path: Path) -> None:
    write_shards(tmp_path, [3])
    source = open_source(f"{upload(tmp_path)}/*.tar")
    source.ahead([0, 1])  # type: ignore[attr-defined]
    assert everything(pickle.loads(pickle.dumps(source))) == everything(source)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_remote_file_is_a_file(data: st.DataObject) -> None:
    content = np.random.default_rng(0).bytes(data.draw(st.integers(0, 300)))
    fsspec.filesystem("memory").pipe_file("/f", content)
    mine, reference = (
        RemoteFile(RemoteFiles(FAST), "memory://f", len(content), data.draw(st.integers(1, 64))),
        io.BytesIO(content),
    )
    for _ in range(data.draw(st.integers(1, 8))):
        if data.draw(st.booleans()):
            at = data.draw(st.integers(0, 320))
            assert mine.seek(at) == reference.seek(at)
        count = data.draw(st.integers(-1, 100))
        assert mine.read(count) == reference.read(count)
        assert mine.tell() == reference.tell()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 10**7), st.integers(1, 10**6)), max_size=12))
def test_merging_keeps_every_range(found: list[tuple[str, int, int]]) -> None:
    ranges = [(name, first, first + length) for name, first, length in found]
    groups = _merged(ranges)
    assert Counter(one for group in groups for one in group) == Counter(ranges)
    for group in groups:
        assert len({name for name, _, _ in group}) == 1
        assert max(stop for *_, stop in group) - min(first for _, first, _ in group) <= max(
            1 << 23, *(b - a for _, a, b in group)
        )


def test_little_room_ahead_changes_nothing(tmp_path: Path) -> None:
    write_shards(tmp_path, [8])
    source = open_source(f"{upload(tmp_path)}/*.tar", remote=RemoteConfig(ahead_mb=0))
    source.ahead(range(8))  # type: ignore[attr-defined]
    assert everything(source) == everything(open_source(tmp_path))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_threads": 0}, "num_threads"),
        ({"retries": -1}, "retries"),
        ({"timeout_s": 0.0}, "timeout_s"),
        ({"ahead_mb": -1}, "ahead_mb"),
    ],
)
def test_numbers_out_of_range(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RemoteConfig(**options)


def test_a_report_counts_together() -> None:
    one, other = ReadReport(), ReadReport()
    other.reads, other.num_bytes = 2, 10
    other.retried["a", "x"] = 3
    for _ in range(2):
        one.add(other)
    assert (one.reads, one.num_bytes, one.retried["a", "x"]) == (4, 20, 6)
    assert bool(one)
    assert not one.smooth


def test_expanding_asks_only_for_wildcards() -> None:
    assert expand_url("http://host/{0..1}.tar?key=a") == ["http://host/0.tar?key=a", "http://host/1.tar?key=a"]
    with pytest.raises(RemoteReadError, match="tell its size"):
        Sizeless().size("memory://x")


class Sizeless(RemoteFiles):
    """A store that does not tell how long its files are."""

    def _try_again(self, url: str, ask: Any) -> Any:
        return None
