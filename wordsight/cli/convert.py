"""`wordsight convert`: write a checkpoint in another library's format."""

from __future__ import annotations

from pathlib import Path

import click

LAYOUTS = ("wordsight", "open_clip", "huggingface")
NEXT = {
    "wordsight": "wordsight.load({folder!r})",
    "open_clip": "open_clip.create_model_and_transforms('local-dir:{folder}')",
    "huggingface": "transformers.CLIPModel.from_pretrained({folder!r})",
}


@click.command(
    epilog="""\b
Examples:
  wordsight convert ~/.cache/clip/ViT-B-32.pt vit-b-32 --to huggingface
  wordsight convert epoch_32.pt mine --to wordsight --model ViT-B/16-gelu
"""
)
@click.argument("src")
@click.argument("dst", type=click.Path(file_okay=False, path_type=Path))
@click.option("--to", required=True, type=click.Choice(LAYOUTS), help="Whose format to write.")
@click.option("--model", metavar="NAME", help="The architecture (see `wordsight models`), where SRC does not say it.")
def command(src: str, dst: Path, to: str, model: str | None) -> None:
    """Write the checkpoint SRC as the folder DST in another library's format.

    SRC is a folder (wordsight, open_clip, transformers, a run), a file (.pt, .bin, .safetensors, OpenAI's archive) or a
    catalogue name with local weights. DST gets weights (bit by bit), architecture, tokenizer and preprocessing.
    """
    import warnings

    import wordsight

    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always", UserWarning)
        folder = wordsight.convert(src, dst, to=to, model=model)
    for note in notes:
        click.echo(f"Note: {note.message}", err=True)
    click.echo(f"Wrote {folder}: {', '.join(sorted(p.name for p in folder.iterdir()))}")
    click.echo(f"Load it with {NEXT[to].format(folder=str(folder))}")
