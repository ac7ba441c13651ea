"""`wordsight adapt` as a user types it."""

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import wordsight
from tests.adapt.make import colour_folders
from tests.evaluate.test_report import check_page
from wordsight.adapt import METHODS
from wordsight.adapt.protocol import PROTOCOLS
from wordsight.adapt.report import write_report
from wordsight.cli.adapt import command
from wordsight.cli.main import COMMANDS

COOP = ["--method", "coop", "--set", "epochs=3", "--set", "num_context_tokens=2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and pictures of four colours."""
    root = tmp_path_factory.mktemp("adapt")
    wordsight.save(wordsight.create("clip-tiny"), root / "tiny")
    colour_folders(root / "colours", {"train": 6, "val": 4, "test": 5})
    return root


@pytest.fixture(scope="module")
def done(place: Path) -> tuple[Any, Path]:
    """The command's result and its run folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        words = ["--model", "tiny", "--data", "colours", "--shots", "2", "--seeds", "1,2", "--run", "run", *COOP]
        return CliRunner().invoke(command, words), place / "run"


def test_it_tells_figures_what_it_kept_and_what_comes_next(done: tuple[Any, Path]) -> None:
    result, run = done
    assert result.exit_code == 0, result.output
    for said in ("top-1 accuracy", "Kept: coop of seed", "not looked at", "run/report.html", "wordsight predict --run run"):
        assert said in result.stdout, said
    assert "seed 2: coop, validation" in result.stderr
    settings = json.loads((run / "settings.json").read_text())
    assert settings["parameters"] == {"epochs": 3, "num_context_tokens": 2}
    assert settings["words"]["data"] == "colours"
    assert wordsight.load_classifier(run).classes_.tolist() == ["blue", "green", "grey", "red"]


def test_the_same_words_again_do_nothing_anew(done: tuple[Any, Path], place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    _, run = done
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != "report.html" and path.is_file()}
    words = ["--model", "tiny", "--data", "colours", "--shots", "2", "--seeds", "1,2", "--run", "run", *COOP]
    again = CliRunner().invoke(command, words)
    assert again.exit_code == 0, again.output
    assert "complete" in again.stderr
    del before[run / ".lock"]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert again.stdout == done[0].stdout


def test_the_report_is_whole_and_says_how_it_was_made(done: tuple[Any, Path]) -> None:
    _, run = done
    text = (run / "report.html").read_text(encoding="utf-8")
    page = check_page(text)
    assert "wordsight adapt --model tiny --data colours --method coop --shots 2 --seeds 1,2" in text
    for said in (
        "not looked at",
        "Nearest words",
        "Confusion matrix",
        "Training loss",
        "ECE",
        "validation pictures",
        "Energy: ",
    ):
        assert said in text, said
    assert len([1 for tag, _ in page.tags if tag == "img"]) == 20, "each of 20 test pictures is a hit or a miss"
    assert text.count("<rect") > 0


def test_words_of_the_data_are_escaped_in_the_report(done: tuple[Any, Path], tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>\"'>{{ 7*7 }}"
    run = tmp_path / "run"
    shutil.copytree(done[1], run)
    for path in run.glob("seeds/*/*.csv"):
        with open(path, newline="") as file:
            rows = [[cell.replace("green", hostile) for cell in row] for row in csv.reader(file)]
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows(rows)
    for path in (run / "settings.json", run / "gallery.json", *run.glob("seeds/*/nearest_words.json")):
        path.write_text(path.read_text().replace("green", json.dumps(hostile)[1:-1]))
    page = write_report(run).read_text(encoding="utf-8")
    check_page(page)
    assert "&lt;script&gt;" in page
    assert "{{ 7*7 }}" in page, "words are no template"


def test_the_data_may_be_a_table_or_a_split_file(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    rows = [
        (split, path.relative_to(place / "colours").as_posix(), path.parent.name)
        for split in ("train", "val", "test")
        for path in sorted((place / "colours" / split).glob("*/*.png"))
    ]
    (place / "colours/all.csv").write_text(
        "path,label,split\n" + "\n".join(f"{path},{label},{split}" for split, path, label in rows)
    )
    names = sorted({label for _, _, label in rows})
    parts = {
        split: [[path, names.index(label), label] for own, path, label in rows if own == split]
        for split in ("train", "val", "test")
    }
    (place / "colours/split.json").write_text(json.dumps(parts))
    found = []
    for data in ("colours/all.csv", "colours/split.json", "colours"):
        words = ["--model", "tiny", "--data", data, "--shots", "1", "--seeds", "3", "--method", "zero_shot", "--quiet"]
        result = CliRunner().invoke(command, [*words, "--run", str(tmp_path / data.replace("/", "-"))])
        assert result.exit_code == 0, result.output
        assert result.stderr == ""
        records = json.loads((tmp_path / data.replace("/", "-") / "results.json").read_text())
        found.append([(one["metric"], one["value"], one["count"]) for one in records])
    assert found[0] == found[1] == found[2]


def test_zero_shots_learn_nothing_and_say_so(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    words = ["--model", "tiny", "--data", "colours", "--shots", "0", "--method", "zero_shot", "--run", "none"]
    result = CliRunner().invoke(command, words)
    assert result.exit_code == 0, result.output
    assert "Nothing was chosen" in result.stdout
    assert [path.name for path in (place / "none/seeds").iterdir()] == ["1"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "nope"], "choose one of zero_shot"),
        (["--protocol", "nope"], "choose one of few_shot"),
        (["--shots", "some"], "a whole number, or all"),
        (["--seeds", "1,x"], "whole numbers with commas"),
        (["--seeds", "1,1"], "each seed once"),
        (["--method", "coop", "--set", "epoch=3"], "did you mean epochs"),
        (["--method", "auto", "--set", "epochs=3"], "METHOD.KEY=VALUE"),
        (["--method", "coop", "--budget", "3"], "a budget is for method auto"),
        (["--method", "clap", "--loss", "focal"], "clap has no parameter 'loss'"),
        (["--stage2", "marc"], "--stage2 is of one method, such as --method decoder, got --method auto"),
        (["--method", "decoder", "--loss", "focal", "--set", "loss=grw"], "loss is given twice"),
        (["--method", "decoder", "--loss", "nope"], "choose one of cross_entropy, class_balanced"),
        (
            ["--method", "decoder", "--stage2", "nope"],
            "choose one of crt, lws, tau, ncm, disalign, marc, logit_adjustment, wise_ft",
        ),
        (["--method", "lift", "--stage2", "wise_ft"], "lift has no parameter 'wise_ft'"),
        (["--classes", "none.txt"], "no such file"),
        (["--test", "a", "--test", "b"], "judged by one --test"),
    ],
)
def test_wrong_usage_is_code_2(words: list[str], said: str) -> None:
    result = CliRunner().invoke(command, ["--data", "colours", "--run", "never", *words])
    assert result.exit_code == 2, result.output
    assert said in result.stderr.replace("\n", " ")
    assert not Path("never").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data", "nowhere"], "nowhere"),
        (["--shots", "99"], "fewer than 99 pictures in train"),
        (["--classes", "red,green"], "not among the 2 classes"),
        (["--set", "num_context_tokens=500"], "room"),
    ],
)
def test_failures_are_a_sentence_that_a_user_can_act_on(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str], said: str
) -> None:
    monkeypatch.chdir(place)
    result = CliRunner().invoke(
        command, ["--model", "tiny", "--data", "colours", "--shots", "1", "--run", str(tmp_path / "run"), *COOP[:2], *words]
    )
    assert isinstance(result.exception, ValueError | OSError), result.output  # main makes it code 1 and one line
    assert said in str(result.exception)


@pytest.mark.parametrize("method", ["decoder", "auto"])
def test_classes_without_training_pictures_are_named_before_anything_is_done(
    place: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.chdir(place)
    words = ["--model", "tiny", "--data", "colours", "--shots", "all", "--classes", "red,green,blue,grey,teal"]
    result = CliRunner().invoke(command, [*words, "--method", method, "--run", f"lacks-{method}"])
    assert "1 classes have no training picture: 'teal'" in str(result.exception)
    assert "`wordsight long-tail` takes such data" in str(result.exception)
    assert not Path(f"lacks-{method}").exists()


def test_a_decoder_with_its_loss_and_second_stage_is_one_cell(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    words = ["--model", "tiny", "--data", "colours", "--shots", "all", "--seeds", "1", "--run", "cell", "--method", "decoder"]
    words += ["--loss", "balanced_softmax", "--stage2", "tau", "--set", "steps=3", "--set", "batch_size=8"]
    result = CliRunner().invoke(command, words)
    assert result.exit_code == 0, result.output
    classifier: Any = wordsight.load_classifier(place / "cell")
    assert (classifier.loss, classifier.second_stage_) == ("balanced_softmax", "tau_normalisation")
    assert " g of CO2 at 480 g/kWh." in result.stdout
    assert "Carbon: 480 g of CO₂ a kWh" in (place / "cell/report.html").read_text(encoding="utf-8")
    words = [*words[:6], "--seeds", "1", "--run", "between", "--method", "projection", "--stage2", "wise_ft", "--set", "epochs=2"]
    result = CliRunner().invoke(command, words)
    assert result.exit_code == 0, result.output
    between: Any = wordsight.load_classifier(place / "between")
    assert between.wise_ft == "validation"
    assert 0 <= between.wise_ft_ <= 1


def test_help_fits_a_screen_and_has_two_examples() -> None:
    text = CliRunner().invoke(command, ["--help"]).output
    assert len(text.splitlines()) <= 42
    assert text.count("wordsight adapt --") == 2
    assert "adapt" in COMMANDS
    for name in (*METHODS, *PROTOCOLS):
        assert re.search(rf"\b{name}\b", text), name
