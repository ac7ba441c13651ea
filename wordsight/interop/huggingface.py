"""transformers' CLIP folders: `config.json`, weights (in shards or not), preprocessing and tokenizer, read and written.

Differences to our layout: q, k and v are three matrices each (ours is one), and projections are stored transposed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from wordsight.data.tokenize import END_TOKEN, ClipTokenizer
from wordsight.data.transform import CLIP_MEAN, CLIP_STD, Preprocess
from wordsight.interop.contents import Contents, first_file, read_json, unsupported, write_json
from wordsight.interop.names import NameMap, name_list
from wordsight.interop.safe_read import CheckpointError, Weights, read_weights
from wordsight.models.contrastive.clip import CLIPConfig
from wordsight.nn.text import TextConfig
from wordsight.nn.vit import ViTConfig

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
PREPROCESSING = ("preprocessor_config.json", "processor_config.json")
TOKENIZERS = ("tokenizer.json", "vocab.json")


def _blocks(theirs: str, ours: str) -> list[tuple[str, str]]:
    rows = (
        ("layer_norm1.{wb}", "norm1.{wb}"),
        ("self_attn.{qkv}_proj.{wb}", "attn.{qkv}.{wb}"),  # gathered into attn.qkv by `_fuse`
        ("self_attn.out_proj.{wb}", "attn.proj.{wb}"),
        ("layer_norm2.{wb}", "norm2.{wb}"),
        ("mlp.fc1.{wb}", "mlp.fc1.{wb}"),
        ("mlp.fc2.{wb}", "mlp.fc2.{wb}"),
    )
    return [(f"{theirs}.encoder.layers.{{n}}.{a}", f"{ours}.blocks.{{n}}.{b}") for a, b in rows]


NAMES = NameMap(
    [
        ("logit_scale", "log_scale"),
        ("vision_model.embeddings.class_embedding", "image_tower.class_token"),
        ("vision_model.embeddings.patch_embedding.weight", "image_tower.patch_embed.weight"),
        ("vision_model.embeddings.position_embedding.weight", "image_tower.position_embedding"),
        ("vision_model.pre_layrnorm.{wb}", "image_tower.norm_pre.{wb}"),
        *_blocks("vision_model", "image_tower"),
        ("vision_model.post_layernorm.{wb}", "image_tower.norm_post.{wb}"),
        ("visual_projection.weight", "image_tower.projection"),
        ("text_model.embeddings.token_embedding.weight", "text_tower.token_embedding.weight"),
        ("text_model.embeddings.position_embedding.weight", "text_tower.position_embedding"),
        *_blocks("text_model", "text_tower"),
        ("text_model.final_layer_norm.{wb}", "text_tower.norm_final.{wb}"),
        ("text_projection.weight", "text_tower.projection"),
    ]
)
_TRANSPOSED = ("image_tower.projection", "text_tower.projection")
# newer spellings of the same parameters, brought to the ones above; the first is the prefix of a model inside a model
_NEWER = (
    (re.compile(r"^(?:model|clip)\.(?=vision_model|text_model|visual_projection|text_projection|logit_scale)"), ""),
    (re.compile(r"^(vision|text)_model\.(?:vision|text)_model\."), r"\1_model."),
    (re.compile(r"^(vision|text)_model\.layers\."), r"\1_model.encoder.layers."),
    (re.compile(r"\.attention\.(?=[qkv]_proj|o_proj|out_proj)"), ".self_attn."),
    (re.compile(r"\.self_attn\.o_proj\."), ".self_attn.out_proj."),
    (re.compile(r"^vision_model\.pre_layernorm\."), "vision_model.pre_layrnorm."),
)
_POSITION_IDS = re.compile(r"(?:vision|text)_model\.embeddings\.position_ids")  # counted numbers, stored until transformers 4.31

# transformers writes only what differs from these into old configs
_VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
}
_TEXT_DEFAULTS = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
_TEXT_DEFAULTS |= {"max_position_embeddings": 77, "vocab_size": 49408}
_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu"}
_RESAMPLE = {2: "bilinear", 3: "bicubic"}


def is_layout(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are a CLIP's parameters under transformers' names."""
    return any("vision_model." in name for name in tensors)


def read_folder(folder: Path, weights_file: Path | None = None) -> Contents:
    """Read a folder that transformers' `CLIPModel.save_pretrained` wrote, or one of the hub.

    Args:
        folder: where `config.json` is.
        weights_file: which weights to read; None takes the usual names, shards included.

    Raises:
        CheckpointError: another kind of model, no weights, or an option that ours does not have.
    """
    path = folder / CONFIG
    values = read_json(path)
    config = config_from_json(values, path)
    weights = read_weights(weights_file) if weights_file else _read_weights(folder)
    return Contents(
        source=folder,
        layout="huggingface",
        tensors=to_ours(weights.tensors),
        config=config,
        tokenizer=_tokenizer(folder, config) if first_file(folder, TOKENIZERS) else None,
        preprocess=_preprocess(folder, config),
        notes=weights.notes,
    )


def _read_weights(folder: Path) -> Weights:
    if found := first_file(folder, WEIGHTS):
        return read_weights(found)
    index = first_file(folder, INDEXES)
    if index is None:
        raise CheckpointError(f"{folder} has {CONFIG} but no weights; expected one of {', '.join(WEIGHTS + INDEXES)}")
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(f, str) and Path(f).name == f for f in places.values()):
        raise CheckpointError(f"{index}: weight_map must name files of this folder")
    tensors: dict[str, Tensor] = {}
    notes: tuple[str, ...] = ()
    for name in sorted(set(places.values())):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} lacks {name}, which {index.name} names: fetch it")
        shard = read_weights(folder / name)
        tensors |= shard.tensors
        notes += shard.notes
    if lost := sorted(set(places) - set(tensors)):
        raise CheckpointError(f"{index.name} names {name_list(lost)}, which none of its files holds: fetch them again")
    return Weights(tensors=tensors, layout="safetensors", notes=notes)


def to_ours(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names to ours; a name that is no part of CLIP stays as it is, for the caller to name as surplus."""
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        old = name
        for pattern, replacement in _NEWER:
            old = pattern.sub(replacement, old)
        if _POSITION_IDS.fullmatch(old):
            continue
        ours = NAMES.ours(old) or name
        state[ours] = tensor.T.contiguous() if ours in _TRANSPOSED and tensor.ndim == 2 else tensor
    if "log_scale" in state:
        state["log_scale"] = state["log_scale"].reshape(())
    return _fuse(state)


def to_theirs(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names to transformers'.

    Raises:
        CheckpointError: the image tower is not a ViT.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        parts = {name: tensor}
        if found := re.fullmatch(r"(.*\.attn)\.qkv\.(weight|bias)", name):
            parts = {f"{found[1]}.{letter}.{found[2]}": part for letter, part in zip("qkv", tensor.chunk(3), strict=True)}
        for ours, part in parts.items():
            theirs = NAMES.theirs(ours)
            if theirs is None:
                raise CheckpointError(f"{name} has no place in transformers' CLIP: its image tower is a ViT")
            renamed[theirs] = (part.T if ours in _TRANSPOSED else part).contiguous()
    return renamed


def _fuse(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stack q, k and v into attn.qkv where all three are there with one shape; else leave them, to be named as surplus."""
    fused: dict[str, Tensor] = {}
    for name, tensor in state.items():
        found = re.fullmatch(r"((?:image|text)_tower\.blocks\.\d+\.attn)\.([qkv])\.(weight|bias)", name)
        parts = [state.get(f"{found[1]}.{letter}.{found[3]}") for letter in "qkv"] if found else []
        if found is None or any(p is None or p.shape != tensor.shape or p.dtype != tensor.dtype for p in parts):
            fused[name] = tensor
        elif found[2] == "q":
            fused[f"{found[1]}.qkv.{found[3]}"] = torch.cat([p for p in parts if p is not None])
    return fused


# ------------------------------------------------------------------------------------------------------------------- config


def config_from_json(values: Mapping[str, Any], path: Path) -> CLIPConfig:
    """Our config for transformers' `config.json`; `path` is named in errors.

    Raises:
        CheckpointError: it is no CLIP, or has an option that ours does not have.
    """
    if values.get("model_type") != "clip":
        raise CheckpointError(f"{path} describes a {values.get('model_type')!r} model; CLIP folders have model_type 'clip'")
    vision = _VISION_DEFAULTS | (values.get("vision_config") or {}) | (values.get("vision_config_dict") or {})
    text = _TEXT_DEFAULTS | (values.get("text_config") or {}) | (values.get("text_config_dict") or {})
    activations = {part.get("hidden_act", "quick_gelu") for part in (vision, text)}
    if len(activations) > 1 or not activations <= set(_ACTIVATIONS):
        raise CheckpointError(
            f"{path}: hidden_act is {' and '.join(sorted(activations))}; a CLIP has quick_gelu or gelu, the same in both towers"
        )
    for part in (vision, text):
        unsupported(
            path, part, {"layer_norm_eps": (1e-5,), "attention_dropout": (0.0,), "dropout": (0.0,), "num_channels": (3,)}, "CLIP"
        )
    vocab_size, end = text["vocab_size"], text.get("eos_token_id", 2)
    if end not in (None, 2, vocab_size - 1):  # 2: what configs said before transformers 4.31, which then reads the highest id too
        raise CheckpointError(
            f"{path}: eos_token_id is {end}, but a CLIP's end of text is the highest of its {vocab_size} tokens "
            f"({vocab_size - 1}): tokens were added behind it, which this text tower can't read"
        )
    return CLIPConfig(
        embed_dim=values.get("projection_dim", 512),
        image=ViTConfig(
            image_size_px=_square(path, vision["image_size"]),
            patch_size_px=_square(path, vision["patch_size"]),
            width=vision["hidden_size"],
            num_layers=vision["num_hidden_layers"],
            num_heads=vision["num_attention_heads"],
            mlp_ratio=vision["intermediate_size"] / vision["hidden_size"],
        ),
        text=TextConfig(
            vocab_size=vocab_size,
            context_length=text["max_position_embeddings"],
            width=text["hidden_size"],
            num_layers=text["num_hidden_layers"],
            num_heads=text["num_attention_heads"],
            mlp_ratio=text["intermediate_size"] / text["hidden_size"],
        ),
        activation=activations.pop(),
    )


def _square(path: Path, size: Any) -> int:
    """224, [224, 224] or {"height": 224, "width": 224} -> 224."""
    sides = set(size.values()) if isinstance(size, dict) else set(size) if isinstance(size, list) else {size}
    if len(sides) != 1 or not isinstance(side := sides.pop(), int):
        raise CheckpointError(f"{path}: {size!r} is not the side of a square")
    return side


def _config_json(config: CLIPConfig, tokenizer: ClipTokenizer) -> dict[str, Any]:
    image, text = config.image, config.text
    if not isinstance(image, ViTConfig):
        raise CheckpointError(
            f"transformers' CLIP has no image tower like {type(image).__name__.removesuffix('Config')}, only ViT: "
            "write it with to='open_clip' or to='wordsight'"
        )
    common = {
        "hidden_act": config.activation,
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "projection_dim": config.embed_dim,
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        # what it runs in; the weights keep the dtype that they have in the file
        "dtype": "float32",
        "torch_dtype": "float32",
        "projection_dim": config.embed_dim,
        "logit_scale_init_value": config.init_log_scale,
        "vision_config": {
            "model_type": "clip_vision_model",
            **common,
            "hidden_size": image.width,
            "intermediate_size": round(image.width * image.mlp_ratio),
            "num_hidden_layers": image.num_layers,
            "num_attention_heads": image.num_heads,
            "num_channels": 3,
            "image_size": image.image_size_px,
            "patch_size": image.patch_size_px,
        },
        "text_config": {
            "model_type": "clip_text_model",
            **common,
            "hidden_size": text.width,
            "intermediate_size": round(text.width * text.mlp_ratio),
            "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_heads,
            "max_position_embeddings": text.context_length,
            "vocab_size": text.vocab_size,
            "bos_token_id": tokenizer.start_id,
            "eos_token_id": tokenizer.end_id,
            "pad_token_id": tokenizer.end_id,
        },
    }


# -------------------------------------------------------------------------------------------------- preprocessing, tokenizer


def _preprocess(folder: Path, config: CLIPConfig) -> Preprocess | None:
    """What `preprocessor_config.json` or `processor_config.json` (since transformers 5) says; None where there is neither."""
    for name in PREPROCESSING:
        if (folder / name).is_file():
            content = read_json(folder / name)
            values = content.get("image_processor", content if name == PREPROCESSING[0] else None)
            if isinstance(values, dict):
                return _preprocess_from_json(values, folder / name, config.image.image_size_px)
    return None


def _preprocess_from_json(values: Mapping[str, Any], path: Path, image_size_px: int) -> Preprocess:
    unsupported(path, values, {"do_resize": (True, None), "do_rescale": (True, None)}, "preprocessing")
    if abs((values.get("rescale_factor") or 1 / 255) - 1 / 255) > 1e-9 or values.get("resample", 3) not in _RESAMPLE:
        raise CheckpointError(f"{path}: rescale_factor must be 1/255 and resample 2 (bilinear) or 3 (bicubic)")
    size = values.get("size", image_size_px)
    shortest = size.get("shortest_edge") if isinstance(size, dict) else size
    side = shortest if isinstance(shortest, int) else _square(path, size)
    crop = _square(path, values.get("crop_size") or side) if values.get("do_center_crop", True) else None
    if (crop is None and shortest is not None) or crop not in (None, side):
        raise CheckpointError(
            f"{path}: size {size!r} with crop {crop!r} is neither CLIP's resize (shortest edge, then a centre crop "
            "of the same size) nor a squash to a square"
        )
    normalized = values.get("do_normalize", True)
    return Preprocess(
        image_size_px=side,
        resize="shortest" if shortest is not None else "squash",
        interpolation=_RESAMPLE[values.get("resample", 3)],
        mean=tuple(values.get("image_mean") or CLIP_MEAN) if normalized else (0.0, 0.0, 0.0),
        std=tuple(values.get("image_std") or CLIP_STD) if normalized else (1.0, 1.0, 1.0),
    )


def _preprocess_json(preprocess: Preprocess) -> dict[str, Any]:
    side = preprocess.image_size_px
    square = {"height": side, "width": side}
    shortest = preprocess.resize == "shortest"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side} if shortest else square,
        "resample": next(number for number, name in _RESAMPLE.items() if name == preprocess.interpolation),
        "do_center_crop": shortest,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }


def _tokenizer(folder: Path, config: CLIPConfig) -> ClipTokenizer:
    path = folder / "tokenizer_config.json"
    said = read_json(path).get("pad_token") if path.is_file() else None
    pad = said.get("content") if isinstance(said, dict) else said
    try:
        tokenizer = ClipTokenizer.from_file(folder, config.text.context_length)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    # what a row is filled with makes no difference to its embedding; taken over so that the ids are theirs
    return tokenizer.with_options(pad_id=tokenizer.end_id) if pad == END_TOKEN else tokenizer


def write_folder(
    folder: Path, tensors: Mapping[str, Tensor], config: CLIPConfig, tokenizer: ClipTokenizer, preprocess: Preprocess
) -> None:
    """Write `config.json`, weights, `preprocessor_config.json` and the tokenizer's files into an empty folder.

    Raises:
        CheckpointError: the image tower is not a ViT.
    """
    from safetensors.torch import save_file

    values = _config_json(config, tokenizer)
    save_file(to_theirs(tensors), folder / WEIGHTS[0], metadata={"format": "pt"})
    write_json(folder / PREPROCESSING[0], _preprocess_json(preprocess))
    tokenizer.save_huggingface(folder)
    write_json(folder / CONFIG, values)
