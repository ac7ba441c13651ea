"""`wordsight adapt`: a classifier from a few labelled pictures, into a run folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wordsight.cli.classify import read_labels
from wordsight.cli.loading import DEVICES, QUICKSTART, load_model
from wordsight.cli.missing import listing_missing

if TYPE_CHECKING:
    from wordsight.adapt.run import Request


@click.command(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""\b
Examples:
  wordsight adapt --model ViT-B-32.pt --data photos/ --method coop --shots 16 --run runs/photos
  wordsight adapt --model ViT-B-32.pt --data split.json --method auto --budget 300 --run runs/auto
""",
)
@click.option("--model", "path", default=QUICKSTART, show_default=True, metavar="PATH", help="What wordsight.load takes.")
@click.option("--data", required=True, metavar="DATA", help="Folder, table, split file, name.")
@click.option("--run", "run_dir", required=True, type=click.Path(file_okay=False, path_type=Path), help="Run folder.")
@click.option("--method", default="auto", show_default=True, metavar="NAME", help="See above.")
@click.option("--shots", default="16", show_default=True, metavar="K|all", help="Pictures a class.")
@click.option("--allow-fewer", is_flag=True, help="A class may have fewer pictures.")
@click.option("--seeds", default="1,2,3", show_default=True, metavar="A,B", help="Of the draws.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Of the method; with auto METHOD.KEY=VALUE.")
@click.option("--loss", metavar="NAME", help="balanced_softmax, ldam, ...: as --set loss=NAME.")
@click.option("--stage2", metavar="NAME", help="marc, tau, ...: of the decoder; wise_ft of others.")
@click.option("--classes", metavar="A,B|FILE", help="All class names. Default: those of the data.")
@click.option("--test", "tests", multiple=True, metavar="DATA", help="Judge by this, not by the data's own split.")
@click.option("--val", metavar="DATA", help="Choose by this, not by the data's own split.")
@click.option("--weights", type=click.Path(dir_okay=False, path_type=Path), help="Table of path,weight of training pictures.")
@click.option("--root", type=click.Path(path_type=Path), help="Of published data sets, or a table's pictures.")
@click.option("--protocol", default="few_shot", show_default=True, metavar="NAME", help="See above.")
@click.option("--budget", type=float, metavar="SECONDS", help="Of auto, for all seeds.  [default: 600]")
@click.option("--architecture", metavar="NAME", help="Where the file does not say it.")
@click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True)
@click.option("--quiet", is_flag=True, help="No progress.")
def command(
    path: str,
    data: str,
    run_dir: Path,
    method: str,
    shots: str,
    allow_fewer: bool,
    seeds: str,
    settings: tuple[str, ...],
    loss: str | None,
    stage2: str | None,
    classes: str | None,
    tests: tuple[str, ...],
    val: str | None,
    weights: Path | None,
    root: Path | None,
    protocol: str,
    budget: float | None,
    architecture: str | None,
    device: str,
    quiet: bool,
) -> None:
    """Learn a classifier from a few labelled pictures on a frozen model, judge it, keep it.

    Settings are chosen on validation pictures, never on test. A run that was stopped goes on with the same command. Shots 0 is
    zero-shot; data may be a published name or sample:SPLIT too.

    \b
    Methods:   auto (tries them), zero_shot, linear_probe, cross_modal_probe, coop,
               cocoop, tip_adapter, tip_adapter_f, clip_adapter, lp_plus_plus, clap,
               decoder, projection, fine_tune, lift (for many labels)
    Protocols: few_shot, base_to_new, cross_dataset, domain
    """
    names = None if classes is None else read_labels(classes, "'--classes'")
    words = {
        "model": path,
        "architecture": architecture,
        "data": data,
        "root": None if root is None else str(root),
        "test": list(tests),
        "val": val,
        "classes": classes,
        **({} if weights is None else {"weights": str(weights)}),
    }
    settings += _loss_and_stage(method, loss, stage2)
    request = _request(method, shots, allow_fewer, seeds, settings, protocol, budget, words)

    from wordsight.adapt.pictures import open_data
    from wordsight.adapt.run import adapt

    elsewhere = protocol in ("cross_dataset", "domain")
    if len(tests) > 1 and not elsewhere:
        raise click.UsageError(f"the protocol {protocol} is judged by one --test, got {len(tests)}")
    test = tests[0] if tests and not elsewhere else None
    with listing_missing(run_dir):
        splits = open_data(data, root=root, classes=names, test=test, val=val, weights=weights)
        others = [open_data(test, root=root) for test in tests] if elsewhere else []
    model = load_model(path, architecture, device)
    progress = not quiet and sys.stderr.isatty()

    def say(text: str) -> None:
        if not quiet:
            click.echo(text, err=True)

    summary = adapt(model, splits, run_dir, request, others=others, progress=progress, say=say)
    _print_summary(summary, run_dir)


def _loss_and_stage(method: str, loss: str | None, stage2: str | None) -> tuple[str, ...]:
    """--loss and --stage2 as settings, by the names that a grid's cells have.

    Raises:
        click.UsageError: no such loss or second stage, or no single method that they could be of.
    """
    for name, value in (("loss", loss), ("stage2", stage2)):
        if value is not None and method == "auto":
            raise click.UsageError(f"--{name} is of one method, such as --method decoder, got --method auto")
    if loss is None and stage2 is None:
        return ()
    from wordsight.adapt.grid_methods import STAGES, WISE_FT
    from wordsight.adapt.imbalanced import LOSSES

    if loss is not None and loss not in LOSSES:
        raise click.BadParameter(f"choose one of {', '.join(LOSSES)}; got {loss!r}", param_hint="'--loss'")
    if stage2 is not None and stage2 not in (*STAGES, WISE_FT):
        raise click.BadParameter(f"choose one of {', '.join((*STAGES, WISE_FT))}; got {stage2!r}", param_hint="'--stage2'")
    found = () if loss is None else (f"loss={loss}",)
    if stage2 == WISE_FT:
        return (*found, f"{WISE_FT}=validation")
    return found if stage2 is None else (*found, f"stage2={STAGES[stage2]}")


def _request(
    method: str,
    shots: str,
    allow_fewer: bool,
    seeds: str,
    settings: tuple[str, ...],
    protocol: str,
    budget: float | None,
    words: dict[str, Any],
) -> Request:
    """What is asked, checked before a model is loaded.

    Raises:
        click.BadParameter: what can't be meant.
    """
    from wordsight.adapt import METHODS
    from wordsight.adapt.protocol import PROTOCOLS

    if method not in (*METHODS, "auto"):
        raise click.BadParameter(f"choose one of {', '.join(METHODS)}, auto; got {method!r}", param_hint="'--method'")
    if protocol not in PROTOCOLS:
        raise click.BadParameter(f"choose one of {', '.join(PROTOCOLS)}; got {protocol!r}", param_hint="'--protocol'")
    if shots != "all" and not shots.isdecimal():
        raise click.BadParameter(f"write a whole number, or all; got {shots!r}", param_hint="'--shots'")
    try:
        drawn = tuple(int(seed) for seed in seeds.split(","))
    except ValueError as error:
        raise click.BadParameter(f"write whole numbers with commas between; got {seeds!r}", param_hint="'--seeds'") from error
    if len(set(drawn)) < len(drawn):
        raise click.BadParameter(f"each seed once; got {seeds}", param_hint="'--seeds'")

    from wordsight.adapt.learn import read_settings, split_settings
    from wordsight.adapt.run import Request

    try:
        parameters = split_settings(settings) if method == "auto" else read_settings(method, settings)
        return Request(
            method=method,
            shots="all" if shots == "all" else int(shots),
            seeds=drawn,
            allow_fewer=allow_fewer,
            parameters=parameters,
            protocol=protocol,
            budget_s=budget,
            words=words,
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _print_summary(summary: dict[str, Any], run_dir: Path) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from wordsight.adapt.costs import in_all
    from wordsight.evaluate.report import figure, metric_name

    table = Table(box=None, pad_edge=False, title_justify="left")
    for name in ("judged by", "metric", "value", "95% interval", "chance", "pictures"):
        table.add_column(name, justify="left" if name in ("judged by", "metric") else "right")
    rows = [
        (f"{one['data']} · {one['name']}", name, metric) for one in summary["tests"] for name, metric in one["metrics"].items()
    ]
    if summary["harmonic_mean"] is not None:
        rows.append(("base and new", "harmonic_mean", summary["harmonic_mean"]))
    for where, name, metric in rows:
        interval = " – ".join(figure(bound, "fraction") for bound in metric["ci95"])
        value, chance = figure(metric["value"], "fraction"), figure(metric["chance"], "fraction")
        table.add_row(escape(where), metric_name(name), value, interval, chance, f"{metric['count']:,}")
    Console().print(table)
    kept = summary["kept"]
    click.echo(f"Kept: {kept['method']} of seed {kept['seed']}. {kept['why']}")
    click.echo(summary["chosen_by"])
    click.echo(in_all(summary["costs"]["total"]))
    click.echo(f"Classifier: {run_dir / 'classifier'}. Report: {run_dir / 'report.html'}.")
    click.echo(f"Next: wordsight predict --run {run_dir} PICTURE")
