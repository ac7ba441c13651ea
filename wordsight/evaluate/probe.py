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

from wordsight.evaluate.metrics import proportion
from wordsight.types import Metric

MAX_ITERATIONS = 1000
STEPS_A_DECADE = 8
LOG10_RANGE = (-6, 6)  # of lambda
TOLERANCE = 2e-7  # a fit ends where the decrease that its next step expects is this share of the loss
TUNING_TOLERANCE = 1e-4  # the same for a large fit that only tunes lambda
MEMORY = 10  # steps that L-BFGS remembers
SMALL = 1 << 24  # N x D x C up to which everything is float64, and a fit costs so little that tuning ones end as others do
BLOCK_NUMBERS = 1 << 20  # logits of one block
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
    """

    accuracy: Metric
    best_lambda: float
    trace: dict[float, float]
    classes: tuple[Any, ...]
    solution: Solution


@dataclass(frozen=True, kw_only=True)
class Solution:
    """A fitted linear classifier: logits = x W + b.

    Attributes:
        weights_DC: float64 [D, C].
        bias_C: float64 [C].
        lam: lambda.
        loss: sum of the cross-entropies plus the penalty.
        num_iterations: of L-BFGS.
        converged: False where `max_iterations` ended it.
    """

    weights_DC: Tensor
    bias_C: Tensor
    lam: float
    loss: float
    num_iterations: int
    converged: bool

    def logits(self, features_ND: Any) -> Tensor:
        """[N, D] -> [N, C], in blocks; float64 for float64 features, else float32."""
        dtype = torch.float64 if str(features_ND.dtype).endswith("float64") else torch.float32
        weights_DC, bias_C, device = self.weights_DC.to(dtype), self.bias_C.to(dtype), self.weights_DC.device
        blocks = _blocks(features_ND, len(bias_C), device, dtype)
        return torch.cat([torch.addmm(bias_C, block_nD, weights_DC) for block_nD in blocks])


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
        The result. Test labels are read for the last figure alone (and to see that each is a class).

    Raises:
        ValueError: features of other shapes or not finite, no rows, one class alone, a label that train lacks, a lambda that is
            not positive.
    """
    features = {"train": train, "val": val, "test": test}
    labels = {"train": _list(train_labels), "val": _list(val_labels), "test": _list(test_labels)}
    for name in features:
        features[name] = _checked(name, features[name], len(labels[name]), features["train"])
    classes = _sorted(labels["train"])
    if len(classes) < 2:
        raise ValueError(f"a probe needs at least 2 classes, train has one: {classes[0]!r}")
    places = {label: i for i, label in enumerate(classes)}
    for name in ("val", "test"):
        unknown = _sorted(set(labels[name]) - set(places))
        if unknown:
            raise ValueError(f"{name} has {len(unknown)} labels that train lacks: {', '.join(map(repr, unknown[:10]))}")
    targets = {name: torch.tensor([places[label] for label in labels[name]]) for name in labels}

    problem = LogisticRegression([features["train"]], targets["train"], len(classes))
    path = Path(problem)
    best_lambda, trace = search(lambda lam: accuracy(path(lam), features["val"], targets["val"]), lambdas)
    tuned = path(best_lambda)
    both = torch.cat([targets["train"], targets["val"]])
    final = LogisticRegression([features["train"], features["val"]], both, len(classes), problem).solve(best_lambda, tuned)
    hits_N = _hits(final, features["test"], targets["test"])
    return ProbeResult(
        accuracy=proportion(hits_N.cpu().numpy(), 1 / len(classes)),
        best_lambda=best_lambda,
        trace=trace,
        classes=tuple(classes),
        solution=final,
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
    """

    def __init__(self, parts: Sequence[Any], targets_N: Tensor, num_classes: int, like: LogisticRegression | None = None) -> None:
        self.num_classes = num_classes
        self.device = parts[0].device if isinstance(parts[0], Tensor) else torch.device("cpu")
        self.num_rows, width = sum(len(part) for part in parts), parts[0].shape[1]
        self.dtype = torch.float64 if self.num_rows * width * num_classes <= SMALL else torch.float32
        self.parts = tuple(part if isinstance(part, np.memmap) else _tensor(part, self.device, self.dtype) for part in parts)
        self.targets_N = targets_N.to(self.device)
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
            yield from _blocks(part, self.num_classes, self.device, self.dtype)

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
            blocks: Iterator[Tensor] = _blocks(self.turned_NR, self.num_classes, self.device, self.dtype)
        else:
            weights = self.rotation_DR @ x[:-1].to(self.dtype)
            shift_C = (x[-1] - self.mean_D @ weights.double()).to(self.dtype)
            blocks = self._blocks()
        loss, at = 0.0, 0
        gradient = torch.zeros(weights.shape, dtype=torch.float64, device=self.device)
        residual_C, spread_C = torch.zeros_like(x[-1]), torch.zeros_like(x[-1])
        for block in blocks:
            targets_n1 = self.targets_N[at : at + len(block), None]
            at += len(block)
            # a row's margins to its right class: small losses keep their digits, which log_softmax loses in float32
            margins_nC = torch.addmm(shift_C, block, weights)
            margins_nC -= margins_nC.gather(1, targets_n1)
            top_n1 = margins_nC.amax(1, keepdim=True)  # >= 0
            others_nC = margins_nC.sub_(top_n1).exp_().scatter_(1, targets_n1, 0.0)
            others_n1 = others_nC.sum(1, keepdim=True)
            own_n1 = torch.exp(-top_n1)
            loss += float((top_n1.double() + torch.log1p(torch.expm1(-top_n1.double()) + others_n1.double())).sum())
            total_n1 = own_n1 + others_n1
            p_nC = others_nC.div_(total_n1)
            p_nC.scatter_(1, targets_n1, -others_n1 / total_n1)  # p - y from here on; p (1 - p) is the same for |p - y|
            spread_C += p_nC.abs().sum(0).double() - p_nC.square().sum(0).double()
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


def _hits(solution: Solution, features: Any, targets_N: Tensor) -> Tensor:
    """[N] whether the likeliest class is right."""
    return solution.logits(features).argmax(1) == targets_N.to(solution.weights_DC.device)


def accuracy(solution: Solution, features: Any, targets_N: Tensor) -> float:
    """The share of pictures whose likeliest class is right."""
    return float(_hits(solution, features, targets_N).double().mean())


def _list(labels: Any) -> list[Any]:
    return labels.tolist() if hasattr(labels, "tolist") else list(labels)


def _sorted(labels: Any) -> list[Any]:
    """The distinct labels, by kind and value."""
    return sorted(set(labels), key=lambda label: (isinstance(label, str), label))


def _checked(name: str, features: Any, num_labels: int, train: Any) -> Any:
    """The features as an array or tensor of numbers [N, D], each finite."""
    if not isinstance(features, Tensor | np.ndarray):
        features = np.asarray(features)
    if features.ndim != 2 or len(features) == 0:
        raise ValueError(f"{name} must be features [N, D] of at least one picture, got the shape {tuple(features.shape)}")
    width = np.shape(train)[1]
    if features.shape[1] != width:
        raise ValueError(f"{name} has {features.shape[1]} features a picture and train {width}: they are not of one model")
    if len(features) != num_labels:
        raise ValueError(f"{name} has {len(features)} pictures and {num_labels} labels")
    at = 0
    for block_nD in _blocks(features, width, torch.device("cpu"), torch.float64):
        finite_n = torch.isfinite(block_nD).all(1)
        if not finite_n.all():
            row = at + int((~finite_n).nonzero()[0, 0])
            raise ValueError(
                f"the features of row {row} of {name} are infinite or undefined (NaN): mend or leave out that picture"
            )
        at += len(block_nD)
    return features


def _tensor(part: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    if not isinstance(part, Tensor):
        part = torch.from_numpy(np.array(part))  # a copy: torch can't hold what must not be written to
    return part.to(device, dtype)


def _blocks(part: Any, num_classes: int, device: torch.device, dtype: torch.dtype) -> Iterator[Tensor]:
    """Rows [n, D] of a part, in order."""
    size = max(256, BLOCK_NUMBERS // num_classes)
    for start in range(0, len(part), size):
        yield _tensor(part[start : start + size], device, dtype)
