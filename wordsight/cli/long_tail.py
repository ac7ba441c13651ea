"""`wordsight long-tail`: methods for classes of unequal size compared, methods x seeds, into a run folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wordsight.cli.classify import read_labels
from wordsight.cli.loading import DEVICES, QUICKSTART, load_model
from wordsight.cli.missing import listing_missing

if TYPE_CHECKING:
    from wordsight.adapt.grid_methods import GridRequest


@click.command(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""\b
Examples:
  wordsight long-tail --model ViT-B-16.pt --data photos-lt.csv --methods all --run runs/photos
  wordsight long-tail --recipe imagenet-lt-b16          (says what it takes; with --data and --run it begins)
""",
)
@click.option("--model", "path", default=QUICKSTART, show_default=True, metavar="PATH", help="All that wordsight.load takes.")
@click.option("--data", metavar="DATA", help="Class folders, table, list files, published name or sample:SPLIT.")
@click.option("--run", "run_dir", type=click.Path(file_okay=False, path_type=Path), help="Run folder.")
@click.option("--recipe", metavar="NAME", help="A published study, see the second example.")
@click.option("--methods", metavar="A,B", help="See above.  [default: all]")
@click.option("--seeds", metavar="A,B", help="Each learns anew.  [default: 1,2,3]")
@click.option("--budget", type=float, metavar="SECONDS", help="No cell begins later.")
@click.option("--set", "settings", multiple=True, metavar="METHOD.KEY=VALUE", help="Of an estimator: decoder.steps=500.")
@click.option("--many-above", type=float, default=100, show_default=True, help="Classes with more training pictures are many.")
@click.option("--few-below", type=float, default=20, show_default=True, help="Classes with fewer are few.")
@click.option("--classes", metavar="A,B|FILE", help="All class names. Default: those of the data.")
@click.option("--test", metavar="DATA", help="What to judge by, instead of the data's own test split.")
@click.option("--val", metavar="DATA", help="What to choose by, instead of the data's own.")
@click.option("--weights", type=click.Path(dir_okay=False, path_type=Path), help="Table of path,weight of training pictures.")
@click.option("--root", type=click.Path(path_type=Path), help="Folder of published data sets, or of listed pictures.")
@click.option("--architecture", metavar="NAME", help="See `wordsight models`; where the file does not say it.")
@click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True)
@click.option("--quiet", is_flag=True, help="No progress.")
def command(
    path: str,
    data: str | None,
    run_dir: Path | None,
    recipe: str | None,
    methods: str | None,
    seeds: str | None,
    budget: float | None,
    settings: tuple[str, ...],
    many_above: float,
    few_below: float,
    classes: str | None,
    test: str | None,
    val: str | None,
    weights: Path | None,
    root: Path | None,
    architecture: str | None,
    device: str,
    quiet: bool,
) -> int:
    """Compare methods for classes of unequal size on a frozen model: a grid of methods and seeds, a table, a report.

    A grid that was stopped goes on with the same command; one that is done can be asked for more methods or seeds. Exit code 1
    where a cell failed.

    \b
    Methods: all    zero_shot, linear_probe, decoder+LOSS, decoder+cross_entropy+STAGE
             coop   coop+LOSS, learned prompts; each step costs as much as all classes' texts
             tuned  projection+LOSS, and what looks at pictures anew: fine_tune+LOSS+PART, lift;
                    projection and fine_tune with +wise_ft behind it too
             or names of such cells, with commas between
    A recipe's methods and settings give way to those that are named beside it.
    """
    if data is None or run_dir is None:
        return _say_recipe(recipe, "--data" if data is None else "--run")
    names = None if classes is None else read_labels(classes, "'--classes'")
    words = {
        "model": path,
        "architecture": architecture,
        "data": data,
        "root": None if root is None else str(root),
        "test": test,
        "val": val,
        "classes": classes,
        **({} if weights is None else {"weights": str(weights)}),
    }
    if recipe is not None:
        words["recipe"] = recipe
    request = _request(recipe, methods, seeds, settings, many_above, few_below, words)
    if budget is not None and not 0 < budget < float("inf"):
        raise click.BadParameter(f"give seconds above 0; got {budget:g}", param_hint="'--budget'")

    from wordsight.adapt.grid import run_grid
    from wordsight.adapt.pictures import open_data

    with listing_missing(run_dir):
        splits = open_data(data, root=root, classes=names, test=test, val=val, weights=weights)
    model = load_model(path, architecture, device)

    def say(text: str) -> None:
        if not quiet:
            from tqdm import tqdm

            tqdm.write(text, file=sys.stderr)  # beside a bar, not through it

    summary = run_grid(model, splits, run_dir, request, budget_s=budget, progress=not quiet and sys.stderr.isatty(), say=say)
    _print_summary(summary, run_dir)
    return int(bool(summary["failed"]))


def _say_recipe(recipe: str | None, missing: str) -> int:
    """What a recipe is, where it is not to be run."""
    if recipe is None:
        raise click.UsageError(f"Missing option '{missing}'.")
    from wordsight.adapt.tail_recipes import find_recipe

    try:
        click.echo(find_recipe(recipe).describe())
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="'--recipe'") from error
    return 0


def _request(
    recipe: str | None,
    methods: str | None,
    seeds: str | None,
    settings: tuple[str, ...],
    many_above: float,
    few_below: float,
    words: dict[str, Any],
) -> GridRequest:
    """What is asked, checked before a model is loaded.

    Raises:
        click.UsageError: what can't be meant.
    """
    from wordsight.adapt.grid_methods import GridRequest, read_methods
    from wordsight.adapt.learn import split_settings
    from wordsight.adapt.tail_recipes import find_recipe

    try:
        drawn = None if seeds is None else tuple(int(seed) for seed in seeds.split(","))
    except ValueError as error:
        raise click.BadParameter(f"write whole numbers with commas between; got {seeds!r}", param_hint="'--seeds'") from error
    try:
        start = GridRequest() if recipe is None else find_recipe(recipe).request
        own = split_settings(settings)
        return GridRequest(
            methods=start.methods if methods is None else read_methods(methods),
            seeds=start.seeds if drawn is None else drawn,
            parameters={name: {**start.parameters.get(name, {}), **own.get(name, {})} for name in (*start.parameters, *own)},
            many_above=many_above,
            few_below=few_below,
            words=words,
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _print_summary(summary: dict[str, Any], run_dir: Path) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.measure import Measurement
    from rich.table import Table

    from wordsight.adapt.costs import in_all
    from wordsight.adapt.grid_figures import COLUMNS
    from wordsight.evaluate.report import figure

    table = Table(box=None, pad_edge=False)
    table.add_column("method", no_wrap=True)
    for name in (*COLUMNS.values(), "validation", "seconds", "MB", "J", "g CO2"):
        table.add_column(name, justify="right")
    for row in summary["methods"]:
        shown = [row["metrics"].get(name) for name in COLUMNS] + [row["validation"]]
        cost = row["cost"]
        costs = [f"{cost['seconds']:.1f}", f"{cost['peak_memory_bytes'] / 1e6:,.0f}", f"{cost['energy_joules']:,.0f}"]
        costs.append(f"{cost['carbon_g']:.3f}")
        figures = [figure(None if one is None else one["value"], "fraction") for one in shown]
        table.add_row(escape(row["method"]), *figures, *costs, style="bold" if row["kept"] else None)
    console = Console(highlight=False)
    needed = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    Console(highlight=False, width=max(console.width, needed)).print(table)  # a narrow screen cuts no figure off
    click.echo(summary["kept"]["sentence"])
    for note in summary["notes"]:
        click.echo(f"Note: {note}.")
    for one in summary["failed"]:
        click.echo(f"Failed: {one['method']}, seed {one['seed']}: {one['why']}", err=True)
    if summary["left"]:
        click.echo(f"{len(summary['left'])} cells are left: the same command goes on with them.")
    click.echo(in_all(summary["costs"]["total"]))
    click.echo(f"Table: {run_dir / 'table.csv'}. Report: {run_dir / 'report.html'}.")
    click.echo(f"Next: wordsight predict --run {run_dir} PICTURE")
