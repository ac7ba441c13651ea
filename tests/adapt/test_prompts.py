"""Where everything stands in a prompt, beside the published construction; names as they come; every tokenizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.adapt.towers import NAMES, WORDS
from wordsight.adapt.prompts import POSITIONS, context_words, lay_out
from wordsight.data.sentencepiece import train_sentencepiece
from wordsight.data.tokenize import ClipTokenizer
from wordsight.data.wordpiece import train_wordpiece

CLIP = ClipTokenizer.clip()
WORDPIECE = train_wordpiece([" ".join(WORDS)], 90, context_length=40)
SENTENCEPIECE = train_sentencepiece([" ".join(WORDS)], 30, context_length=40)
BRACKETS = ["sea lion", "car (toy)", "dog (plush) (blue)"]


def published(names: list[str], num_context: int, position: str) -> torch.Tensor:
    """CoOp's construction for a unified context on token ids, whose context is -1, -2, ..."""
    names = [name.replace("_", " ") for name in names]
    tokens = CLIP([" ".join(["X"] * num_context) + " " + name + "." for name in names])
    name_lengths = [len(CLIP.encode(name)) for name in names]
    context = -1 - torch.arange(num_context)
    half = num_context // 2
    rows = []
    for row, length in zip(tokens, name_lengths, strict=True):
        prefix, suffix = row[:1], row[1 + num_context :]
        name, rest = suffix[:length], suffix[length:]
        rows.append(
            torch.cat(
                {
                    "end": [prefix, context, suffix],
                    "middle": [prefix, context[:half], name, context[half:], rest],
                    "front": [prefix, name, context, rest],
                }[position]
            )
        )
    return torch.stack(rows)


def written_out(names: list[str], tokenizer: Any = CLIP, **options: Any) -> torch.Tensor:
    """The layout's prompts as token ids, context as -1, -2, ..."""
    layout = lay_out(tokenizer, names, **options)
    num_tokens = len(layout.token_ids)
    table = torch.cat([layout.token_ids, -1 - torch.arange(layout.num_context_tokens)])
    assert (layout.rows < num_tokens + layout.num_context_tokens).all()
    return table[layout.rows]


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("num_context", [1, 4, 5, 16])
def test_prompts_are_the_published_ones(position: str, num_context: int) -> None:
    found = written_out(NAMES, num_context_tokens=num_context, position=position)
    assert torch.equal(found, published(NAMES, num_context, position))


@pytest.mark.parametrize("position", POSITIONS)
def test_a_bracket_and_the_stop_are_two_tokens_and_published_one(position: str) -> None:
    options = {"num_context_tokens": 3, "position": position}
    as_published = written_out(BRACKETS, published_tokens=True, **options)
    assert torch.equal(as_published, published(BRACKETS, 3, position))
    rightly = written_out(BRACKETS, **options)
    both, bracket, stop = CLIP.encode(").")[0], CLIP.encode(")")[0], CLIP.encode(".")[0]
    assert len(CLIP.encode(").")) == 1
    assert (as_published[1:] == both).sum(1).tolist() == [1, 1]
    assert (rightly == both).sum() == 0
    assert (rightly == bracket).sum(1).tolist() == [0, 1, 2]
    assert (rightly == stop).sum(1).tolist() == [1, 1, 1]
    # the stop stands before the end, whatever the position
    end_N = rightly.argmax(1)
    assert (rightly[torch.arange(3), end_N - 1] == stop).all()


def test_lengths_shared_tokens_and_rows_of_each_class() -> None:
    for position, shared in (("end", 6), ("middle", 3), ("front", 1)):
        layout = lay_out(CLIP, NAMES, num_context_tokens=5, position=position)
        assert layout.num_shared == shared
        assert (layout.rows[:, :shared] == layout.rows[0, :shared]).all()
        assert torch.equal(layout.lengths - 1, layout.tokens.argmax(1))
        own = lay_out(CLIP, NAMES, num_context_tokens=5, position=position, class_specific=True)
        assert own.num_shared == 1
        context = own.rows[own.rows >= len(own.token_ids)] - len(own.token_ids)
        assert torch.equal(context.sort().values, torch.arange(5 * len(NAMES)))
        for c, row in enumerate(own.rows):
            assert torch.equal(row[row >= len(own.token_ids)] - len(own.token_ids), 5 * c + torch.arange(5))


@pytest.mark.parametrize("position", POSITIONS)
def test_wordpiece(position: str) -> None:
    found = written_out(NAMES, WORDPIECE, num_context_tokens=4, position=position)
    row = found[1].tolist()
    name, stop = WORDPIECE.encode("sea lion"), WORDPIECE.encode(".")
    context = [-1, -2, -3, -4]
    middle = {
        "end": [*context, *name],
        "middle": [*context[:2], *name, *context[2:]],
        "front": [*name, *context],
    }[position]
    expected = [WORDPIECE.start_id, *middle, *stop, WORDPIECE.end_id]
    assert row == expected + [WORDPIECE.pad_id] * (40 - len(expected))


@pytest.mark.parametrize("clean", ["huggingface", "lower"])
def test_sentencepiece_has_no_start_and_takes_the_stop_as_its_text_does(clean: str) -> None:
    tokenizer = SENTENCEPIECE.with_options(clean=clean)
    layout = lay_out(tokenizer, NAMES, num_context_tokens=4)
    assert layout.num_shared == 4
    assert lay_out(tokenizer, NAMES, num_context_tokens=4, position="front").num_shared == 0
    ids = tokenizer.encode("sea lion.")
    assert layout.tokens[1, 4 : 4 + len(ids) + 1].tolist() == [*ids, tokenizer.end_id]


def test_names_in_any_script() -> None:
    layout = lay_out(CLIP, ["naïve café", "猫", "кошка", "🐈"], num_context_tokens=2)
    assert layout.tokens[1, 3 : layout.lengths[1] - 2].tolist() == CLIP.encode("猫")


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ([], "no class names"),
        ("cat", "list of strings"),
        (["cat", 3], "list of strings"),
        (["cat", " _ "], r"' _ ' is empty"),
        (["cat", "cat"], r"'cat' and 'cat' are the same"),
        (["sea_lion", "sea lion"], r"'sea_lion' and 'sea lion' are the same"),
        (["cat", "x" * 3 + " y" * 90], r"xxx y.* is 91 tokens long and has room for 58: of the 77 .* 16 are context"),
    ],
)
def test_names_that_make_no_prompt_are_named(names: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        lay_out(CLIP, names, num_context_tokens=16)


@pytest.mark.parametrize(
    ("tokenizer", "name"), [(CLIP.with_options(clean="huggingface"), "dog <|endoftext|> x"), (WORDPIECE, "dog [SEP] x")]
)
def test_a_special_token_in_a_name_is_refused(tokenizer: Any, name: str) -> None:
    with pytest.raises(ValueError, match=r"'dog .* holds a special token"):
        lay_out(tokenizer, ["cat", name], num_context_tokens=2)


def test_a_name_without_tokens_is_named() -> None:
    with pytest.raises(ValueError, match=r"'!!!' has no token"):
        lay_out(SENTENCEPIECE, ["cat", "!!!"], num_context_tokens=2)


def test_a_name_that_fits_exactly() -> None:
    name = " ".join(["y"] * 58)
    assert lay_out(CLIP, [name], num_context_tokens=16).lengths.tolist() == [77]


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="num_context_tokens must be at least 1, got 0"):
        lay_out(CLIP, NAMES, num_context_tokens=0)
    with pytest.raises(ValueError, match="position must be one of end, middle, front, got 'start'"):
        lay_out(CLIP, NAMES, num_context_tokens=2, position="start")


def test_words_to_start_from() -> None:
    assert context_words(CLIP, "a_photo of a") == CLIP.encode("a photo of a")
    with pytest.raises(ValueError, match=r"init=' ' has no tokens"):
        context_words(CLIP, " ")
