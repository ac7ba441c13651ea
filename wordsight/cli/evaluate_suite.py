"""`wordsight evaluate --suite`: a suite over models, with a table at the end and a list of what was missing."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wordsight.cli.loading import load_model

if TYPE_CHECKING:
    from wordsight.cli.evaluate import Asked
    from wordsight.evaluate.suite import Candidate, SuiteOutcome


def run(
    suite: str,
    models: tuple[str, ...],
    root: Path,
    run_dir: Path | None,
    architecture: str | None,
    device: str,
    asked: Asked,
    strict: bool,
    as_json: bool,
) -> int:
    """Run a suite; the exit code: 1 where an item failed, nothing could be measured, or (`strict`) data are missing."""
    if not models:
        raise click.UsageError("name the models that the suite is run on: --model PATH, once for each")
    if run_dir is None:
        raise click.UsageError(
            "a suite needs --run FOLDER: what lies there is not measured again, so a suite that was stopped goes on"
        )
    if architecture is not None and len(models) > 1:
        raise click.UsageError("--architecture goes with one model: convert the others first (wordsight convert)")
    from wordsight.cli.evaluate import describe
    from wordsight.evaluate.suite import run_suite
    from wordsight.evaluate.suites import open_suite

    outcome = run_suite(
        open_suite(suite, root),
        candidates(models, architecture, device),
        run_dir,
        batch_size=asked.batch_size,
        num_workers=asked.workers,
        max_bad_share=asked.max_bad_share,
        cache=asked.cache,
        progress=not as_json and sys.stderr.isatty(),
        say=lambda text: click.echo(text, err=True),
        describe=describe,
    )
    if as_json:
        click.echo(json.dumps(_as_json(outcome, run_dir), indent=1, ensure_ascii=False))
    else:
        _print(outcome, run_dir)
    return 1 if outcome.failed or not outcome.measured or (strict and outcome.missing) else 0


def candidates(models: tuple[str, ...], architecture: str | None, device: str) -> list[Candidate]:
    """The models with their names: what stands before "=", else the last part of the path, or more parts where that is not
    enough to tell them apart."""
    from wordsight.evaluate.suite import Candidate

    given = [re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._+-]*)=(.+)", model) if not Path(model).exists() else None for model in models]
    paths = [found[2] if found else model for found, model in zip(given, models, strict=True)]
    short = _short_names(paths)
    names = [found[1] if found else name for found, name in zip(given, short, strict=True)]

    def loader(path: str) -> Any:
        return lambda: load_model(path, architecture, device)

    return [Candidate(name=name, load=loader(path), source=path) for name, path in zip(names, paths, strict=True)]


def _short_names(paths: list[str]) -> list[str]:
    parts = [[re.sub(r"[^A-Za-z0-9._+-]+", "-", part).strip("-.") for part in Path(path).parts] for path in paths]
    parts = [[part for part in own if part] or ["model"] for own in parts]
    names = [own[-1] for own in parts]
    for length in range(2, max(map(len, parts)) + 1):
        twice = {name for name, count in Counter(name.lower() for name in names).items() if count > 1}
        names = ["-".join(own[-length:]) if name.lower() in twice else name for own, name in zip(parts, names, strict=True)]
    return names


def _as_json(outcome: SuiteOutcome, run_dir: Path) -> dict[str, Any]:
    return {
        "run": str(run_dir),
        "results": [
            {"model": model, "item": kept.item, "headline": kept.headline} | record
            for model, kept in outcome.measured
            for record in kept.records()
        ],
        "failed": [{"model": model, "item": item, "error": error} for model, item, error in outcome.failed],
        "missing": [
            {"item": item, "needs": [{"path": str(path), "what": what} for path, what in needs]}
            for item, needs in outcome.missing
        ],
    }


def _print(outcome: SuiteOutcome, run_dir: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from wordsight.evaluate.report import figure, metric_name

    models = list(dict.fromkeys(model for model, _ in outcome.measured))
    table = Table(box=None, pad_edge=False)
    for name, side in (("item", "left"), ("metric", "left"), *((model, "right") for model in models), ("chance", "right")):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    by_item: dict[str, dict[str, Any]] = {}
    for model, kept in outcome.measured:
        by_item.setdefault(kept.item, {})[model] = kept
    for item, found in by_item.items():
        first = next(iter(found.values()))
        metric = first.metrics[first.headline]
        cells = []
        for model in models:
            own = found[model].metrics[first.headline] if model in found else None
            low, high = (figure(bound, own.unit) for bound in own.ci95) if own is not None else ("", "")
            cells.append(f"{figure(own.value, own.unit)}\n{low} – {high}" if own is not None else "–")
        table.add_row(item, metric_name(first.headline), *cells, figure(metric.chance, metric.unit))
    if outcome.measured:
        Console().print(table)
    for item, needs in outcome.missing:
        click.echo(f"Left out, as data are missing: {item}")
        for path, what in needs:
            click.echo(f"  {path}: {what}")
    for model, item, error in outcome.failed:
        click.echo(f"Failed: {model} · {item}: {error}", err=True)
    click.echo(f"Measurements: {run_dir}/MODEL/ITEM; reports: {run_dir}/MODEL/report.html.")
    if len(models) > 1:
        click.echo(f"Comparison: {_compare(run_dir)}.")


def _compare(run_dir: Path) -> Path:
    """The page that compares all models in the folder."""
    from wordsight.evaluate.compare import compare, read_runs
    from wordsight.evaluate.compare_report import write_comparison

    return write_comparison(run_dir, compare(read_runs([run_dir])))[0]
