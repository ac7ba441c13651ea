"""Zero-shot classification as an estimator: class names and prompts alone (CLIP, arXiv 2103.00020, section 3.1).

Shape legend: N pictures, V views, C classes, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from torch import Tensor

from wordsight.adapt.estimator import AdaptedClassifier, Validation, _labels, class_list


class ZeroShot(AdaptedClassifier):
    """p(c | x) = softmax_c(exp(log_scale) cos(image, text_c)), with text_c the class's prompts ensembled in embedding space.

    `fit` needs no pictures: it embeds the class names. The bias of a sigmoid model cancels in the softmax.

    Args:
        model: an Embedder.
        classes: C names; None takes those in y.
        prompts: a named set ("simple", "name", "imagenet80"), a file or templates with `{label}`; None: those that the model
            was trained for, else "simple".
        seed: not used; every method has one.

    Attributes:
        class_vectors_: float32 [C, D], unit length.
        scale_: exp(log_scale).
    """

    needs_every_class = False
    saved = ("class_vectors_", "scale_")

    def __init__(
        self,
        model: Any = None,
        classes: Sequence[str] | None = None,
        *,
        prompts: str | Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.classes = classes
        self.prompts = prompts
        self.seed = seed

    def fit(self, X: Any = None, y: Any = None, *, validation: Validation | None = None) -> Self:
        """Embed the class names; pictures are looked at only for their labels' names, where `classes` is None.

        Raises:
            ValueError: neither class names nor labels, a name twice, one class alone.
        """
        self._check_model()
        if self.classes is None:
            self.classes_ = np.unique(_labels(X, y))
        else:
            self.classes_ = class_list(self.classes)
            if y is not None:
                self._targets(_labels(X, y))  # names a label that is not among the classes
        if len(self.classes_) < 2:
            raise ValueError(f"ZeroShot needs at least 2 classes, got one class: {self.classes_.tolist()[0]!r}")
        self.class_vectors_ = self._text_features()
        self.n_features_in_ = self.class_vectors_.shape[1]
        self.scale_ = self._scale()
        return self

    def with_classes(self, classes: Sequence[str]) -> Self:
        """The same for other class names: a new classifier, fitted."""
        made = type(self)(**{**self.get_params(deep=False), "classes": list(classes)})
        return made.fit()

    def _logits(self, features_ND: Tensor) -> Tensor:
        return self.scale_ * features_ND @ self.class_vectors_.T
