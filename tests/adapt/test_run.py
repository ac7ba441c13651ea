"""The run of an adaptation: seeds, figures, what is kept and why, going on after a kill, and what it refuses."""

import json
import mmap
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

import wordsight
from tests.adapt.make import colour_folders
from wordsight.adapt import costs, image_features
from wordsight.adapt.costs import Meter, _read_counters, _used, in_all, total, with_carbon
from wordsight.adapt.judge import read_csv
from wordsight.adapt.learn import read_settings
from wordsight.adapt.pictures import Features, open_data
from wordsight.adapt.protocol import mean_over_seeds, trials
from wordsight.adapt.run import Request, adapt
from wordsight.evaluate.metrics import wilson_interval
from wordsight.evaluate.results import check_record

COOP = {"epochs": 3, "num_context_tokens": 2}


@pytest.fixture(scope="module")
def model() -> Any:
    return wordsight.create("clip-tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colour_folders(tmp_path_factory.mktemp("colours"), {"train": 6, "val": 4, "test": 5})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model: Any, data: Path) -> Path:
    """A whole run of CoOp, two shots, two seeds."""
    folder = tmp_path_factory.mktemp("runs") / "coop"
    adapt(model, open_data(str(data)), folder, Request(method="coop", shots=2, seeds=(1, 2), parameters=COOP))
    return folder


def seed_files(run: Path) -> dict[str, bytes]:
    """What the seeds have found, without what it cost."""
    files = {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.glob("seeds/**/*")) if path.is_file()}
    for name in [name for name in files if name.endswith("result.json")]:
        files[name] = json.dumps({key: value for key, value in json.loads(files[name]).items() if key != "cost"}).encode()
    return files


def test_a_run_leaves_all_that_a_reader_needs(run: Path) -> None:
    for name in ("settings.json", "environment.json", "summary.json", "results.json", "report.html", "gallery.json"):
        assert (run / name).is_file(), name
    for seed in (1, 2):
        there = {path.name for path in (run / "seeds" / str(seed)).iterdir()}
        assert there >= {"classifier", "curve.json", "nearest_words.json", "result.json", "predictions-test.csv"}
        assert there >= {"per_class-test.csv", "confusions-test.csv", "reliability-test.json"}
        assert not (run / "seeds" / str(seed) / "classifier" / "model").exists(), "the model is saved once"
    assert (run / "classifier" / "model" / "model.safetensors").is_file()
    assert len(json.loads((run / "seeds/1/curve.json").read_text())["loss"]) == 3


def test_figures_are_those_of_the_predictions(run: Path) -> None:
    records = [check_record(one) for one in json.loads((run / "results.json").read_text())]
    shares = []
    for seed in (1, 2):
        rows = read_csv(run / f"seeds/{seed}/predictions-test.csv")
        right = [row["label"] == row["predicted"] for row in rows]
        assert len(rows) == 20
        top1 = next(one for one in records if one["metric"] == "top1" and one["protocol"].endswith(f"seed {seed}"))
        assert (top1["value"], top1["count"], top1["chance"]) == (np.mean(right), 20, 0.25)
        assert tuple(top1["ci95"]) == wilson_interval(sum(right), 20)
        shares.append(top1["value"])
        per_class = read_csv(run / f"seeds/{seed}/per_class-test.csv")
        assert sum(int(row["right"]) for row in per_class) == sum(right)
        confusions = read_csv(run / f"seeds/{seed}/confusions-test.csv")
        assert sum(int(row["count"]) for row in confusions) == 20
        bins = json.loads((run / f"seeds/{seed}/reliability-test.json").read_text())
        ece = next(one for one in records if one["metric"] == "ece" and one["protocol"].endswith(f"seed {seed}"))
        assert sum(one["count"] for one in bins["bins"]) == 20
        gaps = [one["count"] / 20 * abs(one["accuracy"] - one["confidence"]) for one in bins["bins"] if one["count"]]
        assert sum(gaps) == pytest.approx(ece["value"])
    mean = next(one for one in records if one["metric"] == "top1" and "mean of seeds 1, 2" in one["protocol"])
    assert mean["value"] == pytest.approx(np.mean(shares))
    assert "never" not in mean["protocol"]
    assert "chosen on validation pictures" in mean["protocol"]


def test_the_kept_classifier_is_the_best_on_validation_and_loads_alone(run: Path, data: Path) -> None:
    results = [json.loads((run / f"seeds/{seed}/result.json").read_text()) for seed in (1, 2)]
    summary = json.loads((run / "summary.json").read_text())
    best = max(results, key=lambda one: (one["validation"]["accuracy"], -one["validation"]["loss"]))
    assert summary["kept"]["seed"] == best["seed"]
    assert "not looked at" in summary["chosen_by"]
    classifier = wordsight.load_classifier(run)
    pictures = sorted(map(str, data.glob("test/*/*.png")))
    rows = {row["picture"]: row["predicted"] for row in read_csv(run / f"seeds/{best['seed']}/predictions-test.csv")}
    assert len(pictures) == len(rows)
    for path, name in zip(pictures, classifier.predict(pictures), strict=True):
        assert name == next(found for key, found in rows.items() if path.endswith(key))


def test_labels_of_the_test_split_serve_the_figures_alone(
    tmp_path: Path, model: Any, data: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every label of the test split changed, the same is learned, chosen and kept; only figures differ."""
    splits = open_data(str(data))
    assert splits.test is not None
    turned = {name: splits.classes[(i + 1) % 4] for i, name in enumerate(splits.classes)}
    object.__setattr__(splits.test, "labels", tuple(turned[label] for label in splits.test.labels))
    adapt(model, splits, tmp_path / "run", Request(method="coop", shots=2, seeds=(1, 2), parameters=COOP))
    mine, theirs = seed_files(tmp_path / "run"), seed_files(run)
    assert mine.keys() == theirs.keys()
    for name, content in mine.items():
        if "/classifier/" in name or name.endswith(("curve.json", "nearest_words.json")):
            assert content == theirs[name], name
    kept = [json.loads((folder / "summary.json").read_text())["kept"] for folder in (tmp_path / "run", run)]
    assert kept[0] == kept[1]
    assert mine["seeds/1/per_class-test.csv"] != theirs["seeds/1/per_class-test.csv"]


def test_each_picture_goes_through_the_model_once(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = wordsight.create("clip-tiny"), []
    encode = model.encode_image
    monkeypatch.setattr(model, "encode_image", lambda pixels, **more: (seen.append(len(pixels)), encode(pixels, **more))[1])
    request = Request(method="coop", shots=2, seeds=(1, 2, 3), parameters=COOP)
    adapt(model, open_data(str(data)), tmp_path / "run", request)
    used = {
        key for trial in trials("few_shot", open_data(str(data)), 2, (1, 2, 3)) for key in (*trial.train.keys, *trial.val.keys)
    }
    assert sum(seen) == len(used) + 20
    adapt(model, open_data(str(data)), tmp_path / "run", request)
    assert sum(seen) == len(used) + 20, "a complete run computes nothing"


def test_seeds_share_the_tokens_that_a_decoder_learns_from(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen, told = wordsight.create("clip-tiny"), [], []
    forward = model.image_tower.forward_tokens
    monkeypatch.setattr(model.image_tower, "forward_tokens", lambda pixels: (seen.append(len(pixels)), forward(pixels))[1])
    few = {"steps": 2, "batch_size": 8, "num_layers": 1}
    for name, seeds in (("one", (1,)), ("three", (1, 2, 3))):
        asked = Request(method="decoder", shots="all", seeds=seeds, parameters=few)
        adapt(model, open_data(str(data)), tmp_path / name, asked, say=told.append)
        seen.append(-1)
    one, three = (sum(seen[start:end]) for start, end in ((0, seen.index(-1)), (seen.index(-1) + 1, -1)))
    num_train = len(open_data(str(data)).train)
    assert three == num_train + 3 * (one - num_train)
    assert not any(text.startswith("features of") for text in told)
    kept = json.loads((tmp_path / "three/classifier/classifier.json").read_text())
    assert kept["settings"]["cache"] is None, "no path of this machine"


@pytest.mark.parametrize("method", ["tip_adapter_f", "clap"])
def test_what_is_kept_is_what_the_pictures_themselves_would_have_given(
    tmp_path: Path, model: Any, data: Path, method: str
) -> None:
    """Features that are kept and shared change nothing: neither those of the fixed view nor CLAP's of random views."""
    adapt(model, open_data(str(data)), tmp_path, Request(method=method, shots=1, seeds=(2,)))
    classifier = wordsight.load_classifier(tmp_path)
    rows = read_csv(tmp_path / "seeds/2/predictions-test.csv")
    paths = [str(data / row["picture"]) for row in rows]
    assert classifier.predict(paths).tolist() == [row["predicted"] for row in rows]
    (trial,) = trials("few_shot", open_data(str(data)), 1, (2,))
    train, val = ([str(data / key) for key in part.keys] for part in (trial.train, trial.val))
    direct = type(classifier)(model, classes=list(trial.classes), seed=2)
    direct.fit(train, list(trial.train.labels), validation=(val, list(trial.val.labels)))
    np.testing.assert_allclose(direct.predict_proba(paths), classifier.predict_proba(paths), atol=1e-4)


def test_a_method_that_reads_tokens_gets_the_pictures(tmp_path: Path, model: Any, data: Path) -> None:
    few = {"steps": 2, "batch_size": 4, "num_layers": 1}
    adapt(model, open_data(str(data)), tmp_path, Request(method="decoder", shots=1, seeds=(1,), parameters=few))
    classifier = wordsight.load_classifier(tmp_path)
    rows = read_csv(tmp_path / "seeds/1/predictions-test.csv")
    paths = [str(data / "test" / row["picture"].removeprefix("test/")) for row in rows]
    assert classifier.predict(paths).tolist() == [row["predicted"] for row in rows]


def test_features_are_those_of_the_pictures_whatever_is_drawn(tmp_path: Path, model: Any, data: Path) -> None:
    todo = trials("few_shot", open_data(str(data)), 2, (1, 2))
    sets = [part for trial in todo for part in (trial.train, trial.val)]
    features = Features(model, sets, tmp_path)
    direct = image_features(
        model, [str(data / "train" / key.removeprefix("train/")) for key in sets[2].keys], num_views=2, seed=2
    )
    found = features.views(sets[2], "projected", 2, seed=2)
    torch.testing.assert_close(found.plain, direct.plain, rtol=1e-5, atol=1e-6)
    assert found.views is not None
    assert direct.views is not None
    torch.testing.assert_close(found.views, direct.views, rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------- going on


def start(data: Path, model_dir: Path, run: Path) -> "subprocess.Popen[str]":
    words = ["adapt", "--model", str(model_dir), "--data", str(data), "--method", "coop", "--shots", "2", "--seeds", "1,2"]
    words += ["--set", "epochs=150", "--set", "num_context_tokens=2", "--run", str(run)]
    environment = {**os.environ, "PYTHONPATH": str(Path(wordsight.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "wordsight", *words], env=environment, stderr=subprocess.PIPE, text=True)


def test_a_killed_run_goes_on_and_finds_the_same(tmp_path: Path, data: Path) -> None:
    model = wordsight.create("clip-tiny")
    wordsight.save(model, tmp_path / "model")
    process = start(data, tmp_path / "model", tmp_path / "killed")
    done, late = tmp_path / "killed/seeds/1/result.json", time.monotonic() + 120
    while not done.exists() and process.poll() is None and time.monotonic() < late:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it was killed, not done"
    assert done.exists()
    assert not (tmp_path / "killed/seeds/2/result.json").exists()
    (tmp_path / "killed/seeds/2").mkdir(exist_ok=True)
    (tmp_path / "killed/seeds/2/left.csv").write_text("half done")
    before = done.stat().st_mtime_ns
    again, whole = (start(data, tmp_path / "model", tmp_path / name) for name in ("killed", "whole"))  # three processes alike
    _, told = again.communicate(timeout=240)
    assert again.returncode == 0, told
    assert "seed 1 is done already" in told
    assert done.stat().st_mtime_ns == before
    _, error = whole.communicate(timeout=240)
    assert whole.returncode == 0, error
    assert seed_files(tmp_path / "killed") == seed_files(tmp_path / "whole")
    found = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("killed", "whole")]
    assert found[0] == found[1]


def test_another_question_in_the_same_folder_is_refused_and_says_what_differs(run: Path, model: Any, data: Path) -> None:
    def ask(model: Any = model, **changes: Any) -> None:
        asked = {"method": "coop", "shots": 2, "seeds": (1, 2), "parameters": COOP} | changes
        adapt(model, open_data(str(data)), run, Request(**asked))

    before = seed_files(run)
    with pytest.raises(ValueError, match=r"other settings \(shots: 2 there, 1 now"):
        ask(shots=1)
    with pytest.raises(ValueError, match=r"parameters.epochs: 3 there, 4 now"):
        ask(parameters=COOP | {"epochs": 4})
    with pytest.raises(ValueError, match=r"seeds"):
        ask(seeds=(1, 2, 3))
    with pytest.raises(ValueError, match=r"model: \"[0-9a-f]{32}\" there"):
        ask(model=wordsight.create("clip-tiny", seed=1))
    ask()
    assert seed_files(run) == before


def test_other_words_for_the_same_are_no_difference(tmp_path: Path, model: Any, data: Path) -> None:
    written = []
    for words in ({"model": "a", "data": "b"}, {"model": "./a", "data": "/b"}):
        adapt(model, open_data(str(data)), tmp_path / "run", Request(method="zero_shot", shots=1, seeds=(1,), words=words))
        written.append((tmp_path / "run" / "seeds" / "1" / "result.json").stat().st_mtime_ns)
    assert written[0] == written[1], "the seed is not learned again"


def test_two_processes_never_write_into_one_folder(tmp_path: Path, model: Any, data: Path) -> None:
    script = f"""
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from wordsight.train.rundir import hold
with hold(Path({str(tmp_path / "run")!r}), "adapting into"):
    print("held", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    try:
        with pytest.raises(ValueError, match=rf"process {process.pid} is adapting into"):
            adapt(model, open_data(str(data)), tmp_path / "run", Request(method="zero_shot", shots=1, seeds=(1,)))
    finally:
        process.kill()
        process.communicate()


def test_a_folder_of_another_kind_is_left_alone(tmp_path: Path, model: Any, data: Path) -> None:
    (tmp_path / "recipe.json").write_text("{}")
    with pytest.raises(ValueError, match="something else than a run"):
        adapt(model, open_data(str(data)), tmp_path, Request(method="zero_shot", shots=1, seeds=(1,)))
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.json"}


# ---------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shots": -1}, "shots must be 0 or more"),
        ({"shots": 0}, "with 0 shots only zero_shot"),
        ({"method": "nope"}, "no method 'nope'"),
        ({"budget_s": 5.0}, "a budget is for method auto"),
        ({"method": "auto", "budget_s": 0.0}, "seconds above 0"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Request(**({"method": "coop"} | changes))


def test_shots_that_the_data_do_not_have_are_named(tmp_path: Path, model: Any, data: Path) -> None:
    with pytest.raises(ValueError, match=r"4 of 4 classes .* fewer than 16 pictures in train: 'blue' \(6\)"):
        adapt(model, open_data(str(data)), tmp_path / "run", Request(method="coop", shots=16))
    assert not (tmp_path / "run").exists()
    summary = adapt(
        model, open_data(str(data)), tmp_path / "run", Request(method="zero_shot", shots=16, seeds=(1,), allow_fewer=True)
    )
    assert any("fewer than 16" in note for note in summary["notes"])


def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path, model: Any) -> None:
    data = colour_folders(tmp_path / "data", {"train": 2, "test": 1}, ("red", "blue"))
    (data / "test/red/00.png").write_bytes(b"no picture")
    with pytest.raises(OSError, match=r"red/00\.png"):
        adapt(model, open_data(str(data)), tmp_path / "run", Request(method="zero_shot", shots=1, seeds=(1,)))


def test_classes_that_are_missing_and_labels_that_are_none_of_them_are_named(tmp_path: Path, model: Any, data: Path) -> None:
    with pytest.raises(ValueError, match=r"labels are not among the 2 classes: 'blue', 'grey'"):
        open_data(str(data), classes=["red", "green"])
    splits = open_data(str(data), classes=["red", "green", "blue", "grey", "pink"])
    with pytest.raises(ValueError, match=r"have no picture in train: 'pink'"):
        adapt(model, splits, tmp_path / "run", Request(method="coop", shots=1))
    one = colour_folders(tmp_path / "one", {"train": 4, "test": 1}, ("red",))
    with pytest.raises(ValueError, match="at least 2"):
        adapt(model, open_data(str(one)), tmp_path / "run", Request(method="coop", shots=1))


def test_features_that_are_not_finite_are_refused(tmp_path: Path, data: Path) -> None:
    model = wordsight.create("clip-tiny")
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "image_tower" in name).fill_(float("nan"))
    with pytest.raises(ValueError, match=r"infinite or undefined features, first for .*\.png"):
        adapt(model, open_data(str(data)), tmp_path / "run", Request(method="zero_shot", shots=1, seeds=(1,)))


def test_a_model_whose_pictures_have_no_vector_of_their_own_is_refused(tmp_path: Path, data: Path) -> None:
    with pytest.raises(ValueError, match="picture vectors depend on the text"):
        adapt(wordsight.create("llip-tiny"), open_data(str(data)), tmp_path, Request(method="zero_shot", shots=1, seeds=(1,)))
    assert not (tmp_path / "features").exists()


def test_settings_are_read_as_their_parameters_are_typed() -> None:
    read = read_settings("coop", ["epochs=5", "position=middle", "class_specific=yes", "init=a photo of a", "learning_rate=2e-3"])
    assert read == {"epochs": 5, "position": "middle", "class_specific": True, "init": "a photo of a", "learning_rate": 0.002}
    assert read_settings("coop", ["epochs=none"]) == {"epochs": None}
    for wrong, said in (
        ("epoch=5", "did you mean epochs"),
        ("epochs=many", "takes a whole number or none"),
        ("position=top", "end or middle or front"),
        ("seed=3", "--seeds"),
        ("epochs", "KEY=VALUE"),
    ):
        with pytest.raises(ValueError, match=said):
            read_settings("coop", [wrong])


# -------------------------------------------------------------------------------------------------------------------- figures


def test_the_mean_over_seeds_is_students() -> None:
    values = [0.5, 0.6, 0.58]
    mean, (low, high) = mean_over_seeds(values)
    expected = scipy.stats.t.interval(0.95, 2, loc=np.mean(values), scale=scipy.stats.sem(values))
    assert mean == pytest.approx(np.mean(values))
    assert (low, high) == pytest.approx(expected)
    assert mean_over_seeds([0.0, 0.9])[1] == (0.0, 1.0)
    with pytest.raises(ValueError, match="at least 2"):
        mean_over_seeds([0.5])


def test_costs_are_measured_and_an_estimate_says_so() -> None:
    # pages of the system's own, which go back to it whatever the allocator keeps
    with Meter(torch.device("cpu")) as first, mmap.mmap(-1, 100_000_000) as pages:
        pages.write(bytes(1) * 100_000_000)
        sum(range(1_000_000))
    with Meter(torch.device("cpu")) as second:
        time.sleep(0.05)
    assert second.cost.seconds >= 0.05
    assert second.cost.cpu_seconds < first.cost.cpu_seconds + 0.05
    assert first.cost.peak_memory_bytes > second.cost.peak_memory_bytes + 50_000_000, (
        "the mark of one piece is not that of the one before"
    )
    assert ("estimate" in first.cost.energy_source) == (not _read_counters())
    both = total([first.cost, second.cost])
    assert both.seconds == first.cost.seconds + second.cost.seconds
    assert both.peak_memory_bytes == first.cost.peak_memory_bytes
    found = with_carbon(replace(both, energy_joules=7.2e6))
    assert found["carbon_g"] == 960  # two kilowatt-hours
    assert f"7,200,000 J ({both.energy_source}), 960.000 g of CO2 at 480 g/kWh." in in_all(found)


class FakeDriver:
    """NVML of a machine with one GPU, which has used `used` millijoules."""

    used, knows = 5_000, True

    def nvmlDeviceGetHandleByUUID(self, name: bytes, handle: Any) -> int:
        return 0 if name == b"GPU-12-34" else 7

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, used: Any) -> int:
        used._obj.value = self.used
        return 0 if self.knows else 3


def test_a_gpus_energy_is_its_drivers_count_and_where_there_is_none_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    driver, gpu = FakeDriver(), SimpleNamespace(uuid="12-34")
    for name, what in (("synchronize", None), ("reset_peak_memory_stats", None), ("max_memory_allocated", 9)):
        monkeypatch.setattr(torch.cuda, name, lambda device, what=what: what)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(costs, "_nvml", lambda: driver)
    monkeypatch.setattr(costs, "COUNTERS", Path("nowhere"))
    with Meter(torch.device("cuda")) as meter:
        driver.used += 90_000
    assert 90 <= meter.cost.energy_joules < 95
    assert meter.cost.energy_source == costs.ESTIMATE + costs.WITH_GPU
    for change in ({"uuid": "MIG-56"}, {"knows": False}):
        for name, value in change.items():
            setattr(gpu if name == "uuid" else driver, name, value)
        with Meter(torch.device("cuda")) as meter:
            driver.used += 90_000
        assert meter.cost.energy_joules < 5
        assert meter.cost.energy_source == costs.ESTIMATE + costs.WITHOUT_GPU
        gpu.uuid = "12-34"
    monkeypatch.undo()
    assert costs._read_gpu(torch.device("cpu")) is None


def test_energy_counters_that_begin_anew_are_seen_through() -> None:
    package, other = Path("intel-rapl:0"), Path("intel-rapl:1")
    before = {package: (900, 1000), other: (10, 1000)}
    assert _used(before, {package: (100, 1000), other: (60, 1000)}) == pytest.approx((200 + 50) / 1e6)
    assert _used({}, {}) is None
    assert _used(before, {package: (950, 1000)}) is None
