"""Llip's loss: tiles against the definition, the definition against loops, what one token must give."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from wordsight.losses import llip
from wordsight.losses.contrastive import duplicate_keys, sigmoid
from wordsight.losses.llip import mixture_scores, mixture_sigmoid, mixture_similarities


def draw(pictures: int, texts: int, tokens: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """image [B, K, 2 D], text [T, 2 D] with features of length 1, output [D, D]; float64."""
    g = torch.Generator().manual_seed(seed)
    image = torch.randn(pictures, tokens, 2 * width, generator=g, dtype=torch.float64)
    query, feature = torch.randn(2, texts, width, generator=g, dtype=torch.float64)
    output = torch.randn(width, width, generator=g, dtype=torch.float64) / width**0.5
    return image, torch.cat([query, F.normalize(feature, dim=-1)], dim=-1), output


def by_loops(image: torch.Tensor, text: torch.Tensor, output: torch.Tensor, heads: int) -> torch.Tensor:
    """Sections 3.2 and 3.3, one pair and head at a time."""
    width = len(output)
    each = width // heads
    found = torch.zeros(len(image), len(text), dtype=torch.float64)
    for i, tokens in enumerate(image):
        for j, words in enumerate(text):
            mixed = []
            for h in range(heads):
                part = slice(h * each, (h + 1) * each)
                keys, values = tokens[:, :width][:, part], tokens[:, width:][:, part]
                scores = [math.exp(float(key @ words[:width][part])) for key in keys]
                mixed.append(sum(score * value for score, value in zip(scores, values, strict=True)) / sum(scores))
            vector = torch.cat(mixed) @ output
            found[i, j] = vector @ words[width:] / vector.norm()
    return found


@pytest.mark.parametrize(("tokens", "heads"), [(1, 1), (1, 3), (4, 1), (4, 2), (5, 6)])
def test_similarities_are_the_papers(tokens: int, heads: int) -> None:
    image, text, output = draw(3, 4, tokens, 6)
    expected = by_loops(image, text, output, heads)
    torch.testing.assert_close(mixture_similarities(image, text, output, heads), expected, rtol=0, atol=1e-12)
    for by_gram in (False, True):
        found = mixture_scores(image, text, output, heads, by_gram=by_gram)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_the_cheaper_way_depends_on_the_number_of_texts() -> None:
    assert not llip.gram_pays(256, 512, 100)
    assert llip.gram_pays(256, 512, 1_000)
    assert not llip.gram_pays(512, 512, 10**9)


def test_one_token_is_siglip() -> None:
    """With K = 1 every text sees the same vector: SigLIP's loss, value and gradients."""
    image, text, output = draw(7, 7, 1, 6)
    scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (2.3, -10.0))
    image.requires_grad_()
    vectors = F.normalize(image[:, 0, 6:] @ output, dim=-1)
    expected = sigmoid(vectors, text[:, 6:], scale, bias)
    right = torch.autograd.grad(expected, [image, scale, bias])
    for tile in (0, 3, None):
        found = mixture_sigmoid(image, text, output, scale, bias, num_heads=3, tile=tile)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        for a, b in zip(torch.autograd.grad(found, [image, scale, bias]), right, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_equal_queries_are_siglip_too_and_others_are_not() -> None:
    image, text, output = draw(5, 5, 4, 6)
    same = torch.cat([text[:1, :6].expand(5, 6), text[:, 6:]], dim=1)
    seen = mixture_similarities(image, torch.cat([same[:, :6], torch.eye(6, dtype=torch.float64)[:5]], dim=1), output, 2)
    vectors = torch.cat(
        [seen, mixture_similarities(image, torch.cat([same[:1, :6], torch.eye(6).double()[5:]], dim=1), output, 2)], 1
    )
    torch.testing.assert_close(mixture_similarities(image, same, output, 2), vectors @ same[:, 6:].T, rtol=0, atol=1e-12)
    assert (mixture_similarities(image, text, output, 2) - vectors @ text[:, 6:].T).abs().max() > 0.05


def value_and_gradients(tile: int | None, inputs: list[torch.Tensor], num_right: int, shape: tuple[int, ...], **options) -> list:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    image, text, output, scale, bias = leaves
    own, negatives = text[:num_right], text[num_right:]
    value = mixture_sigmoid(
        image, own.unflatten(0, shape), output, scale, bias, tile=tile, negatives=negatives if len(negatives) else None, **options
    )
    return [value, *torch.autograd.grad(value, leaves)]


@settings(max_examples=120, deadline=None)
@given(
    batch=st.integers(1, 9),
    tokens=st.integers(1, 5),
    heads=st.integers(1, 3),
    each=st.integers(1, 4),
    tile=st.one_of(st.none(), st.integers(1, 12)),
    captions=st.integers(1, 3),
    num_negatives=st.integers(0, 5),
    ids=st.sampled_from([None, 1, 3, 30]),
    weighted=st.booleans(),
    log_scale=st.sampled_from([-2.0, 2.3, math.log(100.0)]),
    seed=st.integers(0, 10_000),
)
def test_tiles_equal_the_definition(
    batch: int,
    tokens: int,
    heads: int,
    each: int,
    tile: int | None,
    captions: int,
    num_negatives: int,
    ids: int | None,
    weighted: bool,
    log_scale: float,
    seed: int,
) -> None:
    """Value and every gradient (pictures, texts, output, scale, bias) to 1e-12 in float64."""
    g = torch.Generator().manual_seed(seed)
    image, text, output = draw(batch, batch * captions + num_negatives, tokens, heads * each, seed)
    scale, bias = torch.tensor(log_scale, dtype=torch.float64), torch.tensor(-7.0, dtype=torch.float64)
    shape = (batch,) if captions == 1 else (batch, captions)
    options: dict[str, object] = {"num_heads": heads}
    if ids is not None:
        options["keys"] = duplicate_keys(torch.randint(ids, shape, generator=g), torch.randint(ids, (batch,), generator=g))
    if weighted:
        options["weights"] = 0.1 + torch.rand(batch, generator=g, dtype=torch.float64)
    inputs = [image, text, output, scale, bias]
    plain = value_and_gradients(0, inputs, batch * captions, shape, **options)
    tiled = value_and_gradients(tile, inputs, batch * captions, shape, **options)
    largest = max(gradient.abs().max().item() for gradient in plain[1:])  # near-cancelling mixtures have steep gradients
    for expected, found in zip(plain, tiled, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12 * max(1.0, largest))


@pytest.mark.parametrize("by_gram", [False, True])
def test_both_ways_to_the_lengths_equal_the_definition(by_gram: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llip, "gram_pays", lambda *_: by_gram)
    image, text, output = draw(11, 11, 4, 12)
    inputs = [image, text, output, torch.tensor(2.3, dtype=torch.float64), torch.tensor(-10.0, dtype=torch.float64)]
    plain = value_and_gradients(0, inputs, 11, (11,), num_heads=3)
    for tile in (1, 4, 11, None):
        for expected, found in zip(plain, value_and_gradients(tile, inputs, 11, (11,), num_heads=3), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_gradients_are_right() -> None:
    inputs = [*draw(3, 3, 2, 4), torch.tensor(1.0, dtype=torch.float64), torch.tensor(-1.0, dtype=torch.float64)]
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(lambda *v: mixture_sigmoid(*v, num_heads=2, tile=2), inputs)
    assert torch.autograd.gradgradcheck(lambda *v: mixture_sigmoid(*v, num_heads=2, tile=0), inputs)


def test_memory_does_not_grow_with_the_square() -> None:
    """At 500 pairs the weights alone have 500^2 x 16 = 4 million numbers; no tensor of the tiles has more than a fourth."""
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

    inputs = [tensor.float() for tensor in (*draw(500, 500, 8, 8), torch.tensor(2.3), torch.tensor(-10.0))]
    with Watch():
        value_and_gradients(None, inputs, 500, (500,), num_heads=2)
    assert largest <= llip.TILE_NUMBERS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_under_autocast_too(dtype: torch.dtype) -> None:
    image, text, output = (tensor.to(dtype) for tensor in draw(9, 9, 3, 8))
    scalars = [torch.tensor(math.log(100.0)), torch.tensor(-10.0)]
    wide = value_and_gradients(4, [image.float(), text.float(), output.float(), *scalars], 9, (9,), num_heads=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = value_and_gradients(4, [image, text, output, *scalars], 9, (9,), num_heads=2)
    assert low[0].dtype is torch.float32
    assert low[1].dtype is dtype
    for expected, found in zip(wide, low, strict=True):
        torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-6, atol=0)


def test_all_weights_zero_is_no_loss_and_no_gradient() -> None:
    image, text, output = draw(4, 4, 3, 6)
    inputs = [image, text, output, torch.tensor(1.0, dtype=torch.float64), torch.tensor(-1.0, dtype=torch.float64)]
    found = value_and_gradients(2, inputs, 4, (4,), num_heads=2, weights=torch.zeros(4))
    assert all(not tensor.any() for tensor in found)


def test_bad_input_is_a_clear_error() -> None:
    image, text, output = draw(4, 4, 3, 6)
    scalars = torch.tensor(1.0), torch.tensor(-1.0)
    for wrong, message in (
        ((image[:, :, :-1], text, output), r"image is \(4, 3, 11\).*they must be \[B, K, 2 D\]"),
        ((image, text[:3], output), r"text \(3, 12\).*same B and D"),
        ((image[:, 0], text, output), r"image is \(4, 12\)"),
        ((image, text, output[:5]), r"output is \(5, 6\): it must be \[D, D\]"),
        ((image[:, :0], text, output), r"at least 1 token"),
        ((image.long(), text, output), r"floating point"),
    ):
        with pytest.raises(ValueError, match=message):
            mixture_sigmoid(*wrong, *scalars, num_heads=2)
    with pytest.raises(ValueError, match=r"4 heads must divide D"):
        mixture_sigmoid(image, text, output, *scalars, num_heads=4)
    with pytest.raises(ValueError, match=r"negatives are \(2, 3\), they must be \[M, 12\]"):
        mixture_sigmoid(image, text, output, *scalars, num_heads=2, negatives=torch.zeros(2, 3))
    value = mixture_sigmoid(image.requires_grad_(), text, output, *scalars, num_heads=2)
    with pytest.raises(RuntimeError, match=r"no higher derivatives: pass tile=0"):
        torch.autograd.grad(value, image, create_graph=True)
