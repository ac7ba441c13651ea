"""The plain fine-tuned projection: of all the model only the matrix that ends its image tower learns, on features computed once.

logits = s cos(f P + o, w_c), with f the penultimate features, P and o the tower's own, w_c the classes' texts: the zero-shot
classifier at first.

Shape legend: N pictures, V views, C classes, F penultimate features, D embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from wordsight.adapt.decoder import class_vectors
from wordsight.adapt.estimator import AdaptedClassifier, Validation
from wordsight.adapt.features import Layer
from wordsight.adapt.head_training import cosine_logits, number
from wordsight.adapt.imbalanced import LDAM_SCALE, Schedule, class_counts, step_loss, train
from wordsight.nn.tuning import last_projection


class ProjectedHead(nn.Module):
    """Features [B, F] -> s cos(f P + o, w_c) [B, C].

    Attributes:
        matrix: P, [F, D].
        offset: o, [D], or None.
        vectors: w, [C, D].
        scale: s, which does not learn.
    """

    def __init__(self, matrix_FD: Tensor, offset_D: Tensor | None, vectors_CD: Tensor, scale: float, *, learn_head: bool) -> None:
        super().__init__()
        self.scale = scale
        self.matrix = nn.Parameter(matrix_FD.clone())
        self.offset = None if offset_D is None else nn.Parameter(offset_D.clone())
        self.vectors = nn.Parameter(vectors_CD.clone(), requires_grad=learn_head)

    def forward(self, features_BF: Tensor) -> Tensor:
        """[B, F] -> [B, C]."""
        embedded_BD = features_BF @ self.matrix
        return cosine_logits(embedded_BD if self.offset is None else embedded_BD + self.offset, self.vectors, self.scale)


class Projection(AdaptedClassifier):
    """The image tower's last projection, fine-tuned, with the classes' texts as head.

    Args:
        model: an Embedder whose image tower has penultimate features and ends in one matrix; it is not changed.
        classes: C names; None takes those in y.
        prompts: see `ZeroShot`.
        learn_head: whether the head's vectors learn too.
        loss, gamma, tau: see `Decoder`.
        scale: s; None: the model's own, with LDAM its paper's 30.
        epochs: passes over the pictures, may be a fraction; 0 leaves all as it starts.
        batch_size, learning_rate, momentum, weight_decay, optimizer, decay, warmup_steps, sampling: see `Schedule`.
        num_views: random views to learn from; 0: the fixed one.
        wise_ft: what lies between zero-shot and fine-tuned, see `wordsight.adapt.wise_ft`: the fine-tuned weights' share; or
            "validation": the share that is best there; None: all.
        seed: of rows and views.
        progress: show a bar.

    Attributes:
        matrix_: float32 [F, D].
        offset_: float32 [D], zeros where the tower has none.
        vectors_: float32 [C, D].
        scale_: s.
        counts_: float64 [C], training pictures of each class, or the sum of their weights.
        wise_ft_: the fine-tuned weights' share; None: they are as they were learned.
    """

    layer: Layer = "penultimate"
    unit_length = False
    wise_ft_: float | None
    saved = ("matrix_", "offset_", "vectors_", "scale_", "counts_", "wise_ft_")

    def __init__(
        self,
        model: Any = None,
        classes: Sequence[str] | None = None,
        *,
        prompts: str | Sequence[str] | None = None,
        learn_head: bool = False,
        loss: str = "cross_entropy",
        gamma: float = 2.0,
        tau: float = 1.0,
        scale: float | None = None,
        epochs: float = 50,
        batch_size: int = 128,
        learning_rate: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.1,
        optimizer: str = "adamw",
        decay: str = "cosine",
        warmup_steps: int | None = None,
        sampling: str = "instance",
        num_views: int = 0,
        wise_ft: float | Literal["validation"] | None = None,
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        self.model = model
        self.classes = classes
        self.prompts = prompts
        self.learn_head = learn_head
        self.loss = loss
        self.gamma = gamma
        self.tau = tau
        self.scale = scale
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.optimizer = optimizer
        self.decay = decay
        self.warmup_steps = warmup_steps
        self.sampling = sampling
        self.num_views = num_views
        self.wise_ft = wise_ft
        self.seed = seed
        self.progress = progress

    def fit(self, X: Any, y: Any = None, *, validation: Validation | None = None, sample_weight: Any = None) -> Self:
        """Learn from pictures or their penultimate features.

        Args:
            X: N pictures or features.
            y: N class names.
            validation: (X, y) of other pictures, by which wise_ft="validation" chooses; nothing else is chosen.
            sample_weight: [N], how much each picture counts in the loss and in the classes' counts, at least 0.

        Raises:
            ValueError: see `AdaptedClassifier.fit`; features of another width, an unknown setting, weights that do not fit.
        """
        from wordsight.adapt.wise_ft import check_wanted, mix_as_wanted  # which is built on this class

        check_wanted(self, validation)
        self._learn(X, y, validation, sample_weight)
        self.wise_ft_ = None
        mix_as_wanted(self, validation)
        return self

    def _fit(
        self,
        features_VND: Tensor,
        targets_N: Tensor,
        validation: tuple[Tensor, Tensor] | None,
        weights_N: Tensor | None = None,
    ) -> None:
        schedule = self._schedule(len(targets_N))
        matrix_FD, offset_D = self._start()
        if len(matrix_FD) != features_VND.shape[2]:
            raise ValueError(
                f"the features have {features_VND.shape[2]} numbers and the model's projection reads {len(matrix_FD)}: give "
                "penultimate features of this model"
            )
        self.counts_ = class_counts(targets_N, weights_N, len(self.classes_))
        self.scale_ = self._head_scale()
        head = ProjectedHead(matrix_FD, offset_D, self._text_rows(), self.scale_, learn_head=self.learn_head)
        loss = step_loss(self.loss, self.counts_, steps=schedule.steps, gamma=self.gamma, tau=self.tau, head_scale=self.scale_)

        def read(rows_B: np.ndarray, views_B: np.ndarray | None) -> Tensor:
            return features_VND[0 if views_B is None else torch.from_numpy(views_B), torch.from_numpy(rows_B)]

        train(head, read, targets_N, loss, schedule, num_views=self.num_views, weights_N=weights_N, progress=self.progress)
        self.matrix_, self.vectors_ = head.matrix.detach(), head.vectors.detach()
        self.offset_ = torch.zeros(self.matrix_.shape[1]) if head.offset is None else head.offset.detach()

    def _logits(self, features_ND: Tensor) -> Tensor:
        return cosine_logits(features_ND @ self.matrix_ + self.offset_, self.vectors_, self.scale_)

    def _start(self) -> tuple[Tensor, Tensor | None]:
        return last_projection(self.model.image_tower)

    def _text_rows(self) -> Tensor:
        return class_vectors(self)

    def _head_scale(self) -> float:
        if self.scale is not None:
            number(self, "scale", 0, above=True)
            return float(self.scale)
        return LDAM_SCALE if self.loss == "ldam" else self._scale()

    def _schedule(self, num_pictures: int) -> Schedule:
        number(self, "epochs", 0)
        number(self, "batch_size", 1, whole=True)
        return Schedule.of(self, steps=math.ceil(self.epochs * num_pictures / self.batch_size))
