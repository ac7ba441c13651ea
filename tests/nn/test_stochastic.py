"""The stochastic head: a normal law, the same draws for every split of a batch, the mean in evaluation."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wordsight.losses.rate_distortion import gaussian_rate
from wordsight.nn.random import number_streams, numbered_rows
from wordsight.nn.stochastic import GaussianHead, normal


def test_numbers_are_standard_normal_and_finite_at_the_ends() -> None:
    with numbered_rows(3, 0, "cpu"):
        x = normal(2000, 200, stream=1, device="cpu").double()
    count = x.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):  # moments of the normal law, their variance
        assert abs((x**power).mean().item() - moment) < 4 * (variance / count) ** 0.5
    ends = 2 * torch.tensor([0.0, 1 - 2.0**-24]) - 1 + 2.0**-24  # what the least and the largest uniform number become
    extreme = 2**0.5 * torch.erfinv(ends)
    assert extreme.isfinite().all()
    assert (extreme.abs() - 5.42).abs().max() < 0.02


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(2, 12), cut=st.integers(1, 11), seed=st.integers(0, 99))
def test_micro_batches_draw_what_the_batch_draws(rows: int, cut: int, seed: int) -> None:
    torch.manual_seed(seed)
    head, features, cut = GaussianHead(6, 4).train(), torch.randn(rows, 6), min(cut, rows - 1)
    number_streams(head)
    with numbered_rows(seed, 5, "cpu"):
        whole, _, _ = head(features)
    parts = []
    for start, part in ((5, features[:cut]), (5 + cut, features[cut:])):
        with numbered_rows(seed, start, "cpu"):
            parts.append(head(part)[0])
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=1e-6)


def test_evaluation_gives_the_mean_and_training_its_law() -> None:
    head = GaussianHead(6, 4, init_log_variance=-2.0)
    features = torch.randn(1, 6).expand(20_000, 6)
    code, mean, log_variance = head.eval()(features)
    assert torch.equal(code, mean)
    torch.testing.assert_close(log_variance, torch.full_like(mean, -2.0))
    drawn, mean, log_variance = head.train()(features)
    deviation = (log_variance[0] / 2).exp()
    assert ((drawn - mean).mean(0).abs() < 4.5 * deviation / 20_000**0.5).all()
    assert (((drawn - mean).std(0) / deviation - 1).abs() < 4.5 / 40_000**0.5).all()


def test_every_parameter_gets_a_gradient_from_code_and_rate() -> None:
    head = GaussianHead(6, 4).train()
    code, mean, log_variance = head(torch.randn(8, 6))
    rate = gaussian_rate(mean, log_variance, head.prior_mean, head.prior_log_variance)
    (code.square().sum() + rate.sum()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in head.parameters())
