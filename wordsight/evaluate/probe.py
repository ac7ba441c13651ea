"""Linear probe: multinomial logistic regression on frozen features, by the protocol of CLIP (arXiv 2103.00020, appendix A.3).

The loss is scikit-learn's: the sum over pictures of the cross-entropy plus lambda/2 |W|^2, with C = 1/lambda and a bias without
penalty. It is minimised by L-BFGS (Liu and Nocedal, 1989), which starts from the solution of the nearest lambda and takes
h_c X'X + lambda I for the initial curvature of class c, with X centred and h_c the present mean of p_c (1 - p_c): the Hessian's
diagonal block with its weights averaged. So the spread of the features' spectrum, which makes plain L-BFGS slow, costs nothing.

Shape legend: N pictures, n of one block, D feature width, R coordinates that are solved in (D, or the rank where there are fewer
pictures), C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wordsight.evaluate.features import (
    LinearClassifier,
    Scored,
    as_tensor,
    check_features,
    classes_of,
    feature_blocks,
    score,
    targets_of,
)
from wordsight.types import Metric

MAX_ITERATIONS = 1000
STEPS_A_DECADE = 8
LOG10_RANGE = (-6, 6)  # of lambda
TOLERANCE = 2e-7  # a fit ends where the decrease that its next step expects is this share of the loss
TUNING_TOLERANCE = 1e-4  # the same for a large fit that only tunes lambda
MEMORY = 10  # steps that L-BFGS remembers
SMALL = 1 << 24  # N x D x C up to which everything is float64, and a fit costs so little that tuning ones end as others do
TURNED_BYTES = 1 << 26  # features (in float32) up to which they are turned once, instead of the weights at each pass
ARMIJO = 1e-4
Step = tuple[Tensor, Tensor]  # a step, the change along it of the gradient without penalty
Pair = tuple[Tensor, Tensor, float]  # a step, the gradient's change along it, 1 over their product


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """What a linear probe found.

    Attributes:
        accuracy: on test, with Wilson's interval and chance (1 / C).
        best_lambda: of the highest accuracy on validation, the largest such.
        trace: lambda -> accuracy on validation of the fit on train, for every lambda that was tried, in rising order.
        classes: the C labels, sorted; the columns of `solution`.
        solution: the classifier that was tested, fitted on train and validation.
        scored: what it said of each test picture.
    """

    accuracy: Metric
    best_lambda: float
    trace: dict[float, float]
    classes: tuple[Any, ...]
    solution: Solution
    scored: Scored


@dataclass(frozen=True, kw_only=True)
class Solution(LinearClassifier):
    """A fitted linear classifier.

    Attributes:
        loss: sum of the cross-entropies plus the penalty.
        num_iterations: of L-BFGS.
        converged: False where `max_iterations` ended it.
    """

    loss: float
    num_iterations: int
    converged: bool


def linear_probe(
    train: Any,
    train_labels: Any,
    val: Any,
    val_labels: Any,
    test: Any,
    test_labels: Any,
    *,
    lambdas: Sequence[float] | None = None,
) -> ProbeResult:
    """Tune lambda on validation, fit again on train and validation, report on test.

    Features go in as they are: the paper's are penultimate ones, not normalised. Tensors on a GPU are solved there; memory-mapped
    arrays are read in blocks.

    Args:
        train, val, test: float [N, D].
        train_labels, val_labels, test_labels: [N] labels of any type that can be sorted.
        lambdas: those to try; None is the paper's search among 96 steps of 1e-6 to 1e6, see `search`.

    Returns:
        The result. Test labels are read for the last figure alone.

    Raises:
        ValueError: features of other shapes or not finite, no rows, one class alone, a label that train lacks, a lambda that is
            not positive.
    """
    train = check_features("train", train, len(train_labels))
    val, test = (
        check_features(name, given, len(labels), train.shape[1])
        for name, given, labels in (("val", val, val_labels), ("test", test, test_labels))
    )
    classes = classes_of(train_labels)
    targets, val_targets = targets_of("train", train_labels, classes), targets_of("val", val_labels, classes)
    problem = LogisticRegression([train], targets, len(classes))
    path = Path(problem)
    best_lambda, trace = search(lambda lam: accuracy(path(lam), val, val_targets), lambdas)
    both = torch.cat([targets, val_targets])
    final = LogisticRegression([train, val], both, len(classes), problem).solve(best_lambda, path(best_lambda))
    scored = score(final.logits(test).argmax(1), test_labels, classes)
    return ProbeResult(
        accuracy=scored.metrics["top1"],
        best_lambda=best_lambda,
        trace=trace,
        classes=classes,
        solution=final,
        scored=scored,
    )


def search(score: Callable[[float], float], lambdas: Sequence[float] | None = None) -> tuple[float, dict[float, float]]:
    """The lambda of the highest score, among equals the largest; and lambda -> score of those that were tried.

    Without `lambdas` it is the paper's parametric binary search: 1e-6, 1e-4, ..., 1e6 first, then the two neighbours of the peak
    at half the distance, until they are an eighth of a decade apart. It goes from large to small, each near the last.
    """
    trace: dict[float, float] = {}
    if lambdas is not None:
        values = sorted({float(lam) for lam in lambdas}, reverse=True)
        bad = [lam for lam in values if not 0 < lam < math.inf]
        if bad or not values:
            raise ValueError(f"lambdas must be one or more positive numbers, got {bad or values}")
        trace = {lam: score(lam) for lam in values}
    else:
        low, high = (STEPS_A_DECADE * exponent for exponent in LOG10_RANGE)
        spacing = 2 * STEPS_A_DECADE
        asked = range(high, low - 1, -spacing)
        while asked:
            for step in asked:
                lam = 10.0 ** (step / STEPS_A_DECADE)
                if low <= step <= high and lam not in trace:
                    trace[lam] = score(lam)
            peak = round(STEPS_A_DECADE * math.log10(_peak(trace)))
            spacing //= 2
            asked = range(peak + spacing, peak - spacing - 1, -2 * spacing) if spacing else range(0)
    return _peak(trace), dict(sorted(trace.items()))


def _peak(trace: dict[float, float]) -> float:
    return max(trace, key=lambda lam: (trace[lam], lam))


class Path:
    """Solutions of one problem for any lambdas, each started from the nearest that is there.

    The cross-entropy and its gradient do not depend on lambda, so those of the last solution's end are the next one's start, and
    what L-BFGS saw of its curvature is what the next fit begins with.
    """

    def __init__(self, problem: LogisticRegression, max_iterations: int = MAX_ITERATIONS) -> None:
        self.problem, self.max_iterations = problem, max_iterations
        self.known: dict[float, Point] = {}
        self.steps: list[Step] = []
        self.solutions: dict[float, Solution] = {}

    def __call__(self, lam: float) -> Solution:
        """The solution, good enough to be judged on validation; exact where the problem is small."""
        if lam not in self.known:
            # of two at the same distance the larger lambda's, which is the smoother solution
            near = min(self.known, key=lambda other: (round(abs(math.log(other / lam)), 6), -other), default=None)
            start = self.problem.start() if near is None else self.known[near]
            tolerance = TOLERANCE if self.problem.dtype == torch.float64 else TUNING_TOLERANCE
            self.known[lam], self.solutions[lam] = self.problem.descend(
                start, lam, tolerance=tolerance, max_iterations=self.max_iterations, steps=self.steps
            )
        return self.solutions[lam]


@dataclass(frozen=True)
class Point:
    """A place in a problem's coordinates and what the data say there, without penalty.

    Attributes:
        x: float64 [R + 1, C], the bias in the last row.
        loss: the sum of the cross-entropies.
        gradient: of it, as x.
        spread_C: each class's mean of p (1 - p).
    """

    x: Tensor
    loss: float
    gradient: Tensor
    spread_C: Tensor


class LogisticRegression:
    """One data set's problem for any number of lambdas.

    It is solved in coordinates U of the centred features' principal directions, W = T U: there the averaged Hessian of a class is
    diagonal. With two classes scikit-learn has one weight vector w, whose penalty is lambda/2 |w|^2; here the classes have -w/2
    and w/2, so lambda is doubled to make the same problem.

    Args:
        parts: features [N_i, D] of one or more parts, arrays or tensors, which may lie on a GPU. A memory-mapped array is read
            block by block at each pass and never held whole, unless it is small or has fewer rows than columns.
        targets_N: int64 class of each row of all parts.
        num_classes: C; each has a row.
        like: a problem of much the same features, whose directions are taken over: any orthogonal ones are right.
        weights_N: how much each row's cross-entropy counts; None: 1.
    """

    def __init__(
        self,
        parts: Sequence[Any],
        targets_N: Tensor,
        num_classes: int,
        like: LogisticRegression | None = None,
        *,
        weights_N: Tensor | None = None,
    ) -> None:
        self.num_classes = num_classes
        self.device = parts[0].device if isinstance(parts[0], Tensor) else torch.device("cpu")
        self.num_rows, width = sum(len(part) for part in parts), parts[0].shape[1]
        self.dtype = torch.float64 if self.num_rows * width * num_classes <= SMALL else torch.float32
        self.parts = tuple(part if isinstance(part, np.memmap) else as_tensor(part, self.device, self.dtype) for part in parts)
        self.targets_N = targets_N.to(self.device)
        self.weights_N1 = None if weights_N is None else weights_N.double().to(self.device)[:, None]
        self.mean_D = torch.zeros(width, dtype=torch.float64, device=self.device)
        for block_nD in self._blocks():
            self.mean_D += block_nD.double().sum(0) / self.num_rows
        self.turned_NR: Tensor | None = None
        if self.num_rows <= width:
            self.directions_DR, self.spectrum_R1 = self._reduce()
        elif like is not None and like.num_rows > width:
            self.directions_DR, self.spectrum_R1 = like.directions_DR, like.spectrum_R1 * (self.num_rows / like.num_rows)
        else:
            self.directions_DR, self.spectrum_R1 = self._diagonalise()
        self.rotation_DR = self.directions_DR.to(self.dtype)
        if self.turned_NR is None and 4 * self.num_rows * width <= TURNED_BYTES:
            centred_ND = torch.cat(list(self._blocks())) - self.mean_D.to(self.dtype)
            self.turned_NR = centred_ND @ self.rotation_DR

    def _blocks(self) -> Iterator[Tensor]:
        for part in self.parts:
            yield from feature_blocks(part, self.num_classes, self.device, self.dtype)

    def _reduce(self) -> tuple[Tensor, Tensor]:
        """Fewer rows than columns: W is penalised, so it lies in the span of the rows, and the features are kept in it."""
        centred_ND = torch.cat(list(self._blocks())).double() - self.mean_D
        values_N, vectors_NN = torch.linalg.eigh(centred_ND @ centred_ND.T)
        kept = values_N > 1e-12 * values_N[-1]
        spectrum_R, vectors_NR = values_N[kept], vectors_NN[:, kept]
        self.turned_NR = (vectors_NR * spectrum_R.sqrt()).to(self.dtype)
        return centred_ND.T @ (vectors_NR / spectrum_R.sqrt()), spectrum_R[:, None]

    def _diagonalise(self) -> tuple[Tensor, Tensor]:
        width = len(self.mean_D)
        gram_DD = torch.zeros(width, width, dtype=torch.float64, device=self.device)
        for block_nD in self._blocks():
            centred_nD = block_nD - self.mean_D.to(self.dtype)  # it only has to be near: any rotation makes the same problem
            gram_DD += (centred_nD.T @ centred_nD).double()
        values_D, vectors_DD = torch.linalg.eigh(gram_DD)
        return vectors_DD, values_D.clamp(min=0)[:, None]

    def start(self, solution: Solution | None = None) -> Point:
        """Where to start from: zeros, or another problem's solution."""
        x = torch.zeros(len(self.spectrum_R1) + 1, self.num_classes, dtype=torch.float64, device=self.device)
        if solution is not None:
            x[:-1] = self.directions_DR.T @ solution.weights_DC
            x[-1] = solution.bias_C + self.mean_D @ solution.weights_DC
        return self._cross_entropy(x)

    def solve(self, lam: float, start: Solution | None = None, *, max_iterations: int = MAX_ITERATIONS) -> Solution:
        """The minimum for one lambda, see `descend`."""
        return self.descend(self.start(start), lam, max_iterations=max_iterations)[1]

    def descend(
        self,
        point: Point,
        lam: float,
        *,
        tolerance: float | None = None,
        max_iterations: int = MAX_ITERATIONS,
        steps: list[Step] | None = None,
    ) -> tuple[Point, Solution]:
        """L-BFGS from a point to the minimum for one lambda.

        Args:
            point: where to start.
            lam: lambda.
            tolerance: it ends where the decrease that its next step expects is this share of the loss; None is `TOLERANCE`.
            max_iterations: steps.
            steps: what L-BFGS remembers of fits for other lambdas; it is brought up to date.

        Raises:
            ValueError: the loss is infinite or undefined where it starts.
        """
        tolerance = TOLERANCE if tolerance is None else tolerance
        penalty = 2 * lam if self.num_classes == 2 else lam
        weighted = torch.full((len(point.x), 1), penalty, dtype=torch.float64, device=self.device)
        weighted[-1] = 0.0  # the bias

        def whole(point: Point) -> tuple[float, Tensor]:
            return point.loss + float((weighted * point.x.square()).sum()) / 2, point.gradient + weighted * point.x

        scale = torch.cat([self.spectrum_R1, self.spectrum_R1.new_full((1, 1), self.num_rows)])
        value, gradient = whole(point)
        if not math.isfinite(value):
            raise ValueError(f"the probe's loss is {value} at step 0: the features are too large, scale them down")
        steps = [] if steps is None else steps
        memory: list[Pair] = []
        for moved, bent in steps:
            memory = _remembered(memory, moved, bent + weighted * moved)
        count, converged = 0, False
        while count < max_iterations and not converged:
            step = _direction(gradient, point.spread_C * scale + weighted, memory)
            slope = _dot(gradient, step)
            if -slope / 2 <= tolerance * value:
                converged = True
                break
            size = 1.0
            while True:
                new = self._cross_entropy(point.x + size * step)
                new_value, new_gradient = whole(new)
                if new_value <= value + ARMIJO * size * slope:
                    break
                if size < 1e-6:  # rounding hides what is left
                    converged = True
                    break
                # the minimum of the parabola through value, slope and new value
                best = -slope * size**2 / (2 * (new_value - value - size * slope)) if math.isfinite(new_value) else 0.0
                size = min(max(best, 0.1 * size), 0.5 * size)
            if not converged:
                memory = _remembered(memory, new.x - point.x, new_gradient - gradient)
                steps.append((new.x - point.x, new.gradient - point.gradient))
                del steps[:-MEMORY]
                point, value, gradient = new, new_value, new_gradient
                count += 1
        weights_DC = self.directions_DR @ point.x[:-1]
        solution = Solution(
            weights_DC=weights_DC,
            bias_C=point.x[-1] - self.mean_D @ weights_DC,
            lam=lam,
            loss=value,
            num_iterations=count,
            converged=converged,
        )
        return point, solution

    def _cross_entropy(self, x: Tensor) -> Point:
        """One pass over the data."""
        if self.turned_NR is not None:
            weights, shift_C = x[:-1].to(self.dtype), x[-1].to(self.dtype)
            blocks: Iterator[Tensor] = feature_blocks(self.turned_NR, self.num_classes, self.device, self.dtype)
        else:
            weights = self.rotation_DR @ x[:-1].to(self.dtype)
            shift_C = (x[-1] - self.mean_D @ weights.double()).to(self.dtype)
            blocks = self._blocks()
        loss, at = 0.0, 0
        gradient = torch.zeros(weights.shape, dtype=torch.float64, device=self.device)
        residual_C, spread_C = torch.zeros_like(x[-1]), torch.zeros_like(x[-1])
        for block in blocks:
            targets_n1 = self.targets_N[at : at + len(block), None]
            weights_n1 = None if self.weights_N1 is None else self.weights_N1[at : at + len(block)]
            at += len(block)
            # a row's margins to its right class: small losses keep their digits, which log_softmax loses in float32
            margins_nC = torch.addmm(shift_C, block, weights)
            margins_nC -= margins_nC.gather(1, targets_n1)
            top_n1 = margins_nC.amax(1, keepdim=True)  # >= 0
            others_nC = margins_nC.sub_(top_n1).exp_().scatter_(1, targets_n1, 0.0)
            others_n1 = others_nC.sum(1, keepdim=True)
            own_n1 = torch.exp(-top_n1)
            losses_n1 = top_n1.double() + torch.log1p(torch.expm1(-top_n1.double()) + others_n1.double())
            loss += float((losses_n1 if weights_n1 is None else weights_n1 * losses_n1).sum())
            total_n1 = own_n1 + others_n1
            p_nC = others_nC.div_(total_n1)
            p_nC.scatter_(1, targets_n1, -others_n1 / total_n1)  # p - y from here on; p (1 - p) is the same for |p - y|
            if weights_n1 is None:
                spread_C += p_nC.abs().sum(0).double() - p_nC.square().sum(0).double()
            else:
                spread_C += (weights_n1 * (p_nC.abs() - p_nC.square())).sum(0)
                p_nC *= weights_n1.to(p_nC.dtype)
            residual_C += p_nC.sum(0).double()
            gradient += (p_nC.T @ block).T.double()
        if self.turned_NR is None:
            centred = gradient - self.mean_D[:, None] * residual_C
            gradient = (self.rotation_DR.T @ centred.to(self.dtype)).double()
        return Point(x, loss, torch.cat([gradient, residual_C[None]]), spread_C / self.num_rows)


def _remembered(memory: list[Pair], moved: Tensor, bent: Tensor) -> list[Pair]:
    """The memory with a step and the gradient's change along it."""
    curved = _dot(moved, bent)
    return [*memory[1 - MEMORY :], (moved, bent, 1 / curved)] if curved > 0 else memory  # not above 0: by rounding


def _direction(gradient: Tensor, curvature: Tensor, memory: Sequence[Pair]) -> Tensor:
    """-H gradient by the two loops; the diagonal is scaled to the last step's curvature, else most steps would be too long."""
    step = -gradient
    shares = []
    for moved, bent, inverse in reversed(memory):
        shares.append(inverse * _dot(moved, step))
        step.add_(bent, alpha=-shares[-1])
    step /= curvature
    if memory:
        _, bent, inverse = memory[-1]
        step /= inverse * _dot(bent, bent / curvature)
    for (moved, bent, inverse), share in zip(memory, reversed(shares), strict=True):
        step.add_(moved, alpha=share - inverse * _dot(bent, step))
    return step


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.flatten(), b.flatten()))


def accuracy(solution: Solution, features: Any, targets_N: Tensor) -> float:
    """The share of pictures whose likeliest class is right."""
    return float((solution.logits(features).argmax(1) == targets_N.to(solution.weights_DC.device)).double().mean())
