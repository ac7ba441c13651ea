"""CLIP: the conformance suite on every small catalogue config, then what is its own."""

import math
from dataclasses import replace

import pytest
import torch

from tests.models.conformance import CHECKS, make_batch, total
from wordsight import catalog
from wordsight.models.contrastive.clip import CLIP, CLIPConfig
from wordsight.nn.resnet import ResNetConfig
from wordsight.nn.text import TextConfig
from wordsight.nn.towers import config_from_dict, config_to_dict
from wordsight.nn.vit import ViTConfig

MAX_PARAMETERS = 5_000_000  # of the catalogue's entries that the suite runs whole
TINY, TINY_RESNET = (catalog.find(name).config for name in ("clip-tiny", "clip-tiny-resnet"))
CONFIGS = {
    **{
        entry.name: entry.config
        for entry in catalog.CATALOG.values()
        if isinstance(entry.config, CLIPConfig) and entry.num_parameters <= MAX_PARAMETERS
    },
    "gelu": replace(TINY, activation="gelu"),
    "multi-positive": replace(TINY, duplicates="multi_positive"),
}
REGULARISED = {
    "patch dropout": replace(TINY, image=replace(TINY.image, patch_dropout=0.5)),
    "stochastic depth": replace(
        TINY, image=replace(TINY.image, stochastic_depth=0.3), text=replace(TINY.text, stochastic_depth=0.3)
    ),
    "stochastic depth, resnet": replace(TINY_RESNET, image=replace(TINY_RESNET.image, stochastic_depth=0.3)),
}
RANDOM_CHECKS = [
    check for check in CHECKS if any(word in check.__name__ for word in ("seeds", "checkpointing_changes", "finite"))
]


def seeded(config: CLIPConfig) -> CLIP:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CLIP(config)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("name", CONFIGS)
def test_conforms(name: str, check: object) -> None:
    check(lambda: seeded(CONFIGS[name]))


@pytest.mark.parametrize("check", RANDOM_CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("name", REGULARISED)
def test_conforms_with_regularisation(name: str, check: object) -> None:
    check(lambda: seeded(REGULARISED[name]))


@pytest.mark.parametrize("config", [TINY, TINY_RESNET], ids=["vit", "resnet"])
def test_initial_loss_is_log_batch_within_noise(config: CLIPConfig) -> None:
    losses = []
    for seed in range(5):
        torch.manual_seed(seed)
        model = CLIP(config)
        losses.append(total(model, make_batch(model, rows=64, seed=seed)).item())
    assert sum(losses) / 5 == pytest.approx(math.log(64), rel=0.05)


def test_log_scale_starts_at_log_of_one_over_seven_hundredths() -> None:
    model = seeded(TINY)
    assert model.log_scale.shape == ()
    assert model.log_scale.item() == pytest.approx(math.log(1 / 0.07))
    assert model.logit_bias is None
    assert model.loss_parameters() == [model.log_scale]


def test_log_scale_is_clamped_and_its_gradient_comes_back() -> None:
    """Over the bound the loss does not feel the surplus; after `clamp_` it stands at the bound, with a gradient to leave it."""
    model, bound = seeded(TINY), math.log(100)
    batch = make_batch(model)
    with torch.no_grad():
        model.log_scale.fill_(bound)
    at_bound = total(model, batch)
    with torch.no_grad():
        model.log_scale.fill_(bound + 3)
    torch.testing.assert_close(total(model, batch), at_bound)
    model.clamp_()
    assert model.log_scale.item() == pytest.approx(bound)
    total(model, batch).backward()
    assert model.log_scale.grad.item() > 0.01  # random pairs: a lower scale would be better


def test_multi_positive_uses_both_ids_and_plain_neither() -> None:
    batch = make_batch(seeded(TINY))
    twins = replace(batch, text_ids=batch.text_ids.clone().index_fill_(0, torch.tensor([1]), 0))
    for ids in ("text_ids", "image_ids"):
        changed = replace(batch, **{ids: twins.text_ids})
        plain, multi = seeded(TINY), seeded(replace(TINY, duplicates="multi_positive"))
        assert torch.equal(total(plain, changed), total(plain, batch))
        assert not torch.isclose(total(multi, changed), total(multi, batch))
        torch.testing.assert_close(total(multi, batch), total(plain, batch))


def test_wrong_pixels_and_tokens_are_named_with_the_mend() -> None:
    model = seeded(TINY)
    for pixels in (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(2, 3, 33, 32), torch.zeros(3, 32, 32)):
        with pytest.raises(ValueError, match=r"normalised floats \(B, 3, 32, 32\).*model.preprocess"):
            model.encode_image(pixels)
    for tokens in (torch.zeros(2, 33, dtype=torch.int64), torch.zeros(4, dtype=torch.int64), torch.zeros(2, 8)):
        with pytest.raises(ValueError, match=r"integers \(N, at most 32\).*model.tokenize"):
            model.encode_text(tokens)


@pytest.mark.parametrize("name", [name for name in catalog.CATALOG if not name.endswith("-gelu")])
def test_catalogue_sizes_are_those_of_the_models_and_configs_survive_json(name: str) -> None:
    import json

    entry = catalog.CATALOG[name]
    with torch.device("meta"):
        model = catalog.system_class(entry.config)(entry.config)
    assert sum(p.numel() for p in model.parameters()) == entry.num_parameters
    assert entry.name == name
    assert config_from_dict(type(entry.config), json.loads(json.dumps(config_to_dict(entry.config)))) == entry.config


def test_published_models_are_all_there_twice() -> None:
    published = ["RN50", "RN101", "RN50x4", "RN50x16", "RN50x64", "ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336"]
    for name in published:
        quick, gelu = catalog.find(name).config, catalog.find(f"{name}-gelu").config
        assert quick.activation == "quick_gelu"
        assert gelu == replace(quick, activation="gelu")
    # sizes as the paper's repository and others report them, in millions
    sizes = [102.0, 119.7, 178.3, 291.0, 623.3, 151.3, 149.6, 427.6, 427.9]
    assert [round(catalog.find(name).num_parameters / 1e6, 1) for name in published] == sizes


@pytest.mark.parametrize(("wrong", "near"), [("vit-b/32", "ViT-B/32"), ("RN50x65", "RN50x64"), ("ViT-L-14", "ViT-L/14")])
def test_unknown_names_get_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"{wrong}.*{near}"):
        catalog.find(wrong)


def test_configs_refuse_what_they_do_not_know() -> None:
    values = config_to_dict(TINY)
    with pytest.raises(ValueError, match=r"CLIPConfig has no embed_dims; it has .*embed_dim"):
        config_from_dict(CLIPConfig, {**values, "embed_dims": 3})
    with pytest.raises(ValueError, match=r"ViTConfig has no depth"):
        config_from_dict(CLIPConfig, {**values, "image": {**values["image"], "depth": 3}})
    with pytest.raises(ValueError, match=r"'swin' is unknown; allowed are .*vit, resnet"):
        config_from_dict(CLIPConfig, {**values, "image": {"type": "swin"}})
    with pytest.raises(ValueError, match=r"embed_dim"):
        config_from_dict(CLIPConfig, {"image": values["image"], "text": values["text"]})
    with pytest.raises(ValueError, match="multi_positive"):
        CLIPConfig(embed_dim=8, image=ViTConfig(), text=TextConfig(), duplicates="soft")
    with pytest.raises(ValueError, match="'relu'"):
        CLIPConfig(embed_dim=8, image=ResNetConfig(), text=TextConfig(), activation="relu")


def test_vision_weights_start_as_published() -> None:
    """Vision transformers start from torch's defaults; class token, positions, projection and pools at width^-.5."""
    vit, resnet = seeded(replace(TINY, image=replace(TINY.image, width=128))).image_tower, seeded(TINY_RESNET).image_tower
    for weight in (vit.class_token, vit.position_embedding, vit.projection):
        assert weight.std().item() == pytest.approx(128**-0.5, rel=0.2)
    bound = math.sqrt(6 / (128 + 3 * 128))  # Glorot's, over the three fused matrices, as in torch's MultiheadAttention
    assert vit.blocks[0].attn.qkv.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert vit.blocks[0].mlp.fc1.weight.abs().max().item() == pytest.approx(128**-0.5, rel=0.01)
    assert resnet.attnpool.q.weight.std().item() == pytest.approx(256**-0.5, rel=0.05)
    assert all(not block.bn3.weight.any() for stage in resnet.stages for block in stage)
