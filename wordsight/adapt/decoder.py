"""A light decoder on all tokens of a frozen image tower, for classes of unequal size (arXiv 2304.01457, section 4).

The module is `wordsight.nn.decoder`, the losses `wordsight.losses.imbalance`, the tokens `wordsight.adapt.token_cache`. Where the
published code draws a new view of a picture each time, `num_views` are drawn beforehand here, and the tower runs once.

Shape legend: N pictures, T tokens, W their width, C classes, D embedding width, V views.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from wordsight.adapt.estimator import AdaptedClassifier, Validation, _are_pictures, _labels, sample_weights
from wordsight.adapt.features import ImageFeatures
from wordsight.adapt.imbalanced import LDAM_SCALE, Schedule, class_counts, step_loss, train
from wordsight.adapt.token_cache import DTYPES, Tokens, cache_tokens, has_class_token, token_identity, tower_tokens
from wordsight.nn.decoder import HEADS, CosineHead, DecoderConfig, TokenDecoder, read_out

COSINE_SCALE = 25.0  # LIFT's
INITS = ("random", "text")
READ_AT_ONCE = 128  # pictures whose tokens are held when classifying


@dataclass(frozen=True, kw_only=True)
class HeldTokens(Tokens):
    """Tokens in memory: `values` [N, T, W]."""

    values: Tensor = field(repr=False)

    def _read(self, rows_B: np.ndarray, views_B: np.ndarray) -> Tensor:
        return self.values[torch.from_numpy(rows_B)].float()


class Decoder(AdaptedClassifier):
    """Transformer blocks on the tower's tokens, the class token's output (or that of the tokens' mean), a head.

    X is pictures; `Tokens`, of which `TokenCache` is one, in place of the pictures; or an array of tokens [N, T, W], or [N, W] of
    one token each. Pictures to learn from are put through the tower once, those to classify as they come.

    Args:
        model: an Embedder whose image tower gives its tokens; None with tokens.
        classes: C names; None takes those in y.
        prompts: of the text features, see `ZeroShot`.
        loss: one of `wordsight.adapt.imbalanced.LOSSES`. "ldam" is as in its paper: between cosines, scale 30, classes weighed
            by their effective number in the last fifth of the steps.
        gamma: of loss="focal".
        tau: of loss="logit_adjustment".
        stage2: what is done to the head after that, one of `second_stage.KINDS`; None: nothing.
        num_layers, num_heads, mlp_ratio: of the blocks; num_layers=0 leaves the head alone on the first token.
        head: "linear" or "cosine" (scale 25, with LDAM 30); None: linear, but cosine with LDAM, and with init="text" as in LIFT.
        init: "random"; or "text": the head starts from the classes' text features, taken back through the tower's projection, and
            the blocks from passing their input on, behind the tower's own last norm: what is learned starts as zero-shot does.
        steps, batch_size, learning_rate, momentum, weight_decay, warmup_steps, sampling, precision: see `Schedule`; the defaults
            are the published ones. The last step's weights are kept.
        num_views: random views (crops of 8 to 100%, flipped half of the time) to learn from, drawn beforehand; 0: the fixed view.
        cache: a folder for the tokens of pictures to learn from; None: one that is removed after the fit.
        token_kind: how they are kept there, see `cache_tokens`.
        seed: of weights, rows and views.
        progress: show bars.

    Attributes:
        decoder_: the `TokenDecoder`.
        counts_: float64 [C], training pictures of each class, or the sum of their weights.
        second_stage_: what was done to the head after it was trained: "none", or one of `second_stage.KINDS`.
        second_stage_tau_: its tau, or None.
    """

    layer = "tokens"  # type: ignore[assignment]  # which no `ImageFeatures` holds
    unit_length = False
    needs_model = False
    second_stage_tau_: float | None
    saved = ("counts_", "second_stage_", "second_stage_tau_")

    def __init__(
        self,
        model: Any = None,
        classes: Sequence[str] | None = None,
        *,
        prompts: str | Sequence[str] | None = None,
        loss: str = "cross_entropy",
        gamma: float = 2.0,
        tau: float = 1.0,
        stage2: str | None = None,
        num_layers: int = 3,
        num_heads: int = 4,
        mlp_ratio: float = 0.5,
        head: str | None = None,
        init: str = "random",
        steps: int = 8192,
        batch_size: int = 256,
        learning_rate: float = 0.03,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        warmup_steps: int | None = None,
        sampling: str = "instance",
        precision: str = "float32",
        num_views: int = 0,
        cache: str | os.PathLike[str] | None = None,
        token_kind: str = "float16",
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        self.model = model
        self.classes = classes
        self.prompts = prompts
        self.loss = loss
        self.gamma = gamma
        self.tau = tau
        self.stage2 = stage2
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.mlp_ratio = mlp_ratio
        self.head = head
        self.init = init
        self.steps = steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.sampling = sampling
        self.precision = precision
        self.num_views = num_views
        self.cache = cache
        self.token_kind = token_kind
        self.seed = seed
        self.progress = progress

    def fit(self, X: Any, y: Any = None, *, validation: Validation | None = None, sample_weight: Any = None) -> Self:
        """Learn from pictures or their tokens.

        Args:
            X: N pictures, tokens or arrays of them.
            y: N class names.
            validation: (X, y) of other pictures, by which a second stage chooses its tau; nothing else is chosen.
            sample_weight: [N], how much each picture counts in the loss and in the classes' counts, at least 0: of labels that
                may be wrong. One of 0 is as if it were not there.

        Raises:
            ValueError: see `AdaptedClassifier.fit`; tokens of another model, an unknown setting, weights that do not fit.
        """
        self._check_model()
        schedule = self._check_settings()
        with self._training_tokens(X) as tokens:
            tokens, labels, weights_N = counting(tokens, _labels(X, y), sample_weight)
            targets_N = self._learn_classes(labels, len(tokens))
            self.n_features_in_ = tokens.width
            self.counts_ = class_counts(targets_N, weights_N, len(self.classes_))
            self.second_stage_, self.second_stage_tau_ = "none", None
            self.decoder_ = self._start(tokens)
            head = self.decoder_.head
            loss = step_loss(
                self.loss,
                self.counts_,
                steps=self.steps,
                gamma=self.gamma,
                tau=self.tau,
                head_scale=head.scale if isinstance(head, CosineHead) else None,
            )
            train(
                self.decoder_,
                tokens.batch,
                targets_N,
                loss,
                schedule,
                num_views=tokens.num_views,
                weights_N=weights_N,
                progress=self.progress,
            )
            if self.stage2 is not None:
                from wordsight.adapt.second_stage import second_stage  # which is built on this class

                second = second_stage(self, self.stage2, tokens, labels, validation=validation, sample_weight=weights_N)
                self.__dict__.update(second.__dict__)
        return self

    def logits(self, X: Any) -> Tensor:
        """What the probabilities are the softmax of: float32 [N, C] on the CPU."""
        features_NW = self.token_features(X)
        with torch.no_grad():
            return self.decoder_.classify(features_NW.to(self._device())).float().cpu()

    def token_features(self, X: Any, view: int | None = None) -> Tensor:
        """What the head reads, of the fixed view or of random view `view`: float32 [N, W] on the CPU."""
        check_is_fitted(self)
        tokens = self._tokens(X)
        if tokens.width != self.n_features_in_:
            raise ValueError(
                f"X has {tokens.width} features, but {type(self).__name__} is expecting {self.n_features_in_} features as input"
            )
        if tokens.class_token != self.decoder_.config.class_token:
            raise ValueError(
                "X's tokens are of another kind of tower than those that were learned from (with a class token, or not)"
            )
        out = [torch.empty(0, tokens.width)]
        self.decoder_.eval()
        with torch.no_grad():
            for start in range(0, len(tokens), READ_AT_ONCE):
                rows = np.arange(start, min(start + READ_AT_ONCE, len(tokens)))
                read = tokens.batch(rows, None if view is None else np.full(len(rows), view))
                out.append(self.decoder_.features(read.to(self._device())).cpu())
        return torch.cat(out)

    # --------------------------------------------------------------------------------------------------------- inputs

    def _tokens(self, X: Any, reset: bool = False) -> Tokens:
        """Tokens of any input; pictures go through the tower when they are asked for."""
        if isinstance(X, Tokens):
            if self.model is not None and X.identity is not None and X.identity != token_identity(self.model):
                raise ValueError(
                    "these tokens are of another model, or of other preprocessing, than this classifier's: make them with "
                    "cache_tokens(model, ...) of the same model"
                )
            return X
        if isinstance(X, ImageFeatures):
            raise ValueError(
                f"{type(self).__name__} reads tokens, X holds {X.layer} features: give pictures or what cache_tokens made of them"
            )
        if _are_pictures(X):
            return tower_tokens(self._looking_model(), X, identify=False)
        class_token = True
        if getattr(X, "ndim", 2) == 3:
            values = torch.as_tensor(np.asarray(X.detach().cpu() if isinstance(X, Tensor) else X, dtype=np.float32))
            class_token = self.model is not None and has_class_token(self.model)
            if 0 in values.shape:
                raise ValueError(f"an array of tokens must be [N, T, W] with at least one of each, got {tuple(values.shape)}")
            if not torch.isfinite(values).all():
                raise ValueError("the tokens are infinite or undefined (NaN) in places: mend or leave out those pictures")
        else:
            X = X.detach().cpu().numpy() if isinstance(X, Tensor) else X
            values = torch.from_numpy(np.array(validate_data(self, X, reset=reset, dtype=[np.float32, np.float64])))[:, None]
        return HeldTokens(
            num_tokens=values.shape[1],
            width=values.shape[2],
            class_token=class_token,
            num_views=0,
            identity=None,
            rows=np.arange(len(values)),
            values=values,
        )

    @contextmanager
    def _training_tokens(self, X: Any, reset: bool = True) -> Iterator[Tokens]:
        """Tokens to learn from, with `num_views` views; pictures' are kept in the cache's folder, or one for the meantime."""
        if not _are_pictures(X):
            tokens = self._tokens(X, reset=reset)
            if self.num_views and tokens.num_views != self.num_views:
                raise ValueError(f"X has {tokens.num_views} views, num_views={self.num_views} are asked for")
            yield tokens
            return
        with tempfile.TemporaryDirectory(prefix="wordsight-tokens-") as meantime:
            yield cache_tokens(
                self._looking_model(),
                X,
                meantime if self.cache is None else self.cache,
                num_views=self.num_views,
                seed=self.seed,
                kind=self.token_kind,  # type: ignore[arg-type]  # checked
                progress=self.progress,
            )

    def _looking_model(self) -> Any:
        if self.model is None:
            raise ValueError(f"{type(self).__name__} without a model takes tokens: give it one to look at pictures")
        return self.model

    def _device(self) -> torch.device:
        return next(self.decoder_.parameters()).device

    # ---------------------------------------------------------------------------------------------------------- start

    def _check_settings(self) -> Schedule:
        if self.init not in INITS:
            raise ValueError(f"init must be one of {', '.join(INITS)}, got {self.init!r}")
        if self.init == "text" and self.model is None:
            raise ValueError("init='text' needs a model, whose text tower reads the class names")
        if self.head is not None and self.head not in HEADS:
            raise ValueError(f"head must be one of {', '.join(HEADS)}, or None, got {self.head!r}")
        if self.token_kind not in DTYPES:
            raise ValueError(f"token_kind must be one of {', '.join(DTYPES)}, got {self.token_kind!r}")
        if self.num_views < 0:
            raise ValueError(f"num_views must be at least 0, got {self.num_views}")
        if self.stage2 is not None:
            from wordsight.adapt.second_stage import KINDS

            if self.stage2 not in KINDS:
                raise ValueError(f"stage2 must be one of {', '.join(KINDS)}, or None, got {self.stage2!r}")
        step_loss(self.loss, torch.ones(2), steps=1, head_scale=None if self.head == "linear" else 1.0)
        return Schedule.of(self)

    def _start(self, tokens: Tokens) -> TokenDecoder:
        """The decoder before its first step, on the model's device."""
        ldam = self.loss == "ldam"
        read = read_out(self.model.image_tower) if self.init == "text" else None
        config = DecoderConfig(
            width=tokens.width,
            num_classes=len(self.classes_),
            class_token=tokens.class_token,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            mlp_ratio=self.mlp_ratio,
            head=self.head or ("cosine" if ldam or read is not None else "linear"),  # type: ignore[arg-type]  # checked
            head_scale=LDAM_SCALE if ldam else COSINE_SCALE,
            norm_eps=None if read is None or read[0] is None else read[0].eps,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            decoder = TokenDecoder(config)
        if read is not None:
            self._start_from_text(decoder, tokens, *read)
        return decoder if self.model is None else decoder.to(next(self.model.parameters()).device)

    @torch.no_grad()
    def _start_from_text(
        self, decoder: TokenDecoder, tokens: Tokens, norm: torch.nn.LayerNorm | None, matrix_WD: Tensor, offset_D: Tensor
    ) -> None:
        """w_c = matrix t_c, so that w_c f is the embedding times t_c; a linear head takes the model's scale too."""
        decoder.open_blocks()
        if norm is not None and decoder.norm is not None:
            decoder.norm.load_state_dict(norm.state_dict())
        matrix_WD, offset_D = matrix_WD.cpu(), offset_D.cpu()
        text_CD = class_vectors(self)
        decoder.head.weight.copy_(text_CD @ matrix_WD.T)
        if not isinstance(decoder.head, CosineHead):
            features_BW = decoder.features(tokens.batch(np.arange(min(len(tokens), READ_AT_ONCE))))
            scale = self._scale() / (features_BW @ matrix_WD + offset_D).norm(dim=1).mean()
            decoder.head.weight.mul_(scale)
            decoder.head.bias.copy_(scale * text_CD @ offset_D)

    # ---------------------------------------------------------------------------------------------------------- files

    def _fitted_values(self) -> dict[str, Any]:
        tensors = {f"decoder_.{name}": value for name, value in self.decoder_.state_dict().items()}
        return {**super()._fitted_values(), "decoder": asdict(self.decoder_.config), **tensors}

    def _restore(self, values: dict[str, Any]) -> None:
        super()._restore(values)
        if "decoder" not in values:
            raise ValueError(f"the file of a {type(self).__name__} lacks its decoder: it is damaged, or of another version")
        decoder = TokenDecoder(DecoderConfig(**values["decoder"]))
        start = "decoder_."
        try:
            decoder.load_state_dict({name[len(start) :]: value for name, value in values.items() if name.startswith(start)})
        except RuntimeError as error:
            raise ValueError(f"the file of a {type(self).__name__} does not fit its settings: {error}") from error
        if self.model is not None:
            decoder = decoder.to(next(self.model.parameters()).device)
        self.decoder_ = decoder.eval()


def class_vectors(classifier: AdaptedClassifier) -> Tensor:
    """A unit vector a class from the model's text tower: float32 [C, D]; D need not be the width of what it learns from."""
    from wordsight.evaluate.prompts import class_embeddings, own_prompts, prompt_templates

    templates = prompt_templates(own_prompts(classifier.model) if classifier.prompts is None else classifier.prompts)
    return class_embeddings(classifier.model, [str(name) for name in classifier.classes_], templates)


def counting(tokens: Tokens, labels: np.ndarray, sample_weight: Any) -> tuple[Tokens, np.ndarray, Tensor | None]:
    """Tokens, labels and weights of the pictures that count: all of them where there are no weights.

    Raises:
        ValueError: as `sample_weights`.
    """
    weights_N = sample_weights(sample_weight, len(labels))
    if weights_N is None or len(labels) != len(tokens):
        return tokens, labels, weights_N
    rows = np.flatnonzero(weights_N.numpy())
    return tokens.take(rows), labels[rows], weights_N[rows]
