"""What a training run is, as a frozen dataclass: model, data, optimisation, and how `--set key=value` changes one of them."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import json
import math
import pkgutil
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from wordsight.data.augment import Augment
from wordsight.data.order import Sampling, Shuffle
from wordsight.data.remote import RemoteConfig
from wordsight.data.sources import DataSource

# these change neither the numbers nor their order, so a run may go on with other values
FREE_ON_RESUME = (
    "data.num_workers",
    "data.remote.",
    "checkpoint_every_steps",
    "checkpoint_every_s",
    "keep_checkpoints",
    "parallel",  # like the number of processes: the same but for rounding
)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the pairs come from and how a row becomes pixels and tokens.

    Attributes:
        sources: paths, globs, brace expansions, `sample:SPLIT`, or DataSource (which has a weight, a table's columns, a root).
        sampling: "epoch" goes through the sources in passes, "replacement" draws every row anew.
        num_samples: samples that one epoch counts; None: the size of the sources.
        shuffle: the order within a pass.
        crop_scale: the least and greatest share of a picture that the random crop keeps; None: the model's own preprocessing,
        without a crop.
        flip: probability of a mirrored picture.
        augment: further changes of the picture on the device; None: none.
        first_caption_prob: how often the first of several captions is taken; None: all alike.
        max_bad_share: more unreadable samples than this share stop the run.
        num_workers: processes that read and decode, for each training process.
        cache_decoded: keep decoded pictures in memory (small data sets).
        captions_per_image: different captions of each picture in a row of the batch; a sample with fewer repeats them.
        num_negatives: hard negatives of each row: texts that are wrong for its picture, from the three sources below; 0: none.
            The first is what the samples bring themselves: the JSON's "negatives", a table's `negatives_column`.
        negatives_table: the table of `wordsight data mine-negatives`; None: no mined ones.
        negation: captions that deny the sample's own by rules of grammar.
        weights: whether samples' own weights count (the JSON's "weight", a table's `weight_column`); None: where the first sample
            of a source has one.
        reduced_decode: decode JPEGs that are far too large at a half, a quarter or an eighth, which changes the pixels by less
            than 2 of 255 on average; None: for random crops, and not where pictures are read as for evaluation
            (`crop_scale=none`).
        remote: how shards on object stores are read.
    """

    sources: tuple[str | DataSource, ...] = ()
    sampling: Sampling = "epoch"
    num_samples: int | None = None
    shuffle: Shuffle = "auto"
    crop_scale: tuple[float, float] | None = (0.9, 1.0)
    flip: float = 0.0
    augment: Augment | None = None
    first_caption_prob: float | None = None
    max_bad_share: float = 0.05
    num_workers: int = 0
    cache_decoded: bool = False
    captions_per_image: int = 1
    num_negatives: int = 0
    negatives_table: str | None = None
    negation: bool = False
    weights: bool | None = None
    reduced_decode: bool | None = None
    remote: RemoteConfig = field(default_factory=RemoteConfig)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and its learning rate.

    Attributes:
        name: "adamw", or "lamb" for the largest batches (arXiv 1904.00962): each matrix moves in proportion to its own length.
        lr: the highest learning rate, reached at the end of the warm-up.
        betas, eps: of Adam.
        weight_decay: decoupled, of matrices only: gains, biases and the scale have none.
        warmup_steps: updates during which the rate rises linearly.
        schedule: what follows the warm-up.
        final_lr_share: the share of `lr` that the schedule ends at.
        grad_clip: the largest norm of all gradients together; None: not clipped.
        muon_lr: the highest learning rate of Muon, which then updates the weights of linear and convolutional layers; None: AdamW
            updates everything.
    """

    name: Literal["adamw", "lamb"] = "adamw"
    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.2
    warmup_steps: int = 0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_lr_share: float = 0.0
    grad_clip: float | None = None
    muon_lr: float | None = None

    def __post_init__(self) -> None:
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"optim.lr must be above 0, got {self.lr}")
        if self.warmup_steps < 0:
            raise ValueError(f"optim.warmup_steps must be at least 0, got {self.warmup_steps}")
        if self.grad_clip is not None and not self.grad_clip > 0:
            raise ValueError(f"optim.grad_clip must be above 0, or none; got {self.grad_clip}")
        if self.muon_lr is not None and not self.muon_lr > 0:
            raise ValueError(f"optim.muon_lr must be above 0, or none; got {self.muon_lr}")
        if self.name not in ("adamw", "lamb"):
            raise ValueError(f"optim.name must be adamw or lamb, got {self.name!r}")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One measurement that is taken during training and at its end.

    Attributes:
        evaluator: an object of `wordsight.evaluate`, the same as on the command line.
        data: what it is measured on: a path, a glob, `sample:SPLIT`.
        name: its figures are called `<name>/<metric>`; None: the task and the split.
    """

    evaluator: Any
    data: str
    name: str | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run. Exactly one of `steps`, `epochs`, `samples` says how long it is.

    Attributes:
        model: a name of the catalogue, or a model's config.
        weights: a checkpoint to start from; None: fresh weights from `seed`.
        image_weights, text_weights: a published tower to start that side from, by its name, file or folder, which brings its
            preprocessing or tokenizer with it; None: as `weights` says.
        tokenizer: the tokenizer's file, `sample:tokenizer` or `sample:wordpiece` for the embedded data's; None: the model's own.
        activation_checkpointing: recompute activations in the backward pass, for memory.
        data, optim: see there.
        steps, epochs, samples: the length in updates, passes or samples seen.
        batch_size: samples of one update over all processes.
        micro_batch_size: samples of one process that are in memory at once; the gradients are the same. None: all. With batch
            norm, one that is left over joins the micro-batch before it.
        exchange: how a contrastive loss over several processes sees the others' embeddings: "ring" passes them on block by block,
            so that no process holds the global batch; "gather" collects them all, with fewer messages for small worlds.
        parallel: what several processes hold of the model: "ddp" all of it each, "fsdp" a share of its weights, gradients and
            moments each (FSDP2), for models that are large beside their activations. The files are the same.
        precision: "fp32", or "bf16" autocast.
        compile: torch.compile for the model's parts.
        deterministic: ask for deterministic kernels where a device has others, so that a resumed run is bit-identical there too.
        ema_decay: evaluate and keep an exponential moving average of the weights; None: the weights themselves.
        evaluations: what is measured every `evaluate_every_steps` and at the end.
        evaluate_max_share: the largest share of the run's time that evaluations on the way may take; one that would take more
            is put off until it does not. The last one always runs. None: no limit. With one, the clock decides which models are
            measured, and so which is the best one; the weights of training do not depend on it.
        recalibrate_batches: batches, not augmented, that batch norm's statistics are taken anew from before a model is measured
            or kept; 0: the running ones of training.
        prompts: the prompts that the model learns from and is asked with, such as "name"; they travel with the model, and the
            commands use them by default. None: not said.
        best_metric: the figure that chooses the best model, such as `zero_shot/twemoji-seen/top1`; "step": the newest one,
            where what is measured on the way must choose nothing (a test set); None: the first evaluation's first figure.
        best_mode: whether the highest or the lowest is best.
        log_every_steps: how often a line goes into metrics.jsonl.
        checkpoint_every_steps, checkpoint_every_s: how often the run is saved, by steps or by time (None: not by this).
        keep_checkpoints: how many of the last checkpoints stay.
        seed: of weights, order, crops, augmentation and dropout.
        on_nonfinite: whether a loss or gradient that is not finite stops the run or skips the update.
    """

    model: Any = "clip-tiny"
    weights: str | None = None
    image_weights: str | None = None
    text_weights: str | None = None
    tokenizer: str | None = None
    activation_checkpointing: bool = False
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    steps: int | None = None
    epochs: float | None = None
    samples: int | None = None
    batch_size: int = 256
    micro_batch_size: int | None = None
    exchange: Literal["ring", "gather"] = "ring"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    deterministic: bool = True
    ema_decay: float | None = None
    evaluations: tuple[Evaluation, ...] = ()
    evaluate_every_steps: int | None = None
    evaluate_max_share: float | None = None
    recalibrate_batches: int = 0
    prompts: str | None = None
    best_metric: str | None = None
    best_mode: Literal["max", "min"] = "max"
    log_every_steps: int = 1
    checkpoint_every_steps: int | None = None
    checkpoint_every_s: float | None = 600.0
    keep_checkpoints: int = 2
    seed: int = 0
    on_nonfinite: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        lengths = {name: getattr(self, name) for name in ("steps", "epochs", "samples") if getattr(self, name) is not None}
        if len(lengths) > 1:
            raise ValueError(f"a recipe has one length, got {' and '.join(lengths)}: set the others to none")
        counts = lengths | {name: getattr(self, name) for name in ("batch_size", "log_every_steps", "keep_checkpoints")}
        optional = ("micro_batch_size", "evaluate_every_steps", "checkpoint_every_steps", "checkpoint_every_s")
        for name, value in (counts | {name: getattr(self, name) for name in optional}).items():
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        if self.evaluate_max_share is not None and not 0 < self.evaluate_max_share < 1:
            raise ValueError(f"evaluate_max_share must lie between 0 and 1, or be none; got {self.evaluate_max_share}")
        if self.recalibrate_batches < 0:
            raise ValueError(f"recalibrate_batches must be at least 0, got {self.recalibrate_batches}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie between 0 and 1, or be none; got {self.ema_decay}")

    def num_steps(self, samples_per_epoch: int) -> int:
        """The run's updates; the last one may go past `samples` or `epochs` by less than a batch."""
        if self.steps is not None:
            return self.steps
        if self.samples is None and self.epochs is None:
            raise ValueError("the recipe has no length: give one of --set steps=N, --set epochs=N, --set samples=N")
        samples = self.samples if self.samples is not None else self.epochs * samples_per_epoch  # type: ignore[operator]
        return max(1, math.ceil(round(samples / self.batch_size, 9)))


def find_recipe(name: str) -> Callable[[], Recipe]:
    """The function of a recipe by its name in `wordsight/recipes`, or `path/to/file.py:function` (the default function is
    `recipe`).

    Raises:
        ValueError: there is none of that name, with the nearest ones.
    """
    path, _, function = name.rpartition(":") if ".py:" in name else (name, "", "recipe")
    if path.endswith(".py"):
        return _function_in(Path(path), function)
    known = recipe_names()
    wanted = name.replace("-", "_")
    if wanted not in known:
        raise ValueError(f"no recipe is called {name!r}; {_nearest(wanted, known)} Your own: path/to/file.py:function")
    found: Callable[[], Recipe] = getattr(importlib.import_module(f"wordsight.recipes.{wanted}"), wanted)
    return found


def recipe_names() -> list[str]:
    """The recipes that come with wordsight."""
    import wordsight.recipes

    return sorted(module.name for module in pkgutil.iter_modules(wordsight.recipes.__path__))


def make_recipe(name: str, settings: Iterable[str] = ()) -> Recipe:
    """The recipe of that name with `key=value` settings put in.

    Raises:
        ValueError: an unknown recipe, key or value.
    """
    recipe = find_recipe(name)()
    if not isinstance(recipe, Recipe):
        raise ValueError(f"the recipe {name} returns a {type(recipe).__name__}; it must return a wordsight.train.recipe.Recipe")
    changes: dict[str, str] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"--set {setting}: it must be key=value, such as --set optim.lr=1e-3")
        changes[key.strip()] = text.strip()
    lengths = {"steps", "epochs", "samples"}
    if lengths & changes.keys():  # a length that is set takes the place of the recipe's own
        recipe = replace(recipe, steps=None, epochs=None, samples=None)
    for key, text in changes.items():
        try:
            recipe = _set(recipe, key.split("."), text, key)
        except KeyError:
            raise _unknown_key(recipe, key) from None
    return recipe


def _set(owner: Any, path: list[str], text: str, key: str) -> Any:
    """`owner` with the field at `path` set to what `text` says."""
    if path[0] not in [f.name for f in fields(owner)]:
        raise KeyError(key)
    annotation = typing.get_type_hints(type(owner))[path[0]]
    if len(path) == 1:
        return replace(owner, **{path[0]: parse_value(text, annotation, key)})
    part = _open_config(getattr(owner, path[0]), annotation)
    if not is_dataclass(part):
        raise KeyError(key)
    return replace(owner, **{path[0]: _set(part, path[1:], text, key)})


def _all_keys(owner: Any, prefix: str = "") -> list[str]:
    """Every key that `--set` takes, with dots."""
    keys = []
    hints = typing.get_type_hints(type(owner))
    for f in fields(owner):
        keys.append(prefix + f.name)
        part = _open_config(getattr(owner, f.name), hints[f.name])
        if is_dataclass(part):
            keys += _all_keys(part, f"{prefix}{f.name}.")
    return keys


def _unknown_key(recipe: Recipe, key: str) -> ValueError:
    known = _all_keys(recipe)
    last = key.rpartition(".")[2]
    near = [one for one in known if one.rpartition(".")[2] == last] or difflib.get_close_matches(key, known, n=2, cutoff=0.6)
    if near:
        return ValueError(f"unknown key {key!r}; did you mean {' or '.join(near[:3])}?")
    return ValueError(f"unknown key {key!r}; known are {', '.join(known)}")


def _open_config(value: Any, annotation: Any) -> Any:
    """A config whose fields can be set: a model's name becomes its config, None the defaults of its type."""
    if isinstance(value, str) and annotation is Any:
        from wordsight.catalog import find

        return find(value).config
    if value is None:
        kinds = [kind for kind in typing.get_args(annotation) if is_dataclass(kind)]
        return kinds[0]() if len(kinds) == 1 else None  # type: ignore[operator]
    return value


def parse_value(text: str, annotation: Any, key: str) -> Any:
    """What `text` means for a field of that annotation.

    Numbers, true/false and none are as one writes them; a tuple is a list with commas (outside of braces) or JSON; a dataclass
    is JSON.

    Raises:
        ValueError: it does not fit, with what would.
    """
    for candidate in _alternatives(annotation):
        try:
            return _parse_as(text, candidate, key)
        except (ValueError, TypeError):
            continue
    raise ValueError(f"{key}={text} does not fit: it takes {_describe(annotation)}")


def _alternatives(annotation: Any) -> list[Any]:
    """The members of a union, those first that accept least: none, numbers, then text."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        members = [one for member in typing.get_args(annotation) for one in _alternatives(member)]
        return sorted(members, key=lambda m: (m is not type(None), m is str, m is Any))
    return [annotation]


def _parse_as(text: str, kind: Any, key: str) -> Any:
    if kind is Any or kind is str:
        return text
    if kind is type(None):
        if text.lower() in ("none", "null", ""):
            return None
    elif kind is bool:
        if text.lower() in ("true", "yes", "1", "on", "false", "no", "0", "off"):
            return text.lower() in ("true", "yes", "1", "on")
    elif kind is int:
        number = float(text.replace("_", "")) if not text.lstrip("+-").replace("_", "").isdigit() else int(text)
        if number == int(number):
            return int(number)
    elif kind is float:
        number = float(text)
        if math.isfinite(number):
            return number
    elif typing.get_origin(kind) is Literal:
        for choice in typing.get_args(kind):
            if text == str(choice):
                return choice
    elif typing.get_origin(kind) is tuple:
        return _parse_tuple(text, typing.get_args(kind), key)
    elif is_dataclass(kind) and text.startswith("{"):
        given = json.loads(text)
        return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})  # type: ignore[operator]
    raise ValueError(text)


def _parse_tuple(text: str, members: tuple[Any, ...], key: str) -> tuple[Any, ...]:
    parts = [_as_text(value) for value in json.loads(text)] if text.startswith("[") else _split_commas(text)
    if len(members) == 2 and members[1] is Ellipsis:
        return tuple(parse_value(part, members[0], key) for part in parts)
    if len(parts) != len(members):
        raise ValueError(text)
    return tuple(parse_value(part, member, key) for part, member in zip(parts, members, strict=True))


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _split_commas(text: str) -> list[str]:
    """Parts between commas that stand outside of braces: `a/{0,1}.tar,b.tar` has two."""
    if text.startswith("(") and text.endswith(")"):
        text = text[1:-1]
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "{") - (letter == "}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def _describe(annotation: Any) -> str:
    """An annotation in words for an error."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "none"}
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(arg) for arg in args)
    if origin is Literal:
        return " or ".join(str(arg) for arg in args)
    if origin is tuple:
        return "a list (with commas) of " + _describe(args[0]) if args[-1] is Ellipsis else f"{len(args)} values with commas"
    if is_dataclass(annotation):
        return f"the fields of a {annotation.__name__} as JSON"  # type: ignore[union-attr]
    return names.get(annotation, str(annotation))


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"


def _function_in(path: Path, function: str) -> Callable[[], Recipe]:
    """A function of a user's Python file."""
    if not path.exists():
        raise FileNotFoundError(f"the recipe's file {path} does not exist")
    name = f"wordsight_recipe_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    found = getattr(module, function, None)
    if not callable(found):
        own = [n for n, v in vars(module).items() if isinstance(v, types.FunctionType) and v.__module__ == name]
        raise ValueError(f"{path} has no function {function!r}; {_nearest(function, own)}. Write path/to/file.py:function")
    return typing.cast(Callable[[], Recipe], found)


def to_json(value: Any) -> Any:
    """A recipe, or a part of one, as plain JSON values; dataclasses carry their type's name.

    Raises:
        ValueError: something in it has no plain form.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {"type": type(value).__name__} | {f.name: to_json(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise ValueError(
        f"a recipe holds plain values and dataclasses, so that it can be written down; got {type(value).__name__}: {value!r}"
    )


def differences(old: Any, new: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, old, new) of all that differs between two recipes as JSON."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = [*old, *(name for name in new if name not in old)]
        return [d for n in names for d in differences(old.get(n), new.get(n), f"{key}.{n}" if key else n)]
    return [] if old == new else [(key, old, new)]
