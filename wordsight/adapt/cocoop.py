"""CoCoOp: a small network moves the learned context by what is in the picture (arXiv 2203.05557).

Shape legend: V views, N pictures, B a batch, C classes, D embedding width, M context tokens, W width of the text
tower, H hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, relu

from wordsight.adapt.estimator import AdaptedClassifier, class_list
from wordsight.adapt.prompt_encoder import CHUNK_TOKENS, PromptEncoder
from wordsight.adapt.prompt_training import Precision, check_settings, class_logits, first_context, make_encoder, train

MetaNet = tuple[Tensor, Tensor, Tensor, Tensor]  # weight [H, D] and bias [H], weight [W, H] and bias [W]
REDUCTION = 16  # D over H


class CoCoOp(AdaptedClassifier):
    """p(c | x) = softmax_c(exp(log_scale) cos(x, text([context + shift(x)] name_c .))), shift = Linear(ReLU(Linear(x))).

    Every picture has prompts of its own: x, of unit length, gives one vector that is added to all context tokens. Context and
    shift learn by cross-entropy; towers and scale stand still. It differs from the published code in what it costs: pictures x
    classes are encoded together, each picture's context once (`PromptEncoder`). Validation pictures are not used.

    Args:
        model: an Embedder whose text tower takes token embeddings.
        classes: C names; None takes those in y.
        num_context_tokens: M; with `init` the number of its tokens is taken.
        init: words that the context starts from; None: normal numbers of deviation .02.
        epochs: over the pictures; None: as in `CoOp`.
        batch_size: pictures a step.
        seed: of what learns, the order of pictures and the random views.
        learning_rate: where the cosine starts; the first epoch has 1e-5.
        momentum: of SGD.
        weight_decay: of SGD.
        precision: "fp32" (the model's own) or "bf16" (autocast) in training.
        published_tokens: see `prompts.lay_out`.
        class_chunk_tokens: see `PromptEncoder`; bounds memory.
        exact_reference: see `PromptEncoder`; slow.
        num_views: V random views of each picture, of which epoch e takes e mod V; 0: the fixed view.
        progress: show a bar.

    Attributes:
        context_: float32 [M, W].
        hidden_weight_, hidden_bias_: float32 [H, D] and [H], the first layer of the shift; H is D // 16.
        shift_weight_, shift_bias_: float32 [W, H] and [W], the second.
        scale_: exp(log_scale).
        loss_curve_: mean training loss of each epoch.
    """

    saved = ("context_", "hidden_weight_", "hidden_bias_", "shift_weight_", "shift_bias_", "scale_", "loss_curve_")

    def __init__(
        self,
        model: Any = None,
        classes: Sequence[str] | None = None,
        num_context_tokens: int = 4,
        init: str | None = "a photo of a",
        epochs: int | None = 10,
        batch_size: int = 1,
        seed: int = 0,
        *,
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
        self.init = init
        self.epochs = epochs
        self.batch_size = batch_size
        self.seed = seed
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
    def from_context(cls, model: Any, classes: Sequence[str], context: Tensor, meta_net: MetaNet, **settings: Any) -> Self:
        """A fitted classifier from a context and a network that have been learned elsewhere.

        Args:
            model: as in the class.
            classes: C names.
            context: [M, W].
            meta_net: weight [H, D] and bias [H] of the first layer, weight [W, H] and bias [W] of the second.
            settings: of the class, such as `published_tokens`.

        Raises:
            ValueError: shapes that do not fit each other or the model, or numbers that are infinite or undefined.
        """
        if context.ndim != 2:
            raise ValueError(f"CoCoOp's context is [M, W] (tokens, width), got a tensor of {tuple(context.shape)}")
        made = cls(model, classes=list(classes), num_context_tokens=len(context), init=None, **settings)
        made._check_model()
        made.classes_ = class_list(classes)
        hidden, width = len(meta_net[0]), context.shape[1]
        shapes, wanted = (
            [tuple(tensor.shape) for tensor in meta_net],
            [(hidden, *meta_net[0].shape[1:]), (hidden,), (width, hidden), (width,)],
        )
        if meta_net[0].ndim != 2 or shapes != wanted:
            raise ValueError(f"meta_net is [H, D], [H], [W, H], [W] with W = {width} as the context's, got {shapes}")
        made._take([context, *meta_net], [])
        # so that a context of another width is named here
        encoder = made._encoder()
        with torch.no_grad():
            encoder(made.context_.to(encoder.device))
        return made

    def with_classes(self, classes: Sequence[str]) -> Self:
        """What was learned around other class names: a new classifier, fitted (base-to-new)."""
        check_is_fitted(self)
        made = type(self)(**{**self.get_params(deep=False), "classes": list(classes)})
        made.classes_ = class_list(classes)
        made._take(self._learned(), self.loss_curve_)
        made._encoder()  # names that make no prompt are named here
        return made

    def _fit(self, features_VND: Tensor, targets_N: Tensor, validation: tuple[Tensor, Tensor] | None) -> None:
        check_settings(self)
        encoder = self._encoder()
        generator = torch.Generator().manual_seed(self.seed)
        context = first_context(self, encoder, generator)
        parameters = [p.to(encoder.device).requires_grad_() for p in (context, *self._first_meta_net(encoder.width))]
        features_VND, targets_N, scale = features_VND.to(encoder.device), targets_N.to(encoder.device), self._scale()

        def loss(epoch: int, rows_B: Tensor) -> Tensor:
            rows_B = rows_B.to(encoder.device)
            view_BD = features_VND[epoch % len(features_VND), rows_B]
            with torch.autocast(encoder.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                text_BCD = encoder(_shifted(parameters, view_BD))
            return cross_entropy(class_logits(view_BD, text_BCD, scale), targets_N[rows_B])

        self._take(parameters, train(self, parameters, loss, targets_N, generator))

    def _logits(self, features_ND: Tensor) -> Tensor:
        encoder = self._encoder()
        learned = [tensor.to(encoder.device) for tensor in self._learned()]
        rows = []
        for some_BD in features_ND.to(encoder.device).split(encoder.contexts_at_once):
            rows.append(class_logits(some_BD, encoder(_shifted(learned, some_BD)), self.scale_))
        return torch.cat(rows)

    def _encoder(self) -> PromptEncoder:
        return make_encoder(self, [str(name) for name in self.classes_])

    def _first_meta_net(self, width: int) -> MetaNet:
        """Both layers as PyTorch starts them, drawn by the seed."""
        num_features = self.n_features_in_
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            first = nn.Linear(num_features, max(1, num_features // REDUCTION))
            second = nn.Linear(first.out_features, width)
        return first.weight.detach(), first.bias.detach(), second.weight.detach(), second.bias.detach()

    def _learned(self) -> list[Tensor]:
        return [self.context_, self.hidden_weight_, self.hidden_bias_, self.shift_weight_, self.shift_bias_]

    def _take(self, learned: Sequence[Tensor], loss_curve: list[float]) -> None:
        """Become fitted."""
        if not all(torch.isfinite(tensor).all() for tensor in learned):
            raise ValueError("the context or its network holds numbers that are infinite or undefined (NaN)")
        kept = [tensor.detach().float().cpu() for tensor in learned]
        self.context_, self.hidden_weight_, self.hidden_bias_, self.shift_weight_, self.shift_bias_ = kept
        self.n_features_in_ = self.hidden_weight_.shape[1]
        self.scale_ = self._scale()
        self.loss_curve_ = loss_curve


def _shifted(learned: Sequence[Tensor], features_BD: Tensor) -> Tensor:
    """The context of each picture: [B, M, W]."""
    context_MW, hidden_weight, hidden_bias, shift_weight, shift_bias = learned
    hidden_BH = relu(linear(features_BD, hidden_weight, hidden_bias))
    return context_MW + linear(hidden_BH, shift_weight, shift_bias)[:, None]
