"""CoOp: the words around a class name are vectors that learn, and nothing else does (arXiv 2109.01134).

For classes of unequal size it learns by the losses of the long tail too, as in arXiv 2304.01457.

Shape legend: V views, N pictures, B a batch, C classes, D embedding width, M context tokens, W width of the text tower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from typing import Any, Literal, Self

import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from wordsight.adapt.estimator import AdaptedClassifier, Validation, class_list
from wordsight.adapt.imbalanced import LDAM_SCALE, SAMPLINGS, class_counts, step_loss
from wordsight.adapt.prompt_encoder import CHUNK_TOKENS, PromptEncoder, tokenizer_of
from wordsight.adapt.prompt_training import (
    Precision,
    check_settings,
    class_logits,
    first_context,
    make_encoder,
    plan,
    train,
)

WORDS_AT_ONCE = 256  # context vectors whose distances to the whole vocabulary are held


class CoOp(AdaptedClassifier):
    """p(c | x) = softmax_c(exp(log_scale) cos(image, text([context] name_c .))), the context learned by a loss.

    Towers and scale stand still. It differs from the published code in what it costs: prompts are encoded exactly, but without
    the tokens that change nothing (`PromptEncoder`), and pictures once. Its random crops are `num_views` drawn beforehand: with
    as many as epochs each epoch has its own, as published. It chooses nothing, so validation pictures are not used.

    Args:
        model: an Embedder whose text tower takes token embeddings.
        classes: C names; None takes those in y.
        num_context_tokens: M; with `init` the number of its tokens is taken.
        position: "end", "middle" or "front", where the class name stands.
        class_specific: whether each class learns a context of its own.
        init: words that the context starts from; None: normal numbers of deviation .02.
        epochs: None: 50 with 1 shot a class, 100 with 2 to 4, 200 with 8 and more (by the class that has most).
        seed: of the first context, the order of pictures and the random views.
        batch_size: pictures a step.
        learning_rate: where the cosine starts; the first epoch has 1e-5.
        momentum: of SGD.
        weight_decay: of SGD, on the context.
        loss: "cross_entropy" as published, or another of `wordsight.adapt.imbalanced.LOSSES`, with the counts of y. "ldam" has
            its own scale, 30, in the place of exp(log_scale), in training and after it: its margins lie between cosines.
        gamma: of loss="focal".
        tau: of loss="logit_adjustment".
        sampling: "instance": each epoch is all pictures once; "class_balanced": as many are drawn, every class equally often.
        precision: "fp32" (the model's own) or "bf16" (autocast) in training.
        published_tokens: see `prompts.lay_out`.
        class_chunk_tokens: see `PromptEncoder`; bounds memory.
        exact_reference: see `PromptEncoder`; slow.
        num_views: V random views of each picture, of which epoch e takes e mod V; 0: the fixed view.
        progress: show a bar.

    Attributes:
        context_: float32 [M, W], or [C, M, W] class-specific.
        class_vectors_: float32 [C, D], unit length.
        scale_: exp(log_scale); 30 with LDAM.
        loss_curve_: mean training loss of each epoch.
    """

    saved = ("context_", "class_vectors_", "scale_", "loss_curve_")

    def __init__(
        self,
        model: Any = None,
        classes: Sequence[str] | None = None,
        num_context_tokens: int = 16,
        position: Literal["end", "middle", "front"] = "end",
        class_specific: bool = False,
        init: str | None = None,
        epochs: int | None = None,
        seed: int = 0,
        *,
        batch_size: int = 32,
        learning_rate: float = 0.002,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        loss: str = "cross_entropy",
        gamma: float = 2.0,
        tau: float = 1.0,
        sampling: str = "instance",
        precision: Precision = "fp32",
        published_tokens: bool = False,
        class_chunk_tokens: int = CHUNK_TOKENS,
        exact_reference: bool = False,
        num_views: int = 0,
        progress: bool = False,
    ) -> None:
        self.model = model
        self.classes = classes
        self.num_context_tokens = num_context_tokens
        self.position = position
        self.class_specific = class_specific
        self.init = init
        self.epochs = epochs
        self.seed = seed
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.loss = loss
        self.gamma = gamma
        self.tau = tau
        self.sampling = sampling
        self.precision = precision
        self.published_tokens = published_tokens
        self.class_chunk_tokens = class_chunk_tokens
        self.exact_reference = exact_reference
        self.num_views = num_views
        self.progress = progress

    def fit(self, X: Any, y: Any = None, *, validation: Validation | None = None, sample_weight: Any = None) -> Self:
        """Learn from pictures or their features, see `AdaptedClassifier.fit`.

        Args:
            X, y, validation: see there.
            sample_weight: [N], how much each picture counts in the loss and in the classes' counts, at least 0: of labels that
                may be wrong. One of 0 is as if it were not there.
        """
        return self._learn(X, y, validation, sample_weight)

    @classmethod
    def from_context(cls, model: Any, classes: Sequence[str], context: Tensor, **settings: Any) -> Self:
        """A fitted classifier from a context that has been learned elsewhere.

        Args:
            model: as in the class.
            classes: C names.
            context: [M, W]; or [C, M, W], whose rows follow `classes` as they are given.
            settings: of the class, such as `position` and `published_tokens`.

        Raises:
            ValueError: a context of another shape or width, or with numbers that are infinite or undefined.
        """
        if context.ndim not in (2, 3):
            raise ValueError(
                f"a context is [M, W] (tokens, width), or [C, M, W] with one a class, got a tensor of {tuple(context.shape)}"
            )
        made = cls(
            model,
            classes=list(classes),
            num_context_tokens=context.shape[-2],
            class_specific=context.ndim == 3,
            **settings,
        )
        made._check_model()
        made.classes_ = class_list(classes)
        if made.class_specific and len(context) == len(made.classes_):
            places = {str(name): i for i, name in enumerate(classes)}
            context = context[[places[name] for name in made.classes_.tolist()]]
        made._take(context, [])
        return made

    def with_classes(self, classes: Sequence[str]) -> Self:
        """The learned context around other class names: a new classifier, fitted (base-to-new).

        Raises:
            ValueError: the context is class-specific, so there is none for a new class.
        """
        check_is_fitted(self)
        if self.class_specific:
            raise ValueError(
                "a class-specific context belongs to the classes that it was learned for, so there is none for new ones: learn a "
                "context that all classes share (class_specific=False)"
            )
        made = type(self)(**{**self.get_params(deep=False), "classes": list(classes)})
        made.classes_ = class_list(classes)
        made._take(self.context_, self.loss_curve_)
        return made

    def nearest_words(self, k: int = 5) -> list[Any]:
        """The k vocabulary words nearest to each learned vector, by Euclidean distance, as (word, distance).

        Returns:
            A list of k a context token; with a class-specific context a list of such lists, one a class.

        Raises:
            ValueError: k is not in [1, vocabulary].
        """
        check_is_fitted(self)
        encoder = make_encoder(self, [str(name) for name in self.classes_])
        vocabulary_VW = encoder.token_embedding.double()
        if not 1 <= k <= len(vocabulary_VW):
            raise ValueError(f"k must be in [1, {len(vocabulary_VW)}], got {k}")
        tokenizer = tokenizer_of(self.model)
        found = []
        for some_nW in self.context_.flatten(0, -2).to(vocabulary_VW).split(WORDS_AT_ONCE):
            nearest = torch.cdist(some_nW, vocabulary_VW).topk(k, dim=1, largest=False)
            for ids, distances in zip(nearest.indices.tolist(), nearest.values.tolist(), strict=True):
                # what ends, starts or fills a text has no word
                words = [tokenizer.decode([i]) or f"<token {i}>" for i in ids]
                found.append(list(zip(words, distances, strict=True)))
        if not self.class_specific:
            return found
        num_tokens = self.context_.shape[1]
        return [found[start : start + num_tokens] for start in range(0, len(found), num_tokens)]

    def _fit(
        self,
        features_VND: Tensor,
        targets_N: Tensor,
        validation: tuple[Tensor, Tensor] | None,
        weights_N: Tensor | None = None,
    ) -> None:
        check_settings(self)
        if self.sampling not in SAMPLINGS:
            raise ValueError(f"sampling must be one of {', '.join(SAMPLINGS)}, got {self.sampling!r}")
        encoder = make_encoder(self, [str(name) for name in self.classes_])
        generator = torch.Generator().manual_seed(self.seed)
        context = first_context(self, encoder, generator).requires_grad_()
        loss = partial(self._objective(encoder, features_VND, targets_N, weights_N), context)
        self._take(context, train(self, [context], loss, targets_N, generator))

    def _objective(
        self, encoder: PromptEncoder, features_VND: Tensor, targets_N: Tensor, weights_N: Tensor | None
    ) -> Callable[[Tensor, int, Tensor], Tensor]:
        """(context, epoch, rows [B]) -> the loss of a step, which is asked for once a step."""
        epochs, _, num_batches = plan(self, targets_N)
        device, scale, steps = encoder.device, self._scale(), count()
        of_counts = step_loss(
            self.loss,
            class_counts(targets_N, weights_N, len(self.classes_)),
            steps=epochs * num_batches,
            gamma=self.gamma,
            tau=self.tau,
            head_scale=scale,
        )
        is_plain = self.loss == "cross_entropy" and weights_N is None
        features_VND, targets_N = features_VND.to(device), targets_N.to(device)

        def loss(context: Tensor, epoch: int, rows_B: Tensor) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                text_CD = encoder(context)
            view_BD = features_VND[epoch % len(features_VND), rows_B.to(device)]
            logits_BC, targets_B = class_logits(view_BD, text_CD, scale), targets_N[rows_B.to(device)]
            if is_plain:
                return cross_entropy(logits_BC, targets_B)
            return of_counts(logits_BC, targets_B, None if weights_N is None else weights_N[rows_B].to(device), next(steps))

        return loss

    def _scale(self) -> float:
        return LDAM_SCALE if self.loss == "ldam" else super()._scale()

    def _take(self, context: Tensor, loss_curve: list[float]) -> None:
        """Become fitted with a context: the class vectors are computed here, once."""
        if not torch.isfinite(context).all():
            raise ValueError("the context holds numbers that are infinite or undefined (NaN)")
        self.context_ = context.detach().float().cpu()
        encoder = make_encoder(self, [str(name) for name in self.classes_])
        with torch.no_grad():
            self.class_vectors_ = normalize(encoder(self.context_.to(encoder.device)).float(), dim=1).cpu()
        self.n_features_in_ = self.class_vectors_.shape[1]
        self.scale_ = self._scale()
        self.loss_curve_ = loss_curve

    def _logits(self, features_ND: Tensor) -> Tensor:
        return class_logits(features_ND, self.class_vectors_, self.scale_)
