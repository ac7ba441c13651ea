"""Prompt templates and their ensembling in embedding space."""

from pathlib import Path

import pytest
import torch

from tests.evaluate.conftest import ColourModel
from wordsight.evaluate.prompts import class_embeddings, prompt_templates


def test_the_80_templates_are_the_published_ones() -> None:
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    ours = prompt_templates("imagenet80")
    assert [template.replace("{label}", "X{}Y") for template in ours] == [
        template("X{}Y") for template in OPENAI_IMAGENET_TEMPLATES
    ]
    assert len(ours) == 80


def test_named_sets_files_and_lists(tmp_path: Path) -> None:
    assert prompt_templates("simple") == ("A photo of a {label}.",)
    assert prompt_templates("name") == ("{label}",)
    (tmp_path / "prompts.txt").write_text("# mine\n\n a {label} \nthe {label}, {drawn}\n", encoding="utf-8")
    assert prompt_templates(tmp_path / "prompts.txt") == ("a {label}", "the {label}, {drawn}")
    assert prompt_templates(str(tmp_path / "prompts.txt")) == ("a {label}", "the {label}, {drawn}")
    assert prompt_templates(["x {label}"]) == ("x {label}",)


@pytest.mark.parametrize(
    ("prompts", "said"), [("simpel", "simple, name, imagenet80"), ([], "at least one"), (["a photo"], "{label}")]
)
def test_wrong_prompts_say_what_is_allowed(prompts: str | list[str], said: str) -> None:
    with pytest.raises(ValueError) as error:
        prompt_templates(prompts)
    assert said in str(error.value)


def test_ensembling_is_open_clips(model: ColourModel) -> None:
    """Mean of the unit vectors, made a unit vector again, against open_clip's build_zero_shot_classifier."""
    from open_clip import build_zero_shot_classifier

    class Theirs(ColourModel):
        def encode_text(self, tokens: torch.Tensor, *, normalize: bool = True) -> torch.Tensor:
            return torch.nn.functional.normalize(super().encode_text(tokens), dim=-1)

    classes, templates = ["red", "green", "no colour", "blue {}"], ("{label}", "{label} and yellow", "grey {label}")
    ours = class_embeddings(model, classes, templates, batch_size=3)
    theirs = build_zero_shot_classifier(
        Theirs().eval(), model.tokenize, classes, [lambda c, t=t: t.replace("{label}", c) for t in templates]
    )
    assert torch.allclose(ours, theirs.T, atol=1e-6)
    assert torch.equal(ours, class_embeddings(model, classes, templates, batch_size=1000))
