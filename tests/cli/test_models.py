"""`wordsight models`: the catalogue as a table and as JSON."""

from __future__ import annotations

import json

from click.testing import CliRunner

from wordsight.catalog import CATALOG
from wordsight.cli.models import command


def test_table_fits_a_terminal_and_names_every_model() -> None:
    done = CliRunner().invoke(command, [], env={"COLUMNS": "80"})
    assert done.exit_code == 0
    lines = done.output.splitlines()
    assert {line.split()[0] for line in lines[1:]} == set(CATALOG)
    row = next(line for line in lines if line.startswith("ViT-B/32 "))
    assert row.split() == ["ViT-B/32", "151.3", "M", "512", "224", "px", "quick_gelu", "arXiv", "2103.00020"]
    assert "…" not in done.output


def test_json_is_complete() -> None:
    rows = {row["name"]: row for row in json.loads(CliRunner().invoke(command, ["--json"]).output)}
    assert list(rows) == list(CATALOG)
    assert rows["RN50x4"]["parameters"] == 178_300_601
    assert rows["ViT-L/14@336-gelu"] == {
        "name": "ViT-L/14@336-gelu",
        "parameters": 427_944_193,
        "embed_dim": 768,
        "image_size_px": 336,
        "context_length": 77,
        "activation": "gelu",
        "paper": "arXiv 2103.00020",
        "summary": CATALOG["ViT-L/14@336-gelu"].summary,
    }


def test_help_fits_a_screen_with_two_examples() -> None:
    text = CliRunner().invoke(command, ["--help"], terminal_width=80, prog_name="wordsight models").output
    assert len(text.splitlines()) <= 24
    assert text.count("  wordsight models") == 2
