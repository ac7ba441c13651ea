"""The data's options through a recipe: settings by name, mixtures and their counts in the log, stores, exact resuming."""

from __future__ import annotations

import io
import json
import signal
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from wordsight.data.sources import DataSource
from wordsight.train.distributed import World
from wordsight.train.loop import fit
from wordsight.train.recipe import Recipe, make_recipe
from wordsight.train.setup import Parts, build
from wordsight.types import Batch


def shard(first: int, number: int) -> bytes:
    """Pictures with a caption, a weight and two negatives each."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for i in range(first, first + number):
            image = io.BytesIO()
            Image.new("RGB", (24, 24), (i * 9 % 256, 100, 200 - i)).save(image, "PNG")
            about = {
                "caption": f"a picture {i}",
                "weight": 1 + i % 2,
                "negatives": [f"not {i}", f"never {i}"],
                "label": f"l{i % 3}",
            }
            for suffix, data in (("png", image.getvalue()), ("json", json.dumps(about).encode())):
                info = tarfile.TarInfo(f"{i:03d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


@pytest.fixture
def store() -> Iterator[str]:
    """Two shards in the memory file system."""
    system = fsspec.filesystem("memory")
    for i in range(2):
        system.pipe_file(f"/pairs/{i:03d}.tar", shard(7 * i, 7))
    yield "memory://pairs/{000..001}.tar"
    MemoryFileSystem.store.clear()


@pytest.fixture
def mixed(recipe: Recipe, pairs: Path, store: str) -> Recipe:
    sources = (DataSource(path=store, weight=0.3, name="far"), DataSource(path=str(pairs), weight=0.7, name="near"))
    data = replace(recipe.data, sources=sources, crop_scale=None, num_negatives=2, negation=True, weights=True)
    return replace(recipe, steps=6, data=data)


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_mixture_logs_its_sources_and_resumes_at_the_sample(
    mixed: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(mixed, tmp_path / "whole", device="cpu")
    said = capsys.readouterr().err
    assert "samples seen: far 18 (30.0%), near 42 (70.0%)" in said
    assert "read from object stores; 0 tries were repeated" in said
    lines = lines_of(tmp_path / "whole")
    assert [(line["seen/far"], line["seen/near"]) for line in lines] == [(3 * step, 7 * step) for step in range(1, 7)]
    assert all(line["seen/far"] + line["seen/near"] == line["samples"] for line in lines)

    def stopped(recipe: Recipe, device: torch.device, world: World) -> Parts:
        parts = build(recipe, device, world)
        batches = parts.loader.batches

        def counted(start: int = 0) -> Iterator[Batch]:
            for step, batch in enumerate(batches(start), start=start):
                if step == 3:
                    signal.raise_signal(signal.SIGTERM)
                yield batch

        parts.loader.batches = counted  # type: ignore[method-assign]
        return parts

    outcome = fit(mixed, tmp_path / "parts", device="cpu", progress=False, build_parts=stopped)
    assert not outcome.complete
    elsewhere = replace(mixed, data=replace(mixed.data, remote=replace(mixed.data.remote, num_threads=2)))
    assert fit(elsewhere, tmp_path / "parts", device="cpu", progress=False).complete
    assert (tmp_path / "parts/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"another recipe.*data\.num_negatives"):
        fit(replace(mixed, data=replace(mixed.data, num_negatives=3)), tmp_path / "parts", device="cpu", progress=False)


def test_one_source_adds_nothing_to_the_log(recipe: Recipe, tmp_path: Path) -> None:
    fit(replace(recipe, steps=2), tmp_path / "run", device="cpu", progress=False)
    assert not any(name.startswith("seen/") for line in lines_of(tmp_path / "run") for name in line)


def test_every_option_reaches_the_loader(mixed: Recipe) -> None:
    data = replace(mixed.data, captions_per_image=3, reduced_decode=True)
    parts = build(replace(mixed, data=data), torch.device("cpu"), World())
    batch = next(parts.loader.batches())
    assert batch.tokens.shape == (10, 3, 10)
    assert batch.text_ids.shape == (10, 3)
    assert batch.negatives is not None
    assert batch.negatives.shape == (10, 2, 10)
    assert batch.negatives_given is not None
    assert batch.weights is not None
    assert batch.label_ids is not None
    far = torch.tensor([key.startswith("00") and ".tar/" in key for key in batch.keys])
    assert far.sum() == 3
    assert batch.negatives_given[far].all()
    assert set(batch.weights[~far].tolist()) == {1.0}
    assert set(batch.weights[far].tolist()) <= {1.0, 2.0}


def test_settings_by_name() -> None:
    recipe = make_recipe(
        "clip_tiny",
        [
            'data.sources=[{"path": "s3://bucket/{000..009}.tar", "weight": 0.5, "name": "far"}, '
            '{"path": "a.csv", "weight": 0.5, "weight_column": "w", "negatives_column": "n"}]',
            "data.captions_per_image=3",
            "data.num_negatives=4",
            "data.negatives_table=negatives.parquet",
            "data.negation=true",
            "data.weights=none",
            "data.reduced_decode=false",
            "data.remote.retries=2",
            "data.remote.index_dir=index",
            "data.remote.timeout_s=5",
        ],
    )
    data = recipe.data
    assert isinstance(data.sources[0], DataSource)
    assert (data.sources[0].name, data.sources[1].weight_column) == ("far", "w")  # type: ignore[union-attr]
    assert (data.captions_per_image, data.num_negatives, data.negatives_table) == (3, 4, "negatives.parquet")
    assert (data.negation, data.weights, data.reduced_decode) == (True, None, False)
    assert (data.remote.retries, data.remote.index_dir, data.remote.timeout_s) == (2, "index", 5.0)
    with pytest.raises(ValueError, match=r"data\.remote\.num_threads must be at least 1"):
        make_recipe("clip_tiny", ["data.remote.num_threads=0"])
    with pytest.raises(ValueError, match=r"did you mean data\.remote\.retries"):
        make_recipe("clip_tiny", ["data.remote.retry=2"])
