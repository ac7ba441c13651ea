"""Pictures of several labels: figures beside scikit-learn's, what is refused, and the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from sklearn.metrics import average_precision_score

import wordsight
from tests.data.make import write_tar
from tests.data.test_evaluation_layouts import clip_benchmark, npy
from tests.evaluate.conftest import COLOURS, ColourModel, picture
from wordsight.cli.evaluate import command
from wordsight.data.sources import open_source
from wordsight.evaluate import MultiLabel, embed_source
from wordsight.evaluate.prompts import class_embeddings

NAMES = ("red", "green", "blue")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures between colours, each with the labels of those that are in it, and one label that is wrong."""
    draw = np.random.default_rng(0)
    shown = (draw.random((30, 3)) < 0.4).astype(np.int64)
    shown[:3] = np.eye(3)
    members = []
    for i, row in enumerate(shown):
        parts = [COLOURS[name] for name, is_there in zip(NAMES, row, strict=True) if is_there] or [COLOURS["grey"]]
        colour = tuple(int(x) for x in np.mean(parts, axis=0) + draw.integers(0, 20, 3))
        members += [(f"s{i:04d}.png", picture(colour)), (f"s{i:04d}.npy", npy(1 - row if i == 9 else row))]  # type: ignore[arg-type]
    root = tmp_path / "wds_colours"
    (root / "test").mkdir(parents=True)
    write_tar(root / "test" / "0.tar", sorted(members))
    (root / "classnames.txt").write_text("\n".join(NAMES) + "\n")
    (root / "dataset_type.txt").write_text("multilabel\n")
    return root


def test_figures_are_scikit_learns(model: ColourModel, folder: Path) -> None:
    embedded = embed_source(model, folder)
    found = MultiLabel(prompts="name").judge(model, embedded)
    scores_NC = (embedded.images_ND @ class_embeddings(model, NAMES, ("{label}",)).T).numpy()
    source: Any = embedded.source
    truth = np.array([[name in source[i].meta["labels"] for name in NAMES] for i in embedded.positions])
    assert found.metrics["map"].value == pytest.approx(average_precision_score(truth, scores_NC, average="macro"))
    any_right = truth[np.arange(30), scores_NC.argmax(1)]
    assert found.metrics["top1_any"].value == any_right.mean()
    assert found.metrics["top1_any"].chance == pytest.approx(truth.mean())
    assert 0 < found.metrics["map_11_point"].value < 1
    assert found.metrics["map"].chance < found.metrics["map"].value  # type: ignore[operator]
    assert found.outcomes[0].values.tolist() == any_right.tolist()
    assert "several labels a picture, 3 classes" in found.protocol


def test_labels_are_in_the_fingerprint(model: ColourModel, folder: Path) -> None:
    """They are not in the listing of the pictures, which has the label of those that have one."""
    embedded = embed_source(model, folder)
    source = open_source(folder)

    class Other:
        kind, classes, names = "multilabel", NAMES, {}

        def __getitem__(self, index: int) -> Any:
            sample = source[index]
            return replace(sample, meta={"labels": NAMES}) if index == 5 else sample

    one = MultiLabel().judge(model, embedded)
    assert one.fingerprint == MultiLabel().judge(model, folder).fingerprint
    assert one.fingerprint != MultiLabel().judge(model, replace(embedded, source=Other())).fingerprint  # type: ignore[arg-type]


def test_what_is_refused(model: ColourModel, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one label a picture or none: measure them by ZeroShot"):
        MultiLabel().judge(model, clip_benchmark(tmp_path / "single", [0, 1, 2]))
    with pytest.raises(ValueError, match="1 labels of the data are not among the 2 given classes"):
        MultiLabel(classes=("red", "green")).judge(model, folder)
    with pytest.raises(ValueError, match=r"1 classes have no picture.*'purple'"):
        MultiLabel(classes=(*NAMES, "purple")).judge(model, folder)


def test_on_the_command_line(folder: Path, tmp_path: Path) -> None:
    wordsight.save(wordsight.create("clip-tiny"), tmp_path / "tiny")
    words = [str(tmp_path / "tiny"), "--data", str(folder), "--run", str(tmp_path / "run")]
    done = CliRunner().invoke(command, [*words, "--json"])
    assert done.exit_code == 0, done.output
    assert [one["metric"] for one in json.loads(done.stdout)["results"]] == ["map", "map_11_point", "top1_any"]
    assert "mAP, 11-point" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    refused = CliRunner().invoke(command, [*words, "--ensemble", "probabilities"])
    assert "leave out --ensemble and --glosses" in str(refused.exception)
