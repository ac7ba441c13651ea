"""SigLIP folders of transformers and open_clip both ways: the libraries give our outputs for what we write, and we theirs."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import wordsight
from tests.interop.reference import difference, outputs, picture, randomize
from tests.interop.siglip_reference import LENGTH, TEXTS, TRUNK, open_clip_model, register_trunk, transformers_model, vocabulary
from wordsight import catalog
from wordsight.interop import siglip, siglip_open_clip
from wordsight.interop.safe_read import CheckpointError
from wordsight.models.contrastive.siglip import SigLIP, SigLIPConfig

PLAIN_TEXTS = ["a photo of a cat", "two dogs running", "naïve café", "x" * 90]
PREPROCESS_CFG = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}


@pytest.fixture(autouse=True)
def _strict() -> Any:
    """A warning is a failure unless a test expects it: nothing is replaced unsaid."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning, module="tests|wordsight")
        yield


def write_transformers(folder: Path, **acts: str) -> Any:
    """A folder as transformers' model, tokenizer and image processor write it."""
    from transformers import SiglipImageProcessor, SiglipTokenizer

    model = randomize(transformers_model(**acts))
    with torch.no_grad():
        model.logit_scale.fill_(2.5)
    model.save_pretrained(folder)
    vocabulary().save(folder)
    SiglipTokenizer(str(folder / "spiece.model"), model_max_length=LENGTH).save_pretrained(folder)
    SiglipImageProcessor(size={"height": 20, "width": 20}, resample=2).save_pretrained(folder)
    return model


@torch.no_grad()
def their_outputs(model: Any, pixels: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    found = model(pixel_values=pixels, input_ids=tokens)
    return found.image_embeds, found.text_embeds, found.logits_per_image


@torch.no_grad()
def our_outputs(model: SigLIP, pixels: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    image, text = outputs(model, pixels, tokens)
    return image, text, model.log_scale.exp() * image @ text.T + model.logit_bias


def test_a_transformers_folder_gives_its_outputs(tmp_path: Path) -> None:
    from transformers import AutoProcessor

    peer = write_transformers(tmp_path, text_act="gelu")
    ours = wordsight.load(tmp_path)
    assert isinstance(ours, SigLIP)
    assert (ours.config.activation, ours.config.text_activation) == ("gelu_tanh", "gelu")
    assert (ours.preprocessor.resize, ours.preprocessor.interpolation, ours.preprocessor.mean) == (
        "squash",
        "bilinear",
        (0.5,) * 3,
    )
    tokens = ours.tokenize(TEXTS)
    processor = AutoProcessor.from_pretrained(tmp_path)
    given = processor.tokenizer(TEXTS, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(tokens, given)
    pixels = torch.stack([ours.preprocess(picture(seed)) for seed in range(2)])
    assert difference(our_outputs(ours, pixels, tokens), their_outputs(peer, pixels, tokens)) < 1e-5


def test_transformers_round_trip_keeps_dtype_and_bits_and_loads_there(tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    write_transformers(tmp_path / "a")
    state = {k: v.half() if v.ndim == 2 else v for k, v in load_file(tmp_path / "a" / "model.safetensors").items()}
    save_file(state, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    for src, dst, to in (("a", "b", "wordsight"), ("b", "c", "huggingface"), ("c", "d", "wordsight")):
        wordsight.convert(tmp_path / src, tmp_path / dst, to=to)
    back = load_file(tmp_path / "c" / "model.safetensors")
    assert back.keys() == state.keys()
    assert all(back[k].dtype == state[k].dtype and torch.equal(back[k], state[k]) for k in state)
    one, two = wordsight.load(tmp_path / "b"), wordsight.load(tmp_path / "d")
    assert one.config == two.config == wordsight.load(tmp_path / "a").config
    assert one.preprocessor == two.preprocessor
    assert one.tokenizer.to_config() == two.tokenizer.to_config()
    assert torch.equal(one.tokenize(TEXTS), two.tokenize(TEXTS))
    peer = AutoModel.from_pretrained(tmp_path / "c", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "c")
    tokens = tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(tokens, one.tokenize(TEXTS))
    pixels = torch.randn(2, 3, 20, 20)
    assert difference(our_outputs(one, pixels, tokens), their_outputs(peer, pixels, tokens)) < 1e-5


def test_save_and_load_are_bit_equal(tmp_path: Path) -> None:
    model = wordsight.create("siglip-tiny")
    with pytest.raises(ValueError, match="no tokenizer"):
        wordsight.save(model, tmp_path / "x")
    from dataclasses import replace

    model = wordsight.create(replace(model.config, text=replace(model.config.text, vocab_size=120, context_length=LENGTH)))
    model.tokenizer = vocabulary().with_options(clean="big_vision")
    again = wordsight.load(wordsight.save(model, tmp_path / "own"))
    assert sorted(p.name for p in (tmp_path / "own").iterdir()) == ["model.safetensors", "spiece.model", "wordsight.json"]
    assert again.config == model.config
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert again.tokenizer.to_config() == model.tokenizer.to_config()
    model.tokenizer = vocabulary().with_options(pad_id=0)
    with pytest.raises(CheckpointError, match="pads with 0"):
        wordsight.save(model, tmp_path / "wrong")
    with pytest.warns(UserWarning, match="clean='big_vision' says; transformers will do it by its own rules"):
        wordsight.convert(tmp_path / "own", tmp_path / "theirs", to="huggingface")


def write_open_clip(folder: Path, tanh: bool = False) -> Any:
    """A folder as open_clip's `save_for_hf` writes it."""
    model, model_cfg = open_clip_model(tanh)
    randomize(model)
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": PREPROCESS_CFG}))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    vocabulary().save_huggingface(folder)
    return model


@pytest.mark.parametrize("tanh", [False, True], ids=["first", "second"])
def test_an_open_clip_folder_both_ways(tmp_path: Path, tanh: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip

    register_trunk(monkeypatch)
    peer = write_open_clip(tmp_path / "a", tanh)
    ours = wordsight.load(tmp_path / "a")
    assert (ours.tokenizer.clean, ours.preprocessor.resize) == ("open_clip", "squash")
    pixels, tokens = torch.randn(3, 3, 32, 32), ours.tokenize(TEXTS)
    assert difference(outputs(ours, pixels, tokens), outputs(peer.eval(), pixels, tokens)) < 1e-5
    wordsight.convert(tmp_path / "a", tmp_path / "b")
    wordsight.convert(tmp_path / "b", tmp_path / "c", to="open_clip")
    state, back = (load_file(tmp_path / name / "open_clip_model.safetensors") for name in ("a", "c"))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], state[k]) for k in state)
    assert wordsight.load(tmp_path / "c").config == ours.config
    written, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'c'}")
    theirs = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'c'}")(PLAIN_TEXTS)
    assert torch.equal(theirs, ours.tokenize(PLAIN_TEXTS))
    assert difference(outputs(written.eval(), pixels, tokens), outputs(ours, pixels, tokens)) < 1e-5
    assert (preprocess(picture()) - ours.preprocess(picture())).abs().max() < 1e-5


def test_a_bare_state_dict_of_open_clip_needs_its_model_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register_trunk(monkeypatch)
    peer, model_cfg = open_clip_model(True)
    randomize(peer)
    vocabulary().save(tmp_path)
    torch.save(peer.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="SigLIP of open_clip without its open_clip_config"):
        wordsight.load(tmp_path / "weights.pt")
    config = siglip_open_clip.config_from_model_cfg(model_cfg, tmp_path)
    entry = catalog.Entry(name="named", config=config, num_parameters=0, paper="", summary="")
    monkeypatch.setattr(catalog, "CATALOG", {**catalog.CATALOG, "named": entry})
    with pytest.warns(UserWarning, match="no preprocessing files"):
        ours = wordsight.load(tmp_path / "weights.pt", model="named")
    pixels, tokens = torch.randn(2, 3, 32, 32), ours.tokenize(TEXTS)
    assert difference(outputs(ours, pixels, tokens), outputs(peer.eval(), pixels, tokens)) < 1e-5


@pytest.mark.parametrize(
    ("part", "values", "says"),
    [
        ("vision_cfg", {"timm_model_name": "vit_base_patch16_siglip_gap_224"}, "siglip_gap_224' is unknown; known are vit_base"),
        ("vision_cfg", {"timm_pool": "avg"}, "timm_pool = 'avg'"),
        ("text_cfg", {"no_causal_mask": False}, "no_causal_mask = False"),
        ("text_cfg", {"tokenizer_kwargs": {"clean": "lower"}}, "tokenizer_kwargs = .*'lower'"),
        ("text_cfg", {"pool_type": "argmax"}, "pool_type = 'argmax'"),
        ("text_cfg", {"new_option": 1}, "new_option is unknown"),
        ("text_cfg", {"vocab_size": 121}, "token_embedding.weight is .120, 32., must be .121, 32."),
    ],
)
def test_open_clip_options_that_we_can_not_follow(
    tmp_path: Path, part: str, values: dict, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_trunk(monkeypatch)
    write_open_clip(tmp_path)
    path = tmp_path / "open_clip_config.json"
    content = json.loads(path.read_text())
    content["model_cfg"][part] |= values
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=says):
        wordsight.load(tmp_path)


def test_what_the_other_libraries_do_not_have_is_named(tmp_path: Path) -> None:
    from wordsight.data.tokenize import train_tokenizer

    model = wordsight.create("siglip-quickstart")
    model.tokenizer = train_tokenizer(["a cat"] * 3, 4096, context_length=20)
    if model.tokenizer.vocab_size != 4096:  # fewer merges than asked for
        from dataclasses import replace

        model = wordsight.create(replace(model.config, text=replace(model.config.text, vocab_size=model.tokenizer.vocab_size)))
        model.tokenizer = train_tokenizer(["a cat"] * 3, 4096, context_length=20)
    wordsight.save(model, tmp_path / "own")
    for to, name in (("huggingface", "transformers"), ("open_clip", "open_clip")):
        with pytest.raises(ValueError, match=f"{name}'s SigLIP"):
            wordsight.convert(tmp_path / "own", tmp_path / to, to=to)
    write_transformers(tmp_path / "hf")
    with pytest.raises(CheckpointError, match="none of them is this ViT of 32 x 2 at 20 px"):
        wordsight.convert(tmp_path / "hf", tmp_path / "oc", to="open_clip")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"vision_config": {"vision_use_head": False}}, "vision_use_head = False"),
        ({"text_config": {"hidden_act": "relu"}}, "hidden_act = 'relu'"),
        ({"text_config": {"projection_size": 16}}, "ends in 16 numbers, the image tower in 768"),
    ],
)
def test_transformers_options_that_we_can_not_follow(values: dict, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        siglip.config_from_json(values, Path("config.json"))
    assert siglip.config_from_json({"model_type": "siglip"}, Path("x")) == catalog.find("ViT-B/16-SigLIP").config


PUBLISHED = [n for n, e in catalog.CATALOG.items() if isinstance(e.config, SigLIPConfig) and "/" in n]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_and_names_are_transformers(name: str) -> None:
    from transformers import SiglipConfig, SiglipModel

    entry = catalog.find(name)
    values = siglip.config_json(entry.config, vocabulary())
    with torch.device("meta"):
        peer = SiglipModel(SiglipConfig(vision_config=values["vision_config"], text_config=values["text_config"])).state_dict()
        ours = SigLIP(entry.config).state_dict()
    assert sum(tensor.numel() for tensor in peer.values()) == entry.num_parameters == sum(t.numel() for t in ours.values())
    theirs = siglip.to_theirs(ours)
    assert {n: t.shape for n, t in theirs.items()} == {n: t.shape for n, t in peer.items()}
    assert {n: t.shape for n, t in siglip.to_ours(theirs).items()} == {n: t.shape for n, t in ours.items()}


@pytest.mark.parametrize(
    "name",
    ["ViT-B-16-SigLIP", "ViT-L-16-SigLIP-384", "ViT-SO400M-14-SigLIP-384", "ViT-B-32-SigLIP2-256", "ViT-gopt-16-SigLIP2-256"],
)
def test_open_clips_own_configs_have_our_shapes(name: str) -> None:
    from open_clip.factory import get_model_config
    from open_clip.model import CustomTextCLIP

    model_cfg = get_model_config(name)
    with torch.device("meta"):
        peer = CustomTextCLIP(**{k: v for k, v in model_cfg.items() if k != "custom_text"}).state_dict()
        ours = SigLIP(siglip_open_clip.config_from_model_cfg(model_cfg, Path(name))).state_dict()
    theirs = siglip_open_clip.to_theirs(ours)
    assert {n: t.shape for n, t in theirs.items()} == {n: t.shape for n, t in peer.items()}
    assert {n: t.shape for n, t in siglip_open_clip.to_ours(theirs).items()} == {n: t.shape for n, t in ours.items()}


@pytest.mark.parametrize("name", [name for name in siglip_open_clip.TIMM_TRUNKS if name != TRUNK])
def test_trunks_are_timms(name: str) -> None:
    import timm

    config, activation = siglip_open_clip.TIMM_TRUNKS[name]
    with torch.device("meta"):
        trunk = timm.create_model(name, num_classes=0)
    assert trunk.pos_embed.shape == (1, config.grid[0] ** 2, config.width)
    assert trunk.patch_embed.proj.weight.shape == (config.width, 3, config.patch_size_px, config.patch_size_px)
    assert (len(trunk.blocks), trunk.blocks[0].attn.num_heads) == (config.num_layers, config.num_heads)
    assert trunk.blocks[0].mlp.fc1.out_features == round(config.width * config.mlp_ratio)
    x = torch.linspace(-3, 3, 50)
    for act in (trunk.blocks[0].mlp.act, trunk.attn_pool.mlp.act):
        assert torch.equal(act(x), torch.nn.functional.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none"))
