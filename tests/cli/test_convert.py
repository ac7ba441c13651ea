"""`wordsight convert` as a user types it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import wordsight
from wordsight.cli.convert import command


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "wordsight.cli.main", "convert", *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wordsight.save(wordsight.create("clip-tiny", seed=2), tmp_path_factory.mktemp("src") / "own")


def test_convert_writes_the_folder_and_says_what_to_type_next(source: Path, tmp_path: Path) -> None:
    done = run(source, tmp_path / "hf", "--to", "huggingface")
    assert done.returncode == 0, done.stderr
    assert "preprocessor_config.json" in done.stdout
    assert f"CLIPModel.from_pretrained('{tmp_path / 'hf'}')" in done.stdout
    original = wordsight.load(source)
    assert torch.equal(wordsight.load(tmp_path / "hf").image_tower.projection, original.image_tower.projection)


def test_failures_are_one_line_and_exit_codes_tell_them(source: Path, tmp_path: Path) -> None:
    failed = run(tmp_path / "none.pt", tmp_path / "x", "--to", "wordsight")
    assert failed.returncode == 1
    assert failed.stderr.startswith("Error: ")
    assert "no such file or folder" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert run(source, tmp_path / "x", "--to", "onnx").returncode == 2
    assert run(source).returncode == 2
    assert not (tmp_path / "x").exists()


def test_notes_are_printed_plainly(source: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from wordsight.interop import openai

    save_file(
        {k: v.contiguous() for k, v in openai.to_theirs(wordsight.load(source).state_dict()).items()},
        tmp_path / "bare.safetensors",
    )
    done = CliRunner().invoke(
        command, [str(tmp_path / "bare.safetensors"), str(tmp_path / "oc"), "--to", "open_clip", "--model", "clip-tiny"]
    )
    assert done.exit_code == 0, done.output
    assert "Note: " in done.output
    assert "CLIP's tokenizer is used" in done.output
    assert "local-dir:" in done.output


def test_help_fits_a_screen_with_two_examples() -> None:
    text = CliRunner().invoke(command, ["--help"], terminal_width=80, prog_name="wordsight convert").output
    assert len(text.splitlines()) <= 24
    assert text.count("  wordsight convert ") == 2
