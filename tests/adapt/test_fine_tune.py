"""Fine-tuning starts as zero-shot, moves what it says and nothing else, never the user's model, and is what its equations say."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file
from sklearn.base import clone

import wordsight
from tests.adapt.make import colour_folders
from tests.adapt.test_decoder import LABELS, create, pictures
from wordsight.adapt import LIFT, FineTune, Projection, image_features, load_classifier
from wordsight.adapt.features import ImageFeatures
from wordsight.adapt.grid import GridRequest, run_grid
from wordsight.adapt.grid_methods import GROUPS, read_method
from wordsight.adapt.grid_methods import PARTS as GRID_PARTS
from wordsight.adapt.imbalanced import LOSSES
from wordsight.adapt.picture_reader import PictureReader
from wordsight.adapt.pictures import open_data
from wordsight.adapt.zero_shot import ZeroShot
from wordsight.cli.adapt import command as adapt_command
from wordsight.cli.predict import command as predict_command
from wordsight.data.long_tail import skew
from wordsight.nn.tuning import last_projection

CLASSES = ["cat", "dog", "eel"]
FAST: dict[str, Any] = {"epochs": 8, "batch_size": 12, "num_views": 0, "learning_rate": 3e-3, "weight_decay": 0.0}
PARTS = ("full", "last", "lora", "adaptformer")


@pytest.fixture(scope="module")
def model() -> Any:
    return create()


def weights(classifier: FineTune) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in classifier.tuned_.named_parameters()}


def colours(count: int = 12) -> list[Image.Image]:
    """Pictures whose classes, `LABELS`, are plain to see."""
    rng = np.random.default_rng(0)
    base = np.array([(220, 40, 40), (40, 220, 40), (40, 40, 220)])
    return [
        Image.fromarray((base[i % 3] + rng.integers(-30, 30, (40, 36, 3))).clip(0, 255).astype(np.uint8)) for i in range(count)
    ]


# The start


@pytest.mark.parametrize("head", ["cosine", "linear"])
@pytest.mark.parametrize("name", ["clip-tiny", "siglip-tiny", "lit-tiny", "align-tiny", "clip-tiny-resnet"])
def test_the_start_is_the_zero_shot_classifier(name: str, head: Any) -> None:
    model = create(name)
    expected = ZeroShot(model, CLASSES).fit().logits(pictures())
    for part in PARTS if name in ("clip-tiny", "siglip-tiny") else PARTS[:2]:
        start = FineTune(model, part=part, head=head, epochs=0).fit(pictures(), LABELS)
        torch.testing.assert_close(start.logits(pictures()), expected, rtol=1e-5, atol=1e-5)
        assert start.scale_ == pytest.approx(float(model.log_scale.detach().exp()))


def test_a_start_from_text_on_penultimate_features_goes_back_through_the_projection(model: Any) -> None:
    start = FineTune(model, reads="penultimate", epochs=0).fit(pictures(), LABELS)
    text = ZeroShot(model, CLASSES).fit().class_vectors_
    torch.testing.assert_close(start.tuned_.head.weight, text @ last_projection(model.image_tower)[0].T)
    assert start.scale_ == 25
    features = image_features(model, pictures(), layer="penultimate").plain
    expected = 25 * F.normalize(features, dim=1) @ F.normalize(start.tuned_.head.weight.detach(), dim=1).T
    torch.testing.assert_close(start.logits(pictures()), expected, rtol=1e-4, atol=1e-4)
    assert "tower.projection" not in start.tuned_.learned()  # it is not read


def test_a_random_start_is_drawn_by_the_seed(model: Any) -> None:
    state = torch.get_rng_state()
    one, same, other = (
        FineTune(model, init="random", head="linear", seed=seed, epochs=0).fit(pictures(), LABELS) for seed in (1, 1, 2)
    )
    assert torch.equal(one.tuned_.head.weight, same.tuned_.head.weight)
    assert not torch.equal(one.tuned_.head.weight, other.tuned_.head.weight)
    assert one.scale_ == 25
    assert torch.equal(torch.get_rng_state(), state)


# What learns


@pytest.mark.parametrize(
    ("name", "part"),
    [
        *(("clip-tiny", part) for part in PARTS),
        *((name, part) for name in ("lit-tiny", "clip-tiny-resnet") for part in PARTS[:2]),
    ],
)
def test_only_the_part_learns_and_never_the_model(name: str, part: Any) -> None:
    model = create(name)
    model.train()
    before = copy.deepcopy(model.state_dict())
    flags = [parameter.requires_grad for parameter in model.parameters()]
    start = weights(FineTune(model, part=part, **{**FAST, "epochs": 0}).fit(colours(), LABELS))
    found = FineTune(model, part=part, **FAST).fit(colours(), LABELS)
    learned = found.tuned_.learned()
    for key, value in weights(found).items():
        assert torch.equal(value, start[key]) == (key not in learned), key
        assert key in learned or dict(found.tuned_.named_parameters())[key].grad is None
    assert len(learned) < len(start) or part == "full"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())  # batch norms' statistics too
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert model.training
    own = {parameter.data_ptr() for parameter in model.image_tower.parameters()}
    for key, parameter in found.tuned_.tower.named_parameters():
        assert (parameter.data_ptr() in own) == (f"tower.{key}" not in learned), key


def test_a_step_is_sgd_on_the_loss_of_the_whole_definition() -> None:
    """Against a plain copy of the tower and cross entropy written out; the tower in float64, the loss is taken in float32."""
    model = create().double()
    found = FineTune(
        model,
        epochs=1,
        batch_size=12,
        num_views=0,
        learning_rate=0.05,
        optimizer="sgd",
        weight_decay=0.0,
        warmup_steps=0,
        momentum=0.0,
    ).fit(pictures(), LABELS)
    tower = copy.deepcopy(model.image_tower)
    text = ZeroShot(model, CLASSES).fit().class_vectors_.double().requires_grad_()
    pixels = torch.stack([model.preprocessor(picture) for picture in pictures()]).double()
    cosines = F.normalize(tower(pixels), dim=1) @ F.normalize(text, dim=1).T
    z = float(model.log_scale.detach().exp()) * cosines
    targets = torch.tensor([CLASSES.index(label) for label in LABELS])
    (z.logsumexp(1) - z[torch.arange(12), targets]).mean().backward()
    for name, parameter in tower.named_parameters():
        torch.testing.assert_close(
            weights(found)[f"tower.{name}"], parameter.detach() - 0.05 * parameter.grad, rtol=1e-5, atol=1e-7
        )
    torch.testing.assert_close(weights(found)["head.weight"], (text - 0.05 * text.grad).detach(), rtol=1e-6, atol=1e-7)


def test_the_last_of_all_blocks_learn_as_in_full(model: Any) -> None:
    once = {**FAST, "epochs": 1, "optimizer": "sgd"}
    full = weights(FineTune(model, **once).fit(pictures(), LABELS))
    blocks = len(model.image_tower.blocks)
    last = weights(FineTune(model, part="last", last_blocks=blocks, **once).fit(pictures(), LABELS))
    same = {name for name in full if torch.equal(full[name], last[name])}
    assert {name for name in full if name.startswith("tower.blocks")} <= same
    assert not any(name.startswith(("tower.patch_embed", "tower.position")) for name in same)
    one = weights(FineTune(model, part="last", last_blocks=1, **once).fit(pictures(), LABELS))
    final = f"tower.blocks.{blocks - 1}."
    assert all(torch.equal(one[name], full[name]) for name in full if name.startswith(final))


def test_frozen_blocks_before_all_that_learns_keep_nothing(model: Any) -> None:
    asked: list[bool] = []
    for part, expected in (("last", [False, True]), ("lora", [True, True]), ("full", [True, True])):
        tower = FineTune(model, part=part, epochs=0).fit(pictures(), LABELS).tuned_.tower
        asked.clear()
        for block in tower.blocks:
            block.attn.register_forward_hook(lambda module, given, out: asked.append(out.requires_grad))
        tower.blocks.forward_tokens(tower._embed(torch.randn(2, 3, 32, 32)))
        assert asked == expected, part


@pytest.mark.parametrize(
    ("name", "part"), [*(("clip-tiny", part) for part in PARTS), *(("align-tiny", part) for part in PARTS[:2])]
)
def test_a_few_pictures_are_learned_by_heart(name: str, part: Any) -> None:
    options = {**FAST, "epochs": 60, "learning_rate": 3e-3 if part in ("full", "last") else 3e-2}
    found = FineTune(create(name), part=part, adapter_dim=8, **options).fit(pictures(), LABELS)
    assert found.score(pictures(), LABELS) == 1


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_learns(loss: str, model: Any) -> None:
    labels = ["cat"] * 8 + ["dog"] * 3 + ["eel"]
    base = colours(3)
    given = [base[CLASSES.index(label)] for label in labels]
    found = FineTune(model, part="last", loss=loss, warmup_steps=3, **{**FAST, "epochs": 20}).fit(given, labels)
    assert found.score(given, labels) == 1
    assert found.counts_.tolist() == [8, 3, 1]
    assert found.scale_ == (30 if loss == "ldam" else pytest.approx(float(model.log_scale.detach().exp())))
    np.testing.assert_allclose(found.predict_proba(given).sum(1), 1)


def test_weights_count_pictures(model: Any) -> None:
    labels = np.array(LABELS)
    wrong = labels.copy()
    wrong[0] = "dog"
    weight = np.where(wrong == labels, 1.0, 0.0)
    found = FineTune(model, **FAST).fit(colours(), wrong, sample_weight=weight)
    kept = [i for i in range(12) if weight[i]]
    without = FineTune(model, **FAST).fit([colours()[i] for i in kept], wrong[kept])
    assert torch.equal(found.logits(colours()), without.logits(colours()))
    assert found.counts_.tolist() == [3, 4, 4]
    half = FineTune(model, **FAST).fit(colours(), labels, sample_weight=np.where(labels == "cat", 0.5, 1))
    assert half.counts_.tolist() == [2, 4, 4]
    assert not torch.equal(half.logits(colours()), FineTune(model, **FAST).fit(colours(), labels).logits(colours()))


def test_bfloat16_learns_nearly_the_same(model: Any) -> None:
    whole, short = (FineTune(model, precision=p, **FAST).fit(colours(), LABELS) for p in ("float32", "bfloat16"))
    assert {value.dtype for value in weights(short).values()} == {torch.float32}
    difference = (whole.logits(colours()) - short.logits(colours())).norm() / whole.logits(colours()).norm()
    assert 1e-5 < difference < 0.2


# Views


def test_same_seed_same_weights_whatever_is_kept_in_memory(model: Any) -> None:
    random = {**FAST, "num_views": None, "epochs": 3, "batch_size": 5}
    one, same, other = (
        FineTune(model, **random, keep_mb=mb, seed=seed).fit(pictures(), LABELS) for mb, seed in ((100, 1), (0, 1), (100, 2))
    )
    assert all(torch.equal(value, weights(same)[name]) for name, value in weights(one).items())
    assert not torch.equal(one.tuned_.head.weight, other.tuned_.head.weight)
    few = FineTune(model, **{**random, "num_views": 2}, seed=1).fit(pictures(), LABELS)
    assert not torch.equal(one.tuned_.head.weight, few.tuned_.head.weight)


def test_a_test_time_ensemble_is_the_mean_of_its_logits(model: Any) -> None:
    found = FineTune(model, test_crops=5, expand_px=6, epochs=0).fit(pictures(), LABELS)
    crops = PictureReader(model.preprocessor, pictures()).crops(np.arange(12), 5, 6)
    with torch.no_grad():
        each = torch.stack([found.tuned_(crops[:, k]) for k in range(5)])
    torch.testing.assert_close(found.logits(pictures()), each.mean(0), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found.logits(pictures()), FineTune(model, epochs=0).fit(pictures(), LABELS).logits(pictures()))


# LIFT


def test_lift_is_its_settings(model: Any) -> None:
    lift = LIFT(model)
    assert isinstance(lift, FineTune)
    fixed = ("adaptformer", "cosine", "text", "penultimate", "logit_adjustment", "sgd", "cosine", 0, 1.0, 25.0, 5)
    names = ("part", "head", "init", "reads", "loss", "optimizer", "decay", "warmup_steps", "tau", "scale", "test_crops")
    assert tuple(getattr(lift, name) for name in names) == fixed
    numbers = {"learning_rate": 0.01, "momentum": 0.9, "weight_decay": 5e-4, "batch_size": 128, "epochs": 10}
    assert {name: lift.get_params()[name] for name in numbers} == numbers
    schedule = lift._schedule(1280)
    assert schedule.steps == 100
    assert schedule.rate(0) == 0.01
    assert schedule.rate(50) == pytest.approx(0.005)
    assert schedule.rate(99) < 1e-5
    found = LIFT(model, epochs=6, batch_size=6, learning_rate=0.1, num_views=0).fit(colours(), LABELS)
    assert found.score(colours(), LABELS) == 1
    assert found.tuned_.tower.blocks[0].mlp.adapter.down.out_features == 1
    assert {"rank", "part", "loss"}.isdisjoint(lift.get_params())


def test_lift_learns_with_the_counts(model: Any) -> None:
    """Logit adjustment: at the start its loss is cross entropy of z + log pi."""
    labels = ["cat"] * 9 + ["dog"] * 2 + ["eel"]
    found = LIFT(model, epochs=1, batch_size=12, learning_rate=0.1, momentum=0.0, weight_decay=0.0, num_views=0).fit(
        pictures(), labels
    )
    start = LIFT(model, epochs=0).fit(pictures(), labels)
    rows = start.tuned_.head.weight.detach().clone().requires_grad_()
    features = image_features(model, pictures(), layer="penultimate").plain
    z = 25 * F.normalize(features, dim=1) @ F.normalize(rows, dim=1).T + torch.tensor([9, 2, 1]).log()
    F.cross_entropy(z, torch.tensor([CLASSES.index(label) for label in labels])).backward()
    torch.testing.assert_close(found.tuned_.head.weight.detach(), (rows - 0.1 * rows.grad).detach(), rtol=1e-4, atol=1e-5)


# The contract


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("head", ["cosine", "linear"])
def test_files_give_back_the_same_classifier(part: Any, head: Any, model: Any, tmp_path: Path) -> None:
    found = FineTune(model, ["eel", "cat", "dog"], part=part, head=head, **{**FAST, "epochs": 2}).fit(pictures(), LABELS)
    found.save(tmp_path / "without", with_model=False)
    loaded = load_classifier(tmp_path / "without", model)
    assert torch.equal(loaded.logits(pictures()), found.logits(pictures()))
    assert loaded.classes_.tolist() == CLASSES
    assert torch.equal(loaded.counts_, found.counts_)
    kept = {name for name in load_file(tmp_path / "without" / "classifier.safetensors") if name.startswith("tuned_.")}
    assert kept == {f"tuned_.{name}" for name in found.tuned_.learned()}  # what differs from the model, nothing else
    if part == "lora":
        assert {name.rsplit(".", 1)[1] for name in kept if "qkv" in name} == {"up", "down"}
    if head == "cosine":
        found.save(tmp_path / "with")
        assert torch.equal(wordsight.load_classifier(tmp_path / "with").logits(pictures()), found.logits(pictures()))


@pytest.mark.parametrize("cls", [FineTune, LIFT, Projection])
def test_constructors_only_store_and_clones_share_the_model(cls: Any, model: Any) -> None:
    marker = object()
    for name in cls().get_params():
        assert getattr(cls(**{name: marker}), name) is marker
    assert not [name for name in vars(cls()) if name.endswith("_")]
    found = cls(model, epochs=1, batch_size=6, seed=2, num_views=1).fit(pictures(), LABELS)
    twin = clone(found)
    assert twin.model is model
    assert not hasattr(twin, "classes_")
    assert torch.equal(twin.fit(pictures(), LABELS).logits(pictures()), found.logits(pictures()))
    assert torch.equal(pickle.loads(pickle.dumps(found)).logits(pictures()), found.logits(pictures()))


@pytest.mark.parametrize("cls", [LIFT, Projection])
def test_files_of_lift_and_projection(cls: Any, model: Any, tmp_path: Path) -> None:
    found = cls(model, epochs=1, batch_size=6).fit(pictures(), LABELS)
    loaded = load_classifier(found.save(tmp_path, with_model=False), model)
    assert type(loaded) is cls
    assert torch.equal(loaded.logits(pictures()), found.logits(pictures()))


def test_a_file_that_does_not_fit_is_named(model: Any, tmp_path: Path) -> None:
    found = FineTune(model, part="lora", rank=2, **{**FAST, "epochs": 1}).fit(pictures(), LABELS)
    config = found.save(tmp_path, with_model=False) / "classifier.json"
    config.write_text(config.read_text().replace('"rank": 2', '"rank": 3'))
    with pytest.raises(ValueError, match="the file of a FineTune does not fit its settings"):
        load_classifier(tmp_path, model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part": "half"}, "part must be one of full, last, lora, adaptformer, got 'half'"),
        ({"head": "mlp"}, "head must be one of cosine, linear, got 'mlp'"),
        ({"init": "zero"}, "init must be one of text, random, got 'zero'"),
        ({"reads": "tokens"}, "reads must be one of projected, penultimate, got 'tokens'"),
        ({"test_crops": 3}, "test_crops must be one of 1, 5, 10, got 3"),
        ({"part": "last", "last_blocks": 99}, "last_blocks must be 1 to 2, .*, got 99"),
        ({"part": "lora", "rank": 0}, "rank must be a whole number of 1 to the tower's width"),
        ({"part": "adaptformer", "adapter_dim": 0}, "adapter_dim must be a whole number of at least 1"),
        ({"epochs": -1}, "epochs must be a number of at least 0, got -1"),
        ({"scale": 0}, "scale must be a number above 0, got 0"),
        ({"num_views": -1}, "num_views must be a whole number of at least 0, got -1"),
        ({"keep_mb": -1}, "keep_mb must be a number of at least 0"),
        ({"min_crop": 0}, "scale must be two shares"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"warmup_steps": 8}, "warmup_steps must be 0 to 7 with steps=8, got 8"),
        ({"optimizer": "lion"}, "optimizer must be one of nesterov, sgd, adamw, got 'lion'"),
        ({"loss": "hinge"}, "loss must be one of cross_entropy"),
        ({"loss": "ldam", "head": "linear"}, "margins between cosines: use head='cosine'"),
        ({"precision": "float16"}, "precision must be one of float32, bfloat16"),
        ({"learning_rate": 1e30, "optimizer": "sgd"}, "the loss is (nan|inf) at step .* use a lower learning_rate than 1e\\+30"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], message: str, model: Any) -> None:
    with pytest.raises(ValueError, match=message):
        FineTune(model, **{**FAST, **options}).fit(pictures(), LABELS)


def test_bad_input_is_named(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="FineTune needs a model"):
        FineTune().fit(pictures(), LABELS)
    with pytest.raises(ValueError, match="FineTune changes the tower that looks at pictures, so it takes no features"):
        FineTune(model).fit(ImageFeatures(torch.randn(4, 8)), ["a", "b"] * 2)
    with pytest.raises(ValueError, match="so it takes no features"):
        FineTune(model, **{**FAST, "epochs": 0}).fit(pictures(), LABELS).predict(np.ones((3, 8)))
    with pytest.raises(ValueError, match="X has 12 pictures and y 11 labels"):
        FineTune(model).fit(pictures(), LABELS[1:])
    with pytest.raises(ValueError, match="1 classes have no picture: 'fox'"):
        FineTune(model, [*CLASSES, "fox"]).fit(pictures(), LABELS)
    with pytest.raises(ValueError, match="picture vectors depend on the text"):
        FineTune(create("llip-tiny")).fit(pictures(), LABELS)
    with pytest.raises(ValueError, match=r"weights are torch.float16, too coarse to learn by small steps: use model.float\(\)"):
        FineTune(create().half()).fit(pictures(), LABELS)
    with pytest.raises(ValueError, match="no linear function of the features"):
        FineTune(model, **{**FAST, "epochs": 0}).fit(pictures(), LABELS).linear_head()
    for part in ("lora", "adaptformer"):
        with pytest.raises(ValueError, match="this image tower, of type EfficientNet, has none: use part='full' or 'last'"):
            FineTune(create("align-tiny"), part=part).fit(pictures(), LABELS)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(OSError, match=r"broken.png .*"):
        FineTune(model, **FAST).fit([broken] * 12, LABELS)
    with pytest.raises(ValueError, match="sample_weight must be"):
        FineTune(model).fit(pictures(), LABELS, sample_weight=-np.ones(12))


# Commands and grids


def test_a_user_fine_tunes_and_predicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    wordsight.save(wordsight.create("clip-tiny"), tmp_path / "tiny")
    colour_folders(tmp_path / "colours", {"train": 6, "val": 4, "test": 5})
    words = ["--model", "tiny", "--data", "colours", "--shots", "all", "--seeds", "1", "--run", "run", "--method", "fine_tune"]
    words += [
        f"--set={setting}" for setting in ("part=lora", "rank=4", "epochs=3", "learning_rate=0.01", "loss=balanced_softmax")
    ]
    result = CliRunner().invoke(adapt_command, words)
    assert result.exit_code == 0, result.output
    kept: Any = wordsight.load_classifier(tmp_path / "run")
    assert (kept.part, kept.rank, kept.epochs, kept.learning_rate, kept.loss) == ("lora", 4, 3, 0.01, "balanced_softmax")
    asked = [str(path) for path in sorted((tmp_path / "colours" / "test").rglob("*.png"))]
    result = CliRunner().invoke(predict_command, ["--run", "run", "--json", *asked])
    assert result.exit_code == 0, result.output
    assert [row["labels"][0]["label"] for row in json.loads(result.stdout)] == kept.predict(asked).tolist()


def test_fine_tuning_is_cells_of_a_grid(tmp_path: Path, model: Any) -> None:
    assert set(GRID_PARTS) == set(PARTS) - {"full"}
    assert all(read_method(name).estimator in ("projection", "fine_tune", "lift") for name in GROUPS["tuned"])
    assert read_method("fine_tune+ldam+lora").settings == {"loss": "ldam", "part": "lora"}
    assert read_method("fine_tune+ldam+lora+wise_ft").first == "fine_tune+ldam+lora"
    assert read_method("projection+lade+wise_ft").first == "projection+lade"
    for name in ("fine_tune", "fine_tune+lora", "lift+ldam", "projection+ldam+lora", "decoder+ldam+lora", "decoder+ldam+wise_ft"):
        with pytest.raises(ValueError, match="write zero_shot"):
            read_method(name)
    colour_folders(tmp_path / "colours", {"train": 6, "val": 3, "test": 3})
    data = skew(open_data(str(tmp_path / "colours")), 6, seed=1)
    names = ("projection+balanced_softmax", "fine_tune+cross_entropy", "fine_tune+ldam+last", "lift")
    names += ("projection+balanced_softmax+wise_ft", "fine_tune+ldam+last+wise_ft")
    few = {name: {"epochs": 2, "batch_size": 8} for name in ("projection", "fine_tune", "lift")}
    asked = GridRequest(methods=names, seeds=(1,), parameters=few, many_above=4, few_below=2)
    summary = run_grid(model, data, tmp_path / "run", asked)
    assert not summary["failed"]
    assert {one["method"] for one in summary["methods"]} == set(names)
    last: Any = wordsight.load_classifier(tmp_path / "run/cells/fine_tune+ldam+last/1/classifier", model)
    assert (last.part, last.loss, last.epochs) == ("last", "ldam", 2)
    for name in names[-2:]:
        between: Any = wordsight.load_classifier(tmp_path / f"run/cells/{name}/1/classifier", model)
        found = json.loads((tmp_path / f"run/cells/{name}/1/result.json").read_text())
        assert found["chosen"] == {"alpha": between.wise_ft_}
        assert found["cost"]["seconds"] > found["own_cost"]["seconds"]
    with pytest.raises(ValueError, match=r"fine_tune.part can't be set in a grid: it is part of a cell's name"):
        GridRequest(parameters={"fine_tune": {"part": "lora"}})
