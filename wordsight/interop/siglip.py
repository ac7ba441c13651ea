"""SigLIP in transformers' folders and in open_clip's, read and written; SigLIP 2 at a fixed resolution has the same layouts.

Differences to our layout: transformers keeps q, k and v of the blocks as three matrices each, timm's trunk (in open_clip) the
pool's q apart from its k and v (ours are one everywhere); probe and positions have leading axes of 1, scale and bias may too.

open_clip's towers are not quite those that were trained: most of timm's ViTs and, for the first SigLIPs, the text towers are
computed with the exact GELU where the paper's code has its tanh approximation. A folder of open_clip is computed as open_clip
does.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from wordsight.data.sentencepiece import FILES, SentencePieceTokenizer
from wordsight.data.transform import Preprocess
from wordsight.interop import huggingface, open_clip
from wordsight.interop.contents import Contents, first_file, read_json, unsupported, write_json
from wordsight.interop.names import NameMap, fuse_qkv, split_qkv
from wordsight.interop.safe_read import CheckpointError, read_weights
from wordsight.models.contrastive.siglip import SigLIPConfig
from wordsight.nn.text import SigLIPTextConfig
from wordsight.nn.vit import ViTConfig

if TYPE_CHECKING:
    from torch import Tensor

    from wordsight.data.tokenize import TextTokenizer

HALF = (0.5, 0.5, 0.5)
_SCALARS = {"logit_scale": "log_scale", "logit_bias": "logit_bias"}
_POOL_PROBE, _POSITIONS = "image_tower.pool.probe", "image_tower.position_embedding"
_POOL_QKV = "image_tower.pool.attn.qkv."


def vit_config(
    *, image_size_px: int, patch_size_px: int, width: int, layers: int, heads: int, mlp_width: int, norm_eps: float = 1e-6
) -> ViTConfig:
    """SigLIP's image tower: patches with a bias, no class token, a probe's pool, no projection."""
    return ViTConfig(
        image_size_px=image_size_px,
        patch_size_px=patch_size_px,
        width=width,
        num_layers=layers,
        num_heads=heads,
        mlp_ratio=mlp_width / width,
        patch_bias=True,
        norm_pre=False,
        norm_eps=norm_eps,
        pool="map",
        project=False,
    )


def _check_towers(config: Any, library: str) -> tuple[ViTConfig, SigLIPTextConfig]:
    """The two towers, if they are SigLIP's own, whatever their sizes."""
    image, text = config.image, config.text
    mend = "write it with to='wordsight'"
    if not isinstance(text, SigLIPTextConfig):
        raise CheckpointError(f"{library}'s SigLIP has no text tower like {type(text).__name__.removesuffix('Config')}: {mend}")
    if not isinstance(image, ViTConfig) or (image.pool, image.patch_bias, image.norm_pre, image.project) != (
        "map",
        True,
        False,
        False,
    ):
        raise CheckpointError(
            f"{library}'s SigLIP has no image tower like this {type(image).__name__.removesuffix('Config')}, only a ViT with "
            f"pool='map', patch_bias=True, norm_pre=False and project=False: {mend}"
        )
    return image, text


def _check_tokenizer(tokenizer: TextTokenizer, library: str) -> SentencePieceTokenizer:
    if not isinstance(tokenizer, SentencePieceTokenizer):
        raise CheckpointError(
            f"{library}'s SigLIP sees its padding and has a SentencePiece vocabulary, not a {type(tokenizer).__name__}: write it "
            "with to='wordsight'"
        )
    return tokenizer


def with_padding(config: SigLIPConfig, tokenizer: SentencePieceTokenizer | None) -> SigLIPConfig:
    """The config with the tokenizer's padding, which those libraries' configs don't say, or say wrongly."""
    assert isinstance(config.text, SigLIPTextConfig)
    return config if tokenizer is None else replace(config, text=replace(config.text, pad_id=tokenizer.pad_id))


def read_tokenizer(folder: Path, context_length: int, clean: str | None = None) -> SentencePieceTokenizer | None:
    """The vocabulary of a folder, None where it has none.

    Raises:
        CheckpointError: a file that is no SentencePiece vocabulary.
    """
    if first_file(folder, FILES) is None:
        return None
    try:
        return SentencePieceTokenizer.from_file(folder, context_length, clean=clean)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


# ------------------------------------------------------------------------------------------------------------- transformers


def _blocks(theirs: str, ours: str) -> list[tuple[str, str]]:
    rows = (
        ("layer_norm1.{wb}", "norm1.{wb}"),
        ("self_attn.{qkv}_proj.{wb}", "attn.{qkv}.{wb}"),  # gathered into attn.qkv
        ("self_attn.out_proj.{wb}", "attn.proj.{wb}"),
        ("layer_norm2.{wb}", "norm2.{wb}"),
        ("mlp.fc1.{wb}", "mlp.fc1.{wb}"),
        ("mlp.fc2.{wb}", "mlp.fc2.{wb}"),
    )
    return [(f"{theirs}.encoder.layers.{{n}}.{a}", f"{ours}.blocks.{{n}}.{b}") for a, b in rows]


NAMES = NameMap(
    [
        *_SCALARS.items(),
        ("vision_model.embeddings.patch_embedding.{wb}", "image_tower.patch_embed.{wb}"),
        ("vision_model.embeddings.position_embedding.weight", _POSITIONS),
        *_blocks("vision_model", "image_tower"),
        ("vision_model.post_layernorm.{wb}", "image_tower.norm_post.{wb}"),
        ("vision_model.head.probe", _POOL_PROBE),
        ("vision_model.head.attention.in_proj_{wb}", _POOL_QKV + "{wb}"),
        ("vision_model.head.attention.out_proj.{wb}", "image_tower.pool.attn.proj.{wb}"),
        ("vision_model.head.layernorm.{wb}", "image_tower.pool.norm.{wb}"),
        ("vision_model.head.mlp.fc1.{wb}", "image_tower.pool.mlp.fc1.{wb}"),
        ("vision_model.head.mlp.fc2.{wb}", "image_tower.pool.mlp.fc2.{wb}"),
        ("text_model.embeddings.token_embedding.weight", "text_tower.token_embedding.weight"),
        ("text_model.embeddings.position_embedding.weight", "text_tower.position_embedding"),
        *_blocks("text_model", "text_tower"),
        ("text_model.final_layer_norm.{wb}", "text_tower.norm_final.{wb}"),
        ("text_model.head.{wb}", "text_tower.head.{wb}"),
    ]
)
_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "quick_gelu": "quick_gelu"}
# transformers writes only what differs from these into old configs
_BOTH: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_BOTH |= {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
_VISION_DEFAULTS: dict[str, Any] = {**_BOTH, "image_size": 224, "patch_size": 16}
_TEXT_DEFAULTS: dict[str, Any] = {**_BOTH, "vocab_size": 32000, "max_position_embeddings": 64, "pad_token_id": 1}


def is_layout(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are a SigLIP's parameters under transformers' names."""
    return "logit_bias" in tensors and any("vision_model." in name for name in tensors)


def read_folder(folder: Path, weights_file: Path | None = None) -> Contents:
    """Read a folder that transformers' `SiglipModel.save_pretrained` wrote, or one of the hub.

    Args:
        folder: where `config.json` is.
        weights_file: which weights to read; None takes the usual names, shards included.

    Raises:
        CheckpointError: no weights, or an option that ours does not have.
    """
    path = folder / huggingface.CONFIG
    config = config_from_json(read_json(path), path)
    weights = read_weights(weights_file) if weights_file else huggingface._read_weights(folder)
    tokenizer = read_tokenizer(folder, config.text.context_length)
    preprocess = None
    for name in huggingface.PREPROCESSING:
        if (folder / name).is_file() and preprocess is None:
            content = read_json(folder / name)
            values = content.get("image_processor", content if name == huggingface.PREPROCESSING[0] else None)
            if isinstance(values, dict):
                said = {"image_mean": list(HALF), "image_std": list(HALF), **values}
                preprocess = huggingface._preprocess_from_json(said, folder / name, config.image.image_size_px)
    return Contents(
        source=folder,
        layout="huggingface",
        tensors=to_ours(weights.tensors),
        config=with_padding(config, tokenizer),
        tokenizer=tokenizer,
        preprocess=preprocess,
        notes=weights.notes,
    )


def write_folder(
    folder: Path, tensors: Mapping[str, Tensor], config: Any, tokenizer: TextTokenizer, preprocess: Preprocess
) -> None:
    """Write `config.json`, weights, `preprocessor_config.json` and the tokenizer's files into an empty folder.

    Raises:
        CheckpointError: towers, a tokenizer or a preprocessing that transformers' SigLIP does not have.
    """
    from safetensors.torch import save_file

    vocabulary = _check_tokenizer(tokenizer, "transformers")
    values = config_json(config, vocabulary)
    if preprocess.resize != "squash":
        raise CheckpointError(
            f"transformers' SigLIP resizes both sides (resize='squash'), this model has {preprocess.resize!r}: write it with "
            "to='wordsight'"
        )
    _tell_of_text_rules(vocabulary)
    save_file(to_theirs(tensors), folder / huggingface.WEIGHTS[0], metadata={"format": "pt"})
    processor = huggingface._preprocess_json(preprocess)
    for name in ("do_center_crop", "crop_size"):
        del processor[name]
    write_json(folder / huggingface.PREPROCESSING[0], processor | {"image_processor_type": "SiglipImageProcessor"})
    vocabulary.save_huggingface(folder)
    write_json(folder / huggingface.CONFIG, values)


def _tell_of_text_rules(tokenizer: SentencePieceTokenizer) -> None:
    """Say where the other library will make another text canonical than this model's tokenizer does."""
    is_model_file = tokenizer.to_config()["file"].endswith(".model")
    if tokenizer.clean == "open_clip" or (is_model_file and tokenizer.clean != "huggingface"):
        theirs = "its SiglipTokenizer's" if is_model_file else "without mended encodings and HTML entities"
        warnings.warn(
            f"this model's texts are made canonical as clean={tokenizer.clean!r} says; transformers will do it by its own rules "
            f"({theirs}), so that texts with '_', '&amp;' or capitals may get other tokens there",
            stacklevel=4,
        )


def to_ours(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names to ours; a name that is no part of SigLIP stays as it is, for the caller to name as surplus."""
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        old = name
        if NAMES.ours(name) is None:  # a newer spelling
            for pattern, replacement in huggingface._NEWER:
                old = pattern.sub(replacement, old)
        if not huggingface._POSITION_IDS.fullmatch(old):
            state[NAMES.ours(old) or name] = tensor
    return fuse_qkv(_without_leading_axes(state))


def to_theirs(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names to transformers'.

    Raises:
        CheckpointError: a parameter that transformers' SigLIP does not have.
    """
    pool = {name: tensor for name, tensor in state.items() if name.startswith(_POOL_QKV)}
    rest = split_qkv({name: tensor for name, tensor in state.items() if name not in pool})
    renamed: dict[str, Tensor] = {}
    for name, tensor in (rest | pool).items():
        theirs = NAMES.theirs(name)
        if theirs is None:
            raise CheckpointError(f"{name} has no place in transformers' SigLIP")
        if name in _SCALARS.values():
            tensor = tensor.reshape(1)
        renamed[theirs] = (tensor.reshape(1, 1, -1) if name == _POOL_PROBE else tensor).contiguous()
    return renamed


def _without_leading_axes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scalars of shape [1] as [], the probe as [W], positions as [N, W]; whatever else has another shape stays, to be named."""
    for name in _SCALARS.values():
        if name in state and state[name].numel() == 1:
            state[name] = state[name].reshape(())
    for name, ndim in ((_POOL_PROBE, 1), (_POSITIONS, 2), ("text_tower.position_embedding", 2)):
        if name in state and state[name].ndim > ndim and set(state[name].shape[:-ndim]) == {1}:
            state[name] = state[name].reshape(state[name].shape[-ndim:])
    return state


def config_from_json(values: Mapping[str, Any], path: Path) -> SigLIPConfig:
    """Our config for transformers' `config.json` of a SigLIP; `path` is named in errors.

    Raises:
        CheckpointError: an option that ours does not have.
    """
    vision = _VISION_DEFAULTS | (values.get("vision_config") or {})
    text = _TEXT_DEFAULTS | (values.get("text_config") or {})
    unsupported(path, vision, {"vision_use_head": (True, None), "num_channels": (3,), "attention_dropout": (0.0,)}, "SigLIP")
    unsupported(path, text, {"attention_dropout": (0.0,)}, "SigLIP")
    for part in (vision, text):
        unsupported(path, part, {"hidden_act": tuple(_ACTIVATIONS)}, "SigLIP")
    embed_dim = vision["hidden_size"]
    if (projected := text.get("projection_size") or text["hidden_size"]) != embed_dim:
        raise CheckpointError(f"{path}: the text tower ends in {projected} numbers, the image tower in {embed_dim}")
    activation, text_activation = (_ACTIVATIONS[part["hidden_act"]] for part in (vision, text))
    return SigLIPConfig(
        embed_dim=embed_dim,
        image=vit_config(
            image_size_px=huggingface._square(path, vision["image_size"]),
            patch_size_px=huggingface._square(path, vision["patch_size"]),
            width=embed_dim,
            layers=vision["num_hidden_layers"],
            heads=vision["num_attention_heads"],
            mlp_width=vision["intermediate_size"],
            norm_eps=vision["layer_norm_eps"],
        ),
        text=SigLIPTextConfig(
            vocab_size=text["vocab_size"],
            context_length=text["max_position_embeddings"],
            width=text["hidden_size"],
            num_layers=text["num_hidden_layers"],
            num_heads=text["num_attention_heads"],
            mlp_ratio=text["intermediate_size"] / text["hidden_size"],
            pad_id=text["pad_token_id"] or 0,
            norm_eps=text["layer_norm_eps"],
        ),
        activation=activation,  # type: ignore[arg-type]
        text_activation=None if text_activation == activation else text_activation,  # type: ignore[arg-type]
    )


def config_json(config: SigLIPConfig, tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """transformers' `config.json` for our config.

    Raises:
        CheckpointError: a tower that transformers' SigLIP does not have.
    """
    image, text = _check_towers(config, "transformers")

    def common(tower: ViTConfig | SigLIPTextConfig, activation: str) -> dict[str, Any]:
        return {
            "hidden_size": tower.width,
            "intermediate_size": round(tower.width * tower.mlp_ratio),
            "num_hidden_layers": tower.num_layers,
            "num_attention_heads": tower.num_heads,
            "hidden_act": next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == activation),
            "layer_norm_eps": tower.norm_eps,
            "attention_dropout": 0.0,
        }

    return {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        # what it runs in; the weights keep the dtype that they have in the file
        "dtype": "float32",
        "torch_dtype": "float32",
        "vision_config": {
            "model_type": "siglip_vision_model",
            **common(image, config.activation),
            "num_channels": 3,
            "image_size": image.image_size_px,
            "patch_size": image.patch_size_px,
        },
        "text_config": {
            "model_type": "siglip_text_model",
            **common(text, config.text_activation or config.activation),
            "projection_size": config.embed_dim,
            "max_position_embeddings": text.context_length,
            "vocab_size": text.vocab_size,
            "pad_token_id": tokenizer.pad_id,
            "bos_token_id": None,
            "eos_token_id": tokenizer.end_id,
        },
    }


# ---------------------------------------------------------------------------------------------------------------- open_clip

# timm's name starts -> (width, layers, heads, MLP width)
_TRUNKS = {
    "vit_base": (768, 12, 12, 3072),
    "vit_large": (1024, 24, 16, 4096),
    "vit_so400m": (1152, 27, 16, 4304),
    "vit_giantopt": (1536, 40, 16, 6144),
}
_SIZES = {
    ("vit_base", 32): (256,),
    ("vit_base", 16): (224, 256, 384, 512),
    ("vit_large", 16): (256, 384, 512),
    ("vit_so400m", 14): (224, 378, 384),
    ("vit_so400m", 16): (256, 384, 512),
    ("vit_giantopt", 16): (256, 384),
}
# those that came with SigLIP 2 alone
_TANH_TRUNKS = ("vit_base_patch32", "vit_large_patch16_siglip_512", "vit_so400m_patch16", "vit_giantopt")
# timm's names of SigLIP's image towers -> architecture and activation, which an open_clip config does not spell out
TIMM_TRUNKS: dict[str, tuple[ViTConfig, str]] = {
    f"{start}_patch{patch}_siglip_{size}": (
        vit_config(
            image_size_px=size,
            patch_size_px=patch,
            width=_TRUNKS[start][0],
            layers=_TRUNKS[start][1],
            heads=_TRUNKS[start][2],
            mlp_width=_TRUNKS[start][3],
        ),
        "gelu_tanh" if f"{start}_patch{patch}_siglip_{size}".startswith(_TANH_TRUNKS) else "gelu",
    )
    for (start, patch), sizes in _SIZES.items()
    for size in sizes
}


def _trunk_parts(theirs: str, ours: str) -> list[tuple[str, str]]:
    parts = ("attn.proj.{wb}", "norm1.{wb}", "norm2.{wb}", "attn.qkv.{wb}", "mlp.fc1.{wb}", "mlp.fc2.{wb}")
    return [(f"{theirs}.{part}", f"{ours}.{part}") for part in parts]


OPEN_CLIP_NAMES = NameMap(
    [
        *_SCALARS.items(),
        ("visual.trunk.patch_embed.proj.{wb}", "image_tower.patch_embed.{wb}"),
        ("visual.trunk.pos_embed", _POSITIONS),
        *_trunk_parts("visual.trunk.blocks.{n}", "image_tower.blocks.{n}"),
        ("visual.trunk.norm.{wb}", "image_tower.norm_post.{wb}"),
        ("visual.trunk.attn_pool.latent", _POOL_PROBE),
        ("visual.trunk.attn_pool.q.{wb}", "image_tower.pool.attn.q.{wb}"),  # put together by `_fuse_pool`
        ("visual.trunk.attn_pool.kv.{wb}", "image_tower.pool.attn.kv.{wb}"),
        ("visual.trunk.attn_pool.proj.{wb}", "image_tower.pool.attn.proj.{wb}"),
        ("visual.trunk.attn_pool.norm.{wb}", "image_tower.pool.norm.{wb}"),
        ("visual.trunk.attn_pool.mlp.fc1.{wb}", "image_tower.pool.mlp.fc1.{wb}"),
        ("visual.trunk.attn_pool.mlp.fc2.{wb}", "image_tower.pool.mlp.fc2.{wb}"),
        ("text.positional_embedding", "text_tower.position_embedding"),
        ("text.token_embedding.weight", "text_tower.token_embedding.weight"),
        *(
            (f"text.transformer.resblocks.{{n}}.{theirs}", f"text_tower.blocks.{{n}}.{ours}")
            for theirs, ours in (
                ("ln_1.{wb}", "norm1.{wb}"),
                ("attn.in_proj_{wb}", "attn.qkv.{wb}"),
                ("attn.out_proj.{wb}", "attn.proj.{wb}"),
                ("ln_2.{wb}", "norm2.{wb}"),
                ("mlp.c_fc.{wb}", "mlp.fc1.{wb}"),
                ("mlp.c_proj.{wb}", "mlp.fc2.{wb}"),
            )
        ),
        ("text.ln_final.{wb}", "text_tower.norm_final.{wb}"),
        ("text.text_projection.{wb}", "text_tower.head.{wb}"),
    ]
)
_TEXT_MUST = {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
_KNOWN_TEXT = {*_TEXT_MUST, "context_length", "vocab_size", "hf_tokenizer_name", "tokenizer_kwargs", "width", "heads", "layers"}
_KNOWN_TEXT |= {"mlp_ratio", "norm_kwargs", "act_kwargs"}


def is_open_clip(folder: Path) -> bool:
    """Whether an open_clip folder holds a SigLIP: its image tower is one of timm's with that name."""
    model_cfg = read_json(folder / open_clip.CONFIG).get("model_cfg")
    vision = model_cfg.get("vision_cfg") if isinstance(model_cfg, dict) else None
    return isinstance(vision, dict) and "siglip" in str(vision.get("timm_model_name"))


def is_open_clip_layout(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are a SigLIP's parameters under open_clip's names."""
    return "logit_bias" in tensors and "visual.trunk.attn_pool.latent" in tensors


def read_open_clip_folder(folder: Path, weights_file: Path | None = None) -> Contents:
    """Read a folder with an `open_clip_config.json` of a SigLIP.

    Args:
        folder: where the config is.
        weights_file: which weights to read; None takes the first of open_clip's usual names.

    Raises:
        CheckpointError: no weights, or an option that ours does not have.
    """
    path = folder / open_clip.CONFIG
    content = read_json(path)
    config = config_from_model_cfg(content["model_cfg"], path)
    weights_file = weights_file or first_file(folder, open_clip.WEIGHTS + open_clip.OTHER_WEIGHTS)
    if weights_file is None:
        raise CheckpointError(
            f"{folder} has {open_clip.CONFIG} but no weights; expected one of "
            f"{', '.join(open_clip.WEIGHTS + open_clip.OTHER_WEIGHTS)}"
        )
    weights = read_weights(weights_file)
    tokenizer = read_tokenizer(folder, config.text.context_length, clean="open_clip")
    cfg = content.get("preprocess_cfg")
    preprocess = None
    if cfg:
        preprocess = open_clip._preprocess(path, {"mean": HALF, "std": HALF, "resize_mode": "squash", **cfg}, config)  # type: ignore[arg-type]
    return Contents(
        source=folder,
        layout="open_clip",
        tensors=from_open_clip(weights.tensors),
        config=with_padding(config, tokenizer),
        tokenizer=tokenizer,
        preprocess=preprocess,
        notes=weights.notes,
    )


def config_from_model_cfg(model_cfg: Mapping[str, Any], path: Path) -> SigLIPConfig:
    """Our config for open_clip's `model_cfg` of a SigLIP; `path` is named in errors.

    Raises:
        CheckpointError: it lacks a part, or has an option that ours does not have.
    """
    for part in ("embed_dim", "vision_cfg", "text_cfg"):
        if part not in model_cfg:
            raise CheckpointError(f"{path}: model_cfg has no {part!r}")
    vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    name = vision["timm_model_name"]
    if name not in TIMM_TRUNKS:
        raise CheckpointError(f"{path}: timm_model_name = {name!r} is unknown; known are {', '.join(TIMM_TRUNKS)}")
    image, activation = TIMM_TRUNKS[name]
    unsupported(path, vision, {"timm_pool": ("map",), "timm_proj": ("none",), "image_size": (image.image_size_px,)}, name)
    wanted = _TEXT_MUST | {"tokenizer_kwargs": {"clean": "canonicalize"}, "norm_kwargs": {"eps": 1e-6}}
    for option, value in wanted.items():
        if text.get(option) != value:
            raise CheckpointError(f"{path}: {option} = {text.get(option)!r}; a SigLIP's text tower has {value!r}")
    unsupported(path, text, {"act_kwargs": (None, {}, {"approximate": "tanh"})}, "SigLIP's text tower")
    if unknown := sorted(set(text) - _KNOWN_TEXT):
        raise CheckpointError(
            f"{path}: {', '.join(unknown)} is unknown; a SigLIP's text_cfg has {', '.join(sorted(_KNOWN_TEXT))}"
        )
    text_activation = "gelu_tanh" if text.get("act_kwargs") else "gelu"
    return SigLIPConfig(
        embed_dim=model_cfg["embed_dim"],
        image=image,
        text=SigLIPTextConfig(
            vocab_size=text["vocab_size"],
            context_length=text["context_length"],
            width=text["width"],
            num_layers=text["layers"],
            num_heads=text["heads"],
            mlp_ratio=int(text["width"] * text.get("mlp_ratio", 4.0)) / text["width"],
        ),
        activation=activation,  # type: ignore[arg-type]
        text_activation=None if text_activation == activation else text_activation,  # type: ignore[arg-type]
    )


def from_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's names to ours; a name that is no part of SigLIP stays as it is, for the caller to name as surplus."""
    state = _without_leading_axes({OPEN_CLIP_NAMES.ours(name) or name: tensor for name, tensor in tensors.items()})
    for wb in ("weight", "bias"):
        parts = [state.get(f"image_tower.pool.attn.{which}.{wb}") for which in ("q", "kv")]
        q, kv = parts
        if q is not None and kv is not None and q.shape[1:] == kv.shape[1:] and q.dtype == kv.dtype:
            for which in ("q", "kv"):
                del state[f"image_tower.pool.attn.{which}.{wb}"]
            state[_POOL_QKV + wb] = torch.cat([q, kv])
    return state


def to_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names to open_clip's.

    Raises:
        CheckpointError: a parameter that open_clip's SigLIP does not have.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        parts = {name: tensor}
        if name.startswith(_POOL_QKV):
            q, k, v = tensor.chunk(3)
            wb = name.removeprefix(_POOL_QKV)
            parts = {f"image_tower.pool.attn.q.{wb}": q, f"image_tower.pool.attn.kv.{wb}": torch.cat([k, v])}
        elif name in (_POOL_PROBE, _POSITIONS):
            parts = {name: tensor.reshape(1, -1, tensor.shape[-1])}
        for ours, part in parts.items():
            theirs = OPEN_CLIP_NAMES.theirs(ours)
            if theirs is None:
                raise CheckpointError(f"{name} has no place in open_clip's SigLIP")
            renamed[theirs] = part.contiguous()
    return renamed


def write_open_clip_folder(
    folder: Path, tensors: Mapping[str, Tensor], config: Any, tokenizer: TextTokenizer, preprocess: Preprocess
) -> None:
    """Write `open_clip_config.json`, the weights and the tokenizer's files into an empty folder.

    Raises:
        CheckpointError: an image tower that timm has no name for, or computes with another activation; another tokenizer.
    """
    from safetensors.torch import save_file

    image, text = _check_towers(config, "open_clip")
    vocabulary = _check_tokenizer(tokenizer, "open_clip")
    bare = replace(image, patch_dropout=0.0, stochastic_depth=0.0)
    found = [name for name, (trunk, activation) in TIMM_TRUNKS.items() if trunk == bare and activation == config.activation]
    if not found:
        named = [f"{name} ({activation})" for name, (trunk, activation) in TIMM_TRUNKS.items() if trunk == bare]
        raise CheckpointError(
            f"open_clip names SigLIP's image towers by timm's models, and none of them is this ViT of {image.width} x "
            f"{image.num_layers} at {image.image_size_px} px with {config.activation}"
            f"{'; timm computes it with another activation: ' + named[0] if named else ''}. Write it with to='huggingface' or "
            "to='wordsight'"
        )
    text_activation = config.text_activation or config.activation
    if text_activation == "quick_gelu":
        raise CheckpointError("open_clip's SigLIP has no text tower with quick_gelu: write it with to='wordsight'")
    save_file(to_open_clip(tensors), folder / open_clip.WEIGHTS[0], metadata={"format": "pt"})
    vocabulary.save_huggingface(folder, clean=False)
    text_cfg: dict[str, Any] = {
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
        "hf_tokenizer_name": "tokenizer.json",  # any name: open_clip takes this folder's files
        "tokenizer_kwargs": {"clean": "canonicalize"},
        "width": text.width,
        "heads": text.num_heads,
        "layers": text.num_layers,
        "mlp_ratio": (round(text.width * text.mlp_ratio) + 0.5) / text.width,  # which open_clip rounds down
        **_TEXT_MUST,
        "norm_kwargs": {"eps": text.norm_eps},
    }
    if text_activation == "gelu_tanh":
        text_cfg["act_kwargs"] = {"approximate": "tanh"}
    vision_cfg = {"image_size": image.image_size_px, "timm_model_name": found[0], "timm_model_pretrained": False}
    model_cfg = {
        "embed_dim": config.embed_dim,
        "init_logit_bias": config.init_bias,
        "custom_text": True,
        "vision_cfg": vision_cfg | {"timm_pool": "map", "timm_proj": "none"},
        "text_cfg": text_cfg,
    }
    preprocess_cfg = {
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "interpolation": preprocess.interpolation,
        "resize_mode": preprocess.resize,
    }
    write_json(folder / open_clip.CONFIG, {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg})
