"""From a recipe to the parts of a run: the model on its device, the loader, what is done to a batch, the evaluations.

Shape legend: B batch, H height, W width.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from wordsight.data.augment import Augment
from wordsight.data.transform import Preprocess, TrainTransform
from wordsight.train.distributed import World
from wordsight.train.recipe import Evaluation, Recipe
from wordsight.train.step import Draws

if TYPE_CHECKING:
    from wordsight.data.loader import Loader
    from wordsight.types import Batch


@dataclass
class Parts:
    """What the loop drives.

    Attributes:
        system: the model on its device, with `tokenizer` and `preprocessor`.
        loader: `batches(start_step)`, `samples_per_epoch`, `bad`.
        augment: further changes of pixels in [0, 1]; None: none.
    """

    system: Any
    loader: Loader
    augment: Augment | None = None

    def prepare(self, batch: Batch, draws: Draws) -> Batch:
        """uint8 pixels on the device -> augmented, normalised."""
        pixels_B3HW = batch.pixels
        if self.augment is not None:
            pixels_B3HW = self.augment(pixels_B3HW.float() / 255, draws)
        return replace(batch, pixels=self.system.preprocessor.normalize(pixels_B3HW))

    def plain(self, batch: Batch) -> Batch:
        """uint8 pixels on the device -> normalised, as the loader gives them."""
        return replace(batch, pixels=self.system.preprocessor.normalize(batch.pixels))


def build(recipe: Recipe, device: torch.device, world: World) -> Parts:
    """Make the model and open the data.

    Raises:
        ValueError: there is no data, or the recipe's model or tokenizer does not fit.
    """
    from wordsight.data.loader import Loader

    if not recipe.data.sources:
        raise ValueError(
            "the recipe has no data: give it with --set data.sources=PATH (shards, a table or a folder; several with commas)"
        )
    system = build_system(recipe)
    preprocessor: Preprocess = system.preprocessor
    data = recipe.data
    transform: Preprocess | TrainTransform = preprocessor
    if data.crop_scale is not None:
        transform = TrainTransform(
            preprocessor.image_size_px, scale=data.crop_scale, flip=data.flip, interpolation=preprocessor.interpolation
        )
    elif data.flip:
        raise ValueError("data.flip is part of the random crop: set data.crop_scale=1,1 to flip whole pictures, or data.flip=0")
    loader = Loader(
        data.sources,
        batch_size=recipe.batch_size,
        transform=transform,
        tokenizer=system.tokenizer,
        seed=recipe.seed,
        sampling=data.sampling,
        num_samples=data.num_samples,
        rank=world.rank,
        world_size=world.size,
        num_workers=data.num_workers,
        first_caption_prob=data.first_caption_prob,
        max_bad_share=data.max_bad_share,
        shuffle=data.shuffle,
        cache_decoded=data.cache_decoded,
        captions_per_image=data.captions_per_image,
        num_negatives=data.num_negatives,
        negatives_table=data.negatives_table,
        negation=data.negation,
        weights=data.weights,
        reduced_decode=data.reduced_decode,
        remote=data.remote,
        pin_memory=device.type == "cuda",
    )
    return Parts(system.to(device), loader, data.augment)


def build_system(recipe: Recipe) -> Any:
    """The recipe's model with fresh or given weights, its tokenizer and preprocessing, on the CPU."""
    from wordsight import bundle

    if recipe.weights is not None:
        system = bundle.load(recipe.weights, model=recipe.model if isinstance(recipe.model, str) else None)
    else:
        system = bundle.create(recipe.model, seed=recipe.seed)
    bundle.load_towers(system, image=recipe.image_weights, text=recipe.text_weights)
    if recipe.tokenizer is not None:
        from wordsight.data.tokenizers import read_tokenizer

        system.tokenizer = read_tokenizer(_tokenizer_file(recipe.tokenizer), system.config.text.context_length)
    _check_tokenizer(system)
    if recipe.activation_checkpointing:
        if not hasattr(system, "set_activation_checkpointing"):
            raise ValueError(f"{type(system).__name__} has no activation checkpointing: set activation_checkpointing=false")
        system.set_activation_checkpointing(True)
    return system


def _tokenizer_file(name: str) -> str:
    """A path; `sample:tokenizer` and `sample:wordpiece` are the embedded data's."""
    files = {"sample:tokenizer": "tokenizer.json", "sample:wordpiece": "wordpiece.json"}
    if name in files:
        from wordsight.sample import path

        return str(path() / files[name])
    return name


def _check_tokenizer(system: Any) -> None:
    """The tokenizer's ids are exactly the model's; found out now and not when the trained model is saved."""
    tokenizer, size = system.tokenizer, system.config.text.vocab_size
    if tokenizer is None:
        raise ValueError(f"a text tower of {size} tokens needs its tokenizer: give its file with --set tokenizer=PATH")
    if tokenizer.vocab_size != size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the text tower {size}: "
            f"set model.text.vocab_size={tokenizer.vocab_size}"
        )
    pad_id = getattr(system.config.text, "pad_id", tokenizer.pad_id)
    if tokenizer.pad_id != pad_id:
        raise ValueError(
            f"the tokenizer pads with {tokenizer.pad_id}, the text tower leaves out {pad_id}: "
            f"set model.text.pad_id={tokenizer.pad_id}"
        )


def compile_parts(system: nn.Module) -> None:
    """torch.compile for each of the system's modules, in place: names of weights stay, and the loss stays as written.

    Raises:
        ValueError: this machine can't compile, and why.
    """
    try:
        torch.compile(torch.square)(torch.ones(3, device=next(system.parameters()).device))
    except Exception as error:  # torch raises many kinds here: no compiler, no Triton, an unsupported Python
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"compile=true does not work here ({type(error).__name__}: {reason}). On the CPU it needs a C++ compiler (g++ or "
            "clang), on a GPU Triton; install it, or set compile=false"
        ) from error
    for part in system.children():
        part.compile()


class Evaluator:
    """The recipe's evaluations on a model: figures by name, and records for results.json."""

    def __init__(self, evaluations: tuple[Evaluation, ...]) -> None:
        self._evaluations = evaluations
        self._sources: dict[str, Any] = {}

    def run(self, system: nn.Module, world: World) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """(`<name>/<metric>` -> value, records), the same in every process.

        The processes share an evaluator's work where its `judge` takes them (`world`); else the main one does it.
        """
        from wordsight.data.sources import open_source

        figures: dict[str, float] = {}
        records: list[dict[str, Any]] = []
        for evaluation in self._evaluations:
            if evaluation.data not in self._sources:  # indexed once
                self._sources[evaluation.data] = open_source(evaluation.data)
            values, found = _judge(evaluation, system, self._sources[evaluation.data], world)
            figures |= values
            records += found
        return figures, records


def _judge(evaluation: Evaluation, system: nn.Module, source: Any, world: World) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """One evaluation's figures and records, in every process."""
    from wordsight.evaluate.results import name_data
    from wordsight.evaluate.sharing import from_main

    def told(judgement: Any) -> tuple[dict[str, float], list[dict[str, Any]]]:
        data, split = name_data(evaluation.data)
        name = evaluation.name or f"{judgement.task}/{split}"
        values = {f"{name}/{metric}": found.value for metric, found in judgement.metrics.items()}
        return values, judgement.records(data, split)

    judge = evaluation.evaluator.judge
    if "world" in inspect.signature(judge).parameters:
        return told(judge(system, source, world=world))
    return from_main(world, lambda: told(judge(system, source)))
