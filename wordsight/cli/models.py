"""`wordsight models`: the catalogue, with sizes."""

from __future__ import annotations

import click


@click.command(
    epilog="""\b
Examples:
  wordsight models
  wordsight models --json | python -c "import json, sys; print(len(json.load(sys.stdin)))"
"""
)
@click.option("--json", "as_json", is_flag=True, help="A JSON list, for programs.")
def command(as_json: bool) -> None:
    """List the models that `wordsight.create`, `wordsight.load` and recipes know by name, with their sizes.

    Published weights are QuickGELU; a name with -gelu is the same architecture with GELU, as most of open_clip's own weights are.
    """
    from wordsight.catalog import CATALOG

    rows = [
        {
            "name": entry.name,
            "parameters": entry.num_parameters,
            "embed_dim": entry.config.embed_dim,
            "image_size_px": entry.config.image.image_size_px,
            "context_length": entry.config.text.context_length,
            "activation": entry.config.activation,
            "paper": entry.paper,
            "summary": entry.summary,
        }
        for entry in CATALOG.values()
    ]
    if as_json:
        import json

        click.echo(json.dumps(rows, indent=2))
        return

    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title, justify in (
        ("Name", "left"),
        ("Parameters", "right"),
        ("Embed", "right"),
        ("Image", "right"),
        ("Activation", "left"),
        ("Paper", "left"),
    ):
        table.add_column(title, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for entry in CATALOG.values():
        config = entry.config
        size, side = f"{entry.num_parameters / 1e6:.1f} M", f"{config.image.image_size_px} px"
        table.add_row(entry.name, size, str(config.embed_dim), side, config.activation, entry.paper)
    Console().print(table)
