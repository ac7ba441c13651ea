"""Suites: what is there is not measured again, what fails is written down, a kill costs one item, folders are held."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import wordsight
from tests.evaluate.conftest import COLOURS, ColourModel, picture
from wordsight.evaluate import Retrieval, ZeroShot
from wordsight.evaluate.folders import hold
from wordsight.evaluate.kept import code_digest, read_kept
from wordsight.evaluate.probing import Ridge
from wordsight.evaluate.results import Finding, fingerprint
from wordsight.evaluate.suite import Candidate, SuiteItem, duration, image_gflops, run_suite, settings_of
from wordsight.evaluate.suites import open_suite
from wordsight.types import Metric


@dataclass(frozen=True, kw_only=True)
class Count:
    """Measures nothing but how often it was asked."""

    asked: ClassVar[list[str]] = []
    value: float = 0.5
    error: str | None = None

    def judge(self, model: Any, *, batch_size: int = 1) -> Finding:
        self.asked.append(f"batch {batch_size}")
        if self.error:
            raise RuntimeError(self.error)
        metrics = {"share": Metric(self.value, 4, (0.1, 0.9), chance=0.5)}
        return Finding(task="count", metrics=metrics, protocol="counting", fingerprint=fingerprint(model, (), "", "count"))


def candidate(model: Any, name: str = "colours") -> Candidate:
    return Candidate(name=name, load=lambda: model)


def test_what_is_there_is_left_and_what_changed_is_measured_again(
    model: ColourModel, colour_folder: Callable[..., Path], tmp_path: Path
) -> None:
    data = colour_folder({"red": 4, "green": 3, "blue": 2}, wrong=1)

    def once(model: Any, prompts: str = "name") -> int:
        items = [SuiteItem(name="zs", evaluator=ZeroShot(prompts=prompts), data=data, dataset="colours", split="test")]
        outcome = run_suite(items, [candidate(model)], tmp_path / "run")
        assert not outcome.failed
        return outcome.again

    assert once(model) == 1
    kept = read_kept(tmp_path / "run" / "colours" / "zs")
    assert kept is not None
    assert (kept.data, kept.split, kept.headline, kept.metrics["top1"].value) == ("colours", "test", "top1", pytest.approx(8 / 9))
    assert (kept.outcomes[0].values.mean(), len(kept.outcomes[0].keys)) == (pytest.approx(8 / 9), 9)
    assert set(kept.versions) >= {"torch", "wordsight", "python"}
    assert len(kept.fingerprint) == 32
    assert once(model) == 0
    assert once(model, "simple") == 1, "another protocol"
    os.utime(data / "red" / "00.png", ns=(1, 1))
    assert once(model, "simple") == 1, "a picture was changed"
    with torch.no_grad():
        model.mix.mul_(-1)
    assert once(model, "simple") == 1, "other weights"
    assert once(model, "simple") == 0
    records = json.loads((tmp_path / "run" / "colours" / "results.json").read_text())
    assert {record["metric"] for record in records} == {"top1", "top5", "mean_per_class"}
    assert (tmp_path / "run" / "colours" / "report.html").exists()


def test_pictures_are_embedded_once_for_items_side_by_side(
    model: ColourModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, colour in COLOURS.items():
        (tmp_path / f"{name}.png").write_bytes(picture(colour))
    rows = [json.dumps({"path": f"{name}.png", "caption": f"a {name} one", "label": name}) for name in COLOURS]
    (tmp_path / "toys.jsonl").write_text("\n".join(rows), encoding="utf-8")
    seen: list[int] = []
    encode = model.encode_image
    monkeypatch.setattr(model, "encode_image", lambda pixels, **more: (seen.append(len(pixels)), encode(pixels, **more))[1])
    items = [
        SuiteItem(name="a", evaluator=ZeroShot(), data=tmp_path / "toys.jsonl"),
        SuiteItem(name="b", evaluator=Retrieval(), data=tmp_path / "toys.jsonl", metric="text_to_image_R@1"),
    ]
    outcome = run_suite(items, [candidate(model)], tmp_path / "run")
    assert sum(seen) == len(COLOURS)
    assert [kept.headline for _, kept in outcome.measured] == ["top1", "text_to_image_R@1"]
    assert outcome.measured[0][1].listing == outcome.measured[1][1].listing != ""


def test_a_failure_and_missing_data_do_not_stop_the_rest(model: ColourModel, tmp_path: Path) -> None:
    said: list[str] = []
    Count.asked.clear()
    items = [
        SuiteItem(name="broken", evaluator=Count(error="no such thing")),
        SuiteItem(name="nan", evaluator=Count(value=float("nan"))),
        SuiteItem(name="absent", evaluator=Count(), needs=((tmp_path / "food", "the pictures of Food-101"),)),
        SuiteItem(name="whole", evaluator=Count()),
    ]
    outcome = run_suite(items, [candidate(model)], tmp_path / "run", batch_size=7, say=said.append)
    assert Count.asked == ["batch 7"] * 3
    assert [kept.item for _, kept in outcome.measured] == ["whole"]
    assert outcome.failed[0] == ("colours", "broken", "RuntimeError: no such thing")
    assert "share is nan" in outcome.failed[1][2]
    assert outcome.missing == (("absent", ((tmp_path / "food", "the pictures of Food-101"),)),)
    told = json.loads((tmp_path / "run" / "colours" / "broken" / "error.json").read_text())
    assert "Traceback" in told["traceback"]
    assert said[0].startswith("[1 of 3] colours · broken: FAILED")
    assert "share 50.0% (10.0% – 90.0%)" in said[2]
    (tmp_path / "food").mkdir()
    items[0] = SuiteItem(name="broken", evaluator=Count())
    outcome = run_suite(items, [candidate(model)], tmp_path / "run")
    assert (outcome.again, [kept.item for _, kept in outcome.measured]) == (2, ["broken", "absent", "whole"])
    assert not (tmp_path / "run" / "colours" / "broken" / "error.json").exists()


def test_a_model_that_can_not_be_loaded_leaves_no_folder(tmp_path: Path) -> None:
    def load() -> Any:
        raise ValueError("no such weights")

    with pytest.raises(ValueError, match="no such weights"):
        run_suite([SuiteItem(name="one", evaluator=Count())], [Candidate(name="bad", load=load)], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_other_versions_are_told_and_an_own_evaluator_that_changed_is_measured_again(model: ColourModel, tmp_path: Path) -> None:
    said: list[str] = []

    def once(value: str) -> int:
        (tmp_path / "own.py").write_text(
            "from dataclasses import dataclass\n"
            "from wordsight.evaluate.results import Finding\n"
            "from wordsight.evaluate.suite import SuiteItem\n"
            "from wordsight.types import Metric\n"
            "@dataclass(frozen=True)\n"
            "class Mine:\n"
            "    def judge(self, model):\n"
            f"        return Finding(task='mine', metrics={{'share': Metric({value}, 4, (0, 1))}}, protocol='', fingerprint='')\n"
            "def suite(root):\n"
            "    return [SuiteItem(name='one', evaluator=Mine())]\n"
        )
        return run_suite(
            open_suite(str(tmp_path / "own.py"), tmp_path), [candidate(model)], tmp_path / "run", say=said.append
        ).again

    assert (once("0.5"), once("0.5"), once("0.25")) == (1, 0, 1)
    assert said[1].endswith("measured before")
    path = tmp_path / "run" / "colours" / "one" / "finding.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"versions": content["versions"] | {"wordsight": "0.0.9"}}))
    assert once("0.25") == 0
    assert "measured before with wordsight 0.0.9 (now " in said[-1]
    path.write_text(json.dumps(content | {"versions": content["versions"] | {"wordsight's code": "0123456789ab"}}))
    assert once("0.25") == 0
    assert f"with wordsight's code 0123456789ab (now {code_digest()})" in said[-1], "a working copy that was edited"


def test_a_models_own_prompts_are_asked_for(tmp_path: Path) -> None:
    """They are no part of its weights; an evaluator without prompts of its own takes them."""

    @dataclass(frozen=True, kw_only=True)
    class ByOwn(Count):
        prompts: str | None = None

    model = wordsight.create("clip-tiny")
    items = [SuiteItem(name="own", evaluator=ByOwn()), SuiteItem(name="given", evaluator=ByOwn(prompts="simple"))]

    def once(prompts: str) -> int:
        model.provenance = {"prompts": prompts}
        return run_suite(items, [candidate(model, "tiny")], tmp_path / "run").again

    assert [once(prompts) for prompts in ("name", "name", "simple")] == [2, 0, 1]


def test_a_damaged_measurement_is_made_anew(model: ColourModel, tmp_path: Path) -> None:
    items = [SuiteItem(name="one", evaluator=Count())]
    run_suite(items, [candidate(model)], tmp_path)
    path = tmp_path / "colours" / "one" / "finding.json"
    path.write_text(path.read_text()[:40], encoding="utf-8")
    said: list[str] = []
    assert run_suite(items, [candidate(model)], tmp_path, say=said.append).again == 1
    assert "is not JSON" in said[0]


def test_a_killed_suite_goes_on_and_a_second_process_is_kept_out(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import sys, time
        from tests.evaluate.test_suite import Count, candidate, SuiteItem, run_suite
        from tests.evaluate.conftest import ColourModel

        class Slow(Count):
            def judge(self, model, *, batch_size=1):
                found = super().judge(model, batch_size=batch_size)
                time.sleep(60)
                return found

        items = [SuiteItem(name=name, evaluator=(Slow if name == "c" else Count)()) for name in "abcd"]
        run_suite(items, [candidate(ColourModel())], sys.argv[1], say=lambda text: print(text, flush=True))
        """
    )
    root = Path(__file__).parent.parent.parent
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=root,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    try:
        assert process.stdout is not None
        assert "a" in process.stdout.readline()
        assert "b" in process.stdout.readline()
        items = [SuiteItem(name=name, evaluator=Count()) for name in "abcd"]
        with pytest.raises(ValueError, match=f"process {process.pid} is measuring into"):
            run_suite(items, [candidate(ColourModel())], tmp_path)
        time.sleep(0.2)  # it sleeps within c
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = {path.parent.name: path.stat().st_mtime_ns for path in tmp_path.glob("colours/*/finding.json")}
    assert sorted(done) == ["a", "b"]
    outcome = run_suite(items, [candidate(ColourModel())], tmp_path)
    assert (outcome.again, len(outcome.measured)) == (2, 4)
    after = {path.parent.name: path.stat().st_mtime_ns for path in tmp_path.glob("colours/*/finding.json")}
    assert {name: after[name] for name in done} == done, "what was whole is not touched"


def test_other_folders_may_be_held(model: ColourModel, tmp_path: Path) -> None:
    """Two processes may share a run, each with models of its own."""
    with hold(tmp_path / "other", "measuring into"):
        outcome = run_suite([SuiteItem(name="one", evaluator=Count())], [candidate(model)], tmp_path)
    assert (outcome.again, outcome.failed) == (1, ())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SuiteItem(name="a/b", evaluator=ZeroShot()), "letters, digits"),
        (lambda: SuiteItem(name="..", evaluator=ZeroShot()), "letters, digits"),
        (lambda: SuiteItem(name="a", evaluator=len), "has no judge"),
        (lambda: Candidate(name="", load=ColourModel), "a model is named"),
        (lambda: run_suite([], [candidate(ColourModel())], "nowhere"), "no item of the suite"),
        (lambda: run_suite([SuiteItem(name="A", evaluator=ZeroShot())], [], "nowhere"), "no model"),
        (
            lambda: run_suite([SuiteItem(name=n, evaluator=ZeroShot()) for n in ("A", "a")], [candidate(1)], "nowhere"),
            "needs a name of its own",
        ),
        (lambda: open_suite(__file__, Path()), "has no attribute 'suite'"),
    ],
)
def test_bad_suites_are_refused(make: Callable[[], Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said):
        make()
    assert not (tmp_path / "nowhere").exists()


def test_settings_tell_evaluators_apart() -> None:
    assert settings_of(ZeroShot(prompts="name")) != settings_of(ZeroShot(prompts="simple"))
    assert settings_of(ZeroShot(classes=["a", "b"])) == settings_of(ZeroShot(classes=("a", "b")))
    assert settings_of(torch.eye(2).numpy()) != settings_of(torch.zeros(2, 2).numpy())
    json.dumps(settings_of({"a": {1, 2}, "b": Path("x"), "c": len, "d": ColourModel}))


def test_operations_of_the_image_tower_by_hand() -> None:
    """clip-tiny by hand: patches, two layers of attention and MLP (the last one for the class token alone), the projection."""
    model = wordsight.create("clip-tiny")
    patches, tokens, width = 16, 17, 32
    convolution = 2 * patches * width * 3 * 8 * 8
    layer = 2 * tokens * 12 * width**2 + 2 * 2 * tokens**2 * width
    gflops = image_gflops(model)
    assert gflops is not None
    whole = (convolution + 2 * layer + 2 * width * 512) / 1e9
    assert 0.6 * whole < gflops <= whole
    assert image_gflops(ColourModel()) is None


def test_durations_in_words() -> None:
    assert [duration(s) for s in (3.21, 240, 9000)] == ["3.2 s", "4 min", "2.5 h"]


def test_a_probe_gets_its_parts_at_its_layer(tmp_path: Path) -> None:
    """Train and test of a mapping, embedded with penultimate features; the figures are those of the test part."""
    draw = torch.Generator().manual_seed(0)
    for part, count in (("train", 30), ("test", 20)):
        rows = torch.nn.functional.normalize(torch.randn(count, 6, generator=draw), dim=1)
        labels = ["even" if row[0] > 0 else "odd" for row in rows]
        vectors(tmp_path / f"{part}.npy", rows, labels)
    data = {"train": tmp_path / "train.npy", "test": tmp_path / "test.npy"}
    item = SuiteItem(name="ridge", evaluator=Ridge(), data=data, dataset="halves", split="test")
    (measured,) = run_suite([item], [candidate(wordsight.create("clip-tiny"))], tmp_path / "run").measured
    assert measured[1].metrics["top1"].count == 20
    assert measured[1].metrics["top1"].value > 0.7
    assert "penultimate features" in measured[1].protocol


def vectors(path: Path, rows: torch.Tensor, labels: list[str]) -> None:
    np.save(path, rows.numpy())
    path.with_name(f"{path.name}.labels.txt").write_text("\n".join(labels) + "\n")
