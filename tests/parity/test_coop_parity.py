"""CoOp's and CoCoOp's published computation on open_clip's CLIP with random weights: files of either side, the same logits."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from tests.parity.test_clip_parity import VIT, open_clip_model, our_twin, stir
from wordsight.adapt import CoCoOp, CoOp
from wordsight.adapt.published import from_published, to_published
from wordsight.data.tokenize import ClipTokenizer
from wordsight.interop import openai
from wordsight.models.contrastive.clip import CLIPConfig

# not sorted; one name with a bracket at its end, one with "_"
NAMES = ["tree frog", "sea_lion", "crane (bird)", "cat"]
NUM_CONTEXT, ROWS = 4, 6


def models() -> tuple[nn.Module, Any]:
    """open_clip's CLIP and ours, with the same random weights and CLIP's vocabulary."""
    torch.manual_seed(0)
    config: CLIPConfig = replace(VIT, text=replace(VIT.text, vocab_size=49408, context_length=24))
    peer = open_clip_model(config)
    stir(peer)
    ours = our_twin(config, openai.to_ours(peer.state_dict()), torch.float32).eval()
    ours.tokenizer = ClipTokenizer.clip(24)
    return peer.eval(), ours


class PublishedModel(nn.Module):
    """CoOp's CustomCLIP as described, CoCoOp's with `conditional`: every prompt goes through the tower whole."""

    def __init__(self, clip: Any, names: list[str], *, class_specific: bool = False, conditional: bool = False) -> None:
        super().__init__()
        width = clip.token_embedding.weight.shape[1]
        texts = [" ".join(["X"] * NUM_CONTEXT) + " " + name.replace("_", " ") + "." for name in names]
        self.tokens = ClipTokenizer.clip(24)(texts)
        embedded = clip.token_embedding(self.tokens).detach()
        self.ctx = nn.Parameter(0.1 * torch.randn(*((len(names),) if class_specific else ()), NUM_CONTEXT, width))
        self.register_buffer("token_prefix", embedded[:, :1])
        self.register_buffer("token_suffix", embedded[:, 1 + NUM_CONTEXT :])
        if conditional:
            vis = clip.visual.proj.shape[1]
            layers = [("linear1", nn.Linear(vis, vis // 16)), ("relu", nn.ReLU()), ("linear2", nn.Linear(vis // 16, width))]
            self.meta_net = nn.Sequential(OrderedDict(layers))
        self.clip = [clip]  # no part of the file

    def encode(self, ctx: Tensor) -> Tensor:
        """[M, W] or [C, M, W] -> unit text features [C, D]."""
        (clip,) = self.clip
        ctx = ctx if ctx.ndim == 3 else ctx.expand(len(self.tokens), -1, -1)
        x = torch.cat([self.token_prefix, ctx, self.token_suffix], dim=1) + clip.positional_embedding
        x = clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask))
        return normalize(x[torch.arange(len(x)), self.tokens.argmax(dim=-1)] @ clip.text_projection, dim=-1)

    def forward(self, features: Tensor) -> Tensor:
        """Unit image features [B, D] -> logits [B, C]."""
        scale = self.clip[0].logit_scale.exp()
        if not hasattr(self, "meta_net"):
            return scale * features @ self.encode(self.ctx).T
        shifts = self.meta_net(features)
        return torch.stack([scale * f @ self.encode(self.ctx + shift).T for f, shift in zip(features, shifts, strict=True)])


def write_file(folder: Path, learner: PublishedModel) -> Path:
    path = folder / "prompt_learner" / "model.pth.tar-7"
    path.parent.mkdir(parents=True)
    torch.save({"state_dict": learner.state_dict(), "epoch": 7, "optimizer": None, "scheduler": None, "val_result": None}, path)
    return path


@pytest.mark.parametrize("kind", ["unified", "class-specific", "cocoop"])
def test_files_of_either_side_give_the_same_logits_on_the_other(kind: str, tmp_path: Path) -> None:
    peer, ours = models()
    options = {"class_specific": kind == "class-specific", "conditional": kind == "cocoop"}
    learner = PublishedModel(peer, NAMES, **options)
    features = normalize(torch.randn(ROWS, VIT.embed_dim), dim=1)
    with torch.no_grad():
        expected = learner(features)

    classifier = from_published(ours, NAMES, write_file(tmp_path / "theirs", learner))
    assert isinstance(classifier, CoCoOp if kind == "cocoop" else CoOp)
    order = [NAMES.index(name) for name in classifier.classes_]
    assert order != sorted(order)
    torch.testing.assert_close(classifier.logits(features.numpy()), expected[:, order], rtol=0, atol=2e-5)

    to_published(classifier, tmp_path / "ours", epoch=9)
    again = PublishedModel(peer, NAMES, **options)
    content = torch.load(tmp_path / "ours" / "prompt_learner" / "model.pth.tar-9", weights_only=True)
    assert not torch.equal(again.ctx, learner.ctx)
    again.load_state_dict(content["state_dict"], strict=True)
    for name, tensor in learner.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_names_that_are_other_tokens_there_are_refused(tmp_path: Path) -> None:
    _, ours = models()
    context = torch.zeros(NUM_CONTEXT, VIT.text.width)
    with pytest.raises(
        ValueError, match=r"1 class names have other tokens .* 'crane \(bird\)': learn with published_tokens=True"
    ):
        to_published(CoOp.from_context(ours, NAMES, context), tmp_path, epoch=1)
    plain = [name for name in NAMES if not name.endswith(")")]
    assert to_published(CoOp.from_context(ours, plain, context), tmp_path, epoch=1).exists()
