"""`wordsight train`: a recipe into a run folder, or a run folder on from its last checkpoint."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("recipe", required=False)
@click.option(
    "--run",
    "--run-dir",
    "run_dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Run folder: made, or gone on with (--run-dir under torchrun).",
)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change a field of the recipe; may be repeated.")
@click.option(
    "--micro-batch",
    type=click.IntRange(1),
    help="Samples of a process in memory at once, exact (micro_batch_size of the recipe).",
)
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda", "mps"]))
@click.option("--processes", default=1, show_default=True, type=click.IntRange(1), help="Processes on this machine.")
@click.option("--dry-run", is_flag=True, help="Show recipe, sizes and memory, run two steps, write nothing.")
@click.option("--quiet", is_flag=True, help="No progress.")
def command(
    recipe: str | None,
    run_dir: Path | None,
    settings: tuple[str, ...],
    micro_batch: int | None,
    device: str,
    processes: int,
    dry_run: bool,
    quiet: bool,
) -> int:
    """Train by RECIPE: a name, or path/to/file.py:function. On a run folder that exists the run goes on where it was, bit for
    bit.

    \b
    Exit codes: 0 complete, 1 failed, 2 usage, 130 / 143 stopped by Ctrl-C / SIGTERM and saved.
    \b
    wordsight train clip --run runs/mine --set data.sources=pairs.csv --set epochs=5
    wordsight train --run runs/mine                # go on
    """
    if run_dir is None and not dry_run:
        raise click.UsageError("Missing option '--run': the folder that the run is written to, such as --run runs/first")
    if micro_batch is not None:
        settings = (*settings, f"micro_batch_size={micro_batch}")
    name, changes = _recipe_of(recipe, run_dir, settings)

    from wordsight.train.recipe import make_recipe

    resolved = make_recipe(name, changes)
    if dry_run:
        from wordsight.train.dry_run import dry_run as look

        look(resolved, device=device, processes=processes, say=click.echo)
        return 0
    assert run_dir is not None
    if processes > 1 and "WORLD_SIZE" not in os.environ:
        return _launch(name, run_dir, changes, device, processes, quiet)

    from wordsight.train.loop import fit

    outcome = fit(resolved, run_dir, device=device, origin={"recipe": name, "set": list(changes)}, progress=not quiet)
    if not outcome.complete:
        return 128 + (outcome.signal or 0)
    if os.environ.get("RANK", "0") == "0":
        if outcome.best is not None:
            click.echo(f"Best: {outcome.best['metric']} {outcome.best['value']:.4f} at step {outcome.best['step']}.")
        model = run_dir / ("best" if outcome.best else "last")
        click.echo(f"{outcome.step} steps done. Model: {model}. Report: {run_dir / 'report.html'}.")
        click.echo(f"Next: wordsight classify PICTURE --model {run_dir} --labels cat,dog")
    return 0


def _recipe_of(recipe: str | None, run_dir: Path | None, settings: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """The recipe's name and settings: those given, or those that the run folder was started with."""
    if recipe is not None:
        return recipe, settings
    if run_dir is None or not (run_dir / "recipe.json").exists():
        from wordsight.train.recipe import recipe_names

        where = f"; {run_dir} holds no run to go on with" if run_dir is not None else ""
        raise click.UsageError(
            f"Missing argument 'RECIPE'{where}. Recipes: {', '.join(recipe_names())}, or path/to/file.py:function"
        )
    from wordsight.train.rundir import read_recipe_file

    stored = read_recipe_file(run_dir)
    if "recipe" not in stored:
        raise click.UsageError(
            f"Missing argument 'RECIPE': {run_dir} was started from Python, which did not say its recipe's name"
        )
    return stored["recipe"], (*stored.get("set", ()), *settings)


def _launch(name: str, run_dir: Path, settings: tuple[str, ...], device: str, processes: int, quiet: bool) -> int:
    """The same command in `processes` processes."""
    from wordsight.train.distributed import launch

    arguments = ["train", name, "--run", str(run_dir), "--device", device]
    arguments += [part for setting in settings for part in ("--set", setting)] + (["--quiet"] if quiet else [])
    return launch([sys.executable, "-m", "wordsight", *arguments], processes)
