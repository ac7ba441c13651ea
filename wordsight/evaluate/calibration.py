"""Whether a classifier's confidence means what it says: expected calibration error and the reliability diagram.

Guo et al. 2017, arXiv 1706.04599, section 2: predictions are put into bins by their confidence (the probability of the class
that is named), and ECE = sum_b (n_b / N) |accuracy_b - confidence_b|.

Shape legend: N predictions, M bins, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from wordsight.evaluate.metrics import BOOTSTRAP_SEED, _chunks, wilson_interval
from wordsight.types import Metric

NUM_BINS = 15  # of equal width, as published
WILSON = "over images: Wilson"
BOOTSTRAP = "over images: bootstrap less its bias"
SIDE, MARGIN = 300, 40  # of the diagram, in pixels of its own


@dataclass(frozen=True, slots=True)
class Reliability:
    """Confidence beside accuracy.

    Attributes:
        counts: int64 [M], predictions whose confidence lies in bin m: (m / M, (m + 1) / M], the first with 0.
        confidences: float64 [M], their mean confidence; NaN in an empty bin.
        accuracies: float64 [M], the share that is right; NaN in an empty bin.
        ece: expected calibration error, in [0, 1].
    """

    counts: np.ndarray
    confidences: np.ndarray
    accuracies: np.ndarray
    ece: float

    def to_json(self) -> dict[str, Any]:
        """Plain values; empty bins have None."""
        bins = zip(self.counts.tolist(), self.confidences.tolist(), self.accuracies.tolist(), strict=True)
        width = 1 / len(self.counts)
        return {
            "ece": self.ece,
            "bins": [
                {
                    "from": round(k * width, 6),
                    "to": round((k + 1) * width, 6),
                    "count": count,
                    "confidence": confidence if count else None,
                    "accuracy": accuracy if count else None,
                }
                for k, (count, confidence, accuracy) in enumerate(bins)
            ],
        }


def reliability(correct: np.ndarray, confidences: np.ndarray, num_bins: int = NUM_BINS) -> Reliability:
    """The reliability of N predictions.

    Args:
        correct: bool [N], whether each prediction is right.
        confidences: [N], the probability that it was given, in [0, 1].
        num_bins: M.

    Raises:
        ValueError: no prediction, lengths that differ, or a confidence outside of [0, 1].
    """
    correct, confidences = np.asarray(correct, dtype=bool), np.asarray(confidences, dtype=np.float64)
    if correct.ndim != 1 or len(correct) == 0 or correct.shape != confidences.shape:
        raise ValueError(
            f"reliability needs a verdict and a confidence of each prediction, got {correct.shape} and {confidences.shape}"
        )
    if not ((confidences >= 0) & (confidences <= 1 + 1e-9)).all():  # a NaN is not either
        raise ValueError("a confidence is a probability: it lies in [0, 1]")
    bins = _bins(confidences, num_bins)
    counts = np.bincount(bins, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        mean_confidences = np.bincount(bins, weights=confidences, minlength=num_bins) / counts
        accuracies = np.bincount(bins, weights=correct, minlength=num_bins) / counts
    return Reliability(counts, mean_confidences, accuracies, expected_calibration_error(correct, confidences, num_bins))


def expected_calibration_error(correct: np.ndarray, confidences: np.ndarray, num_bins: int = NUM_BINS) -> float:
    """sum_m n_m / N |share right - mean confidence| over M bins [0, 1/M], (1/M, 2/M], ...: Guo 2017, equation 3.

    Args:
        correct: [N] bool.
        confidences: [N], from 0 to 1.
        num_bins: M.
    """
    gaps_M = np.bincount(_bins(confidences, num_bins), weights=correct - confidences, minlength=num_bins)
    return float(np.abs(gaps_M).sum() / len(correct))


def calibration_error(correct: np.ndarray, confidences: np.ndarray, num_bins: int = NUM_BINS) -> tuple[Metric, str]:
    """The expected calibration error with its 95% interval over images, and where that comes from.

    Returns:
        The metric; BOOTSTRAP, or WILSON where all or none are right.
    """
    value = expected_calibration_error(correct, confidences, num_bins)
    bounds, how = unbiased(value, _resample(correct, confidences, num_bins)), BOOTSTRAP
    if bounds is None or correct.all() or not correct.any():
        # resamples say nothing of the answers that were not seen; the error is off by no more than the share of right ones is
        low, high = wilson_interval(int(correct.sum()), len(correct))
        bounds, how = (max(0.0, value - (high - low)), min(1.0, value + (high - low))), WILSON
    return Metric(value, len(correct), bounds, "fraction"), how


def unbiased(value: float, drawn_R: np.ndarray) -> tuple[float, float] | None:
    """The resamples' percentiles, shifted so that their mean is the value; within 0 and 1, the value within it.

    None where the percentiles are equal, as where all answers are right: such resamples say nothing of what was not seen.
    """
    low, high = np.percentile(drawn_R, [2.5, 97.5])
    if high - low < 1e-12:
        return None
    bias = drawn_R.mean() - value
    return float(np.clip(low - bias, 0.0, value)), float(np.clip(high - bias, value, 1.0))


def _resample(correct: np.ndarray, confidences: np.ndarray, num_bins: int) -> np.ndarray:
    """[R], the calibration error of images drawn anew."""
    bins, gaps, count = _bins(confidences, num_bins), correct - confidences, len(correct)
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    found = []
    for size in _chunks(count):
        drawn = generator.integers(0, count, (size, count))
        places = bins[drawn] + num_bins * np.arange(size)[:, None]
        sums = np.bincount(places.ravel(), weights=gaps[drawn].ravel(), minlength=num_bins * size)
        found.append(np.abs(sums.reshape(size, num_bins)).sum(1) / count)
    return np.concatenate(found)


def _bins(confidences: np.ndarray, num_bins: int) -> np.ndarray:
    return np.searchsorted(np.linspace(0, 1, num_bins + 1)[1:-1], confidences)


def diagram_of(found: Mapping[str, Any], label: str) -> str:
    """The reliability diagram as an `<svg>` that takes its colours from the page: accuracy over confidence, the gap to it in red.

    Args:
        found: what `Reliability.to_json` gave.
        label: what it shows, for readers who hear it.
    """
    scale = SIDE - MARGIN - 10

    def x_at(share: float) -> float:
        return MARGIN + share * scale

    def y_at(share: float) -> float:
        return 10 + (1 - share) * scale

    parts = [f'<svg class="reliability" viewBox="0 0 {SIDE} {SIDE}" role="img" aria-label="{escape(label, quote=True)}">']
    for share in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<line class="grid" x1="{x_at(0)}" x2="{x_at(1)}" y1="{y_at(share):.1f}" y2="{y_at(share):.1f}"/>')
        parts.append(f'<text class="tick" x="{x_at(0) - 6}" y="{y_at(share) + 3.5:.1f}" text-anchor="end">{share:.0%}</text>')
        parts.append(f'<text class="tick" x="{x_at(share):.1f}" y="{y_at(0) + 14:.1f}" text-anchor="middle">{share:.0%}</text>')
    for one in found["bins"]:
        if not one["count"]:
            continue
        accuracy, confidence, width = one["accuracy"], one["confidence"], (one["to"] - one["from"]) * scale
        place = f'x="{x_at(one["from"]) + 1:.1f}" width="{width - 2:.1f}"'
        told = f"<title>{one['count']} pictures: confidence {confidence:.1%}, right {accuracy:.1%}</title>"
        for kind, low, high in (("right", 0.0, accuracy), ("gap", min(confidence, accuracy), max(confidence, accuracy))):
            parts.append(f'<rect class="{kind}" {place} y="{y_at(high):.1f}" height="{(high - low) * scale:.1f}">{told}</rect>')
    parts.append(f'<line class="ideal" x1="{x_at(0)}" y1="{y_at(0)}" x2="{x_at(1)}" y2="{y_at(1)}"/>')
    parts.append(f'<text class="tick" x="{x_at(0.5):.1f}" y="{SIDE - 2}" text-anchor="middle">confidence</text>')
    parts.append("</svg>")
    return "".join(parts)
