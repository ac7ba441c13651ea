"""Losses for unequal classes: values worked out by hand, identities, gradients, an ideal case, properties, bad input."""

import inspect
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wordsight.losses import imbalance
from wordsight.losses.imbalance import (
    adjust_logits,
    balanced_softmax,
    class_balanced_weights,
    class_means,
    deferred_weights,
    effective_number_weights,
    focal,
    grw_weights,
    lade,
    ldam,
    logit_adjustment,
    ncm_logits,
    tau_normalise,
    weighted_cross_entropy,
)

COUNTS = torch.tensor([100, 20, 3])
LOSSES: dict[str, Callable[..., Tensor]] = {
    "focal": lambda z, y, n, **k: focal(z, y, **k),
    "balanced_softmax": balanced_softmax,
    "logit_adjustment": lambda z, y, n, **k: logit_adjustment(z, y, n, 0.7, **k),
    "ldam": lambda z, y, n, **k: ldam(z, y, n, 0.5, 3.0, **k),
    "lade": lade,
    "weighted_cross_entropy": lambda z, y, n, **k: weighted_cross_entropy(z, y, grw_weights(n), **k),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def rows(batch: int = 8, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, classes, dtype=torch.float64, generator=g), torch.randint(classes, (batch,), generator=g)


def test_names_arguments_and_papers_settings_stay() -> None:
    expected = {
        "focal": "(logits, targets, gamma=2.0",
        "balanced_softmax": "(logits, targets, counts",
        "logit_adjustment": "(logits, targets, counts, tau=1.0",
        "ldam": "(logits, targets, counts, max_margin=0.5, scale=30.0",
        "lade": "(logits, targets, counts, remine_weight=0.1",
        "effective_number_weights": "(counts, beta)",
        "grw_weights": "(counts, exponent=1.2)",
    }
    for name, start in expected.items():
        signature = inspect.signature(getattr(imbalance, name))
        plain = [one.replace(annotation=inspect.Parameter.empty) for one in signature.parameters.values()]
        assert str(inspect.Signature(plain)).startswith(start), name


def test_golden_focal() -> None:
    """p_y = 3/4 and 1/4: -(1/16 log 3/4 + 9/16 log 1/4) / 2."""
    logits = torch.tensor([[math.log(3), 0.0], [math.log(3), 0.0]], dtype=torch.float64)
    expected = -(math.log(0.75) / 16 + 9 * math.log(0.25) / 16) / 2
    assert focal(logits, torch.tensor([0, 1])).item() == pytest.approx(expected, abs=1e-12)


def test_golden_balanced_softmax_and_logit_adjustment() -> None:
    """Equal logits, counts 9 and 1: the adjusted softmax is the prior; with tau = 1/2 it is 3 to 1."""
    logits = torch.zeros(2, 2, dtype=torch.float64)
    targets, counts = torch.tensor([0, 1]), torch.tensor([9, 1])
    assert balanced_softmax(logits, targets, counts).item() == pytest.approx(-(math.log(0.9) + math.log(0.1)) / 2, abs=1e-12)
    found = logit_adjustment(logits, targets, counts, 0.5).item()
    assert found == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2, abs=1e-12)


def test_golden_ldam() -> None:
    """Counts 16 and 1: margins 1/4 and 1/2. Equal cosines, s = 4: log(1 + e^(4 margin)) in either row."""
    found = ldam(torch.zeros(2, 2, dtype=torch.float64), torch.tensor([0, 1]), [16, 1], 0.5, 4.0).item()
    assert found == pytest.approx((math.log1p(math.e) + math.log1p(math.e**2)) / 2, abs=1e-12)


def test_golden_lade() -> None:
    """Counts 3 and 1 (pi = 3/4, 1/4; log pi + log C = log 3/2, log 1/2), logits [log 3, 0] and [0, log 2], targets 0 and 1.

    Balanced: log of (9 + 1) / 9 and (3 + 2) / 2. a = [log 3, log 2]; b = [log(4/2 * 2/3), log(3/2 * 2)] = [log 4/3, log 3].
    """
    logits = torch.tensor([[math.log(3), 0.0], [0.0, math.log(2)]], dtype=torch.float64)
    balanced = (math.log(10 / 9) + math.log(5 / 2)) / 2
    b_0, b_1 = math.log(4 / 3), math.log(3)
    estimate = 0.75 * (math.log(3) - b_0 - 0.1 * b_0**2) + 0.25 * (math.log(2) - b_1 - 0.1 * b_1**2)
    found = lade(logits, torch.tensor([0, 1]), torch.tensor([3, 1])).item()
    assert found == pytest.approx(balanced - 0.1 * estimate, abs=1e-12)


def test_golden_lade_with_a_class_that_the_batch_lacks() -> None:
    """Equal classes, all logits 1, targets 0: CE = log 2, a = [1, 0], b = [1, 1]: L_est = -(-.1 - 1.1) / 2 = .6."""
    found = lade(torch.ones(3, 2, dtype=torch.float64), torch.zeros(3, dtype=torch.int64), [5, 5]).item()
    assert found == pytest.approx(math.log(2) + 0.06, abs=1e-12)


def test_golden_weights() -> None:
    assert class_balanced_weights([6, 3, 1]).tolist() == pytest.approx([10 / 18, 10 / 9, 10 / 3])
    # 1, 1 + 1/2 and 1 + 1/2 + 1/4 effective samples: weights as 1 : 2/3 : 4/7
    expected = np.array([1, 2 / 3, 4 / 7]) * 3 / (1 + 2 / 3 + 4 / 7)
    assert effective_number_weights([1, 2, 3], 0.5).tolist() == pytest.approx(expected.tolist())
    assert grw_weights([4, 1], 0.5).tolist() == pytest.approx([2 / 3, 4 / 3])
    assert grw_weights([32, 1]).tolist() == pytest.approx([2 / 65, 128 / 65])  # 32^1.2 = 64
    loss = weighted_cross_entropy(
        torch.tensor([[0.0, 0], [math.log(3), 0]]), torch.tensor([0, 1]), [1.0, 3.0], weights=torch.tensor([1.0, 0.5])
    )
    assert loss.item() == pytest.approx((math.log(2) + 1.5 * math.log(4)) / 2.5)


def test_golden_deferred_weights() -> None:
    for epoch, expected in ((0, torch.ones(3)), (159, torch.ones(3)), (160, effective_number_weights(COUNTS, 0.9999))):
        assert torch.equal(deferred_weights(COUNTS, epoch, 160), expected)


def test_golden_corrections_of_a_classifier() -> None:
    adjusted = adjust_logits(torch.zeros(1, 2), [3, 1], 2.0)
    assert adjusted[0].tolist() == pytest.approx([2 * math.log(4 / 3), 2 * math.log(4)])
    classifier = torch.tensor([[3.0, 4.0], [0.0, 16.0], [0.0, 0.0]])
    assert torch.allclose(tau_normalise(classifier), torch.tensor([[0.6, 0.8], [0, 1], [0, 0]]))
    assert torch.allclose(tau_normalise(classifier, 0.5), torch.tensor([[3 / 5**0.5, 4 / 5**0.5], [0, 4], [0, 0]]))
    features = torch.tensor([[1.0, 0], [3, 0], [0, 2]])
    means = class_means(features, torch.tensor([0, 0, 2]), 3, weights=torch.tensor([3.0, 1.0, 1.0]))
    assert means.tolist() == [[1.5, 0], [0, 0], [0, 2]]
    assert ncm_logits(torch.tensor([[0.0, 5.0], [-3.0, 4.0]]), means) == pytest.approx(
        torch.tensor([[0.0, -2, 1], [-0.6, -2, 0.8]])
    )


@every_loss
@pytest.mark.parametrize("weighted", [False, True])
def test_gradients(loss: Callable[..., Tensor], weighted: bool) -> None:
    logits, targets = rows()
    weights = torch.tensor([1.0, 2, 0, 0.5, 1, 1, 3, 1]) if weighted else None
    assert torch.autograd.gradcheck(lambda z: loss(z, targets, COUNTS, weights=weights), logits.requires_grad_())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 6), st.integers(0, 99))
def test_identities(batch: int, classes: int, seed: int) -> None:
    logits, targets = rows(batch, classes, seed)
    plain = F.cross_entropy(logits, targets).item()
    counts = torch.randint(1, 999, (classes,), generator=torch.Generator().manual_seed(seed))
    same = {
        "focal, gamma 0": focal(logits, targets, 0.0),
        "balanced softmax, equal counts": balanced_softmax(logits, targets, torch.full((classes,), 7)),
        "adjustment, tau 0": logit_adjustment(logits, targets, counts, 0.0),
        "LDAM, margin 0, s 1": ldam(logits, targets, counts, 0.0, 1.0),
        "weights of equal counts": weighted_cross_entropy(logits, targets, class_balanced_weights([4] * classes)),
    }
    for name, value in same.items():
        assert value.item() == pytest.approx(plain, abs=1e-12), name
    assert torch.equal(logit_adjustment(logits, targets, counts), balanced_softmax(logits, targets, counts))
    assert torch.equal(adjust_logits(logits, counts, 0.0), logits)
    assert torch.equal(tau_normalise(logits, 0.0), logits)
    assert torch.allclose(adjust_logits(logits + imbalance._log_prior(counts.double()), counts), logits)
    even = torch.ones(classes)
    inverse = (1 / counts.double()) / (1 / counts.double()).mean()
    for weights, expected in (
        (effective_number_weights(counts, 0.0), even),
        (effective_number_weights(counts, 1e-12), even),
        (effective_number_weights(counts, 1 - 1e-13), inverse),
        (effective_number_weights(counts, 1.0), inverse),
        (grw_weights(counts, 0.0), even),
        (grw_weights(counts, 1.0), inverse),
    ):
        assert torch.allclose(weights, expected.float(), rtol=1e-5)
    share = counts / counts.sum()
    assert torch.allclose(class_balanced_weights(counts), 1 / (classes * share))


@every_loss
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_order_of_rows_and_of_classes_unit_of_counts_and_repetition_do_not_matter(
    loss: Callable[..., Tensor], data: st.DataObject
) -> None:
    batch, classes = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 6))
    logits, targets = rows(batch, classes, data.draw(st.integers(0, 99)))
    counts = torch.tensor(data.draw(st.lists(st.integers(0, 500), min_size=classes, max_size=classes)))
    if not counts.any():
        counts[0] = 1
    value = loss(logits, targets, counts).item()
    assert math.isfinite(value)
    order = torch.tensor(data.draw(st.permutations(range(batch))))
    assert loss(logits[order], targets[order], counts).item() == pytest.approx(value, abs=1e-9)
    classes_order = torch.tensor(data.draw(st.permutations(range(classes))))
    renamed = torch.argsort(classes_order)[targets]
    assert loss(logits[:, classes_order], renamed, counts[classes_order]).item() == pytest.approx(value, abs=1e-9)
    assert loss(logits, targets, counts * 10).item() == pytest.approx(value, abs=1e-7)
    assert loss(logits, targets, counts, weights=torch.full((batch,), 0.3)).item() == pytest.approx(value, abs=1e-7)
    # a row of weight 2 is that row twice
    weights = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=batch, max_size=batch)))
    times = torch.repeat_interleave(torch.arange(batch), weights)
    expected = loss(logits[times], targets[times], counts).item() if len(times) else 0.0
    assert loss(logits, targets, counts, weights=weights.float()).item() == pytest.approx(expected, abs=1e-6)


@every_loss
def test_a_row_of_weight_zero_gets_no_gradient_and_all_zero_is_zero(loss: Callable[..., Tensor]) -> None:
    logits, targets = rows()
    logits.requires_grad_()
    (slope,) = torch.autograd.grad(loss(logits, targets, COUNTS, weights=torch.arange(8).float()), logits)
    assert not slope[0].any()
    assert slope[1:].any(1).all()
    value = loss(logits, targets, COUNTS, weights=torch.zeros(8))
    assert value.item() == 0
    assert not torch.autograd.grad(value, logits)[0].any()


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(loss: Callable[..., Tensor], dtype: torch.dtype) -> None:
    logits, targets = rows(64)
    half = (10 * logits).to(dtype).requires_grad_()
    value = loss(half, targets, COUNTS)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(loss(half.detach().float(), targets, COUNTS).item(), abs=1e-6)
    value.backward()
    assert half.grad.dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(half, targets, COUNTS), value)


@every_loss
def test_classes_without_samples_are_finite_and_extreme_logits_too(loss: Callable[..., Tensor]) -> None:
    counts = torch.tensor([50, 0, 4])
    for scale in (1.0, 1e4):
        logits, targets = rows(9)
        logits = (scale * logits).float().requires_grad_()
        value = loss(logits, targets, counts)  # class 1 is among the targets
        value.backward()
        assert 1 in targets.tolist()
        assert value.isfinite()
        assert logits.grad.isfinite().all()


def test_what_a_class_without_samples_counts_as() -> None:
    logits, targets = rows(6)
    empty, rarest = torch.tensor([50, 0, 4]), torch.tensor([50, 4, 4])
    for loss in (balanced_softmax, ldam):
        assert loss(logits, targets, empty).item() == pytest.approx(loss(logits, targets, rarest).item(), abs=1e-12)
    assert adjust_logits(logits, empty)[0, 1] - logits[0, 1] == pytest.approx(math.log(54 / 4))
    for weights in (
        class_balanced_weights,
        grw_weights,
        lambda counts: effective_number_weights(counts, 0.99),
        lambda counts: effective_number_weights(counts, 1.0),
        lambda counts: effective_number_weights(counts, 0.0),
    ):
        found, without = weights([50, 0, 4]), weights([50, 4])
        assert found[1] == 0
        assert torch.equal(found[[0, 2]], without)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.0])
def test_focal_has_a_finite_gradient_where_a_row_is_right_to_the_last_digit(gamma: float) -> None:
    logits = torch.tensor([[90.0, 0.0], [0.0, 90.0]], requires_grad=True)
    focal(logits, torch.tensor([0, 0]), gamma).backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[0].abs().max() < 1e-30
    assert logits.grad[1].tolist() == pytest.approx([-0.5, 0.5], abs=1e-6)


def test_weights_keep_their_digits_where_counts_are_far_apart() -> None:
    counts = torch.tensor([10**9, 1], dtype=torch.float64)
    near_one = 1 - 1e-12
    expected = np.array([1 / 1e9, 1.0])
    assert effective_number_weights(counts, near_one).numpy() == pytest.approx(expected * 2 / expected.sum(), rel=1e-3)
    assert effective_number_weights(counts, 0.0).dtype == torch.float64
    assert grw_weights(torch.tensor([10**9, 1]), 50.0).tolist() == [0.0, 2.0]


def gaussian_sample(counts: list[int], seed: int) -> tuple[Tensor, Tensor]:
    """Points around the corners of a triangle, deviation 1: of balanced classes the posterior is softmax(x m_c - |m_c|^2 / 2)."""
    g = torch.Generator().manual_seed(seed)
    targets = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    return CORNERS[targets] + torch.randn(len(targets), 2, dtype=torch.float64, generator=g), targets


CORNERS = 1.5 * torch.tensor([[1.0, 0], [-0.5, 3**0.5 / 2], [-0.5, -(3**0.5) / 2]], dtype=torch.float64)


def fitted(loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, targets: Tensor) -> Callable[[Tensor], Tensor]:
    weight, bias = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    optimizer = torch.optim.LBFGS(parameters, max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(x @ weight + bias, targets)
        value.backward()
        return value

    optimizer.step(closure)
    return lambda points: (points @ weight + bias).detach()


def test_a_skewed_sample_of_gaussians_gives_the_balanced_bayes_rule_by_balanced_softmax_and_not_by_cross_entropy() -> None:
    counts = [18_000, 1_800, 180]
    x, targets = gaussian_sample(counts, seed=0)
    test_x, test_targets = gaussian_sample([20_000] * 3, seed=1)

    def accuracy(logits: Tensor) -> float:
        return (logits.argmax(1) == test_targets).double().mean().item()

    bayes = accuracy(test_x @ CORNERS.T - CORNERS.square().sum(1) / 2)
    plain = fitted(F.cross_entropy, x, targets)
    found = {
        "balanced softmax": accuracy(fitted(lambda z, y: balanced_softmax(z, y, counts), x, targets)(test_x)),
        "cross entropy, adjusted": accuracy(adjust_logits(plain(test_x), counts)),
        "class-balanced weights": accuracy(
            fitted(lambda z, y: weighted_cross_entropy(z, y, class_balanced_weights(counts)), x, targets)(test_x)
        ),
        "LADE": accuracy(fitted(lambda z, y: lade(z, y, counts), x, targets)(test_x)),
        "nearest mean": accuracy(ncm_logits(test_x, class_means(x, targets, 3))),
    }
    assert bayes > 0.8
    for name, value in found.items():
        assert value > bayes - 0.01, (name, value, bayes)
    assert accuracy(plain(test_x)) < bayes - 0.1


BAD = [
    (lambda: focal(torch.zeros(3), torch.zeros(3, dtype=torch.int64)), r"\[B, C\].*float32 \(3,\)"),
    (lambda: focal(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)), r"at least 1.*\(0, 3\)"),
    (lambda: focal(torch.zeros(2, 3, dtype=torch.int64), torch.tensor([0, 1])), "floating-point.*int64"),
    (lambda: focal(torch.zeros(2, 3), torch.tensor([0, 1, 2])), r"targets are \(3,\).*\(2,\)"),
    (lambda: focal(torch.zeros(2, 3), torch.tensor([0.0, 1.0])), "integers.*float32"),
    (lambda: focal(torch.zeros(2, 3), torch.tensor([True, False])), "integers.*bool"),
    (lambda: focal(torch.zeros(2, 3), torch.tensor([0, 3])), "0 to 2 with 3 classes, got 0 to 3"),
    (lambda: focal(torch.zeros(2, 3), torch.tensor([-100, 2])), "0 to 2 with 3 classes, got -100 to 2"),
    (lambda: focal(torch.zeros(1, 3), torch.tensor([0]), -1.0), "gamma must be a finite number 0 or more, got -1"),
    (lambda: focal(torch.zeros(1, 3), torch.tensor([0]), math.nan), "gamma"),
    (lambda: focal(torch.zeros(1, 3), torch.tensor([0]), weights=torch.ones(3)), r"weights are \(3,\).*\(1,\)"),
    (lambda: focal(torch.zeros(1, 3), torch.tensor([0]), weights=torch.tensor([-1.0])), "weights must be finite, 0 or more"),
    (lambda: balanced_softmax(torch.zeros(1, 3), torch.tensor([0]), [1, 2]), "2 classes by their counts and 3 by the logits"),
    (lambda: balanced_softmax(torch.zeros(1, 2), torch.tensor([0]), [1, -2]), "count of class 1 is -2"),
    (lambda: balanced_softmax(torch.zeros(1, 2), torch.tensor([0]), [math.inf, 2]), "count of class 0 is inf"),
    (lambda: balanced_softmax(torch.zeros(1, 2), torch.tensor([0]), [0, 0]), "every class's count is 0"),
    (lambda: lade(torch.zeros(1, 2), torch.tensor([0]), torch.ones(2, 1)), r"vector \[C\], got \(2, 1\)"),
    (lambda: lade(torch.zeros(1, 2), torch.tensor([0]), [1, 2], -0.1), "remine_weight"),
    (lambda: logit_adjustment(torch.zeros(1, 2), torch.tensor([0]), [1, 2], -1.0), "tau"),
    (lambda: ldam(torch.zeros(1, 2), torch.tensor([0]), [1, 2], -0.5), "max_margin"),
    (lambda: ldam(torch.zeros(1, 2), torch.tensor([0]), [1, 2], scale=0.0), "scale must be a finite number above 0, got 0"),
    (lambda: weighted_cross_entropy(torch.zeros(1, 2), torch.tensor([0]), [1.0, -1.0]), "class weight of class 1 is -1"),
    (lambda: effective_number_weights([1, 2], 1.5), "beta must be a finite number from 0 to 1, got 1.5"),
    (lambda: effective_number_weights([], 0.5), r"vector \[C\], got \(0,\)"),
    (lambda: grw_weights([1, 2], -1.0), "exponent"),
    (lambda: deferred_weights([1, 2], -1, 0), "epoch"),
    (lambda: adjust_logits(torch.zeros(1, 2), [1, 2, 3]), "3 classes by their counts and 2"),
    (lambda: adjust_logits(torch.zeros(1, 2, dtype=torch.int64), [1, 2]), "floating-point"),
    (lambda: tau_normalise(torch.zeros(3)), r"\[C, D\]"),
    (lambda: tau_normalise(torch.zeros(3, 2), -1.0), "tau"),
    (lambda: class_means(torch.zeros(2, 3), torch.tensor([0, 5]), 5), "0 to 4 with 5 classes, got 0 to 5"),
    (lambda: ncm_logits(torch.zeros(2, 3), torch.zeros(2, 4)), r"\(2, 3\) and means \(2, 4\)"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_named(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_counts_may_be_lists_arrays_or_tensors_and_targets_any_integers() -> None:
    logits, targets = rows()
    value = balanced_softmax(logits, targets, COUNTS)
    for counts in (COUNTS.tolist(), COUNTS.numpy(), COUNTS.float(), (COUNTS / COUNTS.sum()).double()):
        assert balanced_softmax(logits, targets, counts).item() == pytest.approx(value.item(), abs=1e-7)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(balanced_softmax(logits, targets.to(dtype), COUNTS), value)
