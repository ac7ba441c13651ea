"""What a checkpoint holds once its layout is understood: architecture, weights in our names, tokenizer, preprocessing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wordsight.interop.safe_read import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from wordsight.data.tokenize import TextTokenizer
    from wordsight.data.transform import Preprocess


@dataclass(frozen=True, kw_only=True)
class Contents:
    """A checkpoint, read.

    Attributes:
        source: the path that errors name.
        layout: "wordsight", "open_clip", "huggingface" or "openai".
        tensors: the weights in our names, dtypes as stored.
        config: the architecture, None where the file doesn't tell it.
        tokenizer: None where the checkpoint has none.
        preprocess: None where the checkpoint has none.
        notes: what a user should be told.
        provenance: where the weights are from, as far as the checkpoint says.
    """

    source: Path
    layout: str
    tensors: dict[str, Tensor]
    config: Any
    tokenizer: TextTokenizer | None
    preprocess: Preprocess | None
    notes: tuple[str, ...] = ()
    provenance: Mapping[str, Any] | None = None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        CheckpointError: it is not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected an object with named values")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object as JSON that people can read."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def first_file(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The first of some files that a folder has."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def unsupported(path: Path, values: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]], what: str) -> None:
    """Refuse options that would change the numbers.

    Args:
        path: the file that says so.
        values: its options.
        neutral: option -> the values of it that change nothing.
        what: what doesn't know them, for the message.

    Raises:
        CheckpointError: naming the first option that is not neutral.
    """
    for name, allowed in neutral.items():
        if name in values and values[name] not in allowed:
            raise CheckpointError(
                f"{path}: {name} = {values[name]!r} is something that {what} does not have (it has {allowed[0]!r})"
            )
