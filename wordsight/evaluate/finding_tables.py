"""The tables of findings as the report shows them: a row a relation, a corruption, a class, whatever an evaluator tells apart."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wordsight.evaluate.kept import Kept, read_kept

MAX_ROWS = 100  # of a table in the report; the file of the finding has all
SHARES = re.compile(r"(.* )?(accuracy|drop|drawing|mean)|(top\d+|severity|seed)( \S+)?|chance|text|image|group")
INTERVAL = "95% interval"
DRAWN = ("baseline",)  # columns that charts show


def read_findings(folder: Path) -> list[tuple[Path, Kept]]:
    """(file, measurement) of all in a run folder of `wordsight evaluate`, or in a model's folder of a suite, in order.

    Raises:
        ValueError: one is damaged.
    """
    found = []
    for path in sorted([*folder.glob("findings/*/finding.json"), *folder.glob("*/finding.json")]):
        kept = read_kept(path.parent, outcomes=False)
        if kept is not None:
            found.append((path, kept))
    return sorted(found, key=lambda one: one[1].order)


def shown_table(table: Sequence[dict[str, Any]], where: str) -> dict[str, Any] | None:
    """A `Finding.table` as text: {columns: [(name, is a number)], rows: [[cell]], note}; None where it is empty.

    Bounds (`low` and `high`, or `NAME ci95`) become one column behind what they bound.

    Args:
        table: rows of the same fields.
        where: the file that has all rows, to be named where some are left out.
    """
    if not table:
        return None
    shares = {name for name in table[0] if _is_share(name, [row.get(name) for row in table])}
    columns: list[tuple[str, bool]] = []
    cells: list[list[str]] = []
    for name in [name for name in table[0] if name not in DRAWN]:
        values = [row.get(name) for row in table[:MAX_ROWS]]
        if name == "high" and "low" in table[0]:
            continue  # stands with its other bound
        if name == "low" and "high" in table[0]:
            columns.append((INTERVAL, True))
            cells.append([_interval(row.get("low"), row.get("high")) for row in table[:MAX_ROWS]])
        elif name == "ci95" or name.endswith(" ci95"):
            columns.append((INTERVAL, True))
            cells.append([_interval(*value) if value else "–" for value in values])
        else:
            columns.append((_header(name), all(value is None or _is_number(value) for value in values)))
            cells.append([_cell(value, name in shares) for value in values])
    left = len(table) - MAX_ROWS
    return {
        "columns": columns,
        "rows": [list(row) for row in zip(*cells, strict=True)],
        "count": len(table),
        "note": f"{left:,} more rows are in {where}" if left > 0 else "",
    }


def _header(name: str) -> str:
    words = re.sub(r"^top(\d+)", r"top-\1", name.replace("_", " "))
    return words[:1].upper() + words[1:]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_share(name: str, values: Sequence[Any]) -> bool:
    """Whether a column is of shares: by its name, where no value speaks against it."""
    given = [value for value in values if value is not None]
    return bool(SHARES.fullmatch(name)) and all(isinstance(value, float) and -1 <= value <= 1 for value in given)


def _interval(low: float | None, high: float | None) -> str:
    """Bounds of a share."""
    return "–" if low is None or high is None else f"{_cell(low, True)} – {_cell(high, True)}"


def _cell(value: Any, share: bool) -> str:
    from wordsight.evaluate.report import percent

    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if share:
        return percent(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):  # (class, how often) of confusions, or plain values
        return ", ".join(" ×".join(map(str, one)) if isinstance(one, list | tuple) else str(one) for one in value)
    return str(value)
