"""Which sample is drawn when: pure functions of (seed, step), so that resuming is arithmetic.

Shape legend: B rows of a global batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Shuffle = Literal["auto", "full", "window", "none"]
Sampling = Literal["epoch", "replacement"]

FULL_SHUFFLE_MAX = 1 << 22  # a permutation of so many samples takes 32 MB and a part of a second
WINDOW_PARTS = 32

_PASS, _WINDOW, _DRAW, _MIX, _ROW, _CAPTION, CAPTIONS, NEGATIVES = range(8)  # what a stream of random numbers is for


def _rng(seed: int, *stream: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=stream))


class PassOrder:
    """Draws without replacement: pass after pass over the samples, each in its own order.

    "full" permutes all samples. "window" permutes the parts (shards), then the samples within each run of `WINDOW_PARTS`
    parts, so that reading stays in few files and memory small; it mixes less. "auto" is full up to `FULL_SHUFFLE_MAX` samples.

    Args:
        part_sizes: the numbers of samples in consecutive parts.
        seed: of the orders.
        stream: tells apart several such orders of one seed.
        shuffle: see above; "none" keeps the order of the source.
    """

    def __init__(self, part_sizes: Sequence[int], *, seed: int, stream: int = 0, shuffle: Shuffle = "auto") -> None:
        self._sizes = np.asarray(part_sizes, dtype=np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self.size = int(self._sizes.sum())
        self._seed = seed
        self._stream = stream
        self._shuffle = ("full" if self.size <= FULL_SHUFFLE_MAX else "window") if shuffle == "auto" else shuffle
        self._kept: dict[tuple[int, int], NDArray[np.int64]] = {}

    def indices(self, start: int, stop: int) -> NDArray[np.int64]:
        """The samples at positions `start` to `stop` of the endless sequence of passes."""
        found = []
        while start < stop:
            turn, at = divmod(start, self.size)
            end = min(self.size, at + stop - start)
            found.append(self._within(turn, at, end))
            start += end - at
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def _within(self, turn: int, start: int, stop: int) -> NDArray[np.int64]:
        if self._shuffle == "none":
            return np.arange(start, stop)
        if self._shuffle == "full":
            return self._window(turn, 0, np.arange(len(self._sizes)))[start:stop]
        parts = _rng(self._seed, _PASS, self._stream, turn).permutation(len(self._sizes))
        window_of = np.arange(len(parts)) // WINDOW_PARTS
        ends = np.cumsum(np.bincount(window_of, weights=self._sizes[parts]).astype(np.int64))
        found = []
        for window in range(int(np.searchsorted(ends, start, side="right")), len(ends)):
            begin = int(ends[window - 1]) if window else 0
            if begin >= stop:
                break
            order = self._window(turn, window, parts[window_of == window])
            found.append(order[max(0, start - begin) : stop - begin])
        return np.concatenate(found)

    def _window(self, turn: int, window: int, parts: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples of some parts, permuted; the last two windows are kept."""
        name = (turn, window)
        if name not in self._kept:
            samples = np.concatenate([np.arange(self._starts[part], self._starts[part] + self._sizes[part]) for part in parts])
            _rng(self._seed, _WINDOW, self._stream, turn, window).shuffle(samples)
            if len(self._kept) >= 2:
                del self._kept[next(iter(self._kept))]
            self._kept[name] = samples
        return self._kept[name]


class BatchOrder:
    """The rows of the global batch of every step.

    Each source has a share of the draws: of the first P rows, the first source gets floor(P w_1 / (w_1 + ... + w_n)), the second
    its share of the rest, and so on. So all batches together keep the shares to less than one row for each source, and so does
    nearly every single batch (0.9 and 0.1 of 100 are 90 and 10 in each). Rows of different sources are mixed within the batch.

    Args:
        part_sizes: for each source, the numbers of samples in its parts.
        weights: each source's share relative to the others; None treats all sources as one.
        batch_size: B, rows of a global batch.
        seed: of every draw.
        sampling: "epoch" goes through each source in passes, "replacement" draws each row independently.
        shuffle: the order of a pass, see `PassOrder`.
    """

    def __init__(
        self,
        part_sizes: Sequence[Sequence[int]],
        *,
        weights: Sequence[float] | None,
        batch_size: int,
        seed: int,
        sampling: Sampling,
        shuffle: Shuffle,
    ) -> None:
        groups = [[size for sizes in part_sizes for size in sizes]] if weights is None else [list(sizes) for sizes in part_sizes]
        parts = [Fraction(1)] if weights is None else [Fraction(str(float(weight))) for weight in weights]
        self._shares = [part / sum(parts[i:]) for i, part in enumerate(parts)]  # of what the sources before leave
        self._passes = [PassOrder(sizes, seed=seed, stream=i, shuffle=shuffle) for i, sizes in enumerate(groups)]
        self._firsts = np.cumsum([0] + [one.size for one in self._passes])
        self._batch_size = batch_size
        self._seed = seed
        self._sampling = sampling
        self._source_ends = np.cumsum([sum(sizes) for sizes in part_sizes])
        self._counted = 0, np.zeros(len(part_sizes), np.int64)  # steps, rows of each source in them

    def counts(self, step: int) -> NDArray[np.int64]:
        """Rows of each source among all batches before `step`.

        A step after the one asked for last costs what its batches cost to draw; the first one asked for after a resume, with
        several sources without weights, a pass (or with replacement, all draws before it).

        Returns:
            [number of sources], whose sum is step * batch_size.
        """
        number = len(self._source_ends)
        if number == 1:
            return np.array([step * self._batch_size])
        if len(self._passes) == number:  # each has its share
            return np.array(self._drawn(step * self._batch_size))
        counted, counts = self._counted if step >= self._counted[0] else (0, np.zeros(number, np.int64))
        if self._sampling == "replacement":
            for one in range(counted, step):
                counts = counts + self._by_source(self.rows(one))
        elif step > counted:
            start, stop = counted * self._batch_size, step * self._batch_size
            size = self._passes[0].size
            whole = stop // size - -(-start // size)  # passes that begin and end in between
            if whole > 0:
                middle = -(-start // size) * size
                counts = counts + self._by_source(self._passes[0].indices(start, middle))
                counts = counts + whole * np.diff(self._source_ends, prepend=0)
                start = middle + whole * size
            counts = counts + self._by_source(self._passes[0].indices(start, stop))
        self._counted = step, counts
        return counts

    def _by_source(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many of some samples lie in each source."""
        below = np.array([np.count_nonzero(rows < end) for end in self._source_ends])
        return np.diff(below, prepend=0)

    def _drawn(self, position: int) -> list[int]:
        """How many of the first `position` rows come from each source: whole numbers that never fall."""
        counts = []
        for share in self._shares:
            counts.append(position * share.numerator // share.denominator)
            position -= counts[-1]
        return counts

    def rows(self, step: int) -> NDArray[np.int64]:
        """The B samples of a step, as indices into the sources one after the other."""
        starts, stops = self._drawn(step * self._batch_size), self._drawn((step + 1) * self._batch_size)
        rng = _rng(self._seed, _DRAW, step)
        found = []
        for order, first, start, stop in zip(self._passes, self._firsts[:-1], starts, stops, strict=True):
            if self._sampling == "replacement":
                found.append(first + rng.integers(order.size, size=stop - start))
            else:
                found.append(first + order.indices(start, stop))
        rows = np.concatenate(found)
        return rows if len(found) == 1 else _rng(self._seed, _MIX, step).permutation(rows)


def sample_rng(seed: int, position: int) -> np.random.Generator:
    """The random numbers of the row drawn at `position` (step * B + row) of training: of its crop and flip."""
    return _rng(seed, _ROW, position)


def sample_uniforms(seed: int, positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """Two numbers in [0, 1) for each row of training: of its caption. A hash (SplitMix64): a generator takes 30 us to seed.

    Args:
        seed: of the training.
        positions: [B] positions, step * B + row.

    Returns:
        [B, 2].
    """
    counters_B2 = np.uint64(2) * positions.astype(np.uint64)[:, None] + np.arange(2, dtype=np.uint64)
    hashed_B2 = _splitmix(np.uint64(_rng(seed, _CAPTION).integers(2**63)), counters_B2)
    return (hashed_B2 >> np.uint64(11)).astype(np.float64) * 2.0**-53


def choose(
    seed: int,
    stream: int,
    positions: NDArray[np.int64],
    counts: NDArray[np.int64],
    number: int,
    first: NDArray[np.int64] | None = None,
) -> NDArray[np.int64]:
    """Some of each row's things, drawn evenly without repetition, as far as it has so many.

    Args:
        seed: of the training.
        stream: what is drawn, `CAPTIONS` or `NEGATIVES`.
        positions: [B] positions, step * B + row.
        counts: [B] how many things each row has.
        number: how many are drawn.
        first: [B] the thing that is drawn first; None: any.

    Returns:
        [B, number] places from 0 to count - 1; -1 beyond a row's things.
    """
    most = max(int(counts.max(initial=0)), number)
    base_B1 = _splitmix(np.uint64(_rng(seed, stream).integers(2**63)), positions.astype(np.uint64))[:, None]
    keys_BM = _splitmix(base_B1, np.arange(most, dtype=np.uint64)[None, :]) >> np.uint64(1)
    things = np.arange(most)
    if first is not None:
        keys_BM[things[None, :] == first[:, None]] = 0
    absent_BM = things[None, :] >= counts[:, None]
    keys_BM[absent_BM] = np.uint64(2**64 - 1)
    places_BK = np.argsort(keys_BM, axis=1, kind="stable")[:, :number]
    places_BK[np.arange(number)[None, :] >= counts[:, None]] = -1
    return places_BK


def _splitmix(first: Any, counters: Any) -> NDArray[np.uint64]:
    """64 random bits for each counter of a stream that begins at `first` (SplitMix64)."""
    z: NDArray[Any] = first + counters * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)), np.uint64)
