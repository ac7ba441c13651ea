"""big_vision's SigLIP files: numpy archives (.npz) whose members are named by their path in the tree of parameters.

Flax keeps matrices as [in, out], heads as an axis of their own, convolutions as [h, w, in, out]; `params/t` is the log of the
scale and `params/b` the bias. With `scan` all blocks are one member with a leading axis. Read with pickle forbidden.
"""

from __future__ import annotations

import math
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from wordsight.data.sentencepiece import FILES
from wordsight.interop.contents import Contents, first_file
from wordsight.interop.names import name_list
from wordsight.interop.safe_read import MAX_PICKLE_BYTES, CheckpointError
from wordsight.interop.siglip import read_tokenizer, vit_config, with_padding
from wordsight.models.contrastive.siglip import SigLIPConfig
from wordsight.nn.text import SigLIPTextConfig
from wordsight.nn.vit import ViTConfig

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".npz"
_PREFIX = "params/"
_ATTENTION, _MLP = "MultiHeadDotProductAttention_0", "MlpBlock_0"


def read_file(path: Path, expected: SigLIPConfig | None = None) -> Contents:
    """Read a SigLIP or SigLIP 2 (fixed resolution) that big_vision saved.

    The architecture is in the shapes, but for the image size where patches do not divide it: without `expected` it is the grid
    times the patch (378 px for So400m/14 at 384). A SentencePiece vocabulary in the same folder is the tokenizer: canonical text
    by big_vision's rules for the first, lower case for SigLIP 2.

    Args:
        path: the file.
        expected: the architecture that the user named, which says the image size.

    Raises:
        CheckpointError: a damaged archive, one with objects in it, or parameters that are no SigLIP's.
    """
    params = _read_params(path)
    state: dict[str, Tensor] = {}
    try:
        state["log_scale"], state["logit_bias"] = params.pop("t").reshape(()), params.pop("b").reshape(())
        _image_tower(params, state)
        heads = _text_tower(params, state)
    except KeyError as error:
        raise CheckpointError(
            f"{path} is no SigLIP of big_vision: it has no {_PREFIX}{error.args[0]}; its names are like "
            f"{name_list([_PREFIX + name for name in sorted(params)], 3)}"
        ) from None
    except (RuntimeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{path}: a parameter has a shape that no SigLIP has ({error})") from error
    if params:
        surplus = name_list([_PREFIX + name for name in sorted(params)])
        raise CheckpointError(
            f"{path} holds what SigLIP does not have: {surplus} (a NaFlex model, or a head on the image tower?)"
        )
    config = _config(path, state, heads, expected)
    tokenizer = read_tokenizer(path.parent, config.text.context_length) if first_file(path.parent, FILES) else None
    if tokenizer is not None:
        tokenizer = tokenizer.with_options(clean="big_vision" if tokenizer.clean == "huggingface" else "lower")
    return Contents(
        source=path,
        layout="big_vision",
        tensors=state,
        config=with_padding(config, tokenizer),
        tokenizer=tokenizer,
        preprocess=None,
    )


def _read_params(path: Path) -> dict[str, Tensor]:
    """The members under `params/`, without that prefix."""
    try:
        with zipfile.ZipFile(path) as archive:
            inflated = sum(record.file_size for record in archive.infolist())
        if inflated > MAX_PICKLE_BYTES + 20 * path.stat().st_size:
            raise CheckpointError(f"refused to read {path}: it would unpack to {inflated:,} bytes")
        found: dict[str, Tensor] = {}
        with np.load(path, allow_pickle=False) as members:
            for name in members.files:
                if name.startswith(_PREFIX):
                    found[name.removeprefix(_PREFIX)] = _tensor(members[name])
    except CheckpointError:
        raise
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, TypeError) as error:
        raise CheckpointError(
            f"{path} is no numpy archive of numbers, or a damaged one ({error}); objects in it are never read"
        ) from error
    if not found:
        raise CheckpointError(f"{path} has no member under {_PREFIX}: it is no checkpoint of big_vision")
    return found


def _tensor(array: np.ndarray) -> Tensor:
    """float16, float32 or float64; numpy does not know bfloat16 and gives two bytes without a type."""
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    if array.dtype.kind != "f":
        raise ValueError(f"a member of type {array.dtype}")
    return torch.from_numpy(np.ascontiguousarray(array))


def _image_tower(params: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    ours = "image_tower"
    state[f"{ours}.patch_embed.weight"] = params.pop("img/embedding/kernel").permute(3, 2, 0, 1).contiguous()
    state[f"{ours}.patch_embed.bias"] = params.pop("img/embedding/bias")
    state[f"{ours}.position_embedding"] = params.pop("img/pos_embedding").squeeze(0)
    _encoder(params, state, "img/Transformer", ours)
    _norm(params, state, "img/Transformer/encoder_norm", f"{ours}.norm_post")
    state[f"{ours}.pool.probe"] = params.pop("img/MAPHead_0/probe").reshape(-1)
    _attention(params, state, f"img/MAPHead_0/{_ATTENTION}", f"{ours}.pool.attn")
    _norm(params, state, "img/MAPHead_0/LayerNorm_0", f"{ours}.pool.norm")
    _mlp(params, state, f"img/MAPHead_0/{_MLP}", f"{ours}.pool.mlp")


def _text_tower(params: dict[str, Tensor], state: dict[str, Tensor]) -> tuple[int, int]:
    """Fills in the text tower; returns the heads of both."""
    ours = "text_tower"
    places = params.pop("txt/pos_embedding")
    if "txt/Encoder_0/pos_embedding" in params:  # some old models added positions twice
        places = places + params.pop("txt/Encoder_0/pos_embedding")
    state[f"{ours}.token_embedding.weight"] = params.pop("txt/Embed_0/embedding")
    state[f"{ours}.position_embedding"] = places.squeeze(0)
    _encoder(params, state, "txt/Encoder_0", ours)
    _norm(params, state, "txt/Encoder_0/encoder_norm", f"{ours}.norm_final")
    _dense(params, state, "txt/head", f"{ours}.head")
    heads = state.pop("image_tower.pool.attn.heads"), state.pop("text_tower.blocks.0.attn.heads")
    for name in [name for name in state if name.endswith(".heads")]:
        del state[name]
    return int(heads[0]), int(heads[1])


def _encoder(params: dict[str, Tensor], state: dict[str, Tensor], theirs: str, ours: str) -> None:
    scanned = f"{theirs}/encoderblock/"
    for name in [name for name in params if name.startswith(scanned)]:
        for i, part in enumerate(params.pop(name)):
            params[f"{theirs}/encoderblock_{i}/{name.removeprefix(scanned)}"] = part.contiguous()
    numbers = {int(found[1]) for name in params if (found := re.match(rf"{theirs}/encoderblock_(\d+)/", name))}
    for i in range(max(numbers, default=0) + 1):
        block, mine = f"{theirs}/encoderblock_{i}", f"{ours}.blocks.{i}"
        _norm(params, state, f"{block}/LayerNorm_0", f"{mine}.norm1")
        _attention(params, state, f"{block}/{_ATTENTION}", f"{mine}.attn")
        _norm(params, state, f"{block}/LayerNorm_1", f"{mine}.norm2")
        _mlp(params, state, f"{block}/{_MLP}", f"{mine}.mlp")


def _attention(params: dict[str, Tensor], state: dict[str, Tensor], theirs: str, ours: str) -> None:
    """[W, H, D] for q, k and v, [H, D, W] behind them."""
    kernels = [params.pop(f"{theirs}/{which}/kernel") for which in ("query", "key", "value")]
    biases = [params.pop(f"{theirs}/{which}/bias") for which in ("query", "key", "value")]
    state[f"{ours}.qkv.weight"] = torch.cat([kernel.flatten(1).T for kernel in kernels])
    state[f"{ours}.qkv.bias"] = torch.cat([bias.flatten() for bias in biases])
    state[f"{ours}.proj.weight"] = params.pop(f"{theirs}/out/kernel").flatten(0, 1).T.contiguous()
    state[f"{ours}.proj.bias"] = params.pop(f"{theirs}/out/bias")
    state[f"{ours}.heads"] = torch.tensor(kernels[0].shape[1])


def _mlp(params: dict[str, Tensor], state: dict[str, Tensor], theirs: str, ours: str) -> None:
    for i in (0, 1):
        _dense(params, state, f"{theirs}/Dense_{i}", f"{ours}.fc{i + 1}")


def _dense(params: dict[str, Tensor], state: dict[str, Tensor], theirs: str, ours: str) -> None:
    state[f"{ours}.weight"] = params.pop(f"{theirs}/kernel").T.contiguous()
    state[f"{ours}.bias"] = params.pop(f"{theirs}/bias")


def _norm(params: dict[str, Tensor], state: dict[str, Tensor], theirs: str, ours: str) -> None:
    state[f"{ours}.weight"], state[f"{ours}.bias"] = params.pop(f"{theirs}/scale"), params.pop(f"{theirs}/bias")


def _config(path: Path, state: dict[str, Tensor], heads: tuple[int, int], expected: SigLIPConfig | None) -> SigLIPConfig:
    """What the shapes say."""

    def layers(tower: str) -> int:
        return sum(name.startswith(f"{tower}.blocks.") and name.endswith(".norm1.weight") for name in state)

    def mlp_width(tower: str) -> int:
        return len(state[f"{tower}.blocks.0.mlp.fc1.bias"])

    patches, width = state["image_tower.position_embedding"].shape
    patch = state["image_tower.patch_embed.weight"].shape[-1]
    side = math.isqrt(patches)
    if side * side != patches:
        raise CheckpointError(f"{path}: {patches} patches are no square")
    size = side * patch
    named = getattr(expected, "image", None)
    if isinstance(named, ViTConfig) and named.image_size_px // patch == side:
        size = named.image_size_px
    vocab_size, text_width = state["text_tower.token_embedding.weight"].shape
    return SigLIPConfig(
        embed_dim=len(state["text_tower.head.bias"]),
        image=vit_config(
            image_size_px=size,
            patch_size_px=patch,
            width=width,
            layers=layers("image_tower"),
            heads=heads[0],
            mlp_width=mlp_width("image_tower"),
        ),
        text=SigLIPTextConfig(
            vocab_size=vocab_size,
            context_length=len(state["text_tower.position_embedding"]),
            width=text_width,
            num_layers=layers("text_tower"),
            num_heads=heads[1],
            mlp_ratio=mlp_width("text_tower") / text_width,
        ),
    )
