"""CLAP: a linear probe that starts at the class names and is held near them, class by class (arXiv 2312.12730).

loss = CE(scale cos(f, w_c)) + mean_c lambda_c |w_c - t_c|^2, where lambda_c is how sure zero-shot is of class c's own pictures
and t_c the class name's text feature, not normalised.

Shape legend: N pictures, V views, C classes, D feature width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from wordsight.adapt.estimator import AdaptedClassifier
from wordsight.adapt.head_training import cosine_logits, number, train_head
from wordsight.adapt.prompt_training import learning_rate_at
from wordsight.evaluate.modes import judging
from wordsight.evaluate.prompts import fill, own_prompts, prompt_templates


class CLAP(AdaptedClassifier):
    """CLAP, and with pull=False the paper's ZS-LP; SGD with CoOp's schedule.

    Published: 20 views of each picture are encoded once (num_views=20); an epoch takes max(1, N // batch_size) batches of all
    V N rows, shuffled. The learning rate suits text features of CLIP's lengths (about 10): the loss knows directions alone, so
    that twice as long vectors turn a quarter as fast.

    Args:
        model: an Embedder.
        classes: C names; None takes those in y.
        prompts: see `ZeroShot`.
        pull: whether class vectors are held near the texts.
        epochs: see above.
        learning_rate, momentum: of SGD.
        batch_size: rows a step.
        num_views: random views a picture; 0: the fixed one.
        seed: of the views and the order.
        progress: show a bar.

    Attributes:
        class_vectors_: float32 [C, D], unit length.
        scale_: exp(log_scale).
        pull_: float32 [C], lambda_c; zeros without a pull.
        loss_curve_: mean loss of each epoch.
    """

    saved = ("class_vectors_", "scale_", "pull_", "loss_curve_")

    def __init__(
        self,
        model: Any = None,
        classes: Sequence[str] | None = None,
        *,
        prompts: str | Sequence[str] | None = None,
        pull: bool = True,
        epochs: int = 300,
        learning_rate: float = 0.1,
        momentum: float = 0.9,
        batch_size: int = 256,
        num_views: int = 0,
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        self.model = model
        self.classes = classes
        self.prompts = prompts
        self.pull = pull
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.batch_size = batch_size
        self.num_views = num_views
        self.seed = seed
        self.progress = progress

    def _fit(self, features_VND: Tensor, targets_N: Tensor, validation: tuple[Tensor, Tensor] | None) -> None:
        number(self, "epochs", 1, whole=True)
        number(self, "batch_size", 1, whole=True)
        number(self, "learning_rate", 0, above=True)
        number(self, "momentum", 0)
        text_CD, self.scale_ = self._raw_text_features(), self._scale()
        rows_RD, targets_R = features_VND.flatten(0, 1), targets_N.repeat(len(features_VND))
        self.pull_ = zero_shot_certainty(cosine_logits(rows_RD, text_CD, self.scale_), targets_R) * float(self.pull)
        vectors_CD = text_CD.clone().requires_grad_()
        generator = torch.Generator().manual_seed(self.seed)

        def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
            order_R = torch.randperm(len(targets_R), generator=generator)
            for rows_B in order_R.split(self.batch_size)[: max(1, len(targets_N) // self.batch_size)]:
                yield rows_RD[rows_B], targets_R[rows_B]

        def loss(features_BD: Tensor, targets_B: Tensor) -> Tensor:
            fit = cross_entropy(cosine_logits(features_BD, vectors_CD, self.scale_), targets_B)
            return fit + (self.pull_ * (vectors_CD - text_CD).square().sum(1)).mean()

        optimizer = torch.optim.SGD([vectors_CD], lr=self.learning_rate, momentum=self.momentum)
        self.loss_curve_ = train_head(
            self,
            optimizer,
            batches,
            loss,
            lambda step, epoch: learning_rate_at(epoch, self.epochs, self.learning_rate),
            self.epochs,
        )
        self.class_vectors_ = normalize(vectors_CD.detach(), dim=1)

    def _raw_text_features(self) -> Tensor:
        """The mean over templates of each class's text features as the tower gives them: float32 [C, D]."""
        self._text_features()  # says where pictures and texts do not fit together
        templates = prompt_templates(own_prompts(self.model) if self.prompts is None else self.prompts)
        means = []
        with judging(self.model) as device:
            for name in self.classes_:
                tokens = self.model.tokenize([fill(template, str(name)) for template in templates]).to(device)
                means.append(self.model.encode_text(tokens, normalize=False).float().mean(0).cpu())
        return torch.stack(means).clone()

    def _logits(self, features_ND: Tensor) -> Tensor:
        return self.scale_ * features_ND @ self.class_vectors_.T


def zero_shot_certainty(logits_NC: Tensor, targets_N: Tensor) -> Tensor:
    """The mean probability of the right class over each class's pictures: [C]."""
    own_N = logits_NC.softmax(1).gather(1, targets_N[:, None])[:, 0]
    sums_C = torch.zeros(logits_NC.shape[1]).index_add_(0, targets_N, own_N)
    return sums_C / targets_N.bincount(minlength=logits_NC.shape[1])
