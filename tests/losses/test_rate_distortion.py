"""Rate and distortion: closed forms, the exact gap of each bound, and the curves that gradient descent must come to."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from wordsight.losses.rate_distortion import (
    blahut_arimoto,
    categorical_rate,
    expected_distortion,
    gaussian_distortion,
    gaussian_rate,
    rate_distortion,
    rate_term,
    reparametrise,
)

PAGE = Path(__file__).parents[2] / "docs" / "systems" / "rate_distortion.md"


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def entropy(probs: torch.Tensor) -> float:
    return -torch.special.xlogy(probs, probs).sum().item()


def binary_entropy(chance: float) -> float:
    return -chance * math.log(chance) - (1 - chance) * math.log1p(-chance)


def hamming(letters: int) -> torch.Tensor:
    return 1 - torch.eye(letters, dtype=torch.float64)


# six letters on a line, not equally likely; the distance to give another one instead grows unevenly and is not symmetric
SIX = torch.tensor([0.3, 0.25, 0.15, 0.12, 0.1, 0.08], dtype=torch.float64)
PLACES = torch.tensor([0.0, 1.0, 1.5, 3.0, 3.2, 5.0], dtype=torch.float64)
UNEVEN = torch.where(PLACES[:, None] < PLACES, 1.0, 0.6) * (PLACES[:, None] - PLACES).abs() ** 1.5


def optimise(
    probs: torch.Tensor, distortion: torch.Tensor, betas: tuple[float, ...], steps: int = 800
) -> list[tuple[float, float]]:
    """Rate bound and distortion where gradients on encoder and prior, free tables for each beta, bring rate + beta distortion."""
    price = torch.tensor(betas, dtype=torch.float64)
    logits = (normal(len(betas), *distortion.shape) / 10).requires_grad_()
    prior = torch.zeros(len(betas), 1, distortion.shape[1], dtype=torch.float64, requires_grad=True)
    # a long memory of old gradients (.999) leaves the small probabilities behind: 11% and more off the curve at beta 8
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


# ---- the pieces


def test_gaussian_rate_is_the_divergence() -> None:
    mean, log_variance, prior_mean, prior_log_variance = normal(4, 3), normal(4, 3, seed=1), normal(3, seed=2), normal(3, seed=3)
    posterior = torch.distributions.Normal(mean, (log_variance / 2).exp())
    prior = torch.distributions.Normal(prior_mean, (prior_log_variance / 2).exp())
    expected = torch.distributions.kl_divergence(posterior, prior).sum(1)
    torch.testing.assert_close(gaussian_rate(mean, log_variance, prior_mean, prior_log_variance), expected)
    standard = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0 * mean, 1 + 0 * mean)).sum(1)
    torch.testing.assert_close(gaussian_rate(mean, log_variance), standard)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), spread=st.floats(1e-6, 4))
def test_rates_are_never_negative_and_zero_only_at_the_prior(seed: int, spread: float) -> None:
    prior_mean, prior_log_variance = normal(3, seed=seed), normal(3, seed=seed + 1)
    at_prior = gaussian_rate(prior_mean[None], prior_log_variance[None], prior_mean, prior_log_variance)
    assert at_prior.item() == pytest.approx(0, abs=1e-14)
    away = gaussian_rate(prior_mean + spread, prior_log_variance.expand(1, 3), prior_mean, prior_log_variance)
    assert away.item() == pytest.approx((spread**2 / 2 * (-prior_log_variance).exp()).sum().item(), rel=1e-9)
    log_prior, log_posterior = torch.log_softmax(normal(5, seed=seed), 0), torch.log_softmax(spread * normal(2, 5, seed=seed), 1)
    assert (categorical_rate(log_posterior, log_prior) >= -1e-14).all()
    assert categorical_rate(log_prior[None], log_prior).item() == pytest.approx(0, abs=1e-14)


def test_gaussian_distortion_is_the_log_density() -> None:
    x, mean, log_variance = normal(4, 3), normal(4, 3, seed=1), normal(3, seed=2)
    expected = -torch.distributions.Normal(mean, (log_variance / 2).exp()).log_prob(x).sum(1)
    torch.testing.assert_close(gaussian_distortion(x, mean, log_variance), expected)


def test_reparametrised_draws_have_the_posteriors_law_and_pass_gradients() -> None:
    mean, log_variance = torch.tensor([[1.0, -2.0]]).double(), torch.tensor([[0.5, -1.0]]).double()
    draws = reparametrise(mean, log_variance, normal(50_000, 2))
    deviation = (log_variance / 2).exp()
    assert ((draws.mean(0) - mean).abs() < 4 * deviation / math.sqrt(50_000)).all()
    assert ((draws.std(0) / deviation - 1).abs() < 4 / math.sqrt(100_000)).all()
    inputs = normal(3, 2).requires_grad_(), normal(3, 2, seed=1).requires_grad_(), normal(3, 2, seed=2)
    assert torch.autograd.gradcheck(reparametrise, inputs)


def test_low_precision_is_computed_in_float32() -> None:
    mean, log_variance = torch.randn(4, 8).bfloat16(), torch.randn(4, 8).bfloat16()
    found = gaussian_rate(mean, log_variance)
    assert found.dtype is torch.float32
    assert torch.equal(found, gaussian_rate(mean.float(), log_variance.float()))
    assert gaussian_distortion(mean, mean, log_variance).dtype is torch.float32


def test_terms_are_means_over_rows_with_the_price_as_weight() -> None:
    rate, distortion = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([4.0, 0.0, 2.0])
    terms = rate_distortion(rate, distortion, 5.0)
    assert [(term.value.item(), term.count, term.weight) for term in terms.values()] == [(3.0, 3, 1.0), (2.0, 3, 5.0)]
    alone = rate_term(rate, 5.0)
    assert (alone.value.item(), alone.count, alone.weight) == (3.0, 3, 0.2)
    for beta in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="beta must be positive"):
            rate_term(rate, beta)
    with pytest.raises(ValueError, match=r"rate is \(3,\) and distortion \(2,\)"):
        rate_distortion(rate, distortion[:2], 1.0)


# ---- how loose the bounds are


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), letters=st.integers(2, 6), codes=st.integers(2, 6))
def test_each_bound_is_too_large_by_the_divergence_that_the_page_names(seed: int, letters: int, codes: int) -> None:
    probs, log_posterior = (
        torch.softmax(normal(letters, seed=seed), 0),
        torch.log_softmax(2 * normal(letters, codes, seed=seed + 1), 1),
    )
    joint = probs[:, None] * log_posterior.exp()
    marginal = joint.sum(0)
    information = entropy(probs) + entropy(marginal) - entropy(joint)
    log_prior = torch.log_softmax(normal(codes, seed=seed + 2), 0)
    rate = probs @ categorical_rate(log_posterior, log_prior)
    gap = (marginal * (marginal.log() - log_prior)).sum()
    assert rate.item() == pytest.approx(information + gap.item(), abs=1e-12)
    log_decoder = torch.log_softmax(normal(letters, codes, seed=seed + 3), 0)  # p(x|z)
    distortion = probs @ expected_distortion(log_posterior, -log_decoder)
    gap = (joint * ((joint / marginal).log() - log_decoder)).sum()
    assert distortion.item() == pytest.approx(entropy(joint) - entropy(marginal) + gap.item(), abs=1e-12)
    assert rate.item() + distortion.item() >= entropy(probs) - 1e-12  # so both bounds together never undercut H(X)


def test_a_gaussian_prior_charges_two_clusters_for_more_than_a_bit() -> None:
    """X is one of two, z ~ N(+-m, v): I(X; Z) <= log 2, but the best Gaussian prior charges log(1 + m^2/v) / 2 without end."""
    grid = torch.linspace(-40, 40, 80_001, dtype=torch.float64)
    charged, true = [], []
    for separation in (1.0, 10.0, 100.0):  # m^2 / v at v = 1
        m = math.sqrt(separation)
        mean = torch.tensor([[m], [-m]], dtype=torch.float64)
        charged.append(gaussian_rate(mean, 0 * mean, None, torch.tensor([1 + separation]).double().log()).mean().item())
        assert charged[-1] == pytest.approx(math.log1p(separation) / 2, abs=1e-12)
        density = sum(torch.exp(-((grid - s * m) ** 2) / 2) for s in (1, -1)) / (2 * math.sqrt(2 * math.pi))
        differential = entropy(density) * (grid[1] - grid[0]).item()
        true.append(differential - math.log(2 * math.pi * math.e) / 2)
    assert true[0] < charged[0] < 1.05 * true[0]  # .337 of .347: nearly tight where the clusters overlap
    assert true[1] < math.log(2) < charged[1] / 1.7
    assert charged[2] / true[2] > 3


# ---- curves


def test_blahut_arimoto_gives_the_binary_sources_closed_form() -> None:
    """R(D) = H(p) - H(D) with Hamming distortion, D = 1 / (1 + e^beta) while that is below p."""
    probs = torch.tensor([0.3, 0.7], dtype=torch.float64)
    for beta in (1.0, 1.5, 2.0, 3.0, 5.0, 8.0):
        rate, distortion, posterior = blahut_arimoto(probs, hamming(2), beta)
        assert distortion == pytest.approx(1 / (1 + math.exp(beta)), rel=1e-6)
        assert rate == pytest.approx(entropy(probs) - binary_entropy(distortion), rel=1e-6)
        torch.testing.assert_close(posterior.sum(1), torch.ones(2, dtype=torch.float64))
    rate, distortion, _ = blahut_arimoto(probs, hamming(2), 0.5)  # 1 / (1 + e^.5) > .3: the likelier letter always
    assert rate == pytest.approx(0, abs=1e-8)
    assert distortion == pytest.approx(0.3, abs=1e-8)


def test_blahut_arimoto_gives_the_uniform_sources_closed_form() -> None:
    for beta in (0.5, 2.0, 6.0):
        rate, distortion, _ = blahut_arimoto(torch.full((5,), 0.2, dtype=torch.float64), hamming(5), beta)
        assert distortion == pytest.approx(4 / (4 + math.exp(beta)), rel=1e-9)
        assert rate == pytest.approx(math.log(5) - binary_entropy(distortion) - distortion * math.log(4), rel=1e-9)


def test_blahut_arimoto_refuses_what_is_no_source() -> None:
    with pytest.raises(ValueError, match=r"sum to 1\.5"):
        blahut_arimoto(torch.tensor([0.5, 1.0]), hamming(2), 1.0)
    with pytest.raises(ValueError, match=r"must be \(X,\) and \(X, K\)"):
        blahut_arimoto(torch.tensor([0.5, 0.5]), hamming(3), 1.0)
    with pytest.raises(ValueError, match="must be finite"):
        blahut_arimoto(torch.tensor([0.5, 0.5]), hamming(2) * math.inf, 1.0)
    with pytest.raises(ValueError, match="beta must be positive"):
        blahut_arimoto(torch.tensor([0.5, 0.5]), hamming(2), 0.0)
    with pytest.raises(ValueError, match="after 2 steps"):
        blahut_arimoto(SIX, UNEVEN, 1.0, max_steps=2)


@pytest.mark.parametrize(
    ("distortion", "betas"),
    [(hamming(6), (2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)), (UNEVEN, (0.8, 1.2, 1.6, 2.0, 3.0, 4.0, 6.0, 8.0))],
    ids=["hamming", "uneven"],
)
def test_the_objective_traces_the_curve_of_blahut_and_arimoto_within_half_a_percent(
    distortion: torch.Tensor, betas: tuple[float, ...]
) -> None:
    rates = []
    for beta, (rate, mean_distortion) in zip(betas, optimise(SIX, distortion, betas), strict=True):
        expected_rate, expected_mean, _ = blahut_arimoto(SIX, distortion, beta, tolerance=1e-6)
        assert rate == pytest.approx(expected_rate, rel=0.005), beta  # 2% is wanted, .05% was measured
        assert mean_distortion == pytest.approx(expected_mean, rel=0.005), beta
        rates.append(expected_rate)
    assert rates == sorted(rates)
    assert rates[0] < 0.6 * entropy(SIX) < 0.8 * entropy(SIX) < rates[-1]  # the points span the curve


def test_the_objective_gives_the_binary_sources_closed_form_within_2_percent() -> None:
    probs, betas = torch.tensor([0.4, 0.6], dtype=torch.float64), (0.8, 1.2, 1.6, 2.0, 3.0, 4.0, 5.0)
    for beta, (rate, distortion) in zip(betas, optimise(probs, hamming(2), betas), strict=True):
        assert distortion == pytest.approx(1 / (1 + math.exp(beta)), rel=0.02)
        assert rate == pytest.approx(entropy(probs) - binary_entropy(distortion), rel=0.02)


def test_sampled_letters_come_to_the_curve_too() -> None:
    """As a system trains: batches of letters, a network that encodes them, Adam; read off with the true probabilities."""
    beta, steps = 2.0, 800
    encoder = torch.nn.Sequential(torch.nn.Linear(6, 32), torch.nn.GELU(), torch.nn.Linear(32, 6))
    prior = torch.zeros(6, requires_grad=True)
    letters, distortion, g = torch.eye(6), UNEVEN.float(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam([*encoder.parameters(), prior], lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x = torch.multinomial(SIX, 512, replacement=True, generator=g)
        log_posterior = torch.log_softmax(encoder(letters[x]), 1)
        rate = categorical_rate(log_posterior, torch.log_softmax(prior, 0))
        terms = rate_distortion(rate, expected_distortion(log_posterior, distortion[x]), beta)
        optimizer.zero_grad()
        sum(term.weight * term.value for term in terms.values()).backward()
        optimizer.step()
        schedule.step()
    log_posterior = torch.log_softmax(encoder(letters), 1)
    rate = SIX.float() @ categorical_rate(log_posterior, torch.log_softmax(prior, 0))
    expected_rate, expected_mean, _ = blahut_arimoto(SIX, UNEVEN, beta)
    assert rate.item() == pytest.approx(expected_rate, rel=0.02)
    assert (SIX.float() @ expected_distortion(log_posterior, distortion)).item() == pytest.approx(expected_mean, rel=0.02)


@pytest.mark.parametrize(("beta", "said"), [(0.5, 0.0), (2.0, 1.0)])
def test_with_a_free_decoder_the_curve_is_the_line_of_slope_minus_one(beta: float, said: float) -> None:
    """-log p(x|z) with p learned: R = H(X) - D whatever beta, so the price only chooses an end, nothing or all."""
    logits, decoder = (normal(6, 6, seed=seed).requires_grad_() for seed in (1, 2))
    prior = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits, decoder, prior], lr=0.1)
    for _ in range(600):
        log_posterior = torch.log_softmax(logits, 1)
        rate = SIX @ categorical_rate(log_posterior, torch.log_softmax(prior, 0))
        distortion = SIX @ expected_distortion(log_posterior, -torch.log_softmax(decoder, 0))
        optimizer.zero_grad()
        (rate + beta * distortion).backward()
        optimizer.step()
    assert (rate + distortion).item() == pytest.approx(entropy(SIX), rel=0.01)
    assert rate.item() == pytest.approx(said * entropy(SIX), abs=0.02 * entropy(SIX))


@pytest.mark.parametrize("variances", [(2.25,), (4.0, 1.0, 0.25)], ids=["one", "water-filling"])
def test_the_gaussian_version_gives_the_gaussian_sources_curve_within_2_percent(variances: tuple[float, ...]) -> None:
    """R(D) = sum_d log(s_d / D_d) / 2, D_d = min(1 / (2 beta), s_d): encoder, decoder and prior learned through drawn codes."""
    source, betas = torch.tensor(variances), (0.5, 0.75, 1.0, 1.5, 3.0, 6.0)
    shape, rows, steps, g = (len(betas), len(variances)), 2048, 400, torch.Generator().manual_seed(0)
    encode, log_variance, decode, prior = (torch.full(shape, value, requires_grad=True) for value in (1.0, -1.0, 0.5, 0.0))
    optimizer = torch.optim.Adam([encode, log_variance, decode, prior], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):  # every beta with parameters of its own, side by side
        x = (torch.randn(rows, 1, len(variances), generator=g) * source.sqrt()).expand(-1, *shape)
        z = reparametrise(x * encode, log_variance, torch.randn(x.shape, generator=g))
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
    for beta, rate, distortion in zip(betas, rates.tolist(), distortions.tolist(), strict=True):
        water = [min(1 / (2 * beta), s) for s in variances]
        assert distortion == pytest.approx(sum(water), rel=0.02), beta
        assert rate == pytest.approx(sum(math.log(s / w) for s, w in zip(variances, water, strict=True)) / 2, rel=0.02), beta


def test_info_nce_bounds_the_distortion_up_to_a_constant_and_never_says_more_than_log_batch() -> None:
    """Two equal views of 64 letters: I = log 64; in batches of 8 the bound stops at log 8."""
    codes, batch, g = torch.eye(64, dtype=torch.float64), 8, torch.Generator().manual_seed(0)
    losses = []
    for _ in range(300):
        z = codes[torch.randint(64, (batch,), generator=g)]
        losses.append(F.cross_entropy(50 * z @ z.T, torch.arange(batch)).item())
    said = math.log(batch) - sum(losses) / len(losses)
    assert 0.9 * math.log(batch) < said <= math.log(batch) < math.log(64)
