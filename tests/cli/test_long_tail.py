"""`wordsight long-tail` as a user types it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import wordsight
from tests.adapt.make import colour_folders
from tests.evaluate.test_report import check_page
from wordsight.adapt.costs import _read_counters
from wordsight.cli import predict
from wordsight.cli.long_tail import command
from wordsight.cli.main import COMMANDS, cli

METHODS = ["--methods", "zero_shot,decoder+cross_entropy+tau", "--set", "decoder.steps=3", "--set", "decoder.batch_size=8"]
HOSTILE = "<script>alert(1)<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and pictures, one class with a hostile name."""
    root = tmp_path_factory.mktemp("long-tail")
    wordsight.save(wordsight.create("clip-tiny"), root / "tiny")
    colour_folders(root / "colours", {"train": 4, "val": 2, "test": 3})
    for split in ("train", "val", "test"):
        (root / "colours" / split / "grey").rename(root / "colours" / split / HOSTILE)
    return root


@pytest.fixture(scope="module")
def done(place: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        words = ["--model", "tiny", "--data", "colours", "--seeds", "1,2", "--run", "run", "--few-below", "5", *METHODS]
        return CliRunner().invoke(command, words)


def test_it_tells_the_table_what_it_would_keep_and_what_comes_next(done: Any, place: Path) -> None:
    assert done.exit_code == 0, done.output
    costs = ("g CO2", "(an estimate: 10 W for each busy processor core), 0.", " g of CO2 at 480 g/kWh.")
    costs = costs if not _read_counters() else costs[::2]
    for said in (
        *costs,
        "decoder+cross_entropy+tau",
        "macro F1",
        "it would keep",
        "run/report.html",
        "wordsight predict --run run",
    ):
        assert said in done.stdout, said
    lines = [line for line in done.stdout.splitlines() if line.startswith(("zero_shot", "decoder"))]
    assert len(lines) == 3
    assert all("…" not in line for line in lines)
    assert "cell 6 of 6, decoder+cross_entropy+tau, seed 2: validation" in done.stderr
    assert json.loads((place / "run/settings.json").read_text())["words"]["data"] == "colours"


def test_the_same_words_again_do_nothing_anew(done: Any, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    before = {path: path.stat().st_mtime_ns for path in (place / "run/cells").rglob("*")}
    words = ["--model", "tiny", "--data", "colours", "--seeds", "1,2", "--run", "run", "--few-below", "5", *METHODS]
    again = CliRunner().invoke(command, words)
    assert again.exit_code == 0, again.output
    assert again.stdout == done.stdout
    assert again.stderr == "6 of 6 cells are done already\n"
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_the_report_is_whole_and_says_how_it_was_made(done: Any, place: Path) -> None:
    text = (place / "run/report.html").read_text(encoding="utf-8")
    page = check_page(text)
    for said in (
        "wordsight long-tail --model tiny --data colours",
        "--methods zero_shot,decoder+cross_entropy,decoder+cross_entropy+tau --seeds 1,2 --few-below 5 --set decoder.steps=3",
        "it would keep",
        "480 g of CO₂ a kWh",
        "&lt;script&gt;alert(1)",
    ):
        assert said in text, said
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == 2
    assert "<script" not in text


def test_predict_names_pictures_with_what_was_kept(done: Any, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    result = CliRunner().invoke(predict.command, ["--run", "run", "colours/test/red/00.png", "--json"])
    assert result.exit_code == 0, result.output
    assert {one["label"] for one in json.loads(result.stdout)[0]["labels"]} == {"red", "green", "blue", HOSTILE}


def test_a_cell_that_fails_is_code_1_and_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    words = ["--model", "tiny", "--data", "colours", "--seeds", "1", "--run", "wild", *METHODS[:2], "--set", "decoder.steps=20"]
    words += ["--set", "decoder.learning_rate=1e30"]
    result = CliRunner().invoke(command, words, standalone_mode=False)
    assert result.return_value == 1, result.output
    assert "Failed: decoder+cross_entropy, seed 1: the loss is" in result.stderr


def test_missing_pictures_are_all_listed_and_the_first_ten_shown(place: Path, tmp_path: Path) -> None:
    lines = [f"{name}/{i}.png {c}\n" for c, name in enumerate(("cat", "dog")) for i in range(7)]
    (tmp_path / "own").mkdir()
    (tmp_path / "own/Own_LT_train.txt").write_text("".join(lines))
    words = ["--model", str(place / "tiny"), "--data", str(tmp_path / "own"), "--run", str(tmp_path / "run")]
    result = CliRunner().invoke(command, words)
    assert isinstance(result.exception, OSError)
    said = str(result.exception)
    assert "14 of the 14 pictures of own are missing" in said
    assert said.count(f"{tmp_path}{os.sep}own") >= 10
    assert "dog/2.png" in said
    assert "dog/3.png" not in said
    listed = tmp_path / "run/missing_pictures.txt"
    assert f"All 14 are listed in {listed}" in said
    assert listed.read_text() == "".join(line.split()[0] + "\n" for line in lines)


def test_classes_that_train_or_the_data_lack_are_named_on_the_screen(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    lines = [f"colours/{part}/{name}/00.png,{name},{part}" for part in ("train", "val", "test") for name in ("red", "green")]
    (place / "lacks.csv").write_text("\n".join(["path,label,split", *lines, "colours/test/blue/00.png,blue,test"]) + "\n")
    words = ["--model", "tiny", "--data", "lacks.csv", "--classes", "red,green,blue,teal", "--methods", "zero_shot", "--quiet"]
    result = CliRunner().invoke(command, [*words, "--seeds", "1", "--run", "lacks"], standalone_mode=False)
    assert result.return_value == 0, result.output
    assert "Note: 1 classes have test pictures and no training picture: 'blue'. Only zero_shot can name them" in result.stdout
    assert "Note: 1 classes have neither training nor test pictures: 'teal'." in result.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--methods", "nope"], "no method 'nope'"),
        (["--methods", "decoder+nope"], "with LOSS one of"),
        (["--methods", "zero_shot,zero_shot"], "must be different names"),
        (["--seeds", "1,x"], "whole numbers with commas"),
        (["--seeds", "1,1"], "different whole numbers"),
        (["--set", "steps=3"], "METHOD.KEY=VALUE"),
        (["--set", "decoder.step=3"], "did you mean steps"),
        (["--set", "decoder.loss=ldam"], "part of a cell's name"),
        (["--budget", "0"], "seconds above 0"),
        (["--few-below", "300"], "few_below must be"),
        (["--classes", "none.txt"], "no such file"),
    ],
)
def test_wrong_usage_is_code_2(words: list[str], said: str) -> None:
    result = CliRunner().invoke(command, ["--data", "colours", "--run", "never", *words])
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.stderr.split())
    assert not Path("never").exists()


def test_it_is_a_command_and_its_help_fits_a_screen() -> None:
    assert "long-tail" in COMMANDS
    text = CliRunner().invoke(cli, ["long-tail", "--help"]).output
    assert len(text.splitlines()) <= 45
    assert text.count("wordsight long-tail --") == 2
