"""Tiny text towers with real tokenizers, in float64: what the prompt learners' tests share."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from wordsight.data.sentencepiece import train_sentencepiece
from wordsight.data.tokenize import ClipTokenizer
from wordsight.data.wordpiece import train_wordpiece
from wordsight.models.contrastive.lit import HeadedTower
from wordsight.nn.bert import Bert, BertConfig
from wordsight.nn.text import SigLIPText, SigLIPTextConfig, TextConfig, TextTransformer

WORDS = ("cat dog sea lion great white shark car truck tree frog bullet train house of cards green apple pie " * 3).split()
NAMES = [
    "cat",
    "sea_lion",
    "great white shark",
    "tree frog",
    "house of cards",
    "dog",
    "green apple pie",
    "bullet train",
    "car",
    "a truck of green sea dogs",
]
KINDS = ("causal", "siglip", "bert cls", "bert mean", "lit causal", "lit bert")
LENGTH = 72


@cache
def embedder(kind: str, context_length: int = LENGTH) -> Any:
    """What a prompt encoder needs of a model: a text tower and its tokenizer."""
    torch.manual_seed(0)
    if kind.endswith("causal"):
        tokenizer: Any = ClipTokenizer.clip(context_length)
        config = TextConfig(vocab_size=tokenizer.vocab_size, context_length=context_length, width=16, num_layers=3, num_heads=2)
        tower: nn.Module = TextTransformer(config, 8, "quick_gelu")
    elif kind == "siglip":
        tokenizer = train_sentencepiece([" ".join(WORDS)], 30, context_length=context_length)
        siglip = SigLIPTextConfig(
            vocab_size=tokenizer.vocab_size,
            context_length=context_length,
            width=16,
            num_layers=2,
            num_heads=2,
            pad_id=tokenizer.pad_id,
        )
        tower = SigLIPText(siglip, 8, "gelu_tanh")
    else:
        tokenizer = train_wordpiece([" ".join(WORDS)], 90, context_length=context_length)
        bert = BertConfig(
            vocab_size=tokenizer.vocab_size,
            context_length=context_length,
            width=16,
            num_layers=2,
            num_heads=2,
            pool="cls" if kind == "bert cls" else "mean",
            dropout=0.1,
        )
        tower = Bert(bert, 8)
    for parameter in tower.parameters():  # biases that start at nothing would hide mistakes
        nn.init.normal_(parameter, std=0.3)
    if kind.startswith("lit"):
        tower = HeadedTower(tower, nn.Linear(8, 6), locked=True)
    return SimpleNamespace(text_tower=tower.double(), tokenizer=tokenizer)
