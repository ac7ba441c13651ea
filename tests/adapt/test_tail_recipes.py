"""The published long-tail studies: complete, counted rightly, and each run to its end on a small set of the same layout."""

from __future__ import annotations

import inspect
import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch.utils.flop_counter import FlopCounterMode

import wordsight
from tests.adapt.make import COLOURS, colour_folders
from wordsight import catalog
from wordsight.adapt import method_class
from wordsight.adapt.grid_methods import ALL, OWN_SETTINGS, read_method
from wordsight.adapt.learn import NOT_SET
from wordsight.adapt.tail_recipes import B16, DATA, L14, RECIPES, find_recipe
from wordsight.cli.long_tail import command
from wordsight.nn.decoder import DecoderConfig, TokenDecoder

IDENTITIES = {"n01440764": "tench", "n01443537": "goldfish", "n01484850": "great white shark"}
SHORT = ("steps=2", "warmup_steps=0", "batch_size=4", "num_views=1", "num_layers=1")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and the three data sets' layouts with pictures of three colours in the place of their classes."""
    root = tmp_path_factory.mktemp("recipes")
    wordsight.save(wordsight.create("clip-tiny"), root / "tiny")
    pictures = colour_folders(root / "pictures", {"train": 3, "val": 1, "test": 1}, tuple(COLOURS)[:3])
    parts = ("train", "val", "test")
    paths = {part: [sorted((pictures / part / colour).iterdir()) for colour in list(COLOURS)[:3]] for part in parts}
    for name, folders in (("ImageNet", list(IDENTITIES)), ("Places", ["a/airfield", "b/bar", "c/canyon"])):
        for part, classes in paths.items():
            lines = []
            for c, (folder, files) in enumerate(zip(folders, classes, strict=True)):
                for file in files[: 3 - c] if part == "train" else files:
                    own = root / name / part / folder / f"{file.stem}.png"
                    own.parent.mkdir(parents=True, exist_ok=True)
                    own.write_bytes(file.read_bytes())
                    lines.append(f"{own.relative_to(root / name)} {c}\n")
            (root / name / f"{name}_LT_{part}.txt").write_text("".join(lines))
    (root / "ImageNet/classnames.txt").write_text("".join(f"{key} {name}\n" for key, name in reversed(IDENTITIES.items())))
    (root / "iNat").mkdir()
    categories = [{"id": i, "name": name} for i, name in enumerate(("Apis mellifera", "Pica pica", "Bufo bufo"))]
    for part, file in (("train", "train2018.json"), ("test", "val2018.json")):
        images, annotations = [], []
        for c, files in enumerate(paths[part]):
            for file_path in files:
                images.append({"id": len(images), "file_name": str(file_path.relative_to(root))})
                annotations.append({"image_id": len(images) - 1, "category_id": c})
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "iNat" / file).write_text(json.dumps(content))
    return root


FOLDERS = {"imagenet-lt": ["ImageNet"], "places-lt": ["Places"], "inaturalist18": ["iNat", "--root", "."]}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_to_its_end(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    recipe = RECIPES[name]
    words = ["--recipe", name, "--model", "tiny", "--data", *FOLDERS[name.rpartition("-")[0]], "--seeds", "1", "--quiet"]
    if "lift" in recipe.request.parameters:
        words += ["--set", "lift.epochs=1", "--set", "lift.batch_size=4", "--set", "lift.adapter_dim=2"]
    else:
        words += [word for one in SHORT for word in ("--set", f"decoder.{one}")] + ["--set", "linear_probe.C=1"]
    result = CliRunner().invoke(command, [*words, "--run", f"runs/{name}"], standalone_mode=False)
    assert result.exception is None, result.output
    assert result.return_value == 0, result.output
    summary = json.loads((place / "runs" / name / "summary.json").read_text())
    assert [row["method"] for row in summary["methods"]] == list(recipe.request.methods)
    assert (summary["failed"], summary["left"]) == ([], [])
    classes = {"imagenet-lt": set(IDENTITIES.values()), "places-lt": {"airfield", "bar", "canyon"}}
    assert set(summary["counts"]) == classes.get(name.rpartition("-")[0], {"Apis mellifera", "Pica pica", "Bufo bufo"})
    report = (place / "runs" / name / "report.html").read_text()
    assert f"--recipe {name}" in report
    assert "decoder.learning_rate=0.03" not in report, "what the recipe says is not said again"
    settings = json.loads((place / "runs" / name / "settings.json").read_text())
    for estimator, own in recipe.request.parameters.items():
        changed = {word.split("=")[0] for word in words if word.startswith(f"{estimator}.")}
        for key, value in json.loads(json.dumps(own)).items():
            if f"{estimator}.{key}" not in changed:
                assert settings["parameters"][estimator][key] == value


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_every_setting(name: str) -> None:
    request = RECIPES[name].request
    assert request.seeds == (1, 2, 3)
    assert {read_method(one).estimator for one in request.methods} == set(request.parameters)
    for estimator, own in request.parameters.items():
        known = set(inspect.signature(method_class(estimator).__init__).parameters)
        unused = {"prompts"} if estimator == "decoder" else set()  # of init="text" alone
        assert set(own) == known - set(NOT_SET) - set(OWN_SETTINGS.get(estimator, {})) - unused


def test_there_is_one_for_each_set_and_tower_and_lift_has_its_adapters() -> None:
    assert set(RECIPES) == {f"{data}-{what}" for data in DATA for what in ("l14", "b16", "lift")}
    for data, about in DATA.items():
        assert RECIPES[f"{data}-l14"].request == RECIPES[f"{data}-b16"].request
        dim = RECIPES[f"{data}-lift"].request.parameters["lift"]["adapter_dim"]
        assert dim == 2 ** math.floor(math.log2(about.num_classes / (2 * 12)))
        assert RECIPES[f"{data}-l14"].request.methods == ALL
    with pytest.raises(ValueError, match="no recipe 'imagenet': choose one of imagenet-lt-l14"):
        find_recipe("imagenet")


@pytest.mark.parametrize("tower", [L14, B16])
def test_operations_are_those_that_are_done(tower: Any) -> None:
    """The blocks' matrices and attention alone; what is left out (norms, activations, a row alone) is below 2%."""
    config = catalog.find(tower.name).config.image
    assert (config.width, config.num_layers) == (tower.width, tower.blocks)
    assert (config.image_size_px // config.patch_size_px) ** 2 + 1 == tower.tokens
    with torch.device("meta"):
        decoder = TokenDecoder(DecoderConfig(width=tower.width, num_classes=2))
        tokens = torch.empty(1, tower.tokens, tower.width)
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            decoder(tokens)
        with FlopCounterMode(display=False) as both:
            decoder(tokens).sum().backward()
    assert forward.get_total_flops() == pytest.approx(tower.decode, rel=0.02)
    assert both.get_total_flops() == pytest.approx(tower.learn, rel=0.05)


def test_a_recipe_without_data_says_what_it_takes() -> None:
    result = CliRunner().invoke(command, ["--recipe", "imagenet-lt-l14"])
    assert result.exit_code == 0, result.output
    for said in (
        "estimated, not measured",
        "learning_rate=0.03",
        "falls as cos(7 pi t / 16)",
        "LDAM with margin 0.5, scale 30 on a cosine head",
        "73.57, 74.56, 73.15, 72.26 % (one user's rerun",
        "+6.58 points",
        "GB of disk for kept tokens",
        "ImageNet_LT_train.txt",
    ):
        assert said in result.output, said
    line = next(line for line in result.output.splitlines() if line.startswith("  Command"))
    assert shlex.split(line)[1:5] == ["wordsight", "long-tail", "--recipe", "imagenet-lt-l14"]
    wrong = CliRunner().invoke(command, ["--recipe", "nope"])
    assert (wrong.exit_code, "choose one of imagenet-lt-l14" in " ".join(wrong.output.split())) == (2, True)
    assert "Missing option '--data'" in CliRunner().invoke(command, ["--run", "x"]).output
