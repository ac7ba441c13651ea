"""Ridge classification in closed form: least squares to one target a class with a penalty, and its exact leave-one-out figures.

Targets are +1 for a picture's class and -1 for the others, the bias has no penalty, and the largest output names the class: the
objective is scikit-learn's RidgeClassifier's. One eigendecomposition, of the centred X'X or of XX', whichever is smaller, gives
the solution for every lambda, and with it what each picture would be taken for by a fit without it: its residual divided by
1 - h, with h its entry in the diagonal of the hat matrix (Allen 1974). So lambda is chosen on train and nothing is held out.

Shape legend: N pictures, n of one block, D feature width, R directions (min of N and D), C classes, L lambdas.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wordsight.evaluate.features import (
    CPU,
    LinearClassifier,
    Scored,
    check_features,
    classes_of,
    feature_blocks,
    score,
    targets_of,
)
from wordsight.types import Metric

RELATIVE_LAMBDAS = tuple(10.0 ** (step / 4) for step in range(-24, 13))  # 1e-6 to 1e3 times the mean eigenvalue of X'X


@dataclass(frozen=True, kw_only=True)
class RidgeResult:
    """What a ridge probe found.

    Attributes:
        accuracy: on test, with Wilson's interval and chance (1 / C).
        best_lambda: of the highest leave-one-out accuracy on train, the largest such.
        trace: lambda -> leave-one-out accuracy, in rising order.
        errors: lambda -> mean square of the leave-one-out residuals, in rising order.
        classes: the C labels, sorted.
        solution: the classifier that was tested.
        scored: what it said of each test picture.
    """

    accuracy: Metric
    best_lambda: float
    trace: dict[float, float]
    errors: dict[float, float]
    classes: tuple[Any, ...]
    solution: LinearClassifier
    scored: Scored


def ridge_probe(
    train: Any, train_labels: Any, test: Any, test_labels: Any, *, lambdas: Sequence[float] | None = None
) -> RidgeResult:
    """Choose lambda by leave-one-out accuracy on train, report on test.

    Features go in as they are. Tensors on a GPU are solved there; memory-mapped arrays are read in blocks where N > D.

    Args:
        train, test: float [N, D].
        train_labels, test_labels: [N] labels of any type that can be sorted.
        lambdas: those to try; None: 4 a decade, from 1e-6 to 1e3 times the mean eigenvalue of the centred X'X.

    Raises:
        ValueError: features of other shapes or not finite, no rows, fewer than 2 classes, a test label that train lacks, a lambda
            that is not positive, several lambdas where every class has one picture.
    """
    train = check_features("train", train, len(train_labels))
    test = check_features("test", test, len(test_labels), train.shape[1])
    classes = classes_of(train_labels)
    targets_N = targets_of("train", train_labels, classes)
    if len(targets_N) == len(classes) and (lambdas is None or len(set(lambdas)) > 1):
        raise ValueError("every class of train has one picture, so leaving it out says nothing of lambda: give a single one")
    path = RidgePath(train, targets_N, len(classes))
    trace, errors = path.leave_one_out(path.lambdas() if lambdas is None else lambdas)
    best_lambda = max(trace, key=lambda lam: (trace[lam], lam))
    solution = path.solve(best_lambda)
    scored = score(solution.logits(test).argmax(1), test_labels, classes)
    return RidgeResult(
        accuracy=scored.metrics["top1"],
        best_lambda=best_lambda,
        trace=trace,
        errors=errors,
        classes=classes,
        solution=solution,
        scored=scored,
    )


class RidgePath:
    """One data set's solutions for all lambdas.

    With S the eigenvalues and V the eigenvectors of the centred X'X, the fit is mean + X V diag(1 / (S + lambda)) V'X'Y and
    h_i = 1/N + sum_r (x_i V)_r^2 / (S_r + lambda). With fewer pictures than columns U are the eigenvectors of XX', the residuals
    U diag(lambda / (S + lambda)) U'Y, and 1 - h_i = sum_r U_ir^2 lambda / (S_r + lambda) - 1/N.

    Args:
        features: float [N, D], finite.
        targets_N: int64 class of each row.
        num_classes: C.
    """

    def __init__(self, features: Any, targets_N: Tensor, num_classes: int) -> None:
        self.features, self.num_classes = features, num_classes
        self.device = features.device if isinstance(features, Tensor) else CPU
        self.num_rows, width = features.shape
        self.targets_N = targets_N.to(self.device)
        self.target_mean_C = 2 * self.targets_N.bincount(minlength=num_classes).double() / self.num_rows - 1
        self.mean_D = torch.zeros(width, dtype=torch.float64, device=self.device)
        for _, block_nD in self._blocks():
            self.mean_D += block_nD.sum(0) / self.num_rows
        self.dual = self.num_rows <= width
        if self.dual:
            self.centred_ND = torch.cat([block_nD for _, block_nD in self._blocks()]) - self.mean_D
            values_R, self.vectors = torch.linalg.eigh(self.centred_ND @ self.centred_ND.T)
            self.projected_RC = self.vectors.T @ self._targets(slice(0, self.num_rows))
        else:
            gram_DD = torch.zeros(width, width, dtype=torch.float64, device=self.device)
            cross_DC = torch.zeros(width, num_classes, dtype=torch.float64, device=self.device)
            for rows, block_nD in self._blocks():
                centred_nD = block_nD - self.mean_D
                gram_DD += centred_nD.T @ centred_nD
                cross_DC += centred_nD.T @ self._targets(rows)
            values_R, self.vectors = torch.linalg.eigh(gram_DD)
            self.projected_RC = self.vectors.T @ cross_DC
        self.spectrum_R = values_R.clamp(min=0)

    def lambdas(self) -> tuple[float, ...]:
        """`RELATIVE_LAMBDAS` times the mean eigenvalue; where all pictures are alike, themselves."""
        rank = min(self.num_rows - 1, self.features.shape[1])
        scale = float(self.spectrum_R.sum()) / rank
        return tuple(factor * (scale or 1.0) for factor in RELATIVE_LAMBDAS)

    def solve(self, lam: float) -> LinearClassifier:
        """The classifier for one lambda."""
        _check_lambdas([lam])
        weights_DC = self.vectors @ (self.projected_RC / (self.spectrum_R + lam)[:, None])
        if self.dual:
            weights_DC = self.centred_ND.T @ weights_DC
        return LinearClassifier(weights_DC=weights_DC, bias_C=self.target_mean_C - self.mean_D @ weights_DC, lam=lam)

    def leave_one_out(self, lambdas: Sequence[float]) -> tuple[dict[float, float], dict[float, float]]:
        """Accuracy and mean squared residual of the fits without the picture that they are asked about.

        Returns:
            lambda -> accuracy, lambda -> mean square over pictures and classes, in rising order.
        """
        values = sorted({float(lam) for lam in lambdas})
        _check_lambdas(values)
        rights, squares = dict.fromkeys(values, 0), dict.fromkeys(values, 0.0)
        for rows, projected_nR in self._projected():
            targets_nC = self._targets(rows)
            for lam in values:
                residuals_nC = self._residuals(projected_nR, targets_nC, lam)
                outputs_nC = targets_nC + self.target_mean_C - residuals_nC
                rights[lam] += int((outputs_nC.argmax(1) == self.targets_N[rows]).sum())
                squares[lam] += float(residuals_nC.square().sum())
        count = self.num_rows * self.num_classes
        return (
            {lam: right / self.num_rows for lam, right in rights.items()},
            {lam: square / count for lam, square in squares.items()},
        )

    def outputs(self, lam: float) -> Tensor:
        """float64 [N, C], for each picture the outputs of the fit without it."""
        _check_lambdas([lam])
        found = [
            self._targets(rows) + self.target_mean_C - self._residuals(projected_nR, self._targets(rows), lam)
            for rows, projected_nR in self._projected()
        ]
        return torch.cat(found)

    def _residuals(self, projected_nR: Tensor, targets_nC: Tensor, lam: float) -> Tensor:
        """Targets minus the outputs of the fit without the picture, [n, C]."""
        if self.dual:
            shrunk_R1 = (lam / (self.spectrum_R + lam))[:, None]
            left_nC = projected_nR @ (shrunk_R1 * self.projected_RC)
            free_n1 = projected_nR.square() @ shrunk_R1 - 1 / self.num_rows
        else:
            inverse_R1 = (1 / (self.spectrum_R + lam))[:, None]
            left_nC = targets_nC - projected_nR @ (inverse_R1 * self.projected_RC)
            free_n1 = 1 - 1 / self.num_rows - projected_nR.square() @ inverse_R1
        return left_nC / free_n1

    def _projected(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows and their coordinates: of U where there are fewer pictures than columns, else x V."""
        if self.dual:
            yield slice(0, self.num_rows), self.vectors
        else:
            for rows, block_nD in self._blocks():
                yield rows, (block_nD - self.mean_D) @ self.vectors

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        at = 0
        for block_nD in feature_blocks(self.features, self.num_classes, self.device, torch.float64):
            yield slice(at, at + len(block_nD)), block_nD
            at += len(block_nD)

    def _targets(self, rows: slice) -> Tensor:
        """Centred targets [n, C]."""
        targets_nC = (-1 - self.target_mean_C).repeat(len(self.targets_N[rows]), 1)
        targets_nC[torch.arange(len(targets_nC), device=self.device), self.targets_N[rows]] += 2
        return targets_nC


def _check_lambdas(lambdas: Sequence[float]) -> None:
    bad = [lam for lam in lambdas if not 0 < lam < math.inf]
    if bad or not len(lambdas):
        raise ValueError(f"lambdas must be one or more positive numbers, got {bad or list(lambdas)}")
