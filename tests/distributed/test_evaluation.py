"""Evaluation and embedding shared by 1, 2 and 3 processes: the same to the last digit, with sizes that do not divide."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import wordsight
from tests.distributed.processes import in_processes
from tests.evaluate.conftest import COLOURS, picture
from tests.train.conftest import _quick_report, pairs, recipe, tokenizer_folder  # noqa: F401 - fixtures
from wordsight.data.errors import TooManyBadSamplesError
from wordsight.evaluate import Retrieval, ZeroShot, embed_source, metrics, sharing, zero_shot
from wordsight.train.distributed import World, join
from wordsight.train.loop import fit
from wordsight.train.recipe import Evaluation, Recipe


def in_world(function: Callable[[World], Any]) -> Callable[[], Any]:
    def run() -> Any:
        world = World.from_environment()
        with join(world, torch.device("cpu")):
            return function(world)

    return run


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """27 pictures, two of them damaged, with two captions each and a label."""
    folder = tmp_path_factory.mktemp("table")
    lines = []
    for i in range(27):
        colour = list(COLOURS)[i % 5]
        (folder / f"{i}.png").write_bytes(b"damaged" if i in (9, 10) else picture(COLOURS[colour], (20 + i, 16)))
        captions = [f"{colour} picture", f"number {i % 20}"]
        lines.append(json.dumps({"path": f"{i}.png", "caption": captions, "label": colour}))
    (folder / "toys.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder / "toys.jsonl"


def test_figures_and_vectors_are_those_of_one_process_bit_for_bit(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zero_shot, "SCORES_IN_BLOCK", 20)  # 4 pictures
    model = wordsight.create("clip-tiny", seed=0)

    def judge(world: World) -> list[Any]:
        embedded = embed_source(model, table, batch_size=4, max_bad_share=0.2, world=world)
        found: list[Any] = [embedded.images_ND, embedded.listing, embedded.positions, embedded.bad, embedded.keys]
        for evaluator in (
            ZeroShot(prompts="imagenet80", ks=(1, 3)),
            Retrieval(ks=(1, 5)),
            Retrieval(captions="first", ties="argsort"),
        ):
            outcome = evaluator.judge(model, embedded, world=world)
            found += [outcome.records("toys", "all"), outcome.texts_MD, outcome.hits, outcome.confusions]
        return found

    alone = judge(World())
    assert len(alone[0]) == 25
    for size in (2, 3):
        for rank, found in enumerate(in_processes(size, in_world(judge), tmp_path)):
            for a, b in zip(alone, found, strict=True):
                if isinstance(a, torch.Tensor | np.ndarray):
                    assert a.tobytes() == b.tobytes() if isinstance(a, np.ndarray) else torch.equal(a, b), (size, rank)
                else:
                    assert json.dumps(a, default=str) == json.dumps(b, default=str), (size, rank)


@pytest.mark.parametrize("ties", ["topk", "argsort"])
def test_ranks_are_shared_by_blocks_of_queries(ties: metrics.Ties, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randint(-2, 3, (101, 4), generator=generator) / 7  # many ties
    candidates = torch.randint(-2, 3, (33, 4), generator=generator) / 7
    owners = torch.randint(0, 33, (101,), generator=generator)

    def rank(world: World) -> metrics.Ranking:
        return metrics.rank_queries(
            queries, candidates, owners, torch.arange(33), ties=ties, query_block=7, candidate_block=10, world=world
        )

    alone = rank(World())
    for found in in_processes(3, in_world(rank), tmp_path):
        assert np.array_equal(alone.ranks, found.ranks)
        assert np.array_equal(alone.rows, found.rows)
        assert all(np.array_equal(alone.hits[k], found.hits[k]) for k in alone.hits)


def test_more_processes_than_batches(table: Path, tmp_path: Path) -> None:
    """Some have nothing to do, and get everything all the same."""
    model = wordsight.create("clip-tiny", seed=0)
    alone = embed_source(model, table, batch_size=20, max_bad_share=0.2)
    for found in in_processes(
        3, in_world(lambda world: embed_source(model, table, batch_size=20, max_bad_share=0.2, world=world).images_ND), tmp_path
    ):
        assert torch.equal(found, alone.images_ND)


def test_too_many_bad_pictures_are_the_same_error_everywhere(table: Path, tmp_path: Path) -> None:
    """Both damaged ones lie in one process's batch; the sentence is that of one process, and said by one."""
    model = wordsight.create("clip-tiny", seed=0)

    def fail(world: World) -> str:
        with pytest.raises(TooManyBadSamplesError) as caught:
            embed_source(model, table, batch_size=4, max_bad_share=0.07, world=world)
        return str(caught.value)

    def sum_of(text: str) -> str:
        return text.split("(")[1]

    alone = fail(World())
    assert "2 different ones of 27" in alone
    assert "9.png" in alone
    assert [sum_of(text) for text in in_processes(3, in_world(fail), tmp_path)] == [sum_of(alone)] * 3


def test_an_error_of_one_process_is_raised_by_all(tmp_path: Path) -> None:
    def work(world: World) -> tuple[str, bool]:
        def fail() -> int:
            if world.rank == 1:
                raise FileNotFoundError(2, "gone", "somewhere")
            return world.rank

        with pytest.raises(FileNotFoundError) as caught:
            sharing.together(world, fail)
        return str(caught.value), getattr(caught.value, "said", False)

    assert in_processes(3, in_world(work), tmp_path) == [
        ("[Errno 2] gone: 'somewhere'", True),
        ("[Errno 2] gone: 'somewhere'", False),
        ("[Errno 2] gone: 'somewhere'", True),
    ]


class Counting(Retrieval):
    """Retrieval that says which processes encoded pictures, and how many."""

    def judge(self, model: Any, data: Any, *, world: Any = sharing.ALONE) -> Any:
        before = model.encode_image
        seen = []
        model.encode_image = lambda pixels, **options: seen.append(len(pixels)) or before(pixels, **options)
        try:
            outcome = super().judge(model, data, world=world)
        finally:
            del model.encode_image
        Path(self.folder, f"seen-{world.rank}").write_text(json.dumps(seen))  # type: ignore[attr-defined]
        return outcome


def test_evaluations_of_a_training_run_on_all_processes(
    recipe: Recipe,  # noqa: F811
    pairs: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each encodes its batches; figures, the best model and the log are those of the main process, known to all."""
    monkeypatch.setattr(Counting, "folder", str(tmp_path), raising=False)
    evaluation = Evaluation(evaluator=Counting(ks=(1, 5), batch_size=8), data=str(pairs), name="pairs")
    recipe = replace(recipe, steps=4, evaluations=(evaluation,), evaluate_every_steps=2)
    outcomes = in_processes(2, lambda: fit(recipe, tmp_path / "run", device="cpu", progress=False), tmp_path)
    assert outcomes[0].metrics == outcomes[1].metrics
    assert outcomes[0].best == outcomes[1].best
    seen = [json.loads((tmp_path / f"seen-{rank}").read_text()) for rank in range(2)]
    assert seen == [[8, 8, 8, 8], [8, 8, 8, 4]]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "pairs/image_to_text_R@1" in line]
    assert [line["step"] for line in measured] == [2, 4]
    model = wordsight.load(tmp_path / "run" / "last")
    again = Retrieval(ks=(1, 5), batch_size=8).run(model, str(pairs))
    assert {name: metric.value for name, metric in again.items()} == {
        name.removeprefix("pairs/"): value for name, value in outcomes[1].metrics.items()
    }


class Alone:
    """An evaluator that knows nothing of processes."""

    def judge(self, model: Any, data: Any) -> Any:
        import os

        assert os.environ.get("RANK", "0") == "0"
        return Retrieval().judge(model, data)


def test_an_evaluator_that_takes_no_world_runs_on_the_main_process(pairs: Path, tmp_path: Path) -> None:  # noqa: F811
    from wordsight.train.setup import Evaluator

    model = wordsight.create("clip-tiny", seed=0)
    evaluator = Evaluator((Evaluation(evaluator=Alone(), data=str(pairs), name="pairs"),))
    found = in_processes(2, in_world(lambda world: evaluator.run(model, world)), tmp_path)
    assert (
        found[0] == found[1] == Evaluator((Evaluation(evaluator=Retrieval(), data=str(pairs), name="pairs"),)).run(model, World())
    )
