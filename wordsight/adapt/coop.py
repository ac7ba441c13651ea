"""CoOp: the words around a class name are vectors that learn, and nothing else does (arXiv 2109.01134).

Shape legend: V views, N pictures, B a batch, C classes, D embedding width, M context tokens, W width of the text tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from wordsight.adapt.estimator import AdaptedClassifier, class_list
from wordsight.adapt.prompt_encoder import CHUNK_TOKENS, tokenizer_of
from wordsight.adapt.prompt_training import (
    Precision,
    check_settings,
    class_logits,
    first_context,
    make_encoder,
    train,
)

WORDS_AT_ONCE = 256  # context vectors whose distances to the whole vocabulary are held


class CoOp(AdaptedClassifier):
    """p(c | x) = softmax_c(exp(log_scale) cos(image, text([context] name_c .))), the context learned by cross-entropy.

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
        precision: "fp32" (the model's own) or "bf16" (autocast) in training.
        published_tokens: see `prompts.lay_out`.
        class_chunk_tokens: see `PromptEncoder`; bounds memory.
        exact_reference: see `PromptEncoder`; slow.
        num_views: V random views of each picture, of which epoch e takes e mod V; 0: the fixed view.
        progress: show a bar.

    Attributes:
        context_: float32 [M, W], or [C, M, W] class-specific.
        class_vectors_: float32 [C, D], unit length.
        scale_: exp(log_scale).
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
        self.precision = precision
        self.published_tokens = published_tokens
        self.class_chunk_tokens = class_chunk_tokens
        self.exact_reference = exact_reference
        self.num_views = num_views
        self.progress = progress

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

    def _fit(self, features_VND: Tensor, targets_N: Tensor, validation: tuple[Tensor, Tensor] | None) -> None:
        check_settings(self)
        encoder = make_encoder(self, [str(name) for name in self.classes_])
        generator = torch.Generator().manual_seed(self.seed)
        context = first_context(self, encoder, generator).requires_grad_()
        features_VND, targets_N, scale = features_VND.to(encoder.device), targets_N.to(encoder.device), self._scale()

        def loss(epoch: int, rows_B: Tensor) -> Tensor:
            with torch.autocast(encoder.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                text_CD = encoder(context)
            view_BD = features_VND[epoch % len(features_VND), rows_B.to(encoder.device)]
            return cross_entropy(class_logits(view_BD, text_CD, scale), targets_N[rows_B.to(encoder.device)])

        self._take(context, train(self, [context], loss, targets_N, generator))

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
