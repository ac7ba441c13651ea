"""transformers' ALIGN folders, read and written: EfficientNet under `vision_model.`, BERT under `text_model.`.

Differences to our layout: q, k and v of the text tower are three matrices each (ours is one). transformers' `AlignModel` also
holds a pooler (`text_model.pooler`) that its embeddings never go through: it is left out when read and written as zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from wordsight.data.transform import Preprocess
from wordsight.data.wordpiece import WordPieceTokenizer
from wordsight.interop.contents import Contents, first_file, read_json, unsupported, write_json
from wordsight.interop.huggingface import CONFIG, PREPROCESSING, WEIGHTS, _read_weights, _square
from wordsight.interop.names import NameMap, fuse_qkv, split_qkv
from wordsight.interop.safe_read import CheckpointError, read_weights
from wordsight.models.contrastive.align import ALIGNConfig
from wordsight.nn.bert import BertConfig
from wordsight.nn.efficientnet import NORM_EPS, EfficientNetConfig

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from wordsight.data.tokenize import TextTokenizer


def efficientnet_rows(theirs: str, ours: str) -> list[tuple[str, str]]:
    """Rows of a NameMap for an EfficientNet of transformers; `theirs` and `ours` end in a dot or are empty."""
    block, mine = f"{theirs}encoder.blocks.{{n}}.", f"{ours}blocks.{{n}}."
    return [
        (f"{theirs}embeddings.convolution.weight", f"{ours}stem.conv.weight"),
        (f"{theirs}embeddings.batchnorm.{{bn}}", f"{ours}stem.norm.{{bn}}"),
        (f"{block}expansion.expand_conv.weight", f"{mine}expand.conv.weight"),
        (f"{block}expansion.expand_bn.{{bn}}", f"{mine}expand.norm.{{bn}}"),
        (f"{block}depthwise_conv.depthwise_conv.weight", f"{mine}depthwise.conv.weight"),
        (f"{block}depthwise_conv.depthwise_norm.{{bn}}", f"{mine}depthwise.norm.{{bn}}"),
        (f"{block}squeeze_excite.reduce.{{wb}}", f"{mine}squeeze.reduce.{{wb}}"),
        (f"{block}squeeze_excite.expand.{{wb}}", f"{mine}squeeze.expand.{{wb}}"),
        (f"{block}projection.project_conv.weight", f"{mine}project.conv.weight"),
        (f"{block}projection.project_bn.{{bn}}", f"{mine}project.norm.{{bn}}"),
        (f"{theirs}encoder.top_conv.weight", f"{ours}head.conv.weight"),
        (f"{theirs}encoder.top_bn.{{bn}}", f"{ours}head.norm.{{bn}}"),
    ]


def bert_rows(theirs: str, ours: str) -> list[tuple[str, str]]:
    """Rows of a NameMap for a BERT of transformers; `theirs` and `ours` end in a dot or are empty."""
    layer, mine = f"{theirs}encoder.layer.{{n}}.", f"{ours}blocks.{{n}}."
    return [
        (f"{theirs}embeddings.word_embeddings.weight", f"{ours}token_embedding.weight"),
        (f"{theirs}embeddings.position_embeddings.weight", f"{ours}position_embedding"),
        (f"{theirs}embeddings.token_type_embeddings.weight", f"{ours}type_embedding"),
        (f"{theirs}embeddings.LayerNorm.{{wb}}", f"{ours}norm_embed.{{wb}}"),
        *(
            (f"{layer}attention.self.{word}.{{wb}}", f"{mine}attn.{word[0]}.{{wb}}")  # gathered into attn.qkv
            for word in ("query", "key", "value")
        ),
        (f"{layer}attention.output.dense.{{wb}}", f"{mine}attn.proj.{{wb}}"),
        (f"{layer}attention.output.LayerNorm.{{wb}}", f"{mine}norm1.{{wb}}"),
        (f"{layer}intermediate.dense.{{wb}}", f"{mine}mlp.fc1.{{wb}}"),
        (f"{layer}output.dense.{{wb}}", f"{mine}mlp.fc2.{{wb}}"),
        (f"{layer}output.LayerNorm.{{wb}}", f"{mine}norm2.{{wb}}"),
        (f"{theirs}pooler.dense.{{wb}}", f"{ours}pooler.{{wb}}"),
    ]


NAMES = NameMap(
    [
        ("temperature", "temperature"),
        *efficientnet_rows("vision_model.", "image_tower."),
        *bert_rows("text_model.", "text_tower."),
        ("text_projection.{wb}", "text_tower.projection.{wb}"),
    ]
)
_LEFT_OUT = ("text_tower.pooler.weight", "text_tower.pooler.bias")
_COUNTED = ("text_model.embeddings.position_ids", "text_model.embeddings.token_type_ids")  # stored until transformers 4.31


def read_folder(folder: Path, weights_file: Path | None = None) -> Contents:
    """Read a folder that transformers' `AlignModel.save_pretrained` wrote, or one of the hub.

    Args:
        folder: where `config.json` is.
        weights_file: which weights to read; None takes the usual names, shards included.

    Raises:
        CheckpointError: no weights, or an option that ours does not have.
    """
    path = folder / CONFIG
    config = config_from_json(read_json(path), path)
    weights = read_weights(weights_file) if weights_file else _read_weights(folder)
    tokenizer = preprocess = None
    if first_file(folder, ("tokenizer.json", "vocab.txt")):
        try:
            tokenizer = WordPieceTokenizer.from_file(folder, config.text.context_length)
        except ValueError as error:
            raise CheckpointError(f"{folder}: {error}") from error
    for name in PREPROCESSING:
        if (folder / name).is_file() and preprocess is None:
            content = read_json(folder / name)
            values = content.get("image_processor", content if name == PREPROCESSING[0] else None)
            if isinstance(values, dict):
                preprocess = preprocess_from_json(values, folder / name)
    return Contents(
        source=folder,
        layout="huggingface",
        tensors=to_ours(weights.tensors),
        config=config,
        tokenizer=tokenizer,
        preprocess=preprocess,
        notes=weights.notes,
    )


def write_folder(
    folder: Path, tensors: Mapping[str, Tensor], config: Any, tokenizer: TextTokenizer, preprocess: Preprocess
) -> None:
    """Write `config.json`, weights, `preprocessor_config.json` and the tokenizer's files into an empty folder.

    Raises:
        CheckpointError: towers or a tokenizer that transformers' ALIGN does not have.
    """
    from safetensors.torch import save_file

    if not isinstance(tokenizer, WordPieceTokenizer):
        raise CheckpointError(
            f"transformers' ALIGN has BERT's tokenizer, not a {type(tokenizer).__name__}: write it with to='wordsight'"
        )
    values = config_json(config)
    save_file(to_theirs(tensors), folder / WEIGHTS[0], metadata={"format": "pt"})
    write_json(folder / PREPROCESSING[0], preprocess_json(preprocess))
    tokenizer.save_huggingface(folder)
    write_json(folder / CONFIG, values)


def is_layout(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are an ALIGN's parameters under transformers' names."""
    return "temperature" in tensors and "text_projection.weight" in tensors


def to_ours(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names to ours; a name that is no part of ALIGN stays as it is, for the caller to name as surplus."""
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        ours = NAMES.ours(name) or name
        if ours not in _LEFT_OUT and name not in _COUNTED:
            state[ours] = tensor.reshape(()) if ours == "temperature" else tensor
    return fuse_qkv(state)


def to_theirs(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names to transformers'.

    Raises:
        CheckpointError: a parameter that transformers' ALIGN does not have.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in split_qkv(state).items():
        theirs = NAMES.theirs(name)
        if theirs is None or ".top_" in theirs:
            raise CheckpointError(f"{name} has no place in transformers' ALIGN: an EfficientNet without head and a BERT")
        renamed[theirs] = tensor.contiguous()
    tokens = state["text_tower.token_embedding.weight"]
    width = tokens.shape[1]
    renamed["text_model.pooler.dense.weight"] = torch.zeros(width, width, dtype=tokens.dtype)
    renamed["text_model.pooler.dense.bias"] = torch.zeros(width, dtype=tokens.dtype)
    return renamed


# ------------------------------------------------------------------------------------------------------------------- configs

# transformers writes only what differs from these into old configs
_VISION_DEFAULTS: dict[str, Any] = {
    "image_size": 600,
    "width_coefficient": 2.0,
    "depth_coefficient": 3.1,
    "depth_divisor": 8,
    "kernel_sizes": [3, 3, 5, 3, 5, 5, 3],
    "in_channels": [32, 16, 24, 40, 80, 112, 192],
    "out_channels": [16, 24, 40, 80, 112, 192, 320],
    "depthwise_padding": [],
    "strides": [1, 2, 2, 2, 1, 2, 1],
    "num_block_repeats": [1, 2, 2, 3, 3, 4, 1],
    "expand_ratios": [1, 6, 6, 6, 6, 6, 6],
    "squeeze_expansion_ratio": 0.25,
    "drop_connect_rate": 0.2,
}
_TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
_STEM_CHANNELS = 32


def efficientnet_from_json(values: Mapping[str, Any], path: Path) -> EfficientNetConfig:
    """Our config for transformers' AlignVisionConfig; `path` is named in errors.

    Raises:
        CheckpointError: an option that ours does not have.
    """
    values = _VISION_DEFAULTS | dict(values)
    neutral = {"num_channels": (3,), "depth_divisor": (8,), "hidden_act": ("swish", "silu"), "pooling_type": ("mean",)}
    unsupported(path, values, {**neutral, "batch_norm_eps": (NORM_EPS,)}, "an EfficientNet")
    wanted = [_STEM_CHANNELS, *values["out_channels"][:-1]]
    if list(values["in_channels"]) != wanted:
        raise CheckpointError(
            f"{path}: in_channels is {values['in_channels']}; an EfficientNet's stages follow each other: {wanted}"
        )
    return EfficientNetConfig(
        image_size_px=values["image_size"],
        width_factor=values["width_coefficient"],
        depth_factor=values["depth_coefficient"],
        stem_channels=_STEM_CHANNELS,
        channels=tuple(values["out_channels"]),
        repeats=tuple(values["num_block_repeats"]),
        kernel_sizes=tuple(values["kernel_sizes"]),
        strides=tuple(values["strides"]),
        expansions=tuple(values["expand_ratios"]),
        head_channels=None,
        squeeze_ratio=values["squeeze_expansion_ratio"],
        padding="even",
        square_blocks=tuple(values["depthwise_padding"]),
        drop_connect=values["drop_connect_rate"],
        project=False,
    )


def efficientnet_json(config: EfficientNetConfig) -> dict[str, Any]:
    """transformers' AlignVisionConfig for our config.

    Raises:
        CheckpointError: a variant that transformers' ALIGN does not have.
    """
    wrong = [
        what
        for what, is_so in (
            ("a closing convolution (head_channels)", config.head_channels is not None),
            ("a projection", config.project),
            ("no squeeze", config.squeeze_ratio is None),
            (f"the activation {config.activation}", config.activation != "swish"),
            ("fixed ends", config.fixed_ends),
            (f"{config.stem_channels} channels in the stem", config.stem_channels != _STEM_CHANNELS),
            ("padding by the size at hand (padding='same')", config.padding != "even"),
        )
        if is_so
    ]
    if wrong:
        raise CheckpointError(f"transformers' ALIGN has no EfficientNet with {', '.join(wrong)}: write it with to='wordsight'")
    return {
        "model_type": "align_vision_model",
        "num_channels": 3,
        "image_size": config.image_size_px,
        "width_coefficient": config.width_factor,
        "depth_coefficient": config.depth_factor,
        "depth_divisor": 8,
        "kernel_sizes": list(config.kernel_sizes),
        "in_channels": [_STEM_CHANNELS, *config.channels[:-1]],
        "out_channels": list(config.channels),
        "depthwise_padding": list(config.square_blocks),
        "strides": list(config.strides),
        "num_block_repeats": list(config.repeats),
        "expand_ratios": list(config.expansions),
        "squeeze_expansion_ratio": config.squeeze_ratio,
        "hidden_act": "swish",
        # the side of the window of its last average pool, which must be the whole map
        "hidden_dim": 2560,
        "pooling_type": "mean",
        "batch_norm_eps": NORM_EPS,
        "batch_norm_momentum": config.norm_momentum,
        "drop_connect_rate": config.drop_connect,
    }


def bert_from_json(values: Mapping[str, Any], path: Path, **ours: Any) -> BertConfig:
    """Our config for transformers' BertConfig or AlignTextConfig; `path` is named in errors, `ours` are fields that it can't say.

    Raises:
        CheckpointError: an option that ours does not have.
    """
    values = _TEXT_DEFAULTS | dict(values)
    neutral: dict[str, tuple[Any, ...]] = {"hidden_act": ("gelu",), "is_decoder": (False,), "add_cross_attention": (False,)}
    unsupported(path, values, {**neutral, "position_embedding_type": ("absolute",)}, "a BERT")
    return BertConfig(
        vocab_size=values["vocab_size"],
        context_length=values["max_position_embeddings"],
        width=values["hidden_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=values["num_attention_heads"],
        mlp_ratio=values["intermediate_size"] / values["hidden_size"],
        num_types=values["type_vocab_size"],
        pad_id=values["pad_token_id"],
        norm_eps=values["layer_norm_eps"],
        **ours,
    )


def bert_json(config: BertConfig) -> dict[str, Any]:
    """transformers' AlignTextConfig for our config.

    Raises:
        CheckpointError: a variant that transformers' ALIGN does not have.
    """
    if config.activation != "gelu" or config.pool != "cls" or not config.project:
        raise CheckpointError(
            f"transformers' ALIGN has a BERT with gelu, the first token's output and a projection, not activation="
            f"{config.activation}, pool={config.pool}, project={config.project}: write it with to='wordsight'"
        )
    return {
        "model_type": "align_text_model",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": round(config.width * config.mlp_ratio),
        "hidden_act": "gelu",
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": 0.0,
        "max_position_embeddings": config.context_length,
        "type_vocab_size": config.num_types,
        "layer_norm_eps": config.norm_eps,
        "pad_token_id": config.pad_id,
    }


def config_from_json(values: Mapping[str, Any], path: Path) -> ALIGNConfig:
    """Our config for transformers' `config.json` of an ALIGN; `path` is named in errors.

    Raises:
        CheckpointError: an option that ours does not have.
    """
    image = efficientnet_from_json(values.get("vision_config") or {}, path)
    text = bert_from_json(values.get("text_config") or {}, path, pool="cls", project=True)
    embed_dim = values.get("projection_dim", 640)
    if embed_dim != image.num_features:
        raise CheckpointError(f"{path}: projection_dim is {embed_dim}, the image tower ends in {image.num_features} features")
    start = values.get("temperature_init_value", 1.0)
    return ALIGNConfig(
        embed_dim=embed_dim, image=image, text=text, init_temperature=start, min_temperature=min(0.01, start), label_smoothing=0.1
    )


def config_json(config: ALIGNConfig) -> dict[str, Any]:
    """transformers' `config.json` for our config.

    Raises:
        CheckpointError: a tower that transformers' ALIGN does not have.
    """
    for what, found, kind in (("image", config.image, EfficientNetConfig), ("text", config.text, BertConfig)):
        if not isinstance(found, kind):
            raise CheckpointError(
                f"transformers' ALIGN has no {what} tower like {type(found).__name__.removesuffix('Config')}, only "
                f"{kind.__name__.removesuffix('Config')}: write it with to='wordsight'"
            )
    assert isinstance(config.image, EfficientNetConfig)
    assert isinstance(config.text, BertConfig)
    return {
        "architectures": ["AlignModel"],
        "model_type": "align",
        # what it runs in; the weights keep the dtype that they have in the file
        "dtype": "float32",
        "torch_dtype": "float32",
        "projection_dim": config.embed_dim,
        "temperature_init_value": config.init_temperature,
        "vision_config": efficientnet_json(config.image),
        "text_config": bert_json(config.text),
    }


# ------------------------------------------------------------------------------------------------------------- preprocessing

_RESAMPLE = {2: "bilinear", 3: "bicubic"}


def preprocess_from_json(values: Mapping[str, Any], path: Path) -> Preprocess:
    """What an EfficientNet's `preprocessor_config.json` says: a squash to a square, perhaps a centre crop, a range of values.

    Raises:
        CheckpointError: something that ours does not have.
    """
    unsupported(
        path, values, {"do_resize": (True, None), "do_rescale": (True, None), "include_top": (False, None)}, "preprocessing"
    )
    if values.get("resample", 3) not in _RESAMPLE:
        raise CheckpointError(f"{path}: resample must be 2 (bilinear) or 3 (bicubic), got {values['resample']}")
    side = _square(path, values["size"])
    crop = _square(path, values.get("crop_size") or side) if values.get("do_center_crop") else side
    # x / 127.5 - 1 is (x / 255 - .5) / .5; a normalisation by mean and std may follow
    scale = 255 * (values.get("rescale_factor") or 1 / 255)
    shift = 1.0 if values.get("rescale_offset") else 0.0
    mean, std = (0.0,) * 3, (1.0,) * 3
    if values.get("do_normalize", True):
        mean, std = tuple(values.get("image_mean") or (0.5,) * 3), tuple(values.get("image_std") or (0.5,) * 3)
    return Preprocess(
        image_size_px=crop,
        resize="squash",
        resize_px=None if crop == side else side,
        interpolation=_RESAMPLE[values.get("resample", 3)],
        mean=tuple((m + shift) / scale for m in mean),  # type: ignore[arg-type]
        std=tuple(s / scale for s in std),  # type: ignore[arg-type]
    )


def preprocess_json(preprocess: Preprocess) -> dict[str, Any]:
    """transformers' `preprocessor_config.json` of an EfficientNetImageProcessor for our preprocessing.

    Raises:
        CheckpointError: a resize to the shortest side, which it does not have.
    """
    side, crop = preprocess.resize_px or preprocess.image_size_px, preprocess.image_size_px
    if preprocess.resize != "squash":
        raise CheckpointError(
            "transformers' ALIGN resizes both sides (resize='squash'), and this model the shortest: write it with to='wordsight'"
        )
    return {
        "image_processor_type": "EfficientNetImageProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": next(number for number, name in _RESAMPLE.items() if name == preprocess.interpolation),
        "do_center_crop": crop != side,
        "crop_size": {"height": crop, "width": crop},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "rescale_offset": False,
        "include_top": False,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }
