"""wordsight's own folders: `model.safetensors`, `tokenizer.json` and `wordsight.json`, which says everything else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import wordsight
from wordsight.data.tokenize import ClipTokenizer
from wordsight.data.transform import Preprocess
from wordsight.interop.contents import Contents, read_json, write_json
from wordsight.interop.safe_read import CheckpointError, read_weights
from wordsight.models.contrastive.clip import CLIPConfig, config_from_dict, config_to_dict

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
        config = config_from_dict(values["architecture"])
        preprocess = Preprocess.from_config(values["preprocess"]) if values.get("preprocess") else None
        options = values.get("tokenizer") or {}
        tokenizer = None
        if (folder / "tokenizer.json").is_file():
            context_length = options.get("context_length", config.text.context_length)
            tokenizer = ClipTokenizer.from_file(folder, context_length, clean=options.get("clean"), pad_id=options.get("pad_id"))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {'it lacks ' if isinstance(error, KeyError) else ''}{error}") from error
    if values.get("activation", config.activation) != config.activation:
        raise CheckpointError(
            f"{path} contradicts itself: activation {values['activation']!r}, architecture.activation {config.activation!r}; "
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


def write_folder(
    folder: Path, tensors: Mapping[str, Tensor], config: CLIPConfig, tokenizer: ClipTokenizer, preprocess: Preprocess
) -> None:
    """Write weights, `tokenizer.json` and `wordsight.json` into an empty folder."""
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    tokenizer.save(folder)
    values = {
        "format": "wordsight",
        "format_version": FORMAT_VERSION,
        "system": "clip",
        "activation": config.activation,
        "architecture": config_to_dict(config),
        "preprocess": preprocess.to_config(),
        "tokenizer": {"file": "tokenizer.json", **tokenizer.to_config()},
    }
    write_json(folder / CONFIG, values)
