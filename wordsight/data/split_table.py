"""Splits as a table that `layouts.open_splits` reads back: path, label, split. Pictures without a file of their own get one."""

from __future__ import annotations

import csv
import io
import os
import shutil
from pathlib import Path

from PIL import Image

from wordsight.data.errors import BadSampleError
from wordsight.data.few_shot import LabelledSet, Splits
from wordsight.data.listed import ListedSource
from wordsight.data.selection import Selection


def write_split_table(splits: Splits, path: Path) -> Path | None:
    """Write path, label and split of each picture, and its weight where training pictures have one, whole or not at all.

    Paths below the table's folder are relative to it, so that both can be moved; others are absolute. Pictures of a source that
    is no folder (CIFAR's binary files, shards) are written beside the table first, into a folder with its name.

    Args:
        splits: what to write; a class without a picture is not in a table.
        path: .csv.

    Returns:
        The folder of pictures that were written, None where there was no need.

    Raises:
        ValueError: another ending.
        FileExistsError: that folder is there already.
        OSError: a picture can't be read; it is named.
    """
    if path.suffix.lower() != ".csv":
        raise ValueError(f"a table of splits is written as .csv, got {path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside, new = path.with_suffix(""), path.with_name(f".{path.stem}.new")
    shutil.rmtree(new, ignore_errors=True)
    weighed = splits.train is not None and splits.train.weights is not None
    rows: list[tuple[str, ...]] = []
    for part, given in splits.parts().items():
        weights = given.weights if part == "train" and given.weights is not None else (1.0,) * len(given)
        for i, (label, weight) in enumerate(zip(given.labels, weights, strict=True)):
            more = (repr(weight),) if weighed else ()
            file = _file(given, i)
            if file is None:
                if beside.exists():
                    raise FileExistsError(f"{beside} is there already, where pictures were to be written: choose another name")
                name = _write_picture(given, i, new, f"{part}/{splits.classes.index(label):04d}-{i:06d}")
                rows.append((f"{beside.name}/{name}", label, part, *more))
            else:
                rows.append((_from(path.parent, file), label, part, *more))
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([("path", "label", "split", *(("weight",) if weighed else ())), *rows])
    written = new.exists()
    if written:
        os.rename(new, beside)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text.getvalue(), encoding="utf-8", newline="")
    os.replace(temporary, path)
    return beside if written else None


def _file(pictures: LabelledSet, index: int) -> Path | None:
    """Where a picture lies, None where it has no file of its own."""
    source = pictures.source
    while isinstance(source, Selection):
        index = source.positions[index]
        source = source.sources[0]
    return source.path(index) if isinstance(source, ListedSource) else None


def _from(folder: Path, file: Path) -> str:
    whole = Path(os.path.abspath(file))
    start = Path(os.path.abspath(folder))
    return (whole.relative_to(start) if whole.is_relative_to(start) else whole).as_posix()


def _write_picture(pictures: LabelledSet, index: int, folder: Path, stem: str) -> str:
    """A picture's bytes as they are; one that is held as pixels as PNG. Its name under the folder."""
    try:
        image = pictures.source[index].image
    except BadSampleError as error:
        raise OSError(f"{error.key} can't be read: {error.reason}") from error
    if isinstance(image, bytes):
        content = image
        with Image.open(io.BytesIO(image)) as opened:
            suffix = {"JPEG": "jpg"}.get(str(opened.format), str(opened.format).lower())
    else:
        written = io.BytesIO()
        image.save(written, "PNG")
        content, suffix = written.getvalue(), "png"
    name = f"{stem}.{suffix}"
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return name
