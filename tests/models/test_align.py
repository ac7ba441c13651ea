"""ALIGN: the conformance suite on its small configs, then temperature, smoothing, options, recipes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import wordsight
from tests.models.conformance import CHECKS, make_batch, total
from wordsight import catalog
from wordsight.models.contrastive.align import ALIGN, ALIGNConfig
from wordsight.nn.text import TextConfig
from wordsight.nn.towers import config_from_dict, config_to_dict
from wordsight.nn.vit import ViTConfig

TINY = replace(catalog.find("align-tiny").config, label_smoothing=0.0)  # with smoothing no batch's loss comes near 0
CONFIGS = {
    "tiny": TINY,
    "projected, same padding": replace(TINY, image=replace(TINY.image, project=True, padding="even", head_channels=64)),
    "mean pool": replace(TINY, text=replace(TINY.text, pool="mean")),
    "pooler": replace(TINY, text=replace(TINY.text, pool="pooler")),
    "without squeeze": replace(TINY, image=replace(TINY.image, squeeze_ratio=None, activation="relu6")),
    "clip's towers": ALIGNConfig(
        embed_dim=64,
        image=ViTConfig(image_size_px=32, patch_size_px=8, width=32, num_layers=2, num_heads=2),
        text=TextConfig(vocab_size=256, context_length=16, width=32, num_layers=2, num_heads=2),
        init_temperature=0.07,
        label_smoothing=0.0,
        duplicates="multi_positive",
    ),
}
REGULARISED = replace(TINY, image=replace(TINY.image, drop_connect=0.3), text=replace(TINY.text, dropout=0.2))
RANDOM_CHECKS = [c for c in CHECKS if any(word in c.__name__ for word in ("seeds", "checkpointing_changes", "finite"))]


def seeded(config: ALIGNConfig) -> ALIGN:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ALIGN(config)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("name", CONFIGS)
def test_conforms(name: str, check: object) -> None:
    check(lambda: seeded(CONFIGS[name]))


@pytest.mark.parametrize("check", RANDOM_CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_conforms_with_regularisation(check: object) -> None:
    check(lambda: seeded(REGULARISED))


def test_cosines_are_divided_by_the_temperature() -> None:
    model = seeded(TINY)
    batch = make_batch(model)
    with torch.no_grad():
        model.temperature.fill_(0.25)
    image, text = model.encode_image(batch.pixels), model.encode_text(batch.tokens)
    logits = image @ text.T / 0.25
    target = torch.arange(8)
    expected = (torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(total(model, batch), expected)
    assert model.log_scale.exp().item() == pytest.approx(4.0)


def test_the_paper_starts_at_a_temperature_of_one() -> None:
    config = catalog.find("align").config
    assert (config.init_temperature, config.label_smoothing) == (1.0, 0.1)
    assert seeded(replace(TINY, init_temperature=1.0)).log_scale.item() == 0.0


def test_label_smoothing_is_torchs() -> None:
    model = seeded(replace(TINY, label_smoothing=0.1))
    batch = make_batch(model)
    logits = model.log_scale.exp() * model.encode_image(batch.pixels) @ model.encode_text(batch.tokens).T
    sides = [torch.nn.functional.cross_entropy(rows, torch.arange(8), label_smoothing=0.1) for rows in (logits, logits.T)]
    torch.testing.assert_close(total(model, batch), sum(sides) / 2)


def test_the_temperature_is_clamped_and_its_gradient_comes_back() -> None:
    model = seeded(TINY)
    batch = make_batch(model)
    with torch.no_grad():
        model.temperature.fill_(-0.5)
    assert model.log_scale.item() == pytest.approx(math.log(100))
    assert total(model, batch).isfinite()
    model.clamp_()
    assert model.temperature.item() == pytest.approx(0.01)
    total(model, batch).backward()
    assert model.temperature.grad.item() < -0.01  # random pairs: a higher temperature would be better


def test_options_out_of_range_are_refused() -> None:
    for bad, match in (
        ({"init_temperature": 0.001}, "not under its bound"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"duplicates": "soft"}, "multi_positive"),
        ({"activation": "relu"}, "'relu'"),
    ):
        with pytest.raises(ValueError, match=match):
            replace(TINY, **bad)
    with pytest.raises(ValueError, match="without a projection can't give 23"):
        ALIGN(replace(TINY, embed_dim=23))


@pytest.mark.parametrize("name", [*CONFIGS, "align", "align-base", "align-small"])
def test_configs_survive_json(name: str) -> None:
    config = CONFIGS[name] if name in CONFIGS else catalog.find(name).config
    assert config_from_dict(ALIGNConfig, json.loads(json.dumps(config_to_dict(config)))) == config


def test_a_model_is_saved_and_loaded_bit_by_bit(tmp_path: Path) -> None:
    from wordsight.data.wordpiece import train_wordpiece

    tokenizer = train_wordpiece(["a photo of a cat"] * 3, 40, context_length=16)
    model = wordsight.create(replace(TINY, text=replace(TINY.text, vocab_size=tokenizer.vocab_size)), seed=1)
    assert model.preprocessor.resize == "squash"
    with pytest.raises(ValueError, match="no tokenizer"):
        wordsight.save(model, tmp_path)
    model.tokenizer = tokenizer
    wordsight.save(model, tmp_path)
    again = wordsight.load(tmp_path)
    assert isinstance(again, ALIGN)
    assert again.config == model.config
    assert torch.equal(again.tokenize(["a cat"]), model.tokenize(["a cat"]))
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match="open_clip has no model like ALIGN"):
        wordsight.convert(tmp_path, tmp_path / "other", to="open_clip")


def test_a_tokenizer_that_pads_otherwise_is_refused(tmp_path: Path) -> None:
    from wordsight.data.wordpiece import train_wordpiece

    tokenizer = train_wordpiece(["a photo of a cat"] * 3, 40, context_length=16)
    text = replace(TINY.text, vocab_size=tokenizer.vocab_size, pad_id=3)
    model = wordsight.create(replace(TINY, text=text))
    model.tokenizer = tokenizer
    with pytest.raises(ValueError, match="pads with 0, the text tower leaves out 3"):
        wordsight.save(model, tmp_path)


def test_the_recipe_trains_on_the_embedded_pictures_and_goes_on_bit_by_bit(tmp_path: Path) -> None:
    """A few steps of `wordsight train align`: LAMB, WordPiece, recalibrated norms, evaluation of neither."""
    from safetensors.torch import load_file

    from wordsight.train.loop import fit
    from wordsight.train.recipe import make_recipe

    settings = ["batch_size=32", "log_every_steps=1", "recalibrate_batches=1", "data.cache_decoded=false"]
    settings += ["data.sources=sample:train-noto", "optim.name=lamb", "optim.muon_lr=none", "optim.warmup_steps=2"]
    recipe = replace(make_recipe("align", [*settings, "steps=4"]), evaluations=(), best_metric=None)
    assert recipe.optim.name == "lamb"
    whole = fit(recipe, tmp_path / "whole", progress=False)
    assert whole.complete
    halted = replace(recipe, checkpoint_every_steps=2)
    fit(halted, tmp_path / "parts", progress=False)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert all(abs(line["loss"] - math.log(32)) < 1 for line in lines)
    assert "log_scale" in lines[-1]
    import shutil

    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-00000004")
    fit(halted, tmp_path / "parts", progress=False)  # from step 2
    a, b = (load_file(tmp_path / name / "last" / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    model = wordsight.load(tmp_path / "whole")
    assert isinstance(model, ALIGN)
    assert model.embed_texts(["red apple"]).shape == (1, 256)


def test_the_papers_recipe_is_the_papers() -> None:
    from wordsight.train.recipe import make_recipe

    recipe = make_recipe("align_l2")
    assert (recipe.batch_size, recipe.optim.name, recipe.optim.lr, recipe.optim.weight_decay) == (16_384, "lamb", 1e-3, 1e-5)
    assert (recipe.steps, recipe.optim.warmup_steps, recipe.optim.schedule) == (1_200_000, 10_000, "linear")
