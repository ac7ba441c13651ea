"""`wordsight embed`: vectors of pictures and texts that survive a kill and are never mixed between models."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import matplotlib.cbook
import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

import wordsight
from wordsight.cli.main import cli
from wordsight.types import BadSample
from wordsight.vectors import VectorFile


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, another one, 40 pictures of which one is broken, texts."""
    folder = tmp_path_factory.mktemp("embed")
    for seed in (0, 1):
        wordsight.save(wordsight.create("clip-tiny", seed=seed), folder / f"model{seed}")
    whole = Image.open(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))
    (folder / "pictures").mkdir()
    for i in range(40):
        whole.crop((5 * i, 5 * i, 5 * i + 100, 5 * i + 120)).save(folder / "pictures" / f"{i:02}.png")
    (folder / "pictures" / "17.png").write_bytes(b"nothing")
    (folder / "texts.txt").write_text("a cat\n\nein Hund\na cat\n狗\n", encoding="utf-8")
    return folder


def embed(*arguments, code=0):
    result = CliRunner().invoke(cli, ["embed", *map(str, arguments)], standalone_mode=True)
    assert result.exit_code == code, (result.output, result.exception)
    return result


def paths_of(folder):
    return [folder / "pictures" / f"{i:02}.png" for i in range(40) if i != 17]


def test_pictures_to_npy(folder, tmp_path):
    out = tmp_path / "x.npy"
    result = embed(
        folder / "model0", "--images", *sorted((folder / "pictures").iterdir()), "--out", out, "--part-size", 7, "--batch-size", 7
    )
    assert "39 rows of" in result.stdout
    assert "17.png: is no picture" in result.stderr
    vectors = np.load(out)
    expected = wordsight.load(folder / "model0").embed_images(paths_of(folder)).numpy()
    assert vectors.dtype == np.float32
    assert abs(vectors - expected).max() < 1e-5
    assert (tmp_path / "x.npy.names.txt").read_text().splitlines() == [str(path) for path in paths_of(folder)]
    description = json.loads((tmp_path / "x.npy.json").read_text())
    assert (description["rows"], description["dim"], len(description["bad"])) == (39, vectors.shape[1], 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.npy", "x.npy.json", "x.npy.names.txt"]
    # the same again does nothing, another model is refused
    before = out.stat().st_mtime_ns
    again = embed(folder / "model0", "--images", *sorted((folder / "pictures").iterdir()), "--out", out)
    assert "made before" in again.stderr
    assert out.stat().st_mtime_ns == before


def test_a_folder_to_parquet_and_workers(folder, tmp_path):
    out = tmp_path / "x.parquet"
    embed(folder / "model0", "--images", folder / "pictures", "--out", out, "--part-size", 10, "--workers", 1)
    table = pq.read_table(out)
    assert table.column("name").to_pylist() == [path.name for path in paths_of(folder)]
    expected = wordsight.load(folder / "model0").embed_images(paths_of(folder)).numpy()
    assert abs(np.stack(table.column("embedding").to_numpy()) - expected).max() < 1e-5
    assert json.loads(table.schema.metadata[b"wordsight"])["inputs"] == 40


def test_the_embedded_data(folder, tmp_path):
    result = embed(folder / "model0", "--images", "sample:test-unseen", "--out", tmp_path / "x.npy", "--json")
    from wordsight.data import open_source

    assert json.loads(result.stdout)["rows"] == len(open_source("sample:test-unseen"))


def test_texts_line_by_line(folder, tmp_path):
    result = embed(folder / "model0", "--texts", folder / "texts.txt", "--out", tmp_path / "t.npy", "--json", "--part-size", 2)
    assert json.loads(result.stdout)["rows"] == 5
    expected = wordsight.load(folder / "model0").embed_texts(["a cat", "", "ein Hund", "a cat", "狗"]).numpy()
    assert abs(np.load(tmp_path / "t.npy") - expected).max() < 1e-5


def test_another_model_or_other_inputs_are_never_mixed(folder, tmp_path):
    out = tmp_path / "x.npy"
    embed(folder / "model0", "--texts", folder / "texts.txt", "--out", out)
    for model, texts, words in [
        ("model1", folder / "texts.txt", "another model"),
        ("model0", tmp_path / "other.txt", "another texts"),
    ]:
        (tmp_path / "other.txt").write_text("a\nb\nc\nd\ne\n")
        result = embed(folder / model, "--texts", texts, "--out", out, code=1)
        assert words in str(result.exception)
    embed(folder / "model1", "--texts", folder / "texts.txt", "--out", out, "--restart")
    assert (
        abs(np.load(out) - wordsight.load(folder / "model1").embed_texts(["a cat", "", "ein Hund", "a cat", "狗"]).numpy()).max()
        < 1e-5
    )


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["model0", "--out", "x.npy"], 2, "--images PATH... or --texts FILE"),
        (["model0", "more", "--texts", "texts.txt", "--out", "x.npy"], 2, "unexpected argument: more"),
        (["model0", "--texts", "missing.txt", "--out", "x.npy"], 2, "missing.txt"),
        (["model0", "--texts", "texts.txt", "--out", "x.csv"], 1, "must end in .npy or .parquet"),
        (["model0", "--images", "missing.png", "--out", "x.npy"], 1, "no such picture: missing.png"),
        (["nowhere", "--texts", "texts.txt", "--out", "x.npy"], 1, "nowhere"),
        (["model0", "--images", "pictures", "--out", "bad.npy", "--max-bad-share", "0.01"], 1, "17.png"),
    ],
)
def test_failures_say_what_is_wrong(folder, monkeypatch, arguments, code, words):
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(cli, ["embed", *arguments])
    assert result.exit_code == code
    assert words in result.output + str(result.exception)
    assert not (folder / arguments[arguments.index("--out") + 1]).exists()


KILLED = """
import os, signal, sys
import wordsight.vectors
append = wordsight.vectors.VectorFile.append
def counted(self, *rest):
    append(self, *rest)
    if self.num_done >= 12:
        os.kill(os.getpid(), signal.SIGKILL)
wordsight.vectors.VectorFile.append = counted
from wordsight.cli.main import cli
cli(sys.argv[1:])
"""


def test_the_command_goes_on_after_being_killed(folder, tmp_path):
    """The bytes are those of a run in one go."""
    whole, out = tmp_path / "whole.npy", tmp_path / "killed.npy"
    arguments = [str(folder / "model0"), "--images", str(folder / "pictures"), "--part-size", "4", "--batch-size", "4"]
    embed(*arguments, "--out", whole)
    command = [sys.executable, "-c", KILLED, "embed", *arguments, "--out", str(out)]
    killed = subprocess.run(command, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists()
    result = embed(*arguments, "--out", out)
    assert "Going on after 12 of 40" in result.stderr
    assert out.read_bytes() == whole.read_bytes()
    assert (tmp_path / "killed.npy.names.txt").read_bytes() == (tmp_path / "whole.npy.names.txt").read_bytes()
    assert not (tmp_path / "killed.npy.parts").exists()


def test_a_file_survives_kills_at_20_random_moments(tmp_path):
    """Within the writing of parts and within the merging: nothing is lost, doubled or half there."""
    rows = np.random.default_rng(0).normal(size=(400, 8)).astype(np.float32)
    run = {"model": "m"}

    def go_on() -> None:
        file = VectorFile(tmp_path / "x.npy", run)
        while not file.is_complete and file.num_done < len(rows):
            part = slice(file.num_done, file.num_done + 5)
            file.append(5, rows[part], [f"name {i}" for i in range(part.start, part.stop)])
        if not file.is_complete:
            file.finish()

    rng = random.Random(0)
    moments = 0
    while moments < 20:
        child = os.fork()
        if child == 0:
            go_on()
            os._exit(0)
        time.sleep(rng.uniform(0.001, 0.03))
        os.kill(child, signal.SIGKILL)
        moments += os.waitpid(child, 0)[1] == signal.SIGKILL
        if (tmp_path / "x.npy").exists():  # it came to the end: that is right, and once more from the beginning
            assert np.array_equal(np.load(tmp_path / "x.npy"), rows)
            VectorFile(tmp_path / "x.npy", run, restart=True)
    go_on()
    assert np.array_equal(np.load(tmp_path / "x.npy"), rows)
    assert (tmp_path / "x.npy.names.txt").read_text().splitlines() == [f"name {i}" for i in range(400)]


def test_parts_after_a_gap_are_made_again(tmp_path):
    run = {"model": "m"}
    rows = np.arange(12, dtype=np.float32).reshape(6, 2)
    file = VectorFile(tmp_path / "x.npy", run)
    for start in (0, 2, 4):
        file.append(2, rows[start : start + 2], [f"n{start}", f"n{start + 1}"])
    (tmp_path / "x.npy.parts" / "part-000000000002-000000000004.npz").unlink()
    (tmp_path / "x.npy.parts" / ".part-x.npz.tmp").write_bytes(b"half")
    again = VectorFile(tmp_path / "x.npy", run)
    assert again.num_done == 2
    again.append(2, rows[2:3], ["n2"], [BadSample("n3", "is bad")])
    assert VectorFile(tmp_path / "x.npy", run).num_done == 6
    again = VectorFile(tmp_path / "x.npy", run)
    again.finish()
    assert np.load(tmp_path / "x.npy").tolist() == rows[[0, 1, 2, 4, 5]].tolist()
    assert VectorFile(tmp_path / "x.npy", run).description["bad"] == [{"name": "n3", "reason": "is bad"}]


def test_a_damaged_part_is_named_and_foreign_files_are_left_alone(tmp_path):
    file = VectorFile(tmp_path / "x.npy", {"model": "m"})
    file.append(1, np.ones((1, 2), np.float32), ["n"])
    part = tmp_path / "x.npy.parts" / "part-000000000000-000000000001.npz"
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"part-000000000000-000000000001\.npz is damaged"):
        VectorFile(tmp_path / "x.npy", {"model": "m"}).finish()
    (tmp_path / "mine.npy").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"mine\.npy was not written by wordsight"):
        VectorFile(tmp_path / "mine.npy", {"model": "m"})
    assert (tmp_path / "mine.npy").read_bytes() == b"mine"


def test_a_full_disk_keeps_what_is_there(tmp_path, monkeypatch):
    file = VectorFile(tmp_path / "x.npy", {"model": "m"})
    file.append(1, np.ones((1, 2), np.float32), ["n"])

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            file.append(1, np.ones((1, 2), np.float32), ["m"])
    again = VectorFile(tmp_path / "x.npy", {"model": "m"})
    assert again.num_done == 1
    assert not list((tmp_path / "x.npy.parts").glob(".*.tmp"))
