"""Prompts: class names -> one text embedding a class, templates ensembled in embedding space (CLIP, arXiv 2103.00020, 3.1.4).

Shape legend: C classes, T templates, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from wordsight.evaluate.embedding import embed_texts
from wordsight.evaluate.sharing import ALONE, Processes
from wordsight.system import PairScorer

# `imagenet80` is a file beside this one; `name` is the class name alone, for models trained on names
PROMPT_SETS = ("simple", "name", "imagenet80")


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#"))


def prompt_templates(prompts: str | Path | Sequence[str]) -> tuple[str, ...]:
    """Templates with `{label}` in each: a named set, a text file with one a line (`#` starts a comment), or the templates as
    given.

    Args:
        prompts: "simple" (`A photo of a {label}.`), "name" (`{label}`), "imagenet80" (the paper's 80), a path, or templates.

    Raises:
        ValueError: neither a set nor a file, an empty list, or a template without `{label}`.
    """
    if prompts == "simple":
        return ("A photo of a {label}.",)
    if prompts == "name":
        return ("{label}",)
    if prompts == "imagenet80":
        return _lines((files("wordsight.evaluate") / "assets" / "imagenet80.txt").read_text(encoding="utf-8"))
    if isinstance(prompts, str | Path):
        path = Path(prompts)
        if not path.is_file():
            raise ValueError(
                f"no prompts {str(prompts)!r}: use one of {', '.join(PROMPT_SETS)}, or a text file with one template a line"
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
        batch_size: texts encoded at once.
        progress: show a bar.
        world: the processes that share the texts; each gets all vectors.

    Returns:
        float32 [C, D] on the CPU.
    """
    # as many classes at once as keep the prompts in memory few: C x T texts are never listed whole
    step = max(1, 16 * batch_size // len(templates))
    means = []
    with tqdm(total=len(classes), desc="prompts", unit="class", disable=not progress) as bar:
        for start in range(0, len(classes), step):
            names = classes[start : start + step]
            texts = [fill(template, name) for name in names for template in templates]
            vectors_CTD = embed_texts(model, texts, batch_size=batch_size, world=world).unflatten(0, (len(names), len(templates)))
            mean_CD = vectors_CTD.mean(1)
            means.append(mean_CD if isinstance(model, PairScorer) else normalize(mean_CD, dim=-1))
            bar.update(len(names))
    return torch.cat(means)
