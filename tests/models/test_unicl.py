"""UniCL: the conformance suite, then its identities: CLIP's loss on captions, supervised contrast and cross entropy on labels."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import wordsight
from tests.models.conformance import CHECKS, make_batch, total
from wordsight import catalog
from wordsight.data.sources import DataSource
from wordsight.losses.contrastive import info_nce, pair_arguments
from wordsight.models.contrastive.clip import CLIP, CLIPConfig
from wordsight.models.contrastive.unicl import UniCL, UniCLConfig
from wordsight.nn.towers import config_from_dict, config_to_dict
from wordsight.train.loop import fit
from wordsight.train.recipe import make_recipe

TINY = catalog.find("unicl-tiny").config


def seeded(config: UniCLConfig = TINY) -> UniCL:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UniCL(config)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_conforms(check: object) -> None:
    check(seeded)


def unit(rows: int, seed: int, width: int = 6) -> torch.Tensor:
    return F.normalize(torch.randn(rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=-1)


def loss(image: torch.Tensor, text: torch.Tensor, labels: torch.Tensor, scale: float = 2.0) -> torch.Tensor:
    embeddings = {"image": image, "text": text, "label_ids": labels}
    return info_nce(image, text, torch.tensor(scale, dtype=torch.float64), **pair_arguments(embeddings, "labels"))


@settings(max_examples=40, deadline=None)
@given(batch=st.integers(1, 9), classes=st.integers(1, 9), seed=st.integers(0, 99))
def test_equals_the_papers_two_sums_as_loops(batch: int, classes: int, seed: int) -> None:
    image, text = unit(batch, seed), unit(batch, seed + 1)
    labels = torch.randint(classes, (batch,), generator=torch.Generator().manual_seed(seed))
    logits = (math.exp(2.0) * image @ text.T).tolist()
    to_text = to_image = 0.0
    for i in range(batch):
        positives = [k for k in range(batch) if labels[k] == labels[i]]
        for k in positives:
            to_text -= math.log(math.exp(logits[i][k]) / sum(math.exp(z) for z in logits[i])) / len(positives)
            to_image -= math.log(math.exp(logits[k][i]) / sum(math.exp(row[i]) for row in logits)) / len(positives)
    assert loss(image, text, labels).item() == pytest.approx((to_text + to_image) / 2 / batch, abs=1e-12)


def test_on_captions_it_is_clip() -> None:
    """Every row a label of its own: the same value and gradients as CLIP with the same weights."""
    unicl = seeded().double()
    clip = CLIP(CLIPConfig(embed_dim=TINY.embed_dim, image=TINY.image, text=TINY.text, activation="gelu")).double()
    clip.load_state_dict(unicl.state_dict())
    batch = replace(make_batch(unicl, dtype=torch.float64), label_ids=torch.arange(8) * 1_000_003)
    losses = [total(system, batch) for system in (unicl, clip)]
    torch.testing.assert_close(*losses, rtol=0, atol=1e-12)
    for value in losses:
        value.backward()
    for (name, p), q in zip(unicl.named_parameters(), clip.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-12, msg=name)


def test_on_labels_it_is_supervised_contrast() -> None:
    """Texts are the classes' names. From pictures: cross entropy over classes, each counted as often as it is in the batch
    (a prior). From texts: the supervised contrastive loss (arXiv 2004.11362, equation 2) with the name as anchor.
    """
    labels = torch.tensor([0, 1, 0, 2, 0, 1])
    names, image = unit(3, 5), unit(6, 6)
    scale, counts = math.exp(2.0), torch.bincount(labels).double()
    by_class = scale * image @ names.T
    from_pictures = F.cross_entropy(by_class + counts.log(), labels) + counts[labels].log().mean()
    log_shares = by_class.log_softmax(0)
    from_texts = torch.stack([-log_shares[labels == label, label].mean() for label in labels.tolist()]).mean()
    torch.testing.assert_close(loss(image, names[labels], labels), (from_pictures + from_texts) / 2, rtol=0, atol=1e-12)


def test_rows_of_one_class_are_not_each_others_mistakes() -> None:
    """Two pictures of one class with two texts: plain InfoNCE pushes each from the other's text, this does not."""
    image, text = torch.eye(4, dtype=torch.float64)[:2], torch.eye(4, dtype=torch.float64)[2:].clone().requires_grad_()
    pulls = []
    for labels in ([0, 1], [0, 0]):
        pulls.append(torch.autograd.grad(loss(image, text, torch.tensor(labels)), text)[0])
    assert pulls[0][0, 1] > 0.1  # the gradient's descent leads text 0 away from image 1
    assert pulls[1].abs().max() < 1e-12  # of one class, both are as near to both: the least that there is


def test_captions_of_one_class_are_right_for_all_its_pictures() -> None:
    image, text, labels = unit(4, 1), unit(8, 2).unflatten(0, (4, 2)), torch.tensor([0, 1, 0, 2])
    keys = pair_arguments({"image": image, "text": text, "label_ids": labels}, "labels")["keys"]
    assert keys[1].tolist() == [[0, 0, 1, 1, 0, 0, 2, 2]]


def test_order_of_a_batch_with_labels_does_not_matter() -> None:
    system = seeded().double().eval()
    batch = replace(make_batch(system, dtype=torch.float64), label_ids=torch.tensor([3, 3, 1, 0, 1, 3, 9, 8]))
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    shuffled = replace(batch, **{name: value[order] for name, value in batch.tensors().items()})
    torch.testing.assert_close(total(system, shuffled), total(system, batch), rtol=0, atol=1e-12)
    assert (total(system, batch) - total(system, replace(batch, label_ids=torch.arange(8)))).abs() > 1e-3


def test_a_batch_without_labels_is_a_clear_error() -> None:
    system = seeded()
    with pytest.raises(ValueError, match="contrasts class labels and the batch has none"):
        total(system, replace(make_batch(system), label_ids=None))


def test_configs_survive_json_and_refuse_nonsense() -> None:
    assert config_from_dict(UniCLConfig, config_to_dict(TINY)) == TINY
    with pytest.raises(ValueError, match="label_smoothing"):
        replace(TINY, label_smoothing=1.0)
    with pytest.raises(ValueError, match="'relu'"):
        replace(TINY, activation="relu")


def test_the_recipe_trains_on_folders_and_captions_in_one_mixture(tmp_path: Path) -> None:
    """`wordsight train unicl` with class folders beside the embedded pictures: labels are shared, and go into the loss."""
    for colour in ("red", "blue"):
        (tmp_path / "by_class" / colour).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (20, 20 + i), colour).save(tmp_path / "by_class" / colour / f"{i}.png")
    settings = ["steps=3", "batch_size=16", "micro_batch_size=8", "log_every_steps=1", "recalibrate_batches=1"]
    settings += ["data.cache_decoded=false", "optim.warmup_steps=1"]
    recipe = replace(make_recipe("unicl", settings), evaluations=(), best_metric=None)
    sources = (DataSource(path=str(tmp_path / "by_class"), weight=0.5), DataSource(path="sample:train-openclipart", weight=0.5))
    recipe = replace(recipe, data=replace(recipe.data, sources=sources))
    seen = []
    embeddings = UniCL.embeddings
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UniCL, "embeddings", lambda system, batch: seen.append(batch) or embeddings(system, batch))
        assert fit(recipe, tmp_path / "run", device="cpu", progress=False).complete
    folders = [label for part in seen for label, key in zip(part.label_ids.tolist(), part.keys, strict=True) if ".png" in key]
    assert len(set(folders)) == 2 < len(folders)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["loss"] < 15 for line in lines if "loss" in line)
    assert isinstance(wordsight.load(tmp_path / "run"), UniCL)
