"""What can be wrong with data: one bad sample, or too many of them."""

from __future__ import annotations

from collections.abc import Iterable

from wordsight.types import BadSample


class BadSampleError(Exception):
    """One sample can't be read; the loader skips it, counts it and names it.

    Args:
        key: the sample's name.
        reason: why it could not be read, in words for a user.
    """

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(key, reason)
        self.key = key
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"

    @property
    def record(self) -> BadSample:
        """The same as a record that can be collected."""
        return BadSample(self.key, self.reason)


class TooManyBadSamplesError(ValueError):
    """More samples were bad than the user allowed."""


class BadReport:
    """Counts samples drawn and bad ones, keeps the names, and raises once too many are bad.

    Too many are bad as soon as more than `max_share` of all `total` samples are known to be bad, or the share among those drawn
    is above `max_share` by more than chance explains (three standard deviations). A bad sample that is drawn again (a later
    epoch) counts again in `count` but is named once.

    Args:
        max_share: the highest tolerable share of bad samples, in [0, 1].
        total: the number of samples in the sources.
        known: what the sources reported while they were indexed (a shard that ends early, a link in it); it is named, but is not
            a sample drawn.
    """

    MAX_NAMED = 10_000  # names kept; the counts go on

    def __init__(self, max_share: float = 0.05, *, total: int, known: Iterable[BadSample] = ()) -> None:
        if not 0 <= max_share <= 1:
            raise ValueError(f"max_bad_share is a share of the samples, from 0 to 1, got {max_share}")
        self.max_share = max_share
        self.total = total
        self.drawn = 0
        self.count = 0
        self._known = list(known)
        self._named: dict[str, BadSample] = {}

    @property
    def samples(self) -> list[BadSample]:
        """What the sources reported, then the bad samples drawn so far, each once, in order of appearance."""
        return [*self._known, *self._named.values()]

    def add(self, drawn: int, bad: Iterable[BadSample]) -> None:
        """Count `drawn` samples, the `bad` ones among them.

        Raises:
            TooManyBadSamplesError: more than `max_share` of the samples drawn were bad; it lists the first ten.
        """
        self.drawn += drawn
        found = list(bad)
        self.count += len(found)
        for one in found:
            if len(self._named) < self.MAX_NAMED:
                self._named.setdefault(one.key, one)
        expected = self.max_share * self.drawn
        if found and (len(self._named) > self.max_share * self.total or self.count > expected + 3 * expected**0.5):
            first = "".join(f"\n  {one.key}: {one.reason}" for one in list(self._named.values())[:10])
            raise TooManyBadSamplesError(
                f"{self.count} of {self.drawn} samples drawn could not be read ({len(self._named)} different ones of "
                f"{self.total}), more than max_bad_share={self.max_share:g} allows. The first ones:{first}\n"
                "Mend or remove them, or raise max_bad_share."
            )

    def __len__(self) -> int:
        return len(self._known) + len(self._named)

    def __str__(self) -> str:
        lines = [f"{self.drawn} samples drawn, {self.count} of them bad ({len(self._named)} different ones)"]
        return "\n".join(lines + [f"  {one.key}: {one.reason}" for one in self.samples])
