"""`wordsight embed`: vectors of pictures and texts that survive a kill and are never mixed between models."""

import json
import os
import pickle
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
from wordsight.data.texts import read_texts
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


def test_vectors_by_reduced_decoding_are_never_mixed_with_exact_ones(folder, tmp_path):
    picture = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    words = [folder / "model0", "--images", picture, picture, "--part-size", 1, "--out"]
    model = wordsight.load(folder / "model0")
    for name, option, other in (("exact.npy", [], ["--reduced-decode"]), ("near.npy", ["--reduced-decode"], [])):
        out = tmp_path / name
        embed(*words, out, *option)
        expected = model.embed_images([picture] * 2, reduced_decode=bool(option)).numpy()
        assert abs(np.load(out) - expected).max() < 1e-5
        result = embed(*words, out, *other, code=1)
        assert "another decoding" in str(result.exception)
        assert "made before" in embed(*words, out, *option).stderr
    assert abs(np.load(tmp_path / "exact.npy") - np.load(tmp_path / "near.npy")).max() > 1e-4


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["model0", "--texts", "texts.txt", "--out", "x.npy", "--reduced-decode"], 2, "the pictures that --images gives"),
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
write = wordsight.vectors.VectorFile.write
def counted(self, *rest):
    write(self, *rest)
    if self.num_done >= 12:
        os.kill(os.getpid(), signal.SIGKILL)
wordsight.vectors.VectorFile.write = counted
from wordsight.cli.main import cli
cli(sys.argv[1:])
"""


def test_the_command_goes_on_after_being_killed(folder, tmp_path):
    """The bytes are those of a run in one go: in processes of their own, because how MKL rounds is settled by its first use."""

    def run(code, out):
        arguments = [str(folder / "model0"), "--images", str(folder / "pictures"), "--part-size", "4", "--batch-size", "4"]
        command = [sys.executable, "-c", code, "embed", *arguments, "--out", str(out)]
        return subprocess.run(command, capture_output=True, check=False, text=True)

    whole, out = tmp_path / "whole.npy", tmp_path / "killed.npy"
    plain = "import sys; from wordsight.cli.main import cli; cli(sys.argv[1:])"
    assert run(plain, whole).returncode == 0
    killed = run(KILLED, out)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists()
    result = run(plain, out)
    assert "Going on after 12 of 40" in result.stderr
    assert out.read_bytes() == whole.read_bytes()
    assert (tmp_path / "killed.npy.names.txt").read_bytes() == (tmp_path / "whole.npy.names.txt").read_bytes()
    assert not (tmp_path / "killed.npy.parts").exists()


def test_a_file_survives_kills_at_20_random_moments(tmp_path):
    """Within the writing of parts and within the merging: nothing is lost, doubled or half there."""
    rows = np.random.default_rng(0).normal(size=(400, 8)).astype(np.float32)
    run = {"model": "m"}

    def go_on() -> None:
        file = VectorFile(tmp_path / "x.npy", run, num_inputs=len(rows), part_size=5)
        if not file.is_complete:
            for part in file.missing:
                file.write(part, rows[part.start : part.stop], [f"name {i}" for i in part])
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
            VectorFile(tmp_path / "x.npy", run, num_inputs=len(rows), part_size=5, restart=True)
    go_on()
    assert np.array_equal(np.load(tmp_path / "x.npy"), rows)
    assert (tmp_path / "x.npy.names.txt").read_text().splitlines() == [f"name {i}" for i in range(400)]


def test_missing_parts_are_made_in_any_order_and_by_copies(tmp_path):
    """As several processes do it; the grid is that of the beginning."""
    run = {"model": "m"}
    rows = np.arange(14, dtype=np.float32).reshape(7, 2)
    file = VectorFile(tmp_path / "x.npy", run, num_inputs=7, part_size=2)
    assert file.parts == file.missing == [range(0, 2), range(2, 4), range(4, 6), range(6, 7)]
    copy = pickle.loads(pickle.dumps(file))
    copy.write(range(6, 7), rows[6:], ["n6"])
    file.write(range(2, 4), rows[2:3], ["n2"], [BadSample("n3", "is bad")])
    (tmp_path / "x.npy.parts" / ".part-x.npz.tmp").write_bytes(b"half")
    again = VectorFile(tmp_path / "x.npy", run, num_inputs=7, part_size=3)
    assert (again.part_size, again.num_done, again.missing) == (2, 3, [range(0, 2), range(4, 6)])
    assert again.bad == [BadSample("n3", "is bad")]
    again.write(range(4, 6), rows[4:6], ["n4", "n5"])
    with pytest.raises(ValueError, match=r"1 parts of .* are not there, the first of inputs 0 to 2: give the command again"):
        again.finish()
    again.write(range(0, 2), rows[:2], ["n0", "n1"])
    again.finish()
    assert np.load(tmp_path / "x.npy").tolist() == rows[[0, 1, 2, 4, 5, 6]].tolist()
    found = VectorFile(tmp_path / "x.npy", run, num_inputs=7)
    assert found.is_complete
    assert found.description == {"rows": 6, "dim": 2, "bad": [{"name": "n3", "reason": "is bad"}], "run": run}


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_several_vectors_of_an_input_keep_their_shape(tmp_path, suffix):
    rows = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
    file = VectorFile(tmp_path / f"x{suffix}", {}, num_inputs=5, part_size=2)
    file.write(range(0, 2), rows[:0], [], [BadSample("a", "bad"), BadSample("b", "bad")])
    file.write(range(2, 4), rows[:2], ["c", "d"])
    file.write(range(4, 5), rows[2:3], ["e"])
    file.finish()
    assert (file.description["dim"], file.description["shape"]) == (2, [3, 2])
    if suffix == ".npy":
        assert np.array_equal(np.load(tmp_path / "x.npy"), rows[:3])
    else:
        found = np.stack(pq.read_table(tmp_path / "x.parquet").column("embedding").to_numpy())
        assert np.array_equal(found.reshape(3, 3, 2), rows[:3])


def test_a_damaged_part_is_named_and_foreign_files_are_left_alone(tmp_path):
    file = VectorFile(tmp_path / "x.npy", {"model": "m"}, num_inputs=1)
    file.write(range(1), np.ones((1, 2), np.float32), ["n"])
    part = tmp_path / "x.npy.parts" / "part-000000000000-000000000001.npz"
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"part-000000000000-000000000001\.npz is damaged"):
        VectorFile(tmp_path / "x.npy", {"model": "m"}, num_inputs=1).finish()
    (tmp_path / "mine.npy").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"mine\.npy was not written by wordsight"):
        VectorFile(tmp_path / "mine.npy", {"model": "m"}, num_inputs=1)
    assert (tmp_path / "mine.npy").read_bytes() == b"mine"


def test_a_full_disk_keeps_what_is_there(tmp_path, monkeypatch):
    file = VectorFile(tmp_path / "x.npy", {"model": "m"}, num_inputs=2, part_size=1)
    file.write(range(1), np.ones((1, 2), np.float32), ["n"])

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            file.write(range(1, 2), np.ones((1, 2), np.float32), ["m"])
    again = VectorFile(tmp_path / "x.npy", {"model": "m"}, num_inputs=2, part_size=1)
    assert again.num_done == 1
    assert not list((tmp_path / "x.npy.parts").glob(".*.tmp"))


@pytest.mark.parametrize(
    ("name", "content", "column"),
    [
        ("t.csv", "id,caption\n1,a cat\n2,\n3,ein Hund\n", None),
        ("t.tsv", "caption\tmine\nwrong\ta cat\nwrong\t\nwrong\tein Hund\n", "mine"),
        ("t.jsonl", '{"text": "a cat"}\n{"text": ""}\n{"text": "ein Hund"}\n', None),
        ("t.txt", "a cat\n\nein Hund\n", None),
    ],
)
def test_texts_of_a_tables_column(folder, tmp_path, name, content, column):
    (tmp_path / name).write_text(content, encoding="utf-8")
    option = ["--column", column] if column else []
    embed(folder / "model0", "--texts", tmp_path / name, *option, "--out", tmp_path / "x.npy")
    expected = wordsight.load(folder / "model0").embed_texts(["a cat", "", "ein Hund"]).numpy()
    assert abs(np.load(tmp_path / "x.npy") - expected).max() < 1e-5


@pytest.mark.parametrize(
    ("name", "content", "column", "words"),
    [
        ("t.csv", "id,words\n1,a\n", None, "no column known to hold texts; name one of id, words"),
        ("t.csv", "id,words\n1,a\n", "word", "no column 'word'; name one of id, words"),
        ("t.csv", "id,caption\n1,a\n2\n", None, "1 rows of .* can't be read"),
        ("t.jsonl", '{"caption": ["a", "b"]}\n', None, "row 1 of .* has 2 texts in its column 'caption'"),
        ("t.jsonl", '{"caption": "a"}\n{"caption": null}\n', None, "row 2 of .* has no text"),
        ("t.jsonl", '"a"\n', None, "t.jsonl holds no JSON object"),
        ("t.txt", "a\n", "caption", "has no columns"),
        ("t.txt", "", None, "is empty: write a text a line"),
        ("t.txt", b"\xff\xfe\x00", None, "is not in UTF-8"),
    ],
)
def test_texts_that_can_not_be_read_say_why(tmp_path, name, content, column, words):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=words):
        read_texts(tmp_path / name, column)
