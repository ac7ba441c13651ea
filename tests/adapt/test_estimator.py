"""What all classifiers on features keep: scikit-learn's contract, its tools, files, and errors that name what is wrong."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import wordsight
from tests.adapt.shots import NAMES, WIDTH, TinyEmbedder, shots
from wordsight.adapt import (
    CLAP,
    ClipAdapter,
    CrossModalProbe,
    ImageFeatures,
    LinearProbe,
    LPPlusPlus,
    TipAdapter,
    TipAdapterF,
    ZeroShot,
    load_classifier,
)
from wordsight.system import PairScorer

# each quick, and with what it takes from the model
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "zero_shot": (ZeroShot, {}),
    "linear_probe": (LinearProbe, {"C": 1.0}),
    "tip_adapter": (TipAdapter, {}),
    "tip_adapter_f": (TipAdapterF, {"epochs": 2}),
    "clip_adapter": (ClipAdapter, {"epochs": 3}),
    "lp_plus_plus": (LPPlusPlus, {"iterations": 12}),
    "clap": (CLAP, {"epochs": 3}),
    "cross_modal_probe": (CrossModalProbe, {"iterations": 12}),
}
LINEAR = ("zero_shot", "linear_probe", "lp_plus_plus", "clap", "cross_modal_probe")
MODEL = TinyEmbedder()


def make(method: str, **more: Any) -> Any:
    cls, settings = METHODS[method]
    return cls(MODEL, **{**settings, **more})


# ------------------------------------------------------------------------------------------------------ scikit-learn's checks


class RandomTexts:
    """In place of a model: scikit-learn's checks give features of 1 to 20 numbers, and a model's texts have one width."""

    needs_model = False
    classes_: Any
    n_features_in_: int

    def _text_features(self) -> torch.Tensor:
        drawn = torch.randn(len(self.classes_), self.n_features_in_, generator=torch.Generator().manual_seed(0))
        return torch.nn.functional.normalize(drawn, dim=1)

    def _raw_text_features(self) -> torch.Tensor:
        return 8 * self._text_features()

    def _scale(self) -> float:
        return 10.0


class RandomTip(RandomTexts, TipAdapter): ...  # type: ignore[misc]


class RandomTipF(RandomTexts, TipAdapterF): ...  # type: ignore[misc]


class RandomClipAdapter(RandomTexts, ClipAdapter): ...  # type: ignore[misc]


class RandomLPPlusPlus(RandomTexts, LPPlusPlus): ...  # type: ignore[misc]


class RandomCLAP(RandomTexts, CLAP): ...  # type: ignore[misc]


class RandomCrossModal(RandomTexts, CrossModalProbe):  # type: ignore[misc]
    def _texts(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._text_features(), torch.arange(len(self.classes_))


def expected_failures(estimator: Any) -> dict[str, str]:
    if isinstance(estimator, LinearProbe):
        near = "a fit ends near the minimum, at 1e-5 of a probability, and the check wants 1e-7"
        return {"check_sample_weight_equivalence_on_dense_data": near}
    if isinstance(estimator, RandomTip | RandomTipF):
        return {"check_methods_subset_invariance": "float32 sums of other batches differ by 1e-7, which the check wants exact"}
    if isinstance(estimator, RandomClipAdapter | RandomCLAP | RandomCrossModal):
        return {"check_classifiers_train": "wants 83% on its blobs, which classes whose texts are random vectors do not reach"}
    return {}


CHECKED = [
    LinearProbe(C=1.0),
    RandomTip(),
    RandomTipF(epochs=2),
    RandomClipAdapter(epochs=2, reduction=1),
    RandomLPPlusPlus(iterations=20),
    RandomCLAP(epochs=2),
    RandomCrossModal(iterations=60),
]


@parametrize_with_checks(CHECKED, expected_failed_checks=expected_failures)
def test_scikit_learns_checks(estimator: Any, check: Any) -> None:
    """All of them; `LinearProbe` without an exception."""
    check(estimator)


def test_the_default_probe_passes_a_check_that_fits_often() -> None:
    X, y = shots(4)
    first, second = LinearProbe().fit(X, y), LinearProbe().fit(X, y)
    np.testing.assert_array_equal(first.predict_proba(X), second.predict_proba(X))
    first.fit(X[:10] * 2, y[:10])
    second = LinearProbe().fit(X[:10] * 2, y[:10])
    np.testing.assert_array_equal(first.predict_proba(X), second.predict_proba(X))  # nothing of the first fit is left


@pytest.mark.parametrize("method", METHODS)
def test_constructors_only_store(method: str) -> None:
    cls, _ = METHODS[method]
    parameters = cls().get_params()
    assert {"model", "classes", "seed"} <= set(parameters)
    marker = object()
    for name in parameters:
        assert getattr(cls(**{name: marker}), name) is marker
    assert not [name for name in vars(cls()) if name.endswith("_")]


@pytest.mark.parametrize("method", METHODS)
def test_probabilities_follow_sorted_classes(method: str) -> None:
    X, y = shots(4)
    found = make(method).fit(X, y)
    assert list(found.classes_) == sorted(NAMES)
    p = found.predict_proba(X)
    assert (p.shape, p.dtype) == ((len(X), len(NAMES)), np.float64)
    np.testing.assert_allclose(p.sum(1), 1.0, atol=1e-12)
    np.testing.assert_array_equal(found.predict(X), found.classes_[p.argmax(1)])
    assert found.score(X, y) == np.mean(found.predict(X) == y) > 0.5
    given = make(method, classes=list(reversed(NAMES))).fit(X, y)
    np.testing.assert_array_equal(given.predict_proba(X), p)
    assert found.n_features_in_ == WIDTH


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_result_and_global_state_untouched(method: str) -> None:
    X, y = shots(4)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first, second = (make(method, seed=5).fit(X, y).predict_proba(X) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("method", METHODS)
def test_clones_share_the_model(method: str) -> None:
    X, y = shots(3)
    found = make(method).fit(X, y)
    twin = clone(found)
    assert twin.model is MODEL
    assert not hasattr(twin, "classes_")
    np.testing.assert_array_equal(twin.fit(X, y).predict_proba(X), found.predict_proba(X))


@pytest.mark.parametrize("method", METHODS)
def test_scorers_of_probabilities(method: str) -> None:
    from sklearn.metrics import get_scorer

    X, y = shots(8)
    found = make(method).fit(X, y)
    p = found.predict_proba(X)
    places = np.searchsorted(sorted(NAMES), y)
    expected = np.log(p[np.arange(len(y)), places]).mean()
    assert get_scorer("neg_log_loss")(found, X, y) == pytest.approx(expected, abs=1e-6)
    aucs = []
    for c in range(len(NAMES)):
        own, other = p[places == c, c], p[places != c, c]
        aucs.append(((own[:, None] > other) + 0.5 * (own[:, None] == other)).mean())
    assert get_scorer("roc_auc_ovr")(found, X, y) == pytest.approx(np.mean(aucs))


def test_grid_search_and_pipelines() -> None:
    X, y = shots(8, noise=1.5)
    grid = GridSearchCV(LinearProbe(), {"C": [1e-6, 1.0]}, cv=3, scoring="neg_log_loss").fit(X, y)
    assert grid.best_params_ == {"C": 1.0}
    pipeline = make_pipeline(StandardScaler(), LinearProbe(C=1.0)).fit(X, y)
    np.testing.assert_array_equal(
        pipeline.predict_proba(X),
        LinearProbe(C=1.0).fit(StandardScaler().fit_transform(X), y).predict_proba(StandardScaler().fit_transform(X)),
    )
    tip = GridSearchCV(TipAdapter(MODEL), {"alpha": [0.0, 1.0], "beta": [1.0, 5.0]}, cv=2).fit(X, y)
    assert tip.best_estimator_.model is MODEL
    assert cross_val_score(ClipAdapter(MODEL, epochs=2), X, y, cv=2).shape == (2,)


# ---------------------------------------------------------------------------------------------------------------- linear heads


@pytest.mark.parametrize("method", METHODS)
def test_a_linear_head_is_all_of_a_linear_method(method: str) -> None:
    X, y = shots(4)
    found = make(method).fit(X, y)
    if method not in LINEAR:
        with pytest.raises(ValueError, match=f"{type(found).__name__}'s logits are no linear function"):
            found.linear_head()
        return
    vectors_CD, scale, bias_C = found.linear_head()
    f = torch.tensor(X)
    f = torch.nn.functional.normalize(f, dim=1) if found.unit_length else f
    torch.testing.assert_close(scale * f @ vectors_CD.T + bias_C, found.logits(X), atol=1e-4, rtol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def real_model() -> Any:
    return wordsight.create("clip-tiny")


@pytest.mark.parametrize("method", METHODS)
def test_files_give_back_the_same_classifier(method: str, real_model: Any, tmp_path: Path) -> None:
    cls, settings = METHODS[method]
    X, y = shots(3, width=512)
    found = cls(real_model, classes=list(NAMES), **settings).fit(X, y)
    with_model = load_classifier(found.save(tmp_path / "with"))
    without = load_classifier(found.save(tmp_path / "without", with_model=False), real_model)
    assert not (tmp_path / "without" / "model").exists()
    for other in (with_model, without):
        assert type(other) is cls
        assert torch.equal(other.logits(X), found.logits(X))
        assert list(other.classes_) == list(found.classes_)
        mine, theirs = found.get_params(), other.get_params()
        assert {k: v for k, v in mine.items() if k not in ("model", "classes")} == {
            k: v for k, v in theirs.items() if k not in ("model", "classes")
        }
        for name in cls.saved:
            a, b = getattr(found, name), getattr(other, name)
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_what_does_not_fit_is_refused(real_model: Any, tmp_path: Path) -> None:
    X, y = shots(3, width=512)
    found = TipAdapter(real_model).fit(X, y)
    folder = found.save(tmp_path / "tip", with_model=False)
    with pytest.raises(FileNotFoundError, match="saved without its model"):
        load_classifier(folder)
    with pytest.raises(ValueError, match="made for another model"):
        load_classifier(folder, wordsight.create("clip-tiny", seed=3))
    with pytest.raises(FileNotFoundError, match=r"classifier\.json"):
        load_classifier(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda config: config[: len(config) // 2], "damaged"),
        (lambda config: config.replace('"format": 1', '"format": 7'), "format 7, this version reads 1"),
        (lambda config: config.replace('"linear_probe"', '"os.system"'), "no method 'os.system'"),
        (lambda config: "[]", "damaged"),
        (lambda config: config.replace('"C_"', '"D_"'), "lacks C_"),
        (lambda config: config.replace('"settings"', '"setting"'), "damaged"),
        (lambda config: config.replace('"search": "clip"', '"sorch": "clip"'), "damaged"),
    ],
)
def test_damaged_settings_are_named(damage: Any, message: str, tmp_path: Path) -> None:
    folder = LinearProbe(C=1.0).fit(*shots(2)).save(tmp_path / "probe")
    path = folder / "classifier.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=message):
        load_classifier(folder)


@pytest.mark.parametrize("how", ["cut", "flipped", "other width", "absent"])
def test_damaged_tensors_are_named(how: str, tmp_path: Path) -> None:
    folder = LinearProbe(C=1.0).fit(*shots(2)).save(tmp_path / "probe")
    path = folder / "classifier.safetensors"
    content = path.read_bytes()
    if how == "cut":
        path.write_bytes(content[:-7])
    elif how == "flipped":
        path.write_bytes(b"\xff" * 16 + content[16:])
    elif how == "other width":
        other = LinearProbe(C=1.0).fit(*shots(2, width=9)).save(tmp_path / "other")
        path.write_bytes((other / "classifier.safetensors").read_bytes())
    else:
        path.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=r"damaged|lacks classifier\.safetensors"):
        load_classifier(folder)


# ------------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("method", METHODS)
def test_bad_labels_are_named(method: str) -> None:
    X, y = shots(3)
    with pytest.raises(ValueError, match="at least 2 classes, got one class: 'ant'"):
        make(method).fit(X[y == "ant"], y[y == "ant"])
    with pytest.raises(ValueError, match="3 labels are not among the 2 classes: 'cow', 'eel', 'wolf'"):
        make(method, classes=["ant", "bee"]).fit(X, y)
    with pytest.raises(ValueError, match="class names given more than once: 'ant'"):
        make(method, classes=["ant", "bee", "ant"]).fit(X, y)
    with pytest.raises(ValueError, match="class name 1 is empty"):
        make(method, classes=["ant", " "]).fit(X, y)
    if method == "zero_shot":
        return
    with pytest.raises(ValueError, match="1 classes have no picture: 'fox'"):
        make(method, classes=[*NAMES, "fox"]).fit(X, y)
    with pytest.raises(ValueError, match="X has 15 pictures and y 14 labels"):
        make(method).fit(X, y[:-1])
    with pytest.raises(ValueError, match="y to be passed"):
        make(method).fit(X)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_named(method: str, value: float) -> None:
    X, y = shots(3)
    found = make(method).fit(X, y)
    bad = X.copy()
    bad[4, 1] = value
    with pytest.raises(ValueError, match=r"NaN|infinity"):
        found.predict(bad)
    with pytest.raises(ValueError, match=r"row 4 are infinite or undefined|NaN|infinity"):
        found.predict(ImageFeatures(torch.tensor(bad), layer=found.layer))
    if method != "zero_shot":
        with pytest.raises(ValueError, match=r"NaN|infinity"):
            make(method).fit(bad, y)
        with pytest.raises(ValueError, match=r"NaN|infinity"):
            make(method).fit(X, y, validation=(bad, y))


@pytest.mark.parametrize("method", METHODS)
def test_what_is_missing_or_of_another_width_is_named(method: str) -> None:
    X, y = shots(3)
    cls, settings = METHODS[method]
    found = make(method).fit(X, y)
    with pytest.raises(ValueError, match=f"X has 7 features, but {cls.__name__} is expecting {WIDTH} features"):
        found.predict(X[:, :7])
    with pytest.raises(ValueError, match=r"reads .* features, X holds"):
        found.predict(ImageFeatures(torch.tensor(X), layer="projected" if found.layer == "penultimate" else "penultimate"))
    if cls.needs_model:
        with pytest.raises(ValueError, match=f"{cls.__name__} needs a model"):
            cls(**settings).fit(X, y)
        if method != "zero_shot":
            with pytest.raises(ValueError, match="features have 7 numbers and the model's texts 24"):
                make(method).fit(X[:, :7], y)
    else:
        with pytest.raises(ValueError, match="without a model takes features"):
            cls(**settings).fit(["a.png", "b.png"], ["a", "b"])
    if method != "zero_shot":
        with pytest.raises(ValueError, match=r"validation must be \(X, y\)"):
            make(method).fit(X, y, validation=X)
        with pytest.raises(ValueError, match="not among the 5 classes: 'fox'"):
            make(method).fit(X, y, validation=(X[:1], ["fox"]))
        with pytest.raises(ValueError, match="validation has 3 pictures and 2 labels"):
            make(method).fit(X, y, validation=(X[:3], y[:2]))


def test_one_shot_of_many_classes_is_no_regression() -> None:
    """scikit-learn warns where there are about as many classes as samples."""
    features = np.eye(40, dtype=np.float32)
    names = [f"class {i}" for i in range(40)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert LinearProbe().fit(features, names).score(features, names) == 1.0


def test_a_pair_scorer_is_refused() -> None:
    own = [name for name in vars(PairScorer) if not name.startswith("_") and not hasattr(MODEL, name)]
    scorer = type("Pairs", (TinyEmbedder,), dict.fromkeys(own, lambda self, *given: None))()
    assert isinstance(scorer, PairScorer)
    with pytest.raises(ValueError, match="depend on the text"):
        TipAdapter(scorer).fit(*shots(2))


def test_settings_are_plain_json(tmp_path: Path) -> None:
    folder = TipAdapter(wordsight.create("clip-tiny"), search_steps=(3, 4)).fit(*shots(2, width=512)).save(tmp_path / "tip")
    config = json.loads((folder / "classifier.json").read_text())
    assert config["settings"]["search_steps"] == [3, 4]
    assert config["method"] == "tip_adapter"
