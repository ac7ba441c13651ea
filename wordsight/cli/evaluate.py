"""`wordsight evaluate`: figures of a model on a data set, or of several models on a suite, into a run folder with its report."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wordsight.cli.loading import DEVICES, in_processes, joined, load_model, processes_option
from wordsight.evaluate.prompt_sets import read_classes, read_glosses, set_names

if TYPE_CHECKING:
    from wordsight.evaluate import Embedded, Judgement
    from wordsight.evaluate.prompt_study import PromptStudy
    from wordsight.evaluate.results import Finding
    from wordsight.train.distributed import World

RUN_FILES = ("recipe.json", "environment.json", "results.json")
SETS = textwrap.fill(" ".join(set_names()), 76, initial_indent="  ", subsequent_indent="  ")


@click.command(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=f"""\b
Sets of classes and prompts:
{SETS}
\b
Examples:
  wordsight evaluate runs/quickstart --data sample:test-twemoji-unseen
  wordsight evaluate --suite quick --model runs/a --model runs/b --run runs/ab""",
)
@click.argument("model", required=False)
@click.option("--data", "specs", multiple=True, metavar="PATH", help="Shards, table, folder, sample:SPLIT; repeatable.")
@click.option("--suite", metavar="NAME", help="quick, failures, robustness, clip27, datacomp38, FILE.py.")
@click.option("--model", "models", multiple=True, metavar="[NAME=]PATH", help="A model of the suite; repeatable.")
@click.option(
    "--root", type=click.Path(file_okay=False, path_type=Path), default="data", help="Where a suite's data sets lie. [data]"
)
@click.option("--strict", is_flag=True, help="Exit code 1 where a suite lacks data.")
@click.option(
    "--task",
    type=click.Choice(["zero_shot", "retrieval", "all"]),
    default="all",
    metavar="NAME",
    help="zero_shot or retrieval. Default: all that the data allow.",
)
@click.option(
    "--prompts", metavar="SET", help="simple, name, a set, a file; study[:SET] compares them. Default: the model's own."
)
@click.option("--classes", metavar="SET", help="Of a set, or a file with one a line. Default: the data's.")
@click.option(
    "--ensemble",
    type=click.Choice(["embeddings", "probabilities"]),
    metavar="WHAT",
    help="Templates' mean of embeddings or probabilities. [embeddings]",
)
@click.option("--glosses", metavar="FILE", help="Lines of CLASS<tab>GLOSS, for 'CLASS (GLOSS)'.")
@click.option(
    "--captions", type=click.Choice(["all", "first"]), default="all", show_default=True, help="Of a picture, for retrieval."
)
@click.option("--split", metavar="NAME", help="Its name in results.json. Default: told from PATH.")
@click.option("--run", "--run-dir", "run_dir", type=click.Path(file_okay=False, path_type=Path), help="Run folder to write to.")
@click.option("--architecture", metavar="NAME", help="MODEL's, where the file does not say it.")
@click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True, metavar="N", help="Pictures at once.")
@processes_option
@click.option("--workers", type=click.IntRange(0), default=0, show_default=True, metavar="N", help="Processes that decode.")
@click.option(
    "--max-bad-share",
    type=click.FloatRange(0, 1),
    default=0.05,
    show_default=True,
    metavar="SHARE",
    help="Of pictures that can't be read; more are an error.",
)
@click.option(
    "--cache",
    envvar="WORDSIGHT_CACHE",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder where features are kept for next time. Default: $WORDSIGHT_CACHE, or none.",
)
@click.option("--reduced-decode", is_flag=True, help="Of large JPEGs: faster, a little different.")
@click.option("--json", "as_json", is_flag=True, help="Print the records as JSON, and no progress.")
def command(
    model: str | None,
    specs: tuple[str, ...],
    suite: str | None,
    models: tuple[str, ...],
    root: Path,
    strict: bool,
    task: str,
    prompts: str | None,
    classes: str | None,
    ensemble: str | None,
    glosses: str | None,
    captions: str,
    split: str | None,
    run_dir: Path | None,
    architecture: str | None,
    device: str,
    batch_size: int,
    processes: int,
    workers: int,
    max_bad_share: float,
    cache: Path | None,
    reduced_decode: bool,
    as_json: bool,
) -> int:
    """Measure MODEL on data: zero-shot classification by labels, retrieval by captions, each figure with interval and chance.

    MODEL is all that wordsight.load takes. results.json and report.html go to --run, else to MODEL's own run folder, else to
    runs/evaluate-MODEL. With --suite, many measurements of one or several models (quick: on embedded data); what is in --run
    already is not done again.
    """
    wording = Wording(prompts, classes, ensemble, glosses)
    asked = Asked(task, wording, captions, batch_size, workers, max_bad_share, reduced_decode, cache)
    if suite is not None:
        from wordsight.cli.evaluate_suite import run

        refuse_with_suite(specs, split, processes, asked)
        named = (*((model,) if model else ()), *models)
        return run(suite, named, root, run_dir, architecture, device, asked, strict, as_json)
    model, architecture = one_model(model, models, architecture)
    if not specs:
        raise click.UsageError("give --data PATH, or --suite NAME")
    if split is not None and len(specs) > 1:
        raise click.UsageError("--split names one data set, and there are several --data")
    refuse_wording(asked)
    code = in_processes(processes)
    if code is not None:
        return code
    with joined(device) as world:
        from wordsight.evaluate.prompts import own_prompts
        from wordsight.evaluate.suite import describe_model

        check_prompts(wording)  # a wrong name fails before the model is loaded
        loaded = load_model(model, architecture, device, world)
        folder = run_dir or default_run_dir(model)
        progress = not as_json and sys.stderr.isatty() and world.is_main
        about = {"name": folder.resolve().name, "source": model} | (describe_model(loaded) if world.is_main else {})
        records: list[dict[str, Any]] = []
        for spec in specs:
            records += _measure(
                loaded,
                spec,
                split,
                folder,
                replace(asked, wording=replace(wording, prompts=prompts or own_prompts(loaded))),
                _command(model, spec, folder),
                about,
                world,
                progress,
                not as_json,
            )
        if world.is_main:
            _tell(folder, loaded, records, as_json)
        world.wait()  # the others go when all is written, so that an error of the main process is everyone's
    return 0


def one_model(model: str | None, models: tuple[str, ...], architecture: str | None) -> tuple[str, str | None]:
    """(model, architecture) without a suite, where `--model` beside MODEL names the architecture, as it did before suites."""
    if model is None and len(models) == 1:
        return models[0], architecture
    if model is None:
        raise click.UsageError("name one MODEL; several are compared with --suite" if models else "Missing argument 'MODEL'.")
    if len(models) > 1 or (models and architecture is not None):
        raise click.UsageError("beside MODEL, --model names its architecture (--architecture); several models need --suite")
    return model, models[0] if models else architecture


def refuse_with_suite(specs: tuple[str, ...], split: str | None, processes: int, asked: Asked) -> None:
    """A usage error for what a suite says itself."""
    plain = asked.task == "all" and asked.captions == "all" and asked.wording == Wording() and not asked.reduced_decode
    if specs or split is not None or not plain:
        raise click.UsageError(
            "a suite says itself what is measured on what: leave out --data, --task, --prompts, --classes, --ensemble, "
            "--glosses, --captions, --split and --reduced-decode, or write a suite of your own (a Python file)"
        )
    if processes != 1:
        raise click.UsageError(
            "a suite runs in one process; start several commands, each with models of its own and the same --run"
        )


def refuse_wording(asked: Asked) -> None:
    """A usage error for classes or glosses that can't be read, and for what a prompt study says itself."""
    for option, given, read in (
        ("--classes", asked.wording.classes, read_classes),
        ("--glosses", asked.wording.glosses, read_glosses),
    ):
        try:
            if given is not None:
                read(given)
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint=f"'{option}'") from error
    if asked.wording.is_study and (asked.task == "retrieval" or asked.wording.ensemble is not None):
        raise click.UsageError("--prompts study compares prompts and ensembles for zero_shot: leave out --ensemble and retrieval")


def check_prompts(wording: Wording) -> None:
    """Raise a ValueError for prompts that can't be read."""
    from wordsight.evaluate.prompts import prompt_templates

    if wording.is_study:
        _study(wording, progress=False).templates()
    else:
        prompt_templates(wording.prompts or "simple")


@dataclass(frozen=True, slots=True)
class Wording:
    """How classes are asked for: the options of the same names."""

    prompts: str | None = None
    classes: str | None = None
    ensemble: str | None = None
    glosses: str | None = None

    @property
    def is_study(self) -> bool:
        """Whether prompts are compared instead of used."""
        return self.prompts is not None and (self.prompts == "study" or self.prompts.startswith("study:"))


@dataclass(frozen=True, slots=True)
class Asked:
    """What to measure, and how."""

    task: str
    wording: Wording
    captions: str
    batch_size: int
    workers: int
    max_bad_share: float
    reduced_decode: bool
    cache: Path | None


def _measure(
    model: Any,
    spec: str,
    split: str | None,
    folder: Path,
    asked: Asked,
    again: str,
    about: dict[str, Any],
    world: World,
    progress: bool,
    table: bool,
) -> list[dict[str, Any]]:
    """The records of one data set; the main process writes and prints them."""
    from wordsight.data.features_in import VectorSource
    from wordsight.evaluate import Judgement, embed_source, name_data, write_examples, write_results
    from wordsight.evaluate.kept import folder_name, kept_of, write_kept
    from wordsight.evaluate.prompt_study_report import write_study_plots

    embedded = embed_source(
        model,
        spec,
        batch_size=asked.batch_size,
        num_workers=asked.workers,
        max_bad_share=asked.max_bad_share,
        reduced_decode=asked.reduced_decode,
        progress=progress,
        world=world,
        cache=asked.cache,
    )
    data, part = name_data(spec, split)
    records: list[dict[str, Any]] = []
    for judgement in _judge(model, embedded, asked, progress, world):
        found = judgement.records(data, part)
        records += found
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            write_results(folder, found)
            kept = kept_of(judgement, data=data, split=part, model=about)
            write_kept(folder / "findings" / folder_name(kept), kept)
            if isinstance(judgement, Judgement):
                if not isinstance(embedded.source, VectorSource):  # which has no pictures to show
                    write_examples(folder, judgement, data, part, command=again)
            elif asked.wording.is_study:
                write_study_plots(folder, kept)
            if table:
                _print_table(judgement, data, part)
    return records


def _tell(folder: Path, model: Any, records: list[dict[str, Any]], as_json: bool) -> None:
    from wordsight.evaluate import write_report

    describe(folder, model)
    report = write_report(folder)
    if as_json:
        click.echo(json.dumps({"run": str(folder), "report": str(report), "results": records}, indent=1, ensure_ascii=False))
    else:
        click.echo(f"Results: {folder / 'results.json'}. Report: {report}.")


def default_run_dir(model: str) -> Path:
    """Where results go without --run: the run folder that the model belongs to, else `runs/evaluate-MODEL` here.

    A run folder is known by its files; a model in its `best/`, `last/` or `checkpoints/step-.../` belongs to it.
    """
    path = Path(model)
    for folder in (path, path.parent, path.parent.parent):
        if path.is_dir() and any((folder / name).is_file() for name in RUN_FILES):
            return folder
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.name if path.exists() else model).strip("-.") or "model"
    return Path("runs") / f"evaluate-{name}"


def _study(wording: Wording, progress: bool) -> PromptStudy:
    """The study that "study" or "study:SET" asks for."""
    from wordsight.evaluate.prompt_study import PromptStudy

    prompts = (wording.prompts or "").removeprefix("study").removeprefix(":") or None
    return PromptStudy(classes=wording.classes, prompts=prompts, glosses=wording.glosses, progress=progress)


def _judge(model: Any, embedded: Embedded, asked: Asked, progress: bool, world: World) -> list[Judgement | Finding]:
    """The measurements that are asked for; "all" leaves out what the data have no labels or captions for, and says so."""
    from wordsight.evaluate import MultiLabel, Retrieval, ZeroShot
    from wordsight.evaluate.multi_label import shows_several
    from wordsight.evaluate.prompt_sets import own_classes

    several = shows_several(embedded.source)
    has = {
        "zero_shot": several or any(label is not None for label in embedded.labels),
        "retrieval": any(embedded.captions),
    }
    if embedded.bad and world.is_main:
        click.echo(f"{len(embedded.bad)} samples could not be read:", err=True)
        for one in embedded.bad[:10]:
            click.echo(f"  {one.key}: {one.reason}", err=True)
    wording = asked.wording
    if wording.is_study:
        return [_study(wording, progress).judge(model, embedded, world=world)]
    tasks = [name for name in has if has[name]] if asked.task == "all" else [asked.task]
    if not tasks:
        raise ValueError("the data have neither labels nor captions: nothing can be measured on them")
    if asked.task == "all" and len(tasks) < len(has) and world.is_main:
        missing = "labels" if not has["zero_shot"] else "captions"
        click.echo(f"The data have no {missing}: measured {tasks[0]} only.", err=True)
    classes = wording.classes if wording.classes is not None else own_classes(embedded.source)
    prompts = wording.prompts or "simple"
    if several and (wording.ensemble == "probabilities" or wording.glosses is not None):
        raise ValueError("pictures of several labels are asked for by plain scores: leave out --ensemble and --glosses")
    evaluators: dict[str, ZeroShot | MultiLabel | Retrieval] = {
        "zero_shot": MultiLabel(classes=classes, prompts=prompts, progress=progress)
        if several
        else ZeroShot(
            classes=classes,
            prompts=prompts,
            ensemble="probabilities" if wording.ensemble == "probabilities" else "embeddings",
            glosses=wording.glosses,
            progress=progress,
        ),
        "retrieval": Retrieval(captions="first" if asked.captions == "first" else "all", progress=progress),
    }
    return [evaluators[name].judge(model, embedded, world=world) for name in tasks]


def _command(model: str, spec: str, folder: Path) -> str:
    """What measures this data set again: the words of this call where it was typed, the essential ones where it was not."""
    program = Path(sys.argv[0]).name
    if program in ("wordsight", "main.py", "__main__.py") and "evaluate" in sys.argv:
        return " ".join(["wordsight", *map(shlex.quote, sys.argv[sys.argv.index("evaluate") :])])
    return " ".join(["wordsight evaluate", *map(shlex.quote, [model, "--data", spec, "--run", os.fspath(folder)])])


def describe(folder: Path, model: Any) -> None:
    """Machine and versions of a folder that no training has described."""
    from wordsight.evaluate.results import write_atomically
    from wordsight.train.distributed import World
    from wordsight.train.log import describe_environment

    if not (folder / "environment.json").exists():
        start = {"step": 0, **describe_environment(World(), next(model.parameters()).device, 0)}
        del start["seed"]  # nothing here is random but the bootstrap, whose seed is fixed
        write_atomically(folder / "environment.json", json.dumps({"starts": [start]}, indent=1) + "\n")


def _print_table(judgement: Judgement | Finding, data: str, split: str) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from wordsight.evaluate.report import figure, metric_name

    table = Table(title=f"{judgement.task} · {escape(data)} · {escape(split)}", title_justify="left", caption_justify="left")
    table.caption = escape("; ".join([judgement.protocol, *judgement.notes]))
    table.add_column("metric")
    for name in ("value", "95% interval", "chance", "count"):
        table.add_column(name, justify="right")
    for name, metric in judgement.metrics.items():
        interval = " – ".join(figure(bound, metric.unit) for bound in metric.ci95)
        table.add_row(
            escape(metric_name(name)),
            figure(metric.value, metric.unit),
            interval,
            figure(metric.chance, metric.unit),
            f"{metric.count:,}",
        )
    Console().print(table)
