"""open_clip folders both ways: open_clip gives our outputs for what we write, and we give its outputs for what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

import wordsight
from tests.interop.reference import RESNET_CFG, TEXTS, VIT_CFG, difference, model_cfg, open_clip_model, outputs, picture
from wordsight.data.tokenize import train_tokenizer
from wordsight.data.transform import Preprocess
from wordsight.interop.safe_read import CheckpointError

PREPROCESS_CFG = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear", "resize_mode": "squash"}


def write(folder: Path, vision: dict[str, Any] = VIT_CFG, *, quick_gelu: bool = True, safe: bool = True, **config: Any) -> Any:
    """A folder as open_clip's `save_for_hf` writes it; returns its model."""
    model = open_clip_model(vision, quick_gelu=quick_gelu)
    content = {"model_cfg": model_cfg(vision, quick_gelu=quick_gelu), "preprocess_cfg": PREPROCESS_CFG, **config}
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors") if safe else torch.save(
        state, folder / "open_clip_pytorch_model.bin"
    )
    return model


def from_open_clip(folder: Path) -> tuple[Any, Any, Any]:
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    return model.eval(), preprocess, open_clip.get_tokenizer(f"local-dir:{folder}")


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("quick_gelu", [True, False])
@pytest.mark.parametrize("vision", [VIT_CFG, RESNET_CFG], ids=["vit", "resnet"])
def test_folder_gives_the_reference_s_outputs(tmp_path: Path, vision: dict, quick_gelu: bool, safe: bool) -> None:
    reference = write(tmp_path, vision, quick_gelu=quick_gelu, safe=safe)
    _, their_preprocess, their_tokenizer = from_open_clip(tmp_path)
    model = wordsight.load(tmp_path)
    assert model.config.activation == ("quick_gelu" if quick_gelu else "gelu")
    pixels = torch.stack([model.preprocess(picture(i)) for i in range(2)])
    assert (pixels - torch.stack([their_preprocess(picture(i)) for i in range(2)])).abs().max() < 2 / 255 / 0.2
    assert model.preprocessor == Preprocess(
        image_size_px=64, resize="squash", interpolation="bilinear", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)
    )
    tokens = model.tokenize(TEXTS)
    assert torch.equal(tokens, their_tokenizer(TEXTS))
    assert difference(outputs(reference, pixels, tokens), outputs(model, pixels, tokens)) < 1e-5


@pytest.mark.parametrize("name", ["clip-tiny", "clip-tiny-resnet"])
def test_open_clip_loads_what_we_write(tmp_path: Path, name: str) -> None:
    model = wordsight.create(name, seed=1)
    model.preprocessor = Preprocess(image_size_px=model.config.image.image_size_px, resize="squash", mean=(0.5, 0.5, 0.5))
    wordsight.save(model, tmp_path / "own")
    wordsight.convert(tmp_path / "own", tmp_path / "theirs", to="open_clip")
    theirs, preprocess, tokenizer = from_open_clip(tmp_path / "theirs")
    tokens = model.tokenize(TEXTS)
    assert torch.equal(tokens, tokenizer(TEXTS))
    pixels = torch.stack([model.preprocess(picture(i)) for i in range(2)])
    assert (torch.stack([preprocess(picture(i)) for i in range(2)]) - pixels).abs().max() < 2 / 255 / 0.26
    assert difference(outputs(theirs, pixels, tokens), outputs(model, pixels, tokens)) < 1e-6
    assert (theirs.encode_image(pixels, normalize=False).norm(dim=-1) > 0.01).all()


def test_own_vocabulary_travels(tmp_path: Path) -> None:
    from dataclasses import replace

    tokenizer = train_tokenizer(["a red cat", "a blue dog", "the sky, over there", "naïve café"] * 5, 600, context_length=16)
    config = wordsight.create("clip-tiny").config
    model = wordsight.create(replace(config, text=replace(config.text, vocab_size=tokenizer.vocab_size, context_length=16)))
    assert model.tokenizer is None
    with pytest.raises(ValueError, match=r"no tokenizer: set model\.tokenizer"):
        wordsight.save(model, tmp_path / "own")
    model.tokenizer = tokenizer
    wordsight.save(model, tmp_path / "own")
    wordsight.convert(tmp_path / "own", tmp_path / "theirs", to="open_clip")
    theirs, _, their_tokenizer = from_open_clip(tmp_path / "theirs")
    texts = ["A red dog &amp; the sky", "naïve", "cat " * 40]
    ours_ids, their_ids = model.tokenize(texts), their_tokenizer(texts)
    for ours, other in zip(ours_ids, their_ids, strict=True):
        end = int(ours.argmax())
        assert torch.equal(ours[: end + 1], other[: end + 1])
    again = wordsight.load(tmp_path / "theirs")
    with torch.no_grad():
        assert (theirs.encode_text(their_ids, normalize=True) - model.encode_text(ours_ids)).abs().max() < 1e-6
    assert torch.equal(again.tokenize(texts)[:, :4], ours_ids[:, :4])


def test_folder_without_preprocessing_says_so(tmp_path: Path) -> None:
    write(tmp_path, preprocess_cfg=None)
    with pytest.warns(UserWarning, match="no preprocessing files: CLIP's is used"):
        assert wordsight.load(tmp_path).preprocessor == Preprocess(image_size_px=64)


def test_weights_file_of_a_folder_takes_the_config_beside_it(tmp_path: Path) -> None:
    write(tmp_path, quick_gelu=False)
    assert wordsight.load(tmp_path / "open_clip_model.safetensors").config.activation == "gelu"


def change(folder: Path, **values: Any) -> None:
    """Set dotted keys of the folder's config, e.g. text_cfg__width=8."""
    path = folder / "open_clip_config.json"
    content = json.loads(path.read_text())
    for dotted, value in values.items():
        *parents, last = dotted.split("__")
        place = content
        for key in parents:
            place = place[key]
        place[last] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"model_cfg__vision_cfg__pool_type": "avg"}, "pool_type = 'avg'"),
        ({"model_cfg__vision_cfg__timm_model_name": "vit_base"}, "timm_model_name = 'vit_base'"),
        ({"model_cfg__vision_cfg__new_option": 1}, "new_option is unknown"),
        ({"model_cfg__text_cfg__no_causal_mask": True}, "no_causal_mask = True"),
        ({"model_cfg__text_cfg__hf_model_name": "roberta-base"}, "hf_model_name"),
        ({"model_cfg__init_logit_bias": -10}, "init_logit_bias = -10"),
        ({"model_cfg__text_cfg__vocab_size": 1000}, "token_embedding.weight is .49408, 64., must be .1000, 64."),
        ({"model_cfg__vision_cfg__layers": 3}, "missing: image_tower.blocks.2.norm1.weight"),
        ({"model_cfg__vision_cfg__layers": 1}, "surplus: image_tower.blocks.1.*and 7 more"),
        ({"model_cfg__vision_cfg__image_size": 96}, "position_embedding.*resize_positions"),
        ({"preprocess_cfg__resize_mode": "longest"}, "resize_mode 'longest'"),
        ({"preprocess_cfg__size": 224}, "pictures of 224 px, the image tower takes 64 px"),
        ({"model_cfg": None}, "no 'model_cfg'"),
    ],
)
def test_configs_that_we_can_not_follow_are_named(tmp_path: Path, values: dict, says: str) -> None:
    write(tmp_path)
    change(tmp_path, **values)
    with pytest.raises(CheckpointError, match=says):
        wordsight.load(tmp_path)


def test_config_against_the_named_model(tmp_path: Path) -> None:
    wordsight.save(wordsight.create("clip-tiny"), tmp_path / "own")
    wordsight.convert(tmp_path / "own", tmp_path / "theirs", to="open_clip")
    assert wordsight.load(tmp_path / "theirs", model="clip-tiny").config.activation == "quick_gelu"
    change(tmp_path / "theirs", model_cfg__quick_gelu=False)
    with pytest.raises(CheckpointError, match="activation gelu says its config, quick_gelu says the model="):
        wordsight.load(tmp_path / "theirs", model="clip-tiny")
    change(tmp_path / "theirs", model_cfg__quick_gelu=True)
    with pytest.raises(CheckpointError, match="is not the model that was named: image tower ViT, not ResNet"):
        wordsight.load(tmp_path / "theirs", model="clip-tiny-resnet")
    with pytest.raises(CheckpointError, match=r"image\.patch_size_px 8, not 32"):
        wordsight.load(tmp_path / "theirs", model="ViT-B/32")


def test_hostile_weights_in_a_folder_are_refused(tmp_path: Path) -> None:
    import os

    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'pwned'}",)

    write(tmp_path)
    (tmp_path / "open_clip_model.safetensors").unlink()
    torch.save({"a": Evil()}, tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="refused to read"):
        wordsight.load(tmp_path)
    assert not (tmp_path / "pwned").exists()


def test_round_trip_keeps_dtype_and_bits(tmp_path: Path) -> None:
    reference = write(tmp_path / "a")
    state = {k: v.half() if v.ndim == 2 else v for k, v in reference.state_dict().items()}
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "a" / "open_clip_model.safetensors")
    for src, dst, to in (("a", "b", "wordsight"), ("b", "c", "huggingface"), ("c", "d", "open_clip")):
        wordsight.convert(tmp_path / src, tmp_path / dst, to=to)
    back = load_file(tmp_path / "d" / "open_clip_model.safetensors")
    assert back.keys() == state.keys()
    assert all(back[k].dtype == state[k].dtype and torch.equal(back[k], state[k]) for k in state)
    assert json.loads((tmp_path / "d" / "open_clip_config.json").read_text())["preprocess_cfg"] == PREPROCESS_CFG
