"""A disk that is full while `wordsight long-tail` writes: named, exit code 1, nothing lost, and the same command goes on."""

from __future__ import annotations

import errno
import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import wordsight
from tests.adapt.make import colour_folders
from tests.adapt.test_grid import cell_files
from wordsight.cli import main
from wordsight.evaluate import part_files, results

WORDS = ["long-tail", "--model", "tiny", "--data", "colours", "--methods", "zero_shot,decoder+lade", "--seeds", "1", "--quiet"]
WORDS += [word for one in ("steps=3", "num_layers=1", "batch_size=8") for word in ("--set", f"decoder.{one}")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("full")
    wordsight.save(wordsight.create("clip-tiny"), root / "tiny")
    colour_folders(root / "colours", {"train": 4, "val": 2, "test": 2})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert run(patch, "whole") == 0
    return root


def run(patch: pytest.MonkeyPatch, folder: str) -> object:
    """The command as the console script calls it; its exit code."""
    patch.setattr(sys, "argv", ["wordsight", *WORDS, "--run", folder])
    with pytest.raises(SystemExit) as end:
        main.main()
    return end.value.code


def full_after(count: int, names: Callable[[str], bool]) -> Callable[[int], None]:
    """An fsync that finds no room for the files of such names, but for the first `count` of them."""
    seen: list[str] = []

    def fsync(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if names(name):
            seen.append(name)
            if len(seen) > count:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return fsync


@pytest.mark.parametrize(
    ("count", "where", "said"),
    [
        (0, "/features/", "no room in {run}/features for a further part of"),
        (2, "/tokens/", "no room in {run}/tokens for a further part of"),
        (0, "/cells/", "no room in {run} (No space left on device)"),
        (3, "/cells/", "no room in {run} (No space left on device)"),
        (0, "/.summary.json", "no room in {run} (No space left on device)"),
    ],
)
def test_a_full_disk_is_named_and_the_same_command_goes_on(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], count: int, where: str, said: str
) -> None:
    monkeypatch.chdir(place)
    folder = f"run-{count}-{where.strip('/')}"
    fsync = full_after(count, lambda name: where in name)
    with monkeypatch.context() as patch:
        patch.setattr(part_files.os, "fsync", fsync)
        patch.setattr(results.os, "fsync", fsync)
        assert run(patch, folder) == 1
    told = capsys.readouterr().err
    assert said.format(run=folder) in told
    assert "run the same again: it goes on from" in told
    assert "Traceback" not in told
    assert not [path for path in Path(folder).rglob("*.tmp") if path.is_file()], "nothing is left half-written"
    parts = {path: path.stat().st_mtime_ns for path in Path(folder).glob("*/*.features")}
    done = {path: path.stat().st_mtime_ns for path in Path(folder).glob("cells/*/*/result.json")}
    assert len(parts) == {"/features/": 0, "/tokens/": 1 + 2}.get(where, 1 + 3)
    assert len(done) == {"/.summary.json": 2, "/cells/": 0 if count == 0 else 1}.get(where, 0)
    assert run(monkeypatch, folder) == 0
    assert {path: path.stat().st_mtime_ns for path in {**parts, **done}} == {**parts, **done}, "what was done stayed as it was"
    assert cell_files(Path(folder)) == cell_files(Path("whole"))
    summaries = [json.loads((Path(name) / "summary.json").read_text())["kept"] for name in (folder, "whole")]
    assert summaries[0] == summaries[1]


@pytest.mark.parametrize("limit", [30_000, 1_000_000])
def test_a_limit_of_the_system_is_a_full_disk_too(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], limit: int
) -> None:
    """The kernel refuses to write further: first a part of the cache, then the kept model, which safetensors writes."""
    monkeypatch.chdir(place)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))  # Python leaves the signal for it ignored
    try:
        assert run(monkeypatch, f"limited-{limit}") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"no room in limited-{limit} (File too large)" in capsys.readouterr().err
    assert len(list(Path(f"limited-{limit}").glob("cells/*/*/result.json"))) == (2 if limit == 1_000_000 else 0)
    assert run(monkeypatch, f"limited-{limit}") == 0
    assert cell_files(Path(f"limited-{limit}")) == cell_files(Path("whole"))
