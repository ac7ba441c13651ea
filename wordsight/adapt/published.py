"""Learned prompts of the published programs of CoOp and CoCoOp as classifiers, and classifiers as files for those programs.

Shape legend: C classes, M context tokens, L context length in tokens, W width.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from wordsight.adapt.cocoop import CoCoOp
from wordsight.adapt.coop import CoOp
from wordsight.adapt.prompt_encoder import tokenizer_of
from wordsight.adapt.prompts import lay_out
from wordsight.interop.coop import META_NET, LearnedPrompts, read_prompts, write_prompts

_LEARNED = dict(zip(META_NET, ("hidden_weight_", "hidden_bias_", "shift_weight_", "shift_bias_"), strict=True))


def from_published(
    model: Any,
    classes: Sequence[str],
    path: str | os.PathLike[str],
    *,
    epoch: int | None = None,
    **settings: Any,
) -> CoOp | CoCoOp:
    """A fitted classifier from a file that the published program wrote (`prompt_learner/model.pth.tar-E`).

    Names are tokenised as there (`published_tokens=True`), unless `settings` say otherwise. A file does not say where the class
    name stands: `position` is "end", as published, unless `settings` say otherwise.

    Args:
        model: the Embedder that the prompts were learned for.
        classes: C names; of class-specific contexts in the order of training.
        path: the file, or the program's folder, of which the last epoch's file is taken.
        epoch: of a folder, the epoch to take.
        settings: of `CoOp` or `CoCoOp`.

    Raises:
        CheckpointError: a damaged or hostile file, or one for another width or other classes.
        FileNotFoundError: no such file.
    """
    width = _token_embedding(model).shape[1]
    prompts = read_prompts(Path(path), epoch=epoch, width=width, num_classes=len(classes))
    settings = {"published_tokens": True, **settings}
    if prompts.meta_net is None:
        return CoOp.from_context(model, classes, prompts.context, **settings)
    meta_net = tuple(prompts.meta_net[name] for name in META_NET)
    return CoCoOp.from_context(model, classes, prompts.context, meta_net, **settings)  # type: ignore[arg-type]


def to_published(
    classifier: CoOp | CoCoOp, folder: str | os.PathLike[str], *, epoch: int, val_result: float | None = None
) -> Path:
    """Write what a classifier has learned where the published program looks for it; classes in the order that they were given.

    Args:
        classifier: fitted.
        folder: the program's `--model-dir`.
        epoch: of the file's name.
        val_result: the accuracy on validation pictures in percent, if it was measured.

    Returns:
        `<folder>/prompt_learner/model.pth.tar-<epoch>`.

    Raises:
        ValueError: names tokenised otherwise than there (`published_tokens=False`) where that makes other prompts.
    """
    classes = classifier.classes_.tolist() if classifier.classes is None else list(classifier.classes)
    context, num_tokens = classifier.context_, classifier.context_.shape[-2]
    if context.ndim == 3:
        places = {name: i for i, name in enumerate(classifier.classes_.tolist())}
        context = context[[places[name] for name in classes]]
    tokenizer = tokenizer_of(classifier.model)
    names = [str(name) for name in classes]
    options: dict[str, Any] = {"num_context_tokens": num_tokens, "class_specific": context.ndim == 3}
    # whatever the position, the files hold the prompts with the context before the name
    layout = lay_out(tokenizer, names, published_tokens=True, **options)
    if not classifier.published_tokens:
        own = lay_out(tokenizer, names, **options)
        if other := [name for name, a, b in zip(names, own.tokens, layout.tokens, strict=True) if not bool((a == b).all())]:
            raise ValueError(
                f"{len(other)} class names have other tokens in the published programs, the first is {other[0]!r}: learn with "
                "published_tokens=True to use the prompts there"
            )
    embedded_CLW = _token_embedding(classifier.model)[layout.tokens]
    meta_net = None if isinstance(classifier, CoOp) else {name: getattr(classifier, at) for name, at in _LEARNED.items()}
    return write_prompts(
        Path(folder),
        LearnedPrompts(context=context, meta_net=meta_net),
        token_prefix=embedded_CLW[:, :1],
        token_suffix=embedded_CLW[:, 1 + num_tokens :],
        epoch=epoch,
        val_result=val_result,
    )


def _token_embedding(model: Any) -> Tensor:
    """[vocabulary, W] on the CPU."""
    trunk = getattr(model.text_tower, "trunk", model.text_tower)
    weight: Tensor = trunk.token_embedding.weight.detach().cpu()
    return weight
