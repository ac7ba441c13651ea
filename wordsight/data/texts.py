"""Texts without pictures: read from a file, put into batches for a text tower.

Shape legend: N texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wordsight.data.tables import CAPTION_COLUMNS, TABLE_SUFFIXES, read_table

if TYPE_CHECKING:
    from torch import Tensor

    from wordsight.types import BadSample


def read_texts(path: Path, column: str | None = None) -> list[str]:
    """A text for each line of a text file, or for each row of a table's column, so that row i belongs to text i.

    Args:
        path: a table by its ending (.csv, .tsv, .parquet, .jsonl, .ndjson), else a text file, whose empty lines are texts too.
        column: of a table; None takes the first that is known to hold captions ("caption", "text", ...).

    Raises:
        ValueError: it can't be read, holds nothing, has no such column, or a row has no text or several.
    """
    if path.suffix.lower() in TABLE_SUFFIXES:
        return _read_column(path, column)
    if column is not None:
        raise ValueError(f"{path} has no columns: a column is of a table ({', '.join(TABLE_SUFFIXES)})")
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from error
    lines = content.replace("\r\n", "\n").removesuffix("\n").split("\n")
    if lines == [""]:
        raise ValueError(f"{path} is empty: write a text a line")
    return lines


def _read_column(path: Path, column: str | None) -> list[str]:
    damaged: list[BadSample] = []
    table = read_table(path, damaged)
    if damaged:
        first = "; ".join(f"{one.key} {one.reason}" for one in damaged[:3])
        raise ValueError(
            f"{len(damaged)} rows of {path} can't be read, so vectors would lose their rows: mend them first ({first})"
        )
    names = table.column_names
    if column is None:
        column = next((name for known in CAPTION_COLUMNS for name in names if name.lower() == known), None)
    if column is None or column not in names:
        what = "no column known to hold texts" if column is None else f"no column {column!r}"
        raise ValueError(f"{path} has {what}; name one of {', '.join(names)}")
    texts = table[column].to_pylist()
    if not texts:
        raise ValueError(f"{path} has no rows")
    for row, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            found = "no text" if text is None else f"{len(text)} texts" if isinstance(text, list) else f"{text!r:.40}"
            raise ValueError(
                f"row {row} of {path} has {found} in its column {column!r}: each row needs one text, an empty one too"
            )
    return texts


def text_batches(texts: Sequence[str], batch_size: int) -> tuple[list[list[str]], Tensor]:
    """What is encoded of texts: each once, those of like length together, so that little padding is computed.

    Args:
        texts: N texts.
        batch_size: texts of a batch; the last one may be smaller.

    Returns:
        the batches, which depend on the set of texts alone; int64 [N], the row of each text in the batches one after the other.
    """
    import torch

    unique = sorted(set(texts), key=lambda text: (len(text), text))
    row_of = {text: row for row, text in enumerate(unique)}
    batches = [unique[start : start + batch_size] for start in range(0, len(unique), batch_size)]
    return batches, torch.tensor([row_of[text] for text in texts], dtype=torch.int64)
