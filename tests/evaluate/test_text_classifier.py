"""A classifier's texts with shared beginnings against the plain tower: the same vectors, whatever the names."""

import copy
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import wordsight
from wordsight.embed import DualEncoderMixin
from wordsight.evaluate import text_classifier
from wordsight.evaluate.embedding import embed_texts
from wordsight.evaluate.prompt_sets import prompt_set
from wordsight.evaluate.prompts import class_embeddings, prompt_embeddings
from wordsight.evaluate.text_classifier import embed_prompts, shares_beginnings
from wordsight.models.contrastive.clip import CLIP
from wordsight.nn.text import TextConfig, TextTransformer

TEMPLATES = ("{label}", "a photo of a {label}.", "a photo of the {label}.", "a photo of many {label}", "{label} in a video game.")
# words that share beginnings, some of them long, some of no token at all
NAMES = st.lists(
    st.lists(st.sampled_from(["great", "white", "shark", "crane", "a", "photo", "of", "", "é", "x" * 30]), max_size=30).map(
        " ".join
    ),
    min_size=1,
    max_size=9,
)


@pytest.fixture(scope="module")
def double() -> CLIP:
    """A small CLIP with weights large enough to matter, in float64."""
    model = wordsight.create("clip-tiny")
    with torch.no_grad():
        for parameter in model.text_tower.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double()


def features(model: CLIP, texts: Sequence[str], batch_tokens: int) -> Tensor:
    """[N, D] in the model's own precision, in the order of the texts, by the shared computation alone."""
    rows_NL, row_M = text_classifier._sorted_rows(model.tokenize(list(texts)).numpy())
    trees = [text_classifier._Tree(rows_NL[part]) for part in text_classifier._batches(rows_NL, batch_tokens)]
    with torch.inference_mode():
        found = [text_classifier.encode_tree(model.text_tower, tree, torch.device("cpu")) for tree in trees]
    return torch.cat(found)[torch.from_numpy(row_M)]


@given(names=NAMES, batch_tokens=st.sampled_from([1, 7, 100, 4096]))
@settings(max_examples=25, deadline=None)
def test_it_is_the_plain_tower_in_float64(double: CLIP, names: list[str], batch_tokens: int) -> None:
    texts = [template.replace("{label}", name) for name in names for template in TEMPLATES]
    with torch.inference_mode():
        plain_MD = double.text_tower(double.tokenize(texts))
    assert plain_MD.abs().max() > 0.1
    assert torch.allclose(features(double, texts, batch_tokens), plain_MD, rtol=0, atol=1e-10)


def test_it_is_the_plain_computation_in_float32_and_of_open_clips_builder() -> None:
    """Against `embed_texts` and open_clip's `build_zero_shot_classifier` on the same tower."""
    from open_clip import build_zero_shot_classifier

    model = wordsight.create("clip-tiny")
    found = prompt_set("imagenet")
    classes, templates = found.classes[::90], found.templates[::4]
    texts = [template.replace("{label}", name) for name in classes for template in templates]
    assert torch.allclose(embed_prompts(model, texts), embed_texts(model, texts), rtol=0, atol=1e-6)
    theirs_DC = build_zero_shot_classifier(
        model, model.tokenize, classes, [lambda name, t=template: t.replace("{label}", name) for template in templates]
    )
    assert torch.allclose(class_embeddings(model, classes, templates), theirs_DC.T, rtol=0, atol=1e-5)


def test_every_beginning_is_computed_once() -> None:
    """The packed tokens of one batch are exactly the different beginnings of the rows."""
    model = wordsight.create("clip-tiny")
    texts = [template.replace("{label}", name) for name in prompt_set("cifar100").classes for template in TEMPLATES]
    rows_NL, _ = text_classifier._sorted_rows(model.tokenize(texts).numpy())
    rows = [tuple(row[row >= 0].tolist()) for row in rows_NL]
    beginnings = {row[:end] for row in rows for end in range(1, len(row) + 1)}
    tree = text_classifier._Tree(rows_NL)
    assert len(tree.tokens) == len(beginnings) < sum(map(len, rows)) / 2
    # and each row is found again along its path
    for one in tree.shapes:
        for path in one.path.view(one.count, one.length):
            assert tuple(tree.tokens[path].tolist()) in set(rows)
            assert tree.positions[path].tolist() == list(range(one.length))


def test_batches_are_of_the_texts_alone_and_hold_about_what_they_should() -> None:
    rows = np.array([[1, 2, 9, -1], [1, 3, 4, 9], [1, 3, 5, 9], [2, 9, -1, -1]])
    assert text_classifier._shared(rows).tolist() == [0, 1, 2, 0]
    assert text_classifier._batches(rows, 1) == [slice(i, i + 1) for i in range(4)]
    assert text_classifier._batches(rows, 5) == [slice(0, 2), slice(2, 4)]
    assert text_classifier._batches(rows, 1000) == [slice(0, 4)]


def test_other_towers_and_other_encoders_go_the_plain_way() -> None:
    clip = wordsight.create("clip-tiny")
    assert shares_beginnings(clip)

    class Other(CLIP):
        def encode_text(self, tokens: Tensor, *, normalize: bool = True) -> Tensor:
            return super().encode_text(tokens, normalize=normalize) * 2

    other = Other(clip.config)
    other.tokenizer = clip.tokenizer
    assert not shares_beginnings(other)
    assert not shares_beginnings(SimpleNamespace())
    texts = ["a cat", "a dog", "a cat"]
    assert torch.equal(embed_prompts(other, texts), embed_texts(other, texts))
    hooked = copy.deepcopy(clip)
    hooked.text_tower.register_forward_hook(lambda module, inputs, output: -output)
    assert not shares_beginnings(hooked)
    assert torch.equal(embed_prompts(hooked, texts), embed_texts(hooked, texts))


def test_a_head_over_the_tower_is_applied() -> None:
    class Headed(nn.Module):
        def __init__(self, trunk: nn.Module, head: nn.Module) -> None:
            super().__init__()
            self.trunk, self.head = trunk, head

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.trunk(tokens))

    class Model(DualEncoderMixin, nn.Module):
        def __init__(self, clip: CLIP) -> None:
            super().__init__()
            self.config, self.tokenizer, self.image_tower = clip.config, clip.tokenizer, clip.image_tower
            self.log_scale, self.logit_bias = clip.log_scale, None
            trunk = TextTransformer(TextConfig(width=64, num_layers=1, num_heads=2), 32, "gelu")
            self.text_tower = Headed(trunk, nn.Linear(32, 24))

    model = Model(wordsight.create("clip-tiny"))
    assert shares_beginnings(model)
    texts = ["a cat on a mat", "a cat", "a dog"]
    assert torch.allclose(embed_prompts(model, texts), embed_texts(model, texts), rtol=0, atol=1e-6)


def test_wrong_input_is_named() -> None:
    model = wordsight.create("clip-tiny")
    with pytest.raises(ValueError, match="no texts"):
        embed_prompts(model, [])
    with pytest.raises(ValueError, match="batch_tokens must be at least 1, got 0"):
        embed_prompts(model, ["a"], batch_tokens=0)
    with pytest.raises(ValueError, match="the class 'cat' has no name"):
        class_embeddings(model, ["cat"], ["{label}"], names={"cat": ()})
    model.text_tower.projection.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="infinite or undefined"):
        embed_prompts(model, ["a cat"])


def test_vectors_by_template_and_classes_of_several_names(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wordsight.create("clip-tiny")
    classes, names = ["cat", "happy", "dog"], {"happy": ("happy", "smiling")}
    found_CTD = prompt_embeddings(model, classes, TEMPLATES, names=names)
    assert found_CTD.shape[:2] == (3, len(TEMPLATES))
    alone_TD = embed_texts(model, [template.replace("{label}", "dog") for template in TEMPLATES])
    assert torch.allclose(found_CTD[2], alone_TD, atol=1e-6)
    several = [embed_texts(model, [f"a photo of a {name}."])[0] for name in names["happy"]]
    assert torch.allclose(found_CTD[1, 1], (several[0] + several[1]) / 2, atol=1e-6)
    whole_CD = class_embeddings(model, classes, TEMPLATES, names=names)
    assert torch.allclose(whole_CD.norm(dim=1), torch.ones(3), atol=1e-6)
    monkeypatch.setattr("wordsight.evaluate.prompts.TEXTS_AT_ONCE", 1)
    assert torch.allclose(class_embeddings(model, classes, TEMPLATES, names=names), whole_CD, atol=1e-6)
