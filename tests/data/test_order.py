"""The order of training: a pure function of seed and step, each sample once a pass, shares kept in every batch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wordsight.data.order import BatchOrder, PassOrder, sample_rng, sample_uniforms

SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=80).filter(sum)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.sampled_from(["full", "window", "none", "auto"]), st.integers(0, 99))
def test_every_pass_draws_every_sample_once(sizes: list[int], shuffle: str, seed: int) -> None:
    order = PassOrder(sizes, seed=seed, shuffle=shuffle)
    for turn in range(3):
        drawn = order.indices(turn * order.size, (turn + 1) * order.size)
        assert sorted(drawn.tolist()) == list(range(sum(sizes)))


@settings(max_examples=60, deadline=None)
@given(SIZES, st.sampled_from(["full", "window"]), st.lists(st.integers(0, 900), min_size=2, max_size=6))
def test_any_stretch_is_the_same_however_it_is_asked_for(sizes: list[int], shuffle: str, cuts: list[int]) -> None:
    cuts = sorted(cuts)
    whole = PassOrder(sizes, seed=1, shuffle=shuffle).indices(cuts[0], cuts[-1])
    order = PassOrder(sizes, seed=1, shuffle=shuffle)
    parts = [order.indices(start, stop) for start, stop in itertools.pairwise(cuts)]
    assert np.array_equal(np.concatenate(parts), whole)
    assert np.array_equal(order.indices(cuts[0], cuts[-1]), whole)  # and back in time


def test_passes_seeds_and_sources_differ() -> None:
    def first(seed: int, stream: int, turn: int) -> list[int]:
        return PassOrder([100], seed=seed, stream=stream).indices(turn * 100, turn * 100 + 100).tolist()

    orders = [first(0, 0, 0), first(0, 0, 1), first(1, 0, 0), first(0, 1, 0), list(range(100))]
    assert len({tuple(order) for order in orders}) == 5


def test_windows_read_few_parts_at_a_time() -> None:
    order = PassOrder([10] * 200, seed=0, shuffle="window")
    drawn = order.indices(0, 320)
    assert len(set((drawn // 10).tolist())) == 32
    assert len(set((order.indices(0, 32) // 10).tolist())) > 10  # mixed within the window
    assert set((order.indices(2000, 2320) // 10).tolist()) != set((drawn // 10).tolist())


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(0.01, 10), min_size=1, max_size=5),
    st.integers(1, 64),
    st.integers(0, 10_000),
    st.sampled_from(["epoch", "replacement"]),
)
def test_every_batch_keeps_the_shares(weights: list[float], batch_size: int, first_step: int, sampling: str) -> None:
    sizes = [[7 + i] for i in range(len(weights))]
    order = BatchOrder(sizes, weights=weights, batch_size=batch_size, seed=3, sampling=sampling, shuffle="auto")
    ends = np.cumsum([size[0] for size in sizes])
    total = np.zeros(len(weights))
    for step in range(first_step, first_step + 5):
        rows = order.rows(step)
        assert len(rows) == batch_size
        counts = np.bincount(np.searchsorted(ends, rows, side="right"), minlength=len(weights))
        total += counts
        assert np.all(np.abs(counts - batch_size * np.array(weights) / sum(weights)) <= len(weights))
    assert np.all(np.abs(total - 5 * batch_size * np.array(weights) / sum(weights)) <= len(weights))


def test_a_tenth_of_each_batch() -> None:
    order = BatchOrder([[1000], [50]], weights=[0.9, 0.1], batch_size=100, seed=0, sampling="epoch", shuffle="auto")
    rows = np.stack([order.rows(step) for step in range(5)])
    assert np.all((rows >= 1000).sum(axis=1) == 10)
    assert sorted(rows[rows >= 1000].tolist()) == list(range(1000, 1050))  # its own pass is over after 5 steps
    assert len(set(rows[rows < 1000].tolist())) == 450  # while the other one's goes on
    assert (rows[:, :50] >= 1000).any()
    assert (rows[:, 50:] >= 1000).any()  # mixed over the batch


def test_with_replacement_every_sample_is_as_likely() -> None:
    order = BatchOrder([[20], [30]], weights=None, batch_size=500, seed=0, sampling="replacement", shuffle="auto")
    counts = np.bincount(np.concatenate([order.rows(step) for step in range(40)]), minlength=50)
    assert counts.sum() == 20_000
    chi2 = ((counts - 400) ** 2 / 400).sum()
    assert 20 < chi2 < 90, chi2  # 49 degrees of freedom


def test_rows_have_random_numbers_of_their_own() -> None:
    draws = {sample_rng(seed, position).integers(2**62) for seed in range(3) for position in range(100)}
    assert len(draws) == 300
    assert sample_rng(1, 2**40).random() == sample_rng(1, 2**40).random()


def test_uniforms_are_uniform_and_independent() -> None:
    values = sample_uniforms(1, np.arange(20_000))
    assert values.min() >= 0
    assert values.max() < 1
    assert abs(values.mean() - 0.5) < 0.01
    assert abs(values.std() - 12**-0.5) < 0.01
    for one, other in ((values[:, 0], values[:, 1]), (values[1:, 0], values[:-1, 0]), (values[1:, 0], values[:-1, 1])):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.03
    assert abs(np.corrcoef(values[:, 0], sample_uniforms(2, np.arange(20_000))[:, 0])[0, 1]) < 0.03
    assert np.array_equal(sample_uniforms(1, np.arange(7, 9)), values[7:9])


def test_a_long_run_needs_no_more_memory_than_two_passes() -> None:
    order = PassOrder([100], seed=0)
    for turn in range(50):
        order.indices(turn * 100, turn * 100 + 150)
    assert len(order._kept) == 2


@pytest.mark.parametrize("step", [0, 10**9])
def test_far_steps_cost_nothing(step: int) -> None:
    order = BatchOrder([[1000]], weights=None, batch_size=256, seed=0, sampling="epoch", shuffle="auto")
    assert len(order.rows(step)) == 256
