"""transformers' ALIGN folders: outputs, loss and gradients as theirs, there and back bit by bit, preprocessing, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import wordsight
from tests.data.test_wordpiece import TEXTS
from tests.interop.reference import picture, randomize
from tests.parity.test_align_towers_parity import TEXT, VISION
from wordsight.data.transform import Preprocess
from wordsight.data.wordpiece import train_wordpiece
from wordsight.interop import align
from wordsight.interop.safe_read import CheckpointError
from wordsight.models.contrastive.align import ALIGN
from wordsight.types import Batch

# kakaobrain/align-base's
PREPROCESSING = {
    "image_processor_type": "EfficientNetImageProcessor",
    "do_resize": True,
    "size": {"height": 80, "width": 80},
    "resample": 2,
    "do_center_crop": True,
    "crop_size": {"height": 64, "width": 64},
    "do_rescale": True,
    "rescale_factor": 1 / 127.5,
    "rescale_offset": True,
    "do_normalize": False,
    "include_top": False,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def their_model(**config: Any) -> Any:
    from transformers import AlignConfig, AlignModel

    values = {"text_config": {**TEXT, "vocab_size": 240}, "vision_config": VISION, "projection_dim": 48, **config}
    model = randomize(AlignModel(AlignConfig(**values)))
    model.text_model.config._attn_implementation = "sdpa"  # its other one takes softmax in float32
    with torch.no_grad():
        model.temperature.fill_(0.2)
    return model


def write_folder(folder: Path) -> Any:
    """As on the hub: weights, config, preprocessing, tokenizer."""
    tokenizer = train_wordpiece(TEXTS[:-1] * 2, 240, context_length=20)
    model = their_model(text_config={**TEXT, "vocab_size": tokenizer.vocab_size})
    model.save_pretrained(folder)
    tokenizer.save_huggingface(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_embeddings_loss_and_every_gradient_equal_transformers(tmp_path: Path, dtype: torch.dtype, training: bool) -> None:
    theirs = their_model().to(dtype).train(training)
    path = tmp_path / "config.json"
    theirs.config.to_json_file(path)
    ours = ALIGN(align.config_from_json(json.loads(path.read_text()), path)).to(dtype).train(training)
    ours.load_state_dict(align.to_ours(theirs.state_dict()))
    tokens = torch.randint(1, 240, (5, 20))
    mask = torch.arange(20) < torch.tensor([4, 20, 9, 2, 11])[:, None]
    tokens[~mask] = 0
    pixels = torch.randn(5, 3, 64, 64, dtype=dtype)
    ids = torch.arange(5)
    batch = Batch(pixels=pixels, tokens=tokens, text_ids=ids, image_ids=ids, keys=tuple("abcde"))
    found = ours.embeddings(batch)
    expected = theirs(input_ids=tokens, attention_mask=mask.long(), pixel_values=pixels, return_loss=True)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-10
    torch.testing.assert_close(found["image"], expected.image_embeds, rtol=0, atol=tolerance)
    torch.testing.assert_close(found["text"], expected.text_embeds, rtol=0, atol=tolerance)
    logits = ours.log_scale.exp() * found["image"] @ found["text"].T
    torch.testing.assert_close(logits, expected.logits_per_image, rtol=tolerance, atol=tolerance)
    loss = ours.loss_from_embeddings(found)["contrastive"].value
    torch.testing.assert_close(loss, expected.loss, rtol=tolerance, atol=tolerance)
    loss.backward()
    expected.loss.backward()
    wanted = align.to_ours({name: p.grad for name, p in theirs.named_parameters() if p.grad is not None})
    assert wanted.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        assert (parameter.grad - wanted[name]).abs().max() < tolerance * wanted[name].abs().max().clamp_min(1.0), name


@pytest.mark.parametrize("names", ["new", "hub"])
def test_a_folder_loads_and_goes_back_bit_by_bit(tmp_path: Path, names: str) -> None:
    from safetensors.torch import load_file, save_file

    theirs = write_folder(tmp_path / "theirs")
    if names == "hub":  # counted positions, which old files hold
        state = load_file(tmp_path / "theirs" / "model.safetensors")
        state["text_model.embeddings.position_ids"] = torch.arange(20)[None]
        save_file(state, tmp_path / "theirs" / "model.safetensors", metadata={"format": "pt"})
    model = wordsight.load(tmp_path / "theirs")
    assert isinstance(model, ALIGN)
    tokens = model.tokenize(["a photo of a cat", "rocket"])
    pixels = torch.stack([model.preprocess(picture(i)) for i in range(2)])
    with torch.no_grad():
        expected = theirs(input_ids=tokens, attention_mask=(tokens != 0).long(), pixel_values=pixels)
        torch.testing.assert_close(model.encode_image(pixels), expected.image_embeds, rtol=0, atol=1e-5)
        torch.testing.assert_close(model.encode_text(tokens), expected.text_embeds, rtol=0, atol=1e-5)
    wordsight.save(model, tmp_path / "own")
    again = wordsight.load(tmp_path / "own")
    assert again.config == model.config
    assert again.preprocessor == model.preprocessor
    assert torch.equal(again.tokenize(TEXTS), model.tokenize(TEXTS))
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    wordsight.convert(tmp_path / "own", tmp_path / "back", to="huggingface")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "back"))
    before.pop("text_model.embeddings.position_ids", None)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if "pooler" not in name)

    from transformers import AlignModel, AutoTokenizer

    loaded = AlignModel.from_pretrained(tmp_path / "back").eval()
    with torch.no_grad():
        found = loaded(input_ids=tokens, attention_mask=(tokens != 0).long(), pixel_values=pixels)
    torch.testing.assert_close(found.logits_per_image, expected.logits_per_image, rtol=1e-5, atol=1e-5)
    ids = AutoTokenizer.from_pretrained(tmp_path / "back")(TEXTS, padding="max_length", truncation=True, max_length=20)[
        "input_ids"
    ]
    assert ids == model.tokenize(TEXTS).tolist()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rescale_factor": 1 / 255, "rescale_offset": False, "do_normalize": True, "do_center_crop": False},
        {"do_normalize": True, "resample": 3},
    ],
)
def test_preprocessing_equals_transformers(changes: dict[str, Any]) -> None:
    from transformers import EfficientNetImageProcessor

    values = {**PREPROCESSING, **changes}
    theirs = EfficientNetImageProcessor(**{k: v for k, v in values.items() if k != "image_processor_type"})
    ours = align.preprocess_from_json(values, Path("preprocessor_config.json"))
    drawing = picture(3, size=(150, 101))
    expected = theirs(drawing, return_tensors="pt")["pixel_values"][0]
    assert ours(drawing).shape == expected.shape
    # both filters round to whole steps of 1/255, half a step apart here and there
    step = 1 / 255 / min(ours.std)
    assert (ours(drawing) - expected).abs().max() < 2.1 * step
    assert (ours(drawing) - expected).abs().mean() < 0.3 * step
    again = align.preprocess_from_json(align.preprocess_json(ours), Path("p"))
    assert again.image_size_px == ours.image_size_px
    assert again.resize_px == ours.resize_px
    np.testing.assert_allclose([*again.mean, *again.std], [*ours.mean, *ours.std], rtol=1e-6)


def test_what_the_other_library_does_not_have_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "theirs")
    values = json.loads((tmp_path / "theirs" / "config.json").read_text())
    for change, match in (
        ({"projection_dim": 40}, "projection_dim is 40, the image tower ends in 48"),
        ({"vision_config": {**values["vision_config"], "pooling_type": "max"}}, "pooling_type = 'max'"),
        ({"vision_config": {**values["vision_config"], "in_channels": [32, 24, 40]}}, "stages follow each other"),
        ({"text_config": {**values["text_config"], "hidden_act": "relu"}}, "hidden_act = 'relu'"),
    ):
        with pytest.raises(CheckpointError, match=match):
            align.config_from_json({**values, **change}, Path("config.json"))
    own = wordsight.load(tmp_path / "theirs")
    from dataclasses import replace

    for config, match in (
        (replace(own.config, image=replace(own.config.image, padding="same")), "padding by the size at hand"),
        (replace(own.config, text=replace(own.config.text, pool="mean")), "pool=mean"),
    ):
        with pytest.raises(CheckpointError, match=match):
            align.config_json(config)
    with pytest.raises(CheckpointError, match="resizes both sides"):
        align.preprocess_json(Preprocess())
    (tmp_path / "theirs" / "vocab.txt").unlink()
    (tmp_path / "theirs" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a BERT tokenizer"):
        wordsight.load(tmp_path / "theirs")
