"""Hard negatives: the texts of a data set that are most like a text and belong to other pictures, found tile by tile; a table.

Shape legend: N rows (a text of a picture each), U different texts, D embedding width, K negatives a text, R and S rows and
columns of a tile.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wordsight.data.shards import clean_captions

if TYPE_CHECKING:
    from collections.abc import Callable

TILE = 2048


@dataclass(frozen=True, slots=True)
class Mined:
    """The hardest other texts of each text.

    Attributes:
        texts: the U different texts, in order of appearance.
        places: int64 [U, K] which texts are the negatives, the most similar first; -1 where there are fewer than K.
        similarities: float32 [U, K] their cosines; -inf where there is none.
    """

    texts: list[str]
    places: NDArray[np.int64]
    similarities: NDArray[np.float32]

    def negatives(self, row: int) -> list[str]:
        """The negatives of text `row`."""
        return [self.texts[place] for place in self.places[row].tolist() if place >= 0]

    def write(self, path: Path) -> None:
        """Write the table that a loader reads (`negatives_table`): Parquet with the columns text, negatives, similarities."""
        import pyarrow as pa
        from pyarrow import parquet

        there = self.places >= 0
        ends = np.concatenate([[0], np.cumsum(there.sum(axis=1))])
        offsets = pa.array(ends, pa.int64())
        flat = pa.array([self.texts[place] for place in self.places[there].tolist()], pa.large_string())
        table = pa.table(
            {
                "text": pa.array(self.texts, pa.large_string()),
                "negatives": pa.LargeListArray.from_arrays(offsets, flat),
                "similarities": pa.LargeListArray.from_arrays(offsets, pa.array(self.similarities[there])),
            }
        )
        parquet.write_table(table, path)


def mine(
    texts: Sequence[str],
    vectors: Any,
    k: int,
    *,
    picture_ids: Sequence[Any] | None = None,
    max_similarity: float | None = None,
    tile: int = TILE,
    advance: Callable[[int], object] = lambda count: None,
) -> Mined:
    """For each text the `k` most similar texts that are right for none of its pictures.

    Equal texts are one; texts that share a picture are never each other's negatives. Similarities are computed in tiles, so that
    memory grows with U (D + K), never with U^2. A text that says the same in other words is the danger of mined negatives:
    `max_similarity` leaves out those that are nearer than that.

    Args:
        texts: N texts, one for each caption of each picture; the same text may come often.
        vectors: [N, D] their embeddings, of any length but 0 and any float type; an array, a memory map or a tensor.
        k: negatives for each text.
        picture_ids: N names or numbers of the pictures that the texts are of; None: every row is of a picture of its own.
        max_similarity: cosine above which a text is left out.
        tile: rows and columns of a tile.
        advance: told how many texts are done, each time.

    Returns:
        `Mined`, the same for every tile size up to the order of ties.

    Raises:
        ValueError: sizes that don't fit, or a vector that is zero or not finite.
    """
    if k < 1 or tile < 1:
        raise ValueError(f"k and tile are 1 or more, got {k} and {tile}")
    if len(texts) != len(vectors) or (picture_ids is not None and len(picture_ids) != len(texts)):
        pictures = "no" if picture_ids is None else len(picture_ids)
        raise ValueError(f"a row a text: got {len(texts)} texts, {len(vectors)} vectors, {pictures} picture ids")
    place_of: dict[str, int] = {}
    rows: list[int] = []  # the first row of each different text
    of_row = np.empty(len(texts), np.int64)
    for row, text in enumerate(texts):
        if text not in place_of:
            place_of[text] = len(rows)
            rows.append(row)
        of_row[row] = place_of[text]
    together = _Together(of_row, picture_ids, len(rows))
    unit = _Units(vectors, rows, texts)
    number = len(rows)
    places_UK = np.full((number, k), -1, np.int64)
    similarities_UK = np.full((number, k), -np.inf, np.float32)
    for start in range(0, number, tile):
        stop = min(start + tile, number)
        found = _nearest(unit, together, range(start, stop), k, number, tile, max_similarity)
        places_UK[start:stop], similarities_UK[start:stop] = found
        advance(stop - start)
    return Mined(list(place_of), places_UK, similarities_UK)


def _nearest(
    unit: _Units, together: _Together, rows: range, k: int, number: int, tile: int, max_similarity: float | None
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Places [R, K] (-1 where there are fewer than k) and similarities of the texts that are most like those of `rows`."""
    import torch

    rows_RD = unit(rows.start, rows.stop)
    best_RK = torch.full((len(rows), k), -torch.inf)
    found_RK = torch.full((len(rows), k), -1, dtype=torch.int64)
    for first in range(0, number, tile):
        last = min(first + tile, number)
        cosine_RS = rows_RD @ unit(first, last).T
        if max_similarity is not None:
            cosine_RS[cosine_RS > max_similarity] = -torch.inf
        own, other = together.pairs(rows.start, rows.stop, first, last)
        cosine_RS[own, other] = -torch.inf
        top_RK, place_RK = cosine_RS.topk(min(k, last - first), dim=1)
        best_RK, order_RK = torch.cat([best_RK, top_RK], dim=1).topk(k, dim=1)
        found_RK = torch.cat([found_RK, place_RK + first], dim=1).gather(1, order_RK)
    found_RK[best_RK == -torch.inf] = -1
    return found_RK.numpy(), best_RK.numpy()


class _Units:
    """Rows of a large array as unit vectors, a tile at a time."""

    def __init__(self, vectors: Any, rows: Sequence[int], texts: Sequence[str]) -> None:
        self._vectors, self._rows, self._texts = vectors, np.asarray(rows), texts

    def __call__(self, start: int, stop: int) -> Any:
        import torch

        rows = self._rows[start:stop]
        found = self._vectors[torch.from_numpy(rows)] if isinstance(self._vectors, torch.Tensor) else self._vectors[rows]
        vectors_RD = torch.as_tensor(found).detach().to("cpu", torch.float32)
        if vectors_RD.ndim != 2:
            raise ValueError(f"vectors are a row a text, [N, D]; got {vectors_RD.ndim} dimensions")
        lengths_R1 = vectors_RD.norm(dim=1, keepdim=True)
        wrong = ~(torch.isfinite(lengths_R1) & (lengths_R1 > 0)).squeeze(1)
        if wrong.any():
            row = int(rows[int(wrong.nonzero()[0, 0])])
            raise ValueError(f"the vector of row {row} ({self._texts[row]!r:.80}) is zero or not finite")
        return vectors_RD / lengths_R1


class _Together:
    """Which texts share a picture, each with itself too: as sorted pairs, found by the first one."""

    def __init__(self, of_row: NDArray[np.int64], picture_ids: Sequence[Any] | None, number: int) -> None:
        own = np.arange(number)
        pairs = [np.stack([own, own], axis=1)]
        if picture_ids is not None:
            number_of: dict[Any, int] = {}
            codes = np.array([number_of.setdefault(one, len(number_of)) for one in picture_ids], np.int64)
            order = np.argsort(codes, kind="stable")
            for group in np.split(of_row[order], np.flatnonzero(np.diff(codes[order])) + 1):
                group = np.unique(group)
                if len(group) > 1:
                    pairs.append(np.stack([np.repeat(group, len(group)), np.tile(group, len(group))], axis=1))
        found = np.unique(np.concatenate(pairs), axis=0)
        self._firsts, self._others = found[:, 0], found[:, 1]

    def pairs(self, start: int, stop: int, first: int, last: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(rows, columns) within a tile of the texts that may not be paired."""
        low, high = np.searchsorted(self._firsts, [start, stop])
        own, other = self._firsts[low:high], self._others[low:high]
        inside = (other >= first) & (other < last)
        return own[inside] - start, other[inside] - first


class NegativesTable:
    """The table that `Mined.write` wrote, or any table with the columns text and negatives: a text -> its negatives.

    Args:
        path: .parquet or .jsonl.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it has not the columns, or can't be read.
    """

    def __init__(self, path: Path) -> None:
        from wordsight.data.tables import TABLE_SUFFIXES, read_table

        if not path.is_file():
            raise FileNotFoundError(f"no such table of negatives: {path}")
        if path.suffix.lower() not in TABLE_SUFFIXES:
            raise ValueError(f"{path} is no table of negatives; it ends in {', '.join(TABLE_SUFFIXES)}")
        table = read_table(path, [])
        for column in ("text", "negatives"):
            if column not in table.column_names:
                raise ValueError(f"{path} has no column {column!r}; it has {', '.join(table.column_names)}")
        self.path = path
        self._negatives = table["negatives"]
        hashes = np.array([_hash(text) for text in table["text"].to_pylist()], np.uint64)
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]

    def __len__(self) -> int:
        return len(self._hashes)

    def __call__(self, text: str) -> tuple[str, ...]:
        """The negatives of a text; none where the table has it not."""
        key = _hash(text)
        at = int(np.searchsorted(self._hashes, key))
        if at == len(self._hashes) or self._hashes[at] != key:
            return ()
        value = self._negatives[int(self._order[at])].as_py()
        return clean_captions(value if isinstance(value, list) else [value])


def _hash(text: str | None) -> np.uint64:
    digest = hashlib.blake2b((text or "").strip().encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))
