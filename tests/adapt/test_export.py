"""A classifier for programs without Wordsight: plain arrays by the guide's own script, and ONNX by onnxruntime."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import CliRunner

import wordsight
from tests.adapt.make import colour_folders
from wordsight.adapt import CoCoOp, CoOp, LinearProbe, ZeroShot, export
from wordsight.adapt.export import to_arrays, to_onnx
from wordsight.cli.export import command

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "few_labels.md"
CLASSES = ["red", "green", "blue", "grey"]


@pytest.fixture(scope="module")
def model() -> Any:
    return wordsight.create("clip-tiny")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[str]]:
    root = colour_folders(tmp_path_factory.mktemp("colours"), {"train": 4})
    paths = sorted(root.glob("train/*/*.png"))
    return [str(path) for path in paths], [path.parent.name for path in paths]


def guide_script(reads: str) -> str:
    """The block of the guide that reads a file."""
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    (script,) = [block for block in blocks if reads in block]
    return script


@pytest.mark.parametrize("method", ["zero_shot", "coop", "linear_probe"])
def test_the_guides_script_names_pictures_without_the_text_tower(
    tmp_path: Path, model: Any, pictures: tuple[list[str], list[str]], method: str
) -> None:
    paths, labels = pictures
    classifier = {
        "zero_shot": ZeroShot(model, CLASSES),
        "coop": CoOp(model, num_context_tokens=2, epochs=2),
        "linear_probe": LinearProbe(model, layer="projected", C=1.0),
    }[method].fit(paths, labels)
    to_arrays(classifier, tmp_path / "photos")
    np.save(tmp_path / "features.npy", model.encode_image(_pixels(model, paths), normalize=False).detach().numpy())
    script = guide_script("classifier.npz")
    assert len([line for line in script.splitlines() if line.strip()]) <= 10
    assert "import wordsight" not in script
    check = (
        "\nassert 'torch' not in __import__('sys').modules\njson.dump([names, probabilities.tolist()], open('out.json', 'w'))\n"
    )
    subprocess.run([sys.executable, "-c", script + check], cwd=tmp_path, check=True)
    names, probabilities = json.loads((tmp_path / "out.json").read_text())
    assert names == classifier.predict(paths).tolist()
    np.testing.assert_allclose(probabilities, classifier.predict_proba(paths), rtol=1e-4, atol=1e-6)


def test_arrays_describe_themselves(tmp_path: Path, model: Any) -> None:
    classifier = ZeroShot(model, CLASSES).fit()
    to_arrays(classifier, tmp_path)
    told = json.loads((tmp_path / "classes.json").read_text())
    assert told["classes"] == sorted(CLASSES)
    assert told["normalize"] is True
    assert told["preprocess"]["image_size_px"] == model.preprocessor.image_size_px
    found = np.load(tmp_path / "classifier.npz")
    assert found["vectors"].shape == (4, told["num_features"])
    np.testing.assert_allclose(np.linalg.norm(found["vectors"], axis=1), 1, rtol=1e-5)
    assert found["scale"] == pytest.approx(float(model.log_scale.detach().exp()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classes.json", "classifier.npz"]


def test_logits_that_are_not_linear_have_no_arrays(tmp_path: Path, model: Any) -> None:
    classifier = ZeroShot(model, CLASSES).fit()
    del classifier.class_vectors_
    with pytest.raises(ValueError, match="no linear function"):
        to_arrays(classifier, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def _pixels(model: Any, paths: list[str]) -> torch.Tensor:
    from PIL import Image

    return torch.stack([model.preprocess(Image.open(path)) for path in paths])


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory, model: Any) -> Path:
    """The file that the command writes of a run's classifier; the exporter is slow to start, so there is one."""
    root = tmp_path_factory.mktemp("onnx")
    ZeroShot(model, CLASSES).fit().save(root / "run" / "classifier")
    done = CliRunner().invoke(command, ["--run", str(root / "run"), "--to", "onnx", "--out", str(root / "out" / "photos.onnx")])
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in (root / "out").iterdir()) == ["photos.onnx"]
    return root / "out" / "photos.onnx"


def test_onnxruntime_gives_pytorchs_logits_for_any_batch(
    onnx_file: Path, model: Any, pictures: tuple[list[str], list[str]]
) -> None:
    from PIL import Image

    paths, _ = pictures
    classifier = ZeroShot(model, CLASSES).fit()
    session = onnxruntime.InferenceSession(onnx_file)
    told = json.loads(session.get_modelmeta().custom_metadata_map["wordsight"])
    assert told["classes"] == sorted(CLASSES)
    preprocessor = model.preprocessor
    pixels = np.stack([preprocessor.to_uint8(Image.open(path)).numpy() for path in paths]).astype(np.float32) / 255
    for batch in (1, 3, len(paths)):
        (logits,) = session.run(["logits"], {"pixels": pixels[:batch]})
        np.testing.assert_allclose(logits, classifier.logits(paths[:batch]).numpy(), atol=1e-4)
        assert [told["classes"][i] for i in logits.argmax(1)] == classifier.predict(paths[:batch]).tolist()


def test_the_guides_onnx_script_runs(onnx_file: Path, model: Any, tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "photos.onnx").write_bytes(onnx_file.read_bytes())
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(tmp_path / "cat.png")
    done = subprocess.run(
        [sys.executable, "-c", guide_script("photos.onnx")], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == ZeroShot(model, CLASSES).fit().predict([tmp_path / "cat.png"])[0]


def test_a_file_that_differs_from_pytorch_is_not_kept(onnx_file: Path, model: Any) -> None:
    pixels = np.random.default_rng(0).random((2, 3, *[model.preprocessor.image_size_px] * 2), dtype=np.float32)
    (right,) = onnxruntime.InferenceSession(onnx_file).run(["logits"], {"pixels": pixels})
    export._compare(onnx_file, pixels, right + 5e-5)
    with pytest.raises(ValueError, match=r"differ from PyTorch's by 0\.01"):
        export._compare(onnx_file, pixels, right + 1e-2)


def test_a_head_that_runs_the_text_tower_is_refused_in_a_sentence(
    tmp_path: Path, model: Any, pictures: tuple[list[str], list[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    classifier = CoCoOp(model, num_context_tokens=2, epochs=1).fit(*pictures)
    with pytest.raises(ValueError, match="CoCoOp on CLIP can't be written as ONNX"):
        to_onnx(classifier, tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []
    said = "".join(capfd.readouterr())
    assert len(said) < 200, "nothing of the exporter's own words"


def test_without_the_extra_the_error_names_it(tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(ValueError, match=r"ONNX needs onnxscript: install the extra, `pip install 'wordsight\[onnx\]'`"):
        to_onnx(ZeroShot(model, CLASSES).fit(), tmp_path / "a.onnx")


def test_help_fits_a_screen_and_has_two_examples() -> None:
    text = CliRunner().invoke(command, ["--help"]).output
    assert len(text.splitlines()) <= 40
    assert text.count("wordsight export --run") == 2
