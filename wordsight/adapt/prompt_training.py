"""How learned prompts are trained, as CoOp (arXiv 2109.01134, section 4.1) and CoCoOp (arXiv 2203.05557, section 4.1) do.

SGD with momentum; epoch 0 at a constant 1e-5, epoch e >= 1 of E at lr/2 (1 + cos(pi (e - 1) / E)); a shuffle an epoch, whose rest
that fills no batch is left out.

Shape legend: N pictures, B a batch, C classes, D embedding width, M context tokens, W width of the text tower.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from wordsight.adapt.prompt_encoder import PromptEncoder, tokenizer_of
from wordsight.adapt.prompts import context_words

Precision = Literal["fp32", "bf16"]
WARM_UP_RATE = 1e-5
INIT_STD = 0.02
# shots a class -> epochs
SHOTS, EPOCHS = (1, 2, 4, 8), (50, 100, 100, 200)


def make_encoder(learner: Any, names: Sequence[str]) -> PromptEncoder:
    """The prompt encoder of an estimator's settings."""
    num_tokens = learner.num_context_tokens
    if learner.init is not None:
        num_tokens = len(context_words(tokenizer_of(learner.model), learner.init))
    return PromptEncoder(
        learner.model,
        names,
        num_tokens,
        getattr(learner, "position", "end"),
        getattr(learner, "class_specific", False),
        published_tokens=learner.published_tokens,
        class_chunk_tokens=learner.class_chunk_tokens,
        exact_reference=learner.exact_reference,
    )


def first_context(learner: Any, encoder: PromptEncoder, generator: torch.Generator) -> Tensor:
    """What a context starts from, float32: the words of `init`, the same for each class, or normal numbers of deviation .02."""
    layout = encoder.layout
    shape = (*((len(layout.names),) if layout.class_specific else ()), layout.num_context_tokens, encoder.width)
    if learner.init is None:
        return (INIT_STD * torch.randn(shape, generator=generator)).to(encoder.device)
    words_MW = encoder.token_embedding[context_words(tokenizer_of(learner.model), learner.init)]
    return words_MW.float().expand(shape).clone()


def default_epochs(targets_N: Tensor) -> int:
    """Epochs by the shots of the class that has most: 50 (1 shot), 100 (2 to 4), 200 (8 and more), between them in proportion."""
    return round(float(np.interp(int(targets_N.bincount().max()), SHOTS, EPOCHS)))


def plan(learner: Any, targets_N: Tensor) -> tuple[int, int, int]:
    """Epochs, pictures of a step, and steps of an epoch."""
    batch_size = min(learner.batch_size, len(targets_N))
    return learner.epochs or default_epochs(targets_N), batch_size, len(targets_N) // batch_size


def draw_order(sampling: str, targets_N: Tensor, generator: torch.Generator) -> Tensor:
    """The N rows of an epoch: all in a new order; with "class_balanced" each of a class drawn alike, then of its pictures."""
    num_rows = len(targets_N)
    if sampling == "instance":
        return torch.randperm(num_rows, generator=generator)
    by_class_N = targets_N.cpu().argsort(stable=True)
    _, sizes = targets_N.cpu().unique(return_counts=True)
    classes_N = torch.randint(len(sizes), (num_rows,), generator=generator)
    within_N = (torch.rand(num_rows, generator=generator, dtype=torch.float64) * sizes[classes_N]).long()
    return by_class_N[(sizes.cumsum(0) - sizes)[classes_N] + within_N]


def learning_rate_at(epoch: int, epochs: int, learning_rate: float) -> float:
    """The published schedule."""
    return WARM_UP_RATE if epoch == 0 else 0.5 * learning_rate * (1 + math.cos(math.pi * (epoch - 1) / epochs))


def check_settings(learner: Any) -> None:
    """Refuse settings that no training can have.

    Raises:
        ValueError: with the setting, its value and what is allowed.
    """
    if learner.precision not in get_args(Precision):
        raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, got {learner.precision!r}")
    if learner.epochs is not None and learner.epochs < 1:
        raise ValueError(f"epochs must be at least 1, or None for the published number, got {learner.epochs}")
    if learner.batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {learner.batch_size}")
    if not (learner.learning_rate > 0 and math.isfinite(learner.learning_rate)):
        raise ValueError(f"learning_rate must be above 0, got {learner.learning_rate}")
    if not 0 <= learner.momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {learner.momentum}")
    if not learner.weight_decay >= 0:
        raise ValueError(f"weight_decay must be at least 0, got {learner.weight_decay}")


def train(
    learner: Any,
    parameters: Sequence[Tensor],
    loss: Callable[[int, Tensor], Tensor],
    targets_N: Tensor,
    generator: torch.Generator,
) -> list[float]:
    """Train to the end; the last step's parameters are what is kept.

    Args:
        learner: an estimator with the settings of SGD.
        parameters: what learns, in place.
        loss: (epoch, rows [B]) -> the mean loss of these pictures.
        targets_N: int64 [N]; how many shots there are says how many epochs, where the settings do not.
        generator: draws the order of the pictures.

    Returns:
        The mean loss of each epoch.

    Raises:
        ValueError: a loss is not finite; the message says the step.
    """
    name = type(learner).__name__
    optimizer = torch.optim.SGD(
        parameters, lr=learner.learning_rate, momentum=learner.momentum, weight_decay=learner.weight_decay
    )
    epochs, batch_size, num_batches = plan(learner, targets_N)
    sampling = getattr(learner, "sampling", "instance")
    curve = []
    for epoch in tqdm(range(epochs), desc=name, unit="epoch", disable=not learner.progress):
        optimizer.param_groups[0]["lr"] = learning_rate_at(epoch, epochs, learner.learning_rate)
        order_N = draw_order(sampling, targets_N, generator)
        losses = []
        for rows_B in order_N[: num_batches * batch_size].split(batch_size):
            value = loss(epoch, rows_B)
            losses.append(float(value.detach()))
            if not math.isfinite(losses[-1]):
                raise ValueError(
                    f"{name}'s loss is {losses[-1]} at step {epoch * num_batches + len(losses)} (epoch {epoch + 1} of {epochs}): "
                    "lower learning_rate, or take precision='fp32'"
                )
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
        curve.append(math.fsum(losses) / len(losses))
    return curve


def class_logits(features_BD: Tensor, text: Tensor, scale: float) -> Tensor:
    """scale * cos(picture, class) in the pictures' precision: [B, D] of unit length, [C, D] or [B, C, D] of any -> [B, C].

    Raises:
        ValueError: the pictures' features are of another width than the texts'.
    """
    if features_BD.shape[1] != text.shape[-1]:
        raise ValueError(
            f"the features have {features_BD.shape[1]} numbers and the model's texts {text.shape[-1]}: they are of another model "
            "or layer"
        )
    vectors = normalize(text.to(features_BD.dtype), dim=-1)
    return scale * (features_BD @ vectors.T if text.ndim == 2 else torch.einsum("bd,bcd->bc", features_BD, vectors))
