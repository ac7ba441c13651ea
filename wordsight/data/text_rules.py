"""ALIGN's rules for noisy alt-texts and their pictures (arXiv 2102.05918, section 3.1), as pure functions over captions.

The rules in their order; a text that breaks several counts for the first one. All counts are of the data as given:

    min_side             pictures whose shorter side is below `min_side_px`
    max_aspect           pictures longer than `max_aspect` times their shorter side
    texts_of_picture     pictures with more than `max_texts_per_image` different texts
    pictures_of_text     texts of more than `max_images_per_text` different pictures ("1920x1080", "alt_img")
    rare_token           texts with a unigram or bigram that is not among the `max_ngrams` most frequent ones, or occurs less
                         than `min_ngram_count` times
    too_short, too_long  texts with fewer than `min_unigrams` or more than `max_unigrams` unigrams

How it differs from the paper: what it counts as a unigram is not said there; here it is a lower-cased run of letters, digits and
inner apostrophes, or one character of a script without spaces. The paper wants sides larger than 200 px and aspects smaller than
3; here the bounds themselves are allowed. N-grams as frequent as the last of the `max_ngrams` all count as frequent, so that ties
depend on no order. Small data has fewer than 100 million n-grams, and the rule removes nothing: set `min_ngram_count`. The
paper's filters for unsafe pictures and for duplicates of test pictures are not among these rules. All texts and the counts of all
n-grams are in memory.

Shape legend: N pairs of a picture and a text.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wordsight.data.sources import Source
from wordsight.types import BadSample, Sample

RULES = ("min_side", "max_aspect", "texts_of_picture", "pictures_of_text", "rare_token", "too_short", "too_long")
_UNIGRAM = re.compile(r"[぀-ヿ㐀-鿿豈-﫿]|[^\W_぀-ヿ㐀-鿿豈-﫿]+(?:['’][^\W_]+)*")


@dataclass(frozen=True, kw_only=True)
class TextRules:
    """The bounds; None turns a rule off. The defaults are the paper's.

    Attributes:
        max_images_per_text: pictures that may share a text.
        max_texts_per_image: different texts that a picture may have.
        max_ngrams: how many of the most frequent unigrams and bigrams, together, are no rare tokens.
        min_ngram_count: how often a unigram or bigram must occur not to be rare.
        min_unigrams, max_unigrams: length of a text.
        min_side_px: shorter side of a picture, pixels.
        max_aspect: longer side over shorter side.

    Raises:
        ValueError: a bound below its least meaning.
    """

    max_images_per_text: int | None = 10
    max_texts_per_image: int | None = 1000
    max_ngrams: int | None = 100_000_000
    min_ngram_count: int | None = None
    min_unigrams: int | None = 3
    max_unigrams: int | None = 20
    min_side_px: int | None = 200
    max_aspect: float | None = 3.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name in ("min_unigrams", "min_side_px") else 1
            if value is not None and not value >= least:
                raise ValueError(f"{field.name} must be at least {least}, or none to turn the rule off; got {value}")

    @classmethod
    def parse(cls, text: str) -> TextRules:
        """`align`, or with other bounds: `align,min_ngram_count=3,max_aspect=none`.

        Raises:
            ValueError: another name, an unknown bound or a value that is no number.
        """
        name, *settings = [part.strip() for part in text.split(",")]
        if name != "align":
            raise ValueError(f"there are the text rules of align, not of {name!r}: write align, or align,min_ngram_count=3")
        known = [field.name for field in fields(cls)]
        values: dict[str, Any] = {}
        for setting in settings:
            key, _, value = (part.strip() for part in setting.partition("="))
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
                raise ValueError(f"unknown bound {key!r} of the text rules; {hint}")
            number: Callable[[str], float] = float if key == "max_aspect" else int
            try:
                values[key] = None if value.lower() == "none" else number(value)
            except ValueError:
                raise ValueError(f"{key}={value} of the text rules is no number; none turns the rule off") from None
        return cls(**values)


@dataclass(frozen=True, slots=True)
class RuleResult:
    """What the rules left.

    Attributes:
        kept: bool [N], the pairs that are left.
        removed: rule -> pairs that it removed, in the order of `RULES`; a pair counts for the first rule that it breaks.
        pictures, pictures_kept: how many different pictures there were, and how many have a text left.
    """

    kept: NDArray[np.bool_]
    removed: dict[str, int]
    pictures: int
    pictures_kept: int

    def __str__(self) -> str:
        total, left = len(self.kept), int(self.kept.sum())
        parts = ", ".join(f"{rule} {count:,}" for rule, count in self.removed.items())
        return (
            f"{left:,} of {total:,} texts and {self.pictures_kept:,} of {self.pictures:,} pictures are left; texts removed by "
            f"rule: {parts}"
        )


def unigrams(text: str) -> list[str]:
    """A text's unigrams: lower-cased words and numbers, single characters of scripts without spaces."""
    return _UNIGRAM.findall(text.lower())


def apply_rules(
    texts: Sequence[str],
    picture_ids: Sequence[Hashable] | None = None,
    sizes: Sequence[tuple[int, int] | None] | None = None,
    rules: TextRules = TextRules(),
) -> RuleResult:
    """Which pairs of a picture and a text the rules leave.

    Args:
        texts: N texts.
        picture_ids: N names of the texts' pictures, equal where two texts are of one picture; None: a picture each.
        sizes: N (width, height) of the pictures in pixels, None where it is not known; None: no rule of size applies.
        rules: the bounds.

    Returns:
        `RuleResult`; it does not depend on the order of the pairs.

    Raises:
        ValueError: sequences of different lengths.
    """
    number = len(texts)
    pictures: Sequence[Hashable] = range(number) if picture_ids is None else picture_ids
    if len(pictures) != number or (sizes is not None and len(sizes) != number):
        raise ValueError(
            f"a picture and a size for each text: got {number} texts, {len(pictures)} pictures, {len(sizes or ())} sizes"
        )
    texts = [" ".join(text.split()) for text in texts]
    kept = np.ones(number, dtype=bool)
    removed = dict.fromkeys(RULES, 0)

    def remove(rule: str, broken: Iterator[bool]) -> None:
        breaks = np.fromiter(broken, dtype=bool, count=number) & kept
        removed[rule] = int(breaks.sum())
        kept[breaks] = False

    if sizes is not None and rules.min_side_px is not None:
        remove("min_side", (size is not None and min(size) < rules.min_side_px for size in sizes))
    if sizes is not None and rules.max_aspect is not None:
        remove("max_aspect", (size is not None and max(size) > rules.max_aspect * min(size) for size in sizes))
    if rules.max_texts_per_image is not None:
        texts_of = _partners(pictures, texts)
        remove("texts_of_picture", (texts_of[picture] > rules.max_texts_per_image for picture in pictures))
    if rules.max_images_per_text is not None:
        pictures_of = _partners(texts, pictures)
        remove("pictures_of_text", (pictures_of[text] > rules.max_images_per_text for text in texts))
    grams = [unigrams(text) for text in texts]
    if rules.max_ngrams is not None or rules.min_ngram_count is not None:
        counts = Counter(gram for words in grams for gram in _ngrams(words))
        least = max(_count_of_rank(counts, rules.max_ngrams), rules.min_ngram_count or 0)
        remove("rare_token", (any(counts[gram] < least for gram in _ngrams(words)) for words in grams))
    if rules.min_unigrams is not None:
        remove("too_short", (len(words) < rules.min_unigrams for words in grams))
    if rules.max_unigrams is not None:
        remove("too_long", (len(words) > rules.max_unigrams for words in grams))
    left = {picture for picture, keep in zip(pictures, kept, strict=True) if keep}
    return RuleResult(kept, removed, len(set(pictures)), len(left))


def _partners(owners: Sequence[Hashable], partners: Sequence[Hashable]) -> dict[Hashable, int]:
    """How many different partners each owner has."""
    found: defaultdict[Hashable, set[Hashable]] = defaultdict(set)
    for owner, partner in zip(owners, partners, strict=True):
        found[owner].add(partner)
    return {owner: len(own) for owner, own in found.items()}


def _ngrams(words: Sequence[str]) -> Iterator[str | tuple[str, str]]:
    """A text's unigrams and bigrams."""
    yield from words
    yield from pairwise(words)


def _count_of_rank(counts: Counter[Any], rank: int | None) -> int:
    """The count of the `rank`-th most frequent n-gram; 0 where there are fewer."""
    if rank is None or len(counts) <= rank:
        return 0
    values = np.fromiter(counts.values(), dtype=np.int64, count=len(counts))
    return int(np.partition(values, len(values) - rank)[len(values) - rank])


class RuledSource:
    """What text rules leave of a source: samples with at least one caption left, and with those captions alone.

    A sample that never had a caption has only the rules of size to pass. One that can't be read stays, so that it is named where
    it is used.

    Args:
        source: the samples.
        kept: place in `source` -> the captions that are left.
    """

    def __init__(self, source: Source, kept: dict[int, tuple[str, ...]]) -> None:
        self._source, self._places, self._captions = source, list(kept), list(kept.values())
        self.bad: list[BadSample] = source.bad
        ends = np.cumsum(source.part_sizes)
        below = np.searchsorted(np.array(self._places, np.int64), ends)
        self.part_sizes = np.diff(below, prepend=0).tolist()

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Sample:
        """The sample, not decoded; raises BadSampleError where it can't be read."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return replace(self._source[self._places[index]], captions=self._captions[index])


def rule_source(
    source: Source, rules: TextRules, *, num_workers: int = 0, advance: Callable[[int], object] = lambda count: None
) -> tuple[RuledSource, RuleResult]:
    """Apply the rules to the captions of a source, whose pictures' sizes are taken from their headers.

    Pictures that are the same file count as one picture.

    Args:
        source: the samples.
        rules: the bounds.
        num_workers: processes that read the headers; 0: this one.
        advance: told how many samples were looked at, each time.
    """
    from wordsight.data.inspect import read_facts

    texts: list[str] = []
    pictures: list[bytes] = []
    sizes: list[tuple[int, int]] = []
    owners: list[int] = []
    whole: list[int] = []  # samples that no rule about texts is asked for
    for place, facts in enumerate(read_facts(source, full=False, num_workers=num_workers)):
        advance(1)
        if facts.error is not None or (not facts.captions and _fits(facts.width_px, facts.height_px, rules)):
            whole.append(place)
        for caption in facts.captions:
            texts.append(caption)
            pictures.append(facts.digest)
            sizes.append((facts.width_px, facts.height_px))
            owners.append(place)
    result = apply_rules(texts, pictures, sizes, rules)
    left: dict[int, list[str]] = {place: [] for place in whole}
    for text, owner, keep in zip(texts, owners, result.kept, strict=True):
        if keep:
            left.setdefault(owner, []).append(text)
    return RuledSource(source, {place: tuple(left[place]) for place in sorted(left)}), result


def _fits(width_px: int, height_px: int, rules: TextRules) -> bool:
    """Whether a picture passes the rules of size."""
    side, longer = sorted((width_px, height_px))
    large = rules.min_side_px is None or side >= rules.min_side_px
    return large and (rules.max_aspect is None or longer <= rules.max_aspect * side)
