"""InfoNCE: closed forms first, then properties, then precision."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from wordsight.losses.contrastive import PLAIN_PAIRS, duplicate_keys, info_nce, sigmoid
from wordsight.losses.tiles import agree

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
    keys = duplicate_keys(torch.tensor([4, 4, 9]), torch.arange(3))
    assert info_nce(image, text, scale).item() == pytest.approx(2 / 3 * math.log(2), abs=1e-9)
    # the spread target's entropy, log 2 for two of three rows, is the least that a cross entropy can be
    assert info_nce(image, text, scale, keys=keys).item() == pytest.approx(2 / 3 * math.log(2), abs=1e-9)
    found = {}
    for name, given_keys in (("plain", None), ("spread", keys)):
        moving = image.clone().requires_grad_()
        info_nce(moving, text + 0.1 * unit(3, 3), scale, keys=given_keys).backward()
        found[name] = moving.grad
    assert not torch.allclose(found["plain"], found["spread"])


def test_at_its_least_the_spread_loss_pulls_nowhere_and_the_plain_one_pulls_twins_apart() -> None:
    """Two pictures of one text, placed alike: their gradients cancel only if both texts are right."""
    image = torch.tensor([[0.0, 1], [0, 1]], dtype=torch.float64)
    text = torch.tensor([[1.0, 0], [0, 1]], dtype=torch.float64)
    gradients = []
    for keys in (None, (torch.zeros(1, 2), torch.zeros(1, 2))):
        moving = text.clone().requires_grad_()
        info_nce(image, moving, torch.tensor(0.0, dtype=torch.float64), keys=keys).backward()
        gradients.append(moving.grad)
    plain, spread = gradients
    # plain: text 0 is right for image 0 and wrong for image 1; spread: it is right for both, and gets twice the pull
    assert spread[0, 1] < plain[0, 1] < 0


@settings(max_examples=25, deadline=None)
@given(batch=st.integers(1, 12), seed=st.integers(0, 99), ids=st.integers(1, 6))
def test_order_of_pairs_and_of_sides_do_not_matter(batch: int, seed: int, ids: int) -> None:
    g = torch.Generator().manual_seed(seed)
    image, text = unit(batch, seed=seed), unit(batch, seed=seed + 100)
    text_ids, image_ids = torch.randint(ids, (2, batch), generator=g)
    order = torch.randperm(batch, generator=g)
    for keys, shuffled in (
        (None, None),
        (duplicate_keys(text_ids, image_ids), duplicate_keys(text_ids[order], image_ids[order])),
    ):
        value = info_nce(image, text, SCALE, keys=keys)
        torch.testing.assert_close(info_nce(image[order], text[order], SCALE, keys=shuffled), value, rtol=0, atol=1e-12)
        torch.testing.assert_close(info_nce(text, image, SCALE, keys=keys), value, rtol=0, atol=1e-12)


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
    assert info_nce(image, text, SCALE, keys=duplicate_keys(text_ids, image_ids)).item() == pytest.approx(total, abs=1e-10)
    alone = duplicate_keys(torch.arange(batch), torch.arange(batch))
    torch.testing.assert_close(info_nce(image, text, SCALE, keys=alone), info_nce(image, text, SCALE), rtol=0, atol=1e-12)


def test_duplicates_are_right_for_each_other() -> None:
    of_image, of_text = duplicate_keys(torch.tensor([1, 2, 1, 3]), torch.tensor([7, 8, 9, 8]))
    mask = agree(of_image.T, of_text.T, torch.zeros(4, dtype=torch.bool))
    expected = torch.eye(4, dtype=torch.bool)
    expected[0, 2] = expected[2, 0] = expected[1, 3] = expected[3, 1] = True
    assert torch.equal(mask, expected)


def test_gradients_are_right() -> None:
    inputs = tuple(v.clone().requires_grad_() for v in (unit(5), unit(5, seed=1), torch.tensor(1.0, dtype=torch.float64)))
    keys = duplicate_keys(torch.tensor([0, 1, 0, 2, 3]), torch.arange(5))
    assert torch.autograd.gradcheck(info_nce, inputs)
    assert torch.autograd.gradcheck(lambda *v: info_nce(*v, keys=keys, tile=0), inputs)
    assert torch.autograd.gradgradcheck(lambda *v: info_nce(*v, keys=keys, tile=0), inputs)


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


# ------------------------------------------------------------------------------------------------------------------- sigmoid


@pytest.mark.parametrize("batch", [1, 2, 7, 64])
def test_sigmoid_is_batch_log_2_where_nothing_is_known(batch: int) -> None:
    zero = torch.zeros((), dtype=torch.float64)
    image = torch.zeros(batch, 4, dtype=torch.float64)
    assert sigmoid(image, image, zero, zero).item() == pytest.approx(batch * math.log(2), rel=1e-12)


def test_sigmoid_closed_form_at_siglips_start() -> None:
    """Orthogonal pairs at scale 10 and bias -10: right logits 0, wrong ones -10."""
    eye = torch.eye(5, dtype=torch.float64)
    value = sigmoid(eye, eye, torch.tensor(math.log(10.0), dtype=torch.float64), torch.tensor(-10.0, dtype=torch.float64))
    assert value.item() == pytest.approx(math.log(2) + 4 * math.log1p(math.exp(-10)), abs=1e-12)


# ----------------------------------------------------------------------------------------------------- tiles against the plain
# one

LOSSES = ("info_nce", "sigmoid")


def value_and_gradients(loss: str, image: torch.Tensor, text: torch.Tensor, log_scale: float, **options: object) -> list:
    dtype = torch.promote_types(image.dtype, torch.float32)
    inputs = [image, text, torch.tensor(log_scale, dtype=dtype)]
    if loss == "sigmoid":
        inputs.append(torch.tensor(-7.0, dtype=dtype))
    if options.get("negatives") is not None:
        inputs.append(options.pop("negatives"))
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    bare = 4 if loss == "sigmoid" else 3
    negatives = inputs[bare] if len(inputs) > bare else None
    value = (sigmoid if loss == "sigmoid" else info_nce)(*inputs[:bare], negatives=negatives, **options)
    return [value, *torch.autograd.grad(value, inputs)]


@pytest.mark.parametrize("loss", LOSSES)
@settings(max_examples=120, deadline=None)
@given(
    batch=st.integers(1, 17),
    width=st.integers(1, 9),
    tile=st.integers(1, 20),
    captions=st.integers(1, 3),
    num_negatives=st.integers(0, 7),
    log_scale=st.sampled_from([-3.0, 0.0, 2.66, math.log(100.0), 6.0]),
    ids=st.sampled_from([None, 1, 3, 30]),
    weighted=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.1, 0.9]),
    alike=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_tiles_equal_the_plain_version(
    loss: str,
    batch: int,
    width: int,
    tile: int,
    captions: int,
    num_negatives: int,
    log_scale: float,
    ids: int | None,
    weighted: bool,
    smoothing: float,
    alike: bool,
    seed: int,
) -> None:
    """Any batch, tile and width, repeated texts and pictures, several captions, negatives, weights, smoothing: 1e-12 in
    float64.
    """
    g = torch.Generator().manual_seed(seed)
    image = unit(1, width, seed).expand(batch, -1) if alike else unit(batch, width, seed)
    text = unit(batch * captions, width, seed + 1)
    options: dict[str, object] = {}
    shape: tuple[int, ...] = (batch,)
    if captions > 1:
        text, shape = text.unflatten(0, (batch, captions)), (batch, captions)
    if ids is not None:
        options["keys"] = duplicate_keys(torch.randint(ids, shape, generator=g), torch.randint(ids, (batch,), generator=g))
    if weighted:
        options["weights"] = 0.1 + torch.rand(batch, generator=g, dtype=torch.float64)
    if loss == "info_nce":
        options["label_smoothing"] = smoothing
    negatives = {"negatives": unit(num_negatives, width, seed + 2)} if num_negatives else {}
    plain = value_and_gradients(loss, image, text, log_scale, tile=0, **options, **negatives)
    tiled = value_and_gradients(loss, image, text, log_scale, tile=tile, **options, **negatives)
    unit_of = 1e-12 * max(1.0, math.exp(log_scale) / 100)  # logits above 100 have coarser steps
    for expected, found in zip(plain, tiled, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=unit_of)


@pytest.mark.parametrize("loss", LOSSES)
def test_size_chooses_and_both_ways_agree(loss: str) -> None:
    """At the size where None changes from plain to tiles, in float32."""
    rows = math.isqrt(PLAIN_PAIRS)
    for batch in (rows, rows + 1):
        image, text = unit(batch, 16).float(), unit(batch, 16, seed=1).float()
        chosen, plain = (value_and_gradients(loss, image, text, 2.66, tile=tile) for tile in (None, 0))
        for expected, found in zip(plain, chosen, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_is_summed_in_float32(loss: str, dtype: torch.dtype) -> None:
    """The value is that of the same numbers in float32; in float16 logits of 70,000 would be infinite."""
    image, text = unit(40, 8).to(dtype), unit(40, 8, seed=1).to(dtype)
    for log_scale in (math.log(100.0), math.log(70_000.0)):
        wide = value_and_gradients(loss, image.float(), text.float(), log_scale, tile=16)
        low = value_and_gradients(loss, image, text, log_scale, tile=16)
        assert low[0].dtype is torch.float32
        torch.testing.assert_close(low[0], wide[0], rtol=0, atol=0)
        assert low[1].dtype is dtype
        for expected, found in zip(wide[1:], low[1:], strict=True):
            torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-6, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_where_one_exponential_would_underflow_two_are_taken(loss: str) -> None:
    """Rows whose best logits lie 190 apart in one tile: float32 against float64."""
    image, text = unit(32, 4), unit(32, 4, seed=1)
    image[::2] = text[::2] = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    image[1::2] = -image[0] + 0.05 * image[1::2]
    exact = value_and_gradients(loss, image, text, math.log(100.0), tile=0)
    low = value_and_gradients(loss, image.float(), text.float(), math.log(100.0), tile=8)
    for expected, found in zip(exact, low, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_memory_does_not_grow_with_the_square(loss: str) -> None:
    """At 6,000 pairs the matrix alone has 144 MB; nothing that the tiled version makes is larger than a tile or the features."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            made = function(*args, **(kwargs or {}))
            for tensor in made if isinstance(made, tuple | list) else (made,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return made

    image, text = unit(6_000, 4).float(), unit(6_000, 4, seed=1).float()
    with Watch():
        value_and_gradients(loss, image, text, 2.66)
    assert largest <= 512 * 512


@pytest.mark.parametrize("loss", LOSSES)
def test_higher_derivatives_are_a_clear_error_in_tiles(loss: str) -> None:
    image, text = unit(4).requires_grad_(), unit(4, seed=1)
    bias = () if loss == "info_nce" else (torch.tensor(-10.0, dtype=torch.float64),)
    value = (info_nce if loss == "info_nce" else sigmoid)(image, text, SCALE, *bias, tile=2)
    with pytest.raises(RuntimeError, match=r"no higher derivatives: pass tile=0"):
        torch.autograd.grad(value, image, create_graph=True)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_factor_from_above_and_a_second_backward_pass(loss: str) -> None:
    """What the first backward pass scales or hands on is not used up by it."""
    found = []
    for tile in (0, 3):
        inputs = [unit(7), unit(7, seed=1), torch.tensor(2.0, dtype=torch.float64)]
        inputs += [torch.tensor(-3.0, dtype=torch.float64)] if loss == "sigmoid" else []
        inputs = [tensor.requires_grad_() for tensor in inputs]
        value = -3.0 * (sigmoid if loss == "sigmoid" else info_nce)(*inputs, tile=tile)
        found.append([torch.autograd.grad(value, inputs, retain_graph=True), torch.autograd.grad(value, inputs)])
    for passes in found:
        for expected, gradient in zip(found[0][0] * 2, passes[0] + passes[1], strict=True):
            torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_bad_input_is_a_clear_error() -> None:
    image, text = unit(4), unit(4, seed=1)
    for arguments, message in (
        ((image, unit(4, 7)), r"\[4, 8\] and text \[4, 7\].*same B and D|\(4, 8\) and text \(4, 7\)"),
        ((image, unit(5)), r"\(4, 8\) and text \(5, 8\)"),
        ((image.long(), text), r"floating point"),
    ):
        with pytest.raises(ValueError, match=message):
            info_nce(*arguments, SCALE)
        with pytest.raises(ValueError, match=message):
            sigmoid(*arguments, SCALE, SCALE)
    with pytest.raises(ValueError, match=r"keys are .* need \[K, 4\]"):
        info_nce(image, text, SCALE, keys=(torch.zeros(1, 3), torch.zeros(1, 4)))
    for tile in (0, 2):
        with pytest.raises(ValueError, match="no text of the batch is right for image 2"):
            info_nce(image, text, SCALE, keys=(torch.arange(4)[None], torch.tensor([[0, 1, 1, 3]])), tile=tile)
    with pytest.raises(ValueError, match=r"negatives are \(3, 7\).*\[M, 8\]"):
        info_nce(image, text, SCALE, negatives=unit(3, 7))
    with pytest.raises(ValueError, match=r"weights are \(3,\)"):
        info_nce(image, text, SCALE, weights=torch.ones(3))
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 1\), got 1"):
        info_nce(image, text, SCALE, label_smoothing=1.0)
    with pytest.raises(ValueError, match="tile is the side of a tile"):
        info_nce(image, text, SCALE, tile=-1)
