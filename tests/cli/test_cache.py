"""`wordsight cache` as a user types it: what is kept, whether it is whole, what goes; token caches too."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

import wordsight
from tests.evaluate.conftest import COLOURS, picture
from wordsight.adapt import cache_tokens, image_features
from wordsight.cli.cache import command, parse_size
from wordsight.evaluate import embedding, part_files

DAY_S = 86400


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features of two models, one of them with views, and tokens; the first was last used 40 days ago."""
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (40, 36, 3), dtype=np.uint8)) for _ in range(6)]
    folder = tmp_path_factory.mktemp("kept")
    first, second = wordsight.create("clip-tiny", seed=0), wordsight.create("clip-tiny-resnet", seed=0)
    image_features(first, pictures, cache=folder / "features")
    for path in folder.rglob("*.features"):
        os.utime(path, (time.time() - 40 * DAY_S,) * 2)
    image_features(second, pictures[:4], num_views=2, cache=folder / "features", layer="penultimate")
    cache_tokens(first, pictures, folder / "tokens")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of it, times and all."""
    for path in made.rglob("*.features"):
        copy, status = tmp_path / path.relative_to(made), path.stat()
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
        for file in (path, copy):  # reading it has changed it
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    return tmp_path


def call(*words: Any, answer: str | None = None, code: int = 0) -> Result:
    done = CliRunner().invoke(command, [str(word) for word in words], input=answer)
    assert done.exit_code == code, done.output
    return done


def rows(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(call("list", folder, "--json").stdout)
    return found


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*.features"))


def test_list_says_whose_features_they_are(folder: Path) -> None:
    found = {row["layer"]: row for row in rows(folder)}
    assert {layer: (row["views"], row["pictures"], row["parts"]) for layer, row in found.items()} == {
        "projected": (1, 6, 1),
        "penultimate": (3, 4, 3),
        "tokens float16": (1, 6, 1),
    }
    assert found["projected"]["bytes"] == sum(path.stat().st_size for path in _of(folder, "projected"))
    assert found["projected"]["model"].startswith("CLIP, created by")
    assert found["projected"]["last_use_s"] == pytest.approx(time.time() - 40 * DAY_S, abs=3600)
    assert rows(folder)[-1]["layer"] == "projected", "the last used come first"
    text = call("list", folder).stdout
    assert "tokens float16" in text
    assert f"5 files, {sum(path.stat().st_size for path in files(folder)) / 1e6:.1f} MB in" in text


def _of(folder: Path, layer: str) -> list[Path]:
    listed = part_files.list_parts(folder)
    return [one.path for one in listed if one.subject is not None and one.subject.layer == layer]


def test_looking_is_no_use_and_using_is(folder: Path) -> None:
    before = {path: (path.stat().st_atime_ns, path.stat().st_mtime_ns) for path in files(folder)}
    for words in (("list",), ("verify",), ("prune", "--older-than", "99")):
        call(words[0], folder, *words[1:])
    assert {path: (path.stat().st_atime_ns, path.stat().st_mtime_ns) for path in files(folder)} == before
    (path,) = _of(folder, "projected")
    part_files.mark_used(path)
    assert {row["layer"]: row for row in rows(folder)}["projected"]["last_use_s"] == pytest.approx(time.time(), abs=60)
    assert path.stat().st_mtime_ns == before[path][1], "when it was made stays"


def test_verify_names_what_is_damaged_and_prune_removes_it(folder: Path) -> None:
    assert "5 of 5 files are whole" in call("verify", folder).stdout
    (flipped,), (cut,) = _of(folder, "projected"), _of(folder, "tokens float16")
    content = bytearray(flipped.read_bytes())
    content[-100] ^= 4
    flipped.write_bytes(content)
    cut.write_bytes(cut.read_bytes()[:30])
    done = CliRunner().invoke(command, ["verify", str(folder)], standalone_mode=False)
    assert done.return_value == 1, "which is the exit code, see wordsight.cli.main"
    assert {line for line in done.stdout.splitlines() if line.startswith("damaged")} == {
        f"damaged: {flipped}",
        f"damaged: {cut}",
    }
    assert "3 of 5 files are whole" in done.stdout
    assert any(row["model"] == "(damaged, or of an older version)" for row in rows(folder))
    call("prune", folder, "--damaged", "--yes")
    assert not {flipped, cut} & files(folder)
    assert "3 of 3 files are whole" in call("verify", folder).stdout


def test_prune_asks_says_and_frees(folder: Path) -> None:
    (old,) = _of(folder, "projected")
    done = call("prune", folder, "--older-than", "30", answer="n\n", code=1)
    assert f"1 files, {old.stat().st_size / 1e6:.1f} MB: CLIP, created by" in done.stdout
    assert len(files(folder)) == 5
    size_mb = old.stat().st_size / 1e6
    assert f"Freed {size_mb:.1f} MB" in call("prune", folder, "--older-than", "30", answer="y\n").stdout
    assert len(files(folder)) == 4
    assert not old.exists()
    assert "Nothing to remove" in call("prune", folder, "--older-than", "30").stdout


def test_prune_by_model_and_by_several_conditions(folder: Path) -> None:
    identity = {row["layer"]: row["id"] for row in rows(folder)}
    assert "Nothing to remove" in call("prune", folder, "--model", "siglip").stdout
    assert "Nothing to remove" in call("prune", folder, "--model", identity["penultimate"], "--older-than", "30").stdout
    call("prune", folder, "--model", identity["penultimate"], "--yes")
    assert {row["layer"] for row in rows(folder)} == {"projected", "tokens float16"}
    call("prune", folder, "--model", "clip", "--yes")
    assert not files(folder)


def test_prune_to_a_size_takes_what_was_not_used_for_longest(folder: Path) -> None:
    total = sum(path.stat().st_size for path in files(folder))
    (old,) = _of(folder, "projected")
    assert "Nothing to remove" in call("prune", folder, "--max-size", total).stdout
    call("prune", folder, "--max-size", total - 1, "--yes")
    assert not old.exists()
    assert len(files(folder)) == 4
    call("prune", folder, "--max-size", "0", "--yes")
    assert not files(folder)


def test_leftovers_of_killed_processes_go_too(folder: Path) -> None:
    half = folder / "features" / f".{next(iter(files(folder))).name}.17.tmp"
    half.write_bytes(bytes(10**6))
    fresh = half.with_suffix(".18.tmp")
    fresh.write_bytes(b"being written")
    os.utime(half, (0, 0))
    other = folder / "features" / "notes.txt"
    other.write_text("mine")
    assert "Freed 1.0 MB" in call("prune", folder, "--older-than", "99").stdout
    assert (half.exists(), fresh.exists(), other.exists()) == (False, True, True)


def test_wrong_usage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "say what may go" in call("prune", folder, code=2).output
    assert "'5 pounds' is no size" in call("prune", folder, "--max-size", "5 pounds", code=2).output
    assert "Missing argument" in call("list", code=2).output
    monkeypatch.setenv("WORDSIGHT_CACHE", str(folder))
    assert "5 files" in call("list").stdout
    assert "does not exist" in call("verify", folder / "absent", code=2).output


@pytest.mark.parametrize(("text", "size"), [("500M", 5e8), ("20GB", 2e10), ("1.5 t", 1.5e12), ("7", 7), ("3k", 3e3)])
def test_sizes(text: str, size: float) -> None:
    assert parse_size(text) == size


def test_evaluate_keeps_features_where_it_is_told_and_asks_no_tower_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wordsight.cli.evaluate import command as evaluate

    monkeypatch.chdir(tmp_path)
    wordsight.save(wordsight.create("clip-tiny"), tmp_path / "tiny")
    lines = []
    for i, colour in enumerate(COLOURS):
        (tmp_path / f"{i}.png").write_bytes(picture(COLOURS[colour]))
        lines.append(json.dumps({"path": f"{i}.png", "caption": f"all {colour}", "label": colour}))
    (tmp_path / "toys.jsonl").write_text("\n".join(lines), encoding="utf-8")
    words = ["tiny", "--data", "toys.jsonl", "--run"]
    assert CliRunner().invoke(evaluate, [*words, "plain"]).exit_code == 0
    assert not list(tmp_path.rglob("*.features")), "nothing is kept unless a folder is named"
    assert CliRunner().invoke(evaluate, [*words, "first", "--cache", "kept"]).exit_code == 0

    def never(*args: Any) -> Any:
        raise AssertionError("the tower is asked")

    monkeypatch.setattr(embedding, "encoder", lambda model, layer: never)
    monkeypatch.setenv("WORDSIGHT_CACHE", "kept")
    done = CliRunner().invoke(evaluate, [*words, "second"])
    assert done.exit_code == 0, done.output
    assert len({(tmp_path / run / "results.json").read_bytes() for run in ("plain", "first", "second")}) == 1
    assert [(row["layer"], row["pictures"]) for row in rows(tmp_path)] == [("projected", len(COLOURS))]
