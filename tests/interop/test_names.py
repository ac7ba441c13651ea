"""The tables of names work both ways, for every parameter of every catalogued architecture."""

from __future__ import annotations

import pytest
import torch

from wordsight import catalog
from wordsight.interop import huggingface, openai
from wordsight.interop.names import NameMap, name_list
from wordsight.models.contrastive.clip import CLIP, CLIPConfig
from wordsight.nn.vit import ViTConfig


def state(name: str) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return CLIP(catalog.find(name).config).state_dict()


def test_rows_translate_both_ways_and_nothing_else() -> None:
    names = NameMap([("a.{n}.b.{wb}", "c.{n}.{wb}"), ("x.{qkv}_proj", "y.{qkv}")])
    assert names.ours("a.12.b.bias") == "c.12.bias"
    assert names.theirs("c.12.bias") == "a.12.b.bias"
    assert names.ours("x.k_proj") == "y.k"
    for other in ("a.12.b.gain", "a.x.b.bias", "a.12.b.bias.more", "A.12.b.bias", "a.12xb.bias", ""):
        assert names.ours(other) is None


@pytest.mark.parametrize("name", ["RN50", "RN50x4", "ViT-B/32", "ViT-L/14@336"])
def test_every_published_model_has_openai_s_names_and_back(name: str) -> None:
    from open_clip import get_model_config
    from open_clip.model import CLIP as Reference

    ours = state(name)
    theirs = openai.to_theirs(ours)
    with torch.device("meta"):
        reference = Reference(**get_model_config(name.replace("/", "-").replace("@", "-"))).state_dict()
    assert {k: v.shape for k, v in theirs.items()} == {k: v.shape for k, v in reference.items()}
    assert {k: v.shape for k, v in openai.to_ours(theirs).items()} == {k: v.shape for k, v in ours.items()}


@pytest.mark.parametrize(
    "name",
    [
        n
        for n, e in catalog.CATALOG.items()
        if isinstance(e.config, CLIPConfig) and isinstance(e.config.image, ViTConfig) and "-gelu" not in n
    ],
)
def test_every_vit_has_transformers_names_and_back(name: str) -> None:
    from transformers import CLIPConfig, CLIPModel

    ours = state(name)
    theirs = huggingface.to_theirs(ours)
    config = huggingface._config_json(catalog.find(name).config, _Ends())  # type: ignore[arg-type]
    with torch.device("meta"):
        reference = CLIPModel(
            CLIPConfig(**{k: config[k] for k in ("vision_config", "text_config", "projection_dim")})
        ).state_dict()
    assert {k: v.shape for k, v in theirs.items()} == {k: v.shape for k, v in reference.items()}
    assert {k: v.shape for k, v in huggingface.to_ours(theirs).items()} == {k: v.shape for k, v in ours.items()}


class _Ends:
    start_id, end_id = 49406, 49407


@pytest.mark.parametrize("name", ["RN50", "RN50x4", "RN50x64", "ViT-B/32", "ViT-L/14@336"])
def test_shapes_tell_the_published_architectures(name: str) -> None:
    from wordsight.interop.checkpoint import _differences
    from wordsight.interop.open_clip import config_from_model_cfg

    told = config_from_model_cfg(openai.shapes_to_open_clip_config(openai.to_theirs(state(name))), None)  # type: ignore[arg-type]
    assert _differences(told, catalog.find(name).config) == []


def test_newer_spellings_are_read() -> None:
    x = torch.zeros(1)
    spelled = {
        "model.vision_model.layers.3.attention.o_proj.weight": x,
        "clip.logit_scale": x,
        "vision_model.vision_model.pre_layernorm.bias": x,
        "text_model.encoder.layers.0.self_attn.out_proj.bias": x,
        "text_model.embeddings.position_ids": x,
    }
    assert set(huggingface.to_ours(spelled)) == {
        "image_tower.blocks.3.attn.proj.weight",
        "log_scale",
        "image_tower.norm_pre.bias",
        "text_tower.blocks.0.attn.proj.bias",
    }


def test_half_of_a_q_k_v_stays_to_be_named() -> None:
    names = [f"text_model.encoder.layers.0.self_attn.{x}_proj.weight" for x in "qkv"]
    whole = huggingface.to_ours({n: torch.full((2, 2), float(i)) for i, n in enumerate(names)})
    assert list(whole) == ["text_tower.blocks.0.attn.qkv.weight"]
    assert whole["text_tower.blocks.0.attn.qkv.weight"][:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert len(huggingface.to_ours({n: torch.zeros(2, 2) for n in names[:2]})) == 2


def test_name_list() -> None:
    assert name_list("abcdefg") == "a, b, c, d, e and 2 more"
    assert name_list("ab") == "a, b"
