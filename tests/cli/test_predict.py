"""`wordsight predict` as a user types it."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import wordsight
from tests.adapt.make import colour_folders
from wordsight.adapt import ZeroShot
from wordsight.cli.predict import command


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a kept classifier, as a run has it, and pictures."""
    root = tmp_path_factory.mktemp("predict")
    model = wordsight.create("clip-tiny")
    ZeroShot(model, ["red", "green", "blue", "grey"]).fit().save(root / "run" / "classifier")
    colour_folders(root, {"new": 2})
    return root


def test_json_holds_the_classifiers_own_probabilities(place: Path) -> None:
    pictures = sorted(map(str, place.glob("new/*/*.png")))
    done = CliRunner().invoke(command, ["--run", str(place / "run"), *pictures, "--json", "--top", "2"])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    classifier = wordsight.load_classifier(place / "run")
    expected = torch.from_numpy(classifier.predict_proba(pictures))
    assert [row["image"] for row in rows] == pictures
    for row, own in zip(rows, expected, strict=True):
        assert [one["label"] for one in row["labels"]] == [classifier.classes_[i] for i in own.topk(2).indices.tolist()]
        assert [one["probability"] for one in row["labels"]] == pytest.approx(own.topk(2).values.tolist(), abs=1e-6)


def test_a_table_is_for_people(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    done = CliRunner().invoke(command, ["--run", "run", "new/red/00.png"])
    assert done.exit_code == 0, done.output
    assert "new/red/00.png" in done.stdout
    for name in ("red", "green", "blue", "grey"):
        assert name in done.stdout


def test_what_is_missing_or_damaged_is_named(place: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(command, ["--run", str(place / "run"), "nowhere.png"])
    assert done.exit_code == 2
    assert "nowhere.png" in done.stderr
    done = CliRunner().invoke(command, ["--run", str(tmp_path), str(place / "new/red/00.png")])
    assert isinstance(done.exception, FileNotFoundError)
    assert "wordsight adapt" in str(done.exception)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    done = CliRunner().invoke(command, ["--run", str(place / "run"), str(tmp_path / "bad.png")])
    assert isinstance(done.exception, OSError)
    assert "bad.png" in str(done.exception)


def test_help_fits_a_screen_and_has_two_examples() -> None:
    text = CliRunner().invoke(command, ["--help"]).output
    assert len(text.splitlines()) <= 40
    assert text.count("wordsight predict --run") == 2
