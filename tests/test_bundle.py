"""Load, save, create, convert: bit-equal round trips, nothing global touched, whole folders or none, names found locally."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import wordsight
from wordsight import bundle, catalog
from wordsight.data.transform import Preprocess
from wordsight.interop import local_files, openai, own
from wordsight.interop.safe_read import CheckpointError


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(x[k].dtype == y[k].dtype and torch.equal(x[k], y[k]) for k in x)


# ------------------------------------------------------------------------------------------------------------------- create


@pytest.mark.parametrize("name", ["clip-tiny", "clip-tiny-resnet"])
def test_create_gives_a_model_ready_to_use(name: str) -> None:
    model = wordsight.create(name)
    assert not model.training
    pixels = model.preprocess(Image.new("RGBA", (50, 40), (255, 0, 0, 128)))[None]
    with torch.no_grad():
        image, text = model.encode_image(pixels), model.encode_text(model.tokenize(["a red square"]))
    assert torch.allclose(image.norm(dim=-1), torch.ones(1))
    assert torch.allclose(text.norm(dim=-1), torch.ones(1))
    assert model.logit_bias is None
    assert model.log_scale.item() == pytest.approx(2.6593, abs=1e-4)


def test_create_is_a_function_of_its_seed_and_touches_no_global_state() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = wordsight.create("clip-tiny", seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert same(first, wordsight.create("clip-tiny", seed=1))
    assert not same(first, wordsight.create("clip-tiny", seed=2))


def test_create_from_a_config_and_from_an_unknown_name() -> None:
    config = replace(catalog.find("clip-tiny").config, activation="gelu")
    assert wordsight.create(config).config.activation == "gelu"
    with pytest.raises(ValueError, match="did you mean clip-tiny"):
        wordsight.create("clip-tinny")


# ------------------------------------------------------------------------------------------------------------- save and load


@pytest.mark.parametrize("name", ["clip-tiny", "clip-tiny-resnet"])
def test_save_and_load_are_bit_equal_and_say_everything(tmp_path: Path, name: str) -> None:
    model = wordsight.create(name, seed=4)
    model.preprocessor = Preprocess(
        image_size_px=model.config.image.image_size_px, mean=(0.1, 0.2, 0.3), interpolation="bilinear"
    )
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.num_batches_tracked.fill_(17)
    assert wordsight.save(model, tmp_path / "m") == tmp_path / "m"
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["model.safetensors", "tokenizer.json", "wordsight.json"]
    loaded = wordsight.load(tmp_path / "m")
    assert same(model, loaded)
    assert loaded.config == model.config
    assert loaded.preprocessor == model.preprocessor
    assert loaded.tokenizer.to_config() == model.tokenizer.to_config()
    texts = ["a photo", "&amp; <b> naïve 猫", ""]
    assert torch.equal(loaded.tokenize(texts), model.tokenize(texts))
    assert not loaded.training
    assert all(p.requires_grad for p in loaded.parameters())
    said = json.loads((tmp_path / "m" / "wordsight.json").read_text())
    assert said["activation"] == "quick_gelu"
    assert said["provenance"]["source"] == "created by wordsight.create, seed 4"
    assert {"architecture", "tokenizer", "preprocess", "provenance"} <= said.keys()
    wordsight.save(loaded, tmp_path / "again")  # the same bytes, and the origin is remembered
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "m" / "model.safetensors").read_bytes()
    assert json.loads((tmp_path / "again" / "wordsight.json").read_text())["provenance"]["source"].startswith("created by")


def test_loading_draws_no_random_number_and_keeps_no_map_of_the_file(tmp_path: Path) -> None:
    wordsight.save(wordsight.create("clip-tiny"), tmp_path / "m")
    state = torch.get_rng_state()
    model = wordsight.load(tmp_path / "m")
    assert torch.equal(torch.get_rng_state(), state)
    before = model.log_scale.item()
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(b"\0" * weights.stat().st_size)
    assert model.log_scale.item() == before
    assert model.text_tower.token_embedding.weight.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights_stay_narrow_on_disk_and_run_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    model = wordsight.create("clip-tiny").to(dtype)
    wordsight.save(model, tmp_path / "m")
    assert {t.dtype for t in load_file(tmp_path / "m" / "model.safetensors").values()} == {dtype}
    loaded = wordsight.load(tmp_path / "m")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert all(torch.equal(a.float(), b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_float64_is_rounded_aloud(tmp_path: Path) -> None:
    wordsight.save(wordsight.create("clip-tiny").double(), tmp_path / "m")
    with pytest.warns(UserWarning, match="float64 and was rounded"):
        wordsight.load(tmp_path / "m")


def test_run_folder_gives_the_best_model_else_the_last(tmp_path: Path) -> None:
    last, best = wordsight.create("clip-tiny", seed=1), wordsight.create("clip-tiny", seed=2)
    wordsight.save(last, tmp_path / "run" / "last")
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    assert same(wordsight.load(tmp_path / "run"), last)
    wordsight.save(best, tmp_path / "run" / "best")
    assert same(wordsight.load(str(tmp_path / "run")), best)


def test_a_model_without_its_parts_is_not_saved(tmp_path: Path) -> None:
    model = wordsight.create("clip-tiny")
    model.preprocessor = None
    with pytest.raises(ValueError, match=r"no preprocessor: set model\.preprocessor"):
        wordsight.save(model, tmp_path / "m")
    model.preprocessor = Preprocess(image_size_px=64)
    with pytest.raises(ValueError, match="pictures of 64 px, the image tower takes 32 px"):
        wordsight.save(model, tmp_path / "m")
    model = wordsight.create("clip-tiny")
    model.tokenizer = type(model.tokenizer).clip(context_length=20)
    with pytest.raises(ValueError, match="makes 20 tokens a text, the text tower takes 32"):
        wordsight.save(model, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_missing_tokenizer_and_preprocessing_become_clip_s_aloud(tmp_path: Path) -> None:
    wordsight.save(wordsight.create("clip-tiny"), tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").unlink()
    change(tmp_path / "m", preprocess=None, tokenizer=None)
    with pytest.warns(UserWarning, match="CLIP's") as notes:
        model = wordsight.load(tmp_path / "m")
    assert len(notes) == 2
    assert model.tokenize(["a cat"])[0, :4].tolist() == [49406, 320, 2368, 49407]


def change(folder: Path, **values: object) -> None:
    path = folder / "wordsight.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"activation": "gelu"}, "contradicts itself: activation 'gelu', architecture.activation 'quick_gelu'"),
        ({"format_version": 2}, "version 2; this wordsight .* reads 'wordsight', version 1"),
        ({"format": "other"}, "format 'other'"),
        ({"architecture": {}}, "image tower type None"),
        ({"preprocess": {"size": 3}}, "unknown preprocessing key 'size'"),
        ({"preprocess": {"image_size_px": 64}}, "pictures of 64 px, the image tower takes 32 px"),
        ({"tokenizer": {"context_length": 77}}, "makes 77 tokens a text, the text tower takes 32"),
    ],
)
def test_damaged_configs_are_named(tmp_path: Path, values: dict, says: str) -> None:
    wordsight.save(wordsight.create("clip-tiny"), tmp_path / "m")
    change(tmp_path / "m", **values)
    with pytest.raises(CheckpointError, match=says):
        wordsight.load(tmp_path / "m")


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    wordsight.save(wordsight.create("clip-tiny"), tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    state = load_file(weights)
    save_file({k: v for k, v in state.items() if "norm_post" not in k} | {"extra": torch.ones(1)}, weights)
    with pytest.raises(
        CheckpointError, match=r"missing: image_tower\.norm_post\.\w+, image_tower\.norm_post\.\w+\. surplus: extra"
    ):
        wordsight.load(tmp_path / "m")
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        wordsight.load(tmp_path / "m")
    (tmp_path / "m" / "wordsight.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not a JSON file"):
        wordsight.load(tmp_path / "m")


def test_weights_file_alone_needs_its_config_or_a_name(tmp_path: Path) -> None:
    model = wordsight.create("clip-tiny")
    wordsight.save(model, tmp_path / "m")
    assert same(wordsight.load(tmp_path / "m" / "model.safetensors"), model)
    shutil.copy(tmp_path / "m" / "model.safetensors", tmp_path / "alone.safetensors")
    with pytest.raises(CheckpointError, match=r"without their wordsight\.json.*model=NAME"):
        wordsight.load(tmp_path / "alone.safetensors")
    with pytest.warns(UserWarning, match="CLIP's"):
        assert same(wordsight.load(tmp_path / "alone.safetensors", model="clip-tiny"), model)


def test_other_folders_and_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"no model folder: expected .* found a\.txt"):
        wordsight.load(tmp_path)
    with pytest.raises(CheckpointError, match="no file of weights"):
        wordsight.load(tmp_path / "a.txt")
    save_file({"a.weight": torch.ones(1)}, tmp_path / "resnet.safetensors")
    with pytest.raises(CheckpointError, match=r"no CLIP that is known here: its names are like a\.weight"):
        wordsight.load(tmp_path / "resnet.safetensors")


# ------------------------------------------------------------------------------------------------------------------ writing


def test_overwriting_replaces_the_model_and_nothing_else(tmp_path: Path) -> None:
    first, second = wordsight.create("clip-tiny", seed=1), wordsight.create("clip-tiny", seed=2)
    wordsight.save(first, tmp_path / "m")
    (tmp_path / "m" / "notes.txt").write_text("mine")
    wordsight.save(second, tmp_path / "m")
    assert same(wordsight.load(tmp_path / "m"), second)
    assert (tmp_path / "m" / "notes.txt").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    with pytest.raises(ValueError, match="layout of wordsight"):
        wordsight.convert(tmp_path / "m", tmp_path / "m", to="open_clip")


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = wordsight.create("clip-tiny", seed=1)
    wordsight.save(first, tmp_path / "m")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(own, "write_json", full)
    for name in ("m", "new"):
        with pytest.raises(OSError, match="No space left"):
            wordsight.save(wordsight.create("clip-tiny", seed=2), tmp_path / name)
    assert same(wordsight.load(tmp_path / "m"), first)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_crash_between_the_renames_is_never_a_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wordsight.save(wordsight.create("clip-tiny", seed=1), tmp_path / "m")
    replaced = []

    def crash(src: Path, dst: Path) -> None:
        if replaced:
            raise KeyboardInterrupt
        replaced.append(dst)
        os.rename(src, dst)

    monkeypatch.setattr(bundle.os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        wordsight.save(wordsight.create("clip-tiny", seed=2), tmp_path / "m")
    with pytest.raises(CheckpointError, match="no model folder"):
        wordsight.load(tmp_path / "m")


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    wordsight.save(wordsight.create("clip-tiny"), tmp_path / "m")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "m").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    "route", [["open_clip", "wordsight"], ["huggingface", "wordsight"], ["huggingface", "open_clip", "wordsight"]]
)
def test_convert_there_and_back_is_bit_equal(tmp_path: Path, route: list[str]) -> None:
    model = wordsight.create("clip-tiny", seed=6)
    wordsight.save(model, tmp_path / "0")
    for i, to in enumerate(route):
        wordsight.convert(tmp_path / str(i), tmp_path / str(i + 1), to=to)
    back = wordsight.load(tmp_path / str(len(route)))
    assert same(model, back)
    assert back.config == model.config
    assert back.preprocessor == model.preprocessor
    assert (tmp_path / str(len(route)) / "model.safetensors").read_bytes() == (tmp_path / "0" / "model.safetensors").read_bytes()


def test_convert_to_an_unknown_layout(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="to must be one of wordsight, open_clip, huggingface, got 'onnx'"):
        wordsight.convert(tmp_path, tmp_path / "x", to="onnx")


# -------------------------------------------------------------------------------------------------------------------- names


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder without any cache."""
    for variable in ("WORDSIGHT_CHECKPOINTS", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tiny_as_vit(monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """The tiny model under a published name, so that the places of published weights can be tried with it."""
    tiny = catalog.find("clip-tiny")
    gelu = replace(tiny, config=replace(tiny.config, activation="gelu"))
    monkeypatch.setattr(catalog, "CATALOG", {**catalog.CATALOG, "ViT-B/32": tiny, "ViT-B/32-gelu": gelu})
    return wordsight.create("clip-tiny", seed=8)


def test_a_name_without_weights_says_where_it_looked_and_how_to_get_them(home: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        wordsight.load("ViT-B/32")
    said = str(caught.value)
    for part in (
        ".cache/wordsight/ViT-B-32",
        ".cache/clip/ViT-B-32.pt",
        "models--openai--clip-vit-base-patch32",
        "hf download",
        "create('ViT-B/32')",
    ):
        assert part in said
    with pytest.raises(FileNotFoundError, match=r"no such file or folder.*did you mean ViT-B/32"):
        wordsight.load("ViT-B/33")


def write_openai(model: torch.nn.Module, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    extra = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(32), "vocab_size": torch.tensor(49408)}
    torch.save({**openai.to_theirs(model.state_dict()), **extra}, path)


@pytest.mark.parametrize("place", ["own folder", "own file", "variable", "clip cache", "hub, theirs", "hub, open_clip"])
def test_a_name_is_found_in_the_known_places(
    home: Path, tiny_as_vit: wordsight.models.contrastive.clip.CLIP, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = home / ".cache" / "huggingface" / "hub"
    wordsight.save(tiny_as_vit, home / "made")
    if place == "own folder":
        shutil.copytree(home / "made", home / ".cache" / "wordsight" / "ViT-B-32")
    elif place == "own file":
        write_openai(tiny_as_vit, home / ".cache" / "wordsight" / "ViT-B-32.pt")
    elif place == "variable":
        monkeypatch.setenv("WORDSIGHT_CHECKPOINTS", str(home / "elsewhere"))
        shutil.copytree(home / "made", home / "elsewhere" / "ViT-B-32")
    elif place == "clip cache":
        write_openai(tiny_as_vit, home / ".cache" / "clip" / "ViT-B-32.pt")
    elif place == "hub, theirs":
        wordsight.convert(home / "made", hub / "models--openai--clip-vit-base-patch32" / "snapshots" / "abc", to="huggingface")
    else:
        folder = hub / "models--timm--vit_base_patch32_clip_224.openai" / "snapshots" / "abc"
        wordsight.convert(home / "made", folder, to="open_clip")
    assert same(wordsight.load("ViT-B/32"), tiny_as_vit)
    with pytest.raises(FileNotFoundError, match="no weights of ViT-B/32-gelu"):
        wordsight.load("ViT-B/32-gelu")


def test_what_lies_under_a_name_must_be_that_model(home: Path, tiny_as_vit: torch.nn.Module) -> None:
    write_openai(tiny_as_vit, home / ".cache" / "wordsight" / "ViT-B-32-gelu.pt")
    with pytest.raises(CheckpointError, match="quick_gelu says the file itself"):
        wordsight.load("ViT-B/32-gelu")
    wordsight.save(wordsight.create("clip-tiny"), home / ".cache" / "wordsight" / "RN50")
    with pytest.raises(CheckpointError, match="not the model that was named: image tower ViT, not ResNet"):
        wordsight.load("RN50")
    with pytest.raises(ValueError, match="leave one out"):
        wordsight.load("RN50", model="RN101")


def test_a_path_goes_before_a_name(home: Path) -> None:
    wordsight.save(wordsight.create("clip-tiny", seed=3), home / "RN50")
    assert wordsight.load("RN50").config == catalog.find("clip-tiny").config


def test_every_published_name_has_places() -> None:
    clips = {name for name, entry in catalog.CATALOG.items() if catalog.system_name(entry.config) == "clip"}
    published = {n for n in clips if not n.endswith("-gelu") and not n.startswith("clip-")}
    assert published == set(local_files.PUBLISHED)
    assert local_files.file_stem("ViT-L/14@336") == "ViT-L-14-336"


def test_the_package_imports_nothing_heavy() -> None:
    code = "import sys, wordsight; assert 'torch' not in sys.modules; wordsight.load; assert 'torchvision' not in sys.modules"
    heavy = "assert not {'transformers', 'open_clip', 'matplotlib', 'pyarrow', 'tokenizers', 'ftfy', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", f"{code}; {heavy}"], check=True)
