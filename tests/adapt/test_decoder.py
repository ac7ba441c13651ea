"""The decoder is the published one, learns the same from kept tokens as from the tower, and each loss does what it is for."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.utils.estimator_checks import check_estimator
from torch.nn.functional import normalize

import wordsight
from wordsight.adapt.decoder import Decoder
from wordsight.adapt.estimator import load_classifier
from wordsight.adapt.features import ImageFeatures
from wordsight.adapt.imbalanced import LOSSES, Schedule, draw_rows, step_loss, train
from wordsight.adapt.token_cache import cache_tokens, tower_tokens
from wordsight.adapt.zero_shot import ZeroShot
from wordsight.nn.convnet import ConvNet, ConvNetConfig
from wordsight.nn.decoder import CosineHead, DecoderConfig, TokenDecoder, read_out

LABELS = ["cat", "dog", "eel"] * 4
FAST = {"steps": 12, "batch_size": 8, "num_heads": 2}


def pictures(count: int = 12) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (40, 36, 3), dtype=np.uint8)) for _ in range(count)]


def create(name: str = "clip-tiny") -> torch.nn.Module:
    torch.manual_seed(0)
    model = wordsight.create(name)
    if model.tokenizer is None:  # of published vocabularies, which are not at hand
        model.tokenize = lambda texts: torch.tensor([[*map(ord, text[-16:]), *[0] * 16][:16] for text in texts])
    return model


def skewed(counts: tuple[int, ...] = (200, 20, 5), seed: int = 0) -> tuple[torch.Tensor, list[str]]:
    """Tokens [N, 3, 8] of overlapping Gaussian classes, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    centres = torch.eye(8)[: len(counts)] * 2.2
    return centres[targets][:, None] + torch.randn(len(targets), 3, 8, generator=generator), [f"c{t}" for t in targets.tolist()]


# The module


@pytest.mark.parametrize(("width", "millions"), [(1024, 15.8), (768, 8.9)])
def test_published_number_of_parameters_is_without_the_head(width: int, millions: float) -> None:
    """15.8M for L/14 and 8.9M for B/16 are the three blocks; ImageNet-LT's head adds 1.0 and .8."""
    with torch.device("meta"):
        decoder = TokenDecoder(DecoderConfig(width=width, num_classes=1000))
    blocks = sum(parameter.numel() for parameter in decoder.blocks.parameters())
    assert blocks == 3 * (5 * width**2 + 19 * width // 2)
    assert round(blocks / 1e6, 1) == millions
    assert sum(parameter.numel() for parameter in decoder.parameters()) == blocks + 1000 * (width + 1)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("class_token", [True, False])
def test_values_and_gradients_are_those_of_whole_blocks(class_token: bool, num_layers: int) -> None:
    torch.manual_seed(num_layers)
    decoder = TokenDecoder(DecoderConfig(width=16, num_classes=5, class_token=class_token, num_layers=num_layers)).double()
    with torch.no_grad():  # biases and norms away from the 0 and 1 that they start from
        for parameter in decoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    tokens = torch.randn(3, 7, 16, dtype=torch.float64, requires_grad=True)
    first = tokens if class_token else torch.cat([tokens.mean(1, keepdim=True), tokens], 1)
    features = decoder.blocks.forward_tokens(first)[:, 0]
    expected = features @ decoder.head.weight.T + decoder.head.bias
    torch.testing.assert_close(decoder.features(tokens), features, rtol=0, atol=1e-12)
    torch.testing.assert_close(decoder(tokens), expected, rtol=0, atol=1e-12)
    wanted = [tokens, *decoder.parameters()]
    found, gradients = (torch.autograd.grad((logits**3).sum(), wanted) for logits in (decoder(tokens), expected))
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12 * max(1.0, float(other.abs().max())))


def test_no_layers_read_the_first_token() -> None:
    tokens = torch.randn(3, 7, 16)
    for class_token, expected in ((True, tokens[:, 0]), (False, tokens.mean(1))):
        decoder = TokenDecoder(DecoderConfig(width=16, num_classes=2, class_token=class_token, num_layers=0))
        torch.testing.assert_close(decoder.features(tokens), expected)


def test_cosine_head_knows_no_lengths() -> None:
    head, features = CosineHead(8, 3, 25.0), torch.randn(4, 8)
    logits = head(features)
    cosines = torch.nn.functional.cosine_similarity(features[:, None], head.weight[None], dim=2)
    torch.testing.assert_close(logits, 25 * cosines)
    with torch.no_grad():
        head.weight.mul_(torch.tensor([[0.1], [3.0], [7.0]]))
    torch.testing.assert_close(head(features * 5), logits)


# Training


def test_learning_rate_is_the_published_one() -> None:
    schedule = Schedule()
    assert schedule.rate(0) == pytest.approx(0.03 / 513)
    assert schedule.rate(512) == 0.03
    assert schedule.rate(512 + 3840) == pytest.approx(0.03 * math.cos(7 * math.pi / 32))
    assert schedule.rate(8191) == pytest.approx(0.03 * math.cos(7 * math.pi / 16), rel=1e-2)
    assert Schedule(steps=10, warmup_steps=0).rate(0) == 0.03


def test_matrices_decay_and_vectors_do_not() -> None:
    module = torch.nn.Linear(3, 2)
    weight, bias = module.weight.detach().clone(), module.bias.detach().clone()
    schedule = Schedule(steps=1, batch_size=2, learning_rate=0.5, weight_decay=0.1, warmup_steps=0)
    train(
        module, lambda rows, views: torch.zeros(2, 3), torch.zeros(4, dtype=torch.int64), lambda z, y, w, s: 0 * z.sum(), schedule
    )
    # Nesterov's first step is lr (1 + momentum) g
    torch.testing.assert_close(module.weight, weight * (1 - 0.5 * 1.9 * 0.1))
    assert torch.equal(module.bias, bias)


def test_instance_sampling_takes_each_picture_equally_often() -> None:
    targets = torch.tensor([0, 0, 0, 0, 0, 1, 1])
    drawn = list(draw_rows(targets, 3, Schedule(steps=7, batch_size=4)))
    assert np.bincount(np.concatenate([rows for rows, _ in drawn])).tolist() == [4] * 7
    assert set(np.concatenate([views for _, views in drawn]).tolist()) == {0, 1, 2}
    again, other = (list(draw_rows(targets, 3, Schedule(steps=7, batch_size=4, seed=s))) for s in (0, 1))
    assert all(np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1]) for a, b in zip(drawn, again, strict=True))
    assert any(not np.array_equal(a[0], b[0]) for a, b in zip(drawn, other, strict=True))
    assert next(draw_rows(targets, 0, Schedule()))[1] is None


def test_class_balanced_sampling_takes_each_class_equally_often() -> None:
    targets = torch.tensor([3] * 90 + [0] * 9 + [1])
    rows = np.concatenate(
        [rows for rows, _ in draw_rows(targets, 0, Schedule(steps=30, batch_size=100, sampling="class_balanced"))]
    )
    shares = np.bincount(targets.numpy()[rows], minlength=4) / len(rows)
    assert shares[2] == 0
    assert np.allclose(shares[[0, 1, 3]], 1 / 3, atol=0.04)
    assert len(set(rows.tolist())) == 100


@pytest.mark.parametrize("name", ["clip-tiny", "align-tiny"])
def test_learning_from_the_cache_equals_learning_through_the_tower(name: str, tmp_path: Path) -> None:
    model = create(name)
    kept = cache_tokens(model, pictures(), tmp_path, num_views=2, kind="float32")
    through = tower_tokens(model, pictures(), num_views=2)
    a, b = (Decoder(model, **FAST).fit(tokens, LABELS) for tokens in (kept, through))
    start = Decoder(model, **{**FAST, "steps": 0}).fit(kept, LABELS).decoder_.state_dict()
    moved = 0.0
    for (key, value), other in zip(a.decoder_.state_dict().items(), b.decoder_.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-6, msg=key)
        moved = max(moved, float((value - start[key]).abs().max()))
    assert moved > 1e-3
    torch.testing.assert_close(a.logits(pictures()), a.logits(kept), rtol=1e-5, atol=1e-5)


def test_pictures_are_put_through_the_tower_once(tmp_path: Path) -> None:
    model = create()
    given = Decoder(model, num_views=2, cache=str(tmp_path), token_kind="float32", seed=3, **FAST).fit(pictures(), LABELS)
    assert list(tmp_path.glob("*.features"))
    meantime = Decoder(model, num_views=2, token_kind="float32", seed=3, **FAST).fit(pictures(), LABELS)
    tokens = cache_tokens(model, pictures(), tmp_path, num_views=2, seed=3, kind="float32")
    handed = Decoder(model, seed=3, **FAST).fit(tokens, LABELS)
    for other in (meantime, handed):
        assert all(torch.equal(x, y) for x, y in zip(given.decoder_.parameters(), other.decoder_.parameters(), strict=True))
    some = tokens.take([5, 1])
    torch.testing.assert_close(handed.logits(some), handed.logits(tokens)[[5, 1]])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("head", [None, "cosine"])
def test_every_loss_learns(loss: str, head: str | None) -> None:
    tokens, labels = skewed((40, 20, 20))
    decoder = Decoder(loss=loss, head=head, steps=60, batch_size=32, num_layers=1).fit(tokens * 2, labels)
    assert decoder.score(tokens * 2, labels) > 0.85
    assert decoder.decoder_.config.head == ("cosine" if loss == "ldam" or head else "linear")
    proba = decoder.predict_proba(tokens)
    assert np.allclose(proba.sum(1), 1)


def test_balancing_helps_the_tail() -> None:
    tokens, labels = skewed()
    test, truth = skewed((100, 100, 100), seed=1)
    tail = np.array(truth) == "c2"
    options = {"steps": 150, "batch_size": 64, "num_layers": 0}
    recall = {
        (loss, sampling): (Decoder(loss=loss, sampling=sampling, **options).fit(tokens, labels).predict(test) == truth)[
            tail
        ].mean()
        for loss, sampling in [
            ("cross_entropy", "instance"),
            ("balanced_softmax", "instance"),
            ("logit_adjustment", "instance"),
            ("grw", "instance"),
            ("cross_entropy", "class_balanced"),
        ]
    }
    plain = recall.pop(("cross_entropy", "instance"))
    assert min(recall.values()) > plain + 0.1, (plain, recall)


def test_bfloat16_learns_nearly_the_same() -> None:
    tokens, labels = skewed((40, 20, 20))
    options = {"steps": 20, "batch_size": 32, "num_layers": 2}
    whole, short = (Decoder(precision=p, **options).fit(tokens, labels) for p in ("float32", "bfloat16"))
    assert all(value.dtype == torch.float32 for value in short.decoder_.parameters())
    difference = (whole.logits(tokens) - short.logits(tokens)).norm() / whole.logits(tokens).norm()
    assert 1e-5 < difference < 0.05


def test_ldam_has_its_scale_and_defers_its_weights() -> None:
    counts = torch.tensor([1000.0, 10.0])
    loss = step_loss("ldam", counts, steps=10, head_scale=30.0)
    cosines, targets = torch.tensor([[0.3, 0.1], [0.2, 0.6]]), torch.tensor([0, 1])
    margins = 0.5 * torch.tensor([100**-0.25, 1.0])
    z = 30 * cosines
    wrong = torch.stack([z[0, 1], z[1, 0]]) - (torch.stack([z[0, 0], z[1, 1]]) - 30 * margins)
    each = wrong.exp().log1p()
    torch.testing.assert_close(loss(z, targets, None, 7), each.mean())
    share = torch.tensor([(1 - 0.9999) / (1 - 0.9999**n) for n in (1000, 10)])
    torch.testing.assert_close(loss(z, targets, None, 8), (each * share).sum() / share.sum())


def test_weights_count_pictures() -> None:
    tokens, labels = skewed((30, 30, 30))
    labels = np.array(labels)
    wrong = labels.copy()
    wrong[:30:2] = "c1"
    weight = np.where(wrong == labels, 1.0, 0.0)
    options = {"steps": 80, "batch_size": 32, "num_layers": 0, "learning_rate": 0.1}
    decoder = Decoder(**options).fit(tokens, wrong, sample_weight=weight)
    assert decoder.counts_.tolist() == [15, 30, 30]
    assert decoder.score(tokens[:30], labels[:30]) > Decoder(**options).fit(tokens, wrong).score(tokens[:30], labels[:30]) + 0.1
    for bad in (weight[1:], np.full(90, np.nan), -weight, 0 * weight):
        with pytest.raises(ValueError, match="sample_weight must be"):
            decoder.fit(tokens, wrong, sample_weight=bad)


# A start from text


@pytest.mark.parametrize("name", ["clip-tiny", "align-tiny", "lit-tiny"])
def test_start_from_text_is_zero_shot(name: str) -> None:
    model, classes = create(name), ["cat", "dog", "eel"]
    with torch.no_grad():  # as far apart as trained towers' are
        for parameter in model.image_tower.parameters():
            parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    start = Decoder(model, init="text", head="linear", steps=0).fit(pictures(), LABELS)
    zero_shot = ZeroShot(model, classes).fit()
    assert np.array_equal(start.predict(pictures()), zero_shot.predict(pictures()))
    logits, expected = start.logits(pictures()), zero_shot.logits(pictures())
    # but for the embeddings' lengths, which a linear head takes as one
    torch.testing.assert_close(normalize(logits), normalize(expected), rtol=1e-3, atol=1e-3)
    assert 0.5 < float(logits.norm() / expected.norm()) < 2
    cosine = Decoder(model, init="text", steps=0).fit(pictures(), LABELS)
    rows = normalize(zero_shot.class_vectors_ @ read_out(model.image_tower)[1].T)
    torch.testing.assert_close(normalize(cosine.decoder_.head.weight), rows, rtol=1e-4, atol=1e-5)
    trained = Decoder(model, init="text", **FAST).fit(pictures(), LABELS)
    assert not torch.equal(trained.decoder_.blocks[0].mlp.fc2.weight, start.decoder_.blocks[0].mlp.fc2.weight)


def test_read_out_of_a_convnet_is_its_own() -> None:
    tower = ConvNet(ConvNetConfig(image_size_px=16, pool="mean"), 12)
    for _ in range(3):
        tower(torch.randn(8, 3, 16, 16))
    pixels = torch.randn(4, 3, 16, 16)
    norm, matrix, offset = read_out(tower.eval())
    assert norm is None
    with torch.no_grad():
        torch.testing.assert_close(tower.forward_tokens(pixels).mean(1) @ matrix + offset, tower(pixels), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["clip-quickstart", "clip-tiny-resnet"])
def test_read_out_stands_in_for_pools_by_place(name: str) -> None:
    """Exact where every place looks alike."""
    tower = create(name).eval().image_tower
    config = tower.config
    if name == "clip-tiny-resnet":  # the positions that its pool adds are of no place's content
        torch.nn.init.zeros_(tower.attnpool.position_embedding)
    channels = config.widths[-1] if isinstance(config, ConvNetConfig) else 32 * config.width
    alike = torch.randn(3, channels, 1, 1).expand(-1, -1, *config.grid)
    tower.forward_map = lambda pixels: alike
    _, matrix, offset = read_out(tower)
    with torch.no_grad():
        torch.testing.assert_close(alike.mean((2, 3)) @ matrix + offset, tower(alike), rtol=1e-4, atol=1e-5)


def test_towers_without_a_matrix_are_named() -> None:
    with pytest.raises(ValueError, match=r"no matrix takes the tokens of this VisionTransformer .* use init='random'"):
        Decoder(create("siglip-tiny"), init="text", **FAST).fit(pictures(), LABELS)


# The contract


@pytest.mark.parametrize("options", [{}, {"init": "text"}, {"num_layers": 0, "loss": "ldam"}])
def test_save_and_load(options: dict[str, object], tmp_path: Path) -> None:
    model = create()
    decoder = Decoder(model, ["eel", "cat", "dog"], cache=tmp_path / "cache", **{**FAST, **options}).fit(pictures(), LABELS)  # type: ignore[arg-type]
    decoder.save(tmp_path / "saved", with_model=not options)
    loaded = load_classifier(tmp_path / "saved", model if options else None)
    assert torch.equal(loaded.logits(pictures()), decoder.logits(pictures()))
    assert loaded.classes_.tolist() == ["cat", "dog", "eel"]
    assert loaded.second_stage_ == "none"
    assert torch.equal(loaded.counts_, decoder.counts_)


def test_scikit_learns_contract() -> None:
    # weights weigh the loss of rows that are drawn at random, so that a weight of 2 is not bit by bit what a picture twice is
    known = "check_sample_weight_equivalence_on_dense_data"
    decoder = Decoder(num_layers=0, steps=40, batch_size=32, learning_rate=0.3)
    results = check_estimator(decoder, on_skip=None, expected_failed_checks={known: "rows are drawn"})
    assert [result["check_name"] for result in results if result["status"] == "xfail"] == [known]


def test_clone_and_pickle() -> None:
    tokens, labels = skewed((20, 20))
    decoder = Decoder(steps=5, batch_size=8).fit(tokens, labels)
    again = clone(decoder).fit(tokens, labels)
    assert torch.equal(again.logits(tokens), decoder.logits(tokens))
    assert torch.equal(pickle.loads(pickle.dumps(decoder)).logits(tokens), decoder.logits(tokens))
    assert not torch.equal(clone(decoder).set_params(seed=1).fit(tokens, labels).logits(tokens), decoder.logits(tokens))


def test_drawing_weights_leaves_the_random_state_alone() -> None:
    tokens, labels = skewed((20, 20))
    state = torch.get_rng_state()
    Decoder(steps=2, batch_size=8).fit(tokens, labels)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "hinge"}, "loss must be one of cross_entropy, .*, got 'hinge'"),
        ({"loss": "ldam", "head": "linear"}, "margins between cosines: use head='cosine'"),
        ({"head": "mlp"}, "head must be one of linear, cosine, or None, got 'mlp'"),
        ({"init": "zero"}, "init must be one of random, text, got 'zero'"),
        ({"init": "text"}, "init='text' needs a model"),
        ({"num_heads": 3}, "num_heads must divide the tokens' width 8, got 3"),
        ({"num_layers": -1}, "num_layers must be at least 0, got -1"),
        ({"mlp_ratio": 0.0}, "mlp_ratio must give a width of at least 1"),
        ({"steps": -1}, "steps must be at least 0, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be a number above 0"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\), got 1.0"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
        ({"warmup_steps": 12}, "warmup_steps must be 0 to 11 with steps=12, got 12"),
        ({"sampling": "root"}, "sampling must be one of instance, class_balanced, got 'root'"),
        ({"precision": "float16"}, "precision must be one of float32, bfloat16, got 'float16'"),
        ({"num_views": 2}, "X has 0 views, num_views=2 are asked for"),
        ({"num_views": -1}, "num_views must be at least 0, got -1"),
        ({"token_kind": "int4"}, "token_kind must be one of float16, int8, float32, got 'int4'"),
        ({"loss": "focal", "gamma": -1.0}, "gamma must be"),
        ({"learning_rate": 1e30}, "the loss is (nan|inf) at step .* use a lower learning_rate than 1e\\+30"),
    ],
)
def test_bad_settings_are_named(options: dict[str, object], message: str) -> None:
    tokens, labels = skewed((10, 10))
    with pytest.raises(ValueError, match=message):
        Decoder(**{**FAST, **options}).fit(tokens, labels)  # type: ignore[arg-type]


def test_bad_input_is_named(tmp_path: Path) -> None:
    tokens, labels = skewed((10, 10))
    model = create()
    kept = cache_tokens(model, pictures(), tmp_path)
    decoder = Decoder(model, **FAST).fit(kept, LABELS)
    other = create()
    with torch.no_grad():
        other.image_tower.position_embedding.add_(1)
    with pytest.raises(ValueError, match="these tokens are of another model, or of other preprocessing"):
        Decoder(other, **FAST).fit(kept, LABELS)
    with pytest.raises(ValueError, match="Decoder reads tokens, X holds projected features"):
        Decoder(**FAST).fit(ImageFeatures(torch.randn(4, 8)), ["a", "b"] * 2)
    with pytest.raises(ValueError, match="X has 12 pictures and y 11 labels"):
        Decoder(model, **FAST).fit(kept, LABELS[1:])
    with pytest.raises(ValueError, match="without a model takes tokens: give it one to look at pictures"):
        Decoder(**FAST).fit(pictures(), LABELS)
    with pytest.raises(ValueError, match="X has 8 features, but Decoder is expecting 32 features"):
        decoder.predict(tokens)
    with pytest.raises(ValueError, match="another kind of tower"):
        Decoder(**FAST).fit(kept, LABELS).predict(torch.randn(2, 3, 32))
    tokens[3, 1, 2] = np.nan
    with pytest.raises(ValueError, match="infinite or undefined"):
        Decoder(**FAST).fit(tokens, labels)
    with pytest.raises(ValueError, match="1 classes have no picture: 'fox'"):
        Decoder(model, ["cat", "dog", "eel", "fox"], **FAST).fit(kept, LABELS)
    with pytest.raises(ValueError, match="1 labels are not among the 2 classes: 'eel'"):
        Decoder(model, ["cat", "dog"], **FAST).fit(kept, LABELS)
    with pytest.raises(ValueError, match="picture vectors depend on the text"):
        Decoder(create("llip-tiny"), **FAST).fit(pictures(), LABELS)
