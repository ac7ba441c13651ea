"""`wordsight data long-tail` as a user types it: counts, a table that is read back, a picture of the counts, what is refused."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from tests.adapt.make import colour_folders
from wordsight.cli.data import command
from wordsight.data.few_shot import LabelledSet, Splits
from wordsight.data.layouts import open_splits
from wordsight.data.long_tail import exponential_counts, open_long_tail, skew
from wordsight.data.split_table import write_split_table
from wordsight.evaluate.charts import Point, count_chart, own_file, point_chart

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colour_folders(tmp_path_factory.mktemp("long-tail") / "colours", {"train": 8, "val": 2, "test": 3})


def ask(*words: Any) -> Any:
    return CliRunner().invoke(command, ["long-tail", *map(str, words)])


def test_the_table_is_the_skewed_split_and_is_read_back(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "tail.csv"
    result = ask(data, "--factor", 8, "--seed", 3, "--out", out, "--few-below", 3, "--many-above", 5)
    assert result.exit_code == 0, result.output
    read, wanted = open_splits(out), skew(open_splits(data), 8, seed=3)
    assert read.train is not None
    assert list(read.train.counts().values()) == exponential_counts(8, 4, 8) == [8, 4, 2, 1]
    assert wanted.train is not None
    files = {Path(key).resolve() for key in read.train.keys}
    assert files == {(data / key).resolve() for key in wanted.train.keys}
    assert read.val is not None
    assert read.test is not None
    assert (len(read.val), len(read.test)) == (8, 12)
    lines = [line.split() for line in result.stdout.splitlines()]
    for said in (["many", "1", "8"], ["medium", "1", "4"], ["few", "2", "3"], ["all", "4", "15"]):
        assert said in lines
    assert f"wordsight long-tail --data {out}" in result.stdout.replace("\n", " ")


def test_a_table_beside_its_pictures_has_relative_paths(data: Path) -> None:
    out = data.parent / "beside.csv"
    assert ask(data, "--factor", 2, "--out", out).exit_code == 0
    lines = out.read_text().splitlines()
    assert lines[0] == "path,label,split"
    assert all(line.startswith("colours/") for line in lines[1:])
    assert len(lines) == 1 + sum(exponential_counts(8, 4, 2)) + 20


def test_the_same_seed_gives_the_same_bytes_and_another_other_pictures(data: Path, tmp_path: Path) -> None:
    texts = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert ask(data, "--factor", 4, "--seed", seed, "--out", tmp_path / f"{name}.csv").exit_code == 0
        texts.append((tmp_path / f"{name}.csv").read_bytes())
    assert texts[0] == texts[1] != texts[2]


def test_json_says_what_the_table_holds(data: Path, tmp_path: Path) -> None:
    result = ask(data, "--factor", 8, "--out", tmp_path / "t.csv", "--num-max", 8, "--plot", tmp_path / "p.svg", "--json")
    found = json.loads(result.stdout)
    assert found["counts"] == {"blue": 8, "green": 4, "grey": 2, "red": 1}
    assert found["groups"]["few"] == {"classes": 4, "pictures": 15}
    assert found["splits"] == {"train": 15, "val": 8, "test": 12}
    assert found["pictures"] is None
    assert (tmp_path / "p.svg").is_file()


def test_the_plot_is_a_file_of_its_own_with_a_bar_a_class(data: Path, tmp_path: Path) -> None:
    assert ask(data, "--factor", 8, "--out", tmp_path / "t.csv", "--few-below", 2, "--many-above", 6).exit_code == 0
    text = (tmp_path / "t.svg").read_text()
    root = ElementTree.fromstring(text)
    assert root.tag == f"{SVG}svg"
    bars = {path.get("fill"): path.get("d", "").count("M") for path in root.iter(f"{SVG}path")}
    assert bars == {"var(--c0)": 1, "var(--c1)": 2, "var(--c2)": 1}
    assert "--c0: #" in text
    assert "prefers-color-scheme: dark" in text


def test_pictures_without_files_are_written_beside_the_table(tmp_path: Path) -> None:
    folder = tmp_path / "cifar"
    folder.mkdir()
    (folder / "batches.meta.txt").write_text("cat\nship\n")
    rows = [bytes([i % 2]) + np.full(3072, 10 * i, np.uint8).tobytes() for i in range(8)]
    for i in range(1, 6):
        (folder / f"data_batch_{i}.bin").write_bytes(b"".join(rows))
    (folder / "test_batch.bin").write_bytes(b"".join(rows[:2]))
    out = tmp_path / "lt.csv"
    assert ask(folder, "--factor", 4, "--out", out, "--num-val", 2).exit_code == 0
    read = open_splits(out)
    assert {part: given.counts() for part, given in read.parts().items()} == {
        "train": {"cat": 18, "ship": 4},
        "val": {"cat": 2, "ship": 2},
        "test": {"cat": 1, "ship": 1},
    }
    wanted = skew(open_long_tail(folder), 4, seed=1, num_val=2)
    assert wanted.test is not None
    assert read.test is not None
    with Image.open(tmp_path / read.test.keys[1]) as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(wanted.test.source[1].image))
    again = ask(folder, "--factor", 4, "--out", out)
    assert isinstance(again.exception, FileExistsError)
    assert "choose another name" in str(again.exception)


def test_a_picture_that_cannot_be_read_leaves_no_table(tmp_path: Path) -> None:
    class Broken:
        bad: list[Any] = []  # noqa: RUF012
        part_sizes = (1,)

        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> Any:
            from wordsight.data.errors import BadSampleError

            raise BadSampleError("one.png", "is cut off")

    one = LabelledSet(source=Broken(), keys=("one.png",), labels=("a",), classes=("a",))  # type: ignore[arg-type]
    with pytest.raises(OSError, match=r"one\.png can't be read: is cut off"):
        write_split_table(Splits(name="x", classes=("a",), train=one), tmp_path / "x.csv")
    assert not (tmp_path / "x.csv").exists()
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--factor", "0.5"], "factor of 1 or more"),
        (["--factor", "nan"], "factor of 1 or more"),
        (["--factor", "99"], "leaves the smallest none"),
        (["--factor", "2", "--num-max", "9"], r"have fewer pictures than the profile asks for: 'blue' \(8\)"),
        (["--factor", "2", "--num-val", "1"], "0 where there is a val split"),
    ],
)
def test_what_the_data_do_not_have_is_named(data: Path, tmp_path: Path, words: list[str], said: str) -> None:
    result = ask(data, "--out", tmp_path / "t.csv", *words)
    with pytest.raises(ValueError, match=said):
        raise result.exception
    assert not list(tmp_path.iterdir())


def test_wrong_usage_is_code_2(data: Path, tmp_path: Path) -> None:
    for words, said in (
        (["--out", tmp_path / "t.txt", "--factor", 2], "must end in .csv"),
        (["--out", tmp_path / "t.csv", "--factor", 2, "--plot", "x.png"], "must end in .svg"),
        (["--out", tmp_path / "t.csv"], "--factor"),
    ):
        result = ask(data, *words)
        assert result.exit_code == 2
        assert said in result.stderr.replace("\n", " ")


def test_charts_escape_names_and_have_nothing_to_draw_of_nothing() -> None:
    assert count_chart([], many_above=1, few_below=1, label="") == count_chart([0, 0], many_above=1, few_below=1, label="") == ""
    assert point_chart([], x_name="", y_name="", label="") == ""
    one = Point(name="<b>&", mark="<1>", x=0.0, y=0.5, low=0.5, high=0.5)
    for chart in (
        point_chart([one], x_name="<s>", y_name='"', label='"<'),
        count_chart([3, 0, 200], many_above=100, few_below=20, label='"<'),
    ):
        assert ElementTree.fromstring(own_file(chart)).tag == f"{SVG}svg"
    marks = ElementTree.fromstring(
        point_chart([one, Point(name="b", mark="2", x=100.0, y=0.7, low=0.6, high=0.8)], x_name="s", y_name="%", label="x")
    )
    low, high = ((float(c.get("cx", 0)), float(c.get("cy", 0))) for c in marks.iter("circle"))
    assert low[0] < high[0]
    assert low[1] > high[1]
