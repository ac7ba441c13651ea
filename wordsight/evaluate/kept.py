"""What stays of a measurement on disk: the figures and all they depend on, and what each sample came to.

A folder of `finding.json` and `outcomes.parquet` is whole or not there. `wordsight compare` reads nothing else, so runs of suites
and of single measurements, of today and of last year, on this machine and on another, can be laid side by side.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from wordsight.evaluate.results import Finding, Judgement, Outcomes, read_json
from wordsight.types import Metric

FORMAT = 1
PACKAGES = ("wordsight", "torch", "numpy", "pillow")  # figures may depend on them in their last digits


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A measurement as it was read from its folder.

    Attributes:
        item: its name in the suite; "" where it was no suite's.
        model: name, source, weights (hash), num_parameters, gflops of the image tower, order (its place among the models).
        task, metrics, protocol, fingerprint, table, notes, outcomes: as the evaluator gave them.
        data, split: what it was measured on.
        listing: hash of the samples, where the evaluator was given them; "" else.
        headline: the metric that stands for it.
        versions: of the packages it was made with.
        asked: hash of what was asked for; another one is another measurement.
        seconds: how long it took.
        order: its place in the suite.
    """

    item: str
    model: dict[str, Any]
    task: str
    data: str
    split: str
    metrics: dict[str, Metric]
    protocol: str
    fingerprint: str
    headline: str
    listing: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    asked: str = ""
    seconds: float = 0.0
    order: int = 0
    table: list[dict[str, Any]] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    outcomes: tuple[Outcomes, ...] = ()

    def records(self) -> list[dict[str, Any]]:
        """The figures as records of `results.json`."""
        found = Finding(task=self.task, metrics=self.metrics, protocol=self.protocol, fingerprint=self.fingerprint)
        return found.records(self.data, self.split)


def kept_of(found: Judgement | Finding, *, data: str, split: str, model: Mapping[str, Any], **more: Any) -> Kept:
    """What is kept of what an evaluator found; `more` are further fields of `Kept`.

    Raises:
        ValueError: it found no figure, or `headline` is none of them.
    """
    if not found.metrics:
        raise ValueError(f"{found.task} on {data} gave no figure at all")
    headline = more.pop("headline", None) or next(iter(found.metrics))
    if headline not in found.metrics:
        raise ValueError(f"{found.task} on {data} has no metric {headline!r}; it has {', '.join(found.metrics)}")
    for name, metric in found.metrics.items():
        if not all(math.isfinite(figure) for figure in (metric.value, *metric.ci95)):
            raise ValueError(f"{found.task} on {data}: {name} is {metric.value} {metric.ci95}, which is no figure")
    return Kept(
        model=dict(model),
        task=found.task,
        data=data,
        split=split,
        metrics=found.metrics,
        protocol=found.protocol,
        fingerprint=found.fingerprint,
        headline=headline,
        listing=found.embedded.listing if isinstance(found, Judgement) else "",
        versions=versions(),
        table=found.confusions if isinstance(found, Judgement) else found.table,
        notes=found.notes,
        outcomes=found.outcomes,
        **({"item": ""} | more),
    )


def folder_name(kept: Kept) -> str:
    """Where a measurement that is no suite's lies in the `findings/` of a run folder: one place for each record's identity."""
    words = re.sub(r"[^A-Za-z0-9]+", "-", f"{kept.task} {kept.data} {kept.split}").strip("-")
    identity = json.dumps([kept.task, kept.data, kept.split, kept.protocol])
    return f"{words[-80:]}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"


@cache
def code_digest() -> str:
    """12 hex digits of this package's Python files: two states of one version, e.g. of a working copy, can give other figures."""
    digest, root = hashlib.sha256(), Path(__file__).parent.parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def versions() -> dict[str, str]:
    """Python's version, those of `PACKAGES`, and the state of this package's code."""
    found = {"python": platform.python_version(), "wordsight's code": code_digest()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def write_kept(folder: Path, kept: Kept) -> None:
    """Put a measurement in the place of what the folder held, whole or not at all."""
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    content = {"format": FORMAT} | {name: getattr(kept, name) for name in kept.__dataclass_fields__ if name != "outcomes"}
    content["metrics"] = {name: asdict(metric) for name, metric in kept.metrics.items()}
    if kept.outcomes:
        _write_outcomes(new / "outcomes.parquet", kept.outcomes)
    with open(new / "finding.json", "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(new, folder)


def read_kept(folder: Path, *, outcomes: bool = True) -> Kept | None:
    """The measurement in a folder; None where there is none.

    Args:
        folder: what `write_kept` wrote.
        outcomes: read each sample's outcome too.

    Raises:
        ValueError: it is damaged.
    """
    content = read_json(folder / "finding.json", None)
    if content is None:
        return None
    try:
        if content.pop("format") != FORMAT:
            raise ValueError("its format is another one")
        metrics = {name: Metric(**metric | {"ci95": tuple(metric["ci95"])}) for name, metric in content.pop("metrics").items()}
        content["notes"] = tuple(content["notes"])
        path = folder / "outcomes.parquet"
        read = _read_outcomes(path) if outcomes and path.exists() else ()
        return Kept(metrics=metrics, outcomes=read, **content)
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        raise ValueError(f"{folder} holds no measurement that can be read ({error}): move it away and measure again") from error


def _write_outcomes(path: Path, outcomes: tuple[Outcomes, ...]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parts = [
        pa.table(
            {
                "metric": pa.array([one.metric] * len(one.keys), pa.string()).dictionary_encode(),
                "key": pa.array(map(_plain, one.keys), pa.string()),
                "value": pa.array(np.asarray(one.values, np.float64)),
                "group": pa.array(map(_plain, one.groups) if one.groups is not None else [None] * len(one.keys), pa.string()),
            }
        )
        for one in outcomes
    ]
    parquet.write_table(pa.concat_tables(parts).unify_dictionaries(), path, compression="zstd")


def _plain(text: str) -> str:
    """A name as valid UTF-8: file names need not be."""
    return text.encode("utf-8", "backslashreplace").decode()


def _read_outcomes(path: Path) -> tuple[Outcomes, ...]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(path, columns=["metric", "key", "value", "group"])
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path.name} can't be read: {error}") from error
    metrics = np.asarray(table["metric"].to_pylist(), dtype=object)
    keys, groups = table["key"].to_pylist(), table["group"].to_pylist()
    values = table["value"].to_numpy()
    found = []
    for metric in dict.fromkeys(metrics.tolist()):
        rows = np.flatnonzero(metrics == metric)
        own = tuple(groups[row] for row in rows)
        grouped = None if any(group is None for group in own) else own
        found.append(Outcomes(metric=metric, keys=tuple(keys[row] for row in rows), values=values[rows], groups=grouped))
    return tuple(found)
