"""SigLIP against transformers and open_clip with random weights mapped over: outputs, loss and every gradient.

Tiny configs: float32 within 1e-5, float64 within 1e-10, which no slip of a formula passes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.interop.siglip_reference import open_clip_model, register_trunk, transformers_model
from tests.parity.test_clip_parity import TOLERANCE, gradients, largest_difference, stir
from wordsight.interop import siglip, siglip_open_clip
from wordsight.models.contrastive.siglip import SigLIP
from wordsight.types import Batch

ROWS = 6


def make_data(vocabulary: int, length: int, side: int, dtype: torch.dtype) -> Batch:
    """Captions of 1 to all places, filled up with padding; pixels as wide as normalised pictures."""
    g = torch.Generator().manual_seed(7)
    tokens = torch.ones(ROWS, length, dtype=torch.int64)
    for row, words in zip(tokens, (1, length - 1, 3, 5, 2, 8), strict=True):
        row[:words] = torch.randint(2, vocabulary, (words,), generator=g)
    pixels, ids = torch.randn(ROWS, 3, side, side, generator=g).to(dtype), torch.arange(ROWS)
    return Batch(pixels=pixels, tokens=tokens, text_ids=ids, image_ids=ids, keys=("",) * ROWS)


def compare(ours: SigLIP, batch: Batch, expected: dict[str, Tensor], expected_gradients: dict[str, Tensor], bound: float) -> None:
    found = ours.embeddings(batch)
    loss = ours.loss_from_embeddings(found)["contrastive"].value
    loss.backward()
    assert largest_difference({"image": found["image"], "text": found["text"], "loss": loss}, expected) < bound
    assert largest_difference(gradients(ours), expected_gradients) < bound
    moved = {name for name, gradient in expected_gradients.items() if gradient.abs().max() > 1e-9}
    # a key's bias can't matter to a softmax, so its gradient is rounding
    assert set(expected_gradients) - moved <= {name for name in expected_gradients if name.endswith("qkv.bias")}


def with_start(peer: Any) -> None:
    """transformers starts scale and bias at 0; log 10 and -10 are the paper's, moved a little so that neither is round."""
    with torch.no_grad():
        peer.logit_scale.fill_(2.4)
        peer.logit_bias.fill_(-9.7)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("acts", [("gelu_pytorch_tanh", "gelu_pytorch_tanh"), ("gelu", "quick_gelu")], ids=["tanh", "mixed"])
def test_transformers_outputs_loss_and_all_gradients(acts: tuple[str, str], dtype: torch.dtype) -> None:
    peer: nn.Module = transformers_model(*acts)
    stir(peer)
    with_start(peer)
    peer.to(dtype).train()
    config = siglip.config_from_json(peer.config.to_dict(), "config.json")  # type: ignore[arg-type]
    ours = SigLIP(config).to(dtype).train()
    ours.load_state_dict(siglip.to_ours(peer.state_dict()))
    batch = make_data(config.text.vocab_size, config.text.context_length, config.image.image_size_px, dtype)
    output = peer(pixel_values=batch.pixels, input_ids=batch.tokens, return_loss=True)
    output.loss.backward()
    expected = {"image": output.image_embeds, "text": output.text_embeds, "loss": output.loss}
    compare(ours, batch, expected, siglip.to_ours(gradients(peer)), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tanh", [False, True], ids=["first", "second"])
def test_open_clip_outputs_loss_and_all_gradients(tanh: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first SigLIP's text towers have the exact GELU in open_clip, the second's the tanh."""
    from open_clip.loss import SigLipLoss

    register_trunk(monkeypatch)
    peer, model_cfg = open_clip_model(tanh)
    stir(peer)
    with_start(peer)
    peer.to(dtype).train()
    config = siglip_open_clip.config_from_model_cfg(model_cfg, "config")  # type: ignore[arg-type]
    assert (config.activation, config.text_activation) == ("gelu", "gelu_tanh" if tanh else None)
    ours = SigLIP(config).to(dtype).train()
    ours.load_state_dict(siglip_open_clip.to_ours(peer.state_dict()))
    batch = make_data(config.text.vocab_size, config.text.context_length, config.image.image_size_px, dtype)
    image, text, scale, bias = peer(batch.pixels, batch.tokens)
    loss = SigLipLoss()(image, text, scale, bias)
    loss.backward()
    expected = {"image": image, "text": text, "loss": loss}
    compare(ours, batch, expected, siglip_open_clip.to_ours(gradients(peer)), TOLERANCE[dtype])
