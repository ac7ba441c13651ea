"""What does not fit: processes, shards, batches, sources. Each is handled exactly or a clear error; none hangs."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.make import members, write_shards, write_tar
from tests.data.test_loader import Memory, make, memory, take
from wordsight.data import DataSource
from wordsight.data.order import BatchOrder
from wordsight.data.transform import Preprocess


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("world_size", "workers"), [(3, 0), (3, 2), (5, 0), (8, 0)])
def test_any_number_of_processes_fits_any_number_of_shards(tmp_path: Path, world_size: int, workers: int) -> None:
    """Two shards, more processes and workers: every sample of a pass is drawn exactly once over all of them."""
    write_shards(tmp_path, [7, 5])
    options: dict[str, Any] = {"batch_size": world_size * 2, "transform": Preprocess(8), "num_workers": workers}
    steps = 12
    ranks = [take(make(tmp_path, rank=rank, world_size=world_size, **options), steps) for rank in range(world_size)]
    ids = [i for step in range(steps) for batches in ranks for i in batches[step].image_ids.tolist()]
    assert len(ids) == steps * world_size * 2
    for turn in range(len(ids) // 12):
        assert sorted(ids[turn * 12 : turn * 12 + 12]) == list(range(12))


def test_a_batch_that_does_not_divide_says_what_would() -> None:
    for batch_size, world_size, would in ((9, 2, 8), (10, 4, 8), (1, 3, 3), (11, 4, 12)):
        with pytest.raises(ValueError, match=rf"multiple of the {world_size} processes, got {batch_size}: {would} would do"):
            make([memory(3)], batch_size=batch_size, world_size=world_size)
    with pytest.raises(ValueError, match="world_size is the number of processes"):
        make([memory(3)], world_size=0)


def test_a_batch_larger_than_the_data_goes_round() -> None:
    (batch,) = take(make([memory(3)], batch_size=10), 1)
    assert sorted(np.bincount(batch.image_ids).tolist()) == [3, 3, 4]


def test_sources_without_samples_are_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", members(3))
    write_tar(tmp_path / "empty.tar", [])
    (tmp_path / "folder").mkdir()
    for sources, words in (
        ([str(tmp_path / "a.tar"), str(tmp_path / "empty.tar")], r"no sample in .*empty\.tar"),
        ([str(tmp_path / "folder")], r"no sample in .*folder"),
        ([DataSource(path=tmp_path / "a.tar", weight=1.0), DataSource(path=tmp_path / "empty.tar", weight=1.0)], "empty.tar"),
        ([Memory([]), memory(3)], "source 1 holds no sample"),
        ([], "no source"),
    ):
        with pytest.raises(ValueError, match=words):
            make(sources)


def test_an_empty_shard_among_others_is_no_matter(tmp_path: Path) -> None:
    write_shards(tmp_path, [3, 2])
    write_tar(tmp_path / "0005.tar", [])
    (batch,) = take(make(tmp_path, batch_size=5), 1)
    assert sorted(batch.image_ids.tolist()) == list(range(5))


# Rows of each source


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=3).filter(sum), min_size=1, max_size=4),
    st.sampled_from([None, "weights"]),
    st.sampled_from(["epoch", "replacement"]),
    st.sampled_from(["full", "window", "none"]),
    st.integers(1, 9),
    st.lists(st.integers(0, 30), min_size=1, max_size=4),
)
def test_counts_are_those_of_the_rows(
    part_sizes: list[list[int]], weighted: str | None, sampling: Any, shuffle: Any, batch_size: int, steps: list[int]
) -> None:
    weights = [1.0 + i for i in range(len(part_sizes))] if weighted else None
    options: dict[str, Any] = {"weights": weights, "batch_size": batch_size, "seed": 1, "sampling": sampling, "shuffle": shuffle}
    ends = np.cumsum([sum(sizes) for sizes in part_sizes])
    order, counting = (BatchOrder(part_sizes, **options) for _ in range(2))
    rows = [order.rows(step) for step in range(max(steps) + 1)]
    for step in steps:  # asked for in any order, also backwards
        drawn = np.concatenate([*rows[:step], np.empty(0, np.int64)])
        expected = np.bincount(np.searchsorted(ends, drawn, side="right"), minlength=len(ends))
        assert counting.counts(step).tolist() == expected.tolist()


def test_the_loader_names_its_sources(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", members(30))
    write_tar(tmp_path / "b.tar", members(3, first=30))
    a, b = str(tmp_path / "a.tar"), str(tmp_path / "b.tar")
    loader = make([DataSource(path=a, weight=0.9), DataSource(path=b, weight=0.1, name="few")], batch_size=20)
    assert loader.seen(4) == {a: 72, "few": 8}
    assert make([a, a, memory(2)], batch_size=1).source_names == [a, f"{a} (2)", "source 3"]
    assert make([DataSource(path=[a, b, b])], batch_size=2).source_names == [f"{a},{b} and 1 more"]
    assert make([a], batch_size=4).seen(3) == {a: 12}


def test_bad_rows_are_seen_too() -> None:
    loader = make([memory(4, bad=[0, 1]), memory(4)], batch_size=8, max_bad_share=1.0)
    batches = list(itertools.islice(loader.batches(), 2))
    assert sum(map(len, batches)) == 12
    assert loader.seen(2) == {"source 1": 8, "source 2": 8}
    assert torch.equal(batches[0].text_ids, next(loader.batches()).text_ids)
