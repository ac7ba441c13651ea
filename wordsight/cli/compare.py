"""`wordsight compare`: models laid side by side by paired tests, as a page and as tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from wordsight.evaluate.compare import Comparison


@click.command(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""\b
Examples:
  wordsight compare runs/ab
  wordsight compare runs/clip runs/lit --baseline runs/clip --out runs/clip-lit""",
)
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--baseline", metavar="RUN", help="What the others are tested against: a name or a folder. Default: the first.")
@click.option("--metric", "metrics", multiple=True, metavar="NAME", help="Instead of each measurement's own; repeatable.")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), help="Default: RUN where there is one, else runs/compare."
)
def command(runs: tuple[Path, ...], baseline: str | None, metrics: tuple[str, ...], out: Path | None) -> int:
    """Compare the models in run folders of `wordsight evaluate`, with or without --suite.

    Writes compare.html, compare.md, compare.tex and compare.json. Each model is tested against the baseline on the samples that
    both have; p values are adjusted for their number. Figures that were measured differently are shown and not tested.
    """
    from wordsight.evaluate.compare import compare, read_runs

    comparison = compare(read_runs(runs), baseline=baseline, metrics=metrics)
    tell(comparison, out or (runs[0] if len(runs) == 1 else Path("runs") / "compare"))
    return 0


def tell(comparison: Comparison, out: Path) -> None:
    """Write a comparison and print it."""
    from rich.console import Console
    from rich.table import Table

    from wordsight.evaluate.compare_report import test_words, write_comparison
    from wordsight.evaluate.report import figure, metric_name

    files = write_comparison(out, comparison)
    table = Table(box=None, pad_edge=False)
    for name in ("measurement", "model", "figure", f"against {comparison.baseline.name}, paired"):
        table.add_column(name, overflow="fold")
    for row in comparison.rows:
        tests = {test.model: test for test in row.tests}
        for place, (name, metric) in enumerate(row.figures.items()):
            low, high = (figure(bound, metric.unit) for bound in metric.ci95)
            value = f"{figure(metric.value, metric.unit)} ({low} – {high})"
            title = f"{row.title}, {metric_name(row.metric)}" if place == 0 else ""
            table.add_row(title, name, value, test_words(tests[name], metric) if name in tests else "")
    Console().print(table)
    for row in comparison.rows:
        for text in row.warnings:
            click.echo(f"Warning: {row.title}: {text}", err=True)
    for text in comparison.notes:
        click.echo(f"Note: {text}.", err=True)
    click.echo(f"Page: {files[0]}. Tables: {', '.join(path.name for path in files[1:])} beside it.")
