"""Zero-shot with several templates, names and glosses: closed forms, and what the protocol says of them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from tests.evaluate.conftest import COLOURS, ColourModel, picture
from wordsight.evaluate import ZeroShot, embed_source
from wordsight.evaluate.embedding import embed_texts
from wordsight.evaluate.examples import write_examples
from wordsight.evaluate.zero_shot import MeanProbabilities

Folder = Callable[..., Path]
TEMPLATES = ("{label}", "{label} and yellow", "grey {label}")
COUNTS = {"red": 4, "green": 3, "blue": 3, "grey": 2}


def by_hand(model: ColourModel, images: torch.Tensor, classes: list[str]) -> np.ndarray:
    """The mean of softmaxes, each in plain numbers: [N, C]."""
    total = np.zeros((len(images), len(classes)))
    for template in TEMPLATES:
        vectors = embed_texts(model, [template.replace("{label}", name) for name in classes]).double().numpy()
        logits = np.exp(float(model.log_scale.detach())) * images.double().numpy() @ vectors.T
        exponentials = np.exp(logits - logits.max(1, keepdims=True))
        total += exponentials / exponentials.sum(1, keepdims=True)
    return total / len(TEMPLATES)


def test_both_ensembles_are_their_closed_forms(model: ColourModel, colour_folder: Folder) -> None:
    embedded = embed_source(model, str(colour_folder(COUNTS, wrong=1)))
    classes = sorted(COUNTS)
    means = ZeroShot(prompts=TEMPLATES).judge(model, embedded)
    vectors = [embed_texts(model, [t.replace("{label}", name) for t in TEMPLATES]).mean(0) for name in classes]
    assert torch.allclose(means.texts_MD, normalize(torch.stack(vectors), dim=-1), atol=1e-6)
    found = ZeroShot(prompts=TEMPLATES, ensemble="probabilities").judge(model, embedded)
    scores_NC = found.scores(embedded.images_ND, found.texts_MD)
    expected_NC = by_hand(model, embedded.images_ND, classes)
    assert np.allclose(scores_NC.numpy(), expected_NC, atol=1e-6)
    targets = [classes.index(str(label)) for label in embedded.labels]
    assert found.metrics["top1"].value == np.mean(expected_NC.argmax(1) == targets)
    # some classes alone are scored as among all of them: the examples ask so
    assert torch.equal(found.scores(embedded.images_ND, found.texts_MD[[2, 0]]), scores_NC[:, [2, 0]])
    assert "ensemble of embeddings" in means.protocol
    assert "ensemble of probabilities" in found.protocol
    assert means.fingerprint != found.fingerprint


def test_ensembles_can_differ(model: ColourModel) -> None:
    """One template that is sure and two that are not: probabilities count it once, the mean vector turns with all three."""
    model.log_scale.data.fill_(4.0)
    angle_CT = torch.tensor([[0.0, 0.9, 0.9], [0.5, 0.5, 0.5]])  # between the picture and each class, by template
    vectors_CTD = torch.stack([angle_CT.cos(), angle_CT.sin()], dim=-1)
    image_1D = torch.tensor([[1.0, 0.0]])
    turned = torch.tensor([[0.0, 0.9, -0.9], [0.5, 0.5, 0.5]])  # the same angles, where the first class's errors cancel
    probable = MeanProbabilities(model, vectors_CTD)(image_1D, torch.arange(2)[:, None])
    expected_TC = (torch.tensor(4.0).exp() * angle_CT.cos().T).softmax(dim=1)
    assert torch.allclose(probable[0], expected_TC.mean(0), atol=1e-6)
    assert probable.argmax() == 1
    mean_CD = normalize(torch.stack([turned.cos(), turned.sin()], dim=-1).mean(1), dim=-1)
    assert (image_1D @ mean_CD.T).argmax() == 0
    again = MeanProbabilities(model, torch.stack([turned.cos(), turned.sin()], dim=-1))(image_1D, torch.arange(2)[:, None])
    assert torch.allclose(again, probable, atol=1e-6), "probabilities see only the angles to the picture"


def test_one_template_needs_no_ensemble(model: ColourModel, colour_folder: Folder) -> None:
    root = colour_folder(COUNTS, wrong=1)
    plain, probable = (ZeroShot(prompts="name", ensemble=kind).judge(model, root) for kind in ("embeddings", "probabilities"))
    assert plain.metrics == probable.metrics, "a softmax keeps the order"
    assert "ensemble" not in plain.protocol


def test_glosses_and_several_names_are_asked_for_and_told(model: ColourModel, colour_folder: Folder, tmp_path: Path) -> None:
    root = colour_folder({"red": 3, "green": 2})
    wrong = ZeroShot(prompts="name", glosses={"red": "not {label}"}).judge(model, root)
    assert wrong.metrics["top1"].value == 1.0, "the colour is still read"
    assert "names of 1 classes given" in wrong.protocol
    (tmp_path / "glosses.tsv").write_text("red\tblue, {label}s sister\n")
    swapped = ZeroShot(prompts="name", glosses=tmp_path / "glosses.tsv").judge(model, root)
    assert swapped.texts == ("green", "red"), "labels stay"
    assert not torch.allclose(swapped.texts_MD, wrong.texts_MD)
    assert swapped.fingerprint != wrong.fingerprint
    with pytest.raises(ValueError, match="do you mean 'green'"):
        ZeroShot(glosses={"grene": "x"}).run(model, root)


def test_classes_of_a_published_set_know_the_labels_of_folders(model: ColourModel, tmp_path: Path) -> None:
    for folder, colour in (("0", "red"), ("3", "blue")):
        (tmp_path / "train" / folder).mkdir(parents=True)
        (tmp_path / "train" / folder / "a.png").write_bytes(picture(COLOURS[colour]))
    found = ZeroShot(classes="cifar10", prompts="cifar10").judge(model, tmp_path / "train")
    assert found.metrics["top1"].chance == 0.1
    assert found.row_groups.tolist() == [0, 3]
    assert "prompts cifar10 (18), ensemble of embeddings, labels by place" in found.protocol


def test_the_gallery_shows_probabilities(model: ColourModel, colour_folder: Folder, tmp_path: Path) -> None:
    found = ZeroShot(prompts=TEMPLATES, ensemble="probabilities").judge(model, colour_folder({"red": 2, "green": 2}))
    write_examples(tmp_path / "run", found, "colours", "all")
    assert "scores are probabilities" in found.notes
    assert '"pictures": [' in (tmp_path / "run" / "gallery.json").read_text()


def test_an_unknown_ensemble_and_a_model_without_a_scale_are_named(colour_folder: Folder) -> None:
    with pytest.raises(ValueError, match="embeddings, probabilities, got 'votes'"):
        ZeroShot(ensemble="votes")  # type: ignore[arg-type]
    model = ColourModel()
    model.log_scale = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match="has no log_scale"):
        ZeroShot(prompts=TEMPLATES, ensemble="probabilities").run(model, colour_folder({"red": 1, "green": 1}))
