"""`wordsight quickstart`: from nothing to a trained, judged CLIP that answers, on the embedded pictures."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wordsight.cli.loading import DEVICES, QUICKSTART

if TYPE_CHECKING:
    from rich.console import Console

    from wordsight.evaluate import Embedded, Judgement

# what is judged: split of the embedded data -> what it asks
JUDGED = {
    "test-twemoji-seen": "names that were trained, in a drawing that was not",
    "test-twemoji-unseen": "names that were never trained, in a drawing that was not",
    "unseen-noto": "names that were never trained, in a trained drawing",
    "unseen-fluent": "names that were never trained, in another trained drawing",
}
QUESTIONS = ("red fruit", "a boat on the water", "angry face", "musical instrument", "winter sport", "clock")


@click.command(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""\b
Examples:
  wordsight quickstart
  wordsight quickstart --run runs/try --steps 50 --seed 1
""",
)
@click.option(
    "--run",
    "run_dir",
    default=QUICKSTART,
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Run folder.",
)
@click.option("--steps", type=click.IntRange(1), help="Updates; fewer only show that everything works. Default: the recipe's.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of weights, order and augmentation.")
@click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True)
def command(run_dir: Path, steps: int | None, seed: int, device: str) -> int:
    """Train a small CLIP on the embedded pictures, judge it, ask it things.

    It learns from emoji in two drawings and from clip art, minutes on 2 CPU cores; then it names a third drawing that it never
    saw, and concepts that it never saw. A run that was stopped goes on where it was; a finished one is judged again.
    """
    from rich.console import Console

    from wordsight.train.loop import fit
    from wordsight.train.recipe import make_recipe

    console = Console()
    settings = tuple(f"{key}={value}" for key, value in (("steps", steps), ("seed", seed or None)) if value is not None)
    recipe = make_recipe("quickstart", settings)
    console.rule("[bold]1. Train", align="left")
    started = time.monotonic()
    outcome = fit(recipe, run_dir, device=device, origin={"recipe": "quickstart", "set": list(settings)})
    if not outcome.complete:
        return 128 + (outcome.signal or 0)
    trained = time.monotonic()
    console.print(f"{outcome.total_steps} updates, {trained - started:.0f} s.")

    import wordsight
    from wordsight.train.distributed import World, pick_device

    model = wordsight.load(run_dir).to(pick_device(device, World()))
    console.rule("[bold]2. Judge", align="left")
    judgements = _judge(console, model, run_dir)
    console.rule("[bold]3. Ask", align="left")
    _classify(console, judgements["test-twemoji-seen"])
    _search(console, model, [judgement.embedded for judgement in list(judgements.values())[:2]])
    console.rule("[bold]Done", align="left")
    console.print(f"In {time.monotonic() - started:.0f} s, of which training {trained - started:.0f} s.")
    console.print(f"Report: {run_dir / 'report.html'} (open it in a browser)\nModel:  {run_dir}")
    console.print(
        f"Next:   wordsight classify YOUR_PICTURE.png --model {run_dir} --labels 'red apple,sailboat,snowman'", soft_wrap=True
    )
    return 0


def _judge(console: Console, model: Any, run_dir: Path) -> dict[str, Judgement]:
    """Zero-shot figures on every judged split, into results.json, the gallery and the report."""
    from rich.table import Table

    from wordsight.evaluate import ZeroShot, embed_source, name_data, write_examples, write_report, write_results
    from wordsight.evaluate.report import figure

    table = Table(box=None, pad_edge=False)
    for name, justify in (
        ("", "left"),
        ("R@1", "right"),
        ("95% interval", "right"),
        ("R@5", "right"),
        ("chance R@1", "right"),
        ("names", "right"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    judgements = {}
    for split, meaning in JUDGED.items():
        spec = f"sample:{split}"
        judgement = ZeroShot(prompts="name").judge(model, embed_source(model, spec))
        data, part = name_data(spec)
        write_results(run_dir, judgement.records(data, part))
        write_examples(run_dir, judgement, data, part, command=f"wordsight evaluate {run_dir} --data {spec}")
        top1, top5 = judgement.metrics["top1"], judgement.metrics["top5"]
        shown = [figure(value, top1.unit) for value in (top1.value, *top1.ci95, top5.value, top1.chance)]
        table.add_row(meaning, shown[0], f"{shown[1]} – {shown[2]}", shown[3], shown[4], f"{len(judgement.texts):,}")
        judgements[split] = judgement
    write_report(run_dir)
    console.print(table)
    return judgements


def _classify(console: Console, judgement: Judgement, pictures: int = 8) -> None:
    """A few pictures, evenly from the test set, with the three likeliest of all its names."""
    from rich.table import Table

    rows = judgement.rows[:: max(1, len(judgement.rows) // pictures)][:pictures]
    scores = judgement.embedded.images_ND[rows.tolist()] @ judgement.texts_MD.T
    table = Table(
        box=None, pad_edge=False, title=f"Classify: Twemoji pictures among {len(judgement.texts):,} names", title_justify="left"
    )
    table.add_column("picture of")
    table.add_column("is taken for")
    for row, best in zip(rows.tolist(), scores.topk(3).indices.tolist(), strict=True):
        label = judgement.embedded.labels[row]
        names = [f"[bold green]{judgement.texts[i]}[/]" if judgement.texts[i] == label else judgement.texts[i] for i in best]
        table.add_row(label, ", ".join(names))
    console.print(table)


def _search(console: Console, model: Any, collections: list[Embedded]) -> None:
    """The nearest Twemoji pictures to some words, of all, trained names and untrained ones."""
    import torch
    from rich.table import Table

    labels = [label for embedded in collections for label in embedded.labels]
    scores = model.embed_texts(list(QUESTIONS)) @ torch.cat([embedded.images_ND for embedded in collections]).T
    table = Table(box=None, pad_edge=False, title=f"Search: {len(labels):,} Twemoji pictures by words", title_justify="left")
    table.add_column("words")
    table.add_column("pictures found, by their names")
    for question, best in zip(QUESTIONS, scores.topk(5).indices.tolist(), strict=True):
        table.add_row(question, ", ".join(str(labels[i]) for i in best))
    console.print(table)
