"""The grid of methods and seeds: cells whole or not at all, going on after a kill, figures, what is kept, and hard data."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, f1_score

import wordsight
from tests.adapt.make import colour_folders
from wordsight.adapt import grid_figures
from wordsight.adapt.coop import CoOp
from wordsight.adapt.decoder import Decoder
from wordsight.adapt.grid import GridRequest, run_grid
from wordsight.adapt.grid_methods import ALL, PROMPTS, STAGES, read_method, read_methods
from wordsight.adapt.imbalanced import LOSSES
from wordsight.adapt.judge import read_csv
from wordsight.adapt.pictures import open_data
from wordsight.adapt.run import Request, adapt
from wordsight.adapt.second_stage import KINDS
from wordsight.adapt.tail_data import prepare
from wordsight.data.few_shot import LabelledSet, Splits
from wordsight.data.long_tail import skew
from wordsight.evaluate.results import check_record

FEW = {"decoder": {"steps": 4, "batch_size": 8, "num_layers": 1}}
METHODS = ("zero_shot", "linear_probe", "decoder+balanced_softmax", "decoder+cross_entropy+crt")
CELLS = ("zero_shot", "linear_probe", "decoder+balanced_softmax", "decoder+cross_entropy", "decoder+cross_entropy+crt")


@pytest.fixture(scope="module")
def model() -> Any:
    return wordsight.create("clip-tiny")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colour_folders(tmp_path_factory.mktemp("colours"), {"train": 8, "val": 3, "test": 4}, noise=110)


@pytest.fixture(scope="module")
def data(folders: Path) -> Splits:
    return skew(open_data(str(folders)), 8, seed=1)


def request(**changes: Any) -> GridRequest:
    return GridRequest(**({"methods": METHODS, "seeds": (1, 2), "parameters": FEW, "many_above": 5, "few_below": 3} | changes))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model: Any, data: Splits) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "grid"
    run_grid(model, data, folder, request())
    return folder


def cell_files(run: Path) -> dict[str, bytes]:
    """What cells have found, without what it cost."""
    files = {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.glob("cells/**/*")) if path.is_file()}
    for name in [name for name in files if name.endswith("result.json")]:
        result = json.loads(files[name])
        files[name] = json.dumps({key: value for key, value in result.items() if "cost" not in key}).encode()
    return files


def summary_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


# Names


def test_all_names_mean_what_they_say() -> None:
    assert set(STAGES.values()) == set(KINDS)
    assert {read_method(name).loss for name in ALL if name.startswith("decoder")} == set(LOSSES)
    assert {read_method(name).stage2 for name in ALL} == {None, *STAGES}
    marc = read_method("decoder+balanced_softmax+marc")
    assert (marc.loss, marc.stage2, marc.first) == ("balanced_softmax", "marc", "decoder+balanced_softmax")
    sampled = read_method("decoder+class_balanced_sampling")
    assert sampled.settings == {"loss": "cross_entropy", "sampling": "class_balanced"}
    assert [read_method(name).loss for name in PROMPTS] == list(LOSSES)
    assert read_methods("coop+lade, all,coop") == ("coop+lade", *ALL, *(name for name in PROMPTS if name != "coop+lade"))


@pytest.mark.parametrize(
    "name",
    [
        "",
        "decoder",
        "coop",
        "zero_shot+crt",
        "decoder+nope",
        "decoder+ldam+nope",
        "decoder+ldam+crt+lws",
        "coop+nope",
        "coop+lade+crt",
        "../x",
    ],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="write zero_shot, linear_probe"):
        read_method(name)


def test_first_stages_come_before_second_ones_seed_by_seed() -> None:
    asked = request(methods=("decoder+ldam+crt", "zero_shot", "decoder+ldam"), seeds=(3, 1))
    names = ("decoder+ldam", "decoder+ldam+crt", "zero_shot")
    assert asked.cells == tuple((name, seed) for seed in (3, 1) for name in names)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"methods": ()}, "at least one, got none"),
        ({"methods": ("zero_shot", "zero_shot")}, "different names"),
        ({"seeds": (1, 1)}, "different whole numbers"),
        ({"seeds": (-1,)}, "0 or more"),
        ({"parameters": {"clap": {}}}, "it has no clap"),
        ({"parameters": {"decoder": {"loss": "ldam"}}}, "part of a cell's name"),
        ({"parameters": {"decoder": {"cache": "x"}}}, "all cells share"),
        ({"many_above": 5, "few_below": 9}, "few_below must be 0 to many_above"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        request(**changes)


# A whole grid


def test_a_grid_leaves_all_that_a_reader_needs(run: Path) -> None:
    there = {path.name for path in run.iterdir() if not path.name.startswith(".")}
    assert there == {
        *("settings.json", "environment.json", "features.json", "summary.json", "results.json", "table.csv", "report.html"),
        *("accuracy_cost.svg", "class_counts.svg", "cells", "classifier", "features", "tokens"),
    }
    assert {path.name for path in (run / "cells").iterdir()} == set(CELLS)
    for name in CELLS:
        for seed in (1, 2):
            assert {path.name for path in (run / "cells" / name / str(seed)).iterdir()} == {
                *("classifier", "predictions-val.csv", "predictions-test.csv", "per_class-test.csv", "result.json")
            }
            assert not (run / "cells" / name / str(seed) / "classifier/model").exists()
    assert summary_of(run)["done"] == summary_of(run)["cells"] == 10


def test_figures_are_those_of_the_predictions(run: Path) -> None:
    records = [check_record(one) for one in json.loads((run / "results.json").read_text())]
    means = []
    for seed in (1, 2):
        rows = read_csv(run / f"cells/decoder+cross_entropy/{seed}/predictions-test.csv")
        truth, guess = [row["label"] for row in rows], [row["predicted"] for row in rows]
        protocol = f"decoder+cross_entropy, all 15 training pictures, 1 to 8 a class, seed {seed}"
        own = {one["metric"]: one for one in records if one["protocol"] == protocol}
        means.append(balanced_accuracy_score(truth, guess))
        assert own["top1"]["value"] == np.mean(np.array(truth) == guess)
        assert own["mean_per_class"]["value"] == pytest.approx(means[-1])
        assert own["macro_f1"]["value"] == pytest.approx(f1_score(truth, guess, average="macro", zero_division=0))
        few = [a == b for a, b in zip(truth, guess, strict=True) if a in ("grey", "red")]
        assert (own["top1_few"]["value"], own["top1_few"]["count"]) == (np.mean(few), 8)
    row = next(row for row in summary_of(run)["methods"] if row["method"] == "decoder+cross_entropy")
    assert row["metrics"]["mean_per_class"]["value"] == pytest.approx(np.mean(means))
    table = {row["method"]: row for row in csv.DictReader((run / "table.csv").open())}
    assert float(table["decoder+cross_entropy"]["mean_per_class"]) == pytest.approx(np.mean(means), abs=1e-4)
    assert list(table) == list(CELLS)


def test_costs_of_a_second_stage_hold_its_first(run: Path) -> None:
    first, second = (json.loads((run / f"cells/{name}/1/result.json").read_text()) for name in CELLS[3:])
    for name in ("seconds", "cpu_seconds", "energy_joules"):
        assert second["cost"][name] == pytest.approx(first["cost"][name] + second["own_cost"][name])
    costs = summary_of(run)["costs"]
    results = [json.loads(path.read_text()) for path in run.glob("cells/*/*/result.json")]
    assert costs["cells"]["seconds"] == pytest.approx(sum(one["own_cost"]["seconds"] for one in results))
    assert costs["total"]["carbon_g"] == pytest.approx(costs["total"]["energy_joules"] / 3.6e6 * costs["carbon_g_per_kwh"])


def test_the_kept_method_is_the_best_on_validation_and_names_pictures(run: Path, folders: Path) -> None:
    kept, scores = summary_of(run)["kept"], {}
    for name in CELLS:
        each = []
        for seed in (1, 2):
            rows = read_csv(run / f"cells/{name}/{seed}/predictions-val.csv")
            each.append(balanced_accuracy_score([row["label"] for row in rows], [row["predicted"] for row in rows]))
        scores[name] = np.mean(each)
    assert scores[kept["method"]] == max(scores.values()) == pytest.approx(kept["validation"])
    second = sorted(scores.values())[-2]
    assert kept["lead"] == pytest.approx(max(scores.values()) - second)
    assert kept["sentence"].startswith(f"On 12 validation pictures of 4 classes it would keep {kept['method']}: ")
    classifier = wordsight.load_classifier(run)
    rows = read_csv(run / f"cells/{kept['method']}/{kept['seed']}/predictions-test.csv")
    paths = [str(folders / row["picture"]) for row in rows]
    assert classifier.predict(paths).tolist() == [row["predicted"] for row in rows]


def test_a_cell_is_what_the_estimator_finds_alone(run: Path, model: Any, data: Splits) -> None:
    assert data.train is not None
    alone = Decoder(model, classes=data.classes, seed=2, stage2="crt", **FEW["decoder"])
    alone.fit(data.train.source, list(data.train.labels))
    read = wordsight.load_classifier(run / "cells/decoder+cross_entropy+crt/2/classifier", model)
    assert data.test is not None
    torch.testing.assert_close(read.logits(data.test.source), alone.logits(data.test.source))


def test_prompts_learn_by_each_seeds_own_views(tmp_path: Path, model: Any, data: Splits) -> None:
    own = {"epochs": 2, "num_context_tokens": 2, "num_views": 2, "learning_rate": 0.1, "sampling": "class_balanced"}
    asked = request(methods=("coop+focal",), seeds=(1, 2), parameters={"coop": own})
    assert run_grid(model, data, tmp_path, asked)["kept"]["method"] == "coop+focal"
    assert data.train is not None
    contexts = []
    for seed in (1, 2):
        alone = CoOp(model, list(data.classes), seed=seed, loss="focal", **own)
        alone.fit(data.train.source, list(data.train.labels))
        read = wordsight.load_classifier(tmp_path / f"cells/coop+focal/{seed}/classifier", model)
        torch.testing.assert_close(read.context_, alone.context_)
        contexts.append(read.context_)
    assert not torch.allclose(*contexts)


def test_each_picture_goes_through_the_tower_once(tmp_path: Path, data: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = wordsight.create("clip-tiny"), []
    forward = model.image_tower.forward_tokens
    monkeypatch.setattr(model.image_tower, "forward_tokens", lambda pixels: (seen.append(len(pixels)), forward(pixels))[1])
    asked = request(methods=("decoder+cross_entropy", "decoder+ldam", "decoder+ldam+tau"))
    run_grid(model, data, tmp_path / "run", asked)
    assert sum(seen) == 15 + 12 + 16
    told: list[str] = []
    kept = (tmp_path / "run/classifier/model/model.safetensors").stat()
    run_grid(model, data, tmp_path / "run", asked, say=told.append)
    assert sum(seen) == 43, "a grid that is done computes nothing"
    assert (tmp_path / "run/classifier/model/model.safetensors").stat().st_ino == kept.st_ino, "nor writes the model again"
    assert told == ["6 of 6 cells are done already"]


def test_labels_of_the_test_split_serve_the_figures_alone(tmp_path: Path, model: Any, data: Splits, run: Path) -> None:
    assert data.test is not None
    turned = {name: data.classes[(i + 1) % 4] for i, name in enumerate(data.classes)}
    other = replace(data.test, labels=tuple(turned[label] for label in data.test.labels))
    run_grid(model, replace(data, test=other), tmp_path, request())
    mine, theirs = cell_files(tmp_path), cell_files(run)
    assert mine.keys() == theirs.keys()
    for name in mine:
        if "/classifier/" in name or name.endswith("predictions-val.csv"):
            assert mine[name] == theirs[name], name
    assert summary_of(tmp_path)["kept"] == summary_of(run)["kept"]


# Going on


def test_a_killed_grid_goes_on_and_finds_the_same(tmp_path: Path, folders: Path) -> None:
    model = wordsight.create("clip-tiny")
    wordsight.save(model, tmp_path / "model")
    slow = {"decoder": {"steps": 150, "batch_size": 8, "num_layers": 1}}
    words = ["long-tail", "--model", str(tmp_path / "model"), "--data", str(folders), "--run", str(tmp_path / "killed")]
    words += ["--methods", "zero_shot,decoder+grw,decoder+cross_entropy+marc", "--seeds", "1", "--set", "decoder.steps=150"]
    words += ["--set", "decoder.batch_size=8", "--set", "decoder.num_layers=1"]
    environment = {**os.environ, "PYTHONPATH": str(Path(wordsight.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "wordsight", *words], env=environment, stderr=subprocess.DEVNULL)
    done, late = tmp_path / "killed/cells/decoder+grw/1/result.json", time.monotonic() + 120
    while not done.exists() and process.poll() is None and time.monotonic() < late:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it was killed, not done"
    there = {str(path.parent.relative_to(tmp_path / "killed/cells")) for path in tmp_path.glob("killed/cells/*/*/result.json")}
    assert {"zero_shot/1", "decoder+grw/1"} <= there <= {"zero_shot/1", "decoder+grw/1", "decoder+cross_entropy/1"}
    (tmp_path / "killed/cells/.new").mkdir(exist_ok=True)
    (tmp_path / "killed/cells/.new/left.csv").write_text("half done")
    before, told = done.stat().st_mtime_ns, []
    asked = GridRequest(methods=("zero_shot", "decoder+grw", "decoder+cross_entropy+marc"), seeds=(1,), parameters=slow)
    run_grid(model, open_data(str(folders)), tmp_path / "killed", asked, say=told.append)
    assert told[0] == f"{len(there)} of 4 cells are done already"
    assert done.stat().st_mtime_ns == before
    run_grid(model, open_data(str(folders)), tmp_path / "whole", asked)
    assert cell_files(tmp_path / "killed") == cell_files(tmp_path / "whole")
    found = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("killed", "whole")]
    assert found[0] == found[1]


def test_a_grid_can_be_asked_for_more_but_not_for_something_else(tmp_path: Path, model: Any, data: Splits) -> None:
    assert data.train is not None
    run_grid(model, data, tmp_path, request(methods=("decoder+cross_entropy",), seeds=(1,)))
    assert wordsight.load_classifier(tmp_path).seed == 1
    before, told = cell_files(tmp_path), []
    more = request(methods=("decoder+cross_entropy+tau", "zero_shot"), seeds=(1, 2))
    summary = run_grid(model, data, tmp_path, more, say=told.append)
    assert told[0] == "1 of 6 cells are done already"
    assert summary["done"] == 6
    kept = tmp_path / "cells" / summary["kept"]["method"] / str(summary["kept"]["seed"]) / "classifier/classifier.json"
    assert kept.read_bytes() == (tmp_path / "classifier/classifier.json").read_bytes()
    after = cell_files(tmp_path)
    assert {name: after[name] for name in before} == before
    with pytest.raises(ValueError, match=r"parameters.decoder.steps: 4 there, 5 now"):
        run_grid(model, data, tmp_path, request(parameters={"decoder": {**FEW["decoder"], "steps": 5}}))
    with pytest.raises(ValueError, match=r"pictures: \"[0-9a-f]{32}\" there"):
        run_grid(model, replace(data, train=data.train.select(range(14))), tmp_path, more)
    with pytest.raises(ValueError, match=r"model: \"[0-9a-f]{32}\" there"):
        run_grid(wordsight.create("clip-tiny", seed=1), data, tmp_path, more)


def test_a_run_of_adapt_is_left_alone(tmp_path: Path, model: Any, data: Splits) -> None:
    adapt(model, data, tmp_path, Request(method="zero_shot", shots=0, seeds=(1,)))
    before = (tmp_path / "settings.json").read_bytes()
    with pytest.raises(ValueError, match="holds a run of other settings"):
        run_grid(model, data, tmp_path, request())
    assert (tmp_path / "settings.json").read_bytes() == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other/recipe.json").write_text("{}")
    with pytest.raises(ValueError, match="something else than a run of `wordsight long-tail`"):
        run_grid(model, data, tmp_path / "other", request())


def test_a_budget_leaves_cells_for_the_next_call(
    tmp_path: Path, model: Any, data: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request(methods=("zero_shot", "linear_probe"))
    with pytest.raises(ValueError, match="no cell was done in 1e-09 s"):
        run_grid(model, data, tmp_path, asked, budget_s=1e-9)
    ticks = iter(range(100))
    monkeypatch.setattr("wordsight.adapt.grid.time.monotonic", lambda: next(ticks))
    told: list[str] = []
    summary = run_grid(model, data, tmp_path, asked, budget_s=3.5, say=told.append)
    assert told[-1] == "the budget is spent: 1 cells are left for the next call"
    assert summary["left"] == [["linear_probe", 2]]
    assert summary["kept"]["seeds"] == [1], "only seeds that all methods have done are compared"
    assert run_grid(model, data, tmp_path, asked)["left"] == []
    with pytest.raises(ValueError, match="seconds above 0"):
        run_grid(model, data, tmp_path, asked, budget_s=0.0)


def test_a_cell_that_cannot_be_learned_fails_alone(tmp_path: Path, model: Any, data: Splits) -> None:
    wild = {"decoder": {**FEW["decoder"], "learning_rate": 1e30, "steps": 20}}
    asked = request(methods=("zero_shot", "decoder+cross_entropy+marc"), seeds=(1,), parameters=wild)
    summary = run_grid(model, data, tmp_path, asked)
    assert [one["method"] for one in summary["failed"]] == ["decoder+cross_entropy", "decoder+cross_entropy+marc"]
    assert "use a lower learning_rate" in summary["failed"][0]["why"]
    assert summary["failed"][1]["why"] == "its first stage, decoder+cross_entropy, failed"
    assert summary["kept"]["method"] == "zero_shot"
    assert not (tmp_path / "cells/decoder+cross_entropy").exists()
    with pytest.raises(ValueError, match="all 2 cells failed"):
        run_grid(model, data, tmp_path / "none", replace(asked, methods=("decoder+cross_entropy+marc",)))


# Hard data


def labelled(data: Splits, part: str, classes: tuple[str, ...], counts: dict[str, int]) -> LabelledSet:
    """So many pictures of each class of a split."""
    given = replace(data.parts()[part], classes=classes)
    return given.select([i for name, n in counts.items() for i in [j for j, at in enumerate(given.labels) if at == name][:n]])


def test_classes_that_training_lacks_are_named_and_count_as_wrong(tmp_path: Path, model: Any, folders: Path) -> None:
    whole, classes = open_data(str(folders)), ("blue", "green", "grey", "mauve", "red")
    splits = Splits(
        name="hard",
        classes=classes,
        train=labelled(whole, "train", classes, {"blue": 8, "green": 1, "grey": 3}),
        val=labelled(whole, "val", classes, {"blue": 3, "grey": 3, "red": 1}),
        test=labelled(whole, "test", classes, {"blue": 4, "green": 4, "grey": 4, "red": 4}),
    )
    summary = run_grid(model, splits, tmp_path, request(methods=("zero_shot", "linear_probe", "decoder+lade+tau"), seeds=(1,)))
    assert not summary["failed"]
    notes = " ".join(summary["notes"])
    for said in (
        "1 classes have test pictures and no training picture: 'red'",
        "1 classes have neither training nor test pictures: 'mauve'",
        "1 of 3 learned classes have no validation picture: 'green'",
    ):
        assert said in notes
    assert summary["groups"] == {"many": 1, "medium": 1, "few": 3, "unseen": 2}
    for row in summary["methods"]:
        unseen = row["metrics"]["top1_unseen"]
        assert (unseen["value"] == 0.0) or row["method"] == "zero_shot"
        assert unseen["count"] == 4
        rows = read_csv(tmp_path / f"cells/{row['method']}/1/predictions-test.csv")
        assert len(rows) == 16
        assert {one["predicted"] for one in rows} <= ({*classes} if row["method"] == "zero_shot" else {"blue", "green", "grey"})


def test_missing_splits_are_held_out_and_single_pictures_stay_in_train(folders: Path) -> None:
    whole, classes = open_data(str(folders)), ("blue", "green", "grey", "red")
    train = labelled(whole, "train", classes, {"blue": 8, "green": 3, "grey": 2, "red": 1})
    found = prepare(Splits(name="own", classes=classes, train=train))
    assert found.test.counts() == {"blue": 2, "green": 1, "grey": 1, "red": 0}
    assert found.val.counts() == {"blue": 1, "green": 1, "grey": 0, "red": 0}
    assert found.train.counts() == {"blue": 5, "green": 1, "grey": 1, "red": 1}
    keys = [*found.train.keys, *found.val.keys, *found.test.keys]
    assert sorted(keys) == sorted(train.keys)
    assert "none of 1 classes of a single picture: 'red'" in found.notes[0]
    assert found.learned == classes


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({"blue": 1}, r"1 training pictures of 1 class, 'blue': a classifier needs at least 2"),
        ({"blue": 8}, r"8 training pictures of 1 class"),
        ({"blue": 1, "red": 1}, r"has no test split, and one can't be held out: no class has 2 training pictures"),
        ({"blue": 2, "red": 1}, r"has no val split, and one can't be held out"),
    ],
)
def test_too_little_data_is_said(folders: Path, counts: dict[str, int], said: str) -> None:
    train = labelled(open_data(str(folders)), "train", ("blue", "green", "grey", "red"), counts)
    with pytest.raises(ValueError, match=said):
        prepare(Splits(name="own", classes=train.classes, train=train))
    with pytest.raises(ValueError, match="has no train split"):
        prepare(Splits(name="own", classes=train.classes, test=train))


# Arithmetic


def test_the_lead_and_its_interval_are_a_paired_bootstraps() -> None:
    draw = np.random.default_rng(3)
    targets = np.sort(draw.integers(0, 6, 400) ** 2 // 6)
    ours, theirs = (draw.random((2, 400)) < np.array([[0.7], [0.6]])).astype(float)
    lead, (low, high) = grid_figures.paired_lead(targets, ours, theirs)
    assert lead == pytest.approx(balanced(targets, ours) - balanced(targets, theirs))
    _, places, sizes = np.unique(targets, return_inverse=True, return_counts=True)
    parts = (ours - theirs) / (len(sizes) * sizes[places])
    drawn = parts[draw.integers(0, 400, (4000, 400))].sum(1)
    assert (low, high) == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.006)
    assert grid_figures.paired_lead(targets, ours, ours) == (0.0, (0.0, 0.0))
    assert grid_figures.paired_lead(targets[:1], ours[:1], 1 - ours[:1])[1] == (-1.0, 1.0)


def balanced(targets: np.ndarray, right: np.ndarray) -> float:
    return float(np.mean([right[targets == c].mean() for c in np.unique(targets)]))


def test_an_interval_is_over_seeds_only_where_seeds_differ() -> None:
    one = {"value": 0.5, "count": 8, "ci95": [0.2, 0.8], "chance": 0.1}
    assert grid_figures.over_seeds([one]) == grid_figures.over_seeds([one, dict(one)]) == {**one, "over": "pictures"}
    two = grid_figures.over_seeds([one, {**one, "value": 0.6}])
    assert two["over"] == "seeds"
    assert two["value"] == pytest.approx(0.55)
    assert two["ci95"] == pytest.approx([0.0, 1.0], abs=0.1)  # t of one degree of freedom is 12.7


def test_carbon_is_the_stated_intensity() -> None:
    assert grid_figures.carbon(3.6e6) == grid_figures.CARBON_G_PER_KWH
