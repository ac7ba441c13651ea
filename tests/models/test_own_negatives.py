"""Hard negatives, several captions, labels and weights in every contrastive system: the definitions, updates, micro-batches."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.models.conformance import total
from tests.models.rich import SYSTEMS, make, rich_batch
from wordsight.nn.random import numbered_rows
from wordsight.system import PairScorer
from wordsight.train.step import Stepper, derive_seed
from wordsight.types import Batch

SHAPES = [(1, 0), (1, 3), (3, 0), (2, 3)]  # captions and negatives of a row


def logits_of(system: torch.nn.Module, batch: Batch) -> tuple[list[list[float]], list[list[float]]]:
    """[B][B C] with the images' own texts, row by row, and [B][M] with the negatives that are given."""
    found = []
    own = batch.tokens.flatten(0, -2)
    for tokens in (own, None if batch.negatives is None else batch.negatives[batch.negatives_given]):
        if tokens is None or not len(tokens):
            found.append([[] for _ in range(len(batch))])
            continue
        scores = scores_of(system, batch, tokens)
        bias = 0.0 if system.logit_bias is None else system.logit_bias
        found.append((system.log_scale.exp() * scores + bias).tolist())
    return found[0], found[1]


def right_pairs(name: str, batch: Batch) -> list[list[bool]]:
    """[B][B C]."""
    rows = len(batch)
    ids = batch.text_ids.reshape(rows, -1).tolist()
    captions = len(ids[0])
    flat = [(owner, text) for owner in range(rows) for text in ids[owner]]
    found = []
    for i in range(rows):
        row = []
        for owner, text in flat:
            right = owner == i
            if "multi-positive" in name:
                right = right or text in ids[i] or batch.image_ids[owner].item() == batch.image_ids[i].item()
            if name == "unicl":
                right = batch.label_ids[owner].item() == batch.label_ids[i].item()
            row.append(right)
        found.append(row)
    assert len(found[0]) == rows * captions
    return found


def softmax_definition(own: list, wrong: list, right: list, weights: list[float], captions: int, smoothing: float) -> float:
    """Both directions' weighted means, halved."""
    rows, texts = len(own), len(own[0])
    to_text = to_image = 0.0
    for i in range(rows):
        everything = own[i] + wrong[i]
        log_sum = math.log(sum(math.exp(z) for z in everything))
        good = [log_sum - own[i][j] for j in range(texts) if right[i][j]]
        everywhere = sum(log_sum - z for z in everything) / len(everything)
        to_text += weights[i] * ((1 - smoothing) * sum(good) / len(good) + smoothing * everywhere)
    for j in range(texts):
        column = [own[i][j] for i in range(rows)]
        log_sum = math.log(sum(math.exp(z) for z in column))
        good = [log_sum - own[i][j] for i in range(rows) if right[i][j]]
        everywhere = sum(log_sum - z for z in column) / len(column)
        to_image += weights[j // captions] * ((1 - smoothing) * sum(good) / len(good) + smoothing * everywhere) / captions
    return (to_text + to_image) / sum(weights) / 2


def sigmoid_definition(own: list, wrong: list, right: list, weights: list[float]) -> float:
    summed = 0.0
    for i, weight in enumerate(weights):
        signed = [z if right[i][j] else -z for j, z in enumerate(own[i])] + [-z for z in wrong[i]]
        summed += weight * sum(math.log1p(math.exp(-z)) for z in signed)
    return summed / sum(weights)


@pytest.mark.parametrize(("captions", "negatives"), SHAPES)
@pytest.mark.parametrize("name", SYSTEMS)
def test_the_loss_is_its_definition(name: str, captions: int, negatives: int) -> None:
    """By loops over pairs: every caption of a row is right for it, a negative for none, whatever its text or label."""
    system = make(name).eval()
    batch = rich_batch(system, captions=captions, negatives=negatives)
    (own, wrong), right = logits_of(system, batch), right_pairs(name, batch)
    weights = batch.weights.double().tolist()
    if system.logit_bias is None:
        smoothing = getattr(system.config, "label_smoothing", 0.0)
        expected = softmax_definition(own, wrong, right, weights, captions, smoothing)
    else:
        expected = sigmoid_definition(own, wrong, right, weights)
    assert total(system, batch).item() == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize("name", SYSTEMS)
def test_negatives_that_are_not_given_are_not_there(name: str) -> None:
    system = make(name).eval()
    batch = rich_batch(system)
    batch = replace(batch, negatives_given=torch.zeros_like(batch.negatives_given))
    none = replace(batch, negatives=None, negatives_given=None)
    torch.testing.assert_close(total(system, batch), total(system, none), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SYSTEMS)
def test_updates_push_hard_negatives_away(name: str) -> None:
    """What a picture gives to its own negative is less after 30 updates with it than without (and, of a share, than before)."""
    before, after = {}, {}
    for with_negatives in (True, False):
        system = make(name).eval()
        batch = rich_batch(system, captions=1)
        wrong = rich_batch(system, captions=1, negatives=4, seed=20)  # texts of its own that all are there
        batch = replace(
            batch,
            weights=None,
            label_ids=torch.arange(len(batch)),
            text_ids=torch.arange(len(batch)),
            image_ids=torch.arange(len(batch)),
            tokens=rich_batch(system, captions=1, seed=10).tokens,
            negatives=wrong.tokens[:, None].roll(1, 0),
            negatives_given=torch.ones(len(batch), 1, dtype=torch.bool),
        )
        trained_on = batch if with_negatives else replace(batch, negatives=None, negatives_given=None)
        before[with_negatives] = given_to_own_negatives(system, batch)
        optimizer = torch.optim.Adam(system.parameters(), lr=3e-3)
        for _ in range(30):
            optimizer.zero_grad()
            total(system, trained_on).backward()
            optimizer.step()
        after[with_negatives] = given_to_own_negatives(system, batch)
    if system.logit_bias is None:
        assert after[True] < 0.8 * before[True]
        assert after[True] < 0.8 * after[False]
    else:
        assert after[True] < after[False] - 0.05


def given_to_own_negatives(system: torch.nn.Module, batch: Batch) -> float:
    """The mean share of all texts that a picture gives to its own negative, or where there are no shares its cosine with it."""
    own, wrong = (torch.tensor(logits) for logits in logits_of(system.eval(), batch))
    if system.logit_bias is not None:
        return ((wrong.diagonal() - system.logit_bias) / system.log_scale.exp()).mean().item()
    return torch.cat([own, wrong], dim=1).softmax(1)[:, own.shape[1] :].diagonal().mean().item()


def scores_of(system: torch.nn.Module, batch: Batch, tokens: torch.Tensor) -> torch.Tensor:
    image, text = system.encode_image(batch.pixels), system.encode_text(tokens)
    return system.similarities(image, text) if isinstance(system, PairScorer) else image @ text.T


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_row_of_weight_zero_still_has_its_texts_among_the_others_answers(name: str) -> None:
    """It is no anchor: nothing pulls its pair together. Its texts go on being pushed away, as do its negatives."""
    system = make(name).eval()
    batch = rich_batch(system)
    if name == "unicl":
        batch = replace(batch, label_ids=torch.arange(len(batch)))  # and right for nobody else
    embeddings = {k: v.detach() for k, v in system.embeddings(replace(batch, negatives=None, negatives_given=None)).items()}
    for key in ("image", "text"):
        embeddings[key].requires_grad_()
    embeddings["image_ids"] = embeddings["text_ids"][:, 0] * 0 + torch.arange(len(batch))
    embeddings["text_ids"] = torch.arange(batch.tokens.shape[0] * 2).view(-1, 2)
    term = system.loss_from_embeddings(embeddings)["contrastive"]
    at_text = torch.autograd.grad(term.value, embeddings["text"], retain_graph=True)[0]
    assert at_text[1].abs().max() > 0
    moved = dict(embeddings)
    if system.logit_bias is not None:  # the sigmoid loss has no columns: the row's picture is not there at all
        assert not torch.autograd.grad(term.value, embeddings["image"])[0][1].any()
    else:
        shifted = (
            embeddings["text"].detach() - 1e-3 * at_text / at_text[1].norm() * (torch.arange(len(batch)) == 1)[:, None, None]
        )
        moved["text"] = torch.nn.functional.normalize(shifted, dim=-1)
        anchors = [i for i in range(len(batch)) if i != 1]
        before, after = (e["image"][anchors] @ e["text"][1].T for e in (embeddings, moved))
        assert (after - before).mean() < 0


def gradients(system: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in system.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("captions", "negatives"), [(1, 3), (2, 3)])
@pytest.mark.parametrize("name", SYSTEMS)
def test_micro_batches_give_the_gradients_of_one_batch(name: str, captions: int, negatives: int, checkpointing: bool) -> None:
    """With patch dropout and stochastic depth, whose numbers belong to a row's texts, to 1e-12."""
    system = make(name).train()
    batch = rich_batch(system, rows=9, captions=captions, negatives=negatives)
    with numbered_rows(derive_seed(0, 3), 0, "cpu", 9):
        expected = total(system, batch)
    expected.backward()
    whole = gradients(system)
    system.set_activation_checkpointing(checkpointing)
    for micro in (9, 4, 1):
        system.zero_grad()
        loss = Stepper(system, micro_batch_size=micro).backward(batch, step=3)
        assert abs(loss.total.item() - expected.item()) < 1e-12
        found = gradients(system)
        assert max((whole[n] - found[n]).abs().max().item() for n in whole) < 1e-12
