"""OpenAI's layout of CLIP's parameters, which open_clip shares: names both ways, and what the shapes tell of the architecture.

Learning Transferable Visual Models From Natural Language Supervision (arXiv 2103.00020).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from wordsight.interop.names import NameMap
from wordsight.interop.safe_read import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from wordsight.interop.safe_read import Weights

# The published archives carry these numbers as tensors beside the weights.
EXTRA_KEYS = ("input_resolution", "context_length", "vocab_size")
HEAD_WIDTH = 64  # of every published CLIP; shapes don't tell it

_BLOCK = (
    ("ln_1.{wb}", "norm1.{wb}"),
    ("attn.in_proj_{wb}", "attn.qkv.{wb}"),
    ("attn.out_proj.{wb}", "attn.proj.{wb}"),
    ("ln_2.{wb}", "norm2.{wb}"),
    ("mlp.c_fc.{wb}", "mlp.fc1.{wb}"),
    ("mlp.c_proj.{wb}", "mlp.fc2.{wb}"),
)


def _blocks(theirs: str, ours: str) -> list[tuple[str, str]]:
    return [(f"{theirs}.resblocks.{{n}}.{a}", f"{ours}.blocks.{{n}}.{b}") for a, b in _BLOCK]


_TEXT = [
    ("logit_scale", "log_scale"),
    ("token_embedding.weight", "text_tower.token_embedding.weight"),
    ("positional_embedding", "text_tower.position_embedding"),
    *_blocks("transformer", "text_tower"),
    ("ln_final.{wb}", "text_tower.norm_final.{wb}"),
    ("text_projection", "text_tower.projection"),
]
_VIT = [
    ("visual.conv1.weight", "image_tower.patch_embed.weight"),
    ("visual.class_embedding", "image_tower.class_token"),
    ("visual.positional_embedding", "image_tower.position_embedding"),
    ("visual.ln_pre.{wb}", "image_tower.norm_pre.{wb}"),
    *_blocks("visual.transformer", "image_tower"),
    ("visual.ln_post.{wb}", "image_tower.norm_post.{wb}"),
    ("visual.proj", "image_tower.projection"),
]
_RESNET = [
    *((f"visual.conv{i}.weight", f"image_tower.stem.conv{i}.weight") for i in (1, 2, 3)),
    *((f"visual.bn{i}.{{bn}}", f"image_tower.stem.bn{i}.{{bn}}") for i in (1, 2, 3)),
    *(
        (f"visual.layer{stage + 1}.{{m}}.{theirs}", f"image_tower.stages.{stage}.{{m}}.{ours}")
        for stage in range(4)
        for theirs, ours in (
            *((f"conv{i}.weight", f"conv{i}.weight") for i in (1, 2, 3)),
            *((f"bn{i}.{{bn}}", f"bn{i}.{{bn}}") for i in (1, 2, 3)),
            ("downsample.0.weight", "downsample.conv.weight"),
            ("downsample.1.{bn}", "downsample.bn.{bn}"),
        )
    ),
    ("visual.attnpool.positional_embedding", "image_tower.attnpool.position_embedding"),
    ("visual.attnpool.{qkv}_proj.{wb}", "image_tower.attnpool.{qkv}.{wb}"),
    ("visual.attnpool.c_proj.{wb}", "image_tower.attnpool.proj.{wb}"),
]
VIT_NAMES, RESNET_NAMES = NameMap(_VIT + _TEXT), NameMap(_RESNET + _TEXT)


def is_layout(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are a CLIP's parameters under OpenAI's names (open_clip's `text.` prefix included)."""
    return any(name.startswith("visual.") for name in tensors)


def tidy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights alone: without the three extra numbers and the causal masks, and without open_clip's `text.` prefix."""
    kept = {n: t for n, t in tensors.items() if n not in EXTRA_KEYS and n.rsplit(".", 1)[-1] != "attn_mask"}
    if "text.token_embedding.weight" in kept:
        kept = {name.removeprefix("text."): tensor for name, tensor in kept.items()}
    if "logit_scale" in kept:
        kept["logit_scale"] = kept["logit_scale"].reshape(())
    return kept


def to_ours(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenAI's names to ours; a name that is no part of CLIP stays as it is, for the caller to name as surplus."""
    names = RESNET_NAMES if any(n.startswith("visual.layer1.") for n in tensors) else VIT_NAMES
    return {names.ours(name) or name: tensor for name, tensor in tidy(tensors).items()}


def to_theirs(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names to OpenAI's; every one of ours must have one of theirs."""
    names = RESNET_NAMES if "image_tower.stem.conv1.weight" in state else VIT_NAMES
    renamed = {names.theirs(name): tensor for name, tensor in state.items()}
    if None in renamed:
        unknown = next(n for n in state if names.theirs(n) is None)
        raise CheckpointError(
            f"{unknown} has no place in OpenAI's and open_clip's CLIP, whose image tower is a ViT or a ResNet: write it with "
            "to='wordsight'"
        )
    return {name: tensor for name, tensor in renamed.items() if name is not None}


def activation_of(weights: Weights) -> str | None:
    """The activation that a file of weights itself tells, or None.

    An archive names its classes. The three extra numbers are written by OpenAI's own models only, which are all QuickGELU.
    """
    classes = {name.rsplit(".", 1)[-1] for name in weights.class_names}
    if "QuickGELU" in classes:
        return "quick_gelu"
    if "GELU" in classes:
        return "gelu"
    return "quick_gelu" if all(key in weights.tensors for key in EXTRA_KEYS) else None


def shapes_to_open_clip_config(tensors: Mapping[str, Tensor]) -> dict:
    """The architecture that the shapes tell, as open_clip's `model_cfg`; heads are 64 wide, as in every published CLIP.

    Args:
        tensors: a whole state dict in OpenAI's names.

    Raises:
        CheckpointError: a tensor that tells the architecture is missing, or the widths aren't multiples of 64.
    """
    tensors = tidy(tensors)
    try:
        text_width = tensors["ln_final.weight"].shape[0]
        text = {
            "context_length": tensors["positional_embedding"].shape[0],
            "vocab_size": tensors["token_embedding.weight"].shape[0],
            "width": text_width,
            "heads": text_width // HEAD_WIDTH,
            "layers": _count(tensors, r"transformer\.resblocks\.(\d+)\."),
        }
        embed_dim = tensors["text_projection"].shape[1]
        if "visual.proj" in tensors:
            width, _, _, patch = tensors["visual.conv1.weight"].shape
            grid = math.isqrt(tensors["visual.positional_embedding"].shape[0] - 1)
            vision: dict[str, Any] = {"layers": _count(tensors, r"visual\.transformer\.resblocks\.(\d+)\."), "patch_size": patch}
            size = grid * patch
        else:
            width = tensors["visual.layer1.0.conv1.weight"].shape[0]
            size = 32 * math.isqrt(tensors["visual.attnpool.positional_embedding"].shape[0] - 1)
            vision = {"layers": [_count(tensors, rf"visual\.layer{s}\.(\d+)\.") for s in (1, 2, 3, 4)], "patch_size": None}
    except KeyError as error:
        raise CheckpointError(
            f"the file has no {error.args[0]!r}, so it is not a whole CLIP with a ViT or ResNet image tower"
        ) from None
    if text_width % HEAD_WIDTH or ("visual.proj" in tensors and width % HEAD_WIDTH):
        raise CheckpointError(
            f"widths {width} (image) and {text_width} (text) are not multiples of {HEAD_WIDTH}, so the number of attention heads "
            "can't be told from the shapes: load it with model=NAME or from a folder with its config"
        )
    return {"embed_dim": embed_dim, "vision_cfg": {"image_size": size, "width": width, **vision}, "text_cfg": text}


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    return len({found[1] for name in tensors if (found := re.match(pattern, name))})
