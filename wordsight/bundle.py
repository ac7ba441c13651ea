"""Load, save, create and convert a model WITH its tokenizer, preprocessing and activation, so that nobody gets wrong numbers silently.

A wordsight folder holds `model.safetensors`, `tokenizer.json` and `wordsight.json` (architecture, activation, preprocessing, tokenizer,
provenance). The other layouts are in `interop`; docs/guides/checkpoints.md says what is read and written.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import wordsight
from wordsight import catalog
from wordsight.data.tokenize import ClipTokenizer
from wordsight.data.transform import Preprocess
from wordsight.interop import huggingface, local_files, open_clip, openai
from wordsight.interop.contents import Contents, read_json, write_json
from wordsight.interop.names import name_list
from wordsight.interop.safe_read import CheckpointError, Weights, read_weights
from wordsight.models.contrastive.clip import CLIP, CLIPConfig, config_from_dict, config_to_dict

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, WEIGHTS = "wordsight.json", "model.safetensors"
FORMAT_VERSION = 1
CONFIGS = {"wordsight": CONFIG, "open_clip": open_clip.CONFIG, "huggingface": huggingface.CONFIG}
# what a config says about training and not about the function that the weights compute
_TRAINING = ("patch_dropout", "stochastic_depth", "duplicates", "init_log_scale", "max_log_scale")


def load(path_or_name: str | Path, model: str | None = None) -> CLIP:
    """Load a model ready to use: weights in float32, evaluation mode, with its tokenizer and preprocessing.

    Reads wordsight, open_clip and transformers folders, run folders (the best model), OpenAI's TorchScript archives, state dicts and
    training checkpoints in .pt, .bin or .safetensors. No code of a file is run and nothing is downloaded.

    Args:
        path_or_name: a file, a folder, or a catalogue name whose weights lie in one of the known local places.
        model: the catalogue name of the architecture and activation, for files that don't say them; checked against those that do.

    Returns:
        The model. Weights stored as float16 or bfloat16 are widened, which is exact.

    Raises:
        FileNotFoundError: nothing there; says where it looked.
        ValueError: a missing, surplus or misshaped weight, a contradiction in activation, architecture, vocabulary or preprocessing, an
            unknown layout or a hostile file; names it and how to mend it.
    """
    contents = _read(path_or_name, model)
    for note in contents.notes:
        warnings.warn(note, stacklevel=2)
    return _build(contents)


def create(name_or_config: str | CLIPConfig, seed: int = 0) -> CLIP:
    """A fresh model with random weights, in evaluation mode, with preprocessing and, for CLIP's vocabulary, its tokenizer.

    Args:
        name_or_config: a catalogue name or a config. A config of another vocabulary gets no tokenizer: set `model.tokenizer`.
        seed: of the weights; the global random state is neither used nor changed.

    Raises:
        ValueError: an unknown name, with the nearest ones.
    """
    config = catalog.find(name_or_config).config if isinstance(name_or_config, str) else name_or_config
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs too
        model = CLIP(config)
    model.preprocessor = Preprocess(image_size_px=config.image.image_size_px)
    if config.text.vocab_size == open_clip.CLIP_VOCABULARY:
        model.tokenizer = ClipTokenizer.clip(config.text.context_length)
    model.provenance = {"source": f"created by wordsight.create, seed {seed}"}
    return model.eval()


def save(model: CLIP, folder: str | Path) -> Path:
    """Write a model as a wordsight folder, which `load` reads back bit by bit.

    Args:
        model: with its tokenizer and preprocessor; weights are written in the dtype that they have.
        folder: made if need be; an older wordsight folder there is replaced, other files in it stay.

    Returns:
        The folder.

    Raises:
        ValueError: no tokenizer or preprocessor, or one that does not fit the architecture.
    """
    if model.tokenizer is None or model.preprocessor is None:
        what = "tokenizer" if model.tokenizer is None else "preprocessor"
        raise ValueError(f"the model has no {what}: set model.{what} before saving, so that it can be used rightly later")
    contents = Contents(
        source=Path(folder),
        layout="wordsight",
        tensors={name: tensor.detach().cpu() for name, tensor in model.state_dict().items()},
        config=model.config,
        tokenizer=model.tokenizer,
        preprocess=model.preprocessor,
        provenance=getattr(model, "provenance", None),
    )
    _check_parts(contents, model.config)
    return _write(contents, Path(folder), "wordsight")


def convert(src: str | Path, dst: str | Path, to: str = "wordsight", *, model: str | None = None) -> Path:
    """Write a checkpoint in another layout, with everything that makes it load there; the weights keep their dtype, bit by bit.

    Args:
        src: whatever `load` takes.
        dst: the folder to write.
        to: "wordsight", "open_clip" (its `local-dir:` schema) or "huggingface" (transformers' CLIPModel and CLIPProcessor).
        model: as in `load`.

    Returns:
        The folder.

    Raises:
        ValueError: what `load` raises, an unknown layout, or an architecture that the other library does not have (a ResNet in
            transformers).
    """
    if to not in CONFIGS:
        raise ValueError(f"to must be one of {', '.join(CONFIGS)}, got {to!r}")
    contents = _read(src, model)
    for note in contents.notes:
        warnings.warn(note, stacklevel=2)
    return _write(contents, Path(dst), to)


# ------------------------------------------------------------------------------------------------------------------ reading


def _read(path_or_name: str | Path, model: str | None) -> Contents:
    """Read and check a checkpoint; of what it returns, config, tokenizer and preprocessing are never None."""
    path = Path(path_or_name).expanduser()
    expected = catalog.find(model).config if model is not None else None
    if not path.exists():
        if str(path_or_name) not in catalog.CATALOG:
            raise FileNotFoundError(f"{path_or_name}: no such file or folder, and no name of the catalogue{_name_hint(str(path_or_name))}")
        if model not in (None, str(path_or_name)):
            raise ValueError(f"{path_or_name!r} names a model and so does model={model!r}: leave one out, or give the file's path")
        path, expected = local_files.find(str(path_or_name)), catalog.find(str(path_or_name)).config
    contents = _read_folder(path) if path.is_dir() else _read_file(path, expected)
    return _completed(contents, expected)


def _name_hint(name: str) -> str:
    near = get_close_matches(name, catalog.CATALOG, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else " (`wordsight models` lists it)"


def _read_folder(folder: Path, weights_file: Path | None = None) -> Contents:
    layout = _layout(folder)
    if layout == "wordsight":
        return _read_own(folder, weights_file)
    if layout == "open_clip":
        return open_clip.read_folder(folder, weights_file)
    if layout == "huggingface":
        return huggingface.read_folder(folder, weights_file)
    for name in ("best", "last"):  # a run folder
        if (folder / name / CONFIG).is_file():
            return _read_own(folder / name)
    found = name_list(sorted(p.name for p in folder.iterdir())) or "nothing"
    raise CheckpointError(
        f"{folder} is no model folder: expected {', '.join(CONFIGS.values())} or a run's best/ or last/, found {found}. "
        "A file of weights alone is loaded by its own path"
    )


def _layout(folder: Path) -> str | None:
    """Whose folder this is. Some of the hub have open_clip's and transformers' files: whoever's weights are there counts."""
    has = {layout: (folder / name).is_file() for layout, name in CONFIGS.items()}
    if has["open_clip"] and has["huggingface"] and not any((folder / name).is_file() for name in open_clip.WEIGHTS):
        has["open_clip"] = read_json(folder / huggingface.CONFIG).get("model_type") != "clip"
    return next((layout for layout, there in has.items() if there), None)


def _read_own(folder: Path, weights_file: Path | None = None) -> Contents:
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


def _read_file(path: Path, expected: CLIPConfig | None) -> Contents:
    """A file of weights: with the config beside it, where it is one of a folder's own files; else by its shapes and `expected`."""
    own_names = {"wordsight": (WEIGHTS,), "open_clip": open_clip.WEIGHTS + open_clip.OTHER_WEIGHTS, "huggingface": huggingface.WEIGHTS}
    if path.name in own_names.get(_layout(path.parent) or "", ()):
        return replace(_read_folder(path.parent, path), source=path)
    weights = read_weights(path)
    tensors, config = weights.tensors, expected
    if openai.is_layout(tensors):
        activation = openai.activation_of(weights)
        if expected is not None and activation not in (None, expected.activation):
            raise _activation_error(path, f"the file itself ({_told_by(weights)})", str(activation), expected)
        if expected is None:
            config = _config_of_shapes(path, tensors, activation)
        tokenizer = preprocess = None
        if activation is not None and config is not None:  # made by OpenAI's code, which has one tokenizer and one preprocessing
            preprocess = Preprocess(image_size_px=config.image.image_size_px)
            if config.text.vocab_size == open_clip.CLIP_VOCABULARY:
                tokenizer = ClipTokenizer.clip(config.text.context_length)
        return Contents(
            source=path, layout="openai", tensors=openai.to_ours(tensors), config=config, tokenizer=tokenizer, preprocess=preprocess, notes=weights.notes
        )
    if huggingface.is_layout(tensors) or any(name.startswith("image_tower.") for name in tensors):
        layout = "huggingface" if huggingface.is_layout(tensors) else "wordsight"
        if expected is None:
            raise CheckpointError(
                f"{path} holds weights alone, without the {CONFIGS[layout]} that belongs to them: load its folder, or pass model=NAME"
            )
        tensors = huggingface.to_ours(tensors) if layout == "huggingface" else tensors
        return Contents(source=path, layout=layout, tensors=tensors, config=config, tokenizer=None, preprocess=None, notes=weights.notes)
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
        mend = f"pass model={names[0]!r} (QuickGELU) or model={names[-1]!r} (GELU)" if names else "load it from a folder with its config"
        raise CheckpointError(
            f"{path} does not say its activation, and shapes can't tell it: {mend}. OpenAI's weights are QuickGELU, most of open_clip's GELU"
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
    if tokenizer is None:
        if config.text.vocab_size != open_clip.CLIP_VOCABULARY:
            raise CheckpointError(
                f"{contents.source} has no tokenizer and {config.text.vocab_size} tokens, CLIP's has {open_clip.CLIP_VOCABULARY}: "
                "put the tokenizer.json that it was trained with into its folder"
            )
        tokenizer = ClipTokenizer.clip(config.text.context_length)
        notes.append(f"{contents.source} has no tokenizer files: CLIP's tokenizer is used")
    if preprocess is None:
        preprocess = Preprocess(image_size_px=config.image.image_size_px)
        notes.append(f"{contents.source} has no preprocessing files: CLIP's is used (mean {preprocess.mean}, bicubic, shortest side)")
    contents = replace(contents, tokenizer=tokenizer, preprocess=preprocess, notes=tuple(notes))
    _check_parts(contents, config)
    return contents


def _activation_error(source: Path, who: str, activation: str, expected: CLIPConfig) -> CheckpointError:
    right = _names_of(replace(expected, activation=activation))  # type: ignore[arg-type]
    named = next((n for n in right if catalog.CATALOG[n].config.activation == activation), None)
    mend = f"pass model={named!r}, or leave model= out" if named else "leave model= out"
    return CheckpointError(
        f"{source}: activation {activation} says {who}, {expected.activation} says the model= that was named. With the wrong one every output "
        f"is wrong: {mend}"
    )


def _differences(config: CLIPConfig, other: CLIPConfig) -> list[str]:
    """What makes two architectures different, apart from the activation: 'image.width 768, not 1024'."""

    def flat(config: CLIPConfig) -> dict[str, Any]:
        values = {f"image.{k}": v for k, v in asdict(config.image).items()} | {f"text.{k}": v for k, v in asdict(config.text).items()}
        values |= {"embed_dim": config.embed_dim, "image tower": type(config.image).__name__.removesuffix("Config")}
        return {k: v for k, v in values.items() if k.rpartition(".")[2] not in _TRAINING}

    a, b = flat(config), flat(other)
    if a["image tower"] != b["image tower"]:
        return [f"image tower {a['image tower']}, not {b['image tower']}"]
    return [f"{k} {a[k]}, not {b[k]}" for k in a if a[k] != b[k]]


# ----------------------------------------------------------------------------------------------------------------- checking


def _check_weights(contents: Contents, config: CLIPConfig) -> None:
    """Every weight of the architecture is there, in its shape, and none more."""
    with torch.device("meta"):
        wanted = {name: tensor.shape for name, tensor in CLIP(config).state_dict().items()}
    found = {name: tensor.shape for name, tensor in contents.tensors.items()}
    missing = [name for name in wanted if name not in found]
    surplus = [name for name in found if name not in wanted]
    misshaped = [f"{n} is {tuple(found[n])}, must be {tuple(wanted[n])}" for n in wanted if n in found and found[n] != wanted[n]]
    wrong = [n for n, t in contents.tensors.items() if n in wanted and not t.is_floating_point() and not n.endswith("num_batches_tracked")]
    problems = [f"missing: {name_list(missing)}"] if missing else []
    problems += [f"surplus: {name_list(surplus)}"] if surplus else []
    problems += [f"misshaped: {'; '.join(misshaped[:5])}"] if misshaped else []
    problems += [f"not floating point: {name_list(wrong)}"] if wrong else []
    if problems:
        raise CheckpointError(f"{contents.source} does not fit its architecture ({_summary(config)}). {'. '.join(problems)}. {_mend(contents, found, missing)}")


def _summary(config: CLIPConfig) -> str:
    names = [n for n in _names_of(config) if catalog.CATALOG[n].config.activation == config.activation]
    return names[0] if names else f"{type(config.image).__name__.removesuffix('Config')} of {config.image.image_size_px} px, width {config.image.width}"


def _mend(contents: Contents, found: Mapping[str, torch.Size], missing: list[str]) -> str:
    """One sentence on how to get a file whose weights don't fit to load."""
    if contents.layout == "openai" and not any("trunk" in name for name in found):
        try:
            shapes = openai.shapes_to_open_clip_config(openai.to_theirs({n: t for n, t in contents.tensors.items() if "tower" in n or n == "log_scale"}))
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
            "If only the image size differs: load it at its own, then make a model of the other size and carry the positions over with "
            "wordsight.nn.position.resize_positions, which is never done unasked"
        )
    return "Either the file is damaged or of another model, or model= (or its config) names the wrong architecture"


def _check_parts(contents: Contents, config: CLIPConfig) -> None:
    """Tokenizer and preprocessing fit the architecture."""
    tokenizer, preprocess = contents.tokenizer, contents.preprocess
    assert tokenizer is not None
    assert preprocess is not None
    if tokenizer.vocab_size != config.text.vocab_size:
        raise CheckpointError(
            f"{contents.source}: the tokenizer has {tokenizer.vocab_size} tokens, the text tower {config.text.vocab_size}: use the tokenizer that the "
            "weights were trained with"
        )
    if tokenizer.context_length != config.text.context_length:
        raise CheckpointError(
            f"{contents.source}: the tokenizer makes {tokenizer.context_length} tokens a text, the text tower takes {config.text.context_length}: make "
            f"the tokenizer with context_length={config.text.context_length}"
        )
    if preprocess.image_size_px != config.image.image_size_px:
        raise CheckpointError(
            f"{contents.source}: preprocessing makes pictures of {preprocess.image_size_px} px, the image tower takes {config.image.image_size_px} px: "
            "make both the same"
        )


def _build(contents: Contents) -> CLIP:
    """The model of checked contents: weights copied to float32, no random number drawn."""
    assert contents.config is not None
    with torch.device("meta"):
        model = CLIP(contents.config)
    state = {}
    for name, tensor in contents.tensors.items():  # copied: what was read may be a map of the file
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        state[name] = torch.empty(tensor.shape, dtype=dtype).copy_(tensor)
        if tensor.dtype == torch.float64:
            warnings.warn(f"{contents.source}: {name} is float64 and was rounded to float32", stacklevel=3)
    model.load_state_dict(state, assign=True)
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers())), "a buffer that is no part of the state dict"
    model.tokenizer, model.preprocessor = contents.tokenizer, contents.preprocess
    model.provenance = {"source": str(contents.source), "layout": contents.layout, **(contents.provenance or {})}
    return model.eval()


# ------------------------------------------------------------------------------------------------------------------ writing


def _write(contents: Contents, folder: Path, to: str) -> Path:
    config, tokenizer, preprocess = contents.config, contents.tokenizer, contents.preprocess
    assert config is not None
    assert tokenizer is not None
    assert preprocess is not None
    other = _layout(folder) if folder.is_dir() else None
    if other not in (None, to):
        raise ValueError(f"{folder} holds a model in the layout of {other} ({CONFIGS[other]}): choose another folder, or remove it first")
    write = {"open_clip": open_clip.write_folder, "huggingface": huggingface.write_folder, "wordsight": _write_own}[to]
    with _staged(folder, CONFIGS[to]) as staging:
        write(staging, contents.tensors, config, tokenizer, preprocess)
        if to == "wordsight":
            provenance = dict(contents.provenance or {"source": str(contents.source), "layout": contents.layout})
            values = read_json(staging / CONFIG)
            write_json(staging / CONFIG, values | {"provenance": provenance | {"wordsight": wordsight.__version__, "torch": torch.__version__}})
    return folder


def _write_own(folder: Path, tensors: Mapping[str, Tensor], config: CLIPConfig, tokenizer: ClipTokenizer, preprocess: Preprocess) -> None:
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


@contextmanager
def _staged(folder: Path, marker: str) -> Iterator[Path]:
    """A temporary folder beside `folder` whose files get there together, on the disk before they get their names.

    Without an older `folder` that is one rename. With one, its `marker` (the config, without which it is no model folder) goes first and
    comes back last, so that a crash in between leaves a folder that can't be mistaken for a model, never a mixture of two.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        yield staging
        staging.chmod(0o777 & ~_umask())
        for path in (*staging.iterdir(), staging):
            _fsync(path)
        if not folder.exists():
            staging.rename(folder)
        else:
            (folder / marker).unlink(missing_ok=True)
            for path in sorted(staging.iterdir(), key=lambda p: p.name == marker):
                os.replace(path, folder / path.name)
            _fsync(folder)
        _fsync(folder.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _fsync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows can't open a folder
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
