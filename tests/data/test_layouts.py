"""Published layouts on small trees made here, one's own folders, tables and split files; what is missing or wrong is named."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.data.make import encoded, picture
from wordsight.data import listed
from wordsight.data.few_shot import Splits, base_to_new, class_positions, few_shot
from wordsight.data.layouts import DOMAIN_SHIFTS, ELEVEN, LAYOUTS, open_splits, read_class_names
from wordsight.data.listed import read_split_file, write_split_file

IMAGE = encoded(picture(size=(8, 6)))
WORDNET = {
    "n01440764": "tench",
    "n01443537": "goldfish",
    "n03773504": "missile",
    "n04008634": "missile",
    "n04356056": "sunglasses",
}


def put(root: Path, paths: Iterable[str]) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(IMAGE)


def tree(root: Path, folder: str, images: str, split: str, pattern: str, classes: list[str]) -> Path:
    """A data set with a split file: 3 train, 1 val and 2 test pictures a class."""
    content: dict[str, list[list[object]]] = {"train": [], "val": [], "test": []}
    for index, name in enumerate(classes):
        for number in range(6):
            part = "train" if number < 3 else "val" if number == 3 else "test"
            path = pattern.format(part="test" if part == "test" else "train", name=name, i=f"{index}{number}")
            put(root / folder / images, [path])
            content[part].append([path, index, name])
    for rows in content.values():
        random.Random(0).shuffle(rows)  # published lists are shuffled
    (root / folder / split).write_text(json.dumps(content))
    return root / folder


# name -> folder, pictures, split file, paths in it, class names in the order of their indices
SPLIT_TREES = {
    "caltech101": (
        "caltech-101",
        "101_ObjectCategories",
        "split_zhou_Caltech101.json",
        "{name}/image_{i}.jpg",
        ["face", "leopard"],
    ),
    "oxford_pets": ("oxford_pets", "images", "split_zhou_OxfordPets.json", "{name}_{i}.jpg", ["abyssinian", "american_bulldog"]),
    "stanford_cars": (
        "stanford_cars",
        "",
        "split_zhou_StanfordCars.json",
        "cars_{part}/{i}.jpg",
        ["2000 AM General Hummer SUV", "2012 Acura RL Sedan"],
    ),
    "oxford_flowers": (
        "oxford_flowers",
        "jpg",
        "split_zhou_OxfordFlowers.json",
        "image_{i}.jpg",
        ["pink primrose", "hard-leaved pocket orchid"],
    ),
    "food101": ("food-101", "images", "split_zhou_Food101.json", "{name}/{i}.jpg", ["apple_pie", "baby_back_ribs"]),
    "sun397": ("sun397", "SUN397", "split_zhou_SUN397.json", "a/abbey/sun_{i}.jpg", ["abbey", "airplane_cabin"]),
    "dtd": ("dtd", "images", "split_zhou_DescribableTextures.json", "{name}/{name}_{i}.jpg", ["banded", "blotchy"]),
    "eurosat": ("eurosat", "2750", "split_zhou_EuroSAT.json", "AnnualCrop/{i}.jpg", ["Annual Crop Land", "Forest"]),
    "ucf101": ("ucf101", "UCF-101-midframes", "split_zhou_UCF101.json", "{name}/v_{i}.jpg", ["Apply_Eye_Makeup", "Archery"]),
}


def tree_of(name: str, root: Path) -> Path:
    """The published layout of any data set of the table, small."""
    if name in SPLIT_TREES:
        return tree(root, *SPLIT_TREES[name])
    if name == "fgvc_aircraft":
        return aircraft_tree(root)
    folder = root / LAYOUTS[name].folder
    present = list(WORDNET)[1:3] if name in ("imagenet_a", "imagenet_r") else list(WORDNET)
    if name == "imagenet":
        put(folder, [f"images/train/{one}/{one}_{i}.JPEG" for one in present for i in (10, 2, 1)])
        put(folder, [f"images/val/{one}/ILSVRC2012_val_{i}.JPEG" for one in present for i in (1, 2)])
    elif name == "imagenetv2":
        put(folder, [f"imagenetv2-matched-frequency-format-val/{i}/{k}.jpeg" for i in range(5) for k in (1, 2)])
    else:
        images = {"imagenet_sketch": "images", "imagenet_a": "imagenet-a", "imagenet_r": "imagenet-r"}[name]
        put(folder, [f"{images}/{one}/{k}.jpg" for one in present for k in (1, 2)])
        if name != "imagenet_sketch":
            (folder / images / "README.txt").write_text("no class")
    write_class_names(folder)
    return folder


def write_class_names(folder: Path) -> None:
    (folder / "classnames.txt").write_text("".join(f"{one} {name}\n" for one, name in WORDNET.items()))


def aircraft_tree(root: Path) -> Path:
    folder = root / "fgvc_aircraft"
    variants = ["707-320", "Boeing 717", "F/A-18"]
    numbers = iter(range(1025794, 1025900))
    for part, count in (("train", 3), ("val", 1), ("test", 2)):
        lines = [(str(next(numbers)), variant) for variant in reversed(variants) for _ in range(count)]
        put(folder, [f"images/{number}.jpg" for number, _ in lines])
        (folder / f"images_variant_{part}.txt").write_text("".join(f"{number} {variant}\n" for number, variant in lines))
    (folder / "variants.txt").write_text("\n".join(variants) + "\n")
    return folder


def check_samples(splits: Splits) -> None:
    for part in splits.parts().values():
        assert list(part.keys) == [part.source[i].key for i in range(len(part))]
        assert list(part.labels) == [part.source[i].label for i in range(len(part))]
        assert all(part.source[i].image == IMAGE for i in range(len(part)))
        assert list(part.targets()) == sorted(part.targets())  # class by class


def sizes(splits: Splits) -> dict[str, int]:
    return {part: len(given) for part, given in splits.parts().items()}


# -------------------------------------------------------------------------------------------------------------- published


def test_the_table_is_whole() -> None:
    assert len(ELEVEN) == 11
    assert len(DOMAIN_SHIFTS) == 4
    assert set(SPLIT_TREES) | {"imagenet", "fgvc_aircraft", *DOMAIN_SHIFTS} == set(LAYOUTS)


@pytest.mark.parametrize("name", list(SPLIT_TREES))
def test_data_sets_with_a_split_file(tmp_path: Path, name: str) -> None:
    folder = tree_of(name, tmp_path)
    splits = open_splits(name, tmp_path)
    assert sizes(splits) == {"train": 6, "val": 2, "test": 4}
    assert splits.classes == tuple(SPLIT_TREES[name][4])
    assert splits.name == name
    check_samples(splits)
    assert "published with" in splits.notes[0]
    assert open_splits(folder).test.keys == splits.test.keys  # the folder alone says which data set it is
    assert sizes(few_shot(splits, 1)) == {"train": 2, "val": 2, "test": 4}


def test_aircraft(tmp_path: Path) -> None:
    folder = tree_of("fgvc_aircraft", tmp_path)
    splits = open_splits("FGVCAircraft", tmp_path)
    assert splits.classes == ("707-320", "Boeing 717", "F/A-18")  # as variants.txt has them
    assert sizes(splits) == {"train": 9, "val": 3, "test": 6}
    assert splits.train.keys[0] == "1025800.jpg"
    check_samples(splits)
    (folder / "images" / "1025800.jpg").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"1 of the 18 pictures of fgvc_aircraft are missing:\n.*1025800.jpg\nPut the pictures"
    ):
        open_splits(folder)
    (folder / "images_variant_val.txt").write_text("1025800 707-999\n")
    with pytest.raises(ValueError, match=r"images_variant_val.txt, line 1: '707-999' is no variant"):
        open_splits(folder)


def test_imagenet_is_judged_by_its_val_folder(tmp_path: Path) -> None:
    folder = tree_of("imagenet", tmp_path)
    splits = open_splits("ImageNet", tmp_path)
    assert splits.classes == ("tench", "goldfish", "missile", "missile (n04008634)", "sunglasses")
    assert sizes(splits) == {"train": 15, "test": 10}
    assert splits.train.keys[:3] == tuple(f"train/n01440764/n01440764_{i}.JPEG" for i in (1, 10, 2))
    check_samples(splits)
    drawn = few_shot(splits, 1)
    assert sizes(drawn) == {"train": 5, "val": 5, "test": 10}
    assert "what the shots left of train" in drawn.notes[-1]
    put(folder, ["images/train/n99999999/1.JPEG"])
    with pytest.raises(ValueError, match=r"1 folders in .*train are not in classnames.txt: n99999999"):
        open_splits(folder)


@pytest.mark.parametrize("name", DOMAIN_SHIFTS)
def test_imagenet_variants_have_names_of_imagenet(tmp_path: Path, name: str) -> None:
    tree_of("imagenet", tmp_path)
    folder = tree_of(name, tmp_path)
    source, shifted = open_splits("imagenet", tmp_path), open_splits(name, tmp_path)
    assert shifted.train is shifted.val is None
    check_samples(shifted)
    if name in ("imagenet_a", "imagenet_r"):  # their own classes alone
        assert shifted.classes == ("goldfish", "missile")
        assert class_positions(shifted.classes, source.classes) == [1, 2]
    else:
        assert shifted.classes == source.classes
    with pytest.raises(ValueError, match="has no train split"):
        few_shot(shifted, 1)
    assert open_splits(folder).name == name
    put(folder / LAYOUTS[name].images, ["1000/x.jpg"])
    with pytest.raises(ValueError, match="1000"):
        open_splits(folder)


def test_variants_with_numbered_folders_keep_their_numbers(tmp_path: Path) -> None:
    folder = tree_of("imagenetv2", tmp_path)
    put(folder, [f"imagenetv2-matched-frequency-format-val/{i}/3.jpeg" for i in range(5)])
    lines = (folder / "classnames.txt").read_text().splitlines()
    (folder / "classnames.txt").write_text("\n".join(reversed(lines)))  # the index counts identities, not lines
    test = open_splits(folder).test
    assert {key.split("/")[0]: label for key, label in zip(test.keys, test.labels, strict=True)} == {
        "0": "tench",
        "1": "goldfish",
        "2": "missile",
        "3": "missile (n04008634)",
        "4": "sunglasses",
    }


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_what_is_missing_is_said_with_its_place(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match="is not complete") as error:
        open_splits(name, tmp_path)
    folder = tmp_path / LAYOUTS[name].folder
    for need in LAYOUTS[name].needs:
        assert str(folder / need) in str(error.value)
    assert "DATASETS.md" in str(error.value)
    tree_of(name, tmp_path)
    need = LAYOUTS[name].needs[-1]
    (folder / need).unlink()
    with pytest.raises(FileNotFoundError, match=f"there is no {need}"):
        open_splits(name, tmp_path)


def test_names_folders_and_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tree_of("oxford_pets", tmp_path)
    expected = open_splits("oxford_pets", tmp_path).train.keys
    for data, root in (
        ("OxfordPets", tmp_path),
        ("oxford-pets", folder),  # the data set's own folder will do
        (folder, None),
        (folder / "split_zhou_OxfordPets.json", None),  # its pictures are known to lie in images/
        (folder / "split_zhou_OxfordPets.json", folder / "images"),
    ):
        assert open_splits(data, root).train.keys == expected
    with pytest.raises(FileNotFoundError, match="give the folder that holds it as root"):
        open_splits("flowers102")
    with pytest.raises(FileNotFoundError, match="did you mean oxford_pets"):
        open_splits("oxfordpet", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"is no file, no folder and no published.*imagenet, caltech101"):
        open_splits("/nowhere/at/all", tmp_path)
    (tmp_path / "x.png").write_bytes(IMAGE)
    with pytest.raises(ValueError, match="neither a table"):
        open_splits(tmp_path / "x.png")
    monkeypatch.chdir(tmp_path)
    assert open_splits("oxford_pets").train.keys == expected  # a folder here, with a published layout in it


def test_class_names_file(tmp_path: Path) -> None:
    path = tmp_path / "classnames.txt"
    for content, problem in (
        ("tench n01440764\n", "line 1 is 'tench n01440764'"),
        ("n01440764 tench\nn01440764 trout\n", "line 2"),
        ("n01440764 \n", "line 1"),
        ("\n", "is empty"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=problem):
            read_class_names(path)


# --------------------------------------------------------------------------------------------------------------- one's own


def test_class_folders(tmp_path: Path) -> None:
    put(tmp_path, ["cat/b.jpg", "cat/deep/a.PNG", "train/t.jpeg", "bus/1.webp", ".hidden/x.jpg", "cat/.y.jpg", "loose.jpg"])
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    splits = open_splits(tmp_path)
    assert splits.classes == ("bus", "cat", "train")  # a class may be called train
    assert splits.train.keys == ("bus/1.webp", "cat/b.jpg", "cat/deep/a.PNG", "train/t.jpeg")
    assert splits.val is splits.test is None
    assert "loose.jpg" in splits.notes[0]
    check_samples(splits)
    assert splits.train.source[1].label == "cat"
    with pytest.raises(IndexError, match="sample 4 of 4"):
        splits.train.source[4]


def test_listing_is_sorted_whatever_the_file_system_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, [f"{name}/{i}.jpg" for name in ("z", "a", "m") for i in range(5)])
    expected = open_splits(tmp_path).train.keys
    walk = listed.os.walk

    def shuffled(*args: object, **options: object):
        for path, folders, files in walk(*args, **options):
            random.Random(len(path)).shuffle(files)
            yield path, folders, files

    monkeypatch.setattr(listed.os, "walk", shuffled)
    assert open_splits(tmp_path).train.keys == expected == tuple(sorted(expected))


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val", None])
def test_class_folders_in_split_folders(tmp_path: Path, val: str | None) -> None:
    put(tmp_path, ["train/cat/1.jpg", "train/dog/1.jpg", "test/cat/1.jpg", "test/eel/1.jpg"])
    if val:
        put(tmp_path, [f"{val}/dog/1.jpg"])
    splits = open_splits(tmp_path)
    assert splits.classes == ("cat", "dog", "eel")
    assert splits.train.keys == ("train/cat/1.jpg", "train/dog/1.jpg")
    assert splits.test.keys == ("test/cat/1.jpg", "test/eel/1.jpg")
    assert splits.val.keys == (f"{val}/dog/1.jpg",) if val else splits.val is None
    check_samples(splits)
    with pytest.raises(ValueError, match="no picture in train: 'eel'"):
        few_shot(splits, 1)
    put(tmp_path, ["extra/1.jpg"])
    with pytest.raises(ValueError, match=r"holds split folders \(.*train.*\) and beside them extra"):
        open_splits(tmp_path)


def test_a_folder_without_class_folders(tmp_path: Path) -> None:
    put(tmp_path, ["1.jpg"])
    with pytest.raises(ValueError, match="no pictures in class folders"):
        open_splits(tmp_path)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
@pytest.mark.parametrize("with_split", [True, False])
def test_tables(tmp_path: Path, kind: str, with_split: bool) -> None:
    rows = [
        ("p/1.jpg", "Dog", "train"),
        ("p/2.jpg", "ant, red", "validation"),
        ("./p/3.jpg", "Dog", "Test"),
        ("4.jpg", "7", "train"),
    ]
    put(tmp_path / "pictures", [path for path, _, _ in rows])
    names = ("path", "label", "split")[: 3 if with_split else 2]
    file = tmp_path / f"mine.{kind}"
    if kind == "jsonl":
        file.write_text("".join(json.dumps(dict(zip(names, row, strict=False))) + "\n" for row in rows))
    else:
        mark = {"csv": ",", "tsv": "\t"}[kind]
        cells = [names, *((f'"{cell}"' for cell in row[: len(names)]) for row in rows)]
        file.write_text("".join(mark.join(row) + "\n" for row in cells))
    splits = open_splits(file, tmp_path / "pictures")
    assert splits.classes == ("7", "Dog", "ant, red")
    assert splits.name == "mine"
    assert sizes(splits) == ({"train": 2, "val": 1, "test": 1} if with_split else {"train": 4})
    check_samples(splits)
    assert splits.train.keys[0] == "4.jpg"
    if with_split:
        assert splits.test.keys == ("p/3.jpg",)
    with pytest.raises(FileNotFoundError, match=f"4 of the 4 pictures of mine are missing(.|\n)*start from {tmp_path}"):
        open_splits(file)


def test_tables_with_absolute_paths(tmp_path: Path) -> None:
    put(tmp_path, ["a/1.jpg", "b/2.jpg"])
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "mine.csv").write_text(f"file,class\n{tmp_path}/a/1.jpg,x\n../b/2.jpg,y\n")
    splits = open_splits(tmp_path / "t" / "mine.csv")
    assert splits.classes == ("x", "y")
    check_samples(splits)
    with pytest.raises(ValueError, match="holds relative paths only; '/"):
        write_split_file(splits, tmp_path / "split.json")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("path,caption\n1.jpg,x\n", r"has no column of labels: call it one of label, class.*It has path, caption"),
        ("name,label\n1.jpg,x\n", r"has no column of paths"),
        ("path,label\n1.jpg,\n,x\n", r"has 2 rows that can't be used:\n  row 1 has no label\n  row 2 has no path"),
        ("path,label,split\n1.jpg,x,dev\n", r"row 1 is in split 'dev'; known are train"),
        ("path,label\n1.jpg,x,y,z\n", r"line 2 has 4 columns, not 2"),
        ("path,label\n1.jpg,x\n1.jpg,y\n", r"more than once:\n  1.jpg: train as 'x', train as 'y'"),
        ("path,label,split\n1.jpg,x,train\n./1.jpg,x,test\n", r"more than once:\n  1.jpg: train as 'x', test as 'x'"),
        ("path,label\n", r"no rows"),
        ("", r"is empty"),
    ],
)
def test_tables_that_can_t_be_used(tmp_path: Path, content: str, problem: str) -> None:
    put(tmp_path, ["1.jpg"])
    (tmp_path / "mine.csv").write_text(content)
    with pytest.raises(ValueError, match=problem):
        open_splits(tmp_path / "mine.csv")


# ------------------------------------------------------------------------------------------------------------- split files


def test_split_files_out_and_in(tmp_path: Path) -> None:
    put(tmp_path, [f"{part}/{name}/{i}.jpg" for part in ("train", "test") for name in ("zebra", "ähre", "b_c") for i in range(4)])
    splits = open_splits(tmp_path)
    write_split_file(splits, tmp_path / "split.json")
    again = open_splits(tmp_path / "split.json")
    assert again.val is None
    for part, given in splits.parts().items():
        other = again.parts()[part]
        assert (other.keys, other.labels, other.classes) == (given.keys, given.labels, given.classes)
    content = json.loads((tmp_path / "split.json").read_text())
    assert content["train"][0] == ["train/b_c/0.jpg", 0, "b_c"]
    shots = few_shot(splits, 2, num_val_shots=1)
    write_split_file(shots, tmp_path / "shots.json")
    assert sizes(open_splits(tmp_path / "shots.json")) == {"train": 6, "val": 3, "test": 12}
    with pytest.raises(ValueError, match="classes without pictures, such as 'b_c'"):
        write_split_file(Splits(name="d", classes=splits.classes, train=splits.train.select([4])), tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()


def test_split_files_keep_their_indices(tmp_path: Path) -> None:
    """Base and new classes go by index: names in another order must not be sorted."""
    names = ["zebra", "ant", "yak", "bee", "owl"]
    folder = tree(tmp_path, "d", "", "split.json", "{name}/{i}.jpg", names)
    splits = open_splits(folder / "split.json")
    assert splits.classes == tuple(names)
    base, new = base_to_new(splits)
    assert (base.classes, new.classes) == (("zebra", "ant", "yak"), ("bee", "owl"))


GOOD = ["1.jpg", 0, "a"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ([GOOD], "is no split file: .*found list"),
        ({"train": [GOOD], "dev": []}, "found 'train', 'dev'"),
        ({}, "is no split file"),
        ({"train": []}, "lists no picture"),
        ({"train": {"1.jpg": 0}}, "'train' must be a list of"),
        ({"train": [GOOD, ["1.jpg", 0]]}, r"train\[1\] is .*not \[path, class index, class name\]"),
        ({"train": [["1.jpg", "0", "a"]]}, r"train\[0\] has class index '0'"),
        ({"train": [["1.jpg", True, "a"]]}, "class index True"),
        ({"train": [["1.jpg", -1, "a"]]}, "class index -1"),
        ({"train": [["1.jpg", 0.0, "a"]]}, "class index 0.0"),
        ({"train": [GOOD, ["2.jpg", 0, "b"]]}, r"train\[1\]: class index 0 is called 'a' and 'b'"),
        ({"train": [GOOD], "test": [["2.jpg", 2, "b"]]}, "2 classes with indices up to 2, but none has index 1"),
        ({"train": [GOOD, ["2.jpg", 1, "a"]]}, "calls several classes 'a': indices 0, 1"),
        ({"train": [GOOD], "test": [GOOD]}, "more than once:\n  1.jpg: train as 'a', test as 'a'"),
        ({"train": [GOOD, GOOD]}, "more than once"),
        *[
            ({"train": [[path, 0, "a"]]}, "refused path")
            for path in (
                "/etc/passwd",
                "../1.jpg",
                "a/../../1.jpg",
                "..",
                "C:\\1.jpg",
                "a\\..\\..\\1.jpg",
                "\\\\host\\s\\1.jpg",
                "",
                "a\0.jpg",
            )
        ],
    ],
)
def test_split_files_that_can_t_be_used(tmp_path: Path, content: object, problem: str) -> None:
    put(tmp_path, ["d/1.jpg", "d/2.jpg", "1.jpg"])
    file = tmp_path / "d" / "split.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=problem):
        read_split_file(file)


def test_pictures_of_a_split_file_that_are_missing(tmp_path: Path) -> None:
    folder = tree(tmp_path, "d", "", "split.json", "{name}/{i}.jpg", ["a", "b"])
    (folder / "a" / "01.jpg").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"1 of the 12 pictures of split are missing:\n.*a/01.jpg\nPaths in .* start from"
    ):
        read_split_file(folder / "split.json")
