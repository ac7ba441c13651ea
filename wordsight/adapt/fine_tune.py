"""Fine-tuning an image tower, all of it or a part: last blocks, LoRA, AdaptFormer; for classes of equal or unequal size.

The model is never changed: what learns is a twin of its image tower, which holds copies of what learns and shares the rest. The
twin stays in evaluation mode: batch norms keep their statistics, nothing is dropped.

Optimizer, rate and epochs of "full" are those of WiSE-FT (arXiv 2109.01903), rank, alpha and rate of "lora" CLIP-LoRA's (arXiv
2405.18541): for large published models. Small ones learn little at such rates.

Shape legend: N pictures, B a batch, K crops, S image side in pixels, C classes, D width of what the head reads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from wordsight.adapt.decoder import class_vectors
from wordsight.adapt.estimator import AdaptedClassifier, Validation, _are_pictures, _labels, sample_weights
from wordsight.adapt.head_training import number
from wordsight.adapt.imbalanced import LDAM_SCALE, Schedule, class_counts, step_loss, train
from wordsight.adapt.parts import CROP_SCALE
from wordsight.adapt.picture_reader import CROPS, FRESH_VIEWS, PictureReader, batches_ahead
from wordsight.nn.adaptformer import add_adaptformer
from wordsight.nn.lora import add_lora
from wordsight.nn.tuning import SimilarityHead, behind, last_projection, projection_names, share_tower

PARTS = ("full", "last", "lora", "adaptformer")
HEADS = ("cosine", "linear")
INITS = ("text", "random")
READS = ("projected", "penultimate")
RATES = {"full": 3e-5, "last": 3e-5, "lora": 2e-4, "adaptformer": 1e-3}
COSINE_SCALE = 25.0  # LIFT's
CLASSIFY_AT_ONCE = 64  # views that the tower sees at once
EXPAND = 24 / 224  # LIFT's expanded side over the model's


class TunedTower(nn.Module):
    """Pixels through a twin of an image tower and a head.

    Attributes:
        tower: see `share_tower`.
        head: [B, D] -> [B, C].
    """

    def __init__(self, tower: nn.Module, head: SimilarityHead, preprocessor: Any, reads: str) -> None:
        super().__init__()
        self.tower, self.head = tower, head
        self._preprocessor, self._reads = preprocessor, reads

    def train(self, mode: bool = True) -> Self:
        """The tower stays in evaluation mode."""
        super().train(mode)
        self.tower.eval()
        return self

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> logits [B, C]."""
        return self.head(self.features(pixels_BCHW))

    def features(self, pixels_BCHW: Tensor) -> Tensor:
        """What the head reads, not normalised: uint8 [B, 3, S, S] -> [B, D]."""
        x = self._preprocessor.normalize(pixels_BCHW).to(self.head.weight.dtype)
        return self.tower(x) if self._reads == "projected" else self.tower.features(x)  # type: ignore[operator]

    def learned(self) -> dict[str, nn.Parameter]:
        """What differs from the model, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}


class FineTune(AdaptedClassifier):
    """An image tower that learns, all of it or a part, and a head: z_c = s cos(w_c, f), which starts as the zero-shot classifier.

    X is pictures: paths, PIL images, Samples or a Source. `fit` reads those to learn from anew in each epoch, decoded once where
    `keep_mb` allows.

    Args:
        model: an Embedder with an image tower; it is not changed.
        classes: C names; None takes those in y.
        prompts: of the text features, see `ZeroShot`.
        part: what learns beside the head: "full", all of the tower; "last", its last blocks (a convolutional tower's stages) and
            what stands behind them; "lora", a matrix of low rank beside queries, keys and values of each block; "adaptformer", a
            bottleneck beside each block's MLP. The last two are for vision transformers.
        last_blocks: of part="last".
        rank, alpha: of part="lora".
        adapter_dim: hidden width of part="adaptformer"; None: LIFT's rule, 2^floor(log2(C / 2 L)) with L blocks, at least 1.
        head: "cosine"; or "linear": z_c = s w_c f / |f| + b_c.
        init: "text", the classes' text features; or "random".
        reads: what the head reads: "projected", the embedding; or "penultimate", what the tower's projection reads, as in LIFT:
            text features are then taken back through that projection, and the start is only near zero-shot.
        scale: s; None: the model's own with init="text" on the embedding, else LIFT's 25; with LDAM its paper's 30.
        loss, gamma, tau: see `Decoder`.
        epochs: passes over the pictures, may be a fraction; 0 leaves all as it starts.
        batch_size, momentum, weight_decay, optimizer, decay, warmup_steps, sampling, precision: see `Schedule`.
        learning_rate: None: 3e-5 for "full" and "last", 2e-4 for "lora", 1e-3 for "adaptformer", all for AdamW. A random head
            wants more.
        num_views: random views of each picture (crops, flipped half of the time) to learn from; None: a new one each time; 0: the
            fixed view.
        min_crop: the least share of the picture's area that a random view keeps.
        test_crops: views that a picture is classified by, whose logits are averaged: 1, the model's own; 5, the middle and the
            corners of the picture at a larger size; 10, these mirrored too (LIFT's test-time ensemble).
        expand_px: how much larger; None: 24 of 224 px, as in LIFT.
        wise_ft: what lies between zero-shot and fine-tuned, see `wordsight.adapt.wise_ft`: the fine-tuned weights' share; or
            "validation": the share that is best there; None: all.
        keep_mb: megabytes of decoded pictures that stay in memory while learning; the others are decoded each time.
        seed: of weights, rows and views.
        progress: show a bar.

    Attributes:
        tuned_: the `TunedTower`.
        counts_: float64 [C], training pictures of each class, or the sum of their weights.
        scale_: s.
        wise_ft_: the fine-tuned weights' share; None: they are as they were learned.
    """

    layer = "pictures"  # type: ignore[assignment]  # no features: the tower changes
    wise_ft_: float | None
    saved = ("counts_", "scale_", "wise_ft_")

    def __init__(
        self,
        model: Any = None,
        classes: Sequence[str] | None = None,
        *,
        prompts: str | Sequence[str] | None = None,
        part: Literal["full", "last", "lora", "adaptformer"] = "full",
        last_blocks: int = 1,
        rank: int = 2,
        alpha: float = 1.0,
        adapter_dim: int | None = None,
        head: Literal["cosine", "linear"] = "cosine",
        init: Literal["text", "random"] = "text",
        reads: Literal["projected", "penultimate"] = "projected",
        scale: float | None = None,
        loss: str = "cross_entropy",
        gamma: float = 2.0,
        tau: float = 1.0,
        epochs: float = 10,
        batch_size: int = 128,
        learning_rate: float | None = None,
        momentum: float = 0.9,
        weight_decay: float = 0.1,
        optimizer: str = "adamw",
        decay: str = "cosine",
        warmup_steps: int | None = None,
        sampling: str = "instance",
        precision: str = "float32",
        num_views: int | None = None,
        min_crop: float = CROP_SCALE[0],
        test_crops: int = 1,
        expand_px: int | None = None,
        wise_ft: float | Literal["validation"] | None = None,
        keep_mb: float = 2000,
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        self.model = model
        self.classes = classes
        self.prompts = prompts
        self.part = part
        self.last_blocks = last_blocks
        self.rank = rank
        self.alpha = alpha
        self.adapter_dim = adapter_dim
        self.head = head
        self.init = init
        self.reads = reads
        self.scale = scale
        self.loss = loss
        self.gamma = gamma
        self.tau = tau
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.optimizer = optimizer
        self.decay = decay
        self.warmup_steps = warmup_steps
        self.sampling = sampling
        self.precision = precision
        self.num_views = num_views
        self.min_crop = min_crop
        self.test_crops = test_crops
        self.expand_px = expand_px
        self.wise_ft = wise_ft
        self.keep_mb = keep_mb
        self.seed = seed
        self.progress = progress

    def fit(self, X: Any, y: Any = None, *, validation: Validation | None = None, sample_weight: Any = None) -> Self:
        """Learn from pictures.

        Args:
            X: N pictures.
            y: N class names.
            validation: (X, y) of other pictures, by which wise_ft="validation" chooses; nothing else is chosen.
            sample_weight: [N], how much each picture counts in the loss and in the classes' counts, at least 0.

        Raises:
            ValueError: see `AdaptedClassifier.fit`; an unknown setting, a part that the tower does not have, features in place of
                pictures, weights that do not fit.
        """
        from wordsight.adapt.wise_ft import check_wanted, mix_as_wanted  # which is built on this class

        self._check_model()
        self._check_settings()
        check_wanted(self, validation)
        pictures, labels = self._pictures(X), _labels(X, y)
        weights_N = sample_weights(sample_weight, len(labels))
        if weights_N is not None and len(labels) == len(pictures):
            rows = weights_N.nonzero()[:, 0].tolist()
            pictures, labels, weights_N = [pictures[row] for row in rows], labels[rows], weights_N[rows]
        targets_N = self._learn_classes(labels, len(pictures))
        schedule = self._schedule(len(pictures))
        self.counts_ = class_counts(targets_N, weights_N, len(self.classes_))
        self.scale_ = self._start_scale()
        self.tuned_ = self._start()
        loss = step_loss(
            self.loss, self.counts_, steps=schedule.steps, gamma=self.gamma, tau=self.tau, head_scale=self._cosine_scale()
        )
        reader = PictureReader(self.model.preprocessor, pictures, seed=self.seed, min_crop=self.min_crop, keep_mb=self.keep_mb)
        num_views = FRESH_VIEWS if self.num_views is None else self.num_views
        train(self.tuned_, reader, targets_N, loss, schedule, num_views=num_views, weights_N=weights_N, progress=self.progress)
        self.wise_ft_ = None
        mix_as_wanted(self, validation)
        return self

    def logits(self, X: Any) -> Tensor:
        """What the probabilities are the softmax of: float32 [N, C] on the CPU."""
        check_is_fitted(self)
        reader = X if isinstance(X, PictureReader) else PictureReader(self.model.preprocessor, self._pictures(X))
        device = next(self.model.parameters()).device
        tuned = self.tuned_.to(device).eval()
        side = self.model.preprocessor.image_size_px
        expand_px = round(EXPAND * side) if self.expand_px is None else self.expand_px
        parts = [torch.empty(0, len(self.classes_))]
        with torch.no_grad():
            at_once = max(1, CLASSIFY_AT_ONCE // self.test_crops)
            for pixels_BKCHW in batches_ahead(reader, at_once, num_crops=self.test_crops, expand_px=expand_px):
                logits_BKC = tuned(pixels_BKCHW.flatten(0, 1).to(device)).unflatten(0, pixels_BKCHW.shape[:2])
                parts.append(logits_BKC.mean(1).float().cpu())
        return torch.cat(parts)

    # --------------------------------------------------------------------------------------------------------- inputs

    def _pictures(self, X: Any) -> Any:
        if not _are_pictures(X):
            raise ValueError(
                f"{type(self).__name__} changes the tower that looks at pictures, so it takes no features: give at least one "
                "path, PIL image or Sample"
            )
        return X

    def _check_model(self) -> None:
        super()._check_model()
        if getattr(self.model, "image_tower", None) is None or getattr(self.model, "preprocessor", None) is None:
            raise ValueError(f"{type(self.model).__name__} has no image tower with preprocessing that could be fine-tuned")
        dtype = next(self.model.image_tower.parameters()).dtype
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"the model's weights are {dtype}, too coarse to learn by small steps: use model.float()")

    def _check_settings(self) -> None:
        choices = {"part": PARTS, "head": HEADS, "init": INITS, "reads": READS, "test_crops": CROPS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {getattr(self, name)!r}")
        number(self, "epochs", 0)
        number(self, "keep_mb", 0)
        if self.scale is not None:
            number(self, "scale", 0, above=True)
        for name in ("num_views", "expand_px"):
            if getattr(self, name) is not None:
                number(self, name, 0, whole=True)
        number(self, "batch_size", 1, whole=True)
        step_loss(self.loss, torch.ones(2), steps=1, head_scale=self._cosine_scale())

    def _schedule(self, num_pictures: int) -> Schedule:
        rate = RATES[self.part] if self.learning_rate is None else self.learning_rate
        return Schedule.of(self, steps=math.ceil(self.epochs * num_pictures / self.batch_size), learning_rate=rate)

    # ---------------------------------------------------------------------------------------------------------- start

    def _cosine_scale(self) -> float | None:
        """What a cosine head multiplies by, as LDAM wants to know it."""
        return self._start_scale() if self.head == "cosine" else None

    def _start_scale(self) -> float:
        if self.scale is not None:
            return float(self.scale)
        if self.loss == "ldam":
            return LDAM_SCALE
        return self._scale() if self.init == "text" and self.reads == "projected" else COSINE_SCALE

    def _start(self) -> TunedTower:
        """Tower and head before the first step, on the model's device."""
        tuned = self._build()
        if self.init == "text":
            with torch.no_grad():
                tuned.head.weight.copy_(self._text_rows())
        return tuned

    def _text_rows(self) -> Tensor:
        """Text features as rows for what the head reads: [C, D]."""
        text_CD = class_vectors(self)
        return text_CD if self.reads == "projected" else text_CD @ last_projection(self.model.image_tower)[0].T

    def _build(self) -> TunedTower:
        """Tower and head with the model's weights and drawn ones, on the model's device; sets `n_features_in_`."""
        tower = self.model.image_tower
        device = next(tower.parameters()).device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            twin = self._twin(tower)
            side = self.model.preprocessor.image_size_px
            blank = torch.zeros(1, 3, side, side, device=device, dtype=next(tower.parameters()).dtype)
            with torch.no_grad():
                read = twin(blank) if self.reads == "projected" else twin.features(blank)  # type: ignore[operator]
            self.n_features_in_ = read.shape[1]
            head = SimilarityHead(read.shape[1], len(self.classes_), self.scale_, cosine=self.head == "cosine").to(read)
        return TunedTower(twin, head, self.model.preprocessor, self.reads)

    def _twin(self, tower: nn.Module) -> nn.Module:
        """The tower with what learns in it."""
        unread = projection_names(tower) if self.reads == "penultimate" else ()
        if self.part in ("full", "last"):
            learns = behind(tower, self.last_blocks) if self.part == "last" else (lambda name: True)
            return share_tower(tower, lambda name: learns(name) and not (unread and name.startswith(unread)))
        twin = share_tower(tower, lambda name: False)
        if self.part == "lora":
            add_lora(twin, self.rank, self.alpha)
        else:
            add_adaptformer(twin, len(self.classes_), self.adapter_dim)
        return twin

    # ---------------------------------------------------------------------------------------------------------- files

    def _fitted_values(self) -> dict[str, Any]:
        tensors = {f"tuned_.{name}": value for name, value in self.tuned_.learned().items()}
        return {**super()._fitted_values(), **tensors}

    def _restore(self, values: dict[str, Any]) -> None:
        super()._restore(values)
        tuned = self._build()
        learned, start = tuned.learned(), "tuned_."
        found = {name[len(start) :]: value for name, value in values.items() if name.startswith(start)}
        if {name: value.shape for name, value in found.items()} != {name: value.shape for name, value in learned.items()}:
            raise ValueError(
                f"the file of a {type(self).__name__} does not fit its settings: it is damaged, or of another version"
            )
        with torch.no_grad():
            for name, parameter in learned.items():
                parameter.copy_(found[name])
        self.tuned_ = tuned.eval()
