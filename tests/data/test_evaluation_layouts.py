"""CLIP_benchmark's folders, folders of Hugging Face `datasets` and files of vectors: read as published, refused where damaged."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.data.make import encoded, picture, write_tar
from wordsight.data.clip_benchmark import ClipBenchmarkSource
from wordsight.data.errors import BadSampleError
from wordsight.data.features_in import VectorSource
from wordsight.data.hf_folders import HfSource
from wordsight.data.shards import ShardSource
from wordsight.data.sources import DataSource, TableSource, open_source

PICTURES = [encoded(picture(seed), "PNG") for seed in range(4)]


def npy(values: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(values), **options)
    return file.getvalue()


# CLIP_benchmark


def clip_benchmark(
    root: Path, labels: Sequence[Any], *, suffix: str = "cls", kind: str | None = None, names: str = "cat\ndog\nowl\n"
) -> Path:
    """`root/test/{0,1}.tar` as its builder writes them."""
    (root / "test").mkdir(parents=True)
    for shard in range(2):
        own = [i for i in range(len(labels)) if i % 2 == shard]
        members = [(f"s{i:07d}.webp", PICTURES[i % 4]) for i in own]
        members += [(f"s{i:07d}.{suffix}", labels[i] if isinstance(labels[i], bytes) else str(labels[i]).encode()) for i in own]
        write_tar(root / "test" / f"{shard}.tar", sorted(members))
    (root / "test" / "nshards.txt").write_text("2\n")
    if names:
        (root / "classnames.txt").write_text(names, encoding="utf-8")
    (root / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\na {c}\n")
    if kind:
        (root / "dataset_type.txt").write_text(f"{kind}\n")
    return root


@pytest.mark.parametrize("place", ["", "test"])
def test_classification_has_the_published_names(tmp_path: Path, place: str) -> None:
    source = open_source(clip_benchmark(tmp_path / "wds_pets", [2, 0, 1, 2]) / place)
    assert isinstance(source, ClipBenchmarkSource)
    assert {source[i].key.split("/s")[-1]: source[i].label for i in range(4)} == {
        "0000000.webp": "owl",
        "0000001.webp": "cat",
        "0000002.webp": "dog",
        "0000003.webp": "owl",
    }
    assert source.classes == ("cat", "dog", "owl")
    assert source.templates == ("a photo of a {label}.", "a {label}")
    assert source[0].image == PICTURES[0]


def test_multilabel_and_retrieval(tmp_path: Path) -> None:
    source = open_source(clip_benchmark(tmp_path / "voc", [npy([1, 0, 1]), npy([0, 1, 0])], suffix="npy", kind="multilabel"))
    assert [(source[i].label, source[i].meta) for i in range(2)] == [
        (None, {"labels": ("cat", "owl")}),
        (None, {"labels": ("dog",)}),
    ]
    coco = clip_benchmark(tmp_path / "coco", ["one dog\ntwo cats\n\none dog", "an owl"], suffix="txt", kind="retrieval", names="")
    assert [open_source(coco)[i].captions for i in range(2)] == [("one dog", "two cats"), ("an owl",)]


def test_arrays_in_other_shards_are_not_read(tmp_path: Path) -> None:
    members = [("a.png", PICTURES[0]), ("a.txt", b"a cat"), ("a.npy", b"anything"), ("b.npy", b"no picture")]
    plain = ShardSource([write_tar(tmp_path / "a.tar", members)])
    assert (len(plain), plain[0].captions, plain[0].meta, plain.bad) == (1, ("a cat",), {}, [])


def test_repeated_names_are_told_apart(tmp_path: Path) -> None:
    source = open_source(clip_benchmark(tmp_path / "in", [0, 1], names="missile\nmissile\n"))
    assert source.classes == ("missile", "missile (class 1)")  # type: ignore[attr-defined]
    assert source.names == {"missile (class 1)": "missile"}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda root: (root / "classnames.txt").write_text("\n"), "classnames.txt is empty"),
        (lambda root: (root / "classnames.txt").write_bytes(b"\xff\xfe"), "not in UTF-8"),
        (lambda root: (root / "classnames.txt").write_text("a\na (class 2)\na\n"), "rename the classes"),
        (lambda root: (root / "zeroshot_classification_templates.txt").write_text("a photo\n"), "has no {c}"),
        (lambda root: (root / "dataset_type.txt").write_text("captioning\n"), "it is one of classification"),
        (lambda root: (root / "test" / "nshards.txt").write_text("3\n"), "nshards.txt says '3'"),
        (lambda root: write_tar((root / "train").mkdir() or root / "train" / "0.tar", []), "several splits"),
    ],
)
def test_damaged_lists_are_named(tmp_path: Path, change: Callable[[Path], Any], said: str) -> None:
    root = clip_benchmark(tmp_path / "set", [0, 1])
    change(root)
    with pytest.raises(ValueError, match=said):
        open_source(root)


@pytest.mark.parametrize("label", ["3", "-1", "cat", "", "1e0", "٣"])
def test_a_label_that_is_no_class_is_a_bad_sample(tmp_path: Path, label: str) -> None:
    source = open_source(clip_benchmark(tmp_path / "set", [label, 0]))
    with pytest.raises(BadSampleError, match=r"there are 0 to 2"):
        source[0]
    assert source[1].label == "cat"


@pytest.mark.parametrize(
    "content", [b"", b"no array", npy([1, 0]), npy([1, 0, 2]), npy(["a", "b", "c"]), npy([{}] * 3, allow_pickle=True)]
)
def test_a_damaged_array_is_a_bad_sample(tmp_path: Path, content: bytes) -> None:
    source = open_source(clip_benchmark(tmp_path / "set", [content, npy([1, 0, 0])], suffix="npy", kind="multilabel"))
    with pytest.raises(BadSampleError, match="npy"):
        source[0]


# Hugging Face

FEATURES = {
    "image": {"_type": "Image"},
    "label": {"names": ["cat", "dog"], "_type": "ClassLabel"},
    "text": {"dtype": "string", "_type": "Value"},
}


def rows(labels: Sequence[int | None], *, metadata: bool = True, features: dict[str, Any] = FEATURES) -> pa.Table:
    """A table as `datasets` writes it, with the meaning of its columns in the schema."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {
            "image": pa.array([{"bytes": PICTURES[i % 4], "path": f"{i}.png"} for i in range(len(labels))], image),
            "label": pa.array(labels, pa.int64()),
            "text": pa.array([f"number {i}" for i in range(len(labels))]),
        }
    )
    return table.replace_schema_metadata({b"huggingface": json.dumps({"info": {"features": features}})} if metadata else None)


def saved(folder: Path, *tables: pa.Table, stream: bool = True, **state: Any) -> Path:
    """A folder of `save_to_disk`."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(tables):05d}.arrow" for i in range(len(tables))]
    for name, table in zip(names, tables, strict=True):
        writer = pa.ipc.new_stream if stream else pa.ipc.new_file
        with pa.OSFile(str(folder / name), "wb") as file, writer(file, table.schema) as out:
            out.write_table(table, max_chunksize=2)
    files = [{"filename": name} for name in names]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_format_type": None, "_split": "test"} | state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": FEATURES, "splits": {}}))
    return folder


@pytest.mark.parametrize("stream", [True, False])
def test_saved_data_sets(tmp_path: Path, stream: bool) -> None:
    source = open_source(saved(tmp_path / "pets", rows([0, 1, 1]), rows([0, None, -1]), stream=stream))
    assert isinstance(source, HfSource)
    assert [source[i].label for i in range(6)] == ["cat", "dog", "dog", "cat", None, None]
    assert (source.part_sizes, source.classes) == ([3, 3], ("cat", "dog"))
    assert source[4].key == "data-00001-of-00002.arrow/0000001"
    assert (source[4].image, source[4].captions) == (PICTURES[1], ("number 1",))
    again = pickle.loads(pickle.dumps(source))
    assert again[4].image == PICTURES[1], "workers open the files themselves"
    with pytest.raises(IndexError):
        source[6]


def test_snapshots_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "set" / "data").mkdir(parents=True)
    for split, number in (("train", 1), ("test", 2)):
        for i in range(number):
            parquet.write_table(
                rows([0, 1, 1]), tmp_path / "set" / "data" / f"{split}-{i:05d}-of-{number:05d}.parquet", row_group_size=2
            )
    with pytest.raises(ValueError, match=r"2 splits.*give one of .*data/test\*\.parquet"):
        open_source(tmp_path / "set")
    source = open_source(f"{tmp_path}/set/data/test*.parquet")
    assert isinstance(source, HfSource)
    assert [source[i].label for i in (5, 0, 2, 3)] == ["dog", "cat", "dog", "cat"]
    for path in (tmp_path / "set" / "data").glob("train*"):
        path.unlink()
    assert len(open_source(tmp_path / "set")) == 6
    assert len(open_source(tmp_path / "set" / "data" / "test-00000-of-00002.parquet")) == 3


@pytest.mark.parametrize("form", ["list", "Sequence", "List"])
def test_lists_of_classes_are_several_labels(tmp_path: Path, form: str) -> None:
    inner = {"_type": "ClassLabel", "names": ["cat", "dog"]}
    listed = [inner] if form == "list" else {"_type": form, "feature": inner}
    features = {"image": {"_type": "Image"}, "classes": listed, "boxes": {"_type": "Sequence", "feature": {"_type": "Value"}}}
    table = rows([0, 0, 0, 0], metadata=False).drop_columns(["label"])
    table = table.append_column("classes", pa.array([[1, 0], [], None, [7]], pa.list_(pa.int64())))
    meaning = {b"huggingface": json.dumps({"info": {"features": features}})}
    parquet.write_table(table.replace_schema_metadata(meaning), tmp_path / "several.parquet")
    source = open_source(tmp_path / "several.parquet")
    assert isinstance(source, HfSource)
    assert (source.kind, source.classes) == ("multilabel", ("cat", "dog"))
    assert [source[i].meta["labels"] for i in range(3)] == [("dog", "cat"), (), ()]
    assert source[0].label is None
    with pytest.raises(BadSampleError, match="is of class 7; there are 0 to 1"):
        source[3]


def test_columns_are_found_without_metadata_and_by_wish(tmp_path: Path) -> None:
    bare = rows([0, 1], metadata=False)
    parquet.write_table(bare, tmp_path / "bare.parquet")
    assert [open_source(tmp_path / "bare.parquet")[i].label for i in range(2)] == ["0", "1"]
    cifar = bare.rename_columns(["img", "fine_label", "coarse_label"])
    cifar = cifar.set_column(2, "coarse_label", pa.array([5, 6]))
    parquet.write_table(cifar, tmp_path / "cifar.parquet")
    assert open_source(tmp_path / "cifar.parquet")[1].label == "1"
    assert open_source(DataSource(path=tmp_path / "cifar.parquet", label_column="coarse_label"))[1].label == "6"
    two = bare.append_column("left", bare["image"]).rename_columns(["right", "label", "text", "left"])
    parquet.write_table(two, tmp_path / "two.parquet")
    with pytest.raises(ValueError, match=r"2 columns of pictures \(right, left\); name it with DataSource"):
        open_source(tmp_path / "two.parquet")
    assert len(open_source(DataSource(path=tmp_path / "two.parquet", image_column="left"))) == 2


def test_pictures_without_bytes_come_from_the_folder_alone(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(PICTURES[0])
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    names = ["own.png", "../secret.png", str(secret), None, "none.png"]
    table = pa.table({"image": pa.array([{"bytes": None, "path": name} for name in names], image), "label": [0] * 5})
    folder = saved(tmp_path / "set", table)
    (folder / "own.png").write_bytes(PICTURES[3])
    source = open_source(folder)
    assert source[0].image == PICTURES[3]
    for row, said in ((1, "outside"), (2, "outside"), (3, "no picture"), (4, "does not exist")):
        with pytest.raises(BadSampleError, match=said):
            source[row]


def test_a_class_that_is_not_there_is_a_bad_sample(tmp_path: Path) -> None:
    source = open_source(saved(tmp_path / "set", rows([2, -2])))
    for row in range(2):
        with pytest.raises(BadSampleError, match="there are 0 to 1"):
            source[row]


def info(names: Any) -> str:
    """A dataset_info.json with these names of classes."""
    return json.dumps({"features": {"label": {"_type": "ClassLabel", "names": names}}})


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda f: (f / "state.json").write_text("{"), ValueError, "is not JSON"),
        (lambda f: (f / "state.json").write_text("[]"), ValueError, "no JSON object"),
        (lambda f: (f / "state.json").write_text("{}"), ValueError, "names no data files"),
        (lambda f: (f / "state.json").write_text('{"_data_files": [{"filename": "../x.arrow"}]}'), ValueError, "lies outside"),
        (lambda f: (f / "state.json").write_text('{"_data_files": [{"filename": "x.arrow"}]}'), FileNotFoundError, "missing"),
        (lambda f: (f / "state.json").write_text('{"_indices_data_files": [{}]}'), ValueError, "flatten_indices"),
        (lambda f: (f / "data-00000-of-00001.arrow").write_bytes(b"no arrow at all"), ValueError, "can't be read as Arrow"),
        (lambda f: (f / "dataset_info.json").write_text(info(["a", "a"])), ValueError, "'a' twice"),
        (lambda f: (f / "dataset_info.json").write_text(info("ab")), ValueError, "no list of names"),
    ],
)  # fmt: skip
def test_damaged_folders_are_named(tmp_path: Path, change: Callable[[Path], Any], error: type[Exception], said: str) -> None:
    folder = saved(tmp_path / "set", rows([0, 1]))
    change(folder)
    with pytest.raises(error, match=said):
        open_source(folder)


def test_dictionaries_of_splits(tmp_path: Path) -> None:
    for split in ("train", "test"):
        saved(tmp_path / "set" / split, rows([0, 1]))
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match=r"give one of .*set/train, .*set/test"):
        open_source(tmp_path / "set")
    assert len(open_source(tmp_path / "set" / "test")) == 2
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["../set/test"]}')
    with pytest.raises(ValueError, match="lies outside"):
        open_source(tmp_path / "set")


# Vectors

UNIT = np.eye(4, 8, dtype=np.float32)


def test_arrays_with_their_names_and_labels(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", UNIT)
    source = open_source(tmp_path / "x.npy")
    assert isinstance(source, VectorSource)
    assert (source.keys[1], source.labels, source.captions) == ("row 1", (None,) * 4, ((),) * 4)
    (tmp_path / "x.npy.names.txt").write_text("a\nb\nc\nd\n", encoding="utf-8")
    (tmp_path / "x.npy.labels.txt").write_text("cat\n\ndog\ncat", encoding="utf-8")
    source = open_source(tmp_path / "x.npy")
    assert isinstance(source, VectorSource)
    assert (source.keys, source.labels) == (("a", "b", "c", "d"), ("cat", None, "dog", "cat"))
    assert np.array_equal(source.vectors_ND, UNIT)
    with pytest.raises(BadSampleError, match="without its picture"):
        source[0]


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.float32()), pa.list_(pa.float32(), 8), pa.large_list(pa.float64()), pa.list_(pa.float16())]
)
def test_tables_of_vectors(tmp_path: Path, kind: pa.DataType) -> None:
    values = UNIT.astype(np.float16) if kind.value_type == pa.float16() else UNIT
    table = pa.table({"name": list("abcd"), "vector": pa.array([list(row) for row in values], kind), "label": [1, 2, None, 1]})
    table = table.append_column("caption", pa.array([["one", "two"], ["three"], [], None]))
    parquet.write_table(table, tmp_path / "x.parquet")
    source = open_source(tmp_path / "x.parquet")
    assert isinstance(source, VectorSource)
    assert (source.keys, source.labels) == (tuple("abcd"), ("1", "2", None, "1"))
    assert source.captions == (("one", "two"), ("three",), (), ())
    assert np.array_equal(source.vectors_ND, UNIT)


def test_tables_of_pictures_stay_tables_of_pictures(tmp_path: Path) -> None:
    table = pa.table({"path": ["a.png"], "caption": ["one"], "embedding": pa.array([[1.0]])})
    parquet.write_table(table, tmp_path / "x.parquet")
    assert isinstance(open_source(tmp_path / "x.parquet"), TableSource)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (npy(np.where(np.eye(4, 8) > 0, np.nan, 0)), "the vector of 'row 0' \\(row 0\\) is not finite"),
        (npy(np.eye(4, dtype=np.int64)), "vectors are floats"),
        (npy(np.zeros(4)), "vectors are floats"),
        (npy(np.zeros((0, 4))), "has no rows"),
        (npy(np.array([{}]), allow_pickle=True), "can't be read as an array"),
        (b"", "can't be read as an array"),
        (npy(UNIT)[:-4], "can't be read as an array"),
    ],
)
def test_hostile_arrays(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        open_source(tmp_path / "x.npy")


def test_lists_beside_arrays_must_fit(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", UNIT)
    (tmp_path / "x.npy.labels.txt").write_text("cat\ndog\n")
    with pytest.raises(ValueError, match="has 2 lines and x.npy 4 rows".replace(".", "[.]")):
        open_source(tmp_path / "x.npy")
    parquet.write_table(pa.table({"vector": [[1.0, 2.0], [1.0]]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="of one length"):
        open_source(tmp_path / "x.parquet")
    parquet.write_table(pa.table({"vector": [[1.0], None]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="without gaps"):
        open_source(tmp_path / "x.parquet")
