"""The rate-distortion objective of a representation Z = f(X): I(Z; X) + beta H(X | Z), by its variational bounds.

"An Introduction to Vision-Language Modeling", arXiv 2405.17247, section 2.3.3, sees masked and contrastive learning as this one
objective. The bounds are those of Barber & Agakov 2003 and Alemi et al., arXiv 1612.00410 and 1711.00464:

    rate        I(Z; X)  = E KL(q(z|x) || q(z))  <= E KL(q(z|x) || r(z)),   too large by KL(q(z) || r(z))
    distortion  H(X | Z) = E[-log q(x|z)]        <= E[-log p(x|z)],         too large by E KL(q(x|z) || p(x|z))

where q(z|x) is the stochastic encoder, q(z) and q(x|z) what follows from it and the data, r a prior and p a decoder that are
learned or chosen. A contrastive loss is such a distortion up to a constant (see `rate_term`).

All values are nats. Rates and distortions sum over their last dimension; what stands in front broadcasts. They are float32 or
wider, whatever is given: in float16 a sum over some thousand rows would be infinite.

Shape legend: B batch, D code width, K codes, X letters of a discrete source.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wordsight.losses.ring import Ring
from wordsight.types import Term


def gaussian_rate(
    mean: Tensor, log_variance: Tensor, prior_mean: Tensor | None = None, prior_log_variance: Tensor | None = None
) -> Tensor:
    """KL(q(z|x) || r(z)) of Gaussians with diagonal covariances, a row at a time.

    sum_d [log s_d - log v_d + (v_d + (m_d - n_d)^2) / s_d - 1] / 2 with mean m, variance v of the posterior, n, s of the prior.

    Args:
        mean: [B, D], of q(z|x).
        log_variance: [B, D], of q(z|x).
        prior_mean: [D], of r(z); 0 if None.
        prior_log_variance: [D], of r(z); 0 (variance 1) if None.

    Returns:
        [B], nats, not negative, float32 or wider.
    """
    mean, log_variance = _wide(mean), _wide(log_variance)
    prior_mean_D = mean.new_zeros(()) if prior_mean is None else _wide(prior_mean)
    prior_log_variance_D = mean.new_zeros(()) if prior_log_variance is None else _wide(prior_log_variance)
    log_ratio_BD = log_variance - prior_log_variance_D
    distance_BD = (mean - prior_mean_D).square() * (-prior_log_variance_D).exp()
    return (log_ratio_BD.expm1() - log_ratio_BD + distance_BD).sum(-1) / 2


def categorical_rate(log_posterior: Tensor, log_prior: Tensor) -> Tensor:
    """KL(q(z|x) || r(z)) of a code that is one of K, a row at a time.

    Args:
        log_posterior: [B, K], log q(z|x), normalised and finite (`log_softmax`).
        log_prior: [K], log r(z), normalised.

    Returns:
        [B], nats.
    """
    log_posterior, log_prior = _wide(log_posterior), _wide(log_prior)
    return (log_posterior.exp() * (log_posterior - log_prior)).sum(-1)


def reparametrise(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """A draw z = mean + exp(log_variance / 2) noise of q(z|x) through which gradients flow (arXiv 1312.6114, section 2.4).

    Args:
        mean: [B, D].
        log_variance: [B, D].
        noise: [B, D], standard normal.
    """
    return mean + (log_variance / 2).exp() * noise


def gaussian_distortion(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-log p(x|z) of a Gaussian decoder, a row at a time: sum_d [(x_d - m_d)^2 / v_d + log v_d + log 2 pi] / 2.

    Args:
        x: [B, D], what the decoder should give back.
        mean: [B, D], what it gives.
        log_variance: broadcastable to [B, D]; held fixed at v it makes beta / (2 v) the price of a squared error.

    Returns:
        [B], nats (a density's: may be negative).
    """
    x, mean, log_variance = _wide(x), _wide(mean), _wide(log_variance)
    return (((x - mean).square() * (-log_variance).exp() + log_variance + math.log(2 * math.pi)) / 2).sum(-1)


def expected_distortion(log_posterior: Tensor, distortion: Tensor) -> Tensor:
    """sum_k q(k|x) d(x, k): the mean distortion of a code that is one of K, a row at a time.

    Args:
        log_posterior: [B, K], log q(z|x), normalised.
        distortion: [B, K], what code k costs for each row: -log p(x|k), or any d(x, k), then p(x|k) ~ exp(-d(x, k)).

    Returns:
        [B].
    """
    return (_wide(log_posterior).exp() * _wide(distortion)).sum(-1)


def rate_distortion(rate: Tensor, distortion: Tensor, beta: float) -> dict[str, Term]:
    """The two terms of rate + beta distortion, each a mean over rows.

    Args:
        rate: [B], nats.
        distortion: [B], nats or the unit of d.
        beta: the price of a unit of distortion in nats of rate, positive.

    Raises:
        ValueError: if beta is not positive, or the rows are not the same.
    """
    if rate.shape != distortion.shape or rate.ndim != 1:
        raise ValueError(f"rate is {tuple(rate.shape)} and distortion {tuple(distortion.shape)}; both must be one number a row")
    return {"rate": Term(_wide(rate).sum(), len(rate)), "distortion": Term(_wide(distortion).sum(), len(rate), _price(beta))}


def rate_term(rate: Tensor, beta: float, ring: Ring | None = None) -> Term:
    """The rate, for a system whose own loss is the distortion: minimising loss + rate / beta is minimising rate + beta loss.

    The loss of a masked system is -log p(x|z) already. A contrastive system's bounds the distortion up to a constant: with B
    pairs I(Z; Y) >= log B - InfoNCE(Z -> Y) in the mean, so H(Y | Z) <= H(Y) - log B + InfoNCE, Y being the other view (the text
    of an image). That is loose by as much as I(Z; Y) exceeds log B, at least.

    Args:
        rate: [B], nats, from `gaussian_rate` or `categorical_rate`.
        beta: the price of a nat of distortion in nats of rate, positive.
        ring: the processes that hold the batch's other rows, as a contrastive system's `loss_from_embeddings` is given it. The
            term is then that of all rows, its gradients those of the sum of the processes' losses, as in `losses.contrastive`.

    Returns:
        A term of weight 1 / beta whose count is the rows.

    Raises:
        ValueError: if beta is not positive.
    """
    own = _wide(rate).sum()
    count = own.new_tensor(len(rate))
    if ring is None:
        return Term(own, count, 1 / _price(beta))
    return Term(ring.add(own) + ring.size * (own - own.detach()), ring.add(count), 1 / _price(beta))


@torch.no_grad()
def blahut_arimoto(
    probs: Tensor, distortion: Tensor, beta: float, *, tolerance: float = 1e-10, max_steps: int = 100_000
) -> tuple[float, float, Tensor]:
    """The point of a discrete source's rate-distortion curve where its slope is -beta (Blahut 1972; Arimoto 1972), in float64.

    Alternates q(k|x) ~ r(k) exp(-beta d(x, k)) and r(k) = sum_x p(x) q(k|x), each the best for the other.

    Args:
        probs: [X], the letters' probabilities.
        distortion: [X, K], d(x, k) of giving k for x.
        beta: minus the slope dR/dD, nats a unit of distortion.
        tolerance: stops once rate + beta distortion is within this many nats of the least (by Blahut's bound).
        max_steps: fails if it takes more.

    Returns:
        (rate, distortion, q(k|x)): I(X; Z) in nats, the mean distortion, float64 [X, K].

    Raises:
        ValueError: if probs are no probabilities, shapes do not fit, a distortion is not finite, beta is not positive, or
            max_steps are not enough.
    """
    probs_X, distortion_XK = probs.double(), distortion.double()
    if distortion_XK.ndim != 2 or probs_X.shape != distortion_XK.shape[:1]:
        raise ValueError(f"probs are {tuple(probs.shape)}, distortion is {tuple(distortion.shape)}; they must be (X,) and (X, K)")
    if (probs_X < 0).any() or abs(probs_X.sum().item() - 1) > 1e-6:
        raise ValueError(f"probs must be 0 or more and sum to 1, they sum to {probs_X.sum().item():.6g}")
    if not distortion_XK.isfinite().all():
        raise ValueError("distortions must be finite; give a large number where a code must not be used")
    # in logs throughout: a code that is not needed fades away by a factor a step
    price_XK = -_price(beta) * distortion_XK
    log_prior_K = torch.full_like(distortion_XK[0], -math.log(distortion_XK.shape[1]))
    for _ in range(max_steps):
        log_posterior_XK = torch.log_softmax(log_prior_K + price_XK, 1)
        # log of marginal / prior; the least value is at most its largest entry below the present one
        log_change_K = torch.logsumexp(probs_X.log()[:, None] + log_posterior_XK - log_prior_K, 0)
        log_prior_K = log_prior_K + log_change_K
        if log_change_K.max() < tolerance:
            rate_X = categorical_rate(log_posterior_XK, log_prior_K)
            distortion_X = expected_distortion(log_posterior_XK, distortion_XK)
            return (probs_X @ rate_X).item(), (probs_X @ distortion_X).item(), log_posterior_XK.exp()
    raise ValueError(
        f"not within {tolerance} nats after {max_steps} steps at beta {beta}; allow more steps or a larger tolerance"
    )


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _price(beta: float) -> float:
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be positive, got {beta}")
    return beta
