"""Weights of training pictures: read, checked, kept with the pictures, written."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from tests.adapt.make import colour_folders
from wordsight.data.few_shot import LabelledSet, Splits
from wordsight.data.layouts import open_splits
from wordsight.data.split_table import write_split_table
from wordsight.data.weights import UnknownPicturesError, read_weights, weigh


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colour_folders(tmp_path_factory.mktemp("weights"), {"train": 3, "val": 1, "test": 1}, ("red", "blue"))


def table(folders: Path, path: Path, weights: dict[str, str]) -> Path:
    """A table of the pictures with a weight column; blank where there is none."""
    rows = [
        (folders / key, label, part, weights.get(key, ""))
        for part, given in open_splits(folders).parts().items()
        for key, label in zip(given.keys, given.labels, strict=True)
    ]
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "split", "weight"), *rows])
    return path


def test_a_column_of_a_table_weighs_training_pictures(folders: Path, tmp_path: Path) -> None:
    weights = {"train/red/00.png": "0.25", "train/red/01.png": "0", "train/blue/02.png": "2", "test/red/00.png": "0.5"}
    found = open_splits(table(folders, tmp_path / "own.csv", weights))
    assert found.train is not None
    assert found.train.weights == (1.0, 1.0, 2.0, 0.25, 1.0)  # blue, then red, without the one of weight 0
    assert [Path(key).name for key in found.train.keys] == ["00.png", "01.png", "02.png", "00.png", "02.png"]
    assert found.train.weighed_counts() == {"blue": 4.0, "red": 1.25}
    assert found.train.counts() == {"blue": 3, "red": 2}
    assert found.test is not None
    assert (len(found.test), found.test.weights) == (2, None)
    assert found.notes == (
        "training pictures are weighed by the weight column of own.csv: 1 of 6 have weight 0 and are left out; the weights "
        "sum to 5.25",
        "the weight column of own.csv weighs 1 pictures of val and test: there every picture counts alike",
    )
    drawn = found.train.select([3, 2])
    assert drawn.weights == (0.25, 2.0)


def test_weights_stay_with_pictures_in_a_table_that_is_written(folders: Path, tmp_path: Path) -> None:
    given = open_splits(table(folders, tmp_path / "own.csv", {"train/red/00.png": "0.1"}))
    write_split_table(given, tmp_path / "again.csv")
    again = open_splits(tmp_path / "again.csv")
    assert again.train is not None
    assert given.train is not None
    assert again.train.weights == given.train.weights
    write_split_table(open_splits(folders), tmp_path / "plain.csv")
    assert (tmp_path / "plain.csv").read_text().splitlines()[0] == "path,label,split"


def test_weights_that_are_all_1_are_none(folders: Path, tmp_path: Path) -> None:
    plain = open_splits(folders)
    assert plain.train is not None
    path = table(folders, tmp_path / "own.csv", dict.fromkeys(plain.train.keys, "1.0"))
    found = open_splits(path)
    assert found.train is not None
    assert found.train.weights is None
    assert found.notes == ()


@pytest.mark.parametrize("cell", ["-1", "nan", "inf", "heavy"])
def test_a_weight_that_is_none_is_named_with_its_row(folders: Path, tmp_path: Path, cell: str) -> None:
    path = table(folders, tmp_path / "own.csv", {"train/red/01.png": cell})
    with pytest.raises(ValueError, match=rf"1 rows that can't be used:\n  row 5 has the weight '{cell}'; a weight is a finite"):
        open_splits(path)
    (tmp_path / "weights.csv").write_text(f"path,weight\na.png,1\nb.png,{cell}\n,2\na.png,1\n")
    with pytest.raises(ValueError, match=rf"3 rows that can't be used:\n  row 2 has the weight '{cell}'") as error:
        read_weights(tmp_path / "weights.csv")
    assert "row 3 has no path" in str(error.value)
    assert "row 4: a.png is listed more than once" in str(error.value)


def test_weights_of_their_own_table(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "weights.tsv").write_text("Image\tWeight\n./train/red/00.png\t0.5\ntrain/red/01.png\t0\n")
    weights = read_weights(tmp_path / "weights.tsv")
    assert weights == {"train/red/00.png": 0.5, "train/red/01.png": 0.0}
    found = weigh(open_splits(folders), weights, "weights.tsv")
    assert found.train is not None
    assert found.train.weights == (1.0, 1.0, 1.0, 0.5, 1.0)
    (tmp_path / "weights.jsonl").write_text('{"path": "train/red/00.png", "weight": 0.5}\n{"path": "a", "weight": true}\n')
    with pytest.raises(ValueError, match="row 2 has the weight 'true'"):
        read_weights(tmp_path / "weights.jsonl")
    for name, text, said in (
        ("w.csv", "path,mass\na,1\n", "needs a column path and a column weight; it has path, mass"),
        ("w.csv", "path,weight\n", "no rows"),
        ("w.txt", "a 1\n", "weights are a table"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=said):
            read_weights(tmp_path / name)


def test_what_weights_do_not_fit_is_said(folders: Path) -> None:
    splits = open_splits(folders)
    assert splits.train is not None
    unknown = {f"train/green/{i:02}.png": 0.5 for i in range(12)}
    with pytest.raises(UnknownPicturesError, match=r"12 of the 13 pictures that w\.csv weighs are not in") as error:
        weigh(splits, {**unknown, "train/red/00.png": 1.0}, "w.csv")
    assert error.value.unknown == tuple(unknown)
    assert "train/green/09.png" in str(error.value)
    assert "train/green/10.png" not in str(error.value)
    assert "such as train/blue/00.png" in str(error.value)
    with pytest.raises(ValueError, match=r"all 6 training pictures .* have weight 0"):
        weigh(splits, dict.fromkeys(splits.train.keys, 0.0), "w.csv")
    half = weigh(splits, dict.fromkeys(splits.train.keys, 0.5), "w.csv")
    with pytest.raises(ValueError, match="have weights already, of their table"):
        weigh(half, {}, "w.csv")
    with pytest.raises(ValueError, match="no train split"):
        weigh(Splits(name="own", classes=splits.classes, test=splits.test), {}, "w.csv")
    for wrong in ((1.0,), (1.0,) * 5 + (0.0,), (1.0,) * 5 + (float("nan"),)):
        with pytest.raises(ValueError, match="one finite number above 0 a picture"):
            LabelledSet(**{**vars_of(splits.train), "weights": wrong})


def vars_of(one: LabelledSet) -> dict[str, object]:
    return {name: getattr(one, name) for name in ("source", "keys", "labels", "classes")}
