"""SigLIP in transformers' folders, read and written, and what all its layouts share; SigLIP 2 at a fixed resolution has the same.

Differences to our layout: q, k and v of the blocks are three matrices each (ours are one); probe and positions have leading axes
of 1, scale and bias may too.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wordsight.data.sentencepiece import FILES, SentencePieceTokenizer
from wordsight.data.transform import Preprocess
from wordsight.interop import huggingface
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
SCALARS = {"logit_scale": "log_scale", "logit_bias": "logit_bias"}
POOL_PROBE, POSITIONS = "image_tower.pool.probe", "image_tower.position_embedding"
POOL_QKV = "image_tower.pool.attn.qkv."


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


def check_towers(config: Any, library: str) -> tuple[ViTConfig, SigLIPTextConfig]:
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


def check_tokenizer(tokenizer: TextTokenizer, library: str) -> SentencePieceTokenizer:
    """The tokenizer, if it is SigLIP's kind."""
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
        *SCALARS.items(),
        ("vision_model.embeddings.patch_embedding.{wb}", "image_tower.patch_embed.{wb}"),
        ("vision_model.embeddings.position_embedding.weight", POSITIONS),
        *_blocks("vision_model", "image_tower"),
        ("vision_model.post_layernorm.{wb}", "image_tower.norm_post.{wb}"),
        ("vision_model.head.probe", POOL_PROBE),
        ("vision_model.head.attention.in_proj_{wb}", POOL_QKV + "{wb}"),
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

    vocabulary = check_tokenizer(tokenizer, "transformers")
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
    return fuse_qkv(without_leading_axes(state))


def to_theirs(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names to transformers'.

    Raises:
        CheckpointError: a parameter that transformers' SigLIP does not have.
    """
    pool = {name: tensor for name, tensor in state.items() if name.startswith(POOL_QKV)}
    rest = split_qkv({name: tensor for name, tensor in state.items() if name not in pool})
    renamed: dict[str, Tensor] = {}
    for name, tensor in (rest | pool).items():
        theirs = NAMES.theirs(name)
        if theirs is None:
            raise CheckpointError(f"{name} has no place in transformers' SigLIP")
        if name in SCALARS.values():
            tensor = tensor.reshape(1)
        renamed[theirs] = (tensor.reshape(1, 1, -1) if name == POOL_PROBE else tensor).contiguous()
    return renamed


def without_leading_axes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scalars of shape [1] as [], the probe as [W], positions as [N, W]; whatever else has another shape stays, to be named."""
    for name in SCALARS.values():
        if name in state and state[name].numel() == 1:
            state[name] = state[name].reshape(())
    for name, ndim in ((POOL_PROBE, 1), (POSITIONS, 2), ("text_tower.position_embedding", 2)):
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
    image, text = check_towers(config, "transformers")

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
