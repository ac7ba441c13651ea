"""CLIP against open_clip and transformers with random weights mapped over: outputs, loss and every gradient.

Tiny configs: float32 within 1e-5, float64 within 1e-10, which no slip of a formula passes. Full size: features within 1e-4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from wordsight import catalog
from wordsight.interop import huggingface, openai
from wordsight.models.contrastive.clip import CLIP, CLIPConfig
from wordsight.nn.resnet import ResNetConfig
from wordsight.nn.text import TextConfig
from wordsight.nn.vit import ViTConfig
from wordsight.types import Batch

TEXT = TextConfig(vocab_size=512, context_length=24, width=64, num_layers=3, num_heads=2)
VIT = CLIPConfig(
    embed_dim=32, image=ViTConfig(image_size_px=48, patch_size_px=16, width=64, num_layers=3, num_heads=2), text=TEXT
)
RESNET = CLIPConfig(embed_dim=32, image=ResNetConfig(image_size_px=64, layers=(1, 2, 1, 1), width=16, num_heads=8), text=TEXT)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
ROWS = 8


def open_clip_model(config: CLIPConfig) -> nn.Module:
    """open_clip's CLIP of our config."""
    from open_clip.model import CLIP as Peer
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    image, text = config.image, config.text
    if isinstance(image, ViTConfig):
        size = {"layers": image.num_layers, "head_width": image.width // image.num_heads, "patch_size": image.patch_size_px}
    else:
        assert isinstance(image, ResNetConfig)
        size = {"layers": image.layers, "head_width": image.width * 32 // image.num_heads}
    return Peer(
        config.embed_dim,
        CLIPVisionCfg(image_size=image.image_size_px, width=image.width, **size),
        CLIPTextCfg(
            context_length=text.context_length,
            vocab_size=text.vocab_size,
            width=text.width,
            heads=text.num_heads,
            layers=text.num_layers,
        ),
        quick_gelu=config.activation == "quick_gelu",
    )


def transformers_model(config: CLIPConfig) -> nn.Module:
    """transformers' CLIPModel of our config."""
    import transformers

    image, text = config.image, config.text
    assert isinstance(image, ViTConfig)
    shared = {"hidden_act": config.activation, "attention_dropout": 0.0, "projection_dim": config.embed_dim}
    return transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={
                "vocab_size": text.vocab_size,
                "max_position_embeddings": text.context_length,
                "hidden_size": text.width,
                "intermediate_size": 4 * text.width,
                "num_hidden_layers": text.num_layers,
                "num_attention_heads": text.num_heads,
                "eos_token_id": text.vocab_size - 1,
                **shared,
            },
            vision_config={
                "image_size": image.image_size_px,
                "patch_size": image.patch_size_px,
                "hidden_size": image.width,
                "intermediate_size": 4 * image.width,
                "num_hidden_layers": image.num_layers,
                "num_attention_heads": image.num_heads,
                **shared,
            },
            projection_dim=config.embed_dim,
        )
    )


def make_data(config: CLIPConfig, dtype: torch.dtype) -> Batch:
    """Captions of 2 to 20 words, padded to the whole context; pixels as wide as normalised pictures."""
    g = torch.Generator().manual_seed(7)
    vocabulary = config.text.vocab_size
    tokens = torch.zeros(ROWS, config.text.context_length, dtype=torch.int64)
    for row, words in zip(tokens, (2, 20, 5, 9, 3, 14, 7, 4), strict=True):
        row[: words + 1] = torch.randint(1, vocabulary - 2, (words + 1,), generator=g)
        row[words + 1] = vocabulary - 1
    side, ids = config.image.image_size_px, torch.arange(ROWS)
    pixels = torch.randn(ROWS, 3, side, side, generator=g).to(dtype)
    return Batch(pixels=pixels, tokens=tokens, text_ids=ids, image_ids=ids, keys=("",) * ROWS)


def stir(model: nn.Module) -> None:
    """Move what starts at zero or one (biases, gains, running statistics) off it, so that a swapped one shows."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.ndim == 1 and tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand(tensor.shape, generator=g))


def largest_difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Over all tensors, which must have the same names."""
    assert found.keys() == expected.keys()
    return max((found[name] - expected[name]).abs().max().item() for name in found)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}


def our_twin(config: CLIPConfig, state: Mapping[str, Tensor], dtype: torch.dtype) -> CLIP:
    model = CLIP(config).to(dtype)
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "config",
    [VIT, replace(VIT, activation="gelu"), RESNET, replace(RESNET, activation="gelu")],
    ids=["vit", "vit-gelu", "resnet", "resnet-gelu"],
)
def test_open_clip_outputs_loss_and_all_gradients(config: CLIPConfig, training: bool, dtype: torch.dtype) -> None:
    from open_clip import ClipLoss

    peer = open_clip_model(config)
    stir(peer)
    peer.to(dtype).train(training)
    ours = our_twin(config, openai.to_ours(peer.state_dict()), dtype).train(training)
    batch = make_data(config, dtype)
    image, text, scale = peer(batch.pixels, batch.tokens)
    expected = ClipLoss()(image, text, scale)
    expected.backward()
    found = ours.embeddings(batch)
    loss = ours.loss_from_embeddings(found)["contrastive"].value
    loss.backward()
    names = {"image": image, "text": text, "loss": expected}
    assert largest_difference({"image": found["image"], "text": found["text"], "loss": loss}, names) < TOLERANCE[dtype]
    assert largest_difference(gradients(ours), openai.to_ours(gradients(peer))) < TOLERANCE[dtype]
    statistics = {name: value for name, value in openai.to_ours(peer.state_dict()).items() if name.endswith(("_mean", "_var"))}
    mine = {name: value for name, value in ours.named_buffers() if not name.endswith("num_batches_tracked")}
    assert bool(mine) == isinstance(config.image, ResNetConfig)
    if mine:
        assert largest_difference(mine, statistics) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_transformers_outputs_loss_and_all_gradients(activation: str, dtype: torch.dtype) -> None:
    config = replace(VIT, activation=activation)
    peer = transformers_model(config)
    stir(peer)
    peer.to(dtype).train()
    ours = our_twin(config, huggingface.to_ours(peer.state_dict()), dtype).train()
    batch = make_data(config, dtype)
    mask = (torch.arange(batch.tokens.shape[1]) <= batch.tokens.argmax(1)[:, None]).long()
    output = peer(pixel_values=batch.pixels, input_ids=batch.tokens, attention_mask=mask, return_loss=True)
    output.loss.backward()
    found = ours.embeddings(batch)
    loss = ours.loss_from_embeddings(found)["contrastive"].value
    loss.backward()
    expected = {"image": output.image_embeds, "text": output.text_embeds, "loss": output.loss}
    assert largest_difference({"image": found["image"], "text": found["text"], "loss": loss}, expected) < TOLERANCE[dtype]
    assert largest_difference(gradients(ours), huggingface.to_ours(gradients(peer))) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["ViT-B/32", "RN50"])
def test_full_size_features_equal_open_clip(name: str) -> None:
    config = catalog.find(name).config
    peer = open_clip_model(config).eval()
    stir(peer)
    for buffer_name, buffer in peer.named_buffers():
        if buffer_name.endswith("running_var"):
            buffer.mul_(0.2)  # so that signals neither die nor explode on the way through 53 layers
    with torch.device("meta"):
        ours = CLIP(config).eval()
    ours.load_state_dict(openai.to_ours(peer.state_dict()), assign=True)
    batch = make_data(ours.config, torch.float32)
    pixels, tokens = batch.pixels[:2], batch.tokens[:3]
    pixels[1] = pixels[1].cumsum(-1) / 10  # another kind of picture
    with torch.inference_mode():
        for normalize in (True, False):
            image = ours.encode_image(pixels, normalize=normalize)
            text = ours.encode_text(tokens, normalize=normalize)
            found, expected = {"image": image, "text": text}, {}
            expected["image"] = peer.encode_image(pixels, normalize=normalize)
            expected["text"] = peer.encode_text(tokens, normalize=normalize)
            assert largest_difference(found, expected) < 1e-4
            assert expected["image"].std(0).max() > 1e-3  # two pictures, two vectors
