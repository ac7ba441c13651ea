"""Pictures and words to look at beside the figures: `gallery.json` and thumbnails in a run folder, for the report.

The examples are picked by their place in the data, evenly, never by score: what a reader sees is what the model does, not its
best side.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from wordsight.data.decode import decode
from wordsight.evaluate.results import read_json, write_atomically
from wordsight.types import Sample

if TYPE_CHECKING:
    from wordsight.evaluate.results import Judgement

THUMBNAIL_PX = 112
NAMED_BAD = 50  # bad samples listed by name; all are counted


def write_examples(run_dir: str | Path, judgement: Judgement, data: str, split: str, *, command: str | None = None) -> Path:
    """Put examples of a judgement into `gallery.json` of a run folder, in the place of those of the same task, data and split.

    Args:
        run_dir: the run folder; thumbnails go into its `gallery/`.
        judgement: what an evaluator's `judge` returned.
        data, split: the names in `results.json`.
        command: what a user types to measure it again.

    Returns:
        The path of `gallery.json`.
    """
    folder = Path(run_dir)
    thumbnails = _Thumbnails(folder / "gallery", judgement)
    bad = judgement.embedded.bad
    section = {
        "task": judgement.task,
        "data": data,
        "split": split,
        "protocol": judgement.protocol,
        "fingerprint": judgement.fingerprint,
        "command": command,
        "notes": list(judgement.notes),
        "bad_count": len(bad),
        "bad": [{"key": one.key, "reason": one.reason} for one in bad[:NAMED_BAD]],
        "words": _pictures_for_words(judgement, thumbnails),
        "pictures": _words_for_pictures(judgement, thumbnails, even(judgement.rows, 6)),
        "hits": _words_for_pictures(judgement, thumbnails, even(judgement.rows[judgement.hits], 12), answers=1),
        "misses": _words_for_pictures(judgement, thumbnails, even(judgement.rows[~judgement.hits], 12), answers=1),
        "num_hits": int(judgement.hits.sum()),
        "num_misses": int((~judgement.hits).sum()),
        "confusions": judgement.confusions,
    }
    path = folder / "gallery.json"
    old = read_json(path, {"sections": []})
    if not isinstance(old, dict) or not isinstance(old.get("sections"), list):
        raise ValueError(f"{path} is not a gallery: move it away and measure again")
    place = ("task", "data", "split")
    sections = [one for one in old["sections"] if any(one.get(name) != section[name] for name in place)] + [section]
    write_atomically(path, json.dumps({"sections": sections}, indent=1, ensure_ascii=False) + "\n")
    _sweep(folder / "gallery", sections)
    return path


class _Thumbnails:
    """Small WebP pictures of rows of a judgement, named by their content."""

    def __init__(self, folder: Path, judgement: Judgement) -> None:
        self._folder, self._embedded = folder, judgement.embedded
        self._done: dict[int, str] = {}

    def __call__(self, row: int) -> dict[str, Any]:
        if row not in self._done:
            content = thumbnail(self._embedded.source[self._embedded.positions[row]])
            name = f"{hashlib.sha256(content).hexdigest()[:16]}.webp"
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / name).write_bytes(content)
            self._done[row] = name
        return {"file": self._done[row], "key": self._embedded.keys[row]}


def thumbnail(sample: Sample) -> bytes:
    """A sample's picture, small, as WebP."""
    image = decode(sample.image, key=sample.key)
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=82, method=4)
    return buffer.getvalue()


def even(items: np.ndarray, count: int) -> np.ndarray:
    """At most `count` items at even distances, the first one among them."""
    if len(items) <= count:
        return items
    return items[np.arange(count) * len(items) // count]


def _right_texts(judgement: Judgement, row: int) -> list[str]:
    group = judgement.row_groups[int(np.searchsorted(judgement.rows, row))]
    return [judgement.texts[i] for i in np.flatnonzero(judgement.text_groups == group)]


def _pictures_for_words(judgement: Judgement, thumbnails: _Thumbnails, words: int = 6, pictures: int = 8) -> list[dict[str, Any]]:
    """For some texts that have a right picture, the nearest pictures of all."""
    chosen = even(np.flatnonzero(np.isin(judgement.text_groups, judgement.row_groups)), words)
    group_of = dict(zip(judgement.rows.tolist(), judgement.row_groups.tolist(), strict=True))
    scores_MN = judgement.scores(judgement.embedded.images_ND, judgement.texts_MD[torch.from_numpy(chosen)]).T
    best = scores_MN.topk(min(pictures, len(judgement.embedded)), dim=1)
    found = []
    for text, values, rows in zip(chosen.tolist(), best.values.tolist(), best.indices.tolist(), strict=True):
        right = judgement.text_groups[text]
        shown = [
            thumbnails(row) | {"score": round(score, 4), "right": bool(group_of.get(row) == right)}
            for row, score in zip(rows, values, strict=True)
        ]
        found.append({"text": judgement.texts[text], "pictures": shown})
    return found


def _words_for_pictures(
    judgement: Judgement, thumbnails: _Thumbnails, rows: Sequence[int] | np.ndarray, answers: int = 5
) -> list[dict[str, Any]]:
    """For some pictures, the texts that belong to them and the nearest texts of all."""
    if not len(rows):
        return []
    scores_RM = judgement.scores(judgement.embedded.images_ND[torch.as_tensor(rows)], judgement.texts_MD)
    best = scores_RM.topk(min(8 * answers, len(judgement.texts)), dim=1)  # more than are shown, because texts can come twice
    found = []
    for row, values, texts in zip(np.asarray(rows).tolist(), best.values.tolist(), best.indices.tolist(), strict=True):
        right = _right_texts(judgement, row)
        scores: dict[str, float] = {}
        for text, score in zip(texts, values, strict=True):
            scores.setdefault(judgement.texts[text], round(score, 4))
        shown = [{"text": text, "score": score, "right": text in right} for text, score in list(scores.items())[:answers]]
        found.append(thumbnails(row) | {"is": right[:3], "answers": shown})
    return found


def _sweep(folder: Path, sections: list[dict[str, Any]]) -> None:
    """Remove thumbnails that no section shows any more."""
    text = json.dumps(sections)
    for path in folder.glob("*.webp"):
        if path.name not in text:
            path.unlink()
