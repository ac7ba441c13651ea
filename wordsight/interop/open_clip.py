"""open_clip's folders: `open_clip_config.json` beside the weights, read and written.

Parameters have OpenAI's names (`interop.openai`); the config tells architecture, activation (`quick_gelu`), preprocessing and
tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wordsight.data.tokenize import CLIP_VOCABULARY, ClipTokenizer
from wordsight.data.transform import CLIP_MEAN, CLIP_STD, Preprocess
from wordsight.interop import openai
from wordsight.interop.contents import Contents, first_file, read_json, unsupported, write_json
from wordsight.interop.safe_read import CheckpointError, read_weights
from wordsight.models.contrastive.clip import CLIPConfig
from wordsight.nn.resnet import ResNetConfig
from wordsight.nn.text import TextConfig
from wordsight.nn.vit import ViTConfig

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "open_clip_config.json"
WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
)
OTHER_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")

_OFF = (None, False, 0, 0.0, "")
# options -> the values that leave them off; with anything else the tower would compute something that ours doesn't
_BLOCK: dict[str, tuple[Any, ...]] = {
    name: _OFF for name in ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")
}
_BLOCK |= {"ls_init_value": _OFF, "act_kwargs": (None, {}), "norm_kwargs": (None, {}), "final_ln_after_pool": _OFF}
_BLOCK |= {"block_type": (None, "default", "")}
_VISION: dict[str, tuple[Any, ...]] = {"timm_model_name": _OFF, "attentional_pool": _OFF, "no_ln_pre": _OFF, **_BLOCK}
_VISION |= {"pos_embed_type": ("learnable",), "pool_type": ("tok",)}
_TEXT: dict[str, tuple[Any, ...]] = {
    "hf_model_name": _OFF,
    "embed_cls": _OFF,
    "no_causal_mask": _OFF,
    "proj_bias": _OFF,
    **_BLOCK,
}
_TEXT |= {"pool_type": ("argmax",), "proj_type": ("linear",)}
_KNOWN_VISION = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "patch_dropout", "output_tokens"}
_KNOWN_VISION |= {
    "attn_pooler_queries",
    "attn_pooler_heads",
    *(f"timm_{x}" for x in ("model_pretrained", "pool", "proj", "proj_bias", "drop", "drop_path")),
}
_KNOWN_TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "hf_tokenizer_name", "tokenizer_kwargs"}
_KNOWN_TEXT |= {"tokenizer_mode", "pad_id", "eos_id", "output_tokens", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type"}
_KNOWN_TOP = {
    "embed_dim",
    "quick_gelu",
    "vision_cfg",
    "text_cfg",
    "custom_text",
    "init_logit_scale",
    "nonscalar_logit_scale",
    "cast_dtype",
    "output_dict",
}


def read_folder(folder: Path, weights_file: Path | None = None) -> Contents:
    """Read a folder with `open_clip_config.json`.

    Args:
        folder: where the config is.
        weights_file: which weights to read; None takes the first of open_clip's usual names.

    Raises:
        CheckpointError: no weights, or an option that ours does not have.
    """
    path = folder / CONFIG
    content = read_json(path)
    model_cfg = content.get("model_cfg")
    if not isinstance(model_cfg, dict):
        raise CheckpointError(f"{path} has no 'model_cfg': it is not a config that open_clip wrote")
    config = config_from_model_cfg(model_cfg, path)
    weights_file = weights_file or first_file(folder, WEIGHTS + OTHER_WEIGHTS)
    if weights_file is None:
        raise CheckpointError(f"{folder} has {CONFIG} but no weights; expected one of {', '.join(WEIGHTS + OTHER_WEIGHTS)}")
    weights = read_weights(weights_file)
    preprocess_cfg = content.get("preprocess_cfg")
    return Contents(
        source=folder,
        layout="open_clip",
        tensors=openai.to_ours(weights.tensors),
        config=config,
        tokenizer=_tokenizer(folder, model_cfg["text_cfg"], config),
        preprocess=_preprocess(path, preprocess_cfg, config) if preprocess_cfg else None,
        notes=weights.notes,
    )


def config_from_model_cfg(model_cfg: Mapping[str, Any], path: Path) -> CLIPConfig:
    """Our config for open_clip's `model_cfg`; `path` is named in errors.

    Raises:
        CheckpointError: it lacks a part, or has an option that ours does not have.
    """
    for part in ("embed_dim", "vision_cfg", "text_cfg"):
        if part not in model_cfg:
            raise CheckpointError(f"{path}: model_cfg has no {part!r}")
    vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    unsupported(path, model_cfg, {"init_logit_bias": (None,), "multimodal_cfg": (None,)}, "CLIP")
    unsupported(path, vision, _VISION, "CLIP's image tower")
    unsupported(path, text, _TEXT, "CLIP's text tower")
    known = {*_KNOWN_TOP, "init_logit_bias", "multimodal_cfg"}
    for values, names in ((model_cfg, known), (vision, {*_KNOWN_VISION, *_VISION}), (text, {*_KNOWN_TEXT, *_TEXT})):
        if unknown := sorted(set(values) - names):
            raise CheckpointError(f"{path}: {', '.join(unknown)} is unknown; a CLIP has {', '.join(sorted(names))}")
    return CLIPConfig(
        embed_dim=model_cfg["embed_dim"],
        image=_image_config(vision),
        text=TextConfig(
            vocab_size=text.get("vocab_size", CLIP_VOCABULARY),
            context_length=text.get("context_length", 77),
            width=text.get("width", 512),
            num_layers=text.get("layers", 12),
            num_heads=text.get("heads", 8),
            mlp_ratio=text.get("mlp_ratio", 4.0),
        ),
        activation="quick_gelu" if model_cfg.get("quick_gelu") else "gelu",
    )


def _image_config(vision: Mapping[str, Any]) -> ViTConfig | ResNetConfig:
    width, head_width = vision.get("width", 768), vision.get("head_width", openai.HEAD_WIDTH)
    size = vision.get("image_size", 224)
    size = size[0] if isinstance(size, list) and len(set(size)) == 1 else size
    layers = vision.get("layers", 12)
    if isinstance(layers, list | tuple):
        return ResNetConfig(image_size_px=size, layers=tuple(layers), width=width, num_heads=width * 32 // head_width)
    return ViTConfig(
        image_size_px=size,
        patch_size_px=vision.get("patch_size", 16),
        width=width,
        num_layers=layers,
        num_heads=width // head_width,
        mlp_ratio=vision.get("mlp_ratio", 4.0),
        patch_dropout=vision.get("patch_dropout", 0.0),
    )


def _preprocess(path: Path, cfg: Mapping[str, Any], config: CLIPConfig) -> Preprocess:
    unsupported(path, cfg, {"mode": ("RGB",)}, "preprocessing")
    if cfg.get("resize_mode", "shortest") not in ("shortest", "squash") or cfg.get("interpolation", "bicubic") not in (
        "bicubic",
        "bilinear",
    ):
        raise CheckpointError(
            f"{path}: preprocess_cfg has resize_mode {cfg.get('resize_mode')!r} and interpolation {cfg.get('interpolation')!r}; "
            "allowed are shortest or squash, and bicubic or bilinear"
        )
    size = cfg.get("size", config.image.image_size_px)
    return Preprocess(
        image_size_px=size[0] if isinstance(size, list) and len(set(size)) == 1 else size,
        resize=cfg.get("resize_mode", "shortest"),
        interpolation=cfg.get("interpolation", "bicubic"),
        mean=tuple(cfg.get("mean") or CLIP_MEAN),
        std=tuple(cfg.get("std") or CLIP_STD),
    )


def _tokenizer(folder: Path, text: Mapping[str, Any], config: CLIPConfig) -> ClipTokenizer | None:
    """open_clip's choice: its own (CLIP's), unless the config names one of transformers; None if that one's files lack."""
    if kwargs := text.get("tokenizer_kwargs"):
        raise CheckpointError(
            f"{folder / CONFIG}: tokenizer_kwargs = {kwargs!r} is something that CLIP's tokenizer does not have"
        )
    length = config.text.context_length
    if text.get("hf_tokenizer_name"):
        if (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file():
            return ClipTokenizer.from_file(folder, length, clean="open_clip")  # open_clip cleans the text before any tokenizer
        return None
    return ClipTokenizer.clip(length) if config.text.vocab_size == CLIP_VOCABULARY else None


def is_clip_vocabulary(tokenizer: ClipTokenizer) -> bool:
    """Whether a tokenizer has the vocabulary and merges of the published models."""
    return tokenizer.vocab_size == CLIP_VOCABULARY and tokenizer.engine().to_str() == ClipTokenizer.clip().engine().to_str()


def write_folder(
    folder: Path, tensors: Mapping[str, Tensor], config: CLIPConfig, tokenizer: ClipTokenizer, preprocess: Preprocess
) -> None:
    """Write `open_clip_config.json`, the weights and, for a vocabulary that is not CLIP's, the tokenizer, into an empty folder.

    Raises:
        CheckpointError: an image tower that open_clip does not have.
    """
    from safetensors.torch import save_file

    save_file(openai.to_theirs(tensors), folder / WEIGHTS[0], metadata={"format": "pt"})
    text: dict[str, Any] = {
        "context_length": config.text.context_length,
        "vocab_size": config.text.vocab_size,
        "width": config.text.width,
        "heads": config.text.num_heads,
        "layers": config.text.num_layers,
    }
    if config.text.mlp_ratio != 4.0:
        text["mlp_ratio"] = config.text.mlp_ratio
    if not is_clip_vocabulary(tokenizer):
        tokenizer.save_huggingface(folder)
        text["hf_tokenizer_name"] = "tokenizer.json"  # any name: open_clip takes this folder's files
    model_cfg = {
        "embed_dim": config.embed_dim,
        "quick_gelu": config.activation == "quick_gelu",
        "vision_cfg": _vision_cfg(config),
        "text_cfg": text,
    }
    preprocess_cfg = {
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "interpolation": preprocess.interpolation,
        "resize_mode": preprocess.resize,
    }
    write_json(folder / CONFIG, {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg})


def _vision_cfg(config: CLIPConfig) -> dict[str, Any]:
    image = config.image
    vision: dict[str, Any] = {"image_size": image.image_size_px}
    match image:
        case ViTConfig():
            vision |= {"width": image.width, "layers": image.num_layers, "patch_size": image.patch_size_px}
            head_width = image.width // image.num_heads
            if image.mlp_ratio != 4.0:
                vision["mlp_ratio"] = image.mlp_ratio
            if image.patch_dropout:
                vision["patch_dropout"] = image.patch_dropout
        case ResNetConfig():
            vision |= {"width": image.width, "layers": list(image.layers), "patch_size": None}
            head_width = image.width * 32 // image.num_heads
        case _:
            raise CheckpointError(f"open_clip has no image tower like {type(image).__name__}: write it with to='wordsight'")
    if head_width != openai.HEAD_WIDTH:
        vision["head_width"] = head_width
    return vision
