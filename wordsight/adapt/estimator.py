"""What all classifiers on a frozen model share: scikit-learn's contract, pictures or features in, class names out, files.

A method is one file with one class: its constructor only stores, `_fit` learns from features [V, N, D] and targets [N], `_logits`
judges features [N, D]. Everything else is here.

Shape legend: N pictures, V views of them, C classes, D feature width.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data
from torch import Tensor
from torch.nn.functional import normalize

from wordsight.adapt import METHODS, method_class
from wordsight.adapt.features import ImageFeatures, Layer, image_features
from wordsight.evaluate.prompts import class_embeddings, own_prompts, prompt_templates
from wordsight.evaluate.results import fingerprint, write_atomically
from wordsight.system import PairScorer
from wordsight.types import Sample

CONFIG, TENSORS, MODEL = "classifier.json", "classifier.safetensors", "model"
FORMAT_VERSION = 1
Validation = tuple[Any, Any]


class AdaptedClassifier(ClassifierMixin, BaseEstimator):
    """A classifier on the features of a frozen model.

    X is, wherever it appears: paths, PIL images, Samples or a Source; `ImageFeatures`; or an array [N, D] of features. y is a
    name a picture; with Samples that have a label it may be left out. Columns of probabilities follow `classes_`, which is
    sorted, as everywhere in scikit-learn.

    Subclasses have the parameters `model`, `classes`, `prompts` and `seed`, and may have `num_views` and `progress`.

    Attributes:
        classes_: the C class names, sorted.
        n_features_in_: D.
    """

    layer: Layer = "projected"  # a parameter where a method can use either
    unit_length: ClassVar[bool] = True  # whether features are normalised before `_fit` and `_logits` see them
    needs_model: ClassVar[bool] = True
    needs_every_class: ClassVar[bool] = True  # whether a class without a picture is an error
    saved: ClassVar[tuple[str, ...]] = ()  # fitted attributes that are written: tensors, numbers, strings, lists of them

    # ------------------------------------------------------------------------------------------------- what a method says

    def _fit(self, features_VND: Tensor, targets_N: Tensor, validation: tuple[Tensor, Tensor] | None) -> None:
        """Learn from float32 features and int64 targets; `validation` is ([M, D], [M]) for choosing settings."""
        raise NotImplementedError

    def _logits(self, features_ND: Tensor) -> Tensor:
        """Logits [N, C]."""
        raise NotImplementedError

    # --------------------------------------------------------------------------------------------------- the contract

    def fit(self, X: Any, y: Any = None, *, validation: Validation | None = None) -> Self:
        """Learn from pictures or their features.

        Args:
            X: N pictures or features.
            y: N class names.
            validation: (X, y) of other pictures, by which a method may choose its settings; never test data. Without it a
                method takes its published settings, or cross-validates on X.

        Returns:
            self.

        Raises:
            ValueError: no picture for a class, a label that is not among `classes`, a class name twice, one class alone, features
                that are infinite, undefined or of another width.
            OSError: a picture can't be read; the message names it.
        """
        return self._learn(X, y, validation)

    def _learn(self, X: Any, y: Any, validation: Validation | None, sample_weight: Any = None) -> Self:
        """`fit`; a method that weighs pictures is given the weights of those that count, as if the others were not there."""
        self._check_model()
        features_VND, labels = self._training_features(X), _labels(X, y)
        weights_N = sample_weights(sample_weight, len(labels))
        if weights_N is not None and len(labels) == features_VND.shape[1]:
            kept_N = weights_N > 0
            features_VND, labels, weights_N = features_VND[:, kept_N], labels[kept_N.numpy()], weights_N[kept_N]
        targets_N = self._learn_classes(labels, features_VND.shape[1])
        self.n_features_in_ = features_VND.shape[2]
        held_out = None
        if validation is not None:
            if not isinstance(validation, tuple) or len(validation) != 2:
                raise ValueError("validation must be (X, y)")
            held_out = self._features(validation[0]), self._targets(_labels(*validation))
            if len(held_out[0]) != len(held_out[1]):
                raise ValueError(f"validation has {len(held_out[0])} pictures and {len(held_out[1])} labels")
        if weights_N is None:
            self._fit(features_VND, targets_N, held_out)
        else:
            self._fit(features_VND, targets_N, held_out, weights_N)  # type: ignore[call-arg]  # of a method that weighs
        return self

    def logits(self, X: Any) -> Tensor:
        """What the probabilities are the softmax of: float32 [N, C] on the CPU."""
        check_is_fitted(self)
        features_ND = self._features(X)
        with torch.no_grad():
            return self._logits(features_ND).float().cpu()

    def predict_proba(self, X: Any) -> np.ndarray:
        """The probability of each class: float64 [N, C], rows sum to 1, columns follow `classes_`."""
        return self.logits(X).double().softmax(dim=1).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """The likeliest class name of each picture: [N]."""
        winners_N = self.logits(X).argmax(dim=1).numpy()
        return self.classes_[winners_N]

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """The share of pictures that are named rightly (accuracy)."""
        with _few_of_each():
            return float(super().score(X, _labels(X, y), sample_weight=sample_weight))

    def __sklearn_clone__(self) -> Self:
        """A clone shares the frozen model: it is not copied for every fold of a cross-validation."""
        values = self.get_params(deep=False)
        return type(self)(**{k: v if k == "model" else clone(v, safe=False) for k, v in values.items()})

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True  # a path is a picture
        return tags

    # --------------------------------------------------------------------------------------------------------- inputs

    def _check_model(self) -> None:
        if self.model is None:
            if self.needs_model:
                raise ValueError(f"{type(self).__name__} needs a model: {type(self).__name__}(model=wordsight.load(...))")
        elif isinstance(self.model, PairScorer):
            raise ValueError(
                f"{type(self.model).__name__}'s picture vectors depend on the text, so no classifier can be built on them: use a "
                "dual encoder, whose pictures have one vector each"
            )

    def _training_features(self, X: Any) -> Tensor:
        """Features [V, N, D] to learn from: of the random views where `num_views` asks for them, else of the fixed one."""
        num_views = getattr(self, "num_views", 0)
        if not num_views:
            return self._features(X, reset=True)[None]
        if num_views < 0:
            raise ValueError(f"num_views must be at least 0, got {num_views}")
        if not isinstance(X, ImageFeatures):
            if not _are_pictures(X):
                raise ValueError(
                    f"num_views={num_views} draws random views of pictures, and X is an array of features: give pictures, "
                    "ImageFeatures with views, or num_views=0"
                )
            X = self._look(X, num_views)
        if X.views is None or len(X.views) < num_views:
            raise ValueError(f"X has {0 if X.views is None else len(X.views)} views, num_views={num_views} are asked for")
        return torch.stack([self._checked(view) for view in X.views[:num_views]])

    def _features(self, X: Any, reset: bool = False) -> Tensor:
        """Features [N, D] of pictures, of unit length where the method wants that."""
        if _are_pictures(X):
            X = self._look(X, 0)
        if isinstance(X, ImageFeatures):
            if X.layer != self.layer:
                raise ValueError(f"{type(self).__name__} reads {self.layer} features, X holds {X.layer} ones")
            features_ND = X.plain
        else:
            if isinstance(X, Tensor):
                X = X.detach().cpu().numpy()
            features_ND = torch.from_numpy(np.array(validate_data(self, X, reset=reset, dtype=[np.float32, np.float64])))
            features_ND = features_ND.float()
        width = getattr(self, "n_features_in_", features_ND.shape[1])
        if not reset and features_ND.shape[1] != width:
            raise ValueError(
                f"X has {features_ND.shape[1]} features, but {type(self).__name__} is expecting {width} features as input"
            )
        return self._checked(features_ND)

    def _checked(self, features_ND: Tensor) -> Tensor:
        if not torch.isfinite(features_ND).all():
            row = int((~torch.isfinite(features_ND)).any(1).nonzero()[0, 0])
            raise ValueError(f"the features of row {row} are infinite or undefined (NaN): mend or leave out that picture")
        return normalize(features_ND, dim=1) if self.unit_length else features_ND

    def _look(self, X: Any, num_views: int) -> ImageFeatures:
        if self.model is None:
            raise ValueError(f"{type(self).__name__} without a model takes features: give it one to look at pictures")
        progress = bool(getattr(self, "progress", False))
        return image_features(self.model, X, num_views=num_views, seed=self.seed, layer=self.layer, progress=progress)

    def _learn_classes(self, labels: np.ndarray, num_rows: int) -> Tensor:
        """Set `classes_`; the targets [N] of the labels."""
        if len(labels) != num_rows:
            raise ValueError(f"X has {num_rows} pictures and y {len(labels)} labels")
        with _few_of_each():
            check_classification_targets(labels)
        self.classes_ = np.unique(labels) if self.classes is None else class_list(self.classes)
        if len(self.classes_) < 2:
            raise ValueError(f"{type(self).__name__} needs at least 2 classes, got one class: {self.classes_.tolist()[0]!r}")
        targets_N = self._targets(labels)
        empty = sorted(set(range(len(self.classes_))) - set(targets_N.tolist()))
        if empty and self.needs_every_class:
            names = ", ".join(repr(str(self.classes_[i])) for i in empty[:10])
            raise ValueError(f"{len(empty)} classes have no picture: {names}: give at least one of each, or leave them out")
        return targets_N

    def _targets(self, labels: np.ndarray) -> Tensor:
        places = {name: i for i, name in enumerate(self.classes_.tolist())}
        unknown = sorted({str(label) for label in labels.tolist() if label not in places})
        if unknown:
            raise ValueError(
                f"{len(unknown)} labels are not among the {len(places)} classes: {', '.join(map(repr, unknown[:10]))}"
            )
        return torch.tensor([places[label] for label in labels.tolist()], dtype=torch.int64)

    # -------------------------------------------------------------------------------------------------- of the model

    def linear_head(self) -> tuple[Tensor, float, Tensor]:
        """What is left of a classifier whose logits are scale * f V' + b, for use without this package.

        Returns:
            (V [C, D], scale, b [C]), float32, rows as `classes_`; f is a picture's feature of `layer`, of unit length where
            `unit_length` says so.

        Raises:
            ValueError: the logits are no linear function of the features.
        """
        check_is_fitted(self)
        vectors_CD = getattr(self, "class_vectors_", None)
        if vectors_CD is None:
            raise ValueError(f"{type(self).__name__}'s logits are no linear function of the features: it has no plain weights")
        return vectors_CD, float(getattr(self, "scale_", 1.0)), getattr(self, "bias_", torch.zeros(len(vectors_CD)))

    def _scale(self) -> float:
        """exp(log_scale), by which the model multiplies cosines."""
        return float(self.model.log_scale.detach().float().exp())

    def _text_features(self) -> Tensor:
        """A unit vector a class from the model's text tower: float32 [C, D] on the CPU."""
        templates = prompt_templates(own_prompts(self.model) if self.prompts is None else self.prompts)
        names = [str(name) for name in self.classes_]
        vectors_CD = class_embeddings(self.model, names, templates)
        if vectors_CD.shape[1] != getattr(self, "n_features_in_", vectors_CD.shape[1]):
            raise ValueError(
                f"the features have {self.n_features_in_} numbers and the model's texts {vectors_CD.shape[1]}: they are of "
                "another model or layer"
            )
        return vectors_CD

    # -------------------------------------------------------------------------------------------------------- files

    def save(self, folder: str | os.PathLike[str], *, with_model: bool = True) -> Path:
        """Write the classifier: settings and classes as JSON, tensors as safetensors, the frozen model beside them.

        Args:
            folder: made if need be.
            with_model: whether the model is written too (`folder/model`). Without it, `load_classifier` must be given the model,
                and makes sure that it is the same.

        Returns:
            The folder.
        """
        from safetensors.torch import save as to_bytes

        check_is_fitted(self)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.model is not None and with_model:
            from wordsight.bundle import save

            save(self.model, folder / MODEL)
        values = self._fitted_values()
        tensors = {name: value.detach().cpu().contiguous() for name, value in values.items() if isinstance(value, Tensor)}
        names = self.classes_.tolist()
        settings = {name: value for name, value in self.get_params(deep=False).items() if name not in ("model", "classes")}
        config = {
            "format": FORMAT_VERSION,
            "method": next(method for method, (_, name) in METHODS.items() if name == type(self).__name__),
            "settings": settings,
            "given_classes": self.classes is not None,
            "classes": names,
            "num_features": self.n_features_in_,
            "model": None if self.model is None else model_fingerprint(self.model),
            "fitted": {name: value for name, value in values.items() if not isinstance(value, Tensor)},
            "tensors": hashlib.sha256(content := to_bytes(tensors)).hexdigest(),
        }
        temporary = folder / f".{TENSORS}.tmp"
        temporary.write_bytes(content)
        os.replace(temporary, folder / TENSORS)
        write_atomically(folder / CONFIG, json.dumps(config, indent=1, ensure_ascii=False, default=os.fspath) + "\n")
        return folder

    def _fitted_values(self) -> dict[str, Any]:
        """What `save` writes and `_restore` takes: tensors by name, and what JSON can say."""
        return {name: getattr(self, name) for name in self.saved}

    def _restore(self, values: dict[str, Any]) -> None:
        """Take the fitted attributes that `save` wrote."""
        for name in self.saved:
            if name not in values:
                raise ValueError(f"the file of a {type(self).__name__} lacks {name}: it is damaged, or of another version")
            setattr(self, name, values[name])


def load_classifier(folder: str | os.PathLike[str], model: Any = None) -> AdaptedClassifier:
    """Read what `AdaptedClassifier.save` wrote; no code of a file is run.

    Args:
        folder: of a classifier; or a run folder of `wordsight adapt`, whose kept classifier is taken.
        model: the frozen model, where it does not lie in `folder/model`.

    Returns:
        The fitted classifier.

    Raises:
        FileNotFoundError: no classifier there, or its model is not.
        ValueError: damaged files, or another model than it was made for.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file() and (folder / "classifier" / CONFIG).is_file():
        folder = folder / "classifier"
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"no classifier in {folder}: it should hold {CONFIG}, as `wordsight adapt` writes it")
    config, tensors = _read(folder)
    try:
        cls = method_class(config["method"])
        classes = config["classes"] if config["given_classes"] else None
        settings = {name: tuple(value) if isinstance(value, list) else value for name, value in config["settings"].items()}
        classifier: AdaptedClassifier = cls(None, classes=classes, **settings)
        classifier.classes_ = np.array(config["classes"])
        classifier.n_features_in_ = int(config["num_features"])
        values, saved_for = {**config["fitted"], **tensors}, config["model"]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the classifier in {folder} is damaged, or of another version: {error}") from error
    if saved_for is not None:
        if model is None:
            if not (folder / MODEL).is_dir():
                raise FileNotFoundError(f"the classifier in {folder} was saved without its model: give it with model=")
            from wordsight.bundle import load

            model = load(folder / MODEL)
        if model_fingerprint(model) != saved_for:
            raise ValueError(
                f"the classifier in {folder} was made for another model (weights, tokenizer or preprocessing differ): its "
                "figures would be wrong on this one"
            )
    classifier.model = model
    classifier._restore(values)
    return classifier


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The two files of a classifier: settings, and the tensors that belong to them."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not (folder / TENSORS).is_file():
        raise FileNotFoundError(f"the classifier in {folder} lacks {TENSORS}")
    content = (folder / TENSORS).read_bytes()
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load(content)
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise ValueError(f"the classifier in {folder} is damaged: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"the classifier in {folder} is damaged: {CONFIG} holds no object")
    if config.get("format") != FORMAT_VERSION:
        raise ValueError(f"{folder / CONFIG} has format {config.get('format')!r}, this version reads {FORMAT_VERSION}")
    if config.get("tensors") != hashlib.sha256(content).hexdigest():
        raise ValueError(f"the classifier in {folder} is damaged: {TENSORS} is not the file that belongs to {CONFIG}")
    return config, tensors


def model_fingerprint(model: Any) -> str:
    """32 hex digits that stand for a model's weights, tokenizer and preprocessing."""
    return fingerprint(model, ("a photo of a cat", "🐈 naïve café, 3D & more"), "", "adapt")


def class_list(classes: Sequence[Any]) -> np.ndarray:
    """The class names, sorted.

    Raises:
        ValueError: none, an empty one, or one twice.
    """
    names = list(classes)
    if isinstance(classes, str) or not names:
        raise ValueError(f"classes must be a list of names, got {classes!r}")
    seen: set[Any] = set()
    twice = sorted({str(name) for name in names if name in seen or seen.add(name)})  # type: ignore[func-returns-value]
    if twice:
        raise ValueError(f"class names given more than once: {', '.join(map(repr, twice[:10]))}")
    empty = [i for i, name in enumerate(names) if isinstance(name, str) and not name.strip()]
    if empty:
        raise ValueError(f"class name {empty[0]} is empty")
    return np.unique(np.array(names))


def sample_weights(given: Any, num_rows: int) -> Tensor | None:
    """How much each picture counts, float64 [N]; None where nothing is given.

    Raises:
        ValueError: not one number a picture, or not finite and at least 0, or all of them 0.
    """
    if given is None:
        return None
    weights_N = torch.as_tensor(np.asarray(given, dtype=np.float64))
    if weights_N.shape != (num_rows,):
        raise ValueError(f"sample_weight must be one number a picture, ({num_rows},), got {tuple(weights_N.shape)}")
    if not (weights_N.isfinite() & (weights_N >= 0)).all() or not (weights_N > 0).any():
        raise ValueError("sample_weight must be finite numbers, at least zero and not all of them zero")
    return weights_N


def _are_pictures(X: Any) -> bool:
    """Whether X holds paths, PIL images or Samples (a Source does), not numbers."""
    from PIL import Image

    if isinstance(X, str | os.PathLike | Image.Image):
        raise ValueError("X is one picture: give a list of pictures, [picture]")
    if isinstance(X, np.ndarray):
        return X.ndim == 1 and X.dtype.kind in "UO" and len(X) > 0 and isinstance(X[0], str | os.PathLike | Image.Image | Sample)
    if isinstance(X, Tensor | ImageFeatures) or not hasattr(X, "__len__") or not hasattr(X, "__getitem__") or len(X) == 0:
        return False
    try:
        first = X[0]
    except (KeyError, IndexError, TypeError):  # a table of numbers
        return False
    return isinstance(first, str | os.PathLike | Image.Image | Sample)


@contextmanager
def _few_of_each() -> Iterator[None]:
    """Without scikit-learn's warning that as many classes as samples look like a regression: they are one shot a class."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The number of unique classes", category=UserWarning)
        yield


def _labels(X: Any, y: Any) -> np.ndarray:
    """The labels as an array [N]: y, or those of Samples."""
    if y is not None:
        return np.asarray(column_or_1d(y, warn=True))
    if _are_pictures(X):
        labels = [getattr(X[i], "label", None) for i in range(len(X))]
        if None not in labels:
            return np.array(labels)
    raise ValueError("requires y to be passed, but the target y is None: give a class name for each picture")
