"""The evaluators from pictures to figures, on a model whose answers are known."""

import csv
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib.cbook
import pytest
import torch

import wordsight
from tests.evaluate.conftest import COLOURS, ColourModel, picture
from wordsight.evaluate import Retrieval, ZeroShot, embed_source
from wordsight.evaluate.metrics import wilson_interval

Folder = Callable[..., Path]


def test_zero_shot_figures_and_confusions(model: ColourModel, colour_folder: Folder) -> None:
    root = colour_folder({"red": 6, "green": 3, "blue": 1}, wrong=2)
    model.train()
    outcome = ZeroShot(classes=["blue", "green", "yellow", "grey", "red", "colourless"]).judge(model, str(root))
    assert model.training, "the training mode is put back"
    top1, top5, per_class = (outcome.metrics[name] for name in ("top1", "top5", "mean_per_class"))
    assert (top1.value, top1.count, top1.chance) == (0.8, 10, 1 / 6)
    assert top1.ci95 == wilson_interval(8, 10)
    assert (top5.value, top5.chance) == (1.0, 5 / 6)
    assert per_class.value == pytest.approx((4 / 6 + 1 + 1) / 3)
    assert per_class.ci95[0] <= per_class.value <= per_class.ci95[1]
    samples = {one.metric: one.values for one in outcome.outcomes}
    assert {name: values.mean() for name, values in samples.items()} == pytest.approx(
        {"top1": top1.value, "mean_per_class": per_class.value}
    ), "both can be tested in pairs"
    assert outcome.confusions == [{"label": "red", "count": 6, "right": 4, "taken_for": [["blue", 2]]}]
    assert ZeroShot(prompts="name").run(model, root)["top1"].chance == 1 / 3, "classes default to the labels of the data"


def test_classes_must_fit_the_data(model: ColourModel, colour_folder: Folder) -> None:
    root = colour_folder({"red": 1, "green": 1})
    with pytest.raises(ValueError, match=r"not among the 1 given classes, e.g. 'green'"):
        ZeroShot(classes=["red"]).run(model, root)
    with pytest.raises(ValueError, match=r"twice or more: 'red'"):
        ZeroShot(classes=["red", "green", "red"]).run(model, root)


def captioned(tmp_path: Path, rows: list[tuple[str, list[str]]]) -> Path:
    """A JSON Lines table of pictures with several captions each."""
    lines = []
    for i, (colour, captions) in enumerate(rows):
        (tmp_path / f"{i}.png").write_bytes(picture(COLOURS[colour]))
        lines.append(json.dumps({"image": f"{i}.png", "caption": captions}))
    path = tmp_path / "val.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_retrieval_counts_several_captions_rightly(model: ColourModel, tmp_path: Path) -> None:
    data = captioned(tmp_path, [("red", ["green", "red", "red too"]), ("green", ["green, really"]), ("blue", ["yellow"])])
    found = Retrieval(ks=(1, 2, 5)).run(model, data)
    # red finds one of its two; green ties between its own caption and the wrong one; blue's only caption is far
    assert found["image_to_text_R@5"].value == 1.0
    assert found["image_to_text_R@5"].chance == 1.0
    assert found["text_to_image_R@1"].count == 5
    assert found["text_to_image_R@1"].value == pytest.approx(3 / 5)
    assert found["image_to_text_R@1"].chance == pytest.approx((3 / 5 + 1 / 5 + 1 / 5) / 3)
    assert found["image_to_text_median_rank"].unit == "rank"
    first = Retrieval(captions="first").run(model, data)
    assert first["text_to_image_R@1"].count == 3


def test_five_captions_that_say_the_same_are_no_surer_than_one(model: ColourModel, tmp_path: Path) -> None:
    """Captions of a picture are a group: the interval is that of as many answers as there are pictures, or a little wider."""
    rows = [(colour, "red" if i % 3 == 0 else colour) for i, colour in enumerate(["red", "green", "blue", "grey"] * 5)]
    (tmp_path / "five").mkdir()
    once = Retrieval().run(model, captioned(tmp_path, [(colour, [said]) for colour, said in rows]))
    five = Retrieval().run(
        model, captioned(tmp_path / "five", [(colour, [f"{said} {j}" for j in range(5)]) for colour, said in rows])
    )
    for name in ("text_to_image_R@1", "text_to_image_R@5", "text_to_image_R@10", "text_to_image_median_rank"):
        assert five[name].value == once[name].value
        assert five[name].count == 5 * once[name].count
        (low, high), (low_5, high_5) = once[name].ci95, five[name].ci95
        assert low_5 <= low
        assert high_5 >= high
    share = once["text_to_image_R@1"].value
    assert 0 < share < 1
    assert once["text_to_image_R@1"].ci95 == wilson_interval(20 * share, 20)
    low, high = five["text_to_image_R@1"].ci95
    narrow = wilson_interval(100 * share, 100)
    assert high - low > 2 * (narrow[1] - narrow[0])


def test_one_picture_alone_counts_as_one_answer(model: ColourModel, tmp_path: Path) -> None:
    found = Retrieval().run(model, captioned(tmp_path, [("red", ["red", "red again"])]))
    assert found["text_to_image_R@1"].ci95 == wilson_interval(1, 1)


def test_bad_pictures_are_skipped_and_named(model: ColourModel, tmp_path: Path) -> None:
    rows = [("red", ["red"])] * 40 + [("blue", ["blue"])]
    data = captioned(tmp_path, rows)
    (tmp_path / "40.png").write_bytes(b"not a picture")
    outcome = Retrieval(batch_size=7).judge(model, data)
    assert len(outcome.embedded) == 40
    assert [one.key.endswith("40.png") for one in outcome.embedded.bad] == [True]
    assert outcome.metrics["text_to_image_R@1"].count == 40


def test_a_missing_capability_names_the_method(colour_folder: Folder) -> None:
    class PicturesOnly:
        def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
            return pixels.flatten(1)

        def preprocess(self, image: object) -> torch.Tensor:
            return torch.zeros(3, 2, 2)

    for evaluator in (ZeroShot(), Retrieval()):
        with pytest.raises(ValueError, match=r"PicturesOnly has no encode_text\(\), tokenize\(\)"):
            evaluator.run(PicturesOnly(), colour_folder({"red": 1}, name=type(evaluator).__name__))


def test_data_without_labels_or_captions_says_so(model: ColourModel, tmp_path: Path, colour_folder: Folder) -> None:
    with pytest.raises(ValueError, match="no sample of the data has a label"):
        ZeroShot().run(model, captioned(tmp_path, [("red", ["red"])]))

    class Wordless:
        bad = ()

        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> object:
            from wordsight.types import Sample

            return Sample("one", picture(COLOURS["red"]), (), "red")

    with pytest.raises(ValueError, match="no sample of the data has a caption"):
        Retrieval().run(model, Wordless())


def test_diverged_weights_are_an_error_not_a_perfect_score(model: ColourModel, colour_folder: Folder) -> None:
    model.mix.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="undefined embeddings"):
        ZeroShot().run(model, colour_folder({"red": 2}))


def test_one_embedding_serves_both_and_fingerprints_tell_makings_apart(model: ColourModel, tmp_path: Path) -> None:
    path = tmp_path / "val.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "caption", "label"])
        for i, colour in enumerate(COLOURS):
            (tmp_path / f"{i}.png").write_bytes(picture(COLOURS[colour]))
            writer.writerow([f"{i}.png", f"all {colour}", colour])
    embedded = embed_source(model, path)
    zero_shot, retrieval = ZeroShot().judge(model, embedded), Retrieval().judge(model, embedded)
    assert zero_shot.metrics == ZeroShot(batch_size=2).run(model, path)
    assert retrieval.metrics == Retrieval(batch_size=2).run(model, str(path))
    prints = [zero_shot.fingerprint, retrieval.fingerprint, ZeroShot(prompts="name").judge(model, embedded).fingerprint]
    assert ZeroShot(batch_size=3).judge(model, path).fingerprint == prints[0], "how it was batched is no part of a making"
    (tmp_path / "0.png").write_bytes(picture((221, 30, 30)))
    prints.append(ZeroShot().judge(model, path).fingerprint)
    model.mix.data[0, 1] += 1e-6
    prints.append(ZeroShot().judge(model, embedded).fingerprint)
    assert len(set(prints)) == len(prints)


def test_reduced_decoding_is_off_unless_asked_and_told_in_the_protocol(model: ColourModel, tmp_path: Path) -> None:
    shutil.copy(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False), tmp_path / "one.jpg")
    data = tmp_path / "val.csv"
    data.write_text("path,caption,label\none.jpg,an admiral,woman\n", encoding="utf-8")
    encoder = wordsight.create("clip-tiny")
    exact, near = embed_source(encoder, data), embed_source(encoder, data, reduced_decode=True)
    assert (exact.images_ND - encoder.embed_images(tmp_path / "one.jpg")).abs().max() < 1e-6
    assert (exact.images_ND - near.images_ND).abs().max() > 1e-4
    for kind in (partial(ZeroShot, classes=("woman", "ship")), Retrieval):
        plain, reduced = kind().judge(encoder, data), kind(reduced_decode=True).judge(encoder, data)
        assert torch.equal(reduced.embedded.images_ND, near.images_ND)
        assert reduced.protocol == f"{plain.protocol}, reduced decoding"
        assert reduced.fingerprint != plain.fingerprint
        assert kind().judge(encoder, near).fingerprint == reduced.fingerprint, "vectors know how they were made"
    with pytest.raises(ValueError, match="reduced_decode needs a Preprocess"):
        ZeroShot(reduced_decode=True).run(model, data)
