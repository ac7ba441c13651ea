"""Load, save, create and convert a model WITH its tokenizer, preprocessing and activation: no wrong numbers silently.

A wordsight folder holds `model.safetensors`, `tokenizer.json` and `wordsight.json` (architecture, activation, preprocessing,
tokenizer, provenance). The layouts are in `interop`; docs/guides/checkpoints.md says what is read and written.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import wordsight
from wordsight import catalog
from wordsight.interop import open_clip, own, siglip_open_clip
from wordsight.interop.checkpoint import CONFIGS, TRANSFORMERS, check_parts, layout_of, read
from wordsight.interop.contents import Contents, read_json, write_json
from wordsight.interop.names import name_list
from wordsight.interop.towers import Tower, read_tower
from wordsight.nn.blank import blank
from wordsight.nn.vit import VisionTransformer


def load(path_or_name: str | Path, model: str | None = None) -> Any:
    """Load a model ready to use: weights in float32, evaluation mode, with its tokenizer and preprocessing.

    Reads wordsight, open_clip and transformers folders, run folders (the best model), OpenAI's TorchScript archives, state
    dicts and training checkpoints in .pt, .bin or .safetensors. No code of a file is run and nothing is downloaded.

    Args:
        path_or_name: a file, a folder, or a catalogue name whose weights lie in one of the known local places.
        model: the catalogue name of architecture and activation, for files that don't say them; checked against those that do.

    Returns:
        The model. Weights stored as float16 or bfloat16 are widened, which is exact.

    Raises:
        FileNotFoundError: nothing there; says where it looked.
        ValueError: a missing, surplus or misshaped weight, a contradiction in activation, architecture, vocabulary or
            preprocessing, an unknown layout or a hostile file; names it and how to mend it.
    """
    contents = read(path_or_name, model)
    for note in contents.notes:
        warnings.warn(note, stacklevel=2)
    return _build(contents)


def create(name_or_config: Any, seed: int = 0) -> Any:
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
        system = catalog.system_class(config)
        model = system(config)
    model.preprocessor, model.tokenizer = system.default_preprocessor(config), system.default_tokenizer(config)
    model.provenance = {"source": f"created by wordsight.create, seed {seed}"}
    return model.eval()


# of a tower's config: what it may have otherwise than the published one and still use its weights
_OWN_CHOICE = (
    "image_size_px",
    "project",
    "pool",
    "context_length",
    "dropout",
    "drop_connect",
    "norm_momentum",
    "stochastic_depth",
)


def load_towers(model: Any, *, image: str | Path | None = None, text: str | Path | None = None) -> None:
    """Put published weights into a model's towers, with the preprocessing and tokenizer that go with them.

    A LiT's trunks get them, other systems' towers; heads and projections stay as they are. A convolutional tower may be of
    another image size than the published one (its preprocessing then is too), a text tower of a shorter context.

    Args:
        model: a system with `image_tower` and `text_tower`.
        image, text: a published tower's name (`interop.towers.PUBLISHED`), file or folder; None leaves that tower alone.

    Raises:
        FileNotFoundError: nothing there; says what to install.
        ValueError: the tower is another than the model's, and what differs.
    """
    for side, name in (("image", image), ("text", text)):
        if name is None:
            continue
        tower = read_tower(name)
        _put_tower(getattr(model, f"{side}_tower"), getattr(model.config, side), tower, side, model.config.activation)
        if tower.preprocess is not None:
            model.preprocessor = replace(tower.preprocess, image_size_px=model.config.image.image_size_px)
        if tower.tokenizer is not None:
            model.tokenizer = tower.tokenizer.with_options(context_length=model.config.text.context_length)
        model.provenance = {**(model.provenance or {}), f"{side}_tower": str(name)}


def _put_tower(module: nn.Module, config: Any, tower: Tower, side: str, activation: str) -> None:
    trunk = getattr(module, "trunk", module)
    theirs = tower.config
    differing = [f"it is {type(theirs).__name__}, the model's {type(config).__name__}"]
    if type(config) is type(theirs):
        names = [f.name for f in fields(theirs) if f.name not in _OWN_CHOICE]
        differing = [
            f"{side}.{n}={getattr(theirs, n)!r}, not {getattr(config, n)!r}"
            for n in names
            if getattr(theirs, n) != getattr(config, n)
        ]
        if isinstance(trunk, VisionTransformer) and tower.activation != activation:
            differing.append(f"activation={tower.activation!r}, not {activation!r}")
    if differing:
        raise ValueError(
            f"{tower.source} is another {side} tower than the model's: {', '.join(differing)}. Set the model's to that"
        )
    wanted = trunk.state_dict()
    state = dict(tower.tensors)
    if "position_embedding" in wanted and side == "text":  # later places are not used with a shorter context
        state["position_embedding"] = state["position_embedding"][: len(wanted["position_embedding"])]
    missing = [n for n in wanted if n not in state and not n.startswith(("projection", "pooler"))]
    surplus = [n for n in state if n not in wanted and not n.startswith("pooler")]
    misshaped = [
        f"{n} is {tuple(state[n].shape)}, must be {tuple(t.shape)}"
        for n, t in wanted.items()
        if n in state and state[n].shape != t.shape
    ]
    if missing or surplus or misshaped:
        raise ValueError(f"{tower.source} does not fit the model's {side} tower: {name_list([*missing, *surplus, *misshaped])}")
    if "pooler.weight" in wanted and "pooler.weight" not in state:
        raise ValueError(f"{tower.source} has no pooler: set {side}.pool=cls or {side}.pool=mean")
    with torch.no_grad():
        for name, tensor in state.items():
            if name in wanted:
                wanted[name].copy_(tensor)


def save(model: Any, folder: str | Path) -> Path:
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
        provenance=model.provenance,
    )
    check_parts(contents, model.config)
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
    contents = read(src, model)
    for note in contents.notes:
        warnings.warn(note, stacklevel=2)
    return _write(contents, Path(dst), to)


def _build(contents: Contents) -> Any:
    """The model of checked contents, which are used up: weights copied to float32, no random number drawn."""
    assert contents.config is not None
    with blank():
        model = catalog.system_class(contents.config)(contents.config)
    state = {}
    for name in list(contents.tensors):  # copied, because what was read may be a map of the file; one at a time, to hold it once
        tensor = contents.tensors.pop(name)
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        state[name] = torch.empty(tensor.shape, dtype=dtype).copy_(tensor)
        if tensor.dtype == torch.float64:
            warnings.warn(f"{contents.source}: {name} is float64 and was rounded to float32", stacklevel=3)
    model.load_state_dict(state, assign=True)
    model.tokenizer, model.preprocessor = contents.tokenizer, contents.preprocess
    model.provenance = {"source": str(contents.source), "layout": contents.layout, **(contents.provenance or {})}
    return model.eval()


# ------------------------------------------------------------------------------------------------------------------ writing


def _write(contents: Contents, folder: Path, to: str) -> Path:
    config, tokenizer, preprocess = contents.config, contents.tokenizer, contents.preprocess
    assert config is not None
    assert tokenizer is not None
    assert preprocess is not None
    other = layout_of(folder) if folder.is_dir() else None
    if other not in (None, to):
        raise ValueError(
            f"{folder} holds a model in the layout of {other} ({CONFIGS[other]}): choose another folder, or remove it first"
        )
    write = _writer(to, config)
    with _staged(folder, CONFIGS[to]) as staging:
        write(staging, contents.tensors, config, tokenizer, preprocess)
        if to == "wordsight":
            provenance = dict(contents.provenance or {"source": str(contents.source), "layout": contents.layout})
            values = read_json(staging / own.CONFIG)
            write_json(
                staging / own.CONFIG,
                values | {"provenance": provenance | {"wordsight": wordsight.__version__, "torch": torch.__version__}},
            )
    return folder


def _writer(to: str, config: Any) -> Any:
    """What writes a folder of that layout for that system."""
    system = catalog.system_name(config)
    if to == "wordsight":
        return own.write_folder
    if to == "huggingface" and system in TRANSFORMERS:
        return TRANSFORMERS[system].write_folder
    if to == "open_clip" and system == "clip":
        return open_clip.write_folder
    if to == "open_clip" and system == "siglip":
        return siglip_open_clip.write_folder
    raise ValueError(f"{to} has no model like {catalog.system_class(config).__name__}: write it with to='wordsight'")


@contextmanager
def _staged(folder: Path, marker: str) -> Iterator[Path]:
    """A temporary folder beside `folder` whose files get there together, on the disk before they get their names.

    Without an older `folder` that is one rename. With one, its `marker` (the config, without which it is no model folder) goes
    first and comes back last: a crash in between leaves a folder that can't be mistaken for a model, never a mixture of two.
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
