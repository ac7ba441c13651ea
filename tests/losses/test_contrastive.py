"""InfoNCE: closed forms first, then properties, then precision."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from wordsight.losses.contrastive import info_nce, same_pair

SCALE = torch.tensor(math.log(1 / 0.07), dtype=torch.float64)


def unit(rows: int, width: int = 8, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("batch", [1, 2, 7, 64])
def test_is_log_batch_where_every_pair_is_alike(batch: int) -> None:
    same = unit(1).expand(batch, -1)
    assert info_nce(same, same, SCALE).item() == pytest.approx(math.log(batch), abs=1e-12)


@pytest.mark.parametrize("batch", [2, 5])
def test_closed_form_of_orthogonal_pairs(batch: int) -> None:
    """Right logits s, wrong ones 0: log(1 + (B - 1) exp(-s))."""
    eye, scale = torch.eye(batch, dtype=torch.float64), 3.0
    expected = math.log1p((batch - 1) * math.exp(-scale))
    assert info_nce(eye, eye, torch.tensor(math.log(scale), dtype=torch.float64)).item() == pytest.approx(expected, abs=1e-12)


def test_closed_form_of_repeated_texts() -> None:
    """Rows 0 and 1 have one text. Plain: they are each other's wrong answer (log 2 at best). Spread: nothing is wrong."""
    image = text = torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0]], dtype=torch.float64)
    scale = torch.tensor(math.log(50.0), dtype=torch.float64)
    positives = same_pair(torch.tensor([4, 4, 9]), torch.arange(3))
    assert info_nce(image, text, scale).item() == pytest.approx(2 / 3 * math.log(2), abs=1e-9)
    # the spread target's entropy, log 2 for two of three rows, is the least that a cross entropy can be
    assert info_nce(image, text, scale, positives=positives).item() == pytest.approx(2 / 3 * math.log(2), abs=1e-9)
    found = {}
    for name, mask in (("plain", None), ("spread", positives)):
        moving = image.clone().requires_grad_()
        info_nce(moving, text + 0.1 * unit(3, 3), scale, positives=mask).backward()
        found[name] = moving.grad
    assert not torch.allclose(found["plain"], found["spread"])


def test_at_its_least_the_spread_loss_pulls_nowhere_and_the_plain_one_pulls_twins_apart() -> None:
    """Two pictures of one text, placed alike: their gradients cancel only if both texts are right."""
    image = torch.tensor([[0.0, 1], [0, 1]], dtype=torch.float64)
    text = torch.tensor([[1.0, 0], [0, 1]], dtype=torch.float64)
    gradients = []
    for positives in (None, torch.ones(2, 2, dtype=torch.bool)):
        moving = text.clone().requires_grad_()
        info_nce(image, moving, torch.tensor(0.0, dtype=torch.float64), positives=positives).backward()
        gradients.append(moving.grad)
    plain, spread = gradients
    # plain: text 0 is right for image 0 and wrong for image 1; spread: it is right for both, and gets twice the pull
    assert spread[0, 1] < plain[0, 1] < 0


@settings(max_examples=25, deadline=None)
@given(batch=st.integers(1, 12), seed=st.integers(0, 99), ids=st.integers(1, 6))
def test_order_of_pairs_and_of_sides_do_not_matter(batch: int, seed: int, ids: int) -> None:
    g = torch.Generator().manual_seed(seed)
    image, text = unit(batch, seed=seed), unit(batch, seed=seed + 100)
    positives = same_pair(torch.randint(ids, (batch,), generator=g), torch.randint(ids, (batch,), generator=g))
    order = torch.randperm(batch, generator=g)
    for mask, shuffled in ((None, None), (positives, positives[order][:, order])):
        value = info_nce(image, text, SCALE, positives=mask)
        torch.testing.assert_close(info_nce(image[order], text[order], SCALE, positives=shuffled), value, rtol=0, atol=1e-12)
        torch.testing.assert_close(info_nce(text, image, SCALE, positives=mask), value, rtol=0, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(batch=st.integers(1, 12), seed=st.integers(0, 99), ids=st.integers(1, 20))
def test_spread_equals_its_definition_and_plain_where_nothing_repeats(batch: int, seed: int, ids: int) -> None:
    g = torch.Generator().manual_seed(seed)
    image, text = unit(batch, seed=seed), unit(batch, seed=seed + 100)
    text_ids, image_ids = (torch.randint(ids, (batch,), generator=g) for _ in range(2))
    logits = (SCALE.exp() * image @ text.T).tolist()
    total = 0.0
    for i in range(batch):
        right = [j for j in range(batch) if text_ids[i] == text_ids[j] or image_ids[i] == image_ids[j]]
        for row in (logits[i], [logits[j][i] for j in range(batch)]):
            log_sum = math.log(sum(math.exp(value) for value in row))
            total += sum(log_sum - row[j] for j in right) / len(right) / (2 * batch)
    assert info_nce(image, text, SCALE, positives=same_pair(text_ids, image_ids)).item() == pytest.approx(total, abs=1e-10)
    alone = same_pair(torch.arange(batch), torch.arange(batch))
    torch.testing.assert_close(info_nce(image, text, SCALE, positives=alone), info_nce(image, text, SCALE), rtol=0, atol=1e-12)


def test_same_pair_is_symmetric_and_holds_the_diagonal() -> None:
    mask = same_pair(torch.tensor([1, 2, 1, 3]), torch.tensor([7, 8, 9, 8]))
    expected = torch.eye(4, dtype=torch.bool)
    expected[0, 2] = expected[2, 0] = expected[1, 3] = expected[3, 1] = True
    assert torch.equal(mask, expected)


def test_gradients_are_right() -> None:
    inputs = tuple(v.clone().requires_grad_() for v in (unit(5), unit(5, seed=1), torch.tensor(1.0, dtype=torch.float64)))
    positives = same_pair(torch.tensor([0, 1, 0, 2, 3]), torch.arange(5))
    assert torch.autograd.gradcheck(info_nce, inputs)
    assert torch.autograd.gradcheck(lambda *v: info_nce(*v, positives=positives), inputs)


def test_logits_are_float32_under_autocast_and_from_bfloat16() -> None:
    image, text, scale = unit(16).float(), unit(16, seed=1).float(), torch.tensor(math.log(100.0))
    expected = info_nce(image, text, scale)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = info_nce(image, text, scale)
    assert inside.dtype is torch.float32
    torch.testing.assert_close(inside, expected, rtol=0, atol=0)
    low = info_nce(image.bfloat16(), text.bfloat16(), scale)
    assert low.dtype is torch.float32
    torch.testing.assert_close(low, info_nce(image.bfloat16().float(), text.bfloat16().float(), scale), rtol=0, atol=0)


def test_large_scales_stay_finite() -> None:
    image = unit(6).float()
    value = info_nce(image, -image, torch.tensor(math.log(100.0)))
    assert value.isfinite()
    assert value > 50
