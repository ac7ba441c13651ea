"""Linear probe: logistic regression on features, as CLIP (arXiv 2103.00020, appendix A.3) and CoOp (arXiv 2109.01134) tune it.

Shape legend: N pictures, V views, C classes, D feature width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Self, get_args

import numpy as np
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

from wordsight.adapt.estimator import AdaptedClassifier, Validation
from wordsight.adapt.features import LAYERS, Layer
from wordsight.evaluate import probe
from wordsight.evaluate.probe import LogisticRegression, Path

Search = Literal["clip", "coop"]
FOLDS = 5
COOP_STEPS = 8
UNSEARCHED_C = 1.0


class LinearProbe(AdaptedClassifier):
    """p(c | x) = softmax_c(w_c x + b_c), with the cross-entropy summed over pictures plus |W|^2 / (2 C), as in scikit-learn.

    A picture's weight multiplies its cross-entropy, as in scikit-learn too; accuracies that C is chosen by count all alike.

    Without a model it works on plain arrays of features. Features are taken as they are, not normalised; on those of the
    "penultimate" layer it is CLIP's probe, with layer="projected" and search="coop" CoOp's.

    C is chosen by accuracy on `validation`, which is never learned from (`wordsight.evaluate.probe.linear_probe` does, at its
    end, as the paper does). Without validation it is chosen by stratified cross-validation on the pictures themselves, in 5 folds
    or as many as the smallest class has pictures; with a class of one picture there is nothing to choose by, and C is 1.

    Args:
        model: an Embedder, or None for features alone.
        classes: C names; None takes those in y.
        layer: which features of pictures: "penultimate" or "projected".
        C: inverse strength of the penalty, or "search".
        search: "clip": C of 1e-6 to 1e6 in steps of 100, then halving around the peak down to 8 steps a decade; "coop": the same
            start, then 8 halvings of the two decades around the peak, each towards the better end.
        max_iterations: of L-BFGS.
        seed: of the folds.

    Attributes:
        class_vectors_: float32 [C, D].
        bias_: float32 [C].
        scale_: 1.
        C_: the C that was taken.
        trace_: [[C, accuracy], ...] of those that were tried, in rising order.
        n_iter_: steps of L-BFGS of the last fit.
    """

    layer: Layer = "penultimate"
    unit_length = False
    needs_model = False
    saved = ("class_vectors_", "bias_", "scale_", "C_", "trace_", "n_iter_")

    def __init__(
        self,
        model: Any = None,
        classes: Sequence[str] | None = None,
        *,
        layer: Layer = "penultimate",
        C: float | Literal["search"] = "search",
        search: Search = "clip",
        max_iterations: int = probe.MAX_ITERATIONS,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.classes = classes
        self.layer = layer
        self.C = C
        self.search = search
        self.max_iterations = max_iterations
        self.seed = seed

    def fit(self, X: Any, y: Any = None, *, validation: Validation | None = None, sample_weight: Any = None) -> Self:
        """Learn from pictures or their features, see `AdaptedClassifier.fit`.

        Args:
            X, y, validation: see there.
            sample_weight: [N], how much each picture counts, at least 0. One of 0 is as if it were not there.
        """
        return self._learn(X, y, validation, sample_weight)

    def _fit(
        self,
        features_VND: Tensor,
        targets_N: Tensor,
        validation: tuple[Tensor, Tensor] | None,
        weights_N: Tensor | None = None,
    ) -> None:
        self._check_settings()
        features_ND, num_classes = features_VND[0], len(self.classes_)
        problem = LogisticRegression([features_ND], targets_N, num_classes, weights_N=weights_N)
        path = Path(problem, self.max_iterations)
        trace: dict[float, float] = {}
        if self.C == "search":
            score = self._folds(features_ND, targets_N, weights_N) if validation is None else _held_out(path, *validation)
            lam, trace = (1 / UNSEARCHED_C, {}) if score is None else SEARCHES[self.search](score)
        else:
            lam = 1 / self.C
        near = path(lam) if lam in path.known else None
        solution = path.problem.solve(lam, near, max_iterations=self.max_iterations)
        self.class_vectors_ = solution.weights_DC.T.float().contiguous()
        self.bias_ = solution.bias_C.float()
        self.scale_ = 1.0
        self.C_ = 1 / lam
        self.trace_ = [[1 / lam, accuracy] for lam, accuracy in sorted(trace.items(), reverse=True)]
        self.n_iter_ = solution.num_iterations

    def _logits(self, features_ND: Tensor) -> Tensor:
        return features_ND @ self.class_vectors_.T + self.bias_

    def _check_settings(self) -> None:
        if self.layer not in LAYERS:
            raise ValueError(f"layer must be one of {', '.join(LAYERS)}, got {self.layer!r}")
        if self.search not in get_args(Search):
            raise ValueError(f"search must be one of {', '.join(get_args(Search))}, got {self.search!r}")
        if isinstance(self.C, str) and self.C != "search":
            raise ValueError(f"C must be a number above 0 or 'search', got {self.C!r}")
        if not isinstance(self.C, str) and not 0 < self.C < float("inf"):
            raise ValueError(f"C must be a number above 0 or 'search', got {self.C}")
        if self.max_iterations < 1:
            raise ValueError(f"max_iterations must be at least 1, got {self.max_iterations}")

    def _folds(self, features_ND: Tensor, targets_N: Tensor, weights_N: Tensor | None) -> Callable[[float], float] | None:
        """The accuracy on pictures left out, by lambda; None where a class has one picture."""
        num_folds = min(FOLDS, int(targets_N.bincount(minlength=len(self.classes_)).min()))
        if num_folds < 2:
            return None
        folds = StratifiedKFold(num_folds, shuffle=True, random_state=self.seed)
        scores = []
        for kept, left in folds.split(np.zeros(len(targets_N)), targets_N.numpy()):
            own = None if weights_N is None else weights_N[kept]
            problem = LogisticRegression([features_ND[kept]], targets_N[kept], len(self.classes_), weights_N=own)
            path = Path(problem, self.max_iterations)
            scores.append((len(left) / len(targets_N), _held_out(path, features_ND[left], targets_N[left])))
        return lambda lam: sum(share * score(lam) for share, score in scores)


def _held_out(path: Path, features_MD: Tensor, targets_M: Tensor) -> Callable[[float], float]:
    return lambda lam: probe.accuracy(path(lam), features_MD, targets_M)


def coop_search(score: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """CoOp's: lambda 1e-6, 1e-4, ..., 1e6, the smallest of equals; then left and right of the peak a decade each, and 8 times the
    worse end is moved to the middle (on a logarithmic scale; the left one, of larger C, stays where both are equal).

    Returns:
        (the better end of the last step, lambda -> score).
    """
    trace: dict[float, float] = {}

    def ask(exponent: float) -> float:
        lam = 10.0**exponent
        if lam not in trace:
            trace[lam] = score(lam)
        return trace[lam]

    # exponents of lambda = 1/C: the published left end is the smaller C
    peak = max(range(6, -7, -2), key=lambda exponent: (ask(exponent), -exponent))
    left, right, best = peak + 1.0, peak - 1.0, float(peak)
    for _ in range(COOP_STEPS):
        if ask(left) < ask(right):
            best, left = right, (left + right) / 2
        else:
            best, right = left, (left + right) / 2
    return 10.0**best, trace


SEARCHES: dict[str, Callable[[Callable[[float], float]], tuple[float, dict[float, float]]]] = {
    "clip": probe.search,
    "coop": coop_search,
}
