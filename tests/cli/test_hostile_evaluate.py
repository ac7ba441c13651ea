"""Hostile data through the real command line: a sentence that names what is wrong, exit code 1 or 2, never a traceback."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import wordsight
from tests.data.test_evaluation_layouts import clip_benchmark, npy
from tests.evaluate.conftest import COLOURS, picture
from wordsight.cli.main import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "tiny"
    wordsight.save(wordsight.create("clip-tiny"), folder)
    return folder


def colours(root: Path, names: tuple[str, ...] = ("red", "green", "blue"), count: int = 2) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{i}.png").write_bytes(picture(COLOURS[name]))
    return root


def typed(words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `wordsight WORDS`; an error that the program does not know would come through."""
    monkeypatch.setattr(sys, "argv", ["wordsight", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capfd.readouterr()
    assert "Traceback" not in err
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, out, err


def damaged(root: Path) -> Path:
    colours(root)
    for path in root.rglob("*.png"):
        path.write_bytes(path.read_bytes()[:30])
    return root


def header_only(root: Path) -> Path:
    root.mkdir()
    (root / "test.csv").write_text("path,label\n")
    return root / "test.csv"


def empty(root: Path) -> Path:
    (root / "test").mkdir(parents=True)
    return root / "test"


def vectors(change: Callable[[np.ndarray], Any], labels: str | None = "a\nb\na\nb\n", width: int = 512) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        root.mkdir()
        (root / "x.npy").write_bytes(npy(change(np.eye(4, width, dtype=np.float32)), allow_pickle=True))
        if labels is not None:
            (root / "x.npy.labels.txt").write_text(labels)
        return root / "x.npy"

    return make


def not_finite(array: np.ndarray) -> np.ndarray:
    array[2, 5] = np.inf
    return array


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (damaged, "6 of 6 samples drawn could not be read"),
        (empty, "no sample in"),
        (header_only, "no sample in"),
        (lambda root: colours(root, ("red",)), "one class alone, 'red'"),
        (vectors(not_finite), "the vector of 'row 2' (row 2) is not finite"),
        (vectors(lambda array: 3 * array), "4 of 4 given vectors are not of unit length, first 'row 0' with 3"),
        (vectors(lambda array: array, width=8), "the given vectors have 8 numbers, this model's texts 512"),
        (vectors(lambda array: [{}, {}]), "can't be read as an array of numbers"),
        (vectors(lambda array: array, labels="a\nb\n"), "has 2 lines and x.npy 4 rows"),
        (vectors(lambda array: array, labels=None), "neither labels nor captions"),
        (lambda root: clip_benchmark(root, [7, 8, 9]), "is of class '7'; there are 0 to 2"),
        (lambda root: clip_benchmark(root, [0], names="a\na (class 2)\na\n"), "rename the classes"),
    ],
)
def test_data_that_can_not_be_measured(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], make: Any, said: str
) -> None:
    code, _, err = typed(
        ["evaluate", str(model), "--data", str(make(tmp_path / "data")), "--run", str(tmp_path / "run")], monkeypatch, capfd
    )
    assert code == 1
    assert said in err
    assert not (tmp_path / "run" / "results.json").exists(), "no figure of what can't be measured"


@pytest.mark.parametrize(
    ("content", "code", "said"),
    [
        (b"red\ngreen\n", 1, "1 labels of the data are not among the 2 given classes, e.g. 'blue'"),
        (b"red\ngreen\nblue\nred\n", 2, "come twice or more: 'red'"),
        (b"\n\n", 2, "has no class names"),
        (b"r\xe9d\n", 2, "is not in UTF-8"),
    ],
)
def test_wrong_lists_of_classes(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    content: bytes,
    code: int,
    said: str,
) -> None:
    (tmp_path / "classes.txt").write_bytes(content)
    words = ["evaluate", str(model), "--data", str(colours(tmp_path / "data")), "--run", str(tmp_path / "run")]
    found, _, err = typed([*words, "--classes", str(tmp_path / "classes.txt")], monkeypatch, capfd)
    assert found == code
    assert said in err


def test_vectors_that_are_right_are_measured(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The way out of these errors: the model's own vectors, made by `wordsight embed`, with labels beside them."""
    data = colours(tmp_path / "data")
    code, _, err = typed(["embed", str(model), "--images", str(data), "--out", str(tmp_path / "x.npy")], monkeypatch, capfd)
    assert code == 0, err
    names = (tmp_path / "x.npy.names.txt").read_text().splitlines()
    (tmp_path / "x.npy.labels.txt").write_text("".join(f"{Path(name).parent.name}\n" for name in names))
    figures = []
    for spec in (data, tmp_path / "x.npy"):
        words = ["evaluate", str(model), "--data", str(spec), "--run", str(tmp_path / "run"), "--json"]
        code, out, err = typed(words, monkeypatch, capfd)
        assert code == 0, err
        figures.append({one["metric"]: one for one in json.loads(out)["results"]})
    assert {name: one["value"] for name, one in figures[0].items()} == {name: one["value"] for name, one in figures[1].items()}
    assert figures[1]["top1"]["protocol"] == figures[0]["top1"]["protocol"] + ", given vectors"


@pytest.mark.parametrize(
    ("content", "code", "said"),
    [
        ("raise OSError('no disk')", 1, "OSError: no disk"),
        ("def suite(root): return [1]", 1, "must give a list"),
        ("def suite(root): return []", 1, "no item of the suite"),
        ("suite = 3", 1, "gives no suite"),
        ("def suite(", 1, "SyntaxError"),
    ],
)
def test_suites_that_are_none(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    content: str,
    code: int,
    said: str,
) -> None:
    (tmp_path / "own.py").write_text(content)
    words = ["evaluate", "--suite", str(tmp_path / "own.py"), "--model", str(model), "--run", str(tmp_path / "run")]
    found, _, err = typed(words, monkeypatch, capfd)
    assert found == code
    assert said in err


@pytest.mark.parametrize("others", [[], ["--model", "MODEL"]])
def test_a_wrong_path_of_a_model_leaves_no_folder(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], others: list[str]
) -> None:
    words = ["evaluate", "--suite", "quick", "--model", "nowhere.pt", "--run", str(tmp_path / "run")]
    code, _, err = typed([*words, *(str(model) if word == "MODEL" else word for word in others)], monkeypatch, capfd)
    assert code == 1
    assert "nowhere.pt: no such file or folder" in err
    assert not (tmp_path / "run").exists()


def test_a_suite_names_what_is_damaged_and_goes_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    damaged(tmp_path / "root" / "mnist" / "test")
    clip_benchmark(tmp_path / "root" / "wds_cifar10", [0, 1, 2])
    words = [
        "evaluate",
        "--suite",
        "clip27",
        "--model",
        str(model),
        "--root",
        str(tmp_path / "root"),
        "--run",
        str(tmp_path / "run"),
    ]
    code, out, err = typed(words, monkeypatch, capfd)
    assert code == 1
    assert "mnist: FAILED: 6 of 6 samples drawn could not be read" in err
    assert "cifar10" in out
    assert out.count("Left out, as data are missing") == 25
