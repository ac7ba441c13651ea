"""Energy-based models: closed forms, the two phases, Langevin's law, NCE, and the contrastive losses as NCE."""

import itertools
import math
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from wordsight.losses import contrastive
from wordsight.losses.energy import binary_nce, langevin, log_probs, maximum_likelihood, multiclass_nce, phase_difference

DOCS = Path(__file__).parents[2] / "docs"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def normal_law(mean: float, deviation: float) -> torch.distributions.Normal:
    return torch.distributions.Normal(*(torch.tensor(value, dtype=torch.float64) for value in (mean, deviation)))


def spins(count: int) -> torch.Tensor:
    """Every state of `count` units of -1 or 1: [2^count, count]."""
    return torch.tensor(list(itertools.product([-1.0, 1.0], repeat=count)), dtype=torch.float64)


def boltzmann(states: torch.Tensor, coupling: torch.Tensor, field: torch.Tensor) -> torch.Tensor:
    """A fully visible Boltzmann machine's energy, -s' J s / 2 - h' s; only J's off-diagonal part matters."""
    return -((states @ coupling) * states).sum(1) / 2 - states @ field


# ---- partition function and phases


def test_log_probs_of_a_normal_on_a_grid_are_its_density() -> None:
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    found = log_probs((x - 1) ** 2 / (2 * 0.7**2), volume=float(x[1] - x[0]))
    torch.testing.assert_close(found, normal_law(1.0, 0.7).log_prob(x), rtol=0, atol=1e-10)


def test_log_probs_forget_a_constant_and_stand_extreme_energies() -> None:
    energy = torch.tensor([1e4, 1e4 + 1, -1e4])
    torch.testing.assert_close(log_probs(energy), log_probs(energy + 7))
    assert log_probs(energy).exp().sum().item() == pytest.approx(1)


@settings(max_examples=20, deadline=None)
@given(units=st.integers(1, 6), rows=st.integers(1, 20), seed=st.integers(0, 999))
def test_likelihoods_gradient_is_the_phase_difference_where_the_partition_function_can_be_summed(
    units: int, rows: int, seed: int
) -> None:
    states, coupling, field = spins(units), normal(units, units, seed=seed), normal(units, seed=seed + 1)
    data = torch.randint(len(states), (rows,), generator=generator(seed))

    def gradients(loss: str) -> tuple[torch.Tensor, ...]:
        weights = coupling.clone().requires_grad_(), field.clone().requires_grad_()
        energy = boltzmann(states, *weights)
        exact = log_probs(energy)  # summed over all 2^units states
        value = -exact[data].mean() if loss == "likelihood" else phase_difference(energy[data], energy, model_weights=exact.exp())
        return torch.autograd.grad(value, weights)

    for by_likelihood, by_phases in zip(gradients("likelihood"), gradients("phases"), strict=True):
        torch.testing.assert_close(by_phases, by_likelihood, rtol=0, atol=1e-12)


def test_the_sampled_phase_is_the_exact_one_on_average() -> None:
    states, coupling, field = spins(4), normal(4, 4), normal(4, seed=1).requires_grad_()
    energy = boltzmann(states, coupling, field)
    probs = log_probs(energy).exp().detach()
    samples = torch.multinomial(probs, 40_000, replacement=True, generator=generator())
    (sampled,) = torch.autograd.grad(phase_difference(energy[:1], energy[samples]), field, retain_graph=True)
    (exact,) = torch.autograd.grad(phase_difference(energy[:1], energy, model_weights=probs), field)
    assert (sampled - exact).abs().max() < 4 / math.sqrt(40_000)  # a spin's standard deviation is at most 1


@pytest.mark.parametrize("phase", ["exact", "sampled"])
def test_maximum_likelihood_of_a_boltzmann_machine_recovers_the_data(phase: str) -> None:
    """The data's law is a machine of 5 units: the model must come to it, from zero, by the phase difference alone."""
    states = spins(5)
    truth = log_probs(boltzmann(states, normal(5, 5) / 2, normal(5, seed=1) / 2))
    coupling, field = (torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 5), (5,)))
    steps, g = (400, None) if phase == "exact" else (600, generator())
    optimizer = torch.optim.Adam([coupling, field], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        energy = boltzmann(states, coupling, field)
        probs = log_probs(energy).exp().detach()
        if phase == "exact":
            loss = phase_difference(energy, energy, data_weights=truth.exp(), model_weights=probs)
        else:
            drawn = torch.multinomial(torch.stack([truth.exp(), probs]), 1000, replacement=True, generator=g)
            loss = phase_difference(energy[drawn[0]], energy[drawn[1]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    found = log_probs(boltzmann(states, coupling, field))
    divergence = (truth.exp() * (truth - found)).sum().item()
    start = (truth.exp() * (truth + math.log(len(states)))).sum().item()
    assert start > 0.3  # nats from the uniform law at which it starts
    assert divergence < (1e-8 if phase == "exact" else 2e-3)


def test_phases_refuse_what_they_cannot_average() -> None:
    energies = torch.zeros(3)
    with pytest.raises(ValueError, match=r"model energies are \(0,\)"):
        phase_difference(energies, torch.zeros(0))
    with pytest.raises(ValueError, match=r"data energies are \(3, 1\)"):
        phase_difference(energies[:, None], energies)
    with pytest.raises(ValueError, match="must be alike"):
        phase_difference(energies, energies, model_weights=torch.ones(2))


# ---- Langevin

MEAN = torch.tensor([1.0, -2.0], dtype=torch.float64)
COVARIANCE = torch.tensor([[1.0, 0.6], [0.6, 0.5]], dtype=torch.float64)


def well(x: torch.Tensor) -> torch.Tensor:
    """The energy of N(MEAN, COVARIANCE)."""
    return (((x - MEAN) @ COVARIANCE.inverse()) * (x - MEAN)).sum(1) / 2


@pytest.mark.parametrize("step_size", [0.02, 0.2])
def test_langevin_settles_in_the_gaussian_it_should(step_size: float) -> None:
    """Its exact law has precision A - step/4 A^2 with A the well's; at .02 that is the well's own within 5%, at .2 not at all."""
    chains = 8_000
    end = langevin(well, normal(chains, 2) * 3, num_steps=round(14 / step_size), step_size=step_size, generator=generator())
    precision = COVARIANCE.inverse()
    law = (precision - step_size / 4 * precision @ precision).inverse()
    error_of_mean = (law.diagonal() / chains).sqrt()
    assert ((end.mean(0) - MEAN).abs() < 4 * error_of_mean).all()
    # of a sample covariance: var(S_ij) = (C_ij^2 + C_ii C_jj) / n
    error = ((law**2 + law.diagonal()[:, None] * law.diagonal()) / chains).sqrt()
    assert ((torch.cov(end.T) - law).abs() < 4 * error).all()
    if step_size == 0.02:
        assert ((torch.cov(end.T) - COVARIANCE).abs() < 4 * error + 0.04 * COVARIANCE.abs()).all()
    else:
        assert ((torch.cov(end.T) - COVARIANCE).abs() > 8 * error).any()


def test_langevin_repeats_by_its_generator_and_leaves_its_start_and_parameters_alone() -> None:
    start, weight = normal(5, 2), torch.ones(2, dtype=torch.float64, requires_grad=True)
    before = start.clone()
    ends = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed + 10)  # torch's own generator must not matter
        with torch.no_grad():
            ends.append(
                langevin(lambda x: (x * weight).square().sum(1), start, num_steps=3, step_size=0.1, generator=generator(seed))
            )
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])
    assert torch.equal(start, before)
    assert weight.grad is None
    assert not ends[0].requires_grad
    assert torch.equal(langevin(well, start, num_steps=0, step_size=1.0), start)


def test_langevin_refuses_what_it_cannot_walk() -> None:
    start = normal(4, 2)
    for steps, size in ((-1, 0.1), (1, 0.0), (1, -1.0), (1, math.nan), (1, math.inf)):
        with pytest.raises(ValueError, match="positive step_size"):
            langevin(well, start, num_steps=steps, step_size=size)
    with pytest.raises(ValueError, match=r"gave \(4, 2\) for 4 chains"):
        langevin(lambda x: x**2, start, num_steps=1, step_size=0.1)
    with pytest.raises(ValueError, match="one differentiable number a chain"):
        langevin(lambda x: x.detach().sum(1), start, num_steps=1, step_size=0.1)
    with pytest.raises(ValueError, match="take a smaller step_size"):
        langevin(well, start, num_steps=2000, step_size=10.0)


def test_persistent_chains_fit_a_gaussian_by_maximum_likelihood() -> None:
    """E = (x - m)^2 exp(-s) / 2 per dimension: m and s must come to the data's mean and log variance."""
    data = normal(2000, 2) * torch.tensor([0.8, 1.5]).double() + MEAN
    mean, log_variance = (torch.zeros(2, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def energy(x: torch.Tensor) -> torch.Tensor:
        return ((x - mean) ** 2 * (-log_variance).exp()).sum(1) / 2

    g, chains = generator(1), normal(2000, 2, seed=2)
    optimizer = torch.optim.Adam([mean, log_variance], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    for _ in range(300):
        loss, chains = maximum_likelihood(energy, data, chains, num_steps=10, step_size=0.05, generator=g)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(mean, data.mean(0), rtol=0, atol=0.05)
    torch.testing.assert_close(log_variance, data.var(0).log(), rtol=0, atol=0.1)


# ---- noise-contrastive estimation


def test_nce_finds_the_normaliser_of_an_energy_that_is_known() -> None:
    """E = x^2 / (2 0.6^2), whose log Z is log(0.6 sqrt(2 pi)); noise is N(0, 1.5^2), three samples a datum."""
    noise_law, g = normal_law(0.0, 1.5), generator()
    data = torch.randn(20_000, dtype=torch.float64, generator=g) * 0.6
    noise = torch.randn(60_000, dtype=torch.float64, generator=g) * 1.5
    log_partition = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_partition], max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        energies = data**2 / 0.72, noise**2 / 0.72
        loss = binary_nce(energies[0], noise_law.log_prob(data), energies[1], noise_law.log_prob(noise), log_partition)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert log_partition.item() == pytest.approx(math.log(0.6 * math.sqrt(2 * math.pi)), abs=0.02)


@pytest.mark.parametrize("noise_a_datum", [1.0, 5.0])
def test_nce_of_a_discrete_model_finds_its_normalised_law(noise_a_datum: float) -> None:
    """Every state is given as often as it is likely, so the minimum is exact: E + log Z = -log p, for any noise."""
    data_law, noise_law = log_probs(normal(8)), log_probs(normal(8, seed=1))
    counts = (data_law.exp() * 2000).round().long(), (noise_law.exp() * 2000 * noise_a_datum).round().long()
    data, noise = (torch.repeat_interleave(torch.arange(8), count) for count in counts)
    log_noise = (counts[1] / counts[1].sum()).double().log()
    energy = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    fixed = torch.tensor(0.7, dtype=torch.float64)  # with a free energy a state, log Z can be anything: it goes into them
    optimizer = torch.optim.LBFGS(
        [energy], max_iter=300, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = binary_nce(energy[data], log_noise[data], energy[noise], log_noise[noise], fixed)
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = (counts[0] / counts[0].sum()).double().log()
    torch.testing.assert_close(-energy.detach() - fixed, expected, rtol=0, atol=1e-5)


def test_multiclass_nce_is_log_candidates_where_none_stands_out() -> None:
    log_noise = log_probs(normal(7)).expand(3, 7)
    right = torch.tensor([0, 3, 6])
    assert multiclass_nce(-log_noise, log_noise, right).item() == pytest.approx(math.log(7), abs=1e-12)


def test_nce_refuses_shapes_that_do_not_go_together() -> None:
    three, two = torch.zeros(3), torch.zeros(2)
    with pytest.raises(ValueError, match="0 samples of noise"):
        binary_nce(three, three, torch.zeros(0), torch.zeros(0), 0.0)
    with pytest.raises(ValueError, match="the noise's energies"):
        binary_nce(three, three, two, three, 0.0)
    with pytest.raises(ValueError, match=r"energies are \(3,\)"):
        multiclass_nce(three, three, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="the candidates' energies"):
        multiclass_nce(torch.zeros(3, 2), torch.zeros(3, 3), torch.zeros(3, dtype=torch.int64))


def test_low_precision_energies_are_summed_in_float32() -> None:
    energy, log_noise, right = torch.randn(4, 6).bfloat16(), torch.randn(4, 6).bfloat16(), torch.zeros(4, dtype=torch.int64)
    assert multiclass_nce(energy, log_noise, right).dtype is torch.float32
    assert phase_difference(energy[0], energy[1]).dtype is torch.float32
    found = binary_nce(energy[0], log_noise[0], energy[1], log_noise[1], 0.0)
    high = torch.full((4096,), 60_000.0).half()  # sums and differences beyond float16's 65,504
    assert binary_nce(high, high, -high, -high, 0.0).item() == 240_000.0
    assert phase_difference(high, -high).item() == 120_000.0
    torch.testing.assert_close(
        found, binary_nce(energy[0].float(), log_noise[0].float(), energy[1].float(), log_noise[1].float(), 0.0)
    )


# ---- the contrastive losses are NCE


def pairs(batch: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return F.normalize(normal(batch, 8, seed=seed), dim=-1), F.normalize(normal(batch, 8, seed=seed + 1000), dim=-1)


@settings(max_examples=20, deadline=None)
@given(batch=st.integers(1, 12), seed=st.integers(0, 999), log_scale=st.floats(-1, 4.6))
def test_info_nce_is_multiclass_nce(batch: int, seed: int, log_scale: float) -> None:
    """Value and gradients, for whatever noise the texts and images are thought to come from."""
    inputs = [v.requires_grad_() for v in (*pairs(batch, seed), torch.tensor(log_scale, dtype=torch.float64))]
    image, text, scale = inputs
    log_noise = log_probs(normal(batch, seed=seed + 1)), log_probs(normal(batch, seed=seed + 2))
    right, cosine = torch.arange(batch), image @ text.T
    halves = []
    for logits, noise_B in ((scale.exp() * cosine, log_noise[0]), (scale.exp() * cosine.T, log_noise[1])):
        noise_BB = noise_B.expand(batch, batch)
        halves.append(multiclass_nce(-logits - noise_BB, noise_BB, right))
    as_nce, as_contrast = sum(halves) / 2, contrastive.info_nce(image, text, scale)
    torch.testing.assert_close(as_nce, as_contrast, rtol=0, atol=1e-12)
    for one, other in zip(torch.autograd.grad(as_nce, inputs), torch.autograd.grad(as_contrast, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


@settings(max_examples=20, deadline=None)
@given(batch=st.integers(2, 12), seed=st.integers(0, 999), log_scale=st.floats(-1, 4.6), bias=st.floats(-12, 3))
def test_siglip_is_binary_nce_with_in_batch_noise(batch: int, seed: int, log_scale: float, bias: float) -> None:
    """Every image's own text is a datum, the B - 1 others are its noise, log Z = -bias - log(B - 1)."""
    scalars = (torch.tensor(value, dtype=torch.float64) for value in (log_scale, bias))
    inputs = [v.requires_grad_() for v in (*pairs(batch, seed), *scalars)]
    image, text, scale, offset = inputs
    log_noise = log_probs(normal(batch, seed=seed + 1)).expand(batch, batch)
    energy = -scale.exp() * image @ text.T - log_noise
    wrong = ~torch.eye(batch, dtype=torch.bool)
    as_nce = binary_nce(energy.diagonal(), log_noise.diagonal(), energy[wrong], log_noise[wrong], -offset - math.log(batch - 1))
    as_contrast = contrastive.sigmoid(image, text, scale, offset)
    torch.testing.assert_close(as_nce, as_contrast, rtol=1e-12, atol=1e-12)
    for one, other in zip(torch.autograd.grad(as_nce, inputs), torch.autograd.grad(as_contrast, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


def joint() -> torch.Tensor:
    """p(x, y) of a discrete pair, [4, 3]."""
    return log_probs(normal(4, 3) * 1.5).exp()


def all_batches(law: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every batch of `size` pairs that can be drawn: x [T, size], y [T, size] and its probability [T]."""
    each = torch.cartesian_prod(*[torch.arange(law.numel())] * size)
    return each // law.shape[1], each % law.shape[1], law.flatten()[each].prod(1)


def test_the_population_minimum_of_info_nce_is_the_density_ratio_up_to_a_function_of_the_row() -> None:
    """All batches of 3 pairs summed with their probabilities: the gradient vanishes at log p(y|x)/p(y) + c(x), not elsewhere."""
    law = joint()
    ratio = (law / law.sum(1, keepdim=True) / law.sum(0)).log()
    log_noise_y = law.sum(0).log()
    x, y, chance = all_batches(law, 3)

    def loss(critic: torch.Tensor) -> torch.Tensor:
        logits = critic[x[:, :, None], y[:, None, :]]  # [T, 3, 3]
        noise = log_noise_y[y][:, None, :].expand(-1, 3, -1)
        per_batch = [multiclass_nce(-logits[t] - noise[t], noise[t], torch.arange(3)) * chance[t] for t in range(len(chance))]
        return torch.stack(per_batch).sum()

    for offset, vanishes in ((normal(4, 1, seed=3), True), (normal(1, 3, seed=3), False)):
        critic = (ratio + offset).requires_grad_()
        (slope,) = torch.autograd.grad(loss(critic), critic)
        assert (slope.abs().max().item() < 1e-12) is vanishes
    information = (law * ratio).sum().item()
    bound = math.log(3) - loss(ratio).item()
    assert 0.5 * information < bound < min(information, math.log(3))


def test_the_population_minimum_of_siglip_is_the_density_ratio_less_the_noise_a_datum() -> None:
    """exp(log_scale) cos + bias comes to log p(x, y) / (p(x) p(y)) - log(B - 1): it is the bias that holds log(B - 1)."""
    law, size = joint(), 4
    ratio = (law / law.sum(1, keepdim=True) / law.sum(0)).log()
    product = law.sum(1, keepdim=True) * law.sum(0)
    # a batch holds `size` data from the joint law and size (size - 1) of noise from the product of the margins, in the mean
    critic = (ratio - math.log(size - 1)).requires_grad_()
    loss = (law * F.softplus(-critic)).sum() + (size - 1) * (product * F.softplus(critic)).sum()
    (slope,) = torch.autograd.grad(loss, critic)
    assert slope.abs().max() < 1e-12
    # and that population loss is binary_nce's, on data and noise in proportion
    counts = (law * 3000).round().long().flatten(), (product * 9000).round().long().flatten()
    data, noise = (torch.repeat_interleave(torch.arange(12), count) for count in counts)
    energy, none = -ratio.flatten(), torch.zeros(12, dtype=torch.float64)
    found = binary_nce(energy[data], none[data], energy[noise], none[noise], 0.0)
    assert found.item() == pytest.approx(loss.item(), rel=2e-3)


# ---- the page


def test_the_pages_code_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "systems" / "energy.md").read_text(), re.S)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["chains"].shape == (256, 2)
    names["loss"].backward()
    assert names["log_partition"].grad.abs() > 0


@pytest.mark.parametrize(("method", "steps", "most"), [("likelihood", 100, 0.6), ("nce", 200, 0.2)])
def test_both_ways_of_training_fit_the_ring_of_the_pages_picture(method: str, steps: int, most: float) -> None:
    """A tenth of the picture's steps: from 1.17 nats to a few tenths or less; NCE's log Z is the grid's."""
    script = runpy.run_path(str(DOCS / "make_pictures" / "energy.py"))
    energy, estimate = script["fit"](method, steps, generator())
    _, log_z, divergence = script["judge"](energy)
    assert 0 < divergence < most
    if method == "nce":
        assert estimate == pytest.approx(log_z, abs=0.15)
