"""CLIP-Adapter: a bottleneck on the picture's feature, blended with the feature itself (arXiv 2110.04544).

logits = scale cos(r A(f) + (1 - r) f, text_c), A(f) = relu(relu(f W1') W2'), f not normalised.

Shape legend: N pictures, V views, C classes, D feature width, H hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, relu

from wordsight.adapt.estimator import AdaptedClassifier
from wordsight.adapt.head_training import cosine_logits, number, train_head, view_batches
from wordsight.adapt.prompt_training import learning_rate_at

RATIOS = tuple(i / 10 for i in range(1, 11))
PUBLISHED_RATIO = 0.2


class ClipAdapter(AdaptedClassifier):
    """CLIP-Adapter on pictures, with the published code's settings: SGD with CoOp's schedule, biases nowhere.

    The published code trains on new random views in every epoch: num_views of them here, epoch e sees view e modulo num_views.

    Args:
        model: an Embedder.
        classes: C names; None takes those in y.
        prompts: see `ZeroShot`.
        ratio: r, the adapter's share; or "search": 0.1 to 1 in steps of 0.1 by accuracy on validation (of equals the first),
            each trained anew, and the published 0.2 without validation.
        reduction: D / H.
        epochs: passes over the pictures.
        learning_rate, momentum, weight_decay: of SGD.
        batch_size: pictures a step; a rest that fills no batch is left out of its epoch.
        num_views: random views a picture; 0: the fixed one.
        seed: of the views, the weights and the order.
        progress: show a bar.

    Attributes:
        down_, up_: float32 [H, D] and [D, H].
        text_vectors_: float32 [C, D], unit length.
        scale_: exp(log_scale).
        ratio_: what was taken.
        loss_curve_: mean loss of each epoch.
    """

    unit_length = False
    saved = ("down_", "up_", "text_vectors_", "scale_", "ratio_", "loss_curve_")

    def __init__(
        self,
        model: Any = None,
        classes: Sequence[str] | None = None,
        *,
        prompts: str | Sequence[str] | None = None,
        ratio: float | Literal["search"] = PUBLISHED_RATIO,
        reduction: int = 4,
        epochs: int = 200,
        learning_rate: float = 0.002,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        batch_size: int = 32,
        num_views: int = 0,
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        self.model = model
        self.classes = classes
        self.prompts = prompts
        self.ratio = ratio
        self.reduction = reduction
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.num_views = num_views
        self.seed = seed
        self.progress = progress

    def _fit(self, features_VND: Tensor, targets_N: Tensor, validation: tuple[Tensor, Tensor] | None) -> None:
        self._check_settings(features_VND.shape[2])
        self.text_vectors_, self.scale_ = self._text_features(), self._scale()
        searched = self.ratio == "search" and validation is not None
        ratios = RATIOS if searched else (PUBLISHED_RATIO if self.ratio == "search" else float(self.ratio),)
        best = -1.0
        for ratio in ratios:
            down_HD, up_DH, curve = self._train(features_VND, targets_N, ratio)
            right = 0.0
            if searched and validation is not None:
                right = float((self._blend(validation[0], down_HD, up_DH, ratio).argmax(1) == validation[1]).double().mean())
            if right > best:
                best = right
                self.down_, self.up_, self.ratio_, self.loss_curve_ = down_HD, up_DH, ratio, curve

    def _train(self, features_VND: Tensor, targets_N: Tensor, ratio: float) -> tuple[Tensor, Tensor, list[float]]:
        generator = torch.Generator().manual_seed(self.seed)
        width = features_VND.shape[2]
        hidden = width // self.reduction
        # as torch.nn.Linear starts: uniform within 1 / sqrt(inputs)
        down_HD = ((2 * torch.rand(hidden, width, generator=generator) - 1) * width**-0.5).requires_grad_()
        up_DH = ((2 * torch.rand(width, hidden, generator=generator) - 1) * hidden**-0.5).requires_grad_()
        optimizer = torch.optim.SGD(
            [down_HD, up_DH], lr=self.learning_rate, momentum=self.momentum, weight_decay=self.weight_decay
        )
        curve = train_head(
            self,
            optimizer,
            view_batches(features_VND, targets_N, self.batch_size, generator, drop_rest=True),
            lambda features_BD, targets_B: cross_entropy(self._blend(features_BD, down_HD, up_DH, ratio), targets_B),
            lambda step, epoch: learning_rate_at(epoch, self.epochs, self.learning_rate),
            self.epochs,
        )
        return down_HD.detach(), up_DH.detach(), curve

    def _logits(self, features_ND: Tensor) -> Tensor:
        return self._blend(features_ND, self.down_, self.up_, self.ratio_)

    def _blend(self, features_ND: Tensor, down_HD: Tensor, up_DH: Tensor, ratio: float) -> Tensor:
        adapted_ND = relu(linear(relu(linear(features_ND, down_HD)), up_DH))
        blended_ND = ratio * adapted_ND + (1 - ratio) * features_ND
        return cosine_logits(blended_ND, self.text_vectors_, self.scale_)

    def _check_settings(self, width: int) -> None:
        if isinstance(self.ratio, str):
            if self.ratio != "search":
                raise ValueError(f"ratio must be a number in [0, 1] or 'search', got {self.ratio!r}")
        elif not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio must be a number in [0, 1] or 'search', got {self.ratio}")
        number(self, "reduction", 1, whole=True)
        if self.reduction > width:
            raise ValueError(f"reduction must be at most the features' width {width}, got {self.reduction}")
        number(self, "epochs", 1, whole=True)
        number(self, "batch_size", 1, whole=True)
        number(self, "learning_rate", 0, above=True)
        number(self, "weight_decay", 0)
        number(self, "momentum", 0)
