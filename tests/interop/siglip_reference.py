"""Tiny SigLIPs of the reference libraries, and a small SentencePiece vocabulary for them."""

from __future__ import annotations

import random
from functools import lru_cache
from typing import Any

import pytest

from wordsight.data.sentencepiece import SentencePieceTokenizer, train_sentencepiece
from wordsight.interop import siglip, siglip_open_clip

VOCABULARY, LENGTH, TRUNK = 120, 12, "vit_test_patch8_siglip_32"
TEXTS = ["a photo of a cat", "Two dogs, running!", "été à la plage", "x" * 400, "", "under_score &amp; </s> sun"]
WORDS = "a photo of the cat dog two dogs running on beach red blue green car house tree sky naïve café über snow sun moon".split()


@lru_cache(maxsize=1)
def corpus() -> tuple[str, ...]:
    rng = random.Random(0)
    return tuple(" ".join(rng.choices(WORDS, k=6)) + " " + "".join(rng.choices("abcdefghijklmno", k=8)) for _ in range(600))


@lru_cache(maxsize=1)
def vocabulary() -> SentencePieceTokenizer:
    return train_sentencepiece(corpus(), VOCABULARY, context_length=LENGTH)


def transformers_model(image_act: str = "gelu_pytorch_tanh", text_act: str = "gelu_pytorch_tanh") -> Any:
    from transformers import SiglipConfig, SiglipModel

    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    text = {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "eos_token_id": 1, "bos_token_id": None}
    return SiglipModel(
        SiglipConfig(
            text_config={**tower, **text, "hidden_act": text_act},
            vision_config={**tower, "image_size": 20, "patch_size": 8, "hidden_act": image_act},
        )
    )


def register_trunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny ViT with SigLIP's pool as a model of timm, under a name that our reader knows too."""
    from timm.models import is_model, register_model
    from timm.models.vision_transformer import _create_vision_transformer

    if not is_model(TRUNK):

        def vit_test_patch8_siglip_32(pretrained: bool = False, **options: Any) -> Any:
            size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 1.5}
            return _create_vision_transformer(TRUNK, **{**size, "class_token": False, "global_pool": "map", **options})

        vit_test_patch8_siglip_32.__module__ = "timm.models.vision_transformer"
        register_model(vit_test_patch8_siglip_32)
    trunk = siglip.vit_config(image_size_px=32, patch_size_px=8, width=32, layers=2, heads=2, mlp_width=48)
    monkeypatch.setitem(siglip_open_clip.TIMM_TRUNKS, TRUNK, (trunk, "gelu"))


def open_clip_model(tanh: bool) -> tuple[Any, dict[str, Any]]:
    """open_clip's model and its `model_cfg`, as the published SigLIPs have it."""
    from open_clip.model import CustomTextCLIP

    model_cfg: dict[str, Any] = {
        "embed_dim": 32,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": 32,
            "timm_model_name": TRUNK,
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": {
            "context_length": LENGTH,
            "vocab_size": VOCABULARY,
            "hf_tokenizer_name": "tokenizer",
            "tokenizer_kwargs": {"clean": "canonicalize"},
            "width": 32,
            "heads": 2,
            "layers": 2,
            "mlp_ratio": 3.0,
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "norm_kwargs": {"eps": 1e-6},
            **({"act_kwargs": {"approximate": "tanh"}} if tanh else {}),
        },
    }
    return CustomTextCLIP(**{key: value for key, value in model_cfg.items() if key != "custom_text"}), model_cfg
