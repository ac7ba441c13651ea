"""Prompts: class names -> one text embedding a class, templates ensembled in embedding space (CLIP, arXiv 2103.00020, 3.1.4).

Shape legend: C classes, c some of them, T templates, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from wordsight.evaluate.prompt_sets import is_set, nearest, prompt_set, set_names
from wordsight.evaluate.sharing import ALONE, Processes
from wordsight.evaluate.text_classifier import embed_prompts
from wordsight.system import PairScorer

# `name` is the class name alone, for models trained on names; further sets are files, see `prompt_sets`
PROMPT_SETS = ("simple", "name", "imagenet80")
TEXTS_AT_ONCE = 1 << 16  # of which the vectors are held before they are averaged: 128 MiB at width 512


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#"))


def prompt_templates(prompts: str | Path | Sequence[str]) -> tuple[str, ...]:
    """Templates with `{label}` in each: a named set, a text file with one a line (`#` starts a comment), or the templates as
    given.

    Args:
        prompts: "simple" (`A photo of a {label}.`), "name" (`{label}`), "imagenet80" (the paper's 80), another set of
            `prompt_sets.set_names()`, a path, or templates.

    Raises:
        ValueError: neither a set nor a file, an empty list, or a template without `{label}`.
    """
    if prompts == "simple":
        return ("A photo of a {label}.",)
    if prompts == "name":
        return ("{label}",)
    if isinstance(prompts, str) and is_set(prompts):
        return prompt_set(prompts).templates
    if isinstance(prompts, str | Path):
        path = Path(prompts)
        if not path.is_file():
            raise ValueError(
                f"no prompts {str(prompts)!r}{nearest(str(prompts), (*PROMPT_SETS, *set_names()))}: use one of "
                f"{', '.join(PROMPT_SETS)}, a data set's ({', '.join(set_names())}), or a text file with one template a line"
            )
        templates = _lines(path.read_text(encoding="utf-8"))
    else:
        templates = tuple(prompts)
    if not templates:
        raise ValueError(f"no template in {prompts!r}: write at least one, e.g. 'A photo of a {{label}}.'")
    for template in templates:
        if "{label}" not in template:
            raise ValueError(
                f"the template {template!r} has no {{label}}: write it where the class name goes, e.g. 'a photo of a {{label}}.'"
            )
    return templates


def own_prompts(model: Any) -> str:
    """The prompts that a model was trained for, as its recipe said; "simple" where it said nothing."""
    return (getattr(model, "provenance", None) or {}).get("prompts") or "simple"


def fill(template: str, label: str) -> str:
    """The template with the class name in place; other braces stay as they are."""
    return template.replace("{label}", label)


def class_embeddings(
    model: Any,
    classes: Sequence[str],
    templates: Sequence[str],
    *,
    names: Mapping[str, Sequence[str]] | None = None,
    batch_size: int = 256,
    progress: bool = False,
    world: Processes = ALONE,
) -> Tensor:
    """One unit vector a class: the mean over templates of the unit text embeddings, made a unit vector again (a PairScorer's mean
    stays as it is).

    Args:
        model: an Embedder.
        classes: C names.
        templates: T templates with `{label}`.
        names: what stands in the templates for a class, where it is not the class itself; the mean goes over all of them.
        batch_size: texts encoded at once, by towers that share no beginnings (`text_classifier`).
        progress: show a bar.
        world: the processes that share the texts; each gets all vectors.

    Returns:
        float32 [C, D] on the CPU.
    """
    parts = _by_template(model, classes, templates, names, batch_size, progress, world)
    means = [ensembled(model, vectors_cTD) for vectors_cTD in parts]
    return torch.cat(means)


def prompt_embeddings(
    model: Any,
    classes: Sequence[str],
    templates: Sequence[str],
    *,
    names: Mapping[str, Sequence[str]] | None = None,
    batch_size: int = 256,
    progress: bool = False,
    world: Processes = ALONE,
) -> Tensor:
    """A vector for each class in each template: float32 [C, T, D] on the CPU, of unit length but for a class of several names,
    where it is their mean. The arguments are those of `class_embeddings`, which is `ensembled` of this."""
    return torch.cat(list(_by_template(model, classes, templates, names, batch_size, progress, world)))


def ensembled(model: Any, vectors_CTD: Tensor) -> Tensor:
    """Vectors of classes in templates -> one a class: the mean, of unit length unless the model scores pairs itself: [C, D]."""
    mean_CD = vectors_CTD.mean(1)
    return mean_CD if isinstance(model, PairScorer) else normalize(mean_CD, dim=-1)


def _by_template(
    model: Any,
    classes: Sequence[str],
    templates: Sequence[str],
    names: Mapping[str, Sequence[str]] | None,
    batch_size: int,
    progress: bool,
    world: Processes,
) -> Iterator[Tensor]:
    """[c, T, D] of as many classes at once as keep the texts in memory few."""
    step = max(1, TEXTS_AT_ONCE // len(templates))
    for start in range(0, len(classes), step):
        several = [tuple((names or {}).get(label, (label,))) for label in classes[start : start + step]]
        if not all(several):
            raise ValueError(f"the class {classes[start + several.index(())]!r} has no name: give one at least, or no entry")
        texts = [fill(template, name) for all_names in several for name in all_names for template in templates]
        vectors_MD = embed_prompts(model, texts, batch_size=batch_size, description="prompts" if progress else None, world=world)
        vectors_NTD = vectors_MD.unflatten(0, (-1, len(templates)))
        if len(vectors_NTD) == len(several):
            yield vectors_NTD
        else:
            ends = accumulate(map(len, several), initial=0)
            yield torch.stack([vectors_NTD[first:last].mean(0) for first, last in pairwise(ends)])
