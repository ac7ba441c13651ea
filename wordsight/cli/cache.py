"""`wordsight cache`: what features and tokens are kept in a folder, whether they are whole, and which may go."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from wordsight.evaluate.part_files import Listed

DAY_S = 86400.0
UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
UNKNOWN = "(damaged, or of an older version)"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Look at what `wordsight evaluate --cache DIR` and runs of `wordsight adapt` and `long-tail` keep of pictures.

    FOLDER is such a folder, or one that has some below it (a run). Default: $WORDSIGHT_CACHE.
    """


folder_argument = click.argument(
    "folder", envvar="WORDSIGHT_CACHE", type=click.Path(exists=True, file_okay=False, path_type=Path)
)


@command.command(
    "list",
    epilog="""\b
Examples:
  wordsight cache list ~/features
  wordsight cache list runs --json""",
)
@folder_argument
@click.option("--json", "as_json", is_flag=True, help="A JSON list, for programs.")
def list_command(folder: Path, as_json: bool) -> None:
    """Show whose features are kept: layer, pictures, size, last use."""
    rows = _rows(_listed(folder))
    if as_json:
        click.echo(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("model", overflow="fold")
    for title in ("id", "layer"):
        table.add_column(title, no_wrap=True)
    for title in ("views", "pictures", "MB", "last use"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        name, identity, layer = (escape(str(row[name])) for name in ("model", "id", "layer"))
        used = datetime.fromtimestamp(row["last_use_s"]).strftime("%Y-%m-%d %H:%M")
        table.add_row(name, identity, layer, str(row["views"]), f"{row['pictures']:,}", f"{row['bytes'] / 1e6:,.1f}", used)
    Console().print(table)
    click.echo(f"{sum(row['parts'] for row in rows):,} files, {_size(sum(row['bytes'] for row in rows))} in {folder}.")


@command.command(
    "verify",
    epilog="""\b
Examples:
  wordsight cache verify ~/features
  wordsight cache verify runs/few && echo whole""",
)
@folder_argument
def verify(folder: Path) -> int:
    """Read every file and compare its checksum. Exit code 1 where one is damaged; its name is said."""
    listed = _listed(folder)
    damaged = _damaged(listed)
    for one in damaged:
        click.echo(f"damaged: {one.path}")
    click.echo(f"{len(listed) - len(damaged):,} of {len(listed):,} files are whole.")
    if damaged:
        click.echo(
            f"Remove the others with `wordsight cache prune {folder} --damaged`; they are made anew when needed.", err=True
        )
    return int(bool(damaged))


@command.command(
    "prune",
    epilog="""\b
Examples:
  wordsight cache prune ~/features --older-than 30
  wordsight cache prune ~/features --max-size 20G --yes""",
)
@folder_argument
@click.option("--older-than", type=click.FloatRange(min=0), metavar="DAYS", help="What was not used for so long.")
@click.option("--model", metavar="TEXT", help="What is of models with this in their name, or of the id that begins so.")
@click.option("--damaged", is_flag=True, help="What is damaged (reads every file).")
@click.option(
    "--max-size", metavar="SIZE", help="What was not used for longest, until all is at most so large, e.g. 500M or 20G."
)
@click.option("--yes", is_flag=True, help="Don't ask.")
def prune(folder: Path, older_than: float | None, model: str | None, damaged: bool, max_size: str | None, yes: bool) -> None:
    """Remove kept features, which are made anew when they are needed.

    Of several conditions all must hold; --max-size takes of what is left by the others until the whole folder is small enough.
    """
    from wordsight.evaluate.part_files import remove_leftovers

    if older_than is None and model is None and not damaged and max_size is None:
        raise click.UsageError("say what may go: --older-than, --model, --damaged or --max-size")
    limit = None if max_size is None else parse_size(max_size)
    listed = _listed(folder)
    chosen = listed
    if older_than is not None:
        chosen = [one for one in chosen if one.used_s < time.time() - older_than * DAY_S]
    if model is not None:
        chosen = [one for one in chosen if _is_of(one, model)]
    if damaged:
        chosen = _damaged(chosen)
    if limit is not None:
        chosen = _until(chosen, sum(one.size for one in listed) - limit)
    if not chosen:
        click.echo("Nothing to remove.")
    else:
        for row in _rows(chosen):
            click.echo(f"{row['parts']:,} files, {_size(row['bytes'])}: {row['model']}, {row['layer']}, {row['id']}")
        if not yes:
            click.confirm(f"Remove {len(chosen):,} files, {_size(sum(one.size for one in chosen))}?", abort=True)
    freed = 0
    for one in chosen:
        one.path.unlink(missing_ok=True)
        freed += one.size
    for place in {one.path.parent for one in listed} | {folder}:
        freed += remove_leftovers(place, [path.name for path in place.iterdir()])
    if freed:
        click.echo(f"Freed {_size(freed)}.")


def parse_size(text: str) -> float:
    """Bytes of "500M", "20GB" or "1.5 T" (powers of 1,000)."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", text, re.IGNORECASE)
    if not found:
        raise click.BadParameter(f"{text!r} is no size: give e.g. 500M or 20G", param_hint="'--max-size'")
    return float(found[1]) * UNITS[found[2].upper()]


def _listed(folder: Path) -> list[Listed]:
    from wordsight.evaluate.part_files import list_parts

    return list_parts(folder)


def _damaged(listed: Sequence[Listed]) -> list[Listed]:
    from wordsight.evaluate.part_files import is_whole, looking

    damaged = []
    for one in listed:
        try:
            with looking(one.path):
                if not is_whole(one.path):
                    damaged.append(one)
        except FileNotFoundError:  # made anew under another name, or pruned
            continue
    return damaged


def _is_of(one: Listed, model: str) -> bool:
    subject = one.subject
    return subject is not None and (model.lower() in subject.model.lower() or subject.identity.startswith(model.lower()))


def _until(listed: Sequence[Listed], surplus: float) -> list[Listed]:
    """Those that were not used for longest, until `surplus` bytes are gone."""
    chosen: list[Listed] = []
    for one in sorted(listed, key=lambda one: (one.used_s, one.path)):
        if surplus <= 0:
            break
        chosen.append(one)
        surplus -= one.size
    return chosen


def _rows(listed: Sequence[Listed]) -> list[dict[str, Any]]:
    """One for each model and layer, the last used first. Pictures are those of the view that has most of them."""
    groups: dict[tuple[str, str, str], list[Listed]] = {}
    for one in listed:
        subject = one.subject
        key = (UNKNOWN, "-", "-") if subject is None else (subject.model or "-", subject.identity[:12], subject.layer)
        groups.setdefault(key, []).append(one)
    rows = []
    for (model, identity, layer), own in groups.items():
        pictures: dict[str, int] = {}
        for one in own:
            if one.subject is not None:
                pictures[one.subject.view] = pictures.get(one.subject.view, 0) + one.num_pictures
        rows.append(
            {
                "model": model,
                "id": identity,
                "layer": layer,
                "views": len(pictures),
                "pictures": max(pictures.values(), default=0),
                "parts": len(own),
                "bytes": sum(one.size for one in own),
                "last_use_s": max(one.used_s for one in own),
            }
        )
    return sorted(rows, key=lambda row: (-row["last_use_s"], row["model"], row["layer"]))


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"
