"""`wordsight compare` as a user types it, on runs of `wordsight evaluate`."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import wordsight
from tests.evaluate.conftest import COLOURS, picture
from wordsight.cli.compare import command
from wordsight.cli.evaluate import command as evaluate


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny models, each measured on 20 pictures."""
    root = tmp_path_factory.mktemp("compare")
    rows = []
    for i, colour in enumerate(list(COLOURS) * 4):
        (root / f"{i}.png").write_bytes(picture(COLOURS[colour], (16 + i, 16)))
        rows.append(json.dumps({"path": f"{i}.png", "caption": [f"{colour} picture", f"number {i}"], "label": colour}))
    (root / "toys-val.jsonl").write_text("\n".join(rows), encoding="utf-8")
    for seed in (0, 1):
        wordsight.save(wordsight.create("clip-tiny", seed=seed), root / f"tiny{seed}")
        words = [str(root / f"tiny{seed}"), "--data", str(root / "toys-val.jsonl"), "--run", str(root / f"run{seed}")]
        assert CliRunner().invoke(evaluate, words).exit_code == 0
    return root


def test_plain_runs_are_compared(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    done = CliRunner().invoke(command, ["run0", "run1", "--baseline", "run1"])
    assert done.exit_code == 0, done.output
    found = json.loads(Path("runs/compare/compare.json").read_text())
    assert (found["baseline"], [model["name"] for model in found["models"]]) == ("run1", ["run1", "run0"])
    assert [(row["task"], row["metric"]) for row in found["rows"]] == [("retrieval", "image_to_text_R@1"), ("zero_shot", "top1")]
    assert [test["count"] for row in found["rows"] for test in row["tests"]] == [20, 20]
    assert "against run1, paired" in done.stdout
    assert Path("runs/compare/compare.html").exists()


def test_another_metric_and_another_place(place: Path, tmp_path: Path) -> None:
    words = [str(place / "run0"), str(place / "run1"), "--metric", "text_to_image_R@1", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(command, words)
    assert done.exit_code == 0, done.output
    (row,) = json.loads((tmp_path / "out" / "compare.json").read_text())["rows"]
    assert (row["tests"][0]["count"], row["tests"][0]["num_groups"], row["tests"][0]["method"]) == (40, 20, "paired bootstrap")


def test_measuring_again_takes_the_place_of_the_old(place: Path) -> None:
    before = sorted((place / "run0" / "findings").iterdir())
    words = [str(place / "tiny0"), "--data", str(place / "toys-val.jsonl"), "--run", str(place / "run0"), "--task", "zero_shot"]
    assert CliRunner().invoke(evaluate, words).exit_code == 0
    assert sorted((place / "run0" / "findings").iterdir()) == before


@pytest.mark.parametrize(
    ("words", "error", "said"),
    [
        (["nothing"], FileNotFoundError, "no run folder nothing"),
        (["tiny0"], FileNotFoundError, "nothing was measured in tiny0"),
        (["run0"], ValueError, "two models or more"),
        (["run0", "run1", "--baseline", "run7"], ValueError, "give one of their names: run0, run1"),
    ],
)
def test_what_can_not_be_compared(
    place: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], error: type[Exception], said: str
) -> None:
    monkeypatch.chdir(place)
    done = CliRunner().invoke(command, words)
    assert isinstance(done.exception, error)
    assert said in str(done.exception)
