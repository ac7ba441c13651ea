"""`results.json`: exact fields, merging, whole or not at all."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.evaluate.conftest import COLOURS, ColourModel, picture
from wordsight.evaluate import Retrieval, ZeroShot
from wordsight.evaluate.results import RECORD_FIELDS, name_data, write_results


def record(**changes: object) -> dict[str, object]:
    made: dict[str, object] = {
        "task": "zero_shot",
        "data": "sample",
        "split": "twemoji-seen",
        "metric": "top1",
        "value": 0.5,
        "count": 10,
        "ci95": (0.2, 0.8),
        "chance": 0.1,
        "protocol": "p",
        "fingerprint": "f" * 32,
    }
    return made | changes


def read(folder: Path) -> list[dict[str, object]]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def test_the_fields_are_those_that_checks_read(tmp_path: Path) -> None:
    write_results(tmp_path / "new" / "run", [record()])
    (found,) = read(tmp_path / "new" / "run")
    assert list(found) == ["task", "data", "split", "metric", "value", "count", "ci95", "chance", "protocol", "fingerprint"]
    assert tuple(found) == RECORD_FIELDS
    assert found["ci95"] == [0.2, 0.8]


def test_equal_places_are_replaced_and_others_kept(tmp_path: Path) -> None:
    write_results(tmp_path, [record(), record(metric="top5", value=0.7), record(split="twemoji-unseen")])
    write_results(tmp_path, [record(value=0.6, fingerprint="other"), record(protocol="q"), record(chance=None, metric="median")])
    assert [(one["split"], one["metric"], one["protocol"], one["value"]) for one in read(tmp_path)] == [
        ("twemoji-seen", "top1", "p", 0.6),
        ("twemoji-seen", "top5", "p", 0.7),
        ("twemoji-unseen", "top1", "p", 0.5),
        ("twemoji-seen", "top1", "q", 0.5),
        ("twemoji-seen", "median", "p", 0.5),
    ]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xyz"), st.floats(0, 1)), max_size=12), st.integers(0, 12))
def test_writing_in_parts_is_writing_at_once(tmp_path_factory: pytest.TempPathFactory, rows: list, cut: int) -> None:
    records = [record(split=split, metric=metric, value=value) for split, metric, value in rows]
    once, twice = tmp_path_factory.mktemp("once"), tmp_path_factory.mktemp("twice")
    write_results(once, records)
    write_results(twice, records[:cut])
    write_results(twice, records[cut:])
    assert read(once) == read(twice)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [(record(extra=1), "surplus ['extra']"), (record(value=float("nan")), "finite"), (record(ci95=(0, float("inf"))), "finite")],
)
def test_wrong_records_are_refused_and_the_old_file_stays(tmp_path: Path, wrong: dict, said: str) -> None:
    write_results(tmp_path, [record()])
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(ValueError) as error:
        write_results(tmp_path, [record(metric="fine"), wrong])
    assert said in str(error.value)
    assert (tmp_path / "results.json").read_bytes() == before


def test_an_interrupted_write_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_results(tmp_path, [record()])

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_results(tmp_path, [record(value=0.9)])
    assert read(tmp_path)[0]["value"] == 0.5
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("[{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"results.json is not JSON"):
        write_results(tmp_path, [record()])
    (tmp_path / "results.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"not a list of records"):
        write_results(tmp_path, [record()])


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("sample:twemoji-unseen", ("sample", "twemoji-unseen")),
        ("data/coco_val2017.csv", ("data/coco_val2017.csv", "val")),
        ("shards/train-{000..009}.tar", ("shards/train-{000..009}.tar", "train")),
        ("photos", ("photos", "all")),
        ("testimony.csv", ("testimony.csv", "all")),
    ],
)
def test_data_and_split_are_told_from_what_was_typed(spec: str, named: tuple[str, str]) -> None:
    assert name_data(spec) == named
    assert name_data(spec, "mine")[1] == "mine"


def test_judgements_say_what_each_sample_came_to(model: ColourModel, colour_folder: Callable[..., Path], tmp_path: Path) -> None:
    judgement = ZeroShot(prompts="name").judge(model, colour_folder({"red": 4, "green": 3, "blue": 2}, wrong=1))
    outcomes, per_class = judgement.outcomes
    assert (outcomes.metric, per_class.metric) == ("top1", "mean_per_class")
    assert per_class.values.mean() == pytest.approx(judgement.metrics["mean_per_class"].value)
    assert dict(zip(outcomes.keys, outcomes.values, strict=True))["red/00.png"] == 0
    assert outcomes.values.mean() == judgement.metrics["top1"].value == pytest.approx(8 / 9)
    rows = [{"path": f"{i}.png", "captions": [f"a {name} one", f"some {name}"]} for i, name in enumerate(COLOURS)]
    for i, name in enumerate(COLOURS):
        (tmp_path / f"{i}.png").write_bytes(picture(COLOURS[name]))
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = Retrieval().judge(model, tmp_path / "pairs.jsonl")
    to_text, to_image = found.outcomes
    assert [to_text.metric, to_image.metric] == ["image_to_text_R@1", "text_to_image_R@1"]
    assert (len(to_text.keys), len(to_image.keys), to_text.groups) == (5, 10, None)
    assert to_image.groups is not None
    assert sorted(set(to_image.groups)) == sorted(to_text.keys)
    assert all(to.values.mean() == found.metrics[to.metric].value for to in found.outcomes)
