"""Label noise as weights, and listed pictures that are not there, through `wordsight long-tail`, `adapt` and `data long-tail`."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import wordsight
from tests.adapt.make import colour_folders
from tests.adapt.test_grid import cell_files
from wordsight.cli import adapt, data_long_tail, long_tail

METHODS = "zero_shot,linear_probe,decoder+lade,decoder+cross_entropy+marc,coop+ldam,fine_tune+grw+last"
SETTINGS = (
    *("decoder.steps=4", "decoder.batch_size=8", "decoder.num_layers=1"),
    *("coop.epochs=1", "coop.num_context_tokens=2", "fine_tune.epochs=1"),
)
GRID = ["--methods", METHODS, "--seeds", "1", "--few-below", "5", *(word for one in SETTINGS for word in ("--set", one))]
WRONG = {f"train/{name}/{i:02}.png" for name in ("red", "grey") for i in (1, 2)}  # pictures with another class's label


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, pictures, and three tables of them: with wrong labels of weight 0, without them, with them at a quarter."""
    root = tmp_path_factory.mktemp("noise")
    wordsight.save(wordsight.create("clip-tiny"), root / "tiny")
    colour_folders(root, {"train": 4, "val": 2, "test": 2})
    for name, weight in (("zero", "0"), ("without", None), ("quarter", "0.25")):
        rows = []
        for part, given in _parts(root):
            for key, label in given:
                if key not in WRONG:
                    rows.append((key, label, part, "1"))
                elif weight is not None:
                    rows.append((key, "blue", part, weight))
        with open(root / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows([("path", "label", "split", "weight"), *rows])
    return root


def _parts(root: Path) -> list[tuple[str, list[tuple[str, str]]]]:
    found = []
    for part in ("train", "val", "test"):
        paths = sorted((root / part).glob("*/*.png"))
        found.append((part, [(path.relative_to(root).as_posix(), path.parent.name) for path in paths]))
    return found


def run(command: Any, *words: str) -> Any:
    return CliRunner().invoke(command, ["--model", "tiny", *words, "--quiet"], standalone_mode=False)


@pytest.fixture(scope="module")
def runs(place: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for name in ("zero", "without", "quarter"):
            result = run(long_tail.command, "--data", f"{name}.csv", "--run", f"runs/{name}", *GRID)
            assert result.exception is None, result.output
    return place / "runs"


def summary_of(run: Path) -> Any:
    return json.loads((run / "summary.json").read_text())


def test_weight_0_is_as_if_the_picture_were_not_there(runs: Path) -> None:
    zero, without = cell_files(runs / "zero"), cell_files(runs / "without")
    assert zero == without
    assert len(zero) == 7 * 6
    identities = [json.loads((runs / name / "settings.json").read_text())["identity"] for name in ("zero", "without")]
    assert identities[0] == identities[1]
    assert "4 of 16 have weight 0 and are left out" in summary_of(runs / "zero")["notes"][0]


def test_other_weights_reach_losses_counts_and_records(runs: Path) -> None:
    summary = summary_of(runs / "quarter")
    assert summary["counts"] == {"blue": 5.0, "green": 4.0, "grey": 2.0, "red": 2.0}
    assert (summary["pictures"], summary["weighed"]) == (16, True)
    settings = json.loads((runs / "quarter/settings.json").read_text())
    assert settings["weights"] == {"pictures": 16, "sum": 13.0}
    without = json.loads((runs / "without/settings.json").read_text())
    assert "weights" not in without
    assert settings["identity"]["pictures"] != without["identity"]["pictures"]
    protocols = {one["protocol"] for one in json.loads((runs / "quarter/results.json").read_text())}
    assert "linear_probe, all 16 training pictures, 2 to 5 a class by their weights, seed 1" in protocols
    for cell in METHODS.split(",")[1:]:
        files = [runs / name / "cells" / cell / "1/classifier/classifier.safetensors" for name in ("quarter", "without")]
        assert files[0].read_bytes() != files[1].read_bytes(), cell
    classifier = wordsight.load_classifier(runs / "quarter/cells/decoder+lade/1/classifier", wordsight.load(runs.parent / "tiny"))
    assert classifier.counts_.tolist() == [5.0, 4.0, 2.0, 2.0]


def test_a_file_of_weights_does_the_same_and_other_weights_are_another_question(
    runs: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    rows = list(csv.reader((place / "quarter.csv").open()))
    with open("plain.csv", "w", newline="") as file:
        csv.writer(file).writerows(row[:3] for row in rows)
    with open("weights.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "weight"), *((path, "0.25") for path in sorted(WRONG))])
    words = ["--data", "plain.csv", "--weights", "weights.csv", "--run", "runs/file", *GRID, "--methods", "linear_probe"]
    assert run(long_tail.command, *words).exception is None
    name = "cells/linear_probe/1/classifier/classifier.safetensors"
    assert (runs / "file" / name).read_bytes() == (runs / "quarter" / name).read_bytes()
    assert "--weights weights.csv" in (runs / "file/report.html").read_text()
    (place / "weights.csv").write_text("path,weight\ntrain/red/01.png,0.5\n")
    result = run(long_tail.command, *words)
    assert "holds a run of other settings" in str(result.exception)
    assert "weights.sum: 13.0 there, 15.5 now" in str(result.exception)


def test_adapt_weighs_too(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    for name in ("zero", "without", "quarter"):
        words = ["--data", f"{name}.csv", "--method", "linear_probe", "--shots", "all", "--seeds", "1", "--set", "C=1"]
        assert run(adapt.command, *words, "--run", f"runs/adapt-{name}").exception is None
    zero, without, quarter = (
        (place / f"runs/adapt-{name}/seeds/1/classifier/classifier.safetensors").read_bytes()
        for name in ("zero", "without", "quarter")
    )
    assert zero == without != quarter
    assert json.loads((place / "runs/adapt-quarter/settings.json").read_text())["weights"] == {"sums": [13.0]}
    words = ["--data", "quarter.csv", "--method", "tip_adapter", "--shots", "1", "--run", "runs/tip"]
    said = str(run(adapt.command, *words).exception)
    assert "tip_adapter can't weigh pictures, and these have weights: choose one of coop, linear_probe, decoder" in said
    assert not (place / "runs/tip").exists()


@pytest.mark.parametrize("command", [long_tail.command, adapt.command])
def test_weights_of_unknown_pictures_are_all_listed(command: Any, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    names = [f"train/red/{i}.png" for i in range(12)]
    Path("other.csv").write_text("path,weight\n" + "".join(f"{name},0.5\n" for name in names))
    result = run(command, "--data", "zero.csv", "--run", "runs/none", "--weights", "other.csv")
    assert isinstance(result.exception, ValueError)
    said = str(result.exception)
    assert "12 of the 12 pictures that other.csv weighs are not in zero" in said
    assert "train/red/9.png" in said
    assert "train/red/10.png" not in said
    assert "All 12 are listed in runs/none/unknown_pictures.txt" in said
    assert Path("runs/none/unknown_pictures.txt").read_text().split() == names


@pytest.mark.parametrize("name", ["long-tail", "adapt", "data long-tail"])
def test_missing_pictures_are_all_listed_and_the_first_ten_shown(name: str, place: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    lines = [f"{label}/{i}.png {c}\n" for c, label in enumerate(("cat", "dog")) for i in range(7)]
    (own / "Own_LT_train.txt").write_text("".join(lines))
    if name == "data long-tail":
        command, words = data_long_tail.command, [str(own), "--factor", "2", "--out", str(tmp_path / "lt/skewed.csv")]
        listed = tmp_path / "lt/skewed.missing_pictures.txt"
    else:
        command = long_tail.command if name == "long-tail" else adapt.command
        words = ["--model", str(place / "tiny"), "--data", str(own), "--run", str(tmp_path / "run")]
        listed = tmp_path / "run/missing_pictures.txt"
    result = CliRunner().invoke(command, words, standalone_mode=False)
    assert isinstance(result.exception, OSError)
    said = str(result.exception)
    assert "14 of the 14 pictures of own are missing" in said
    assert "dog/2.png" in said
    assert "dog/3.png" not in said
    assert f"All 14 are listed in {listed}" in said
    assert listed.read_text() == "".join(line.split()[0] + "\n" for line in lines)
    made = colour_folders(tmp_path / "made", {"train": 7}, ("red", "green")) / "train"
    (made / "red").rename(own / "cat")  # once they are there, the list is gone
    (made / "green").rename(own / "dog")
    for label in ("cat", "dog"):
        for i in range(7):
            (own / label / f"0{i}.png").rename(own / label / f"{i}.png")
    more = {"long-tail": ["--methods", "zero_shot", "--seeds", "1"], "adapt": ["--method", "zero_shot", "--shots", "0"]}
    words += more.get(name, [])
    assert CliRunner().invoke(command, words, standalone_mode=False).exception is None
    assert not listed.exists()
