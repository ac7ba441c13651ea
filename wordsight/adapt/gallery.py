"""Pictures that a kept classifier names rightly and wrongly, as thumbnails beside the run; picked by place, evenly, never by
score."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wordsight.adapt.judge import read_csv
from wordsight.adapt.protocol import Test
from wordsight.evaluate.examples import even, thumbnail
from wordsight.evaluate.results import write_atomically

SHOWN = 12  # of the hits of a test, and of its misses


def write_gallery(run_dir: Path, seed_dir: Path, tests: Sequence[Test]) -> None:
    """gallery.json and gallery/ of a run, from the predictions of the kept seed."""
    shutil.rmtree(run_dir / "gallery", ignore_errors=True)
    (run_dir / "gallery").mkdir()
    sections = []
    for test in tests:
        rows = read_csv(seed_dir / f"predictions-{test.name}.csv")
        right = np.array([row["label"] == row["predicted"] for row in rows])
        sections.append(
            {
                "name": test.name,
                "data": test.data,
                "num_hits": int(right.sum()),
                "num_misses": int((~right).sum()),
                "hits": [_shown(run_dir, test, rows, row) for row in even(np.flatnonzero(right), SHOWN).tolist()],
                "misses": [_shown(run_dir, test, rows, row) for row in even(np.flatnonzero(~right), SHOWN).tolist()],
            }
        )
    write_atomically(run_dir / "gallery.json", json.dumps({"sections": sections}, indent=1, ensure_ascii=False) + "\n")


def _shown(run_dir: Path, test: Test, rows: Sequence[dict[str, str]], row: int) -> dict[str, Any]:
    content = thumbnail(test.pictures.source[row])
    name = f"{hashlib.sha256(content).hexdigest()[:16]}.webp"
    (run_dir / "gallery" / name).write_bytes(content)
    found = rows[row]
    return {
        "file": name,
        "key": found["picture"],
        "label": found["label"],
        "predicted": found["predicted"],
        "probability": float(found["probability"]),
    }
