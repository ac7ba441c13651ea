"""OpenAI's archives and state dicts, open_clip's bare state dicts: the reference's outputs, or an error that says the mend."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import wordsight
from tests.interop.reference import RESNET_CFG, TEXTS, VIT_CFG, difference, open_clip_model, outputs, picture, torchscript
from wordsight.interop.safe_read import CheckpointError

EXTRA = {"input_resolution": torch.tensor(64), "context_length": torch.tensor(77), "vocab_size": torch.tensor(49408)}


@pytest.mark.parametrize("vision", [VIT_CFG, RESNET_CFG], ids=["vit", "resnet"])
def test_archive_gives_the_reference_s_outputs(tmp_path: Path, vision: dict) -> None:
    state = torchscript(open_clip_model(vision), tmp_path / "archive.pt")
    assert state["visual.conv1.weight"].dtype == torch.float16
    reference = open_clip_model(vision)
    reference.load_state_dict({k: v.float() for k, v in state.items()})
    model = wordsight.load(tmp_path / "archive.pt")
    assert model.config.activation == "quick_gelu"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training
    pixels, tokens = torch.stack([model.preprocess(picture(i)) for i in range(2)]), model.tokenize(TEXTS)
    assert difference(outputs(reference, pixels, tokens), outputs(model, pixels, tokens)) < 1e-5
    assert model.log_scale.item() == reference.logit_scale.item()
    assert model.logit_bias is None


def test_archive_of_a_gelu_model_is_told_by_its_classes(tmp_path: Path) -> None:
    torchscript(open_clip_model(quick_gelu=False), tmp_path / "gelu.pt")
    assert wordsight.load(tmp_path / "gelu.pt").config.activation == "gelu"


def test_openai_state_dict_is_told_by_its_extra_keys(tmp_path: Path) -> None:
    reference = open_clip_model()
    state = {k: v.half() for k, v in reference.state_dict().items()}
    torch.save({**state, **EXTRA}, tmp_path / "state.pt")
    model = wordsight.load(tmp_path / "state.pt")
    assert model.config.activation == "quick_gelu"
    assert torch.equal(model.image_tower.projection, state["visual.proj"].float())


def test_bare_state_dict_must_be_named_because_shapes_do_not_tell_the_activation(tmp_path: Path) -> None:
    reference = open_clip_model()
    torch.save(reference.state_dict(), tmp_path / "bare.pt")
    with pytest.raises(CheckpointError, match="does not say its activation"):
        wordsight.load(tmp_path / "bare.pt")


def published(tmp_path: Path, name: str = "clip-tiny", **changes: torch.Tensor | None) -> Path:
    """A bare state dict in OpenAI's names of a catalogued model, with some tensors replaced or (None) taken away."""
    from wordsight.interop import openai

    state = {**openai.to_theirs(wordsight.create(name).state_dict()), **changes}
    save_file({k: v.contiguous() for k, v in state.items() if v is not None}, tmp_path / "bare.safetensors")
    return tmp_path / "bare.safetensors"


def test_the_error_for_a_bare_state_dict_names_both_models_where_shapes_tell_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from wordsight import catalog

    wide = replace(
        catalog.find("clip-tiny").config,
        image=replace(catalog.find("clip-tiny").config.image, width=64, num_heads=1),
        text=replace(catalog.find("clip-tiny").config.text, width=64, num_heads=1),
    )
    entries = {
        n: replace(catalog.find("clip-tiny"), name=n, config=replace(wide, activation=a))
        for n, a in (("wide", "quick_gelu"), ("wide-gelu", "gelu"))
    }
    monkeypatch.setattr(catalog, "CATALOG", {**catalog.CATALOG, **entries})
    path = published(tmp_path, "wide")
    with pytest.raises(CheckpointError, match=r"model='wide' \(QuickGELU\) or model='wide-gelu' \(GELU\)"):
        wordsight.load(path)
    with pytest.warns(UserWarning, match="CLIP's"):
        assert wordsight.load(path, model="wide-gelu").config.activation == "gelu"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"visual.proj": None}, "missing: image_tower.projection"),
        ({"more.weight": torch.zeros(1)}, "surplus: more.weight"),
        ({"logit_bias": torch.zeros(1)}, "surplus: logit_bias.*SigLIP"),
        ({"ln_final.weight": torch.zeros(9)}, r"misshaped: text_tower.norm_final.weight is \(9,\), must be \(32,\)"),
        ({"visual.positional_embedding": torch.zeros(50, 32)}, "position_embedding is .*resize_positions"),
        ({"token_embedding.weight": torch.zeros(1000, 32)}, "token_embedding.weight is .1000, 32., must be .49408, 32."),
        ({"ln_final.bias": torch.zeros(32, dtype=torch.int32)}, "not floating point: text_tower.norm_final.bias"),
        ({"visual.trunk.norm.weight": torch.zeros(1)}, "surplus: visual.trunk.norm.weight.*timm"),
    ],
)
def test_what_does_not_fit_the_named_model_is_named(tmp_path: Path, changes: dict, says: str) -> None:
    assert wordsight.load(published(tmp_path), model="clip-tiny").config == wordsight.create("clip-tiny").config
    with pytest.raises(CheckpointError, match=says):
        wordsight.load(published(tmp_path, **changes), model="clip-tiny")


def test_wrong_name_is_told_with_the_right_one(tmp_path: Path) -> None:
    """The weights of a ResNet named as a ViT; an activation that the file itself contradicts; an unknown name."""
    with pytest.raises(CheckpointError, match=r"does not fit its architecture .clip-tiny.*missing: image_tower.class_token"):
        wordsight.load(published(tmp_path, "clip-tiny-resnet"), model="clip-tiny")
    torch.save({**open_clip_model().state_dict(), **EXTRA}, tmp_path / "openai.pt")
    with pytest.raises(CheckpointError, match=r"quick_gelu says the file itself .*gelu says the model= .*model='ViT-B/32'"):
        wordsight.load(tmp_path / "openai.pt", model="ViT-B/32-gelu")
    with pytest.raises(ValueError, match="did you mean ViT-B/32"):
        wordsight.load(tmp_path / "openai.pt", model="ViT-B/23")


def test_head_width_that_shapes_can_not_tell(tmp_path: Path) -> None:
    state = {k: v.contiguous() for k, v in wordsight_names(wordsight.create("clip-tiny")).items()}
    save_file({**state, **EXTRA}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"not multiples of 64.*model=NAME"):
        wordsight.load(tmp_path / "x.safetensors")


def wordsight_names(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    from wordsight.interop import openai

    return openai.to_theirs(model.state_dict())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_training_checkpoint_of_several_processes(tmp_path: Path) -> None:
    reference = wordsight.create("clip-tiny", seed=3)
    state = {f"module.{k}": v for k, v in wordsight_names(reference).items()}
    state["module.attn_mask"] = torch.zeros(77, 77)  # some versions of open_clip store it
    torch.save(
        {"epoch": 7, "name": "run", "state_dict": state, "optimizer": {"state": {}}, "scaler": {"scale": 65536.0}},
        tmp_path / "epoch_7.pt",
    )
    model = wordsight.load(tmp_path / "epoch_7.pt", model="clip-tiny")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), reference.state_dict().values(), strict=True))
    torch.save(
        {k.replace("module.", "text." if "visual" not in k and "scale" not in k else ""): v for k, v in state.items()},
        tmp_path / "custom.pt",
    )
    custom = wordsight.load(tmp_path / "custom.pt", model="clip-tiny")
    assert torch.equal(custom.text_tower.projection, reference.text_tower.projection)
