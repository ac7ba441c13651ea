"""LIFT: a frozen vision transformer with small adapters, a head that starts from text, and logits adjusted to the classes' counts
(arXiv 2309.10019).

It is `FineTune` with the published settings. Its program differs in that it decays vectors too, steps the cosine once an epoch,
and resizes pictures to 8/7 of the tower's side where it takes one crop.

Shape legend: C classes, L blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from wordsight.adapt.fine_tune import COSINE_SCALE, FineTune
from wordsight.adapt.parts import CROP_SCALE


class LIFT(FineTune):
    """AdaptFormer in every block, a cosine head of scale 25 on the penultimate features, logit adjustment, a test-time ensemble.

    Args:
        model: an Embedder whose image tower is a vision transformer; it is not changed.
        classes: C names; None takes those in y.
        prompts: of the text features that the head starts from, see `ZeroShot`.
        adapter_dim: hidden width of the adapters; None: 2^floor(log2(C / 2 L)), at least 1.
        scale: of the head.
        tau: of logit adjustment.
        epochs, batch_size, learning_rate, momentum, weight_decay: of SGD, whose rate falls with a cosine and has no warm-up.
        precision, num_views, min_crop, test_crops, expand_px, keep_mb, seed, progress: see `FineTune`.

    Attributes:
        tuned_, counts_, scale_: see `FineTune`.
    """

    part = "adaptformer"
    head = "cosine"
    init = "text"
    reads = "penultimate"
    loss = "logit_adjustment"
    gamma = 0.0  # not used by this loss
    optimizer = "sgd"
    decay = "cosine"
    warmup_steps = 0
    sampling = "instance"
    wise_ft = None

    def __init__(  # its parent's stores what is a setting there, and fixed here
        self,
        model: Any = None,
        classes: Sequence[str] | None = None,
        *,
        prompts: str | Sequence[str] | None = None,
        adapter_dim: int | None = None,
        scale: float = COSINE_SCALE,
        tau: float = 1.0,
        epochs: float = 10,
        batch_size: int = 128,
        learning_rate: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        precision: str = "float32",
        num_views: int | None = None,
        min_crop: float = CROP_SCALE[0],
        test_crops: int = 5,
        expand_px: int | None = None,
        keep_mb: float = 2000,
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        self.model = model
        self.classes = classes
        self.prompts = prompts
        self.adapter_dim = adapter_dim
        self.scale = scale
        self.tau = tau
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.precision = precision
        self.num_views = num_views
        self.min_crop = min_crop
        self.test_crops = test_crops
        self.expand_px = expand_px
        self.keep_mb = keep_mb
        self.seed = seed
        self.progress = progress
