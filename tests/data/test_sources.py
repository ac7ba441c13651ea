"""Sources: shards, tables and folders give the same samples as they were written, by whatever path, glob or list."""

from __future__ import annotations

import json
import os
import pickle
import string
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.make import encoded, members, picture, write_shards, write_tar
from wordsight.data import BadSampleError, DataSource, open_source


def test_img2dataset_shards_as_they_come(tmp_path: Path) -> None:
    write_shards(tmp_path, [3, 2])
    pa.parquet.write_table(pa.table({"url": ["x"], "caption": ["y"]}), tmp_path / "000.parquet")
    (tmp_path / "000_stats.json").write_text("{}")
    source = open_source(tmp_path)
    assert len(source) == 5
    assert source.part_sizes == [3, 2]
    assert source.bad == []
    sample = source[3]
    assert sample.key == "001.tar/00003.jpg"
    assert sample.image == encoded(picture(3))
    assert sample.captions == ("caption 3",)
    assert sample.label is None
    assert sample.meta == {"key": "00003", "status": "success", "width": 40}


def test_paths_globs_braces_and_lists_are_one(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, [2, 2, 2])
    expected = [open_source(tmp_path)[i] for i in range(6)]
    for what in (
        f"{tmp_path}/{{000..002}}.tar",
        f"{tmp_path}/*.tar",
        paths,
        [str(path) for path in paths],
        DataSource(path=paths),
        DataSource(path=f"{tmp_path}/{{000,001,002}}.tar"),
        [f"{tmp_path}/000.tar", DataSource(path=f"{tmp_path}/00[12].tar")],
    ):
        source = open_source(what)
        assert len(source) == 6
        assert [source[i].image for i in range(6)] == [sample.image for sample in expected]
    with pytest.raises(IndexError):
        open_source(tmp_path)[6]


def test_a_path_that_holds_braces_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "{a,b} [c]"
    folder.mkdir()
    write_shards(folder, [2])
    assert len(open_source(folder / "000.tar")) == 2


def test_captions_and_labels_of_every_kind_of_member(tmp_path: Path) -> None:
    image = encoded(picture())
    write_tar(
        tmp_path / "a.tar",
        [
            ("dir.d/cat.x.png", b"not read"),
            ("dir.d/cat.JPG", image),
            ("dir.d/cat.txt", b" a cat \n"),
            (
                "dir.d/cat.json",
                json.dumps({"caption": "a cat", "captions": ["cat", "", "a pet", 3], "label": 7, "by": "me"}).encode(),
            ),
            ("dog.jpg", image),
            ("dog.cls", b"12\n"),
            ("dog.json", b'{"label": "no"}'),
            ("README", b"no sample"),
            ("._dog.jpg", b"rubbish of another system"),
        ],
    )
    source = open_source(tmp_path / "a.tar")
    cat, dog = source[0], source[1]
    assert len(source) == 2
    assert (cat.key, cat.captions, cat.label, cat.meta) == ("a.tar/dir.d/cat.jpg", ("a cat", "cat", "a pet"), "7", {"by": "me"})
    assert (dog.captions, dog.label) == ((), "12")


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.text(string.ascii_letters + "_-/.", min_size=1, max_size=12), st.sampled_from(["jpg", "txt", "cls", "seg.png"])
        ),
        max_size=12,
        unique_by=lambda pair: f"{pair[0]}.{pair[1]}",
    )
)
def test_members_are_grouped_as_webdataset_groups_them(
    tmp_path_factory: pytest.TempPathFactory, names: list[tuple[str, str]]
) -> None:
    files = sorted(f"{stem}.{suffix}" for stem, suffix in names)
    files = [
        name
        for name in files
        if ".." not in name.split("/") and not name.startswith(("/", "./")) and "/." not in name and "//" not in name
    ]
    path = write_tar(
        tmp_path_factory.mktemp("shard") / "a.tar", [(name, name.encode()) for name in files] + [("zz.jpg", b"last")]
    )
    expected = {}
    with open(path, "rb") as stream:
        files = webdataset.tariterators.tar_file_expander([{"url": str(path), "stream": stream}])
        for sample in webdataset.tariterators.group_by_keys(files):
            if "jpg" in sample:
                expected[sample["__key__"]] = (sample["jpg"], sample.get("txt"), sample.get("cls"))
    source = open_source(path)
    found = {}
    for i in range(len(source)):
        sample = source[i]
        texts = sample.captions[0].encode() if sample.captions else None
        found[sample.key.removeprefix("a.tar/").removesuffix(".jpg")] = (
            sample.image,
            texts,
            sample.label.encode() if sample.label is not None else None,
        )
    assert found == expected


def test_members_need_not_lie_side_by_side(tmp_path: Path) -> None:
    content = members(3)
    source = open_source(write_tar(tmp_path / "a.tar", content[::3] + content[2::3] + content[1::3]))
    assert [source[i].captions for i in range(3)] == [("caption 0",), ("caption 1",), ("caption 2",)]


def test_long_and_foreign_names(tmp_path: Path) -> None:
    name = "ordner/" * 30 + "Grüße-猫"
    source = open_source(write_tar(tmp_path / "a.tar", [(f"{name}.jpg", encoded(picture())), (f"{name}.txt", "猫".encode())]))
    assert source[0].key == f"a.tar/{name}.jpg"
    assert source[0].captions == ("猫",)


def test_sources_travel_to_other_processes(tmp_path: Path) -> None:
    write_shards(tmp_path, [3])
    source = open_source(tmp_path)
    first = source[0]
    assert pickle.loads(pickle.dumps(source))[0] == first
    child = os.fork() if hasattr(os, "fork") else 0
    if child == 0 and hasattr(os, "fork"):
        os._exit(0 if source[2].captions == ("caption 2",) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert source[0] == first


def test_more_shards_than_files_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wordsight.data.shards.MAX_OPEN_FILES", 2)
    write_shards(tmp_path, [1] * 5)
    source = open_source(tmp_path)
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else None
    for _ in range(2):
        assert [source[i].captions[0] for i in range(5)] == [f"caption {i}" for i in range(5)]
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) - before == 2
        del source
        assert len(os.listdir("/proc/self/fd")) == before


# Tables


ROWS = [
    {"path": "img/0.jpg", "caption": 'a "big", red cat', "title": "cat", "label": "animal"},
    {"path": "img/1.jpg", "caption": "zwei\nZeilen", "title": "007", "label": "agent"},
    {"path": "img/0.jpg", "caption": "the same picture again", "title": "cat", "label": "animal"},
    {"path": "img/2.jpg", "caption": "NA", "title": "", "label": "nothing"},
]
SAMPLES = [
    ("img/0.jpg", ('a "big", red cat', "cat", "the same picture again"), "animal"),
    ("img/1.jpg", ("zwei\nZeilen", "007"), "agent"),
    ("img/2.jpg", ("NA",), "nothing"),
]


def write_table(folder: Path, kind: str) -> Path:
    import csv

    (folder / "img").mkdir()
    for i in range(3):
        (folder / "img" / f"{i}.jpg").write_bytes(encoded(picture(i)))
    path = folder / f"table.{kind}"
    if kind == "parquet":
        pa.parquet.write_table(pa.Table.from_pylist(ROWS), path)
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS))
    else:
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(ROWS[0]), delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(ROWS)
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "jsonl"])
def test_tables(tmp_path: Path, kind: str) -> None:
    source = open_source(write_table(tmp_path, kind))
    assert [(source[i].key, source[i].captions, source[i].label) for i in range(len(source))] == SAMPLES
    assert [source[i].image for i in range(3)] == [encoded(picture(i)) for i in range(3)]
    assert pickle.loads(pickle.dumps(source))[1] == source[1]


def test_columns_and_root_by_hand(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.jpg").write_bytes(encoded(picture()))
    table = tmp_path / "t.csv"
    table.write_text("where,says,also,class\na.jpg,one,two,k\n")
    source = open_source(
        DataSource(path=table, image_column="where", caption_columns=("also", "says"), root=tmp_path / "pictures")
    )
    assert source[0].captions == ("two", "one")
    assert source[0].label == "k"
    with pytest.raises(ValueError, match=r"image_column.*where, says, also, class"):
        open_source(table)
    with pytest.raises(ValueError, match="no column 'nope'"):
        open_source(DataSource(path=table, image_column="where", caption_columns=("nope",)))


def test_captions_as_lists(tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / f"{i}.jpg").write_bytes(encoded(picture(i)))
    rows = [{"image": "0.jpg", "captions": ["one", "two"]}, {"image": "1.jpg", "captions": "alone", "more": None}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pa.parquet.write_table(
        pa.table({"image": ["0.jpg", "1.jpg"], "captions": [["one", "two"], ["alone"]]}), tmp_path / "a.parquet"
    )
    for name in ("a.jsonl", "a.parquet"):
        source = open_source(tmp_path / name)
        assert [source[i].captions for i in range(2)] == [("one", "two"), ("alone",)]


def test_damaged_rows_are_named_and_the_rest_is_read(tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(encoded(picture()))
    (tmp_path / "a.csv").write_text("path,caption\n0.jpg,fine\n0.jpg,too,many\n,no path\nmissing.jpg,gone\n")
    (tmp_path / "a.jsonl").write_text(
        '{"path": "0.jpg", "caption": "fine"}\n{"path": \n[1]\n{"caption": "no path"}\n{"path": "missing.jpg", "caption": "x"}\n'
    )
    for name, named in (
        ("a.csv", ["a.csv:line 3", "a.csv:row 2"]),
        ("a.jsonl", ["a.jsonl:line 2", "a.jsonl:line 3", "a.jsonl:row 2"]),
    ):
        source = open_source(tmp_path / name)
        assert len(source) == 2
        assert [bad.key for bad in source.bad] == named
        assert source[0].captions == ("fine",)
        with pytest.raises(BadSampleError, match=r"missing\.jpg: does not exist"):
            source[1]


# Folders


def test_class_folders(tmp_path: Path) -> None:
    for name in ("dog/b.jpg", "dog/a.png", "cat/deep/c.webp", ".hidden/x.jpg", "cat/notes.txt", "loose.gif"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    source = open_source(tmp_path)
    samples = [source[i] for i in range(len(source))]
    assert [(sample.key, sample.label) for sample in samples] == [
        ("cat/deep/c.webp", "cat"),
        ("dog/a.png", "dog"),
        ("dog/b.jpg", "dog"),
        ("loose.gif", None),
    ]


# Errors that a user can mend


def test_errors_say_what_is_wrong(tmp_path: Path) -> None:
    import gzip

    write_shards(tmp_path, [1])
    data = (tmp_path / "000.tar").read_bytes()
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(data))
    (tmp_path / "hidden.tar").write_bytes(gzip.compress(data))
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    for what, error, words in (
        ("a.tar.gz", ValueError, "compressed"),
        ("hidden.tar", ValueError, "compressed"),
        ("notes.txt", ValueError, "neither a .tar shard, a table"),
        ("empty", ValueError, "no sample in"),
        ("none.tar", FileNotFoundError, "none.tar"),
        ("x*.tar", FileNotFoundError, r"x\*.tar"),
        ("{000..001}.tar", FileNotFoundError, "001.tar"),
        ("{000..001.tar", (ValueError, FileNotFoundError), "000"),
    ):
        with pytest.raises(error, match=words):
            open_source(tmp_path / what)
    with pytest.raises(ValueError, match="empty list"):
        open_source([])
    with pytest.raises(ValueError, match="above 0"):
        DataSource(path="x", weight=-1)
