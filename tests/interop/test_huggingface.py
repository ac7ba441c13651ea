"""transformers' CLIP folders both ways: CLIPModel and CLIPProcessor give our outputs for what we write, and the reverse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPProcessor

import wordsight
from tests.interop import reference as shared
from tests.interop.reference import PLAIN_TEXTS, difference, huggingface_model, outputs
from wordsight.data.tokenize import ClipTokenizer
from wordsight.data.transform import Preprocess
from wordsight.interop.safe_read import CheckpointError


def picture(seed: int = 0) -> Image.Image:
    """One whose resized width is even: transformers' PIL backend rounds the crop's half pixel down, its other one as we do."""
    return shared.picture(seed, (120, 60))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that transformers itself wrote: model, image processor and tokenizer."""
    folder = tmp_path_factory.mktemp("hf")
    huggingface_model().save_pretrained(folder)
    ClipTokenizer.clip().save_huggingface(folder)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_mean=[0.5, 0.4, 0.3]
    )
    CLIPProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def copy(folder: Path, to: Path) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def reference_outputs(model: Any, pixels: torch.Tensor, tokens: Any) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        out = model(pixel_values=pixels, **tokens)
    return out.image_embeds, out.text_embeds


def test_folder_gives_the_reference_s_outputs(written: Path) -> None:
    assert (written / "processor_config.json").exists() or (written / "preprocessor_config.json").exists()
    reference, processor = CLIPModel.from_pretrained(written).eval(), CLIPProcessor.from_pretrained(written)
    model = wordsight.load(written)
    assert model.preprocessor.mean == (0.5, 0.4, 0.3)
    inputs = processor(
        text=PLAIN_TEXTS, images=[picture(i) for i in range(2)], return_tensors="pt", padding="max_length", max_length=77
    )
    pixels, tokens = torch.stack([model.preprocess(picture(i)) for i in range(2)]), model.tokenize(PLAIN_TEXTS)
    assert (pixels - inputs["pixel_values"]).abs().max() < 1.01 / 255 / 0.26
    assert torch.equal(tokens, inputs["input_ids"])
    text = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    assert difference(reference_outputs(reference, pixels, text), outputs(model, pixels, tokens)) < 1e-5
    assert model.log_scale.item() == reference.logit_scale.item()


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_activation_is_the_config_s(tmp_path: Path, activation: str) -> None:
    reference = huggingface_model(activation=activation)
    reference.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="CLIP's") as notes:
        model = wordsight.load(tmp_path)
    said = " ".join(str(note.message) for note in notes)
    assert "no tokenizer files: CLIP's tokenizer is used" in said
    assert "no preprocessing files: CLIP's is used" in said
    assert model.config.activation == activation
    pixels, tokens = torch.randn(2, 3, 64, 64), model.tokenize(PLAIN_TEXTS)
    assert difference(reference_outputs(reference, pixels, {"input_ids": tokens}), outputs(model, pixels, tokens)) < 1e-5


def test_transformers_loads_what_we_write(tmp_path: Path) -> None:
    model = wordsight.create("clip-tiny", seed=1)
    model.preprocessor = Preprocess(image_size_px=32, std=(0.5, 0.4, 0.3))
    with torch.no_grad():
        model.log_scale.fill_(3.25)
    wordsight.save(model, tmp_path / "own")
    wordsight.convert(tmp_path / "own", tmp_path / "theirs", to="huggingface")
    theirs, info = CLIPModel.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    processor = CLIPProcessor.from_pretrained(tmp_path / "theirs")
    inputs = processor(text=PLAIN_TEXTS, images=[picture(i) for i in range(2)], return_tensors="pt", padding=True)
    pixels, tokens = torch.stack([model.preprocess(picture(i)) for i in range(2)]), model.tokenize(PLAIN_TEXTS)
    assert (pixels - inputs["pixel_values"]).abs().max() < 1.01 / 255 / 0.3
    text = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    assert difference(reference_outputs(theirs.eval(), pixels, text), outputs(model, pixels, tokens)) < 1e-6
    assert theirs.logit_scale.item() == 3.25
    long = processor(text=["word " * 100], return_tensors="pt", padding=True, truncation=True)["input_ids"]
    assert torch.equal(long, model.tokenize(["word " * 100]))


@pytest.mark.parametrize("squash", [True, False])
def test_every_preprocessing_goes_there_and_back(tmp_path: Path, squash: bool) -> None:
    model = wordsight.create("clip-tiny")
    model.preprocessor = Preprocess(
        image_size_px=32, resize="squash" if squash else "shortest", interpolation="bilinear", mean=(0.1, 0.2, 0.3)
    )
    wordsight.save(model, tmp_path / "own")
    wordsight.convert(tmp_path / "own", tmp_path / "theirs", to="huggingface")
    assert wordsight.load(tmp_path / "theirs").preprocessor == model.preprocessor
    theirs = CLIPProcessor.from_pretrained(tmp_path / "theirs")(images=picture(), return_tensors="pt")["pixel_values"][0]
    assert (theirs - model.preprocess(picture())).abs().max() < 1.01 / 255 / 0.26


def test_weights_stay_float16_in_the_file_and_run_in_float32(tmp_path: Path) -> None:
    wordsight.save(wordsight.create("clip-tiny").half(), tmp_path / "own")
    wordsight.convert(tmp_path / "own", tmp_path / "theirs", to="huggingface")
    assert {t.dtype for t in load_file(tmp_path / "theirs" / "model.safetensors").values()} == {torch.float16}
    assert {p.dtype for p in CLIPModel.from_pretrained(tmp_path / "theirs").parameters()} == {torch.float32}
    assert {p.dtype for p in wordsight.load(tmp_path / "theirs").parameters()} == {torch.float32}


def test_resnet_has_no_place_there(tmp_path: Path) -> None:
    wordsight.save(wordsight.create("clip-tiny-resnet"), tmp_path / "own")
    with pytest.raises(CheckpointError, match=r"no image tower like ResNet.*to='open_clip'"):
        wordsight.convert(tmp_path / "own", tmp_path / "theirs", to="huggingface")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["own"]  # nothing half-written stays


def test_old_files(written: Path, tmp_path: Path) -> None:
    """position_ids, one .bin, an end-of-text id of 2, plain numbers in preprocessor_config.json, vocab.json and merges.txt."""
    folder = copy(written, tmp_path / "old")
    state = load_file(folder / "model.safetensors")
    for tower, length in (("text", 77), ("vision", 17)):
        state[f"{tower}_model.embeddings.position_ids"] = torch.arange(length)[None]
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    (folder / "processor_config.json").unlink(missing_ok=True)
    values = {"crop_size": 64, "size": 64, "resample": 3, "do_center_crop": True, "do_normalize": True, "do_resize": True}
    values |= {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2], "feature_extractor_type": "CLIPFeatureExtractor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"eos_token_id": 2, "bos_token_id": 0}
    config["vision_config_dict"], config["text_config_dict"] = config.pop("vision_config"), None
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").unlink()  # vocab.json and merges.txt alone
    ClipTokenizer.clip().save_huggingface(folder)
    (folder / "tokenizer.json").unlink()
    old, new = wordsight.load(folder), wordsight.load(written)
    assert old.config == new.config
    assert all(torch.equal(a, b) for a, b in zip(old.state_dict().values(), new.state_dict().values(), strict=True))
    assert old.preprocessor == Preprocess(image_size_px=64, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))
    assert torch.equal(old.tokenize(PLAIN_TEXTS), new.tokenize(PLAIN_TEXTS))


def shard(folder: Path) -> dict[str, str]:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-0000{i % 3 + 1}-of-00003.safetensors" for i, name in enumerate(state)}
    for file in set(places.values()):
        save_file({n: state[n] for n in state if places[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return places


def test_shards(written: Path, tmp_path: Path) -> None:
    folder = copy(written, tmp_path / "shards")
    places = shard(folder)
    whole = wordsight.load(written).state_dict()
    assert all(torch.equal(v, whole[k]) for k, v in wordsight.load(folder).state_dict().items())
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks model-00002-of-00003"):
        wordsight.load(folder)
    outside = {n: "../hf/model.safetensors" for n in places}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": outside}))
    with pytest.raises(CheckpointError, match="must name files of this folder"):
        wordsight.load(folder)


@pytest.mark.parametrize(
    ("file", "values", "says"),
    [
        ("config.json", {"model_type": "blip"}, "'blip' model"),
        ("config.json", {"text_config": {"hidden_act": "gelu"}}, "hidden_act is gelu and quick_gelu"),
        (
            "config.json",
            {"text_config": {"hidden_act": "gelu_new"}, "vision_config": {"hidden_act": "gelu_new"}},
            "hidden_act is gelu_new",
        ),
        ("config.json", {"text_config": {"eos_token_id": 49405}}, "eos_token_id is 49405"),
        ("config.json", {"text_config": {"layer_norm_eps": 1e-6}}, "layer_norm_eps = 1e-06"),
        (
            "config.json",
            {"text_config": {"vocab_size": 1000, "eos_token_id": 999}},
            "token_embedding.weight is .49408, 64., must be .1000, 64.",
        ),
        ("config.json", {"vision_config": {"image_size": 96}}, "position_embedding is"),
        ("preprocessor_config.json", {"do_resize": False}, "do_resize = False"),
        ("preprocessor_config.json", {"resample": 0}, "resample"),
        ("preprocessor_config.json", {"rescale_factor": 1.0}, "rescale_factor"),
        ("preprocessor_config.json", {"size": {"shortest_edge": 80}}, "neither CLIP's resize"),
        (
            "preprocessor_config.json",
            {"size": {"shortest_edge": 80}, "crop_size": 80},
            "pictures of 80 px, the image tower takes 64 px",
        ),
    ],
)
def test_configs_that_we_can_not_follow_are_named(written: Path, tmp_path: Path, file: str, values: dict, says: str) -> None:
    folder = copy(written, tmp_path / "x")
    if file != "config.json":
        said = folder / "processor_config.json"
        base = json.loads(said.read_text())["image_processor"] if said.exists() else json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(base))
    content = json.loads((folder / file).read_text())
    for key, value in values.items():
        content[key] = (
            content[key] | value if isinstance(value, dict) and isinstance(content.get(key), dict) and key != "size" else value
        )
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=says):
        wordsight.load(folder)


def test_tokenizer_of_another_vocabulary(written: Path, tmp_path: Path) -> None:
    from wordsight.data.tokenize import train_tokenizer

    folder = copy(written, tmp_path / "x")
    train_tokenizer(["a b c"], 514).save_huggingface(folder)
    with pytest.raises(CheckpointError, match="the tokenizer has 514 tokens, the text tower 49408"):
        wordsight.load(folder)


def test_folder_with_both_libraries_files_is_whoever_s_weights_are_there(written: Path, tmp_path: Path) -> None:
    folder = copy(written, tmp_path / "both")
    (folder / "open_clip_config.json").write_text("{}")
    assert wordsight.load(folder).provenance["layout"] == "huggingface"
