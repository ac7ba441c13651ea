"""CLIP_benchmark's folders of shards (`wds_food101/`): shards of a split beside the class names, templates and type of the set.

```
wds_food101/
  classnames.txt                          one a line; a sample's `.cls` is the place of its class, from 0
  zeroshot_classification_templates.txt   one a line, with {c} where the name goes
  dataset_type.txt                        "retrieval" (captions in `.txt`, one a line), "multilabel" (0 and 1 in `.npy`); or none
  test/0.tar, test/1.tar, test/nshards.txt
```
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from wordsight.data.errors import BadSampleError
from wordsight.data.shards import ShardSource
from wordsight.types import Sample

NAMES, TEMPLATES, KIND = "classnames.txt", "zeroshot_classification_templates.txt", "dataset_type.txt"
KINDS = ("classification", "multilabel", "retrieval")


class ClipBenchmarkSource:
    """A split of such a folder.

    Args:
        split: the folder of the shards.
        root: the folder of the names, mostly its parent.

    Attributes:
        bad, part_sizes: see `ShardSource`.
        kind: one of `KINDS`.
        classes: labels in the published order, each once. A name that is published twice ("missile" in ImageNet) has its place
            in brackets from the second time on, as labels tell classes apart.
        names: label -> the published name, where the label is not it.
        templates: the set's own, with `{label}` where the name goes; none where it has none.

    Raises:
        ValueError: damaged lists, or a number of shards other than the folder says.
    """

    def __init__(self, split: Path, root: Path) -> None:
        self.kind = _kind(root / KIND)
        published = _lines(root / NAMES)
        if self.kind != "retrieval" and not published:
            raise ValueError(
                f"{root / NAMES} is {'empty' if (root / NAMES).exists() else 'missing'}: write the class names, one a line"
            )
        seen: Counter[str] = Counter()
        classes = []
        for place, name in enumerate(published):
            seen[name] += 1
            classes.append(name if seen[name] == 1 else f"{name} (class {place})")
        self.classes = tuple(classes)
        self.names = {label: name for label, name in zip(classes, published, strict=True) if label != name}
        if len(set(self.classes)) < len(self.classes):
            raise ValueError(f"{root / NAMES} has names that look like ours for repeated ones: rename the classes in it")
        self.templates = tuple(_template(root / TEMPLATES, line) for line in _lines(root / TEMPLATES))
        paths = sorted(split.glob("*.tar"), key=lambda path: (len(path.name), path.name))  # 10.tar after 9.tar
        told = _lines(split / "nshards.txt")
        if told and told != [str(len(paths))]:
            raise ValueError(f"{split} holds {len(paths)} shards, but its nshards.txt says {told[0]!r}: fetch the missing ones")
        self._shards = ShardSource(paths, arrays=self.kind == "multilabel")
        self.bad, self.part_sizes = self._shards.bad, self._shards.part_sizes

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, index: int) -> Sample:
        """The sample, not decoded; of a multilabel set, `meta["labels"]` are the classes that the picture shows.

        Raises:
            BadSampleError: it can't be read, or its label is no class.
        """
        sample = self._shards[index]
        if self.kind == "retrieval":
            captions = tuple(
                dict.fromkeys(line.strip() for text in sample.captions for line in text.splitlines() if line.strip())
            )
            return replace(sample, captions=captions)
        if self.kind == "multilabel":
            meta = {name: value for name, value in sample.meta.items() if name != "array"}
            return replace(sample, label=None, meta=meta | {"labels": self._labels(sample)})
        if sample.label is None:
            raise BadSampleError(sample.key, "has no .cls, which is its class")
        if not (sample.label.isascii() and sample.label.isdigit()) or int(sample.label) >= len(self.classes):
            raise BadSampleError(sample.key, f"is of class {sample.label[:40]!r}; there are 0 to {len(self.classes) - 1}")
        return replace(sample, label=self.classes[int(sample.label)])

    def _labels(self, sample: Sample) -> tuple[str, ...]:
        content = sample.meta.get("array")
        if content is None:
            raise BadSampleError(sample.key, "has no .npy, which says its classes")
        try:
            shown = np.load(io.BytesIO(content), allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise BadSampleError(sample.key, f"has a .npy that can't be read: {error}") from error
        if shown.shape != (len(self.classes),) or not np.isin(shown, (0, 1)).all():
            raise BadSampleError(
                sample.key, f"has a .npy of shape {shown.shape}; it needs a 0 or 1 for each of {len(self.classes)} classes"
            )
        return tuple(self.classes[place] for place in np.flatnonzero(shown))

    def ahead(self, indices: Iterable[int]) -> None:
        """Nothing lies far away."""


def find(path: Path) -> tuple[Path, Path] | None:
    """(folder of shards, folder of names) where a folder is CLIP_benchmark's or a split of one; None where it is none.

    Raises:
        ValueError: it has several splits; says which.
    """
    if _known(path):
        splits = [path] if any(path.glob("*.tar")) else sorted({shard.parent for shard in path.glob("*/*.tar")})
        if len(splits) > 1:
            names = ", ".join(str(split) for split in splits)
            raise ValueError(f"{path} has several splits, and one is read at a time: give one of {names}")
        return (splits[0], path) if splits else None
    return (path, path.parent) if _known(path.parent) and any(path.glob("*.tar")) else None


def _known(folder: Path) -> bool:
    return (folder / NAMES).is_file() or (folder / KIND).is_file()


def _kind(path: Path) -> str:
    told = _lines(path)
    kind = told[0] if told else "classification"
    if kind not in KINDS:
        raise ValueError(f"{path} says {kind!r}; it is one of {', '.join(KINDS)}")
    return kind


def _lines(path: Path) -> list[str]:
    """The lines of a text file; none where it is not there."""
    if not path.is_file():
        return []
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from error


def _template(path: Path, line: str) -> str:
    if "{c}" not in line:
        raise ValueError(f"{path}: the template {line!r} has no {{c}}: write it where the class name goes")
    return line.replace("{c}", "{label}")
