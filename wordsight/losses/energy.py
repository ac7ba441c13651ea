"""Energy-based models: p(x) = exp(-E(x)) / Z, and two ways to train one without knowing Z.

Maximum likelihood pushes the energy of data down and that of the model's own samples up (LeCun et al., "A Tutorial on
Energy-Based Learning", 2006; Hinton, "Training Products of Experts by Minimizing Contrastive Divergence", 2002); the samples come
from Langevin dynamics. Noise-contrastive estimation tells data from samples of a known distribution instead (Gutmann &
Hyvärinen, AISTATS 2010). The losses of CLIP and SigLIP are the second kind, with the batch as noise ("An Introduction to
Vision-Language Modeling", arXiv 2405.17247, section 2.2): `multiclass_nce` and `binary_nce` say how.

Shape legend: N data, M samples of a model or a noise distribution, B rows, K candidates a row or states of a discrete model.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Energy = Callable[[Tensor], Tensor]  # x [N, ...] -> E(x) [N], each row's from that row alone


def log_probs(energy: Tensor, *, volume: float = 1.0) -> Tensor:
    """log p = -E - log Z where all states can be listed: Z = volume * sum_k exp(-E_k).

    Args:
        energy: [K], the energy of every state of a discrete model, or at the points of a grid that holds all of the mass.
        volume: what each state stands for: 1, or the volume of a grid's cell.

    Returns:
        [K], nats; log Z itself is -(energy + log_probs(energy)) at any state.
    """
    energy = _wide(energy)
    return -energy - torch.logsumexp(-energy.flatten(), 0) - math.log(volume)


def phase_difference(
    data_energy: Tensor, model_energy: Tensor, *, data_weights: Tensor | None = None, model_weights: Tensor | None = None
) -> Tensor:
    """Positive phase minus negative phase: mean E(data) - mean E(samples of the model).

    Its gradient is that of the negative log-likelihood, E_data[dE] - E_model[dE], since d log Z = -E_model[dE]. It is exact if
    the model's states are all listed with their probabilities as `model_weights`, and unbiased if they are its samples. The
    value itself is not a likelihood and may be negative.

    Args:
        data_energy: [N], energies of data, with gradient.
        model_energy: [M], energies of the model's states or samples, with gradient; the samples themselves must carry none.
        data_weights: [N], not negative, how much each counts; if None, all the same. Made to sum to 1, and without gradient.
        model_weights: [M], the same for the second phase.

    Returns:
        Scalar.

    Raises:
        ValueError: if there are no data, no samples, or weights of another shape.
    """
    return _mean(data_energy, data_weights, "data") - _mean(model_energy, model_weights, "model")


def langevin(
    energy: Energy, start: Tensor, *, num_steps: int, step_size: float, generator: torch.Generator | None = None
) -> Tensor:
    """Walk down the energy with noise: x <- x - step_size / 2 * dE/dx + sqrt(step_size) * noise, `num_steps` times.

    Unadjusted: no step is ever refused, so the chain settles in a law that differs from exp(-E) / Z by a part that is
    proportional to step_size. In a Gaussian well of curvature a (E = a x^2 / 2) its variance is 1 / (a (1 - step_size a / 4)),
    and it diverges from step_size = 4 / a on.

    Args:
        energy: x [M, ...] -> E(x) [M].
        start: [M, ...] float, where each of M chains starts: noise, data (contrastive divergence) or the chains' last places.
        num_steps: steps to take, 0 or more.
        step_size: the square of the noise's standard deviation, in x's unit squared.
        generator: source of the noise, on start's device; if None, torch's own.

    Returns:
        [M, ...], where the chains are, without gradient. No parameter's `.grad` is touched.

    Raises:
        ValueError: if the step size is not positive, the energy is not one number a chain, or the chains left the finite numbers.
    """
    if num_steps < 0 or not 0 < step_size < math.inf:
        raise ValueError(f"Langevin needs num_steps >= 0 and a positive step_size, got {num_steps} and {step_size}")
    x = start.detach().clone()
    for _ in range(num_steps):
        with torch.enable_grad():
            x.requires_grad_()
            value_M = energy(x)
            if value_M.shape != x.shape[:1] or not value_M.requires_grad:
                raise ValueError(
                    f"the energy gave {tuple(value_M.shape)} for {len(x)} chains; it must be one differentiable number a chain"
                )
            (slope,) = torch.autograd.grad(value_M.sum(), x)
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        x = x.detach() - step_size / 2 * slope + math.sqrt(step_size) * noise
    if not x.isfinite().all():
        raise ValueError(f"Langevin left the finite numbers within {num_steps} steps of {step_size}; take a smaller step_size")
    return x


def maximum_likelihood(
    energy: Energy, data: Tensor, chains: Tensor, *, num_steps: int, step_size: float, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """One step's maximum-likelihood loss: Langevin from `chains`, then the phase difference to where they came.

    Give the returned chains back at the next step and they persist (Tieleman 2008); start them at the data and this is
    contrastive divergence; start them at noise and it is short-run sampling. As long as the chains have not forgotten their start
    the gradient is biased. Starting a few of the persistent ones anew (Du & Mordatch, arXiv 1903.08689) finds what none visits.

    Args:
        energy: x [N, ...] -> E(x) [N], differentiable in its parameters too.
        data: [N, ...] float.
        chains: [M, ...] float, where the negative phase's chains start.
        num_steps: see `langevin`.
        step_size: see `langevin`.
        generator: see `langevin`.

    Returns:
        (loss, chains): a scalar whose gradient estimates that of the mean negative log-likelihood, and [M, ...] without gradient.
    """
    chains = langevin(energy, chains, num_steps=num_steps, step_size=step_size, generator=generator)
    return phase_difference(energy(data), energy(chains)), chains


def binary_nce(
    data_energy: Tensor, data_log_noise: Tensor, noise_energy: Tensor, noise_log_noise: Tensor, log_partition: Tensor | float
) -> Tensor:
    """Noise-contrastive estimation: tell N data from M = nu N samples of a known noise distribution.

    -(1/N) [sum_data log sigmoid(G(x)) + sum_noise log sigmoid(-G(x))], G(x) = -E(x) - log Z - log p_noise(x) - log nu
    (Gutmann & Hyvärinen 2010, there with nu = 1 and c = -log Z). log Z is a parameter like any other: the minimum is
    at the data's own normalised density, because, unlike in maximum likelihood, a log Z that is off is punished.

    SigLIP's loss (arXiv 2303.15343) is this with every image's B - 1 wrong texts of the batch as noise: nu = B - 1,
    -E(x) - log p_noise(x) = exp(log_scale) cos(x), and log Z = -bias - log(B - 1). So its bias is -log(B - 1) where the scaled
    cosines are log density ratios already; -10, at which it starts, is that of a batch of 22,027.

    Args:
        data_energy: [N], E of the data.
        data_log_noise: [N], log p_noise of the data, nats.
        noise_energy: [M], E of the noise.
        noise_log_noise: [M], log p_noise of the noise, nats.
        log_partition: scalar, the estimate of log Z.

    Returns:
        Scalar, nats a datum.

    Raises:
        ValueError: if there are no data or no noise, or the shapes do not go together.
    """
    if min(data_energy.numel(), noise_energy.numel()) == 0:
        raise ValueError(f"NCE needs data and noise, got {data_energy.numel()} data and {noise_energy.numel()} samples of noise")
    _same_shape(data_energy, data_log_noise, "the data's")
    _same_shape(noise_energy, noise_log_noise, "the noise's")
    data_energy, noise_energy = _wide(data_energy), _wide(noise_energy)
    offset = log_partition + math.log(noise_energy.numel() / data_energy.numel())
    data_N = -data_energy - data_log_noise - offset
    noise_M = -noise_energy - noise_log_noise - offset
    return -(F.logsigmoid(data_N).sum() + F.logsigmoid(-noise_M).sum()) / data_energy.numel()


def multiclass_nce(energy: Tensor, log_noise: Tensor, right: Tensor) -> Tensor:
    """Multi-class (ranking) NCE: which of K candidates is the datum, if the others are samples of a known noise distribution?

    The mean over rows of -log softmax_k(-E_k - log p_noise_k) at the right candidate (van den Oord et al., arXiv 1807.03748,
    section 2.3). What is constant along a row, log Z first of all, falls out: nothing is learned of it.

    InfoNCE is this for the texts of each image and again for the images of each text, halved, with E(x, y) = -exp(log_scale)
    cos(x, y) - log p_noise(y), whatever p_noise is. The energy that it finds is that of p(y | x) up to a function of x: its
    logits become log p(y | x) / p_noise(y), p_noise being the law of the batch's other texts.

    Args:
        energy: [B, K].
        log_noise: [B, K], log p_noise of each candidate, nats.
        right: int64 [B], which candidate of each row is the datum.

    Returns:
        Scalar, nats, mean over rows; log K where no candidate stands out.

    Raises:
        ValueError: if the shapes do not go together.
    """
    if energy.ndim != 2 or energy.numel() == 0:
        raise ValueError(f"energies are {tuple(energy.shape)}, multi-class NCE takes (rows, candidates), at least one of each")
    _same_shape(energy, log_noise, "the candidates'")
    return F.cross_entropy(-_wide(energy) - log_noise, right)


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _mean(energy: Tensor, weights: Tensor | None, phase: str) -> Tensor:
    if energy.ndim != 1 or len(energy) == 0:
        raise ValueError(f"the {phase} energies are {tuple(energy.shape)}; a phase needs one number a row, at least one")
    if weights is None:
        return _wide(energy).mean()
    _same_shape(energy, weights, f"the {phase} weights'")
    weights = _wide(weights.detach())
    return (weights * energy).sum() / weights.sum()


def _same_shape(energy: Tensor, other: Tensor, whose: str) -> None:
    if energy.shape != other.shape:
        raise ValueError(
            f"{whose} energies are {tuple(energy.shape)} and what goes with them {tuple(other.shape)}; they must be alike"
        )
