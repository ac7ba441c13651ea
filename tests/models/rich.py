"""Small dual encoders of every loss, and batches with all that a batch may bring: captions, labels, weights, hard negatives."""

from __future__ import annotations

from dataclasses import replace

import torch

from tests.models.conformance import make_batch
from wordsight.models.contrastive.align import ALIGN, ALIGNConfig
from wordsight.models.contrastive.clip import CLIP, CLIPConfig
from wordsight.models.contrastive.lit import LiT, LiTConfig
from wordsight.models.contrastive.llip import Llip, LlipConfig
from wordsight.models.contrastive.siglip import SigLIP, SigLIPConfig
from wordsight.models.contrastive.unicl import UniCL, UniCLConfig
from wordsight.nn.bert import BertConfig
from wordsight.nn.text import TextConfig
from wordsight.nn.vit import ViTConfig
from wordsight.types import Batch

IMAGE = ViTConfig(image_size_px=16, patch_size_px=8, width=16, num_layers=2, num_heads=2, patch_dropout=0.5, stochastic_depth=0.3)
TEXT = TextConfig(vocab_size=32, context_length=6, width=16, num_layers=2, num_heads=2, stochastic_depth=0.3)
BERT = BertConfig(vocab_size=32, context_length=6, width=16, num_layers=2, num_heads=2, dropout=0.2, pool="mean", project=False)
LLIP = LlipConfig(embed_dim=8, image=IMAGE, text=TEXT, num_tokens=3, num_heads=2, init_bias=-3.0)
SYSTEMS = {
    "clip": (CLIP, CLIPConfig(embed_dim=8, image=IMAGE, text=TEXT)),
    "clip, multi-positive, smoothed": (
        CLIP,
        CLIPConfig(embed_dim=8, image=IMAGE, text=TEXT, duplicates="multi_positive", label_smoothing=0.1),
    ),
    "align": (ALIGN, ALIGNConfig(embed_dim=8, image=IMAGE, text=TEXT, init_temperature=0.1)),
    "lit": (
        LiT,
        LiTConfig(
            embed_dim=8,
            image=replace(IMAGE, project=False),
            text=BERT,
            image_head="linear",
            text_head="mlp",
            head_width=12,
            head_dropout=0.3,
        ),
    ),
    "unicl": (UniCL, UniCLConfig(embed_dim=8, image=IMAGE, text=TEXT)),
    "siglip": (SigLIP, SigLIPConfig(embed_dim=8, image=IMAGE, text=TEXT, init_bias=-3.0)),
    "llip": (Llip, LLIP),
    "llip, multi-positive": (Llip, replace(LLIP, duplicates="multi_positive")),
}


def make(name: str) -> torch.nn.Module:
    """The system of that name in float64, from seed 0."""
    kind, config = SYSTEMS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(config).double()


def rich_batch(system: torch.nn.Module, rows: int = 8, captions: int = 2, negatives: int = 3, seed: int = 0) -> Batch:
    """Labels and texts that repeat, weights of which one is 0, negatives of which some are missing."""
    g = torch.Generator().manual_seed(seed)
    pictures = make_batch(system, rows, seed, torch.float64)
    texts = make_batch(system, rows * captions, seed + 1).tokens.unflatten(0, (rows, captions))
    text_ids = torch.arange(rows * captions).unflatten(0, (rows, captions))
    texts[-1, 0], text_ids[-1, 0] = texts[0, 0], text_ids[0, 0]
    if captions == 1:
        texts, text_ids = texts[:, 0], text_ids[:, 0]
    weights = 0.5 + torch.rand(rows, generator=g)
    weights[1] = 0.0
    wrong = make_batch(system, rows * negatives, seed + 2).tokens.unflatten(0, (rows, negatives)) if negatives else None
    given = torch.rand(rows, negatives, generator=g) < 0.7 if negatives else None
    if wrong is not None and given is not None:
        wrong[0, 0], given[0, 0] = texts.flatten(0, -2)[0], True  # even a picture's own caption, given as a negative, is one
        wrong[~given] = 0
    return Batch(
        pixels=pictures.pixels,
        tokens=texts,
        text_ids=text_ids,
        image_ids=torch.arange(rows) // 2 * 2,
        keys=pictures.keys,
        label_ids=torch.randint(rows // 2, (rows,), generator=g),
        weights=weights,
        negatives=wrong,
        negatives_given=given,
    )
