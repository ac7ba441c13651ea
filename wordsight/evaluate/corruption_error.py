"""Accuracy under common corruptions, and the mean corruption error (Hendrycks and Dietterich, arXiv 1903.12261, section 4).

With E_{k,s} the top-1 error under kind k at severity s, E the error without corruption, and a baseline's errors E' of the same:

    CE_k = sum_s E_{k,s} / sum_s E'_{k,s}                    mCE = mean_k CE_k
    relative CE_k = sum_s (E_{k,s} - E) / sum_s (E'_{k,s} - E')

in percent. The published baseline is AlexNet on ImageNet-C; it says something of ImageNet alone. Without a baseline there is
`mean_error`, the plain mean of E_{k,s}.

Pictures are corrupted as the model sees them, after its resize and crop; or at one size for all models (`size_px`), before it.
Published are 224 px (the shorter side to 256, bilinear, and the middle) and 64 px (both sides resized, bilinear). Models of
different sizes are compared at one size only: else they take other settings, and a blur of 3 px is another blur.

Shape legend: N pictures, K kinds, S severities, C classes, D embedding width, H height, W width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from wordsight.data import Source, iterate, open_source
from wordsight.data.errors import BadReport, BadSampleError
from wordsight.data.few_shot import LabelledSet
from wordsight.data.loader import run_workers
from wordsight.data.selection import Selection
from wordsight.data.transform import Preprocess, shortest_side, to_tensor
from wordsight.evaluate.corruptions import COMMON, EXTRA, SEVERITIES, corrupt, frost_pictures, severity_size
from wordsight.evaluate.embedding import _checked, _unit, require_embedder
from wordsight.evaluate.intervals import bootstrap_interval, share_interval
from wordsight.evaluate.modes import judging
from wordsight.evaluate.prompts import class_embeddings, fill, own_prompts, prompt_templates
from wordsight.evaluate.results import Finding, Outcomes, fingerprint
from wordsight.evaluate.scoring import pair_scores
from wordsight.types import Metric, Sample

# AlexNet's top-1 errors on ImageNet-C, means over the five severities, as the published program for ImageNet-C gives them;
# without corruption 43.5% (the paper's table 1)
ALEXNET: dict[str, float] = {
    "clean": 0.435,
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
CLEAN = "clean"

Data = LabelledSet | Source | str | Path


@dataclass(frozen=True, kw_only=True)
class Corruptions:
    """Zero-shot accuracy under each kind and severity of corruption, and the mean corruption error.

    Attributes:
        kinds: of `corruptions.COMMON` and `EXTRA`; None: the 15 common ones, without frost where `frost` is None.
        severities: 1 to 5; the published error is over all five.
        size_px: the size at which pictures are corrupted, before the model's own resize and crop; None: after them.
        frost: the folder of frost's photographs, see `corruptions.frost_pictures`.
        classes: what to choose from; None: the labels of the data, sorted.
        prompts: see `prompts.prompt_templates`; None: those that the model was trained for.
        max_pictures: draw so many of the data's pictures (by `seed`); None: all. Published: all 50,000 of ImageNet's.
        baseline: "alexnet", or errors of another model: kind -> mean error over the severities, and "clean" for the relative one
            (`baseline_of` makes it from a finding); None: no mCE.
        seed: of the corruptions and of the pictures that are drawn.
        batch_size: pictures encoded at once.
        num_workers: processes that corrupt; 0 corrupts in this one.
        progress: show a bar.
    """

    kinds: Sequence[str] | None = None
    severities: Sequence[int] = SEVERITIES
    size_px: int | None = None
    frost: str | Path | None = None
    classes: Sequence[str] | None = None
    prompts: str | Path | Sequence[str] | None = None
    max_pictures: int | None = 2000
    baseline: str | Mapping[str, float] | None = None
    seed: int = 0
    batch_size: int = 64
    num_workers: int = 0
    progress: bool = False

    def __post_init__(self) -> None:
        for kind in self.kinds or ():
            if kind not in (*COMMON, *EXTRA):
                raise ValueError(f"no corruption {kind!r}: use some of {', '.join((*COMMON, *EXTRA))}")
        if "frost" in (self.kinds or ()) and self.frost is None:
            raise ValueError("frost needs the folder of its photographs: see wordsight.evaluate.corruptions.frost_pictures")
        if self.kinds is not None and (not self.kinds or len(set(self.kinds)) < len(self.kinds)):
            raise ValueError(f"kinds are one or more different ones, got {list(self.kinds)}")
        if not self.severities or not set(self.severities) <= set(SEVERITIES) or len(set(self.severities)) < len(self.severities):
            raise ValueError(f"severities are different ones of 1 to 5, got {list(self.severities)}")
        if self.baseline == "alexnet" and len(self.severities) < len(SEVERITIES):
            raise ValueError(f"AlexNet's errors are means over severities 1 to 5, got {list(self.severities)}")
        if self.size_px is not None and self.size_px < 1:
            raise ValueError(f"size_px is a side in pixels, or None for the model's own, got {self.size_px}")
        if self.max_pictures is not None and self.max_pictures < 1:
            raise ValueError(f"max_pictures is 1 or more, or None for all, got {self.max_pictures}")

    @property
    def used(self) -> tuple[str, ...]:
        """The kinds that are measured."""
        return tuple(self.kinds) if self.kinds is not None else tuple(k for k in COMMON if k != "frost" or self.frost is not None)

    def run(self, model: Any, data: Data) -> dict[str, Metric]:
        """The figures alone; see `judge`."""
        return self.judge(model, data).metrics

    def judge(self, model: Any, data: Data) -> Finding:
        """`clean_top1`, `corrupted_top1`, `mean_error`, each kind's accuracy, `mCE` and `relative_mCE` with a baseline; a table.

        Args:
            model: an Embedder with a `preprocessor`.
            data: labelled pictures. Without `classes` the labels of all of them are read first, also of those that are not
                drawn; a LabelledSet knows them.

        Raises:
            ValueError: a model without `preprocessor`, data without labels, a baseline that lacks a kind or has an error of 0.
        """
        require_embedder(model)
        if not isinstance(getattr(model, "preprocessor", None), Preprocess):
            raise ValueError(
                f"{type(model).__name__} has no preprocessor: corruption comes between its resize and its normalising"
            )
        baseline = _baseline(self.baseline, self.used)
        frost = frost_pictures(self.frost) if self.frost is not None else None
        prompts = self.prompts if self.prompts is not None else own_prompts(model)
        templates = prompt_templates(prompts)
        source = open_source(str(data)) if isinstance(data, str | Path) else data
        classes = list(self.classes) if self.classes is not None else _classes(source)
        first = model.preprocessor.to_uint8 if self.size_px is None else partial(_at_size, size_px=self.size_px)
        view = _View.read(first, source.source if isinstance(source, LabelledSet) else source, self)
        targets = torch.tensor(view.targets(classes))
        classes_CD = class_embeddings(model, classes, templates)
        asked = [(CLEAN, 0), *((kind, severity) for kind in self.used for severity in self.severities)]
        right = np.zeros((len(asked), len(targets)), bool)
        work = _Corrupter(view.pixels_NHW3, self.seed, frost, model.preprocessor if self.size_px is not None else None)
        for row, batch, pixels in _batches(work, asked, len(targets), self):
            predicted = _predict(model, pixels, classes_CD)
            right[row, batch.start : batch.stop] = (predicted == targets[batch.start : batch.stop]).numpy()
        clean_N, right_KSN = right[0], right[1:].reshape(len(self.used), len(self.severities), -1)
        side = view.pixels_NHW3.shape[1]
        protocol = self._protocol(prompts, len(templates), len(classes), side, f"{len(targets)} of {view.available}")
        probes = [fill(templates[0], name) for name in classes] + [fill(template, classes[0]) for template in templates]
        return Finding(
            task="corruptions",
            metrics=corruption_metrics(
                clean_N, right_KSN, self.used, baseline=baseline, groups=view.groups, chance=1 / len(classes)
            ),
            protocol=protocol,
            fingerprint=fingerprint(model, probes, view.listing, (protocol, classes, templates, self.used, baseline)),
            outcomes=(
                Outcomes(metric="clean_top1", keys=view.keys, values=clean_N.astype(float), groups=view.groups),
                Outcomes(metric="corrupted_top1", keys=view.keys, values=right_KSN.mean((0, 1)), groups=view.groups),
            ),
            table=_table(right_KSN, self.used, self.severities, view.groups),
            notes=_notes(self.used, side, view.skipped),
        )

    def _protocol(self, prompts: Any, templates: int, classes: int, side: int, pictures: str) -> str:
        named = prompts if isinstance(prompts, str | Path) else "given"
        what = "crops" if self.size_px is None else "pictures"
        severities = ", ".join(map(str, self.severities))
        words = [
            f"zero-shot, {classes} classes, prompts {named} ({templates}); {len(self.used)} kinds ({_without(self.used)})",
            f"severities {severities} of the set for {severity_size(side, side)} px on {what} of {side} px",
            f"seed {self.seed}",
            f"{pictures} pictures",
        ]
        if self.baseline is not None:
            words.append(f"baseline {self.baseline if isinstance(self.baseline, str) else 'given'}")
        return ", ".join(words)


def baseline_of(finding: Finding) -> dict[str, float]:
    """A baseline from what `Corruptions` found of another model: kind -> error, and "clean"."""
    errors = {row["kind"]: 1 - row["mean"] for row in finding.table}
    return {CLEAN: 1 - finding.metrics["clean_top1"].value} | errors


def corruption_metrics(
    clean_N: np.ndarray,
    right_KSN: np.ndarray,
    kinds: Sequence[str],
    *,
    baseline: Mapping[str, float] | None = None,
    groups: Sequence[str] | None = None,
    chance: float | None = None,
) -> dict[str, Metric]:
    """The figures of which pictures were right without corruption and under each kind and severity.

    All severities and kinds of one picture are one sample: the intervals are over pictures, or over groups of them.

    Args:
        clean_N: bool [N].
        right_KSN: bool [K, S, N].
        kinds: K names.
        baseline: kind -> mean error over the severities, and "clean"; None: no mCE.
        groups: [N] pictures that belong together.
        chance: accuracy of guessing.
    """
    count = len(clean_N)

    def share(values_N: np.ndarray) -> Metric:
        return Metric(float(values_N.mean()), count, share_interval(values_N, groups), "fraction", chance)

    metrics = {"clean_top1": share(clean_N.astype(float)), "corrupted_top1": share(right_KSN.mean((0, 1)))}
    right = metrics["corrupted_top1"]
    metrics["mean_error"] = Metric(
        1 - right.value,
        count,
        (1 - right.ci95[1], 1 - right.ci95[0]),
        "fraction",
        None if chance is None else 1 - chance,
    )
    for kind, right_SN in zip(kinds, right_KSN, strict=True):
        metrics[f"{kind}_top1"] = share(right_SN.mean(0))
    if baseline is not None:
        wrong_KN = 1 - right_KSN.mean(1)
        base_K = np.array([baseline[kind] for kind in kinds])
        metrics["mCE"] = _percent((wrong_KN / base_K[:, None]).mean(0), groups)
        if CLEAN in baseline:
            more_K = base_K - baseline[CLEAN]
            if (more_K <= 0).any():
                kind = kinds[int(np.flatnonzero(more_K <= 0)[0])]
                raise ValueError(
                    f"the baseline's error under {kind} is not above its error without corruption: no relative error"
                )
            metrics["relative_mCE"] = _percent(((wrong_KN - (1.0 - clean_N)) / more_K[:, None]).mean(0), groups)
    return metrics


def _percent(values_N: np.ndarray, groups: Sequence[str] | None) -> Metric:
    low, high = bootstrap_interval(100 * values_N, groups)
    return Metric(100 * float(values_N.mean()), len(values_N), (low, high), "percent")


def _baseline(given: str | Mapping[str, float] | None, kinds: Sequence[str]) -> dict[str, float] | None:
    if given is None:
        return None
    if isinstance(given, str) and given != "alexnet":
        raise ValueError(f'baseline is "alexnet", or errors by kind, got {given!r}')
    errors = dict(ALEXNET if isinstance(given, str) else given)
    if missing := [kind for kind in kinds if kind not in errors]:
        raise ValueError(f"the baseline has no error of {', '.join(missing)}: add it, or leave these kinds out")
    if wrong := [f"{kind} {errors[kind]}" for kind in kinds if not 0 < errors[kind] <= 1]:
        raise ValueError(f"errors of a baseline are shares over 0 and up to 1, got {', '.join(wrong)}")
    return {kind: float(error) for kind, error in errors.items()}


# --------------------------------------------------------------------------------------------------------------- pictures


def _classes(data: LabelledSet | Source) -> list[str]:
    """What there is to choose from: the labels of all pictures, also of those that are not drawn."""
    if isinstance(data, LabelledSet):
        return list(data.classes)
    labels = set()
    for position in range(len(data)):
        with suppress(BadSampleError):
            labels.add(data[position].label)
    return sorted(labels - {None})  # type: ignore[arg-type]


def _at_size(image: Image.Image, size_px: int) -> Tensor:
    """uint8 [3, size, size] as the published programs view a picture before they corrupt it."""
    if size_px < 224:
        return to_tensor(image.resize((size_px, size_px), Image.Resampling.BILINEAR))
    width, height = shortest_side(image.width, image.height, round(size_px * 256 / 224))
    left, top = round((width - size_px) / 2), round((height - size_px) / 2)
    return to_tensor(image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size_px, top + size_px)))


@dataclass(frozen=True, slots=True)
class _View:
    """The pictures as they are corrupted."""

    pixels_NHW3: np.ndarray
    keys: tuple[str, ...]
    labels: tuple[str, ...]
    groups: tuple[str, ...] | None
    listing: str
    available: int
    skipped: int

    @classmethod
    def read(cls, view: Callable[[Image.Image], Tensor], source: Source, asked: Corruptions) -> _View:
        """Decode, resize and crop the pictures that are drawn, each once."""
        positions = np.arange(len(source))
        if asked.max_pictures is not None and len(source) > asked.max_pictures:
            positions = np.sort(np.random.default_rng(asked.seed).permutation(len(source))[: asked.max_pictures])
        samples: list[Sample] = []
        pixels: list[np.ndarray] = []
        report = BadReport(0.05, total=len(positions))
        part = Selection(source, positions.tolist())
        for batch in iterate(part, view, num_workers=asked.num_workers):
            report.add(len(batch.samples) + len(batch.bad), batch.bad)
            for sample, picture in zip(batch.samples, batch.pixels, strict=True):
                if sample.label is not None:
                    samples.append(sample)
                    pixels.append(picture.permute(1, 2, 0).numpy())
        if not samples:
            raise ValueError("no sample of the data has a label, so there is nothing to classify: use class folders or labels")
        listing = hashlib.sha256()
        for sample, picture in zip(samples, pixels, strict=True):
            listing.update(repr((sample.key, sample.label)).encode() + np.ascontiguousarray(picture).tobytes())
        groups = tuple(str(sample.meta["group"]) for sample in samples if "group" in sample.meta)
        return cls(
            np.ascontiguousarray(np.stack(pixels)),
            tuple(sample.key for sample in samples),
            tuple(str(sample.label) for sample in samples),
            groups if len(groups) == len(samples) and len(set(groups)) > 1 else None,
            listing.hexdigest(),
            len(source),
            len(positions) - len(samples),
        )

    def targets(self, classes: Sequence[str]) -> list[int]:
        place = {name: i for i, name in enumerate(classes)}
        if unknown := sorted(set(self.labels) - set(place)):
            raise ValueError(f"{len(unknown)} labels are not among the {len(classes)} classes, e.g. {', '.join(unknown[:10])}")
        return [place[label] for label in self.labels]


@dataclass(frozen=True, slots=True)
class _Corrupter:
    """(kind, severity, positions) -> uint8 [B, 3, H, W], in whatever process."""

    pixels_NHW3: np.ndarray
    seed: int
    frost: tuple[np.ndarray, ...] | None
    then: Preprocess | None

    def __getitem__(self, request: tuple[str, int, range]) -> Tensor:
        kind, severity, positions = request
        part = self.pixels_NHW3[positions.start : positions.stop]
        if kind != CLEAN:
            part = np.stack([corrupt(picture, kind, severity, seed=self.seed, frost=self.frost) for picture in part])
        if self.then is not None:
            return torch.stack([self.then.to_uint8(Image.fromarray(picture)) for picture in part])
        return torch.from_numpy(part).permute(0, 3, 1, 2)


def _batches(
    work: _Corrupter, asked: Sequence[tuple[str, int]], count: int, settings: Corruptions
) -> Iterator[tuple[int, range, Tensor]]:
    starts = range(0, count, settings.batch_size)
    plan = [(row, range(start, min(start + settings.batch_size, count))) for row in range(len(asked)) for start in starts]
    requests = ((*asked[row], batch) for row, batch in plan)
    made: Any = work
    with tqdm(total=len(asked) * count, desc="corrupted pictures", unit="picture", disable=not settings.progress) as bar:
        for (row, batch), pixels in zip(plan, run_workers(made, requests, settings.num_workers), strict=True):
            yield row, batch, pixels
            bar.update(len(batch))


def _predict(model: Any, pixels: Tensor, classes_CD: Tensor) -> Tensor:
    with judging(model) as device:
        vectors = model.encode_image(model.preprocessor.normalize(pixels.to(device)))
        images_BD = _unit(model, _checked(vectors, "a corrupted picture")).clone()
    return pair_scores(model)(images_BD, classes_CD).argmax(1)


# ------------------------------------------------------------------------------------------------------------------ words


def _table(
    right_KSN: np.ndarray, kinds: Sequence[str], severities: Sequence[int], groups: Sequence[str] | None
) -> list[dict[str, Any]]:
    """One row a kind: the accuracy at each severity with its interval, and their mean."""
    rows = []
    for kind, right_SN in zip(kinds, right_KSN, strict=True):
        row: dict[str, Any] = {"kind": kind}
        for severity, right_N in zip(severities, right_SN, strict=True):
            row[f"severity {severity}"] = float(right_N.mean())
            row[f"severity {severity} ci95"] = list(share_interval(right_N.astype(float), groups))
        rows.append(row | {"mean": float(right_SN.mean())})
    return rows


def _without(kinds: Sequence[str]) -> str:
    """Which kinds these are, in few words."""
    missing = [kind for kind in COMMON if kind not in kinds]
    extra = [kind for kind in kinds if kind in EXTRA]
    if len(missing) > 5:
        return ", ".join(kinds)
    words = "the common 15" + (f" without {', '.join(missing)}" if missing else "")
    return words + (f" and {', '.join(extra)}" if extra else "")


def _notes(kinds: Sequence[str], side: int, skipped: int) -> tuple[str, ...]:
    notes = []
    if "frost" not in kinds:
        notes.append("frost is left out: its photographs are not part of this package, so a mean is not over the published 15")
    if side not in (32, 64, 224):
        notes.append(
            f"no settings are published for {side} px: those for {severity_size(side, side)} px are used, lengths in pixels as is"
        )
    if skipped:
        notes.append(f"{skipped} pictures have no label or can't be read, and are left out")
    return tuple(notes)
