"""SigLIP in open_clip's folders, read and written; SigLIP 2 at a fixed resolution has the same layout.

Differences to our layout: timm's trunk keeps the pool's q apart from its k and v (ours are one); probe and positions have leading
axes of 1, scale and bias may too.

open_clip's towers are not quite those that were trained: most of timm's ViTs and, for the first SigLIPs, the text towers are
computed with the exact GELU where the paper's code has its tanh approximation. A folder of open_clip is computed as open_clip
does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from wordsight.data.transform import Preprocess
from wordsight.interop import open_clip
from wordsight.interop.contents import Contents, first_file, read_json, unsupported, write_json
from wordsight.interop.names import NameMap
from wordsight.interop.safe_read import CheckpointError, read_weights
from wordsight.interop.siglip import (
    HALF,
    POOL_PROBE,
    POOL_QKV,
    POSITIONS,
    SCALARS,
    check_tokenizer,
    check_towers,
    read_tokenizer,
    vit_config,
    with_padding,
    without_leading_axes,
)
from wordsight.models.contrastive.siglip import SigLIPConfig
from wordsight.nn.text import SigLIPTextConfig
from wordsight.nn.vit import ViTConfig

if TYPE_CHECKING:
    from torch import Tensor

    from wordsight.data.tokenize import TextTokenizer

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


NAMES = NameMap(
    [
        *SCALARS.items(),
        ("visual.trunk.patch_embed.proj.{wb}", "image_tower.patch_embed.{wb}"),
        ("visual.trunk.pos_embed", POSITIONS),
        *_trunk_parts("visual.trunk.blocks.{n}", "image_tower.blocks.{n}"),
        ("visual.trunk.norm.{wb}", "image_tower.norm_post.{wb}"),
        ("visual.trunk.attn_pool.latent", POOL_PROBE),
        ("visual.trunk.attn_pool.q.{wb}", "image_tower.pool.attn.q.{wb}"),  # put together by `to_ours`
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


def is_folder(folder: Path) -> bool:
    """Whether an open_clip folder holds a SigLIP: its image tower is one of timm's with that name."""
    model_cfg = read_json(folder / open_clip.CONFIG).get("model_cfg")
    vision = model_cfg.get("vision_cfg") if isinstance(model_cfg, dict) else None
    return isinstance(vision, dict) and "siglip" in str(vision.get("timm_model_name"))


def is_layout(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are a SigLIP's parameters under open_clip's names."""
    return "logit_bias" in tensors and "visual.trunk.attn_pool.latent" in tensors


def read_folder(folder: Path, weights_file: Path | None = None) -> Contents:
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
        tensors=to_ours(weights.tensors),
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


def to_ours(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's names to ours; a name that is no part of SigLIP stays as it is, for the caller to name as surplus."""
    state = without_leading_axes({NAMES.ours(name) or name: tensor for name, tensor in tensors.items()})
    for wb in ("weight", "bias"):
        parts = [state.get(f"image_tower.pool.attn.{which}.{wb}") for which in ("q", "kv")]
        q, kv = parts
        if q is not None and kv is not None and q.shape[1:] == kv.shape[1:] and q.dtype == kv.dtype:
            for which in ("q", "kv"):
                del state[f"image_tower.pool.attn.{which}.{wb}"]
            state[POOL_QKV + wb] = torch.cat([q, kv])
    return state


def to_theirs(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names to open_clip's.

    Raises:
        CheckpointError: a parameter that open_clip's SigLIP does not have.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        parts = {name: tensor}
        if name.startswith(POOL_QKV):
            q, k, v = tensor.chunk(3)
            wb = name.removeprefix(POOL_QKV)
            parts = {f"image_tower.pool.attn.q.{wb}": q, f"image_tower.pool.attn.kv.{wb}": torch.cat([k, v])}
        elif name in (POOL_PROBE, POSITIONS):
            parts = {name: tensor.reshape(1, -1, tensor.shape[-1])}
        for ours, part in parts.items():
            theirs = NAMES.theirs(ours)
            if theirs is None:
                raise CheckpointError(f"{name} has no place in open_clip's SigLIP")
            renamed[theirs] = part.contiguous()
    return renamed


def write_folder(
    folder: Path, tensors: Mapping[str, Tensor], config: Any, tokenizer: TextTokenizer, preprocess: Preprocess
) -> None:
    """Write `open_clip_config.json`, the weights and the tokenizer's files into an empty folder.

    Raises:
        CheckpointError: an image tower that timm has no name for, or computes with another activation; another tokenizer.
    """
    from safetensors.torch import save_file

    image, text = check_towers(config, "open_clip")
    vocabulary = check_tokenizer(tokenizer, "open_clip")
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
    save_file(to_theirs(tensors), folder / open_clip.WEIGHTS[0], metadata={"format": "pt"})
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
