"""Traces rate-distortion curves by gradient descent on the variational bounds, and draws docs/pictures/rate_distortion.svg.

`python docs/make_pictures/rate_distortion.py` (needs matplotlib: the `test` extra), half a minute. The curves that the points
should lie on are Blahut and Arimoto's, and the Gaussian source's closed form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from wordsight.losses.rate_distortion import (
    blahut_arimoto,
    categorical_rate,
    expected_distortion,
    gaussian_rate,
    reparametrise,
)

PICTURE = Path(__file__).parents[1] / "pictures" / "rate_distortion.svg"
BETAS = (0.8, 1.2, 1.6, 2.0, 3.0, 4.0, 6.0, 8.0)
GAUSSIAN_BETAS = (0.5, 0.75, 1.0, 1.5, 3.0, 6.0)

# six letters on a line, not equally likely; the distance to give another one instead grows unevenly and is not symmetric
SIX = torch.tensor([0.3, 0.25, 0.15, 0.12, 0.1, 0.08], dtype=torch.float64)
PLACES = torch.tensor([0.0, 1.0, 1.5, 3.0, 3.2, 5.0], dtype=torch.float64)
UNEVEN = torch.where(PLACES[:, None] < PLACES, 1.0, 0.6) * (PLACES[:, None] - PLACES).abs() ** 1.5


def trace(probs: Tensor, distortion: Tensor, betas: Sequence[float], steps: int = 800) -> list[tuple[float, float]]:
    """(rate bound, distortion) where gradients bring rate + beta distortion: encoder and prior are free tables, for each beta.

    Args:
        probs: [X] float64, of a discrete source.
        distortion: [X, K] float64.
        betas: prices of a unit of distortion, nats.
        steps: of Adam.
    """
    generator = torch.Generator().manual_seed(0)
    price = torch.tensor(betas, dtype=torch.float64)
    logits = torch.randn(len(betas), *distortion.shape, dtype=torch.float64, generator=generator).div(10).requires_grad_()
    prior = torch.zeros(len(betas), 1, distortion.shape[1], dtype=torch.float64, requires_grad=True)
    # a long memory of old gradients (.999) leaves small probabilities behind: 11% and more off the curve at beta 8
    optimizer = torch.optim.Adam([logits, prior], lr=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        log_posterior = torch.log_softmax(logits, -1)
        rate = categorical_rate(log_posterior, torch.log_softmax(prior, -1)) @ probs
        mean_distortion = expected_distortion(log_posterior, distortion) @ probs
        optimizer.zero_grad()
        (rate + price * mean_distortion).sum().backward()
        optimizer.step()
        schedule.step()
    return list(zip(rate.tolist(), mean_distortion.tolist(), strict=True))


def trace_gaussian(variances: Sequence[float], betas: Sequence[float], steps: int = 400) -> list[tuple[float, float]]:
    """The same of independent Gaussians and squared error, by drawn codes: encoder and decoder are linear, for each beta."""
    generator = torch.Generator().manual_seed(0)
    source, shape, rows = torch.tensor(variances), (len(betas), len(variances)), 2048
    encode, log_variance, decode, prior = (torch.full(shape, value, requires_grad=True) for value in (1.0, -1.0, 0.5, 0.0))
    optimizer = torch.optim.Adam([encode, log_variance, decode, prior], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x = (torch.randn(rows, 1, len(variances), generator=generator) * source.sqrt()).expand(-1, *shape)
        z = reparametrise(x * encode, log_variance, torch.randn(x.shape, generator=generator))
        rate = gaussian_rate(x * encode, log_variance, None, prior)
        distortion = (x - z * decode).square().sum(-1)
        optimizer.zero_grad()
        (rate + torch.tensor(betas) * distortion).mean(0).sum().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():  # the expectations over x and z, in closed form
        variance = log_variance.exp()
        rates = ((variance + encode**2 * source) / prior.exp() - 1 + prior - log_variance).sum(1) / 2
        distortions = ((1 - encode * decode) ** 2 * source + decode**2 * variance).sum(1)
    return list(zip(rates.tolist(), distortions.tolist(), strict=True))


def two_clusters(separation: float) -> tuple[float, float]:
    """X is one of two, z ~ N(+-m, 1), m^2 = separation: (what the best Gaussian prior charges, I(X; Z)), nats."""
    m = math.sqrt(separation)
    mean = torch.tensor([[m], [-m]], dtype=torch.float64)
    charged = gaussian_rate(mean, 0 * mean, None, torch.tensor([1 + separation], dtype=torch.float64).log()).mean().item()
    grid = torch.linspace(-m - 12, m + 12, 20_001, dtype=torch.float64)
    density = sum(torch.exp(-((grid - sign * m) ** 2) / 2) for sign in (1, -1)) / (2 * math.sqrt(2 * math.pi))
    differential = -torch.special.xlogy(density, density).sum().item() * (grid[1] - grid[0]).item()
    return charged, differential - math.log(2 * math.pi * math.e) / 2


def main() -> None:
    """Trace, print the figures, draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "rate_distortion"
    torch.set_num_threads(1)
    figure, (discrete, gaussian, loose) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for name, distortion, colour in (("Hamming", 1 - torch.eye(6, dtype=torch.float64), "C0"), ("uneven", UNEVEN, "C1")):
        betas = BETAS if name == "uneven" else tuple(beta + 1.2 for beta in BETAS)
        fine = [
            blahut_arimoto(SIX, distortion, betas[0] * (betas[-1] / betas[0]) ** (i / 40), tolerance=1e-6)[:2] for i in range(41)
        ]
        found = trace(SIX, distortion, betas)
        expected = [blahut_arimoto(SIX, distortion, beta, tolerance=1e-6)[:2] for beta in betas]
        off = [max(abs(a / b - 1) for a, b in zip(*pair, strict=True)) for pair in zip(found, expected, strict=True)]
        print(f"six letters, {name}: at most {max(off):.2%} off in rate or distortion at {len(betas)} points")
        discrete.plot([d for _, d in fine], [r for r, _ in fine], color=colour, label=f"Blahut-Arimoto, {name}")
        discrete.plot([d for _, d in found], [r for r, _ in found], "o", color=colour, label=f"gradients, {name}")
    discrete.set(title="six letters", xlabel="mean distortion", ylabel="rate [nats]", ylim=(0, None))
    for variances, colour in (((2.25,), "C0"), ((4.0, 1.0, 0.25), "C1")):
        found = trace_gaussian(variances, GAUSSIAN_BETAS)

        def curve(water: float, variances: tuple[float, ...] = variances) -> tuple[float, float]:
            each = [min(water, s) for s in variances]
            return sum(math.log(s / w) for s, w in zip(variances, each, strict=True)) / 2, sum(each)

        expected = [curve(1 / (2 * beta)) for beta in GAUSSIAN_BETAS]
        off = [max(abs(a / b - 1) for a, b in zip(*pair, strict=True)) for pair in zip(found, expected, strict=True)]
        print(f"Gaussian {variances}: at most {max(off):.2%} off at {len(found)} points")
        fine = [curve(1.0 * 0.07 ** (i / 40)) for i in range(41)]
        label = f"variance {', '.join(f'{s:g}' for s in variances)}"
        gaussian.plot([d for _, d in fine], [r for r, _ in fine], color=colour, label=f"closed form, {label}")
        gaussian.plot([d for _, d in found], [r for r, _ in found], "o", color=colour, label=f"gradients, {label}")
    gaussian.set(title="Gaussian source", xlabel="mean squared error", ylim=(0, None))
    at = [10 ** (i / 20 - 1) for i in range(71)]
    pairs = [two_clusters(value) for value in at]
    loose.semilogx(at, [charged for charged, _ in pairs], color="C3", label="charged: the best Gaussian prior")
    loose.semilogx(at, [true for _, true in pairs], color="black", label="I(X; Z)")
    loose.axhline(math.log(2), color="gray", linewidth=0.8, linestyle=":", label="log 2")
    loose.set(title="where the bound is loose: two clusters", xlabel="squared half distance / variance")
    for axis in (discrete, gaussian, loose):
        axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, metadata={"Date": None})


if __name__ == "__main__":
    main()
