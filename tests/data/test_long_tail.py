"""Skewed splits, balanced sampling and the published long-tailed data sets: published counts, round trips, hostile input."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from tests.data.make import encoded, picture
from wordsight.data.errors import BadSampleError
from wordsight.data.few_shot import LabelledSet, Splits
from wordsight.data.listed import ListedSource, MissingPicturesError
from wordsight.data.long_tail import (
    ClassBalancedOrder,
    exponential_counts,
    open_long_tail,
    read_cifar,
    read_inaturalist,
    read_lists,
    skew,
)

PICTURE = encoded(picture(), "PNG")


@pytest.mark.parametrize(
    ("num_max", "num_classes", "factor", "total"),
    [
        (5000, 10, 10, 20431),
        (5000, 10, 50, 13996),
        (5000, 10, 100, 12406),
        (500, 100, 10, 19573),
        (500, 100, 50, 12608),
        (500, 100, 100, 10847),
    ],
)
def test_counts_of_the_published_cifar_lt(num_max: int, num_classes: int, factor: int, total: int) -> None:
    counts = exponential_counts(num_max, num_classes, factor)
    assert sum(counts) == total
    assert counts == [int(num_max * (1 / factor) ** (i / (num_classes - 1.0))) for i in range(num_classes)]
    assert (counts[0], counts[-1]) == (num_max, num_max // factor)


def test_counts_by_hand() -> None:
    assert exponential_counts(5000, 10, 100) == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert exponential_counts(1000, 4, 1000) == [1000, 100, 10, 1]
    assert exponential_counts(7, 3, 1) == [7, 7, 7]
    assert exponential_counts(7, 1, 3) == [7]


@given(st.integers(1, 10_000), st.integers(2, 60), st.floats(1, 1000))
def test_counts_fall_from_the_largest_to_the_factors_part(num_max: int, num_classes: int, factor: float) -> None:
    if num_max * (1 + 1e-9) < factor:  # what rounding may add is no reason to refuse
        with pytest.raises(ValueError, match="leaves the smallest none"):
            exponential_counts(num_max, num_classes, factor)
        return
    counts = exponential_counts(num_max, num_classes, factor)
    assert len(counts) == num_classes
    assert counts[0] == num_max
    assert counts[-1] in (int(num_max / factor), int(num_max / factor + 1e-5))
    assert all(a >= b >= 1 for a, b in itertools.pairwise(counts))


def balanced(counts: dict[str, int], *, val: int = 0, reverse: bool = False) -> Splits:
    def labelled(part: str, sizes: dict[str, int]) -> LabelledSet:
        rows = [(f"{part}/{name}/{i:04d}.png", name) for name, size in sizes.items() for i in range(size)]
        rows = rows[::-1] if reverse else rows
        return LabelledSet(
            source=ListedSource(Path("nowhere"), rows),
            keys=tuple(path for path, _ in rows),
            labels=tuple(name for _, name in rows),
            classes=tuple(sizes),
        )

    return Splits(
        name="toys",
        classes=tuple(counts),
        train=labelled("train", counts),
        val=labelled("val", dict.fromkeys(counts, val)) if val else None,
        test=labelled("test", dict.fromkeys(counts, 3)),
    )


def test_a_skewed_split_has_the_profiles_counts_and_a_draw_that_depends_on_nothing_else() -> None:
    data = balanced(dict.fromkeys("abcd", 100), val=2)
    drawn = skew(data, 20, seed=1)
    assert list(drawn.train.counts().values()) == exponential_counts(100, 4, 20) == [100, 36, 13, 5]
    assert (drawn.val, drawn.test) == (data.val, data.test)
    assert set(drawn.train.keys) <= set(data.train.keys)
    assert len(set(drawn.train.keys)) == len(drawn.train)
    assert "training classes skewed from 100 to 5 pictures, factor 20, seed 1: 154" in drawn.notes
    # the order of the listing, a class more and a larger factor leave what is drawn
    assert skew(balanced(dict.fromkeys("abcd", 100), reverse=True), 20, seed=1).train.keys == drawn.train.keys
    rarer = skew(data, 50, seed=1)
    assert set(rarer.train.keys) < set(drawn.train.keys)
    other = skew(data, 20, seed=2)
    assert other.train.counts() == drawn.train.counts()
    assert set(other.train.keys) != set(drawn.train.keys)


def test_validation_pictures_are_set_aside_first() -> None:
    data = balanced(dict.fromkeys("abc", 30))
    drawn, rarer = skew(data, 5, seed=1, num_val=4), skew(data, 25, seed=1, num_val=4)
    assert drawn.val.counts() == dict.fromkeys("abc", 4)
    assert drawn.val.keys == rarer.val.keys
    assert not set(drawn.val.keys) & set(drawn.train.keys)
    assert list(drawn.train.counts().values()) == exponential_counts(26, 3, 5)


def test_what_can_not_be_skewed_is_named() -> None:
    data = balanced({"a": 50, "b": 50, "c": 2})
    assert list(skew(data, 2, seed=0).train.counts().values()) == [2, 1, 1], "the smallest class is the measure"
    assert list(skew(data, 25, seed=0, num_max=50).train.counts().values()) == [50, 10, 2]
    with pytest.raises(ValueError, match=r"1 of 3 classes .* 'c' \(2\); asked for are 5"):
        skew(data, 10, seed=0, num_max=50)
    with pytest.raises(ValueError, match=r"too few training pictures of 'c' \(2\): each class needs 3"):
        skew(data, 1, seed=0, num_val=2)
    with pytest.raises(ValueError, match="factor of 3 leaves the smallest none"):
        skew(data, 3, seed=0)
    with pytest.raises(ValueError, match="num_val"):
        skew(balanced({"a": 5, "b": 5}, val=1), 2, seed=0, num_val=1)
    with pytest.raises(ValueError, match=r"1 or more, got 3, 2 and 0\.5"):
        skew(data, 0.5, seed=0)
    with pytest.raises(ValueError, match="no train split"):
        skew(Splits(name="toys", classes=data.classes, test=data.test), 2, seed=0)


# ------------------------------------------------------------------------------------------------------------------ sampling


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.integers(0, 99), st.integers(0, 5), st.data())
def test_draws_are_functions_of_seed_epoch_and_position(targets: list[int], seed: int, epoch: int, data: st.DataObject) -> None:
    whole = ClassBalancedOrder(targets, seed=seed).indices(epoch, 0, 50)
    start = data.draw(st.integers(0, 50))
    stop = data.draw(st.integers(start, 50))
    assert np.array_equal(ClassBalancedOrder(np.array(targets), seed=seed).indices(epoch, start, stop), whole[start:stop])
    assert whole.dtype == np.int64
    assert whole.min() >= 0
    assert whole.max() < len(targets)


def test_classes_are_drawn_alike_and_samples_within_a_class_too() -> None:
    targets = np.repeat([0, 2, 5], [900, 90, 10])  # classes 1, 3 and 4 have no sample
    order = ClassBalancedOrder(np.random.default_rng(0).permutation(targets), seed=3)
    shuffled = np.random.default_rng(0).permutation(targets)
    drawn = order.indices(0, 0, 30_000)
    assert chisquare(np.bincount(shuffled[drawn])[[0, 2, 5]]).pvalue > 0.001
    for one in (0, 2, 5):
        times = np.bincount(drawn[shuffled[drawn] == one], minlength=1000)[shuffled == one]
        assert chisquare(times).pvalue > 0.001
    later = order.indices(1, 0, 30_000)
    assert np.mean(later == drawn) < 0.05, "epochs differ"
    assert np.mean(ClassBalancedOrder(shuffled, seed=4).indices(0, 0, 30_000) == drawn) < 0.05, "seeds differ"


@pytest.mark.parametrize("targets", [[], [-1, 0], [0.5], [[0, 1]]])
def test_classes_that_can_not_be_sampled_are_refused(targets: list[Any]) -> None:
    with pytest.raises(ValueError, match="integers of 0 or more"):
        ClassBalancedOrder(targets, seed=0)
    with pytest.raises(ValueError, match="start before stop"):
        ClassBalancedOrder([0], seed=0).indices(0, 3, 2)


# ---------------------------------------------------------------------------------------------------------------- list files


def write_lists(folder: Path, lines: dict[str, list[str]], *, name: str = "Toys_LT", without: tuple[str, ...] = ()) -> Path:
    for part, found in lines.items():
        (folder / f"{name}_{part}.txt").write_text("\n".join(found) + "\n", encoding="utf-8")
        for line in found:
            path = folder / line.rpartition(" ")[0]
            if path.as_posix().endswith(".png") and ".." not in path.parts and not any(end in str(path) for end in without):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(PICTURE)
    return folder


LINES = {
    "train": ["train/n02/b 1.png 1", "train/n01/a1.png 0", "train/n01/a2.png 0", "train/n01/a3.png 0", "train/n03/c.png 2"],
    "val": ["train/n02/v.png 1"],
    "test": ["val/t0.png 0", "val/t1.png 1", "val/t2.png 2"],
}


def test_list_files_give_splits_named_by_the_folders_of_the_classes(tmp_path: Path) -> None:
    splits = open_long_tail(write_lists(tmp_path, LINES))
    assert splits.classes == ("n01", "n02", "n03")
    assert splits.train.counts() == {"n01": 3, "n02": 1, "n03": 1}
    assert splits.train.keys[3] == "train/n02/b 1.png", "paths may have spaces"
    assert splits.train.source[3].image == PICTURE
    assert splits.test.labels == ("n01", "n02", "n03")
    assert splits.notes == ("2 of 3 classes have no picture in val: n01, n03",)
    # the same read by name, with other roots, names and forms
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for part, lines in LINES.items():
        content = "\ufeff" + "".join(line.replace(" ", "\t") if "b 1" not in line else line for line in lines[:1])
        (moved / f"{part}.txt").write_text(content + "\r\n\r\n" + "\r\n".join(lines[1:]), encoding="utf-8")
    lists = {part: moved / f"{part}.txt" for part in LINES}
    names = moved / "names.txt"
    for text, expected in (
        ("ant\nbee\ncat\n", ("ant", "bee", "cat")),
        ("n01 ant\nn02 great bee\nn03 ant\n", ("ant", "great bee", "ant (n03)")),
    ):
        names.write_text(text)
        again = read_lists(lists, tmp_path, classes=names, name="toys")
        assert again.classes == expected
        assert again.train.keys == splits.train.keys
        assert again.name == "toys"
    # names by identity follow the folders, in whatever order the file has them; the file is found beside the lists
    (tmp_path / "classnames.txt").write_text("n03 cat\nn00 dog\nn02 great bee\nn01 ant\n")
    assert open_long_tail(tmp_path).classes == ("ant", "great bee", "cat")


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (["a/airfield", "a/flat/inside", "f/flat/outside"], ("airfield", "inside", "outside")),
        (["c/church/indoor", "c/cinema/indoor", "d/desert"], ("church/indoor", "cinema/indoor", "desert")),
        (["x", "a/x", "b"], ("0", "1", "2")),
        (["all", "all", "all"], ("0", "1", "2")),
    ],
)
def test_classes_are_called_what_tells_their_folders_apart(tmp_path: Path, folders: list[str], expected: tuple[str, ...]) -> None:
    lines = [f"{folder}/{i}.png {i}" for i, folder in enumerate(folders)]
    assert open_long_tail(write_lists(tmp_path, {"train": lines})).classes == expected


def test_missing_pictures_are_all_in_the_error_and_the_first_ten_in_its_message(tmp_path: Path) -> None:
    lines = [f"a/{i:02d}.png 0" for i in range(30)] + ["b/x.png 1"]
    write_lists(tmp_path, {"train": lines}, without=tuple(f"a/{i:02d}" for i in range(5, 25)))
    with pytest.raises(MissingPicturesError) as caught:
        open_long_tail(tmp_path)
    assert caught.value.missing == tuple(f"a/{i:02d}.png" for i in range(5, 25))
    told = str(caught.value)
    assert "20 of the 31 pictures of" in told
    assert "a/14.png" in told
    assert "a/15.png" not in told
    assert "mend the list" in told


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a.png"], r"line 1 is 'a\.png', not a path and a class's number"),
        (["a.png 0", "b.png -1"], "line 2"),
        (["a.png 0.5"], "line 1"),
        (["a.png ²"], "line 1"),
        (["a.png 99999999999999999999"], "line 1"),
        (["../a.png 0"], "refused path '../a.png'"),
        (["/etc/passwd 0"], "refused path '/etc/passwd'"),
        (["C:\\a.png 0"], "refused path"),
        (["a.png 7"], "label 7 asks for 8 classes, and 1 pictures are listed"),
        (["a/a.png 0", "a/a.png 0"], "more than once"),
        ([f"bad{i}" for i in range(30)], "has 30 lines that can't be used"),
        ([""], "lists no picture"),
    ],
)
def test_damaged_and_hostile_lists_are_refused(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_long_tail(write_lists(tmp_path, {"train": lines}))


def test_lists_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    write_lists(tmp_path, LINES)
    with pytest.raises(ValueError, match="there are 2 classes, so labels are 0 to 1; also listed are 2"):
        read_lists({"train": tmp_path / "Toys_LT_train.txt"}, tmp_path, classes=["a", "b"])
    with pytest.raises(ValueError, match="class names must differ"):
        read_lists({"train": tmp_path / "Toys_LT_train.txt"}, tmp_path, classes=["a", "b", "a"])
    with pytest.raises(ValueError, match="one or more of them; got dev"):
        read_lists({"dev": tmp_path / "Toys_LT_train.txt"}, tmp_path)
    (tmp_path / "Toys_LT_val.txt").write_text("train/n01/a1.png 0\n")
    with pytest.raises(ValueError, match=r"(?s)more than once.*train as 'n01', val as 'n01'"):
        open_long_tail(tmp_path)
    (tmp_path / "Toys_LT_val.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="no text in UTF-8"):
        open_long_tail(tmp_path)
    (tmp_path / "Other_train.txt").write_text("a.png 0\n")
    with pytest.raises(ValueError, match="several data sets, Other, Toys_LT"):
        open_long_tail(tmp_path)


# -------------------------------------------------------------------------------------------------------------- iNaturalist


def coco(part: str, images: dict[int, int], categories: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "info": {"year": 2018},
        "images": [{"id": i, "file_name": f"train_val2018/Aves/{c}/{part}{i}.png", "width": 8} for i, c in images.items()],
        "annotations": [{"id": i, "image_id": i, "category_id": c} for i, c in images.items()],
        "categories": categories,
    }


CATEGORIES = [{"id": 7, "name": "Corvus corax"}, {"id": 2, "name": "Apis mellifera"}, {"id": 9, "name": "Rara avis"}]


def write_coco(folder: Path, train: dict[str, Any], val: dict[str, Any]) -> Path:
    for name, content in (("train2018", train), ("val2018", val)):
        (folder / f"{name}.json").write_text(json.dumps(content))
        for image in content.get("images", []):
            path = folder / image["file_name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(PICTURE)
    return folder


def test_inaturalist_json(tmp_path: Path) -> None:
    train, val = coco("t", {1: 7, 2: 7, 3: 2}, CATEGORIES), coco("v", {1: 7, 5: 9}, CATEGORIES[::-1])
    splits = open_long_tail(write_coco(tmp_path, train, val))
    assert splits.classes == ("Apis mellifera", "Corvus corax", "Rara avis")
    assert splits.train.counts() == {"Apis mellifera": 1, "Corvus corax": 2, "Rara avis": 0}
    assert splits.train.targets() == [0, 1, 1]
    assert splits.train.keys == ("train_val2018/Aves/2/t3.png", "train_val2018/Aves/7/t1.png", "train_val2018/Aves/7/t2.png")
    assert splits.test.labels == ("Corvus corax", "Rara avis")
    assert splits.val is None
    assert "1 of 3 classes have no picture in train: Rara avis" in splits.notes
    hidden = [{"id": one["id"]} for one in CATEGORIES]  # as the competition gave them
    splits = read_inaturalist(write_coco(tmp_path, train | {"categories": hidden}, val | {"categories": hidden}))
    assert splits.classes == ("2", "7", "9")
    (tmp_path / "train_val2018/Aves/7/t1.png").unlink()
    with pytest.raises(MissingPicturesError) as caught:
        read_inaturalist(tmp_path)
    assert caught.value.missing == ("train_val2018/Aves/7/t1.png",)


def damaged(change: str) -> dict[str, Any]:
    content = coco("t", {1: 7, 2: 7, 3: 2}, CATEGORIES)
    if change == "no annotations":
        del content["annotations"]
    elif change == "no list":
        content["images"] = 5
    elif change == "text id":
        content["annotations"][0]["category_id"] = "7"
    elif change == "image unlabelled":
        content["annotations"].pop()
    elif change == "two classes":
        content["annotations"].append({"image_id": 1, "category_id": 2})
    elif change == "unknown category":
        content["annotations"][0]["category_id"] = 99
    elif change == "unknown image":
        content["annotations"].append({"image_id": 50, "category_id": 2})
    elif change == "leads out":
        content["images"][0]["file_name"] = "../../t1.png"
    elif change == "empty":
        content["images"], content["annotations"] = [], []
    return content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no annotations", "Files of test pictures have no annotations"),
        ("no list", "COCO's form"),
        ("text id", "an id is an integer, not '7'"),
        ("image unlabelled", "image 3 has no annotation"),
        ("two classes", "image 1 is of categories 7 and 2"),
        ("unknown category", "image 1 is of category 99, which is not listed"),
        ("unknown image", "annotation is of image 50"),
        ("leads out", "refused path '../../t1.png'"),
        ("empty", "lists no image"),
    ],
)
def test_damaged_and_hostile_json_is_refused(tmp_path: Path, change: str, message: str) -> None:
    (tmp_path / "inside").mkdir()
    write_coco(tmp_path / "inside", damaged("nothing"), coco("v", {1: 7}, CATEGORIES))
    (tmp_path / "inside" / "train2018.json").write_text(json.dumps(damaged(change)))
    with pytest.raises(ValueError, match=message):
        read_inaturalist(tmp_path / "inside")


def test_json_that_is_none_or_of_other_categories_is_refused(tmp_path: Path) -> None:
    write_coco(tmp_path, damaged("nothing"), coco("v", {1: 7}, [*CATEGORIES, {"id": 11, "name": "Novum"}]))
    with pytest.raises(ValueError, match="name different categories, ids 11"):
        read_inaturalist(tmp_path)
    (tmp_path / "val2018.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"val2018.json is not JSON"):
        read_inaturalist(tmp_path)


# -------------------------------------------------------------------------------------------------------------------- CIFAR


def write_cifar(folder: Path, *, fine: bool, number: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """`number` pictures a file; returns the pictures [N, 32, 32, 3] and classes of the training files."""
    rng = np.random.default_rng(0)
    files = ["train.bin", "test.bin"] if fine else [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    pixels = rng.integers(0, 256, (len(files), number, 3, 32, 32), dtype=np.uint8)
    labels = np.arange(len(files) * number, dtype=np.uint8).reshape(len(files), number) % 3
    for name, images, classes in zip(files, pixels, labels, strict=True):
        heads = np.stack([classes + 50, classes], 1) if fine else classes[:, None]
        (folder / name).write_bytes(np.concatenate([heads, images.reshape(number, -1)], 1).tobytes())
    names = "fine_label_names.txt" if fine else "batches.meta.txt"
    (folder / names).write_text("ant\nbee\ncat\n\n")
    return pixels[:-1].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels[:-1].ravel()


@pytest.mark.parametrize("fine", [False, True])
def test_cifar_in_its_binary_version_and_its_long_tail(tmp_path: Path, fine: bool) -> None:
    pixels, labels = write_cifar(tmp_path, fine=fine)
    splits = open_long_tail(tmp_path)
    assert splits.name == ("cifar100" if fine else "cifar10")
    assert splits.train.targets() == labels.tolist()
    assert len(set(splits.train.keys)) == len(labels)
    assert len(splits.test) == 12
    for i in (0, 5, len(labels) - 1):
        sample = splits.train.source[i]
        assert np.array_equal(np.array(sample.image), pixels[i])
        assert (sample.key, sample.label) == (splits.train.keys[i], ("ant", "bee", "cat")[labels[i]])
    drawn = skew(splits, 4, seed=0)
    assert list(drawn.train.counts().values()) == exponential_counts(len(labels) // 3, 3, 4)
    assert Counter(drawn.train.source[i].label for i in range(len(drawn.train))) == drawn.train.counts()
    with pytest.raises(IndexError):
        splits.train.source[len(labels)]
    first = tmp_path / ("train.bin" if fine else "data_batch_1.bin")
    first.write_bytes(first.read_bytes()[:5000])
    with pytest.raises(BadSampleError, match="is cut off"):
        splits.train.source[5]
    with pytest.raises(ValueError, match="5,000 bytes; a whole number of pictures"):
        read_cifar(tmp_path)
    first.unlink()
    with pytest.raises(BadSampleError, match="can't be read"):
        splits.train.source[5]


def test_cifar_that_can_not_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no CIFAR under"):
        read_cifar(tmp_path)
    write_cifar(tmp_path, fine=False)
    (tmp_path / "batches.meta.txt").write_text("ant\nbee\n")
    with pytest.raises(ValueError, match="a picture of class 2, and 2 class names"):
        read_cifar(tmp_path)
    (tmp_path / "data_batch_3.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"no data_batch_3\.bin"):
        read_cifar(tmp_path)
    (tmp_path / "data_batch_1").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(ValueError, match="pickles that can run code"):
        open_long_tail(tmp_path)


def test_other_data_opens_as_everywhere(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(PICTURE)
    assert open_long_tail(tmp_path).train.counts() == {"a": 1, "b": 1}
