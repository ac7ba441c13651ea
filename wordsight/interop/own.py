"""wordsight's own folders: `model.safetensors`, `tokenizer.json` and `wordsight.json`, which says everything else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import wordsight
from wordsight import catalog
from wordsight.data.sentencepiece import SentencePieceTokenizer
from wordsight.data.tokenize import ClipTokenizer, TextTokenizer
from wordsight.data.transform import Preprocess
from wordsight.data.wordpiece import WordPieceTokenizer
from wordsight.interop.contents import Contents, read_json, write_json
from wordsight.interop.safe_read import CheckpointError, read_weights
from wordsight.nn.towers import config_from_dict, config_to_dict

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, WEIGHTS = "wordsight.json", "model.safetensors"
FORMAT_VERSION = 1


def read_folder(folder: Path, weights_file: Path | None = None) -> Contents:
    """Read a folder that `wordsight.save` wrote.

    Args:
        folder: where `wordsight.json` is.
        weights_file: which weights to read; None takes `model.safetensors`.

    Raises:
        CheckpointError: another format version, a config that contradicts itself or lacks something, no weights.
    """
    path = folder / CONFIG
    values = read_json(path)
    if values.get("format") != "wordsight" or values.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {values.get('format')!r}, version {values.get('format_version')!r}; this wordsight "
            f"({wordsight.__version__}) reads 'wordsight', version {FORMAT_VERSION}: a newer one may have written it"
        )
    try:
        system = values.get("system", "clip")
        if system not in catalog.SYSTEMS:
            raise ValueError(f"system {system!r} is unknown; this wordsight has {', '.join(catalog.SYSTEMS)}")
        config: Any = config_from_dict(catalog.SYSTEMS[system][0], values["architecture"])
        preprocess = Preprocess.from_config(values["preprocess"]) if values.get("preprocess") else None
        options = values.get("tokenizer") or {}
        tokenizer = None
        if (folder / Path(options.get("file", "tokenizer.json")).name).is_file():
            tokenizer = _read_tokenizer(folder, options, config.text.context_length)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {'it lacks ' if isinstance(error, KeyError) else ''}{error}") from error
    activation = getattr(config, "activation", None)
    if values.get("activation", activation) != activation:
        raise CheckpointError(
            f"{path} contradicts itself: activation {values['activation']!r}, architecture.activation {activation!r}; "
            "set both to the one that the weights were trained with"
        )
    weights_file = weights_file or folder / WEIGHTS
    if not weights_file.is_file():
        raise CheckpointError(f"{folder} has {CONFIG} but no {WEIGHTS}")
    return Contents(
        source=folder,
        layout="wordsight",
        tensors=read_weights(weights_file).tensors,
        config=config,
        tokenizer=tokenizer,
        preprocess=preprocess,
        provenance=values.get("provenance"),
    )


def _read_tokenizer(folder: Path, options: Mapping[str, Any], context_length: int) -> TextTokenizer:
    """The tokenizer of a folder, of the type that its options say."""
    length = options.get("context_length", context_length)
    match options.get("type", "clip_bpe"):
        case "clip_bpe":
            return ClipTokenizer.from_file(folder, length, clean=options.get("clean"), pad_id=options.get("pad_id"))
        case "wordpiece":
            return WordPieceTokenizer.from_file(folder, length)
        case "sentencepiece":
            path = folder / Path(options["file"]).name
            ids = {name: options.get(name) for name in ("end_id", "pad_id")}
            return SentencePieceTokenizer.from_file(path, length, clean=options.get("clean"), **ids)
        case kind:
            raise ValueError(f"tokenizer type {kind!r} is unknown; known are clip_bpe, wordpiece and sentencepiece")


def write_folder(
    folder: Path, tensors: Mapping[str, Tensor], config: Any, tokenizer: TextTokenizer, preprocess: Preprocess
) -> None:
    """Write weights, the tokenizer's file and `wordsight.json` into an empty folder."""
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    tokenizer.save(folder)
    values = {
        "format": "wordsight",
        "format_version": FORMAT_VERSION,
        "system": catalog.system_name(config),
        "activation": getattr(config, "activation", None),
        "architecture": config_to_dict(config),
        "preprocess": preprocess.to_config(),
        "tokenizer": {"file": "tokenizer.json", **tokenizer.to_config()},
    }
    write_json(folder / CONFIG, values)
