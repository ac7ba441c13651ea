"""`wordsight train` as a user types it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

import wordsight
from wordsight.catalog import CATALOG
from wordsight.cli.main import cli

TINY = CATALOG["clip-tiny"]

SMALL = ("--set", "steps=4", "--set", "batch_size=8", "--set", "data.sources=sample:train-openclipart", "--device", "cpu")


def wordsight_command(*arguments: str) -> int:
    return cli.main(arguments, standalone_mode=False) or 0


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_train_writes_a_run_folder_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert wordsight_command("train", "clip_tiny", "--run", str(run), *SMALL) == 0
    said = capsys.readouterr()
    assert "4 steps done" in said.out
    assert "step 4/4" in said.err
    names = {path.name for path in run.iterdir()}
    assert {
        "recipe.json",
        "environment.json",
        "metrics.jsonl",
        "speed.jsonl",
        "checkpoints",
        "last",
        "report.html",
        "tensorboard",
    } <= names
    assert steps(run) == [1, 2, 3, 4]
    environment = json.loads((run / "environment.json").read_text())["starts"][0]
    assert environment["versions"]["torch"]
    assert environment["seed"] == 0
    assert {"git", "machine", "command", "time"} <= environment.keys()
    stored = json.loads((run / "recipe.json").read_text())
    assert stored["recipe"] == "clip_tiny"
    assert stored["resolved"]["batch_size"] == 8
    model = wordsight.load(run)
    assert model.embed_texts(["a red apple"]).shape == (1, TINY.config.embed_dim)
    # the same command again: complete, nothing is trained twice
    assert wordsight_command("train", "clip_tiny", "--run", str(run), *SMALL) == 0
    assert steps(run) == [1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"another recipe \(steps: 4 there, 5 now\)"):
        wordsight_command("train", "--run", str(run), "--set", "steps=5")


def test_a_terminated_run_exits_with_143_and_goes_on_by_its_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["train", "clip_tiny", "--run", str(run), *SMALL, "--set", "steps=400"]
    process = subprocess.Popen([sys.executable, "-m", "wordsight", *arguments], stderr=subprocess.PIPE, text=True)
    while not (run / "metrics.jsonl").exists() or not steps(run):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 143
    assert f"wordsight train --run {run}" in said
    done = len(steps(run))
    assert 0 < done < 400
    assert f"Step {done} of 400 is saved" in said


def test_two_processes_by_one_option(tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["train", "clip_tiny", "--run", str(run), *SMALL, "--set", "steps=2", "--processes", "2", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-m", "wordsight", *arguments],
        capture_output=True,
        text=True,
        timeout=250,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 steps done") == 1
    assert steps(run) == [1, 2]
    assert json.loads((run / "environment.json").read_text())["starts"][0]["machine"]["processes"] == 2


def test_dry_run_shows_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = (
        "train",
        "clip_tiny",
        *SMALL,
        "--micro-batch",
        "2",
        "--set",
        "ema_decay=.9",
        "--processes",
        "2",
        "--dry-run",
    )
    assert wordsight_command(*arguments) == 0
    said = capsys.readouterr().out
    resolved, _, rest = said.partition("\n\n")
    assert json.loads(resolved)["batch_size"] == 8
    assert "samples a step: 8 = 2 process(es) x 4, 2 in memory at once" in rest
    assert f"parameters: {TINY.num_parameters:,}, trainable {TINY.num_parameters:,}" in rest
    size = TINY.num_parameters * 4 / 1e6
    assert f"weights {size:.3g} MB, gradients {size:.3g} MB, AdamW {2 * size:.3g} MB, average {size:.3g} MB" in rest
    assert "step 1: loss" in rest
    assert "step 2: loss" in rest
    assert not list(tmp_path.iterdir())


def test_wrong_usage_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(click.UsageError, match="Missing option '--run'"):
        wordsight_command("train", "clip_tiny")
    with pytest.raises(click.UsageError, match=r"holds no run to go on with. Recipes: align, .*clip_tiny, .*quickstart"):
        wordsight_command("train", "--run", str(tmp_path))
    with pytest.raises(click.UsageError, match="0 is not in the range x>=1"):
        wordsight_command("train", "clip_tiny", "--run", str(tmp_path), "--micro-batch", "0")
    with pytest.raises(ValueError, match="did you mean clip_tiny"):
        wordsight_command("train", "clip-tyni", "--run", str(tmp_path))
    with pytest.raises(ValueError, match="the recipe has no data"):
        wordsight_command("train", "clip", "--run", str(tmp_path / "run"), "--device", "cpu")
