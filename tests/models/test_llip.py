"""Llip: the conformance suite, then what is its own: mixing, its identities, evaluation in tiles."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import wordsight
from tests.models.conformance import CHECKS, cosines, make_batch, total
from tests.train.conftest import COLOURS, SHAPES
from wordsight import catalog
from wordsight.data.tokenize import train_tokenizer
from wordsight.evaluate.scoring import pair_scores
from wordsight.losses.contrastive import sigmoid
from wordsight.losses.llip import mixture_similarities
from wordsight.models.contrastive.llip import Llip, LlipConfig, MapTokens
from wordsight.nn.convnet import ConvNetConfig
from wordsight.nn.efficientnet import efficientnet
from wordsight.nn.resnet import ResNetConfig
from wordsight.nn.towers import build_image_tower, config_from_dict, config_to_dict
from wordsight.system import PairScorer
from wordsight.train.loop import fit
from wordsight.train.recipe import make_recipe

TINY = catalog.find("llip-tiny").config
CONVNET = ConvNetConfig(image_size_px=16, patch_size_px=4, widths=(16, 32), layers=(0, 1))
CONFIGS = {
    "vit": TINY,
    "convnet": replace(TINY, image=CONVNET),
    "resnet": replace(TINY, image=ResNetConfig(image_size_px=64, layers=(1, 1, 1, 1), width=4, num_heads=2), num_tokens=2),
    "normed": replace(TINY, mixture_norm=True),
    "one head": replace(TINY, num_heads=1, temperature=1.0),
}
REGULARISED = replace(
    TINY,
    image=replace(TINY.image, patch_dropout=0.5, stochastic_depth=0.3),
    text=replace(TINY.text, stochastic_depth=0.3),
)
RANDOM_CHECKS = [
    check for check in CHECKS if any(word in check.__name__ for word in ("seeds", "checkpointing_changes", "finite"))
]


def seeded(config: LlipConfig = TINY) -> Llip:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Llip(config)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("name", CONFIGS)
def test_conforms(name: str, check: object) -> None:
    check(lambda: seeded(CONFIGS[name]))


@pytest.mark.parametrize("check", RANDOM_CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_conforms_with_regularisation(check: object) -> None:
    check(lambda: seeded(REGULARISED))


def test_mixing_is_torchs_multi_head_attention() -> None:
    """One query of a text over a picture's tokens, with the projections done before: an independent implementation."""
    model = seeded().double().eval()
    batch = make_batch(model, 3, dtype=torch.float64)
    image, text = model.encode_image(batch.pixels), model.encode_text(batch.tokens)
    width, heads = TINY.embed_dim, TINY.num_heads
    attention = torch.nn.MultiheadAttention(width, heads, bias=False, batch_first=True).double()
    with torch.no_grad():
        attention.in_proj_weight.copy_(torch.eye(width).repeat(3, 1))
        attention.out_proj.weight.copy_(model.output.T)
    for j, words in enumerate(text):
        # torch divides by the root of a head's width, Llip has divided by its temperature
        query = (words[:width] * (width / heads) ** 0.5).expand(3, 1, width)
        mixed, _ = attention(query, image[:, :, :width], image[:, :, width:])
        expected = F.normalize(mixed[:, 0], dim=-1) @ words[width:]
        torch.testing.assert_close(model.similarities(image, text)[:, j], expected, rtol=0, atol=1e-12)


def test_the_loss_is_the_sigmoid_of_its_similarities() -> None:
    model = seeded().double().eval()
    batch = make_batch(model, dtype=torch.float64)
    logits = model.log_scale.exp() * cosines(model, batch) + model.logit_bias
    signs = 2 * torch.eye(8, dtype=torch.float64) - 1
    torch.testing.assert_close(total(model, batch), -F.logsigmoid(signs * logits).sum() / 8, rtol=0, atol=1e-12)


def test_one_token_is_siglip() -> None:
    """Every text sees one vector: an inner product, whatever it asks."""
    model = seeded(replace(TINY, num_tokens=1)).double().eval()
    batch = make_batch(model, dtype=torch.float64)
    image, text = model.encode_image(batch.pixels), model.encode_text(batch.tokens)
    vectors = F.normalize(image[:, 0, TINY.embed_dim :] @ model.output, dim=-1)
    features = text[:, TINY.embed_dim :]
    torch.testing.assert_close(cosines(model, batch), vectors @ features.T, rtol=0, atol=1e-12)
    expected = sigmoid(vectors, features, model.log_scale, model.logit_bias)
    torch.testing.assert_close(total(model, batch), expected, rtol=0, atol=1e-12)


def test_texts_see_different_pictures() -> None:
    """The mixtures of one picture for several texts differ, and with a high temperature they do not."""
    spread = []
    for temperature in (0.1, 5.0, 1e6):
        model = seeded(replace(TINY, temperature=temperature)).double().eval()
        batch = make_batch(model, dtype=torch.float64)
        image, text = model.encode_image(batch.pixels), model.encode_text(batch.tokens)
        asked = torch.cat([text[:, :64], text[:1, 64:].expand(8, 64)], dim=1)  # all compared with one feature
        spread.append(mixture_similarities(image, asked, model.output, TINY.num_heads).std(1).mean().item())
    assert spread[0] > spread[1] > 10 * spread[2]
    assert spread[2] < 1e-5


def test_equal_weights_over_a_map_are_the_convnets_own_pool() -> None:
    """One place a token and a projection each: their sum is the ConvNet's flat pool and projection."""
    torch.manual_seed(0)
    tower = build_image_tower(CONVNET, 8, "gelu").double()
    tokens = MapTokens(CONVNET, 4).double()
    own = {f"trunk.{name}": value for name, value in tower.state_dict().items() if name.startswith("stages")}
    own |= {name: value for name, value in tower.state_dict().items() if name.startswith("norm.")}
    missing = tokens.load_state_dict(own, strict=False)
    assert missing.missing_keys == ["pool"]
    assert not missing.unexpected_keys
    pixels = torch.randn(5, 3, 16, 16, dtype=torch.float64)
    projections = tower.projection.view(32, 4, 8).transpose(0, 1)  # of the channels at each place
    mixed = (tokens(pixels).transpose(0, 1) @ projections).sum(0)
    torch.testing.assert_close(mixed, tower(pixels), rtol=0, atol=1e-12)


def test_fewer_tokens_than_places_share_them() -> None:
    pool = MapTokens(ConvNetConfig(), 3).pool
    assert pool.shape == (3, 16)
    torch.testing.assert_close(pool.sum(1), torch.ones(3))
    assert (pool > 0).sum(0).tolist() == [1] * 16


def test_evaluation_in_tiles_is_the_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """`pair_scores` of N pictures and C classes: in small tiles what it is at once, and what training computes."""
    model = seeded().eval()
    assert isinstance(model, PairScorer)
    batch = make_batch(model, 30)
    with torch.no_grad():
        images, texts = model.encode_image(batch.pixels), model.encode_text(make_batch(model, 17, seed=1).tokens)
        expected = mixture_similarities(images.double(), texts.double(), model.output.double(), TINY.num_heads).float()
    torch.testing.assert_close(pair_scores(model)(images, texts), expected, rtol=0, atol=1e-6)
    shapes = []
    similarities = model.similarities
    monkeypatch.setattr(model, "similarities", lambda a, b: shapes.append((len(a), len(b))) or similarities(a, b))
    monkeypatch.setattr("wordsight.evaluate.scoring.TILE_NUMBERS", 20 * images[0].numel())
    torch.testing.assert_close(pair_scores(model)(images, texts), expected, rtol=0, atol=1e-6)
    assert len(shapes) > 20
    assert max(a * b for a, b in shapes) <= 20


def test_the_length_of_a_class_vector_does_not_matter() -> None:
    model = seeded().eval()
    batch = make_batch(model)
    image, text = model.encode_image(batch.pixels), model.encode_text(batch.tokens)
    width = TINY.embed_dim
    shorter = torch.cat([text[:, :width], 0.3 * text[:, width:]], dim=1)
    torch.testing.assert_close(model.similarities(image, shorter), model.similarities(image, text), rtol=0, atol=1e-6)


def test_normalize_concerns_the_feature_alone() -> None:
    model = seeded().eval()
    tokens, width = make_batch(model).tokens, TINY.embed_dim
    unit, raw = model.encode_text(tokens), model.encode_text(tokens, normalize=False)
    assert torch.equal(unit[:, :width], raw[:, :width])
    torch.testing.assert_close(unit[:, width:].norm(dim=1), torch.ones(8))
    torch.testing.assert_close(F.normalize(raw[:, width:], dim=1), unit[:, width:])
    pixels = make_batch(model).pixels
    assert torch.equal(model.encode_image(pixels), model.encode_image(pixels, normalize=False))
    assert model.encode_image(pixels).shape == (8, TINY.num_tokens, 2 * width)


def test_scale_bias_and_output_are_the_losss_own() -> None:
    model = seeded()
    assert model.loss_parameters() == [model.log_scale, model.logit_bias, model.output]
    assert model.logit_bias.item() == -10
    with torch.no_grad():
        model.log_scale.fill_(9.0)
    model.clamp_()
    assert model.log_scale.item() == pytest.approx(4.60517, abs=1e-4)


def test_it_travels_with_its_tokenizer_and_embeds(tmp_path: Path) -> None:
    """Saved and loaded it scores pictures and texts, bit for bit."""
    tokenizer = train_tokenizer([f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES], 520, context_length=8)
    config = replace(TINY, text=replace(TINY.text, vocab_size=tokenizer.vocab_size, context_length=8))
    model = wordsight.create(config, seed=1)
    model.tokenizer = tokenizer
    again = wordsight.load(wordsight.save(model, tmp_path / "model"))
    assert isinstance(again, Llip)
    assert again.config == config
    pictures = [Image.new("RGB", (40, 30), colour) for colour in COLOURS]
    images, texts = again.embed_images(pictures), again.embed_texts(["a red ellipse", "a blue line"])
    assert images.shape == (len(COLOURS), TINY.num_tokens, 2 * TINY.embed_dim)
    expected = pair_scores(model)(model.embed_images(pictures), model.embed_texts(["a red ellipse", "a blue line"]))
    assert torch.equal(pair_scores(again)(images, texts), expected)


def test_the_recipe_trains_on_the_embedded_pictures(tmp_path: Path) -> None:
    """A few steps of `wordsight train llip_quickstart`."""
    settings = ["steps=3", "batch_size=16", "micro_batch_size=6", "log_every_steps=1", "recalibrate_batches=1"]
    settings += ["data.cache_decoded=false", "data.sources=sample:train-openclipart", "optim.warmup_steps=1"]
    recipe = replace(make_recipe("llip_quickstart", settings), evaluations=(), best_metric=None)
    assert fit(recipe, tmp_path / "run", device="cpu", progress=False).complete
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(3 < line["loss"] < 9 for line in lines if "loss" in line)
    assert isinstance(wordsight.load(tmp_path / "run"), Llip)


@pytest.mark.parametrize("name", [n for n in catalog.CATALOG if n.startswith(("llip", "unicl"))])
def test_catalogue_sizes_are_those_of_the_models_and_configs_survive_json(name: str) -> None:
    entry = catalog.find(name)
    with torch.device("meta"):
        model = catalog.system_class(entry.config)(entry.config)
    assert sum(p.numel() for p in model.parameters()) == entry.num_parameters
    assert config_from_dict(type(entry.config), json.loads(json.dumps(config_to_dict(entry.config)))) == entry.config


def test_configs_refuse_nonsense() -> None:
    for change, message in (
        ({"num_tokens": 0}, "num_tokens must be at least 1"),
        ({"num_heads": 3}, "num_heads 3 must divide embed_dim 64"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"duplicates": "soft"}, "multi_positive"),
        ({"activation": "relu"}, "'relu'"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(TINY, **change)
    with pytest.raises(ValueError, match="num_tokens is 5, and the tower's last map has only 4 places"):
        Llip(replace(TINY, image=CONVNET, num_tokens=5))
    with pytest.raises(ValueError, match="not EfficientNetConfig"):
        Llip(replace(TINY, image=efficientnet("b0")))
