"""Recipes: settings typed by annotation, unknown keys with the nearest name, plain JSON, lengths."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wordsight.data.augment import Augment
from wordsight.data.sources import DataSource
from wordsight.models.contrastive.clip import CLIPConfig
from wordsight.train.recipe import Recipe, differences, find_recipe, make_recipe, parse_value, recipe_names, to_json


def test_settings_are_typed_by_annotation() -> None:
    recipe = make_recipe(
        "clip",
        [
            "data.sources=shards/{000..003}.tar,more/{a,b}.tar",
            "optim.betas=.9,.95",
            "optim.grad_clip=none",
            "batch_size=1e3",
            "compile=yes",
            "precision=bf16",
            "steps=10",
            "data.augment.hue=.5",
            "data.crop_scale=(0.5, 1)",
            "model.image.patch_dropout=0.5",
            "model.duplicates=multi_positive",
        ],
    )
    assert recipe.data.sources == ("shards/{000..003}.tar", "more/{a,b}.tar")
    assert recipe.optim.betas == (0.9, 0.95)
    assert recipe.optim.grad_clip is None
    assert (recipe.batch_size, recipe.compile, recipe.precision, recipe.steps, recipe.epochs) == (1000, True, "bf16", 10, None)
    assert recipe.data.augment == Augment(hue=0.5)
    assert recipe.data.crop_scale == (0.5, 1.0)
    assert isinstance(recipe.model, CLIPConfig)
    assert (recipe.model.image.patch_dropout, recipe.model.duplicates) == (0.5, "multi_positive")
    assert make_recipe("clip", ["model=RN50"]).model == "RN50"


def test_a_source_can_be_json() -> None:
    text = '["a.tar", {"path": "b.csv", "weight": 0.1, "caption_columns": ["x", "y"]}]'
    sources = make_recipe("clip", [f"data.sources={text}"]).data.sources
    assert sources[0] == "a.tar"
    assert isinstance(sources[1], DataSource)
    assert (sources[1].path, sources[1].weight, tuple(sources[1].caption_columns or ())) == ("b.csv", 0.1, ("x", "y"))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optm.lr=1", r"unknown key 'optm\.lr'; did you mean optim\.lr\?"),
        ("lr=1", r"did you mean optim\.lr\?"),
        ("batchsize=1", r"did you mean batch_size"),
        ("optim.lr.x=1", "unknown key"),
        ("model.image.patch_dropuot=1", r"did you mean model\.image\.patch_dropout"),
        ("optim.lr=fast", r"optim\.lr=fast does not fit: it takes a number"),
        ("optim.betas=.9", r"optim\.betas=\.9 does not fit: it takes 2 values"),
        ("precision=fp16", r"it takes fp32 or bf16"),
        ("batch_size=2.5", r"it takes a whole number"),
        ("compile=maybe", r"it takes true or false"),
        ("optim.lr=nan", r"it takes a number"),
        ("optim.lr=-1", r"optim\.lr must be above 0"),
        ("ema_decay=1", r"ema_decay must lie between 0 and 1"),
        ("keep_checkpoints=0", r"keep_checkpoints must be above 0"),
        ("nonsense", r"it must be key=value"),
    ],
)
def test_what_does_not_fit_is_an_error_that_helps(setting: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_recipe("clip", [setting])


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_survive_text(value: float) -> None:
    assert parse_value(repr(value), float, "k") == value
    assert parse_value(repr(value), float | None, "k") == value


@given(st.integers(-(10**18), 10**18))
def test_whole_numbers_survive_text(value: int) -> None:
    assert parse_value(str(value), int, "k") == value
    assert parse_value(str(value), int | None, "k") == value


@given(st.lists(st.text(st.characters(whitelist_categories=("L", "N")), min_size=1), max_size=5))
def test_lists_survive_json_and_commas(values: list[str]) -> None:
    assert parse_value(json.dumps(values), tuple[str, ...], "k") == tuple(values)
    assert parse_value(",".join(values), tuple[str, ...], "k") == tuple(values)


def test_a_choice_is_taken_literally() -> None:
    assert parse_value("b", Literal["a", "b"] | None, "k") == "b"
    assert parse_value("none", Literal["a", "b"] | None, "k") is None


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_plain(name: str) -> None:
    recipe = make_recipe(name)
    assert json.loads(json.dumps(to_json(recipe))) == to_json(recipe)
    assert differences(to_json(recipe), to_json(make_recipe(name))) == []
    assert recipe.num_steps(1_000_000) > 0


def test_the_papers_recipe_has_the_papers_numbers() -> None:
    recipe = make_recipe("clip-vit-b32")
    assert (recipe.batch_size, recipe.epochs, recipe.optim.lr, recipe.optim.warmup_steps) == (32_768, 32, 5e-4, 2_000)
    assert (recipe.optim.betas, recipe.optim.eps, recipe.optim.weight_decay) == ((0.9, 0.98), 1e-6, 0.2)


def test_your_own_file_is_a_recipe(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from wordsight.train.recipe import Recipe\n\ndef recipe():\n    return Recipe(steps=3)\n"
        "\ndef long():\n    return Recipe(steps=9)\n"
        "\ndef wrong():\n    return 5\n"
    )
    assert make_recipe(str(file)).steps == 3
    assert make_recipe(f"{file}:long").steps == 9
    with pytest.raises(ValueError, match="has no function 'lnog'; did you mean long"):
        find_recipe(f"{file}:lnog")
    with pytest.raises(ValueError, match="must return a wordsight"):
        make_recipe(f"{file}:wrong")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        find_recipe(f"{tmp_path}/none.py:recipe")


def test_lengths() -> None:
    assert Recipe(steps=7).num_steps(100) == 7
    assert Recipe(epochs=1.5, batch_size=10).num_steps(100) == 15
    assert Recipe(samples=101, batch_size=10).num_steps(5) == 11
    assert Recipe(epochs=0.3, batch_size=3).num_steps(10) == 1
    assert make_recipe("clip_tiny", ["epochs=2"]).steps is None
    with pytest.raises(ValueError, match="one length, got steps and epochs"):
        Recipe(steps=1, epochs=1)
    with pytest.raises(ValueError, match="no length"):
        Recipe().num_steps(5)


def test_differences_name_the_key() -> None:
    old, new = Recipe(steps=1), replace(Recipe(steps=1), optim=replace(Recipe().optim, lr=1.0))
    assert differences(to_json(old), to_json(new)) == [("optim.lr", 5e-4, 1.0)]


def test_what_is_not_plain_is_refused() -> None:
    with pytest.raises(ValueError, match="plain values"):
        to_json(replace(Recipe(), model=math.sqrt))
