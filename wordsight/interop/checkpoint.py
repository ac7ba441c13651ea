"""From a path or a name to checked contents: finds the layout, reads it, and refuses whatever does not fit together.

Nothing is guessed: what a file does not say must be named (`model=`), and what it says must agree with what was named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from wordsight import catalog
from wordsight.data.tokenize import CLIP_VOCABULARY, ClipTokenizer
from wordsight.data.transform import Preprocess
from wordsight.interop import align, big_vision, huggingface, local_files, open_clip, openai, own, siglip, siglip_open_clip
from wordsight.interop.contents import Contents, read_json
from wordsight.interop.names import name_list
from wordsight.interop.safe_read import CheckpointError, Weights, read_weights
from wordsight.models.contrastive.clip import CLIPConfig
from wordsight.nn.blank import blank

if TYPE_CHECKING:
    from torch import Tensor

CONFIGS = {"wordsight": own.CONFIG, "open_clip": open_clip.CONFIG, "huggingface": huggingface.CONFIG}
# transformers' model_type, which is our system's name too -> who reads and writes such folders
TRANSFORMERS: dict[str, Any] = {"clip": huggingface, "align": align, "siglip": siglip}
# what a config says about training and not about the function that the weights compute
_TRAINING: tuple[str, ...] = ("patch_dropout", "stochastic_depth", "duplicates", "init_log_scale", "max_log_scale", "init_bias")
_TRAINING += (
    "label_smoothing",
    "init_temperature",
    "min_temperature",
    "drop_connect",
    "norm_momentum",
    "dropout",
    "head_dropout",
)
_TRAINING += ("lock_image", "lock_text", "cache_rows")


def read(path_or_name: str | Path, model: str | None) -> Contents:
    """Read and check a checkpoint.

    Args:
        path_or_name: a file, a folder, or a catalogue name.
        model: the catalogue name of the architecture and activation.

    Returns:
        Contents in which config, tokenizer and preprocessing are never None.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: whatever does not fit, named, with its mend.
    """
    path = Path(path_or_name).expanduser()
    expected = catalog.find(model).config if model is not None else None
    if not path.exists():
        if str(path_or_name) not in catalog.CATALOG:
            raise FileNotFoundError(
                f"{path_or_name}: no such file or folder, and no name of the catalogue{_name_hint(str(path_or_name))}"
            )
        if model not in (None, str(path_or_name)):
            raise ValueError(
                f"{path_or_name!r} names a model and so does model={model!r}: leave one out, or give the file's path"
            )
        path, expected = local_files.find(str(path_or_name)), catalog.find(str(path_or_name)).config
    contents = _read_folder(path) if path.is_dir() else _read_file(path, expected)
    return _completed(contents, expected)


def _name_hint(name: str) -> str:
    near = get_close_matches(name, catalog.CATALOG, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else " (`wordsight models` lists it)"


def _read_folder(folder: Path, weights_file: Path | None = None) -> Contents:
    layout = layout_of(folder)
    if layout == "wordsight":
        return own.read_folder(folder, weights_file)
    if layout == "open_clip":
        read_theirs = siglip_open_clip.read_folder if siglip_open_clip.is_folder(folder) else open_clip.read_folder
        return read_theirs(folder, weights_file)
    if layout == "huggingface":
        kind = read_json(folder / huggingface.CONFIG).get("model_type")
        if kind not in TRANSFORMERS:
            raise CheckpointError(
                f"{folder / huggingface.CONFIG} describes a {kind!r} model; known are folders of {', '.join(TRANSFORMERS)}"
            )
        contents: Contents = TRANSFORMERS[kind].read_folder(folder, weights_file)
        return contents
    for name in ("best", "last"):  # a run folder
        if (folder / name / own.CONFIG).is_file():
            return own.read_folder(folder / name)
    found = name_list(sorted(p.name for p in folder.iterdir())) or "nothing"
    raise CheckpointError(
        f"{folder} is no model folder: expected {', '.join(CONFIGS.values())} or a run's best/ or last/, found {found}. "
        "A file of weights alone is loaded by its own path"
    )


def layout_of(folder: Path) -> str | None:
    """Whose folder this is. Some of the hub have open_clip's and transformers' files: whoever's weights are there counts."""
    has = {layout: (folder / name).is_file() for layout, name in CONFIGS.items()}
    if has["open_clip"] and has["huggingface"] and not any((folder / name).is_file() for name in open_clip.WEIGHTS):
        has["open_clip"] = read_json(folder / huggingface.CONFIG).get("model_type") not in TRANSFORMERS
    return next((layout for layout, there in has.items() if there), None)


def _read_file(path: Path, expected: CLIPConfig | None) -> Contents:
    """A file of weights: with the config beside it, if it is one of a folder's own files; else by its shapes and `expected`."""
    own_names = {
        "wordsight": (own.WEIGHTS,),
        "open_clip": open_clip.WEIGHTS + open_clip.OTHER_WEIGHTS,
        "huggingface": huggingface.WEIGHTS,
    }
    if path.name in own_names.get(layout_of(path.parent) or "", ()):
        return replace(_read_folder(path.parent, path), source=path)
    if path.suffix == big_vision.SUFFIX:
        return big_vision.read_file(path, expected)  # type: ignore[arg-type]  # whatever system was named
    weights = read_weights(path)
    tensors, config = weights.tensors, expected
    if siglip_open_clip.is_layout(tensors):
        if expected is None:
            raise CheckpointError(f"{path} holds a SigLIP of open_clip without its {open_clip.CONFIG}: pass model=NAME")
        return Contents(
            source=path,
            layout="open_clip",
            tensors=siglip_open_clip.to_ours(tensors),
            config=config,
            tokenizer=siglip.read_tokenizer(path.parent, expected.text.context_length, "open_clip"),
            preprocess=None,
            notes=weights.notes,
        )
    if openai.is_layout(tensors):
        activation = openai.activation_of(weights)
        if expected is not None and activation not in (None, expected.activation):
            raise _activation_error(path, f"the file itself ({_told_by(weights)})", str(activation), expected)
        if expected is None:
            config = _config_of_shapes(path, tensors, activation)
        tokenizer = preprocess = None
        if activation is not None and config is not None:  # made by OpenAI's code, which has one tokenizer and one preprocessing
            preprocess = Preprocess(image_size_px=config.image.image_size_px)
            if config.text.vocab_size == CLIP_VOCABULARY:
                tokenizer = ClipTokenizer.clip(config.text.context_length)
        return Contents(
            source=path,
            layout="openai",
            tensors=openai.to_ours(tensors),
            config=config,
            tokenizer=tokenizer,
            preprocess=preprocess,
            notes=weights.notes,
        )
    if huggingface.is_layout(tensors) or any(name.startswith("image_tower.") for name in tensors):
        layout = "huggingface" if huggingface.is_layout(tensors) else "wordsight"
        if expected is None:
            raise CheckpointError(
                f"{path} holds weights alone, without their {CONFIGS[layout]}: load the whole folder, or pass model=NAME"
            )
        if layout == "huggingface":
            theirs = next((known for known in (align, siglip) if known.is_layout(tensors)), huggingface)
            tensors = theirs.to_ours(tensors)
        return Contents(
            source=path, layout=layout, tensors=tensors, config=config, tokenizer=None, preprocess=None, notes=weights.notes
        )
    raise CheckpointError(f"{path} holds no CLIP that is known here: its names are like {name_list(sorted(tensors), 3)}")


def _told_by(weights: Weights) -> str:
    return "its classes" if weights.class_names else f"OpenAI's extra keys {', '.join(openai.EXTRA_KEYS)}"


def _config_of_shapes(path: Path, tensors: Mapping[str, Tensor], activation: str | None) -> CLIPConfig:
    """The architecture that the shapes tell, where the file tells its activation too."""
    try:
        config = open_clip.config_from_model_cfg(openai.shapes_to_open_clip_config(tensors), path)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if activation is None:
        names = _names_of(config)
        mend = (
            f"pass model={names[0]!r} (QuickGELU) or model={names[-1]!r} (GELU)"
            if names
            else "load it from a folder with its config"
        )
        raise CheckpointError(
            f"{path} does not say its activation, and shapes can't tell it: {mend}. OpenAI's weights are QuickGELU, "
            "most of open_clip's own GELU"
        )
    return replace(config, activation=activation)  # type: ignore[arg-type]


def _names_of(config: CLIPConfig) -> list[str]:
    """The catalogue's names for an architecture, QuickGELU's first."""
    return [name for name, entry in catalog.CATALOG.items() if not _differences(entry.config, config)]


def _completed(contents: Contents, expected: CLIPConfig | None) -> Contents:
    """Check what was read against `expected` and against itself; fill in CLIP's tokenizer and preprocessing, saying so."""
    config = contents.config
    assert config is not None
    if expected is not None and config is not expected:
        if config.activation != expected.activation:
            raise _activation_error(contents.source, "its config", config.activation, expected)
        if differences := _differences(config, expected):
            raise CheckpointError(
                f"{contents.source} is not the model that was named: {'; '.join(differences)}. Leave model= out, or name "
                f"{' or '.join(_names_of(config)) or 'none: the catalogue does not have it'}"
            )
    _check_weights(contents, config)
    notes = list(contents.notes)
    tokenizer, preprocess = contents.tokenizer, contents.preprocess
    system = catalog.system_class(config)
    if tokenizer is None:
        tokenizer = system.default_tokenizer(config)
        if tokenizer is None:
            raise CheckpointError(
                f"{contents.source} has no tokenizer and {config.text.vocab_size} tokens, CLIP's has "
                f"{CLIP_VOCABULARY}: put the tokenizer.json that it was trained with into its folder"
            )
        notes.append(f"{contents.source} has no tokenizer files: {system.__name__}'s tokenizer is used")
    if preprocess is None:
        preprocess = system.default_preprocessor(config)
        notes.append(
            f"{contents.source} has no preprocessing files: {system.__name__}'s is used (mean {preprocess.mean}, "
            f"{preprocess.interpolation}, {'shortest side' if preprocess.resize == 'shortest' else preprocess.resize})"
        )
    contents = replace(contents, tokenizer=tokenizer, preprocess=preprocess, notes=tuple(notes))
    check_parts(contents, config)
    return contents


def _activation_error(source: Path, who: str, activation: str, expected: CLIPConfig) -> CheckpointError:
    right = _names_of(replace(expected, activation=activation))  # type: ignore[arg-type]
    named = next((n for n in right if catalog.CATALOG[n].config.activation == activation), None)
    mend = f"pass model={named!r}, or leave model= out" if named else "leave model= out"
    return CheckpointError(
        f"{source}: activation {activation} says {who}, {expected.activation} says the model= that was named. With the wrong "
        f"one every output is wrong: {mend}"
    )


def _differences(config: CLIPConfig, other: CLIPConfig) -> list[str]:
    """What makes two architectures different, apart from the activation: 'image.width 768, not 1024'."""

    if type(config) is not type(other):
        return [f"a {catalog.system_name(config)} model, not {catalog.system_name(other)}"]

    def flat(config: CLIPConfig) -> dict[str, Any]:
        values = {f"image.{k}": v for k, v in asdict(config.image).items()} | {
            f"text.{k}": v for k, v in asdict(config.text).items()
        }
        rest = {k: v for k, v in vars(config).items() if k not in ("image", "text", "activation")}
        towers = {f"{what} tower": type(getattr(config, what)).__name__.removesuffix("Config") for what in ("image", "text")}
        values |= rest | towers
        return {k: v for k, v in values.items() if k.rpartition(".")[2] not in _TRAINING}

    a, b = flat(config), flat(other)
    if towers := [f"{what} {a[what]}, not {b[what]}" for what in ("image tower", "text tower") if a[what] != b[what]]:
        return towers
    return [f"{k} {a[k]}, not {b[k]}" for k in a if a[k] != b[k]]


# ----------------------------------------------------------------------------------------------------------------- checking


def _check_weights(contents: Contents, config: CLIPConfig) -> None:
    """Every weight of the architecture is there, in its shape, and none more."""
    with blank():
        wanted = {name: tensor.shape for name, tensor in catalog.system_class(config)(config).state_dict().items()}
    found = {name: tensor.shape for name, tensor in contents.tensors.items()}
    missing = [name for name in wanted if name not in found]
    surplus = [name for name in found if name not in wanted]
    misshaped = [f"{n} is {tuple(found[n])}, must be {tuple(wanted[n])}" for n in wanted if n in found and found[n] != wanted[n]]
    wrong = [
        n
        for n, t in contents.tensors.items()
        if n in wanted and not t.is_floating_point() and not n.endswith("num_batches_tracked")
    ]
    problems = [f"missing: {name_list(missing)}"] if missing else []
    problems += [f"surplus: {name_list(surplus)}"] if surplus else []
    problems += [f"misshaped: {'; '.join(misshaped[:5])}"] if misshaped else []
    problems += [f"not floating point: {name_list(wrong)}"] if wrong else []
    if problems:
        raise CheckpointError(
            f"{contents.source} does not fit its architecture ({_summary(config)}). {'. '.join(problems)}. "
            f"{_mend(contents, found, missing)}"
        )


def _summary(config: CLIPConfig) -> str:
    names = [n for n in _names_of(config) if catalog.CATALOG[n].config.activation == config.activation]
    return names[0] if names else f"{type(config.image).__name__.removesuffix('Config')} of {config.image.image_size_px} px"


def _mend(contents: Contents, found: Mapping[str, torch.Size], missing: list[str]) -> str:
    """One sentence on how to get a file whose weights don't fit to load."""
    if contents.layout == "openai" and not any("trunk" in name for name in found):
        try:
            shapes = openai.shapes_to_open_clip_config(
                openai.to_theirs({n: t for n, t in contents.tensors.items() if "tower" in n or n == "log_scale"})
            )
            names = _names_of(open_clip.config_from_model_cfg(shapes, contents.source))
        except (CheckpointError, ValueError, KeyError):
            names = []
        if names and not missing:
            return f"Its shapes are those of {' or '.join(names)}: pass the one that it is as model="
    if any("trunk" in name for name in found):
        return "It is a timm image tower inside of open_clip's model, which wordsight does not have"
    if any(name.endswith("logit_bias") for name in found):
        return "With a logit_bias it is a SigLIP-like model, not a CLIP"
    if any(name.endswith("position_embedding") and "image" in name for name in missing) or not missing:
        return (
            "If only the image size differs: load it at its own, then make a model of the other size and carry the positions "
            "over with wordsight.nn.position.resize_positions, which is never done unasked"
        )
    return "Either the file is damaged or of another model, or model= (or its config) names the wrong architecture"


def check_parts(contents: Contents, config: CLIPConfig) -> None:
    """Tokenizer and preprocessing fit the architecture."""
    tokenizer, preprocess = contents.tokenizer, contents.preprocess
    assert tokenizer is not None
    assert preprocess is not None
    if tokenizer.vocab_size != config.text.vocab_size:
        raise CheckpointError(
            f"{contents.source}: the tokenizer has {tokenizer.vocab_size} tokens, the text tower {config.text.vocab_size}: use "
            "the tokenizer that the weights were trained with"
        )
    if tokenizer.context_length != config.text.context_length:
        raise CheckpointError(
            f"{contents.source}: the tokenizer makes {tokenizer.context_length} tokens a text, the text tower takes "
            f"{config.text.context_length}: make the tokenizer with context_length={config.text.context_length}"
        )
    pad_id = getattr(config.text, "pad_id", tokenizer.pad_id)
    if tokenizer.pad_id != pad_id:
        raise CheckpointError(
            f"{contents.source}: the tokenizer pads with {tokenizer.pad_id}, the text tower leaves out {pad_id}: use the "
            "tokenizer that the weights were trained with"
        )
    if preprocess.image_size_px != config.image.image_size_px:
        raise CheckpointError(
            f"{contents.source}: preprocessing makes pictures of {preprocess.image_size_px} px, the image tower takes "
            f"{config.image.image_size_px} px: make both the same"
        )
