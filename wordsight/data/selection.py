"""Some samples of a source as a source of their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from wordsight.data.sources import Source
from wordsight.types import BadSample, Sample


class Selection:
    """The samples of `source` at `positions`, in that order.

    Attributes:
        bad: none; what was found damaged while `source` was indexed stays with it.
        sources: `source` itself.
    """

    def __init__(self, source: Source, positions: Sequence[int]) -> None:
        self.sources = [source]
        self.positions = positions
        self.bad: list[BadSample] = []
        self.part_sizes = [len(positions)]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Sample:
        """The sample, not decoded; raises BadSampleError where it can't be read."""
        return self.sources[0][self.positions[index]]

    def ahead(self, indices: Iterable[int]) -> None:
        """Announce samples that will be asked for soon, to a source that reads ahead."""
        ahead = getattr(self.sources[0], "ahead", None)
        if ahead is not None:
            ahead([self.positions[index] for index in indices])
