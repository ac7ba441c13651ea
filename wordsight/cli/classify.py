"""`wordsight classify`: name pictures from your own list of labels.

Shape legend: N pictures, C labels, D embedding width.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wordsight.cli.loading import DEVICES, QUICKSTART, load_model

if TYPE_CHECKING:
    from torch import Tensor


@click.command(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""\b
Examples:
  wordsight classify cat.jpg dog.png --labels "cat,dog,traffic light"
  wordsight classify photos/*.jpg --labels labels.txt --model ViT-B-32.pt --json
""",
)
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
@click.option("--labels", required=True, metavar="A,B,C|FILE", help="With commas between, or a text file with one a line.")
@click.option("--model", "path", default=QUICKSTART, show_default=True, metavar="PATH", help="Folder, run folder, file or name.")
@click.option("--architecture", metavar="NAME", help="See `wordsight models`; where the file does not say it.")
@click.option(
    "--prompts", metavar="SET", help="simple, name, imagenet80 or a file of templates. Default: the model's, or simple."
)
@click.option("--top", type=click.IntRange(1), default=5, show_default=True, help="Labels shown for each picture.")
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True, help="Pictures at once.")
@click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="JSON for programs, and no progress.")
def command(
    images: tuple[str, ...],
    labels: str,
    path: str,
    architecture: str | None,
    prompts: str | None,
    top: int,
    batch_size: int,
    device: str,
    as_json: bool,
) -> None:
    """Name pictures from your own list of labels.

    A picture's probabilities are the softmax over the labels of its scaled similarities with their prompts; a model with a bias
    (a sigmoid model) gives each label its own probability, and they need not sum to 1.
    """
    names = read_labels(labels)
    missing = [image for image in images if not Path(image).is_file()]
    if missing:
        raise click.BadParameter(f"no such picture: {', '.join(missing[:5])}", param_hint="'IMAGE...'")

    from wordsight.evaluate.prompts import class_embeddings, own_prompts, prompt_templates
    from wordsight.evaluate.scoring import pair_scores

    prompt_templates(prompts or "simple")  # a wrong name fails before the model is loaded
    model = load_model(path, architecture, device)
    templates = prompt_templates(prompts or own_prompts(model))
    classes_CD = class_embeddings(model, names, templates)
    images_ND = model.embed_images(
        images, batch_size=batch_size, progress=not as_json and sys.stderr.isatty() and len(images) > 20
    )
    similarities_NC = pair_scores(model)(images_ND, classes_CD)
    rows = rank(similarities_NC, probabilities(model, similarities_NC), images, names, top)
    if as_json:
        click.echo(json.dumps(rows, indent=1, ensure_ascii=False))
    else:
        print_answers(rows)
        if model.logit_bias is not None:
            click.echo("Each label has its own probability (a sigmoid, not a softmax): a picture's need not sum to 100%.")


def read_labels(labels: str, hint: str = "'--labels'") -> list[str]:
    """The labels in a text file (one a line, `#` starts a comment) or between commas.

    Raises:
        click.BadParameter: none, one twice, or a file that is not there.
    """
    if Path(labels).is_file():
        try:
            lines = Path(labels).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise click.BadParameter(f"{labels} is not a text file in UTF-8: {error.reason}", param_hint=hint) from error
        names = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    elif labels.endswith((".txt", ".csv", ".tsv")):
        raise click.BadParameter(f"no such file: {labels}", param_hint=hint)
    else:
        names = [name.strip() for name in labels.split(",") if name.strip()]
    if not names:
        raise click.BadParameter(f"no label in {labels!r}: write cat,dog or a file with one a line", param_hint=hint)
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise click.BadParameter(f"given more than once: {', '.join(twice[:5])}", param_hint=hint)
    return names


def probabilities(model: Any, similarities_NC: Tensor) -> Tensor:
    """softmax(exp(log_scale) x similarity) over the labels; sigmoid(... + bias) for each where the model has a bias."""
    import torch

    with torch.no_grad():
        logits_NC = model.log_scale.detach().float().cpu().exp() * similarities_NC
        if model.logit_bias is not None:
            return torch.sigmoid(logits_NC + model.logit_bias.detach().float().cpu())
        return logits_NC.softmax(dim=1)


def rank(
    similarities_NC: Tensor, probabilities_NC: Tensor, images: Sequence[str], names: Sequence[str], top: int
) -> list[dict[str, Any]]:
    """For each picture its likeliest `top` labels, best first."""
    rows = []
    # by similarity: probabilities of a sharp model may be equal in float32
    order_NK = similarities_NC.topk(min(top, len(names)), dim=1).indices.tolist()
    for image, order, similarity_C, probability_C in zip(
        images, order_NK, similarities_NC.tolist(), probabilities_NC.tolist(), strict=True
    ):
        labels = [{"label": names[c], "probability": probability_C[c], "similarity": similarity_C[c]} for c in order]
        rows.append({"image": image, "labels": labels})
    return rows


def print_answers(rows: Sequence[dict[str, Any]]) -> None:
    """A table of pictures with their labels and probabilities."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("Picture", overflow="fold")
    table.add_column("Label", overflow="fold")
    table.add_column("Probability", justify="right")
    table.add_column("")
    for row in rows:
        for place, entry in enumerate(row["labels"]):
            share = entry["probability"]
            bar = Text("█" * round(20 * share), style="green" if place == 0 else "dim")
            picture, label = Text(row["image"] if place == 0 else ""), Text(entry["label"], style="bold" if place == 0 else "")
            table.add_row(picture, label, f"{share:.1%}", bar)
    Console().print(table)
