"""How learned prompts are laid out: class names -> rows of tokens in which some places are learned (CoOp, arXiv 2109.01134, 3.1).

A prompt is start, context, class name, ".", end. Its context stands before the name ("end": the name comes at the end of it),
half before and half behind it ("middle"), or between the name and the "." ("front"). Nothing here knows a model: a place of a
prompt is an integer, the row of a table that holds the embeddings of all tokens that occur and, behind them, the context.

Shape legend: C classes, L context length in tokens, U different tokens, M context tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from wordsight.data.tokenize import TextTokenizer

POSITIONS = ("end", "middle", "front")
PLACEHOLDER = "X"  # what the published code writes where the context will be


@dataclass(frozen=True, kw_only=True)
class PromptLayout:
    """The prompts of all classes, as rows of a table: U token embeddings, then the context's vectors.

    Attributes:
        names: of the classes, as they were given.
        num_context_tokens: M.
        class_specific: whether each class has M vectors of its own; the table then has C x M behind the U.
        token_ids: int64 [U], the tokens whose embeddings are the table's first rows.
        rows: int64 [C, L], the table's row at each place of each prompt, padding too.
        tokens: int64 [C, L], the prompts with the token "X" where the context is: they say where the end and the padding are.
        lengths: int64 [C], tokens of each prompt, its end token included.
        num_shared: how many tokens at the beginning are the same for all classes, whatever their names.
    """

    names: tuple[str, ...]
    num_context_tokens: int
    class_specific: bool
    token_ids: Tensor
    rows: Tensor
    tokens: Tensor
    lengths: Tensor
    num_shared: int


def lay_out(
    tokenizer: TextTokenizer,
    names: Sequence[str],
    *,
    num_context_tokens: int,
    position: str = "end",
    class_specific: bool = False,
    published_tokens: bool = False,
) -> PromptLayout:
    """The prompts of some classes.

    Args:
        tokenizer: the model's.
        names: C class names; "_" is a space.
        num_context_tokens: M, at least 1.
        position: "end", "middle" or "front", where the name stands.
        class_specific: whether each class has a context of its own.
        published_tokens: whether names are tokenised as the published code does, together with the ".": behind a bracket (and
            other signs) ")." is then one token of CLIP's, which counts as a part of the name.

    Raises:
        ValueError: no names, an empty name, two names that are the same to the tokenizer, a name with a special token in it or
            longer than the room that is left for it, or an option out of range.
    """
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"class names are a list of strings, got {names!r:.80}")
    if not names:
        raise ValueError("there are no class names; a prompt learner needs at least 1")
    if num_context_tokens < 1:
        raise ValueError(f"num_context_tokens must be at least 1, got {num_context_tokens}")
    if position not in POSITIONS:
        raise ValueError(f"position must be one of {', '.join(POSITIONS)}, got {position!r}")
    split = [_tokenize(tokenizer, name, published_tokens) for name in names]
    _check_distinct(names, split)

    start = [tokenizer.start_id] if hasattr(tokenizer, "start_id") else []
    _check_room(tokenizer, names, split, num_context_tokens, len(start))
    num_before = {"end": num_context_tokens, "middle": num_context_tokens // 2, "front": 0}[position]
    placeholder = _placeholder(tokenizer)
    context = [-1 - m for m in range(num_context_tokens)]  # marks; no token is negative
    prompts = []
    for name_ids, rest_ids in split:
        before, behind = context[:num_before], context[num_before:]
        prompts.append([*start, *before, *name_ids, *behind, *rest_ids, _end_id(tokenizer)])

    marked_CL = torch.full((len(names), tokenizer.context_length), tokenizer.pad_id, dtype=torch.int64)
    for row_L, prompt in zip(marked_CL, prompts, strict=True):
        row_L[: len(prompt)] = torch.tensor(prompt)
    is_context_CL = marked_CL < 0
    tokens_CL = marked_CL.masked_fill(is_context_CL, placeholder)
    token_ids_U, rows_CL = torch.unique(tokens_CL, return_inverse=True)
    own_C1 = torch.arange(len(names))[:, None] * (num_context_tokens if class_specific else 0)
    return PromptLayout(
        names=tuple(names),
        num_context_tokens=num_context_tokens,
        class_specific=class_specific,
        token_ids=token_ids_U,
        rows=torch.where(is_context_CL, len(token_ids_U) + own_C1 - 1 - marked_CL, rows_CL),
        tokens=tokens_CL,
        lengths=torch.tensor([len(prompt) for prompt in prompts]),
        num_shared=len(start) + (0 if class_specific else num_before),
    )


def _check_room(
    tokenizer: TextTokenizer,
    names: Sequence[str],
    split: Sequence[tuple[list[int], list[int]]],
    num_context_tokens: int,
    num_start: int,
) -> None:
    # an end token where the tokenizer has one
    room = tokenizer.context_length - num_start - num_context_tokens - 1
    for name, (name_ids, rest_ids) in zip(names, split, strict=True):
        if len(name_ids) + len(rest_ids) > room:
            raise ValueError(
                f"the class name {name!r} is {len(name_ids)} tokens long and has room for {max(room - len(rest_ids), 0)}: of the "
                f"{tokenizer.context_length} tokens of a text, {num_context_tokens} are context and "
                f"{num_start + len(rest_ids) + 1} its start, stop and end; shorten it, or take fewer context tokens"
            )


def context_words(tokenizer: TextTokenizer, words: str) -> list[int]:
    """The tokens of the words that a context starts from; "_" is a space.

    Raises:
        ValueError: there are none.
    """
    ids = _encode(tokenizer, words.replace("_", " "))
    if not ids:
        raise ValueError(f"init={words!r} has no tokens; write at least one word, such as 'a photo of a'")
    return ids


def _tokenize(tokenizer: TextTokenizer, name: str, published: bool) -> tuple[list[int], list[int]]:
    """A name's tokens, and those of the "." behind it."""
    text = name.replace("_", " ").strip()
    if not text:
        raise ValueError(f"the class name {name!r} is empty; give every class a name")
    name_ids, both_ids = _encode(tokenizer, text), _encode(tokenizer, text + ".")
    special = {getattr(tokenizer, "start_id", None), _end_id(tokenizer)}
    if special & {*name_ids, *both_ids}:
        raise ValueError(f"the class name {name!r} holds a special token of the tokenizer's; take it out")
    if not name_ids:
        raise ValueError(f"the class name {name!r} has no token that the model knows; give the class a name in words")
    if published or both_ids[: len(name_ids)] == name_ids:
        return both_ids[: len(name_ids)], both_ids[len(name_ids) :]
    # the "." has merged with the name's end
    return name_ids, _encode(tokenizer, ".")


def _check_distinct(names: Sequence[str], split: Sequence[tuple[list[int], list[int]]]) -> None:
    seen: dict[tuple[int, ...], str] = {}
    for name, (name_ids, rest_ids) in zip(names, split, strict=True):
        key = (*name_ids, *rest_ids)
        if key in seen:
            raise ValueError(
                f"the class names {seen[key]!r} and {name!r} are the same to the model's tokenizer, so no prompt can tell them "
                "apart; rename one"
            )
        seen[key] = name


def _placeholder(tokenizer: TextTokenizer) -> int:
    """A token that marks neither end nor padding."""
    ids = [i for i in _encode(tokenizer, PLACEHOLDER) if i not in (tokenizer.pad_id, _end_id(tokenizer))]
    if not ids:
        raise ValueError(f"the tokenizer has no token for {PLACEHOLDER!r}, which stands for the context")
    return ids[0]


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text)
    return ids


def _end_id(tokenizer: Any) -> int:
    end_id: int = tokenizer.end_id
    return end_id
