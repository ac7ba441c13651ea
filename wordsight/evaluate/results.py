"""What a measurement leaves behind: the judgement, `results.json`, and the fingerprint that ties a figure to its making."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from wordsight.evaluate.metrics import Scores, score_block
from wordsight.types import Metric

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from wordsight.evaluate.embedding import Embedded

RECORD_FIELDS = ("task", "data", "split", "metric", "value", "count", "ci95", "chance", "protocol", "fingerprint")
IDENTITY_FIELDS = ("task", "data", "split", "metric", "protocol")  # a new record replaces the old one that is equal in these


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """All that an evaluator found: the figures, and what examples and the report need.

    Attributes:
        task: "zero_shot" or "retrieval".
        metrics: name -> Metric.
        protocol: how it was measured, in one line that is part of a record's identity.
        fingerprint: see `fingerprint`.
        embedded: the pictures.
        rows: [R] the rows of `embedded` that were asked about.
        row_groups, text_groups: [R] and [M]; text m is right for row r exactly where they are equal.
        hits: [R] whether the best text of that row is right.
        texts, texts_MD: the class names or captions and their vectors.
        scores: (images, texts) -> [N, M], what was compared; see `wordsight.evaluate.scoring`.
        confusions: the worst-confused classes, see `zero_shot.worst_confused`.
        notes: what a reader should know, e.g. how many samples had no label.
        outcomes: for paired comparisons; one a metric that has them.
    """

    task: str
    metrics: dict[str, Metric]
    protocol: str
    fingerprint: str
    embedded: Embedded
    rows: np.ndarray
    row_groups: np.ndarray
    hits: np.ndarray
    texts: tuple[str, ...]
    texts_MD: Tensor
    text_groups: np.ndarray
    scores: Scores = score_block
    confusions: list[dict[str, Any]] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    outcomes: tuple[Outcomes, ...] = ()

    def records(self, data: str, split: str) -> list[dict[str, Any]]:
        """The figures as records of `results.json`."""
        return _records(self, data, split)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcomes:
    """What each sample came to, so that two models can be compared on the same samples (paired tests).

    Attributes:
        metric: name of the Metric that is the mean of `values`.
        keys: [N] what names a sample in every run of the same data.
        values: float64 [N]: 0 or 1 where a sample is right or wrong, else its share of the metric.
        groups: [N] samples of one group are not independent (captions of an image, drawings of a concept); None: all are.
    """

    metric: str
    keys: tuple[str, ...]
    values: np.ndarray
    groups: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.values) != len(self.keys) or (self.groups is not None and len(self.groups) != len(self.keys)):
            raise ValueError(f"outcomes of {self.metric}: {len(self.keys)} keys, {len(self.values)} values; one of each a sample")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What an evaluator found on one data set, where nothing of single pictures is shown in the report.

    Attributes:
        task: the evaluator, e.g. "linear_probe", "knn", "counting".
        metrics: name -> Metric.
        protocol: how it was measured, in one line that is part of a record's identity.
        fingerprint: see `fingerprint`.
        outcomes: for paired comparisons; one a metric that has them.
        table: rows of the report beside the figures, e.g. one a template or a class; the same fields in every row.
        notes: what a reader should know.
    """

    task: str
    metrics: dict[str, Metric]
    protocol: str
    fingerprint: str
    outcomes: tuple[Outcomes, ...] = ()
    table: list[dict[str, Any]] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    def records(self, data: str, split: str) -> list[dict[str, Any]]:
        """The figures as records of `results.json`."""
        return _records(self, data, split)


def _records(found: Judgement | Finding, data: str, split: str) -> list[dict[str, Any]]:
    return [
        {
            "task": found.task,
            "data": data,
            "split": split,
            "metric": name,
            "value": metric.value,
            "count": metric.count,
            "ci95": list(metric.ci95),
            "chance": metric.chance,
            "protocol": found.protocol,
            "fingerprint": found.fingerprint,
        }
        for name, metric in found.metrics.items()
    ]


def fingerprint(model: Any, texts: Sequence[str], listing: str, protocol: Any) -> str:
    """32 hex digits of a SHA-256 over weights, tokenizer, preprocessing, data listing and protocol.

    Args:
        model: its `state_dict` and the `to_config()` of its `tokenizer` and `preprocessor`, where it has them; a model without
            weights counts as its class name.
        texts: what was tokenised: their ids stand for the tokenizer's vocabulary.
        listing: hash of the data (`Embedded.listing`).
        protocol: everything else that a figure depends on, of strings, numbers, lists and tuples.
    """
    digest = hashlib.sha256()
    if isinstance(model, nn.Module):
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            if tensor.numel():
                digest.update(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
    else:
        digest.update(type(model).__qualname__.encode())
    for part in (getattr(model, "tokenizer", None), getattr(model, "preprocessor", None)):
        config = part.to_config() if part is not None and hasattr(part, "to_config") else None
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for start in range(0, len(texts), 1024):
        digest.update(memoryview(model.tokenize(list(texts[start : start + 1024])).cpu().contiguous().numpy()))
    digest.update(listing.encode())
    digest.update(json.dumps(protocol, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:32]


def name_data(spec: str, split: str | None = None) -> tuple[str, str]:
    """(data, split) of a record.

    `sample:test-twemoji-seen` is split `test-twemoji-seen` of `sample`; a path keeps its name, and its split is the part of its
    last name that says train, val, test and the like, else "all".
    """
    found = re.fullmatch(r"(sample):(.+)", spec)
    if found:
        return found[1], split or found[2]
    words = re.findall(r"[a-z]+", Path(spec).name.lower())
    known = [
        word for word in words if word in ("train", "training", "val", "valid", "validation", "dev", "test", "seen", "unseen")
    ]
    return spec, split or (known[0] if known else "all")


def read_json(path: Path, default: Any) -> Any:
    """The JSON in a file, `default` where there is none.

    Raises:
        ValueError: the file is not JSON.
    """
    if not path.exists():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}): move it away and measure again") from error


def write_atomically(path: Path, content: str) -> None:
    """Write a whole text file or nothing: temporary file beside it, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it readable to its owner alone
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def check_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with its fields in order; ValueError where a field is missing, surplus or not a figure."""
    if set(record) != set(RECORD_FIELDS):
        missing, surplus = set(RECORD_FIELDS) - set(record), set(record) - set(RECORD_FIELDS)
        raise ValueError(
            f"a record has exactly the fields {', '.join(RECORD_FIELDS)}; missing {sorted(missing)}, surplus {sorted(surplus)}"
        )
    low, high = record["ci95"]
    chance = record["chance"]
    figures = [record["value"], low, high] + ([] if chance is None else [chance])
    if not all(isinstance(figure, int | float) and math.isfinite(figure) for figure in figures):
        raise ValueError(f"the figures of {record['task']} {record['metric']} must be finite numbers, got {figures}")
    return {name: record[name] for name in RECORD_FIELDS} | {"ci95": [low, high]}


def write_results(run_dir: str | Path, records: Iterable[Mapping[str, Any]]) -> Path:
    """Put records into `results.json` of a run folder, atomically.

    A record that is equal to an old one in task, data, split, metric and protocol takes its place; others stay, new ones come
    last.

    Raises:
        ValueError: a record with other fields than `RECORD_FIELDS`, or a `results.json` that is not a list of records.
    """
    path = Path(run_dir) / "results.json"
    kept = read_json(path, [])
    if not isinstance(kept, list):
        raise ValueError(f"{path} is not a list of records: move it away and measure again")
    merged = {tuple(record[name] for name in IDENTITY_FIELDS): record for record in map(check_record, kept)}
    for record in map(check_record, records):
        merged[tuple(record[name] for name in IDENTITY_FIELDS)] = record
    write_atomically(path, json.dumps(list(merged.values()), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return path
