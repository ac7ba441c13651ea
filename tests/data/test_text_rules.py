"""ALIGN's text rules: each bound, what each removes, counts that sum up, and shards without what they remove."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.make import encoded, picture
from wordsight.cli.main import cli
from wordsight.data import BadSampleError, open_source
from wordsight.data.text_rules import RULES, RuledSource, TextRules, apply_rules, rule_source, unigrams

OFF = {name: None for name in TextRules.__dataclass_fields__}


def only(**bounds: Any) -> TextRules:
    return TextRules(**{**OFF, **bounds})


def test_the_defaults_are_the_papers() -> None:
    rules = TextRules()
    assert (rules.max_images_per_text, rules.max_texts_per_image, rules.max_ngrams) == (10, 1000, 100_000_000)
    assert (rules.min_unigrams, rules.max_unigrams, rules.min_side_px, rules.max_aspect) == (3, 20, 200, 3.0)


def test_unigrams() -> None:
    assert unigrams("A man's DOG, 2 cats_and-a bird!") == ["a", "man's", "dog", "2", "cats", "and", "a", "bird"]
    assert unigrams("ein Grüße-Zug") == ["ein", "grüße", "zug"]
    assert unigrams("猫と犬 cat") == ["猫", "と", "犬", "cat"]
    assert unigrams("... --- !!!") == []


def test_length() -> None:
    texts = [" ".join("abcdefghijklmnopqrstuvwxy"[:length]) for length in (1, 2, 3, 20, 21)]
    result = apply_rules(texts, rules=only(min_unigrams=3, max_unigrams=20))
    assert result.kept.tolist() == [False, False, True, True, False]
    assert (result.removed["too_short"], result.removed["too_long"]) == (2, 1)


@pytest.mark.parametrize(("number", "kept"), [(10, True), (11, False)])
def test_texts_of_many_pictures(number: int, kept: bool) -> None:
    texts = ["the same  old text"] * number + ["the same old text"] + ["another text alone"]
    pictures = [*range(number), 0, 99]  # picture 0 says it twice, in other white space: that is one picture
    result = apply_rules(texts, pictures, rules=only(max_images_per_text=10))
    assert result.kept.tolist() == [kept] * (number + 1) + [True]
    assert result.removed["pictures_of_text"] == (0 if kept else number + 1)
    assert result.pictures_kept == (number + 1 if kept else 1)


@pytest.mark.parametrize(("number", "kept"), [(1000, True), (1001, False)])
def test_pictures_with_many_texts(number: int, kept: bool) -> None:
    result = apply_rules(
        [f"text number {i}" for i in range(number)] + ["text number 5"] * 3,
        ["a"] * (number + 3),
        rules=only(max_texts_per_image=1000),
    )
    assert result.kept.all() == kept
    assert result.removed["texts_of_picture"] == (0 if kept else number + 3)


def test_sizes() -> None:
    sizes = [(200, 600), (199, 199), (200, 601), (601, 200), (600, 200), (0, 0), None]
    result = apply_rules(["x"] * 7, range(7), sizes, only(min_side_px=200, max_aspect=3.0))
    assert result.kept.tolist() == [True, False, False, False, True, False, True]
    assert (result.removed["min_side"], result.removed["max_aspect"]) == (2, 2)
    assert apply_rules(["x"] * 7, range(7), None, only(min_side_px=200)).kept.all()


def test_rare_tokens_by_rank_and_by_count() -> None:
    texts = ["a red cat", "a red cat", "a red dog", "red a cat"]
    # a 4, red 4, cat 3, "a red" 3, "red cat" 2, and once each: dog, "red dog", "red a", "a cat"
    for rules, kept in (
        (only(max_ngrams=5), [True, True, False, False]),
        (only(max_ngrams=6), [True, True, True, True]),  # the sixth is one of four that occur once: ties stay together
        (only(max_ngrams=4), [False, False, False, False]),
        (only(max_ngrams=9), [True] * 4),
        (only(min_ngram_count=2), [True, True, False, False]),
        (only(min_ngram_count=3), [False] * 4),
        (only(min_ngram_count=2, max_ngrams=9), [True, True, False, False]),
    ):
        result = apply_rules(texts, rules=rules)
        assert result.kept.tolist() == kept, rules
        assert result.removed["rare_token"] == 4 - sum(kept)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.sampled_from("abcde"), max_size=5),
            st.integers(0, 5),
            st.tuples(st.integers(1, 5), st.integers(1, 5)),
        ),
        max_size=30,
    ),
    st.randoms(use_true_random=False),
)
def test_counts_sum_up_and_order_does_not_matter(pairs: list[Any], random: Any) -> None:
    rules = TextRules(
        max_images_per_text=2, max_texts_per_image=3, max_ngrams=6, min_ngram_count=2, min_unigrams=1, max_unigrams=3
    )
    rules = replace(rules, min_side_px=2, max_aspect=2.0)
    columns = [[" ".join(words) for words, _, _ in pairs], [one for _, one, _ in pairs], [size for _, _, size in pairs]]
    result = apply_rules(*columns, rules)
    assert list(result.removed) == list(RULES)
    assert result.kept.sum() + sum(result.removed.values()) == len(pairs)
    assert f"{int(result.kept.sum())} of {len(pairs)} texts" in str(result)
    order = list(range(len(pairs)))
    random.shuffle(order)
    shuffled = apply_rules(*([column[i] for i in order] for column in columns), rules)
    assert shuffled.kept.tolist() == [bool(result.kept[i]) for i in order]
    assert shuffled.removed == result.removed


def test_rules_as_written() -> None:
    assert TextRules.parse("align") == TextRules()
    assert TextRules.parse("align, min_ngram_count=3,max_aspect=none") == TextRules(min_ngram_count=3, max_aspect=None)
    for text, words in (
        ("laion", "write align"),
        ("align,min_ngrams_count=3", "did you mean min_ngram_count"),
        ("align,max_unigrams=many", "is no number"),
        ("align,max_unigrams=0", "at least 1"),
        ("align,max_aspect", "is no number"),
    ):
        with pytest.raises(ValueError, match=words):
            TextRules.parse(text)
    with pytest.raises(ValueError, match="3 texts, 2 pictures"):
        apply_rules(["a"] * 3, [1, 2])


@pytest.fixture
def noisy(tmp_path: Path) -> Path:
    """A table: 12 pictures with the text "click to enlarge", good texts for some, one picture small, one long, one damaged."""
    lines = ["path,caption,label"]
    for i in range(12):
        size = {9: (100, 300), 10: (900, 220)}.get(i, (240, 210))
        (tmp_path / f"{i:02}.jpg").write_bytes(b"damaged" if i == 11 else encoded(picture(i, size)))
        lines.append(f"{i:02}.jpg,click to enlarge,")
        if i % 2 == 0:
            lines.append(f"{i:02}.jpg,a good text about picture {'abcdefghijkl'[i]},")
    (tmp_path / "12.jpg").write_bytes(encoded(picture(12, (240, 210))))
    (tmp_path / "13.jpg").write_bytes(encoded(picture(13, (50, 50))))
    lines += ["12.jpg,,cat", "13.jpg,,cat"]
    (tmp_path / "noisy.csv").write_text("\n".join(lines))
    return tmp_path / "noisy.csv"


def test_a_source_without_what_the_rules_remove(noisy: Path) -> None:
    source, result = rule_source(open_source(noisy), TextRules(max_images_per_text=8))
    assert result.removed == dict.fromkeys(RULES, 0) | {"min_side": 1, "max_aspect": 2, "pictures_of_text": 9}
    keys = {}
    for i in range(len(source)):
        try:
            keys[source[i].key] = source[i].captions
        except BadSampleError as error:  # it has been read up to its bytes
            raise AssertionError(error) from error
    good = {f"{i:02}.jpg": (f"a good text about picture {'abcdefghijkl'[i]}",) for i in (0, 2, 4, 6, 8)}
    assert {key: texts for key, texts in keys.items() if key not in ("11.jpg", "12.jpg")} == good
    assert keys["12.jpg"] == ()  # it has a label, and no caption that a rule could speak of
    assert "13.jpg" not in keys
    assert sum(source.part_sizes) == len(source)
    with pytest.raises(IndexError):
        source[len(source)]


def test_parts_of_a_ruled_source() -> None:
    class Three:
        bad: list[Any] = []  # noqa: RUF012
        part_sizes = [2, 3, 4]  # noqa: RUF012

    assert RuledSource(Three(), {0: (), 2: (), 3: (), 8: ()}).part_sizes == [1, 2, 1]  # type: ignore[arg-type]


def test_build_applies_and_reports_them(noisy: Path, tmp_path: Path) -> None:
    def run(*arguments: Any) -> Any:
        return CliRunner().invoke(cli, ["data", "build", str(noisy), *map(str, arguments)], standalone_mode=False)

    result = run("--out", tmp_path / "s", "--text-rules", "align,max_images_per_text=8", "--max-bad-share", "0.2", "--json")
    found = json.loads(result.stdout)
    assert found["samples"] == 6
    assert found["text_rules"]["texts"] == 17  # the damaged picture's is not asked
    assert found["text_rules"]["texts_kept"] == 5
    assert found["text_rules"]["removed"]["pictures_of_text"] == 9
    built = open_source(tmp_path / "s")
    assert all("click to enlarge" not in built[i].captions for i in range(len(built)))
    shown = run("--out", tmp_path / "t", "--text-rules", "align,max_images_per_text=8", "--max-bad-share", "0.2")
    assert "5 of 17 texts" in shown.stderr
    (noisy.parent / "11.jpg").write_bytes(encoded(picture(11)))
    assert "leave nothing" in str(run("--out", tmp_path / "u", "--text-rules", "align,min_side_px=5000").exception)
    assert "did you mean" in str(run("--out", tmp_path / "v", "--text-rules", "align,max_aspects=2").exception)
