"""`wordsight predict`: name pictures with the classifier of a run of `wordsight adapt`.

Shape legend: N pictures, C classes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from wordsight.cli.classify import print_answers
from wordsight.cli.loading import DEVICES


@click.command(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""\b
Examples:
  wordsight predict --run runs/photos new/*.jpg
  wordsight predict --run runs/photos cat.jpg --top 1 --json
""",
)
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
@click.option("--run", "run_dir", required=True, type=click.Path(path_type=Path), help="Of `wordsight adapt` or `long-tail`.")
@click.option("--top", type=click.IntRange(1), default=5, show_default=True, help="Classes shown for each picture.")
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True, help="Pictures at once.")
@click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="JSON for programs, and no progress.")
def command(images: tuple[str, ...], run_dir: Path, top: int, batch_size: int, device: str, as_json: bool) -> None:
    """Name pictures with the classifier that `wordsight adapt` kept in a run folder.

    A picture's probabilities are over the run's classes alone and sum to 1; the report says how far they can be trusted.
    """
    missing = [image for image in images if not Path(image).is_file()]
    if missing:
        raise click.BadParameter(f"no such picture: {', '.join(missing[:5])}", param_hint="'IMAGE...'")

    import wordsight
    from wordsight.adapt.features import LAYERS, image_features
    from wordsight.train.distributed import World, pick_device

    classifier = wordsight.load_classifier(run_dir)
    classifier.model.to(pick_device(device, World())).eval()
    progress = not as_json and sys.stderr.isatty() and len(images) > 20
    given: Any = images  # the decoder looks at pictures itself
    if classifier.layer in LAYERS:
        given = image_features(classifier.model, images, layer=classifier.layer, batch_size=batch_size, progress=progress)
    rows = answers(classifier, given, images, top)
    if as_json:
        click.echo(json.dumps(rows, indent=1, ensure_ascii=False))
    else:
        print_answers(rows)


def answers(classifier: Any, given: Any, images: tuple[str, ...], top: int) -> list[dict[str, Any]]:
    """For each picture its likeliest `top` classes, best first."""
    # by logits: probabilities of a sharp classifier may be equal
    logits_NC = classifier.logits(given).double()
    probabilities_NC = logits_NC.softmax(dim=1).tolist()
    names = [str(name) for name in classifier.classes_]
    order_NK = logits_NC.topk(min(top, len(names)), dim=1).indices.tolist()
    return [
        {"image": image, "labels": [{"label": names[c], "probability": probability_C[c]} for c in order]}
        for image, order, probability_C in zip(images, order_NK, probabilities_NC, strict=True)
    ]
