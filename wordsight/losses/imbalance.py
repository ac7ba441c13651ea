"""Losses, weights and corrections of a classifier for classes of unequal size: pure functions, each as its paper says.

Focal: Lin 2017, arXiv 1708.02002. Balanced softmax: Ren 2020, arXiv 2007.10740. Logit adjustment: Menon 2021, arXiv 2007.07314.
LDAM and deferred re-weighting: Cao 2019, arXiv 1906.07413. LADE: Hong 2021, arXiv 2012.00321. Effective number: Cui 2019, arXiv
1901.05555. Tau-normalisation and nearest class mean: Kang 2020, arXiv 1910.09217. GRW: DisAlign, Zhang 2021, arXiv 2103.16370.

n_c is the number of training samples of class c, pi_c = n_c / sum n its share. Counts need be no whole numbers.

*Classes without training samples* (n_c = 0) never make a loss or a weight infinite. In priors and margins such a class counts as
the rarest class that has samples; where classes are weighed it weighs 0, and the other classes' weights are what they were if it
did not exist.

Precision: everything is computed in float32, or wider if the logits are, under autocast too. Losses are means over rows; where
`weights` say how much each row counts (label noise, or a class's weight by `class_weights[targets]`) the mean is sum w l / sum w,
0 if all weights are 0.

Shape legend: B batch, C classes, D width of a feature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

LADE_WEIGHT = 0.1  # of LADE's estimator beside balanced softmax: the paper's alpha

Counts = Tensor | Sequence[float]

# Losses


def weighted_cross_entropy(logits: Tensor, targets: Tensor, class_weights: Counts, *, weights: Tensor | None = None) -> Tensor:
    """Cross entropy with a weight for each class: sum_i w_{y_i} l_i / sum_i w_{y_i}, as `torch.nn.functional.cross_entropy`.

    Papers that weigh classes (Cui 2019, section 4) divide by the number of rows instead. Both point the same way;
    this one's length does not hang on which classes a batch happened to draw.

    Args:
        logits: [B, C].
        targets: integer [B], 0 to C - 1.
        class_weights: [C], not negative.
        weights: [B], not negative; multiplies the class's.

    Returns:
        Scalar, nats.

    Raises:
        ValueError: shapes or targets that do not fit, negative weights.
    """
    logits, targets = _read_rows(logits, targets)
    class_weights_C = _read_class_values(class_weights, logits.shape[1], "class weight").to(logits)
    weights_B = class_weights_C[targets]
    rows_B = _read_weights(weights, logits)
    if rows_B is not None:
        weights_B = weights_B * rows_B
    return _mean(F.cross_entropy(logits, targets, reduction="none"), weights_B)


def focal(logits: Tensor, targets: Tensor, gamma: float = 2.0, *, weights: Tensor | None = None) -> Tensor:
    """-(1 - p_y)^gamma log p_y with p = softmax(z): Lin 2017, section 3.2, equation 4.

    The paper has a sigmoid a class and divides by the number of boxes with an object; a softmax and a mean over rows is its form
    for classes that exclude each other. Its alpha is a weight for each class: `weights=alpha[targets]`. gamma = 0 is cross
    entropy.

    Args:
        logits: [B, C].
        targets: integer [B], 0 to C - 1.
        gamma: 0 or more; how little the rows count that are right already.
        weights: [B], see the module.

    Returns:
        Scalar, nats.

    Raises:
        ValueError: shapes or targets that do not fit, gamma below 0.
    """
    logits, targets = _read_rows(logits, targets)
    _check_number("gamma", gamma, low=0.0)
    loss_B = F.cross_entropy(logits, targets, reduction="none")
    # where p is 1 to the last digit, (1 - p)^gamma has an infinite slope for gamma < 1; the floor makes it 0
    wrong_B = (-torch.expm1(-loss_B)).clamp_min(torch.finfo(logits.dtype).tiny)
    return _mean(wrong_B**gamma * loss_B, _read_weights(weights, logits))


def balanced_softmax(logits: Tensor, targets: Tensor, counts: Counts, *, weights: Tensor | None = None) -> Tensor:
    """CE(z + log pi): Ren 2020, section 3.1, theorem 1.

    The softmax of z itself is then the posterior of balanced classes, so z is used as it is when classifying.

    Args:
        logits: [B, C].
        targets: integer [B], 0 to C - 1.
        counts: [C], training samples of each class; a class without any has the prior of the rarest that has some.
        weights: [B], see the module.

    Returns:
        Scalar, nats.

    Raises:
        ValueError: shapes, targets or counts that do not fit.
    """
    return logit_adjustment(logits, targets, counts, 1.0, weights=weights)


def logit_adjustment(
    logits: Tensor, targets: Tensor, counts: Counts, tau: float = 1.0, *, weights: Tensor | None = None
) -> Tensor:
    """CE(z + tau log pi): Menon 2021, section 5.1, equation 10. tau = 1 is balanced softmax, tau = 0 cross entropy.

    Args:
        logits: [B, C].
        targets: integer [B], 0 to C - 1.
        counts: [C], training samples of each class; a class without any has the prior of the rarest that has some.
        tau: 0 or more.
        weights: [B], see the module.

    Returns:
        Scalar, nats.

    Raises:
        ValueError: shapes, targets or counts that do not fit, tau below 0.
    """
    logits, targets = _read_rows(logits, targets)
    _check_number("tau", tau, low=0.0)
    adjusted_BC = logits + tau * _log_prior(_read_counts(counts, logits.shape[1])).to(logits)
    return _mean(F.cross_entropy(adjusted_BC, targets, reduction="none"), _read_weights(weights, logits))


def ldam(
    logits: Tensor,
    targets: Tensor,
    counts: Counts,
    max_margin: float = 0.5,
    scale: float = 30.0,
    *,
    weights: Tensor | None = None,
) -> Tensor:
    """CE(s (z - m_y at y)), m_c = max_margin n_c^-1/4 / max_k n_k^-1/4: Cao 2019, section 3.2.

    The scale supposes that logits are cosines (features and rows of the classifier of length 1), as the paper's are. Its second
    half, deferred re-weighting, is `weights=deferred_weights(counts, epoch, start)[targets]`.

    Args:
        logits: [B, C], cosines.
        targets: integer [B], 0 to C - 1.
        counts: [C], training samples of each class; a class without any has the margin of the rarest that has some, max_margin.
        max_margin: 0 or more, the rarest class's margin in units of z.
        scale: s, above 0.
        weights: [B], see the module.

    Returns:
        Scalar, nats.

    Raises:
        ValueError: shapes, targets or counts that do not fit, max_margin below 0, scale not above 0.
    """
    logits, targets = _read_rows(logits, targets)
    _check_number("max_margin", max_margin, low=0.0)
    _check_number("scale", scale, low=0.0, open_low=True)
    counts_C = _filled(_read_counts(counts, logits.shape[1]))
    margins_C = (max_margin * (counts_C / counts_C.min()) ** -0.25).to(logits)
    right_BC = F.one_hot(targets, logits.shape[1]).to(logits)
    loss_B = F.cross_entropy(scale * (logits - margins_C * right_BC), targets, reduction="none")
    return _mean(loss_B, _read_weights(weights, logits))


def lade(logits: Tensor, targets: Tensor, counts: Counts, remine_weight: float = 0.1, *, weights: Tensor | None = None) -> Tensor:
    """Balanced softmax + 0.1 L_est: Hong 2021, sections 3.3 (LADER) and 3.4 (LADE).

    L_est = -sum_c pi_c [a_c - b_c - remine_weight b_c^2], where a_c is the mean of z_c over the batch's rows of class c, and b_c
    the log of the mean of exp(z_c - log pi_c - log C) over all of its rows, as in the authors' program: the paper's equation 15
    has the share of each row's own label where pi_c stands. a_c - b_c is Donsker & Varadhan's bound of the
    divergence of class c's pictures from those of balanced classes; the square keeps b_c near 0. Raw logits go in, not those that
    were adjusted by the prior. L_est sets the level of z, so that, unlike the other losses here, this one changes if a constant
    is added to a row.

    A class without rows in the batch has a_c = 0, as in the authors' code. One without training samples has pi_c = 0 in the sum.

    Args:
        logits: [B, C].
        targets: integer [B], 0 to C - 1.
        counts: [C], training samples of each class.
        remine_weight: 0 or more, of the square.
        weights: [B], see the module; they weigh the rows in a_c and b_c too.

    Returns:
        Scalar, nats; it may be negative.

    Raises:
        ValueError: shapes, targets or counts that do not fit, remine_weight below 0.
    """
    logits, targets = _read_rows(logits, targets)
    _check_number("remine_weight", remine_weight, low=0.0)
    counts_C = _read_counts(counts, logits.shape[1])
    log_prior_C = _log_prior(counts_C).to(logits)
    share_C = (counts_C / counts_C.sum()).to(logits)
    weights_B = _read_weights(weights, logits)
    balanced = _mean(F.cross_entropy(logits + log_prior_C, targets, reduction="none"), weights_B)
    rows_B = torch.ones_like(logits[:, 0]) if weights_B is None else weights_B
    if weights_B is not None and not (weights_B > 0).any():
        return balanced  # 0, with a gradient of 0

    tiny = torch.finfo(logits.dtype).tiny
    rows_BC = F.one_hot(targets, logits.shape[1]).to(logits) * rows_B[:, None]
    first_C = (rows_BC * logits).sum(0) / rows_BC.sum(0).clamp_min(tiny)
    log_rows_B = (rows_B / rows_B.sum()).log()  # -inf where a row does not count
    second_C = torch.logsumexp(logits + log_rows_B[:, None], 0) - log_prior_C - math.log(logits.shape[1])
    return balanced - LADE_WEIGHT * (share_C * (first_C - second_C - remine_weight * second_C.square())).sum()


# Weights of classes


def class_balanced_weights(counts: Counts) -> Tensor:
    """w_c = 1 / (C pi_c), C the classes that have samples: every class counts as much as any other, and a sample 1 in the mean.

    Args:
        counts: [C], training samples of each class; one without any weighs 0.

    Returns:
        [C], float32, or float64 if the counts are.
    """
    return _like_counts(_inverse_power(_read_counts(counts), 1.0, mean_over_samples=True), counts)


def effective_number_weights(counts: Counts, beta: float) -> Tensor:
    """w_c proportional to (1 - beta) / (1 - beta^n_c), mean 1: Cui 2019, sections 3.2 and 4.

    beta = 0 gives 1 to every class, beta -> 1 the inverse frequency, which beta = 1 is.

    Args:
        counts: [C], training samples of each class; one without any weighs 0 and is left out of the mean.
        beta: 0 to 1; the paper tries 0.9, 0.99, 0.999 and 0.9999.

    Returns:
        [C], float32, or float64 if the counts are.

    Raises:
        ValueError: counts or beta out of range.
    """
    counts_C = _read_counts(counts)
    _check_number("beta", beta, low=0.0, high=1.0)
    if beta == 1:
        return _like_counts(_inverse_power(counts_C, 1.0), counts)
    if beta == 0:
        return _like_counts(_inverse_power(counts_C, 0.0), counts)
    # 1 - beta^n by expm1: with beta near 1 and few samples the difference itself has no digits left
    effective_C = -torch.expm1(counts_C * math.log(beta)) / (1 - beta)
    return _like_counts(_inverse_power(effective_C, 1.0), counts)


def grw_weights(counts: Counts, exponent: float = 1.2) -> Tensor:
    """w_c proportional to pi_c^-exponent, mean 1: the generalised re-weighting of DisAlign, Zhang 2021, equation 11.

    exponent = 0 gives 1 to every class, exponent = 1 the inverse frequency.

    Args:
        counts: [C], training samples of each class; one without any weighs 0 and is left out of the mean.
        exponent: 0 or more, the paper's rho.

    Returns:
        [C], float32, or float64 if the counts are.

    Raises:
        ValueError: counts or exponent out of range.
    """
    _check_number("exponent", exponent, low=0.0)
    return _like_counts(_inverse_power(_read_counts(counts), exponent), counts)


def deferred_weights(counts: Counts, epoch: int, start_epoch: int, beta: float = 0.9999) -> Tensor:
    """Deferred re-weighting: 1 for every class before `start_epoch`, `effective_number_weights` from it on.

    Cao 2019, section 3.3, algorithm 1, which weighs by 1 / n_c (beta = 1); the default is the published program's. There it
    starts at 160 of 200 epochs, when the learning rate falls.

    Args:
        counts: [C], training samples of each class; one without any weighs 0 from `start_epoch` on.
        epoch: 0 or more, the present one; steps do as well, if `start_epoch` is one.
        start_epoch: 0 or more.
        beta: as in `effective_number_weights`.

    Returns:
        [C], float32, or float64 if the counts are.

    Raises:
        ValueError: counts, epochs or beta out of range.
    """
    _check_number("epoch", epoch, low=0.0)
    _check_number("start_epoch", start_epoch, low=0.0)
    weights_C = effective_number_weights(counts, beta)
    return torch.ones_like(weights_C) if epoch < start_epoch else weights_C


# A trained classifier, corrected


def adjust_logits(logits: Tensor, counts: Counts, tau: float = 1.0) -> Tensor:
    """z - tau log pi: the balanced posterior of a classifier trained by cross entropy. Menon 2021, section 4.1, equation 9.

    Args:
        logits: [..., C], of a classifier that was trained on these counts without adjustment.
        counts: [C], training samples of each class; one without any has the prior of the rarest that has some.
        tau: 0 or more; 0 gives the logits as they are.

    Returns:
        [..., C], float32 or wider.

    Raises:
        ValueError: counts that do not fit, tau below 0.
    """
    _check_number("tau", tau, low=0.0)
    if logits.ndim == 0 or not logits.is_floating_point():
        raise ValueError(f"logits must be floating-point numbers [..., C], got {logits.dtype} {tuple(logits.shape)}")
    logits = _wide(logits)
    return logits - tau * _log_prior(_read_counts(counts, logits.shape[-1])).to(logits)


def tau_normalise(classifier: Tensor, tau: float = 1.0) -> Tensor:
    """w_c / |w_c|^tau for each row of a linear classifier: Kang 2020.

    The paper chooses tau on validation data between 0, the classifier as it is, and 1, rows of length 1, and drops the bias.

    Args:
        classifier: [C, D]; a row of zeros stays.
        tau: 0 or more.

    Returns:
        [C, D] in the classifier's dtype.

    Raises:
        ValueError: a classifier that is no matrix, tau below 0.
    """
    _check_number("tau", tau, low=0.0)
    if classifier.ndim != 2 or not classifier.is_floating_point():
        raise ValueError(f"a classifier is floating-point numbers [C, D], got {classifier.dtype} {tuple(classifier.shape)}")
    lengths_C1 = torch.linalg.vector_norm(_wide(classifier), dim=1, keepdim=True)
    lengths_C1 = torch.where(lengths_C1 > 0, lengths_C1, 1.0)
    return (_wide(classifier) / lengths_C1**tau).to(classifier.dtype)


def class_means(features: Tensor, targets: Tensor, num_classes: int, *, weights: Tensor | None = None) -> Tensor:
    """The mean feature of each class, for `ncm_logits`: Kang 2020.

    Args:
        features: [B, D], all of the training set's.
        targets: integer [B], 0 to C - 1.
        num_classes: C.
        weights: [B], not negative, how much each row counts.

    Returns:
        [C, D], float32 or wider; zeros for a class without rows.

    Raises:
        ValueError: shapes, targets or weights that do not fit.
    """
    features, targets = _read_rows(features, targets, num_classes)
    rows_B = torch.ones_like(features[:, 0]) if weights is None else _read_weights(weights, features)
    assert rows_B is not None
    sums_CD = features.new_zeros(num_classes, features.shape[1]).index_add_(0, targets, features * rows_B[:, None])
    counts_C = features.new_zeros(num_classes).index_add_(0, targets, rows_B)
    return torch.where(counts_C[:, None] > 0, sums_CD / counts_C.clamp_min(torch.finfo(sums_CD.dtype).tiny)[:, None], 0.0)


def ncm_logits(features: Tensor, means: Tensor) -> Tensor:
    """Nearest class mean: the cosine of each feature with each class's mean. Kang 2020.

    The paper's second distance, Euclid's to means of length 1, orders the classes in the same way.

    Args:
        features: [B, D].
        means: [C, D], of `class_means`; a class whose mean is zero (without rows) gets -2, below every cosine.

    Returns:
        [B, C], float32 or wider, from -1 to 1, or -2.

    Raises:
        ValueError: shapes that do not fit.
    """
    if features.ndim != 2 or means.ndim != 2 or features.shape[1] != means.shape[1]:
        raise ValueError(f"features are {tuple(features.shape)} and means {tuple(means.shape)}; they must be [B, D] and [C, D]")
    with torch.autocast(features.device.type, enabled=False):
        dtype = torch.promote_types(_wide(features).dtype, means.dtype)
        cosines_BC = F.normalize(features.to(dtype), dim=1) @ F.normalize(means.to(dtype), dim=1).T
    return cosines_BC.masked_fill((means == 0).all(1), -2.0)


# What is given


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _read_rows(logits: Tensor, targets: Tensor, num_classes: int | None = None) -> tuple[Tensor, Tensor]:
    """The rows in float32 or wider and int64 targets, checked."""
    if logits.ndim != 2 or logits.numel() == 0 or not logits.is_floating_point():
        raise ValueError(
            f"each row must be a vector of floating-point numbers, [B, C] with B and C at least 1; got {logits.dtype} "
            f"{tuple(logits.shape)}"
        )
    if targets.shape != logits.shape[:1]:
        raise ValueError(f"targets are {tuple(targets.shape)}; they must be one class a row, ({len(logits)},)")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"targets must be integers, the classes' numbers, got {targets.dtype}")
    targets = targets.long()
    num_classes = logits.shape[1] if num_classes is None else num_classes
    low, high = (int(limit) for limit in targets.aminmax())
    if low < 0 or high >= num_classes:
        raise ValueError(f"targets must be 0 to {num_classes - 1} with {num_classes} classes, got {low} to {high}")
    return _wide(logits), targets


def _read_class_values(values: Counts, num_classes: int | None, what: str) -> Tensor:
    """A number for each class in float64, not negative."""
    values_C = torch.as_tensor(values).detach().double()
    if values_C.ndim != 1 or len(values_C) == 0:
        raise ValueError(f"a {what} for each class is a vector [C], got {tuple(values_C.shape)}")
    if num_classes is not None and len(values_C) != num_classes:
        raise ValueError(f"there are {len(values_C)} classes by their {what}s and {num_classes} by the logits; they must agree")
    wrong = ~(values_C.isfinite() & (values_C >= 0))
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise ValueError(f"the {what} of class {at} is {values_C[at]:g}; it must be a finite number, 0 or more")
    return values_C


def _read_counts(counts: Counts, num_classes: int | None = None) -> Tensor:
    counts_C = _read_class_values(counts, num_classes, "count")
    if not counts_C.any():
        raise ValueError("every class's count is 0; at least one class needs training samples")
    return counts_C


def _read_weights(weights: Tensor | None, logits: Tensor) -> Tensor | None:
    if weights is None:
        return None
    if weights.shape != logits.shape[:1]:
        raise ValueError(f"weights are {tuple(weights.shape)}; they must be one number a row, ({len(logits)},)")
    weights_B = weights.detach().to(logits)
    if not (weights_B.isfinite() & (weights_B >= 0)).all():
        raise ValueError(f"weights must be finite, 0 or more, got {weights_B.min():g} to {weights_B.max():g}")
    return weights_B


def _check_number(name: str, value: float, *, low: float, high: float = math.inf, open_low: bool = False) -> None:
    if not (low <= value <= high) or math.isinf(value) or (open_low and value == low):
        allowed = f"from {low:g} to {high:g}" if high < math.inf else f"above {low:g}" if open_low else f"{low:g} or more"
        raise ValueError(f"{name} must be a finite number {allowed}, got {value}")


# Shared sums


def _filled(counts_C: Tensor) -> Tensor:
    """Counts in which a class without samples has as many as the rarest class that has some."""
    return torch.where(counts_C > 0, counts_C, counts_C[counts_C > 0].min())


def _log_prior(counts_C: Tensor) -> Tensor:
    return (_filled(counts_C) / counts_C.sum()).log()


def _inverse_power(sizes_C: Tensor, exponent: float, *, mean_over_samples: bool = False) -> Tensor:
    """sizes^-exponent with mean 1 over the classes that have samples, or over their samples; 0 for the others."""
    present_C = sizes_C > 0
    filled_C = _filled(sizes_C)
    powers_C = (filled_C / filled_C.min()) ** -exponent * present_C
    shares_C = sizes_C / sizes_C.sum() if mean_over_samples else present_C / present_C.sum()
    return powers_C / (powers_C * shares_C).sum()


def _like_counts(weights_C: Tensor, counts: Counts) -> Tensor:
    wide = isinstance(counts, Tensor) and counts.dtype == torch.float64
    return weights_C if wide else weights_C.float()


def _mean(losses_B: Tensor, weights_B: Tensor | None) -> Tensor:
    if weights_B is None:
        return losses_B.mean()
    return (weights_B * losses_B).sum() / weights_B.sum().clamp_min(torch.finfo(losses_B.dtype).tiny)
