"""`wordsight evaluate` as a user types it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.cbook
import pytest
from click.testing import CliRunner

import wordsight
from tests.evaluate.conftest import COLOURS, picture
from wordsight.cli.evaluate import command, default_run_dir, one_model
from wordsight.cli.evaluate_suite import candidates


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and a table of 25 pictures, one of them damaged."""
    root = tmp_path_factory.mktemp("evaluate")
    wordsight.save(wordsight.create("clip-tiny"), root / "tiny")
    rows = []
    for i, colour in enumerate(list(COLOURS) * 5):
        (root / f"{i}.png").write_bytes(picture(COLOURS[colour]) if i else b"damaged")
        rows.append(json.dumps({"path": f"{i}.png", "caption": [f"{colour} picture", f"number {i}"], "label": colour}))
    (root / "toys-val.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (root / "classes.txt").write_text("\n".join([*COLOURS, "purple"]), encoding="utf-8")
    return root


def test_everything_is_measured_written_and_told(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    done = CliRunner().invoke(
        command, ["tiny", "--data", "toys-val.jsonl", "--classes", "classes.txt", "--prompts", "imagenet80"]
    )
    assert done.exit_code == 0, done.output
    assert "top-1 accuracy" in done.stdout
    assert "text → picture, R@10" in done.stdout
    assert "0.png" in done.stderr, "the damaged picture is named"
    run = Path("runs/evaluate-tiny")
    records = json.loads((run / "results.json").read_text())
    assert {(one["task"], one["data"], one["split"]) for one in records} == {
        ("zero_shot", "toys-val.jsonl", "val"),
        ("retrieval", "toys-val.jsonl", "val"),
    }
    top1 = next(one for one in records if one["metric"] == "top1")
    assert (top1["count"], top1["chance"]) == (24, pytest.approx(1 / 6))
    assert "imagenet80" in top1["protocol"]
    report = (run / "report.html").read_text(encoding="utf-8")
    assert "wordsight evaluate tiny --data toys-val.jsonl" in report
    assert "0.png" in report


def test_json_is_for_programs_and_runs_repeat(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    words = ["tiny", "--data", "toys-val.jsonl", "--task", "retrieval", "--captions", "first", "--json"]
    words += ["--run", "mine", "--split", "dev"]
    once, twice = (json.loads(CliRunner().invoke(command, words).stdout) for _ in range(2))
    assert once == twice
    assert once["results"] == json.loads(Path("mine/results.json").read_text())
    assert {one["split"] for one in once["results"]} == {"dev"}
    assert next(one for one in once["results"] if one["metric"] == "text_to_image_R@1")["count"] == 24


def test_figures_by_reduced_decoding_stand_beside_the_exact_ones(place: Path, tmp_path: Path) -> None:
    (tmp_path / "val" / "woman").mkdir(parents=True)
    shutil.copy(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False), tmp_path / "val" / "woman")
    (tmp_path / "classes.txt").write_text("woman\nship\n", encoding="utf-8")
    words = [str(place / "tiny"), "--data", str(tmp_path / "val"), "--task", "zero_shot", "--run", str(tmp_path / "run")]
    words += ["--classes", str(tmp_path / "classes.txt")]
    for more in ([], ["--reduced-decode"], ["--reduced-decode", "--workers", "1"]):
        done = CliRunner().invoke(command, [*words, *more])
        assert done.exit_code == 0, done.output
    records = [one for one in json.loads((tmp_path / "run" / "results.json").read_text()) if one["metric"] == "top1"]
    assert sorted(one["protocol"].endswith(", reduced decoding") for one in records) == [False, True]


def test_too_many_bad_pictures_stop_it_unless_allowed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    words = ["tiny", "--data", "toys-val.jsonl", "--task", "zero_shot", "--run", "strict", "--max-bad-share"]
    done = CliRunner().invoke(command, [*words, "0.03"])
    assert isinstance(done.exception, ValueError)
    assert "0.png" in str(done.exception)
    assert CliRunner().invoke(command, [*words, "0.04"]).exit_code == 0


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["tiny"], 2, "--data"),
        (["tiny", "--data", "toys-val.jsonl", "--task", "captioning"], 2, "zero_shot"),
        (["tiny", "--data", "toys-val.jsonl", "--classes", "none.txt"], 2, "none.txt"),
        (["tiny", "--data", "a", "--data", "b", "--split", "x"], 2, "--split names one data set"),
    ],
)
def test_wrong_usage_is_code_2(place: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], code: int, said: str) -> None:
    monkeypatch.chdir(place)
    done = CliRunner().invoke(command, words)
    assert done.exit_code == code
    assert said in done.output


def test_failures_are_code_1_with_one_line(place: Path) -> None:
    """Through the real program: what a user can mend gives a sentence, not a traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "wordsight.cli.main", "evaluate", "tiny", "--data", "toys-val.jsonl", "--prompts", "nope"],
        cwd=place,
        env={"PYTHONPATH": str(Path(wordsight.__file__).parent.parent), "PATH": "/usr/bin:/bin", "HOME": str(place)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Error: no prompts 'nope'")
    assert "Traceback" not in done.stderr


def test_help_fits_a_screen_and_has_two_examples() -> None:
    text = CliRunner().invoke(command, ["--help"]).output
    assert len(text.splitlines()) <= 56
    assert text.count("wordsight evaluate ") == 2


def test_results_go_to_the_models_own_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "runs" / "first"
    for folder in ("best", "checkpoints/step-00000010"):
        (run / folder).mkdir(parents=True)
    (run / "recipe.json").write_text("{}", encoding="utf-8")
    assert default_run_dir(str(run)) == run
    assert default_run_dir(str(run / "best")) == run
    assert default_run_dir(str(run / "checkpoints/step-00000010")) == run
    (tmp_path / "other").mkdir()
    assert default_run_dir(str(tmp_path / "other")) == Path("runs/evaluate-other")
    assert default_run_dir("ViT-B/32") == Path("runs/evaluate-ViT-B-32")


SUITE_FILE = """
from dataclasses import dataclass

from wordsight.evaluate import Retrieval, ZeroShot
from wordsight.evaluate.suite import SuiteItem


@dataclass(frozen=True)
class Broken:
    text: str = "no such thing"

    def judge(self, model, data):
        raise ValueError(self.text)


def suite(root):
    food = ((root / "food", "Food-101's pictures in class folders"),)
    return [
        SuiteItem(name="toys", evaluator=ZeroShot(), data=root / "toys-val.jsonl", dataset="toys", split="val"),
        SuiteItem(name="captions", evaluator=Retrieval(), data=root / "toys-val.jsonl", metric="text_to_image_R@5"),
        SuiteItem(name="food", evaluator=ZeroShot(), data=root / "food", needs=food),
        *([SuiteItem(name="broken", evaluator=Broken(), data=root / "toys-val.jsonl")] if (root / "break").exists() else []),
    ]
"""


def test_a_suite_of_ones_own(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    Path("own.py").write_text(SUITE_FILE, encoding="utf-8")
    shutil.copytree("tiny", "others/tiny", dirs_exist_ok=True)
    words = ["--suite", "own.py", "--root", ".", "--run", "suite", "--model", "tiny", "--model", "second=others/tiny"]
    done = CliRunner().invoke(command, words, standalone_mode=False)
    assert done.return_value == 0, done.output
    assert "Left out, as data are missing: food\n  food: Food-101's pictures in class folders" in done.stdout
    assert done.stderr.count("measured before") == 0
    assert {path.parent.name for path in Path("suite").glob("*/*/finding.json")} == {"toys", "captions"}
    assert {path.name for path in Path("suite").iterdir()} >= {"tiny", "second"}
    report = Path("suite/second/report.html").read_text(encoding="utf-8")
    assert "No command is known" not in report
    assert "Unknown: this folder has no environment.json" not in report
    done = CliRunner().invoke(command, [*words, "--strict", "--json"], standalone_mode=False)
    assert done.return_value == 1, "data are missing"
    assert done.stderr.count("measured before") == 4
    told = json.loads(done.stdout)
    assert told["missing"][0]["needs"] == [{"path": "food", "what": "Food-101's pictures in class folders"}]
    assert {(one["model"], one["item"]) for one in told["results"]} == {
        (model, item) for model in ("tiny", "second") for item in ("toys", "captions")
    }
    Path("break").touch()
    done = CliRunner().invoke(command, [*words, "--json"], standalone_mode=False)
    assert done.return_value == 1, "an item failed"
    assert [one["error"] for one in json.loads(done.stdout)["failed"]] == ["no such thing"] * 2
    assert len(json.loads(done.stdout)["results"]) == len(told["results"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--suite", "quick", "--run", "x"], "name the models"),
        (["--suite", "quick", "--model", "tiny"], "needs --run"),
        (["--suite", "quick", "--model", "tiny", "--run", "x", "--data", "y"], "says itself what is measured"),
        (["--suite", "quick", "--model", "tiny", "--run", "x", "--task", "retrieval"], "says itself what is measured"),
        (["--suite", "quick", "--model", "tiny", "--run", "x", "--processes", "2"], "one process"),
        (["--suite", "quick", "--model", "a", "--model", "b", "--run", "x", "--architecture", "c"], "one model"),
        (["tiny", "--model", "a", "--model", "b", "--data", "toys-val.jsonl"], "several models need --suite"),
        (["--model", "a", "--model", "b", "--data", "toys-val.jsonl"], "several are compared with --suite"),
        (["tiny"], "--suite NAME"),
        ([], "MODEL"),
    ],
)
def test_what_does_not_go_together_is_code_2(place: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str) -> None:
    monkeypatch.chdir(place)
    done = CliRunner().invoke(command, words)
    assert done.exit_code == 2, done.output
    assert said in " ".join(done.output.split())


def test_model_beside_a_model_is_its_architecture_as_before() -> None:
    assert one_model("file.pt", ("ViT-B/32",), None) == ("file.pt", "ViT-B/32")
    assert one_model("file.pt", (), "ViT-B/32") == ("file.pt", "ViT-B/32")
    assert one_model(None, ("runs/a",), None) == ("runs/a", None)


def test_models_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    found = candidates(("runs/a/best", "runs/b/best", "x=runs/c/best", "ViT-B/32", "clip.pt"), None, "cpu")
    assert [one.name for one in found] == ["a-best", "b-best", "x", "32", "clip.pt"]
    assert [one.source for one in found] == ["runs/a/best", "runs/b/best", "runs/c/best", "ViT-B/32", "clip.pt"]
    (tmp_path / "n=m").mkdir()
    assert candidates((str(tmp_path / "n=m"),), None, "cpu")[0].name == "n-m"
