"""`wordsight data long-tail`: a skewed split of balanced data, as a table and a picture of its class counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from wordsight.cli.missing import listing_missing

if TYPE_CHECKING:
    from wordsight.data.few_shot import Splits


@click.command(
    "long-tail",
    short_help="Make a skewed split of balanced data.",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""\b
Examples:
  wordsight data long-tail photos/ --factor 100 --seed 1 --out photos-lt.csv
  wordsight data long-tail cifar-10-batches-bin --factor 50 --num-val 50 --out cifar10-lt.csv
""",
)
@click.argument("data")
@click.option("--factor", type=float, required=True, help="Pictures of the largest class over those of the smallest.")
@click.option("--seed", type=int, default=1, show_default=True, help="Which pictures are kept.")
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The table to write, .csv.")
@click.option("--num-max", type=click.IntRange(1), metavar="N", help="Of the first class.  [default: all of the smallest one]")
@click.option("--num-val", type=click.IntRange(0), default=0, show_default=True, help="Set aside a class for validation first.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Class counts, .svg.  [default: beside --out]")
@click.option("--root", type=click.Path(path_type=Path), help="Folder of published data sets, or of a table's pictures.")
@click.option("--many-above", type=float, default=100, show_default=True, help="Classes with more pictures are many.")
@click.option("--few-below", type=float, default=20, show_default=True, help="Classes with fewer are few.")
@click.option("--json", "as_json", is_flag=True, help="JSON for programs.")
def command(
    data: str,
    factor: float,
    seed: int,
    out: Path,
    num_max: int | None,
    num_val: int,
    plot: Path | None,
    root: Path | None,
    many_above: float,
    few_below: float,
    as_json: bool,
) -> None:
    """Make the training classes of balanced DATA exponentially rare; validation and test stay as they are.

    DATA is class folders, a table, a split file, a published name, list files, or CIFAR's binary version. The table is read by
    all that takes labelled data. Weights of training pictures stay with them.
    """
    plot = out.with_suffix(".svg") if plot is None else plot
    if out.suffix.lower() != ".csv":
        raise click.UsageError(f"--out must end in .csv, got {out.name}")
    if plot.suffix.lower() != ".svg":
        raise click.UsageError(f"--plot must end in .svg, got {plot.name}")
    from wordsight.data.long_tail import open_long_tail, skew
    from wordsight.data.split_table import write_split_table
    from wordsight.evaluate.charts import count_chart, own_file
    from wordsight.evaluate.results import write_atomically

    with listing_missing(out.parent, f"{out.stem}."):
        whole = open_long_tail(data, root)
    splits = skew(whole, factor, seed=seed, num_max=num_max, num_val=num_val)
    assert splits.train is not None
    counts = splits.train.counts()
    pictures = write_split_table(splits, out)
    label = f"Training pictures of each class of {splits.name}, factor {factor:g}"
    chart = count_chart(list(counts.values()), many_above=many_above, few_below=few_below, label=label)
    write_atomically(plot, own_file(chart))
    groups = _groups(counts, many_above, few_below)
    if as_json:
        found = {
            "out": str(out),
            "plot": str(plot),
            "pictures": None if pictures is None else str(pictures),
            "counts": counts,
            "groups": groups,
            "splits": {part: len(given) for part, given in splits.parts().items()},
            "notes": list(splits.notes),
        }
        click.echo(json.dumps(found, indent=1, ensure_ascii=False))
        return
    _print(splits, counts, groups)
    click.echo(f"Wrote {out} and {plot}" + ("." if pictures is None else f", and the pictures into {pictures}."))
    click.echo(f"Next: wordsight long-tail --data {out} --run runs/{out.stem}")


def _groups(counts: dict[str, int], many_above: float, few_below: float) -> dict[str, dict[str, int]]:
    """Classes and pictures of each group."""
    groups = {name: {"classes": 0, "pictures": 0} for name in ("many", "medium", "few")}
    for count in counts.values():
        group = groups["many" if count > many_above else "few" if count < few_below else "medium"]
        group["classes"] += 1
        group["pictures"] += count
    return groups


def _print(splits: Splits, counts: dict[str, int], groups: dict[str, dict[str, int]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("training", "classes", "pictures"):
        table.add_column(name, justify="left" if name == "training" else "right")
    for name, group in groups.items():
        table.add_row(name, f"{group['classes']:,}", f"{group['pictures']:,}")
    table.add_row("all", f"{len(counts):,}", f"{sum(counts.values()):,}")
    console = Console(highlight=False)
    console.print(table)
    first, last = next(iter(counts)), next(reversed(counts))
    console.print(escape(f"From {counts[first]:,} pictures of {first!r} to {counts[last]:,} of {last!r}."))
    for note in splits.notes:
        console.print(escape(note))
