"""Mined negatives equal a search by brute force, whatever the tile; negations deny, or stay silent."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.data.make import encoded, picture
from wordsight.cli.main import cli
from wordsight.data.negation import negations
from wordsight.data.negatives import NegativesTable, mine


def brute_force(
    texts: list[str], vectors: np.ndarray, k: int, pictures: list[int] | None, most: float | None
) -> dict[str, list[str]]:
    """By the definition, with every pair."""
    pictures = list(range(len(texts))) if pictures is None else pictures
    different = list(dict.fromkeys(texts))
    unit = {t: vectors[texts.index(t)] / np.linalg.norm(vectors[texts.index(t)]) for t in different}
    of = {t: {p for text, p in zip(texts, pictures, strict=True) if text == t} for t in different}
    found = {}
    for text in different:
        others = [(float(unit[text] @ unit[o]), o) for o in different if o != text and not of[o] & of[text]]
        others = [pair for pair in others if most is None or pair[0] <= most]
        found[text] = [o for _, o in sorted(others, key=lambda pair: -pair[0])[:k]]
    return found


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 11), st.integers(0, 6)), min_size=1, max_size=25),
    st.integers(1, 6),
    st.integers(1, 9),
    st.booleans(),
    st.sampled_from([None, 0.3]),
    st.integers(0, 5),
)
def test_mining_is_the_search_by_brute_force(
    pairs: list[tuple[int, int]], k: int, tile: int, named: bool, most: float | None, seed: int
) -> None:
    table = np.random.default_rng(seed).normal(size=(12, 5)).astype(np.float32)
    texts, pictures = [f"text {t}" for t, _ in pairs], [p for _, p in pairs] if named else None
    vectors = table[[t for t, _ in pairs]] * 3
    mined = mine(texts, vectors, k, picture_ids=pictures, max_similarity=most, tile=tile)
    expected = brute_force(texts, vectors, k, pictures, most)
    assert mined.texts == list(expected)
    for row, text in enumerate(mined.texts):
        assert mined.negatives(row) == expected[text]
        assert (mined.places[row] >= 0).sum() == len(expected[text])
        assert np.all(np.diff(mined.similarities[row][: len(expected[text])]) <= 1e-6)
        assert np.all(np.isneginf(mined.similarities[row][len(expected[text]) :]))


def test_vectors_of_any_kind_and_length() -> None:
    vectors = np.random.default_rng(1).normal(size=(20, 6))
    texts = [f"t{i}" for i in range(20)]
    expected = mine(texts, vectors, 3).places
    for other in (vectors.astype(np.float16), torch.from_numpy(vectors), torch.from_numpy(vectors * np.arange(1, 21)[:, None])):
        assert (mine(texts, other, 3, tile=7).places == expected).mean() > 0.95  # rounding may swap neighbours


class Largest(TorchDispatchMode):
    """The largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, function: Any, kinds: Any, arguments: Any = (), options: Any = None) -> Any:
        found = function(*arguments, **(options or {}))
        for one in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(one, torch.Tensor):
                self.numel = max(self.numel, one.numel())
        return found


def test_mining_never_holds_all_pairs() -> None:
    number, tile = 3000, 100
    vectors = np.random.default_rng(0).normal(size=(number, 8)).astype(np.float32)
    done: list[int] = []
    pictures = [i // 2 for i in range(number)]
    with Largest():
        mine(["a", "b"], vectors[:2], 1)  # what PyTorch imports at the first use of a mode is none of ours
    tracemalloc.start()
    with Largest() as largest:
        mine([f"t{i}" for i in range(number)], vectors, 2, tile=tile, picture_ids=pictures, advance=done.append)
    peak = tracemalloc.get_traced_memory()[1]  # numpy's and Python's own
    tracemalloc.stop()
    assert sum(done) == number
    assert largest.numel == tile * tile
    assert peak < number * number / 2


@pytest.mark.parametrize(
    ("vectors", "options", "words"),
    [
        (np.ones((2, 3)), {}, "3 texts, 2 vectors"),
        (np.ones((3, 3)), {"picture_ids": [1]}, "1 picture ids"),
        (np.ones((3, 3)), {"k": 0}, "1 or more"),
        (np.array([[1.0], [0.0], [1.0]]), {}, "row 1.*'b'.*zero or not finite"),
        (np.array([[1.0], [np.nan], [1.0]]), {}, "zero or not finite"),
        (np.ones(3), {}, "a row a text"),
    ],
)
def test_wrong_vectors(vectors: np.ndarray, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        mine(["a", "b", "c"], vectors, **{"k": 1, **options})


def test_the_table_comes_back(tmp_path: Path) -> None:
    mined = mine(["a", "b", "c", "ä\n b"], np.random.default_rng(0).normal(size=(4, 3)), 2, picture_ids=[0, 0, 1, 2])
    mined.write(tmp_path / "n.parquet")
    table = NegativesTable(tmp_path / "n.parquet")
    assert len(table) == 4
    for row, text in enumerate(mined.texts):
        assert list(table(text)) == mined.negatives(row)
    assert table("nothing") == ()


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    lines = ["path,caption,title"]
    for i in range(6):
        (tmp_path / f"{i}.jpg").write_bytes(encoded(picture(i)))
        lines.append(f"{i}.jpg,caption {i},title {i % 3}")
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    return tmp_path / "pairs.csv"


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(cli, ["data", "mine-negatives", *map(str, arguments)], standalone_mode=False)


@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_the_command_mines_with_given_vectors(pairs: Path, tmp_path: Path, kind: str) -> None:
    from wordsight.vectors import read_vectors

    result = run(pairs, "--out", tmp_path / "n.parquet", "--list-texts", tmp_path / "texts.txt")
    assert result.exception is None
    texts = (tmp_path / "texts.txt").read_text().splitlines()
    assert sorted(texts) == sorted([f"caption {i}" for i in range(6)] + [f"title {i}" for i in range(3)])
    vectors = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    path = tmp_path / f"v.{kind}"
    if kind == "npy":
        np.save(path, vectors)
        (tmp_path / "v.npy.names.txt").write_text("\n".join(texts) + "\n")
    else:
        import pyarrow as pa
        from pyarrow import parquet

        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), 4)
        parquet.write_table(pa.table({"name": texts, "embedding": column}), path)
    names, read = read_vectors(path)
    assert names == texts
    assert np.array_equal(read, vectors)
    result = run(pairs, "--out", tmp_path / "n.parquet", "--vectors", path, "--k", "3", "--json")
    assert json.loads(result.stdout)["texts"] == 9
    table = NegativesTable(tmp_path / "n.parquet")
    own = {f"caption {i}": {f"title {i % 3}"} for i in range(6)} | {
        f"title {i}": {f"caption {i}", f"caption {i + 3}"} for i in range(3)
    }
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for row, text in enumerate(texts):
        ranked = [texts[i] for i in np.argsort(-(unit @ unit[row])) if texts[i] != text and texts[i] not in own[text]]
        assert list(table(text)) == ranked[:3]


def test_the_command_says_what_is_missing(pairs: Path, tmp_path: Path) -> None:
    assert "give one of" in str(run(pairs, "--out", tmp_path / "n.parquet").exception)
    assert "must end in .parquet" in str(run(pairs, "--out", tmp_path / "n.csv", "--model", "x").exception)
    np.save(tmp_path / "v.npy", np.ones((1, 2), np.float32))
    (tmp_path / "v.npy.names.txt").write_text("caption 0\n")
    result = run(pairs, "--out", tmp_path / "n.parquet", "--vectors", tmp_path / "v.npy")
    assert "no vector for 8 of 9 texts" in str(result.exception)
    (tmp_path / "v.npy.names.txt").unlink()
    assert "can't be read as vectors" in str(
        run(pairs, "--out", tmp_path / "n.parquet", "--vectors", tmp_path / "v.npy").exception
    )


# Negations


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a photo of a cat", ("a photo of something that is not a cat", "no cat in the picture")),
        ("A photo of a cat on a mat.", ("A photo of something that is not a cat on a mat", "no cat in the picture")),
        (
            "a black and white photo of two dogs",
            ("a black and white photo of something that is not two dogs", "no dogs in the picture"),
        ),
        ("a man is riding a horse", ("a man is not riding a horse",)),
        ("Two dogs are playing", ("Two dogs are not playing",)),
        ("a red car", ("something that is not a red car", "no red car in the picture")),
        ("a cup of coffee", ("something that is not a cup of coffee", "no cup of coffee in the picture")),
        ("golden retriever", ("no golden retriever in the picture",)),
        ("cat", ("no cat in the picture",)),
    ],
)
def test_negations(caption: str, expected: tuple[str, ...]) -> None:
    assert negations(caption) == expected


SILENT = ["", " . ", "no cat", "a dog without a tail", "it isn’t a cat", "is it a cat?", "a dog runs fast", "dogs run"]
SILENT += ["a girl smiles at a cat", "a photo of a man who is eating", "word " * 50]


@pytest.mark.parametrize("caption", SILENT)
def test_silence_where_no_rule_is_sure(caption: str) -> None:
    assert negations(caption) == ()


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_any_text_gives_other_texts(text: str) -> None:
    for one in negations(text):
        assert one.strip()
        assert one != text
        assert " not " in one or one.startswith("no ")
    assert negations(text) == negations(text)
