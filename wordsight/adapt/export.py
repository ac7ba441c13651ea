"""A fitted classifier for programs without Wordsight: class vectors as plain arrays, or image tower and head as ONNX.

Shape legend: B pictures, C classes, D feature width, S image side in pixels.
"""

from __future__ import annotations

import io
import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from wordsight.adapt.features import LAYERS, encoder
from wordsight.evaluate.modes import judging
from wordsight.evaluate.results import write_atomically

NEEDED = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4  # of a logit, beside the largest one
EMBEDDED_BYTES = 1_900_000_000  # a file of ONNX's own format holds less than 2 GiB; weights beyond this go beside it
OPSET = 18


def to_arrays(classifier: Any, folder: str | os.PathLike[str]) -> Path:
    """Write what a classifier on given features needs: logits = scale * features @ vectors.T + bias.

    Methods whose logits are linear in the features have such a form (`linear_head`): zero-shot, CoOp, the probes.

    Args:
        classifier: fitted.
        folder: made if need be; gets `classifier.npz` (float32 `vectors` [C, D], `bias` [C], `scale`) and `classes.json` (class
            names in order, whether features are normalised first, which layer they are of, preprocessing).

    Returns:
        The folder.

    Raises:
        ValueError: the logits are not linear in the features.
    """
    vectors_CD, scale, bias_C = classifier.linear_head()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".classifier.npz"  # NumPy adds .npz to any other ending
    np.savez(temporary, vectors=vectors_CD.numpy(), bias=bias_C.numpy(), scale=np.float32(scale))
    os.replace(temporary, folder / "classifier.npz")
    write_atomically(folder / "classes.json", json.dumps(_description(classifier), indent=1, ensure_ascii=False) + "\n")
    return folder


def to_onnx(classifier: Any, path: str | os.PathLike[str]) -> Path:
    """Write the image tower with its head: "pixels" float32 [B, 3, S, S], RGB in [0, 1] -> "logits" float32 [B, C].

    The model's normalisation is inside; decoding, resizing and cropping are not. Class names and preprocessing lie in the file's
    metadata (`wordsight`, JSON). What was written is run with onnxruntime and compared with PyTorch.

    Args:
        classifier: fitted, with its model.
        path: of the file.

    Returns:
        The path.

    Raises:
        ValueError: a package is not installed, the method can't be written as ONNX (CoCoOp, the decoder), or the file's logits
            differ from PyTorch's by more than 1e-4 of the largest.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ValueError(f"ONNX needs {', '.join(missing)}: install the extra, `pip install 'wordsight[onnx]'`")
    if classifier.model is None:
        raise ValueError("ONNX takes the image tower too, and the classifier has no model: load it with model=")
    if classifier.layer not in LAYERS:
        raise ValueError(f"{type(classifier).__name__} reads {classifier.layer}, of which no ONNX is written")
    import onnx

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with judging(classifier.model) as device, torch.inference_mode(False), torch.no_grad():
        head = _TowerAndHead(classifier)
        size = classifier.model.preprocessor.image_size_px
        example = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
        program = _export(head, example)
        expected = head(example).float().cpu().numpy()
    metadata = onnx.StringStringEntryProto(key="wordsight", value=json.dumps(_description(classifier), ensure_ascii=False))
    outside = sum(p.numel() * p.element_size() for p in head.parameters()) > EMBEDDED_BYTES
    temporary = path.with_name(f".{path.name}")
    model = program.model_proto
    model.metadata_props.append(metadata)
    onnx.save(model, temporary, save_as_external_data=outside, location=f"{path.name}.data")
    _compare(temporary, example.cpu().numpy(), expected)
    os.replace(temporary, path)
    return path


class _TowerAndHead(nn.Module):
    """Pixels in [0, 1] -> logits, as the estimator computes them."""

    def __init__(self, classifier: Any) -> None:
        super().__init__()
        self.model = classifier.model
        self._classifier, self._encode = classifier, encoder(classifier.model, classifier.layer)

    def forward(self, pixels: Tensor) -> Tensor:
        features_BD = self._encode(self.model.preprocessor.normalize(pixels)).float()
        if self._classifier.unit_length:
            features_BD = normalize(features_BD, dim=1)
        return self._classifier._logits(features_BD)


def _export(head: _TowerAndHead, example: Tensor) -> Any:
    """The program, traced for any number of pictures; what the exporter says meanwhile is for its developers."""
    from torch.onnx import OnnxExporterError

    batch = torch.export.Dim("batch", min=1)
    with warnings.catch_warnings(), _silent_logs(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            return torch.onnx.export(
                head,
                (example,),
                input_names=["pixels"],
                output_names=["logits"],
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=({0: batch},),
                verbose=False,
            )
        except OnnxExporterError as error:
            raise ValueError(
                f"{type(head._classifier).__name__} on {type(head.model).__name__} can't be written as ONNX: what it does "
                "depends on the picture (CoCoOp runs the text tower for each), or uses an operation that the exporter lacks"
            ) from error


@contextmanager
def _silent_logs() -> Iterator[None]:
    """Without the log lines of all libraries, and with them again."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _compare(path: Path, pixels: np.ndarray, expected: np.ndarray) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"pixels": pixels})
    difference = float(np.abs(found - expected).max())
    allowed = TOLERANCE * max(1.0, float(np.abs(expected).max()))
    if not difference <= allowed:
        raise ValueError(
            f"onnxruntime's logits differ from PyTorch's by {difference:.2g}, more than {allowed:.2g}: {path} is not kept"
        )


def _description(classifier: Any) -> dict[str, Any]:
    """What a program has to know beside the numbers."""
    preprocessor = None if classifier.model is None else classifier.model.preprocessor.to_config()
    return {
        "classes": [str(name) for name in classifier.classes_],
        "normalize": bool(classifier.unit_length),
        "layer": classifier.layer,
        "num_features": int(classifier.n_features_in_),
        "preprocess": preprocessor,
    }
