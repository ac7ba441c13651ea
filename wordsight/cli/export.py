"""`wordsight export`: the classifier of a run of `wordsight adapt` for programs without Wordsight."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""\b
Examples:
  wordsight export --run runs/photos --to arrays --out photos/
  wordsight export --run runs/photos --to onnx --out photos.onnx
""",
)
@click.option("--run", "run_dir", required=True, type=click.Path(path_type=Path), help="Run folder of `wordsight adapt`.")
@click.option("--to", "kind", required=True, type=click.Choice(["arrays", "onnx"]), help="What to write.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The folder (arrays) or file (onnx).")
def command(run_dir: Path, kind: str, out: Path) -> None:
    """Write the classifier of a run folder for programs without Wordsight.

    \b
    arrays  class vectors, scale, bias and class names, for features that you have: ten lines of NumPy name pictures
    onnx    image tower and classifier in one file: pixels in, logits out; needs the extra wordsight[onnx]
    """
    import wordsight
    from wordsight.adapt.export import to_arrays, to_onnx

    classifier = wordsight.load_classifier(run_dir)
    if kind == "arrays":
        folder = to_arrays(classifier, out)
        click.echo(f"Wrote {folder / 'classifier.npz'} and {folder / 'classes.json'}: {len(classifier.classes_)} classes.")
    else:
        path = to_onnx(classifier, out)
        click.echo(f"Wrote {path}: {len(classifier.classes_)} classes; onnxruntime gives PyTorch's logits.")
