"""The contrastive study: every arm sees the same samples, intervals are Student's, the page keeps what is written by hand."""

import json
import re

import pytest

from studies import contrastive, pages


def test_every_arm_sees_the_same_samples() -> None:
    arms = {name: make() for name, make in contrastive.arms().items()}
    assert len(arms) == 12
    assert {recipe.steps * recipe.batch_size for recipe in arms.values()} == {contrastive.SAMPLES}
    rates = {name: arms[name].optim.lr / arms["CLIP"].optim.lr for name in ("CLIP-64", "CLIP", "CLIP-1024", "CLIP-4096")}
    assert rates == {"CLIP-64": 0.5, "CLIP": 1.0, "CLIP-1024": 2.0, "CLIP-4096": 4.0}
    # the weights' average forgets by the sample: the same share after 4,096 of them
    kept = {arms[name].ema_decay ** (4_096 / arms[name].batch_size) for name in rates}
    assert max(kept) - min(kept) < 1e-12
    data = {repr(recipe.data) for name, recipe in arms.items() if name != "LiT"}
    assert len(data) == 1, "but for LiT, whose pictures are larger and not augmented"


def test_an_interval_needs_three_seeds() -> None:
    assert contrastive.with_interval([0.1, 0.2, 0.3]) == "0.200 ± 0.248"  # 4.303 x .1 / sqrt 3
    assert contrastive.with_interval([0.1, 0.3]) == "0.200 (2 seeds)"
    assert contrastive.with_interval([0.1]) == "0.100 (1 seed)"


def test_the_page_keeps_what_is_written_by_hand(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "studies" / "contrastive.md"
    monkeypatch.setattr(contrastive, "PAGE", page)
    seed = {f"{split}/{metric}": 0.25 for split in (contrastive.SEEN, contrastive.UNSEEN) for metric in ("top1", "top5")}
    contrastive.write_page({"CLIP": [seed], "SigLIP-64": [seed] * 3})
    page.write_text(page.read_text().replace("# Contrastive", "By hand.\n\n# Contrastive") + "\nAnd below.\n")
    contrastive.write_page({"CLIP": [seed] * 3})
    text = page.read_text()
    assert text.startswith("By hand.")
    assert text.endswith("And below.\n")
    assert "SigLIP-64" not in text
    assert text.count("| CLIP | 0.250 ± 0.000 |") == 1
    assert text.count("| softmax, 256 (256 updates) | 0.250 ± 0.000 |") == 1


def test_the_pages_tables_are_those_of_its_figures() -> None:
    figures = json.loads(contrastive.PAGE.with_suffix(".json").read_text())
    assert {name: len(seeds) for name, seeds in figures.items()} == dict.fromkeys(contrastive.arms(), 3)
    between = re.search(f"{pages.BEGIN}\n(.*)\n{pages.END}", contrastive.PAGE.read_text(), re.DOTALL)
    assert between is not None
    assert between[1] == contrastive.tables(figures)
