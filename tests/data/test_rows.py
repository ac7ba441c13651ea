"""Labels, weights, several captions and hard negatives in a batch: as given, drawn by position, from files or memory."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.make import encoded, picture, write_tar
from tests.data.test_loader import Memory, make
from wordsight.data import DataSource, open_source
from wordsight.data.negatives import NegativesTable
from wordsight.data.order import CAPTIONS, NEGATIVES, choose
from wordsight.data.rows import has_weights
from wordsight.data.transform import Preprocess
from wordsight.types import Batch, Sample

FIELDS = ("tokens", "text_ids", "image_ids", "label_ids", "weights", "negatives", "negatives_given")


def text_of(tokens: torch.Tensor) -> str:
    return "".join(chr(c) for c in tokens.tolist()).rstrip("\0")


def batches(source: Any, number: int = 4, start: int = 0, **options: Any) -> list[Batch]:
    options = {"transform": Preprocess(16), "max_bad_share": 1.0, **options}
    return list(itertools.islice(make(source, **options).batches(start), number))


def assert_equal(one: Batch, other: Batch) -> None:
    assert one.keys == other.keys
    assert one.bad == other.bad
    assert torch.equal(one.pixels, other.pixels)
    for name in FIELDS:
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None), name
        assert a is None or (a.dtype == b.dtype and torch.equal(a, b)), name


def rich(number: int = 9, bad: tuple[int, ...] = ()) -> Memory:
    """Sample i has 1 + i % 4 captions, label i % 3 (none for every fifth), weight i / 2 and i % 4 negatives."""
    samples = []
    for i in range(number):
        meta: dict[str, Any] = {"weight": i / 2, "negatives": [f"not {i} {j}" for j in range(i % 4)]}
        captions = tuple(f"cap {i} {j}" for j in range(1 + i % 4))
        label = None if i % 5 == 0 else f"class {i % 3}"
        samples.append(Sample(f"s{i}", b"rubbish" if i in bad else encoded(picture(i, (20, 24))), captions, label, meta))
    return Memory(samples)


RICH: dict[str, Any] = {"captions_per_image": 3, "num_negatives": 2, "first_caption_prob": 0.5, "negation": True}


def test_rows_carry_what_their_samples_say() -> None:
    source = rich()
    for batch in batches(source, captions_per_image=3, num_negatives=2):
        assert batch.tokens.shape == (8, 3, 16)
        assert batch.text_ids.shape == (8, 3)
        assert batch.negatives is not None
        assert batch.negatives_given is not None
        assert batch.weights is not None
        assert batch.weights.dtype == torch.float32
        assert (batch.negatives.dtype, batch.negatives_given.dtype) == (torch.int64, torch.bool)
        for row, index in enumerate(batch.image_ids.tolist()):
            sample = source.samples[index]
            texts = [text_of(tokens) for tokens in batch.tokens[row]]
            assert set(texts) <= set(sample.captions)
            assert len(set(texts)) == min(3, len(sample.captions)), "different as long as there are so many"
            assert texts == (texts[: len(sample.captions)] * 3)[:3], "then the same again"
            assert batch.weights[row] == index / 2
            given = sample.meta["negatives"]
            assert batch.negatives_given[row].sum() == min(2, len(given))
            wrong = [text_of(t) for t, there in zip(batch.negatives[row], batch.negatives_given[row], strict=True) if there]
            assert set(wrong) <= set(given)
            assert len(set(wrong)) == len(wrong)


def test_label_ids_are_equal_exactly_where_labels_are() -> None:
    source = rich(30)
    batch = torch.cat([b.label_ids for b in batches(source, 8) if b.label_ids is not None])
    places = torch.cat([b.image_ids for b in batches(source, 8)]).tolist()
    for i, j in itertools.combinations(range(len(places)), 2):
        one, other = (source.samples[place].label for place in (places[i], places[j]))
        same = places[i] == places[j] if one is None or other is None else one == other
        assert bool(batch[i] == batch[j]) == same


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 9), st.sampled_from([1, 2, 4]), st.integers(0, 3), st.integers(1, 4), st.integers(0, 3), st.booleans())
def test_memory_ranks_and_resuming_change_nothing(
    step: int, world_size: int, seed: int, captions: int, negatives: int, negation: bool
) -> None:
    options: dict[str, Any] = {
        "seed": seed, "batch_size": 4, "captions_per_image": captions, "num_negatives": negatives,
        "negation": negation and negatives > 0, "first_caption_prob": 0.5,
    }  # fmt: skip
    source = rich(9, bad=(4,))
    whole = batches(source, step + 2, **options)[step:]
    for one, other in zip(whole, batches(source, 2, step, cache_decoded=True, **options), strict=True):
        assert_equal(one, other)
    ranks = [batches(source, 2, step, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    for i, expected in enumerate(whole):
        parts = [found[i] for found in ranks]
        for name in FIELDS:
            value = getattr(expected, name)
            if value is None:
                assert all(getattr(part, name) is None for part in parts)
            else:
                assert torch.equal(value, torch.cat([getattr(part, name) for part in parts])), name


def test_workers_change_nothing() -> None:
    for one, other in zip(batches(rich(), **RICH), batches(rich(), num_workers=2, **RICH), strict=True):
        assert_equal(one, other)


def test_one_caption_is_as_before() -> None:
    """With C = 1 the caption is the one that was always drawn at that position; the first of C is the same."""
    one, three = batches(rich(), captions_per_image=1), batches(rich(), captions_per_image=3)
    for a, b in zip(one, three, strict=True):
        assert a.tokens.shape == (8, 16)
        assert a.text_ids.shape == (8,)
        assert torch.equal(a.tokens, b.tokens[:, 0])
        assert torch.equal(a.text_ids, b.text_ids[:, 0])
        assert a.negatives is None
        assert a.negatives_given is None


def test_a_batch_of_bad_samples_alone_has_no_rows() -> None:
    (batch,) = batches(rich(3, bad=(0, 1, 2)), 1, **RICH)
    assert len(batch) == 0
    assert batch.tokens.shape == (0, 3, 16)
    assert batch.negatives is not None
    assert batch.negatives.shape == (0, 2, 16)
    (kept,) = batches(rich(3, bad=(0, 1, 2)), 1, cache_decoded=True, **RICH)
    assert_equal(batch, kept)


# What is drawn


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=0, max_size=12), st.integers(1, 6), st.integers(0, 99), st.booleans())
def test_choices_are_different_things(counts: list[int], number: int, start: int, with_first: bool) -> None:
    counts_B = np.array(counts, np.int64)
    positions = np.arange(start, start + len(counts))
    first = np.array([max(count - 1, 0) for count in counts], np.int64) if with_first else None
    places = choose(1, CAPTIONS, positions, counts_B, number, first)
    assert places.shape == (len(counts), number)
    for count, row in zip(counts, places.tolist(), strict=True):
        drawn = [place for place in row if place >= 0]
        assert len(drawn) == len(set(drawn)) == min(count, number)
        assert all(place < count for place in drawn)
        assert row == drawn + [-1] * (number - len(drawn))
        assert not with_first or not drawn or drawn[0] == count - 1
    for i in range(len(counts)):  # each row by itself, whatever the others have
        alone = choose(
            1, CAPTIONS, positions[i : i + 1], counts_B[i : i + 1], number, None if first is None else first[i : i + 1]
        )
        assert np.array_equal(alone[0], places[i])


def test_choices_are_even() -> None:
    positions = np.arange(30_000)
    places = choose(3, NEGATIVES, positions, np.full(30_000, 4), 2)
    assert np.allclose(np.bincount(places[:, 0]) / 30_000, 0.25, atol=0.015)
    pairs = Counter(map(tuple, places.tolist()))
    assert len(pairs) == 12
    assert all(abs(count / 30_000 - 1 / 12) < 0.01 for count in pairs.values())
    assert not np.array_equal(places, choose(4, NEGATIVES, positions, np.full(30_000, 4), 2))
    assert not np.array_equal(places, choose(3, CAPTIONS, positions, np.full(30_000, 4), 2))


# Weights


def weighted(*weights: Any) -> Memory:
    image = encoded(picture())
    return Memory([Sample(f"s{i}", image, ("x",), None, {} if w is None else {"weight": w}) for i, w in enumerate(weights)])


def test_weights_are_none_where_no_source_has_any() -> None:
    (batch,) = batches(weighted(None, None), 1)
    assert batch.weights is None
    (batch,) = batches([weighted(None, None), weighted(2.0)], 1, batch_size=3)
    assert batch.weights is not None
    assert sorted(batch.weights.tolist()) == [1, 1, 2]
    (batch,) = batches(weighted(2.0, 3), 1, weights=False)
    assert batch.weights is None
    (batch,) = batches(weighted(None, None), 1, weights=True)
    assert batch.weights is not None
    assert set(batch.weights.tolist()) == {1.0}
    assert not has_weights([weighted(None, 2.0)])


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("weight", [-1, math.nan, math.inf, "heavy", True, [1]])
def test_a_weight_that_is_none_is_an_error(weight: Any, cached: bool) -> None:
    with pytest.raises(ValueError, match=r"s1 has the weight .*finite number, 0 or more.*data\.weights=false"):
        batches(weighted(1.0, weight), 1, cache_decoded=cached)


def test_a_weight_that_comes_late_is_not_passed_over() -> None:
    with pytest.raises(ValueError, match=r"s1 has a weight .*data\.weights=true"):
        batches(weighted(None, 2.0), 1)
    (batch,) = batches(weighted(None, 2.0), 1, weights=True, batch_size=2)
    assert batch.weights is not None
    assert sorted(batch.weights.tolist()) == [1, 2]


# From files


def test_shards_and_tables_bring_weights_and_negatives(tmp_path: Path) -> None:
    about = [{"caption": f"c{i}", "weight": i + 0.5, "negatives": [f"n{i}", f"m{i}"]} for i in range(3)]
    content: list[Any] = []
    lines = ["path,caption,how much,wrong"]
    for i, one in enumerate(about):
        (tmp_path / f"{i}.jpg").write_bytes(encoded(picture(i)))
        content += [(f"{i}.jpg", encoded(picture(i))), (f"{i}.json", json.dumps(one).encode())]
        lines += [f"{i}.jpg,c{i},{i + 0.5},n{i}", f"{i}.jpg,c{i},{i + 0.5},m{i}"]
    write_tar(tmp_path / "a.tar", content)
    (tmp_path / "a.csv").write_text("\n".join(lines))
    rows = [
        {"path": f"{i}.jpg", "caption": f"c{i}", "how much": one["weight"], "wrong": one["negatives"]}
        for i, one in enumerate(about)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = {"weight_column": "how much", "negatives_column": "wrong"}
    for what in (
        tmp_path / "a.tar",
        DataSource(path=tmp_path / "a.csv", **columns),
        DataSource(path=tmp_path / "a.jsonl", **columns),
    ):
        (batch,) = batches(what, 1, batch_size=3, num_negatives=2)
        assert batch.weights is not None
        assert batch.negatives is not None
        for row, index in enumerate(batch.image_ids.tolist()):
            assert batch.weights[row] == index + 0.5
            assert {text_of(one) for one in batch.negatives[row]} == {f"n{index}", f"m{index}"}
    with pytest.raises(ValueError, match="no column 'nope'"):
        open_source(DataSource(path=tmp_path / "a.csv", weight_column="nope"))


def test_negatives_that_are_no_texts_are_a_bad_sample() -> None:
    source = Memory([Sample("a", encoded(picture()), ("x",), None, {"negatives": "no list"}), *rich(1).samples])
    (batch,) = batches(source, 1, batch_size=2, num_negatives=1, weights=False)
    assert [bad.key for bad in batch.bad] == ["a"]
    assert "no list of texts" in batch.bad[0].reason


def test_mined_negatives_and_negations_join_the_given_ones(tmp_path: Path) -> None:
    path = tmp_path / "negatives.jsonl"
    path.write_text('{"text": "a cat", "negatives": ["a dog", "a cat", "given"]}\n{"text": "pet", "negatives": ["a car"]}\n')
    assert NegativesTable(path)("a cat") == ("a dog", "a cat", "given")
    assert NegativesTable(path)("unknown") == ()
    image = encoded(picture())
    source = Memory(
        [Sample("s", image, ("a cat", "pet"), None, {"negatives": ["given", "a cat", " "]}), Sample("t", image, ("dogs run",))]
    )
    options: dict[str, Any] = {"num_negatives": 8, "negatives_table": path, "negation": True, "batch_size": 2}
    for cached in (False, True):
        (batch,) = batches(source, 1, cache_decoded=cached, **options)
        assert batch.negatives is not None
        assert batch.negatives_given is not None
        for row, key in enumerate(batch.keys):
            there = batch.negatives_given[row]
            found = {text_of(one) for one in batch.negatives[row][there]}
            # 16 letters are all that this tokenizer keeps
            expected = {
                "given",
                "a dog",
                "a car",
                "something that is not a cat"[:16],
                "no cat in the picture"[:16],
                "no pet in the picture"[:16],
            }
            assert found == (expected if key == "s" else set())
            assert int(there.sum()) == len(found)
    for wrong, error, words in (
        (tmp_path / "none.parquet", FileNotFoundError, "no such table"),
        (write_tar(tmp_path / "x.tar", []), ValueError, "is no table of negatives"),
    ):
        with pytest.raises(error, match=words):
            NegativesTable(wrong)
    (tmp_path / "b.jsonl").write_text('{"text": "a"}')
    with pytest.raises(ValueError, match="no column 'negatives'"):
        NegativesTable(tmp_path / "b.jsonl")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"captions_per_image": 0}, "captions_per_image"),
        ({"num_negatives": -1}, "num_negatives"),
        ({"negation": True}, "num_negatives, 1 or more"),
        ({"negatives_table": "x.parquet"}, "num_negatives, 1 or more"),
    ],
)
def test_options_out_of_range(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        batches(rich(), 1, **options)
